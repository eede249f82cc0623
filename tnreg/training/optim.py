"""Gradient descent with one adaptive step size for all parameters together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import OptionError, check_number


class GroupRMSprop(torch.optim.Optimizer):
    """RMSprop whose running average is of the squared norm of the whole gradient.

    ``γ ← α γ + (1 - α) Σ ‖g‖²`` over all parameters of all groups, then
    ``p ← p - lr / (sqrt(γ / (1 - αᵗ)) + eps) · g``: one scalar step for all parameters, so a step
    follows the gradient flow (local components keep their balance to first order), which per-entry
    methods such as Adam do not. It is the optimizer of the experiments of Razin, Maman and Cohen
    (2022), arXiv:2201.11729.

    Args:
        params: Parameters or groups of them; a group may have its own ``lr``.
        lr: Step length, roughly the distance moved per step by all parameters together.
        alpha: Decay of the running average, in ``[0, 1)``.
        eps: Added to the root; dominates the denominator while gradients are smaller, so steps depend on
            the unit of the loss there. Gradients whose squares leave the range of their dtype need a
            loss in another unit.

    Raises:
        OptionError: ``lr`` or ``eps`` is negative, or ``alpha`` not in ``[0, 1)``.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-6
    ) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})
        for group in self.param_groups:
            for name, below in (("lr", math.inf), ("alpha", 1), ("eps", math.inf)):
                group[name] = check_number(group[name], f"GroupRMSprop: {name}", 0, below)
        if len({(group["alpha"], group["eps"]) for group in self.param_groups}) > 1:
            message = "GroupRMSprop: alpha and eps are shared by all groups; only lr may differ."
            raise OptionError(message, argument="params")

    @property
    def step_size(self) -> float:
        """Factor of the gradient in the last step of the first group; 0.0 before the first step."""
        return float(self.param_groups[0]["lr"] * self._last("scale"))

    @property
    def flow_time(self) -> float:
        """Sum of the step sizes so far: the time of the gradient flow that the first group follows."""
        return float(self._last("elapsed"))

    def _last(self, name: str) -> Any:
        return self.state.get(self.param_groups[0]["params"][0], {}).get(name, 0.0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the state of another optimizer; the two share nothing afterwards."""
        super().load_state_dict(copy.deepcopy(state_dict))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step and return the loss of the closure; parameters without a gradient stay."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        moved = [
            (p, p.grad, group["lr"])
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if moved:
            scale = self._next_scale(torch.stack([_square(g) for _, g, _ in moved]).sum())
        for p, gradient, lr in moved:
            if isinstance(scale, float):
                p.add_(gradient, alpha=-lr * scale)
            else:  # stay on the device: reading the scale would wait for it
                p.addcmul_(gradient, scale.to(p.dtype), value=-lr)
        return loss

    def _next_scale(self, square: Tensor) -> float | Tensor:
        """Add a squared gradient to the average; return ``1 / (root + eps)``, a float on the CPU."""
        group, on_host = self.param_groups[0], _on_host(square)
        # state lives at the first parameter, where torch saves and loads it like any other
        alpha, eps, shared = group["alpha"], group["eps"], self.state[group["params"][0]]
        if not shared:
            shared["step"] = 0 if on_host else torch.zeros_like(square)
            shared["square_average"], shared["scale"] = square * 0, square * 0
            shared["elapsed"] = 0.0 if on_host else square * 0
        elif not on_host:
            shared["step"] = shared["step"].to(square.device)  # read from a file, it is on the host
        shared["step"] += 1
        # in place, and counted on the device: a captured CUDA graph replays exactly this
        average = shared["square_average"].mul_(alpha).add_(square, alpha=1 - alpha)
        correction = _correction(alpha, shared["step"])
        result: float | Tensor
        if on_host:
            root = math.sqrt(float(average) / correction) + eps
            result = 1 / root if root else math.inf
            shared["scale"].fill_(result)
        else:
            result = shared["scale"].copy_(1 / ((average / correction).sqrt() + eps))
        shared["elapsed"] += group["lr"] * result
        return result


def _on_host(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _correction(alpha: float, step: int | Tensor) -> float | Tensor:
    """Return ``1 - alpha**step``, exact in floats as well."""
    log = math.log(alpha) if alpha > 0 else -math.inf
    return -torch.expm1(step * log) if isinstance(step, Tensor) else -math.expm1(step * log)


def _square(g: Tensor) -> Tensor:
    flat = (torch.view_as_real(g) if g.is_complex() else g).reshape(-1)
    return torch.dot(flat, flat)
