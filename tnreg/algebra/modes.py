"""Products with matrices and vectors along modes, marginals, selection, reordering of modes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import OptionError, ShapeError, TreeError
from tnreg.factorizations.assembly import assembled, contracted, weights_of
from tnreg.factorizations.factorization import Factorization
from tnreg.tensors.arrays import as_tensor, check_numbers


def mode_product(model: Factorization, matrices: Mapping[int, Any]) -> Factorization:
    """Multiply modes by matrices: ``W'[.., j, ..] = sum_i M[j, i] W[.., i, ..]``.

    Args:
        model: A factorization.
        matrices: ``{mode: (new size, size)}``.

    Raises:
        TreeError: No such mode.
        ShapeError: A matrix of another shape.
    """
    with torch.no_grad():
        weights = dict(model.weights)
        for mode, given in matrices.items():
            _check_mode(model, mode)
            matrix = check_numbers(as_tensor(given)).to(model.device)
            if matrix.ndim != 2 or matrix.shape[1] != model.sizes[mode]:
                raise ShapeError(
                    f"mode_product: the matrix of mode {mode} does not fit.\n"
                    f"  found:    {tuple(matrix.shape)}\n  expected: (any, {model.sizes[mode]})"
                )
            dtype = torch.promote_types(matrix.dtype, model.dtype)
            weights[mode] = matrix.to(dtype) @ weights[mode].to(dtype)
        return Factorization.from_weights(model.tree, weights, join=model.network.named_joins)


def contract_modes(model: Factorization, vectors: Mapping[int, Any]) -> Factorization | Tensor:
    """Contract modes with vectors: ``W'[..] = sum_i v[i] W[.., i, ..]``; nothing is conjugated.

    The modes that are left keep their order and are numbered anew. Nodes that lose all but one child
    this way disappear with their weight multiplied into that child.

    Args:
        model: A factorization.
        vectors: ``{mode: (size,)}``.

    Returns:
        A factorization of fewer modes, or a 0-dimensional tensor if none is left.

    Raises:
        TreeError: No such mode.
        ShapeError: A vector of another length.
    """
    with torch.no_grad():
        checked: dict[int, Tensor] = {}
        for mode, given in vectors.items():
            _check_mode(model, mode)
            vector = check_numbers(as_tensor(given)).to(model.device)
            if vector.shape != (model.sizes[mode],):
                raise ShapeError(
                    f"contract_modes: the vector of mode {mode} does not fit.\n"
                    f"  found:    {tuple(vector.shape)}\n  expected: ({model.sizes[mode]},)"
                )
            checked[mode] = vector
        return contracted(model, checked)


def marginal(model: Factorization, modes: int | Iterable[int]) -> Factorization | Tensor:
    """Sum over some modes: a factorization of the others, or a 0-dimensional tensor.

    Raises:
        TreeError: No such mode; negative ones do not count from the end.
    """
    chosen = list(modes) if isinstance(modes, Iterable) else [modes]
    for mode in chosen:
        _check_mode(model, mode)
    ones = {mode: torch.ones(model.sizes[mode], dtype=model.dtype) for mode in chosen}
    return contract_modes(model, ones)


def select(model: Factorization, key: Any) -> Factorization | Tensor:
    """``W[key]`` as for arrays: an integer takes a mode away, a slice shortens it.

    Args:
        model: A factorization.
        key: An integer (Python's, numpy's, torch's; negative ones count from the end), a slice (with
            steps of either sign; bounds beyond the end are cut) or ``...``, or a tuple of them; what is
            left out stays whole.

    Returns:
        A factorization of the modes that are left, or a 0-dimensional tensor if none is.

    Raises:
        OptionError: Something else as a key (``None``, booleans, lists and arrays of indices, which
            arrays know as well), a step of 0, or too many of them.
        ShapeError: An integer out of range, or a slice of nothing.
    """
    with torch.no_grad():
        weights = dict(model.weights)
        vectors: dict[int, Tensor] = {}
        for mode, item in enumerate(_full_key(key, model.tree.order)):
            size = model.sizes[mode]
            if isinstance(item, slice):
                try:
                    rows = list(range(*item.indices(size)))
                except (TypeError, ValueError) as error:
                    raise OptionError(
                        f"select: {item} of mode {mode} is no slice: {error}."
                    ) from None
                if not rows:
                    raise ShapeError(f"select: {item} takes nothing of mode {mode}, size {size}.")
                weights[mode] = weights[mode][rows]
            else:
                if not -size <= item < size:
                    raise ShapeError(
                        f"select: index {item} is out of range for mode {mode}, size {size}."
                    )
                vectors[mode] = torch.zeros(size, dtype=model.dtype, device=model.device)
                vectors[mode][item] = 1
        shorter = Factorization.from_weights(model.tree, weights, join=model.network.named_joins)
        return contracted(shorter, vectors) if vectors else shorter


def permute_modes(model: Factorization, order: Sequence[int]) -> Factorization:
    """Reorder the modes as ``torch.permute`` does: mode n of the result is mode ``order[n]`` of the model.

    The tree is the same with its leaves renamed; interior nodes get their usual names.

    Raises:
        OptionError: ``order`` does not hold every mode once.
    """
    new = list(order)
    if sorted(new) != list(model.tree.leaves):
        raise OptionError(
            f"permute_modes: order must hold each of 0..{model.tree.order - 1} once, found {order!r}."
        )
    tree = model.tree
    names = {tree.position(mode): n for n, mode in enumerate(new)}
    with torch.no_grad():
        links = {i: below for i, below in enumerate(tree.links) if below}
        held = {tree.position(node): weight for node, weight in weights_of(model).items()}
        kinds = {tree.position(node): kind for node, kind in model.network.named_joins.items()}
        return assembled(len(tree.nodes) - 1, links, held, kinds, names)[0]


def _check_mode(model: Factorization, mode: Any) -> None:
    try:
        known = not isinstance(mode, bool) and 0 <= index(mode) < model.tree.order
    except TypeError:
        known = False
    if not known:
        raise TreeError(f"there is no mode {mode!r}; modes are 0..{model.tree.order - 1}.")


def _full_key(key: Any, order: int) -> list[int | slice]:
    """One integer or slice for every mode."""
    items = list(key) if isinstance(key, tuple) else [key]
    dots = [k for k, item in enumerate(items) if isinstance(item, EllipsisType)]
    if len(dots) > 1 or len(items) - len(dots) > order:
        raise OptionError(f"select: {key!r} is for other than {order} modes.")
    at = dots[0] if dots else len(items)
    missing = order - (len(items) - len(dots))
    items = [*items[:at], *[slice(None)] * missing, *items[at + len(dots) :]]
    out: list[int | slice] = []
    for item in items:
        if isinstance(item, slice):
            out.append(item)
            continue
        try:
            # a boolean is an integer to Python, but not to arrays
            number = None if "bool" in str(getattr(item, "dtype", type(item))) else index(item)
        except TypeError:
            number = None
        if number is None:
            raise OptionError(
                f"select: a key is an integer, a slice or '...' for each mode, found {item!r}.\n"
                "  for some rows of a mode write algebra.mode_product(model, {mode: rows of the identity})"
            )
        out.append(number)
    return out
