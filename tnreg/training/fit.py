"""Full-batch training that records what is asked for along the way."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tnreg.errors import OptionError, check_integer, check_number
from tnreg.machine.progress import shown_progress
from tnreg.training.checkpoint import Checkpoint, describe_model, describe_task
from tnreg.training.cuda_graph import CapturedStep
from tnreg.training.gauss_newton import GaussNewton
from tnreg.training.optim import GroupRMSprop
from tnreg.training.tasks import Completion, Sensing
from tnreg.training.trajectory import Trajectory, plain

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "group-rmsprop": GroupRMSprop,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "lbfgs": torch.optim.LBFGS,
}
_NAMES = (*_OPTIMIZERS, "gauss-newton")


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
    scheduler: Any = None,
    each_step: Callable[[int, Any, Tensor], Any] | None = None,
    task: Completion | Sensing | None = None,
) -> Trajectory:
    """Minimise ``loss(model)`` and record observations along the way.

    Rows are recorded before the first update, after every ``every`` updates, and at the end.

    An update of ``"gauss-newton"`` is a step of Levenberg-Marquardt in all weights of a ``Factorization``,
    for the squares of a completion or sensing task. It fits in tens of updates, to the last digits of the
    dtype, what gradients approach in thousands. Each costs up to 25 gradients and derivatives, and as many
    again for every trial that it takes back (up to 12); with at most 450 weights it solves their equations
    directly. Weights that predict next to nothing are scaled up first; from zero there is no way. The gauge
    of the weights stays, and frozen ones as well; the unit of the data does not matter. It does not follow
    the gradient flow of the theory, and takes neither ``graph`` nor ``scheduler``.

    ``"group-rmsprop"`` and ``"sgd"`` follow that flow; ``"adam"`` does not find the low rank that it has,
    and ``"lbfgs"`` may stay where it starts, at the saddle near zero (figures in docs/dynamics.md).

    Args:
        model: Any module; trained in place.
        loss: Called with the model, returns a real scalar, e.g. ``task.loss``.
        steps: Number of updates.
        optimizer: ``"group-rmsprop"`` (one step size for all parameters, the optimizer of the
            theory), ``"sgd"``, ``"adam"``, ``"lbfgs"``, ``"gauss-newton"``, a ``torch.optim.Optimizer``, or
            its class.
        lr: Learning rate; not used with an optimizer of your own, nor by ``"gauss-newton"``.
        observe: ``{name: f(model)}``; numbers, tensors, or dicts of them.
        every: Updates between rows.
        stop: Called with the trajectory after each row; ends the training by ``True`` or a reason.
        progress: Show a progress bar with the loss, on a terminal or in a notebook.
        checkpoint: File for the state of the training, written whole at a row every
            ``checkpoint_seconds`` and at the end. If it exists at the start, the training resumes and
            ends as if it had never been interrupted, to the last bit on one machine. A finished
            training is returned as it was, or continues if ``steps`` are more now (its last row then
            draws random numbers of its own if ``observe`` does, or a loss with L-BFGS). Pass a new
            model as before: the file holds its parameters, the optimizer, the scheduler, torch's
            random state and the trajectory, but neither the loss nor generators of your own. It
            also names tree, sizes, joins and type of a factorization, and the data of a task whose
            ``loss`` is given as it is: with another model or task it is refused, as are damaged
            files and those of earlier versions.
        checkpoint_seconds: Least time between two writings.
        settings: What identifies the training; a checkpoint with other settings is refused.
        graph: On a CUDA device, record the whole step as a CUDA graph after three ordinary ones and
            replay it: no launch costs, and no waiting between rows. The loss must not wait for the
            device (``.item()``) nor change its shapes, and an optimizer of torch's own needs
            ``capturable=True`` if it has that argument. Not with ``scheduler`` or ``each_step``.
        scheduler: A learning rate scheduler of torch, or a function that makes one for the optimizer:
            ``lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1000)``. It steps after each
            update; one that follows a metric is given the loss before the update.
        each_step: ``f(step, model, loss)``, called after each update with the number of updates done;
            ``loss`` is a tensor, the loss before that update, whose gradients are still there.
        task: What ``"gauss-newton"`` trains on; of a loss that is given as ``task.loss`` it is known.

    Returns:
        The trajectory. Its ``stop_reason`` is ``"steps"``, what ``stop`` returned, ``"interrupted"``
        after Ctrl-C, ``"converged"`` where no step of ``"gauss-newton"`` lowers the loss any more, or says
        that the loss is no longer finite (checked at every step on the CPU, at every row elsewhere, where
        reading the loss would wait for the device). There is no row for such a loss, and nothing is
        observed there.

    Raises:
        OptionError: Unknown optimizer, numbers out of range, the checkpoint of another training, or one
            that could not be read again (said before the first update).
        FileError: The checkpoint cannot be read or written.
        Exception: What the loss or a function of yours raises; rows so far are its ``trajectory``.
    """
    steps = check_integer(steps, 0, "fit: steps")
    every = check_integer(every, 1, "fit: every")
    watched = check_functions("fit", model, observe, stop=stop, each_step=each_step)
    made = _gauss_newton(model, loss, task) if optimizer == "gauss-newton" else optimizer
    update = _make_optimizer(made, model, lr)
    if isinstance(update, GaussNewton) and (graph or scheduler is not None):
        message = "fit: optimizer='gauss-newton' has no learning rate to change and no step to repeat."
        argument = "graph" if graph else "scheduler"
        raise OptionError(f"{message}\n  leave out graph and scheduler", argument=argument)
    schedule = _make_scheduler(scheduler, update)
    for group in update.param_groups:  # numpy's numbers compute in their own precision until they are saved
        group.update(plain(group))
    if graph and not (schedule is None and each_step is None):
        message = "fit: graph=True repeats a step as recorded; leave out scheduler and each_step."
        raise OptionError(message, argument="graph")
    update_alone = _update_alone(model, loss, update, graph)
    training: dict[str, Any] = {}
    if checkpoint is not None:
        training = {"model": describe_model(model), "task": describe_task(loss), "every": every}
        training |= {"optimizer": _describe(update), "observed": ["loss", *watched]}
        training["scheduler"] = schedule and [type(schedule).__name__, schedule.state_dict()]
    saved = Checkpoint(checkpoint, model, update, settings or {}, training, schedule, checkpoint_seconds)
    run = saved.read(steps)
    if run.stop_reason:
        return run
    with _progress_bar(steps, progress) as show:
        try:
            loop = _Loop(
                model, loss, update, update_alone, schedule, each_step, watched, stop, saved, run, show
            )
            loop.go(steps, every)
        except KeyboardInterrupt:
            run.stop_reason = "interrupted"
        except Exception as error:
            error.trajectory = run  # type: ignore[attr-defined]
            error.add_note(f"its attribute 'trajectory' has the {len(run)} rows recorded before")
            raise
    return run


@dataclass
class _Loop:
    """A training that begins, or goes on from the last row of ``run``."""

    model: nn.Module
    loss: Callable[[Any], Tensor]
    update: torch.optim.Optimizer
    update_alone: Callable[[], Tensor | None] | None
    schedule: Any
    each_step: Callable[[int, Any, Any], Any] | None
    watched: Mapping[str, Callable[[Any], Any]]
    stop: Callable[[Trajectory], bool | str] | None
    saved: Checkpoint
    run: Trajectory
    show: Callable[[int, float], None]

    def go(self, steps: int, every: int) -> None:
        """Train to the end or to a reason to stop, and write the last state."""
        last = int(self.run.steps[-1]) if len(self.run) else -1  # step of the last row that was read
        first = max(last, 0)
        self.update.zero_grad(set_to_none=True)
        for step in range(first, steps + 1):
            # a row to resume from need not be due any more
            is_row = step % every == 0 or step in (first, steps) or self._converged
            value: Tensor | None = None
            if is_row:
                value = self.saved.loss_at_row(lambda: check_loss("fit", self.loss(self.model)), self.run)
            elif self.update_alone is None:
                value = self.loss(self.model)
            if value is not None and (is_row or value.device.type == "cpu"):
                self.run.stop_reason = self._look(step, steps, float(value.detach()), is_row and step > last)
            if self.run.stop_reason:
                break
            if self.update_alone is None:
                assert value is not None
                value.backward()  # type: ignore[no-untyped-call]
                self.update.step()
                value = value.detach()  # free memory before the next loss is computed
            else:
                value = None  # a captured step must not reuse its graph
                value = self.update_alone()
            self._follow(step + 1, value)
        if len(self.run):
            self.saved.write(self.run, at_once=True)

    def _look(self, step: int, steps: int, value: float, new: bool) -> str:
        """Add a row if it is ``new``; return a reason to stop, or an empty string."""
        if not math.isfinite(value):
            advice = "try a smaller lr or smaller initial weights"
            return f"the loss became {value} at step {step} of {steps}; {advice}"
        if new:
            with torch.no_grad():
                seen = {name: function(self.model) for name, function in self.watched.items()}
            self.run.append(step, {"loss": value, **seen})
            self.show(step, value)
            if len(self.run) == 1 and self.saved.path is not None:
                self.saved.encode(self.run)  # what cannot be read again is refused now
            if self.stop is not None and (verdict := self.stop(self.run)):
                return verdict if isinstance(verdict, str) else "stop"
            if step < steps:
                self.saved.write(self.run)
        return "converged" if self._converged else "steps" if step == steps else ""

    @property
    def _converged(self) -> bool:
        return isinstance(self.update, GaussNewton) and self.update.converged

    def _follow(self, step: int, value: Tensor | None) -> None:
        """Do what follows an update from this loss."""
        value = value.detach() if isinstance(value, Tensor) else value
        if self.schedule is not None:
            self.schedule.step(*[value] * _follows_a_metric(self.schedule))
        if self.each_step is not None:
            with torch.no_grad():
                self.each_step(step, self.model, value)
        if self.update_alone is None:
            self.update.zero_grad(set_to_none=True)


def _update_alone(
    model: nn.Module, loss: Callable[[Any], Tensor], update: torch.optim.Optimizer, graph: bool
) -> Callable[[], Any] | None:
    """Return an update that evaluates the loss itself; ``None`` if one goes on from a loss at hand.

    It returns the loss unless it is a recorded one.
    """

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


def check_functions(
    who: str, model: nn.Module, observe: Mapping[str, Any] | None, **called: Any
) -> dict[str, Any]:
    """Return a copy of ``observe``, of functions as all that is called."""
    watched = dict(observe or {})
    if "loss" in watched:
        message = f"{who}: the name 'loss' is taken by the training loss; call it something else."
        raise OptionError(message, argument="observe")
    others = [(name, function) for name, function in called.items() if function is not None]
    for name, function in [*watched.items(), *others]:
        if not callable(function):
            message = f"{who}: {name!r} must be a function, found {function!r}."
            raise OptionError(message, argument="observe" if name in watched else name)
    if not torch.is_grad_enabled():
        raise OptionError(f"{who}: gradients are switched off here (torch.no_grad or inference_mode).")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise OptionError(f"{who}: the model was made under torch.inference_mode; make it outside.")
    return watched


def check_loss(who: str, value: Any) -> Tensor:
    """Return what a loss returned if it can be minimised."""
    found = type(value).__name__
    if isinstance(value, Tensor):
        if value.numel() == 1 and value.is_floating_point() and value.requires_grad:
            return value
        grad = value.requires_grad
        found = f"shape {tuple(value.shape)}, dtype {value.dtype}, requires_grad={grad}"
    message = f"{who}: loss(model) must return a real scalar tensor that depends on the model's parameters."
    raise OptionError(f"{message}\n  found: {found}", argument="loss")


def _make_optimizer(chosen: Any, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if isinstance(chosen, torch.optim.Optimizer):
        return chosen
    make = _OPTIMIZERS.get(chosen) if isinstance(chosen, str) else chosen
    if not callable(make):
        message = f"optimizer must be a name or a torch.optim.Optimizer, found {chosen!r}."
        if isinstance(chosen, str):
            names = ", ".join(_NAMES)
            message = f"unknown optimizer {chosen!r}; write one of {names}, or give a torch.optim.Optimizer."
        raise OptionError(f"fit: {message}", argument="optimizer")
    update = make(model.parameters(), lr=check_number(lr, "fit: lr", 0))
    if not isinstance(update, torch.optim.Optimizer):
        message = f"fit: optimizer gave a {type(update).__name__}, not a torch.optim.Optimizer."
        raise OptionError(message, argument="optimizer")
    return update


def _gauss_newton(model: nn.Module, loss: Callable[[Any], Tensor], task: Any) -> GaussNewton:
    task = getattr(loss, "__self__", None) if task is None else task
    made = GaussNewton(model, task)
    if loss != task.loss:
        with torch.no_grad():
            found, own = float(loss(model)), float(task.loss(model))
        if abs(found - own) > 1e-3 * own:
            message = "fit: optimizer='gauss-newton' lowers task.loss, and the loss given is another one:"
            hint = "give task.loss, or take another optimizer, e.g. 'adam'"
            raise OptionError(f"{message} {found:.6g}, not {own:.6g}.\n  {hint}", argument="loss")
    return made


def _make_scheduler(chosen: Any, update: torch.optim.Optimizer) -> Any:
    made = chosen(update) if callable(chosen) else chosen
    methods = ("step", "state_dict", "load_state_dict")
    if made is not None and not all(callable(getattr(made, name, None)) for name in methods):
        message = f"fit: scheduler must be one of torch.optim.lr_scheduler, found {made!r}."
        raise OptionError(message, argument="scheduler")
    if getattr(made, "optimizer", update) is not update:
        message = "fit: the scheduler is of another optimizer; give scheduler=lambda optimizer: ..."
        raise OptionError(message, argument="scheduler")
    if made is not None:
        made.load_state_dict(plain(made.state_dict()))
    return made


def _follows_a_metric(scheduler: Any) -> bool:
    parameters = list(inspect.signature(scheduler.step).parameters.values())
    return any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


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
