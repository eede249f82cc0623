"""Ranks of dense tensors: matricizations along a tree, their singular values, and what to read off them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg.errors import DataError, OptionError, ShapeError
from tnreg.tree import ModeTree, Node

__all__ = [
    "as_tensor",
    "check_dense",
    "dense_spectra",
    "effective_rank",
    "entanglement_entropy",
    "matricize",
    "numerical_rank",
]

# Eigenvalues of a Gram matrix carry an error of about eps * s_max². A singular value s then has an
# error of about eps * s_max² / s, below 1e-11 * s_max for s > 1e-4 * s_max.
_GRAM_FLOOR = 1e-4


def matricize(tensor: Tensor | np.ndarray[Any, Any], modes: Sequence[int] | int) -> Tensor:
    """Matrix of a tensor with the given modes as rows and the other modes as columns.

    Rows and columns run through their modes in ascending order, last index fastest. A view where
    possible; differentiable.

    Args:
        tensor: Shape ``(D_0, ..., D_{N-1})``.
        modes: Modes of the rows, in any order; a proper or improper subset of ``0..N-1``.

    Returns:
        Shape ``(product of D_n over modes, product over the others)``.

    Raises:
        ShapeError: A mode is out of range or named twice.

    Example:
        >>> matricize(torch.zeros(2, 3, 5), (0, 2)).shape
        torch.Size([10, 3])
    """
    tensor = as_tensor(tensor)
    rows = sorted(modes) if isinstance(modes, Iterable) else [modes]
    if len(set(rows)) < len(rows) or any(not 0 <= m < tensor.ndim for m in rows):
        raise ShapeError(
            f"matricize: modes must be distinct and within 0..{tensor.ndim - 1}, found {modes}."
        )
    columns = [m for m in range(tensor.ndim) if m not in rows]
    height = math.prod(tensor.shape[m] for m in rows)
    return tensor.permute(rows + columns).reshape(height, -1)


def as_tensor(values: Any) -> Tensor:
    """Numbers of any kind as a torch tensor: torch, numpy in any layout or byte order, nested lists."""
    if isinstance(values, Tensor):
        return values.to_dense() if values.layout != torch.strided else values
    try:
        array = np.asarray(values)
        native = array.astype(array.dtype.newbyteorder("="))  # torch reads the machine's order only
        return torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"not a tensor of numbers: {type(values).__name__}.\n  {error}\n"
            "  a file or a named tensor is read by tnreg.load_tensor(...).values"
        ) from None


def check_dense(tensor: Any, tree: ModeTree, *, sizes: Sequence[int] | None = None) -> Tensor:
    """The tensor as a finite floating-point torch tensor of ``tree.order`` axes, or one clear error."""
    tensor = as_tensor(tensor)
    if tensor.ndim != tree.order:
        raise ShapeError(
            f"the tensor has {tensor.ndim} axes and the tree {tree.order} modes.\n"
            f"  found:    shape {tuple(tensor.shape)}\n"
            f"  expected: one axis for each of the modes 0..{tree.order - 1}"
        )
    if sizes is not None and tuple(tensor.shape) != tuple(sizes):
        raise ShapeError(
            f"the tensor has other sizes than expected.\n"
            f"  found:    {tuple(tensor.shape)}\n  expected: {tuple(sizes)}"
        )
    return check_numbers(tensor)


def check_numbers(tensor: Tensor) -> Tensor:
    """Refuse integer, empty, NaN and infinite data."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise DataError(
            f"the tensor has dtype {tensor.dtype}; ranks and factorizations need real or complex numbers.\n"
            "  write tensor.to(torch.float64)"
        )
    if tensor.numel() == 0:
        raise DataError(f"the tensor is empty: shape {tuple(tensor.shape)}.")
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        nan = int(torch.isnan(tensor).sum())
        raise DataError(
            f"the tensor has {bad} entries that are not finite ({nan} NaN, {bad - nan} infinite) "
            f"of {tensor.numel()}.\n"
            "  if NaN marks missing entries: completion(tensor, samples, missing='nan')"
        )
    return tensor


