"""Plans as values: routes, printing, caching, and what is refused."""

from __future__ import annotations

import re

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
    plan,
)
from tnreg.networks import plan as contraction
from tnreg.networks.einsum import einsum

HTF = ModeTree.binary(4)


def test_einsum_of_many_operands():
    generator = torch.Generator().manual_seed(0)
    for equation, shapes in [
        ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)]),
        ("ab,bc->ca", [(2, 3), (3, 4)]),
        ("ar,br,cr,r->abc", [(2, 5), (3, 5), (4, 5), (5,)]),
        ("gar,gbr,grs->gabs", [(2, 3, 4), (2, 5, 4), (2, 4, 6)]),
        ("gbi,gbj,gijk->gbk", [(2, 3, 4), (2, 3, 5), (2, 4, 5, 6)]),
        ("bj,bj->b", [(3, 4), (3, 4)]),
        ("xbi,ybi->xy", [(2, 3, 4), (5, 3, 4)]),
        ("ib,bxi->x", [(4, 3), (3, 2, 4)]),
        ("ab->", [(2, 3)]),
        ("ab,c->c", [(2, 3), (4,)]),
        ("a,b->ba", [(2,), (3,)]),
        ("a,a->", [(4,), (4,)]),
    ]:
        operands = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
        wanted = torch.einsum(equation, *operands)
        found = einsum(equation, *shapes)(operands)
        assert found.shape == wanted.shape and torch.allclose(found, wanted), equation
        turned = [x.mT.contiguous().mT if x.ndim > 1 else x for x in operands]
        assert torch.allclose(einsum(equation, *shapes)(turned), wanted), equation


def test_einsum_counts_as_opt_einsum_does():
    import opt_einsum

    for equation, shapes in [
        ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)]),
        ("ar,br,cr,r->abc", [(2, 5), (3, 5), (4, 5), (5,)]),
        ("gar,gbr,grs->gabs", [(2, 3, 4), (2, 5, 4), (2, 4, 6)]),
    ]:
        path, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto")
        found = einsum(equation, *shapes)
        assert found.cost.flops == info.opt_cost and found.cost.largest == info.largest_intermediate
        assert len(found.steps) == len(path)


def test_plans_are_cached_and_printed():
    model = Factorization(HTF, 8, 512)
    assert plan(model) is plan(model.network) is plan(Factorization(HTF, 8, 512))
    text = str(plan(model))
    assert text.splitlines()[0] == "plan: dense of an order-4 network by tree"
    assert "considered: tree 7.14e+07, opt_einsum" in text
    assert "(0, 1), (2, 3): " in text and "the weight itself, 8 rows" in text
    assert "32 samples" in str(plan(model, batch=32))
    path = str(plan(Factorization(ModeTree.binary(8), 2, 16, join="full"), batch=64))
    assert "by opt_einsum" in path and " x " in path
    index = zoo.random_index((8,) * 4, 3)
    assert "rows of the weight" in str(plan(model, index=index))
    assert "at distinct rows" in str(
        plan(Factorization(ModeTree.binary(16), 8, 64), index=zoo.random_index((8,) * 16, 999))
    )


def test_route_by_counted_cost():
    """The published size goes by the dense tensor, one entry by the sample, long trees never dense."""
    model = Factorization(HTF, 8, 512)
    picked = torch.randperm(4096, generator=torch.Generator().manual_seed(0))[:2048]
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


def test_equal_nodes_are_one_call():
    joins = plan(Factorization(ModeTree.binary(16), 8, 16, join="full"), batch=1024).joins
    assert [len(join.level.positions) for join in joins] == [16, 8, 4, 2, 1]
    assert all(join.level.block is not None for join in joins[1:])


def test_entries_plan_is_for_its_own_network():
    model = zoo.model_of(HTF)
    other = Factorization(HTF, model.sizes, 5, dtype=torch.float64)
    with pytest.raises(OptionError, match="cannot give the entries of this model"):
        other.entries(plan(model, index=zoo.random_index(model.sizes, 3)))
    with pytest.raises(OptionError, match="a plan of dense"):
        model.entries(plan(model))


def test_an_index_changed_in_place_is_planned_again():
    model = zoo.model_of(HTF)
    index = zoo.random_index(model.sizes, 50)
    dense = model.to_tensor()
    assert torch.allclose(model.entries(index), dense[tuple(index.T)])
    index[:, 0] = 1 - index[:, 0]
    assert torch.allclose(model.entries(index), dense[tuple(index.T)])
    index.numpy()[:, 1] = 2
    assert torch.allclose(model.entries(index), dense[tuple(index.T)])


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.zeros(3, 4), DataError, "int64 tensor of shape .B, 4., found dtype torch.float32"),
        (torch.zeros(3, 4, dtype=torch.int32), DataError, "found dtype torch.int32"),
        ([[0, 0, 0, 0]], DataError, "found list"),
        (torch.zeros(4, dtype=torch.int64), ShapeError, r"found:    shape \(4,\)"),
        (torch.zeros(3, 5, dtype=torch.int64), ShapeError, r"expected: \(B, 4\)"),
        (torch.zeros(0, 4, dtype=torch.int64), DataError, "an empty batch"),
        (
            torch.tensor([[0, 0, 0, 0], [0, 3, 0, 0]]),
            DataError,
            "row 1 has 3 at mode 1, whose size is 3",
        ),
        (torch.tensor([[0, 0, -1, 0]]), DataError, "row 0 has -1 at mode 2"),
    ],
)
def test_refuses_an_index(index, error, message):
    model = zoo.model_of(HTF)
    with pytest.raises(error, match=message):
        model.entries(index)
    if isinstance(index, torch.Tensor):
        with pytest.raises(error, match=message):
            plan(model, index=index)


