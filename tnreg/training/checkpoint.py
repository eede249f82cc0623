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

_FORMAT = "tnreg.training.checkpoint/1"

RandomState = list[torch.Tensor]


def random_state() -> RandomState:
    """State of torch's generators, the CPU's first."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *cuda]


def set_random_state(state: RandomState) -> None:
    """Put back what ``random_state`` gave."""
    torch.set_rng_state(state[0])
    if len(state) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state[1:])


def save_whole(path: Path, held: Mapping[str, Any]) -> None:
    """``torch.save``, whole or not at all.

    It is put together in memory: on a full disk torch's own writer does not say what is wrong.
    """
    raw = io.BytesIO()
    torch.save(held, raw)
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

    Args:
        path: Replaced if it is there.
        model: The model at the step of the last row of ``run``.
        optimizer: Its optimizer.
        run: What was recorded.
        settings: What has to be the same when the training goes on; JSON can write it.
        before: Random state before the loss of that row was computed.
    """
    held = {
        "format": _FORMAT,
        "settings": json.dumps(settings, default=str),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": [before, random_state()],
        "run": torch.frombuffer(bytearray(run.to_bytes()), dtype=torch.uint8),
    }
    save_whole(path, held)


def read_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> tuple[Trajectory, RandomState, RandomState]:
    """Put a checkpoint's state into the model and the optimizer.

    Nothing in the file is executed.

    Returns:
        What was recorded, and the random states before the loss of the last row and after that row.

    Raises:
        FileError: Not a checkpoint; nothing was changed.
        OptionError: A checkpoint of another training; nothing was changed.
    """
    away = f"  delete {path}, or choose another file"
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        if held["format"] != _FORMAT:
            raise ValueError(f"format {held['format']!r}, this version reads {_FORMAT!r}")
        run = Trajectory.from_bytes(held["run"].numpy().tobytes())
        if not len(run):
            raise ValueError("its trajectory is empty")
        before = dict(json.loads(held["settings"]))
        there = _shapes(held["model"])
        random = [_checked(state) for state in held["random"]]
        if len(random) != 2:
            raise ValueError(f"{len(random)} random states, expected 2")
    except Exception as error:
        raise no_checkpoint(path, error) from None
    now = json.loads(json.dumps(settings, default=str))
    differ = [
        f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    if differ:
        lines = "\n".join(differ)
        raise OptionError(f"{path} is of a training with other settings.\n{lines}\n{away}")
    ours = _shapes(model.state_dict())
    if ours != there:
        raise OptionError(f"{path} is of another model.\n  there: {there}\n  now:   {ours}\n{away}")
    old = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    try:
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
    except Exception as error:
        model.load_state_dict(old[0])
        optimizer.load_state_dict(old[1])
        raise no_checkpoint(path, error) from None
    return run, random[0], random[1]


def no_checkpoint(path: Path, error: Exception, instead: str = "file") -> FileError:
    """Return the error for a file that is no checkpoint.

    Args:
        path: The file.
        error: Why it is none.
        instead: What else the user may choose.
    """
    said = " ".join(str(error).splitlines()[:1])
    return FileError(
        f"not a checkpoint: {path}\n  {type(error).__name__}: {said}\n"
        f"  delete {path}, or choose another {instead}"
    )


def _checked(state: Any) -> RandomState:
    """A random state, if it is one: the CPU's is tried on a generator of its own."""
    if not isinstance(state, list) or not all(isinstance(s, torch.Tensor) for s in state):
        raise ValueError("a random state that is no list of tensors")
    torch.Generator().set_state(state[0])
    return state


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}
