"""How much memory there is, and one clear error for an array that would not fit into it."""

from __future__ import annotations

import operator
import os
import re
from pathlib import Path

import torch

from tnreg.errors import OptionError, SizeError

_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)},
          **{f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)}}  # fmt: skip

_GROUPS = (Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))

# Smaller arrays are made without asking how much memory is free, which takes a tenth of a millisecond.
NEVER_MIND = 2**28


def available(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can still be allocated on a device, or ``None`` where that cannot be told.

    On a GPU: free memory and what torch keeps cached. On Linux: the kernel's estimate, or what is left
    of the limit of the control group (a container, a job of a cluster; version 2) if that is less.
    """
    kind = torch.device(device)
    if kind.type == "cuda":
        free, _ = torch.cuda.mem_get_info(kind)
        return free + torch.cuda.memory_reserved(kind) - torch.cuda.memory_allocated(kind)
    if kind.type != "cpu":
        return None
    found = [free for free in (_of_machine(), _of_group()) if free is not None]
    return min(found, default=None)


def limit_of(memory: int | str | None, what: str) -> int | None:
    """A limit in bytes: an integer, or text such as ``"1.5GiB"``; ``None`` stays ``None``.

    Raises:
        OptionError: Neither, or less than one byte.
    """
    if memory is None:
        return None
    found = None
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?i?b?)\s*", memory.lower())
        if match and match[2] in _UNITS and (match[2] or "." not in match[1]):
            found = int(float(match[1]) * _UNITS[match[2]])
    elif not isinstance(memory, bool):
        try:
            found = operator.index(memory)
        except TypeError:
            found = None
    if found is None or found < 1:
        raise OptionError(
            f"{what}: memory must be a number of bytes, or text such as '1.5GiB', found {memory!r}."
        )
    return found


def written(size: float) -> str:
    """Bytes as people read them: ``"8.59 GB"``."""
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if float(f"{size:.3g}") < 1000 or unit == "PB":
            return f"{size:.3g} {unit}" if size < 1e6 else f"{size:.2e} {unit}"
        size /= 1000
    raise AssertionError


def does_not_fit(
    what: str, needed: int, limit: int, advice: str, *, note: str = "", device: str | None = None
) -> SizeError:
    """The error for an array that is not made.

    Args:
        what: What it is.
        needed: Its bytes, with all that is there at the same time.
        limit: Bytes that there are.
        advice: What to do instead.
        note: What counts, after the bytes.
        device: Where so much is available; ``None`` for a limit of the caller's own.
    """
    whose = "allowed (memory=)" if device is None else f"available on {device}"
    return SizeError(
        f"{what} would not fit into memory.\n"
        f"  needed: {needed:,} bytes ({written(needed)}){note}\n"
        f"  {whose}: {limit:,} bytes ({written(limit)})\n"
        f"  {advice}"
    )


def _of_machine() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    except OSError:
        pass
    try:  # elsewhere: all of it
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _of_group() -> int | None:
    """What a control group (version 2) leaves: its own limit, and those of the groups around it."""
    try:
        own, top = _GROUPS
        name = own.read_text(encoding="ascii").strip().rpartition("::")[2]
        place, left = top / name.lstrip("/"), None
        for folder in (place, *place.parents):
            limit = folder / "memory.max"
            if limit.exists() and (held := limit.read_text(encoding="ascii").strip()) != "max":
                used = int((folder / "memory.current").read_text(encoding="ascii"))
                stat = (
                    folder / "memory.stat"
                )  # files that were read are given up when room is needed
                if stat.exists():
                    cached = re.search(r"^inactive_file (\d+)", stat.read_text(), re.MULTILINE)
                    used -= int(cached[1]) if cached else 0
                free = max(int(held) - used, 0)
                left = free if left is None else min(left, free)
            if folder == top:
                break
        return left
    except (OSError, ValueError):
        return None
