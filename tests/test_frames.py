"""Orthonormal frames: what they promise, and spectra in them and through the bonds against dense tensors.

All of it holds by QR factorizations, as on a CPU, and by Gram matrices, as on a GPU for some nodes at once.
"""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
import zoo
from hypothesis import given, settings

from tnreg import Factorization, ModeTree, algebra, decompose, matricize, spectra, truncate
from tnreg.ranks.frames import batches, by_gram, frames, scale_of, values_in_frames, vectors_by_squares

frames_module = sys.modules["tnreg.ranks.frames"]
spectra_module, scaled_module = sys.modules["tnreg.ranks.spectra"], sys.modules["tnreg.networks.scaled"]
DTYPES = [torch.float64, torch.complex128]


@pytest.fixture(autouse=True, scope="module", params=["QR", "Gram"])
def orthogonalized_by(request):
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(frames_module, "_gram_pays", lambda matrix: request.param == "Gram")
        yield request.param


def models_of(name, dtype):
    tree = zoo.TREES[name]
    models = [zoo.model_of(tree, join, dtype=dtype) for join in zoo.joins_of(tree).values()]
    for join, step in (("full", 1), ("full", 2), ("diagonal", 1), ("diagonal", 2)):
        model = zoo.bare_model(tree, join, dict.fromkeys(range(0, tree.order, step), "bare"))
        stacks = [zoo.randn(*stack.shape, dtype=dtype, seed=k) for k, stack in enumerate(model.stacks)]
        models.append(Factorization.holding(model.network, stacks))
    return [*models, zoo.model_of(tree, root="ones", dtype=dtype, seed=5)]


def train(factor=1.0, dtype=torch.float64):
    """A tensor train of order 64, every other core multiplied by a factor and the others divided by it."""
    leaves = dict.fromkeys(range(1, 64), "bare")
    model = Factorization(ModeTree.caterpillar(64), 3, 4, join="full", leaves=leaves, std=0.3, dtype=dtype,
                          generator=zoo.random())  # fmt: skip
    model.load_weights({v: w * factor ** (-1) ** i for i, (v, w) in enumerate(model.weights.items())})
    return model


@pytest.fixture
def scaled_by_column(monkeypatch):
    """Which of frames and inner products were computed with scales per column."""
    taken = []
    frames_of, products_of = frames_module._frames, scaled_module._scaled_inner_products

    def frames_seen(network, stacks, bases, by_column):
        taken.extend(["frames"] * by_column)
        return frames_of(network, stacks, bases, by_column)

    def products_seen(*arguments):
        taken.append("inner")
        return products_of(*arguments)

    monkeypatch.setattr(frames_module, "_frames", frames_seen)
    monkeypatch.setattr(scaled_module, "_scaled_inner_products", products_seen)
    return taken


def both_ways(model):
    """Singular values in frames, and through the bonds as for gradients."""
    with torch.no_grad():
        in_frames = spectra(model)
    return in_frames, {node: values.detach() for node, values in spectra(model).items()}


def assert_spectra(found, tensor, tree, rtol, atol=0.0):
    assert set(found) == set(tree.nodes[:-1])
    for node, values in found.items():
        expected = torch.linalg.svdvals(matricize(tensor, tree.modes_below(node)))
        count, limit = min(len(values), len(expected)), rtol * expected[0] + atol
        assert (values[:count] - expected[:count]).abs().max() <= limit
        assert expected[count:].sum() <= limit and values[count:].sum() <= limit


