"""Contraction of a network: plans by the tree and by opt_einsum, the cheaper kept, then executed.

A plan is a printable value that knows nothing of the numbers. Three questions can be asked of a
network:

- the dense tensor: every node holds a matrix (multi-indices of the modes below it, bond above it);
- a batch of rank-one inputs: every node holds a matrix (samples, bond above it);
- entries at given multi-indices: by the dense tensor and indexing; each subtree only at the
  sub-indices that occur below it (*distinct*); or sample by sample.

The tree's own way is the ``schedule``; the other is one einsum along a path of opt_einsum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from opt_einsum.parser import get_symbol
from torch import Tensor

from tnreg.errors import DataError, OptionError, SizeError, check_integer
from tnreg.machine.memory import NEVER_MIND, available, does_not_fit, limit_of, written
from tnreg.networks.einsum import Einsum, along, einsum, find_path
from tnreg.networks.network import Network
from tnreg.networks.schedule import Join, cost, distinct_rows, run, schedule
from tnreg.tensors.arrays import check_index

# Moving one number through memory costs about as much time as this many flops of a matrix product.
# Measured on two CPU cores (8⁴ entries, width 512): it ranks dense, distinct and per-sample as timed.
_FLOPS_PER_MOVE = 32

# Networks of at most this many tensors get an exhaustive path search (some milliseconds, once).
_EXHAUSTIVE = 20

# Networks of more tensors than this are searched once for batches of similar size, not for each.
_LARGE = 128

_ADVICE = {
    "dense": "ask for model.entries(index), model(features), model.norm() or spectra(model) instead",
    "batch": "give fewer samples at a time",
    "entries": "give fewer entries at a time",
}

# Entries beyond which a dense tensor is not even considered (8 TB in float64).
DENSE_LIMIT = 2**40


@dataclass(frozen=True, eq=False)
class Plan:
    """How a network will be contracted, chosen by counted cost; print it to read it.

    Attributes:
        network: The network.
        kind: ``"dense"``, ``"batch"`` or ``"entries"``.
        route: What was chosen: ``"tree"`` or ``"opt_einsum"``; for entries ``"dense"``,
            ``"distinct"`` or ``"per-sample"``.
        flops: Counted flops.
        largest: Entries of the largest intermediate or result.
        held: Entries of all intermediates and the result together, which gradients need; features and
            weights not counted.
        peak: Entries of those that are there at the same time without gradients.
        candidates: Route -> counted cost of everything that was considered: flops for ``dense`` and
            ``batch``; for entries flops plus 32 for every number moved, as gathering is bound by
            memory and not by arithmetic.
        batch: Samples of a batch or of entries; ``None`` for the dense tensor.
        joins: The batched calls of the tree schedule, leaves first; empty for opt_einsum.
        whole: The einsum of the whole network; ``None`` for the tree schedule.
        take: For entries, where each one is in the result of the schedule; ``None`` if in order.
    """

    network: Network
    kind: str
    route: str
    flops: int
    largest: int
    held: int
    peak: int
    candidates: Mapping[str, int]
    batch: int | None = None
    joins: tuple[Join, ...] = field(default=(), repr=False)
    whole: Einsum | None = field(default=None, repr=False)
    take: Tensor | None = field(default=None, repr=False)

    def __str__(self) -> str:
        of = "" if self.batch is None else f" of {self.batch} samples"
        costs = ", ".join(f"{route} {cost:.3g}" for route, cost in self.candidates.items())
        unit = "flops + 32 per number moved" if self.kind == "entries" else "flops"
        lines = [
            f"plan: {self.kind}{of} of an order-{self.network.tree.order} network by {self.route}",
            f"  considered: {costs} ({unit})",
            f"  flops {self.flops:.3g}, largest intermediate {self.largest:.3g} entries, "
            f"{self.held:.3g} in all",
        ]
        names = self.network.tree.nodes
        for join in self.joins:
            nodes = join.level.positions
            who = ", ".join(str(names[i]) for i in nodes[:4])
            who += f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
            if join.einsum is None:
                how = "the weight itself" if join.gathers[0] is None else "rows of the weight"
                lines.append(f"  {who}: {how}, {join.rows} rows")
                continue
            gathered = " at distinct rows" if any(g is not None for g in join.gathers) else ""
            lines.append(
                f"  {who}: {join.einsum.equation}{gathered}, {join.rows} rows, {join.einsum.flops:.3g} flops"
            )
        if self.whole is not None:
            lines += [
                f"  {' x '.join(map(str, taken))}: {equation}"
                for taken, equation, _ in self.whole.steps
            ]
        if self.take is not None:
            lines.append(f"  then {self.take.numel()} entries taken")
        return "\n".join(lines)


def plan(
    model: Any,
    *,
    batch: int | None = None,
    index: Tensor | None = None,
    memory: int | str | None = None,
) -> Plan:
    """Plan the contraction of a factorization: dense tensor, batch of inputs, or entries.

    For the dense tensor and for batches the plan costs no more flops than leaf-to-root and than
    opt_einsum's ``auto``. For entries it is the cheapest of three routes by flops plus 32 for every
    number moved, as gathering is bound by memory: not always the one of fewest flops. Plans for dense
    tensors and batches are cached.

    Args:
        model: A ``Factorization`` or its ``Network``.
        batch: Plan ``model(features)`` for that many samples.
        index: Plan ``model.entries(index)``, shape ``(B, N)``, int64. Pass the plan to
            ``model.entries`` in place of the index to do the planning and checking once.
        memory: Bytes that intermediates and the result may take together, gradients included, or text
            such as ``"4GiB"``: the cheapest route within them. Without it the cheapest route; whether it
            fits is seen when it is carried out, against the memory available.

    Returns:
        The plan; with neither ``batch`` nor ``index``, that of ``model.to_tensor()``.

    Raises:
        ShapeError: ``index`` is not of shape ``(B, N)``.
        DataError: ``index`` is not int64, empty, or out of range.
        SizeError: No route stays within ``memory``.
    """
    limit = limit_of(memory, "plan")
    network = model if isinstance(model, Network) else getattr(model, "network", None)
    if not isinstance(network, Network):
        raise OptionError(
            f"plan: expected a Factorization or its network, found {type(model).__name__}."
        )
    if index is not None:
        if batch is not None:
            raise OptionError("plan: give batch= for inputs or index= for entries, not both.")
        # made to be kept: a plan made in inference mode could not be trained with later
        with torch.inference_mode(False), torch.no_grad():
            plans = _plans_of_entries(network, check_index(index, network.sizes).detach().clone())
    elif batch is not None:
        plans = _plans(network, check_integer(batch, 1, "plan: batch", DataError))
    elif math.prod(network.sizes) > DENSE_LIMIT:
        raise SizeError(
            f"the dense tensor would have about 10^{sum(map(math.log10, network.sizes)):.0f} entries.\n"
            f"  {_ADVICE['dense']}"
        )
    else:
        plans = _plans(network, None)
    if limit is None:
        return plans[0]
    return _within(plans, limit, getattr(model, "dtype", torch.float64).itemsize, "held")


def within_memory(plan: Plan, tensors: Sequence[Tensor], index: Tensor | None = None) -> Plan:
    """A plan that can be carried out where these weights are: the one given, or another route.

    Args:
        plan: The cheapest one.
        tensors: The weights.
        index: The index of a plan for entries, to look for other routes.

    Raises:
        SizeError: No route fits into the memory available; nothing was allocated.
    """
    item = max(t.dtype.itemsize for t in tensors)
    kind = "held" if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) else "peak"
    size = item * getattr(plan, kind)
    if size < NEVER_MIND:
        return plan
    limit = available(tensors[0].device)
    if limit is None or size <= limit:
        return plan
    others: tuple[Plan, ...] = ()
    if plan.kind != "entries":
        others = _plans(plan.network, plan.batch)
    elif index is not None:
        others = _plans_of_entries(plan.network, index)
    return _within((plan, *others), limit, item, kind, str(tensors[0].device))


def contract(
    plan: Plan, stacks: Sequence[Tensor], inputs: Tensor | Sequence[Tensor] = ()
) -> Tensor:
    """Carry out a plan.

    Args:
        plan: From ``plan``.
        stacks: The weights as ``network.stacks`` groups them, each ``(nodes, *shape)``.
        inputs: For a batch: features ``(B, N, D)``, or mode n's features ``(B, D_n)`` for every n.

    Returns:
        The dense tensor (axis n is mode n), or one value per sample ``(B,)``.
    """
    network = plan.network
    if plan.whole is not None:
        parts = [stack.unbind(0) for stack in stacks]
        weights = [parts[s][k] for s, k in (network.slots[p] for p in network.weighted)]
        features = inputs.unbind(1) if isinstance(inputs, Tensor) else inputs
        out = plan.whole([*features, *weights])
    else:
        out = run(network, plan.joins, stacks, inputs)
    if plan.take is not None:
        return out.reshape(-1).index_select(0, plan.take)
    if plan.kind == "dense":
        return out if plan.whole is not None else _ascending(out, network)
    return out.reshape(-1)


def _ascending(rows: Tensor, network: Network) -> Tensor:
    order = network.tree.leaf_order
    shaped = rows.reshape([network.sizes[mode] for mode in order])
    return shaped.permute([order.index(mode) for mode in range(len(order))])


# Planning


@lru_cache(maxsize=256)
def _plans(network: Network, batch: int | None) -> tuple[Plan, ...]:
    """Both plans of the dense tensor or of a batch, the cheaper one first."""
    kind = "dense" if batch is None else "batch"
    joins = schedule(network, batch=batch, features=batch is not None)
    whole = _whole(network, batch)
    flops, largest, moved = cost(network, joins)
    costs = {"tree": flops, "opt_einsum": whole.flops}
    tree = Plan(network, kind, "tree", flops, largest, moved, moved, costs, batch, joins)
    path = _along(network, whole, costs, batch)
    return (tree, path) if cheapest(costs) == "tree" else (path, tree)


def _along(network: Network, whole: Einsum, costs: Mapping[str, int], batch: int | None) -> Plan:
    kind = "dense" if batch is None else "batch"
    return Plan(network, kind, "opt_einsum", whole.flops, whole.largest, whole.moved, whole.peak,
                costs, batch, whole=whole)  # fmt: skip


def _within(
    plans: Sequence[Plan], limit: int, item: int, kind: str, device: str | None = None
) -> Plan:
    """The first plan that stays within a limit in bytes, or one clear error.

    Args:
        plans: The cheapest first.
        limit: Bytes.
        item: Bytes of an entry.
        kind: What counts: ``"held"`` or ``"peak"``.
        device: Where so much is available; ``None`` for a limit of the caller's own.
    """
    first = plans[0]
    for plan in plans:
        if item * getattr(plan, kind) <= limit:
            return plan
    if first.kind != "entries":  # the smallest intermediates, at whatever cost
        small = _along(first.network, _whole(first.network, first.batch, "smallest"),
                       first.candidates, first.batch)  # fmt: skip
        if item * getattr(small, kind) <= limit:
            return small
        plans = (*plans, small)
    needed = item * min(getattr(plan, kind) for plan in plans)
    what = f"{first.batch} samples" if first.batch else f"a tensor of shape {first.network.sizes}"
    advice = _ADVICE[first.kind]
    if first.batch:  # by the route whose cost is in proportion to their number
        each = min(getattr(p, kind) for p in plans if p.kind == "batch" or p.route == "per-sample")
        most = first.batch * limit // (item * each)
        single = f"; one alone needs {written(item * each / first.batch)}"
        advice = f"{advice}, here no more than {most}" if most else f"give more memory{single}"
    note = ", result and intermediates"
    raise does_not_fit(f"{what}: the contraction", needed, limit, advice, note=note, device=device)


def cheapest(costs: Mapping[str, int]) -> str:
    """The route of least cost; the first one of equals."""
    return min(costs, key=lambda route: costs[route])


def _whole(network: Network, batch: int | None, search: str | None = None) -> Einsum:
    """The network as one einsum, by the cheapest path that opt_einsum finds, or by one search.

    Inputs come first, then the weights. What ``auto`` finds depends on the order of the operands, so
    for all but large networks both orders are tried, and for small ones dynamic programming as well.
    """
    order = network.tree.order
    batch_symbol = get_symbol(order + len(network.tree.nodes))  # after the modes and the bonds

    def word(indices: Sequence[int]) -> str:
        return "".join(get_symbol(i) for i in indices)

    terms = [word(network.indices(p)) for p in network.weighted]
    shapes = [network.shape(p) for p in network.weighted]
    output = word(range(order))
    if batch is not None:
        terms = [batch_symbol + get_symbol(mode) for mode in range(order)] + terms
        output = batch_symbol
    equation = f"{','.join(terms)}->{output}"

    def sized(samples: int | None) -> tuple[tuple[int, ...], ...]:
        inputs = [] if samples is None else [(samples, size) for size in network.sizes]
        return (*inputs, *shapes)

    if len(terms) > _LARGE:
        similar = None if batch is None else 1 << (batch - 1).bit_length()
        return along(equation, sized(batch), find_path(equation, sized(similar), "auto"))
    given = sized(batch)
    if search is not None and len(terms) <= _EXHAUSTIVE:
        return einsum(equation, *given, search=search)
    found = [einsum(equation, *given)]
    if batch is not None:
        turned = [*range(order, len(terms)), *range(order)]  # weights first
        other = f"{','.join(terms[i] for i in turned)}->{output}"
        path = find_path(other, tuple(given[i] for i in turned), "auto")
        found.append(along(equation, given, _renumbered(path, turned)))
    if len(terms) <= _EXHAUSTIVE:
        found.append(einsum(equation, *given, search="dp"))
    return min(found, key=lambda path: path.flops)


def _renumbered(
    path: Sequence[Sequence[int]], turned: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """A path over reordered operands as one over the operands in their own order."""
    theirs = list(turned)  # names of what is left, in their order; new results get new names
    ours = list(range(len(turned)))
    out = []
    for count, step in enumerate(path):
        names = [theirs[i] for i in step]
        out.append(tuple(sorted(ours.index(name) for name in names)))
        for left in (theirs, ours):
            for name in names:
                left.remove(name)
            left.append(len(turned) + count)
    return tuple(out)


def _plans_of_entries(network: Network, index: Tensor) -> tuple[Plan, ...]:
    """The plans of all routes, the cheapest first."""
    tree, count = network.tree, index.shape[0]
    columns = index.unbind(1)
    # flops, largest, held, peak, calls, einsum, where each entry is
    routes: dict[
        str, tuple[int, int, int, int, tuple[Join, ...], Einsum | None, Tensor | None]
    ] = {}
    costs: dict[str, int] = {}

    if math.prod(network.sizes) <= DENSE_LIMIT:
        dense = _plans(network, None)[0]
        moved = cost(network, dense.joins)[2] if dense.whole is None else dense.whole.moved
        flat = torch.zeros_like(columns[0])
        # the tree leaves its rows in the order of its leaves, opt_einsum in that of the modes
        for mode in network.tree.leaf_order if dense.whole is None else range(tree.order):
            flat = flat * network.sizes[mode] + columns[mode]
        routes["dense"] = (dense.flops, dense.largest, dense.held + count, dense.peak + count,
                           dense.joins, dense.whole, flat)  # fmt: skip
        costs["dense"] = dense.flops + _FLOPS_PER_MOVE * (moved + count)

    gathers, take = distinct_rows(network, columns)
    joins = schedule(network, gathers=gathers)
    flops, largest, moved = cost(network, joins)
    routes["distinct"] = (flops, largest, moved + count, moved + count, joins, None, take)
    costs["distinct"] = flops + _FLOPS_PER_MOVE * (moved + count)

    rows = {tree.position(mode): (columns[mode],) for mode in tree.leaves}
    joins = schedule(network, batch=count, gathers=rows)
    flops, largest, moved = cost(network, joins)
    routes["per-sample"] = (flops, largest, moved, moved, joins, None, None)
    costs["per-sample"] = flops + _FLOPS_PER_MOVE * moved

    best = cheapest(costs)
    return tuple(
        Plan(network, "entries", route, *routes[route][:4], costs, count, *routes[route][4:])
        for route in sorted(costs, key=lambda route: (route != best, costs[route]))
    )
