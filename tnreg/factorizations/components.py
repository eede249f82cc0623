"""Local components of a factorization: balanced, kept with the others zeroed, or dropped from the bonds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import DataError, OptionError, check_integer, check_number
from tnreg.factorizations.assembly import identity, weights_of
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.memory import must_fit
from tnreg.trees.reading import Node


@torch.no_grad()
def balance_(model: Factorization, *, rtol: float | None = None, sweeps: int = 1000) -> Factorization:
    """Rescale the weights in place until the vectors of every local component have equal norms.

    Vectors are multiplied by scales, those of a component by one in product, so that the tensor stays what
    it is. Only one choice of scales makes the norms equal; it has the least sum of squared weights. Newton's
    method finds it, in logarithms and solved along the tree, in double precision on the CPU. A component of
    norm zero becomes zero altogether, which changes nothing either. Cost: some five to ten sweeps up and
    down the tree, ``O(R**3)`` at every node.

    Args:
        model: A factorization with at least one diagonal join; full joins are left as they are. It is
            returned.
        rtol: Largest relative difference between a norm and the geometric mean of its component;
            by default 1e-12.
        sweeps: Give up after so many.

    Raises:
        OptionError: It has no diagonal join, or ``sweeps`` were not enough; the model is as it was.
        DataError: NaN or infinite weights.
    """
    net = model.network
    if "diagonal" not in net.joins:
        message = "balance_ needs a diagonal join; this factorization has full joins only."
        raise OptionError(message, argument="model")
    rtol = 1e-12 if rtol is None else check_number(rtol, "balance_: rtol", 0)
    sweeps = check_integer(sweeps, 1, "balance_: sweeps")
    wide = torch.complex128 if model.dtype.is_complex else torch.float64
    must_fit("balance_: copies of the weights", [s.shape for s in model.stacks], wide, model.device, copies=2)
    weights = {i: w.to(wide) for i, w in zip(net.weighted, model.weights.values(), strict=True)}
    if not all(w.isfinite().all() for w in weights.values()):
        raise DataError("balance_: the model has NaN or infinite weights.", argument="model")
    links = [[c for c in below if c in weights] for below in net.tree.links]
    joins = {i: below for i, below in enumerate(links) if net.joins[i] == "diagonal"}
    squares = _log_squares(joins, weights)
    logs, sweep, size = squares, 0, 1.0
    norms, apart = _log_norms(joins, logs)
    while apart > rtol and sweep < sweeps and size > 1e-6:
        moves, start, before = _newton_step(joins, logs, norms), logs, apart
        sweep, size = sweep + 1, 2.0
        while not apart < (1 - size / 10) * before and size > 1e-6:
            size /= 2
            logs = {i: x + size * moves[i] for i, x in start.items()}
            norms, apart = _log_norms(joins, logs)
    if apart > rtol:
        raise OptionError(
            f"not balanced to rtol={rtol:.3g} after {sweep} sweeps: norms are still apart by {apart:.3g}.\n"
            "  allow more sweeps, or a larger rtol; the model is as it was",
            argument="sweeps",
        )
    for i, log in logs.items():
        # the root of the factor, which itself may overflow; zeros stay zeros
        root = ((log - squares[i]) / 4).nan_to_num(-math.inf).exp().to(model.device)
        root = root[:, 0] if weights[i].ndim == 1 else root
        weights[i] = weights[i] * root * root
    model.load_weights(dict(zip(model.weights, weights.values(), strict=True)))
    return model


@torch.no_grad()
def keep_components(model: Factorization, ranks: int | Mapping[Node, int]) -> Factorization:
    """Copy a model, keeping the largest local components of every diagonal join and zeroing the others.

    ``ranks`` is how many to keep, for all joins or ``{node: number}`` (nodes left out keep all). The copy
    has the same shapes; the rank of its matricization at a child of v is at most the number kept at v.
    """
    must_fit("a copy of the model", [s.shape for s in model.stacks], model.dtype, model.device)
    smaller = Factorization.holding(model.network, [stack.detach().clone() for stack in model.stacks])
    slots, tree = model.network.slots, model.tree
    for node, dropped in _dropped(model, ranks).items():
        i = tree.position(node)
        weighted = [slots[c] for c in tree.links[i] if c in slots]
        for stack, slot in weighted:
            smaller.stacks[stack][slot][..., dropped] *= 0  # NaN stays NaN
        if not weighted:  # bare leaves alone
            stack, slot = slots[i]
            smaller.stacks[stack][slot][dropped] *= 0
    return smaller


@torch.no_grad()
def distance_bound(model: Factorization, ranks: int | Mapping[Node, int]) -> Tensor:
    """Bound on ``|end tensor - end tensor of keep_components(model, ranks)|`` (Frobenius norm).

    ``sum_v B^(T - K_v) sum of the dropped sigma at v``, with T the number of weights, K_v that of the
    vectors of a component at v, and ``B = max |W_v|``: few large local components mean a tensor near
    low hierarchical rank. Infinite where it leaves the range of the dtype.
    """
    weights, norms = model.weights, model.component_norms()
    largest = torch.stack([torch.linalg.vector_norm(w) for w in weights.values()]).max()
    total = 0 * largest
    for node, dropped in _dropped(model, ranks).items():
        part = norms[node].prod(0)[dropped].sum()
        total = total + largest ** (len(weights) - len(norms[node])) * part
    return total


@torch.no_grad()
def drop_components(
    model: Factorization, ranks: int | Mapping[Node, int] | None = None, *, below: float | None = None
) -> Factorization:
    """Return a smaller factorization without the smallest local components; joins stay diagonal.

    Args:
        model: A factorization with diagonal joins.
        ranks: How many to keep, for all joins or ``{node: number}`` (nodes left out keep all).
        below: In place of ``ranks``: drop what is below this share of the largest at its node.

    Returns:
        A factorization with smaller bonds; at least one component stays at every node. Its
        ``error_bound`` is ``sum_v sum of the dropped sigma at v`` times the norms of all weights that are
        no part of them (at most ``distance_bound``): far above the error for trees of many nodes.
        ``algebra.subtract(model, smaller).norm()`` is the error itself.

    Raises:
        OptionError: Both or none of the two, ``below`` outside ``[0, 1)``, or no diagonal join.
    """
    if not isinstance(model, Factorization):
        message = f"drop_components takes a Factorization, found {type(model).__name__}; "
        raise OptionError(message + "of a network: from_cnn(net).", argument="model")
    if (ranks is None) == (below is None):
        raise OptionError("drop_components: give either ranks or below.", argument="ranks")
    logs = _component_logs(model)
    if not logs:
        raise OptionError("drop_components: full joins have no local components.", argument="model")
    if below is not None:
        below = check_number(below, "below", 0, 1)
        edge = math.log(below) if below > 0 else -math.inf
        ranks = {node: int((s >= edge + s.max()).sum()) for node, s in logs.items()}
    weights, leaves = weights_of(model), model.network.named_leaves
    sizes = {node: _log_norm(w) for node, w in weights.items()}
    bound = 0.0
    for node, dropped in _dropped(model, ranks).items():  # type: ignore[arg-type]
        if len(dropped) == len(logs[node]):  # a node needs one
            dropped = dropped[1:]
        if not len(dropped):
            continue
        children = model.tree.children(node)
        rest = sum(size for v, size in sizes.items() if v != node and v not in children)
        bound += (rest + logs[node][dropped].logsumexp(0)).exp().item()
        kept = torch.ones(len(logs[node]), dtype=torch.bool, device=model.device)
        kept[dropped] = False
        for v in children:
            if v not in weights:  # a bare leaf
                weights[v], leaves[v] = identity(len(kept), next(iter(weights.values()))), "weights"  # type: ignore[index]
            weights[v] = weights[v][..., kept]
        if node in weights:
            weights[node] = weights[node][kept]
    joins = model.network.named_joins
    smaller = Factorization.from_weights(model.tree, weights, join=joins, leaves=leaves)
    smaller.error_bound = bound
    return smaller


def _log_squares(joins: dict[int, list[int]], weights: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return logarithms ``(rows, columns)`` of squared weights, without the components of norm zero.

    Rows belong to the components of the node's own join, columns to those of the join above. The squares are
    summed over what belongs to none.
    """
    tied = {c for children in joins.values() for c in children}
    logs: dict[int, Tensor] = {}
    for i, w in weights.items():
        if i in joins or i in tied:
            log = 2 * w.abs().log().cpu()
            log = log.reshape(len(w), -1) if i in joins else log.flatten(0, -2).logsumexp(0, keepdim=True)
            logs[i] = log if i in tied else log.logsumexp(1, keepdim=True)
    found = True
    while found:  # a component that goes may take others with it, above and below
        found = False
        for i in (*joins, *reversed(joins)):
            zero = _log_norms_at(i, joins[i], logs).isneginf()
            dead = zero.any(0) & ~zero.all(0)
            if dead.any():
                found = True
                for c in joins[i]:
                    logs[c][:, dead] = -math.inf
                if i in logs:
                    logs[i][dead] = -math.inf
    return logs


