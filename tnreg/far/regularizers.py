"""One term for the loss of any network that makes it use dependencies between distant pixels.

Both terms are low where the network's value at patches I and J does not split into a part for each:
``loss + penalty(net, x, y)`` asks for interaction. A penalty runs the network apart from its training pass
(but for ``with_logits``): dropout is off, running statistics are used (or, if asked, the batch's own) and
never changed, and every module is left in the mode it had.

Where several processes train one network, give a penalty the ``DistributedDataParallel`` module and the
process's own part of the batch, at least one sample. All processes call it at the same time, and its
result goes into the same backward pass as their loss: value and averaged gradient are then those of one
process with the whole batch, the parts in the order of the ranks. The module inside the wrapper gives the
penalty of the process's part alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from tnreg.errors import DataError, OptionError, ShapeError, check_integer, check_number
from tnreg.far.input_gradient import input_gradient
from tnreg.far.modes import evaluation, logits_of, uncompiled
from tnreg.far.patches import RandomStream, box_mask, check_images
from tnreg.far.scheduled import Draw, Net, Scheduled, zero
from tnreg.machine.processes import Processes, sharded_parts, unwrapped
from tnreg.tensors.arrays import rescale
from tnreg.tensors.gradients import differentiating


class InputGradientChange(Scheduled):
    """How little the gradient at patch I turns when the pixels of patch J are swapped; minimise it.

    ``R = mean_b |<g_b, h_b>| / (|g_b| |h_b|)``, in [0, 1], where g is the gradient of sample b's logit
    with respect to its pixels in I, and h the same after its pixels in J were taken from the next
    sample of the batch (the last one's from the first). R is 1 for functions that are separable or
    additive over I and the rest; a zero gradient, at which no turn can be seen, counts as 1 and has no
    gradient. Source: Razin, Maman and Cohen (2022), arXiv:2201.11729.

    Args:
        patches: A pair of boxes ``(I, J)``, each ``(top, left, bottom, right)`` with bottom and right
            exclusive, or a sampler: ``RandomPatches``, ``PresetPatches``, ``DifferingPatches``.
        weight: Factor λ of the result. 0 gives a zero at once: nothing is evaluated or drawn.
        every: Only every so many calls give a penalty, the first one included; the others give a zero
            without a graph. λ is not rescaled. With gradient accumulation every micro-batch is a call.
        warmup: The weight grows linearly over so many calls.
        until: After so many calls there is no penalty any more.
        target: Value of R that is low enough: the result is ``weight * max(R - target, 0)``. Without one
            a large weight keeps pushing R down at the expense of what the network should learn.
        statistics: What normalization layers use inside the penalty: ``"frozen"``, their running
            statistics, so that R cannot be lowered through the statistics of the batch, or ``"batch"``.
            Layers that keep no running statistics use the batch's in either case.
        output: Function from what the network gives to its logits, e.g. ``lambda out: out.logits``.

    ``penalty(net, x, y=None)`` takes images ``x`` of shape ``(B, ..., H, W)``, B >= 2; ``net(x)`` has
    shape ``(B,)``, ``(B, 1)`` or ``(B, C)``, and for the last one ``y`` are the true classes, int64 of
    shape ``(B,)``, or shares of the classes, floating point of shape ``(B, C)``: the logit is then the
    sum of the logits by their shares. It returns the scalar ``weight * R``. Images that were computed by
    something that is trained as well, ``penalty(net, stem(x))``, pass gradients on to it. A training loop
    of your own can do the parts one by one: ``next_weight``, ``draw``, then ``value`` or ``with_logits``.
    ``last_value`` and ``last_pair`` are R and the boxes of the last batch, for a log.

    Raises:
        OptionError: An argument out of range; ``y`` missing where the network has several logits; in
            several processes, batch normalization by the statistics of the batch, or images that require
            gradients; a network under ``fully_shard``, whose weights are gone before they are
            differentiated again (``InteractionEnergy`` takes it).
        ShapeError: A batch of one, a box outside the image, logits or classes of another shape.
        DataError: Classes out of range; masked images or labels; a network made under inference mode.

    Cost: two forward passes, two gradients of the input, and their derivative: a training step with it
    takes some 4 times that without. With frozen statistics only the samples that the swap changes are
    evaluated. Compiled networks run uncompiled, also inside a compiled training step, as compiled graphs
    have no second derivative. Nothing is checkpointed. Images that are arrays of numpy are read in the
    precision of the network, also by ``InteractionEnergy`` and ``locality_profile``.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 1))
        >>> penalty = InputGradientChange(patches=((0, 0, 2, 2), (2, 2, 4, 4)))
        >>> x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> round(penalty(net, x).item(), 4)  # a linear function has no interaction at all
        1.0
    """

    def draw(self, net: Net, x: Tensor, *, multiple: int = 1) -> Draw:
        """Draw the pair of boxes, and find the samples that the swap changes.

        Where the batch is on a GPU, finding the samples waits for it; a copy on the CPU, of any dtype, gives
        the same answer at once. Unchanged samples are added until their number is a multiple of
        ``multiple``: fewer shapes, the same value. The result is on the device of ``x``.
        """
        net, processes = unwrapped(net)
        x, count = self._whole(x, processes)
        images = x if self._only_needs_shape() else processes.rows(x, torch.arange(count, device=x.device))
        pair = processes.gather(self.patches.draw(images))[0]  # all draw: their streams stay alike
        skips = self.statistics == "frozen" and processes.count == 1 and _is_samplewise(net)
        return Draw(pair, _changed_samples(x, pair[1], multiple) if skips else None)

    def with_logits(
        self, net: Net, x: Tensor, y: Tensor | None = None, drawn: Draw | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what the network gives in its training pass, and ``value`` after it.

        With ``statistics="batch"`` the first of the penalty's two passes is the training pass, which saves
        one forward and one backward pass, unless the network has dropout or frozen normalization layers.
        Other layers are taken to do the same in training mode as in evaluation mode.
        """
        x = check_images(x, self.name, least=0, net=net)
        if not (self.statistics == "batch" and torch.is_grad_enabled() and _trains_as_evaluated(net)):
            return net(x.clone()), self.value(net, x, y, drawn)
        outputs: list[Any] = []

        def training_pass(images: Tensor) -> Any:
            outputs.append(getattr(net, "_orig_mod", net)(images))
            return outputs[0]

        value = self.value(net, x, y, drawn, training_pass)
        return outputs[0], value

    @uncompiled
    def value(
        self,
        net: Net,
        x: Tensor,
        y: Tensor | None = None,
        drawn: Draw | None = None,
        training_pass: Net | None = None,
    ) -> Tensor:
        """Return R of this batch, or what is above the target; without the weight.

        ``training_pass`` is called in place of the network for the gradient before the swap, in training
        mode; ``drawn`` is from ``draw``, which is called here if it is left out.
        """
        inner, x, y, drawn, processes = self._prepare(net, x, y, drawn)
        if sharded_parts(inner):
            message = "fully_shard lets go of weights that this penalty has to differentiate again"
            instead = "write InteractionEnergy, or DistributedDataParallel"
            raise OptionError(f"{self.name}: {message}; {instead}.", argument="net")
        inner = getattr(inner, "_orig_mod", inner)
        inside, swapped = (box_mask(box, *x.shape[-2:]) for box in drawn.pair)
        after = processes.gather(x[:1])[(processes.rank + 1) % processes.count]
        other, count = torch.where(swapped, torch.cat([x[1:], after]), x), len(x)
        seen = [x]
        if drawn.samples is not None and len(drawn.samples) < count:
            if not len(drawn.samples):
                value = torch.ones_like(zero(x)) + nan_of(x, *inner.parameters())
                return self._above_target(value, drawn)
            if isinstance(y, Tensor) and len(y) == count:
                y = y[drawn.samples]
            x, other = x[drawn.samples], other[drawn.samples]

        def gradient(net: Net, images: Tensor) -> Tensor:
            def value(z: Tensor) -> Tensor:
                logit = _true_logit(self._logits(net(z), len(z)), y)
                seen.append(logit)
                return logit

            return input_gradient(value, images, differentiable=torch.is_grad_enabled())

        g = None if training_pass is None else gradient(training_pass, x)
        with evaluation(inner, self.statistics):
            g = gradient(inner, x) if g is None else g
            h = gradient(inner, other)
        change = gradient_change(g * inside, h * inside) + nan_of(*seen)  # g may know nothing of a NaN
        part = (change * len(x) + (count - len(x))) / sum(processes.lengths(count))
        return self._above_target(processes.sum(part), drawn)


