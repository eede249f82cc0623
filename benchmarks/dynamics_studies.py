"""Small studies of the dynamics: sensing, trees, optimizers, losses, starts, the flow itself, a classifier.

``python benchmarks/dynamics_studies.py``; trains what is not in ``runs/studies`` yet, then writes
benchmarks/results/dynamics-studies.json and the pictures of docs/dynamics.md. Settings were chosen on seeds
0 to 2; seeds 11, 12 and 13 are reported.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from steps import machine_name

import tnreg
from tnreg.cnns.classifier import ConvAC, Representation
from tnreg.cnns.convnet import ConvNet
from tnreg.experiments import dynamics
from tnreg.experiments.folder import Run, read_run
from tnreg.images.sources import load_digits

HERE, SEEDS = Path(__file__).parent, (11, 12, 13)
RUNS, DOCS = HERE.parent / "runs" / "studies", HERE.parent / "docs"

HTF = {"rank": 24, "target_sizes": (6,) * 4, "target_rank": 3, "samples": 648, "steps": 15_000}
# study: {what is compared: (preset, other settings)}
STUDIES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "optimizers": {
        "group RMSprop": ("cp-small", {}),
        "Adam, 0.01": ("cp-small", {"optimizer": "adam", "lr": 0.01}),
        "Adam, 0.001": ("cp-small", {"optimizer": "adam", "lr": 0.001}),
        "SGD": ("cp-small", {"optimizer": "sgd", "lr": 1.0}),
        "momentum 0.9": ("cp-small", {"optimizer": "momentum", "lr": 0.1}),
        "L-BFGS, 300 updates": ("cp-small", {"optimizer": "lbfgs", "lr": 1.0, "steps": 300}),
        "L-BFGS, 3,000 updates": ("cp-small", {"optimizer": "lbfgs", "lr": 1.0, "steps": 3000}),
    },
    "trees": {"ternary, order 6": ("ternary", {}), "mixed arity, order 5": ("mixed", {})},
    "losses": {"Huber": ("cp-small", {"loss": "huber"}), "magnitudes": ("cp-small", {"loss": "l1"})},
    "starts": {
        f"std {std:g}, factor {factor:g}": ("unbalanced", {"std": std, "unbalance": factor})
        for std in (0.03, 0.1)
        for factor in (1.0, 10.0)
    },
    "sensing": {
        "MF, rank-one": ("mf", {"task": "sensing"}),
        "MF, dense": ("mf", {"task": "dense-sensing"}),
        "CP, rank-one": ("cp", {"task": "sensing"}),
        "small CP, dense": ("cp-small", {"task": "dense-sensing"}),
        "small HTF, completion": ("htf-small", HTF),
        "small HTF, rank-one": ("htf-small", {"task": "sensing", **HTF}),
    },
}
FLOW = {"dtype": "float64", "rates": False, "stop_checks": 10**6}
STEP_SIZES = (0.25, 0.5, 1.0, 2.0)


def trained(study: str, name: str, preset: str, changes: dict[str, Any]) -> Iterator[Run]:
    """Return the runs of all seeds."""
    for seed in SEEDS:
        folder = RUNS / study / f"{name}, seed {seed}".replace(" ", "-")
        if not folder.exists():
            began = time.process_time()
            config = dataclasses.replace(dynamics.MODELS[preset], seed=seed, **changes)
            dynamics.run(config, folder, pictures=False)
            print(f"{study}: {name}, seed {seed}: {time.process_time() - began:.0f} s", flush=True)
        yield read_run(folder)


def row(study: str, name: str, run: Run) -> dict[str, Any]:
    """Return what the tables need of a run."""
    summary, found = run.summary, run.trajectory
    keys = ("steps", "stopped by", "loss", "train error", "test error", "ranks", "target ranks")
    root = list(summary["components"])[-1]
    one = {"study": study, "name": name, "seed": run.config["seed"], **{key: summary[key] for key in keys}}
    one |= {
        "off-tree ranks": summary.get("off-tree ranks", {}),
        "components": summary["components"][root],
        "effective rank": max(summary["effective rank"].values()),
        "rate error": summary.get("rate error", {}).get(root),
        "first left": int(found.steps[np.argmax(found["loss"] < 0.9 * found["loss"][0])]),
    }
    if study == "starts":
        one |= bounds(run)
    return one


def bounds(run: Run) -> dict[str, float]:
    """Return the share of measured rates within bounds, and how wide these are, while components rise."""
    tracks = dynamics.tracks(run.trajectory)
    norms, last = tracks.norms[1:-1], tracks.norms[-1]
    rising = (norms > 0.1 * last) & (norms < 0.9 * last) & (last > 0.1 * last.max()) & (tracks.predicted > 0)
    low, high = (tracks.bounds[..., k][rising] for k in (0, 1))
    measured = tracks.measured[rising]
    slack = 0.02 * tracks.predicted[rising]  # of steps that are not infinitely small
    inside = (measured > low - slack) & (measured < high + slack)
    return {"within bounds": float(inside.mean()), "upper over lower": float(np.median(high / low))}


def flows() -> Iterator[dict[str, Any]]:
    """Hold gradient descent at several step sizes against the flow, at the same times."""
    for seed in SEEDS:
        found = {}
        for size in STEP_SIZES:
            changes = {"optimizer": "sgd", "lr": size, "steps": round(2000 / size), "every": round(20 / size)}
            found[size] = one_of(f"SGD {size:g}", seed, changes)
        flow = one_of("flow", seed, {"optimizer": "flow", "lr": 1.0, "steps": 2000, "every": 20})
        norms = np.sort(at_root(flow), 1)[:, -3:]
        for size, run in found.items():
            apart = np.abs(np.sort(at_root(run), 1)[:, -3:] - norms).max() / norms.max()
            yield {"seed": seed, "step size": size, "apart": float(apart)}
        yield {"seed": seed, "gradients of the flow": int(flow.trajectory.steps[-1])}


def one_of(name: str, seed: int, changes: dict[str, Any]) -> Run:
    """Return a run of the small CP for the comparison with the flow."""
    folder = RUNS / "flow" / f"{name}-seed-{seed}".replace(" ", "-")
    if not folder.exists():
        config = dataclasses.replace(dynamics.cp_small, seed=seed, **{**FLOW, **changes})
        dynamics.run(config, folder, pictures=False)
    return read_run(folder)


def at_root(run: Run) -> Any:
    """Return the recorded components at the root."""
    return list(run.trajectory["components"].values())[-1]


def classifier(seed: int) -> tnreg.Trajectory:
    """Train a ConvAC on 2x2 patches of digits from small weights, and watch its components."""
    file = RUNS / f"digits-seed-{seed}.npz"
    if file.exists():
        return tnreg.Trajectory.load(file)
    pixels, classes = load_digits()
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels, seeded = torch.tensor(classes), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=seeded)
    test, train = order[:599], order[599:]
    features = Representation(8, patch=(2, 2), trained=False, generator=seeded)
    net = ConvNet(tnreg.ModeTree.grid((4, 4)), 8, 16, outputs=10, std=0.15, generator=seeded)
    model = ConvAC(features, net, scores="plain")

    def right(part: torch.Tensor) -> Any:
        return lambda model: (model(images[part]).argmax(1) == labels[part]).double().mean()

    def components(model: ConvAC) -> dict[Any, torch.Tensor]:
        return model.as_factorization().local_components()

    run = tnreg.fit(
        model,
        lambda model: torch.nn.functional.cross_entropy(model(images[train]), labels[train]),
        steps=4000,
        lr=0.03,
        observe={"components": components, "train": right(train), "test": right(test)},
        progress=False,
    )
    run.save(file)
    return run


def staircase(ax: Any, run: Run, title: str, node: Any = None) -> None:
    """Draw the components of a run."""
    tracks = dynamics.tracks(run.trajectory, node)
    ax.plot(tracks.steps, tracks.norms, lw=1.2)
    ax.set(title=title, xlabel="step")


def studies_figure(runs: dict[str, dict[str, list[Run]]]) -> Any:
    """Draw what the studies found, a panel each."""
    figure: Any = Figure(figsize=(11.5, 8.2), layout="constrained")
    axes = figure.subplots(3, 4)
    for ax, name in zip(
        axes[0], ("MF, rank-one", "CP, rank-one", "small CP, dense", "small HTF, rank-one"), strict=True
    ):
        staircase(ax, runs["sensing"][name][0], f"sensing: {name}")
    axes[0, 0].set_ylabel("singular value, component")
    staircase(axes[1, 0], runs["trees"]["ternary, order 6"][0], "{0,1,2}{3,4,5}, at the root")
    staircase(axes[1, 1], runs["trees"]["mixed arity, order 5"][0], "{0,1,2}{3,4}, at the root")
    for ax, name in zip(axes[1, 2:], ("Huber", "magnitudes"), strict=True):
        staircase(ax, runs["losses"][name][0], f"loss: {name}")
    for ax, name in zip(axes[2], ("Adam, 0.01", "L-BFGS, 3,000 updates"), strict=False):
        staircase(ax, runs["optimizers"][name][0], name)
    run = classifier(SEEDS[0])
    *_, quarter, root = run["components"].values()
    for ax, values, where in zip(axes[2, 2:], (quarter, root), ("lower right quarter", "root"), strict=True):
        ax.plot(run.steps, values, lw=1.2)
        ax.set(title=f"ConvAC on digits, {where}", xlabel="step")
    return figure


def bounds_figure(runs: dict[str, list[Run]], apart: list[dict[str, Any]]) -> Any:
    """Draw bounds on the rate of the largest component from three starts; then descent against the flow."""
    figure: Any = Figure(figsize=(13, 3.3), layout="constrained")
    *starts, last = figure.subplots(1, 4)
    for ax, name in zip(
        starts, ("std 0.03, factor 1", "std 0.03, factor 10", "std 0.1, factor 10"), strict=True
    ):
        tracks = dynamics.tracks(runs[name][0].trajectory)
        steps, k = tracks.steps[1:-1], int(np.argmax(tracks.norms[-1]))
        norms = tracks.norms[1:-1, k]
        shown = norms < 0.9 * norms[-1]
        shown[np.argmin(shown) :] = False  # up to where it has risen
        ax.fill_between(steps[shown], *tracks.bounds[shown, k].T, color="C0", alpha=0.2, lw=0, label="bounds")
        ax.plot(steps[shown], tracks.measured[shown, k], "C0", lw=3, alpha=0.5, label="measured")
        ax.plot(steps[shown], tracks.predicted[shown, k], "k--", lw=1, label="predicted")
        ax.set(title=name, xlabel="step", yscale="log")
    starts[0].set_ylabel("dσ/dt of the largest component")
    starts[0].legend(fontsize=8)
    for seed in SEEDS:
        rows = [r for r in apart if r["seed"] == seed and "apart" in r]
        last.loglog([r["step size"] for r in rows], [r["apart"] for r in rows], "o-", label=f"seed {seed}")
    last.set_xticks(STEP_SIZES, [f"{size:g}" for size in STEP_SIZES])
    last.minorticks_off()
    last.set(title="gradient descent less flow", xlabel="step size", ylabel="share of the largest component")
    last.legend(fontsize=8)
    return figure


def main() -> None:
    """Train, write the results, draw."""
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    runs = {
        study: {name: list(trained(study, name, *one)) for name, one in arms.items()}
        for study, arms in STUDIES.items()
    }
    rows = [row(s, name, run) for s, arms in runs.items() for name, found in arms.items() for run in found]
    apart, digits = list(flows()), []
    for seed in SEEDS:
        run = classifier(seed)
        right = {name: float(run[name][-1]) for name in ("train", "test")}
        nodes = run["components"].items()
        grown = {str(node): np.sort(values[-1] / values[0])[::-1].tolist() for node, values in nodes}
        digits.append({"seed": seed, **right, "growth of the components": grown})
    results = {"machine": machine_name(torch.device("cpu"), 1), "rows": rows, "flow": apart, "digits": digits}
    (HERE / "results" / "dynamics-studies.json").write_text(json.dumps(results, indent=1) + "\n")
    tnreg.plots.save_figure(studies_figure(runs), DOCS / "dynamics-studies.png")
    tnreg.plots.save_figure(bounds_figure(runs["starts"], apart), DOCS / "rate-bounds.png")


if __name__ == "__main__":
    main()
