"""Entrywise products that are rounded without being formed, against the exact product."""

from __future__ import annotations

import math

import pytest
import torch
import zoo

from tnreg import Factorization, ModeTree, OptionError, ShapeError, decompose, truncate
from tnreg import algebra as al
from tnreg.algebra import arithmetic, products

ROUTES = ["computed", "estimated"]


@pytest.fixture
def route(request, monkeypatch):
    """The error of the projection computed, or estimated."""
    if request.param == "estimated":
        monkeypatch.setattr(products, "_MOST_FLOPS", 0)
    return request.param


@pytest.fixture
def never_formed(monkeypatch):
    monkeypatch.setattr(arithmetic, "_LARGEST_PRODUCT", 0)


def dense(model):
    return model.to_tensor().detach()


def decaying(tree, size, rank, seed, dtype=torch.float64):
    """Singular values that fall by a half from one to the next, all of the bond in use."""
    model = Factorization(tree, size, rank, join="full", std=1.0, dtype=dtype,
                          generator=torch.Generator().manual_seed(seed))  # fmt: skip
    falling = 0.5 ** torch.arange(rank)
    weights = {
        v: w.detach() if v == tree.root else w.detach() * falling for v, w in model.weights.items()
    }
    return Factorization.from_weights(tree, weights, join="full")


def relative_error(found, one, other):
    """At any order: the norm of the difference to the exact product, by squares."""
    exact = al.hadamard(one, other)
    difference = al.subtract(exact, found)
    return math.exp(difference.log_norm().item() - exact.log_norm().item())


@pytest.mark.parametrize("most", [2**4, 2**7])
def test_large_intermediates_are_made_in_parts(most, never_formed, monkeypatch):
    tree = ModeTree.binary(4)
    one, other = (decaying(tree, 5, 4, seed) for seed in (1, 2))
    whole = al.hadamard(one, other, ranks=6)
    seen = []
    narrow = torch.Tensor.narrow
    monkeypatch.setattr(torch.Tensor, "narrow", lambda x, *at: (seen.append(at), narrow(x, *at))[1])
    monkeypatch.setattr(products, "_MOST_NUMBERS", most)
    found = al.hadamard(one, other, ranks=6)
    assert len(seen) > 20
    assert torch.allclose(
        dense(found), dense(whole), rtol=0, atol=1e-12 * float(dense(whole).norm())
    )
    assert relative_error(al.hadamard(one, other, rtol=1e-4), one, other) <= 1e-4


