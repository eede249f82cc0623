"""What moves the weights in a run of dynamics: an optimizer, or the gradient flow itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tnreg.dynamics import flow
from tnreg.errors import OptionError, check_number
from tnreg.factorizations.factorization import Factorization
from tnreg.training.fit import fit
from tnreg.training.optim import GroupRMSprop
from tnreg.training.trajectory import Trajectory

Name = Literal["group-rmsprop", "sgd", "momentum", "adam", "lbfgs", "flow"]

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "group-rmsprop": GroupRMSprop,
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "lbfgs": torch.optim.LBFGS,
}
_FLOW_TIME = {"sgd": 1.0, "momentum": 10.0}  # of a step, in learning rates


class Updates:
    """Updates of a model by the optimizer of a name.

    Attributes:
        follow_flow: Whether they follow the gradient flow, so that theory predicts rates.
        observations: ``{name: f(model)}`` of their step size and of the flow's time so far, where there are.

    Raises:
        OptionError: No such optimizer, or one that does not go with ``graph``.
    """

    def __init__(self, name: str, model: Factorization, lr: float, graph: bool) -> None:
        self.name, self.lr, self.graph, self.done = name, check_number(lr, "lr", 0), graph, 0
        if name not in (*_OPTIMIZERS, "flow"):
            names = ", ".join((*_OPTIMIZERS, "flow"))
            raise OptionError(f"unknown optimizer {name!r}; there is {names}.", argument="optimizer")
        if graph and name != "group-rmsprop":
            message = f"graph is for the optimizer group-rmsprop, found {name!r}."
            raise OptionError(message, argument="graph")
        self.follow_flow = name not in ("adam", "lbfgs")
        self.optimizer = None if name == "flow" else _OPTIMIZERS[name](model.parameters(), lr=lr)
        self.observations: dict[str, Callable[[Any], float]] = {}
        if isinstance(group := self.optimizer, GroupRMSprop):
            self.observations = {
                "step size": lambda _: group.step_size,
                "flow time": lambda _: group.flow_time,
            }
        elif name in _FLOW_TIME:
            self.observations = {"flow time": lambda _: self.lr * self.done * _FLOW_TIME[name]}

    def train(
        self, model: Factorization, loss: Callable[[Any], Tensor], steps: int, every: int, *, observe: Any,
        stop: Callable[[Trajectory], bool | str], **more: Any,
    ) -> Trajectory:  # fmt: skip
        """Train and return what was observed; ``more`` is for ``fit``, which the flow does without."""
        if self.optimizer is None:
            times = self.lr * torch.arange(0, steps + 1, every, dtype=torch.float64)
            return flow(model, loss, times, observe=observe, stop=stop)
        count = self._count if self.name in _FLOW_TIME else None
        return fit(
            model, loss, steps=steps, optimizer=self.optimizer, observe=observe, every=every, stop=stop,
            graph=self.graph, each_step=count, **more,
        )  # fmt: skip

    def _count(self, step: int, *_: Any) -> None:
        self.done = step
