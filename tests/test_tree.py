"""Mode trees: families, names, text, files, and every refusal."""

import copy
import json
import pickle

import networkx as nx
import pytest
import zoo
from hypothesis import given, settings
from refusals import refuses

from tnreg import Factorization, FileError, ModeTree, TreeError, gallery, load, load_tree
from tnreg.trees.tree import read_tree, tree_from_json, tree_to_json


def test_grids_know_their_shape(tmp_path):
    tree = ModeTree.grid((3, 5))
    assert tree.shape == (3, 5) and ModeTree(tree).shape == (3, 5)
    assert ModeTree.binary(4).shape is None and ModeTree.binary(4) == ModeTree.grid((1, 4), (1, 2))
    tree.save(tmp_path / "t.json")
    assert load_tree(tmp_path / "t.json").shape == (3, 5)
    assert pickle.loads(pickle.dumps(tree)).shape == (3, 5)


@given(zoo.trees())
@settings(max_examples=80, deadline=None)
def test_structure(tree):
    """Children come first; every node but the root lies below one edge, both of a binary root's."""
    seen = set()
    for node in tree.nodes:
        children = tree.children(node)
        assert set(children) <= seen and all(tree.parent(c) == node for c in children)
        below = sorted(m for c in children for m in tree.modes_below(c)) or [node]
        assert tree.modes_below(node) == tuple(below)
        seen.add(node)
    assert tree.nodes[-1] == tree.root and tree.parent(tree.root) is None
    assert tree.leaves == tree.modes_below(tree.root) == tuple(range(tree.order))
    assert tree.interior == tuple(node for node in tree.nodes if tree.children(node))
    assert nx.is_arborescence(tree.graph)
    assert sorted(i for cut in tree.cuts for i in cut) == list(range(len(tree.nodes) - 1))
    pairs = [cut for cut in tree.cuts if len(cut) > 1]
    assert pairs == [links for links in tree.links[-1:] if len(links) == 2]
    assert list(tree.cuts) == sorted(tree.cuts, key=max)


def test_names():
    tree = ModeTree([[0, 1], [2, 3]])
    assert tree.nodes == (0, 1, (0, 1), 2, 3, (2, 3), (0, 1, 2, 3))
    assert tree.children(tree.root) == ((0, 1), (2, 3)) and tree.modes_below((0, 1)) == (0, 1)
    assert ModeTree([[0], [[1]]]).nodes == (0, (0,), 1, (1,), ((1,),), (0, 1))


def test_graph_is_frozen_and_keeps_names_and_order():
    graph = nx.DiGraph([("root", "b"), ("root", 0), ("b", 2), ("b", 1)])
    tree = ModeTree(graph)
    assert tree.children("root") == ("b", 0) and tree.children("b") == (2, 1)
    with pytest.raises(nx.NetworkXError):
        tree.graph.add_edge("root", 9)
    graph.add_edge("root", 3)
    assert tree.order == 3
    assert ModeTree(tree.graph) == tree


