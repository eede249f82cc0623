"""Trees found: recovered exactly, never worse, within the tolerance, for any tensor; and what is refused."""

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses
from zoo import all_index, assert_close, model_of, models, randn, random_index

import tnreg
from tnreg import Factorization, ModeTree, completion, decompose, find_tree, interchange
from tnreg.search.pairs import additive, interactions, linkage_tree


def numbers(model):
    return sum(weight.numel() for weight in model.weights.values())


def random_tree(order, seed):
    draw = np.random.default_rng(seed)
    nodes = draw.permutation(order).tolist()
    while len(nodes) > 3:
        a, b = (nodes.pop(int(draw.integers(len(nodes)))) for _ in range(2))
        nodes.append([a, b])
    return ModeTree(nodes)


def random_model(tree, bond=3, size=4, seed=0, dtype=torch.float64):
    bonds = {v: min(bond, size) if v in tree.leaves else bond for v in tree.nodes[:-1]}
    return model_of(tree, "full", sizes=size, bonds=bonds, seed=seed, std=1.0, dtype=dtype)


def cuts(tree):
    """The sets of modes that edges part, without mode 0."""
    sides = (set(tree.modes_below(v)) for v in tree.interior[:-1])
    return {frozenset(set(tree.leaves) - side if 0 in side else side) for side in sides}


def error(found, model):
    return float((found.to_tensor() - model.to_tensor()).detach().norm())


@pytest.mark.parametrize("method", ["auto", "agglomerate", "interchange"])
@pytest.mark.parametrize("seed", range(4))
def test_exact_trees_are_recovered_from_dense_tensors(method, seed):
    """Also on another scale, and in single precision."""
    tree = random_tree(8, seed) if seed else ModeTree([[[[[0, 6], 3], 1], 5], [[2, 7], 4]])
    x = random_model(tree, seed=seed).to_tensor().detach()
    found = find_tree(x, method=method)
    assert cuts(found) == cuts(tree)
    assert found == find_tree(x * 1e150, method=method) == find_tree(x.float(), method=method)
    assert numbers(decompose(x, found, rtol=1e-6)) <= numbers(decompose(x, tree, rtol=1e-6))


@pytest.mark.parametrize("seed", range(3))
def test_modes_in_another_order_give_the_same_tree(seed):
    x = random_model(random_tree(7, seed), dtype=torch.complex128).to_tensor().detach()
    order = np.random.default_rng(seed).permutation(7).tolist()
    found, turned = find_tree(x), find_tree(x.permute(order))
    renamed = ({order[m] for m in cut} for cut in cuts(turned))
    assert cuts(found) == {frozenset(set(range(7)) - cut if 0 in cut else cut) for cut in renamed}


def crossed(blocks, size=4):
    """Matrices between modes 4k and 4k + 2, 4k + 1 and 4k + 3, along a tree that has them apart."""
    nested, weights = [], {}
    for k in range(blocks):
        pairs = torch.einsum("ac,bd->abcd", *randn(2, size, size, seed=k))
        block = decompose(pairs, ModeTree.binary(4), leaves="weights")
        modes = [4 * k + m for m in range(4)]
        nested.append([modes[:2], modes[2:]])
        for node, weight in block.weights.items():
            name = modes[node] if isinstance(node, int) else tuple(modes[m] for m in node)
            weights[name] = weight.detach() if node != block.tree.root else weight.detach().unsqueeze(-1)
    while len(nested) > 1:
        nested = [nested[i : i + 2] for i in range(0, len(nested), 2)]
    tree = ModeTree(nested[0])
    weights |= {v: torch.ones(1, 1, 1, dtype=torch.float64) for v in tree.interior if v not in weights}
    weights[tree.root] = weights[tree.root][..., 0]
    return Factorization.from_weights(tree, weights)


