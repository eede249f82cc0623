"""A small drawing of a tree as SVG text, for notebooks: nothing is imported, nothing is opened.

Leaves stand along the bottom in the order of the tree, a node in the middle above its children.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

MOST_NODES = 60
"""Larger trees are shown as text."""

_LETTER, _LEVEL, _EDGE = 6.6, 52.0, 26.0  # pixels: a letter's width, between two levels, around
_LONGEST = 22


def tree_svg(
    links: Sequence[Sequence[int]],
    labels: Sequence[Any],
    *,
    edges: Mapping[int, Any] | None = None,
    caption: str = "",
) -> str:
    """The drawing, well-formed XML.

    Args:
        links: For every node the positions of its children, children before parents.
        labels: What to write at every node; long ones are cut, and whole in the tooltip.
        edges: ``{position: text}`` on the edge above that node.
        caption: Text below.
    """
    texts = [_printable(label) for label in labels]
    x, y, width, height = _spots(links, texts)
    lines, nodes = [], []
    for i, below in enumerate(links):
        for c in below:
            lines.append(
                f'<line x1="{x[i]:.1f}" y1="{y[i]:.1f}" x2="{x[c]:.1f}" y2="{y[c]:.1f}" stroke="#999"/>'
            )
            if edges is not None and c in edges:
                middle = f'x="{(x[i] + x[c]) / 2:.1f}" y="{(y[i] + y[c]) / 2:.1f}"'
                text = escape(_printable(edges[c]))
                lines.append(f'<text {middle} text-anchor="middle" fill="#c33">{text}</text>')
        place = f'x="{x[i] + 7:.1f}" y="{y[i] - 5:.1f}"'
        if not below:
            place = f'x="{x[i]:.1f}" y="{y[i] + 17:.1f}" text-anchor="middle"'
        nodes.append(
            f'<g><title>{escape(texts[i])}</title>'
            f'<circle cx="{x[i]:.1f}" cy="{y[i]:.1f}" r="4" fill="{"#1f77b4" if below else "#ff7f0e"}"/>'
            f'<text {place} fill="currentColor">{escape(_cut(texts[i]))}</text></g>'
        )  # fmt: skip
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    font = 'font-family="sans-serif" font-size="11"'
    drawn = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>{"".join(lines + nodes)}</svg>'
    under = f"<div>{escape(_printable(caption))}</div>" if caption else ""
    return f"<div>{drawn}{under}</div>"


def as_text(text: str) -> str:
    """Text as it is, for what is too large to be drawn."""
    return f"<pre>{escape(_printable(text, keep=chr(10)))}</pre>"


def _spots(
    links: Sequence[Sequence[int]], texts: Sequence[str]
) -> tuple[list[float], list[float], float, float]:
    """Coordinates of the nodes, and the size of the picture."""
    depth = [0] * len(links)
    for i in reversed(range(len(links))):
        for c in links[i]:
            depth[c] = depth[i] + 1
    leaves = [i for i, below in enumerate(links) if not below]
    step = max(36.0, 10 + _LETTER * max(len(_cut(texts[i])) for i in leaves))
    x = [0.0] * len(links)
    for k, i in enumerate(leaves):
        x[i] = _EDGE + step * (k + 0.5)
    for i, below in enumerate(links):
        if below:
            x[i] = sum(x[c] for c in below) / len(below)
    y = [_EDGE + _LEVEL * d for d in depth]
    right = max(x[i] + 7 + _LETTER * len(_cut(text)) for i, text in enumerate(texts) if links[i])
    return x, y, max(right, 2 * _EDGE + step * len(leaves)), max(y) + _EDGE


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _printable(value: Any, keep: str = "") -> str:
    """Without characters that XML does not know."""
    return "".join(
        c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in str(value)
    )
