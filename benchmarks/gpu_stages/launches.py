"""Count what a call sends to a device: operations that do work, views left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_IDLE = ("_unsafe_view", "_reshape_alias", "_record_function", "detach", "empty", "lift_fresh")


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = self.working = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations += 1
        self.waits += name == "_local_scalar_dense"
        self.working += not func.is_view and not name.startswith(_IDLE)
        return func(*args, **(kwargs or {}))


def counted(call: Callable[[], Any]) -> dict[str, int]:
    """Operations of a call, those that are no views, numbers read by the host, flops of products."""
    with FlopCounterMode(display=False) as flops, _Counted() as seen:
        call()
    return {
        "operations": seen.operations, "without views": seen.working,
        "waits": seen.waits, "flops": flops.get_total_flops(),
    }  # fmt: skip


def kernels(call: Callable[[], Any], repeats: int = 20) -> float:
    """Kernels and copies that a call launches on a CUDA device, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    on_device = (e.count for e in seen.key_averages() if e.device_type.name == "CUDA")
    return sum(on_device) / repeats
