"""Matrices with a logarithmic scale per column, for products that leave the range of the dtype.

A tensor of order 1024 multiplies a thousand weights. What is kept is a matrix ``m`` of moderate size
and a vector of logarithms ``logs``; they stand for ``m * exp(logs)``, column by column. One scale per
column rather than one for all, because two columns may drift apart below one node and meet again above
it. Scales are constants to autograd: they cancel in every result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from opt_einsum.parser import get_symbol
from torch import Tensor

from tnreg.networks.einsum import einsum


def columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the slices along the last axis by their largest magnitude: ``(x, logs)``."""
    largest = _positive(_largest(x.flatten(0, -2)))
    return x / largest, largest.log()


def absorbed(weight: Tensor, logs: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Multiply a weight by ``exp(logs[i])`` along axis i, then scale its columns.

    Args:
        weight: Shape ``(R_1, ..., R_k, R)``.
        logs: For each of the first k axes its logarithms, or ``None``.

    Returns:
        The weight with columns of largest magnitude 1 (or 0), and their logarithms ``(R,)``.
    """
    total = torch.zeros((), dtype=weight.real.dtype, device=weight.device)
    for axis, log in enumerate(logs):
        if log is not None:
            total = total + log.reshape([-1 if k == axis else 1 for k in range(weight.ndim)])
    high, low = total.max(), total.min()
    if bool(high - low < 0.2 * math.log(torch.finfo(total.dtype).max)):
        # the usual case: no product of a column's entries can leave the range
        weight, first = columns(weight)
        if total.ndim == 0:
            return weight, first + total
        weight, second = columns(weight * (total - high).exp())
        return weight, first + second + high
    size = weight.detach().abs().log() + total  # -inf at zeros
    top = size.flatten(0, -2).amax(0)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    # |weight| * exp(total - top) <= 1, but the exponential alone may overflow: in halves
    half = ((total - top) / 2).exp()
    scaled = weight * half * half
    return torch.where(weight == 0, torch.zeros_like(weight), scaled), top


def times(matrix: Tensor, logs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``(matrix * exp(logs)) @ weight``, its columns scaled: ``(matrix, logs)``.

    Args:
        matrix: ``(rows, R)``, columns of largest magnitude 1 or 0; few rows beside those of the weight.
        logs: ``(R,)``.
        weight: ``(R, S)``.
    """
    high, low = logs.max(), logs.min()
    quarter = 0.2 * math.log(torch.finfo(logs.dtype).max)
    # one number per column, so that a large weight is neither copied nor read twice
    largest = _positive(_largest(weight))
    spread = torch.stack([high - low, largest.log().abs().max()])
    if bool((spread < quarter).all()):  # the usual case: no product can leave the range
        matrix, more = columns((matrix * (logs - high).exp()) @ weight)
        return matrix, more + high
    weight, more = absorbed(weight, [logs])
    matrix, rest = columns(matrix @ weight)
    return matrix, more + rest


def full_rows(below: Sequence[tuple[Tensor, Tensor]], weight: Tensor) -> tuple[Tensor, Tensor]:
    """All combinations of the children's rows, through the weight of a full join: ``(rows, R_above)``.

    Args:
        below: For every child a matrix ``(rows, bond)`` and the logarithms of its columns' scales.
        weight: ``(R_c1, ..., R_ck, R_above)``.

    Returns:
        The matrix with columns of largest magnitude 1 or 0, and their logarithms.
    """
    weight, logs = absorbed(weight, [log for _, log in below])
    symbols = [get_symbol(k) for k in range(2 * len(below) + 1)]
    bonds, rows, above = symbols[: len(below)], symbols[len(below) : -1], symbols[-1]
    terms = [row + bond for row, bond in zip(rows, bonds, strict=True)]
    equation = f"{','.join(terms)},{''.join(bonds)}{above}->{''.join(rows)}{above}"
    operands = [*(matrix for matrix, _ in below), weight]
    whole = einsum(equation, *(tuple(o.shape) for o in operands))(operands)
    whole, more = columns(whole.flatten(0, -2))
    return whole, logs + more


def column_norms(matrix: Tensor) -> Tensor:
    """Norms of the columns, safe at scales whose squares leave the range of the dtype."""
    if matrix.is_complex():  # (n, R) -> (n, R, 2) -> (2n, R)
        matrix = torch.view_as_real(matrix).mT.flatten(0, 1)
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
        largest = matrix.detach().abs().amax(0)
        scale = torch.where(largest > 0, largest, torch.ones_like(largest))
        squares = (matrix / scale).double().square().sum(0)
    alive = squares > 0  # the root has no gradient at zero; the norm has a subgradient, 0
    norms = torch.where(alive, torch.where(alive, squares, 1).sqrt(), 0)
    return (norms * scale).to(matrix.dtype)


def _largest(x: Tensor) -> Tensor:
    """Largest magnitude in every column of a matrix."""
    x = x.detach()
    return x.abs().amax(0) if x.is_complex() else torch.maximum(x.amax(0), -x.amin(0))


def equilibrated(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide rows, then columns of a matrix by their largest magnitudes: ``(x, row logs, column logs)``."""
    rows = _positive(x.detach().abs().amax(1))
    x = x / rows.unsqueeze(1)
    x, logs = columns(x)
    return x, rows.log(), logs


def unscaled(value: Tensor, log: Tensor) -> Tensor:
    """``value * exp(log)``: infinite only if the result is, and zeros stay zeros."""
    if value.is_complex():
        return torch.complex(unscaled(value.real, log), unscaled(value.imag, log))
    half = (log / 2).exp()  # exp(log) alone may overflow where the product does not
    return torch.where(value == 0, torch.zeros_like(value), value * half * half)


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))
