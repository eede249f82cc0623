"""The command that makes a tensor or a model smaller: ``decompose``."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from tnreg import Factorization, algebra, plots, spectra, truncate
from tnreg import decompose as hierarchical_svd
from tnreg.cli.reply import Reply, check_place
from tnreg.cli.subject import Subject, subject_of
from tnreg.errors import OptionError
from tnreg.ranks.decompose import distance
from tnreg.trees.reading import Node


def decompose(
    file: str,
    /,
    *,
    tree: str | None = None,
    rtol: float = 1e-3,
    ranks: int | None = None,
    randomized: bool = False,
    missing: Literal["nan"] | None = None,
    memory: str | None = None,
    device: str = "cpu",
    out: Path | None = None,
    png: Path | None = None,
    json: bool = False,
) -> None:
    """Hierarchical SVD of a tensor along a tree, or rounding of a saved model, to a relative error.

    Args:
        file: A .npy, .npz, .safetensors or .pt file, a model that tnreg saved, or kinetic, il2, covid19,
            indian-pines; or a .zarr folder or .h5 file (FILE:NAME), read block by block.
        tree: Gallery name, JSON file or nested lists; a binary tree if left out (a model's own for
            a model).
        rtol: Largest relative error, kept to unless ranks cut further.
        ranks: Largest bond.
        randomized: Look for the columns of large nodes with random vectors first.
        missing: "nan": entries that are NaN were not measured; they are set to the mean of the
            others here.
        memory: What arrays may take where a file is read block by block, e.g. 2GiB; a quarter of what is
            available if left out.
        device: Any torch device, e.g. cuda.
        out: Save the factorization into this file.
        png: Draw singular values and the tree with its ranks and error budget into this file.
        json: Print one JSON document in place of the table.
    """
    reply = Reply(json)
    check_place(out, "--out")
    check_place(png, "--png")
    with reply.working("decomposing ..."):
        subject = subject_of(file, tree, missing, memory, device)
        start = time.perf_counter()
        if subject.tree is None:
            if randomized:
                raise OptionError(
                    "--randomized is for tensors; a saved model is rounded without its dense tensor.\n"
                    "  leave it out, or give --tree to decompose the dense tensor along another tree"
                )
            found = truncate(subject.x, rtol=rtol, ranks=ranks)
        else:
            found = hierarchical_svd(
                subject.x, subject.tree, rtol=rtol, ranks=ranks, randomized=randomized, memory=memory
            )  # fmt: skip
        seconds = time.perf_counter() - start
    with torch.no_grad(), reply.working("singular values and error ..."):
        # of what is on disk only those that were kept: the others would take another reading for each node
        values = spectra(*((found, None) if subject.on_disk else (subject.x, subject.tree)))
        reached, norm = _error_and_norm(subject, found, memory)
    rows = [_cut(node, s, found, norm, subject.on_disk) for node, s in values.items()]
    bound, relative = (
        part / norm if norm > 0 else 0.0 for part in (found.error_bound or 0.0, reached)
    )
    weights = sum(p.numel() for p in found.parameters())
    reply.table(_table(rows, f"{subject.name} {found.sizes}, {seconds:.2f} s"))
    if not json:
        ratio = f"{subject.numbers / weights:.4g} to 1"
        reply.note(f"numbers: {weights} of {subject.numbers} ({ratio})")
        reply.note(f"relative error: asked {rtol:g}, bound {bound:.4g}, reached {relative:.4g}")
    _write(reply, found, values, out, png)
    reply.document(
        {
            "tensor": subject.name, "sizes": found.sizes, "seconds": seconds, "nodes": rows,
            "numbers": weights, "numbers before": subject.numbers,
            "relative error": {"asked": rtol, "bound": bound, "reached": relative},
            "written": [str(path) for path in (out, png) if path is not None],
        }
    )  # fmt: skip


def _error_and_norm(
    subject: Subject, found: Factorization, memory: str | None
) -> tuple[float, float]:
    """Distance between what was given and what was found, and the norm of what was given."""
    if subject.tree is not None:
        return distance(subject.x, found, memory=memory)
    # in orthonormal frames: inner products would lose what is below 1e-8 of the norm
    rest = truncate(algebra.subtract(found, subject.x))
    return rest.norm().item(), subject.x.norm().item()


def _cut(
    node: Node, s: torch.Tensor, found: Factorization, norm: float, on_disk: bool
) -> dict[str, Any]:
    """One row: how many singular values a node has, and what lies beyond those that were kept."""
    position = found.tree.position(node)
    bond = found.network.bonds[position]
    if on_disk:
        rows = math.prod(found.sizes[m] for m in found.tree.modes_below(node))
        whole = min(rows, math.prod(found.sizes) // rows)
        return {"node": str(node), "singular values": whole, "rank": bond}
    rest = s[bond:].double()
    cut = bool(len(rest)) and norm > 0
    return {
        "node": str(node), "singular values": len(s), "rank": bond,
        "largest cut": float(rest[0]) / norm if cut else 0.0,
        "error of the cut": float(rest.norm()) / norm if cut else 0.0,
    }  # fmt: skip


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table("node", title=title, title_justify="left")
    for head in list(rows[0])[1:]:
        table.add_column(head, justify="right")
    for row in rows:
        cuts = [row[key] for key in ("largest cut", "error of the cut") if key in row]
        shown = [f"{value:.2e}" if value else "0" for value in cuts]
        table.add_row(row["node"], str(row["singular values"]), str(row["rank"]), *shown)
    return table


def _write(
    reply: Reply, found: Factorization, values: Any, out: Path | None, png: Path | None
) -> None:
    if out is not None:
        found.save(out)
        reply.note(f"wrote {out}")
    if png is not None:
        from matplotlib.figure import Figure

        with reply.working("drawing ..."):
            drawn = Figure(figsize=(12, 4.5), layout="constrained")
            plots.decomposition(values, found, drawn.subplots(1, 2))
            plots.save_figure(drawn, png)
        reply.note(f"wrote {png}")
