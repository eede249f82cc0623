"""Orthonormal frames of all nodes of a factorization, and the singular values of all nodes in them.

Write ``F_v`` for the matrix of node v's tensors (entries below v by bond above v) and ``E_v`` for that of
everything outside v; the matricization at v is ``F_v E_vᵀ``. Going up the tree, ``F_v = U_v T_v`` is split
into orthonormal columns ``U_v``, of which only the coordinates in the frames of the children are kept, and
a triangular factor ``T_v``. Two ways lead down again:

- In the frames: the matricization at v is ``U_v C_v`` for a small ``C_v``, which has the singular values and
  left singular vectors of the node.
- Through the bonds: ``E_v = O_v S_v`` is split in the same way, and the spectrum is that of ``T_v S_vᵀ``. It
  stores no frames and is differentiable: to first order only the components of a change in the fixed bases
  ``U_v`` and ``O_v`` matter, so that no QR factorization is differentiated, which fails at low rank.

A bare leaf is its mode: its frame and its factor are identities, with which nothing is multiplied.

Scales are powers of two, so that they are exact and nothing leaves the range of the dtype. At first every
node has one. Where a column comes near the end of the range all is done again, with a scale per column.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from tnreg.machine.memory import must_fit
from tnreg.networks.network import Level, Network, Places, Stacked
from tnreg.tensors.arrays import Scaled, powers_below

# Numbers in all frames together (a GiB), and in those of one batch of several nodes.
_MOST_NUMBERS, _MOST_AT_ONCE = 2**27, 2**24
# Powers of two. Nodes whose norms are no further from 1 need no scale; where no column of products of such
# numbers is further from 1, nothing that shows in it can have left the range; half of the largest power.
_PLAIN = {torch.float64: 32, torch.float32: 8}
_MODERATE = {torch.float64: 332, torch.float32: 40}
_HALF = {torch.float64: 500, torch.float32: 63}
# The last steps before a root have one column above them. Up to so many times the bond it is cheaper to keep
# all rows of a step than to orthogonalize them.
_ROWS_KEPT = 4
# A GPU factors matrices of one QR call one after another: on an H100 64 of 256 x 16 take 3.4 ms, two passes
# of Gram matrices and Cholesky factors 0.36 ms; one matrix takes 0.13 ms by QR (docs/gpu.md).
_GRAM_FROM = 8


@dataclass(frozen=True)
class Batch:
    """Nodes with equal frames, or equal steps of them, handled by the same calls.

    A diagonal join of more than two children is made of steps that join two each; such a step has no
    weight and no node of its own.

    Attributes:
        nodes: Positions in ``tree.nodes``; for a step those of the nodes that it belongs to.
        weight: Where the weights are among the network's stacks; ``None`` for steps and a root of ones.
        below: For every child where its frames are: which batch, and which slot of it.
        bare: Which children are bare leaves.
        order: The children as the axes of frames have them: from the last one to the first, and bare leaves
            behind the others, but before another one under a diagonal join.
        shape: Sizes of the children's frames, in that order; of the mode at a leaf.
        bond: Size of the bond above.
        rank: Size of the frame: no more than the product of ``shape``, and than the bond but in steps.
        root: Whether it is the root, which has no frame.
    """

    nodes: tuple[int, ...]
    step: bool
    join: str
    weight: Places | None
    below: tuple[Places, ...]
    bare: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    bond: int
    rank: int
    root: bool

    @property
    def fixed(self) -> bool:
        """Whether it has no bond that rounding can cut: steps, bare leaves and the root."""
        return self.step or self.root or self.join == "bare"

    @property
    def numbers(self) -> int:
        """Numbers in the nodes' tensors over the frames of their children."""
        return 0 if self.join == "bare" else len(self.nodes) * math.prod(self.shape) * self.bond


@dataclass(frozen=True)
class Frame:
    """Frames of a batch, and the factors ``T_v``.

    ``rows`` are the frames' orthonormal columns in the frames of the children, ``(nodes, *shape, rank)``;
    ``None`` where a frame is all of that space, or not kept. At the root they are the tensor itself.
    ``factor`` is ``(nodes, rank, bond)``, with a scale ``(nodes, 1)``, or ``(nodes, bond)`` for every column;
    ``None`` at bare leaves.
    """

    rows: Tensor | None
    factor: Scaled | None


