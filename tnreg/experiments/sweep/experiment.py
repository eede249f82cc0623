"""Run a sweep: what is swept, its cells, and what is written when they are done."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tnreg.errors import FileError, OptionError, check_integer
from tnreg.experiments.folder import experiment_of
from tnreg.experiments.sweep import pictures
from tnreg.experiments.sweep.cell import (
    Cell,
    Unfinished,
    Work,
    as_json,
    cell_name,
    distinct,
    find,
    names,
)
from tnreg.experiments.sweep.pictures import number
from tnreg.experiments.sweep.workers import Done, Failed, results
from tnreg.machine.files import check_folder, write_whole
from tnreg.machine.progress import shown_progress
from tnreg.machine.versions import versions


def _scalars(cell: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in results.items() if isinstance(v, str | int | float | None)}


@dataclass(frozen=True)
class Experiment:
    """What is swept. A function alone will do: everything else has a default.

    Attributes:
        work: ``work(cell, folder, checkpoint)`` returns results for JSON as a dict. ``folder`` is empty
            and becomes the run folder when the function returns. ``checkpoint`` is a path, of these
            settings alone, for what it needs to go on after a kill; it is removed when the cell is
            done. If ``work`` writes ``config.json`` itself, that holds the cell under ``config`` and
            the results under ``summary``.
        title: What ``config.json`` of the sweep calls it.
        fields: Fields of a cell that are always in its name and its row; others are if they vary.
        name: ``name(cell, fields)`` names the run folder. A name that is long, or that several cells
            share, gets a hash at its end.
        row: ``row(cell, results)`` gives the columns after the fields; by default all results that are
            text, numbers or None. A column named like a field but with another value becomes
            ``NAME (result)``.
        headline: The column that is drawn; if left out, or without a finite number, the first column
            that has one.
        defaults: Values of settings that a run folder of an older version may lack.
        prepare: ``prepare(cells, folder, progress)`` is called first, with the cells that are missing.
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
    prepare: Callable[[list[dict[str, Any]], Path, bool], Any] | None = None
    table: Callable[[list[dict[str, Any]], Sequence[str], str], list[dict[str, Any]]] = (
        pictures.means
    )
    figure: Callable[[Path], Any] = pictures.figure


