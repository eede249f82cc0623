"""Tensors to complete from some of their entries, with fixed seeds: random ones, functions, measured ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Nested = Any  # a mode, or a sequence of such


@dataclass(frozen=True)
class Task:
    """Observed entries, and unseen ones without noise; the tree that all methods are given."""

    sizes: tuple[int, ...]
    index: Array
    values: Array
    unseen: Array
    truth: Array
    tree: Nested
    ranks: Mapping[tuple[int, ...], int] | None = None  # of a random tensor, by the modes below a node

    def split(self, share: float = 0.1) -> tuple[Array, Array, Array, Array]:
        """Return index and values to learn from, then those to choose by: the same for all peers."""
        held = max(10, round(share * len(self.values)))
        order = np.random.default_rng(7).permutation(len(self.values))
        kept, out = order[held:], order[:held]
        return self.index[kept], self.values[kept], self.index[out], self.values[out]


def error(found: Array, truth: Array) -> float:
    """Return the relative error."""
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def modes(nested: Nested) -> list[int]:
    """Modes in the order of the leaves."""
    return [nested] if isinstance(nested, int) else [m for child in nested for m in modes(child)]


def _nodes(nested: Nested) -> Iterator[tuple[int, ...]]:
    if not isinstance(nested, int):
        for child in nested:
            yield from _nodes(child)
    yield tuple(sorted(modes(nested)))


def _on_tree(
    nested: Nested, sizes: Sequence[int], ranks: Mapping[tuple[int, ...], int], random: np.random.Generator
) -> Array:
    """Dense tensor with normal weights at every node, of mean square one."""

    def columns(node: Nested) -> Array:
        rank = ranks.get(tuple(sorted(modes(node))), 1)
        if isinstance(node, int):
            return random.standard_normal((sizes[node], rank))
        below = [columns(child) for child in node]
        weight = random.standard_normal([*(matrix.shape[1] for matrix in below), rank])
        for matrix in below:
            weight = np.tensordot(weight, matrix, (0, 1))
        return weight.reshape(rank, -1).T

    order = modes(nested)
    x = columns(nested).reshape([sizes[m] for m in order]).transpose(np.argsort(order))
    return x / np.sqrt(np.mean(x**2))


def _sampled(
    x: Array, share: float, noise: float, random: np.random.Generator, tree: Nested, ranks: Any
) -> Task:
    count = round(share * x.size)
    order = random.permutation(x.size)
    index, unseen = (
        np.stack(np.unravel_index(part, x.shape), 1)
        for part in (order[:count], order[count : count + 20_000])
    )
    values = x[tuple(index.T)]
    size = np.sqrt(np.mean(values**2))
    return Task(
        x.shape,
        index,
        values + noise * size * random.standard_normal(count) if noise else values,
        unseen,
        x[tuple(unseen.T)],
        tree,
        ranks,
    )


def tutorial(seed: int, noise: float = 0.0) -> Task:
    """Return 30 % of a tensor like that of tensap's tutorial, of 138 degrees of freedom on a caterpillar."""
    tree = [[[[0, 1], 2], 3], 4]
    ranks = {(4,): 3, (0, 1, 2, 3): 3, (3,): 3, (0, 1, 2): 4, (2,): 3, (0, 1): 6, (1,): 4, (0,): 2}
    random = np.random.default_rng(seed)
    return _sampled(_on_tree(tree, (5, 8, 4, 3, 6), ranks, random), 0.3, noise, random, tree, ranks)


def binary(seed: int) -> Task:
    """Return 5 % of 7^6 on a binary tree with ranks 3, 153 degrees of freedom."""
    tree = [[0, 1], [[2, 3], [4, 5]]]
    ranks = dict.fromkeys(list(_nodes(tree))[:-1], 3)
    random = np.random.default_rng(1000 + seed)
    return _sampled(_on_tree(tree, (7,) * 6, ranks, random), 0.05, 0.0, random, tree, ranks)


MEASURED = {"IL2data": [[0, 2], [1, 3]], "kinetic": [[0, 3], [1, 2]], "covid19_serology": [0, 1, 2]}


