"""Augmentations of training images, drawn afresh for every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tnreg.errors import OptionError, check_integer, check_number
from tnreg.experiments.locality.settings import Settings

# How many tensors each one draws.
AUGMENTATIONS = {"none": 0, "noise": 1, "shift": 1, "mixup": 2, "cutmix": 2}


class Augmentation:
    """What ``settings.augment`` does to a batch; it draws on the CPU from a random stream of its own."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.kind = kind = settings.augment
        if kind not in AUGMENTATIONS:
            message = f"locality: no augment {kind!r}; there is {', '.join(AUGMENTATIONS)}."
            raise OptionError(message, argument="augment")
        self.drawn, self.stream = AUGMENTATIONS[kind], torch.Generator().manual_seed(seed)
        check_number(settings.noise, "locality: noise", 0)
        check_integer(settings.shift, 0, "locality: shift")
        for name in ("mixup", "cutmix"):
            check_number(getattr(settings, name), f"locality: {name}", 1e-3)
        self.settings = settings

    def draw(self, order: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
        """Draw for images of ``shape`` with these numbers; every tensor has a row for each of them."""
        count, stream = len(order), self.stream
        if self.kind == "noise":
            return (self.settings.noise * torch.randn(count, *shape, generator=stream),)
        if self.kind == "shift":
            most = self.settings.shift
            return (torch.randint(-most, most + 1, (count, 2), generator=stream),)
        if self.kind == "none":
            return ()
        partners = order[torch.randperm(count, generator=stream)]
        alpha = torch.full((2,), self.settings.mixup if self.kind == "mixup" else self.settings.cutmix)
        one, other = torch._standard_gamma(alpha, generator=stream)
        share = one / (one + other)  # from Beta(alpha, alpha)
        if self.kind == "mixup":
            return partners, share.expand(count, 1, 1, 1)
        size = torch.tensor(shape[-2:])
        reach, middle = (1 - share).sqrt() * size / 2, torch.rand(2, generator=stream) * size
        rows, columns = (
            (torch.arange(n) + 0.5 - at).abs() < most
            for n, at, most in zip(shape[-2:], middle, reach, strict=True)
        )
        return partners, 1 - torch.outer(rows, columns).float().expand(count, 1, -1, -1)

    def __call__(
        self, of: Callable[[Tensor], tuple[Tensor, Tensor]], index: Tensor, drawn: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return images and labels of some numbers, which ``of`` gives as they are.

        Labels of two images that are mixed are shares of the two classes, ``(B, 2)``.
        """
        x, y = of(index)
        if self.kind == "none":
            return x, y
        if self.kind == "noise":
            return x + drawn[0].to(x.dtype), y
        if self.kind == "shift":  # pixels of the edge are repeated
            down, right = drawn[0].T[..., None]
            rows, columns = (
                (torch.arange(n, device=x.device) - by).clamp(0, n - 1)
                for n, by in zip(x.shape[-2:], (down, right), strict=True)
            )
            at = torch.arange(len(x), device=x.device)[:, None, None]
            return x.movedim(1, -1)[at, rows[:, :, None], columns[:, None]].movedim(-1, 1), y
        partners, keep = drawn
        others, labels = of(partners)
        share = keep.mean((1, 2, 3))[:, None]
        mixed = torch.lerp(F.one_hot(labels, 2).float(), F.one_hot(y, 2).float(), share)
        return torch.lerp(others, x, keep.to(x.dtype)), mixed
