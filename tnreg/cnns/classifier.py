"""Image classifiers whose network is a tree: a representation of patches, then a ``ConvNet``.

The scores of an image with patches x_0..x_{N-1} are ``<f(x_0) ⊗ ... ⊗ f(x_{N-1}), W_c>``, f the M template
functions (Cohen, Sharir and Shashua 2016, arXiv:1509.05009).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from tnreg.cnns.convnet import ConvNet, from_cnn, to_cnn
from tnreg.errors import DataError, OptionError, ShapeError, check_integer, check_number
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.files import metadata_of, read_model, write_safetensors
from tnreg.networks.network import Network
from tnreg.ranks.decompose import truncate
from tnreg.tensors.arrays import check_dtype, draw_normal, is_autocast
from tnreg.trees.reading import Node

_FORMAT = "tnreg.convac/1"
_METADATA = "tnreg-convac"  # where a file holds the tree and all settings
_KINDS = ("affine", "gaussian", "bins", "sine")


@final
class Representation(nn.Module):
    """Template functions of every patch of an image: ``(B, C, H, W)`` to ``(B, M, H', W')``.

    Args:
        templates: How many, M.
        kind: ``"affine"``: ``relu(<w_m, x> + b_m)``; ``"gaussian"``: ``exp(-|x - mean_m|² / 2 width_m²)``;
            ``"bins"``: which of M equal intervals of ``[low, high]`` the mean of the patch lies in, one-hot
            (what lies outside counts to the outer ones); ``"sine"``: ``sqrt(binomial(M-1, m)) cos^(M-1-m)
            sin^m`` of ``pi/2 (mean - low) / (high - low)`` (Stoudenmire and Schwab 2016, arXiv:1605.05775).
        patch: Height and width of a patch; patches do not overlap.
        channels: Channels of the image.
        low: Smallest value of a pixel; for the initial templates as well.
        high: Largest value of a pixel.
        trained: Whether affine and Gaussian templates are trained or stay as they were drawn.
        dtype: Type of the weights.
        device: Any torch device.
        generator: Draws the templates.

    Raises:
        OptionError: An unknown kind, or numbers that make no sense.

    Example:
        >>> image = torch.tensor([[[[0.0, 0.4], [0.6, 1.0]]]])
        >>> Representation(2, kind="bins")(image)[0, 1]
        tensor([[0., 0.],
                [1., 1.]])
    """

    def __init__(
        self,
        templates: int,
        *,
        kind: str = "affine",
        patch: tuple[int, int] = (1, 1),
        channels: int = 1,
        low: float = 0.0,
        high: float = 1.0,
        trained: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.templates = check_integer(templates, 1, "templates")
        if kind not in _KINDS:
            message = f"unknown kind {kind!r} of templates; there is {', '.join(_KINDS)}."
            raise OptionError(message, argument="kind")
        low, high = check_number(low, "low"), check_number(high, "high")
        if not low < high:
            message = f"low and high must be finite with low < high, found {low} and {high}."
            raise OptionError(message, argument="low")
        try:
            rows, columns = patch
        except (TypeError, ValueError):
            message = f"patch must be (height, width), found {patch!r}."
            raise OptionError(message, argument="patch") from None
        height = check_integer(rows, 1, "height of a patch")
        self.patch = height, check_integer(columns, 1, "width of a patch")
        self.kind, self.low, self.high, self.trained = kind, low, high, bool(trained)
        self.channels = check_integer(channels, 1, "channels")
        size = self.channels * math.prod(self.patch)
        dtype = check_dtype(dtype or torch.get_default_dtype(), real=True)
        if kind == "affine":
            noise = draw_normal((templates, size), dtype, device, generator)
            self.weight = nn.Parameter(noise * math.sqrt(2 / size))
            self.bias = nn.Parameter(torch.ones_like(self.weight[:, 0].detach()))
        elif kind == "gaussian":
            middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
            steps = torch.linspace(-1, 1, templates, dtype=dtype, device=device).unsqueeze(1)
            means = middle + half * (steps if templates > 1 else steps * 0).expand(-1, size)
            if size > 1:  # several pixels: templates of random contrast around their mean
                means = means + half / 2 * draw_normal((templates, size), dtype, device, generator)
            self.means = nn.Parameter(means.clone())
            width = (self.high - self.low) / max(templates - 1, 1) * math.sqrt(size)
            self.log_widths = nn.Parameter(torch.full_like(means[:, 0], math.log(width)))
        self.requires_grad_(self.trained)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        check_dtype(fn(torch.empty(0)).dtype, real=True)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Tensor:
        """Return the values of all templates at every patch, ``(B, M, H / patch height, W / patch width)``.

        Raises:
            ShapeError: Another number of channels, or an image that patches do not fill.
            DataError: Images of another dtype than the templates, or of integers.
        """
        rows, columns = self.patch
        fits = images.ndim == 4 and images.shape[1] == self.channels
        if not fits or images.shape[2] % rows or images.shape[3] % columns:
            raise ShapeError(
                "images do not fit the patches.\n"
                f"  found:    {tuple(images.shape)}\n"
                f"  expected: (B, {self.channels}, a multiple of {rows}, a multiple of {columns})",
                argument="images",
            )
        weight = next(self.parameters(), images)
        fits = images.dtype == weight.dtype or is_autocast(images.device)  # which casts by itself
        if not (fits and images.is_floating_point()):
            wanted = weight.dtype if weight.is_floating_point() else "a floating-point dtype"
            message = f"images have dtype {images.dtype}; write images.to({wanted})."
            raise DataError(message, argument="images")
        if self.kind == "affine":
            filters = self.weight.reshape(-1, self.channels, rows, columns)
            return nn.functional.conv2d(images, filters, self.bias, stride=self.patch).relu()
        if self.kind == "gaussian":
            b, c, height, width = images.shape
            cut = images.reshape(b, c, height // rows, rows, width // columns, columns)
            vectors = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).unsqueeze(3)  # (B, H', W', 1, size)
            squares = (vectors - self.means).square().sum(-1) * torch.exp(-2 * self.log_widths)
            return torch.exp(-squares / 2).permute(0, 3, 1, 2)
        mean = images.mean(1, keepdim=True)
        if self.patch != (1, 1):
            mean = nn.functional.avg_pool2d(mean, self.patch)
        share = ((mean - self.low) / (self.high - self.low)).clamp(0, 1)
        last = self.templates - 1
        if self.kind == "bins":
            index = torch.arange(self.templates, device=images.device).reshape(1, -1, 1, 1)
            inside = (share * self.templates).floor().clamp_max(last) == index
            return inside + 0 * share  # NaN stays NaN
        cos, sin = torch.cos(math.pi / 2 * share), torch.sin(math.pi / 2 * share)
        terms = [math.sqrt(math.comb(last, m)) * cos ** (last - m) * sin**m for m in range(last + 1)]
        return torch.cat(terms, 1)

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make a representation of the same shape."""
        names = ("templates", "kind", "patch", "channels", "low", "high", "trained")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """Describe the templates for ``print``."""
        fixed = "" if self.trained or self.kind in ("bins", "sine") else ", fixed"
        return f"{self.templates} {self.kind} templates of {self.patch[0]}x{self.patch[1]} patches{fixed}"


