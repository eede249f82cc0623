"""The command ``complete``, which fills the gaps of a tensor."""

import dataclasses
from pathlib import Path

from tnreg.cli.inputs import check_device
from tnreg.cli.output import Reply
from tnreg.cli.tables import summary_table
from tnreg.experiments import complete as experiment

_SETTINGS = experiment.Settings()


def complete(
    file: str,
    /,
    *,
    settings: experiment.Settings = _SETTINGS,
    out: Path = Path("runs/complete"),
    progress: bool = True,
    json: bool = False,
) -> None:
    """Fill the gaps of a tensor from all entries that are known: ranks, tree and the error are found.

    Writes the completed tensor, model.safetensors, trajectory.npz, config.json and report.html.

    Args:
        file: A .npy, .npz, .safetensors, .pt, .mat, .nc, .csv or .parquet file, where NaN is a gap, or an
            entry of a table that is not there; or kinetic, il2, covid19, indian-pines.
        settings: What is looked for, and how.
        out: Folder of the run; one that tnreg wrote before is replaced, any other is refused.
        progress: Show a status line.
        json: Print one JSON document instead of the table.
    """
    reply = Reply(json)
    check_device(settings.device)
    config = experiment.Config(tensor=file, **dataclasses.asdict(settings))
    with reply.undisturbed():
        summary = experiment.run(config, out, progress=reply.shows(progress))
    notes = summary["warnings"]
    reply.table(summary_table({key: summary[key] for key in summary if key != "warnings"}, file))
    for note in notes:
        reply.note(f"warning: {note}")
    reply.note(f"wrote {out}, see report.html there")
    reply.document({"tensor": file, "folder": out, **summary})
