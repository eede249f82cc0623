"""The command ``tree``, which starts without torch."""

from typing import Any

from tnreg.cli.output import Picture, Reply, table_of
from tnreg.errors import FileError
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree, gallery, load_tree, read_tree, read_tree_file, tree_to_json


def tree(
    source: str, /, *, ascii: bool = False, sizes: bool = False, figure: Picture = None, json: bool = False
) -> None:
    """Draw a mode tree.

    Args:
        source: A gallery name (htf-4), a JSON file, or nested lists ("[[0,1],[2,3]]"); or "list".
        ascii: Draw with plain characters only.
        sizes: Show mode names and sizes, if the file has them.
        figure: Also draw a picture into this file.
        json: Print one JSON document instead of the drawing or the list.
    """
    reply = Reply(json, figure=figure)
    if source == "list":
        return _list_gallery(reply)
    mode_tree = read_tree(source)
    about = {} if source.lstrip().startswith("[") else read_tree_file(source)
    labels = _mode_labels(source, mode_tree, about) if sizes else {}
    reply.text(mode_tree.text(label=lambda node: labels.get(node, str(node)), ascii_only=ascii))
    numbers = {"order": mode_tree.order, "height": mode_tree.heights[-1]}
    reply.text(f"order {mode_tree.order}, {len(mode_tree.nodes)} nodes, height {numbers['height']}")
    reply.picture(lambda axes: _draw(mode_tree, axes, labels))
    nodes = [
        {"node": str(node), "parent": None if above is None else str(above),
         "modes": mode_tree.modes_below(node)}
        for node, above in ((node, mode_tree.parent(node)) for node in mode_tree.nodes)
    ]  # fmt: skip
    extras = {key: about[key] for key in ("about", "modes", "sizes") if key in about}
    reply.document({**numbers, "nodes": nodes, **tree_to_json(mode_tree), **extras})


def _draw(mode_tree: ModeTree, axes: Any, labels: dict[Node, str]) -> None:
    from tnreg import plots

    plots.tree(mode_tree, axes, labels=labels)


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
    if not all(isinstance(part, list) and len(part) == tree.order for part in (names, counts)):
        raise FileError(f"{source}: 'modes' and 'sizes' need one entry for each of {tree.order} modes.")
    rows = zip(names, (f"size {count}" if count else "" for count in counts), strict=True)
    return {mode: " ".join([str(mode), *map(str, filter(None, row))]) for mode, row in enumerate(rows)}
