"""The table and the picture of a ``locality`` sweep."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tnreg.experiments.folder import read_about, reading
from tnreg.experiments.sweep import pictures as sweep_figure
from tnreg.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELS = {
    "igc": "input gradient change",
    "interaction": "interaction energy",
    "weight-decay": "weight decay",
}

# Means and deviations of test accuracy (%) by distance, ResNet-18, Razin, Maman and Cohen (2022): Pathfinder
# as printed; CIFAR-10 read off a plot, without deviations.
_PUBLISHED: dict[str, tuple[tuple[str, str, dict[int, tuple[float, float]]], ...]] = {
    "pathfinder": (
        ("plain", "plain", {3: (98.53, 0.22), 5: (95.92, 0.26), 7: (68.76, 5.13), 9: (50.38, 0.59)}),
        ("igc", "λ = 9", {3: (98.42, 0.59), 5: (96.60, 1.14), 7: (91.64, 1.02), 9: (85.48, 1.68)}),
    ),
    "cifar": (
        ("plain", "plain", {0: (61.2, 0), 40: (59.9, 0), 80: (55.8, 0), 120: (50.0, 0), 160: (50.4, 0)}),
        ("igc", "λ = 1", {0: (61.2, 0), 40: (61.2, 0), 80: (60.5, 0), 120: (58.8, 0), 160: (58.4, 0)}),
    ),
}  # fmt: skip


def table(
    rows: list[dict[str, Any]], fields: Sequence[str] = ("arm", "distance", "seed")
) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, one row for each arm, distance and other field.

    ``cost`` is the mean of processor seconds over that of the plain arm with the same other fields,
    ``cost an epoch`` the same by epoch; NaN without a plain arm. The deviation is that of a sample (n - 1).
    """
    by = [name for name in fields if name != "seed"]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for row in rows:
            if row["arm"] == arm:
                groups.setdefault(_key(row, by), []).append(row)
    out = []
    for some in groups.values():
        plain = groups.get(_key({**some[0], "arm": "plain"}, by), [])
        reached = np.array([row["test accuracy"] for row in some])
        seconds, base = (
            np.mean([r["seconds"] for r in part]) if part else np.nan for part in (some, plain)
        )
        epoch, base_epoch = (
            np.mean([r["seconds"] / r["epochs"] for r in part]) if part else np.nan
            for part in (some, plain)
        )
        out.append(
            {
                **{name: some[0][name] for name in by},
                "seeds": len(some),
                "test accuracy": float(reached.mean()),
                "deviation": float(reached.std(ddof=1)) if len(some) > 1 else float("nan"),
                "epochs": float(np.mean([row["epochs"] for row in some])),
                "seconds": float(seconds),
                "cost": float(seconds / base),
                "cost an epoch": float(epoch / base_epoch),
            }
        )
    return out


def figure(folder: str | Path, png: str | Path | None = None) -> Path:
    """Draw test accuracy against distance, with error bars, into ``locality.png`` or another file.

    What is there is drawn: finished trainings filled, those that go on with an open mark and their last
    epoch, and for Pathfinder and CIFAR-10 the published values. The legend has the number of seeds. A sweep
    where more varies than arm, distance, seed and statistics is drawn as any other one is.

    Raises:
        FileError: Not a sweep of locality, or nothing was trained yet.
    """
    place = Path(folder)
    with reading("a sweep of locality", place):
        about = read_about(place)
        if about["experiment"] != "locality":
            raise ValueError(f"of {about['experiment']!r}")
        rows, config = about["summary"], about["config"]
        fields = tuple(about.get("fields", ("arm", "distance", "seed")))
        begun = going_on(place)
        if not rows and not begun:
            raise ValueError("no results yet")
        means = table(rows, fields)
    if set(fields) - {"arm", "distance", "seed", "statistics"}:
        return sweep_figure.figure(place, png or place / "locality.png")
    return save_figure(picture(means, begun, fields, config), png or place / "locality.png")


