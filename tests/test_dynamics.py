"""The laws of gradient flow: exact ones to machine precision, the others as slopes in the step."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import zoo
from refusals import refuses

import tnreg
from tnreg import DataError, Factorization, ModeTree, OptionError, completion
from tnreg import dynamics as dy

MODELS = [
    pytest.param(zoo.model_of(tree, join, root=root, dtype=dtype), id=f"{name}-{root}-{kind}")
    for name, tree in zoo.TREES.items()
    for kind, join, root, dtype in [
        ("diagonal", "diagonal", "trained", torch.float64),
        ("diagonal", "diagonal", "ones", torch.float64),
        ("mixed", zoo.joins_of(tree)["mixed"], "trained", torch.float64),
        ("complex", "diagonal", "trained", torch.complex128),
    ]
] + [p for p in zoo.bare_zoo() if p.id.startswith(("htf-4", "uneven", "one-child")) and "full" not in p.id]


def task_of(model):
    """Completion of another random tensor from more than half of its entries."""
    other = zoo.model_of(model.tree, seed=9, sizes=model.sizes, dtype=model.dtype)
    return completion(other, 0.6)


def dense_gradient(model, loss):
    """-dL/dW on the dense tensor, independent of the factorization's own backward pass."""
    dense = model.to_tensor().detach().requires_grad_()
    table = SimpleNamespace(entries=lambda index: dense[tuple(index.T)])
    return -torch.autograd.grad(loss(table), dense)[0]


def others_zeroed(model, node, r):
    """The end tensor with all components at the node but the r-th set to zero."""
    alone = copy.deepcopy(model)
    for child in (c for c in model.tree.children(node) if c in model.weights):
        weight = model.weights[child].detach()
        alone.load_weights({child: weight * (torch.arange(weight.shape[-1]) == r)})
    if node in model.weights:  # for bare leaves alone
        weight = model.weights[node].detach().clone()
        weight[torch.arange(len(weight)) != r] = 0
        alone.load_weights({node: weight})
    return alone.to_tensor().detach()


