"""The command ``tnreg sweep``: its experiments, and lists of values as options.

``plain,igc`` are two values, ``0:5`` the integers 0 to 4, ``0:20:5`` every fifth of 0 to 19, and
``none`` no value where one may be left out. Commas inside brackets belong to a value:
``htf-4,[[0,2],[1,3]]`` are two trees.
"""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from tnreg.errors import OptionError, blame
from tnreg.experiments import dynamics, locality
from tnreg.experiments.dynamics import init_scale
from tnreg.experiments.sweep.experiment import Experiment

KINDS: dict[str, tuple[Experiment, type, Mapping[str, Any], str]] = {
    "locality": (
        locality.EXPERIMENT, locality.Training, {"": locality.digits, **locality.SETS},
        "Regularizers that make networks see far.",
    ),
    "dynamics": (
        init_scale.DYNAMICS, dynamics.Config, {"": dynamics.htf, **dynamics.MODELS},
        "Components learned one after another.",
    ),
}  # fmt: skip
"""By the name of its command: the experiment, the class of a cell, presets, and help in one line."""


class Values(tuple[Any, ...]):
    """The values of an option that takes a list; its text is what ``parse`` reads."""

    def __str__(self) -> str:
        return ",".join("none" if value is None else str(value) for value in self)


def options(name: str, preset: str) -> Any:
    """Return the lists of a preset, in a dataclass of the cell's fields that tyro reads.

    A list is expected for every field but tuples; a preset's ``seeds`` are values of the field ``seed``.
    """
    _, cell, presets, _ = KINDS[name]
    preset_values, fields = vars(presets.get(preset, presets[""])), []
    for field, kind in typing.get_type_hints(cell).items():
        if typing.get_origin(kind) is tuple:
            fields.append((field, kind, preset_values[field]))
        else:
            values = Values(preset_values.get(f"{field}s") or [preset_values[field]])
            fields.append((field, Annotated[Values, _reader(kind, field)], values))
    return dataclasses.make_dataclass(f"Sweep{cell.__name__}", fields, bases=(cell,), frozen=True)()


def cells(grid: Any) -> tuple[str, list[dict[str, Any]]]:
    """Return the name of what is swept, and all combinations of the lists of ``options``.

    The first field changes fastest and the seed slowest: one seed is complete before the next begins.
    """
    name = next(name for name, kind in KINDS.items() if isinstance(grid, kind[1]))
    lists = {field: v if isinstance(v, Values) else (v,) for field, v in vars(grid).items()}
    order = ["seed", *(field for field in reversed(lists) if field != "seed")]
    combinations = itertools.product(*(lists[field] for field in order))
    settings = [lists | dict(zip(order, values, strict=True)) for values in combinations]
    if name == "locality":
        for one in settings:
            locality.check(one)
    return name, settings


def parse(text: str, kind: Any, name: str) -> Values:
    """Return the values of a list, of type str, int, float, bool, a Literal, or one of them or None.

    Raises:
        OptionError: A value of the option of this name is not of its kind, is repeated, or is missing.
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    with blame(name):
        if depth != 0:
            raise OptionError(f"{name}: a bracket is not closed, or not opened, in {text!r}.")
        if not all(part.strip() for part in parts):
            raise OptionError(f"{name}: a value is missing in {text!r}; write e.g. A,B,C.")
        values = [value for part in parts for value in _values(part.strip(), kind, name)]
        for value in values:
            if values.count(value) > 1:
                raise OptionError(f"{name}: {value!r} stands twice in {text!r}.")
    return Values(values)


def _values(part: str, kind: Any, name: str) -> list[Any]:
    """Return one value, or those of a range."""
    single, optional, choices = _split(kind)
    if optional and part == "none":
        return [None]
    if choices:
        if part not in choices:
            raise OptionError(f"{name}: no {part!r}; there is {', '.join(choices)}.")
        return [part]
    try:
        if single is int and ":" in part:
            return list(range(*map(int, part.split(":")))) or [int("")]  # empty: an error as well
        return [{"true": True, "false": False}[part.lower()] if single is bool else single(part)]
    except (ValueError, TypeError, KeyError):
        wanted = {int: "an integer or a range such as 0:5 or 0:20:5", float: "a number"}
        text = wanted.get(single, "true or false")
        raise OptionError(f"{name}: {part!r} is not {text}.") from None


def _reader(kind: Any, name: str) -> PrimitiveConstructorSpec[Values]:
    """Tell tyro how an option with a list of values is read and written."""
    single, optional, choices = _split(kind)
    shapes = {int: "INT|A:B", float: "FLOAT", bool: "true|false", str: "STR"}
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{'|'.join(choices) or shapes[single]}{'|none' if optional else ''},...",
        instance_from_str=lambda words: parse(words[0], kind, name),
        is_instance=lambda value: isinstance(value, Values),
        str_from_instance=lambda values: [str(values)],
    )


def _split(kind: Any) -> tuple[Any, bool, tuple[str, ...]]:
    """Return the type without None, whether None was part of it, and the choices of a Literal."""
    optional = type(None) in typing.get_args(kind)
    single = typing.get_args(kind)[0] if optional else kind
    return single, optional, typing.get_args(single)
