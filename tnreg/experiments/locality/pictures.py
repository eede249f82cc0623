"""The table and the picture of a ``locality`` sweep."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tnreg.experiments.folder import read_about, reading
from tnreg.experiments.locality.settings import PENALTIES
from tnreg.experiments.sweep import pictures as sweep_figure
from tnreg.plots import save_figure
from tnreg.trees.drawing import plain_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

_LABELS = {
    "igc": "input gradient change", "interaction": "interaction energy", "rank": "interaction rank",
    "sam": "sharpness-aware", "weight-decay": "weight decay",
}  # fmt: skip

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


def table(rows: Rows, fields: Sequence[str] = ("arm", "distance", "seed")) -> Rows:
    """Return mean and standard deviation over seeds, one row for each arm, distance and other field.

    ``cost`` is the mean of processor seconds over that of the plain arm with the same other fields,
    ``cost an epoch`` the same by epoch; NaN without a plain arm. ``images`` is how many pass through the
    network for each image that is shown. The deviation is that of a sample (n - 1).
    """
    by = [name for name in fields if name != "seed"]
    arms = list(dict.fromkeys(row["arm"] for row in rows))

    def costs(mean: dict[str, Any], arm: str) -> list[float]:
        """Return mean epochs, seconds, seconds an epoch and images of an arm with the same other fields."""
        group = [row for row in rows if all(row[n] == {**mean, "arm": arm}[n] for n in by)]
        numbers = [
            (row["epochs"], row["seconds"], row["seconds"] / row["epochs"], row.get("images") or np.nan)
            for row in group
        ]
        return [float(number) for number in np.mean(numbers or [(np.nan,) * 4], axis=0)]

    means = []
    ordered = sorted(rows, key=lambda row: arms.index(row["arm"]))
    for mean in sweep_figure.means(ordered, fields, "test accuracy"):
        epochs, seconds, epoch, passed = costs(mean, mean["arm"])
        _, plain, plain_epoch, _ = costs(mean, "plain")
        relative = {"cost": seconds / plain, "cost an epoch": epoch / plain_epoch, "images": passed}
        means.append({**mean, "epochs": epochs, "seconds": seconds, **relative})
    return means


def paired(rows: Rows, fields: Sequence[str] = ("arm", "distance", "seed")) -> Rows:
    """Return the difference of each two arms over the seeds that both have.

    There is one row for each pair, distance and other field: ``difference`` is the mean test accuracy of
    ``arm`` less that of ``minus``, ``deviation`` that of a sample over ``seeds``, and ``t`` the mean over its
    standard error; both are NaN for one seed, and t where all differences are equal.
    """
    groups: dict[str, dict[str, dict[Any, float]]] = {}
    for row in rows:
        key = json.dumps({name: row[name] for name in fields if name not in ("arm", "seed")})
        groups.setdefault(key, {}).setdefault(row["arm"], {})[row["seed"]] = row["test accuracy"]
    found = []
    for key, arms in groups.items():
        for (minus, before), (arm, after) in itertools.combinations(arms.items(), 2):
            if not (both := [seed for seed in before if seed in after]):
                continue
            differences = [after[seed] - before[seed] for seed in both]
            deviation = float(np.std(differences, ddof=1)) if len(both) > 1 else math.nan
            mean = float(np.mean(differences))
            t = mean / deviation * len(both) ** 0.5 if deviation else math.nan
            about = {"arm": arm, "minus": minus, **json.loads(key), "seeds": len(both)}
            found.append({**about, "difference": mean, "deviation": deviation, "t": t})
    return found


def figure(folder: str | Path, png: str | Path | None = None) -> Path:
    """Draw test accuracy against distance, with error bars, into ``locality.png`` or another file.

    Finished trainings are filled marks, those that go on open ones at their last epoch; Pathfinder and
    CIFAR-10 have the published values beside them. The legend has the number of seeds, and the time of an
    epoch over that of plain training. A sweep where more
    varies than arm, distance, seed, statistics, augmentation and network is drawn as any other one is.

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
    if set(fields) - {"arm", "distance", "seed", "statistics", "augment", "model"}:
        return sweep_figure.figure(place, png or place / "locality.png")
    return save_figure(picture(means, begun, fields, config), png or place / "locality.png")


