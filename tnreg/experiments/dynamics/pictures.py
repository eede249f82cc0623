"""Pictures of dynamics runs: components, singular values on and off the tree, rates of growth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnreg.errors import OptionError
from tnreg.experiments.dynamics.tracked import tracks
from tnreg.experiments.folder import Run, read_run
from tnreg.plots import node_text
from tnreg.training.trajectory import Trajectory
from tnreg.trees.reading import Node

Array = np.ndarray[Any, Any]

_TITLES = {
    "mf": "matrix factorization",
    "cp": "CP factorization",
    "htf": "hierarchical tensor factorization",
}


def panels(folders: Sequence[str | Path]) -> Any:
    """One panel per run, with its components along the training: the figure of the paper."""
    from matplotlib.figure import Figure

    if not folders:
        raise OptionError("panels: give at least one run folder.")
    runs = [read_run(folder) for folder in folders]
    for one in runs:
        if one.experiment != "dynamics":
            raise OptionError(f"{one.folder} is a run of {one.experiment!r}, not of 'dynamics'.")
    drawn = Figure(figsize=(4.4 * len(runs), 3.5), layout="constrained")
    for one, ax in zip(runs, drawn.subplots(1, len(runs), squeeze=False)[0], strict=True):
        _draw_components(one.found, ax)
        ax.set_title(_TITLES.get(one.config["model"], one.config["model"]))
    return drawn


def _draw_components(found: Trajectory, ax: Any, node: Node | None = None) -> None:
    followed = tracks(found, node)
    ax.plot(followed.steps, followed.norms, lw=1.4)
    ax.set_xlabel("step")
    ax.locator_params(axis="x", nbins=5)
    order = sum(isinstance(mode, int) for mode in found["spectra"])
    ax.set_ylabel("singular value" if order == 2 else "norm of the component")


def training_figure(one: Run) -> Any:
    """Components, errors, effective ranks, unbalancedness and step size of one run."""
    from matplotlib.figure import Figure

    found = one.found
    drawn = Figure(figsize=(10, 6.4), layout="constrained")
    (first, second), (third, fourth) = drawn.subplots(2, 2)
    if "components" in found:
        _draw_components(found, first)
        first.set_title("components at the root")
    else:
        first.plot(found.steps, list(found["spectra"].values())[-1], lw=1.2)
        first.set_xlabel("step")
        first.set_title("singular values below the root")
    for name in ("train error", "test error"):
        if name in found:
            second.semilogy(found.steps, found[name], label=name)
    second.set_title("‖W − W*‖ / ‖W*‖")
    second.legend()
    for node, values in found["effective rank"].items():
        third.plot(found.steps, values, label=node_text(node), lw=1.2)
    third.set_title("effective rank by node")
    if len(found["effective rank"]) <= 12:
        third.legend(fontsize=7)
    for name in ("unbalancedness", "step size"):
        if name in found and (found[name] > 0).any():
            fourth.semilogy(found.steps, found[name], label=name)
    fourth.legend()
    fourth.set_title("unbalancedness and step size")
    for ax in (second, third, fourth):
        ax.set_xlabel("step")
    return drawn


def spectra_figure(one: Run) -> Any:
    """Local components in the upper row; below, singular values on the tree and off it."""
    from matplotlib.figure import Figure

    found, top = one.found, one.config["top"]
    lower: dict[str, Array] = {}
    for node in sorted(found["spectra"], key=lambda v: -len(v) if isinstance(v, tuple) else 0):
        values = found["spectra"][node]
        # the two children of a binary root share their singular values
        shown = [s[-1] for s in lower.values() if s.shape == values.shape]
        if len(lower) < 3 and not any(np.allclose(values[-1], s, rtol=1e-3) for s in shown):
            lower[f"on the tree: {node_text(node)}"] = values
    off = found["off-tree"] if "off-tree" in found else {}
    lower |= {f"off the tree: {{{modes}}}": s for modes, s in off.items()}
    nodes = list(found["components"])[::-1][: len(lower)] if "components" in found else []
    rows = 2 if nodes else 1
    drawn = Figure(figsize=(3.6 * len(lower), 3.1 * rows), layout="constrained")
    axes = drawn.subplots(rows, len(lower), squeeze=False)
    for ax, node in zip(axes[0], nodes, strict=False):
        _draw_components(found, ax, node)
        ax.set_title(f"components at {node_text(node)}", fontsize=9)
    for ax in axes[0][len(nodes) :] if nodes else ():
        ax.set_axis_off()
    for ax, (title, values) in zip(axes[-1], lower.items(), strict=True):
        ax.plot(found.steps, values[:, :top], lw=1.2)
        ax.set_xlabel("step")
        ax.set_ylabel("singular value")
        ax.set_title(title, fontsize=9)
    return drawn


def rates_figure(one: Run) -> Any:
    """Predicted and measured growth: along the training at the root, and against each other."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    root = tracks(one.found)
    alive = np.flatnonzero(root.norms[-1] > 0.01 * root.norms[-1].max())
    for k in alive:
        [line] = left.plot(root.steps[1:-1], root.measured[:, k], lw=2, alpha=0.4)
        left.plot(root.steps[1:-1], root.predicted[:, k], lw=1, ls="--", color=line.get_color())
    left.set_xlabel("step")
    left.set_ylabel("dσ/dt")
    left.set_yscale("symlog", linthresh=_threshold(root.measured[:, alive]))
    left.set_title("at the root: measured (wide), predicted (dashed)")
    for node in one.found["components"]:
        followed = tracks(one.found, node)
        both = (followed.measured > 0) & (followed.predicted > 0)
        label = node_text(node)
        right.loglog(followed.predicted[both], followed.measured[both], ".", ms=2, label=label)
    high = 3 * max(right.get_xlim()[1], right.get_ylim()[1])
    right.plot([high * 1e-9, high], [high * 1e-9, high], color="0.5", lw=0.8)
    right.set_xlim(high * 1e-9, high)  # far below, rounding is all there is to see
    right.set_ylim(high * 1e-9, high)
    right.set_xlabel("predicted dσ/dt")
    right.set_ylabel("measured dσ/dt")
    right.set_title("all nodes")
    if right.get_legend_handles_labels()[0]:
        right.legend(markerscale=5, fontsize=7)
    return drawn


def _threshold(values: Array) -> float:
    largest = float(np.nanmax(np.abs(values), initial=0.0))
    return largest * 1e-3 if largest > 0 else 1.0
