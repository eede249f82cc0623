"""What was recorded along a training: one row per observation."""

from __future__ import annotations

import ast
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __getitem__(self, name: str) -> Any:
        return self.last(name, max(len(self), 1))

    def last(self, name: str, rows: int = 1) -> Any:
        """Return the last ``rows`` rows of ``run[name]``, or all if there are fewer, without reading more."""
        if name not in self._rows:
            message = f"nothing named {name!r} was observed; there is: {', '.join(self._rows)}."
            raise OptionError(message, argument="name")
        values = self._rows[name][-check_integer(rows, 1, "last: rows") :]
        if values and isinstance(values[0], dict):
            return {key: np.stack([row[key] for row in values]) for key in values[0]}
        return np.stack(values) if values else np.empty(0)

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one row. Every row must have the same names and shapes; nothing is added otherwise.

        Raises:
            ShapeError: A name is new or missing, or a value has another shape than before.
            DataError: A value that is no number, tensor or dict of them.
        """
        row = {name: _freeze(name, value) for name, value in values.items()}
        for name in {**row, **self._rows} if self._steps else ():
            now, before = _form(row.get(name)), _form(self._rows.get(name, [None])[-1])
            if now != before:
                message = f"the observation {name!r} changed its form at step {step}."
                message += f"\n  before: {before}\n  now:    {now}"
                hint = "an observation returns the same shapes (and keys) every time"
                raise ShapeError(f"{message}\n  {hint}", argument="values")
        for name, value in row.items():
            self._rows.setdefault(name, []).append(value)
        self._steps.append(int(step))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file, whole or not at all.

        Its arrays are ``steps``, every recorded name, and ``name/key`` for every key of a dict (a
        number is appended where a title is taken); ``about`` maps names to arrays.
        """
        data = self.to_bytes(compressed=True)
        write_whole(path, lambda beside: beside.write_bytes(data))

    def to_bytes(self, *, compressed: bool = False) -> bytes:
        """Return what ``save`` writes, by default not compressed."""
        arrays: dict[str, Any] = {"steps": self.steps}

        def put(title: str, array: Array) -> str:
            unique, count = title, 1
            while unique in {*arrays, "about", "file", "allow_pickle"}:  # savez has arguments so named
                count += 1
                unique = f"{title} {count}"
            arrays[unique] = array
            return unique

        def titles(name: str, value: Any) -> str | list[list[str]]:
            if not isinstance(value, dict):
                return put(name, value)
            return [[repr(key), put(f"{name}/{key}", part)] for key, part in value.items()]

        names = {name: titles(name, self[name]) for name in self._rows}
        arrays["about"] = np.array(json.dumps({"stop_reason": self.stop_reason, "names": names}))
        data = io.BytesIO()
        (np.savez_compressed if compressed else np.savez)(data, **arrays)
        return data.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Trajectory:
        """Read what ``to_bytes`` returned."""
        run = cls()
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            run.stop_reason = str(about["stop_reason"])
            run._steps = [int(step) for step in file["steps"]]

            def column(title: str) -> Array:
                array: Array = file[title]
                if len(array) != len(run):
                    raise ValueError(f"{len(array)} rows of {title!r} for {len(run)} steps")
                return array

            for name, titles in about["names"].items():
                if isinstance(titles, str):
                    run._rows[name] = list(column(titles))
                    continue
                parts = {_read_key(key): column(title) for key, title in titles}
                run._rows[name] = [{k: part[i] for k, part in parts.items()} for i in range(len(run))]
        return run

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trajectory:
        """Read what ``save`` wrote.

        Raises:
            FileError: There is no such file, or it is not a trajectory.
        """
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except FileNotFoundError:
            raise FileError(f"no such trajectory file: {path}", argument="path") from None
        except Exception as error:
            message = f"not a trajectory file: {path}\n  {type(error).__name__}: {error}"
            expected = "expected: an .npz file that Trajectory.save wrote"
            raise FileError(f"{message}\n  {expected}", argument="path") from None

    def __repr__(self) -> str:
        last = f", last step {self._steps[-1]}" if self._steps else ""
        names, state = ", ".join(self._rows), self.stop_reason or "running"
        return f"<Trajectory of {len(self)} rows{last}: {names}; {state}>"


def _freeze(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _freeze_array(f"{name}[{key!r}]", part) for key, part in value.items()}
    return _freeze_array(name, value)


def _freeze_array(name: str, value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().resolve_conj().resolve_neg().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    try:
        array = np.array(value)  # a copy: on the CPU the value goes on changing with the weights
    except ValueError:
        array = np.array(None)
    if array.dtype.kind not in "biufcU":
        message = f"the observation {name!r} is a {type(value).__name__}, which cannot be recorded."
        hint = "return a number, a tensor, or a dict of them"
        raise DataError(f"{message}\n  {hint}", argument="values")
    return array


def _form(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: part.shape for key, part in value.items()}
    return getattr(value, "shape", None)


def _read_key(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
