"""Probe: separation spectra of functions of known rank, and what a locality profile sees."""

from collections import namedtuple
from dataclasses import make_dataclass

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from refusals import refuses
from torch import nn
from zoo import randn, random

from tnreg import ConvNet, ModeTree, plots
from tnreg.errors import DataError, FileError, OptionError, ShapeError
from tnreg.experiments.nets import build
from tnreg.experiments.probed import logits_at, network_of
from tnreg.far.interaction_map import interaction_map
from tnreg.far.probe import LocalityProfile, locality_profile, separation_spectrum

A, B, W = randn(7, 3), randn(9, 4, seed=1), randn(3, 4, seed=2)
EXPECTED = torch.linalg.svdvals(A @ W @ B.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_spectrum_is_that_of_the_matrix(dtype):
    a, b, w = A.to(dtype), B.to(dtype), W.to(dtype)
    if dtype.is_complex:
        a, w = a + 1j * randn(7, 3, seed=3), w - 1j * randn(3, 4, seed=4)
    expected = torch.linalg.svdvals(a @ w @ b.T)

    def f(x, y):
        return torch.einsum("bi,ij,bj->b", x, w, y)

    for form in (f, lambda x, y: f(x, y)[:, None]):
        for batch in (1024, 5, 1):
            assert torch.allclose(separation_spectrum(form, a, b, batch=batch), expected)
    assert (expected[:3] > 1e-3).all() and (expected[3:] < 1e-12).all()


def test_one_number_for_a_batch_is_asked_pair_by_pair():
    calls = []

    def f(x, y):
        calls.append(len(x))
        return torch.einsum("bi,ij,bj->", x, W, y)

    assert torch.allclose(separation_spectrum(f, A, B), EXPECTED)
    assert calls == [63] + [1] * 63
    assert torch.allclose(separation_spectrum(f, A[:1], B[:1]), (A[0] @ W @ B[0]).abs())


def test_other_kinds_of_values():
    def f(x, y):
        return np.einsum("bi,ij,bj->b", x, W, y)

    assert torch.allclose(separation_spectrum(f, A.numpy(), list(B)), EXPECTED)
    counts = separation_spectrum(lambda x, y: (x[:, 0] > y[:, 0]).long(), A, B)
    assert counts.dtype == torch.float64
    half = separation_spectrum(lambda x, y: (x[:, 0] * y[:, 0]).half(), A, B)
    assert half.dtype == torch.float32 and half[1] < 1e-2 * half[0]

    net = nn.Linear(7, 1).double()  # is not differentiated
    s = separation_spectrum(lambda x, y: net(torch.cat([x, y], 1)), A, B)
    assert not s.requires_grad and (s[2:] < 1e-12).all()  # a sum: rank two


@pytest.mark.parametrize(("dtype", "power"), [(torch.float32, 30), (torch.float64, 150)])
def test_no_unit_matters(dtype, power):
    """That of the values scales spectra and leaves shares and ranks; so does that of the images."""
    x, (a, b) = images().to(dtype), (t.to(dtype) for t in (A, B))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(96, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    options = {"size": 2, "distances": [0, 3], "pairs": 5}
    expected = locality_profile(net, x, **options)
    assert expected.interaction.min() > 1e-3
    s = separation_spectrum(lambda a, b: a[:, 0] * b[:, 0] + a[:, 1], a, b)
    for unit in (10.0**power, 10.0**-power):
        for f, given, scale in ((lambda z: net(z) * unit, x, unit), (lambda z: net(z / unit), x * unit, 1)):  # noqa: B023
            found = locality_profile(f, given, **options)
            assert np.allclose(found.interaction, expected.interaction, rtol=1e-3)
            assert np.allclose(found.effective_rank, expected.effective_rank, rtol=1e-3)
            assert np.allclose(found.spectra / scale, expected.spectra, rtol=1e-3, atol=1e-6)
        found = separation_spectrum(lambda a, b: (a[:, 0] * b[:, 0] + a[:, 1]) * unit, a, b)  # noqa: B023
        assert torch.allclose(found / unit, s, atol=1e-5)


def test_networks_of_products_are_seen_as_they_are():
    """Their values are small, and what they tie together is no less for it."""
    tree = ModeTree.grid((4, 4))
    net = ConvNet(tree, 1, 3, std=0.3, dtype=torch.float64, generator=random())
    x = 0.1 * randn(20, 1, 4, 4)
    assert net(x).abs().max() < 1e-20
    profile = locality_profile(net, x, size=1, distances=[0, 1], pairs=4)
    larger = locality_profile(lambda z: net(10 * z), x, size=1, distances=[0, 1], pairs=4)
    assert profile.interaction.max() > 0.1
    assert np.allclose(profile.interaction, larger.interaction, rtol=1e-9)


LAYOUTS = {
    "reversed": lambda a: a[::-1].copy()[::-1],
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numpy_arrays_in_any_layout(layout):
    of = LAYOUTS[layout]

    def f(x, y):
        return of(np.einsum("bi,ij,bj->b", x, W, y))

    assert torch.allclose(separation_spectrum(f, of(A.numpy()), of(B.numpy())), EXPECTED)
    x, options = images().numpy(), {"size": 2, "distances": [2], "pairs": 3}
    found, batches = (
        locality_profile(Near(3), data, **options) for data in (of(x), [of(x[:10]), of(x[10:])])
    )
    expected = locality_profile(Near(3), x, **options).interaction
    assert np.array_equal(found.interaction, expected) and np.array_equal(batches.interaction, expected)
    read_only = x.copy()
    read_only.setflags(write=False)
    assert np.array_equal(locality_profile(Near(3), read_only, **options).interaction, expected)


NAN = torch.full((20, 1, 6, 16), torch.nan)
test_spectrum_refuses = refuses([
    (lambda x, y: x[:, 0], A / 0, B, {}, DataError, "f gave NaN or infinite"),
    (lambda x, y: x[:, 0], A, B + torch.nan, {}, DataError, "outside holds NaN"),
    (lambda x, y: x, A, B, {}, ShapeError, r"63 numbers for 63 pairs, .* found shape \(63, 3\)"),
    (lambda x, y: x[:, 0] / 0, A, B, {}, DataError, "NaN or infinite"),
    (lambda x, y: x, [], B, {}, ShapeError, r"inside must hold one sample or more .* \(0,\)"),
    (lambda x, y: x, A, torch.tensor(1.0), {}, ShapeError, r"outside must hold one sample or more .* \(\)"),
    (lambda x, y: x, A, B, {"batch": 0}, OptionError, "batch must be an integer >= 1"),
], by=lambda f, a, b, options: separation_spectrum(f, a, b, **options))  # fmt: skip


def images(count=20, height=6, width=16, seed=0):
    return randn(count, 1, height, width, dtype=torch.float32, seed=seed)


class Near(nn.Module):
    """Sums of products of pixels at a fixed horizontal distance, and of a few classes."""

    def __init__(self, reach, classes=1):
        super().__init__()
        self.reach, self.classes, self.dropout = reach, classes, nn.Dropout(0.5)

    def forward(self, x):
        x = self.dropout(x)
        value = (x[..., : -self.reach] * x[..., self.reach :]).sum((1, 2, 3))
        return value[:, None] * torch.arange(1.0, self.classes + 1)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("where", ["differing", "anywhere"])
def test_profile_of_known_reach(classes, where):
    """Products of pixels five apart: patches of side 2 interact at gaps 2 to 4 only."""
    net = Near(5, classes).train()
    options = {"size": 2, "distances": [0, 2, 3, 4, 5, 9], "where": where}
    profile = locality_profile(net, images(), pairs=30, **options)
    assert net.training and net.dropout.training
    share, rank = profile.interaction, profile.effective_rank
    assert share.shape == rank.shape == (6, 30) and profile.spectra.shape == (6, 30, 8)
    assert (share >= 0).all() and (share <= 1 + 1e-6).all()
    seen = share.max(axis=1) > 0.1
    assert seen.tolist() == [False, True, True, True, False, False]
    assert (share[~seen] < 1e-5).all() and (rank[~seen] == 0).all()
    # one product of two pixels in a row: rank 2, in two rows of the patches 4 at most
    assert (rank[seen].max(axis=1) > 1).all() and (rank <= 4 + 1e-3).all()
    again = locality_profile(net, images(), pairs=30, **options)
    assert np.array_equal(again.interaction, share)


def test_profile_is_the_definition():
    """One pair, by hand: M over both patches, with the background of another image."""
    net, x = Near(5), images(3, 1, 7)
    profile = locality_profile(net, x, size=1, distances=[4], samples=2, pairs=40, where="anywhere")
    found = {round(float(s), 4) for s in profile.interaction.ravel()}
    expected = set()
    for background in range(3):
        a, b = (x[n, 0, 0].double() for n in range(3) if n != background)
        for i, j in ((0, 5), (5, 0), (1, 6), (6, 1)):
            u, v = torch.stack([a[i], b[i]]), torch.stack([a[j], b[j]])
            m = torch.outer(u, v)  # the rest of the sum is constant
            centred = m - m.mean(0) - m.mean(1, keepdim=True) + m.mean()
            expected.add(round(float(centred.square().sum() / (m - m.mean()).square().sum()), 4))
    assert found <= expected and len(found) > 3


def test_profile_of_batches_and_defaults():
    x = images(24, 16, 20)
    whole = locality_profile(Near(3), x, pairs=3)
    assert whole.size == 2 and whole.distances.tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    batches = [(x[:10], torch.zeros(10)), (x[10:], torch.zeros(14))]
    share = whole.interaction
    for data in (batches, x.numpy()):
        assert np.array_equal(locality_profile(Near(3), data, pairs=3).interaction, share)
    head, *rows = str(whole).splitlines()
    assert head.split() == ["distance", "interaction", "effective", "rank"] and len(rows) == 9
    assert np.allclose(whole.standard_error, share.std(1, ddof=1) / np.sqrt(3))
    single = locality_profile(Near(3), x, pairs=1)
    assert "nan" in str(single) and np.isnan(single.standard_error).all()
    named = locality_profile(lambda z: {"a": Near(3)(z)}, x, pairs=3, output=lambda out: out["a"])
    assert np.array_equal(named.interaction, share)
    # functions without interaction, in half precision as well
    linear = nn.Sequential(nn.Flatten(), nn.Linear(96, 1))
    for net in (linear, lambda x: torch.zeros(len(x)), lambda x: linear(x).bfloat16()):
        profile = locality_profile(net, images(), size=2, pairs=4)
        assert (profile.interaction < 1e-5).all() and (profile.effective_rank == 0).all()


test_profile_refuses = refuses([
    (Near(3), NAN, {}, DataError, "images are NaN or infinite somewhere"),
    (Near(3), images(8), {}, ShapeError, "give 9 samples or more"),
    (Near(3), images(), {"size": 2, "distances": [13]}, ShapeError, "gap of 13 fit into an image of 6 x 16"),
    (Near(3), None, {}, ShapeError, "found NoneType"),
    (Near(3), [], {}, ShapeError, "data holds no batch"),
    (lambda x: x.sum((1, 2, 3)) / 0, images(), {}, DataError, "the model gave NaN"),
    (Near(3), images(), {"where": "here"}, OptionError,
     "where must be 'differing' or 'anywhere', found 'here'"),
    (Near(3), images(), {"samples": 1}, OptionError, "samples must be an integer >= 2"),
    (Near(3), images(), {"pairs": 0}, OptionError, "pairs must be an integer >= 1"),
], by=lambda net, data, options: locality_profile(net, data, **options))  # fmt: skip


def profile_of(means, distances=(0, 3, 6, 12, 24), pairs=4):
    """A profile with these means, a standard error of 1 % of them, and distances in any order."""
    spread = np.linspace(0.99, 1.01, pairs) if pairs > 1 else np.ones(1)
    shares = np.array(means)[:, None] * spread
    return LocalityProfile(np.array(distances), shares, shares, shares[..., None], 2)


@pytest.mark.parametrize(("means", "words"), [
    ([0.5, 0.3, 0.2, 0, 0], "80 % of the pair interaction lies within 3 pixels; nothing beyond 6."),
    ([0.5, 0.4, 0.2, 0.04, 0], "96 % of the pair interaction lies within 6 pixels; nothing beyond 12."),
    ([0.5, 0.4, 0.2, 0.0049, 0], "81 % of the pair interaction lies within 3 pixels; nothing beyond 6."),
    ([0.4, 0.1, 0.4, 0, 0], "Only 55 % of the pair interaction lies within 3 pixels; nothing beyond 6."),
    ([0.5, 0, 0, 0, 0], "100 % of the pair interaction lies within 0 pixels; nothing beyond 0."),
    ([0, 0, 0, 0, 0.5], "Only 0 % of the pair interaction lies within 12 pixels; it reaches 24, as far as"),
    ([0.5, 0.5, 0.5, 0.5, 0.01], "99 % of the pair interaction lies within 12 pixels; it reaches 24, as far"),
    ([0] * 5, "No pair interaction. Measured at 0, 3, 6, 12, 24 pixels."),
    ([1e-7] * 5, "No pair interaction."),  # rounding of a network
])  # fmt: skip
def test_words_of_a_profile(means, words):
    assert words in profile_of(means).summary
    shuffled = profile_of(means[::-1], (24, 12, 6, 3, 0))
    assert shuffled.summary == profile_of(means).summary
    assert f"{profile_of(means, pairs=1).summary} ".split(" It is")[0] in profile_of(means).summary + " "


def test_words_say_how_much_and_where_it_was_measured():
    assert profile_of([0.5, 0.25, 0, 0, 0]).summary.endswith(
        "It is largest at 0, 50 ± 0.22 % of the variance. Measured at 0, 3, 6, 12, 24 pixels."
    )
    single = "Pair interaction is 100 % of the variance. Measured at 8 pixels, the only distance."
    assert profile_of([1.0], [8], pairs=1).summary == single  # without a standard error
    assert "No pair interaction. Measured at 8 pixels, the only" in profile_of([0.0], [8]).summary


def test_profiles_are_compared_over_the_same_patches():
    a, b = profile_of([0.5, 0.3, 0.1, 0.01, 0]), profile_of([0.5, 0.1, 0.1, 0.4, 0.02])
    found = a.compare(b, ("plain", "term"))
    assert found.summary == (
        "term ties more at 12, 24 pixels (most at 24: plain ties nothing), less at 3 pixels (0.33 times as "
        "much) than plain; no difference beyond noise at 0, 6."
    )
    assert (
        "(40 times as much)"
        in profile_of([0.1, 0.01], (0, 9)).compare(profile_of([0.1, 0.4], (0, 9))).summary
    )
    assert np.allclose(found.difference.mean(1), [0, -0.2, 0, 0.39, 0.02])
    assert np.allclose(found.standard_error, found.difference.std(1, ddof=1) / 2)
    assert found.differs.tolist() == [False, True, False, True, True] and str(found).count("*") == 3
    assert "single pair" in profile_of([0.1], [3], pairs=1).compare(profile_of([0.9], [3], pairs=1)).summary


@pytest.mark.slow
def test_a_network_differs_from_others_and_not_from_itself():
    options = {"size": 2, "distances": [0, 3, 9], "pairs": 40, "samples": 4}
    near, same, far = (locality_profile(Near(n), images(), **options) for n in (1, 1, 4))
    assert near.compare(same).summary == "B against A: no difference beyond noise at 0, 3, 9 pixels."
    assert (
        "B ties more at 3 pixels (A ties nothing), less at 0 pixels (0 times as much)"
        in near.compare(far).summary
    )
    for other, what in (
        ({"distances": [0, 3, 8]}, "distances"), ({"size": 1}, "size"), ({"pairs": 5}, "number of pairs"),
        ({"seed": 1}, "boxes"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=f"the profiles differ in {what}; measure both with the same"):
            near.compare(locality_profile(Near(1), images(), **options | other))


def region(x, n):
    """The sum of the pixels of region n of 2 x 3 in images of 6 x 16."""
    top, left = 3 * (n // 3), (0, 5, 10, 16)[n % 3 : n % 3 + 2]
    return x[..., top : top + 3, left[0] : left[1]].sum((-3, -2, -1))


def test_a_map_shows_the_pairs_that_interact():
    """Products of two regions, whatever the unit; a sum of functions of regions ties nothing."""
    x = images()
    options = {"grid": (2, 3), "samples": 4, "repetitions": 3}

    def net(x):
        return 1e20 * (region(x, 0) * region(x, 5) + 3 * region(x, 1) * region(x, 2) + region(x, 3).exp())

    found = interaction_map(net, x, **options)
    share = found.interaction
    assert set(found.ties) == {(0, 5), (1, 2)} and (share == share.T).all()
    assert (
        share[0, 5] > 0.5
        and np.count_nonzero(share > 1e-6) == 4
        and found.boxes[5].tolist() == [3, 10, 6, 16]
    )
    assert "2 x 3 regions: 2 of 15 pairs interact" in str(found) and len(str(found).splitlines()) == 3
    assert found.standard_error.shape == (6, 6)
    single = interaction_map(net, x.numpy(), **options | {"repetitions": 1})
    assert single.ties == found.ties and "± nan" in str(single)
    mirrored = interaction_map(lambda x: net(x.flip(-1)), x.flip(-1), (2, 1), samples=4)
    assert np.allclose(mirrored.interaction, interaction_map(net, x, (2, 1), samples=4).interaction)
    for order in range(3):  # other images, the same pairs
        shuffled = x[torch.randperm(20, generator=random(order))]
        assert set(interaction_map(net, shuffled, **options).ties) == set(found.ties)
    nothing = interaction_map(lambda x: sum(region(x, n).sin() for n in range(6)), x.double(), **options)
    assert not nothing.interaction.any() and nothing.summary == "2 x 3 regions: none of 15 pairs interact."
    for drawn, count in ((found, 2), (nothing, 0)):
        axes = plots.interaction_map(drawn, Figure().subplots())
        axes.figure.canvas.draw()
        assert len(axes.texts) == count and len(axes.collections[0].get_array().ravel()) == 6


def test_a_map_is_the_profile_of_its_boxes():
    """Of two regions there is one pair: the share of one crossing by definition."""
    x, calls = images(3, 1, 2), []

    def net(z):
        calls.append(len(z))
        return z[:, 0, 0, 0] * z[:, 0, 0, 1]

    [value] = {
        round(float(v), 5)
        for v in interaction_map(net, x, (1, 2), samples=2, repetitions=1).interaction.ravel()
    } - {0}
    shares = set()
    for rest in ([0, 1], [0, 2], [1, 2]):
        m = torch.outer(x[rest, 0, 0, 0], x[rest, 0, 0, 1]).double()
        centred = m - m.mean(0) - m.mean(1, keepdim=True) + m.mean()
        shares.add(round(float(centred.square().sum() / (m - m.mean()).square().sum()), 5))
    assert value in shares and calls == [4]
    x[..., 1] = 0.5  # the same everywhere: nothing is evaluated
    assert not interaction_map(net, x, (1, 2), samples=2).interaction.any() and len(calls) == 1


test_map_refuses = refuses([
    (images(), {"grid": (1, 1)}, ShapeError, "two regions or more.*found 1 x 1"),
    (images(), {"grid": (7, 1)}, ShapeError, "at most 6 rows and 16 columns .* found 7 x 1"),
    (images(), {"grid": (0, 2)}, OptionError, "grid must be an integer >= 1"),
    (images(), {"grid": 4}, OptionError, r"grid is \(rows, columns\), e.g. \(4, 8\), found 4"),
    (images(), {"repetitions": 0}, OptionError, "repetitions must be an integer >= 1"),
    (images(8), {}, ShapeError, "interaction_map: .* give 9 samples or more"),
    (NAN, {}, DataError, "interaction_map: images are NaN"),
    ([], {}, ShapeError, "interaction_map: data holds no batch"),
], by=lambda data, options: interaction_map(Near(3), data, **options))  # fmt: skip


class ViT(nn.Module):
    """Patches of 2 x 4 pixels as tokens, a position embedding, attention; what it gives is called logits."""

    def __init__(self, wrap=lambda logits: {"logits": logits}):
        super().__init__()
        self.position, self.wrap = nn.Parameter(torch.randn(12, 8)), wrap
        self.embed, self.head = nn.Conv2d(1, 8, (2, 4), (2, 4)), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.wrap(self.head(self.layer(tokens).mean(1)))


Output = make_dataclass("Output", ["loss", "logits"])
KINDS = {
    "tensor": (lambda y: y, None), "dict": (lambda y: {"loss": None, "logits": y}, None),
    "dataclass": (lambda y: Output(None, y), None), "attribute": (lambda y: Output(None, y), "logits"),
    "tuple": (lambda y: (None, y), "1"), "named tuple": (lambda y: namedtuple("Pair", "a b")(None, y), "b"),
    "key": (lambda y: {"out": y}, "out"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_and_what_it_gives(kind):
    torch.manual_seed(0)
    wrap, where = KINDS[kind]
    net, options = ViT(wrap), {"size": 2, "distances": [0, 8], "pairs": 2, "samples": 3}
    found = locality_profile(net, images(), output=logits_at(where), **options)
    net.wrap = KINDS["tensor"][0]
    assert np.array_equal(found.interaction, locality_profile(net, images(), **options).interaction)
    assert (found.interaction > 1e-5).all() and net.layer.training


test_no_logits_there = refuses([
    ({"a": 1, "b": 2}, None, r"no 'logits' in the dict that the network gives; there is a, b.\n.*--output"),
    ((1, 2), None, "no 'logits' in the tuple .*; there is 0, 1"),
    (Output(1, 2), "out", "no 'out' in the Output .*; there is loss, logits"),
    (torch.zeros(1), "out", "no 'out' in the Tensor .*; there is nothing by name"),
], by=lambda out, where: logits_at(where)(out), error=OptionError)  # fmt: skip


def test_plot():
    profile, single = (locality_profile(Near(3), images(), size=2, pairs=n) for n in (4, 1))
    axes = Figure().subplots()
    assert plots.locality_profile(profile, axes) is axes and axes.get_legend() is None
    line = axes.containers[0].lines[0]
    assert np.allclose(line.get_ydata(), profile.interaction.mean(1))
    axes = plots.locality_profile({"before": single, "after": profile}, Figure().subplots())
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["before", "after"]
    assert isinstance(profile, LocalityProfile)


def test_networks_with_weights_that_cannot_be_used(tmp_path):
    state = build("small-cnn", 1).state_dict()
    short = {name: value[..., :1] for name, value in state.items()}
    for name, content in (("good", state), ("list", [1, 2]), ("short", short)):
        torch.save(content, tmp_path / f"{name}.pt")
    assert isinstance(network_of("small-cnn", 1, weights=tmp_path / "good.pt"), nn.Module)
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "text.pt2").write_text("program")
    for name, weights, message in (
        ("small-cnn", tmp_path / "none.pt", "no such file of weights"),
        ("small-cnn", tmp_path / "list.pt", "not a state dict.*\n.*a list, not a dict of tensors"),
        ("small-cnn", tmp_path / "text.pt", "not a state dict"),
        ("small-cnn", tmp_path / "short.pt", "short.pt does not fit the network"),
        (str(tmp_path / "none.pt2"), None, "no such model file"),
        (str(tmp_path / "text.pt2"), None, "not a torch.export program"),
    ):
        with pytest.raises(FileError, match=message):
            network_of(name, 1, weights=weights, trust=True)
