"""Hierarchical SVD of 16^6 float64 to 1e-6 beside tensap, torchTT and tensorly, same tensors, same error.

``python benchmarks/decompose.py --peers PYTHON [--out FILE.json]``; PYTHON is the interpreter of an
environment with ``pip install tensap torchTT tensorly``. Every library runs in a process of its own, in
turns; times are medians over the turns, after a first call of each. The error reached is checked.

Tensors: ``smooth`` 1 / (1 + sum_k (k+1) i_k / 15), and ``rank 8`` a hierarchical Tucker tensor of bonds 8
with noise of 1e-9. torchTT and tensorly make tensor trains, tnreg both a binary tree and a tensor train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from peers import main, timed, version

SIZE, ORDER, RTOL = 16, 6, 1e-6
LIBRARIES = {
    "tnreg, binary tree": "tnreg",
    "tnreg, tensor train": "tnreg",
    "tensap": "peers",
    "torchTT": "peers",
    "tensorly": "peers",
}


def tensors() -> dict[str, np.ndarray]:
    """Return the two tensors, the same in every process."""
    random = np.random.default_rng(0)
    grid = np.linspace(0, 1, SIZE)
    steps = np.meshgrid(*(grid * (k + 1) for k in range(ORDER)), indexing="ij", sparse=True)
    factors = [random.standard_normal((SIZE, 8)) for _ in range(ORDER)]
    pairs = [
        np.einsum("ia,jb,abc->ijc", factors[2 * k], factors[2 * k + 1], random.standard_normal((8, 8, 8)))
        for k in range(3)
    ]
    low = np.einsum("ija,klb,mnc,abc->ijklmn", *pairs, random.standard_normal((8, 8, 8)), optimize=True)
    noise = random.standard_normal(low.shape)
    low = low / np.linalg.norm(low) + 1e-9 * noise / np.linalg.norm(noise)
    return {"smooth": 1 / (1 + sum(steps)), "rank 8": low}


def worker(library: str, turns: int) -> dict[str, Any]:
    """Return times and errors of one library on both tensors."""
    import torch

    torch.set_num_threads(2)
    rows: dict[str, Any] = {}
    for name, x in tensors().items():
        call, dense, version = _setup(library, x)
        result = call()
        error = float(np.linalg.norm(np.asarray(dense(result)).reshape(x.shape) - x) / np.linalg.norm(x))
        rows[name] = {"seconds": timed(call, turns), "error": error, "version": version}
    return rows


def _setup(library: str, x: np.ndarray) -> tuple[Callable[[], Any], Callable[[Any], Any], str]:
    import torch

    if library.startswith("tnreg"):
        import tnreg

        tree = tnreg.ModeTree.binary(ORDER)
        if library.endswith("train"):
            tree = tnreg.ModeTree.caterpillar(ORDER)
        tensor = torch.from_numpy(x)
        return (
            lambda: tnreg.decompose(tensor, tree, rtol=RTOL),
            lambda f: f.to_tensor().detach().numpy(),
            tnreg.__version__,
        )
    if library == "torchTT":
        import torchtt

        tensor = torch.from_numpy(x)
        return lambda: torchtt.TT(tensor, eps=RTOL), lambda f: f.full().numpy(), version("torchTT")
    if library == "tensap":
        import tensap

        tree = tensap.DimensionTree.balanced(ORDER)
        truncator = tensap.Truncator(RTOL)
        full = tensap.FullTensor(x)
        return (lambda: truncator.hsvd(full, tree), lambda f: f.full().data, version("tensap"))
    import tensorly
    from tensorly.decomposition import tensor_train

    # tensorly cuts by ranks only: given those that torchTT or tnreg find it has to do the same work
    ranks = [1, *_train_ranks(x), 1]
    return lambda: tensor_train(x, ranks), lambda f: tensorly.tt_to_tensor(f), version("tensorly")


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


def line(library: str, row: Mapping[str, Any], ratio: float) -> str:
    """Return a row of the printed table."""
    name = f"{library} {row['version']}"
    return f"{name:28s} {row['seconds']:7.2f} s  {ratio:5.1f} x  error {row['error']:.1e}"


if __name__ == "__main__":
    main(__doc__, LIBRARIES, worker, line=line)
