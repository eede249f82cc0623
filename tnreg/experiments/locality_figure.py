"""The table and the picture of a ``locality`` sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnreg.experiments import sweep_figure
from tnreg.experiments.folder import about_of, refused
from tnreg.plots import save_figure

__all__ = ["figure", "table"]

_LABELS = {
    "igc": "input gradient change",
    "interaction": "interaction energy",
    "weight-decay": "weight decay",
}


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

    A sweep where more varies than arm, distance and seed is drawn as any other one is.

    Raises:
        FileError: Not a finished sweep.
    """
    from matplotlib.figure import Figure

    place = Path(folder)
    with refused("a finished sweep of locality", place):
        about = about_of(place)
        rows, config = about["summary"], about["config"]
        if about["experiment"] != "locality" or not rows:
            raise ValueError("no results yet" if not rows else f"of {about['experiment']!r}")
        means = table(rows)
    if set(about.get("fields", ())) > {"arm", "distance", "seed"}:
        return sweep_figure.figure(place, png or place / "locality.png")
    drawn = Figure(figsize=(5.4, 3.8), layout="constrained")
    ax = drawn.subplots()
    arms = list(dict.fromkeys(row["arm"] for row in means))
    distances = sorted({row["distance"] for row in means})
    step = min(np.diff(distances), default=1.0)
    for i, arm in enumerate(arms):
        some = sorted((row for row in means if row["arm"] == arm), key=lambda row: row["distance"])
        aside = 0.02 * step * (i - (len(arms) - 1) / 2)  # so that error bars do not hide each other
        ax.errorbar(
            [row["distance"] + aside for row in some],
            [100 * row["test accuracy"] for row in some],
            yerr=np.nan_to_num([100 * row["deviation"] for row in some]),
            marker="o", ms=4, lw=1.5, capsize=3, label=_LABELS.get(arm, arm),
        )  # fmt: skip
    ax.axhline(50, color="0.6", lw=0.8, ls=":")
    ax.set_xticks(distances)
    seeds = len({row["seed"] for row in rows})
    pathfinder = config["set"] == "pathfinder"
    ax.set_xlabel("paddles of a path" if pathfinder else "distance between the images (pixels)")
    ax.set_ylabel("test accuracy (%)")
    ax.set_title(f"{config['set']}, {config['model']}, {seeds} seeds", fontsize=10)
    ax.legend()
    return save_figure(drawn, png or place / "locality.png")


def _key(row: dict[str, Any], by: Sequence[str]) -> tuple[str, ...]:
    return tuple(json.dumps(row[name]) for name in by)
