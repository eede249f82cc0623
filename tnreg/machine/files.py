"""Files and folders read at once and written whole: beside first, then renamed into place.

Whatever happens to the process in between, the old content or the new one is there, never a half.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from tnreg.errors import FileError

# What the disk says when it cannot hold what is written; such errors come without a file's name.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}

# Bytes of a safetensors file before its tensors, at most; the format's own limit.
_LONGEST_HEAD = 100_000_000


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file of this name is there; False as well for a name that no file can have.

    Raises:
        FileError: It may not be looked at.
    """
    return is_there(path) and not Path(path).is_dir()


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder of this name is there; see ``is_file``."""
    try:
        return Path(path).exists()
    except (OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise FileError(f"cannot read {path}: {error.strerror}") from None
        return False


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, read at once.

    safetensors' own reader opens a file by its name a second time, and would mix two files where another
    process replaces it in between.
    """
    data = path.read_bytes()
    tensors = dict(sorted(safetensors.torch.load(data).items()))  # its own order is any
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__") or {}, tensors


def metadata_of(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file, from its head alone; empty for any other file, or none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(min(length, _LONGEST_HEAD)))
            return dict(head.get("__metadata__") or {})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


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
    try:
        free = not target.exists() or _may_replace(target)
    except OSError as error:
        raise FileError(f"cannot write {target}: {error.strerror or error}") from None
    if not free:
        raise FileError(
            f"{target} is there already and is no run folder of tnreg; it is left alone.\n"
            "  choose another folder, or remove it first"
        )
    return target


@contextlib.contextmanager
def folder_written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` that takes its place when the block ends without error.

    A run folder that tnreg wrote before, or an empty one, is replaced; of two that are written to one path
    at the same time the later one stays. On an error nothing changes.

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
        _take_place(beside, target)
    except FileError as error:  # of a file in the folder: the user knows it by its later name
        raise FileError(str(error).replace(str(beside), str(target))) from None
    except OSError as error:
        if error.errno in _DISK or str(error.filename or "").startswith(str(beside)):
            raise FileError(f"cannot write {target}: {error.strerror or error}") from None
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _take_place(beside: Path, target: Path) -> None:
    """Rename a folder to a path where there may be one already, and where another process may do the same."""
    for _ in range(100):
        if target.exists() and not _may_replace(target):
            continue  # put there meanwhile by somebody, or just being replaced by another process
        old = _beside(target, "old")
        with contextlib.suppress(FileNotFoundError):
            os.replace(target, old)
        try:
            os.replace(beside, target)
        except OSError as error:
            if old.exists() and not target.exists():
                os.replace(old, target)
            shutil.rmtree(old, ignore_errors=True)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            shutil.rmtree(old, ignore_errors=True)
            return
    check_folder(target)
    raise FileError(f"cannot write {target}: other processes write there all the time")


def _may_replace(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        return "tnreg" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _absolute(path: str | os.PathLike[str]) -> Path:
    if not os.fspath(path):
        raise FileError("cannot write: the path is empty.")
    try:
        os.fsencode(path)
        if "\0" in os.fspath(path):
            raise ValueError("embedded null character")
    except ValueError as error:
        raise FileError(
            f"cannot write {os.fspath(path)!r}: no file can have that name, {error}"
        ) from None
    return Path(
        os.path.abspath(path)
    )  # "." and ".." have no name that another one could stand beside


def _beside(target: Path, kind: str = "partial") -> Path:
    # Two that write to one path keep out of each other's way: processes, threads of one, and processes of
    # the same number on two machines that share the folder.
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")
