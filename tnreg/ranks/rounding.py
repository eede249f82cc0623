"""Rounding of a factorization between the singular vectors of its nodes, and the model made of the result.

``truncate`` and the last part of ``decompose`` are this; so is the end of a rounded product.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tnreg.errors import OptionError, ShapeError
from tnreg.factorizations.factorization import Factorization
from tnreg.networks.network import Network, Stacked
from tnreg.ranks.frames import (
    Batch,
    Frame,
    Values,
    batches,
    climb,
    frames,
    scale_of,
    values_in_frames,
)
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

_LARGEST_CORE = 2**31


@dataclass(frozen=True)
class Rounded:
    """A rounded tensor is that of ``weights`` times ``2**power``.

    ``size * 2**power`` was its norm before, and ``lost`` the share of the square that was cut off.
    """

    weights: dict[int, Tensor]
    lost: float
    size: float
    power: float


def rounded(
    net: Network,
    stacks: Sequence[Tensor],
    limits: Mapping[int, int],
    share: float | None,
    *,
    orthonormal: bool = False,
) -> Rounded:
    """Rounding in orthonormal frames, equal nodes together.

    Args:
        net: The network.
        stacks: Its weights in double precision.
        limits: Largest bonds by position.
        share: Error allowed, relative to the norm of the tensor; ``None`` cuts what is zero to rounding.
        orthonormal: Whether weights but the root's are to have orthonormal columns to rounding.
    """
    parts = batches(net)
    if sum(len(b.nodes) * math.prod(b.shape) * b.bond for b in parts) > _LARGEST_CORE:
        widest = max(parts, key=lambda b: math.prod(b.shape) * b.bond)
        raise _too_wide(net, widest.nodes[0], math.prod(widest.shape) * widest.bond)
    found = frames(net, stacks)
    size, power = (float(x) for x in scale_of(found))
    results = values_in_frames(net, found, vectors=True)
    matched = _matched(net, found, results)
    kept, lost = _pooled(net, matched, limits, share)
    weights = _projected(net, found, matched, kept, orthonormal)
    return Rounded(weights, lost, size, power)


def _matched(net: Network, found: Sequence[Frame], results: Sequence[Values]) -> Sequence[Values]:
    """Singular vectors of the second child of a binary root as those that belong to its sibling's.

    Both are cut at once and what is cut counts once, so that they have to be of the same singular values;
    found apart they need not be, where values are equal.
    """
    pair = net.tree.links[-1]
    if len(pair) != 2:
        return results
    where = {
        node: (b, batch.nodes.index(node))
        for b, batch in enumerate(batches(net))
        for node in pair
        if not batch.step and node in batch.nodes
    }
    (b0, slot0), (b1, slot1) = (where[node] for node in pair)
    root, first, second = found[-1].rows, results[b0].vectors, results[b1].vectors
    assert root is not None and first is not None and second is not None
    core = root.reshape(second.shape[-1], first.shape[-1])  # the last child's axis comes first
    # columns are in order of their singular values: the first k of Q span what the first k of them do
    basis = torch.linalg.qr(core @ first[slot0].conj(), mode="complete")[0]
    changed = second.clone()
    changed[slot1] = basis
    return [Values(r.values, changed) if b == b1 else r for b, r in enumerate(results)]


def _too_wide(net: Network, node: int, numbers: int) -> ShapeError:
    return ShapeError(
        f"node {net.tree.nodes[node]!r} has {len(net.tree.links[node])} children; its core would have "
        f"{numbers:.3g} entries.\n"
        "  use a tree with fewer children per node, or smaller ranks"
    )


def _pooled(
    net: Network,
    results: Sequence[Values],
    limits: Mapping[int, int],
    share: float | None,
) -> tuple[list[int], float]:
    """How many singular values to keep at every node, and the sum of the squares of the others.

    Args:
        net: The network.
        results: Singular values of the tensor divided by its norm.
        limits: Largest bonds by position.
        share: Root of what that sum may be; ``None`` keeps all that are not zero to rounding.
    """
    links, top = net.tree.links, len(net.tree.nodes) - 1
    pair = links[top] if len(links[top]) == 2 else ()
    chosen = [
        (batch, part.values)
        for batch, part in zip(batches(net), results, strict=False)
        if not batch.step
    ]
    eps = torch.finfo(chosen[0][1].dtype).eps
    if share is None:
        largest = max(float(values.max()) for _, values in chosen)
        keep = [values > 64 * values.shape[1] * eps * largest for _, values in chosen]
    else:
        # rounded up by what rounding may hide, unless nothing may be discarded anyway
        slack = 4 * eps if share > 0 else 0.0
        rounded = [(values + slack).square() for _, values in chosen]
        for (batch, _), part in zip(chosen, rounded, strict=True):
            if pair and pair[1] in batch.nodes:
                # its sibling's singular values are its own
                part[batch.nodes.index(pair[1])] = math.inf
        ascending, places = torch.cat([part.flatten() for part in rounded]).sort(stable=True)
        above = torch.ones_like(ascending, dtype=torch.bool)
        above[places[ascending.cumsum(0) <= share**2]] = False
        sizes = [part.numel() for part in rounded]
        keep = [
            mask.reshape(part.shape)
            for mask, part in zip(torch.split(above, sizes), rounded, strict=True)
        ]
    kept = [1] * len(net.tree.nodes)
    for (batch, _), mask in zip(chosen, keep, strict=True):
        for node, count in zip(batch.nodes, mask.sum(1).tolist(), strict=True):
            kept[node] = count
    if pair:
        kept[pair[1]] = min(kept)  # replaced by its sibling's below
        kept[pair[0]] = kept[pair[1]] = max(kept[pair[0]], 1)
    for i in range(top):
        kept[i] = max(1, min(kept[i], limits.get(i, kept[i])))
    if pair:
        ranks = [
            values.shape[1] for batch, values in chosen for node in batch.nodes if node in pair
        ]
        kept[pair[0]] = kept[pair[1]] = min(*(kept[c] for c in pair), *ranks)
    lost = 0.0
    for batch, values in chosen:
        counts = torch.tensor([kept[node] for node in batch.nodes], device=values.device)
        if pair and pair[1] in batch.nodes:
            counts[batch.nodes.index(pair[1])] = values.shape[1]
        gone = torch.arange(values.shape[1], device=values.device) >= counts.unsqueeze(1)
        lost += float(((values.square()) * gone).sum())
    return kept, lost


def _projected(
    net: Network,
    found: Sequence[Frame],
    results: Sequence[Values],
    kept: list[int],
    orthonormal: bool,
) -> dict[int, Tensor]:
    """The weights between the first ``kept`` singular vectors of their nodes.

    Nodes of a batch are cut to the largest bond among them first, with zeros beyond their own, and to
    their own at the end. ``kept`` shrinks where the children of a node leave it fewer rows.
    """
    tree, parts = net.tree, batches(net)
    inside = Stacked()  # (nodes, kept, rank): singular vectors in the coordinates of the frame
    spread: list[list[int]] = []  # what the first of those axes stands for
    out: dict[int, Tensor] = {}
    for b, batch in enumerate(parts):
        frame, count = found[b], len(batch.nodes)
        below = [inside.pick(child) for child in batch.below]
        axes = [width for child in batch.below for width in spread[child.pairs[0][0]]]
        rows = [math.prod(kept[c] for c in tree.links[node]) for node in batch.nodes]
        vectors = None
        if not batch.root and not batch.step:
            part = results[b].vectors
            assert part is not None
            vectors = _masked(part, [kept[node] for node in batch.nodes])
        block = _in_frame(batch, frame, vectors)
        if math.prod(axes) * block.shape[-1] > _LARGEST_CORE:
            raise _too_wide(net, batch.nodes[0], math.prod(axes) * block.shape[-1])
        if below:
            block = climb(block, below[::-1])
        if batch.step:
            inside.append(block.flatten(1, -2))
            spread.append(axes)
            continue
        block = block.reshape(count, *(axes or batch.shape), -1)
        if vectors is not None:
            short = batch.join != "leaf" and any(
                kept[node] > most for node, most in zip(batch.nodes, rows, strict=True)
            )
            turned = vectors.mH
            if orthonormal or short:
                basis, triangle = torch.linalg.qr(block.flatten(1, -2))
                block, turned = basis.reshape(*block.shape[:-1], -1), triangle @ turned
                for node, most in zip(batch.nodes, rows, strict=True):
                    kept[node] = kept[node] if batch.join == "leaf" else min(kept[node], most)
                turned = _masked(turned.mH, [kept[node] for node in batch.nodes]).mH
            inside.append(turned)
            spread.append([turned.shape[1]])
        for node, weight in zip(batch.nodes, block.unbind(0), strict=True):
            for axis, c in enumerate(tree.links[node]):
                weight = weight.narrow(axis, 0, kept[c])
            out[node] = weight[..., 0] if batch.root else weight[..., : kept[node]]
    return out


def _in_frame(batch: Batch, frame: Frame, vectors: Tensor | None) -> Tensor:
    """The nodes' bases of singular vectors (all of the frame if ``None``) over those of the children."""
    if frame.rows is None:
        if vectors is None:
            unit = torch.eye(batch.rank, dtype=frame.factor.x.dtype, device=frame.factor.x.device)
            vectors = unit.expand(len(batch.nodes), -1, -1)
        return vectors.reshape(len(vectors), *batch.shape, -1)
    if vectors is None:
        return frame.rows
    return (frame.rows.flatten(1, -2) @ vectors).reshape(len(vectors), *batch.shape, -1)


