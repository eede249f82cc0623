"""Orthonormal frames of all nodes of a factorization and the tensor in them, equal nodes in one call.

Write ``F_v`` for the matrix of node v's tensors (entries below v by bond above v). Going up the tree it
is split into ``F_v = U_v T_v`` with orthonormal columns ``U_v``, of which only the coordinates in the
frames of the children are kept. Going down, the matricization at v is ``U_v C_v`` for a small ``C_v``:
its singular values and vectors are those of the node.

Both ways work with squares where that loses nothing, and without them elsewhere; the rules are those of
``frames`` and ``outside``. Scales are powers of two kept per column, so that they are exact and nothing
leaves the range of the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tnreg.networks.network import Network
from tnreg.networks.scaled import combine_rows, multiply, scale_columns
from tnreg.tensors.arrays import Scaled

# A triangular factor (columns about 1) may come from a Gram matrix if the squares of its inverse are below
# this on average over its columns: frames are then orthonormal to some 1e-14.
_WELL_CONDITIONED = 32

# Up to here two Gram matrices one after the other do it (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya 2015).
_FAIRLY_CONDITIONED = 1e10

# Singular values below this share of the largest are not taken from squares: errors stay below 1e-11
# of the largest one.
_GRAM_FLOOR = 1e-4

# Numbers in all frames together.
_MOST_NUMBERS = 2**27

# Sums of squares outside of this range are formed with care for their scale.
_SQUARES = (1e-250, 1e250)


@dataclass(frozen=True)
class Batch:
    """Nodes of equal shape at equal height, handled by the same calls.

    A diagonal join of more than two children is made of steps that join two each; such a step has no
    weight and no node of its own.

    Attributes:
        nodes: Positions in ``tree.nodes``; for a step that of the node it belongs to.
        step: Whether this is such a step.
        kind: ``"leaf"``, ``"diagonal"`` or ``"full"``.
        weight: Which stack of the network and which slots of it; ``None`` for steps and a root of ones.
        below: For every child its batch, and the slot in it for every node.
        shape: Sizes of the children's frames, last child first; of the mode at a leaf.
        bond: Size of the bond above.
        rank: Size of the frame: ``min(product of shape, bond)``.
        reach: Largest rank that what is outside the nodes can have.
        root: Whether it is the root, which has no frame.
    """

    nodes: tuple[int, ...]
    step: bool
    kind: str
    weight: tuple[int, tuple[int, ...]] | None
    below: tuple[tuple[int, tuple[int, ...]], ...]
    shape: tuple[int, ...]
    bond: int
    rank: int
    reach: int
    root: bool


@dataclass(frozen=True)
class Frame:
    """Frames of a batch.

    Attributes:
        rows: ``(nodes, *shape, bond)``, the nodes' tensors in the frames of their children; ``None``
            where the frame is all of that space.
        turn: ``(nodes, bond, rank)``: ``rows @ turn`` is orthonormal; ``None`` if ``rows`` is.
        factor: ``T_v``, ``(nodes, rank, bond)``, columns of norm about 1 or 0.
        logs: ``(nodes, bond)``: binary logarithms of the scales of its columns, whole numbers but at
            extreme scales.
        high: ``(nodes, 1)``, the largest of them.
        scaled: The factor with its columns scaled relative to ``high``; ``None`` where scales are too
            far apart for that.
    """

    rows: Tensor | None
    turn: Tensor | None
    factor: Tensor
    logs: Tensor
    high: Tensor
    scaled: Tensor | None

    @classmethod
    def of(cls, rows: Tensor | None, turn: Tensor | None, factor: Tensor, logs: Tensor) -> Frame:
        """With ``high`` and ``scaled``."""
        high = logs.amax(1, keepdim=True)
        below = logs - high
        close = bool((below > -0.2 * math.log2(torch.finfo(logs.dtype).max)).all())
        scaled = factor * torch.exp2(below).unsqueeze(1) if close else None
        return cls(rows, turn, factor, logs, high, scaled)


@dataclass(frozen=True)
class Outside:
    """The tensor in the frames of a batch, for a tensor of norm 1.

    Attributes:
        values: ``(nodes, rank)`` singular values, descending.
        vectors: ``(nodes, rank, rank)`` left singular vectors in the frame, if asked for.
    """

    values: Tensor
    vectors: Tensor | None


def _cells(network: Network) -> list[tuple[int, bool, tuple[int, ...], int]]:
    """Nodes and the steps between them, children first: node, whether a step, cells below, bond.

    A diagonal join of more than two children is taken two at a time.
    """
    cells: list[tuple[int, bool, tuple[int, ...], int]] = []
    cell_of: list[int] = []
    for i, links in enumerate(network.tree.links):
        below = [cell_of[c] for c in links]
        while network.joins[i] == "diagonal" and len(below) > 2:
            pairs = [tuple(below[k : k + 2]) for k in range(0, len(below), 2)]
            below = []
            for pair in pairs:
                if len(pair) == 2:
                    cells.append((i, True, pair, network.bonds[links[0]]))
                    below.append(len(cells) - 1)
                else:
                    below.append(pair[0])
        cells.append((i, False, tuple(below), network.bonds[i]))
        cell_of.append(len(cells) - 1)
    return cells


def _reach(
    below: Sequence[Sequence[int]], shapes: Sequence[tuple[int, ...]], ranks: Sequence[int]
) -> list[int]:
    """How many singular values the batches can have in view of what is outside of them.

    Args:
        below: Batches below each batch, in the order of the axes of its shape.
        shapes: Ranks of these.
        ranks: Rank of each batch.
    """
    reach = [0] * len(ranks)
    reach[-1] = 1
    for b in reversed(range(len(ranks))):
        for k, child in enumerate(below[b]):
            others = math.prod(shapes[b][:k] + shapes[b][k + 1 :]) * reach[b]
            reach[child] = max(reach[child], min(ranks[child], others))
    return reach


@lru_cache(maxsize=64)
def batches(network: Network) -> tuple[Batch, ...]:
    """The network in batches, children before parents; the root is alone in the last one."""
    cells = _cells(network)
    heights: list[int] = []
    for _, _, below_cells, _ in cells:
        heights.append(1 + max((heights[c] for c in below_cells), default=-1))
    place: dict[int, tuple[int, int]] = {}  # cell -> batch and slot
    groups: list[list[int]] = []
    known: dict[tuple[object, ...], int] = {}
    ranks: list[int] = []
    shapes: list[tuple[int, ...]] = []
    for cell in sorted(range(len(cells)), key=heights.__getitem__):
        node, step, below_cells, bond = cells[cell]
        stack = None if step else network.slots.get(node, (None,))[0]
        key = (step, network.joins[node], stack, bond, tuple(place[c][0] for c in below_cells))
        if key not in known:
            known[key] = len(groups)
            groups.append([])
            shape = tuple(ranks[place[c][0]] for c in reversed(below_cells))
            mode = network.tree.nodes[node]
            shapes.append(shape or (network.sizes[mode],))  # type: ignore[call-overload]
            ranks.append(min(math.prod(shapes[-1]), bond))
        batch = known[key]
        place[cell] = batch, len(groups[batch])
        groups[batch].append(cell)

    below = [[place[c][0] for c in reversed(cells[members[0]][2])] for members in groups]
    reach = _reach(below, shapes, ranks)
    out = []
    for b, members in enumerate(groups):
        node, step, below_cells, bond = cells[members[0]]
        slots = None
        if not step and node in network.slots:
            stack = network.slots[node][0]
            slots = stack, tuple(network.slots[cells[m][0]][1] for m in members)
        places = [[place[c] for c in cells[m][2]] for m in members]
        children = tuple(
            (places[0][k][0], tuple(found[k][1] for found in places))
            for k in range(len(below_cells))
        )
        nodes = tuple(cells[m][0] for m in members)
        out.append(Batch(nodes, step, network.joins[node], slots, children, shapes[b], bond,
                         ranks[b], reach[b], b == len(groups) - 1))  # fmt: skip
    return tuple(out)


def frames_fit(network: Network) -> bool:
    """Whether frames of all nodes fit into memory together (a GiB); wide diagonal joins may not."""
    total = sum(len(b.nodes) * math.prod(b.shape) * b.bond for b in batches(network))
    return total <= _MOST_NUMBERS


def taken(stack: Tensor, slots: Sequence[int]) -> Tensor:
    """Some slots of a stack: a view where they are evenly spaced."""
    first, last = slots[0], slots[-1]
    step = slots[1] - first if len(slots) > 1 else 1
    if step > 0 and tuple(slots) == tuple(range(first, last + 1, step)):
        return stack[first : last + 1 : step]
    return stack[torch.tensor(slots, device=stack.device)]


def frames(network: Network, stacks: Sequence[Tensor]) -> list[Frame]:
    """Frames of all batches, leaves first; the root's has the core as ``rows`` and its scale as ``logs``.

    A frame comes from the Cholesky factor of a Gram matrix where that is well conditioned, from two one
    after the other where it is fairly so, and from a Householder QR factorization elsewhere.

    Args:
        network: The network.
        stacks: Its weights, as ``network.stacks`` groups them, in double precision.
    """
    found: list[Frame] = []
    for batch in batches(network):
        below = [found[b] for b, _ in batch.below]
        weight = _weight(batch, stacks, below)
        frame = None
        joined = _joined(batch, weight, below)
        if joined is not None:
            frame = _framed(batch, *joined)
        if frame is None:
            frame = _framed(batch, *_joined_with_care(batch, weight, below), careful=True)
        assert frame is not None
        found.append(frame)
    return found


def _weight(batch: Batch, stacks: Sequence[Tensor], below: Sequence[Frame]) -> Tensor | None:
    """``(nodes, .., bond)``, ``None`` for a step."""
    if batch.step:
        return None
    if batch.weight is None:  # a root of ones
        factor = below[0].factor
        return factor.new_ones(1, factor.shape[-1], 1)
    weight = taken(stacks[batch.weight[0]], batch.weight[1])
    missing = (2 if batch.kind != "full" else 1 + len(batch.shape)) == weight.ndim
    return weight.unsqueeze(-1) if missing else weight  # the root's has no bond above it


def _joined(
    batch: Batch, weight: Tensor | None, below: Sequence[Frame]
) -> tuple[Tensor, Tensor] | None:
    """The nodes' tensors in the frames of their children: ``(nodes, *shape, bond)`` and logarithms.

    ``None`` where scales are so far apart that a product might leave the range.
    """
    if batch.kind == "leaf":
        assert weight is not None
        return weight, torch.zeros_like(weight[:, 0].real)
    given, logs = [], torch.zeros((), dtype=torch.float64)
    slots = [slots for _, slots in batch.below]
    if weight is None:  # a step: nothing but products of columns of norm 1
        rows = _tied([taken(one.factor, at) for one, at in zip(below, slots, strict=True)])
        logs = torch.stack([taken(one.logs, at) for one, at in zip(below, slots, strict=True)]).sum(
            0
        )
        return rows.reshape(len(rows), *batch.shape, -1), logs
    for one, at in zip(below, slots, strict=True):
        if one.scaled is None:
            return None
        given.append(taken(one.scaled, at))
        logs = taken(one.high, at) + logs.to(one.high.device)
    rows = climb(weight, [_tied(given)] if batch.kind == "diagonal" else given)
    rows = rows.reshape(len(weight), *batch.shape, -1)
    return rows, logs.expand(-1, rows.shape[-1])


def _joined_with_care(
    batch: Batch, weight: Tensor | None, below: Sequence[Frame]
) -> tuple[Tensor, Tensor]:
    """The same node by node, at any scale; columns of largest magnitude 1, or 0."""
    factors = [taken(one.factor, at) for one, (_, at) in zip(below, batch.below, strict=True)]
    sizes = [taken(one.logs, at) for one, (_, at) in zip(below, batch.below, strict=True)]
    if batch.kind == "diagonal":
        factors, sizes = [_tied(factors)], [torch.stack(sizes).sum(0)]
    done = []
    for n in range(len(batch.nodes)):
        given = [Scaled(f[n], logs[n]) for f, logs in zip(factors, sizes, strict=True)]
        if weight is None:
            matrix, log = scale_columns(given[0][0])
            done.append((matrix, log + given[0][1]))
        elif batch.kind == "leaf":
            done.append(scale_columns(weight[n]))
        elif batch.kind == "diagonal":
            done.append(multiply(given[0], weight[n]))
        else:
            turned = weight[n].permute(*reversed(range(len(given))), len(given))
            done.append(combine_rows(given[::-1], turned))
    rows = torch.stack([matrix for matrix, _ in done])
    logs = torch.stack([log for _, log in done])
    return rows.reshape(len(rows), *batch.shape, -1), logs


def _tied(below: Sequence[Tensor]) -> Tensor:
    """Combinations of the rows of one or two children, column by column, the last child first."""
    if len(below) == 1:
        return below[0]
    one, other = below
    return (other.unsqueeze(2) * one.unsqueeze(1)).flatten(1, 2)


def climb(weight: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Every axis of weights ``(n, R_1, .., R_k, R)`` times ``(n, K_i, R_i)``: ``(n, K_k, .., K_1, R)``.

    An axis is brought to the front, where it is one long product per node, and stays there: children
    come out in reversed order.
    """
    out = weight
    for axis, factor in enumerate(factors, 1):
        turned = out.movedim(axis, 1)
        product = factor @ turned.reshape(len(out), turned.shape[1], -1)
        out = product.reshape(len(out), -1, *turned.shape[2:])
    return out


