"""What the scale of the initial weights does: small ones give the staircase, large ones lose it.

The same factorization is trained from several scales and seeds. Every training is a run folder of
``dynamics`` inside this one, ``std-0.01-seed-1`` and so on; those that are there already are not
trained again, and one that was killed goes on from its checkpoint. Then ``init-scale.png`` and
``config.json`` with the table of results are written.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tnreg.errors import OptionError
from tnreg.experiments import dynamics
from tnreg.experiments.folder import about_of, read_run, refused
from tnreg.machine.files import check_folder, write_whole
from tnreg.machine.versions import __version__
from tnreg.plots import save_figure


@dataclass(frozen=True)
class Config:
    """Settings of one sweep.

    Attributes:
        model: Preset of ``dynamics`` that all other settings come from.
        stds: Standard deviations of the initial weights.
        seeds: Each draws a target, what is observed of it, and initial weights.
        steps: Updates of one training, at most.
        device: Torch device.
    """

    model: dynamics.Preset = "cp"
    stds: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int = 100_000
    device: str = "cpu"


tiny = Config(model="tiny", stds=(0.1, 0.5), seeds=(1, 2), steps=40)


def run(
    config: Config,
    folder: str | Path,
    *,
    base: dynamics.Config | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Train every scale with every seed, draw, and return one row of results each.

    Args:
        config: Scales and seeds.
        folder: Where the runs and the picture go.
        base: Settings of your own in place of the preset's.
        progress: Show a progress bar for each training.

    Raises:
        OptionError: No scales or no seeds, or a run that is there was made with other settings.
    """
    if not config.stds or not config.seeds:
        raise OptionError("init-scale: give at least one std and one seed.", argument="stds")
    start = dynamics.MODELS[config.model] if base is None else base
    place = check_folder(folder) if not _is_sweep(Path(folder)) else Path(folder)
    rows = []
    for std in config.stds:
        for seed in config.seeds:
            one = dataclasses.replace(
                start, std=std, seed=seed, steps=config.steps, device=config.device
            )
            rows.append(_result(one, _cell(place, std, seed), progress))
    about = {
        "tnreg": __version__,
        "experiment": "init_scale",
        "config": dataclasses.asdict(config),
        "base": dataclasses.asdict(start),
        "summary": rows,
    }
    text = json.dumps(about, indent=1) + "\n"
    write_whole(place / "config.json", lambda beside: beside.write_text(text, encoding="utf-8"))
    figure(place)
    return rows


def _cell(place: Path, std: float, seed: int) -> Path:
    return place / f"std-{std:g}-seed-{seed}"


def _is_sweep(place: Path) -> bool:
    """A sweep that was cut short: nothing but its cells."""
    return place.is_dir() and all(p.name.lstrip(".").startswith("std-") for p in place.iterdir())


def _result(config: dynamics.Config, cell: Path, progress: bool) -> dict[str, Any]:
    if cell.exists():
        there = read_run(cell)
        wanted = json.loads(json.dumps(dataclasses.asdict(config)))
        if there.config != wanted:
            raise OptionError(
                f"{cell} was made with other settings; delete it, or choose another folder.",
                argument="folder",
            )
        summary = there.summary
    else:
        summary = dynamics.run(config, cell, pictures=False, progress=progress)
    return {"std": config.std, "seed": config.seed, **dynamics.row(summary)}


def figure(folder: str | Path, png: str | Path | None = None) -> Path:
    """Draw components by scale for the first seed, then errors of all seeds.

    Into ``init-scale.png`` of the folder, or another file.
    """
    from matplotlib.figure import Figure

    place = Path(folder)
    with refused("a finished sweep", place):
        about = about_of(place)
        rows, stds, seeds = about["summary"], about["config"]["stds"], about["config"]["seeds"]
    drawn = Figure(figsize=(3.1 * max(len(stds), 2), 6), layout="constrained")
    upper, lower = drawn.subfigures(2, 1, squeeze=False)[:, 0]
    for std, ax in zip(stds, upper.subplots(1, len(stds), squeeze=False)[0], strict=True):
        found = read_run(_cell(place, std, seeds[0])).found
        followed = dynamics.tracks(found)
        ax.plot(followed.steps, followed.norms, lw=1.2)
        ax.set_title(f"std {std:g}")
        ax.set_xlabel("step")
    upper.suptitle(f"components, seed {seeds[0]}", fontsize=10)
    left, right = lower.subplots(1, 2)
    for name, ax in (("test error", left), ("effective rank", right)):
        for seed in seeds:
            some = [row for row in rows if row["seed"] == seed and row[name] is not None]
            ax.plot([row["std"] for row in some], [row[name] for row in some], "o-", ms=4, lw=1)
        both = [[r[name] for r in rows if r["std"] == std and r[name] is not None] for std in stds]
        ax.plot(stds, [np.mean(part) if part else np.nan for part in both], color="0.3", lw=2)
        ax.set_xscale("log")
        ax.set_xlabel("standard deviation of the initial weights")
        ax.set_title(f"{name} at the end (grey: mean of {len(seeds)} seeds)")
    left.set_yscale("log")
    return save_figure(drawn, png or place / "init-scale.png")
