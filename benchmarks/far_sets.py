"""Plain training beside three terms that see far, on pairs of photos, on spectra and on small Pathfinders.

``python benchmarks/far_sets.py [--only photos spectra pathfinder-32 ...] [--minutes M] [--out FILE.json]``
trains in ``runs/far-sets`` what is not there and prints one table a set. Settings were chosen on seeds 0 to
2; those of pairs are those of the digits. What was stopped goes on when the same command is given. One
process, one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from steps import machine_name

from tnreg.experiments import locality, sweep
from tnreg.experiments.sweep import pictures

FIELDS = ("arm", "patches", "patch_size", "distance", "seed")
# 5,000 small images instead of 10,000 large ones, and a network and weights for them.
SMALL_PATHS = dataclasses.replace(
    locality.pathfinder, size=32, train=5_000, test=2_000, model="small-cnn", statistics="frozen", lr=0.05,
    epochs=20, stop_above=0.998, stop_epochs=3, test_every=20, igc=2.0, igc_every=4, interaction=0.3,
    interaction_until=300, interaction_target=0.6, rank=0.1, rank_start=200, rank_until=500,
)  # fmt: skip


def pairs(name: str, distances: tuple[int, ...], arms: str, seeds: range) -> list[dict[str, Any]]:
    """Return the trainings on pairs, a seed after the other."""
    lists = {"arms": tuple(arms.split()), "distances": distances, "seeds": tuple(seeds)}
    return locality.cells(dataclasses.replace(locality.SETS[name], **lists))


def paths(config: locality.Config, length: int, matched: bool, seeds: range) -> list[dict[str, Any]]:
    """Return the trainings on Pathfinder: each term with the patches that it is tried with."""
    trained = (
        ("plain", "random", 2), ("igc", "random", 2), ("igc", "discs", 6), ("rank", "discs", 6),
        ("rank", "differing", 6),
    )  # fmt: skip
    return [
        cell
        for seed in seeds
        for arm, patches, side in trained
        for cell in locality.cells(dataclasses.replace(
            config, arms=(arm,), distances=(length,), seeds=(seed,), matched=matched, patches=patches,
            patch_size=side,
        ))
    ]  # fmt: skip


SETS = {
    "photos": functools.partial(pairs, "photos", (0, 16, 24), "plain igc interaction rank", range(401, 404)),
    "spectra": functools.partial(pairs, "spectra", (0, 24), "plain igc rank", range(401, 404)),
    "pathfinder-32": functools.partial(paths, SMALL_PATHS, 5, True, range(401, 404)),
    "pathfinder-32-published": functools.partial(paths, SMALL_PATHS, 5, False, range(401, 404)),
    "pathfinder-64": functools.partial(
        paths, dataclasses.replace(SMALL_PATHS, size=64), 7, True, range(401, 402)
    ),
}


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--runs", type=Path, default=Path("runs/far-sets"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no training after so many")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/far-sets.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * arguments.minutes
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.only:
        work = functools.partial(locality.EXPERIMENT.work, deadline=end)
        what = dataclasses.replace(locality.EXPERIMENT, work=work, fields=FIELDS)
        result = sweep.run(what, SETS[name](), arguments.runs / name, workers=0, threads=None)
        columns = ("test accuracy", "train accuracy", "epochs", "seconds")
        rows = [{key: row[key] for key in (*FIELDS, *columns)} for row in result.rows]
        found |= {"machine": machine_name(torch.device("cpu"), 1)}
        found[name] = {"rows": rows, "table": table(rows), "failed": [one.error for one in result.failed]}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name)
        for row in found[name]["table"]:
            print("  ", *(f"{v:.3f}" if isinstance(v, float) else v for v in row.values()), flush=True)


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and deviation over seeds, and processor seconds an epoch relative to plain ones."""

    def pace(**fields: Any) -> float:
        some = [r for r in rows if all(r[name] == value for name, value in fields.items())]
        return sum(r["seconds"] for r in some) / sum(r["epochs"] for r in some) if some else math.nan

    means = pictures.means(rows, FIELDS, "test accuracy")
    for mean in means:
        own = {name: mean[name] for name in ("arm", "patches", "patch_size", "distance")}
        plain = pace(arm="plain", distance=mean["distance"])
        mean["cost an epoch"] = pace(**own) / plain
    return means


if __name__ == "__main__":
    main()
