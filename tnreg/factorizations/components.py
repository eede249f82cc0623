"""Local components of a factorization: balanced, kept with the others zeroed, or dropped from the bonds."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tnreg.errors import OptionError, check_integer, check_number
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.memory import must_fit
from tnreg.trees.reading import Node


@torch.no_grad()
def balance_(model: Factorization, *, rtol: float | None = None, sweeps: int = 10_000) -> Factorization:
    """Rescale the weights in place until the vectors of every local component have equal norms.

    Sweeps ``w <- w * sigma^(1/K) / |w|`` over all local components, up the tree and down in turn, in
    double precision; none of them changes the tensor. A component of norm zero becomes zero
    altogether, which changes nothing either. Cost: some hundred sweeps for small trees, thousands for
    long chains and trees of a hundred modes (half a minute for 64 modes on a CPU).

    Args:
        model: A factorization with at least one diagonal join; full joins are left as they are. It is
            returned.
        rtol: Largest relative change of a norm in the last sweep; by default 1e-12, or the eps of the
            model's dtype if that is larger.
        sweeps: Give up after so many.

    Raises:
        OptionError: It has no diagonal join, or ``sweeps`` were not enough; the model is as it was.
    """
    net, tree = model.network, model.tree
    if "diagonal" not in net.joins:
        message = "balance_ needs a diagonal join; this factorization has full joins only."
        raise OptionError(message, argument="model")
    rtol = (
        max(1e-12, torch.finfo(model.dtype).eps) if rtol is None else check_number(rtol, "balance_: rtol", 0)
    )
    sweeps = check_integer(sweeps, 1, "balance_: sweeps")
    wide = torch.complex128 if model.dtype.is_complex else torch.float64
    must_fit("balance_: copies of the weights", [s.shape for s in model.stacks], wide, model.device, copies=2)
    weights = [w.to(wide, copy=True) for w in model.weights.values()]
    joins = [i for i, kind in enumerate(net.joins) if kind == "diagonal"]
    change = 0.0
    for sweep in range(sweeps):
        change = 0.0
        for i in joins if sweep % 2 == 0 else reversed(joins):
            vectors = [weights[c].flatten(0, -2) for c in tree.links[i]]
            if i < len(weights):
                vectors.append(weights[i].reshape(len(weights[i]), -1).mT)
            factors, moved = _factors(vectors)
            change = max(change, moved)
            for c, factor in zip(tree.links[i], factors, strict=False):
                weights[c] *= factor
            if i < len(weights):
                weights[i] *= factors[-1] if weights[i].ndim == 1 else factors[-1].unsqueeze(1)
        if change <= rtol:
            model.load_weights(dict(zip(model.weights, weights, strict=True)))
            return model
    raise OptionError(
        f"not balanced to rtol={rtol:.3g} after {sweeps} sweeps: norms still change by {change:.3g}.\n"
        "  allow more sweeps, or a larger rtol; the model is as it was",
        argument="sweeps",
    )


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
        for stack, slot in (slots[c] for c in tree.links[tree.position(node)]):
            smaller.stacks[stack][slot][..., dropped] *= 0  # NaN stays NaN
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
    weights = {node: w.detach() for node, w in model.weights.items()}
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
        weights |= {v: weights[v][..., kept] for v in children}
        if node in weights:
            weights[node] = weights[node][kept]
    smaller = Factorization.from_weights(model.tree, weights, join=model.network.named_joins)
    smaller.error_bound = bound
    return smaller


def _factors(vectors: list[Tensor]) -> tuple[Tensor, float]:
    """Return factors ``(K, R)`` for the columns of the matrices, and the largest relative change."""
    largest = torch.stack([v.abs().amax(0) for v in vectors])
    alive = (largest > 0).all(0)
    safe = torch.where(largest > 0, largest, 1)
    # logarithms: the product of many norms may leave the range of the dtype
    logs = torch.stack([torch.linalg.vector_norm(v / m, dim=0) for v, m in zip(vectors, safe, strict=True)])
    logs = torch.where(alive, torch.where(logs > 0, logs, 1).log() + safe.log(), 0)
    shift = logs.mean(0) - logs
    moved = float(shift.abs().max()) if alive.any() else 0.0
    dead = bool((~alive & (largest > 0).any(0)).any())
    return torch.where(alive, shift.exp(), 0), max(moved, float(dead))


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
