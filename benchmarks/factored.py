"""Factored tensors beside hiepy, tensap and torchTT: spectra, rounding, and arithmetic of tensor trains.

``python benchmarks/factored.py --peers PYTHON --hiepy PYTHON [--out FILE.json] [--png FILE.png]``;
interpreters of environments with ``pip install tensap torchTT`` and ``pip install hiepy`` (Python 3.12).
Every library runs in a process of its own, in turns: medians of processor time with one thread, after a first
call. OMP_NUM_THREADS=1 is set for what numpy starts on its own.

The tensors: complete binary trees, modes of size 20, all bonds of one rank, float64, normal weights;
the j-th index of every bond scaled by 0.7**j in ``cut``, where a relative error of 1e-3 takes most of it
away, and not in ``generic``, where nothing can go. torchTT has tensor trains only, of the same order, size
and rank; it has no spectra: rounding to 1e-13 stands for them, which computes those of all bonds. Checked:
spectra against tnreg's to 1e-8, the error of rounding, and the norm of a sum of a train with itself.

With ``--png`` tnreg alone is timed up to order 4096, at rank 16.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from peers import main, timed, version

SIZE, RTOL = 20, 1e-3
CASES = ((64, 16), (64, 32), (256, 16))
TRAINS = (*CASES, (256, 32))
LIBRARIES = {
    "tnreg": "tnreg",
    "hiepy": "hiepy",
    "tensap": "peers",
    "tnreg, tensor train": "tnreg",
    "torchTT": "peers",
}


# Calls by name, what to keep of what a call gave, and the library's version.
Setup = tuple[dict[str, Callable[[], Any]], Callable[[str, Any], dict[str, Any]], str]


def weights(order: int, rank: int, decay: float) -> dict[int, np.ndarray]:
    """``{node: weight}`` with nodes numbered as in a heap: the root 1, the children of i 2i and 2i + 1."""
    random = np.random.default_rng(order + rank)
    scale = decay ** np.arange(rank)
    by_node = {}
    for node in range(1, order):
        shape = (rank, rank) + ((rank,) if node > 1 else ())
        first, second = (
            scale.reshape(-1, *[1] * (len(shape) - 1)),
            scale.reshape(-1, *[1] * (len(shape) - 2)),
        )
        by_node[node] = random.standard_normal(shape) / rank * first * second
    for node in range(order, 2 * order):
        by_node[node] = random.standard_normal((SIZE, rank)) / math.sqrt(SIZE)
    return by_node


def train(order: int, rank: int, decay: float) -> list[np.ndarray]:
    """Cores ``(r, SIZE, r)`` of a tensor train."""
    random = np.random.default_rng(order + rank)
    scale = decay ** np.arange(rank)
    ends = [1, *[rank] * (order - 1), 1]
    cores = [random.standard_normal((a, SIZE, b)) / math.sqrt(SIZE * a) for a, b in itertools.pairwise(ends)]
    return [c * scale.reshape(-1, 1, 1) if c.shape[0] > 1 else c for c in cores]


def worker(library: str, turns: int) -> dict[str, dict[str, Any]]:
    """Return times of one library on all cases."""
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    rows: dict[str, dict[str, Any]] = {}
    setup = SETUPS[library]
    for order, rank in TRAINS if setup in (_tnreg_train, _torchtt) else CASES:
        for name, decay in (("generic", 1.0), ("cut", 0.7)):
            calls, check, label = setup(order, rank, decay)
            for what, call in calls.items():
                if what != "round" and name == "cut":
                    continue
                case = f"{what} {order}/{rank}" + (f" {name}" if what == "round" else "")
                seconds = timed(call, turns, time.process_time)
                rows[case] = {"seconds": seconds, "version": label, **check(what, call())}
    return rows


def _rounded(error: Any, rank: Any) -> dict[str, Any]:
    return {"error": float(error), "rank": int(rank)}


def _tnreg(order: int, rank: int, decay: float) -> Setup:
    import torch

    import tnreg

    tree = tnreg.ModeTree.binary(order)
    heap = {tree.root: 1}
    for node in reversed(tree.nodes):
        for k, child in enumerate(tree.children(node)):
            heap[child] = 2 * heap[node] + k
    numbers = weights(order, rank, decay)
    model = tnreg.Factorization.from_weights(
        tree, {node: torch.from_numpy(numbers[heap[node]]) for node in tree.nodes}
    )
    calls, check = _tnreg_calls(model)
    return {what: calls[what] for what in ("spectra", "round")}, check, tnreg.__version__


def _tnreg_calls(model: Any) -> tuple[dict[str, Callable[[], Any]], Callable[..., dict[str, Any]]]:
    import tnreg
    from tnreg import algebra

    def check(what: str, found: Any) -> dict[str, Any]:
        if what == "spectra":
            values = found[model.tree.children(model.tree.root)[0]]
            return {"first": [float(s) for s in values[:3]]}
        if what == "add":
            return {"twice": float(found.norm() / model.norm())}
        if what != "round":
            return {}
        # bonds of bare leaves are modes
        inner = {i for i, kind in enumerate(found.network.joins) if kind != "bare"}
        bonds = [bond for i, bond in enumerate(found.network.bonds) if i in inner]
        return _rounded(algebra.subtract(model, found).norm() / model.norm(), max(bonds))

    other = copy.deepcopy(model)
    calls = {
        "spectra": lambda: tnreg.spectra(model),
        "round": lambda: tnreg.truncate(model, rtol=RTOL),
        "add": lambda: algebra.add(model, other),
        "inner": lambda: model.inner(other),
        "norm": model.norm,
    }
    return calls, check


def _tnreg_train(order: int, rank: int, decay: float) -> Setup:
    import torch

    import tnreg
    from tnreg.convert.formats import from_tensor_train

    model = from_tensor_train([torch.from_numpy(core) for core in train(order, rank, decay)])
    return *_tnreg_calls(model), tnreg.__version__


def _hiepy(order: int, rank: int, decay: float) -> Setup:
    import hiepy
    import torch
    from hiepy.linalg.local_left_svd import local_left_svd

    numbers = weights(order, rank, decay)
    tree = hiepy.DimTree.from_order(order)
    heap, leaves, inner = {tree.get_root(): 1}, {}, {}
    for node in tree.get_nodes("top-down"):
        weight = torch.from_numpy(numbers[heap[node]])
        if tree.is_leaf(node):
            leaves[node] = weight
            continue
        inner[node] = weight if heap[node] > 1 else weight.unsqueeze(-1)
        for k, child in enumerate(tree.get_children(node)):
            heap[child] = 2 * heap[node] + k
    x = hiepy.HTTensor(leaves, inner, tree)
    left = tree.get_children(tree.get_root())[0]

    def check(what: str, found: Any) -> dict[str, Any]:
        if what == "spectra":
            return {"first": [float(s) for s in found[left][1][:3]]}
        error = hiepy.norm(hiepy.sub(found[0], x)) / hiepy.norm(x)
        return _rounded(error, max(found[0].rank.values()))

    calls = {"spectra": lambda: local_left_svd(x), "round": lambda: hiepy.truncate(x, {"rtol": RTOL})}
    return calls, check, version("hiepy") or "0.1.0"


def _tensap(order: int, rank: int, decay: float) -> Setup:
    import tensap

    tree = tensap.DimensionTree.balanced(order)
    numbers = weights(order, rank, decay)
    x = tensap.TreeBasedTensor([numbers[node] for node in range(1, 2 * order)], tree)
    truncator = tensap.Truncator(RTOL)

    def check(what: str, found: Any) -> dict[str, Any]:
        if what == "spectra":
            return {"first": [float(s) for s in found[1][:3]]}
        return _rounded((found - x).norm() / x.norm(), max(found.ranks))

    return {"spectra": x.singular_values, "round": lambda: truncator.hsvd(x)}, check, version("tensap")


def _torchtt(order: int, rank: int, decay: float) -> Setup:
    import torch
    import torchtt

    x, other = (torchtt.TT([torch.from_numpy(c) for c in train(order, rank, decay)]) for _ in range(2))

    def check(what: str, found: Any) -> dict[str, Any]:
        if what == "add":
            return {"twice": float(found.norm() / x.norm())}
        return _rounded((found - x).norm() / x.norm(), max(found.R)) if what == "round" else {}

    calls = {
        "spectra": lambda: x.round(1e-13),
        "round": lambda: x.round(RTOL),
        "add": lambda: x + other,
        "inner": lambda: torchtt.dot(x, other),
        "norm": x.norm,
    }
    return calls, check, version("torchTT")


SETUPS: dict[str, Callable[[int, int, float], Setup]] = {
    "tnreg": _tnreg,
    "tnreg, tensor train": _tnreg_train,
    "hiepy": _hiepy,
    "tensap": _tensap,
    "torchTT": _torchtt,
}


def line(library: str, row: Mapping[str, Any], ratio: float) -> str:
    """Return a row of the printed table."""
    what = f"error {row['error']:.1e} rank {row['rank']}" if "error" in row else ""
    return f"{library:20s} {1e3 * row['seconds']:8.1f} ms {ratio:6.1f} x  {what}"


def growth(png: str) -> dict[str, list[float]]:
    """Seconds of spectra and rounding of tnreg over the order, as a plot."""
    import statistics

    import torch
    from matplotlib.figure import Figure

    torch.set_num_threads(1)
    orders = [2**k for k in range(4, 13)]
    found: dict[str, list[float]] = {"order": [float(n) for n in orders]}
    for n in orders:
        for what, call in _tnreg(n, 16, 1.0)[0].items():
            found.setdefault(what, []).append(statistics.median(timed(call, 5)))
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    ax = figure.subplots()
    for what, mark in (("spectra", "o"), ("round", "s")):
        ax.loglog(orders, found[what], marker=mark, lw=1.4, label=what)
    start = found["spectra"][2] / orders[2]
    ax.loglog(orders, [start * n for n in orders], color="0.6", ls=":", label="linear")
    ax.set_xlabel("order of the tensor (rank 16, modes of size 20)")
    ax.set_ylabel("seconds")
    ax.legend()
    figure.savefig(png, dpi=110)
    return found


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    if "--png" in sys.argv:
        print(growth(sys.argv[sys.argv.index("--png") + 1]))
    else:
        main(__doc__, LIBRARIES, worker, rounds=3, turns=5, line=line, threads=1)
