"""What reads from the device or waits for it, and which line did it.

A step that does neither is launched while the device still works at the one before.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]

# Operations whose result on the host, or whose shape, depends on numbers on the device.
_READING = re.compile(
    r"aten\.(_local_scalar_dense|item|is_nonzero|equal|allclose|nonzero|masked_select|argwhere|_?unique\w*"
    r"|bincount|histogram|repeat_interleave\.Tensor|_linalg_check_errors)\b"
)
_COPYING = re.compile(r"aten\.(_to_copy|copy_)\b")


class HostReads(TorchDispatchMode):
    """Counts the operations that bring numbers of a device to the host.

    What the backward pass does on a GPU is done by a thread of its own and not seen; ``waits`` sees it. On
    the CPU a copy to the host is none; reads of single numbers are seen.

    Args:
        device: The device that is watched.

    Attributes:
        found: ``{"operation at file:line": count}``, the innermost line of this repository.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at one operation and carry it out."""
        given = kwargs or {}
        if self._reads(str(func), list(_tensors((args, given))), given.get("device")):
            self.found[f"{str(func).removeprefix('aten.')} at {_line()}"] += 1
        return func(*args, **given)

    def _reads(self, name: str, tensors: list[torch.Tensor], device: Any) -> bool:
        if _COPYING.match(name):
            # copy_ has the target first and the source last; the other one names the target's device
            target = tensors[0].device if len(tensors) > 1 else torch.device(device or tensors[0].device)
            return self._here(tensors[-1]) and target.type == "cpu" != self.device.type
        masks = name.startswith("aten.index") and any(
            t.dtype in (torch.bool, torch.uint8) for t in tensors[1:]
        )
        return bool(masks or _READING.match(name)) and any(map(self._here, tensors))

    def _here(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self.device.type


def host_reads(device: torch.device, call: Callable[[], Any]) -> dict[str, int]:
    """Return what one call reads from the device, most often first; an earlier call has made its plans."""
    call()
    with HostReads(device) as mode:
        call()
    return dict(mode.found.most_common())


def waits(device: torch.device, step: Callable[[], Any], repeats: int = 3) -> dict[str, int] | None:
    """How often so many steps wait for a CUDA device, by line, as torch tells; ``None`` on the CPU.

    The first two steps are not counted. Copies from memory of the host that is not pinned count as well.
    """
    for _ in range(2):
        step()
    if device.type != "cuda":
        step()
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(repeats):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = Counter(
        _short(seen.filename, seen.lineno) for seen in caught if "called a synchronizing" in str(seen.message)
    )
    return dict(found.most_common())


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        yield from _tensors(list(held.values()))
    elif isinstance(held, list | tuple):
        for part in held:
            yield from _tensors(part)


def _line() -> str:
    """Return the innermost line of this repository, of ``tnreg`` if one is there."""
    frame, other = sys._getframe(1), "torch"
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        # a mode that sees every function passes the call on; who made it is what matters
        if file.is_relative_to(ROOT / "tnreg") and frame.f_code.co_name != "__torch_function__":
            return _short(str(file), frame.f_lineno)
        if other == "torch" and file.is_relative_to(ROOT / "benchmarks") and file != Path(__file__):
            other = _short(str(file), frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return other


def _short(file: str, line: int) -> str:
    path = Path(file)
    named = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
    return f"{named}:{line}"
