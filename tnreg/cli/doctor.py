"""The command ``doctor``, which looks at the installation."""

import platform
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from tnreg.cli.output import Reply, table_of
from tnreg.errors import FileError
from tnreg.machine.memory import available, written


def doctor(*, json: bool = False) -> None:
    """List the packages that tnreg and its extras need, and the devices that torch sees.

    Exit code 1 if a package that tnreg always needs is missing or too old.

    Args:
        json: Print one JSON document instead of the table.
    """
    reply = Reply(json)
    with reply.working("looking at packages and devices ..."):
        packages, version = _packages(), metadata.version("tnreg")
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        devices = {"cpu": available("cpu")} | {name: available(name) for name in names}
    columns = ("name", "installed", "needed", "state", "for")
    head = {"tnreg": version, "python": platform.python_version(), "platform": platform.platform()}
    reply.text("tnreg {tnreg}, Python {python}, {platform}".format_map(head))
    reply.table(table_of(packages, columns, len(columns)))
    bad = [row for row in packages if row["state"] != "ok"]
    for extra in sorted({row["for"] for row in bad} - {"tnreg"}):
        reply.text(f"for {extra}: pip install 'tnreg[{extra}]'")
    for name, free in devices.items():
        reply.text(f"{name}: {'unknown memory' if free is None else written(free)} free")
    problems = [
        "{name} is {state}; pip install '{name}{needed}'".format_map(row)
        for row in bad if row["for"] == "tnreg"
    ]  # fmt: skip
    for line in problems:
        reply.text(f"problem: {line}")
    works = {"devices": devices, "problems": problems, "works": not problems}
    reply.document({**head, "packages": packages, **works})
    if problems:
        raise SystemExit(1)


def _packages() -> list[dict[str, Any]]:
    """Return what tnreg and its extras need, and which versions are installed."""
    try:
        about, needs = metadata.metadata("tnreg"), metadata.requires("tnreg") or []
    except metadata.PackageNotFoundError:
        raise FileError("tnreg is not installed.\n  in its folder: pip install -e .") from None
    rows = []
    for need in map(Requirement, needs):
        extras = ("", *about.get_all("Provides-Extra", []))
        fits = (e for e in extras if need.marker is None or need.marker.evaluate({"extra": e}))
        extra = next(fits, "all")
        if extra in ("all", "dev") or need.name == "tnreg":
            continue
        try:
            version = metadata.version(need.name)
            state = "ok" if Version(version).base_version in need.specifier else "too old"
        except metadata.PackageNotFoundError:
            version, state = "", "missing"
        rows.append({"name": need.name, "installed": version, "needed": str(need.specifier),
                     "state": state, "for": extra or "tnreg"})  # fmt: skip
    return rows
