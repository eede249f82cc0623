"""Run a sweep: what is swept, its cells, and what is written when they are done."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
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
    as_text,
    cell_name,
    check_names,
    find,
)
from tnreg.experiments.sweep.workers import Done, Failed, results
from tnreg.machine.files import check_folder, write_whole
from tnreg.machine.progress import advancing
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
        name: ``name(cell, fields)`` names the run folder, in at most 200 bytes.
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
    table: Callable[[list[dict[str, Any]], Sequence[str], str], list[dict[str, Any]]] = pictures.means
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
    progress: bool = False,
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
        retries: How often a cell that failed is tried again, unless by an ``OptionError`` or
            ``Unfinished``, which keeps its checkpoint.
        progress: Show a progress bar.

    Raises:
        OptionError: Options that do not fit each other, cells with the same name, a cell that is
            there with other settings, or Dask is not installed. Then nothing was computed.
        FileError: The folder holds something else, or cannot be written.
        TnregError: The scheduler was lost; what is done is written, and the same call goes on.
        KeyboardInterrupt: After Ctrl-C; the same call goes on.

    A cell is found again by its name, which holds the fields that vary. When a field starts to vary, as
    when a second value of it is added, names change and all cells are computed again. Put fields that
    will vary later into ``Experiment.fields`` from the start.

    Processes are spawned unless ``workers`` is 0 or there is a ``scheduler``: a script of your own
    then needs ``if __name__ == "__main__":``.

    Cost: some milliseconds a cell beside the work itself, and seconds until the processes are up.
    """
    what = work if isinstance(work, Experiment) else Experiment(work)
    place = _check(what, folder, workers, threads, scheduler, retries)
    settings = [as_json(cell, "sweep: a cell is a dict of values for JSON") for cell in cells]
    about = _describe(what, settings)
    fields = about["fields"]
    all_cells = [Cell(place, what.name(c, fields), c, what.defaults) for c in settings]
    check_names([cell.name for cell in all_cells])
    done = {c.name: summary for c in all_cells if (summary := find(c)) is not None}
    missing = [cell for cell in all_cells if cell.name not in done]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {place}: {error.strerror or error}") from None
    if not (place / "config.json").exists():  # a sweep that is cut short is known as one
        _write_about(place, about)
    if what.prepare is not None and missing:
        what.prepare([cell.settings for cell in missing], place, progress)
    outcomes: list[Done | Failed] = []
    try:
        with advancing("cells", len(all_cells), progress) as advance:
            advance(len(done))
            for outcome in results(missing, what.work, workers, threads, scheduler, retries):
                outcomes.append(outcome)
                advance(1)
    finally:  # what is done is written, whatever ended the sweep
        done |= {one.cell.name: one.summary for one in outcomes if isinstance(one, Done)}
        pairs = [(c.settings, done[c.name]) for c in all_cells if c.name in done]
        rows = _write_rows(what, place, fields, pairs)
        result = _finish(what, place, about, rows, outcomes)
    return result


def _check(
    what: Experiment,
    folder: str | Path,
    workers: int | None,
    threads: int | None,
    scheduler: str | None,
    retries: int,
) -> Path:
    """Return the folder's absolute path, or raise an error for options that cannot be."""
    check_integer(0 if workers is None else workers, 0, "sweep: workers")
    check_integer(1 if threads is None else threads, 1, "sweep: threads")
    check_integer(retries, 0, "sweep: retries")
    if scheduler is not None and workers is not None:
        message = "sweep: workers are those of the scheduler; give one of the two."
        raise OptionError(message, argument="workers")
    place = check_folder(folder)
    if (there := experiment_of(place)) not in ("", what.title):
        message = f"{place} is a run of {there!r}; choose another folder."
        raise OptionError(message, argument="folder")
    return place


def _describe(what: Experiment, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what ``config.json`` of the sweep holds before anything is computed."""
    if not cells:
        raise OptionError("sweep: no cells; give at least one.", argument="cells")
    some = set().union(*cells).difference(set(cells[0]).intersection(*cells))
    if some:
        message = f"sweep: cells with different fields: not all have {', '.join(sorted(some))}."
        raise OptionError(message, argument="cells")
    # compared as text, for a list is no key and NaN is not equal to itself
    values = {key: list({as_text(c[key]): c[key] for c in cells}.values()) for key in cells[0]}
    vary = [key for key in values if len(values[key]) > 1]
    fields = dict.fromkeys((*what.fields, *vary)) or values
    return {
        **versions(), "experiment": what.title,
        "config": {key: one if key in vary else one[0] for key, one in values.items()},
        "fields": tuple(sorted(fields, key=lambda name: name == "seed")),  # the seed last
        "headline": "", "summary": [], "failed": [], "table": [],
    }  # fmt: skip


def _row(fields: Sequence[str], settings: dict[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a cell and its columns, none of which takes the place of a field."""
    return {name: settings[name] for name in fields} | {
        f"{key} (result)" if key in fields else key: value
        for key, value in columns.items()
        if key not in fields or as_text(value) != as_text(settings[key])
    }


def _finish(
    what: Experiment,
    place: Path,
    about: dict[str, Any],
    rows: list[dict[str, Any]],
    outcomes: list[Done | Failed],
) -> Result:
    """Write ``config.json`` and draw the picture."""
    fields = about["fields"]
    headline = _headline(rows, fields, what.headline)
    table = what.table(rows, fields, headline) if headline else []
    errors = [one for one in outcomes if isinstance(one, Failed)]
    unfinished = [one for one in errors if isinstance(one.exception, Unfinished)]
    failed = [one for one in errors if not isinstance(one.exception, Unfinished)]
    reports = [{"name": f.cell.name, "config": f.cell.settings, "error": f.error} for f in failed]
    new = {"headline": headline, "summary": rows, "failed": reports, "table": table}
    _write_about(place, about | new)
    if headline:
        try:
            what.figure(place)
        except Exception as error:  # hours of computing are not lost for a picture
            warnings.warn(f"no picture of {place}: {type(error).__name__}: {error}", stacklevel=3)
    computed = [one.cell.name for one in outcomes if isinstance(one, Done) and one.computed]
    return Result(place, rows, failed, unfinished, computed, fields, headline, table)


def _headline(rows: list[dict[str, Any]], fields: Sequence[str], wanted: str) -> str:
    """Return the wanted column, or the first result, that has a finite number; else empty."""
    numeric = {key for row in rows for key in row if pictures.is_number(row[key])}
    columns = [key for row in rows for key in row if key not in fields]
    return next((column for column in (wanted, *columns) if column in numeric), "")


def _write_rows(
    what: Experiment, place: Path, fields: Sequence[str], pairs: list[tuple[dict[str, Any], dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Write ``results.csv`` from cells and their results; return its rows."""
    rows = [_row(fields, cell, what.row(cell, summary)) for cell, summary in pairs]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    _write(place / "results.csv", text.getvalue())
    return rows


def _write_about(place: Path, about: dict[str, Any]) -> None:
    """Write ``config.json``; numbers that are not finite are null, for JSON has no others."""
    finite = json.loads(json.dumps(about), parse_constant=lambda name: None)
    _write(place / "config.json", json.dumps(finite, indent=1) + "\n")


def _write(file: Path, text: str) -> None:
    write_whole(file, lambda partial: partial.write_text(text, encoding="utf-8", newline=""))
