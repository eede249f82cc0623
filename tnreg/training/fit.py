"""Full-batch training that records what is asked for along the way."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnreg.errors import OptionError, check_integer
from tnreg.machine.progress import shown_progress
from tnreg.training.checkpoint import (
    RandomState,
    random_state,
    read_checkpoint,
    set_random_state,
    write_checkpoint,
)
from tnreg.training.cuda_graph import CapturedStep
from tnreg.training.optim import GroupRMSprop
from tnreg.training.trajectory import Trajectory

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "group-rmsprop": GroupRMSprop,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "lbfgs": torch.optim.LBFGS,
}


def fit(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    *,
    steps: int,
    optimizer: str | torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] = "group-rmsprop",
    lr: float = 1e-2,
    observe: Mapping[str, Callable[[Any], Any]] | None = None,
    every: int = 25,
    stop: Callable[[Trajectory], bool | str] | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    settings: Mapping[str, Any] | None = None,
    graph: bool = False,
) -> Trajectory:
    """Minimise ``loss(model)`` and record observations along the way.

    Rows are recorded before the first update, after every ``every`` updates, and at the end.

    Args:
        model: Any module; trained in place.
        loss: Called with the model, returns a real scalar, e.g. ``task.loss``.
        steps: Number of updates.
        optimizer: ``"group-rmsprop"`` (one step size for all parameters, the optimizer of the
            theory), ``"sgd"``, ``"adam"``, ``"lbfgs"``, a ``torch.optim.Optimizer`` that you made,
            or its class.
        lr: Learning rate, for all but a ready-made optimizer.
        observe: ``{name: f(model)}``; numbers, tensors, or dicts of them. The loss is always
            recorded.
        every: Updates between rows.
        stop: Called with the trajectory after each row; ends the training when it returns ``True``
            or a reason.
        progress: Show a progress bar with the loss, on a terminal or in a notebook.
        checkpoint: A file for the state of the training, written whole at a row every
            ``checkpoint_seconds`` and at the end. If it is there at the start, the training goes on
            from it and ends as one that was never interrupted, to the last bit on one machine; a
            finished one is returned as it was, or goes on if ``steps`` are more now (its last row draws
            random numbers of its own if ``observe`` does, or a loss with L-BFGS). Give a new
            model as before: the file holds its parameters, the optimizer, torch's random state and
            the trajectory, but not the loss and no generators of your own.
        checkpoint_seconds: Least time between two writings.
        settings: What identifies the training, e.g. its config; a checkpoint with other settings is
            refused.
        graph: On a CUDA device, record the whole step as a CUDA graph after three ordinary ones and
            replay it, so that no launches are paid and nothing waits between rows. The loss must not
            wait for the device (``.item()``) nor change its shapes, and an optimizer of torch's own
            needs ``capturable=True`` if it has that argument.

    Returns:
        The trajectory. ``stop_reason`` is ``"steps"``, what ``stop`` said, ``"interrupted"`` after
        Ctrl-C (what was recorded is kept), or tells that the loss is not finite any more (looked at
        in every step on the CPU, at every row on other devices, where looking waits for the
        device).

    Raises:
        OptionError: Unknown optimizer, numbers out of range, or the checkpoint of another training.
        FileError: The checkpoint cannot be read or written.
    """
    steps = check_integer(steps, 0, "fit: steps")
    every = check_integer(every, 1, "fit: every")
    watched = dict(observe or {})
    _check_functions(watched, stop)
    update = _optimizer(optimizer, model, lr)
    closed = _needs_closure(update)

    def evaluate() -> Tensor:
        update.zero_grad(set_to_none=True)
        value = loss(model)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    # an update that does not go on from a loss that was looked at
    own_step: Callable[[], Any] | None = partial(update.step, evaluate) if closed else None
    if graph:
        own_step = _captured(lambda: (evaluate(), update.step()), model, closed)
    saved = _Saved(checkpoint, checkpoint_seconds, model, update, {
        **(settings or {}), "optimizer": _described(update), "every": every,
        "observed": ["loss", *watched],
    })  # fmt: skip
    run = saved.read(steps)
    if run.stop_reason:
        return run
    first = int(run.steps[-1]) if len(run) else 0

    update.zero_grad(set_to_none=True)
    with _progress_bar(steps, progress) as show:
        record = _Record(run, saved, model, watched, stop, show, steps)
        try:
            for step in range(first, steps + 1):
                due = step % every == 0 or step == steps
                # a row that it goes on from need not be due any more
                looked_at = due or step == first
                if looked_at:
                    saved.before_row()
                # an ordinary update goes on from this very loss, other kinds evaluate their own
                value = loss(model) if looked_at or own_step is None else None
                if step == first:
                    _check_loss(value)
                if value is not None and (looked_at or value.device.type == "cpu"):
                    run.stop_reason = record.look(step, float(value.detach()), due)
                    if run.stop_reason:
                        break
                if step == steps:
                    run.stop_reason = "steps"
                elif own_step is not None:
                    value = None  # its graph would be the one that a captured step goes on from
                    own_step()
                else:
                    assert value is not None
                    value.backward()  # type: ignore[no-untyped-call]
                    update.step()
                    # memory that would still be held while the next loss is computed
                    value = None
                    update.zero_grad(set_to_none=True)
            saved.write(run, at_once=True)
        except KeyboardInterrupt:
            run.stop_reason = "interrupted"
    return run


class _Record:
    """Rows as they are due, and reasons to stop."""

    def __init__(
        self,
        run: Trajectory,
        saved: _Saved,
        model: nn.Module,
        watched: Mapping[str, Callable[[Any], Any]],
        stop: Callable[[Trajectory], bool | str] | None,
        show: Callable[[int, float], None],
        steps: int,
    ) -> None:
        self.run, self.saved, self.model, self.watched = run, saved, model, watched
        self.stop, self.show, self.steps = stop, show, steps
        self.resumed = len(run) > 0  # the row at which a training goes on is there already

    def look(self, step: int, found: float, due: bool) -> str:
        """The loss before an update; why to stop, or nothing."""
        resumed, self.resumed = self.resumed, False
        if resumed:
            self.saved.go_on(found, float(self.run.last("loss")[0]), step)
        elif due:
            with torch.no_grad():
                row = {name: function(self.model) for name, function in self.watched.items()}
            self.run.append(step, {"loss": found, **row})
            self.show(step, found)
        if not math.isfinite(found):
            return (
                f"the loss became {found} at step {step} of {self.steps}; "
                "try a smaller lr or smaller initial weights"
            )
        if not due or resumed:
            return ""
        verdict = self.stop(self.run) if self.stop is not None else False
        if verdict:
            return verdict if isinstance(verdict, str) else "stop"
        if step < self.steps:
            self.saved.write(self.run)
        return ""


class _Saved:
    """The checkpoint of one training; does nothing without a path."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        seconds: float,
        model: nn.Module,
        update: torch.optim.Optimizer,
        settings: Mapping[str, Any],
    ) -> None:
        self.path = None if path is None else Path(path)
        self.seconds, self.settings = seconds, settings
        self.model, self.update = model, update
        self.written = time.monotonic()
        self.before: RandomState = []
        self.after: RandomState = []

    def before_row(self) -> None:
        """At a row that was read the random state is put back; at others it is kept for the file."""
        if self.after:
            set_random_state(self.before)
        elif self.path is not None:
            self.before = random_state()

    def read(self, steps: int) -> Trajectory:
        if self.path is None or not self.path.exists():
            return Trajectory()
        run, self.before, self.after = read_checkpoint(
            self.path, self.model, self.update, self.settings
        )
        last = int(run.steps[-1])
        if last > steps:
            raise OptionError(
                f"fit: the checkpoint {self.path} is at step {last}, beyond steps={steps}.\n"
                f"  give steps >= {last}, or delete the file"
            )
        if run.stop_reason == "steps" and last < steps:
            run.stop_reason = ""
        return run

    def write(self, run: Trajectory, *, at_once: bool = False) -> None:
        if self.path is None or not (at_once or time.monotonic() - self.written >= self.seconds):
            return
        write_checkpoint(self.path, self.model, self.update, run, self.settings, self.before)
        self.written = time.monotonic()

    def go_on(self, found: float, recorded: float, step: int) -> None:
        """After the loss of a row that was read: is it the same one?"""
        set_random_state(self.after)
        self.after = []
        if not math.isclose(found, recorded, rel_tol=1e-3):
            raise OptionError(
                f"fit: the checkpoint {self.path} is of another training.\n"
                f"  loss recorded at step {step}: {recorded:.6g}\n"
                f"  loss found there now: {found:.6g}\n"
                "  other data, or another loss; delete the file, or choose another one"
            )


