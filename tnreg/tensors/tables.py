"""Tensors in long form: a pandas table with one row for every entry that was measured, its index and value.

The column ``value`` holds the values and every other one is a mode. Without one of that name it is the last
column, and the others may not be real numbers: a table of real numbers is a matrix. In a mode's column
integers from 0 on are taken as they are, categories in their order, and anything else (text, dates, numbers)
is numbered in sorted order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import DataError, ShapeError
from tnreg.machine.memory import available, does_not_fit
from tnreg.tensors.arrays import as_tensor


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of a tensor.

    Attributes:
        index: ``(B, N)`` int64.
        values: ``(B,)``, NaN where there is none.
        sizes: Size of every mode.
        modes: Names of the columns, or of the axes of an array.
        labels: For every mode of a table what stands there for 0, 1, ...
    """

    index: Tensor
    values: Tensor
    sizes: tuple[int, ...]
    modes: tuple[str, ...]
    labels: tuple[Sequence[Any], ...] | None = None

    def dense(self) -> Tensor:
        """Return the dense tensor, NaN where there is no entry."""
        needed, limit = torch.Size(self.sizes).numel() * self.values.element_size(), available()
        if limit is not None and needed > limit:
            advice = "complete it from its entries: tnreg.completion(table)"
            raise does_not_fit(f"the dense tensor of sizes {self.sizes}", needed, limit, advice, device="cpu")
        tensor = torch.full(self.sizes, torch.nan, dtype=self.values.dtype)
        tensor[tuple(self.index.T)] = self.values
        return tensor


def is_table(x: Any) -> bool:
    """Return whether this is a frame of pandas in long form, or a series whose index has names."""
    if type(x).__module__.partition(".")[0] != "pandas" or not hasattr(x, "reset_index"):
        return False
    frame, value = _columns(x)
    named = len(frame.columns) > 1 and all(isinstance(name, str) for name in frame)
    return named and (
        value == "value" or all(frame[name].dtype.kind not in "fc" for name in frame.columns[:-1])
    )


def known_entries(x: Any) -> Entries:
    """Return the known entries of a table, which may be there twice, or of an array: NaN or masked elsewhere.

    Integers become numbers in double precision.
    """
    if is_table(x):
        found = entries_of(x, repeated=True)
        known = _measured(found.values)
        return replace(found, index=found.index[known], values=found.values[known])
    dense = as_tensor(x, missing=True).detach()
    if dense.ndim == 0:
        raise ShapeError("a single number has no modes; give an array, or entries by their index.")
    known, modes = _measured(dense.reshape(-1)), getattr(x, "dims", map("mode {}".format, range(dense.ndim)))
    index = torch.stack(torch.unravel_index(known, dense.shape), 1)
    values = floating(dense.reshape(-1)[known])
    return Entries(index, values, tuple(dense.shape), tuple(map(str, modes)))


def _measured(values: Tensor) -> Tensor:
    return torch.isnan(values).logical_not_().nonzero().reshape(-1)


def floating(x: Tensor) -> Tensor:
    """Return numbers that can be computed with: counts and truth values in double precision."""
    return x if x.is_floating_point() or x.is_complex() else x.double()


def entries_of(table: Any, *, repeated: bool = False) -> Entries:
    """Read a table in long form; NaN may be among its values.

    Raises:
        DataError: Labels are missing, values are no numbers, no rows, or an entry is there twice and may not
            be ``repeated``.
    """
    frame, value = _columns(table)
    values = as_tensor(frame.pop(value), missing=True)
    if not len(frame):
        raise DataError("the table has no rows.")
    codes, labels = zip(*(_numbered(frame[name]) for name in frame), strict=True)
    twice = frame.duplicated().to_numpy().nonzero()[0]
    if len(twice) and not repeated:
        raise DataError(
            f"an entry is there twice: {frame.iloc[twice[0]].to_dict()}, again in row {twice[0]}."
        )
    sizes = tuple(map(len, labels))
    return Entries(torch.stack(codes, 1), floating(values), sizes, modes_of(table), labels)


def modes_of(table: Any) -> tuple[str, ...]:
    """Return the names of the columns that are the index."""
    frame, value = _columns(table)
    return tuple(str(name) for name in frame if name != value)


def _columns(table: Any) -> tuple[Any, Any]:
    """Return a frame of its own with the columns of modes and values, and the name of the latter."""
    if table.ndim == 1:
        table = table.to_frame("value" if table.name is None else table.name)
    if table.index.nlevels > 1 or table.index.name is not None:
        table = table.reset_index()
    return table.copy(deep=False), "value" if "value" in table else table.columns[-1]


def _numbered(column: Any) -> tuple[Tensor, Sequence[Any]]:
    """Return the index of every label, and the labels."""
    if column.isna().any():
        raise DataError(
            f"column {column.name!r} is an index, and {column.isna().sum()} of its rows are empty."
        )
    if hasattr(column, "cat"):
        return as_tensor(column.cat.codes.to_numpy("int64")), column.cat.categories
    if column.dtype.kind not in "iu" or column.min() < 0:
        column = column.astype("category")
        return _numbered(column)
    codes = as_tensor(column.to_numpy("int64"))
    return codes, range(int(codes.max()) + 1)
