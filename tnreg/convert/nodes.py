"""To and from wired ``tensornetwork`` nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import networkx as nx
import numpy as np
import torch

from tnreg.convert.wiring import ABOVE, BARE, COPY, INSIDE, ONES, Part, loop, order_modes, read_wiring
from tnreg.errors import ShapeError, TreeError
from tnreg.factorizations.factorization import Factorization
from tnreg.tensors.arrays import array_of


def network(model: Factorization) -> list[Any]:
    """Return the factorization as wired ``tensornetwork`` nodes, for interchange and independent checks.

    Every weight is a ``tensornetwork.Node`` named like its tree node (in the order of
    ``model.tree.nodes``); a diagonal join of more than two indices is a ``CopyNode`` named
    ``"copy <node>"``. Bond edges are named ``"bond <node>"`` after the child below them, dangling
    edges ``"mode <n>"``; those of bare leaves are at the node above, or its ``CopyNode``. The tensors are
    the model's own weights, so gradients flow through. Contract them e.g. with
    ``tensornetwork.contractors.greedy``; the way back is ``tnreg.convert.from_nodes``.
    """
    import tensornetwork

    net, tree = model.network, model.tree

    nodes: list[Any] = []
    ends: dict[int, list[Any]] = {}  # index -> the axes that meet in it
    for position, (name, weight) in zip(net.weighted, model.weights.items(), strict=True):
        below = tree.links[position]
        axes = [f"{BARE if c in net.bare else 'bond '}{tree.nodes[c]}" for c in below] or [f"mode {name}"]
        axes = [f"bond {name}{INSIDE}"] if net.joins[position] == "diagonal" else axes
        axes += [f"{ABOVE}{name}"] if net.above[position] is not None else []
        node = tensornetwork.Node(weight, name=str(name), axis_names=axes, backend="pytorch")
        nodes.append(node)
        for index, edge in zip(net.indices(position), node.edges, strict=True):
            ends.setdefault(index, []).append(edge)
    for index, edges in ends.items():
        child = tree.position(index) if index < tree.order else index - tree.order
        parent, size = tree.parent(tree.nodes[child]), net.index_size(index)
        below, bare = tree.links[tree.position(parent)], child in net.bare
        if index < tree.order and not (bare and net.joins[tree.position(parent)] == "diagonal"):
            edges[0].set_name(f"mode {index}")
            continue
        if len(edges) == 2 and not bare:
            tensornetwork.connect(*edges, name=f"bond {tree.nodes[child]}")
            continue
        if len(edges) == 1 and not bare:  # one child under a root of ones: the bond is summed
            ones = torch.ones(size, dtype=model.dtype, device=model.device)
            hub = tensornetwork.Node(ones, name=f"{ONES}{parent}", backend="pytorch")
        else:  # made dense by numpy, so it needs the numpy type of the weights beside it
            dtype = np.dtype(str(model.dtype).removeprefix("torch.")).type
            name = f"{COPY}{parent}"
            rank = len(edges) + sum(c in net.bare for c in below)
            hub = tensornetwork.CopyNode(rank, size, name, backend="pytorch", dtype=dtype)
        nodes.append(hub)
        names, waiting = [f"bond {tree.nodes[c]}" for c in below] + [f"bond {parent}{INSIDE}"], iter(edges)
        for axis, c, name in zip(hub.edges, (*below, -1), names, strict=False):
            if c in net.bare:
                axis.set_name(f"mode {tree.nodes[c]}")
            else:
                tensornetwork.connect(next(waiting), axis, name=name)
    return nodes


def from_nodes(
    nodes: Iterable[Any], *, modes: Sequence[Any] | None = None, root: str | None = None
) -> Factorization:
    """Convert a tree of ``tensornetwork`` nodes to a factorization; the mode tree is read off the wiring.

    What ``tnreg.network(model)`` made gives the same model again, bit for bit. Otherwise every node gets
    a full join and every ``CopyNode`` a diagonal one. Where a node has dangling edges and bonds, or
    several dangling edges, these are bare leaves, as in a tensor train. A node with no mode
    below it is multiplied into its neighbour, and so is a node that this leaves with one child.

    Args:
        nodes: All nodes of the network, in any order.
        modes: The dangling edges, or their names, in the order of the modes. If left out they must be
            named ``mode 0``, ``mode 1`` and so on (any word, numbers from 0).
        root: Name of the node that is to be the root. If left out: a node without modes and with the
            fewest edges; if all have modes a ``CopyNode``; the last node if there is none. Among several
            the last. ``algebra.reroot`` changes it.

    Returns:
        A factorization. Interior nodes have their usual names; those that ``tnreg.network`` made keep
        theirs, as text, except a root of ones above two nodes.

    Raises:
        TreeError: The wiring has a loop or is not connected, or no node, or several, are called ``root``.
        ShapeError: Dangling edges whose modes are not known, or a node that is wired but not given.
    """
    import tensornetwork

    nodes = list(nodes)
    _check_complete(nodes)
    copies = [node for node in nodes if isinstance(node, tensornetwork.CopyNode)]
    plain = [node for node in nodes if not isinstance(node, tensornetwork.CopyNode)]
    index_of = _merge_copies(copies)
    dangling = list(dict.fromkeys(e for node in nodes for e in node.edges if e.is_dangling()))
    shared = dict.fromkeys(edge for node in copies for edge in node.edges if edge.is_dangling())
    ordered = [
        (edge,) if edge in shared else index_of(edge) for edge in order_modes("from_nodes", dangling, modes)
    ]
    hubs = {
        index_of(node.edges[0]): node.name.partition(" ")[2]
        for node in nodes
        if node.edges and node.name.startswith((ONES, COPY))
    }
    parts = [_part(node, [index_of(edge) for edge in node.edges]) for node in plain]
    number = {id(node): i for i, node in enumerate(plain)}
    number |= {id(edge): len(parts) + i for i, edge in enumerate(shared)}
    parts += [Part([edge.name], None, [(edge,), index_of(edge)], mark="bare") for edge in shared]
    ends: dict[Any, list[int]] = {}  # copies first: children in the order of a CopyNode's axes
    for edge in (edge for node in [*copies, *plain] for edge in node.edges):
        wired = [number[id(end)] for end in (edge.node1, edge.node2, edge) if id(end) in number]
        ends.setdefault(index_of(edge), []).extend(wired)
    return read_wiring("from_nodes", parts, ordered, root, hubs, ends)


def _part(node: Any, indices: list[Any]) -> Part:
    """Return the tensor of a node, with what the names that ``network`` gives say of it."""
    axes, name = list(map(str, node.axis_names)) or [""], str(node.name)
    mark = "ones" if name.startswith(ONES) else "diagonal" if axes[0].endswith(INSIDE) else ""
    mark = "full" if any(axis.startswith(BARE) for axis in axes) else mark
    tensor = array_of(node.tensor, None, f"node {name!r}")
    return Part([name], tensor, indices, axes[-1].startswith(ABOVE), mark)


def _check_complete(nodes: Sequence[Any]) -> None:
    """Raise an error if a node is wired to one that was not given."""
    known = set(map(id, nodes))
    for node in nodes:
        for other in (end for edge in node.edges for end in (edge.node1, edge.node2)):
            if other is not None and id(other) not in known:
                raise ShapeError(
                    f"from_nodes: node {node.name!r} is wired to {other.name!r}, which is not given.\n"
                    "  give all nodes of the network, e.g. tensornetwork.reachable(node)",
                    argument="nodes",
                )


def _merge_copies(copies: Sequence[Any]) -> Callable[[Any], Any]:
    """Return a function from an edge to the one that stands for all that meet in its ``CopyNode``."""
    representatives: nx.utils.UnionFind[Any] = nx.utils.UnionFind()
    for copy in copies:
        for edge in copy.edges[1:]:
            if representatives[copy.edges[0]] is representatives[edge]:
                raise TreeError(loop("from_nodes", copy.name))
            representatives.union(copy.edges[0], edge)
    return representatives.__getitem__
