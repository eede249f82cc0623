"""Nested skeletons: pivots at the nodes of a tree, and the entries of a function that they select.

At node v, which splits the modes into those below it and the others, A is interpolated in the modes below:

    A[i, j] ≈ Σ_k B_v[i, k] A[I_v[k], j],   B_v = A[C_v, J_v] A[I_v, J_v]⁻¹

from the rows ``I_v``, the row pivots, and the columns ``J_v``. Candidates ``C_v`` for row pivots are the
whole mode at a leaf, and the products of the children's row pivots elsewhere: they are nested, so that the
matrices ``B_v`` are the weights of a tensor network with full joins (Ballani, Grasedyck and Kluge 2013).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg.errors import DataError, ShapeError
from tnreg.factorizations.factorization import Factorization
from tnreg.tensors.arrays import as_tensor
from tnreg.trees.tree import ModeTree

# A node gets a pivot if it explains this share of the error at a point and that is no rounding; once others
# have got one, also this share of what the error was before: what is left may be the rounding of theirs.
_SHARE, _ROUNDING, _REST = 0.1, 1e-14, 1e-3
# Numbers that arrays hold while many entries are interpolated.
_NUMBERS = 10**7


class Spent(Exception):
    """More evaluations are needed than are allowed."""


class Entries:
    """Entries of a tensor that is given as a function; each is asked for at most once.

    Attributes:
        most: Largest number of evaluations allowed; more raise ``Spent``.
        values: All values so far, in order.
    """

    def __init__(
        self, function: Callable[[Tensor], Any], sizes: Sequence[int], most: float, batch: int
    ) -> None:
        self.function, self.sizes, self.most, self.batch = function, sizes, most, batch
        self.values = torch.zeros(0, dtype=torch.float64)
        self._places: dict[bytes, int] = {}
        self._keys: list[bytes] = []

    def __len__(self) -> int:
        return len(self._places)

    def index(self, places: Iterable[int] | None = None) -> Tensor:
        """Return the multi-indices of values by their places, of all if left out."""
        keys = self._keys if places is None else [self._keys[place] for place in places]
        known = np.frombuffer(bytearray().join(keys), dtype=np.int64)
        return torch.from_numpy(known.reshape(-1, len(self.sizes)))

    def __call__(self, index: Tensor) -> Tensor:
        """Return the values ``(B,)`` at an index ``(B, N)``."""
        new = self._unknown(index)
        if len(self) + len(new) > self.most:
            raise Spent
        rows, keys = list(new.values()), list(new)
        for start in range(0, len(rows), self.batch):
            values = self._evaluate(index[rows[start : start + self.batch]])
            self._keys += keys[start : start + self.batch]
            self._places.update((key, start) for start, key in enumerate(self._keys[len(self) :], len(self)))
            self.values = torch.cat([self.values, values])
        return self.values[[self._places[key] for key in _keys(index)]]

    def unknown(self, index: Tensor) -> Tensor:
        """Return the rows of an index that were never asked for, each once."""
        return index[list(self._unknown(index).values())]

    def _unknown(self, index: Tensor) -> dict[bytes, int]:
        new: dict[bytes, int] = {}
        for row, key in enumerate(_keys(index)):
            if key not in self._places:
                new.setdefault(key, row)
        return new

    def _evaluate(self, index: Tensor) -> Tensor:
        values = self.function(index.clone())
        values = values.compute() if hasattr(values, "compute") else values  # Dask
        try:
            values = as_tensor(values).detach().cpu()
        except DataError as error:
            raise DataError(f"cross: the function gave no numbers at {_shown(index[0])}: {error}") from None
        if tuple(values.shape) != (len(index),):
            raise ShapeError(
                f"cross: the function must give one number for each of the {len(index)} rows of its index, "
                f"of which the first is {_shown(index[0])}.\n"
                f"  found:    shape {tuple(values.shape)}\n  expected: ({len(index)},)",
                argument="function",
            )
        wrong = (~torch.isfinite(values)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"cross: the function gave {values[row].item()} at {_shown(index[row])}, and all entries "
                f"must be finite ({len(wrong)} of the {len(index)} asked for are not).",
                argument="function",
            )
        if not len(self) and values.is_complex():
            self.values = self.values.to(torch.complex128)
        if values.is_complex() and not self.values.is_complex():
            raise DataError(
                f"cross: the function gave complex numbers at {_shown(index[0])} and real ones before; make "
                "it give complex numbers always.",
                argument="function",
            )
        return values.to(self.values.dtype)


def _keys(index: Tensor) -> list[bytes]:
    rows = np.ascontiguousarray(index.numpy())
    keys: list[bytes] = rows.view(f"V{8 * rows.shape[1]}").ravel().tolist()
    return keys


def _shown(row: Tensor) -> str:
    return f"index ({', '.join(map(str, row.tolist()))})"


@dataclass
class _Node:
    """Pivots at one node.

    Attributes:
        modes: Modes below it.
        below: Positions of its children; ``above`` is that of its parent.
        places: Where row pivots are among the candidates, by axis of ``part``, and their numbers.
        rows: Row pivots ``(R, N)``, of which the ``modes`` count.
        columns: Columns ``(R, N)``, of which the other modes count.
        part: Entries at candidates and columns: an axis for every child (for a leaf's mode), columns last.
        basis: ``B_v`` in the shape of ``part``; ``None`` while it is out of date.
    """

    modes: list[int]
    below: tuple[int, ...]
    above: int | None
    places: dict[tuple[int, ...], int]
    rows: Tensor
    columns: Tensor
    part: Tensor
    basis: Tensor | None = None


class Skeleton:
    """A tensor interpolated from some of its entries along a tree; it starts without pivots, as zero."""

    def __init__(self, entries: Entries, tree: ModeTree) -> None:
        self.entries, self.tree = entries, tree
        above = {c: i for i, below in enumerate(tree.links) for c in below}
        none = torch.zeros(0, tree.order, dtype=torch.int64)
        self.nodes: list[_Node] = []
        for t, (name, below) in enumerate(zip(tree.nodes, tree.links, strict=True)):
            modes = list(tree.modes_below(name))
            columns = none if t in above else none.new_zeros(1, tree.order)  # the root's one has no modes
            shape = [0] * len(below) or [entries.sizes[modes[0]]]
            part = torch.zeros(*shape, len(columns), dtype=entries.values.dtype)
            self.nodes.append(_Node(modes, below, above.get(t), {}, none, columns, part))

    def along(self, tree: ModeTree) -> Skeleton:
        """Return a skeleton along another tree with the pivots of the leaves; other nodes start without."""
        found = Skeleton(self.entries, tree)
        for mode in tree.leaves:
            t, leaf = tree.position(mode), self.nodes[self.tree.position(mode)]
            found.nodes[t] = replace(leaf, above=found.nodes[t].above, places=dict(leaf.places))
        for node in found.nodes:
            if node.below:
                shape = [len(found.nodes[c].rows) for c in node.below]
                node.part = node.part.new_zeros(*shape, len(node.columns))
        return found

    @property
    def ranks(self) -> dict[Any, int]:
        """Number of pivots of every node but the root."""
        return {v: len(node.rows) for v, node in zip(self.tree.nodes[:-1], self.nodes, strict=False)}

    def model(self) -> Factorization:
        """Return the tensor as a factorization."""
        if not all(self.ranks.values()):
            sizes, dtype = self.entries.sizes, self.entries.values.dtype
            return Factorization(self.tree, sizes, 1, join="full", std=0.0, dtype=dtype)
        weights = {v: self._basis(t) for t, v in enumerate(self.tree.nodes)}
        weights[self.tree.root] = weights[self.tree.root][..., 0]
        return Factorization.from_weights(self.tree, weights)

    def __call__(self, index: Tensor) -> Tensor:
        """Return the values ``(B,)`` at an index ``(B, N)``."""
        widest = max(node.part.numel() // max(len(node.part), 1) for node in self.nodes)
        parts = torch.split(index, _NUMBERS // max(widest, 1) + 1)
        return torch.cat([self._up(part)[-1][:, 0] for part in parts])

    def approach(self, x: Tensor, held: int) -> Tensor:
        """Move from a point ``(N,)``, mode by mode but for one, to row pivots where the error is larger."""
        x, ups = x.clone(), self._up(x[None])
        gap = abs(self.entries(x[None]) - ups[-1][:, 0])
        for mode in self.tree.leaves:
            t = self.tree.position(mode)
            if mode == held or not self.nodes[t].places:
                continue
            gaps = (self._at(t, self.nodes[t].rows, x[None])[:, 0] - self._down(t, ups)).abs()
            k = int(gaps.argmax())
            if gaps[k] > gap:
                gap = gaps[k]
                self._move(t, k, x, ups)
        return x

    def order(self, random: torch.Generator) -> list[int]:
        """Return all nodes but the root: leaves in random order, others once their children are done."""
        waiting, order = [len(node.below) for node in self.nodes], list[int]()
        for mode in torch.randperm(self.tree.order, generator=random).tolist():
            t: int | None = self.tree.position(mode)
            while t is not None and not waiting[t]:
                order.append(t)
                t = self.nodes[t].above
                if t is not None:
                    waiting[t] -= 1
        return order[:-1]

    def refine(self, x: Tensor, order: Sequence[int]) -> int:
        """Add pivots such that the error at a point ``(N,)`` vanishes or nearly so; return how many.

        From the leaves up, the part of the point below each node is replaced by one of the node's row pivots,
        that where the error is largest. What the error loses by that is the node's own error, and if it is
        much of it the node gets the point as a column, and a row pivot where it errs most. In the end all
        parts are pivots and there is no error, so that some node gets one.

        Args:
            x: The point.
            order: All nodes but the root, children before parents.
        """
        x, ups, grown = x.clone(), self._up(x[None]), 0
        value = self.entries(x[None])[0]
        gap = value - ups[-1][0, 0]
        least = _REST * abs(gap)
        number: dict[int, int] = {}
        for t in order:
            node = self.nodes[t]
            place = tuple(number[c] for c in node.below) or (int(x[node.modes[0]]),)
            if place in node.places:  # a pivot already, without an error of its own
                number[t] = node.places[place]
                continue
            column = self._at(t, node.rows, x[None])[:, 0]
            terms = self._basis(t)[place] * column
            own = value - terms.sum()
            rounding = _ROUNDING * (abs(value) + terms.abs().sum())
            if abs(own) > max(_SHARE * abs(gap), rounding, least if grown else 0.0):
                column = self._grow(t, x, column)
                grown += 1
            gaps = column - self._down(t, ups)
            k = number[t] = int(gaps.abs().argmax())
            value, gap = column[k], gaps[k]
            self._move(t, k, x, ups)
        return grown

    def _grow(self, t: int, x: Tensor, column: Tensor) -> Tensor:
        """Add the column of a point and its worst row to a node; return the column at the row pivots."""
        node, basis = self.nodes[t], self._basis(t)
        assert node.above is not None
        parent = self.nodes[node.above]
        shape = node.part.shape[:-1]
        candidates = self._candidates(t)
        values = self._at(t, candidates, x[None])[:, 0]
        worst = int((values - basis.reshape(len(values), len(column)) @ column).abs().argmax())
        row = candidates[worst : worst + 1]
        axis = parent.below.index(t)
        beside = self._at(node.above, self._candidates(node.above, {t: row}), parent.columns)
        size = [1 if k == axis else n for k, n in enumerate(parent.part.shape)]
        # nothing may fail from here on: the pivots of both nodes belong together
        parent.part = torch.cat([parent.part, beside.reshape(size)], axis)
        node.part = torch.cat([node.part, values.reshape(*shape, 1)], -1)
        node.places[tuple(int(k) for k in np.unravel_index(worst, shape))] = len(node.rows)
        node.rows, node.columns = torch.cat([node.rows, row]), torch.cat([node.columns, x[None]])
        node.basis = parent.basis = None
        return torch.cat([column, values[worst : worst + 1]])

    def _candidates(self, t: int, rows: Mapping[int, Tensor] | None = None) -> Tensor:
        """Return all candidates ``(C, N)`` of a node; ``rows`` replaces the row pivots of some children."""
        node, order = self.nodes[t], self.tree.order
        if not node.below:
            found = torch.zeros(len(node.part), order, dtype=torch.int64)
            found[:, node.modes[0]] = torch.arange(len(found))
            return found
        parts = [(rows or {}).get(c, self.nodes[c].rows) for c in node.below]
        count = math.prod(map(len, parts))
        if count > self.entries.most:
            raise Spent
        numbers = torch.unravel_index(torch.arange(count), [len(part) for part in parts])
        found = torch.zeros(count, order, dtype=torch.int64)
        for c, part, number in zip(node.below, parts, numbers, strict=True):
            modes = self.nodes[c].modes
            found[:, modes] = part[:, modes][number]
        return found

    def _at(self, t: int, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the entries of rows, of which the modes below node t count, and columns."""
        if len(rows) * len(columns) > self.entries.most:
            raise Spent
        index = columns.repeat(len(rows), 1, 1)
        modes = self.nodes[t].modes
        index[:, :, modes] = rows[:, None, modes]
        return self.entries(index.reshape(-1, self.tree.order)).reshape(len(rows), len(columns))

    def _basis(self, t: int) -> Tensor:
        node = self.nodes[t]
        if node.basis is None:
            node.basis = node.part
            if node.places:
                shape = node.part.shape
                matrix = node.part.reshape(math.prod(shape[:-1]), shape[-1])
                matrix = matrix / matrix.abs().amax(0)  # columns may be of very different size
                pivots = np.ravel_multi_index(tuple(zip(*node.places, strict=True)), shape[:-1])
                basis = torch.linalg.solve(matrix[pivots], matrix, left=False)
                basis[pivots] = torch.eye(shape[-1], dtype=basis.dtype)  # without rounding
                node.basis = basis.reshape(shape)
        return node.basis

    def _up(self, index: Tensor) -> list[Tensor]:
        """Return the weights ``(B, R)`` of every node's row pivots at an index; at the root the values."""
        ups: list[Tensor] = []
        for t, node in enumerate(self.nodes):
            ups.append(self._join(t, ups) if node.below else self._basis(t)[index[:, node.modes[0]]])
        return ups

    def _join(self, t: int, ups: Sequence[Tensor]) -> Tensor:
        return _contract(self._basis(t), [ups[c] for c in self.nodes[t].below])

    def _down(self, t: int, ups: Sequence[Tensor]) -> Tensor:
        """Return the values ``(R,)`` with a point's part below a node replaced by each of its row pivots."""
        path = [t]
        while (above := self.nodes[path[-1]].above) is not None:
            path.append(above)
        down = torch.ones(1, 1, dtype=ups[-1].dtype)
        for above, c in zip(path[:0:-1], path[-2::-1], strict=True):
            below = self.nodes[above].below
            others = [ups[other] for other in below if other != c]
            down = _contract(self._basis(above).movedim(below.index(c), -1), [*others, down])
        return down[0]

    def _move(self, t: int, k: int, x: Tensor, ups: list[Tensor]) -> None:
        """Replace the part of a point below a node by its k-th row pivot, and the weights above."""
        node = self.nodes[t]
        x[node.modes] = node.rows[k, node.modes]
        ups[t] = torch.eye(len(node.rows), dtype=ups[t].dtype)[k : k + 1]
        while node.above is not None:
            ups[node.above] = self._join(node.above, ups)
            node = self.nodes[node.above]


def _contract(weight: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """Contract all axes of a weight but the last with vectors ``(B, axis)``; return ``(B, last axis)``."""
    sizes = weight.shape
    found = vectors[0] @ weight.reshape(sizes[0], math.prod(sizes[1:]))
    for k, vector in enumerate(vectors[1:], 1):
        rest = found.reshape(len(vector), sizes[k], math.prod(sizes[k + 1 :]))
        found = torch.bmm(vector.unsqueeze(1), rest)[:, 0]
    return found
