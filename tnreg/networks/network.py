"""The tensor network of a factorization, without its numbers: which indices every weight has.

Every edge of the tree is an index. The edge below a leaf is its mode; the edge above a node is its
bond. Under a *full* join every child keeps a bond of its own; a *diagonal* join ties the bonds of
its children into one index that all of them and the node's weight share (a hyperedge).

A leaf may be *bare*: it has no weight, and the edge above it is its mode itself.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import OptionError, ShapeError, blame, plain_number
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree, tree_from_json, tree_to_json


@dataclass(frozen=True)
class Places:
    """For every node of a level ``(stack, slot)``; as a slice if these are evenly spaced in one stack."""

    pairs: tuple[tuple[int, int], ...]
    span: tuple[int, slice] | None

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]]) -> Places:
        """Find the slice."""
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
        join: ``"leaf"``, ``"bare"``, ``"diagonal"`` or ``"full"``.
        shape: Shape of the weight of each of them; of the identity that it stands for at a bare leaf.
        weight: Where the weights are among the ``stacks``; ``None`` at bare leaves and a root of ones.
        bare: Which children are bare leaves, by their numbers.
        children: For every child the levels, counted from the leaves, and slots of its results.
        block: The level whose slots are all children of the first node, then of the second, and so
            on, if there is one and a node has several children.
    """

    positions: tuple[int, ...]
    join: str
    shape: tuple[int, ...]
    weight: Places | None
    bare: tuple[int, ...]
    children: tuple[Places, ...]
    block: int | None


class Stacked:
    """Tensors ``(slots, ...)`` such as weights or results of levels, from which slots are picked.

    With gradients a tensor is unbound once for all picks of less than the whole: one backward instead of
    a full-size gradient for each.
    """

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self.tensors = list(tensors)
        self._slots: dict[int, Sequence[Tensor]] = {}

    def append(self, tensor: Tensor, *, single: bool = False) -> None:
        """Add a level's ``(nodes, ...)``; a ``single`` node's lacks that axis and is for ``slot`` alone."""
        if single:
            self._slots[len(self.tensors)] = (tensor,)
        self.tensors.append(tensor)

    def slot(self, stack: int, slot: int) -> Tensor:
        """Return one slot, without the axis of slots."""
        if stack not in self._slots:
            whole = self.tensors[stack]
            self._slots[stack] = (whole.squeeze(0),) if len(whole) == 1 else whole.unbind(0)
        return self._slots[stack][slot]

    def pick(self, places: Places) -> Tensor:
        """Return one slot for every node, ``(nodes, ...)``: a view where possible."""
        if places.span is not None:
            stack, slots = places.span
            tensor = self.tensors[stack]
            if len(places.pairs) == tensor.shape[0]:
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


