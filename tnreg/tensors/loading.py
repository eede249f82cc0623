"""Real tensors: files of one's own, in memory or on disk, and measured ones from ``tensorly``."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tnreg.errors import DataError, FileError, OptionError, TnregError, did_you_mean
from tnreg.machine.files import is_file, is_there, read_safetensors
from tnreg.tensors.arrays import as_tensor
from tnreg.tensors.blocks import as_blocks
from tnreg.tensors.tables import Entries, entries_of, is_table, known_entries, modes_of

Named = tuple[Any, tuple[str, ...]]  # an array or a table, and the names of its modes if it has them
Form = TypeVar("Form")


@dataclass(frozen=True, eq=False)
class DenseTensor:
    """A dense tensor, NaN where an entry was not measured, with what is known about it and its modes."""

    name: str
    values: Tensor
    modes: tuple[str, ...]
    source: str

    @property
    def missing(self) -> int:
        """Number of entries that are NaN."""
        return int(torch.isnan(self.values).sum())


DATASETS: Mapping[str, str] = {
    "kinetic": "fluorescence 64x12x10x60, 1,754 entries missing; Nikolajsen et al. 2003",
    "il2": "IL-2 responses 13x4x12x8, 192 entries missing; Orcutt-Jahns et al. 2021",
    "covid19": "COVID-19 serology 438x6x11; Zohar et al. 2020",
    "indian-pines": "hyperspectral image 145x145x200; Baumgardner et al. 2015",
}
_LOADERS = {  # functions of tensorly.datasets, and what the modes are
    "kinetic": ("load_kinetic", ("measurement", "emission", "excitation", "time")),
    "il2": ("load_IL2data", ("ligand", "time", "dose", "cell")),
    "covid19": ("load_covid19_serology", ("sample", "antigen", "receptor")),
    "indian-pines": ("load_indian_pines", ("row", "column", "band")),
}


def load_tensor(source: Any) -> DenseTensor:
    """Read a real tensor by name, from a file, or from an object of xarray or pandas.

    Args:
        source: One of ``DATASETS``, or the path of a ``.npy``, ``.npz``, ``.safetensors``, ``.pt``,
            ``.mat`` (MATLAB 5 and 7.3), ``.nc`` (NetCDF), ``.csv`` or ``.parquet`` file. A file with several
            arrays needs the name of one after a colon, ``"run.npz:target"``. Tables are in long form, with
            the columns of the index and ``value``, see ``tensors.tables``. Data sets and the formats from
            ``.mat`` on need the extra ``tnreg[data]``. Nothing in a file is executed. Or an
            ``xarray.DataArray``, or a table of pandas in long form.

    Returns:
        The tensor, its entries that were not measured NaN, in the dtype of the file (values of a table in
        double precision); its modes are named like the file's dimensions or columns, if these have names.

    Raises:
        FileError: No such name or file, or a file that is not what it says.
        DataError: Integer entries, or none; a table with an entry twice, or an index that is incomplete.
        SizeError: The dense tensor of a table would not fit into memory.
        OptionError: The extra is not installed.
    """
    name, origin, values, modes = _load(source, _dense)
    if not (values.is_floating_point() or values.is_complex()):
        raise DataError(
            f"{origin} has dtype {values.dtype}; real or complex numbers are needed.\n"
            "  convert it first, e.g. numpy.save(path, array.astype(float))"
        )
    if not values.numel():
        raise DataError(f"{origin} holds an empty tensor of shape {tuple(values.shape)}.")
    return DenseTensor(name, values, modes or tuple(f"mode {n}" for n in range(values.ndim)), origin)


def load_entries(source: str | os.PathLike[str]) -> Entries:
    """Read the known entries of a tensor, as ``load_tensor`` does, but for tables without the dense tensor.

    Integers become numbers in double precision, and an entry may be there twice.
    """
    _, _, entries, modes = _load(source, known_entries)
    return replace(entries, modes=modes or entries.modes)


def _dense(content: Any) -> Tensor:
    return entries_of(content).dense() if is_table(content) else as_tensor(content)


def _load(source: Any, form: Callable[[Any], Form]) -> tuple[str, str, Form, tuple[str, ...]]:
    """Return the name, where it is from, what ``form`` makes of its array or table, and names of modes."""
    if is_table(source):
        return "table", "pandas", form(source), modes_of(source)
    if hasattr(source, "dims"):
        return str(source.name or "array"), "xarray", form(source.to_numpy()), tuple(map(str, source.dims))
    text = os.fspath(source)
    if text in DATASETS:
        array, modes = _load_dataset(text)
        return text, DATASETS[text], form(array), modes
    path, key = _split(text, is_file)
    if not is_file(path):
        raise FileError(
            f"no such tensor: {text}\n{did_you_mean(text, DATASETS)}  by name: {', '.join(DATASETS)}\n"
            f"  or the path of a file: {', '.join(_READERS)}; by open_tensor: {', '.join(_LARGE)}"
        )
    if path.suffix not in _READERS:
        raise FileError(
            f"cannot tell what {path} is from its ending {path.suffix!r}.\n"
            f"  expected: one of {', '.join(_READERS)}; or, for open_tensor, {', '.join(_LARGE)}"
        )
    with _reading(path, "file of numbers", "data"):
        content, modes = _READERS[path.suffix](path, key)
        return path.stem, str(path), form(content), modes


def is_large_file(source: str | os.PathLike[str]) -> bool:
    """Return whether this names a file or folder that is made for reading in parts: zarr or HDF5."""
    name, _, _ = os.fspath(source).partition(":")
    return Path(name).suffix in _LARGE[:3] and is_there(name)


def open_tensor(source: str | os.PathLike[str]) -> Any:
    """Open a tensor on disk as a Dask array, which ``spectra``, ``decompose`` and others read block by block.

    Args:
        source: A ``.zarr`` folder, a ``.h5`` or ``.hdf5`` file, or a ``.npy`` file. Where there are several
            arrays the name of one comes after a colon, ``"run.h5:fields/u"``.

    Returns:
        A ``dask.array.Array``, see ``as_blocks``. It can be sent to the workers of a cluster that see
        the same path.

    Raises:
        FileError: No such file, or none of these, or an array of that name is not there.
        OptionError: The extra ``tnreg[scale]`` is not installed.
    """
    text = os.fspath(source)
    path, key = _split(text, is_there)
    if path.suffix not in _LARGE or not is_there(path):
        raise FileError(
            f"no such tensor on disk: {text}\n  expected: the path of a .zarr folder, or of a .h5, .hdf5 or "
            ".npy file; with several arrays PATH:NAME"
        )
    with _reading(path, "tensor", "scale"):
        return as_blocks(_Stored(path, key))


@contextlib.contextmanager
def _reading(path: Path, what: str, extra: str) -> Iterator[None]:
    """Turn whatever a reader raises into one error that names the file, or the extra that it needs."""
    try:
        yield
    except FileError:
        raise
    except TnregError as error:
        raise type(error)(f"{error}\n  file: {path}", argument=error.argument) from None
    except ImportError as error:
        missing = error.name or str(error)
        raise OptionError(
            f"reading {path.suffix} needs {missing}, which is not installed; pip install 'tnreg[{extra}]'"
        ) from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, pickle.UnpicklingError) or "pickle" in reason.lower():
            reason = "it holds Python objects, which are not loaded"
        raise FileError(f"not a readable {path.suffix} {what}: {path}\n  {reason}") from None


class _Stored:
    """An array in a file, opened where it is read: it can be sent to other processes."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path.absolute(), key
        with self._open() as array:
            self.shape, self.dtype = tuple(array.shape), array.dtype
            self.chunks = getattr(array, "chunks", None)
        self.ndim = len(self.shape)

    def __getitem__(self, part: Any) -> np.ndarray[Any, Any]:
        with self._open() as array:
            return np.require(array[part], requirements="W")  # torch warns of arrays that are not

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        if self.path.suffix == ".npy":
            yield self._pick(np.load(self.path, mmap_mode="r", allow_pickle=False), np.ndarray)
        elif self.path.suffix == ".zarr":
            import zarr

            yield self._pick(zarr.open(str(self.path), mode="r"), zarr.Array)
        else:
            import h5py

            with h5py.File(self.path, "r") as file:
                yield self._pick(file, h5py.Dataset)

    def _pick(self, content: Any, kind: Any) -> Any:
        if isinstance(content, kind):
            if self.key:
                raise FileError(f"{self.path} holds one array without a name, not {self.key!r}")
            return content
        if not isinstance(self.key and _linked(content, self.key), kind):
            # a name that is known is not looked for again among thousands
            self.key = _choose(self.path, self.key, _arrays_in(content, kind))
        return content[self.key]


