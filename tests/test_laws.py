"""Law x tree: what must hold for every tree, join, root and dtype."""

import copy
import functools
import itertools
import math

import definition
import numpy as np
import opt_einsum
import pytest
import torch
import zoo
from hypothesis import HealthCheck, example, given, settings
from zoo import assert_close

from tnreg import Factorization, GroupRMSprop, ModeTree, balance_, completion, load, network, plan
from tnreg.networks import plan as contraction
from tnreg.ranks.dense import effective_rank, entanglement_entropy
from tnreg.ranks.spectra import hierarchical_rank, spectra
from tnreg.tensors.arrays import matricize

ZOO = list(zoo.zoo())
some = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
whole_zoo = pytest.mark.parametrize("model", ZOO)
BARE = [*ZOO, *zoo.bare_zoo()]
with_bare = pytest.mark.parametrize("model", BARE)
defined = functools.cache(definition.of_model)


def number(x):
    return float(x.detach())


def force(monkeypatch, route):
    """Every plan takes this route; plans made before, and these ones, stay apart."""
    monkeypatch.setattr(contraction, "choose", lambda costs: route)
    monkeypatch.setattr(contraction, "_plans", contraction._plans.__wrapped__)


def rank_one(features, b):
    out = features[0][b]
    for x in features[1:]:
        out = out.unsqueeze(-1) * x[b]
    return out


def check_dense(model):
    assert_close(model.to_tensor(), defined(model))
    if len(model.weights) > 1:  # a single node has no edge to contract
        assert_close(zoo.contracted(network(model)), model.to_tensor())


@with_bare
def test_dense_is_definition(model):
    check_dense(model)


@given(zoo.models(bare=True))
@some
def test_dense_is_definition_random(model):
    check_dense(model)
    check_one_hot(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_tensornetwork_in_single_precision(dtype):
    model = zoo.model_of(zoo.TREES["cp-4"], root="ones", dtype=dtype)
    assert_close(zoo.contracted(network(model)), model.to_tensor(), 1e-5)


def check_entries(model):
    dense, routes = model.to_tensor(), set()
    for count in (1, 3, 40, 400):  # so that every route is chosen somewhere
        index = zoo.random_index(model.sizes, count, seed=count)
        assert_close(model.entries(index), dense[tuple(index.T)])
        chosen = plan(model, index=index)
        routes.add(chosen.route)
        assert chosen.candidates[chosen.route] == min(chosen.candidates.values())
        assert_close(model.entries(chosen), dense[tuple(index.T)])
    assert_close(model.entries(zoo.all_index(model.sizes)), dense.reshape(-1))
    return routes


def test_entries_are_dense():
    """On the whole zoo, where each of the three routes is chosen somewhere."""
    routes = set().union(*(check_entries(*case.values) for case in BARE))
    assert routes == {"dense", "distinct", "per-sample"}


@given(zoo.models(bare=True))
@some
def test_entries_are_dense_random(model):
    check_entries(model)


@pytest.mark.slow
@pytest.mark.parametrize("route", ["dense", "distinct", "per-sample"])
@pytest.mark.parametrize("name", ["htf-4", "across", "uneven", "cp-4", "one-child", "named"])
@pytest.mark.parametrize("join", ["diagonal", "full", "mixed"])
@pytest.mark.parametrize("bare", [(), (1,), (0, 1, 2)])
def test_every_route_to_entries(monkeypatch, route, name, join, bare):
    tree = zoo.TREES[name]
    model = zoo.bare_model(tree, zoo.joins_of(tree)[join], dict.fromkeys(bare, "bare"))
    index = zoo.random_index(model.sizes, 30)[[*range(30), *range(5)]]
    force(monkeypatch, route)
    chosen = plan(model, index=index)
    assert chosen.route == route
    assert_close(model.entries(chosen), defined(model)[tuple(index.T.numpy())])


def check_one_hot(model):
    index = zoo.random_index(model.sizes, 9)
    features = map(torch.nn.functional.one_hot, index.unbind(1), model.sizes)
    assert_close(model([x.to(model.dtype) for x in features]), model.entries(index))


def check_forward(model):
    features, dense = zoo.random_features(model.sizes, 5, model.dtype), model.to_tensor()
    expected = [(rank_one(features, b) * dense).sum() for b in range(5)]
    assert_close(model(features), torch.stack(expected), 1e-11)


@with_bare
def test_forward_is_inner_product_with_rank_one(model):
    check_forward(model)
    check_one_hot(model)
    assert model(zoo.random_features(model.sizes, 1, model.dtype)).shape == (1,)


@given(zoo.models(bare=True))
@some
def test_forward_is_inner_product_random(model):
    check_forward(model)
    assert plan(model, batch=5).batch == 5


@pytest.mark.parametrize("route", ["tree", "opt_einsum"])
@with_bare
def test_both_routes_agree(monkeypatch, model, route):
    """The tree schedule and opt_einsum's path, each by itself, dense and on a batch."""
    force(monkeypatch, route)
    assert plan(model).route == plan(model, batch=5).route == route
    assert_close(model.to_tensor(), defined(model))
    check_forward(model)


@pytest.mark.parametrize("nested", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [0, [2, 1]]])
def test_equal_sizes_take_one_tensor(nested):
    tree = ModeTree(nested)
    model = zoo.model_of(tree, "full", sizes=(3,) * tree.order)
    x = torch.randn(6, tree.order, 3, dtype=torch.float64)
    assert_close(model(x), model(list(x.unbind(1))))
    check_forward(model)


