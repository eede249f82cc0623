"""From a dense tensor to a tree, leaves first: the two groups of modes that go together best become one."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from tnreg.tensors.axes import axis_gram, axis_product, axis_triangle, left_vectors

# In tensors of more numbers, a few columns for each row show at first what the rank of a pair may be.
_SMALL, _COLUMNS = 2**16, 4


class Joined(NamedTuple):
    """A tensor whose axes are joined two by two.

    Axis k is group k. Each of ``pairs``, two groups, is a new group with the next number and a weight
    ``(R_a, R_b, R)`` of orthonormal columns. The ``core`` has an axis for each of ``left``, the groups that
    are left over, at most three. ``lost`` is the square of the error.
    """

    pairs: list[tuple[int, int]]
    weights: list[Tensor]
    core: Tensor
    left: list[int]
    lost: float


def compress(x: Tensor, allowed: float) -> Tensor:
    """Bring every axis of a tensor into the basis of its singular vectors.

    Args:
        x: A tensor in double precision.
        allowed: Largest square of the error.
    """
    total, left = float(torch.linalg.vector_norm(x)) ** 2, allowed
    for k in range(x.ndim):
        budget = left / (x.ndim - k)
        view = x.reshape(math.prod(x.shape[:k]), x.shape[k], -1)
        vectors, squares = _left_vectors(view, budget / total if total else 0.0)
        rank = rank_within(squares, budget)
        left -= float(squares[rank:].sum())
        if rank < len(squares):
            x = axis_product(view, vectors[:, :rank]).reshape(*x.shape[:k], rank, *x.shape[k + 1 :])
    return x


class _Pair(NamedTuple):
    """What is known of the matrix with two groups as rows.

    Its rank and entropy, left singular vectors and squares of all singular values. Without vectors it is
    known from a few columns only, and the rank is a lower bound.
    """

    rank: int
    entropy: float
    squares: Tensor
    vectors: Tensor | None


def agglomerate(x: Tensor, allowed: float) -> Joined:
    """Join the two groups of axes of least rank, again and again until three are left.

    The rank is that of the matrix with both groups as rows; among equals the entanglement entropy decides.
    Each new group is brought into the basis of its singular vectors, so that the tensor shrinks.

    Args:
        x: A tensor in double precision, as ``compress`` returns it.
        allowed: Largest square of the error.

    Cost: a Gram matrix of ``R_a R_b`` rows for all pairs of groups at first, then for those of the new one;
    in a large tensor for one pair at every step, and for others if a few columns leave open which is best.
    """
    order, total, lost = x.ndim, float(torch.linalg.vector_norm(x)) ** 2, 0.0
    inside, left = [frozenset([k]) for k in range(order)], list(range(order))
    pairs, weights = list[tuple[int, int]](), list[Tensor]()
    known: dict[frozenset[int], _Pair] = {}
    random = torch.Generator().manual_seed(0)
    while len(left) > 3:
        budget = max(allowed - lost, 0.0) / (len(left) - 3)
        part = budget / total if total else 0.0
        modes = {(a, b): inside[left[a]] | inside[left[b]] for a, b in combinations(range(len(left)), 2)}
        for a, b in modes:
            if modes[a, b] not in known:
                known[modes[a, b]] = _look(x, a, b, budget, part, random)
        while True:
            a, b = min(modes, key=lambda pair: known[modes[pair]][:2])
            best = known[modes[a, b]]
            if best.vectors is not None:
                break
            known[modes[a, b]] = _look(x, a, b, budget, part)
        rank = rank_within(best.squares, budget)
        lost += float(best.squares[rank:].sum())
        basis = best.vectors[:, :rank].reshape(x.shape[a], x.shape[b], rank)
        weights.append(basis)
        # the new axis in the place of the first, so that groups stay in the order of their first modes
        x = torch.tensordot(basis.conj(), x, ([0, 1], [a, b])).movedim(0, a)
        pairs.append((left[a], left[b]))
        inside.append(modes[a, b])
        left[a] = len(inside) - 1
        del left[b]
    return Joined(pairs, weights, x, left, lost)


def _look(
    x: Tensor, a: int, b: int, budget: float, part: float, random: torch.Generator | None = None
) -> _Pair:
    """Look at two groups; with a generator only at a few columns of a large tensor."""
    rows = x.shape[a] * x.shape[b]
    some = random is not None and x.numel() > max(_SMALL, 2 * _COLUMNS * rows**2)
    if some:
        drawn = torch.rand(_COLUMNS * rows, x.ndim, generator=random).unbind(1)
        index = [(u * n).long().to(x.device) for u, n in zip(drawn, x.shape, strict=True)]
        index[a] = torch.arange(x.shape[a], device=x.device).reshape(-1, 1, 1)
        index[b] = torch.arange(x.shape[b], device=x.device).reshape(-1, 1)
        view = x[tuple(index)].reshape(1, rows, -1)
    else:
        view = x.movedim((a, b), (0, 1)).reshape(1, rows, -1)
    vectors, squares = _left_vectors(view, 0.0 if some else part)
    return _Pair(rank_within(squares, budget), entropy(squares), squares, None if some else vectors)


def _left_vectors(view: Tensor, part: float) -> tuple[Tensor, Tensor]:
    rows = view.shape[1]
    part = part if rows <= view.shape[0] * view.shape[2] else 0.0
    return left_vectors(rows, part, partial(axis_gram, view), partial(axis_triangle, view))


def rank_within(squares: Tensor, allowed: float) -> int:
    """Count the squares of singular values that are left when so much is cut; 1 at least."""
    return max(1, int((squares.flip(0).cumsum(0) > allowed).sum()))


def entropy(squares: Tensor) -> float:
    """Return the entanglement entropy of squared singular values; 0 for zeros."""
    total = squares.sum()
    return float(torch.special.entr(squares / torch.where(total > 0, total, 1)).sum())
