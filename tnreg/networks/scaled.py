"""Products on scales: matrices whose columns have binary scales of their own, and what is made of them.

A tensor of order 1024 multiplies a thousand weights. A matrix is kept as a ``Scaled`` of moderate numbers
and one binary logarithm for each column; not one for all, because two columns may drift apart below
one node and meet again above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from opt_einsum.parser import get_symbol
from torch import Tensor, nn

from tnreg.machine.memory import must_fit
from tnreg.networks.einsum import Einsum, einsum
from tnreg.networks.network import Network, Places, Stacked
from tnreg.tensors.arrays import Scaled, double, largest_of, power_below, powers_below


def scale_columns(x: Tensor) -> Scaled:
    """Divide the slices along the last axis by the powers of two below their largest magnitudes."""
    columns = x.detach().flatten(0, -2)
    real = not x.is_complex()  # without a copy of the magnitudes
    largest = torch.maximum(columns.amax(0), -columns.amin(0)) if real else columns.abs().amax(0)
    log2 = powers_below(largest)
    return Scaled(x / torch.exp2(log2), log2)


def absorb(weight: Tensor, logs: Sequence[Tensor | None]) -> Scaled:
    """Multiply a weight ``(R_1, ..., R_k, R)`` by ``2**logs[i]`` along axis i, then scale its columns.

    Returns:
        The weight with columns of largest magnitude about 1 (or 0), and their logarithms ``(R,)``.
    """
    total = torch.zeros((), dtype=weight.real.dtype, device=weight.device)
    for axis, log2 in enumerate(logs):
        if log2 is not None:
            total = total + log2.reshape([-1 if k == axis else 1 for k in range(weight.ndim)])
    high, low = total.max(), total.min()
    if bool(high - low < 0.2 * math.log2(torch.finfo(total.dtype).max)):
        # the usual case: no product of a few moderate numbers can leave the range
        weight, first = scale_columns(weight)
        if total.ndim == 0:
            return Scaled(weight, first + total)
        weight, second = scale_columns(weight * torch.exp2(total - high))
        return Scaled(weight, first + second + high)
    size = weight.detach().abs().log2() + total  # -inf at zeros
    top = size.flatten(0, -2).amax(0).floor()
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    # |weight| * 2**(total - top) < 2, but the power alone may overflow
    return Scaled(Scaled(weight, total - top).value(), top)


def balance(network: Network, stacks: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Scale the columns of all weights to moderate numbers; what their parents make up for goes to the root.

    Stacks are as ``network.stacks`` groups the weights.

    Returns:
        Stacks of the same tensor divided by ``2**log2``, and this logarithm.
    """
    stacks, logs = list(stacks), Stacked()
    for level in network.levels:
        if level.join == "bare":
            logs.append(stacks[0].real.new_zeros(len(level.positions), level.shape[0]))
            continue
        below = logs.children(level)
        below = [torch.stack(below).sum(0)] if level.join == "diagonal" else below
        if level.weight is None:  # a root of ones: its first child with a weight takes the scales
            top = below[0].amax(1)
            stack, slot = next(network.slots[c] for c in network.tree.links[-1] if c in network.slots)
            weight = stacks[stack]
            shift = top.new_zeros(len(weight), *[1] * (weight.ndim - 2), weight.shape[-1])
            shift[slot] += below[0][0] - top
            stacks[stack] = Scaled(weight, shift).value()
            break
        stack = level.weight.pairs[0][0]
        weight = stacks[stack] if level is not network.levels[-1] else stacks[stack].unsqueeze(-1)
        size = weight.detach().abs().log2()  # -inf at zeros
        total = torch.zeros_like(size[:, :1])
        for axis, log2 in enumerate(below, 1):
            total = total + log2.reshape(
                [len(log2), *(-1 if k == axis else 1 for k in range(1, weight.ndim))]
            )
        size, inner = size + total, tuple(range(1, weight.ndim - 1))
        high = size.amax(inner, keepdim=True)
        low = torch.where(size == -math.inf, math.inf, size).amin(inner, keepdim=True)
        # half way, so that entries apart by more than the range of the dtype stay what they are
        top = torch.maximum((high + low) / 2, high - math.log2(torch.finfo(size.dtype).max) / 2).floor()
        top = torch.where(top.isfinite(), top, 0)
        stacks[stack] = Scaled(weight, total - top).value().reshape(stacks[stack].shape)
        logs.append(top.reshape(len(weight), -1))
    return stacks, top.reshape(())


