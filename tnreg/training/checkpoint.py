"""The state of a training on disk, so that one that was killed goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tnreg.errors import FileError, OptionError
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.files import write_whole
from tnreg.training.tasks import Completion, Sensing
from tnreg.training.trajectory import Trajectory, key_text, plain

_FORMAT = "tnreg.checkpoint/2"

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


def state_bytes(state: Mapping[str, Any]) -> bytes:
    """Return a file for ``read_state_bytes``."""
    raw = io.BytesIO()  # on a full disk torch's own writer does not say what is wrong
    torch.save(state, raw)
    return raw.getvalue()


def save_whole(path: Path, data: bytes) -> None:
    """Write bytes, whole or not at all."""
    write_whole(path, lambda beside: beside.write_bytes(data))


def read_state_bytes(data: bytes) -> dict[str, Any]:
    """Return what ``state_bytes`` was given. Nothing in it is executed, and damage is an error."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        if (name := file.testzip()) is not None:  # torch does not look at the sums
            raise ValueError(f"damaged: {name} is not what was written")
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def for_json(value: Any) -> Any:
    """Return numbers and arrays of numpy and torch as JSON holds them, for ``json.dumps(default=)``."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        listed = value.tolist()
        if not isinstance(listed, np.generic | complex):
            return listed
        if isinstance(listed, np.floating):  # a long double has no other type in Python
            return float(listed)
    raise TypeError(f"{value!r} is no value for JSON")


@dataclass
class Checkpoint:
    """State of one training in a file: parameters, optimizer, random state and recorded rows.

    Without a path nothing is read or written. ``training`` and the user's ``settings`` must be the same when
    the training goes on; ``scheduler`` is one of torch's; ``seconds`` is the least time between two
    writings.
    """

    file: str | os.PathLike[str] | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Any = None
    seconds: float = 0.0
    before: RandomState = field(default_factory=list)  # before the last row's loss was computed
    after: RandomState = field(default_factory=list)  # after that row, if it was read and is next

    def __post_init__(self) -> None:
        self.path = None if self.file is None else Path(self.file)
        self.training, self.settings = _as_json(self.training), _as_json(self.settings)
        self.written = time.monotonic()

    def write(self, run: Trajectory, *, at_once: bool = False) -> None:
        """Write the state at the last row of ``run`` if it is time, whole or not at all."""
        if self.path is None or not (at_once or time.monotonic() - self.written >= self.seconds):
            return
        save_whole(self.path, self.encode(run))
        self.written = time.monotonic()

    def encode(self, run: Trajectory) -> bytes:
        """Return what a file holds.

        Raises:
            OptionError: It could not be read again.
        """
        data = state_bytes({
            "format": _FORMAT,
            "training": json.dumps(self.training),
            "settings": json.dumps(self.settings),
            "model": self.model.state_dict(),
            "optimizer": plain(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else plain(self.scheduler.state_dict()),
            "random": [self.before or random_state(), random_state()],
            "run": torch.frombuffer(bytearray(run.to_bytes()), dtype=torch.uint8),
        })  # fmt: skip
        try:
            again = self._decode(data)[1]
            there = again.form()
            for name, form in run.form().items():
                if there[name] != form or " at 0x" in str(form):  # another name in another process
                    raise ValueError(f"the observation {name!r} has other keys when it is read")
        except Exception as error:
            raise OptionError(
                f"fit: a checkpoint of this training could not be read again.\n  {_first_line(error)}\n"
                "  settings, the optimizer's and observations have plain numbers, names and keys of text,\n"
                "  numbers, tuples of them, or nodes of the model's tree",
                argument="checkpoint",
            ) from None
        return data

    def _decode(self, data: bytes) -> tuple[dict[str, Any], Trajectory]:
        state = read_state_bytes(data)
        if state["format"] != _FORMAT:
            raise ValueError(f"format {state['format']!r}, this version reads {_FORMAT!r}")
        nodes = {node for part in _factorizations(self.model) for node in part.tree.nodes}
        return state, Trajectory.from_bytes(state["run"].numpy().tobytes(), keys=nodes)

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
            state, run = self._decode(self.path.read_bytes())
            if not len(run):
                raise ValueError("its trajectory is empty")
            described = [dict(json.loads(state[name])) for name in ("training", "settings")]
            shapes = _shapes(state["model"])
            before, after = map(_check_random, state["random"])
        except Exception as error:
            raise no_checkpoint(self.path, error) from None
        self._check_training(described[0], described[1], shapes)
        last = int(run.steps[-1])
        if steps is not None and last > steps:
            message = f"fit: the checkpoint {self.path} is at step {last}, beyond steps={steps}."
            hint = f"give steps >= {last}, or delete the file"
            raise OptionError(f"{message}\n  {hint}", argument="steps")
        parts = [part for part in (self.model, self.optimizer, self.scheduler) if part is not None]
        ours = [copy.deepcopy(part.state_dict()) for part in parts]
        try:
            for name, part in zip(("model", "optimizer", "scheduler"), parts, strict=False):
                part.load_state_dict(state[name])
        except Exception as error:
            for part, old in zip(parts, ours, strict=True):
                part.load_state_dict(old)
            raise no_checkpoint(self.path, error) from None
        self.before, self.after = before, after
        if run.stop_reason == "steps" and steps is not None and last < steps:
            run.stop_reason = ""
        return run

    def _check_training(
        self, training: Mapping[str, Any], settings: Mapping[str, Any], shapes: Mapping[str, Any]
    ) -> None:
        """Raise an ``OptionError`` if the file is of other settings, another model or another task."""
        lines = [
            f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
            for there, now in ((settings, self.settings), (training, self.training))
            for key in {**there, **now}
            if json.dumps(there.get(key)) != json.dumps(now.get(key))  # NaN is the same as NaN
        ]
        other = "a training with other settings"
        if training.get("model") != self.training.get("model"):
            other = "another model"
        elif (now := _shapes(self.model.state_dict())) != shapes:
            other, lines = "another model", [*lines, f"there: {shapes}", f"now:   {now}"]
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
    return FileError(
        f"not a checkpoint: {path}\n  {_first_line(error)}\n  delete {path}, or choose another {instead}"
    )


def _check_random(state: Any) -> RandomState:
    """Return a random state if it is one; the CPU's is tried on a generator of its own."""
    if not isinstance(state, list) or not all(isinstance(s, Tensor) for s in state):
        raise ValueError("a random state that is no list of tensors")
    torch.Generator().set_state(state[0])
    return state


