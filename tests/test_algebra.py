"""Arithmetic of factorizations against the same arithmetic of their dense tensors."""

import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import random

from tnreg import Factorization, ModeTree, decompose, truncate
from tnreg import algebra as al
from tnreg.errors import DataError, OptionError, ShapeError, SizeError, TreeError

DTYPES = [torch.float64, torch.complex128]


def dense(model):
    return model.to_tensor().detach() if isinstance(model, Factorization) else model


def assert_equal(found, expected, size=0.0):
    """Equal to rounding of the expected tensor, or of terms of norm ``size`` that it is the sum of."""
    found = dense(found)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).norm() <= 1e-12 * max(expected.norm().item(), size)


@pytest.fixture(params=itertools.product(zoo.TREES, DTYPES), ids=str)
def models(request):
    """Models of a tree: all joins, a root of ones, and pairs of unequal bonds."""
    tree, dtype = zoo.TREES[request.param[0]], request.param[1]
    models = [zoo.model_of(tree, join, dtype=dtype) for join in zoo.joins_of(tree).values()]
    return [*models, zoo.model_of(tree, root="ones", dtype=dtype, seed=5)]


def weights_norm(model):
    """What rounding is measured by where terms may cancel."""
    return math.prod(w.norm().item() for w in model.weights.values())


def test_sums_and_products(models):
    """Every pair of kinds: diagonal, full and mixed joins, trained roots and roots of ones."""
    for one, other in itertools.product(models, models):
        x, y = dense(one), dense(other)
        assert_equal(al.add(one, other), x + y)
        assert_equal(al.subtract(one, other), x - y, x.norm().item())
        assert_equal(al.hadamard(one, other), x * y)


def test_of_one_model(models):
    generator = random(3)
    for model in models:
        x, order = dense(model), model.tree.order
        assert_equal(al.scale(model, -2.5), -2.5 * x)
        assert_equal(al.scale(model, 1j), 1j * x)
        for join, change in (("full", al.full_joins), ("diagonal", al.diagonal_joins)):
            assert_equal(change(model), x)
            assert set(change(model).network.joins) <= {"leaf", join}
        turned = torch.randperm(order, generator=generator).tolist()
        assert_equal(al.permute_modes(model, turned), x.permute(turned))
        matrices, expected = {}, x
        for mode in range(0, order, 2):
            matrices[mode] = torch.randn(3, model.sizes[mode], dtype=x.dtype, generator=generator)
            expected = torch.tensordot(expected, matrices[mode], ([mode], [1])).movedim(-1, mode)
        assert_equal(al.mode_product(model, matrices), expected)


@pytest.mark.parametrize("model", list(zoo.bare_zoo()))
def test_bare_leaves(model):
    """Both bare, or one and the other with a weight; modes that are indices of diagonal joins."""
    x, tree, order = dense(model), model.tree, model.tree.order
    plain = (zoo.model_of(tree, join, sizes=model.sizes, seed=3) for join in ("diagonal", "full"))
    for other in (model, *plain):
        y = dense(other)
        for one, two in ((model, other), (other, model)):
            assert_equal(al.add(one, two), x + y)
            assert_equal(al.hadamard(one, two), x * y)
    total, product = (
        al.linear_combination([model, other], [1, -2], rtol=1e-2),
        al.hadamard(model, other, rtol=1e-2),
    )
    for found, wanted in ((total, x - 2 * y), (product, x * y)):
        assert (dense(found) - wanted).norm() <= 1e-2 * wanted.norm()
    assert_equal(al.scale(model, -2j), -2j * x)
    assert_equal(al.full_joins(model), x)
    assert_equal(al.diagonal_joins(model), x)
    assert set(al.diagonal_joins(model).network.named_joins.values()) == {"diagonal"}
    turned = torch.randperm(order, generator=random(3)).tolist()
    assert_equal(al.permute_modes(model, turned), x.permute(turned))
    for node in tree.interior:
        assert_equal(al.reroot(model, node), x)
    for step in (1, 2):
        matrices = {n: zoo.randn(3, model.sizes[n], seed=n) for n in range(0, order, step)}
        expected = x
        for n, matrix in matrices.items():
            expected = torch.tensordot(expected, matrix, ([n], [1])).movedim(-1, n)
        assert_equal(al.mode_product(model, matrices), expected)
        for rest in range(1 + (order > 1)):
            modes = list(range(rest, order, step))
            assert_equal(al.marginal(model, modes), x.sum(modes))
            key = tuple(1 if n in modes else slice(None, None, -1) for n in range(order))
            assert_equal(al.select(model, key), torch.as_tensor(x.numpy()[key].copy()))


