"""Settings of the cells of a sweep: as JSON has them, what varies, and what each cell is named."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tnreg.errors import OptionError

_LONGEST = 120  # file systems take 255 bytes; temporary names beside are longer


def cell_name(cell: Mapping[str, Any], fields: Sequence[str]) -> str:
    """``FIELD-VALUE-FIELD-VALUE``; values that a file name cannot hold are shortened, with a hash."""
    return "-".join(f"{one}-{_as_name(cell[one])}" for one in fields)


def plain(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a cell as JSON gives them back.

    Raises:
        OptionError: They are no values for JSON.
    """
    try:
        text = json.dumps(dict(cell), ensure_ascii=False)
        text.encode()  # half a pair of surrogates is no text that a file could hold
        found: dict[str, Any] = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"sweep: a cell is a dict of values for JSON: {error}") from None
    return found


def varying(cells: list[dict[str, Any]], always: Sequence[str]) -> tuple[str, ...]:
    """Fields that are always named, those that are not the same in all cells, the seed last.

    Raises:
        OptionError: No cells, or cells with different fields.
    """
    if not cells:
        raise OptionError("sweep: no cells; give at least one.")
    for cell in cells:
        if cell.keys() != cells[0].keys():
            differ = ", ".join(sorted(cell.keys() ^ cells[0].keys()))
            raise OptionError(f"sweep: cells with different fields: not all have {differ}.")
    # compared as text, as NaN is not equal to itself
    vary = [key for key in cells[0] if len({_text(cell[key]) for cell in cells}) > 1]
    fields = list(dict.fromkeys((*always, *vary))) or list(cells[0])
    return tuple(sorted(fields, key=lambda name: name == "seed"))


def named(
    cells: list[dict[str, Any]],
    fields: tuple[str, ...],
    name: Callable[[Mapping[str, Any], Sequence[str]], str],
) -> list[str]:
    """The name of each cell; a hash of its fields ends it where cells would share it or it is long.

    Raises:
        OptionError: A name that no folder can have, or two cells with the same settings.
    """
    names = [name(cell, fields) for cell in cells]
    for one in names:
        if not re.fullmatch(r"[^./\\][^/\\]*", one):
            raise OptionError(f"sweep: a cell cannot be named {one!r}; it names a folder.")
    settings = Counter(map(_text, cells))
    for one, cell in zip(names, cells, strict=True):
        if settings[_text(cell)] > 1:
            raise OptionError(
                f"sweep: two cells have the same settings, those of {one!r}; give each cell once."
            )
    shared = Counter(names)
    found = [
        _with_hash(one, {key: cell[key] for key in fields})
        if shared[one] > 1 or len(os.fsencode(one)) > _LONGEST
        else one
        for one, cell in zip(names, cells, strict=True)
    ]
    twice = next((one for one, count in Counter(found).items() if count > 1), None)
    if twice is not None:
        raise OptionError(f"sweep: cells of different settings are all named {twice!r}.")
    return found


def swept(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Each field's value, or the list of its values where they vary."""
    values: dict[str, Any] = {}
    for key in cells[0]:
        differ = list(dict.fromkeys(json.dumps(cell[key]) for cell in cells))
        values[key] = cells[0][key] if len(differ) == 1 else [json.loads(v) for v in differ]
    return values


def short_hash(value: Any) -> str:
    """Eight digits that tell values for JSON apart."""
    return hashlib.sha256(_text(value).encode()).hexdigest()[:8]


def _with_hash(name: str, settings: dict[str, Any]) -> str:
    while len(os.fsencode(name)) > _LONGEST - 9:
        name = name[:-1]
    return f"{name}-{short_hash(settings)}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _as_name(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    short = re.sub(r"[^A-Za-z0-9._+=-]+", "_", text).strip("_")[:48]
    # values that are shortened to the same text never share a name
    return short if short == text else f"{short}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
