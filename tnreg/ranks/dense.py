"""Ranks of dense tensors: matricizations along a tree, their singular values, and what to read off them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg.errors import DataError, OptionError, ShapeError
from tnreg.tensors.arrays import (
    axis_gram,
    axis_product,
    check_dense,
    largest_of,
    matricize,
    ready,
    squares_fit,
)
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

# Eigenvalues of a Gram matrix carry an error of about eps * s_max². A singular value s then has an
# error of some 10 eps * s_max² / s, below 1e-11 * s_max for s > 1e-3 * s_max.
_GRAM_FLOOR = 1e-3

# Tensors up to here get one SVD per node: more would take longer than it saves.
_SMALL = 2**14


def dense_spectra(x: Tensor | np.ndarray[Any, Any], tree: ModeTree) -> dict[Node, Tensor]:
    """Singular values of a dense tensor's matricization at every node but the root.

    Leaves come first; every node with fewer independent rows than rows is then replaced by its
    coordinates in them, so that larger nodes work on a smaller core with the same singular values. The
    two children of a binary root share theirs.

    Each spectrum comes from the Gram matrix of the shorter side in float64; if it reaches below 1e-3 of
    its largest value, where squaring loses digits, it is computed again from a QR factorization. Errors
    stay below 1e-11 of the largest singular value (float64). A small tensor gets one SVD per node.

    Args:
        x: Real or complex tensor ``(D_0, ..., D_{N-1})``. If it requires a gradient, every node
            gets a plain, differentiable ``torch.linalg.svdvals`` instead.
        tree: Mode tree over ``0..N-1``.

    Returns:
        ``{node: singular values}``, descending, ``min(rows, columns)`` of them, children before
        parents. A zero tensor has zeros only.

    Raises:
        ShapeError: ``x`` does not have ``tree.order`` axes.
        DataError: ``x`` has NaN, infinite or integer entries, or is empty.

    Cost: one Gram product with ``x`` per leaf, then per node on the core that is left.
    """
    x = check_dense(x, tree)
    if x.requires_grad and torch.is_grad_enabled():
        return _svdvals_of_nodes(x, tree)
    found, log2 = scaled_spectra(x, tree)
    return {node: (values * 2.0**log2).to(x.real.dtype) for node, values in found.items()}


def scaled_spectra(x: Tensor, tree: ModeTree) -> tuple[dict[Node, Tensor], int]:
    """``(found, log2)``: singular values are ``found * 2**log2``; in double precision, of moderate size.

    Args:
        x: What ``check_dense`` has passed.
        tree: Mode tree over its axes.
    """
    if x.numel() <= _SMALL and _plain(x):
        return _svdvals_of_nodes(x.detach(), tree), 0
    shape = x.shape
    total, top = math.prod(shape), len(tree.nodes) - 1
    core, log2 = ready(x, tree)
    # in the order of the tree's leaves the children of a node are always neighbours
    axes = [i for i, below in enumerate(tree.links) if not below]
    sizes = list(core.shape)
    pair = tree.links[top] if len(tree.links[top]) == 2 else ()
    found: dict[int, Tensor] = {}
    for i in sorted(range(top), key=lambda i: tree.heights[i]):
        below = tree.links[i]
        if below:
            k = axes.index(below[0])
            sizes[k : k + len(below)] = [math.prod(sizes[k : k + len(below)])]
            axes[k : k + len(below)] = [i]
        if i in pair and (other := pair[i == pair[0]]) in found:
            values = found[other]
        else:
            k = axes.index(i)
            view = core.reshape(math.prod(sizes[:k]), sizes[k], -1)
            values, basis = _svd_of_axis(view, last=i in tree.links[top])
            if basis is not None:
                core, sizes[k] = axis_product(view, basis), basis.shape[1]
        rows = math.prod(shape[m] for m in tree.modes_below(tree.nodes[i]))
        full = values.new_zeros(min(rows, total // rows))
        full[: min(len(values), len(full))] = values[: len(full)]
        found[i] = full
    return {tree.nodes[i]: found[i] for i in range(top)}, log2


def _plain(x: Tensor) -> bool:
    """Whether LAPACK can take the numbers as they are: double precision, and scales that it can square."""
    double = x.dtype in (torch.float64, torch.complex128)
    return double and squares_fit(float(largest_of(x.detach())))


def _svdvals_of_nodes(x: Tensor, tree: ModeTree) -> dict[Node, Tensor]:
    found: dict[Node, Tensor] = {}
    pair = tree.children(tree.root)
    for node in tree.nodes[:-1]:
        if len(pair) == 2 and node == pair[1]:
            found[node] = found[pair[0]]
        else:
            found[node] = torch.linalg.svdvals(matricize(x, tree.modes_below(node)))
    return found


def _svd_of_axis(view: Tensor, *, last: bool) -> tuple[Tensor, Tensor | None]:
    """Singular values of the middle axis against the others, and a basis if its rows are dependent.

    Args:
        view: ``(before, rows, behind)``.
        last: No basis is needed.
    """
    before, rows, behind = view.shape
    if rows > before * behind:
        matrix = view.transpose(0, 1).reshape(rows, -1)
        if last:  # the transpose has the same values
            return _svd_of_axis(matrix.mT.unsqueeze(0), last=True)
        basis, triangle = torch.linalg.qr(matrix)
        left, values, _ = torch.linalg.svd(triangle, full_matrices=False)
        kept = max(1, int((values > torch.finfo(values.dtype).eps * values[0]).sum()))
        return values, basis @ left[:, :kept]
    eps = torch.finfo(view.real.dtype).eps
    gram = axis_gram(view)
    squares, basis = torch.linalg.eigh((gram + gram.mH) / 2)
    values = squares.clamp_min(0).sqrt().flip(0)
    if values[0] == 0:
        return values, None if last else basis[:, :1]
    if values[-1] > _GRAM_FLOOR * values[0]:
        return values, None
    # R of the conjugate transpose has the same singular values; its right vectors are the basis
    matrix = view.transpose(0, 1).reshape(rows, -1)
    triangle = torch.linalg.qr(matrix.mH, mode="r")[1]
    if last:
        return torch.linalg.svdvals(triangle), None
    _, values, right = torch.linalg.svd(triangle, full_matrices=False)
    kept = int((values > eps * values[0]).sum())
    return values, right.mH[:, :kept] if kept < rows else None


def numerical_rank(s: Tensor, rtol: float) -> int:
    """Count of singular values ``> rtol * s_max``."""
    if not 0 <= rtol < 1:
        raise OptionError(f"rtol must be in [0, 1), found {rtol!r}.", argument="rtol")
    return int((s > rtol * s[0]).sum()) if len(s) else 0


def effective_rank(s: Tensor | Sequence[float]) -> Tensor:
    """Effective rank ``exp(-Σ p ln p)``, ``p = s / Σ s``, of a vector of singular values.

    Source: Roy and Vetterli (2007). It lies between 1 and the rank, is smooth where the rank jumps,
    and does not change when ``s`` is scaled. Differentiable; a zero vector gives 0.

    Args:
        s: Non-negative singular values, shape ``(k,)``.

    Example:
        >>> effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0]))
        tensor(3.)
    """
    s, largest = _check_values(s)
    if largest == 0:
        return torch.zeros_like(largest)
    s = s / largest  # a sum of huge values would overflow
    return torch.exp(_entropy(s / s.sum()))


def entanglement_entropy(s: Tensor | Sequence[float]) -> Tensor:
    """Entanglement entropy ``-Σ ρ ln ρ``, ``ρ = s² / Σ s²``, in nats, of a vector of singular values.

    At most the logarithm of the rank. Differentiable; a zero vector gives 0.

    Args:
        s: Non-negative singular values, shape ``(k,)``.
    """
    s, largest = _check_values(s)
    if largest == 0:
        return torch.zeros_like(largest)
    square = (s / largest) ** 2
    return _entropy(square / square.sum())


def _entropy(p: Tensor) -> Tensor:
    # 0 ln 0 = 0, with a zero instead of a NaN gradient
    p = torch.where(p > 0, p, torch.ones_like(p))
    return 0.0 - (p * p.log()).sum()  # not -0.0 where there is a single one


def _check_values(s: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
    """The values, and the largest of them as a constant (0 for none)."""
    s = torch.as_tensor(s)
    if s.ndim != 1 or not s.is_floating_point():
        raise ShapeError(
            f"expected a vector of real singular values, found shape {tuple(s.shape)}, dtype {s.dtype}."
        )
    fixed = s.detach()
    if not bool((torch.isfinite(fixed) & (fixed >= 0)).all()):
        raise DataError("singular values must be finite and not negative.")
    return s, fixed.max() if len(s) else fixed.sum()
