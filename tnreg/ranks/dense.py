"""Ranks of dense tensors: matricizations along a tree, their singular values, and what to read off them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tnreg.errors import DataError, ShapeError, check_number
from tnreg.tensors.arrays import (
    as_tensor,
    check_largest,
    check_order,
    double,
    seeded,
    times_power_of_two,
    to_range,
)
from tnreg.tensors.axes import axis_gram, triangle
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

# Eigenvalues of a Gram matrix carry an error of about eps * s_max². A singular value s then has an error of
# some 10 eps * s_max² / s: above this share of s_max below 1e-11 * s_max, in single precision 1e-5 * s_max.
_GRAM_FLOOR = {torch.float64: 1e-3, torch.float32: 1e-1}

# Tensors up to here get one SVD per node: more would take longer than it saves.
_SMALL = 2**12

# A low rank is looked for in so many mixtures of columns first, if a matrix has three times as many rows.
_SKETCH = 20


@dataclass(frozen=True)
class _Branch:
    """Modes on one side of an edge, and how the edges within it split them further.

    ``nodes`` are the positions whose matricization, or its transpose, has these modes as its ``rows``.
    """

    nodes: tuple[int, ...]
    modes: tuple[int, ...]
    rows: int
    parts: tuple[_Branch, ...] = ()


def dense_spectra(
    x: Tensor | np.ndarray[Any, Any], tree: ModeTree, work: torch.dtype = torch.float64
) -> dict[Node, Tensor]:
    """Compute what ``spectra`` promises of a dense tensor.

    Some node of the tree has branches around it none of which has more entries than all others together.
    For each of them the spectra come from the Gram matrix of its rows in float64, and those within it from
    partial traces of that. If a spectrum reaches below 1e-3 of its largest value, where squaring loses
    digits, it comes from a QR factorization instead, and those within it from its triangular factor. Before
    that, random vectors look for a basis of the rows; if it is small, and misses no more than rounding, its
    coordinates take their place.

    Errors stay below 1e-11 of the largest singular value (float64), in single precision below 1e-5. A small
    tensor gets one SVD per node; so does one that requires a gradient, which is then differentiable.
    """
    x = as_tensor(x)
    check_order(tuple(x.shape), tree)
    largest = check_largest(x)
    if x.requires_grad and torch.is_grad_enabled():
        scaled, log2 = to_range(x, work, largest)
        values = _svdvals_of_nodes(scaled, tree)
    else:
        values, log2 = scaled_spectra(x, tree, work, largest)
    if log2:  # the power alone may leave the range of single precision
        values = {node: times_power_of_two(double(s), log2) for node, s in values.items()}
    dtype = x.real.dtype
    return {node: s if s.dtype == dtype else s.to(dtype) for node, s in values.items()}


def scaled_spectra(
    x: Tensor, tree: ModeTree, work: torch.dtype = torch.float64, largest: float | None = None
) -> tuple[dict[Node, Tensor], int]:
    """Compute ``(values, log2)`` of a checked tensor; its singular values are ``values * 2**log2``."""
    x, log2 = to_range(x.detach(), work, largest)
    if x.numel() <= _SMALL:
        return _svdvals_of_nodes(x, tree), log2
    branches = _branches_of(tree, tuple(x.shape))
    modes = [mode for branch in branches for mode in branch.modes]
    modes += [mode for mode in tree.leaves if mode not in modes]
    spectra = _Spectra(x.device)
    spectra.add(branches, x.permute(modes).contiguous())
    values = spectra.finish()
    return {node: values[i] for i, node in enumerate(tree.nodes[:-1])}, log2


def _svdvals_of_nodes(x: Tensor, tree: ModeTree) -> dict[Node, Tensor]:
    spectra, total = dict[int, Tensor](), x.numel()
    for cut, order, columns in _matrices_of(tree, tuple(x.shape)):
        matrix = x.permute(order).reshape(-1, columns)
        if total >= 32 * columns**2 and not x.requires_grad:  # with two threads a fourth of the time
            matrix = triangle(matrix)
        spectra |= dict.fromkeys(cut, torch.linalg.svdvals(matrix))
    return {node: spectra[i] for i, node in enumerate(tree.nodes[:-1])}


@lru_cache(maxsize=64)
def _matrices_of(
    tree: ModeTree, sizes: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """List for every cut the order of modes, and the number of columns, of a matricization.

    It has no more columns than rows: of others SVDs take a multiple of the time.
    """
    matrices, total = [], math.prod(sizes)
    for cut in tree.cuts:
        inside = tree.modes_below(tree.nodes[cut[0]])
        outside = tuple(mode for mode in tree.leaves if mode not in inside)
        columns = math.prod(sizes[mode] for mode in inside)
        if columns**2 > total:
            inside, outside, columns = outside, inside, total // columns
        matrices.append((cut, outside + inside, columns))
    return matrices


@lru_cache(maxsize=64)
def _branches_of(tree: ModeTree, sizes: tuple[int, ...]) -> tuple[_Branch, ...]:
    """Return the branches around a node of the tree, none of which has more rows than columns."""

    def join(i: int, parts: Sequence[_Branch]) -> _Branch:
        if len(parts) == 1:  # the same rows
            return replace(parts[0], nodes=(i, *parts[0].nodes))
        modes = tuple(mode for part in parts for mode in part.modes)
        return _Branch((i,), modes, math.prod(sizes[mode] for mode in modes), tuple(parts))

    links = tree.links
    below: list[_Branch] = []
    for i, children in enumerate(links):
        (mode, *_), total = tree.modes_below(tree.nodes[i]), math.prod(sizes)
        leaf = _Branch((i,), (mode,), sizes[mode])
        below.append(join(i, [below[c] for c in children]) if children else leaf)
    center, above = len(links) - 1, list[_Branch]()
    while larger := [c for c in links[center] if below[c].rows ** 2 > total]:
        above = [join(larger[0], [below[c] for c in links[center] if c != larger[0]] + above)]
        center = larger[0]
    branches = [below[c] for c in links[center]] + above
    if len(branches) == 2:  # a square matrix and its transpose
        first, second = branches
        branches = [replace(first, nodes=first.nodes + second.nodes), replace(second, nodes=())]
    return tuple(branches)


class _Spectra:
    """Spectra of all branches that are added; the Gram matrices of some wait until ``finish``."""

    def __init__(self, device: torch.device) -> None:
        self.values: dict[int, Tensor] = {}
        self.grams: list[tuple[_Branch, Tensor]] = []
        self.random = seeded(0, "spectra", device)

    def add(self, branches: Sequence[_Branch], core: Tensor, *, by_gram: bool = True) -> None:
        """Add branches whose rows are the first axes of a core, one after another, and all within them."""
        core = core.reshape([*[branch.rows for branch in branches], -1])
        for axis, branch in sorted(enumerate(branches), key=lambda pair: pair[1].rows):
            shape = core.shape
            view = core.reshape(math.prod(shape[:axis]), branch.rows, -1)
            if by_gram and core.numel() >= 2 * branch.rows**2:
                gram = axis_gram(view)
                values = _roots(gram)
                by_gram = bool(
                    values[-1] > _GRAM_FLOOR[values.dtype] * values[0]
                )  # else seldom for larger branches
                if by_gram:
                    self._set(branch, values)
                    self._trace(branch, gram)
                    continue
            rows = view.transpose(0, 1).reshape(branch.rows, -1)
            basis = self._basis(rows) if branch.nodes else None
            if basis is not None:
                rows = basis.mH @ rows
                core = rows.reshape(-1, len(view), view.shape[2]).transpose(0, 1)
                core = core.reshape([*shape[:axis], -1, *shape[axis + 1 :]])
            if rows.shape[1] > len(rows):
                rows = triangle(rows.mH).mH
            if branch.nodes:
                values = torch.linalg.svdvals(rows)
                self._set(branch, pad(values, (0, branch.rows - len(values))))
            if branch.parts:
                self.add(branch.parts, rows if basis is None else basis @ rows, by_gram=by_gram)

    def finish(self) -> dict[int, Tensor]:
        """Return the spectra by position."""
        for size in {len(gram) for _, gram in self.grams}:
            branches, grams = zip(*[pair for pair in self.grams if len(pair[1]) == size], strict=True)
            for branch, values in zip(branches, _roots(torch.stack(grams)), strict=True):
                self._set(branch, values)
        return self.values

    def _trace(self, branch: _Branch, gram: Tensor) -> None:
        """Trace the Gram matrices of all within a branch, whose spectra reach no lower."""
        before, behind = 1, branch.rows
        for part in branch.parts:
            behind //= part.rows
            blocks = gram.reshape(2 * (before, part.rows, behind))
            before *= part.rows
            self.grams.append((part, blocks.diagonal(0, 0, 3).diagonal(0, 1, 3).sum((2, 3))))
            self._trace(*self.grams[-1])

    def _set(self, branch: _Branch, values: Tensor) -> None:
        self.values |= dict.fromkeys(branch.nodes, values)

    def _basis(self, rows: Tensor) -> Tensor | None:
        """Find a basis that misses no more of the rows than rounding; ``None`` if it would not be small.

        It starts with mixtures of some columns; what it misses most is added.
        """
        width, rounding = _SKETCH, 16 * torch.finfo(rows.dtype).eps
        while 3 * width <= len(rows):
            places = torch.randint(rows.shape[1], (8 * width,), generator=self.random, device=rows.device)
            mixture = torch.randn(8 * width, width, generator=self.random, device=rows.device)
            basis, factor = torch.linalg.qr(rows[:, places] @ mixture.to(rows.dtype))
            sizes = factor.diagonal().abs().tolist()
            last = max(sizes[-3:]) / (max(sizes) or 1)
            if last <= rounding:
                return self._complete(basis, rows, 4 * rounding)
            width = 4 + math.ceil(width * math.log(rounding) / math.log(min(last, 0.9)))
        return None

    def _complete(self, basis: Tensor, rows: Tensor, allowed: float) -> Tensor | None:
        """Add columns to a basis until it misses no more than is allowed, a few times."""
        norm = float(rows.norm())
        for _ in range(3):
            rest = torch.addmm(rows, basis, basis.mH @ rows, alpha=-1)
            missed = float(rest.norm())
            if missed <= allowed * norm:
                return basis
            if missed > 1e-6 * norm:
                break
            sizes, places = rest.norm(dim=0).topk(min(8, rest.shape[1]))
            basis = torch.linalg.qr(torch.cat([basis, rest[:, places] / sizes], 1))[0]
        return None


def _roots(gram: Tensor) -> Tensor:
    """Return the singular values of matrices with these Gram matrices."""
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.clamp_min(0).sqrt().flip(-1)


def numerical_rank(s: Tensor, rtol: float) -> int:
    """Count singular values ``> rtol * s_max``."""
    rtol = check_number(rtol, "rtol", 0, 1)
    return int((s > rtol * s[0]).sum()) if len(s) else 0


def effective_rank(s: Tensor | Sequence[float]) -> Tensor:
    """Return the effective rank ``exp(-Σ p ln p)``, ``p = s / Σ s``, of a vector of singular values.

    Source: Roy and Vetterli (2007). The values are not negative, of shape ``(k,)``. The effective rank lies
    between 1 and the rank, is smooth where that jumps, and does not change when ``s`` is scaled.
    Differentiable; a zero vector gives 0.

    Example:
        >>> effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0]))
        tensor(3.)
    """
    s, largest, dtype = _check_values(s)
    if largest == 0:
        return torch.zeros_like(largest, dtype=dtype)
    s = s / largest  # a sum of huge values would overflow
    return torch.exp(_entropy(s / s.sum())).to(dtype)


def entanglement_entropy(s: Tensor | Sequence[float]) -> Tensor:
    """Return the entanglement entropy ``-Σ ρ ln ρ``, ``ρ = s² / Σ s²``, of values s in nats.

    The values are not negative, of shape ``(k,)``; the entropy is at most the logarithm of the rank.
    Differentiable; a zero vector gives 0.
    """
    s, largest, dtype = _check_values(s)
    if largest == 0:
        return torch.zeros_like(largest, dtype=dtype)
    square = (s / largest) ** 2
    return _entropy(square / square.sum()).to(dtype)


def _entropy(p: Tensor) -> Tensor:
    # 0 ln 0 = 0, with a zero instead of a NaN gradient
    p = torch.where(p > 0, p, torch.ones_like(p))
    return 0.0 - (p * p.log()).sum()  # not -0.0 where there is a single one


def _check_values(s: Tensor | Sequence[float]) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return the values in double precision, the largest as a constant (0 for none), and their dtype."""
    s = as_tensor(s)
    if s.ndim != 1 or not s.is_floating_point():
        raise ShapeError(
            f"expected a vector of real singular values, found shape {tuple(s.shape)}, dtype {s.dtype}."
        )
    dtype, s = s.dtype, double(s)
    fixed = s.detach()
    if not bool((torch.isfinite(fixed) & (fixed >= 0)).all()):
        raise DataError("singular values must be finite and not negative.")
    return s, fixed.max() if len(s) else fixed.sum(), dtype
