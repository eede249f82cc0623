"""Where a regularizer looks: ordered pairs (I, J) of disjoint boxes of pixels, given or drawn.

A box is ``(top, left, bottom, right)`` in pixels of the last two axes of an image batch, bottom and
right exclusive. A sampler has ``draw(x)``, which gives the next pair as an int64 tensor of shape
``(2, 4)`` on the device of ``x``: row 0 is I, where gradients are taken, row 1 is J, whose pixels are
swapped. Random numbers are drawn on the CPU and sent from there, so that drawing never waits for a GPU
and gives the same boxes on every device. Each sampler has a random stream of its own, so that using one
changes no other random number; ``state_dict`` holds it.

A sampler that looks at the shape of the batch alone says so by ``shape_only = True``. Any other one is
given the batch of all processes where several train one network, which must be sent for it.

The *gap* of two boxes is the number of pixel rows or columns between them, the larger of both: 0 for
boxes that touch, at a corner too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from tnreg.errors import DataError, OptionError, ShapeError, check_integer

Box = tuple[int, int, int, int]


class PatchSampler(Protocol):
    """What a regularizer needs of a sampler; write your own with these three methods.

    Say ``shape_only = True`` in the class if ``draw`` does not look at the pixels.
    """

    def draw(self, x: Tensor) -> Tensor:
        """The next pair for the batch ``x``: int64, shape ``(2, 4)``, on the device of ``x``.

        A sampler that looks at the shape alone takes a batch on any device.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the next pairs depend on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""


