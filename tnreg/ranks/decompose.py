"""Hierarchical singular value decomposition along any tree, of a dense tensor or of a factorization.

Grasedyck (2010): cut the singular values of the matricization at every node. ``truncate`` cuts where it saves
most numbers for the error, which it measures. ``decompose`` goes from the leaves up on a core that shrinks
with every node, spends a part of the tolerance there and the rest by ``truncate``. What that discards is
orthogonal to what leaves lost on the way up, so squares of errors add up. It need not be to what a node above
them lost: there errors add up, and little is spent. In both the tolerance bounds the relative error, always
(down to the rounding of the dtype).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg.errors import OptionError, ShapeError
from tnreg.factorizations.assembly import weights_of
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.memory import must_fit
from tnreg.ranks.budget import Budget
from tnreg.ranks.rounding import budget_of, finite_stacks, network_of, round_network, to_factorization
from tnreg.tensors.arrays import (
    as_tensor,
    check_dense,
    check_order,
    check_precision,
    double,
    seeded,
    single_of,
    to_core,
)
from tnreg.tensors.axes import (
    Core,
    axis_gram,
    axis_triangle,
    left_vectors,
    left_vectors_of_single,
    rounding_rtol,
)
from tnreg.tensors.blocks import (
    as_blocks,
    compress,
    distance_of,
    is_blocks,
    memory_of,
    positions_below,
    whole,
)
from tnreg.tensors.passes import norm
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

# Shares of the tolerance that decompose may spend on the way up, at leaves and at nodes above others: a
# larger one makes the core smaller, a smaller one leaves more to where it is needed.
_FIRST_SHARE, _INNER_SHARE = 0.2, 0.01

# What is kept of a node with more rows than this is looked for with random vectors first, if asked for.
_RANDOMIZED_ROWS = 64


def decompose(
    tensor: Tensor | np.ndarray[Any, Any] | Any,
    tree: ModeTree,
    *,
    ranks: int | Mapping[Node, int] | None = None,
    rtol: float | Mapping[Node, float] | None = None,
    atol: float | None = None,
    max_numbers: int | None = None,
    leaves: str | Mapping[int, str] = "auto",
    randomized: bool = False,
    seed: int = 0,
    memory: int | str | None = None,
    precision: str = "double",
) -> Factorization:
    """Decompose a dense tensor by hierarchical singular values, with full joins.

    All weights but the root's have orthonormal columns. With the singular values ``σ_i(v)`` of ``A`` at
    node v and the bond ``R_v`` above it (not ``randomized``)

        ‖A - A_H‖² <= Σ_v Σ_{i > R_v} σ_i(v)²

    over all nodes but the root, where the children of a binary root count once (Grasedyck 2010).

    Args:
        tensor: Real or complex tensor ``(D_0, ..., D_{N-1})``; or an array of Dask, zarr or h5py, which may
            be larger than memory.
        tree: Mode tree over ``0..N-1``. A star gives the Tucker decomposition, a caterpillar the tensor
            train, a binary tree hierarchical Tucker.
        ranks: Largest bond: one integer, or ``{node: integer}`` (nodes left out have no limit).
        rtol: ``‖A - A_H‖ <= rtol ‖A‖``, unless ``ranks`` or ``max_numbers`` cut further. What that leaves is
            spent where it saves most numbers: the error is mostly within a few percent of it. Without any of
            these only what is zero to rounding is cut. ``{node: rtol}`` allows at each of these nodes values
            of norm ``rtol ‖A‖`` to be cut off, and elsewhere what is zero to rounding.
        atol: The same as a norm: ``‖A - A_H‖ <= max(atol, rtol ‖A‖)``.
        max_numbers: Most numbers in all weights together: of those bonds that allow it, ones with the
            smallest sum of what is cut off.
        leaves: ``"weights"``, a matrix at every leaf; ``"bare"``, none: its mode is an axis of the parent's
            weight, as in a tensor train; ``"auto"``, a matrix where that saves numbers, and where the mode
            is larger than ``ranks`` allow; or ``{mode: either}``. No error is made at bare leaves, and
            ``ranks`` do not count there.
        randomized: Look for the columns to keep of large nodes with random vectors first (Halko,
            Martinsson and Tropp 2011), where the tolerance is above some 1e-6. The guarantee is the
            same, as the error is measured; bonds may be a little larger.
        seed: Draws those vectors.
        memory: Bytes that arrays may take where a tensor is read block by block, or text such as
            ``"1GiB"``; a quarter of what is available if left out.
        precision: ``"double"``, or ``"single"`` to reduce the tensor to its core in float32 or complex64, in
            half the memory, also from double precision. An ``rtol`` above 2e-6 is kept as well; smaller ones
            are refused, and without any values below some 1e-5 of the largest are cut. What is read
            block by block is computed in double precision.

    Returns:
        A ``Factorization`` of the tensor's dtype; its ``error_bound`` sums up what was cut off.

    Raises:
        ShapeError, DataError: The tensor does not fit the tree, or has NaN or infinite entries.
        OptionError: ``rtol`` outside ``[0, 1)``, ranks that are no positive integers, ``max_numbers`` that
            bonds of 1 exceed, unknown ``leaves`` or ``precision``, or an ``rtol`` too small for it.
        SizeError: Read block by block, the tensor does not get small enough for the memory allowed.

    Cost: a Gram matrix per node, of the tensor for the first leaf, of a smaller core afterwards; QR
    factorizations where the tolerance is too tight for squares. Block by
    block the tensor is read once per mode (small modes together) and once more.

    Example:
        >>> tree, pair = ModeTree.binary(4), torch.eye(3, dtype=torch.float64)
        >>> model = decompose(torch.einsum("ac,bd->abcd", pair, pair), tree)
        >>> model.weights[(0, 1)].shape, bool(model.error_bound < 1e-10)
        (torch.Size([3, 3, 9]), True)
    """
    if isinstance(tensor, Factorization):
        raise OptionError("decompose is for dense tensors; write truncate(model, rtol=...).")
    tree = tree if isinstance(tree, ModeTree) else ModeTree(tree)
    top, work = len(tree.nodes) - 1, check_precision(precision)
    asked = partial(
        budget_of, tree, ranks=ranks, rtol=rtol, atol=atol, max_numbers=max_numbers, leaves=leaves
    )
    if is_blocks(tensor):
        array, allowed = as_blocks(tensor), memory_of(memory)
        tensor = whole(array, allowed)
        if tensor is None:
            check_order(array.shape, tree)
            dtype = getattr(torch, array.dtype.name)
            return _decompose_blocks(array, tree, asked(array.shape, dtype), dtype, allowed)
    with torch.no_grad():
        dense = check_dense(tensor, tree).detach()
        budget = asked(tuple(dense.shape), dense.dtype, work=work)
        core, log2 = to_core(dense, tree, work)
        random = seeded(seed, "decompose: seed", core.device) if randomized else None
        sweep = _Sweep(Core(core, tree), budget, dense.dtype, random, log2=log2, work=work)
        return sweep.finish(sweep.run(range(top), top), log2)


def _decompose_blocks(
    array: Any, tree: ModeTree, budget: Budget, dtype: torch.dtype, memory: int
) -> Factorization:
    """Reduce the tensor to a core block by block, and decompose that in memory."""
    with torch.no_grad():
        if budget.error is not None:  # one reading more
            budget = budget.relative(distance_of(array, _zeros, memory)[1], 0.0)
        reduced = compress(array, tree, budget.limits, budget.share, memory)
        weights = dict(reduced.bases)
        for i in reduced.split:  # from the basis of a node, weights of all nodes below it
            inside = positions_below(tree, i)
            leaves = [c for c in sorted(inside) if not tree.links[c]]
            sweep = _Sweep(Core(reduced.bases[i], tree, [*leaves, -1]), Budget(), torch.float64)
            weights |= sweep.run(inside, i)
        core = Core(reduced.core, tree, reduced.front)
        above = min(sum(cut for i, cut in reduced.cut.items() if tree.links[i]), reduced.lost)
        lost = [reduced.lost - above, above]
        sweep = _Sweep(core, budget, dtype, total=reduced.total, lost=lost)
        top = len(tree.nodes) - 1
        weights |= sweep.run([i for i in range(top) if i not in weights], top)
        return sweep.finish(weights, reduced.log2)


def _zeros(slab: Sequence[slice]) -> Tensor:
    return torch.zeros([part.stop - part.start for part in slab])


class _Sweep:
    """From the leaves up: at every node a basis of the core's rows, then the core in that basis.

    ``dtype`` is the tensor's. ``run`` spends a part of the error allowed, ``finish`` the rest. A
    core that has lost some of the tensor comes with the ``total`` squared norm and what is ``lost`` of it at
    leaves and at nodes above others.
    """

    def __init__(
        self,
        core: Core,
        budget: Budget,
        dtype: torch.dtype,
        random: torch.Generator | None = None,
        *,
        log2: int = 0,
        work: torch.dtype = torch.float64,
        total: float | None = None,
        lost: Sequence[float] = (0.0, 0.0),
    ) -> None:
        self.core, self.dtype, self.random, self.work = core, dtype, random, work
        self.total = _square(core.tensor) if total is None else total
        self.budget = budget.relative(math.sqrt(self.total), log2)
        self.limits, self.share = self.budget.limits, self.budget.share
        self.lost = list(lost)

    def run(self, nodes: Sequence[int], last: int) -> dict[int, Tensor]:
        """Compute the weights of nodes below the last one; that of the last is the core that is left."""
        core, tree = self.core, self.core.tree
        weights: dict[int, Tensor] = {}
        nodes, tolerated = sorted(nodes, key=lambda i: tree.heights[i]), (self.share or 0.0) ** 2 * self.total
        for inner, most in ((False, _FIRST_SHARE), (True, _INNER_SHARE)):
            part = [i for i in nodes if bool(tree.links[i]) == inner]
            left = max(min(most**2 * tolerated - self.lost[inner], tolerated - sum(self.lost)), 0.0)
            for count, i in enumerate(part):
                shape = core.merge(i)
                if i in self.budget.bare:  # its mode as it is, without an error
                    weights[i] = torch.eye(shape[0], dtype=core.tensor.dtype, device=core.tensor.device)
                    continue
                basis, lost = self._basis(i, left / (len(part) - count))
                left -= min(lost, left)
                self.lost[inner] += lost
                weights[i] = basis.reshape(*shape, -1)
        weights[last] = core.tensor.reshape(core.sizes)
        return weights

    def finish(self, weights: Mapping[int, Tensor], log2: int) -> Factorization:
        """Round the weights of a whole tree with what is left of the tolerance."""
        tree, rest, share = self.core.tree, max(self.total - sum(self.lost), 1e-300), None
        at_leaves, above = self.lost[0], math.sqrt(self.lost[1])
        if self.share is not None:
            left = math.sqrt(max(self.share**2 * self.total - at_leaves, 0.0))
            share = max(left - above, 0.0) / math.sqrt(rest)
        budget = replace(self.budget, share=share)
        weights = {i: double(weight) for i, weight in weights.items()}
        dtype = self.dtype
        if torch.finfo(dtype).eps < torch.finfo(self.work).eps:
            dtype = single_of(dtype)
        rounded = round_network(*network_of(tree, weights), budget, dtype=dtype)
        lost = at_leaves + (above + math.sqrt(rounded.lost * rest)) ** 2
        rounded.weights[len(tree.nodes) - 1] *= 2.0**rounded.log2
        return to_factorization(tree, rounded.weights, log2, self.dtype, math.sqrt(lost), self.work)

    def _basis(self, i: int, allowed: float) -> tuple[Tensor, float]:
        """Bring a node's axis into a basis ``(rows, rank)``; return it, and the square of what is lost."""
        view, limit = self.core.view(i), self.limits.get(i)
        rows, others = view.shape[1], view.numel() // view.shape[1]
        inside, outside = None, 0.0
        if self.random is not None and min(rows, others) > _RANDOMIZED_ROWS:
            inside, outside = self._range(view, allowed, limit)
        if inside is not None:
            self.core.project(i, inside)
            view = self.core.view(i)
        part, (before, width, behind) = None, view.shape
        if self.share is not None:  # a Gram matrix of the short side only
            kept = self.total - sum(self.lost)
            part = allowed / kept if kept > 0 and width <= before * behind else 0.0
        if part and self.work == torch.float32:
            left, squares = left_vectors_of_single(view, allowed - outside)
        else:
            left, squares = left_vectors(
                width, part, partial(axis_gram, view), partial(axis_triangle, view),
                eps=torch.finfo(view.dtype).eps,
            )  # fmt: skip
        if self.share is None:
            zero = rounding_rtol(max(rows, others), self.dtype, self.work)
            rank = int((squares > zero**2 * squares[0]).sum())
        else:
            rank = int((squares.flip(0).cumsum(0) > allowed - outside).sum())
        rank = max(1, rank if limit is None else min(rank, limit))
        lost = outside + float(squares[rank:].sum())
        if rank < width:
            basis = left[:, :rank]
            self.core.project(i, basis)
        else:
            basis = torch.eye(rank, dtype=view.dtype, device=view.device)
        return basis if inside is None else inside @ basis, lost

    def _range(self, view: Tensor, allowed: float, limit: int | None) -> tuple[Tensor | None, float]:
        """Find a basis outside of which lies at most what may be discarded, and how much does.

        It grows by products with random vectors (once, with nothing but a limit). ``None`` if it would not
        be smaller than half of the rows, or if differences of squares cannot tell so little.
        """
        before, rows, behind = view.shape
        square = _square(view)
        hidden = 16 * torch.finfo(view.real.dtype).eps * square
        by_limit = self.share is None and limit is not None
        if not by_limit and hidden > allowed / 2:
            return None, 0.0
        basis = view.new_zeros(rows, 0)
        width = _RANDOMIZED_ROWS // 2 if limit is None else limit + 8
        while basis.shape[1] + width < min(rows, before * behind) // 2:
            vectors = torch.randn(before, behind, width, generator=self.random, device=view.device,
                                  dtype=view.real.dtype).to(view.dtype)  # fmt: skip
            sample = torch.bmm(view, vectors).sum(0)
            for _ in range(2):  # twice: once leaves the rounding of the first
                sample = torch.linalg.qr(sample - basis @ (basis.mH @ sample))[0]
            basis = torch.cat([basis, sample], 1)
            outside = max(square - _square(torch.matmul(basis.mH, view)), 0.0)
            if by_limit or outside <= allowed / 2:
                return basis, outside + hidden
            width *= 2
        return None, 0.0


