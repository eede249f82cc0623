"""Hierarchical SVD, spectra and rounding by Gram matrices and by QR factorizations, and their kernels.

Does a route by squares earn a place on this device: more than 1.3 times as fast at spectra equal to 1e-10?
``decompose`` of 16^6 and 32^5 to 1e-6 and 1e-4 (smooth, and hierarchical rank 8 with noise of 1e-9);
``spectra`` and ``truncate`` of factored tensors (as in benchmarks/factored.py, order 64 at ranks 16 and 32,
order 256 at rank 16), by QR factorizations, by Gram matrices and as tnreg chooses; double precision. Beside:
torchTT on the same device, if it is installed.

On an H100, 41 s: a QR of 64 matrices takes 15 to 70 times as long as one (cuSOLVER loops), eigenvalues and
singular values of 64 matrices too from 64 x 64 on.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from unittest.mock import patch

import factored
import torch
from torch import Tensor

import tnreg
from gpu_stages.bench import Bench
from gpu_stages.launches import counted
from tnreg.convert.formats import from_tensor_train
from tnreg.ranks import decompose as hsvd
from tnreg.ranks import frames

RTOLS = (1e-6, 1e-4)


@contextlib.contextmanager
def by(way: str) -> Iterator[list[bool]]:
    """Force a way; yields whether Gram matrices sufficed, for each that was tried in place of a QR.

    Here alone, by exchanging private functions. Vectors of ``decompose``: by QR with a tolerance of 0, by
    Gram matrices with an infinite one (whether the error stays within the real one is recorded). Frames: by
    Gram matrices always or never. "as chosen" exchanges nothing.
    """
    left, by_gram, sufficed = hsvd.left_vectors, frames.by_gram, list[bool]()
    forced = {"QR": 0.0, "Gram": math.inf}.get(way)

    def vectors_of(rows: int, part: float | None, *calls: Any, eps: float) -> Any:
        return left(rows, part if forced is None or part is None else forced, *calls, eps=eps)

    def noted(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
        factors = by_gram(matrix)
        sufficed.append(factors is not None)
        return factors

    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(hsvd, "left_vectors", vectors_of))
        patches.enter_context(patch.object(frames, "by_gram", noted))
        if forced is not None:
            patches.enter_context(patch.object(frames, "_gram_pays", lambda matrix: way == "Gram"))
        yield sufficed


def run(bench: Bench) -> None:
    """Dense tensors, factored tensors, kernels, torchTT."""
    torch.backends.cuda.matmul.allow_tf32 = False
    pieces = {"decompose": dense, "factored": in_factors, "kernels": kernels, "torchTT": trains}
    for name, piece in pieces.items():
        rows: dict[str, Any] = {}
        for key, row in piece(bench):
            rows[key] = row
            bench.add(**{name: rows})
            bench.add(summary=summary(bench.figures))
            if bench.left() < 6:
                bench.add(note=f"no time left after {name}, {key}")
                return


def quick(bench: Bench, call: Callable[[], Any], repeats: int = 3) -> float:
    """Milliseconds, in at most some 0.3 s or three calls."""
    once = bench.milliseconds(call, repeats=1, warmup=1)
    return once if once > 150 else bench.milliseconds(call, repeats=repeats, warmup=1)


def dense_tensors(bench: Bench) -> Iterator[tuple[str, Tensor]]:
    """Decompose the tensors of benchmarks/decompose.py, made on the device, and of order 5."""
    for order, size in ((4, 4), (3, 8)) if bench.rehearse else ((6, 16), (5, 32)):
        grid = torch.linspace(0, 1, size, dtype=torch.float64, device=bench.device)
        axes = [(k + 1) * grid.reshape([-1 if n == k else 1 for n in range(order)]) for k in range(order)]
        yield f"smooth {size}^{order}", 1 / (1 + sum(axes))
        model = tnreg.Factorization(
            tnreg.ModeTree.binary(order), size, min(8, size), join="full", std=1.0, dtype=torch.float64,
            device=bench.device, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        low = model.to_tensor().detach()
        noise = torch.randn_like(low)
        yield f"rank 8 {size}^{order}", low / low.norm() + 1e-9 * noise / noise.norm()


def dense(bench: Bench) -> Iterator[tuple[str, Any]]:
    """``decompose`` by both ways and as chosen, with the errors reached and the largest bonds."""
    for (name, x), rtol in itertools.product(dense_tensors(bench), RTOLS):
        call = partial(tnreg.decompose, x, tnreg.ModeTree.binary(x.ndim), rtol=rtol)
        row: dict[str, Any] = {}
        exact: dict[Any, Tensor] = {}
        for way in ("QR", "Gram", "as chosen"):
            with by(way):
                found = call()
                values = tnreg.spectra(found.requires_grad_(False))
                exact = exact or values
                row[way] = {
                    "milliseconds": quick(bench, call), "error": relative_error(found, x),
                    "largest bond": max(found.network.bonds), "deviation": deviation(values, exact),
                }  # fmt: skip
        if rtol == RTOLS[0]:
            single = partial(tnreg.decompose, x.float(), tnreg.ModeTree.binary(x.ndim), rtol=rtol)
            row["as chosen, float32"] = quick(bench, single)
        yield f"{name}, {rtol:g}", row


def relative_error(found: tnreg.Factorization, x: Tensor) -> float:
    """``‖found - x‖ / ‖x‖`` on the device."""
    return float((found.to_tensor() - x).norm() / x.norm())


def deviation(found: Mapping[Any, Tensor], exact: Mapping[Any, Tensor]) -> float:
    """Largest difference of singular values that both have, by the largest of their node."""
    pairs = ((found[node], values) for node, values in exact.items())
    return max(float((a[: len(b)] - b[: len(a)]).abs().max() / b.max()) for a, b in pairs)


def factored_tensor(order: int, rank: int, decay: float, device: torch.device) -> tnreg.Factorization:
    """Of a kind with those of benchmarks/factored.py: the j-th index of every bond scaled by decay^j."""
    model = tnreg.Factorization(
        tnreg.ModeTree.binary(order), factored.SIZE, rank, join="full", std=1.0, dtype=torch.float64,
        device=device, generator=torch.Generator().manual_seed(order + rank),
    )  # fmt: skip
    scale = decay ** torch.arange(rank, dtype=torch.float64, device=device)
    with torch.no_grad():
        for stack, part in zip(model.stacks, model.network.stacks, strict=True):
            if part.shape[0] == factored.SIZE:
                stack /= math.sqrt(factored.SIZE)
            else:
                over = [1] * (len(part.shape) - 2)
                stack *= scale.reshape(-1, 1, *over) * scale.reshape(-1, *over) / rank
    return model.requires_grad_(False)


def in_factors(bench: Bench) -> Iterator[tuple[str, Any]]:
    """``spectra`` and ``truncate`` by both ways, with deviations from QR."""
    sizes = ((8, 4),) if bench.rehearse else factored.CASES
    for (order, rank), (case, decay) in itertools.product(sizes, (("generic", 1.0), ("cut", 0.7))):
        model = factored_tensor(order, rank, decay, bench.device)
        spectra = partial(tnreg.spectra, model)
        rounded = partial(tnreg.truncate, model, rtol=factored.RTOL)
        row: dict[str, Any] = {}
        exact: dict[Any, Tensor] = {}
        for way in ("QR", "Gram", "as chosen"):
            with by(way) as sufficed:
                found = spectra()
                exact = exact or found
                row[way] = {
                    "spectra": quick(bench, spectra), "truncate": quick(bench, rounded),
                    "Gram matrices sufficed": all(sufficed), "deviation": deviation(found, exact),
                    "largest bond": max(rounded().network.bonds), "of a call": counted(spectra),
                }  # fmt: skip
        yield f"{case} {order}/{rank}", row


def kernels(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Milliseconds of factorizations of batches (k, n, n), and of a frame (k, n^2, n) by both ways."""
    calls: dict[str, Callable[[Tensor], Any]] = {
        "cholesky": torch.linalg.cholesky_ex, "qr": torch.linalg.qr,
        "eigh": torch.linalg.eigh, "eigvalsh": torch.linalg.eigvalsh, "svdvals": torch.linalg.svdvals,
    }  # fmt: skip
    for n in (8, 16) if bench.rehearse else (8, 16, 32, 64, 256, 512):
        row: dict[str, float | str] = {}
        for k, (name, call) in itertools.product((1, 64), calls.items()):
            if k == 64 and 64 * float(row[f"{name} 1"]) > 1000:
                row[f"{name} 64"] = "left out: longer than a second, if one by one"
                continue
            x = torch.randn(k, n, n, dtype=torch.float64, device=bench.device)
            given = x if name in ("qr", "svdvals") else x @ x.mT + torch.eye(n).to(x)
            row[f"{name} {k}"] = quick(bench, partial(call, given))
        if n <= 32:
            x = torch.randn(64, n * n, n, dtype=torch.float64, device=bench.device)
            row["frame by QR 64"] = quick(bench, partial(torch.linalg.qr, x))
            row["frame by Gram 64"] = quick(bench, partial(frames.by_gram, x))
        yield f"{n} x {n}", row


