"""The commands ``fit`` and ``demo``, which complete one tensor."""

import dataclasses
from pathlib import Path

from tnreg.cli.inputs import check_device
from tnreg.cli.output import Reply
from tnreg.cli.tables import summary_table
from tnreg.experiments import completion
from tnreg.experiments import demo as demo_experiment

_SETTINGS = completion.Settings()


def fit(
    file: str,
    /,
    *,
    settings: completion.Settings = _SETTINGS,
    out: Path = Path("runs/fit"),
    progress: bool = True,
    json: bool = False,
) -> None:
    """Train a factorization along a tree on a part of a tensor's entries, by gradients, to study that.

    To fill in gaps take `tnreg complete`: it uses all known entries, and finds ranks and a tree. Here the
    entries that are not observed test the model of the row that fits held-out entries best.
    Writes config.json, model.safetensors, trajectory.npz and training.png, also after Ctrl-C.

    Args:
        file: A .npy, .npz, .safetensors or .pt file, or kinetic, il2, covid19, indian-pines.
        settings: What is trained, and how.
        out: Folder of the run; one that tnreg wrote before is replaced, any other is refused.
        progress: Show a progress bar.
        json: Print one JSON document instead of the table.
    """
    reply = Reply(json)
    check_device(settings.device)
    config = completion.Config(tensor=file, **dataclasses.asdict(settings))
    with reply.undisturbed():
        summary = completion.run(config, out, progress=reply.shows(progress))
    figures = {key: value for key, value in summary.items() if key != "tree"}
    reply.table(summary_table(figures, f"{file} along {summary['tree']}"))
    used, held, unseen = (
        summary[name] for name in ("observed entries", "of them held out", "unseen entries")
    )
    reply.note(
        f"trained on {used - held:,} entries, held out {held:,} to choose the row, tested on {unseen:,}; "
        "`tnreg complete` uses them all"
    )
    error, mean = summary["test error"], summary["test error of the mean"]
    if not error < mean:
        reply.note(
            f"warning: the test error {error:.3g} is not below {mean:.3g}, that of the mean; "
            "take more --steps, --optimizer adam with --std 0.3, or `tnreg complete`"
        )
    reply.note(f"wrote {out}")
    reply.document({"tensor": file, "folder": out, **summary})


def demo(
    *,
    out: Path = Path("runs/demo"),
    device: str = "cpu",
    seed: int = 1,
    steps: int | None = None,
    progress: bool = True,
) -> None:
    """Complete a measured tensor, learn another component by component, write a report.

    Args:
        out: Folder for pictures, trajectory, model and report.html.
        device: Any torch device, e.g. cuda.
        seed: Chooses the observed entries and the initial weights.
        steps: To try it out: fewer updates, and a small tensor completed.
        progress: Show progress bars.
    """
    config = demo_experiment.Config(device=str(check_device(device)), seed=seed)
    if steps is not None:
        small = {
            name: getattr(demo_experiment.tiny, name) for name in ("completed", "along", "share", "peers")
        }
        config = dataclasses.replace(config, steps=steps, **small)
    reply = Reply()
    demo_experiment.run(config, out, console=reply.console, progress=reply.shows(progress))
