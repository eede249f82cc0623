"""The command ``doctor``, which looks at the installation."""

import platform
from collections.abc import Iterator
from importlib import metadata

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from tnreg.cli.output import Reply, table_of
from tnreg.errors import FileError
from tnreg.machine.memory import available, written


def doctor(*, json: bool = False) -> None:
    """List needed packages and devices.

    Exit code 1: a package that is always needed is missing or too old.

    Args:
        json: Print one JSON document instead of the table.
    """
    reply = Reply(json)
    with reply.working("looking at packages and devices ..."):
        packages, version = list(_packages()), metadata.version("tnreg")
        names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        devices = {name: available(name) for name in names}
    head = {"tnreg": version, "python": platform.python_version(), "platform": platform.platform()}
    reply.text("tnreg {tnreg}, Python {python}, {platform}".format_map(head))
    reply.table(table_of(packages, ("name", "installed", "needed", "state", "for"), left=5))
    bad = [row for row in packages if row["state"] != "ok"]
    for extra in sorted({row["for"] for row in bad} - {"tnreg"}):
        reply.text(f"for {extra}: pip install 'tnreg[{extra}]'")
    for name, free in devices.items():
        reply.text(f"{name}: {'unknown memory' if free is None else written(free)} free")
    advice = "{name} is {state}; pip install '{name}{needed}'"
    problems = [advice.format_map(row) for row in bad if row["for"] == "tnreg"]
    works = {"devices": devices, "problems": problems, "works": not problems}
    reply.document({**head, "packages": packages, **works})
    if problems:
        reply.text("\n".join(f"problem: {line}" for line in problems))
        raise SystemExit(1)


def _packages() -> Iterator[dict[str, str]]:
    try:
        about, needs = metadata.metadata("tnreg"), metadata.requires("tnreg") or []
    except metadata.PackageNotFoundError:
        raise FileError("tnreg is not installed.\n  in its folder: pip install -e .") from None
    extras = ("", *about.get_all("Provides-Extra", []))
    for need in map(Requirement, needs):
        fits = (e for e in extras if need.marker is None or need.marker.evaluate({"extra": e}))
        if (extra := next(fits, "all")) in ("all", "dev") or need.name == "tnreg":
            continue
        try:
            version = metadata.version(need.name)
            state = "ok" if Version(version).base_version in need.specifier else "too old"
        except metadata.PackageNotFoundError:
            version, state = "", "missing"
        yield {"name": need.name, "installed": version, "needed": str(need.specifier),
               "state": state, "for": extra or "tnreg"}  # fmt: skip
