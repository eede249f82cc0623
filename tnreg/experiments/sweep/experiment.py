"""Run a sweep: what is swept, its cells, and what is written when they are done."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnreg.errors import FileError, OptionError, check_integer
from tnreg.experiments.folder import experiment_of
from tnreg.experiments.sweep import pictures
from tnreg.experiments.sweep.cell import Cell, Unfinished, Work, as_json, as_text, cell_name, find, same
from tnreg.experiments.sweep.workers import results
from tnreg.machine.files import check_folder, seal, write_whole
from tnreg.machine.progress import advancing
from tnreg.machine.versions import versions

Row = dict[str, Any]


def _scalars(cell: Row, results: Row) -> Row:
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
        prepare: ``prepare(cells, folder, progress)`` is called first, with the cells that are missing.
        table: ``table(rows, fields, headline)`` gives means over seeds.
        figure: ``figure(folder)`` draws the picture.
        also: ``also(rows, fields)`` gives what else ``config.json`` holds.
    """

    work: Work
    title: str = "sweep"
    fields: tuple[str, ...] = ()
    name: Callable[[Mapping[str, Any], Sequence[str]], str] = cell_name
    row: Callable[[Row, Row], Row] = _scalars
    headline: str = ""
    prepare: Callable[[list[Row], Path, bool], Any] = lambda *_: None
    table: Callable[[list[Row], Sequence[str], str], list[Row]] = pictures.means
    figure: Callable[[Path], Any] = pictures.figure
    also: Callable[[list[Row], Sequence[str]], Row] = lambda *_: {}


@dataclass(frozen=True)
class Failed:
    """A cell that failed at every attempt, with the last exception."""

    cell: Cell
    exception: BaseException

    @property
    def error(self) -> str:
        """Kind of the exception and first line of its message."""
        return f"{type(self.exception).__name__}: {self.exception}".splitlines()[0].rstrip(": ")