@dataclass(frozen=True)
class Values:
    """Singular values ``(nodes, count)`` of a batch, descending, for a tensor of norm 1.

    With left singular vectors in the frame, ``(nodes, rank, rank)``, the count is the rank. None at steps,
    and at bare leaves none with vectors.
    """

    values: Tensor
    vectors: Tensor | None


@lru_cache(maxsize=64)
def batches(network: Network) -> tuple[Batch, ...]:
    """Group the nodes of a network into batches, children before parents; the root is the last one."""
    parts: list[Batch] = []
    last: list[int] = []  # for every level its batch that is no step
    for level in network.split_levels(_kinds(network)):
        below = [Places.of([(last[b], slot) for b, slot in child.pairs]) for child in level.children]
        while level.join == "diagonal" and len(below) > 2:
            pairs, below = [below[k : k + 2] for k in range(0, len(below), 2)], []
            for pair in pairs:
                if len(pair) == 2:
                    parts.append(_batch(network, level, parts, pair, step=True))
                    every = [(len(parts) - 1, slot) for slot in range(len(level.positions))]
                    pair = [Places.of(every)]
                below += pair
        parts.append(_batch(network, level, parts, below, step=False))
        last.append(len(parts) - 1)
    return tuple(parts)


def _batch(
    network: Network, level: Level, parts: Sequence[Batch], below: Sequence[Places], *, step: bool
) -> Batch:
    """Describe the nodes of a level, or a step of them, over batches that are there already."""
    at_root = level.positions[-1] == len(network.joins) - 1
    bond = level.shape[0] if step else network.bonds[level.positions[0]]
    children = [parts[child.pairs[0][0]] for child in below]
    bare = tuple(k for k, child in enumerate(children) if child.join == "bare")
    order = [k for k in reversed(range(len(children))) if k not in bare]
    if level.join == "full":
        order += bare
    else:  # the last of two is multiplied last, or not at all
        order = [*reversed(bare), *order]
    shape = tuple(children[k].rank for k in order) or level.shape[:1]
    rows = math.prod(shape)
    keep = step and at_root and rows <= _ROWS_KEPT * bond
    return Batch(
        level.positions, step, level.join, None if step else level.weight, tuple(below), bare, tuple(order),
        shape, bond, rows if keep else min(rows, bond), at_root and not step,
    )  # fmt: skip


