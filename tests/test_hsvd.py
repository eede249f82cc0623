"""Hierarchical SVD: the error guarantee on random and hard tensors, ranks as small as they can be."""

import math

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses

from tnreg import Factorization, ModeTree, decompose, hierarchical_rank, spectra, truncate
from tnreg.errors import OptionError, ShapeError, SizeError, TreeError

TOLERANCES = [None, 0.0, 1e-12, 1e-6, 1e-2, 0.3, 0.9]
DTYPES = [torch.float64, torch.complex128, torch.float32, torch.complex64]
MOSTLY_SLOW = [pytest.param(d, marks=[pytest.mark.slow] * (d not in DTYPES[::3])) for d in DTYPES]


def decaying(sizes, dtype=torch.float64):
    """1 / (1 + i_0 + i_1 + ...): singular values that fall slowly at first and then fast."""
    grids = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
    return (1.0 / (1 + sum(grids))).to(dtype)


def assert_kept(found, tensor, rtol):
    """The promise: within rtol (or rounding), and within the bound that was given."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    norm = torch.linalg.vector_norm(tensor.to(wide)).item()
    error = torch.linalg.vector_norm(found.to_tensor().detach().to(wide) - tensor.to(wide)).item()
    rounding = 40 * len(found.tree.nodes) * torch.finfo(tensor.dtype).eps
    assert error <= max(rtol or 0.0, rounding) * norm
    assert error <= found.error_bound * (1 + 1e-6) or error == 0
    assert found.error_bound <= (max(rtol or 0.0, rounding) + rounding) * norm
    assert found.dtype == tensor.dtype and set(found.network.joins) <= {"leaf", "bare", "full"}


@pytest.mark.parametrize("name", zoo.TREES)
@pytest.mark.parametrize("dtype", MOSTLY_SLOW, ids=str)
def test_decompose_keeps_its_promise(name, dtype):
    tree = zoo.TREES[name]
    sizes = zoo.sizes_of(tree)
    for tensor in (zoo.randn(*sizes, dtype=dtype), decaying(sizes, dtype)):
        for rtol in TOLERANCES:
            assert_kept(decompose(tensor, tree, rtol=rtol), tensor, rtol)
        assert_kept(decompose(tensor, tree, rtol=1e-2, randomized=True), tensor, 1e-2)


@pytest.mark.parametrize("name", zoo.TREES)
@pytest.mark.parametrize("dtype", MOSTLY_SLOW, ids=str)
def test_truncate_keeps_its_promise(name, dtype):
    tree = zoo.TREES[name]
    models = [zoo.model_of(tree, join, dtype=dtype) for join in zoo.joins_of(tree).values()]
    for model in (*models, zoo.model_of(tree, root="ones", dtype=dtype)):
        tensor = model.to_tensor().detach()
        for rtol in TOLERANCES:
            assert_kept(truncate(model, rtol=rtol), tensor, rtol)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(tree=zoo.trees(), seed=st.integers(0, 2**16), rtol=st.sampled_from(TOLERANCES))
def test_on_random_trees(tree, seed, rtol):
    sizes = zoo.sizes_of(tree)
    tensor = zoo.randn(*sizes, seed=seed)
    found = decompose(tensor, tree, rtol=rtol)
    assert_kept(found, tensor, rtol)
    again = truncate(found, rtol=rtol)
    error = (again.to_tensor() - found.to_tensor()).norm().item()
    assert error <= max(rtol or 0, 1e-13) * found.norm().item()


def test_rounding_below_what_was_cut_before():
    """A cut below a node that has lost something is not orthogonal to it; both were found by search."""
    tree, sizes = ModeTree([[[0, 2], 4], [1, 3]]), (2, 2, 3, 2, 4)
    decays = torch.exp(-2.0 * sum(torch.meshgrid(*map(torch.arange, sizes), indexing="ij")).double())
    x = zoo.randn(*sizes, seed=130) * decays
    assert_kept(decompose(x, tree, rtol=0.2), x, 0.2)


def test_rounding_below_what_was_cut_block_by_block(monkeypatch):
    array = pytest.importorskip("dask.array")
    monkeypatch.setattr("tnreg.tensors.blocks._ROWS", 4)  # a tensor with rows of more than one node
    monkeypatch.setattr("tnreg.ranks.decompose.whole", lambda *_: None)
    x = [7, -4, -5, 15, 20, -24, 1, 7, 2, 5, 11, -56, 49, 2, 3, 8, -8, 100, 12, -26, -18, -73, -23, 12]
    x = torch.tensor(x).double().reshape(2, 2, 2, 3)
    for rtol in (0.53, 0.5356838):
        found = decompose(array.from_array(x.numpy()), ModeTree([[0, 1], [2, 3]]), rtol=rtol, memory=2**24)
        assert_kept(found, x, rtol)


@pytest.mark.slow
@pytest.mark.parametrize("randomized", [False, True])
def test_no_search_breaks_the_promise(randomized, monkeypatch):
    """Climb to tensors and tolerances with a larger error over what was promised."""
    monkeypatch.setattr("tnreg.ranks.decompose._RANDOMIZED_ROWS", 2)
    tree, draw = ModeTree([[[0, 2], 4], [1, 3]]), torch.Generator().manual_seed(2)
    sizes, best = (2, 2, 3, 2, 3), 0.0
    x, rtol = torch.randn(sizes, generator=draw, dtype=torch.float64), 0.5
    for _ in range(100):
        noise = 0.2 * torch.randn((2, *sizes), generator=draw, dtype=torch.float64)
        changed = x * (1 + noise[0]) + 0.3 * noise[1]
        tried = min(rtol * math.exp(float(noise.sum()) / 10), 0.9)
        found = decompose(changed, tree, rtol=tried, randomized=randomized)
        error = float((found.to_tensor().detach() - changed).norm())
        share = max(error / (tried * float(changed.norm())), error / found.error_bound)
        assert share <= 1 + 1e-9
        if share >= best:
            x, rtol, best = changed, tried, share
    assert best > 0.9


ENTRY = torch.zeros(4, 5, 6, 3).double()
ENTRY[1, 1, 1, 1] = 1
HARD = {
    "zero": 0 * ENTRY,
    "one huge entry": 1e300 * ENTRY,
    "huge beside small": zoo.randn(4, 5, 6, 3) + 1e8 * ENTRY,
    "tiny": zoo.randn(4, 5, 6, 3) * 1e-250,
    "rank one": torch.einsum("a,b,c,d->abcd", *(zoo.randn(n) for n in (4, 5, 6, 3))),
    "slow": decaying((4, 5, 6, 3)) + 0.1 * zoo.randn(4, 5, 6, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("tree", ["htf-4", "across", "cp-4", "backwards"])
def test_hard_cases(name, tree):
    tensor, tree = HARD[name], zoo.TREES[tree]
    unit = tensor / tensor.abs().max().clamp_min(1e-300)
    for rtol in (None, 1e-9, 1e-3, 0.2):
        found = decompose(tensor, tree, rtol=rtol, leaves="weights")
        scaled = found.to_tensor().detach() / tensor.abs().max().clamp_min(1e-300)
        assert (scaled - unit).norm() <= max(rtol or 0, 1e-14) * unit.norm()
        assert math.isfinite(found.error_bound)
        if name in ("zero", "one huge entry", "rank one"):
            assert set(found.network.bonds) == {1}


@pytest.mark.parametrize("name", zoo.TREES)
def test_exact_ranks_are_found(name):
    """What has low hierarchical rank is decomposed with exactly these bonds, and no error."""
    tree = zoo.TREES[name]
    for join in zoo.joins_of(tree).values():
        model = zoo.model_of(tree, join)
        tensor = model.to_tensor().detach()
        ranks = hierarchical_rank(tensor, tree, rtol=1e-10)
        dense = (decompose(tensor, tree, rtol=rtol, leaves="weights") for rtol in (None, 1e-10))
        for found in (*dense, truncate(model, leaves="weights")):
            assert dict(zip(tree.nodes[:-1], found.network.bonds[:-1], strict=True)) == ranks
            assert_kept(found, tensor, 1e-10)


def test_a_matrix_gets_the_best_rank():
    """For two modes the guarantee is reached with the least rank that any method can reach."""
    tree, matrix = ModeTree([0, 1]), decaying((30, 40))
    values = torch.linalg.svdvals(matrix)
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt() / values.norm()
    for rank, tail in enumerate(tails[1:8].tolist(), 1):  # just enough, just too little, for it
        models = (
            decompose(matrix, tree, rtol=1.001 * tail),
            truncate(decompose(matrix, tree), rtol=1.001 * tail),
            decompose(matrix, tree, rtol=1.001 * tail, randomized=True),
            decompose(matrix, tree, rtol=0.999 * tail),
        )
        bonds = [model.network.bonds[:2] for model in models]
        assert bonds == [(rank, 40)] * 3 + [(rank + 1, 40)]  # the second factor holds its mode


def test_what_a_node_does_not_need_others_may_spend():
    """All rank is in one pair of modes: nearly the whole tolerance is spent there."""
    matrix = torch.diag(torch.arange(1.0, 9.0).double())
    tensor = torch.einsum("ab,c,d->acbd", matrix, torch.ones(3).double(), torch.ones(3).double())
    tree = ModeTree([[0, 1], [2, 3]])
    squares = matrix.diagonal().square()
    allowed = (squares[:4].sum() / squares.sum()).sqrt().item() * 1.01  # four of eight may go
    for found in (decompose(tensor, tree, rtol=allowed), truncate(decompose(tensor, tree), rtol=allowed)):
        assert found.network.bonds[tree.position((0, 1))] == 4


@pytest.mark.parametrize("name", ["htf-4", "uneven", "cp-4", "caterpillar", "across"])
def test_given_ranks(name):
    """Ranks are kept to; the error lies between the best possible one and Grasedyck's bound."""
    tree = zoo.TREES[name]
    tensor = zoo.randn(*zoo.sizes_of(tree))
    tails = {v: s[2:].square().sum().item() for v, s in spectra(tensor, tree).items()}
    pair = tree.children(tree.root)
    counted = [v for v in tails if len(pair) != 2 or v != pair[1]]
    for found in (decompose(tensor, tree, ranks=2), truncate(decompose(tensor, tree), ranks=2),
                  decompose(tensor, tree, ranks=2, rtol=1e-9)):  # fmt: skip
        assert max(found.network.bonds) <= 2
        error = (found.to_tensor() - tensor).norm().item()
        assert math.sqrt(max(tails.values())) <= error * (1 + 1e-12)
        assert error <= math.sqrt(sum(tails[v] for v in counted)) * (1 + 1e-12)
        assert error <= found.error_bound <= math.sqrt(sum(tails[v] for v in counted)) * (1 + 1e-9)
    found = decompose(tensor, tree, ranks={0: 1})
    assert found.network.bonds[tree.position(0)] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_weights_are_orthonormal(dtype):
    for tree in (zoo.TREES["across"], zoo.TREES["one-child"], zoo.TREES["mixed-arity"]):
        tensor = zoo.randn(*zoo.sizes_of(tree), dtype=dtype)
        for found in (decompose(tensor, tree, rtol=0.3), decompose(tensor, tree, rtol=1e-12)):
            for node, weight in list(found.weights.items())[:-1]:
                basis = weight.detach().flatten(0, -2)
                identity = torch.eye(basis.shape[1], dtype=dtype)
                assert torch.allclose(basis.mH @ basis, identity, atol=1e-12), node


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_random_vectors_find_large_nodes(dtype):
    """A node of 300 rows and rank 12 with a tail: found from few products, within the tolerance."""
    left, right = (torch.linalg.qr(zoo.randn(300, 300, dtype=dtype, seed=s))[0] for s in (1, 2))
    values = torch.cat([torch.linspace(1, 0.5, 12), 1e-5 * torch.ones(288)]).double()
    matrix = (left * values.to(dtype)) @ right
    tree = ModeTree([0, 1])
    for rtol in (1e-3, 1e-4):
        found = decompose(matrix, tree, rtol=rtol, randomized=True, seed=3)
        assert_kept(found, matrix, rtol)
        assert found.network.bonds[0] == 12
    faint = (left * torch.where(values < 0.1, 1e-3 * values, values).to(dtype)) @ right
    for rtol in (1e-9, None):  # a tail of 1e-8 that differences of squares do not show
        assert_kept(decompose(faint, tree, rtol=rtol, randomized=True), faint, rtol)
    # a limit that need not cut takes nothing off the guarantee
    slow = (left * torch.linspace(1, 0.01, 300).to(dtype)) @ right
    assert_kept(decompose(slow, tree, rtol=0.05, ranks=299, randomized=True), slow, 0.05)
    assert_kept(decompose(matrix, tree, rtol=1e-4, ranks=13, randomized=True), matrix, 1e-4)
    capped = decompose(matrix, tree, ranks=5, randomized=True)
    error = (capped.to_tensor() - matrix).norm().item()
    assert capped.network.bonds[0] == 5 and error <= capped.error_bound
    assert error <= 1.5 * values[5:].norm().item()
    same = [decompose(matrix, tree, rtol=1e-3, randomized=True, seed=3) for _ in range(2)]
    assert torch.equal(same[0].to_tensor(), same[1].to_tensor())


