"""Pictures. Every function draws on the axes given, or on new ones, and returns them.

matplotlib is imported when something is drawn, not before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tnreg.errors import OptionError
from tnreg.machine.files import write_whole
from tnreg.training.trajectory import Trajectory
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from tnreg.cnns.convnet import ConvNet
    from tnreg.factorizations.factorization import Factorization
    from tnreg.far.probe import LocalityProfile

__all__ = [
    "bars",
    "component",
    "components",
    "decomposition",
    "locality_profile",
    "network",
    "node_text",
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
    """The tree with its root on top; leaves along the bottom in the order of the tree.

    Args:
        data: The mode tree.
        ax: Where to draw.
        labels: ``{node: text}`` in place of the node's name, e.g. mode names at leaves.
        edges: ``{non-root node: text}`` on the edge above it, e.g. hierarchical ranks.
    """
    ax = _axes(ax)
    spots = _spots(data).values()
    x, y = [spot[0] for spot in spots], [spot[1] for spot in spots]
    crowded = len(data.nodes) > 48
    for i, below in enumerate(data.links):
        for c in below:
            ax.plot([x[i], x[c]], [y[i], y[c]], color="0.6", lw=1, zorder=1)
            text = (edges or {}).get(data.nodes[c])
            if text is not None and not crowded:
                middle = ((x[i] + x[c]) / 2, (y[i] + y[c]) / 2)
                ax.annotate(str(text), middle, ha="center", va="center", fontsize=8, color="C3",
                            bbox={"fc": "white", "ec": "none", "pad": 0.8})  # fmt: skip
    interior = [i for i, below in enumerate(data.links) if below]
    leaves = [i for i, below in enumerate(data.links) if not below]
    ax.scatter([x[i] for i in interior], [y[i] for i in interior], s=30, color="C0", zorder=2)
    ax.scatter([x[i] for i in leaves], [y[i] for i in leaves], s=30, color="C1", zorder=2)
    for i in range(len(x)):
        given = (labels or {}).get(data.nodes[i])
        if crowded and given is None and i in interior:
            continue
        text = node_text(data.nodes[i]) if given is None else given
        side = 8 if data.links[i] else -8
        ax.annotate(text, (x[i], y[i]), xytext=(0, side), textcoords="offset points", ha="center",
                    va="bottom" if side > 0 else "top", fontsize=6 if crowded else 8)  # fmt: skip
    ax.set_axis_off()
    ax.margins(0.12, 0.2)
    return ax


def spectra(data: Mapping[Node, Any], ax: Axes | None = None, *, floor: float = 1e-8) -> Axes:
    """Singular values of every node, relative to its largest, on a logarithmic axis.

    Args:
        data: What ``tnreg.spectra`` gives.
        ax: Where to draw.
        floor: Values below ``floor`` times the largest are left out.
    """
    ax = _axes(ax)
    for node, values in data.items():
        s = _array(values)
        s = s / s[0] if len(s) and s[0] > 0 else s
        s = s[s > floor]
        marker = "o" if len(s) <= 40 else None
        ax.semilogy(np.arange(1, len(s) + 1), s, marker=marker, ms=3, lw=1, label=node_text(node))
    ax.set_xlabel("index of the singular value")
    ax.set_ylabel("relative to the largest")
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
    """A decomposed tensor: its singular values, and the tree with ranks and the error budget on its edges.

    Args:
        data: What ``tnreg.spectra`` gives for the tensor that was decomposed.
        model: What ``decompose`` or ``truncate`` made of it.
        axes: Where to draw: two of them.
        labels: ``{node: text}`` in place of the node's name, e.g. mode names at leaves.

    Returns:
        The axes. On every edge is the rank, and the share of the tensor's norm that is beyond it. The
        squares of these shares, one for both children of a binary root, bound that of the relative error.
    """
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")[1]
    left, right = axes
    spectra(data, left)
    edges: dict[Node, str] = {}
    for node, rank in model.network.named_bonds.items():
        s = _array(data[node]).astype(float)
        largest = s.max(initial=0.0)
        share = 0.0
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
    """What was recorded under these names, against the number of updates.

    Args:
        data: The trajectory.
        ax: Where to draw.
        names: Recorded numbers, vectors, or dicts of them; each component is a line.
        log: Logarithmic vertical axis.
    """
    ax = _axes(ax)
    for name in names:
        found = data[name]
        parts = found.items() if isinstance(found, dict) else [(None, found)]
        for key, values in parts:
            label = name if key is None else f"{name} {node_text(key)}"
            lines = ax.plot(data.steps, values.reshape(len(values), -1), lw=1.2)
            if lines:
                lines[0].set_label(label)
    ax.set_xlabel("step")
    if log and any((_array(line.get_ydata()) > 0).any() for line in ax.lines):
        ax.set_yscale("log")
    if len(ax.get_legend_handles_labels()[0]) <= 12:
        ax.legend(fontsize=7)
    else:
        ax.set_ylabel(", ".join(names))
    return ax


def components(
    data: Trajectory,
    ax: Axes | None = None,
    *,
    name: str = "components",
    node: Node | None = None,
    top: int = 10,
) -> Axes:
    """The largest local components of one node along training: the incremental learning of the theory.

    Args:
        data: A trajectory that observed ``lambda m: m.local_components()``.
        ax: Where to draw.
        name: The name it was observed under.
        node: Which node; the root if left out.
        top: How many, chosen by their size at the end.
    """
    found = data[name]
    if not isinstance(found, dict):
        raise OptionError(
            f"plots.components: {name!r} is no dict of nodes; observe model.local_components()."
        )
    node = list(found)[-1] if node is None else node
    if node not in found:
        raise OptionError(
            f"plots.components: no node {node!r}; there is {', '.join(map(str, found))}."
        )
    ax = _axes(ax)
    values = found[node]
    kept = np.argsort(-values[-1])[:top]
    ax.plot(data.steps, values[:, kept], lw=1.2)
    ax.set_xlabel("step")
    ax.set_ylabel(f"local components at {node_text(node)}")
    return ax


def network(data: ConvNet, ax: Axes | None = None) -> Axes:
    """The layers of a convolutional network from left to right, each a pile of its positions' channels.

    Heights are numbers of nodes, widths numbers of channels, both on logarithmic scales.

    Args:
        data: A ``ConvNet``, as ``to_cnn`` makes it, or a ``ConvAC``.
        ax: Where to draw.
    """
    data = _net(data, "network")
    ax = _axes(ax)
    net, tree = data.network, data.tree
    # label, channels of every node, operation before it
    drawn: list[tuple[str, Sequence[int], str]] = [("input", net.sizes, "")]
    for layer in range(data.depth):
        nodes = data.nodes_of(layer)
        places = [tree.position(node) for node in nodes]
        if layer:
            below = max(len(tree.links[p]) for p in places)
            wide = [_pooled_channels(net.bonds, net.joins[p], tree.links[p]) for p in places]
            drawn.append(("", wide, f"product\npooling {below}"))
        root = layer == data.depth - 1
        out = [data.outputs or 1] if root else [net.bonds[p] for p in places]
        drawn.append((f"layer {layer}", out, "linear" if root else "1x1\nconv"))
    x = 0.0
    for label, each, before in drawn:
        count, channels = len(each), max(each)
        span = str(channels) if min(each) == channels else f"{min(each)}–{channels}"
        if before:
            ax.annotate(
                "", (x + 0.9, 0), (x + 0.15, 0), arrowprops={"arrowstyle": "->", "color": "0.4"}
            )
            ax.annotate(before, (x + 0.52, 0.08), ha="center", va="bottom", fontsize=7, color="0.3")
            x += 1
        height, width = 0.35 + math.log2(count) / 3, 0.12 + math.log2(channels + 1) / 14
        ax.add_patch(_rectangle(x, height, width, "C1" if label == "input" else "C0"))
        ax.annotate(f"{count} × {span}", (x + width / 2, -height / 2 - 0.08), ha="center", va="top",
                    fontsize=7)  # fmt: skip
        ax.annotate(label, (x + width / 2, height / 2 + 0.06), ha="center", va="bottom", fontsize=8)
        x += width
    tall = 0.35 + math.log2(tree.order) / 3
    ax.set_xlim(-0.2, x + 0.2)
    ax.set_ylim(-tall / 2 - 0.5, tall / 2 + 0.5)
    ax.set_axis_off()
    return ax


def component(
    data: ConvNet, node: Node, r: int = 0, axes: Sequence[Axes] | None = None
) -> list[Axes]:
    """Where a local component is: in the tree, and in the filters of the network.

    On the left the node and its children; on the right magnitudes of their 1x1 convolutions (rows: channels
    in, columns: channels out), framed what belongs to the component: filter r of every child, and what the
    node's own convolution reads from pooled channel r.

    Args:
        data: A ``ConvNet``.
        node: A node with a diagonal join.
        r: Number of the component.
        axes: Two axes to draw on.
    """
    if axes is None:
        import matplotlib.pyplot as plt

        axes = list(plt.subplots(1, 2, figsize=(11, 4), layout="constrained")[1])
    data = _net(data, "component")
    net, whole = data.network, data.tree
    position = whole.position(node)
    bond = net.bonds[whole.links[position][0]] if net.joins[position] == "diagonal" else 0
    if not 0 <= r < bond:
        raise OptionError(
            f"plots.component: node {node!r} has {bond} local components, found number {r!r}."
        )
    left, right = axes
    children = whole.children(node)
    tree(whole, left, labels={m: "" for m in whole.leaves} if whole.order > 32 else None)
    spots = _spots(whole)
    for v in (node, *children):
        left.scatter(*spots[v], s=160, facecolors="none", edgecolors="C3", lw=1.8, zorder=3)
    left.set_title(f"local component ({node_text(node)}, {r})", fontsize=10)
    weights = {v: _array(w.abs().float()) for v, w in data.weights.items()}
    x, tall = 0.0, 0
    shown = [(child, True) for child in children] + ([(node, False)] if node in weights else [])
    for v, is_child in shown:
        matrix = weights[v].reshape(weights[v].shape[0] if not is_child else -1,
                                    weights[v].shape[-1] if weights[v].ndim > 1 else 1)  # fmt: skip
        rows, columns = matrix.shape
        tall = max(tall, rows)
        right.imshow(
            matrix, extent=(x, x + columns, -rows, 0), cmap="Greys", aspect="equal", vmin=0
        )
        place = (x + r, -rows, 1, rows) if is_child else (x, -r - 1, columns, 1)
        right.add_patch(_frame(*place))
        what = f"filter {r}" if is_child else f"reads {r}"
        layer = f"{node_text(v)}, layer {data.layer_of(v)}\n{what}"
        right.annotate(layer, (x + columns / 2, 0.3), ha="center", va="bottom", fontsize=7)
        sign = (
            "×" if is_child and v != children[-1] else "→" if is_child and node in weights else ""
        )
        right.annotate(sign, (x + columns + 1, -rows / 2), ha="center", va="center", fontsize=12)
        x += columns + 2
    right.set_xlim(-0.5, x - 1)
    right.set_ylim(-tall - 0.5, 3.5)
    right.set_axis_off()
    return [left, right]


def bars(
    data: Mapping[str, float], ax: Axes | None = None, *, unit: str = "relative error"
) -> Axes:
    """Named numbers side by side, each with its value."""
    ax = _axes(ax)
    drawn = ax.barh(list(data), list(data.values()), color=[f"C{k}" for k in range(len(data))])
    ax.bar_label(drawn, fmt="%.3f", padding=3, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel(unit)
    ax.margins(x=0.15)
    return ax


def locality_profile(
    data: LocalityProfile | Mapping[str, LocalityProfile], ax: Axes | None = None
) -> Axes:
    """Interaction of two patches against the distance between them, with standard errors.

    Args:
        data: What ``tnreg.locality_profile`` gives, or several by name, e.g. of a model before and
            after regularization.
        ax: Where to draw.
    """
    ax = _axes(ax)
    profiles = data if isinstance(data, Mapping) else {"": data}
    for name, profile in profiles.items():
        ax.errorbar(
            profile.distances, profile.interaction.mean(axis=1), profile.standard_error, marker="o",
            ms=3, lw=1.2, capsize=2, label=name or None,
        )  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.set_xlabel("distance between the patches, pixels")
    ax.set_ylabel("share of variance by interaction")
    if any(profiles):
        ax.legend(fontsize=8)
    return ax


def save_figure(drawn: Figure | SubFigure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, whole or not at all."""
    return write_whole(path, lambda beside: _root(drawn).savefig(beside, dpi=150, format="png"))


