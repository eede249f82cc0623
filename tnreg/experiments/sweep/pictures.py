"""The table and the picture of any sweep: one result against what varies, seeds taken together."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnreg.experiments.folder import read_about, reading
from tnreg.plots import save_figure


def means(
    rows: list[dict[str, Any]], fields: Sequence[str], headline: str, over: str = "seed"
) -> list[dict[str, Any]]:
    """Return the mean and deviation of ``headline`` over a field, a row for each set of other fields.

    The deviation is that of a sample (n - 1); NaN for one cell. Cells without a finite number are left out.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if is_number(row.get(headline)):
            same = {name: row[name] for name in fields if name != over}
            groups.setdefault(json.dumps(same), []).append(row)
    table = []
    for key, group in groups.items():
        values = np.array([float(row[headline]) for row in group])
        deviation = float(values.std(ddof=1)) if len(group) > 1 else math.nan
        numbers = {"seeds": len(group), headline: float(values.mean()), "deviation": deviation}
        table.append({**json.loads(key), **numbers})
    return table


def figure(folder: str | Path, png: str | Path | None = None) -> Path:
    """Draw the headline of a sweep against the first field of numbers, into ``sweep.png``.

    Points are means over seeds and bars their standard deviations, with a line for each set of the other
    fields. Without a field of numbers the first field is drawn by name; without any field, the seeds.

    Raises:
        FileError: Not a finished sweep.
    """
    from matplotlib.figure import Figure

    place = Path(folder)
    with reading("a finished sweep", place):
        about = read_about(place)
        along, lines = _lines(about["summary"], about["fields"], headline := about["headline"])
    points = [row for line in lines.values() for row in line]
    numeric = all(is_number(row[along]) for row in points)
    drawn = Figure(figsize=(5.4, 3.8), layout="constrained")
    ax = drawn.subplots()
    for label, line in lines.items():
        x = [row[along] if numeric else str(row[along]) for row in line]
        y, bars = ([row[key] for row in line] for key in (headline, "deviation"))
        ax.errorbar(x, y, np.nan_to_num(bars), marker="o", ms=4, lw=1.5, capsize=3, label=label)
    for key, scale in ((along, ax.set_xscale), (headline, ax.set_yscale)):
        values: list[Any] = [row.get(key) for row in points]
        if all(is_number(v) and v > 0 for v in values) and max(values) >= 100 * min(values):
            scale("log")
    ax.set(xlabel=along, ylabel=headline)
    seeds = max(row["seeds"] for row in points)
    if seeds > 1:
        ax.set_title(f"means and standard deviations of {seeds} seeds", fontsize=10)
    if any(lines):
        ax.legend(fontsize=8)
    return save_figure(drawn, png or place / "sweep.png")


def _lines(
    rows: list[dict[str, Any]], fields: Sequence[str], headline: str
) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """Return the field to draw against, and the points of every line by its label."""
    vary = [name for name in fields if len({json.dumps(row[name]) for row in rows}) > 1]
    names = [name for name in vary or fields if name != "seed"] or ["seed"]
    numbers = [name for name in names if all(is_number(row[name]) for row in rows)]
    along = [*numbers, *names][0]
    points = means(rows, names, headline, "" if along == "seed" else "seed")
    if not points:
        raise ValueError(f"no finite number in the column {headline!r}")
    others = [name for name in vary if name not in (along, "seed")]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(points, key=lambda row: float(row[along])) if numbers else points:
        words = [row[n] if isinstance(row[n], str) else f"{n} {row[n]}" for n in others]
        lines.setdefault(", ".join(words), []).append(row)
    return along, lines


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that a float can hold; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max