@pytest.mark.parametrize("route", ROUTES, indirect=True)
@pytest.mark.parametrize("name", zoo.TREES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_the_tolerance_is_kept(name, dtype, route, never_formed):
    tree = zoo.TREES[name]
    models = [zoo.model_of(tree, join, dtype=dtype) for join in zoo.joins_of(tree).values()]
    models.append(zoo.model_of(tree, root="ones", dtype=dtype, seed=5))
    for one, other in zip(models, [*models[1:], models[0]], strict=True):
        exact = dense(one) * dense(other)
        size = torch.linalg.vector_norm(exact)
        for rtol in (1e-10, 1e-2):
            found = al.hadamard(one, other, rtol=rtol)
            error = torch.linalg.vector_norm(dense(found) - exact)
            assert error <= rtol * size
            assert found.error_bound is None or error <= found.error_bound * (1 + 1e-9)


@pytest.mark.parametrize("route", ROUTES, indirect=True)
@pytest.mark.parametrize(
    "tree", [ModeTree.binary(8), ModeTree.caterpillar(8)], ids=["binary", "chain"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_products_too_large_to_be_formed(tree, dtype, route):
    """Millions of weights, on bonds hardly larger than the ranks of the product."""
    one, other = (decaying(tree, 4, 12, seed, dtype) for seed in (0, 1))
    exact = dense(one) * dense(other)
    size = torch.linalg.vector_norm(exact)
    for rtol in (1e-1, 1e-3, 1e-8):
        found = al.hadamard(one, other, rtol=rtol)
        error = torch.linalg.vector_norm(dense(found) - exact)
        assert error <= rtol * size
        assert (found.error_bound is None) == (route == "estimated" or rtol < 1e-6)
        if found.error_bound is not None:
            assert error <= found.error_bound <= 1.01 * rtol * size
        best = truncate(decompose(exact, tree, rtol=1e-10), rtol=rtol)
        assert sum(found.network.bonds) <= 1.3 * sum(best.network.bonds)


@pytest.mark.parametrize("route", ROUTES, indirect=True)
@pytest.mark.parametrize(
    "tree", [ModeTree.binary(64), ModeTree.caterpillar(64)], ids=["binary", "chain"]
)
def test_at_order_64(tree, route, never_formed):
    """The estimate holds where squares of narrow random tensors would vary by orders of magnitude."""
    for seed in range(3):
        one, other = (decaying(tree, 3, 5, 2 * seed + k) for k in (0, 1))
        found = al.hadamard(one, other, rtol=1e-2, seed=seed)
        assert max(found.network.bonds) < 25
        assert relative_error(found, one, other) <= 1e-2


@pytest.mark.parametrize("power", [-200, 200])
def test_at_order_1024_and_any_scale(power, never_formed):
    tree = ModeTree.binary(1024)
    one, other = (decaying(tree, 2, 2, seed) for seed in (0, 1))
    one = al.scale(al.scale(one, 10.0 ** (power / 2)), 10.0 ** (power / 2))
    found = al.hadamard(one, other, rtol=1e-3)
    assert all(bool(torch.isfinite(w).all()) for w in found.weights.values())
    assert relative_error(found, one, other) <= 1e-3


def test_columns_of_far_apart_scales(never_formed):
    """Scales of 1e150 and 1e-150 that meet again above, in both factors."""
    tree = ModeTree.binary(4)
    one = zoo.model_of(tree, "full")
    weights = {v: w.detach().clone() for v, w in one.weights.items()}
    weights[0][:, 0] *= 1e150
    weights[(0, 1)][0] /= 1e150
    found = al.hadamard(Factorization.from_weights(tree, weights), one, rtol=1e-8)
    exact = dense(one) ** 2
    assert torch.linalg.vector_norm(dense(found) - exact) <= 1e-8 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_products_that_vanish(route, never_formed):
    tree = ModeTree.binary(4)
    left, right = (
        decompose(torch.zeros(4, 4, 4, 4).double().index_fill(0, torch.tensor(rows), 1.0), tree)
        for rows in ([0, 1], [2, 3])
    )
    found = al.hadamard(left, right, rtol=1e-3)
    assert (
        torch.linalg.vector_norm(dense(found)) <= 1e-14 * left.norm().item() * right.norm().item()
    )
    zero = al.scale(left, 0.0)
    assert torch.equal(dense(al.hadamard(left, zero, rtol=1e-3)), torch.zeros(4, 4, 4, 4).double())


def test_ranks_alone_and_with_a_tolerance():
    tree = ModeTree.binary(8)
    one, other = (decaying(tree, 4, 12, seed) for seed in (0, 1))
    exact = dense(one) * dense(other)
    size = torch.linalg.vector_norm(exact)
    found = al.hadamard(one, other, ranks=8)
    best = truncate(decompose(exact, tree, rtol=1e-10), ranks=8)
    assert max(found.network.bonds) == 8 and found.error_bound is None
    error, least = (torch.linalg.vector_norm(dense(m) - exact) for m in (found, best))
    assert error <= 1.2 * least
    both = al.hadamard(one, other, ranks=8, rtol=1e-8)
    assert max(both.network.bonds) == 8 and both.error_bound is None
    bound = al.hadamard(one, other, ranks=8, rtol=1e-5).error_bound
    assert least <= bound and bound <= 2 * least
    assert max(al.hadamard(one, other, ranks={(0, 1): 2}, rtol=1e-2).network.bonds) > 2
    small = al.hadamard(one, other, rtol=0.3)
    assert torch.linalg.vector_norm(dense(small) - exact) <= 0.3 * size


def test_same_seed_same_result_and_dtype(never_formed):
    tree = ModeTree.binary(4)
    one, other = (decaying(tree, 4, 5, seed, torch.float32) for seed in (0, 1))
    first, again = (al.hadamard(one, other, rtol=1e-3, seed=3) for _ in range(2))
    assert first.dtype == torch.float32
    assert all(torch.equal(first.weights[v], again.weights[v]) for v in tree.nodes)
    mixed = al.hadamard(one, decaying(tree, 4, 5, 1, torch.complex128), rtol=1e-3)
    assert mixed.dtype == torch.complex128


def test_refuses(never_formed):
    one = zoo.model_of(ModeTree.star(4))
    with pytest.raises(ShapeError, match="same tree"):
        al.hadamard(one, zoo.model_of(ModeTree.binary(4)), rtol=1e-3)
    with pytest.raises(OptionError, match="rtol must be a number in"):
        al.hadamard(one, one, rtol=2.0)
    wide = Factorization(ModeTree.star(12), 12, 8, std=1.0, dtype=torch.float64)
    with pytest.raises(OptionError, match=r"(?s)a weight of .* entries at node .*fewer"):
        al.hadamard(wide, wide, rtol=1e-6)
