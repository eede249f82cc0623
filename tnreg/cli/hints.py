"""Errors of the library speak of its arguments; here they are told as options of the command line."""

from __future__ import annotations

import re
from collections.abc import Collection

# What messages of the library say, and the option it is about: the first that the command has.
_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"axes and the tree \d+ modes|mode sizes for a tree|pixels, the tree", ("tree", "trees")),
    (r"no tree named|not a (readable JSON )?tree|no such tree file", ("tree", "trees")),
    (r"not nested lists|not a mode tree|a file that is no tree", ("tree", "trees")),
    (r"missing='nan'", ("missing",)),
    (r"root='ones'", ("root",)),
    (r"is no run folder of tnreg|choose another folder", ("out",)),
    (r"allowed \(memory=\)|does not fit into memory", ("memory",)),
    (r"cannot use the device|available on cuda", ("device",)),
    (r"no such image set|images are \(N", ("data",)),
    (r"no such file of weights|not a state dict|does not fit the network", ("weights",)),
    (r"share=True", ("share",)),
    (r"workers=0", ("workers",)),
    (r"do not fit on \d+x\d+", ("distances",)),
    (r"^(?:\w+: )?ranks\b", ("ranks", "rank")),
    (r"at least one std and one seed", ("stds", "seeds")),
)


def hint(message: str, known: Collection[str]) -> str:
    """A message with the option to change, where it does not name it itself.

    Args:
        message: What the library says.
        known: Options that the command has, without dashes.
    """
    asked = [name for pattern, names in _RULES if re.search(pattern, message) for name in names]
    # "rtol must be in [0, 1)", "fit: steps must be an integer"
    asked += re.findall(r"^(?:[\w.]+: )?(\w+) (?:must|needs)", message)
    for name in asked:
        if name in known:
            return message if f"--{name}" in message else f"{message}\n  option: --{name}"
    return message
