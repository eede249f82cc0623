"""What a ``locality`` training leaves while it goes on: its state, and its rows so far.

A state is exact and in one file, or it travels: then it is at most 56 MiB, in parts of at most 14 MiB, and
``NAME.checkpoint`` is a list in JSON of the parts beside it. Where the optimizer's momentum does not fit
into that beside the weights it is kept in bfloat16, and where that does not fit either it is left out and
starts at zero; the state says which. For ResNet-18 the weights alone are 42.6 MiB, so it is left out.
"""

from __future__ import annotations

import copy
import csv
import functools
import glob
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnreg.errors import OptionError
from tnreg.machine.files import write_whole
from tnreg.training.checkpoint import no_checkpoint, save_whole
from tnreg.training.trajectory import Trajectory

FORMAT = "tnreg.locality/2"
_PARTS = "tnreg.locality-parts/1"
_PART, _WHOLE = 14 * 2**20, 56 * 2**20
_BESIDE = 2**20  # random numbers, history and names, beside the weights


def check_travels(net: nn.Module) -> None:
    """Raise an ``OptionError`` for a network whose weights alone are too large to travel."""
    size = sum(value.nbytes for value in net.state_dict().values())
    if size + _BESIDE > _WHOLE:
        raise OptionError(
            f"the network has {size:,} bytes of weights; a state that travels has at most {_WHOLE:,}.\n"
            "  leave out portable, and the state is one file"
        )


def write_state(path: Path, held: Mapping[str, Any], *, portable: bool) -> None:
    """Write a state whole or not at all; the parts of the one before are removed.

    Args:
        path: Replaced if it is there.
        held: What ``torch.load`` reads with ``weights_only``; the optimizer's state under "optimizer".
        portable: Whether it is to travel.
    """
    if not portable:
        save_whole(path, held)
    else:
        raw = _small_enough(held)
        digest = hashlib.sha256(raw).hexdigest()
        pieces = [raw[i : i + _PART] for i in range(0, len(raw), _PART)]
        names = [f"{path.name}.{digest[:8]}.{i + 1}-of-{len(pieces)}" for i in range(len(pieces))]
        for name, piece in zip(names, pieces, strict=True):
            write_whole(path.with_name(name), functools.partial(Path.write_bytes, data=piece))
        text = json.dumps({"format": _PARTS, "sha256": digest, "parts": names}, indent=1) + "\n"
        write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    _remove_parts(path, _parts(path))


def read_state(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Read a state of either kind, of the same settings; nothing in it is executed.

    Raises:
        FileError: Not a state, or a part is missing or damaged.
        OptionError: Of a training with other settings.
    """
    away = f"  delete {path}, or choose another folder"
    try:
        held = _read(path)
        if held["format"] != FORMAT:
            raise ValueError(f"format {held['format']!r}, this version reads {FORMAT!r}")
        before = json.loads(held["about"])
        Trajectory.from_bytes(held["found"].numpy().tobytes())
    except Exception as error:
        raise no_checkpoint(path, error, "folder") from None
    if before != json.loads(json.dumps(about)):
        raise OptionError(f"{path} is of a training with other settings.\n{away}")
    return held


def remove_state(path: Path) -> None:
    """Remove a state and its parts."""
    path.unlink(missing_ok=True)
    _remove_parts(path, [])


class History:
    """The rows of a training as they come, one line an epoch, for whoever looks meanwhile."""

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint.with_name(
            f"{checkpoint.name.removesuffix('.checkpoint')}.history.csv"
        )
        self.begun = False

    def add(self, found: Trajectory) -> None:
        """Add the last row; the first time write all rows anew."""
        if not self.begun:
            text = rows_of(found)
            write_whole(self.path, lambda beside: beside.write_text(text, encoding="utf-8"))
            self.begun = True
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(rows_of(found, len(found) - 1))


def rows_of(found: Trajectory, first: int = 0) -> str:
    """Return the rows from the first one on as CSV, with a header before row 0."""
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    if first == 0:
        writer.writerow(["epoch", *found.names])
    columns = [found.steps, *(found[name] for name in found.names)]
    for k in range(first, len(found)):
        writer.writerow([int(columns[0][k]), *(float(column[k]) for column in columns[1:])])
    return held.getvalue()


def _read(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    if _is_list(raw):
        about = json.loads(raw)
        if about["format"] != _PARTS:
            raise ValueError(f"format {about['format']!r}, this version reads {_PARTS!r}")
        raw = b"".join(part.read_bytes() for part in _parts(path))
        if hashlib.sha256(raw).hexdigest() != about["sha256"]:
            raise ValueError("its parts are not those that were written")
    held: dict[str, Any] = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    return held


def _is_list(raw: bytes) -> bool:
    """Whether these bytes begin as a list of parts does."""
    return raw[:1] == b"{"


def _parts(path: Path) -> list[Path]:
    """Files that the list at ``path`` names; none if there is no list."""
    try:
        raw = path.read_bytes()
        names = json.loads(raw)["parts"] if _is_list(raw) else []
        return [path.with_name(Path(str(name)).name) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _remove_parts(path: Path, but: list[Path]) -> None:
    """Remove the parts beside a list but for some; a process that was killed may have left others."""
    for part in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.*-of-*"):
        if part not in but:
            part.unlink(missing_ok=True)


def _small_enough(held: Mapping[str, Any]) -> bytes:
    """The state in bytes, with as much of the momentum as fits."""
    for kept in ("exact", "bfloat16", "left out"):
        optimizer = copy.deepcopy(dict(held["optimizer"]))
        if kept == "left out":
            optimizer["state"] = {}
        elif kept == "bfloat16":
            optimizer["state"] = {
                key: {name: _half(value) for name, value in one.items()}
                for key, one in optimizer["state"].items()
            }
        raw = io.BytesIO()
        torch.save({**held, "optimizer": optimizer, "momentum": kept}, raw)
        if raw.tell() <= _WHOLE:
            return raw.getvalue()
    raise AssertionError("check_travels was not asked")


def _half(value: Any) -> Any:
    wide = isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64)
    return value.bfloat16() if wide else value
