"""Rounding of a network between its singular vectors: ``truncate``, and the end of ``decompose``."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tnreg.errors import DataError, OptionError, check_integer, check_number
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.memory import must_fit
from tnreg.networks.network import Network, Stacked
from tnreg.ranks.budget import Budget, Choice, Chooser
from tnreg.ranks.frames import (
    Batch,
    Frame,
    Values,
    batches,
    climb_back,
    frames,
    scale_of,
    values_in_frames,
    vectors_by_squares,
)
from tnreg.tensors.arrays import double, exact_scales, largest_of, power_below, single_of, times_power_of_two
from tnreg.tensors.axes import rounding_rtol
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

# Choices tried for one with an error just below what is allowed, single steps tried after that, and the
# share of the error allowed that is enough. With so few cuts also steps are tried that seem to be too large.
_TRIES, _STEPS, _ENOUGH, _FEW = 5, 24, 0.99, 16
# Above this tolerance squares of singular values are as good as the values: what rounding hides in them is
# less than a part in a million of what is cut, and the error is measured.
_BY_SQUARES, _DOUBLE = 1e-4, torch.finfo(torch.float64).eps
# A basis made of its Gram matrix is orthonormal to rounding if no column is this much shorter than before.
_SHORT = 0.1


@dataclass(frozen=True)
class Rounded:
    """A rounded network: the tensor of the ``weights``, by position, times ``2**log2``.

    The norm before was ``size * 2**log2``; ``lost`` is the square of the error as a share of its square.
    """

    weights: dict[int, Tensor]
    lost: float
    size: float
    log2: float


def round_network(
    net: Network, stacks: Sequence[Tensor], budget: Budget, power: float = 0.0, *, dtype: torch.dtype
) -> Rounded:
    """Round a network in orthonormal frames, equal nodes together.

    All weights but the root's have orthonormal columns, and the tensor is an orthogonal projection of what
    it was. So its squared error is a difference of squared norms.

    Args:
        net: The network.
        stacks: Its weights, in the precision of the work.
        budget: What the result may have.
        power: That of two that their tensor is to be multiplied by.
        dtype: That of the numbers before they were brought to this precision.
    """
    found, eps = frames(net, stacks), torch.finfo(stacks[0].dtype).eps
    size, log2 = map(float, scale_of(found))
    log2 += power
    budget = budget.relative(size, log2)
    by_squares = budget.share is not None and budget.share > _BY_SQUARES * math.sqrt(eps / _DOUBLE)
    own = vectors_by_squares(net, found) if by_squares else values_in_frames(net, found, vectors=True)
    results = _match_root(net, found, own)
    chooser = _chooser(net, results, budget, dtype, stacks[0].dtype)
    # what rounding may hide in a difference of squared norms
    hidden = 4 * eps * (len(net.tree.nodes) + 16)

    def bare_of(choice: Choice) -> frozenset[int]:
        return frozenset(choice.bare.nonzero()[0].tolist())

    def attempt(choice: Choice) -> _Attempt:
        ranks, bare = chooser.by_position(choice), bare_of(choice)
        projection = _Projection(net, found, results, ranks, bare)
        if not projection.sound:
            projection = _Projection(net, found, results, ranks, bare, by_gram=False)
        bound, lost = chooser.bound(choice), projection.lost + hidden
        return _Attempt(choice, projection, lost if by_squares and bound else min(bound, lost))

    allowed, most = (budget.share or 0.0) ** 2, budget.numbers or math.inf
    choice = chooser.largest()
    if budget.share and choice.spent < allowed:  # else limits on ranks cut more
        first = _spend(chooser, attempt, allowed, allowed)
        spent, numbers = max(first.choice.spent, allowed), lambda attempt: attempt.choice.numbers
        unspent, steps = first.lost < _ENOUGH**2 * allowed, None
        if _adds_up(chooser, first):
            unspent, steps = False, int(unspent)
        others = chooser.others(first.choice, steps=steps, unspent=unspent)
        tried = [first, *(_spend(other, attempt, allowed, spent) for other in others)]
        best = min((_step(chooser, attempt, allowed, a) for a in sorted(tried, key=numbers)[:2]), key=numbers)
    else:
        best = attempt(choice if choice.numbers <= most else chooser.fitting(most))
    if best.choice.numbers > most:
        best = attempt(chooser.fitting(most))
    found.clear()  # what takes its place needs as much memory
    weights = best.projection.weights()
    if chooser.idle(best.choice) and (budget.share is None or budget.share > 0):
        # in double precision, as nothing is to be lost
        exact = network_of(net.tree, {i: double(weight) for i, weight in weights.items()})
        again = round_network(*exact, Budget(bare=bare_of(best.choice)), dtype=torch.float64)
        return Rounded(again.weights, best.lost, size * 2.0**-again.log2, log2 + again.log2)
    return Rounded(weights, best.lost, size, log2)


class _Attempt(NamedTuple):
    """A choice of ranks, the projection that it makes, and its squared error."""

    choice: Choice
    projection: _Projection
    lost: float


def _adds_up(chooser: Chooser, found: _Attempt) -> bool:
    """Return whether the error is all of the squares that were cut, so that nothing was counted twice."""
    return found.lost >= _ENOUGH**2 * chooser.bound(found.choice)


def _spend(
    chooser: Chooser, attempt: Callable[[Choice], _Attempt], allowed: float, squares: float
) -> _Attempt:
    """Cut as many squares as the error allows that this makes, at first so many.

    They count a part of the tensor again for every node that cuts it.
    """
    best, low, high = None, (0.0, 0.0), (math.inf, math.inf)
    for _ in range(_TRIES):
        choice = chooser.within(squares)
        found = best if best and chooser.same(choice, best.choice) else attempt(choice)
        if found.lost <= allowed:
            best, low = found, (squares, found.lost)
        else:
            high = (squares, found.lost)
        if best and not (0 < best.lost < _ENOUGH**2 * allowed and not _adds_up(chooser, best)):
            break
        if high[0] < 1.005 * low[0]:
            break
        goal = (1 + _ENOUGH**2) / 2 * allowed
        if high[0] == math.inf:
            squares = low[0] * min(max(goal / low[1], 1.01), 4.0)
        else:
            part = (goal - low[1]) / (high[1] - low[1])
            squares = low[0] + (high[0] - low[0]) * min(max(part, 0.1), 0.9)
    return best or attempt(chooser.largest())


def _step(
    chooser: Chooser, attempt: Callable[[Choice], _Attempt], allowed: float, best: _Attempt
) -> _Attempt:
    """Bring single ranks down by one, where the error is still smaller than it might be."""
    refused = set[int]()
    for _ in range(_STEPS):
        step = None
        if 0 < best.lost < _ENOUGH**2 * allowed:
            step = chooser.step(best.choice, best.lost, allowed, refused)
        if step is None:
            break
        cut, choice = step
        before, more = chooser.bound(best.choice), chooser.bound(choice)
        if len(choice.ranks) > _FEW and best.lost * (1 + 0.98 * (more / before - 1)) > allowed:
            break  # those that seem to fit come first
        found = attempt(choice)
        if found.lost <= allowed:
            best = found
        else:
            refused.add(cut)
    return best


def _match_root(net: Network, found: Sequence[Frame], results: Sequence[Values]) -> Sequence[Values]:
    """Pair the singular vectors of a binary root's second child with its sibling's.

    They have to belong to the same singular values; computed apart they need not, where values are equal.
    """
    ends = [i for i in net.tree.cuts[-1] if i not in net.bare]
    if len(ends) < 2:
        return results
    (b0, slot0), (b1, slot1) = (
        (b, batch.nodes.index(node))
        for node in ends
        for b, batch in enumerate(batches(net))
        if not batch.fixed and node in batch.nodes
    )
    core, first, second = found[-1].rows, results[b0].vectors, results[b1].vectors
    assert core is not None and first is not None and second is not None
    core = core.reshape(second.shape[-1], first.shape[-1])  # the last child's axis comes first
    # columns are in order of their singular values: the first k of Q span what the first k of them do
    changed = second.clone()
    changed[slot1] = torch.linalg.qr(core @ first[slot0].conj(), mode="complete")[0]
    return [Values(r.values, changed) if b == b1 else r for b, r in enumerate(results)]


def _chooser(
    net: Network, results: Sequence[Values], budget: Budget, dtype: torch.dtype, work: torch.dtype
) -> Chooser:
    """Prepare the choice of ranks: what the values of all cuts are, and how many may be kept at most."""
    values, most = dict[int, Any](), dict[int, int]()
    for batch, part in zip(batches(net), results, strict=False):
        if not batch.fixed:
            values |= zip(batch.nodes, double(part.values).cpu().numpy(), strict=True)
            most |= {node: min(batch.rank, budget.limits.get(node, batch.rank)) for node in batch.nodes}
    cuts = [[i for i in cut if i not in net.bare] for cut in net.tree.cuts]  # what is above bare leaves stays
    kept = [min((most[i] for i in cut), default=1) for cut in cuts]
    spectra = [values[cut[0]] if cut else np.ones(1) for cut in cuts]
    if budget.share is None:
        zero = rounding_rtol(None, dtype, work)
        kept = [min(k, int((s > zero * s[0]).sum())) for k, s in zip(kept, spectra, strict=True)]
    for k, cut in enumerate(cuts if budget.parts else ()):
        parts = [budget.parts[i] for i in cut if i in budget.parts]
        if parts:
            kept[k] = min(kept[k], int((np.cumsum(spectra[k][::-1] ** 2) > min(parts) ** 2).sum()))
    # rounded up by what rounding may hide, unless nothing may be discarded anyway
    slack = 4 * torch.finfo(work).eps if budget.share else 0.0
    squares, most_kept = [(s + slack) ** 2 for s in spectra], [max(k, 1) for k in kept]
    bare, free = budget.bare | net.bare, budget.free - net.bare
    return Chooser(net.tree, net.sizes, squares, most_kept, bare, free)


class _Projection:
    """The tensor in nested spaces: at every node of its first singular vectors, as far as the children go.

    Nodes of a batch have the largest rank among them first, with zeros beyond their own. Nodes at which
    nothing is cut keep their frames. ``lost`` is the square of the error as a share of that of the norm.

    Args:
        net: The network.
        found: Its frames.
        results: Its singular vectors in them.
        ranks: By position; modes at bare leaves.
        bare: Positions of the leaves that get no weight.
        by_gram: Whether bases are made of their Gram matrices. They may be far from orthonormal then, which
            makes the projection not ``sound``.
    """

    def __init__(
        self,
        net: Network,
        found: Sequence[Frame],
        results: Sequence[Values],
        ranks: Sequence[int],
        bare: Collection[int],
        by_gram: bool = True,
    ) -> None:
        self._net, self._ranks, self._bare = net, ranks, bare
        self._blocks: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        diagonals = list[Tensor]()
        inside = Stacked()  # frames in the spaces, (nodes, rank, size of the frame)
        whole, plain = list[bool](), list[bool]()  # which of them are identities, and which have lost nothing
        axes_of: list[list[int]] = []  # what the first of those axes stands for
        parts = batches(net)
        for b, batch in enumerate(parts):
            if batch.join == "bare":
                inside.append(torch.empty(0))
                whole.append(True)
                plain.append(True)
                axes_of.append([batch.bond])
                continue
            below = [child.pairs[0][0] for child in batch.below]
            sizes = [  # the largest of this child; others of its batch may be larger
                axes_of[c]
                if parts[c].step or whole[c]
                else [max(ranks[parts[c].nodes[slot]] for _, slot in child.pairs)]
                for c, child in zip(below, batch.below, strict=True)
            ]
            axes = [size for child in sizes for size in child] or list(batch.shape)
            own, empty = [min(ranks[i], batch.rank) for i in batch.nodes], [i in bare for i in batch.nodes]
            vectors = None
            if not (batch.step or batch.root) and min(own) < batch.rank:
                vectors = results[b].vectors
                assert vectors is not None
                vectors = _mask(vectors, own)
            before = all(plain[c] for c in below)
            block = _in_frame(batch, found[b], vectors if before else None)
            if len(axes) > 2:
                node, children = net.tree.nodes[batch.nodes[0]], len(net.tree.links[batch.nodes[0]])
                must_fit(
                    f"rounding: the core of node {node!r}, {children} children,",
                    [(len(block), *axes, block.shape[-1])], block.dtype, block.device,
                    "use a tree with fewer children per node, or smaller ranks", copies=3,
                )  # fmt: skip
            factors = [
                None if whole[c] else inside.pick(child)[:, : math.prod(size)]
                for c, child, size in zip(below, batch.below, sizes, strict=True)
            ]
            block, triangle = climb_back(batch, block, factors).flatten(1, -2), None
            turned = block
            if batch.step or batch.root or before:
                turned = block if vectors is None else vectors.mH
            elif by_gram:
                triangle, turned = _triangle(block, vectors, own)
                diagonals.append(triangle.diagonal(dim1=1, dim2=2).flatten())
            else:
                frame = block
                block = _mask(torch.linalg.qr(frame if vectors is None else frame @ vectors)[0], own)
                turned = block.mH @ frame
            last = None if triangle is None else vectors
            self._blocks.append((block.reshape(len(block), *axes, -1), last, triangle))
            whole.append(before and vectors is None and not (batch.step or any(empty)))
            plain.append(before and vectors is None)
            axes_of.append(axes if batch.step else [max(own)])
            if any(empty):  # their frames lead to the modes themselves
                frame = _in_frame(batch, found[b], None)
                if vectors is None:
                    turned = torch.eye(batch.rank, dtype=frame.dtype, device=frame.device)
                turned = pad(turned, (0, 0, 0, frame.shape[1] - turned.shape[-2]))
                turned = torch.where(torch.tensor(empty, device=frame.device)[:, None, None], frame, turned)
            inside.append(turned)
        # also false for NaN, where there is no triangle
        self.sound = not diagonals or bool(torch.cat(diagonals).real.amin() > _SHORT)
        size, left = float(scale_of(found).x), float(torch.linalg.vector_norm(self._blocks[-1][0]))
        self.lost = max(1 - (left / size) ** 2, 0.0) if size else 0.0

    def weights(self) -> dict[int, Tensor]:
        """Return the weights by position, once: the projection is given up."""
        ends: list[Any] = [*map(slice, self._ranks[:-1]), 0]  # the root has no bond above it
        weights: dict[int, Tensor] = {}
        own = [batch for batch in batches(self._net) if batch.join != "bare"]
        self._blocks.reverse()
        for batch in own:
            block, vectors, triangle = self._blocks.pop()
            if triangle is not None:
                if vectors is None:
                    vectors = torch.eye(triangle.shape[1], dtype=block.dtype, device=block.device)
                last = torch.linalg.solve_triangular(triangle.mH, vectors, upper=True, left=False)
                block = (block.flatten(1, -2) @ last).reshape(*block.shape[:-1], -1)
            for i, weight in zip(batch.nodes, block.unbind(0), strict=True):
                if not batch.step and i not in self._bare:
                    weights[i] = weight[(*(ends[c] for c in self._net.tree.links[i]), ..., ends[i])]
        return weights


def _triangle(frame: Tensor, vectors: Tensor | None, own: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return a triangle by which, as ``triangle^H``, ``frame @ vectors`` is a basis; and the frame in that.

    The frame's columns need not be orthonormal; without vectors the basis is of all of them.
    """
    gram = frame.mH @ frame
    if vectors is None:
        triangle = torch.linalg.cholesky_ex(gram)[0]
        return triangle, triangle.mH
    half = vectors.mH @ gram
    square = half @ vectors
    if min(own) < half.shape[1]:
        counts = torch.tensor(own, device=gram.device)
        beyond = torch.arange(half.shape[1], device=gram.device) >= counts.unsqueeze(1)
        square = square + torch.diag_embed(beyond.to(gram.dtype))
    triangle = torch.linalg.cholesky_ex(square)[0]
    return triangle, torch.linalg.solve_triangular(triangle, half, upper=False)


