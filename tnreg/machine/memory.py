"""How much memory there is, and one clear error for an array that would not fit into it."""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from tnreg.errors import OptionError, SizeError

_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)},
          **{f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)}}  # fmt: skip

_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container

# Arrays up to this many bytes are made without asking for free memory, which takes 0.1 ms.
NEVER_MIND = 2**28
# Bytes and axes that no array of torch can have more of.
_MOST_BYTES, MOST_AXES = 2**63 - 1, 64


def available(device: torch.device | str = "cpu") -> int | None:
    """Return how many bytes can still be allocated on a device; ``None`` if that is unknown.

    On a GPU: free memory and what torch keeps cached. Elsewhere: what Linux says is available, at most what
    the container's limit and that of the process (``ulimit -v``) leave; on other systems all memory.
    """
    kind = torch.device(device)
    if kind.type == "cuda":
        free, _ = torch.cuda.mem_get_info(kind)
        return free + torch.cuda.memory_reserved(kind) - torch.cuda.memory_allocated(kind)
    if kind.type != "cpu":
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    try:
        all_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    free, limit = int(match[1]) * 1024 if match else all_memory, _read(_LIMIT).strip()
    return min(free, _unmapped(), int(limit) if limit.isdigit() else free)


def _unmapped() -> int:
    """Return how many bytes the process may still map."""
    with suppress(ImportError, OSError, ValueError, IndexError):  # not on Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            return max(limit - int(_read("/proc/self/statm").split()[0]) * os.sysconf("SC_PAGE_SIZE"), 0)
    return _MOST_BYTES


def shortage(needed: int, device: torch.device | str) -> int | None:
    """Return the bytes available on a device if fewer than are ``needed``, otherwise ``None``."""
    if needed <= NEVER_MIND:
        return None
    limit = available(device)
    limit = _MOST_BYTES if limit is None else limit
    return limit if needed > limit else None


def must_fit(
    what: str,
    shapes: Iterable[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device | str | None,
    advice: str = "take smaller ranks, or a tree with fewer children under a full join",
    *,
    copies: int = 1,
    note: str = "",
) -> None:
    """Refuse arrays before they are made if they would not fit: the guard of all that allocates.

    Args:
        what: Name of the arrays.
        shapes: Shapes of all that exist at the same time.
        dtype: Their type.
        device: Where they will be.
        advice: What to do instead.
        copies: How often each of them exists.
        note: See ``does_not_fit``.

    Raises:
        SizeError: Less is available on the device, or torch has no arrays of so many axes.

    Cost: some microseconds up to 256 MiB.
    """
    shapes = list(shapes)
    axes = max(map(len, shapes), default=0)
    if axes > MOST_AXES:
        message = f"{what} would need an array of {axes} axes; torch has no more than {MOST_AXES}."
        raise SizeError(f"{message}\n  {advice}")
    device = torch.get_default_device() if device is None else device
    needed = copies * dtype.itemsize * sum(map(math.prod, shapes))
    limit = shortage(needed, device)
    if limit is not None:
        raise does_not_fit(what, needed, limit, advice, note=note, device=str(device))


def limit_of(memory: int | str | None, what: str) -> int | None:
    """Return a limit in bytes from an integer or text such as ``"1.5GiB"``; ``None`` stays ``None``.

    Raises:
        OptionError: Neither of these, or less than one byte.
    """
    if memory is None:
        return None
    size = None
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?i?b?)\s*", memory.lower())
        if match and match[2] in _UNITS and (match[2] or "." not in match[1]):
            size = int(float(match[1]) * _UNITS[match[2]])
    elif not isinstance(memory, bool) and hasattr(memory, "__index__"):
        size = operator.index(memory)
    if size is None or size < 1:
        raise OptionError(
            f"{what}: memory must be a number of bytes, or text such as '1.5GiB', found {memory!r}.",
            argument="memory",
        )
    return size


def written(size: float) -> str:
    """Return a number of bytes as text for people: ``"8.59 GB"``."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if float(f"{size:.3g}") < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


def does_not_fit(
    what: str, needed: int, limit: int, advice: str, *, note: str = "", device: str | None = None
) -> SizeError:
    """Return the error for an array that would be too large.

    Args:
        what: Name of the array.
        needed: Its bytes, together with all that exists at the same time.
        limit: Bytes that may be used: what is available on ``device``, or without one the caller's own.
        advice: What to do instead.
        note: Printed after the bytes, e.g. ``", result and intermediates"``.
        device: See ``limit``.
    """
    whose = "allowed (memory=)" if device is None else f"available on {device}"
    return SizeError(
        f"{what} would not fit into memory.\n"
        f"  needed: {needed:,} bytes ({written(needed)}){note}\n"
        f"  {whose}: {limit:,} bytes ({written(limit)})\n"
        f"  {advice}",
        argument="memory" if device is None else "device",
    )


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
