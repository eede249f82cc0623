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

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import networkx as nx
import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from tnreg.algebra import hung_up
from tnreg.errors import DataError, OptionError, ShapeError, TreeError
from tnreg.factorization import Factorization
from tnreg.rank import as_tensor
from tnreg.tree import ModeTree, Node

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
    meant: dict[Any, Any] = {}  # edge of a CopyNode -> the one that stands for all of them

    def index(edge: Any) -> Any:
        while edge in meant:
            edge = meant[edge]
        return edge

    for copy in copies:
        for edge in copy.edges[1:]:
            one, other = index(copy.edges[0]), index(edge)
            if one is other:
                raise TreeError(_loop("from_nodes", copy.name))
            meant[other] = one
    parts = [
        _Part(str(n.name), _array(n.tensor, None, f"node {n.name!r}"), [index(e) for e in n.edges])
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
    order = _modes_in_order("from_nodes", dangling, [edge.name for edge in dangling], modes)

    marks = [[str(axis).startswith("bond above ") for axis in node.axis_names] for node in plain]
    free = [i for i, above in enumerate(marks) if not any(above)]
    inside = {
        i for i, n in enumerate(plain) if n.axis_names and n.axis_names[0].endswith(" inside")
    }
    ours = len(free) <= 1 < len(plain) and root is None
    top: int | _Ones | None = None
    if root is not None:
        top = _named_part("from_nodes", root, [[part.name] for part in parts])
    elif ours and free and not parts[free[0]].name.startswith("ones "):
        top = free[0]
    elif ours and free:  # ones that sum over the bond of one child
        top = _Ones(parts[free[0]].indices[0], parts[free[0]].name.removeprefix("ones "))
        parts[free[0]].name = ""
    elif ours:  # the bond that is above all that it joins
        inner = {
            j
            for part, above in zip(parts, marks, strict=True)
            for j, mark in zip(part.indices, above, strict=True)
            if not mark
        }
        bond = next(j for part in parts for j in part.indices if j not in inner)
        hubs = [str(n.name) for n in copies if index(n.edges[0]) is bond]
        if not hubs:  # two children: the edge knows which is the first
            ends[bond] = [place[id(bond.node1)], place[id(bond.node2)]]
        top = _Ones(bond, hubs[0].removeprefix("copy ") if hubs else None)
    return _read("from_nodes", parts, [index(e) for e in order], ends, top, inside, ours)


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
        _Part(t[0] if t else "", _array(x.data, None, f"tensor {t}"), list(x.inds))
        for t, x in zip(tags, net.tensors, strict=True)
    ]
    if net.exponent:
        share = 10.0 ** (float(net.exponent) / max(len(parts), 1))
        for part in parts:
            part.tensor = part.tensor * share
    indices = Counter(j for part in parts for j in part.indices)
    outer = [j for j, times in indices.items() if times == 1 or j in (modes or ())]
    order = _modes_in_order("from_quimb", outer, outer, modes)
    ours = root is None and all({"leaf", "full", "diagonal", "ones"} & set(t) for t in tags)
    top: Any = None
    if root is not None:
        top = _named_part("from_quimb", root, tags)
    elif ours:
        roots = [i for i, t in enumerate(tags) if "root" in t]
        ones = [j for j in indices if str(j).startswith("ones ")]
        top = roots[0] if roots else _Ones(ones[0], ones[0].removeprefix("ones ")) if ones else None
        for part, t in zip(parts, tags, strict=True):
            part.name = "" if "ones" in t and isinstance(top, _Ones) else part.name
    inside = {i for i, t in enumerate(tags) if "diagonal" in t}
    return _read("from_quimb", parts, order, {}, top, inside, ours and top is not None)


@dataclass
class _Part:
    """A tensor of a network; without a name if it is nothing but the ones of a root."""

    name: str
    tensor: Tensor
    indices: list[Any]


@dataclass(frozen=True)
class _Ones:
    """A root that is no tensor: the bond that it sums over, and its name if known."""

    bond: Any
    name: str | None = None