class InteractionEnergy(Scheduled):
    """One minus the share of the network's variance that interaction of patch J with the rest explains.

    k samples of the batch are drawn without repetition. ``M[i, j]`` is the network's value at sample i
    with its pixels in J taken from sample j, and ``M° = M - row means - column means + mean``:

        E = 1 - |M°|² / (|M - mean|² + eps), in [0, 1].

    It is 1 for functions that are additive over J and the rest, and for constant ones. M is a sampled
    matricization of the function, so E is a differentiable probe of its separation rank (functional
    analysis of variance). A product ``g(x_J) h(rest)`` counts as interaction here, and as none under
    ``InputGradientChange``. I is part of the pair for the sampler's sake and is not used. With several
    logits, every sample drawn gives the whole matrix of the logit of its own class, and the energies are
    summed before the division.

    Calls, errors and the other arguments are those of ``InputGradientChange``.

    Args:
        samples: k; if the batch is smaller, its size.
        eps: Absolute part of eps, in squared units of the network's value, for the mean over M; without
            it E does not depend on that unit. To it comes the rounding error of M, so that a function that
            is constant but for rounding gives 1.
        seed: Of the random stream that draws the samples.

    Cost: one forward and backward pass of ``k²`` images, of which each of several processes evaluates a
    share. ``net`` may be compiled; ``interaction_energy`` of a matrix compiles as a whole. What is
    checkpointed in a training pass is checkpointed here.

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
        until: int | None = None,
        target: float | None = None,
        statistics: str = "frozen",
        output: Callable[[Any], Tensor] | None = None,
        eps: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            patches, weight=weight, every=every, warmup=warmup, until=until, target=target,
            statistics=statistics, output=output,
        )  # fmt: skip
        self.samples = check_integer(samples, 2, "InteractionEnergy: samples")
        self.eps = check_number(eps, "InteractionEnergy: eps", 0)
        self._stream = RandomStream(seed, "InteractionEnergy")

    @property
    def seed(self) -> int:
        """Seed of the random stream."""
        return self._stream.seed

    def draw(self, net: Net, x: Tensor, *, multiple: int = 1) -> Draw:
        """Draw the k samples and the pair of boxes, of a batch or its copy; ``multiple`` has no effect."""
        processes = unwrapped(net)[1]
        x, count = self._whole(x, processes)
        order = torch.randperm(count, generator=self._stream.generator)
        order = order[: self.samples]
        samples = processes.gather(order.to(x.device, non_blocking=True))[0]
        images = x if self._only_needs_shape() else processes.rows(x, samples)  # where these differ
        return Draw(processes.gather(self.patches.draw(images))[0], samples)

    def value(self, net: Net, x: Tensor, y: Tensor | None = None, drawn: Draw | None = None) -> Tensor:
        """Return E of this batch, or what is above the target; see ``InputGradientChange.value``."""
        net, x, y, drawn, processes = self._prepare(net, x, y, drawn)
        samples = drawn.samples
        images = processes.rows(x, samples)
        errors = differentiating() if torch.is_grad_enabled() else contextlib.nullcontext()
        with evaluation(net, self.statistics), errors:
            values = _all_crossed_values(net, images, drawn.pair[1], processes, self._logits)
        unknown = nan_of(x, values)
        if values.shape[-1] > 1:  # C logits: the matrix of each drawn sample's class
            labels = processes.rows(_check_labels(y, len(x), values.shape[-1]), samples)
            if labels.ndim == 1:
                values = values.index_select(-1, labels)
            else:
                values = (values.unsqueeze(2) * labels.to(values.dtype)).sum(-1)
        return self._above_target(interaction_energy(values, self.eps) + unknown, drawn)

    def with_logits(
        self, net: Net, x: Tensor, y: Tensor | None = None, drawn: Draw | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what the network gives in its training pass, and ``value``."""
        x = check_images(x, self.name, least=0, net=net)
        return net(x.clone()), self.value(net, x, y, drawn)

    def _streams(self) -> dict[str, Any]:
        return {"patches": self.patches, "samples": self._stream}