class RandomStream:
    """A seeded generator of random numbers on the CPU, saved and restored."""

    def __init__(self, seed: int, what: str) -> None:
        self.seed = check_integer(seed, 0, f"{what}: seed")
        self.what = what
        self.generator = torch.Generator().manual_seed(self.seed)

    def numbers(self, count: int) -> Tensor:
        """So many uniform numbers in [0, 1), in double precision."""
        return torch.rand(count, generator=self.generator, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Seed and state."""
        return {"seed": self.seed, "state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        if set(state) != {"seed", "state"}:
            raise OptionError(
                f"{self.what}: not the state of its random stream; found the keys {sorted(state)}, "
                "expected seed and state."
            )
        self.seed = state["seed"]
        self.generator.set_state(state["state"].cpu())  # a checkpoint may be mapped to a GPU


class FixedPatches:
    """The same pair every time; what a regularizer makes of a pair of boxes.

    Args:
        pair: I and J, disjoint.

    Raises:
        OptionError: Not two boxes, or they overlap.
        ShapeError: At ``draw``, if a box is not inside the image.
    """

    shape_only: ClassVar[bool] = True

    def __init__(self, pair: Sequence[Sequence[int]]) -> None:
        self.boxes = _check_boxes(pair, "a pair of patches")
        if len(self.boxes) != 2:
            raise OptionError(
                f"a pair of patches has two boxes, found {len(self.boxes)}; for more write "
                "PresetPatches([box, box, ...])."
            )
        self._pair = torch.tensor(self.boxes)

    def draw(self, x: Tensor) -> Tensor:
        """The pair."""
        _check_inside(self.boxes, x)
        self._pair = self._pair.to(x.device)
        return self._pair

    def state_dict(self) -> dict[str, Any]:
        """Nothing: no pair depends on the one before."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class PresetPatches:
    """An ordered pair of two of the given boxes, all such pairs equally likely.

    Args:
        boxes: Two or more boxes, pairwise disjoint.
        seed: Of its random stream.

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
        self.boxes = _check_boxes(boxes, "PresetPatches")
        if len(self.boxes) < 2:
            raise OptionError(f"PresetPatches needs two boxes or more, found {len(self.boxes)}.")
        self._boxes = torch.tensor(self.boxes)
        self._stream = RandomStream(seed, "PresetPatches")

    def draw(self, x: Tensor) -> Tensor:
        """The next ordered pair."""
        _check_inside(self.boxes, x)
        kept = torch.randperm(len(self.boxes), generator=self._stream.generator)[:2]
        return self._boxes[kept].to(x.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """The random stream."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._stream.load_state_dict(state)


class RandomPatches:
    """Two squares anywhere in the image, all allowed ordered pairs equally likely.

    ``RandomPatches(2)`` is the published choice: 2×2 pixels, not overlapping.

    Args:
        size: Side of the squares in pixels.
        distance: Least gap between them in pixels.
        exact: The gap is ``distance``, not more; with ``distance=0`` the patches are neighbours.
        seed: Of its random stream.

    Raises:
        OptionError: ``size`` < 1 or ``distance`` < 0.
        ShapeError: At ``draw``, if no such pair fits into the image.
    """

    shape_only: ClassVar[bool] = True

    def __init__(
        self, size: int = 2, distance: int = 0, *, exact: bool = False, seed: int = 0
    ) -> None:
        self.size = check_integer(size, 1, "RandomPatches: size")
        self.distance = check_integer(distance, 0, "RandomPatches: distance")
        self.exact = exact
        self._stream = RandomStream(seed, "RandomPatches")

    def draw(self, x: Tensor) -> Tensor:
        """The next ordered pair."""
        shape, options = tuple(x.shape[-2:]), (self.size, self.distance, self.exact)
        places = _Places(shape, torch.device("cpu"), *options, "RandomPatches")
        numbers = self._stream.numbers(2)
        first = _weighted(places.partners(), numbers[0])
        second = _weighted(places.allowed(first), numbers[1])
        return places.boxes(first, second).to(x.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """The random stream."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._stream.load_state_dict(state)


class DifferingPatches:
    """Two squares where the samples of the batch differ, so that swapping pixels changes something.

    In sparse images most small patches hold the same background in every sample, and a swap of
    background for background teaches nothing. J is drawn with probability proportional to the number of
    samples that the swap with the next sample changes by more than ``threshold`` somewhere in J; then
    I, among the places that ``distance`` allows, proportional to the number of samples that are not
    constant (up to ``threshold``) inside I. Where all these numbers are zero the draw is uniform.

    Args:
        size: Side of the squares in pixels.
        distance: Least gap between them in pixels.
        exact: The gap is ``distance``, not more.
        threshold: Change of a pixel, in the units of the images, that counts.
        seed: Of its random stream.

    Raises:
        OptionError: ``size`` < 1, ``distance`` < 0 or ``threshold`` < 0.
        ShapeError: At ``draw``, if no such pair fits into the image.

    Cost: a few passes over the batch, on its device.
    """

    shape_only: ClassVar[bool] = False

    def __init__(
        self,
        size: int = 2,
        distance: int = 0,
        *,
        exact: bool = False,
        threshold: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.size = check_integer(size, 1, "DifferingPatches: size")
        self.distance = check_integer(distance, 0, "DifferingPatches: distance")
        if not threshold >= 0:
            raise OptionError(f"DifferingPatches: threshold must be >= 0, found {threshold!r}.")
        self.exact, self.threshold = exact, float(threshold)
        self._stream = RandomStream(seed, "DifferingPatches")

    def draw(self, x: Tensor) -> Tensor:
        """The next ordered pair."""
        shape, options = tuple(x.shape[-2:]), (self.size, self.distance, self.exact)
        places = _Places(shape, x.device, *options, "DifferingPatches")
        images = x.detach().reshape(len(x), -1, *x.shape[-2:]).float()
        swapped = (images - images.roll(-1, 0)).abs().amax(1)
        side = self.size
        changed = (max_pool2d(swapped, side, 1) > self.threshold).sum(0)
        spread = max_pool2d(images, side, 1) + max_pool2d(-images, side, 1)
        varied = (spread.amax(1) > self.threshold).sum(0)
        numbers = self._stream.numbers(2).to(x.device, non_blocking=True)
        second = _weighted_if_any(changed.flatten(), places.partners(), numbers[0])
        first = _weighted_if_any(varied.flatten(), places.allowed(second), numbers[1])
        return places.boxes(first, second)

    def state_dict(self) -> dict[str, Any]:
        """The random stream."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._stream.load_state_dict(state)


def as_sampler(patches: Any, what: str) -> PatchSampler:
    """A sampler as it is; a pair of boxes as a sampler that gives it every time.

    Raises:
        OptionError: Neither.
    """
    if hasattr(patches, "draw"):
        sampler: PatchSampler = patches
        return sampler
    if isinstance(patches, list | tuple):
        return FixedPatches(patches)
    raise OptionError(
        f"{what}: patches must be a pair of boxes ((top, left, bottom, right), (top, left, bottom, right)) "
        f"or a sampler such as RandomPatches(size=2), found {patches!r}."
    )


def box_mask(box: Tensor, height: int, width: int) -> Tensor:
    """True inside the box: shape ``(height, width)``, on the device of ``box``."""
    top, left, bottom, right = box.unbind()
    row = torch.arange(height, device=box.device)[:, None]
    column = torch.arange(width, device=box.device)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def check_images(x: Any, what: str, least: int = 2, *, floating: bool = True) -> Tensor:
    """The batch, if it is floating-point images of shape ``(B, ..., H, W)``; or one clear error."""
    if not isinstance(x, Tensor) or x.ndim < 3:
        found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ShapeError(
            f"{what}: expected images of shape (B, ..., height, width), found {found}."
        )
    if floating and not x.is_floating_point():
        raise DataError(f"{what}: images must be floating point, found {x.dtype}; write x.float().")
    if len(x) < least:
        raise ShapeError(
            f"{what}: a batch of {len(x)} has no other sample to take pixels from; "
            f"give {least} samples or more, e.g. DataLoader(..., drop_last=True)."
        )
    return x


class _Places:
    """Top left corners of squares in an image, numbered row by row."""

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        size: int,
        distance: int,
        exact: bool,
        what: str,
    ) -> None:
        height, width = shape
        self.size, self.near, self.exact = size, size + distance, exact
        self.rows, self.columns = height - size + 1, width - size + 1
        if min(height, width) < size or max(self.rows, self.columns) <= self.near:
            raise ShapeError(
                f"{what}: no two squares of side {size} with a gap of {distance} fit into an image of "
                f"{height} x {width}; the gap can be at most {max(height, width) - 2 * size}."
            )
        self.row = torch.arange(self.rows, device=device)
        self.column = torch.arange(self.columns, device=device)

    def partners(self) -> Tensor:
        """How many partners every place has; float32, shape ``(rows * columns,)``."""
        counts = self._beyond(self.near)
        return (counts - self._beyond(self.near + 1) if self.exact else counts).flatten()

    def allowed(self, place: Tensor) -> Tensor:
        """1 where a partner of this place (shape ``(1,)``) may be, else 0; the same shape."""
        down = (self.row - place // self.columns).abs()[:, None]
        across = (self.column - place % self.columns).abs()
        steps = torch.maximum(down, across)
        return (steps == self.near if self.exact else steps >= self.near).float().flatten()

    def boxes(self, first: Tensor, second: Tensor) -> Tensor:
        """Both boxes, shape ``(2, 4)``."""
        places = torch.cat([first, second])
        corner = torch.stack([places // self.columns, places % self.columns], dim=1)
        return torch.cat([corner, corner + self.size], dim=1)

    def _beyond(self, steps: int) -> Tensor:
        """How many places are ``steps`` or more steps away, down or across; shape ``(rows, columns)``."""

        def close(at: Tensor, count: int) -> Tensor:
            return (at + steps - 1).clamp(max=count - 1) - (at - steps + 1).clamp(min=0) + 1

        inside = close(self.row, self.rows)[:, None] * close(self.column, self.columns)
        return (self.rows * self.columns - inside).float()


def _weighted(weights: Tensor, number: Tensor) -> Tensor:
    """A place drawn in proportion to its weight, shape ``(1,)``; the weights are whole numbers.

    Args:
        weights: Shape ``(places,)``, not all zero; sums of them are exact in double precision.
        number: Uniform in [0, 1), a scalar in double precision on the same device.
    """
    sums = weights.double().cumsum(0)
    return torch.searchsorted(sums, number * sums[-1:], right=True)


def _weighted_if_any(weights: Tensor, allowed: Tensor, number: Tensor) -> Tensor:
    """One place in proportion to its weight where allowed; uniform there if every weight is zero."""
    free = (allowed > 0).float()
    weights = weights * free
    # no look at the value: it stays on the device
    return _weighted(torch.where(weights.sum() > 0, weights, free), number)


def _check_boxes(boxes: Any, what: str) -> tuple[Box, ...]:
    try:
        rows = [tuple(check_integer(n, 0, what) for n in box) for box in boxes]
    except (TypeError, OptionError):
        rows = []
    if not rows or any(len(b) != 4 or b[0] >= b[2] or b[1] >= b[3] for b in rows):
        raise OptionError(
            f"{what}: a box is (top, left, bottom, right), whole pixels >= 0 with top < bottom and "
            f"left < right, found {boxes!r}; e.g. ((0, 0, 8, 8), (0, 32, 8, 40))."
        )
    checked: list[Box] = [(b[0], b[1], b[2], b[3]) for b in rows]
    for i, a in enumerate(checked):
        for b in checked[i + 1 :]:
            if max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3]):
                raise OptionError(
                    f"{what}: the boxes {a} and {b} overlap; patches must be disjoint."
                )
    return tuple(checked)


def _check_inside(boxes: Sequence[Box], x: Tensor) -> None:
    height, width = x.shape[-2:]
    for box in boxes:
        if box[2] > height or box[3] > width:
            raise ShapeError(
                f"box {box} is not inside an image of {height} x {width}: bottom must be <= {height} "
                f"and right <= {width}."
            )
