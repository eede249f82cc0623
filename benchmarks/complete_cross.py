"""Evaluations that cross approximation takes for tensors given as functions, beside teneva and torchTT.

``python benchmarks/complete_cross.py --peers PYTHON``; PYTHON is the interpreter of an environment with
``pip install teneva torchTT``. Every evaluation that a library asks for anew counts, those to check included;
the error is that on 20,000 other random entries. Of a peer's settings the one counts that reaches the error
with the fewest evaluations.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from completion_tasks import Array, borehole, error, pairs
from peers import version

OUT = Path(__file__).parent / "results" / "complete_cross.json"
RTOL, SEEDS = 1e-6, 3
Function = Callable[[Array], Array]
Found = Callable[[Array], Array]  # values at an index


def inverse_sum(u: Array) -> Array:
    """Return a Hilbert tensor, ``1 / (1 + i_1 + .. + i_8)`` on 32 points each."""
    return np.asarray(1 / (1 + 31 * u.sum(1)))


TASKS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "borehole, 32⁸": (borehole, (32,) * 8),
    "five scattered pairs, 16¹⁰": (pairs, (16,) * 10),
    "1 / (1 + Σ i), 32⁸": (inverse_sum, (32,) * 8),
}


def tnreg_cross(function: Function, sizes: tuple[int, ...], seed: int, tree: Any) -> Found:
    """Run ours, along a tree or (``None``) one that it finds."""
    import torch

    import tnreg

    found = tnreg.cross(lambda i: function(i.numpy()), sizes, tree, rtol=RTOL, seed=seed, progress=False)

    def at(index: Array) -> Array:
        with torch.no_grad():
            return np.asarray(found.model.entries(torch.from_numpy(index)))

    return at


def teneva_cross(function: Function, sizes: tuple[int, ...], seed: int, most: int) -> Found:
    """Run teneva until 100 random entries are met; ranks grow by at most so many in a step."""
    import teneva

    index = np.stack([np.random.default_rng(seed).integers(0, n, 100) for n in sizes], 1)
    train = teneva.cross(
        function, teneva.rand(list(sizes), 1, seed=seed), nswp=12, dr_max=most, cache={}, e_vld=RTOL,
        I_vld=index, y_vld=function(index), m_cache_scale=1000,
    )  # fmt: skip
    return lambda i: np.asarray(teneva.get_many(train, i))


def torchtt_cross(function: Function, sizes: tuple[int, ...], seed: int, eps: float) -> Found:
    """Run torchTT's DMRG cross with a tolerance of its own."""
    import torch
    import torchtt

    torch.manual_seed(seed)
    train = torchtt.interpolate.dmrg_cross(
        lambda i: torch.from_numpy(function(i.numpy())), list(sizes), eps=eps
    )

    def at(index: Array) -> Array:
        found = torch.ones(len(index), 1, dtype=torch.float64)
        for mode, core in enumerate(train.cores):
            found = torch.einsum("br,rbs->bs", found, core[:, index[:, mode]])
        return np.asarray(found[:, 0])

    return at


def methods(order: int, ours: bool) -> Iterator[tuple[str, Callable[..., Found], Any]]:
    """Yield the library, how to run it, and a setting of its."""
    if not ours:
        yield from (("teneva", teneva_cross, most) for most in (1, 2))
        yield from (("torchTT", torchtt_cross, eps) for eps in (1e-4, 1e-6))
        return
    from tnreg import ModeTree

    yield "tnreg, tree found", tnreg_cross, None
    yield "tnreg, binary tree", tnreg_cross, ModeTree.binary(order)
    yield "tnreg, tensor train", tnreg_cross, ModeTree.caterpillar(order)


def rows(ours: bool) -> Iterator[dict[str, Any]]:
    """Run the methods of one environment."""
    warnings.simplefilter("ignore")
    for task, (values, sizes) in TASKS.items():
        test = np.stack([np.random.default_rng(99).integers(0, n, 20_000) for n in sizes], 1)
        for name, run, setting in methods(len(sizes), ours):
            for seed in range(SEEDS):
                asked = set[bytes]()

                def function(index: Array, seen: set[bytes] = asked, grid: int = sizes[0] - 1) -> Array:
                    index = np.ascontiguousarray(index, dtype=np.int64)
                    seen.update(map(bytes, index))
                    return values(index / grid)  # noqa: B023

                at = run(function, sizes, seed, setting)
                reached = error(at(test), values(test / (sizes[0] - 1)))
                yield {
                    "task": task, "method": name, "setting": str(setting), "seed": seed,
                    "evaluations": len(asked), "error": reached,
                }  # fmt: skip


def main() -> None:
    """Run ours here and the peers in their environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", required=True, help="interpreter of the peers' environment, or 'here'")
    asked = parser.parse_args()
    if asked.peers == "here":
        found = {"rows": list(rows(False)), "versions": {n: version(n) for n in ("teneva", "torchTT")}}
        print("\n" + json.dumps(found))
        return
    command = [asked.peers, __file__, "--peers", "here"]
    peers = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    about = {"machine": machine, "rtol": RTOL, "versions": peers["versions"]}
    results = {**about, "results": [*rows(True), *peers["rows"]]}
    OUT.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
