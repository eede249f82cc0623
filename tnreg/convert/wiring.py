"""Tensors that share indices, from whatever library, read as a tree and made a factorization.

An index that three tensors or more share becomes a diagonal join, all others are bonds of full joins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from tnreg.algebra.arithmetic import scale
from tnreg.algebra.modes import contract_modes
from tnreg.errors import ShapeError, TreeError
from tnreg.factorizations.assembly import assemble, identity
from tnreg.factorizations.factorization import Factorization
from tnreg.trees.tree import ModeTree

# Names by which what ``network`` and ``to_quimb`` wrote is recognized.
ABOVE, INSIDE, ONES, COPY, BARE = "bond above ", " inside", "ones ", "copy ", "bare "


@dataclass(frozen=True)
class Part:
    """A tensor of a network."""

    names: list[str]  # the first one is for messages, and for its tree node if names are kept
    tensor: Tensor | None  # None for a root of ones and for bare leaves
    indices: list[Any]  # of its axes; tensors are wired where these are equal
    above: bool = True  # whether the last axis is marked as the bond above it, as tnreg does
    mark: str = ""  # "diagonal", "full" or "bare" if it is marked as such a node, "ones" as those of a root


def read_wiring(
    caller: str,
    parts: Sequence[Part],
    modes: Sequence[Any],
    root: str | None,
    hubs: Mapping[Any, str],
    ends: Mapping[Any, Sequence[int]] | None = None,
) -> Factorization:
    """Make a factorization of tensors that share indices.

    If all tensors but one at most have their bond above marked, the network is one of tnreg's: the tree,
    root and names are then those of the model that it was made from.

    ``modes`` are the indices of the modes; several tensors may share one. ``hubs`` are names of roots of
    ones by the index that they sum over. ``ends`` are the numbers of the tensors of an index, in the order
    of children; by default that of the tensors. The ``caller`` is named in errors.
    """
    if not parts or not modes:
        raise ShapeError(f"{caller}: the network has no modes; it is a number, or empty.")
    wiring = _Wiring(caller, parts, modes, ends or {})
    unmarked = [i for i, part in enumerate(parts) if not part.above]
    if root is None and len(unmarked) <= 1 and (len(parts) > 1 or parts[0].mark):
        return wiring.hang(wiring.find_root(unmarked, hubs), named=True)
    if root is None:
        return wiring.hang(wiring.choose_root(), named=False)
    called = [i for i, part in enumerate(parts) if root in part.names]
    if len(called) != 1:
        message = f"{caller}: the root must be one tensor; {len(called)} are called {root!r}."
        raise TreeError(message, argument="root")
    return wiring.hang(called[0], named=False)


class _Wiring:
    """A network, and the tree that is made of it.

    Nodes have the numbers of their tensors; those that are put in have negative ones. Modes that are no
    tensor's alone become bare leaves. Tensors without modes below them get modes of their own, which are
    summed over in the end.
    """

    def __init__(
        self, caller: str, parts: Sequence[Part], modes: Sequence[Any], ends: Mapping[Any, Any]
    ) -> None:
        self.caller = caller
        self.parts: list[Part] = []
        self.holders = {j: list(dict.fromkeys(ends[j])) for j in ends}  # index -> its tensors
        self.mode_of: dict[Any, int] = {}
        self.summed: dict[int, Tensor] = {}  # modes beyond those, and the vectors of ones for them
        self.links: dict[int, list[int]] = {}
        self.weights: dict[int, Tensor] = {}
        self.joins: dict[int, str] = {}
        self.leaves: dict[int, int] = {}
        for part in parts:
            self.add(part)
        for mode, j in enumerate(modes):
            own = j
            if len(self.holders[j]) > 1:
                own = object()
                self.add(Part([f"mode {mode}"], None, [own, j], mark="bare"))
            self.mode_of[own] = mode

    def add(self, part: Part) -> int:
        """Add a tensor and return its number."""
        if len(set(part.indices)) < len(part.indices):
            raise TreeError(loop(self.caller, part.names[0]))
        number = len(self.parts)
        self.parts.append(part)
        for j in part.indices:
            if number not in self.holders.setdefault(j, []):
                self.holders[j].append(number)
        return number

    def find_root(self, unmarked: Sequence[int], hubs: Mapping[Any, str]) -> int:
        """Return the number of the root of a network that tnreg made."""
        if not unmarked:  # a root of ones over the bond that is nobody's inner one
            inner = {j for part in self.parts for j in part.indices[:-1]}
            bond = next(p.indices[-1] for p in self.parts if p.indices[-1] not in inner)
            return self.add(Part([hubs.get(bond, "")], None, [bond]))
        root = self.parts[unmarked[0]]
        if root.mark == "ones":
            self.parts[unmarked[0]] = Part([hubs[root.indices[0]]], None, root.indices)
        return unmarked[0]

    def choose_root(self) -> int:
        """Return a tensor without modes, a new root of ones over a shared bond, or the last tensor."""
        free, others = list[int](), list[int]()
        for i, part in enumerate(self.parts):
            if part.mark == "bare":
                continue
            if self.mode_of.keys() & part.indices:
                others.append(i)
            elif len(part.indices) > 1 or any(len(self.holders[j]) > 2 for j in part.indices):
                free.append(i)
        if free:
            return min(reversed(free), key=lambda i: len(self.parts[i].indices))
        shared = [j for j, numbers in self.holders.items() if len(numbers) > 2]
        return self.add(Part([""], None, shared[-1:])) if shared else others[-1]

    def hang(self, root: int, *, named: bool) -> Factorization:
        """Hang everything below the root, and assemble the factorization."""
        visited = set[int]()
        waiting: list[tuple[int, list[Any]]] = [(root, [])]  # tensors and the bonds above them
        while waiting:
            i, above = waiting.pop()
            if i in visited:
                raise TreeError(loop(self.caller, self.parts[i].names[0]))
            visited.add(i)
            waiting += self.make_node(i, above)
        unseen = [part for i, part in enumerate(self.parts) if i not in visited]
        apart = [part.names[0] for part in unseen if part.indices]
        if apart:
            raise TreeError(
                f"{self.caller}: the network is not connected; {apart[:4]} cannot be reached from the root.\n"
                "  wire them with a bond of size 1, or convert every piece by itself"
            )
        model, order = assemble(root, self.links, self.weights, self.joins, self.leaves)
        if named:
            return _rename(model, [self.parts[i].names[0] if i >= 0 else "" for i in order])
        for number in unseen:
            assert number.tensor is not None
            model = scale(model, number.tensor.item())
        rest = contract_modes(model, self.summed) if self.summed else model
        assert isinstance(rest, Factorization)
        return rest

    def make_node(self, i: int, above: list[Any]) -> list[tuple[int, list[Any]]]:
        """Make a tensor a node of the tree; return the tensors below it with the bonds above them."""
        part = self.parts[i]
        below = {j: [c for c in self.holders[j] if c != i] for j in part.indices if j not in above}
        if part.mark == "bare":
            self.leaves[i] = self.mode_of[part.indices[0]]
            return []
        if part.tensor is not None:
            axes = [part.indices.index(j) for j in [*below, *above]]
            self.weights[i] = part.tensor.permute(axes)
        if above and len(below) < 2 and not any(below.values()) and not part.mark:
            self.weights[i] = self.weights[i].reshape(-1, self.weights[i].shape[-1])
            self.make_leaf(i, next(iter(below), None), self.weights[i][:, 0])
            return []
        first = next(iter(below.values()), [])
        tied = len(first) > 1 or part.tensor is None or part.mark == "diagonal"
        diagonal = len(below) == 1 and bool(first) and tied
        self.links[i], self.joins[i] = [], "diagonal" if diagonal else "full"
        for axis, (j, children) in enumerate(below.items()):
            apart = len(children) != 1 and not diagonal
            self.links[i] += [self.put_in(i, axis, j, children)] if apart else children
        return [(c, [j]) for j, children in below.items() for c in children]

    def put_in(self, i: int, axis: int, index: Any, children: list[int]) -> int:
        """Put a node below an axis of another: an identity that joins its children, or a bare leaf."""
        new, weight = -1 - len(self.links) - len(self.leaves), self.weights[i]
        if children:
            self.links[new], self.joins[new] = children, "diagonal"
            self.weights[new] = identity(weight.shape[axis], weight)
        else:
            self.make_leaf(new, index, weight.movedim(axis, 0).reshape(weight.shape[axis], -1)[:, 0])
        return new

    def make_leaf(self, i: int, index: Any, sample: Tensor) -> None:
        """Make a node the leaf of the mode that the index is, or of one that is summed over."""
        self.leaves[i] = self.mode_of.get(index, len(self.mode_of) + len(self.summed))
        if index not in self.mode_of:
            self.summed[self.leaves[i]] = torch.ones_like(sample)


def _rename(model: Factorization, names: Sequence[str]) -> Factorization:
    """Give interior nodes these names; where one is empty the node keeps its usual name."""
    tree = model.tree
    new = {
        node: name if below and name and name != str(node) else node
        for node, below, name in zip(tree.nodes, tree.links, names, strict=True)
    }
    renamed = ModeTree(nx.relabel_nodes(tree.graph, new))  # with its nodes in the same order
    network = replace(model.network, tree=renamed)
    return Factorization.holding(network, list(model.stacks))


def order_modes(caller: str, dangling: Sequence[Any], modes: Sequence[Any] | None) -> list[Any]:
    """Return what dangles in the order of the modes: as asked, or by the numbers in the names."""
    names = [str(getattr(index, "name", index)) for index in dangling]
    if modes is not None:
        by_name = dict(zip(names, dangling, strict=True))
        order = [by_name.get(mode, mode) if isinstance(mode, str) else mode for mode in modes]
        if len(order) != len(dangling) or any(order.count(j) != 1 for j in dangling):
            raise ShapeError(
                f"{caller}: modes must hold everything that dangles once.\n"
                f"  found:    {order!r}\n  expected: {names!r} in the order of the modes",
                argument="modes",
            )
        return order
    matches = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    numbers = [int(match[2]) if match else -1 for match in matches]
    if sorted(numbers) != list(range(len(names))) or len({m and m[1] for m in matches}) > 1:
        raise ShapeError(
            f"{caller}: which modes these are cannot be told from their names.\n"
            f"  found:    {names!r}\n"
            f"  expected: 'mode 0' to 'mode {len(names) - 1}', each once; or give modes=[..]",
            argument="modes",
        )
    return [dangling[numbers.index(n)] for n in range(len(names))]


def loop(caller: str, name: Any) -> str:
    """Return the message for a network with a loop."""
    return (
        f"{caller}: the network has a loop through {name!r}; a factorization is a tree.\n"
        "  flatten edges that run in parallel, split or contract others first"
    )
