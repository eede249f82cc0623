"""The sweep of ``locality``: its settings, its presets, its cells, and their images."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tnreg import images
from tnreg.errors import OptionError, TnregError, check_integer
from tnreg.experiments import sweep
from tnreg.experiments.locality.pictures import figure, going_on, paired, table
from tnreg.experiments.locality.settings import ARMS, Execution, Settings
from tnreg.experiments.locality.train import train
from tnreg.experiments.sweep.cell import Unfinished
from tnreg.images.sets import ImageSet
from tnreg.machine.processes import Processes, ProcessLost, joined


@dataclass(frozen=True)
class Images(Settings):
    """Settings of the images, which all trainings of a sweep share.

    Attributes:
        set: The preset that the other defaults come from: pairs of digits, of squares of photos, of spectra
            or of CIFAR-10 images, or Pathfinder.
        data_seed: Seed of the images; if left out every seed has images of its own.
        train: Training images.
        test: Test images.
        size: Height and width of Pathfinder images.
        matched: Pathfinder whose negatives have the disc distances of positives.
        source: For CIFAR-10: the folder cifar-10-batches-py of its archive for Python.
        pretrain_distances: Distances of the pretraining that ``pretrain_epochs`` asks for.
    """

    set: Literal["digits", "photos", "spectra", "cifar", "pathfinder", "tiny"] = "digits"
    data_seed: int | None = None
    train: int = 2000
    test: int = 2000
    size: int = 150
    matched: bool = False
    source: str = "cifar-10-batches-py"
    pretrain_distances: tuple[int, ...] = (0, 8, 16)


@dataclass(frozen=True)
class Training(Images):
    """Everything that one training is made from, its images included.

    Attributes:
        arm: What is added to plain training: plain, weight-decay, dropout, sam, igc, interaction, rank.
        distance: Pixels between the two images of a pair; for Pathfinder paddles of a path.
        seed: Draws initial weights, the order of the images, and patches.
    """

    arm: str = "plain"
    distance: int = 0
    seed: int = 101


_EXECUTION = Execution()
_Split = Literal["train", "test"]


@dataclass(frozen=True)
class Config(Images):
    """Settings of one sweep.

    Attributes:
        arms: What is compared: plain, weight-decay, dropout, sam, igc, interaction, rank.
        distances: Pixels between the two images of a pair; for Pathfinder paddles of a path.
        seeds: Each draws initial weights, the order of the images, and patches.
        workers: Trainings at a time, each in a process of its own with one thread, on one GPU as well; 1 for
            this process.
        until: Seconds after which nothing is trained any more: trainings that are not finished by then end
            with their state written, and the same command goes on with them. 0 for no such end.
        execution: How trainings are carried out.
    """

    arms: tuple[str, ...] = ("plain", "igc", "interaction", "rank")
    distances: tuple[int, ...] = (0, 8, 16, 24)
    seeds: tuple[int, ...] = (101, 102, 103, 104, 105)
    workers: int = 1
    until: float = 0.0
    execution: Execution = _EXECUTION


digits = Config()
photos = Config(set="photos")
spectra = Config(set="spectra", distances=(0, 24))
pathfinder = Config(
    set="pathfinder", distances=(3, 5, 7, 9), seeds=(1, 2, 3, 4, 5), data_seed=0, train=10_000,
    test=10_000, model="resnet-18", epochs=150, stop_above=1.0, stop_epochs=21, lr=0.01, test_every=1,
    patches="random", statistics="batch", standardize=True, igc=9.0, igc_every=1, interaction=0.1,
    interaction_until=0, interaction_target=0.0, rank=0.02, rank_start=2000, rank_until=8000,
    pretrain_distances=(3, 5, 7), execution=Execution(checkpoint_seconds=30.0),
)  # fmt: skip
cifar = dataclasses.replace(
    pathfinder, set="cifar", distances=(0, 40, 80, 120, 160), train=5_000, patches="images", igc=1.0,
    pretrain_distances=(0, 40, 80, 120),
)  # fmt: skip
tiny = Config(
    set="tiny", distances=(0, 24), seeds=(1, 2), train=60, test=50, epochs=2, test_every=1, igc_every=1,
    rank_start=0,
)  # fmt: skip
SETS = {
    "digits": digits, "photos": photos, "spectra": spectra, "cifar": cifar, "pathfinder": pathfinder,
    "tiny": tiny,
}  # fmt: skip


def run(config: Config, folder: str | Path, *, progress: bool = False) -> list[dict[str, Any]]:
    """Train what is missing, write table and figure, and return one row of results for each training.

    Args:
        config: ``SETS`` has presets to start from with ``dataclasses.replace``. With more than one worker a
            script of your own needs ``if __name__ == "__main__":``.
        folder: Where the runs, the table and the picture go.
        progress: Show a progress bar, one step a training.

    Returns:
        Rows of the trainings that are finished, with arm, distance, seed, test accuracy of the last epoch,
        train accuracy, epochs, processor seconds; ``going_on`` tells of those that are begun.

    Raises:
        TnregError: Settings that do not fit, or a run that is there was made with other ones; or
            trainings failed: then the rest is complete.

    Started by torchrun, all processes call this with the same arguments and work on one training after
    the other together. For a cluster, and for any other field that varies, see ``sweep``.
    """
    check_integer(config.workers, 1, "locality: workers")
    if not config.until >= 0:
        message = f"locality: until must be seconds >= 0, found {config.until!r}."
        raise OptionError(message, argument="until")
    with joined(config.device) as processes:
        end = time.monotonic() + config.until if config.until else math.inf
        work = functools.partial(_work, execution=config.execution, deadline=end)
        if processes.count == 1:
            return _sweep(config, folder, progress, work)
        if config.workers > 1:
            message = f"{processes.count} processes train together here, one training after the other"
            raise OptionError(f"locality: {message}; leave workers at 1.", argument="workers")
        return _sweep_together(processes, config, folder, progress, work)


def cells(config: Config) -> list[dict[str, Any]]:
    """Return the settings of every training: all arms of a distance, all distances of a seed."""
    if not (config.arms and config.distances and config.seeds):
        message = "locality: give at least one arm, one distance and one seed."
        raise OptionError(message, argument="arms")
    for name in ("arms", "distances", "seeds"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise OptionError(f"locality: {name} has one twice: {values}.", argument=name)
    same = {f.name: getattr(config, f.name) for f in dataclasses.fields(Images)}
    trainings = [
        dataclasses.asdict(Training(arm=arm, distance=distance, seed=seed, **same))
        for seed in config.seeds
        for distance in config.distances
        for arm in config.arms
    ]
    for cell in trainings:
        check(cell)
    return trainings


def check(cell: Mapping[str, Any]) -> None:
    """Raise an ``OptionError`` for settings that no training takes."""
    for name, choices in (("arm", ARMS), ("set", SETS)):
        if cell[name] not in choices:
            message = f"locality: no {name} {cell[name]!r}; there is {', '.join(choices)}."
            raise OptionError(message, argument=name)


def _sweep(config: Config, folder: str | Path, progress: bool, work: sweep.Work) -> list[dict[str, Any]]:
    """Train what is missing; return the rows, or raise one error for the trainings that failed."""
    alone = config.workers == 1
    result = sweep.run(
        dataclasses.replace(EXPERIMENT, work=work), cells(config), folder,
        workers=0 if alone else config.workers, threads=None if alone else 1, progress=progress,
    )  # fmt: skip
    if failed := result.failed:
        message = f"{len(failed)} of {len(failed) + len(result.rows)} trainings failed"
        errors = (f"\n  {names}: {error}" for error, names in _by_error(failed).items())
        raise TnregError(f"{message}; the same command tries them again.{''.join(errors)}")
    if not result.rows and going_on(folder):  # the sweep draws what is finished
        figure(folder)
    return result.rows


def _by_error(failed: Sequence[sweep.Failed]) -> dict[str, str]:
    """Return each error once, with the names of the cells that have it."""
    names: dict[str, list[str]] = {}
    for failure in failed:
        names.setdefault(failure.error, []).append(failure.cell.name)
    return {
        error: ", ".join(some[:4]) + (f" and {len(some) - 4} more" if len(some) > 4 else "")
        for error, some in names.items()
    }


class _Ended(BaseException):
    """An error that ends the whole sweep, not one cell: processes are not all at the same place."""


def _sweep_together(
    processes: Processes, config: Config, folder: str | Path, progress: bool, work: sweep.Work
) -> list[dict[str, Any]]:
    """Sweep on rank 0, which sends the others what to train; return the rows, or raise, on all."""

    def lead(cell: dict[str, Any], beside: Path, checkpoint: Path) -> dict[str, Any]:
        try:
            return work(processes.from_first(lambda: cell), beside, checkpoint)
        except Exception as error:
            if isinstance(error, TnregError) and not isinstance(error, ProcessLost):
                raise  # the others have it as well, and wait for the next cell
            raise _Ended(error) from None

    if processes.rank == 0:
        try:
            return processes.from_first(lambda: _sweep(config, folder, progress, lead))
        except _Ended as ended:
            raise ended.args[0] from None
    message: Any
    while isinstance(message := processes.from_first(dict), dict):  # a cell; at the end it is the rows
        try:
            work(message, Path(), Path())
        except ProcessLost:
            raise
        except TnregError:
            pass  # rank 0 has it as well, and reports it
    return list(message)


def _work(
    cell: dict[str, Any],
    folder: Path,
    checkpoint: Path,
    *,
    execution: Execution = _EXECUTION,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Train one cell; in several processes with the images that rank 0 has."""
    training = Training(**cell)
    place = checkpoint.parent  # that of the sweep

    def load() -> list[ImageSet]:
        if time.monotonic() >= deadline:
            raise Unfinished("the time is over before it was begun")
        return [_images(one, place, split) for one, split in _sets(training)]

    with joined(training.device) as processes:
        *before, data, test = processes.from_first(load)
    return train(
        training, training.arm, training.seed, data, test, folder, before=before, checkpoint=checkpoint,
        execution=execution, deadline=deadline,
    )  # fmt: skip


