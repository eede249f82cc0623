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
    """Complete a tensor from a part of its entries with a factorization along a tree.

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
    """Complete a real tensor along a tree, end to end, and write a report.

    Args:
        out: Folder for pictures, trajectory, model and report.html.
        device: Any torch device, e.g. cuda.
        seed: Chooses the observed entries and the initial weights.
        steps: Fewer updates than the demo's own, to try it out.
        progress: Show progress bars.
    """
    config = demo_experiment.Config(device=str(check_device(device)), seed=seed)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    reply = Reply()
    demo_experiment.run(config, out, console=reply.console, progress=reply.shows(progress))
