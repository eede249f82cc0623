"""The table and the picture of any sweep: one result against what varies, seeds taken together."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnreg.experiments.folder import about_of, refused
from tnreg.plots import save_figure


def means(rows: list[dict[str, Any]], fields: Sequence[str], headline: str) -> list[dict[str, Any]]:
    """Mean and standard deviation of ``headline`` over seeds, a row for each set of other fields.

    The deviation is that of a sample (n - 1); NaN for one seed. Cells without a finite number are left out.
    """
    by = [name for name in fields if name != "seed"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if number(row.get(headline)) is not None:
            groups.setdefault(json.dumps([row[name] for name in by]), []).append(row)
    out = []
    for some in groups.values():
        values = np.array([float(row[headline]) for row in some])
        deviation = float(values.std(ddof=1)) if len(some) > 1 else float("nan")
        fixed = {name: some[0][name] for name in by}
        out.append(
            {**fixed, "seeds": len(some), headline: float(values.mean()), "deviation": deviation}
        )
    return out


def read_sweep(folder: str | Path) -> dict[str, Any]:
    """What ``config.json`` of a sweep holds.

    Raises:
        FileError: It is none, or has no results yet.
    """
    place = Path(folder)
    with refused("a finished sweep", place):
        about = about_of(place)
        rows = about["summary"]
        if not isinstance(rows, list):
            raise ValueError("not a table of results")
        if not rows:
            raise ValueError("no results yet")
        rows[0].keys()
    return about


def figure(folder: str | Path, png: str | Path | None = None) -> Path:
    """Draw the headline of a sweep against the first field of numbers, into ``sweep.png``.

    Points are means over seeds, bars their standard deviations; there is a line for each set of the
    other fields. Without a field of numbers the first field is drawn by name; with nothing but seeds,
    these are.

    Raises:
        FileError: Not a finished sweep.
    """
    from matplotlib.figure import Figure

    place = Path(folder)
    about = read_sweep(place)
    with refused("a finished sweep", place):
        rows, fields, headline = about["summary"], list(about["fields"]), about["headline"]
        varied = [name for name in fields if len({json.dumps(row[name]) for row in rows}) > 1]
        along = _along(rows, varied or fields)
        found = means(rows, fields, headline)
        if along == "seed":
            there = [row for row in rows if number(row.get(headline)) is not None]
            found = [{**row, "seeds": 1, "deviation": float("nan")} for row in there]
        if not found:
            raise ValueError(f"no finite number in the column {headline!r}")
    drawn = Figure(figsize=(5.4, 3.8), layout="constrained")
    ax = drawn.subplots()
    others = [name for name in varied if name not in (along, "seed")]
    numeric = all(number(row[along]) is not None for row in found)
    places = {v: i for i, v in enumerate(dict.fromkeys(str(row[along]) for row in found))}
    for label, some in _lines(found, others).items():
        if numeric:
            some = sorted(some, key=lambda row: float(row[along]))
        at = [float(row[along]) if numeric else places[str(row[along])] for row in some]
        ax.errorbar(
            at, [row[headline] for row in some],
            yerr=np.nan_to_num([row["deviation"] for row in some]),
            marker="o", ms=4, lw=1.5, capsize=3, label=label or None,
        )  # fmt: skip
    if not numeric:
        ax.set_xticks(list(places.values()), list(places))
    elif _wide([float(row[along]) for row in found]):
        ax.set_xscale("log")
    if _wide([row[headline] for row in found]):
        ax.set_yscale("log")
    ax.set_xlabel(along)
    ax.set_ylabel(headline)
    seeds = max(int(row["seeds"]) for row in found)
    if seeds > 1:
        ax.set_title(f"means and standard deviations of {seeds} seeds", fontsize=10)
    if others:
        ax.legend(fontsize=8)
    return save_figure(drawn, png or place / "sweep.png")


def number(value: Any) -> float | None:
    """The value if it is a finite number that a float can hold; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _along(rows: list[dict[str, Any]], fields: list[str]) -> str:
    """What the picture is drawn against."""
    candidates = [name for name in fields if name != "seed"]
    numbers = [n for n in candidates if all(number(row[n]) is not None for row in rows)]
    return (numbers or candidates or ["seed"])[0]


def _lines(rows: list[dict[str, Any]], others: list[str]) -> dict[str, list[dict[str, Any]]]:
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        label = ", ".join(
            str(row[name]) if isinstance(row[name], str) else f"{name} {row[name]}"
            for name in others
        )
        lines.setdefault(label, []).append(row)
    return lines


def _wide(values: list[float]) -> bool:
    """Whether values ask for a logarithmic axis."""
    return min(values) > 0 and max(values) >= 100 * min(values)
