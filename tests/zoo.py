"""Trees, mode sizes and models that the law suite runs over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import networkx as nx
import torch
from hypothesis import strategies as st

from tnreg import Factorization, ModeTree

SIZES = (2, 3, 5, 7, 4)


def named_graph() -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_edges_from([("top", "left"), ("top", 2), ("left", 1), ("left", 0)])
    return graph


TREES: dict[str, ModeTree] = {
    "matrix": ModeTree([0, 1]),
    "single": ModeTree([0]),
    "cp-4": ModeTree.star(4),
    "htf-4": ModeTree.binary(4),
    "htf-5": ModeTree.binary(5),
    "deep-chain": ModeTree.chain(5),
    "mixed-arity": ModeTree([[0, 1, 2], [3, 4]]),
    "one-child": ModeTree([[[0]], [[1, [2]]]]),
    "one-child-root": ModeTree([[[0, 1], 2]]),
    "across": ModeTree([[0, 2], [1, 3]]),
    "uneven": ModeTree([[0, 3], [[1, 4], 2]]),
    "backwards": ModeTree([[3, 1], [2, 0]]),
    "caterpillar": ModeTree.caterpillar(5),
    "named": ModeTree(named_graph()),
}


def sizes_of(tree: ModeTree) -> tuple[int, ...]:
    return tuple(SIZES[n % len(SIZES)] for n in range(tree.order))


def joins_of(tree: ModeTree) -> dict[str, Any]:
    """The kinds of joins that every tree is tried with; the last alternates over the nodes."""
    mixed = {v: "full" if k % 2 else "diagonal" for k, v in enumerate(tree.interior)}
    return {"diagonal": "diagonal", "full": "full", "mixed": mixed}


def bonds_of(tree: ModeTree, join: Any) -> dict[Any, int]:
    """Different bonds wherever the joins allow it."""
    bonds = {}
    for k, v in enumerate(tree.interior):
        kind = join if isinstance(join, str) else join[v]
        for i, child in enumerate(tree.children(v)):
            bonds[child] = 2 + k % 3 if kind == "diagonal" else 2 + (k + i) % 3
    return bonds


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=random(seed))


def assert_close(found: torch.Tensor, wanted: Any, rtol: float = 1e-12) -> None:
    """Equal up to a share of the largest entry."""
    found, wanted = found.detach(), torch.as_tensor(wanted).detach()
    assert found.shape == wanted.shape
    scale = float(wanted.abs().max()) if wanted.numel() else 1.0
    assert float((found - wanted).abs().max()) <= rtol * max(scale, 1e-300)


def model_of(
    tree: ModeTree, join: Any = "diagonal", *, sizes: Any = None, bonds: Any = None, seed: int = 0, **more
) -> Factorization:
    """A model with distinct mode sizes, unequal bonds and weights of order one, unless told otherwise."""
    more = {"std": 0.7, "dtype": torch.float64, "generator": random(seed), **more}
    return Factorization(tree, sizes or sizes_of(tree), bonds or bonds_of(tree, join), join=join, **more)


def contracted(nodes: list[Any]) -> Any:
    """What tensornetwork makes of a copy of nodes whose free edges are called mode 0, mode 1, .."""
    import tensornetwork

    nodes = list(tensornetwork.replicate_nodes(nodes))
    edges = {edge.name: edge for edge in tensornetwork.get_all_dangling(nodes)}
    order = [edges[f"mode {n}"] for n in range(len(edges))]
    return torch.as_tensor(tensornetwork.contractors.greedy(nodes, output_edge_order=order).tensor)


def zoo(*, bare: bool = False) -> Iterator[Any]:
    """(name, model) over all trees, joins and roots; with bare leaves as well if asked for."""
    import pytest

    for name, tree in TREES.items():
        for kind, join in joins_of(tree).items():
            yield pytest.param(model_of(tree, join), id=f"{name}-{kind}")
        yield pytest.param(model_of(tree, root="ones"), id=f"{name}-ones")
        yield pytest.param(
            model_of(tree, joins_of(tree)["mixed"], dtype=torch.complex128), id=f"{name}-complex"
        )
    if bare:
        yield from bare_zoo()


def bare_model(
    tree: ModeTree, join: Any, kinds: dict[int, str], root: str = "trained", seed: int = 0
) -> Factorization:
    """A model with bare leaves; those under one diagonal join have one size, all modes other sizes."""
    sizes, bonds = list(sizes_of(tree)), bonds_of(tree, join)
    for v in tree.interior:
        modes = [c for c in tree.children(v) if kinds.get(c) == "bare"]  # type: ignore[call-overload]
        diagonal = join == "diagonal" or (join != "full" and join[v] == "diagonal")
        for c in tree.children(v) if diagonal and modes else modes:
            bonds.pop(c)
        for c in modes if diagonal else ():
            sizes[c] = sizes[modes[0]]  # type: ignore[index]
    return model_of(tree, join, sizes=tuple(sizes), bonds=bonds or 1, leaves=kinds, root=root, seed=seed)


def bare_zoo() -> Iterator[Any]:
    """(name, model) over all trees, with all leaves bare or some; of trees like others in the slow tests."""
    import pytest

    usual = {"single", "cp-4", "htf-4", "one-child", "across", "caterpillar"}
    for name, tree in TREES.items():
        marks = [] if name in usual else [pytest.mark.slow]
        everyone, some = (dict.fromkeys(range(0, tree.order, step), "bare") for step in (1, 2))
        kinds = {"full-bare": ("full", everyone), "mixed-some-bare": (joins_of(tree)["mixed"], some)}
        kinds["diagonal-bare"] = ("diagonal", everyone)
        for kind, case in kinds.items():
            yield pytest.param(bare_model(tree, *case), id=f"{name}-{kind}", marks=marks)
        if tree.order > 1:
            model = bare_model(tree, "diagonal", {1: "bare"}, "ones")
            yield pytest.param(model, id=f"{name}-ones-bare", marks=marks)


@st.composite
def trees(draw: st.DrawFn, most: int = 6) -> ModeTree:
    """Random trees: any arity, one-child nodes, modes in any order."""
    order = draw(st.integers(1, most))
    nodes: list[Any] = list(draw(st.permutations(range(order))))
    while len(nodes) > 1:
        count = draw(st.integers(1, len(nodes)))
        picked = draw(st.permutations(range(len(nodes))))[:count]
        joined = [nodes[i] for i in picked]
        nodes = [node for i, node in enumerate(nodes) if i not in picked]
        if count == 1 and isinstance(joined[0], list) and len(joined[0]) == 1:
            nodes.append(joined[0])  # chains of one child need not grow for ever
            continue
        nodes.append(joined)
    return ModeTree(nodes[0] if isinstance(nodes[0], list) else nodes)


@st.composite
def models(draw: st.DrawFn, dtype: torch.dtype = torch.float64, bare: bool = False) -> Factorization:
    """Random trees with random joins, sizes and bonds; with bare leaves as well if asked for."""
    tree = draw(trees())
    join = {v: draw(st.sampled_from(["diagonal", "full"])) for v in tree.interior}
    sizes = tuple(draw(st.integers(1, 4)) for _ in range(tree.order))
    bonds: dict[Any, int] = {}
    for v in tree.interior:
        shared = draw(st.integers(1, 4))
        for child in tree.children(v):
            bonds[child] = shared if join[v] == "diagonal" else draw(st.integers(1, 3))
    root = "trained"
    if join[tree.root] == "diagonal":
        root = draw(st.sampled_from(["trained", "ones"]))
    leaves = {n: draw(st.sampled_from(["weights", "bare"])) if bare else "weights" for n in tree.leaves}
    for v in tree.interior:
        modes = [c for c in tree.children(v) if leaves.get(c) == "bare"]  # type: ignore[call-overload]
        if modes and root == "ones" and v == tree.root and len(modes) == len(tree.children(v)):
            root = "trained"
        for c in tree.children(v) if modes and join[v] == "diagonal" else modes:
            del bonds[c]
        for c in modes if join[v] == "diagonal" else ():
            sizes = (*sizes[:c], sizes[modes[0]], *sizes[c + 1 :])  # type: ignore
    return Factorization(
        tree, sizes, bonds or 1, join=join, root=root, leaves=leaves, std=1.0, dtype=dtype,
        generator=random(draw(st.integers(0, 999))),
    )  # fmt: skip


def random_index(sizes: tuple[int, ...], count: int, seed: int = 0) -> torch.Tensor:
    generator = random(seed)
    return torch.stack([torch.randint(n, (count,), generator=generator) for n in sizes], 1)


def random_features(
    sizes: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[torch.Tensor]:
    generator = random(seed)
    return [torch.randn(count, n, dtype=dtype, generator=generator) for n in sizes]


def all_index(sizes: tuple[int, ...]) -> torch.Tensor:
    count = math.prod(sizes)
    return torch.stack(torch.unravel_index(torch.arange(count), sizes), 1)