def test_bare_leaves_stay_what_they_are():
    """Cores of trains are added, multiplied and cut as cores; leaves with weights go into full joins."""
    tree = ModeTree.caterpillar(4)
    one, other = (
        zoo.bare_model(tree, "full", kinds) for kinds in ({1: "bare", 2: "bare"}, {2: "bare", 3: "bare"})
    )
    for found, bonds in (
        (al.add(one, other), [a + b for a, b in zip(one.network.bonds, other.network.bonds, strict=True)]),
        (al.hadamard(one, one), [a * a for a in one.network.bonds]),
        (al.scale(one, 2), one.network.bonds),
    ):
        net = found.network
        assert {1, 2} <= {n for n, kind in net.named_leaves.items() if kind == "bare"}
        assert all(
            net.bonds[i] == (found.sizes[tree.nodes[i]] if i in net.bare else bonds[i])
            for i in range(len(bonds) - 1)
        )
    cut = al.mode_product(al.select(one, (..., slice(0, 2))), {1: torch.ones(1, 3).double()})
    assert cut.network.named_leaves == one.network.named_leaves and cut.sizes == (2, 1, 5, 2)


@pytest.mark.slow
def test_every_set_of_modes_can_be_taken_away(models):
    generator = random(3)
    for model in models:
        x, order = dense(model), model.tree.order
        for taken in itertools.product((False, True), repeat=order):
            modes = [m for m in range(order) if taken[m]]
            if modes:
                assert_equal(al.marginal(model, modes), x.sum(modes))
                key = tuple(1 if t else slice(None) for t in taken)
                assert_equal(al.select(model, key), x[key])
        vectors, expected = {}, x
        for mode in range(0, order, 2)[::-1]:
            vectors[mode] = torch.randn(model.sizes[mode], dtype=x.dtype, generator=generator)
            expected = torch.tensordot(expected, vectors[mode], ([mode], [0]))
        assert_equal(al.contract_modes(model, vectors), expected)


def test_the_tree_after_modes_are_taken_away():
    """Modes are renumbered in order; a node with one child left goes; one that had one child stays."""
    every = slice(None)
    for tree, key, expected in (
        ([[0, 3], [[1, 4], 2]], 0, [2, [[0, 3], 1]]),
        ([[0, 3], [[1, 4], 2]], (..., 0), [[0, 3], [1, 2]]),
        ([[0, 3], [[1, 4], 2]], (0, every, every, 0), [[0, 2], 1]),
        ([[0, 3], [[1, 4], 2]], (0, 0, 0, every, 0), [0]),
        ([[[0]], [[1, [2]]]], 0, [[0, [1]]]),
    ):
        assert al.select(zoo.model_of(ModeTree(tree)), key).tree == ModeTree(expected)


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


