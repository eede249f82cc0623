"""Plans as values: routes, printing, caching, and what is refused."""

import copy
import re
from collections import Counter

import opt_einsum
import pytest
import torch
import zoo

from tnreg import (
    DataError,
    Factorization,
    ModeTree,
    OptionError,
    ShapeError,
    SizeError,
    TnregError,
    algebra,
    plan,
)
from tnreg.networks import plan as plans
from tnreg.networks import scaled
from tnreg.networks.einsum import einsum, find_path
from tnreg.networks.network import Network
from tnreg.networks.scaled import Growth
from tnreg.networks.schedule import schedule

HTF = ModeTree.binary(4)
SOME = [p for p in zoo.zoo(bare=True) if p.id.startswith(("single-", "cp-4-", "one-child-root-", "uneven-"))]


EQUATIONS = """ab,bc,cd->ad ab,bc->ca ar,br,cr,r->abc gar,gbr,grs->gabs gbi,gbj,gijk->gbk bj,bj->b
    xbi,ybi->xy ib,bxi->x ab-> ab,c->c a,b->ba a,a->"""


@pytest.mark.parametrize("equation", EQUATIONS.split())
def test_einsum(equation):
    """Against torch, with operands in either memory order; steps and costs as opt_einsum counts them."""
    terms, generator = equation.split("->")[0].split(","), zoo.random()
    sizes = dict(zip(dict.fromkeys("".join(terms)), (2, 3, 4, 5, 6), strict=False))
    shapes = [tuple(sizes[letter] for letter in term) for term in terms]
    operands = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    expected, contraction = torch.einsum(equation, *operands), einsum(equation, *shapes)
    turned = [x.mT.contiguous().mT if x.ndim > 1 else x for x in operands]
    for result in (contraction(operands), contraction(turned)):
        assert result.shape == expected.shape and torch.allclose(result, expected)
    path, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto")
    assert contraction.cost.flops == info.opt_cost and len(contraction.steps) == len(path)
    assert contraction.cost.largest == info.largest_intermediate


def test_plans_are_cached_and_printed():
    model = Factorization(HTF, 8, 512)
    assert plan(model) is plan(model.network) is plan(Factorization(HTF, 8, 512))
    text = str(plan(model))
    assert text.startswith("plan: dense of an order-4 network by tree\n")
    assert "considered: tree 7.14e+07, opt_einsum" in text
    assert "(0, 1), (2, 3): " in text and "the weight itself, 8 rows" in text
    assert "32 samples" in str(plan(model, batch=32))
    path = str(plan(Factorization(ModeTree.binary(8), 2, 16, join="full"), batch=64))
    assert "by opt_einsum" in path and " x " in path
    assert "rows of the weight" in str(plan(model, index=zoo.random_index((8,) * 4, 3)))
    wide = Factorization(ModeTree.binary(16), 8, 64)
    assert "at distinct rows" in str(plan(wide, index=zoo.random_index((8,) * 16, 999)))


def test_route_by_counted_cost():
    """The published size goes by the dense tensor, one entry by the sample, long trees never dense."""
    model = Factorization(HTF, 8, 512)
    picked = torch.randperm(4096, generator=zoo.random())[:2048]
    index = torch.stack(torch.unravel_index(picked, (8,) * 4), 1)
    chosen = plan(model, index=index)
    assert chosen.route == "dense" and set(chosen.candidates) == {"dense", "distinct", "per-sample"}
    apart = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])  # nothing in common that could be shared
    assert plan(model, index=apart).route == "per-sample"
    long = Factorization(ModeTree.binary(64), 8, 16)
    few = zoo.random_index((8,) * 64, 500)
    assert "dense" not in plan(long, index=few).candidates
    deep = few.clone()
    deep[:, 2:] = deep[0, 2:]  # 64 distinct entries only
    assert plan(long, index=deep).route == "distinct"
    joins = plan(Factorization(ModeTree.binary(16), 8, 16, join="full"), batch=1024).joins
    assert [len(join.level.positions) for join in joins] == [16, 8, 4, 2, 1]
    assert all(join.level.block is not None for join in joins[1:])