def _kinds(network: Network) -> list[Hashable]:
    """Label the nodes so that those of one label have equal frames and are not too many."""
    numbers: dict[Hashable, int] = {}
    counts: dict[int, int] = {}
    ranks, kinds = list[int](), list[Hashable]()
    for i, links in enumerate(network.tree.links):
        bond = network.bonds[i]
        rows = math.prod(ranks[c] for c in links) if links else network.shape(i)[0]
        ranks.append(min(rows, bond))
        number = numbers.setdefault(
            (network.joins[i], network.shape(i), rows, *(kinds[c] for c in links)), len(numbers)
        )
        counts[number] = counts.get(number, -1) + 1
        if network.joins[i] == "diagonal":  # two children at a time
            rows = min(rows, network.bonds[links[0]] ** 2)
        kinds.append((number, counts[number] // max(_MOST_AT_ONCE // (rows * bond), 1)))
    return kinds


def frames_fit(network: Network) -> bool:
    """Return whether frames of all nodes fit into memory together; those of wide diagonal joins may not."""
    return sum(batch.numbers for batch in batches(network)) <= _MOST_NUMBERS


def frames(network: Network, stacks: Sequence[Tensor], *, bases: bool = True) -> list[Frame]:
    """Compute the frames of all batches, leaves first, from stacks of weights.

    Without ``bases`` the factors alone are kept. They are differentiable in the weights.
    """
    found, furthest = _frames(network, stacks, bases, by_column=False)
    if bool(torch.stack(furthest).amax() < _MODERATE[stacks[0].real.dtype]):
        return found
    return _frames(network, stacks, bases, by_column=True)[0]


def _frames(
    network: Network, stacks: Sequence[Tensor], bases: bool, by_column: bool
) -> tuple[list[Frame], list[Tensor]]:
    """Compute frames on scales of the columns or of the nodes; and how far their products are from 1."""
    numbers = [batch.numbers for batch in batches(network)]
    needed = max(numbers) * 6 + sum(numbers) * bases  # the largest is copied, factored and multiplied
    must_fit("the frames of a factorization", [(needed,)], stacks[0].dtype, stacks[0].device)
    weights, factors, results = Stacked(stacks), _Factors(), list[Frame]()
    products: dict[torch.Size, list[Scaled]] = {}
    for batch in batches(network):
        if batch.join == "bare":
            results.append(Frame(None, None))
            factors.append(None)
            continue
        below = factors.below(batch)
        rows, log2 = _join(batch, _weight(batch, weights, below), below, by_column, stacks[0])
        flat, basis = rows.flatten(1, -2), None
        if batch.rank < flat.shape[1] and not batch.root:
            basis, flat = orthogonalize(flat, basis=bases)
        flat, more = _rescale(flat, by_column)
        if batch.root:
            basis = flat.clone()  # may be the weight itself
        elif not bases:
            basis = None
        factor = Scaled(flat, log2 + more)
        results.append(Frame(None if basis is None else basis.reshape(*rows.shape[:-1], -1), factor))
        factors.append(factor)
        products.setdefault(flat.shape[1:], []).append(Scaled(flat, more))
    furthest = []
    for group in products.values():  # equal ones of a chain together
        x, log2 = group[0] if len(group) == 1 else map(torch.cat, zip(*group, strict=True))
        furthest.append(_furthest(x, log2))
    return results, furthest


def orthogonalize(matrix: Tensor, *, basis: bool = True) -> tuple[Tensor, Tensor]:
    """Factor matrices ``(n, rows, columns)`` into an orthonormal basis and coordinates in it.

    The basis is a constant to autograd, and may be empty if it is not asked for.
    """
    fixed = matrix.detach()
    factors = by_gram(fixed) if _gram_pays(matrix) else None
    if matrix.requires_grad:
        q = torch.linalg.qr(fixed)[0] if factors is None else factors[0]
        return q, q.mH @ matrix
    return tuple(torch.linalg.qr(matrix, mode="reduced" if basis else "r")) if factors is None else factors


def _gram_pays(matrix: Tensor) -> bool:
    """Return whether Gram matrices are faster, if they suffice: on a GPU, for some matrices at once."""
    return matrix.is_cuda and len(matrix) >= _GRAM_FROM and matrix.shape[1] >= matrix.shape[2]


def by_gram(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factor tall matrices ``(n, rows, columns)`` as QR does, by Cholesky factors of their Gram matrices.

    A second pass over what the first one leaves makes it as accurate as QR (Yamamoto, Nakatsukasa,
    Yanagisawa and Fukaya 2015). Return ``None`` where the first pass is far from orthonormal: columns
    depend on each other, or squares leave the range.
    """
    eye = torch.eye(matrix.shape[2], dtype=matrix.dtype, device=matrix.device)
    first = torch.linalg.cholesky_ex(matrix.mH @ matrix)[0].mH
    q = torch.linalg.solve_triangular(first, matrix, upper=True, left=False)
    gram = q.mH @ q
    if not bool((torch.linalg.matrix_norm(gram - eye) < 0.5).all()):
        return None
    second = torch.linalg.cholesky_ex(gram)[0].mH
    return torch.linalg.solve_triangular(second, q, upper=True, left=False), second @ first


class _Factors:
    """Factors ``(nodes, rows, bond)`` of batches, from which those below others are picked."""

    def __init__(self, found: Sequence[Frame] = ()) -> None:
        self.x, self.log2 = Stacked(), Stacked()
        for frame in found:
            self.append(frame.factor)

    def append(self, factor: Scaled | None) -> None:
        x, log2 = factor or (torch.empty(0),) * 2  # of bare leaves nothing is picked
        self.x.append(x)
        self.log2.append(log2)

    def below(self, batch: Batch) -> list[Scaled | None]:
        """Return the factors of a batch's children; ``None`` for bare leaves."""
        return [
            None if k in batch.bare else Scaled(self.x.pick(child), self.log2.pick(child))
            for k, child in enumerate(batch.below)
        ]


def _weight(batch: Batch, weights: Stacked, below: Sequence[Scaled | None]) -> Tensor | None:
    """Return the weights of a batch, ``(nodes, .., bond)``; ``None`` for a step."""
    if batch.step:
        return None
    if batch.weight is None:  # a root of ones
        factor = next(child.x for child in below if child is not None)
        return factor.new_ones(1, factor.shape[-1], 1)
    weight = weights.pick(batch.weight)
    return weight.unsqueeze(-1) if batch.root else weight  # the root's has no bond above it


def _join(
    batch: Batch, weight: Tensor | None, below: Sequence[Scaled | None], by_column: bool, like: Tensor
) -> Scaled:
    """Combine the rows of a batch's children through its weights: ``(nodes, *shape, bond)``."""
    if batch.join != "diagonal":
        assert weight is not None
        rows, log2 = _through(weight, below, by_column)
        return Scaled(rows.reshape(len(rows), *batch.shape, -1), log2)
    below = [below[k] for k in reversed(batch.order)]
    bare = weight is not None and below[-1] is None and not by_column
    factors = _with_identities(below[:-1] if bare else below, batch, like)
    if weight is None:
        rows, log2 = _tie(factors)
    elif len(below) == 2 and (bare or weight.shape[-1] < batch.shape[0]):
        # the last child has more rows than there are columns, or is bare: it is multiplied last, if at all
        weight = factors[0].x.mT.unsqueeze(3) * weight.unsqueeze(2)
        rest = [Scaled(child.x, factors[0].log2 + child.log2) for child in factors[1:]]
        rows, log2 = _through(weight, rest, by_column) if rest else Scaled(weight, factors[0].log2)
    else:
        rows, log2 = _through(weight, [_tie(factors)] if factors else [], by_column)
    return Scaled(rows.reshape(len(rows), *batch.shape, -1), log2)


def _with_identities(below: Sequence[Scaled | None], batch: Batch, like: Tensor) -> list[Scaled]:
    """Put the identities that bare leaves under a diagonal join stand for in their places."""
    whole = list[Scaled]()
    for child in below:
        if child is None:
            nodes, size = len(batch.nodes), batch.shape[batch.order.index(batch.bare[0])]
            eye = torch.eye(size, dtype=like.dtype, device=like.device).expand(nodes, -1, -1)
            child = Scaled(eye, like.real.new_zeros(nodes, 1))
        whole.append(child)
    return whole


def _tie(below: Sequence[Scaled]) -> Scaled:
    """Combine the rows of one or two children column by column, the last child's first."""
    if len(below) == 1:
        return below[0]
    first, last = below
    rows = last.x.unsqueeze(2) * first.x.unsqueeze(1)
    return Scaled(rows.flatten(1, 2), first.log2 + last.log2)


def _through(weight: Tensor, below: Sequence[Scaled | None], by_column: bool) -> Scaled:
    """Combine rows ``(n, K_i, R_i)`` of children through weights ``(n, R_1, .., R_k, R)``, see ``climb``.

    Where columns have scales, the weights take them over, so that nothing can leave the range, at the cost
    of a logarithm of every weight. Scales are then ``(n, R)``, else ``(n, 1)``.
    """
    factors = [None if child is None else child.x for child in below]
    logs = [(axis, child.log2) for axis, child in enumerate(below, 1) if child is not None]
    if not by_column:
        total = reduce(torch.add, (log2 for _, log2 in logs)) if logs else weight.real.new_zeros(1, 1)
        return Scaled(climb(weight, factors), total)
    total = weight.real.new_zeros(len(weight), *[1] * (weight.ndim - 1))
    for axis, log2 in logs:
        total = total + log2.reshape(len(log2), *[-1 if k == axis else 1 for k in range(1, weight.ndim)])
    size = (weight.detach().abs().log2() + total).flatten(1, -2).amax(1)
    top = torch.where(torch.isfinite(size), size, torch.zeros_like(size)).round()
    apart = total - top.reshape(len(top), *[1] * (weight.ndim - 2), -1)
    half = torch.exp2((apart / 2).clamp(max=_HALF[apart.dtype]))  # twice, as the whole power may overflow
    return Scaled(climb(weight * half * half, factors), top)


def climb(weight: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Multiply every axis of weights ``(n, R_1, .., R_k, R)`` by ``(n, K_i, R_i)``, or not: ``None``.

    An axis is brought to the front, where it is one long product per node, and stays there; the others are
    left behind: ``(n, K_k, .., K_1, *others, R)``.
    """
    for axis, factor in enumerate(factors, 1):
        if factor is not None:
            turned = weight.movedim(axis, 1)
            product = factor @ turned.reshape(len(turned), turned.shape[1], -1)
            weight = product.reshape(len(turned), -1, *turned.shape[2:])
    return weight


def climb_back(batch: Batch, block: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Multiply frames ``(n, *shape, R)`` by factors ``(n, K_i, ..)`` of children: ``(n, K_1, .., K_k, R)``.

    ``None`` stands for an identity.
    """
    block = climb(block, [factors[k] for k in batch.order])
    order = [k for k in reversed(batch.order) if factors[k] is not None]
    order += [k for k in batch.order if factors[k] is None]
    if order == sorted(order):
        return block
    return block.permute(0, *(1 + order.index(k) for k in range(len(order))), -1)


def _rescale(matrix: Tensor, by_column: bool) -> Scaled:
    """Divide matrices, or their columns, by the powers of two below their largest magnitudes.

    Matrices of moderate norms stay as they are. Reads.
    """
    if not by_column:
        norms = torch.linalg.vector_norm(matrix.detach(), dim=(1, 2)).tolist()
        plain = 2.0 ** _PLAIN[matrix.real.dtype]
        if all(1 / plain < norm < plain for norm in norms):
            return Scaled(matrix, matrix.real.new_zeros(len(norms), 1))
    sizes = matrix.detach().abs().amax(1)
    log2 = powers_below(sizes if by_column else sizes.amax(1, keepdim=True))
    return Scaled(matrix * torch.exp2(-log2).unsqueeze(1), log2)


def _furthest(x: Tensor, log2: Tensor) -> Tensor:
    """Return how far the columns of products ``x * 2**log2`` are from 1, as a power of two; see ``_rescale``.

    Beyond ``_MODERATE`` they may have left the range.
    """
    return (x.detach().abs().amax(1).log2() + log2).abs().amax()


def values_in_frames(network: Network, found: Sequence[Frame], *, vectors: bool = False) -> list[Values]:
    """Compute singular values of all nodes but the root in their frames, from the root down.

    Return values, and vectors if asked for, of every batch but the last, for the tensor divided by its norm.
    """
    parts = batches(network)
    pieces = [_Pieces() for _ in parts]
    results: list[Values] = []
    for b in reversed(range(len(parts))):
        batch, rows = parts[b], found[b].rows
        if batch.root:
            assert rows is not None
            size = torch.linalg.vector_norm(rows)
            block = rows / torch.where(size > 0, size, torch.ones_like(size))
            none = Values(size.new_zeros(len(rows), 0), None)
        elif batch.join == "bare" and vectors:
            results.append(none)
            continue
        else:
            inner = pieces[b].assemble()
            if batch.step:
                results.append(none)
            elif vectors:
                left, values, _ = torch.linalg.svd(inner)
                count = values.shape[1]
                results.append(Values(pad(values, (0, left.shape[2] - count)), left))
                inner = left[..., :count] * values.unsqueeze(1)
            else:
                results.append(Values(torch.linalg.svdvals(inner), None))
            if rows is not None:
                inner = rows.flatten(1, -2) @ inner
            block = inner.reshape(len(inner), *batch.shape, -1)
        for axis, k in enumerate(batch.order, 1):
            if vectors and k in batch.bare:
                continue
            matrix = block.movedim(axis, 1).flatten(2)
            if matrix.shape[2] > matrix.shape[1]:  # a square one has the same values, left vectors
                matrix = orthogonalize(matrix.mH, basis=False)[1].mH
            pieces[batch.below[k].pairs[0][0]].add(batch.below[k], matrix)
    return results[::-1]


def vectors_by_squares(network: Network, found: Sequence[Frame]) -> list[Values]:
    """Return what ``values_in_frames`` does with vectors, by squares: about half the time.

    The Gram matrix of node v in its frame, ``C_v C_v^H``, is a sum over that of the node above. What rounding
    makes of it adds up along the tree: squares of values are off by some eps times the tree's height.
    """
    parts = batches(network)
    pieces = [_Pieces() for _ in parts]
    top = found[-1].rows
    assert top is not None
    grams: dict[int, list[tuple[int, Tensor]]] = {}  # of equal sizes, by batch
    for b in reversed(range(len(parts))):
        batch, rows = parts[b], found[b].rows
        if batch.join == "bare":
            continue
        if batch.root:
            size = torch.linalg.vector_norm(top)
            rows = half = top / torch.where(size > 0, size, torch.ones_like(size))
        else:
            gram = pieces[b].assemble()
            if not batch.step:
                grams.setdefault(batch.rank, []).append((b, gram))
            if not batch.below:
                continue
            if rows is None:
                eye = torch.eye(batch.rank, dtype=gram.dtype, device=gram.device)
                rows, half = eye.reshape(1, *batch.shape, -1).expand(len(gram), *batch.shape, -1), gram
            else:
                half = rows.flatten(1, -2) @ gram
            half = half.reshape(rows.shape)
        for axis, k in enumerate(batch.order, 1):
            if k not in batch.bare:
                matrices = [x.movedim(axis, 1).flatten(2) for x in (half, rows)]
                pieces[batch.below[k].pairs[0][0]].add(batch.below[k], matrices[0] @ matrices[1].mH)
    results = [Values(top.real.new_zeros(1, 0), None)] * (len(parts) - 1)
    for group in grams.values():  # equal ones of a chain together
        squares, vectors = torch.linalg.eigh(torch.cat([gram for _, gram in group]))
        values, vectors = squares.flip(1).clamp_min(0).sqrt(), vectors.flip(2)
        counts = [len(gram) for _, gram in group]
        for (b, _), *own in zip(group, values.split(counts), vectors.split(counts), strict=True):
            results[b] = Values(*own)
    return results


def values_through_bonds(network: Network, stacks: Sequence[Tensor]) -> list[tuple[tuple[int, ...], Scaled]]:
    """Compute singular values of all nodes but the root, differentiable in the weights.

    Return some nodes' positions and their values ``(nodes, count)`` with scales ``(nodes, 1)``, again and
    again, together for every node but the root.
    """
    results, safe = _through_bonds(network, stacks, by_column=False)
    return results if safe else _through_bonds(network, stacks, by_column=True)[0]


def _through_bonds(
    network: Network, stacks: Sequence[Tensor], by_column: bool
) -> tuple[list[tuple[tuple[int, ...], Scaled]], bool]:
    """Compute ``values_through_bonds`` on scales of columns or nodes; and whether all stayed in range."""
    parts, weights = batches(network), Stacked(stacks)
    found, furthest = _frames(network, stacks, False, by_column)
    factors = _Factors(found)
    matrices, scales = [_Pieces() for _ in parts], [_Pieces() for _ in parts]
    results = []

    def moderate(rows: Tensor) -> Scaled:
        rows, log2 = _rescale(rows, by_column)
        furthest.append(_furthest(rows, log2))
        return Scaled(rows, log2)

    def around(batch: Batch, below: Sequence[Scaled | None], above: Scaled) -> list[list[Scaled]]:
        """List for every child one or two factors whose rows, combined, are all that is outside it."""
        weight = _weight(batch, weights, below)
        if batch.join == "full":
            assert weight is not None
            rest = [[*below[:k], *below[k + 1 :], above] for k in range(len(below))]
            return [[through(weight.movedim(k, -1), others)] for k, others in enumerate(rest, 1)]
        if weight is not None:
            above = through(weight.mT, [above])
        whole = _with_identities(below, batch, stacks[0])
        return [[*whole[:k], *whole[k + 1 :], above] for k in range(len(whole))]

    def through(weight: Tensor, below: Sequence[Scaled | None]) -> Scaled:
        rows, log2 = _through(weight, below, by_column)
        rows, more = moderate(rows.flatten(1, -2))
        return Scaled(rows, log2 + more)

    for b in reversed(range(len(parts))):
        batch = parts[b]
        if not batch.below:
            continue
        below = factors.below(batch)
        above = Scaled(stacks[0].new_ones(1, 1, 1), stacks[0].real.new_zeros(1, 1))
        if not batch.root:
            above = Scaled(matrices[b].assemble().mT, scales[b].assemble())
        for place, own, outside in zip(batch.below, below, around(batch, below, above), strict=True):
            child = place.pairs[0][0]
            product, log2 = _multiply(own, outside)
            furthest.append(_furthest(product.flatten(1).unsqueeze(2), log2.new_zeros(1, 1)))
            if not parts[child].step:
                nodes = tuple(parts[child].nodes[slot] for _, slot in place.pairs)
                results.append((nodes, Scaled(torch.linalg.svdvals(product), log2)))
            if parts[child].below:  # only what meets the node itself is of use further down
                basis = orthogonalize(product.detach().mT)[0]
                rows, log2 = _tie(outside[::-1])
                rows, more = moderate(basis.mH @ rows)
                matrices[child].add(place, rows.mT)
                scales[child].add(place, log2 + more)
    return results, bool(torch.stack(furthest).amax() < _MODERATE[stacks[0].real.dtype])


def _multiply(own: Scaled | None, outside: Sequence[Scaled]) -> Scaled:
    """Sum two or three factors over their columns: ``(n, rows of the first, all other rows)``.

    The first one may be an identity, ``None``.
    """
    if own is None:
        rows, log2 = _tie(outside)
        high = log2.amax(1, keepdim=True)
        return Scaled((rows * torch.exp2(log2 - high).unsqueeze(1)).mT, high)
    factors = [own, *outside]
    order = sorted(range(len(factors)), key=lambda k: factors[k].x.shape[1])
    rows, log2 = _tie([factors[k] for k in reversed(order[:-1])])
    longest = factors[order[-1]]  # multiplied last: no combinations of its rows are formed
    log2 = log2 + longest.log2
    high = log2.amax(1, keepdim=True)
    product = (rows * torch.exp2(log2 - high).unsqueeze(1)) @ longest.x.mT
    product = product.reshape(len(product), *(factors[k].x.shape[1] for k in order))
    turned = product.permute(0, *(1 + order.index(k) for k in range(len(order))))
    return Scaled(turned.flatten(2), high)


def scale_of(found: Sequence[Frame]) -> Scaled:
    """Return the norm of the tensor."""
    rows, factor = found[-1].rows, found[-1].factor
    assert rows is not None and factor is not None
    return Scaled(torch.linalg.vector_norm(rows), factor.log2[0, 0])


class _Pieces:
    """What the nodes of a batch get from several parents or sides."""

    def __init__(self) -> None:
        self._slots, self._parts = list[int](), list[Tensor]()

    def add(self, places: Places, part: Tensor) -> None:
        self._slots += [slot for _, slot in places.pairs]
        self._parts.append(part)

    def assemble(self) -> Tensor:
        """Return all of it in the order of the slots, and forget it; short rows are filled up with zeros."""
        parts, self._parts = self._parts, []
        most = max(part.shape[-1] for part in parts)
        parts = [part if part.shape[-1] == most else pad(part, (0, most - part.shape[-1])) for part in parts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self._slots == sorted(self._slots):
            return whole
        return whole[sorted(range(len(whole)), key=self._slots.__getitem__)]
