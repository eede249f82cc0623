"""Grid tensors of networks: entry by entry, and the ranks that law 9 promises."""

import itertools

import numpy as np
import torch
import zoo
from refusals import refuses
from torch import nn
from zoo import randn, random

import tnreg
from tnreg import ConvNet, DataError, ModeTree, OptionError, ShapeError, grid_tensor, spectra

F64 = torch.float64


def test_one_hot_templates_give_the_tensor_itself():
    model = zoo.model_of(ModeTree([[0, 2], [1, 3]]), sizes=(3, 3, 3, 3))
    found = grid_tensor(tnreg.to_cnn(model), torch.eye(3, dtype=F64), model.tree, batch=7)
    assert torch.allclose(found, model.to_tensor(), rtol=1e-12)


def test_templates_that_span_the_inputs_have_the_models_ranks():
    net = ConvNet(ModeTree.grid((2, 2), (1, 2)), 3, 2, std=0.7, dtype=F64, generator=random())
    found = grid_tensor(net, randn(4, 3), net.tree)
    wanted = tnreg.hierarchical_rank(tnreg.from_cnn(net), rtol=1e-9)
    assert tnreg.hierarchical_rank(found, net.tree, rtol=1e-9) == wanted


def test_ordinary_networks_entry_by_entry():
    """A CNN with ReLU on 2x2 patches of 2x3 pixels in two colours, templates of every patch its own."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)
    ).double()
    net(torch.randn(8, 2, 4, 6, dtype=F64))  # running statistics
    templates, tree = torch.randn(4, 2, 2, 2, 3, dtype=F64), ModeTree.star(4)
    found = grid_tensor(net, templates, tree, shape=(2, 2), output=1, batch=3)
    assert net.training
    net.eval()
    for index in itertools.product(range(2), repeat=4):
        tiles = [templates[p, d] for p, d in enumerate(index)]
        image = torch.cat([torch.cat(tiles[:2], 2), torch.cat(tiles[2:], 2)], 1)
        assert torch.allclose(found[index], net(image.unsqueeze(0))[0, 1])


def test_separable_functions_have_rank_one():
    tree, templates = ModeTree([[0, 1], [2, 3]]), randn(3, 2)
    separable, mixed = (
        spectra(grid_tensor(f, templates, tree), tree)[(0, 1)]
        for f in (
            lambda x: torch.sigmoid(x[:, :, :2].sum((1, 2))) * x[:, :, 2:].square().sum((1, 2)),
            lambda x: torch.sigmoid(x.sum((1, 2))),
        )
    )
    assert float(separable[1]) < 1e-12 * float(separable[0]) and float(mixed[1]) > 1e-3


def test_every_part_of_a_module_keeps_its_mode():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 1))
    net[1].eval()
    grid_tensor(net, torch.eye(2), [0, 1])
    assert net.training and net[2].training and not net[1].training


def test_an_arrangement_of_ones_own():
    options = {"arrange": lambda x: list(x.unbind(1))}
    templates = torch.tensor([[0.0], [1.0]])
    found = grid_tensor(lambda x: (x[0] - x[1])[:, 0], templates, ModeTree.star(2), **options)
    assert found.tolist() == [[0, -1], [1, 0]]


def test_numpy_arrays_in_any_layout():
    """Of the templates, and of what the network gives."""
    templates = np.array([[0.0], [1.0]])
    expected = grid_tensor(lambda x: x[:, 0, 0] - x[:, 0, 1], templates, ModeTree.star(2))
    assert expected.tolist() == [[0, -1], [1, 0]]
    for given in (
        templates[::-1].copy()[::-1],
        templates.astype(">f8"),
        [templates, templates.astype(">f8")],
    ):
        for output in (
            lambda x: x,
            lambda x: x.numpy()[::-1].copy()[::-1],
            lambda x: x.numpy().astype(">f8"),
        ):
            found = grid_tensor(lambda x: output(x[:, 0, 0] - x[:, 0, 1]), given, ModeTree.star(2))  # noqa: B023
            assert torch.equal(found, expected)


TREE, TEMPLATES, PICTURES = ModeTree.binary(4), torch.eye(2), torch.zeros(2, 1, 2, 2)


test_what_is_refused = refuses([
    (lambda x: x[:, 0, 0].nan_to_num(), TEMPLATES + torch.nan, {}, DataError, "templates hold NaN"),
    (lambda x: x, torch.zeros(3, 2, 2), {}, ShapeError,
     r"expected: \(M, D\) or \(M, C, h, w\).*\(4, M, \.\.\.\)"),
    (lambda x: x, torch.eye(65), {}, ShapeError, "more than 16777216; take fewer templates"),
    (lambda x: x[:, :, 0], TEMPLATES, {}, OptionError,
     "the network has 2 outputs; say which, output=0 to output=1, found None"),
    (lambda x: x[:, 0, 0], TEMPLATES, {"output": 3}, OptionError, "1 outputs; say which.*found 3"),
    (lambda x: x.sum(), TEMPLATES, {}, ShapeError, r"one value for each of 16 inputs, found shape \(\)"),
    (lambda x: x, TEMPLATES, {"shape": (3, 2)}, OptionError, r"shape \(3, 2\) is not of 4 patches"),
    (lambda x: x, PICTURES, {}, OptionError, "give shape="),
    (lambda x: x[:, 0, 0] / 0, TEMPLATES, {}, DataError, "NaN or infinite"),
], by=lambda net, x, options: grid_tensor(net, x, TREE, **options))  # fmt: skip
