"""A network of 1x1 convolutions and product pooling as text, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tnreg.cnns.pooling import Group
from tnreg.networks.network import Network

# Longer descriptions of a network are cut in the middle.
_LINES = 59


def layer_lines(
    network: Network,
    groups: Sequence[Group],
    *,
    outputs: int | None,
    share: bool,
    windows: Sequence[tuple[int, int]] | None,
) -> list[str]:
    """One line or two for every group of equal nodes, and one for the nodes that wait in a layer.

    Args:
        network: Indices and sizes.
        groups: Its nodes in groups, as ``groups_of`` gives them.
        outputs: Number of outputs, or ``None``.
        share: Whether filters are shared over the nodes of a layer.
        windows: Height and width of the pooling of every level, if the tree is that of an image.
    """
    tree, lines, waiting = network.tree, list[str](), 0
    for layer in range(tree.heights[-1] + 1):
        for group in groups:
            if tree.heights[group.positions[0]] == layer:
                window = windows[layer - 1] if windows is not None and layer else None
                for text in _group_lines(network, group, outputs, share, window):
                    lines.append(f"  layer {layer}  {text}")
        at = [i for i, height in enumerate(tree.heights) if height == layer]
        idle = waiting - sum(len(tree.links[i]) for i in at)
        waiting = idle + len(at)
        if layer and idle:
            lines.append(f"  layer {layer}  {'identity':25s} {idle} {_nodes(idle)} waiting")
    if len(lines) > _LINES:
        left = len(lines) - _LINES + 1
        lines = [*lines[: _LINES - 8], f"  ... {left} more lines ...", *lines[-7:]]
    return lines


def _group_lines(
    network: Network,
    group: Group,
    outputs: int | None,
    share: bool,
    window: tuple[int, int] | None,
) -> list[str]:
    tree, out = network.tree, list[str]()
    first, count = group.positions[0], len(group.positions)
    root = first == len(tree.nodes) - 1
    inner = network.bonds[first] if not root else outputs or 1
    names = ", ".join(str(tree.nodes[p]) for p in group.positions[:4])
    named = f"   at {names}" if count <= 4 and len(names) <= 40 else ""
    where = f"{count} {_nodes(count)}"
    if group.join == "leaf":
        given = network.index_size(network.inner(first)[0])
    else:
        bonds = [network.bonds[c] for c in tree.links[first]]
        given = bonds[0] if group.join == "diagonal" else math.prod(bonds)
        over = f"over {len(bonds)}" if window is None else f"{window[0]}x{window[1]}"
        kind = "product pooling" if group.join == "diagonal" else "product pooling, all pairs,"
        out.append(f"{f'{kind} {over}':25s} {where}, {given} channels")
    if first not in network.slots:
        return [*out, f"{'sum':25s} {where}, {given} -> 1"]
    kind = "linear" if root else "1x1 convolution" + (", shared" if share else "")
    return [*out, f"{kind:25s} {where}, {given} -> {inner}{named}"]


def _nodes(count: int) -> str:
    return "node" if count == 1 else "nodes"