@dataclass(frozen=True)
class Result:
    """What a sweep found.

    Attributes:
        rows: One for each cell that is done, in the order of the cells: its fields, then its results.
        failed: The cells that failed; neither done nor failed are those whose time was over.
        computed: Names of the cells that this call computed; the others were there.
        fields: Fields in every row.
        headline: The column that is drawn.
        table: Means over seeds.
    """

    rows: list[Row]
    failed: list[Failed]
    computed: list[str]
    fields: tuple[str, ...]
    headline: str
    table: list[Row]


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
        work: A function, see ``Experiment.work``, or an ``Experiment``. Processes here import it, or get
            it by value where Dask is installed, as a cluster always does: what a function of a notebook
            imports must be installed there, tnreg included.
        cells: Settings of each cell, values for JSON.
        folder: Where run folders, table and picture go; on a cluster, one that all its machines share.
        workers: Processes on this machine, at most one for each missing cell; if left out, as many as
            there are processors for ``threads`` each; 0 computes in this process.
        threads: Threads that torch uses in a cell; None does not change them.
        scheduler: Address of the scheduler of a running cluster, ``tcp://...``, or the path of its
            scheduler file; replaces processes here.
        retries: How often a cell that failed, or whose process died, is tried again, unless by an
            ``OptionError``.
        progress: Show a progress bar.

    Raises:
        OptionError: Options that do not fit each other, cells with the same name, a cell that is
            there with other settings, or Dask is not installed. Then nothing was computed.
        FileError: The folder holds something else, or cannot be written.
        TnregError: The scheduler was lost, or processes here cannot begin; what is done is written, and
            the same call goes on.
        KeyboardInterrupt: After Ctrl-C; the same call goes on.

    A cell is found again by its name, which holds the fields that vary. When a field starts to vary, as
    when a second value of it is added, names change and all cells are computed again. Put fields that
    will vary later into ``Experiment.fields`` from the start.

    Processes are spawned unless ``workers`` is 0 or there is a ``scheduler``: a script of your own
    then needs ``if __name__ == "__main__":``.

    Cost: some milliseconds a cell beside the work itself, and seconds until the processes are up.
    """
    what = work if isinstance(work, Experiment) else Experiment(work)
    check_integer(0 if workers is None else workers, 0, "sweep: workers")
    check_integer(1 if threads is None else threads, 1, "sweep: threads")
    check_integer(retries, 0, "sweep: retries")
    if scheduler is not None and workers is not None:
        message = "sweep: workers are those of the scheduler; give one of the two."
        raise OptionError(message, argument="workers")
    if (there := experiment_of(folder)) not in ("", what.title):
        message = f"{folder} is a run of {there!r}; choose another folder."
        raise OptionError(message, argument="folder")
    place = check_folder(folder, what.title)
    settings = [as_json(cell, "sweep: a cell is a dict of values for JSON") for cell in cells]
    about = _describe(what, settings)
    all_cells = [Cell(place, what.name(one, about["fields"]), one) for one in settings]
    _check_names([cell.name for cell in all_cells])
    done = {cell.name: found for cell in all_cells if (found := find(cell)) is not None}
    missing = [cell for cell in all_cells if cell.name not in done]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {place}: {error.strerror or error}") from None
    if not (place / "config.json").exists():  # a sweep that is cut short is known as one
        _write_about(place, about)
    if missing:
        what.prepare([cell.settings for cell in missing], place, progress)
    computed, failed = [], []
    try:
        with advancing("cells", len(all_cells), progress) as advance:
            advance(len(done))
            for cell, outcome in results(missing, what.work, workers, threads, scheduler, retries):
                if isinstance(outcome, tuple):
                    done[cell.name], now = outcome
                    computed += [cell.name] * now
                elif not isinstance(outcome, Unfinished):
                    failed.append(Failed(cell, outcome))
                advance(1)
    finally:  # what is done is written, whatever ended the sweep
        pairs = [(cell.settings, done[cell.name]) for cell in all_cells if cell.name in done]
        result = _write(what, place, about, pairs, failed, computed)
    return result


def _describe(what: Experiment, cells: list[Row]) -> Row:
    """Return what ``config.json`` of the sweep holds before anything is computed."""
    if not cells:
        raise OptionError("sweep: no cells; give at least one.", argument="cells")
    some = set().union(*cells).difference(set(cells[0]).intersection(*cells))
    if some:
        message = f"sweep: cells with different fields: not all have {', '.join(sorted(some))}."
        raise OptionError(message, argument="cells")
    values = {key: list({as_text(c[key]): c[key] for c in cells}.values()) for key in cells[0]}
    vary = [key for key in values if len(values[key]) > 1]
    fields = dict.fromkeys((*what.fields, *vary)) or values
    return {
        **versions(), "experiment": what.title,
        "config": {key: one if key in vary else one[0] for key, one in values.items()},
        "fields": tuple(sorted(fields, key=lambda name: name == "seed")),  # the seed last
        "headline": "", "summary": [], "failed": [], "table": [],
    }  # fmt: skip


def _check_names(names: list[str]) -> None:
    """Raise an ``OptionError`` for a name of several cells, or one that no folder can have."""
    for name, count in Counter(names).items():
        if count > 1 or not re.fullmatch(rb"[^./\\][^/\\]{0,199}", name.encode()):
            reason = f"{count} cells have it" if count > 1 else "no folder can have it"
            raise OptionError(
                f"sweep: a cell cannot be named {name!r}, {reason}; give each cell once, or names "
                "of your own by Experiment.name."
            )


def _write(
    what: Experiment,
    place: Path,
    about: Row,
    pairs: list[tuple[Row, Row]],
    failed: list[Failed],
    computed: list[str],
) -> Result:
    """Write ``results.csv`` and ``config.json`` of cells and their results, and draw the picture."""
    fields = about["fields"]
    rows = [_row(fields, cell, what.row(cell, summary)) for cell, summary in pairs]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {key for row in rows for key in row if pictures.is_number(row[key])}
    headlines = [what.headline, *(column for column in columns if column not in fields)]
    headline = next((column for column in headlines if column in numeric), "")
    table = what.table(rows, fields, headline) if headline else []
    reports = [{"name": f.cell.name, "config": f.cell.settings, "error": f.error} for f in failed]

    def write_rows(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_whole(place / "results.csv", write_rows)
    new = {"headline": headline, "summary": rows, "failed": reports, "table": table}
    _write_about(place, about | new | what.also(rows, fields))
    if headline:
        try:
            what.figure(place)
        except Exception as error:  # hours of computing are not lost for a picture
            warnings.warn(f"no picture of {place}: {type(error).__name__}: {error}", stacklevel=3)
    return Result(rows, failed, computed, fields, headline, table)


def _row(fields: Sequence[str], cell: Row, columns: Row) -> Row:
    """Return the fields of a cell and its columns, none of which takes the place of a field."""
    return {name: cell[name] for name in fields} | {
        f"{key} (result)" if key in fields else key: value
        for key, value in columns.items()
        if key not in fields or not same(value, cell[key])
    }


def _write_about(place: Path, about: Row) -> None:
    """Write ``config.json``; numbers that are not finite are null, for JSON has no others."""
    finite = json.loads(json.dumps(about), parse_constant=lambda name: None)
    text = json.dumps(seal(finite), indent=1) + "\n"
    write_whole(place / "config.json", lambda partial: partial.write_text(text, encoding="utf-8"))
