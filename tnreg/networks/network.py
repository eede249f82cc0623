"""The tensor network of a factorization, without its numbers: which indices every weight has.

Every edge of the tree is an index. The edge below a leaf is its mode; the edge above a node is its
bond. Under a *full* join every child keeps a bond of its own; a *diagonal* join ties the bonds of
its children into one index that all of them and the node's weight share (a hyperedge).
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import OptionError, ShapeError
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree, tree_from_json, tree_to_json


@dataclass(frozen=True)
class Places:
    """For every node of a level a slot of a stacked tensor.

    Attributes:
        pairs: ``(stack, slot)`` for every node.
        span: The stack and its slots as a slice, if they are evenly spaced slots of one stack.
    """

    pairs: tuple[tuple[int, int], ...]
    span: tuple[int, slice] | None

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]]) -> Places:
        """Find the span of these pairs."""
        stack, first = pairs[0]
        step = pairs[1][1] - first if len(pairs) > 1 else 1
        even = step > 0 and all(p == (stack, first + k * step) for k, p in enumerate(pairs))
        span = (stack, slice(first, pairs[-1][1] + 1, step)) if even else None
        return cls(tuple(pairs), span)


@dataclass(frozen=True)
class Level:
    """Equal nodes, which one batched call can handle: of equal height, join, arity and shape.

    Attributes:
        positions: The nodes' positions in ``tree.nodes``, ascending.
        join: ``"leaf"``, ``"diagonal"`` or ``"full"``.
        shape: Shape of the weight of each of them.
        weight: Where the weights are among the model's ``stacks``; ``None`` at a root of ones.
        children: For every child where its result is: which level, counted from the leaves, and which
            slot of it.
        block: The level whose slots are the children of the first node, then those of the second, and so
            on, if there is one and a node has several children.
    """

    positions: tuple[int, ...]
    join: str
    shape: tuple[int, ...]
    weight: Places | None
    children: tuple[Places, ...]
    block: int | None


class Stacked:
    """Tensors ``(slots, ...)`` such as weights or results of levels, from which slots are picked.

    Slots that no slice reaches are unbound once for all picks: one backward instead of a full-size
    gradient for each. With gradients that holds for every pick but a whole tensor.
    """

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self.tensors = list(tensors)
        self._slots: dict[int, Sequence[Tensor]] = {}

    def append(self, tensor: Tensor) -> None:
        """Add the result of the next level, ``(nodes, ...)``."""
        self.tensors.append(tensor)

    def append_single(self, tensor: Tensor) -> None:
        """Add the result of a level of one node without the axis of nodes; only ``slot`` returns it."""
        self._slots[len(self.tensors)] = (tensor,)
        self.tensors.append(tensor)

    def slot(self, stack: int, slot: int) -> Tensor:
        """Return one slot, without the axis of slots."""
        if stack not in self._slots:
            self._slots[stack] = self.tensors[stack].unbind(0)
        return self._slots[stack][slot]

    def pick(self, places: Places) -> Tensor:
        """Return one slot for every node, ``(nodes, ...)``: a view where possible."""
        if places.span is not None:
            stack, slots = places.span
            tensor = self.tensors[stack]
            if len(places.pairs) == len(tensor):
                return tensor
            if not (tensor.requires_grad and torch.is_grad_enabled()):
                return tensor[slots]
        return torch.stack([self.slot(*pair) for pair in places.pairs])

    def children(self, level: Level) -> list[Tensor]:
        """Return for every child of a level's nodes its results, ``(nodes, ...)``."""
        if level.block is None:
            return [self.pick(child) for child in level.children]
        block = self.tensors[level.block]
        return list(block.reshape(len(level.positions), -1, *block.shape[1:]).unbind(1))


