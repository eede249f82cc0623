"""Figure 6 of Razin, Maman and Cohen (2022): Pathfinder at 150 x 150 by ResNet-18, the published settings.

``calibrate``: three epochs of every arm, one after another and several at once, seconds an epoch, and the
penalty on the device beside that on the CPU. ``run``: the trainings of ``WANTED`` in their order, some of
them at once, until the time is over. What is not finished goes on at the next command: rows are in the
JSON file, and the state of the training that has cost most so far lies beside it in parts.

Seconds an epoch of 10,000 and 10,000 images on an H100, NOT measured, at 50 TFLOP/s: 1.2 plain, 4.4 gradient
change by batch statistics (20.1 GFLOP an image), 4.0 by frozen ones or 1.6 with unchanged samples skipped,
2.3 interaction energy. Estimates for the two stages: 25 s for the images by 16 processes, then 35 s one after
another and 2 x 30 s at once; and all the time that there is.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_stages.bench import Bench
from tnreg import InputGradientChange, RandomPatches
from tnreg.experiments import locality
from tnreg.experiments.locality_run import Execution
from tnreg.experiments.nets import build
from tnreg.experiments.sweep_cell import Cell, Unfinished, compute

ESTIMATE_CALIBRATE, ESTIMATE_RUN = 130.0, 530.0

ARMS: dict[str, dict[str, Any]] = {
    "plain": {"arm": "plain"},
    "igc": {"arm": "igc"},
    "igc-frozen": {"arm": "igc", "statistics": "frozen"},
    "interaction": {"arm": "interaction", "patches": "differing", "patch_size": 8},
}
# Arm and paddles of a path, in order of worth; seed 1 of each.
WANTED = (
    ("plain", 7), ("igc", 7), ("plain", 9), ("igc-frozen", 9), ("interaction", 9), ("igc", 9),
    ("igc-frozen", 7), ("interaction", 7),
)  # fmt: skip
FIELDS = ("arm", "distance", "statistics", "seed")
ENDS, POLL = 25.0, 3.0  # seconds to write the last state, and between two looks


def calibrate(bench: Bench) -> None:
    """Three epochs of every arm; then two and three trainings at once."""
    place = Path(tempfile.mkdtemp(prefix="tnreg-calibrate-"))
    try:
        began = time.monotonic()
        length = 3 if bench.rehearse else 7
        _take_sets(bench, place)
        cells = {arm: cell_of(bench, arm, length, epochs=3) for arm in ARMS}
        locality._prepare([cells["plain"]], place, False)
        bench.add(**{"seconds for the images": round(time.monotonic() - began, 1)})
        found = together(bench, place / "one", [list(cells.items())])
        alone = {arm: row["seconds an epoch"] for arm, row in found.items() if row.get("finished")}
        fit = {arm: int(500 / seconds) for arm, seconds in alone.items()}
        bench.add(**{"one after another": found, "epochs in 500 s": fit})
        bench.add(**{"R on the device and on the CPU": penalties(bench, place, cells["igc"])})
        gains = {1: 1.0}
        for count in (2,) if bench.rehearse else (2, 3):
            if bench.left() < 45 and not bench.rehearse:
                bench.unfinished = "no time left to run several at once"
                return
            some = [[(arm, cells[arm])] for arm in list(ARMS)[:count]]
            found = together(bench, place / str(count), some)
            gains[count] = sum(
                alone.get(arm, 0.0) / row["seconds an epoch"]
                for arm, row in found.items()
                if row.get("finished")
            )
            best = max(gains, key=lambda n: gains[n])
            bench.add(**{f"{count} at once": found, "gain by several": gains, "at once": best})
    finally:
        shutil.rmtree(place, ignore_errors=True)


def penalties(bench: Bench, place: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """R of twelve pairs of patches on eight images by both statistics, and the largest difference."""
    data = locality._images(locality.Training(**cell), place, "train")
    torch.manual_seed(0)
    net = build(cell["model"], 1).train()
    x = torch.from_numpy(data.images[:8]).float() / 255
    with torch.no_grad():
        net(x)  # running statistics that say something
    out: dict[str, Any] = {}
    for statistics in ("frozen", "batch"):
        values: dict[str, list[float]] = {}
        for device in ("cpu", str(bench.device)):
            torch.backends.cudnn.allow_tf32 = False
            net, penalty = net.to(device), InputGradientChange(
                RandomPatches(10 if bench.rehearse else 30, seed=1), statistics=statistics
            )  # fmt: skip
            with torch.no_grad():
                values[device] = [float(penalty(net, x.to(device))) for _ in range(12)]
            torch.backends.cudnn.allow_tf32 = True
        net = net.cpu()
        pairs = zip(*values.values(), strict=True) if len(values) == 2 else ()
        largest = max((abs(a - b) for a, b in pairs), default=0.0)
        out[statistics] = {**values, "largest difference": largest}
    return out


def run(bench: Bench) -> None:
    """Train what is wanted and not there yet, the first ones first, until the time is over."""
    rows = _rows_of_before(bench)
    place = Path(tempfile.mkdtemp(prefix="tnreg-pathfinder-"))
    try:
        lengths = (3, 5) if bench.rehearse else (7, 9)
        wanted = WANTED[:4] if bench.rehearse else WANTED
        cells = {
            f"{arm}-{length}": cell_of(bench, arm, lengths[length > 7]) for arm, length in wanted
        }
        _take_sets(bench, place)
        _take_states(bench, place)
        at_once = _at_once(bench)
        bench.add(trainings=rows, **{"at once": at_once})
        left = [(name, cell) for name, cell in cells.items() if not _finished(rows, name)]
        _train(bench, place, left, rows, at_once)
        open_ = [name for name in cells if not _finished(rows, name)]
        if open_:
            bench.unfinished = f"the time is over; not finished: {', '.join(open_)}"
        bench.add(trainings=rows, **{"state kept": _keep_state(bench, place, rows)})
        draw(rows, bench.folder / "pathfinder.png")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _train(
    bench: Bench,
    place: Path,
    left: list[tuple[str, dict[str, Any]]],
    rows: dict[str, Any],
    at_once: int,
) -> None:
    """Keep so many trainings going; look at their rows meanwhile."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    deadline = bench.deadline - ENDS
    while running or (left and deadline - time.monotonic() > (0 if bench.rehearse else 60)):
        enough = bench.rehearse or deadline - time.monotonic() > 60
        while left and enough and len(running) < at_once:
            name, cell = left.pop(0)
            # sets are made once, by all processors
            locality._prepare([cell], place, False)
            running[name] = start(bench, place, [(name, cell)], deadline)
        time.sleep(0.2 if bench.rehearse else POLL)
        for name, process in list(running.items()):
            rows[name] = {**rows.get(name, {}), **_look(place, name)}
            if process.poll() is not None:
                del running[name]
                rows[name]["exit code"] = process.returncode
        bench.add(trainings=rows)
        if time.monotonic() > bench.deadline - 4:  # it did not end when it was to
            for process in running.values():
                process.kill()


