"""Arithmetic of factorizations along one tree: results are factorizations again, nothing is densified.

Sums add bonds, entrywise products multiply them; ``truncate`` brings them down again. Every function
leaves its arguments alone; a result is a new model with weights of its own, not connected to theirs by
autograd.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tnreg.algebra.products import rounded_product
from tnreg.errors import OptionError, ShapeError
from tnreg.factorizations.assembly import spread, weights_of
from tnreg.factorizations.factorization import Factorization
from tnreg.ranks.decompose import truncate
from tnreg.trees.reading import Node

# Weights of an entrywise product that is formed before it is rounded: faster up to about here (full
# joins of bonds 12 and 12 at order 16 take the same time either way), in some 500 MB.
_LARGEST_PRODUCT = 2**24


def add(one: Factorization, other: Factorization) -> Factorization:
    """``one + other``, entry by entry; bonds are the sums of theirs.

    Args:
        one: A factorization.
        other: Another over the same tree and sizes. Where one has a diagonal join and the other a
            full one, the result has a full one.

    Raises:
        ShapeError: Another tree or other sizes.
    """
    pairs, joins = _paired(one, other)
    weights: dict[Node, Tensor] = {}
    for i, (a, b) in enumerate(pairs):
        node = one.tree.nodes[i]
        if a is None or b is None:  # both roots are of ones, and so is the result's
            continue
        # a leaf's mode is common to both; all other axes are blocks beside each other
        common = not one.tree.links[i]
        shape = [
            n if common and axis == 0 else n + m
            for axis, (n, m) in enumerate(zip(a.shape, b.shape, strict=True))
        ]
        whole = a.new_zeros(shape)
        first = tuple(slice(0, n) for n in a.shape)
        second = tuple(
            slice(0, m) if common and axis == 0 else slice(n, n + m)
            for axis, (n, m) in enumerate(zip(a.shape, b.shape, strict=True))
        )
        whole[first] += a
        whole[second] += b
        weights[node] = whole
    return Factorization.from_weights(one.tree, weights, join=joins)


def subtract(one: Factorization, other: Factorization) -> Factorization:
    """``one - other``, entry by entry; see ``add``."""
    return add(one, scale(other, -1.0))


def linear_combination(
    models: Sequence[Factorization],
    coefficients: Sequence[float | complex] | None = None,
    *,
    rtol: float,
    ranks: int | Mapping[Node, int] | None = None,
) -> Factorization:
    """``sum_k c_k models[k]``, rounded on the way: bonds never hold more than a rounded sum and one term.

    Args:
        models: Factorizations over one tree and sizes.
        coefficients: One number for each; ones if left out.
        rtol: ``‖S - found‖ <= rtol ‖S‖`` for the exact sum S, unless ``ranks`` cut further.
        ranks: Largest bond of the result: one integer, or ``{node: integer}``.

    Returns:
        A factorization with full joins; its ``error_bound`` bounds the error.

    Raises:
        OptionError: No models, another number of coefficients, or ``rtol`` outside ``[0, 1)``.
        ShapeError: Another tree or other sizes.

    Cost: an inner product for every pair of models, which tells the norm of the sum, and one rounding per
    model. If the terms cancel to less than 1e-7 of their size that norm is lost in rounding: nothing is
    then cut on the way but what is zero to rounding.
    """
    terms = list(models)
    factors = [1.0] * len(terms) if coefficients is None else list(coefficients)
    if not terms or len(factors) != len(terms):
        raise OptionError(
            "linear_combination needs models and as many coefficients, "
            f"found {len(terms)} and {len(factors)}."
        )
    scaled = [
        model if factor == 1 else scale(model, factor)
        for model, factor in zip(terms, factors, strict=True)
    ]
    for model in scaled:
        _paired(scaled[0], model)
    # what may be lost in all, as a number; half of it in equal parts on the way
    allowed = rtol * _least_norm_of_sum(scaled)
    part = allowed / 2 / max(len(scaled) - 2, 1)
    total, lost = scaled[0], 0.0
    for k, model in enumerate(scaled[1:], 1):
        total = add(total, model)
        if k < len(scaled) - 1:
            size = total.norm().item()
            share = part / size if 0 < size < math.inf else 0.0
            total = truncate(total, rtol=min(share, 0.5) if share > 0 else None)
            lost += total.error_bound or 0.0
    size = total.norm().item()
    left = rtol
    if lost > 0 and 0 < size < math.inf:
        # of the exact sum, which is at least as large as this
        left = max(rtol * (size - lost) - lost, 0.0) / size
    found = truncate(total, rtol=left, ranks=ranks)
    found.error_bound = (found.error_bound or 0.0) + lost
    return found


def _least_norm_of_sum(models: Sequence[Factorization]) -> float:
    """A lower bound of the norm of a sum, from inner products; 0 if rounding leaves none."""
    square = rounding = 0.0
    with torch.no_grad():
        for i, one in enumerate(models):
            for j, other in enumerate(models[: i + 1]):
                value = complex(one.inner(other)).real * (1 if i == j else 2)
                square, rounding = square + value, rounding + abs(value)
    eps = max(torch.finfo(model.dtype).eps for model in models)
    least = square - 64 * len(models[0].tree.nodes) * eps * rounding
    return math.sqrt(least) if 0 < least < math.inf else 0.0


def scale(model: Factorization, factor: float | complex) -> Factorization:
    """The tensor times a number; a root of ones gets a weight if needed, as no leaf is changed."""
    with torch.no_grad():
        weights, joins = weights_of(model, ones=False), model.network.named_joins
        if isinstance(factor, complex):
            dtype = torch.promote_types(model.dtype, torch.complex64)
            weights = {node: w.to(dtype) for node, w in weights.items()}
        root = model.tree.root
        weights[root] = weights[root] * factor
        return Factorization.from_weights(model.tree, weights, join=joins)


def hadamard(
    one: Factorization,
    other: Factorization,
    *,
    rtol: float | None = None,
    ranks: int | Mapping[Node, int] | None = None,
    seed: int = 0,
) -> Factorization:
    """``one * other``, entry by entry.

    Without ``rtol`` and ``ranks`` exact, and bonds are the products of theirs. With them the product is
    rounded, and where it would have more than 2**24 weights never formed: it is projected on what
    random tensors show of it, more and more of them until the error is small enough, and rounded then.

    Args:
        one: A factorization.
        other: Another over the same tree and sizes.
        rtol: ``‖P - found‖ <= rtol ‖P‖`` for the exact product P, unless ``ranks`` cut further. From
            1e-6 on, and if the norm of P can be computed in some seconds (bonds up to
            about 16 and 16 at full binary joins and order 8, 12 and 12 at order 64; hundreds at diagonal
            joins and in tensor trains), the error is computed
            and so guaranteed. Elsewhere it is estimated with 16 random tensors, with a reserve of 3.
        ranks: Largest bond: one integer, or ``{node: integer}``.
        seed: Draws the random tensors.

    Returns:
        A factorization; where it is rounded, with full joins. Its ``error_bound`` bounds the error; it
        is ``None`` where the error is estimated, or not looked at for want of ``rtol``.

    Raises:
        ShapeError: Another tree or other sizes.
        OptionError: ``rtol`` outside ``[0, 1)``, ranks that are no positive integers, or a result too
            large for memory.

    Cost: rounded, with bonds R of both and k of the result, ``O(k**2 R**4)`` flops per binary node.
    """
    pairs, joins = _paired(one, other)
    if rtol is not None or ranks is not None:
        if _product_size(one, other) > _LARGEST_PRODUCT:
            return rounded_product(one, other, rtol=rtol, ranks=ranks, seed=seed)
        return truncate(hadamard(one, other), rtol=rtol, ranks=ranks)
    weights: dict[Node, Tensor] = {}
    for i, (a, b) in enumerate(pairs):
        if a is None or b is None:
            continue
        if not one.tree.links[i]:  # rows belong to the mode: Kronecker products of the rows
            weights[one.tree.nodes[i]] = (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)
        else:
            weights[one.tree.nodes[i]] = torch.kron(a, b)
    return Factorization.from_weights(one.tree, weights, join=joins)


def _product_size(one: Factorization, other: Factorization) -> int:
    """How many weights the exact product has."""
    links, total = one.tree.links, 0
    pairs = zip(one.weights.values(), other.weights.values(), strict=False)
    for below, (a, b) in zip(links, pairs, strict=False):
        total += a.numel() * b.numel() // (1 if below else a.shape[0])  # the mode is common
    return total


def _paired(
    one: Factorization, other: Factorization
) -> tuple[list[tuple[Tensor | None, Tensor | None]], dict[Node, str]]:
    """Weights of both by node, of one dtype and with the same joins; ``None`` for a root of ones."""
    for model in (one, other):
        if not isinstance(model, Factorization):
            raise OptionError(f"expected a Factorization, found {type(model).__name__}.")
    if one.tree != other.tree or one.sizes != other.sizes:
        raise ShapeError(
            "both factorizations need the same tree and sizes.\n"
            f"  found: {one.tree!r} {one.sizes}\n  and:   {other.tree!r} {other.sizes}"
        )
    tree, dtype = one.tree, torch.promote_types(one.dtype, other.dtype)
    ones = one.network.root_ones and other.network.root_ones
    kinds = [model.network.named_joins for model in (one, other)]
    joins = {
        v: "diagonal" if kinds[0][v] == kinds[1][v] == "diagonal" else "full" for v in tree.interior
    }
    sides: list[dict[Node, Tensor]] = []
    with torch.no_grad():
        for model, kind in zip((one, other), kinds, strict=True):
            weights = weights_of(model, ones=ones)
            for v in tree.interior:
                if kind[v] == "diagonal" and joins[v] == "full":
                    weights[v] = spread(weights[v], len(tree.children(v)))
            sides.append({node: w.to(dtype) for node, w in weights.items()})
    return [(sides[0].get(v), sides[1].get(v)) for v in tree.nodes], joins
