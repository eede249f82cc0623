"""A training step recorded as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["CapturedStep"]


class CapturedStep:
    """A step without arguments, recorded after three ordinary ones have warmed it up.

    The step must not wait for the device, and must read what changes from one call to the next from
    tensors that stay in place.

    Args:
        step: What is done; gradients that it leaves are lost at the next replay.
        device: The CUDA device.
        pool: Memory that steps share which never run at the same time and leave nothing to each other, from
            ``torch.cuda.graph_pool_handle()``.
    """

    def __init__(self, step: Callable[[], Any], device: torch.device, pool: Any = None) -> None:
        self.step, self.device, self.pool = step, device, pool
        self.ordinary = 3
        self.side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do the step."""
        if self.ordinary > 0:  # on a stream of its own, as torch asks for before a capture
            self.ordinary -= 1
            main = torch.cuda.current_stream(self.device)
            self.side.wait_stream(main)
            with torch.cuda.stream(self.side):
                self.step()
            main.wait_stream(self.side)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # records, does not run
            with torch.cuda.device(self.device), torch.cuda.graph(self.graph, pool=self.pool):
                self.step()
        self.graph.replay()