@dataclass(frozen=True, eq=False)
class Network:
    """Nodes and their indices, indices and their sizes.

    Tuples are in the order of ``tree.nodes``. Equal networks compare and hash equal, so that plans
    can be cached by them. Build one with ``Network.build``, which checks its arguments.

    Attributes:
        tree: The mode tree.
        sizes: Size of every mode.
        bonds: Size of the bond above every node; 1 at the root, which has none.
        joins: ``"leaf"``, ``"diagonal"`` or ``"full"`` for every node.
        root_ones: Whether the root's weight is fixed to ones and so not part of the network.
    """

    tree: ModeTree
    sizes: tuple[int, ...]
    bonds: tuple[int, ...]
    joins: tuple[str, ...]
    root_ones: bool

    @classmethod
    def build(
        cls,
        tree: ModeTree,
        sizes: Sequence[int] | int,
        ranks: int | Mapping[Node, int],
        *,
        join: str | Mapping[Node, str] = "diagonal",
        root: str = "trained",
    ) -> Network:
        """Check sizes, ranks and joins against the tree.

        Raises:
            ShapeError: A size is missing, not a positive integer, or siblings under a diagonal join
                have different bonds.
            OptionError: An unknown join or root.
        """
        checked = check_sizes(sizes, tree.order)
        joins = _check_joins(tree, join)
        if root not in ("trained", "ones"):
            raise OptionError(
                f"unknown root {root!r}; write root='trained' or root='ones'.", argument="root"
            )
        if root == "ones" and joins[-1] != "diagonal":
            raise OptionError(
                "root='ones' needs a diagonal join at the root; with a full join the root's weight is "
                "the core tensor.\n  write root='trained', or join={..., tree.root: 'diagonal'}",
                argument="root",
            )
        bonds = _check_ranks(tree, ranks)
        for i, below in enumerate(tree.links):
            if joins[i] == "diagonal" and len({bonds[c] for c in below}) > 1:
                found = {tree.nodes[c]: bonds[c] for c in below}
                raise ShapeError(
                    f"the children of node {tree.nodes[i]!r} have different ranks under a diagonal join.\n"
                    f"  found:    {found}\n"
                    "  expected: one rank for all of them, as they share the bond; or join='full' there",
                    argument="ranks",
                )
        return cls(tree, checked, bonds, joins, root == "ones")

    def to_json(self) -> dict[str, Any]:
        """Return the network as plain JSON values; the inverse of ``from_json``."""
        root = "ones" if self.root_ones else "trained"
        about = {"sizes": self.sizes, "bonds": self.bonds, "joins": self.joins, "root": root}
        return {**tree_to_json(self.tree), **about}

    @classmethod
    def from_json(cls, content: Any) -> Network:
        """Rebuild a network from what ``to_json`` gave; whatever it raises, the content is another."""
        tree = tree_from_json(content)
        bonds = dict(zip(tree.nodes[:-1], content["bonds"][:-1], strict=True))
        joins = zip(tree.nodes, content["joins"], strict=True)
        join = {node: kind for node, kind in joins if kind != "leaf"}
        return cls.build(tree, content["sizes"], bonds, join=join, root=content["root"])

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        return (self.tree, self.sizes, self.bonds, self.joins, self.root_ones)

    @cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Network) and self._hash == other._hash and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    @property
    def named_bonds(self) -> dict[Node, int]:
        """``{non-root node: size of the bond above it}``, as ``build`` takes them."""
        return dict(zip(self.tree.nodes[:-1], self.bonds[:-1], strict=True))

    @property
    def named_joins(self) -> dict[Node, str]:
        """``{interior node: "diagonal" or "full"}``, as ``build`` takes them."""
        pairs = zip(self.tree.nodes, self.joins, strict=True)
        return {node: join for node, join in pairs if join != "leaf"}

    @cached_property
    def weighted(self) -> range:
        """Positions of the nodes that have a weight: all, or all but the root if it is fixed to ones."""
        return range(len(self.tree.nodes) - self.root_ones)

    def shape(self, position: int) -> tuple[int, ...]:
        """Shape of the weight at a position of ``tree.nodes``."""
        above = () if position == len(self.tree.nodes) - 1 else (self.bonds[position],)
        return tuple(self.index_size(i) for i in self.inner(position)) + above

    def inner(self, position: int) -> tuple[int, ...]:
        """Return the indices of a node's weight on the side of its children: its mode at a leaf."""
        below = self.tree.links[position]
        if not below:
            return (self.tree.nodes[position],)  # type: ignore[return-value]
        if self.joins[position] == "diagonal":
            return (self.tree.order + below[0],)
        return tuple(self.tree.order + c for c in below)

    @cached_property
    def above(self) -> tuple[int | None, ...]:
        """Index above every node: equal for siblings under a diagonal join; ``None`` at the root."""
        out: list[int | None] = [None] * len(self.tree.nodes)
        for i, below in enumerate(self.tree.links):
            for c in below:
                out[c] = self.tree.order + (below[0] if self.joins[i] == "diagonal" else c)
        return tuple(out)

    def indices(self, position: int) -> tuple[int, ...]:
        """All indices of a node's weight, in the order of its axes."""
        above = self.above[position]
        return self.inner(position) + (() if above is None else (above,))

    def index_size(self, index: int) -> int:
        """Size of an index: modes are ``0..N-1``, bonds follow."""
        order = self.tree.order
        return self.sizes[index] if index < order else self.bonds[index - order]

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """All nodes in groups of equal ones, the leaves first, the root last."""
        return self.split_levels()

    @cached_property
    def stacks(self) -> tuple[Level, ...]:
        """The levels that have weights, in the order of the model's parameters: by their first node."""
        weighted = [level for level in self.levels if level.weight is not None]
        return tuple(sorted(weighted, key=lambda level: level.positions[0]))

    @cached_property
    def slots(self) -> dict[int, tuple[int, int]]:
        """Position -> (which stack, which slot of it)."""
        groups = self._equal_nodes()
        return {p: (s, k) for s, members in enumerate(groups) for k, p in enumerate(members)
                if p in self.weighted}  # fmt: skip

    def split_levels(self, kinds: Sequence[Hashable] | None = None) -> tuple[Level, ...]:
        """Group nodes that are equal and of one kind, the leaves first, the root last.

        Args:
            kinds: What else equal nodes agree in, for every position.
        """
        tree, levels = self.tree, list[Level]()
        places: dict[int, tuple[int, int]] = {}  # position -> (which level, which slot of it)
        groups = self._equal_nodes(kinds)
        for positions in sorted(groups, key=lambda group: (tree.heights[group[0]], group[0])):
            below = [[places[c] for c in tree.links[i]] for i in positions]
            block = None
            if len(below[0]) > 1:
                flat, first = [place for pairs in below for place in pairs], below[0][0][0]
                if flat == [(first, slot) for slot in range(len(levels[first].positions))]:
                    block = first
            weight = None
            if positions[0] in self.slots:
                weight = Places.of([self.slots[i] for i in positions])
            children = tuple(Places.of(pairs) for pairs in zip(*below, strict=True))
            first = positions[0]
            levels.append(
                Level(
                    tuple(positions), self.joins[first], self.shape(first), weight, children, block
                )
            )
            places |= {p: (len(levels) - 1, slot) for slot, p in enumerate(positions)}
        return tuple(levels)

    def _equal_nodes(self, kinds: Sequence[Hashable] | None = None) -> list[list[int]]:
        """Positions of equal nodes, in the order of the first of each group."""
        groups: dict[Hashable, list[int]] = {}
        for i, below in enumerate(self.tree.links):
            key = (self.tree.heights[i], self.joins[i], len(below), self.shape(i))
            groups.setdefault((key, kinds and kinds[i]), []).append(i)
        return list(groups.values())

    def __str__(self) -> str:
        lines = [f"network of {len(self.weighted)} weights over {self.tree!r}"]
        for i in self.weighted:
            axes = ", ".join(self._axis(index) for index in self.indices(i))
            lines.append(f"  {self.tree.nodes[i]!s}: {self.joins[i]} [{axes}]")
        return "\n".join(lines)

    def _axis(self, index: int) -> str:
        order = self.tree.order
        if index < order:
            return f"mode {index}: {self.sizes[index]}"
        return f"bond {index - order}: {self.index_size(index)}"


