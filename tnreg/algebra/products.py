"""Entrywise products of factorizations, rounded without forming them at full rank.

The bonds of a product are the products of the bonds: at 32 and 32 a binary node of it has a thousand
million entries. Here the product stays what it is, two networks that share their modes. From the leaves
up, the matricization at every node is multiplied by random tensors that are networks over the same tree;
what comes out spans, nearly, what the product needs of the node (Halko, Martinsson and Tropp 2011; for
tensor trains Al Daas et al. 2023, arXiv:2110.04393). The product is projected on that, which gives a
factorization with orthonormal columns, and the projection is rounded as ever.

How much the projection loses is computed where that is affordable: it is orthogonal, so the squared norm
of the product less its own. Elsewhere it is estimated with random tensors that it was not made from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from opt_einsum.parser import get_symbol
from torch import Tensor

from tnreg.errors import OptionError
from tnreg.factorizations.factorization import Factorization
from tnreg.networks.einsum import Einsum, einsum
from tnreg.ranks.rounding import built, limits_of, on_network, rounded, share_of
from tnreg.tensors.arrays import times_power_of_two
from tnreg.trees.reading import Node

# Columns of the first try, by how much the next one has more, and how many serve the estimate.
_FIRST_WIDTH, _GROWTH, _FRESH = 16, 1.5, 16

# Largest bond of the random tensors, unless more columns are needed.
_WIDEST = 512

# Numbers in one intermediate, and in one weight of the projection.
_MOST_NUMBERS, _LARGEST_WEIGHT = 2**25, 2**28

# The norm of the product is computed if that takes no more flops than this, for tolerances from this on:
# differences of squares do not tell less.
_MOST_FLOPS, _LEAST_RTOL = 1e11, 1e-6

# Share of the tolerance that the projection may take if its error is computed, and if it is estimated;
# in that case three times as much is kept free.
_COMPUTED_SHARE, _ESTIMATED_SHARE = 0.5, 0.1

# Axes above a node in both factors, the same for their conjugates, and that of what is done many times.
_ABOVE, _CONJUGATE, _COLUMN = (
    get_symbol(0) + get_symbol(1), get_symbol(2) + get_symbol(3), get_symbol(4)
)  # fmt: skip

_Scaled = tuple[Tensor, float]  # a tensor and the binary logarithm of its scale


def rounded_product(
    one: Factorization,
    other: Factorization,
    *,
    rtol: float | None,
    ranks: int | Mapping[Node, int] | None,
    seed: int,
) -> Factorization:
    """``one * other`` rounded; see ``algebra.hadamard``, which checks that they fit."""
    tree, share = one.tree, share_of(rtol)
    limits = limits_of(tree, ranks)
    with torch.no_grad():
        pair = _Pair(one, other)
        widest = max(pair.bonds[:-1])
        most = widest
        if len(limits) == len(tree.nodes) - 1:
            most = min(widest, 2 * max(limits.values()) + _FIRST_WIDTH)
        random = torch.Generator(one.device).manual_seed(seed)
        norm = pair.square_norm() if rtol is not None and rtol >= _LEAST_RTOL else None
        steady = norm is None and share is not None
        fresh = pair.sketched(_FRESH, random, steady=True) if steady else None
        part = _ESTIMATED_SHARE if norm is None else _COMPUTED_SHARE
        width = most if share is None else min(_FIRST_WIDTH, most)
        while True:
            found = pair.projected(pair.sketched(width, random, steady=steady), fresh)
            whole, lost = found.square + found.lost, found.lost
            if norm is not None:
                whole = norm[0] * 2.0 ** min(norm[1] - 2 * found.log2, 1000.0)
                lost = max(whole - found.square, 0.0) + pair.hidden * whole
            if width >= most or share is None or lost <= (part * share) ** 2 * whole:
                break
            width = min(math.ceil(_GROWTH * width), most)
        sure = width >= widest or norm is not None
        left = share
        if width >= widest:
            lost = 0.0
        elif share is not None and norm is not None:
            left = math.sqrt(max(share**2 * whole - lost, 0.0) / (found.square or 1.0))
        elif share is not None:
            left = math.sqrt(1 - (3 * _ESTIMATED_SHARE) ** 2) * share
        rest = rounded(*on_network(tree, found.weights), limits, left)
        cut = math.hypot(math.sqrt(rest.lost) * rest.size, math.sqrt(lost) * 2.0**-rest.power)
        dtype = torch.promote_types(one.dtype, other.dtype)
        out = built(tree, rest.weights, rest.power + found.log2 + pair.log2, dtype, cut)
        if not sure:
            out.error_bound = None
        return out


@dataclass(frozen=True)
class _Projection:
    """The product projected: the tensor of ``weights`` times ``2**log2``.

    Attributes:
        weights: By position, with orthonormal columns but for the root's.
        log2: Binary logarithm of the scale.
        square: Squared norm, without that scale.
        lost: Estimate of the squared norm of what is not in it, without that scale.
    """

    weights: dict[int, Tensor]
    log2: float
    square: float
    lost: float


class _Pair:
    """Two factorizations over one tree, and contractions of their product, node by node."""

    def __init__(self, one: Factorization, other: Factorization) -> None:
        self.tree, self.top = one.tree, len(one.tree.nodes) - 1
        dtype = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float64)
        self.joins = [model.network.joins for model in (one, other)]
        sides = [_even_columns(model, dtype) for model in (one, other)]
        self.weights = [weights for weights, _ in sides]
        self.log2 = sides[0][1] + sides[1][1]
        self.bonds = [a.shape[-1] * b.shape[-1] for a, b in zip(*self.weights, strict=True)]
        self.hidden = 64 * len(self.tree.nodes) * torch.finfo(torch.float64).eps

    def rows(self, i: int) -> list[str]:
        """Axes below node i: one for every child; at a leaf its mode."""
        return [get_symbol(5 + 5 * c) for c in range(max(len(self.tree.links[i]), 1))]

    def inner(self, i: int, conjugate: bool = False) -> list[str]:
        """For every child of node i the bonds above it in both factors."""
        return [
            "".join(
                get_symbol(6 + 2 * conjugate + side + (0 if joins[i] == "diagonal" else 5 * c))
                for side, joins in enumerate(self.joins)
            )
            for c in range(len(self.tree.links[i]))
        ]

    def factors(self, i: int, conjugate: bool = False) -> list[tuple[str, Tensor]]:
        """Both weights of node i with their axes."""
        inner, out = self.inner(i, conjugate), []
        for side, above in enumerate(_CONJUGATE if conjugate else _ABOVE):
            letters = [pair[side] for pair in inner] or self.rows(i)
            below = letters[0] if self.joins[side][i] == "diagonal" else "".join(letters)
            weight = self.weights[side][i]
            out.append((below + above, weight.conj() if conjugate else weight))
        return out

    def square_norm(self) -> tuple[float, float] | None:
        """Squared norm of the product and the logarithm of its scale; ``None`` if it takes too long."""
        links, weights = self.tree.links, list(zip(*self.weights, strict=True))
        bonds = [(a.shape[-1], b.shape[-1]) for a, b in weights]
        # such leaves are held as they are, others and all inner nodes as Gram matrices
        short = {
            i for i, below in enumerate(links) if not below and len(weights[i][0]) < self.bonds[i]
        }
        plans: dict[int, Einsum] = {}
        for i, below in enumerate(links):
            if i in short:
                continue
            terms, shapes = list[str](), list[tuple[int, ...]]()
            sides = [self.inner(i), self.inner(i, True)]
            for c, row, one, two in zip(below, self.rows(i), *sides, strict=False):
                terms += [row + one, row + two] if c in short else [one + two]
                rows = len(weights[c][0])
                shapes += [(rows, *bonds[c])] * 2 if c in short else [bonds[c] * 2]
            factors = [*self.factors(i), *self.factors(i, True)]
            terms += [term for term, _ in factors]
            shapes += [tuple(weight.shape) for _, weight in factors]
            plans[i] = einsum(f"{','.join(terms)}->{_ABOVE}{_CONJUGATE}", *shapes)
        if sum(plan.flops for plan in plans.values()) > _MOST_FLOPS:
            return None
        if max(plan.largest for plan in plans.values()) > _MOST_NUMBERS:
            return None
        held: list[tuple[list[Tensor], float]] = []
        for i, below in enumerate(links):
            one, other = weights[i]
            if i in short:
                rows = one.unsqueeze(2) * other.unsqueeze(1)
                held.append(([rows, rows.conj()], 0.0))
                continue
            both = [w for _, w in (*self.factors(i), *self.factors(i, True))]
            gram, log = _even(plans[i]([*(x for c in below for x in held[c][0]), *both]))
            held.append(([gram], log + sum(held[c][1] for c in below)))
        [gram], log = held[-1]
        return max(float(gram.real.sum()), 0.0), log

    def sketched(
        self, width: int, random: torch.Generator, *, steady: bool = False
    ) -> list[_Scaled]:
        """Everything outside of every node times random tensors: ``(width, R_one, R_other)``.

        The random tensors have diagonal joins; their entries have variance 1. A squared inner product
        with one of them has a variance that grows as ``(1 + 2 / bond)**nodes``: where it is to be an
        estimate (``steady``) their bonds are wider than asked for in trees of many nodes.
        """
        asked = width
        if steady:
            width = max(width, min(2 * len(self.tree.interior), _WIDEST))
        links, sample = self.tree.links, self.weights[0][0]

        def drawn(*shape: int) -> Tensor:
            found = torch.randn(shape, generator=random, device=sample.device, dtype=torch.float64)
            return found.to(sample.dtype)

        inside: list[_Scaled] = []
        mixers: dict[int, Tensor] = {}
        for i, below in enumerate(links[:-1]):
            if below:
                mixers[i] = drawn(width, width) / math.sqrt(width)
                terms = [
                    (_COLUMN + inner, c) for inner, c in zip(self.inner(i), below, strict=True)
                ]
                joined = self.contracted(i, [(t, inside[c][0]) for t, c in terms], _COLUMN + _ABOVE)
                found, log = _even(torch.tensordot(mixers[i], joined, ([0], [0])))
            else:
                given = [(self.rows(i)[0] + _COLUMN, drawn(self.weights[0][i].shape[0], width))]
                found, log = _even(self.contracted(i, given, _COLUMN + _ABOVE))
            inside.append((found, log + sum(inside[c][1] for c in below)))
        outside: dict[int, _Scaled] = {self.top: (drawn(width, 1, 1), 0.0)}
        for i in range(self.top, -1, -1):
            above, log = outside[i]
            if links[i] and i != self.top:
                above = torch.tensordot(mixers[i], above, ([1], [0]))
            for inner, c in zip(self.inner(i), links[i], strict=True):
                others = [(t, s) for t, s in zip(self.inner(i), links[i], strict=True) if s != c]
                given = [(_COLUMN + _ABOVE, above)]
                given += [(_COLUMN + t, inside[s][0]) for t, s in others]
                rest, more = _even(self.contracted(i, given, _COLUMN + inner))
                outside[c] = rest, log + more + sum(inside[s][1] for _, s in others)
        return [(outside[i][0][:asked], outside[i][1]) for i in range(self.top)]

    def projected(self, sketch: Sequence[_Scaled], fresh: Sequence[_Scaled] | None) -> _Projection:
        """The product in orthonormal bases of the columns that the sketch gives, from the leaves up.

        Args:
            sketch: Of which the columns are made.
            fresh: Another one, for the estimate of what is lost.
        """
        links = self.tree.links
        held: list[_Scaled] = []
        weights: dict[int, Tensor] = {}
        errors: list[tuple[float, float]] = []  # squares and logarithms of their scale
        for i, below in enumerate(links):
            axes = self.rows(i)
            given = [
                (axis + inner, held[c][0])
                for axis, inner, c in zip(axes, self.inner(i), below, strict=False)
            ]
            shape = [len(held[c][0]) for c in below] or [self.weights[0][i].shape[0]]
            log = sum(held[c][1] for c in below)
            count, rows = math.prod(shape), "".join(axes)
            width = 1 if i == self.top else min(len(sketch[i][0]), self.bonds[i])
            if count * width > _LARGEST_WEIGHT:
                raise OptionError(
                    f"the rounded product would have a weight of {count * width:.3g} entries at node "
                    f"{self.tree.nodes[i]!r}.\n  use smaller ranks, a larger rtol, or a tree with fewer "
                    "children per node"
                )
            if i == self.top:
                core, more = _even(self.contracted(i, given, rows + _ABOVE).reshape(shape))
                weights[i], log = core, log + more
                break
            if count <= width:
                whole = self.contracted(i, given, rows + _ABOVE)
                basis = torch.eye(count, dtype=whole.dtype, device=whole.device)
                part = whole.reshape(count, *whole.shape[-2:])
            elif width == self.bonds[i]:
                whole = self.contracted(i, given, rows + _ABOVE)
                basis, triangle = torch.linalg.qr(whole.reshape(count, width))
                part = triangle.reshape(width, *whole.shape[-2:])
            else:
                basis = self._times(i, given, sketch[i][0], count)
                basis = torch.linalg.qr(basis)[0]
                turned = (rows + _COLUMN, basis.conj().reshape(*shape, -1))
                part = self.contracted(i, [*given, turned], _COLUMN + _ABOVE)
                if fresh is not None:
                    sample, outer = fresh[i]
                    columns = self._times(i, given, sample, count)
                    columns = columns - basis @ (basis.mH @ columns)
                    square = float(torch.linalg.vector_norm(columns).square()) / len(sample)
                    errors.append((square, 2 * (log + outer)))
            weights[i] = basis.reshape(*shape, -1)
            part, more = _even(part)
            held.append((part, log + more))
        size = float(torch.linalg.vector_norm(core).square())
        lost = sum(square * 2.0 ** min(scale - 2 * log, 1000.0) for square, scale in errors)
        return _Projection(weights, log, size, lost)

    def _times(
        self, i: int, given: list[tuple[str, Tensor]], columns: Tensor, count: int
    ) -> Tensor:
        """Node i's tensors in the bases of its children times columns: ``(count, width)``."""
        found = self.contracted(
            i, [*given, (_COLUMN + _ABOVE, columns)], "".join(self.rows(i)) + _COLUMN
        )
        return found.reshape(count, -1)

    def contracted(self, i: int, given: Sequence[tuple[str, Tensor]], out: str) -> Tensor:
        """Both weights of node i with other tensors, a part of the columns at a time if need be."""
        terms = [*given, *self.factors(i)]
        equation = f"{','.join(t for t, _ in terms)}->{out}"
        operands = [x for _, x in terms]
        plan = einsum(equation, *(tuple(x.shape) for x in operands))
        if plan.largest <= _MOST_NUMBERS or _COLUMN not in out:
            return plan(operands)
        axes = [t.find(_COLUMN) for t, _ in terms]
        width = max(x.shape[a] for x, a in zip(operands, axes, strict=True) if a >= 0)
        step = max(1, width * _MOST_NUMBERS // plan.largest)
        pieces = []
        for start in range(0, width, step):
            part = [
                x if a < 0 else x.narrow(a, start, min(step, width - start))
                for x, a in zip(operands, axes, strict=True)
            ]
            pieces.append(einsum(equation, *(tuple(x.shape) for x in part))(part))
        return torch.cat(pieces, out.index(_COLUMN))


def _even(x: Tensor) -> _Scaled:
    """Divided by a power of two, so that its largest magnitude is about 1."""
    largest = float(x.abs().max())
    power = math.frexp(largest)[1] if 0 < largest < math.inf else 0
    return times_power_of_two(x, -power), float(power)


def _even_columns(model: Factorization, dtype: torch.dtype) -> tuple[list[Tensor], float]:
    """Weights with columns of magnitude about 1, by position, and the binary logarithm of what they lack.

    Scales are powers of two and go up the tree. The root's weight gets a bond of 1 above it.
    """
    tree, found = model.tree, list[Tensor]()
    logs: list[Tensor] = []
    total = 0.0
    given = [w.detach().to(dtype) for w in model.weights.values()]
    if model.network.root_ones:
        bond = model.network.bonds[tree.links[-1][0]]
        given.append(torch.ones(bond, dtype=dtype, device=model.device))
    given[-1] = given[-1].unsqueeze(-1)
    for i, below in enumerate(tree.links):
        weight = given[i]
        scales = [logs[c] for c in below]
        if model.network.joins[i] == "diagonal":
            scales = [torch.stack(scales).sum(0)]
        for axis, scale in enumerate(scales):
            total += float(scale.max())
            shape = [-1 if k == axis else 1 for k in range(weight.ndim)]
            weight = weight * torch.exp2(scale - scale.max()).reshape(shape)
        largest = weight.abs().flatten(0, -2).amax(0)
        power = torch.where(largest > 0, largest, torch.ones_like(largest)).log2().floor()
        half = (power / 2).floor()
        found.append(weight * torch.exp2(-half) * torch.exp2(half - power))
        logs.append(power)
    return found, total + float(logs[-1][0])
