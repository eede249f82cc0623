"""Factorizations as convolutional networks: equal values, equal gradients, and the way back."""

import copy
import math
import pickle

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from refusals import refuses
from torch.nn.utils import prune
from zoo import assert_close, randn

from tnreg import ConvNet, Factorization, ModeTree, from_cnn, spectra, to_cnn
from tnreg.cnns.pooling import scaled_product
from tnreg.errors import DataError, OptionError, ShapeError, TreeError

F64 = torch.float64
GRIDS = [(2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (3, 5), (6, 4), (7, 7)]
WINDOWS = [(2, 2), (4, 4), (2, 4)]


def random_net(tree, *arguments, **options):
    options = {"std": 0.7, "dtype": F64, "generator": zoo.random(3), **options}
    return ConvNet(tree, *(arguments or (3, 4)), **options)


def by_class(model, x):
    """Values of a model whose last mode is five classes."""
    inputs, one_hot = x.unbind(2), torch.eye(5, dtype=F64)
    return torch.stack([model([*inputs, row.expand(len(x), 5)]) for row in one_hot], 1)


def check_equal(model, net, features, images=None):
    """Values, gradients node by node, and the weights on the way back."""
    inputs = features if images is None else images
    assert_close(net(inputs), model(features))
    for module, x in ((model, features), (net, inputs)):
        module.zero_grad()
        module(x).abs().square().sum().backward()
    for layer in range(net.depth):
        nodes = [node for node in net.nodes_of(layer) if node in model.gradients]
        for node in nodes:  # with shared filters the sum over a layer
            total = sum(model.gradients[v] for v in (nodes if net.share else [node]))
            assert_close(net.gradients[node], total, 1e-11)
    back = from_cnn(net)
    assert back.network == model.network and all(map(torch.equal, back.stacks, model.stacks))


def check_network(model):
    for scaled in (False, True):
        features = zoo.random_features(model.sizes, 5, model.dtype)
        check_equal(model, to_cnn(model, scaled=scaled), features)


@pytest.mark.parametrize("model", list(zoo.zoo(bare=True)))
def test_network_is_the_factorization(model):
    check_network(model)


@pytest.mark.slow
@given(zoo.models(bare=True))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_network_is_the_factorization_random(model):
    check_network(model)


@pytest.mark.slow
@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("share", [False, True])
def test_grids(shape, window, share):
    """Images as (B, D, H, W), as (B, D, N) and as N tensors; ragged edges as well."""
    images = randn(4, 3, *shape)
    features = images.flatten(2).mT
    for scaled in (False, True):
        net = random_net(ModeTree.grid(shape, window), share=share, scaled=scaled)
        assert not share or len(net.convs) == net.depth
        assert not share or all(isinstance(c, torch.nn.Conv2d) for c in net.convs.values())
        model = from_cnn(net)
        check_equal(model, net, features, images)
        check_equal(model, to_cnn(model, share=share, scaled=scaled), features, images)
        assert torch.equal(net(images), net(images.flatten(2)))
        assert_close(net(list(features.unbind(1))), net(images))
        assert net.shape == shape
        complete = all(n in (2, 4, 8) for n in shape)
        assert ("pooling 2x" in repr(net) or "pooling 4x" in repr(net)) == complete
    with pytest.raises(ShapeError, match=rf"or \(B, 3, {shape[0]}, {shape[1]}\)"):
        net(images.reshape(4, 3, 1, -1))


@pytest.mark.parametrize("make", ["binary 8", "half 8", "star 5", "binary 7", "caterpillar 5"])
@pytest.mark.parametrize("join", ["diagonal", "full"])
@pytest.mark.parametrize("leaves", ["weights", "bare"])
def test_shared_filters_on_sequences(make, join, leaves):
    shape, order = make.split()
    net = random_net(getattr(ModeTree, shape)(int(order)), 3, 3, join=join, share=True, leaves=leaves)
    assert ("1x1 convolution, shared" in repr(net).split("\n")[1]) == (leaves == "weights")
    x = randn(6, 3, int(order))
    assert_close(net(x), from_cnn(net)(x.mT))
    assert_close(net(list(x.unbind(2))), net(x))


@pytest.mark.parametrize("join", ["diagonal", "full"])
def test_bare_leaves_are_not_convolved(join):
    """Images as one map through shared filters, several outputs, and bare classes."""
    grid, images = ModeTree.grid((4, 4)), randn(5, 3, 4, 4)
    net = random_net(grid, 3, 3, join=join, leaves="bare", share=True, outputs=4)
    local = ConvNet.holding(net.network, net.weights, outputs=4)
    assert net.nodes_of(0)[0] not in net.weights and "layer0" not in net.convs
    assert_close(net(images), local(images))
    model = from_cnn(net)
    assert model.network.bare and 16 in model.weights
    assert_close(to_cnn(model, classes=True)(images), net(images))
    tree = ModeTree([[0, 1], 2])
    model = zoo.model_of(tree, join, sizes=(3, 3, 5), bonds=5, leaves={0: "bare", 1: "bare", 2: "bare"})
    x = randn(6, 3, 2)
    assert_close(to_cnn(model, classes=True)(x), by_class(model, x))


def test_conserved_quantity_of_shared_filters():
    """Gradient flow conserves p |row|² - |column|² for filters shared over the p nodes of a window."""
    net = random_net(ModeTree.grid((4, 4)), share=True)
    (net(randn(9, 3, 4, 4)) - 1).square().mean().backward()
    for layer in range(1, net.depth):
        child, node = net.nodes_of(layer - 1)[0], net.nodes_of(layer)[0]
        columns = (net.weights[child] * net.gradients[child]).sum(0).detach()
        own = (net.weights[node] * net.gradients[node]).detach()
        rows = own.reshape(len(own), -1).sum(1)
        assert_close(4 * rows, columns)
        assert float((rows - columns).abs().max()) > 0.1 * float(columns.abs().max())


def test_layers_nodes_and_channels():
    tree = ModeTree([[0, 3], [[1, 4], 2]])
    net = to_cnn(zoo.model_of(tree))
    layers = [(0, 3, 1, 4, 2), ((0, 3), (1, 4)), (tree.parent(2),), (tree.root,)]
    assert net.depth == 4 and [net.nodes_of(layer) for layer in range(4)] == layers
    assert all(net.layer_of(node) == k for k, nodes in enumerate(layers) for node in nodes)
    convolved = [node for _, _, nodes in net.layers() for node in nodes]
    assert set(convolved) == set(tree.nodes) and len(convolved) == 9


def test_a_local_component_is_a_pooled_channel():
    """Without channel 1 at a node the network is the factorization without that local component."""
    model, node = zoo.model_of(ModeTree.binary(4)), (0, 1)
    features, net = zoo.random_features(model.sizes, 5), to_cnn(model)
    with torch.no_grad():
        for child in model.tree.children(node):
            model.weights[child][:, 1] = 0
        net.weights[node][1] = 0
    assert_close(net(features), model(features))


def test_reads_like_a_network():
    waiting = to_cnn(zoo.model_of(ModeTree([[0, 3], [[1, 4], 2]])))
    pairs = ConvNet(ModeTree.binary(4), 3, 8, share=True, join="full")
    for net, *lines in (
        (
            ConvNet(ModeTree.grid((4, 4)), 3, 8, outputs=10),
            "layer 0  1x1 convolution           16 nodes, 3 -> 8",
            "layer 1  product pooling 2x2       4 nodes, 8 channels",
            "layer 2  linear                    1 node, 8 -> 10",
        ),
        (waiting, "layer 1  identity                  1 node waiting"),
        (pairs, "1x1 convolution, shared", "all pairs, over 2", "64 -> 8"),
        (ConvNet(ModeTree.star(3), 3, 8, root="ones"), "sum"),
        (ConvNet(ModeTree.caterpillar(200), 2, 3), "more lines ...", "linear"),
    ):
        text = repr(net)
        assert all(line in text for line in lines) and len(text.splitlines()) < 70


DEEP = {"star": ModeTree.star, "binary": ModeTree.binary, "caterpillar": ModeTree.caterpillar,
        "grid": lambda n: ModeTree.grid((math.isqrt(n), math.isqrt(n)))}  # fmt: skip


@pytest.mark.parametrize("shape", DEEP)
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e12])
def test_deep_products_in_single_precision(shape, share, magnitude):
    """256 positions: values and gradients of magnitude 1 from factors far below or above 1."""
    exact, x = random_net(DEEP[shape](256), share=share, std=1.0), randn(5, 3, 256)
    [name] = [name for name, join, _ in exact.layers() if join == "leaf"]
    with torch.no_grad():  # values about 1, and weights that undo the magnitude of the inputs
        value, log = exact.scaled_values(x)
        whole = float((value.abs().log2() + log).mean())
        exact.convs[name].weight *= 2.0 ** (-whole / 256) / magnitude
    net = ConvNet(exact.tree, 3, 4, share=share)
    net.load_state_dict({key: weight.float() for key, weight in exact.state_dict().items()})
    single, double = (magnitude * x).float().requires_grad_(), (magnitude * x).requires_grad_()
    found, wanted = net(single), exact(double)
    size = wanted.detach().abs()
    assert net.scaled and 1e-30 < float(size.min()) <= float(size.max()) < 1e30
    assert torch.allclose(found.double(), wanted, rtol=2e-3)
    for values in (found, wanted):
        (values / values.detach()).sum().backward()
    assert torch.isfinite(single.grad).all()
    assert_close(single.grad.double(), double.grad, 0.02)


