"""The claim as a picture: training makes CNNs local, and a term in the loss undoes it.

``python benchmarks/locality_claim.py FOLDER... [--out FILE.json] [--figure FILE.png]`` takes folders of
``tnreg run locality`` or ``tnreg sweep locality`` on pairs of images (digits, photos, ...), reads every run
of one training that is there, and measures each network on the test images of its run:

- the interaction share of the two images of a pair: 60 contents of one crossed with 60 of the other, and
  the effective rank of what neither explains;
- the profile over distance of patches of 3/8 of an image's side, within an image and from one to the other.

The same is measured at initialization, which the seed of a run tells. A line over epochs needs trainings
that end early, a sweep over ``--epochs``:

    tnreg run locality --arms plain igc interaction --distances 24 --out runs/a
    tnreg sweep locality --arm plain,igc --distance 24 --seed 101 --epochs 1,2,4,8,16,32 --out runs/b
    python benchmarks/locality_claim.py runs/a runs/b --figure docs/claim.png
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import tnreg
from tnreg import plots
from tnreg.experiments.folder import experiment_of, read_about
from tnreg.experiments.locality.comparison import Training, _images
from tnreg.experiments.nets import as_input, build
from tnreg.experiments.probed import network_of
from tnreg.far.interaction import crossed_values, interaction_energy

CROSSED = 60
LABELS = {
    "start": "before training",
    "igc": "gradient change",
    "interaction": "interaction energy",
    "rank": "interaction rank",
}
Row = dict[str, Any]


def measure(net: Any, x: Tensor, boxes: Any, distance: int) -> Row:
    """Return interaction share and effective rank of the two images, and the profile over distance."""
    some, second, side = x[:CROSSED], torch.tensor(boxes[1]), boxes[0][2] - boxes[0][0]
    with torch.no_grad():
        values = crossed_values(net, some, some, second).double()
    centred = values - values.mean(0) - values.mean(1, keepdim=True) + values.mean((0, 1))
    gaps = [*(n * side // 8 for n in range(3)), *(distance + n * side // 4 for n in range(4))]
    profile = tnreg.locality_profile(net, x[:512], distances=gaps, size=3 * side // 8)
    return {
        "share": 1 - float(interaction_energy(values)),
        "effective rank": float(tnreg.effective_rank(torch.linalg.svdvals(centred.flatten(1)))),
        "patches": profile.size,
        "distances": gaps,
        "profile": profile.interaction.mean(1).tolist(),
        "standard error": profile.standard_error.tolist(),
        "in words": profile.summary,
    }


def rows_of(folders: list[Path], distance: int) -> list[Row]:
    """Return a row for each run of this distance, and one at epoch 0 for each of their seeds."""
    rows, begun = [], set()
    for run in sorted(run for folder in folders for run in folder.iterdir()):
        if experiment_of(run) != "locality_run":
            continue
        about = read_about(run)
        config, summary = about["config"], about["summary"]
        if config["distance"] != distance:
            continue
        seed = config["seed"]
        pairs = _images(Training(**config), run.parent, "test")
        x = as_input(torch.from_numpy(pairs.images))
        if seed not in begun:
            begun.add(seed)
            torch.manual_seed(seed)
            net = build(config["model"], x.shape[1]).eval()
            rows.append({"arm": "start", "seed": seed, "epochs": 0, **measure(net, x, pairs.boxes, distance)})
        net = network_of(str(run), x.shape[1])
        how = {"epochs": summary["epochs"], "test accuracy": summary["test accuracy"]}
        rows.append({"arm": config["arm"], "seed": seed, **how, **measure(net, x, pairs.boxes, distance)})
        row = rows[-1]
        print(f"{run.name:40} {row['epochs']:3} epochs, {row['share']:.4f} rank {row['effective rank']:.1f}")
    return rows


def ends(rows: list[Row], arm: str) -> list[Row]:
    """Return the longest training of every seed of an arm."""
    last = {row["seed"]: row for row in sorted(rows, key=lambda row: row["epochs"]) if row["arm"] == arm}
    return list(last.values())


def arms_of(rows: list[Row]) -> list[str]:
    """Return the arms, plain training first."""
    return sorted({row["arm"] for row in rows} - {"start"}, key=lambda arm: (arm != "plain", arm))


def mean_of(rows: list[Row], arm: str) -> Row:
    """Return means over seeds, and the standard deviation of the share."""
    shares, ranks = (np.array([row[name] for row in rows]) for name in ("share", "effective rank"))
    deviation = float(shares.std(ddof=1)) if len(rows) > 1 else 0.0
    mean = {"share": float(shares.mean()), "deviation": deviation, "effective rank": float(ranks.mean())}
    return {"arm": LABELS.get(arm, arm), "seeds": len(rows), **mean}


def figure(rows: list[Row], path: Path) -> None:
    """Draw the share of the two images over epochs, and the profiles at the start and the end."""
    drawn = Figure(figsize=(11, 4), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
    start = ends(rows, "start")
    profile_of(right, start, LABELS["start"], "0.5")
    for k, arm in enumerate(arms_of(rows)):
        for last in ends(rows, arm):
            here = [row for row in rows if row["arm"] == arm and row["seed"] == last["seed"]]
            if len(here) > 1:  # over epochs
                here += [row for row in start if row["seed"] == last["seed"]]
                line = sorted((row["epochs"], max(row["share"], 1e-5)) for row in here)
                left.plot(*zip(*line, strict=True), "o-", ms=3, lw=1.2, color=f"C{k}")
            else:
                left.plot(last["epochs"], max(last["share"], 1e-5), "o", ms=5, mfc="none", color=f"C{k}")
        profile_of(right, ends(rows, arm), LABELS.get(arm, arm), f"C{k}")
    left.plot([0] * len(start), [row["share"] for row in start], "o", ms=5, mfc="none", color="0.5")
    left.set_xscale("symlog", linthresh=1)
    left.set_yscale("log")
    left.set_xticks(ticks := [0, 1, 2, 4, 8, 16, 32, 60], map(str, ticks))
    left.set_xticks([], minor=True)
    left.set_xlim(-0.1, 70)
    left.set_xlabel("epochs (circles: other seeds, before and after)")
    left.set_ylabel("interaction share of the two images")
    names = [f"{d}\n{'inside' if k < 3 else 'across'}" for k, d in enumerate(rows[0]["distances"])]
    right.set_xticks(range(len(names)), names, fontsize=8)
    right.set_xlabel(f"pixels between patches of side {rows[0]['patches']}")
    right.set_ylabel("share of variance by interaction")
    right.set_yscale("log")
    right.legend(fontsize=8)
    plots.save_figure(drawn, path)


def profile_of(ax: Any, rows: list[Row], label: str, color: str) -> None:
    """Draw the mean profile of these networks."""
    mean = np.maximum(np.mean([row["profile"] for row in rows], axis=0), 1e-5)
    for part, name in ((slice(3), label), (slice(3, None), None)):
        ax.plot(np.arange(len(mean))[part], mean[part], "o-", ms=4, lw=1.2, color=color, label=name)


def main() -> None:
    """Measure, print, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--distance", type=int, default=24)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    rows = rows_of(arguments.folders, arguments.distance)
    summary = [mean_of(ends(rows, arm), arm) for arm in ("start", *arms_of(rows))]
    for row in summary:
        print(*row.values())
    if arguments.out:
        machine = f"{platform.machine()} CPU, torch {torch.__version__}"
        about = {"machine": machine, "crossed": CROSSED, "distance": arguments.distance}
        about |= {"summary": summary, "rows": rows}
        arguments.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if arguments.figure:
        figure(rows, arguments.figure)


if __name__ == "__main__":
    main()