@dataclass(frozen=True)
class Result:
    """What a sweep found.

    Attributes:
        folder: Where it is.
        rows: One for each cell that is done, in the order of the cells: its fields, then its results.
        failed: The cells that failed.
        unfinished: The cells whose time was over; the same call goes on with them.
        computed: Names of the cells that this call computed; the others were there.
        fields: Fields in every row.
        headline: The column that is drawn.
        table: Means over seeds.
    """

    folder: Path
    rows: list[dict[str, Any]]
    failed: list[Failed]
    unfinished: list[Failed]
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
    """Compute the cells that are missing, then write the table and the picture of all that are there.

    Args:
        work: A function, see ``Experiment.work``, or an ``Experiment``. Functions of a script reach
            Dask's workers by value; what they import must be installed there, tnreg included.
        cells: Settings of each cell, values for JSON.
        folder: Where run folders, table and picture go; on a cluster, one that all its machines share.
        workers: Processes on this machine, at most one for each missing cell; if left out, as many as
            there are processors for ``threads`` each; 0 computes in this process.
        threads: Threads that torch uses in a cell; None does not change them.
        scheduler: Address of the scheduler of a running cluster, ``tcp://...``, or the path of its
            scheduler file; replaces processes here.
        retries: How often a cell that failed is tried again.
        parquet: Write ``results.parquet`` as well; needs pyarrow.
        progress: Show a progress bar.
        about: Extra entries for ``config.json``. ``config`` replaces the swept settings; other names
            that the sweep writes raise.

    Raises:
        OptionError: Options that do not fit each other, cells with the same settings, a cell that is
            there with other settings, or Dask is not installed. Then nothing was computed.
        FileError: The folder holds something else, or cannot be written.
        TnregError: The scheduler was lost; what is done is written, and the same call goes on.
        KeyboardInterrupt: After Ctrl-C; the same call goes on.

    A cell is found again by its name, which holds the fields that vary. When a field starts to vary, as
    when a second value of it is added, names change and all cells are computed again. Put fields that
    will vary later into ``Experiment.fields`` from the start.

    An ``OptionError`` of a cell is not tried again. A cell that raises ``Unfinished`` keeps its checkpoint
    and is not tried again by this call. A picture that cannot be drawn is a warning.
    Processes are spawned unless ``workers`` is 0 or there is a ``scheduler``: a script of your own
    then needs ``if __name__ == "__main__":``.

    Cost: some milliseconds a cell beside the work itself, and seconds until the processes are up.
    """
    what = work if isinstance(work, Experiment) else Experiment(work)
    _check(workers, threads, scheduler, retries, parquet)
    place = check_folder(folder)
    if experiment_of(place) not in ("", what.title):
        raise OptionError(
            f"{place} is a run of {experiment_of(place)!r}; choose another folder.",
            argument="folder",
        )
    settings = [as_json(cell, "sweep: a cell is a dict of values for JSON") for cell in cells]
    entries = _entries(what, settings, {} if about is None else about)
    all_cells = [
        Cell(place, name, one, what.defaults)
        for name, one in zip(names(settings, entries["fields"], what.name), settings, strict=True)
    ]
    done = {c.name: summary for c in all_cells if (summary := find(c)) is not None}
    missing = [cell for cell in all_cells if cell.name not in done]
    _begin(what, place, entries, missing, progress)
    outcomes: list[Done | Failed] = []
    try:
        with _bar(len(all_cells), len(done), what, progress) as advance:
            for outcome in results(
                missing, what.work, workers=workers, threads=threads, scheduler=scheduler,
                retries=retries,
            ):  # fmt: skip
                outcomes.append(outcome)
                advance(outcome)
    finally:  # what is done is written, whatever ended the sweep
        done |= {one.cell.name: one.summary for one in outcomes if isinstance(one, Done)}
        rows = [
            _row(entries["fields"], cell.settings, what.row(cell.settings, done[cell.name]))
            for cell in all_cells
            if cell.name in done
        ]
        _write_rows(place, rows, parquet)
        result = _finish(what, place, entries, rows, outcomes)
    return result


def _check(
    workers: int | None, threads: int | None, scheduler: str | None, retries: int, parquet: bool
) -> None:
    check_integer(0 if workers is None else workers, 0, "sweep: workers")
    check_integer(1 if threads is None else threads, 1, "sweep: threads")
    check_integer(retries, 0, "sweep: retries")
    if scheduler is not None and workers is not None:
        raise OptionError(
            "sweep: workers are those of the scheduler; give one of the two.", argument="workers"
        )
    if parquet and importlib.util.find_spec("pyarrow") is None:
        raise OptionError(
            "parquet needs pyarrow: pip install pyarrow; results.csv holds the same rows.",
            argument="parquet",
        )


@contextlib.contextmanager
def _bar(
    total: int, done: int, what: Experiment, wanted: bool
) -> Iterator[Callable[[Done | Failed], None]]:
    """Show the number of cells computed and the last one; yield what adds a cell."""
    if not wanted:
        yield lambda outcome: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    def add(outcome: Done | Failed) -> None:
        if isinstance(outcome, Failed):
            text = "is not finished" if isinstance(outcome.exception, Unfinished) else "failed"
        else:
            value = what.row(outcome.cell.settings, outcome.summary).get(what.headline)
            text = "" if number(value) is None else f"{what.headline} {value:.4g}"
        bar.update(task, advance=1, description=f"{outcome.cell.name} {text}")

    # cells take minutes or hours: the remaining time is estimated from all that were done so far
    with shown_progress(
        MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
        speed_estimate_period=1e9,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=total, completed=done)
        yield add