@pytest.mark.parametrize("shape", DEEP)
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e8, 1e20, 1e30])
def test_weights_of_any_size_in_single_precision(shape, share, size):
    """Filters of every layer far from 1, with moderate inputs and with ones that undo them."""
    exact = random_net(DEEP[shape](64), share=share, std=1.0)
    x = randn(5, 3, 64)
    value, log = exact.scaled_values(x)
    net = ConvNet(exact.tree, 3, 4, share=share)
    net.load_state_dict({key: (size * w).float() for key, w in exact.state_dict().items()})
    for undone in (1.0, size):
        found, found_log = net.scaled_values((x / undone).float())
        more = len(net.tree.nodes) * math.log2(size) - 64 * math.log2(undone)
        wanted = value.abs().log2() + log + more
        assert torch.isfinite(found).all() and bool((found != 0).all())
        assert torch.allclose(found.abs().log2().double() + found_log, wanted, rtol=1e-4, atol=0.02)
        assert torch.equal(found.sign().double(), value.sign())


def test_long_chains_of_convolutions():
    """Sixty one-child nodes above each other: no products, but sixty small filters."""
    tree = ModeTree.chain(60)
    model = Factorization(tree, 4, 4, root="ones", generator=zoo.random())
    x = randn(3, 4, 2, dtype=torch.float32)
    value, log = to_cnn(model, scaled=True).scaled_values(x)
    weights = {v: w.double() for v, w in model.weights.items()}
    wanted = Factorization.from_weights(tree, weights, join="diagonal")(x.mT.double())
    assert torch.allclose(value.double() * torch.exp2(log.double()), wanted, rtol=1e-4)
    assert bool((to_cnn(model)(x) == 0).all())


