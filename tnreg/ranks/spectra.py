"""Spectra of a factorization without its dense tensor.

Three routes, chosen by rule; all work in double precision and on logarithmic scales.

1. In orthonormal frames (``tnreg.ranks.frames``), equal nodes together. Gram matrices first: if every node's
   smallest singular value is above 1e-4 of its largest, errors stay below 1e-11 of the largest.
2. Otherwise the same without squares: values are right down to eps times the largest one.
3. Node by node, for gradients, and for diagonal joins so wide that frames would not fit into memory.
   With ``F_v`` the matrix of node v's tensors (entries below v by bond above v) and ``E_v`` that of
   everything outside it, the matricization at v is ``F_v E_vᵀ``. Only the triangular factors of the two
   matter for its singular values: ``T_v`` goes up the tree, ``S_v`` comes down, and the spectrum is that
   of ``T_v S_vᵀ``. No squares either, and gradients at low rank are finite.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import OptionError
from tnreg.factorizations.factorization import Factorization
from tnreg.ranks.decompose import decompose
from tnreg.ranks.dense import dense_spectra, numerical_rank, scaled_spectra
from tnreg.ranks.frames import (
    batches,
    frames,
    frames_fit,
    scale_of,
    values_in_frames,
    values_through_bonds,
)
from tnreg.tensors.arrays import Scaled, check_dense, double
from tnreg.tensors.blocks import as_blocks, is_blocks, memory_of, whole
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree


def spectra(
    x: Any, tree: ModeTree | None = None, *, memory: int | str | None = None
) -> dict[Node, Tensor]:
    """Singular values of the matricization at every node but the root.

    At node v the rows are the modes below v and the columns all other modes: ``[x]_v = Σ_i σ_i u_i w_i*``,
    ``σ_1 >= σ_2 >= ..``, and ``Σ_i σ_i² = ‖x‖²`` at every node.

    Args:
        x: Dense real or complex tensor ``(D_0, ..., D_{N-1})`` (torch or numpy), axis n being mode
            n; or a ``Factorization``, or the network that it is, whose dense tensor is never formed; or
            an array of Dask, zarr or h5py, which may be larger than memory.
        tree: Mode tree over ``0..N-1``; the factorization's own if left out, and no other.
        memory: For arrays that are read block by block: bytes that arrays may take, or text such as
            ``"1GiB"``; a quarter of what is available if left out.

    Returns:
        ``{node: singular values}``, descending, ``min(rows, columns)`` of them for a dense tensor
        and at most the rank of the bond for a factorization; children before parents, without the
        root. Zero tensors give zeros.

    Raises:
        ShapeError: ``x`` does not have ``tree.order`` axes.
        DataError: ``x`` has NaN, infinite or integer entries.
        OptionError: A dense tensor without a tree, or a factorization with another tree than its
            own.
        SizeError: Read block by block, the tensor's ranks do not let it become small enough for the
            memory allowed; ``spectra(decompose(x, tree, rtol=...))`` is then off by at most ``rtol ‖x‖``.

    Cost: dense, see ``tnreg.ranks.dense.dense_spectra``; factorization, linear in the number of nodes,
    cubic in the bonds. Differentiable once, in the tensor or in the weights of the factorization
    (under ``torch.no_grad()`` that is not paid for). Block by block, see
    ``tnreg.tensors.blocks``; by QR, with
    errors below 1e-12 of the largest singular value (float64), not differentiable.

    Example:
        >>> tree, pair = ModeTree.binary(4), torch.eye(3)
        >>> spectra(torch.einsum("ac,bd->abcd", pair, pair), tree)[0]
        tensor([1.7321, 1.7321, 1.7321])
    """
    x = factorization_of(x)
    if isinstance(x, Factorization):
        _check_own_tree(x, tree)
        real = x.stacks[0].real.dtype
        found: dict[int, Tensor] = {}
        for positions, values in _factored_spectra(x):
            found |= zip(positions, values.value().to(real).unbind(0), strict=True)
        return {node: found[i] for i, node in enumerate(x.tree.nodes[:-1])}
    tree = _check_tree(tree)
    if is_blocks(x):
        return _spectra_of_blocks(x, tree, memory)
    return dense_spectra(x, tree)


def _spectra_of_blocks(x: Any, tree: ModeTree, memory: int | str | None) -> dict[Node, Tensor]:
    """All that is not zero to rounding is kept in a factorization; the other values are zeros."""
    array, allowed = as_blocks(x), memory_of(memory)
    small = whole(array, allowed)
    if small is not None:
        return dense_spectra(small, tree)
    found = spectra(decompose(array, tree, memory=allowed).requires_grad_(False))
    total = math.prod(array.shape)
    out = {}
    for node, values in found.items():
        rows = math.prod(array.shape[m] for m in tree.modes_below(node))
        out[node] = values.new_zeros(min(rows, total // rows))
        out[node][: len(values)] = values[: len(out[node])]
    return out


def hierarchical_rank(
    x: Any,
    tree: ModeTree | None = None,
    *,
    rtol: float | None = None,
    memory: int | str | None = None,
) -> dict[Node, int]:
    """Rank of the matricization of ``x`` at every node of ``tree`` but the root.

    At node v the rows are the modes below v and the columns all other modes. Together the ranks are
    the hierarchical tensor rank of Razin, Maman and Cohen (2022), arXiv:2201.11729; on a star tree
    they are the multilinear (Tucker) rank. With the singular values ``σ_1 >= σ_2 >= ..`` of node v its rank
    is ``#{i: σ_i > rtol σ_1}``.

    Args:
        x: Dense real or complex tensor of shape ``(D_0, ..., D_{N-1})``, axis n being mode n, or a
            ``Factorization``, whose dense tensor is never formed, or an array of Dask, zarr or h5py.
        tree: Mode tree over ``0..N-1``; the factorization's own if left out.
        rtol: A singular value counts if it is ``> rtol * s_max``, ``s_max`` the largest of the same
            matricization. Default ``max(rows, columns) * eps``, for a factorization at most
            ``1000 * eps``. For a trained model take e.g. 1e-3.
        memory: As in ``spectra``.

    Returns:
        ``{node: rank}``, children before parents, without the root. A zero tensor gives 0
        everywhere.

    Raises:
        ShapeError: ``x`` does not have ``tree.order`` axes.
        DataError: ``x`` has NaN, infinite or integer entries.

    Cost: see ``spectra``. Not differentiable; a smooth stand-in is ``effective_rank``.

    Example:
        >>> tree, pair = ModeTree.binary(4), torch.eye(3)
        >>> hierarchical_rank(torch.einsum("ab,cd->abcd", pair, pair), tree)[(0, 1)]  # ties inside the node
        1
        >>> hierarchical_rank(torch.einsum("ac,bd->abcd", pair, pair), tree)[(0, 1)]  # ties across it
        9
    """
    out: dict[Node, int] = {}
    x = factorization_of(x)
    if isinstance(x, Factorization):
        _check_own_tree(x, tree)
        sizes, limit = x.sizes, torch.finfo(x.dtype).eps
        with torch.no_grad():
            factored = _factored_spectra(x)
        # before any scale is applied: a tiny or huge tensor has the same rank
        found_at = {
            i: one for places, values in factored for i, one in zip(places, values.x, strict=True)
        }
        for i, node in enumerate(x.tree.nodes[:-1]):
            # The factors are small: their rounding does not grow with the matrix that they stand for.
            rows = math.prod(sizes[m] for m in x.tree.modes_below(node))
            longest = min(max(rows, math.prod(sizes) // rows), 1000)
            out[node] = numerical_rank(found_at[i], longest * limit if rtol is None else rtol)
        return out
    tree = _check_tree(tree)
    with torch.no_grad():
        if is_blocks(x):
            found, sizes = _spectra_of_blocks(x, tree, memory), tuple(x.shape)
            eps = max(torch.finfo(s.dtype).eps for s in found.values())
        else:
            dense = check_dense(x, tree)
            found, sizes, eps = (
                scaled_spectra(dense, tree)[0],
                dense.shape,
                torch.finfo(dense.dtype).eps,
            )
    for node, s in found.items():
        rows = math.prod(sizes[m] for m in tree.modes_below(node))
        longest = max(rows, math.prod(sizes) // rows)
        out[node] = numerical_rank(s, longest * eps if rtol is None else rtol)
    return out


def factorization_of(x: Any) -> Any:
    """Return the factorization that a network is, or ``x`` itself."""
    return x.as_factorization() if hasattr(x, "as_factorization") else x


def _check_tree(tree: ModeTree | None) -> ModeTree:
    if isinstance(tree, ModeTree):
        return tree
    found_kind = "none" if tree is None else repr(tree)
    raise OptionError(
        "spectra of a dense tensor need a tree: spectra(tensor, tree).\n"
        f"  found: {found_kind}; write a ModeTree, e.g. ModeTree.binary(4) or load_tree('htf-4')"
    )


def _check_own_tree(model: Factorization, tree: ModeTree | None) -> None:
    if tree is not None and tree != model.tree:
        raise OptionError(
            "spectra of a factorization are along its own tree.\n"
            f"  found: {tree!r}\n  own:   {model.tree!r}\n"
            "  for another tree give the dense tensor: spectra(model.to_tensor().detach(), tree)"
        )


def _factored_spectra(model: Factorization) -> list[tuple[tuple[int, ...], Scaled]]:
    """Return positions and singular values ``(positions, count)``, together of every node but the root."""
    net = model.network
    stacks = [double(stack) for stack in model.stacks]
    differentiable = torch.is_grad_enabled() and any(stack.requires_grad for stack in stacks)
    if differentiable or not frames_fit(net):
        return values_through_bonds(net, stacks)
    with torch.no_grad():
        found = frames(net, stacks)
        size, log2 = scale_of(found)
        return [
            (batch.nodes, Scaled(part.values * size, log2))
            for batch, part in zip(batches(net), values_in_frames(net, found), strict=False)
            if not batch.step
        ]
