"""Lists of values as they are written, and the cells that they span.

``plain,igc`` are two values, ``0:5`` the integers 0 to 4, ``0:20:5`` every fifth of 0 to 19, and
``none`` no value where one may be left out. Commas inside brackets belong to a value:
``htf-4,[[0,2],[1,3]]`` are two trees.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from tnreg.errors import OptionError


def parse(text: str, kind: Any, name: str) -> tuple[Any, ...]:
    """The values of a list.

    Args:
        text: As written.
        kind: Type of one value: str, int, float, bool, a Literal, or one of them or None.
        name: Whose list it is, for the message.

    Raises:
        OptionError: A value is not of its kind, stands there twice, or is missing.

    Example:
        >>> parse("0:20:5,40", int, "distance")
        (0, 5, 10, 15, 40)
        >>> parse("htf-4,[[0,2],[1,3]]", str, "tree")
        ('htf-4', '[[0,2],[1,3]]')
    """
    found = tuple(itertools.chain(*(_values(part, kind, name) for part in _split(text, name))))
    if not found:
        raise OptionError(f"{name}: {text!r} has no values.")
    twice = next((value for i, value in enumerate(found) if value in found[:i]), None)
    if len(set(found)) < len(found):
        raise OptionError(f"{name}: {twice!r} stands twice in {text!r}.")
    return found


def written(values: Sequence[Any]) -> str:
    """The list of values, as ``parse`` reads it."""
    return ",".join("none" if value is None else str(value) for value in values)


def shape(kind: Any) -> str:
    """How a list of that kind is written, for a help text."""
    single, optional = _unwrapped(kind)
    if typing.get_origin(single) is Literal:
        names = "|".join(map(str, typing.get_args(single)))
    else:
        names = {int: "INT|A:B", float: "FLOAT", bool: "true|false"}.get(single, "STR")
    return f"{names}{'|none' if optional else ''},..."


def cells(grid: Any, kind: type) -> list[dict[str, Any]]:
    """Settings of every cell: all combinations, the first field changing fastest and the seed slowest.

    Args:
        grid: Has for every scalar field of ``kind`` a tuple of values, for any other its value.
        kind: Dataclass of one cell.
    """
    scalar = scalars(kind)
    order = [f.name for f in dataclasses.fields(kind)]
    order.sort(key=lambda name: name == "seed")  # one seed is complete before the next begins
    lists = [getattr(grid, name) if name in scalar else (getattr(grid, name),) for name in order]
    found = []
    for values in itertools.product(*reversed(lists)):
        one = dict(zip(reversed(order), values, strict=True))
        found.append(dataclasses.asdict(kind(**one)))
    return found


def scalars(kind: type) -> dict[str, Any]:
    """Fields of a dataclass that are no tuples, with their types."""
    hints = typing.get_type_hints(kind)
    kinds = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    return {name: one for name, one in kinds.items() if typing.get_origin(one) is not tuple}


def _split(text: str, name: str) -> list[str]:
    """Parts between commas that are outside all brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth != 0:
        raise OptionError(f"{name}: a bracket is not closed, or not opened, in {text!r}.")
    if not all(part.strip() for part in parts):
        raise OptionError(f"{name}: a value is missing in {text!r}; write e.g. A,B,C.")
    return [part.strip() for part in parts]


def _values(part: str, kind: Any, name: str) -> Sequence[Any]:
    """One value, or those of a range."""
    single, optional = _unwrapped(kind)
    if optional and part == "none":
        return [None]
    if typing.get_origin(single) is Literal:
        choices = typing.get_args(single)
        if part not in choices:
            raise OptionError(f"{name}: no {part!r}; there is {', '.join(choices)}.")
        return [part]
    try:
        if single is int and ":" in part:
            bounds = [int(bound) for bound in part.split(":")]
            if len(bounds) in (2, 3) and (found := range(*bounds)):
                return found
            raise ValueError("an empty range")
        if single is bool:
            return [{"true": True, "false": False}[part.lower()]]
        return [single(part)]
    except (ValueError, KeyError):
        wanted = {
            int: "an integer or a range such as 0:5 or 0:20:5", float: "a number",
            bool: "true or false",
        }  # fmt: skip
        raise OptionError(f"{name}: {part!r} is not {wanted[single]}.") from None


def _unwrapped(kind: Any) -> tuple[Any, bool]:
    """The type without None, and whether None was there."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        single = [one for one in typing.get_args(kind) if one is not type(None)]
        return single[0], len(single) < len(typing.get_args(kind))
    return kind, False