def test_wide_diagonal_joins_are_not_expanded():
    """Width 300 in 4 modes of size 5: a full join of that width would have 300**3 weights."""
    model = zoo.model_of(ModeTree.binary(4), sizes=5, bonds=300, std=0.1)
    tensor = model.to_tensor().detach()
    for rtol in (None, 1e-6, 0.1):
        found = truncate(model, rtol=rtol)
        assert_kept(found, tensor, rtol)
        assert max(found.network.bonds) <= 25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "join"), [(64, "diagonal"), (64, "full"), (512, "diagonal"), (1024, "full")]
)
def test_any_order_and_scale(order, join):
    """Single weights of 1e200 and 1e-200, a norm far beyond the range: finite and right."""
    tree = ModeTree.binary(order)
    model = zoo.model_of(tree, join, sizes=2, bonds=3, std=0.5, seed=1)
    weights = model.weights
    for node, scale in ((0, 1e200), (1, 1e-200), (2, 1e150), (tree.root, 1e100)):
        model.load_weights({node: weights[node].detach() * scale})
    found = truncate(model, rtol=1e-8)
    assert all(torch.isfinite(w).all() for w in found.weights.values())
    assert found.log_norm().item() == pytest.approx(model.log_norm().item(), rel=1e-9)
    ranks, rounded = hierarchical_rank(model, rtol=1e-7), hierarchical_rank(found, rtol=1e-7)
    assert ranks == rounded and max(found.network.bonds) <= 3
    if order > 64:
        return
    # one weight scaled by c scales the result by c
    node = tree.interior[0]
    model.load_weights({node: model.weights[node].detach() * 1e3})
    grown = truncate(model, rtol=1e-8).log_norm() - found.log_norm()
    assert grown.item() == pytest.approx(math.log(1e3), rel=1e-6)