def gradient_change(before: Tensor, after: Tensor) -> Tensor:
    """Return the mean over the batch of the absolute cosine of two gradients; a zero vector counts as 1.

    Both have shape ``(B, ...)``; the result is a scalar in [0, 1], computed in at least float32.
    """
    g, h = _unit(before), _unit(after)
    both = (g != 0).any(1) & (h != 0).any(1)
    cosine = (g * h).sum(1).abs().clamp(max=1)
    return torch.where(both, cosine, torch.ones_like(cosine)).mean()


def interaction_energy(values: Tensor, eps: float = 0.0) -> Tensor:
    """Return one minus the share of a matrix's variance that its row and column means do not explain.

    Args:
        values: Shape ``(k, l)``, or ``(k, l, C)`` for C matrices whose energies are summed.
        eps: Added to the mean square of ``M - mean``.

    Returns:
        Scalar in [0, 1], differentiable, computed in at least float32; 1 for a constant matrix.
    """
    rounding = torch.finfo(values.dtype).eps
    values, log2 = rescale(values if values.dtype == torch.float64 else values.float(), ())
    whole = values - values.mean((0, 1), keepdim=True)
    parts = whole - whole.mean(0, keepdim=True) - whole.mean(1, keepdim=True)
    floor = (eps**0.5 / log2.exp2()).square().squeeze() + rounding**2 * values.detach().square().mean()
    below = whole.square().mean() + floor
    return 1 - parts.square().mean() / torch.where(below == 0, 1.0, below)


