"""Running a benchmark's libraries in turns, each in a process of its own and in its own environment."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from pathlib import Path
from typing import Any

# What a worker gives back: {case: {library or part: {"seconds": [...], ...}}}
Found = dict[str, dict[str, Any]]


def machine_line(device: str = "cpu", threads: int = 2) -> str:
    """Return the machine, as the tables name it."""
    if device != "cpu":
        import torch

        return str(torch.cuda.get_device_name(device))
    return (
        f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}, Python {platform.python_version()}"
    )


def version(package: str) -> str:
    """Installed version of a package, empty if it was not installed as one."""
    try:
        return _version(package)
    except PackageNotFoundError:
        return ""


def timed(call: Callable[[], Any], turns: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of every turn, after a first call that does not count."""
    call()
    times = []
    for _ in range(turns):
        start = clock()
        call()
        times.append(clock() - start)
    return times


def main(
    doc: str,
    libraries: Mapping[str, str],
    worker: Callable[[str, int], Found],
    *,
    rounds: int = 2,
    turns: int = 3,
    line: Callable[[str, Mapping[str, Any], float], str],
    threads: int = 2,
) -> dict[str, Any] | None:
    """Command line of such a benchmark; a worker process writes its times, the other one the table.

    Args:
        doc: The script's docstring.
        libraries: ``{library: environment}``; the environment ``tnreg`` is this one, for every other
            one there is an option ``--ENVIRONMENT PYTHON``, and without it its libraries are left out.
        worker: Times of one library.
        rounds: How often every library gets its turn.
        turns: Timed calls in a round.
        line: A row of the printed table from the library, its result, and its time over the first one's.
        threads: How many the worker sets.

    Returns:
        The results, with medians as ``seconds``; ``None`` in a worker process.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    environments = sorted(set(libraries.values()) - {"tnreg"})
    for name in environments:
        parser.add_argument(f"--{name}", metavar="PYTHON", help="interpreter of its environment")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--turns", type=int, default=turns)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--worker", choices=list(libraries), help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        arguments.to.write_text(json.dumps(worker(arguments.worker, arguments.turns)))
        return None
    pythons = {"tnreg": sys.executable, **{n: getattr(arguments, n) for n in environments}}
    chosen = [name for name, where in libraries.items() if pythons[where]]
    results: Found = {}
    for _ in range(arguments.rounds):
        for library in chosen:
            times = _in_a_process(pythons[libraries[library]], library, arguments.turns)
            for case, row in times.items():
                previous = results.setdefault(case, {}).setdefault(library, {**row, "seconds": []})
                previous["seconds"] += row["seconds"]
    for rows in results.values():
        for row in rows.values():
            row["seconds"] = statistics.median(row["seconds"])
    figures = {"machine": machine_line(threads=threads), "results": results}
    print(figures["machine"])
    for case, rows in results.items():
        base = rows[chosen[0]]["seconds"] if chosen[0] in rows else float("nan")
        for library, row in rows.items():
            print(f"  {case:24s} {line(library, row, row['seconds'] / base)}")
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _in_a_process(python: str, library: str, turns: int) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "times.json"
        command: Sequence[str] = [python, "-W", "ignore", sys.argv[0], "--worker", library,
                                  "--to", str(to), "--turns", str(turns)]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: Found = json.loads(to.read_text())
        return found
