"""Networks written as ONNX, torch.export programs and plain weights, read by processes without tnreg."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import torch
import zoo

from tnreg import (
    ConvAC,
    ConvNet,
    DataError,
    Factorization,
    ModeTree,
    OptionError,
    Representation,
    export_onnx,
    to_cnn,
)
from tnreg.cnns.export import example_inputs, export_pt2, export_state


def networks():
    random = torch.Generator().manual_seed(0)
    grid = ModeTree.grid((4, 4))
    deep = ConvNet(grid, 3, 4, share=True, std=0.7, generator=random)
    uneven = to_cnn(zoo.model_of(zoo.TREES["uneven"], "full"))
    classifier = ConvAC(
        Representation(3, kind="gaussian", patch=(2, 2), generator=random),
        ConvNet(grid, 3, 4, outputs=5),
    ).start_averaging_(generator=random)
    return {"deep": deep, "uneven": uneven, "classifier": classifier}


NETWORKS = networks()
OTHERS = """
import sys, numpy, pathlib
sys.modules["tnreg"] = None
folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
given = numpy.load(folder / "inputs.npz")
parts = [given[key] for key in given.files]
if kind == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(str(folder / "net.onnx"), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {i.name: x for i, x in zip(session.get_inputs(), parts)})
else:
    import torch
    net = torch.export.load(folder / "net.pt2").module()
    x = [torch.from_numpy(part) for part in parts]
    found = net(x[0] if len(x) == 1 else x).detach().numpy()
numpy.save(folder / "found.npy", found)
"""


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_files_give_the_same_values_without_tnreg(tmp_path, name, kind):
    net = NETWORKS[name]
    if kind == "onnx":
        assert export_onnx(net, tmp_path / "net.onnx") == tmp_path / "net.onnx"
    else:
        export_pt2(net, tmp_path / "net.pt2")
    inputs = example_inputs(net, batch=7)
    dtype = torch.float32 if kind == "onnx" else next(net.parameters()).dtype
    parts = [x.to(dtype) for x in ([inputs] if isinstance(inputs, torch.Tensor) else inputs)]
    np.savez(tmp_path / "inputs.npz", *[x.numpy() for x in parts])
    subprocess.run([sys.executable, "-c", OTHERS, tmp_path, kind], check=True)
    found = torch.from_numpy(np.load(tmp_path / "found.npy"))
    wanted = net(inputs).detach().to(dtype)
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())
    assert {p.name for p in tmp_path.iterdir()} == {f"net.{kind}", "inputs.npz", "found.npy"}


@pytest.mark.parametrize("shape", [(4, 2), (2, 2), (3, 5)])
def test_exported_grids_take_images(tmp_path, shape):
    """Also where filters are of the usual small size, so that values leave the range of floats."""
    import onnxruntime

    net = to_cnn(Factorization(ModeTree.grid(shape), 3, 4))
    export_onnx(net, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"]
    )
    assert session.get_inputs()[0].shape[1:] == [3, *shape]
    x = 1e3 * torch.randn(1, 3, *shape)
    [found] = session.run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), net(x), rtol=1e-4) and found != 0


def test_a_module_of_ones_own_with_an_example(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten())
    export_pt2(net, tmp_path / "net.pt2", example=torch.randn(2, 1, 5, 5))
    x = torch.randn(3, 1, 5, 5)
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.allclose(loaded(x), net(x), rtol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_plain_weights_name_their_layers(tmp_path, name):
    net = NETWORKS[name]
    export_state(net, tmp_path / "net.safetensors")
    with safetensors.safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["network"])
        state = {key: file.get_tensor(key) for key in file.keys()}
    inner = net.net if name == "classifier" else net
    assert set(state) == set(net.state_dict())
    named = [node for layer in about["layers"] for node in layer["nodes"]]
    assert sorted(named) == sorted(map(str, inner.tree.nodes))
    for layer in about["layers"]:
        assert layer["weight"] in state
        assert all(
            inner.layer_of(v) == layer["layer"]
            for v in inner.tree.nodes
            if str(v) in layer["nodes"]
        )


def test_a_network_by_hand_from_plain_weights(tmp_path):
    """What the JSON says is enough: the network rebuilt in a few lines gives the same values."""
    net = ConvNet(ModeTree.binary(4), 3, 4, std=0.7, dtype=torch.float64)
    export_state(net, tmp_path / "net.safetensors")
    with safetensors.safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        layers = json.loads(file.metadata()["network"])["layers"]
        state = {key: file.get_tensor(key) for key in file.keys()}
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    values = {}
    for layer in layers:
        parts = zip(layer["nodes"], layer["children"], state[layer["weight"]], strict=True)
        for node, children, weight in parts:
            given = x[:, :, int(node)] if not children else 1
            for child in children:
                given = given * values[child]
            values[node] = given @ weight
    assert torch.allclose(values[str(net.tree.root)][:, 0], net(x))


class Branching(torch.nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


def test_networks_that_cannot_be_traced(tmp_path):
    with pytest.raises(OptionError, match="cannot export this network with a dynamic batch"):
        export_pt2(Branching(), tmp_path / "x.pt2", example=torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(tmp_path):
    with pytest.raises(OptionError, match="found Linear; give a ConvNet"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path / "x.onnx")
    with pytest.raises(OptionError, match="two samples or more"):
        export_pt2(torch.nn.Linear(2, 2), tmp_path / "x.pt2", example=torch.zeros(1, 2))
    complex_net = to_cnn(zoo.model_of(ModeTree.binary(4), dtype=torch.complex128))
    with pytest.raises(OptionError, match="ONNX has no complex numbers; export_pt2"):
        export_onnx(complex_net, tmp_path / "x.onnx")
    random_tree = ConvNet(ModeTree([[0, 3], [1, 2]]), 3, 4, outputs=5)
    with pytest.raises(OptionError, match="give example=images"):
        export_onnx(ConvAC(Representation(3), random_tree), tmp_path / "x.onnx")
    with pytest.raises(OptionError, match="found Linear"):
        export_state(torch.nn.Linear(2, 2), tmp_path / "x.safetensors")
    with pytest.raises(OptionError, match=r"does not take the example of shapes \[\(2, 3, 5\)\]"):
        export_pt2(torch.nn.Linear(2, 2), tmp_path / "x.pt2", example=torch.zeros(2, 3, 5))
    huge = ConvNet(ModeTree.grid((8, 8)), 3, 4, std=1e30, scaled=False)
    with pytest.raises(DataError, match="leave the range of torch.float32 on random inputs"):
        export_pt2(huge, tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_other_values_is_not_written(tmp_path, monkeypatch):
    import tnreg.cnns.export as export

    monkeypatch.setattr(export, "_TOLERANCE", -1.0)
    with pytest.raises(DataError, match="would give other values than the network"):
        export_pt2(NETWORKS["deep"], tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_complex_networks_are_exported_by_torch(tmp_path):
    net = to_cnn(zoo.model_of(ModeTree.binary(4), dtype=torch.complex128, sizes=(3, 3, 3, 3)))
    export_pt2(net, tmp_path / "net.pt2")
    x = torch.randn(5, 3, 4, dtype=torch.complex128)
    assert torch.allclose(torch.export.load(tmp_path / "net.pt2").module()(x), net(x))
