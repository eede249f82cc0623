"""Real tensors: those of the wheel, files of every kind, and files that are not what they say."""

import pickle
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from refusals import Bomb

import tnreg
from tnreg import DataError, FileError, ModeTree, OptionError, load_tensor, open_tensor
from tnreg.tensors.loading import DATASETS

h5py, zarr = pytest.importorskip("h5py"), pytest.importorskip("zarr")


@pytest.mark.parametrize(("name", "shape", "missing"), [
    ("kinetic", (64, 12, 10, 60), 1754), ("il2", (13, 4, 12, 8), 192),
    ("covid19", (438, 6, 11), 0), ("indian-pines", (145, 145, 200), 0),
])  # fmt: skip
def test_datasets(name, shape, missing):
    found = load_tensor(name)
    assert tuple(found.values.shape) == shape and found.missing == missing
    assert found.values.dtype == torch.float64 and len(found.modes) == len(shape)
    assert found.name == name and found.source == DATASETS[name]
    known = found.values[~torch.isnan(found.values)]
    assert torch.isfinite(known).all() and known.std() > 0


def test_files(tmp_path):
    array = np.random.default_rng(0).standard_normal((2, 3, 4))
    tensor = torch.from_numpy(array)
    np.save(tmp_path / "a.npy", array)
    np.save(tmp_path / "big.npy", array.astype(">f4"))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(array))
    np.savez(tmp_path / "one.npz", x=array)
    np.savez(tmp_path / "two.npz", x=array, y=2 * array)
    safetensors.torch.save_file({"x": tensor, "y": 2 * tensor}, tmp_path / "two.safetensors")
    torch.save(tensor, tmp_path / "t.pt")
    torch.save({"x": tensor, "y": 2 * tensor, "note": 3}, tmp_path / "d.pt")
    for name in "a.npy fortran.npy one.npz two.npz:x two.safetensors:x t.pt d.pt:x".split():
        found = load_tensor(str(tmp_path / name))
        assert torch.equal(found.values, tensor) and found.modes == ("mode 0", "mode 1", "mode 2")
    assert torch.equal(load_tensor(f"{tmp_path}/two.npz:y").values, 2 * tensor)
    assert torch.allclose(load_tensor(tmp_path / "big.npy").values.double(), tensor, rtol=1e-6)
    for name in ("two.npz", "two.safetensors", "d.pt"):
        with pytest.raises(FileError, match="holds 2; arrays there: x, y\n  name one of them"):
            load_tensor(tmp_path / name)
    with pytest.raises(FileError, match="no array 'z' in .*; arrays there: x, y"):
        load_tensor(f"{tmp_path}/two.npz:z")


def test_objects_are_not_loaded(tmp_path):
    bomb = Bomb(tmp_path / "executed")
    np.save(tmp_path / "o.npy", np.array([bomb], dtype=object), allow_pickle=True)
    torch.save([bomb], tmp_path / "o.pt")
    for name in ("o.npy", "o.pt"):
        with pytest.raises(FileError, match="it holds Python objects, which are not loaded"):
            load_tensor(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(FileError, match="holds a list"):
        load_tensor(tmp_path / "list.pt")


def test_refuses(tmp_path):
    np.save(tmp_path / "i.npy", np.arange(6))
    with pytest.raises(DataError, match="dtype torch.int64; real or complex"):
        load_tensor(tmp_path / "i.npy")
    with pytest.raises(FileError, match="no such tensor: nothing.npy\n  by name: kinetic, il2"):
        load_tensor("nothing.npy")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(FileError, match="cannot tell what .* is from its ending '.csv'"):
        load_tensor(tmp_path / "x.csv")


def test_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorly", None)
    monkeypatch.setitem(sys.modules, "tensorly.datasets", None)
    with pytest.raises(OptionError, match=r"pip install 'tnreg\[data\]'"):
        load_tensor("il2")


@pytest.fixture
def stored(tmp_path):
    """The same array in four places, and how to name it."""
    x = np.arange(2 * 3 * 4 * 5, dtype=np.float64).reshape(2, 3, 4, 5)
    np.save(tmp_path / "x.npy", x)
    zarr.create_array(str(tmp_path / "x.zarr"), data=x, chunks=(1, 3, 2, 5))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("fields/u", data=x, chunks=(1, 3, 2, 5))
        file["other"] = x[0]
    zarr.create_group(str(tmp_path / "g.zarr")).create_array("a", data=x, chunks=(2, 3, 2, 5))
    return x, tmp_path


@pytest.mark.parametrize("name", ["x.npy", "x.zarr", "x.h5:fields/u", "g.zarr", "g.zarr:a"])
def test_open_tensor(stored, name):
    x, folder = stored
    array = open_tensor(f"{folder}/{name}")
    assert array.shape == x.shape and array.dtype == x.dtype
    assert np.array_equal(array[:, 1].compute(), x[:, 1])
    again = pickle.loads(pickle.dumps(array))  # as it is sent to a worker
    assert np.array_equal(again.compute(), x)
    ranks = [tnreg.hierarchical_rank(y, ModeTree.binary(4)) for y in (array, x)]
    assert ranks[0] == ranks[1]


def test_open_tensor_refuses(stored, monkeypatch):
    _, folder = stored
    (folder / "bad.h6").touch()
    (folder / "bad.h5").write_bytes(b"no file of that kind")
    (folder / "bad.npy").write_bytes(b"neither")
    np.save(folder / "objects.npy", np.array([{}], dtype=object))
    (folder / "bad.zarr").mkdir()
    for message, *names in (
        (r"no such tensor on disk: .*y\.zarr", "y.zarr"),
        ("no such tensor on disk", "bad.h6"),
        (r"holds 2; arrays there: fields/u, other\n.*x.h5:NAME", "x.h5"),
        ("no array 'v' in .*; arrays there: fields/u, other", "x.h5:v"),
        ("one array without a name, not 'v'", "x.npy:v", "x.zarr:v"),
        ("not a readable", "bad.h5", "bad.npy", "objects.npy", "bad.zarr"),
    ):
        for name in names:
            with pytest.raises(FileError, match=message):
                open_tensor(f"{folder}/{name}")
    np.save(folder / "none.npy", np.zeros((0, 3)))
    with pytest.raises(DataError, match=r"none\.npy holds an empty tensor of shape \(0, 3\)"):
        load_tensor(folder / "none.npy")
    with pytest.raises(DataError, match=r"is empty[\s\S]*file: .*none\.npy"):
        open_tensor(folder / "none.npy")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(OptionError, match=r"needs h5py.*pip install 'tnreg\[scale\]'"):
        open_tensor(f"{folder}/x.h5:other")