def test_refuses_what_cannot_be_dense():
    model = Factorization(ModeTree.binary(64), 8, 4)
    with pytest.raises(ShapeError, match=r"about 10\^58 entries"):
        model.to_tensor()
    with pytest.raises(TnregError, match="batch must be an integer >= 1, found 0"):
        plan(model, batch=0)
    with pytest.raises(OptionError, match="batch= for inputs or index= for entries"):
        plan(model, batch=2, index=zoo.random_index(model.sizes, 7))
    with pytest.raises(OptionError, match="expected a Factorization or its network, found Tensor"):
        plan(torch.zeros(2))
    assert model.entries(zoo.random_index(model.sizes, 7)).shape == (7,)
    assert model(torch.randn(3, 64, 8)).shape == (3,)


def test_memory_chooses_the_route():
    """Entries of a wide star: the cheapest route holds 2.2e9 numbers, another one 1e8."""
    model = Factorization(ModeTree.star(6), 20, 2000)
    index = torch.randint(20, (100_000, 6), generator=torch.Generator().manual_seed(0))
    free = plan(model, index=index)
    assert free.route == "distinct"
    less = plan(model, index=index, memory=free.held * 4 - 1)
    assert less.route == "dense" and less.held < free.held
    assert plan(model, index=index, memory=free.held * 4).route == "distinct"
    few = index[:50]
    model = Factorization(ModeTree.star(6), 20, 20, std=0.5, dtype=torch.float64)
    cheap = plan(model, index=few)
    assert (
        torch.equal(model.entries(plan(model, index=few, memory="1GB")), model.entries(few))
        and cheap.route != "dense"
    )


@pytest.mark.parametrize("kind", ["dense", "batch", "entries"])
def test_what_does_not_fit_is_refused_before_it_is_made(kind, monkeypatch):
    model = Factorization(ModeTree.binary(8), 8, 16)
    x = torch.zeros(200_000, 8, 8)
    index = torch.randint(8, (400_000, 8), generator=torch.Generator().manual_seed(0))
    calls = {
        "dense": (plan(model), model.to_tensor, {}),
        "batch": (plan(model, batch=200_000), lambda: model(x), {"batch": 200_000}),
        "entries": (plan(model, index=index), lambda: model.entries(index), {"index": index}),
    }
    chosen, call, options = calls[kind]
    needed = 4 * min(chosen.held, 8**8 if kind == "dense" else chosen.held)
    # there is some memory, but not enough
    monkeypatch.setattr(contraction, "available", lambda device: 20_000_000)
    monkeypatch.setattr(contraction, "NEVER_MIND", 0)
    monkeypatch.setattr(
        "tnreg.factorizations.factorization.contract", None
    )  # nothing may be carried out
    for refused in (call, lambda: plan(model, memory=20_000_000, **options)):
        with pytest.raises(SizeError, match="would not fit into memory") as caught:
            refused()
        text = str(caught.value)
        found = re.search(r"needed: ([\d,]+) bytes", text)
        assert found and 20_000_000 < int(found[1].replace(",", "")) <= max(needed, 4 * chosen.held)
        assert "20,000,000 bytes (20 MB)" in text
        advice = {"dense": "ask for model.entries", "batch": "fewer samples at a time, here no more than",
                  "entries": "fewer entries at a time, here no more than"}  # fmt: skip
        assert advice[kind] in text
    if kind != "dense":  # and the number that it names does fit
        most = int(re.search(r"no more than (\d+)", text)[1])
        assert 1000 < most < 400_000
        smaller = {"batch": most} if kind == "batch" else {"index": index[:most]}
        plan(model, memory=20_000_000, **smaller)


def test_not_even_one_sample():
    model = Factorization(HTF, 8, 16)
    for options in ({"batch": 3}, {"index": torch.zeros(3, 4, dtype=torch.int64)}):
        with pytest.raises(SizeError, match="give more memory; one alone needs"):
            plan(model, memory=100, **options)


def test_another_route_is_taken_where_memory_is_short(monkeypatch):
    """Few entries of a wide tree: distinct sub-indices cost least, the dense tensor holds least."""
    model = Factorization(ModeTree.binary(8), 4, 60, std=0.3, dtype=torch.float64)
    index = torch.randint(4, (500, 8), generator=torch.Generator().manual_seed(0))
    wanted = model.entries(index)
    first, *others = contraction._plans_of_entries(model.network, index)
    smallest = min([first, *others], key=lambda p: p.held)
    assert smallest is not first
    monkeypatch.setattr(contraction, "available", lambda device: 8 * smallest.held)
    monkeypatch.setattr(contraction, "NEVER_MIND", 0)
    seen = []
    carried_out = contraction.contract

    def watched(chosen, *rest):
        seen.append(chosen)
        return carried_out(chosen, *rest)

    monkeypatch.setattr("tnreg.factorizations.factorization.contract", watched)
    model._entry_plans.clear()
    assert torch.allclose(model.entries(index), wanted)
    assert [p.route for p in seen] == [smallest.route]


@pytest.mark.parametrize("model", list(zoo.zoo()))
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
