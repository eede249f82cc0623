"""Steps of Levenberg-Marquardt as an optimizer of torch: what ``fit`` calls "gauss-newton"."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tnreg.errors import OptionError
from tnreg.factorizations.factorization import Factorization
from tnreg.factorizations.stacks import Stacks
from tnreg.tensors.arrays import times_power_of_two, without_autocast
from tnreg.training.solver import LevenbergMarquardt, Samples, Weights, to_weights
from tnreg.training.tasks import Completion, Sensing, root_mean_square


class GaussNewton(torch.optim.Optimizer):
    """A step of Levenberg-Marquardt at a time in all weights of a factorization, in place.

    Gradients are not read. Weights keep their gauge, and frozen ones their values. All state is the damping,
    an option of the only group. ``converged`` says that the last step found nothing better.

    Args:
        model: A factorization with parameters of its own.
        task: What it is trained on.

    Raises:
        OptionError: A wrapper or another module, weights that are computed from others, no task, or a
            complex one for a real model.
    """

    def __init__(self, model: nn.Module, task: Any) -> None:
        self._model, self._task = _check_model(model), _check_task(task)
        if task.values.is_complex() and not self._model.dtype.is_complex:
            message = f"fit: optimizer='gauss-newton': the task is complex and the model of {model.dtype}."
            raise OptionError(message, argument="model")
        super().__init__(model.parameters(), {"damping": 1e-2})
        self.converged = False
        self._solver: LevenbergMarquardt | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step and return the loss of the closure."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        model, group = self._model, self.param_groups[0]
        solver = self._solver = self._solver or self._prepare()
        solver.damping = group["damping"]
        with without_autocast(model.device):
            weights, before, after = solver.step(self._scaled(to_weights(model), -1), gauge=False)
        if after < before:
            pairs = zip(model.network.weighted, self._scaled(weights, 1), strict=False)
            shape, slots = model.network.shape, model.network.slots
            self._stacks.write({slots[i]: w.reshape(shape(i)).to(model.dtype) for i, w in pairs})
        group["damping"] = solver.damping
        self.converged = after >= before and solver.damping > 1e12
        return loss

    @property
    def _stacks(self) -> Stacks:
        stacks = self._model.stacks
        assert isinstance(stacks, Stacks)
        return stacks

    def _prepare(self) -> LevenbergMarquardt:
        """Take the data on a scale near 1, in single precision at least, and see what is frozen."""
        samples, model = Samples.of(self._task), self._model
        size = root_mean_square(samples.values) or 1.0
        self._log2 = round(math.log2(size))
        dtype = torch.promote_types(torch.promote_types(samples.values.dtype, model.dtype), torch.float32)
        inputs: Any = samples.inputs
        if not isinstance(inputs, Tensor):
            inputs = tuple(x.to(dtype) for x in inputs)
        values = times_power_of_two(samples.values.to(dtype), -self._log2)
        frozen = [i for i, (k, slot) in model.network.slots.items() if not self._stacks.trained(k)[slot]]
        return LevenbergMarquardt(Samples(inputs, values), model.network, frozen=frozen, dtype=model.dtype)

    def _scaled(self, weights: Weights, sign: int) -> Weights:
        """Multiply what the weights predict by the unit of the data, or divide it, with no digit lost."""
        count = len(self._model.network.weighted)
        shares = [(self._log2 + i) // count for i in range(count)]
        return [times_power_of_two(w, sign * e) for w, e in zip(weights, shares, strict=False)] + weights[
            count:
        ]


def _check_model(model: nn.Module) -> Factorization:
    """Return the model if its weights can be set."""
    who = "fit: optimizer='gauss-newton'"
    if not isinstance(model, Factorization):
        message = f"{who} sets the weights of a Factorization, found a {type(model).__name__}."
        hint = "give the factorization inside a wrapper; of a ConvNet, tnreg.from_cnn(net)"
        raise OptionError(f"{message}\n  {hint}", argument="model")
    if not isinstance(model.stacks, Stacks):
        message = f"{who}: this factorization shows the weights of a network and has none of its own."
        raise OptionError(f"{message}\n  write tnreg.from_cnn(net)", argument="model")
    for k in range(len(model.stacks)):
        model.stacks.trained(k)
    return model


def _check_task(task: Any) -> Completion | Sensing:
    if not isinstance(task, Completion | Sensing):
        message = "fit: optimizer='gauss-newton' needs the task whose squares it lowers"
        found = "nothing" if task is None else type(task).__name__
        hint = "fit(model, task.loss, optimizer='gauss-newton', task=task), task from completion or sensing"
        raise OptionError(f"{message}, found {found}.\n  write {hint}", argument="task")
    return task