class Growth:
    """How much the contractions of a model enlarge what is lost on the way, as last read from its weights.

    What lies below the range of the dtype is lost up to its smallest normal number; on the way to the result
    that grows by no more than the product of the weights' norms, of those above 1. Stacks are bounded as a
    whole, by the mean of their weights. In a training that updates all stacks equally often the weights are
    read at every 32nd step, and 2**32 is allowed for between.
    """

    def __init__(self) -> None:
        self._log2 = 0.0
        self._read_at: list[tuple[int, int]] = []
        self._clear: object = None  # of which the result was far from the range when the weights were read

    def is_clear(self, of: object, stacks: Sequence[Tensor]) -> bool:
        """Tell without reading whether ``of``, without inputs, was far from the range a short time ago."""
        return of is self._clear and self._is_recent(stacks)

    def may_show(
        self, stacks: Sequence[Tensor], inputs: Tensor | Sequence[Tensor], result: Tensor, of: object
    ) -> bool:
        """Tell whether a result may show what left the range: above it, it is NaN or infinite.

        Reads the result, and not all weights each time; remembers ``of`` what it was if that was far from it.
        """
        norm: float = torch.linalg.vector_norm(result.detach().reshape(-1)).tolist()
        if not norm < math.inf:  # squares may overflow where the result does not
            norm = largest_of(result.detach()).tolist()  # type: ignore[assignment]
        if not norm < math.inf:
            return True
        info = torch.finfo(result.dtype)
        # down to 2**-20 of the result, or to what is below the range itself
        size = math.log2(norm) - math.log2(result.numel()) / 2 if norm else -math.inf
        allowed = max(size - math.log2(info.tiny) - 20, -math.log2(info.eps))
        if len(inputs):
            order = inputs.shape[1] if isinstance(inputs, Tensor) else len(inputs)
            samples = inputs.flatten(1) if isinstance(inputs, Tensor) else torch.cat(list(inputs), 1)
            allowed -= _mean_growth(torch.linalg.vector_norm(samples.detach(), dim=1).max(), order)
        if self._log2 + 32 <= allowed and self._is_recent(stacks):
            return False
        self._read_at = _versions(stacks)
        self._log2 = sum(_mean_growth(torch.linalg.vector_norm(s.detach()), len(s)) for s in stacks)
        # results may go down as much as weights go up
        far = self._log2 + 64 <= min(allowed, math.log2(info.max)) and not len(inputs)
        self._clear = of if far else None
        return not self._log2 <= allowed

    def _is_recent(self, stacks: Sequence[Tensor]) -> bool:
        """Tell whether no more than 32 updates of all stacks came after the weights were read."""
        if not torch.is_grad_enabled() or {*map(type, stacks)} != {nn.Parameter}:
            return False
        now = _versions(stacks)
        if not now or len(now) != len(self._read_at):
            return False
        updates = now[0][1] - self._read_at[0][1]
        pairs = zip(self._read_at, now, strict=True)
        return 0 <= updates <= 32 and all(p == q and n - m == updates for (p, m), (q, n) in pairs)


def _versions(stacks: Sequence[Tensor]) -> list[tuple[int, int]]:
    # what was made in inference mode does not tell
    return [] if any(s.is_inference() for s in stacks) else [(s.data_ptr(), s._version) for s in stacks]


def _mean_growth(norm: Tensor, count: int) -> float:
    """Bound the logarithm of the product of so many norms, of those above 1, by all of them together."""
    size: float = norm.tolist()  # type: ignore[assignment]
    return count / 2 * math.log2(1 + size * size / count)


# Sums of squares between these have lost nothing that shows.
_PLAIN_SQUARES = {torch.float32: (1e-24, 1e30), torch.float64: (1e-280, 1e300)}