@pytest.fixture
def searches(monkeypatch):
    """What opt_einsum is asked to search: (terms, most of them that share an index, how)."""
    for cached in (find_path, plans._plans, schedule):
        cached.cache_clear()
    asked, search = [], opt_einsum.contract_path

    def counted(equation, *shapes, optimize, **options):
        terms = equation.split("->")[0].split(",")
        shared = max(Counter(symbol for term in terms for symbol in term).values())
        asked.append((len(terms), shared, optimize))
        return search(equation, *shapes, optimize=optimize, **options)

    monkeypatch.setattr(opt_einsum, "contract_path", counted)
    return asked


@pytest.mark.parametrize("order", [4, 8, 14, 20, 1024])
@pytest.mark.parametrize(("kind", "join"), [
    ("star", "diagonal"), ("regular", "diagonal"), ("binary", "diagonal"), ("binary", "full"),
    ("caterpillar", "full"), ("chain", "diagonal"),
])  # fmt: skip
def test_planning_searches_little(kind, order, join, searches):
    """Never exhaustively over many tensors, and thousands of them not at all."""
    arguments = {"chain": [min(order, 400)], "regular": [order, 5]}.get(kind, [order])
    net = Network.build(getattr(ModeTree, kind)(*arguments), 2, 3, join=join)
    index = zoo.random_index(net.sizes, 50)
    for options in ({"batch": 50}, {"index": index}, {"index": index, "memory": "1GB"}):
        plan(net, **options)
    assert len(searches) < 100
    for terms, shared, how in searches:
        assert terms <= 1024 and (how == "auto" or (terms <= 12 and shared <= 5))