def _read(
    caller: str,
    given: Sequence[_Part],
    modes: Sequence[Any],
    ends: Mapping[Any, Sequence[int]],
    root: int | _Ones | None,
    inside: set[int],
    named: bool,
) -> Factorization:
    """The factorization of tensors that share indices.

    Args:
        caller: For messages.
        given: The tensors.
        modes: The index of every mode; other tensors may share it.
        ends: Who has an index, in the order of children, where that is not the order of the tensors.
        root: Which tensor, or bond, is the root; ``None`` to choose one.
        inside: Tensors above one other that are diagonal joins, not full ones.
        named: Whether interior nodes are called like their tensors.
    """
    parts = {i: part for i, part in enumerate(given) if part.name or not isinstance(root, _Ones)}
    if not parts or not modes:
        raise ShapeError(f"{caller}: the network has no modes; it is a number, or empty.")
    held_by: dict[Any, list[int]] = {j: list(dict.fromkeys(found)) for j, found in ends.items()}
    for i, part in parts.items():
        if len(set(part.indices)) < len(part.indices):
            raise TreeError(_loop(caller, part.name))
        for j in part.indices:
            if i not in held_by.setdefault(j, []):
                held_by[j].append(i)
    fresh = count(len(given))
    mode_of: dict[Any, int] = {}
    shared = {j for j in modes if len(held_by[j]) > 1 or list(modes).count(j) > 1}
    for mode, j in enumerate(modes):
        if j not in shared:
            mode_of[j] = mode
            continue
        sample, k, own = parts[held_by[j][0]], next(fresh), object()
        eye = _identity(sample.tensor.shape[sample.indices.index(j)], sample.tensor)
        parts[k] = _Part(f"mode {mode}", eye, [own, j])
        held_by[j].append(k)
        held_by[own], mode_of[own] = [k], mode
    summed = root.bond if isinstance(root, _Ones) else None
    for j, found in held_by.items():  # a CopyNode of one axis sums
        if len(found) == 1 and j not in mode_of and j != summed:
            part = parts[found[0]]
            part.tensor = part.tensor.sum(part.indices.index(j))
            part.indices.remove(j)

    _absorb_vectors(parts, held_by, mode_of, root, everywhere=False)
    if root is None:
        root = _choose_root(parts, held_by, mode_of)
    _absorb_vectors(parts, held_by, mode_of, root, everywhere=True)
    links, held, kinds = dict[int, list[int]](), dict[int, Tensor](), dict[int, str]()
    leaves, left = dict[int, int](), list[tuple[int, Any]]()

    def tied(i: int, bond: Any, below: list[int]) -> None:
        links[i], kinds[i] = below, "diagonal"
        left.extend((c, bond) for c in below)

    if isinstance(root, _Ones):
        top = next(fresh)
        tied(top, root.bond, held_by[root.bond])
    else:
        top = root
        left.append((root, None))
    seen = set[int]()
    while left:
        i, above = left.pop()
        if i in seen:
            raise TreeError(_loop(caller, parts[i].name))
        seen.add(i)
        part = parts[i]
        rest = [j for j in part.indices if above is None or j != above]
        axes = [part.indices.index(j) for j in rest + ([] if above is None else [above])]
        held[i] = part.tensor.permute(axes)
        if above is not None and len(rest) == 1 and rest[0] in mode_of:
            leaves[i] = mode_of[rest[0]]
            continue
        links[i], kinds[i] = [], "full"
        for j, size in zip(rest, held[i].shape, strict=False):
            others = [c for c in held_by[j] if c != i]
            if j in mode_of:
                k = next(fresh)
                held[k], leaves[k] = _identity(size, part.tensor), mode_of[j]
                links[i].append(k)
            elif len(rest) == 1 and (len(others) > 1 or i in inside):
                tied(i, j, others)
            elif len(others) == 1:
                links[i] += others
                left.append((others[0], j))
            else:  # what is tied hangs below a node of its own
                k = next(fresh)
                held[k] = _identity(size, part.tensor)
                tied(k, j, others)
                links[i].append(k)
    apart = [part.name for i, part in parts.items() if i not in seen]
    if apart:
        raise TreeError(
            f"{caller}: the network is not connected; {apart[:4]} cannot be reached from the root.\n"
            "  wire them with a bond of size 1, or convert every piece by itself"
        )
    model, order = hung_up(top, links, held, kinds, leaves)
    if not named:
        return model
    called = {i: part.name for i, part in parts.items()}
    if isinstance(root, _Ones) and root.name is not None:
        called[top] = root.name
    return _renamed(model, [called.get(i) for i in order])