def column_norms(matrix: Tensor) -> Tensor:
    """Norms of the columns, safe at scales whose squares leave the range of the dtype."""
    if matrix.is_complex():  # (n, R) -> (n, R, 2) -> (2n, R)
        matrix = torch.view_as_real(matrix.resolve_conj()).mT.flatten(0, 1)
    # not linalg.vector_norm, which takes ten times as long along columns
    if matrix.device.type == "cpu" and matrix.dtype in _PLAIN_SQUARES:  # where numbers can be read
        squares = matrix.square().sum(0, dtype=torch.float64)
        low, high = torch.aminmax(squares.detach())
        least, most = _PLAIN_SQUARES[matrix.dtype]
        if least < low.item() and high.item() < most:
            return squares.sqrt().to(matrix.dtype)
    scale: Tensor | float = 1.0
    if matrix.dtype == torch.float32:  # squares of floats fit into doubles
        squares = matrix.double().square().sum(0)
    else:
        scale = torch.exp2(power_below(matrix.detach().abs().amax(0)))
        squares = (matrix / scale).double().square().sum(0)
    alive = squares != 0  # the root has no gradient at zero; the norm has a subgradient, 0
    norms = torch.where(alive, torch.where(alive, squares, 1).sqrt(), 0)
    return (norms * scale).to(matrix.dtype)


def product_of_rows(norms: Tensor) -> Tensor:
    """Product along the first axis; it leaves the range of the dtype only if the result does."""
    if norms.device.type == "cpu":  # where numbers can be read: mostly no product can leave that of doubles
        low, high = torch.aminmax(norms.detach())
        most = 2.0 ** (1000 / len(norms))
        if 1 / most < low.item() and high.item() < most:
            return norms.prod(0, dtype=torch.float64).to(norms.dtype)
    log2 = power_below(norms.detach())
    product = Scaled(double(norms / torch.exp2(log2)).prod(0), double(log2).sum(0))
    return product.value().to(norms.dtype)


class _Gram(NamedTuple):
    """Inner products ``x * 2**rows * 2**columns`` of a node's tensors, ``(R_above, other's R_above)``."""

    x: Tensor
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class _Meeting:
    """Equal nodes of two networks: how their inner products follow from those of their children.

    Attributes:
        weights: Where the weights are among the stacks of each network; ``None`` at bare leaves and a root
            of ones.
        children: Where the inner products of the children are, but for identities between full joins; and
            of which size, if they are identities.
        tied: Whether those are multiplied entry by entry first, as both have a diagonal join.
        call: The contraction; ``None`` where one leaf is bare, or both.
        axis: Of the weights, where the only child is that is no identity: as in trains, two products then do.
    """

    weights: tuple[Places | None, ...]
    children: tuple[tuple[Places, int | None], ...]
    tied: bool
    call: Einsum | None
    axis: int | None = None


@lru_cache(maxsize=64)
def _meetings(one: Network, other: Network) -> tuple[_Meeting, ...]:
    """Plan an inner product, level by level."""
    links, both = one.tree.links, (one, other)
    kinds = [(other.shape(i), *(other.joins[k] for k in (i, *below))) for i, below in enumerate(links)]
    found, node = list[_Meeting](), get_symbol(0)
    for level in one.split_levels(kinds):
        first, count = level.positions[0], len(level.positions)
        joins, shapes = [net.joins[first] for net in both], [net.shape(first) for net in both]
        weights = tuple(
            Places.of([net.slots[i] for i in level.positions]) if first in net.slots else None for net in both
        )
        if "bare" in joins:
            found.append(_Meeting(weights, (), False, None))
            continue
        # symbols: nodes, bonds above, bonds below; a diagonal join has one of these, and at leaves, and where
        # both have a bare leaf, both meet in the mode
        inner = [
            [get_symbol(3 + (2 * k if joins[side] == "full" else 0) + side) for k in range(len(below))]
            or [get_symbol(3)]
            for side, below in enumerate([links[first]] * 2)
        ]
        alike = [c in one.bare and c in other.bare for c in links[first]]
        if joins == ["full", "full"]:
            inner[1] = [a if same else b for a, b, same in zip(*inner, alike, strict=True)]
        sizes_of = [one.bonds[c] if same else None for c, same in zip(links[first], alike, strict=True)]
        pairs = zip(level.children, sizes_of, *inner, strict=True) if alike else ()
        children = tuple((child, size) for child, size, a, b in pairs if a != b)
        tied = joins == ["diagonal"] * 2
        words = [node + a + b for a, b in zip(*inner, strict=True) if a != b][: 1 if tied else None]
        above = [get_symbol(1), get_symbol(2)] if first < len(links) - 1 else ["", ""]
        sizes = {node: count}
        for side, word in enumerate(inner):
            word = [*dict.fromkeys(word), *above[side]]
            sizes |= zip(word, shapes[side], strict=True)
            if weights[side] is not None:
                words.append(node + "".join(word))
        call = einsum(f"{','.join(words)}->{node}{above[0]}{above[1]}",
                      *(tuple(sizes[s] for s in word) for word in words))  # fmt: skip
        axis = None
        if joins == ["full", "full"] and len(children) == 1 and above[0]:
            axis = 1 + level.children.index(children[0][0])
        found.append(_Meeting(weights, children, tied, call, axis))
    return tuple(found)