def _arrays_in(group: Any, kind: Any) -> list[str]:
    """List the arrays of a file by their path, those of a group that links lead to again once."""
    names, seen, waiting = list[str](), {getattr(group, "id", "")}, [(group, "")]
    while waiting:
        group, before = waiting.pop()
        for name in group:
            item = _linked(group, name)
            if isinstance(item, kind):
                names.append(before + name)
            elif hasattr(item, "keys") and (known := getattr(item, "id", before + name)) not in seen:
                seen.add(known)
                waiting.append((item, f"{before}{name}/"))
    return sorted(names)


def _linked(group: Any, name: str) -> Any:
    """Return what has this name in a group; ``None`` for a link that leads nowhere."""
    with contextlib.suppress(KeyError, OSError, RuntimeError):
        return group[name]
    return None


def _load_dataset(name: str) -> Named:
    try:
        import tensorly.datasets
    except ImportError:
        raise OptionError(
            f"the tensor {name!r} is part of tensorly, which is not installed; pip install 'tnreg[data]'"
        ) from None
    loader, modes = _LOADERS[name]
    bunch = getattr(tensorly.datasets, loader)()
    values = np.array(bunch["tensor"], dtype=np.float64)
    if "missing_values_position" in bunch:  # the wheel has zeros there and a mask beside
        values[np.asarray(bunch["missing_values_position"], dtype=bool)] = np.nan
    return values, modes


