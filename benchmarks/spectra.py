"""Singular values at every node of a binary tree, of dense tensors, beside one ``svdvals`` per node.

``python benchmarks/spectra.py [--out FILE.json]``. Tensors 8^4 ... 8^7 and 16^6 in float64, ``normal``
(random numbers) and ``smooth`` (1 / (1 + sum of coordinates), values down to rounding). Every way runs in
a process of its own; medians. The largest difference of the two, relative to the largest value of its
node, is checked to be below 1e-10.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peers import main, timed

SHAPES = ((8, 4), (8, 5), (8, 6), (8, 7), (16, 6))
KEPT = Path(tempfile.gettempdir()) / "tnreg-benchmark-spectra.pt"


def tensor(kind: str, size: int, order: int) -> Any:
    """Return the tensors, the same in every process."""
    import torch

    if kind == "normal":
        random = torch.Generator().manual_seed(0)
        return torch.randn((size,) * order, generator=random, dtype=torch.float64)
    grid = torch.linspace(0, 1, size, dtype=torch.float64)
    return 1 / (1 + sum(torch.meshgrid([grid] * order, indexing="ij")))


def worker(library: str, turns: int) -> dict[str, dict[str, Any]]:
    """Return times of one way on all tensors; the second way compares its values with the first's."""
    import torch

    import tnreg

    torch.set_num_threads(2)
    out: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[Any, Any]] = {}
    for size, order in SHAPES:
        tree = tnreg.ModeTree.binary(order)
        for kind in ("normal", "smooth"):
            x = tensor(kind, size, order)
            case = f"{size}^{order} {kind}"
            if library == "tnreg":
                seconds = timed(lambda x=x, tree=tree: tnreg.spectra(x, tree), turns)
                values[case] = tnreg.spectra(x, tree)
                out[case] = {"seconds": seconds}
                continue
            found: dict[Any, Any] = {}

            def each(x: Any = x, tree: Any = tree, found: dict[Any, Any] = found) -> None:
                for node in tree.nodes[:-1]:
                    matrix = tnreg.matricize(x, tree.modes_below(node))
                    found[node] = torch.linalg.svdvals(matrix)

            # the largest ones take a minute: once
            seconds = timed(each, turns) if x.numel() < 2**20 else _once(each)
            ours = torch.load(KEPT, weights_only=False)[case]
            worst = max(float((ours[v] - s).abs().max() / s[0]) for v, s in found.items())
            assert worst < 1e-10, (case, worst)
            out[case] = {"seconds": seconds, "difference": worst}
    if library == "tnreg":
        torch.save(values, KEPT)
    return out


def _once(call: Any) -> list[float]:
    import time

    start = time.perf_counter()
    call()
    return [time.perf_counter() - start]


def line(library: str, row: Mapping[str, Any], ratio: float) -> str:
    """Return a row of the printed table."""
    what = f"difference {row['difference']:.1e}" if "difference" in row else ""
    return f"{library:18s} {1e3 * row['seconds']:10.1f} ms {ratio:6.1f} x  {what}"


if __name__ == "__main__":
    ways = {"tnreg": "tnreg", "svdvals per node": "tnreg"}
    main(__doc__, ways, worker, rounds=1, turns=3, line=line)
    if "--worker" not in sys.argv:
        KEPT.unlink(missing_ok=True)
