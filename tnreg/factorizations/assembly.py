"""Factorizations taken apart and put together again: what changes a tree or its joins is made of this.

Weights are taken as they are, detached; what is made of them is a new model with copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tnreg.factorizations.factorization import Factorization
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree


def weights_of(model: Factorization, *, ones: bool = True) -> dict[Node, Tensor]:
    """Return detached weights; with ``ones=False`` a root of ones has its weight as well."""
    weights = {node: w.detach() for node, w in model.weights.items()}
    if model.network.root_ones and not ones:
        bond = model.network.bonds[model.tree.links[-1][0]]
        weights[model.tree.root] = torch.ones(bond, dtype=model.dtype, device=model.device)
    return weights


def assemble(
    root: int,
    links: Mapping[int, Sequence[int]],
    weights: Mapping[int, Tensor],
    joins: Mapping[int, str],
    modes: Mapping[int, int],
) -> tuple[Factorization, list[int]]:
    """Make a factorization of the numbered nodes that hang below one of them.

    Args:
        root: Number of the root, an interior node.
        links: Children of the interior nodes.
        weights: By number; a diagonal root that has none is fixed to ones.
        joins: Joins of the interior nodes.
        modes: Modes of the leaves.

    Returns:
        The factorization, whose interior nodes have their usual names, and the numbers of its nodes in
        the order of ``tree.nodes``.
    """
    order, waiting = list[int](), [root]
    while (
        waiting
    ):  # without recursion: a caterpillar over a thousand modes is a thousand nodes deep
        order.append(waiting.pop())
        waiting.extend(links.get(order[-1], ()))
    order.reverse()
    nested: dict[int, Any] = {}
    for i in order:
        below = links.get(i)
        nested[i] = [nested.pop(c) for c in below] if below else modes[i]
    tree = ModeTree(nested[root])
    numbers = dict(zip(tree.nodes, order, strict=True))
    model = Factorization.from_weights(
        tree,
        {node: weights[i] for node, i in numbers.items() if i in weights},
        join={node: joins[numbers[node]] for node in tree.interior},
    )
    return model, order


def contract_leaves(model: Factorization, vectors: Mapping[int, Tensor]) -> Factorization | Tensor:
    """Contract modes with checked vectors; the others are renumbered from 0, in their order.

    A node that is left with one child is removed, with its weight multiplied into that child.

    Returns:
        A factorization of fewer modes, or a 0-dimensional tensor if none is left.
    """
    tree, joins = model.tree, model.network.named_joins
    dtype = reduce(torch.promote_types, (v.dtype for v in vectors.values()), model.dtype)
    weights = [weight.to(dtype) for weight in weights_of(model, ones=False).values()]
    contracted: set[int] = (
        set()
    )  # of these a vector over the bond above is left, kept as their weight
    stand_in: dict[int, int] = {}  # a node that was removed -> the child in its place
    links: dict[int, list[int]] = {}
    top = len(tree.nodes) - 1
    for i, (node, below) in enumerate(zip(tree.nodes, tree.links, strict=True)):
        if not below:
            if node in vectors:
                weights[i] = vectors[node].to(dtype) @ weights[i]  # type: ignore[index]
                contracted.add(i)
            continue
        inner = [weights[c] if c in contracted else None for c in below]
        weights[i] = _contract_children(weights[i], joins[node], inner)
        links[i] = [stand_in.get(c, c) for c in below if c not in contracted]
        if not links[i]:
            contracted.add(i)
        # a root above nothing but a leaf stays
        elif len(links[i]) == 1 < len(below) and (i != top or links.get(links[i][0])):
            child = stand_in[i] = links[i][0]
            weights[child] = weights[child] @ weights[i]
    if top in contracted:
        return weights[top]
    modes = [mode for mode in tree.leaves if mode not in vectors]
    return assemble(
        stand_in.get(top, top),
        links,
        dict(enumerate(weights)),
        {tree.position(node): join for node, join in joins.items()},
        {tree.position(mode): k for k, mode in enumerate(modes)},
    )[0]


def _contract_children(weight: Tensor, join: str, vectors: Sequence[Tensor | None]) -> Tensor:
    """Contract a node's weight with those of its children that are vectors now."""
    for axis, vector in reversed(list(enumerate(vectors))):
        if vector is not None and join == "full":
            weight = torch.tensordot(vector, weight, ([0], [axis]))
        elif vector is not None:
            weight = vector.reshape(-1, *[1] * (weight.ndim - 1)) * weight
    if join == "diagonal" and all(vector is not None for vector in vectors):
        weight = weight.sum(0)
    return weight


def full_weight(weight: Tensor, children: int) -> Tensor:
    """Return a diagonal weight ``(R, ...)`` as that of a full join, ``(R, .., R, ...)``."""
    bond = weight.shape[0]
    full = weight.new_zeros([bond] * children + list(weight.shape[1:]))
    every = torch.arange(bond, device=weight.device)
    full[(every,) * children] = weight
    return full


@torch.no_grad()
def product_joins(model: Factorization) -> Factorization:
    """Return the factorization with diagonal joins, each bond the product of its siblings'."""
    tree, joins, weights = model.tree, model.network.named_joins, weights_of(model)
    full = [node for node in tree.interior if joins[node] == "full"]
    wider = dict(weights)
    for node in full:
        wider[node] = weights[node].flatten(0, len(tree.children(node)) - 1)
    for node in full:
        children = tree.children(node)
        bonds = [torch.arange(weights[c].shape[-1], device=model.device) for c in children]
        combined = torch.cartesian_prod(*bonds).reshape(-1, len(children))
        for child, columns in zip(children, combined.unbind(1), strict=True):
            wider[child] = wider[child].index_select(-1, columns)
    return Factorization.from_weights(tree, wider, join="diagonal")
