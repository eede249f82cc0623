"""The command line: ``tnreg tree | rank | decompose | fit | run | sweep | export | probe | plot | demo`` ...

Options are typed function arguments, read by tyro; results are tables by rich, or with ``--json`` one JSON
document. Exit codes: 0 done, 1 bad input (one message on standard error), 2 unknown options, 130
interrupted before anything ran.
"""

from tnreg.cli.entry import main

__all__ = ["main"]
