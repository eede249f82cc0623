"""What a sweep writes when its cells are done: rows, ``config.json``, ``results.csv``."""

from __future__ import annotations

import csv
import io
import json
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnreg.errors import OptionError
from tnreg.experiments.sweep.pictures import number
from tnreg.experiments.sweep.workers import Failed
from tnreg.machine.files import write_whole
from tnreg.machine.versions import versions

if TYPE_CHECKING:
    pass

_OWN = (
    "tnreg", "torch", "python", "experiment", "fields", "headline", "summary", "failed", "table",
)  # fmt: skip


@dataclass(frozen=True)
class About:
    """``config.json`` of a sweep.

    Attributes:
        what: The experiment.
        fields: Fields in every row.
        extra: What else it shall hold; ``config`` takes the place of what was swept.
        config: What was swept.

    Raises:
        OptionError: ``extra`` is no dict of values for JSON, or names what the sweep itself writes.
    """

    title: str
    fields: tuple[str, ...]
    extra: Mapping[str, Any]
    config: dict[str, Any]

    def __post_init__(self) -> None:
        try:
            if not isinstance(self.extra, Mapping):
                raise TypeError(f"found a {type(self.extra).__name__}")
            json.dumps(dict(self.extra))
        except (TypeError, ValueError, RecursionError) as error:
            raise OptionError(f"sweep: about is a dict of values for JSON: {error}") from None
        own = [name for name in _OWN if name in self.extra]
        if own:
            raise OptionError(
                f"sweep: about cannot hold {', '.join(own)}, which the sweep writes itself; "
                "choose another name."
            )

    def write(
        self, place: Path, rows: list[dict[str, Any]], table: list[dict[str, Any]],
        headline: str, failed: list[Failed],
    ) -> None:  # fmt: skip
        """Write it; numbers that are not finite are null, for JSON has no others."""
        told = {
            **versions(), "experiment": self.title,
            "config": self.config, "fields": self.fields, "headline": headline, "summary": rows,
            "failed": [_told(one) for one in failed], "table": table, **self.extra,
        }  # fmt: skip
        text = json.dumps(_finite(told), indent=1, allow_nan=False) + "\n"
        write_whole(place / "config.json", lambda beside: beside.write_text(text, encoding="utf-8"))


def row_of(
    fields: Sequence[str], settings: Mapping[str, Any], results: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields, then results; one that is named like a field but differs is ``NAME (result)``."""
    row = {name: settings[name] for name in fields}
    for key, value in results.items():
        key, value = _writable(key), _writable(value)
        if key not in fields:
            row[key] = value
        elif json.dumps(value) != json.dumps(settings[key]):
            row[f"{key} (result)"] = value
    return row


def headline_of(rows: list[dict[str, Any]], fields: Sequence[str], wanted: str) -> str:
    """The column to draw: the wanted one, or the first result, that is a finite number somewhere."""
    columns = dict.fromkeys([wanted, *(key for row in rows for key in row if key not in fields)])
    return next((c for c in columns if any(number(row.get(c)) is not None for row in rows)), "")


def shown(row: Mapping[str, Any], headline: str) -> str:
    """The headline of a row, for the progress bar."""
    value = number(row.get(headline))
    return "" if value is None else f"{headline} {value:.4g}"


def write_rows(place: Path, rows: list[dict[str, Any]], parquet: bool) -> None:
    """Write ``results.csv``, and ``results.parquet`` if wanted."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    held = io.StringIO()
    writer = csv.DictWriter(held, names)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(
        place / "results.csv", lambda beside: beside.write_text(held.getvalue(), encoding="utf-8")
    )
    if parquet:
        arrow, files = load_pyarrow()
        columns = {}
        for name in names:
            values = [row.get(name) for row in rows]
            try:
                columns[name] = arrow.array(values)
            except (arrow.ArrowException, OverflowError):  # of several kinds, or too large
                columns[name] = arrow.array([None if v is None else str(v) for v in values])
        held_table = arrow.table(columns)
        write_whole(place / "results.parquet", lambda beside: files.write_table(held_table, beside))


def load_pyarrow() -> tuple[Any, Any]:
    """Pyarrow and its module for files.

    Raises:
        OptionError: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise OptionError(
            "parquet needs pyarrow: pip install pyarrow; results.csv holds the same rows.",
            argument="parquet",
        ) from None
    return pyarrow, pyarrow.parquet


def _told(failed: Failed) -> dict[str, Any]:
    lines = traceback.format_exception(failed.exception)
    return {
        "name": failed.cell.name,
        "config": failed.cell.settings,
        "error": failed.error,
        "traceback": failed.traceback or "".join(lines),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _writable(value: Any) -> Any:
    """Text that a file can hold: half a pair of surrogates is written as its number."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return value
