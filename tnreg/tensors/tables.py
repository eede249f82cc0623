"""Tensors in long form: a pandas table with one row for every entry that was measured, its index and value.

The column ``value`` holds the values and every other one is a mode. Without one of that name it is the last
column, and the others may not be real numbers: a table of real numbers is a matrix. In a mode's column
integers from 0 on are taken as they are, categories in their order, and anything else (text, dates, numbers)
is numbered in sorted order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import DataError
from tnreg.machine.memory import available, does_not_fit
from tnreg.tensors.arrays import as_tensor


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of a tensor.

    Attributes:
        index: ``(B, N)`` int64, no row twice.
        values: ``(B,)``, NaN where there is none.
        sizes: Size of every mode.
        modes: Names of the columns.
    """

    index: Tensor
    values: Tensor
    sizes: tuple[int, ...]
    modes: tuple[str, ...]

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


def entries_of(table: Any) -> Entries:
    """Read a table in long form.

    Raises:
        DataError: Labels are missing, values are no numbers, an entry is there twice, or no rows.
    """
    frame, value = _columns(table)
    values = as_tensor(frame.pop(value), missing=True)
    if not len(frame):
        raise DataError("the table has no rows.")
    codes, sizes = zip(*(_numbered(frame[name]) for name in frame), strict=True)
    twice = frame.duplicated().to_numpy().nonzero()[0]
    if len(twice):
        raise DataError(
            f"an entry is there twice: {frame.iloc[twice[0]].to_dict()}, again in row {twice[0]}."
        )
    values = values if values.is_floating_point() or values.is_complex() else values.double()
    return Entries(torch.stack(codes, 1), values, sizes, tuple(map(str, frame)))


def _columns(table: Any) -> tuple[Any, Any]:
    """Return a frame of its own with the columns of modes and values, and the name of the latter."""
    if table.ndim == 1:
        table = table.to_frame("value" if table.name is None else table.name)
    if table.index.nlevels > 1 or table.index.name is not None:
        table = table.reset_index()
    return table.copy(deep=False), "value" if "value" in table else table.columns[-1]


def _numbered(column: Any) -> tuple[Tensor, int]:
    """Return the index of every label, and how many there are."""
    if column.isna().any():
        raise DataError(
            f"column {column.name!r} is an index, and {column.isna().sum()} of its rows are empty."
        )
    if hasattr(column, "cat"):
        return as_tensor(column.cat.codes.to_numpy("int64")), len(column.cat.categories)
    if column.dtype.kind not in "iu" or column.min() < 0:
        column = column.astype("category")
        return _numbered(column)
    codes = as_tensor(column.to_numpy("int64"))
    return codes, int(codes.max()) + 1
