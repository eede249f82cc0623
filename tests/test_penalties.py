"""Penalties on ranks: against their definitions, equal on a factorization and its network."""

import math

import pytest
import torch
import zoo
from refusals import refuses

from tnreg import ConvAC, ConvNet, Factorization, ModeTree, Representation, algebra, dynamics
from tnreg.cnns.convnet import from_cnn, to_cnn
from tnreg.cnns.penalties import EffectiveRankPenalty, LocalComponentPenalty
from tnreg.errors import OptionError
from tnreg.ranks.dense import effective_rank, entanglement_entropy
from tnreg.ranks.spectra import hierarchical_rank, spectra

PENALTIES = [LocalComponentPenalty(), LocalComponentPenalty(p=1.5)]
PENALTIES += [LocalComponentPenalty(p=0.5, promote=True), EffectiveRankPenalty()]
PENALTIES += [EffectiveRankPenalty("entropy", promote=True)]


def htf(*join, **options):
    return zoo.model_of(zoo.TREES["htf-4"], *join, **options)


def component_sum(model, p):
    """By loops over the weights."""
    tree, weights, total = model.tree, model.weights, 0
    for node in model.local_components():
        own = [weights[c] for c in tree.children(node) if c in weights]  # those of bare leaves have norm 1
        parts = [weight.reshape(-1, weight.shape[-1]).T for weight in own]
        if node in weights:
            parts.append(weights[node].reshape(len(weights[node]), -1))
        for vectors in zip(*parts, strict=True):
            power = 2 / len(vectors) if p is None else p
            total += math.prod(float(v.detach().norm()) for v in vectors) ** power
    return total


@pytest.mark.parametrize("model", [p for p in zoo.zoo(bare=True) if "full" not in p.id])
@pytest.mark.parametrize("p", [None, 1.5])
def test_component_penalty_is_its_definition(model, p):
    found = float(LocalComponentPenalty(p=p)(model).detach())
    assert found == pytest.approx(component_sum(model, p), rel=1e-12)
    promoted = LocalComponentPenalty(p=p, promote=True)(model)
    assert float(promoted.detach()) == pytest.approx(-found)


def test_rank_penalty_is_its_definition_and_weights():
    """And components: with weights by node and by layer."""
    model = zoo.model_of(zoo.TREES["uneven"])
    found, sigma = spectra(model), model.local_components()
    wanted = sum(effective_rank(s) for s in found.values())
    assert torch.allclose(EffectiveRankPenalty()(model), wanted)
    by_node = LocalComponentPenalty(p=1, weights={(0, 3): 2.0})(model)
    assert torch.allclose(by_node, 2 * sigma[(0, 3)].sum())
    by_layer = LocalComponentPenalty(p=1, weights={1: 0.5})(model)
    assert torch.allclose(by_layer, 0.5 * (sigma[(0, 3)].sum() + sigma[(1, 4)].sum()))
    some = {(0, 3): 2.0, 4: 0.5}
    wanted = 2 * entanglement_entropy(found[(0, 3)]) + 0.5 * entanglement_entropy(found[4])
    assert torch.allclose(EffectiveRankPenalty("entropy", weights=some)(model), wanted)


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@pytest.mark.parametrize("name", ["htf-4", "uneven", "mixed-arity", "one-child", "cp-4"])
def test_equal_on_the_network(penalty, name):
    """The same value and the same gradients on a factorization and the CNN that it is."""
    model = zoo.model_of(zoo.TREES[name])
    net = to_cnn(model)
    one, other = penalty(model), penalty(net)
    one.backward(), other.backward()
    assert torch.allclose(one, other, rtol=1e-12)
    for node, gradient in model.gradients.items():
        assert torch.allclose(net.gradients[node], gradient, rtol=1e-10, atol=1e-12)


