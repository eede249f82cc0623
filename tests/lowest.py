"""The lower bounds of pyproject.toml as constraints for pip: ``python tests/lowest.py core dev > file``.

``make test-lowest`` runs the tests with them once, so that they stay true. Words are ``core`` for the
package's own dependencies, and names of extras; torch can be left out with ``--without torch`` where only
a newer build of it is at hand.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def lowest(project: dict, words: list[str], without: tuple[str, ...] = ()) -> list[str]:
    """``name==bound`` for every requirement ``name>=bound``; extras of tnreg itself are followed.

    >>> lowest({"dependencies": ["torch>=2.6", "x"], "optional-dependencies": {}}, ["core"])
    ['torch==2.6']
    """
    found: dict[str, str] = {}
    for word in words:
        listed = project["dependencies"] if word == "core" else project["optional-dependencies"][word]
        for one in listed:
            own = re.match(r"tnreg\[(.*)\]", one)
            if own:
                for line in lowest(project, own.group(1).split(",")):
                    found.setdefault(*line.split("=="))
            elif bound := re.match(r"([\w.-]+)(?:\[.*\])?\s*>=\s*([\w.]+)", one):
                found.setdefault(bound.group(1), bound.group(2))
    return [f"{name}=={version}" for name, version in found.items() if name not in without]


if __name__ == "__main__":
    chosen, _, left_out = " ".join(sys.argv[1:]).partition("--without")
    content = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    print("\n".join(lowest(content["project"], chosen.split(), tuple(left_out.split()))))