def measured(seed: int, name: str, share: float) -> Task:
    """Return a share of what is known of a measured tensor of tensorly, at mean square one."""
    from tensorly import datasets

    x = np.asarray(getattr(datasets, f"load_{name}")().tensor, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(x))
    x = x / np.sqrt(np.mean(x.reshape(-1)[known] ** 2))
    order = np.random.default_rng(2000 + seed).permutation(known)
    parts = order[: round(share * len(known))], order[round(share * len(known)) :]
    index, unseen = (np.stack(np.unravel_index(part, x.shape), 1) for part in parts)
    return Task(x.shape, index, x[tuple(index.T)], unseen, x[tuple(unseen.T)], MEASURED[name])


def borehole(u: Array) -> Array:
    """Flow of water through a borehole, of eight variables."""
    low = np.array([0.05, 100, 63_070, 990, 63.1, 700, 1120, 9855])
    high = np.array([0.15, 50_000, 115_600, 1110, 116, 820, 1680, 12_045])
    radius, influence, upper, above, lower, below, length, conductivity = (low + (high - low) * u).T
    log = np.log(influence / radius)
    leak = 2 * length * upper / (log * radius**2 * conductivity)
    return 2 * np.pi * upper * (above - below) / (log * (1 + leak + upper / lower))


def friedman(u: Array) -> Array:
    """Friedman's first function, of five variables; the others are idle."""
    return 10 * np.sin(np.pi * u[:, 0] * u[:, 1]) + 20 * (u[:, 2] - 0.5) ** 2 + 10 * u[:, 3] + 5 * u[:, 4]


def pairs(u: Array) -> Array:
    """Five terms of two variables each, scattered over ten."""
    return sum(np.cos(3 * u[:, i] * u[:, j]) for i, j in [(0, 7), (1, 4), (2, 9), (3, 6), (5, 8)])


def products(u: Array) -> Array:
    """Sum of three products of eight factors."""
    n = np.arange(8)[:, None]
    speed = 2 * (n + 1) * np.array([0.3, 0.8, 1.7])
    return (1 + 0.6 * np.cos(speed * u[:, :, None] + n)).prod(1) @ np.array([1.0, 2.0, 0.5])


def function(seed: int, of: Callable[[Array], Array], order: int, grid: int, count: int) -> Task:
    """Return entries of a function on the midpoints of a grid, at mean square one; 20,000 others unseen."""
    random = np.random.default_rng(3000 + seed)
    drawn = np.unique(random.integers(0, grid, size=(count + 22_000, order)), axis=0)
    random.shuffle(drawn)
    index, unseen = drawn[:count], drawn[count : count + 20_000]
    values, truth = (of((part + 0.5) / grid) for part in (index, unseen))
    size = math.sqrt(np.mean(values**2))
    eight = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    tree = eight if order == 8 else [eight, [8, 9]]
    return Task((grid,) * order, index, values / size, unseen, truth / size, tree)


# {task: (how it is made from a seed, number of seeds)}
TASKS: dict[str, tuple[Callable[[int], Task], int]] = {
    "tutorial 30 %": (tutorial, 5),
    "tutorial 30 %, noise 1 %": (lambda seed: tutorial(seed, 0.01), 5),
    "binary 7⁶, 5 %": (binary, 3),
    "kinetic 10 %": (lambda seed: measured(seed, "kinetic", 0.1), 3),
    "Friedman 6¹⁰, 1,000": (lambda seed: function(seed, friedman, 10, 6, 1000), 3),
    "scattered pairs 6¹⁰, 2,000": (lambda seed: function(seed, pairs, 10, 6, 2000), 3),
    "sum of products 8⁸, 1,000": (lambda seed: function(seed, products, 8, 8, 1000), 3),
    "borehole 8⁸, 1,000": (lambda seed: function(seed, borehole, 8, 8, 1000), 3),
    "borehole 8⁸, 500": (lambda seed: function(seed, borehole, 8, 8, 500), 3),
    "IL-2 30 %": (lambda seed: measured(seed, "IL2data", 0.3), 3),
    "IL-2 10 %": (lambda seed: measured(seed, "IL2data", 0.1), 3),
    "COVID-19 30 %": (lambda seed: measured(seed, "covid19_serology", 0.3), 3),
}
