"""What a command is about: a tensor in memory or on disk, or a saved model, its tree, and the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tnreg import ModeTree, load, load_tensor, open_tensor
from tnreg.errors import OptionError
from tnreg.machine.files import metadata_of
from tnreg.machine.memory import limit_of
from tnreg.tensors.blocks import is_blocks
from tnreg.tensors.loading import is_large_file
from tnreg.trees.tree import read_tree


@dataclass(frozen=True)
class Subject:
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

    @property
    def numbers(self) -> int:
        """How many numbers hold it: weights of a model, entries of a tensor."""
        if self.tree is None:
            return sum(p.numel() for p in self.x.parameters())
        return math.prod(self.sizes)

    @property
    def on_disk(self) -> bool:
        """Whether it is read block by block."""
        return is_blocks(self.x)


def subject_of(
    file: str, tree: str | None, missing: str | None, memory: str | None, device: str
) -> Subject:
    """What a file or a name stands for.

    Args:
        file: As ``tnreg rank`` takes it.
        tree: Gallery name, JSON file or nested lists.
        missing: ``"nan"`` sets entries that are NaN to the mean of the others.
        memory: Checked here, as a tensor in memory does not use it.
        device: Where it goes.

    Raises:
        FileError, TreeError, OptionError: What is given cannot be used.
    """
    limit_of(memory, "--memory")
    place = device_of(device)
    if file.endswith(".safetensors") and "tnreg" in metadata_of(Path(file)):
        if missing is not None:
            raise OptionError(
                f"--missing is for tensors; {file} is a model, which has all entries."
            )
        model = load(file, device=place)
        if tree is None:
            return Subject(model, None, Path(file).stem)
        return Subject(model.to_tensor().detach(), read_tree(tree), Path(file).stem)
    if is_large_file(file):
        if missing is not None:
            raise OptionError(f"--missing is for tensors in memory; {file} is read block by block.")
        array = open_tensor(file)
        return Subject(array, _tree_over(tree, array.ndim), file)
    found = load_tensor(file)
    values = found.values.to(place)
    if missing == "nan":
        known = values[~torch.isnan(values)]
        values = torch.where(torch.isnan(values), known.mean(), values)
    elif found.missing:
        raise OptionError(
            f"{file} has {found.missing} missing entries (NaN); ranks need all of them.\n"
            "  --missing nan sets them to the mean of the others; or complete it first: tnreg fit"
        )
    return Subject(values, _tree_over(tree, values.ndim), found.name)


def device_of(name: str) -> torch.device:
    """The device of that name, if a tensor can be made there.

    Raises:
        OptionError: It cannot.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"cannot use the device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def _tree_over(tree: str | None, order: int) -> ModeTree:
    return ModeTree.binary(order) if tree is None else read_tree(tree)
