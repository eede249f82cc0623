"""Dense tensors along one axis at a time: products, singular vectors, and a core that shrinks up a tree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tnreg.tensors.arrays import double
from tnreg.trees.tree import ModeTree

# Numbers in the products of one call, before they are summed.
_CHUNK = 2**19
# In single precision: columns whose products are summed at once; the share of the largest square from which
# others are far below; and how often these are looked at again.
_PART, _FAR, _LEVELS = 2**13, 1e-5, 4


class Core:
    """A tensor whose axes are nodes of a tree, and become those of nodes further up.

    ``front`` are the positions of these nodes, at first the leaves if left out, in the order of the tree's
    leaves: the children of a node are neighbours, and nothing is permuted. -1 is an axis that stays.
    """

    def __init__(self, tensor: Tensor, tree: ModeTree, front: Sequence[int] | None = None) -> None:
        leaves = [i for i, below in enumerate(tree.links) if not below]
        self.tensor, self.tree = tensor, tree
        self.front = leaves if front is None else list(front)
        self.sizes = list(tensor.shape)

    def merge(self, i: int) -> tuple[int, ...]:
        """Make one axis of those of a node's children; return their sizes, at a leaf that of its mode."""
        below = self.tree.links[i]
        k = self.front.index(below[0] if below else i)
        end = k + max(len(below), 1)
        sizes = tuple(self.sizes[k:end])
        self.front[k:end], self.sizes[k:end] = [i], [math.prod(sizes)]
        return sizes

    def view(self, i: int) -> Tensor:
        """Return the tensor as ``(before, rows, behind)`` around a node's axis."""
        k = self.front.index(i)
        return self.tensor.reshape(math.prod(self.sizes[:k]), self.sizes[k], -1)

    def project(self, i: int, basis: Tensor) -> None:
        """Replace a node's axis by coordinates in a basis ``(rows, rank)``."""
        self.tensor = axis_product(self.view(i), basis)
        self.sizes[self.front.index(i)] = basis.shape[1]


