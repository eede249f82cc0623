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
from tnreg.trees.drawing import plain_label


def means(rows: list[dict[str, Any]], fields: Sequence[str], headline: str) -> list[dict[str, Any]]:
    """Return the mean and deviation of ``headline`` over seeds, a row for each set of other fields.

    The deviation is that of a sample (n - 1); NaN for one cell. Cells without a finite number are left out.
    """
    groups: dict[str, list[float]] = {}
    for row in rows:
        if is_number(row.get(headline)):
            key = json.dumps({name: row[name] for name in fields if name != "seed"})
            groups.setdefault(key, []).append(float(row[headline]))
    return [
        {
            **json.loads(key), "seeds": len(values), headline: float(np.mean(values)),
            "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        }
        for key, values in groups.items()
    ]  # fmt: skip


def figure(folder: str | Path, png: str | Path | None = None) -> Path:
    """Draw the headline of a sweep against the first field of numbers that varies, into ``sweep.png``.

    Points are means over seeds and bars their standard deviations, with a line for each set of the other
    fields. Without a field of numbers the first field is drawn by name.

    Raises:
        FileError: Not a finished sweep.
    """
    from matplotlib.figure import Figure

    place = Path(folder)
    with reading("a finished sweep", place):
        about = read_about(place)
        points = means(about["summary"], about["fields"], headline := about["headline"])
        if not points:
            raise ValueError(f"no finite number in the column {headline!r}")
        fields = [name for name in about["fields"] if name != "seed"]
    vary = [name for name in fields if len({json.dumps(point[name]) for point in points}) > 1]
    vary = vary or fields or ["seeds"]
    numbers = [name for name in vary if all(is_number(point[name]) for point in points)]
    along = [*numbers, *vary][0]
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in sorted(points, key=lambda point: point[along]) if numbers else points:
        label = ", ".join(f"{name} {point[name]}" for name in vary if name != along)
        lines.setdefault(label, []).append(point)
    drawn = Figure(figsize=(5.4, 3.8), layout="constrained")
    ax = drawn.subplots()
    for label, line in lines.items():
        x = [point[along] if numbers else plain_label(point[along]) for point in line]
        y, bars = ([point[key] for point in line] for key in (headline, "deviation"))
        ax.errorbar(x, y, np.nan_to_num(bars), marker="o", ms=4, lw=1.5, capsize=3, label=plain_label(label))
    for key, scale in ((along, ax.set_xscale), (headline, ax.set_yscale)):
        values: list[Any] = [point[key] for point in points]
        if all(is_number(v) and v > 0 for v in values) and max(values) >= 100 * min(values):
            scale("log")
    seeds = max(point["seeds"] for point in points)
    ax.set(xlabel=plain_label(along), ylabel=plain_label(headline))
    ax.set(title=f"means and deviations of {seeds} seeds" * (seeds > 1))
    if len(lines) > 1:
        ax.legend(fontsize=8)
    return save_figure(drawn, png or place / "sweep.png")


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that a float can hold; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max
