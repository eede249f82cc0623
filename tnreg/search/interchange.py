"""A factorization along a better tree, found by local moves on its factors."""

from __future__ import annotations

import math

import torch

from tnreg.errors import SizeError, check_number
from tnreg.factorizations.assembly import assemble, check_factorization, weights_of
from tnreg.factorizations.factorization import Factorization
from tnreg.ranks.budget import Budget
from tnreg.ranks.rounding import finite_stacks, round_network, share_of, to_factorization
from tnreg.search.web import Web

# Share of the tolerance that the first rounding may spend.
_FIRST = 0.2


@torch.no_grad()
def interchange(model: Factorization, *, rtol: float) -> Factorization:
    """Find a tree along which a factorization needs fewer numbers, by local moves on its factors.

    Subtrees of neighbouring nodes are exchanged wherever that leaves fewer numbers (nearest-neighbour
    interchange), or as many with less entanglement, in sweeps over all edges until nothing changes. Nodes
    with more than three neighbours are parted where that pays, and exchange what they hold otherwise; nodes
    with one child are multiplied into it. The dense tensor is never formed.

    Args:
        model: Any joins, any root, any order. Diagonal joins become full ones.
        rtol: Largest error ``‖A - A_new‖ / ‖A‖``. For a model that was fitted to data take some five times
            its error: what it gets wrong hides the ranks along other trees.

    Returns:
        A new ``Factorization`` of the same dtype and sizes with full joins, the bonds as small as ``rtol``
        allows, and usual names of nodes. The root has three children or more, as a binary root would only
        add a matrix. ``error_bound`` bounds ``‖A - A_new‖``. If no tree with fewer numbers is found, such as
        for most CP models, a copy of the model as it is.

    Raises:
        OptionError: No factorization, or ``rtol`` outside ``[0, 1)``.
        DataError: NaN or infinite weights.

    Cost: three singular value decompositions of ``R² × R²`` matrices per node and sweep, mostly two to four
    sweeps (order 64, bonds 3: 0.1 s); for bonds above 10 products with random vectors take their place, and
    nodes with bonds above some 60 stay. Computed on the CPU, in double precision and at any scale; the same
    result every time.
    """
    check_factorization(model)
    share = share_of(check_number(rtol, "interchange: rtol", 0, 1), model.dtype) or 0.0
    found = _interchanged(model, share)
    if found is None or _numbers(found) > _numbers(model):
        found = _rebuilt(model)
        found.error_bound = 0.0
    return found


def _interchanged(model: Factorization, share: float) -> Factorization | None:
    """Return the model along the tree that is found; ``None`` if its nodes would not fit into memory."""
    stacks, _ = finite_stacks(model)
    try:
        binary = _rebuilt(model, two_at_a_time=True)
        stacks = [stack.cpu() for stack in finite_stacks(binary)[0]]
        first = round_network(
            binary.network, stacks, Budget(share=_FIRST * share or None), dtype=torch.float64
        )
    except SizeError:
        return None
    web = Web.of(binary.tree, first.weights)
    lost = math.sqrt(first.lost) * first.size
    tree, last, lost = web.improve(share * first.size, lost)
    found = to_factorization(tree, last.weights, first.log2 + last.log2, model.dtype, lost)
    return found.to(model.device)


def _numbers(model: Factorization) -> int:
    return sum(weight.numel() for weight in model.weights.values())


def _rebuilt(model: Factorization, *, two_at_a_time: bool = False) -> Factorization:
    """Return a copy with usual names; or, exactly, with diagonal joins of more children as joins of two."""
    tree, bonds = model.tree, model.network.bonds
    weights = {tree.position(v): w for v, w in weights_of(model, bare=not two_at_a_time).items()}
    joins = {tree.position(v): join for v, join in model.network.named_joins.items()}
    links = {i: list(below) for i, below in enumerate(tree.links) if below}
    new = len(tree.nodes)
    for i in list(links) if two_at_a_time else ():
        bond = bonds[links[i][0]]
        while joins[i] == "diagonal" and len(links[i]) > 2:
            pairs = [links[i][k : k + 2] for k in range(0, len(links[i]), 2)]
            links[i] = []
            for pair in pairs:
                if len(pair) == 2:
                    links[new], joins[new] = pair, "diagonal"
                    weights[new] = torch.eye(bond, dtype=model.dtype, device=model.device)
                    pair, new = [new], new + 1
                links[i] += pair
    modes = {tree.position(mode): mode for mode in tree.leaves}
    return assemble(len(tree.nodes) - 1, links, weights, joins, modes)[0]