def truncate(
    model: Factorization,
    *,
    ranks: int | Mapping[Node, int] | None = None,
    rtol: float | Mapping[Node, float] | None = None,
    atol: float | None = None,
    max_numbers: int | None = None,
    leaves: str | Mapping[int, str] = "auto",
    precision: str = "double",
) -> Factorization:
    """Round a factorization to smaller bonds, with full joins, without its dense tensor.

    Singular values of all nodes are discarded where that saves most numbers, and the error that this makes is
    measured: the result is an orthogonal projection of the tensor.

    Args:
        model: Any joins, any root. Wide diagonal joins are never expanded.
        ranks: As in ``decompose``, and so are the others.
        rtol: Error allowed, relative to the norm.
        atol: Error allowed, as a norm.
        max_numbers: Most numbers in all weights together.
        leaves: Which leaves have a matrix. Under ``"auto"`` a bare leaf stays bare unless its parent has
            another one.
        precision: ``"single"`` works in float32 or complex64. An ``rtol`` above 2e-6 is kept as well, but
            less of it is spent: errors are the sum of what is cut, not measured.

    Returns:
        A ``Factorization`` of the same dtype; its ``error_bound`` bounds ``‖A - A_H‖``.

    Raises:
        OptionError: As ``decompose``.
        DataError: NaN or infinite weights.
        SizeError: A core would not fit into memory, or would need more than 64 axes.

    Cost: QR and singular values per node: linear in the number of nodes, fourth order in the bonds of a
    binary tree. Works on logarithmic scales.
    """
    if not isinstance(model, Factorization):
        raise OptionError(
            f"truncate is for factorizations, found {type(model).__name__}; write decompose(tensor, tree)."
        )
    tree, work = model.tree, check_precision(precision)
    budget = budget_of(
        tree, model.sizes, model.dtype,
        ranks=ranks, rtol=rtol, atol=atol, max_numbers=max_numbers, leaves=leaves, work=work,
    )  # fmt: skip
    with torch.no_grad():
        bare = model.network.bare
        lone = {i for below in tree.links if len(one := bare.intersection(below)) == 1 for i in one}
        asked = bare - budget.bare - (budget.free & lone)
        if asked:  # bare leaves that are to have a matrix, or may
            kept: dict[Any, str] = {tree.nodes[i]: "bare" for i in bare - asked}
            given = {v: weight for v, weight in weights_of(model, bare=False).items() if v not in kept}
            model = Factorization.from_weights(tree, given, join=model.network.named_joins, leaves=kept)
        stacks, power = finite_stacks(model, work)
        rounded = round_network(model.network, stacks, budget, power, dtype=model.dtype)
        reach = 0.9 * math.log2(torch.finfo(model.dtype).max)
        if abs(rounded.log2) > reach * len(rounded.weights) and budget.free:
            # too few weights are left for so large or small a tensor
            return truncate(
                model, ranks=ranks, rtol=rtol, atol=atol, max_numbers=max_numbers, leaves="weights",
                precision=precision,
            )  # fmt: skip
        lost = math.sqrt(rounded.lost) * rounded.size
        return to_factorization(tree, rounded.weights, rounded.log2, model.dtype, lost, work)


