"""The study of docs/seeing_far.md: terms that ask for far dependencies beside what a sceptic would try first.

``python benchmarks/seeing_far.py [--only main noise ...] [--workers N] [--out FILE.json]`` trains in
``runs/far`` what is not there. Digits, fresh seeds 401 to 405; settings were chosen on seeds 0 to 2. What
was stopped goes on when the same command is given. ``--minutes`` ends a part in time.

Processor minutes: main 11, noise 12, what a sceptic asks 1 to 3 each, residual 10 and 9, transformer 11.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from steps import machine_name

from tnreg.experiments import locality

SEEDS = (401, 402, 403, 404, 405)
STUDY = dataclasses.replace(locality.digits, seeds=SEEDS)
FAR = dataclasses.replace(STUDY, distances=(0, 24))
TERMS = ("plain", "igc", "interaction", "rank")
# The term at every step from the first to the last, whatever the energy.
ALWAYS = dataclasses.replace(
    FAR, arms=("rank",), augment="noise", rank=0.07, rank_start=0, rank_until=0, rank_target=0.0
)
# Without noise it memorises before a term has an effect, on seed 0; the term is early for the same reason.
RESIDUAL = dataclasses.replace(FAR, distances=(24,), model="small-resnet", augment="noise", rank_start=0)


def change(config: locality.Config, **settings: Any) -> locality.Config:
    """Return plain training with other settings."""
    return dataclasses.replace(config, arms=("plain",), **settings)


# Each is a sweep in a folder of its own.
PARTS: dict[str, locality.Config] = {
    "main": dataclasses.replace(STUDY, arms=TERMS),
    "more seeds": dataclasses.replace(STUDY, arms=("igc", "rank"), seeds=(406, 407, 408, 409, 410)),
    "noise": dataclasses.replace(STUDY, arms=("plain", "igc", "rank"), augment="noise"),
    "noise, always": ALWAYS,
    "early": dataclasses.replace(FAR, arms=("rank",), distances=(0, 16, 24), rank_start=0, rank_until=300),
    "near": dataclasses.replace(FAR, arms=("rank",), distances=(24,), patches="near"),
    "shift": change(FAR, augment="shift"),
    "mixup": change(FAR, augment="mixup"),
    "cutmix": change(FAR, augment="cutmix"),
    "regularized": dataclasses.replace(FAR, arms=("weight-decay", "dropout", "sam")),
    "normalized": change(FAR, model="normalized-cnn"),
    "wide kernels": change(FAR, model="wide-cnn"),
    "dilation": change(FAR, model="dilated-cnn"),
    "longer": change(FAR, distances=(24,), epochs=180, stop_above=1.1),
    "shorter distances first": change(FAR, distances=(24,), pretrain_epochs=7),
    "residual": dataclasses.replace(FAR, arms=TERMS, model="small-resnet"),
    "residual, noise": dataclasses.replace(RESIDUAL, arms=("plain", "igc", "rank"), rank_until=0),
    "transformer": dataclasses.replace(
        FAR, arms=TERMS, model="small-vit", optimizer="adam", lr=2e-3, epochs=40, seeds=SEEDS[:3]
    ),
}


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=Path, default=Path("runs/far"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=0, help="end each part after so many")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/seeing-far.json"))
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    found["machine"] = machine_name(torch.device("cpu"), 1)
    for name in options.only:
        config = dataclasses.replace(PARTS[name], workers=options.workers, until=60 * options.minutes)
        rows = locality.run(config, options.runs / name.replace(",", "").replace(" ", "-"))
        found[name] = {"rows": rows, "table": locality.table(rows), "paired": locality.paired(rows)}
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name)
        for row in found[name]["table"]:
            print("  ", *(f"{v:.3f}" if isinstance(v, float) else v for v in row.values()), flush=True)


if __name__ == "__main__":
    main()
