"""Completion with ranks that grow from one and are cut again, on trees that are looked for.

A model is fitted to the samples it is trained on, and judged on those held out. It grows by a rank-one fit of
what is left, added at every bond; the bonds keep what matters there. A ridge, tied to the held-out error and
so vanishing for exact data, keeps entries that nobody saw from being anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnreg.algebra.arithmetic import add, subtract
from tnreg.factorizations.components import balance_
from tnreg.factorizations.factorization import Factorization
from tnreg.ranks.decompose import truncate
from tnreg.ranks.spectra import spectra
from tnreg.search.interchange import interchange
from tnreg.search.pairs import additive, interactions, linkage_tree
from tnreg.tensors.arrays import double, draw_normal
from tnreg.training.solver import (
    LevenbergMarquardt,
    Samples,
    predict,
    relative_residual,
    to_stacks,
    to_weights,
)
from tnreg.training.tasks import Completion, Sensing
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree


@dataclass(frozen=True)
class Grown:
    """A completed tensor.

    Attributes:
        model: Fitted to all samples at the end, in double precision.
        error: Relative error of the model chosen on the samples held out, before that last fit.
        predictions: Its predictions of them.
    """

    model: Factorization
    error: float
    predictions: Tensor


@dataclass(frozen=True)
class _Candidate:
    model: Factorization
    ridge: float  # relative to the square of the held-out error
    error: float  # held-out

    @property
    def is_full(self) -> bool:
        """Whether it has full joins alone."""
        return "diagonal" not in self.model.network.joins


class _Effort(NamedTuple):
    """How thoroughly models are fitted between growths: long fits may learn noise, short ones get stuck.

    Attributes:
        steps: Most steps of a fit.
        stall: Least part by which a step has to lower what is minimised.
        early: Whether the state of the least held-out error is taken.
        shrinkage: Ridge of a correction, relative to the mean square of what it corrects.
        starts: From how many starts a correction is fitted.
    """

    steps: int
    stall: float
    early: bool
    shrinkage: float = 0.02
    starts: int = 1


_EFFORTS = (
    _Effort(40, 0.01, True),
    _Effort(8, 0.03, False),
    _Effort(25, 0.003, False, 0.5, 3),
    _Effort(8, 0.03, False, 0.0, 3),
)
_LAST = _Effort(40, 1e-3, False)
_KEPT = 0.8  # new singular values are kept from this part of the largest one on
_BETTER = 0.99  # a change has to lower the held-out error to this part
_PATIENCE = 3
_NOISY = 1e-3  # held-out error from which a lower ridge may be learning noise
_RIDGE = 0.1  # to begin with, relative to the square of the held-out error
_STARTS = 4  # of the rank-one fit to begin with
_MANY = 20_000  # samples from which one attempt has to do
_ROUNDS = 100


@torch.no_grad()
def grow(
    task: Completion | Sensing,
    held: Completion | Sensing,
    tree: ModeTree | None,
    *,
    join: str = "auto",
    ranks: int | Mapping[Node, int] | None = None,
    adapt: Collection[str] = ("ranks", "tree"),
    max_numbers: int | None = None,
    generator: torch.Generator,
    record: Callable[[dict[str, Any]], None],
) -> Grown:
    """Complete a tensor of values of mean square 1.

    Args:
        task: The samples to train on.
        held: Those to choose by.
        tree: The tree to begin with; ``None`` takes the one that interactions of pairs suggest.
        join: ``"full"``, ``"diagonal"``, or ``"auto"``, which tries both.
        ranks: Largest bonds, which are then fixed.
        adapt: ``"ranks"``, ``"tree"``, both or neither.
        max_numbers: Most numbers of a model.
        generator: Draws starts.
        record: Called with a row of the history.
    """
    search = _Search(task, held, ranks, max_numbers, generator, record)
    joins = ("full", "diagonal") if join == "auto" else (join,)
    found = search.best_on(tree or search.suggested_tree(), joins)
    if "tree" in adapt and len(task.sizes) > 3 and not isinstance(ranks, Mapping):
        found = search.on_better_trees(found, joins[:1], tree is not None)
    everything = Samples.both(search.train, search.held)
    ridge = found.ridge * min(1.0, found.error) ** 2 * (found.error > 1e-6)
    model = search.fit(found.model, ridge, _LAST, everything)
    if search.strays(model, found.model, 30.0):  # the last fit knows what was held out
        model = found.model
    search.note("refit", _Candidate(model, found.ridge, found.error))
    return Grown(model, found.error, predict(search.held, found.model.network, to_weights(found.model)))


class _Search:
    """One search: the samples, the limits, and what is done with models."""

    def __init__(
        self,
        task: Completion | Sensing,
        held: Completion | Sensing,
        ranks: int | Mapping[Node, int] | None,
        most: int | None,
        generator: torch.Generator,
        record: Callable[[dict[str, Any]], None],
    ) -> None:
        self.train, self.held, self.sizes = Samples.of(task), Samples.of(held), task.sizes
        self.ranks, self.most, self.generator, self.record = ranks, most, generator, record
        self.many = len(self.train) > _MANY
        self.exact = 500 * torch.finfo(task.values.dtype).eps
        self.solved = max(self.exact, 1e-9)  # held-out error from which nothing else is tried

    # Fitting

    def fit(
        self,
        model: Factorization,
        ridge: float,
        effort: _Effort,
        samples: Samples | None = None,
        least: float = 0.0,
    ) -> Factorization:
        """Fit a model; with ``early`` the state of the least held-out error is taken."""
        samples = samples or self.train
        net, weights = model.network, to_weights(model)
        solver = LevenbergMarquardt(samples, net, ridge=ridge)
        best, worse = (math.inf, weights), 0
        for step in range(effort.steps):
            weights, before, after = solver.step(weights)
            if effort.early:
                error = relative_residual(self.held, net, weights)
                worse = 0 if error < best[0] * 0.999 else worse + 1
                best = min(best, (error, weights), key=lambda pair: pair[0])
            small = after <= (max(least, 1e-15) * samples.norm) ** 2
            if small or worse == _PATIENCE or after >= before * (1 - effort.stall * (step > 1)):
                break
        dtype = weights[0].dtype
        return Factorization.holding(net, to_stacks(net, best[1] if effort.early else weights, dtype))

    def judge(self, model: Factorization, ridge: float) -> _Candidate:
        """Measure the held-out error."""
        return _Candidate(model, ridge, relative_residual(self.held, model.network, to_weights(model)))

    def refit(self, model: Factorization, ridge: float, error: float, effort: _Effort) -> _Candidate:
        """Fit and judge a model, with a ridge for this held-out error."""
        return self.judge(self.fit(model, ridge * min(1.0, error) ** 2, effort), ridge)

    def note(self, action: str, candidate: _Candidate) -> None:
        """Add a row to the history."""
        model = candidate.model
        self.record(
            {
                "action": action,
                "numbers": count_numbers(model),
                "ranks": model.network.named_bonds,
                "train error": relative_residual(self.train, model.network, to_weights(model)),
                "held-out error": candidate.error,
            }
        )

    # Searching

    def suggested_tree(self) -> ModeTree:
        """Return a tree that keeps together what interacts, or the balanced one."""
        if not isinstance(self.train.inputs, Tensor):
            return ModeTree.binary(len(self.sizes))
        return linkage_tree(interactions(self.train.inputs, self.train.values, self.sizes))

    def attempts(self, joins: Sequence[str]) -> Iterator[tuple[str, _Effort]]:
        """Ways to grow a model, the most promising ones first."""
        for join in joins[:1] if self.many else joins:
            efforts = _EFFORTS[:1] if self.many else _EFFORTS if join == "full" else _EFFORTS[1::-1]
            yield from ((join, effort) for effort in efforts)

    def best_on(self, tree: ModeTree, joins: Sequence[str]) -> _Candidate:
        """Return the best of the attempts on a tree; two that agree end them."""
        best = None
        for join, effort in self.attempts(joins):
            begin = self.refit(self.start(tree, join, _RIDGE), _RIDGE, 1.0, effort)
            self.note(f"start, {join} joins", begin)
            found = self.settle(self.grow(begin, join, effort))
            if self.ranks is None and found.is_full and (best is None or found.error < 1.5 * best.error):
                found = self.prune(found)
            grew = count_numbers(found.model) > count_numbers(begin.model)
            agree = grew and best is not None and found.model.network.bonds == best.model.network.bonds
            best = found if best is None else self.simpler_of_equals(best, found)
            if (agree and abs(found.error / best.error - 1) < 0.05) or best.error <= self.solved:
                break
        assert best is not None
        return best

    def on_better_trees(self, found: _Candidate, joins: Sequence[str], given: bool) -> _Candidate:
        """Interchange branches of the tree as far as the held-out error allows, and grow again.

        Of an exact model the factors themselves are taken over, if no tree was given.
        """
        for _ in range(3):
            exact = found.error <= self.solved
            if exact and (given or not found.is_full):
                break
            rtol = min(0.3, 5 * max(found.error, self.exact))
            other, same = (
                interchange(found.model, rtol=rtol),
                truncate(found.model, rtol=rtol, leaves="weights"),
            )
            if count_numbers(other) > 0.95 * count_numbers(same):
                break
            tried = (
                self.refit(other, found.ridge, found.error, _LAST)
                if exact
                else self.best_on(other.tree, joins)
            )
            self.note("interchange", tried)
            if tried.error >= max(found.error * _BETTER, self.solved * exact):
                break
            found = tried
        return found

    # Growing

    def start(self, tree: ModeTree, join: str, ridge: float) -> Factorization:
        """Begin with the additive model, or with rank one if that predicts better."""
        one = self.best_rank_one(tree, join, None, ridge, _STARTS)
        if join == "diagonal" or not isinstance(self.train.inputs, Tensor) or tree.order < 2:
            return one
        mean, parts = additive(self.train.inputs, self.train.values, self.sizes)
        both = truncate(
            _additive_model(tree, mean, parts), rtol=1e-9, ranks=self.limits(tree) or None, leaves="weights"
        )
        errors = [self.judge(model, ridge).error for model in (one, both)]
        small = count_numbers(both) <= (self.most or math.inf)
        return both if small and errors[1] < 1.05 * min(1.0, errors[0]) else one

    def rank_one(self, tree: ModeTree, join: str, values: Tensor, ridge: float, mean: float) -> Factorization:
        """Fit values by rank one (alternating least squares), from normal vectors with this mean."""
        vectors = _fit_rank_one(self.train, values, self.sizes, ridge, mean, self.generator)
        weights: dict[Node, Tensor] = {n: v.unsqueeze(1) for n, v in enumerate(vectors)}
        if not tree.interior:
            weights = {tree.root: vectors[0]}
        for node in tree.interior:
            axes = (1 if join == "diagonal" else len(tree.children(node))) + (node != tree.root)
            weights[node] = vectors[0].new_ones((1,) * axes)
        return Factorization.from_weights(tree, weights, join=join)

    def best_rank_one(
        self, tree: ModeTree, join: str, model: Factorization | None, ridge: float, starts: int
    ) -> Factorization:
        """Fit what a model leaves of the samples by rank one, from several starts; take the best one."""
        left, aside = self.train.values, self.held.values
        if model is not None:
            weights = to_weights(model)
            left = left - predict(self.train, model.network, weights)
            aside = aside - predict(self.held, model.network, weights)
        means = (1.0, *[0.0] * (starts - 1))
        terms = [self.rank_one(tree, join, left, ridge, mean) for mean in means]
        rest = [double(aside - predict(self.held, t.network, to_weights(t))) for t in terms]
        return min(zip(terms, rest, strict=True), key=lambda pair: float(torch.linalg.vector_norm(pair[1])))[
            0
        ]

    def widen(
        self, model: Factorization, join: str, ridge: float, share: float, effort: _Effort
    ) -> Factorization | None:
        """Add a rank-one fit of what is left of the samples, and keep the bonds that it makes larger."""
        wide = add(model, self.best_rank_one(model.tree, join, model, effort.shrinkage, effort.starts))
        bonds, limits = model.network.named_bonds, self.limits(model.tree)
        if join == "diagonal":
            full = bool(limits) and all(bonds[v] >= limits[v] for v in bonds)
            return None if full else self._mixed(wide, limits)
        wide = self.fit(truncate(wide, leaves="weights"), ridge, _Effort(2, 0.0, False))
        values = {v: s.detach() for v, s in spectra(wide).items()}
        new = {v: s[bonds[v] : limits.get(v)] for v, s in values.items()}
        top = max((float(s[0]) for s in new.values() if len(s)), default=0.0)
        if top <= self.exact * 1e-2 * max((float(s[0]) for s in values.values()), default=0.0):
            return None
        grown = {v: bonds[v] + int((s >= share * top).sum()) for v, s in new.items()}
        # without a tolerance bonds would come down that wait for others to grow
        return truncate(wide, ranks=grown, rtol=0.0, leaves="weights")

    def _mixed(self, model: Factorization, limits: Mapping[Node, int]) -> Factorization:
        """Let every component take part a little in the others, or trees of diagonal joins stay sums."""
        tree = model.tree
        weights = {v: w[..., : limits.get(v)] if v != tree.root else w for v, w in model.weights.items()}
        for node in tree.interior:
            weights[node] = weights[node][: limits.get(tree.children(node)[0])]
        for node in tree.interior[:-1]:
            w = weights[node]
            size = 0.01 * float(w.detach().norm()) / math.sqrt(w.numel())
            noise = torch.randn(w.shape, generator=self.generator, dtype=torch.float64)
            weights[node] = w + size * noise.to(w.device)
        model = Factorization.from_weights(tree, weights, join="diagonal")
        balance_(model)
        return model

    def limits(self, tree: ModeTree) -> dict[Node, int]:
        """Largest bonds asked for, by node."""
        if self.ranks is None:
            return {}
        bonds = self.ranks
        return dict(bonds) if isinstance(bonds, Mapping) else dict.fromkeys(tree.nodes[:-1], bonds)

    def grow(self, begin: _Candidate, join: str, effort: _Effort) -> _Candidate:
        """Let a model grow as long as the held-out error falls."""
        best, model, ridge, failed, path = begin, begin.model, begin.ridge, 0, [begin]
        fixed = self.ranks is not None
        for _ in range(_ROUNDS):
            if best.error <= self.exact or failed == _PATIENCE - self.many:
                break
            share = _KEPT / 2 ** (2 if fixed else failed)
            wide = self.widen(model, join, ridge * min(1.0, best.error) ** 2, share, effort)
            if wide is None or not self.fits(wide):
                break
            grown = self.refit(wide, ridge, best.error, effort)
            tried = [grown]
            if grown.error >= best.error * _BETTER and ridge > 1e-9:
                tried.append(self.refit(grown.model, ridge / 10, best.error, effort))
                tried.append(self.refit(best.model, best.ridge / 10, best.error, effort))
            chosen = min(tried, key=lambda c: c.error)
            if chosen.ridge < ridge and chosen.error > _NOISY and self.is_as_good(grown, chosen):
                chosen = grown
            if join == "full":
                chosen = self.cut(chosen, min(chosen.error, 0.1), best.error, effort)
            if self.strays(chosen.model, best.model):
                chosen = self.refit(chosen.model, 10 * chosen.ridge, best.error, effort)
            self.note("grow", chosen)
            if fixed or (chosen.error < best.error * _BETTER and not self.strays(chosen.model, best.model)):
                best, model, ridge, failed = chosen, chosen.model, chosen.ridge, 0
                path.append(chosen)
            else:
                model, failed = grown.model, failed + 1
        return best if fixed else next(c for c in path if self.is_as_good(c, best))

    def strays(self, model: Factorization, other: Factorization, times: float = 3.0) -> bool:
        """Whether two models differ so many times more in all entries than in those held out.

        These are like all others, so that the differences are of one size but for chance.
        """
        if not isinstance(self.train.inputs, Tensor):
            return False
        one, two = (double(predict(self.held, m.network, to_weights(m))) for m in (model, other))
        apart = 2 * subtract(model, other).log_norm().item() - sum(map(math.log, self.sizes))
        return (
            math.exp(min(apart, 300.0))
            > (times + 60 / len(one)) * float((one - two).abs().square().mean()) + 1e-13
        )

    def fits(self, model: Factorization) -> bool:
        """Whether a model has few enough numbers, and not more degrees of freedom than there are samples."""
        enough = self.ranks is not None or degrees_of_freedom(model) <= len(self.train)
        return enough and count_numbers(model) <= (self.most or math.inf)

    # Cutting

    def cut(self, candidate: _Candidate, rtol: float, error: float, effort: _Effort) -> _Candidate:
        """Cut singular values below a part of the largest, if the held-out error stays."""
        values = spectra(candidate.model)
        kept = {v: max(1, int((s > rtol * s[0]).sum())) for v, s in values.items()}
        if self.ranks is not None or all(kept[v] == len(s) for v, s in values.items()):
            return candidate
        cut = self.refit(
            truncate(candidate.model, ranks=kept, leaves="weights"), candidate.ridge, error, effort
        )
        return cut if cut.error <= max(candidate.error * 1.01, self.exact) else candidate

    def prune(self, candidate: _Candidate) -> _Candidate:
        """Make bonds smaller one by one, the least singular value first, while the held-out error stays."""
        best, effort = candidate, _Effort(12, 0.03, False)
        for rtol in (1e-8, 1e-6, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1):
            candidate = self.cut(candidate, rtol, best.error, effort)
        best = min(best, candidate, key=lambda c: c.error)
        kept = set[tuple[Node, int]]()
        while True:
            bonds = candidate.model.network.named_bonds
            ends = {
                v: float(s[-1] / s[0])
                for v, s in spectra(candidate.model).items()
                if bonds[v] > 1 and (v, bonds[v]) not in kept
            }
            if not ends:
                self.note("cut", candidate)
                return candidate
            node = min(ends, key=ends.__getitem__)
            smaller = truncate(candidate.model, ranks=bonds | {node: bonds[node] - 1}, leaves="weights")
            tried = self.refit(smaller, candidate.ridge, best.error, effort)
            if self.is_as_good(tried, best):
                candidate = tried
                best = min(best, candidate, key=lambda c: c.error)
            else:
                kept.add((node, bonds[node]))

    def settle(self, candidate: _Candidate) -> _Candidate:
        """Fit to the end with the ridge that predicts best: as the last fit, to all samples, will be."""
        if candidate.error <= 1e-6:
            return candidate
        best = self.refit(candidate.model, candidate.ridge, candidate.error, _LAST)
        # with the ridge of the smaller error, then a smaller one if that is clearly better, or larger ones
        for factor in (1.0, 0.1, 3.0):
            for _ in range(_ROUNDS):
                tried = self.refit(best.model, factor * best.ridge, min(best.error, candidate.error), _LAST)
                worse = tried.error > best.error if factor > 1 else self.is_as_good(best, tried)
                if worse or best.ridge > 1e3:
                    break
                best = tried
                if best.error <= self.exact:
                    break
        self.note("settle", best)
        return best

    def simpler_of_equals(self, one: _Candidate, other: _Candidate) -> _Candidate:
        """Return the better candidate, or the one of fewer numbers where they predict equally well."""
        better, worse = sorted((one, other), key=lambda c: c.error)
        smaller = count_numbers(worse.model) < count_numbers(better.model)
        return worse if smaller and self.is_as_good(worse, better) else better

    def is_as_good(self, tried: _Candidate, best: _Candidate) -> bool:
        """Whether a model predicts held-out samples as well as a better one, up to what chance explains."""
        if tried.error <= max(best.error * 1.01, self.exact):
            return True
        if tried.error > best.error * 1.25:
            return False
        squares = [
            double(predict(self.held, c.model.network, to_weights(c.model)) - self.held.values).abs().square()
            for c in (tried, best)
        ]
        more = squares[0] - squares[1]
        # half a standard error of few samples; of many, whose errors have heavy tails, less
        return float(more.mean()) <= 0.5 * float(more.std()) / math.sqrt(len(more)) * min(
            1.0, 15 / math.sqrt(len(more))
        )


def count_numbers(model: Factorization) -> int:
    """Count the numbers in the weights of a model."""
    return sum(math.prod(model.network.shape(i)) for i in model.network.weighted)


def degrees_of_freedom(model: Factorization) -> int:
    """Count the numbers of a model less those that only choose its gauge.

    An upper bound where diagonal joins are above one another.
    """
    net = model.network
    bonds = [
        b if j == "diagonal" else b * b
        for j, c in zip(net.joins, net.tree.links, strict=True)
        for b in (net.bonds[i] for i in c)
    ]
    return count_numbers(model) - sum(bonds)


def _additive_model(tree: ModeTree, mean: Tensor, parts: list[Tensor]) -> Factorization:
    """Write an additive model as a tree of bonds 2: the product of ones below, and the sum below."""
    weights: dict[Node, Tensor] = {n: torch.stack([torch.ones_like(p), p], 1) for n, p in enumerate(parts)}
    for node in tree.interior:
        below = len(tree.children(node))
        weight = mean.new_zeros([2] * (below + 1))
        weight[(0,) * (below + 1)] = 1
        for k in range(below):
            weight[(*(int(j == k) for j in range(below)), 1)] = 1
        if node == tree.root:
            weight = weight[..., 1] + mean * weight[..., 0]
        weights[node] = weight
    return Factorization.from_weights(tree, weights)


def _fit_rank_one(
    samples: Samples,
    values: Tensor,
    sizes: tuple[int, ...],
    ridge: float,
    mean: float,
    generator: torch.Generator,
    sweeps: int = 8,
) -> list[Tensor]:
    """Fit values by a product of one vector per mode, each of them in turn."""
    count, ridge = len(values), ridge + 1e-10

    def normal(size: int) -> Tensor:
        drawn = draw_normal((size, 1), double(values[:0]).dtype, "cpu", generator)
        return (mean + 0.5 * drawn).to(values.device, values.dtype)

    vectors = [normal(size) for size in sizes]
    for _ in range(sweeps):
        for n, size in enumerate(sizes):
            for m, vector in enumerate(vectors):
                if m != n:  # of mean square 1, so that the ridge is one on the tensor
                    vectors[m] = vector / (
                        torch.linalg.vector_norm(vector) / math.sqrt(len(vector))
                    ).clamp_min(1e-30)
            others = [samples.read(m, vector) for m, vector in enumerate(vectors) if m != n]
            around = math.prod(others, start=torch.ones_like(values).unsqueeze(1))
            gram = samples.grams[n]
            if gram is None:
                sums = samples.collect(n, around.conj() * values.unsqueeze(1), size)
                squares = samples.collect(n, around.abs().square().to(values.dtype), size)
                vectors[n] = sums / (squares + ridge * count / size)
            else:
                rows = double(samples.columns[n] * around)
                left = rows.mH @ rows + count * ridge * gram
                left.diagonal().add_(1e-12 * left.diagonal().abs().max() + 1e-300)
                vectors[n] = torch.linalg.solve(left, rows.mH @ double(values).unsqueeze(1)).to(values.dtype)
    return [double(vector[:, 0]) for vector in vectors]
