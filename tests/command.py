"""The command line, called in this process; other processes of Python; standard error as a terminal."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

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


def start(code, *arguments, **options):
    """Start a process of Python that can import the tests; it runs the code with these arguments."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    around = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # Ctrl-C is heard also where the tests run in the background of a shell, which ignores it there
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=around, text=True, stderr=subprocess.PIPE, **options)


def wait(condition, *processes, seconds=300):
    """Wait for an event while the processes run."""
    end = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)


class Screen(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def screen(monkeypatch):
    """Standard error as a terminal, wherever the tests are started; fixtures are too early for it."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Screen()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal
