"""Singular values at every node of a tree, of dense tensors, beside one ``svdvals`` per node.

``python benchmarks/spectra.py [--out FILE.json]``. Tensors in float64 on a binary tree, and on a caterpillar
and a star where the name says so: ``normal`` (random numbers), ``low`` (rank 3), ``graded`` (over four
decades at the leaves) and ``smooth`` (1 / (1 + sum of coordinates), values down to rounding). Every way runs
in a process of its own; processor time on one thread, medians. The largest difference of the two, relative
to the largest value of its node, is checked to be below 1e-11.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

from peers import main, timed

SHAPES = {
    **{f"8^{n}": (8,) * n for n in (4, 5, 6, 7)},
    "16^4": (16,) * 4,
    "16^6": (16,) * 6,
    "32^3": (32,) * 3,
    "64^3": (64,) * 3,
    "4^8": (4,) * 8,
    "2^12": (2,) * 12,
    "3^4": (3,) * 4,
    "5 9 3 17 8": (5, 9, 3, 17, 8),
}
KEPT = Path(tempfile.gettempdir()) / "tnreg-benchmark-spectra.pt"


def tensor(kind: str, sizes: tuple[int, ...]) -> Any:
    """Return the tensors, the same in every process."""
    import torch

    random = torch.Generator().manual_seed(0)
    if kind == "smooth":
        grids = [torch.linspace(0, 1, size, dtype=torch.float64) for size in sizes]
        return 1 / (1 + sum(torch.meshgrid(grids, indexing="ij")))
    if kind == "low":
        letters = "abcdefghijkl"[: len(sizes)]
        terms = [torch.randn(size, 3, generator=random, dtype=torch.float64) for size in sizes]
        return torch.einsum(",".join(f"{x}z" for x in letters) + "->" + letters, *terms)
    x = torch.randn(sizes, generator=random, dtype=torch.float64)
    for size in sizes if kind == "graded" else ():
        turn = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))[0]
        x = torch.tensordot(x, turn * torch.logspace(0, -4, size, dtype=torch.float64), dims=([0], [1]))
    return x


def cases() -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """List name, tree, sizes and kind of every row."""
    for name, sizes in SHAPES.items():
        large = math.prod(sizes) > 2**20
        for tree in ("binary",) if large else ("binary", "caterpillar", "star"):
            for kind in ("normal", "smooth") if large else ("normal", "graded", "low", "smooth"):
                if tree != "star" or len(sizes) < 10:
                    yield f"{name} {kind}" + ("" if tree == "binary" else f", {tree}"), tree, sizes, kind


def worker(library: str, turns: int) -> dict[str, dict[str, Any]]:
    """Return times of one way on all tensors; the second way compares its values with the first's."""
    import torch

    import tnreg

    torch.set_num_threads(1)
    out: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[Any, Any]] = {}
    for case, name, sizes, kind in cases():
        tree, x = getattr(tnreg.ModeTree, name)(len(sizes)), tensor(kind, sizes)
        many = turns if x.numel() > 2**18 else 10 * turns
        if library == "tnreg":
            values[case] = tnreg.spectra(x, tree)
            call = partial(tnreg.spectra, x, tree)
            out[case] = {"seconds": timed(call, many, process_time)}
            continue
        found: dict[Any, Any] = {}

        def each(x: Any = x, tree: Any = tree, found: dict[Any, Any] = found) -> None:
            for node in tree.nodes[:-1]:
                matrix = tnreg.matricize(x, tree.modes_below(node))
                found[node] = torch.linalg.svdvals(matrix)

        # the largest ones take a minute: once
        seconds = timed(each, many, process_time) if x.numel() <= 2**20 else _once(each)
        ours = torch.load(KEPT, weights_only=False)[case]
        worst = max(float((ours[v] - s).abs().max() / s[0]) for v, s in found.items())
        assert worst < 1e-11, (case, worst)
        out[case] = {"seconds": seconds, "difference": worst}
    if library == "tnreg":
        torch.save(values, KEPT)
    return out


def _once(call: Any) -> list[float]:
    start = process_time()
    call()
    return [process_time() - start]


def line(library: str, row: Mapping[str, Any], ratio: float) -> str:
    """Return a row of the printed table."""
    what = f"difference {row['difference']:.1e}" if "difference" in row else ""
    return f"{library:18s} {1e3 * row['seconds']:10.2f} ms {ratio:6.1f} x  {what}"


if __name__ == "__main__":
    ways = {"tnreg": "tnreg", "svdvals per node": "tnreg"}
    main(__doc__, ways, worker, rounds=1, turns=3, line=line)
    if "--worker" not in sys.argv:
        KEPT.unlink(missing_ok=True)
