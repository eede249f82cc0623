"""One cell of a sweep: settings, a run folder of its own, and how it is computed once.

A cell is done if its run folder is there; its results are what ``config.json`` says under ``summary``.
Whoever computes it holds a file lock beside that folder and looks again first, so that two sweeps in
one folder, or a task that outlived its sweep on a cluster, never compute it twice. The lock wants a
file system with ``flock``, which those that clusters share have.
"""

from __future__ import annotations

import contextlib
import glob
import json
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tnreg.errors import FileError, OptionError, TnregError
from tnreg.experiments.folder import UNREADABLE, about_of
from tnreg.experiments.sweep.names import short_hash
from tnreg.machine.files import check_folder, folder_written_whole
from tnreg.machine.versions import versions

Work = Callable[[dict[str, Any], Path, Path], dict[str, Any]]
"""``work(settings, folder, checkpoint)``: writes into an empty folder, returns results for JSON."""

# A training uses the process's random state and its flag for denormal numbers.
_ONE_AT_A_TIME = threading.RLock()


class Unfinished(TnregError):
    """The time of a computation is over; what it needs to go on is kept.

    Attributes:
        so_far: What it has reached, values for JSON.
    """

    def __init__(self, message: str, so_far: Mapping[str, Any]) -> None:
        super().__init__(message, so_far)
        self.so_far = dict(so_far)

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        folder: Folder of the sweep.
        name: Name of its run folder in there.
        settings: What it is computed from, as JSON gives it back.
        defaults: Values of settings that a run folder of an older version may lack.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        """Its run folder."""
        return self.folder / self.name

    @property
    def checkpoint(self) -> Path:
        """A file that stays when the computation is killed; other settings have another one.

        Further files of a computation begin with its name before ``.checkpoint``.
        """
        return self.folder / f"{self.name}.{short_hash(self.settings)}.checkpoint"

    @property
    def lock(self) -> Path:
        """Held by whoever computes the cell; gone once that is done."""
        return self.folder / f".{self.name}.lock"


def found(cell: Cell) -> dict[str, Any] | None:
    """Results of a cell that is done, or None.

    Raises:
        OptionError: It was made with other settings.
        FileError: Something else is in its place.
    """
    place = check_folder(cell.place)
    try:
        summary, differ = _read(place, cell)
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        raise FileError(
            f"not a run folder: {place}\n  {type(error).__name__}: {error}\n"
            "  delete it, or choose another folder",
            argument="folder",
        ) from None
    if differ:
        raise OptionError(
            f"{place} was made with other settings; delete it, or choose another folder.\n"
            + "\n".join(differ),
            argument="folder",
        )
    return summary


def compute(cell: Cell, work: Work, threads: int | None) -> tuple[dict[str, Any], bool]:
    """Results of a cell, and whether they were computed by this call; one at a time in a process.

    Args:
        cell: What to compute. What an attempt that was killed left behind is cleared away, but for
            its checkpoint.
        work: The function that computes it.
        threads: Threads that torch may use meanwhile; None leaves them as they are.
    """
    if not cell.folder.is_dir():
        raise FileError(
            f"no folder {cell.folder} on {platform.node()}\n"
            "  the workers of a cluster write into a folder that all its machines share"
        )
    with _ONE_AT_A_TIME, FileLock(cell.lock):
        summary = found(cell)
        computed = summary is None
        if summary is None:
            _clear(cell)
            with _threads(threads), folder_written_whole(cell.place) as beside:
                summary = work(dict(cell.settings), beside, cell.checkpoint)
                summary = _describe(cell, beside, summary)
            _remove_checkpoints(cell)
        cell.lock.unlink(missing_ok=True)  # whoever waits for it sees next that the cell is done
    return summary, computed


def _read(folder: Path, cell: Cell) -> tuple[dict[str, Any], list[str]]:
    """Results in a run folder, and lines that say where its settings are not those of the cell."""
    about = about_of(folder)
    there, summary = {**cell.defaults, **about["config"]}, dict(about["summary"])
    now = cell.settings
    differ = [
        f"  {key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in {**there, **now}
        if not _same(there.get(key), now.get(key))
    ]
    return summary, differ


def _same(one: Any, other: Any) -> bool:
    """Whether values are equal; as text if they are not, as NaN is not equal to itself."""
    return bool(one == other) or json.dumps(one, default=str) == json.dumps(other, default=str)


def _describe(cell: Cell, folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Write ``config.json`` where ``work`` wrote none; the results as the next sweep reads them."""
    if not isinstance(summary, dict):
        raise OptionError(
            f"the function of a sweep returned {type(summary).__name__}; it must return a dict of results."
        )
    if not folder.is_dir():
        raise OptionError(
            f"the function of a sweep removed the folder of the cell {cell.name!r}, which it was given "
            "to write into; it may remove what is in there."
        )
    about = {
        **versions(), "experiment": "cell", "config": cell.settings, "summary": summary,
    }  # fmt: skip
    try:
        text = json.dumps(about, indent=1)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"results of a cell must be values for JSON: {error}") from None
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    try:
        there, differ = _read(folder, cell)
        check_folder(folder)
    except FileError:
        differ = ["  the version of tnreg is missing under 'tnreg'"]
    except UNREADABLE as error:
        differ = [f"  {type(error).__name__}: {error}"]
    if differ:
        lines = "\n".join(differ)
        raise OptionError(
            f"the function of a sweep wrote a config.json that is not that of the cell {cell.name!r}.\n"
            f"{lines}\n  write the cell under 'config', the results under 'summary' and "
            "tnreg.__version__ under 'tnreg', or leave the file to the sweep"
        )
    return there


def _remove_checkpoints(cell: Cell) -> None:
    """Those of the cell, and those of other settings that were left under its name."""
    for left in cell.folder.glob(f"{glob.escape(cell.name)}.{'[0-9a-f]' * 8}.*"):
        left.unlink(missing_ok=True)


def _clear(cell: Cell) -> None:
    """Remove half-written folders and files of attempts that were killed; the lock is held."""
    name = glob.escape(cell.name)
    for folders in (f".{name}.partial-*", f"..{name}.partial-*"):  # the second by work itself
        for left in cell.folder.glob(folders):
            shutil.rmtree(left, ignore_errors=True)
    for left in cell.folder.glob(f".{name}.{'[0-9a-f]' * 8}.*.partial-*"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
