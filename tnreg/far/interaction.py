"""Terms for the loss that ask for interaction of a patch with the rest of the image, by first derivatives.

A network is evaluated at k images, each with the pixels of patch J of l others: ``M[i, j]`` is its value at
image i with J from image j, a sampled matricization of the network, and ``M°`` is what the row means and the
column means of M do not explain (functional analysis of variance). ``InteractionEnergy`` asks how much of
the variance of M that is, ``InteractionRank`` how many directions it has.
"""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tnreg.errors import check_integer, check_number
from tnreg.far.modes import evaluation, logits_of, uncompiled
from tnreg.far.patches import RandomStream, box_mask, check_images
from tnreg.far.scheduled import Draw, Net, Scheduled, check_labels, nan_of, zero
from tnreg.machine.processes import Processes, unwrapped
from tnreg.ranks.dense import effective_rank
from tnreg.tensors.arrays import rescale
from tnreg.tensors.gradients import differentiating


class _Interaction(Scheduled):
    """What both terms have in common: their draw, and the matrix M of a batch.

    Attributes:
        last_values: M of the last batch that was evaluated, ``(k, l, C)`` without a graph; C > 1 with
            several logits. ``None`` before.
    """

    last_values: Tensor | None = None
    _last_counted: Tensor | None = None

    def __init__(self, patches: Any, samples: int, seed: int, **schedule: Any) -> None:
        super().__init__(patches, **schedule)
        self.samples = check_integer(samples, 2, f"{self.name}: samples")
        self._stream = RandomStream(seed, self.name)

    @property
    def seed(self) -> int:
        """Seed of the random stream."""
        return self._stream.seed

    @property
    def last_effective_rank(self) -> Tensor | None:
        """Effective rank of M° of the last batch, see ``effective_rank``; 0 where there is no interaction."""
        if self.last_values is None:
            return None
        return effective_rank(interaction_spectrum(self.last_values, counted=self._last_counted))

    @uncompiled
    def draw(self, net: Net, x: Tensor, *, multiple: int = 1) -> Draw:
        """Draw the boxes, k samples, and the samples whose pixels in J they take; ``multiple`` has no effect.

        The latter are the first k of a random order that differ from each other in J, or all that do. On a
        device where looking would wait there are k of them in any case, and repetitions do not count.
        """
        processes = unwrapped(net)[1]
        x, count = self._whole(x, processes)
        every = torch.arange(count, device=x.device)
        order = torch.randperm(count, generator=self._stream.generator)
        order = processes.gather(order.to(x.device, non_blocking=True))[0]
        images = x if self._only_needs_shape() else processes.rows(x, every)
        pair = processes.gather(self.patches.draw(images))[0]
        contents = processes.rows(_contents(x, pair[1]), every)
        columns = _differing(contents, order, min(self.samples, count))
        if x.device.type == "cpu":
            columns = columns[_counted(columns)]
        return Draw(pair, order[: self.samples], columns)

    def value(self, net: Net, x: Tensor, y: Tensor | None = None, drawn: Draw | None = None) -> Tensor:
        """Return the measure of this batch, or what is above the target; without the weight."""
        net, x, y, drawn, processes = self._prepare(net, x, y, drawn)
        rows, columns = drawn.samples, drawn.columns
        assert rows is not None and columns is not None  # of ``draw``
        if len(columns) == 1:  # all samples are the same in J: whatever the network, M has one column
            weights = net.parameters() if isinstance(net, nn.Module) else ()
            values, outputs, unknown = zero(x).expand(len(rows), 1, 1), 1, nan_of(x, *weights)
        else:
            values, outputs = self._crossed(net, x, y, rows, columns, drawn.pair[1], processes)
            unknown = nan_of(x, values)
        counted = _counted(columns)
        value, low = self._measure(values, counted, outputs)
        self._note(value + unknown, drawn)
        self.last_values, self._last_counted = values.detach(), counted
        return low + unknown

    def _crossed(
        self, net: Net, x: Tensor, y: Any, rows: Tensor, columns: Tensor, box: Tensor, processes: Processes
    ) -> tuple[Tensor, int]:
        """Return M and the number of logits; with several, M is of the class of each sample of its rows."""
        rest, patch = processes.rows(x, rows), processes.rows(x, columns)
        errors = differentiating() if torch.is_grad_enabled() else contextlib.nullcontext()
        with evaluation(net, self.statistics), errors:
            values = _all_crossed_values(net, rest, patch, box, processes, self._logits)
        outputs = values.shape[-1]
        if outputs == 1:
            return values, 1
        labels = processes.rows(check_labels(y, len(x), outputs), rows)
        if labels.ndim == 1:
            return values.index_select(-1, labels), outputs
        return (values.unsqueeze(2) * labels.to(values.dtype)).sum(-1), outputs

    def with_logits(
        self, net: Net, x: Tensor, y: Tensor | None = None, drawn: Draw | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what the network gives in its training pass, and ``value``."""
        x = check_images(x, self.name, least=0, net=net)
        return net(x.clone()), self.value(net, x, y, drawn)

    @abstractmethod
    def _measure(self, values: Tensor, counted: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
        """Return the measure of M, and what of it is to be lowered."""

    def _streams(self) -> dict[str, Any]:
        return {"patches": self.patches, "samples": self._stream}


class InteractionEnergy(_Interaction):
    """One minus the share of the network's variance that interaction of patch J with the rest explains.

    k samples of the batch are drawn without repetition. ``M[i, j]`` is the network's value at sample i
    with its pixels in J taken from sample j, and ``M° = M - row means - column means + mean``:

        E = 1 - |M°|² / (|M - mean|² + eps), in [0, 1].

    It is 1 for functions that are additive over J and the rest, and for constant ones. M is a sampled
    matricization of the function, so E is a differentiable probe of its separation rank (functional
    analysis of variance). A product ``g(x_J) h(rest)`` counts as interaction here, and as none under
    ``InputGradientChange``. I is part of the pair for the sampler's sake and is not used. With several
    logits, every sample drawn gives the whole matrix of the logit of its own class, and the energies are
    summed before the division. Where samples are the same in J, as in images with a constant background,
    the columns j are others of the batch that differ in J, or fewer.

    Calls, errors and the other arguments are those of ``InputGradientChange``.

    Args:
        samples: k; if the batch is smaller, its size.
        eps: Absolute part of eps, in squared units of the network's value, for the mean over M; without
            it E does not depend on that unit. To it comes the rounding error of M, so that a function that
            is constant but for rounding gives 1.
        seed: Of the random stream that draws the samples.

    Cost: one forward and backward pass of ``k²`` images, fewer where fewer samples differ in J and the
    patches were drawn on a CPU; each of several processes evaluates a share. ``net`` may be compiled;
    ``interaction_energy`` of a matrix compiles as a whole. What is checkpointed in a training pass is
    checkpointed here.

    Example:
        >>> product = lambda x: x[..., 0, 0] * x[..., 0, 3] + x[..., 0, 0] + x[..., 0, 3]
        >>> x = torch.tensor([[[1.0, 0, 0, 1]], [[-1.0, 0, 0, -1]]])
        >>> penalty = InteractionEnergy(patches=((0, 0, 1, 1), (0, 3, 1, 4)))
        >>> round(penalty(product, x).item(), 4)  # three terms of variance 1, one of them interaction
        0.6667
    """

    def __init__(
        self,
        patches: Any,
        samples: int = 8,
        *,
        weight: float = 1.0,
        every: int = 1,
        warmup: int = 0,
        start: int = 0,
        until: int | None = None,
        target: float | None = None,
        statistics: str = "frozen",
        output: Callable[[Any], Tensor] | None = None,
        eps: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            patches, samples, seed, weight=weight, every=every, warmup=warmup, start=start, until=until,
            target=target, statistics=statistics, output=output,
        )  # fmt: skip
        self.eps = check_number(eps, f"{self.name}: eps", 0)

    def _measure(self, values: Tensor, counted: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
        energy = interaction_energy(values, self.eps, counted=counted)
        return energy, self._above_target(energy)


class InteractionRank(_Interaction):
    """How few directions the interaction of patch J with the rest has, from 1 (none) to 0 (all, equally).

    With M and M° as in ``InteractionEnergy``, for k rows and as many columns,

        S = M° M°ᵀ / |M - mean|²,
        R = (log(1 + δ) - [log det((k-1) S + δ) - log δ] / (k-1)) / (log(1 + δ) - log δ), in [0, 1].

    The bracket over k-1 is the mean logarithm of the shares of variance that the k-1 directions of M°
    have, each relative to 1/(k-1). R is 1 for functions that are additive over J and the rest, and for
    constant ones; 0 where interaction explains all of the variance and M° has k-1 equal singular values.
    Energy can be lowered by one large direction; R asks for separation rank, as the theory does. With
    several logits their matrices M° stand side by side; where fewer than k-1 directions are possible, as
    where few samples differ in J, their number replaces k-1.

    The schedule is that of a term which waits until the network has learned what it learns by itself:
    at the steps 201 to 500, and only while interaction is weak. ``weight`` is that of R as it is here,
    0.2 for some 0.03 with the bracket alone.

    Calls, errors and the other arguments are those of ``InputGradientChange``.

    Args:
        samples: k; if the batch is smaller, its size.
        start: See ``InputGradientChange``; some 7 epochs in the study that it comes from, docs/seeing_far.md.
        until: After so many calls there is no term any more; None for no end.
        target: Interaction *energy* E at or below which the term is left out in a call: R counts whole,
            or not at all. None: it always counts.
        floor: δ, the share of a direction, relative to 1/(k-1), that counts as none.
        seed: Of the random stream that draws the samples.

    Cost: that of ``InteractionEnergy``, and a Cholesky factor of a k x k matrix.

    Example:
        >>> product = lambda x: x[..., 0, 0] * x[..., 0, 3] + x[..., 0, 0] + x[..., 0, 3]
        >>> x = torch.tensor([[[1.0, 0, 0, 1]], [[-1.0, 0, 0, -1]]])
        >>> pair = ((0, 0, 1, 1), (0, 3, 1, 4))
        >>> penalty = InteractionRank(pair, weight=1.0, start=0)  # one direction, a third of the variance
        >>> round(penalty(product, x).item(), 4)  # log(1.001 / (1/3 + 0.001)) / log(1001)
        0.1587
    """

    def __init__(
        self,
        patches: Any,
        samples: int = 8,
        *,
        weight: float = 0.2,
        every: int = 1,
        warmup: int = 0,
        start: int = 200,
        until: int | None = 500,
        target: float | None = 0.6,
        floor: float = 1e-3,
        statistics: str = "frozen",
        output: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            patches, samples, seed, weight=weight, every=every, warmup=warmup, start=start, until=until,
            target=target, statistics=statistics, output=output,
        )  # fmt: skip
        self.floor = check_number(floor, f"{self.name}: floor", 1e-9, 1)

    def _measure(self, values: Tensor, counted: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
        parts, below = _variance(values, 0.0, counted)
        rank = _rank(parts, below, self.floor, counted, outputs)
        if self.target is None:
            return rank, rank
        return rank, torch.where(_energy(parts, below).detach() > self.target, rank, 0.0)


def interaction_energy(values: Tensor, eps: float = 0.0, *, counted: Tensor | None = None) -> Tensor:
    """Return one minus the share of a matrix's variance that its row and column means do not explain.

    Args:
        values: Shape ``(k, l)``, or ``(k, l, C)`` for C matrices whose energies are summed.
        eps: Added to the mean square of ``M - mean``.
        counted: Which columns there are, bool ``(l,)``; all if left out.

    Returns:
        Scalar in [0, 1], differentiable, computed in at least float32; 1 for a constant matrix.
    """
    return _energy(*_variance(values, eps, counted))


def interaction_rank(
    values: Tensor, floor: float = 1e-3, *, counted: Tensor | None = None, outputs: int | None = None
) -> Tensor:
    """Return how few directions a matrix has beside its row and column means; see ``InteractionRank``.

    Args:
        values: Shape ``(k, l)``, or ``(k, l, C)`` for C matrices whose columns count together.
        floor: δ.
        counted: Which columns there are, bool ``(l,)``; all if left out.
        outputs: How many of the C matrices can differ; all if left out.

    Returns:
        Scalar in [0, 1], differentiable; 1 for a constant matrix. The determinant is computed in double
        precision.
    """
    return _rank(*_variance(values, 0.0, counted), floor, counted, outputs)


def interaction_spectrum(values: Tensor, *, counted: Tensor | None = None) -> Tensor:
    """Return the singular values of M° on a scale of their own, descending; those of rounding alone are 0.

    Arguments are those of ``interaction_rank``; C matrices stand side by side. There is no gradient.
    """
    parts, _ = _variance(values.detach(), 0.0, counted)
    s = torch.linalg.svdvals(parts.flatten(1).double())
    noise = torch.finfo(values.dtype).eps * 2 * (len(parts) / parts[0].numel()) ** 0.5
    return torch.where(s > noise, s, 0.0)


def crossed_values(
    net: Net, rest: Tensor, patch: Tensor, box: Tensor, read: Callable[[Any, int], Tensor] = logits_of
) -> Tensor:
    """Evaluate the network at every image of ``rest`` with the box taken from every image of ``patch``.

    ``rest`` has shape ``(k, ..., H, W)``, ``patch`` ``(l, ..., H, W)``, ``box`` ``(4,)``. Returns shape
    ``(k, l, C)``; C is 1 for a network with one logit. ``read`` makes logits of what it gives for a batch.
    """
    images = torch.where(box_mask(box, *rest.shape[-2:]), patch, rest[:, None])
    logits = read(net(images.flatten(0, 1)), len(rest) * len(patch))
    return logits.reshape(len(rest), len(patch), -1)


def _variance(values: Tensor, eps: float, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return M° with a factor, ``(k, l, C)``, and what the sum of its squares is a share of.

    Columns that do not count are zero. ``eps`` is in squared units of ``values``, for the mean.
    """
    rounding = torch.finfo(values.dtype).eps
    values = values if values.ndim == 3 else values.unsqueeze(-1)
    values, log2 = rescale(values if values.dtype == torch.float64 else values.float(), ())
    weights = values.new_ones(values.shape[1]) if counted is None else counted.to(values.dtype)
    weights = (weights / weights.sum()).unsqueeze(-1)  # (l, 1)
    rows = (values * weights).sum(1, keepdim=True)
    whole = values - rows.mean(0, keepdim=True)
    parts = values - rows - (values - rows).mean(0, keepdim=True)
    factor = 1 / (len(values) * values.shape[-1])
    floor = (eps**0.5 / log2.exp2()).square().squeeze() + rounding**2 * values.detach().square().mean()
    below = (whole.square() * weights).sum() * factor + floor
    return parts * (factor * weights).sqrt(), torch.where(below == 0, 1.0, below)


def _energy(parts: Tensor, below: Tensor) -> Tensor:
    return 1 - parts.square().sum() / below


def _rank(parts: Tensor, below: Tensor, floor: float, counted: Tensor | None, outputs: int | None) -> Tensor:
    k = len(parts)
    columns = parts.new_ones(parts.shape[1]) if counted is None else counted
    outputs = parts.shape[2] if outputs is None else outputs
    n = ((columns.sum(dtype=torch.float64) - 1) * outputs).clamp(max=k - 1)
    wide = parts.flatten(1).double()  # which autocast leaves alone
    share = n * (wide @ wide.mT) / below + floor * torch.eye(k, dtype=wide.dtype, device=wide.device)
    lower = torch.linalg.cholesky_ex(share)[0]
    none, most = math.log(floor), math.log1p(floor)
    mean = (2 * lower.diagonal().log().sum() - (k - n) * none) / n.clamp(min=1)
    return torch.where(n > 0, (most - mean) / (most - none), 1.0).to(parts.dtype)


def _contents(x: Tensor, box: Tensor) -> Tensor:
    """Return what every image has in the box, ``(B, n)``, without waiting for a device."""
    if box.device.type == "cpu":
        top, left, bottom, right = box.tolist()
        return x[..., top:bottom, left:right].flatten(1)
    return torch.where(box_mask(box, *x.shape[-2:]), x, 0).flatten(1)


def _differing(contents: Tensor, order: Tensor, count: int) -> Tensor:
    """Return the first ``count`` numbers in ``order`` whose contents differ, and the first where all do."""
    contents = contents[order]
    first = contents[:count]
    if contents.device.type == "cpu" and int((first[:, None] == first).all(-1).sum()) == count:
        return order[:count]
    places = torch.arange(len(order), device=order.device)
    new, chosen = torch.ones_like(places, dtype=torch.bool), []
    for _ in range(count):
        chosen.append(new.int().argmax(0, keepdim=True))  # or place 0
        new = new & (contents != contents.index_select(0, chosen[-1])).any(1) & (places != chosen[-1])
    return order[torch.cat(chosen)]


def _counted(columns: Tensor) -> Tensor:
    """Return which columns are no repetitions of the first one."""
    return (columns != columns[0]) | (torch.arange(len(columns), device=columns.device) == 0)


def _all_crossed_values(
    net: Net,
    rest: Tensor,
    patch: Tensor,
    box: Tensor,
    processes: Processes,
    read: Callable[[Any, int], Tensor] = logits_of,
) -> Tensor:
    """Return ``crossed_values``, of which each process evaluates a share."""
    if processes.count == 1:
        return crossed_values(net, rest, patch, box, read)
    k, columns = len(rest), len(patch)
    share = -(-(k * columns) // processes.count)  # at least one, so that every process has a graph
    pairs = torch.arange(share, device=rest.device) + processes.rank * share
    mask = box_mask(box, *rest.shape[-2:])
    own = read(net(torch.where(mask, patch[pairs % columns], rest[pairs // columns % k])), share)
    return processes.gather(own).flatten(0, 1)[: k * columns].reshape(k, columns, -1)
