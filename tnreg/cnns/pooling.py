"""Product pooling and 1x1 convolutions: the layers of the networks that trees are.

A layer holds the nodes of one height of a mode tree. Product pooling multiplies the channels of
siblings: channel by channel under a diagonal join, all pairs of channels (R_1 ... R_k of them) under a
full join. A 1x1 convolution with filters of its own at every node follows.

Positions come first in memory, ``(positions, batch, channels)``: equal nodes are then one batched
matrix product, and siblings are next to each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnreg.networks.network import Network

# As many moderate factors may meet without a scale of their own.
_FACTORS = 4

# Factors with magnitudes in [1, 2) that are multiplied before their product is scaled.
_SCALED_FACTORS = 64


@dataclass(frozen=True)
class Group:
    """Equal nodes of one height, and where the values of their children are.

    Attributes:
        positions: Positions in ``tree.nodes``.
        join: ``"leaf"``, ``"diagonal"`` or ``"full"``.
        block: The earlier group whose slots are the children of these nodes, in order, if there is one.
        picks: Otherwise, for each child, ``(group, slot)`` per node.
        even: Whether the pooled values are to be scaled: more than four convolved inputs have been
            multiplied below since that was done last (so never more than some sixteen are), or eight
            convolutions have followed each other.
    """

    positions: tuple[int, ...]
    join: str
    block: int | None
    picks: tuple[tuple[tuple[int, int], ...], ...]
    even: bool

    def children(
        self, blocks: Sequence[Tensor], rows: Mapping[int, Sequence[Tensor]]
    ) -> list[Tensor]:
        """For each child the values ``(nodes, B, channels)``.

        Args:
            blocks: Values of the earlier groups.
            rows: The same, cut into nodes where some group needs it.
        """
        if self.block is not None:
            whole = blocks[self.block]
            count = len(self.positions)
            return list(whole.reshape(count, -1, *whole.shape[1:]).unbind(1))
        return [torch.stack([rows[g][slot] for g, slot in child]) for child in self.picks]


def groups_of(net: Network) -> tuple[Group, ...]:
    """The nodes of a network in groups that one batched call can handle, leaves first, the root last."""
    tree = net.tree
    members = [stack.positions for stack in net.stacks]
    if net.root_ones:
        members.append((len(tree.nodes) - 1,))
    order = sorted(range(len(members)), key=lambda s: (tree.heights[members[s][0]], s))
    slot: dict[int, tuple[int, int]] = {}
    factors: dict[int, int] = {}
    steps: dict[int, int] = {}
    out: list[Group] = []
    for s in order:
        positions = members[s]
        below = [tree.links[p] for p in positions]
        places = [[slot[c] for c in children] for children in below]
        picks = tuple(zip(*places, strict=True)) if below[0] else ()
        flat = [place for children in places for place in children]
        block = None
        if flat:
            first = flat[0][0]
            whole = [(first, k) for k in range(len(out[first].positions))]
            block = first if flat == whole else None
        multiplied = max(
            (sum(factors[c] for c in children) for children in below if children), default=1
        )
        taken = 1 + max((steps[c] for children in below for c in children), default=0)
        even = multiplied > _FACTORS or taken > 2 * _FACTORS
        factors |= dict.fromkeys(positions, 1 if even else multiplied)
        steps |= dict.fromkeys(positions, 0 if even else taken)
        picks = () if block is not None else picks
        out.append(Group(positions, net.joins[positions[0]], block, picks, even))
        slot |= {p: (len(out) - 1, k) for k, p in enumerate(positions)}
    return tuple(out)


def pooled(
    parts: Sequence[Tensor], join: str, *, dim: int = -1, scaled: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Product over siblings, and what it has to be multiplied with.

    Args:
        parts: For each child its channels along ``dim``, all of one shape but for ``dim``.
        join: ``"diagonal"``: channel by channel; ``"full"``: all products of one channel of each child,
            the channel of the last child running fastest.
        dim: Axis of the channels.
        scaled: Under a diagonal join of more than four children, scale every factor by a power of two,
            channel by channel, so that a product of any number of factors stays in the dtype's range.

    Returns:
        The product, and binary logarithms of its scale (channels of size 1), or ``None`` for no scale.
    """
    if scaled and join == "diagonal" and len(parts) > _FACTORS:
        return _wide_product(parts, dim)
    out = parts[0]
    for part in parts[1:]:
        if join == "full":
            out = (out.unsqueeze(dim) * part.unsqueeze(dim - 1)).flatten(dim - 1, dim)
        else:
            out = out * part
    return out, None


def _wide_product(parts: Sequence[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    out, logs = _even(parts[0], parts[0].detach().abs())
    for k, part in enumerate(parts[1:], 1):
        one, log = _even(part, part.detach().abs())
        out, logs = out * one, logs + log
        if k % _SCALED_FACTORS == 0:
            out, log = _even(out, out.detach().abs())
            logs = logs + log
    # only now do channels meet: what is far below the largest of them is lost in rounding anyway
    dead = -torch.finfo(logs.dtype).max
    top = torch.where(out.detach() == 0, dead, logs).amax(dim, keepdim=True)
    top = torch.where(top == dead, logs.amax(dim, keepdim=True), top)
    reach = math.log2(torch.finfo(logs.dtype).max) / 2
    return out * torch.exp2((logs - top).clamp_max(reach)), top


def rescaled(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Divide by the power of two below the largest magnitude along ``dim``: ``(x, binary logarithms)``.

    The scale is constant to autograd: what is multilinear does not depend on it.
    """
    return _even(x, x.detach().abs().amax(dim, keepdim=True))


def taken_over(x: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Divide ``x`` by the power of two below the filters' largest magnitude, and its binary logarithm.

    What those filters make of ``x`` is then as moderate as ``x`` was.
    """
    return _even(x, filters.detach().abs().flatten().amax(0))


def _even(x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    log = (size + (size == 0)).log2().floor()  # zeros keep their scale
    # within what the dtype can invert
    reach = math.log2(torch.finfo(size.dtype).max) - 2
    log = log.clamp(-reach, reach)
    return x * torch.exp2(-log), log


class LocalConv(nn.Module):
    """1x1 convolutions with filters of their own at every position.

    Args:
        weight: ``(positions, *channels in, channels out)``.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(positions, B, channels in)`` to ``(positions, B, channels out)``."""
        return torch.bmm(x, self.weight.flatten(1, -2))

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``forward`` with filters scaled to about 1, and the binary logarithm of what they lack in all."""
        weight = self.weight.flatten(1, -2)
        even, log = _even(weight, weight.detach().abs().amax((1, 2), keepdim=True))
        return torch.bmm(x, even), log.sum()

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        count, *inner, out = self.weight.shape
        return f"{math.prod(inner)}, {out}, kernel_size=1, positions={count}"
