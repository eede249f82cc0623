"""Mode trees: rooted trees whose leaves are the modes ``0..N-1`` of a tensor.

A ``ModeTree`` is a checked, frozen ``networkx.DiGraph`` with edges from parent to child. Every node
stands for the modes below it. A leaf's name is its mode; an interior node is named by the sorted
tuple of the modes below it, ``(0, 1)``; a node with one child by the tuple of that child's name,
``(0,)``. Names of interior nodes that a networkx graph brings along are kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx

from tnreg.errors import FileError, TreeError, blame, check_integer, did_you_mean
from tnreg.machine.files import is_file, seal, unseal, write_whole
from tnreg.machine.progress import printable
from tnreg.trees.drawing import tree_svg
from tnreg.trees.reading import (
    LONGEST_CHAIN,
    Node,
    check_links,
    in_a_line,
    read_graph,
    read_links,
    read_nested,
    usual_names,
)

# A JSON reader recurses once per level; deeper trees are stored as flat lists of child positions.
_NESTED_DEPTH = 100


class ModeTree:
    """A rooted tree over the modes ``0..N-1`` of an order-N tensor.

    Any arity, leaves beside interior nodes, nodes with one child, and modes that are not contiguous
    are all allowed. Trees are immutable; two are equal if they have the same nodes and every node
    has the same children in the same order (full joins lay out their weights in that order).

    Args:
        structure: Nested sequences of mode numbers, ``[[0, 1], [2, 3]]``, or a ``networkx.DiGraph``
            with edges parent -> child whose leaves are the integers ``0..N-1``.
        shape: ``(height, width)`` of the image whose pixels the modes are, mode = row * width + column;
            ``grid`` knows it. It tells networks what images fit and is not compared by ``==``.

    Attributes:
        nodes: All nodes, children before parents, the root last.
        links: For every node, the positions in ``nodes`` of its children.
        heights: For every node, the longest way down to a leaf; 0 at leaves.
        order: Number of modes N.

    Raises:
        TreeError: The structure is not a mode tree; the message names the node and the remedy.

    Example:
        >>> tree = ModeTree([[0, 1], [2, 3]])
        >>> tree.nodes
        (0, 1, (0, 1), 2, 3, (2, 3), (0, 1, 2, 3))
        >>> tree.parent(3), tree.children((2, 3)), tree.modes_below((2, 3))
        ((2, 3), (2, 3), (2, 3))
    """

    nodes: tuple[Node, ...]
    links: tuple[tuple[int, ...], ...]
    heights: tuple[int, ...]
    order: int
    shape: tuple[int, int] | None
    _up: tuple[int | None, ...]
    _position: dict[Node, int]
    _hash: int

    def __init__(
        self, structure: Sequence[Any] | nx.DiGraph[Any] | ModeTree, *, shape: Sequence[int] | None = None
    ) -> None:
        if isinstance(structure, ModeTree):
            names, links = structure.nodes, structure.links
            shape = structure.shape if shape is None else shape
        elif isinstance(structure, nx.Graph):
            names, links = read_graph(structure)
        else:
            names, links = read_nested(structure)
        self._set(names, links, shape)

    @classmethod
    def _holding(
        cls, names: tuple[Node, ...], links: tuple[tuple[int, ...], ...], shape: Sequence[int] | None
    ) -> ModeTree:
        """Make a tree of checked names and links."""
        return cls.__new__(cls)._set(names, links, shape)

    def _set(
        self, names: tuple[Node, ...], links: tuple[tuple[int, ...], ...], shape: Sequence[int] | None
    ) -> ModeTree:
        up: list[int | None] = [None] * len(names)
        heights = [0] * len(names)
        for i, below in enumerate(links):
            for c in below:
                up[c] = i
            heights[i] = 1 + max((heights[c] for c in below), default=-1)
        order = heights.count(0)
        shape = None if shape is None else _check_shape(shape, order)
        # the attributes of an immutable object are set here, and cached properties add theirs
        vars(self).update(nodes=names, links=links, heights=tuple(heights))
        vars(self).update(order=order, shape=shape)
        position = {name: i for i, name in enumerate(names)}
        vars(self).update(_up=tuple(up), _position=position, _hash=hash((names, links)))
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a ModeTree is immutable; its {name} cannot be set.")

    # Families

    @classmethod
    def star(cls, n: int) -> ModeTree:
        """All ``n`` modes under the root: the tree of CP and Tucker."""
        return cls(list(range(check_integer(n, 1, "ModeTree.star: n", TreeError))))

    @classmethod
    def binary(cls, n: int) -> ModeTree:
        """Neighbours paired level by level; a node without a partner waits for the next level."""
        return cls.regular(n, 2)

    @classmethod
    def regular(cls, n: int, arity: int) -> ModeTree:
        """Neighbours joined ``arity`` at a time, level by level, the last group of a level being smaller."""
        n = check_integer(n, 1, "ModeTree.regular: n", TreeError)
        arity = check_integer(arity, 2, "ModeTree.regular: arity", TreeError)
        return cls(_merge(n, lambda nodes: [nodes[i : i + arity] for i in range(0, len(nodes), arity)]))

    @classmethod
    def caterpillar(cls, n: int) -> ModeTree:
        """``[[[0, 1], 2], 3]`` and so on: the tree of the tensor train."""
        n = check_integer(n, 1, "ModeTree.caterpillar: n", TreeError)
        nested: Any = 0
        for mode in range(1, n):
            nested = [nested, mode]
        return cls(nested if n > 1 else [0])

    @classmethod
    def chain(cls, depth: int) -> ModeTree:
        """Two modes and ``depth`` factors: matrix factorization of that depth.

        One-child nodes are put above the two leaves in turn, so with diagonal joins and
        ``root="ones"`` the tensor is the product of ``depth`` matrices.
        """
        depth = check_integer(depth, 2, "ModeTree.chain: depth", TreeError)
        sides: list[Any] = [0, 1]
        for extra in range(depth - 2):
            sides[extra % 2] = [sides[extra % 2]]
        return cls(sides)

    @classmethod
    def half(cls, n: int) -> ModeTree:
        """Mode ``i`` paired with ``i + n/2`` at every level ("half" pooling).

        With an odd number of nodes in a level the middle one waits for the next.
        """
        n = check_integer(n, 1, "ModeTree.half: n", TreeError)

        def pair(level: list[Any]) -> list[list[Any]]:
            step = (len(level) + 1) // 2
            return [level[i::step] for i in range(step)]

        return cls(_merge(n, pair))

    @classmethod
    def grid(cls, shape: tuple[int, int], window: tuple[int, int] = (2, 2)) -> ModeTree:
        """Quad tree of an image of ``shape = (height, width)``; mode = row * width + column.

        Each level joins windows of ``window = (rows, columns)`` nodes; at ragged edges a window
        holds fewer, and a node alone in its window waits for the next level. Once no window can
        join anything more, what is left is joined at the root.
        """
        try:
            (height, width), (rows, columns) = shape, window
        except (TypeError, ValueError):
            raise TreeError(
                "ModeTree.grid needs a shape (height, width) and a window (rows, columns).\n"
                f"  found: shape={shape!r}, window={window!r}"
            ) from None
        height = check_integer(height, 1, "ModeTree.grid: height", TreeError)
        width = check_integer(width, 1, "ModeTree.grid: width", TreeError)
        rows = check_integer(rows, 1, "ModeTree.grid: rows of the window", TreeError)
        columns = check_integer(columns, 1, "ModeTree.grid: columns of the window", TreeError)
        if rows * columns == 1:
            raise TreeError("ModeTree.grid: a window of (1, 1) joins nothing; write window=(2, 2).")
        level: list[list[Any]] = [[r * width + c for c in range(width)] for r in range(height)]
        while (len(level) > 1 and rows > 1) or (len(level[0]) > 1 and columns > 1):
            bands = [level[r : r + rows] for r in range(0, len(level), rows)]
            starts = range(0, len(level[0]), columns)
            level = [
                [_join([node for row in band for node in row[c : c + columns]]) for c in starts]
                for band in bands
            ]
        rest = [node for row in level for node in row]
        joined = len(rest) == 1 and isinstance(rest[0], list)
        return cls(rest[0] if joined else rest, shape=(height, width))

    # Structure

    @property
    def root(self) -> Node:
        """Name of the root."""
        return self.nodes[-1]

    @property
    def leaves(self) -> tuple[int, ...]:
        """The modes ``(0, .., N-1)``."""
        return tuple(range(self.order))

    @cached_property
    def leaf_order(self) -> tuple[int, ...]:
        """The modes in the order in which the tree meets its leaves."""
        pairs = zip(self.nodes, self.links, strict=True)
        return tuple(name for name, below in pairs if not below)  # type: ignore[misc]

    @cached_property
    def interior(self) -> tuple[Node, ...]:
        """Interior nodes, children before parents, the root last."""
        return tuple(name for name, below in zip(self.nodes, self.links, strict=True) if below)

    @cached_property
    def cuts(self) -> tuple[tuple[int, ...], ...]:
        """Edges of the tree without its root, children before parents.

        Every edge splits the modes in two, so it has one matricization (up to its transpose) and one
        rank. An edge is given by the position in ``nodes`` of the node below it, ``(i,)``; the last one
        by both children ``(i, j)`` of a binary root, which are its two ends.
        """
        pair = [self.links[-1]] if len(self.links[-1]) == 2 else []
        edges = ((i,) for i in range(len(self.links) - 1) if not pair or i not in pair[0])
        return (*edges, *pair)

    @cached_property
    def graph(self) -> nx.DiGraph[Any]:
        """The tree as a frozen ``networkx.DiGraph``, edges parent -> child, children in order."""
        graph: nx.DiGraph[Any] = nx.freeze(_graph_of(self.nodes, self.links))
        return graph

    def position(self, node: Node) -> int:
        """Position of ``node`` in ``nodes``; raises ``TreeError`` if the tree has no such node."""
        try:
            return self._position[node]
        except (KeyError, TypeError):
            shown = ", ".join(map(repr, self.nodes[-8:]))
            more = "" if len(self.nodes) <= 8 else f" and {len(self.nodes) - 8} more"
            raise TreeError(f"no node {node!r} in this tree.\n  its nodes: {shown}{more}") from None

    def children(self, node: Node) -> tuple[Node, ...]:
        """Names of the children of ``node`` in their order; ``()`` at a leaf."""
        return tuple(self.nodes[c] for c in self.links[self.position(node)])

    def parent(self, node: Node) -> Node | None:
        """Name of the parent of ``node``; ``None`` at the root."""
        up = self._up[self.position(node)]
        return None if up is None else self.nodes[up]

    def modes_below(self, node: Node) -> tuple[int, ...]:
        """Modes below ``node`` in ascending order; the mode itself at a leaf."""
        return self._modes[self.position(node)]

    @cached_property
    def _modes(self) -> tuple[tuple[int, ...], ...]:
        """Modes below every node of ``nodes``."""
        modes: list[tuple[int, ...]] = []
        for name, below in zip(self.nodes, self.links, strict=True):
            inside = tuple(sorted(m for c in below for m in modes[c])) if below else (name,)
            modes.append(name if name == inside else inside)  # one object for both where they agree
        return tuple(modes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModeTree):
            return NotImplemented
        return self is other or (
            self._hash == other._hash and self.nodes == other.nodes and self.links == other.links
        )

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.nodes, self.links, self.shape)

    # Text and files

    def __repr__(self) -> str:
        if self.heights[-1] > 12 or len(self.nodes) > 64:
            return (
                f"<ModeTree of order {self.order}: {len(self.nodes)} nodes, height {self.heights[-1]}, "
                f"root with {len(self.links[-1])} children>"
            )
        text: list[str] = []
        names = zip(self.nodes, usual_names(self.links, self.nodes), self.links, strict=True)
        for name, usual, below in names:
            inside = f"[{', '.join(text[c] for c in below)}]" if below else repr(name)
            text.append(inside if name == usual else f"{name!r}: {inside}")
        return f"ModeTree({text[-1]})"

    def _repr_svg_(self) -> str | None:
        """Return the drawing that a notebook shows; ``None`` for a tree of more than 60 nodes."""
        return tree_svg(self)

    def text(self, *, label: Callable[[Node], str] = str, ascii_only: bool = False) -> str:
        """Drawing of the tree in characters, one node a line, root first.

        Args:
            label: What to write for a node; its name by default.
            ascii_only: Use ``|``, ``-`` and ``+`` instead of box-drawing characters.
        """
        shown = _graph_of(range(len(self.nodes)), self.links)
        for i, name in enumerate(self.nodes):
            shown.nodes[i]["label"] = printable(label(name))
        root = [len(self.nodes) - 1]
        return "\n".join(nx.generate_network_text(shown, sources=root, ascii_only=ascii_only))

    __str__ = text

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tree as a JSON file that ``load_tree`` reads; the file appears whole or not at all."""
        text = json.dumps(seal(tree_to_json(self))) + "\n"
        write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