def test_shapes_of_images():
    """Trees of grid know it, others are told, and it is kept."""
    for shape in ((1, 4), (4, 1), (2, 2), (4, 2), (2, 8), (3, 5)):
        assert to_cnn(Factorization(ModeTree.grid(shape), 3, 4)).shape == shape
    assert to_cnn(Factorization(ModeTree.binary(4), 3, 4)).shape is None
    assert to_cnn(Factorization(ModeTree([[0, 1, 4, 5], [2, 3, 6, 7]]), 3, 4)).shape == (2, 4)
    net = ConvNet(SCATTERED, 3, 4, shape=(2, 2), outputs=5)
    assert net.shape == (2, 2) and to_cnn(from_cnn(net), classes=True, shape=(2, 2)).shape == (2, 2)
    with pytest.raises(ShapeError, match=r"\(B, 3, 2, 2\)"):
        net(torch.zeros(2, 3, 1, 4))


@pytest.mark.slow
def test_compiled_and_copied():
    net, x = random_net(ModeTree.grid((4, 4))), randn(5, 3, 4, 4)
    assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), net(x))
        with torch.no_grad():
            next(other.parameters()).zero_()
    assert float(net(x).detach().abs().min()) > 0


@pytest.mark.parametrize("share", [False, True])
def test_made_on_the_meta_device(share):
    """The order of the positions, which is in no file, is right wherever the weights come from."""
    net, x = random_net(ModeTree.grid((4, 4)), share=share), randn(2, 3, 4, 4)
    state = net.state_dict()

    def emptied(late):
        late.to_empty(device="cpu").load_state_dict(state)

    def assigned_one_by_one(late):
        for name, conv in late.convs.items():
            conv.weight = copy.deepcopy(net.convs[name].weight)

    for fill in (emptied, lambda late: late.load_state_dict(state, assign=True), assigned_one_by_one):
        with torch.device("meta"):
            late = random_net(net.tree, share=share, generator=None)
        assert late(x.to("meta")).shape == (2,)
        fill(late)
        assert torch.equal(late(x), net(x))
        assert torch.equal(torch.func.functional_call(late.to("meta"), state, (x,)), net(x))
    swa = torch.optim.swa_utils
    averaged = swa.AveragedModel(net, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(2):
        averaged.update_parameters(net)
    assert_close(averaged(x), net(x))


def test_pruned_filters():
    """Masked anew before each pass, also where products are scaled."""
    net, x = random_net(ModeTree.grid((4, 4))), randn(2, 3, 4, 4)
    prune.l1_unstructured(net.convs["layer1"], "weight", 0.5)
    for factor in (1, 2):
        with torch.no_grad():
            net.convs["layer1"].weight_orig.mul_(factor)
        net(x).sum().backward()
        assert_close(net(x), from_cnn(net)(x.flatten(2).mT))
    with pytest.raises(OptionError, match="weight is computed from other parameters"):
        _ = net.gradients
    assert int((net.weights[net.nodes_of(1)[0]] == 0).sum()) > 0


def test_zeros_pass_through_scaled_products():
    """Also beside values beyond the range; only the zero factor of a product has a gradient."""
    wide = random_net(ModeTree.star(64), std=1.0, dtype=torch.float32)
    x = 30 * randn(2, 3, 64, dtype=torch.float32)
    x[0, :, 3] = 0
    assert wide(x)[0] == 0 and bool(torch.isinf(wide(x)[1]))
    net, x = random_net(ModeTree.star(40), 2, 3, std=1.0), randn(3, 2, 40)
    x[0, :, 7] = 0
    value = net(x.requires_grad_())
    value.sum().backward()
    assert value[0] == 0 and bool((value[1:] != 0).all())
    assert torch.isfinite(x.grad).all() and float(x.grad[0, :, 7].abs().max()) > 0
    assert float(x.grad[0, :, 8].abs().max()) == 0


def test_gradcheck_and_second_derivatives():
    net = random_net(ModeTree.grid((4, 4)), 2, 3, share=True)
    x = randn(2, 2, 4, 4).requires_grad_()
    assert net.scaled and torch.autograd.gradcheck(net, (x,))
    assert torch.autograd.gradgradcheck(net, (x,), atol=1e-6)


@pytest.mark.parametrize("join", ["diagonal", "full"])
def test_several_outputs_are_a_mode(join):
    tree, x = ModeTree([[0, 1], [2, 3]]), randn(6, 3, 4)
    net = random_net(tree, join=join, outputs=5)
    model = from_cnn(net)
    assert model.sizes == (3, 3, 3, 3, 5) and model.tree.parent(4) == model.tree.root
    assert_close(net(x), by_class(model, x))
    again = to_cnn(model, classes=True)
    assert again.tree == tree and torch.equal(again(x), net(x))
    assert all(torch.equal(again.weights[node], weight) for node, weight in net.weights.items())
    trained = zoo.model_of(ModeTree([[0, 1], [2, 3], 4]), join, sizes=model.sizes)  # at the root
    assert_close(to_cnn(trained, classes=True)(x), by_class(trained, x))


def test_a_factorization_with_the_networks_weights():
    """Spectra of a network's weights, differentiable to its parameters."""
    net = random_net(ModeTree.binary(4))
    view, wanted = net.as_factorization(), spectra(from_cnn(net))
    found = spectra(view)
    assert list(view.parameters()) == [] and found.keys() == wanted.keys()
    for node, values in wanted.items():
        assert_close(found[node], values, 1e-10)
    found[(0, 1)].sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in net.parameters())