def nan_of(*tensors: Tensor) -> Tensor:
    """Return NaN if one of the tensors holds a NaN, else 0, without waiting for the device."""
    first, *others = (t.detach().isnan().any() for t in tensors)
    for other in others:
        first = first | other.to(first.device)
    return torch.where(first, math.nan, 0.0)


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


def _changed_samples(x: Tensor, box: Tensor, multiple: int) -> Tensor:
    """Return the numbers of the samples that differ in the box from the next one, then some others."""
    top, left, bottom, right = box.tolist()
    pixels = x[..., top:bottom, left:right]
    differs = (pixels != pixels.roll(-1, 0)).flatten(1).any(1)
    order = torch.argsort(differs.logical_not().to(torch.uint8), stable=True)
    return order[: -(-int(differs.sum()) // multiple) * multiple]


def _is_samplewise(net: Any) -> bool:
    """Return whether a sample's value depends on no other sample, where statistics are frozen."""
    return isinstance(net, nn.Module) and not any(
        isinstance(m, _BatchNorm) and m.running_mean is None for m in net.modules()
    )


def _trains_as_evaluated(net: Any) -> bool:
    """Return whether the training pass is the one that ``evaluation(net, "batch")`` makes."""
    if not isinstance(net, nn.Module) or unwrapped(net)[1].count > 1:
        return False
    return not any(
        (isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0)
        or (isinstance(m, _NormBase) and not m.training)
        for m in net.modules()
    )


def _all_crossed_values(
    net: Net,
    images: Tensor,
    box: Tensor,
    processes: Processes,
    read: Callable[[Any, int], Tensor] = logits_of,
) -> Tensor:
    """Return ``crossed_values`` of images with themselves, of which each process evaluates a share."""
    if processes.count == 1:
        return crossed_values(net, images, images, box, read)
    k = len(images)
    share = -(-(k**2) // processes.count)  # at least one, so that every process has a graph
    pairs = torch.arange(share, device=images.device) + processes.rank * share
    mask = box_mask(box, *images.shape[-2:])
    own = read(net(torch.where(mask, images[pairs % k], images[pairs // k % k])), share)
    return processes.gather(own).flatten(0, 1)[: k**2].reshape(k, k, -1)


def _unit(x: Tensor) -> Tensor:
    """Return the rows scaled to length one; zero rows stay zero and have no gradient."""
    x = x.flatten(1)
    x = x if x.dtype == torch.float64 else x.float()
    largest = x.detach().abs().amax(1, keepdim=True)  # squares of small numbers would vanish
    x = x / torch.where(largest > 0, largest, 1.0)
    square = x.square().sum(1, keepdim=True)
    return x / torch.where(square > 0, square, 1.0).sqrt()


def _true_logit(logits: Tensor, y: Any) -> Tensor:
    """Return the logit of the true class, or the only one; shape ``(batch,)``."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    labels = _check_labels(y, *logits.shape)
    if labels.ndim == 2:
        return (logits * labels.to(logits.dtype)).sum(1)
    return logits.gather(1, labels[:, None])[:, 0]


def _check_labels(y: Any, batch: int, count: int) -> Tensor:
    """Return class numbers, int64 ``(batch,)``, or shares of classes, floating point ``(batch, count)``."""
    if y is None:
        message = f"the network has {count} logits and the penalty is on that of the true class"
        raise OptionError(f"{message}: write penalty(net, x, y).", argument="y")
    if isinstance(y, Tensor) and y.is_floating_point() and y.shape == (batch, count):
        return y
    integer = isinstance(y, Tensor) and y.dtype in (torch.int64, torch.int32)
    if not integer or y.shape != (batch,):
        found = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        message = f"y must hold {batch} class numbers, int64 ({batch},), or shares of the classes, floating "
        raise ShapeError(f"{message}point ({batch}, {count}), found {found}.", argument="y")
    # on a GPU looking at the values would wait for it; torch reports them there
    if y.device.type == "cpu" and not bool(((y >= 0) & (y < count)).all()):
        message = f"y must be in 0..{count - 1}, found {int(y.min())}..{int(y.max())}, as the network has "
        raise DataError(f"{message}{count} logits.", argument="y")
    classes: Tensor = y.long()
    return classes