def picture(means: Rows, begun: Rows, fields: Sequence[str], config: Mapping[str, Any]) -> Figure:
    """Draw rows of ``table`` and of ``going_on`` beside the published values of ``config["set"]``."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(5.4, 3.8), layout="constrained")
    ax = canvas.subplots()
    lines: dict[str, Rows] = {}
    for row in means:
        lines.setdefault(_label(row, fields), []).append(row)
    distances = sorted({row["distance"] for row in [*means, *begun]})
    step = min(np.diff(distances), default=1.0)
    for i, (label, rows) in enumerate(lines.items()):
        rows.sort(key=lambda row: row["distance"])
        aside = 0.02 * step * (i - (len(lines) - 1) / 2)  # error bars must not hide each other
        fewest, most = (of(row["seeds"] for row in rows) for of in (min, max))
        seeds = f"{fewest} to {most}" if fewest < most else most
        cost = float(np.mean([row["cost an epoch"] for row in rows]))
        time = "" if math.isnan(cost) or rows[0]["arm"] == "plain" else f", time x {cost:.1f}"
        ax.errorbar(
            [row["distance"] + aside for row in rows], [100 * row["test accuracy"] for row in rows],
            yerr=np.nan_to_num([100 * row["deviation"] for row in rows]), marker="o", ms=4, lw=1.5,
            capsize=3, color=f"C{i}", label=plain_label(f"{label} ({seeds} seed{'s' * (most > 1)}{time})"),
        )  # fmt: skip
    for row in begun:
        at = (row["distance"], 100 * row["test accuracy"])
        ax.plot(*at, marker="o", ms=6, mfc="none", color="0.3", ls="")
        text = f" {_LABELS.get(row['arm'], row['arm'])}, epoch {row['epochs']}"
        ax.annotate(plain_label(text), at, fontsize=7, va="center")
    published: set[int] = set()
    for arm, name, values in _PUBLISHED.get(config["set"], ()):
        published |= values.keys()
        same = [k for k, label in enumerate(lines) if label.startswith(_LABELS.get(arm, arm))]
        accuracies, deviations = zip(*values.values(), strict=True)
        ax.errorbar(
            list(values), accuracies, yerr=deviations, marker="x", ms=5, lw=1, ls="--", capsize=2,
            color=f"C{same[0]}" if same else "0.5", alpha=0.6, label=f"published: {name}",
        )  # fmt: skip
    ax.axhline(50, color="0.6", lw=0.8, ls=":")
    ax.set_xticks(sorted({*distances, *published}))
    pathfinder = config["set"] == "pathfinder"
    ax.set_xlabel("paddles of a path" if pathfinder else "distance between the images (pixels)")
    ax.set_ylabel("test accuracy (%)")
    title = [config["set"]] + [config["model"]] * ("model" not in fields)
    ax.set_title(plain_label(", ".join(title)), fontsize=10)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8)
    return canvas


def going_on(folder: str | Path) -> Rows:
    """Return name, arm, distance, epochs and last test accuracy of trainings without a run folder yet."""
    begun = []
    for path in sorted(Path(folder).glob("*.history.csv")):
        match = re.match(r"(.+?)-(\d+)-seed-", path.name)
        with path.open(newline="", encoding="utf-8") as file:
            tested = [r for r in csv.DictReader(file) if r["test accuracy"] not in ("", "nan")]
        if match and tested:
            about = {"name": path.name.split(".")[0], "arm": match[1], "distance": int(match[2])}
            epochs, accuracy = int(tested[-1]["epoch"]), float(tested[-1]["test accuracy"])
            begun.append({**about, "epochs": epochs, "test accuracy": accuracy})
    return begun


def _label(row: dict[str, Any], fields: Sequence[str]) -> str:
    parts = [_LABELS.get(row["arm"], row["arm"])]
    if "augment" in fields and row["augment"] != "none":
        parts.append(row["augment"])
    if "model" in fields:
        parts.append(row["model"])
    if "statistics" in fields and row["arm"] in PENALTIES:
        parts.append(f"statistics {row['statistics']}")
    return ", ".join(parts)
