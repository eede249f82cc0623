"""Factorizations taken apart and put together again: detached weights, and new models with copies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import DataError, OptionError
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.memory import must_fit
from tnreg.networks.network import Network
from tnreg.tensors.arrays import largest_of, times_power_of_two
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree


def check_factorization(model: Any, argument: str = "model") -> None:
    """Raise an error for anything but a factorization."""
    if not isinstance(model, Factorization):
        raise OptionError(f"expected a Factorization, found {type(model).__name__}.", argument=argument)


def weights_of(model: Factorization, *, ones: bool = True, bare: bool = True) -> dict[Node, Tensor]:
    """Return detached weights.

    With ``ones=False`` a root of ones has its weight as well, with ``bare=False`` bare leaves have theirs.
    """
    check_factorization(model)
    weights = {node: w.detach() for node, w in model.weights.items()}
    if model.network.bare and not bare:
        dtype, device = model.dtype, model.device
        sizes = {model.tree.nodes[i]: model.network.bonds[i] for i in model.network.bare}
        must_fit("identities for bare leaves", [(n, n) for n in sizes.values()], dtype, device)
        eyes = {mode: torch.eye(size, dtype=dtype, device=device) for mode, size in sizes.items()}
        weights = {v: eyes[v] if v in eyes else weights[v] for v in model.tree.nodes if v in weights | eyes}
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
    """Make a factorization of the numbered nodes that hang below an interior one, the root.

    All arguments are by number: ``links`` are the children and ``joins`` the joins of interior nodes,
    ``modes`` those of leaves. Leaves without a weight are bare, a diagonal root without one is fixed to ones.
    Interior nodes get their usual names; the numbers of all nodes in the order of ``tree.nodes`` are returned
    as well.
    """
    order, waiting = list[int](), [root]
    while waiting:  # without recursion: a tensor train of a thousand modes is a thousand nodes deep
        order.append(waiting.pop())
        waiting.extend(links.get(order[-1], ()))
    order.reverse()
    nested: dict[int, Any] = {}
    for i in order:
        nested[i] = [nested.pop(c) for c in links[i]] if links.get(i) else modes[i]
    tree = ModeTree(nested[root])
    numbers = dict(zip(tree.nodes, order, strict=True))
    model = Factorization.from_weights(
        tree,
        {node: weights[i] for node, i in numbers.items() if i in weights},
        join={node: joins[numbers[node]] for node in tree.interior},
        leaves={mode: "weights" if numbers[mode] in weights else "bare" for mode in tree.leaves},
    )
    return model, order


def hold(net: Network, weights: Mapping[Node, Tensor]) -> Factorization:
    """Make a factorization of weights that have the shapes of a network and are nobody else's.

    Raises:
        DataError: NaN or infinite weights.
    """
    nodes, stacks = net.tree.nodes, list[Tensor]()
    dtype = reduce(torch.promote_types, {w.dtype for w in weights.values()})
    for level in net.stacks:
        own = [weights[nodes[i]].to(dtype) for i in level.positions]
        stacks.append(torch.stack(own) if len(own) > 1 else own[0].contiguous().unsqueeze(0))
    # sums are finite, unless something is wrong or near the end of the range
    finite = torch.stack([stack.sum() for stack in stacks]).isfinite().all()
    if not (finite or all(largest_of(stack).isfinite() for stack in stacks)):
        raise DataError(f"the result has NaN or infinite entries, or too large ones for {stacks[0].dtype}.")
    return Factorization.holding(net, stacks)


def contract_leaves(model: Factorization, vectors: Mapping[int, Tensor]) -> Factorization | Tensor:
    """Contract modes with checked vectors; the others are renumbered from 0, in their order.

    A node that is left with one child is removed, with its weight multiplied into that child. If no mode
    is left the result is a 0-dimensional tensor.
    """
    tree, joins = model.tree, model.network.named_joins
    dtype = reduce(torch.promote_types, (v.dtype for v in vectors.values()), model.dtype)
    weights = {tree.position(v): weight.to(dtype) for v, weight in weights_of(model, ones=False).items()}
    scale = 0  # the result is 2**scale times what is computed

    def moderate(x: Tensor) -> Tensor:
        nonlocal scale
        x, log2 = split(x)
        scale += log2
        return x

    contracted = set[int]()  # what is left of these is a vector over the bond above, as their weight
    stand_in: dict[int, int] = {}  # a node that was removed -> the child in its place
    links: dict[int, list[int]] = {}
    top = len(tree.nodes) - 1
    for i, (node, below) in enumerate(zip(tree.nodes, tree.links, strict=True)):
        if not below:
            if node in vectors:
                vector = moderate(vectors[node].to(dtype))  # type: ignore[index]
                weights[i] = moderate(vector @ moderate(weights[i])) if i in weights else vector
                contracted.add(i)
            continue
        for axis, c in reversed(list(enumerate(below))):
            if c in contracted:
                weights[i] = moderate(_times_vector(moderate(weights[i]), joins[node], axis, weights[c]))
        if joins[node] == "diagonal" and contracted.issuperset(below):
            weights[i] = moderate(weights[i].sum(0))
        links[i] = [stand_in.get(c, c) for c in below if c not in contracted]
        if not links[i]:
            contracted.add(i)
        # a root above nothing but a leaf stays
        elif len(links[i]) == 1 < len(below) and (i != top or links.get(links[i][0])):
            child = stand_in[i] = links[i][0]
            leaf = moderate(weights[child]) if child in weights else None
            weights[child] = moderate(product(leaf, moderate(weights[i])))
    if top in contracted:
        value: Tensor = times_power_of_two(weights[top], scale)
        return value
    modes = [mode for mode in tree.leaves if mode not in vectors]
    kept = {i: w for i, w in weights.items() if i not in contracted and i not in stand_in}
    return assemble(
        stand_in.get(top, top),
        links,
        spread(kept, scale),
        {tree.position(node): join for node, join in joins.items()},
        {tree.position(mode): k for k, mode in enumerate(modes)},
    )[0]


def _times_vector(weight: Tensor, join: str, axis: int, vector: Tensor) -> Tensor:
    """Multiply a node's weight by what is left of one of its children."""
    if join == "full":
        weight = torch.tensordot(vector, weight, ([0], [axis]))
        return weight
    return vector.reshape(-1, *[1] * (weight.ndim - 1)) * weight