@final
class ConvAC(nn.Module):
    """Convolutional arithmetic circuit classifier: representation of patches, then the network of a tree.

    Args:
        representation: Template functions; its M are the channels of the network's inputs.
        net: A network with one output per class.
        scores: ``"normalized"``: scores of a sample are divided by their root mean square and multiplied
            by ``temperature``, which keeps every decision and lets any number of patches be trained with
            cross entropy; ``"plain"``: as they are.
        temperature: Root mean square of normalized scores.

    Raises:
        ShapeError: Templates that are not the channels of the network's inputs.
        OptionError: A network without several outputs, or unknown scores.

    Example:
        >>> from tnreg import ModeTree
        >>> tree = ModeTree.grid((4, 4))
        >>> model = ConvAC(Representation(3), ConvNet(tree, 3, 8, outputs=10))
        >>> model(torch.rand(5, 1, 4, 4)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        representation: Representation,
        net: ConvNet,
        *,
        scores: str = "normalized",
        temperature: float = 5.0,
    ) -> None:
        super().__init__()
        if net.outputs is None:
            message = "a classifier needs a net with outputs=number of classes."
            raise OptionError(message, argument="net")
        templates, channels = representation.templates, set(net.sizes)
        if channels != {templates}:
            message = f"{templates} templates do not fit input channels {channels}."
            raise ShapeError(message, argument="representation")
        if scores not in ("normalized", "plain"):
            message = f"unknown scores {scores!r}; write 'normalized' or 'plain'."
            raise OptionError(message, argument="scores")
        self.representation, self.net = representation, net
        self.scores, self.temperature = scores, check_number(temperature, "temperature")

    @torch.no_grad()
    def start_averaging_(self, *, std: float = 1.0, generator: torch.Generator | None = None) -> ConvAC:
        """Set filters that average what they read, each entry ``(1 + std N(0, 1)) / inputs``.

        Products of averages stay in reach of each other however many there are; from filters around
        zero deep products hardly train.
        """
        std = check_number(std, "std", 0)
        for conv in self.net.convs.values():
            weight: Any = conv.weight
            if not isinstance(weight, nn.Parameter):
                raise OptionError(
                    "start_averaging_ sets parameters: parametrize or prune filters afterwards."
                )
            inputs = weight.shape[1] if self.net.share else math.prod(weight.shape[1:-1])
            noise = draw_normal(weight.shape, weight.dtype, weight.device, generator)
            weight.copy_((1 + std * noise) / inputs)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores ``(B, classes)`` of images ``(B, C, H, W)``."""
        features = self.representation(images)
        if self.scores == "plain":
            scores: Tensor = self.net(features)
            return scores
        values, _ = self.net.scaled_values(features)
        # the scale of a sample cancels; the largest value first, so that squares stay in range
        largest = values.detach().abs().amax(1, keepdim=True)
        values = values / torch.where(largest > 0, largest, torch.ones_like(largest))
        squares = values.square().mean(1, keepdim=True)
        return self.temperature * values / squares.clamp_min(torch.finfo(values.dtype).tiny).sqrt()

    def settings(self) -> dict[str, Any]:
        """Return what files hold beside the network's indices and sizes."""
        net = {"outputs": self.net.outputs, "share": self.net.share}
        own = {"scores": self.scores, "temperature": self.temperature}
        return {**net, "representation": self.representation.settings(), **own}

    def as_factorization(self) -> Factorization:
        """Return the factorization with the network's weights: its gradients flow to them."""
        return self.net.as_factorization()

    def factorization(self) -> Factorization:
        """Return the tensor ``(M, ..., M, classes)``: the classes are the last mode, below the root."""
        return from_cnn(self.net)

    def with_factorization(self, model: Factorization) -> ConvAC:
        """Return a classifier with a copy of this representation and the network of another tensor.

        The model is as ``factorization`` gives it, e.g. truncated; the classes are its last mode.
        """
        weight = next(self.net.parameters())
        net = to_cnn(model, classes=True, shape=self.net.shape).to(weight)
        representation = copy.deepcopy(self.representation).to(weight)
        return ConvAC(representation, net, scores=self.scores, temperature=self.temperature)

    def truncated(
        self, *, ranks: int | Mapping[Node, int] | None = None, rtol: float | None = None
    ) -> ConvAC:
        """Return the classifier of lower hierarchical rank: its tensor rounded by ``tnreg.truncate``.

        Joins become full: product pooling of all pairs of channels, of which fewer are left. ``ranks`` are
        the largest numbers of channels, ``rtol`` is relative to the tensor of all classes together.
        """
        model = truncate(self.factorization(), ranks=ranks, rtol=rtol, leaves="weights")
        return self.with_factorization(model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, tree and settings to a safetensors file, whole or not at all."""
        net, state = self.net, self.state_dict()
        dtype = str(net.dtype).removeprefix("torch.")
        about = {"format": _FORMAT, "scaled": net.scaled, "image": net.shape, "dtype": dtype}
        about |= {**net.network.to_json(), **self.settings()}
        broken = [key for key, value in state.items() if not torch.isfinite(value).all()]
        if broken:
            raise DataError(f"not saved: {broken[0]} has NaN or infinite entries.")
        write_safetensors(path, state, _METADATA, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ConvAC:
        """Read what ``save`` wrote. Nothing in the file is executed.

        Raises:
            FileError: No such file, or something else.
        """
        return read_model(path, _METADATA, "classifier of ConvAC.save", _from_file)


def _from_file(about: Any, state: dict[str, Tensor]) -> ConvAC:
    network, dtype = Network.from_json(about), getattr(torch, about["dtype"])
    dtypes = {value.dtype for value in state.values()}
    if dtypes != {dtype}:
        raise ValueError(f"numbers of {sorted(map(str, dtypes))} in a file of {dtype}")
    nodes = network.tree.nodes
    shapes = {nodes[p]: network.shape(p) for p in network.weighted}
    shapes[nodes[-1]] = (*shapes[nodes[-1]], about["outputs"])
    largest = max(map(math.prod, shapes.values()))
    if largest > sum(value.numel() for value in state.values()):  # no room is made for it
        raise ValueError(f"a weight of {largest} entries by its sizes and bonds, fewer there")
    net = ConvNet.holding(
        network, {node: torch.zeros(shape, dtype=dtype) for node, shape in shapes.items()},
        outputs=about["outputs"], share=about["share"], scaled=about["scaled"], shape=about["image"],
    )  # fmt: skip
    representation = Representation(**about["representation"], dtype=dtype)
    model = ConvAC(representation, net, scores=about["scores"], temperature=about["temperature"])
    model.load_state_dict(state)
    return model


def is_classifier(path: Path) -> bool:
    """Return whether a file says that ``ConvAC.save`` wrote it; whether it is whole, ``load`` tells."""
    return _METADATA in metadata_of(path)
