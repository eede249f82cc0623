"""Networks for images with one logit, built in, or any of your own by its import path.

- small-cnn: five 3x3 convolutions with ReLU (32, 48, 48, 48, 48 channels; the first, second and fourth with
  stride 2), global average pooling and a linear layer, and no normalization. Its weights are He-normal: from
  PyTorch's own initial weights it does not start to learn. wide-cnn has 7x7 convolutions, dilated-cnn has
  dilation 2, normalized-cnn batch normalization before each ReLU.
- resnet-18: that of He et al. (2016), arXiv:1512.03385, for images of 60 pixels or more. small-resnet has
  three blocks of 32, 48 and 48 channels, and sees as far as small-cnn.
- small-vit: two transformer blocks of 64 channels over patches of 4x4 pixels, for images of any size. On
  digits it learns by Adam (``optimizer="adam", lr=2e-3``), and not by SGD.
"""

from __future__ import annotations

import importlib
import inspect
import os
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tnreg.errors import OptionError, blame, did_you_mean


class SmallCNN(nn.Module):
    """Five convolutions, global average pooling, logits ``(B, num_classes)``.

    Images ``(B, in_channels, height, width)`` may have any size; ``dropout`` is the share of the pooled
    features that is dropped in training.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 1,
        dropout: float = 0.0,
        *,
        kernel: int = 3,
        dilation: int = 1,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, stride in ((32, 2), (48, 2), (48, 1), (48, 2), (48, 1)):
            padding = dilation * (kernel // 2)
            layers.append(nn.Conv2d(in_channels, channels, kernel, stride, padding, dilation))
            layers += [nn.BatchNorm2d(channels), nn.ReLU()] if normalize else [nn.ReLU()]
            in_channels = channels
        self.features, self.drop = nn.Sequential(*layers), nn.Dropout(dropout)
        self.head = nn.Linear(in_channels, num_classes)
        _he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return cast(Tensor, self.head(self.drop(self.features(x).mean((2, 3)))))


class ResNet(nn.Module):
    """Residual blocks of two 3x3 convolutions with batch normalization, one between each two ``widths``.

    The first convolution has kernels of ``stem``, and is pooled if they are 7x7. A block with more channels
    than the one before begins a stage, and there ``dropout`` drops what the stage before gives.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 1,
        dropout: float = 0.0,
        *,
        widths: Sequence[int] = (64, 64, 64, 128, 128, 256, 256, 512, 512),
        stem: int = 7,
    ) -> None:
        super().__init__()
        first = nn.Conv2d(in_channels, widths[0], stem, 2, padding=stem // 2, bias=False)
        pool = [nn.MaxPool2d(3, 2, padding=1)] if stem == 7 else []
        self.stem = nn.Sequential(first, nn.BatchNorm2d(widths[0]), nn.ReLU(), *pool)
        self.blocks = nn.Sequential(*map(_Block, widths, widths[1:]))
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(widths[-1], num_classes)
        _he_normal(self.stem, "fan_out")
        _he_normal(self.blocks, "fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x if isinstance(block.shortcut, nn.Identity) else self.drop(x))
        return cast(Tensor, self.head(x.mean((2, 3))))


class _Block(nn.Module):
    def __init__(self, inside: int, channels: int) -> None:
        super().__init__()
        stride = 1 if inside == channels else 2
        self.straight = nn.Sequential(
            nn.Conv2d(inside, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels),
            nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if inside != channels:
            narrow = nn.Conv2d(inside, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(narrow, nn.BatchNorm2d(channels))
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.straight(x) + self.shortcut(x)))


class SmallViT(nn.Module):
    """Transformer blocks over patches of 4x4 pixels, whose mean gives the logits; otherwise as ``SmallCNN``.

    Positions are told by fixed sines and cosines, so that images may have any size.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, 64, 4, 4)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    64, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(2)
            ),
            nn.LayerNorm(64),
        )
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.patches(x)
        x = (x + _positions(x.shape[1:], x.device)).flatten(2).mT
        return cast(Tensor, self.head(self.drop(self.blocks(x).mean(1))))


def _positions(shape: torch.Size, device: torch.device) -> Tensor:
    """Return sines and cosines of rows and columns, ``(channels, height, width)``."""
    channels, height, width = shape
    frequencies = 100 ** -torch.linspace(0, 1, channels // 4, device=device)[:, None]
    rows, columns = (frequencies * torch.arange(n, device=device) for n in (height, width))
    waves = [f(x) for x in (rows[..., None], columns[:, None]) for f in (torch.sin, torch.cos)]
    return torch.cat([wave.expand(-1, height, width) for wave in waves])


class _Repeated(nn.Module):
    """A network for colours that is given gray images."""

    def __init__(self, net: nn.Module, channels: int) -> None:
        super().__init__()
        self.net, self.channels = net, channels

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x.expand(-1, self.channels, -1, -1)))


BUILT_IN: dict[str, Any] = {
    "small-cnn": SmallCNN,
    "wide-cnn": partial(SmallCNN, kernel=7),
    "dilated-cnn": partial(SmallCNN, dilation=2),
    "normalized-cnn": partial(SmallCNN, normalize=True),
    "small-resnet": partial(ResNet, widths=(32, 32, 48, 48), stem=3),
    "resnet-18": ResNet,
    "small-vit": SmallViT,
}


@blame("model")
def build(name: str, in_channels: int, *, num_classes: int = 1, dropout: float = 0.0) -> nn.Module:
    """Return a network by name, with initial weights from torch's own random numbers.

    A name is one of ``BUILT_IN``, an import path such as ``torchvision.models:resnet18`` (modules of
    the working directory are found), or ``FILE.py:NAME``: anything that returns an ``nn.Module``. It is
    called with those of the other arguments that its signature names; ``num_classes`` also where it takes
    any keyword. Where ``in_channels`` is not one of them and the first
    convolution takes more channels, gray images are repeated.

    Raises:
        OptionError: Nothing importable of that name, no network, an argument that only you know, or dropout
            that it does not know.
    """
    make = BUILT_IN.get(name) or _import(name)
    signature = inspect.signature(make)
    known = signature.parameters.values()
    names = {p.name for p in known if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if any(p.kind == p.VAR_KEYWORD for p in known):
        names |= {"num_classes"}  # torchvision's builders pass it on
    if dropout and "dropout" not in names:
        raise OptionError(
            f"{name} has no keyword 'dropout', so that there is no arm 'dropout'.\n"
            "  wrap it in a function of your own that takes dropout=, and name that"
        )
    options = {"in_channels": in_channels, "num_classes": num_classes, "dropout": dropout}
    chosen = {key: value for key, value in options.items() if key in names}
    try:
        signature.bind(**chosen)
    except TypeError as error:
        advice = "wrap it in a function of your own without that argument, and name that"
        raise OptionError(f"{name}: {error}.\n  {advice}") from None
    net = make(**chosen)
    if not isinstance(net, nn.Module):
        raise OptionError(f"{name} gave a {type(net).__name__}, not an nn.Module.")
    first = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.in_channels == in_channels:
        return net
    if in_channels == 1:
        return _Repeated(net, first.in_channels)
    raise OptionError(f"{name} takes {first.in_channels} channels, the images have {in_channels}.")


def as_input(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return images as networks take them, in training and in probes: bytes 0 to 255 become 0 to 1."""
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)


def _import(path: str) -> Any:
    module, colon, name = path.rpartition(":")
    try:
        if not (module and colon and name):
            raise ImportError("expected MODULE:CALLABLE or FILE.py:CALLABLE")
        is_file = module.endswith(".py")
        folder = os.path.dirname(os.path.abspath(module)) if is_file else os.getcwd()
        if folder not in sys.path:  # python itself puts it there, an installed script does not
            sys.path.append(folder)
        return runpy.run_path(module)[name] if is_file else getattr(importlib.import_module(module), name)
    # whatever the code of others raises while it is run
    except Exception as error:
        raise OptionError(
            f"no network {path!r}: {type(error).__name__}: {error}\n{did_you_mean(path, BUILT_IN)}"
            f"  model: {', '.join(BUILT_IN)}, an import path such as torchvision.models:resnet18, or\n"
            "  a file and a name in it, such as mine.py:Net"
        ) from None


def _he_normal(net: nn.Module, mode: Any = "fan_in") -> None:
    for part in net.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, mode=mode, nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