def _captured(step: Callable[[], Any], model: nn.Module, closed: bool) -> CapturedStep:
    device = next(model.parameters()).device
    if device.type != "cuda" or closed:
        what = "an optimizer that evaluates the loss itself" if closed else f"a model on {device}"
        raise OptionError(
            f"fit: graph=True needs a CUDA device and an ordinary optimizer, found {what}.\n"
            "  leave graph out"
        )
    return CapturedStep(step, device)


def _described(update: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's kind and numbers, as far as they can be compared."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in update.param_groups]
    return {"kind": type(update).__name__, "groups": groups}


def _check_functions(watched: Mapping[str, Any], stop: Any) -> None:
    if "loss" in watched:
        raise OptionError(
            "fit: the name 'loss' is taken by the training loss; call it something else."
        )
    for name, function in [*watched.items(), *([("stop", stop)] if stop is not None else [])]:
        if not callable(function):
            raise OptionError(f"fit: {name!r} must be a function, found {function!r}.")
    if not torch.is_grad_enabled():
        raise OptionError("fit: gradients are switched off here (torch.no_grad or inference_mode).")


def _check_loss(value: Any) -> None:
    if (
        isinstance(value, Tensor)
        and value.numel() == 1
        and value.is_floating_point()
        and value.requires_grad
    ):
        return
    found = type(value).__name__
    if isinstance(value, Tensor):
        found = (
            f"shape {tuple(value.shape)}, dtype {value.dtype}, requires_grad={value.requires_grad}"
        )
    raise OptionError(
        "fit: loss(model) must return a real scalar tensor that depends on the model's parameters.\n"
        f"  found: {found}"
    )


def _optimizer(chosen: Any, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if isinstance(chosen, torch.optim.Optimizer):
        return chosen
    if isinstance(chosen, str) and chosen not in _OPTIMIZERS:
        raise OptionError(
            f"fit: unknown optimizer {chosen!r}; write one of {', '.join(_OPTIMIZERS)}, "
            "or give a torch.optim.Optimizer."
        )
    make = _OPTIMIZERS[chosen] if isinstance(chosen, str) else chosen
    if not callable(make):
        raise OptionError(
            f"fit: optimizer must be a name or a torch.optim.Optimizer, found {chosen!r}.",
            argument="optimizer",
        )
    if not isinstance(lr, int | float) or not (math.isfinite(lr) and lr >= 0):
        raise OptionError(f"fit: lr must be a finite number >= 0, found {lr!r}.", argument="lr")
    made = make(model.parameters(), lr=lr)
    if not isinstance(made, torch.optim.Optimizer):
        raise OptionError(
            f"fit: optimizer gave a {type(made).__name__}, not a torch.optim.Optimizer."
        )
    return made


def _needs_closure(update: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(type(update).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


@contextlib.contextmanager
def _progress_bar(steps: int, wanted: bool) -> Iterator[Callable[[int, float], None]]:
    if not wanted:
        yield lambda step, loss: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("fit"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3g}"),
    )
    # drawn from here, not from a thread of its own that would compete with the training
    with shown_progress(*columns, auto_refresh=False) as bar:
        task = bar.add_task("fit", total=steps, loss=float("nan"))
        drawn = -1.0

        def show(step: int, loss: float) -> None:
            nonlocal drawn
            now = time.monotonic()
            bar.update(task, completed=step, loss=loss)
            if now - drawn > 0.2:
                bar.refresh()
                drawn = now

        yield show
        bar.refresh()
