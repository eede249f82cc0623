"""Least squares in the weights of a factorization: Levenberg-Marquardt steps by conjugate gradients.

A prediction is linear in every single weight. So its derivative ``J`` is known from messages that pass up
and down the tree once, and the part of ``Jᴴ J`` that belongs to one node is, for samples drawn evenly, the
Kronecker product of two Gram matrices: that of what lies below the weight, and that of its environment.
These make the metric of damping, ridge and preconditioner, which no choice of gauge changes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from tnreg.factorizations.factorization import Factorization
from tnreg.networks.network import Network
from tnreg.networks.plan import Plan, contract, plan
from tnreg.tensors.arrays import double
from tnreg.training.tasks import Completion, Sensing

Weights = list[Tensor]  # by position, (rows.., bond above): the root has a bond of 1 above it here

_DENSE = 4_000_000  # largest Jacobian that is written down,
_DIRECT = 450  # and its most columns
_MESSAGES = 4_000  # most samples of which each has messages of its own


@dataclass(frozen=True)
class Samples:
    """What is known of a tensor: entries ``values`` at ``inputs`` (B, N), or at features (B, D_n) a mode.

    Arrays are as the task has them; weights are in double precision throughout.
    """

    inputs: Tensor | tuple[Tensor, ...]
    values: Tensor

    @classmethod
    def of(cls, task: Completion | Sensing) -> Samples:
        """Take what a task trains on."""
        return cls(task.index if isinstance(task, Completion) else task.features, task.values)

    @classmethod
    def both(cls, one: Samples, other: Samples) -> Samples:
        """Put two sets of samples together."""
        columns = [torch.cat(pair) for pair in zip(one.columns, other.columns, strict=True)]
        inputs = torch.stack(columns, 1) if isinstance(one.inputs, Tensor) else tuple(columns)
        return cls(inputs, torch.cat([one.values, other.values]))

    def __getitem__(self, rows: Tensor) -> Samples:
        inputs = self.inputs
        some = inputs[rows] if isinstance(inputs, Tensor) else tuple(x[rows] for x in inputs)
        return Samples(some, self.values[rows])

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def norm(self) -> float:
        """Norm of the values."""
        return float(torch.linalg.vector_norm(double(self.values)))

    @cached_property
    def columns(self) -> list[Tensor]:
        """Indices or features by mode."""
        inputs = self.inputs
        return [x.contiguous() for x in inputs.unbind(1)] if isinstance(inputs, Tensor) else list(inputs)

    @cached_property
    def grams(self) -> list[Tensor | None]:
        """Mean of the outer products of the features, by mode; ``None`` for indices, ``1 / D_n``."""
        if isinstance(self.inputs, Tensor):
            return [None] * len(self.columns)
        return [double(x).mH @ double(x) / len(x) for x in self.inputs]

    def read(self, mode: int, weight: Tensor) -> Tensor:
        """Rows of a leaf's weight (D, R) at the samples, (B, R)."""
        at = self.columns[mode]
        return weight[at] if isinstance(self.inputs, Tensor) else at @ weight

    def one_hot(self, mode: int, size: int) -> Tensor:
        """Matrix (B, D) of ``read``."""
        at = self.columns[mode]
        return torch.eye(size, dtype=self.values.dtype, device=at.device)[at] if at.ndim == 1 else at

    def collect(self, mode: int, sums: Tensor, size: int) -> Tensor:
        """Adjoint of ``read``."""
        at = self.columns[mode]
        if isinstance(self.inputs, Tensor):
            return sums.new_zeros(size, sums.shape[1]).index_add_(0, at, sums)
        return at.mH @ sums


def predict(samples: Samples, network: Network, weights: Sequence[Tensor], most: int = 200_000) -> Tensor:
    """Values (B,) that the weights predict, in the dtype of the samples."""
    parts = torch.split(torch.arange(len(samples), device=samples.values.device), most)
    return torch.cat([_up(samples[p], network, _as(samples, weights))[0][-1][:, 0] for p in parts])


