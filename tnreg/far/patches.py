"""Where a regularizer looks: ordered pairs (I, J) of disjoint boxes of pixels, given or drawn.

A box is ``(top, left, bottom, right)`` in pixels of the last two axes of an image batch, bottom and
right exclusive. A sampler's ``draw(x)`` gives the next pair, int64 of shape ``(2, 4)`` on the device of
``x``: row 0 is I, where gradients are taken, row 1 is J, whose pixels are swapped. Each sampler has a
random stream of its own on the CPU: drawing never waits for a GPU and gives the same boxes on every device.

The *gap* of two boxes is the number of pixel rows or columns between them, the larger of both: 0 for
boxes that touch, at a corner too.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from tnreg.errors import DataError, OptionError, ShapeError, check_integer, check_number
from tnreg.tensors.arrays import as_tensor, seeded

Box = tuple[int, int, int, int]


class PatchSampler(Protocol):
    """What a regularizer needs of a sampler; write your own with these three methods.

    ``shape_only = True`` says that ``draw`` looks at the shape alone and takes a batch on any device.
    Where several processes train one network, any other sampler is sent the batch of all.
    """

    def draw(self, x: Tensor) -> Tensor:
        """Return the next pair for the batch ``x``: int64, shape ``(2, 4)``, on the device of ``x``."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next pairs depend on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""


