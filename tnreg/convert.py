"""To and from the formats of other libraries: tensorly, tensornetwork, quimb, arrays.

Which format a factorization has is read off its tree and joins: a star of diagonal joins is CP, a star
of full joins Tucker, a caterpillar of full joins a tensor train (matrix product state). Networks of
``tensornetwork`` nodes (made by ``tnreg.network``) and of quimb may be any tree. Every conversion is
exact; weights are copied, except for ``to_quimb``.

Arrays may be torch's, numpy's, anything with ``__array__`` or ``__dlpack__``, or nested lists. The other
way, ``model.to_tensor().detach()`` and the weights are torch tensors: ``numpy.asarray``,
``numpy.from_dlpack`` and any other ``from_dlpack`` take them without a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from tnreg.errors import DataError, OptionError, ShapeError, TreeError
from tnreg.factorization import Factorization
from tnreg.rank import as_tensor
from tnreg.tree import ModeTree, Node
from tnreg.wiring import Part, SummedBond, loop, modes_in_order, named_part, read_wiring

__all__ = [
    "from_cp",
    "from_nodes",
    "from_quimb",
    "from_tensor_train",
    "from_tensorly",
    "from_tucker",
    "to_cp",
    "to_quimb",
    "to_tensor_train",
    "to_tensorly",
    "to_tucker",
]


def from_cp(weights: Any, factors: Sequence[Any]) -> Factorization:
    """CP ``sum_r w[r] a_r ⊗ b_r ⊗ ..``: a star with a diagonal join.

    Args:
        weights: ``(R,)``, or ``None`` for ones (the root is then fixed to them).
        factors: ``(D_n, R)`` for every mode.
    """
    given: dict[Node, Tensor] = {n: _array(f, 2, f"factor {n}") for n, f in enumerate(factors)}
    tree = ModeTree.star(len(given))
    if weights is not None:
        given[tree.root] = _array(weights, 1, "the weights")
    return Factorization.from_weights(tree, given, join="diagonal")


def to_cp(model: Factorization) -> tuple[Tensor, list[Tensor]]:
    """``(weights, factors)`` of a star with a diagonal join.

    Raises:
        OptionError: Another tree or join.
    """
    tree = model.tree
    _expect(model, tree == ModeTree.star(tree.order), "diagonal", "CP", "a star")
    weights = {node: w.detach().clone() for node, w in model.weights.items()}
    bond = model.network.bonds[0]
    ones = torch.ones(bond, dtype=model.dtype, device=model.device)
    return weights.get(tree.root, ones), [weights[n] for n in tree.leaves]


def from_tucker(core: Any, factors: Sequence[Any]) -> Factorization:
    """Tucker ``core x_0 U_0 x_1 U_1 ..``: a star with a full join.

    Args:
        core: ``(R_0, ..., R_{N-1})``.
        factors: ``(D_n, R_n)`` for every mode.
    """
    given: dict[Node, Tensor] = {n: _array(f, 2, f"factor {n}") for n, f in enumerate(factors)}
    tree = ModeTree.star(len(given))
    given[tree.root] = _array(core, tree.order, "the core")
    return Factorization.from_weights(tree, given, join="full")


def to_tucker(model: Factorization) -> tuple[Tensor, list[Tensor]]:
    """``(core, factors)`` of a star with a full join.

    Raises:
        OptionError: Another tree or join.
    """
    tree = model.tree
    _expect(model, tree == ModeTree.star(tree.order), "full", "Tucker", "a star")
    weights = {node: w.detach().clone() for node, w in model.weights.items()}
    return weights[tree.root], [weights[n] for n in tree.leaves]


def from_tensor_train(cores: Sequence[Any]) -> Factorization:
    """Tensor train: a caterpillar with full joins; leaves beyond the first hold identities.

    Args:
        cores: ``(r_n, D_n, r_{n+1})`` with ``r_0 = r_N = 1``.
    """
    given = [_array(core, 3, f"core {n}") for n, core in enumerate(cores)]
    if not given or given[0].shape[0] != 1 or given[-1].shape[2] != 1:
        shapes = [tuple(core.shape) for core in given]
        raise ShapeError(
            f"a tensor train starts and ends with a bond of 1.\n  found: {shapes}\n"
            "  expected: cores (1, D_0, r_1), (r_1, D_1, r_2), ..., (r, D, 1)"
        )
    if len(given) == 1:
        raise ShapeError("a tensor train of one core has no joins; write decompose(vector, tree).")
    tree = ModeTree.caterpillar(len(given))
    weights: dict[Node, Tensor] = {0: given[0][0]}
    for n, (node, core) in enumerate(zip(tree.interior, given[1:], strict=True), 1):
        weights[n] = torch.eye(core.shape[1], dtype=core.dtype, device=core.device)
        weights[node] = core if node != tree.root else core[..., 0]
    return Factorization.from_weights(tree, weights, join="full")


def to_tensor_train(model: Factorization) -> list[Tensor]:
    """Cores ``(r_n, D_n, r_{n+1})`` of a caterpillar with full joins.

    Raises:
        OptionError: Another tree or join.
    """
    tree = model.tree
    caterpillar = tree.order > 1 and tree == ModeTree.caterpillar(tree.order)
    _expect(model, caterpillar, "full", "a tensor train", "a caterpillar of two modes or more")
    weights = {node: w.detach() for node, w in model.weights.items()}
    cores = [weights[0].unsqueeze(0).clone()]
    for n, node in enumerate(tree.interior, 1):
        weight = weights[node].unsqueeze(-1) if node == tree.root else weights[node]
        cores.append(torch.einsum("abc,db->adc", weight, weights[n]))
    return cores


def from_tensorly(found: Any) -> Factorization:
    """A ``CPTensor``, ``TuckerTensor`` or ``TTTensor`` of tensorly.

    Raises:
        OptionError: None of them.
    """
    kind = type(found).__name__
    if kind == "CPTensor":
        return from_cp(found.weights, found.factors)
    if kind == "TuckerTensor":
        return from_tucker(found.core, found.factors)
    if kind == "TTTensor":
        return from_tensor_train(found.factors)
    raise OptionError(f"from_tensorly: expected CPTensor, TuckerTensor or TTTensor, found {kind}.")


def to_tensorly(model: Factorization) -> Any:
    """A ``CPTensor``, ``TuckerTensor`` or ``TTTensor`` of tensorly, in the arrays of its backend.

    Raises:
        OptionError: The factorization is none of them, or tensorly is missing.
    """
    try:
        import tensorly
        from tensorly.cp_tensor import CPTensor
        from tensorly.tt_tensor import TTTensor
        from tensorly.tucker_tensor import TuckerTensor
    except ImportError:
        raise OptionError("tensorly is missing: pip install 'tnreg[data]'") from None

    def theirs(x: Tensor) -> Any:
        return x if tensorly.get_backend() == "pytorch" else tensorly.tensor(x.cpu().numpy())

    tree, joins = model.tree, set(model.network.joins) - {"leaf"}
    if tree == ModeTree.star(tree.order) and joins == {"diagonal"}:
        weights, factors = to_cp(model)
        return CPTensor((theirs(weights), [theirs(f) for f in factors]))
    if tree == ModeTree.star(tree.order) and joins == {"full"}:
        core, factors = to_tucker(model)
        return TuckerTensor((theirs(core), [theirs(f) for f in factors]))
    if joins == {"full"}:
        return TTTensor([theirs(core) for core in to_tensor_train(model)])
    raise OptionError(
        f"tensorly has CP, Tucker and tensor trains; this is none of them: {tree!r}, {sorted(joins)} joins."
    )


def from_nodes(
    nodes: Iterable[Any], *, modes: Sequence[Any] | None = None, root: str | None = None
) -> Factorization:
    """A tree of ``tensornetwork`` nodes as a factorization; the mode tree is read off the wiring.

    What ``tnreg.network(model)`` made gives the same model again, bit for bit. Otherwise every node gets
    a full join and every ``CopyNode`` a diagonal one. Where a node has dangling edges and bonds, or
    several dangling edges, leaves of identities are put in, as for a tensor train; what no mode hangs
    on is multiplied into its neighbours.

    Args:
        nodes: All nodes of the network, in any order.
        modes: The dangling edges, or their names, in the order of the modes. If left out they must be
            named ``mode 0``, ``mode 1`` and so on (any word, numbers from 0).
        root: Name of the node that is to be the root. If left out: a node without modes and with the
            fewest edges; if all have modes a ``CopyNode``; the last node if there is none. Among several
            the last. ``algebra.reroot`` changes it.

    Returns:
        A factorization. Interior nodes have their usual names; in what ``tnreg.network`` made the names
        that they had, as text, but for a root of ones above two nodes.

    Raises:
        TreeError: The wiring has a loop or is not connected, or no node, or several, are called ``root``.
        ShapeError: Dangling edges whose modes are not known, or a node that is wired but not given.
    """
    import tensornetwork

    given = list(nodes)
    copies = [node for node in given if isinstance(node, tensornetwork.CopyNode)]
    plain = [node for node in given if not isinstance(node, tensornetwork.CopyNode)]
    place = {id(node): i for i, node in enumerate(plain)} | {id(node): -1 for node in copies}
    for node in given:
        for other in (end for edge in node.edges for end in (edge.node1, edge.node2)):
            if other is not None and id(other) not in place:
                raise ShapeError(
                    f"from_nodes: node {node.name!r} is wired to {other.name!r}, which is not given.\n"
                    "  give all nodes of the network, e.g. tensornetwork.reachable(node)"
                )
    index = _index_of(copies)
    parts = [
        Part(str(n.name), _array(n.tensor, None, f"node {n.name!r}"), [index(e) for e in n.edges])
        for n in plain
    ]
    ends: dict[Any, list[int]] = {}
    for copy in copies:  # the children of a diagonal join in the order of its axes
        for edge in copy.edges:
            found = [place[id(n)] for n in (edge.node1, edge.node2) if n is not None]
            ends.setdefault(index(edge), []).extend(i for i in found if i >= 0)
    dangling = [edge for node in given for edge in node.edges if edge.is_dangling()]
    dangling = list(dict.fromkeys(dangling))
    if modes is not None:
        named = {edge.name: edge for edge in dangling}
        modes = [named.get(m, m) if isinstance(m, str) else m for m in modes]
    order = modes_in_order("from_nodes", dangling, [edge.name for edge in dangling], modes)

    marks = [[str(axis).startswith("bond above ") for axis in node.axis_names] for node in plain]
    free = [i for i, above in enumerate(marks) if not any(above)]
    inside = {
        i for i, n in enumerate(plain) if n.axis_names and n.axis_names[0].endswith(" inside")
    }
    ours = len(free) <= 1 < len(plain) and root is None
    top: int | SummedBond | None = None
    if root is not None:
        top = named_part("from_nodes", root, [[part.name] for part in parts])
    elif ours and free:
        top = free[0]
        if parts[top].name.startswith("ones "):  # they sum over the bond of one child
            top = SummedBond(parts[top].indices[0], parts[top].name.removeprefix("ones "))
            parts[free[0]].name = ""
    elif ours:
        top, first = _bond_above_all(parts, marks, copies, index)
        if first is not None:  # two children: the edge knows which is the first
            ends[top.bond] = [place[id(first.node1)], place[id(first.node2)]]
    return read_wiring("from_nodes", parts, [index(e) for e in order], ends, top, inside, ours)


def _index_of(copies: Sequence[Any]) -> Callable[[Any], Any]:
    """Edge -> the edge that stands for all that meet in its ``CopyNode``, if it ends in one."""
    meant: dict[Any, Any] = {}

    def index(edge: Any) -> Any:
        while edge in meant:
            edge = meant[edge]
        return edge

    for copy in copies:
        for edge in copy.edges[1:]:
            one, other = index(copy.edges[0]), index(edge)
            if one is other:
                raise TreeError(loop("from_nodes", copy.name))
            meant[other] = one
    return index


def _bond_above_all(
    parts: Sequence[Part],
    marks: Sequence[Sequence[bool]],
    copies: Sequence[Any],
    index: Callable[[Any], Any],
) -> tuple[SummedBond, Any]:
    """The bond of a root of ones, in what ``tnreg.network`` made, and its edge if no ``CopyNode`` is there.

    Args:
        parts: The tensors.
        marks: Which of their indices are bonds above them.
        copies: The ``CopyNode`` objects.
        index: From ``_index_of``.
    """
    inner = {
        j
        for part, above in zip(parts, marks, strict=True)
        for j, mark in zip(part.indices, above, strict=True)
        if not mark
    }
    bond = next(j for part in parts for j in part.indices if j not in inner)
    hubs = [str(n.name) for n in copies if index(n.edges[0]) is bond]
    if hubs:
        return SummedBond(bond, hubs[0].removeprefix("copy ")), None
    return SummedBond(bond), bond


def to_quimb(model: Factorization) -> Any:
    """The factorization as a ``quimb.tensor.TensorNetwork``.

    Outer indices are ``"mode <n>"``. Under a full join the bond above a node is ``"bond <node>"``; a
    diagonal join is one index that all its tensors share, ``"bond <node> inside"`` after the node that
    joins, ``"ones <root>"`` under a root of ones. Every tensor is tagged with its node, with ``leaf``,
    ``full`` or ``diagonal``, and the root with ``root``. Indices shared by three tensors need to be told
    what stays: ``net.contract(output_inds=[f"mode {n}" for n in range(order)])``.

    The tensors are the model's own weights, so gradients flow through; for numpy write
    ``net.apply_to_arrays(lambda x: x.detach().numpy())``. A matrix product state is
    ``quimb.tensor.MatrixProductState(cores, shape="lpr")`` with the cores of ``to_tensor_train``.

    Raises:
        OptionError: quimb is missing.
    """
    quimb = _quimb()
    net, tree = model.network, model.tree
    top = len(tree.nodes) - 1

    def name(index: int) -> str:
        if index < tree.order:
            return f"mode {index}"
        below = tree.nodes[index - tree.order]
        above = tree.parent(below)
        if net.joins[tree.position(above)] == "full":
            return f"bond {below}"
        return f"ones {above}" if net.root_ones and above == tree.root else f"bond {above} inside"

    tensors = []
    for i, (node, weight) in enumerate(model.weights.items()):
        tags = [str(node), net.joins[i], *(["root"] if i == top else [])]
        tensors.append(quimb.Tensor(weight, [name(j) for j in net.indices(i)], tags))
    if net.root_ones and len(tree.links[top]) == 1:  # else its bond would be an outer index
        child = tree.links[top][0]
        ones = torch.ones(net.bonds[child], dtype=model.dtype, device=model.device)
        tensors.append(quimb.Tensor(ones, [f"ones {tree.root}"], ["ones"]))
    return quimb.TensorNetwork(tensors)


def from_quimb(
    net: Any, *, modes: Sequence[str] | None = None, root: str | None = None
) -> Factorization:
    """A ``quimb.tensor.TensorNetwork`` that is a tree, as a factorization: see ``from_nodes``.

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
        raise OptionError(f"from_quimb: expected a TensorNetwork, found {type(net).__name__}.")
    tags = [list(t.tags) for t in net.tensors]
    parts = [
        Part(t[0] if t else "", _array(x.data, None, f"tensor {t}"), list(x.inds))
        for t, x in zip(tags, net.tensors, strict=True)
    ]
    if net.exponent:
        share = 10.0 ** (float(net.exponent) / max(len(parts), 1))
        for part in parts:
            part.tensor = part.tensor * share
    indices = Counter(j for part in parts for j in part.indices)
    outer = [j for j, times in indices.items() if times == 1 or j in (modes or ())]
    order = modes_in_order("from_quimb", outer, outer, modes)
    ours = root is None and all({"leaf", "full", "diagonal", "ones"} & set(t) for t in tags)
    top: Any = None
    if root is not None:
        top = named_part("from_quimb", root, tags)
    elif ours:
        roots = [i for i, t in enumerate(tags) if "root" in t]
        ones = [j for j in indices if str(j).startswith("ones ")]
        top = (
            roots[0]
            if roots
            else SummedBond(ones[0], ones[0].removeprefix("ones "))
            if ones
            else None
        )
        for part, t in zip(parts, tags, strict=True):
            part.name = "" if "ones" in t and isinstance(top, SummedBond) else part.name
    inside = {i for i, t in enumerate(tags) if "diagonal" in t}
    return read_wiring("from_quimb", parts, order, {}, top, inside, ours and top is not None)


def _quimb() -> Any:
    try:
        import quimb.tensor
    except ImportError:
        raise OptionError("quimb is missing: pip install 'tnreg[quimb]'") from None
    return quimb.tensor


def _array(values: Any, axes: int | None, what: str) -> Tensor:
    if not isinstance(values, Tensor | np.ndarray) and hasattr(values, "__dlpack__"):
        try:
            values = torch.utils.dlpack.from_dlpack(values)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            if not hasattr(values, "__array__"):
                raise DataError(f"{what} cannot be read by DLPack: {error}.") from None
    found = as_tensor(np.asarray(values) if isinstance(values, list | tuple) else values).detach()
    if axes is not None and found.ndim != axes:
        raise ShapeError(f"{what} needs {axes} axes, found shape {tuple(found.shape)}.")
    return found


def _expect(model: Factorization, fits: bool, join: str, what: str, tree: str) -> None:
    joins = set(model.network.joins) - {"leaf"}
    if not fits or joins != {join}:
        raise OptionError(
            f"{what} is {tree} with {join} joins; this is {model.tree!r} with {sorted(joins)} joins.\n"
            "  decompose the dense tensor along the tree you need, or see algebra.full_joins"
        )
