"""The command line ``tnreg``: tyro reads options as typed function arguments; results are tables or JSON.

Exit codes: 0 done, 1 bad input (one message on standard error), 2 unknown options, 130 interrupted.
"""

from tnreg.cli.entry import main

__all__ = ["main"]