def check_gradients(model):
    start = [p.detach().clone().requires_grad_() for p in model.parameters()]
    index = zoo.random_index(model.sizes, 4)
    features = zoo.random_features(model.sizes, 2, model.dtype)

    class Everything(torch.nn.Module):
        def forward(self):
            m = self.model
            return m.to_tensor(), m.entries(index), m(features), m.norm()

    whole = Everything()
    whole.model = model

    def function(*values):
        weights = {name: x for (name, _), x in zip(whole.named_parameters(), values, strict=True)}
        return torch.func.functional_call(whole, weights, ())

    return torch.autograd.gradcheck(function, start, fast_mode=True, atol=1e-5)


@pytest.mark.parametrize("name", list(zoo.TREES))
@pytest.mark.parametrize("kind", ["diagonal", "full", "mixed", "ones", "complex"])
def test_gradients(name, kind):
    tree = zoo.TREES[name]
    options = {"ones": {"root": "ones"}, "complex": {"dtype": torch.complex128}}.get(kind, {})
    join = zoo.joins_of(tree)[{"ones": "diagonal", "complex": "mixed"}.get(kind, kind)]
    sizes = tuple(min(n, 3) for n in zoo.sizes_of(tree))
    assert check_gradients(zoo.model_of(tree, join, sizes=sizes, **options))


@pytest.mark.slow
@given(zoo.models(bare=True))
@settings(some, max_examples=15)
def test_gradients_random(model):
    assert check_gradients(model)


@with_bare
def test_norm_and_inner(model):
    dense = model.to_tensor()
    assert_close(model.norm(), dense.norm().real, 1e-11)
    assert_close(model.log_norm(), dense.norm().real.log(), 1e-9)
    join = dict(zip(model.tree.nodes, model.network.joins, strict=True))
    flipped = {v: "full" if join[v] == "diagonal" else "diagonal" for v in model.tree.interior}
    for kind in ("diagonal", flipped):
        other = zoo.model_of(model.tree, kind, sizes=model.sizes, seed=5, dtype=torch.complex128)
        error = model.inner(other) - (dense.conj() * other.to_tensor()).sum()
        assert number(error.abs()) < 1e-11 * number(model.norm() * other.norm())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize(
    "tree", [ModeTree.binary(256), ModeTree.binary(1024), ModeTree.caterpillar(1024)], ids=repr
)
def test_norm_survives_high_order_and_scale(dtype, tree):
    """A tensor of rank one has the product of its vectors' norms as its norm, at any order."""
    model = Factorization(tree, 3, 2, join="full", dtype=dtype, std=1.0)
    weights = {v: torch.zeros_like(w) for v, w in model.weights.items()}
    for v, weight in weights.items():
        if isinstance(v, int):
            weight[:, 0] = 5.0 if v % 2 else 0.1
        else:
            weight.view(-1)[0] = 1.0
    model.load_weights(weights)
    expected = sum(math.log((5.0 if n % 2 else 0.1) * math.sqrt(3)) for n in range(tree.order))
    assert number(model.log_norm()) == pytest.approx(expected, rel=1e-5)
    assert number(model.inner(model).real) >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tree", [ModeTree.star(1024), ModeTree.regular(1024, 32)], ids=repr)
