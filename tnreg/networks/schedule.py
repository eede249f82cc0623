"""The tree schedule: a network contracted from the leaves to the root, equal nodes in one batched call.

Which calls those are is a value, a sequence of ``Join``; ``run`` carries it out. Every node holds a matrix:
its rows are multi-indices of the modes below it, samples of a batch, or those combinations of its
children's rows that occur among given entries; its columns are the bond above it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from opt_einsum.parser import get_symbol
from torch import Tensor

from tnreg.networks.einsum import Cost, Einsum, along, einsum
from tnreg.networks.network import Level, Network, Stacked


@dataclass(frozen=True, eq=False)
class Join:
    """One batched call of the tree schedule: equal nodes with equally many rows, and one einsum.

    Attributes:
        level: The nodes, and where their weights and their children's results are.
        einsum: Operands are the children's matrices (or the inputs of a leaf), then the weight;
            ``None`` at a leaf without inputs.
        rows: Rows of every node's result.
        gathers: For each child (or the leaf itself) the rows to take, flat over the nodes; empty to
            take them as they are.
    """

    level: Level
    einsum: Einsum | None
    rows: int
    gathers: tuple[Tensor, ...]


def schedule(
    network: Network,
    *,
    batch: int | None = None,
    features: bool = False,
    gathers: Mapping[int, tuple[Tensor, ...]] | None = None,
) -> tuple[Join, ...]:
    """Plan the batched calls from the leaves to the root.

    A node's rows are all combinations of its children's rows, unless it is *aligned*: then its row
    i comes from row i of every child, after ``gathers``.

    Args:
        network: The network.
        batch: Rows of every node; all nodes are aligned.
        features: Whether leaves contract an input (with ``batch``).
        gathers: Position -> for each child (or for the leaf itself) which of its rows to take.
    """
    links, gathers = network.tree.links, gathers or {}
    rows: list[int] = []
    for i, below in enumerate(links):
        if i in gathers:
            rows.append(gathers[i][0].numel())
        elif batch is not None and (below or features):
            rows.append(batch)
        else:
            rows.append(math.prod(rows[c] for c in below) if below else network.shape(i)[0])
    kinds = [(rows[i], i in gathers, *(rows[c] for c in below)) for i, below in enumerate(links)]
    joins = []
    for level in network.split_levels(kinds):
        first = level.positions[0]
        heights = [rows[c] for c in links[first]] or [level.shape[0]]
        call = None
        if links[first] or features:
            aligned = batch is not None or first in gathers
            read = [rows[first]] * len(heights) if aligned else heights
            call = _node_einsum(network, level, read, aligned)
        flat = _flat([gathers[i] for i in level.positions], heights) if first in gathers else ()
        joins.append(Join(level, call, rows[first], flat))
    return tuple(joins)


def _flat(gathers: Sequence[tuple[Tensor, ...]], heights: Sequence[int]) -> tuple[Tensor, ...]:
    """Join the rows to take of every child over the nodes of a level; ``heights`` are those of one node."""
    return tuple(
        torch.cat([rows + k * height for k, rows in enumerate(child)])
        for child, height in zip(zip(*gathers, strict=True), heights, strict=True)
    )


def _node_einsum(network: Network, level: Level, rows: list[int], aligned: bool) -> Einsum:
    """Plan the call of a level: children ``(g, rows, bond)`` and weights to ``(g, rows.., bond)``.

    For a single node the axis g is left out. A leaf has its input as a child, with the mode as its bond.
    """
    position, diagonal = level.positions[0], level.join == "diagonal"
    sizes = [network.bonds[c] for c in network.tree.links[position]] or [level.shape[0]]
    top = position == len(network.tree.nodes) - 1
    symbols = map(get_symbol, range(2 * len(rows) + 4))
    group, above, shared = (next(symbols) for _ in range(3))
    count, above = [len(level.positions)], "" if top else above
    if count == [1]:
        group, count = "", []
    bonds = [shared if diagonal else next(symbols) for _ in rows]
    row = next(symbols)
    heads = [row if aligned else next(symbols) for _ in rows]
    terms = [group + head + bond for head, bond in zip(heads, bonds, strict=True)]
    shapes = [(*count, n, size) for n, size in zip(rows, sizes, strict=True)]
    if level.weight is not None:
        terms.append(group + (shared if diagonal else "".join(bonds)) + above)
        shapes.append((*count, *level.shape))
    equation = f"{','.join(terms)}->{group}{row if aligned else ''.join(heads)}{above}"
    call = einsum(equation, *shapes)
    if len(terms) < 3:
        return call
    # children one after another, then the weight: a search that minds sizes may miss it where all are 1
    last = range(len(terms) - 2, 0, -1)
    plain = along(equation, tuple(shapes), ((0, 1), *((0, k) for k in last)))
    return min(call, plain, key=lambda call: call.cost.flops)


def distinct_rows(
    network: Network, columns: Sequence[Tensor]
) -> tuple[dict[int, tuple[Tensor, ...]], Tensor]:
    """Find the combinations of children's rows that occur at every node, and each entry's row at the root.

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


