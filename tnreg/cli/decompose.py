"""The command ``decompose``, which makes a tensor or a model smaller."""

import math
import time
from pathlib import Path
from typing import Any, Literal

import torch

from tnreg import Factorization, algebra, plots, spectra, truncate
from tnreg import decompose as hierarchical_svd
from tnreg.cli.inputs import DEFAULTS, Input, InputOptions, read_input
from tnreg.cli.output import Picture, Reply, table_of
from tnreg.errors import OptionError
from tnreg.ranks.decompose import distance
from tnreg.tensors.blocks import is_blocks
from tnreg.trees.reading import Node


def decompose(
    file: str,
    /,
    *,
    reading: InputOptions = DEFAULTS,
    rtol: float | None = None,
    atol: float | None = None,
    ranks: int | None = None,
    max_numbers: int | None = None,
    randomized: bool = False,
    precision: Literal["double", "single"] = "double",
    out: Path | None = None,
    figure: Picture = None,
    json: bool = False,
) -> None:
    """Hierarchical SVD of a tensor along a tree, or rounding of a saved model, to a relative error.

    Args:
        file: A .npy, .npz, .safetensors or .pt file, a model that tnreg saved, or kinetic, il2, covid19,
            indian-pines; or a .zarr folder or .h5 file (FILE:NAME), read block by block.
        reading: How the file is read.
        rtol: Largest relative error; only a limit on ranks or numbers can make it larger. 1e-3 if no
            tolerance is given.
        atol: Largest error as a norm; the larger of both counts.
        ranks: Largest bond.
        max_numbers: Most numbers in all weights together.
        randomized: First approximate the columns of large nodes by products with random vectors.
        precision: Precision of the work; in single precision rtol must be above 2e-6.
        out: Save the factorization into this file.
        figure: Draw singular values and the tree with its ranks and error budget into this file.
        json: Print one JSON document instead of the table.
    """
    reply = Reply(json, out, figure)
    with reply.working("decomposing ..."):
        source = read_input(file, reading)
        if rtol is None and atol is None:
            rtol = 1e-3
        budget: dict[str, Any] = {
            "rtol": rtol, "atol": atol, "ranks": ranks, "max_numbers": max_numbers, "precision": precision,
        }  # fmt: skip
        start = time.perf_counter()
        if source.tree is not None:
            model = hierarchical_svd(
                source.x, source.tree, randomized=randomized, memory=reading.memory, **budget
            )
        elif randomized:
            raise OptionError("--randomized is for tensors; leave it out, or give --tree.")
        else:
            model = truncate(source.x, **budget)
        seconds = time.perf_counter() - start
    with torch.no_grad(), reply.working("singular values and error ..."):
        # on disk only those that were kept: the others would take another pass for each node
        on_disk = is_blocks(source.x)
        values = spectra(model) if on_disk else spectra(source.x, source.tree)
        error, norm = _error_and_norm(source, model, reading.memory)
        norm = norm or 1.0  # of zeros, whose error is zero
    rows = [_row(node, s, model, norm, on_disk) for node, s in values.items()]
    weights = sum(p.numel() for p in model.parameters())
    before = math.prod(source.sizes)
    if source.tree is None:
        before = sum(p.numel() for p in source.x.parameters())
    asked = max(rtol or 0.0, (atol or 0.0) / norm)
    errors = {"asked": asked, "bound": (model.error_bound or 0.0) / norm, "reached": error / norm}
    cells = [{key: _in_table(value) for key, value in row.items()} for row in rows]
    for node, cell in zip(values, cells, strict=True):
        cell["node"] = source.labels.get(node, cell["node"])
    title = f"{source.name} {model.sizes}, {seconds:.2f} s"
    reply.table(table_of(cells, tuple(rows[0]), title=title))
    reply.text(f"numbers: {weights} of {before} ({before / weights:.4g} to 1)")
    text = "relative error: asked {asked:g}, bound {bound:.4g}, reached {reached:.4g}"
    reply.text(text.format_map(errors))
    if out is not None:
        model.save(out)
        reply.note(f"wrote {out}")
    reply.picture(lambda axes: plots.decomposition(values, model, axes, labels=source.labels), panels=2)
    reply.document(
        {
            "tensor": source.name, "sizes": model.sizes, "seconds": seconds, "nodes": rows,
            "numbers": weights, "numbers before": before, "relative error": errors,
            "written": [str(path) for path in (out, figure) if path is not None],
        }
    )  # fmt: skip


def _error_and_norm(source: Input, model: Factorization, memory: str | None) -> tuple[float, float]:
    """Return the distance between input and result, and the norm of the input."""
    if source.tree is not None:
        return distance(source.x, model, memory=memory)
    # inner products of the two would lose what is below 1e-8 of the norm
    difference = truncate(algebra.subtract(model, source.x))
    return difference.norm().item(), source.x.norm().item()


def _row(node: Node, s: torch.Tensor, model: Factorization, norm: float, on_disk: bool) -> dict[str, Any]:
    """Return how many singular values a node has, and what was cut off of them."""
    bond = model.network.bonds[model.tree.position(node)]
    row = {"node": str(node), "singular values": len(s), "rank": bond}
    if on_disk:
        rows = math.prod(model.sizes[m] for m in model.tree.modes_below(node))
        return {**row, "singular values": min(rows, math.prod(model.sizes) // rows)}
    rest = s[bond:].double()
    largest = float(rest[0]) / norm if len(rest) else 0.0
    return {**row, "largest cut": largest, "error of the cut": float(rest.norm()) / norm}


def _in_table(value: Any) -> str:
    return f"{value:.2e}" if isinstance(value, float) and value else str(value or 0)
