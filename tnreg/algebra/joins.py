"""The same tensor with other joins or another root."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch

from tnreg.errors import OptionError, blame
from tnreg.factorizations.assembly import assemble, check_factorization, full_weight, product, weights_of
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.memory import must_fit
from tnreg.trees.reading import Node


def reroot(model: Factorization, node: Node) -> Factorization:
    """Hang the tree from another interior node: the same tensor, exactly, on the same bonds.

    Edges on the way from the old root are turned round. If that leaves the old root with one child, it is
    removed and its weight multiplied into the neighbour. Diagonal joins on the way become full ones
    (R^children entries). Interior nodes get their usual names.

    Raises:
        TreeError: No such node.
        OptionError: The node is a leaf.
        SizeError: A full join would not fit into memory.
    """
    check_factorization(model)
    tree = model.tree
    with blame("node"):
        target, top = tree.position(node), len(tree.nodes) - 1
    if not tree.links[target]:
        message = f"reroot: {node!r} is a leaf; name an interior node, e.g. {tree.root!r}."
        raise OptionError(message, argument="node")
    joins, named = model.network.named_joins, weights_of(model, ones=False)
    if target == top:
        return Factorization.from_weights(tree, named, join=joins, leaves=model.network.named_leaves)
    path = [target]
    while path[0] != top:
        path.insert(0, tree.position(tree.parent(tree.nodes[path[0]])))
    links = {i: list(below) for i, below in enumerate(tree.links) if below}
    kinds = {tree.position(v): join for v, join in joins.items()}
    weights = {tree.position(v): w for v, w in named.items()}
    for i in path:
        if kinds[i] == "diagonal":
            weights[i], kinds[i] = full_weight(weights[i], len(links[i])), "full"
    while path[0] != target and len(links[path[0]]) == 1:  # a vector over the bond below it
        vector = weights.pop(path.pop(0))
        weights[path[0]] = weights[path[0]] @ vector
    above: list[int] = []  # the node that stands for all that was above
    for i, towards in pairwise(path):
        axis = links[i].index(towards)
        weights[i] = weights[i].movedim(axis, -1)
        links[i] = [c for c in links[i] if c != towards] + above
        above = [i]
        if i == path[0] and len(links[i]) == 1:
            above = links.pop(i)
            weights[above[0]] = product(weights.get(above[0]), weights.pop(i))
    links[target] += above
    modes = {tree.position(mode): mode for mode in tree.leaves}
    return assemble(target, links, weights, kinds, modes)[0]


def full_joins(model: Factorization) -> Factorization:
    """Make all joins full, exactly; a diagonal join of bond R gets R^children entries, SizeError if too many.

    For wide joins ``truncate(model)`` does the same on bonds that are no larger than needed.
    """
    weights = weights_of(model, ones=False)
    for node, join in model.network.named_joins.items():
        if join == "diagonal":
            weights[node] = full_weight(weights[node], len(model.tree.children(node)))
    return Factorization.from_weights(model.tree, weights, join="full", leaves=model.network.named_leaves)


def bare_leaves(model: Factorization, modes: Iterable[int] | None = None) -> Factorization:
    """Multiply weights of leaves into the full joins above them, exactly; these leaves are bare then.

    Args:
        model: A factorization; leaves under diagonal joins keep their weights.
        modes: Which leaves; if left out those where that saves numbers, one after another.

    Raises:
        TreeError, OptionError: A mode that there is not, or whose leaf is under a diagonal join.
        SizeError: A weight would not fit into memory.
    """
    weights, leaves = weights_of(model, ones=False), model.network.named_leaves
    tree, joins = model.tree, model.network.named_joins
    asked = None if modes is None else set(modes)
    for mode in asked or ():
        if tree.children(mode) or joins[tree.parent(mode)] == "diagonal":
            message = f"bare_leaves: {mode!r} is no leaf under a full join; see full_joins."
            raise OptionError(message, argument="modes")
    for mode in tree.leaves:
        parent = tree.parent(mode)
        if leaves[mode] == "bare" or joins[parent] == "diagonal" or (asked is not None and mode not in asked):
            continue
        axis, (size, rank) = tree.children(parent).index(mode), weights[mode].shape
        shape = [size if k == axis else n for k, n in enumerate(weights[parent].shape)]
        if asked is None and math.prod(shape) >= weights[parent].numel() + size * rank:
            continue
        must_fit(f"bare_leaves: the weight of {parent!r}", [shape], model.dtype, model.device, copies=2)
        turned = torch.tensordot(weights[parent], weights.pop(mode), ([axis], [1]))
        weights[parent], leaves[mode] = turned.movedim(-1, axis), "bare"
    return Factorization.from_weights(tree, weights, join=joins, leaves=leaves)


def diagonal_joins(model: Factorization) -> Factorization:
    """Make all joins diagonal, exactly; siblings get the product of their bonds as their common one.

    Bare leaves of full joins get weights of zeros and ones. SizeError if that would not fit into memory.
    """
    weights, tree, leaves = weights_of(model), model.tree, dict[Any, str](model.network.named_leaves)
    full = {v: tree.children(v) for v, join in model.network.named_joins.items() if join == "full"}
    changed = {c for children in full.values() for c in children if leaves.get(c) == "bare"}
    weights |= {c: w for c, w in weights_of(model, bare=False).items() if c in changed}
    wider = {v: w.flatten(0, len(full[v]) - 1) if v in full else w for v, w in weights.items()}
    for node, children in full.items():
        common = math.prod(weights[c].shape[-1] for c in children)
        shapes = [(*wider[c].shape[:-1], common) for c in children]
        must_fit(f"diagonal_joins: the weights below {node!r}", shapes, model.dtype, model.device, copies=2)
        bonds = [torch.arange(weights[c].shape[-1], device=model.device) for c in children]
        combined = torch.cartesian_prod(*bonds).reshape(-1, len(children))
        for child, columns in zip(children, combined.unbind(1), strict=True):
            wider[child] = wider[child].index_select(-1, columns)
    leaves |= dict.fromkeys(changed, "weights")
    return Factorization.from_weights(tree, wider, join="diagonal", leaves=leaves)
