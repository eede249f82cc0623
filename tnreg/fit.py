"""Full-batch training that records what is asked for along the way."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnreg.errors import OptionError, check_integer
from tnreg.optim import GroupRMSprop
from tnreg.trajectory import Trajectory

__all__ = ["fit"]

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
        progress: Show a progress bar with the loss.

    Returns:
        The trajectory. ``stop_reason`` is ``"steps"``, what ``stop`` said, ``"interrupted"`` after
        Ctrl-C (what was recorded is kept), or tells that the loss is not finite any more (looked at
        in every step on the CPU, at every row on other devices, where looking waits for the
        device).

    Raises:
        OptionError: Unknown optimizer, or numbers out of range.
    """
    steps = check_integer(steps, 0, "fit: steps")
    every = check_integer(every, 1, "fit: every")
    watched = dict(observe or {})
    if "loss" in watched:
        raise OptionError(
            "fit: the name 'loss' is taken by the training loss; call it something else."
        )
    for name, function in [*watched.items(), *([("stop", stop)] if stop is not None else [])]:
        if not callable(function):
            raise OptionError(f"fit: {name!r} must be a function, found {function!r}.")
    if not torch.is_grad_enabled():
        raise OptionError("fit: gradients are switched off here (torch.no_grad or inference_mode).")
    update = _optimizer(optimizer, model, lr)
    closed = _needs_closure(update)
    run = Trajectory()

    def evaluate() -> Tensor:
        update.zero_grad(set_to_none=True)
        value = loss(model)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with _progress_bar(steps, progress) as show:
        try:
            for step in range(steps + 1):
                due = step % every == 0 or step == steps
                value = loss(model) if due or not closed else None
                if step == 0:
                    _check_loss(value)
                if value is not None and (due or value.device.type == "cpu"):
                    found = float(value.detach())
                    if due:
                        with torch.no_grad():
                            row = {name: function(model) for name, function in watched.items()}
                        run.append(step, {"loss": found, **row})
                        show(step, found)
                    if not math.isfinite(found):
                        run.stop_reason = (
                            f"the loss became {found} at step {step} of {steps}; "
                            "try a smaller lr or smaller initial weights"
                        )
                        break
                    verdict = stop(run) if due and stop is not None else False
                    if verdict:
                        run.stop_reason = verdict if isinstance(verdict, str) else "stop"
                        break
                if step == steps:
                    run.stop_reason = "steps"
                elif closed:
                    update.step(evaluate)  # type: ignore[arg-type]
                else:
                    assert value is not None
                    update.zero_grad(set_to_none=True)
                    value.backward()  # type: ignore[no-untyped-call]
                    update.step()
        except KeyboardInterrupt:
            run.stop_reason = "interrupted"
    return run


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
            f"fit: optimizer must be a name or a torch.optim.Optimizer, found {chosen!r}."
        )
    if not isinstance(lr, int | float) or not (math.isfinite(lr) and lr >= 0):
        raise OptionError(f"fit: lr must be a finite number >= 0, found {lr!r}.")
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
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
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
    with Progress(*columns, auto_refresh=False, console=Console(stderr=True)) as bar:
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
