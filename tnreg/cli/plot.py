"""The command ``plot``, which draws what a run recorded."""

from collections.abc import Callable
from pathlib import Path

from tnreg import Trajectory, plots
from tnreg.cli.output import Picture, Reply
from tnreg.errors import OptionError
from tnreg.experiments import completion, convac, demo, dynamics, locality
from tnreg.experiments.dynamics import init_scale
from tnreg.experiments.folder import experiment_of
from tnreg.experiments.sweep import pictures as sweep_pictures

# Pictures of experiments; where there is a trajectory, its panels can be chosen as well.
_PICTURES: dict[str, Callable[[Path, Path | None], Path]] = {
    "dynamics": lambda folder, path: (
        plots.save_figure(dynamics.panels([folder]), path) if path else dynamics.figure(folder)
    ),
    "demo": demo.figure,
    "init_scale": init_scale.figure,
    "convac": convac.figure,
    "locality": locality.figure,
    "sweep": sweep_pictures.figure,
    init_scale.DYNAMICS.title: sweep_pictures.figure,
}


def plot(
    runs: tuple[Path, ...], /, *, names: tuple[str, ...] = (), linear: bool = False, figure: Picture = None
) -> None:
    """Draw what a run recorded; several runs of `dynamics` side by side.

    Args:
        runs: Run folders, or one trajectory .npz file.
        names: What to draw, one panel each.
        linear: Linear instead of logarithmic vertical axes.
        figure: Where to write the picture; if left out, the experiment's own pictures in its folder are drawn
            again, training.png beside a trajectory, panels.png beside several runs.
    """
    reply = Reply(figure=figure)
    if not runs:
        raise OptionError("plot: give a run folder.")
    first, several, about = runs[0], len(runs) > 1, ""
    kind, panels = experiment_of(first), bool(names or linear)
    if panels and (several or (kind in _PICTURES and kind not in ("dynamics", "demo"))):
        what = "several runs side by side" if several else f"a run of {kind.replace('_', '-')}"
        raise OptionError(
            f"plot: --names and --linear choose panels of one trajectory; {what} has a picture of its own."
        )
    with reply.working("drawing ..."):
        if several:
            picture = plots.save_figure(dynamics.panels(runs), figure or first.parent / "panels.png")
        elif kind in _PICTURES and not panels:
            picture = _PICTURES[kind](first, figure)
        else:
            file = first / "trajectory.npz" if first.is_dir() else first
            run = Trajectory.load(file)
            drawn, about = completion.draw(run, names or run.names, log=not linear), f"{run!r}\n"
            picture = plots.save_figure(drawn, figure or file.with_name("training.png"))
    reply.note(f"{about}wrote {picture}")
