"""What is known of a tensor that is to be completed: read from arrays, tables, files, entries and tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import DataError, OptionError
from tnreg.recovery.holdout import row_keys
from tnreg.tensors.arrays import as_tensor, exact_scales
from tnreg.tensors.loading import DenseTensor, load_entries
from tnreg.tensors.tables import Entries, floating, known_entries
from tnreg.training.tasks import Completion, Sensing, check_squares


def read_known(
    task: Any, index: Any = None, values: Any = None, sizes: Sequence[int] | None = None
) -> tuple[Completion | Sensing, list[str]]:
    """Return a task of all that is known, no entry twice, real or complex and not in half precision.

    Beside it, what there is to warn of.

    Args:
        task: See ``complete``; ``None`` for entries by their ``index``.
        index: See ``completion``.
        values: NaN and what is masked is not known.
        sizes: Mode sizes.

    Raises:
        DataError: Infinite numbers, or fewer samples than modes.
        OptionError: Neither a task nor entries, or both.
    """
    by_index = [part is not None for part in (index, values, sizes)]
    if any(by_index) == (task is not None) or any(by_index) != all(by_index):
        message = "complete: give a task or an array, or index=, values= and sizes=."
        raise OptionError(message, argument="task")
    notes: list[str] = []
    if isinstance(task, Completion | Sensing):
        check_squares(task, "complete")
    if isinstance(task, Sensing):
        known: Completion | Sensing = _sensing(task)
    else:
        found = _completion(task, index, values, sizes)
        known = Completion(*_once(found.index, found.values, notes), found.sizes)
    order, count = len(known.sizes), len(known.values)
    if count < max(order, 2):
        raise DataError(
            f"complete: only {count} samples of a tensor of {order} modes are known; at least "
            f"{max(order, 2)} are needed.",
            argument="task",
        )
    return known, notes


def _completion(task: Any, index: Any, values: Any, sizes: Any) -> Completion:
    if isinstance(task, Completion):
        index, values, sizes = task.index, task.values, task.sizes
    elif task is not None:
        if isinstance(task, DenseTensor):
            task = task.values
        entries = load_entries(task) if isinstance(task, str | os.PathLike) else task
        entries = entries if isinstance(entries, Entries) else known_entries(entries)
        index, values, sizes = entries.index, entries.values, entries.sizes
    index, values = as_tensor(index), exact_scales(floating(as_tensor(values, missing=True).detach()))
    if index.ndim == 2 and values.shape == (len(index),):
        measured = ~torch.isnan(values)
        index, values = index[measured], values[measured]
        if not len(values):
            raise DataError("complete: no entry is known, all are NaN or masked.", argument="task")
    return Completion(index, values, sizes)


def _once(index: Tensor, values: Tensor, notes: list[str]) -> tuple[Tensor, Tensor]:
    """Return every entry once, in order; the mean of those that are there several times."""
    _, group, counts = torch.unique(row_keys(index), return_inverse=True, return_counts=True)
    if len(counts) == len(values):
        return index, values
    places = torch.arange(len(values), device=values.device)
    first = torch.full_like(counts, len(values)).scatter_reduce_(0, group, places, "amin")
    off = values - values[first][group]  # so that the mean of equal numbers is that number
    means = values[first] + torch.zeros_like(values[first]).index_add_(0, group, off) / counts
    conflicts = index[first][torch.unique(group[off != 0])]
    if len(conflicts):
        notes.append(
            f"{len(conflicts)} entries are there several times with different values, first "
            f"{tuple(conflicts[0].tolist())}; their means are taken."
        )
    order = first.argsort()
    return index[first[order]], means[order]


def _sensing(task: Sensing) -> Sensing:
    values = exact_scales(task.values.detach())
    return Sensing([part.detach().to(values.dtype) for part in task.features], values)