def test_norm_of_wide_diagonal_joins(dtype, tree):
    """Rank one again, under joins of many children, where factors of 5 and 0.1 meet a thousandfold."""
    model = Factorization(tree, 2, 2, dtype=dtype, std=0.0, root="ones")
    weights = {v: torch.eye(2) for v in model.tree.interior[:-1]}
    for n in range(1024):
        weights[n] = torch.diag(torch.tensor([5.0, 0.1] if n % 3 else [0.2, 10.0]))
    model.load_weights(weights)
    logs = [sum(math.log(float(weights[n][r, r])) for n in range(1024)) for r in range(2)]
    wanted = max(logs) + 0.5 * math.log1p(math.exp(2 * (min(logs) - max(logs))))
    assert number(model.log_norm()) == pytest.approx(wanted, rel=1e-5)


def test_norm_and_spectra_at_extreme_weights():
    for power in (200, -200):
        model = zoo.model_of(ModeTree.star(2), root="ones", sizes=(3, 3))
        norm, values = model.to_tensor().detach().norm(), spectra(model)[0]
        a, b = (w.detach().clone() for w in model.weights.values())
        model.load_weights({0: a * 10.0**power, 1: b * 10.0**-power})
        assert_close(model.norm(), norm, 1e-11)
        assert_close(spectra(model)[0], values, 1e-11)
        model.load_weights({1: b})
        assert_close(model.norm() / 10.0**power, norm, 1e-11)
        assert_close(spectra(model)[0] / 10.0**power, values, 1e-11)
        norms = model.local_components()[(0, 1)].detach() / 10.0**power
        assert torch.isfinite(norms).all() and (norms > 0).all()


def test_zero_weights():
    model = Factorization(ModeTree.binary(4), 3, 2, std=0.0, dtype=torch.float64)
    assert number(model.norm()) == 0.0 and number(model.log_norm()) == -math.inf
    assert set(hierarchical_rank(model).values()) == {0}
    assert all(number(s.abs().max()) == 0 for s in spectra(model).values())


def check_spectra(model, rtol):
    dense, tree = model.to_tensor().detach(), model.tree
    found, factored = spectra(dense, tree), spectra(model)
    assert list(found) == list(factored) == list(tree.nodes[:-1])
    for v in found:
        matrix = matricize(dense, tree.modes_below(v)).numpy()
        wanted = torch.from_numpy(np.linalg.svd(matrix, compute_uv=False))
        assert_close(found[v], wanted, rtol)
        assert_close(factored[v], wanted[: len(factored[v])], rtol)
        assert (wanted[len(factored[v]) :] <= 1e-12 * wanted[0]).all()


@given(zoo.models())
@some
def test_spectra_random(model):
    check_spectra(model, 1e-10)


@whole_zoo
def test_spectra_and_ranks_bounded_by_the_bonds(model):
    check_spectra(model, 1e-11)
    tree = model.tree
    for ranks in (hierarchical_rank(model), hierarchical_rank(model.to_tensor().detach(), tree)):
        for v, rank in ranks.items():
            below = math.prod(model.sizes[m] for m in tree.modes_below(v))
            assert 1 <= rank <= min(model.weights[v].shape[-1], below)
            if tree.children(v) and model.network.joins[tree.position(v)] == "diagonal":
                assert rank <= model.weights[v].shape[0]


@given(zoo.trees(most=5))
@some
def test_off_tree_rank_bound(tree):
    """Rank of any matricization <= r^min of the numbers of maximal nodes that tile the two sides."""
    model = zoo.model_of(tree, sizes=3, bonds=2, std=1.0, seed=1)
    dense = model.to_tensor().detach()

    def tiles(modes):
        inside = [v for v in tree.nodes if set(tree.modes_below(v)) <= modes]
        return sum(1 for v in inside if tree.parent(v) not in inside)

    for count in range(1, tree.order):
        for modes in itertools.combinations(range(tree.order), count):
            s = torch.linalg.svdvals(matricize(dense, modes))
            bound = 2 ** min(tiles({*modes}), tiles({*range(tree.order)} - {*modes}))
            assert int((s > 1e-10 * s[0]).sum()) <= bound


def leaf_to_root_flops(model, batch=None):
    """Children of a node merged one after another, then its weight; counted as opt_einsum counts."""
    net, tree = model.network, model.tree
    flops, rows = 0, []
    for i, below in enumerate(tree.links):
        if not below:
            size = net.shape(i)[0]
            rows.append(size if batch is None else batch)
            flops += 0 if batch is None or i in net.bare else 2 * batch * size * net.bonds[i]
            continue
        bond = net.bonds[below[0]] if net.joins[i] == "diagonal" else None
        height, width = rows[below[0]], net.bonds[below[0]]
        for c in below[1:]:
            height = height * rows[c] if batch is None else batch
            width = bond if bond is not None else width * net.bonds[c]
            flops += height * width
        rows.append(height)
        above = net.bonds[i]
        flops += 2 * height * width * above if i in net.slots else 2 * height * width
    return flops