class RandomStream:
    """A seeded generator of random numbers on the CPU, saved and restored."""

    def __init__(self, seed: int, name: str) -> None:
        self.seed = check_integer(seed, 0, f"{name}: seed")
        self.name = name
        self.generator = seeded(self.seed, f"{name}: seed")

    def __repr__(self) -> str:
        return call_of(self)

    def state_dict(self) -> dict[str, Any]:
        """Return seed and state of the random stream."""
        return {"seed": self.seed, "state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        if set(state) != {"seed", "state"}:
            message = f"not the state of its random stream; found the keys {sorted(state)}"
            raise OptionError(f"{self.name}: {message}, expected seed and state.", argument="state")
        self.seed = state["seed"]
        self.generator.set_state(state["state"].cpu())  # a checkpoint may be mapped to a GPU


class FixedPatches:
    """The same pair of disjoint boxes every time; what a regularizer makes of a pair.

    Raises:
        OptionError: Not two boxes, or they overlap.
        ShapeError: At ``draw``, if a box is not inside the image.
    """

    shape_only: ClassVar[bool] = True

    def __init__(self, pair: Sequence[Sequence[int]]) -> None:
        self.boxes = _check_boxes(pair, "a pair of patches", "patches")
        if len(self.boxes) != 2:
            message = f"a pair of patches has two boxes, found {len(self.boxes)}; for more write "
            raise OptionError(f"{message}PresetPatches([box, box, ...]).", argument="patches")
        self._pair = torch.tensor(self.boxes)

    def __repr__(self) -> str:
        return repr(self.boxes)

    def draw(self, x: Tensor) -> Tensor:
        """Return the pair."""
        _check_inside(self.boxes, x)
        self._pair = self._pair.to(x.device)
        return self._pair

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: no pair depends on the one before."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load nothing."""


class PresetPatches(RandomStream):
    """An ordered pair of two of the given boxes, all such pairs equally likely.

    Raises:
        OptionError: Fewer than two boxes, or two that overlap.
        ShapeError: At ``draw``, if a box is not inside the image.

    Example:
        >>> sampler = PresetPatches([(0, 0, 8, 8), (0, 32, 8, 40)])
        >>> sorted(sampler.draw(torch.zeros(2, 1, 8, 40)).tolist())
        [[0, 0, 8, 8], [0, 32, 8, 40]]
    """

    shape_only: ClassVar[bool] = True

    def __init__(self, boxes: Sequence[Sequence[int]], *, seed: int = 0) -> None:
        super().__init__(seed, "PresetPatches")
        self.boxes = _check_boxes(boxes, "PresetPatches", "boxes")
        if len(self.boxes) < 2:
            message = f"PresetPatches needs two boxes or more, found {len(self.boxes)}."
            raise OptionError(message, argument="boxes")
        self._boxes = torch.tensor(self.boxes)

    def draw(self, x: Tensor) -> Tensor:
        """Return the next ordered pair."""
        _check_inside(self.boxes, x)
        two = torch.randperm(len(self.boxes), generator=self.generator)[:2]
        return self._boxes[two].to(x.device, non_blocking=True)


class _Squares(RandomStream):
    """Two squares of one size, at least or exactly so far apart."""

    def __init__(self, size: int = 2, distance: int = 0, *, exact: bool = False, seed: int = 0) -> None:
        super().__init__(seed, type(self).__name__)
        self.size = check_integer(size, 1, f"{self.name}: size")
        self.distance = check_integer(distance, 0, f"{self.name}: distance")
        self.exact = exact

    def _numbers(self) -> Tensor:
        """Return two uniform numbers in [0, 1), in double precision."""
        return torch.rand(2, generator=self.generator, dtype=torch.float64)


class RandomPatches(_Squares):
    """Two squares anywhere in the image, all allowed ordered pairs equally likely.

    ``RandomPatches(2)`` is the published choice: 2×2 pixels, not overlapping.

    Args:
        size: Side of the squares in pixels.
        distance: Least gap between them in pixels.
        exact: The gap is ``distance``, not more; with ``distance=0`` the patches are neighbours.

    Raises:
        OptionError: ``size`` < 1 or ``distance`` < 0.
        ShapeError: At ``draw``, if no such pair fits into the image.
    """

    shape_only: ClassVar[bool] = True

    def draw(self, x: Tensor) -> Tensor:
        """Return the next ordered pair."""
        places, numbers = _Places(self, x, "cpu"), self._numbers()
        first = _choose(places.partners(), numbers[0])
        second = _choose(places.allowed(first), numbers[1])
        return places.boxes(first, second).to(x.device, non_blocking=True)


class DifferingPatches(_Squares):
    """Two squares where the samples of the batch differ, so that swapping pixels changes something.

    J is drawn with probability proportional to the number of samples that the swap with the next sample
    changes by more than ``threshold`` (in the units of the images) somewhere in J; then I, among the
    places that ``distance`` allows, proportional to the number of samples that are not constant (up to
    ``threshold``) inside I. Where all these numbers are zero the draw is uniform. Arguments and errors
    are otherwise those of ``RandomPatches``. A draw costs a few passes over the batch, on its device.

    Raises:
        OptionError: Also for ``threshold`` < 0.
    """

    shape_only: ClassVar[bool] = False

    def __init__(
        self, size: int = 2, distance: int = 0, *, exact: bool = False, threshold: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__(size, distance, exact=exact, seed=seed)
        self.threshold = check_number(threshold, "DifferingPatches: threshold", 0)

    def draw(self, x: Tensor) -> Tensor:
        """Return the next ordered pair."""
        places, side = _Places(self, x, x.device), self.size
        images = x.detach().reshape(len(x), -1, *x.shape[-2:])
        images = images if x.dtype == torch.float64 else images.float()
        change = (images - images.roll(-1, 0)).abs().amax(1)
        changed = (max_pool2d(change, side, 1) > self.threshold).sum(0)
        spread = max_pool2d(images, side, 1) + max_pool2d(-images, side, 1)
        varied = (spread.amax(1) > self.threshold).sum(0)
        numbers = self._numbers().to(x.device, non_blocking=True)
        second = _choose_if_any(changed.flatten(), places.partners(), numbers[0])
        first = _choose_if_any(varied.flatten(), places.allowed(second), numbers[1])
        return places.boxes(first, second)


def as_sampler(patches: Any, name: str) -> PatchSampler:
    """Return a sampler as it is, and a pair of boxes as a sampler that gives it every time."""
    if hasattr(patches, "draw"):
        return cast(PatchSampler, patches)
    if isinstance(patches, list | tuple):
        return FixedPatches(patches)
    raise OptionError(
        f"{name}: patches must be a pair of boxes ((top, left, bottom, right), (top, left, bottom, right)) "
        f"or a sampler such as RandomPatches(size=2), found {patches!r}.",
        argument="patches",
    )


def box_mask(box: Tensor, height: int, width: int) -> Tensor:
    """Return True inside the box: shape ``(height, width)``, on the device of ``box``."""
    top, left, bottom, right = box.unbind()
    row = torch.arange(height, device=box.device)[:, None]
    column = torch.arange(width, device=box.device)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def as_given(x: Any, net: Any = None) -> Any:
    """Return an array of any kind as a tensor, and all else as it is.

    Floating-point arrays, which are no tensors, come in dtype and on the device of the network's weights.
    """
    given, x = x, as_tensor(x) if hasattr(x, "__array__") else x
    if isinstance(net, nn.Module) and x is not given and not isinstance(given, Tensor):
        weights = (p for p in net.parameters() if p.is_floating_point())
        x = x.to(next(weights, x)) if x.is_floating_point() else x
    return x


def call_of(thing: Any) -> str:
    """Return the call that makes a penalty or a sampler, without arguments that have their defaults."""
    given = inspect.signature(type(thing)).parameters.values()
    pairs = [(p.name, getattr(thing, p.name)) for p in given if hasattr(thing, p.name)]
    defaults = {p.name: p.default for p in given}
    options = ", ".join(f"{name}={value!r}" for name, value in pairs if value != defaults[name])
    return f"{type(thing).__name__}({options})"


def check_images(x: Any, name: str, least: int = 2, *, floating: bool = True, net: Any = None) -> Tensor:
    """Return the batch, see ``as_given``, if it holds floating-point images ``(B, ..., H, W)``, or raise."""
    x = as_given(x, net)
    if not isinstance(x, Tensor) or x.ndim < 3:
        found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        message = f"expected images of shape (B, ..., height, width), found {found}."
        raise ShapeError(f"{name}: {message}", argument="x")
    if floating and not x.is_floating_point():
        message = f"images must be floating point, found {x.dtype}; write x.float()."
        raise DataError(f"{name}: {message}", argument="x")
    if len(x) < least:
        message = f"a batch of {len(x)} has no other sample to take pixels from"
        more = f"give {least} samples or more, e.g. DataLoader(..., drop_last=True)."
        raise ShapeError(f"{name}: {message}; {more}", argument="x")
    return x


class _Places:
    """Top left corners of a sampler's squares in images like ``x``, numbered row by row."""

    def __init__(self, sampler: _Squares, x: Tensor, device: torch.device | str) -> None:
        (height, width), size, distance = x.shape[-2:], sampler.size, sampler.distance
        if min(height, width) < size or max(height, width) < 2 * size + distance:
            raise ShapeError(
                f"{sampler.name}: no two squares of side {size} with a gap of {distance} fit into an "
                f"image of {height} x {width}; the gap can be at most {max(height, width) - 2 * size}."
            )
        self.size, self.near, self.exact = size, size + distance, sampler.exact
        self.row = torch.arange(height - size + 1, device=device)
        self.column = torch.arange(width - size + 1, device=device)

    def partners(self) -> Tensor:
        """Return how many partners every place has; int64, shape ``(rows * columns,)``."""
        counts = self._beyond(self.near)
        return (counts - self._beyond(self.near + 1) if self.exact else counts).flatten()

    def allowed(self, place: Tensor) -> Tensor:
        """Return 1 where a partner of this place (shape ``(1,)``) may be, else 0; the same shape."""
        down = (self.row - place // len(self.column)).abs()[:, None]
        across = (self.column - place % len(self.column)).abs()
        steps = torch.maximum(down, across)
        return (steps == self.near if self.exact else steps >= self.near).float().flatten()

    def boxes(self, first: Tensor, second: Tensor) -> Tensor:
        """Return both boxes, shape ``(2, 4)``."""
        places = torch.cat([first, second])
        corner = torch.stack([places // len(self.column), places % len(self.column)], dim=1)
        return torch.cat([corner, corner + self.size], dim=1)

    def _beyond(self, steps: int) -> Tensor:
        """Count the places that are ``steps`` or more away, down or across; ``(rows, columns)``."""

        def close(at: Tensor) -> Tensor:
            return (at + steps - 1).clamp(max=len(at) - 1) - (at - steps + 1).clamp(min=0) + 1

        inside = close(self.row)[:, None] * close(self.column)
        return len(self.row) * len(self.column) - inside


def _choose(weights: Tensor, number: Tensor) -> Tensor:
    """Return a place chosen by a uniform number in [0, 1), in proportion to its weight; shape ``(1,)``."""
    sums = weights.double().cumsum(0)  # weights are whole numbers, not all zero: sums are exact
    return torch.searchsorted(sums, number * sums[-1:], right=True)


def _choose_if_any(weights: Tensor, allowed: Tensor, number: Tensor) -> Tensor:
    """Choose in proportion to the weights where allowed; uniformly there if all of them are zero."""
    free = (allowed > 0).float()
    weights = weights * free  # the condition stays on the device: nobody looks at it
    return _choose(torch.where(weights.sum() > 0, weights, free), number)


def _check_boxes(boxes: Any, name: str, argument: str) -> tuple[Box, ...]:
    try:
        rows = [tuple(check_integer(n, 0, name) for n in box) for box in boxes]
    except (TypeError, OptionError):
        rows = []
    if not rows or any(len(b) != 4 or b[0] >= b[2] or b[1] >= b[3] for b in rows):
        raise OptionError(
            f"{name}: a box is (top, left, bottom, right), whole pixels >= 0 with top < bottom and "
            f"left < right, found {boxes!r}; e.g. ((0, 0, 8, 8), (0, 32, 8, 40)).",
            argument=argument,
        )
    for a, b in itertools.combinations(rows, 2):
        if max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3]):
            message = f"{name}: the boxes {a} and {b} overlap; patches must be disjoint."
            raise OptionError(message, argument=argument)
    return tuple((top, left, bottom, right) for top, left, bottom, right in rows)


def _check_inside(boxes: Sequence[Box], x: Tensor) -> None:
    height, width = x.shape[-2:]
    for box in boxes:
        if box[2] > height or box[3] > width:
            raise ShapeError(
                f"box {box} is not inside an image of {height} x {width}: bottom must be <= {height} "
                f"and right <= {width}."
            )
