"""Entanglement of data across the cuts of a tree, correlations across them, and orders of features."""

import math

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses
from zoo import randn, random

import tnreg
from tnreg import DataError, ModeTree, OptionError, ShapeError, SizeError, TreeError, rearrange
from tnreg import data_entanglement as entanglement

TREE = ModeTree.binary(4)
SIGNS = torch.cartesian_prod(*4 * [torch.tensor([0.0, 1.0])])  # 16 samples: every feature is independent


def by_definition(x, tree, factors, theta):
    """From the dense tensor; factors are vectors (M, K) of the labels, an axis that no node has below it."""
    tensor = factors.double()
    for column in x.T:
        wave = torch.stack([torch.cos(math.pi * theta * column), torch.sin(math.pi * theta * column)], -1)
        tensor = torch.einsum("m...,md->m...d", tensor, wave)
    tensor, found = tensor.mean(0).movedim(0, -1), {}
    for node in tree.nodes[:-1]:
        s = torch.linalg.svdvals(tnreg.matricize(tensor, tree.modes_below(node)))
        found[node] = float(tnreg.entanglement_entropy(s))
    return found


def assert_same(found, wanted, atol=1e-11):
    assert list(found) == list(wanted)
    assert all(abs(found[node] - wanted[node]) < atol for node in wanted), (found, wanted)


@pytest.mark.parametrize("tree", zoo.TREES.values(), ids=zoo.TREES)
@pytest.mark.parametrize("theta", [0.085, 0.8])
def test_entropies_are_those_of_the_dense_tensor(tree, theta):
    """Without labels, with two classes of any numbers, and with three; products may be negative."""
    x, classes = randn(12, tree.order), torch.arange(12) % 3
    assert_same(entanglement(x, tree, theta=theta), by_definition(x, tree, torch.ones(12, 1), theta))
    signs = by_definition(x, tree, (classes > 0)[:, None] * 2 - 1, theta)
    for labels in (classes > 0, (classes > 0) * 2.0 - 1, np.where(classes > 0, 3, 7)):
        assert_same(entanglement(x, tree, labels, theta), signs)
    corners = torch.nn.functional.one_hot(classes).double() - 1 / 3
    assert_same(entanglement(x, tree, classes, theta), by_definition(x, tree, corners, theta))


def test_spectra_of_the_same_tensor_as_a_factorization():
    """The data tensor is a factorization with diagonal joins."""
    x, theta = randn(6, 4), 0.3
    angles = math.pi * theta * x.T
    weights = dict(enumerate(torch.stack([angles.cos(), angles.sin()], 1)))
    weights |= dict.fromkeys(TREE.interior[:-1], torch.eye(6, dtype=x.dtype))
    weights[TREE.root] = torch.ones(6, dtype=x.dtype)
    model = tnreg.Factorization.from_weights(TREE, weights, join="diagonal")
    wanted = {v: float(tnreg.entanglement_entropy(s.detach())) for v, s in tnreg.spectra(model).items()}
    assert_same(entanglement(x, TREE, theta=theta), wanted, 1e-9)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(zoo.trees(), st.integers(0, 99), st.sampled_from(["entanglement", "correlation"]))
def test_samples_in_another_order_and_features_with_their_modes(tree, seed, method):
    x, classes = randn(9, tree.order, seed=seed), torch.arange(9) % 2
    wanted = entanglement(x, tree, classes, method=method)
    rows, columns = (torch.randperm(n, generator=random(seed)) for n in x.shape)
    assert_same(entanglement(x[rows], tree, classes[rows], method=method), wanted)
    place = columns.argsort().tolist()  # where each feature went

    def moved(node):
        return [moved(child) for child in tree.children(node)] or place[node]

    other = ModeTree(moved(tree.root))
    found = entanglement(x[:, columns], other, classes, method=method)
    assert_same(dict(zip(wanted, found.values(), strict=True)), wanted)


@pytest.mark.parametrize("labels", [None, SIGNS[:, 0] != SIGNS[:, 3], torch.arange(16) % 1])
def test_independent_features_share_nothing(labels):
    """A parity of two features is a product of functions of one."""
    assert max(entanglement(SIGNS, TREE, labels).values()) < 1e-12
    assert max(entanglement(SIGNS, TREE, method="correlation").values()) < 1e-12


