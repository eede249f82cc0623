"""One einsum over several tensors: a pairwise path, its counted cost, and the torch calls that do it.

Costs are counted as opt_einsum counts them: one flop for each entry of an elementwise product, two for
each multiply-add of a sum.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from itertools import accumulate, dropwhile, pairwise
from typing import Any, NamedTuple

import opt_einsum
import torch
from opt_einsum.helpers import flop_count
from opt_einsum.parser import get_symbol
from torch import Tensor

from tnreg.tensors.arrays import Scaled, rescale

_Tuples = tuple[tuple[int, ...], ...]  # shapes, or the steps of a path


@dataclass(frozen=True)
class Cost:
    """What a contraction costs, by counting.

    Attributes:
        flops: Flops of all calls.
        largest: Entries of the largest intermediate or result.
        held: Entries of all intermediates and the result together, which gradients need.
        peak: Entries of those that are there at the same time without gradients.
    """

    flops: int
    largest: int
    held: int
    peak: int

    def entries(self, gradients: bool) -> int:
        """Entries that have to fit into memory together, with or without gradients."""
        return self.held if gradients else self.peak


class Step(NamedTuple):
    """One call of an einsum.

    Attributes:
        taken: Operands, as positions in the list that shrinks and gets the result at its end.
        equation: What the call does.
        call: The call, for operands of any sizes.
    """

    taken: tuple[int, ...]
    equation: str
    call: Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Einsum:
    """One einsum as a sequence of steps, two operands each, with its counted cost.

    It can be called with operands of other sizes than its ``shapes``, which are what the cost is of.

    Attributes:
        path: Operands taken at each step, as opt_einsum writes paths.
        cost: Counted cost; operands do not count.
    """

    equation: str
    shapes: _Tuples
    path: _Tuples
    steps: tuple[Step, ...]
    cost: Cost

    def __call__(self, operands: Sequence[Tensor]) -> Tensor:
        """Carry out the steps."""
        if len(self.steps) == 1:  # of all operands, the last one first
            return self.steps[0].call(*reversed(operands))
        left = list(operands)
        for taken, _, call in self.steps:
            left.append(call(*map(left.pop, taken)))
        return left[0]

    def scaled(self, operands: Sequence[Scaled], rows: str) -> Scaled:
        """Carry out the steps with one scale for each combination of ``rows``, symbols of the output.

        Scales have the axes of what they belong to, of size 1 where these are no rows. Whatever enters a
        step is scaled before, so that nothing leaves the range of the dtype on the way.
        """
        left = list(operands)
        for taken, equation, call in self.steps:
            words, result = equation.split("->")
            terms = words.split(",")
            parts = [_level(left.pop(i), term, rows) for i, term in zip(taken, terms, strict=True)]
            logs = [_spread(part.log2, term, result) for part, term in zip(parts, terms, strict=True)]
            left.append(Scaled(call(*(part.x for part in parts)), reduce(torch.add, logs)))
        return left[0]

    def __reduce__(self) -> tuple[Any, ...]:
        # the calls are closures; whoever unpickles makes them again
        return along, (self.equation, self.shapes, self.path)


@lru_cache(maxsize=4096)
def einsum(equation: str, *shapes: tuple[int, ...]) -> Einsum:
    """Plan an einsum of operands of these shapes with opt_einsum's "auto" and count its cost.

    Equations are explicit, with any number of distinct symbols.
    """
    return along(equation, shapes, find_path(equation, shapes, "auto"))


@lru_cache(maxsize=1024)
def find_path(equation: str, shapes: _Tuples, search: str) -> _Tuples:
    """Return the pairwise path that a search of opt_einsum finds for these shapes.

    ``search`` is its name, or "smallest": dynamic programming for the smallest intermediates.
    """
    how = opt_einsum.DynamicProgramming(minimize="size") if search == "smallest" else search
    path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=how)
    return tuple(tuple(step) for step in path)


@lru_cache(maxsize=4096)
def along(equation: str, shapes: _Tuples, path: _Tuples) -> Einsum:
    """Make the einsum along a given path, with its cost for these shapes."""
    terms = equation.split("->")[0].split(",")
    pairs = zip(terms, shapes, strict=True)
    size = {s: n for term, shape in pairs for s, n in zip(term, shape, strict=True)}
    steps = _steps(equation, path)
    flops = largest = held = peak = now = 0
    made = [0] * len(terms)  # entries of what was made on the way; operands do not count
    for taken, step, _ in steps:
        parts, result = step.split("->")
        union = frozenset(parts) - {","}
        flops += flop_count(union, len(result) < len(union), len(taken), size)
        entries = math.prod(size[s] for s in result)
        largest, held, peak = max(largest, entries), held + entries, max(peak, now + entries)
        now += entries - sum(map(made.pop, taken))
        made.append(entries)
    return Einsum(equation, shapes, path, steps, Cost(flops, largest, held, peak))


@lru_cache(maxsize=4096)
def _steps(equation: str, path: _Tuples) -> tuple[Step, ...]:
    """Make the steps of a path."""
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    holders = Counter(s for term in terms for s in set(term))  # terms that still have a symbol
    holders.update(output)
    steps = []
    for step in path:
        taken = tuple(sorted(step, reverse=True))
        parts = [terms.pop(i) for i in taken]
        holders.subtract(s for part in parts for s in set(part))
        union = dict.fromkeys("".join(parts))
        # axes of the output first and axes to be summed last: the order in which a matrix product
        # needs no copy of its left factor
        kept = {s for s in union if holders[s] > 0}
        result = "".join(s for s in dict.fromkeys([*output, *union]) if s in kept)
        steps.append(Step(taken, f"{','.join(parts)}->{result}", _call(parts, result)))
        terms.append(result)
        holders.update(set(result))
    return tuple(steps)


def _level(part: Scaled, term: str, rows: str) -> Scaled:
    """Scale the largest magnitude of every combination of rows to about 1."""
    inner = tuple(k for k, s in enumerate(term) if s not in rows)
    if not inner:
        return part
    x, log2 = rescale(part.x, inner)
    return Scaled(x, part.log2 + log2)


def _spread(log2: Tensor, term: str, result: str) -> Tensor:
    """Turn the scales of a term into those of a result: the axes that it lacks have size 1."""
    gone = [k for k, s in enumerate(term) if s not in result]
    kept = [s for s in result if s in term]
    log2 = log2.permute([*map(term.index, kept), *gone])
    return log2.reshape([log2.shape[kept.index(s)] if s in kept else 1 for s in result])


def _call(parts: list[str], result: str) -> Callable[..., Tensor]:
    """Make the torch call of one step: a product with broadcast, a matrix product, or ``torch.einsum``.

    On small tensors ``torch.einsum`` spends more time on views of its own than on arithmetic: with it a
    training step along the same path takes up to twice as long.
    """
    terms = "".join(parts)
    if len(parts) == 2 and all(s in result or terms.count(s) == 2 for s in terms):
        if any(s not in result for s in terms):
            return _matrix_product(parts, result)
        groups = ([[s] if s in term else [] for s in result] for term in parts)
        # broadcasting puts axes in front by itself
        first, second = (_view(t, [*dropwhile(operator.not_, g)]) for t, g in zip(parts, groups, strict=True))
        return lambda a, b: first(a) * second(b)
    return partial(torch.einsum, letters(f"{','.join(parts)}->{result}"))


def letters(equation: str) -> str:
    """Return an equation in the letters that torch reads, of which a step of a long network needs few."""
    symbols = dict.fromkeys(s for s in equation if s not in ",->")
    table = {s: get_symbol(i) for i, s in enumerate(symbols)}
    return "".join(table.get(s, s) for s in equation)


def _matrix_product(parts: list[str], result: str) -> Callable[..., Tensor]:
    """Make a call of ``mm`` or ``bmm``, or of a product and a sum where it would be of dot products."""
    summed = [s for s in parts[0] if s not in result]
    batch = [s for s in result if s in parts[0] and s in parts[1]]
    rows, columns = ([s for s in result if s in term and s not in batch] for term in parts)
    # the factor whose axes come first in the result goes left
    swap = bool(columns) and (not rows or result.index(columns[0]) < result.index(rows[0]))
    left, right = parts
    if swap:
        left, right, rows, columns = right, left, columns, rows
    product: Callable[[Tensor, Tensor], Tensor] = torch.bmm if batch else torch.mm
    stack = [batch] if batch else []
    groups = [[*stack, rows, summed], [*stack, summed, columns], [*stack, rows, columns]]
    if batch and not rows and not columns:
        product, groups = _dots, [[batch, summed], [batch, summed], [batch]]
    first, second = _view(left, groups[0]), _view(right, groups[1])
    axes = [*batch, *rows, *columns]
    order = None if axes == [*result] else [axes.index(s) for s in result]
    split = any(len(group) != 1 for group in groups[2])
    if not split and order is None:
        if swap:
            return lambda a, b: product(first(b), second(a))
        return lambda a, b: product(first(a), second(b))
    wide = [(s in left, (left if s in left else right).index(s)) for s in axes]

    def call(a: Tensor, b: Tensor) -> Tensor:
        x = product(first(a), second(b))
        x = x.reshape([(a if there else b).shape[k] for there, k in wide]) if split else x
        return x if order is None else x.permute(order)

    return (lambda a, b: call(b, a)) if swap else call


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _view(term: str, groups: Sequence[Sequence[str]]) -> Callable[[Tensor], Tensor]:
    """Make a call that permutes the axes of a term and joins them in groups, where that changes anything."""
    order = [term.index(s) for group in groups for s in group]
    ends = list(accumulate(map(len, groups)))
    spans = list(pairwise([0, *ends]))
    turned, grouped = order != sorted(order), any(len(group) != 1 for group in groups)
    if not grouped:
        return (lambda x: x.permute(order)) if turned else _same

    def view(x: Tensor) -> Tensor:
        x = x.permute(order) if turned else x
        shape = x.shape
        return x.reshape([math.prod(shape[a:b]) for a, b in spans])

    return view


def _same(x: Tensor) -> Tensor:
    return x
