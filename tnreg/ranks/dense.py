"""Ranks of dense tensors: matricizations along a tree, their singular values, and what to read off them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg.errors import DataError, ShapeError, check_number
from tnreg.tensors.arrays import as_tensor, check_dense, double, largest_of, matricize, squares_fit, to_core
from tnreg.tensors.axes import Core, axis_gram, axis_triangle
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

# Eigenvalues of a Gram matrix carry an error of about eps * s_max². A singular value s then has an
# error of some 10 eps * s_max² / s, below 1e-11 * s_max for s > 1e-3 * s_max.
_GRAM_FLOOR = 1e-3

# Tensors up to here get one SVD per node: more would take longer than it saves.
_SMALL = 2**14


def dense_spectra(x: Tensor | np.ndarray[Any, Any], tree: ModeTree) -> dict[Node, Tensor]:
    """Compute what ``spectra`` promises of a dense tensor.

    Leaves come first; every node with fewer independent rows than rows is then replaced by its
    coordinates in them, so that larger nodes work on a smaller core with the same singular values.

    Each spectrum comes from the Gram matrix of the shorter side in float64; if it reaches below 1e-3 of
    its largest value, where squaring loses digits, it is computed again from a QR factorization. Errors
    stay below 1e-11 of the largest singular value (float64). A small tensor gets one SVD per node; so
    does one that requires a gradient, which is then differentiable.

    Cost: one Gram product with ``x`` per leaf, then per node on the core that is left.
    """
    x = check_dense(x, tree)
    if x.requires_grad and torch.is_grad_enabled():
        found = _svdvals_of_nodes(double(x), tree)
        return {node: s.to(x.real.dtype) for node, s in found.items()}
    values, log2 = scaled_spectra(x, tree)
    return {node: (s * 2.0**log2).to(x.real.dtype) for node, s in values.items()}


def scaled_spectra(x: Tensor, tree: ModeTree) -> tuple[dict[Node, Tensor], int]:
    """Compute ``(values, log2)`` of a checked tensor; its singular values are ``values * 2**log2``."""
    doubles = x.dtype in (torch.float64, torch.complex128)
    if x.numel() <= _SMALL and doubles and squares_fit(float(largest_of(x.detach()))):
        return _svdvals_of_nodes(x.detach(), tree), 0
    tensor, log2 = to_core(x, tree)
    core = Core(tensor, tree)
    spectra: dict[int, Tensor] = {}
    heights = tree.heights
    for cut in sorted(tree.cuts, key=lambda cut: min(heights[i] for i in cut)):
        i = min(cut, key=heights.__getitem__)
        core.merge(i)
        values, basis = _svd_of_axis(core.view(i), last=i in tree.links[-1])
        if basis is not None:
            core.project(i, basis)
        rows = math.prod(x.shape[m] for m in tree.modes_below(tree.nodes[i]))
        full = values.new_zeros(min(rows, x.numel() // rows))
        full[: min(len(values), len(full))] = values[: len(full)]
        spectra |= dict.fromkeys(cut, full)
    return {node: spectra[i] for i, node in enumerate(tree.nodes[:-1])}, log2


def _svdvals_of_nodes(x: Tensor, tree: ModeTree) -> dict[Node, Tensor]:
    spectra: dict[int, Tensor] = {}
    for cut in tree.cuts:
        matrix = matricize(x, tree.modes_below(tree.nodes[cut[0]]))
        spectra |= dict.fromkeys(cut, torch.linalg.svdvals(matrix))
    return {node: spectra[i] for i, node in enumerate(tree.nodes[:-1])}


def _svd_of_axis(view: Tensor, *, last: bool) -> tuple[Tensor, Tensor | None]:
    """Compute singular values of the middle axis against the others, and a basis of its rows.

    The basis is ``None`` if the rows are independent, or at the ``last`` nodes, which need none.
    """
    rows, others = view.shape[1], view.shape[0] * view.shape[2]
    if rows > others and last:  # the transpose has the same values
        view = view.transpose(0, 1).reshape(1, rows, others).mT
        rows, others = others, rows
    if rows <= others:
        gram = axis_gram(view)
        squares, basis = torch.linalg.eigh((gram + gram.mH) / 2)
        values = squares.clamp_min(0).sqrt().flip(0)
        if values[0] == 0:
            return values, None if last else basis[:, :1]
        if values[-1] > _GRAM_FLOOR * values[0]:
            return values, None
    factor = axis_triangle(view)
    if last:
        return torch.linalg.svdvals(factor), None
    left, values, _ = torch.linalg.svd(factor.mH, full_matrices=False)
    count = max(1, int((values > torch.finfo(values.dtype).eps * values[0]).sum()))
    return values, left[:, :count] if count < rows else None


def numerical_rank(s: Tensor, rtol: float) -> int:
    """Count singular values ``> rtol * s_max``."""
    rtol = check_number(rtol, "rtol", 0, 1)
    return int((s > rtol * s[0]).sum()) if len(s) else 0


def effective_rank(s: Tensor | Sequence[float]) -> Tensor:
    """Return the effective rank ``exp(-Σ p ln p)``, ``p = s / Σ s``, of a vector of singular values.

    Source: Roy and Vetterli (2007). The values are not negative, of shape ``(k,)``. The effective rank lies
    between 1 and the rank, is smooth where that jumps, and does not change when ``s`` is scaled.
    Differentiable; a zero vector gives 0.

    Example:
        >>> effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0]))
        tensor(3.)
    """
    s, largest, dtype = _check_values(s)
    if largest == 0:
        return torch.zeros_like(largest, dtype=dtype)
    s = s / largest  # a sum of huge values would overflow
    return torch.exp(_entropy(s / s.sum())).to(dtype)


def entanglement_entropy(s: Tensor | Sequence[float]) -> Tensor:
    """Return the entanglement entropy ``-Σ ρ ln ρ``, ``ρ = s² / Σ s²``, of values s in nats.

    The values are not negative, of shape ``(k,)``; the entropy is at most the logarithm of the rank.
    Differentiable; a zero vector gives 0.
    """
    s, largest, dtype = _check_values(s)
    if largest == 0:
        return torch.zeros_like(largest, dtype=dtype)
    square = (s / largest) ** 2
    return _entropy(square / square.sum()).to(dtype)


def _entropy(p: Tensor) -> Tensor:
    # 0 ln 0 = 0, with a zero instead of a NaN gradient
    p = torch.where(p > 0, p, torch.ones_like(p))
    return 0.0 - (p * p.log()).sum()  # not -0.0 where there is a single one


def _check_values(s: Tensor | Sequence[float]) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return the values in double precision, the largest as a constant (0 for none), and their dtype."""
    s = as_tensor(s)
    if s.ndim != 1 or not s.is_floating_point():
        raise ShapeError(
            f"expected a vector of real singular values, found shape {tuple(s.shape)}, dtype {s.dtype}."
        )
    dtype, s = s.dtype, double(s)
    fixed = s.detach()
    if not bool((torch.isfinite(fixed) & (fixed >= 0)).all()):
        raise DataError("singular values must be finite and not negative.")
    return s, fixed.max() if len(s) else fixed.sum(), dtype
