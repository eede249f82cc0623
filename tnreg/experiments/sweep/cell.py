"""One cell of a sweep: its settings, the name of its run folder, and how it is computed only once.

A cell is done if its run folder is there; its results are ``summary`` in that folder's ``config.json``.
A process computes a cell under a file lock beside the folder and looks for the folder again first. So
two sweeps in one folder, or a task on a cluster that outlives its sweep, never compute a cell twice.
The lock needs a file system with ``flock``, as shared file systems of clusters have it.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tnreg.errors import FileError, OptionError, TnregError
from tnreg.experiments.folder import UNREADABLE, read_about
from tnreg.machine.files import check_folder, folder_written_whole
from tnreg.machine.versions import versions

Work = Callable[[dict[str, Any], Path, Path], dict[str, Any]]
"""``work(settings, folder, checkpoint)``: writes into an empty folder, returns results for JSON."""

# A training uses the process's random state and its flag for denormal numbers.
_ONE_AT_A_TIME = threading.RLock()

_LONGEST = 120  # file systems take 255 bytes; temporary names beside are longer
_HASH = "[0-9a-f]" * 8


class Unfinished(TnregError):
    """The time for a computation is over; what it needs to go on is kept.

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
        name: Name of the cell's run folder in it.
        settings: What the cell is computed from, as JSON returns it.
        defaults: Values of settings that a run folder of an older version may lack.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        """A file that survives a kill; other settings have another one.

        Further files of a computation begin with its name before ``.checkpoint``.
        """
        return self.folder / f"{self.name}.{_short_hash(as_text(self.settings))}.checkpoint"


def find(cell: Cell) -> dict[str, Any] | None:
    """Return the results of a cell that is done, or None.

    Raises:
        OptionError: The run folder was made with other settings.
        FileError: Something else is in its place.
    """
    place = check_folder(cell.folder / cell.name)
    try:
        about = read_about(place)
        there, now = {**cell.defaults, **about["config"]}, cell.settings
        pairs = {key: (there.get(key), now.get(key)) for key in {**there, **now}}
        summary = dict(about["summary"])
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        raise FileError(
            f"not a run folder: {place}\n  {type(error).__name__}: {error}\n"
            "  delete it, or choose another folder",
            argument="folder",
        ) from None
    different = [
        f"\n  {key}: {old!r} there, {new!r} now"
        for key, (old, new) in pairs.items()
        if old != new and as_text(old) != as_text(new)  # NaN is not equal to itself
    ]
    if different:
        raise OptionError(
            f"{place} was made with other settings; delete it, or choose another folder."
            + "".join(different),
            argument="folder",
        )
    return summary


def compute(cell: Cell, work: Work, threads: int | None) -> tuple[dict[str, Any], bool]:
    """Return a cell's results, and whether this call computed them; one at a time in a process.

    What a killed attempt left behind is removed first, except its checkpoint.

    Args:
        cell: The cell.
        work: The function that computes it.
        threads: Threads that torch may use meanwhile; None does not change them.
    """
    if not cell.folder.is_dir():
        raise FileError(
            f"no folder {cell.folder} on {platform.node()}\n"
            "  the workers of a cluster write into a folder that all its machines share"
        )
    lock, name = cell.folder / f".{cell.name}.lock", glob.escape(cell.name)
    with _ONE_AT_A_TIME, FileLock(lock):
        summary = find(cell)
        computed = summary is None
        if summary is None:
            # folders half-written by the sweep and by work itself, checkpoints
            for start in (f".{name}", f"..{name}", f".{name}.{_HASH}.*"):
                _remove(cell.folder, f"{start}.partial-*")
            before = torch.get_num_threads()
            torch.set_num_threads(threads or before)
            try:
                with folder_written_whole(cell.folder / cell.name) as folder:
                    summary = work(dict(cell.settings), folder, cell.checkpoint)
                    summary = _describe(cell, folder, summary)
            finally:
                torch.set_num_threads(before)
            _remove(cell.folder, f"{name}.{_HASH}.*")  # checkpoints, of other settings as well
        lock.unlink(missing_ok=True)  # a process that waits for it finds the cell done
    return summary, computed


