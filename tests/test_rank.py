"""Ranks of dense tensors against brute force, their limits, and what is refused."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import zoo

from tnreg import Factorization, ModeTree, decompose, matricize, truncate
from tnreg.cnns.penalties import EffectiveRankPenalty, LocalComponentPenalty
from tnreg.errors import DataError, OptionError, ShapeError
from tnreg.factorizations.components import distance_bound, drop_components, keep_components
from tnreg.ranks.decompose import distance
from tnreg.ranks.dense import effective_rank, entanglement_entropy
from tnreg.ranks.spectra import hierarchical_rank, spectra
from tnreg.tensors.axes import rounding_rtol


def brute_force_matrix(tensor, modes):
    sides = sorted(modes), [m for m in range(tensor.ndim) if m not in modes]
    matrix = np.zeros([math.prod(tensor.shape[m] for m in side) for side in sides])
    for index in np.ndindex(*tensor.shape):
        place = [0, 0]
        for k, side in enumerate(sides):
            for m in side:
                place[k] = place[k] * tensor.shape[m] + index[m]
        matrix[tuple(place)] = tensor[index]
    return matrix


@pytest.mark.parametrize("modes", [(0,), (2, 0), (1, 3), (3, 2, 1), (0, 1, 2, 3), ()])
def test_matricize(modes):
    tensor = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    wanted = brute_force_matrix(tensor.numpy(), modes)
    assert np.array_equal(matricize(tensor, modes).numpy(), wanted)
    assert np.array_equal(matricize(tensor.numpy(), modes).numpy(), wanted)


@pytest.mark.parametrize("modes", [(0, 0), (4,), (-1,), 7])
def test_matricize_refuses(modes):
    with pytest.raises(ShapeError, match="distinct and within 0..3"):
        matricize(torch.zeros(2, 3, 5, 4), modes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (20, 2, 3, 2), (6, 6, 6, 6)])
def test_spectra_of_generic_tensors(dtype, shape):
    tensor = zoo.randn(*shape, dtype=dtype)
    for tree in (ModeTree.binary(4), ModeTree.half(4), ModeTree.star(4), ModeTree.caterpillar(4)):
        for v, s in spectra(tensor, tree).items():
            wanted = torch.linalg.svdvals(matricize(tensor, tree.modes_below(v)))
            assert s.dtype == wanted.dtype
            error = max(50 * torch.finfo(dtype).eps, 1e-11) * wanted[0].item()
            assert torch.allclose(s, wanted, rtol=0, atol=error)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_spectra_of_hard_tensors(scale):
    """Singular values over 15 decades, low rank, one huge entry: errors stay below 1e-11 of the largest."""
    left, right = torch.linalg.qr(zoo.randn(2, 30, 30))[0]
    decay = left * 10.0 ** torch.linspace(0, -15, 30, dtype=torch.float64) @ right
    spiked = zoo.randn(6, 5, 6, 5)
    spiked[1, 2, 3, 4] = 1e9
    low = torch.einsum("ir,jr,kr,lr->ijkl", *zoo.randn(4, 6, 2))
    tree = ModeTree.binary(4)
    for tensor in (decay.reshape(6, 5, 6, 5), spiked, low):
        for v, s in spectra(tensor * scale, tree).items():
            wanted = torch.linalg.svdvals(matricize(tensor, tree.modes_below(v)))
            assert torch.allclose(s / scale, wanted, rtol=0, atol=1e-11 * wanted[0].item())


def graded(*shape, decades, dtype):
    """Draw a tensor whose spectra at the leaves reach over so many decades, in random directions."""
    tensor = zoo.randn(*shape, dtype=dtype)
    for n, size in enumerate(shape):
        turn = torch.linalg.qr(zoo.randn(size, size, dtype=dtype, seed=n))[0]
        weights = 10.0 ** torch.linspace(0, -decades, size, dtype=torch.float64)
        tensor = torch.tensordot(tensor, (turn * weights).to(dtype), dims=([0], [1]))
    return tensor


def kinds_of_tensors(shape, dtype):
    """Full rank, well and badly conditioned, low rank with and without noise, columns that stand out."""
    terms = [zoo.randn(size, 3, dtype=dtype, seed=n) for n, size in enumerate(shape)]
    letters = "abcdef"[: len(shape)]
    low = torch.einsum(",".join(f"{x}r" for x in letters) + "->" + letters, *terms)
    grids = torch.meshgrid([torch.linspace(0, 1, size, dtype=torch.float64) for size in shape], indexing="ij")
    smooth = (1 / (1e-2 + sum(grids))).to(dtype)
    spiked = low.clone()
    spiked[(1,) * len(shape)] = 1e6
    noise = zoo.randn(*shape, dtype=dtype, seed=9)
    decays = {"graded": 2, "steep": 6}
    made = {name: graded(*shape, decades=decades, dtype=dtype) for name, decades in decays.items()}
    return {"generic": noise, **made, "low": low, "smooth": smooth, "spiked": spiked,
            "noisy": low + 1e-9 * noise, "zero": torch.zeros_like(low)}  # fmt: skip


SHAPES = {  # of more numbers than get one SVD per node, with matricizations of all proportions
    "across": (ModeTree([[0, 2], [1, 3]]), (9, 8, 7, 10)),
    "uneven": (ModeTree([[0, 3], [[1, 4], 2]]), (3, 9, 8, 5, 7)),
    "caterpillar": (ModeTree.caterpillar(5), (6, 5, 7, 6, 5)),
    "square": (ModeTree([[1, 2], [0, 3]]), (9, 8, 9, 8)),
    "one child": (ModeTree([[[0]], [[1, [2]], 3]]), (4, 20, 17, 5)),
    "star": (ModeTree.star(3), (70, 12, 90)),
    "long mode": (ModeTree([0, [2, 1]]), (300, 6, 5)),
    "matrix": (ModeTree([1, 0]), (110, 150)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("name", SHAPES)
def test_spectra_of_larger_tensors(name, dtype):
    """Errors stay below 1e-11 of the largest singular value of each node."""
    tree, shape = SHAPES[name]
    for kind, tensor in kinds_of_tensors(shape, dtype).items():
        found = spectra(tensor, tree)
        assert list(found) == list(tree.nodes[:-1])
        for v, s in found.items():
            wanted = torch.linalg.svdvals(matricize(tensor, tree.modes_below(v)))
            assert s.shape == wanted.shape
            assert float((s - wanted).abs().max()) <= 1e-11 * float(wanted[0]), (kind, v)


@pytest.mark.parametrize("name", zoo.TREES)
def test_spectra_of_every_tree_around_its_middle(name, monkeypatch):
    monkeypatch.setattr("tnreg.ranks.dense._SMALL", 0)
    tree = zoo.TREES[name]
    for sizes in (zoo.sizes_of(tree), (3,) * tree.order, (1,) * tree.order):
        tensor = zoo.randn(*sizes)
        for v, s in spectra(tensor, tree).items():
            zoo.assert_close(s, torch.linalg.svdvals(matricize(tensor, tree.modes_below(v))), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64, torch.float16])
@pytest.mark.parametrize("name", zoo.TREES)
def test_spectra_in_single_precision(name, dtype, monkeypatch):
    """Of tensors and factorizations, also where squares would leave the range of float32."""
    tree, wide = zoo.TREES[name], torch.complex128 if dtype.is_complex else torch.float64
    model = zoo.model_of(tree, zoo.joins_of(tree)["mixed"], dtype=wide)
    monkeypatch.setattr("tnreg.ranks.dense._SMALL", 10)
    for scale in (1.0,) if dtype == torch.float16 else (1.0, 1e-30, 1e30):
        weights = {
            v: (w.detach() * scale ** (-1) ** k).to(dtype) for k, (v, w) in enumerate(model.weights.items())
        }
        scaled, twin = (
            Factorization.from_weights(
                tree, {v: w.to(d) for v, w in weights.items()}, join=model.network.named_joins
            )
            for d in (dtype, wide)
        )
        x = (scale * zoo.randn(*zoo.sizes_of(tree), dtype=wide)).to(dtype)
        with torch.no_grad():
            pairs = [(scaled, twin), (x, x.to(wide))]
            found = [(spectra(one, tree, precision="single"), spectra(two, tree)) for one, two in pairs]
        found.append((spectra(scaled, precision="single"), found[0][1]))  # through the bonds
        for spectra_of, wanted in found:
            for v, s in spectra_of.items():
                assert s.dtype == x.real.dtype
                if 1e-35 < float(wanted[v][0]) < 1e38:
                    zoo.assert_close(s.double(), wanted[v], 1e-5 if dtype != torch.float16 else 1e-3)


def test_single_precision_of_columns_of_any_size():
    model = zoo.model_of(ModeTree.binary(4), "full", bonds=3)
    weights, scales = dict(model.weights), torch.tensor([1e-18, 1.0, 1e18], dtype=torch.float64)
    for node in (0, 1):
        weights[node] = weights[node] * scales
    weights[0, 1] = weights[0, 1] / scales[:, None] / scales[:, None, None]
    scaled = Factorization.from_weights(
        model.tree, {v: w.detach().float() for v, w in weights.items()}, join="full"
    )
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for v, s in spectra(scaled, precision="single").items():
                zoo.assert_close(s.double(), spectra(model)[v], 1e-5)


def test_single_precision_of_larger_tensors():
    for name, (tree, shape) in SHAPES.items():
        for kind, tensor in kinds_of_tensors(shape, torch.float32).items():
            for v, s in spectra(tensor, tree, precision="single").items():
                wanted = torch.linalg.svdvals(matricize(tensor.double(), tree.modes_below(v)))
                assert float((s - wanted).abs().max()) <= 1e-5 * float(wanted[0]), (name, kind, v)


def test_exact_ranks():
    tree = ModeTree([[0, 3], [[1, 4], 2]])
    bonds = {v: r for v, r in zip(tree.nodes[:-1], (2, 2, 3, 2, 2, 3, 3, 3), strict=True)}
    model = zoo.model_of(tree, sizes=4, bonds=bonds, std=1.0)
    found = hierarchical_rank(model.to_tensor().detach(), tree)
    assert found == hierarchical_rank(model)
    # (0, 3) and (1, 4) cannot exceed the bond below them, nor the root's other child the rank of (0, 3)
    assert found == {0: 2, 3: 2, (0, 3): 2, 1: 2, 4: 2, (1, 4): 2, 2: 3, (1, 2, 4): 2}


def test_zero_and_rank_one():
    tree = ModeTree.binary(4)
    assert set(hierarchical_rank(torch.zeros(2, 3, 4, 5), tree).values()) == {0}
    assert set(hierarchical_rank(torch.ones(2, 3, 4, 5), tree).values()) == {1}
    for s in spectra(torch.ones(2, 3, 4, 5, dtype=torch.float64), tree).values():
        assert s[0].item() == pytest.approx(math.sqrt(120)) and s[1:].abs().max() < 1e-12


def test_threshold():
    diagonal = torch.diag(torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64))
    tree = ModeTree.star(2)
    for rtol, rank in ((1e-1, 1), (1e-3, 2), (1e-5, 3), (None, 3)):
        assert hierarchical_rank(diagonal, tree, rtol=rtol) == {0: rank, 1: rank}
    with pytest.raises(OptionError, match=r"rtol must be a number in \[0, 1\)"):
        hierarchical_rank(diagonal, tree, rtol=1.0)


def test_spectra_differentiate():
    tree = ModeTree.binary(4)
    tensor = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(x):
        return spectra(x, tree)[(0, 1)]

    assert torch.autograd.gradcheck(function, tensor)
    with torch.no_grad():
        assert torch.allclose(spectra(tensor, tree)[(0, 1)], function(tensor))


def test_effective_rank():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])).item() == pytest.approx(3.0)
    assert effective_rank([1.0, 0.0]).item() == pytest.approx(1.0)
    assert effective_rank(torch.zeros(4)).item() == effective_rank(torch.zeros(0)).item() == 0.0
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert effective_rank(7 * p).item() == pytest.approx(2**1.5)
    assert effective_rank(torch.tensor([3e38, 3e38])).item() == pytest.approx(2.0)


def test_entanglement_entropy():
    s = torch.tensor([3.0, 4.0], dtype=torch.float64)
    rho = (9 / 25, 16 / 25)
    assert entanglement_entropy(s).item() == pytest.approx(-sum(r * math.log(r) for r in rho))
    assert entanglement_entropy(1e-200 * s).item() == pytest.approx(entanglement_entropy(s).item())
    assert entanglement_entropy(torch.ones(5)).item() == pytest.approx(math.log(5))
    assert entanglement_entropy(torch.tensor([3e38, 3e38])).item() == pytest.approx(math.log(2))
    assert entanglement_entropy(torch.zeros(3)).item() == 0.0
    for one in ([2.0], [2.0, 0.0], torch.tensor([0.1, 0.0, 0.0], dtype=torch.float32)):
        assert str(entanglement_entropy(one).item()) == "0.0"  # not -0.0


@pytest.mark.parametrize("function", [effective_rank, entanglement_entropy])
def test_smooth_ranks_differentiate(function):
    s = torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, s)
    zero = torch.tensor([1.0, 0.0], requires_grad=True)
    function(zero).backward()
    assert torch.isfinite(zero.grad).all()
    for wrong in (torch.ones(2, 2), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(ShapeError, match="vector of real singular values"):
            function(wrong)
    for values in ([math.nan, 1.0], [-1.0, 2.0], [math.inf]):
        with pytest.raises(DataError, match="finite and not negative"):
            function(torch.tensor(values))


def test_refuses():
    tree = ModeTree.binary(4)
    nan = torch.randn(2, 2, 2, 2)
    nan[0, 0, 0, 0], nan[1, 1, 1, 1] = math.nan, math.inf
    for wrong, error, message in (
        (nan, DataError, r"2 entries that are not finite \(1 NaN, 1 infinite\)"),
        (torch.zeros(2, 2, 2), ShapeError, "3 axes and the tree 4 modes"),
        (torch.zeros(2, 2, 2, 2, dtype=torch.int64), DataError, "dtype torch.int64"),
        (torch.zeros(2, 0, 2, 2), DataError, "is empty"),
    ):
        for call in (spectra, hierarchical_rank, decompose):
            with pytest.raises(error, match=message):
                call(wrong, tree)
    for call in (spectra, hierarchical_rank):
        with pytest.raises(OptionError, match="need a tree"):
            call(torch.zeros(2, 2))
        with pytest.raises(OptionError, match="along its own tree"):
            call(zoo.model_of(tree), ModeTree.star(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64, torch.complex128])
@pytest.mark.parametrize("place", ["top", "bottom"])
def test_ranks_at_both_ends_of_the_range(dtype, place):
    """Singular values beyond it, and entries below the smallest normal number."""
    tree = ModeTree.binary(4)
    x = zoo.model_of(tree, dtype=dtype).to_tensor().detach()
    info = torch.finfo(dtype)
    # complex numbers cannot be divided by numbers below the smallest normal one
    half = math.sqrt(0.5 * info.max if place == "top" else 0.5 * info.tiny)
    scaled = x / x.abs().max() * half * half
    assert hierarchical_rank(scaled, tree, rtol=1e-3) == hierarchical_rank(x, tree, rtol=1e-3)
    if place == "top":  # what is in between on the way to the dense tensor may leave the range
        scaled = scaled / 2**10
    found = decompose(scaled, tree, rtol=1e-3).to_tensor().detach()
    error, whole = (torch.linalg.vector_norm(t / half / half) for t in (found - scaled, scaled))
    assert error < 2e-3 * whole


def test_rank_does_not_depend_on_scale():
    for dtype, std in ((torch.float32, 1e-2), (torch.float32, 5.0), (torch.float64, 1e-3)):
        model = zoo.model_of(ModeTree.binary(64), sizes=8, bonds=4, std=std, dtype=dtype)
        found = hierarchical_rank(model, rtol=1e-9 if dtype == torch.float64 else 1e-5)
        assert set(found.values()) == {4}
    huge = Factorization(ModeTree.binary(256), 8, 16, join="full", std=1.0)
    assert torch.isinf(spectra(huge)[0][0])


def test_wide_star_spectra():
    """Two components that shrink and grow in turn: scales differ by more than the range of a double."""
    model = Factorization(ModeTree.star(256), 2, 2, root="ones", dtype=torch.float64)
    grow = torch.tensor([10.0, 0.1], dtype=torch.float64)
    model.load_weights({n: torch.diag(grow if n < 128 else 1 / grow) for n in range(256)})
    assert model.norm().item() == pytest.approx(math.sqrt(2))
    assert spectra(model)[7].tolist() == pytest.approx([1.0, 1.0])


def test_numpy_goes_in():
    array = np.random.default_rng(0).standard_normal((3, 4, 5))
    tree = ModeTree.star(3)
    for other in (array[::-1], array.astype(">f8"), np.asfortranarray(array), array.tolist()):
        assert hierarchical_rank(other, tree) == {0: 3, 1: 4, 2: 5}
    assert matricize(array, np.int64(1)).shape == (4, 15)
    with pytest.raises(DataError, match="not a tensor of numbers: str"):
        spectra("il2", tree)
    with pytest.raises(OptionError, match="write a ModeTree"):
        spectra(array, [0, 1, 2])


def test_default_threshold():
    """What counts by default depends on the dtype, hardly on the size, and never fails."""
    matrix, tree = torch.zeros(2, 10**6), ModeTree([0, 1])
    matrix[0, ::2], matrix[1, 1::2] = 1, 0.1
    for x in (matrix, matrix.to(torch.complex64), matrix.to(torch.bfloat16), matrix.double()):
        assert hierarchical_rank(x, tree) == {0: 2, 1: 2}
        assert decompose(x, tree, leaves="weights").network.bonds[:2] == (2, 2)
    binary = ModeTree.binary(3)
    weights = {n: torch.linalg.qr(zoo.randn(16, 2, seed=n))[0] for n in binary.leaves}
    weights |= {(0, 1): torch.eye(2), binary.root: torch.tensor([1, 0.5])}
    for dtype in (torch.float64, torch.float32, torch.complex64, torch.float16, torch.bfloat16):
        rounded = {node: weight.to(dtype) for node, weight in weights.items()}
        model = Factorization.from_weights(binary, rounded, join="diagonal")
        x = model.to_tensor().detach()  # with entries rounded once more
        ranks = dict.fromkeys(binary.nodes[:-1], 2)
        assert hierarchical_rank(x, binary) == hierarchical_rank(model) == ranks
        assert set(decompose(x, binary, leaves="weights").network.bonds[:-1]) == {2}
        assert set(truncate(model, leaves="weights").network.bonds[:-1]) == {2}
    assert rounding_rtol(10**12, torch.float8_e5m2, torch.float64) <= 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_differentiates(dtype):
    tree = ModeTree([[0, 1], 2])
    x = zoo.randn(4, 5, 6).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    for part in (x, wide):
        values = spectra(part, tree)
        sum(s.sum() + effective_rank(s) + entanglement_entropy(s) for s in values.values()).backward()
    assert x.grad.dtype == dtype and values[0].dtype == torch.float64
    assert torch.allclose(x.grad.double(), wide.grad, rtol=0.1, atol=0.1)
    model = zoo.model_of(tree, dtype=dtype)
    for penalty in (LocalComponentPenalty(), EffectiveRankPenalty()):
        (penalty(model) + model.norm()).backward()
    assert all(g.isfinite().all() and g.any() for g in model.gradients.values())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bool], ids=str)
def test_dtypes_that_cannot_be_computed_with(dtype):
    for function in (spectra, hierarchical_rank, decompose):
        with pytest.raises(DataError, match="has dtype torch.* need real or complex numbers"):
            function(torch.ones(2, 2).to(dtype), ModeTree([0, 1]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("join", ["diagonal", "full"])
def test_broken_weights_are_noticed(bad, join):
    """NaN in, NaN or one clear error out."""
    model = zoo.model_of(ModeTree([[0, 1], 2]), join)
    with torch.no_grad():
        model.weights[1].view(-1)[1] = bad
    for function in (spectra, hierarchical_rank, truncate, EffectiveRankPenalty()):
        with pytest.raises(DataError, match="weights of 1 nodes are NaN or infinite, first 1"):
            function(model)
    assert not distance_bound(model, 0).isfinite()
    if join == "diagonal":
        norms = model.local_components()[0, 1], model.unbalancedness(), LocalComponentPenalty()(model)
        assert not any(bool(x.isfinite().all()) for x in (*norms, keep_components(model, 0).to_tensor()))
        with pytest.raises(DataError, match="weight of node 1 has NaN or infinite"):
            drop_components(model, 1)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1e30), (torch.float64, 1e200)])
def test_components_of_unbalanced_weights(dtype, unit):
    """Norms whose product is in range, but not that of the first two, and not their squares."""
    model = zoo.model_of(ModeTree.star(3), dtype=dtype, root="ones")
    wanted = model.local_components()[0, 1, 2] * unit
    with torch.no_grad():
        for mode, power in enumerate((1, 1, -1)):
            model.weights[mode].mul_(unit**power)
    assert torch.allclose(model.local_components()[0, 1, 2], wanted, rtol=1e-5)
    assert model.unbalancedness() == math.inf and LocalComponentPenalty()(model).isfinite()
    with torch.no_grad():
        for weight in model.weights.values():
            weight.fill_(unit)
            weight[1:] = 0
    assert model.unbalancedness() == 0


@pytest.mark.parametrize(
    ("dtype", "power"),
    [(torch.float32, 30), (torch.complex64, 30), (torch.float64, 150), (torch.complex128, 150)],
)
def test_ratios_do_not_depend_on_the_unit(dtype, power):
    tree = ModeTree([[0, 2], [1, 3]])

    def ratios(x):
        norm, values = float(spectra(x, tree)[0].double().norm()), spectra(x, tree)
        found = [decompose(x, tree, rtol=rtol) for rtol in (None, 0.1, 0.3)]
        yield [hierarchical_rank(x, tree), *(model.network.bonds for model in found)]
        yield torch.stack([f(s) for f in (effective_rank, entanglement_entropy) for s in values.values()])
        yield torch.cat([s / norm for s in values.values()])
        yield torch.tensor([model.error_bound / norm for model in found])

    def ratios_of(model):
        kept, dropped = keep_components(model, 2), drop_components(model, below=0.5)
        yield [hierarchical_rank(model), truncate(model, rtol=0.3).network, dropped.network]
        yield (kept.log_norm() - model.log_norm()).exp()
        yield torch.cat([s / s.max() for s in model.local_components().values()])

    plain, model = zoo.randn(4, 3, 5, 3, dtype=dtype), zoo.model_of(tree, dtype=dtype)
    expected, expected_of = list(ratios(plain)), list(ratios_of(model))
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-9)
    for unit in (10.0**power, 10.0**-power):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled.weights[0].mul_(unit)
        for found, wanted in ((ratios(plain * unit), expected), (ratios_of(scaled), expected_of)):
            ranks, *others = found
            assert ranks == wanted[0]
            for a, b in zip(others, wanted[1:], strict=True):
                close(a, b)


@pytest.mark.parametrize(
    "view", [torch.conj, lambda x: x.mH, lambda x: x.conj().imag], ids=["conj", "mH", "neg"]
)
def test_lazy_views_are_read(view):
    """Tensors that are conjugated or negated only once they are read."""
    tree, x = ModeTree([0, [1, 2]]), view(zoo.randn(4, 3, 3, dtype=torch.complex128))
    plain = torch.from_numpy(x.resolve_conj().resolve_neg().numpy().copy())
    assert x.is_conj() or x.is_neg()
    found, expected = spectra(x, tree), spectra(plain, tree)
    assert all(torch.equal(s, expected[node]) for node, s in found.items())
    assert hierarchical_rank(x, tree) == hierarchical_rank(plain, tree)
    model = decompose(x, tree, rtol=1e-12)
    assert distance(x, model)[0] < 1e-10
    lazy = Factorization.viewing(model.network, [stack.detach().conj() for stack in model.stacks])
    assert distance(x.conj(), lazy)[0] < 1e-10
    lazy = zoo.model_of(tree, dtype=torch.complex128)
    norms = lazy.local_components()
    lazy = Factorization.viewing(lazy.network, [stack.detach().conj() for stack in lazy.stacks])
    assert torch.equal(lazy.local_components()[1, 2], norms[1, 2])


def test_wide_factored_spectra_are_not_expanded():
    """Width 512 at every bond, as in the published experiment."""
    model = zoo.model_of(ModeTree.binary(4), sizes=8, bonds=512, std=0.05)
    dense = spectra(model.to_tensor().detach(), model.tree)
    for v, s in spectra(model).items():
        assert torch.allclose(s, dense[v][: len(s)], rtol=0, atol=1e-11 * s[0].item())


def test_factored_spectra_of_extreme_order():
    long = zoo.model_of(ModeTree.binary(512), "full", sizes=2, bonds=2, std=1.0)
    halves = long.tree.children(long.tree.root)
    s = spectra(long)
    norm = long.norm().item()
    for node in (halves[0], 5):  # in units of the norm, whose square leaves the range
        assert torch.linalg.vector_norm(s[node] / norm).item() == pytest.approx(1)
    assert hierarchical_rank(long)[halves[0]] == 2