def inner_products(networks: Sequence[Network], stacks: Sequence[Sequence[Tensor]]) -> Scaled:
    """Inner product of two factorizations over one tree and sizes, without either dense tensor.

    At first there is one scale. Where rows or columns of an inner product come near the end of the range all
    is done again, with a scale for each of them.

    Args:
        networks: Two networks.
        stacks: For each its weights as ``network.stacks`` groups them, of one dtype; those of the first are
            conjugated.
    """
    meetings, sample = _meetings(networks[0], networks[1]), stacks[0][0]
    most = max((m.call for m in meetings if m.call), key=lambda call: call.cost.peak)
    shapes = [*most.shapes, (most.cost.peak,)]
    must_fit("an inner product", shapes, sample.dtype, sample.device, "take smaller ranks", copies=3)
    found = _plain_inner_products(meetings, stacks)
    return _scaled_inner_products(networks, stacks) if found is None else found


def _plain_inner_products(meetings: Sequence[_Meeting], stacks: Sequence[Sequence[Tensor]]) -> Scaled | None:
    """Compute an inner product with one scale; ``None`` if something may have left the range. Reads."""
    sample = stacks[0][0]
    reach = math.log2(torch.finfo(sample.dtype).max)
    far, near = 2.0 ** (reach / 5), 2.0 ** (reach / 128)  # what stays in range anyway; what needs no scale
    distinct = stacks[0] if stacks[1] is stacks[0] else [*stacks[0], *stacks[1]]
    weights, grams, log2 = [Stacked(side) for side in stacks], Stacked(), 0
    products: dict[torch.Size, list[Tensor]] = {}
    sizes = torch.stack([torch.linalg.vector_norm(stack.detach()) for stack in distinct]).tolist()

    def moderate(x: Tensor) -> Tensor:
        nonlocal log2
        norm: float = torch.linalg.vector_norm(x.detach() if x.requires_grad else x).tolist()
        sizes.append(norm)
        if 1 / far < norm < far and not 1 / near < norm < near:  # beyond that all is done again
            exponent = math.frexp(norm)[1]
            x, log2 = x * 2.0**-exponent, log2 + exponent * len(x)
        if x.ndim == 3:
            products.setdefault(x.shape, []).append(x)
        return x

    for meeting in meetings:
        one, other = (None if p is None else w.pick(p) for w, p in zip(weights, meeting.weights, strict=True))
        one = None if one is None else one.conj()
        if meeting.call is None:  # the other leaf meets an identity
            grams.append(other if one is None else one.mT)  # type: ignore[arg-type]
            continue
        below = list[Tensor]()
        for place, size in meeting.children:
            if size is not None:
                eye = torch.eye(size, dtype=sample.dtype, device=sample.device)
            below.append(grams.pick(place) if size is None else eye.expand(len(place.pairs), -1, -1))
        while meeting.tied and len(below) > 1:
            below.append(moderate(below.pop() * below.pop()))
        operands = [*below, *(w for w in (one, other) if w is not None)]
        gram = meeting.call(operands) if meeting.axis is None else _along_axis(meeting.axis, *operands)
        gram = moderate(gram)
        grams.append(gram)
    largest = list[Tensor]()
    for group in products.values():  # equal ones of a chain together
        x = (torch.cat(group) if len(group) > 1 else group[0]).detach().abs()
        largest += [x.amax(1).flatten(), x.amax(2).flatten()]
    sizes += [torch.cat(largest).amin().item()] if largest else []
    if not all(1 / far < size < far for size in sizes):
        return None
    return Scaled(gram[0], gram.real.new_tensor(float(log2)))