@pytest.mark.slow
def test_factors_of_order_64_and_more_exchange_what_they_hold():
    model = crossed(32)
    found = interchange(model, rtol=1e-8)
    pairs = {frozenset({m, m + 2}) for m in range(128) if m % 4 < 2}
    assert pairs <= {*cuts(found.tree), *({frozenset({0, 2})})}
    assert all(found.network.bonds[found.tree.position(tuple(sorted(pair)))] == 1 for pair in pairs)
    index = random_index(model.sizes, 20)
    assert_close(found.entries(index) / found.norm(), model.entries(index) / model.norm(), 1e-9)
    assert found.error_bound <= 1e-8 * found.norm().item()


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.one_of(models(bare=True), models(torch.complex128), models(torch.float32)), st.data())
def test_interchange_keeps_to_the_tolerance_and_never_takes_more_numbers(model, data):
    """All joins, any tree, any scale; the same result in every run."""
    rtol = data.draw(st.sampled_from([0.0, 1e-8, 1e-2, 0.3, 0.9]))
    unit = data.draw(st.sampled_from([1.0, 1e150, 1e-150])) if model.dtype != torch.float32 else 1.0
    first = next(iter(model.weights))
    model.load_weights({first: model.weights[first].detach() * unit})
    found, again = interchange(model, rtol=rtol), interchange(model, rtol=rtol)
    assert numbers(found) <= numbers(model)
    assert (found.dtype, found.sizes) == (model.dtype, model.sizes)
    assert found.tree == again.tree and all(map(torch.equal, found.stacks, again.stacks))
    one, other = (m.to_tensor().detach().to(torch.complex128) / unit for m in (found, model))
    norm, rounding = float(other.norm()), 2e-6 if model.dtype == torch.float32 else 1e-12
    assert float((one - other).norm()) <= max(rtol, rounding) * norm
    assert float((one - other).norm()) <= found.error_bound / unit + rounding * norm
    assert found.error_bound / unit <= (rtol + 20 * rounding) * norm


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(models(), st.sampled_from([1e-8, 1e-2, 0.3]))
def test_no_tree_found_takes_more_numbers_than_the_natural_one(model, rtol):
    x = model.to_tensor().detach()
    found = find_tree(x, rtol=rtol)
    natural = decompose(x, ModeTree.binary(x.ndim), rtol=rtol)
    assert numbers(decompose(x, found, rtol=rtol)) <= numbers(natural)


def test_what_is_left_as_it_is():
    """Wide CP models, whose full joins would need more; zeros; names of nodes are the usual ones."""
    wide = model_of(ModeTree.star(40), sizes=3, bonds={n: 4 for n in range(40)}, std=1.0)
    found = interchange(wide, rtol=1e-6)
    assert found.network.named_joins == wide.network.named_joins and found.tree == wide.tree
    assert found.error_bound == 0 and found is not wide
    assert_close(found.weights[3], wide.weights[3])
    named = interchange(model_of(zoo.TREES["named"]), rtol=0)
    assert set(named.tree.interior) == {(0, 1, 2)}
    assert interchange(model_of(ModeTree.binary(4), std=0.0), rtol=0.1).norm() == 0
    tucker = model_of(ModeTree.star(5), "full", sizes=4, bonds={n: 3 for n in range(5)})
    assert interchange(tucker, rtol=1e-6).tree == tucker.tree


def test_wide_nodes_are_parted_where_that_pays():
    x = random_model(ModeTree([[0, 1], [2, 3], [4, 5]]), bond=3, size=3).to_tensor().detach()
    assert interchange(decompose(x, ModeTree.star(6), rtol=1e-10), rtol=1e-8).tree == find_tree(x)


def test_wide_bonds_are_looked_at_through_random_vectors():
    pairs = torch.einsum("ac,bd->abcd", *randn(2, 12, 12))
    found = interchange(decompose(pairs, ModeTree.binary(4), rtol=1e-12), rtol=1e-8)
    assert cuts(found.tree) == {frozenset({1, 3})}
    assert_close(found.to_tensor(), pairs, 1e-8)


def test_trivial_tensors():
    for shape, tree in (((5,), [0]), ((4, 3), [0, 1]), ((2, 1, 3), [0, 1, 2])):
        assert find_tree(torch.ones(shape)) == ModeTree(tree)
    for x in (
        torch.zeros(3, 3, 3, 3),
        torch.ones(2, 3, 2, 3),
        torch.ones(1, 1, 1, 1, 1),
        randn(1, 3, 1, 4, 2),
    ):
        assert find_tree(x).order == x.ndim
    assert find_tree([[1.0, 2.0], [3.0, 4.0]]) == find_tree(np.ones((2, 2))) == ModeTree([0, 1])