def _read_npy(path: Path, key: str) -> Named:
    _choose(path, key, [path.stem])
    with path.open("rb") as raw:
        return np.load(raw, allow_pickle=False), ()


def _read_npz(path: Path, key: str) -> Named:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not a zip archive")
    # opened here: numpy leaves a file open that it cannot read
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        return file[_choose(path, key, file.files)], ()


def _read_safetensors(path: Path, key: str) -> Named:
    tensors = read_safetensors(path)[1]
    return tensors[_choose(path, key, list(tensors))], ()


def _read_pt(path: Path, key: str) -> Named:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Tensor):
        content = {path.stem: content}
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a tensor or a dict of tensors")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return tensors[_choose(path, key, list(tensors))], ()


def _read_mat(path: Path, key: str) -> Named:
    from scipy.io import loadmat

    try:
        with path.open("rb") as raw:
            arrays = loadmat(raw)
            numbers = [name for name, array in arrays.items() if _kind(array) in "fciub"]
            name = _choose(path, key, numbers)
            if _kind(arrays[name]) in "iu":  # perhaps doubles, packed; this would lose imaginary parts
                arrays = loadmat(raw, mat_dtype=True, variable_names=[name])
    except NotImplementedError:  # version 7.3
        return _read_mat73(path, key), ()
    array = arrays[name]
    return array.toarray() if hasattr(array, "toarray") else array, ()


def _kind(array: Any) -> str:
    return str(getattr(array, "dtype", np.dtype(object)).kind)


def _read_mat73(path: Path, key: str) -> np.ndarray[Any, Any]:
    """Read an HDF5 file of MATLAB, which stores axes in reverse order and complex numbers as pairs."""
    import h5py

    with h5py.File(path, "r") as file:
        names = [name for name in _arrays_in(file, h5py.Dataset) if not name.startswith("#")]
        numbers = [n for n in names if file[n].attrs.get("MATLAB_class") != b"char"]
        array = file[_choose(path, key, numbers)][()]
    if array.dtype.names:
        array = array["real"] + 1j * array["imag"]
    return np.asarray(array.T)


def _read_nc(path: Path, key: str) -> Named:
    import xarray

    with xarray.open_dataset(path) as file:
        array = file[_choose(path, key, list(map(str, file.data_vars)))]
        return array.to_numpy(), tuple(map(str, array.dims))


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return math.isfinite(float(text))
    return False


def _read_table(path: Path, key: str) -> Named:
    import pandas

    _choose(path, key, [path.stem])
    # arrow reads every digit of a number in text; pandas itself did not before version 3
    read: Any = pandas.read_csv if path.suffix == ".csv" else pandas.read_parquet
    table = read(path, engine="pyarrow")
    table = table[[name for name in table if not str(name).startswith("Unnamed: ")]]  # row numbers
    if not is_table(table) or any(map(_is_number, table)):
        raise ValueError(
            "it is no table in long form: names of columns, then a row for every entry with its index "
            "(integers, text or dates) and last its value"
        )
    return table, modes_of(table)


def _split(source: str, exists: Callable[[str], bool]) -> tuple[Path, str]:
    """Split ``PATH:NAME`` into the path and the name of an array in it, ``""`` if there is none."""
    name, _, key = source.partition(":") if not exists(source) else (source, "", "")
    return Path(name), key


def _choose(path: Path, key: str, names: list[str]) -> str:
    """Return the name of the array that is meant."""
    if key in names or (not key and len(names) == 1):
        return key or names[0]
    problem = f"no array {key!r} in {path}" if key else f"{path} holds {len(names)}"
    listed = ", ".join(names[:20]) + f" and {len(names) - 20} more" * (len(names) > 20) or "none"
    raise FileError(f"{problem}; arrays there: {listed}\n  name one of them: {path}:NAME")


_READERS: dict[str, Callable[[Path, str], Named]] = {
    ".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors, ".pt": _read_pt,
    ".mat": _read_mat, ".nc": _read_nc, ".csv": _read_table, ".parquet": _read_table,
}  # fmt: skip
_LARGE = (".zarr", ".h5", ".hdf5", ".npy")
