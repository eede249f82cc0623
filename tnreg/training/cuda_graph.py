"""Training steps recorded as CUDA graphs and replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


class CapturedStep:
    """A step without arguments, recorded after three ordinary ones have warmed it up.

    It must not wait for the device, and must read what changes from call to call from tensors that stay
    in place; gradients that it leaves are lost at the next replay. A memory ``pool`` (see
    ``torch.cuda.graph_pool_handle``) is shared by steps that never run at the same time and leave
    nothing to each other; ``side`` is the stream of the ordinary steps.
    """

    def __init__(
        self,
        step: Callable[[], Any],
        device: torch.device,
        pool: Any = None,
        side: torch.cuda.Stream | None = None,
    ) -> None:
        self.step, self.device, self.pool = step, device, pool
        self.ordinary = 3
        self.side = torch.cuda.Stream(device) if side is None else side  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do the step."""
        if self.ordinary == 0:
            self.graph = self.graph or self._record()
            self.graph.replay()
            return
        self.ordinary -= 1  # on a stream of its own, as torch asks for before a capture
        main = torch.cuda.current_stream(self.device)
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            self.step()
        main.wait_stream(self.side)

    def _record(self) -> torch.cuda.CUDAGraph:
        """Record the step without doing it."""
        graph = torch.cuda.CUDAGraph()
        # an older graph that the garbage collector destroyed meanwhile would invalidate this one
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool):
                self.step()
        finally:
            if was_enabled:
                gc.enable()
        return graph


class CapturedSteps:
    """A ``CapturedStep`` of tensors that change from call to call, one for every set of shapes."""

    def __init__(self, step: Callable[..., Any], device: torch.device) -> None:
        self.step, self.device = step, device
        self.pool = torch.cuda.graph_pool_handle()
        self.side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.recorded: dict[tuple[torch.Size, ...], tuple[CapturedStep, list[Tensor]]] = {}

    def __call__(self, *values: Tensor) -> None:
        """Do the step with these values; they are copied to tensors on the device that stay in place."""
        shapes = tuple(value.shape for value in values)
        if shapes not in self.recorded:
            places = [torch.empty_like(value, device=self.device) for value in values]
            captured = CapturedStep(partial(self.step, *places), self.device, self.pool, self.side)
            self.recorded[shapes] = captured, places
        step, places = self.recorded[shapes]
        for place, value in zip(places, values, strict=True):
            place.copy_(value, non_blocking=True)
        step()
