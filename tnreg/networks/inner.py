"""Inner products of two factorizations over one tree, without either dense tensor, at any scale.

Every node holds the inner products of its tensors, ``(R_above, other's R_above)``, with a logarithmic scale
for each row and column, so that the product of a thousand weights neither overflows nor underflows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnreg.networks.einsum import einsum
from tnreg.networks.network import Network
from tnreg.networks.scaled import absorbed, equilibrated


def inner_products(
    networks: Sequence[Network], weights: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor]:
    """``(x, log)`` with ``<one, other> = x exp(log)``; the first is conjugated.

    Args:
        networks: Two networks over the same tree and sizes.
        weights: For each of them its weights in the order of ``network.weighted``, of one dtype.
    """
    tree, kinds = networks[0].tree, [network.joins for network in networks]
    grams: list[tuple[Tensor, Tensor, Tensor]] = []
    for i, below in enumerate(tree.links):
        children = [grams[c] for c in below]
        if kinds[0][i] == kinds[1][i] == "diagonal":
            children = [_multiplied(children)]
        scaled, logs = [], []
        for side in range(2):
            weight = _own_weight(weights[side], i, len(tree.links), children, side)
            diagonal = kinds[side][i] == "diagonal"
            given = [child[1 + side] for child in children]
            weight, log = absorbed(
                weight, [torch.stack(given).sum(0)] if diagonal else given or [None]
            )
            scaled.append(weight.conj() if side == 0 else weight)
            logs.append(log)
        letters = [
            ["x" if kinds[side][i] == "diagonal" and len(children) > 1 else chr(0x4E00 + 2 * k + side)
             for k in range(max(len(children), 1))]
            for side in range(2)
        ]  # fmt: skip
        if not below:
            letters[1] = letters[0]  # both meet in the mode
        words = [
            "".join(dict.fromkeys(part)) + above for part, above in zip(letters, "ab", strict=True)
        ]
        pairs = [x + y for x, y in zip(*letters, strict=True)] if below else []
        operands = [*(child[0] for child in children), *scaled]
        call = einsum(f"{','.join([*pairs, *words])}->ab", *(tuple(o.shape) for o in operands))
        gram, rows, columns = equilibrated(call(operands))
        grams.append((gram, logs[0] + rows, logs[1] + columns))
    gram, rows, columns = grams[-1]
    return gram[0, 0], rows[0] + columns[0]


def _multiplied(
    grams: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Entrywise product of scaled matrices, rescaled after each factor."""
    out, rows, columns = grams[0]
    for gram, more_rows, more_columns in grams[1:]:
        out, by_row, by_column = equilibrated(out * gram)
        rows, columns = rows + more_rows + by_row, columns + more_columns + by_column
    return out, rows, columns


def _own_weight(
    weights: Sequence[Tensor], i: int, nodes: int, children: Sequence[Any], side: int
) -> Tensor:
    """A node's weight with an axis above; ones at a root without weight."""
    if i == len(weights):
        gram: Tensor = children[0][0]
        return gram.new_ones(gram.shape[side], 1)
    return weights[i].unsqueeze(-1) if i == nodes - 1 else weights[i]
