"""What a training step with a regularizer costs over one without: ResNet-18, 150 x 150 pixels, one channel.

Epochs of ``tnreg run locality`` on Pathfinder images, without its evaluation: milliseconds a step, its ratio
to the plain step, images a second, and the most memory. Batches of 64 and 256, bfloat16 and float32 (with
TF32 in convolutions, torch's default), step by step and as CUDA graphs, the plain network compiled as well.

Estimate for an H100, 75 s: at 50 TFLOP/s in bfloat16 and half of that in float32, of the GFLOP an image of
``GFLOP``, 3 epochs of 1,024 images for each of 40 rows are 44 s, of which launches (6 us) hide behind all but
the plain ones; the search of cuDNN for algorithms some 10 s; compilation 20 s or more, and last.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu_stages.bench import Bench
from tnreg import images
from tnreg.experiments import locality
from tnreg.experiments.locality_run import Execution, Settings, _fast, _State
from tnreg.parallel import Processes
from tnreg.scheduled import Draw

ESTIMATE = 75.0

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
    ways = ("eager",) if bench.device.type == "cpu" else ("graph", "eager")
    found: dict[str, Any] = {}
    for batch in batches:
        for precision in ("bfloat16", "float32"):
            block: dict[str, Any] = {}
            for way in ways:
                for row in ROWS:
                    if bench.left() < 6:
                        bench.add(note=f"no time left for {row}, {way}, and what follows")
                        return
                    name = f"{row}, {way}"
                    block[name] = attempt(partial(measure, bench, data, row, way, batch, precision))
                    relate(block, name, way)
                    found[f"batch {batch}, {precision}"] = block
                    bench.add(steps=found)
    # gradient change runs uncompiled: compiled graphs have no second derivative
    for row in ("plain", "interaction energy"):
        if bench.left() > 40 or bench.rehearse:
            call = partial(measure, bench, data, row, "compiled", batches[0], "bfloat16")
            found[f"{row}, compiled"] = attempt(call)
            bench.add(steps=found)


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Figures, or the error: what comes after is measured all the same."""
    try:
        return call()
    except Exception as error:  # out of memory, or a capture that fails
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:  # a state and its graphs hold each other, and gigabytes of the device
        gc.collect()
        torch.cuda.empty_cache()


def relate(block: dict[str, Any], name: str, way: str) -> None:
    """Add the ratio to the plain step that is carried out in the same way."""
    plain = block.get(f"plain, {way}", {}).get("milliseconds")
    if plain and "milliseconds" in block[name]:
        block[name]["over plain"] = round(block[name]["milliseconds"] / plain, 3)


def measure(
    bench: Bench, data: images.ImageSet, row: str, way: str, batch: int, precision: Any
) -> dict[str, Any]:
    """Steps of three epochs: two to warm up, one that counts."""
    arm, more = ROWS[row]
    published = locality.SETS["pathfinder"]
    settings = Settings(
        **{f.name: getattr(published, f.name) for f in dataclasses.fields(Settings)}
    )
    settings = dataclasses.replace(
        settings, batch=batch, precision=precision, device=str(bench.device), **more
    )
    torch.manual_seed(0)
    execution = Execution(graph=way == "graph")
    with _fast():
        state = _State(settings, arm, 0, data, Processes(device=bench.device), execution)
        if row.endswith("all samples"):
            skip_nothing(state)
        if way == "compiled":
            backend = "aot_eager" if bench.rehearse else "inductor"
            state.shared = torch.compile(state.net, backend=backend)
        state.net.train()
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(1 if bench.rehearse else 2):
            state.steps()
        bench.wait()
        warm = time.perf_counter() - began
        began = time.perf_counter()
        shown, _ = state.steps()
        bench.wait()
        seconds = time.perf_counter() - began
    found = {
        "milliseconds": round(1e3 * seconds * batch / shown, 3),
        "images a second": round(shown / seconds),
        "seconds to warm up": round(warm, 2),
    }
    if not row.endswith("frozen"):  # there it hangs on how many samples change
        found["TFLOP/s"] = round(GFLOP[row] * shown / seconds / 1e3, 2)
    if bench.device.type == "cuda":
        found["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def skip_nothing(state: _State) -> None:
    """Have the penalty evaluate the samples that the swap does not change as well."""
    draw = state._draw

    def all_samples(order: torch.Tensor, there: torch.Tensor) -> Draw:
        return dataclasses.replace(draw(order, there), samples=None)

    state._draw = all_samples  # type: ignore[method-assign]
