"""The table and the picture of any sweep: one result against what varies, seeds taken together."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnreg.experiments.folder import read_about, reading
from tnreg.plots import save_figure


def means(rows: list[dict[str, Any]], fields: Sequence[str], headline: str) -> list[dict[str, Any]]:
    """Return the mean and deviation of ``headline`` over seeds, a row for each set of other fields.

    The deviation is that of a sample (n - 1); NaN for one seed. Cells without a finite number are left out.
    """
    return _grouped(rows, [name for name in fields if name != "seed"], headline)


def _grouped(rows: list[dict[str, Any]], by: Sequence[str], headline: str) -> list[dict[str, Any]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if number(row.get(headline)) is not None:
            groups.setdefault(json.dumps([row[name] for name in by]), []).append(row)
    table = []
    for group in groups.values():
        values = np.array([float(row[headline]) for row in group])
        table.append(
            {
                **{name: group[0][name] for name in by},
                "seeds": len(group),
                headline: float(values.mean()),
                "deviation": float(values.std(ddof=1)) if len(group) > 1 else math.nan,
            }
        )
    return table


def read_sweep(folder: str | Path) -> dict[str, Any]:
    """Return what ``config.json`` of a sweep holds.

    Raises:
        FileError: There is no such file, or it has no results yet.
    """
    place = Path(folder)
    with reading("a finished sweep", place):
        about = read_about(place)
        rows = about["summary"]
        if not isinstance(rows, list):
            raise ValueError("not a table of results")
        if not rows:
            raise ValueError("no results yet")
        rows[0].keys()
    return about


def figure(folder: str | Path, png: str | Path | None = None) -> Path:
    """Draw the headline of a sweep against the first field of numbers, into ``sweep.png``.

    Points are means over seeds and bars their standard deviations, with a line for each set of the other
    fields. Without a field of numbers the first field is drawn by name; without any field, the seeds.

    Raises:
        FileError: Not a finished sweep.
    """
    from matplotlib.figure import Figure

    place = Path(folder)
    about = read_sweep(place)
    with reading("a finished sweep", place):
        headline = about["headline"]
        along, lines = _lines(about["summary"], list(about["fields"]), headline)
        if not lines:
            raise ValueError(f"no finite number in the column {headline!r}")
    points = [row for line in lines.values() for row in line]
    numeric = all(number(row[along]) is not None for row in points)
    drawn = Figure(figsize=(5.4, 3.8), layout="constrained")
    ax = drawn.subplots()
    for label, line in lines.items():
        ax.errorbar(
            [float(row[along]) if numeric else str(row[along]) for row in line],
            [row[headline] for row in line],
            yerr=np.nan_to_num([row["deviation"] for row in line]),
            marker="o", ms=4, lw=1.5, capsize=3, label=label or None,
        )  # fmt: skip
    if numeric and _wide([float(row[along]) for row in points]):
        ax.set_xscale("log")
    if _wide([row[headline] for row in points]):
        ax.set_yscale("log")
    ax.set_xlabel(along)
    ax.set_ylabel(headline)
    seeds = max(row["seeds"] for row in points)
    if seeds > 1:
        ax.set_title(f"means and standard deviations of {seeds} seeds", fontsize=10)
    if any(lines):
        ax.legend(fontsize=8)
    return save_figure(drawn, png or place / "sweep.png")


def _lines(
    rows: list[dict[str, Any]], fields: list[str], headline: str
) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """Return the field to draw against, and the points of every line by its label."""
    varied = [name for name in fields if len({json.dumps(row[name]) for row in rows}) > 1]
    candidates = [name for name in varied or fields if name != "seed"] or ["seed"]
    numbers = [n for n in candidates if all(number(row[n]) is not None for row in rows)]
    along = (numbers or candidates)[0]
    others = [name for name in varied if name not in (along, "seed")]
    points = _grouped(rows, [along, *others], headline)
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(points, key=lambda row: float(row[along])) if numbers else points:
        words = [row[n] if isinstance(row[n], str) else f"{n} {row[n]}" for n in others]
        lines.setdefault(", ".join(words), []).append(row)
    return along, lines


def number(value: Any) -> float | None:
    """Return the value if it is a finite number that a float can hold; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _wide(values: list[float]) -> bool:
    """Return whether values ask for a logarithmic axis."""
    return min(values) > 0 and max(values) >= 100 * min(values)
