"""Commands that train: ``fit``, ``run``, ``sweep``, ``demo``."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from tnreg.cli.reply import Reply, short
from tnreg.cli.subject import device_of
from tnreg.cli.tables import (
    convac_tables,
    dynamics_table,
    going_on_table,
    init_scale_table,
    locality_table,
    sweep_table,
)
from tnreg.errors import OptionError
from tnreg.experiments import completion, convac, dynamics, locality
from tnreg.experiments import demo as demo_experiment
from tnreg.experiments.dynamics import init_scale
from tnreg.experiments.sweep import kinds as sweep_kinds
from tnreg.experiments.sweep.experiment import run as run_cells
from tnreg.machine.processes import is_first, started

TOGETHER = "work together in `tnreg run locality` alone; give other commands without torchrun"
_SETTINGS = completion.Settings()


def fit(
    file: str,
    /,
    *,
    settings: completion.Settings = _SETTINGS,
    out: Path = Path("runs/fit"),
    progress: bool = True,
    json: bool = False,
) -> None:
    """Complete a tensor from a part of its entries with a factorization along a tree.

    Writes a folder with config.json, model.safetensors, trajectory.npz and training.png; Ctrl-C
    ends the training and writes what was recorded.

    Args:
        file: A .npy, .npz, .safetensors or .pt file, or kinetic, il2, covid19, indian-pines.
        settings: What is trained, and how.
        out: Folder of the run; one that tnreg wrote before is replaced, any other is refused.
        progress: Show a progress bar.
        json: Print one JSON document in place of the table.
    """
    reply = Reply(json)
    device_of(settings.device)
    config = completion.Config(tensor=file, **dataclasses.asdict(settings))
    with reply.undisturbed():
        summary = completion.run(config, out, progress=reply.shows(progress))
    table = Table("", "", title=f"{file} along {summary['tree']}", show_header=False)
    for key in summary:
        if key == "tree":
            continue
        table.add_row(key, short(summary[key]))
    reply.table(table)
    reply.note(f"wrote {out}")
    reply.document({"tensor": file, "folder": out, **summary})


def run(
    experiment: Any,
    *,
    out: Path | None = None,
    progress: bool = True,
    json: bool = False,
) -> None:
    """Run an experiment of the paper, or the same on a tree and a target of your own.

    Writes a run folder; a run of dynamics, init-scale or locality that was killed or interrupted goes on when
    the same command is given. Several processes train locality together: torchrun --nproc-per-node 2 -m
    tnreg run locality.

    Args:
        experiment: What to run.
        out: Folder of the run, runs/MODEL-SEED or runs/EXPERIMENT if left out; one that tnreg wrote before
            is replaced, any other is refused.
        progress: Show a progress bar.
        json: Print one JSON document in place of the tables.
    """
    if started() > 1 and not isinstance(experiment, locality.Config):
        raise OptionError(f"torchrun started {started()} processes, which {TOGETHER}.")
    device_of(experiment.device)
    reply = Reply(json)
    with _going_on(), reply.undisturbed():
        folder, tables, found = _answer(experiment, out, reply.shows(progress))
    if not is_first():
        return
    for table in tables:
        reply.table(table)
    reply.note(f"wrote {folder}")
    reply.document({"folder": folder, **found})


def _answer(
    experiment: Any, out: Path | None, progress: bool
) -> tuple[Path, list[Table], dict[str, Any]]:
    """Folder of a run, tables of what it found, and the same for a JSON document."""
    runs = Path("runs")
    if isinstance(experiment, convac.Config):
        folder = out or runs / "convac"
        summary = convac.run(experiment, folder, progress=progress)
        return folder, convac_tables(summary), {"experiment": "convac", **summary}
    if isinstance(experiment, init_scale.Config):
        folder = out or runs / f"init-scale-{experiment.model}"
        rows = init_scale.run(experiment, folder, progress=progress)
        found = {"experiment": "init-scale", "rows": rows}
        return folder, [init_scale_table(rows, experiment.model)], found
    if isinstance(experiment, locality.Config):
        folder = out or runs / f"locality-{experiment.set}"
        rows = locality.run(experiment, folder, progress=progress)
        means, begun = locality.table(rows), locality.going_on(folder)
        title = f"{experiment.set}, {experiment.model}, {len(experiment.seeds)} seeds"
        found = {"experiment": "locality", "rows": rows, "means": means, "going on": begun}
        tables = [locality_table(means, title)]
        if len(rows) < len(locality.cells(experiment)):
            tables.append(going_on_table(begun))
        return folder, tables, found
    folder = out or runs / f"{experiment.model}-{experiment.seed}"
    summary = dynamics.run(experiment, folder, progress=progress)
    found = {"experiment": "dynamics", **summary}
    return folder, [dynamics_table(summary, experiment)], found


@contextlib.contextmanager
def _going_on() -> Iterator[None]:
    """Ctrl-C ends the command; the same one goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if is_first():
            message = "tnreg: interrupted; the same command goes on where this one stopped"
            print(message, file=sys.stderr)
        raise SystemExit(130) from None