def distance(tensor: Any, model: Factorization, *, memory: int | str | None = None) -> tuple[float, float]:
    """Return the Frobenius norms of the difference between a tensor and a factorization, and of the tensor.

    The tensor is dense, or an array of Dask, zarr or h5py, which is read once with the ``memory`` allowed
    (as in ``decompose``). Other sizes than the model's raise a ``ShapeError``.
    """
    tensor = as_blocks(tensor) if is_blocks(tensor) else as_tensor(tensor)
    sizes = tuple(tensor.shape)
    if sizes != model.sizes:
        raise ShapeError(
            f"the tensor has other sizes than the model.\n  found: {sizes}\n  model: {model.sizes}"
        )
    with torch.no_grad():
        if not is_blocks(tensor):
            tensor = check_dense(tensor, model.tree)
            must_fit(
                "a difference: its terms", [sizes], tensor.dtype, tensor.device, "take entries", copies=2
            )
            return norm(tensor - model.to_tensor()), norm(tensor)
        joins = model.network.named_joins
        weights = {
            node: w.cpu() for node, w in weights_of(model, bare="diagonal" not in joins.values()).items()
        }
        return distance_of(tensor, partial(_dense_part, model.tree, weights, joins), memory_of(memory))


def _dense_part(tree: ModeTree, weights: Mapping[Node, Tensor], joins: Any, slab: Sequence[slice]) -> Tensor:
    """Return the part of a factorization within slices by mode; bare leaves are below full joins alone."""
    bare: dict[Any, str] = {mode: "bare" for mode in tree.leaves if mode not in weights}
    part = {}
    for node, weight in weights.items():
        axes = [slab[c] if c in bare else slice(None) for c in tree.children(node)] or [slab[node]]  # type: ignore[call-overload]
        part[node] = weight[tuple(axes)]
    with torch.no_grad():
        return Factorization.from_weights(tree, part, join=joins, leaves=bare).to_tensor()


def _square(x: Tensor) -> float:
    """Return the squared norm; in single precision summed in double precision over parts."""
    if x.dtype not in (torch.float32, torch.complex64):
        return float(torch.linalg.vector_norm(x)) ** 2
    flat = x.reshape(-1)
    length = len(flat) - len(flat) % 1024
    parts = [flat[length:].reshape(1, -1), flat[:length].reshape(-1, 1024)]
    return sum(float(double(torch.linalg.vector_norm(part, dim=1)).square().sum()) for part in parts)
