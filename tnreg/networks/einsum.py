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


@dataclass(frozen=True, eq=False)
class Einsum:
    """One einsum as a sequence of steps, two operands each, with its counted cost.

    Attributes:
        equation: The whole einsum.
        shapes: Shapes of its operands.
        path: Operands taken at each step, as opt_einsum writes paths.
        steps: For each step the operands taken (positions in the shrinking list), its equation, and
            the call that does it.
        flops: Counted flops of all steps.
        largest: Entries of the largest intermediate or result.
        moved: Entries of all intermediates and the result.
        peak: Entries of those that are there at the same time, at most.
    """

    equation: str
    shapes: tuple[tuple[int, ...], ...]
    path: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[tuple[int, ...], str, Callable[..., Tensor]], ...]
    flops: int
    largest: int
    moved: int
    peak: int

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
    """Plan an einsum with a path search of opt_einsum and count its cost.

    Args:
        equation: Explicit einsum equation; any number of distinct symbols.
        *shapes: Shape of each operand.
        search: Name of the path search, or "smallest": dynamic programming for the smallest intermediates.
    """
    path = find_path(equation, shapes, search)
    return along(equation, shapes, path)


@lru_cache(maxsize=1024)
def find_path(
    equation: str, shapes: tuple[tuple[int, ...], ...], search: str
) -> tuple[tuple[int, ...], ...]:
    """Pairwise path that opt_einsum finds for these shapes."""
    how = opt_einsum.DynamicProgramming(minimize="size") if search == "smallest" else search
    path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=how)
    return tuple(tuple(step) for step in path)


@lru_cache(maxsize=4096)
def along(
    equation: str, shapes: tuple[tuple[int, ...], ...], path: tuple[tuple[int, ...], ...]
) -> Einsum:
    """The einsum along a given path, with its cost for these shapes."""
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    size = {
        s: n
        for term, shape in zip(terms, shapes, strict=True)
        for s, n in zip(term, shape, strict=True)
    }
    holders = Counter(
        s for term in terms for s in dict.fromkeys(term)
    )  # terms that still have a symbol
    holders.update(output)
    flops = largest = moved = peak = 0
    made = [0] * len(terms)  # entries of what was made on the way; operands do not count
    steps = []
    for step in path:
        taken = tuple(sorted(step, reverse=True))
        parts = [terms.pop(i) for i in taken]
        for part in parts:
            holders.subtract(set(part))
        union = dict.fromkeys("".join(parts))
        kept = {s for s in union if holders[s] > 0}
        # axes of the output first and axes to be summed last: the order in which a matrix product
        # needs no copy of its left factor
        result = "".join(
            [s for s in output if s in union] + [s for s in union if s in kept and s not in output]
        )
        flops += flop_count(frozenset(union), len(kept) < len(union), len(parts), size)
        entries = math.prod(size[s] for s in result)
        largest, moved = max(largest, entries), moved + entries
        peak = max(peak, sum(made) + entries)
        for i in taken:
            made.pop(i)
        made.append(entries)
        steps.append((taken, f"{','.join(parts)}->{result}", _call(parts, result, size)))
        terms.append(result)
        holders.update(set(result))
    return Einsum(equation, shapes, path, tuple(steps), flops, largest, moved, peak)


def _call(parts: list[str], result: str, size: Mapping[str, int]) -> Callable[..., Tensor]:
    """The torch calls of one step: a broadcast product or a matrix product, views elsewhere.

    ``torch.einsum`` gives the same numbers; on small tensors it spends more time on views of its
    own than on arithmetic, and it sends single products through batched kernels.
    """
    if len(parts) == 2 and all(s in parts[1] or s in result for s in parts[0]):
        left, right = parts
        if all(s in left or s in result for s in right):
            summed = [s for s in left if s not in result]
            return (
                _matrix_product(left, right, result, size)
                if summed
                else _broadcast_product(left, right, result, size)
            )
    # torch reads a-z and A-Z only; a single step of a long network needs few of them
    table = {s: get_symbol(i) for i, s in enumerate(dict.fromkeys("".join(parts)))}
    equation = "->".join(
        "".join(table.get(s, s) for s in side) for side in (",".join(parts), result)
    )
    return partial(torch.einsum, equation)


def _broadcast_product(
    left: str, right: str, result: str, size: Mapping[str, int]
) -> Callable[..., Tensor]:
    def aligned(term: str) -> Callable[[Tensor], Tensor]:
        shape = [size[s] if s in term else 1 for s in result]
        return _brought(term, [s for s in result if s in term], shape, size)

    first, second = aligned(left), aligned(right)
    return lambda a, b: first(a) * second(b)


def _matrix_product(
    left: str, right: str, result: str, size: Mapping[str, int]
) -> Callable[..., Tensor]:
    only = [s for s in result if (s in left) != (s in right)]
    swap = bool(only) and only[0] in right
    if swap:  # the factor whose axes come first in the result goes left
        left, right = right, left
    batch = [s for s in result if s in left and s in right]
    summed = [s for s in left if s not in result]
    rows, columns = ([s for s in result if s in term and s not in batch] for term in (left, right))
    count, inner, height, width = (
        math.prod(size[s] for s in part) for part in (batch, summed, rows, columns)
    )

    if height == width == 1 and count > 1:  # dot products, one per batch entry
        flat = [count, inner]
        first = _brought(left, [*batch, *rows, *summed], flat, size)
        second = _brought(right, [*batch, *columns, *summed], flat, size)
        last = _spread([*batch, *rows, *columns], result, [count], size)
        return _swapped(swap, lambda a, b: last((first(a) * second(b)).sum(1)))

    def factor(
        term: str, outer: list[str], length: int, *, outer_first: bool
    ) -> Callable[[Tensor], Tensor]:
        # as the axes lie in memory, then transposed: a reshape of transposed axes would copy
        lies_outer_first = not outer or term.index(outer[0]) < term.index(summed[0])
        axes = [*batch, *outer, *summed] if lies_outer_first else [*batch, *summed, *outer]
        flat = [length, inner] if lies_outer_first else [inner, length]
        view = _brought(term, axes, flat if count == 1 else [count, *flat], size)
        return view if lies_outer_first == outer_first else lambda x: view(x).mT

    first = factor(left, rows, height, outer_first=True)
    second = factor(right, columns, width, outer_first=False)
    product = torch.mm if count == 1 else torch.bmm
    flat = [height, width] if count == 1 else [count, height, width]
    last = _spread([*batch, *rows, *columns], result, flat, size)
    return _swapped(swap, lambda a, b: last(product(first(a), second(b))))


def _swapped(swap: bool, call: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return (lambda a, b: call(b, a)) if swap else call


def _brought(
    term: str, axes: Sequence[str], shape: list[int], size: Mapping[str, int]
) -> Callable[[Tensor], Tensor]:
    """Axes of a term brought in an order, then reshaped; views that change nothing are left out."""
    order = [term.index(s) for s in axes]
    if order != sorted(order):
        return lambda x: x.permute(order).reshape(shape)
    return _same if [size[s] for s in term] == shape else lambda x: x.reshape(shape)


def _spread(
    axes: Sequence[str], result: str, shape: list[int], size: Mapping[str, int]
) -> Callable[[Tensor], Tensor]:
    """The inverse: a tensor of this shape given the sizes of its axes, then brought in order."""
    order = [list(axes).index(s) for s in result]
    wide = [size[s] for s in axes]
    if order != sorted(order):
        return lambda x: x.reshape(wide).permute(order)
    return _same if wide == shape else lambda x: x.reshape(wide)


def _same(x: Tensor) -> Tensor:
    return x
