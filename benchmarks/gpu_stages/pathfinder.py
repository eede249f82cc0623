"""Figure 6 of Razin, Maman and Cohen (2022): Pathfinder at 150 x 150 by ResNet-18, the published settings.

``calibrate``: three epochs of every arm, one after another and several at once, seconds an epoch, and the
penalty on the device beside that on the CPU. ``run``: the trainings of ``WANTED`` in their order, some of
them at once, until the time is over. What is not finished goes on at the next command: rows are in the
JSON file, and the state of the training that has cost most so far lies beside it in parts.

Seconds an epoch of 10,000 and 10,000 images on an H100: 0.6 plain, 7.3 gradient change by batch statistics
(20.1 GFLOP an image), 1.1 by frozen ones with unchanged samples skipped, 1.2 interaction energy.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import os
import shutil
import signal
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
from tnreg.experiments.locality import comparison
from tnreg.experiments.locality import pictures as locality_figure
from tnreg.experiments.locality.settings import Execution
from tnreg.experiments.nets import build
from tnreg.experiments.sweep.cell import Cell, Unfinished, compute
from tnreg.plots import save_figure

ARMS: dict[str, dict[str, Any]] = {
    "plain": {"arm": "plain"},
    "igc": {"arm": "igc"},
    "igc-frozen": {"arm": "igc", "statistics": "frozen"},
    "interaction": {"arm": "interaction", "patches": "differing", "patch_size": 8},
    "rank": {"arm": "rank", "patches": "differing", "patch_size": 8, "statistics": "frozen"},
}
# Arm and paddles of a path, in order of worth; seed 1 of each.
WANTED = (
    ("plain", 7), ("igc-frozen", 7), ("rank", 7), ("interaction", 7), ("plain", 9), ("igc-frozen", 9),
    ("rank", 9), ("interaction", 9), ("igc", 7), ("igc", 9),
)  # fmt: skip
FIELDS = ("arm", "distance", "statistics", "seed")
ENDS, LATE, POLL = 30.0, 12.0, 2.0  # seconds: to end in, to be killed in, between two looks
MOST = 2  # trainings at once: of those that are not finished one state comes along


def calibrate(bench: Bench) -> None:
    """Three epochs of every arm; then two and three trainings at once."""
    place = Path(tempfile.mkdtemp(prefix="tnreg-calibrate-"))
    try:
        began = time.monotonic()
        length = 3 if bench.rehearse else 7
        _take_sets(bench, place)
        cells = {arm: cell_of(bench, arm, length, epochs=3) for arm in ARMS}
        comparison._prepare([cells["plain"]], place, False)
        bench.add(**{"seconds for the images": round(time.monotonic() - began, 1)})
        found = together(bench, place / "one", [list(cells.items())], "one after another")
        alone = {arm: row["seconds an epoch"] for arm, row in found.items() if row.get("finished")}
        fit = {arm: int(500 / seconds) for arm, seconds in alone.items()}
        bench.add(**{"epochs in 500 s": fit})
        bench.add(**{"R on the device and on the CPU": penalties(bench, place, cells["igc"])})
        gains = {1: 1.0}
        for count in (2,) if bench.rehearse else (2, 3):
            if bench.left() < 45 and not bench.rehearse:
                bench.add(note=f"no time left for {count} at once")
                return
            some = [[(arm, cells[arm])] for arm in list(ARMS)[:count]]
            found = together(bench, place / str(count), some, f"{count} at once")
            gains[count] = sum(
                alone.get(arm, 0.0) / row["seconds an epoch"]
                for arm, row in found.items()
                if row.get("finished")
            )
            best = max(gains, key=lambda n: gains[n])
            bench.add(**{"gain by several": gains, "at once": best})
    finally:
        shutil.rmtree(place, ignore_errors=True)


def penalties(bench: Bench, place: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """R of twelve pairs of patches on eight images by both statistics, and the largest difference."""
    data = comparison._images(locality.Training(**cell), place, "train")
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
    signal.signal(signal.SIGTERM, _killed)  # the state that is there comes along all the same
    try:
        lengths = (3, 5) if bench.rehearse else (7, 9)
        wanted = WANTED[:4] if bench.rehearse else WANTED
        cells = {f"{arm}-{length}": cell_of(bench, arm, lengths[length > 7]) for arm, length in wanted}
        _take_sets(bench, place)
        _take_states(bench, place)
        at_once = min(_at_once(bench), MOST)
        bench.add(trainings=rows, **{"at once": at_once})
        waiting = [(name, cell) for name, cell in cells.items() if not _finished(rows, name)]
        try:
            _train(bench, place, waiting, rows, at_once)
        finally:
            bench.add(trainings=rows, **{"state kept": _keep_state(bench, place, rows)})
        if open_ := [name for name in cells if not _finished(rows, name)]:
            bench.unfinished = f"the time is over; not finished: {', '.join(open_)}"
        draw(rows, bench.folder / "pathfinder.png")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _killed(*_: object) -> None:
    raise TimeoutError("killed")


def _train(
    bench: Bench, place: Path, waiting: list[tuple[str, dict[str, Any]]], rows: dict[str, Any], at_once: int
) -> None:
    """Keep so many trainings going; look at their rows meanwhile."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    deadline = bench.deadline - ENDS
    try:
        while True:
            # one that is begun late beside another one would be thrown away
            needed = 0 if bench.rehearse else 240 if running else 60
            if waiting and len(running) < at_once and deadline - time.monotonic() > needed:
                name, cell = waiting.pop(0)
                if not list(place.glob(f"{name}.*.checkpoint")):
                    rows[name] = {}  # of one whose state was left behind
                comparison._prepare([cell], place, False)  # its images, by all processors
                running[name] = start(bench, place, [(name, cell)], deadline)
                continue
            if not running:
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                next(iter(running.values())).wait(0.2 if bench.rehearse else POLL)
            for name, process in list(running.items()):
                code = process.poll()
                rows[name] = {**rows.get(name, {}), **_look(place, name)}
                if code is not None:
                    del running[name]
                    rows[name]["exit code"] = code
            bench.add(trainings=rows)
            if time.monotonic() > bench.deadline - LATE:
                return  # they did not end when they were to
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def together(
    bench: Bench, place: Path, some: list[list[tuple[str, dict[str, Any]]]], title: str
) -> dict[str, Any]:
    """Rows of trainings: every list in a process of its own, one after another, all lists at once."""
    place.mkdir()
    (place / "sets").symlink_to(place.parent / "sets")
    processes = [start(bench, place, one, bench.deadline - 5) for one in some]
    while True:
        ended = all(process.poll() is not None for process in processes)
        found = {name: _look(place, name) for one in some for name, _ in one}
        bench.add(**{title: found})
        if ended:
            return found
        time.sleep(0.2 if bench.rehearse else POLL)