@pytest.mark.parametrize("name", zoo.TREES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spectra_both_ways(name, dtype):
    for model in models_of(name, dtype):
        tensor = model.to_tensor().detach()
        for found in both_ways(model):
            assert_spectra(found, tensor, model.tree, 1e-13)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(model=zoo.models(bare=True))
def test_spectra_of_random_models(model):
    tensor = model.to_tensor().detach()
    size = math.prod(torch.linalg.vector_norm(w).item() for w in model.weights.values())
    for found in both_ways(model):
        assert_spectra(found, tensor, model.tree, 1e-11, 1e-13 * size)


@pytest.mark.parametrize("name", zoo.TREES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frames_are_orthonormal_and_hold_the_tensor(name, dtype):
    for model in models_of(name, dtype):
        net = model.network
        with torch.no_grad():
            found = frames(net, list(model.stacks))
            for batch, frame in zip(batches(net), found, strict=True):
                if batch.root or frame.rows is None:
                    continue
                basis = frame.rows.flatten(1, -2)
                gram = basis.mH @ basis
                assert (gram - torch.eye(batch.rank, dtype=dtype)).abs().max() < 1e-12
        assert float(scale_of(found).value()) == pytest.approx(model.norm().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_matrices_factor_as_qr_does(dtype):
    """Orthonormal and exact to rounding up to a condition of 1e6, or refused."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(3, n, 6, dtype=dtype, generator=generator))[0] for n in (40, 6))
    for power in (0, -3, -6, -9, -20):
        x = u * torch.logspace(0, power, 6, dtype=torch.float64) @ v.mH
        factors = by_gram(x)
        if power < -8:
            assert factors is None
            continue
        q, r = factors
        assert (q.mH @ q - torch.eye(6)).abs().max() < 1e-14
        assert (q @ r - x).abs().max() < 1e-14 and torch.equal(r, r.triu())
    assert by_gram(torch.cat([x, torch.zeros_like(x)])) is None
    assert by_gram(torch.full_like(x, 1e200)) is None


def test_equal_nodes_share_a_call():
    """A complete binary tree of 64 modes: one batch a level; uneven ones: nodes of one shape together."""
    model = Factorization(ModeTree.binary(64), 4, 3, join="full")
    assert [len(b.nodes) for b in batches(model.network)] == [64, 32, 16, 8, 4, 2, 1]
    star = Factorization(ModeTree.star(9), 4, 3)
    parts = batches(star.network)
    assert [(len(b.nodes), b.step) for b in parts][-1] == (1, False)
    assert max(len(b.below) for b in parts) == 2  # joined two by two


def test_large_batches_are_split(monkeypatch):
    """Numbers of one call are limited; what comes out is the same."""
    model = Factorization(ModeTree.binary(8), 4, 3, join="full", std=1.0, dtype=torch.float64)
    expected = both_ways(model)
    monkeypatch.setattr(frames_module, "_MOST_AT_ONCE", 40)
    batches.cache_clear()
    assert [len(b.nodes) for b in batches(model.network)] == [3, 3, 2, *[1] * 7]
    for found, wanted in zip(both_ways(model), expected, strict=True):
        for node, values in wanted.items():
            assert torch.allclose(found[node], values, rtol=1e-12)
    batches.cache_clear()


@pytest.mark.parametrize("decay", [1e-3, 1e-6, 1e-9])
def test_small_values_are_not_squared_away(decay):
    """Values down to 1e-13 of the largest are found."""
    tree = ModeTree.binary(4)
    values = decay ** torch.arange(3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(4, 5, 3, dtype=torch.float64, generator=generator)
    tensor = torch.einsum("r,ar,br,cr,dr->abcd", values, *torch.linalg.qr(factors)[0])
    model = decompose(tensor, tree)
    kept = values[values > 1e-13]
    for found in both_ways(model):
        for node in tree.nodes[:-1]:
            assert torch.allclose(found[node][: len(kept)], kept, rtol=1e-2, atol=1e-15)
            assert torch.allclose(found[node][: len(kept)], kept, rtol=0, atol=1e-13)


@pytest.mark.parametrize("factor", [1e200, 1e-200, 1.0])
@pytest.mark.parametrize("join", ["full", "diagonal"])
def test_any_order_and_scale(factor, join, monkeypatch):
    """Order 1024, weights of 1e±200: the same relative spectra both ways."""
    generator = torch.Generator().manual_seed(0)
    tree = ModeTree.binary(1024)
    model = Factorization(tree, 2, 3, join=join, std=1.0, dtype=torch.float64, generator=generator)
    relative = []
    with torch.no_grad():
        for stack in model.stacks:
            stack *= factor
        for most in (math.inf, 0):
            monkeypatch.setattr(frames_module, "_MOST_NUMBERS", most)
            found = spectra_module._factored_spectra(model)
            relative.append({
                i: one / one[0] for places, values in found
                for i, one in zip(places, values.x, strict=True)
            })  # fmt: skip
    for i, one in relative[0].items():
        assert torch.isfinite(one).all()
        assert (one[: len(relative[1][i])] - relative[1][i]).abs().max() < 1e-9
    assert all(torch.isfinite(p).all() for p in truncate(model, rtol=1e-3).parameters())


@pytest.mark.parametrize(("leaves", "size"), [((0, 1), 1e150), ((0,), 1e200)])
def test_scales_that_drift_apart(leaves, size):
    """Columns of very different scales side by side below a node that brings them together again."""
    tree = ModeTree.binary(4)
    model = Factorization(tree, 3, 2, join="full", std=1.0, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(1))  # fmt: skip
    plain = both_ways(model)[0]
    weights = {node: w.detach().clone() for node, w in model.weights.items()}
    scale = torch.tensor([size, 1 / size], dtype=torch.float64)
    for leaf in leaves:
        weights[leaf] *= scale
        weights[(0, 1)] /= scale[:, None, None] if leaf == 0 else scale[:, None]
    model.load_weights(weights)
    for found in both_ways(model):
        for node, values in plain.items():
            assert torch.allclose(found[node], values, rtol=1e-10)


@pytest.mark.parametrize(("factor", "again"), [(1e25, False), (1e-25, False), (1e150, True), (1e-150, True)])
def test_scales_per_column_only_where_the_range_asks(factor, again, scaled_by_column):
    """What a common scale holds is computed once; weights near the end of the range twice, to the same."""
    plain, model = train(), train(factor)
    wanted = both_ways(plain)
    norm, product = plain.norm(), plain.inner(plain)
    assert scaled_by_column == []
    for found, expected in zip(both_ways(model), wanted, strict=True):
        for node, values in expected.items():
            zoo.assert_close(found[node], values)
    assert set(scaled_by_column) == ({"frames"} if again else set())
    scaled_by_column.clear()
    zoo.assert_close(model.norm(), norm)
    zoo.assert_close(model.inner(plain), product)
    assert set(scaled_by_column) == ({"inner"} if again else set())
    assert algebra.subtract(truncate(model, rtol=1e-3), plain).norm() <= 1e-3 * norm


def test_columns_without_a_common_scale_are_told(scaled_by_column):
    """Columns that drift apart, zeros among them, and zero tensors: right, with scales of their own."""
    tree = ModeTree.binary(4)
    model = Factorization(tree, 3, 2, join="full", std=1.0, dtype=torch.float64, generator=zoo.random(1))
    for scale in ([1e150, 1e-150], [1.0, 0.0], [0.0, 0.0]):
        weights = {node: w.detach().clone() for node, w in model.weights.items()}
        weights[0] *= torch.tensor(scale, dtype=torch.float64)
        if all(scale):
            weights[(0, 1)] /= torch.tensor(scale, dtype=torch.float64).reshape(-1, 1, 1)
        changed = Factorization.from_weights(tree, weights)
        tensor = model.to_tensor() if all(scale) else changed.to_tensor()
        for found in both_ways(changed):
            assert_spectra(found, tensor.detach(), tree, 1e-12)
        zoo.assert_close(changed.norm(), tensor.norm())
        assert set(scaled_by_column) == {"frames", "inner"}
        scaled_by_column.clear()
    assert algebra.subtract(model, model).norm() < 1e-6 * model.norm()
    zoo.assert_close(algebra.scale(model, 1e-300).norm() * 1e300, model.norm())


@pytest.mark.parametrize("name", zoo.TREES)
def test_inner_products_of_all_kinds(name, scaled_by_column):
    """Any joins and bare leaves in either: that of the dense tensors, in one pass."""
    tree = zoo.TREES[name]
    kinds = [{}, dict.fromkeys(range(tree.order), "bare"), dict.fromkeys(range(0, tree.order, 2), "bare")]
    cases = enumerate(itertools.product(zoo.joins_of(tree).values(), kinds))
    models = [
        Factorization(tree, 3, 3, join=join, leaves=leaves, std=1.0, dtype=DTYPES[1], generator=zoo.random(k))
        for k, (join, leaves) in cases
    ]
    pairs = [(model, model.to_tensor().detach()) for model in models]
    with torch.no_grad():
        for (one, x), (other, y) in itertools.combinations_with_replacement(pairs, 2):
            off = one.inner(other) - (x.conj() * y).sum()
            assert off.abs() <= 1e-12 * x.norm() * y.norm()
    assert scaled_by_column == []


@pytest.mark.parametrize("name", ["caterpillar", "uneven", "cp-4"])
def test_rounded_models_own_their_weights(name):
    """No memory is shared: between two weights, or with the model that was rounded."""
    for model in models_of(name, torch.float64):
        for options in ({"rtol": 0.3}, {}):
            rounded = truncate(model, **options)
            memory = [p.untyped_storage().data_ptr() for p in (*model.parameters(), *rounded.parameters())]
            assert len(set(memory)) == len(memory)


@pytest.mark.parametrize("name", zoo.TREES)
def test_vectors_by_squares(name):
    """The squares of all values to rounding, and orthonormal vectors that belong to them."""
    for model in models_of(name, torch.complex128):
        net, stacks = model.network, [stack.detach() for stack in model.stacks]
        found = frames(net, stacks)
        for one, other in zip(
            values_in_frames(net, found, vectors=True), vectors_by_squares(net, found), strict=True
        ):
            if one.vectors is None:
                assert other.vectors is None
                continue
            squares, basis = other.values.square(), other.vectors
            turned = (one.vectors.mH @ basis) * one.values.unsqueeze(2)
            assert (one.values.square() - squares).abs().max() < 1e-13
            assert (turned.mH @ turned - torch.diag_embed(squares)).abs().max() < 1e-13
            assert (basis.mH @ basis - torch.eye(basis.shape[2])).abs().max() < 1e-13


def test_what_does_not_fit_goes_through_the_bonds(monkeypatch):
    """Frames of wide diagonal joins would not fit: the same values, without them."""
    model = zoo.model_of(zoo.TREES["htf-4"], dtype=torch.float64)
    with torch.no_grad():
        expected = spectra(model)
        monkeypatch.setattr(frames_module, "_MOST_NUMBERS", 1)
        monkeypatch.setattr(spectra_module, "values_in_frames", None)  # not called
        for node, values in spectra(model).items():
            assert torch.allclose(values, expected[node][: len(values)], rtol=0, atol=1e-12 * expected[0][0])