def _in_frame(batch: Batch, frame: Frame, vectors: Tensor | None) -> Tensor:
    """Return vectors in the frames of a batch, or all of the frames, over the frames of the children."""
    if vectors is None:
        if frame.rows is not None:
            return frame.rows
        assert frame.factor is not None
        vectors = torch.eye(batch.rank, dtype=frame.factor.x.dtype, device=frame.factor.x.device)
        vectors = vectors.repeat(len(batch.nodes), 1, 1)
    elif frame.rows is not None:
        vectors = frame.rows.flatten(1, -2) @ vectors
    return vectors.reshape(len(vectors), *batch.shape, -1)


def _mask(vectors: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the first columns of every matrix, with zeros beyond its own count."""
    most = max(counts)
    vectors = vectors[..., :most]
    if min(counts) == most:
        return vectors
    own = torch.tensor(counts, device=vectors.device)
    return vectors * (torch.arange(most, device=vectors.device) < own.unsqueeze(1)).unsqueeze(1)


def to_factorization(
    tree: ModeTree,
    weights: Mapping[int, Tensor],
    log2: float,
    dtype: torch.dtype,
    lost: float,
    work: torch.dtype = torch.float64,
) -> Factorization:
    """Return the factorization of weights times ``2**log2``; its error bound is ``lost`` times that.

    The precision of the ``work`` counts in the bound.
    """
    top, places = len(tree.nodes) - 1, sorted(weights)
    size, scales = float(torch.linalg.vector_norm(weights[top])), dict.fromkeys(places, 0)
    if size > 0 and abs(log2 + math.log2(size)) > 0.9 * math.log2(torch.finfo(dtype).max):
        # no weight alone leaves the range; whole powers are exact
        each, rest = divmod(math.floor(log2), len(places))
        scales = {i: each + (k < rest) for k, i in enumerate(places)}
    powers = {**scales, top: log2 - sum(scales[i] for i in places if i < top)}
    scaled = {
        i: (
            times_power_of_two(w.to(torch.promote_types(w.dtype, dtype)), round(powers[i]))
            if powers[i]
            else w
        ).to(dtype)
        for i, w in weights.items()
    }
    model = Factorization.holding(*network_of(tree, scaled))
    # rounding of the weights and of the work, once per node, besides what was discarded
    rounding = (4 * torch.finfo(dtype).eps + 64 * torch.finfo(work).eps) * (top + 1) * size
    try:
        model.error_bound = 2.0**log2 * (lost + rounding)
    except OverflowError:
        model.error_bound = math.inf
    return model


def finite_stacks(model: Factorization, work: torch.dtype = torch.float64) -> tuple[list[Tensor], float]:
    """Return stacks in a precision and the power of two that their tensor is to be multiplied by.

    Refuse weights that are not finite.
    """
    stacks = check_finite(model)
    if work == torch.float64:
        return [double(stack) for stack in stacks], 0.0
    scaled, log2 = list[Tensor](), 0.0
    for stack in map(exact_scales, stacks):
        if stack.dtype != single_of(stack.dtype):  # what is far out of range gets a scale
            powers = power_below(stack.detach().abs().flatten(1).amax(1))
            powers = torch.where(powers.abs() < 60, 0.0, powers)
            log2 += float(powers.sum())
            stack = stack / torch.exp2(powers).reshape(-1, *[1] * (stack.ndim - 1))
        scaled.append(stack.to(single_of(stack.dtype)))
    return scaled, log2


def check_finite(model: Factorization) -> list[Tensor]:
    """Return a factorization's stacks, or raise if they are not finite."""
    stacks = list(model.stacks)
    # sums are finite, unless something is wrong or near the end of the range
    with torch.no_grad():
        finite = torch.stack([stack.sum() for stack in stacks]).isfinite().all()
    if not bool(finite or all(largest_of(stack.detach()).isfinite() for stack in stacks)):
        broken = [node for node, weight in model.weights.items() if not weight.isfinite().all()]
        raise DataError(
            f"the weights of {len(broken)} nodes are NaN or infinite, first {broken[0]!r}.", argument="model"
        )
    return stacks


def network_of(tree: ModeTree, weights: Mapping[int, Tensor]) -> tuple[Network, list[Tensor]]:
    """Return the network with full joins that these weights make, by position, and its stacks of them.

    Leaves without a weight are bare. Stacks are copies, but where one weight alone is a stack.
    """
    bonds, sizes = [1] * len(tree.nodes), [0] * tree.order
    for i, below in enumerate(tree.links):
        for axis, c in enumerate(below):
            bonds[c] = weights[i].shape[axis]
            if not tree.links[c]:
                sizes[tree.nodes[c]] = len(weights[c]) if c in weights else bonds[c]  # type: ignore[call-overload]
    joins = ["full" if below else "leaf" if i in weights else "bare" for i, below in enumerate(tree.links)]
    net = Network(tree, tuple(sizes), tuple(bonds), tuple(joins), root_ones=False)
    stacks: dict[int, list[Tensor]] = {}
    for i, (stack, _) in net.slots.items():
        stacks.setdefault(stack, []).append(weights[i])
    return net, [
        stack[0].unsqueeze(0) if len(stack) == 1 and _is_whole(stack[0]) else torch.stack(stack)
        for stack in stacks.values()
    ]


def _is_whole(x: Tensor) -> bool:
    """Return whether a tensor is all that its memory holds."""
    return x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes


def limits_of(tree: ModeTree, ranks: int | Mapping[Node, int] | None) -> dict[int, int]:
    """Return the largest bonds by position; every one a positive integer."""
    if ranks is None:
        return {}
    bonds = ranks if isinstance(ranks, Mapping) else dict.fromkeys(tree.nodes[:-1], ranks)
    limits: dict[int, int] = {}
    for node, rank in bonds.items():
        position = _below_root(tree, node, "ranks")
        try:
            limits[position] = check_integer(rank, 1, "ranks")
        except OptionError:
            raise OptionError(
                f"ranks: node {node!r} needs a positive integer, found {rank!r}.", argument="ranks"
            ) from None
    return limits


def _below_root(tree: ModeTree, node: Node, what: str) -> int:
    """Return the position of a node that has a bond above it."""
    position = tree.position(node)
    if position == len(tree.nodes) - 1:
        raise OptionError(f"{what}: the root {node!r} has no bond above it; leave it out.", argument=what)
    return position


def budget_of(
    tree: ModeTree,
    sizes: Sequence[int],
    dtype: torch.dtype,
    *,
    ranks: int | Mapping[Node, int] | None,
    rtol: float | Mapping[Node, float] | None,
    atol: float | None,
    max_numbers: int | None,
    leaves: str | Mapping[int, str],
    work: torch.dtype = torch.float64,
) -> Budget:
    """Check what ``decompose`` and ``truncate`` are asked for."""
    limits, parts, share = limits_of(tree, ranks), dict[int, float](), None
    if not isinstance(rtol, Mapping):
        share = share_of(rtol, dtype, work)
    elif atol is not None:
        raise OptionError(
            "atol is for the whole tensor, and rtol is given for single nodes; give one of them.",
            argument="atol",
        )
    else:
        for node, part in rtol.items():
            parts[_below_root(tree, node, "rtol")] = check_number(part, f"node {node!r}: rtol", 0, 1)
    error = None if atol is None else check_number(atol, "atol", 0)
    kinds = dict.fromkeys(tree.leaves, leaves) if not isinstance(leaves, Mapping) else leaves
    for mode, kind in kinds.items():
        if tree.links[tree.position(mode)]:
            raise OptionError(f"leaves: node {mode!r} is no leaf; name modes only.", argument="leaves")
        if kind not in ("auto", "weights", "bare"):
            raise OptionError(
                f"leaves: mode {mode!r} needs 'auto', 'weights' or 'bare', found {kind!r}.", argument="leaves"
            )
    kind_of = {tree.position(mode): (mode, kinds.get(mode, "auto")) for mode in tree.leaves}
    bare = frozenset(i for i, (_, kind) in kind_of.items() if kind == "bare")
    # a leaf that is larger than its limit keeps its matrix
    free = {i for i, (m, kind) in kind_of.items() if kind == "auto" and limits.get(i, sizes[m]) >= sizes[m]}
    budget = Budget(limits, share, error, rounding_of(dtype, work), parts, None, bare, frozenset(free))
    if max_numbers is not None:
        most = check_integer(max_numbers, 1, "max_numbers")
        ones = [1] * len(tree.cuts)
        least = Chooser(tree, sizes, [np.ones(1)] * len(ones), ones, bare, free).largest().numbers
        if most < least:
            raise OptionError(
                f"max_numbers={most} is too few: with all bonds of size 1 there are {least:.0f} numbers.",
                argument="max_numbers",
            )
        budget = replace(budget, numbers=most)
    return budget


def rounding_of(dtype: torch.dtype, work: torch.dtype = torch.float64) -> float:
    """Return what rounding of the work and of the weights may add to the error, relative to the norm."""
    return max(16 * torch.finfo(work).eps, torch.finfo(dtype).eps / 2)


def share_of(rtol: float | None, dtype: torch.dtype, work: torch.dtype = torch.float64) -> float | None:
    """Return the tolerance less what rounding of the work and of the weights may add to the error."""
    if rtol is None:
        return None
    least, rtol = rounding_of(work, work), check_number(rtol, "rtol", 0, 1)
    if rtol <= least and work == torch.float32:
        raise OptionError(
            f"rtol={rtol:g} is below what single precision can keep, {least:.1e}; "
            'write a larger one, or precision="double".',
            argument="rtol",
        )
    return max(rtol - rounding_of(dtype, work), 0.0)