@pytest.mark.slow
def test_trees_a_thousand_nodes_deep():
    """Deeper than Python recurses: whatever makes a new tree walks the old one without recursion."""
    tree = ModeTree.caterpillar(1010)
    model = zoo.model_of(tree, "full", sizes=2, bonds=2)
    index = torch.randint(0, 2, (1, 1010), generator=random(1))
    turned = al.permute_modes(model, range(1009, -1, -1))
    hung = al.reroot(model, tree.interior[500])
    last = al.select(model, (..., int(index[0, -1])))
    for other, key in ((hung, index), (turned, index.flip(1)), (last, index[:, :-1])):
        assert torch.allclose(other.entries(key), model.entries(index), rtol=1e-9, atol=0)
    assert model.entries(index).item() != 0


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(model=st.booleans().flatmap(lambda bare: zoo.models(bare=bare)), data=st.data())
def test_random_models(model, data):
    x, size = dense(model), weights_norm(model)
    modes = sorted(data.draw(st.sets(st.integers(0, model.tree.order - 1), min_size=1)))
    assert_equal(al.marginal(model, modes), x.sum(modes), size)
    assert_equal(al.add(model, al.scale(model, 0.5)), 1.5 * x, size)
    assert_equal(al.hadamard(model, model), x * x, size**2)
    assert_equal(al.diagonal_joins(al.full_joins(model)), x, size)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.complex128]),
    rtol=st.sampled_from([1e-12, 1e-6, 1e-2, 0.3, 0.9]),
    data=st.data(),
)
def test_guarantees_on_random_models(dtype, rtol, data):
    """decompose, truncate, sums and products: any tree, joins, sizes and dtype, any tolerance."""
    model = data.draw(zoo.models(dtype, bare=data.draw(st.booleans())))
    tree, join, leaves = model.tree, model.network.named_joins, model.network.named_leaves
    other = copy.deepcopy(model)
    other.load_weights({v: w.detach().flip(0) for v, w in model.weights.items()})
    wide, x, size = torch.promote_types(dtype, torch.float64), dense(model), weights_norm(model)
    weights = ({v: w.to(wide) for v, w in m.weights.items()} for m in (model, other))
    exact, reverse = (dense(Factorization.from_weights(tree, w, join=join, leaves=leaves)) for w in weights)
    factors, total = [1.0, -2.0, 0.5], 1.5 * exact - 2 * reverse
    for found, expected, terms in (
        (decompose(x, tree, rtol=rtol), x.to(wide), 0.0),
        (truncate(model, rtol=rtol), exact, size),
        (al.linear_combination([model, other, model], factors, rtol=rtol), total, 4 * size),
        (al.hadamard(model, other, rtol=rtol), exact * reverse, size**2),
    ):
        norm, error = expected.norm().item(), (dense(found).to(wide) - expected).norm().item()
        rounding = 50 * len(tree.nodes) * torch.finfo(dtype).eps * max(norm, terms)
        assert error <= min(rtol * norm, found.error_bound) + rounding
        assert found.dtype == dtype and found.tree == tree


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
    model = zoo.model_of(ModeTree.binary(512), sizes=2, bonds=3, std=0.5)
    twice = al.add(model, model)
    assert twice.log_norm().item() == pytest.approx(model.log_norm().item() + math.log(2), abs=1e-9)
    total = al.marginal(model, range(512))
    expected = model(torch.ones(1, 512, 2, dtype=torch.float64))[0]
    assert total.ndim == 0 and total.item() == pytest.approx(expected.item(), rel=1e-9)


def test_nothing_given_is_changed():
    model = zoo.model_of(ModeTree.binary(4))
    before = {v: w.detach().clone() for v, w in model.weights.items()}
    al.add(model, model), al.select(model, 0), al.hadamard(model, model, rtol=0.1)
    al.mode_product(model, {0: torch.zeros(2, 2).double()})
    assert all(torch.equal(w, before[v]) for v, w in model.weights.items())


@pytest.mark.parametrize(("call", "error", "argument", "message"), [
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
    (lambda m: al.linear_combination([m, 3], rtol=1e-3), OptionError, "other", "found int"),
    (lambda m: al.linear_combination([m, m], rtol=None), OptionError, "rtol", "rtol must be a number in"),
    (lambda m: al.linear_combination([m], [[1.0]], rtol=0.1), OptionError, "coefficients", "finite number"),
    (lambda m: al.scale(m, torch.ones(1)), OptionError, "factor", "must be a finite number"),
    (lambda m: al.scale(m, np.array([2.0, 3.0])), OptionError, "factor", "must be a finite number"),
    (lambda m: al.scale(m, math.nan), OptionError, "factor", "must be a finite number, found nan"),
    (lambda m: al.scale(m, complex(0, math.inf)), OptionError, "factor", "must be a finite number"),
    (lambda m: al.scale(m, "2"), OptionError, "factor", "must be a finite number, found '2'"),
    (lambda m: al.scale(m, True), OptionError, "factor", "must be a finite number, found True"),
    *(
        (call, OptionError, "model", "expected a Factorization, found int")
        for call in (
            lambda m: al.scale(3, 2), lambda m: al.marginal(5, [0]), lambda m: al.contract_modes(5, {}),
            lambda m: al.permute_modes(5, [0]), lambda m: al.reroot(5, 0), lambda m: al.diagonal_joins(5),
        )
    ),
])  # fmt: skip
def test_refuses(call, error, argument, message):
    with pytest.raises(error, match=message) as caught:
        call(zoo.model_of(ModeTree.binary(4)))
    assert caught.value.argument == argument


def test_every_interior_node_can_be_the_root(models):
    for model in models:
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
    model = zoo.model_of(tree, "full", sizes=3, bonds=ranks)
    found = al.reroot(model, tree.interior[2])
    assert_equal(found, dense(model))
    assert found.tree.root == tuple(range(6)) and len(found.tree.children(found.tree.root)) == 3
    assert sum(p.numel() for p in found.parameters()) <= sum(p.numel() for p in model.parameters())


