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

from tnreg import Factorization, ModeTree, OptionError, ShapeError, TreeError, decompose, truncate
from tnreg import algebra as al

DTYPES = [torch.float64, torch.complex128]


def dense(model):
    return model.to_tensor().detach() if isinstance(model, Factorization) else model


def assert_equal(found, expected, size=0.0):
    """Equal to rounding of the expected tensor, or of terms of norm ``size`` that it is the sum of."""
    found = dense(found)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    error = torch.linalg.vector_norm(found - expected)
    assert error <= 1e-12 * max(torch.linalg.vector_norm(expected).item(), size)


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
        matrices = {
            mode: torch.randn(3, model.sizes[mode], dtype=dtype, generator=generator)
            for mode in range(0, order, 2)
        }
        expected = x
        for mode, matrix in matrices.items():
            expected = torch.tensordot(expected, matrix, ([mode], [1])).movedim(-1, mode)
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
        vectors = {
            m: torch.randn(model.sizes[m], dtype=dtype, generator=generator)
            for m in range(0, order, 2)
        }
        expected = x
        for mode in sorted(vectors, reverse=True):
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
    np.int64(1), np.uint8(0), np.array(-1), (..., np.int32(-1)), (slice(None), slice(2, None, -2)),
    (..., slice(-1, -4, -1)), (..., slice(-99, 99, 3)), (slice(np.int64(0), np.int64(1)), ...),
    (..., slice(None, 0, -1), 0), (-1, -1, -1, -1), (0, 0, ..., 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_keys_mean_what_they_mean_for_arrays(key):
    for join in ("diagonal", "full"):
        model = zoo.model_of(zoo.TREES["across"], join)
        assert_equal(al.select(model, key), torch.as_tensor(dense(model).numpy()[key].copy()))


@pytest.mark.parametrize("key", [torch.tensor(1), (0, torch.tensor(-1))], ids=str)
def test_keys_of_torch(key):
    model = zoo.model_of(zoo.TREES["across"])
    assert_equal(al.select(model, key), dense(model)[key])


UNSURPRISING = {
    "none": None, "none in a tuple": (0, None), "true": True, "numpy's false": np.False_,
    "torch's true": torch.tensor(True), "list": [0, 1], "list in a tuple": (0, [0, 1]),
    "array": np.array([0, 1]), "mask": np.array([True, False]), "rows": torch.tensor([0, 1]),
    "float": 1.0, "text": "a", "nested": ((0, 1), 0),
}  # fmt: skip


@pytest.mark.parametrize("key", UNSURPRISING.values(), ids=list(UNSURPRISING))
def test_keys_that_arrays_know_and_factorizations_do_not(key):
    """New axes, masks and lists of rows are refused; a boolean is no integer, as for arrays."""
    with pytest.raises(
        OptionError, match="a key is an integer, a slice or '...' for each mode, found"
    ):
        al.select(zoo.model_of(zoo.TREES["across"]), key)


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
    entry = model.entries(index)
    assert torch.allclose(
        al.reroot(model, tree.interior[500]).entries(index), entry, rtol=1e-9, atol=0
    )
    turned = al.permute_modes(model, range(1009, -1, -1))
    assert torch.allclose(turned.entries(index.flip(1)), entry, rtol=1e-9, atol=0)
    last = al.select(model, (..., int(index[0, -1])))
    assert (
        torch.allclose(last.entries(index[:, :-1]), entry, rtol=1e-9, atol=0) and entry.item() != 0
    )


@settings(max_examples=40, deadline=None)
@given(model=zoo.models(), data=st.data())
def test_random_models(model, data):
    x, order = dense(model), model.tree.order
    modes = data.draw(st.sets(st.integers(0, order - 1), min_size=1))
    # terms may cancel: rounding is that of the terms
    size = math.prod(torch.linalg.vector_norm(w).item() for w in model.weights.values())
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
    wide = torch.promote_types(dtype, torch.float64)
    joins = {
        v: k for v, k in zip(model.tree.nodes, model.network.joins, strict=True) if k != "leaf"
    }
    x = dense(model)
    exact = dense(Factorization.from_weights(
        model.tree, {v: w.to(wide) for v, w in model.weights.items()}, join=joins
    ))  # fmt: skip
    size = math.prod(torch.linalg.vector_norm(w).item() for w in model.weights.values())
    for found, expected, terms in (
        (decompose(x, model.tree, rtol=rtol), x.to(wide), 0.0),
        (truncate(model, rtol=rtol), exact, size),
        (al.linear_combination([model, model], [1.0, -0.5], rtol=rtol), 0.5 * exact, size),
        (al.hadamard(model, model, rtol=rtol), exact * exact, size**2),
    ):
        norm = torch.linalg.vector_norm(expected).item()
        error = torch.linalg.vector_norm(dense(found).to(wide) - expected).item()
        rounding = 50 * len(model.tree.nodes) * torch.finfo(dtype).eps * max(norm, terms)
        assert error <= rtol * norm + rounding and error <= found.error_bound + rounding
        assert found.dtype == dtype and found.tree == model.tree


def test_bonds_are_no_larger_than_said():
    one, other = (zoo.model_of(ModeTree.binary(4), "full", seed=s) for s in (0, 1))
    bonds = list(zip(one.network.bonds, other.network.bonds, strict=True))[:-1]
    assert list(al.add(one, other).network.bonds[:-1]) == [a + b for a, b in bonds]
    assert list(al.hadamard(one, other).network.bonds[:-1]) == [a * b for a, b in bonds]
    rounded = truncate(al.add(one, one), rtol=1e-10)
    ranks = truncate(one).network.bonds
    assert rounded.network.bonds == ranks  # twice the same needs no more
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
    (
        al.add(model, model),
        al.select(model, 0),
        al.mode_product(model, {0: torch.zeros(2, 2).double()}),
    )
    assert all(torch.equal(w, before[v]) for v, w in model.weights.items())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: al.add(m, zoo.model_of(ModeTree.star(4))), ShapeError, "same tree and sizes"),
        (
            lambda m: al.hadamard(m, zoo.model_of(m.tree, sizes=(2, 2, 2, 2))),
            ShapeError,
            "same tree",
        ),
        (lambda m: al.add(m, 3), OptionError, "expected a Factorization, found int"),
        (lambda m: al.select(m, 2), ShapeError, "index 2 is out of range for mode 0, size 2"),
        (lambda m: al.select(m, slice(2, 2)), ShapeError, "takes nothing of mode 0"),
        (lambda m: al.select(m, -3), ShapeError, "index -3 is out of range for mode 0, size 2"),
        (lambda m: al.select(m, (..., slice(3, 3, -1))), ShapeError, "takes nothing of mode 3"),
        (lambda m: al.select(m, slice(None, None, 0)), OptionError, "mode 0 is no slice: .*zero"),
        (lambda m: al.select(m, slice("a", None)), OptionError, "mode 0 is no slice: .*integers"),
        (lambda m: al.marginal(m, True), TreeError, "no mode True"),
        (lambda m: al.marginal(m, [0, 1.5]), TreeError, "no mode 1.5"),
        (lambda m: al.select(m, (0,) * 5), OptionError, "for other than 4 modes"),
        (lambda m: al.select(m, (..., ...)), OptionError, "for other than 4 modes"),
        (lambda m: al.marginal(m, 4), TreeError, "no mode 4; modes are 0..3"),
        (
            lambda m: al.contract_modes(m, {0: torch.ones(3).double()}),
            ShapeError,
            "mode 0 does not fit",
        ),
        (
            lambda m: al.mode_product(m, {1: torch.ones(3, 2).double()}),
            ShapeError,
            "mode 1 does not fit",
        ),
        (lambda m: al.mode_product(m, {-1: torch.ones(3, 2)}), TreeError, "no mode -1"),
        (lambda m: al.permute_modes(m, (0, 1, 2, 2)), OptionError, "each of 0..3 once"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(zoo.model_of(ModeTree.binary(4)))


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
            whole = set(model.tree.leaves)
            inside = {model.tree.modes_below(c) for c in model.tree.children(node)}
            rest = tuple(sorted(whole - set(model.tree.modes_below(node))))
            assert below == inside | ({rest} if rest else set())


def test_reroot_moves_a_chain_of_bonds():
    """A tensor train hung up at its middle keeps its bonds."""
    tree = ModeTree.caterpillar(6)
    ranks = {node: 2 + i % 3 for i, node in enumerate(tree.nodes[:-1])}
    model = Factorization(tree, 3, ranks, join="full", std=1.0, dtype=torch.float64)
    found = al.reroot(model, tree.interior[2])
    assert_equal(found, dense(model))
    assert found.tree.root == tuple(range(6)) and len(found.tree.children(found.tree.root)) == 3
    assert sum(p.numel() for p in found.parameters()) <= sum(p.numel() for p in model.parameters())
    with pytest.raises(OptionError, match="is a leaf"):
        al.reroot(model, 0)
    with pytest.raises(TreeError):
        al.reroot(model, "nowhere")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-6])
