"""What sweeps and training in several processes cost on one machine.

``python benchmarks/scale.py [--out FILE.json]``: a sweep of 12 cells that do nothing and of 12 trainings
of the smallest locality experiment, in this process and by two others;
then epochs of the digits training (2,000 images, distance 24) by one process and by two under torchrun.
One thread of torch in each process. Seconds are wall time; an epoch's are the least of all epochs but the
first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peers import machine_line, version

from tnreg.experiments import locality, sweep

EPOCHS, ARMS = 6, ("plain", "igc", "interaction")


def nothing(cell: dict[str, Any], folder: Path, checkpoint: Path) -> dict[str, Any]:
    """Do the work of a cell: none."""
    return {"number": cell["number"]}


def sweeps(folder: Path) -> dict[str, Any]:
    """Seconds of both sweeps, by both routes."""
    tiny = dataclasses.replace(locality.SETS["tiny"], distances=(0, 24), seeds=(1, 2))
    cells = [{"number": n} for n in range(12)]
    times: dict[str, Any] = {}
    for workers in (0, 2):
        name = f"{workers} workers" if workers else "this process"
        start = time.perf_counter()
        sweep.run(nothing, cells, folder / f"nothing-{workers}", workers=workers)
        middle = time.perf_counter()
        config = dataclasses.replace(tiny, workers=max(workers, 1))
        rows = locality.run(config, folder / f"tiny-{workers}")
        end = time.perf_counter()
        times[name] = {"nothing": middle - start, "tiny": end - middle, "cells": len(rows)}
    return times


def epochs(folder: Path) -> dict[str, Any]:
    """Seconds of an epoch by one and by two processes."""
    times: dict[str, Any] = {}
    for arm in ARMS:
        for count in (1, 2):
            place = folder / f"{arm}-{count}"
            call = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            call += ["--nproc-per-node", str(count), __file__, "--train", arm, str(place)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(call, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(done.stderr)
            times.setdefault(arm, {})[str(count)] = json.loads(done.stdout)
    return times


def train(arm: str, place: Path) -> None:
    """One training; the first process prints the seconds of its epochs."""
    from tnreg import images
    from tnreg.experiments.locality import train as locality_run
    from tnreg.machine import processes as parallel

    torch.set_num_threads(1)
    times: list[float] = []
    epoch = locality_run._State.epoch

    def timed(self: Any, *given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        row = epoch(self, *given, **named)
        times.append(time.perf_counter() - start)
        return row

    locality_run._State.epoch = timed  # type: ignore[method-assign]
    data, test = (
        images.is_same_class(n, distance=24, seed=1, split=split)
        for n, split in ((2000, "train"), (200, "test"))
    )
    settings = locality_run.Settings(epochs=EPOCHS, test_every=EPOCHS)
    summary = locality_run.train(settings, arm, 1, data, test, place)
    if parallel.is_first():
        print(json.dumps({"epoch": min(times[1:]), "loss": summary["loss"]}))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", nargs=2)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train[0], Path(arguments.train[1]))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = {"sweeps": sweeps(Path(folder)), "epochs": epochs(Path(folder))}
    print(json.dumps(results, indent=1))
    versions = {"machine": machine_line(), "torch": version("torch"), "dask": version("dask")}
    if arguments.out:
        arguments.out.write_text(json.dumps({**versions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
