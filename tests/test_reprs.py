"""What notebooks show: drawings that are valid XML and name every node; texts stay as they are."""

import xml.etree.ElementTree as ET

import networkx as nx
import pytest
import zoo

from tnreg import Factorization, ModeTree, Trajectory, plan
from tnreg.plots import node_text
from tnreg.trees.drawing import MOST_NODES


def texts_of(shown):
    """All texts of a drawing, sorted."""
    texts = ET.fromstring(shown._repr_svg_()).iter("{http://www.w3.org/2000/svg}text")
    return sorted("".join(text.itertext()) for text in texts)


@pytest.mark.parametrize("name", zoo.TREES)
def test_every_node_of_a_tree_is_drawn(name):
    tree = zoo.TREES[name]
    assert texts_of(tree) == sorted(map(node_text, tree.nodes))


def test_any_name_is_drawn():
    """Markup, formulas and characters that XML does not know are texts like all others."""
    names = ["<b>&\"'", "a\x00b", r"$\frac{$"]
    graph = nx.DiGraph([(names[0], 0), (names[0], names[1]), (names[1], names[2])])
    graph.add_edges_from([(names[1], 1), (names[2], 2), (names[2], 3)])
    assert "<b>" not in ModeTree(graph)._repr_svg_()
    drawn = {names[0], "a\\x00b", names[2], *"0123"}
    assert set(texts_of(ModeTree(graph))) == drawn


def test_a_model_shows_bonds_sizes_and_the_number_of_weights():
    tree = zoo.TREES["across"]
    model = zoo.model_of(tree, join="full")
    weights = sum(p.numel() for p in model.parameters())
    labels = [f"{mode}: size {size}" for mode, size in enumerate(model.sizes)]
    title = f"sizes {model.sizes}, full joins, {weights} weights of float64"
    bonds = map(str, model.network.bonds[:-1])
    assert texts_of(model) == sorted([*labels, *map(node_text, tree.interior), *bonds, title])


def test_large_trees_are_text():
    tree = ModeTree.star(MOST_NODES)  # one node more
    assert tree._repr_svg_() is None and Factorization(tree, 2, 2)._repr_svg_() is None
    assert ModeTree.star(MOST_NODES - 1)._repr_svg_()


def test_texts_are_unchanged():
    tree = ModeTree([[0, 1], 2])
    assert repr(tree) == "ModeTree([[0, 1], 2])" and str(tree) == tree.text()
    model = Factorization(tree, 2, 2)
    assert repr(model).startswith("Factorization(\n  ModeTree([[0, 1], 2]), sizes=(2, 2, 2),\n")
    for text_only in (plan(model), Trajectory()):
        assert not hasattr(text_only, "_repr_svg_")
