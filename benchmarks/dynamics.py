"""What a published HTF run costs: step, fit around it, every observation; in one run on one machine.

``python benchmarks/dynamics.py [--device cuda] [--threads 2] [--graph] [--out FILE.json]`` prints a
table of medians over interleaved bursts. 8^4, binary tree of diagonal joins, widths 512, 2048 of 4096
entries, float32. The baselines are hand-written torch: one-hot inputs sample by sample, and singular
values of the dense tensor node by node.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from steps import htf_by_hand, machine_name, measure
from torch import Tensor

import tnreg
from tnreg.experiments.dynamics import htf, train

FIT_STEPS = 100


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--graph", action="store_true", help="CUDA: replay steps as a graph, too")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    config = dataclasses.replace(htf, device=str(device), std=0.05)
    task, _, _ = train._task(config, None)

    def fresh() -> tuple[tnreg.Factorization, train.Updates]:
        model = tnreg.Factorization(
            tnreg.ModeTree.binary(4), 8, 512, std=config.std, device=device,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return model, train.Updates("group-rmsprop", model, 1e-4, graph=False)

    def step_of(predict: Callable[[], Tensor], parameters: list[Tensor]) -> Callable[[], None]:
        optimizer = tnreg.GroupRMSprop(parameters, lr=1e-4)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            (predict() - task.values).square().mean().backward()
            optimizer.step()

        return step

    def training(*, watched: bool, graph: bool = False) -> Callable[[], object]:
        model, updates = fresh()
        observations = train._Observations(config, task, updates, model)
        observe = observations.functions if watched else {}
        return lambda: tnreg.fit(
            model, task.loss, steps=FIT_STEPS, optimizer=updates.optimizer, observe=observe, every=25,
            progress=False, graph=graph,
        )  # fmt: skip

    model, updates = fresh()
    optimizer = updates.optimizer

    def bare() -> None:
        optimizer.zero_grad(set_to_none=True)
        task.loss(model).backward()
        optimizer.step()

    by_hand, tree = htf_by_hand(task, model), model.tree

    @torch.no_grad()
    def one_svd_per_node() -> None:
        whole = model.to_tensor().double()
        for node in tree.nodes[:-1]:
            torch.linalg.svdvals(tnreg.matricize(whole, tree.modes_below(node)))

    @torch.no_grad()
    def quiet(function: Callable[[tnreg.Factorization], object]) -> None:
        function(model)

    observations = train._Observations(config, task, updates, model)
    rows: dict[str, Callable[[], object]] = {
        "step: tnreg": bare,
        "step: hand-written dense then index": step_of(*by_hand["hand-written dense then index"]),
        "step: per-sample one-hot einsum": step_of(*by_hand["per-sample one-hot einsum, leaf to root"]),
        "fit, nothing observed": training(watched=False),
        "fit, all observed every 25": training(watched=True),
        "one svdvals per node of the dense tensor": one_svd_per_node,
    }
    for name, function in observations.functions.items():
        if name not in ("effective rank", "component ids", "step size", "flow time"):
            rows[f"observe: {name}"] = lambda f=function: quiet(f)
    if arguments.graph:
        rows["fit, nothing observed, CUDA graph"] = training(watched=False, graph=True)
    times = measure(rows, device, arguments.rounds)
    for name in rows:
        if name.startswith("fit"):
            times[name] /= FIT_STEPS
    report(times, machine_name(device, arguments.threads), arguments.out)


def report(times: dict[str, float], machine: str, path: Path | None) -> None:
    """Print the times, and write them as JSON if there is a path."""
    print(machine)
    for name, milliseconds in times.items():
        ratio = milliseconds / times["step: tnreg"]
        print(f"  {name:44s} {milliseconds:9.3f} ms   {ratio:6.2f} x step")
    if path:
        path.write_text(json.dumps({"machine": machine, "milliseconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
