"""The commands ``run`` and ``sweep``, made for the presets that are named: other defaults come from them."""

import functools
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from tyro.conf import subcommand

from tnreg.cli import tables
from tnreg.cli.inputs import check_device
from tnreg.cli.output import Reply
from tnreg.experiments import convac, dynamics, locality
from tnreg.experiments.dynamics import init_scale
from tnreg.experiments.sweep import command as sweep_command
from tnreg.experiments.sweep import run as run_cells
from tnreg.machine.processes import is_first
from tnreg.machine.progress import printable


def make_run(model: str, image_set: str) -> Callable[..., None]:
    """Return the command ``run`` with the defaults of these presets of dynamics and of locality."""
    far = locality.SETS.get(image_set, locality.SETS["digits"])
    experiments: Any = _one_of(
        ("dynamics", dynamics.MODELS.get(model, dynamics.htf), "One training, watched."),
        ("init-scale", init_scale.Config(), "Trainings from several initial scales."),
        ("convac", convac.Config(), "Digits by networks of three trees, then shrunk."),
        ("locality", far, "Regularizers that make networks see far."),
    )

    def run(
        experiment: experiments, *, out: Path | None = None, progress: bool = True, json: bool = False
    ) -> None:
        """Run an experiment of the paper, or the same on a tree and a target of your own.

        A run of dynamics, init-scale or locality that was killed or interrupted goes on when the same
        command is given. Several processes train locality: torchrun --nproc-per-node 2 -m tnreg run locality.

        Args:
            experiment: What to run.
            out: Folder of the run, runs/MODEL-SEED or runs/EXPERIMENT if left out; one that tnreg wrote
                before is replaced, any other is refused.
            progress: Show a progress bar.
            json: Print one JSON document instead of the table.
        """
        check_device(experiment.device)
        reply = Reply(json)
        with reply.undisturbed():
            folder, results, answer = _run(experiment, out, reply.shows(progress))
        if not is_first():
            return
        for table in results:
            reply.table(table)
        reply.note(f"wrote {folder}")
        reply.document({"folder": folder, **answer})

    return run


def make_sweep(model: str, image_set: str) -> Callable[..., None]:
    """Return the command ``sweep``; its default lists are those of the presets, as for ``run``."""
    choices = []
    for name, named in (("locality", image_set), ("dynamics", model)):
        default = sweep_command.options(name, named.split(",")[0])
        choices.append((name, default, sweep_command.KINDS[name][3]))
    experiments: Any = _one_of(*choices)

    def sweep(
        experiment: experiments,
        *,
        out: Path | None = None,
        workers: int | None = None,
        threads: int = 1,
        scheduler: str | None = None,
        retries: int = 1,
        progress: bool = True,
        json: bool = False,
    ) -> None:
        """Run an experiment over lists of settings, on this machine's processors or on a Dask cluster.

        Every setting takes a list: plain,igc are two values, 0:5 the integers 0 to 4, 0:20:5 every fifth of 0
        to 19. Every combination is a run folder in the sweep's folder; what is there is not computed again,
        so the same command continues a sweep that was killed or interrupted, and repeats what failed.

        Args:
            experiment: What to run.
            out: Folder of the sweep, runs/sweep-EXPERIMENT if left out.
            workers: Processes here; as many as there are processors if left out; 0 computes in this one.
            threads: Threads of each process.
            scheduler: Address of a running Dask cluster, tcp://HOST:PORT, or its scheduler file, instead of
                processes here. Its workers write into the same folder, and are started with --nthreads 1.
            retries: How often a run that failed is tried again before it is reported.
            progress: Show a progress bar.
            json: Print one JSON document instead of the table.
        """
        name, cells = sweep_command.cells(experiment)
        if scheduler is None:
            for device in dict.fromkeys(cell["device"] for cell in cells):
                check_device(device)
        folder, reply = out or Path("runs") / f"sweep-{name}", Reply(json)
        with reply.undisturbed():
            result = run_cells(
                sweep_command.KINDS[name][0], cells, folder, workers=workers, threads=threads,
                scheduler=scheduler, retries=retries, progress=reply.shows(progress),
            )  # fmt: skip
        for table in tables.sweep_tables(result, name):
            reply.table(table)
        counts = f"{len(result.rows)} runs, {len(result.computed)} of them now"
        reply.note(f"{counts}\nwrote {folder}")
        failed = {run.cell.name: str(run.error) for run in result.failed}
        reply.document(
            {
                "experiment": name, "folder": folder, "rows": result.rows, "means": result.table,
                "computed": result.computed, "failed": failed,
            }
        )  # fmt: skip
        if failed:
            print(f"tnreg: {len(failed)} of {len(cells)} runs failed:", file=sys.stderr)
            lines = (printable(f"  {name}: {error}", keep="\n") for name, error in failed.items())
            print(*lines, "  the same command tries them again", sep="\n", file=sys.stderr)
            raise SystemExit(1)

    return sweep


def _one_of(*choices: tuple[str, Any, str]) -> Any:
    """Return the type of one of several experiments, from names, defaults and descriptions."""
    kinds = [
        Annotated[type(default), subcommand(name, default=default, description=about)]
        for name, default, about in choices
    ]
    return functools.reduce(operator.or_, kinds)


# The module of an experiment, its name, and that of its folder.
_EXPERIMENTS: dict[type, tuple[Any, str, str]] = {
    dynamics.Config: (dynamics, "dynamics", "{0.model}-{0.seed}"),
    init_scale.Config: (init_scale, "init-scale", "init-scale-{0.model}"),
    convac.Config: (convac, "convac", "convac"),
    locality.Config: (locality, "locality", "locality-{0.set}"),
}


def _run(config: Any, out: Path | None, progress: bool) -> tuple[Path, list[Table], dict[str, Any]]:
    """Run an experiment; return its folder, tables of the results, and the results for JSON."""
    module, name, place = _EXPERIMENTS[type(config)]
    folder = out or Path("runs") / place.format(config)
    answer = result = module.run(config, folder, progress=progress)
    if module is convac:
        shown = tables.convac_tables(result)
    elif module is init_scale:
        answer, shown = {"rows": result}, [tables.init_scale_table(result, config.model)]
    elif module is locality:
        means, begun = locality.table(result), locality.going_on(folder)
        pairs = locality.paired(result)
        answer = {"rows": result, "means": means, "paired": pairs, "going on": begun}
        title = f"{config.set}, {config.model}, {len(config.seeds)} seeds"
        shown = [tables.locality_table(means, title)] if means else []
        shown += tables.paired_tables(pairs)
        if len(result) < len(locality.cells(config)):
            shown.append(tables.unfinished_table(begun))
    else:
        shown = [tables.summary_table(result, f"{config.model}, seed {config.seed}")]
    return folder, shown, {"experiment": name, **answer}
