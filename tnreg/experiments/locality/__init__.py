"""Seeing far: test accuracy against distance, plain training beside regularizers (figures 5 and 6).

The same network is trained on sets whose label hangs on pixels some distance apart, once for every arm,
distance and seed. Arms are plain training, weight decay, dropout, the input gradient change of Razin,
Maman and Cohen (2022), arXiv:2201.11729, and interaction energy. Every training is a cell of a
``sweep`` and a run folder of ``locality_run``, ``igc-24-seed-101`` and so on; those that are there
already are not trained again, and one that was killed, or that a deadline ended, goes on from its
checkpoint. Then ``locality.png``, ``results.csv`` and ``config.json`` with the table of results are written.

The defaults for ``set="pathfinder"`` and ``set="cifar"`` are the published ones and want a GPU; those
for ``"digits"`` take minutes on two processor cores.
"""

from tnreg.experiments.locality.comparison import (
    EXPERIMENT,
    SETS,
    Config,
    Training,
    cells,
    check,
    cifar,
    digits,
    pathfinder,
    run,
    tiny,
)  # fmt: skip
from tnreg.experiments.locality.pictures import figure, going_on, paired, table

__all__ = [
    "EXPERIMENT", "SETS", "Config", "Training", "cells", "check", "cifar", "digits", "figure", "going_on",
    "paired", "pathfinder", "run", "table", "tiny",
]  # fmt: skip