def split(x: Tensor) -> tuple[Tensor, int]:
    """Return ``(y, log2)``, x as ``y * 2**log2``: where x is far from 1, y is near, else it is x itself.

    Products of two such y stay in the range of the dtype.
    """
    log2 = math.frexp(float(largest_of(x)))[1]
    if abs(log2) <= math.log2(torch.finfo(x.dtype).max) / 3:
        return x, 0
    return times_power_of_two(x, -log2), log2


def spread(weights: Mapping[Any, Tensor], log2: int) -> dict[Any, Tensor]:
    """Multiply a tensor by a power of two in equal parts, so that no weight alone leaves the range.

    Weights stay as they are for ``log2 = 0``; otherwise what their own sizes are is shared as well.
    """
    if log2 == 0:
        return dict(weights)
    own = {key: math.frexp(float(largest_of(w)))[1] for key, w in weights.items()}
    sample = next(iter(weights.values()))
    must_fit("weights on another scale", [w.shape for w in weights.values()], sample.dtype, sample.device)
    each, rest = divmod(log2 + sum(own.values()), len(own))
    return {
        key: times_power_of_two(w, each + (k < rest) - own[key]) for k, (key, w) in enumerate(weights.items())
    }


def product(one: Tensor | None, other: Tensor) -> Tensor:
    """Multiply the last axis of a weight by a matrix or vector; SizeError if the result would not fit.

    A bare leaf's weight, the identity, is ``None``.
    """
    if one is None:
        return other
    must_fit("a product of weights", [(*one.shape[:-1], *other.shape[1:])], one.dtype, one.device, copies=2)
    return one @ other


def identity(size: int, sample: Tensor) -> Tensor:
    """Return an identity in the dtype of another tensor; SizeError if it would not fit."""
    must_fit("an identity for a leaf", [(size, size)], sample.dtype, sample.device, copies=2)
    return torch.eye(size, dtype=sample.dtype, device=sample.device)


def full_weight(weight: Tensor, children: int) -> Tensor:
    """Return a diagonal weight ``(R, ...)`` as that of a full join, ``(R, .., R, ...)``.

    Raises:
        SizeError: It would not fit into memory, or needs more than 64 axes.
    """
    shape = [len(weight)] * children + list(weight.shape[1:])
    must_fit("a full join: its weight", [shape], weight.dtype, weight.device)
    full = weight.new_zeros(shape)
    full[(torch.arange(len(weight), device=weight.device),) * children] = weight
    return full
