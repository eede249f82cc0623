"""Version of tnreg, and of what it computes with."""

import platform

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions of tnreg, torch and Python, for files that record how they were made."""
    import torch  # 1.5 s, which drawing a tree can do without

    return {"tnreg": __version__, "torch": torch.__version__, "python": platform.python_version()}