def auto_flops(model, batch=None):
    net, order = model.network, model.tree.order
    terms = [list(net.indices(net.tree.position(v))) for v in model.weights]
    shapes = [tuple(w.shape) for w in model.weights.values()]
    output = list(range(order))
    if batch is not None:
        ends = [net.tree.position(mode) for mode in range(order)]
        terms += [["batch", net.above[i] if i in net.bare else n] for n, i in enumerate(ends)]
        shapes += [(batch, size) for size in model.sizes]
        output = ["batch"]
    else:  # a mode that is another one as well
        terms += [[net.tree.nodes[i], net.above[i]] for i in net.copies]
        shapes += [(net.bonds[i],) * 2 for i in net.copies]
    names = dict.fromkeys(itertools.chain(*terms))
    symbols = {name: opt_einsum.get_symbol(k) for k, name in enumerate(names)}
    words = ["".join(symbols[name] for name in term) for term in (*terms, output)]
    equation = f"{','.join(words[:-1])}->{words[-1]}"
    return opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto")[1].opt_cost


def check_cost(model, batch):
    """By the tree unless opt_einsum saves a factor of 2.5; never more than leaf-to-root."""
    chosen = plan(model, batch=batch)
    tree, path = (chosen.candidates[route] for route in ("tree", "opt_einsum"))
    leaf_to_root, auto = leaf_to_root_flops(model, batch), float(auto_flops(model, batch))
    assert tree <= leaf_to_root and path <= auto
    assert chosen.route == ("opt_einsum" if tree > 2.5 * path else "tree")
    assert chosen.flops == chosen.candidates[chosen.route] <= min(leaf_to_root, 2.5 * auto)
    return chosen.route


def test_plan_costs_no_more_than_it_may():
    """On the whole zoo, where each of the two routes is chosen somewhere."""
    routes = {check_cost(*case.values, batch) for case in BARE for batch in (None, 1, 64)}
    assert routes == {"tree", "opt_einsum"}


@pytest.mark.slow
@given(zoo.models(bare=True))
@example(Factorization(ModeTree.star(4), 1, 1, join="full"))
@some
def test_plan_cost_random(model):
    for batch in (None, 3, 64):
        check_cost(model, batch)


@pytest.mark.parametrize(("tree", "size", "rank", "join", "batch"), [
    (ModeTree.binary(4), 8, 512, "diagonal", None),
    (ModeTree.binary(16), 8, 16, "full", 1024),
    (ModeTree.star(3), 16, 256, "diagonal", None),
    (ModeTree.caterpillar(12), 4, 8, "full", 32),
    (ModeTree.grid((4, 4)), 3, 6, "diagonal", 100),
    (ModeTree.chain(3), 64, 64, "diagonal", None),
])  # fmt: skip
def test_plan_cost_at_published_sizes(tree, size, rank, join, batch):
    check_cost(Factorization(tree, size, rank, join=join), batch)


def test_batch_plan_of_a_deep_tree_is_by_the_tree():
    """What the tree schedule is for: opt_einsum's auto plans many times more flops here."""
    chosen = plan(Factorization(ModeTree.binary(16), 8, 16, join="full"), batch=1024)
    assert chosen.route == "tree" and chosen.candidates["opt_einsum"] > 10 * chosen.flops


@whole_zoo
def test_scaling_saving_and_loading(model, tmp_path):
    other = copy.deepcopy(model)
    for v, w in model.weights.items():
        other.load_weights({v: -3.0 * w.detach()})
        assert_close(other.to_tensor(), -3.0 * model.to_tensor())
        other.load_weights({v: w.detach()})
    model.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.network == model.network and again.dtype == model.dtype
    assert all(torch.equal(again.weights[v], w) for v, w in model.weights.items())
    for same in (other, again):
        assert torch.equal(same.to_tensor(), model.to_tensor())


TIED = [p for p in BARE if "diagonal" in p.values[0].network.joins]


