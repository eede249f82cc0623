"""tnreg: tensor factorizations as tensor networks over mode trees.

Every edge of a mode tree is an index, every node a weight. CP, Tucker, tensor train, hierarchical
Tucker, hierarchical tensor factorization and deep matrix factorization are trees, not classes.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tnreg.machine.versions import __version__ as __version__

if TYPE_CHECKING:
    from tnreg.public import *
    from tnreg.public import __all__ as __all__


def __getattr__(name: str) -> Any:
    """Load torch and the package at the first use: the command line draws trees without them."""
    if not name.startswith("__") or name == "__all__":
        public = vars(importlib.import_module("tnreg.public"))
        for names in (public, globals()):  # the latter holds the wings that are loaded now
            if name in names:
                return globals().setdefault(name, names[name])
    raise AttributeError(f"module 'tnreg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__getattr__("__all__"), "__version__"]
