"""Arithmetic of factorizations against the same arithmetic of their dense tensors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from tnreg import (
    Factorization,
    ModeTree,
    OptionError,
    ShapeError,
    SizeError,
    TreeError,
    decompose,
    truncate,
)
from tnreg import algebra as al

DTYPES = [torch.float64, torch.complex128]


def dense(model):
    return model.to_tensor().detach() if isinstance(model, Factorization) else model


def assert_equal(found, expected, size=0.0):
    """Equal to rounding of the expected tensor, or of terms of norm ``size`` that it is the sum of."""
    found = dense(found)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).norm() <= 1e-12 * max(expected.norm().item(), size)


def every(name, dtype):
    """Models of a tree: all joins, a root of ones, and pairs of unequal bonds."""
    tree = zoo.TREES[name]
    models = [zoo.model_of(tree, join, dtype=dtype) for join in zoo.joins_of(tree).values()]
    return [*models, zoo.model_of(tree, root="ones", dtype=dtype, seed=5)]


@pytest.mark.parametrize("name", zoo.TREES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_and_products(name, dtype):
    """Every pair of kinds: diagonal, full and mixed joins, trained roots and roots of ones."""
    models = every(name, dtype)
    for one, other in itertools.product(models, models):
        x, y = dense(one), dense(other)
        assert_equal(al.add(one, other), x + y)
        assert_equal(al.subtract(one, other), x - y, x.norm().item())
        assert_equal(al.hadamard(one, other), x * y)


@pytest.mark.parametrize("name", zoo.TREES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_one_model(name, dtype):
    generator = torch.Generator().manual_seed(3)
    for model in every(name, dtype):
        x, order = dense(model), model.tree.order
        assert_equal(al.scale(model, -2.5), -2.5 * x)
        assert_equal(al.scale(model, 1j), 1j * x)
        assert_equal(al.full_joins(model), x)
        assert_equal(al.diagonal_joins(model), x)
        assert set(al.full_joins(model).network.joins) <= {"leaf", "full"}
        assert set(al.diagonal_joins(model).network.joins) <= {"leaf", "diagonal"}
        turned = torch.randperm(order, generator=generator).tolist()
        assert_equal(al.permute_modes(model, turned), x.permute(turned))
        matrices, expected = {}, x
        for mode in range(0, order, 2):
            matrices[mode] = torch.randn(3, model.sizes[mode], dtype=dtype, generator=generator)
            expected = torch.tensordot(expected, matrices[mode], ([mode], [1])).movedim(-1, mode)
        assert_equal(al.mode_product(model, matrices), expected)


@pytest.mark.parametrize("name", zoo.TREES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_set_of_modes_can_be_taken_away(name, dtype):
    generator = torch.Generator().manual_seed(3)
    for model in every(name, dtype):
        x, order = dense(model), model.tree.order
        for count in range(1, order + 1):
            for modes in itertools.combinations(range(order), count):
                assert_equal(al.marginal(model, modes), x.sum(modes))
                key = tuple(1 if m in modes else slice(None) for m in range(order))
                assert_equal(al.select(model, key), x[key])
        vectors, expected = {}, x
        for mode in range(0, order, 2)[::-1]:
            vectors[mode] = torch.randn(model.sizes[mode], dtype=dtype, generator=generator)
            expected = torch.tensordot(expected, vectors[mode], ([mode], [0]))
        assert_equal(al.contract_modes(model, vectors), expected)


def test_the_tree_after_modes_are_taken_away():
    """Modes are renumbered in order; a node with one child left goes; one that had one child stays."""
    model = zoo.model_of(ModeTree([[0, 3], [[1, 4], 2]]))
    assert al.select(model, 0).tree == ModeTree([2, [[0, 3], 1]])
    assert al.select(model, (..., 0)).tree == ModeTree([[0, 3], [1, 2]])
    assert al.select(model, (0, slice(None), slice(None), 0)).tree == ModeTree([[0, 2], 1])
    assert al.select(model, (0, 0, 0, slice(None), 0)).tree == ModeTree([0])
    chain = zoo.model_of(ModeTree([[[0]], [[1, [2]]]]))
    assert al.select(chain, 0).tree == ModeTree([[0, [1]]])


KEYS = [
    0, -1, slice(1, None), slice(None, None, 2), ..., (..., 1), (0, ..., -2), (slice(0, 1), 1),
    (slice(None, None, -1), ...), (slice(-2, None), slice(None), 0, slice(1, 4)), (1, 1, 1, 1), (),
    np.int64(1), np.uint8(0), np.array(-1), torch.tensor(1), (0, torch.tensor(-1)),
    (..., np.int32(-1)), (slice(None), slice(2, None, -2)),
    (..., slice(-1, -4, -1)), (..., slice(-99, 99, 3)), (slice(np.int64(0), np.int64(1)), ...),
    (..., slice(None, 0, -1), 0), (-1, -1, -1, -1), (0, 0, ..., 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_keys_mean_what_they_mean_for_arrays(key):
    for join in ("diagonal", "full"):
        model = zoo.model_of(zoo.TREES["across"], join)
        assert_equal(al.select(model, key), torch.as_tensor(dense(model).numpy()[key].copy()))


NO_KEYS = [
    None, (0, None), True, np.False_, torch.tensor(True), [0, 1], (0, [0, 1]), np.array([0, 1]),
    np.array([True, False]), torch.tensor([0, 1]), 1.0, "a", ((0, 1), 0),
]  # fmt: skip


@pytest.mark.parametrize("key", NO_KEYS, ids=repr)
def test_keys_that_arrays_know_and_factorizations_do_not(key):
    """New axes, masks and lists of rows are refused; a boolean is no integer, as for arrays."""
    message = "a key is an integer, a slice or '...' for each mode, found"
    with pytest.raises(OptionError, match=message) as caught:
        al.select(zoo.model_of(zoo.TREES["across"]), key)
    assert caught.value.argument == "key"


def test_modes_may_be_numpy_integers():
    model = zoo.model_of(zoo.TREES["across"])
    x = dense(model)
    assert_equal(al.marginal(model, np.int64(1)), x.sum(1))
    assert_equal(al.marginal(model, np.array([0, 3])), x.sum((0, 3)))
    assert_equal(al.permute_modes(model, np.array([3, 1, 0, 2])), x.permute(3, 1, 0, 2))


def test_trees_a_thousand_nodes_deep():
    """Deeper than Python recurses: whatever makes a new tree walks the old one without recursion."""
    tree = ModeTree.caterpillar(1010)
    model = Factorization(tree, 2, 2, join="full", std=0.7, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(0))  # fmt: skip
    index = torch.randint(0, 2, (1, 1010), generator=torch.Generator().manual_seed(1))
    turned = al.permute_modes(model, range(1009, -1, -1))
    hung = al.reroot(model, tree.interior[500])
    last = al.select(model, (..., int(index[0, -1])))
    for other, key in ((hung, index), (turned, index.flip(1)), (last, index[:, :-1])):
        assert torch.allclose(other.entries(key), model.entries(index), rtol=1e-9, atol=0)
    assert model.entries(index).item() != 0


@settings(max_examples=40, deadline=None)
@given(model=zoo.models(), data=st.data())
def test_random_models(model, data):
    x, order = dense(model), model.tree.order
    modes = data.draw(st.sets(st.integers(0, order - 1), min_size=1))
    # terms may cancel: rounding is that of the terms
    size = math.prod(w.norm().item() for w in model.weights.values())
    assert_equal(al.marginal(model, sorted(modes)), x.sum(sorted(modes)), size)
    assert_equal(al.add(model, al.scale(model, 0.5)), 1.5 * x, size)
    assert_equal(al.hadamard(model, model), x * x, size**2)
    assert_equal(al.diagonal_joins(al.full_joins(model)), x, size)


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.complex128]),
    rtol=st.sampled_from([1e-12, 1e-6, 1e-2, 0.3, 0.9]),
    data=st.data(),
)
def test_guarantees_on_random_models(dtype, rtol, data):
    """decompose, truncate, sums and products: any tree, joins, sizes and dtype, any tolerance."""
    model = data.draw(zoo.models(dtype))
    wide, x = torch.promote_types(dtype, torch.float64), dense(model)
    weights = {v: w.to(wide) for v, w in model.weights.items()}
    exact = dense(Factorization.from_weights(model.tree, weights, join=model.network.named_joins))
    size = math.prod(w.norm().item() for w in model.weights.values())
    for found, expected, terms in (
        (decompose(x, model.tree, rtol=rtol), x.to(wide), 0.0),
        (truncate(model, rtol=rtol), exact, size),
        (al.linear_combination([model, model], [1.0, -0.5], rtol=rtol), 0.5 * exact, size),
        (al.hadamard(model, model, rtol=rtol), exact * exact, size**2),
    ):
        norm, error = expected.norm().item(), (dense(found).to(wide) - expected).norm().item()
        rounding = 50 * len(model.tree.nodes) * torch.finfo(dtype).eps * max(norm, terms)
        assert error <= min(rtol * norm, found.error_bound) + rounding
        assert found.dtype == dtype and found.tree == model.tree


def test_bonds_are_no_larger_than_said():
    one, other = (zoo.model_of(ModeTree.binary(4), "full", seed=s) for s in (0, 1))
    bonds = list(zip(one.network.bonds, other.network.bonds, strict=True))[:-1]
    assert list(al.add(one, other).network.bonds[:-1]) == [a + b for a, b in bonds]
    assert list(al.hadamard(one, other).network.bonds[:-1]) == [a * b for a, b in bonds]
    rounded = truncate(al.add(one, one), rtol=1e-10)
    assert rounded.network.bonds == truncate(one).network.bonds  # twice the same needs no more
    assert_equal(rounded, 2 * dense(one))


def test_differences_of_large_orders():
    """At order 512 nothing dense exists; the difference of a model and itself is zero to rounding."""
    model = Factorization(ModeTree.binary(512), 2, 3, std=0.5, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(0))  # fmt: skip
    twice = al.add(model, model)
    assert twice.log_norm().item() == pytest.approx(model.log_norm().item() + math.log(2), abs=1e-9)
    total = al.marginal(model, range(512))
    assert torch.isfinite(total) and total.ndim == 0
    expected = model(torch.ones(1, 512, 2, dtype=torch.float64))[0]
    assert total.item() == pytest.approx(expected.item(), rel=1e-9)


def test_nothing_given_is_changed():
    model = zoo.model_of(ModeTree.binary(4))
    before = {v: w.detach().clone() for v, w in model.weights.items()}
    al.add(model, model), al.select(model, 0), al.hadamard(model, model, rtol=0.1)
    al.mode_product(model, {0: torch.zeros(2, 2).double()})
    assert all(torch.equal(w, before[v]) for v, w in model.weights.items())


@pytest.mark.parametrize(
    ("call", "error", "argument", "message"),
    [
        (lambda m: al.add(m, zoo.model_of(ModeTree.star(4))), ShapeError, "other", "same tree and sizes"),
        (lambda m: al.hadamard(m, zoo.model_of(m.tree, sizes=(2, 2, 2, 2)), rtol=0.1), ShapeError, "other",
         "same tree"),
        (lambda m: al.hadamard(m, m, rtol=2.0), OptionError, "rtol", "rtol must be a number in"),
        (lambda m: al.add(m, 3), OptionError, "other", "expected a Factorization, found int"),
        (lambda m: al.select(m, 2), ShapeError, "key", "index 2 is out of range for mode 0, size 2"),
        (lambda m: al.select(m, slice(2, 2)), ShapeError, "key", "takes nothing of mode 0"),
        (lambda m: al.select(m, -3), ShapeError, "key", "index -3 is out of range for mode 0, size 2"),
        (lambda m: al.select(m, (..., slice(3, 3, -1))), ShapeError, "key", "takes nothing of mode 3"),
        (lambda m: al.select(m, slice(None, None, 0)), OptionError, "key", "mode 0 is no slice: .*zero"),
        (lambda m: al.select(m, slice("a", None)), OptionError, "key", "mode 0 is no slice: .*integers"),
        (lambda m: al.select(m, (0,) * 5), OptionError, "key", "for other than 4 modes"),
        (lambda m: al.select(m, (..., ...)), OptionError, "key", "for other than 4 modes"),
        (lambda m: al.marginal(m, True), TreeError, "modes", "no mode True"),
        (lambda m: al.marginal(m, [0, 1.5]), TreeError, "modes", "no mode 1.5"),
        (lambda m: al.marginal(m, 4), TreeError, "modes", "no mode 4; modes are 0..3"),
        (lambda m: al.contract_modes(m, {0: torch.ones(3).double()}), ShapeError, "vectors",
         r"(?s)vector of mode 0 does not fit.*\(3,\).*\(2,\)"),
        (lambda m: al.mode_product(m, {1: torch.ones(3, 2).double()}), ShapeError, "matrices",
         r"(?s)matrix of mode 1 does not fit.*\(3, 2\).*\(any, 3\)"),
        (lambda m: al.mode_product(m, {-1: torch.ones(3, 2)}), TreeError, "matrices", "no mode -1"),
        (lambda m: al.permute_modes(m, (0, 1, 2, 2)), OptionError, "order", "each of 0..3 once"),
        (lambda m: al.reroot(m, "nowhere"), TreeError, "node", "nowhere"),
        (lambda m: al.reroot(m, 0), OptionError, "node", "0 is a leaf; name an interior node"),
        (lambda m: al.linear_combination([m], [1, 2], rtol=1e-3), OptionError, "coefficients", "1 and 2"),
        (lambda m: al.linear_combination([], rtol=1e-3), OptionError, "models", "as many coefficients"),
    ],
)  # fmt: skip
def test_refuses(call, error, argument, message):
    with pytest.raises(error, match=message) as caught:
        call(zoo.model_of(ModeTree.binary(4)))
    assert caught.value.argument == argument


@pytest.mark.parametrize("name", zoo.TREES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_interior_node_can_be_the_root(name, dtype):
    for model in every(name, dtype):
        x = dense(model)
        for node in model.tree.interior:
            found = al.reroot(model, node)
            assert_equal(found, x)
            # what hangs below the new root is what the old node's neighbours separate
            below = {found.tree.modes_below(c) for c in found.tree.children(found.tree.root)}
            inside = {model.tree.modes_below(c) for c in model.tree.children(node)}
            rest = set(model.tree.leaves) - set(model.tree.modes_below(node))
            assert below == inside | ({tuple(sorted(rest))} if rest else set())


def test_reroot_moves_a_chain_of_bonds():
    """A tensor train hung up at its middle keeps its bonds."""
    tree = ModeTree.caterpillar(6)
    ranks = {node: 2 + i % 3 for i, node in enumerate(tree.nodes[:-1])}
    model = Factorization(tree, 3, ranks, join="full", std=1.0, dtype=torch.float64)
    found = al.reroot(model, tree.interior[2])
    assert_equal(found, dense(model))
    assert found.tree.root == tuple(range(6)) and len(found.tree.children(found.tree.root)) == 3
    assert sum(p.numel() for p in found.parameters()) <= sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-6])
def test_linear_combinations_keep_their_promise(dtype, rtol):
    tree = zoo.TREES["mixed-arity"]
    models = [zoo.model_of(tree, dtype=dtype, seed=k) for k in range(5)]
    factors = [1.0, -2.0, 0.5, 3.0, 1.0]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = sum(c * dense(m).to(wide) for c, m in zip(factors, models, strict=True))
    found = al.linear_combination(models, factors, rtol=rtol)
    error = (dense(found).to(wide) - exact).norm()
    rounding = 1e4 * torch.finfo(dtype).eps * sum(m.norm().item() for m in models)
    assert error <= min(rtol * exact.norm(), found.error_bound) + rounding


def test_a_long_sum_never_grows():
    """Twenty terms that span four dimensions: bonds of partial sums stay small, and the result."""
    tree = ModeTree.binary(8)
    base = [
        Factorization(tree, 3, 2, join="full", std=0.5, dtype=torch.float64,
                      generator=torch.Generator().manual_seed(k)) for k in range(2)
    ]  # fmt: skip
    models = base * 10
    factors = [(-1.0) ** (k // 2) * (1 + k) for k in range(20)]
    found = al.linear_combination(models, factors, rtol=1e-8)
    exact = sum(factors[::2]) * dense(base[0]) + sum(factors[1::2]) * dense(base[1])
    assert (dense(found) - exact).norm() <= 1e-8 * exact.norm()
    assert max(found.network.bonds) <= 4
    assert_equal(al.linear_combination(models[:1], rtol=1e-8), dense(base[0]))


def test_a_sum_that_cancels():
    """What is left is rounding: it is kept, not guessed at."""
    model = zoo.model_of(zoo.TREES["htf-4"], dtype=torch.float64)
    found = al.linear_combination([model, model, model], [1.0, 1.0, -2.0], rtol=1e-3)
    assert dense(found).norm() <= 1e-13 * model.norm()


def decaying(tree, size, rank, seed, dtype=torch.float64):
    """Singular values that fall by a half from one to the next, all of the bond in use."""
    model = Factorization(tree, size, rank, join="full", std=1.0, dtype=dtype,
                          generator=torch.Generator().manual_seed(seed))  # fmt: skip
    falling = 0.5 ** torch.arange(rank)
    weights = {v: w if v == tree.root else w * falling for v, w in model.weights.items()}
    return Factorization.from_weights(tree, weights, join="full")


@pytest.mark.parametrize("name", zoo.TREES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_products_keep_the_tolerance(name, dtype):
    models = every(name, dtype)
    for one, other in zip(models, [*models[1:], models[0]], strict=True):
        exact = dense(one) * dense(other)
        for rtol in (1e-10, 1e-2):
            found = al.hadamard(one, other, rtol=rtol)
            error = (dense(found) - exact).norm()
            assert error <= rtol * exact.norm() and error <= found.error_bound * (1 + 1e-9)


@pytest.mark.parametrize("tree", [ModeTree.binary(8), ModeTree.caterpillar(8)], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_products_of_wide_bonds(tree, dtype):
    """Bonds of a product beyond the size of its modes; the result is hardly larger than the best one."""
    one, other = (decaying(tree, 4, 8, seed, dtype) for seed in (0, 1))
    exact = dense(one) * dense(other)
    size = exact.norm()
    for rtol in (1e-1, 1e-3, 1e-8):
        found = al.hadamard(one, other, rtol=rtol)
        error = (dense(found) - exact).norm()
        assert error <= rtol * size and error <= found.error_bound <= 1.01 * rtol * size
        best = truncate(decompose(exact, tree, rtol=1e-10), rtol=rtol)
        assert sum(found.network.bonds) <= 1.3 * sum(best.network.bonds)
    found, best = al.hadamard(one, other, ranks=8), truncate(decompose(exact, tree), ranks=8)
    error, least = ((dense(m) - exact).norm() for m in (found, best))
    assert max(found.network.bonds) == 8 and least <= found.error_bound <= 2 * least
    assert error <= 1.2 * least
    assert max(al.hadamard(one, other, ranks=8, rtol=1e-8).network.bonds) == 8
    assert max(al.hadamard(one, other, ranks={tree.interior[0]: 2}, rtol=1e-2).network.bonds) > 2


@pytest.mark.parametrize(("order", "rank", "power"), [(64, 4, 0), (256, 2, -200), (256, 2, 200)])
def test_rounded_products_of_any_order_and_scale(order, rank, power):
    one, other = (decaying(ModeTree.binary(order), 2, rank, seed) for seed in (0, 1))
    one = al.scale(al.scale(one, 10.0 ** (power / 2)), 10.0 ** (power / 2))
    found = al.hadamard(one, other, rtol=1e-3)
    assert all(bool(torch.isfinite(w).all()) for w in found.weights.values())
    exact = al.hadamard(one, other)
    assert al.subtract(exact, found).log_norm() - exact.log_norm() <= math.log(1e-3)


def test_rounded_products_of_columns_of_far_apart_scales():
    """Scales of 1e150 and 1e-150 that meet again above."""
    one = zoo.model_of(ModeTree.binary(4), "full")
    weights = {v: w.detach().clone() for v, w in one.weights.items()}
    weights[0][:, 0] *= 1e150
    weights[(0, 1)][0] /= 1e150
    found = al.hadamard(Factorization.from_weights(one.tree, weights), one, rtol=1e-8)
    exact = dense(one) ** 2
    assert (dense(found) - exact).norm() <= 1e-8 * exact.norm()


def test_products_that_vanish():
    tree = ModeTree.binary(4)
    left, right = (
        decompose(torch.zeros(4, 4, 4, 4).double().index_fill(0, torch.tensor(rows), 1.0), tree)
        for rows in ([0, 1], [2, 3])
    )
    for one, other in ((left, right), (left, al.scale(left, 0.0))):
        assert dense(al.hadamard(one, other, rtol=1e-3)).norm() <= 1e-14 * left.norm() ** 2


def test_products_too_large_for_memory(monkeypatch):
    wide = Factorization(ModeTree.binary(8), 2, 100, join="full", dtype=torch.float64)
    monkeypatch.setattr("tnreg.algebra.arithmetic.available", lambda device: 10**9)
    for options in ({}, {"ranks": 3}):
        with pytest.raises(SizeError, match=r"(?s)the exact product would not .* available on cpu"):
            al.hadamard(wide, wide, **options)
