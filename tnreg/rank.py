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
    "axis_gram",
    "axis_product",
    "check_dense",
    "dense_spectra",
    "effective_rank",
    "entanglement_entropy",
    "largest_of",
    "matricize",
    "numerical_rank",
    "ready",
    "scaled_spectra",
    "squares_fit",
    "times_power_of_two",
]

# Eigenvalues of a Gram matrix carry an error of about eps * s_max². A singular value s then has an
# error of some 10 eps * s_max² / s, below 1e-11 * s_max for s > 1e-3 * s_max.
_GRAM_FLOOR = 1e-3

# Tensors up to here get one SVD per node: more would take longer than it saves.
_SMALL = 2**14

# Numbers in the products of one call, before they are summed.
_CHUNK = 2**19


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
    """Numbers of any kind as a torch tensor: torch, numpy in any layout or byte order, DLPack, lists."""
    if isinstance(values, Tensor):
        return values.to_dense() if values.layout != torch.strided else values
    try:
        if hasattr(values, "__dlpack__") and not hasattr(values, "__array__"):
            return torch.utils.dlpack.from_dlpack(values)
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


def ready(x: Tensor, tree: ModeTree) -> tuple[Tensor, int]:
    """``(core, log2)``: the tensor is ``core * 2**log2`` with its axes in the order of the tree's leaves.

    In double precision, on a scale whose squares stay in range.
    """
    wide = torch.complex128 if x.is_complex() else torch.float64
    core = x.detach().permute(tree.leaf_order)
    core = core.to(wide if x.device.type != "mps" else x.dtype).contiguous()
    largest = float(largest_of(core))
    if squares_fit(largest):
        return core, 0
    log2 = math.frexp(largest)[1] - 1
    return times_power_of_two(core, -log2), log2


def times_power_of_two(x: Any, exponent: int) -> Any:
    """``x * 2**exponent`` of a number or a tensor, also where the power itself leaves the range."""
    half = exponent // 2
    return x * 2.0**half * 2.0 ** (exponent - half)


def squares_fit(largest: float) -> bool:
    """Whether squares of numbers up to this, and their sums, stay in the range of doubles with all digits."""
    return largest == 0 or 1e-100 < largest < 1e100


def largest_of(x: Tensor) -> Tensor:
    """Largest magnitude (within a factor of sqrt 2 for complex numbers), without a copy."""
    parts = torch.view_as_real(x) if x.is_complex() else x
    low, high = torch.aminmax(parts)
    return torch.maximum(-low, high)


def axis_gram(view: Tensor) -> Tensor:
    """``Σ_ac v[a, i, c] conj(v[a, j, c])`` of a view ``(before, rows, behind)``, without moving axes."""
    before, rows, behind = view.shape
    if behind == 1:
        flat = view.reshape(before, rows)
        return flat.mT @ flat.conj()
    if before == 1:
        flat = view.reshape(rows, behind)
        return flat @ flat.mH
    chunk = max(1, _CHUNK // rows**2)
    if before <= chunk:
        return torch.bmm(view, view.mH).sum(0)
    gram = view.new_zeros(rows, rows)
    for part in torch.split(view, chunk):
        gram += torch.bmm(part, part.mH).sum(0)
    return gram


def axis_product(view: Tensor, basis: Tensor) -> Tensor:
    """``Σ_i conj(basis[i, r]) v[a, i, c]``: ``(before, r, behind)``."""
    before, rows, behind = view.shape
    if behind == 1:
        return (view.reshape(before, rows) @ basis.conj()).unsqueeze(2)
    return torch.matmul(basis.mH, view)


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
