"""What was recorded along a training: one row per observation."""

from __future__ import annotations

import ast
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tnreg.errors import DataError, FileError, OptionError, ShapeError, check_integer
from tnreg.machine.files import write_whole

Array = np.ndarray[Any, Any]


class Trajectory(Mapping[str, Any]):
    """Observations along a training, as numpy arrays with one row per observation.

    ``run.steps`` are the numbers of updates done at each observation; ``run["loss"]`` the loss
    there; ``run[name]`` what the function of that name in ``observe`` returned: an array of shape
    ``(rows,)`` for numbers, ``(rows, *shape)`` for tensors, ``{key: array}`` for dicts such as
    local components or spectra. ``run.stop_reason`` says why the training ended. A mapping of names to
    these, but ``len(run)`` counts rows.
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

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def get(self, name: str, default: Any = None) -> Any:
        """Return ``run[name]``, or the default if nothing of that name was observed."""
        return self[name] if name in self else default

    __eq__, __hash__ = object.__eq__, object.__hash__  # a mapping's would compare arrays

    def __array__(self, *_: Any, **__: Any) -> Array:
        raise OptionError("a trajectory is no array; write run[name], or run.to_frame() for pandas.")

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
            DataError: A name that is no text, or a value that is no number, tensor or dict of them.
        """
        for name in values:
            if not isinstance(name, str):
                raise DataError(f"the name of an observation is text, found {name!r}.", argument="values")
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

    def form(self) -> dict[str, Any]:
        """Return the shape of one row of everything observed, ``{key: shape}`` for dicts."""
        return {name: _form(rows[-1]) for name, rows in self._rows.items()}

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per observation; its index is ``steps``.

        Its columns have three levels: the name, the node (or another key of a dict) as text, and the
        component: a number, or text such as ``"0,1"`` in tensors of more axes. Levels that a value does not
        have are empty.

        Raises:
            OptionError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise OptionError("to_frame needs pandas: pip install 'tnreg[data]'") from None
        titles, columns = list[tuple[Any, ...]](), list[Array]()
        for name, value in self.items():
            for key, part in value.items() if isinstance(value, dict) else [("", value)]:
                for place in np.ndindex(part.shape[1:]):
                    component = place[0] if len(place) == 1 else ",".join(map(str, place))
                    titles.append((name, str(key), component))
                    columns.append(part[:, *place])
        frame = pandas.DataFrame(dict(enumerate(columns)), index=pandas.Index(self.steps, name="step"))
        if titles:
            frame.columns = pandas.MultiIndex.from_tuples(titles, names=("name", "node", "component"))
        return frame

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
            title = title if title.isprintable() and len(title) < 200 else "array"  # a zip file's names
            unique, count = title, 1
            while unique in {*arrays, "about", "file", "allow_pickle"}:  # savez has arguments so named
                count += 1
                unique = f"{title} {count}"
            arrays[unique] = array
            return unique

        def titles(name: str, value: Any) -> str | list[list[str]]:
            if not isinstance(value, dict):
                return put(name, value)
            return [[key_text(key), put(f"{name}/{key}", part)] for key, part in value.items()]

        names = {name: titles(name, self[name]) for name in self._rows}
        arrays["about"] = np.array(json.dumps({"stop_reason": self.stop_reason, "names": names}))
        data = io.BytesIO()
        (np.savez_compressed if compressed else np.savez)(data, **arrays)
        return data.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, keys: Iterable[Any] = ()) -> Trajectory:
        """Read what ``to_bytes`` returned. ``keys`` are those of dicts that are no Python literals."""
        run, known = cls(), {key_text(key): key for key in keys}
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
                parts = {known.get(key, _read_key(key)): column(title) for key, title in titles}
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
        return {plain(key): _freeze_array(f"{name}[{key!r}]", part) for key, part in value.items()}
    return _freeze_array(name, value)


def _freeze_array(name: str, value: Any) -> Array:
    try:
        array = as_array(value).copy()  # on the CPU the value goes on changing with the weights
    except ValueError:
        array = np.array(None)
    if array.dtype.kind not in "biufcU":
        message = f"the observation {name!r} is a {type(value).__name__}, which cannot be recorded."
        hint = "return a number, a tensor, or a dict of them"
        raise DataError(f"{message}\n  {hint}", argument="values")
    return array


def as_array(values: Any) -> Array:
    """Return numbers of torch, numpy and others as an array, what is behind a mask as NaN."""
    if hasattr(values, "detach"):  # a tensor; pictures of a trajectory need no torch
        values = values.detach().resolve_conj().resolve_neg().cpu()
        values = (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
    if isinstance(values, np.ma.MaskedArray):
        values = np.ma.filled(values.astype(np.result_type(values, np.float16)), np.nan)
    return np.asarray(values)


def _form(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: part.shape for key, part in value.items()}
    return getattr(value, "shape", None)


def key_text(key: Any) -> str:
    """Return a key of a dict as text, the same one in every process."""
    if isinstance(key, frozenset):
        return f"frozenset({{{', '.join(sorted(map(key_text, key)))}}})"
    if type(key) is tuple:
        return f"({', '.join(map(key_text, key))}{',' * (len(key) == 1)})"
    return repr(key)


def plain(value: Any) -> Any:
    """Return numbers of numpy inside dicts, lists and tuples as Python's: files hold no others."""
    if type(value) in (dict, Counter):
        return type(value)({plain(key): plain(part) for key, part in value.items()})
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _read_key(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
