"""Factorizations taken apart and assembled again: what changes a tree or its joins is made of this.

Weights are taken as they are, detached; what is built from them is a new model with copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tnreg.factorizations.factorization import Factorization
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree


def weights_of(model: Factorization, *, ones: bool = True) -> dict[Node, Tensor]:
    """Detached weights; with ``ones=False`` a root of ones has its weight as well."""
    weights = {node: w.detach() for node, w in model.weights.items()}
    if model.network.root_ones and not ones:
        bond = model.network.bonds[model.tree.links[-1][0]]
        weights[model.tree.root] = torch.ones(bond, dtype=model.dtype, device=model.device)
    return weights


def assembled(
    root: int,
    links: Mapping[int, Sequence[int]],
    held: Mapping[int, Tensor],
    kinds: Mapping[int, str],
    modes: Mapping[int, int],
) -> tuple[Factorization, list[int]]:
    """The factorization of numbered nodes that hang below one of them.

    Args:
        root: Number of the root, an interior node.
        links: Children of the interior nodes.
        held: Weights; a diagonal root that has none is fixed to ones.
        kinds: Joins of the interior nodes.
        modes: Modes of the leaves.

    Returns:
        The factorization, whose interior nodes have their usual names, and the numbers of its nodes in
        the order of ``tree.nodes``.
    """
    order, left = list[int](), [root]
    while left:  # without recursion: a caterpillar over a thousand modes is a thousand nodes deep
        order.append(left.pop())
        left.extend(links.get(order[-1], ()))
    order.reverse()
    nested: dict[int, Any] = {}
    for i in order:
        below = links.get(i)
        nested[i] = [nested.pop(c) for c in below] if below else modes[i]
    tree = ModeTree(nested[root])
    found = Factorization.from_weights(
        tree,
        {v: held[i] for v, i in zip(tree.nodes, order, strict=True) if i in held},
        join={v: kinds[i] for v, i in zip(tree.nodes, order, strict=True) if links.get(i)},
    )
    return found, order


def contracted(model: Factorization, vectors: Mapping[int, Tensor]) -> Factorization | Tensor:
    """Without the modes of ``vectors``, which have been checked."""
    tree, joins = model.tree, model.network.named_joins
    weights = weights_of(model, ones=False)
    gone: dict[int, Tensor] = {}  # position -> what it is now: a vector over the bond above it
    instead: dict[int, int] = {}  # a node that disappeared -> the child that stands for it
    links: dict[int, list[int]] = {}
    top = len(tree.nodes) - 1
    taken = {tree.position(mode) for mode in vectors}
    for i, below in enumerate(tree.links):
        node = tree.nodes[i]
        if i in taken:
            mode = int(node)  # type: ignore[call-overload]
            weight = weights[node]
            dtype = torch.promote_types(weight.dtype, vectors[mode].dtype)
            gone[i] = vectors[mode].to(dtype) @ weight.to(dtype)
            continue
        left = [c for c in below if c not in gone]
        if len(left) < len(below):
            weights[node] = _absorb(weights[node], joins[node], [gone.get(c) for c in below])
        if below and not left:
            gone[i] = weights[node]
            continue
        links[i] = [instead.get(c, c) for c in left]
        # a node that is left with one child goes, except for a root above nothing but a leaf
        if len(left) == 1 < len(below) and (i != top or tree.links[links[i][0]]):
            child = tree.nodes[links[i][0]]
            dtype = torch.promote_types(weights[child].dtype, weights[node].dtype)
            weights[child] = weights[child].to(dtype) @ weights[node].to(dtype)
            instead[i] = links[i][0]
    if top in gone:
        return gone[top]
    root = instead.get(top, top)
    kept = [m for m in tree.leaves if m not in vectors]
    held = {i: weights[tree.nodes[i]] for i in links}
    kinds = {i: joins[tree.nodes[i]] for i, below in links.items() if below}
    return assembled(root, links, held, kinds, {tree.position(m): k for k, m in enumerate(kept)})[0]


def _absorb(weight: Tensor, kind: str, vectors: Sequence[Tensor | None]) -> Tensor:
    """A node's weight with the children that are vectors now contracted into it."""
    for vector in vectors:
        if vector is not None:
            weight = weight.to(torch.promote_types(weight.dtype, vector.dtype))
    if kind == "diagonal":
        for vector in vectors:
            if vector is not None:
                weight = vector.to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1)) * weight
        if all(v is not None for v in vectors):
            weight = weight.sum(0)
        return weight
    for axis in reversed(range(len(vectors))):
        vector = vectors[axis]
        if vector is not None:
            weight = torch.tensordot(vector.to(weight.dtype), weight, ([0], [axis]))
    return weight


def spread(weight: Tensor, children: int) -> Tensor:
    """A diagonal weight ``(R, ...)`` as that of a full join: ``(R, .., R, ...)``, zero off the diagonal."""
    bond = weight.shape[0]
    whole = weight.new_zeros([bond] * children + list(weight.shape[1:]))
    every = torch.arange(bond, device=weight.device)
    whole[(every,) * children] = weight
    return whole


def product_joins(model: Factorization) -> Factorization:
    """With diagonal joins, each bond the product of its siblings'."""
    with torch.no_grad():
        tree, weights = model.tree, weights_of(model)
        joins, out = model.network.named_joins, dict[Node, Tensor]()
        for i, below in enumerate(tree.links):
            node = tree.nodes[i]
            if below and joins[node] == "full":
                flat = weights[node].flatten(0, len(below) - 1)
                out[node] = flat
            elif node in weights:
                out[node] = weights[node]
        for i, below in enumerate(tree.links):
            node = tree.nodes[i]
            if not below or joins[node] == "diagonal":
                continue
            bonds = [weights[tree.nodes[c]].shape[-1] for c in below]
            combined = torch.cartesian_prod(*(torch.arange(n) for n in bonds)).reshape(
                -1, len(below)
            )
            for k, c in enumerate(below):
                columns = combined[:, k].to(model.device)
                out[tree.nodes[c]] = out[tree.nodes[c]].index_select(-1, columns)
        return Factorization.from_weights(tree, out, join="diagonal")
