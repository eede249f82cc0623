"""No ratio and no rank depends on the unit that the data or the function are given in."""

import pytest
import torch
from zoo import model_of, randn, random

import tnreg
from tnreg import ModeTree, algebra
from tnreg.factorizations.components import keep_components
from tnreg.ranks.decompose import distance

TREE = ModeTree([[0, 2], [1, 3]])
SIZES = (3, 4, 5, 2)
BOXES = ((0, 0, 2, 2), (2, 2, 4, 4))
UNITS = [
    (torch.float32, -30), (torch.float32, -20), (torch.float32, 30),
    (torch.float64, -150), (torch.float64, -6), (torch.float64, 150),
    (torch.complex64, -30), (torch.complex128, 150),
]  # fmt: skip
MARGIN = {torch.float32: 2e-5, torch.complex64: 2e-5, torch.float64: 1e-11, torch.complex128: 1e-11}


def data(dtype):
    """A tensor of ranks 2 with some noise of 1e-3, which the tolerances below cut off."""
    exact = model_of(TREE, "full", sizes=SIZES, bonds=2, std=0.8, dtype=dtype).to_tensor().detach()
    noise = torch.randn(SIZES, dtype=dtype, generator=random(1))
    return exact / exact.abs().max() + 1e-3 * noise


def model(dtype, join="diagonal"):
    return model_of(TREE, join, sizes=SIZES, bonds=3, std=0.8, dtype=dtype, seed=2)


def vector(values):
    parts = values.values() if isinstance(values, dict) else values
    return torch.stack([torch.as_tensor(part).detach().abs().double().sum() for part in parts])


def of_a_tensor(x):
    """Ratios and ranks of a dense tensor."""
    whole, cut = tnreg.decompose(x, TREE), tnreg.decompose(x, TREE, rtol=0.05)
    error, norm = distance(x, cut)
    spectra = tnreg.spectra(x, TREE)
    yield "hierarchical_rank", vector(tnreg.hierarchical_rank(x, TREE))
    yield "hierarchical_rank, rtol", vector(tnreg.hierarchical_rank(x, TREE, rtol=0.05))
    yield "effective_rank", vector(map(tnreg.effective_rank, spectra.values()))
    yield "entanglement_entropy", vector(map(tnreg.entanglement_entropy, spectra.values()))
    yield "singular values", vector(s / s[0] for s in spectra.values())
    yield "ranks of decompose", vector([*whole.network.bonds, *cut.network.bonds])
    yield "error of decompose", vector([error / norm])
    yield "error_bound", vector([cut.error_bound / norm])
    for task in (tnreg.completion(x, 60), tnreg.sensing(x, 40)):
        for other in (cut, algebra.scale(whole, 0.5), algebra.scale(whole, 0)):
            yield "errors of a task", vector([task.train_error(other), task.test_error(other)])


def of_a_model(m, join):
    """Ratios and ranks of a factorization."""
    cut, spectra = tnreg.truncate(m, rtol=0.05), tnreg.spectra(m)
    yield "hierarchical_rank", vector(tnreg.hierarchical_rank(m))
    yield "effective_rank", vector(map(tnreg.effective_rank, spectra.values()))
    yield "entanglement_entropy", vector(map(tnreg.entanglement_entropy, spectra.values()))
    yield "ranks of truncate", vector(cut.network.bonds)
    yield "error_bound of truncate", vector([cut.error_bound / m.norm()])
    other = algebra.linear_combination([m, tnreg.truncate(m, ranks=1)], [1, -0.5], rtol=1e-3)
    yield "ratio of norms", (other.log_norm() - m.log_norm()).exp()
    yield "EffectiveRankPenalty", tnreg.EffectiveRankPenalty()(m)
    if join == "diagonal":
        norms = m.local_components()
        yield "local components", vector(s / s.max() for s in norms.values())
        kept = keep_components(m, {v: 1 for v in m.tree.interior})
        yield "balance_", (tnreg.balance_(algebra.scale(m, 1)).log_norm() - m.log_norm()).exp()
        yield "keep_components", (kept.log_norm() - m.log_norm()).exp()


def of_a_function(scale, dtype):
    """Shares and ranks of a network whose output is multiplied."""
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
    )
    with torch.no_grad():
        for parameter in net.to(dtype).parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=random(parameter.numel())))
    conv = tnreg.ConvNet(ModeTree.grid((4, 4)), 1, 3, outputs=2, std=0.8, dtype=dtype, generator=random(3))
    images = torch.randn(12, 1, 4, 4, dtype=dtype, generator=random(4))
    classes = torch.arange(12) % 2
    points = randn(6, 1, dtype=dtype, seed=5)
    yield (
        "grid_tensor",
        vector(
            tnreg.hierarchical_rank(
                tnreg.grid_tensor(lambda x: scale * x.sum(1).prod(1), points, ModeTree.star(2)),
                ModeTree.star(2),
            ).values()
        ),
    )
    for f in (net, conv):
        out = lambda z, f=f: scale * f(z)  # noqa: E731
        yield "InteractionEnergy", tnreg.InteractionEnergy(BOXES)(out, images, classes).detach()
        yield "InteractionEnergy, eps=0", tnreg.InteractionEnergy(BOXES, eps=0)(out, images, classes).detach()
        yield "InputGradientChange", tnreg.InputGradientChange(BOXES)(out, images, classes).detach()
        found = tnreg.locality_profile(out, images, size=1, distances=[0, 1], samples=3, pairs=3)
        yield (
            "locality_profile",
            vector(torch.as_tensor(part) for part in (found.interaction, found.effective_rank)),
        )
    f = lambda a, b: scale * (a * b + a.sin() * b.cos())[:, 0]  # noqa: E731
    s = tnreg.separation_spectrum(f, points, points)
    yield "separation_spectrum", vector([tnreg.effective_rank(s), (s / s[0]).sum()])


def assert_unchanged(kind, found, wanted, margin):
    for (name, here), (_, right) in zip(found, wanted, strict=True):
        off = (here - right).abs() / right.abs().clamp_min(1)
        assert bool((off < margin).all()), f"{kind} {name}: {here} where {right} is right"


@pytest.mark.parametrize(("dtype", "power"), UNITS, ids=str)
def test_of_a_tensor(dtype, power):
    x = data(dtype)
    assert_unchanged("tensor", of_a_tensor(10.0**power * x), of_a_tensor(x), MARGIN[dtype])


@pytest.mark.parametrize("join", ["diagonal", "full"])
@pytest.mark.parametrize(("dtype", "power"), UNITS, ids=str)
def test_of_a_model(dtype, power, join):
    m = model(dtype, join)
    assert_unchanged(
        "model", of_a_model(algebra.scale(m, 10.0**power), join), of_a_model(m, join), MARGIN[dtype]
    )


@pytest.mark.parametrize(("dtype", "power"), [u for u in UNITS if not u[0].is_complex], ids=str)
def test_of_a_function(dtype, power):
    assert_unchanged("function", of_a_function(10.0**power, dtype), of_a_function(1.0, dtype), MARGIN[dtype])
