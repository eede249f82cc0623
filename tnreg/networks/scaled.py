"""Products on scales: matrices whose columns have binary scales of their own, and what is made of them.

A tensor of order 1024 multiplies a thousand weights. A matrix is kept as a ``Scaled`` of moderate numbers
and one binary logarithm for each column; not one for all, because two columns may drift apart below
one node and meet again above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from opt_einsum.parser import get_symbol
from torch import Tensor

from tnreg.machine.memory import must_fit
from tnreg.networks.einsum import einsum
from tnreg.networks.network import Network
from tnreg.tensors.arrays import Scaled, double, power_below, powers_below


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
    must_fit("a weight: its scaled copies", [weight.shape], weight.dtype, weight.device, copies=3)
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


def column_norms(matrix: Tensor) -> Tensor:
    """Norms of the columns, safe at scales whose squares leave the range of the dtype."""
    if matrix.is_complex():  # (n, R) -> (n, R, 2) -> (2n, R)
        matrix = torch.view_as_real(matrix.resolve_conj()).mT.flatten(0, 1)
    # not linalg.vector_norm, which takes ten times as long along columns
    scale: Tensor | float = 1.0
    if matrix.dtype == torch.float32:
        squares = None
        if matrix.device.type == "cpu":  # a copy in doubles is slow here; most often floats will do
            squares = matrix.square().sum(0, dtype=torch.float64)
            if not bool(((squares > 1e-24) & (squares < 1e30)).all()):
                squares = None
        if squares is None:  # squares of floats fit into doubles
            squares = matrix.double().square().sum(0)
    else:
        scale = torch.exp2(power_below(matrix.detach().abs().amax(0)))
        squares = (matrix / scale).double().square().sum(0)
    alive = squares != 0  # the root has no gradient at zero; the norm has a subgradient, 0
    norms = torch.where(alive, torch.where(alive, squares, 1).sqrt(), 0)
    return (norms * scale).to(matrix.dtype)


def product_of_rows(norms: Tensor) -> Tensor:
    """Product along the first axis; it leaves the range of the dtype only if the result does."""
    log2 = power_below(norms.detach())
    product = Scaled(double(norms / torch.exp2(log2)).prod(0), double(log2).sum(0))
    return product.value().to(norms.dtype)


class _Gram(NamedTuple):
    """Inner products ``x * 2**rows * 2**columns`` of a node's tensors, ``(R_above, other's R_above)``."""

    x: Tensor
    rows: Tensor
    columns: Tensor


def inner_products(networks: Sequence[Network], weights: Sequence[Sequence[Tensor]]) -> Scaled:
    """Inner product of two factorizations over one tree and sizes, without either dense tensor.

    Args:
        networks: Two networks.
        weights: For each its weights in the order of ``network.weighted``, of one dtype; the first are
            conjugated.
    """
    links = networks[0].tree.links
    grams: list[_Gram] = []
    for i, below in enumerate(links):
        children = [grams[c] for c in below]
        diagonal = [network.joins[i] == "diagonal" for network in networks]
        if all(diagonal):
            children = [_product(children)]
        operands, logs, words = [child.x for child in children], [], []
        symbols = [
            # a diagonal join has one index below it; at a leaf both networks meet in the mode
            [get_symbol(2 + (side if below else 0) + (0 if diagonal[side] else 2 * k))
             for k in range(max(len(children), 1))]
            for side in range(2)
        ]  # fmt: skip
        for side in range(2):
            if i == len(weights[side]):  # a root of ones
                weight = children[0].x.new_ones(children[0].x.shape[side], 1)
            else:
                weight = weights[side][i]
                weight = weight.unsqueeze(-1) if i == len(links) - 1 else weight
            inside = [child[1 + side] for child in children]
            inside = [torch.stack(inside).sum(0)] if diagonal[side] else inside
            # in a norm both sides of a leaf are the same
            if side == 0 or below or weights[0] is not weights[1]:
                scaled, log2 = absorb(weight, inside)
            operands.append(scaled if side else scaled.conj())
            logs.append(log2)
            words.append("".join(dict.fromkeys(symbols[side])) + get_symbol(side))
        pairs = [one + other for one, other in zip(*symbols, strict=True)] if below else []
        equation = f"{','.join([*pairs, *words])}->{get_symbol(0)}{get_symbol(1)}"
        gram = _equilibrate(einsum(equation, *(tuple(o.shape) for o in operands))(operands))
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
