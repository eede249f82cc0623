"""Growth: exact tensors over any tree are found again with their ranks; limits hold; noise is not learned."""

import math

import pytest
import torch
import zoo
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

import tnreg
from tnreg import Factorization, ModeTree, complete, truncate
from tnreg.recovery.growth import _Search, count_numbers, degrees_of_freedom, grow
from tnreg.training.tasks import completion, relative_error


def sampled(x, share, seed=0):
    """Entries of a tensor, of mean square 1: those to train on and a tenth held out."""
    order = torch.randperm(x.numel(), generator=zoo.random(seed))[: math.ceil(share * x.numel())]
    index, values = torch.stack(torch.unravel_index(order, x.shape), 1), x.reshape(-1)[order]
    cut = len(order) // 10
    return [
        completion(index=index[p], values=values[p], sizes=x.shape) for p in (slice(cut, None), slice(cut))
    ]


def unit(model):
    x = model.to_tensor().detach()
    return x / x.abs().square().mean().sqrt()


def grown(x, tree, share=0.8, **options):
    return grow(*sampled(x, share), tree, generator=zoo.random(1), record=lambda row: None, **options)


@st.composite
def tensors(draw):
    """An exact tensor along a random tree of full joins, written with the bonds that it needs."""
    tree = draw(zoo.trees(most=4).filter(lambda tree: tree.order > 2))
    bonds = dict.fromkeys(tree.nodes[:-1], 2)
    model = Factorization(
        tree,
        6,
        bonds,
        join="full",
        std=1.0,
        dtype=torch.float64,
        generator=zoo.random(draw(st.integers(0, 99))),
    )
    return truncate(model, leaves="weights")


@pytest.mark.slow
@seed(3)
@settings(max_examples=6, deadline=None, database=None, phases=[Phase.generate])
@given(tensors())
def test_exact_tensors_are_found_along_their_trees(model):
    x = unit(model)
    found = grown(x, model.tree, join="full", adapt=("ranks",))
    assert relative_error(found.model.to_tensor().detach(), x) < 1e-7
    assert count_numbers(found.model) <= count_numbers(model)


@pytest.mark.slow
def test_noise_is_not_learned():
    tree = ModeTree([[0, 1], [2, 3]])
    exact = unit(
        Factorization(tree, 6, 2, join="full", std=1.0, dtype=torch.float64, generator=zoo.random(4))
    )
    noisy = exact + 0.05 * zoo.randn(6, 6, 6, 6, seed=5)
    found = grown(noisy, tree, 0.4, join="full", adapt=("ranks",))
    assert max(found.model.network.bonds) <= 2
    assert relative_error(found.model.to_tensor().detach(), exact) < 0.05 and 0.03 < found.error < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("join", ["full", "diagonal"])
def test_fixed_ranks_are_reached_and_kept(join):
    tree, x = ModeTree([[0, 1], 2]), zoo.randn(5, 5, 5)
    found = grown(x / x.square().mean().sqrt(), tree, join=join, ranks=3)
    assert set(found.model.network.named_bonds.values()) == {3} and found.model.tree == tree


def test_numbers_are_limited():
    x = zoo.randn(5, 5, 5)
    assert count_numbers(grown(x, ModeTree([[0, 1], 2]), max_numbers=25).model) <= 25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tree", "share"), [(ModeTree([[0, 1], [2, 3]]), 0.35), (None, 0.6)], ids=["given", "none"]
)
def test_a_better_tree_is_taken(tree, share):
    model = Factorization(
        ModeTree([[0, 2], [1, 3]]), 5, 3, join="full", std=1.0, dtype=torch.float64, generator=zoo.random(3)
    )
    x = unit(model)
    found = grown(x, tree, share, join="full")
    assert any(set(found.model.tree.modes_below(v)) in ({0, 2}, {1, 3}) for v in found.model.tree.interior)
    assert relative_error(found.model.to_tensor().detach(), x) < 1e-8


def test_what_differs_where_nobody_looked_strays():
    x = zoo.randn(6, 6)
    task, held = sampled(x, 0.5)
    search = _Search(task, held, None, None, zoo.random(), lambda row: None)
    same, other = (tnreg.decompose(y, ModeTree([0, 1]), leaves="weights") for y in (x, x.clone()))
    assert not search.strays(same, other)
    known = torch.cat([task.index, held.index])
    hidden = torch.ones(6, 6, dtype=torch.bool)
    hidden[tuple(known.T)] = False
    assert search.strays(tnreg.decompose(x + hidden, ModeTree([0, 1]), leaves="weights"), same)


@pytest.mark.parametrize("join", ["full", "diagonal"])
def test_degrees_of_freedom_are_those_of_the_tangent_space(join):
    tree = ModeTree([[0, 1], [2, 3]]) if join == "full" else ModeTree([0, 1, [2, 3]])
    model = Factorization(tree, 4, 2, join=join, std=1.0, dtype=torch.float64, generator=zoo.random(2))
    stacks = [s.detach() for s in model.stacks]

    def dense(*parts):
        return Factorization.viewing(model.network, list(parts)).to_tensor().reshape(-1)

    parts = torch.func.jacrev(dense, argnums=tuple(range(len(stacks))))(*stacks)
    rank = torch.linalg.matrix_rank(torch.cat([p.reshape(256, -1) for p in parts], 1), rtol=1e-9)
    assert rank == degrees_of_freedom(model)


def test_found_again_bit_for_bit():
    x = unit(Factorization(ModeTree.star(3), 4, 2, std=1.0, dtype=torch.float64, generator=zoo.random(1)))
    x[zoo.randn(4, 4, 4, seed=1) > 0.5] = math.nan
    one, other = (complete(x, seed=3, progress=False).model.to_tensor() for _ in range(2))
    assert torch.equal(one, other)
