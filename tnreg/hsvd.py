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
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg.errors import OptionError, ShapeError
from tnreg.factorization import Factorization
from tnreg.frames import Batch, Frame, Outside, batches, climb, frames, outside, scale_of, taken
from tnreg.network import Network
from tnreg.rank import axis_gram, axis_product, check_dense, largest_of
from tnreg.tree import ModeTree, Node

__all__ = ["decompose", "truncate"]

# Share of the tolerance that decompose may spend on the way up: a larger one makes the core smaller,
# a smaller one leaves more to where it is needed.
_FIRST_SHARE = 0.3

# What is kept of a node with more rows than this is looked for with random vectors first, if asked for.
_RANDOMIZED_ROWS = 64

_LARGEST_CORE = 2**31


def decompose(
    tensor: Tensor | np.ndarray[Any, Any],
    tree: ModeTree,
    *,
    ranks: int | Mapping[Node, int] | None = None,
    rtol: float | None = None,
    randomized: bool = False,
    seed: int = 0,
) -> Factorization:
    """Hierarchical singular value decomposition of a dense tensor, with full joins.

    All weights but the root's have orthonormal columns. What a node does not need of the tolerance is
    there for the others.

    Args:
        tensor: Real or complex tensor ``(D_0, ..., D_{N-1})``.
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

    Returns:
        A ``Factorization`` of the tensor's dtype; its ``error_bound`` bounds ``‖A - A_H‖``.

    Raises:
        ShapeError, DataError: The tensor does not fit the tree, or has NaN or infinite entries.
        OptionError: ``rtol`` outside ``[0, 1)``, or ranks that are no positive integers.

    Cost: a Gram matrix per node, of the tensor for the first leaf, of a smaller core afterwards; QR
    factorizations where the tolerance is too tight for squares. Works in double precision.

    Example:
        >>> tree, pair = ModeTree.binary(4), torch.eye(3, dtype=torch.float64)
        >>> found = decompose(torch.einsum("ac,bd->abcd", pair, pair), tree)
        >>> found.weights[(0, 1)].shape, bool(found.error_bound < 1e-10)
        (torch.Size([3, 3, 9]), True)
    """
    if isinstance(tensor, Factorization):
        raise OptionError("decompose is for dense tensors; write truncate(model, rtol=...).")
    tree = tree if isinstance(tree, ModeTree) else ModeTree(tree)
    with torch.no_grad():
        dense = check_dense(tensor, tree).detach()
        limits = _limits(tree, ranks)
        share = _share(rtol)
        wide = torch.complex128 if dense.is_complex() else torch.float64
        order = [name for name, below in zip(tree.nodes, tree.links, strict=True) if not below]
        core = dense.permute([int(n) for n in order]).to(wide)  # type: ignore[call-overload]
        log2, largest = 0, float(largest_of(core))
        if largest > 0 and not 1e-100 < largest < 1e100:  # squares would leave the range
            log2 = math.frexp(largest)[1]
            half = log2 // 2  # the power itself may leave the range
            core = core * 2.0**-half * 2.0 ** (half - log2)
        random = torch.Generator(core.device).manual_seed(seed) if randomized else None
        first = share if share is None else _FIRST_SHARE * share
        sweep = _Sweep(core.contiguous(), tree, limits, first, random)
        weights = sweep.run()
        if not share or sweep.total == 0:
            return _built(tree, weights, log2, dense.dtype, math.sqrt(sweep.lost))
        left = max(share**2 * sweep.total - sweep.lost, 0.0) / (sweep.total - sweep.lost)
        net = Network.build(
            tree,
            [weights[tree.position(mode)].shape[0] for mode in tree.leaves],
            {node: weights[i].shape[-1] for i, node in enumerate(tree.nodes[:-1])},
            join="full",
        )
        stacks = [torch.stack([weights[i] for i in stack.positions]) for stack in net.stacks]
        rounded = _rounded(net, stacks, limits, math.sqrt(left), orthonormal=True)
        lost = sweep.lost + rounded.lost * (rounded.size * 2.0**rounded.power) ** 2
        weights = rounded.weights
        weights[len(tree.nodes) - 1] *= 2.0**rounded.power
        return _built(tree, weights, log2, dense.dtype, math.sqrt(lost))