@dataclass(frozen=True)
class Network:
    """Nodes and their indices, indices and their sizes.

    Tuples are in the order of ``tree.nodes``. Plans are cached by networks. ``Network.build`` checks its
    arguments.

    Attributes:
        bonds: Size of the bond above every node, of its mode at a bare leaf; 1 at the root, which has none.
        joins: ``"leaf"``, ``"bare"`` (a leaf without a weight), ``"diagonal"`` or ``"full"`` for every node.
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
        leaves: str | Mapping[int, str] = "weights",
    ) -> Network:
        """Check sizes, ranks, joins and leaves against the tree.

        Raises:
            ShapeError: A size is missing, not a positive integer, or siblings under a diagonal join
                have different bonds.
            OptionError: An unknown join, root or kind of leaf, or no weights at all.
        """
        checked, joins = check_sizes(sizes, tree.order), _check_joins(tree, join, leaves)
        with blame("root"):
            if root not in ("trained", "ones"):
                raise OptionError(f"unknown root {root!r}; write root='trained' or root='ones'.")
            if root == "ones" and joins[-1] != "diagonal":
                raise OptionError(
                    "root='ones' needs a diagonal join at the root; with a full join the root's weight is "
                    "the core tensor.\n  write root='trained', or join={..., tree.root: 'diagonal'}"
                )
            if root == "ones" and all(joins[c] == "bare" for c in tree.links[-1]):
                raise OptionError(
                    "root='ones' above bare leaves alone leaves no weights; write root='trained', or give a "
                    "leaf a weight."
                )
        return cls(tree, checked, _check_ranks(tree, checked, ranks, joins), joins, root == "ones")

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
        kinds = dict(zip(tree.nodes, content["joins"], strict=True))
        join = {node: kind for node, kind in kinds.items() if kind not in ("leaf", "bare")}
        leaves = {node: "bare" for node, kind in kinds.items() if kind == "bare"}
        sizes, root = content["sizes"], content["root"]
        return cls.build(tree, sizes, bonds, join=join, root=root, leaves=leaves)  # type: ignore[arg-type]

    @cached_property
    def _hash(self) -> int:
        return hash((self.tree, self.sizes, self.bonds, self.joins, self.root_ones))

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        return self  # a frozen value

    @property
    def named_bonds(self) -> dict[Node, int]:
        """``{non-root node: size of the bond above it}``, as ``build`` takes them."""
        return dict(zip(self.tree.nodes[:-1], self.bonds[:-1], strict=True))

    @property
    def named_joins(self) -> dict[Node, str]:
        """``{interior node: "diagonal" or "full"}``, as ``build`` takes them."""
        pairs = zip(self.tree.nodes, self.joins, strict=True)
        return {node: join for node, join in pairs if join not in ("leaf", "bare")}

    @property
    def named_leaves(self) -> dict[int, str]:
        """``{mode: "weights" or "bare"}``, as ``build`` takes them."""
        leaves = ((mode, self.joins[self.tree.position(mode)]) for mode in self.tree.leaves)
        return {mode: "bare" if kind == "bare" else "weights" for mode, kind in leaves}

    @cached_property
    def bare(self) -> frozenset[int]:
        """Positions of the bare leaves."""
        return frozenset(i for i, kind in enumerate(self.joins) if kind == "bare")

    @cached_property
    def copies(self) -> tuple[int, ...]:
        """Positions of bare leaves under a diagonal join after its first: several modes, one index."""
        pairs = zip(self.tree.links, self.joins, strict=True)
        lists = ([c for c in below if c in self.bare] for below, join in pairs if join == "diagonal")
        return tuple(c for bare in lists for c in bare[1:])

    @cached_property
    def weighted(self) -> tuple[int, ...]:
        """Positions of the nodes that have a weight: all but bare leaves and a root that is fixed to ones."""
        count = len(self.tree.nodes) - self.root_ones
        return tuple(i for i in range(count) if i not in self.bare)

    def shape(self, position: int) -> tuple[int, ...]:
        """Shape of the weight at a position of ``tree.nodes``."""
        above = () if position == len(self.tree.nodes) - 1 else (self.bonds[position],)
        return tuple(self.index_size(i) for i in self.inner(position)) + above

    def inner(self, position: int) -> tuple[int, ...]:
        """Return the indices of a node's weight on the side of its children: its mode at a leaf."""
        below = self.tree.links[position]
        if not below:
            return (self.tree.nodes[position],)  # type: ignore[return-value]
        below = below[:1] if self.joins[position] == "diagonal" else below
        return tuple(self.above[c] for c in below)  # type: ignore[misc]

    @cached_property
    def above(self) -> tuple[int | None, ...]:
        """Index above every node: equal for siblings under a diagonal join; ``None`` at the root.

        Above a bare leaf, and its siblings under a diagonal join, it is the mode (of the first such leaf).
        """
        above: list[int | None] = [None] * len(self.tree.nodes)
        for i, below in enumerate(self.tree.links):
            own: list[Any] = [self.tree.nodes[c] if c in self.bare else self.tree.order + c for c in below]
            if self.joins[i] == "diagonal":
                own = [next((own[k] for k, c in enumerate(below) if c in self.bare), own[0])] * len(own)
            for c, index in zip(below, own, strict=True):
                above[c] = index
        return tuple(above)

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
        weighted = set(self.weighted)
        groups = [members for members in self._equal_nodes() if members[0] in weighted]
        return {p: (s, k) for s, members in enumerate(groups) for k, p in enumerate(members)}

    def split_levels(self, kinds: Sequence[Hashable] | None = None) -> tuple[Level, ...]:
        """Group nodes that are equal, in ``kinds`` (one for every position) as well; leaves come first."""
        tree, levels = self.tree, list[Level]()
        places: dict[int, tuple[int, int]] = {}  # position -> (which level, which slot of it)
        groups = self._equal_nodes(kinds)
        for positions in sorted(groups, key=lambda group: (tree.heights[group[0]], group[0])):
            first = positions[0]
            below = [[places[c] for c in tree.links[i]] for i in positions]
            children = tuple(Places.of(pairs) for pairs in zip(*below, strict=True))
            block = None
            if len(children) > 1:
                flat, source = [place for pairs in below for place in pairs], below[0][0][0]
                if flat == [(source, slot) for slot in range(len(levels[source].positions))]:
                    block = source
            has_weight = first in self.slots
            weight = Places.of([self.slots[i] for i in positions]) if has_weight else None
            join, shape = self.joins[first], self.shape(first)
            bare = tuple(k for k, c in enumerate(tree.links[first]) if c in self.bare)
            levels.append(Level(tuple(positions), join, shape, weight, bare, children, block))
            places |= {p: (len(levels) - 1, slot) for slot, p in enumerate(positions)}
        return tuple(levels)

    def _equal_nodes(self, kinds: Sequence[Hashable] | None = None) -> list[list[int]]:
        """Positions of equal nodes, in the order of the first of each group."""
        groups: dict[Hashable, list[int]] = {}
        for i, key in enumerate(self._keys):
            groups.setdefault((key, kinds and kinds[i]), []).append(i)
        return list(groups.values())

    @cached_property
    def _keys(self) -> list[Hashable]:
        """What equal nodes have in common, by position."""
        tree, own = self.tree, list[Hashable]()
        for i, below in enumerate(tree.links):
            bare = tuple(k for k, c in enumerate(below) if c in self.bare)
            own.append((tree.heights[i], self.joins[i], len(below), self.shape(i), bare))
        return own

    def __str__(self) -> str:
        lines = [f"network of {len(self.weighted)} weights over {self.tree!r}"]
        order = self.tree.order
        for i in self.weighted:
            names = [f"mode {k}" if k < order else f"bond {k - order}" for k in self.indices(i)]
            axes = zip(names, self.shape(i), strict=True)
            shape = ", ".join(f"{name}: {size}" for name, size in axes)
            lines.append(f"  {self.tree.nodes[i]!s}: {self.joins[i]} [{shape}]")
        return "\n".join(lines)


