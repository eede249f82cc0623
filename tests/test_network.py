"""The symbolic network: sizes, ranks and joins, what is refused, and the tensornetwork wiring."""

import numpy as np
import pytest
import torch
import zoo
from refusals import refuses

from tnreg import Factorization, ModeTree, OptionError, ShapeError, TreeError, network
from tnreg.networks.network import Network, Stacked

TREE = ModeTree([[0, 1], [2, 3]])
RANKS = {0: 2, 1: 2, (0, 1): 3, 2: 4, 3: 5, (2, 3): 3}


def test_shapes_follow_the_contract():
    model = Factorization(TREE, (2, 3, 5, 7), RANKS, join={(2, 3): "full"})
    shapes = {v: tuple(w.shape) for v, w in model.weights.items()}
    assert shapes == {0: (2, 2), 1: (3, 2), (0, 1): (2, 3), 2: (5, 4), 3: (7, 5), (2, 3): (4, 5, 3),
                      TREE.root: (3,)}  # fmt: skip
    full = Factorization(TREE, 6, {**RANKS, (0, 1): 4}, join="full")
    assert full.weights[TREE.root].shape == (4, 3) and full.weights[(0, 1)].shape == (2, 2, 4)
    ones = Factorization(TREE, 6, 3, root="ones")
    assert TREE.root not in ones.weights and len(ones.weights) == 6


def test_sizes_and_ranks_of_any_integer_kind():
    sizes = (2, 3, 5, 7)
    expected = Network.build(TREE, sizes, 4)
    for kind in (np.array, torch.Size, torch.tensor, iter):
        assert Network.build(TREE, kind(sizes), np.int64(4)) == expected
    assert Network.build(TREE, np.int32(3), 4).sizes == (3, 3, 3, 3)
    assert Network.build(TREE, sizes, {v: np.int64(4) for v in TREE.nodes[:-1]}) == expected


def test_indices_are_edges():
    net = Network.build(TREE, 6, RANKS, join={(2, 3): "full"})
    of = {node: net.indices(TREE.position(node)) for node in TREE.nodes}
    assert of[0][0] == 0 and net.index_size(0) == 6
    assert of[0][1] == of[1][1] == of[(0, 1)][0] and of[2][1] != of[3][1]
    assert [net.index_size(i) for i in of[(2, 3)]] == [4, 5, 3]
    assert "(2, 3): full [bond 3: 4, bond 4: 5" in str(net)


def test_equality_and_stacks():
    a, b = Network.build(TREE, 6, 2), Network.build(ModeTree.binary(4), (6,) * 4, 2)
    assert a == b and hash(a) == hash(b) and a is not b and a != "network"
    assert a != Network.build(TREE, 6, 3) and a != Network.build(TREE, 6, 2, root="ones")
    net = Network.build(ModeTree.binary(16), 8, 4, join="full")
    assert [len(stack.positions) for stack in net.stacks] == [16, 8, 4, 2, 1]
    assert [level.block for level in net.levels] == [None, 0, 1, 2, 3]
    uneven = Network.build(ModeTree.binary(4), (2, 3, 2, 3), 4)
    assert sorted(len(stack.positions) for stack in uneven.stacks) == [1, 2, 2, 2]


SPACED = ModeTree([[0, [1, 2]], [3, [4, 5]], [6, [7, 8]]])


@pytest.mark.parametrize("tree", [*zoo.TREES.values(), ModeTree.binary(8), SPACED], ids=repr)
@pytest.mark.parametrize("kinds", [None, "height", "position"])
def test_levels_know_where_children_and_weights_are(tree, kinds):
    """Every node once, children first; what is picked for its children and its weight is theirs."""
    net = Network.build(tree, 3, 2, root="ones")
    kinds = {"height": tree.heights, "position": range(len(tree.nodes))}.get(kinds)
    weights = Stacked([torch.tensor(stack.positions) for stack in net.stacks])
    results = Stacked()
    for level in net.split_levels(kinds):
        positions = torch.tensor(level.positions)
        children = torch.tensor([tree.links[i] for i in level.positions]).long()
        for result, child in zip(results.children(level), children.unbind(1), strict=True):
            assert torch.equal(result, child)
        assert (level.weight is None) == (len(tree.nodes) - 1 in level.positions)
        assert level.weight is None or torch.equal(weights.pick(level.weight), positions)
        results.append(positions)
    assert sorted(torch.cat(results.tensors).tolist()) == list(range(len(tree.nodes)))


test_refuses = refuses([
    ((2, 3), 2, {}, ShapeError, "2 mode sizes for a tree over 4 modes"),
    ((2, 3, 0, 1), 2, {}, ShapeError, "the size of mode 2 must be a positive integer, found 0"),
    ((2, 3, 1.5, 1), 2, {}, ShapeError, "the size of mode 2 must be a positive integer"),
    (None, 2, {}, ShapeError, "1 mode sizes for a tree"),
    (4, 0, {}, ShapeError, "ranks must be a positive integer"),
    (4, "5", {}, ShapeError, "ranks must be a positive integer"),
    (4, {0: 2, 1: 2}, {}, ShapeError, "ranks lack the bond above 4 of 6 non-root nodes"),
    (4, {(0, 1, 2, 3): 2}, {}, ShapeError, "has no bond above it"),
    (4, {0: -1}, {}, ShapeError, "the rank at node 0 must be a positive integer"),
    (4, {"x": 1}, {}, TreeError, "no node 'x'"),
    (4, {0: 2, 1: 3, (0, 1): 2, 2: 2, 3: 2, (2, 3): 2}, {}, ShapeError,
     "children of node .0, 1. have different ranks under a diagonal join"),
    (4, 2, {"join": "half"}, OptionError, "unknown join 'half'"),
    (4, 2, {"join": {0: "full"}}, OptionError, "node 0 is a leaf and joins nothing"),
    (4, 2, {"join": {"x": "full"}}, TreeError, "no node 'x'"),
    (4, 2, {"root": "fixed"}, OptionError, "unknown root 'fixed'"),
    (4, 2, {"join": "full", "root": "ones"}, OptionError, "root='ones' needs a diagonal join"),
], by=lambda sizes, ranks, options: Network.build(TREE, sizes, ranks, **options))  # fmt: skip


def test_tensornetwork_nodes_are_named_and_wired():
    """Gradients flow through them."""
    import tensornetwork

    model = zoo.model_of(TREE)
    nodes = network(model)
    names = [node.name for node in nodes]
    assert names[:7] == [str(v) for v in TREE.nodes]
    assert sorted(names[7:]) == ["copy (0, 1)", "copy (0, 1, 2, 3)", "copy (2, 3)"]
    assert all(isinstance(node, tensornetwork.CopyNode) for node in nodes[7:])
    edges = {edge.name for node in nodes for edge in node.edges}
    assert {"mode 0", "mode 3", "bond 0", "bond 3", "bond (0, 1)", "bond (0, 1) inside"} <= edges
    full = network(zoo.model_of(TREE, "full"))
    assert not any(isinstance(node, tensornetwork.CopyNode) for node in full)
    zoo.contracted(nodes).square().sum().backward()
    gradients = {v: g.clone() for v, g in model.gradients.items()}
    model.zero_grad()
    model.to_tensor().square().sum().backward()
    assert all(torch.allclose(gradients[v], g) for v, g in model.gradients.items())