def _masked(vectors: Tensor, counts: Sequence[int]) -> Tensor:
    """The first columns of every matrix, with zeros beyond its own count."""
    most = max(counts)
    vectors = vectors[..., :most]
    if min(counts) == most:
        return vectors
    many = torch.tensor(counts, device=vectors.device)
    return vectors * (torch.arange(most, device=vectors.device) < many.unsqueeze(1)).unsqueeze(1)


def built(
    tree: ModeTree,
    weights: Mapping[int, Tensor],
    log2: float,
    dtype: torch.dtype,
    lost: float,
) -> Factorization:
    """The factorization with these weights times ``2**log2``; its error bound is ``lost`` times that."""
    top = len(tree.nodes) - 1
    root = weights[top]
    size = float(torch.linalg.vector_norm(root))
    reach = 0.9 * math.log2(torch.finfo(dtype).max)
    scales: list[float] = [0.0] * top
    if size > 0 and abs(log2 + math.log2(size)) > reach:
        # no weight alone leaves the range; whole powers are exact
        each = math.floor(log2 / (top + 1))
        rest = math.floor(log2 - each * (top + 1))
        scales = [float(each + (i < rest)) for i in range(top)]
    scales.append(log2 - sum(scales))
    scaled = {i: (weights[i] * 2.0 ** scales[i]).to(dtype) for i in range(top + 1)}
    model = Factorization.holding(*on_network(tree, scaled))
    # rounding of the weights and of the work, once per node, besides what was discarded
    rounding = (4 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float64).eps) * (top + 1) * size
    try:
        model.error_bound = 2.0**log2 * (lost + rounding)
    except OverflowError:
        model.error_bound = math.inf
    return model


