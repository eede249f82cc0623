"""One command for a GPU: all that is measured there, in stages of which none costs another.

``python3 benchmarks/gpu.py [--out FOLDER] [--budget 540] [--only correct,plans] [--list] [--rehearse]
[--before FOLDER ...] [--again]``

It needs no installation: the source tree, torch with CUDA, and the wheels that ``make gpu-wheels`` puts into
``.wheels/`` for what the machine lacks. Every stage is a process of its own that is killed when its budget
or that of the command is over; it leaves ``FOLDER/gpu-NAME.json``, written anew after every figure. A stage
whose file is complete, there or in a folder of ``--before``, is not run again: called once more, the command
goes on. ``--rehearse`` runs tiny sizes on the CPU, to see that everything runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stage:
    """A stage of the command.

    Attributes:
        name: Its name; its figures go to ``gpu-NAME.json``.
        module: Module that holds its function.
        budget: Seconds after which it is killed.
        estimate: Seconds that it takes on an H100, from the start of its process.
        about: One line what it is.
        function: Name of the function, called with a ``Bench``.
        least: It is not begun with fewer seconds left; a rehearsal begins it always.
    """

    name: str
    module: str
    budget: float
    estimate: float
    about: str
    function: str = "run"
    least: float = 10


# In order of worth; the first six fit into one command.
STAGES = (
    Stage("correct", "gpu_stages.correct", 65, 54, "laws against the CPU, and what waits for the device"),
    Stage("plans", "gpu_stages.plans", 45, 31, "routes and plans: counted cost against time"),
    Stage("dynamics", "gpu_stages.dynamics", 50, 38, "a published training, as CUDA graphs and not"),
    Stage("decompose", "gpu_stages.decompose", 55, 46, "decomposition, spectra, rounding: QR or squares"),
    Stage("regularizers", "gpu_stages.regularizers", 130, 130, "steps with a penalty over plain steps"),
    Stage("calibrate", "gpu_stages.pathfinder", 190, 158, "figure 6: seconds of every training", "calibrate"),
    Stage("pathfinder", "gpu_stages.pathfinder", 530, 530, "figure 6: the trainings, as far as time goes",
          least=300),
)  # fmt: skip

PATIENCE = 5.0  # seconds that a process has to end when asked
CHILD = (sys.executable, "-m", "gpu_stages.child")


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run the stages.

    Args:
        arguments: Those of the command line if left out.
        stages: What can be run; their modules are imported from ``benchmarks/`` or ``PYTHONPATH``.

    Returns:
        0 if every stage asked for is complete, 1 if one is not, 2 if none could be begun.
    """
    started = time.monotonic()
    options = _options(arguments, stages)
    asked = [stage for stage in stages if not options.only or stage.name in options.only]
    if options.list:
        for stage in asked:
            times = f"{stage.budget:4.0f} s, some {stage.estimate:.0f} on an H100"
            print(f"{stage.name:13}{times}: {stage.about}")
            if held := complete(stage, options):
                print(f"{'':13}complete in {held[0]}, on {held[1].get('device')}")
        return 0
    site = Path(tempfile.mkdtemp(prefix="tnreg-gpu-"))
    try:
        environment = _environment(site)
        machine = _machine(options.rehearse, environment)
        if isinstance(machine, str):
            print(f"gpu.py: {machine}", file=sys.stderr)
            return 2
        print(f"{machine['device']}, torch {machine['torch']}, {options.budget:.0f} s", flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        rows = []
        for stage in asked:
            left = started + options.budget - time.monotonic()
            rows.append((stage, *_done(stage, options, left, environment, machine)))
    finally:
        shutil.rmtree(site, ignore_errors=True)
    print(f"\n{'stage':13}{'seconds':>8}{'budget':>8}  state")
    for stage, seconds, state, found in rows:
        print(f"{stage.name:13}{seconds:8.1f}{stage.budget:8.0f}  {state}")
        if shown := scalars(found)[:5]:
            print(f"{'':31}{', '.join(shown)}")
    unfinished = [stage.name for stage, *_, found in rows if not found.get("complete")]
    if unfinished:
        print(f"not complete: {', '.join(unfinished)}; the same command goes on with them")
    return 1 if unfinished else 0


def _options(arguments: Sequence[str] | None, stages: Sequence[Stage]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the figures; runs/gpu if left out")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--only", help="names of stages, with commas between them")
    parser.add_argument("--list", action="store_true", help="show the stages and run nothing")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--before", type=Path, nargs="+", help="folders that earlier commands filled")
    parser.add_argument("--again", action="store_true", help="run complete stages once more")
    options = parser.parse_args(arguments)
    names = [stage.name for stage in stages]
    options.only = [name.strip() for name in options.only.split(",")] if options.only else []
    if unknown := [name for name in options.only if name not in names]:
        parser.error(f"--only: there is no stage {unknown[0]!r}; there are {', '.join(names)}")
    if not options.budget > 0:
        parser.error(f"--budget must be a number of seconds > 0, found {options.budget:g}")
    if absent := [folder for folder in options.before or () if not folder.is_dir()]:
        parser.error(f"--before: there is no folder {absent[0]}")
    default = ROOT / "runs" / ("gpu-rehearsal" if options.rehearse else "gpu")
    options.out = (options.out or default).resolve()
    if fault := _fault_of(options, stages):
        parser.error(f"--out: {fault}")
    before = options.before or [ROOT / "benchmarks" / "results", ROOT / "runs" / "gpu"]
    options.before = [folder.resolve() for folder in before]
    return options


def _fault_of(options: argparse.Namespace, stages: Sequence[Stage]) -> str:
    """Return what is wrong with the folder of the figures, or an empty string."""
    if options.out.exists() and not options.out.is_dir():
        return f"{options.out} is a file"
    figures = (read(options.out / f"gpu-{stage.name}.json") or {} for stage in stages)
    if options.rehearse and any(content.get("rehearsal") is False for content in figures):
        return f"a rehearsal would write over the figures in {options.out}"
    return ""


def _environment(site: Path) -> dict[str, str]:
    """Return the children's environment: the source tree, then wheels of what this machine lacks."""
    for wheel in sorted((ROOT / ".wheels").glob("*.whl")):
        # pure Python wheels: unpacked is installed, and pip need not be there
        if importlib.util.find_spec(wheel.name.split("-")[0].lower()) is None:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
    path = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", ""), str(site)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in path if part)}


def _machine(rehearse: bool, environment: Mapping[str, str]) -> dict[str, Any] | str:
    """Return what the machine is, or one line why nothing can be run on it."""
    call = [*CHILD, "--machine", "cpu" if rehearse else "cuda"]
    try:
        found = subprocess.run(
            call, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    except subprocess.TimeoutExpired:
        return "the machine does not say within two minutes what it is"
    try:
        told: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = found.stderr.strip().splitlines() or [f"exit code {found.returncode}"]
        return f"torch does not start here: {last[-1]}"
    return str(told["error"]) if "error" in told else told


def _done(
    stage: Stage,
    options: argparse.Namespace,
    left: float,
    environment: Mapping[str, str],
    machine: Mapping[str, Any],
) -> tuple[float, str, dict[str, Any]]:
    """Seconds that a stage took, its state in words, and what its file holds."""
    held = None if options.again else complete(stage, options)
    if held:
        return 0.0, f"complete before, on {held[1].get('device')}: {held[0]}", held[1]
    if left <= 0 or (left < stage.least and not options.rehearse):
        return 0.0, f"not begun: {max(left, 0):.0f} s left, it needs {stage.least:.0f}", {}
    print(f"\n{stage.name}: {stage.about} ({min(stage.budget, left):.0f} s at most)", flush=True)
    file, folder = options.out / f"gpu-{stage.name}.json", options.out / stage.name
    earlier, written, started = read(file), _written(file), time.monotonic()
    asked = {
        "name": stage.name, "module": stage.module, "function": stage.function,
        "file": str(file), "folder": str(folder), "rehearse": options.rehearse,
        "before": [str(options.out), *map(str, options.before)],
        "deadline": started + min(stage.budget, left),
    }  # fmt: skip
    error = _child([*CHILD, "--stage", json.dumps(asked)], environment, min(stage.budget, left))
    seconds = time.monotonic() - started
    file.with_name(f".{file.name}").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    found = read(file)
    if found is None or _written(file) == written:  # what an earlier try left is kept
        error = (error or "no figures") + ("; these are of an earlier try" if earlier else "")
        found = earlier or {"stage": stage.name, **machine, "rehearsal": options.rehearse}
        found |= {"complete": False, "error": ""}
    if not found.get("complete") and not found.get("error"):
        figures = found.pop("figures", {})  # they stay last
        found |= {"error": error or "not complete", "seconds": round(seconds, 2), "figures": figures}
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    state = "complete" if found.get("complete") else str(found["error"]).splitlines()[-1]
    return seconds, state, found


def _written(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


def _child(call: Sequence[str], environment: Mapping[str, str], seconds: float) -> str:
    """Run a command in a session of its own; why it did not end well, or nothing."""
    process = subprocess.Popen(call, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"killed after {seconds:.0f} s"
    finally:
        _end(process)
    return "" if code == 0 else f"exit code {code}" if code > 0 else f"ended by signal {-code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a session: it is asked to end, and killed if it does not."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + PATIENCE
        try:
            os.killpg(process.pid, way)
            while time.monotonic() < until:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:  # nobody is left
            break
    process.poll()


def complete(stage: Stage, options: argparse.Namespace) -> tuple[Path, dict[str, Any]] | None:
    """Return file and content of a complete run of a stage, of a rehearsal for a rehearsal only."""
    for folder in (options.out, *options.before):
        file = folder / f"gpu-{stage.name}.json"
        found = read(file)
        if found and found.get("complete") and found.get("rehearsal") == options.rehearse:
            return file, found
    return None


def read(file: Path) -> dict[str, Any] | None:
    """Return what a file of figures holds; ``None`` if there is none, or it is broken."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def scalars(found: Mapping[str, Any]) -> list[str]:
    """Return figures that are single numbers, and those one level below, in their order."""
    shown = []
    for name, value in found.get("figures", {}).items():
        below = value.items() if isinstance(value, Mapping) else ()
        for label, number in [(name, value), *((f"{name}: {key}", held) for key, held in below)]:
            if isinstance(number, bool | int | float):
                shown.append(f"{label} {number if isinstance(number, int) else f'{number:.4g}'}")
    return shown


if __name__ == "__main__":
    # ended from outside, it takes the stage at work along
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