@pytest.mark.parametrize(("order", "join"), [(3, "full"), (10, "diagonal"), (100, "full")])
def test_what_is_alike_shares_a_search(order, join, searches):
    """Batches of similar sizes, in large networks of any size; indices of which only the values change."""
    model = Factorization(ModeTree.binary(order), 4, 3, join=join)
    plan(model, batch=7), plan(model, batch=100)
    del searches[:]
    assert [plan(model, batch=b).batch for b in (7, 8, 97, 128)] == [7, 8, 97, 128]
    assert order < 100 or plan(model, batch=5000).batch == 5000
    assert searches == []
    plans._row_costs.cache_clear()
    for seed in range(20):
        index = zoo.random_index(model.sizes, 500, seed=seed)
        index[:, : order // 2] %= 2
        plan(model, index=index)
    assert plans._row_costs.cache_info().misses <= 4 and len(searches) <= 12


def test_small_calls_plan_little(searches):
    """New batch sizes share plans and new indices of one kind schedules, by the same route as planned."""
    model = Factorization(ModeTree.binary(8), 4, 6, join="full")
    model(torch.ones(65, 8, 4)), model.entries(zoo.random_index(model.sizes, 300, seed=-1))
    del searches[:]
    before = schedule.cache_info().misses, plans._plans.cache_info().misses
    for k in range(20):
        model(torch.ones(66 + k, 8, 4))
        index = zoo.random_index(model.sizes, 300, seed=k)
        chosen = plan(model, index=index)
        assert torch.equal(model.entries(index), model.entries(chosen))
        assert chosen.candidates[chosen.route] == min(chosen.candidates.values())
    assert searches == [] and before == (schedule.cache_info().misses, plans._plans.cache_info().misses)


def test_an_index_changed_in_place_is_planned_again():
    model = zoo.model_of(HTF)
    index = zoo.random_index(model.sizes, 50)
    dense = model.to_tensor()
    for view, column, value in ((index, 0, 0), (index, 0, 1), (index.numpy(), 1, 2)):
        view[:, column] = value
        assert torch.allclose(model.entries(index), dense[tuple(index.T)])


def test_refuses_an_index():
    model = zoo.model_of(HTF)
    for index, error, message in (
        (torch.zeros(3, 4), DataError, "int64 tensor of shape .B, 4., found dtype torch.float32"),
        (torch.zeros(3, 4, dtype=torch.int32), DataError, "found dtype torch.int32"),
        ([[0, 0, 0, 0]], DataError, "found list"),
        (torch.zeros(4, dtype=torch.int64), ShapeError, r"found:    shape \(4,\)"),
        (torch.zeros(3, 5, dtype=torch.int64), ShapeError, r"expected: \(B, 4\)"),
        (torch.zeros(0, 4, dtype=torch.int64), DataError, "an empty batch"),
        (torch.tensor([[0] * 4, [0, 3, 0, 0]]), DataError, "row 1 has 3 at mode 1, whose size is 3"),
        (torch.tensor([[0, 0, -1, 0]]), DataError, "row 0 has -1 at mode 2"),
    ):
        for call in (model.entries, lambda index: plan(model, index=index)):
            with pytest.raises(error, match=message):
                call(index)


def test_refuses_plans():
    model = zoo.model_of(HTF)
    other = Factorization(HTF, model.sizes, 5, dtype=torch.float64)
    with pytest.raises(OptionError, match="cannot give the entries of this model"):
        other.entries(plan(model, index=zoo.random_index(model.sizes, 3)))
    with pytest.raises(OptionError, match="a plan of dense"):
        model.entries(plan(model))
    model = Factorization(ModeTree.binary(64), 8, 4)
    with pytest.raises(ShapeError, match=r"about 10\^58 entries"):
        model.to_tensor()
    index = zoo.random_index(model.sizes, 7)
    for error, message, what, options in (
        (TnregError, "batch must be an integer >= 1, found 0", model, {"batch": 0}),
        (OptionError, "batch= for inputs or index=", model, {"batch": 2, "index": index}),
        (OptionError, "expected a Factorization or its network, found Tensor", index, {}),
        (SizeError, "give more memory; one alone needs", model, {"batch": 3, "memory": 100}),
        (SizeError, "give more memory; one alone needs", model, {"index": index, "memory": 100}),
    ):
        with pytest.raises(error, match=message):
            plan(what, **options)
    assert model.entries(index).shape == (7,) and model(torch.randn(3, 64, 8)).shape == (3,)


def test_memory_chooses_the_route():
    """Entries of a wide star: the cheapest route holds 2.2e9 numbers, another one 1e8."""
    model = Factorization(ModeTree.star(6), 20, 2000)
    index = zoo.random_index(model.sizes, 100_000)
    free = plan(model, index=index)
    assert free.route == "distinct"
    less = plan(model, index=index, memory=free.held * 4 - 1)
    assert less.route == "dense" and less.held < free.held
    assert plan(model, index=index, memory=free.held * 4).route == "distinct"
    few, model = index[:50], Factorization(ModeTree.star(6), 20, 20, std=0.5, dtype=torch.float64)
    assert plan(model, index=few).route != "dense"
    assert torch.equal(model.entries(plan(model, index=few, memory="1GB")), model.entries(few))


@pytest.mark.parametrize("kind", ["dense", "batch", "entries"])
def test_what_does_not_fit_is_refused_before_it_is_made(kind, monkeypatch):
    model = Factorization(ModeTree.binary(8), 8, 16)
    x = torch.zeros(20_000, 8, 8)
    index = zoo.random_index(model.sizes, 40_000)
    call, options, advice = {
        "dense": (model.to_tensor, {}, "ask for model.entries"),
        "batch": (lambda: model(x), {"batch": 20_000}, "fewer samples at a time, here no more than"),
        "entries": (lambda: model.entries(index), {"index": index},
                    "fewer entries at a time, here no more than"),
    }[kind]  # fmt: skip
    chosen = plan(model, **options)
    monkeypatch.setattr("tnreg.machine.memory.available", lambda device: 2_000_000)
    monkeypatch.setattr("tnreg.machine.memory.NEVER_MIND", 0)
    # and nothing may be carried out
    monkeypatch.setattr("tnreg.factorizations.factorization.contract", None)
    for refused in (call, lambda: plan(model, memory=2_000_000, **options)):
        with pytest.raises(SizeError, match="would not fit into memory") as caught:
            refused()
        text = str(caught.value)
        found = re.search(r"needed: ([\d,]+) bytes", text)
        assert found and 2_000_000 < int(found[1].replace(",", "")) <= 4 * chosen.held
        assert "2,000,000 bytes (2 MB)" in text and advice in text
    if kind != "dense":  # and the number that it names does fit
        most = int(re.search(r"no more than (\d+)", text)[1])
        assert 100 < most < 40_000
        smaller = {"batch": most} if kind == "batch" else {"index": index[:most]}
        plan(model, memory=2_000_000, **smaller)


def test_another_route_is_taken_where_memory_is_short(monkeypatch):
    """Few entries of a wide tree: distinct sub-indices cost least, the dense tensor holds least."""
    model = Factorization(ModeTree.binary(8), 4, 60, std=0.3, dtype=torch.float64)
    index = zoo.random_index(model.sizes, 500)
    wanted = model.entries(index)
    first, *others = plans._plans_of_entries(model.network, index)
    smallest = min([first, *others], key=lambda p: p.held)
    assert smallest is not first
    monkeypatch.setattr("tnreg.machine.memory.available", lambda device: 8 * smallest.held)
    monkeypatch.setattr("tnreg.machine.memory.NEVER_MIND", 0)
    model._entry_plans.clear()
    assert torch.allclose(model.entries(index), wanted)
    assert model._entry_plans[0][1].route == smallest.route


@pytest.mark.parametrize("model", list(zoo.zoo(bare=True)))
def test_what_is_counted_is_held(model):
    """What autograd keeps of a forward pass, weights and features aside, is within what a plan counts."""
    features = zoo.random_features(model.sizes, 7, model.dtype)
    index = zoo.random_index(model.sizes, 40)
    item = model.dtype.itemsize
    for chosen, call in (
        (plan(model), model.to_tensor),
        (plan(model, batch=7), lambda: model(features)),
        (plan(model, index=index), lambda: model.entries(index)),
    ):
        given = {w.untyped_storage().data_ptr() for w in (*model.stacks, *features)}
        kept = {}

        def pack(x, given=given, kept=kept):
            if x.dtype == model.dtype and x.untyped_storage().data_ptr() not in given:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = call()
        copied = item * sum(stack.numel() for stack in model.stacks)  # for calls of several nodes
        copied += item * sum(part.numel() for part in features)
        assert sum(kept.values()) <= item * chosen.held + copied
        assert out.numel() <= chosen.peak <= chosen.held


def moved(model, spread, *, seed=0):
    """The same tensor by weights whose columns went up or down, by powers of two that their parents undo."""
    weights = {v: w.detach().clone() for v, w in model.weights.items()}
    for v in model.tree.interior:
        generator, leaves = zoo.random(seed), model.network.named_leaves
        children = [c for c in model.tree.children(v) if leaves.get(c) != "bare"]
        steps = [
            torch.randint(-spread, spread + 1, weights[c].shape[-1:], generator=generator) for c in children
        ]
        if v not in weights and steps:  # a root of ones: the last child undoes what the others did
            steps[-1] = -sum(steps[:-1]) if len(steps) > 1 else 0 * steps[0]
        for c, step in zip(children, steps, strict=True):
            weights[c] *= torch.exp2(step.double())
            if v in weights:
                full = model.network.joins[model.tree.position(v)] == "full"
                axis = model.tree.children(v).index(c) if full else 0
                shape = [-1 if k == axis else 1 for k in range(weights[v].ndim)]
                weights[v] *= torch.exp2(-step.double()).reshape(shape)
    net = model.network
    return Factorization.from_weights(net.tree, weights, join=net.named_joins, leaves=net.named_leaves)


@pytest.mark.parametrize("model", SOME)
def test_scaled_contractions_are_the_same(model, monkeypatch):
    """Values and gradients, with scales in use, of weights that scales alone keep in range, and of others."""
    monkeypatch.setattr(Growth, "may_show", lambda *arguments: True)
    index, features = zoo.random_index(model.sizes, 30), zoo.random_features(model.sizes, 5, model.dtype)
    found = []
    for other in (model, moved(model, 200)):
        values = other.to_tensor().reshape(-1), other.entries(index), other(features)
        gradients = torch.autograd.grad(torch.cat(values).abs().square().sum(), list(other.parameters()))
        found.append([*values, *(p * g.conj() for p, g in zip(other.parameters(), gradients, strict=True))])
    monkeypatch.undo()
    plain = model.to_tensor().reshape(-1), model.entries(index), model(features)
    for wanted, one, two in zip(plain, *found, strict=False):
        zoo.assert_close(one, wanted), zoo.assert_close(two, wanted)
    for one, two in zip(*found, strict=True):
        zoo.assert_close(two, one.detach(), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize(("kind", "join"), [
    ("star", "diagonal"), ("binary", "diagonal"), ("binary", "full"), ("caterpillar", "full"),
])  # fmt: skip
def test_unbalanced_weights(kind, join, dtype):
    """Half of the leaves 10^3 or more, the others 10^-3: all routes, samples on scales of their own too."""
    order, up = 64, 1e3 if dtype != torch.float64 else 1e12
    tree = getattr(ModeTree, kind)(order)
    plain = Factorization(tree, 2, 1, join=join, std=0.0, dtype=torch.float64)
    plain.load_weights({v: 1 + 0.3 * zoo.randn(*w.shape, seed=len(str(v))) for v, w in plain.weights.items()})
    scales = {n: up if n < order // 2 else 1 / up for n in range(order)}
    weights = {v: (w * scales.get(v, 1)).to(dtype) for v, w in plain.weights.items()}
    model = Factorization.from_weights(tree, weights, join=join)
    index, x = zoo.random_index(plain.sizes, 9), 1 + 0.3 * zoo.randn(9, order, 2)
    wanted, measured = plain.entries(index).detach(), plain(x).detach()
    found = model.entries(index)
    assert torch.allclose(found.real.double(), wanted, 1e-3)
    assert torch.allclose(model(x.to(dtype)).real.double(), measured, 1e-3)
    for n in range(order):
        x[::2, n] /= scales[n]
        x[1::2, n] *= scales[n]  # and of half of the samples what overflows twice
        x[1::2, order - 1 - n] *= scales[n]
    mixed = model(x.to(dtype)).real.double()
    assert torch.allclose(mixed, measured, 1e-3)
    found.abs().sum().backward()
    signs = model.weights[0].detach().conj() * model.gradients[0].to(dtype)
    assert torch.allclose(signs.sum().real.double(), wanted.abs().sum(), 1e-3)  # linear in each weight
    selected = algebra.select(model, tuple(index[0].tolist()))
    assert torch.allclose(selected.real.double(), wanted[0], 1e-3)
    part = algebra.select(model, (*index[0, :-3].tolist(), ...))
    assert torch.allclose(part.to_tensor()[tuple(index[0, -3:])].real.double(), wanted[0], 1e-3)


@pytest.mark.parametrize("kind", ["binary", "caterpillar"])
def test_unbalanced_weights_in_half_precision(kind):
    """Sums of exponents have more digits than these numbers."""
    tree = getattr(ModeTree, kind)(8)
    plain = zoo.model_of(tree, sizes=2, bonds=2, std=0.5).to(torch.bfloat16)
    scales = {n: 2.0 ** (66 + n) if n < 4 else 2.0 ** -(73 - n) for n in range(8)}  # +-66 to +-69
    weights = {v: w * scales.get(v, 1) for v, w in plain.weights.items()}
    model = Factorization.from_weights(tree, weights, join="diagonal")
    index, x, wanted = zoo.random_index((2,) * 8, 9), torch.ones(3, 8, 2), plain.double()
    for found, right in (
        (model.entries(index), wanted.entries(index)), (model(x.to(torch.bfloat16)), wanted(x.double())),
        (model.norm(), wanted.norm()), (model.inner(model), wanted.inner(wanted)),
    ):  # fmt: skip
        assert found.dtype == torch.bfloat16
        zoo.assert_close(found.double(), right, 0.1)


def test_scales_are_looked_at_again(monkeypatch):
    """When weights change: at once if it is no training, and whenever a result looks odd."""
    reads = []
    monkeypatch.setattr(scaled, "_mean_growth", lambda norm, count: reads.append(count) or 0.0)
    model, index = zoo.model_of(HTF), zoo.random_index(zoo.sizes_of(HTF), 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for _ in range(64):
        optimizer.zero_grad()
        model.entries(index).sum().backward()
        optimizer.step()
    assert len(reads) == 2 * len(model.stacks)
    with torch.no_grad():
        model.entries(index)
    model.load_weights({0: 2 * model.weights[0].detach()})
    model.entries(index)
    assert len(reads) == 4 * len(model.stacks)


def test_results_are_looked_at_again():
    """As often as the weights in a training; at once for another plan or other weights."""
    model = Factorization(ModeTree.star(8), 2, 1, std=0.0)
    model.load_weights({v: torch.ones(w.shape) for v, w in model.weights.items()})
    chosen, other = (plan(model, index=torch.full((1, 8), k)) for k in (0, 1))
    stacks = list(model.stacks)
    model.entries(chosen)
    for updates, clear in ((0, True), (32, True), (1, False)):
        for stack in stacks:
            for _ in range(updates):
                stack.detach().mul_(1)
        assert model._growth.is_clear(chosen, stacks) == clear
        assert not model._growth.is_clear(other, stacks)
    with torch.no_grad():  # both results are 1, on the way to the second are 1e-48 and 1e48
        stacks[0][:4, 1], stacks[0][4:, 1] = 1e-12, 1e12
    for _ in range(3):
        assert model.entries(chosen).item() == 1
    assert not model._growth.is_clear(chosen, stacks)
    assert model.entries(other).item() == pytest.approx(1)
    model.load_weights({0: torch.ones(2, 1), 7: torch.ones(2, 1)})
    assert model.entries(other).item() == pytest.approx(1)
    with torch.inference_mode():  # which counts no changes
        model = copy.deepcopy(model)
    for sign in (1, -1):
        assert model.entries(other).item() == pytest.approx(sign)
        with torch.inference_mode():
            model.stacks[0][0].neg_()


@pytest.mark.slow  # the compiler
@pytest.mark.parametrize(("tree", "options"), [
    (zoo.TREES["uneven"], {}), (zoo.TREES["one-child"], {"join": "full"}),
    (ModeTree.star(3), {"root": "ones"}), (ModeTree.caterpillar(5), {"join": "full", "sizes": (3,) * 5}),
])  # fmt: skip
def test_compiled_and_exported(tree, options):
    """As one graph for a batch of any size, with gradients, and for torch.export in both of its modes."""
    model = zoo.model_of(tree, **options)
    inputs = [zoo.random_features(model.sizes, count, seed=count) for count in (6, 4)]
    sizes = [{0: torch.export.Dim("samples", min=2, max=99)}] * tree.order
    if "sizes" in options:
        inputs, sizes = [torch.stack(x, 1) for x in inputs], sizes[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for x in inputs:
        wanted, found = (
            torch.autograd.grad(f(x).square().sum(), list(model.parameters())) for f in (model, compiled)
        )
        for one, two in zip(wanted, found, strict=True):
            zoo.assert_close(two, one)
    for strict in (True, False):
        program = torch.export.export(model, (inputs[0],), dynamic_shapes=(sizes,), strict=strict)
        zoo.assert_close(program.module()(inputs[1]), model(inputs[1]))
