"""``precision="single"`` beside ``"double"``, of numbers in float32.

``python benchmarks/precision.py [--out FILE.json]``. The tensors 16^6 of ``decompose.py``, and factorizations
with full joins on binary trees (order/rank), in processor time on one thread; medians. Errors of
``decompose`` are checked to be within the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import process_time
from typing import Any

from decompose import tensors
from peers import main


def calls(precision: str) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    import torch

    import tnreg

    made: dict[str, Callable[[], Any]] = {}
    tree = tnreg.ModeTree.binary(6)
    for name, values in tensors().items():
        x = torch.from_numpy(values).float()
        made[f"spectra, {name}"] = lambda x=x: tnreg.spectra(x, tree, precision=precision)
        for rtol in (1e-1, 1e-2, 1e-3, 1e-4):

            def decompose(x: Any = x, rtol: float = rtol) -> Any:
                return tnreg.decompose(x, tree, rtol=rtol, precision=precision)

            error, norm = tnreg.ranks.decompose.distance(x.double(), decompose().double())
            assert error <= rtol * norm, (name, rtol, error / norm)
            made[f"decompose, {name}, {rtol:.0e}"] = decompose
    for order, rank in ((64, 16), (64, 32)):
        random = torch.Generator().manual_seed(0)
        model = tnreg.Factorization(
            tnreg.ModeTree.binary(order), 8, rank, join="full", std=0.3, dtype=torch.float32, generator=random
        ).requires_grad_(False)
        made[f"spectra, {order}/{rank}"] = lambda model=model: tnreg.spectra(model, precision=precision)
        made[f"truncate, {order}/{rank}, 1e-02"] = lambda model=model: tnreg.truncate(
            model, rtol=1e-2, precision=precision
        )
    return made


def worker(library: str, turns: int) -> dict[str, dict[str, Any]]:
    """Return times in one precision."""
    import torch

    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    for name, call in calls(library).items():
        call()
        rows[name] = {"seconds": []}
        for _ in range(turns):
            start = process_time()
            call()
            rows[name]["seconds"].append(process_time() - start)
    return rows


def line(library: str, row: Mapping[str, Any], ratio: float) -> str:
    """Return a row of the printed table."""
    return f"{library:8s} {1e3 * row['seconds']:9.1f} ms  {ratio:5.2f} x"


if __name__ == "__main__":
    main(__doc__, {"single": "tnreg", "double": "tnreg"}, worker, line=line)
