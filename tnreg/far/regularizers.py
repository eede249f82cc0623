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

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from tnreg.errors import OptionError
from tnreg.far.input_gradient import input_gradient
from tnreg.far.modes import evaluation, uncompiled
from tnreg.far.patches import box_mask, check_images
from tnreg.far.scheduled import Draw, Net, Scheduled, check_labels, nan_of, zero
from tnreg.machine.processes import sharded_parts, unwrapped


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
        start: The first so many calls give a zero; ``every`` and ``warmup`` count from there.
        until: After so many calls, those before ``start`` included, there is no penalty any more.
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
                self._note(value, drawn)
                return self._above_target(value)
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
        value = processes.sum(part)
        self._note(value, drawn)
        return self._above_target(value)


def gradient_change(before: Tensor, after: Tensor) -> Tensor:
    """Return the mean over the batch of the absolute cosine of two gradients; a zero vector counts as 1.

    Both have shape ``(B, ...)``; the result is a scalar in [0, 1], computed in at least float32.
    """
    g, h = _unit(before), _unit(after)
    both = (g != 0).any(1) & (h != 0).any(1)
    cosine = (g * h).sum(1).abs().clamp(max=1)
    return torch.where(both, cosine, torch.ones_like(cosine)).mean()


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
    labels = check_labels(y, *logits.shape)
    if labels.ndim == 2:
        return (logits * labels.to(logits.dtype)).sum(1)
    return logits.gather(1, labels[:, None])[:, 0]
