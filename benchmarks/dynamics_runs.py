"""Collect the results of dynamics runs from their folders into one small file.

``python benchmarks/dynamics_runs.py RUN_FOLDER... --out FILE.json``; docs/dynamics.md shows them beside
the published values.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from steps import machine_name

from tnreg.experiments.folder import read_run


def main() -> None:
    """Read the folders, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for folder in arguments.runs:
        run = read_run(folder)
        root = list(run.summary["components"])[-1]
        keys = ("steps", "stopped by", "loss", "train error", "test error", "ranks", "target ranks")
        rows.append(
            {
                "model": run.config["model"],
                "seed": run.config["seed"],
                "device": run.config["device"],
                **{key: run.summary[key] for key in keys},
                "off-tree ranks": run.summary.get("off-tree ranks", {}),
                "components": run.summary["components"][root],
                "jumps": sorted(run.summary["jumps"][root]),
                "rate error": run.summary["rate error"][root],
                "seconds": run.summary["seconds"],
            }
        )
    machine = machine_name(torch.device(rows[0]["device"]), torch.get_num_threads())
    arguments.out.write_text(json.dumps({"machine": machine, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