class _Sweep:
    """From the leaves up: at every node a basis of the core's rows, then the core in that basis.

    The core's axes are nodes in the order of the tree's leaves, so that the children of a node are
    always neighbours and nothing has to be permuted.
    """

    def __init__(
        self,
        core: Tensor,
        tree: ModeTree,
        limits: Mapping[int, int],
        share: float | None,
        random: torch.Generator | None,
    ) -> None:
        self.core, self.tree, self.limits, self.random = core, tree, limits, random
        self.exact = share is None
        self.front = [i for i, below in enumerate(tree.links) if not below]
        self.sizes = list(core.shape)
        self.total = float(_square(core))
        self.left = (share or 0.0) ** 2 * self.total
        self.lost = 0.0
        self.at = 0  # which axis of the core is looked at

    def run(self) -> dict[int, Tensor]:
        """Weights by position; the root's is the core that is left."""
        tree, top = self.tree, len(self.tree.nodes) - 1
        weights: dict[int, Tensor] = {}
        order = sorted(range(top), key=lambda i: tree.heights[i])
        # the last child of a binary root has the rank of its sibling and discards nothing
        shared = len(tree.links[top]) == 2
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
        weights[top] = self.core.reshape(self.sizes)
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

    Singular values of all nodes are pooled, and the smallest of them discarded as long as their squares
    sum to less than the tolerance allows: the two children of a binary root share theirs, and count
    once (Grasedyck 2010).

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
    limits, share = _limits(model.tree, ranks), _share(rtol)
    with torch.no_grad():
        wide = torch.complex128 if model.dtype.is_complex else torch.float64
        rounded = _rounded(net, [stack.to(wide) for stack in model.stacks], limits, share)
        lost = math.sqrt(rounded.lost) * rounded.size
        return _built(model.tree, rounded.weights, rounded.power, model.dtype, lost)


@dataclass(frozen=True)
class _Rounded:
    """A rounded tensor is that of ``weights`` times ``2**power``.

    ``size * 2**power`` was its norm before, and ``lost`` the share of the square that was cut off.
    """

    weights: dict[int, Tensor]
    lost: float
    size: float
    power: float


def _rounded(
    net: Network,
    stacks: Sequence[Tensor],
    limits: Mapping[int, int],
    share: float | None,
    *,
    orthonormal: bool = False,
) -> _Rounded:
    """Rounding in orthonormal frames, equal nodes together.

    Args:
        net: The network.
        stacks: Its weights in double precision.
        limits: Largest bonds by position.
        share: Error allowed, relative to the norm of the tensor; ``None`` cuts what is zero to rounding.
        orthonormal: Whether weights but the root's are to have orthonormal columns to rounding.
    """
    parts = batches(net)
    if sum(len(b.nodes) * math.prod(b.shape) * b.bond for b in parts) > _LARGEST_CORE:
        widest = max(parts, key=lambda b: math.prod(b.shape) * b.bond)
        raise _too_wide(net, widest.nodes[0], math.prod(widest.shape) * widest.bond)
    found = frames(net, stacks)
    size, power = (float(x) for x in scale_of(found))
    # rounding of squared singular values, if they come from Gram matrices
    hidden = 4 * torch.finfo(torch.float64).eps
    squares = share is not None and share**2 > 64 * hidden * sum(
        len(b.nodes) * b.rank for b in parts
    )
    results = outside(net, found, squares=squares, vectors=True)
    assert results is not None or squares
    if results is None:
        squares, results = False, outside(net, found, squares=False, vectors=True)
    assert results is not None
    kept, lost = _pooled(net, results, limits, share, hidden if squares else 0.0)
    weights = _projected(net, found, results, kept, orthonormal)
    return _Rounded(weights, lost, size, power)


def _too_wide(net: Network, node: int, numbers: int) -> ShapeError:
    return ShapeError(
        f"node {net.tree.nodes[node]!r} has {len(net.tree.links[node])} children; its core would have "
        f"{numbers:.3g} entries.\n"
        "  use a tree with fewer children per node, or smaller ranks"
    )


def _pooled(
    net: Network,
    results: Sequence[Outside],
    limits: Mapping[int, int],
    share: float | None,
    hidden: float,
) -> tuple[list[int], float]:
    """How many singular values to keep at every node, and the sum of the squares of the others.

    Args:
        net: The network.
        results: Singular values of the tensor divided by its norm.
        limits: Largest bonds by position.
        share: Root of what that sum may be; ``None`` keeps all that are not zero to rounding.
        hidden: What rounding may hide of a square.
    """
    links, top = net.tree.links, len(net.tree.nodes) - 1
    pair = links[top] if len(links[top]) == 2 else ()
    chosen = [
        (batch, part.values)
        for batch, part in zip(batches(net), results, strict=False)
        if not batch.step
    ]
    eps = torch.finfo(chosen[0][1].dtype).eps
    if share is None:
        largest = max(float(values.max()) for _, values in chosen)
        keep = [values > 64 * values.shape[1] * eps * largest for _, values in chosen]
    else:
        # rounded up by what rounding may hide, unless nothing may be discarded anyway
        slack = 4 * eps if share > 0 else 0.0
        rounded = [(values + slack).square() + hidden for _, values in chosen]
        for (batch, _), part in zip(chosen, rounded, strict=True):
            if pair and pair[1] in batch.nodes:
                # its sibling's singular values are its own
                part[batch.nodes.index(pair[1])] = math.inf
        ascending, places = torch.cat([part.flatten() for part in rounded]).sort(stable=True)
        above = torch.ones_like(ascending, dtype=torch.bool)
        above[places[ascending.cumsum(0) <= share**2]] = False
        sizes = [part.numel() for part in rounded]
        keep = [
            mask.reshape(part.shape)
            for mask, part in zip(torch.split(above, sizes), rounded, strict=True)
        ]
    kept = [1] * len(net.tree.nodes)
    for (batch, _), mask in zip(chosen, keep, strict=True):
        for node, count in zip(batch.nodes, mask.sum(1).tolist(), strict=True):
            kept[node] = count
    if pair:
        kept[pair[1]] = min(kept)  # replaced by its sibling's below
        kept[pair[0]] = kept[pair[1]] = max(kept[pair[0]], 1)
    for i in range(top):
        kept[i] = max(1, min(kept[i], limits.get(i, kept[i])))
    if pair:
        ranks = [
            values.shape[1] for batch, values in chosen for node in batch.nodes if node in pair
        ]
        kept[pair[0]] = kept[pair[1]] = min(*(kept[c] for c in pair), *ranks)
    lost = 0.0
    for batch, values in chosen:
        counts = torch.tensor([kept[node] for node in batch.nodes], device=values.device)
        if pair and pair[1] in batch.nodes:
            counts[batch.nodes.index(pair[1])] = values.shape[1]
        gone = torch.arange(values.shape[1], device=values.device) >= counts.unsqueeze(1)
        lost += float(((values.square() + hidden) * gone).sum())
    return kept, lost


def _projected(
    net: Network,
    found: Sequence[Frame],
    results: Sequence[Outside],
    kept: list[int],
    orthonormal: bool,
) -> dict[int, Tensor]:
    """The weights between the first ``kept`` singular vectors of their nodes.

    Nodes of a batch are cut to the largest bond among them first, with zeros beyond their own, and to
    their own at the end. ``kept`` shrinks where the children of a node leave it fewer rows.
    """
    tree, parts = net.tree, batches(net)
    inside: list[
        Tensor
    ] = []  # (nodes, kept, rank): singular vectors in the coordinates of the frame
    spread: list[list[int]] = []  # what the first of those axes stands for
    out: dict[int, Tensor] = {}
    for b, batch in enumerate(parts):
        frame, count = found[b], len(batch.nodes)
        below = [taken(inside[c], slots) for c, slots in batch.below]
        axes = [width for c, _ in batch.below for width in spread[c]]
        rows = [math.prod(kept[c] for c in tree.links[node]) for node in batch.nodes]
        vectors = None
        if not batch.root and not batch.step:
            part = results[b].vectors
            assert part is not None
            vectors = _masked(part, [kept[node] for node in batch.nodes])
        block = _in_frame(batch, frame, vectors)
        if math.prod(axes) * block.shape[-1] > _LARGEST_CORE:
            raise _too_wide(net, batch.nodes[0], math.prod(axes) * block.shape[-1])
        if below:
            block = climb(block, below[::-1])
        if batch.step:
            inside.append(block.flatten(1, -2))
            spread.append(axes)
            continue
        block = block.reshape(count, *(axes or batch.shape), -1)
        if vectors is not None:
            short = batch.kind != "leaf" and any(
                kept[node] > most for node, most in zip(batch.nodes, rows, strict=True)
            )
            turned = vectors.mH
            if orthonormal or short:
                basis, triangle = torch.linalg.qr(block.flatten(1, -2))
                block, turned = basis.reshape(*block.shape[:-1], -1), triangle @ turned
                for node, most in zip(batch.nodes, rows, strict=True):
                    kept[node] = kept[node] if batch.kind == "leaf" else min(kept[node], most)
                turned = _masked(turned.mH, [kept[node] for node in batch.nodes]).mH
            inside.append(turned)
            spread.append([turned.shape[1]])
        for node, weight in zip(batch.nodes, block.unbind(0), strict=True):
            for axis, c in enumerate(tree.links[node]):
                weight = weight.narrow(axis, 0, kept[c])
            out[node] = weight[..., 0] if batch.root else weight[..., : kept[node]]
    return out