def _framed(batch: Batch, rows: Tensor, logs: Tensor, *, careful: bool = False) -> Frame | None:
    """A frame; ``None`` for columns of zeros or beyond what can be squared, unless ``careful``."""
    flat = rows.flatten(1, -2)
    gram = None
    if batch.rank < flat.shape[1] and not batch.root:
        gram = flat.mH @ flat
        square = gram.diagonal(dim1=1, dim2=2).real
    else:
        square = torch.linalg.vector_norm(flat, dim=1).square()
    if not careful and not bool(((square > _SQUARES[0]) & (square < _SQUARES[1])).all()):
        return None
    # columns are divided by the powers of two next to their norms
    power = torch.where(square > 0, square, torch.ones_like(square)).log2().div(2).round()
    scale, logs = torch.exp2(-power), logs + power
    if batch.root:
        return Frame.of(rows * scale.reshape(-1, *[1] * (rows.ndim - 1)), None, flat, logs)
    if gram is None:
        return Frame.of(None, None, flat * scale.unsqueeze(1), logs)
    lower, inverse, worst = _cholesky(gram * scale.unsqueeze(1) * scale.unsqueeze(2))
    turn = inverse.mH * scale.unsqueeze(2)
    if worst <= _WELL_CONDITIONED:
        return Frame.of(rows, turn, lower.mH, logs)
    if worst <= _FAIRLY_CONDITIONED:  # nearly orthonormal after the first time
        first = flat @ turn
        second, inverse, worst = _cholesky(first.mH @ first)
        if worst <= _WELL_CONDITIONED:
            return Frame.of(first.reshape(rows.shape), inverse.mH, second.mH @ lower.mH, logs)
    basis, triangle = torch.linalg.qr(flat * scale.unsqueeze(1))
    return Frame.of(basis.reshape(rows.shape), None, triangle, logs)


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor, float]:
    """Cholesky factors, their inverses, and the largest mean square of the inverses' columns."""
    lower, bad = torch.linalg.cholesky_ex(gram)
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse = torch.linalg.solve_triangular(lower, unit, upper=False)
    size = torch.linalg.vector_norm(inverse, dim=(1, 2)).square() / gram.shape[-1]
    worst = torch.where((bad == 0) & torch.isfinite(size), size, math.inf).max()
    return lower, inverse, float(worst)


