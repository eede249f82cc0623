"""What a stage of ``benchmarks/gpu.py`` measures with: device, clock, deadline, file of its figures."""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Bench:
    """One stage at work.

    Attributes:
        name: Name of the stage.
        file: Where its figures go, as JSON.
        device: "cuda", or "cpu" in a rehearsal.
        rehearse: Whether to run tiny sizes, only to see that everything runs.
        deadline: ``time.monotonic()`` at which the stage is killed.
        folder: For what is too large for JSON, as states of trainings: ``OUT/NAME``; removed if empty.
        unfinished: Why the stage is not complete although it came to its end; the next command goes on.
        earlier: Figures of an earlier try, kept in the file until the stage is complete.
        before: ``OUT``, then those of earlier commands; each may hold ``gpu-NAME.json`` and ``NAME/``.
    """

    name: str
    file: Path
    device: torch.device
    rehearse: bool
    deadline: float
    folder: Path
    before: tuple[Path, ...] = ()
    unfinished: str = ""
    earlier: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, **figures: Any) -> None:
        """Add figures and write the file, so that a stage that is killed later leaves them."""
        self.figures.update(figures)
        self.write(complete=False)

    def write(self, *, complete: bool, error: str = "") -> None:
        """Write the figures: beside first, then renamed."""
        held = {
            "stage": self.name, **machine(self.device), "rehearsal": self.rehearse,
            "complete": complete, **({"error": error} if error else {}),
            "seconds": round(time.monotonic() - self.started, 2), "figures": self.figures,
            **({"figures of an earlier try": self.earlier} if self.earlier and not complete else {}),
        }  # fmt: skip
        beside = self.file.with_name(f".{self.file.name}")
        beside.write_text(json.dumps(held, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(beside, self.file)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], Any], repeats: int = 20, warmup: int = 3) -> float:
        """Median milliseconds of a call, by CUDA events on a GPU; at most some two seconds of them."""
        for _ in range(warmup):
            call()
        self.wait()
        times: list[float] = []
        start = time.monotonic()
        while len(times) < repeats and (not times or time.monotonic() - start < 2):
            times.append(self._once(call))
        return statistics.median(times)

    def _once(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))


def attempt(call: Callable[[], Any]) -> Any:
    """Return the figures, or the error: what comes after is measured all the same."""
    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


@functools.lru_cache(maxsize=1)
def machine(device: torch.device) -> dict[str, Any]:
    """Return the device, its driver, and the versions that measured."""
    named = f"{platform.processor() or platform.machine()} CPU, {os.cpu_count()} cores"
    driver = ""
    if device.type == "cuda":
        named = torch.cuda.get_device_name(device)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
            driver = answer.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            driver = "unknown"
    return {
        "device": named, "driver": driver, "torch": torch.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(),
    }  # fmt: skip


def relative(found: Any, wanted: Any) -> float:
    """``‖found - wanted‖ / ‖wanted‖`` in double precision on the CPU; of mappings the largest."""
    if isinstance(wanted, Mapping):
        return max(relative(found[key], wanted[key]) for key in wanted)
    a, b = (torch.as_tensor(x).detach().cpu().to(torch.complex128) for x in (found, wanted))
    norm = float(torch.linalg.vector_norm(b))
    return float(torch.linalg.vector_norm(a - b)) / (norm or 1.0)
