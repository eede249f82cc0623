"""Pictures of dynamics runs: components, singular values on and off the tree, rates of growth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnreg import plots
from tnreg.errors import OptionError
from tnreg.experiments.dynamics.tracked import tracks
from tnreg.experiments.folder import Run, read_run
from tnreg.plots import node_text
from tnreg.training.trajectory import Trajectory
from tnreg.trees.drawing import plain_label
from tnreg.trees.reading import Node

Array = np.ndarray[Any, Any]

_TITLES = {"mf": "matrix", "cp": "CP", "htf": "hierarchical tensor"}


def panels(folders: Sequence[str | Path]) -> Any:
    """Draw one panel per run, its components along the training: the figure of the paper."""
    if not folders:
        raise OptionError("panels: give at least one run folder.", argument="folders")
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        if run.experiment != "dynamics":
            message = f"{run.folder} is a run of {run.experiment!r}, not of 'dynamics'."
            raise OptionError(message, argument="folders")
    figure, axes = _new_figure(4.4 * len(runs), 3.5, 1, len(runs))
    for run, ax in zip(runs, axes[0], strict=True):
        kind = _TITLES.get(model := run.config["model"])
        _draw_components(run.trajectory, ax, f"{kind} factorization" if kind else model)
    return figure


def training_figure(run: Run) -> Any:
    """Draw components, errors, effective ranks, unbalancedness and step size of one run."""
    trajectory = run.trajectory
    figure, ((first, second), (third, fourth)) = _new_figure(10, 6.4, 2, 2)
    if "components" in trajectory:
        _draw_components(trajectory, first, "components at the root")
    else:
        last = list(trajectory["spectra"].values())[-1]
        _draw(trajectory, first, last, "singular values below the root")
    for ax, title, names in (
        (second, "‖W − W*‖ / ‖W*‖", ("train error", "test error")),
        (third, "effective rank by node", ("effective rank",)),
        (fourth, "unbalancedness and step size", ("unbalancedness", "step size")),
    ):
        recorded = [name for name in names if name in trajectory]
        plots.trajectory(trajectory, ax, names=recorded, log=ax is not third)
        ax.set_title(title)
    return figure


def spectra_figure(run: Run) -> Any:
    """Draw local components in the upper row; below, singular values on the tree and off it."""
    trajectory = run.trajectory
    spectra: dict[str, Array] = {}
    by_size = sorted(trajectory["spectra"], key=lambda v: -len(v) if isinstance(v, tuple) else 0)
    for node in by_size:
        values = trajectory["spectra"][node]
        # the two children of a binary root share their singular values
        same = [s[-1] for s in spectra.values() if s.shape == values.shape]
        if len(spectra) < 3 and not any(np.allclose(values[-1], s, rtol=1e-3) for s in same):
            spectra[f"on the tree: {node_text(node)}"] = values
    if "off-tree" in trajectory:
        off = trajectory["off-tree"].items()
        spectra |= {f"off the tree: {{{modes}}}": values for modes, values in off}
    nodes = list(trajectory["components"])[::-1] if "components" in trajectory else []
    rows = 2 if nodes else 1
    figure, axes = _new_figure(3.6 * len(spectra), 3.1 * rows, rows, len(spectra))
    for ax, (title, values) in zip(axes[-1], spectra.items(), strict=True):
        _draw(trajectory, ax, values[:, : run.config["top"]], title, fontsize=9)
        ax.set_ylabel("singular value")
    for node, ax in zip(nodes, axes[0], strict=False):
        _draw_components(trajectory, ax, f"components at {node_text(node)}", node, fontsize=9)
    for ax in axes[:-1, len(nodes) :].flat:
        ax.set_axis_off()
    return figure


def rates_figure(run: Run) -> Any:
    """Draw predicted and measured growth: along the training at the root and against each other."""
    figure, [(left, right)] = _new_figure(10, 4, 1, 2)
    root = tracks(run.trajectory)
    alive = np.flatnonzero(root.norms[-1] > 0.01 * root.norms[-1].max())
    plots.rates(root.measured[:, alive], left, predicted=root.predicted[:, alive], steps=root.steps[1:-1])
    title, bounded = "at the root: measured (wide), predicted (dashed)", np.isfinite(root.bounds).any()
    left.set_title(f"{title}, bounds" if bounded else title, fontsize=10)
    if bounded:
        for k, component in enumerate(alive):
            left.fill_between(root.steps[1:-1], *root.bounds[:, component].T, color=f"C{k}", alpha=0.15, lw=0)
    for node in run.trajectory["components"]:
        local = tracks(run.trajectory, node)
        both = (local.measured > 0) & (local.predicted > 0)
        points = (local.predicted[both], local.measured[both])
        right.loglog(*points, ".", ms=2, label=plain_label(node_text(node)))
    high = 3 * max(right.get_xlim()[1], right.get_ylim()[1])
    low = high * 1e-9  # far below, rounding is all there is to see
    right.plot([low, high], [low, high], color="0.5", lw=0.8)
    right.set(xlim=(low, high), ylim=(low, high), title="all nodes")
    right.set(xlabel="predicted dσ/dt", ylabel="measured dσ/dt")
    if right.get_legend_handles_labels()[0]:
        right.legend(markerscale=5, fontsize=7)
    return figure


def _new_figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    """Return a figure and its axes, ``(rows, columns)``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw_components(
    trajectory: Trajectory, ax: Any, title: str, node: Node | None = None, **options: Any
) -> None:
    _draw(trajectory, ax, tracks(trajectory, node).norms, title, **options)
    ax.locator_params(axis="x", nbins=5)
    order = sum(isinstance(mode, int) for mode in trajectory["spectra"])
    ax.set_ylabel("singular value" if order == 2 else "norm of the component")


def _draw(trajectory: Trajectory, ax: Any, values: Array, title: str, **options: Any) -> None:
    ax.plot(trajectory.steps, values, lw=1.3)
    ax.set_xlabel("step")
    ax.set_title(plain_label(title), **options)
