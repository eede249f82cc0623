"""Cross approximation: a tensor that is a function of its multi-index, from few entries, along any tree."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg.errors import OptionError, ShapeError, check_integer, check_number
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.progress import working
from tnreg.ranks.decompose import truncate
from tnreg.search.interchange import interchange
from tnreg.search.skeleton import Entries, Skeleton, Spent
from tnreg.tensors.arrays import seeded
from tnreg.training.trajectory import Trajectory
from tnreg.trees.tree import ModeTree

# Points drawn to start from, and to estimate the error on (more where more was evaluated).
_START, _FRESH = 50, 100
# So many random entries may be zero before all are taken to be.
_BLANK = 1000
# So many known entries are looked at for the largest error, and so many points may bring nothing new.
_LOOKED_AT, _PATIENCE = 4000, 5
# Another tree must need less than this share of the numbers above the leaves.
_WORTH = 0.7


@dataclass(frozen=True)
class CrossApproximation:
    """What ``cross`` found.

    Attributes:
        model: The factorization, with full joins, in double precision.
        evaluations: Number of entries that the function was asked for, no entry twice.
        error: Estimate of the relative error ``‖A - model‖ / ‖A‖``, from random entries that were asked for
            after the model was made; exact where no others are left.
        history: A row for every pass along the final tree: ``evaluations``, ``error`` on the random entries
            known, ``numbers`` of the model, ``ranks`` by node. Its ``stop_reason`` is ``"rtol"``,
            ``"max_evaluations"``, ``"rounding"``, or ``"zero"`` if nothing else was found.
    """

    model: Factorization
    evaluations: int
    error: float
    history: Trajectory

    def __repr__(self) -> str:
        found = f"error {self.error:.1e} from {self.evaluations:,} evaluations"
        sizes = self.model.sizes
        return f"<CrossApproximation of {sizes if len(sizes) <= 16 else f'order {len(sizes)}'}: {found}>"


def cross(
    function: Callable[[Tensor], Any],
    sizes: Sequence[int],
    tree: ModeTree | Sequence[Any] | None = None,
    *,
    rtol: float = 1e-6,
    max_evaluations: int = 100_000,
    batch: int = 65_536,
    seed: int = 0,
    progress: bool = True,
) -> CrossApproximation:
    """Factorize a tensor that is a function of its multi-index, from few of its entries.

    Every node interpolates the tensor from its values at pivots (Ballani, Grasedyck and Kluge 2013; on a
    caterpillar the cross approximation of tensor trains, Oseledets and Tyrtyshnikov 2010). They are found
    where the error is largest: the worst of the entries known is moved to an even worse one, and nodes that
    err there get a pivot each, until known random entries, and then fresh ones, are met to ``rtol``.

    Args:
        function: Takes multi-indices ``(B, N)``, an int64 tensor, and returns the ``B`` entries, real or
            complex: a tensor, an array of numpy or Dask, or a list. It is never asked twice for the same
            one, and may do with a batch what it likes: compute it at once, in a loop, or on a cluster.
        sizes: Mode sizes.
        tree: Mode tree, or what ``ModeTree`` takes. If left out, it is ``ModeTree.binary(N)`` at first; each
            time the evaluations have doubled, ``interchange`` looks for a better one for the model so far.
        rtol: Relative error to reach on fresh random entries; 0 goes on to rounding.
        max_evaluations: Largest number of entries to ask for. If more are needed, the model so far is
            returned with its error, and a warning.
        batch: Largest number of entries to ask for at once.
        seed: Draws entries; the same one gives the same model.
        progress: Whether to show a status line.

    Raises:
        TreeError, ShapeError, OptionError, SizeError: Arguments that do not fit together.
        DataError, ShapeError: The function gives NaN, infinite or no numbers, or another shape; the message
            names the index. What it raises itself is passed on.

    Warns:
        UserWarning: ``rtol`` was not reached, or all entries looked at are zero.

    Cost: ``D R`` evaluations at a leaf and the product of the bonds at other nodes, as many as the model has
    numbers, and some hundred to check. What is rare among random entries may be missed: a narrow peak, or
    entries of a tensor of zeros.

    Example:
        >>> found = cross(lambda i: 1 / (1 + i.double().sum(1)), (20,) * 6, rtol=1e-8, progress=False)
        >>> found.error < 1e-8, found.evaluations < 20**6 / 5_000
        (True, True)
    """
    rtol = check_number(rtol, "cross: rtol", 0, 1)
    batch = check_integer(batch, 1, "cross: batch")
    if not callable(function):
        raise OptionError(f"cross: function must be callable, found {function!r}.", argument="function")
    free = tree is None
    if tree is None:
        sizes = tuple(sizes) if np.iterable(sizes) else sizes
        if not isinstance(sizes, tuple) or not sizes:
            message = f"cross: sizes must be one integer for each mode, found {sizes!r}."
            raise ShapeError(message, argument="sizes")
        tree = ModeTree.binary(len(sizes))
    tree = tree if isinstance(tree, ModeTree) else ModeTree(tree)
    sizes = Factorization(tree, sizes, 1, join="full", std=0.0).sizes  # checks them
    least = min(math.prod(sizes), _START + _FRESH + sum(sizes) + len(tree.nodes))
    max_evaluations = check_integer(max_evaluations, 1, "cross: max_evaluations")
    if max_evaluations < least:
        raise OptionError(
            f"cross: max_evaluations={max_evaluations} are too few for a model of rank one and its error; "
            f"that takes {least}.",
            argument="max_evaluations",
        )
    most = math.inf if max_evaluations >= math.prod(sizes) else max_evaluations
    entries = Entries(function, sizes, most, batch)
    with working("cross approximation", progress) as say:
        search = _Search(entries, seeded(seed, "cross: seed"), rtol, say)
        skeleton, error = search.run(tree, free)
    run = search.history
    if run.stop_reason == "zero":
        warnings.warn(f"cross: all {len(entries)} entries looked at are zero.", stacklevel=2)
    elif error > rtol > 0:
        limit = f"max_evaluations={max_evaluations}" if run.stop_reason == "max_evaluations" else "rounding"
        message = f"cross: {limit} stopped it at an error of {error:.1e} instead of {rtol:.1e}."
        warnings.warn(message, stacklevel=2)
    return CrossApproximation(skeleton.model(), len(entries), error, run)


class _Search:
    """Grows skeletons until random entries are met.

    ``pool`` are random entries that are known, ``most`` is the largest number of evaluations.
    """

    def __init__(
        self, entries: Entries, random: torch.Generator, rtol: float, say: Callable[[str], None]
    ) -> None:
        self.entries, self.random, self.rtol, self.say = entries, random, rtol, say
        self.most = entries.most
        self.pool = torch.zeros(0, len(entries.sizes), dtype=torch.int64)
        self.history = Trajectory()

    def run(self, tree: ModeTree, free: bool) -> tuple[Skeleton, float]:
        """Return a skeleton along a tree, a better one if it is free, and its error on fresh entries."""
        while not self.entries(self.pool).any():
            fresh = self._fresh(int(min(_START, self.most - len(self.entries))))
            if not len(fresh) or len(self.pool) >= _BLANK:
                self.history.stop_reason = "zero"
                return Skeleton(self.entries, tree), 0.0
            self.pool = torch.cat([self.pool, fresh])
        self.skeleton, error, reason = Skeleton(self.entries, tree), None, "max_evaluations"
        self.entries.most = self.most - _FRESH
        with suppress(Spent):
            reason, error = self._grow(free and tree.order > 3)
        self.entries.most = self.most
        error = self._fresh_error(self.skeleton) if error is None else error
        self.history.stop_reason = "rtol" if error <= self.rtol else reason
        return self.skeleton, error

    def _grow(self, free: bool) -> tuple[str, float | None]:
        """Grow the skeleton; return why it ends, and the error on fresh entries if it is known."""
        idle, order, due, error = 0, len(self.entries.sizes), math.inf, 1.0
        for step in count():
            # half of the budget is enough to grow again, and what was known is not lost
            if due <= len(self.entries) <= self.most / 2 and error > self.rtol / 2:
                due = 2 * len(self.entries)
                self._replant(error)
            skeleton = self.skeleton
            error = self._error(skeleton, self.pool)
            self._record(step, skeleton, error)
            if free and step == 1:
                due = 2 * len(self.entries)
            if error <= self.rtol / 2 and self._error(skeleton, self._lines()) <= self.rtol:
                if (error := self._fresh_error(skeleton)) <= self.rtol:
                    return "rtol", error
            held = int(torch.randint(order, (), generator=self.random))
            x = skeleton.approach(self._worst(skeleton), held)
            idle = 0 if skeleton.refine(x, skeleton.order(self.random)) else idle + 1
            if idle == _PATIENCE:
                break
        return "rounding", None

    def _replant(self, error: float) -> None:
        """Go on along another tree if that needs far fewer numbers for what is known of the tensor."""
        rtol, model = min(error, 0.5), self.skeleton.model()
        here, there = truncate(model, rtol=rtol, leaves="weights"), interchange(model, rtol=rtol)
        if _inside(there) < _WORTH * _inside(here):
            self.skeleton, self.history = self.skeleton.along(there.tree), Trajectory()

    def _fresh(self, wanted: int) -> Tensor:
        """Draw distinct entries that are not known; fewer if there are no more."""
        found = self.pool[:0]
        for drawn in self._draws(2 * wanted):
            found = self.entries.unknown(torch.cat([found, drawn]))
            if len(found) >= wanted:
                break
        return found[:wanted]

    def _draws(self, size: int) -> Iterator[Tensor]:
        """Draw batches of random entries: all there are, once, where many of them may be known."""
        sizes, total = self.entries.sizes, math.prod(self.entries.sizes)
        if size and total <= 2**16 + 2 * len(self.entries):
            for flat in torch.split(torch.randperm(total, generator=self.random), size):
                yield torch.stack(torch.unravel_index(flat, sizes), 1)
        while size and total > 2**16 + 2 * len(self.entries):
            yield torch.stack([torch.randint(n, (size,), generator=self.random) for n in sizes], 1)

    def _fresh_error(self, skeleton: Skeleton) -> float:
        """Return the error on entries drawn now, which are in the pool from then on."""
        filled = float((self.entries(self.pool) != 0).double().mean())
        wanted = max(_FRESH, len(self.entries) // 20, min(int(5 / filled), _BLANK))
        wanted = int(min(wanted, self.entries.most - len(self.entries)))
        fresh = self._fresh(wanted)
        self.entries(fresh)
        self.pool = torch.cat([self.pool, fresh])
        # where there are no more, all are known
        return self._error(skeleton, fresh if len(fresh) == wanted else self.entries.index())

    def _lines(self) -> Tensor:
        """Draw three entries for each mode that differ in it alone from the largest known one.

        A peak is seldom met by random entries, and neither is an error beside it.
        """
        peak = self.entries.index([int(self.entries.values.abs().argmax())])[0]
        lines = peak.repeat(len(peak), 3, 1)
        for mode, size in enumerate(self.entries.sizes):
            lines[mode, :, mode] = torch.randint(size, (3,), generator=self.random)
        return lines.flatten(0, 1)

    def _error(self, skeleton: Skeleton, index: Tensor) -> float:
        """Return the relative error on some entries, at any scale."""
        values = self.entries(index)
        gaps, largest = values - skeleton(index), values.abs().max()
        if not largest:
            return math.inf if gaps.any() else 0.0
        return float(torch.linalg.vector_norm(gaps / largest) / torch.linalg.vector_norm(values / largest))

    def _worst(self, skeleton: Skeleton) -> Tensor:
        """Return the entry known, of many, with the largest error."""
        places = torch.randperm(len(self.entries), generator=self.random)[:_LOOKED_AT]
        index = torch.cat([self.pool, self.entries.index(places.tolist())])
        return index[(self.entries(index) - skeleton(index)).abs().argmax()]

    def _record(self, step: int, skeleton: Skeleton, error: float) -> None:
        numbers = sum(node.part.numel() for node in skeleton.nodes)
        row = {"evaluations": len(self.entries), "error": error, "numbers": numbers, "ranks": skeleton.ranks}
        self.history.append(step, row)
        self.say(f"cross approximation: {len(self.entries):,} evaluations, error {error:.0e}")


def _inside(model: Factorization) -> int:
    return sum(model.weights[v].numel() for v in model.tree.interior)
