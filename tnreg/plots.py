"""Pictures. Every function draws on the axes given, or on new ones, and returns them.

matplotlib is imported when something is drawn, not before.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tnreg.errors import OptionError, ShapeError
from tnreg.machine.files import write_whole
from tnreg.training.trajectory import Trajectory, as_array
from tnreg.trees.drawing import draw_tree, node_spots, node_text, picture_format, plain_label
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from tnreg.cnns.convnet import ConvNet
    from tnreg.factorizations.factorization import Factorization
    from tnreg.far.interaction_map import InteractionMap
    from tnreg.far.probe import LocalityProfile

__all__ = [
    "bars",
    "component",
    "components",
    "data_entanglement",
    "decomposition",
    "interaction_map",
    "locality_profile",
    "network",
    "node_text",
    "rates",
    "save_figure",
    "spectra",
    "trajectory",
    "tree",
]


def tree(
    data: ModeTree,
    ax: Axes | None = None,
    *,
    labels: Mapping[Node, str] | None = None,
    edges: Mapping[Node, Any] | None = None,
) -> Axes:
    """Draw the tree with its root on top; leaves along the bottom in the order of the tree.

    ``labels`` are texts by node in place of its name, e.g. mode names at leaves; ``edges`` are texts by
    non-root node on the edge above it, e.g. hierarchical ranks.
    """
    return draw_tree(data, _axes(ax), labels=labels, edges=edges)


def spectra(data: Mapping[Node, Any], ax: Axes | None = None, *, floor: float = 1e-8) -> Axes:
    """Draw what ``tnreg.spectra`` returns: singular values relative to the largest of their node.

    The axis is logarithmic; values below ``floor`` times the largest are left out. Where several lie on one
    another, those below are wide.
    """
    ax = _axes(ax, "index of the singular value", "relative to the largest")
    shown = []
    for values in data.values():
        s = as_array(values)
        s = s / s[0] if len(s) and s[0] > 0 else s
        shown.append(s[s > floor])
    for k, (node, s) in enumerate(zip(data, shown, strict=True)):
        marker = "o" if len(s) <= 40 else None
        pairs = ((s[:n], t[:n]) for t in shown[k + 1 :] if (n := min(len(s), len(t))))
        over = sum(float(np.isclose(one, two, rtol=0.05).mean()) > 0.5 for one, two in pairs)
        wide = {"lw": 1 + 3 * over, "ms": 3 + 4 * over, "alpha": 0.5 if over else 1}
        label = plain_label(node_text(node))
        ax.semilogy(np.arange(1, len(s) + 1), s, marker=marker, label=label, **wide)
    if len(data) <= 12:
        ax.legend(title="modes below", fontsize=7)
    return ax


def decomposition(
    data: Mapping[Node, Any],
    model: Factorization,
    axes: Sequence[Axes] | None = None,
    *,
    labels: Mapping[Node, str] | None = None,
) -> list[Axes]:
    """Draw a tensor's singular values, and its tree with ranks and the error budget on the edges.

    On every edge is the rank, and the share of the tensor's norm that is beyond it. The squares of these
    shares, one for both children of a binary root, bound that of the relative error.

    Args:
        data: What ``tnreg.spectra`` returns for the tensor that was decomposed.
        model: What ``decompose`` or ``truncate`` made of it.
        axes: Two axes to draw on.
        labels: ``{node: text}`` in place of the node's name, e.g. mode names at leaves.
    """
    left, right = _new_axes(2, (12, 4.5)) if axes is None else axes
    spectra(data, left)
    edges: dict[Node, str] = {}
    for node, rank in model.network.named_bonds.items():
        s = as_array(data[node]).astype(float)
        largest, share = s.max(initial=0.0), 0.0
        if largest > 0:
            share = float(np.linalg.norm(s[rank:] / largest) / np.linalg.norm(s / largest))
            left.plot(rank, min(max(s[min(rank, len(s)) - 1] / largest, 1e-8), 1), "kx", ms=6)
        edges[node] = f"{rank}, cut {share:.1e}"
    left.set_title("singular values, the last one kept crossed")
    tree(model.tree, right, labels=labels, edges=edges)
    right.set_title("ranks, and the share of the norm that was cut")
    return [left, right]


def trajectory(
    data: Trajectory, ax: Axes | None = None, *, names: Sequence[str] = ("loss",), log: bool = True
) -> Axes:
    """Draw what was recorded under these names against the number of updates.

    It may be numbers, vectors, or dicts of them; each component is a line. ``log``: the vertical axis
    is logarithmic.
    """
    ax = _axes(ax, "step")
    for name in names:
        recorded = data[name]
        parts = recorded if isinstance(recorded, dict) else {"": recorded}
        for key, values in parts.items():
            for line in ax.plot(data.steps, values.reshape(len(values), -1), lw=1.2)[:1]:
                line.set_label(plain_label(f"{name} {node_text(key)}" if parts is recorded else name))
    if log and any((as_array(line.get_ydata()) > 0).any() for line in ax.lines):
        ax.set_yscale("log")
    if len(ax.get_legend_handles_labels()[0]) <= 12:
        ax.legend(fontsize=7)
    else:
        ax.set_ylabel(plain_label(", ".join(names)))
    return ax


def components(
    data: Trajectory,
    ax: Axes | None = None,
    *,
    name: str = "components",
    node: Node | None = None,
    top: int = 10,
) -> Axes:
    """Draw the largest local components of one node along training: the theory's incremental learning.

    The trajectory observed ``lambda m: m.local_components()`` under ``name``; the node is the root if left
    out; the ``top`` components are chosen by their size at the end.
    """
    recorded = data[name]
    if not isinstance(recorded, dict):
        message = f"plots.components: {name!r} is no dict of nodes; observe model.local_components()."
        raise OptionError(message, argument="name")
    node = list(recorded)[-1] if node is None else node
    if node not in recorded:
        message = f"plots.components: no node {node!r}; there is {', '.join(map(str, recorded))}."
        raise OptionError(message, argument="node")
    ax = _axes(ax, "step", plain_label(f"local components at {node_text(node)}"))
    values = recorded[node]
    ax.plot(data.steps, values[:, np.argsort(-values[-1])[:top]], lw=1.2)
    return ax


def network(data: ConvNet, ax: Axes | None = None) -> Axes:
    """Draw the layers of a ``ConvNet`` or ``ConvAC`` from left to right, as piles of channels.

    Heights are numbers of nodes, widths numbers of channels, both on logarithmic scales.
    """
    data = _net(data, "network")
    ax = _axes(ax)
    net, tree = data.network, data.tree
    # operation before it, its label, channels of every node
    piles: list[tuple[str, str, Sequence[int]]] = [("", "input", net.sizes)]
    for layer in range(data.depth):
        places = [tree.position(node) for node in data.nodes_of(layer)]
        if net.bare.issuperset(places):  # inputs that are pooled as they are
            continue
        if layer:
            window = max(len(tree.links[p]) for p in places)
            pooled = [math.prod(map(net.index_size, net.inner(p))) for p in places]
            piles.append((f"product\npooling {window}", "", pooled))
        last = layer == data.depth - 1
        channels: Sequence[int] = [data.outputs or 1] if last else [net.bonds[p] for p in places]
        piles.append(("linear" if last else "1x1\nconv", f"layer {layer}", channels))
    x = 0.0
    for operation, label, channels in piles:
        if operation:
            arrow = {"arrowstyle": "->", "color": "0.4"}
            ax.annotate("", (x + 0.9, 0), (x + 0.15, 0), arrowprops=arrow)
            _write(ax, operation, x + 0.52, 0.08, "bottom", 7, color="0.3")
            x += 1
        height, width = _height(len(channels)), 0.12 + math.log2(max(channels) + 1) / 14
        color = "C1" if label == "input" else "C0"
        ax.bar(x, height, width, -height / 2, align="edge", fc=color, ec="white", alpha=0.75)
        span = "–".join(map(str, sorted({min(channels), max(channels)})))
        _write(ax, f"{len(channels)} × {span}", x + width / 2, -height / 2 - 0.08, "top", 7)
        _write(ax, label, x + width / 2, height / 2 + 0.06, "bottom")
        x += width
    tallest = _height(tree.order)
    ax.set_xlim(-0.2, x + 0.2)
    ax.set_ylim(-tallest / 2 - 0.5, tallest / 2 + 0.5)
    ax.set_axis_off()
    return ax


def component(data: ConvNet, node: Node, r: int = 0, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Draw where a local component is: in the tree, and in the filters of the network.

    On the left the node and its children; on the right magnitudes of their 1x1 convolutions (rows: channels
    in, columns: channels out). What belongs to component r of the node, which has a diagonal join, is
    framed: filter r of every child, and what the node's own convolution reads from pooled channel r.
    """
    left, right = _new_axes(2, (11, 4)) if axes is None else axes
    data = _net(data, "component")
    net, whole = data.network, data.tree
    position = whole.position(node)
    bond = net.bonds[whole.links[position][0]] if net.joins[position] == "diagonal" else 0
    if not 0 <= r < bond:
        message = f"plots.component: node {node!r} has {bond} local components, found number {r!r}."
        raise OptionError(message, argument="r")
    children, spots = whole.children(node), dict(zip(whole.nodes, node_spots(whole), strict=True))
    tree(whole, left, labels=dict.fromkeys(whole.leaves, "") if whole.order > 32 else None)
    for v in (node, *children):
        left.scatter(*spots[v], s=160, facecolors="none", edgecolors="C3", lw=1.8, zorder=3)
    left.set_title(plain_label(f"local component ({node_text(node)}, {r})"), fontsize=10)
    weights = {v: as_array(w.abs().float()) for v, w in data.weights.items()}
    x, tallest = 0, 0
    for v in [v for v in (*children, node) if v in weights]:
        own, w = v == node, weights[v]
        matrix = w.reshape(len(w), -1) if own else w.reshape(-1, w.shape[-1])
        rows, columns = matrix.shape
        extent = (x, x + columns, -rows, 0)
        right.imshow(matrix, extent=extent, cmap="Greys", aspect="equal", vmin=0)
        # left edge, height, width and foot of what is framed
        frame = (x, 1, columns, -r - 1) if own else (x + r, rows, 1, -rows)
        right.bar(*frame, align="edge", fc="none", ec="C3", lw=1.8)
        text = f"{node_text(v)}, layer {data.layer_of(v)}\n{'reads' if own else 'filter'} {r}"
        _write(right, text, x + columns / 2, 0.3, "bottom", 7)
        sign = "×" if v in children[:-1] else "→" if not own and node in weights else ""
        _write(right, sign, x + columns + 1, -rows / 2, "center", 12)
        x, tallest = x + columns + 2, max(tallest, rows)
    right.set_xlim(-0.5, x - 1)
    right.set_ylim(-tallest - 0.5, 3.5)
    right.set_axis_off()
    return [left, right]


