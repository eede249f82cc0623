"""Ranks of all bonds of a tree together, by numbers saved per error spent.

To cut the values ``σ_i(v)``, ``i > R_v``, at every node makes a squared error of at most the sum of their
squares, and leaves ``N = Σ_v R_v Π_children R_c`` numbers, which is linear in every rank. Where
``N + error² / λ`` is least, a rank is therefore the number of values with ``σ_i(v)² > λ ∂N/∂R_v``. The
derivatives follow the ranks in some rounds; in each one ``λ`` is found by bisection.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnreg.trees.tree import ModeTree

Floats = NDArray[np.float64]
Integers = NDArray[np.intp]
Marks = NDArray[np.bool_]

# Rounds in which derivatives follow the ranks, and single steps at last.
_ROUNDS, _STEPS = 8, 64
# With so many leaves that may be bare all single changes are tried, if by the squares that are cut they do
# not take so many times the numbers.
_FEW, _WORSE = 12, 1.5
# Logarithms of equal values are told apart by less than this: a limit may fall between any two.
_APART = 1e-6


@dataclass(frozen=True)
class Budget:
    """What a tensor may lose, and how large its network may be.

    Attributes:
        limits: Largest bonds by position.
        share: Error allowed, relative to the norm of the tensor; ``None`` cuts what is zero to rounding.
        error: The same as a norm; the larger of both counts.
        rounding: What of it rounding may take, relative to the norm of the tensor.
        parts: Error allowed at single nodes by position, relative to the norm of the tensor.
        numbers: Most numbers in all weights together.
        bare: Positions of leaves without a weight.
        free: Positions of leaves that may be bare where that saves numbers.
    """

    limits: Mapping[int, int] = field(default_factory=dict)
    share: float | None = None
    error: float | None = None
    rounding: float = 0.0
    parts: Mapping[int, float] = field(default_factory=dict)
    numbers: int | None = None
    bare: frozenset[int] = frozenset()
    free: frozenset[int] = frozenset()

    def relative(self, size: float, log2: float) -> Budget:
        """Return the budget with all of the error as a ``share`` of the norm ``size * 2**log2``."""
        if self.error is None:
            return self
        found = 0.0
        if self.error and size:
            found = 2.0 ** min(math.log2(self.error) - math.log2(size) - log2, 0.0)
        return replace(self, share=max(self.share or 0.0, found - self.rounding), error=None)


class Choice(NamedTuple):
    """Ranks by cut, which positions are bare, how many numbers that is, and the squares that are cut."""

    ranks: Integers
    bare: Marks
    numbers: float
    spent: float


class Chooser:
    """The ranks that a tree may have, by cut, and what they cost.

    Args:
        tree: The tree.
        sizes: Mode sizes.
        squares: Squared singular values of every cut, descending.
        most: Largest rank of every cut.
        bare: Positions of leaves without a weight.
        free: Positions of leaves that may be bare where that saves numbers.
    """

    def __init__(
        self,
        tree: ModeTree,
        sizes: Sequence[int],
        squares: Sequence[Floats],
        most: Sequence[int],
        bare: Collection[int] = (),
        free: Collection[int] = (),
    ) -> None:
        cuts, links, top = tree.cuts, tree.links, len(tree.nodes) - 1
        self._inner = np.array([i for i, below in enumerate(links) if below])
        arities = [len(links[i]) for i in self._inner]
        self._children = np.array([c for below in links for c in below])
        self._starts = np.cumsum([0, *arities[:-1]])
        self._parent, self._cut = np.empty(top, np.intp), np.empty(top, np.intp)
        self._parent[self._children] = np.repeat(self._inner, arities)
        for k, cut in enumerate(cuts):
            self._cut[list(cut)] = k
        self._modes = np.ones(top)
        self._modes[[tree.position(mode) for mode in tree.leaves]] = [sizes[mode] for mode in tree.leaves]
        self._squares = values = np.zeros((len(cuts), max(map(len, squares))))
        for row, part in zip(values, squares, strict=True):
            row[: len(part)] = part
        self._tails = np.pad(np.cumsum(values[:, ::-1], 1)[:, ::-1], ((0, 0), (0, 1)))
        with np.errstate(divide="ignore"):
            apart = np.arange(values.size).reshape(values.shape[::-1]).T
            self._logs = np.log2(values) - apart * (_APART / values.size)
        self._rows, self._most = np.arange(len(cuts)), np.array(most, np.intp)
        self._slopes = np.zeros(len(cuts))
        self._bare, self._free = (np.isin(np.arange(top), list(which)) for which in (bare, free))
        pair = cuts[-1] if len(cuts[-1]) == 2 else ()
        self._pair = np.array(pair, np.intp)
        if not self._bare[self._pair].any():  # next to the matrix of a binary root a leaf's own saves nothing
            self._bare[[i for i in pair[::-1] if self._free[i]][:1]] = True
        self._first = self._bare

    def largest(self) -> Choice:
        """Choose the largest ranks."""
        return self._settled(self._most)

    def within(self, allowed: float) -> Choice:
        """Choose the fewest numbers where the squares that are cut sum up to what is allowed.

        If the largest ranks cut more, they are chosen.
        """

        def most_cut(rows: Integers, sums: Floats, bare: Marks) -> int:
            return int(np.searchsorted(sums, allowed, side="right"))

        best = min(self._rounds(allowed, most_cut), key=lambda choice: choice.numbers)
        for _ in range(_STEPS):  # what is left goes to single steps
            ranks, last = best.ranks, self._squares[self._rows, best.ranks - 1]
            can = (ranks > 1) & (last <= allowed - best.spent) & self._counted(best.bare)
            if not can.any():
                break
            worth = np.where(can, self._derivatives(ranks, best.bare) / np.maximum(last, 1e-300), 0.0)
            less = self._choice(ranks - (self._rows == np.argmax(worth)), best.bare)
            if less.spent > allowed:  # a rank had come down before for its children's sake
                break
            best = less
        return self._keep(best)

    def fitting(self, numbers: float) -> Choice:
        """Choose the smallest error with so many numbers, or the fewest numbers if even these are more."""

        def least_cut(rows: Integers, sums: Floats, bare: Marks) -> int:
            return bisect_left(
                range(len(rows)), True,
                key=lambda k: self._choice(self._without(rows[:k]), bare).numbers <= numbers,
            )  # fmt: skip

        def merit(choice: Choice) -> tuple[float, float]:
            return max(choice.numbers, numbers), choice.spent

        least = self._frozen(self._settled(np.ones_like(self._most)).bare)
        found = [*self._rounds(math.inf, least_cut), *least._rounds(math.inf, least_cut)]
        best, dead = min(found, key=merit), ~np.isfinite(self._slopes)
        for _ in range(_STEPS):  # what is left goes to single steps
            ranks, bare = best.ranks, best.bare
            costs = self._derivatives(ranks, bare) + (np.bincount(self._cut[~bare], minlength=len(ranks)) > 1)
            worth = self._squares[self._rows, np.minimum(ranks, self._squares.shape[1] - 1)] / costs
            can = (ranks < self._most) & (costs <= numbers - best.numbers) & self._counted(bare) & ~dead
            k = int(np.argmax(np.where(can, worth, 0.0)))
            if not can[k] or worth[k] == 0:
                break
            more = self._choice(ranks + (self._rows == k), bare)
            dead[k] = more.numbers > numbers  # where another bond grows with it
            best = best if dead[k] else more
        return self._keep(best)

    def bound(self, choice: Choice) -> float:
        """Return the sum of all squares that are cut with these ranks."""
        return float(self._tails[self._rows, choice.ranks] @ self._counted(choice.bare))

    def others(self, choice: Choice, *, steps: int | None, unspent: bool) -> Iterator[Chooser]:
        """List choosers for other leaves, where there are few: the first ones, and any one changed.

        Where error is ``unspent`` those of the choice are another try, as they cannot change any more.

        Of the latter those with more numbers have to make up for them: by that many steps, or by what their
        cuts overlap.
        """
        most = choice.numbers * _WORSE
        if steps is not None:
            most = choice.numbers + steps * float(self._derivatives(choice.ranks, choice.bare).max())
        free, small = np.flatnonzero(self._free), len(self._bare) <= 2 * _FEW
        changed = [choice.bare ^ (np.arange(len(choice.bare)) == i) for i in free]
        for bare in [self._first, *changed] if len(free) <= _FEW else []:
            other = self._frozen(bare)
            new = (bare != choice.bare).any() or (unspent and small)
            first = bare is self._first and small  # where another try costs little
            if new and (first or other.within(choice.spent).numbers < most):
                yield other

    def by_position(self, choice: Choice) -> list[int]:
        """Return the sizes of the bonds that a choice makes, 1 above the root."""
        return [*map(int, self._costs(choice.ranks, choice.bare)[0]), 1]

    def same(self, one: Choice, other: Choice) -> bool:
        """Return whether two choices make the same network."""
        return bool((one.ranks == other.ranks).all() and (one.bare == other.bare).all())

    def idle(self, choice: Choice) -> bool:
        """Return whether a bond is larger than the product of the others at the node above."""
        sizes, _, costs = self._costs(choice.ranks, choice.bare)
        return bool((~choice.bare & (sizes**2 > costs[self._parent])).any())

    def step(
        self, choice: Choice, lost: float, allowed: float, refused: Collection[int]
    ) -> tuple[int, Choice] | None:
        """Find a rank that may come down by one: which cut, and the choice that this makes.

        Its values that are cut then are alone within what is allowed. The one that saves most for what it
        is likely to cost comes first, of those that seem to fit.
        """
        ranks, bare = choice.ranks, choice.bare
        can = (ranks > 1) & self._counted(bare) & (self._tails[self._rows, ranks - 1] <= allowed)
        can[list(refused)] = False
        if not can.any():
            return None
        cost = self._squares[self._rows, ranks - 1] * (lost / max(self.bound(choice), lost))
        worth = np.where(can, self._derivatives(ranks, bare) / np.maximum(cost, 1e-300), 0.0)
        k = int(np.argmax(np.where(cost <= allowed - lost, worth * 1e30, worth)))
        return k, self._choice(ranks - (self._rows == k), bare)

    def _frozen(self, bare: Marks) -> Chooser:
        """Return a chooser for these bare leaves alone."""
        other = copy.copy(self)
        other._first = other._bare = bare
        other._free, other._slopes = np.zeros_like(bare), np.zeros_like(self._slopes)
        return other

    def _settled(self, ranks: Integers) -> Choice:
        """Choose bare leaves for ranks."""
        choice = self._choice(ranks, self._first)
        for _ in self._modes:
            bare = self._turned(choice, math.inf)
            if (bare == choice.bare).all():
                break
            choice = self._choice(ranks, bare)
        return choice

    def _keep(self, choice: Choice) -> Choice:
        """Begin the next search where this one ended."""
        self._bare, self._slopes = choice.bare, np.log2(self._derivatives(choice.ranks, choice.bare))
        return choice

    def _rounds(self, most: float, count: Callable[[Integers, Floats, Marks], int]) -> Iterator[Choice]:
        """Let derivatives and bare leaves follow the ranks, from which the squares first in order are cut.

        ``count`` says how many of them, given their cuts, sums, and the bare leaves. No cut loses more than
        ``most``.
        """
        bare, seen = self._bare, set[bytes]()
        cut, column = np.nonzero(self._tails[:, :-1] <= most)
        inside = (column > 0) & (column < self._most[cut])
        cut, column = cut[inside], column[inside]
        for _ in range(_ROUNDS):
            levels = self._logs[cut, column] - self._slopes[cut]
            order = np.argsort(levels)
            rows, squares = cut[order], self._squares[cut, column][order]
            counted = self._counted(bare)
            sums = np.cumsum(squares * counted[rows]) + self._tails[self._rows, self._most] @ counted
            k = count(rows, sums, bare)
            choice = self._choice(self._without(rows[:k]), bare)
            yield choice
            key = choice.ranks.tobytes() + bare.tobytes()
            if key in seen:
                break
            seen.add(key)
            self._slopes = np.log2(self._derivatives(choice.ranks, bare))
            bare = self._turned(choice, levels[order[max(k - 1, 0)]] if len(order) else math.inf)

    def _without(self, rows: Integers) -> Integers:
        """Return the largest ranks less so many as these cuts are listed."""
        return self._most - np.bincount(rows, minlength=len(self._most))

    def _choice(self, ranks: Integers, bare: Marks) -> Choice:
        """Count what ranks cost; those above the product of the children's come down, which cuts nothing."""
        spent = float(self._tails[self._rows, ranks] @ self._counted(bare))
        while True:
            _, products, costs = self._costs(ranks, bare)
            room, own = np.full(len(ranks), math.inf), ~bare
            own[self._pair] = False
            np.minimum.at(room, self._cut[own], products[own])
            if (ranks <= room).all():
                return Choice(ranks, bare, float(costs.sum()), spent)
            ranks = np.minimum(ranks, room).astype(np.intp)

    def _counted(self, bare: Marks) -> Marks:
        """Return which cuts are between weights, so that they cost an error."""
        return np.bincount(self._cut[~bare], minlength=len(self._rows)) > 0

    def _costs(self, ranks: Integers, bare: Marks) -> tuple[Floats, Floats, Floats]:
        """Return sizes of the bonds, products of those below, and numbers, by position; 1 above the root.

        The two ends of a binary root's cut are as large as their children allow: one may be smaller.
        """
        sizes = np.ones(len(bare) + 1)
        sizes[:-1] = np.where(bare, self._modes, ranks[self._cut])
        products = np.append(self._modes, 1.0)
        products[self._inner] = np.multiply.reduceat(sizes[self._children], self._starts)
        if len(self._pair):
            sizes[self._pair] = np.minimum(sizes, products)[self._pair]
            products[-1] = sizes[self._pair].prod()
        costs = sizes * products
        costs[:-1][bare] = 0.0
        return sizes[:-1], products[:-1], costs

    def _derivatives(self, ranks: Integers, bare: Marks) -> Floats:
        """Return the numbers that one more costs at every cut; at a bare leaf as if it had a weight."""
        sizes, products, costs = self._costs(ranks, bare)
        own = products + costs[self._parent] / sizes
        alone = self._counted(bare)[self._cut] & bare  # a bare leaf beside the other end of its cut
        found: Floats = np.bincount(self._cut[~alone], own[~alone], minlength=len(ranks)).astype(float)
        return found

    def _turned(self, choice: Choice, level: float) -> Marks:
        """Change between a weight and none where that saves most, one leaf below every node."""
        ranks, bare = choice.ranks[self._cut], choice.bare
        sizes, _, costs = self._costs(choice.ranks, bare)
        rest = costs[self._parent] / sizes
        single = np.bincount(self._cut, minlength=len(self._rows))[self._cut] == 1
        tails = np.where(single, self._tails[self._cut, ranks], 0.0) * 2.0 ** float(
            np.clip(-level, -1000, 1000)
        )
        saved = (self._modes + rest) * ranks + tails - rest * self._modes
        saved = np.where(bare, -saved, saved)
        some = np.flatnonzero(self._free & ((saved > 0) | ((saved == 0) & ~bare)))
        some = some[np.argsort(-saved[some], kind="stable")]
        first = some[np.unique(self._parent[some], return_index=True)[1]]
        turned = bare | (self._free & (ranks >= self._modes))
        turned[first] = ~bare[first]
        return turned
