"""What was recorded along a training: one row per observation."""

from __future__ import annotations

import ast
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from tnreg.errors import DataError, FileError, OptionError, ShapeError, check_integer
from tnreg.machine.files import write_whole

Array = np.ndarray[Any, Any]


class Trajectory:
    """Observations along a training, as numpy arrays with one row per observation.

    ``run.steps`` are the numbers of updates done at each observation; ``run["loss"]`` the loss
    there; ``run[name]`` what the function of that name in ``observe`` returned: an array of shape
    ``(rows,)`` for numbers, ``(rows, *shape)`` for tensors, ``{key: array}`` for dicts such as
    local components or spectra. ``run.stop_reason`` says why the training ended.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rows: dict[str, list[Any]] = {}
        self.stop_reason: str = ""

    @property
    def steps(self) -> Array:
        """Updates done at each observation, shape ``(rows,)``, int64."""
        return np.asarray(self._steps, dtype=np.int64)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what was observed, the loss first."""
        return tuple(self._rows)

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __getitem__(self, name: str) -> Any:
        return self.last(name, max(len(self), 1))

    def last(self, name: str, rows: int = 1) -> Any:
        """The last ``rows`` rows of one name (fewer if there are not so many), shaped as in ``run[name]``.

        For stop functions: it does not read all the rows before.
        """
        if name not in self._rows:
            raise OptionError(
                f"nothing named {name!r} was observed; there is: {', '.join(self._rows)}."
            )
        return _stacked(self._rows[name][-check_integer(rows, 1, "last: rows") :])

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one row. Every row must have the same names and shapes; nothing is added otherwise.

        Raises:
            ShapeError: A name is new or missing, or a value has another shape than before.
            DataError: A value that is no number, tensor or dict of them.
        """
        row = {name: _freeze(name, value) for name, value in values.items()}
        if self._steps:
            for name in {**row, **self._rows}:
                now = _form(row.get(name))
                before = _form(self._rows[name][-1]) if name in self._rows else None
                if now != before:
                    raise ShapeError(
                        f"the observation {name!r} changed its form at step {step}.\n"
                        f"  before: {before}\n  now:    {now}\n"
                        "  an observation returns the same shapes (and keys) every time"
                    )
        for name, value in row.items():
            self._rows.setdefault(name, []).append(value)
        self._steps.append(int(step))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file, whole or not at all.

        Its arrays are ``steps``, every recorded name, and ``name/key`` for every key of a dict (a
        number is appended where two would be called alike); ``about`` holds which is which.
        """
        write_whole(path, lambda beside: self._write(beside, zipfile.ZIP_DEFLATED))

    def to_bytes(self) -> bytes:
        """What ``save`` writes, not compressed."""
        held = io.BytesIO()
        self._write(held, zipfile.ZIP_STORED)
        return held.getvalue()

    def _write(self, to: Path | io.BytesIO, compression: int) -> None:
        arrays: dict[str, Array] = {"steps": self.steps}
        names: dict[str, Any] = {}

        def put(title: str, array: Array) -> str:
            unique, count = title, 1
            while unique in arrays or unique == "about":
                count += 1
                unique = f"{title} {count}"
            arrays[unique] = array
            return unique

        for name in self._rows:
            value = self[name]
            if isinstance(value, dict):
                names[name] = [
                    [repr(key), put(f"{name}/{key}", part)] for key, part in value.items()
                ]
            else:
                names[name] = put(name, value)
        about = json.dumps({"stop_reason": self.stop_reason, "names": names})
        arrays["about"] = np.array(about)

        # numpy's savez takes names as keyword arguments, of which some are its own
        with zipfile.ZipFile(to, "w", compression) as file:
            for title, array in arrays.items():
                with file.open(f"{title}.npy", "w", force_zip64=True) as raw:
                    np.lib.format.write_array(raw, np.asanyarray(array), allow_pickle=False)

    @classmethod
    def from_bytes(cls, held: bytes) -> Trajectory:
        """Read what ``to_bytes`` gave."""
        return cls._read(io.BytesIO(held))

    @classmethod
    def _read(cls, raw: BinaryIO) -> Trajectory:
        run = cls()
        with np.load(raw, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            run.stop_reason = str(about["stop_reason"])
            run._steps = [int(step) for step in file["steps"]]

            def rows(title: str) -> Array:
                array: Array = file[title]
                if len(array) != len(run):
                    raise ValueError(f"{len(array)} rows of {title!r} for {len(run)} steps")
                return array

            for name, stored in about["names"].items():
                if isinstance(stored, str):
                    run._rows[name] = list(rows(stored))
                    continue
                columns = {_read_key(key): rows(title) for key, title in stored}
                run._rows[name] = [
                    {key: column[i] for key, column in columns.items()} for i in range(len(run))
                ]
        return run

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trajectory:
        """Read what ``save`` wrote.

        Raises:
            FileError: There is no such file, or it is not a trajectory.
        """
        try:
            # opened here: numpy leaves a file open that it cannot read
            with open(path, "rb") as raw:
                return cls._read(raw)
        except FileNotFoundError:
            raise FileError(f"no such trajectory file: {path}") from None
        except Exception as error:
            raise FileError(
                f"not a trajectory file: {path}\n  {type(error).__name__}: {error}\n"
                "  expected: an .npz file that Trajectory.save wrote"
            ) from None

    def __repr__(self) -> str:
        last = f", last step {self._steps[-1]}" if self._steps else ""
        names, state = ", ".join(self._rows), self.stop_reason or "running"
        return f"<Trajectory of {len(self)} rows{last}: {names}; {state}>"


def _stacked(rows: list[Any]) -> Any:
    if rows and isinstance(rows[0], dict):
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return np.stack(rows) if rows else np.empty(0)


def _freeze(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _freeze_array(f"{name}[{key!r}]", part) for key, part in value.items()}
    return _freeze_array(name, value)


def _freeze_array(name: str, value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().resolve_conj().resolve_neg().cpu()
        if value.dtype == torch.bfloat16:
            value = value.float()  # numpy has no such type
        # a copy: on the CPU .numpy() alone would go on changing with the weights
        copied: Array = value.numpy().copy()
        return copied
    try:
        array = np.array(value)
    except ValueError:
        array = np.array(None)
    if array.dtype.kind not in "biufcU":
        raise DataError(
            f"the observation {name!r} is a {type(value).__name__}, which cannot be recorded.\n"
            "  return a number, a tensor, or a dict of them"
        )
    return array


def _form(value: Any) -> Any:
    return (
        {k: v.shape for k, v in value.items()}
        if isinstance(value, dict)
        else getattr(value, "shape", None)
    )


def _read_key(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
