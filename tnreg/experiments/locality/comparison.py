"""Seeing far: test accuracy against distance, plain training beside regularizers (figures 5 and 6).

The same network is trained on sets whose label hangs on pixels some distance apart, once for every arm,
distance and seed. Arms are plain training, weight decay, dropout, the input gradient change of Razin,
Maman and Cohen (2022), arXiv:2201.11729, and interaction energy. Every training is a cell of a
``sweep`` and a run folder of ``locality_run``, ``igc-24-seed-101`` and so on; those that are there
already are not trained again, and one that was killed, or that a deadline ended, goes on from its
checkpoint. Then ``locality.png``, ``results.csv`` and ``config.json`` with the table of results are written.

The defaults for ``set="pathfinder"`` and ``set="cifar"`` are the published ones and want a GPU; those
for ``"digits"`` take minutes on two processor cores.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from tnreg import images
from tnreg.errors import OptionError, TnregError, check_integer
from tnreg.experiments import sweep
from tnreg.experiments.locality.pictures import figure, going_on, table
from tnreg.experiments.locality.settings import ARMS, Execution, Settings
from tnreg.experiments.locality.train import train
from tnreg.experiments.sweep.cell import Unfinished
from tnreg.machine.processes import Processes, ProcessLost, joined


@dataclass(frozen=True)
class Images(Settings):
    """Settings of the images, which all trainings of a sweep share.

    Attributes:
        set: The preset that the other defaults come from: pairs of digits, pairs of CIFAR-10 images,
            or Pathfinder.
        data_seed: Seed of the images; if left out every seed has images of its own.
        train: Training images.
        test: Test images.
        size: Height and width of Pathfinder images.
        matched: Pathfinder whose negatives have the disc distances of positives.
        source: For CIFAR-10: the folder cifar-10-batches-py of its archive for Python.
    """

    set: Literal["digits", "cifar", "pathfinder", "tiny"] = "digits"
    data_seed: int | None = None
    train: int = 2000
    test: int = 2000
    size: int = 150
    matched: bool = False
    source: str = "cifar-10-batches-py"


@dataclass(frozen=True)
class Training(Images):
    """Everything that one training is made from, its images included.

    Attributes:
        arm: What is added to plain training: plain, weight-decay, dropout, igc, interaction.
        distance: Pixels between the two images of a pair; for Pathfinder paddles of a path.
        seed: Draws initial weights, the order of the images, and patches.
    """

    arm: str = "plain"
    distance: int = 0
    seed: int = 101


_EXECUTION = Execution()


@dataclass(frozen=True)
class Config(Images):
    """Settings of one sweep.

    Attributes:
        arms: What is compared: plain, weight-decay, dropout, igc, interaction.
        distances: Pixels between the two images of a pair; for Pathfinder paddles of a path.
        seeds: Each draws initial weights, the order of the images, and patches.
        workers: Trainings at a time, each in a process of its own with one thread, on one GPU as well; 1 for
            this process.
        until: Seconds after which nothing is trained any more: trainings that are not finished by then end
            with their state written, and the same command goes on with them. 0 for no such end.
        execution: How trainings are carried out.
    """

    arms: tuple[str, ...] = ("plain", "igc", "interaction")
    distances: tuple[int, ...] = (0, 8, 16, 24)
    seeds: tuple[int, ...] = (101, 102, 103, 104, 105)
    workers: int = 1
    until: float = 0.0
    execution: Execution = _EXECUTION


digits = Config()
pathfinder = Config(
    set="pathfinder", distances=(3, 5, 7, 9), seeds=(1, 2, 3, 4, 5), data_seed=0, train=10_000,
    test=10_000, model="resnet-18", epochs=150, stop_above=1.0, stop_epochs=21, lr=0.01, test_every=1,
    patches="random", statistics="batch", standardize=True, igc=9.0, igc_every=1, interaction=0.1,
    interaction_until=0, interaction_target=0.0, execution=Execution(checkpoint_seconds=30.0),
)  # fmt: skip
cifar = dataclasses.replace(
    pathfinder, set="cifar", distances=(0, 40, 80, 120, 160), train=5_000, patches="images", igc=1.0
)
tiny = Config(
    set="tiny",
    distances=(0, 24),
    seeds=(1, 2),
    train=60,
    test=50,
    epochs=2,
    test_every=1,
    igc_every=1,
)
SETS: dict[str, Config] = {
    "digits": digits, "cifar": cifar, "pathfinder": pathfinder, "tiny": tiny,
}  # fmt: skip


def run(config: Config, folder: str | Path, *, progress: bool = False) -> list[dict[str, Any]]:
    """Train what is missing, write table and figure, and return one row of results for each training.

    Args:
        config: ``SETS`` has presets to start from with ``dataclasses.replace``.
        folder: Where the runs, the table and the picture go.
        progress: Show a progress bar, one step a training.

    Returns:
        Rows of the trainings that are finished, with arm, distance, seed, test accuracy of the last epoch,
        train accuracy, epochs, processor seconds; ``going_on`` tells of those that are begun.

    Raises:
        TnregError: Settings that do not fit, or a run that is there was made with other ones; or
            trainings failed: then the rest is complete.

    Processes are spawned if ``config.workers`` > 1: a script of your own then needs
    ``if __name__ == "__main__":``. For a cluster, and for any other field that varies, see ``sweep``.

    Started by torchrun, all processes call this with the same arguments and work on one training
    together, one training after the other. Rank 0 reads and writes the files, and tells the others.
    """
    check_integer(config.workers, 1, "locality: workers")
    if not config.until >= 0:
        raise OptionError(
            f"locality: until must be seconds >= 0, found {config.until!r}.", argument="until"
        )
    with joined(config.device) as processes:
        work = functools.partial(
            _work, execution=config.execution,
            deadline=time.monotonic() + config.until if config.until else math.inf,
        )  # fmt: skip
        if processes.count == 1:
            experiment = dataclasses.replace(EXPERIMENT, work=work)
            return _sweep(config, folder, progress, experiment)
        if config.workers > 1:
            raise OptionError(
                f"locality: {processes.count} processes train together here, one training after the "
                "other; leave workers at 1."
            )
        if processes.rank:
            return _follow(processes, work)
        return _lead(processes, config, folder, progress, work)


def cells(config: Config) -> list[dict[str, Any]]:
    """Settings of every training: all arms of a distance, all distances of a seed."""
    if not (config.arms and config.distances and config.seeds):
        raise OptionError(
            "locality: give at least one arm, one distance and one seed.", argument="arms"
        )
    for name in ("arms", "distances", "seeds"):
        given = getattr(config, name)
        if len(set(given)) < len(given):
            raise OptionError(f"locality: {name} has one twice: {given}.")
    shared = {f.name for f in dataclasses.fields(Training)} - {"arm", "distance", "seed"}
    same = {name: getattr(config, name) for name in shared}
    found = [
        dataclasses.asdict(Training(arm=arm, distance=distance, seed=seed, **same))
        for seed in config.seeds
        for distance in config.distances
        for arm in config.arms
    ]
    for cell in found:
        check(cell)
    return found


def check(cell: Mapping[str, Any]) -> None:
    """Raise an ``OptionError`` for settings that no training takes."""
    if cell["arm"] not in ARMS:
        raise OptionError(f"locality: no arm {cell['arm']!r}; there is {', '.join(ARMS)}.")
    if cell["set"] not in SETS:
        raise OptionError(f"locality: no set {cell['set']!r}; there is {', '.join(SETS)}.")


def _sweep(
    config: Config, folder: str | Path, progress: bool, experiment: sweep.Experiment
) -> list[dict[str, Any]]:
    alone = config.workers == 1
    found = sweep.run(
        experiment, cells(config), folder, workers=0 if alone else config.workers,
        threads=None if alone else 1, progress=progress, about={"config": dataclasses.asdict(config)},
    )  # fmt: skip
    if found.failed:
        raise TnregError(
            f"{len(found.failed)} of {len(found.failed) + len(found.rows)} trainings failed; the same "
            "command tries them again.\n"
            + "\n".join(f"  {names}: {error}" for error, names in _by_error(found.failed).items())
        )
    if not found.rows and going_on(folder):  # the sweep draws what is finished
        figure(folder)
    return found.rows


def _by_error(failed: Sequence[sweep.Failed]) -> dict[str, str]:
    """Each error once, and the cells that it is about."""
    names: dict[str, list[str]] = {}
    for one in failed:
        names.setdefault(one.error, []).append(one.cell.name)
    more = {
        error: f" and {len(found) - 4} more" for error, found in names.items() if len(found) > 4
    }
    return {error: ", ".join(found[:4]) + more.get(error, "") for error, found in names.items()}


class _Ended(BaseException):
    """What ends the whole sweep and not one cell: processes that are not all at the same place."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _lead(
    processes: Processes, config: Config, folder: str | Path, progress: bool, work_one: sweep.Work
) -> list[dict[str, Any]]:
    """The sweep on rank 0, which tells the others what to train; then the rows, or its error, to all."""

    def work(cell: dict[str, Any], beside: Path, checkpoint: Path) -> dict[str, Any]:
        processes.from_first(lambda: cell)
        try:
            return work_one(cell, beside, checkpoint)
        except ProcessLost as error:
            raise _Ended(error) from error
        except TnregError:
            raise  # the others have it as well, and wait for the next cell
        except Exception as error:
            raise _Ended(error) from error

    def end() -> list[dict[str, Any]]:
        if isinstance(outcome, TnregError):
            raise outcome
        return outcome

    outcome: list[dict[str, Any]] | TnregError
    try:
        outcome = _sweep(config, folder, progress, dataclasses.replace(EXPERIMENT, work=work))
    except TnregError as error:
        outcome = error
    except _Ended as ended:
        raise ended.error from None
    return processes.from_first(end)


