"""Training steps and forward passes against hand-written torch, in one run on one machine.

``python benchmarks/steps.py [--device cuda] [--threads 2] [--out FILE.json]`` prints a table. Times
are medians over interleaved bursts, so that a busy moment of the machine hits all rows alike; a
ratio compares rows of the same block.

Blocks:
  htf     8^4, binary tree of diagonal joins, widths 512, 2048 of 4096 entries, float32: loss,
  backward, SGD cp      16^3, 256 components, 2048 entries, float32: the same
  matrix  64x64, depth 3, 2048 entries, float32: the same
  full    16 sites, dim 8, bond 16, batch 1024, full joins, float32: forward, and forward + backward
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import tnreg
from tnreg.training.tasks import Completion

Call = Callable[[], object]


def measure(rows: dict[str, Call], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each call; the calls take turns in bursts, the first two of which warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, call in rows.items():
            for repeat in range(12):
                wait()
                start = time.perf_counter()
                call()
                wait()
                if repeat >= 2:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def machine_name(device: torch.device, threads: int) -> str:
    """Return what the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{name}, {threads} threads, {versions}"


def training_step(predict: Callable[[], Tensor], values: Tensor, parameters: list[Tensor]) -> Call:
    """One SGD step on the mean squared error."""
    optimizer = torch.optim.SGD(parameters, lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (predict() - values).square().mean().backward()
        optimizer.step()

    return step


def task_step(task: Completion, model: tnreg.Factorization) -> Call:
    """Return the same step through the public interface."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        task.loss(model).backward()
        optimizer.step()

    return step


def observed(sizes: tuple[int, ...], count: int, device: torch.device) -> Completion:
    """Random entries of a random tensor."""
    target = torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(device)
    return tnreg.completion(target, count, seed=0)


def leaves(model: tnreg.Factorization) -> list[Tensor]:
    """Copy the weights as plain parameters, in the order of the tree's nodes."""
    return [w.detach().clone().requires_grad_() for w in model.weights.values()]


def flat_index(task: Completion) -> Tensor:
    """Positions of the observed entries in the flattened tensor."""
    flat = torch.zeros_like(task.index[:, 0])
    for n, size in enumerate(task.sizes):
        flat = flat * size + task.index[:, n]
    return flat


def htf_by_hand(
    task: Completion, model: tnreg.Factorization
) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Hand-written predictions of the observed entries, each with parameters of its own."""
    flat = flat_index(task)
    features = [one_hot(task.index[:, n], 8).float() for n in range(4)]
    hand, sample, single = leaves(model), leaves(model), leaves(model)

    def dense() -> Tensor:
        a, b, ab, c, d, cd, top = hand
        left = (a.unsqueeze(1) * b).reshape(64, 512) @ ab
        right = (c.unsqueeze(1) * d).reshape(64, 512) @ cd
        return ((left * top) @ right.T).reshape(-1)[flat]

    def per_sample() -> Tensor:
        a, b, ab, c, d, cd, top = sample
        xa, xb, xc, xd = (
            torch.einsum("bi,ir->br", x, w) for x, w in zip(features, (a, b, c, d), strict=True)
        )
        left = torch.einsum("br,br,rs->bs", xa, xb, ab)
        right = torch.einsum("br,br,rs->bs", xc, xd, cd)
        return torch.einsum("bs,bs,s->b", left, right, top)

    def one_einsum() -> Tensor:
        return torch.einsum("zi,zj,zk,zl,ir,jr,rt,ks,ls,st,t->z", *features, *single)

    return {
        "hand-written dense then index": (dense, hand),
        "per-sample one-hot einsum, leaf to root": (per_sample, sample),
        "per-sample one-hot einsum, one call": (one_einsum, single),
    }


def htf(device: torch.device) -> dict[str, Call]:
    """Hierarchical tensor factorization at the published size."""
    task = observed((8,) * 4, 2048, device)
    model = tnreg.Factorization(tnreg.ModeTree.binary(4), 8, 512, std=0.1, device=device)
    rows = {"tnreg": task_step(task, model)}
    for name, (predict, parameters) in htf_by_hand(task, model).items():
        rows[name] = training_step(predict, task.values, parameters)
    return rows


def cp(device: torch.device) -> dict[str, Call]:
    """CP with a fixed root weight."""
    task = observed((16,) * 3, 2048, device)
    model = tnreg.Factorization(tnreg.ModeTree.star(3), 16, 256, root="ones", std=0.1, device=device)
    flat, hand = flat_index(task), leaves(model)
    features = [one_hot(task.index[:, n], 16).float() for n in range(3)]
    sample = leaves(model)

    def dense() -> Tensor:
        a, b, c = hand
        return ((a.unsqueeze(1) * b).reshape(256, 256) @ c.T).reshape(-1)[flat]

    def per_sample() -> Tensor:
        a, b, c = (torch.einsum("bi,ir->br", x, w) for x, w in zip(features, sample, strict=True))
        return torch.einsum("br,br,br->b", a, b, c)

    return {
        "tnreg": task_step(task, model),
        "hand-written dense then index": training_step(dense, task.values, hand),
        "per-sample one-hot einsum": training_step(per_sample, task.values, sample),
    }


def matrix(device: torch.device) -> dict[str, Call]:
    """Deep matrix factorization."""
    task = observed((64, 64), 2048, device)
    model = tnreg.Factorization(tnreg.ModeTree.chain(3), 64, 64, root="ones", std=0.1, device=device)
    flat, hand = flat_index(task), leaves(model)

    def dense() -> Tensor:
        first, middle, last = hand
        return (first @ middle @ last.T).reshape(-1)[flat]

    return {
        "tnreg": task_step(task, model),
        "hand-written dense then index": training_step(dense, task.values, hand),
    }


def full(device: torch.device) -> dict[str, Call]:
    """Tree tensor network on a batch; the hand-written form keeps each level in one stacked tensor."""
    model = tnreg.Factorization(tnreg.ModeTree.binary(16), 8, 16, join="full", std=0.3, device=device)
    x = torch.randn(1024, 16, 8, generator=torch.Generator().manual_seed(0)).to(device)
    tree, weights = model.tree, model.weights
    levels = [
        torch.stack([w.detach() for v, w in weights.items() if tree.heights[tree.position(v)] == h])
        .clone()
        .requires_grad_()
        for h in range(5)
    ]

    def stacked() -> Tensor:
        y = torch.einsum("bnd,ndr->nbr", x, levels[0])
        for level in levels[1:4]:
            y = torch.einsum("nbi,nbj,nijk->nbk", y[0::2], y[1::2], level)
        return torch.einsum("bi,bj,ij->b", y[0], y[1], levels[4][0])

    def backward(predict: Callable[[], Tensor], parameters: list[Tensor]) -> Call:
        def call() -> None:
            for p in parameters:
                p.grad = None
            predict().square().mean().backward()

        return call

    def quiet(predict: Callable[[], Tensor]) -> Call:
        def call() -> None:
            with torch.no_grad():
                predict()

        return call

    with torch.no_grad():
        assert (stacked() - model(x)).abs().max() < 1e-4 * model(x).abs().max()
    return {
        "tnreg forward": quiet(lambda: model(x)),
        "stacked einsum forward": quiet(stacked),
        "tnreg forward + backward": backward(lambda: model(x), list(model.parameters())),
        "stacked einsum forward + backward": backward(stacked, levels),
    }


def main() -> None:
    """Run all blocks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    machine = machine_name(device, arguments.threads)
    print(machine)
    results: dict[str, dict[str, float]] = {}
    for block in (htf, cp, matrix, full):
        found = measure(block(device), device, arguments.rounds)
        results[block.__name__] = found
        print(f"\n{block.__name__}")
        for row, milliseconds in found.items():
            base = found[
                "tnreg"
                if "tnreg" in found
                else ("tnreg forward + backward" if "backward" in row else "tnreg forward")
            ]
            print(f"  {row:42s} {milliseconds:9.3f} ms   {milliseconds / base:6.2f} x tnreg")
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine, "milliseconds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
