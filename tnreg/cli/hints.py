"""Errors of the library speak of its arguments; here they are told as options of the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["hint"]

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
    (r"do not fit on \d+x\d+", ("distances",)),
    (r"^(?:\w+: )?ranks\b", ("ranks", "rank")),
    (r"at least one std and one seed", ("stds", "seeds")),
)

# Options that such an error can be about, for each command; "run" and "sweep" take those of experiments.
_OPTIONS = {
    "rank": "tree rtol missing memory device png",
    "decompose": "tree rtol ranks randomized missing memory device out png",
    "fit": "tree observed rank join root steps every lr std optimizer missing seed device dtype out",
    "run dynamics": "tree rank join root steps every lr std seed device out",
    "run init-scale": "tree rank steps every lr stds seeds device out",
    "run convac": "trees channels templates epochs batch lr std test seeds rtols thin device out",
    "run locality": "distances train test size epochs batch lr seeds workers device out",
    "sweep dynamics": "tree rank steps every lr std device workers threads retries out",
    "sweep locality": "distance train test size epochs batch lr device workers threads retries out",
    "export": "format out share classes",
    "probe": "data weights distances size samples pairs seed png",
    "plot": "names png",
    "demo": "out device seed steps",
}


def hint(message: str, given: Sequence[str]) -> str:
    """A message with the option to change, where it does not name it itself.

    Args:
        message: What the library says.
        given: Words of the command line; the first is the command, after "run" and "sweep" an experiment.
    """
    found = [_OPTIONS[name] for k in (2, 1) if (name := " ".join(given[:k])) in _OPTIONS]
    known = found[0].split() if found else []
    asked = [name for pattern, names in _RULES if re.search(pattern, message) for name in names]
    # "rtol must be in [0, 1)", "fit: steps must be an integer"
    asked += re.findall(r"^(?:[\w.]+: )?(\w+) (?:must|needs)", message)
    for name in asked:
        if name in known:
            return message if f"--{name}" in message else f"{message}\n  option: --{name}"
    return message