def cosines(pairs, order, count, seed=0):
    index = random_index((6,) * order, count, seed)
    u = (index.double() + 0.5) / 6
    return index, sum(torch.cos(3 * u[:, a] * u[:, b]) for a, b in pairs)


def test_pairs_that_interact_are_found_from_few_entries():
    pairs = [(0, 7), (1, 4), (2, 9), (3, 6), (5, 8)]
    index, values = cosines(pairs, 10, 1000)
    strengths = interactions(index, values * 1e-200, (6,) * 10)
    assert {tuple(pair) for pair in strengths.triu().nonzero().tolist()} == set(pairs)
    assert_close(strengths, interactions(index, values * (3 + 4j), (6,) * 10))
    tree = find_tree(completion(index=index, values=values, sizes=(6,) * 10))
    assert {frozenset(pair) for pair in pairs if 0 not in pair} <= cuts(tree) and tree == linkage_tree(
        strengths
    )


def test_without_a_signal_for_pairs_the_tree_is_balanced():
    index = random_index((4,) * 6, 600)
    noise, sums = randn(600), index.to(torch.float64).sum(1)
    for values in (noise, sums, torch.ones(600), 1e-9 * noise + 1):
        assert find_tree(completion(index=index, values=values, sizes=(4,) * 6)) == ModeTree.binary(6)
    one = completion(index=index[:1], values=noise[:1], sizes=(4,) * 6)
    assert find_tree(one, method="pairs") == ModeTree.binary(6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_additive_model(dtype):
    """Exact for sums without a ridge, shrunk with one, 0 where nothing was observed."""
    index = all_index((3, 4, 2))
    parts = [randn(n, dtype=dtype, seed=n) for n in (3, 4, 2)]
    values = sum(part[i] for part, i in zip(parts, index.T, strict=True))
    mean, found = additive(index, values, (3, 4, 5), ridge=0.0)
    assert_close(mean + sum(part[i] for part, i in zip(found, index.T, strict=True)), values, 1e-6)
    assert not found[2][2:].any() and mean.dtype == found[0].dtype == torch.promote_types(
        dtype, torch.float64
    )
    shrunk = additive(index, values, (3, 4, 2))[1]
    assert_close(shrunk[1], found[1] * 6 / 7, 1e-6)


def test_linkage():
    strengths = torch.zeros(5, 5)
    for a, b, s in ((0, 3, 2.0), (1, 4, 1.0), (0, 1, 0.1)):
        strengths[a, b] = strengths[b, a] = s
    assert linkage_tree(strengths) == ModeTree([[[0, 3], [1, 4]], 2])
    assert linkage_tree(torch.eye(7)) == linkage_tree(torch.zeros(1, 1).expand(7, 7)) == ModeTree.binary(7)


X, MODEL = randn(3, 3, 3, 3), model_of(ModeTree.binary(4))
TASK = completion(X, 40)
HOLE = torch.where(X == X.max(), torch.nan, X)
test_refusals = refuses(
    [
        (lambda: find_tree(X, method="interchang"), tnreg.OptionError, "did you mean 'interchange'"),
        (lambda: find_tree(X, method="pairs"), tnreg.OptionError, r"completion\(index"),
        (lambda: find_tree(MODEL, method="agglomerate"), tnreg.OptionError, "not for a factorization"),
        (lambda: find_tree(TASK, method="interchange"), tnreg.OptionError, "not for a completion task"),
        (lambda: find_tree(TASK, rtol=0.1), tnreg.OptionError, "leave it out"),
        (lambda: find_tree(X, rtol=1.0), tnreg.OptionError, r"find_tree: rtol must be a number in \[0, 1\)"),
        (lambda: find_tree(HOLE), tnreg.DataError, "1 NaN, 0 infinite"),
        (lambda: find_tree(X.long()), tnreg.DataError, "dtype torch.int64"),
        (lambda: find_tree(X[0, 0, 0, 0]), tnreg.ShapeError, "no modes"),
        (lambda: find_tree(X[:0]), tnreg.DataError, "empty"),
        (lambda: find_tree(torch.zeros(1).expand((2,) * 60)), tnreg.SizeError, "would not fit"),
        (lambda: interchange(MODEL, rtol=1.0), tnreg.OptionError, "interchange: rtol"),
        (lambda: interchange(X, rtol=0.1), tnreg.OptionError, "expected a Factorization"),
    ]
)
