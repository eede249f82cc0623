"""What data suits a locally connected network: one task, its features in order, permuted, and rearranged.

``python benchmarks/data_suits.py [--seeds 101 102 ..]`` trains two networks on every order, and writes the
figures and ``docs/data.png``. One thread. Settings were chosen on seeds 0 and 1.

A sample is 1,024 numbers, resonant noise (an autoregressive process of order 2) whose period is 40 in some of
eight sections and 12 in the others, which ones being the class; onsets are shifted by up to 16, periods vary
by 10 %, and white noise of the same power is added. No single number tells anything: only neighbours do.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tnreg
from tnreg import plots

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "data_suits.json"
LENGTH, CLASSES, SECTIONS, PERIODS, DAMPING = 1024, 4, 8, (40, 12), 0.95
TRAIN, TEST, MEASURED, EPOCHS, BATCH = 1000, 2000, 400, 15, 50
RMS = 0.1  # of audio within [-1, 1]
TREE = tnreg.ModeTree.binary(LENGTH)
Set = tuple[Tensor, Tensor]  # samples and classes
NODES = [v for v in TREE.nodes[:-1] if len(TREE.modes_below(v)) >= 16]


def signals(count: int, sections: Tensor, draw: torch.Generator) -> Set:
    """Return samples ``(count, 1024)`` of variance about 1, and their classes."""
    start = 100  # forgotten
    classes = torch.randint(CLASSES, (count,), generator=draw)
    shift = torch.randint(-16, 17, (count, 1), generator=draw)
    place = (torch.arange(-start, LENGTH) + shift).clamp(0, LENGTH - 1) * SECTIONS // LENGTH
    period = torch.tensor(PERIODS)[sections[classes].gather(1, place)]
    frequency = (1 + 0.1 * torch.randn(count, 1, generator=draw)) / period
    a, b = 2 * DAMPING * torch.cos(2 * math.pi * frequency), DAMPING**2
    variance = (1 + b) / ((1 - b) * ((1 + b) ** 2 - a**2))
    x = torch.randn(count, start + LENGTH, generator=draw) / variance.sqrt()
    for t in range(2, start + LENGTH):
        x[:, t] += a[:, t] * x[:, t - 1] - b * x[:, t - 2]
    x = x[:, start:] + torch.randn(count, LENGTH, generator=draw)
    return x / math.sqrt(2), classes


def convolutional() -> nn.Module:
    """Return an ordinary network of three convolutions."""
    layers: list[nn.Module] = []
    for channels, more, kernel, stride in ((1, 16, 16, 4), (16, 32, 8, 4), (32, 32, 4, 2)):
        conv = nn.Conv1d(channels, more, kernel, stride, (kernel - stride) // 2)
        layers += [conv, nn.BatchNorm1d(more), nn.ReLU()]
    return nn.Sequential(
        nn.Unflatten(1, (1, LENGTH)), *layers, nn.AdaptiveAvgPool1d(8), nn.Flatten(), nn.Linear(256, CLASSES)
    )


class Local(nn.Module):
    """The binary tree as a network: every node has weights of its own for what its two children say."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        count, inside = LENGTH // 2, 1
        while count:
            outside = channels if count > 1 else CLASSES
            self.weights.append(torch.randn(count, 2 * inside, outside) / math.sqrt(inside))
            self.biases.append(torch.zeros(count, 1, outside))
            count, inside = count // 2, outside

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``(B, classes)``."""
        y = x.T.unsqueeze(2)  # (nodes, B, channels)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            pairs = y.reshape(len(weight), 2, *y.shape[1:]).transpose(1, 2).flatten(2)
            y = torch.baddbmm(bias, pairs if pairs.shape[2] == 2 else pairs.relu(), weight)
        return y[0]


NETS: dict[str, tuple[Callable[[], nn.Module], float]] = {  # with learning rates
    "convolutional": (convolutional, 3e-3),
    "locally connected": (Local, 1e-2),
}


def accuracies(
    name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int
) -> list[float]:
    """Train a network; return its accuracies on both sets."""
    torch.manual_seed(seed)
    make, lr = NETS[name]
    net, steps = make(), EPOCHS * TRAIN // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAIN).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(train[0][batch]), train[1][batch]).backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        return [float((net(x).argmax(1) == y).double().mean()) for x, y in (train, test)]


def by_size(values: dict[Any, float]) -> dict[str, float]:
    """Average over the nodes of every size."""
    sizes: dict[str, list[float]] = {}
    for node, value in values.items():
        sizes.setdefault(str(len(node)), []).append(value)
    return {size: round(statistics.mean(found), 6) for size, found in sizes.items()}


def measure(seed: int) -> dict[str, Any]:
    """Return what came out for every order of the features."""
    draw = torch.Generator().manual_seed(seed)
    sections = (torch.rand(CLASSES, SECTIONS, generator=draw).argsort(1) < SECTIONS // 2).long()
    train, test = signals(TRAIN, sections, draw), signals(TEST, sections, draw)
    permuted = torch.randperm(LENGTH, generator=draw)
    orders, seconds = {"original": torch.arange(LENGTH), "permuted": permuted}, dict[str, float]()
    for count in (TRAIN, 200):
        clock = time.process_time()
        name = f"rearranged by {count:,}"
        orders[name] = permuted[tnreg.rearrange(train[0][:count, permuted])]
        seconds[name] = time.process_time() - clock
    rows: dict[str, Any] = {}
    for name, order in orders.items():
        some, labels = RMS * train[0][:MEASURED, order], train[1][:MEASURED]
        rows[name] = {
            "neighbours": round(float((order.argsort().diff().abs() == 1).double().mean()), 4),
            "seconds": round(seconds.get(name, 0.0), 2),
            "entropy": by_size(tnreg.data_entanglement(some, TREE, nodes=NODES)),
            "entropy with labels": by_size(tnreg.data_entanglement(some, TREE, labels, nodes=NODES)),
            "correlation": by_size(tnreg.data_entanglement(some, TREE, method="correlation", nodes=NODES)),
        }
        sets = [(x[:, order].contiguous(), y) for x, y in (train, test)]
        for net in NETS:
            rows[name][net] = accuracies(net, *sets, seed)
    return rows


def figure(results: dict[str, Any]) -> None:
    """Draw the entropies of the first seed, and mean accuracies."""
    from matplotlib import pyplot as plt

    drawn, (left, *right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    first, *_ = results.values()
    sizes = [tuple(range(int(size))) for size in first["original"]["entropy"]]  # a node of every size
    data = {name: dict(zip(sizes, row["entropy"].values(), strict=True)) for name, row in first.items()}
    plots.data_entanglement(data, TREE, left)
    for ax, net in zip(right, NETS, strict=True):
        found = {name: [rows[name][net][1] for rows in results.values()] for name in first}
        spreads = [statistics.stdev(values) for values in found.values()]
        means = {name: statistics.mean(values) for name, values in found.items()}
        plots.bars(means, ax, unit=f"test accuracy, {net}", errors=spreads)
        ax.axvline(1 / CLASSES, color="0.6", lw=1)
    plots.save_figure(drawn, ROOT / "docs" / "data.png")


def main() -> None:
    """Run all seeds and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103, 104, 105])
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    clock, results = time.process_time(), {}
    for seed in arguments.seeds:
        results[str(seed)] = measure(seed)
        for name, row in results[str(seed)].items():
            cut = {
                key: round(row[key]["128"], 4) for key in ("entropy", "entropy with labels", "correlation")
            }
            print(
                seed,
                name,
                cut,
                *(f"{net} {row[net]}" for net in NETS),
                f"{row['neighbours']:.2f}",
                flush=True,
            )
    machine = f"{platform.machine()} CPU, 1 thread, torch {torch.__version__}"
    found = {"machine": machine, "seconds": time.process_time() - clock, "results": results}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.out == OUT:
        figure(results)


if __name__ == "__main__":
    main()
