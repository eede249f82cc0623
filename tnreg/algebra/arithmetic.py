"""Sums, multiples and entrywise products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from tnreg.errors import OptionError, ShapeError, blame, check_number, check_scalar
from tnreg.factorizations.assembly import (
    check_factorization,
    full_weight,
    hold,
    identity,
    product,
    split,
    spread,
    weights_of,
)
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.memory import must_fit
from tnreg.networks.network import Network
from tnreg.ranks.decompose import truncate
from tnreg.ranks.rounding import check_finite
from tnreg.tensors.arrays import largest_of, times_power_of_two
from tnreg.trees.reading import Node


def add(one: Factorization, other: Factorization) -> Factorization:
    """Add entry by entry: ``one + other``, whose bonds are the sums of theirs.

    Where one has a diagonal join and the other a full one, the result has a full one. Leaves that are bare in
    one of them are bare, except under a diagonal join. ShapeError if their trees or sizes differ, SizeError
    if it would not fit into memory.
    """
    _check_pair(one, other)
    net = _combined(one.network, other.network, product=False)
    dtype = torch.promote_types(one.dtype, other.dtype)
    shapes = [(len(level.positions), *level.shape) for level in net.stacks]
    must_fit("add: the sum", shapes, dtype, one.device)
    with torch.no_grad():
        if one.network.slots == other.network.slots == net.slots and one.network.joins == other.network.joins:
            sides = [check_finite(model) for model in (one, other)]
            if one.dtype != dtype:
                sides[0] = [stack.to(dtype) for stack in sides[0]]
            return Factorization.holding(net, list(map(_blocks, shapes, *sides)))
        pairs = zip(net.weighted, _pair_weights(one, other, net).items(), strict=True)
        return hold(net, {node: _blocks(net.shape(i), *pair) for i, (node, pair) in pairs})


def _blocks(shape: tuple[int, ...], one: Tensor, other: Tensor) -> Tensor:
    """Put two blocks one after the other along all axes but those that keep their size, where they add up."""
    padding, where = _places(shape, one.shape, other.shape)
    whole = pad(one, padding)
    whole[where].add_(other)
    return whole


@lru_cache(maxsize=1024)
def _places(
    shape: tuple[int, ...], one: torch.Size, other: torch.Size
) -> tuple[list[int], tuple[slice, ...]]:
    """Return what ``pad`` puts behind the first block, and where the other one is."""
    padding = [x for n, m in zip(shape[::-1], one[::-1], strict=True) for x in (0, n - m)]
    return padding, tuple(slice(n - m, n) for n, m in zip(shape, other, strict=True))


def subtract(one: Factorization, other: Factorization) -> Factorization:
    """Subtract entry by entry: ``one - other``; see ``add``."""
    return add(one, scale(other, -1.0))


def linear_combination(
    models: Sequence[Factorization],
    coefficients: Sequence[float | complex] | None = None,
    *,
    rtol: float,
    ranks: int | Mapping[Node, int] | None = None,
) -> Factorization:
    """Return ``sum_k c_k models[k]``, rounded as it grows: bonds never exceed a rounded sum and one term.

    Args:
        models: Factorizations over one tree and sizes.
        coefficients: One number for each; ones if left out.
        rtol: ``‖S - result‖ <= rtol ‖S‖`` for the exact sum S, unless ``ranks`` cut further.
        ranks: Largest bond of the result: one integer, or ``{node: integer}``.

    Returns:
        A factorization with full joins; its ``error_bound`` bounds the error.

    Raises:
        OptionError: No models, another number of coefficients or none that are finite numbers, or ``rtol``
            outside ``[0, 1)``.
        ShapeError: Another tree or other sizes.

    Cost: an inner product for every pair of models, for the norm of the sum, and a rounding per model. If
    the terms cancel to less than 1e-7 of their size, partial sums lose only what is zero to rounding.
    """
    models, rtol = list(models), check_number(rtol, "linear_combination: rtol", 0, 1)
    factors = None if coefficients is None else list(coefficients)
    if not models or (factors is not None and len(factors) != len(models)):
        raise OptionError(
            "linear_combination needs models and as many coefficients, "
            f"found {len(models)} and {len(factors or ())}.",
            argument="models" if not models else "coefficients",
        )
    for model in models:
        _check_pair(models[0], model)
    terms = models
    if factors is not None:
        with blame("coefficients"):
            terms = [scale(m, c) for m, c in zip(models, factors, strict=True)]
    # half of the error allowed is spent on the partial sums, in equal parts
    part, least = rtol / 2 / max(len(terms) - 2, 1), _least_log_norm_of_sum(terms)
    total, lost, spent = terms[0], 0.0, 0.0
    for k, term in enumerate(terms[1:], 1):
        total = add(total, term)
        if k < len(terms) - 1:
            ratio = least - total.log_norm().item()  # not of norms, which may leave the range
            share = min(part * math.exp(min(ratio, 300.0)), 0.5) if not math.isnan(ratio) else 0.0
            total, spent = truncate(total, rtol=share or None), spent + share
            lost += total.error_bound or 0.0
    norm = total.norm().double().item()
    if 0 < lost < math.inf and 0 < norm < math.inf:  # the exact sum has a norm of at least norm - lost
        rtol = max(rtol * (norm - lost) - lost, 0.0) / norm
    elif spent:  # half of it is left, of a norm that may have grown by half
        rtol /= 3
    result = truncate(total, rtol=rtol, ranks=ranks)
    result.error_bound = (result.error_bound or 0.0) + lost
    return result


def _least_log_norm_of_sum(models: Sequence[Factorization]) -> float:
    """Bound the logarithm of the norm of a sum from below by inner products; -inf if rounding hides it."""
    with torch.no_grad():
        products = [
            (one.scaled_inner(other), 1 if i == j else 2)
            for i, one in enumerate(models)
            for j, other in enumerate(models[: i + 1])
        ]
    top = max(float(log2) for (_, log2), _ in products)
    parts = [complex(x).real * times * 2.0 ** (float(log2) - top) for (x, log2), times in products]
    eps = max(torch.finfo(model.dtype).eps for model in models)
    least = sum(parts) - 64 * len(models[0].tree.nodes) * eps * sum(map(abs, parts))
    return (math.log(least) + top * math.log(2)) / 2 if 0 < least < math.inf else -math.inf


def scale(model: Factorization, factor: float | complex) -> Factorization:
    """Multiply the tensor by a number, in the root's weight; a root of ones becomes a weight.

    If its weight would leave the range of the dtype, all weights share the number. That is Python's,
    numpy's or torch's, real or complex; OptionError for anything else, such as a vector, NaN or infinity.
    """
    factor = check_scalar(factor, "scale: factor")
    with torch.no_grad():
        weights, root = weights_of(model, ones=False), model.tree.root
        reach, log2 = torch.finfo(model.dtype).max ** 0.85, 0
        size = abs(factor) * float(largest_of(weights[root]))
        if factor and bool(weights[root].any()) and not 1 / reach < size < reach:
            log2 = math.frexp(abs(factor))[1]
            factor = times_power_of_two(factor, -log2)
        weights[root] = weights[root] * factor
        weights = {v: w if v == root else w.clone() for v, w in spread(weights, log2).items()}
        net = model.network  # has cached what stands where
        return hold(replace(net, root_ones=False) if net.root_ones else net, weights)


def hadamard(
    one: Factorization,
    other: Factorization,
    *,
    rtol: float | None = None,
    ranks: int | Mapping[Node, int] | None = None,
) -> Factorization:
    """Multiply entry by entry: ``one * other``.

    Without ``rtol`` and ``ranks`` exact, and bonds are the products of theirs. With either, the exact
    product is formed and rounded by ``truncate``, to full joins; ``error_bound`` bounds the error.

    Args:
        one: A factorization.
        other: Another over the same tree and sizes.
        rtol: ``‖P - result‖ <= rtol ‖P‖`` for the exact product P, unless ``ranks`` cut further.
        ranks: Largest bond: one integer, or ``{node: integer}``.

    Raises:
        ShapeError: Another tree or other sizes.
        SizeError: The exact product would not fit into the memory available.
        OptionError: ``rtol`` outside ``[0, 1)``, or ranks that are no positive integers.

    Cost: a binary full join of bonds R in both has ``R**6`` entries in the product (1.3e8 bytes at bonds
    16 and 16, 8.6e9 at 32 and 32), and rounding takes ``O(R**8)`` flops there.
    """
    _check_pair(one, other)
    net = _combined(one.network, other.network, product=True)
    pairs = _pair_weights(one, other, net)
    modes = {  # axes
        node: {axis for axis, j in enumerate(net.indices(i)) if j < net.tree.order}
        for i, node in zip(net.weighted, pairs, strict=True)
    }
    exact = rtol is None and ranks is None
    if not exact:
        _absorb_wide_leaves(one, pairs, net.named_joins, modes)
    shapes = {
        v: [n if axis in modes[v] else n * b.shape[axis] for axis, n in enumerate(a.shape)]
        for v, (a, b) in pairs.items()
    }
    sample = next(iter(pairs.values()))[0]
    # rounding works in double precision, on some copies
    kind = sample.dtype if exact else torch.promote_types(sample.dtype, torch.float64)
    must_fit(
        "hadamard: the exact product", shapes.values(), kind, sample.device,
        "truncate the factors first, or use a tree with fewer children per node",
        copies=2 if exact else 5, note=", its weights and copies of them",
    )  # fmt: skip
    weights, log2 = dict[Node, Tensor](), 0
    for node, (a, b) in pairs.items():
        (a, more), (b, own) = split(a), split(b)
        log2 += more + own
        left, right = list[int](), list[int]()  # mode axes stay aligned, all others are crossed
        for axis, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)):
            crossed = axis not in modes[node] and n > 1 < m
            if n > 1 or m > 1:  # without axes of 1: torch has no more than 64
                left += [n, 1] if crossed else [n]
                right += [1, m] if crossed else [m]
        weights[node] = (a.reshape(left) * b.reshape(right)).reshape(shapes[node])
    weights = spread(weights, log2)
    if exact:
        return hold(net, weights)
    product = Factorization.from_weights(net.tree, weights, join=net.named_joins, leaves=net.named_leaves)
    del weights  # the product holds copies
    return truncate(product, rtol=rtol, ranks=ranks)


def _absorb_wide_leaves(
    model: Factorization,
    pairs: dict[Node, tuple[Tensor, Tensor]],
    joins: Mapping[Node, str],
    modes: dict[Node, set[int]],
) -> None:
    """Multiply leaves into full joins above where a product of bonds would exceed the mode's size."""
    for node, (a, b) in pairs.items():
        children = model.tree.children(node) if joins.get(node) == "full" else ()
        for axis, child in enumerate(children):
            if model.tree.children(child) or child not in pairs:
                continue
            left, right = pairs[child]
            if left.shape[1] * right.shape[1] > len(left):
                a, b = _with_leaf(a, left, axis), _with_leaf(b, right, axis)
                pairs[child] = torch.eye(len(left)).to(left), left.new_ones(len(left), 1)
                modes[node].add(axis)
        pairs[node] = a, b


