"""To and from quimb."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from tnreg.convert.wiring import INSIDE, ONES, Part, order_modes, read_wiring
from tnreg.errors import OptionError
from tnreg.factorizations.assembly import identity
from tnreg.factorizations.factorization import Factorization
from tnreg.tensors.arrays import array_of


def to_quimb(model: Factorization) -> Any:
    """Return the factorization as a ``quimb.tensor.TensorNetwork``.

    Outer indices are ``"mode <n>"``. Under a full join the bond above a node is ``"bond <node>"``; a
    diagonal join is one index that all its tensors share, ``"bond <node> inside"`` after the node that
    joins, ``"ones <root>"`` under a root of ones. Every tensor is tagged with its node, with ``leaf``,
    ``full`` or ``diagonal``, and the root with ``root``. Bare leaves are outer indices of the tensor above,
    and identities tagged ``bare`` under a diagonal join. Indices shared by three tensors need to be told
    what stays: ``net.contract(output_inds=[f"mode {n}" for n in range(order)])``.

    The tensors are the model's own weights, so gradients flow through; for numpy write
    ``net.apply_to_arrays(lambda x: x.detach().numpy())``. A matrix product state is
    ``quimb.tensor.MatrixProductState(cores, shape="lpr")`` with the cores of ``to_tensor_train``.
    """
    try:
        import quimb.tensor
    except ImportError:
        raise OptionError("quimb is missing: pip install 'tnreg[quimb]'") from None
    net, tree = model.network, model.tree
    top = len(tree.nodes) - 1

    def edge_above(i: int) -> str:
        node = tree.nodes[i]
        above = tree.parent(node)
        if net.joins[tree.position(above)] == "full":
            return f"mode {node}" if i in net.bare else f"bond {node}"
        return f"{ONES}{above}" if net.root_ones and above == tree.root else f"bond {above}{INSIDE}"

    tensors, weights = [], model.weights
    for i, (node, below, kind) in enumerate(zip(tree.nodes, tree.links, net.joins, strict=True)):
        names = (
            list(map(edge_above, below[:1] if kind == "diagonal" else below)) if below else [f"mode {node}"]
        )
        names += [] if i == top else [edge_above(i)]
        tags = [str(node), kind, *(["root"] if i == top else [])]
        if node in weights:
            tensors.append(quimb.tensor.Tensor(weights[node], names, tags))
        elif kind == "bare" and names[0] != names[1]:
            eye = identity(net.bonds[i], next(iter(weights.values())).detach())
            tensors.append(quimb.tensor.Tensor(eye, names, tags))
    if net.root_ones and len(tree.links[top]) == 1:  # else its bond would be an outer index
        child = tree.links[top][0]
        ones = torch.ones(net.bonds[child], dtype=model.dtype, device=model.device)
        tensors.append(quimb.tensor.Tensor(ones, [f"{ONES}{tree.root}"], ["ones"]))
    return quimb.tensor.TensorNetwork(tensors)


def from_quimb(net: Any, *, modes: Sequence[str] | None = None, root: str | None = None) -> Factorization:
    """Convert a ``quimb.tensor.TensorNetwork`` that is a tree to a factorization; see ``from_nodes``.

    What ``to_quimb(model)`` made gives the same model again, bit for bit. Indices that three tensors or
    more share become diagonal joins. A ``MatrixProductState`` with open ends is a tensor train.

    Args:
        net: The network; its ``exponent`` is multiplied in.
        modes: Outer indices in the order of the modes. If left out they must be named by one word and
            the numbers from 0: ``mode 0, mode 1``, or ``k0, k1`` as in a matrix product state.
        root: A tag that only the root has; if left out as in ``from_nodes``.

    Raises:
        TreeError: The network has a loop or is not connected, or no tensor, or several, have that tag.
        ShapeError: Outer indices whose modes are not known.
        OptionError: Not a network of quimb.
    """
    if not hasattr(net, "tensors") or not hasattr(net, "exponent"):
        message = f"from_quimb: expected a TensorNetwork, found {type(net).__name__}."
        raise OptionError(message, argument="net")
    share = 10.0 ** (float(net.exponent) / max(len(net.tensors), 1))
    parts = []
    for tensor in net.tensors:
        tags = list(tensor.tags) or [""]
        array = array_of(tensor.data, None, f"tensor {tags}")
        mark = next((tag for tag in ("ones", "diagonal", "full", "bare") if tag in tags), "")
        above = not {"leaf", "full", "diagonal", "bare"}.isdisjoint(tags) and "root" not in tags
        scaled = array * share if net.exponent else array
        parts.append(Part(tags, None if mark == "bare" else scaled, list(tensor.inds), above, mark))
    uses = Counter(index for part in parts for index in part.indices)
    outer = [index for index, times in uses.items() if times == 1 or index in (modes or ())]
    ordered = order_modes("from_quimb", outer, modes)
    hubs = {index: str(index).removeprefix(ONES) for index in uses}
    return read_wiring("from_quimb", parts, ordered, root, hubs)
