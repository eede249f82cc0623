"""Rounding of a network between its singular vectors: ``truncate``, and the end of ``decompose``."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import DataError, OptionError, check_integer, check_number
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.memory import must_fit
from tnreg.networks.network import Network, Stacked
from tnreg.ranks.frames import Batch, Frame, Values, batches, climb, frames, scale_of, values_in_frames
from tnreg.tensors.arrays import double, largest_of
from tnreg.tensors.axes import cut_smallest, rounding_rtol
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree


@dataclass(frozen=True)
class Rounded:
    """A rounded network: the tensor of the ``weights``, by position, times ``2**log2``.

    The norm before was ``size * 2**log2``; ``lost`` is by how much of its square that of the error grew.
    """

    weights: dict[int, Tensor]
    lost: float
    size: float
    log2: float


def round_network(
    net: Network,
    stacks: Sequence[Tensor],
    limits: Mapping[int, int],
    share: float | None,
    *,
    dtype: torch.dtype,
    orthonormal: bool = False,
    before: tuple[float, Container[int]] = (0.0, ()),
) -> Rounded:
    """Round a network in orthonormal frames, equal nodes together.

    Args:
        net: The network.
        stacks: Its weights in double precision.
        limits: Largest bonds by position.
        share: Error allowed, relative to the norm of the tensor; ``None`` cuts what is zero to rounding.
        dtype: That of the numbers before they were brought to double precision.
        orthonormal: Whether weights but the root's are to have orthonormal columns to rounding.
        before: An error made before, relative to the norm, and the positions whose cuts are not orthogonal
            to it: with the sum ``c`` of the squares cut there, its own square grows by ``2 error √c`` more.
    """
    found = frames(net, stacks)
    results = _match_root(net, found, values_in_frames(net, found, vectors=True))
    ranks, lost = _choose_ranks(net, results, limits, share, dtype, before)
    weights = _project(net, found, results, ranks, orthonormal)
    size, log2 = scale_of(found)
    return Rounded(weights, lost, float(size), float(log2))


def _match_root(net: Network, found: Sequence[Frame], results: Sequence[Values]) -> Sequence[Values]:
    """Pair the singular vectors of a binary root's second child with its sibling's.

    They have to belong to the same singular values; computed apart they need not, where values are equal.
    """
    ends = net.tree.cuts[-1]
    if len(ends) == 1:
        return results
    (b0, slot0), (b1, slot1) = (
        (b, batch.nodes.index(node))
        for node in ends
        for b, batch in enumerate(batches(net))
        if not batch.step and node in batch.nodes
    )
    core, first, second = found[-1].rows, results[b0].vectors, results[b1].vectors
    assert core is not None and first is not None and second is not None
    core = core.reshape(second.shape[-1], first.shape[-1])  # the last child's axis comes first
    # columns are in order of their singular values: the first k of Q span what the first k of them do
    changed = second.clone()
    changed[slot1] = torch.linalg.qr(core @ first[slot0].conj(), mode="complete")[0]
    return [Values(r.values, changed) if b == b1 else r for b, r in enumerate(results)]


def _choose_ranks(
    net: Network,
    results: Sequence[Values],
    limits: Mapping[int, int],
    share: float | None,
    dtype: torch.dtype,
    before: tuple[float, Container[int]],
) -> tuple[list[int], float]:
    """Choose a rank for every position: the smallest singular values of all cuts together go first.

    Return the ranks as well as the sum of the squares of the values that are cut off, and what it costs more
    for the error made ``before``.
    """
    cuts = net.tree.cuts
    seconds = {cut[1] for cut in cuts if len(cut) == 2}  # their values are their siblings'
    nodes, spectra, most = list[int](), list[Tensor](), dict[int, int]()
    for batch, part in zip(batches(net), results, strict=False):
        if batch.step:
            continue
        most |= {node: min(batch.rank, limits.get(node, batch.rank)) for node in batch.nodes}
        slots = [slot for slot, node in enumerate(batch.nodes) if node not in seconds]
        if slots:
            nodes += [batch.nodes[slot] for slot in slots]
            spectra.append(part.values if len(slots) == len(batch.nodes) else part.values[slots])
    error, crossed = before
    lengths = [len(values) for values in spectra]
    factors = torch.split(spectra[0].new_tensor([error * (node in crossed) for node in nodes]), lengths)
    counts = torch.cat(_count_values(spectra, share, dtype, factors)).tolist()
    count_of = dict(zip(nodes, counts, strict=True))
    ranks = [1] * len(net.tree.nodes)
    for cut in cuts:
        count = max(1, min(count_of[cut[0]], *[most[i] for i in cut]))
        for i in cut:
            ranks[i] = count
    lost, crossing = spectra[0].new_zeros(()), spectra[0].new_zeros(())
    chosen = torch.tensor([ranks[node] for node in nodes], device=lost.device)
    for values, rank, factor in zip(spectra, torch.split(chosen, lengths), factors, strict=True):
        cut_off = torch.arange(values.shape[1], device=lost.device) >= rank.unsqueeze(1)
        squares = (values.square() * cut_off).sum(1)
        lost += squares.sum()
        crossing += (squares * factor.square()).sum()
    return ranks, float(lost + 2 * crossing.sqrt())


def _count_values(
    spectra: Sequence[Tensor], share: float | None, dtype: torch.dtype, factors: Sequence[Tensor]
) -> list[Tensor]:
    """Count the values ``(nodes,)`` to keep of spectra ``(nodes, count)``, see ``_choose_ranks``."""
    if share is None:
        zero = rounding_rtol(None, dtype, spectra[0].dtype)
        return [(values > zero * values.amax(1, keepdim=True)).sum(1) for values in spectra]
    # rounded up by what rounding may hide, unless nothing may be discarded anyway
    slack = 4 * torch.finfo(spectra[0].dtype).eps if share > 0 else 0.0
    squares = [(values + slack).square() for values in spectra]
    crossing = [factor.unsqueeze(1).expand_as(part) for factor, part in zip(factors, squares, strict=True)]
    return [(~cut).sum(1) for cut in cut_smallest(squares, share**2, crossing)]


def _project(
    net: Network, found: Sequence[Frame], results: Sequence[Values], ranks: list[int], orthonormal: bool
) -> dict[int, Tensor]:
    """Compute the weights between the first singular vectors of all nodes.

    Nodes of a batch have the largest rank among them first, with zeros beyond their own, which they are cut
    to at the end. ``ranks`` shrink where the children of a node leave it fewer rows.
    """
    links = net.tree.links
    inside = Stacked()  # (nodes, rank, size of the frame): singular vectors in the frame
    axes_of: list[list[int]] = []  # what the first of those axes stands for
    weights: dict[int, Tensor] = {}
    for b, batch in enumerate(batches(net)):
        vectors = results[b].vectors if b < len(results) else None  # none at steps and the root
        if vectors is not None:
            vectors = _mask(vectors, [ranks[node] for node in batch.nodes])
        block = _in_frame(batch, found[b], vectors)
        axes = [size for child in batch.below for size in axes_of[child.pairs[0][0]]]
        node = batch.nodes[0]
        must_fit(
            f"rounding: the core of node {net.tree.nodes[node]!r}, {len(links[node])} children,",
            [(len(block), *axes, block.shape[-1])], block.dtype, block.device,
            "use a tree with fewer children per node, or smaller ranks", copies=3,
        )  # fmt: skip
        block = climb(block, [inside.pick(child) for child in reversed(batch.below)])
        if batch.step:
            inside.append(block.flatten(1, -2))
            axes_of.append(axes)
            continue
        block = block.reshape(len(block), *(axes or batch.shape), -1)
        if vectors is not None:
            before = [ranks[i] for i in batch.nodes]
            for i in batch.nodes if axes else ():
                ranks[i] = min(ranks[i], math.prod(ranks[c] for c in links[i]))
            own, turned = [ranks[i] for i in batch.nodes], vectors.mH
            if orthonormal or own != before:
                basis, triangle = torch.linalg.qr(block.flatten(1, -2))
                block = basis.reshape(*block.shape[:-1], -1)
                turned = _mask((triangle @ turned).mH, own).mH
            inside.append(turned)
            axes_of.append([turned.shape[1]])
        weights |= zip(batch.nodes, block.unbind(0), strict=True)
    ends: list[Any] = [*map(slice, ranks[:-1]), 0]  # the root has no bond above it
    return {i: weight[(*(ends[c] for c in links[i]), ..., ends[i])] for i, weight in weights.items()}


def _in_frame(batch: Batch, frame: Frame, vectors: Tensor | None) -> Tensor:
    """Return vectors in the frames of a batch, or all of the frames, over the frames of the children."""
    if vectors is None:
        if frame.rows is not None:
            return frame.rows
        vectors = torch.eye(batch.rank, dtype=frame.factor.x.dtype, device=frame.factor.x.device)
        vectors = vectors.expand(len(batch.nodes), -1, -1)
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
    tree: ModeTree, weights: Mapping[int, Tensor], log2: float, dtype: torch.dtype, lost: float
) -> Factorization:
    """Return the factorization of weights times ``2**log2``; its error bound is ``lost`` times that."""
    top = len(tree.nodes) - 1
    size = float(torch.linalg.vector_norm(weights[top]))
    scales = [0.0] * top
    if size > 0 and abs(log2 + math.log2(size)) > 0.9 * math.log2(torch.finfo(dtype).max):
        # no weight alone leaves the range; whole powers are exact
        each = math.floor(log2 / (top + 1))
        rest = math.floor(log2 - each * (top + 1))
        scales = [float(each + (i < rest)) for i in range(top)]
    scales.append(log2 - sum(scales))
    scaled = {i: (w * 2.0 ** scales[i] if scales[i] else w).to(dtype) for i, w in weights.items()}
    model = Factorization.holding(*network_of(tree, scaled))
    # rounding of the weights and of the work, once per node, besides what was discarded
    rounding = (4 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float64).eps) * (top + 1) * size
    try:
        model.error_bound = 2.0**log2 * (lost + rounding)
    except OverflowError:
        model.error_bound = math.inf
    return model


def finite_stacks(model: Factorization) -> list[Tensor]:
    """Return a factorization's stacks in double precision, or raise if they are not finite."""
    if not all(bool(largest_of(stack.detach()).isfinite()) for stack in model.stacks):
        broken = [node for node, weight in model.weights.items() if not weight.isfinite().all()]
        raise DataError(
            f"the weights of {len(broken)} nodes are NaN or infinite, first {broken[0]!r}.", argument="model"
        )
    return [double(stack) for stack in model.stacks]


