"""The command ``tree``, which starts without torch where it only draws."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from tyro import conf

from tnreg.cli.output import Picture, Reply, table_of
from tnreg.errors import FileError, OptionError
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree, gallery, load_tree, read_tree, read_tree_file, tree_to_json


def tree(
    source: str | None = None,
    /,
    *,
    from_: Annotated[str | None, conf.arg(name="from")] = None,
    rtol: float = 1e-3,
    ascii: bool = False,
    sizes: bool = False,
    out: Path | None = None,
    figure: Picture = None,
    json: bool = False,
) -> None:
    """Draw a mode tree, or find one for a tensor.

    Args:
        source: A gallery name (htf-4), a JSON file, or nested lists ("[[0,1],[2,3]]"); or "list".
        from_: Find a tree for a tensor or a saved model, a file as for `tnreg rank`. If entries are missing
            (NaN): from the pairs of modes that interact in the others.
        rtol: Relative error at which ranks are counted, with --from.
        ascii: Draw with plain characters only.
        sizes: Show mode names and sizes, if the file has them.
        out: Save the tree into this file (JSON).
        figure: Also draw a picture into this file.
        json: Print one JSON document instead of the drawing or the list.
    """
    reply = Reply(json, out, figure)
    if (source is None) == (from_ is None):
        raise OptionError("give one of a tree, such as htf-4, and --from FILE, to find one.")
    if source == "list":
        return _list_gallery(reply)
    ranks: Mapping[Node, int] = {}
    if from_ is not None:
        with reply.working("looking for a tree ..."):
            mode_tree, ranks, text, extras = importlib.import_module("tnreg.cli.find").find(from_, rtol)
        labels = _mode_labels(from_, mode_tree, extras)
    else:
        mode_tree, text = read_tree(str(source)), ""
        about = {} if str(source).lstrip().startswith("[") else read_tree_file(str(source))
        labels = _mode_labels(str(source), mode_tree, about) if sizes else {}
        extras = {key: about[key] for key in ("about", "modes", "sizes") if key in about}

    def label(node: Node) -> str:
        return labels.get(node, str(node)) + (f", rank {ranks[node]}" if node in ranks else "")

    reply.text(mode_tree.text(label=label, ascii_only=ascii))
    numbers = {"order": mode_tree.order, "height": mode_tree.heights[-1]}
    reply.text(f"order {mode_tree.order}, {len(mode_tree.nodes)} nodes, height {numbers['height']}")
    if text:
        reply.text(text)
    if out is not None:
        mode_tree.save(out)
        reply.note(f"wrote {out}")
    reply.picture(lambda axes: _draw(mode_tree, axes, labels, ranks))
    nodes = [
        {"node": str(node), "parent": None if above is None else str(above),
         "modes": mode_tree.modes_below(node)} | ({"rank": ranks[node]} if node in ranks else {})
        for node, above in ((node, mode_tree.parent(node)) for node in mode_tree.nodes)
    ]  # fmt: skip
    reply.document({**numbers, "nodes": nodes, **tree_to_json(mode_tree), **extras})


def _draw(mode_tree: ModeTree, axes: Any, labels: dict[Node, str], ranks: Mapping[Node, int]) -> None:
    from tnreg import plots

    plots.tree(mode_tree, axes, labels=labels, edges=ranks)


def _list_gallery(reply: Reply) -> None:
    rows = [
        {"name": name, "order": mode_tree.order, "nodes": len(mode_tree.nodes),
         "about": read_tree_file(name).get("about", "")}
        for name, mode_tree in ((name, load_tree(name)) for name in gallery())
    ]  # fmt: skip
    reply.table(table_of(rows, tuple(rows[0]), left=len(rows[0])))
    reply.document(rows)


def _mode_labels(source: str, tree: ModeTree, about: dict[str, Any]) -> dict[Node, str]:
    """Return the number, name and size of modes, as far as the file has them."""
    names, counts = (about.get(key) or [""] * tree.order for key in ("modes", "sizes"))
    if not all(isinstance(part, list | tuple) and len(part) == tree.order for part in (names, counts)):
        raise FileError(f"{source}: 'modes' and 'sizes' need one entry for each of {tree.order} modes.")
    rows = zip(names, (f"size {count}" if count else "" for count in counts), strict=True)
    return {mode: " ".join([str(mode), *map(str, filter(None, row))]) for mode, row in enumerate(rows)}
