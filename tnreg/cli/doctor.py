"""The command that looks at the installation: ``doctor``."""

from __future__ import annotations

import dataclasses

from rich.table import Table

from tnreg.cli.examination import Health, examine
from tnreg.cli.reply import Reply
from tnreg.machine.memory import written


def doctor(*, json: bool = False) -> None:
    """Versions, optional parts and devices: what works here, and how to install what does not.

    Exit code 1 if something that tnreg always needs is missing or too old.

    Args:
        json: Print one JSON document in place of the tables.
    """
    reply = Reply(json)
    with reply.working("looking at packages and devices ..."):
        found = examine()
    reply.text(f"tnreg {found.tnreg}, Python {found.python}, {found.platform}")
    reply.table(_packages(found))
    for extra in found.extras:
        if not extra.works:
            reply.text(f"{extra.purpose or extra.name}: {extra.install}")
    reply.table(_devices(found))
    for line in found.broken:
        reply.text(f"to be repaired: {line}")
    reply.document({**dataclasses.asdict(found), "works": not found.broken})
    if found.broken:
        raise SystemExit(1)


def _packages(found: Health) -> Table:
    table = Table("package", "here", "needed", "state", "for")
    rows = [(one, "tnreg") for one in found.packages]
    rows += [(one, extra.purpose or extra.name) for extra in found.extras for one in extra.packages]
    for one, purpose in rows:
        least = f">= {one.least}" if one.least else ""
        table.add_row(one.name, one.found or "", least, one.state, purpose)
    return table


def _devices(found: Health) -> Table:
    table = Table("device", "name")
    for head in ("memory", "free"):
        table.add_column(head, justify="right")
    for one in found.devices:
        sizes = ("" if size is None else written(size) for size in (one.memory, one.free))
        table.add_row(one.device, one.name, *sizes)
    return table
