"""Singular values and ranks along a tree, of dense tensors, factorizations and tensors larger than memory.

Those of a factorization come from orthonormal frames, or through the bonds where gradients are needed or
frames would not fit into memory, see ``tnreg.ranks.frames``. Both work at any scale, and values are right
down to eps times the largest one.
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
from tnreg.ranks.frames import batches, frames, frames_fit, scale_of, values_in_frames, values_through_bonds
from tnreg.ranks.rounding import finite_stacks
from tnreg.tensors.arrays import Scaled, check_dense, check_precision, double
from tnreg.tensors.axes import rounding_rtol
from tnreg.tensors.blocks import as_blocks, is_blocks, memory_of, whole
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree


def spectra(
    x: Any, tree: ModeTree | None = None, *, memory: int | str | None = None, precision: str = "double"
) -> dict[Node, Tensor]:
    """Compute the singular values of the matricization at every node but the root.

    At node v the rows are the modes below v and the columns all other modes: ``[x]_v = Σ_i σ_i u_i w_i*``,
    ``σ_1 >= σ_2 >= ..``, and ``Σ_i σ_i² = ‖x‖²`` at every node.

    Args:
        x: Dense real or complex tensor ``(D_0, ..., D_{N-1})`` (torch or numpy), axis n being mode
            n; or a ``Factorization``, or the network that it is, whose dense tensor is never formed; or
            an array of Dask, zarr or h5py, which may be larger than memory.
        tree: Mode tree over ``0..N-1``; the factorization's own if left out, and no other.
        memory: As in ``decompose``.
        precision: ``"double"``, or ``"single"`` to compute in float32 or complex64, in half the memory, also
            from numbers in double precision. Errors then stay below 1e-5 of the largest value of a dense
            tensor's node. What is read block by block is computed in double precision.

    Returns:
        ``{node: singular values}``, descending, ``min(rows, columns)`` of them for a dense tensor
        and at most the rank of the bond for a factorization; children before parents. Zero tensors give
        zeros.

    Raises:
        ShapeError, DataError: ``x`` does not fit the tree, or has NaN, infinite or integer numbers.
        OptionError: A dense tensor without a tree, a factorization with another tree than its own, or an
            unknown precision.
        SizeError: Read block by block, the tensor's ranks do not let it become small enough for the
            memory allowed; ``spectra(decompose(x, tree, rtol=...))`` is then off by at most ``rtol ‖x‖``.

    Cost: dense, one Gram product with ``x`` per leaf, then on smaller cores; factorization, by QR, linear in
    the number of nodes, cubic in the bonds. Differentiable once, in the tensor or in the weights of the
    factorization (under ``torch.no_grad()`` that is not paid for). Block by block, by QR, with errors below
    1e-12 of the largest singular value (float64), not differentiable.

    Example:
        >>> tree, pair = ModeTree.binary(4), torch.eye(3)
        >>> spectra(torch.einsum("ac,bd->abcd", pair, pair), tree)[0]
        tensor([1.7321, 1.7321, 1.7321])
    """
    x, work = factorization_of(x), check_precision(precision)
    if isinstance(x, Factorization):
        _check_own_tree(x, tree)
        real = x.stacks[0].real.dtype
        values: dict[int, Tensor] = {}
        for positions, scaled in _factored_spectra(x, work):
            values |= zip(positions, scaled.value().to(real).unbind(0), strict=True)
        return {node: values[i] for i, node in enumerate(x.tree.nodes[:-1])}
    tree = _check_tree(tree)
    return _spectra_of_blocks(x, tree, memory, work) if is_blocks(x) else dense_spectra(x, tree, work)


def _spectra_of_blocks(
    x: Any, tree: ModeTree, memory: int | str | None, work: torch.dtype = torch.float64
) -> dict[Node, Tensor]:
    """Decompose to rounding, and fill up with zeros what that cuts off."""
    array, allowed = as_blocks(x), memory_of(memory)
    small = whole(array, allowed)
    if small is not None:
        return dense_spectra(small, tree, work)
    spectra_of = spectra(decompose(array, tree, memory=allowed).requires_grad_(False))
    total = math.prod(array.shape)
    for node, values in spectra_of.items():
        rows = math.prod(array.shape[m] for m in tree.modes_below(node))
        spectra_of[node] = values.new_zeros(min(rows, total // rows))
        spectra_of[node][: len(values)] = values[: len(spectra_of[node])]
    return spectra_of


def hierarchical_rank(
    x: Any, tree: ModeTree | None = None, *, rtol: float | None = None, memory: int | str | None = None
) -> dict[Node, int]:
    """Compute the rank of the matricization of ``x`` at every node of ``tree`` but the root.

    Together these are the hierarchical tensor rank of Razin, Maman and Cohen (2022), arXiv:2201.11729; on a
    star tree the multilinear (Tucker) rank. With the singular values ``σ_1 >= σ_2 >= ..`` of node v (see
    ``spectra``) its rank is ``#{i: σ_i > rtol σ_1}``.

    Args:
        x: As in ``spectra``.
        tree: As in ``spectra``.
        rtol: Default: what rounding may leave of zeros, ``8 eps`` of the dtype and, for the work,
            ``sqrt(max(rows, columns))`` (1000 for a factorization) times that of double precision; at most
            1/2. For a trained model take e.g. 1e-3.
        memory: As in ``spectra``.

    Returns:
        ``{node: rank}``, children before parents. A zero tensor gives 0 everywhere.

    Cost, errors: as ``spectra``. Not differentiable; a smooth stand-in is ``effective_rank``.

    Example:
        >>> tree, pair = ModeTree.binary(4), torch.eye(3)
        >>> hierarchical_rank(torch.einsum("ab,cd->abcd", pair, pair), tree)[(0, 1)]  # ties inside the node
        1
        >>> hierarchical_rank(torch.einsum("ac,bd->abcd", pair, pair), tree)[(0, 1)]  # ties across it
        9
    """
    x = factorization_of(x)
    spectra_of: dict[Node, Tensor] = {}
    with torch.no_grad():
        if isinstance(x, Factorization):
            _check_own_tree(x, tree)
            tree, sizes, dtype = x.tree, x.sizes, x.dtype
            for positions, scaled in _factored_spectra(x):  # scales do not matter
                spectra_of |= zip((tree.nodes[i] for i in positions), scaled.x, strict=True)
        elif is_blocks(x):
            tree, sizes = _check_tree(tree), tuple(x.shape)
            spectra_of = _spectra_of_blocks(x, tree, memory)
            dtype = getattr(torch, as_blocks(x).dtype.name)
        else:
            tree = _check_tree(tree)
            dense = check_dense(x, tree)
            sizes, dtype = tuple(dense.shape), dense.dtype
            spectra_of = scaled_spectra(dense, tree)[0]
    ranks: dict[Node, int] = {}
    for node in tree.nodes[:-1]:
        longest = None
        if not isinstance(x, Factorization):
            rows = math.prod(sizes[m] for m in tree.modes_below(node))
            longest = max(rows, math.prod(sizes) // rows)
        zero = rounding_rtol(longest, dtype, double(spectra_of[node]).dtype)
        ranks[node] = numerical_rank(spectra_of[node], zero if rtol is None else rtol)
    return ranks


def factorization_of(x: Any) -> Any:
    """Return the factorization that a network is, or ``x`` itself."""
    return x.as_factorization() if hasattr(x, "as_factorization") else x


def _check_tree(tree: ModeTree | None) -> ModeTree:
    if isinstance(tree, ModeTree):
        return tree
    raise OptionError(
        "spectra of a dense tensor need a tree: spectra(tensor, tree).\n"
        f"  found: {'none' if tree is None else repr(tree)}; write a ModeTree, e.g. "
        "ModeTree.binary(4) or load_tree('htf-4')"
    )


def _check_own_tree(model: Factorization, tree: ModeTree | None) -> None:
    if tree is not None and tree != model.tree:
        raise OptionError(
            "spectra of a factorization are along its own tree.\n"
            f"  found: {tree!r}\n  own:   {model.tree!r}\n"
            "  for another tree give the dense tensor: spectra(model.to_tensor().detach(), tree)"
        )


def _factored_spectra(
    model: Factorization, work: torch.dtype = torch.float64
) -> list[tuple[tuple[int, ...], Scaled]]:
    """Return positions and singular values ``(positions, count)``, together of every node but the root."""
    net = model.network
    stacks, power = finite_stacks(model, work)
    differentiable = torch.is_grad_enabled() and any(stack.requires_grad for stack in stacks)
    if differentiable or not frames_fit(net):
        found = values_through_bonds(net, stacks)
        return [(nodes, Scaled(double(x), double(log2) + power)) for nodes, (x, log2) in found]
    with torch.no_grad():
        in_frames = frames(net, stacks)
        size, log2 = scale_of(in_frames)
        return [
            (batch.nodes, Scaled(double(part.values * size), double(log2) + power))
            for batch, part in zip(batches(net), values_in_frames(net, in_frames), strict=False)
            if not batch.step
        ]