def _describe(cell: Cell, folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Write ``config.json`` unless ``work`` did; return the results as the next sweep reads them."""
    summary = as_json(summary, "the function of a sweep must return a dict of values for JSON")
    folder.mkdir(exist_ok=True)
    file = folder / "config.json"
    if not file.exists():
        about = {"experiment": "cell", "config": cell.settings, "summary": summary}
        file.write_text(json.dumps({**versions(), **about}, indent=1) + "\n", encoding="utf-8")
    try:
        return find(dataclasses.replace(cell, name=folder.name)) or {}
    except (OptionError, FileError) as error:
        raise OptionError(
            f"the function of a sweep wrote a config.json that is not that of the cell {cell.name!r}.\n"
            f"  {error}\n  write the cell under 'config', the results under 'summary' and "
            "tnreg.__version__ under 'tnreg', or leave the file to the sweep"
        ) from None


def _remove(folder: Path, pattern: str) -> None:
    """Remove files and folders whose names match; the caller holds the lock."""
    for path in folder.glob(pattern):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def as_json(values: Any, message: str) -> dict[str, Any]:
    """Return a dict as JSON returns it.

    Raises:
        OptionError: ``values`` is no dict of values for JSON, or holds text that no file can hold.
    """
    try:
        if not isinstance(values, Mapping):
            raise TypeError(f"found a {type(values).__name__}")
        text = json.dumps(dict(values), ensure_ascii=False)
        text.encode()  # half a surrogate pair cannot be encoded
        copy: dict[str, Any] = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{message}: {error}") from None
    return copy


def distinct(cells: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of every field, each once.

    Raises:
        OptionError: No cells, or cells with different fields.
    """
    if not cells:
        raise OptionError("sweep: no cells; give at least one.", argument="cells")
    some = set().union(*cells).difference(set(cells[0]).intersection(*cells))
    if some:
        raise OptionError(
            f"sweep: cells with different fields: not all have {', '.join(sorted(some))}.",
            argument="cells",
        )
    # compared as text, for a list is no key and NaN is not equal to itself
    return {key: list({as_text(c[key]): c[key] for c in cells}.values()) for key in cells[0]}


def names(
    cells: list[dict[str, Any]],
    fields: tuple[str, ...],
    name: Callable[[Mapping[str, Any], Sequence[str]], str],
) -> list[str]:
    """Return each cell's name; one that is long or that cells share ends with a hash of its fields.

    Raises:
        OptionError: A name that no folder can have, or two cells with the same settings.
    """
    wanted = [name(cell, fields) for cell in cells]
    shared, repeated = Counter(wanted), Counter(map(as_text, cells))
    unique = []
    for one, cell in zip(wanted, cells, strict=True):
        if not re.fullmatch(r"[^./\\][^/\\]*", one):
            raise OptionError(f"sweep: a cell cannot be named {one!r}; it names a folder.")
        if repeated[as_text(cell)] > 1:
            raise OptionError(
                f"sweep: two cells have the same settings, those of {one!r}; give each cell once."
            )
        if shared[one] > 1 or len(os.fsencode(one)) > _LONGEST:
            start = os.fsencode(one)[: _LONGEST - 9].decode(errors="ignore")
            one = f"{start}-{_short_hash(as_text({key: cell[key] for key in fields}))}"
        unique.append(one)
    return unique


def cell_name(cell: Mapping[str, Any], fields: Sequence[str]) -> str:
    """Return ``FIELD-VALUE-FIELD-VALUE``; a value that no file name can hold is shortened, with a hash."""
    return "-".join(f"{name}-{_as_name(cell[name])}" for name in fields)


def _as_name(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    short = re.sub(r"[^A-Za-z0-9._+=-]+", "_", text).strip("_")[:48]
    # values that are shortened to the same text never share a name
    return short if short == text else f"{short}-{_short_hash(text)}"


def _short_hash(text: str) -> str:
    """Return eight digits that tell texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def as_text(value: Any) -> str:
    """Return a text that is the same for the same value."""
    return json.dumps(value, sort_keys=True)
