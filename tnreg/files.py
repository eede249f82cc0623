"""Writing files and folders whole: beside first, then renamed into place.

Whatever happens to the process in between, the old content or the new one is there, never a half.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tnreg.errors import FileError

__all__ = ["check_folder", "folder_written_whole", "write_whole"]


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> Path:
    """Call ``write`` with a temporary path beside ``path``, then rename what it wrote to ``path``.

    Raises:
        FileError: The folder is missing or cannot be written; nothing was changed.
    """
    target = _absolute(path)
    beside = _beside(target)
    try:
        if not target.parent.is_dir():
            raise FileError(f"cannot write {target}: there is no folder {target.parent}")
        write(beside)
        beside.chmod(0o666 & ~_mask())  # some writers make files that nobody else may read
        os.replace(beside, target)
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"cannot write {target}: {getattr(error, 'strerror', None) or error}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    return target


def _mask() -> int:
    """The process's mask of permissions, which can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def check_folder(path: str | os.PathLike[str]) -> Path:
    """The absolute path, if a run folder may be written there.

    Raises:
        FileError: ``path`` is a file, or a folder that holds something else than a run of tnreg.
    """
    target = _absolute(path)
    if target.exists() and not _may_replace(target):
        raise FileError(
            f"{target} is there already and is no run folder of tnreg; it is left alone.\n"
            "  choose another folder, or remove it first"
        )
    return target


@contextlib.contextmanager
def folder_written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` that takes its place when the block ends without error.

    A run folder that tnreg wrote before, or an empty one, is replaced. On an error nothing changes.

    Raises:
        FileError: ``path`` is a file, or a folder that holds something else, or cannot be written.
    """
    target = check_folder(path)
    beside = _beside(target)
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise FileError(f"cannot write {target}: {error.strerror or error}") from None
    try:
        yield beside
        old = _beside(target, "old")
        if target.exists():
            os.replace(target, old)
        os.replace(beside, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _may_replace(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        return "tnreg" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _absolute(path: str | os.PathLike[str]) -> Path:
    if not os.fspath(path):
        raise FileError("cannot write: the path is empty.")
    return Path(
        os.path.abspath(path)
    )  # "." and ".." have no name that another one could stand beside


def _beside(target: Path, kind: str = "partial") -> Path:
    # The process number keeps two processes that write to one path out of each other's way.
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}")