def sweep(
    experiment: Any,
    *,
    out: Path | None = None,
    workers: int | None = None,
    threads: int = 1,
    scheduler: str | None = None,
    retries: int = 1,
    parquet: bool = False,
    progress: bool = True,
    json: bool = False,
) -> None:
    """Run an experiment over lists of settings, on this machine's processors or on a Dask cluster.

    Every setting takes a list: plain,igc are two values, 0:5 the integers 0 to 4, 0:20:5 every fifth of 0 to
    19. Every combination is a run folder in the sweep's folder; what is there is not computed again, so the
    same command goes on with a sweep that was killed or interrupted, and tries again what failed.

    Args:
        experiment: What to run.
        out: Folder of the sweep, runs/sweep-EXPERIMENT if left out.
        workers: Processes here; as many as there are processors if left out; 0 computes in this one.
        threads: Threads of each process.
        scheduler: Address of a Dask cluster that is there, tcp://HOST:PORT, or its scheduler file, in place
            of processes here. Its workers write into the same folder, and are started with --nthreads 1.
        retries: How often a run that failed is tried again before it is reported.
        parquet: Write results.parquet beside results.csv.
        progress: Show a progress bar.
        json: Print one JSON document in place of the table.
    """
    kind, cells = sweep_kinds.cells(experiment)
    if scheduler is None:
        for device in dict.fromkeys(cell["device"] for cell in cells):
            device_of(device)
    folder, reply = out or Path("runs") / f"sweep-{kind.name}", Reply(json)
    with _going_on(), reply.undisturbed():
        found = run_cells(
            kind.experiment, cells, folder, workers=workers, threads=threads, scheduler=scheduler,
            retries=retries, parquet=parquet, progress=reply.shows(progress),
        )  # fmt: skip
    reply.table(sweep_table(found, kind.name))
    reply.note(f"{len(found.rows)} runs, {len(found.computed)} of them now")
    reply.note(f"wrote {folder}")
    failed = {one.cell.name: str(one.error) for one in found.failed}
    reply.document(
        {
            "experiment": kind.name, "folder": folder, "rows": found.rows, "means": found.table,
            "computed": found.computed, "failed": failed,
        }
    )  # fmt: skip
    if failed:
        print(f"tnreg: {len(failed)} of {len(cells)} runs failed:", file=sys.stderr)
        for name, error in failed.items():
            print(f"  {name}: {error}", file=sys.stderr)
        print("  the same command tries them again", file=sys.stderr)
        raise SystemExit(1)


def demo(
    *,
    out: Path = Path("runs/demo"),
    device: str = "cpu",
    seed: int = 1,
    steps: int | None = None,
    progress: bool = True,
) -> None:
    """Complete a real tensor along a tree, end to end, and write a report.

    Args:
        out: Folder for pictures, trajectory, model and report.html.
        device: Any torch device, e.g. cuda.
        seed: Chooses the observed entries and the initial weights.
        steps: Fewer updates than the demo's own, to try it out.
        progress: Show progress bars.
    """
    config = demo_experiment.Config(device=str(device_of(device)), seed=seed)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    reply = Reply()
    demo_experiment.run(config, out, console=reply.console, progress=reply.shows(progress))
