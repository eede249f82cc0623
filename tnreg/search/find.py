"""``find_tree``: a mode tree for a dense tensor, a factorization, or a few entries of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import OptionError, ShapeError, check_number, did_you_mean
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.memory import must_fit
from tnreg.ranks.decompose import decompose
from tnreg.search.agglomerate import compress
from tnreg.search.interchange import interchange
from tnreg.search.pairs import interactions, linkage_tree
from tnreg.search.web import Web
from tnreg.tensors.arrays import as_tensor, check_numbers, to_core
from tnreg.tensors.blocks import as_blocks, is_blocks
from tnreg.training.tasks import Completion
from tnreg.trees.tree import ModeTree

# Errors of the size of rtol would hide ranks along other trees: what is searched along a tree that need not
# fit is closer to the tensor than that by the first factor, along one that does by the second.
_CLOSER, _CLOSE = 0.1, 0.9
# Numbers along two trees are counted anew from the tensor itself if they are within this factor.
_CLEARLY = 1.5


@torch.no_grad()
def find_tree(x: Any, *, rtol: float | None = None, method: str = "auto") -> ModeTree:
    """Find a mode tree along which a tensor has small ranks.

    A dense tensor is compressed in every mode first, and what is left is searched:

    - ``"agglomerate"``: from the leaves up, the two groups of modes of least rank become one.
    - ``"interchange"``: local moves on a decomposition along ``ModeTree.binary(N)``; see ``interchange``.
    - ``"auto"``: local moves on what agglomeration finds; ``ModeTree.binary(N)`` if it needs no more numbers.

    A factorization is searched by ``"interchange"`` alone, and its dense tensor is never formed. From the
    observed entries of a completion task there is ``"pairs"``: the modes that interact most are joined, as
    means of what the additive model leaves show it. If no two modes interact beyond chance, the tree is
    ``ModeTree.binary(N)``: in random tensors and products of many modes no pair stands out.

    Args:
        x: A dense tensor, a ``Factorization``, or a ``Completion``; or an array of Dask, zarr or h5py, which
            may be larger than memory if its modes can be compressed.
        rtol: Relative error at which ranks are counted. Default: 1e-6 in double precision, some 1e-4 in
            single and 1e-2 in half. Not for a completion task.
        method: ``"agglomerate"``, ``"interchange"``, ``"pairs"``, or ``"auto"`` for what suits ``x``.

    Returns:
        The tree. Its root has three children if there are three modes or more (with ``"pairs"`` two): a
        binary root would only add a matrix to a decomposition along it.

    Raises:
        OptionError: An unknown method, or one that is not for ``x``; ``rtol`` outside ``[0, 1)`` or for a
            task.
        DataError, ShapeError: NaN or infinite entries, or none; a single number.
        SizeError: The tensor would not fit into memory.

    Cost: that of ``decompose`` along a star, then Gram matrices of what is left for all pairs of groups. For
    factorizations see ``interchange``; for tasks a pass over the entries for each pair of modes.

    Example:
        >>> left, right = torch.randn(2, 5, 5, dtype=torch.float64)
        >>> find_tree(torch.einsum("ac,bd,eg->abcdeg", left, right, right))
        ModeTree([[0, 2], [1, 3], [4, 5]])
    """
    kind, methods = "dense tensor", ["agglomerate", "interchange"]
    if isinstance(x, Factorization):
        kind, methods = "factorization", ["interchange"]
    elif isinstance(x, Completion):
        kind, methods = "completion task", ["pairs"]
    if method not in ("auto", *methods):
        known = ("auto", "agglomerate", "interchange", "pairs")
        what = f"is not for a {kind}" if method in known else "is unknown"
        message = f"find_tree: method={method!r} {what}.\n{did_you_mean(str(method), methods)}"
        message += f"  for a {kind}: {', '.join(map(repr, ['auto', *methods]))}"
        if method == "pairs":
            message += "\n  for entries of a tensor: find_tree(completion(index=.., values=.., sizes=..))"
        raise OptionError(message, argument="method")
    if isinstance(x, Completion):
        if rtol is not None:
            message = "find_tree: rtol is for tensors and factorizations; leave it out for a completion task."
            raise OptionError(message, argument="rtol")
        return linkage_tree(interactions(x.index, x.values, x.sizes))
    if isinstance(x, Factorization):
        return interchange(x, rtol=_tolerance(rtol, x.dtype)).tree
    tensor, sizes, rtol = _read(x, rtol)
    # every mode in a basis of its own: no rank along any tree gets larger by that
    core = compress(tensor, (rtol * float(torch.linalg.vector_norm(tensor))) ** 2)
    natural = ModeTree.binary(core.ndim)
    if method == "interchange":
        return interchange(decompose(core, natural, rtol=_CLOSER * rtol, leaves="weights"), rtol=rtol).tree
    allowed = rtol * float(torch.linalg.vector_norm(core))
    web = Web.joined(core, (_CLOSE * allowed) ** 2)
    if method == "agglomerate":
        return web.hang()[0]
    tree, found, _ = web.improve(allowed, _CLOSE * allowed, regroup=False)
    before = _numbers(decompose(core, natural, rtol=rtol, leaves="weights").weights.values(), natural, sizes)
    if before > _CLEARLY * _numbers(found.weights.values(), tree, sizes):
        return tree
    numbers = (
        _numbers(decompose(tensor, t, rtol=rtol, leaves="weights").weights.values(), t, sizes)
        for t in (natural, tree)
    )
    return natural if next(numbers) <= next(numbers) else tree


def _tolerance(rtol: float | None, dtype: torch.dtype) -> float:
    if rtol is None:
        real = dtype.is_floating_point or dtype.is_complex  # others are refused later
        return max(1e-6, math.sqrt(torch.finfo(dtype).eps) / 3) if real else 1e-6
    return check_number(rtol, "find_tree: rtol", 0, 1)


def _read(x: Any, rtol: float | None) -> tuple[Tensor, tuple[int, ...], float]:
    """Return a tensor on a moderate scale, or the core of one read in blocks; mode sizes and tolerance."""
    if is_blocks(x):
        rtol = _tolerance(rtol, getattr(torch, as_blocks(x).dtype.name))
        star = decompose(x, ModeTree.star(x.ndim), rtol=rtol, leaves="weights")
        core, sizes = star.weights[star.tree.root], star.sizes
    else:
        core = as_tensor(x).detach()
        rtol, sizes = _tolerance(rtol, core.dtype), tuple(core.shape)
    if core.ndim == 0:
        raise ShapeError("find_tree: a single number has no modes.", argument="x")
    what = "a search for a tree: copies of the tensor"
    advice = "give it as an array of Dask, zarr or h5py (tnreg.open_tensor)"
    double = torch.complex128 if core.is_complex() else torch.float64
    must_fit(what, [core.shape], double, core.device, advice, copies=4)
    return to_core(check_numbers(core), ModeTree.star(core.ndim))[0], sizes, rtol


def _numbers(weights: Iterable[Tensor], tree: ModeTree, sizes: tuple[int, ...]) -> int:
    """Count the numbers that weights in the order of the nodes have if the modes have these sizes."""
    pairs = zip(tree.nodes, weights, strict=True)
    return sum(sizes[v] * w.shape[1] if isinstance(v, int) else w.numel() for v, w in pairs)