@pytest.mark.parametrize("model", [p for p in TIED if "mixed" not in p.id and "complex" not in p.id])
def test_local_components_are_norms_of_what_they_add(model):
    """Zeroing all other components at v leaves a tensor linear in each vector of (v, r)."""
    tree, weights = model.tree, {v: w.detach() for v, w in model.weights.items()}
    for v, norms in model.local_components().items():
        assert norms.shape == (model.network.named_bonds[tree.children(v)[0]],)
        for r in range(len(norms)):
            vectors = [weights[c][:, r] for c in tree.children(v) if c in weights]
            if v in weights:
                vectors.append(weights[v][r : r + 1] if v == tree.root else weights[v][r, :])
            assert_close(norms[r].detach(), torch.stack([x.norm() for x in vectors]).prod(), 1e-12)
    squares = []
    for v in tree.interior:
        rows = [weights[c].square().sum(0) for c in tree.children(v) if c in weights]
        if v in weights:
            rows.append(weights[v].square() if v == tree.root else weights[v].square().sum(1))
        squares += [number((a - b).abs().max()) for a, b in itertools.combinations(rows, 2)]
    assert number(model.unbalancedness()) == pytest.approx(max(squares, default=0.0), rel=1e-12)


@pytest.mark.parametrize("model", TIED)
def test_balancing_keeps_the_tensor(model):
    before = model.to_tensor().detach()
    balanced = copy.deepcopy(model)
    assert balance_(balanced) is balanced
    assert_close(balanced.to_tensor(), before, 1e-11)
    largest = max(number(n.max()) for n in balanced.component_norms().values())
    assert number(balanced.unbalancedness()) <= 1e-10 * largest**2


@pytest.mark.parametrize("spread", [0, 3, 100])
@pytest.mark.parametrize(
    "tree", [ModeTree.star(5), ModeTree.binary(64), ModeTree.chain(40), zoo.TREES["uneven"]]
)
def test_balancing_at_any_scale(tree, spread):
    """Norms near underflow or far from each other, and a component of norm zero."""
    dtype = torch.complex128 if spread else torch.float64
    model = zoo.model_of(tree, std=1e-3, bonds=4, sizes=2, dtype=dtype)
    weights = {
        v: w.detach() * 10 ** (spread * zoo.randn(*w.shape, seed=k).clamp(-1, 1))
        for k, (v, w) in enumerate(model.weights.items())
    }
    weights[0][:, 1] = 0
    model.load_weights(weights)
    before = model.log_norm()
    for norms in balance_(model).component_norms().values():
        assert (norms - norms[0]).abs().le(1e-11 * norms[0]).all()
    assert abs(model.log_norm() - before) <= 1e-9


def test_conservation_under_gradient_descent():
    """‖w‖² - ‖w'‖² changes by exactly lr² (‖g‖² - ‖g'‖²) in a step with one common step size."""
    model = zoo.model_of(zoo.TREES["uneven"])
    task = completion(zoo.model_of(zoo.TREES["uneven"], seed=9), 100)
    optimizer = GroupRMSprop(model.parameters(), lr=1e-2)
    task.loss(model).backward()
    before, gradients = model.component_norms(), copy.deepcopy(model)
    gradients.load_weights(model.gradients)
    pushed = gradients.component_norms()
    optimizer.step()
    for v, after in model.component_norms().items():
        change = (after**2 - before[v] ** 2).detach()
        expected = optimizer.step_size**2 * pushed[v].detach() ** 2
        assert_close(change - change[0], expected - expected[0], 1e-9)


@whole_zoo
def test_spectra_of_a_factorization_can_be_trained_on(model):
    """Gradients of effective ranks and entropies, without the dense tensor and through it."""

    def gradients(spectra):
        entropies = [effective_rank(s) + entanglement_entropy(s) for s in spectra.values()]
        total = sum(entropies) + sum(s.square().sum() for s in spectra.values())
        return torch.autograd.grad(total, list(model.stacks))

    expected = gradients(spectra(model.to_tensor(), model.tree))
    largest = max(g.abs().max().item() for g in expected)
    for ours, theirs in zip(gradients(spectra(model)), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-8 * largest


def test_low_rank_has_finite_gradients():
    """Bonds wider than the rank, columns of zeros: no derivative of a factorization blows up."""
    model = zoo.model_of(ModeTree.binary(4), sizes=3, bonds=40, std=0.5)
    weights = {v: w.detach().clone() for v, w in model.weights.items()}
    for node in (0, 1):
        weights[node][:, 1:] = 0
    model.load_weights(weights)
    entanglement_entropy(spectra(model)[2]).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        assert not spectra(model)[0].requires_grad
