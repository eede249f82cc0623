"""How the modes of a tree lie: as the pixels of an image, or as a sequence in equal windows.

Where all nodes of one height have equally many children, next to each other, product pooling is that of
an ordinary 2-D network.
"""

from __future__ import annotations

from dataclasses import dataclass

from tnreg.trees.tree import ModeTree


@dataclass(frozen=True)
class Maps:
    """A tree all of whose nodes of one height have equal windows: an ordinary 2-D network.

    Attributes:
        shape: Positions ``(height, width)``; of a sequence ``(N, 1)``.
        windows: Product pooling of every level, leaves first.
        order: Mode at every position of a sequence, ``None`` if in order.
    """

    shape: tuple[int, int]
    windows: tuple[tuple[int, int], ...]
    order: tuple[int, ...] | None


def grid_of(tree: ModeTree) -> Maps | None:
    """Return the image whose ``ModeTree.grid`` this tree is, with complete windows at every level.

    Its shape is the tree's own, or read off the first window: there a row of modes is followed by the next
    row, unless the window is as wide as the image.
    """
    first = next((i for i, height in enumerate(tree.heights) if height == 1), None)
    modes = () if first is None else tree.modes_below(tree.nodes[first])
    if len(modes) < 2 or modes[0] != 0:
        return None
    columns = next((k for k, m in enumerate(modes) if m != k), len(modes))
    width = modes[columns] if columns < len(modes) else 0
    if tree.shape is not None:
        width = tree.shape[1]
        columns = min(columns, width)
    if not width or tree.order % width or len(modes) % columns:
        return None
    height, rows = tree.order // width, len(modes) // columns
    windows: list[tuple[int, int]] = []
    h, w = height, width
    while h > 1 or w > 1:
        window = (min(rows, h), min(columns, w))
        if h % window[0] or w % window[1] or window == (1, 1):
            return None
        windows.append(window)
        h, w = h // window[0], w // window[1]
    grid = ModeTree.grid((height, width), (rows, columns))
    same = tree.links == grid.links and tree.leaf_order == grid.leaf_order
    return Maps((height, width), tuple(windows), None) if same else None


def maps_of(tree: ModeTree) -> Maps | None:
    """Return the 2-D layout of a tree all of whose nodes of one height have equally many children."""
    grid = grid_of(tree)
    if grid is not None:
        return grid
    windows: list[tuple[int, int]] = []
    for height in range(1, tree.heights[-1] + 1):
        nodes = [below for i, below in enumerate(tree.links) if tree.heights[i] == height]
        complete = all(tree.heights[c] == height - 1 for below in nodes for c in below)
        if not complete or len({len(below) for below in nodes}) > 1:
            return None
        windows.append((len(nodes[0]), 1))
    order = tree.leaf_order
    return Maps((tree.order, 1), tuple(windows), None if order == tree.leaves else order)
