"""Two measured tensors at three tolerances, on three trees, beside tensorly and torchTT at equal error.

``python benchmarks/real.py --peers PYTHON [--out FILE.json]``; PYTHON is the interpreter of an environment
with ``pip install tensorly torchTT``. Every library runs in a process of its own, in turns; medians, after
a first call of each. The error reached is measured on the dense tensor. ``--figure FILE.json FILE.png``
draws what ``--out`` wrote, beside the decomposition of Indian Pines to 5 %.

Tensors: Indian Pines (145 x 145 x 200) and the kinetic tensor (64 x 12 x 10 x 60; entries that were not
measured set to the mean of the others). torchTT is given the tolerance; tensorly, which cuts by ranks
only, those that the singular values of the matricizations ask for, each with an equal share.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peers import main, timed, version

TOLERANCES = {"indian-pines": (0.1, 0.05, 0.02), "kinetic": (0.1, 0.03, 0.01)}
TREES = {
    "indian-pines": ([0, 1, 2], [[0, 1], 2], [0, [1, 2]]),
    "kinetic": ([0, 1, 2, 3], [[[0, 1], 2], 3], [[0, 1], [2, 3]]),
}
LIBRARIES = {
    "tnreg 1": "tnreg",
    "tnreg 2": "tnreg",
    "tnreg 3": "tnreg",
    "tensorly Tucker": "peers",
    "tensorly train": "peers",
    "torchTT": "peers",
}


def load(name: str) -> np.ndarray:
    """Return the tensor in float64, without gaps."""
    from tensorly import datasets

    loaders = {"indian-pines": datasets.load_indian_pines, "kinetic": datasets.load_kinetic}
    x = np.asarray(loaders[name]().tensor, dtype=np.float64)
    return np.where(np.isnan(x), np.nanmean(x), x)


def worker(library: str, turns: int) -> dict[str, dict[str, Any]]:
    """Return times, errors and numbers stored of one library on both tensors."""
    import torch

    torch.set_num_threads(2)
    out = {}
    for name, tolerances in TOLERANCES.items():
        x = load(name)
        for rtol in tolerances:
            call, opened, label = _setup(library, name, x, rtol)
            dense, numbers = opened(call())
            error = np.linalg.norm(np.asarray(dense).reshape(x.shape) - x) / np.linalg.norm(x)
            out[f"{name} {rtol:g}"] = {
                "seconds": timed(call, turns),
                "error": float(error),
                "numbers": int(numbers),
                "of": x.size,
                "label": label,
            }
    return out


def _setup(
    library: str, name: str, x: np.ndarray, rtol: float
) -> tuple[Callable[[], Any], Callable[[Any], tuple[Any, int]], str]:
    import torch

    given = torch.from_numpy(x)
    if library.startswith("tnreg"):
        import tnreg

        structure = TREES[name][int(library[-1]) - 1]
        tree = tnreg.ModeTree(structure)
        return (
            lambda: tnreg.decompose(given, tree, rtol=rtol),
            lambda f: (f.to_tensor().detach().numpy(), sum(p.numel() for p in f.parameters())),
            f"tnreg {tnreg.__version__}, {structure}",
        )
    if library == "torchTT":
        import torchtt

        return (
            lambda: torchtt.TT(given, eps=rtol),
            lambda f: (f.full().numpy(), sum(core.numel() for core in f.cores)),
            f"torchTT {version('torchTT')}, train",
        )
    import tensorly
    from tensorly.decomposition import tensor_train, tucker

    if library == "tensorly train":
        splits = [(x.reshape(math.prod(x.shape[:k]), -1), k) for k in range(1, x.ndim)]
        ranks = _ranks([matrix for matrix, _ in splits], rtol)
        return (
            lambda: tensor_train(x, [1, *ranks, 1]),
            lambda f: (tensorly.tt_to_tensor(f), sum(core.size for core in f.factors)),
            f"tensorly {version('tensorly')}, train",
        )
    ranks = _ranks([np.moveaxis(x, k, 0).reshape(x.shape[k], -1) for k in range(x.ndim)], rtol)
    return (
        lambda: tucker(x, ranks),
        lambda f: (tensorly.tucker_to_tensor(f), f.core.size + sum(u.size for u in f.factors)),
        f"tensorly {version('tensorly')}, Tucker",
    )


def _ranks(matrices: Sequence[np.ndarray], rtol: float) -> list[int]:
    """Ranks that leave an equal share of the squared tolerance to every matrix."""
    out = []
    for matrix in matrices:
        short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        tails = np.cumsum(np.clip(np.linalg.eigvalsh(short @ short.T), 0, None))
        out.append(int((tails > rtol**2 * tails[-1] / len(matrices)).sum()))
    return out


def line(library: str, row: Mapping[str, Any], ratio: float) -> str:
    """Return a row of the printed table."""
    return (
        f"{row['label']:38s} {1e3 * row['seconds']:8.1f} ms  error {row['error']:.4f}  "
        f"{row['numbers']:8d} numbers, {row['of'] / row['numbers']:.0f} to 1"
    )


def figure(results: Path, png: Path) -> None:
    """Numbers stored over the error, and one decomposition with its ranks and its error budget."""
    import torch
    from matplotlib.figure import Figure

    import tnreg
    from tnreg import plots

    found = json.loads(results.read_text())["results"]
    drawn = Figure(figsize=(12, 7), layout="constrained")
    panels = drawn.subplots(2, 2)
    for ax, (name, tolerances) in zip(panels[0], TOLERANCES.items(), strict=True):
        for library in LIBRARIES:
            rows = [found[f"{name} {rtol:g}"][library] for rtol in tolerances]
            ours = library.startswith("tnreg")
            ax.loglog(
                [r["error"] for r in rows],
                [r["numbers"] for r in rows],
                marker="o" if ours else "x",
                lw=1.4,
                ls="-" if ours else "--",
                label=rows[0]["label"],
            )
        ax.set_title(name)
        ax.set_xlabel("relative error reached")
        ax.set_ylabel("numbers stored")
        ax.legend(fontsize=7)
    x = torch.from_numpy(load("indian-pines"))
    model = tnreg.decompose(x, tnreg.ModeTree([[0, 1], 2]), rtol=0.05)
    labels = {0: "row", 1: "column", 2: "band"}
    plots.decomposition(tnreg.spectra(x, model.tree), model, panels[1], labels=labels)
    plots.save_figure(drawn, png)


if __name__ == "__main__":
    if "--figure" in sys.argv:
        figure(*map(Path, sys.argv[sys.argv.index("--figure") + 1 :]))
    else:
        main(__doc__, LIBRARIES, worker, rounds=2, turns=3, line=line)
