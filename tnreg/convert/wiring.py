"""Read as a tree: tensors that share indices, whatever library they came from, made a factorization.

Which tensor joins which is told by the indices they share; a tensor, or a bond that several share, is taken
as the root, and the tree follows from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from tnreg.errors import ShapeError, TreeError
from tnreg.factorizations.assembly import assembled
from tnreg.factorizations.factorization import Factorization
from tnreg.trees.tree import ModeTree


@dataclass
class Part:
    """A tensor of a network; without a name if it is nothing but the ones of a root."""

    name: str
    tensor: Tensor
    indices: list[Any]


@dataclass(frozen=True)
class SummedBond:
    """A root that is no tensor: the bond that it sums over, and its name if known."""

    bond: Any
    name: str | None = None


def read_wiring(
    caller: str,
    given: Sequence[Part],
    modes: Sequence[Any],
    ends: Mapping[Any, Sequence[int]],
    root: int | SummedBond | None,
    inside: set[int],
    named: bool,
) -> Factorization:
    """The factorization of tensors that share indices.

    Args:
        caller: For messages.
        given: The tensors.
        modes: The index of every mode; other tensors may share it.
        ends: Who has an index, in the order of children, where that is not the order of the tensors.
        root: Which tensor, or bond, is the root; ``None`` to choose one.
        inside: Tensors above one other that are diagonal joins, not full ones.
        named: Whether interior nodes are called like their tensors.
    """
    without = isinstance(root, SummedBond)
    parts = {i: part for i, part in enumerate(given) if part.name or not without}
    if not parts or not modes:
        raise ShapeError(f"{caller}: the network has no modes; it is a number, or empty.")
    held_by = _holders(caller, parts, ends)
    fresh = count(len(given))
    mode_of = _modes_of(parts, held_by, modes, fresh)
    summed = root.bond if isinstance(root, SummedBond) else None
    for j, found in held_by.items():  # a CopyNode of one axis sums
        if len(found) == 1 and j not in mode_of and j != summed:
            part = parts[found[0]]
            part.tensor = part.tensor.sum(part.indices.index(j))
            part.indices.remove(j)
    _absorb_vectors(parts, held_by, mode_of, root, everywhere=False)
    if root is None:
        root = _choose_root(parts, held_by, mode_of)
    _absorb_vectors(parts, held_by, mode_of, root, everywhere=True)

    top = next(fresh) if isinstance(root, SummedBond) else root
    tree = _Hung(caller, parts, held_by, mode_of, inside, fresh)
    tree.hang(top, root.bond if isinstance(root, SummedBond) else None)
    apart = [part.name for i, part in parts.items() if i not in tree.seen]
    if apart:
        raise TreeError(
            f"{caller}: the network is not connected; {apart[:4]} cannot be reached from the root.\n"
            "  wire them with a bond of size 1, or convert every piece by itself"
        )
    model, order = assembled(top, tree.links, tree.held, tree.kinds, tree.leaves)
    if not named:
        return model
    called = {i: part.name for i, part in parts.items()}
    if isinstance(root, SummedBond) and root.name is not None:
        called[top] = root.name
    return _renamed(model, [called.get(i) for i in order])


def _holders(
    caller: str, parts: Mapping[int, Part], ends: Mapping[Any, Sequence[int]]
) -> dict[Any, list[int]]:
    """Index -> the tensors that have it."""
    held_by: dict[Any, list[int]] = {j: list(dict.fromkeys(found)) for j, found in ends.items()}
    for i, part in parts.items():
        if len(set(part.indices)) < len(part.indices):
            raise TreeError(loop(caller, part.name))
        for j in part.indices:
            if i not in held_by.setdefault(j, []):
                held_by[j].append(i)
    return held_by


def _modes_of(
    parts: dict[int, Part],
    held_by: dict[Any, list[int]],
    modes: Sequence[Any],
    fresh: Iterator[int],
) -> dict[Any, int]:
    """Index -> mode; where several tensors share a mode's index, an identity of its own is put in."""
    mode_of: dict[Any, int] = {}
    shared = {j for j in modes if len(held_by[j]) > 1 or list(modes).count(j) > 1}
    for mode, j in enumerate(modes):
        if j not in shared:
            mode_of[j] = mode
            continue
        sample, k, own = parts[held_by[j][0]], next(fresh), object()
        eye = _identity(sample.tensor.shape[sample.indices.index(j)], sample.tensor)
        parts[k] = Part(f"mode {mode}", eye, [own, j])
        held_by[j].append(k)
        held_by[own], mode_of[own] = [k], mode
    return mode_of


