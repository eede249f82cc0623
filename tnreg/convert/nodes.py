"""To and from wired ``tensornetwork`` nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from tnreg.convert.wiring import Part, SummedBond, loop, modes_in_order, named_part, read_wiring
from tnreg.errors import ShapeError, TreeError
from tnreg.factorizations.factorization import Factorization
from tnreg.tensors.arrays import array_of

# Prefixes by which ``from_nodes`` recognizes what ``network`` wrote.
_ABOVE, _INSIDE, _ONES, _COPY = "bond above ", " inside", "ones ", "copy "


def network(model: Factorization) -> list[Any]:
    """The factorization as wired ``tensornetwork`` nodes, for interchange and independent checks.

    Every weight is a ``tensornetwork.Node`` named like its tree node (in the order of
    ``model.tree.nodes``); a diagonal join of more than two indices is a ``CopyNode`` named
    ``"copy <node>"``. Bond edges are named ``"bond <node>"`` after the child below them, dangling
    edges ``"mode <n>"``. The tensors are the model's own weights, so gradients flow through.

    Returns:
        List of nodes; contract it e.g. with ``tensornetwork.contractors.greedy``. The way back is
        ``tnreg.convert.from_nodes``.
    """
    import tensornetwork

    net = model.network
    tree = net.tree
    out: list[Any] = []
    ends: dict[int, list[Any]] = {}  # index -> the axes that meet in it
    sample = next(iter(model.weights.values()))
    for position, (name, weight) in enumerate(model.weights.items()):
        axes = [
            f"mode {i}" if i < tree.order else f"bond {tree.nodes[i - tree.order]}"
            for i in net.inner(position)
        ]
        if net.joins[position] == "diagonal":
            axes = [f"bond {name}{_INSIDE}"]
        if net.above[position] is not None:
            axes.append(f"{_ABOVE}{name}")
        node = tensornetwork.Node(weight, name=str(name), axis_names=axes, backend="pytorch")
        out.append(node)
        for index, edge in zip(net.indices(position), node.edges, strict=True):
            ends.setdefault(index, []).append(edge)
    for index, edges in ends.items():
        if index < tree.order:
            edges[0].set_name(f"mode {index}")
            continue
        below = tree.nodes[index - tree.order]
        parent = tree.parent(below)
        if len(edges) == 2:
            tensornetwork.connect(*edges, name=f"bond {below}")
            continue
        if len(edges) == 1:  # one child under a root of ones: the bond is summed
            ones = torch.ones(net.index_size(index), dtype=sample.dtype, device=sample.device)
            hub = tensornetwork.Node(ones, name=f"{_ONES}{parent}", backend="pytorch")
        else:
            hub = tensornetwork.CopyNode(
                len(edges),
                net.index_size(index),
                name=f"{_COPY}{parent}",
                backend="pytorch",
                # made dense by numpy, so it needs the numpy type of the weights beside it
                dtype=np.dtype(str(sample.dtype).removeprefix("torch.")).type,
            )
        out.append(hub)
        names = [f"bond {child}" for child in tree.children(parent)] + [f"bond {parent}{_INSIDE}"]
        for axis, edge in enumerate(edges):
            tensornetwork.connect(edge, hub[axis], name=names[axis])
    return out


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
        Part(str(n.name), array_of(n.tensor, None, f"node {n.name!r}"), [index(e) for e in n.edges])
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

    marks = [[str(axis).startswith(_ABOVE) for axis in node.axis_names] for node in plain]
    free = [i for i, above in enumerate(marks) if not any(above)]
    inside = {i for i, n in enumerate(plain) if n.axis_names and n.axis_names[0].endswith(_INSIDE)}
    ours = len(free) <= 1 < len(plain) and root is None
    top: int | SummedBond | None = None
    if root is not None:
        top = named_part("from_nodes", root, [[part.name] for part in parts])
    elif ours and free:
        top = free[0]
        if parts[top].name.startswith(_ONES):  # they sum over the bond of one child
            top = SummedBond(parts[top].indices[0], parts[top].name.removeprefix(_ONES))
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
        return SummedBond(bond, hubs[0].removeprefix(_COPY)), None
    return SummedBond(bond), bond
