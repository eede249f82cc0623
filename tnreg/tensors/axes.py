"""Dense tensors along one axis at a time: products, singular vectors, and a core that shrinks up a tree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tnreg.trees.tree import ModeTree

# Numbers in the products of one call, before they are summed.
_CHUNK = 2**19


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
    if part is not None and part > 8 * rows * hidden:
        product = gram()
        squares, vectors = torch.linalg.eigh(product)
        trace = float(product.diagonal().real.sum())
        return vectors.flip(1), squares.flip(0).clamp_min(0) + hidden * trace
    left, values, _ = torch.linalg.svd(factor().mH, full_matrices=False)
    return left, (values + (0 if part is None else 4 * eps * values[0])).square()


def cut_smallest(squares: Sequence[Tensor], allowed: float) -> list[Tensor]:
    """Return for each group which squares may go: the smallest of all whose sum is within what is allowed."""
    ascending, places = torch.cat([group.flatten() for group in squares]).sort(stable=True)
    cut = torch.zeros_like(ascending, dtype=torch.bool)
    cut[places[ascending.cumsum(0) <= allowed]] = True
    masks = torch.split(cut, [group.numel() for group in squares])
    return [mask.reshape(group.shape) for mask, group in zip(masks, squares, strict=True)]