def test_on_classifiers_and_shared_filters():
    net = ConvNet(ModeTree.grid((2, 4)), 3, 4, share=True, outputs=5, std=0.7, dtype=torch.float64)
    model = from_cnn(net)
    penalty = LocalComponentPenalty()
    assert torch.allclose(penalty(net), penalty(model))
    assert torch.equal(penalty(ConvAC(Representation(3), net)), penalty(net))
    penalty(net).backward(), penalty(model).backward()
    layer = net.nodes_of(1)
    total = torch.stack([model.gradients[v] for v in layer]).sum(0)
    assert torch.allclose(net.gradients[layer[0]], total)


@pytest.mark.parametrize("p", [None, 1.0])
def test_component_penalty_gradients(p):
    model = htf()

    def value(*stacks):
        return LocalComponentPenalty(p=p)(Factorization.viewing(model.network, stacks))

    assert torch.autograd.gradcheck(value, tuple(s.detach().requires_grad_() for s in model.stacks))


def test_dead_components_have_no_gradient():
    model = htf()
    with torch.no_grad():
        for node in ((0, 1), 0, 1):
            model.weights[node].zero_()
    LocalComponentPenalty()(model).backward()
    assert all(torch.isfinite(g).all() for g in model.gradients.values())
    assert float(model.gradients[(0, 1)].abs().max()) == 0
    zero = Factorization(ModeTree.binary(4), 3, 2, std=0.0)  # has a graph all the same
    EffectiveRankPenalty()(zero).backward()
    assert all(float(g.abs().max()) == 0 for g in zero.gradients.values())


def test_norms_of_ordinary_size_do_not_meet_eps():
    model = htf()
    model.load_state_dict({key: 1e-5 * value for key, value in model.state_dict().items()})
    found = float(LocalComponentPenalty()(model).detach())
    assert found == pytest.approx(component_sum(model, None), rel=1e-12)
    every = sum(len(sigma) for sigma in model.local_components().values())
    assert float(LocalComponentPenalty(eps=1.0)(model).detach()) == every  # every norm counts as 1


def test_products_of_many_norms_stay_in_range():
    """65 vectors of norm 1e8 each: their product leaves the range of float32, its 2/65th power does not."""
    model = Factorization(ModeTree.star(64), 2, 3)
    with torch.no_grad():
        for stack in model.stacks:
            stack.fill_(1e8)
    wanted = 3 * 1e16 * math.sqrt(2) ** (64 * 2 / 65)
    assert float(LocalComponentPenalty()(model).detach()) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_training_on_it_changes_the_rank():
    """Fitted with the penalty the effective rank falls; with promote it rises."""
    tree, ranks = ModeTree.binary(4), []
    dense = zoo.model_of(tree, sizes=(5, 5, 5, 5)).to_tensor().detach()
    dense = dense / dense.norm()
    for penalty in (LocalComponentPenalty(), lambda _: 0, LocalComponentPenalty(promote=True)):
        model = zoo.model_of(tree, sizes=5, bonds=5, std=0.4)
        adam = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(300):
            loss = (model.to_tensor() - dense).square().sum() + 0.003 * penalty(model)
            adam.zero_grad()
            loss.backward()
            adam.step()
        ranks.append(float(effective_rank(spectra(model)[(0, 1)].detach())))
    low, none, high = ranks
    assert low < none - 0.05 and high > none + 0.05


