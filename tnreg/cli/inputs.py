"""What ``rank`` and ``decompose`` work on: a tensor in memory or on disk, or a saved model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch

from tnreg import ModeTree, load, load_tensor, open_tensor
from tnreg.errors import OptionError
from tnreg.machine.files import metadata_of
from tnreg.machine.memory import limit_of
from tnreg.tensors.loading import is_large_file
from tnreg.trees.tree import read_tree


@dataclass(frozen=True)
class InputOptions:
    """Options on how a tensor or a model is read.

    Attributes:
        tree: Gallery name, JSON file or nested lists; if left out, a binary tree, or a model's own.
        missing: "nan": entries that are NaN were not measured; they are set to the mean of the others here.
        memory: What arrays may take while a file is read block by block, e.g. 2GiB; if left out, a quarter
            of what is available.
        device: Any torch device, e.g. cuda.
    """

    tree: str | None = None
    missing: Literal["nan"] | None = None
    memory: str | None = None
    device: str = "cpu"


DEFAULTS = InputOptions()


class Input(NamedTuple):
    """A dense tensor, a Dask array or a ``Factorization``, its name in titles and labels of named modes."""

    x: Any
    tree: ModeTree | None  # None for a model along its own
    name: str
    labels: Mapping[Any, str] = MappingProxyType({})

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of every mode."""
        return tuple(self.x.sizes if self.tree is None else self.x.shape)


def read_input(file: str, options: InputOptions) -> Input:
    """Return the tensor or the model that a file or a name stands for."""
    limit_of(options.memory, "--memory")  # a tensor in memory does not use it
    device = check_device(options.device)
    tree = None if options.tree is None else read_tree(options.tree)
    if options.missing is not None and (is_model(file) or is_large_file(file)):
        kind = "a model, which has all entries" if is_model(file) else "read block by block"
        raise OptionError(f"--missing is for tensors in memory; {file} is {kind}.")
    if is_model(file):
        model = load(file, device=device)
        return Input(model if tree is None else model.to_tensor().detach(), tree, Path(file).stem)
    if is_large_file(file):
        array = open_tensor(file)
        return Input(array, tree or ModeTree.binary(array.ndim), file)
    tensor = load_tensor(file)
    values = tensor.values.to(device)
    if options.missing == "nan":
        unknown = torch.isnan(values)
        values = torch.where(unknown, values[~unknown].mean(), values)
    elif tensor.missing:
        raise OptionError(
            f"{file} has {tensor.missing} missing entries (NaN); ranks need all of them.\n"
            "  --missing nan sets them to the mean of the others; or complete it first: tnreg complete"
        )
    labels = {m: f"{m} {name}" for m, name in enumerate(tensor.modes) if name != f"mode {m}"}
    return Input(values, tree or ModeTree.binary(values.ndim), tensor.name, labels)


def is_model(file: str) -> bool:
    """Return whether a file is a model that tnreg saved."""
    return file.endswith(".safetensors") and "tnreg" in metadata_of(Path(file))


def check_device(name: str) -> torch.device:
    """Return the device of that name; ``OptionError`` if no tensor can be made there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"cannot use the device {name!r}: {reason}", argument="device") from None
    return device
