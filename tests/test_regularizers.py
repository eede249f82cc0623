"""Regularizers: values and gradients against plain loops, closed forms, and what must not change."""

import copy
import dataclasses
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import randn, random

from tnreg import InputGradientChange, InteractionEnergy, InteractionRank, effective_rank
from tnreg.errors import DataError, OptionError, ShapeError
from tnreg.far import input_gradient as second_order
from tnreg.far.input_gradient import input_gradient
from tnreg.far.interaction import crossed_values, interaction_energy, interaction_rank
from tnreg.far.modes import evaluation
from tnreg.far.patches import DifferingPatches, FixedPatches, PresetPatches, RandomPatches

PAIR = ((0, 0, 3, 3), (4, 5, 7, 8))


class Rank(InteractionRank):
    """The term at every step, of weight one."""

    def __init__(self, patches, samples=8, *, weight=1.0, start=0, until=None, target=None, **options):
        super().__init__(patches, samples, weight=weight, start=start, until=until, target=target, **options)


KINDS = (InputGradientChange, InteractionEnergy, Rank)


class Residual(nn.Module):
    """Two convolutions beside a short cut, with ReLUs in place as torchvision writes them."""

    def __init__(self, width, norm):
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.n, self.m = (nn.BatchNorm2d(width) if norm else nn.Identity() for _ in range(2))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.m(self.b(self.relu(self.n(self.a(x)))))
        out += x
        return self.relu(out)


def network(smooth=False, classes=1, norm=False, seed=0, dropout=False):
    """Strides, groups, dilation, pooling and a residual block; running statistics that say something."""
    torch.manual_seed(seed)
    act = nn.GELU() if smooth else nn.ReLU()
    first = nn.Conv2d(2, 6, 3, stride=2, padding=1)
    layers = [first, nn.BatchNorm2d(6) if norm else nn.Identity(), act]
    layers += [nn.Dropout(0.5)] * dropout
    layers += [] if smooth else [Residual(6, norm)]
    layers += [nn.Conv2d(6, 6, 3, padding="same", groups=2), act, nn.MaxPool2d(2, 1)]
    layers += [nn.Conv2d(6, 4, 2, dilation=2, padding=1, bias=False), act, nn.AdaptiveAvgPool2d(1)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, classes)).double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.5, 0.5), m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.uniform_(m.bias, -0.5, 0.5)
    return net


def batch(count=5, seed=1, classes=3, shape=(2, 8, 9)):
    return randn(count, *shape, seed=seed), torch.randint(classes, (count,), generator=random(seed + 1))