def test_constant_features_and_zero_tensors_share_nothing():
    for x in (torch.full((7, 4), 0.1), torch.zeros(7, 4), torch.randn(1, 4).expand(7, 4)):
        assert max(entanglement(x, TREE).values()) < 1e-12
        assert set(entanglement(x, TREE, method="correlation").values()) == {0.0}
    assert set(entanglement(torch.ones(6, 4), TREE, torch.arange(6) % 2).values()) == {0.0}  # labels cancel


def test_equal_halves_share_all_they_have():
    """Samples at orthogonal vectors: as many bits as features, across the middle and nothing else."""
    half = SIGNS[::4, :2]
    x = torch.cat([half, half], 1)
    found = entanglement(x, ModeTree([[0, 1], [2, 3]]), theta=0.5)
    assert found[0, 1] == pytest.approx(2 * math.log(2)) and found[0] == pytest.approx(math.log(2))
    assert entanglement(x, ModeTree([[0, 2], [1, 3]]), theta=0.5)[0, 2] < 1e-12
    assert entanglement(x, TREE, method="correlation")[0, 1] == pytest.approx(2.0)


def test_a_parity_shows_in_the_entropy_and_in_no_correlation():
    x = torch.cat([SIGNS[::2, :3], SIGNS[::2, :3].sum(1, keepdim=True) % 2], 1)
    assert entanglement(x, TREE, theta=0.5)[0, 1] == pytest.approx(math.log(2))
    assert max(entanglement(x, TREE, method="correlation").values()) < 1e-12


def test_correlations_by_definition():
    """On any tree, with a constant feature, at any scale and offset."""
    for tree in zoo.TREES.values():
        x = randn(10, tree.order) + 3.0
        x[:, 0] = 0.1
        with np.errstate(invalid="ignore"):
            wanted = torch.nan_to_num(torch.corrcoef(x.T).reshape(tree.order, -1).abs())
        wanted[0], wanted[:, 0] = 0, 0
        for scale in (1.0, 1e150, 1e-150):
            for node, value in entanglement(scale * x, tree, method="correlation").items():
                rest = sorted(set(tree.leaves) - set(tree.modes_below(node)))
                assert value == pytest.approx(float(wanted[list(tree.modes_below(node))][:, rest].sum()))


def test_few_features_and_many(monkeypatch):
    """Products of few vectors and eigendecompositions tell the same."""
    x, tree = randn(30, 8), ModeTree.binary(8)
    wanted = entanglement(x, tree)
    monkeypatch.setattr("tnreg.search.samples._FEW", 0)
    assert_same(entanglement(x, tree), wanted)


def test_images_integers_and_nodes():
    grid, images = ModeTree.grid((2, 4)), torch.randint(0, 9, (20, 2, 4), generator=random())
    wanted = entanglement(images.reshape(20, 8).double() / 2, grid)
    assert_same(entanglement(images, grid, theta=0.085 / 2), wanted)
    some = entanglement(images, grid, theta=0.085 / 2, nodes=grid.children(grid.root))
    assert some == {v: pytest.approx(wanted[v]) for v in grid.children(grid.root)}


@pytest.mark.parametrize("order", [64, 96])
def test_rearranging_restores_a_line(order):
    """Up to its direction, and to what chance makes of a few neighbours; the same again for the same seed."""
    x = randn(200, order + 50)
    for t in range(1, order + 50):
        x[:, t] += 0.9 * x[:, t - 1]
    x, shuffled = x[:, 50:], torch.randperm(order, generator=random())
    order = rearrange(x[:, shuffled], seed=3)
    assert order.dtype == torch.int64 and torch.equal(order, rearrange(x[:, shuffled].numpy(), seed=3))
    assert torch.equal(x[:, shuffled][:, order][:, order.argsort()], x[:, shuffled])
    steps = shuffled[order].diff().abs()
    assert int((steps == 1).sum()) >= 0.95 * len(steps)


