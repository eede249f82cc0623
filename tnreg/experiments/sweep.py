"""Sweeps: one function over many settings, on this machine's processors or on a Dask cluster.

Every cell of a sweep is a run folder inside the sweep's folder and is written whole. What is there is
not computed again, so a sweep that was killed goes on when it is started again. A cell that fails is
tried again, then reported, and stops none of the others. At the end there are ``results.csv`` with one
row a cell, ``config.json`` with the same rows, their means over seeds and what failed, and a picture.

Dask does the scheduling, the retries and the communication (``pip install 'tnreg[scale]'``); with
``workers=0`` the cells are computed in this process, one after another, without it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tnreg
from tnreg.errors import FileError, OptionError, check_integer
from tnreg.experiments import sweep_figure
from tnreg.experiments.folder import experiment_of
from tnreg.experiments.sweep_cell import Cell, Work, found
from tnreg.experiments.sweep_workers import Done, Failed, results
from tnreg.files import check_folder, write_whole

__all__ = ["Experiment", "Failed", "Result", "cell_name", "run"]


def _scalars(cell: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    kinds = (str, int, float, type(None))
    return {key: value for key, value in summary.items() if isinstance(value, kinds)}


def cell_name(cell: Mapping[str, Any], fields: Sequence[str]) -> str:
    """``FIELD-VALUE-FIELD-VALUE``; values that a file name cannot hold are shortened, with a hash."""
    return "-".join(f"{one}-{_as_name(cell[one])}" for one in fields)


@dataclass(frozen=True)
class Experiment:
    """What is swept. A function alone will do: everything else has a default.

    Attributes:
        work: ``work(cell, folder, checkpoint)`` returns results for JSON as a dict. ``folder`` is empty
            and becomes the run folder when the function returns; ``checkpoint`` is a path where it may
            keep what it needs to go on after it was killed, removed when it is done.
        title: What ``config.json`` of the sweep calls it.
        fields: Fields of a cell that are always in its name and its row; others are if they vary.
        name: ``name(cell, fields)`` names the run folder.
        row: ``row(cell, results)`` gives the columns after the fields; all that are no lists if left out.
        headline: The column that is drawn; the first one of numbers if left out.
        defaults: Values of settings that a run folder of an older version may lack.
        prepare: ``prepare(cells, folder)`` is called first with the cells that are missing.
        table: ``table(rows, fields, headline)`` gives means over seeds.
        figure: ``figure(folder)`` draws the picture.
    """

    work: Work
    title: str = "sweep"
    fields: tuple[str, ...] = ()
    name: Callable[[Mapping[str, Any], Sequence[str]], str] = cell_name
    row: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = _scalars
    headline: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[list[dict[str, Any]], Path], Any] | None = None
    table: Callable[[list[dict[str, Any]], Sequence[str], str], list[dict[str, Any]]] = (
        sweep_figure.means
    )
    figure: Callable[[Path], Any] = sweep_figure.figure


@dataclass(frozen=True)
class Result:
    """What a sweep found.

    Attributes:
        folder: Where it is.
        rows: One for each cell that is done, in the order of the cells: its fields, then its results.
        failed: The cells that failed.
        computed: Names of the cells that this call computed; the others were there.
        fields: Fields in every row.
        headline: The column that is drawn.
        table: Means over seeds.
    """

    folder: Path
    rows: list[dict[str, Any]]
    failed: list[Failed]
    computed: list[str]
    fields: tuple[str, ...]
    headline: str
    table: list[dict[str, Any]]


def run(
    work: Work | Experiment,
    cells: Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    workers: int | None = None,
    threads: int | None = 1,
    scheduler: str | None = None,
    retries: int = 1,
    parquet: bool = False,
    progress: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Result:
    """Compute the cells that are missing, then write table and picture of all that are there.

    Args:
        work: A function, see ``Experiment.work``, or an ``Experiment``. Functions of a script go to the
            workers by value; what they import must be installed there, tnreg included.
        cells: Settings of each, values for JSON.
        folder: Where run folders, table and picture go; on a cluster one that all its machines share.
        workers: Processes of a Dask cluster on this machine, at most one for each missing cell; as many
            as there are processors for ``threads`` each if left out; 0 computes in this process.
        threads: Threads that torch uses in a cell; None leaves them as they are.
        scheduler: Address of the scheduler of a cluster that is there, ``tcp://...``, or the path of its
            scheduler file, in place of processes here.
        retries: How often a cell that failed is tried again.
        parquet: Write ``results.parquet`` as well; needs pyarrow.
        progress: Show a progress bar.
        about: What else ``config.json`` shall hold.

    Raises:
        OptionError: Options that do not fit each other, cells with the same name, a cell that is there
            with other settings, or Dask is not installed. Then nothing was computed.
        FileError: The folder holds something else, or cannot be written.
        KeyboardInterrupt: After Ctrl-C; the same call goes on.

    Processes are spawned unless ``workers`` is 0 or there is a ``scheduler``: a script of your own
    then needs ``if __name__ == "__main__":``.

    Cost: some milliseconds a cell beside the work itself, and seconds until the processes are up.
    """
    what = work if isinstance(work, Experiment) else Experiment(work)
    for value, least, name in ((workers, 0, "workers"), (threads, 1, "threads")):
        if value is not None:
            check_integer(value, least, f"sweep: {name}")
    check_integer(retries, 0, "sweep: retries")
    if scheduler is not None and workers is not None:
        raise OptionError("sweep: workers are those of the scheduler; give one of the two.")
    if parquet:
        _pyarrow()
    place = check_folder(folder)
    if experiment_of(place) not in ("", what.title):
        raise OptionError(f"{place} is a run of {experiment_of(place)!r}; choose another folder.")
    all_settings = [_plain(cell) for cell in cells]
    fields = _fields(all_settings, what.fields)
    named = _named(what, all_settings, fields, place)
    done = {cell.name: summary for cell in named if (summary := found(cell)) is not None}
    missing = [cell for cell in named if cell.name not in done]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {place}: {error.strerror or error}") from None
    written = _About(what, fields, dict(about or {}), _swept(all_settings))
    if not (place / "config.json").exists():
        written.write(place, [], [])  # so that a sweep cut short is known as one
    if what.prepare is not None and missing:
        what.prepare([cell.settings for cell in missing], place)
    failed, computed = [], []
    with _Bar(len(named), len(done), progress) as bar:
        on = results(
            missing, what.work, workers=workers, threads=threads, scheduler=scheduler,
            retries=retries, told=bar.told,
        )  # fmt: skip
        for one in on:
            if isinstance(one, Done):
                done[one.cell.name] = one.summary
                computed += [one.cell.name] if one.computed else []
                row = what.row(one.cell.settings, one.summary)
                bar.advance(f"{one.cell.name} {_shown(row, what.headline)}", failed=False)
            else:
                failed.append(one)
                bar.advance(f"{one.cell.name} failed", failed=True)
    rows = [
        {**{f: cell.settings[f] for f in fields}, **what.row(cell.settings, done[cell.name])}
        for cell in named
        if cell.name in done
    ]
    table, headline = written.write(place, rows, failed)
    _write_rows(place, rows, parquet)
    if rows and headline:
        what.figure(place)
    return Result(place, rows, failed, computed, fields, headline, table)


def _plain(cell: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(cell)))
    except (TypeError, ValueError) as error:
        raise OptionError(f"sweep: a cell is a dict of values for JSON: {error}") from None
    return plain


def _fields(cells: list[dict[str, Any]], always: Sequence[str]) -> tuple[str, ...]:
    """Fields that are always named, those that are not the same in all cells, the seed last."""
    if not cells:
        raise OptionError("sweep: no cells; give at least one.")
    for cell in cells:
        if cell.keys() != cells[0].keys():
            differ = ", ".join(sorted(cell.keys() ^ cells[0].keys()))
            raise OptionError(f"sweep: cells with different fields: not all have {differ}.")
    vary = [key for key in cells[0] if any(cell[key] != cells[0][key] for cell in cells)]
    named = list(dict.fromkeys((*always, *vary))) or list(cells[0])
    return tuple(sorted(named, key=lambda name: name == "seed"))


def _named(
    what: Experiment, cells: list[dict[str, Any]], fields: tuple[str, ...], place: Path
) -> list[Cell]:
    named: dict[str, Cell] = {}
    for settings in cells:
        name = what.name(settings, fields)
        if not re.fullmatch(r"[^./\\][^/\\]*", name):
            raise OptionError(f"sweep: a cell cannot be named {name!r}; it names a folder.")
        if name in named:
            raise OptionError(f"sweep: two cells are named {name!r}; their settings must differ.")
        named[name] = Cell(place, name, settings, what.defaults)
    return list(named.values())


def _swept(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Each field's value, or the list of its values where they vary."""
    values: dict[str, Any] = {}
    for key in cells[0]:
        differ = list(dict.fromkeys(json.dumps(cell[key]) for cell in cells))
        values[key] = cells[0][key] if len(differ) == 1 else [json.loads(v) for v in differ]
    return values


