"""Sweeps: one function over many settings, on this machine's processors or on a Dask cluster.

Every cell of a sweep is a run folder inside the sweep's folder and is written whole. What is there is
not computed again, so a sweep that was killed goes on when it is started again. A cell that fails is
tried again, then reported, and stops none of the others. At the end there are ``results.csv`` with one
row a cell, ``config.json`` with the same rows, their means over seeds and what failed, and a picture.

Dask does the scheduling, the retries and the communication (``pip install 'tnreg[scale]'``); where it is
not installed processes on this machine are Python's own. With ``workers=0`` the cells are computed in this
process, one after another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tnreg.errors import FileError, OptionError, check_integer
from tnreg.experiments.folder import experiment_of
from tnreg.experiments.sweep import pictures as sweep_figure
from tnreg.experiments.sweep.bar import Bar
from tnreg.experiments.sweep.cell import Cell, Unfinished, Work, found
from tnreg.experiments.sweep.names import cell_name, named, plain, swept, varying
from tnreg.experiments.sweep.tables import (
    About,
    headline_of,
    load_pyarrow,
    row_of,
    shown,
    write_rows,
)
from tnreg.experiments.sweep.workers import ClusterLost, Done, Failed, results
from tnreg.machine.files import check_folder


def _scalars(cell: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    kinds = (str, int, float, type(None))
    return {key: value for key, value in summary.items() if isinstance(value, kinds)}


@dataclass(frozen=True)
class Experiment:
    """What is swept. A function alone will do: everything else has a default.

    Attributes:
        work: ``work(cell, folder, checkpoint)`` returns results for JSON as a dict. ``folder`` is empty
            and becomes the run folder when the function returns; ``checkpoint`` is a path where it may
            keep what it needs to go on after it was killed, of these settings alone, removed when it
            is done. If it writes ``config.json`` itself, that holds the cell under ``config`` and the
            results under ``summary``.
        title: What ``config.json`` of the sweep calls it.
        fields: Fields of a cell that are always in its name and its row; others are if they vary.
        name: ``name(cell, fields)`` names the run folder; names that are long, or that several cells
            share, end with a hash.
        row: ``row(cell, results)`` gives the columns after the fields; all that are no lists if left out.
            A column named like a field whose value is another one is written as ``NAME (result)``.
        headline: The column that is drawn; if left out, or if it has no finite number, the first one
            that has.
        defaults: Values of settings that a run folder of an older version may lack.
        prepare: ``prepare(cells, folder, progress)`` is called first with the cells that are missing.
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
        unfinished: Those whose time was over; the same call goes on with them.
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
    """Compute the cells that are missing, then write table and picture of all that are there.

    Args:
        work: A function, see ``Experiment.work``, or an ``Experiment``. Functions of a script go to the
            workers by value; what they import must be installed there, tnreg included.
        cells: Settings of each, values for JSON.
        folder: Where run folders, table and picture go; on a cluster one that all its machines share.
        workers: Processes on this machine, at most one for each missing cell; as many
            as there are processors for ``threads`` each if left out; 0 computes in this process.
        threads: Threads that torch uses in a cell; None leaves them as they are.
        scheduler: Address of the scheduler of a cluster that is there, ``tcp://...``, or the path of its
            scheduler file, in place of processes here.
        retries: How often a cell that failed is tried again.
        parquet: Write ``results.parquet`` as well; needs pyarrow.
        progress: Show a progress bar.
        about: What else ``config.json`` shall hold; ``config`` takes the place of what was swept, the
            other names that the sweep writes are refused.

    Raises:
        OptionError: Options that do not fit each other, cells with the same settings, a cell that is
            there with other settings, or Dask is not installed. Then nothing was computed.
        FileError: The folder holds something else, or cannot be written.
        TnregError: The scheduler was lost; what is done is written, and the same call goes on.
        KeyboardInterrupt: After Ctrl-C; the same call goes on.

    A cell is found again by its name, which holds the fields that vary. When a field starts to vary,
    as when a second value of it is added, names change and all cells are computed again; fields that
    will vary later are better in ``Experiment.fields`` from the start.

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
    all_settings = [plain(cell) for cell in cells]
    fields = varying(all_settings, what.fields)
    written = About(what.title, fields, {} if about is None else about, swept(all_settings))
    names = named(all_settings, fields, what.name)
    all_cells = [
        Cell(place, name, settings, what.defaults)
        for name, settings in zip(names, all_settings, strict=True)
    ]
    state = _State(all_cells)
    _begin(what, place, written, state.missing, progress)
    lost = None
    with Bar(len(all_cells), len(state.done), progress) as bar:
        on = results(
            state.missing, what.work, workers=workers, threads=threads, scheduler=scheduler,
            retries=retries, told=bar.told,
        )  # fmt: skip
        try:
            for one in on:
                bar.advance(state.take(one, what), failed=isinstance(one, Failed))
        except ClusterLost as error:
            lost = error
    result = _end(what, place, written, state, parquet)
    if lost is not None:
        raise lost
    return result


class _State:
    """Results of the cells that are done, those that failed, and names of those computed now."""

    def __init__(self, cells: list[Cell]) -> None:
        there = {cell.name: found(cell) for cell in cells}
        self.cells = cells
        self.missing = [cell for cell in cells if there[cell.name] is None]
        self.done = {name: one for name, one in there.items() if one is not None}
        self.failed: list[Failed] = []
        self.unfinished: list[Failed] = []
        self.computed: list[str] = []

    def take(self, one: Done | Failed, what: Experiment) -> str:
        """Keep what became of a cell; a line that says it."""
        name = one.cell.name
        if isinstance(one, Failed):
            over = isinstance(one.exception, Unfinished)
            (self.unfinished if over else self.failed).append(one)
            return f"{name} {'is not finished' if over else 'failed'}"
        self.done[name] = one.summary
        self.computed += [name] if one.computed else []
        return f"{name} {shown(what.row(one.cell.settings, one.summary), what.headline)}"


def _check(
    workers: int | None, threads: int | None, scheduler: str | None, retries: int, parquet: bool
) -> None:
    for value, least, name in ((workers, 0, "workers"), (threads, 1, "threads")):
        if value is not None:
            check_integer(value, least, f"sweep: {name}")
    check_integer(retries, 0, "sweep: retries")
    if scheduler is not None and workers is not None:
        raise OptionError(
            "sweep: workers are those of the scheduler; give one of the two.", argument="workers"
        )
    if parquet:
        load_pyarrow()


def _begin(
    what: Experiment, place: Path, written: About, missing: list[Cell], progress: bool
) -> None:
    """The sweep's folder, with a ``config.json`` so that a sweep cut short is known as one."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {place}: {error.strerror or error}") from None
    if not (place / "config.json").exists():
        written.write(place, [], [], "", [])
    if what.prepare is not None and missing:
        what.prepare([cell.settings for cell in missing], place, progress)


def _end(what: Experiment, place: Path, written: About, state: _State, parquet: bool) -> Result:
    """Rows of all cells that are done, written, with the picture."""
    fields = written.fields
    rows = [
        row_of(fields, cell.settings, what.row(cell.settings, state.done[cell.name]))
        for cell in state.cells
        if cell.name in state.done
    ]
    headline = headline_of(rows, fields, what.headline)
    table = what.table(rows, fields, headline) if headline else []
    written.write(place, rows, table, headline, state.failed)
    write_rows(place, rows, parquet)
    if headline:
        try:
            what.figure(place)
        except Exception as error:  # hours of computing are not lost for a picture
            warnings.warn(f"no picture of {place}: {type(error).__name__}: {error}", stacklevel=3)
    return Result(
        place, rows, state.failed, state.unfinished, state.computed, fields, headline, table
    )
