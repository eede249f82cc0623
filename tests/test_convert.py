"""Conversions against what the other libraries make of the same arrays, and back."""

import sys
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import tensornetwork
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses

import tnreg
from tnreg import Factorization, ModeTree, OptionError, ShapeError, TreeError, convert, network

tensorly = pytest.importorskip("tensorly")
decomposition, qtn = pytest.importorskip("tensorly.decomposition"), pytest.importorskip("quimb.tensor")

SIZES = (4, 5, 3, 6)
HTF = zoo.model_of(ModeTree.binary(4))
KINDS = {
    "cp": (
        lambda x: decomposition.parafac(x, 3, init="random", random_state=0, n_iter_max=5),
        tensorly.cp_to_tensor,
    ),
    "tucker": (
        lambda x: decomposition.tucker(x, (2, 3, 2, 4), init="random", random_state=0),
        tensorly.tucker_to_tensor,
    ),
    "tensor train": (lambda x: decomposition.tensor_train(x, (1, 3, 4, 2, 1)), tensorly.tt_to_tensor),
}


@pytest.fixture(autouse=True)
def numpy_backend():
    tensorly.set_backend("numpy")


def random(sizes=SIZES):
    return np.random.default_rng(0).standard_normal(sizes)


def values(model):
    return model.to_tensor().detach()