@dataclass
class _Hung:
    """Tensors hung below a root: children, weights, joins and modes by number, as for ``assembled``."""

    caller: str
    parts: Mapping[int, Part]
    held_by: Mapping[Any, Sequence[int]]
    mode_of: Mapping[Any, int]
    inside: set[int]
    fresh: Iterator[int]
    links: dict[int, list[int]] = field(default_factory=dict)
    held: dict[int, Tensor] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    leaves: dict[int, int] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    waiting: list[tuple[int, Any]] = field(default_factory=list)  # tensors and the bonds above them

    def hang(self, top: int, bond: Any) -> None:
        """Everything that can be reached, below a tensor, or below a root of ones over this bond."""
        if bond is None:
            self.waiting.append((top, None))
        else:
            self._tie(top, bond, self.held_by[bond])
        while self.waiting:
            i, above = self.waiting.pop()
            if i in self.seen:
                raise TreeError(loop(self.caller, self.parts[i].name))
            self.seen.add(i)
            self._hang_one(i, above)

    def _hang_one(self, i: int, above: Any) -> None:
        part = self.parts[i]
        rest = [j for j in part.indices if above is None or j != above]
        axes = [part.indices.index(j) for j in rest + ([] if above is None else [above])]
        self.held[i] = part.tensor.permute(axes)
        if above is not None and len(rest) == 1 and rest[0] in self.mode_of:
            self.leaves[i] = self.mode_of[rest[0]]
            return
        self.links[i], self.kinds[i] = [], "full"
        for j, size in zip(rest, self.held[i].shape, strict=False):
            others = [c for c in self.held_by[j] if c != i]
            if j in self.mode_of:
                k = next(self.fresh)
                self.held[k], self.leaves[k] = _identity(size, part.tensor), self.mode_of[j]
                self.links[i].append(k)
            elif len(rest) == 1 and (len(others) > 1 or i in self.inside):
                self._tie(i, j, others)
            elif len(others) == 1:
                self.links[i] += others
                self.waiting.append((others[0], j))
            else:  # what is tied hangs below a node of its own
                k = next(self.fresh)
                self.held[k] = _identity(size, part.tensor)
                self._tie(k, j, others)
                self.links[i].append(k)

    def _tie(self, i: int, bond: Any, below: Sequence[int]) -> None:
        self.links[i], self.kinds[i] = list(below), "diagonal"
        self.waiting.extend((c, bond) for c in below)


def _absorb_vectors(
    parts: dict[int, Part],
    held_by: dict[Any, list[int]],
    mode_of: Mapping[Any, int],
    root: int | SummedBond | None,
    *,
    everywhere: bool,
) -> None:
    """Multiply tensors without modes and with one bond at most into neighbours.

    ``everywhere``: those at bonds of three tensors or more as well.
    """
    summed = root.bond if isinstance(root, SummedBond) else None
    left = list(parts)
    while left:
        i = left.pop()
        part = parts.get(i)
        if part is None or i == root or len(part.indices) > 1 or len(parts) == 1:
            continue
        if part.indices and part.indices[0] in mode_of:
            continue
        if not part.indices:
            target = next(k for k in parts if k != i)
            bond, shape = None, list[int]()
        else:
            bond = part.indices[0]
            if len(held_by[bond]) == 1 or (len(held_by[bond]) > 2 and not everywhere):
                continue
            target = next(k for k in held_by[bond] if k != i)
            shape = [-1 if j == bond else 1 for j in parts[target].indices]
            held_by[bond].remove(i)
        other = parts[target]
        other.tensor = other.tensor * part.tensor.reshape(shape)
        if bond is not None and len(held_by[bond]) == 1 and bond != summed:
            other.tensor = other.tensor.sum(other.indices.index(bond))
            other.indices.remove(bond)
            del held_by[bond]
        del parts[i]
        left.append(target)


def _choose_root(
    parts: Mapping[int, Part], held_by: Mapping[Any, Sequence[int]], mode_of: Mapping[Any, int]
) -> int | SummedBond:
    free = [i for i, part in parts.items() if part.indices and not mode_of.keys() & part.indices]
    if free:
        return min(reversed(free), key=lambda i: len(parts[i].indices))
    tied = [j for j, found in held_by.items() if len(found) > 2]
    return SummedBond(tied[-1]) if tied else max(parts)


def _renamed(model: Factorization, names: Sequence[str | None]) -> Factorization:
    """With these names for the interior nodes; ``None`` for the usual one."""
    tree = model.tree
    called = {
        node: node if not below or name is None or name == str(node) else name
        for node, below, name in zip(tree.nodes, tree.links, names, strict=True)
    }
    if all(name == node for node, name in called.items()):
        return model
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_edges_from((called[v], called[c]) for v in tree.interior for c in tree.children(v))
    joins = dict(zip(tree.nodes, model.network.joins, strict=True))
    return Factorization.from_weights(
        ModeTree(graph),
        {called[node]: weight for node, weight in model.weights.items()},
        join={called[node]: joins[node] for node in tree.interior},
    )


def modes_in_order(
    caller: str, found: Sequence[Any], names: Sequence[str], modes: Sequence[Any] | None
) -> list[Any]:
    """What dangles, in the order of the modes: as given, or by the numbers in the names."""
    if modes is not None:
        order = list(modes)
        if len(order) != len(found) or any(
            sum(m is x or m == x for m in order) != 1 for x in found
        ):
            raise ShapeError(
                f"{caller}: modes must hold everything that dangles once.\n"
                f"  found:    {order!r}\n  expected: {list(names)!r} in the order of the modes"
            )
        return order
    parsed = [re.fullmatch(r"(.*?)(\d+)", str(name)) for name in names]
    numbers = [int(m[2]) if m else -1 for m in parsed]
    words = {m[1] if m else "" for m in parsed}
    if sorted(numbers) != list(range(len(names))) or len(words) > 1:
        raise ShapeError(
            f"{caller}: which modes these are cannot be told from their names.\n"
            f"  found:    {list(names)!r}\n"
            f"  expected: 'mode 0' to 'mode {len(names) - 1}', each once; or give modes=[..]"
        )
    return [found[numbers.index(n)] for n in range(len(names))]


def named_part(caller: str, root: str, names: Sequence[Sequence[str]]) -> int:
    """The one tensor that has this name among its names."""
    fitting = [i for i, own in enumerate(names) if root in own]
    if len(fitting) != 1:
        raise TreeError(
            f"{caller}: the root must be one tensor; {len(fitting)} are called {root!r}."
        )
    return fitting[0]


def loop(caller: str, name: Any) -> str:
    """What to say of a network with a loop."""
    return (
        f"{caller}: the network has a loop through {name!r}; a factorization is a tree.\n"
        "  flatten edges that run in parallel, split or contract others first"
    )


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
