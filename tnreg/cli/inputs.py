"""What a command works on: a tensor in memory or on disk, or a saved model; its tree, and the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from tnreg import ModeTree, load, load_tensor, open_tensor
from tnreg.errors import OptionError
from tnreg.machine.files import metadata_of
from tnreg.machine.memory import limit_of
from tnreg.tensors.loading import is_large_file
from tnreg.trees.tree import read_tree


class Input(NamedTuple):
    """A tensor or a model.

    Attributes:
        x: A dense tensor, a Dask array, or a Factorization.
        tree: The tree; ``None`` for a model along its own.
        name: For titles.
    """

    x: Any
    tree: ModeTree | None
    name: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of every mode."""
        return tuple(self.x.sizes if self.tree is None else self.x.shape)


def read_input(
    file: str, tree: str | None, missing: str | None, memory: str | None, device: str
) -> Input:
    """Return the tensor or the model that a file or a name stands for.

    Args:
        file: As ``tnreg rank`` takes it.
        tree: Gallery name, JSON file or nested lists.
        missing: ``"nan"`` sets entries that are NaN to the mean of the others.
        memory: Only checked, since a tensor in memory does not use it.
        device: Where to load it.

    Raises:
        FileError, TreeError, OptionError: An argument cannot be used.
    """
    limit_of(memory, "--memory")
    place = check_device(device)
    along = None if tree is None else read_tree(tree)
    if file.endswith(".safetensors") and "tnreg" in metadata_of(Path(file)):
        if missing is not None:
            raise OptionError(
                f"--missing is for tensors; {file} is a model, which has all entries."
            )
        model = load(file, device=place)
        return Input(model if along is None else model.to_tensor().detach(), along, Path(file).stem)
    if is_large_file(file):
        if missing is not None:
            raise OptionError(f"--missing is for tensors in memory; {file} is read block by block.")
        array = open_tensor(file)
        return Input(array, along or ModeTree.binary(array.ndim), file)
    tensor = load_tensor(file)
    values = tensor.values.to(place)
    if missing == "nan":
        known = values[~torch.isnan(values)]
        values = torch.where(torch.isnan(values), known.mean(), values)
    elif tensor.missing:
        raise OptionError(
            f"{file} has {tensor.missing} missing entries (NaN); ranks need all of them.\n"
            "  --missing nan sets them to the mean of the others; or complete it first: tnreg fit"
        )
    return Input(values, along or ModeTree.binary(values.ndim), tensor.name)


def check_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        OptionError: No tensor can be made there.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"cannot use the device {name!r}: {reason}", argument="device") from None
    return device
