"""Image classifiers: template functions against their definitions, classes, shrinking, files."""

import json
import math

import pytest
import safetensors.torch
import torch
from refusals import refuses
from zoo import random

from tnreg import ConvAC, ConvNet, ModeTree, Representation, truncate
from tnreg.errors import DataError, FileError, OptionError, ShapeError
from tnreg.machine.files import read_safetensors

F64 = torch.float64
KINDS = ["affine", "gaussian", "bins", "sine"]


def classifier(kind="affine", share=False, scores="normalized", tree=None, **options):
    tree = ModeTree.grid((4, 4)) if tree is None else tree
    representation = Representation(3, kind=kind, dtype=F64, generator=random(), **options)
    net = ConvNet(tree, 3, 4, outputs=5, share=share, dtype=F64)
    return ConvAC(representation, net, scores=scores).start_averaging_(generator=random(1))


def images(channels=1, rows=4, columns=4):
    return torch.rand(6, channels, rows, columns, dtype=F64, generator=random(7))


def patches(x, rows, columns):
    """(B, patches, channels * rows * columns) by plain loops."""
    corners = [(r, c) for r in range(0, x.shape[2], rows) for c in range(0, x.shape[3], columns)]
    return torch.stack([x[:, :, r : r + rows, c : c + columns].flatten(1) for r, c in corners], 1)


@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_templates_are_their_definitions(patch, channels):
    x = images(channels)
    cut = patches(x, *patch)
    mean, options = cut.mean(-1), {"patch": patch, "channels": channels, "dtype": F64}
    templates = [Representation(3, kind=kind, **options) for kind in KINDS]
    affine, gaussian, *_ = templates
    distances = (cut.unsqueeze(2) - gaussian.means).square().sum(-1)
    cos, sin = torch.cos(math.pi / 2 * mean), torch.sin(math.pi / 2 * mean)
    wanted = [
        torch.relu(cut @ affine.weight.T + affine.bias),
        torch.exp(-distances / (2 * gaussian.log_widths.exp() ** 2)),
        torch.nn.functional.one_hot((mean * 3).long().clamp(0, 2), 3).to(F64),
        torch.stack([cos**2, math.sqrt(2) * cos * sin, sin**2], 2),  # vectors of norm 1
    ]
    for representation, values in zip(templates, wanted, strict=True):
        found = representation(x)
        assert found.shape == (6, 3, 4 // patch[0], 4 // patch[1])
        assert torch.allclose(found.flatten(2).mT, values, rtol=1e-12)


def test_fixed_templates_are_not_trained():
    trained, fixed = Representation(3), Representation(3, trained=False)
    assert all(p.requires_grad for p in trained.parameters())
    assert not any(p.requires_grad for p in fixed.parameters())
    assert list(Representation(3, kind="bins").parameters()) == []
    assert "3 affine templates of 1x1 patches, fixed" in repr(fixed)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_inner_products_with_the_tensor(kind, share):
    """W_c contracted with the features of all patches, from the dense tensor; normalized or not."""
    model = classifier(kind, share, scores="plain", tree=ModeTree.grid((2, 2)))
    x = images(rows=2, columns=2)
    features = model.representation(x).flatten(2)
    dense = model.factorization().to_tensor()
    wanted = torch.einsum("ba,bc,bd,be,acdek->bk", *features.unbind(2), dense)
    assert torch.allclose(model(x), wanted, rtol=1e-10)
    model.scores = "normalized"
    size = wanted.square().mean(1, keepdim=True).sqrt()
    assert torch.allclose(model(x), 5 * wanted / size, rtol=1e-10)


def test_normalized_scores_are_finite_at_any_depth():
    net = ConvNet(ModeTree.grid((16, 16)), 2, 4, outputs=3)
    model = ConvAC(Representation(2, kind="sine"), net).start_averaging_()
    x = torch.rand(4, 1, 16, 16)
    scores = model(x)
    assert torch.allclose(scores.square().mean(1).sqrt(), torch.full((4,), 5.0), rtol=1e-4)
    torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 2, 0])).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        for conv in model.net.convs.values():
            conv.weight.zero_()
    assert bool((model(x) == 0).all())


