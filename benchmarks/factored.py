"""Spectra and rounding of factored tensors beside hiepy, tensap and torchTT, and their growth with the order.

``python benchmarks/factored.py --peers PYTHON --hiepy PYTHON [--out FILE.json] [--png FILE.png]``;
interpreters of environments with ``pip install tensap torchTT`` and ``pip install hiepy`` (Python 3.12).
Every library runs in a process of its own, in turns; medians, after a first call of each.

The tensors: complete binary trees, modes of size 20, all bonds of one rank, float64, normal weights;
the j-th index of every bond scaled by 0.7**j in ``cut``, where a relative error of 1e-3 takes most of it
away, and not in ``generic``, where nothing can go. torchTT has tensor trains only, of the same order, size
and rank. Checked: spectra against tnreg's to 1e-8, and the error of rounding.

With ``--png`` tnreg alone is timed up to order 4096, at rank 16.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from peers import main, timed, version

SIZE, RTOL = 20, 1e-3
CASES = ((64, 16), (64, 32), (256, 16))
LIBRARIES = {
    "tnreg": "tnreg",
    "hiepy": "hiepy",
    "tensap": "peers",
    "tnreg, tensor train": "tnreg",
    "torchTT": "peers",
}


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

    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    rows: dict[str, dict[str, Any]] = {}
    for order, rank in CASES:
        for name, decay in (("generic", 1.0), ("cut", 0.7)):
            spectra, rounded, check, label = SETUPS[library](order, rank, decay)
            if spectra is not None and name == "generic":
                rows[f"spectra {order}/{rank}"] = {
                    "seconds": timed(spectra, turns),
                    "first": [float(s) for s in check(spectra())],
                    "version": label,
                }
            error, largest = check(rounded(), True)
            rows[f"round {order}/{rank} {name}"] = {
                "seconds": timed(rounded, turns),
                "error": float(error),
                "rank": int(largest),
                "version": label,
            }
    return rows


def _tnreg(order: int, rank: int, decay: float) -> tuple[Any, Any, Callable[..., Any], str]:
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
    left = tree.children(tree.root)[0]
    return *_tnreg_calls(model, left), tnreg.__version__


def _tnreg_calls(model: Any, watched: Any) -> tuple[Any, Any, Callable[..., Any]]:
    import torch

    import tnreg
    from tnreg import algebra

    def check(found: Any, rounding: bool = False) -> Any:
        if not rounding:
            return found[watched][:3]
        error = algebra.subtract(model, found).norm() / model.norm()
        return error.detach(), max(found.network.bonds)

    def spectra() -> Any:
        with torch.no_grad():
            return tnreg.spectra(model)

    return spectra, lambda: tnreg.truncate(model, rtol=RTOL), check


def _tnreg_train(order: int, rank: int, decay: float) -> tuple[Any, Any, Callable[..., Any], str]:
    import torch

    import tnreg
    from tnreg.convert.formats import from_tensor_train

    model = from_tensor_train([torch.from_numpy(core) for core in train(order, rank, decay)])
    _, rounded, check = _tnreg_calls(model, 0)
    return None, rounded, check, tnreg.__version__


def _hiepy(order: int, rank: int, decay: float) -> tuple[Any, Any, Callable[..., Any], str]:
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

    def check(found: Any, rounding: bool = False) -> Any:
        if not rounding:
            return found[left][1][:3]
        return hiepy.norm(hiepy.sub(found[0], x)) / hiepy.norm(x), max(found[0].rank.values())

    return (
        lambda: local_left_svd(x),
        lambda: hiepy.truncate(x, {"rtol": RTOL}),
        check,
        version("hiepy") or "0.1.0",
    )


def _tensap(order: int, rank: int, decay: float) -> tuple[Any, Any, Callable[..., Any], str]:
    import tensap

    tree = tensap.DimensionTree.balanced(order)
    numbers = weights(order, rank, decay)
    x = tensap.TreeBasedTensor([numbers[node] for node in range(1, 2 * order)], tree)
    truncator = tensap.Truncator(RTOL)

    def check(found: Any, rounding: bool = False) -> Any:
        if not rounding:
            return found[1][:3]
        return (found - x).norm() / x.norm(), max(found.ranks)

    return (lambda: x.singular_values(), lambda: truncator.hsvd(x), check, version("tensap"))


def _torchtt(order: int, rank: int, decay: float) -> tuple[Any, Any, Callable[..., Any], str]:
    import torch
    import torchtt

    x = torchtt.TT([torch.from_numpy(core) for core in train(order, rank, decay)])

    def check(found: Any, rounding: bool = False) -> Any:
        return (found - x).norm() / x.norm(), max(found.R)

    return None, lambda: x.round(RTOL), check, version("torchTT")


SETUPS: dict[str, Callable[..., tuple[Any, Any, Callable[..., Any], str]]] = {
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

    torch.set_num_threads(2)
    orders = [2**k for k in range(4, 13)]
    found: dict[str, list[float]] = {"order": [float(n) for n in orders]}
    for n in orders:
        for what, call in zip(("spectra", "truncate"), _tnreg(n, 16, 1.0)[:2], strict=True):
            found.setdefault(what, []).append(statistics.median(timed(call, 5)))
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    ax = figure.subplots()
    for what, mark in (("spectra", "o"), ("truncate", "s")):
        ax.loglog(orders, found[what], marker=mark, lw=1.4, label=what)
    start = found["spectra"][2] / orders[2]
    ax.loglog(orders, [start * n for n in orders], color="0.6", ls=":", label="linear")
    ax.set_xlabel("order of the tensor (rank 16, modes of size 20)")
    ax.set_ylabel("seconds")
    ax.legend()
    figure.savefig(png, dpi=110)
    return found


if __name__ == "__main__":
    if "--png" in sys.argv:
        print(growth(sys.argv[sys.argv.index("--png") + 1]))
    else:
        main(__doc__, LIBRARIES, worker, rounds=2, turns=5, line=line)
