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
from tnreg.cli import main
from tnreg.tensors.loading import DATASETS

h5py, zarr = pytest.importorskip("h5py"), pytest.importorskip("zarr")
pd, xarray = pytest.importorskip("pandas"), pytest.importorskip("xarray")


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
    (tmp_path / "x.txt").write_text("1,2")
    known = r"npy, .npz, .safetensors, .pt, .mat, .nc, .csv, .parquet; or, for open_tensor, .zarr, .h5, .hdf5"
    with pytest.raises(FileError, match=f"cannot tell what .* is from its ending '.txt'.\n  .*{known}"):
        load_tensor(tmp_path / "x.txt")


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


# Files of other programs, and tables


ARRAY = np.random.default_rng(0).standard_normal((2, 3, 4))


def write_mat73(path, **arrays):
    """Write what MATLAB 7.3 writes: HDF5 behind 512 bytes of its own, axes in reverse order."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            pairs = np.stack([array.real, array.imag], -1) @ np.eye(2)
            pairs = pairs.view([("real", float), ("imag", float)])[..., 0]
            file[name] = (pairs if np.iscomplexobj(array) else array).T
            file[name].attrs["MATLAB_class"] = np.bytes_("char" if array.dtype == np.uint16 else "double")
    head = b"MATLAB 7.3 MAT-file".ljust(116) + bytes(8) + b"\x00\x02IM"
    with open(path, "r+b") as file:
        file.write(head)


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_matlab(version, tmp_path):
    from scipy.io import savemat

    arrays = {"x": ARRAY, "z": ARRAY * 1j + 1, "name": np.array([[65, 66]], dtype=np.uint16)}
    if version == "5":
        savemat(tmp_path / "a.mat", {**arrays, "name": "AB", "cell": {"inside": 1.0}})
        savemat(tmp_path / "packed.mat", {"x": np.arange(6).reshape(2, 3)}, format="4")  # doubles, as int64
        assert load_tensor(tmp_path / "packed.mat").values.tolist() == [[0.0, 1, 2], [3, 4, 5]]
    else:
        write_mat73(tmp_path / "a.mat", **arrays)
    for name in "xz":
        assert np.array_equal(load_tensor(f"{tmp_path}/a.mat:{name}").values, arrays[name])
    with pytest.raises(FileError, match="holds 2; arrays there: x, z\n"):
        load_tensor(tmp_path / "a.mat")


@pytest.mark.parametrize("engine", ["scipy", "h5netcdf"])
@pytest.mark.filterwarnings("ignore:numpy.ndarray size changed")
def test_netcdf(engine, tmp_path, capsys):
    gaps = ARRAY.copy()
    gaps[1, 2, 3] = np.nan
    field = xarray.DataArray(gaps, dims=["lat", "lon", "time"], name="t", coords={"lat": [10.0, 20.0]})
    field.to_netcdf(tmp_path / "a.nc", engine=engine, encoding={"t": {"_FillValue": -999.0}})
    found = load_tensor(tmp_path / "a.nc")
    assert np.array_equal(found.values, gaps, equal_nan=True) and found.missing == 1
    assert found.modes == load_tensor(field).modes == ("lat", "lon", "time")
    assert np.array_equal(load_tensor(field).values, gaps, equal_nan=True) and load_tensor(field).name == "t"
    main(["rank", str(tmp_path / "a.nc"), "--missing", "nan", "--png", str(tmp_path / "ranks.png")])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("0 lat", "1 lon", "2 time"))
    main(["decompose", str(tmp_path / "a.nc"), "--missing", "nan"])
    assert "2 time" in capsys.readouterr().out
    task = tnreg.completion(field, 20, missing="nan")
    assert len(task.values) + len(task.test_values) == 23


def long_form(**kinds):
    """Return a table of all entries but one, in mixed order."""
    rows, columns, times = (part.ravel() for part in np.indices(ARRAY.shape))
    table = pd.DataFrame({"user": rows, "item": columns, "time": times, "value": ARRAY.ravel()})
    return table.astype(kinds).iloc[1:].sample(frac=1, random_state=0)


def test_tables_are_tensors():
    found = load_tensor(long_form())
    assert found.missing == 1 and found.modes == ("user", "item", "time")
    assert np.array_equal(found.values.flatten()[1:], ARRAY.flatten()[1:])


LABELS = {
    "integers": lambda table: table,
    "text": lambda table: table.assign(item=table["item"].map(["a", "b", "c"].__getitem__)),
    "dates": lambda table: table.assign(
        time=pd.Timestamp("2020-02-27") + pd.to_timedelta(table["time"], "D")),
    "negative": lambda table: table.assign(user=table["user"] - 7, time=table["time"] - 1.5),
    "categories": lambda table: table.assign(
        item=pd.Categorical.from_codes(table["item"], categories=["low", "middle", "high"])),
    "nullable": lambda table: table.astype({"user": "Int64", "value": "Float64"}),
    "arrow": lambda table: table.astype({"user": "int64[pyarrow]", "value": "double[pyarrow]"}),
    "values first": lambda table: table[["value", "user", "item", "time"]],
    "levels": lambda table: table.set_index(["user", "item", "time"]),
    "series": lambda table: table.set_index(["user", "item", "time"])["value"].rename("score"),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_tables(name, tmp_path):
    table = LABELS[name](long_form())
    task = tnreg.completion(table)
    assert task.sizes == (2, 3, 4) and len(task.values) == 23 and task.test_index is None
    assert torch.equal(task.values, torch.from_numpy(ARRAY)[tuple(task.index.T)])
    drawn = tnreg.completion(table, 0.5, seed=1)
    both = torch.cat([drawn.index, drawn.test_index])
    assert len(drawn.values) == 12 and len(both.unique(dim=0)) == 23
    if name != "series":
        table.reset_index(drop=name != "levels").to_parquet(tmp_path / "a.parquet")
        table.to_csv(tmp_path / "a.csv", index=name == "levels")
        for suffix in ("parquet", "csv") if name != "categories" else ("parquet",):
            found = load_tensor(tmp_path / f"a.{suffix}")
            assert found.missing == 1 and torch.isnan(found.values[0, 0, 0])
            assert np.array_equal(found.values.ravel()[1:], ARRAY.ravel()[1:])
            assert found.modes == ("user", "item", "time")


def test_missing_values_in_a_table():
    table = long_form(value="Float64")
    table.loc[5, "value"] = pd.NA
    with pytest.raises(DataError, match="1 NaN entries of 23"):
        tnreg.completion(table)
    task = tnreg.completion(table, missing="nan")
    assert len(task.values) == 22 and torch.equal(task.values, torch.from_numpy(ARRAY)[tuple(task.index.T)])
    counts = tnreg.completion(long_form().assign(value=3))  # ratings and counts are numbers
    assert counts.values.dtype == torch.float64 and bool((counts.values == 3).all())


def test_row_numbers_in_a_table_are_no_mode(tmp_path):
    long_form().reset_index(drop=True).to_csv(tmp_path / "a.csv")
    assert load_tensor(tmp_path / "a.csv").modes == ("user", "item", "time")


def test_a_matrix_is_no_table(tmp_path):
    matrix = pd.DataFrame(ARRAY[0], columns=list("abcd"))
    assert tnreg.completion(matrix, 6).sizes == (3, 4)
    for text in ("a,b\n0.5,0.25\n", "1,2,3\n4,5,6\n", "a\n1\n"):
        (tmp_path / "m.csv").write_text(text)
        with pytest.raises(FileError, match="not a readable .csv file of numbers: .*\n  it is no table"):
            load_tensor(tmp_path / "m.csv")


def test_tables_that_are_refused():
    table = long_form()
    for wrong, message in (
        (pd.concat([table, table[:1]]), "twice: .*'user': .*, again in row 23"),
        (table.assign(item=table["item"].where(table.index > 4)), "column 'item' is an index, and 4 of its"),
        (table.assign(value="a"), "not a tensor of numbers"), (table[:0], "has no rows"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            tnreg.completion(wrong)


def test_a_table_is_not_made_dense_beyond_memory(tmp_path):
    pd.DataFrame({"i": [0, 10**6], "j": [10**6, 0], "value": [1.0, 2.0]}).to_csv(
        tmp_path / "a.csv", index=False
    )
    with pytest.raises(tnreg.SizeError, match=r"completion\(table\)"):
        load_tensor(tmp_path / "a.csv")


# HDF5 files with links, and with many arrays


LINKS = {
    "dead soft link": lambda file: file.__setitem__("dead", h5py.SoftLink("/nowhere")),
    "missing file": lambda file: file.__setitem__("far", h5py.ExternalLink("no.h5", "/x")),
    "link to the root": lambda file: file.__setitem__("again", h5py.SoftLink("/")),
    "group in itself": lambda file: file["g"].__setitem__("up", file["g"]),
}


@pytest.mark.parametrize("array", ["x", "g/x"])
@pytest.mark.parametrize("name", LINKS)
def test_links(name, array, tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_group("g")
        file[array] = ARRAY
        LINKS[name](file)
    for text in (f"{path}:{array}", str(path)):
        assert np.array_equal(open_tensor(text).compute(), ARRAY)
    with pytest.raises(FileError, match=f"no array 'dead' .*; arrays there: {array}\n"):
        open_tensor(f"{path}:dead")


@pytest.mark.parametrize("kind", ["h5", "zarr", "npz"])
def test_one_array_among_many(kind, tmp_path, monkeypatch):
    path = tmp_path / f"a.{kind}"
    arrays = {"x": ARRAY, **{f"log{i}": np.zeros(1) for i in range(30)}, "objects": np.array([{}])}
    if kind == "npz":
        np.savez(path, **arrays)
        assert np.array_equal(load_tensor(f"{path}:x").values, ARRAY)
    else:
        opened = h5py.File(path, "w") if kind == "h5" else zarr.open_group(str(path), mode="w")
        for name in list(arrays)[:-1]:
            opened.create_dataset(name, data=arrays[name]) if kind == "h5" else opened.create_array(
                name, data=arrays[name]
            )
        if kind == "h5":
            opened.close()
        with monkeypatch.context() as patch:
            patch.setattr("tnreg.tensors.loading._arrays_in", None)
            assert np.array_equal(open_tensor(f"{path}:x").compute(), ARRAY)
    with pytest.raises(FileError, match="log1.* and 1[12] more"):
        (load_tensor if kind == "npz" else open_tensor)(f"{path}:y")
