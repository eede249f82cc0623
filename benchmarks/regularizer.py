"""A training step with a regularizer over the same step without, in one run on one machine.

``python benchmarks/regularizer.py [--device cuda] [--threads 1] [--out FILE.json]`` prints a table.
Times are medians over interleaved bursts, so that a busy moment of the machine hits all rows alike; a
ratio is the median over rounds of the ratio to the plain step of the same round. On one CPU thread they are
processor time, which other work on the machine disturbs less. Denormal numbers are
flushed: a net that has fitted its data makes gradients so small that single steps get ten times slower.

Nets, batch 64, SGD with momentum, float32:
  small CNN   8 x 40, one channel: five 3x3 convolutions with ReLU, no normalization
  residual    32 x 32, one channel: a convolution, three residual blocks of two, 16, 32 and 64 channels
  residual, batch normalization      the same with batch normalization
On Linux all is measured twice, as the process starts and after glibc was told to keep the memory that a
step frees, as allocators made for such work do: where pages are dear, the larger step gains most by it.

Rows: plain; gradient change with torch's own second derivatives, and with those of tnreg; interaction
energy of 8, 6 and 5 samples.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tnreg.far import input_gradient
from tnreg.far.interaction import InteractionEnergy, InteractionRank
from tnreg.far.patches import PresetPatches, RandomPatches
from tnreg.far.regularizers import InputGradientChange

Call = Callable[[], object]


class Block(nn.Module):
    """Two convolutions beside a short cut."""

    def __init__(self, before: int, width: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(before, width, 3, stride, 1, bias=not norm)
        self.b = nn.Conv2d(width, width, 3, 1, 1, bias=not norm)
        self.short = nn.Conv2d(before, width, 1, stride, bias=not norm)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) if norm else nn.Identity() for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the block."""
        out = self.norms[1](self.b(self.relu(self.norms[0](self.a(x)))))
        out += self.norms[2](self.short(x))
        return self.relu(out)


def small() -> nn.Module:
    """Return the net of the digits experiment."""
    layers: list[nn.Module] = []
    before = 1
    for width, stride in ((32, 2), (48, 2), (48, 1), (48, 2), (48, 1)):
        layers += [nn.Conv2d(before, width, 3, stride, 1), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1))


def residual(norm: bool) -> nn.Module:
    """Seven layers of the kind that residual networks are made of."""
    first = [nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16) if norm else nn.Identity(), nn.ReLU()]
    blocks = [Block(16, 16, 2, norm), Block(16, 32, 2, norm), Block(32, 64, 2, norm)]
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1))


def training_step(net: nn.Module, x: torch.Tensor, y: torch.Tensor, penalty: Call | None) -> Call:
    """One step of SGD on the loss, and on the penalty where there is one."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    loss_of = nn.BCEWithLogitsLoss()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(net(x)[:, 0], y)
        if penalty is not None:
            loss = loss + penalty(net, x)
        loss.backward()
        optimizer.step()

    return step


def torchs_own(penalty: InputGradientChange) -> Call:
    """Return the same penalty without the replacements of ``input_gradient``."""
    replaced = input_gradient._REPLACEMENTS

    def call(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        input_gradient._REPLACEMENTS = {}
        try:
            return penalty(net, x)
        finally:
            input_gradient._REPLACEMENTS = replaced

    return call


def measure(
    rows: dict[str, Call], device: torch.device, rounds: int, burst: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Median milliseconds of each call in every round; the first call of a burst warms up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, call in rows.items():
            taken = []
            for _ in range(burst + 1):
                wait()
                start = clock()
                call()
                wait()
                taken.append(1e3 * (clock() - start))
            times[name].append(statistics.median(taken[1:]))
    return times


def compare(
    options: argparse.Namespace, device: torch.device, clock: Callable[[], float]
) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds and ratios of every row for every net."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    digits = [(0, 0, 8, 8), (0, 32, 8, 40)]
    for name, make, shape in (
        ("small CNN", small, (8, 40)),
        ("residual", lambda: residual(False), (32, 32)),
        ("residual, batch normalization", lambda: residual(True), (32, 32)),
    ):
        torch.manual_seed(0)
        x = torch.randn(64, 1, *shape, device=device)
        y = (torch.rand(64, device=device) > 0.5).float()

        def patches(shape: tuple[int, int] = shape) -> object:
            return PresetPatches(digits) if shape == (8, 40) else RandomPatches(4)

        change, energy, rank = InputGradientChange, InteractionEnergy, InteractionRank
        penalties: dict[str, Call | None] = {
            "plain": None,
            "gradient change, torch's own second derivatives": torchs_own(change(patches())),
            "gradient change": change(patches()),
            "interaction energy, k = 8": energy(patches(), 8),
            "interaction energy, k = 6": energy(patches(), 6),
            "interaction energy, k = 5": energy(patches(), 5),
            "interaction rank, k = 8": rank(patches(), 8, weight=1.0, start=0, until=None, target=None),
        }
        rows = {row: training_step(make().to(device), x, y, penalty) for row, penalty in penalties.items()}
        times = measure(rows, device, options.rounds, options.burst, clock)
        found[name] = {
            row: {
                "milliseconds": statistics.median(taken),
                "over plain": statistics.median(t / p for t, p in zip(taken, times["plain"], strict=True)),
            }
            for row, taken in times.items()
        }
        for row, values in found[name].items():
            print(f"{name:30} {row:48} {values['milliseconds']:7.2f} ms {values['over plain']:5.2f}")
    return found


def keep_memory() -> bool:
    """Let the C library keep freed memory: else every step pays again for the pages it touches."""
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(-1, 2**30))  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        return False


def main() -> None:
    """Measure and print; write the figures if asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--burst", type=int, default=8)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    flushed = torch.set_flush_denormal(True)
    alone = device.type == "cpu" and options.threads == 1
    clock = time.process_time if alone else time.perf_counter
    found = {"memory returned": compare(options, device, clock)}
    if device.type == "cpu" and keep_memory():
        found["memory kept"] = compare(options, device, clock)
    result = {
        "machine": f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else processor()}, "
        f"{os.cpu_count()} cores, {options.threads} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "note": options.note,
        "denormals flushed": flushed,
        "clock": clock.__name__,
        "batch": 64,
        "results": found,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    main()