@pytest.mark.parametrize("join", ["diagonal", "full"])
def test_truncated_classifiers(join):
    options = {"std": 1.0, "dtype": F64, "generator": random()}
    net = ConvNet(ModeTree.grid((4, 4)), 3, 3, join=join, outputs=5, **options)
    model = ConvAC(Representation(3, kind="sine"), net, scores="plain")
    x = images()
    exact = model.truncated()
    assert torch.allclose(exact(x), model(x), rtol=1e-8)
    assert exact.net.network.joins[-1] == "full"
    smaller, rounded = model.truncated(rtol=0.3), truncate(model.factorization(), rtol=0.3, leaves="weights")
    assert smaller.net.outputs == 5 and max(smaller.net.network.bonds) <= max(rounded.network.bonds)
    assert torch.allclose(smaller.factorization().norm(), rounded.norm(), rtol=1e-10)
    assert max(model.truncated(ranks=2).net.network.bonds[:-1]) <= 2


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(tmp_path, kind, share):
    model = classifier(kind, share, patch=(2, 1), tree=ModeTree.grid((2, 4)))
    model.save(tmp_path / "model.safetensors")
    again = ConvAC.load(tmp_path / "model.safetensors")
    x = images()
    assert torch.equal(again(x), model(x)) and again.net.tree == model.net.tree
    assert again.representation.settings() == model.representation.settings()


def test_files_that_are_no_classifiers(tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other")
    refused = "not a classifier: .*\n.*\n  expected: a safetensors file"
    for name, message in (("other", refused), ("none", "no such model file")):
        with pytest.raises(FileError, match=message):
            ConvAC.load(tmp_path / name)
    model = classifier()
    with torch.no_grad():
        model.representation.bias[0] = math.nan
    with pytest.raises(DataError, match=r"not saved: representation\.bias has NaN"):
        model.save(tmp_path / "broken.safetensors")
    assert not (tmp_path / "broken.safetensors").exists()


def test_files_of_the_first_format_are_read(tmp_path):
    """Names of the format and of the weights are on disk in files that others have written."""
    model, path = classifier(tree=ModeTree([[0, 1], 2, 3]), share=True), tmp_path / "model"
    model.save(path)
    metadata, state = read_safetensors(path)
    about = json.loads(metadata["tnreg-convac"])
    assert about["format"] == "tnreg.convac/1" and about["joins"][0] == "leaf"
    layers = {f"net.convs.layer{k}.weight" for k in range(3)}
    assert set(state) == layers | {"representation.bias", "representation.weight"}


WIDE = torch.zeros(1, 1, 4, 4, dtype=F64)
NET, MANY = (ConvNet(ModeTree.star(3), 2, 4, outputs=outputs) for outputs in (None, 3))


test_what_is_refused = refuses([
    (lambda: Representation(3, kind="wavelet"), OptionError,
     "unknown kind 'wavelet' of templates; there is affine"),
    (lambda: Representation(0), OptionError, "templates must be an integer >= 1"),
    (lambda: Representation(3, low=1.0, high=1.0), OptionError, "low < high, found 1"),
    (lambda: Representation(3, patch=2), OptionError, r"patch must be \(height, width\), found 2"),
    (lambda: Representation(3, kind="affine")(WIDE), DataError, r"write images.to\(torch.float32\)"),
    (lambda: Representation(3, kind="gaussian")(WIDE), DataError, r"write images.to\(torch.float32\)"),
    (lambda: Representation(3, kind="bins")(WIDE.long()), DataError, "a floating-point dtype"),
    (lambda: Representation(3, patch=(2, 2))(WIDE[..., :3]), ShapeError,
     r"expected: \(B, 1, a multiple of 2, a multiple of 2\)"),
    (lambda: ConvAC(Representation(2), NET), OptionError, "a classifier needs a net with outputs"),
    (lambda: ConvAC(Representation(3), MANY), ShapeError, r"3 templates do not fit input channels \{2\}"),
    (lambda: ConvAC(Representation(2), MANY, scores="log"), OptionError, "unknown scores 'log'"),
])  # fmt: skip
