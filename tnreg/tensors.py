"""Real tensors: files of one's own, and measured ones that the ``tensorly`` wheel brings along."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from tnreg.errors import DataError, FileError, OptionError
from tnreg.rank import as_tensor

__all__ = ["DATASETS", "DenseTensor", "load_tensor"]


@dataclass(frozen=True, eq=False)
class DenseTensor:
    """A dense tensor with what is known about it.

    Attributes:
        name: Short name, for titles.
        values: The numbers; NaN where an entry was not measured.
        modes: What each mode is, ``"mode n"`` if nothing is known.
        source: Where it comes from.
    """

    name: str
    values: Tensor
    modes: tuple[str, ...]
    source: str

    @property
    def missing(self) -> int:
        """Number of entries that are NaN."""
        return int(torch.isnan(self.values).sum())


# name -> (function of tensorly.datasets, what the modes are, description)
_LOADERS = {
    "kinetic": (
        "load_kinetic",
        ("measurement", "emission", "excitation", "time"),
        "fluorescence 64x12x10x60, 1,754 entries missing; Nikolajsen et al. 2003",
    ),
    "il2": (
        "load_IL2data",
        ("ligand", "time", "dose", "cell"),
        "IL-2 responses 13x4x12x8, 192 entries missing; Orcutt-Jahns et al. 2021",
    ),
    "covid19": (
        "load_covid19_serology",
        ("sample", "antigen", "receptor"),
        "COVID-19 serology 438x6x11; Zohar et al. 2020",
    ),
    "indian-pines": (
        "load_indian_pines",
        ("row", "column", "band"),
        "hyperspectral image 145x145x200; Baumgardner et al. 2015",
    ),
}
DATASETS: Mapping[str, str] = {name: about for name, (_, _, about) in _LOADERS.items()}


def load_tensor(source: str | os.PathLike[str]) -> DenseTensor:
    """Read a real tensor by name, or a file.

    Args:
        source: One of ``DATASETS`` (needs the extra ``tnreg[data]``), or the path of a ``.npy``,
            ``.npz``, ``.safetensors`` or ``.pt`` file. A file with several arrays needs the name of
            one after a colon, ``"run.npz:target"``. Nothing in a file is executed.

    Returns:
        The tensor, its entries that were not measured NaN, in the dtype of the file.

    Raises:
        FileError: No such name or file, or a file that is not what it says.
        DataError: Integer entries.
        OptionError: The extra is not installed.
    """
    text = os.fspath(source)
    if text in DATASETS:
        return _load_dataset(text)
    name, _, key = text.partition(":") if not Path(text).exists() else (text, "", "")
    path = Path(name)
    if not path.is_file():
        raise FileError(
            f"no such tensor: {text}\n"
            f"  by name: {', '.join(DATASETS)}\n"
            "  or the path of a .npy, .npz, .safetensors or .pt file"
        )
    if path.suffix not in _READERS:
        raise FileError(
            f"cannot tell what {path} is from its ending {path.suffix!r}.\n"
            f"  expected: one of {', '.join(_READERS)}"
        )
    try:
        arrays = _READERS[path.suffix](path)
    except Exception as error:
        reason = (
            "it holds Python objects, which are not loaded" if _is_pickle(error) else str(error)
        )
        raise FileError(
            f"not a readable {path.suffix} file of numbers: {path}\n  {reason or type(error).__name__}"
        ) from None
    if key and key not in arrays:
        raise FileError(f"no array {key!r} in {path}; it holds: {', '.join(arrays) or 'none'}")
    if not key and len(arrays) != 1:
        listed = ", ".join(arrays) or "none"
        raise FileError(
            f"{path} holds {len(arrays)} arrays: {listed}\n  name one of them: {path}:NAME"
        )
    values = arrays[key or next(iter(arrays))]
    if not (values.is_floating_point() or values.is_complex()):
        raise DataError(
            f"{path} has dtype {values.dtype}; real or complex numbers are needed.\n"
            "  convert it first, e.g. numpy.save(path, array.astype(float))"
        )
    modes = tuple(f"mode {n}" for n in range(values.ndim))
    return DenseTensor(path.stem, values, modes, str(path))


def _load_dataset(name: str) -> DenseTensor:
    try:
        import tensorly.datasets
    except ImportError:
        raise OptionError(
            f"the tensor {name!r} is part of tensorly, which is not installed; pip install 'tnreg[data]'"
        ) from None
    loader, modes, about = _LOADERS[name]
    bunch = getattr(tensorly.datasets, loader)()
    values = np.array(bunch["tensor"], dtype=np.float64)
    if "missing_values_position" in bunch:  # the wheel has zeros there and a mask beside
        values[np.asarray(bunch["missing_values_position"], dtype=bool)] = np.nan
    return DenseTensor(name, torch.from_numpy(values), modes, about)


def _read_npy(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as raw:
        return {path.stem: as_tensor(np.load(raw, allow_pickle=False))}


def _read_npz(path: Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not a zip archive")
    # opened here: numpy leaves a file open that it cannot read
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        return {key: as_tensor(file[key]) for key in file.files}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}


def _read_pt(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Tensor):
        return {path.stem: as_tensor(content)}
    if isinstance(content, dict):
        return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    raise ValueError(f"it holds a {type(content).__name__}, not a tensor or a dict of tensors")


def _is_pickle(error: Exception) -> bool:
    return isinstance(error, pickle.UnpicklingError) or "pickle" in str(error).lower()


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_pt,
}