@blame("source")
def load_tree(source: str | os.PathLike[str]) -> ModeTree:
    """Read a tree from the gallery by its name, or from a JSON file.

    Args:
        source: A name that ``gallery()`` lists, such as ``"htf-4"``, or the path of a JSON file
            ``{"tree": [[0, 1], [2, 3]]}`` (``"modes"`` and ``"sizes"`` may stand beside). ``"crc32"`` is a
            checksum that ``ModeTree.save`` writes and this checks; leave it out of what you write or change.

    Raises:
        FileError: There is no such name or file, or it is not a JSON file of that form.
        TreeError: The file's content is not a mode tree.
    """
    content = read_tree_file(source)
    try:
        return tree_from_json(content, where=str(source))
    except TreeError as error:
        raise TreeError(f"{error}\n  file: {source}") from None


@blame("tree")
def read_tree(text: str) -> ModeTree:
    """Read a tree from nested lists as text, ``"[[0, 1], [2, 3]]"``, or as ``load_tree`` does."""
    if not text.lstrip().startswith("["):
        return load_tree(text)
    try:
        nested = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TreeError(
            f"not nested lists of mode numbers: {text[:400]}\n  {error}\n  write e.g. [[0, 1], [2, 3]]"
        ) from None
    return ModeTree(nested)


