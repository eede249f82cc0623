"""Steps of Levenberg-Marquardt as an optimizer of torch: what ``fit`` calls "gauss-newton"."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnreg.errors import OptionError
from tnreg.factorizations.factorization import Factorization
from tnreg.factorizations.stacks import Stacks
from tnreg.tensors.arrays import largest_of, times_power_of_two, without_autocast
from tnreg.training.solver import LevenbergMarquardt, Samples, Weights, predict, to_weights, with_all_leaves
from tnreg.training.tasks import Completion, Sensing, check_squares, root_mean_square


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
            weights, exponents = self._lifted(to_weights(model))
            weights, before, after = solver.step(_scaled(weights, exponents, -1), gauge=False)
        if after < before:
            found, shape = _scaled(weights, exponents, 1), model.network.shape
            slots = model.network.slots.items()
            self._stacks.write({slot: found[i].reshape(shape(i)).to(model.dtype) for i, slot in slots})
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
        samples = Samples(inputs, times_power_of_two(samples.values.to(dtype), -self._log2))
        rows = torch.arange(0, len(samples), 1 + len(samples) // 4000, device=samples.values.device)
        self._some = samples[rows]
        slots = model.network.slots
        frozen = [i for i in slots if not self._stacks.trained(slots[i][0])[slots[i][1]]]
        self._free = [i for i in slots if i not in frozen]
        net, frozen = with_all_leaves(model.network), [*frozen, *model.network.bare]
        return LevenbergMarquardt(samples, net, frozen=frozen, dtype=model.dtype)

    def _lifted(self, weights: Weights) -> tuple[Weights, list[int]]:
        """Return weights, and powers of two that bring each near 1 and what they predict to the data's unit.

        Weights that predict next to nothing are scaled up, all by the same: no step from there would be seen.
        """
        solver = self._solver
        assert solver is not None
        sizes = [math.frexp(float(largest_of(w)))[1] for w in weights[: len(solver.net.weighted)]]
        predicted = root_mean_square(predict(self._some, solver.net, _scaled(weights, sizes, -1)))
        known = predicted > 0 and solver.samples.norm > 0
        short = self._log2 - sum(sizes) - math.log2(predicted) - 5 if known else 0
        if short > 5:
            shares = {k: (round(short) + n) // len(self._free) for n, k in enumerate(self._free)}
            weights = _scaled(weights, [shares.get(k, 0) for k in range(len(sizes))], 1)
            sizes = [size + shares.get(k, 0) for k, size in enumerate(sizes)]
        return weights, [*sizes[:-1], self._log2 - sum(sizes[:-1])]


def _scaled(weights: Weights, exponents: Sequence[int], sign: int) -> Weights:
    """Multiply weights by powers of two, which loses no digit."""
    pairs = zip(weights, exponents, strict=False)
    return [times_power_of_two(w, sign * e) for w, e in pairs] + weights[len(exponents) :]


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
    check_squares(task, "fit: optimizer='gauss-newton'")
    return task