@dataclass(frozen=True)
class _About:
    """``config.json`` of a sweep."""

    what: Experiment
    fields: tuple[str, ...]
    extra: dict[str, Any]
    config: dict[str, Any]

    def write(
        self, place: Path, rows: list[dict[str, Any]], failed: list[Failed]
    ) -> tuple[list[dict[str, Any]], str]:
        headline = self.what.headline
        measures = [key for row in rows for key in row if key not in self.fields]
        if not any(_is_number(row.get(headline)) for row in rows):
            numbers = (k for k in measures if any(_is_number(row.get(k)) for row in rows))
            headline = next(numbers, "")
        table = self.what.table(rows, self.fields, headline) if headline else []
        told = {
            "tnreg": tnreg.__version__, "torch": torch.__version__,
            "python": platform.python_version(), "experiment": self.what.title,
            "config": self.config, "fields": self.fields, "headline": headline, "summary": rows,
            "failed": [_told(one) for one in failed], "table": table, **self.extra,
        }  # fmt: skip
        text = json.dumps(told, indent=1) + "\n"
        write_whole(place / "config.json", lambda beside: beside.write_text(text, encoding="utf-8"))
        return table, headline


def _told(failed: Failed) -> dict[str, Any]:
    lines = traceback.format_exception(failed.exception)
    return {
        "name": failed.cell.name,
        "config": failed.cell.settings,
        "error": failed.error,
        "traceback": "".join(lines),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(row: dict[str, Any], headline: str) -> str:
    value = row.get(headline)
    return f"{headline} {value:.4g}" if _is_number(value) else ""


def _as_name(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    plain = re.sub(r"[^A-Za-z0-9._+=-]+", "_", text).strip("_")[:48]
    # two values that differ never share a name
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _write_rows(place: Path, rows: list[dict[str, Any]], parquet: bool) -> None:
    names = list(dict.fromkeys(key for row in rows for key in row))
    held = io.StringIO()
    writer = csv.DictWriter(held, names)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(
        place / "results.csv", lambda beside: beside.write_text(held.getvalue(), encoding="utf-8")
    )
    if parquet:
        arrow, files = _pyarrow()
        columns = {}
        for name in names:
            values = [row.get(name) for row in rows]
            try:
                columns[name] = arrow.array(values)
            except arrow.ArrowException:  # values of several kinds
                columns[name] = arrow.array([None if v is None else str(v) for v in values])
        held_table = arrow.table(columns)
        write_whole(place / "results.parquet", lambda beside: files.write_table(held_table, beside))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise OptionError(
            "parquet needs pyarrow: pip install pyarrow; results.csv holds the same rows."
        ) from None
    return pyarrow, pyarrow.parquet


class _Bar:
    """The progress bar: cells done, failed, being computed, and the last one's headline."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.total, self.there, self.failed, self.at_once = total, done, 0, 0
        self.shown = shown

    def __enter__(self) -> _Bar:
        if self.shown:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            # cells take minutes or hours: the remaining time is that of all that were done so far
            self.progress = Progress(
                MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[counts]}"),
                TimeRemainingColumn(), TextColumn("{task.description}"),
                speed_estimate_period=1e9,
            )  # fmt: skip
            self.progress.start()
            self.task = self.progress.add_task(
                "", total=self.total, completed=self.there, counts=""
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.progress.stop()

    def told(self, at_once: int, line: str) -> None:
        """How many cells are computed at once, and a line to say."""
        self.at_once = at_once
        if self.shown:
            if line:
                self.progress.console.print(line)
            self._update(0)

    def advance(self, text: str, *, failed: bool) -> None:
        """One cell more."""
        self.failed += failed
        self.there += not failed
        if self.shown:
            self._update(1, description=text)

    def _update(self, by: int, **shown: Any) -> None:
        waiting = self.total - self.there - self.failed
        parts = [f"{self.failed} failed"] if self.failed else []
        parts += [f"{min(waiting, self.at_once)} running"]
        self.progress.update(self.task, advance=by, counts=", ".join(parts), **shown)