def trains(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Tensor trains of tnreg and of torchTT."""
    try:
        import torchtt
    except ImportError:
        yield "torchTT", "not installed"
        return
    for order, rank in ((8, 4),) if bench.rehearse else factored.CASES:
        cores = [torch.from_numpy(c).to(bench.device) for c in factored.train(order, rank, 0.7)]
        ours, theirs = from_tensor_train(cores), torchtt.TT(cores)
        yield (
            f"round, cut {order}/{rank}",
            {
                "tnreg": quick(bench, partial(tnreg.truncate, ours, rtol=factored.RTOL)),
                "torchTT": quick(bench, partial(theirs.round, factored.RTOL)),
            },
        )
    for name, x in dense_tensors(bench):
        tree = tnreg.ModeTree.caterpillar(x.ndim)
        yield (
            f"decompose {name}",
            {
                "tnreg": quick(bench, partial(tnreg.decompose, x, tree, rtol=RTOLS[0])),
                "torchTT": quick(bench, partial(torchtt.TT, x, eps=RTOLS[0])),
            },
        )


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """QR / Gram of every case, and where Gram matrices earn their place."""
    ratios = {}
    for name, row in figures.get("decompose", {}).items():
        ratio = row["QR"]["milliseconds"] / row["Gram"]["milliseconds"]
        ratios[f"decompose {name}"] = ratio, row["Gram"]
    for name, row in figures.get("factored", {}).items():
        for what in ("spectra", "truncate"):
            ratios[f"{what} {name}"] = row["QR"][what] / row["Gram"][what], row["Gram"]
    return {
        name: {"QR / Gram": ratio, "earns its place": ratio > 1.3 and row["deviation"] < 1e-10}
        for name, (ratio, row) in ratios.items()
    }
