"""What there is on this machine: packages and their versions, optional parts, devices.

What is needed is read from the metadata of the installed package, so that there is one list of bounds.
Packages that ``import tnreg`` itself loads are there whenever this runs; they may still be too old.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata

import torch

from tnreg.errors import FileError
from tnreg.machine.memory import available

_PURPOSES = {
    "data": "measured tensors: kinetic, il2, covid19, indian-pines",
    "images": "digits: run locality, run convac, probe --data digits",
    "onnx": "networks as ONNX files, checked by onnxruntime",
    "quimb": "networks to and from quimb",
    "scale": "tensors larger than memory, sweeps on several processes or a cluster",
}
_NOT_SHOWN = ("all", "dev", "docs")


@dataclass(frozen=True)
class Package:
    """A package that is needed.

    Attributes:
        name: Its name in the package index.
        found: Version that is installed; ``None`` if it is missing.
        least: Oldest version that will do; empty if any will.
        state: ``"ok"``, ``"missing"`` or ``"too old"``.
    """

    name: str
    found: str | None
    least: str
    state: str


@dataclass(frozen=True)
class Extra:
    """An optional part.

    Attributes:
        name: Of the extra, as in ``tnreg[name]``.
        purpose: What it is for; empty if that is not known.
        packages: What it needs.
        works: Whether all of these are there and new enough.
        install: Command that installs it.
    """

    name: str
    purpose: str
    packages: tuple[Package, ...]
    works: bool
    install: str


@dataclass(frozen=True)
class Device:
    """A device that torch sees; ``memory`` and ``free`` in bytes, ``None`` where that cannot be told."""

    device: str
    name: str
    memory: int | None
    free: int | None


@dataclass(frozen=True)
class Health:
    """What ``examine`` found.

    Attributes:
        tnreg: Version.
        python: Version.
        platform: System and machine.
        packages: What is always needed.
        extras: Optional parts.
        devices: The processors, then GPUs.
        broken: A line for every needed package that is missing or too old, with its remedy.
    """

    tnreg: str
    python: str
    platform: str
    packages: tuple[Package, ...]
    extras: tuple[Extra, ...]
    devices: tuple[Device, ...]
    broken: tuple[str, ...]


def examine(distribution: str = "tnreg") -> Health:
    """Look at packages and devices.

    Args:
        distribution: Name of the installed package whose metadata say what is needed.

    Raises:
        FileError: It is not installed, so that there are no metadata.
    """
    try:
        version = metadata.version(distribution)
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        raise FileError(
            f"{distribution} is not installed, so that what it needs is not known.\n"
            "  in its folder: pip install -e ."
        ) from None
    needed: dict[str, list[Package]] = {}
    for line in lines:
        extra, package = _read(line)
        if package.name != distribution:  # an extra made of others
            needed.setdefault(extra, []).append(package)
    packages = tuple(needed.pop("", []))
    extras = tuple(
        Extra(
            name, _PURPOSES.get(name, ""), tuple(parts), all(p.state == "ok" for p in parts),
            f"pip install '{distribution}[{name}]'",
        )
        for name, parts in needed.items()
        if name not in _NOT_SHOWN
    )  # fmt: skip
    broken = tuple(
        f"{p.name} is {p.state}; pip install '{p.name}{'>=' + p.least if p.least else ''}'"
        for p in packages
        if p.state != "ok"
    )
    where = f"{platform.system()} {platform.machine()}"
    return Health(
        version, platform.python_version(), where, packages, extras, _devices(), broken
    )  # fmt: skip


def _read(line: str) -> tuple[str, Package]:
    """The extra and the package of one requirement, ``onnx>=1.23; extra == 'onnx'``."""
    what, _, marker = line.partition(";")
    extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
    name = re.match(r"\s*([\w.-]+)", what)
    least = re.search(r">=\s*([\w.]+)", what)
    assert name is not None
    return extra[1] if extra else "", _package(name[1], least[1] if least else "")


def _package(name: str, least: str) -> Package:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Package(name, None, least, "missing")
    old = bool(least) and _numbers(found) < _numbers(least)
    return Package(name, found, least, "too old" if old else "ok")


def _numbers(version: str) -> tuple[int, ...]:
    """The release, ``(2, 13, 0)`` of ``2.13.0+cpu``, without zeros at the end."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _devices() -> tuple[Device, ...]:
    cores = os.cpu_count() or 1
    found = [
        Device("cpu", f"{torch.get_num_threads()} threads of torch, {cores} processors", _memory(),
               available("cpu"))
    ]  # fmt: skip
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found.append(Device(f"cuda:{i}", about.name, about.total_memory, available(f"cuda:{i}")))
    if torch.backends.mps.is_available():
        found.append(Device("mps", platform.machine(), None, None))
    return tuple(found)


def _memory() -> int | None:
    """Memory of the machine, whatever a control group may leave of it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
