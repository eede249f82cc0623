"""What all penalties have in common: where they look, when they count and with what weight, their state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from tnreg.errors import DataError, OptionError, ShapeError, check_integer, check_number
from tnreg.far.modes import logits_of
from tnreg.far.patches import as_given, as_sampler, call_of, check_images
from tnreg.machine.processes import Processes, unwrapped

Net = Callable[..., Any]


@dataclass(frozen=True)
class Draw:
    """What one call of a penalty draws, for loops that draw before they evaluate."""

    pair: Tensor  # the boxes I and J, int64 (2, 4)
    samples: Tensor | None  # numbers of the samples that are evaluated, int64; None for all
    columns: Tensor | None = None  # of the interaction terms: numbers of those that give their pixels in J

    def to(self, device: torch.device) -> Draw:
        """Return the same on another device, without waiting for it."""

        def there(x: Tensor | None) -> Any:
            return None if x is None else x.to(device, non_blocking=True)

        return Draw(there(self.pair), there(self.samples), there(self.columns))


class Scheduled(ABC):
    """A penalty with a weight that may grow, pause and end; arguments as in ``InputGradientChange``.

    Attributes:
        last_value: The penalty of the last batch that was evaluated, without target and weight: a scalar
            without a graph, on the device of the network; ``None`` before.
        last_pair: The boxes I and J of that batch, int64 of shape ``(2, 4)``.
    """

    last_value: Tensor | None = None
    last_pair: Tensor | None = None

    def __init__(
        self,
        patches: Any,
        *,
        weight: float = 1.0,
        every: int = 1,
        warmup: int = 0,
        start: int = 0,
        until: int | None = None,
        target: float | None = None,
        statistics: str = "frozen",
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.name = name = type(self).__name__
        self.patches = as_sampler(patches, name)
        self.weight = check_number(weight, f"{name}: weight", 0)
        self.every = check_integer(every, 1, f"{name}: every")
        self.warmup = check_integer(warmup, 0, f"{name}: warmup")
        self.start = check_integer(start, 0, f"{name}: start")
        self.until = None if until is None else check_integer(until, 1, f"{name}: until")
        if self.until is not None and self.until <= self.start:
            message = f"{name}: until must be more than start, {self.start}, found {self.until}."
            raise OptionError(message, argument="until")
        self.target = None if target is None else check_number(target, f"{name}: target", 0, 1)
        if statistics not in ("frozen", "batch"):
            message = f"{name}: statistics must be 'frozen' or 'batch', found {statistics!r}."
            raise OptionError(message, argument="statistics")
        self.statistics = statistics
        if output is not None and not callable(output):
            message = f"{name}: output must be a function of what the network gives, found {output!r}."
            raise OptionError(message, argument="output")
        self.output = output
        self.calls = 0

    def __repr__(self) -> str:
        return call_of(self)

    def __call__(self, net: Net, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the weighted penalty of this batch."""
        weight = self.next_weight()
        return weight * self.value(net, x, y) if weight else zero(as_given(x))

    def next_weight(self) -> float:
        """Count a call and return its weight; 0 where there is no penalty."""
        self.calls += 1
        begun = self.calls - self.start
        ended = self.until is not None and self.calls > self.until
        if begun < 1 or ended or (begun - 1) % self.every:
            return 0.0
        return self.weight * (min(1.0, begun / self.warmup) if self.warmup else 1.0)

    @abstractmethod
    def draw(self, net: Net, x: Tensor, *, multiple: int = 1) -> Draw:
        """Draw the pair of boxes and the samples for one call."""

    @abstractmethod
    def value(self, net: Net, x: Tensor, y: Tensor | None = None, drawn: Draw | None = None) -> Tensor:
        """Return the penalty without its weight."""

    def state_dict(self) -> dict[str, Any]:
        """Return the calls so far and the random streams: a resumed training draws what it would have."""
        streams = self._streams().items()
        return {"calls": self.calls, **{name: stream.state_dict() for name, stream in streams}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        streams = self._streams()
        expected = sorted(["calls", *streams])
        if sorted(state) != expected:
            message = f"not a state of it; found the keys {sorted(state)}, expected {expected}."
            raise OptionError(f"{self.name}: {message}", argument="state")
        self.calls = state["calls"]
        for name, stream in streams.items():
            stream.load_state_dict(state[name])

    def _streams(self) -> dict[str, Any]:
        """Return what has a random stream, by its name in a state."""
        return {"patches": self.patches}

    def _only_needs_shape(self) -> bool:
        """Return whether the sampler looks at the shape of a batch alone."""
        return bool(getattr(self.patches, "shape_only", False))

    def _logits(self, out: Any, batch: int) -> Tensor:
        return logits_of(out, batch, self.output)

    def _whole(self, x: Any, processes: Processes) -> tuple[Tensor, int]:
        """Check a batch; return it and the size of that of all processes, each of which needs an image."""
        x = check_images(x, self.name, least=2 if processes.count == 1 else 0, floating=False)
        lengths = processes.lengths(len(x))
        if not all(lengths):
            message = f"every process needs one image or more of each batch, found {lengths} on ranks "
            raise ShapeError(f"{self.name}: {message}0..{processes.count - 1}.", argument="x")
        return x, sum(lengths)

    def _prepare(self, net: Net, x: Any, y: Any, drawn: Draw | None) -> tuple[Any, ...]:
        """Check the arguments of ``value``; return them, the network without its wrapper, its processes."""
        inner, processes = unwrapped(net)
        x, y = check_images(x, self.name, least=0, net=inner), as_given(y)
        drawn = self.draw(net, x) if drawn is None else drawn
        if processes.count > 1 and x.requires_grad and torch.is_grad_enabled():
            message = "images that require gradients would get those of one process alone; in several "
            message += "processes make what computes them a part of the network, or write x.detach()."
            raise OptionError(f"{self.name}: {message}", argument="x")
        for name, m in inner.named_modules() if processes.count > 1 else ():
            if isinstance(m, _BatchNorm) and (self.statistics == "batch" or m.running_mean is None):
                message = f"{name or 'the network'} would normalize by the statistics of one process's part "
                message += "of the batch; in several processes give it running statistics and write "
                raise OptionError(f"{self.name}: {message}statistics='frozen'.", argument="statistics")
        return inner, x, y, drawn, processes

    def _note(self, value: Tensor, drawn: Draw) -> None:
        """Keep the value and the boxes for a log."""
        self.last_value, self.last_pair = value.detach(), drawn.pair

    def _above_target(self, value: Tensor) -> Tensor:
        """Return what is above the target."""
        return value if self.target is None else (value - self.target).clamp(min=0)


def zero(x: Tensor) -> Tensor:
    """Return a scalar zero as penalties have it, on the device of ``x``."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype, device=x.device)


def nan_of(*tensors: Tensor) -> Tensor:
    """Return NaN if one of the tensors holds a NaN, else 0, without waiting for the device."""
    first, *others = (t.detach().isnan().any() for t in tensors)
    for other in others:
        first = first | other.to(first.device)
    return torch.where(first, math.nan, 0.0)


def check_labels(y: Any, batch: int, count: int) -> Tensor:
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