def _check_pair(one: Factorization, other: Factorization) -> None:
    """Raise an error unless both are factorizations over the same tree and sizes."""
    for argument, model in {"one": one, "other": other}.items():
        check_factorization(model, argument)
    if one.tree != other.tree or one.sizes != other.sizes:
        raise ShapeError(
            "both factorizations need the same tree and sizes.\n"
            f"  found: {one.tree!r} {one.sizes}\n  and:   {other.tree!r} {other.sizes}",
            argument="other",
        )


@lru_cache(maxsize=64)
def _combined(one: Network, other: Network, product: bool) -> Network:
    """Return the network of a sum or an entrywise product.

    Joins that differ become full ones. Under a full join leaves are bare if they are in one of both. Under a
    diagonal one they are if they are in both, and in a sum only where it joins nothing else.
    """
    tree, joins = one.tree, list(one.joins)
    for i, below in enumerate(tree.links):
        if below and other.joins[i] != joins[i]:
            joins[i] = "full"
        first, second = one.bare.intersection(below), other.bare.intersection(below)
        either, both = first | second, first & second
        bare = either if joins[i] == "full" else both if product or len(both) == len(below) else ()
        for c in either:
            joins[c] = "bare" if c in bare else "leaf"
    net = Network(tree, one.sizes, one.bonds, tuple(joins), one.root_ones and other.root_ones)
    pairs = zip(net.above[:-1], one.bonds, other.bonds, strict=False)
    bonds = [one.sizes[j] if j < tree.order else n * m if product else n + m for j, n, m in pairs]  # type: ignore
    return replace(net, bonds=(*bonds, 1))