def outside(
    network: Network, found: Sequence[Frame], *, squares: bool, vectors: bool
) -> list[Outside] | None:
    """From the root down: singular values of all nodes but the root, batch by batch.

    Args:
        network: The network.
        found: Its frames.
        squares: From Gram matrices. With ``vectors`` the squares are right to some eps of the tensor's
            squared norm; without, values must be above 1e-4 of the largest of their node, where they
            are right to 1e-11 of it: else there is no result.
        vectors: Singular vectors as well.

    Returns:
        One for every batch but the last, for the tensor divided by its norm; ``None`` if ``squares``
        were not enough.
    """
    parts = batches(network)
    pieces: list[list[tuple[tuple[int, ...], Tensor]]] = [[] for _ in parts]
    results: list[Outside] = []
    for b in reversed(range(len(parts))):
        batch, frame = parts[b], found[b]
        if batch.root:
            assert frame.rows is not None
            size = torch.linalg.vector_norm(frame.rows)
            block = frame.rows / torch.where(size > 0, size, torch.ones_like(size))
        else:
            given = _assembled(pieces[b])
            pieces[b] = []
            step = _from_squares if squares else _directly
            solved = step(given, batch, vectors)
            if solved is None:
                return None
            result, inner = solved
            results.append(result)
            if not batch.below:
                continue
            if frame.turn is not None:
                inner = frame.turn @ inner
            if frame.rows is not None:
                inner = frame.rows.flatten(1, -2) @ inner
            block = inner.reshape(len(inner), *batch.shape, -1)
        for axis, (child, slots) in enumerate(reversed(batch.below)):
            matrix = block.movedim(axis + 1, 1).flatten(2)
            if squares:
                pieces[child].append((slots, matrix @ matrix.mH))
            else:
                pieces[child].append((slots, _square(matrix)))
    return results[::-1]