def cost_of(network: Network, joins: Sequence[Join]) -> Cost:
    """Count what a schedule costs; what it gathers is held as well."""
    flops = largest = held = 0
    for join in joins:
        first = join.level.positions[0]
        if join.einsum is not None:
            flops += join.einsum.cost.flops
            held += join.einsum.cost.held
            largest = max(largest, join.einsum.cost.largest)
        else:
            largest = max(largest, len(join.level.positions) * join.rows * network.bonds[first])
        sources = network.tree.links[first] or (first,)
        for source, gather in zip(sources, join.gathers, strict=False):
            gathered = gather.numel() * network.bonds[source]
            held += gathered
            largest = max(largest, gathered)
    return Cost(flops, largest, held, held)


def run(
    network: Network, joins: Sequence[Join], stacks: Sequence[Tensor], inputs: Tensor | Sequence[Tensor]
) -> Tensor:
    """Carry out a schedule with the weights as ``network.stacks`` groups them, and return the root's rows.

    Inputs are the features that leaves contract: ``(B, N, D)``, or ``(B, D_n)`` for every mode. Results
    are ``(nodes, rows, bond)``, or ``(rows, bond)`` where a call is for one node only.
    """
    weights, results = Stacked(stacks), Stacked()
    for join in joins:
        level, single = join.level, len(join.level.positions) == 1
        if level.join == "leaf" and join.einsum is not None:
            operands = [_features(inputs, [network.tree.nodes[i] for i in level.positions])]  # type: ignore[misc]
        elif single:
            operands = [results.slot(*child.pairs[0]) for child in level.children]
        else:
            operands = results.children(level)
        if level.weight is not None:
            places = level.weight
            operands.append(weights.slot(*places.pairs[0]) if single else weights.pick(places))
        for k, rows in enumerate(join.gathers):
            operands[k] = _gather(operands[k], rows)
        result = operands[0] if join.einsum is None else join.einsum(operands)
        if join.einsum is not None and join is not joins[-1] and result.ndim != 3 - single:
            # several row axes become one
            result = result.reshape(*result.shape[: 1 - single], join.rows, -1)
        results.append(result, single=single)
    return result


def _features(inputs: Tensor | Sequence[Tensor], modes: list[int]) -> Tensor:
    """Return inputs of these modes as ``(modes, B, D)``, without a copy where they are all in order."""
    if not isinstance(inputs, Tensor):
        parts = [inputs[mode] for mode in modes]
        return torch.stack(parts) if len(parts) > 1 else parts[0]
    if len(modes) == 1:
        return inputs[:, modes[0]]
    batch = inputs.transpose(0, 1)
    return batch if modes == list(range(len(batch))) else batch[modes]


def _gather(matrices: Tensor, rows: Tensor) -> Tensor:
    """Take rows ``(m, r)`` of a matrix, or ``(g, m, r)`` of g matrices by flat numbers in ``0..g*n-1``."""
    if matrices.ndim == 2:
        return matrices.index_select(0, rows)
    count, _, bond = matrices.shape
    return matrices.reshape(-1, bond).index_select(0, rows).reshape(count, -1, bond)