FAMILIES = [
    (ModeTree.star(3), [0, 1, 2]),
    (ModeTree.binary(4), [[0, 1], [2, 3]]),
    (ModeTree.binary(5), [[[0, 1], [2, 3]], 4]),
    (ModeTree.regular(9, 3), [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
    (ModeTree.regular(7, 3), [[0, 1, 2], [3, 4, 5], 6]),
    (ModeTree.caterpillar(4), [[[0, 1], 2], 3]),
    (ModeTree.chain(2), [0, 1]),
    (ModeTree.chain(3), [[0], 1]),
    (ModeTree.chain(5), [[[0]], [1]]),
    (ModeTree.half(4), [[0, 2], [1, 3]]),
    (ModeTree.half(8), [[[0, 4], [2, 6]], [[1, 5], [3, 7]]]),
    (ModeTree.half(6), [[[0, 3], [2, 5]], [1, 4]]),
    (ModeTree.grid((2, 4)), [[0, 1, 4, 5], [2, 3, 6, 7]]),
    (ModeTree.grid((4, 4), window=(2, 4)), [list(range(8)), list(range(8, 16))]),
    (ModeTree.grid((3, 3)), [[0, 1, 3, 4], [2, 5], [6, 7], 8]),
    (ModeTree.grid((2, 2), window=(2, 1)), [[0, 2], [1, 3]]),
    (ModeTree.grid((1, 1)), [0]),
    *((family(1), [0]) for family in (ModeTree.star, ModeTree.binary, ModeTree.caterpillar, ModeTree.half)),
]  # fmt: skip


def test_families():
    for tree, nested in FAMILIES:
        assert tree == ModeTree(nested)
    for depth in (2, 3, 4, 7):  # a weight for each factor
        assert len(ModeTree.chain(depth).nodes) - 1 == depth


def test_quad_tree_windows_hold_neighbours():
    tree = ModeTree.grid((8, 8))
    for node in tree.interior:
        modes = tree.modes_below(node)
        rows, columns = {m // 8 for m in modes}, {m % 8 for m in modes}
        assert len(rows) == len(columns) == max(rows) - min(rows) + 1
        assert len(modes) == len(rows) * len(columns)


def test_equality_and_hash():
    a = ModeTree([[0, 1], [2, 3]])
    assert len({a, ModeTree(((0, 1), (2, 3))), ModeTree(a)}) == 1
    assert a != ModeTree([[1, 0], [2, 3]])  # full joins lay out weights by the order of children
    assert a != ModeTree([[0, 2], [1, 3]]) and a != "tree"
    named = zoo.TREES["named"]
    for copied in (pickle.loads(pickle.dumps(named)), copy.deepcopy(named)):
        assert copied == named and copied.children("left") == named.children("left")


def test_repr_and_text():
    for tree in (ModeTree.binary(5), ModeTree.chain(4), ModeTree.half(8)):
        assert eval(repr(tree), {"ModeTree": ModeTree}) == tree
    assert repr(zoo.TREES["named"]) == "ModeTree('top': ['left': [1, 0], 2])"
    assert "order 1024" in repr(ModeTree.binary(1024))
    text = ModeTree([[0, 1], 2]).text(ascii_only=True)
    names = [line.split()[-1] for line in text.splitlines()]
    assert text.isascii() and names == ["2)", "1)", "0", "1", "2"]
    assert str(ModeTree.star(2)).splitlines()[1].endswith("0")
    assert ModeTree.star(2).text(label=lambda v: "same").count("same") == 3


@pytest.mark.parametrize("tree", [*zoo.TREES.values(), ModeTree.caterpillar(400)])
def test_files_keep_trees(tree, tmp_path):
    tree.save(tmp_path / "tree.json")
    assert load_tree(tmp_path / "tree.json") == tree
    assert tree_from_json(json.loads(json.dumps(tree_to_json(tree)))) == tree
    Factorization(tree, 2, 2).save(tmp_path / "model")
    assert load(tmp_path / "model").tree == tree


def test_names_in_files(tmp_path):
    graph = nx.DiGraph([("top", ("level", 1)), ("top", 2), (("level", 1), 0), (("level", 1), 1)])
    tree = ModeTree(graph)
    chain = ModeTree(nx.relabel_nodes(ModeTree.caterpillar(300).graph, {(0, 1): "bottom"}))
    for named in (tree, chain):
        named.save(tmp_path / "a.json")
        assert load_tree(tmp_path / "a.json") == named
    with pytest.raises(TreeError, match="a name that a file cannot hold"):
        ModeTree(nx.relabel_nodes(graph, {"top": frozenset({1})})).save(tmp_path / "c.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_deep_trees_and_chains():
    tree = ModeTree.caterpillar(2000)
    assert tree.order == 2000 and tree.modes_below(tree.parent(1500))[-1] == 1500
    assert hash(tree) == hash(ModeTree.caterpillar(2000)) and "order 2000" in repr(tree)
    assert ModeTree.chain(700) == ModeTree.chain(700)


def test_gallery(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "htf-4").mkdir()  # a folder does not hide the gallery
    trees = {"htf-4": ModeTree.binary(4), "htf-8": ModeTree.binary(8), "half-8": ModeTree.half(8),
             "quad-4x4": ModeTree.grid((4, 4)), "quad-8x8": ModeTree.grid((8, 8)),
             "matrix-deep-3": ModeTree.chain(3), "caterpillar-6": ModeTree.caterpillar(6),
             "across-4": ModeTree([[0, 2], [1, 3]])}  # fmt: skip
    assert {*trees, "star-3", "uneven-5"} <= set(gallery())
    assert {name: load_tree(name) for name in trees} == trees
    assert load_tree("star-3").order == 3 and load_tree("uneven-5").order == 5
    assert read_tree(" [[0, 1], 2]") == ModeTree([[0, 1], 2])


LOOP: list = [0]
LOOP.append(LOOP)


def graph(*edges, nodes=()):
    result = nx.DiGraph(edges)
    result.add_nodes_from(nodes)
    return result


test_refuses_structures = refuses([
    (LOOP, "a list contains itself"),
    (nx.Graph([("r", 0), ("r", 1)]), "undirected"),
    ([], "empty or has an interior node without children"),
    ([0, []], "interior node without children"),
    (3, "not a mode tree: 3"),
    ("01", "expected: nested lists of mode numbers"),
    ([[0, "left"], 2], "leaf 'left' is not a mode number"),
    ([0, True], "leaf True is not a mode number"),
    ([0, 1.0], "leaf 1.0 is not a mode number"),
    ([0, [1, 0]], "mode 0 appears twice"),
    ([[0, 1]] * 2, "mode 0 appears twice"),
    ([0, 2], "mode 1 is missing"),
    ([1, 2], "mode 0 is missing"),
    ([0, -1], "mode 1 is missing"),
    (graph(), "the graph is empty"),
    (graph(nodes=[0]), "has the single node 0"),
    (graph(("r", 0), nodes=["s"]), "2 roots"),
    (graph(("a", 0), ("b", 1)), r"2 roots, \['a', 'b'\]"),
    (graph(("r", "a"), ("r", 1), ("a", 0), ("r", 0)), "node 0 has more than one parent"),
    (graph(("a", "b"), ("b", "a")), "no root, every node has a parent"),
    (graph(("r", 0), ("a", "b"), ("b", "a")), "cannot be reached from the root 'r'"),
    (graph(("r", "left"), ("r", 2), ("r", 3)), "leaf 'left' is not a mode number"),
    (graph(("r", "left"), ("r", 0)), r"add_edges_from\(\[\('left', 0\), \('left', 1\)\]\)"),
    (graph(("r", 0), ("r", 1), (1, 2)), "interior node 1 is named like a mode"),
    (graph(("r", 0), ("r", 2)), "mode 1 is missing"),
], by=ModeTree, error=TreeError)  # fmt: skip


def test_refuses_arguments_and_unknown_nodes():
    for make, message in (
        (lambda: ModeTree.star(0), "n must be an integer >= 1"),
        (lambda: ModeTree.binary(2.5), "n must be an integer"),
        (lambda: ModeTree.regular(4, 1), "arity must be an integer >= 2"),
        (lambda: ModeTree.chain(1), "depth must be an integer >= 2"),
        (lambda: ModeTree.half(True), "n must be an integer"),
        (lambda: ModeTree.grid((0, 3)), "height must be an integer >= 1"),
        (lambda: ModeTree.grid((3, 3), window=(1, 1)), "joins nothing"),
        (lambda: ModeTree.grid(4), r"needs a shape \(height, width\)"),
        (lambda: ModeTree([0], shape=(2, 3)), "an image of 2 x 3 has 6 pixels, the tree 1 mode"),
        (lambda: ModeTree([0, 1, 2, 3], shape=4), r"shape must be \(height, width\), found 4"),
    ):
        with pytest.raises(TreeError, match=message):
            make()
    tree = ModeTree.star(2)
    for ask in (tree.children, tree.parent, tree.modes_below):
        with pytest.raises(TreeError, match=r"'x' in this tree.\n  its nodes: 0, 1, \(0, 1\)"):
            ask("x")
        with pytest.raises(TreeError, match="no node"):
            ask([0, 1])


def test_refuses_files(tmp_path):
    path = tmp_path / "tree.json"
    for content, message in (
        ("{", "not a readable JSON tree file"),
        ('{"leaves": 3}', "without the key 'tree'"),
        ('"x"', "without the key 'tree'"),
        ('{"tree": {"links": 3}}', "not a tree"),
        ('{"tree": {"links": [0, 1, [7]]}}', "not a tree"),
        ('{"tree": {"name": "x"}}', "not a tree"),
        ('{"tree": [0, 2]}', r"mode 1 is missing[\s\S]*file: .*tree\.json"),
    ):
        path.write_text(content)
        with pytest.raises(TreeError if "mode" in message else FileError, match=message):
            load_tree(path)
    with pytest.raises(FileError, match="no tree named 'htf-5' in the gallery"):
        load_tree("htf-5")
    with pytest.raises(FileError, match="no such tree file"):
        load_tree(tmp_path / "none.json")


class Name(str):
    """A name that counts how often it is hashed: names of large nodes are long tuples, which takes time."""

    hashed = 0

    def __hash__(self):
        Name.hashed += 1
        return super().__hash__()


def test_names_are_hashed_a_few_times_only(tmp_path, monkeypatch):
    graph = nx.DiGraph([(Name("all"), mode) for mode in range(500)])
    Name.hashed = 0
    tree = ModeTree(graph)
    assert tree.nodes[-1] == "all" and Name.hashed < 50
    star = ModeTree.star(500)
    for saved in (star, tree):
        saved.save(tmp_path / "tree.json")
        with monkeypatch.context() as patch:  # a graph hashes the name of a parent for each of its children
            patch.setattr("tnreg.trees.tree._graph_of", None)
            assert load_tree(tmp_path / "tree.json") == saved == pickle.loads(pickle.dumps(saved))
