"""Full-batch training that records what is asked for along the way."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tnreg.errors import OptionError, check_integer, check_number
from tnreg.machine.progress import shown_progress
from tnreg.training.checkpoint import Checkpoint
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
            theory), ``"sgd"``, ``"adam"``, ``"lbfgs"``, a ``torch.optim.Optimizer``, or its class.
        lr: Learning rate; not used with an optimizer of your own.
        observe: ``{name: f(model)}``; numbers, tensors, or dicts of them.
        every: Updates between rows.
        stop: Called with the trajectory after each row; ends the training by ``True`` or a reason.
        progress: Show a progress bar with the loss, on a terminal or in a notebook.
        checkpoint: File for the state of the training, written whole at a row every
            ``checkpoint_seconds`` and at the end. If it exists at the start, the training resumes and
            ends as if it had never been interrupted, to the last bit on one machine. A finished
            training is returned as it was, or continues if ``steps`` are more now (its last row then
            draws random numbers of its own if ``observe`` does, or a loss with L-BFGS). Pass a new
            model as before: the file holds its parameters, the optimizer, torch's random state and
            the trajectory, but neither the loss nor generators of your own.
        checkpoint_seconds: Least time between two writings.
        settings: What identifies the training; a checkpoint with other settings is refused.
        graph: On a CUDA device, record the whole step as a CUDA graph after three ordinary ones and
            replay it: no launch costs, and no waiting between rows. The loss must not wait for the
            device (``.item()``) nor change its shapes, and an optimizer of torch's own needs
            ``capturable=True`` if it has that argument.

    Returns:
        The trajectory. Its ``stop_reason`` is ``"steps"``, what ``stop`` returned, ``"interrupted"``
        after Ctrl-C, or says that the loss is no longer finite (checked at every step on the CPU, at
        every row elsewhere, where reading the loss would wait for the device).

    Raises:
        OptionError: Unknown optimizer, numbers out of range, or the checkpoint of another training.
        FileError: The checkpoint cannot be read or written.
    """
    steps = check_integer(steps, 0, "fit: steps")
    every = check_integer(every, 1, "fit: every")
    watched = _check_functions(observe, stop)
    update = _make_optimizer(optimizer, model, lr)
    update_alone = _update_alone(model, loss, update, graph)
    identity = {**(settings or {}), "optimizer": _describe(update), "every": every}
    identity["observed"] = ["loss", *watched]
    saved = Checkpoint(checkpoint, model, update, identity, checkpoint_seconds)
    run = saved.read(steps)
    if run.stop_reason:
        return run
    last = int(run.steps[-1]) if len(run) else -1  # step of the last row that was read
    first = max(last, 0)

    def is_row(step: int) -> bool:  # a row to resume from need not be due any more
        return step % every == 0 or step in (first, steps)

    def record(step: int, value: float) -> str:
        """Add a row if there is one to add; return a reason to stop, or an empty string."""
        new = is_row(step) and step > last
        if new:
            with torch.no_grad():
                run.append(step, {"loss": value, **{name: f(model) for name, f in watched.items()}})
            show(step, value)
        if not math.isfinite(value):
            advice = "try a smaller lr or smaller initial weights"
            return f"the loss became {value} at step {step} of {steps}; {advice}"
        if new and stop is not None and (verdict := stop(run)):
            return verdict if isinstance(verdict, str) else "stop"
        if new and step < steps:
            saved.write(run)
        return "steps" if step == steps else ""

    update.zero_grad(set_to_none=True)
    with _progress_bar(steps, progress) as show:
        try:
            for step in range(first, steps + 1):
                value: Tensor | None = None
                if is_row(step):
                    value = saved.loss_at_row(lambda: _check_loss(loss(model)), run)
                elif update_alone is None:
                    value = loss(model)
                if value is not None and (is_row(step) or value.device.type == "cpu"):
                    run.stop_reason = record(step, float(value.detach()))
                    if run.stop_reason:
                        break
                if update_alone is not None:
                    value = None  # a captured step must not reuse its graph
                    update_alone()
                else:
                    assert value is not None
                    value.backward()  # type: ignore[no-untyped-call]
                    update.step()
                    value = None  # free memory before the next loss is computed
                    update.zero_grad(set_to_none=True)
            saved.write(run, at_once=True)
        except KeyboardInterrupt:
            run.stop_reason = "interrupted"
    return run


