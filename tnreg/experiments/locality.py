"""Seeing far: test accuracy against distance, plain training beside regularizers (figures 5 and 6).

The same network is trained on sets whose label hangs on pixels some distance apart, once for every arm,
distance and seed. Arms are plain training, weight decay, dropout, the input gradient change of Razin,
Maman and Cohen (2022), arXiv:2201.11729, and interaction energy. Every training is a run folder of
``locality_run`` inside this one, ``igc-24-seed-101`` and so on; those that are there already are not
trained again, and one that was killed goes on from its checkpoint. Then ``locality.png``,
``results.csv`` and ``config.json`` with the table of results are written.

The defaults for ``set="pathfinder"`` and ``set="cifar"`` are the published ones and want a GPU; those
for ``"digits"`` take minutes on two processor cores.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import dataclasses
import io
import json
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import tnreg
from tnreg import images
from tnreg.errors import FileError, OptionError, check_integer
from tnreg.experiments.folder import experiment_of, read_run
from tnreg.experiments.locality_figure import figure, table
from tnreg.experiments.locality_run import ARMS, Settings, train
from tnreg.files import check_folder, write_whole

__all__ = ["SETS", "Config", "figure", "run", "table"]


@dataclass(frozen=True)
class Config(Settings):
    """Settings of one sweep; those that all its trainings share come from ``Settings``.

    Attributes:
        set: The preset that the other defaults come from: pairs of digits, pairs of CIFAR-10 images,
            or Pathfinder.
        arms: What is compared: plain, weight-decay, dropout, igc, interaction.
        distances: Pixels between the two images of a pair; for Pathfinder paddles of a path.
        seeds: Each draws initial weights, the order of the images, and patches.
        data_seed: Seed of the images; if left out every seed has images of its own.
        train: Training images.
        test: Test images.
        size: Height and width of Pathfinder images.
        matched: Pathfinder whose negatives have the disc distances of positives.
        source: For CIFAR-10: the folder cifar-10-batches-py of its archive for Python.
        workers: Trainings at a time, each in a process of its own with one thread; 1 for this one.
    """

    set: Literal["digits", "cifar", "pathfinder", "tiny"] = "digits"
    arms: tuple[str, ...] = ("plain", "igc", "interaction")
    distances: tuple[int, ...] = (0, 8, 16, 24)
    seeds: tuple[int, ...] = (101, 102, 103, 104, 105)
    data_seed: int | None = None
    train: int = 2000
    test: int = 2000
    size: int = 150
    matched: bool = False
    source: str = "cifar-10-batches-py"
    workers: int = 1


digits = Config()
pathfinder = Config(
    set="pathfinder", distances=(3, 5, 7, 9), seeds=(1, 2, 3, 4, 5), data_seed=0, train=10_000,
    test=10_000, model="resnet-18", epochs=150, stop_above=1.0, stop_epochs=21, lr=0.01, test_every=1,
    patches="random", igc=9.0, igc_every=1, interaction=0.1, interaction_until=0,
    interaction_target=0.0,
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
        Rows with arm, distance, seed, test accuracy of the last epoch, train accuracy, epochs,
        processor seconds.

    Raises:
        TnregError: Settings that do not fit, or a run that is there was made with other ones.

    Processes are spawned if ``config.workers`` > 1: a script of your own then needs
    ``if __name__ == "__main__":``.
    """
    _check(config)
    place = check_folder(folder)
    if experiment_of(place) not in ("", "locality"):
        raise OptionError(f"{place} is a run of {experiment_of(place)!r}; choose another folder.")
    cells = [
        (arm, distance, seed)
        for seed in config.seeds
        for distance in config.distances
        for arm in config.arms
    ]
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    missing = []
    for cell in cells:
        found = _found(config, place, cell)
        if found is None:
            missing.append(cell)
        else:
            rows[cell] = found
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {place}: {error.strerror or error}") from None
    if not (place / "config.json").exists():
        _write_about(config, place, [])  # so that a sweep cut short is known as one
    if config.set == "pathfinder":  # here, with all processors, and each set once
        for cell in missing:
            for split in ("train", "test"):
                _images(config, place, cell, split)
    with _bar(len(cells), len(rows), progress) as advance:
        jobs = [(config, place, cell) for cell in missing]
        for cell, row in _results(config, jobs):
            rows[cell] = row
            advance(f"{cell[0]}, {cell[1]}: {row['test accuracy']:.1%}")
    ordered = [rows[cell] for cell in cells]
    _write_about(config, place, ordered)
    _write_csv(place / "results.csv", ordered)
    figure(place)
    return ordered


def _check(config: Config) -> None:
    if not (config.arms and config.distances and config.seeds):
        raise OptionError("locality: give at least one arm, one distance and one seed.")
    unknown = [arm for arm in config.arms if arm not in ARMS]
    if unknown:
        raise OptionError(f"locality: no arm {unknown[0]!r}; there is {', '.join(ARMS)}.")
    for name in ("arms", "distances", "seeds"):
        given = getattr(config, name)
        if len(set(given)) < len(given):
            raise OptionError(f"locality: {name} has one twice: {given}.")
    check_integer(config.workers, 1, "locality: workers")
    if config.set not in SETS:
        raise OptionError(f"locality: no set {config.set!r}; there is {', '.join(SETS)}.")


