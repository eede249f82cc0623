"""The processes of one training: who they are, what they tell each other, and how they end.

``torchrun --nproc-per-node N`` starts N processes. ``joined`` makes one group of them from the
environment that torchrun sets: gloo on CPUs, NCCL on GPUs, one GPU for each. Everything that is sent
goes through torch.distributed. *Whole* is what one process would hold: the parts of all processes, one
after another in the order of their ranks.

A process alone has the same methods. They send nothing and give back what they were given, so that
code is written once. Every method that sends waits for the others: all processes call the same methods
in the same order.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tnreg.errors import OptionError, TnregError

T = TypeVar("T")
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class ProcessLost(TnregError):
    """Another process of the group ended before its work was done, so that this one cannot go on."""


@dataclass(frozen=True)
class Processes:
    """The processes that work together, seen from one of them.

    Attributes:
        rank: Number of this process.
        count: How many there are.
        device: Where tensors live that are sent.
        group: The group of torch.distributed; ``None`` for a process alone.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None

    def part(self, total: int) -> slice:
        """This process's contiguous part of ``total`` things; the first parts are larger by one."""
        parts = self.parts(total)
        start = sum(parts[: self.rank])
        return slice(start, start + parts[self.rank])

    def parts(self, total: int) -> list[int]:
        """How many of ``total`` things every process has."""
        return [total // self.count + (r < total % self.count) for r in range(self.count)]

    def lengths(self, own: int) -> list[int]:
        """The numbers that all processes gave; on a GPU this waits for it."""
        if self.count == 1:
            return [own]
        found = self._gathered(torch.tensor([own], device=self.device))
        return torch.cat(found).tolist()

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes, without gradient."""
        if self.count == 1:
            return x
        found = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, group=self.group)
        return found

    def first(self, x: Tensor) -> Tensor:
        """The tensor of rank 0; those of the others have its shape."""
        if self.count == 1:
            return x
        found = x.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(found, self._number(0), group=self.group)
        return found

    def next(self, x: Tensor) -> Tensor:
        """Return the tensor of the next rank, the last one that of rank 0; all have one shape."""
        if self.count == 1:
            return x
        sent = x.detach().contiguous()
        found = torch.empty_like(sent)
        after, before = ((self.rank + step) % self.count for step in (1, -1))
        sending = dist.P2POp(dist.isend, sent, self._number(before), self.group)
        receiving = dist.P2POp(dist.irecv, found, self._number(after), self.group)
        for work in dist.batch_isend_irecv([sending, receiving]):
            work.wait()
        return found

    def whole(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """The rows of all processes, without gradient.

        Args:
            x: This process's rows, shape ``(lengths[rank], ...)``.
            lengths: How many rows every process has.
        """
        if self.count == 1:
            return x
        sent = x.new_zeros(max(lengths), *x.shape[1:])
        sent[: len(x)] = x.detach()
        found = self._gathered(_bytes(sent))
        return torch.cat([f[:n] for f, n in zip(found, lengths, strict=True)]).view(x.dtype).view(
            -1, *x.shape[1:]
        )  # fmt: skip

    def rows(self, x: Tensor, index: Tensor, lengths: Sequence[int]) -> Tensor:
        """Rows ``index`` of the whole, of which each process sends those that it has.

        Args:
            x: This process's rows, shape ``(lengths[rank], ...)``.
            index: The same on all processes, shape ``(k,)``.
            lengths: How many rows every process has.
        """
        if self.count == 1:
            return x[index]
        here = index - sum(lengths[: self.rank])
        sent = _bytes(x.detach()[here.clamp(0, len(x) - 1)])
        mine = (here >= 0) & (here < len(x))
        found = self.sum(torch.where(mine[:, None], sent, 0))
        return found.view(x.dtype).view(-1, *x.shape[1:])

    def shared(self, value: Tensor, part: Tensor) -> Tensor:
        """A value of the whole whose gradients, averaged over the processes, are those of the whole.

        ``DistributedDataParallel`` averages gradients, while those of a sum of parts add up. So the
        gradient is ``count`` times that of this process's part.

        Args:
            value: The same on all processes.
            part: This process's share of it, with a graph.
        """
        if self.count == 1:
            return part
        return value.detach() + self.count * (part - part.detach())

    def every(self, one: T) -> list[T]:
        """The objects of all processes; pickled, for small ones."""
        if self.count == 1:
            return [one]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, one, group=self.group)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on rank 0, where alone it is called; a ``TnregError`` of it is raised by all.

        A call is not cut short when torchrun stops the process, so that files are written to their end.
        """
        if self.count == 1:
            return make()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                with _stop.held():
                    told[0] = make()
            except ProcessLost:
                raise
            except TnregError as error:
                told[1] = error
        dist.broadcast_object_list(told, self._number(0), group=self.group, device=self.device)
        if told[1] is not None:
            raise told[1]
        found: T = told[0]
        return found

    def _number(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    def _gathered(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(found, x, group=self.group)
        return found


def started() -> int:
    """How many processes torchrun says it started; 1 without it."""
    told = os.environ.get("WORLD_SIZE", "1")
    if not told.isdigit() or int(told) < 1:
        raise OptionError(f"the environment variable WORLD_SIZE must be a number, found {told!r}.")
    return int(told)


def is_first() -> bool:
    """Whether this process is to print: the first of those that torchrun started, or the only one.

    Without a rank in the environment torchrun started none, whatever WORLD_SIZE says: it prints its errors.
    """
    return started() == 1 or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def joined(device: str | torch.device = "cpu") -> Iterator[Processes]:
    """The processes that torchrun started, as one group; or this process alone.

    A group that is there already is used. One that is made stays until the process ends and serves later
    blocks: torchrun's store cannot make a second one after it. While the block runs in several processes,
    SIGTERM, by which torchrun stops the others when one has failed, and lost connections become one
    ``ProcessLost``. After that SIGTERM is not heeded any more, so that the error can still be told.

    Args:
        device: "cpu", or "cuda" for the GPU whose number is the process's on its machine.

    Raises:
        OptionError: No GPU for this process, or an environment that is not torchrun's.
        ProcessLost: Another process ended before this one.
    """
    device = torch.device(device)
    there = dist.is_available() and dist.is_initialized()
    if not there and started() == 1:
        yield Processes(device=device)
        return
    if not there:
        device = _start(device)
        atexit.register(_leave)
    elif device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    group = dist.group.WORLD
    with _stop.heard(), _losses_named():
        yield Processes(dist.get_rank(group), dist.get_world_size(group), device, group)


def unwrapped(net: Any) -> tuple[Any, Processes]:
    """The network inside ``DistributedDataParallel``, and its processes; any other one and a process alone.

    A compiled wrapper is taken off with it; a network that was compiled before it was wrapped stays so.
    """
    inner = getattr(net, "_orig_mod", net)
    if not isinstance(inner, nn.parallel.DistributedDataParallel):
        return net, Processes()
    group = inner.process_group
    device = next(inner.module.parameters()).device
    return inner.module, Processes(
        dist.get_rank(group), dist.get_world_size(group), device, group
    )  # fmt: skip


def _start(device: torch.device) -> torch.device:
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise OptionError(
            f"WORLD_SIZE is {started()}, but there is no {', '.join(missing)} in the environment.\n"
            f"  start several processes by: torchrun --nproc-per-node {started()} -m tnreg ..."
        )
    if device.type != "cuda":
        dist.init_process_group("gloo")
        return device
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is not None:
        raise OptionError(f"several processes need a GPU each: write cuda, not {device}.")
    if local >= there:
        raise OptionError(
            f"process {local} of this machine has no GPU: there are {there}; "
            f"write torchrun --nproc-per-node {max(there, 1)}, or the device cpu."
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def _leave() -> None:
    # not after a loss: leaving can wait for others, which are gone
    if dist.is_initialized() and not _stop.told:
        gc.collect()  # networks that still hold the group: torch may abort where they outlive it
        dist.destroy_process_group()


class _Stop:
    """SIGTERM as a ``ProcessLost`` of the main thread: once, and not while it is held back.

    Attributes:
        told: A loss was told already; from then on the signal says nothing new.
    """

    def __init__(self) -> None:
        self._holds = 0
        self._asked = self.told = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Raise in this block; a handler that somebody else has set stays."""
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, self._signalled)
        try:
            yield
        finally:
            if not self.told:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Raise after this block."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._asked:
            self._raise()

    def _signalled(self, number: int, frame: Any) -> None:
        self._asked = True
        if not self._holds:
            self._raise()

    def _raise(self) -> None:
        if not self.told:
            self.told = True
            raise ProcessLost("another process of this training ended: torchrun stopped this one.")


_stop = _Stop()


@contextlib.contextmanager
def _losses_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        known = isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text
        if not known:
            raise
        _stop.told = True
        line = re.sub(
            r"^\[.*?\] ", "", next(iter(text.splitlines()), "")
        )  # without its source file
        raise ProcessLost(
            "another process of this training ended: the connection to it is lost.\n"
            f"  {line.partition('. ')[0]}"
        ) from None


def _bytes(x: Tensor) -> Tensor:
    """Rows of bytes, which every backend sends and, beside zeros, adds exactly, whatever the dtype."""
    return x.contiguous().reshape(len(x), -1).view(torch.uint8)