def relative_residual(samples: Samples, network: Network, weights: Sequence[Tensor]) -> float:
    """Norm of what is left of the values, relative to theirs."""
    left = torch.linalg.vector_norm(double(predict(samples, network, weights) - samples.values))
    return float(left) / samples.norm if samples.norm > 0 else float(left)


def with_all_leaves(net: Network) -> Network:
    """Return the network whose bare leaves have weights, as ``to_weights`` gives them: identities."""
    return replace(net, joins=tuple("leaf" if join == "bare" else join for join in net.joins))


def to_weights(model: Factorization) -> Weights:
    """Weights of a model in double precision, by position; see ``with_all_leaves``."""
    net = model.network
    stacks = [double(stack.detach()) for stack in model.stacks]
    eyes = {i: torch.eye(net.bonds[i], dtype=stacks[0].dtype, device=stacks[0].device) for i in net.bare}
    own = {i: stacks[k][slot] for i, (k, slot) in net.slots.items()} | eyes
    found = [own[i] for i in sorted(own)]
    if net.root_ones:
        return [*found, found[-1].new_ones((*net.shape(len(net.tree.nodes) - 1), 1))]
    return [*found[:-1], found[-1].unsqueeze(-1)]


def to_stacks(network: Network, weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Weights as the stacks of a model."""
    top = len(network.tree.nodes) - 1
    own = [w[..., 0] if i == top else w for i, w in enumerate(weights)]
    return [torch.stack([own[i] for i in level.positions]).to(dtype) for level in network.stacks]


def _as(samples: Samples, weights: Sequence[Tensor]) -> list[Tensor]:
    return [w.to(samples.values.dtype) for w in weights]


def _up(
    samples: Samples, net: Network, weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Vector (B, R) of every node at every sample, and what its weight is applied to (B, rows)."""
    vectors, rows = list[Tensor](), list[Tensor | None]()
    for i, below in enumerate(net.tree.links):
        if not below:
            rows.append(None)
            vectors.append(samples.read(net.tree.nodes[i], weights[i]))  # type: ignore[arg-type]
            continue
        row = vectors[below[0]]
        for c in below[1:]:
            other = vectors[c]
            row = (
                row * other
                if net.joins[i] == "diagonal"
                else (row.unsqueeze(2) * other.unsqueeze(1)).flatten(1)
            )
        rows.append(row)
        vectors.append(row @ weights[i].flatten(0, -2))
    return vectors, rows


def _down(net: Network, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Environment (B, R) of every node at every sample: the derivative by its vector."""
    count = len(net.tree.nodes)
    down = [vectors[-1].new_ones(len(vectors[-1]), 1)] * count
    for i in reversed(range(count)):
        below = net.tree.links[i]
        if not below:
            continue
        around = down[i] @ weights[i].flatten(0, -2).mT
        for k, c in enumerate(below):
            if net.joins[i] == "diagonal":
                down[c] = math.prod((vectors[s] for s in below if s != c), start=around)
                continue
            part = around
            for s in reversed(below[k + 1 :]):
                part = (part.reshape(len(part), -1, vectors[s].shape[1]) @ vectors[s].unsqueeze(2)).squeeze(2)
            for s in below[:k]:
                part = (vectors[s].unsqueeze(1) @ part.reshape(len(part), vectors[s].shape[1], -1)).squeeze(1)
            down[c] = part
    return down


class Metric:
    """Gram matrices of both sides of every weight, of mean squares over samples that are drawn evenly.

    ``apply(z)`` is, node by node, half the gradient of the mean square of the tensor that has z in place of
    the weight of that node.

    Args:
        net: The network.
        weights: Its weights.
        grams: Of the features, by mode; ``None`` for indices.
        orthonormal: Positions whose frames are known to be orthonormal.
    """

    def __init__(
        self,
        net: Network,
        weights: Sequence[Tensor],
        grams: Sequence[Tensor | None],
        *,
        orthonormal: Container[int] = (),
    ) -> None:
        self._links, self._joins = net.tree.links, net.joins
        self._grams = [None if below else grams[net.tree.nodes[i]] for i, below in enumerate(self._links)]  # type: ignore[call-overload]
        self._known = orthonormal
        self._weights = weights
        self._shapes = [w.shape for w in weights[: len(net.weighted)]]
        self._below = self._frames(weights)

    @property
    def mean_square(self) -> float:
        """Mean square of the entries of the tensor."""
        return float(self._below[-1].real)

    @cached_property
    def _above(self) -> list[Tensor]:
        return self._environments(self._weights)

    @cached_property
    def _left(self) -> list[list[tuple[int, Tensor]]]:
        return [self._left_of(i) for i in range(len(self._shapes))]

    @cached_property
    def _eigen(self) -> list[tuple[Any, list[tuple[int, Any]]]]:
        """Eigenvalues and vectors of the Gram matrices of every node, of the last axis first."""
        return [
            (torch.linalg.eigh(right), [(k, torch.linalg.eigh(gram)) for k, gram in left])
            for left, right in zip(self._left, self._above, strict=False)
        ]

    @cached_property
    def largest(self) -> list[float]:
        """Largest eigenvalue of the metric of every node."""
        return [
            math.prod((float(e[-1]) for _, (e, _) in left), start=float(e[-1]))
            for (e, _), left in self._eigen
        ]

    def apply(self, tangent: Sequence[Tensor], floor: float = 0.0) -> list[Tensor]:
        """Apply the metric to one tensor for every weight; adds ``floor`` times the largest eigenvalue."""
        found = []
        for node, (z, left, right) in enumerate(zip(tangent, self._left, self._above, strict=False)):
            image = z @ right
            for k, gram in left:
                image = _times(gram, image, k)
            found.append(image + (floor * self.largest[node]) * z if floor else image)
        return found

    def solve(self, tangent: Sequence[Tensor], floor: float = 1e-12) -> list[Tensor]:
        """Apply the inverse of ``apply``."""
        return [self._solve(node, z, floor) for node, z in enumerate(tangent)]

    def _solve(self, node: int, z: Tensor, floor: float) -> Tensor:
        (values, vectors), left = self._eigen[node]
        # by eigenvectors: an inverse of singular matrices that is multiplied out keeps no digits
        z, below = z @ vectors, values.clamp_min(0)
        for k, (own, turned) in left:
            z = _times(turned.mH, z, k)
            below = own.clamp_min(0).reshape(-1, *[1] * (z.ndim - 1 - k)) * below
        z = z / (below + max(floor * self.largest[node], 1e-300))
        for k, (_, turned) in left:
            z = _times(turned, z, k)
        found: Tensor = z @ vectors.mH
        return found

    def _frames(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Gram matrix of the frame below every node."""
        found = list[Tensor]()
        for i, (w, below) in enumerate(zip(weights, self._links, strict=True)):
            if i in self._known:
                gram = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
            elif not below:
                features = self._grams[i]
                gram = w.mH @ (w / len(w) if features is None else features @ w)
            elif self._joins[i] == "diagonal":
                gram = w.mH @ _product([found[c] for c in below]) @ w
            else:
                inner = w
                for k, c in enumerate(below):
                    inner = inner if c in self._known else _times(found[c], inner, k)
                gram = w.flatten(0, -2).mH @ inner.flatten(0, -2)
            found.append((gram + gram.mH) / 2)
        return found

    def _environments(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Transposed Gram matrix of what is around every node; at leaves divided by the size of the mode."""
        found = [weights[-1].new_ones(1, 1)] * len(weights)
        for i in reversed(range(len(weights))):
            w, below = weights[i], self._links[i]
            if below and self._joins[i] == "diagonal":
                outer = w @ found[i] @ w.mH
                for c in below:
                    found[c] = _product([outer, *(self._below[s].mT for s in below if s != c)])
            elif below:
                right = w @ found[i]
                for k, c in enumerate(below):
                    inner = right
                    for j, s in enumerate(below):
                        inner = inner if j == k or s in self._known else _times(self._below[s], inner, j)
                    found[c] = inner.movedim(k, 0).flatten(1) @ w.movedim(k, 0).flatten(1).mH
        halves = [(gram + gram.mH) / 2 for gram in found]
        return [
            gram if below or self._grams[i] is not None else gram / len(weights[i])
            for i, (gram, below) in enumerate(zip(halves, self._links, strict=True))
        ]

    def _left_of(self, i: int) -> list[tuple[int, Tensor]]:
        """Gram matrices on the axes of a weight but the last, where they are not the identity."""
        below, features = self._links[i], self._grams[i]
        if not below:
            return [] if features is None else [(0, features)]
        if self._joins[i] == "diagonal":
            return [(0, _product([self._below[c] for c in below]))]
        return [(k, self._below[c]) for k, c in enumerate(below) if c not in self._known]

    def matrix(self, k: int) -> Tensor:
        """Return the metric of the weight at a position as a square matrix."""
        found = self._above[k].mT.contiguous()
        axes = dict(self._left[k])
        for axis in reversed(range(len(self._shapes[k]) - 1)):
            own = axes.get(axis)
            own = (
                torch.eye(self._shapes[k][axis], dtype=found.dtype, device=found.device)
                if own is None
                else own
            )
            found = torch.kron(own.contiguous(), found)
        return found


def _times(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    return torch.movedim(torch.tensordot(matrix, x, ([1], [axis])), 0, axis)


def _product(factors: Sequence[Tensor]) -> Tensor:
    return math.prod(factors[1:], start=factors[0])


def orthonormalize(net: Network, weights: Weights) -> set[int]:
    """Make frames orthonormal by QR where full joins allow it, in place; return the positions where they are.

    The tensor stays as it is. Frames of features are never orthonormal.
    """
    done = set[int]()
    parents = {c: i for i, below in enumerate(net.tree.links) for c in below}
    for i, parent in parents.items():
        w, below = weights[i], net.tree.links[i]
        full = net.joins[parent] == "full" and net.joins[i] != "diagonal"
        rows = w.flatten(0, -2)
        if not full or not done.issuperset(below) or len(rows) < rows.shape[1]:
            continue
        q, r = torch.linalg.qr(rows)
        unit = 1.0 if below else math.sqrt(len(w))
        k = net.tree.links[parent].index(i)
        weights[i] = q.reshape(w.shape) * unit
        weights[parent] = _times(r / unit, weights[parent], k)
        done.add(i)
    return done


class LevenbergMarquardt:
    """Steps that lower ``Σ_b |prediction_b - value_b|² + ridge B (mean square of the tensor)``.

    Args:
        samples: What is known.
        net: The network whose weights are looked for.
        ridge: Weight of the mean square.
        damping: What of the metric is added to ``Jᴴ J``; it follows what succeeds.
        iterations: Most iterations of conjugate gradients in a step.
        frozen: Positions whose weights stay; steps are then without ``gauge``.
        dtype: Type that new weights are rounded to, if it is less than double precision.
    """

    def __init__(
        self,
        samples: Samples,
        net: Network,
        *,
        ridge: float = 0.0,
        damping: float = 1e-2,
        iterations: int = 25,
        frozen: Container[int] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.samples, self.net, self.ridge, self.damping = samples, net, ridge, damping
        self._iterations, self._dtype = iterations, dtype
        shapes = [net.shape(i) for i in net.weighted]
        if not net.root_ones:
            shapes[-1] = (*shapes[-1], 1)
        self._shapes, self._sizes = shapes, [math.prod(shape) for shape in shapes]
        free = [torch.full((size,), k not in frozen) for k, size in enumerate(self._sizes)]
        self._free = _flat(free).to(samples.values.device)
        count, columns = len(samples), sum(self._sizes)
        self._direct = columns <= _DIRECT and count * columns <= _DENSE
        self._plan: Plan | None = None
        if not self._direct and count > _MESSAGES:
            inputs = samples.inputs
            self._plan = plan(net, index=inputs) if isinstance(inputs, Tensor) else plan(net, batch=count)

    def residual(self, weights: Weights) -> Tensor:
        """Predictions less the values, (B,)."""
        if self._plan is None:
            return predict(self.samples, self.net, weights) - self.samples.values
        with torch.no_grad():
            return self._contract(*self._stacks(weights)) - self.samples.values

    def cost(self, residual: Tensor, mean_square: float) -> float:
        """Return what is minimised."""
        return (
            float(torch.linalg.vector_norm(double(residual))) ** 2 + self.ridge * len(residual) * mean_square
        )

    def step(self, weights: Weights, *, gauge: bool = True) -> tuple[Weights, float, float]:
        """Return better weights, and what is minimised before and after; without one, the same weights.

        Args:
            weights: Are changed in place where ``gauge`` allows it, but the tensor stays.
            gauge: Whether frames may be made orthonormal, which is faster.
        """
        grams, count = self.samples.grams, len(self.samples)
        known = orthonormalize(self.net, weights) if gauge and isinstance(self.samples.inputs, Tensor) else ()
        residual = self.residual(weights)
        metric = Metric(self.net, weights, grams, orthonormal=known)
        before = self.cost(residual, metric.mean_square)
        flat = _flat(weights[: len(self._sizes)])
        jacobian, adjoint = self._linearize(weights)
        slope = adjoint(residual) + self._free * count * self.ridge * self._metric(metric.apply, flat)
        search = (
            self._by_cholesky(jacobian, metric)
            if self._direct
            else self._by_gradients(jacobian, adjoint, metric)
        )
        for _ in range(12):
            moved = flat + search(-slope)
            moved = moved if self._dtype is None else moved.to(self._dtype).to(moved)
            trial = self._shaped(moved) + weights[len(self._sizes) :]
            mean_square = Metric(self.net, trial, grams).mean_square if self.ridge else 0.0
            after = self.cost(self.residual(trial), mean_square)
            if after < before:
                self.damping = max(self.damping / 5, 1e-9)
                return trial, before, after
            self.damping = max(self.damping * 8, 1e-6)
        return weights, before, before

    @property
    def _floor(self) -> float:
        """Share of a node's largest eigenvalue of the metric that is damped in all directions.

        Large steps go through where the metric is small, but where weights of several nodes cancel each
        other it says nothing of what they do together.
        """
        return 1e-12 + 1e-2 * min(self.damping, 1.0) ** 2

    def _by_cholesky(
        self, jacobian: Callable[[Tensor], Tensor], metric: Metric
    ) -> Callable[[Tensor], Tensor]:
        """Solve the equations of a step directly."""
        dense = self._free * double(jacobian(None))  # type: ignore[arg-type]
        normal = dense.mH @ dense
        blocks = [len(self.samples) * metric.matrix(k) for k in range(len(self._sizes))]
        weight = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        top = _flat([own.max().expand_as(own) for own in (b.diagonal().real for b in blocks)])

        def search(slope: Tensor) -> Tensor:
            matrix = normal + (self.damping + self.ridge) * weight
            matrix.diagonal().add_((self.damping * self._floor + 1e-14) * top)
            lower, failed = torch.linalg.cholesky_ex(matrix)
            if failed:
                return torch.zeros_like(slope)
            return torch.cholesky_solve(slope.unsqueeze(1), lower).squeeze(1)

        return search

    def _by_gradients(
        self, jacobian: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], metric: Metric
    ) -> Callable[[Tensor], Tensor]:
        """Solve the equations of a step by conjugate gradients, preconditioned by the metric."""
        count = len(self.samples)

        def search(slope: Tensor) -> Tensor:
            share = count * (self.damping + self.ridge)
            apply, solve = (partial(call, floor=self._floor) for call in (metric.apply, metric.solve))
            step, left = torch.zeros_like(slope), slope
            image = self._metric(solve, left)
            direction, size = image, _dot(left, image)
            enough = 1e-2 * size
            for _ in range(self._iterations):
                if size <= enough:
                    break
                applied = adjoint(jacobian(direction)) + share * self._metric(apply, direction)
                curvature = _dot(direction, applied)
                if curvature <= 0:
                    break
                step, left = step + (size / curvature) * direction, left - (size / curvature) * applied
                image = self._metric(solve, left)
                size, last = _dot(left, image), size
                direction = image + (size / last) * direction
            return step

        return search

    def _metric(self, operator: Callable[[Sequence[Tensor]], list[Tensor]], flat: Tensor) -> Tensor:
        return _flat(operator(self._shaped(flat)))

    def _shaped(self, flat: Tensor) -> list[Tensor]:
        return [
            x.reshape(shape) for x, shape in zip(torch.split(flat, self._sizes), self._shapes, strict=True)
        ]

    def _stacks(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return to_stacks(self.net, weights, self.samples.values.dtype)

    def _contract(self, *stacks: Tensor) -> Tensor:
        assert self._plan is not None
        inputs = self.samples.inputs
        return contract(self._plan, stacks, () if isinstance(inputs, Tensor) else inputs)

    def _linearize(self, weights: Weights) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Return ``J`` and ``Jᴴ`` at these weights, between flat tangents and predictions."""
        return self._by_messages(weights) if self._plan is None else self._by_plan(weights)

    def _by_plan(self, weights: Weights) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        stacks = tuple(self._stacks(weights))
        pull: Any = torch.func.vjp(self._contract, *stacks)[1]
        fixed = [torch.zeros_like(w) for w in weights[len(self._sizes) :]]

        def jacobian(flat: Tensor) -> Tensor:
            tangent = tuple(self._stacks(self._shaped(flat) + fixed))
            with warnings.catch_warnings():  # torch, of its own code, when it is first asked
                warnings.simplefilter("ignore", DeprecationWarning)
                change: Tensor = torch.func.jvp(self._contract, stacks, tangent)[1]
            return change

        def adjoint(sums: Tensor) -> Tensor:
            parts = list(pull(sums))
            slots = self.net.slots
            found = _flat([parts[k][slot] for k, slot in (slots[i] for i in self.net.weighted)])
            return found.to(weights[0]) * self._free

        return jacobian, adjoint

    def _by_messages(self, weights: Weights) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        samples, net = self.samples, self.net
        own = [w.to(samples.values.dtype) for w in weights]
        vectors, rows = _up(samples, net, own)
        down = _down(net, own, vectors)
        modes: Any = net.tree.nodes

        def jacobian(flat: Tensor | None) -> Tensor:
            if flat is None:  # the matrix itself
                inner = [
                    samples.one_hot(modes[i], s[0]) if r is None else r for i, (r, s) in enumerate(parts)
                ]
                return torch.cat(
                    [(a.unsqueeze(2) * d.unsqueeze(1)).flatten(1) for a, d in zip(inner, down, strict=False)],
                    1,
                )
            tangent = self._shaped(flat.to(samples.values.dtype))
            terms = [
                samples.read(modes[i], z) if row is None else row @ z.flatten(0, -2)
                for i, (z, row) in enumerate(zip(tangent, rows, strict=False))
            ]
            return torch.stack([(t * d).sum(1) for t, d in zip(terms, down, strict=False)]).sum(0)

        parts = list(zip(rows, self._shapes, strict=False))

        def adjoint(sums: Tensor) -> Tensor:
            found = []
            for i, (row, shape) in enumerate(parts):
                product = sums.unsqueeze(1) * down[i].conj()
                found.append(
                    samples.collect(modes[i], product, shape[0]) if row is None else row.mH @ product
                )
            return _flat(found).to(weights[0]) * self._free

        return jacobian, adjoint


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in parts])


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.vdot(x, y).real)
