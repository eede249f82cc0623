"""How a network runs inside penalties and probes: without dropout, by statistics that do not change.

``torch.utils.checkpoint`` calls parts of a network again in the backward pass, when all modules have their
own modes back. Its two ways to do so are replaced while a penalty runs, and only there.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

from tnreg.errors import ShapeError

T = TypeVar("T")


@contextmanager
def evaluation(net: Any, statistics: str = "frozen", *, found: Collection[nn.Module] = ()) -> Iterator[None]:
    """Put every module into evaluation mode; afterwards, errors included, each has its own mode again.

    With the statistics of the ``"batch"``, normalization layers use them; either way no running statistic
    changes. Modules that a function uses are found when it calls them; ``found`` are others. What is
    checkpointed runs in the same modes when it is called again.
    """
    before: dict[nn.Module, tuple[bool, Any]] = {}

    def switch(module: nn.Module, *_: Any) -> None:
        for m in module.modules() if module not in before else ():
            if m in before:
                continue
            before[m] = m.training, getattr(m, "track_running_stats", None)
            m.training = False
            if statistics == "batch" and isinstance(m, _NormBase):
                m.training, m.track_running_stats = True, False

    def again(function: Callable[..., Any]) -> Callable[..., Any]:
        def evaluated(*args: Any, **kwargs: Any) -> Any:
            with evaluation(net, statistics, found=before):
                return function(*args, **kwargs)

        return evaluated

    owner = getattr(net, "__self__", net)
    known = isinstance(owner, nn.Module)
    for module in (owner, *found) if known else found:
        switch(module)
    try:
        with checkpoints(again), contextlib.nullcontext() if known else _each_module(switch):
            yield
    finally:
        for m, (mode, tracks) in reversed(before.items()):  # a compiled module's mode is that of its part
            m.training = mode
            if isinstance(m, _NormBase):
                m.track_running_stats = tracks


@contextmanager
def _each_module(switch: Callable[..., None]) -> Iterator[None]:
    """Call ``switch`` with every module that is called; compiled ones run as they were written."""
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it takes seconds
            with contextlib.suppress(RuntimeError):  # within a compiled function
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", ".*global hooks on modules")
        stack.callback(register_module_forward_pre_hook(switch).remove)
        yield


@contextmanager
def checkpoints(again: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None) -> Iterator[None]:
    """Let ``torch.utils.checkpoint`` run ``again(function)`` for a function, or nothing a second time."""
    module: Any = torch.utils.checkpoint
    reentrant, other = module.CheckpointFunction, module._checkpoint_without_reentrant_generator

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args) if again is None else reentrant.apply(again(function), preserve, *args)

    def generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
        if again is None:
            yield
        else:
            yield from other(again(function), *args, **kwargs)

    module.CheckpointFunction = SimpleNamespace(apply=apply)
    module._checkpoint_without_reentrant_generator = generator
    try:
        yield
    finally:
        module.CheckpointFunction, module._checkpoint_without_reentrant_generator = reentrant, other


def uncompiled(method: Callable[..., T]) -> Callable[..., T]:
    """Let a method run as it was written where it is called from a compiled function."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> T:
        if torch.compiler.is_compiling():  # else torch.compiler.disable would import dynamo, which takes long
            return torch.compiler.disable(method)(*args, **kwargs)  # type: ignore[no-untyped-call, no-any-return]
        return method(*args, **kwargs)

    return run


def logits_of(out: Any, batch: int, output: Callable[[Any], Any] | None = None) -> Tensor:
    """Return what a network gave for a batch, or ``output`` of it, as logits ``(batch, C)``, or raise."""
    out = out if output is None else output(out)
    if isinstance(out, Tensor) and out.ndim in (1, 2) and len(out) == batch and out.numel():
        return out.reshape(batch, -1)
    found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
    message = f"the network must give logits of shape ({batch},), ({batch}, 1) or ({batch}, C)"
    if not isinstance(out, Tensor):
        found += "; give output=, a function from that to logits, such as output=lambda out: out.logits"
    raise ShapeError(f"{message} for {batch} images, found {found}.", argument="net")
