"""What a tree is given as, checked: nested lists or a networkx graph, read into names and links.

``names`` holds every node, children before parents; ``links`` for each of them the positions of its
children, none at a leaf. ``ModeTree`` is made of these two.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import networkx as nx

from tnreg.errors import TreeError, blame, plain_number

Node = Hashable

# Names of one-child nodes nest, and Python compares nested tuples by recursion.
LONGEST_CHAIN = 400


@blame("structure")
def read_nested(structure: Any) -> tuple[tuple[Node, ...], tuple[tuple[int, ...], ...]]:
    """Read nested sequences of mode numbers as names and links; interior nodes get their usual names."""
    if not isinstance(structure, list | tuple):
        raise TreeError(
            f"not a mode tree: {in_a_line(structure)} ({type(structure).__name__}).\n"
            "  expected: nested lists of mode numbers, e.g. ModeTree([[0, 1], [2, 3]]), "
            "or a networkx.DiGraph with edges parent -> child"
        )
    leaves: list[Any] = []
    links: list[list[int]] = []
    # Depth first without recursion: a caterpillar over a thousand modes nests a thousand lists.
    path: list[tuple[Any, Iterator[Any], list[int]]] = [(structure, iter(structure), [])]
    seen = {id(structure)}
    while path:
        _, rest, below = path[-1]
        for item in rest:
            if isinstance(item, list | tuple) and id(item) in seen:
                if any(item is sequence for sequence, _, _ in path):
                    raise TreeError("not a mode tree: a list contains itself.")
                # its modes come twice, and one of them is enough for the error
                while isinstance(item, list | tuple):
                    item = item[0]
            if isinstance(item, list | tuple):
                path.append((item, iter(item), []))
                seen.add(id(item))
                break
            leaves.append(item)
            links.append([])
            below.append(len(links) - 1)
        else:
            if not below:
                raise TreeError(
                    "not a mode tree: it is empty or has an interior node without children, [].\n"
                    "  write every leaf as its mode number, e.g. ModeTree([[0, 1], [2, 3]])"
                )
            path.pop()
            links.append(below)
            if path:
                path[-1][2].append(len(links) - 1)
    modes = iter(_check_leaves(leaves, graph=False))
    names = [None if below else next(modes) for below in links]
    return tuple(usual_names(links, names)), tuple(map(tuple, links))


@blame("structure")
def read_graph(graph: nx.DiGraph[Any]) -> tuple[tuple[Node, ...], tuple[tuple[int, ...], ...]]:
    """Read a graph with edges parent -> child as names and links; interior nodes keep their names."""
    root, names = _root_of(graph), list(graph)
    # a name may be a long tuple, which is hashed anew each time: positions from here on
    position = {name: i for i, name in enumerate(names)}
    links = [[position[c] for c in below] for _, below in graph.adjacency()]
    return read_links(names, links, position[root])


@blame("structure")
def read_links(
    names: Sequence[Node], links: Sequence[Sequence[int]], root: int
) -> tuple[tuple[Node, ...], tuple[tuple[int, ...], ...]]:
    """Put names and links in order, children before parents; every node but the root has one parent."""
    order, waiting = list[int](), [root]
    while waiting:
        i = waiting.pop()
        order.append(i)
        waiting.extend(links[i])
    order.reverse()
    if len(order) < len(names):
        lost = [names[i] for i in sorted(set(range(len(names))) - set(order))]
        raise TreeError(
            f"not a mode tree: {lost[:8]} cannot be reached from the root {names[root]!r} "
            "(a cycle of their own)."
        )
    if not links[root]:
        raise TreeError(
            f"not a mode tree: the graph has the single node {names[root]!r}; a root needs children.\n"
            "  for one mode write ModeTree([0])"
        )
    for i in order:
        if links[i] and _is_int(names[i]):
            raise TreeError(
                f"not a mode tree: the interior node {names[i]!r} is named like a mode; its children: "
                f"{[names[c] for c in links[i]]}.\n"
                "  integers are leaves; give interior nodes other names, e.g. a string or the tuple of modes"
            )
    modes = iter(_check_leaves([names[i] for i in order if not links[i]], graph=True))
    new = {i: place for place, i in enumerate(order)}
    named = tuple(names[i] if links[i] else next(modes) for i in order)
    return named, tuple(tuple(new[c] for c in links[i]) for i in order)


def _root_of(graph: nx.DiGraph[Any]) -> Node:
    """Return the node from which all others hang, or raise an error that says what is no tree."""
    if not graph.is_directed():
        raise TreeError(
            "not a mode tree: the graph is undirected, so it has no root.\n"
            "  direct its edges from parent to child, e.g. networkx.bfs_tree(graph, root)"
        )
    if graph.number_of_nodes() == 0:
        raise TreeError("not a mode tree: the graph is empty.")
    roots = [node for node, degree in graph.in_degree() if degree == 0]
    many = [node for node, degree in graph.in_degree() if degree > 1]
    if many:
        raise TreeError(
            f"not a mode tree: node {many[0]!r} has more than one parent: "
            f"{list(graph.predecessors(many[0]))}.\n  edges point from parent to child"
        )
    if not roots:
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        raise TreeError(f"not a mode tree: no root, every node has a parent; there is a cycle {cycle}.")
    if len(roots) > 1:
        raise TreeError(
            f"not a mode tree: it has {len(roots)} roots, {roots[:8]}.\n"
            "  join them under one node, e.g. graph.add_edges_from([('root', r) for r in roots])"
        )
    root: Node = roots[0]
    return root


def _check_leaves(leaves: list[Any], *, graph: bool) -> list[int]:
    more = f" and {len(leaves) - 20} more" if len(leaves) > 20 else ""
    shown = f"[{', '.join(map(in_a_line, leaves[:20]))}]{more}"
    tail = f"\n  leaves found:    {shown}\n  leaves expected: 0..N-1, each once"
    for leaf in leaves:
        if not _is_int(leaf):
            name = in_a_line(leaf)
            if graph:
                tail += (
                    " (interior nodes may have any name)"
                    f"\n  if {name} is an interior node it lacks its children, "
                    f"e.g. graph.add_edges_from([({name}, 0), ({name}, 1)])"
                )
            raise TreeError(f"not a mode tree: leaf {name} is not a mode number.{tail}")
    modes = [operator.index(leaf) for leaf in leaves]
    seen: set[int] = set()
    for mode in modes:
        if mode in seen:
            raise TreeError(f"not a mode tree: mode {mode} appears twice.{tail}")
        seen.add(mode)
    missing = [mode for mode in range(len(modes)) if mode not in seen]
    if missing:
        raise TreeError(
            f"not a mode tree: mode {missing[0]} is missing among {len(modes)} leaves.{tail}, "
            f"here 0..{len(modes) - 1}"
        )
    return modes


def _is_int(value: Any) -> bool:
    try:
        return operator.index(plain_number(value)) is not None
    except (TypeError, ValueError):
        return False


def in_a_line(value: Any) -> str:
    """Return a value as a line of text; a dict may nest deeper than Python can write it."""
    try:
        text = repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
    return text if len(text) <= 400 else f"{text[:400]}.."


def usual_names(links: Iterable[Sequence[int]], names: Sequence[Node]) -> list[Node]:
    """Return the names that nested lists give: modes below, or (child,) for a node with one child."""
    modes: list[tuple[int, ...]] = []
    usual: list[Node] = []
    chained: list[int] = []  # one-child nodes in a row
    for name, below in zip(names, links, strict=True):
        if len(below) == 1:
            modes.append(modes[below[0]])
            usual.append((usual[below[0]],))
            chained.append(1 + chained[below[0]])
        else:
            modes.append(tuple(sorted(m for c in below for m in modes[c])) if below else (name,))  # type: ignore[arg-type]
            usual.append(modes[-1] if below else name)
            chained.append(0)
        if chained[-1] > LONGEST_CHAIN:
            raise TreeError(
                f"not a mode tree: more than {LONGEST_CHAIN} nodes with one child in a row; "
                "their names nest one in another."
            )
    return usual


def check_links(links: list[list[int]]) -> None:
    """Raise ValueError unless every child comes before its only parent."""
    seen: set[int] = set()
    for i, below in enumerate(links):
        for c in below:
            if type(c) is not int or not 0 <= c < i or c in seen:
                raise ValueError(f"node {i} has the child {c!r}: not a node before it without a parent")
            seen.add(c)
    if len(seen) < len(links) - 1:
        raise ValueError(f"{len(links) - len(seen)} nodes have no parent; a tree has one root, the last node")
