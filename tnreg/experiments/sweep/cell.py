"""One cell of a sweep: its settings, the name of its run folder, and how it is computed only once.

A cell is done if its run folder is there; its results are ``summary`` in that folder's ``config.json``.
A process computes a cell under a file lock beside the folder and looks for the folder again first. So
two sweeps in one folder, or a task on a cluster that outlives its sweep, never compute a cell twice.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import platform
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tnreg.errors import FileError, OptionError, TnregError, blame
from tnreg.experiments.folder import read_about, reading, write_about
from tnreg.machine.files import check_folder, folder_written_whole
from tnreg.training.checkpoint import for_json
from tnreg.training.trajectory import plain

Work = Callable[[dict[str, Any], Path, Path], dict[str, Any]]
"""``work(settings, folder, checkpoint)``: writes into an empty folder, returns results for JSON."""

# A training uses the process's random state and its flag for denormal numbers.
_ONE_AT_A_TIME = threading.RLock()
_HASH = "[0-9a-f]" * 8


class Unfinished(TnregError):
    """The time for a computation is over; what it needs to go on is kept."""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        folder: Folder of the sweep.
        name: Name of the cell's run folder in it.
        settings: What the cell is computed from, as JSON returns it.
    """

    folder: Path
    name: str
    settings: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        """A file of these settings alone; others of a computation have its name before ``.checkpoint``."""
        digest = hashlib.sha256(as_text(self.settings).encode()).hexdigest()
        return self.folder / f"{self.name}.{digest[:8]}.checkpoint"


def find(cell: Cell) -> dict[str, Any] | None:
    """Return the results of a cell that is done, or None.

    Raises:
        OptionError: The run folder was made with other settings.
        FileError: Something else is in its place.
    """
    with blame("folder"):
        place = check_folder(cell.folder / cell.name, None)
        if not (place / "config.json").exists():
            return None
        with reading("a run folder", place, "a cell of this sweep; delete it, or choose another folder"):
            about = read_about(place)
            there, summary = dict(about["config"]), dict(about["summary"])
        pairs = {key: (there.get(key), cell.settings.get(key)) for key in there | cell.settings}
        different = [f"\n  {k}: {a!r} there, {b!r} now" for k, (a, b) in pairs.items() if not same(a, b)]
        if different:
            message = f"{place} was made with other settings; delete it, or choose another folder."
            raise OptionError(message + "".join(different))
    return summary


def compute(cell: Cell, work: Work, threads: int | None) -> tuple[dict[str, Any], bool]:
    """Return a cell's results, and whether this call computed them; one at a time in a process.

    What a killed attempt left behind is removed first, except its checkpoint. ``threads`` are those of
    torch meanwhile; None does not change them.
    """
    if not cell.folder.is_dir():
        raise FileError(f"no folder {cell.folder} on {platform.node()}; workers share a folder")
    lock, name = cell.folder / f".{cell.name}.lock", glob.escape(cell.name)
    with _ONE_AT_A_TIME, FileLock(lock):
        summary = find(cell)
        computed = summary is None
        if summary is None:
            # folders half-written by the sweep and by work itself, and half-written checkpoints
            for start in (f".{name}", f"..{name}", f".{name}.{_HASH}.*"):
                _remove(cell, f"{start}.partial-*")
            before = torch.get_num_threads()
            torch.set_num_threads(threads or before)
            try:
                with folder_written_whole(cell.folder / cell.name, "cell", ()) as folder:
                    summary = work(dict(cell.settings), folder, cell.checkpoint)
                    summary = _describe(cell, folder, summary)
            finally:
                torch.set_num_threads(before)
            _remove(cell, f"{name}.{_HASH}.*")  # checkpoints, of other settings as well
        lock.unlink(missing_ok=True)  # a process that waits for it finds the cell done
    return summary, computed


def _describe(cell: Cell, folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Write ``config.json`` unless ``work`` did; return the results as the next sweep reads them."""
    if not (folder / "config.json").exists():
        summary = _results(summary)
        write_about(folder, "cell", config=cell.settings, summary=summary)
    try:
        return find(replace(cell, name=folder.name)) or {}
    except TnregError as error:
        wanted = "'tnreg', the cell under 'config' or results under 'summary'"
        raise OptionError(f"work wrote a config.json without {wanted}: {error}") from None


def _remove(cell: Cell, pattern: str) -> None:
    """Remove files and folders beside a cell whose names match; the caller holds the lock."""
    for path in cell.folder.glob(pattern):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def as_json(values: Any, message: str) -> dict[str, Any]:
    """Return a dict as JSON returns it, or raise an ``OptionError`` with this message."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(plain(dict(values)), default=for_json))
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{message}: {error}") from None
    return copy


def _results(values: Any) -> dict[str, Any]:
    """Return a dict as JSON returns it, with what JSON cannot hold as text: the rest is not lost for it."""
    try:
        return as_json(values, "the function of a sweep must return a dict of values for JSON")
    except OptionError:
        if not isinstance(values, Mapping):
            raise
    kept: dict[str, Any] = {}
    for key, value in values.items():
        try:
            kept |= as_json({key: value}, "")
        except OptionError as error:
            warnings.warn(f"the result {key!r} is kept as text{error}", stacklevel=2)
            kept[str(key)] = f"<{type(value).__name__}>"
            with contextlib.suppress(ValueError, RecursionError):  # an integer of thousands of digits
                kept[str(key)] = str(value)
    return kept


def cell_name(cell: Mapping[str, Any], fields: Sequence[str]) -> str:
    """Return ``FIELD-VALUE-FIELD-VALUE``, with ``_`` for what a file name cannot hold."""
    values = [v if isinstance(v, str) else json.dumps(v) for v in (cell[name] for name in fields)]
    clean = [re.sub(r"[^\w.+=-]", "_", value) for value in values]
    return "-".join(f"{name}-{value}" for name, value in zip(fields, clean, strict=True))


def as_text(value: Any) -> str:
    """Return a text that is the same for the same value."""
    return json.dumps(value, sort_keys=True)


def same(one: Any, other: Any) -> bool:
    """Return whether two values for JSON are the same; NaN, which is not equal to itself, is."""
    return bool(one == other) or as_text(one) == as_text(other)