def on_network(tree: ModeTree, weights: Mapping[int, Tensor]) -> tuple[Network, list[Tensor]]:
    """The network with full joins that these weights make, by position, and its stacks."""
    net = Network.build(
        tree,
        [weights[tree.position(mode)].shape[0] for mode in tree.leaves],
        {node: weights[i].shape[-1] for i, node in enumerate(tree.nodes[:-1])},
        join="full",
    )
    return net, [torch.stack([weights[i] for i in part.positions]) for part in net.stacks]


def limits_of(tree: ModeTree, ranks: int | Mapping[Node, int] | None) -> dict[int, int]:
    """Largest bonds by position; every one a positive integer."""
    if ranks is None:
        return {}
    given = ranks if isinstance(ranks, Mapping) else dict.fromkeys(tree.nodes[:-1], ranks)
    out: dict[int, int] = {}
    for node, rank in given.items():
        position = tree.position(node)
        if position == len(tree.nodes) - 1:
            raise OptionError(f"ranks: the root {node!r} has no bond above it; leave it out.")
        try:
            value = 0 if isinstance(rank, bool) else operator.index(rank)
        except TypeError:
            value = 0
        if value < 1:
            raise OptionError(
                f"ranks: node {node!r} needs a positive integer, found {rank!r}.", argument="ranks"
            )
        out[position] = value
    return out


def share_of(rtol: float | None) -> float | None:
    """The tolerance less what rounding may add to the error."""
    if rtol is None:
        return None
    if (
        isinstance(rtol, bool)
        or not isinstance(rtol, int | float | np.floating)
        or not 0 <= rtol < 1
    ):
        raise OptionError(f"rtol must be a number in [0, 1), found {rtol!r}.", argument="rtol")
    return max(float(rtol) - 16 * torch.finfo(torch.float64).eps, 0.0)
