"""The factorization's definition as plain Python loops; shares no code with tnreg.

Diagonal joins: W^(v, r)[..] = sum over r' of W_v[r', r] * product over children c of W^(c, r')[..].
Full joins: W^(v, r)[..] = sum over r_1..r_k of B_v[r_1, .., r_k, r] * product of W^(c_i, r_i)[..].
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np


def dense(children: dict[Any, tuple], root: Any, weights: dict[Any, Any], diagonal: set, sizes: tuple):
    """The tensor entry by entry.

    Args:
        children: Node -> its children; leaves are missing or have none.
        root: The root.
        weights: Node -> numpy weight; the root may be missing (ones).
        diagonal: Nodes with a diagonal join.
        sizes: Mode sizes.
    """
    complex_ = any(np.iscomplexobj(w) for w in weights.values())
    out = np.zeros(sizes, dtype=complex if complex_ else float)
    known: dict[Any, Any] = {}  # values do not depend on modes that are not below a node
    for index in itertools.product(*(range(n) for n in sizes)):
        out[index] = _value(root, None, index, children, root, weights, diagonal, known)
    return out


def _below(node, children):
    """The modes below a node."""
    return [m for c in children[node] for m in _below(c, children)] if children.get(node) else [node]


def _value(node, above, index, children, root, weights, diagonal, known):
    """W^(node, above) at the multi-index, by recursion."""
    key = node, above, *(index[m] for m in _below(node, children))
    if key not in known:
        known[key] = _compute(node, above, index, children, root, weights, diagonal, known)
    return known[key]


def _compute(node, above, index, children, root, weights, diagonal, known):
    weight = weights.get(node)
    if not children.get(node):
        return weight[index[node], above]
    below = children[node]
    tail = () if node == root else (above,)
    if node in diagonal:
        if weight is not None:
            width = weight.shape[0]
        else:
            child = weights[below[0]]
            width = child.shape[-1]
        choices = [(r,) * len(below) for r in range(width)]
    else:
        choices = list(itertools.product(*(range(n) for n in weight.shape[: len(below)])))
    total = 0
    for chosen in choices:
        if weight is None:
            term = 1
        else:
            term = weight[(chosen[0], *tail)] if node in diagonal else weight[(*chosen, *tail)]
        for child, r in zip(below, chosen, strict=True):
            term = term * _value(child, r, index, children, root, weights, diagonal, known)
        total = total + term
    return total


def of_model(model):
    """``dense`` with everything read from a tnreg model's public attributes."""
    tree = model.tree
    children = {v: tree.children(v) for v in tree.nodes}
    weights = {v: w.detach().numpy() for v, w in model.weights.items()}
    weights |= {n: np.eye(model.sizes[n]) for n in tree.leaves if n not in weights}  # bare leaves
    joins = dict(zip(tree.nodes, model.network.joins, strict=True))
    diagonal = {v for v, kind in joins.items() if kind == "diagonal"}
    return dense(children, tree.root, weights, diagonal, model.sizes)