def rates(data: Any, ax: Axes | None = None, *, predicted: Any = None, steps: Any = None) -> Axes:
    """Draw rates of growth, one colour a component: measured ones wide, predicted ones dashed over them.

    The vertical axis is logarithmic on both sides of zero, and linear below a thousandth of the largest.

    Args:
        data: Signed rates, ``(rows, components)``, e.g. of ``dynamics.measured_rate`` at one node.
        ax: Axes to draw on.
        predicted: What theory says, of the same shape, e.g. of ``dynamics.predicted_rate``.
        steps: Updates done at every row; their numbers if left out.

    Raises:
        ShapeError: Rates without rows and components, or shapes that differ.
    """
    measured = as_array(data).astype(float)
    theory = measured if predicted is None else as_array(predicted).astype(float)
    steps = np.arange(measured.shape[0] if measured.ndim else 0) if steps is None else as_array(steps)
    if measured.ndim != 2 or theory.shape != measured.shape or steps.shape != measured.shape[:1]:
        found = f"{measured.shape}, {theory.shape} predicted, steps {steps.shape}"
        raise ShapeError(f"plots.rates: rates are (rows, components), found {found}.", argument="data")
    ax = _axes(ax, "step", "dσ/dt")
    for k, (values, line) in enumerate(zip(measured.T, theory.T, strict=True)):
        ax.plot(steps, values, color=f"C{k}", lw=2, alpha=0.4 if predicted is not None else 1)
        if predicted is not None:
            ax.plot(steps, line, color=f"C{k}", lw=1, ls="--")
    sizes = np.abs(np.concatenate([measured, theory]))
    largest = float(sizes[np.isfinite(sizes)].max(initial=0.0)) or 1.0
    ax.set_yscale("symlog", linthresh=10.0 ** (math.floor(math.log10(largest)) - 2))
    ax.set_ylim(-2 * largest, 2 * largest)
    return ax


