"""Commands that look at trees and tensors: ``tree``, ``rank``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from tnreg import ModeTree, effective_rank, entanglement_entropy, gallery, load_tree, plots, spectra
from tnreg.cli.reply import Reply, check_place, new_axes
from tnreg.cli.subject import subject_of
from tnreg.errors import FileError
from tnreg.ranks.dense import numerical_rank
from tnreg.trees.reading import Node
from tnreg.trees.tree import read_tree, read_tree_file, tree_to_json


def tree(
    source: str,
    /,
    *,
    ascii: bool = False,
    sizes: bool = False,
    png: Path | None = None,
    json: bool = False,
) -> None:
    """Draw a mode tree.

    Args:
        source: A gallery name (htf-4), a JSON file, or nested lists ("[[0,1],[2,3]]"); "list" lists
            the gallery.
        ascii: Draw with plain characters only.
        sizes: Show mode names and sizes, where the file has them.
        png: Also draw a picture into this file.
        json: Print one JSON document in place of the drawing or the list.
    """
    reply = Reply(json)
    if source == "list":
        _list(reply)
        return
    check_place(png, "--png")
    found, about = read_tree(source), _tree_about(source)
    labels = _mode_labels(source, found, about) if sizes else {}
    reply.text(found.text(label=lambda node: labels.get(node, str(node)), ascii_only=ascii))
    reply.text(f"order {found.order}, {len(found.nodes)} nodes, height {found.heights[-1]}")
    if png is not None:
        with reply.working("drawing ..."):
            plots.save_figure(plots.tree(found, new_axes(), labels=labels).figure, png)
        reply.note(f"wrote {png}")
    reply.document(
        {
            "order": found.order,
            "height": found.heights[-1],
            "nodes": [
                {"node": str(node), "parent": None if above is None else str(above),
                 "modes": found.modes_below(node)}
                for node, above in ((node, found.parent(node)) for node in found.nodes)
            ],
            **tree_to_json(found),
            **{key: about[key] for key in ("about", "modes", "sizes") if key in about},
        }
    )  # fmt: skip


def rank(
    file: str,
    /,
    *,
    tree: str | None = None,
    rtol: float = 1e-3,
    missing: Literal["nan"] | None = None,
    memory: str | None = None,
    device: str = "cpu",
    png: Path | None = None,
    json: bool = False,
) -> None:
    """Table of hierarchical ranks, effective ranks and entropies of a tensor along a tree.

    Args:
        file: A .npy, .npz, .safetensors or .pt file, a model that `tnreg fit` saved, or kinetic,
            il2, covid19, indian-pines; or a .zarr folder or .h5 file (FILE:NAME), read block by block.
        tree: Gallery name, JSON file or nested lists; a binary tree if left out (a model's own for
            a model).
        rtol: A singular value counts if it is above rtol times the largest of its node.
        missing: "nan": entries that are NaN were not measured; they are set to the mean of the
            others here.
        memory: What arrays may take where a file is read block by block, e.g. 2GiB; a quarter of what is
            available if left out.
        device: Any torch device, e.g. cuda.
        png: Draw the singular values into this file.
        json: Print one JSON document in place of the table.
    """
    reply = Reply(json)
    check_place(png, "--png")
    with torch.no_grad(), reply.working("singular values ..."):
        subject = subject_of(file, tree, missing, memory, device)
        found = spectra(subject.x, subject.tree, memory=memory)
        rows = [_measured(node, s, rtol) for node, s in found.items()]
    table = Table(title=f"{subject.name} {subject.sizes}")
    table.add_column("node")
    heads = ("singular values", f"rank (rtol {rtol:g})", "effective rank", "entropy", "largest")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        figures = (f"{row['effective rank']:.2f}", f"{row['entropy']:.3f}", f"{row['largest']:.4g}")
        table.add_row(row["node"], str(row["singular values"]), str(row["rank"]), *figures)
    reply.table(table)
    if png is not None:
        with reply.working("drawing ..."):
            plots.save_figure(plots.spectra(found, new_axes()).figure, png)
        reply.note(f"wrote {png}")
    reply.document(
        {"tensor": subject.name, "sizes": subject.sizes, "rtol": rtol, "nodes": rows}
    )  # fmt: skip


def _list(reply: Reply) -> None:
    """The gallery."""
    rows = []
    for name in gallery():
        one, about = load_tree(name), read_tree_file(name)
        sizes = {"order": one.order, "nodes": len(one.nodes)}
        rows.append({"name": name, **sizes, "about": about.get("about", "")})
    table = Table("name", "order", "nodes", "about")
    for row in rows:
        table.add_row(*map(str, row.values()))
    reply.table(table)
    reply.document(rows)


def _mode_labels(source: str, tree: ModeTree, about: dict[str, Any]) -> dict[Node, str]:
    """``{mode: number, name and size}`` as far as the file has them."""
    names, counts = (about.get(key) or [""] * tree.order for key in ("modes", "sizes"))
    if not all(isinstance(part, list) and len(part) == tree.order for part in (names, counts)):
        raise FileError(
            f"{source}: 'modes' and 'sizes' need one entry for each of {tree.order} modes."
        )
    labels: dict[Node, str] = {}
    for mode in tree.leaves:
        size = f"size {counts[mode]}" if counts[mode] else ""
        labels[mode] = " ".join(part for part in (str(mode), str(names[mode]), size) if part)
    return labels


def _tree_about(source: str) -> dict[str, Any]:
    return {} if source.lstrip().startswith("[") else read_tree_file(source)


def _measured(node: Node, s: torch.Tensor, rtol: float) -> dict[str, Any]:
    """One row of the table of ranks."""
    return {
        "node": str(node), "singular values": len(s), "rank": numerical_rank(s, rtol),
        "effective rank": float(effective_rank(s)), "entropy": float(entanglement_entropy(s)),
        "largest": float(s[0]),
    }  # fmt: skip