def _absorb_vectors(
    parts: dict[int, _Part],
    held_by: dict[Any, list[int]],
    mode_of: Mapping[Any, int],
    root: int | _Ones | None,
    *,
    everywhere: bool,
) -> None:
    """Multiply tensors without modes and with one bond at most into neighbours.

    ``everywhere``: those at bonds of three tensors or more as well.
    """
    summed = root.bond if isinstance(root, _Ones) else None
    left = list(parts)
    while left:
        i = left.pop()
        part = parts.get(i)
        if part is None or i == root or len(part.indices) > 1 or len(parts) == 1:
            continue
        if part.indices and part.indices[0] in mode_of:
            continue
        if not part.indices:
            target = next(k for k in parts if k != i)
            bond, shape = None, list[int]()
        else:
            bond = part.indices[0]
            if len(held_by[bond]) == 1 or (len(held_by[bond]) > 2 and not everywhere):
                continue
            target = next(k for k in held_by[bond] if k != i)
            shape = [-1 if j == bond else 1 for j in parts[target].indices]
            held_by[bond].remove(i)
        other = parts[target]
        other.tensor = other.tensor * part.tensor.reshape(shape)
        if bond is not None and len(held_by[bond]) == 1 and bond != summed:
            other.tensor = other.tensor.sum(other.indices.index(bond))
            other.indices.remove(bond)
            del held_by[bond]
        del parts[i]
        left.append(target)


def _choose_root(
    parts: Mapping[int, _Part], held_by: Mapping[Any, Sequence[int]], mode_of: Mapping[Any, int]
) -> int | _Ones:
    free = [i for i, part in parts.items() if part.indices and not mode_of.keys() & part.indices]
    if free:
        return min(reversed(free), key=lambda i: len(parts[i].indices))
    tied = [j for j, found in held_by.items() if len(found) > 2]
    return _Ones(tied[-1]) if tied else max(parts)


def _renamed(model: Factorization, names: Sequence[str | None]) -> Factorization:
    """With these names for the interior nodes; ``None`` for the usual one."""
    tree = model.tree
    called = {
        node: node if not below or name is None or name == str(node) else name
        for node, below, name in zip(tree.nodes, tree.links, names, strict=True)
    }
    if all(name == node for node, name in called.items()):
        return model
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_edges_from((called[v], called[c]) for v in tree.interior for c in tree.children(v))
    joins = dict(zip(tree.nodes, model.network.joins, strict=True))
    return Factorization.from_weights(
        ModeTree(graph),
        {called[node]: weight for node, weight in model.weights.items()},
        join={called[node]: joins[node] for node in tree.interior},
    )


def _modes_in_order(
    caller: str, found: Sequence[Any], names: Sequence[str], modes: Sequence[Any] | None
) -> list[Any]:
    """What dangles, in the order of the modes: as given, or by the numbers in the names."""
    if modes is not None:
        order = list(modes)
        if len(order) != len(found) or any(
            sum(m is x or m == x for m in order) != 1 for x in found
        ):
            raise ShapeError(
                f"{caller}: modes must hold everything that dangles once.\n"
                f"  found:    {order!r}\n  expected: {list(names)!r} in the order of the modes"
            )
        return order
    parsed = [re.fullmatch(r"(.*?)(\d+)", str(name)) for name in names]
    numbers = [int(m[2]) if m else -1 for m in parsed]
    words = {m[1] if m else "" for m in parsed}
    if sorted(numbers) != list(range(len(names))) or len(words) > 1:
        raise ShapeError(
            f"{caller}: which modes these are cannot be told from their names.\n"
            f"  found:    {list(names)!r}\n"
            f"  expected: 'mode 0' to 'mode {len(names) - 1}', each once; or give modes=[..]"
        )
    return [found[numbers.index(n)] for n in range(len(names))]


def _named_part(caller: str, root: str, names: Sequence[Sequence[str]]) -> int:
    fitting = [i for i, own in enumerate(names) if root in own]
    if len(fitting) != 1:
        raise TreeError(
            f"{caller}: the root must be one tensor; {len(fitting)} are called {root!r}."
        )
    return fitting[0]


def _loop(caller: str, name: Any) -> str:
    return (
        f"{caller}: the network has a loop through {name!r}; a factorization is a tree.\n"
        "  flatten edges that run in parallel, split or contract others first"
    )


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


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
