"""The command line, called in this process."""

from __future__ import annotations

from tnreg.cli import main


def call(capsys, *arguments):
    """Exit code, standard output, standard error."""
    code = 0
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err
