"""The tree schedule: a network contracted from the leaves to the root, equal nodes in one batched call.

Which calls those are is a value, a sequence of ``Join``; ``run`` carries it out. Every node holds a matrix:
its rows are multi-indices of the modes below it, samples of a batch, or those combinations of its
children's rows that occur among given entries; its columns are the bond above it.

The matrix of a bare leaf is the identity, or the input of its mode. The identity is mostly no operand: its
rows are an axis of the parent's weight, of which entries take what they need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from opt_einsum.parser import get_symbol
from torch import Tensor
from torch.nn.functional import one_hot

from tnreg.networks.einsum import Cost, Einsum, along, find_path
from tnreg.networks.network import Level, Network, Stacked
from tnreg.tensors.arrays import Scaled

# Samples of the batch that a search is for which serves all of them.
TYPICAL = 64

# To look for equal rows of one node takes about as long as so many flops.
_FLOPS_TO_LOOK = 2**18


@dataclass(frozen=True, eq=False)
class Join:
    """One batched call of the tree schedule: equal nodes with equally many rows, and one einsum.

    Attributes:
        level: The nodes, and where their weights and their children's results are.
        einsum: Operands are the children's matrices (or the inputs of a leaf), then the weight;
            ``None`` at a leaf without inputs and at bare leaves.
        rows: Rows of every node's result.
        heights: Rows of each child of a node, or of a leaf itself.
        axes: Numbers of the bare children that are an axis of the weight and no operand.
        taken: For each child (or the leaf itself) whether some of these rows are taken first.
        gathers: Which ones, flat over the nodes; ``None`` for children whose rows are as they are.
        picks: Which rows are taken of the weights with these axes in front, flat over the nodes.
    """

    level: Level
    einsum: Einsum | None
    rows: int
    heights: tuple[int, ...]
    axes: tuple[int, ...]
    taken: tuple[bool, ...]
    gathers: tuple[Tensor | None, ...] = ()
    picks: Tensor | None = None


def rounded(count: int) -> int:
    """Return the next number of two binary digits and zeros: counts that a search need not tell apart."""
    unit = 1 << max((count - 1).bit_length() - 2, 0)
    return -(-count // unit) * unit


@lru_cache(maxsize=256)
def schedule(
    network: Network,
    *,
    batch: int | None = None,
    features: bool = False,
    taken: tuple[int | None, ...] | None = None,
) -> tuple[Join, ...]:
    """Plan the batched calls from the leaves to the root.

    A node's rows are all combinations of its children's rows, unless it is *aligned*: then its row
    i comes from row i of every child, of which some may be taken (see ``gather``).

    Args:
        network: The network.
        batch: Rows of every node; all nodes are aligned.
        features: Whether leaves contract an input (with ``batch``).
        taken: For every position how many of its children's rows (or of a leaf's own) are taken; ``None`` at
            those that combine them as they are. ``batch`` of them are those of the samples in order.
    """
    links = network.tree.links
    taken = taken or (batch,) * len(links)
    rows, own = list[int](), list[tuple[bool, ...]]()
    for i, below in enumerate(links):
        count = taken[i]
        ordered = count is not None and count == batch
        if count is None:
            count = math.prod(rows[c] for c in below) if below else network.shape(i)[0]
        rows.append(count)
        # samples in order are as they are: inputs of leaves, or rows of children
        same = [ordered and taken[c] == batch for c in below] or [features]
        own.append(tuple(taken[i] is not None and not alike for alike in same))
    kinds = [(taken[i] is None, own[i], rows[i], *(rows[c] for c in below)) for i, below in enumerate(links)]
    joins = []
    for level in network.split_levels(kinds):
        first = level.positions[0]
        heights = tuple(rows[c] for c in links[first]) or (level.shape[0],)
        call: Einsum | None = None
        axes: tuple[int, ...] = ()
        if links[first] or features:
            aligned = taken[first] is not None
            read = (rows[first],) * len(heights) if aligned else heights
            axes = _axes(level, aligned, features)
            if level.join != "bare":
                call = _node_einsum(network, level, read, aligned, axes)
        joins.append(Join(level, call, rows[first], heights, axes, own[first]))
    return tuple(joins)


def _axes(level: Level, aligned: bool, features: bool) -> tuple[int, ...]:
    """Return the bare children whose modes are an axis of the result or taken from the weight."""
    if level.join == "full" and not features:
        return level.bare
    # of a diagonal join one mode at most is the index of all
    return () if aligned else level.bare[:1]


def gather(joins: Sequence[Join], rows: Mapping[int, tuple[Any, ...]]) -> tuple[Join, ...]:
    """Give a schedule the rows to take: position -> for each child (or for the leaf itself) which ones."""
    return tuple(_gathering(join, rows) if any(join.taken) else join for join in joins)


def _gathering(join: Join, rows: Mapping[int, tuple[Any, ...]]) -> Join:
    def flat(axes: Sequence[int]) -> Tensor:
        read = [[rows[i][k] for k in axes] for i in join.level.positions]
        return _numbered(*_combined(read, [join.heights[k] for k in axes]))

    numbers = [flat([k]) if here and k not in join.axes else None for k, here in enumerate(join.taken)]
    return replace(join, gathers=tuple(numbers), picks=flat(join.axes) if join.axes else None)


def _numbered(rows: Tensor, height: int) -> Tensor:
    """Count rows ``(nodes, rows)`` of matrices of a height each through all nodes."""
    if len(rows) > 1:
        rows = rows + torch.arange(0, len(rows) * height, height, device=rows.device).unsqueeze(1)
    return rows.reshape(-1)


def _node_einsum(
    network: Network, level: Level, rows: Sequence[int], aligned: bool, axes: Sequence[int]
) -> Einsum:
    """Plan the call of a level: children ``(g, rows, bond)`` and weights to ``(g, rows.., bond)``.

    For a single node the axis g is left out. A leaf has its input as a child, with the mode as its bond.
    Children that are ``axes`` of the weight are no operands. Where rows are aligned the weight has the rows
    that were taken of them first, ``(g, rows, ..)``.
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
    heads = [row if aligned else bonds[k] if k in axes else next(symbols) for k in range(len(rows))]
    operands = [k for k in range(len(rows)) if k not in axes]
    picked = row if aligned and axes else ""
    terms = [group + heads[k] + bonds[k] for k in operands]
    if level.weight is not None:
        inner = shared if diagonal else "".join(b for k, b in enumerate(bonds) if not (picked and k in axes))
        terms.append(group + picked + inner + above)
    equation = f"{','.join(terms)}->{group}{row if aligned else ''.join(heads)}{above}"

    def shapes(heights: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        children = [(*count, heights[k], sizes[k]) for k in operands]
        inner = [n for k, n in enumerate(level.shape) if k not in axes] if picked else level.shape
        weight = (*count, *([heights[0]] if picked else []), *inner)
        return (*children, *([] if level.weight is None else [weight]))

    # children one after another, then the weight: a search that minds sizes may miss it where all are 1
    last = range(len(terms) - 2, 0, -1)
    paths: list[tuple[tuple[int, ...], ...]] = (
        [((0, 1), *((0, k) for k in last))] if len(terms) > 1 else [((0,),)]
    )
    if len(terms) > 2 and not (aligned and diagonal):  # there no other order costs less
        similar = [TYPICAL] * len(rows) if aligned else [rounded(n) for n in rows]
        paths.append(find_path(equation, shapes(similar), "auto"))
    calls = [along(equation, shapes(rows), path) for path in paths]
    return min(calls, key=lambda call: call.cost.flops)


def distinct_rows(
    network: Network, index: Tensor, costs: Sequence[float]
) -> tuple[tuple[int | None, ...], list[int], list[Any]]:
    """Find the combinations of children's rows that occur among entries.

    Where more than half of all combinations occur, all are kept; where there are more than half as many as
    entries, every entry has a row of its own. So indices alike in kind share a schedule. That many are taken
    to occur where no more could be saved, by flops ``costs`` of a row of every node, than looking costs.

    Returns:
        For every node how many rows are taken, as ``schedule`` takes it; how many are distinct, or all that
        are kept; and which row each entry has, ``None`` if its own.
    """
    links, samples = network.tree.links, len(index)
    columns = index.unbind(1)
    taken, counts = list[int | None]([None] * len(links)), list(network.bonds)
    ids, rows = list[Any]([None] * len(links)), [0] * len(links)  # no rows: every entry has its own
    step = max(1, 2**20 // samples)  # as many nodes at once as take little memory
    for level in network.levels:
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in level.positions:
            heights = tuple([rows[c] for c in links[i]])
            if not heights:
                mode: int = network.tree.nodes[i]  # type: ignore[assignment]
                ids[i], rows[i], counts[i] = columns[mode], network.sizes[mode], network.sizes[mode]
            elif 0 in heights:  # entries that differ at a child differ here
                taken[i] = counts[i] = samples
            else:
                groups.setdefault(heights, []).append(i)
        for heights, nodes in (
            (h, g[k : k + step]) for h, g in groups.items() for k in range(0, len(g), step)
        ):
            total = math.prod(heights)
            found, numbers = [min(total, samples)] * len(nodes), cast(Any, nodes)
            look = found[0] * costs[nodes[0]] > _FLOPS_TO_LOOK
            if look or total <= samples:
                combined, most = _combined([[ids[c] for c in links[i]] for i in nodes], heights)
                found, numbers = _count_distinct(combined, most) if look else found, combined.unbind(0)
            for i, own, count in zip(nodes, numbers, found, strict=True):
                if total <= min(samples, 2 * count):
                    ids[i], rows[i], counts[i] = own, total, total
                elif 2 * count > samples:
                    taken[i], counts[i] = samples, count
                else:
                    ids[i], rows[i], counts[i], taken[i] = _ranks(own, most), count, count, count
    return tuple(taken), counts, ids


def _combined(children: Sequence[Sequence[Tensor]], heights: Sequence[int]) -> tuple[Tensor, int]:
    """Return numbers ``(nodes, B)`` of the combinations of children's rows, and below what they are."""
    numbers, most = _stacked([below[0] for below in children]), heights[0]
    for k, height in enumerate(heights[1:], 1):
        if most * height >= 2**62:
            numbers, most = torch.stack([_ranks(each, most) for each in numbers]), numbers.shape[1]
        numbers = torch.add(_stacked([below[k] for below in children]), numbers, alpha=height)
        most *= height
    return numbers, most


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(rows)) if len(rows) > 1 else rows[0].unsqueeze(0)


def _count_distinct(numbers: Tensor, most: int) -> list[int]:
    """Count the distinct numbers below ``most`` in every row."""
    if most > 4 * numbers.shape[1] + 2**12:
        ordered = numbers.sort(1)[0]
        found = torch.ne(ordered[:, 1:], ordered[:, :-1]).sum(1) + 1
    else:  # without sorting
        found = numbers.new_zeros((len(numbers), most), dtype=torch.bool).scatter_(1, numbers, True).sum(1)
    return found.tolist()


def _ranks(numbers: Tensor, most: int) -> Tensor:
    """Replace numbers below ``most`` by their ranks among the distinct ones."""
    if most > 4 * len(numbers):
        inverse: Tensor = torch.unique(numbers, return_inverse=True)[1]
        return inverse
    order = numbers.new_zeros(most).index_fill_(0, numbers, 1).cumsum(0)
    return order.index_select(0, numbers) - 1


def rows_to_take(
    network: Network, taken: Sequence[int | None], ids: Sequence[Any]
) -> dict[int, tuple[Any, ...]]:
    """Return the rows of its children that every node takes, from what ``distinct_rows`` found."""
    rows = {}
    for i, count in enumerate(taken):
        if count is not None:
            rows[i] = tuple(ids[c] for c in network.tree.links[i])
            if (own := ids[i]) is not None:  # any entry that has a combination tells it
                entries = torch.arange(len(own), device=own.device)
                example = entries.new_empty(count).scatter_(0, own, entries)
                rows[i] = tuple(each.index_select(0, example) for each in rows[i])
    return rows


def cost_of(network: Network, joins: Sequence[Join]) -> Cost:
    """Count what a schedule costs; what it gathers is held as well."""
    flops = largest = held = 0
    for join in joins:
        first = join.level.positions[0]
        if join.einsum is not None:
            flops += join.einsum.cost.flops
            held += join.einsum.cost.held
            largest = max(largest, join.einsum.cost.largest)
        elif join.level.join != "bare":
            largest = max(largest, len(join.level.positions) * join.rows * network.bonds[first])
        own, bonds = join.level.shape, [network.bonds[c] for c in network.tree.links[first] or (first,)]
        picked = [own[k] for k in join.axes if join.taken[k]]
        taken = [bonds[k] for k, here in enumerate(join.taken) if here and k not in join.axes]
        for each in [*taken, math.prod(own) // math.prod(picked)] if picked else taken:
            gathered = len(join.level.positions) * join.rows * each
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
        operands = _operands(network, join, weights, results, inputs)
        result = operands[0] if join.einsum is None else join.einsum(operands)
        results.append(_flat(join, result, joins[-1]), single=len(join.level.positions) == 1)
    return result


def run_scaled(
    network: Network, joins: Sequence[Join], stacks: Sequence[Tensor], inputs: Tensor | Sequence[Tensor]
) -> Scaled:
    """Carry out a schedule as ``run`` does, with a scale for every row of a node."""
    weights, results, logs = Stacked(stacks), Stacked(), Stacked()
    for join in joins:
        operands = _operands(network, join, weights, results, inputs)
        scales = [operands[0].real.new_zeros([1] * x.ndim) for x in operands]
        for k, (child, log2) in enumerate(_children(join, logs)):
            if child not in join.level.bare:
                rows = join.gathers[child] if join.gathers else None
                scales[k] = log2 if rows is None else _gather(log2, rows)
        if join.einsum is None:
            x, log2 = operands[0], operands[0].real.new_zeros((*operands[0].shape[:-1], 1))
        else:
            parts = [Scaled(x, log2) for x, log2 in zip(operands, scales, strict=True)]
            output = join.einsum.equation.split("->")[1]
            x, log2 = join.einsum.scaled(parts, output if join is joins[-1] else output[:-1])
        single = len(join.level.positions) == 1
        results.append(_flat(join, x, joins[-1]), single=single)
        logs.append(_flat(join, log2, joins[-1]), single=single)
    return Scaled(x, log2)


def _operands(
    network: Network, join: Join, weights: Stacked, results: Stacked, inputs: Tensor | Sequence[Tensor]
) -> list[Tensor]:
    """Return what a call takes: features or the results of children, then weights."""
    level, places = join.level, join.level.weight
    single, operands = len(level.positions) == 1, list[Tensor]()
    if not level.children and len(inputs):
        operands = [_features(inputs, [network.tree.nodes[i] for i in level.positions])]  # type: ignore[misc]
    for k, x in _children(join, results):
        rows = join.gathers[k] if join.gathers else None
        if k in level.bare and not len(inputs):
            x = _identity(x, len(level.positions), rows)
        elif rows is not None:
            x = _gather(x, rows)
        operands.append(x)
    if places is not None:
        weight = weights.slot(*places.pairs[0]) if single else weights.pick(places)
        if join.picks is not None:
            weight = _pick(weight, join)
        elif not level.children and join.gathers:  # a leaf's own rows
            weight = _gather(weight, join.gathers[0])  # type: ignore[arg-type]
        operands.append(weight)
    # a bare leaf without an input: its size is all that is asked for
    return operands or [
        weights.tensors[0].new_empty(()).expand(*[len(level.positions)][single:], level.shape[0])
    ]


def _children(join: Join, results: Stacked) -> list[tuple[int, Tensor]]:
    """Return results of children that are operands; without the axis of nodes if there is one node only."""
    level = join.level
    if len(level.positions) == 1:
        return [
            (k, results.slot(*child.pairs[0])) for k, child in enumerate(level.children) if k not in join.axes
        ]
    if level.bare:
        return [(k, results.pick(child)) for k, child in enumerate(level.children) if k not in join.axes]
    return list(enumerate(results.children(level)))


def _identity(sample: Tensor, nodes: int, rows: Tensor | None) -> Tensor:
    """Return the matrices of bare children of so many nodes, or rows of them by flat numbers."""
    size = sample.shape[-1]
    if rows is None:
        matrix = torch.eye(size, dtype=sample.dtype, device=sample.device)
        return matrix if sample.ndim == 1 else matrix.expand(nodes, size, size)
    matrix = one_hot(rows.remainder(size), size).to(sample.dtype)
    return matrix if sample.ndim == 1 else matrix.reshape(nodes, -1, size)


def _pick(weight: Tensor, join: Join) -> Tensor:
    """Take the rows of bare children from their axes of weights: ``(nodes, rows, other axes)``."""
    assert join.picks is not None
    nodes = [len(join.level.positions)] if len(join.level.positions) > 1 else []
    first = len(nodes)
    front = weight.movedim([first + k for k in join.axes], list(range(first, first + len(join.axes))))
    rest = front.shape[first + len(join.axes) :]
    return front.reshape(-1, *rest).index_select(0, join.picks).reshape(*nodes, -1, *rest)


def _flat(join: Join, result: Tensor, last: Join) -> Tensor:
    """Make one axis of several axes of rows."""
    nodes = 0 if len(join.level.positions) == 1 else 1
    if join.einsum is None or join is last or result.ndim == 2 + nodes:
        return result
    return result.reshape(*result.shape[:nodes], join.rows, -1)


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
