"""The processes that train one network together, and what they send each other.

``joined`` makes one group of the processes that ``torchrun`` started: gloo on CPUs, NCCL on GPUs, one GPU
each. A process alone has the same methods, which send nothing. All processes call them in one order.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tnreg.errors import OptionError, TnregError

T = TypeVar("T")


class ProcessLost(TnregError):
    """Another process of the group ended before its work was done, so that this one cannot go on."""


@dataclass(frozen=True)
class Processes:
    """The processes that work together, seen from one of them."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None  # of torch.distributed; a process alone has none

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the processes, whose gradient is ``count`` in every part.

        ``DistributedDataParallel`` averages gradients, while those of parts of a sum add up.
        """
        if self.count == 1:
            return x
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total + self.count * (x - x.detach()) if x.requires_grad else total

    def gather(self, x: Tensor) -> Tensor:
        """Return the tensors of all processes, stacked in the order of their ranks; all have one shape."""
        if self.count == 1:
            return x[None]
        parts = x.new_zeros(self.count, *x.shape)
        parts[self.rank] = x
        return self.sum(parts)

    def lengths(self, rows: int) -> list[int]:
        """Return how many rows every process has; on a GPU this waits for it."""
        return [int(n) for n in self.gather(torch.tensor(rows, device=self.device))]

    def rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Return the rows ``index`` of the whole, which is the parts of all in the order of their ranks."""
        if self.count == 1:
            return x[index]
        here = index - sum(self.lengths(len(x))[: self.rank])
        own = ((here >= 0) & (here < len(x))).view(-1, *[1] * (x.ndim - 1))
        return self.sum(torch.where(own, x[here.clamp(0, len(x) - 1)], 0))

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what ``make`` gives on rank 0, where alone it is called; all raise its ``TnregError``."""
        if self.count == 1:
            return make()
        result: list[Any] = [None]
        if self.rank == 0:
            try:
                result = [make()]
            except TnregError as error:
                result = [error]
        dist.broadcast_object_list(result, group=self.group, device=self.device, group_src=0)
        if isinstance(result[0], TnregError):
            raise result[0]
        return cast(T, result[0])


def started() -> int:
    """Return how many processes torchrun says it started; 1 without it."""
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdigit() or int(count) < 1:
        raise OptionError(f"the environment variable WORLD_SIZE must be a number, found {count!r}.")
    return int(count)


def is_first() -> bool:
    """Return whether this process is to print: torchrun's first one, or one that it did not start."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def joined(device: str | torch.device = "cpu", advice: object = "") -> Iterator[Processes]:
    """Give the processes that torchrun started, as one group; or this process alone.

    An existing group of torch.distributed is used. A new one stays until the process ends; each process
    on "cuda" takes the GPU of its number on its machine. ``advice`` on how to go on ends the message
    of a ``ProcessLost``.

    Raises:
        OptionError: No GPU for this process, or an environment that is not torchrun's.
        ProcessLost: The connection to another process was lost while the block ran.
    """
    device = torch.device(device)
    if not (dist.is_available() and dist.is_initialized()):
        if started() == 1:
            yield Processes(device=device)
            return
        _start(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        atexit.unregister(_leave)  # leaving can wait for the others, which are gone
        reason = re.sub(r"^\[.*?\] ", "", str(error)).splitlines()[0].partition(". ")[0]
        message = "another process of this training ended: the connection to it is lost."
        raise ProcessLost(f"{message}\n  {reason}\n  {advice}".rstrip()) from None


def unwrapped(net: Any) -> tuple[Any, Processes]:
    """Return the network inside ``DistributedDataParallel``, and its processes; others are as they are.

    A compiled wrapper is taken off with it; a network that was compiled before it was wrapped stays so.
    One under ``fully_shard`` has the processes of its mesh.
    """
    inner = getattr(net, "_orig_mod", net)
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        group, device = inner.process_group, next(inner.module.parameters()).device
        net = inner.module
    elif parts := sharded_parts(inner):
        states = (part._get_fsdp_state()._fsdp_param_group for part in parts)
        mesh = next(state.mesh_info.mesh for state in states if state)
        if mesh.ndim > 1:
            message = f"a network under fully_shard needs a mesh of one axis, found {mesh}."
            raise OptionError(message, argument="net")
        group, device = mesh.get_group(), torch.device(mesh.device_type)
    else:
        return net, Processes()
    return net, Processes(dist.get_rank(group), dist.get_world_size(group), device, group)


def sharded_parts(net: Any) -> list[Any]:
    """Return the modules of a network that are under ``fully_shard`` (FSDP2)."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # slow to import, and not needed by others
    modules = net.modules() if fsdp and isinstance(net, nn.Module) else ()
    return [m for m in modules if isinstance(m, fsdp.FSDPModule)]


def _start(device: torch.device) -> None:
    """Make the group that torchrun's environment describes; take the GPU of this process."""
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in os.environ]:
        raise OptionError(
            f"WORLD_SIZE is {started()}, but there is no {', '.join(missing)} in the environment.\n"
            f"  start several processes by: torchrun --nproc-per-node {started()} -m tnreg ..."
        )
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device.index is not None:
            message = f"several processes need a GPU each: write cuda, not {device}."
            raise OptionError(message, argument="device")
        if local >= count:
            message = f"process {local} of this machine has no GPU: there are {count}"
            instead = f"torchrun --nproc-per-node {max(count, 1)}, or the device cpu."
            raise OptionError(f"{message}; write {instead}", argument="device")
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    else:
        dist.init_process_group("gloo")
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        gc.collect()  # networks that still hold the group: torch may abort where they outlive it
        dist.destroy_process_group()
