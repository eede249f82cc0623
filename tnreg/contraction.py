"""Contraction of a network: plans by the tree and by opt_einsum, the cheaper kept, then executed.

A plan is a printable value that knows nothing of the numbers. Three questions can be asked of a
network:

- the dense tensor: every node holds a matrix (multi-indices of the modes below it, bond above it);
- a batch of rank-one inputs: every node holds a matrix (samples, bond above it);
- entries at given multi-indices: by the dense tensor and indexing; each subtree only at the
  sub-indices that occur below it (*distinct*); or sample by sample.

The tree schedule goes from the leaves to the root and handles equal nodes in one batched call.
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

from tnreg.einsum import Einsum, along, einsum, find_path
from tnreg.errors import DataError, OptionError, ShapeError, SizeError, check_integer
from tnreg.memory import NEVER_MIND, available, does_not_fit, limit_of, written
from tnreg.network import Network

__all__ = ["Plan", "contract", "plan", "within_memory"]

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
class Join:
    """One batched call of the tree schedule: equal nodes, where their operands are, one einsum.

    Attributes:
        nodes: Positions in ``tree.nodes`` of the nodes handled together.
        einsum: Operands are the children's matrices (or the inputs of a leaf), then the weight;
            ``None`` at a leaf without inputs.
        rows: Rows of every node's result.
        weight: Which stack and which slots of it, ``None`` for all; no weight at a root of ones.
        split: The earlier result whose slots are the children in order, if there is one.
        picks: Otherwise, for each child, an earlier result as it is, or its ``(result, slot)`` per
            node.
        gathers: For each child (or the leaf itself) the rows to take, flat over the nodes, or
            ``None``.
    """

    nodes: tuple[int, ...]
    einsum: Einsum | None
    rows: int
    weight: tuple[int, tuple[int, ...] | None] | None
    split: int | None
    picks: tuple[int | tuple[tuple[int, int], ...], ...]
    gathers: tuple[Tensor | None, ...]


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
            who = ", ".join(str(names[i]) for i in join.nodes[:4])
            who += f" and {len(join.nodes) - 4} more" if len(join.nodes) > 4 else ""
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
            plans = _plans_of_entries(network, check_index(network, index).detach().clone())
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
        out = _run_schedule(plan, stacks, inputs)
    if plan.take is not None:
        return out.reshape(-1).index_select(0, plan.take)
    if plan.kind == "dense":
        return out if plan.whole is not None else _ascending(out, network)
    return out.reshape(-1)


def _ascending(rows: Tensor, network: Network) -> Tensor:
    order = network.leaf_order
    shaped = rows.reshape([network.sizes[mode] for mode in order])
    return shaped.permute([order.index(mode) for mode in range(len(order))])


def _run_schedule(
    plan: Plan, stacks: Sequence[Tensor], inputs: Tensor | Sequence[Tensor]
) -> Tensor:
    """Results are ``(nodes, rows, bond)``, or ``(rows, bond)`` where a call is for one node only."""
    network = plan.network
    results: list[Tensor] = []
    slots: dict[int, Sequence[Tensor]] = {}
    parts: dict[int, Sequence[Tensor]] = {}

    def slot_of(result: int, slot: int) -> Tensor:
        if len(plan.joins[result].nodes) == 1:
            return results[result]
        if result not in slots:
            # unbind has one backward for all slots; indexing would add a full-size gradient for each
            slots[result] = results[result].unbind(0)
        return slots[result][slot]

    def pick(place: int | tuple[tuple[int, int], ...]) -> Tensor:
        return (
            results[place] if isinstance(place, int) else _together([slot_of(*at) for at in place])
        )

    def weight_of(join: Join) -> list[Tensor]:
        if join.weight is None:
            return []
        stack, chosen = join.weight
        if chosen is None:
            return [stacks[stack] if len(join.nodes) > 1 else stacks[stack].squeeze(0)]
        if stack not in parts:
            parts[stack] = stacks[stack].unbind(0)
        return [_together([parts[stack][slot] for slot in chosen])]

    for join in plan.joins:
        weight = weight_of(join)
        if not join.picks and join.split is None:  # a leaf
            gather = join.gathers[0]
            if join.einsum is not None:
                modes = [network.tree.nodes[i] for i in join.nodes]
                results.append(join.einsum([_features(inputs, modes), *weight]))  # type: ignore[arg-type]
            else:
                results.append(weight[0] if gather is None else _gather(weight[0], gather))
            continue
        if join.split is not None:
            children = list(_split(results[join.split], len(join.nodes)))
        else:
            children = [pick(place) for place in join.picks]
        operands = [
            child if gather is None else _gather(child, gather)
            for child, gather in zip(children, join.gathers, strict=True)
        ]
        assert join.einsum is not None
        joined = join.einsum([*operands, *weight])
        count = len(join.nodes)
        if joined.ndim != 2 + (count > 1) and join is not plan.joins[-1]:
            # several row axes become one
            joined = joined.reshape(*([count] if count > 1 else []), join.rows, -1)
        results.append(joined)
    return results[-1]


def _together(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts))


def _split(result: Tensor, nodes: int) -> tuple[Tensor, ...]:
    """First children, second children, ... of a result that holds them node by node."""
    if nodes == 1:
        return result.unbind(0)
    return result.reshape(nodes, -1, *result.shape[1:]).unbind(1)


def _features(inputs: Tensor | Sequence[Tensor], modes: list[int]) -> Tensor:
    """Inputs of these modes as ``(modes, B, D)``, without a copy where they are all in order."""
    if not isinstance(inputs, Tensor):
        return _together([inputs[mode] for mode in modes])
    if len(modes) == 1:
        return inputs[:, modes[0]]
    batch = inputs.transpose(0, 1)
    return batch if modes == list(range(len(batch))) else batch[modes]


def _gather(matrices: Tensor, rows: Tensor) -> Tensor:
    """Rows ``(m, r)`` of a matrix, or ``(g, m, r)`` of g matrices by flat numbers in ``0..g*n-1``."""
    if matrices.ndim == 2:
        return matrices.index_select(0, rows)
    count, _, bond = matrices.shape
    return matrices.reshape(-1, bond).index_select(0, rows).reshape(count, -1, bond)


# Planning


@lru_cache(maxsize=256)
def _plans(network: Network, batch: int | None) -> tuple[Plan, ...]:
    """Both plans of the dense tensor or of a batch, the cheaper one first."""
    kind = "dense" if batch is None else "batch"
    joins = _schedule(network, batch=batch, features=batch is not None)
    whole = _whole(network, batch)
    flops, largest, moved = _cost(network, joins)
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


def _cost(network: Network, joins: Sequence[Join]) -> tuple[int, int, int]:
    """Flops, largest result, numbers moved."""
    flops = largest = moved = 0
    for join in joins:
        first = join.nodes[0]
        if join.einsum is not None:
            flops += join.einsum.flops
            moved += join.einsum.moved
            largest = max(largest, join.einsum.largest)
        else:
            largest = max(largest, len(join.nodes) * join.rows * network.bonds[first])
        for k, gather in enumerate(join.gathers):
            if gather is not None:
                gathered = (
                    gather.numel() * network.bonds[(network.tree.links[first] or (first,))[k]]
                )
                moved += gathered
                largest = max(largest, gathered)
    return flops, largest, moved


def _schedule(
    network: Network,
    *,
    batch: int | None = None,
    features: bool = False,
    gathers: Mapping[int, tuple[Tensor, ...]] | None = None,
) -> tuple[Join, ...]:
    """The batched calls from the leaves to the root: nodes of a height that need the same call.

    A node's rows are all combinations of its children's rows, unless it is *aligned*: then its row
    i comes from row i of every child, after ``gathers``.

    Args:
        network: The network.
        batch: Rows of every node; all nodes are aligned.
        features: Whether leaves contract an input (with ``batch``).
        gathers: Position -> for each child (or for the leaf itself) which of its rows to take.
    """
    tree = network.tree
    gathers = gathers or {}
    rows: list[int] = []
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, below in enumerate(tree.links):
        aligned = bool(below) and (batch is not None or i in gathers)
        if i in gathers:
            rows.append(gathers[i][0].numel())
        elif batch is not None and (below or features):
            rows.append(batch)
        else:
            rows.append(math.prod(rows[c] for c in below) if below else network.shape(i)[0])
        stack = network.slots[i][0] if i in network.slots else None
        children = tuple((rows[c], network.bonds[c]) for c in below)
        key = (tree.heights[i], stack, aligned, i in gathers, rows[i], children)
        groups.setdefault(key, []).append(i)

    joins: list[Join] = []
    places: dict[int, tuple[int, int]] = {}  # position -> (which result, which slot of it)
    for key in sorted(groups, key=lambda k: (k[0], groups[k][0])):
        nodes = tuple(groups[key])
        first, aligned = nodes[0], key[2]
        below = tree.links[first]
        joined: tuple[Tensor | None, ...] = (None,) * max(len(below), 1)
        if first in gathers:
            heights = [rows[c] for c in below] if below else [network.shape(first)[0]]
            joined = tuple(
                torch.cat([g + k * height for k, g in enumerate(part)])
                for part, height in zip(
                    zip(*(gathers[i] for i in nodes), strict=True), heights, strict=True
                )
            )
        call = None
        if below:
            call = _node_einsum(
                network,
                first,
                len(nodes),
                [rows[first] if aligned else rows[c] for c in below],
                aligned,
            )
        elif features:
            shape = network.shape(first)
            count = [len(nodes)] if len(nodes) > 1 else []
            words = "gbd,gdr->gbr" if count else "bd,dr->br"
            call = einsum(words, (*count, rows[first], shape[0]), (*count, *shape))
        split, picks = _sources(network, nodes, places, [len(join.nodes) for join in joins])
        joins.append(
            Join(nodes, call, rows[first], _weight_source(network, nodes), split, picks, joined)
        )
        places.update({position: (len(joins) - 1, slot) for slot, position in enumerate(nodes)})
    return tuple(joins)


def _sources(
    network: Network,
    nodes: tuple[int, ...],
    places: Mapping[int, tuple[int, int]],
    counts: list[int],
) -> tuple[int | None, tuple[int | tuple[tuple[int, int], ...], ...]]:
    """Where the children of a group are: one result split in order, whole results, or single slots."""
    links = [network.tree.links[i] for i in nodes]
    arity = len(links[0])

    def whole(found: list[tuple[int, int]]) -> int | None:
        result = found[0][0]
        return result if found == [(result, slot) for slot in range(counts[result])] else None

    if arity > 1:
        split = whole([places[c] for below in links for c in below])
        if split is not None:
            return split, ()
    picks: list[int | tuple[tuple[int, int], ...]] = []
    for k in range(arity):
        found = [places[below[k]] for below in links]
        result = whole(found)
        picks.append(tuple(found) if result is None else result)
    return None, tuple(picks)


def _weight_source(
    network: Network, nodes: tuple[int, ...]
) -> tuple[int, tuple[int, ...] | None] | None:
    if nodes[0] not in network.slots:
        return None  # the root of ones
    stack = network.slots[nodes[0]][0]
    whole = nodes == network.stacks[stack].positions
    return stack, None if whole else tuple(network.slots[i][1] for i in nodes)


def _node_einsum(
    network: Network, position: int, count: int, rows: list[int], aligned: bool
) -> Einsum:
    """The call for ``count`` nodes: children ``(g, rows, bond)`` and weights to ``(g, rows.., bond)``.

    For a single node the axis g is left out.
    """
    below = network.tree.links[position]
    diagonal = network.joins[position] == "diagonal"
    symbols = iter(get_symbol(i) for i in range(2 * len(below) + 3))
    group, above, shared = next(symbols), next(symbols), next(symbols)
    sizes = [count]
    if count == 1:
        group, sizes = "", []
    bonds = [shared if diagonal else next(symbols) for _ in below]
    row = next(symbols) if aligned else ""
    heads = [row if aligned else next(symbols) for _ in below]
    terms = [group + head + bond for head, bond in zip(heads, bonds, strict=True)]
    shapes: list[tuple[int, ...]] = [
        (*sizes, n, network.bonds[c]) for n, c in zip(rows, below, strict=True)
    ]
    top = position == len(network.tree.nodes) - 1
    if position in network.slots:
        terms.append(group + (shared if diagonal else "".join(bonds)) + ("" if top else above))
        shapes.append((*sizes, *network.shape(position)))
    out = group + (row if aligned else "".join(heads)) + ("" if top else above)
    return einsum(f"{','.join(terms)}->{out}", *shapes)


def check_index(network: Network, index: Tensor) -> Tensor:
    """Refuse an index that is not an int64 tensor ``(B, N)`` within the mode sizes."""
    order = network.tree.order
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        found = f"dtype {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
        raise DataError(
            f"an index must be an int64 tensor of shape (B, {order}), found {found}.\n"
            "  write torch.as_tensor(index, dtype=torch.int64)"
        )
    if index.ndim != 2 or index.shape[1] != order:
        raise ShapeError(
            f"an index has one row per entry and one column per mode.\n"
            f"  found:    shape {tuple(index.shape)}\n  expected: (B, {order})"
        )
    if index.shape[0] == 0:
        raise DataError("an empty batch: the index has no rows; give at least one entry.")
    sizes = torch.tensor(network.sizes, device=index.device)
    wrong = ((index < 0) | (index >= sizes)).nonzero()
    if len(wrong):
        row, mode = wrong[0].tolist()
        raise DataError(
            f"index out of range: {len(wrong)} of {index.numel()} values.\n"
            f"  first: row {row} has {int(index[row, mode])} at mode {mode}, "
            f"whose size is {network.sizes[mode]}\n"
            f"  expected: 0 <= index < {network.sizes[mode]}, counted from 0"
        )
    return index


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
        moved = _cost(network, dense.joins)[2] if dense.whole is None else dense.whole.moved
        flat = torch.zeros_like(columns[0])
        # the tree leaves its rows in the order of its leaves, opt_einsum in that of the modes
        for mode in network.leaf_order if dense.whole is None else range(tree.order):
            flat = flat * network.sizes[mode] + columns[mode]
        routes["dense"] = (dense.flops, dense.largest, dense.held + count, dense.peak + count,
                           dense.joins, dense.whole, flat)  # fmt: skip
        costs["dense"] = dense.flops + _FLOPS_PER_MOVE * (moved + count)

    gathers, take = _distinct_rows(network, columns)
    joins = _schedule(network, gathers=gathers)
    flops, largest, moved = _cost(network, joins)
    routes["distinct"] = (flops, largest, moved + count, moved + count, joins, None, take)
    costs["distinct"] = flops + _FLOPS_PER_MOVE * (moved + count)

    rows = {tree.position(mode): (columns[mode],) for mode in tree.leaves}
    joins = _schedule(network, batch=count, gathers=rows)
    flops, largest, moved = _cost(network, joins)
    routes["per-sample"] = (flops, largest, moved, moved, joins, None, None)
    costs["per-sample"] = flops + _FLOPS_PER_MOVE * moved

    best = cheapest(costs)
    return tuple(
        Plan(network, "entries", route, *routes[route][:4], costs, count, *routes[route][4:])
        for route in sorted(costs, key=lambda route: (route != best, costs[route]))
    )


def _distinct_rows(
    network: Network, columns: Sequence[Tensor]
) -> tuple[dict[int, tuple[Tensor, ...]], Tensor]:
    """For every node the combinations of its children's rows that occur, and each entry's row at the root.

    A node at which all combinations occur is left out: nothing has to be gathered there.
    """
    gathers: dict[int, tuple[Tensor, ...]] = {}
    ids: list[Tensor] = []
    counts: list[int] = []
    for i, below in enumerate(network.tree.links):
        if not below:
            mode: int = network.tree.nodes[i]  # type: ignore[assignment]
            ids.append(columns[mode])
            counts.append(network.sizes[mode])
            continue
        combined, rows = ids[below[0]], [torch.arange(counts[below[0]], device=columns[0].device)]
        for c in below[1:]:  # two at a time, so that the number of a combination never overflows
            numbers, combined = torch.unique(combined * counts[c] + ids[c], return_inverse=True)
            rows = [r.index_select(0, numbers // counts[c]) for r in rows] + [numbers % counts[c]]
        ids.append(combined)
        counts.append(rows[0].numel())
        if counts[i] < math.prod(counts[c] for c in below):
            gathers[i] = tuple(rows)
    return gathers, ids[-1]
