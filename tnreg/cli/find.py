"""What ``tree --from`` finds."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from tnreg import Factorization, ModeTree, completion, decompose, find_tree, hierarchical_rank, interchange
from tnreg.cli.inputs import DEFAULTS, is_model, read_input
from tnreg.errors import DataError
from tnreg.search.pairs import interactions, linkage_tree
from tnreg.tensors.loading import is_large_file, load_entries
from tnreg.trees.reading import Node


class Found(NamedTuple):
    """A tree, ranks on its edges as far as they are known, a line about them, and what JSON has beside."""

    tree: ModeTree
    ranks: Mapping[Node, int]
    text: str
    document: dict[str, Any]


def find(file: str, rtol: float) -> Found:
    """Find a tree for the tensor or the model in a file."""
    if is_model(file):
        model = read_input(file, DEFAULTS).x
        found = interchange(model, rtol=rtol)
        return _with_ranks(found, model, rtol, "its own tree", {"sizes": model.sizes})
    if is_large_file(file):
        x = read_input(file, DEFAULTS).x
        document: dict[str, Any] = {"sizes": x.shape}
    else:
        entries = load_entries(file)
        known, total = len(entries.values), math.prod(entries.sizes)
        if not known:
            raise DataError(f"{file}: all entries are missing (NaN).")
        named = entries.modes != tuple(f"mode {n}" for n in range(len(entries.sizes)))
        document = {"sizes": entries.sizes, **({"modes": entries.modes} if named else {})}
        if known < total:
            task = completion(index=entries.index, values=entries.values, sizes=entries.sizes)
            strengths = interactions(task.index, task.values, task.sizes)
            pairs = len(strengths.triu().nonzero())
            seen = f"{pairs} pairs of modes interact" if pairs else "no two modes interact beyond chance"
            text = f"from {known} of {total} entries: {seen}; ranks are found by completion"
            return Found(linkage_tree(strengths), {}, text, {**document, "pairs": pairs})
        x = entries.dense()
    model = decompose(x, find_tree(x, rtol=rtol), rtol=rtol)
    other = decompose(x, ModeTree.binary(x.ndim), rtol=rtol)
    return _with_ranks(model, other, rtol, "the binary tree", document)


def _with_ranks(
    model: Factorization, other: Factorization, rtol: float, whose: str, document: dict[str, Any]
) -> Found:
    numbers, before = (sum(p.numel() for p in m.parameters()) for m in (model, other))
    ranks = dict(zip(model.tree.nodes[:-1], model.network.bonds, strict=False))
    with torch.no_grad():  # bonds above leaves without a weight of their own say nothing of ranks
        needed = hierarchical_rank(model, rtol=rtol)
    ranks |= {mode: max(1, min(ranks[mode], needed[mode])) for mode in model.tree.leaves}
    text = f"numbers: {numbers}; along {whose} {before}"
    return Found(model.tree, ranks, text, {**document, "numbers": numbers, f"numbers along {whose}": before})
