"""The command line, called in this process; standard error as a terminal."""

from __future__ import annotations

import io
import sys

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


class Screen(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def screen(monkeypatch):
    """Standard error as a terminal, wherever the tests are started; fixtures are too early for it."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    found = Screen()
    monkeypatch.setattr(sys, "stderr", found)
    return found
