"""What a training step with a regularizer costs over one without: ResNet-18, 150 x 150 pixels, one channel.

Steps of ``tnreg run locality`` on Pathfinder images: milliseconds, their ratio to the plain step, images a
second, and the most memory. Batches of 64 and 256, bfloat16 and float32 (with TF32 in convolutions, torch's
default), step by step and as CUDA graphs, two networks compiled as well. Every kind of step that is timed
was called five times before: cuDNN has searched, graphs are recorded.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from functools import partial
from typing import Any

import torch

from gpu_stages.bench import Bench, attempt
from tnreg import images
from tnreg.experiments import locality
from tnreg.experiments.locality.settings import Execution, Settings
from tnreg.experiments.locality.train import _fast, _State
from tnreg.far.scheduled import Draw
from tnreg.machine.processes import Processes

# Counted on the CPU, an image: forward and backward passes of the step.
GFLOP = {
    "plain": 5.0, "gradient change, frozen": 18.4, "gradient change, frozen, all samples": 18.4,
    "gradient change, batch": 20.1, "interaction energy": 10.0,
}  # fmt: skip
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "gradient change, frozen": ("igc", {"statistics": "frozen"}),
    "gradient change, frozen, all samples": ("igc", {"statistics": "frozen"}),
    "gradient change, batch": ("igc", {"statistics": "batch"}),
    "interaction energy": ("interaction", {}),
}


def run(bench: Bench) -> None:
    """Time every row, those of the trainings that are to come first."""
    count, size = (24, 60) if bench.rehearse else (1024, 150)
    data = images.pathfinder(count, length=7, size=size, seed=3)
    batches = (8,) if bench.rehearse else (64, 256)
    ways = ("eager",) if bench.device.type == "cpu" else ("eager", "graph")
    found: dict[str, Any] = {}
    for batch, precision, way in itertools.product(batches, ("bfloat16", "float32"), ways):
        block = found.setdefault(f"batch {batch}, {precision}", {})
        for row in ROWS:
            if bench.left() < 6:
                bench.add(note=f"no time left for batch {batch}, {precision}, {row}, {way}")
                return
            name = f"{row}, {way}"
            block[name] = attempt(partial(measure, bench, data, row, way, batch, precision))
            clear(bench)
            relate(block, name, way)
            bench.add(steps=found)
            if way == "graph" and "error" in block[name]:
                # a capture that failed leaves torch's memory in a state that later rows would show
                bench.add(note=f"{name}: a capture failed, what follows was not measured")
                return
    # gradient change runs uncompiled: compiled graphs have no second derivative
    for row in ("plain", "interaction energy"):
        if bench.left() > 40 or bench.rehearse:
            call = partial(measure, bench, data, row, "compiled", batches[0], "bfloat16")
            found[f"{row}, compiled"] = attempt(call)
            bench.add(steps=found)


def clear(bench: Bench) -> None:
    """Free what a state and its graphs hold of each other, and of the device."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def relate(block: dict[str, Any], name: str, way: str) -> None:
    """Add the ratio to the plain step that is carried out in the same way."""
    plain = block.get(f"plain, {way}", {}).get("milliseconds")
    if plain and "milliseconds" in block[name]:
        block[name]["over plain"] = round(block[name]["milliseconds"] / plain, 3)


def measure(
    bench: Bench, data: images.ImageSet, row: str, way: str, batch: int, precision: Any
) -> dict[str, Any]:
    """Milliseconds of a step over some steps with draws of their own."""
    arm, more = ROWS[row]
    published = locality.SETS["pathfinder"]
    names = [f.name for f in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(published, name) for name in names})
    settings = dataclasses.replace(
        settings, batch=batch, precision=precision, device=str(bench.device), **more
    )
    torch.manual_seed(0)
    with _fast():
        execution = Execution(graph=way == "graph")
        state = _State(settings, arm, 0, data, Processes(device=bench.device), execution)
        if row.endswith("all samples"):
            skip_nothing(state)
        if way == "compiled":
            backend = "aot_eager" if bench.rehearse else "inductor"
            state.wrapped = torch.compile(state.net, backend=backend)
        state.net.train()
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps = [draw(state, batch) for _ in range(3 if bench.rehearse else 16)]
        kinds = {None if d is None or d.samples is None else len(d.samples): (i, w, d)
                 for i, w, d in steps}  # fmt: skip
        for one in kinds.values():
            for _ in range(1 if bench.rehearse else 5):
                state.update(*one)
        bench.wait()
        began = time.perf_counter()
        for one in steps:
            draw(state, batch)  # its time counts, what it draws is not used
            state.update(*one)
        bench.wait()
        seconds = (time.perf_counter() - began) / len(steps)
    found = {
        "milliseconds": round(1e3 * seconds, 3), "images a second": round(batch / seconds),
        "kinds of steps": len(kinds),
    }  # fmt: skip
    if not row.endswith("frozen"):  # there it hangs on how many samples change
        found["TFLOP/s"] = round(GFLOP[row] * batch / seconds / 1e3, 2)
    if bench.device.type == "cuda":
        found["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def draw(state: _State, batch: int) -> tuple[torch.Tensor, float, Draw | None]:
    """Random images, the weight of the penalty, and what it draws."""
    order = torch.randperm(len(state.host))[:batch]
    there = order.to(state.x.device, non_blocking=True)
    if state.penalty is None:
        return there, 0.0, None
    return there, state.penalty.next_weight(), state._draw(order, there)


def skip_nothing(state: _State) -> None:
    """Have the penalty evaluate the samples that the swap does not change as well."""
    draw = state._draw

    def all_samples(order: torch.Tensor, there: torch.Tensor) -> Draw:
        return dataclasses.replace(draw(order, there), samples=None)

    state._draw = all_samples  # type: ignore[method-assign]