def test_wide_pooling_is_scaled_by_channel():
    """Channels that leave the range on the way and come back: each has a scale of its own."""
    parts = [torch.tensor([[1e-30, 1e30]]) for _ in range(20)]
    parts += [torch.tensor([[1e30, 1e-30]]) for _ in range(20)]
    assert torch.allclose(scaled_product(parts).value(), torch.ones(1, 2), rtol=1e-3)


SMALL, DEEPER = ConvNet(ModeTree.grid((2, 2)), 3, 4), ConvNet(ModeTree.grid((4, 4)), 3, 4)
UNEVEN = to_cnn(zoo.model_of(ModeTree.star(3)))
EQUAL = zoo.model_of(ModeTree.binary(4), sizes=(3, 3, 3, 3))
LINEAR, SIZES = torch.nn.Linear(2, 2), zoo.model_of(ModeTree.binary(4))
MIXED = [torch.zeros(2, 2, dtype=F64), torch.zeros(2, 3), torch.zeros(2, 5, dtype=F64)]
SCATTERED, CHANNELS = ModeTree([[0, 3], [1, 2]]), "nodes of height 0 differ in their channels"


test_what_is_refused = refuses([
    (lambda: SMALL(torch.zeros(2, 3, 5)), ShapeError, r"\(2, 3, 5\)\n  expected: \(B, 3, 4\) or"),
    (lambda: DEEPER(torch.zeros(2, 3, 2, 8)), ShapeError, r"\(B, 3, 16\) or \(B, 3, 4, 4\)"),
    (lambda: SMALL(torch.zeros(0, 3, 4)), DataError, "an empty batch"),
    (lambda: SMALL(torch.zeros(2, 3, 4, dtype=F64)), DataError, r"write x\.to\(net\.dtype\)"),
    (lambda: SMALL(None), ShapeError, "found:    NoneType"),
    (lambda: UNEVEN(MIXED[:2]), ShapeError, r"3 tensors \(B, D_n\) with D = \(2, 3, 5\)"),
    (lambda: UNEVEN(MIXED), DataError, r"write x\.to\(net\.dtype\)"),
    (lambda: ConvNet(SCATTERED, 3, 4, shape=(2, 3)), TreeError, "2 x 3 has 6 pixels, the tree 4 modes"),
    (lambda: SMALL.nodes_of(4), OptionError, r"layers are 0\.\.1, found 4"),
    (lambda: to_cnn(LINEAR), OptionError, "to_cnn takes a Factorization, found Linear"),
    (lambda: from_cnn(LINEAR), OptionError, "from_cnn takes a ConvNet"),
    (lambda: to_cnn(EQUAL, classes=True), OptionError, "last mode, 3, must be a leaf below the root"),
    (lambda: to_cnn(EQUAL, share=True), OptionError, "of height 0 differ in their weights, first"),
    (lambda: to_cnn(SIZES, share=True), OptionError, CHANNELS),
    (lambda: ConvNet(SIZES.tree, (2, 3, 2, 3), 3, share=True), OptionError, CHANNELS),
    (lambda: ConvNet(ModeTree.star(3), 2, 2, outputs=0), OptionError, "outputs must be an integer >= 1"),
    (lambda: ConvNet(UNEVEN.tree, 2, 2, outputs=2, root="ones"), OptionError, "need a root of their own"),
])  # fmt: skip


@pytest.mark.slow
def test_three_hundred_layers():
    model = zoo.model_of(ModeTree.caterpillar(300), "full", sizes=2, bonds=3, std=0.8)
    x, net = randn(2, 2, 300), to_cnn(model)
    value, log = net.scaled_values(x)
    assert net.depth == 300 and torch.isfinite(value).all() and math.isfinite(float(log.sum()))
    assert_close(net(x), model(x.mT), 1e-10)