def start(
    bench: Bench, place: Path, cells: list[tuple[str, dict[str, Any]]], deadline: float
) -> subprocess.Popen[bytes]:
    """Start a process that trains cells one after another."""
    graph = bench.device.type == "cuda"
    asked = {"place": str(place), "cells": cells, "deadline": deadline, "graph": graph}
    threads = max(1, (os.cpu_count() or 1) // 4)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps(asked)], env=environment
    )  # fmt: skip


def train_cells(
    place: Path, cells: list[tuple[str, dict[str, Any]]], deadline: float, graph: bool = False
) -> None:
    """Train in this process, as ``tnreg run locality`` does.

    After a capture that failed torch cannot be trusted with the memory of the device: the process begins
    again as a new one, without graphs.
    """
    execution = Execution(graph=graph, portable=True, model_file=False, checkpoint_seconds=20.0)
    work = partial(comparison._work, execution=execution, deadline=deadline)
    for name, settings in cells:
        try:
            compute(Cell(place, name, settings), work, None)
        except Unfinished as over:
            print(f"{name}: {over}", flush=True)
        except Exception:
            if not graph:
                raise
            traceback.print_exc()
            print(f"{name}: goes on without CUDA graphs", flush=True)
            asked = {"place": str(place), "cells": cells, "deadline": deadline, "graph": False}
            os.execv(sys.executable, [sys.executable, "-m", "gpu_stages.pathfinder", json.dumps(asked)])


