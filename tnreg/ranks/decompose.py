"""Hierarchical singular value decomposition along any tree: from a dense tensor, or from a factorization.

Grasedyck (2010): cut the singular values of the matricization at every node. ``truncate`` rounds a
factorization without its dense tensor: the squares of what is discarded anywhere bound that of the
error, so the smallest singular values of all nodes together go first. ``decompose`` goes from the
leaves up on a core that shrinks with every node, where what is discarded adds up to the error exactly;
it spends a part of the tolerance there and the rest by ``truncate``. In both the tolerance is an upper
bound on the relative error, always (down to the rounding of the dtype).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg.errors import OptionError, ShapeError
from tnreg.factorizations.factorization import Factorization
from tnreg.ranks.rounding import built, limits_of, on_network, rounded, share_of
from tnreg.tensors.arrays import as_tensor, axis_gram, axis_product, check_dense, ready
from tnreg.tensors.blocks import (
    Compressed,
    as_blocks,
    compress,
    distance_of,
    is_blocks,
    memory_of,
    positions_below,
    whole,
)
from tnreg.tensors.passes import norms_of, squared_norms
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

# Share of the tolerance that decompose may spend on the way up: a larger one makes the core smaller,
# a smaller one leaves more to where it is needed.
_FIRST_SHARE = 0.3

# What is kept of a node with more rows than this is looked for with random vectors first, if asked for.
_RANDOMIZED_ROWS = 64


def decompose(
    tensor: Tensor | np.ndarray[Any, Any] | Any,
    tree: ModeTree,
    *,
    ranks: int | Mapping[Node, int] | None = None,
    rtol: float | None = None,
    randomized: bool = False,
    seed: int = 0,
    memory: int | str | None = None,
) -> Factorization:
    """Hierarchical singular value decomposition of a dense tensor, with full joins.

    All weights but the root's have orthonormal columns. With the singular values ``σ_i(v)`` of ``A`` at
    node v and the bond ``R_v`` above it (not ``randomized``)

        ‖A - A_H‖² <= Σ_v Σ_{i > R_v} σ_i(v)²

    over all nodes but the root, where the children of a binary root count once (Grasedyck 2010). What was
    in fact cut off is summed up in ``error_bound``. What a node does not need of the tolerance is there
    for the others.

    Args:
        tensor: Real or complex tensor ``(D_0, ..., D_{N-1})``; or an array of Dask, zarr or h5py, which may
            be larger than memory.
        tree: Mode tree over ``0..N-1``. A star gives the Tucker decomposition, a caterpillar the tensor
            train, a binary tree hierarchical Tucker.
        ranks: Largest bond: one integer, or ``{node: integer}`` (nodes left out have no limit).
        rtol: ``‖A - A_H‖ <= rtol ‖A‖``, unless ``ranks`` cut further. With neither, only what is
            zero to rounding is cut.
        randomized: Look for the columns to keep of large nodes with random vectors first (Halko,
            Martinsson and Tropp 2011). The error is measured, not estimated, so that the guarantee is
            the same; bonds may be a little larger. Where the tolerance is too tight to measure it by
            (below some 1e-6) random vectors are not used.
        seed: Draws those vectors.
        memory: For arrays that are read block by block: bytes that arrays may take, or text such as
            ``"1GiB"``; a quarter of what is available if left out.

    Returns:
        A ``Factorization`` of the tensor's dtype; its ``error_bound`` bounds ``‖A - A_H‖``.

    Raises:
        ShapeError, DataError: The tensor does not fit the tree, or has NaN or infinite entries.
        OptionError: ``rtol`` outside ``[0, 1)``, or ranks that are no positive integers.
        SizeError: Read block by block, the tensor does not get small enough for the memory allowed.

    Cost: a Gram matrix per node, of the tensor for the first leaf, of a smaller core afterwards; QR
    factorizations where the tolerance is too tight for squares. Works in double precision. Block by
    block: the tensor is read once per mode (small modes together) and once more, see
    ``tnreg.tensors.blocks``.

    Example:
        >>> tree, pair = ModeTree.binary(4), torch.eye(3, dtype=torch.float64)
        >>> found = decompose(torch.einsum("ac,bd->abcd", pair, pair), tree)
        >>> found.weights[(0, 1)].shape, bool(found.error_bound < 1e-10)
        (torch.Size([3, 3, 9]), True)
    """
    if isinstance(tensor, Factorization):
        raise OptionError("decompose is for dense tensors; write truncate(model, rtol=...).")
    tree = tree if isinstance(tree, ModeTree) else ModeTree(tree)
    if is_blocks(tensor):
        array, allowed = as_blocks(tensor), memory_of(memory)
        small = whole(array, allowed)
        if small is None:
            return _decompose_blocks(array, tree, limits_of(tree, ranks), share_of(rtol), allowed)
        tensor = small
    with torch.no_grad():
        dense = check_dense(tensor, tree).detach()
        limits = limits_of(tree, ranks)
        share = share_of(rtol)
        core, log2 = ready(dense, tree)
        random = torch.Generator(core.device).manual_seed(seed) if randomized else None
        first = share if share is None else _FIRST_SHARE * share
        sweep = _Sweep(core, tree, limits, first, random)
        top = len(tree.nodes) - 1
        weights = sweep.run(range(top), top)
        if not share or sweep.total == 0:
            return built(tree, weights, log2, dense.dtype, math.sqrt(sweep.lost))
        return _finished(tree, weights, limits, share, sweep, log2, dense.dtype)


def _finished(
    tree: ModeTree,
    weights: Mapping[int, Tensor],
    limits: Mapping[int, int],
    share: float | None,
    sweep: _Sweep,
    log2: int,
    dtype: torch.dtype,
) -> Factorization:
    """Rounded with what the sweep has left of the tolerance."""
    left = None
    if share is not None:
        left = max(share**2 * sweep.total - sweep.lost, 0.0) / (sweep.total - sweep.lost)
    net, stacks = on_network(tree, weights)
    rest = rounded(net, stacks, limits, None if left is None else math.sqrt(left), orthonormal=True)
    lost = sweep.lost + rest.lost * (rest.size * 2.0**rest.power) ** 2
    found = rest.weights
    found[len(tree.nodes) - 1] *= 2.0**rest.power
    return built(tree, found, log2, dtype, math.sqrt(lost))


def _decompose_blocks(
    array: Any, tree: ModeTree, limits: Mapping[int, int], share: float | None, memory: int
) -> Factorization:
    """The tensor reduced to a core block by block; the rest in memory."""
    with torch.no_grad():
        first = share if share is None else _FIRST_SHARE * share
        found = compress(array, tree, limits, share, memory)
        weights = _weights_below(found, tree)
        sweep = _Sweep(
            found.core, tree, limits, first, None,
            front=found.front, total=found.total, lost=found.lost,
        )  # fmt: skip
        top = len(tree.nodes) - 1
        weights |= sweep.run([i for i in range(top) if i not in weights], top)
        dtype = getattr(torch, array.dtype.name)
        if sweep.total == 0:
            return built(tree, weights, found.log2, dtype, 0.0)
        return _finished(tree, weights, limits, share, sweep, found.log2, dtype)


def _weights_below(found: Compressed, tree: ModeTree) -> dict[int, Tensor]:
    """Weights of all nodes that have a basis, and of those below them."""
    weights = dict(found.bases)
    for i in found.split:
        inside = positions_below(tree, i)
        leaves = [c for c in sorted(inside) if not tree.links[c]]
        sweep = _Sweep(found.bases[i], tree, {}, None, None, front=[*leaves, -1])
        weights |= sweep.run(inside, i)
    return weights


class _Sweep:
    """From the leaves up: at every node a basis of the core's rows, then the core in that basis.

    The core's axes are nodes in the order of the tree's leaves, so that the children of a node are
    always neighbours and nothing has to be permuted.

    Args:
        core: The tensor.
        tree: The tree.
        limits: Largest ranks by position.
        share: Error allowed, relative to the norm; ``None`` cuts what is zero to rounding.
        random: Draws the vectors of randomized sweeps.
        front: What the axes are; the leaves if left out. -1 is an axis that stays.
        total: Square of the norm of the tensor, if the core has lost some of it.
        lost: What it has lost.
    """

    def __init__(
        self,
        core: Tensor,
        tree: ModeTree,
        limits: Mapping[int, int],
        share: float | None,
        random: torch.Generator | None,
        *,
        front: Sequence[int] | None = None,
        total: float | None = None,
        lost: float = 0.0,
    ) -> None:
        self.core, self.tree, self.limits, self.random = core, tree, limits, random
        self.exact = share is None
        leaves = [i for i, below in enumerate(tree.links) if not below]
        self.front = leaves if front is None else list(front)
        self.sizes = list(core.shape)
        self.total = float(_square(core)) if total is None else total
        self.left = max((share or 0.0) ** 2 * self.total - lost, 0.0)
        self.lost = lost
        self.at = 0  # which axis of the core is looked at

    def run(self, nodes: Sequence[int], last: int) -> dict[int, Tensor]:
        """Weights by position; that of the last node is the core that is left.

        Args:
            nodes: Positions of the nodes to handle, all of them below ``last``.
            last: Position of the node whose children's axes are left at the end.
        """
        tree = self.tree
        weights: dict[int, Tensor] = {}
        order = sorted(nodes, key=lambda i: tree.heights[i])
        # the last child of a binary root has the rank of its sibling and discards nothing
        shared = last == len(tree.nodes) - 1 and len(tree.links[last]) == 2
        for count, i in enumerate(order):
            shape = self._merge(i)
            spenders = len(order) - shared - count
            allowed = self.left / max(spenders, 1)
            self.at = self.front.index(i)
            behind = math.prod(self.sizes[self.at + 1 :])
            view = self.core.reshape(-1, self.sizes[self.at], behind)
            basis, lost = self._basis(view, allowed, self.limits.get(i))
            self.left -= min(lost, self.left)
            self.lost += lost
            weights[i] = basis.reshape(*shape, -1)
        weights[last] = self.core.reshape(self.sizes)
        return weights

    def _merge(self, i: int) -> tuple[int, ...]:
        below = self.tree.links[i]
        if not below:
            return (self.sizes[self.front.index(i)],)
        k = self.front.index(below[0])
        shape = tuple(self.sizes[k : k + len(below)])
        self.front[k : k + len(below)] = [i]
        self.sizes[k : k + len(below)] = [math.prod(shape)]
        return shape

    def _basis(self, view: Tensor, allowed: float, limit: int | None) -> tuple[Tensor, float]:
        """An orthonormal basis ``(rows, r)`` of what is kept, and the square of what is discarded."""
        rows, others = view.shape[1], view.numel() // view.shape[1]
        inside, outside = None, 0.0
        if self.random is not None and min(rows, others) > _RANDOMIZED_ROWS:
            inside, outside = self._range(view, allowed, limit)
        if inside is not None:
            self._apply(view, inside)
            view = self.core.reshape(view.shape[0], inside.shape[1], -1)
        left, squares = _left_vectors(view, allowed, self.exact)
        if self.exact:
            floor = (max(rows, others) * torch.finfo(squares.dtype).eps) ** 2 * float(squares[0])
            kept = int((squares > floor).sum())
        else:  # the smallest first, as long as they fit
            fits = squares.flip(0).cumsum(0) <= allowed - outside
            kept = len(squares) - int(fits.sum())
        kept = max(1, kept if limit is None else min(kept, limit))
        lost = outside + float(squares[kept:].sum())
        if kept < view.shape[1]:
            basis = left[:, :kept]
            self._apply(view, basis)
        else:
            basis = torch.eye(kept, dtype=view.dtype, device=view.device)
        return basis if inside is None else inside @ basis, lost

    def _apply(self, view: Tensor, basis: Tensor) -> None:
        """The core in the coordinates of the basis."""
        self.core = axis_product(view, basis)
        self.sizes[self.at] = basis.shape[1]

    def _range(
        self, view: Tensor, allowed: float, limit: int | None
    ) -> tuple[Tensor | None, float]:
        """A basis outside of which lies at most what may be discarded, and how much does.

        From products with random vectors, until what is outside is small enough; ``None`` if that
        would not be fewer than half of the rows, or if differences of squares cannot tell so little.
        With nothing but a limit one set of vectors has to do.
        """
        before, rows, behind = view.shape
        whole = float(_square(view))
        hidden = 16 * torch.finfo(view.real.dtype).eps * whole
        by_limit = self.exact and limit is not None
        if not by_limit and hidden > allowed / 2:
            return None, 0.0
        basis = view.new_zeros(rows, 0)
        width = _RANDOMIZED_ROWS // 2 if limit is None else limit + 8
        while basis.shape[1] + width < min(rows, before * behind) // 2:
            drawn = torch.randn(before, behind, width, generator=self.random, device=view.device,
                                dtype=view.real.dtype).to(view.dtype)  # fmt: skip
            sample = torch.bmm(view, drawn).sum(0)
            for _ in range(2):  # twice: once leaves the rounding of the first
                sample = torch.linalg.qr(sample - basis @ (basis.mH @ sample))[0]
            basis = torch.cat([basis, sample], 1)
            outside = max(whole - float(_square(torch.matmul(basis.mH, view))), 0.0)
            if by_limit or outside <= allowed / 2:
                return basis, outside + hidden
            width *= 2
        return None, 0.0


def _left_vectors(view: Tensor, allowed: float, exact: bool) -> tuple[Tensor, Tensor]:
    """Left singular vectors of the middle axis against the others, and squared singular values.

    The squares are descending and rounded up by what rounding may hide. They come from the Gram matrix
    where that is accurate enough for the tolerance, and from a QR factorization elsewhere.
    """
    before, rows, behind = view.shape
    others = before * behind
    eps = torch.finfo(view.real.dtype).eps
    if rows <= others and not exact:
        gram = axis_gram(view)
        hidden = 2 * eps * float(gram.diagonal().real.sum()) / math.sqrt(rows)
        if allowed > 8 * rows * hidden:
            squares, vectors = torch.linalg.eigh(gram)
            return vectors.flip(1), squares.flip(0).clamp_min(0) + hidden
    matrix = view.permute(1, 0, 2).reshape(rows, others)
    if rows <= others:
        triangle = torch.linalg.qr(matrix.mH, mode="r")[1]
        left, values, _ = torch.linalg.svd(triangle.mH, full_matrices=False)
    else:
        outer, triangle = torch.linalg.qr(matrix)
        left, values, _ = torch.linalg.svd(triangle, full_matrices=False)
        left = outer @ left
    return left, (values + (0 if exact else 4 * eps * values[0])).square()


def truncate(
    model: Factorization,
    *,
    ranks: int | Mapping[Node, int] | None = None,
    rtol: float | None = None,
) -> Factorization:
    """Round a factorization to smaller bonds, with full joins, without its dense tensor.

    Singular values of all nodes are pooled, and the smallest of them discarded as long as the sum of their
    squares, ``error_bound²`` (see ``decompose``), is less than the tolerance allows: the two children of
    a binary root share theirs, and count once (Grasedyck 2010).

    Args:
        model: Any joins, any root. Wide diagonal joins are never expanded.
        ranks: Largest bond: one integer, or ``{node: integer}``.
        rtol: ``‖A - A_H‖ <= rtol ‖A‖``, unless ``ranks`` cut further. With neither, only what is
            zero to rounding is cut.

    Returns:
        A ``Factorization`` of the same dtype; its ``error_bound`` bounds ``‖A - A_H‖``.

    Raises:
        OptionError: ``rtol`` outside ``[0, 1)``, or ranks that are no positive integers.
        ShapeError: A node with so many children that its core would not fit into memory.

    Cost: QR and singular values per node: linear in the number of nodes, fourth order in the bonds of a
    binary tree. Works in double precision and on logarithmic scales.
    """
    if not isinstance(model, Factorization):
        raise OptionError(
            f"truncate is for factorizations, found {type(model).__name__}; write decompose(tensor, tree)."
        )
    net = model.network
    limits, share = limits_of(model.tree, ranks), share_of(rtol)
    with torch.no_grad():
        wide = torch.complex128 if model.dtype.is_complex else torch.float64
        found = rounded(net, [stack.to(wide) for stack in model.stacks], limits, share)
        lost = math.sqrt(found.lost) * found.size
        return built(model.tree, found.weights, found.power, model.dtype, lost)


def distance(
    tensor: Any, model: Factorization, *, memory: int | str | None = None
) -> tuple[float, float]:
    """How far a factorization is from a tensor, and how large the tensor is.

    Args:
        tensor: Dense, or an array of Dask, zarr or h5py, which is read once.
        model: A factorization of the same sizes.
        memory: As in ``decompose``.

    Returns:
        Frobenius norms of the difference and of the tensor.

    Raises:
        ShapeError: Other sizes.
    """
    tensor = as_blocks(tensor) if is_blocks(tensor) else as_tensor(tensor)
    sizes = tuple(tensor.shape)
    if sizes != model.sizes:
        raise ShapeError(
            f"the tensor has other sizes than the model.\n  found: {sizes}\n  model: {model.sizes}"
        )
    with torch.no_grad():
        if is_blocks(tensor):
            return distance_of(tensor, _Parts(model), memory_of(memory))
        return norms_of(squared_norms(check_dense(tensor, model.tree), model.to_tensor()))


class _Parts:
    """Dense parts of a factorization."""

    def __init__(self, model: Factorization) -> None:
        self.tree = model.tree
        self.weights = {node: w.detach().cpu() for node, w in model.weights.items()}
        self.joins = model.network.named_joins

    def __call__(self, slab: Sequence[slice]) -> Tensor:
        held = {n: w[slab[n]] if isinstance(n, int) else w for n, w in self.weights.items()}
        with torch.no_grad():
            return Factorization.from_weights(self.tree, held, join=self.joins).to_tensor()


def _square(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm.square()
