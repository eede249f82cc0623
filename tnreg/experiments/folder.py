"""Run folders: what every experiment writes, and how it is read again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnreg.errors import FileError
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.versions import versions
from tnreg.training.trajectory import Trajectory

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a ``config.json`` raises that is missing, no JSON, or other than expected."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        folder: Where it is.
        experiment: Name of the module that wrote it.
        config: Settings, as JSON gives them back.
        summary: Results.
        found: The trajectory.
    """

    folder: Path
    experiment: str
    config: dict[str, Any]
    summary: dict[str, Any]
    found: Trajectory


def write_run(
    folder: Path,
    experiment: str,
    config: Any,
    found: Trajectory,
    model: Factorization,
    summary: dict[str, Any],
) -> None:
    """Write what every run folder holds: config.json, trajectory.npz, model.safetensors."""
    found.save(folder / "trajectory.npz")
    model.save(folder / "model.safetensors")
    about = {
        **versions(),
        "experiment": experiment,
        "config": dataclasses.asdict(config),
        "summary": summary,
    }
    (folder / "config.json").write_text(
        json.dumps(about, indent=2, default=str) + "\n", encoding="utf-8"
    )


def about_of(folder: str | Path) -> dict[str, Any]:
    """What ``config.json`` of a folder holds; raises one of ``UNREADABLE`` where there is none."""
    about: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return about


@contextlib.contextmanager
def refused(what: str, folder: Path, expected: str = "") -> Iterator[None]:
    """What a ``config.json`` that is read in this block lacks is a ``FileError``: not WHAT: FOLDER."""
    try:
        yield
    except UNREADABLE as error:
        more = f"\n  expected: {expected}" if expected else ""
        raise FileError(f"not {what}: {folder}\n  {type(error).__name__}: {error}{more}") from None


def experiment_of(folder: str | Path) -> str:
    """Name of the experiment that wrote a folder; empty if none did."""
    try:
        return str(about_of(folder)["experiment"])
    except UNREADABLE:
        return ""


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        FileError: It is none.
    """
    path = Path(folder)
    while True:
        text, parts = _described(path)
        found = Trajectory.load(path / "trajectory.npz")
        if _described(path)[0] == text:  # else another process put a new run in its place
            return Run(path, *parts, found)


def _described(path: Path) -> tuple[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """Text of config.json, and its parts."""
    expected = "a folder with the config.json and trajectory.npz of a run"
    with refused("a run folder", path, expected):
        text = (path / "config.json").read_text(encoding="utf-8")
        about = json.loads(text)
        name, config, summary = str(about["experiment"]), about["config"], about["summary"]
        for part in (config, summary):
            if not isinstance(part, dict):
                raise TypeError(f"config and summary are objects, found a {type(part).__name__}")
    return text, (name, config, summary)
