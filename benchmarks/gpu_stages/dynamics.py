"""HTF dynamics at the published size: seconds with every step a CUDA graph and without, and the staircase.

8^4, binary tree of diagonal joins, widths 512, 2048 of 4096 entries, float32, seed 1, all observations
every 25 steps, 36,000 steps: those of the documented run, 32,000, and then until the fourth component is
learned. What is found is put beside ``results/htf-reference-cpu.json``, which comes from

    cd benchmarks; OMP_NUM_THREADS=2 python -m gpu_stages.dynamics --reference results/htf-reference-cpu.json

Single precision diverges on another device where components escape from zero: ranks at the end are to be
equal, steps of the jumps within some 10 %. Both are recorded, nothing is asserted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import tnreg
from gpu_stages.bench import Bench, attempt
from gpu_stages.launches import counted, kernels
from tnreg.experiments import dynamics
from tnreg.experiments.dynamics import train
from tnreg.ranks.dense import numerical_rank

STEPS, DOCUMENTED = 36_000, 32_000
REFERENCE = Path(__file__).parents[1] / "results" / "htf-reference-cpu.json"


def run(bench: Bench) -> None:
    """Train the whole run as CUDA graphs beside the CPU's, the same without, and what the rows cost."""
    torch.backends.cuda.matmul.allow_tf32 = False
    preset = dynamics.tiny if bench.rehearse else dynamics.htf
    config = dataclasses.replace(preset, seed=1, device=str(bench.device))
    if not bench.rehearse:
        config = dataclasses.replace(config, steps=STEPS)
    training = Training(config)
    seen = observations(bench, training)
    bench.add(observations=seen)
    # fewer rows where all of them would take longer than the stage has
    sparse = math.ceil(seen["a row"] * config.steps / config.every / 25e3)
    often = dataclasses.replace(config, every=config.every * sparse)
    graph = dataclasses.replace(often, graph=True)
    if bench.device.type == "cuda":
        bench.add(graph=attempt(lambda: watched(graph, bench.left() - 15)))
        short = dataclasses.replace(graph, steps=4000)
        bench.add(graph_unwatched=attempt(lambda: times(Training(short).fit(watched=False))))
    else:
        bench.add(graph="a CPU has no graphs", rehearsed=watched(often, 5))
    bench.add(eager=times(training.fit(seconds=min(8.0, bench.left() / 3))))
    count = {**counted(training.step), "step, ms": bench.milliseconds(training.step)}
    if bench.device.type == "cuda":
        count["kernels"] = attempt(lambda: kernels(training.step))
    bench.add(step=count)


def watched(config: dynamics.Config, seconds: float) -> dict[str, Any]:
    """Return a run with its staircase, beside that of the CPU if it is the same run and came to its end."""
    found = Training(config).fit(seconds=seconds)
    told = {**times(found), **story(config, found)}
    if REFERENCE.exists() and told["end"]["step"] == STEPS:
        told["beside"] = beside(told, json.loads(REFERENCE.read_text(encoding="utf-8")))
    return told


def observations(bench: Bench, training: Training) -> dict[str, float]:
    """Milliseconds of each observation with its way to the host, and of the spectra on the CPU."""
    model, observe = training.model, dict(training.observe)

    def timed(*names: str) -> float:
        with torch.no_grad():
            return bench.milliseconds(
                lambda: tnreg.Trajectory().append(0, {n: observe[n](model) for n in names}), repeats=10
            )

    found = {name: timed(name) for name in observe}
    found["a row"] = timed(*observe)
    observe["spectra on the device"] = lambda m: tnreg.spectra(m.to_tensor().double(), m.tree)
    return {**found, "spectra on the device": timed("spectra on the device")}


class Training:
    """The published run up to some step, with a clock among its observations."""

    def __init__(self, config: dynamics.Config) -> None:
        self.config = config
        self.task, _, _ = train._task(config, None)
        self.model = tnreg.Factorization(
            tnreg.load_tree(config.tree), self.task.sizes, config.rank, std=config.std,
            dtype=getattr(torch, config.dtype), device=config.device,
            generator=torch.Generator().manual_seed(config.seed + 1_000_003),  # as dynamics.run
        )  # fmt: skip
        updates = train.Updates(config.optimizer, self.model, config.lr, config.graph)
        self.optimizer = updates.optimizer
        seen = train._Observations(config, self.task, updates, self.model)
        self.observe = seen.functions

    def fit(self, *, watched: bool = True, seconds: float = float("inf")) -> tnreg.Trajectory:
        """Train; stops at a row after so many seconds."""
        end = time.monotonic() + seconds
        clock: dict[str, Callable[[Any], Any]] = {"clock": lambda _: time.perf_counter()}
        return tnreg.fit(
            self.model, self.task.loss, steps=self.config.steps, optimizer=self.optimizer,
            observe={**(self.observe if watched else {}), **clock}, every=self.config.every,
            stop=lambda _: time.monotonic() > end, progress=False, graph=self.config.graph,
        )  # fmt: skip

    def step(self) -> None:
        """One ordinary step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.task.loss(self.model).backward()
        self.optimizer.step()


def times(found: tnreg.Trajectory) -> dict[str, Any]:
    """Seconds up to the documented step, or as far as it came, and milliseconds a step."""
    steps, clock = found.steps, found["clock"]
    first = 1 if len(steps) > 2 else 0  # the capture and the first calls are before that row
    last = min(int((steps <= DOCUMENTED).sum()), len(steps)) - 1
    passed = float(clock[last] - clock[first])
    return {
        "steps": int(steps[last]), "seconds": round(float(clock[last] - clock[0]), 3),
        "milliseconds a step": round(1e3 * passed / max(int(steps[last] - steps[first]), 1), 4),
        "stopped by": found.stop_reason,
    }  # fmt: skip


def story(config: dynamics.Config, found: tnreg.Trajectory) -> dict[str, Any]:
    """Return the staircase in few numbers: root components, ranks at 1 % every 500 steps, jumps, the end."""
    root = list(found["components"])[-1]
    values = {name: found[name] for name in ("loss", "components", "spectra", "test error")}

    def row(k: int) -> dict[str, Any]:
        ranks = [numerical_rank(torch.from_numpy(s[k]), config.rtol) for s in values["spectra"].values()]
        largest = [float(f"{c:.4g}") for c in values["components"][root][k][:6]]
        return {
            "step": int(found.steps[k]), "loss": float(f"{values['loss'][k]:.4g}"),
            "components": largest, "ranks": ranks,
        }  # fmt: skip

    last = len(found) - 1
    kept = sorted({*range(0, last, max(1, 500 // config.every)), last})
    return {
        "nodes": [str(node) for node in values["spectra"]],
        "end": {**row(last), "test error": float(f"{values['test error'][last]:.4g}")},
        "jumps": sorted(dynamics.tracks(found, root).jumps()),
        "rows": [row(k) for k in kept],
    }


def beside(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the end and the jumps of two runs side by side."""
    pairs = [(a, b) for a, b in zip(found["jumps"], wanted["jumps"], strict=False)]
    off = [abs(a - b) / b for here, there in pairs for a, b in zip(here, there, strict=True) if b]
    return {
        "ranks equal": found["end"]["ranks"] == wanted["end"]["ranks"],
        "end": found["end"], "end of the reference": wanted["end"],
        "jumps": found["jumps"], "jumps of the reference": wanted["jumps"],
        "jumps within 10 %": len(found["jumps"]) == len(wanted["jumps"]) and max(off, default=0) < 0.1,
        "largest difference of a jump": max(off, default=None),
    }  # fmt: skip


def reference(file: Path) -> None:
    """Make the file that runs on other devices are compared with."""
    config = dataclasses.replace(dynamics.htf, seed=1, steps=STEPS)
    found = Training(config).fit()
    held = {
        "made by": "python -m gpu_stages.dynamics --reference FILE", "seed": config.seed,
        "torch": torch.__version__, "threads": torch.get_num_threads(),
        **times(found), **story(config, found),
    }  # fmt: skip
    rows = ",\n  ".join(json.dumps(row) for row in held.pop("rows"))
    lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in held.items())
    file.write_text(f'{{\n {lines},\n "rows": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, required=True)
    reference(parser.parse_args().reference)