def _entries(
    what: Experiment, settings: list[dict[str, Any]], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what ``config.json`` of the sweep holds before anything is computed."""
    values = distinct(settings)
    vary = [key for key in values if len(values[key]) > 1]
    fields = dict.fromkeys((*what.fields, *vary)) or values
    entries = {
        **versions(), "experiment": what.title,
        "config": {key: one if key in vary else one[0] for key, one in values.items()},
        "fields": tuple(sorted(fields, key=lambda name: name == "seed")),  # the seed last
        "headline": "", "summary": [], "failed": [], "table": [],
    }  # fmt: skip
    extra = as_json(about, "sweep: about is a dict of values for JSON")
    own = sorted(entries.keys() & extra.keys() - {"config"})
    if own:
        raise OptionError(
            f"sweep: about cannot hold {', '.join(own)}, which the sweep writes itself; "
            "choose another name.",
            argument="about",
        )
    return entries | extra


def _begin(
    what: Experiment, place: Path, entries: dict[str, Any], missing: list[Cell], progress: bool
) -> None:
    """Make the folder, with a ``config.json`` so that a sweep cut short is known as one."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {place}: {error.strerror or error}") from None
    if not (place / "config.json").exists():
        _write_about(place, entries)
    if what.prepare is not None and missing:
        what.prepare([cell.settings for cell in missing], place, progress)


def _finish(
    what: Experiment,
    place: Path,
    entries: dict[str, Any],
    rows: list[dict[str, Any]],
    outcomes: list[Done | Failed],
) -> Result:
    """Write ``config.json`` and draw the picture."""
    fields, headline = entries["fields"], _headline(rows, entries["fields"], what.headline)
    table = what.table(rows, fields, headline) if headline else []
    errors = [one for one in outcomes if isinstance(one, Failed)]
    unfinished = [one for one in errors if isinstance(one.exception, Unfinished)]
    failed = [one for one in errors if one not in unfinished]
    entries["failed"] = [
        {"name": one.cell.name, "config": one.cell.settings, "error": one.error} for one in failed
    ]
    _write_about(place, entries | {"headline": headline, "summary": rows, "table": table})
    if headline:
        try:
            what.figure(place)
        except Exception as error:  # hours of computing are not lost for a picture
            warnings.warn(f"no picture of {place}: {type(error).__name__}: {error}", stacklevel=3)
    computed = [one.cell.name for one in outcomes if isinstance(one, Done) and one.computed]
    return Result(place, rows, failed, unfinished, computed, fields, headline, table)


def _headline(rows: list[dict[str, Any]], fields: Sequence[str], wanted: str) -> str:
    """Return the wanted column, or the first result, that has a finite number; else empty."""
    columns = dict.fromkeys([wanted, *(key for row in rows for key in row if key not in fields)])
    return next((c for c in columns if any(number(row.get(c)) is not None for row in rows)), "")


def _row(
    fields: Sequence[str], settings: Mapping[str, Any], columns: Mapping[str, Any]
) -> dict[str, Any]:
    row = {name: settings[name] for name in fields}
    for key, value in columns.items():
        if key not in fields:
            row[key] = value
        elif json.dumps(value) != json.dumps(settings[key]):
            row[f"{key} (result)"] = value
    return row


def _write_about(place: Path, entries: Mapping[str, Any]) -> None:
    """Write ``config.json``; numbers that are not finite are null, for JSON has no others."""
    text = json.dumps(_finite(entries), indent=1, allow_nan=False) + "\n"
    write_whole(place / "config.json", lambda file: file.write_text(text, encoding="utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_rows(place: Path, rows: list[dict[str, Any]], parquet: bool) -> None:
    """Write ``results.csv``, and ``results.parquet`` if wanted."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def write_csv(file: Path) -> None:
        # text of a config.json that no file can hold is written as numbers
        with file.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_whole(place / "results.csv", write_csv)
    if parquet:
        import pyarrow
        import pyarrow.parquet

        arrays = {}
        for name in columns:
            values = [row.get(name) for row in rows]
            try:
                arrays[name] = pyarrow.array(values)
            except (pyarrow.ArrowException, OverflowError):  # of several kinds, or too large
                arrays[name] = pyarrow.array([None if v is None else str(v) for v in values])
        table = pyarrow.table(arrays)
        write_whole(
            place / "results.parquet", lambda file: pyarrow.parquet.write_table(table, file)
        )
