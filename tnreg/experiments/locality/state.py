"""What a ``locality`` training leaves while it goes on: its state, and its rows so far.

A state is exact and in one file, or it travels: then it is at most 56 MiB, in parts of at most 14 MiB, and
``NAME.checkpoint`` is a list in JSON of the parts beside it. Where the optimizer's momentum does not fit
it is kept in bfloat16 or left out, and then starts at zero; the state says which. For ResNet-18 the weights
alone are 42.6 MiB, so it is left out.
"""

from __future__ import annotations

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
from tnreg.training.checkpoint import no_checkpoint, read_state_bytes, save_whole, state_bytes
from tnreg.training.trajectory import Trajectory

FORMAT = "tnreg.locality/3"
_PARTS = "tnreg.locality-parts/1"
_PART, _WHOLE = 14 * 2**20, 56 * 2**20
_BESIDE = 2**20  # random numbers, history and names, beside the weights


def check_travels(net: nn.Module) -> None:
    """Raise an ``OptionError`` for a network whose weights alone are too large to travel."""
    size = sum(value.nbytes for value in net.state_dict().values())
    if size + _BESIDE > _WHOLE:
        message = f"the network has {size:,} bytes of weights; a state that travels has at most {_WHOLE:,}."
        raise OptionError(f"{message}\n  leave out portable, and the state is one file")


def write_state(path: Path, state: Mapping[str, Any], *, portable: bool) -> None:
    """Write a state, its optimizer's under "optimizer", whole or not at all; remove the parts before it."""
    parts: list[Path] = []
    if not portable:
        save_whole(path, state_bytes(state))
    else:
        raw = _small_enough(state)
        digest = hashlib.sha256(raw).hexdigest()
        pieces = [raw[i : i + _PART] for i in range(0, len(raw), _PART)]
        for i, piece in enumerate(pieces, 1):
            parts.append(path.with_name(f"{path.name}.{digest[:8]}.{i}-of-{len(pieces)}"))
            save_whole(parts[-1], piece)
        about = {"format": _PARTS, "sha256": digest, "parts": [part.name for part in parts]}
        write_text(path, json.dumps(about, indent=1) + "\n")
    _remove_parts(path, parts)


def read_state(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Read a state of either kind, of the same settings; nothing in it is executed.

    Raises:
        FileError: Not a state, or a part is missing or damaged.
        OptionError: Of a training with other settings.
    """
    try:
        state = _read(path)
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']!r}, this version reads {FORMAT!r}")
        before = json.loads(state["about"])
        Trajectory.from_bytes(state["found"].numpy().tobytes())
    except Exception as error:
        raise no_checkpoint(path, error, "folder") from None
    if before != json.loads(json.dumps(about)):
        message = f"{path} is of a training with other settings."
        raise OptionError(f"{message}\n  delete {path}, or choose another folder")
    return state


def remove_state(path: Path) -> None:
    """Remove a state and its parts."""
    path.unlink(missing_ok=True)
    _remove_parts(path, [])


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all."""
    write_whole(path, functools.partial(Path.write_text, data=text, encoding="utf-8"))


def rows_of(rows: Trajectory) -> str:
    """Return the rows of a training, one an epoch, as CSV."""
    text, columns = io.StringIO(), (rows[name].tolist() for name in rows.names)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", *rows.names])
    writer.writerows(zip(rows.steps.tolist(), *columns, strict=True))
    return text.getvalue()


def _read(path: Path) -> dict[str, Any]:
    """Return what the file, or its parts put together, holds."""
    raw = path.read_bytes()
    if raw[:1] == b"{":
        about = json.loads(raw)
        if about["format"] != _PARTS:
            raise ValueError(f"format {about['format']!r}, this version reads {_PARTS!r}")
        parts = [path.with_name(Path(str(name)).name) for name in about["parts"]]
        raw = b"".join(part.read_bytes() for part in parts)
        if hashlib.sha256(raw).hexdigest() != about["sha256"]:
            raise ValueError("its parts are not those that were written")
    return read_state_bytes(raw)


def _remove_parts(path: Path, but: list[Path]) -> None:
    """Remove the parts beside a list but for some; a process that was killed may have left others."""
    for part in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.*-of-*"):
        if part not in but:
            part.unlink(missing_ok=True)


def _small_enough(state: Mapping[str, Any]) -> bytes:
    """Return the state in bytes, with as much of the momentum as fits."""
    momentum, wide = state["optimizer"]["state"], (torch.float32, torch.float64)
    halves = {
        key: {
            name: value.bfloat16() if isinstance(value, Tensor) and value.dtype in wide else value
            for name, value in values.items()
        }
        for key, values in momentum.items()
    }
    for kept, values in (("exact", momentum), ("bfloat16", halves), ("left out", {})):
        optimizer = {**state["optimizer"], "state": values}
        raw = state_bytes({**state, "optimizer": optimizer, "momentum": kept})
        if len(raw) <= _WHOLE:
            return raw
    raise AssertionError("check_travels was not asked")