def _prepare(missing: list[dict[str, Any]], place: Path, progress: bool) -> None:
    """Make the sets of Pathfinder, or see that they can be read, each once and with all processors."""
    sets = {
        _set_of(one, place, split): (one, split)
        for cell in missing
        if cell["set"] == "pathfinder"
        for one, split in _sets(Training(**cell))
    }
    for training, split in sets.values():
        _images(training, place, split, progress)


def _sets(training: Training) -> list[tuple[Training, _Split]]:
    """Return the sets of a training: those of its pretraining, its own, and that of the test."""
    shorter = training.pretrain_distances if training.pretrain_epochs else ()
    before = [dataclasses.replace(training, distance=d) for d in shorter if d < training.distance]
    return [(one, "train") for one in (*before, training)] + [(training, "test")]


def _set_of(training: Training, place: Path, split: _Split) -> tuple[int, int, Path]:
    """Return the size of a set, its seed, and where a sweep keeps it if it is one of Pathfinder."""
    count = training.train if split == "train" else training.test
    seed = training.seed if training.data_seed is None else training.data_seed
    name = f"{training.distance}-{training.size}-{split}-{seed}-{count}.npz"
    return count, seed, place / "sets" / f"{'matched-' if training.matched else ''}{name}"


def _images(training: Training, place: Path, split: _Split, progress: bool = False) -> ImageSet:
    """Return the set of a training."""
    distance, (count, seed, path) = training.distance, _set_of(training, place, split)
    if training.set != "pathfinder":
        named = {"cifar": training.source, "tiny": "digits"}
        source = named.get(training.set, training.set)
        return images.is_same_class(count, distance=distance, source=source, split=split, seed=seed)
    if not path.exists():  # making it takes minutes
        path.parent.mkdir(exist_ok=True)
        images.pathfinder(
            count, length=distance, size=training.size, matched=training.matched, split=split,
            seed=seed, progress=progress,
        ).save(path)  # fmt: skip
    return images.load(path)


def _name(cell: Mapping[str, Any], fields: Sequence[str]) -> str:
    """Name a run folder, ``igc-24-seed-101``."""
    first = f"{cell['arm']}-{cell['distance']}-seed-{cell['seed']}"
    more = [name for name in fields if name not in _FIELDS]
    return "-".join([first, sweep.cell_name(cell, more)]) if more else first


def _row(cell: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    seconds = summary["cpu seconds"] if summary["device"] == "cpu" else summary["seconds"]
    columns = ("test accuracy", "train accuracy", "penalty", "epochs", "images")
    return {**{name: summary[name] for name in columns}, "seconds": seconds}


_FIELDS = ("arm", "distance", "seed")
EXPERIMENT = sweep.Experiment(
    _work, title="locality", fields=_FIELDS, name=_name, row=_row, headline="test accuracy",
    prepare=_prepare, table=lambda rows, fields, _: table(rows, fields), figure=figure,
    also=lambda rows, fields: {"paired": paired(rows, fields)},
)  # fmt: skip