def test_a_long_sum_never_grows():
    """Twenty terms that span four dimensions: bonds of partial sums stay small, and the result."""
    tree, options = ModeTree.binary(8), {"sizes": 3, "bonds": 2, "std": 0.5}
    base = [zoo.model_of(tree, "full", seed=seed, **options) for seed in (0, 1)]
    factors = [(-1.0) ** (k // 2) * (1 + k) for k in range(20)]
    found = al.linear_combination(base * 10, factors, rtol=1e-8)
    exact = sum(factors[::2]) * dense(base[0]) + sum(factors[1::2]) * dense(base[1])
    assert (dense(found) - exact).norm() <= 1e-8 * exact.norm()
    assert max(found.network.bonds) <= 4
    assert_equal(al.linear_combination(base[:1], rtol=1e-8), dense(base[0]))


def decaying(tree, size, rank, seed, dtype=torch.float64):
    """Singular values that fall by a half from one to the next, all of the bond in use."""
    model = zoo.model_of(tree, "full", sizes=size, bonds=rank, std=1.0, dtype=dtype, seed=seed)
    falling = 0.5 ** torch.arange(rank)
    weights = {v: w if v == tree.root else w * falling for v, w in model.weights.items()}
    return Factorization.from_weights(tree, weights, join="full")


@pytest.mark.slow
def test_rounded_products_keep_the_tolerance(models):
    for one, other in zip(models, [*models[1:], models[0]], strict=True):
        exact = dense(one) * dense(other)
        for rtol in (1e-10, 1e-2):
            found = al.hadamard(one, other, rtol=rtol)
            error = (dense(found) - exact).norm()
            assert error <= rtol * exact.norm() and error <= found.error_bound * (1 + 1e-9)


@pytest.mark.slow
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


def test_what_vanishes():
    """What is left is rounding: it is kept, not guessed at."""
    tree = ModeTree.binary(4)
    left, right = (
        decompose(torch.zeros(4, 4, 4, 4).double().index_fill(0, torch.tensor(rows), 1.0), tree)
        for rows in ([0, 1], [2, 3])
    )
    for one, other in ((left, right), (left, al.scale(left, 0.0))):
        assert dense(al.hadamard(one, other, rtol=1e-3)).norm() <= 1e-14 * left.norm() ** 2
    model = zoo.model_of(tree)
    found = al.linear_combination([model, model, model], [1.0, 1.0, -2.0], rtol=1e-3)
    assert dense(found).norm() <= 1e-13 * model.norm()


NUMBERS = [
    2, 0.0, 2j, Fraction(1, 4), np.int8(-3), np.float16(0.5), np.longdouble(3), np.complex64(1 + 2j),
    np.clongdouble(1 - 2j), np.array(2.5), np.array(2j), torch.tensor(-2), torch.tensor(1 + 2j).conj(),
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_numbers_of_any_kind(number):
    model, value = zoo.model_of(ModeTree.binary(3)), complex(number)
    x = dense(model) * (value if value.imag else value.real)
    assert_equal(al.scale(model, number), x)
    assert_equal(al.linear_combination([model, model], [number, 0.5], rtol=1e-13), x + 0.5 * dense(model))


def cosine(one, other):
    x, log2 = one.scaled_inner(other)
    logs = log2 * math.log(2) - (one.log_norm() + other.log_norm()).detach()
    return float(x.detach().real * logs.exp())


@torch.no_grad()
@pytest.mark.parametrize("where", ["root", 0])
@pytest.mark.parametrize(
    ("dtype", "power"), [(torch.float32, 30), (torch.complex64, -30), (torch.float64, 150)], ids=str
)
def test_units_do_not_matter(dtype, power, where):
    """Models, matrices and vectors in another unit: sizes follow, ratios and ranks stay."""
    tree, found = zoo.TREES["across"], []
    for unit in (1.0, 10.0**power, 10.0**-power):

        def in_unit(model, unit=unit):
            if where == "root":
                return al.scale(model, unit)
            weights = {v: w * unit if v == where else w for v, w in model.weights.items()}
            return Factorization.from_weights(model.tree, weights, join=model.network.named_joins)

        one, other, third = (
            in_unit(zoo.model_of(tree, join, dtype=dtype, seed=seed))
            for seed, join in enumerate(("diagonal", "full", "diagonal"))
        )
        total = al.linear_combination([one, other, third, one], [1, -2, 0.5, 0.3], rtol=1e-2)
        product, cut = al.hadamard(one, other), al.hadamard(one, other, rtol=1e-2)
        ones = torch.ones(3, one.sizes[1]).to(dtype) * unit
        products = [product, al.mode_product(one, {1: ones}), al.contract_modes(one, {1: ones[0]})]
        others = [total, al.select(one, 1), al.marginal(one, [1]), al.reroot(one, tree.interior[0])]
        logs = [m.log_norm() - 2 * math.log(unit) for m in [*products, cut, al.scale(one, unit)]]
        logs += [m.log_norm() - math.log(unit) for m in [*others, al.subtract(one, other)]]
        ratios = [cosine(one, other), cosine(total, one), cosine(product, one), cosine(cut, product)]
        found.append([float(x) for x in (*logs, *ratios, *total.network.bonds, *cut.network.bonds)])
    for changed in found[1:]:
        assert changed == pytest.approx(found[0], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("tree", [ModeTree.binary(64), ModeTree.star(64), ModeTree.caterpillar(64)], ids=repr)
def test_unbalanced_weights(tree):
    """1e3 on half of the leaves and 1e-3 on the others: no partial product leaves the range."""
    model = Factorization(tree, 2, 1, dtype=torch.float32)
    sizes = {v: (1e3 if v < 32 else 1e-3) if v in tree.leaves else 1.0 for v in tree.nodes}
    weights = {v: torch.full_like(w, sizes[v]) for v, w in model.weights.items()}
    model = Factorization.from_weights(tree, weights, join="diagonal")
    zoo.assert_close(al.select(model, (0,) * 64), 1.0, 1e-4)
    zoo.assert_close(al.marginal(model, range(64)), 2.0**64, 1e-4)
    zoo.assert_close(al.select(model, (0,) * 40).log_norm(), 12 * math.log(2), 1e-4)


def test_axes_of_size_one():
    """Tensors and bonds of size 1 with any strides; a product of many more axes than an array has."""
    x, y = zoo.randn(1, 4, 1, 4), zoo.randn(1, 4, 1, 4, seed=1)
    tree = ModeTree([1, 3, 0, 2])
    one, other = decompose(x, tree), decompose(y, tree, ranks=2)
    assert_equal(al.hadamard(one, other), x * dense(other))
    bonds = {v: 2 if v < 5 else 1 for v in range(60)}
    wide = Factorization(ModeTree.star(60), 2, bonds, join="full", std=1.0, generator=random(0))
    square = al.hadamard(wide, wide)
    zoo.assert_close(al.select(square, (0,) * 60), al.select(wide, (0,) * 60) ** 2, 1e-4)


def test_nan_does_not_become_a_number():
    model = zoo.model_of(zoo.TREES["across"])
    for node, call in itertools.product((0, model.tree.root), (
        lambda m: al.add(m, model), lambda m: al.scale(m, 2.0), lambda m: al.hadamard(model, m),
        lambda m: al.hadamard(m, model, rtol=0.1), al.full_joins, al.diagonal_joins,
        lambda m: al.linear_combination([model, model, m], rtol=0.1), lambda m: al.select(m, 1),
        lambda m: al.marginal(m, 0), lambda m: al.select(m, (1, 1, 1, 1)), lambda m: m.inner(model),
        lambda m: al.mode_product(m, {0: torch.zeros(2, 2).double()}), lambda m: m.norm(),
        lambda m: al.permute_modes(m, (3, 2, 1, 0)), lambda m: al.reroot(m, m.tree.interior[0]),
    )):  # fmt: skip
        broken = copy.deepcopy(model)
        stack, slot = broken.network.slots[broken.tree.position(node)]
        broken.stacks[stack].data[slot].flatten()[0] = math.nan
        try:
            result = call(broken)
        except DataError as error:
            assert "NaN" in str(error)
        else:
            assert isinstance(result, torch.Tensor) and bool(result.isnan().any())


def test_products_too_large_for_memory(monkeypatch):
    wide = Factorization(ModeTree.binary(8), 2, 100, join="full", dtype=torch.float64)
    monkeypatch.setattr("tnreg.machine.memory.available", lambda device: 10**9)
    for options in ({}, {"ranks": 3}):
        with pytest.raises(SizeError, match=r"(?s)the exact product would not .* available on cpu"):
            al.hadamard(wide, wide, **options)
