"""Which modes interact, from a few entries: the additive model, and what it leaves to pairs of modes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg.tensors.arrays import double
from tnreg.trees.tree import ModeTree

# Strengths below so many standard errors of what independent residuals would show count as none.
_SIGNIFICANT = 4.0


def additive(
    index: Tensor, values: Tensor, sizes: Sequence[int], *, ridge: float = 1.0, sweeps: int = 50
) -> tuple[Tensor, list[Tensor]]:
    """Fit ``values[b] ≈ mean + Σ_n parts[n][index[b, n]]`` by least squares with a ridge.

    The mean is that of the values. The parts are fitted in turn (backfitting, Hastie and Tibshirani 1990)
    until nothing changes: every one is the mean residual at each of its indices, shrunk as if ``ridge`` more
    entries had been zero there. Indices that were not observed get 0.

    Args:
        index: Observed multi-indices ``(B, N)``.
        values: Real or complex values ``(B,)``.
        sizes: Mode sizes.
        ridge: Weight of the square of every number against that of one residual.
        sweeps: How often each part is fitted at most.

    Returns:
        The mean, a scalar, and N tensors ``(D_n,)``, in double precision on the device of the values. The
        same numbers in every run: they are computed on the CPU.
    """
    index, rest = index.cpu(), double(values.detach().cpu())
    mean = rest.mean()
    rest = rest - mean
    parts = [rest.new_zeros(size) for size in sizes]
    columns = index.unbind(1)
    counts = (torch.bincount(i, minlength=size) for i, size in zip(columns, sizes, strict=True))
    weights = [torch.where(count > 0, count.double() + ridge, 1.0) for count in counts]
    small = 1e-14 * rest.abs().amax()
    for _ in range(sweeps):
        moved = torch.zeros_like(small)
        for part, i, weight in zip(parts, columns, weights, strict=True):
            # the fit to what is left plus the part itself, as a change of the part
            change = (torch.zeros_like(part).index_add_(0, i, rest) - ridge * part) / weight
            part += change
            rest -= change[i]
            moved = torch.maximum(moved, change.abs().amax())
        if moved <= small:
            break
    return mean.to(values.device), [part.to(values.device) for part in parts]


def interactions(index: Tensor, values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Estimate how strongly every pair of modes interacts: second-order Sobol' indices from samples.

    What the additive model leaves of the values is averaged over the entries in each cell, those that agree
    in both modes. The variance of the cells' means, without what chance adds to it, relative to that of all
    residuals is the strength: 1 if one pair explains all. Strengths within four standard errors of what
    independent residuals would show are 0, and so are all if too few entries agree in two modes, or if the
    additive model leaves nothing. Interactions of three modes or more that show in no pair are not seen.

    Args:
        index: Observed multi-indices ``(B, N)``.
        values: Real or complex values ``(B,)``.
        sizes: Mode sizes.

    Returns:
        Strengths ``(N, N)``, symmetric, zeros on the diagonal; double precision, on the CPU.

    Cost: a pass over the entries for each of ``N(N-1)/2`` pairs.
    """
    order, count = len(sizes), len(values)
    strengths = torch.zeros(order, order, dtype=torch.float64)
    mean, parts = additive(index, values.cpu(), sizes, ridge=0.0)
    index = index.cpu()
    columns = index.unbind(1)
    fitted = mean + sum(part[i] for part, i in zip(parts, columns, strict=True))
    rest = double(values.detach().cpu()) - fitted
    largest = rest.abs().amax()
    if largest <= 1e-12 * fitted.abs().amax():
        return strengths
    rest = rest / largest  # squares stay in range
    squares = rest.abs().square()
    ones = torch.ones_like(squares)
    for i in range(order):
        for j in range(i):
            cell, cells = columns[i] * sizes[j] + columns[j], sizes[i] * sizes[j]
            if cells > 4 * count:
                cell, cells = torch.unique(cell, return_inverse=True)[1], count
            number, own, total = (x.new_zeros(cells).index_add_(0, cell, x) for x in (ones, squares, rest))
            several = number > 1
            number = number[several]
            # products of two different residuals of a cell, of mean zero if these are independent
            crossed = (total[several].abs().square() - own[several]) / (number - 1)
            error = math.sqrt(2 * float((number / (number - 1)).sum())) * float(squares.mean())
            if (strength := float(crossed.sum())) > _SIGNIFICANT * error:
                strengths[i, j] = strengths[j, i] = strength / float(squares.sum())
    return strengths


def linkage_tree(strengths: Tensor) -> ModeTree:
    """Join modes that interact most, pair by pair, to a binary tree (average linkage).

    The strength between two groups is the mean over their pairs of modes; among equals the smallest groups
    are joined first, so that strengths of zero give a balanced tree.

    Args:
        strengths: ``(N, N)``, symmetric.
    """
    order = len(strengths)
    between, counts = strengths.double().cpu().numpy().copy(), np.ones(order)
    np.fill_diagonal(between, 0)
    if not between.any():
        return ModeTree.binary(order)
    np.fill_diagonal(between, -np.inf)
    groups: list[Any] = list(range(order))
    for _ in range(order - 1):
        together = np.where(between == between.max(), counts[:, None] + counts, np.inf)
        i, j = divmod(int(together.argmin()), order)  # the first one, i < j
        row = (counts[i] * between[i] + counts[j] * between[j]) / (counts[i] + counts[j])
        between[i], between[:, i] = row, row
        between[j] = between[:, j] = between[i, i] = -np.inf
        groups[i], counts[i] = [groups[i], groups[j]], counts[i] + counts[j]
    return ModeTree(groups[0])