def describe_model(model: nn.Module) -> list[str]:
    """Return in words what a model is, with a digest of each factorization's tree and sizes."""
    described = [type(model).__qualname__]
    for part in _factorizations(model):
        net = part.network
        names = [key_text(node) for node in net.tree.nodes]
        whole = repr((net.tree.links, names, net.sizes, net.bonds, net.joins, net.root_ones, part.dtype))
        digest = hashlib.sha256(whole.encode()).hexdigest()
        described.append(f"{' '.join(repr(part).split())} {digest[:12]}")
    return described


def describe_task(loss: Any) -> str:
    """Return in words what ``task.loss`` trains on, with a digest of it; of another loss nothing is known."""
    task = getattr(loss, "__self__", None)
    if isinstance(task, Completion):
        parts: list[Tensor] = [task.index, task.values]
    elif isinstance(task, Sensing):
        parts = [*task.features, task.values]
    else:
        return ""
    digest = hashlib.sha256()
    for part in parts:
        host = part.detach().cpu().contiguous().reshape(-1)
        digest.update(host.view(torch.uint8).numpy().data)
    return f"{task!r} of {task.values.dtype}, {digest.hexdigest()[:12]}"


def _factorizations(model: nn.Module) -> list[Factorization]:
    return [part for part in model.modules() if isinstance(part, Factorization)]


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict as JSON returns it; other objects as their text, if that is the same another time."""

    def default(value: Any) -> Any:
        with contextlib.suppress(TypeError):
            return for_json(value)
        if " at 0x" in (text := str(value)):
            raise TypeError(f"{text} has another name in another process")
        return text

    try:
        copied: dict[str, Any] = json.loads(json.dumps(plain(dict(values)), default=default))
    except (TypeError, ValueError, RecursionError) as error:
        message = f"fit: settings must be a dict of values for JSON: {_first_line(error)}"
        raise OptionError(message, argument="settings") from None
    return copied


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _shapes(state: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{value.dtype} {tuple(value.shape)}"
        for name, value in state.items()
        if not name.endswith("_extra_state")  # of any kind
    }