@blame("source")
def read_tree_file(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON object of a tree file, with its optional ``modes``, ``sizes`` and ``about``."""
    path = Path(source)
    if not path.suffix and not is_file(path):
        path = _gallery_folder() / f"{source}.json"
        if not is_file(path):
            raise FileError(
                f"no tree named {str(source)!r} in the gallery and no such file.\n"
                f"{did_you_mean(str(source), gallery())}  gallery: {', '.join(gallery())}\n"
                "  a file of your own is given by its path, e.g. load_tree('my_tree.json')"
            )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = unseal(content) if isinstance(content, dict) else content
    except FileNotFoundError:
        raise FileError(f"no such tree file: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"not a readable JSON tree file: {path}\n  {error}") from None
    if isinstance(content, list):
        content = {"tree": content}
    if not isinstance(content, dict) or "tree" not in content:
        raise FileError(
            f"not a tree file: {path}, a JSON {type(content).__name__} without the key 'tree'\n"
            '  expected: {"tree": [[0, 1], [2, 3]]}'
        )
    return content


def gallery() -> tuple[str, ...]:
    """Names of the trees that come with tnreg, for ``load_tree``."""
    return tuple(sorted(path.stem for path in _gallery_folder().glob("*.json")))


def tree_to_json(tree: ModeTree) -> dict[str, Any]:
    """Return the tree as plain JSON values; the inverse of ``tree_from_json``."""
    plain = usual_names(tree.links, tree.nodes)
    pairs = enumerate(zip(tree.nodes, plain, strict=True))
    names = {i: _name_to_json(name) for i, (name, usual) in pairs if name != usual}
    shape = {} if tree.shape is None else {"shape": list(tree.shape)}
    if tree.heights[-1] > _NESTED_DEPTH:
        links = [list(below) or name for name, below in zip(tree.nodes, tree.links, strict=True)]
        by_position = {str(i): name for i, name in names.items()}
        return {"tree": {"links": links, "names": by_position}, **shape}
    nested: list[Any] = []
    for i, below in enumerate(tree.links):
        value: Any = [nested[c] for c in below] or tree.nodes[i]
        nested.append({"name": names[i], "children": value} if i in names else value)
    return {"tree": nested[-1], **shape}


def tree_from_json(content: Any, *, where: str = "JSON") -> ModeTree:
    """Rebuild a tree from what ``tree_to_json`` gave."""
    tree = content.get("tree") if isinstance(content, dict) else None
    try:
        if isinstance(tree, dict) and "links" in tree:
            links = [below if isinstance(below, list) else [] for below in tree["links"]]
            names: list[Node] = [None if isinstance(n, list) else n for n in tree["links"]]
            given = {int(i): _name_from_json(name) for i, name in tree.get("names", {}).items()}
            check_links(links)
        else:
            links, names, given = _flatten_json(tree)
        full = [given.get(i, name) for i, name in enumerate(usual_names(links, names))]
        if given and len(set(full)) < len(full):
            raise ValueError("two nodes have the same name")
    except TreeError:
        raise
    except Exception as error:
        raise FileError(
            f"not a tree: {where}\n  {type(error).__name__}: {error}\n"
            '  expected: {"tree": [[0, 1], [2, 3]]}, nested lists of mode numbers'
        ) from None
    shape = content.get("shape")
    if isinstance(tree, list) and not given:
        return ModeTree(tree, shape=shape)  # its errors speak of the lists that the user wrote
    return ModeTree._holding(*read_links(full, links, len(links) - 1), shape)


def _flatten_json(tree: Any) -> tuple[list[list[int]], list[Node], dict[int, Node]]:
    """Read nested lists and ``{"name": .., "children": ..}`` as links, modes at leaves, and given names."""
    links: list[list[int]] = []
    leaves: list[Node] = []
    given: dict[int, Node] = {}

    def visit(value: Any) -> int:
        named = isinstance(value, dict)
        inside = value["children"] if named else value
        below = [visit(child) for child in inside] if isinstance(inside, list) else []
        links.append(below)
        leaves.append(None if isinstance(inside, list) else inside)
        position = len(links) - 1
        if named and value["name"] is not None:
            given[position] = _name_from_json(value["name"])
        return position

    visit(tree)
    return links, leaves, given


def _name_to_json(name: Node, depth: int = 0) -> Any:
    if isinstance(name, tuple) and depth < LONGEST_CHAIN:
        return [_name_to_json(part, depth + 1) for part in name]
    if isinstance(name, str | int | float | bool) or name is None:
        return name
    raise TreeError(
        f"the interior node {in_a_line(name)} has a name that a file cannot hold.\n"
        f"  use strings, numbers or tuples of them (nested to {LONGEST_CHAIN} levels at most), "
        "e.g. networkx.relabel_nodes(graph, {...: 'left'})"
    )


def _name_from_json(name: Any) -> Node:
    return tuple(_name_from_json(part) for part in name) if isinstance(name, list) else name


def _gallery_folder() -> Path:
    inside = Path(__file__).parent / "gallery"  # in a wheel
    return inside if inside.is_dir() else Path(__file__).parents[2] / "trees"


def _check_shape(shape: Sequence[int], order: int) -> tuple[int, int]:
    try:
        height, width = shape
    except (TypeError, ValueError):
        raise TreeError(f"ModeTree: shape must be (height, width), found {shape!r}.") from None
    height, width = (check_integer(n, 1, "ModeTree: shape", TreeError) for n in (height, width))
    if height * width != order:
        raise TreeError(
            f"ModeTree: an image of {height} x {width} has {height * width} pixels, the tree {order} modes."
        )
    return height, width


def _rebuild(names: Any, links: Any, shape: Any = None) -> ModeTree:
    return ModeTree._holding(names, links, shape)


def _graph_of(names: Sequence[Node], links: Sequence[Sequence[int]]) -> nx.DiGraph[Any]:
    """Return the graph of these nodes, parents first, so that networkx draws and walks it from the root."""
    graph: nx.DiGraph[Any] = nx.DiGraph()
    for name, below in zip(reversed(names), reversed(links), strict=True):
        graph.add_node(name)
        graph.add_edges_from((name, names[c]) for c in below)
    return graph


def _join(nodes: list[Any]) -> Any:
    return nodes[0] if len(nodes) == 1 else nodes


def _merge(n: int, group: Callable[[list[Any]], list[list[Any]]]) -> list[Any]:
    """Join the nodes of a level by groups, level by level, until one is left."""
    level: list[Any] = list(range(n))
    while len(level) > 1:
        level = [_join(nodes) for nodes in group(level)]
    return level if n == 1 else level[0]
