"""What the scale of the initial weights does: small ones give the staircase, large ones lose it.

The same factorization is trained from several scales and seeds: a ``sweep`` of ``dynamics``, whose run
folders are ``std-0.01-seed-1`` and so on, with the picture ``init-scale.png``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnreg.errors import OptionError
from tnreg.experiments import dynamics, sweep
from tnreg.experiments.folder import read_about, read_run, reading
from tnreg.experiments.sweep.pictures import means
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
    config: Config, folder: str | Path, *, base: dynamics.Config | None = None, progress: bool = False
) -> list[dict[str, Any]]:
    """Train every scale with every seed, draw, and return one row of results each.

    Args:
        config: Scales and seeds.
        folder: Where the runs and the picture go.
        base: Settings of your own in place of the preset's.
        progress: Show a progress bar.

    Raises:
        OptionError: No scales or no seeds, or a run that is there was made with other settings.
        Exception: That of the first training that failed, when all others are done.
    """
    if not config.stds or not config.seeds:
        raise OptionError("init-scale: give at least one std and one seed.", argument="stds")
    start = dataclasses.asdict(dynamics.MODELS[config.model] if base is None else base)
    start |= {"steps": config.steps, "device": config.device}
    cells = [start | {"std": std, "seed": seed} for std in config.stds for seed in config.seeds]
    result = sweep.run(EXPERIMENT, cells, folder, workers=0, threads=None, retries=0, progress=progress)
    if result.failed:
        raise result.failed[0].exception
    return result.rows


def on_plateau(rows: list[dict[str, Any]]) -> str:
    """Return a sentence about the runs of dynamics that did not leave their plateau; empty without any."""
    count = sum(row.get("left its plateau") is False for row in rows)
    if not count:
        return ""
    return (
        f"{count} of {len(rows)} trainings never left their plateau: their loss fell by less than a tenth. "
        "They need more steps, or larger initial weights (std)."
    )


def figure(folder: str | Path, png: str | Path | None = None) -> Path:
    """Draw components by scale for the first seed, then errors of all seeds, into ``init-scale.png``."""
    from matplotlib.figure import Figure

    place = Path(folder)
    with reading("a finished sweep", place):
        rows = read_about(place)["summary"]
        stds, seeds = (list(dict.fromkeys(row[key] for row in rows)) for key in _FIELDS)
        names = [sweep.cell_name({"std": std, "seed": seeds[0]}, _FIELDS) for std in stds]
        first = [read_run(place / name).trajectory for name in names]
    drawn: Any = Figure(figsize=(3.1 * max(len(stds), 2), 6), layout="constrained")
    upper, lower = drawn.subfigures(2, 1)
    upper.suptitle(f"components, seed {seeds[0]}", fontsize=10)
    for std, trajectory, ax in zip(stds, first, upper.subplots(1, len(stds), squeeze=False)[0], strict=True):
        tracks = dynamics.tracks(trajectory)
        ax.plot(tracks.steps, tracks.norms, lw=1.2)
        ax.set(title=f"std {std:g}", xlabel="step")
    if note := on_plateau(rows):
        lower.suptitle(note, fontsize=9, color="C3")
    left, right = lower.subplots(1, 2)
    for name, scale, ax in (("test error", "log", left), ("effective rank", "linear", right)):
        mean = means(rows, _FIELDS, name)
        ax.plot([row["std"] for row in rows], [row[name] for row in rows], "o", ms=4)
        ax.plot([row["std"] for row in mean], [row[name] for row in mean], color="0.3", lw=2)
        ax.set(xscale="log", yscale=scale, xlabel="standard deviation of the initial weights")
        ax.set_title(f"{name} at the end (grey: mean of {len(seeds)} seeds)")
    return save_figure(drawn, png or place / "init-scale.png")


def _work(cell: dict[str, Any], folder: Path, checkpoint: Path) -> dict[str, Any]:
    """Carry out one run of ``dynamics``; lists of JSON are tuples again."""
    settings: Any = {key: tuple(v) if isinstance(v, list) else v for key, v in cell.items()}
    return dynamics.run(dynamics.Config(**settings), folder, pictures=False, checkpoint=checkpoint)


def _row(cell: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    more = {name: summary[name] for name in ("train error", "stopped by", "seconds")}
    return {**dynamics.row(summary), **more}


_FIELDS = ("std", "seed")
DYNAMICS = sweep.Experiment(_work, title="dynamics_sweep", fields=("seed",), row=_row, headline="test error")
EXPERIMENT = dataclasses.replace(
    DYNAMICS,
    title="init_scale",
    fields=_FIELDS,
    figure=figure,
    row=lambda cell, summary: dynamics.row(summary),
)
