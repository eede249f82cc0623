"""Gradient descent with one adaptive step size for all parameters together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import OptionError


class GroupRMSprop(torch.optim.Optimizer):
    """RMSprop whose running average is of the squared norm of the whole gradient.

    ``γ ← α γ + (1 - α) Σ ‖g‖²`` over all parameters of all groups, then
    ``p ← p - lr / (sqrt(γ / (1 - αᵗ)) + eps) · g``: one scalar step for all parameters, so a step
    follows the gradient flow (local components keep their balance to first order), which per-entry
    methods such as Adam do not. It is the optimizer of the experiments of Razin, Maman and Cohen
    (2022), arXiv:2201.11729.

    Args:
        params: Parameters or parameter groups; a group may have its own ``lr``.
        lr: Step length, roughly the distance moved per step by all parameters together.
        alpha: Decay of the running average, in ``[0, 1)``.
        eps: Added to the root; it rules the step while gradients are smaller than it.

    Raises:
        OptionError: ``lr`` or ``eps`` is negative, or ``alpha`` not in ``[0, 1)``.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-6
    ) -> None:
        if not lr >= 0:
            raise OptionError(f"GroupRMSprop: lr must be >= 0, found {lr!r}.", argument="lr")
        if not 0 <= alpha < 1:
            raise OptionError(f"GroupRMSprop: alpha must be in [0, 1), found {alpha!r}.")
        if not eps >= 0:
            raise OptionError(f"GroupRMSprop: eps must be >= 0, found {eps!r}.")
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})
        first = self.param_groups[0]
        if any((g["alpha"], g["eps"]) != (first["alpha"], first["eps"]) for g in self.param_groups):
            raise OptionError(
                "GroupRMSprop: alpha and eps are shared by all groups; only lr may differ."
            )

    @property
    def step_size(self) -> float:
        """Factor of the gradient in the last step of the first group; 0.0 before the first step."""
        shared = self.state.get(self.param_groups[0]["params"][0], {})
        return float(self.param_groups[0]["lr"] * shared["scale"]) if "scale" in shared else 0.0

    @property
    def flow_time(self) -> float:
        """Sum of the step sizes so far: the time of the gradient flow that the first group follows."""
        shared = self.state.get(self.param_groups[0]["params"][0], {})
        return float(shared["elapsed"]) if "elapsed" in shared else 0.0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the state of another optimizer in; the two share nothing afterwards."""
        super().load_state_dict(copy.deepcopy(state_dict))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step; parameters without a gradient stay as they are.

        Args:
            closure: Evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        if not gradients:
            return loss
        alpha, eps = self.param_groups[0]["alpha"], self.param_groups[0]["eps"]
        # State lives at the first parameter, where torch saves and loads it like any other.
        shared = self.state[self.param_groups[0]["params"][0]]
        square = torch.stack([_square(g) for g in gradients]).sum()
        on_host = _on_host(square)
        host: float | None
        if not shared:
            shared["step"] = 0 if on_host else torch.zeros_like(square)
            shared["square_average"], shared["scale"] = square * 0, square * 0
            shared["elapsed"] = 0.0 if on_host else square * 0
        elif not on_host:
            shared["step"] = shared["step"].to(square.device)  # read from a file, it is on the host
        shared["step"] += 1
        average = shared["square_average"] * alpha + square * (1 - alpha)
        scale = 1 / ((average / _correction(alpha, shared["step"])).sqrt() + eps)
        if on_host:
            shared["square_average"], shared["scale"] = average, scale
            host = float(scale)
            shared["elapsed"] += self.param_groups[0]["lr"] * host
        else:  # in place, and counted on the device: a captured CUDA graph replays exactly this
            shared["square_average"].copy_(average)
            shared["scale"].copy_(scale)
            shared["elapsed"] += self.param_groups[0]["lr"] * scale
            host = None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if host is not None:
                    p.add_(p.grad, alpha=-group["lr"] * host)
                else:  # stay on the device: reading the scale would wait for it
                    p.addcmul_(p.grad, scale.to(p.dtype), value=-group["lr"])
        return loss


def _on_host(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _correction(alpha: float, step: int | Tensor) -> float | Tensor:
    """``1 - alpha**step``, exact in floats as well."""
    log = math.log(alpha) if alpha > 0 else -math.inf
    return -torch.expm1(step * log) if isinstance(step, Tensor) else -math.expm1(step * log)


def _square(g: Tensor) -> Tensor:
    flat = (torch.view_as_real(g) if g.is_complex() else g).reshape(-1)
    return torch.dot(flat, flat)