def together(
    bench: Bench, place: Path, some: list[list[tuple[str, dict[str, Any]]]]
) -> dict[str, Any]:
    """Rows of trainings: every list in a process of its own, one after another, all lists at once."""
    place.mkdir()
    (place / "sets").symlink_to(place.parent / "sets")
    processes = [start(bench, place, one, bench.deadline - 5) for one in some]
    for process in processes:
        process.wait()
    return {name: _look(place, name) for one in some for name, _ in one}


def start(
    bench: Bench, place: Path, cells: list[tuple[str, dict[str, Any]]], deadline: float
) -> subprocess.Popen[bytes]:
    """Start a process that trains cells one after another."""
    asked = json.dumps({"place": str(place), "cells": cells, "deadline": deadline})
    threads = max(1, (os.cpu_count() or 1) // 4)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([sys.executable, "-m", __name__, asked], env=environment)


def train_cells(place: Path, cells: list[tuple[str, dict[str, Any]]], deadline: float) -> None:
    """Train in this process, as ``tnreg run locality`` does."""
    for name, settings in cells:
        for graph in (True, False) if settings["device"] == "cuda" else (False,):
            execution = Execution(
                graph=graph, portable=True, model_file=False, checkpoint_seconds=20.0
            )
            work = partial(locality._work, execution=execution, deadline=deadline)
            try:
                compute(Cell(place, name, settings), work, None)
            except Unfinished as over:
                print(f"{name}: {over}", flush=True)
            except Exception:
                if not graph:
                    raise
                traceback.print_exc()
                print(f"{name}: goes on without CUDA graphs", flush=True)
                continue
            break


def cell_of(bench: Bench, arm: str, length: int, **more: Any) -> dict[str, Any]:
    """Settings of one training: the published ones, in bfloat16 on a GPU."""
    published = locality.SETS["pathfinder"]
    names = [f.name for f in dataclasses.fields(locality.Training)]
    values = {name: getattr(published, name) for name in names if hasattr(published, name)}
    values |= {"distance": length, "seed": 1, "device": str(bench.device), "precision": "bfloat16"}
    if bench.rehearse:
        values |= {
            "train": 16, "test": 8, "size": 48, "batch": 8, "model": "small-cnn", "epochs": 2,
            "precision": "float32",
        }  # fmt: skip
    return dataclasses.asdict(locality.Training(**{**values, **ARMS[arm], **more}))


def draw(rows: dict[str, Any], png: Path) -> None:
    """Draw accuracies against the length of paths beside the published ones, from rows as they are."""
    summaries = [
        {"arm": ARMS[arm]["arm"], "distance": row["length"], "seed": 1, "epochs": row["epochs"],
         "statistics": ARMS[arm].get("statistics", "batch"), "seconds": row["seconds"],
         "test accuracy": row["test accuracy"]}
        for name, row in rows.items()
        for arm in [name.rpartition("-")[0]]
        if row.get("finished")
    ]  # fmt: skip
    config = {"set": "pathfinder", "model": "resnet-18"}
    about = {
        "tnreg": "",
        "experiment": "locality",
        "summary": summaries,
        "fields": FIELDS,
        "config": config,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(about), encoding="utf-8")
        for name, row in rows.items():
            if row.get("history") and not row.get("finished"):
                arm, _, length = name.rpartition("-")
                file = Path(folder) / f"{arm}-{row.get('length', length)}-seed-1.history.csv"
                with file.open("w", newline="", encoding="utf-8") as out:
                    writer = csv.DictWriter(out, ["epoch", *list(row["history"][0])[1:]])
                    writer.writeheader()
                    writer.writerows(row["history"])
        if summaries or list(Path(folder).glob("*.csv")):
            locality.figure(folder, png)


def _look(place: Path, name: str) -> dict[str, Any]:
    """What a training has reached: finished or not, rows, seconds an epoch."""
    folder, out = place / name, dict[str, Any]()
    histories = [folder / "history.csv", *place.glob(f"{name}.*.history.csv")]
    file = next((path for path in histories if path.exists()), None)
    if file is None:
        return out
    with file.open(newline="", encoding="utf-8") as text:
        rows = [
            {key: int(value) if key == "epoch" else _number(value) for key, value in row.items()}
            for row in csv.DictReader(text)
        ]
    out |= {"epochs": len(rows), "history": rows}
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return out
    summary, config = about["summary"], about["config"]
    return {
        **out, "finished": True, "length": config["distance"], "images": config["train"],
        "seconds": summary["seconds"], "test accuracy": summary["test accuracy"],
        "stopped by": summary["stopped by"], "resumed": summary.get("resumed", []),
        "seconds an epoch": summary["seconds an epoch"],
    }  # fmt: skip


def _number(text: str) -> float | None:
    value = float(text)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _finished(rows: dict[str, Any], name: str) -> bool:
    return bool(rows.get(name, {}).get("finished"))


def _rows_of_before(bench: Bench) -> dict[str, Any]:
    """Rows that earlier commands left; the further ones where there are several."""
    found: dict[str, Any] = {}
    for folder in reversed(bench.before):
        try:
            text = (folder / bench.file.name).read_text(encoding="utf-8")
            held_there = json.loads(text)
            if held_there["rehearsal"] != bench.rehearse:
                continue
            for name, row in held_there["figures"]["trainings"].items():
                if row.get("epochs", 0) >= found.get(name, {}).get("epochs", 0):
                    found[name] = row
        except (OSError, ValueError, KeyError):
            continue
    return found


def _at_once(bench: Bench) -> int:
    """How many trainings at once gave most images a second; two if nobody has looked."""
    for folder in bench.before:
        try:
            text = (folder / "gpu-calibrate.json").read_text(encoding="utf-8")
            return int(json.loads(text)["figures"]["at once"])
        except (OSError, ValueError, KeyError):
            continue
    return 2


def _take_sets(bench: Bench, place: Path) -> None:
    """Take image sets that were made beforehand."""
    (place / "sets").mkdir(parents=True, exist_ok=True)
    for folder in bench.before:
        for file in folder.glob("sets/*.npz"):
            shutil.copy(file, place / "sets")


def _take_states(bench: Bench, place: Path) -> None:
    """Take the states of trainings that earlier commands left, the newest last."""
    for folder in reversed(bench.before):
        for file in (folder / bench.name).glob("*.checkpoint*"):
            shutil.copy(file, place)


def _keep_state(bench: Bench, place: Path, rows: dict[str, Any]) -> str:
    """Keep the state of the unfinished training that has cost most; there is room for one."""
    for file in bench.folder.glob("*.checkpoint*"):
        file.unlink()
    lists = {
        path.name.split(".")[0]: path
        for path in place.glob("*.checkpoint")
        if not _finished(rows, path.name.split(".")[0])
    }
    if not lists:
        return "none: nothing is begun and not finished"

    def cost(name: str) -> float:
        return rows.get(name, {}).get("epochs", 0) * ("igc" in name or 0.25)

    name = max(lists, key=cost)
    for file in place.glob(f"{lists[name].name}*"):
        shutil.copy(file, bench.folder)
    left = [other for other in lists if other != name]
    return name + (f"; left behind, to be begun again: {', '.join(left)}" if left else "")


def make_sets(place: Path) -> None:
    """Make the image sets of all trainings, where there is time: ``place/sets``."""
    place.mkdir(parents=True, exist_ok=True)
    for length in sorted({length for _, length in WANTED}):
        published = locality.SETS["pathfinder"]
        names = [f.name for f in dataclasses.fields(locality.Images)]
        shared = {name: getattr(published, name) for name in names}
        one = locality.Training(**{**shared, "distance": length, "arm": "plain", "seed": 1})
        locality._prepare([dataclasses.asdict(one)], place, True)


if __name__ == "__main__":
    if sys.argv[1] == "--sets":
        make_sets(Path(sys.argv[2]))
    else:
        given = json.loads(sys.argv[1])
        train_cells(Path(given["place"]), [tuple(c) for c in given["cells"]], given["deadline"])