def axis_gram(view: Tensor) -> Tensor:
    """Return ``Σ_ac v[a, i, c] conj(v[a, j, c])`` of a view ``(before, rows, behind)``."""
    before, rows, behind = view.shape
    if behind == 1:
        flat = view.reshape(before, rows)
        return flat.mT @ flat.conj()
    if before == 1 or behind < rows:  # many short products take longer than a copy
        flat = view.transpose(0, 1).reshape(rows, -1)
        return flat @ flat.mH
    chunk = max(1, _CHUNK // rows**2)
    if before <= chunk:
        return torch.bmm(view, view.mH).sum(0)
    gram = view.new_zeros(rows, rows)
    for part in torch.split(view, chunk):
        gram += torch.bmm(part, part.mH).sum(0)
    return gram


def axis_product(view: Tensor, basis: Tensor) -> Tensor:
    """Return ``Σ_i conj(basis[i, r]) v[a, i, c]``: ``(before, r, behind)``."""
    before, rows, behind = view.shape
    if behind == 1:
        return (view.reshape(before, rows) @ basis.conj()).unsqueeze(2)
    return torch.matmul(basis.mH, view)


def axis_triangle(view: Tensor) -> Tensor:
    """Return a matrix of at most ``rows`` rows; its conjugate transpose has the matricization's values.

    So it has its left singular vectors; the matricization is ``(rows, before * behind)``.
    """
    matrix = view.transpose(0, 1).reshape(view.shape[1], -1)
    return triangle(matrix.mH) if matrix.shape[1] > matrix.shape[0] else matrix.mH


def triangle(matrix: Tensor) -> Tensor:
    """Return the triangular factor of a matrix."""
    factor: Tensor = torch.linalg.qr(matrix, mode="r")[1]
    return factor


def left_vectors(
    rows: int,
    part: float | None,
    gram: Callable[[], Tensor],
    factor: Callable[[], Tensor],
    *,
    eps: float = torch.finfo(torch.float64).eps,
) -> tuple[Tensor, Tensor]:
    """Compute left singular vectors of a matrix, from its Gram matrix if that is accurate enough.

    Args:
        rows: How many it has.
        part: Share of the squared norm that may be cut off; ``None`` for nothing but zeros.
        gram: Computes the Gram matrix of its rows.
        factor: Computes what ``axis_triangle`` returns; used where squares would lose digits.
        eps: That of the numbers in both.

    Returns:
        The vectors, and the squared singular values, descending, rounded up (with a ``part``).
    """
    hidden = 2 * eps / math.sqrt(rows)
    if part is not None and part > 2 * rows * hidden:
        product = gram()
        squares, vectors = torch.linalg.eigh(product)
        trace = float(product.diagonal().real.sum())
        return vectors.flip(1), squares.flip(0).clamp_min(0) + hidden * trace
    left, values, _ = torch.linalg.svd(factor().mH, full_matrices=False)
    return left, (values + (0 if part is None else 4 * eps * values[0])).square()


def left_vectors_of_single(view: Tensor, allowed: float) -> tuple[Tensor, Tensor]:
    """Compute left singular vectors of single precision, from Gram matrices summed in double precision.

    Squares keep too few digits for small values: rows that are far below the largest, in the basis found so
    far, get a Gram matrix of their own, until what rounding may hide is a part of what is ``allowed`` to be
    cut off. Return what ``left_vectors`` does.
    """
    rows, start = view.shape[1], 0
    basis = double(torch.eye(rows, dtype=view.dtype, device=view.device))
    squares = basis.real.new_zeros(rows)
    for _ in range(_LEVELS):
        tail = basis[:, start:]
        turn, gram = tail.mH.to(view.dtype), tail.new_zeros(rows - start, rows - start)
        for part in _parts(view):
            turned = turn @ part if start else part
            gram += turned @ turned.mH
        values, vectors = torch.linalg.eigh(gram)
        values = values.flip(0).clamp_min(0)
        hidden = 2 * torch.finfo(view.dtype).eps / math.sqrt(rows) * float(values.sum())
        basis[:, start:] = tail @ vectors.flip(1)
        squares[start:] = values + hidden
        start += int((values > _FAR * values[0]).sum())
        if 8 * rows * hidden <= allowed or start == rows:
            break
    return basis.to(view.dtype), squares


def _parts(view: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a view in parts of some columns, which stay in the cache."""
    before, rows, behind = view.shape
    if before == 1:
        yield from torch.split(view[0], _PART, 1)
    else:
        for part in torch.split(view, max(_PART // behind, 1)):
            yield part.transpose(0, 1).reshape(rows, -1)


def rounding_rtol(longest: int | None, dtype: torch.dtype, work: torch.dtype) -> float:
    """Return the share of the largest singular value up to which others are zero to rounding.

    ``8 eps + sqrt(longest) eps(work)``, at most 1/2, ``longest`` the longer side of the matrix; for that of
    a factorization, which is never formed, ``None``: 1000 in place of the root.
    Entries rounded to a dtype are off by up to ``eps/2`` of themselves. Where these errors are independent,
    their singular values are some ``eps/4 (sqrt(rows) + sqrt(columns))`` times the mean square root of the
    entries, which is below ``eps`` times the largest value for any shape; in the worst case, at rank r, they
    are ``sqrt(r) eps/2``. The 8 leaves room for the arithmetic that made the data. The second term is for
    that of the decomposition itself, whose errors grow with the root of the length (measured: a fifth of it).
    """
    length = 1000.0 if longest is None else math.sqrt(longest)
    return min(8 * torch.finfo(dtype).eps + length * torch.finfo(work).eps, 0.5)


def cut_smallest(squares: Sequence[Tensor], allowed: float) -> list[Tensor]:
    """Return for each group which squares may go: the smallest of all whose sum is within what is allowed."""
    ascending, places = torch.cat([group.flatten() for group in squares]).sort(stable=True)
    cut = torch.zeros_like(ascending, dtype=torch.bool)
    cut[places[ascending.cumsum(0) <= allowed]] = True
    masks = torch.split(cut, [group.numel() for group in squares])
    return [mask.reshape(group.shape) for mask, group in zip(masks, squares, strict=True)]