@pytest.mark.parametrize("kind", KINDS)
def test_from_tensorly_and_back(kind):
    make, dense = KINDS[kind]
    theirs = make(random())
    model = convert.from_tensorly(theirs)
    again = convert.to_tensorly(model)
    assert type(again) is type(theirs)
    for tensor in (values(model).numpy(), dense(again)):
        assert np.allclose(tensor, dense(theirs), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_to_tensorly_from_ours(dtype):
    star, train = ModeTree.star(4), ModeTree.caterpillar(4)
    for tree, join, root, dense in (
        (star, "diagonal", "trained", tensorly.cp_to_tensor),
        (star, "diagonal", "ones", tensorly.cp_to_tensor),
        (star, "full", "trained", tensorly.tucker_to_tensor),
        (train, "full", "trained", tensorly.tt_to_tensor),
    ):
        model = zoo.model_of(tree, join, root=root, dtype=dtype)
        theirs, ours = convert.to_tensorly(model), values(model)
        assert dense(theirs).dtype == ours.numpy().dtype
        assert np.allclose(dense(theirs), ours, atol=1e-5)
        assert torch.allclose(values(convert.from_tensorly(theirs)), ours, atol=1e-5)


def test_torch_backend_of_tensorly():
    tensorly.set_backend("pytorch")
    model = zoo.model_of(ModeTree.star(3), "full")
    theirs = convert.to_tensorly(model)
    assert isinstance(theirs.core, torch.Tensor)
    assert torch.allclose(tensorly.tucker_to_tensor(theirs), values(model))


def test_a_decomposition_leaves_as_a_tensor_train():
    x = torch.from_numpy(random())
    cores = convert.to_tensor_train(tnreg.decompose(x, ModeTree.caterpillar(4), rtol=1e-12))
    assert tuple(core.shape[1] for core in cores) == SIZES
    assert torch.allclose(torch.einsum("xay,ybz,zcu,udv->abcd", *cores), x, atol=1e-10)
    assert torch.allclose(convert.from_tensor_train(cores).to_tensor(), x, atol=1e-10)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_a_train_is_its_cores_everywhere(dtype):
    """tensorly, tnreg, quimb, tnreg, tensornetwork, tnreg, cores: the same numbers, bit for bit."""
    from tensorly.tt_tensor import TTTensor

    shapes = [(1, 4, 3), (3, 5, 2), (2, 3, 6), (6, 6, 1)]
    cores = [random(shape).astype(dtype) for shape in shapes]
    model = convert.from_tensorly(TTTensor(cores))
    assert count(model) == sum(core.size for core in cores)
    assert set(model.network.joins) == {"leaf", "bare", "full"} and not model.network.joins.count("bare") - 3
    state = qtn.MatrixProductState([cores[0][0], *cores[1:3], cores[3][..., 0]], shape="lpr")
    net = convert.to_quimb(model)
    assert net.num_tensors == 4 and sum(tensor.size for tensor in net) == count(model)
    for again in (
        convert.from_quimb(net), convert.from_nodes(network(model)), convert.from_quimb(state),
        convert.from_tensorly(convert.to_tensorly(model)), convert.from_tensor_train(cores),
    ):  # fmt: skip
        assert_same_model(again, model)
        assert all(map(np.array_equal, convert.to_tensor_train(again), cores))


def test_stars_and_trains_of_other_leaves():
    """Identities stand where a format needs a matrix, and leaves with weights are multiplied into cores."""
    for tree, join, back, to in (
        (ModeTree.star(3), "full", convert.from_tucker, convert.to_tucker),
        (ModeTree.star(3), "diagonal", convert.from_cp, convert.to_cp),
    ):
        model = zoo.bare_model(tree, join, {1: "bare"})
        top, factors = to(model)
        assert torch.equal(factors[1], torch.eye(model.sizes[1]).double())
        zoo.assert_close(back(top, factors).to_tensor(), values(model))
    for kinds in ({}, {0: "bare"}, {0: "bare", 2: "bare"}, dict.fromkeys(range(4), "bare")):
        model = zoo.bare_model(ModeTree.caterpillar(4), "full", kinds)
        cores = convert.to_tensor_train(model)
        assert [core.shape[1] for core in cores] == list(model.sizes)
        zoo.assert_close(convert.from_tensor_train(cores).to_tensor(), values(model))


def test_lists_and_numpy_arrays():
    model = convert.from_cp([1.0, 2.0], [np.eye(2), [[1.0, 0.0], [0.0, 3.0]]])
    assert torch.equal(values(model), torch.tensor([[1.0, 0], [0, 6]]).double())
    ones = convert.from_cp(None, [np.eye(2), np.eye(2)])
    assert ones.network.root_ones and torch.equal(convert.to_cp(ones)[0], torch.ones(2).double())
    assert convert.from_tucker(np.eye(2), [np.eye(3)[:, :2], np.eye(2)]).sizes == (3, 2)


def test_what_comes_out_is_a_copy():
    star, train = zoo.model_of(ModeTree.star(3)), zoo.model_of(ModeTree.caterpillar(3), "full")
    before = values(star), values(train)
    weights, factors = convert.to_cp(star)
    for tensor in (weights, factors[0], convert.to_tensor_train(train)[0]):
        tensor.zero_()
    assert torch.equal(values(star), before[0]) and torch.equal(values(train), before[1])


def assert_same_model(found, model):
    assert found.network == model.network and found.dtype == model.dtype
    assert all(map(torch.equal, found.weights.values(), model.weights.values()))


@pytest.mark.parametrize("model", list(zoo.zoo(bare=True)))
def test_networks_come_back(model):
    """Tree, joins, roots and names: bit for bit, in any order of the nodes."""
    net = convert.to_quimb(model)
    order = [f"mode {n}" for n in range(model.tree.order)]
    dense = net.contract(output_inds=order, preserve_tensor=True).data
    assert torch.allclose(dense, model.to_tensor(), rtol=1e-12, atol=1e-12)
    assert_same_model(convert.from_quimb(net), model)
    net.apply_to_arrays(lambda x: x.detach().numpy())
    assert_same_model(convert.from_quimb(net), model)
    nodes = network(model)
    if model.tree.root == "top" and model.network.root_ones:  # no node has this name
        names = {"top": (0, 1, 2)}
        graph = nx.relabel_nodes(nx.DiGraph(model.tree.graph), names)
        weights = {names.get(v, v): w for v, w in model.weights.items()}
        leaves = model.network.named_leaves
        model = Factorization.from_weights(ModeTree(graph), weights, join="diagonal", leaves=leaves)
    for nodes_in_order in (nodes, sorted(nodes, key=lambda node: node.name)):
        assert_same_model(convert.from_nodes(nodes_in_order), model)


@settings(max_examples=25, deadline=None)
@given(model=st.one_of(zoo.models(), zoo.models(torch.complex64), zoo.models(bare=True)))
def test_random_models_there_and_back(model):
    assert_same_model(convert.from_nodes(network(model)), model)
    assert_same_model(convert.from_quimb(convert.to_quimb(model)), model)


def test_names_of_quimb():
    model = zoo.model_of(ModeTree([[0, 1], 2]), {(0, 1): "diagonal", (0, 1, 2): "full"})
    net = convert.to_quimb(model)
    assert set(net.outer_inds()) == {"mode 0", "mode 1", "mode 2"}
    assert net.ind_sizes()["bond (0, 1)"] == model.network.bonds[2]
    assert net["(0, 1)"].inds == ("bond (0, 1) inside", "bond (0, 1)")
    assert set(net["(0, 1, 2)"].tags) == {"(0, 1, 2)", "full", "root"}
    assert "leaf" in net["2"].tags
    ones = convert.to_quimb(zoo.model_of(ModeTree.star(3), root="ones"))
    assert ones.num_tensors == 3 and ones["0"].inds == ("mode 0", "ones (0, 1, 2)")
    net["0"].data.sum().backward()  # the model's own weights
    assert torch.equal(model.gradients[0], torch.ones(model.weights[0].shape).double())


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_matrix_product_states_of_quimb(dtype):
    state = qtn.MPS_rand_state(5, 3, phys_dim=2, dtype=dtype, seed=0)
    model = convert.from_quimb(state)
    assert model.tree == ModeTree.caterpillar(5)
    dense = state.contract(output_inds=[f"k{n}" for n in range(5)]).data
    assert np.allclose(values(model), dense, atol=1e-14)
    cores = [core.numpy() for core in convert.to_tensor_train(model)]
    cores[0], cores[-1] = cores[0][0], cores[-1][..., 0]
    again = qtn.MatrixProductState(cores, shape="lpr")
    assert abs(again.H @ state - state.H @ state) < 1e-13
    state.exponent = 2.0
    assert np.allclose(values(convert.from_quimb(state)), 100 * dense, atol=1e-11)


def test_cp_of_quimb():
    factors = [qtn.Tensor(random((3, 4)), ("r", mode)) for mode in "xyz"]
    weights = qtn.Tensor(np.array([1.0, 2.0, 3.0]), ("r",))
    ones, model = (
        convert.from_quimb(qtn.TensorNetwork(parts), modes="xyz") for parts in (factors, [weights, *factors])
    )
    assert ones.network.root_ones and ones.tree == ModeTree.star(3)
    assert torch.equal(model.weights[model.tree.root], torch.tensor([1.0, 2, 3]).double())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_networks_of_quimb(data):
    """Indices of many tensors, also outer ones; tensors without modes; numbers; any root."""
    draw, size = data.draw, data.draw(st.integers(1, 3))
    wires, bonds = [["a"]], []
    for k in range(draw(st.integers(0, 4))):
        if not bonds or draw(st.booleans()):
            bonds.append("bcde"[k])
            wires[draw(st.integers(0, k))].append(bonds[-1])
        wires.append([draw(st.sampled_from(bonds)), *"zyxw"[k][: draw(st.integers(0, 1))]])
    root = draw(st.sampled_from([None, *(f"T{k}" for k, axes in enumerate(wires) if axes[1:])]))
    wires += [[]] * draw(st.booleans())
    ends = [m for axes in wires for m in axes]
    shared = [m for m in bonds if ends.count(m) > 1]
    modes = draw(st.permutations(sorted({*ends} - {*shared}) + shared[: draw(st.integers(0, 1))]))
    arrays = [random([size] * len(axes)) for axes in wires]
    net = qtn.TensorNetwork([
        qtn.Tensor(x, axes, [f"T{k}"])
        for k, (x, axes) in enumerate(zip(arrays, wires, strict=True))
    ])  # fmt: skip
    exact = np.einsum(",".join(map("".join, wires)) + "->" + "".join(modes), *arrays)
    model = convert.from_quimb(net, modes=modes, root=root)
    assert np.allclose(values(model), exact, rtol=1e-10, atol=1e-10)


def wired(shapes, bonds=None, dtype=np.float64):
    """Nodes of random arrays, hubs as copies: strings dangle, equal numbers are wired."""
    generator, bonds = np.random.default_rng(1), bonds or {}
    ends, nodes = {}, {}
    for name, axes in shapes.items():
        sizes = [bonds.get(a, 2) for a in axes]
        if "hub" in name:
            node = tensornetwork.CopyNode(len(axes), sizes[0], name=name, backend="numpy")
        else:
            x = generator.standard_normal(sizes).astype(dtype)
            x = x * (1 + 1j * x) if np.iscomplexobj(x) else x
            node = tensornetwork.Node(x, name=name, backend="numpy")
        nodes[name] = node
        for axis, a in zip(node.edges, axes, strict=True):
            ends.setdefault(a, []).append(axis)
    for a, edges in ends.items():
        if isinstance(a, str):
            edges[0].set_name(a)
        else:
            tensornetwork.connect(*edges)
    return nodes


WIRINGS = {
    "train": ({"A": ["mode 0", 1], "B": [1, "mode 1", 2], "C": [2, "mode 2"]}, ModeTree.caterpillar(3)),
    "tucker": ({"K": [1, 2, 3], "U": ["mode 0", 1], "V": ["mode 1", 2], "W": [3, "mode 2"]},
        ModeTree.star(3)),
    "binary": (
        {"A": ["mode 2", 1], "B": ["mode 0", 2], "C": [5, 1, 2], "D": ["mode 1", 3],
         "E": ["mode 3", 4], "F": [3, 4, 6], "top": [6, 5]}, ModeTree([[1, 3], [2, 0]]),
    ),
    "several modes": ({"A": ["mode 0", "mode 1", 1], "B": [1, "mode 3", "mode 2"]}, ModeTree([[0, 1], 3, 2])),
    "one node": ({"A": ["mode 1", "mode 0"]}, ModeTree([1, 0])),
    "one vector": ({"A": ["mode 0"]}, ModeTree([0])),
    "ends without modes": (
        {"A": [1], "B": [1, 2, "mode 0"], "C": [2, 3], "D": [3, "mode 1", 4], "E": [4]}, ModeTree([0, 1]),
    ),
    "a number beside": ({"A": ["mode 0", 1], "B": [1, "mode 1"], "C": []}, ModeTree.caterpillar(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", WIRINGS)
@pytest.mark.parametrize("dtype", [np.float64, np.complex128, np.float32])
def test_trees_wired_by_hand(name, dtype):
    shapes, tree = WIRINGS[name]
    sizes = {"mode 0": 3, "mode 1": 4, "mode 2": 5, 1: 3, 2: 4, 3: 2, 4: 5, 5: 3, 6: 4}
    nodes = list(wired(shapes, sizes, dtype).values())
    model, exact = convert.from_nodes(nodes), zoo.contracted(nodes)
    assert model.tree == tree and set(model.network.named_joins.values()) == {"full"}
    assert sum(p.numel() for p in model.parameters()) <= sum(node.tensor.size for node in nodes)
    assert model.dtype == exact.dtype
    single = dtype == np.float32
    assert torch.allclose(values(model), exact, rtol=1e-5 if single else 1e-12, atol=1e-5)
    for root in {node.name for node in nodes if len(node.edges) > 1}:
        turned = values(convert.from_nodes(nodes, root=root))
        assert torch.allclose(turned, exact, rtol=1e-5, atol=1e-4 if single else 1e-11)


def test_modes_by_edges_and_names():
    shapes = {"A": ["left", 1], "B": [1, "middle", 2], "C": [2, "right"]}
    nodes = wired(shapes, {"left": 3, "right": 5})
    exact = np.einsum("lb,bmc,cr->rlm", *(nodes[k].tensor for k in "ABC"))
    for modes in ([nodes["C"][1], nodes["A"][0], nodes["B"][1]], ["right", "left", "middle"]):
        assert np.allclose(values(convert.from_nodes(nodes.values(), modes=modes)), exact)


def test_copy_nodes_wired_by_hand():
    """CP with weights; copies of copies; a dangling edge of a copy; a copy that only sums."""
    shapes = {"A": ["mode 0", 1], "B": ["mode 1", 2], "C": ["mode 2", 4], "D": ["mode 3", 6]}
    shapes |= {"hub": [1, 2, 3], "hub 1": [3, 4, 5], "hub 2": [5, 6, "mode 4"]}
    sizes = {"mode 0": 4, "mode 1": 5, "mode 3": 6, **dict.fromkeys(range(1, 7), 3)}
    nodes = wired(shapes, sizes)
    model = convert.from_nodes(nodes.values())
    exact = np.einsum("ar,br,cr,dr->abcdr", *(nodes[k].tensor for k in "ABCD"))
    assert model.network.root_ones and np.allclose(values(model), exact)
    summed = wired({"A": ["mode 0", 1], "hub": [1]}, sizes)
    model = convert.from_nodes(summed.values())
    assert np.allclose(values(model), summed["A"].tensor.sum(1))


@pytest.mark.slow
def test_a_long_chain_of_nodes():
    """More nodes than Python recurses."""
    model = zoo.model_of(ModeTree.caterpillar(1030), "full", sizes=2, bonds=1, std=1.0)
    assert_same_model(convert.from_quimb(convert.to_quimb(model)), model)


def only_dlpack(x):
    """An array of a library that knows nothing of numpy."""
    return SimpleNamespace(__dlpack__=x.__dlpack__, __dlpack_device__=x.__dlpack_device__)


def only_array(x):
    """An object that only numpy can read."""
    return SimpleNamespace(__array__=lambda dtype=None, copy=None: np.array(x, dtype=dtype))


def read_only(x):
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize(
    "kind", [np.asarray, torch.from_numpy, only_dlpack, only_array, read_only, np.ndarray.tolist]
)
def test_arrays_of_any_kind(kind, dtype):
    i = 1j if np.issubdtype(dtype, np.complexfloating) else 0
    arrays = [(random((n, 3)) + i * n).astype(dtype) for n in (4, 5)]
    model = convert.from_cp(None, [kind(x) for x in arrays])
    dense = values(model)
    assert np.allclose(dense, arrays[0] @ arrays[1].T, atol=1e-5)
    assert kind is np.ndarray.tolist or dense.numpy().dtype == dtype
    # and out again: the same memory, so the same bits
    weight = model.weights[0].detach()
    for out in map(np.asarray, (weight, np.from_dlpack(weight), torch.from_dlpack(weight))):
        assert np.array_equal(out, arrays[0]) and out.ctypes.data == weight.data_ptr()


def nodes_of(**shapes):
    return list(wired(shapes).values())


def looped():
    return nodes_of(A=["mode 0", 1, 2], B=[1, 3, "mode 1"], C=[2, 3, "mode 2"])


def named(*names):
    return nodes_of(A=[names[0], 1], B=[1, *names[1:]])


LOOP, TOLD = "the network has a loop through ", "cannot be told from their names"
DANGLES, STATE = "everything that dangles once", qtn.MPS_rand_state(3, 2, seed=0)


test_nodes_that_are_no_tree = refuses([
    (looped, {}, TreeError, f"from_nodes: {LOOP}'[ABC]'"),
    (lambda: nodes_of(A=["mode 0", 1, 2], B=[1, 2, "mode 1"]), {}, TreeError,
     f"{LOOP}'[AB]'.*\n.*flatten edges that run in parallel"),
    (lambda: nodes_of(A=["mode 0", 1, 1]), {}, TreeError, f"{LOOP}'A'"),
    (lambda: nodes_of(A=["mode 0", 1, 2], hub=[1, 2]), {}, TreeError, f"{LOOP}'A'"),
    (lambda: nodes_of(A=["mode 0", "mode 1"], hub_0=[1, 2], hub_1=[1, 2]), {}, TreeError,
     f"{LOOP}'hub_[01]'"),
    (lambda: nodes_of(A=["mode 0", 1], B=[1, "mode 1"], C=["mode 2"]), {}, TreeError, "not connected"),
    (lambda: looped()[:2], {}, ShapeError, "'[AB]' is wired to 'C', which is not given"),
    (lambda: named("mode 0", "mode 2"), {}, ShapeError, f"(?s){TOLD}.*'mode 2'.*'mode 1'"),
    (lambda: named("mode 0", "mode 0"), {}, ShapeError, TOLD),
    (lambda: named("mode 0", "site 1"), {}, ShapeError, TOLD),
    (lambda: named("a", "b"), {}, ShapeError, "or give modes="),
    (lambda: named("a", "b"), {"modes": ["a"]}, ShapeError, DANGLES),
    (lambda: named("a", "b"), {"modes": ["a", "a"]}, ShapeError, DANGLES),
    (lambda: named("a", "b"), {"modes": ["a", "c"]}, ShapeError, DANGLES),
    (lambda: named("mode 0", "mode 1"), {"root": "Z"}, TreeError, "0 are called 'Z'"),
    (lambda: nodes_of(A=[1], B=[1]), {}, ShapeError, "has no modes"),
    (list, {}, ShapeError, "has no modes"),
], by=lambda nodes, options: convert.from_nodes(nodes(), **options))  # fmt: skip


test_refuses = refuses([
    (lambda: convert.from_quimb(3), OptionError, "expected a TensorNetwork, found int"),
    (lambda: convert.from_quimb(STATE, modes=["k0", "k1"]), ShapeError, DANGLES),
    (lambda: convert.from_quimb(STATE, root="top"), TreeError, "0 are called 'top'"),
    (lambda: convert.from_quimb(qtn.MPO_rand(3, 2, seed=0)), ShapeError, TOLD),
    (lambda: convert.from_quimb(qtn.MPS_rand_state(4, 2, cyclic=True, seed=0)), TreeError,
     f"from_quimb: {LOOP}'I"),
    (lambda: convert.to_cp(HTF), OptionError, "CP is a star with diagonal"),
    (lambda: convert.to_tucker(HTF), OptionError, "Tucker is a star with full"),
    (lambda: convert.to_tensor_train(HTF), OptionError, "a caterpillar"),
    (lambda: convert.to_tensorly(HTF), OptionError, "none of them"),
    (lambda: convert.from_tensorly(3), OptionError, "found int"),
    (lambda: convert.from_cp(None, [np.ones(3)]), ShapeError, r"factor 0 needs 2 axes, found shape \(3,\)"),
    (lambda: convert.from_tucker(np.ones((2, 2)), [np.ones((3, 2))]), ShapeError, "the core needs 1 axes"),
    (lambda: convert.from_tensor_train([np.ones((2, 3, 1))]), ShapeError, "starts and ends with a bond of 1"),
    (lambda: convert.from_tensor_train([np.ones((1, 3, 1))]), ShapeError, "of one core has no joins"),
    (lambda: convert.from_tensor_train([np.ones((1, 3, 2)), np.ones((3, 3, 1))]), ShapeError,
     "another shape"),
])  # fmt: skip


def test_without_quimb(monkeypatch):
    monkeypatch.setitem(sys.modules, "quimb.tensor", None)
    with pytest.raises(OptionError, match="quimb is missing: pip install 'tnreg.quimb.'"):
        convert.to_quimb(HTF)