def _in_frame(batch: Batch, frame: Frame, vectors: Tensor | None) -> Tensor:
    """The nodes' bases of singular vectors (all of the frame if ``None``) over those of the children."""
    turn = frame.turn if vectors is None else vectors
    if vectors is not None and frame.turn is not None:
        turn = frame.turn @ vectors
    if frame.rows is None:
        if turn is None:
            unit = torch.eye(batch.rank, dtype=frame.factor.dtype, device=frame.factor.device)
            turn = unit.expand(len(batch.nodes), -1, -1)
        return turn.reshape(len(turn), *batch.shape, -1)
    if turn is None:
        return frame.rows
    return (frame.rows.flatten(1, -2) @ turn).reshape(len(turn), *batch.shape, -1)


def _masked(vectors: Tensor, counts: Sequence[int]) -> Tensor:
    """The first columns of every matrix, with zeros beyond its own count."""
    most = max(counts)
    vectors = vectors[..., :most]
    if min(counts) == most:
        return vectors
    many = torch.tensor(counts, device=vectors.device)
    return vectors * (torch.arange(most, device=vectors.device) < many.unsqueeze(1)).unsqueeze(1)


def _built(
    tree: ModeTree,
    weights: Mapping[int, Tensor],
    log2: float,
    dtype: torch.dtype,
    lost: float,
) -> Factorization:
    """The factorization with these weights times ``2**log2``; its error bound is ``lost`` times that."""
    top = len(tree.nodes) - 1
    root = weights[top]
    size = float(torch.linalg.vector_norm(root))
    reach = 0.9 * math.log2(torch.finfo(dtype).max)
    scales: list[float] = [0.0] * top
    if size > 0 and abs(log2 + math.log2(size)) > reach:
        # no weight alone leaves the range; whole powers are exact
        each = math.floor(log2 / (top + 1))
        rest = math.floor(log2 - each * (top + 1))
        scales = [float(each + (i < rest)) for i in range(top)]
    scales.append(log2 - sum(scales))
    scaled = {tree.nodes[i]: (weights[i] * 2.0 ** scales[i]).to(dtype) for i in range(top + 1)}
    net = Network.build(
        tree,
        [scaled[mode].shape[0] for mode in tree.leaves],
        {node: scaled[node].shape[-1] for node in tree.nodes[:-1]},
        join="full",
    )
    stacks = [torch.stack([scaled[tree.nodes[i]] for i in part.positions]) for part in net.stacks]
    model = Factorization.holding(net, stacks)
    # rounding of the weights and of the work, once per node, besides what was discarded
    rounding = (4 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float64).eps) * (top + 1) * size
    try:
        model.error_bound = 2.0**log2 * (lost + rounding)
    except OverflowError:
        model.error_bound = math.inf
    return model


def _limits(tree: ModeTree, ranks: int | Mapping[Node, int] | None) -> dict[int, int]:
    if ranks is None:
        return {}
    given = ranks if isinstance(ranks, Mapping) else dict.fromkeys(tree.nodes[:-1], ranks)
    out: dict[int, int] = {}
    for node, rank in given.items():
        position = tree.position(node)
        if position == len(tree.nodes) - 1:
            raise OptionError(f"ranks: the root {node!r} has no bond above it; leave it out.")
        try:
            value = 0 if isinstance(rank, bool) else operator.index(rank)
        except TypeError:
            value = 0
        if value < 1:
            raise OptionError(f"ranks: node {node!r} needs a positive integer, found {rank!r}.")
        out[position] = value
    return out


def _share(rtol: float | None) -> float | None:
    """The tolerance less what rounding may add to the error."""
    if rtol is None:
        return None
    if (
        isinstance(rtol, bool)
        or not isinstance(rtol, int | float | np.floating)
        or not 0 <= rtol < 1
    ):
        raise OptionError(f"rtol must be a number in [0, 1), found {rtol!r}.")
    return max(float(rtol) - 16 * torch.finfo(torch.float64).eps, 0.0)


def _square(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm.square()
