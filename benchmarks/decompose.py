"""Hierarchical SVD of 16^6 float64 to 1e-6 beside tensap, torchTT and tensorly, same tensors, same error.

``python benchmarks/decompose.py --peers PYTHON [--out FILE.json]``; PYTHON is the interpreter of an
environment with ``pip install tensap torchTT tensorly``. Every library runs in a process of its own, in
turns; times are medians over the turns, after a first call of each. The error reached is checked.

Tensors: ``smooth`` 1 / (1 + sum_k (k+1) i_k / 15), and ``rank 8`` a hierarchical Tucker tensor of bonds 8
with noise of 1e-9. torchTT and tensorly make tensor trains, tnreg both a binary tree and a tensor train.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZE, ORDER, RTOL = 16, 6, 1e-6
LIBRARIES = ("tnreg, binary tree", "tnreg, tensor train", "tensap", "torchTT", "tensorly")


def tensors() -> dict[str, np.ndarray]:
    """The two tensors, the same in every process."""
    random = np.random.default_rng(0)
    grid = np.linspace(0, 1, SIZE)
    steps = np.meshgrid(*(grid * (k + 1) for k in range(ORDER)), indexing="ij", sparse=True)
    factors = [random.standard_normal((SIZE, 8)) for _ in range(ORDER)]
    pairs = [
        np.einsum(
            "ia,jb,abc->ijc", factors[2 * k], factors[2 * k + 1], random.standard_normal((8, 8, 8))
        )
        for k in range(3)
    ]
    low = np.einsum(
        "ija,klb,mnc,abc->ijklmn", *pairs, random.standard_normal((8, 8, 8)), optimize=True
    )
    noise = random.standard_normal(low.shape)
    low = low / np.linalg.norm(low) + 1e-9 * noise / np.linalg.norm(noise)
    return {"smooth": 1 / (1 + sum(steps)), "rank 8": low}


def worker(library: str, turns: int) -> dict[str, Any]:
    """Times and errors of one library on both tensors."""
    import torch

    torch.set_num_threads(2)
    out: dict[str, Any] = {}
    for name, x in tensors().items():
        call, dense, version = _setup(library, x)
        found = call()
        error = float(
            np.linalg.norm(np.asarray(dense(found)).reshape(x.shape) - x) / np.linalg.norm(x)
        )
        times = []
        for _ in range(turns):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        out[name] = {"seconds": times, "error": error, "version": version}
    return out


def _setup(library: str, x: np.ndarray) -> tuple[Callable[[], Any], Callable[[Any], Any], str]:
    import torch

    if library.startswith("tnreg"):
        import tnreg

        tree = tnreg.ModeTree.binary(ORDER)
        if library.endswith("train"):
            tree = tnreg.ModeTree.caterpillar(ORDER)
        given = torch.from_numpy(x)
        return (
            lambda: tnreg.decompose(given, tree, rtol=RTOL),
            lambda f: f.to_tensor().detach().numpy(),
            tnreg.__version__,
        )
    if library == "torchTT":
        import torchtt

        given = torch.from_numpy(x)
        return lambda: torchtt.TT(given, eps=RTOL), lambda f: f.full().numpy(), _version("torchTT")
    if library == "tensap":
        import tensap

        tree = tensap.DimensionTree.balanced(ORDER)
        truncator = tensap.Truncator(RTOL)
        full = tensap.FullTensor(x)
        return (
            lambda: truncator.hsvd(full, tree),
            lambda f: f.full().data,
            _version("tensap"),
        )
    import tensorly
    from tensorly.decomposition import tensor_train

    # tensorly cuts by ranks only: given those that torchTT or tnreg find it has to do the same work
    ranks = [1, *_train_ranks(x), 1]
    return lambda: tensor_train(x, ranks), lambda f: tensorly.tt_to_tensor(f), _version("tensorly")


def _train_ranks(x: np.ndarray) -> list[int]:
    """Ranks that a tensor train needs for the tolerance, from the spectra of its unfoldings."""
    share = RTOL**2 / (ORDER - 1) * np.linalg.norm(x) ** 2
    ranks = []
    for k in range(1, ORDER):
        matrix = x.reshape(SIZE**k, -1)
        gram = matrix @ matrix.T if k <= ORDER // 2 else matrix.T @ matrix
        tails = np.cumsum(np.clip(np.linalg.eigvalsh(gram), 0, None))
        ranks.append(int((tails > share).sum()))
    return ranks


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main() -> None:
    """Run all libraries in turns and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peers", help="interpreter of an environment with the peers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        arguments.to.write_text(json.dumps(worker(arguments.worker, arguments.turns)))
        return
    results: dict[str, dict[str, Any]] = {name: {} for name in ("smooth", "rank 8")}
    for _ in range(arguments.rounds):
        for library in LIBRARIES:
            python = sys.executable if library.startswith("tnreg") else arguments.peers
            if python is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                to = Path(folder) / "times.json"
                subprocess.run(
                    [python, "-W", "ignore", __file__, "--worker", library, "--to", to,
                     "--turns", str(arguments.turns)],
                    check=True, stdout=subprocess.DEVNULL,
                )  # fmt: skip
                for name, found in json.loads(to.read_text()).items():
                    row = results[name].setdefault(library, {**found, "seconds": []})
                    row["seconds"] += found["seconds"]
    machine = f"{platform.machine()} CPU, 2 threads, Python {platform.python_version()}"
    print(machine)
    for name, rows in results.items():
        base = statistics.median(rows[LIBRARIES[0]]["seconds"])
        for library, row in rows.items():
            row["seconds"] = statistics.median(row["seconds"])
            ratio = row["seconds"] / base
            label = f"{library} {row['version']}"
            print(
                f"  {name:8s} {label:28s} {row['seconds']:7.2f} s  {ratio:5.1f} x  error {row['error']:.1e}"
            )
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"machine": machine, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