def test_refuses():
    model = zoo.model_of(ModeTree.binary(4))
    for options, error, message in (
        *(({"rtol": x}, OptionError, rf"rtol must be a number in \[0, 1\), found '?{x}")
          for x in (1.0, -0.1, "x", math.nan)),
        ({"ranks": 0}, OptionError, "node 0 needs a positive integer, found 0"),
        ({"ranks": {(0, 1): 1.5}}, OptionError, r"node \(0, 1\) needs a positive integer"),
        ({"ranks": {(0, 1, 2, 3): 2}}, OptionError, "root .* has no bond above it"),
        ({"ranks": {9: 2}}, TreeError, "9"),
        ({"rtol": {0: 1.0}}, OptionError, r"node 0: rtol must be a number in \[0, 1\)"),
        ({"rtol": {9: 0.1}}, TreeError, "9"),
        ({"rtol": {(0, 1, 2, 3): 0.1}}, OptionError, "rtol: the root .* has no bond above it"),
        ({"rtol": {0: 0.1}, "atol": 1}, OptionError, "give one of them"),
        *(({"atol": x}, OptionError, "atol must be a finite number >= 0") for x in (-1, math.inf, "x")),
        ({"max_numbers": 0}, OptionError, "max_numbers must be an integer >= 1, found 0"),
        ({"max_numbers": 9}, OptionError, "too few: with all bonds of size 1 there are 18 numbers"),
        ({"leaves": "no"}, OptionError, "mode 0 needs 'auto', 'weights' or 'bare', found 'no'"),
        ({"leaves": {(0, 1): "bare"}}, OptionError, r"node \(0, 1\) is no leaf"),
        ({"leaves": {9: "bare"}}, TreeError, "9"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            decompose(model.to_tensor(), model.tree, **options)
        with pytest.raises(error, match=message):
            truncate(model, **options)
    with pytest.raises(OptionError, match=r"write truncate\(model"):
        decompose(zoo.model_of(ModeTree.binary(4)), ModeTree.binary(4))
    with pytest.raises(OptionError, match=r"write decompose\(tensor, tree\)"):
        truncate(torch.ones(2, 2))
    with pytest.raises(SizeError, match="40 children, would not fit"):
        truncate(Factorization(ModeTree.star(40), 3, 4))


def test_nothing_given_is_changed():
    tensor = zoo.randn(3, 4, 5)
    model = decompose(tensor, ModeTree.star(3), rtol=0.1)
    weights = {v: w.detach().clone() for v, w in model.weights.items()}
    truncate(model, rtol=0.5)
    assert torch.equal(tensor, zoo.randn(3, 4, 5))
    assert all(torch.equal(w, weights[v]) for v, w in model.weights.items())
    assert all(p.requires_grad for p in model.parameters())  # it can be trained on


def test_from_weights():
    for join in ("diagonal", "full"):
        model = zoo.model_of(ModeTree.binary(4), join)
        again = Factorization.from_weights(model.tree, model.weights, join=join)
        assert torch.equal(again.to_tensor(), model.to_tensor()) and again.network == model.network
    ones = zoo.model_of(ModeTree.star(3), root="ones")
    again = Factorization.from_weights(ones.tree, ones.weights, join="diagonal")
    assert again.network == ones.network
    for wrong, message in (
        ({1: torch.ones(3)}, "the weight of node 1 needs two axes"),
        ({1: torch.ones(3, 9)}, r"node \(0, 1\) has another shape"),
        ({2: None}, "no weight for node 2"),
    ):
        weights = {v: w for v, w in {**model.weights, **wrong}.items() if w is not None}
        with pytest.raises(ShapeError, match=message):
            Factorization.from_weights(model.tree, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("nested", [[[0, 1], [2, 3]], [[0, 2], [1, 3]]])
def test_rounding_where_singular_values_are_equal(nested, dtype):
    """What is cut on either side of a binary root belongs to the same singular values, which tie here."""
    a, b = torch.linalg.qr(zoo.randn(2, 36, 36, dtype=dtype))[0]
    x = (a @ b).reshape(6, 6, 6, 6)
    model = decompose(x, ModeTree(nested))
    for rtol in (0.3, 0.5, 0.9):
        found = truncate(model, rtol=rtol)
        reached = float((found.to_tensor().detach() - x).norm() / x.norm())
        assert reached <= rtol and reached <= found.error_bound / float(x.norm())
        assert max(found.network.bonds) < 36


def error_of(found, tensor):
    return float((found.to_tensor().detach() - tensor).norm() / tensor.norm())


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("leaves", ["auto", "weights", "bare"])
@pytest.mark.parametrize("name", ["matrix", "cp-4", "across", "caterpillar"])
def test_the_error_allowed_is_spent(name, leaves):
    """At least 0.97 of it; or no bond can be smaller by one, however the tensor is rounded then."""
    tree = zoo.TREES[name]
    sizes = zoo.sizes_of(tree)
    noise = 1e-2 * zoo.randn(*sizes)
    for tensor in (decaying(sizes) + noise, decaying(sizes, torch.complex128)):
        model = decompose(tensor, tree, leaves="weights")
        for rtol in (0.02, 0.3):
            for found in (decompose(tensor, tree, rtol=rtol, leaves=leaves),
                          truncate(model, rtol=rtol, leaves=leaves)):  # fmt: skip
                assert_kept(found, tensor, rtol)
                if error_of(found, tensor) > 0.97 * rtol:
                    continue
                bare, bonds = found.network.bare, found.network.bonds
                kept = {tree.nodes[i]: bond for i, bond in enumerate(bonds[:-1]) if i not in bare}
                for node, bond in kept.items():
                    if bond > 1:
                        less = decompose(tensor, tree, ranks={**kept, node: bond - 1},
                                         leaves=found.network.named_leaves)  # fmt: skip
                        assert error_of(less, tensor) > rtol * (1 - 1e-3)


@pytest.mark.parametrize("name", ["single", "htf-4", "deep-chain", "mixed-arity", "uneven", "one-child-root"])
def test_bare_leaves_where_that_saves_numbers(name):
    tree = zoo.TREES[name]
    for join, rtol in zip(zoo.joins_of(tree).values(), (None, 0.4, 1e-2), strict=True):
        model = zoo.model_of(tree, join, leaves={0: "bare"}, bonds=zoo.SIZES[0])
        tensor = model.to_tensor().detach()
        counts = {}
        for leaves in ("auto", "weights", "bare", {0: "weights"}, {0: "bare"}):
            found = decompose(tensor, tree, rtol=rtol, leaves=leaves)
            counts[str(leaves)] = count(found)
            for one in (found, truncate(model, rtol=rtol, leaves=leaves)):
                assert_kept(one, tensor, rtol)
                asked = one.network.named_leaves
                if leaves in ("weights", "bare"):
                    assert set(asked.values()) == {leaves}
                elif leaves != "auto":
                    assert asked[0] == leaves[0]
        assert counts["auto"] <= min(counts.values())


def test_a_train_has_the_numbers_of_its_cores():
    cores = [
        zoo.randn(*shape, seed=k) for k, shape in enumerate([(1, 9, 2), (2, 9, 5), (5, 9, 3), (3, 9, 1)])
    ]
    x = torch.einsum("xai,ibj,jck,kdy->abcd", *cores)
    found = decompose(x, ModeTree.caterpillar(4), rtol=1e-10)
    assert count(found) == sum(core.numel() for core in cores)
    assert found.network.named_leaves == {0: "weights", 1: "bare", 2: "bare", 3: "bare"}
    assert count(truncate(found, rtol=1e-10)) == count(found)


@pytest.mark.parametrize("name", ["matrix", "cp-4", "uneven", "one-child"])
def test_so_many_numbers(name):
    """Never more, never a larger error with more, and the best that fits on a matrix."""
    tree = zoo.TREES[name]
    sizes = zoo.sizes_of(tree)
    tensor = decaying(sizes) + 0.1 * zoo.randn(*sizes)
    model = decompose(tensor, tree)
    for options in ({}, {"leaves": "weights"}, {"rtol": 0.05}, {"ranks": 3, "leaves": "weights"}):
        last = math.inf
        for most in (40, 60, 90, 200, 10**6):
            found = decompose(tensor, tree, max_numbers=most, **options)
            for one in (found, truncate(model, max_numbers=most, **options)):
                assert count(one) <= most
                assert error_of(one, tensor) <= one.error_bound / float(tensor.norm()) * (1 + 1e-9)
            assert error_of(found, tensor) <= last * 1.02 + 1e-12
            last = error_of(found, tensor)
        alone = decompose(tensor, tree, **options)
        assert count(found) == count(alone) and error_of(alone, tensor) == pytest.approx(last, abs=1e-12)
    if name == "matrix":
        rows, columns = sizes
        for rank in range(1, rows):
            found = decompose(tensor, tree, max_numbers=rank * (rows + columns))
            tail = torch.linalg.svdvals(tensor)[rank:].norm() / tensor.norm()
            assert error_of(found, tensor) == pytest.approx(float(tail), rel=1e-9)


@pytest.mark.parametrize("name", ["htf-4", "across", "mixed-arity", "caterpillar"])
def test_a_tolerance_for_single_nodes(name):
    """What is cut at a node is within its own tolerance, and the rank the smallest that is; others stay."""
    tree = zoo.TREES[name]
    tensor = decaying(zoo.sizes_of(tree)) + 0.1 * zoo.randn(*zoo.sizes_of(tree))
    values, norm = spectra(tensor, tree), tensor.norm()
    node = tree.interior[0]
    for rtol in ({0: 0.1}, {node: 0.2}, {0: 0.1, node: 0.05}):
        found = decompose(tensor, tree, rtol=rtol, leaves="weights")
        again = truncate(decompose(tensor, tree), rtol=rtol, leaves="weights")
        assert again.network.bonds == found.network.bonds
        error = error_of(found, tensor)
        assert (
            error <= math.sqrt(sum(part**2 for part in rtol.values())) and error <= found.error_bound / norm
        )
        for v, part in rtol.items():
            bond = found.network.bonds[tree.position(v)]
            assert values[v][bond:].norm() <= part * norm < values[v][bond - 1 :].norm()


def test_an_absolute_tolerance():
    tree = zoo.TREES["uneven"]
    for scale in (1.0, 1e-180, 1e200):
        tensor = zoo.randn(*zoo.sizes_of(tree)) * scale
        norm = float((tensor / scale).norm())
        for relative, atol, rtol in ((0.3, 0.3, None), (0.3, 0.3, 0.1), (0.3, 0.1, 0.3), (0.999, 2, None)):
            wanted = decompose(tensor, tree, rtol=relative)
            found = decompose(tensor, tree, atol=atol * norm * scale, rtol=rtol)
            rounded = truncate(decompose(tensor, tree), atol=atol * norm * scale, rtol=rtol)
            assert found.network == wanted.network
            unit = tensor / scale
            for one in (found, rounded):
                assert float((one.to_tensor().detach() / scale - unit).norm()) <= relative * norm
    zero = decompose(0 * tensor, tree, atol=1.0, leaves="weights")
    assert set(zero.network.bonds) == {1} and not zero.to_tensor().any()


def test_equal_singular_values_are_cut_one_by_one():
    x = torch.diag(torch.ones(8)).double()
    for kept in range(1, 9):
        rtol = math.sqrt(1 - kept / 8) * 1.0001
        pair = [decompose(x, ModeTree([0, 1]), rtol=min(rtol, 0.999), leaves="weights") for _ in range(2)]
        assert pair[0].network.bonds[0] == kept and torch.equal(pair[0].to_tensor(), pair[1].to_tensor())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64])
@pytest.mark.parametrize("name", ["matrix", "cp-4", "htf-5", "one-child-root", "uneven", "caterpillar"])
def test_single_precision_keeps_the_tolerance(name, dtype):
    """Of tensors and factorizations, also where squares would leave the range of float32."""
    tree, wide = zoo.TREES[name], torch.complex128 if dtype.is_complex else torch.float64
    sizes = zoo.sizes_of(tree)
    smooth, noise = decaying(sizes, wide), zoo.randn(*sizes, dtype=wide)

    def dense(model):
        weights = {v: weight.detach().to(wide) for v, weight in model.weights.items()}
        named = model.network.named_joins, model.network.named_leaves
        return Factorization.from_weights(tree, weights, join=named[0], leaves=named[1]).to_tensor().detach()

    for x, scale in ((noise, 1.0), (smooth, 1e-30), (smooth, 1e30)):
        x = (x * scale).to(dtype)
        for rtol in (None, 1e-5, 0.1):
            model = decompose(x, tree, rtol=rtol, precision="single")
            rounded = truncate(model, rtol=rtol, precision="single")
            assert model.dtype == rounded.dtype == dtype
            tensors = [y.to(wide) / scale for y in (x, dense(model), dense(rounded))]
            for before, after, found in zip(tensors, tensors[1:], (model, rounded), strict=False):
                error, norm = (before - after).norm().item(), before.norm().item()
                assert error <= min((rtol or 1e-4) * norm, found.error_bound / scale)


test_precisions_are_refused = refuses(
    [
        (
            lambda x: spectra(x, zoo.TREES["htf-4"], precision="half"),
            "precision must be 'double' or 'single'",
        ),
        (lambda x: decompose(x, zoo.TREES["htf-4"], precision=32), "precision must be 'double' or 'single'"),
        (
            lambda x: decompose(x, zoo.TREES["htf-4"], rtol=1e-7, precision="single"),
            "rtol=1e-07 is below what",
        ),
        (
            lambda x: truncate(zoo.model_of(zoo.TREES["htf-4"]), rtol=0.0, precision="single"),
            "rtol=0 is below",
        ),
    ],
    lambda call: call(torch.ones(2, 3, 4, 5)),
    OptionError,
)
