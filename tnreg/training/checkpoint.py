"""The state of a training on disk, so that one that was killed goes on as if nothing had happened."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnreg.errors import FileError, OptionError
from tnreg.machine.files import write_whole
from tnreg.training.trajectory import Trajectory

_FORMAT = "tnreg.checkpoint/1"

RandomState = list[torch.Tensor]


def random_state() -> RandomState:
    """Return the state of torch's generators, the CPU's first."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *cuda]


def set_random_state(state: RandomState) -> None:
    """Put back what ``random_state`` returned."""
    torch.set_rng_state(state[0])
    if len(state) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state[1:])


def save_whole(path: Path, state: Mapping[str, Any]) -> None:
    """Write a file for ``torch.load``, whole or not at all.

    It is put together in memory: on a full disk torch's own writer does not say what is wrong.
    """
    raw = io.BytesIO()
    torch.save(state, raw)
    write_whole(path, lambda beside: beside.write_bytes(raw.getbuffer()))


def write_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Trajectory,
    settings: Mapping[str, Any],
    before: RandomState,
) -> None:
    """Write parameters, optimizer state, random state and trajectory, whole or not at all.

    ``settings`` must be the same when the training goes on; ``before`` is the random state before the
    loss of the last row was computed.
    """
    save_whole(path, {
        "format": _FORMAT,
        "settings": json.dumps(settings, default=str),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": [before, random_state()],
        "run": torch.frombuffer(bytearray(run.to_bytes()), dtype=torch.uint8),
    })  # fmt: skip


def read_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> tuple[Trajectory, RandomState, RandomState]:
    """Put a checkpoint's state into the model and the optimizer.

    Nothing in the file is executed.

    Returns:
        The recorded rows, and the random states before the loss of the last row and after that row.

    Raises:
        FileError: Not a checkpoint; nothing was changed.
        OptionError: A checkpoint of another training; nothing was changed.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != _FORMAT:
            raise ValueError(f"format {state['format']!r}, this version reads {_FORMAT!r}")
        run = Trajectory.from_bytes(state["run"].numpy().tobytes())
        if not len(run):
            raise ValueError("its trajectory is empty")
        there, shapes_there = dict(json.loads(state["settings"])), _shapes(state["model"])
        before, after = map(_check_random, state["random"])
    except Exception as error:
        raise no_checkpoint(path, error) from None
    here, shapes = json.loads(json.dumps(settings, default=str)), _shapes(model.state_dict())
    differ = [
        f"  {key}: {there.get(key)!r} there, {here.get(key)!r} now"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]
    other = ""
    if differ:
        other = "\n".join([f"{path} is of a training with other settings.", *differ])
    elif shapes != shapes_there:
        other = f"{path} is of another model.\n  there: {shapes_there}\n  now:   {shapes}"
    if other:
        raise OptionError(
            f"{other}\n  delete {path}, or choose another file", argument="checkpoint"
        )
    old = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        model.load_state_dict(old[0])
        optimizer.load_state_dict(old[1])
        raise no_checkpoint(path, error) from None
    return run, before, after


def no_checkpoint(path: Path, error: Exception, instead: str = "file") -> FileError:
    """Return the error for a file that is no checkpoint; ``instead`` is what else may be chosen."""
    said = " ".join(str(error).splitlines()[:1])
    return FileError(
        f"not a checkpoint: {path}\n  {type(error).__name__}: {said}\n"
        f"  delete {path}, or choose another {instead}"
    )


def _check_random(state: Any) -> RandomState:
    """Return a random state if it is one; the CPU's is tried on a generator of its own."""
    if not isinstance(state, list) or not all(isinstance(s, torch.Tensor) for s in state):
        raise ValueError("a random state that is no list of tensors")
    torch.Generator().set_state(state[0])
    return state


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}