def _about(config: Config, cell: tuple[str, int, int]) -> dict[str, Any]:
    """All settings of one training, its images included."""
    shared = [field.name for field in dataclasses.fields(Settings)]
    names = ("set", "data_seed", "train", "test", "size", "matched", "source")
    made = {name: getattr(config, name) for name in (*names, *shared)}
    return {"arm": cell[0], "distance": cell[1], "seed": cell[2], **made}


def _folder(place: Path, cell: tuple[str, int, int]) -> Path:
    arm, distance, seed = cell
    return place / f"{arm}-{distance}-seed-{seed}"


def _found(config: Config, place: Path, cell: tuple[str, int, int]) -> dict[str, Any] | None:
    """The row of a training that is there."""
    folder = _folder(place, cell)
    if not folder.exists():
        return None
    there = read_run(folder)
    now = json.loads(json.dumps(_about(config, cell)))
    differ = [
        f"  {key}: {there.config.get(key)!r} there, {now.get(key)!r} now"
        for key in {**there.config, **now}
        if there.config.get(key) != now.get(key)
    ]
    if differ:
        raise OptionError(
            f"{folder} was made with other settings; delete it, or choose another folder.\n"
            + "\n".join(differ)
        )
    return _row(cell, there.summary)


def _row(cell: tuple[str, int, int], summary: dict[str, Any]) -> dict[str, Any]:
    arm, distance, seed = cell
    seconds = summary["cpu seconds"] if summary["device"] == "cpu" else summary["seconds"]
    return {
        "arm": arm, "distance": distance, "seed": seed, "test accuracy": summary["test accuracy"],
        "train accuracy": summary["train accuracy"], "penalty": summary["penalty"],
        "epochs": summary["epochs"], "seconds": seconds,
    }  # fmt: skip


def _results(
    config: Config, jobs: list[Any]
) -> Iterator[tuple[tuple[str, int, int], dict[str, Any]]]:
    """Rows as they are done."""
    if config.workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job[2], _trained(*job)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        min(config.workers, len(jobs)), mp_context=context, initializer=torch.set_num_threads,
        initargs=(1,),
    )  # fmt: skip
    with pool:
        waiting = {pool.submit(_trained, *job): job[2] for job in jobs}
        try:
            for done in concurrent.futures.as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise


def _trained(config: Config, place: Path, cell: tuple[str, int, int]) -> dict[str, Any]:
    """Train one cell; runs in a process of its own."""
    data, test = (_images(config, place, cell, split) for split in ("train", "test"))
    about = _about(config, cell)
    shared = Settings(**{f.name: about[f.name] for f in dataclasses.fields(Settings)})
    summary = train(shared, cell[0], cell[2], data, test, _folder(place, cell), about=about)
    return _row(cell, summary)


def _images(
    config: Config, place: Path, cell: tuple[str, int, int], split: Literal["train", "test"]
) -> images.ImageSet:
    """The set of a cell; Pathfinder sets are kept in ``sets``, as they take minutes."""
    _, distance, own = cell
    seed = own if config.data_seed is None else config.data_seed
    count = config.train if split == "train" else config.test
    if config.set != "pathfinder":
        source = config.source if config.set == "cifar" else "digits"
        return images.is_same_class(count, distance=distance, source=source, split=split, seed=seed)
    name = (
        f"{'matched-' if config.matched else ''}{distance}-{config.size}-{split}-{seed}-{count}.npz"
    )
    path = place / "sets" / name
    if path.exists():
        return images.load(path)
    made = images.pathfinder(
        count, length=distance, size=config.size, matched=config.matched, split=split, seed=seed,
    )  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    made.save(path)
    return made


def _write_about(config: Config, place: Path, rows: list[dict[str, Any]]) -> None:
    told = {
        "tnreg": tnreg.__version__,
        "torch": torch.__version__,
        "experiment": "locality",
        "config": dataclasses.asdict(config),
        "summary": rows,
        "table": table(rows),
    }
    text = json.dumps(told, indent=1) + "\n"
    write_whole(place / "config.json", lambda beside: beside.write_text(text, encoding="utf-8"))


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    held = io.StringIO()
    writer = csv.DictWriter(held, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda beside: beside.write_text(held.getvalue(), encoding="utf-8"))


@contextlib.contextmanager
def _bar(total: int, done: int, progress: bool) -> Iterator[Callable[[str], None]]:
    if not progress:
        yield lambda text: None
        return
    from rich.progress import Progress

    with Progress() as shown:
        task = shown.add_task("trainings", total=total, completed=done)
        yield lambda text: shown.update(task, advance=1, description=text)
