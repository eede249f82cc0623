"""What all penalties have in common: when one counts, with what weight, and what a call draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import OptionError, check_integer

Net = Callable[..., Any]


@dataclass(frozen=True)
class Draw:
    """What one call of a penalty draws, for loops that draw before they evaluate.

    Attributes:
        pair: The boxes I and J, int64 ``(2, 4)``.
        samples: Numbers of the samples that are evaluated, int64; ``None`` for the whole batch.
        lengths: Samples of every process.
    """

    pair: Tensor
    samples: Tensor | None
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Draw:
        """The same on another device, without waiting for it."""
        samples = self.samples
        samples = None if samples is None else samples.to(device, non_blocking=True)
        return Draw(self.pair.to(device, non_blocking=True), samples, self.lengths)


class Scheduled:
    """A penalty with a weight that may grow, pause and end.

    Args:
        weight: Factor of the penalty.
        every: Only every so many calls count, the first one included.
        warmup: The weight grows linearly over so many calls.
        until: After so many calls there is no penalty any more.
        target: Value that is low enough.

    Raises:
        OptionError: A number out of its range.
    """

    def __init__(
        self,
        weight: float,
        every: int,
        warmup: int,
        until: int | None,
        target: float | None,
    ) -> None:
        what = type(self).__name__
        if not (weight >= 0 and weight < float("inf")):
            raise OptionError(f"{what}: weight must be a finite number >= 0, found {weight!r}.")
        self.weight = weight
        self.every = check_integer(every, 1, f"{what}: every")
        self.warmup = check_integer(warmup, 0, f"{what}: warmup")
        self.until = None if until is None else check_integer(until, 1, f"{what}: until")
        if target is not None and not 0 <= target < 1:
            raise OptionError(f"{what}: target must be >= 0 and < 1, found {target!r}.")
        self.target = target
        self.calls = 0

    def __call__(self, net: Net, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the weighted penalty of this batch."""
        weight = self.next_weight()
        return weight * self.value(net, x, y) if weight else zero(x)

    def next_weight(self) -> float:
        """Count a call and return its weight; 0 where there is no penalty."""
        self.calls += 1
        ended = self.until is not None and self.calls > self.until
        if ended or (self.calls - 1) % self.every:
            return 0.0
        return self.weight * (min(1.0, self.calls / self.warmup) if self.warmup else 1.0)

    def value(
        self, net: Net, x: Tensor, y: Tensor | None = None, drawn: Draw | None = None
    ) -> Tensor:
        """Return the penalty without its weight."""
        raise NotImplementedError

    def _beyond(self, value: Tensor) -> Tensor:
        """Return what is above the target."""
        return value if self.target is None else (value - self.target).clamp(min=0)


def zero(x: Tensor) -> Tensor:
    """Return a scalar zero as penalties have it, on the device of ``x``."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype, device=x.device)
