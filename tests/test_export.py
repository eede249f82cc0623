"""Networks written as ONNX, torch.export programs and plain weights, read by processes without tnreg."""

import json
import math
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import zoo

from tnreg import ConvAC, ConvNet, Factorization, ModeTree, Representation, to_cnn
from tnreg.cnns import export
from tnreg.cnns.export import example_inputs, export_onnx, export_pt2, export_state
from tnreg.errors import DataError, FileError, OptionError
from tnreg.machine.files import read_safetensors

pytestmark = pytest.mark.slow


def networks():
    random, grid = zoo.random(), ModeTree.grid((4, 4))
    deep = ConvNet(grid, 3, 4, share=True, std=0.7, generator=random)
    uneven = to_cnn(zoo.bare_model(zoo.TREES["uneven"], "full", {1: "bare", 3: "bare"}))
    representation = Representation(3, kind="gaussian", patch=(2, 2), generator=random)
    classifier = ConvAC(representation, ConvNet(grid, 3, 4, outputs=5))
    classifier.start_averaging_(generator=random)
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
@pytest.mark.parametrize(("kind", "write"), [("onnx", export_onnx), ("pt2", export_pt2)])
def test_files_give_the_same_values_without_tnreg(tmp_path, name, kind, write):
    net, path = NETWORKS[name], tmp_path / f"net.{kind}"
    assert write(net, path) == path
    inputs = example_inputs(net, batch=7)
    dtype = torch.float32 if kind == "onnx" else next(net.parameters()).dtype
    parts = [inputs] if isinstance(inputs, torch.Tensor) else inputs
    np.savez(tmp_path / "inputs.npz", *[x.to(dtype).numpy() for x in parts])
    subprocess.run([sys.executable, "-c", OTHERS, tmp_path, kind], check=True)
    found = torch.from_numpy(np.load(tmp_path / "found.npy"))
    wanted = net(inputs).detach().to(dtype)
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "inputs.npz", "found.npy"}


@pytest.mark.parametrize("shape", [(4, 2), (2, 2), (3, 5)])
def test_exported_grids_take_images(tmp_path, shape):
    """Also where filters are of the usual small size, so that values leave the range of floats."""
    import onnxruntime

    net = to_cnn(Factorization(ModeTree.grid(shape), 3, 4))
    path = str(export_onnx(net, tmp_path / "net.onnx"))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [3, *shape]
    x = 1e3 * torch.randn(1, 3, *shape)
    [found] = session.run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), net(x), rtol=1e-4) and found != 0


def read_state(net, path):
    export_state(net, path)
    metadata, state = read_safetensors(path)
    return json.loads(metadata["network"])["layers"], state


@pytest.mark.parametrize("name", NETWORKS)
def test_plain_weights_name_their_layers(tmp_path, name):
    net = NETWORKS[name]
    layers, state = read_state(net, tmp_path / "net.safetensors")
    inner = net.net if name == "classifier" else net
    assert set(state) == set(net.state_dict()) >= {layer["weight"] for layer in layers}
    named = [(node, layer["layer"]) for layer in layers for node in layer["nodes"]]
    assert sorted(named) == sorted((str(v), inner.layer_of(v)) for v in inner.weights)


def test_a_network_by_hand_from_plain_weights(tmp_path):
    """What the JSON says is enough: the network rebuilt in a few lines gives the same values."""
    net = to_cnn(zoo.model_of(ModeTree.binary(4), sizes=3, bonds=4))
    layers, state = read_state(net, tmp_path / "net.safetensors")
    x = zoo.randn(6, 3, 4)
    values = {}
    for layer in layers:
        parts = zip(layer["nodes"], layer["children"], state[layer["weight"]], strict=True)
        for node, children, weight in parts:
            factors = [values[child] for child in children] or [x[:, :, int(node)]]
            values[node] = math.prod(factors) @ weight
    assert torch.allclose(values[str(net.tree.root)][:, 0], net(x))


class Branching(torch.nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


LINEAR = torch.nn.Linear(2, 2)
COMPLEX = to_cnn(zoo.model_of(ModeTree.binary(4), dtype=torch.complex128, sizes=(3, 3, 3, 3)))
SCATTERED = ConvAC(Representation(3), ConvNet(ModeTree([[0, 3], [1, 2]]), 3, 4, outputs=5))
HUGE = ConvNet(ModeTree.grid((8, 8)), 3, 4, std=1e30, scaled=False)
REFUSED = [
    (export_onnx, LINEAR, {}, OptionError, "found Linear; give a ConvNet"),
    (export_onnx, COMPLEX, {}, OptionError, "ONNX has no complex numbers; export_pt2"),
    (export_onnx, SCATTERED, {}, OptionError, "give example=images"),
    (export_state, LINEAR, {}, OptionError, "found Linear"),
    (export_pt2, LINEAR, {"example": torch.zeros(1, 2)}, OptionError, "two samples or more"),
    (export_pt2, LINEAR, {"example": torch.zeros(2, 3, 5)}, OptionError,
     r"does not take the example of shapes \[\(2, 3, 5\)\]"),
    (export_pt2, HUGE, {}, DataError, "leave the range of torch.float32 on random inputs"),
    (export_pt2, Branching(), {"example": torch.ones(2, 3)}, OptionError,
     "cannot export this network with a dynamic batch"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "net", "options", "error", "message"), REFUSED)
def test_what_is_refused(tmp_path, write, net, options, error, message):
    with pytest.raises(error, match=message):
        write(net, tmp_path / "x", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_other_values_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_TOLERANCE", -1.0)
    with pytest.raises(DataError, match="would give other values than the network"):
        export_pt2(NETWORKS["deep"], tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [export_onnx, export_pt2, export_state])
def test_a_full_disk_is_told(tmp_path, write):
    """Torch's own writer of programs would end the process."""
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, kept[1][1]))
        with pytest.raises(FileError, match="cannot write"):
            write(NETWORKS["deep"], tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept[1])
        signal.signal(signal.SIGXFSZ, kept[0])
    assert list(tmp_path.iterdir()) == []


CONVOLVED = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten())


@pytest.mark.parametrize(("net", "x", "options"), [
    (COMPLEX, torch.randn(5, 3, 4, dtype=torch.complex128), {}),
    (CONVOLVED, torch.randn(3, 1, 5, 5), {"example": torch.randn(2, 1, 5, 5)}),
])  # fmt: skip
def test_complex_networks_and_modules_of_ones_own_are_exported_by_torch(tmp_path, net, x, options):
    loaded = torch.export.load(export_pt2(net, tmp_path / "net.pt2", **options)).module()
    assert torch.allclose(loaded(x), net(x), rtol=1e-5)
