"""Products with matrices and vectors along modes, marginals, selection, reordering of modes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import OptionError, ShapeError, TreeError
from tnreg.factorizations.assembly import (
    assemble,
    check_factorization,
    contract_leaves,
    product,
    split,
    spread,
    weights_of,
)
from tnreg.factorizations.factorization import Factorization
from tnreg.tensors.arrays import as_tensor, check_numbers
from tnreg.trees.reading import Node


def mode_product(model: Factorization, matrices: Mapping[int, Any]) -> Factorization:
    """Multiply modes by matrices: ``W'[.., j, ..] = sum_i M[j, i] W[.., i, ..]``.

    Args:
        model: A factorization.
        matrices: ``{mode: (new size, size)}``; TreeError for other modes, ShapeError for other shapes,
            SizeError for a result that would not fit into memory.

    A bare leaf stays bare, except under a diagonal join, where the matrix becomes its weight.
    """
    weights, leaves, log2 = weights_of(model), model.network.named_leaves, 0
    for mode, matrix in _check_arrays(model, matrices, 2).items():
        holder = _holder(model, mode)
        if holder is None:
            weights[mode], leaves[mode] = matrix, "weights"
            continue
        node, axis = holder
        dtype = torch.promote_types(matrix.dtype, weights[node].dtype)
        (left, more), (right, own) = split(matrix.to(dtype)), split(weights[node].to(dtype).movedim(axis, 0))
        moved = product(left, right.reshape(len(right), -1)).reshape(-1, *right.shape[1:])
        weights[node], log2 = moved.movedim(0, axis), log2 + more + own
    joins = model.network.named_joins
    return Factorization.from_weights(model.tree, spread(weights, log2), join=joins, leaves=leaves)


def contract_modes(model: Factorization, vectors: Mapping[int, Any]) -> Factorization | Tensor:
    """Contract modes with vectors: ``W'[..] = sum_i v[i] W[.., i, ..]``; nothing is conjugated.

    The remaining modes keep their order and are renumbered from 0. A node that loses all but one child
    is removed, with its weight multiplied into that child.

    Args:
        model: A factorization.
        vectors: ``{mode: (size,)}``; TreeError for other modes, ShapeError for other lengths.

    Returns:
        A factorization of fewer modes, or a 0-dimensional tensor if none is left.
    """
    check_factorization(model)
    with torch.no_grad():
        return contract_leaves(model, _check_arrays(model, vectors, 1))


def marginal(model: Factorization, modes: int | Iterable[int]) -> Factorization | Tensor:
    """Sum over some modes: a factorization of the others, or a 0-dimensional tensor.

    Negative modes do not count from the end: TreeError.
    """
    check_factorization(model)
    summed = list(modes) if isinstance(modes, Iterable) else [modes]
    for mode in summed:
        _check_mode(model, mode)
    ones = {mode: torch.ones(model.sizes[mode], dtype=model.dtype) for mode in summed}
    return contract_modes(model, ones)


def select(model: Factorization, key: Any) -> Factorization | Tensor:
    """Index as arrays do, ``W[key]``: an integer removes a mode, a slice shortens it.

    Args:
        model: A factorization.
        key: An integer (Python's, numpy's, torch's; negative ones count from the end), a slice (with
            steps of either sign; bounds beyond the end are cut) or ``...``, or a tuple of them; modes
            that are left out stay whole.

    Returns:
        A factorization of the remaining modes, or a 0-dimensional tensor if there is none.

    Raises:
        OptionError: Something else as a key (``None``, booleans, lists and arrays of indices, which
            arrays accept as well), a step of 0, or too many of them.
        ShapeError: An integer out of range, or a slice of nothing.
    """
    weights, leaves = weights_of(model), model.network.named_leaves
    vectors: dict[int, Tensor] = {}
    for mode, item in enumerate(_full_key(key, model.tree.order)):
        size = model.sizes[mode]
        if isinstance(item, slice):
            try:
                rows = list(range(*item.indices(size)))
            except (TypeError, ValueError) as error:
                message = f"select: {item} of mode {mode} is no slice: {error}."
                raise OptionError(message, argument="key") from None
            if not rows:
                message = f"select: {item} takes nothing of mode {mode}, size {size}."
                raise ShapeError(message, argument="key")
            holder = _holder(model, mode)
            if rows == list(range(size)):
                continue
            if holder is None:
                eye = torch.eye(size, dtype=model.dtype, device=model.device)
                weights[mode], leaves[mode] = eye[rows], "weights"
            else:
                node, axis = holder
                weights[node] = weights[node].index_select(axis, torch.tensor(rows, device=model.device))
        elif -size <= item < size:
            vectors[mode] = torch.zeros(size, dtype=model.dtype, device=model.device)
            vectors[mode][item] = 1
        else:
            message = f"select: index {item} is out of range for mode {mode}, size {size}."
            raise ShapeError(message, argument="key")
    joins = model.network.named_joins
    shorter = Factorization.from_weights(model.tree, weights, join=joins, leaves=leaves)
    return contract_modes(shorter, vectors) if vectors else shorter


def permute_modes(model: Factorization, order: Sequence[int]) -> Factorization:
    """Reorder the modes as ``torch.permute`` does: mode n of the result is mode ``order[n]`` of the model.

    The tree is the same with its leaves renamed; interior nodes get their usual names. OptionError if
    ``order`` does not hold every mode once.
    """
    check_factorization(model)
    tree, order = model.tree, list(order)
    if sorted(order) != list(tree.leaves):
        message = f"permute_modes: order must hold each of 0..{tree.order - 1} once, found {order!r}."
        raise OptionError(message, argument="order")
    links = {i: below for i, below in enumerate(tree.links) if below}
    weights = {tree.position(node): weight for node, weight in weights_of(model).items()}
    joins = {tree.position(node): join for node, join in model.network.named_joins.items()}
    modes = {tree.position(mode): n for n, mode in enumerate(order)}
    return assemble(len(tree.nodes) - 1, links, weights, joins, modes)[0]


def _holder(model: Factorization, mode: int) -> tuple[Node, int] | None:
    """Return which weight has a mode as an axis of its own; ``None`` for bare leaves of diagonal joins."""
    if model.network.named_leaves[mode] == "weights":
        return mode, 0
    parent = model.tree.parent(mode)
    full = model.network.named_joins[parent] == "full"
    return (parent, model.tree.children(parent).index(mode)) if full else None


def _check_mode(model: Factorization, mode: Any, argument: str = "modes") -> None:
    """Raise an error unless the model has this mode."""
    try:
        known = not isinstance(mode, bool) and 0 <= index(mode) < model.tree.order
    except TypeError:
        known = False
    if not known:
        message = f"there is no mode {mode!r}; modes are 0..{model.tree.order - 1}."
        raise TreeError(message, argument=argument)


def _check_arrays(model: Factorization, arrays: Mapping[int, Any], axes: int) -> dict[int, Tensor]:
    """Return finite vectors or matrices whose last axis fits their mode, or raise an error."""
    argument = "matrices" if axes == 2 else "vectors"
    what = "mode_product: the matrix" if axes == 2 else "contract_modes: the vector"
    tensors: dict[int, Tensor] = {}
    for mode, array in arrays.items():
        _check_mode(model, mode, argument)
        tensor, size = check_numbers(as_tensor(array)).to(model.device), model.sizes[mode]
        if tensor.ndim != axes or tensor.shape[-1] != size:
            raise ShapeError(
                f"{what} of mode {mode} does not fit.\n  found:    {tuple(tensor.shape)}\n"
                f"  expected: {f'(any, {size})' if axes == 2 else (size,)}",
                argument=argument,
            )
        tensors[mode] = tensor
    return tensors


def _full_key(key: Any, order: int) -> list[int | slice]:
    """Return one integer or slice for every mode."""
    items = list(key) if isinstance(key, tuple) else [key]
    dots = [k for k, item in enumerate(items) if isinstance(item, EllipsisType)]
    missing = order - (len(items) - len(dots))
    if len(dots) > 1 or missing < 0:
        raise OptionError(f"select: {key!r} is for other than {order} modes.", argument="key")
    at = dots[0] if dots else len(items)
    items[at : at + len(dots)] = [slice(None)] * missing
    for k, item in enumerate(items):
        if isinstance(item, slice):
            continue
        try:
            # a boolean is an integer to Python, but not to arrays
            if "bool" in str(getattr(item, "dtype", type(item))):
                raise TypeError
            items[k] = index(item)
        except TypeError:
            raise OptionError(
                f"select: a key is an integer, a slice or '...' for each mode, found {item!r}.\n"
                "  for some rows of a mode write algebra.mode_product(model, {mode: rows of the identity})",
                argument="key",
            ) from None
    return items