def node_text(node: Any) -> str:
    """A node's name as a label: ``{0,1}`` for the node over modes 0 and 1."""
    if isinstance(node, tuple) and all(isinstance(part, int) for part in node):
        return "{" + ",".join(map(str, node)) + "}"
    return str(node)


def _net(data: Any, who: str) -> Any:
    data = getattr(data, "net", data)
    if not hasattr(data, "nodes_of"):
        raise OptionError(
            f"plots.{who} draws a ConvNet, found {type(data).__name__}; of a factorization: to_cnn(model)."
        )
    return data


def _frame(x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, fc="none", ec="C3", lw=1.8)


def _spots(data: ModeTree) -> dict[Node, tuple[float, float]]:
    """Where ``tree`` draws every node."""
    x: list[float] = []
    leaf = 0
    for below in data.links:
        if below:
            x.append((x[below[0]] + x[below[-1]]) / 2)
        else:
            x.append(float(leaf))
            leaf += 1
    places = zip(x, map(float, data.heights), strict=True)
    return dict(zip(data.nodes, places, strict=True))


def _pooled_channels(bonds: Sequence[int], join: str, below: Sequence[int]) -> int:
    return bonds[below[0]] if join == "diagonal" else math.prod(bonds[c] for c in below)


def _rectangle(x: float, height: float, width: float, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, -height / 2), width, height, fc=color, ec="white", alpha=0.75)


def _root(drawn: Figure | SubFigure) -> Figure:
    import matplotlib.figure

    while not isinstance(drawn, matplotlib.figure.Figure):
        drawn = drawn.figure
    return drawn


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def _array(values: Any) -> np.ndarray[Any, Any]:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