def _log_norms_at(i: int, children: list[int], logs: Mapping[int, Tensor]) -> Tensor:
    """Return logarithms ``(K, R)`` of the squared norms of the vectors of a join's components."""
    own = [logs[i].logsumexp(1)] if i in logs else []
    return torch.stack([*(logs[c].logsumexp(0) for c in children), *own])


def _log_norms(joins: dict[int, list[int]], logs: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], float]:
    """Return those of all joins, and how far a norm is from the mean of its component at most."""
    norms = {i: _log_norms_at(i, c, logs).nan_to_num(neginf=0.0) for i, c in joins.items()}
    return norms, max(float((x - x.mean(0)).abs().max()) / 2 for x in norms.values())


def _newton_step(
    joins: dict[int, list[int]], logs: Mapping[int, Tensor], norms: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """Return what to add to ``logs`` to make all norms of a component equal, to first order.

    If rows move by x and columns by y, norms of rows move by ``x + A y`` and those of columns by ``y + B x``,
    with shares of the entries in these norms as A and B. At a join x and the children's y sum to zero, and
    all norms end at t above their mean. From the leaves up, ``y = matrix t - vector`` for every child;
    a number as a matrix is that multiple of the identity.
    """

    def plus(x: Any, number: int) -> Any:
        return x + number * torch.eye(len(x), dtype=x.dtype) if isinstance(x, Tensor) else x + number

    def times(x: Any, y: Tensor) -> Tensor:
        return x @ y if isinstance(x, Tensor) else x * y

    apart = {i: x - x.mean(0) for i, x in norms.items()}
    matrix: dict[int, Any] = {c: 1.0 for below in joins.values() for c in below}
    vector = {c: x for i, below in joins.items() for c, x in zip(below, apart[i], strict=False)}
    column_norms = {c: x for i, below in joins.items() for c, x in zip(below, norms[i], strict=False)}
    solved: dict[int, tuple[Any, Tensor, Any]] = {}
    for i, below in joins.items():
        dense = [matrix[c] for c in below if isinstance(matrix[c], Tensor)]
        total = plus(plus(sum(dense), len(below) - len(dense)), i in logs)
        inverse = torch.linalg.inv(total) if dense else 1 / total
        rest, shares = sum((vector[c] for c in below), torch.zeros_like(norms[i][0])), None
        if i in logs:
            rest = rest + apart[i][-1]
        if i in matrix:
            shares = (logs[i] - norms[i][-1].unsqueeze(1)).exp()
            back = (logs[i] - column_norms[i]).exp().mT
            matrix[i] = torch.linalg.inv(plus(back @ (times(inverse, shares) - shares), 1))
            vector[i] = matrix[i] @ (vector[i] + back @ (times(inverse, rest) - apart[i][-1]))
        solved[i] = inverse, rest, shares
    columns, moves = dict[int, Tensor](), dict[int, Tensor]()
    for i, below in reversed(joins.items()):
        inverse, rest, shares = solved[i]
        t = times(inverse, rest if shares is None else rest + shares @ columns[i])
        for c in below:
            columns[c] = times(matrix[c], t) - vector[c]
            moves[c] = columns[c].unsqueeze(0)
        if i in logs:
            moves[i] = moves.get(i, 0) - sum((columns[c] for c in below), torch.zeros_like(t)).unsqueeze(1)
    return moves


def _component_logs(model: Factorization) -> dict[Node, Tensor]:
    """Return logarithms of the norms of all local components: the norms may leave the range of floats."""
    return {node: part.double().log().sum(0) for node, part in model.component_norms().items()}


def _log_norm(weight: Tensor) -> float:
    largest = weight.abs().max().double().item()
    norm = torch.linalg.vector_norm(weight / largest).item() if largest else 0.0
    return math.log(norm) + math.log(largest) if norm else -math.inf


def _dropped(model: Factorization, ranks: int | Mapping[Node, int]) -> dict[Node, Tensor]:
    """Return ``{diagonal join: numbers of the components beyond the largest}``."""
    logs = _component_logs(model)
    if not isinstance(ranks, Mapping):
        ranks = dict.fromkeys(logs, check_integer(ranks, 0, "ranks"))
    dropped: dict[Node, Tensor] = {}
    for node, count in ranks.items():
        if node not in logs:
            model.tree.position(node)
            message = f"node {node!r} has no diagonal join, so no local components."
            raise OptionError(message, argument="ranks")
        order = logs[node].argsort(descending=True)
        dropped[node] = order[check_integer(count, 0, f"the rank at node {node!r}") :]
    return dropped