def swapped(image, other, box):
    """The image with the pixels of the other one in a box."""
    image, (top, left, bottom, right) = image.clone(), box
    image[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return image


def plain_change(net, x, y, pair):
    """The definition, one sample at a time, with torch's own derivatives."""
    inside, cosines = pair[0], []
    for i in range(len(x)):
        gradients = []
        for image in (x[i].clone(), swapped(x[i], x[(i + 1) % len(x)], pair[1])):
            image.requires_grad_()
            out = net(image[None]).flatten()
            out = out[0] if len(out) == 1 else out[y[i]]
            (g,) = torch.autograd.grad(out, image, create_graph=True)
            gradients.append(g[..., inside[0] : inside[2], inside[1] : inside[3]].flatten())
        g, h = gradients
        cosines.append(torch.dot(g, h).abs() / (g.norm() * h.norm()))
    return torch.stack(cosines).mean()


def plain_energy(net, x, y, box):
    """The definition with k = B, one image at a time."""
    rows = [net(swapped(a, b, box)[None])[0] for a, b in itertools.product(x, x)]
    k, above, below = len(x), 0, 0
    values = torch.stack(rows).reshape(k, k, -1)
    for c in [0] if values.shape[-1] == 1 else y:
        m = values[..., c]
        for i, j in itertools.product(range(k), range(k)):
            above = above + (m[i, j] - m[i].mean() - m[:, j].mean() + m.mean()) ** 2
        below = below + ((m - m.mean()) ** 2).sum()
    return 1 - above / below


def plain_rank(net, x, y, box, floor=1e-3):
    """The definition with k = B by the eigenvalues of S, one image at a time."""
    k, shares, below = len(x), 0, 0
    values = torch.stack([net(swapped(a, b, box)[None])[0] for a, b in itertools.product(x, x)])
    values = values.reshape(k, k, -1)
    for c in [0] if values.shape[-1] == 1 else y:
        m = values[..., c]
        parts = [[m[i, j] - m[i].mean() - m[:, j].mean() + m.mean() for j in range(k)] for i in range(k)]
        parts = torch.stack([torch.stack(row) for row in parts])
        shares, below = shares + parts @ parts.T, below + ((m - m.mean()) ** 2).sum()
    directions = torch.linalg.eigvalsh(shares / below)[1:]  # the smallest is zero: columns of M° add to it
    none, most = (torch.tensor(n, dtype=torch.float64).log() for n in (floor, 1 + floor))
    return (most - ((k - 1) * directions + floor).log().mean()) / (most - none)


def gradients_of(value, net):
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    parts = torch.autograd.grad(value, list(net.parameters()), **options)
    return torch.cat([part.flatten() for part in parts])


def assert_same(net, value, expected):
    """The same value and the same gradients, of which some are not zero."""
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    g, h = gradients_of(value, net), gradients_of(expected, net)
    assert h.any() and torch.allclose(g, h, rtol=1e-8, atol=1e-11)


# penalties as their definitions say, beside these
DEFINITIONS = [
    (InputGradientChange(PAIR), lambda net, x, y: plain_change(net, x, y, PAIR)),
    (InteractionEnergy(PAIR, samples=9, eps=0), lambda net, x, y: plain_energy(net, x, y, PAIR[1])),
    (Rank(PAIR, samples=9), lambda net, x, y: plain_rank(net, x, y, PAIR[1])),
]


@pytest.mark.parametrize(("penalty", "definition"), DEFINITIONS, ids=["change", "energy", "rank"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("smooth", [False, True])
def test_penalties_are_their_definition(penalty, definition, smooth, classes, norm):
    net, (x, y) = network(smooth, classes, norm).train(), batch()
    value = penalty(net, x, y if classes > 1 else None)
    expected = definition(net.eval(), x, y)
    assert 0 < expected < 0.999  # else nothing is tested
    assert gradients_of(definition(net, x, y), net).abs().max() > 1e-3
    assert_same(net, value, expected)


cheap_gradient = partial(input_gradient, differentiable=True)


def plain_gradient(value, x):
    """By torch's own derivatives."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(value(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("smooth", [False, True])
def test_cheap_second_derivatives_are_exact(smooth):
    """Against torch's own, through the whole network: a function of the gradient and of the value."""
    net, (x, _) = network(smooth, norm=True).eval(), batch()

    def loss(gradient):
        values = []
        g = gradient(lambda z: values.append(net(z)[:, 0]) or values[0], x)
        return (g**3).sum() + values[0].exp().sum()

    assert_same(net, loss(cheap_gradient), loss(plain_gradient))


def test_cheap_second_derivatives_have_no_link_to_activations():
    """What makes them cheap: no zeros are carried back through the network."""
    net, (x, _) = network(norm=True).eval(), batch()
    visited = []
    for layer in (net[0], net[3].a):
        layer.register_forward_hook(lambda *call: call[2].register_hook(visited.append) and None)
    g = cheap_gradient(net, x)
    first = len(visited)
    assert first >= 2
    (g**2).sum().backward()
    assert len(visited) == first


def test_operations_outside_the_list_are_torchs_own():
    torch.manual_seed(0)
    norm, pool = nn.BatchNorm1d(3, track_running_stats=False), nn.MaxPool2d((2, 3), 1)
    pool.return_indices = True
    net = nn.ModuleList([nn.Conv1d(4, 3, 3, padding="same"), norm, pool, nn.Linear(21, 1)]).double()

    def values(x):
        x = norm(net[0](x.flatten(1, 2))).relu_()
        return net[3](pool(torch.tanh(x[:, None]))[0].flatten(1)[:, :21])

    x, _ = batch(shape=(2, 2, 20))
    assert_same(net, *(g(values, x).pow(3).sum() for g in (cheap_gradient, plain_gradient)))


@pytest.mark.parametrize(("penalty", "definition"), DEFINITIONS, ids=["change", "energy", "rank"])
def test_transformers(penalty, definition):
    """Fused attention has no second derivative; the penalty must not need it."""

    class Transformer(nn.TransformerEncoderLayer):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).mean(1)

    torch.manual_seed(0)
    layer = Transformer(8, 2, 8, activation="gelu", batch_first=True)
    net = nn.Sequential(nn.Conv2d(2, 8, 4, 4), nn.Flatten(2), layer, nn.Linear(8, 1)).double()
    x, y = batch()
    value = penalty(net, x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_same(net, value, definition(net.eval(), x, y))


class Split(nn.Module):
    """g and h, functions of the pixels in a box and of the rest, put together by ``join``."""

    def __init__(self, box, join):
        super().__init__()
        torch.manual_seed(3)
        top, left, bottom, right = box
        self.mask, self.join = torch.zeros(8, 9, dtype=torch.float64), join
        self.mask[top:bottom, left:right] = 1
        self.g, self.h = (nn.Sequential(linear(7), nn.Tanh(), nn.Linear(7, 1)) for _ in range(2))
        self.double()

    def forward(self, x):
        return self.join(self.g(x * self.mask), self.h(x * (1 - self.mask)))


def tangents(classes=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.Tanh(), nn.Linear(5, classes)).double()


def linear(classes=1):
    return nn.Sequential(nn.Flatten(), nn.Linear(144, classes)).double()


@pytest.mark.parametrize(("kind", "net"), [
    (InputGradientChange, Split(PAIR[0], torch.mul)), (InputGradientChange, Split(PAIR[0], torch.add)),
    (InputGradientChange, linear()), (InteractionEnergy, Split(PAIR[1], torch.add)),
    (InteractionEnergy, linear()), (InteractionEnergy, linear(3)),
    (Rank, Split(PAIR[1], torch.add)), (Rank, linear()), (Rank, linear(3)),
])  # fmt: skip
def test_functions_without_interaction_give_one(kind, net):
    """The gradient change of separable and additive ones, energy and rank of additive ones."""
    value = kind(PAIR)(net, *batch())
    assert value.item() == pytest.approx(1, abs=1e-12)
    assert gradients_of(value, net).abs().max() < 1e-8


def test_energy_of_a_product_and_of_a_constant():
    """g(a) h(b): interaction is the product of the variances, the rest what the means let through."""
    net, (x, _) = Split(PAIR[1], torch.mul), batch()
    g, h = net.g(x * net.mask)[:, 0], net.h(x * (1 - net.mask))[:, 0]
    vg, vh = g.var(unbiased=False), h.var(unbiased=False)
    expected = 1 - vg * vh / (vg * vh + vg * h.mean() ** 2 + vh * g.mean() ** 2)
    assert InteractionEnergy(PAIR, eps=0)(net, x).item() == pytest.approx(expected.item(), rel=1e-9)
    for constant in (0.0, 1.0, 1e6):  # the energy of a constant is one whatever its size
        noise = 1e-8 * randn(8, 8, dtype=torch.float32)
        values = (constant * (1 + noise)).requires_grad_()
        energy = interaction_energy(values)
        energy.backward()
        assert energy.item() == pytest.approx(1, abs=0.2 if constant else 0)
        assert values.grad.isfinite().all()
    assert interaction_energy(torch.full((4, 4), 3.0)).item() == 1


def test_rank_of_a_product_and_of_all_directions():
    """One direction of a known share; all of them, equal, which explain everything; in any order."""
    net, (x, _) = Split(PAIR[1], torch.mul), batch()
    energy, penalty = InteractionEnergy(PAIR)(net, x), Rank(PAIR, floor=0.01)
    directions = torch.tensor([4 * (1 - energy.item()), 0, 0, 0], dtype=torch.float64) + 0.01
    expected = 1 - (directions.log().mean() - torch.tensor(0.01).log()) / torch.tensor(101.0).log()
    assert penalty(net, x).item() == pytest.approx(expected.item(), rel=1e-6)
    assert penalty.last_effective_rank == pytest.approx(1)
    for order in (torch.randperm(6, generator=random(0)), torch.arange(6)):
        every = torch.eye(6, dtype=torch.float64)[order]
        assert interaction_rank(1e200 * every + 7e199).item() == pytest.approx(0, abs=1e-12)
        assert interaction_rank(every[:, :3]).item() < 0.1 < interaction_rank(torch.ones(6, 6).tril()).item()
    values = randn(4, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(interaction_rank, values)
    flat = torch.full((4, 5), 3.0, requires_grad=True)
    value = interaction_rank(flat)
    value.backward()
    assert value == 1 and not flat.grad.any()


@pytest.mark.parametrize("kind", [InteractionEnergy, Rank])
@pytest.mark.parametrize("classes", [1, 3])
def test_columns_are_samples_that_differ_in_the_patch(kind, classes):
    """Three contents of J in nine samples: nine images are evaluated, of any three that have them."""
    net, (x, y) = Counted(network(norm=True, classes=classes)), batch(9)
    inside = torch.zeros(8, 9, dtype=torch.bool)
    top, left, bottom, right = PAIR[1]
    inside[top:bottom, left:right] = True
    x[3:6] = torch.where(inside, x[0], x[3:6])
    x[6:] = torch.where(inside, x[1], x[6:])
    x[2] = torch.where(inside, x[0], x[2])
    penalty = kind(PAIR, samples=4)
    drawn = penalty.draw(net, x)
    found = penalty.value(net, x, y, drawn)
    assert len(drawn.samples) == 4 and len(drawn.columns) == 2 and net.images == [8]
    others = dataclasses.replace(drawn, columns=torch.tensor([6, 4]))
    assert_same(net, found, penalty.value(net, x, y, others))
    # where nobody looks, repetitions of the first column do not count
    repeated = dataclasses.replace(drawn, columns=drawn.columns[[0, 1, 0, 0]])
    assert_same(net, found, penalty.value(net, x, y, repeated))
    assert penalty.last_effective_rank == effective_rank(torch.ones(1)) or classes == 3
    alone = dataclasses.replace(drawn, columns=drawn.columns[:1].expand(4))
    assert penalty.value(net, x, y, alone) == 1
    net.images.clear()
    same = kind(((4, 5, 7, 8), (0, 0, 3, 3)), weight=0.5)(net, x[:1].expand(4, 2, 8, 9), y[:4])
    assert same == 0.5 and not same.requires_grad and net.images == []


def test_rank_only_where_energy_is_above_the_target():
    net, (x, _) = network(), batch()
    energy, whole = InteractionEnergy(PAIR)(net, x).item(), Rank(PAIR)(net, x)
    assert_same(net, Rank(PAIR, weight=2.0, target=energy - 1e-6)(net, x), 2 * whole)
    penalty = Rank(PAIR, target=energy + 1e-6)
    none = penalty(net, x)
    assert none == 0 and not gradients_of(none, net).any() and penalty.last_value == whole
    default = InteractionRank(PAIR)
    weights = [default.next_weight() for _ in range(600)]
    assert weights == [0.0] * 200 + [0.2] * 300 + [0.0] * 100
    assert "start" not in repr(default)


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_patches_give_one_without_nan(kind):
    """A network that never sees the patches, one that is constant, and one that is dead."""
    sees, dead = (nn.Sequential(nn.Conv2d(2, 3, n), nn.ReLU()).double() for n in (2, 8))
    constant = nn.Linear(1, 1).double()
    nn.init.constant_(dead[0].bias, -1e6), nn.init.constant_(constant.bias, 2)
    for net, module in (
        (lambda z: sees(z)[:, :, 3, 3].sum(1), sees),
        (lambda z: dead(z).sum((1, 2, 3)), dead),
        (lambda z: constant.bias.expand(len(z)), constant),
        (lambda z: torch.ones(len(z), dtype=z.dtype), nn.Identity()),
    ):
        value = kind(((0, 0, 2, 2), (6, 0, 8, 2)))(net, batch()[0])
        assert value.item() == 1
        assert not value.requires_grad or gradients_of(value, module).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "power"), [(torch.float32, 30), (torch.float64, 150)])
def test_no_unit_matters(kind, dtype, power):
    """Neither that of the network's values nor that of the images, for value and gradients."""
    net, x = tangents().to(dtype), batch()[0].to(dtype)
    expected = kind(PAIR)(net, x)
    wanted = gradients_of(expected, net)
    for unit in (10.0**power, 10.0**-power):
        for f, images in ((lambda z: net(z) * unit, x), (lambda z: net(z / unit), x * unit)):  # noqa: B023
            found = kind(PAIR)(f, images)
            assert found.item() == pytest.approx(expected.item(), rel=1e-4)
            assert torch.allclose(gradients_of(found, net), wanted, rtol=1e-2, atol=1e-5)


def test_eps_is_in_units_of_the_network():
    values = randn(4, 4).requires_grad_()
    whole = (values - values.mean()).square().mean()
    share = 1 - interaction_energy(values)
    for unit in (1.0, 1e-3, 1e100):
        found = interaction_energy(unit * values, eps=1e-6)
        expected = share * whole / (whole + 1e-6 / unit**2)
        assert torch.allclose(1 - found, expected, rtol=1e-9, atol=1e-14)
    zero = torch.zeros(4, 4, requires_grad=True)
    energy = interaction_energy(zero)
    energy.backward()
    assert energy == 1 and not zero.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_hidden(kind):
    """Also where gradients know nothing of it, and where a swap changes nothing."""
    x, _ = batch()
    broken, same = x.clone(), torch.ones_like(x)
    broken[2, 0, 0, 8] = torch.nan
    net = linear()
    assert kind(PAIR)(net, broken).isnan()
    assert kind(PAIR)(net, same) == 1 and not kind(PAIR)(net, x).isnan()
    net[1].bias.data.fill_(torch.nan)
    assert kind(PAIR)(net, x).isnan() and kind(PAIR)(net, same).isnan()


class Checkpointed(nn.Module):
    """A block that may be run again in the backward pass; it counts how often it runs."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.reentrant, self.runs = nn.Conv2d(2, 4, 3), nn.Linear(168, 1), reentrant, 0
        self.norm, self.dropout = nn.BatchNorm2d(4), nn.Dropout(0.5)

    def block(self, x):
        self.runs += 1
        return torch.tanh(nn.functional.dropout(self.dropout(self.norm(x)), training=self.training))

    def forward(self, x):
        x = self.first(x)
        if self.reentrant is None:
            x = self.block(x)
        else:
            x = checkpoint(lambda z: self.block(z), x, use_reentrant=self.reentrant)
        return self.last(x.flatten(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("reentrant", "statistics"), [(True, "frozen"), (False, "frozen"), (False, "batch")])
def test_what_is_checkpointed_runs_again_in_the_same_modes(kind, reentrant, statistics):
    (x, _), found, penalty = batch(), [], kind(PAIR, statistics=statistics)
    for mode in (None, reentrant):
        net = Checkpointed(mode).double()
        value = penalty(net, x)
        value.backward()
        gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        found.append([value, *net.buffers(), *gradients])
        assert all(m.training for m in net.modules())
        assert net.runs == (2 if mode is not None or kind is InputGradientChange else 1)
        penalty(lambda z: net(z), x).backward()  # noqa: B023
        assert all(
            map(torch.allclose, [p.grad / 2 for p in net.parameters() if p.grad is not None], gradients)
        )
    assert all(map(torch.allclose, *found))
    # a training pass is checkpointed as ever, and errors of a block are its own
    runs = net.runs
    net(x).sum().backward()
    assert net.runs == runs + 2
    net.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        penalty(net, x)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode(kind):
    """The same value, of images made there as well; networks made there cannot be differentiated."""
    net, (x, _) = network(norm=True), batch()
    expected = kind(PAIR)(net, x)
    with torch.inference_mode():
        assert torch.allclose(kind(PAIR)(net, x), expected)
        images, made = x.clone(), network(norm=True)
    assert_same(net, kind(PAIR)(net, images), expected)
    # energy is not differentiated under inference mode
    with (
        torch.inference_mode(kind is InputGradientChange),
        pytest.raises(DataError, match="made under torch"),
    ):
        kind(PAIR)(made, x)


class InPlace(nn.Module):
    def forward(self, x):
        x -= 0.5
        return x.div_(0.25)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [InPlace(), nn.ReLU(inplace=True)])
def test_networks_that_change_their_input(kind, first):
    rest, (x, _) = tangents(), batch()
    net, kept = nn.Sequential(first, rest), x.clone()
    plain = nn.Sequential(nn.ReLU() if isinstance(first, nn.ReLU) else Shifted(), rest)
    expected = kind(PAIR)(plain, x)
    assert_same(rest, kind(PAIR)(net, x), expected)
    for statistics in ("frozen", "batch"):
        logits, value = kind(PAIR, statistics=statistics).with_logits(net, x)
        assert torch.allclose(logits, plain(x)) and torch.allclose(value, expected)
    assert torch.equal(x, kept)


class Shifted(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25


class Named(nn.Module):
    """A network that gives a dictionary, with dropout."""

    def __init__(self):
        super().__init__()
        self.net = network(classes=3, norm=True, dropout=True)

    def forward(self, x):
        return {"logits": self.net(x), "other": None}


@pytest.mark.parametrize("kind", KINDS)
def test_functions_and_outputs(kind):
    """Modules that a function calls are switched too; ``output`` reads what a network gives."""
    net, (x, y) = Named().train(), batch()
    expected = kind(PAIR)(net.net, x, y)
    modules = {"net": net}
    for f in (lambda z: modules["net"](z)["logits"], lambda z: net(z)["logits"], net.net.forward):
        assert_same(net, kind(PAIR)(f, x, y), expected)
    read = kind(PAIR, output=lambda out: out["logits"])
    assert_same(net, read(net, x, y), expected)
    assert all(m.training for m in net.modules())
    out, value = kind(PAIR, output=lambda out: out["logits"], statistics="batch").with_logits(net, x, y)
    assert out["logits"].requires_grad and 0 < value < 1
    with pytest.raises(ShapeError, match="found dict; give output=, a function from that"):
        kind(PAIR)(net, x, y)
    with pytest.raises(OptionError, match="output must be a function"):
        kind(PAIR, output="logits")


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_classes(kind):
    net, (x, y) = tangents(3), batch()
    expected = kind(PAIR)(net, x, y)
    assert_same(net, kind(PAIR)(net, x, nn.functional.one_hot(y, 3).float()), expected)
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    expected = kind(PAIR)(lambda z: net(z) @ shares, x)
    assert_same(net, kind(PAIR)(net, x, shares.expand(5, 3)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_what_made_the_images(kind):
    net, (x, _) = tangents(), batch(3)

    def value(a, b):
        return kind(PAIR)(net, a * x + b * x**2)

    numbers = [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in (0.7, -0.2)]
    assert torch.autograd.gradcheck(value, numbers, atol=1e-7)
    assert min(g.abs() for g in torch.autograd.grad(value(*numbers), numbers)) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_images_and_labels(kind):
    net, (x, y) = tangents(3), batch()
    expected = kind(PAIR)(net, x, y)
    images = x.numpy()
    for array in (images[::-1, ::-1].copy()[::-1, ::-1], images.astype(">f8")):
        assert torch.equal(kind(PAIR)(net, array, y.numpy()[::-1].copy()[::-1]), expected)
    single = kind(PAIR)(net, images.astype("f4"), y)  # in the precision of the network
    assert single.dtype == x.dtype and torch.allclose(single, expected, rtol=1e-4)
    assert kind(PAIR, weight=0)(net, images, y) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_log_needs(kind):
    net, (x, _) = network(), batch()
    penalty = kind(RandomPatches(2, seed=3), weight=0.5, target=0.1)
    state = str(penalty.state_dict())
    assert penalty.last_value is None and penalty.last_pair is None
    pair = RandomPatches(2, seed=3).draw(x)
    found = penalty(net, x)
    assert torch.equal(penalty.last_pair, pair) and not penalty.last_value.requires_grad
    assert torch.allclose(found, 0.5 * (penalty.last_value - 0.1 * (kind is not Rank)))
    assert copy.deepcopy(penalty).last_value == penalty.last_value
    assert (
        penalty.state_dict().keys() == kind(PAIR).state_dict().keys() and str(penalty.state_dict()) != state
    )
    name = kind.__name__
    assert repr(penalty) == f"{name}(patches=RandomPatches(seed=3), weight=0.5, target=0.1)"
    if kind is not InputGradientChange:
        parts = penalty.last_values[..., 0]
        parts = parts - parts.mean(0) - parts.mean(1, keepdim=True) + parts.mean()
        assert torch.allclose(penalty.last_effective_rank, effective_rank(torch.linalg.svdvals(parts)))
        assert kind(PAIR).last_effective_rank is None
    assert repr(kind(PAIR)) == f"{name}(patches={PAIR})"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_nothing_of_the_network_changes(kind, statistics):
    net, (x, _) = network(norm=True, dropout=True).train(), batch()
    net[1].eval()
    before, modes = copy.deepcopy(net), [m.training for m in net.modules()]
    kind(PAIR, statistics=statistics)(net, x).backward()
    assert_equal_states(net, before)
    net[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kind(PAIR, statistics=statistics)(net, x)
    assert [m.training for m in net.modules()] == modes
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics(kind):
    """Frozen and batch differ, neither sees dropout, and batch is the network in training mode."""
    net, (x, _) = network(norm=True).train(), batch()
    frozen, own = (kind(PAIR, statistics=s)(net, x).item() for s in ("frozen", "batch"))
    assert own != pytest.approx(frozen, rel=1e-3)
    with_dropout = network(norm=True, dropout=True).train()
    assert kind(PAIR)(with_dropout, x).item() == frozen
    assert kind(PAIR, statistics="batch")(with_dropout, x).item() == own
    other = copy.deepcopy(net)
    with evaluation(other, "batch"):
        expected = other(x)
    assert torch.equal(expected, net.train()(x))


def assert_equal_states(net, other):
    for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def train(make_penalty, steps=6, resume_at=None, autocast=False):
    """An ordinary loop; at ``resume_at`` everything is saved, made anew and loaded."""

    def make():
        net = network(classes=3, norm=True, dropout=True).float().train()
        return net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), make_penalty()

    net, optimizer, penalty = make()
    torch.manual_seed(11)
    values = []
    for step in range(steps):
        if step == resume_at:
            saved = copy.deepcopy([thing.state_dict() for thing in (net, optimizer, penalty)])
            random = torch.random.get_rng_state()
            net, optimizer, penalty = make()
            for thing, state in zip((net, optimizer, penalty), saved, strict=True):
                thing.load_state_dict(state)
            torch.random.set_rng_state(random)
        optimizer.zero_grad()
        x, y = batch(8, seed=100 + step)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(net(x.float()), y)
            if penalty is not None:
                term = penalty(net, x.float(), y)
                values.append(term.item())
                loss = loss + term
        loss.backward()
        optimizer.step()
    return net, values


@pytest.mark.parametrize("kind", KINDS)
def test_weight_zero_is_no_regularizer_and_another_changes_training(kind):
    plain, _ = train(lambda: None)
    penalty = kind(RandomPatches(2), weight=0)
    before = penalty.state_dict()["patches"]["state"]
    net, values = train(lambda: penalty)
    assert_equal_states(net, plain)
    assert values == [0] * 6
    assert torch.equal(penalty.state_dict()["patches"]["state"], before)
    zero = penalty(lambda x: 1 / 0, batch()[0])  # the network is not run
    assert zero.item() == 0 and not zero.requires_grad
    # another weight changes training, and no other random number
    net, _ = train(lambda: kind(RandomPatches(2)))
    assert not torch.equal(net[0].weight, plain[0].weight)
    before = torch.get_rng_state()
    kind(DifferingPatches(2))(plain, batch()[0].float(), batch()[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_warmup_until_and_target(kind):
    net, (x, _) = network(), batch()
    whole = kind(PAIR)(net, x)
    full = whole.item()
    penalty = kind(PAIR, every=3, warmup=8, weight=2)
    for i in range(10):
        found, weight = penalty(net, x), 2 * min(1, (i + 1) / 8) if i % 3 == 0 else 0
        assert found.item() == pytest.approx(weight * full) and found.requires_grad == (weight > 0)
    short = kind(PAIR, every=2, until=4)
    assert [short(net, x).item() > 0 for _ in range(8)] == [True, False, True] + [False] * 5
    late = kind(PAIR, start=2, warmup=4, every=2, until=6, weight=4)
    assert [late.next_weight() for _ in range(8)] == [0, 0, 1, 0, 3, 0, 0, 0]

    if kind is Rank:  # whose target is of the energy
        return
    # what is above the target counts; below it there is no gradient
    none = kind(PAIR, target=full + 1e-6)(net, x)
    assert none.item() == 0 and not gradients_of(none, net).any()
    part = kind(PAIR, weight=2, target=full - 0.1)(net, x)
    assert part.item() == pytest.approx(0.2)
    assert torch.allclose(gradients_of(part, net), 2 * gradients_of(whole, net), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", [RandomPatches, DifferingPatches, PresetPatches, FixedPatches])
def test_a_resumed_training_is_the_same(kind, sampler):
    def make():
        patches = sampler(PAIR if sampler in (PresetPatches, FixedPatches) else 2)
        return kind(patches, every=2, weight=0.5)

    net, values = train(make, steps=7)
    again, resumed = train(make, steps=7, resume_at=3)
    assert values == resumed and len({v for v in values if v}) == 4
    assert_equal_states(net, again)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision(kind):
    net, (x, y) = network(classes=3, norm=True).float(), batch()
    x = 5 * x.float()  # bfloat16 has three digits: the function must vary by more
    expected = kind(PAIR)(net, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = kind(PAIR)(net, x, y)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), abs=0.03)
    g, h = gradients_of(found, net), gradients_of(expected, net)
    assert torch.cosine_similarity(g, h, dim=0) > 0.9
    trained, values = train(lambda: kind(RandomPatches(2)), autocast=True)
    assert len(values) == 6 and all(0 <= v <= 1 for v in values)
    assert all(p.isfinite().all() for p in trained.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_shape_b_are_the_same_and_without_gradients_only_the_value(kind):
    net, (x, _) = network(), batch()
    expected = kind(PAIR)(net, x)
    assert torch.equal(kind(PAIR)(lambda z: net(z)[:, 0], x), expected)
    with torch.no_grad():
        found = kind(PAIR)(net, x)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12) and not found.requires_grad
    leaf = x.clone().requires_grad_()
    net(leaf).sum().backward()
    assert leaf.grad is not None  # frozen or not, the input of the caller is left as it is


@pytest.mark.slow
def test_compiled_networks_and_the_energy_as_a_whole():
    net, (x, _) = network(norm=True).train(), batch()
    compiled = torch.compile(net, backend="aot_eager")
    for kind in KINDS:
        for f in (compiled, lambda z: compiled(z)):
            assert_same(net, kind(PAIR)(f, x), kind(PAIR)(net, x))
        assert compiled.training and net.training
    net.eval()

    def energy(x):
        return interaction_energy(crossed_values(net, x, x, torch.tensor(PAIR[1])))

    assert_same(net, torch.compile(energy, fullgraph=True, backend="aot_eager")(x), energy(x))


# a graph break keeps the loss so far, and dynamo asks for its gradient
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_training_step(kind):
    """The whole step: random draws and gradient change stay outside the graphs, the rest compiles."""
    net, (x, _) = network(dropout=True).train(), batch()
    penalty, other = (kind(RandomPatches(2)) for _ in range(2))

    def loss(net, penalty):
        return net[0](x).square().mean() + penalty(net, x)

    step = torch.compile(loss, backend="aot_eager")
    for _ in range(2):
        assert_same(net, step(net, penalty), loss(net, other))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_what_it_is_called_with(kind):
    net, (x, y) = network(classes=3), batch()
    for given, error, message in [
        ((net, x), OptionError, r"3 logits .* write penalty\(net, x, y\)"),
        ((net, x, y[:3]), ShapeError, "y must hold 5 class numbers"),
        ((net, x, y.double()), ShapeError, "y must hold 5 class numbers"),
        ((net, x, y + 2), DataError, r"y must be in 0..2, found"),
        ((net, x[:1], y[:1]), ShapeError, "a batch of 1 has no other sample"),
        ((net, x[:, 0, 0, 0], y), ShapeError, r"\(B, ..., height, width\), found shape \(5,\)"),
        ((net, [1.0], y), ShapeError, "found list"),
        ((net, x.long(), y), DataError, r"write x.float\(\)"),
        ((lambda z: net(z)[..., None], x, y), ShapeError, r"logits of .* found shape \((5|25), 3, 1\)"),
        ((lambda z: (net(z), 1), x, y), ShapeError, "logits of shape .* found tuple"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            kind(PAIR)(*given)
    with pytest.raises(OptionError, match="not a state of it"):
        kind(PAIR).load_state_dict({"calls": 3})


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_options(kind):
    for name, value, message in [
        ("weight", -1, "a finite number >= 0"), ("weight", float("nan"), "a finite number >= 0"),
        ("every", 0, "an integer >= 1"), ("warmup", -1, "an integer >= 0"),
        ("start", -1, "an integer >= 0"), ("until", 0, "an integer >= 1"),
        ("target", 2, r"a number in \[0, 1\), found 2"),
        ("statistics", "own", "'frozen' or 'batch', found 'own'"),
        ("patches", "random", "a pair of boxes"),
        *([("samples", 1, "an integer >= 2")] * (kind is not InputGradientChange)),
        *([("eps", -1, "a finite number")] * (kind is InteractionEnergy)),
        *([("floor", 0, "a number in")] * (kind is Rank)),
    ]:  # fmt: skip
        with pytest.raises(OptionError, match=f"{kind.__name__}: {name} must be {message}") as told:
            kind(**{"patches": PAIR, name: value})
        assert told.value.argument == name
    with pytest.raises(OptionError, match="until must be more than start, 5, found 5"):
        kind(PAIR, start=5, until=5)


class Counted(nn.Module):
    """A network that counts the images it is given."""

    def __init__(self, net):
        super().__init__()
        self.net, self.images = net, []

    def forward(self, x):
        self.images.append(len(x))
        return self.net(x)


@pytest.mark.parametrize("classes", [1, 3])
def test_samples_that_the_swap_does_not_change_are_not_evaluated(classes):
    """One pixel of sample 3 stands out: 3 and the one before it, which takes its pixels, change."""
    net = Counted(network(norm=True, classes=classes))
    x, y = batch(6)
    top, left, bottom, right = PAIR[1]
    x[..., top:bottom, left:right] = 0.0
    x[3, :, top, left] = 1.0
    penalty = InputGradientChange(PAIR)
    drawn = penalty.draw(net, x)
    assert sorted(drawn.samples.tolist()) == [2, 3]
    whole = dataclasses.replace(drawn, samples=None)
    padded = penalty.draw(net, x, multiple=4)
    assert len(padded.samples) == 4 and {2, 3} < set(padded.samples.tolist())
    # a copy of the batch in other numbers says the same
    assert torch.equal(penalty.draw(net, (9 * x).to(torch.int8)).samples, drawn.samples)
    expected = penalty.value(net, x, y, whole)
    for one, images in ((drawn, 2), (padded, 4)):
        net.images.clear()
        found = penalty.value(net, x, y, one)
        assert net.images == [images, images] and torch.allclose(found, expected, rtol=1e-12)
        g, h = gradients_of(found, net), gradients_of(expected, net)
        assert torch.allclose(g, h, atol=1e-12)


def test_a_swap_that_changes_nothing_is_one_and_has_no_gradient():
    net, x = Counted(network(norm=True)), torch.ones(4, 2, 8, 9, dtype=torch.float64)
    found = InputGradientChange(PAIR, weight=3.0)(net, x)
    assert found.item() == 3 and not found.requires_grad and net.images == []
    InputGradientChange(PAIR, statistics="batch")(net, x)
    assert net.images == [4, 4]  # with the batch's statistics every sample can change
    no_statistics = network(norm=True)
    no_statistics[1] = nn.BatchNorm2d(6, track_running_stats=False).double()
    assert InputGradientChange(PAIR).draw(no_statistics, x).samples is None


@pytest.mark.parametrize(
    ("dropout", "frozen", "passes"), [(False, False, 2), (True, False, 3), (False, True, 3)]
)
def test_the_training_pass_is_the_first_pass(dropout, frozen, passes):
    """The same logits, value, gradients and running statistics, by one pass less."""
    (x, _), nets, results = batch(6), [], []
    for together in (True, False):
        net = Counted(network(norm=True, dropout=dropout)).train()
        net.net[1].train(not frozen)
        nets.append(net)
        penalty = InputGradientChange(PAIR, statistics="batch")
        torch.manual_seed(5)
        if together:
            logits, value = penalty.with_logits(net, x)
            assert net.images == [6] * passes
        else:
            logits, value = net(x), penalty.value(net, x)
        loss = nn.functional.softplus(logits).mean() + 0.5 * value
        results.append((logits, value, loss, gradients_of(loss, net)))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    for (name, a), b in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-12), name
    assert all(m.training for m in nets[0].modules()) != frozen


def test_the_training_pass_of_a_compiled_network_and_without_gradients():
    net, (x, _) = network(norm=True).train(), batch(6)
    penalty = InputGradientChange(PAIR, statistics="batch")
    expected, value = copy.deepcopy(penalty).with_logits(copy.deepcopy(net), x)
    logits, found = penalty.with_logits(torch.compile(net, backend="aot_eager"), x)
    assert torch.allclose(logits, expected) and torch.allclose(found, value)
    (logits.mean() + found).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad():
        logits, found = penalty.with_logits(net, x)
    assert not logits.requires_grad and not found.requires_grad
    assert torch.allclose(found, value)


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_replaced_operations_in_half_precision(statistics, monkeypatch):
    """Under autocast the replacements give what torch's own operations give."""
    net, (x, _) = network(norm=True).float(), batch()
    found = []
    for replaced in (True, False):
        if not replaced:
            monkeypatch.setattr(second_order, "_REPLACEMENTS", {})
        with torch.autocast("cpu", torch.bfloat16):
            value = InputGradientChange(PAIR, statistics=statistics)(net, 5 * x.float())
        found.append((value, gradients_of(value, net)))
    (value, g), (expected, h) = found
    assert value.item() == pytest.approx(expected.item(), abs=1e-2)
    assert float((g - h).norm() / h.norm()) < 0.05