def scale_of(found: Sequence[Frame]) -> tuple[Tensor, Tensor]:
    """The norm of the tensor as ``(size, power)``, ``size * 2**power``, with a moderate size."""
    assert found[-1].rows is not None
    size: Tensor = torch.linalg.vector_norm(found[-1].rows)
    return size, found[-1].logs[0, 0]


def _assembled(pieces: Sequence[tuple[tuple[int, ...], Tensor]]) -> Tensor:
    """What came from several parents or sides, in the order of the slots."""
    slots = [slot for places, _ in pieces for slot in places]
    whole = torch.cat([part for _, part in pieces]) if len(pieces) > 1 else pieces[0][1]
    if slots == sorted(slots):
        return whole
    order = sorted(range(len(slots)), key=slots.__getitem__)
    return whole[torch.tensor(order, device=whole.device)]


def _square(matrix: Tensor) -> Tensor:
    """A square matrix with the same left singular vectors and the same singular values."""
    rows, others = matrix.shape[1:]
    if others > rows:
        triangle: Tensor = torch.linalg.qr(matrix.mH, mode="r")[1]
        return triangle.mH
    return torch.nn.functional.pad(matrix, (0, rows - others))


def _from_squares(gram: Tensor, batch: Batch, vectors: bool) -> tuple[Outside, Tensor] | None:
    """Singular values from ``C Cᴴ``, and such a ``C``."""
    if vectors or batch.reach < batch.rank:
        found, turned = torch.linalg.eigh(gram)
        values, turned = found.clamp_min(0).sqrt().flip(1), turned.flip(2)
        values[:, batch.reach :] = 0
        if not vectors and _too_small(values, batch):
            return None
        return Outside(values, turned if vectors else None), turned * values.unsqueeze(1)
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(1)
    if not vectors and _too_small(values, batch):
        return None
    if not batch.below:
        return Outside(values, None), gram
    lower, bad = torch.linalg.cholesky_ex(gram)
    return None if bool(bad.any()) else (Outside(values, None), lower)


def _too_small(values: Tensor, batch: Batch) -> bool:
    return bool((values[:, batch.reach - 1] <= _GRAM_FLOOR * values[:, 0]).any())


def _directly(matrix: Tensor, batch: Batch, vectors: bool) -> tuple[Outside, Tensor]:
    """Singular values of ``C``, and ``C``."""
    if batch.step:
        return Outside(matrix.real[:, :0, 0], None), matrix
    if not vectors:
        return Outside(torch.linalg.svdvals(matrix), None), matrix
    left, values, _ = torch.linalg.svd(matrix)
    return Outside(values, left), left * values.unsqueeze(1)


def nodes_of(parts: Sequence[Batch]) -> Iterator[tuple[int, int, int]]:
    """``(position, batch, slot)`` of every node of the tree."""
    for b, batch in enumerate(parts):
        if not batch.step:
            for slot, node in enumerate(batch.nodes):
                yield node, b, slot