HTF = htf()
FULL = htf("full")
test_what_is_refused = refuses([
    (lambda: LocalComponentPenalty(p=0), "p must be a number > 0"),
    (lambda: LocalComponentPenalty(p=True), "p must be a number > 0, or None for 2/K, found True"),
    (lambda: LocalComponentPenalty(eps=0), "eps must be a number > 0"),
    (lambda: LocalComponentPenalty()(FULL), "full joins have no local components"),
    (lambda: LocalComponentPenalty(weights={(0, 2): 1.0})(HTF), r"nothing to weigh at \(0, 2\)"),
    (lambda: LocalComponentPenalty(weights={3: 1.0})(HTF),
     "nothing to weigh at 3.*\n.*only heights, \\[1, 2\\]"),
    (lambda: LocalComponentPenalty(weights=0.5), r"weights must be \{node: number\}"),
    (lambda: LocalComponentPenalty()(torch.nn.Linear(2, 2)),
     "found Linear.\n  for any network: tnreg.InputGradientChange"),
    (lambda: EffectiveRankPenalty(weights={1: math.nan}), "weight of 1 must be a finite number, found nan"),
    (lambda: EffectiveRankPenalty("rank"), "unknown kind 'rank'; write 'effective_rank' or 'entropy'"),
    (lambda: dynamics.drop_components(HTF), "give either ranks or below"),
    (lambda: dynamics.drop_components(HTF, below=1), r"below must be a number in \[0, 1\), found 1"),
    (lambda: dynamics.drop_components(HTF, below="0.5"), r"below must be a number in \[0, 1\), found '0.5'"),
    (lambda: dynamics.drop_components(to_cnn(HTF), 1), "of a network: from_cnn"),
    (lambda: dynamics.drop_components(FULL, 1), "full joins have no local components"),
], error=OptionError)  # fmt: skip


@pytest.mark.parametrize("name", ["htf-4", "uneven", "mixed-arity", "cp-4", "matrix", "one-child"])
@pytest.mark.parametrize("root", ["trained", "ones"])
@pytest.mark.parametrize("kinds", [{}, {1: "bare"}], ids=str)
def test_dropped_components(name, root, kinds):
    """Smaller bonds; the same tensor as with them zeroed; within the bound of law 6, which is tighter."""
    model = zoo.bare_model(zoo.TREES[name], "diagonal", kinds, root)
    found = dynamics.drop_components(model, 1)
    kept = dynamics.keep_components(model, 1)
    assert max(found.network.bonds[:-1]) == 1
    assert torch.allclose(found.to_tensor(), kept.to_tensor(), rtol=1e-12)
    error = float(algebra.subtract(model, found).norm().detach())
    wider = float(dynamics.distance_bound(model, 1).detach())
    assert error <= found.error_bound * (1 + 1e-12) <= wider * (1 + 1e-9)
    assert set(hierarchical_rank(found).values()) == {1}


def test_dropped_where_products_leave_the_range():
    """Norms of 64 small columns: their products underflow in float32, their order is known all the same."""
    model = zoo.model_of(ModeTree.star(64), sizes=3, bonds=6, std=0.02, dtype=torch.float32)
    with torch.no_grad():
        for n in range(64):
            model.weights[n][:, 3:] *= 1.5
    weights = {v: w.double() for v, w in model.weights.items()}
    wide = Factorization.from_weights(model.tree, weights, join="diagonal")
    for options in ({"ranks": 3}, {"below": 0.5}):
        found = dynamics.drop_components(model, **options)
        exact = dynamics.drop_components(wide, **options)
        assert torch.equal(found.weights[0].double(), exact.weights[0])
        assert found.error_bound == pytest.approx(exact.error_bound, rel=1e-4)
        assert exact.error_bound > 0
    assert torch.equal(dynamics.drop_components(model, 3).weights[0], model.weights[0][:, 3:])


def test_dropped_by_share():
    model = htf()
    sigma = model.local_components()
    found = dynamics.drop_components(model, below=0.5)
    bonds = dict(zip(model.tree.nodes, found.network.bonds, strict=True))
    for node in model.tree.interior:
        count = int((sigma[node] >= 0.5 * sigma[node].max()).sum())
        assert {bonds[child] for child in model.tree.children(node)} == {count}
    same = dynamics.drop_components(model, below=0.0)
    assert same.network == model.network and same.error_bound == 0
    assert dynamics.drop_components(model, 0).network.bonds[0] == 1  # a node needs one
