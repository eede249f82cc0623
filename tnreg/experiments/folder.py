"""Run folders: what every experiment writes, and how it is read again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tnreg.errors import FileError
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.files import seal, unseal
from tnreg.machine.versions import versions
from tnreg.training.trajectory import Trajectory, plain

Settings = TypeVar("Settings")

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a ``config.json`` raises that is missing, no JSON, or other than expected."""

RUN_FILES = ("config.json", "trajectory.npz", "model.safetensors")
"""What ``write_run`` writes."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        folder: Where it is.
        experiment: Name of the module that wrote it.
        config: Settings, as JSON returns them.
        summary: Results.
        trajectory: What was recorded.
    """

    folder: Path
    experiment: str
    config: dict[str, Any]
    summary: dict[str, Any]
    trajectory: Trajectory


def plain_config(config: Settings) -> Settings:
    """Return settings whose numbers are Python's, where some are numpy's."""
    return dataclasses.replace(config, **plain(dict(vars(config))))  # type: ignore[type-var]


def write_run(
    folder: Path,
    experiment: str,
    config: Any,
    trajectory: Trajectory,
    model: Factorization,
    summary: dict[str, Any],
) -> None:
    """Write what every run folder holds: config.json, trajectory.npz, model.safetensors."""
    trajectory.save(folder / "trajectory.npz")
    model.save(folder / "model.safetensors")
    write_about(folder, experiment, config=dataclasses.asdict(config), summary=summary)


def write_about(folder: Path, experiment: str, **more: Any) -> None:
    """Write ``config.json``: versions, the name of the experiment, and more such as settings and results."""
    about = json.loads(json.dumps({**versions(), "experiment": experiment, **more}, default=str))
    text = json.dumps(seal(about), indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def read_about(folder: str | Path) -> dict[str, Any]:
    """Return what ``config.json`` of a folder holds, or raise one of ``UNREADABLE``."""
    return unseal(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))


@contextlib.contextmanager
def reading(what: str, folder: Path, expected: str = "") -> Iterator[None]:
    """Turn what ``UNREADABLE`` names into a ``FileError``: not WHAT: FOLDER."""
    try:
        yield
    except UNREADABLE as error:
        more = f"\n  expected: {expected}" if expected else ""
        raise FileError(f"not {what}: {folder}\n  {type(error).__name__}: {error}{more}") from None


def experiment_of(folder: str | Path) -> str:
    """Return the name of the experiment that wrote a folder; empty if none did."""
    try:
        return str(read_about(folder)["experiment"])
    except UNREADABLE:
        return ""


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        FileError: It is not a run folder.
    """
    path, run, before = Path(folder), None, ""
    expected = "a folder with the config.json and trajectory.npz of a run"
    while True:
        with reading("a run folder", path, expected):
            text = (path / "config.json").read_text(encoding="utf-8")
            if run is not None and text == before:  # else another process has put a new run there
                return run
            about = unseal(json.loads(text))
            name, config, summary = str(about["experiment"]), about["config"], about["summary"]
            if not (isinstance(config, dict) and isinstance(summary, dict)):
                raise TypeError("config and summary are objects")
        trajectory = Trajectory.load(path / "trajectory.npz")
        run, before = Run(path, name, config, summary, trajectory), text