def _update_alone(
    model: nn.Module, loss: Callable[[Any], Tensor], update: torch.optim.Optimizer, graph: bool
) -> Callable[[], Any] | None:
    """Return an update that evaluates the loss itself; ``None`` if one goes on from a loss at hand."""

    def evaluate() -> Tensor:
        update.zero_grad(set_to_none=True)
        value = loss(model)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    closure = inspect.signature(type(update).step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    if graph:
        return _captured_step(lambda: (evaluate(), update.step()), model, needs_closure)
    return partial(update.step, evaluate) if needs_closure else None


def _describe(update: torch.optim.Optimizer) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "params"} for group in update.param_groups]
    return {"kind": type(update).__name__, "groups": groups}


def _captured_step(step: Callable[[], Any], model: nn.Module, needs_closure: bool) -> CapturedStep:
    device = next(model.parameters()).device
    if device.type != "cuda" or needs_closure:
        closed = "an optimizer that evaluates the loss itself"
        found = closed if needs_closure else f"a model on {device}"
        message = f"fit: graph=True needs a CUDA device and an ordinary optimizer, found {found}."
        raise OptionError(f"{message}\n  leave graph out", argument="graph")
    return CapturedStep(step, device)


def _check_functions(observe: Mapping[str, Any] | None, stop: Any) -> dict[str, Any]:
    """Return a copy of ``observe``."""
    watched = dict(observe or {})
    if "loss" in watched:
        message = "fit: the name 'loss' is taken by the training loss; call it something else."
        raise OptionError(message, argument="observe")
    for name, function in [*watched.items(), *([("stop", stop)] if stop is not None else [])]:
        if not callable(function):
            message = f"fit: {name!r} must be a function, found {function!r}."
            raise OptionError(message, argument="observe" if name in watched else "stop")
    if not torch.is_grad_enabled():
        raise OptionError("fit: gradients are switched off here (torch.no_grad or inference_mode).")
    return watched


def _check_loss(value: Any) -> Tensor:
    found = type(value).__name__
    if isinstance(value, Tensor):
        if value.numel() == 1 and value.is_floating_point() and value.requires_grad:
            return value
        grad = value.requires_grad
        found = f"shape {tuple(value.shape)}, dtype {value.dtype}, requires_grad={grad}"
    message = "fit: loss(model) must return a real scalar tensor that depends on the model's parameters."
    raise OptionError(f"{message}\n  found: {found}", argument="loss")


def _make_optimizer(chosen: Any, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if isinstance(chosen, torch.optim.Optimizer):
        return chosen
    make = _OPTIMIZERS.get(chosen) if isinstance(chosen, str) else chosen
    if not callable(make):
        message = f"optimizer must be a name or a torch.optim.Optimizer, found {chosen!r}."
        if isinstance(chosen, str):
            names = ", ".join(_OPTIMIZERS)
            message = f"unknown optimizer {chosen!r}; write one of {names}, or give a torch.optim.Optimizer."
        raise OptionError(f"fit: {message}", argument="optimizer")
    update = make(model.parameters(), lr=check_number(lr, "fit: lr", 0))
    if not isinstance(update, torch.optim.Optimizer):
        message = f"fit: optimizer gave a {type(update).__name__}, not a torch.optim.Optimizer."
        raise OptionError(message, argument="optimizer")
    return update


@contextlib.contextmanager
def _progress_bar(steps: int, wanted: bool) -> Iterator[Callable[[int, float], None]]:
    if not wanted:
        yield lambda step, loss: None
        return
    from rich import progress

    columns = (
        "fit", progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn(),
        "left", progress.TimeRemainingColumn(), "loss {task.fields[loss]:.3g}",
    )  # fmt: skip
    # drawn from here, not from a thread of its own that would compete with the training
    with shown_progress(*columns, auto_refresh=False) as bar:
        task, drawn = bar.add_task("fit", total=steps, loss=math.nan), -1.0

        def show(step: int, loss: float) -> None:
            nonlocal drawn
            bar.update(task, completed=step, loss=loss)
            if (now := time.monotonic()) - drawn > 0.2:
                bar.refresh()
                drawn = now

        yield show
        bar.refresh()
