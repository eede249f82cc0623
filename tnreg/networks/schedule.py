"""The tree schedule: a network contracted from the leaves to the root, equal nodes in one batched call.

Which calls those are is a value, a sequence of ``Join``; ``run`` carries it out. Every node holds a matrix:
its rows are multi-indices of the modes below it, samples of a batch, or those combinations of its
children's rows that occur among given entries; its columns are the bond above it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from opt_einsum.parser import get_symbol
from torch import Tensor

from tnreg.networks.einsum import Einsum, along, einsum
from tnreg.networks.network import Network


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


def schedule(
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
    equation = f"{','.join(terms)}->{out}"
    found = einsum(equation, *shapes)
    if len(terms) < 3:
        return found
    # children one after another, then the weight: a search that minds sizes may miss it where all are 1
    last = range(len(terms) - 2, 0, -1)
    plain = along(equation, tuple(shapes), ((0, 1), *((0, k) for k in last)))
    return min(found, plain, key=lambda one: one.flops)


def distinct_rows(
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


def cost(network: Network, joins: Sequence[Join]) -> tuple[int, int, int]:
    """Counted flops of a schedule, entries of its largest result, and of all that it moves."""
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


def run(
    network: Network,
    joins: Sequence[Join],
    stacks: Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
) -> Tensor:
    """Carry out a schedule.

    Args:
        network: The network.
        joins: From ``schedule``.
        stacks: The weights as ``network.stacks`` groups them.
        inputs: Features, where leaves contract them: ``(B, N, D)``, or ``(B, D_n)`` for every mode.

    Returns:
        The root's rows. On the way results are ``(nodes, rows, bond)``, or ``(rows, bond)`` where a call is
        for one node only.
    """
    results: list[Tensor] = []
    slots: dict[int, Sequence[Tensor]] = {}
    parts: dict[int, Sequence[Tensor]] = {}

    def slot_of(result: int, slot: int) -> Tensor:
        if len(joins[result].nodes) == 1:
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

    for join in joins:
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
        if joined.ndim != 2 + (count > 1) and join is not joins[-1]:
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