def _follow(processes: Processes, work_one: sweep.Work) -> list[dict[str, Any]]:
    """Train what rank 0 says until it gives the rows of all."""
    while True:
        told: Any = processes.from_first(lambda: None)
        if isinstance(told, list):
            return told
        try:
            work_one(told, Path(), Path())
        except ProcessLost:
            raise
        except TnregError:
            pass  # rank 0 has it as well, and reports it


def _work(
    cell: dict[str, Any],
    folder: Path,
    checkpoint: Path,
    *,
    execution: Execution = _EXECUTION,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Train one cell; in several processes with the images that rank 0 has."""
    one = Training(**cell)
    place = checkpoint.parent  # that of the sweep
    with joined(one.device) as processes:
        late = time.monotonic() >= deadline
        if processes.from_first(lambda: late):
            raise Unfinished("the time is over before it was begun", {"epochs": 0})
        data, test = processes.from_first(
            lambda: [_images(one, place, split) for split in ("train", "test")]
        )
    settings = Settings(**{f.name: cell[f.name] for f in dataclasses.fields(Settings)})
    return train(
        settings, one.arm, one.seed, data, test, folder, about=cell, checkpoint=checkpoint,
        execution=execution, deadline=deadline,
    )  # fmt: skip


def _prepare(missing: list[dict[str, Any]], place: Path, progress: bool) -> None:
    """Make the sets of Pathfinder, each once and with all processors."""
    for cell in missing:
        if cell["set"] == "pathfinder":
            for split in ("train", "test"):
                _images(Training(**cell), place, split, progress)


def _images(
    one: Training, place: Path, split: Literal["train", "test"], progress: bool = False
) -> images.ImageSet:
    """The set of a training; Pathfinder sets are kept in ``sets``, as they take minutes."""
    seed = one.seed if one.data_seed is None else one.data_seed
    count = one.train if split == "train" else one.test
    if one.set != "pathfinder":
        source = one.source if one.set == "cifar" else "digits"
        return images.is_same_class(
            count, distance=one.distance, source=source, split=split, seed=seed
        )
    name = f"{'matched-' if one.matched else ''}{one.distance}-{one.size}-{split}-{seed}-{count}"
    path = place / "sets" / f"{name}.npz"
    if path.exists():
        return images.load(path)
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_name(f".{name}.lock")):
        if not path.exists():
            made = images.pathfinder(
                count, length=one.distance, size=one.size, matched=one.matched, split=split, seed=seed,
                progress=progress,
            )  # fmt: skip
            made.save(path)
        path.with_name(f".{name}.lock").unlink(missing_ok=True)
    return images.load(path)


def _name(cell: Mapping[str, Any], fields: Sequence[str]) -> str:
    first = f"{cell['arm']}-{cell['distance']}-seed-{cell['seed']}"
    more = [name for name in fields if name not in _FIELDS]
    return "-".join([first, sweep.cell_name(cell, more)]) if more else first


def _row(cell: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    seconds = summary["cpu seconds"] if summary["device"] == "cpu" else summary["seconds"]
    return {
        "test accuracy": summary["test accuracy"], "train accuracy": summary["train accuracy"],
        "penalty": summary["penalty"], "epochs": summary["epochs"], "seconds": seconds,
    }  # fmt: skip


_FIELDS = ("arm", "distance", "seed")
EXPERIMENT = sweep.Experiment(
    _work, title="locality", fields=_FIELDS, name=_name, row=_row, headline="test accuracy",
    defaults=dataclasses.asdict(Training()), prepare=_prepare,
    table=lambda rows, fields, _: table(rows, fields), figure=figure,
)  # fmt: skip
