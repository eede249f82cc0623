"""The drawing of a tree, on axes of matplotlib and as SVG; matplotlib is imported when something is drawn."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tnreg.errors import OptionError
from tnreg.machine.progress import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tnreg.trees.tree import ModeTree

MOST_NODES = 60
"""Notebooks show larger trees as text."""

_FORMATS = ("png", "pdf", "svg", "eps", "jpg", "jpeg", "webp", "tif", "tiff")


def draw_tree(
    tree: ModeTree,
    ax: Axes,
    *,
    labels: Mapping[Any, str] | None = None,
    edges: Mapping[Any, Any] | None = None,
) -> Axes:
    """Draw a tree with its root on top, as ``plots.tree`` says, and return the axes."""
    spots = node_spots(tree)
    crowded = len(tree.nodes) > 48
    labels, edges = labels or {}, (not crowded and edges) or {}
    style: dict[str, Any] = {"fontsize": 6 if crowded else 8, "parse_math": False}
    white = {"fc": "white", "ec": "none", "pad": 0.8}
    # long texts lie along their edges, where they have room beside each other
    turned = max((len(str(text)) for text in edges.values()), default=0) > 4
    above = {c: spot[0] for spot, below in zip(spots, tree.links, strict=True) for c in below}
    for k, (spot, node, below) in enumerate(zip(spots, tree.nodes, tree.links, strict=True)):
        for c in below:
            x, y = zip(spot, spots[c], strict=True)
            ax.plot(x, y, color="0.6", lw=1, zorder=1)
            if (text := edges.get(tree.nodes[c])) is not None:
                part = 0.5 if turned else 0.6  # edges part further down
                near = (x[0] + part * (x[1] - x[0]), y[0] + part * (y[1] - y[0]))
                angle = math.degrees(math.atan2(y[1] - y[0], x[1] - x[0]))
                ax.text(*near, printable(text, keep="\n"), ha="center", va="center", color="C3", bbox=white,
                        rotation=(angle + 90) % 180 - 90 if turned else 0, rotation_mode="anchor",
                        transform_rotates_text=turned,
                        **style | {"fontsize": 6 if tree.order > 6 else 8})  # fmt: skip
        text = labels.get(node)
        if text is not None or not (crowded and below):
            # beside the edge to the parent, which leaves to the other side
            aside = (1 if spot[0] >= above[k] else -1) if below and k in above else 0
            ax.annotate(
                node_text(node) if text is None else printable(text, keep="\n"), spot,
                xytext=(5 * aside, (3 if aside else 8) if below else -8), textcoords="offset points",
                ha=("center", "left", "right")[aside], va="bottom" if below else "top", **style,
            )  # fmt: skip
    x_all, y_all = zip(*spots, strict=True)
    ax.scatter(x_all, y_all, s=30, c=["C0" if below else "C1" for below in tree.links], zorder=2)
    ax.set_axis_off()
    ax.margins(0.12, 0.2)
    return ax


def node_spots(tree: ModeTree) -> list[tuple[float, float]]:
    """Return where every node is drawn: a leaf at its number from the left, a node above its children."""
    spots: list[tuple[float, float]] = []
    leaf = 0
    for below, height in zip(tree.links, tree.heights, strict=True):
        x = (spots[below[0]][0] + spots[below[-1]][0]) / 2 if below else leaf
        spots.append((float(x), float(height)))
        leaf += not below
    return spots


def node_text(node: Any) -> str:
    """Return a node's name as a label: ``{0,1}`` for the node over modes 0 and 1."""
    if isinstance(node, tuple) and all(isinstance(part, int) for part in node):
        return "{" + ",".join(map(str, node)) + "}"
    return printable(node)


def plain_label(text: object) -> str:
    """Return a text for a legend, a title or an axis that matplotlib draws as it is, without formulas."""
    label = printable(text, keep="\n").replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def picture_format(path: str | os.PathLike[str]) -> str:
    """Return the format that the suffix of a picture's file says; ``OptionError`` for any other suffix."""
    suffix = os.path.splitext(os.fspath(path))[1].lower().removeprefix(".")
    if suffix not in _FORMATS:
        found = f"the suffix {suffix!r}" if suffix else "no suffix"
        raise OptionError(
            f"{os.fspath(path)}: the suffix says how a picture is written, found {found}.\n"
            f"  expected: .{', .'.join(_FORMATS)}",
            argument="figure",
        )
    return {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix)


def tree_svg(
    tree: ModeTree,
    *,
    labels: Mapping[Any, str] | None = None,
    edges: Mapping[Any, Any] | None = None,
    title: str = "",
) -> str | None:
    """Return the drawing as SVG for a notebook, which shows text instead of ``None``: beyond 60 nodes."""
    if len(tree.nodes) > MOST_NODES:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    texts = {node: node_text(node) for node in tree.nodes} | dict(labels or {})
    figure = Figure((max(4.0, 0.8 * tree.order), 1 + 0.8 * tree.heights[-1]), layout="constrained")
    draw_tree(tree, figure.subplots(), labels=texts, edges=edges).set_title(title, fontsize=9)
    svg = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):  # texts stay texts
        figure.savefig(svg, format="svg")
    return svg.getvalue()
