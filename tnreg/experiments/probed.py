"""Networks and images for ``tnreg probe``: from run folders, files and import paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tnreg import images
from tnreg.cnns.classifier import ConvAC, is_classifier
from tnreg.cnns.convnet import to_cnn
from tnreg.cnns.export import load_pt2
from tnreg.errors import FileError, OptionError, ShapeError, TnregError, blame
from tnreg.experiments.folder import read_about, reading
from tnreg.experiments.nets import BUILT_IN, as_input, build
from tnreg.factorizations.factorization import load
from tnreg.tensors.loading import load_tensor

Net = Callable[[Tensor], Tensor]


def network_of(
    source: str, channels: int, *, weights: Path | None = None, model: str | None = None, trust: bool = False
) -> Net:
    """Return a trained network to be probed.

    No code is run that a file brings along or names, unless ``trust`` or ``model`` says so.

    Args:
        source: A run folder of one training of ``locality``; a ``.pt2`` file of ``torch.export``; a
            ``.safetensors`` file of a classifier or a factorization; or what ``nets.build`` takes, then
            with ``weights``.
        channels: Channels of the images.
        weights: Its state dict as safetensors, or as a ``.pt`` file that holds tensors only.
        model: What ``nets.build`` takes, for a run folder whose network is none of those built in: its
            import path in the folder is only text.
        trust: Open a ``.pt2`` file: torch's reader runs expressions that such a file holds.

    Raises:
        FileError, OptionError: Nothing of that kind there, weights that do not fit, or code of others.
    """
    path = Path(source)
    if path.is_dir():
        return _of_run(path, channels, model)
    if path.suffix == ".pt2" and path.is_file():
        if not trust:
            raise OptionError(
                f"{path}: torch runs code that a .pt2 file brings along.\n"
                "  if you trust where it comes from, say so: --trust",
                argument="trust",
            )
        try:
            return load_pt2(path)
        except Exception as error:
            raise FileError(f"not a torch.export program: {path}\n  {error}") from None
    if path.suffix == ".safetensors" and path.is_file():
        return ConvAC.load(path) if is_classifier(path) else to_cnn(load(path))
    if path.suffix in (".pt2", ".safetensors"):
        raise FileError(f"no such model file: {path}")
    if weights is None:
        raise OptionError(
            f"{source}: a network by name has no trained weights; give --weights FILE.\n"
            "  or a run folder, a .pt2 file of torch.export, a .safetensors model of tnreg",
            argument="weights",
        )
    with blame("weights"):
        state = _read_state(weights)
    # as many logits as the last weight of the state says
    logits = [len(value) for value in state.values() if value.ndim >= 1] or [1]
    with blame("source"):
        net = build(source, channels, num_classes=logits[-1])
    with blame("weights"):
        return _load_state(net, state, weights)


def logits_at(where: str | None) -> Callable[[Any], Any]:
    """Return what takes the logits out of what a network gives: ``output`` of ``locality_profile``.

    Args:
        where: A key, an attribute, or a number in a tuple; if left out, a tensor is the logits itself, and
            of anything else its ``logits``. Penalties do not guess so: they would train what was guessed.

    Raises:
        OptionError: From the function, if there is nothing of that name; it says what there is.
    """

    def read(out: Any) -> Any:
        if isinstance(out, Tensor) and where is None:
            return out
        parts: dict[str, Any] = dict(vars(out)) if hasattr(out, "__dict__") else {}
        if isinstance(out, Sequence):
            parts |= {str(n): part for n, part in enumerate(out)}
            parts |= out._asdict() if hasattr(out, "_asdict") else {}
        elif isinstance(out, Mapping):
            parts = {str(key): part for key, part in out.items()}
        if (name := where or "logits") in parts:
            return parts[name]
        there = ", ".join(name for name in parts if not isinstance(out, Tensor)) or "nothing by name"
        raise OptionError(
            f"no {name!r} in the {type(out).__name__} that the network gives; there is {there}.\n"
            "  say where the logits are, e.g. --output logits or --output 0 for the first of a tuple",
            argument="output",
        )

    return read


def _of_run(folder: Path, channels: int, model: str | None) -> Net:
    with reading("a run folder of one training of locality", folder):
        about = read_about(folder)
        name = model or str(about["config"]["model"])
        if about["experiment"] != "locality_run":
            raise ValueError(f"a run of {about['experiment']!r}")
        inputs = about.get("inputs")
    if model is None and name not in BUILT_IN:
        raise OptionError(
            f"{folder}: its network is {name!r}, code outside of tnreg, which no file may start.\n"
            f"  if that is the code you mean, name it yourself: --model {name}",
            argument="model",
        )
    file = folder / "model.safetensors"
    net = _load_state(build(name, channels), _read_state(file), file)
    return net if inputs is None else _Standardized(net, **inputs)


class _Standardized(nn.Module):
    """A network of standardized images that takes images as they are."""

    def __init__(self, net: nn.Module, mean: list[float], deviation: list[float]) -> None:
        super().__init__()
        self.net = net
        self.mean = nn.Buffer(torch.tensor(mean).view(-1, 1, 1))
        self.deviation = nn.Buffer(torch.tensor(deviation).view(-1, 1, 1))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net((x - self.mean) / self.deviation))


def _read_state(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            raise ValueError(f"a {type(state).__name__}, not a dict of tensors")
    except FileNotFoundError:
        raise FileError(f"no such file of weights: {file}") from None
    except Exception as error:
        raise FileError(f"not a state dict: {file}\n  {type(error).__name__}: {error}") from None
    return state


def _load_state(net: nn.Module, state: dict[str, Tensor], file: Path) -> nn.Module:
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise FileError(f"{file} does not fit the network.\n  {error}") from None
    return net.eval()


@blame("data")
def images_of(data: str) -> Tensor:
    """Return images ``(N, C, H, W)`` of floats to probe with.

    They are an image set of ``tnreg.images`` (``.npz``), an array or tensor file ``(N, C, H, W)``, or
    ``digits`` or ``digits:DISTANCE`` for fresh pairs of digits.

    Raises:
        FileError, OptionError, ShapeError: No such file, or other than images.
    """
    if data == "digits" or data.startswith("digits:"):
        distance = data.partition(":")[2] or "24"
        if not distance.isdigit():
            raise OptionError(f"digits:DISTANCE needs a number of pixels, found {data!r}.")
        pairs = images.is_same_class(512, distance=int(distance), split="test")
        return torch.from_numpy(pairs.images)
    if data.endswith(".npz"):
        try:
            return as_input(torch.from_numpy(images.load(data).images))
        except TnregError:
            if not Path(data).is_file():
                raise
    values = load_tensor(data).values
    if values.ndim != 4:
        raise ShapeError(f"{data}: images are (N, C, H, W), found shape {tuple(values.shape)}.")
    return values.float()
