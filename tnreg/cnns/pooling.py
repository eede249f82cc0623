"""Product pooling and 1x1 convolutions: the layers of the networks that trees are.

Positions come first in memory, ``(positions, batch, channels)``: equal nodes are then one batched
matrix product, and siblings are next to each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnreg.networks.network import Network
from tnreg.tensors.arrays import Scaled, power_below, rescale

FACTORS = 4  # as many moderate ones may meet without a scale of their own
_SCALED_FACTORS = 64  # with magnitudes in [1, 2), multiplied before their product is scaled


def which_rescale(network: Network) -> list[bool]:
    """Return for every level whether what its nodes pool is scaled.

    It is where more than four convolved inputs have been multiplied since that was done last below (so
    never more than some sixteen are), or eight convolutions have followed each other.
    """
    factors, steps, rescales = dict[int, int](), dict[int, int](), list[bool]()
    for level in network.levels:
        below = [network.tree.links[p] for p in level.positions]
        product = max(1, *(sum(factors[c] for c in children) for children in below))
        chain = 1 + max((steps[c] for children in below for c in children), default=0)
        rescales.append(product > FACTORS or chain > 2 * FACTORS)
        factors |= dict.fromkeys(level.positions, 1 if rescales[-1] else product)
        steps |= dict.fromkeys(level.positions, 0 if rescales[-1] else chain)
    return rescales


def pool(parts: Sequence[Tensor], join: str, dim: int = -1) -> Tensor:
    """Multiply siblings, whose channels are along ``dim``: product pooling.

    A diagonal join multiplies channel by channel; a full one makes all products of one channel of each
    child, the channel of the last child running fastest.
    """
    product, dim = parts[0], dim % parts[0].ndim
    for part in parts[1:]:
        if join == "full":
            product = (product.unsqueeze(dim + 1) * part.unsqueeze(dim)).flatten(dim, dim + 1)
        else:
            product = product * part
    return product


def scaled_product(parts: Sequence[Tensor], dim: int = -1) -> Scaled:
    """Multiply any number of siblings channel by channel, within the dtype's range.

    Every channel of every factor is scaled by a power of two; the product has one scale for all channels.
    """
    product, log2 = _scale_each(parts[0])
    for k, part in enumerate(parts[1:], 1):
        factor, more = _scale_each(part)
        product, log2 = product * factor, log2 + more
        if k % _SCALED_FACTORS == 0:
            product, more = _scale_each(product)
            log2 = log2 + more
    # only now do channels meet: what is far below the largest of them is lost in rounding anyway
    dead = -torch.finfo(log2.dtype).max
    top = torch.where(product.detach() == 0, dead, log2).amax(dim, keepdim=True)
    top = torch.where(top == dead, log2.amax(dim, keepdim=True), top)
    reach = math.log2(torch.finfo(log2.dtype).max) / 2
    return Scaled(product * torch.exp2((log2 - top).clamp_max(reach)), top)


def _scale_each(x: Tensor) -> Scaled:
    """Give every number a scale of its own."""
    log2 = power_below(x.detach().abs())
    return Scaled(x * torch.exp2(-log2), log2)


class LocalConv(nn.Module):
    """1x1 convolutions with filters at every position, ``(positions, *channels in, channels out)``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, scaled: bool = False) -> Any:
        """Convolve ``(positions, B, channels in)`` to ``(positions, B, channels out)``.

        With ``scaled`` by filters of magnitude 1, to a ``Scaled`` whose logarithm is the sum over positions.
        """
        filters = self.weight.flatten(1, -2)
        if not scaled:
            return torch.bmm(x, filters)
        small = rescale(filters, (1, 2))
        return Scaled(torch.bmm(x, small.x), small.log2.sum())

    def extra_repr(self) -> str:
        """Describe the filters for ``print``."""
        count, *inner, out = self.weight.shape
        return f"{math.prod(inner)}, {out}, kernel_size=1, positions={count}"
