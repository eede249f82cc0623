"""Read files at once; write files and folders whole: under another name, then renamed.

If the process dies in between, the old content or the new one is there, never a part of it. JSON objects and
tensors carry a checksum (``seal``), so that damage on a disk or on the way is found where they are read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

from tnreg.errors import FileError, TnregError

if TYPE_CHECKING:
    from torch import Tensor

Model = TypeVar("Model")

_SEAL = "crc32"  # name of the checksum in a file, and how it starts

# What a disk that cannot hold the data reports; such errors come without a file's name.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def is_there(path: str | os.PathLike[str]) -> bool:
    """Return whether a file or folder exists; ``FileError`` if that may not be known."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None
    except (OSError, ValueError):
        return False
    return True


def is_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a file exists that is no folder; see ``is_there``."""
    return is_there(path) and not os.path.isdir(path)


def seal(content: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return a JSON object with a checksum of it, and of tensors on the CPU that belong to it."""
    code = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    for name, value in sorted((tensors or {}).items()):
        import torch  # here and below: trees are read and drawn without it

        code = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), code)
        code = zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data, code)
    return {**content, _SEAL: f"{_SEAL}:{code:08x}"}


def unseal(content: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return what was sealed, without the checksum; ``FileError`` if it is not the same any more.

    What never had a checksum, of older versions or written by hand, is returned as it is.
    """
    # found by its name or its form: the damage may be there
    kept = (not isinstance(v, str) or not v.startswith(f"{_SEAL}:") for v in content.values())
    plain = {key: content[key] for key, keep in zip(content, kept, strict=True) if keep and key != _SEAL}
    if plain != content and seal(plain, tensors) != content:
        raise FileError(
            "the file is damaged: its content does not fit its checksum.\n"
            f"  take another copy of it; if you changed it by hand, remove {_SEAL!r} from it"
        )
    return plain


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors of a safetensors file; ``FileError`` if a checksum does not fit."""
    from safetensors.torch import load

    data = path.read_bytes()  # safetensors opens it twice; another process may replace it in between
    tensors = dict(sorted(load(data).items()))  # load returns them in any order
    length = int.from_bytes(data[:8], "little")
    return unseal(json.loads(data[8 : 8 + length]).get("__metadata__") or {}, tensors), tensors


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], key: str, about: Any
) -> Path:
    """Write tensors, and ``about`` as JSON under ``key`` in the metadata; see ``write_whole``."""
    from safetensors.torch import save_file

    copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = seal({key: json.dumps(about)}, copies)
    return write_whole(path, lambda file: save_file(copies, file, metadata=text))


def read_model(
    path: str | os.PathLike[str], key: str, kind: str, build: Callable[[Any, dict[str, Tensor]], Model]
) -> Model:
    """Return what ``build`` makes of the JSON and the tensors of a file of ``write_safetensors``.

    The JSON is under ``key`` in the metadata; nothing in the file is executed. ``kind`` says what the file
    holds and what writes it: ``"classifier of ConvAC.save"``.

    Raises:
        FileError: No such file, truncated, of another kind, or ``build`` raised an error.
    """
    file, (name, writer) = Path(path), kind.split(" of ")
    if not is_file(file):
        raise FileError(f"no such model file: {file}")
    try:
        try:
            metadata, tensors = read_safetensors(file)
        except TnregError:
            raise
        except Exception as error:
            raise FileError(f"not a safetensors file: {error}") from None
        if key not in metadata:
            raise FileError("a safetensors file without a tnreg tree")
        return build(json.loads(metadata[key]), tensors)
    except Exception as error:
        detail = str(error) if isinstance(error, TnregError) else repr(error)
        raise FileError(
            f"not a {name}: {file}\n  {detail}\n  expected: a safetensors file that {writer} wrote"
        ) from None


def metadata_of(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, reading its head alone; empty for any other file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(min(length, 100_000_000)))  # longest head of the format
            return dict(head.get("__metadata__") or {})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> Path:
    """Call ``write`` with a temporary path, rename what it wrote to ``path``, and return that path.

    Raises:
        FileError: The folder is missing or cannot be written; nothing was changed.
    """
    target, partial = _names(path)
    try:
        with _writing(target):
            if not target.parent.is_dir():
                raise FileError(f"cannot write {target}: there is no folder {target.parent}")
            partial.touch()
            mode = partial.stat().st_mode
            write(partial)
            partial.chmod(mode)  # safetensors writes files that only their owner may read
            os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return target


def check_folder(
    path: str | os.PathLike[str], kind: str | None, files: Collection[str] | None = None
) -> Path:
    """Return the absolute path of a run folder to be written; ``FileError`` if something else is there.

    A run may be there of the same ``kind`` of experiment (any if ``None``) that holds nothing but ``files``
    (anything if ``None``).
    """
    target, _ = _names(path)
    with _writing(target):
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return target
    found = "is there already and is no run folder of tnreg"
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        about = json.loads((target / "config.json").read_text(encoding="utf-8"))
        if "tnreg" in about:
            there = about.get("experiment")
            others = [
                p.name for p in target.iterdir() if files is not None and (p.name not in files or p.is_dir())
            ]
            if kind not in (None, there):
                found = f"is a run of {there!r}, not of {kind!r}"
            elif others:
                found = f"holds what no run of {kind!r} writes ({min(others)})"
            else:
                return target
    raise FileError(
        f"{target} {found}; it is left alone.\n  choose another folder, or remove it first", argument="folder"
    )


@contextlib.contextmanager
def folder_written_whole(path: str | os.PathLike[str], kind: str, files: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``path`` when the block ends without an error.

    An empty folder, or a run of the same kind with nothing but ``files``, is replaced. An error changes
    nothing; it is a ``FileError`` if the folder cannot be written, or holds something else.
    """
    check_folder(path, kind, files)
    target, partial = _names(path)
    with _writing(target):
        partial.mkdir(parents=True)
    try:
        yield partial
        check_folder(target, kind, files)  # again: another program may have put something there
        _, old = _names(path)
        with contextlib.suppress(FileNotFoundError):
            os.replace(target, old)
        os.replace(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    except FileError as error:  # about a file in the temporary folder: name the final one
        message = str(error).replace(str(partial), str(target))
        raise FileError(message, argument=error.argument) from None
    except OSError as error:
        if error.errno not in _DISK and not str(error.filename).startswith(str(partial)):
            raise  # about something else than what was to be written
        with _writing(target):
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn errors of the disk into one that names the file or folder to be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from None


def _names(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the absolute path, and one beside it that no other process or thread uses."""
    name = os.fspath(path)
    if not name:
        raise FileError("cannot write: the path is empty.")
    try:
        with contextlib.suppress(OSError):
            os.stat(name)
        target = Path(os.path.realpath(name))  # a link stays one
        return target, target.with_name(f".{target.name}.partial-{secrets.token_hex(8)}")
    except ValueError as error:
        raise FileError(f"cannot write {name!r}: no file can have that name, {error}") from None