def network_of(tree: ModeTree, weights: Mapping[int, Tensor]) -> tuple[Network, list[Tensor]]:
    """Return the network with full joins that these weights make, by position, and its stacks."""
    sizes = tuple(weights[tree.position(mode)].shape[0] for mode in tree.leaves)
    bonds = (*(weights[i].shape[-1] for i in range(len(tree.nodes) - 1)), 1)
    joins = tuple("full" if below else "leaf" for below in tree.links)
    net = Network(tree, sizes, bonds, joins, root_ones=False)
    return net, [torch.stack([weights[i] for i in level.positions]) for level in net.stacks]


def limits_of(tree: ModeTree, ranks: int | Mapping[Node, int] | None) -> dict[int, int]:
    """Return the largest bonds by position; every one a positive integer."""
    if ranks is None:
        return {}
    bonds = ranks if isinstance(ranks, Mapping) else dict.fromkeys(tree.nodes[:-1], ranks)
    limits: dict[int, int] = {}
    for node, rank in bonds.items():
        position = tree.position(node)
        if position == len(tree.nodes) - 1:
            raise OptionError(
                f"ranks: the root {node!r} has no bond above it; leave it out.", argument="ranks"
            )
        try:
            limits[position] = check_integer(rank, 1, "ranks")
        except OptionError:
            raise OptionError(
                f"ranks: node {node!r} needs a positive integer, found {rank!r}.", argument="ranks"
            ) from None
    return limits


def share_of(rtol: float | None, dtype: torch.dtype) -> float | None:
    """Return the tolerance less what rounding of the work and of the weights may add to the error."""
    if rtol is None:
        return None
    rounding = max(16 * torch.finfo(torch.float64).eps, torch.finfo(dtype).eps / 2)
    return max(check_number(rtol, "rtol", 0, 1) - rounding, 0.0)