@blame("sizes")
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
            f"  found:    {listed}\n  expected: one size for each of the modes 0..{order - 1}"
        )
    return tuple(_check_size(n, f"the size of mode {mode}") for mode, n in enumerate(listed))


def _check_joins(
    tree: ModeTree, join: str | Mapping[Node, str], leaves: str | Mapping[int, str]
) -> tuple[str, ...]:
    """Return what every node is: a leaf, a bare one, or the kind of its join."""
    joins = _check_interior(tree, join)
    with blame("leaves"):
        kinds = leaves if isinstance(leaves, Mapping) else dict.fromkeys(tree.leaves, leaves)
        for mode, kind in kinds.items():
            if kind not in ("weights", "bare"):
                raise OptionError(f"unknown kind {kind!r} of leaf {mode!r}; write 'weights' or 'bare'.")
            if tree.links[tree.position(mode)]:
                raise OptionError(f"node {mode!r} is no leaf; name modes only, 0 to {tree.order - 1}.")
    names = zip(tree.nodes, tree.links, strict=True)
    bare = {mode: "bare" for mode, kind in kinds.items() if kind == "bare"}
    return tuple(
        joins.get(name, "diagonal") if below else bare.get(name, "leaf")  # type: ignore[call-overload]
        for name, below in names
    )


@blame("join")
def _check_interior(tree: ModeTree, join: str | Mapping[Node, str]) -> dict[Node, str]:
    if not isinstance(join, str | Mapping):
        raise OptionError(f"join must be 'diagonal', 'full' or {{interior node: either}}, found {join!r}.")
    joins = dict.fromkeys(tree.interior, join) if isinstance(join, str) else dict(join)
    for node, kind in joins.items():
        if kind not in ("diagonal", "full"):
            raise OptionError(f"unknown join {kind!r} at node {node!r}; write 'diagonal' or 'full'.")
        if not tree.links[tree.position(node)]:
            raise OptionError(f"node {node!r} is a leaf and joins nothing; name interior nodes only.")
    return joins


@blame("ranks")
def _check_ranks(
    tree: ModeTree, sizes: tuple[int, ...], ranks: int | Mapping[Node, int], joins: Sequence[str]
) -> tuple[int, ...]:
    names = tree.nodes[:-1]
    tied: dict[Node, int] = {}  # bonds that are a mode
    for i, below in enumerate(tree.links):
        modes = {c: sizes[tree.nodes[c]] for c in below if joins[c] == "bare"}  # type: ignore[call-overload]
        for c in (below if joins[i] == "diagonal" else modes) if modes else ():
            tied[tree.nodes[c]] = modes.get(c, next(iter(modes.values())))
    if not isinstance(ranks, Mapping):
        each = _check_size(ranks, "ranks", " or {non-root node: rank}")
        ranks = dict.fromkeys(names, each) | tied
    else:
        for node in tied.keys() & ranks.keys():
            if ranks[node] != tied[node]:
                raise ShapeError(
                    f"the bond above node {node!r} is the mode of a bare leaf, of size {tied[node]}.\n"
                    f"  found:    {ranks[node]!r}\n  expected: {tied[node]}, or leave it out of ranks"
                )
        ranks = {**tied, **ranks}
    for node in ranks:
        if tree.position(node) == len(names):
            raise ShapeError(f"the root {node!r} has no bond above it; leave it out of ranks.")
        _check_size(ranks[node], f"the rank at node {node!r}")
    missing = [name for name in names if name not in ranks]
    if missing:
        raise ShapeError(
            f"ranks lack the bond above {len(missing)} of {len(names)} non-root nodes: {missing[:8]}.\n"
            "  give one integer for all of them, or every non-root node its own"
        )
    for i, below in enumerate(tree.links):
        bonds = {tree.nodes[c]: ranks[tree.nodes[c]] for c in below}
        if joins[i] == "diagonal" and len(set(bonds.values())) > 1:
            raise ShapeError(
                f"the children of node {tree.nodes[i]!r} have different ranks under a diagonal join.\n"
                f"  found:    {bonds}\n"
                "  expected: one rank for all of them, as they share the bond; or join='full' there"
            )
    return (*(int(ranks[name]) for name in names), 1)


def _check_size(value: Any, what: str, alternative: str = "") -> int:
    if not _is_size(value):
        raise ShapeError(f"{what} must be a positive integer{alternative}, found {value!r}.")
    return int(value)


def _is_size(value: Any) -> bool:
    try:
        return operator.index(plain_number(value)) >= 1
    except (TypeError, ValueError):
        return False
