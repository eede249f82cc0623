"""What notebooks show: drawings that are valid XML and name every node; texts stay as they are."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET

import networkx as nx
import pytest
import zoo

from tnreg import Factorization, ModeTree, Trajectory, plan
from tnreg.trees.drawing import MOST_NODES

SVG = "{http://www.w3.org/2000/svg}"


def nodes_of(html):
    """Title, text, place and kind of every node that is drawn."""
    found = {}
    for group in ET.fromstring(html).iter(f"{SVG}g"):
        circle = group.find(f"{SVG}circle")
        place = float(circle.get("cx")), float(circle.get("cy"))
        assert group.find(f"{SVG}title").text not in found
        found[group.find(f"{SVG}title").text] = (group.find(f"{SVG}text").text, place)
    return found


@pytest.mark.parametrize("name", zoo.TREES)
def test_every_node_of_a_tree_is_drawn(name):
    tree = zoo.TREES[name]
    html = tree._repr_html_()
    found = nodes_of(html)
    assert set(found) == {str(node) for node in tree.nodes}
    whole = ET.fromstring(html).find(f"{SVG}svg")
    width, height = float(whole.get("width")), float(whole.get("height"))
    for node in tree.nodes:
        text, (x, y) = found[str(node)]
        assert text == str(node) or (text.endswith("…") and str(node).startswith(text[:-1]))
        assert 0 < x < width and 0 < y < height
        if tree.parent(node) is not None:
            assert y > found[str(tree.parent(node))][1][1]  # below its parent
    places = [found[str(mode)][1] for mode in tree.leaves]
    assert len(set(places)) == len(places)
    lines = list(whole.iter(f"{SVG}line"))
    assert len(lines) == len(tree.nodes) - 1
    spots = {(round(x, 1), round(y, 1)) for _, (x, y) in found.values()}
    for line in lines:
        assert (float(line.get("x1")), float(line.get("y1"))) in spots
        assert (float(line.get("x2")), float(line.get("y2"))) in spots


def test_names_are_escaped():
    graph = nx.DiGraph([("<b>&\"'", 0), ("<b>&\"'", "a\x00b"), ("a\x00b", 1), ("a\x00b", 2)])
    html = ModeTree(graph)._repr_html_()
    assert "<b>" not in html and set(nodes_of(html)) == {
        "<b>&\"'",
        "a\N{REPLACEMENT CHARACTER}b",
        "0",
        "1",
        "2",
    }


def test_a_model_shows_bonds_sizes_and_the_number_of_weights():
    tree = zoo.TREES["across"]
    model = zoo.model_of(tree, join="full")
    html = model._repr_html_()
    found = nodes_of(html)
    assert {f"{mode}: size {size}" for mode, size in enumerate(model.sizes)} < set(found)
    assert {str(node) for node in tree.interior} < set(found)
    whole = ET.fromstring(html)
    bonds = [text.text for text in whole.find(f"{SVG}svg").findall(f"{SVG}text")]
    assert sorted(bonds) == sorted(map(str, model.network.bonds[:-1]))
    weights = sum(p.numel() for p in model.parameters())
    caption = whole.find("div").text
    assert f"{weights} weights of float64" in caption and str(model.sizes) in caption


def test_bonds_stand_on_their_edges():
    """In the middle between the node that a bond is above and the parent of that node."""
    tree = ModeTree([[0, 1], 2])
    model = Factorization(tree, 3, {0: 5, 1: 5, (0, 1): 7, 2: 7})
    html = model._repr_html_()
    found, whole = nodes_of(html), ET.fromstring(html).find(f"{SVG}svg")
    names = {0: "0: size 3", 1: "1: size 3", 2: "2: size 3"}
    for node, bond in {0: 5, 1: 5, (0, 1): 7, 2: 7}.items():
        below, above = (found[names.get(v, str(v))][1] for v in (node, tree.parent(node)))
        middle = [(a + b) / 2 for a, b in zip(below, above, strict=True)]
        assert any(
            text.text == str(bond)
            and [float(text.get("x")), float(text.get("y"))] == pytest.approx(middle, abs=0.2)
            for text in whole.findall(f"{SVG}text")
        )


def test_large_trees_are_text():
    tree = ModeTree.star(MOST_NODES)  # one node more
    assert (
        tree._repr_html_() == f"<pre>{repr(tree).replace('<', '&lt;').replace('>', '&gt;')}</pre>"
    )
    model = Factorization(tree, 2, 2)
    text = ET.fromstring(model._repr_html_())
    assert text.tag == "pre" and text.text == repr(model)
    assert nodes_of(ModeTree.star(MOST_NODES - 1)._repr_html_())


def test_texts_are_unchanged():
    tree = ModeTree([[0, 1], 2])
    assert repr(tree) == "ModeTree([[0, 1], 2])" and str(tree) == tree.text()
    model = Factorization(tree, 2, 2)
    assert repr(model).startswith("Factorization(\n  ModeTree([[0, 1], 2]), sizes=(2, 2, 2),\n")
    for text_only in (plan(model), Trajectory()):
        assert not hasattr(text_only, "_repr_html_")


def test_no_drawing_library_is_loaded():
    script = (
        "import sys, tnreg; tree = tnreg.ModeTree.binary(4); tree._repr_html_(); "
        "tnreg.Factorization(tree, 2, 2)._repr_html_(); print('matplotlib' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
