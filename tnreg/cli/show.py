"""The command that draws what a run recorded: ``plot``."""

from __future__ import annotations

from pathlib import Path

from tnreg import Trajectory, plots
from tnreg.cli.reply import Reply, check_place
from tnreg.errors import OptionError
from tnreg.experiments import (
    completion,
    convac,
    dynamics,
    init_scale,
    locality,
    sweep_figure,
    sweeps,
)
from tnreg.experiments.folder import experiment_of

__all__ = ["plot"]


def plot(
    runs: tuple[Path, ...],
    /,
    *,
    names: tuple[str, ...] = (),
    linear: bool = False,
    png: Path | None = None,
) -> None:
    """Draw what a run recorded; several runs of `dynamics` side by side.

    Args:
        runs: Run folders, or one trajectory .npz file. Without further options the pictures in the
            folder are drawn again.
        names: What to draw, one panel each.
        linear: Linear instead of logarithmic vertical axes.
        png: Where to write the picture; if left out the experiment's own pictures in its folder,
            training.png beside a trajectory, panels.png beside several runs.
    """
    reply = Reply()
    check_place(png, "--png")
    if not runs:
        raise OptionError("plot: give a run folder.")
    first = runs[0]
    kind = experiment_of(first)
    if len(runs) > 1 or (kind == "dynamics" and png is not None and not names):
        target = png or first.parent / "panels.png"
        plots.save_figure(dynamics.panels(runs), target)
    elif kind == "init_scale":
        target = init_scale.figure(first, png)
    elif kind == "convac":
        target = convac.figure(first, png)
    elif kind == "locality":
        target = locality.figure(first, png)
    elif kind in ("sweep", sweeps.DYNAMICS.title):
        target = sweep_figure.figure(first, png)
    elif kind == "dynamics" and not names:
        target = dynamics.figure(first)
    else:
        file = first / "trajectory.npz" if first.is_dir() else first
        found = Trajectory.load(file)
        target = png or file.with_name("training.png")
        plots.save_figure(completion.draw(found, names or found.names, log=not linear), target)
        reply.note(f"{found!r}")
    reply.note(f"wrote {target}")
