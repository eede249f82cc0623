"""The command ``plot``, which draws what a run recorded."""

from collections.abc import Callable
from pathlib import Path

from tnreg import Trajectory, plots
from tnreg.cli.output import Reply
from tnreg.errors import OptionError
from tnreg.experiments import completion, convac, demo, dynamics, locality
from tnreg.experiments.dynamics import init_scale
from tnreg.experiments.folder import experiment_of
from tnreg.experiments.sweep import pictures as sweep_pictures

# Pictures of experiments; where there is a trajectory, its panels can be chosen as well.
_PICTURES: dict[str, Callable[[Path, Path | None], Path]] = {
    "dynamics": lambda folder, png: (
        plots.save_figure(dynamics.panels([folder]), png) if png else dynamics.figure(folder)
    ),
    "demo": demo.figure,
    "init_scale": init_scale.figure,
    "convac": convac.figure,
    "locality": locality.figure,
    "sweep": sweep_pictures.figure,
    init_scale.DYNAMICS.title: sweep_pictures.figure,
}
_WITH_TRAJECTORY = ("dynamics", "demo")


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
        runs: Run folders, or one trajectory .npz file.
        names: What to draw, one panel each.
        linear: Linear instead of logarithmic vertical axes.
        png: Where to write the picture; if left out, the experiment's own pictures in its folder are drawn
            again, training.png beside a trajectory, panels.png beside several runs.
    """
    reply = Reply(png=png)
    if not runs:
        raise OptionError("plot: give a run folder.")
    with reply.working("drawing ..."):
        picture, about = _draw(runs, names, linear, png)
    if about:
        reply.note(about)
    reply.note(f"wrote {picture}")


def _draw(
    runs: tuple[Path, ...], names: tuple[str, ...], linear: bool, png: Path | None
) -> tuple[Path, str]:
    first, several = runs[0], len(runs) > 1
    kind = experiment_of(first)
    if names or linear:
        if several or (kind in _PICTURES and kind not in _WITH_TRAJECTORY):
            what = "several runs side by side" if several else f"a run of {kind.replace('_', '-')}"
            raise OptionError(
                "plot: --names and --linear choose panels of one trajectory; "
                f"{what} has a picture of its own."
            )
    elif several:
        return plots.save_figure(dynamics.panels(runs), png or first.parent / "panels.png"), ""
    elif kind in _PICTURES:
        return _PICTURES[kind](first, png), ""
    file = first / "trajectory.npz" if first.is_dir() else first
    run = Trajectory.load(file)
    figure = completion.draw(run, names or run.names, log=not linear)
    return plots.save_figure(figure, png or file.with_name("training.png")), repr(run)
