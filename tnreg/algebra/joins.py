"""The same tensor with other joins or another root."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tnreg.algebra.arithmetic import subtract
from tnreg.algebra.cores import core_factors
from tnreg.errors import OptionError, check_integer
from tnreg.factorizations.assembly import assembled, product_joins, spread, weights_of
from tnreg.factorizations.factorization import Factorization
from tnreg.ranks.decompose import truncate
from tnreg.ranks.rounding import limits_of
from tnreg.trees.reading import Node


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