def dense_spectra(x: Tensor | np.ndarray[Any, Any], tree: ModeTree) -> dict[Node, Tensor]:
    """Singular values of a dense tensor's matricization at every node but the root.

    Leaves come first; every node with fewer independent rows than rows is then replaced by its
    coordinates in them, so that larger nodes work on a smaller core with the same singular values.
    Each spectrum comes from the Gram matrix of the shorter side in float64; if it reaches below
    1e-4 of its largest value, where squaring loses digits, it is computed again from a QR
    factorization. Errors stay below 1e-11 of the largest singular value (float64).

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
        return {
            node: torch.linalg.svdvals(matricize(x, tree.modes_below(node)))
            for node in tree.nodes[:-1]
        }
    shape, dtype = x.shape, x.dtype
    wide = torch.complex128 if x.is_complex() else torch.float64
    core = x.detach().to(wide if x.device.type != "mps" else dtype)
    scale = core.abs().max()
    if scale > 0:
        core = core / scale  # squares neither overflow nor underflow
    eps = torch.finfo(core.dtype).eps
    axes = [tree.position(mode) for mode in tree.leaves]  # the node of every axis of the core
    total = math.prod(shape)
    found: dict[int, Tensor] = {}
    for i in sorted(range(len(tree.nodes) - 1), key=lambda i: tree.heights[i]):
        if tree.links[i]:
            core, axes = _merge_axes(core, axes, tree.links[i], i)
        axis = axes.index(i)
        matrix = matricize(core, axis)
        values, basis = _svd_rows(matrix, eps)
        rows = math.prod(shape[m] for m in tree.modes_below(tree.nodes[i]))
        full = values.new_zeros(min(rows, total // rows))
        full[: min(len(values), len(full))] = values[: len(full)]
        found[i] = (full * scale).to(x.real.dtype if x.is_complex() else dtype)
        if basis is not None:
            core = (basis.mH @ matrix).reshape(
                -1, *(n for k, n in enumerate(core.shape) if k != axis)
            )
            axes = [i, *(a for a in axes if a != i)]
    return {tree.nodes[i]: found[i] for i in range(len(tree.nodes) - 1)}


def _merge_axes(
    core: Tensor, axes: list[int], below: Sequence[int], node: int
) -> tuple[Tensor, list[int]]:
    """The core with the axes of a node's children made one, in front."""
    which = [axes.index(c) for c in below]
    rest = [k for k in range(core.ndim) if k not in which]
    merged = matricize(core, which).reshape(-1, *(core.shape[k] for k in rest))
    return merged, [node, *(axes[k] for k in rest)]


def _svd_rows(matrix: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """Singular values, and an orthonormal basis of the rows if they are dependent."""
    rows, columns = matrix.shape
    if rows <= columns:
        gram = matrix @ matrix.mH
        squares, basis = torch.linalg.eigh((gram + gram.mH) / 2)
        values = squares.clamp_min(0).sqrt().flip(0)
        if values[0] == 0:
            return values, basis[:, :1]
        if values[-1] > _GRAM_FLOOR * values[0]:
            return values, None
        # R of the conjugate transpose has the same singular values; its right vectors are the basis
        triangle = torch.linalg.qr(matrix.mH, mode="r")[1]
        _, values, right = torch.linalg.svd(triangle, full_matrices=False)
        kept = int((values > eps * values[0]).sum())
        return values, right.mH[:, :kept] if kept < rows else None
    basis, triangle = torch.linalg.qr(matrix)
    left, values, _ = torch.linalg.svd(triangle, full_matrices=False)
    kept = max(1, int((values > eps * values[0]).sum()))
    return values, basis @ left[:, :kept]


def numerical_rank(s: Tensor, rtol: float) -> int:
    """Count of singular values ``> rtol * s_max``."""
    if not 0 <= rtol < 1:
        raise OptionError(f"rtol must be in [0, 1), found {rtol!r}.")
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
    return -(p * p.log()).sum()


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
