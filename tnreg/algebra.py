"""Arithmetic of factorizations along one tree: results are factorizations again, nothing is densified.

Sums add bonds, entrywise products multiply them; ``truncate`` brings them down again. Every function
leaves its arguments alone; a result is a new model with weights of its own, not connected to theirs by
autograd.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from tnreg.assembly import assembled, contracted, product_joins, spread, weights_of
from tnreg.cores import core_factors
from tnreg.errors import OptionError, ShapeError, TreeError, check_integer
from tnreg.factorization import Factorization
from tnreg.hsvd import truncate
from tnreg.products import rounded_product
from tnreg.rank import as_tensor, check_numbers
from tnreg.rounding import limits_of
from tnreg.tree import Node

__all__ = [
    "add",
    "contract_modes",
    "diagonal_joins",
    "full_joins",
    "hadamard",
    "linear_combination",
    "marginal",
    "mode_product",
    "permute_modes",
    "reroot",
    "scale",
    "select",
    "subtract",
]

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


def reroot(model: Factorization, node: Node) -> Factorization:
    """The same tensor over the same tree hung up at another interior node: exact, bonds stay what they are.

    Edges on the way from the old root turn round; a root that is left with one child goes, with its
    weight multiplied into the neighbour. Diagonal joins on the way become full ones (R^children
    entries). Interior nodes get their usual names.

    Args:
        model: A factorization.
        node: An interior node of its tree.

    Raises:
        TreeError: No such node.
        OptionError: A leaf.
    """
    tree = model.tree
    target = tree.position(node)
    if not tree.links[target]:
        raise OptionError(f"reroot: {node!r} is a leaf; name an interior node, e.g. {tree.root!r}.")
    parent = {c: i for i, below in enumerate(tree.links) for c in below}
    path = [target]
    while path[0] in parent:
        path.insert(0, parent[path[0]])
    with torch.no_grad():
        weights, joins = weights_of(model, ones=False), model.network.named_joins
        if target == path[0]:
            return Factorization.from_weights(tree, weights, join=joins)
        held = {i: weights[v] for i, v in enumerate(tree.nodes)}
        kinds = {i: joins[v] for i, v in enumerate(tree.nodes) if v in joins}
        links = {i: list(below) for i, below in enumerate(tree.links) if below}
        upper: int | None = None  # what now stands for all that was above
        vector: Tensor | None = None  # or, if no mode is there, its weight
        for i, towards in zip(path, [*path[1:], None], strict=True):
            weight, below = held[i], links[i]
            if kinds[i] == "diagonal":
                weight, kinds[i] = spread(weight, len(below)), "full"
            if vector is not None:
                weight, vector = weight @ vector, None
            if upper is not None:
                below = [*below, upper]
            if towards is not None:
                weight = weight.movedim(below.index(towards), -1)
                below = [c for c in below if c != towards]
            if not below:
                upper, vector = None, weight
            elif i == path[0] and len(below) == 1:
                upper = below[0]
                held[upper] = held[upper] @ weight
            else:
                upper = i
            held[i], links[i] = weight, below
        return assembled(target, links, held, kinds, {tree.position(m): m for m in tree.leaves})[0]


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


def full_joins(model: Factorization) -> Factorization:
    """The same tensor with full joins everywhere: exact; a diagonal join of bond R gets R^children entries.

    For wide joins ``truncate(model)`` does the same on bonds that are no larger than needed.
    """
    with torch.no_grad():
        weights = weights_of(model, ones=False)
        for i, kind in enumerate(model.network.joins):
            if kind == "diagonal":
                node = model.tree.nodes[i]
                weights[node] = spread(weights[node], len(model.tree.links[i]))
        return Factorization.from_weights(model.tree, weights, join="full")


def diagonal_joins(
    model: Factorization,
    *,
    ranks: int | Mapping[Node, int] | None = None,
    tries: int = 8,
    steps: int = 100,
    seed: int = 0,
) -> Factorization:
    """The tensor with diagonal joins everywhere.

    Without ``ranks`` exact: each bond is the product of its siblings'. With them every core is replaced
    by a CP decomposition of it (Kolda and Bader 2009), searched for by damped Gauss-Newton steps from
    random starts; the first start is exact where two axes of a core have independent factors. Elsewhere
    that is a search: it may stop early where a decomposition of this rank exists, and a best one need
    not exist. What came out is measured, so look at ``error_bound``.

    Args:
        model: A factorization.
        ranks: Largest bond: one integer, or ``{node: integer}`` for the bond above a node; siblings
            share theirs. Nodes left out are exact.
        tries: Random starts per core; the search ends at the first that leaves nothing but rounding.
        steps: Gauss-Newton steps per start.
        seed: Draws the starts.

    Returns:
        A factorization with diagonal joins. With ``ranks`` its ``error_bound`` is the distance to the
        model, computed to rounding in double precision, not estimated.

    Raises:
        OptionError: Ranks that are no positive integers, two for siblings, or a core too large for
            the search; ``tries`` or ``steps`` below 1.

    Cost: without ``ranks`` none. With them ``O((k (R_1 + R_2 + ..))**3)`` flops per step at a core
    ``(R_1, R_2, ..)`` with new bond k, and one rounding of the difference, whose bonds are ``R + k``.
    """
    if ranks is None:
        return product_joins(model)
    check_integer(tries, 1, "diagonal_joins: tries")
    check_integer(steps, 1, "diagonal_joins: steps")
    tree = model.tree
    limits = limits_of(tree, ranks)
    wanted: dict[int, int] = {}
    for i, below in enumerate(tree.links):
        found = {limits[c] for c in below if c in limits}
        if len(found) > 1:
            raise OptionError(
                f"diagonal_joins: the children of node {tree.nodes[i]!r} share their bond.\n"
                f"  found:    ranks {sorted(found)}\n  expected: one rank for all of them"
            )
        if found:
            wanted[i] = found.pop()
    joins, bonds = model.network.joins, model.network.bonds
    done = {
        i: bonds[below[0]] <= wanted.get(i, math.inf) for i, below in enumerate(tree.links) if below
    }
    if all(joins[i] == "diagonal" and fits for i, fits in done.items()):
        same = Factorization.from_weights(tree, weights_of(model), join="diagonal")
        same.error_bound = 0.0
        return same
    with torch.no_grad():
        wide = torch.promote_types(model.dtype, torch.float64)
        doubles = {node: w.to(wide) for node, w in weights_of(model, ones=False).items()}
        exact = Factorization.from_weights(tree, doubles, join=model.network.named_joins)
        random = torch.Generator().manual_seed(seed)
        weights = core_factors(truncate(exact), wanted, tries, steps, random)
        named = {node: w.to(model.dtype) for node, w in weights.items()}
        out = Factorization.from_weights(tree, named, join="diagonal")
        doubles = {node: w.to(wide) for node, w in out.weights.items()}
        difference = truncate(
            subtract(Factorization.from_weights(tree, doubles, join="diagonal"), exact)
        )
        out.error_bound = difference.norm().item() + (difference.error_bound or 0.0)
        return out


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