def check_sizes(sizes: Sequence[int] | int, order: int) -> tuple[int, ...]:
    """Return the mode sizes, one for each of ``order`` modes; an integer is the size of all of them."""
    if _is_size(sizes):
        return (int(sizes),) * order  # type: ignore[arg-type]
    try:
        listed: tuple[Any, ...] = tuple(sizes)  # type: ignore[arg-type]
    except TypeError:
        listed = (sizes,)
    if len(listed) != order:
        raise ShapeError(
            f"{len(listed)} mode sizes for a tree over {order} modes.\n"
            f"  found:    {listed}\n  expected: one size for each of the modes 0..{order - 1}",
            argument="sizes",
        )
    for mode, size in enumerate(listed):
        if not _is_size(size):
            raise ShapeError(
                f"the size of mode {mode} must be a positive integer, found {size!r}.",
                argument="sizes",
            )
    return tuple(int(size) for size in listed)


def _check_joins(tree: ModeTree, join: str | Mapping[Node, str]) -> tuple[str, ...]:
    if not isinstance(join, str | Mapping):
        raise OptionError(
            f"join must be 'diagonal', 'full' or {{interior node: either}}, found {join!r}.",
            argument="join",
        )
    given = {node: join for node in tree.interior} if isinstance(join, str) else dict(join)
    for node, kind in given.items():
        if kind not in ("diagonal", "full"):
            raise OptionError(
                f"unknown join {kind!r} at node {node!r}; write 'diagonal' or 'full'.",
                argument="join",
            )
        if not tree.links[tree.position(node)]:
            raise OptionError(
                f"node {node!r} is a leaf and joins nothing; name interior nodes only.",
                argument="join",
            )
    return tuple(
        given.get(name, "diagonal") if below else "leaf"
        for name, below in zip(tree.nodes, tree.links, strict=True)
    )


def _check_ranks(tree: ModeTree, ranks: int | Mapping[Node, int]) -> tuple[int, ...]:
    names = tree.nodes[:-1]
    if not isinstance(ranks, Mapping):
        if not _is_size(ranks):
            raise ShapeError(
                f"ranks must be a positive integer or {{non-root node: rank}}, found {ranks!r}.",
                argument="ranks",
            )
        return (int(ranks),) * len(names) + (1,)
    for node in ranks:
        if tree.position(node) == len(names):
            raise ShapeError(
                f"the root {node!r} has no bond above it; leave it out of ranks.", argument="ranks"
            )
        if not _is_size(ranks[node]):
            raise ShapeError(
                f"the rank at node {node!r} must be a positive integer, found {ranks[node]!r}.",
                argument="ranks",
            )
    missing = [name for name in names if name not in ranks]
    if missing:
        raise ShapeError(
            f"ranks lack the bond above {len(missing)} of {len(names)} non-root nodes: {missing[:8]}.\n"
            "  give one integer for all of them, or every non-root node its own",
            argument="ranks",
        )
    return (*(int(ranks[name]) for name in names), 1)


def _is_size(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and operator.index(value) >= 1
    except TypeError:  # no integer; an array of several numbers lands here as well
        return False