def _along_axis(axis: int, gram: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Contract all but the last axes of weights ``(n, ..)``, one of them through a matrix ``(n, R, R')``."""
    one, other = one.movedim(axis, 1), other.movedim(axis, 1)
    product = gram @ other.reshape(len(other), other.shape[1], -1)
    rows = product.reshape(len(product), -1, other.shape[-1])
    return one.reshape(len(one), -1, one.shape[-1]).mT @ rows


def _scaled_inner_products(networks: Sequence[Network], stacks: Sequence[Sequence[Tensor]]) -> Scaled:
    """Compute an inner product with scales of the rows and columns at every node."""
    links, sample = networks[0].tree.links, stacks[0][0]
    own = [
        {i: side[stack][slot] for i, (stack, slot) in network.slots.items()}
        for network, side in zip(networks, stacks, strict=True)
    ]
    grams: list[_Gram] = []
    for i, below in enumerate(links):
        children = [grams[c] for c in below]
        diagonal = [network.joins[i] == "diagonal" for network in networks]
        if all(diagonal):
            children = [_product(children)]
        symbols = [
            # a diagonal join has one index below it; at a leaf both networks meet in the mode
            [get_symbol(2 + (side if below else 0) + (0 if diagonal[side] else 2 * k))
             for k in range(max(len(children), 1))]
            for side in range(2)
        ]  # fmt: skip
        pair = []
        for side in range(2):
            if i in own[side]:
                pair.append(own[side][i].unsqueeze(-1) if i == len(links) - 1 else own[side][i])
            elif below:  # a root of ones
                pair.append(children[0].x.new_ones(children[0].x.shape[side], 1))
            else:
                size = networks[side].bonds[i]
                pair.append(torch.eye(size, dtype=sample.dtype, device=sample.device))
        words = ["".join(dict.fromkeys(symbols[side])) + get_symbol(side) for side in range(2)]
        inner = [one + other for one, other in zip(*symbols, strict=True)] if below else []
        equation = f"{','.join([*inner, *words])}->{get_symbol(0)}{get_symbol(1)}"
        operands, logs = [child.x for child in children], []
        call = einsum(equation, *(tuple(x.shape) for x in (*operands, *pair)))
        for side, weight in enumerate(pair):
            below_it = [child[1 + side] for child in children]
            below_it = [torch.stack(below_it).sum(0)] if diagonal[side] else below_it
            # in a norm both sides of a leaf are the same
            if side == 0 or below or stacks[0] is not stacks[1]:
                scaled, log2 = absorb(weight, below_it)
            operands.append(scaled if side else scaled.conj())
            logs.append(log2)
        gram = _equilibrate(call(operands))
        grams.append(_Gram(gram.x, logs[0] + gram.rows, logs[1] + gram.columns))
    gram = grams[-1]
    return Scaled(gram.x[0, 0], gram.rows[0] + gram.columns[0])


def _product(grams: Sequence[_Gram]) -> _Gram:
    """Entrywise product of scaled matrices, rescaled after each factor."""
    x, rows, columns = grams[0]
    for gram in grams[1:]:
        x, by_row, by_column = _equilibrate(x * gram.x)
        rows, columns = rows + gram.rows + by_row, columns + gram.columns + by_column
    return _Gram(x, rows, columns)


def _equilibrate(x: Tensor) -> _Gram:
    """Divide rows, then columns of a matrix by the powers of two below their largest magnitudes."""
    rows = powers_below(x.detach().abs().amax(1))
    x, columns = scale_columns(x / torch.exp2(rows).unsqueeze(1))
    return _Gram(x, rows, columns)