@pytest.mark.parametrize("model", MODELS)
def test_every_vector_of_a_component_has_the_same_drive(model):
    """Law 1: what gradient flow conserves."""
    for drive in dy.component_drive(model, task_of(model).loss).values():
        assert torch.allclose(drive, drive[:1].expand_as(drive), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_rate_against_its_definition(model):
    """Law 2 with <-grad L, C> from the dense tensor."""
    loss = task_of(model).loss
    pull = dense_gradient(model, loss)
    norms = model.component_norms()
    for node, rate in dy.predicted_rate(model, loss).items():
        sigma = norms[node].detach().prod(0)
        for r in range(len(rate)):
            component = others_zeroed(model, node, r) / sigma[r]
            ip = (pull.conj() * component).sum().real
            wanted = ip * (sigma[r] ** 2 / norms[node].detach()[:, r] ** 2).sum()
            assert torch.allclose(rate[r], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_measured_rate_converges_to_the_predicted_one(model):
    """Halving the step halves the difference."""
    loss = task_of(model).loss
    exact = dy.predicted_rate(model, loss)

    def error(step):
        measured = dy.measured_rate(model, loss, step=step)
        return max((measured[v] - exact[v]).abs().max().item() for v in exact)

    assert error(1e-4) <= 1e-9 or 1.9 < error(1e-4) / error(5e-5) < 2.1


def test_slow_components_are_measured_in_single_precision_too():
    """A step of 1e-6 changes them by less than single precision holds."""
    model = zoo.model_of(zoo.TREES["htf-4"])
    task = task_of(model).to(dtype=torch.float32)
    model.float().load_weights({v: 0.1 * w.detach() for v, w in model.weights.items()})
    measured = dy.measured_rate(model, task.loss)
    for node, rates in dy.predicted_rate(model, task.loss).items():
        assert 0 < rates.abs().max() < 1e-2
        assert torch.allclose(measured[node].float(), rates, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["cp-4", "htf-4", "across", "uneven", "mixed-arity"])
@pytest.mark.parametrize("root", ["trained", "ones"])
def test_balanced_form(name, root):
    model = zoo.model_of(zoo.TREES[name], root=root)
    loss = task_of(model).loss

    def close(rtol):
        exact, balanced = (dy.predicted_rate(model, loss, form=f) for f in ("exact", "balanced"))
        return all(torch.allclose(exact[v], balanced[v], rtol=rtol, atol=1e-12) for v in exact)

    assert not close(1e-3)
    tnreg.balance_(model)
    assert close(1e-8)


def test_cp_component_is_the_product_of_unit_vectors():
    """Law 3 for CP."""
    model = zoo.model_of(ModeTree.star(3), root="ones")
    loss = task_of(model).loss
    weights = [w.detach() for w in model.weights.values()]
    norms = torch.stack([w.norm(dim=0) for w in weights])
    units = [w / norm for w, norm in zip(weights, norms, strict=True)]
    ip = torch.einsum("ijk,ir,jr,kr->r", dense_gradient(model, loss), *units)
    wanted = ip * norms.prod(0) ** 2 * norms.pow(-2).sum(0)
    assert torch.allclose(dy.predicted_rate(model, loss)[model.tree.root], wanted, rtol=1e-10)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_singular_values_of_deep_matrix_factorization(depth):
    """Law 3 for matrices: the exact rate for any weights, the balanced law for balanced ones."""
    tree = ModeTree.chain(depth)
    model = zoo.model_of(tree, root="ones", sizes=(5, 6))
    loss, count = task_of(model).loss, model.weights[0].shape[1]

    def values(m):
        return torch.linalg.svdvals(m.to_tensor())[:count]

    exact = dy.predicted_singular_rate(model, loss)[:count]
    rates = (dy.measured_rate(model, loss, step=step, of=values) for step in (1e-4, 5e-5))
    coarse, fine = ((rate - exact).abs().max().item() for rate in rates)
    assert 1.9 < coarse / fine < 2.1

    middle = torch.diag(torch.tensor([2.0, 1.5, 1.0, 0.7, 0.3], dtype=torch.float64))
    # W = W_0 W_1 .. W_(L-1): neighbours share a rotation, so that W_l' W_l = W_(l+1) W_(l+1)'
    turns = [*torch.linalg.qr(zoo.randn(depth, 5, 5))[0], torch.linalg.qr(zoo.randn(6, 6))[0][:, :5]]
    factors = [turns[k] @ middle @ turns[k + 1].T for k in range(depth)]
    zeros, ones = ([v for v in tree.interior[:-1] if tree.modes_below(v) == (n,)] for n in (0, 1))
    weights = dict(zip([0, *zeros], factors[:-1], strict=False))
    weights |= {v: f.T for v, f in zip([1, *ones], factors[::-1], strict=False)}
    balanced = Factorization(tree, (5, 6), 5, root="ones", dtype=torch.float64)
    balanced.load_weights(weights)
    del weights[0]
    bare = Factorization.from_weights(tree, weights, join="diagonal", leaves={0: "bare"})  # one factor less
    for m in (balanced, bare):
        law = dy.predicted_singular_rate(m, loss, form="balanced")
        assert torch.allclose(law, dy.predicted_singular_rate(m, loss), rtol=1e-8, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_bounds_for_unbalanced_weights(model):
    """Law 4."""
    loss = task_of(model).loss
    rates = dy.predicted_rate(model, loss)
    for node, (lower, upper) in dy.rate_bounds(model, loss).items():
        slack = 1e-12 * (upper - lower).abs().max() + 1e-15
        assert (rates[node] >= lower - slack).all() and (rates[node] <= upper + slack).all()
        trivial = len(model.component_norms()[node]) < 2 or upper.abs().max() < 1e-14
        assert trivial or (lower < upper).any()


@pytest.mark.parametrize("vectors", [1, 2, 3, 5])
@pytest.mark.parametrize("drive", [0.3, -0.2])
def test_constant_drive_solves_its_equation(vectors, drive):
    """Law 5 against a fine Runge-Kutta integration."""
    sigma, steps, time = 0.5, 4000, 1.0

    def slope(s):
        return vectors * s ** (2 - 2 / vectors) * drive

    h, value = time / steps, sigma
    for _ in range(steps):
        a = slope(value)
        b = slope(value + h / 2 * a)
        c = slope(value + h / 2 * b)
        value += h / 6 * (a + 2 * b + 2 * c + slope(value + h * c))
    assert dy.constant_drive(sigma, drive, vectors, time).item() == pytest.approx(value, rel=1e-9)


def test_constant_drive_rises_more_sharply_with_more_vectors():
    assert dy.constant_drive(0.5, 1.0, 4, 100.0).item() == float("inf")
    assert dy.constant_drive(0.1, 1.0, 2, torch.linspace(0, 1, 5)).shape == (5,)
    # of two components that differ by a tenth, the larger one wins by more when K is larger
    for count, time, low, high in ((2, 1.0, 1.0999, 1.1001), (3, 4.4, 10, float("inf"))):
        large, small = (dy.constant_drive(s, 1.0, count, time).item() for s in (0.011, 0.01))
        assert low < large / small < high


@pytest.mark.parametrize("model", MODELS)
def test_few_components_mean_near_low_rank(model):
    """Law 6: the bound holds, and what is kept has the rank it should."""
    dense, nodes = model.to_tensor().detach(), list(model.local_components())
    for count in (0, 1, 2):
        kept = dy.keep_components(model, count)
        distance = (kept.to_tensor().detach() - dense).abs().square().sum().sqrt()
        assert distance <= dy.distance_bound(model, count) * (1 + 1e-12)
        ranks = tnreg.hierarchical_rank(kept, rtol=1e-10)
        for node, child in ((v, c) for v in nodes for c in model.tree.children(v)):
            assert ranks[child] <= count, (node, child)
    assert dy.distance_bound(model, 99).item() == 0.0
    assert torch.equal(dy.keep_components(model, dict.fromkeys(nodes[:1], 99)).to_tensor(), dense)


def drift(tree, make, steps):
    """What some steps of an optimizer change of the conserved quantities."""
    model = zoo.model_of(zoo.TREES[tree])
    task, before, optimizer = task_of(model), model.component_norms(), make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model).backward()
        optimizer.step()
    return dy.conservation_drift(before, model.component_norms()).item()


@pytest.mark.parametrize(
    ("optimizer", "order"), [(torch.optim.SGD, 2), (tnreg.GroupRMSprop, 2), (torch.optim.Adam, 1)]
)
def test_one_common_step_size_conserves_to_second_order(optimizer, order):
    coarse, fine = (drift("uneven", lambda p, h=h: optimizer(p, lr=h), 2) for h in (1e-3, 5e-4))
    assert 0.95 * 2**order < coarse / fine < 1.05 * 2**order


def test_momentum_does_not_conserve():
    """Over a fixed time of the flow plain descent halves the drift by halving the step."""
    plain, heavy = (
        [drift("htf-4", lambda p, n=n, m=m: torch.optim.SGD(p, lr=0.02 / n, momentum=m), n)
         for n in (200, 400)] for m in (0.0, 0.99)
    )  # fmt: skip
    assert 1.8 < plain[0] / plain[1] < 2.2
    assert heavy[1] > 20 * plain[1]


def test_nothing_is_changed():
    model = zoo.model_of(zoo.TREES["htf-4"])
    loss, before = task_of(model).loss, model.to_tensor().detach()
    loss(model).backward()
    gradients = {v: g.clone() for v, g in model.gradients.items()}
    for call in (dy.predicted_rate, dy.measured_rate, dy.rate_bounds, dy.component_drive):
        call(model, loss)
    dy.keep_components(model, 1)
    assert torch.equal(model.to_tensor(), before)
    assert all(torch.equal(g, gradients[v]) for v, g in model.gradients.items())


def test_dead_components_stay():
    model = zoo.model_of(zoo.TREES["htf-4"])
    model.load_weights({0: torch.zeros_like(model.weights[0])})
    loss = task_of(model).loss
    for form in ("exact", "balanced"):
        assert dy.predicted_rate(model, loss, form=form)[(0, 1)].abs().max() == 0


@pytest.mark.parametrize("model", [p for p in MODELS if p.id.split("-")[0] in ("cp", "mixed", "one")])
def test_flow_conserves_and_descends(model):
    """Law 1 to rounding, also of complex weights; the loss falls at the rate of the squared gradient."""
    model, task = copy.deepcopy(model), task_of(model)
    before = model.component_norms()
    run = dy.flow(model, task.loss, [0, 0.1, 0.2], observe={"end": Factorization.to_tensor})
    scale = max(norms.square().max().item() for norms in before.values())
    assert dy.conservation_drift(before, model.component_norms()) < 1e-10 * scale
    assert (run["loss"][1:] < run["loss"][:-1]).all() and run["flow time"].tolist() == [0, 0.1, 0.2]
    assert run.steps[0] == 0 and (run.steps[1:] > run.steps[:-1]).all() and run.stop_reason == "times"
    assert torch.equal(torch.as_tensor(run["end"][-1]), model.to_tensor())


@pytest.mark.parametrize("vectors", [2, 3, 5])
def test_flow_solves_a_constant_drive(vectors):
    """Law 5 with a loss that pulls at one entry."""
    model = Factorization(ModeTree.star(vectors), 1, 1, root="ones", std=0.0, dtype=torch.float64)
    model.load_weights(dict.fromkeys(model.weights, torch.full((1, 1), 0.5 ** (1 / vectors)).double()))
    sigma, times = model.to_tensor().item(), torch.linspace(1, 1.4, 3)
    run = dy.flow(model, lambda m: -m.to_tensor().sum(), times, observe={"x": lambda m: m.to_tensor().sum()})
    wanted = dy.constant_drive(sigma, 1.0, vectors, times - 1)
    assert run["x"] == pytest.approx(wanted.tolist(), rel=1e-8)


def test_descent_approaches_the_flow_linearly():
    """Halving the step halves how far gradient descent is from the flow after the same time."""
    start = zoo.model_of(zoo.TREES["uneven"])
    task, end = task_of(start), copy.deepcopy(start)
    dy.flow(end, task.loss, [0, 1])

    def apart(steps):
        model = copy.deepcopy(start)
        tnreg.fit(model, task.loss, steps=steps, optimizer="sgd", lr=1 / steps, progress=False)
        return (model.to_tensor() - end.to_tensor()).norm().item()

    assert 1.9 < apart(50) / apart(100) < 2.1


@pytest.mark.slow
def test_flow_ends_where_it_must(monkeypatch):
    start = zoo.model_of(zoo.TREES["cp-4"])
    ends = {"half": lambda run: "half" if run["loss"][-1] < run["loss"][0] / 2 else False, "stop": len}
    for reason, stop in ends.items():
        model, task = copy.deepcopy(start), task_of(start)
        assert dy.flow(model, task.loss, range(9), stop=stop).stop_reason == reason
    one = zoo.model_of(ModeTree.star(3), sizes=1, bonds=1, root="ones")
    run = dy.flow(one, lambda m: -m.to_tensor().square().sum(), [0, 9])  # infinite before
    assert run.stop_reason == "the flow cannot be followed beyond time 0" and len(run) == 1
    assert dy.flow(one, lambda m: m.norm() * torch.inf, [0, 1]).stop_reason == "the loss became inf at time 0"
    model = copy.deepcopy(start)
    model.stacks[0].requires_grad_(False)
    dy.flow(model, task_of(model).loss, [0, 1])
    assert torch.equal(model.stacks[0], start.stacks[0]) and not torch.equal(model.stacks[1], start.stacks[1])
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(OptionError, match=r"needs torchdiffeq: pip install 'tnreg\[flow\]'"):
        dy.flow(model, task_of(model).loss, [0, 1])


HTF = zoo.model_of(zoo.TREES["htf-4"])
LOSS = task_of(HTF).loss
test_refuses = refuses([
    (lambda: dy.predicted_rate(HTF, LOSS, form="x"), "unknown form 'x'"),
    (lambda: dy.predicted_singular_rate(HTF, LOSS), "has order 4"),
    (lambda: dy.keep_components(HTF, {0: 1}), "node 0 has no diagonal join"),
    (lambda: dy.distance_bound(HTF, -1), "ranks must be an integer >= 0"),
    (lambda: dy.conservation_drift({}, {}), "nothing to conserve"),
    (lambda: dy.constant_drive(1.0, 1.0, 0, 1.0), "vectors must be an integer >= 1"),
    (lambda: dy.flow(HTF, LOSS, [1, 0]), r"times must be increasing numbers, found \[1, 0\]"),
    (lambda: dy.flow(HTF, LOSS, [[0, 1]]), "times must be increasing numbers"),
    (lambda: dy.flow(HTF, LOSS, [0, 1j]), "times must be increasing numbers"),
    (lambda: dy.flow(HTF, LOSS, []), "times must be increasing numbers"),
    (lambda: dy.flow(HTF, LOSS, [0], observe={"flow time": len}), "'flow time' is taken"),
    (lambda: dy.flow(HTF, LOSS, [0], observe={"x": 3}), "flow: 'x' must be a function"),
    (lambda: dy.flow(HTF, LOSS, [0, 1], rtol=0), "flow: rtol must be"),
    (lambda: dy.flow(HTF, lambda m: 3.0, [0, 1]), r"flow: loss\(model\) must return a real scalar"),
    (lambda: dy.flow(HTF, Factorization.to_tensor, [0]), r"a real scalar(.|\n)*shape \(2, 3, 5, 7\)"),
    (lambda: dy.flow(copy.deepcopy(HTF).requires_grad_(False), LOSS, [0]), "no parameters that are trained"),
], error=OptionError)  # fmt: skip


RATES = {
    "predicted": dy.predicted_rate,
    "drive": dy.component_drive,
    "measured": dy.measured_rate,
    "bounds": lambda *given: {v: torch.stack(pair) for v, pair in dy.rate_bounds(*given).items()},
    "singular": lambda *given: {"": dy.predicted_singular_rate(*given)},
}


@pytest.mark.parametrize("name", RATES)
def test_rates_wherever_gradients_are_off(name):
    """In inference mode, of frozen models and of those made there, the same; of NaN NaN or an error."""
    model = zoo.model_of(zoo.TREES["matrix"])
    task, rates = task_of(model), RATES[name]
    expected, frozen = rates(model, task.loss), copy.deepcopy(model).requires_grad_(False)
    with torch.inference_mode():
        made = zoo.model_of(zoo.TREES["matrix"])
        found = [rates(m, task.loss) for m in (model, made)]
    for one in [*found, rates(made, task.loss), rates(frozen, task.loss)]:
        assert all(torch.allclose(one[v], expected[v]) for v in expected)
    with torch.no_grad():
        model.stacks[0][..., 0] = torch.nan
    if name == "singular":
        with pytest.raises(DataError, match="the end matrix has NaN"):
            rates(model, task.loss)
    else:
        assert any(part.isnan().any() for part in rates(model, task.loss).values())


def test_constant_drive_of_nan_is_nan():
    for given in ((torch.nan, 1.0), (0.5, torch.nan)):
        assert all(dy.constant_drive(*given, count, 1.0).isnan() for count in (1, 2, 3))
