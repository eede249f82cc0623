"""The command ``tnreg sweep``: its experiments, and lists of values as options.

``plain,igc`` are two values, ``0:5`` the integers 0 to 4, ``0:20:5`` every fifth of 0 to 19, and
``none`` no value where one may be left out. Commas inside brackets belong to a value:
``htf-4,[[0,2],[1,3]]`` are two trees.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.constructors import PrimitiveConstructorSpec

from tnreg.errors import OptionError, blame
from tnreg.experiments import dynamics, locality
from tnreg.experiments.dynamics import init_scale
from tnreg.experiments.sweep.experiment import Experiment


@dataclass(frozen=True)
class Kind:
    """An experiment that the command line sweeps.

    Attributes:
        name: Name of its command.
        experiment: What is swept.
        cell: Dataclass of one cell.
        presets: Default settings by name, the first where none is named; a list of values of the field
            ``seed`` is their field ``seeds``.
        about: Its help in one line.
        check: Raises an error for settings of a cell that cannot be.
    """

    name: str
    experiment: Experiment
    cell: type
    presets: Mapping[str, Any]
    about: str
    check: Callable[[Mapping[str, Any]], Any] = lambda cell: None


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "locality", locality.EXPERIMENT, locality.Training, {"": locality.digits, **locality.SETS},
            "Regularizers that make networks see far.", locality.check,
        ),
        Kind(
            "dynamics", init_scale.DYNAMICS, dynamics.Config, {"": dynamics.htf, **dynamics.MODELS},
            "Components learned one after another.",
        ),
    )
}  # fmt: skip


def options(kind: Kind) -> type:
    """Return the dataclass of a cell with a list of values for every scalar field, for tyro to read."""
    fields: list[tuple[str, Any, Any]] = [
        (name, Annotated[tuple, _reader(one, name)], dataclasses.field(default=()))
        for name, one in _scalars(kind.cell).items()
    ]
    return dataclasses.make_dataclass(
        f"Sweep{kind.cell.__name__}", fields, bases=(kind.cell,), frozen=True
    )


def preset(kind: Kind, name: str) -> dict[str, Any]:
    """Return the default lists of values, those of a preset of ``run``."""
    base, scalars = kind.presets.get(name, kind.presets[""]), _scalars(kind.cell)
    values = {}
    for field in (f.name for f in dataclasses.fields(kind.cell)):
        if hasattr(base, f"{field}s"):
            values[field] = getattr(base, f"{field}s")
        else:
            values[field] = (getattr(base, field),) if field in scalars else getattr(base, field)
    return values


def cells(grid: Any) -> tuple[Kind, list[dict[str, Any]]]:
    """Return what is swept, and all combinations of the lists of ``grid``.

    The first field changes fastest and the seed slowest: one seed is complete before the next begins.
    """
    kind = next(kind for kind in KINDS.values() if isinstance(grid, kind.cell))
    scalars = _scalars(kind.cell)
    names = sorted((f.name for f in dataclasses.fields(kind.cell)), key=lambda n: n == "seed")[::-1]
    lists = [getattr(grid, n) if n in scalars else (getattr(grid, n),) for n in names]
    configs = [kind.cell(**dict(zip(names, v, strict=True))) for v in itertools.product(*lists)]
    settings = [dataclasses.asdict(config) for config in configs]
    for cell in settings:
        kind.check(cell)
    return kind, settings


def parse(text: str, kind: Any, name: str) -> tuple[Any, ...]:
    """Return the values of a list.

    Args:
        text: The list as written.
        kind: Type of one value: str, int, float, bool, a Literal, or one of them or None.
        name: Name of the option, for the message.

    Raises:
        OptionError: A value is not of its kind, is repeated, or is missing.

    Example:
        >>> parse("0:20:5,40", int, "distance")
        (0, 5, 10, 15, 40)
        >>> parse("htf-4,[[0,2],[1,3]]", str, "tree")
        ('htf-4', '[[0,2],[1,3]]')
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
        for i, value in enumerate(values):
            if value in values[:i]:
                raise OptionError(f"{name}: {value!r} stands twice in {text!r}.")
    return tuple(values)


def written(values: tuple[Any, ...]) -> str:
    """Return the list of values as ``parse`` reads it."""
    return ",".join("none" if value is None else str(value) for value in values)


def _values(part: str, kind: Any, name: str) -> list[Any]:
    """Return one value, or those of a range."""
    single, optional = _without_none(kind)
    if optional and part == "none":
        return [None]
    if typing.get_origin(single) is Literal:
        choices = typing.get_args(single)
        if part not in choices:
            raise OptionError(f"{name}: no {part!r}; there is {', '.join(choices)}.", argument=name)
        return [part]
    try:
        if single is int and part.count(":") in (1, 2):
            integers = list(range(*map(int, part.split(":"))))
            if not integers:
                raise ValueError("an empty range")
            return integers
        return [{"true": True, "false": False}[part.lower()] if single is bool else single(part)]
    except (ValueError, KeyError):
        wanted = {
            int: "an integer or a range such as 0:5 or 0:20:5", float: "a number",
            bool: "true or false",
        }  # fmt: skip
        raise OptionError(f"{name}: {part!r} is not {wanted[single]}.") from None


def _reader(kind: Any, name: str) -> PrimitiveConstructorSpec[tuple[Any, ...]]:
    """Tell tyro how an option with a list of values is read and written."""
    single, optional = _without_none(kind)
    shapes = {int: "INT|A:B", float: "FLOAT", bool: "true|false"}
    choices = "|".join(map(str, typing.get_args(single)))
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{choices or shapes.get(single, 'STR')}{'|none' if optional else ''},...",
        instance_from_str=lambda words: parse(words[0], kind, name),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [written(values)],
    )


def _scalars(kind: type) -> dict[str, Any]:
    """Return the fields of a dataclass that are no tuples, with their types."""
    hints = typing.get_type_hints(kind)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {name: one for name, one in kinds.items() if typing.get_origin(one) is not tuple}


def _without_none(kind: Any) -> tuple[Any, bool]:
    """Return the type without None, and whether None was part of it."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        single = [one for one in typing.get_args(kind) if one is not type(None)]
        return single[0], len(single) < len(typing.get_args(kind))
    return kind, False
