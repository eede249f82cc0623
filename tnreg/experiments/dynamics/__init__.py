"""Components learned one after another: matrix, CP and hierarchical tensor factorization, or any tree.

A factorization starts near zero and is trained on a part of a tensor's entries (or on rank-one
measurements). Recorded are its components (the singular values of a matrix factorization, the largest
local components of every other one) with the rates at which theory says they grow, the singular
values at every node, errors, unbalancedness and step size. The presets have the settings of figures 1,
2 and 4 of Razin, Maman and Cohen (2022), arXiv:2201.11729.

A run folder holds ``config.json``, ``model.safetensors``, ``trajectory.npz`` and three pictures:
``dynamics.png``, ``spectra.png``, ``rates.png``. While it trains, ``FOLDER.checkpoint`` beside it holds
the state: a run that was killed goes on from there when it is started again.
"""

from tnreg.experiments.dynamics.pictures import panels
from tnreg.experiments.dynamics.tracked import tracks
from tnreg.experiments.dynamics.train import (
    MODELS,
    Config,
    Preset,
    cp,
    cp_small,
    figure,
    htf,
    htf_small,
    mf,
    mixed,
    row,
    run,
    ternary,
    tiny,
    unbalanced,
)

__all__ = [
    "MODELS", "Config", "Preset", "cp", "cp_small", "figure", "htf", "htf_small", "mf", "mixed", "panels",
    "row", "run", "ternary", "tiny", "tracks", "unbalanced",
]  # fmt: skip
