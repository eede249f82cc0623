"""The state of a training on disk, so that one that was killed goes on as if nothing had happened."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnreg.errors import FileError, OptionError
from tnreg.machine.files import write_whole
from tnreg.training.trajectory import Trajectory

_FORMAT = "tnreg.checkpoint/1"

RandomState = list[Tensor]


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
    """Write a file for ``torch.load``, whole or not at all."""
    raw = io.BytesIO()  # on a full disk torch's own writer does not say what is wrong
    torch.save(state, raw)
    write_whole(path, lambda beside: beside.write_bytes(raw.getbuffer()))


@dataclass
class Checkpoint:
    """State of one training in a file: parameters, optimizer, random state and recorded rows.

    Without a path nothing is read or written; ``settings`` must be the same when the training goes on;
    ``seconds`` is the least time between two writings.
    """

    file: str | os.PathLike[str] | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: Mapping[str, Any]
    seconds: float = 0.0
    before: RandomState = field(default_factory=list)  # before the last row's loss was computed
    after: RandomState = field(default_factory=list)  # after that row, if it was read and is next

    def __post_init__(self) -> None:
        self.path = None if self.file is None else Path(self.file)
        self.settings = json.loads(json.dumps(self.settings, default=str))
        self.written = time.monotonic()

    def write(self, run: Trajectory, *, at_once: bool = False) -> None:
        """Write the state at the last row of ``run`` if it is time, whole or not at all."""
        if self.path is None or not (at_once or time.monotonic() - self.written >= self.seconds):
            return
        save_whole(self.path, {
            "format": _FORMAT,
            "settings": json.dumps(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": [self.before or random_state(), random_state()],
            "run": torch.frombuffer(bytearray(run.to_bytes()), dtype=torch.uint8),
        })  # fmt: skip
        self.written = time.monotonic()

    def read(self, steps: int | None = None) -> Trajectory:
        """Put the state into the model and the optimizer, and return the recorded rows.

        There are none without a file. Nothing in it is executed. ``steps`` is how many there will be
        now; a training that ended at fewer goes on.

        Raises:
            FileError: Not a checkpoint; nothing was changed.
            OptionError: A checkpoint of another training, or of more steps; nothing was changed.
        """
        if self.path is None or not self.path.exists():
            return Trajectory()
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if state["format"] != _FORMAT:
                raise ValueError(f"format {state['format']!r}, this version reads {_FORMAT!r}")
            run = Trajectory.from_bytes(state["run"].numpy().tobytes())
            if not len(run):
                raise ValueError("its trajectory is empty")
            settings, shapes = dict(json.loads(state["settings"])), _shapes(state["model"])
            before, after = map(_check_random, state["random"])
        except Exception as error:
            raise no_checkpoint(self.path, error) from None
        self._check_training(settings, shapes)
        last = int(run.steps[-1])
        if steps is not None and last > steps:
            message = f"fit: the checkpoint {self.path} is at step {last}, beyond steps={steps}."
            hint = f"give steps >= {last}, or delete the file"
            raise OptionError(f"{message}\n  {hint}", argument="steps")
        ours = copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict())
        try:
            self._load(state["model"], state["optimizer"])
        except Exception as error:
            self._load(*ours)
            raise no_checkpoint(self.path, error) from None
        self.before, self.after = before, after
        if run.stop_reason == "steps" and steps is not None and last < steps:
            run.stop_reason = ""
        return run

    def _load(self, model: Mapping[str, Any], optimizer: dict[str, Any]) -> None:
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    def _check_training(self, settings: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
        """Raise an ``OptionError`` if the file has other settings or another model."""
        now, other = _shapes(self.model.state_dict()), "a training with other settings"
        lines = [
            f"{key}: {settings.get(key)!r} there, {self.settings.get(key)!r} now"
            for key in {**settings, **self.settings}
            if settings.get(key) != self.settings.get(key)
        ]
        if not lines and now != shapes:
            other, lines = "another model", [f"there: {shapes}", f"now:   {now}"]
        if lines:
            first, end = (f"{self.path} is of {other}.", f"delete {self.path}, or choose another file")
            raise OptionError("\n  ".join([first, *lines, end]), argument="checkpoint")

    def loss_at_row(self, loss: Callable[[], Tensor], run: Trajectory) -> Tensor:
        """Return the loss; at the row that was read, check it and give it that row's random numbers."""
        if not self.after:
            self.before = random_state() if self.path is not None else []
            return loss()
        set_random_state(self.before)
        value = loss()
        set_random_state(self.after)
        self.after = []
        now, recorded = float(value.detach()), float(run.last("loss")[0])
        if not math.isclose(now, recorded, rel_tol=1e-3):
            raise OptionError(
                f"fit: the checkpoint {self.path} is of another training.\n"
                f"  loss recorded at step {run.steps[-1]}: {recorded:.6g}\n"
                f"  loss found there now: {now:.6g}\n"
                "  other data, or another loss; delete the file, or choose another one",
                argument="checkpoint",
            )
        return value


def no_checkpoint(path: Path, error: Exception, instead: str = "file") -> FileError:
    """Return the error for a file that is no checkpoint; ``instead`` is what else to choose."""
    said = " ".join(str(error).splitlines()[:1])
    return FileError(
        f"not a checkpoint: {path}\n  {type(error).__name__}: {said}\n"
        f"  delete {path}, or choose another {instead}"
    )


def _check_random(state: Any) -> RandomState:
    """Return a random state if it is one; the CPU's is tried on a generator of its own."""
    if not isinstance(state, list) or not all(isinstance(s, Tensor) for s in state):
        raise ValueError("a random state that is no list of tensors")
    torch.Generator().set_state(state[0])
    return state


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}
