"""One einsum over several tensors: a pairwise path, its counted cost, and the torch calls that do it.

Costs are counted as opt_einsum counts them: one flop for each entry of an elementwise product, two for
each multiply-add of a sum.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import opt_einsum
import torch
from opt_einsum.helpers import flop_count
from opt_einsum.parser import get_symbol
from torch import Tensor

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


@dataclass(frozen=True, eq=False)
class Einsum:
    """One einsum as a sequence of steps, two operands each, with its counted cost.

    Attributes:
        path: Operands taken at each step, as opt_einsum writes paths.
        steps: For each step the operands taken (positions in the shrinking list), its equation, and
            the call that does it.
        cost: Counted cost; operands do not count.
    """

    equation: str
    shapes: _Tuples
    path: _Tuples
    steps: tuple[tuple[tuple[int, ...], str, Callable[..., Tensor]], ...]
    cost: Cost

    def __call__(self, operands: Sequence[Tensor]) -> Tensor:
        """Carry out the steps."""
        left = list(operands)
        for taken, _, call in self.steps:
            left.append(call(*[left.pop(i) for i in taken]))
        return left[0]

    def __reduce__(self) -> tuple[Any, ...]:
        # the calls are closures; whoever unpickles makes them again
        return along, (self.equation, self.shapes, self.path)


@lru_cache(maxsize=4096)
def einsum(equation: str, *shapes: tuple[int, ...], search: str = "auto") -> Einsum:
    """Plan an einsum of operands of these shapes with a path search of opt_einsum and count its cost.

    ``search`` is its name, or "smallest": dynamic programming for the smallest intermediates. Equations
    are explicit, with any number of distinct symbols.
    """
    return along(equation, shapes, find_path(equation, shapes, search))


@lru_cache(maxsize=1024)
def find_path(equation: str, shapes: _Tuples, search: str) -> _Tuples:
    """Return the pairwise path that opt_einsum finds for these shapes."""
    how = opt_einsum.DynamicProgramming(minimize="size") if search == "smallest" else search
    path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=how)
    return tuple(tuple(step) for step in path)


@lru_cache(maxsize=4096)
def along(equation: str, shapes: _Tuples, path: _Tuples) -> Einsum:
    """Make the einsum along a given path, with its cost for these shapes."""
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    pairs = zip(terms, shapes, strict=True)
    size = {s: n for term, shape in pairs for s, n in zip(term, shape, strict=True)}
    holders = Counter(s for term in terms for s in set(term))  # terms that still have a symbol
    holders.update(output)
    flops = largest = held = peak = 0
    made = [0] * len(terms)  # entries of what was made on the way; operands do not count
    steps = []
    for step in path:
        taken = tuple(sorted(step, reverse=True))
        parts = [terms.pop(i) for i in taken]
        holders.subtract(s for part in parts for s in set(part))
        union = dict.fromkeys("".join(parts))
        kept = {s for s in union if holders[s] > 0}
        # axes of the output first and axes to be summed last: the order in which a matrix product
        # needs no copy of its left factor
        result = "".join(s for s in dict.fromkeys([*output, *union]) if s in kept)
        flops += flop_count(frozenset(union), len(kept) < len(union), len(parts), size)
        entries = math.prod(size[s] for s in result)
        largest, held = max(largest, entries), held + entries
        peak = max(peak, sum(made) + entries)
        made = [*(n for i, n in enumerate(made) if i not in taken), entries]
        steps.append((taken, f"{','.join(parts)}->{result}", _call(parts, result, size)))
        terms.append(result)
        holders.update(set(result))
    return Einsum(equation, shapes, path, tuple(steps), Cost(flops, largest, held, peak))


def _call(parts: list[str], result: str, size: Mapping[str, int]) -> Callable[..., Tensor]:
    """Make the torch call of one step: a product with broadcast, a matrix product, or ``torch.einsum``.

    On small tensors ``torch.einsum`` spends more time on views of its own than on arithmetic: with it a
    training step along the same path takes up to twice as long.
    """
    terms = "".join(parts)
    if len(parts) == 2 and all(s in result or terms.count(s) == 2 for s in terms):
        if any(s not in result for s in terms):
            return _matrix_product(parts, result, size)
        first, second = (
            _view(term, [s for s in result if s in term], [size[s] if s in term else 1 for s in result], size)
            for term in parts
        )  # fmt: skip
        return lambda a, b: first(a) * second(b)
    # torch reads a-z and A-Z only; a single step of a long network needs few of them
    table = {s: get_symbol(i) for i, s in enumerate(dict.fromkeys(terms))}
    *inputs, output = ("".join(table[s] for s in term) for term in (*parts, result))
    return partial(torch.einsum, f"{','.join(inputs)}->{output}")


def _matrix_product(parts: list[str], result: str, size: Mapping[str, int]) -> Callable[..., Tensor]:
    """Make a call of ``mm`` or ``bmm``, or of a product and a sum where it would be of dot products."""
    summed = [s for s in parts[0] if s not in result]
    batch = [s for s in result if s in parts[0] and s in parts[1]]
    rows, columns = ([s for s in result if s in term and s not in batch] for term in parts)
    # the factor whose axes come first in the result goes left
    swap = bool(columns) and (not rows or result.index(columns[0]) < result.index(rows[0]))
    left, right = parts
    if swap:
        left, right, rows, columns = right, left, columns, rows
    count, inner, height, width = (
        math.prod(size[s] for s in axes) for axes in (batch, summed, rows, columns)
    )
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm if count == 1 else torch.bmm
    stack = [] if count == 1 else [count]
    shapes = [*stack, height, inner], [*stack, inner, width], [*stack, height, width]
    if height == width == 1 < count:
        product, shapes = _dots, ([count, inner], [count, inner], [count])
    first = _view(left, [*batch, *rows, *summed], shapes[0], size)
    second = _view(right, [*batch, *summed, *columns], shapes[1], size)
    axes = [*batch, *rows, *columns]
    wide, order = [size[s] for s in axes], [axes.index(s) for s in result]

    def call(a: Tensor, b: Tensor) -> Tensor:
        x = product(first(b), second(a)) if swap else product(first(a), second(b))
        x = x if wide == shapes[2] else x.reshape(wide)
        return x if axes == [*result] else x.permute(order)

    return call


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _view(
    term: str, axes: list[str], shape: list[int], size: Mapping[str, int]
) -> Callable[[Tensor], Tensor]:
    """Make a call that permutes the axes of a term, then reshapes, where that changes anything."""
    order = [term.index(s) for s in axes]
    if order == sorted(order):
        return _same if [size[s] for s in axes] == shape else lambda x: x.reshape(shape)
    return lambda x: x.permute(order).reshape(shape)


def _same(x: Tensor) -> Tensor:
    return x