def _pair_weights(
    one: Factorization, other: Factorization, net: Network
) -> dict[Node, tuple[Tensor, Tensor]]:
    """Weights of both by node, in one dtype, with the joins and leaves of a network that combines theirs."""
    dtype, tree, sides = torch.promote_types(one.dtype, other.dtype), net.tree, []
    with torch.no_grad():
        for model in (one, other):
            own = model.network
            weights = {node: w.to(dtype) for node, w in weights_of(model, ones=net.root_ones).items()}
            sample = next(iter(weights.values()))
            for i, node in enumerate(tree.nodes) if own.joins != net.joins else ():
                below, kinds = tree.links[i], (own.joins[i], net.joins[i])
                if kinds == ("diagonal", "full"):
                    weights[node] = full_weight(weights[node], len(below))
                elif kinds == ("bare", "leaf"):
                    weights[node] = identity(own.bonds[i], sample)
                for axis, c in enumerate(below):
                    if net.joins[c] == "bare" and c not in own.bare:
                        weights[node] = _with_leaf(weights[node], weights.pop(tree.nodes[c]), axis)
            sides.append(weights)
    return {tree.nodes[i]: (sides[0][tree.nodes[i]], sides[1][tree.nodes[i]]) for i in net.weighted}


def _with_leaf(weight: Tensor, leaf: Tensor, axis: int) -> Tensor:
    """Multiply a leaf into its axis of a full join above."""
    return product(weight.movedim(axis, -1), leaf.mT).movedim(-1, axis)