def bars(
    data: Mapping[str, float],
    ax: Axes | None = None,
    *,
    unit: str = "relative error",
    errors: Sequence[float] | None = None,
) -> Axes:
    """Draw named numbers side by side, each with its value, beyond its error bar if there are ``errors``."""
    ax = _axes(ax, unit)
    rows = ax.barh(
        [plain_label(name) for name in data], list(data.values()), xerr=errors,
        color=[f"C{k}" for k in range(len(data))],
    )  # fmt: skip
    ax.bar_label(rows, fmt="%.3f", padding=3, fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    return ax


def locality_profile(data: LocalityProfile | Mapping[str, LocalityProfile], ax: Axes | None = None) -> Axes:
    """Draw what ``tnreg.locality_profile`` returns, or several by name, with standard errors."""
    ax = _axes(ax, "distance between the patches, pixels", "share of variance by interaction")
    profiles = data if isinstance(data, Mapping) else {"": data}
    for name, profile in profiles.items():
        mean = profile.interaction.mean(axis=1)
        ax.errorbar(profile.distances, mean, profile.standard_error, marker="o", ms=3, lw=1.2,
                    capsize=2, label=plain_label(name) if name else None)  # fmt: skip
    ax.set_ylim(bottom=0)
    if any(profiles):
        ax.legend(fontsize=8)
    return ax


def interaction_map(data: InteractionMap, ax: Axes | None = None, *, top: int = 20) -> Axes:
    """Draw what ``tnreg.interaction_map`` returns: the image's regions, and lines between those tied most.

    The colour of a region is its mean interaction with the others; the ``top`` strongest ties are arcs, the
    wider the stronger.
    """
    ax, boxes, shares = _axes(ax, "pixels", "pixels"), as_array(data.boxes), as_array(data.interaction)
    rows, columns = data.grid
    across, down = (
        [0, *boxes[some, end]] for some, end in ((slice(columns), 3), (slice(None, None, columns), 2))
    )
    mean = (shares.sum(axis=1) / (len(boxes) - 1)).reshape(rows, columns)
    drawn = ax.pcolormesh(across, down, mean, cmap="Blues", vmin=0, edgecolors="0.85", lw=1)
    ax.figure.colorbar(drawn, ax=ax, label="mean interaction with the others", location="bottom", shrink=0.7)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    for pair in data.ties[:top]:
        (y, x), (other_y, other_x) = middle[list(pair)]
        strength = shares[pair] / shares[data.ties[0]]
        line = {"arrowstyle": "-", "connectionstyle": "arc3,rad=0.15", "color": "C1",
                "lw": 0.5 + 3 * strength, "alpha": 0.75}  # fmt: skip
        ax.annotate("", (x, y), (other_x, other_y), arrowprops=line)
    ax.set_aspect("equal")
    ax.invert_yaxis()
    return ax


def data_entanglement(
    data: Mapping[Any, Any],
    tree: ModeTree,
    ax: Axes | None = None,
    *,
    unit: str = "entanglement entropy, nats",
) -> Axes:
    """Draw the average cut of every size: what ``tnreg.data_entanglement`` returns, or several by name.

    The size of a cut is the number of features below its node in the tree, on a logarithmic axis.
    """
    ax = _axes(ax, "features below the node", f"{unit}, average cut")
    several = all(isinstance(found, Mapping) for found in data.values())
    for name, found in data.items() if several else [("", data)]:
        cuts: dict[int, list[float]] = {}
        for node, value in found.items():
            cuts.setdefault(len(tree.modes_below(node)), []).append(value)
        sizes = sorted(cuts)
        label = plain_label(str(name)) if several else None
        ax.plot(sizes, [np.mean(cuts[size]) for size in sizes], marker="o", ms=3, lw=1.2, label=label)
    ax.set_xscale("log", base=2)
    ax.set_ylim(bottom=0)
    if several:
        ax.legend(fontsize=8)
    return ax


def save_figure(drawn: Figure | SubFigure, path: str | os.PathLike[str]) -> Path:
    """Write a figure in the format of the suffix (.png, .pdf, .svg, ...), whole or not at all.

    Raises:
        OptionError: Another suffix.
        FileError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    while not isinstance(drawn, Figure):
        drawn = drawn.figure
    raw = io.BytesIO()  # a full disk would leave half a JPEG without an error
    drawn.savefig(raw, dpi=150, format=picture_format(path))
    return write_whole(path, lambda beside: beside.write_bytes(raw.getbuffer()))


def _net(data: Any, who: str) -> Any:
    data, instead = getattr(data, "net", data), "of a factorization: to_cnn(model)"
    if not hasattr(data, "nodes_of"):
        message = f"plots.{who} draws a ConvNet, found {type(data).__name__}; {instead}."
        raise OptionError(message, argument="data")
    return data


def _height(nodes: int) -> float:
    return 0.35 + math.log2(nodes) / 3


def _write(ax: Axes, text: str, x: float, y: float, side: str, size: int = 8, **style: Any) -> None:
    """Write a text centred at ``x``, with this side of it (``"top"``, ...) at ``y``."""
    ax.annotate(text, (x, y), ha="center", va=side, fontsize=size, parse_math=False, **style)


def _axes(ax: Axes | None, x_label: str = "", y_label: str = "") -> Axes:
    """Return the axes, or new ones; with these labels, where there are any."""
    if ax is None:
        [ax] = _new_axes(1)
    if x_label:
        ax.set_xlabel(x_label)
    if y_label:
        ax.set_ylabel(y_label)
    return ax


def _new_axes(count: int, size: tuple[float, float] | None = None) -> list[Axes]:
    import matplotlib.pyplot as plt

    drawn = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False)[1]
    return list(drawn[0])