def test_linear_combinations_keep_their_promise(dtype, rtol):
    tree = zoo.TREES["mixed-arity"]
    models = [zoo.model_of(tree, dtype=dtype, seed=k) for k in range(5)]
    factors = [1.0, -2.0, 0.5, 3.0, 1.0]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = sum(c * dense(m).to(wide) for c, m in zip(factors, models, strict=True))
    found = al.linear_combination(models, factors, rtol=rtol)
    error = torch.linalg.vector_norm(dense(found).to(wide) - exact)
    size = torch.linalg.vector_norm(exact)
    rounding = 1e4 * torch.finfo(dtype).eps * sum(m.norm().item() for m in models)
    assert error <= rtol * size + rounding and error <= found.error_bound + rounding


def test_a_long_sum_never_grows():
    """Twenty terms that span four dimensions: bonds of partial sums stay small, and the result."""
    tree = ModeTree.binary(8)
    base = [
        Factorization(tree, 3, 2, join="full", std=0.5, dtype=torch.float64,
                      generator=torch.Generator().manual_seed(k)) for k in range(2)
    ]  # fmt: skip
    models = [base[k % 2] for k in range(20)]
    factors = [(-1.0) ** (k // 2) * (1 + k) for k in range(20)]
    found = al.linear_combination(models, factors, rtol=1e-8)
    pair = [sum(c for c in factors[k::2]) for k in range(2)]
    exact = pair[0] * dense(base[0]) + pair[1] * dense(base[1])
    assert torch.linalg.vector_norm(dense(found) - exact) <= 1e-8 * torch.linalg.vector_norm(exact)
    assert max(found.network.bonds) <= 4
    one = al.linear_combination(models[:1], rtol=1e-8)
    assert_equal(one, dense(base[0]))


def test_a_sum_that_cancels():
    """What is left is rounding: it is kept, not guessed at."""
    model = zoo.model_of(zoo.TREES["htf-4"], dtype=torch.float64)
    found = al.linear_combination([model, model, model], [1.0, 1.0, -2.0], rtol=1e-3)
    assert dense(found).norm() <= 1e-13 * model.norm()
    with pytest.raises(OptionError, match="as many coefficients"):
        al.linear_combination([model], [1.0, 2.0], rtol=1e-3)
    with pytest.raises(OptionError, match="as many coefficients"):
        al.linear_combination([], rtol=1e-3)


def bonds_by_node(model):
    return dict(zip(model.tree.nodes[:-1], model.network.bonds[:-1], strict=True))


@pytest.mark.parametrize("name", ["matrix", "cp-4", "one-child", "across", "mixed-arity", "named"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32, torch.complex64], ids=str)
def test_cp_of_the_cores_finds_the_diagonal_joins(name, dtype):
    """What had diagonal joins of these bonds gets them back, or less; the error is what the bound says."""
    model = zoo.model_of(zoo.TREES[name], dtype=dtype)
    wide = torch.promote_types(dtype, torch.float64)
    exact, eps = dense(model).to(wide), torch.finfo(dtype).eps
    found = al.diagonal_joins(al.full_joins(model), ranks=bonds_by_node(model))
    pairs = zip(found.network.bonds, model.network.bonds, strict=True)
    assert found.dtype == dtype and all(ours <= theirs for ours, theirs in pairs)
    assert set(found.network.joins) == {"leaf", "diagonal"}
    size = torch.linalg.vector_norm(exact).item()
    rounding = 50 * eps * size  # of the dense tensors
    error = torch.linalg.vector_norm(dense(found).to(wide) - exact).item()
    assert error <= 1e-10 * size + rounding and found.error_bound <= 1e-10 * size + rounding


@pytest.mark.parametrize("ranks", [1, 2, 3, {0: 2, 1: 2}, {(0, 1): 2}])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cp_of_the_cores_measures_what_it_loses(ranks, dtype):
    """The bound is the error itself, not an estimate, whatever the search has found."""
    model = zoo.model_of(ModeTree.binary(4), "full", dtype=dtype, sizes=(4, 5, 4, 3))
    found = al.diagonal_joins(model, ranks=ranks, tries=2, steps=8)
    error = torch.linalg.vector_norm(dense(found) - dense(model)).item()
    assert error == pytest.approx(found.error_bound, rel=1e-8)
    limits = ranks if isinstance(ranks, dict) else dict.fromkeys(model.tree.nodes[:-1], ranks)
    assert all(bonds_by_node(found)[node] <= limit for node, limit in limits.items())
    again = al.diagonal_joins(model, ranks=ranks, tries=2, steps=8)
    assert torch.equal(dense(again), dense(found))
    if ranks == 1:
        assert error > 0.1 * dense(model).norm()


def test_cp_of_many_cores():
    """Every one of sixty cores is found, as two axes of each have independent factors."""
    model = Factorization(ModeTree.binary(64), 4, 3, std=1.0, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(0))  # fmt: skip
    found = al.diagonal_joins(al.full_joins(model), ranks=3, tries=2)
    assert found.error_bound <= 1e-10 * model.norm().item()


def test_cp_of_a_matrix_is_the_best_one():
    model = zoo.model_of(ModeTree([0, 1]), {(0, 1): "full"}, sizes=(6, 7))
    wide = al.full_joins(
        al.add(al.add(model, zoo.model_of(model.tree, "full", sizes=(6, 7), seed=1)), model)
    )
    values = torch.linalg.svdvals(dense(wide))
    found = al.diagonal_joins(wide, ranks=2)
    assert found.error_bound == pytest.approx(values[2:].square().sum().sqrt().item(), rel=1e-9)


@pytest.mark.parametrize("power", [-200, 200])
def test_cp_of_the_cores_at_any_scale(power):
    model = al.scale(
        al.scale(zoo.model_of(ModeTree.star(3)), 10.0 ** (power / 2)), 10.0 ** (power / 2)
    )
    found = al.diagonal_joins(al.full_joins(model), ranks=2)
    exact = dense(model) / 10.0**power
    assert torch.allclose(dense(found) / 10.0**power, exact, rtol=1e-9, atol=1e-11)
    assert found.error_bound <= 1e-10 * 10.0**power
    zero = al.diagonal_joins(al.full_joins(al.scale(model, 0.0)), ranks=1)
    assert torch.equal(dense(zero), torch.zeros(2, 3, 5).double()) and zero.error_bound == 0


def test_diagonal_joins_within_the_ranks_stay_what_they_are():
    model = zoo.model_of(ModeTree.binary(4), root="ones")
    found = al.diagonal_joins(model, ranks=4)
    assert torch.equal(dense(found), dense(model)) and found.network == model.network
    assert found.error_bound == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 0}, "needs a positive integer, found 0"),
        ({"ranks": {(0, 1, 2, 3): 2}}, "has no bond above it"),
        ({"ranks": {0: 1, 1: 2}}, r"(?s)children of node \(0, 1\) share their bond.*\[1, 2\]"),
        ({"ranks": 1, "tries": 0}, "tries must be an integer >= 1"),
        ({"ranks": 1, "steps": 0.5}, "steps must be an integer >= 1"),
    ],
)
def test_cp_of_the_cores_refuses(options, message):
    with pytest.raises(OptionError, match=message):
        al.diagonal_joins(zoo.model_of(ModeTree.binary(4), "full"), **options)


def test_cp_of_a_large_core_is_refused():
    wide = Factorization(ModeTree.star(3), 50, 50, join="full", std=1.0, dtype=torch.float64)
    with pytest.raises(OptionError, match="the search at node .0, 1, 2. has 6000 unknowns"):
        al.diagonal_joins(wide, ranks=40)