def cell_of(bench: Bench, arm: str, length: int, **more: Any) -> dict[str, Any]:
    """Return settings of one training: the published ones, in bfloat16 on a GPU."""
    published = locality.SETS["pathfinder"]
    names = [f.name for f in dataclasses.fields(locality.Training)]
    values = {name: getattr(published, name) for name in names if hasattr(published, name)}
    values |= {"distance": length, "seed": 1, "device": str(bench.device), "precision": "bfloat16"}
    if bench.rehearse:
        values |= {
            "train": 16, "test": 8, "size": 48, "batch": 8, "model": "small-cnn", "epochs": 2,
            "precision": "float32", "rank_start": 0,
        }  # fmt: skip
    return dataclasses.asdict(locality.Training(**{**values, **ARMS[arm], **more}))


def draw(rows: dict[str, Any], png: Path) -> None:
    """Draw accuracies against the length of paths beside the published ones, from rows as they are."""
    done, begun = [], []
    for name, row in rows.items():
        arm, _, length = name.rpartition("-")
        tested = [r for r in row.get("history", ()) if r["test accuracy"] is not None]
        if row.get("finished"):
            kinds = {"arm": ARMS[arm]["arm"], "statistics": ARMS[arm].get("statistics", "batch")}
            done.append({"distance": row["length"], "seed": 1, **kinds, **row})
        elif tested:
            accuracy, epoch = tested[-1]["test accuracy"], tested[-1]["epoch"]
            begun.append({"arm": arm, "distance": int(length), "epochs": epoch, "test accuracy": accuracy})
    if done or begun:
        config = {"set": "pathfinder", "model": "resnet-18"}
        means = locality.table(done, FIELDS)
        save_figure(locality_figure.picture(means, begun, FIELDS, config), png)


def _look(place: Path, name: str) -> dict[str, Any]:
    """Return what a training has reached: rows, whether it is finished, seconds an epoch."""
    folder = place / name
    for file in (folder / "history.csv", *place.glob(f"{name}.*.history.csv")):
        try:
            text = file.read_text(encoding="utf-8")
            break
        except OSError:  # not there yet, or not any more
            continue
    else:
        return {}
    rows = [
        {key: int(value) if key == "epoch" else _number(value) for key, value in row.items()}
        for row in csv.DictReader(text.splitlines())
    ]
    out = {"epochs": len(rows), "history": rows}
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
    """Rows that earlier commands left; of a training the finished ones, then those that can go on."""

    def worth(row: dict[str, Any]) -> tuple[bool, bool, int]:
        return bool(row.get("finished")), not row.get("left behind"), row.get("epochs", 0)

    found: dict[str, Any] = {}
    for folder in bench.before:
        try:
            text = (folder / bench.file.name).read_text(encoding="utf-8")
            held_there = json.loads(text)
            if held_there["rehearsal"] != bench.rehearse:
                continue
            for name, row in held_there["figures"]["trainings"].items():
                if name not in found or worth(row) > worth(found[name]):
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
        return rows.get(name, {}).get("epochs", 0) * (1.0 if "igc" in name else 0.25)

    name = max(lists, key=cost)
    for file in place.glob(f"{lists[name].name}*"):
        shutil.copy(file, bench.folder)
    others = [other for other in lists if other != name]
    for other in others:
        rows[other]["left behind"] = True
    return name + (f"; left behind, to be begun again: {', '.join(others)}" if others else "")


def make_sets(place: Path) -> None:
    """Make the image sets of all trainings, where there is time: ``place/sets``."""
    place.mkdir(parents=True, exist_ok=True)
    for length in sorted({length for _, length in WANTED}):
        published = locality.SETS["pathfinder"]
        names = [f.name for f in dataclasses.fields(comparison.Images)]
        shared = {name: getattr(published, name) for name in names}
        one = locality.Training(**{**shared, "distance": length, "arm": "plain", "seed": 1})
        comparison._prepare([dataclasses.asdict(one)], place, True)


if __name__ == "__main__":
    if sys.argv[1] == "--sets":
        make_sets(Path(sys.argv[2]))
    else:
        given = json.loads(sys.argv[1])
        cells = [(name, cell) for name, cell in given["cells"]]
        train_cells(Path(given["place"]), cells, given["deadline"], given["graph"])