def picture(
    means: list[dict[str, Any]],
    begun: list[dict[str, Any]],
    fields: Sequence[str],
    config: Mapping[str, Any],
) -> Figure:
    """Draw rows of ``table`` and of ``going_on`` beside the published values.

    Args:
        means: Trainings that are finished.
        begun: Trainings that are not.
        fields: Fields of the rows.
        config: Names of ``set`` and ``model``.
    """
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.4, 3.8), layout="constrained")
    ax = drawn.subplots()
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in means:
        lines.setdefault(_label(row, fields), []).append(row)
    distances = sorted({row["distance"] for row in [*means, *begun]})
    step = min(np.diff(distances), default=1.0)
    for i, (label, some) in enumerate(lines.items()):
        some.sort(key=lambda row: row["distance"])
        aside = 0.02 * step * (i - (len(lines) - 1) / 2)  # error bars must not hide each other
        counts = sorted({row["seeds"] for row in some})
        seeds = f"{counts[0]} seed" if counts == [1] else f"{counts[0]} seeds"
        ax.errorbar(
            [row["distance"] + aside for row in some],
            [100 * row["test accuracy"] for row in some],
            yerr=np.nan_to_num([100 * row["deviation"] for row in some]),
            marker="o", ms=4, lw=1.5, capsize=3, color=f"C{i}",
            label=f"{label} ({seeds if len(counts) == 1 else f'{counts[0]} to {counts[-1]} seeds'})",
        )  # fmt: skip
    for row in begun:
        at = 100 * row["test accuracy"]
        ax.plot(row["distance"], at, marker="o", ms=6, mfc="none", color="0.3", ls="")
        text = f" {_LABELS.get(row['arm'], row['arm'])}, epoch {row['epochs']}"
        ax.annotate(text, (row["distance"], at), fontsize=7, va="center")
    published: set[int] = set()
    for arm, name, values in _PUBLISHED.get(config["set"], ()):
        published |= values.keys()
        some_lines = [k for k, label in enumerate(lines) if label.startswith(_LABELS.get(arm, arm))]
        ax.errorbar(
            list(values), [mean for mean, _ in values.values()],
            yerr=[spread for _, spread in values.values()], marker="x", ms=5, lw=1, ls="--", capsize=2,
            color=f"C{some_lines[0]}" if some_lines else "0.5", alpha=0.6, label=f"published: {name}",
        )  # fmt: skip
    ax.axhline(50, color="0.6", lw=0.8, ls=":")
    ax.set_xticks(sorted({*distances, *published}))
    pathfinder = config["set"] == "pathfinder"
    ax.set_xlabel("paddles of a path" if pathfinder else "distance between the images (pixels)")
    ax.set_ylabel("test accuracy (%)")
    ax.set_title(f"{config['set']}, {config['model']}", fontsize=10)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8)
    return drawn


def going_on(folder: str | Path) -> list[dict[str, Any]]:
    """Trainings with rows but no run folder yet: name, arm, distance, epochs, last test accuracy."""
    out = []
    for path in sorted(Path(folder).glob("*.history.csv")):
        named = re.match(r"(.+?)-(\d+)-seed-", path.name)
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        tested = [row for row in rows if row["test accuracy"] not in ("", "nan")]
        if named and tested:
            out.append(
                {
                    "name": path.name.split(".")[0], "arm": named[1], "distance": int(named[2]),
                    "epochs": int(tested[-1]["epoch"]),
                    "test accuracy": float(tested[-1]["test accuracy"]),
                }
            )  # fmt: skip
    return out


def _label(row: dict[str, Any], fields: Sequence[str]) -> str:
    penalized = row["arm"] in ("igc", "interaction")
    more = [f"{name} {row[name]}" for name in fields if name == "statistics" and penalized]
    return ", ".join([_LABELS.get(row["arm"], row["arm"]), *more])


def _key(row: dict[str, Any], by: Sequence[str]) -> tuple[str, ...]:
    return tuple(json.dumps(row[name]) for name in by)