@pytest.mark.slow
def test_rearranging_restores_blocks_whatever_their_order():
    hidden = randn(200, 8).repeat_interleave(4, 1)
    shuffled = torch.randperm(32, generator=random(1))
    x = (hidden + 0.3 * randn(200, 32, seed=1))[:, shuffled]
    order = rearrange(x)
    assert all(len(block.unique()) == 1 for block in (shuffled[order] // 4).view(8, 4))
    for method in ("entanglement", "correlation"):
        before, after = (entanglement(y, ModeTree.binary(32), method=method) for y in (x, x[:, order]))
        assert sum(after.values()) < sum(before.values())


@pytest.mark.parametrize("order", [1, 2, 3, 5, 7, 12])
def test_every_feature_has_one_place(order):
    """Also constant ones, and where the left part is larger."""
    x = randn(20, order)
    x[:, -1] = 2.0
    assert sorted(rearrange(x).tolist()) == list(range(order))


X, NAN, MANY = randn(6, 4), torch.full((6, 4), math.nan), torch.zeros(1, 4).expand(2**20, 4)
test_refused = refuses(
    [
        (lambda: entanglement(X[:, :3], TREE), ShapeError, r"found:    shape \(6, 3\)\n  expected: \(M, 4\)"),
        (lambda: entanglement(X[0], TREE), ShapeError, r"found:    shape \(4,\)"),
        (lambda: entanglement(X.reshape(6, 4, 1), ModeTree.grid((2, 2))), ShapeError, r"images \(M, 2, 2\)"),
        (lambda: entanglement(X[:1], TREE), DataError, "at least two samples are needed, found 1"),
        (lambda: entanglement(NAN, TREE), DataError, "24 NaN"),
        (lambda: entanglement(np.ma.masked_less(X.numpy(), 0), TREE), DataError, "masked or missing"),
        (lambda: entanglement(X + 1j, TREE), DataError, "real numbers, found torch.complex128"),
        (lambda: entanglement([["a", "b"]], TREE), DataError, "samples cannot be read"),
        (lambda: entanglement(255 * X, TREE), DataError, "half turns at theta = 0.085"),
        (lambda: entanglement(X * 1e300, TREE, theta=1e300), DataError, "inf half turns"),
        (lambda: entanglement(X, TREE, theta=0), OptionError, "theta must be > 0"),
        (lambda: entanglement(X, TREE, theta=math.nan), OptionError, "theta must be a finite number >= 0"),
        (lambda: entanglement(X, TREE, X[:, 0]), DataError, "labels must be classes, whole numbers"),
        (lambda: entanglement(X, TREE, NAN[:, 0]), DataError, "labels must be classes"),
        (lambda: entanglement(X, TREE, list("ababab")), DataError, "labels cannot be read"),
        (lambda: entanglement(X, TREE, [1, -1]), ShapeError, "2 labels for 6 samples"),
        (lambda: entanglement(X, TREE, X > 0), ShapeError, "labels needs 1 axes"),
        (lambda: entanglement(X, TREE, method="corr"), OptionError, "'correlation', found 'corr'"),
        (lambda: entanglement(X, TREE, nodes=[TREE.root]), TreeError, "above the root"),
        (lambda: entanglement(X, TREE, nodes=["top"]), TreeError, "no node 'top'"),
        (lambda: entanglement(X, TREE, nodes=0), OptionError, "a list of the tree's nodes, found 0"),
        (lambda: entanglement(X, [[0, 1], 3]), TreeError, "not a mode tree"),
        (lambda: rearrange(X[0]), ShapeError, r"expected: \(M, N\)"),
        (lambda: rearrange(X[:1]), DataError, "rearrange: at least two samples"),
        (lambda: rearrange(NAN), DataError, "24 NaN"),
        (lambda: rearrange(X, seed="a"), OptionError, "rearrange: seed must be an integer"),
        (lambda: rearrange(MANY.T), SizeError, "correlations of all features would not fit"),
        (lambda: entanglement(MANY, TREE), SizeError, "inner products of all samples would not fit"),
    ]
)  # fmt: skip


def test_plot():
    tree = zoo.TREES["uneven"]
    data = {
        name: entanglement(randn(9, 5), tree, theta=theta) for name, theta in {"one": 0.1, "$two": 1}.items()
    }
    ax = tnreg.plots.data_entanglement(data, tree)
    one, two = ax.lines
    assert list(one.get_xdata()) == [1, 2, 3]
    leaves = [data["$two"][mode] for mode in tree.leaves]
    assert two.get_ydata()[0] == pytest.approx(np.mean(leaves))
    assert len(tnreg.plots.data_entanglement(data["one"], tree, ax).lines) == 3
