"""Cross approximation: exact along any tree, few evaluations, none twice, and an honest error."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses
from zoo import TREES, all_index, assert_close, model_of, random_index, trees

import tnreg
from tnreg import DataError, ModeTree, OptionError, ShapeError, SizeError, TreeError
from tnreg.search.cross import cross as loud


def cross(*given, **more):
    return loud(*given, **more, progress=False)


def hilbert(index):
    return 1 / (1 + index.double().sum(1))


def borehole(index):
    """Surjanovic and Bingham's function of eight variables, each on 32 points."""
    low = torch.tensor([0.05, 100, 63070, 990, 63.1, 700, 1120, 9855], dtype=torch.float64)
    high = torch.tensor([0.15, 50000, 115600, 1110, 116, 820, 1680, 12045], dtype=torch.float64)
    rw, r, tu, hu, tl, hl, length, kw = (low + (high - low) * index / 31).unbind(1)
    log = (r / rw).log()
    return 2 * math.pi * tu * (hu - hl) / (log * (1 + 2 * length * tu / (log * rw**2 * kw) + tu / tl))


class Counted:
    """A function that remembers what it was asked for."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, index):
        assert index.dtype == torch.int64
        self.asked += map(tuple, index.tolist())
        values = self.function(index)
        index.zero_()  # it is the function's own
        return values


def assert_exact(model, tree):
    counted = Counted(model.entries)
    found = cross(counted, model.sizes, tree)
    assert found.model.tree == tree and found.model.network.named_joins.keys() == set(tree.interior)
    assert_close(found.model.to_tensor(), model.to_tensor(), 1e-10)
    assert found.error <= 1e-10 and len(counted.asked) == len(set(counted.asked)) == found.evaluations
    ranks = tnreg.hierarchical_rank(model.to_tensor(), tree, rtol=1e-9)
    assert {v: found.model.weights[v].shape[-1] for v in ranks} == ranks


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_low_rank_is_exact_with_its_ranks(name, dtype):
    assert_exact(model_of(TREES[name], "full", dtype=dtype), TREES[name])


@pytest.mark.slow
@given(trees(), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_low_rank_is_exact_along_random_trees(tree, seed):
    assert_exact(model_of(tree, "full", bonds={v: 2 for v in tree.nodes[:-1]}, seed=seed), tree)


def test_evaluations_are_few_times_the_degrees_of_freedom():
    model = model_of(ModeTree.binary(8), sizes=32, bonds={v: 3 for v in ModeTree.binary(8).nodes[:-1]})
    found = cross(model.entries, model.sizes, model.tree, rtol=1e-10)
    numbers = sum(w.numel() for w in found.model.weights.values())
    assert found.error < 1e-12 and found.evaluations < numbers + 300


@pytest.mark.parametrize("seed", range(3))
def test_the_borehole_function(seed):
    """Others take some 50,000 evaluations for it (benchmarks/complete_cross.py)."""
    found = cross(borehole, (32,) * 8, seed=seed)
    index = random_index((32,) * 8, 20_000, seed=7)
    wanted = borehole(index)
    error = float((found.model.entries(index) - wanted).detach().norm() / wanted.norm())
    assert error / 3 < found.error <= 1e-6 and error < 2e-6 and found.evaluations < 1_700
    assert found.history["evaluations"][-1] <= found.evaluations
    assert found.history["ranks"][0][-1] == found.model.weights[0].shape[1]
    assert found.history.stop_reason == "rtol" and "error" in repr(found)


@pytest.mark.parametrize(
    ("function", "sizes", "tree"),
    [
        (hilbert, (16,) * 4, None),
        (hilbert, (10,) * 5, ModeTree.caterpillar(5)),
        (lambda i: (i.double() ** 2).sum(1).sqrt(), (12,) * 4, None),
        (lambda i: (i * 0.5 ** torch.arange(1, 16).double()).sum(1).mul(9).sin(), (2,) * 15, None),
        (lambda i: (i == i[:, :1]).all(1), (4,) * 4, None),  # few are not zero
        (lambda i: i.sum(1) > 12, (9,) * 3, None),  # of full rank
    ],
)
def test_the_error_is_honest(function, sizes, tree):
    found = cross(function, sizes, tree)
    wanted = function(all_index(sizes)).double()
    error = float((found.model.to_tensor().flatten() - wanted).detach().norm() / wanted.norm())
    # a corner that few random entries are in may be worse than they say
    assert found.error <= 1e-6 and error <= 100 * max(found.error, 1e-15)


@pytest.mark.slow
def test_a_better_tree_is_found():
    """Pairs that are apart in the order of the modes: a fourth of the evaluations of the binary tree."""

    def function(index):
        u = index.double() / 15
        return sum((3 * u[:, i] * u[:, j]).cos() for i, j in ((0, 7), (1, 4), (2, 9), (3, 6), (5, 8)))

    found = cross(function, (16,) * 10)
    along = cross(function, (16,) * 10, ModeTree.binary(10))
    assert found.error < 1e-6 and found.evaluations < along.evaluations / 3
    assert {(0, 7), (2, 9)} <= set(found.model.tree.nodes)
    assert len(found.history["ranks"]) == len(found.model.tree.nodes) - 1


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1.0, 1e150, 1e300])
def test_scales_make_no_difference(scale):
    found = cross(lambda i: scale * hilbert(i), (9,) * 4)
    plain = cross(hilbert, (9,) * 4)
    assert found.evaluations == plain.evaluations and found.error <= 1e-6
    assert_close(found.model.to_tensor() / scale, plain.model.to_tensor(), 1e-8)


def test_huge_tensors():
    def function(index):
        return (index * 0.5 ** torch.arange(1, 65).double()).sum(1).exp()

    found = cross(function, (2,) * 64)
    assert found.error < 1e-12 and found.evaluations < 1_500


@pytest.mark.parametrize("sizes", [(1,), (7,), (1, 1, 1), (1, 5, 1, 6), (40, 30)])
def test_small_orders_and_sizes(sizes):
    found = cross(lambda i: (0.1 * i.sum(1).double()).cos(), sizes)
    assert found.error < 1e-12 and found.model.sizes == sizes
    assert_close(found.model.to_tensor().flatten(), (0.1 * all_index(sizes).sum(1).double()).cos(), 1e-12)


@pytest.mark.parametrize(
    "as_given", [lambda x: x, lambda x: x.numpy(), lambda x: x.tolist(), lambda x: x.float().requires_grad_()]
)
def test_functions_may_give_any_numbers(as_given):
    assert cross(lambda i: as_given(1.0 + i.sum(1).double()), (5,) * 4).error < 1e-6


@pytest.mark.slow
def test_functions_may_run_on_dask():
    dask, array = pytest.importorskip("dask"), pytest.importorskip("dask.array")
    lazy = cross(lambda i: array.from_array(i.numpy(), chunks=(9, -1)).sum(1), (5,) * 4)
    delayed = cross(dask.delayed(lambda i: i.sum(1)), (5,) * 4)
    assert lazy.error == delayed.error < 1e-12


@pytest.mark.slow
def test_batches_are_bounded_and_the_seed_decides():
    def function(index):
        assert len(index) <= 7
        return hilbert(index)

    found, again, other = (
        cross(function if k else hilbert, (8,) * 4, batch=7 if k else 9999, seed=k // 2) for k in range(3)
    )
    assert torch.equal(found.model.to_tensor(), again.model.to_tensor())
    assert not torch.equal(found.model.to_tensor(), other.model.to_tensor())


def test_a_budget_gives_what_it_reaches():
    with pytest.warns(UserWarning, match=r"max_evaluations=400 stopped it at an error of"):
        found = cross(hilbert, (10,) * 6, max_evaluations=400)
    index = random_index((10,) * 6, 5000)
    error = float((found.model.entries(index) - hilbert(index)).detach().norm() / hilbert(index).norm())
    assert found.evaluations <= 400 and error / 2 < found.error < 2 * error < 1
    assert cross(hilbert, (3,) * 3, max_evaluations=27).error < 1e-14


def test_rounding_ends_it():
    assert cross(hilbert, (8,) * 3, rtol=0).error < 1e-13
    with pytest.warns(UserWarning, match=r"rounding stopped it at an error of .* instead of 1.0e-16"):
        cross(hilbert, (9,) * 3, rtol=1e-16)


def test_zeros_are_said_to_be_all_there_is():
    with pytest.warns(UserWarning, match="all 1000 entries looked at are zero"):
        found = cross(lambda i: torch.zeros(len(i)), (32,) * 8)
    assert found.model.norm() == 0 and found.error == 0


def test_errors_of_the_function_are_its_own():
    with pytest.raises(ZeroDivisionError):
        cross(lambda i: 1 / 0, (3, 4))


def at_eight(value):
    """A function that is wrong at one index in 20, and the first of them it was asked for."""
    return lambda i: torch.where(i.sum(1) == 8, value, i.sum(1).double())


one = torch.ones
test_refuses = refuses([
    (lambda: cross(at_eight(math.nan), (5,) * 4), DataError, r"gave nan at index \(\d, \d, \d, \d\)"),
    (lambda: cross(at_eight(math.inf), (5,) * 4), DataError, r"gave inf at index \(\d, \d, \d, \d\)"),
    (lambda: cross(lambda i: i, (5,) * 4), ShapeError, r"(?s)first is index \(\d.*found:    shape \(50, 4\)"),
    (lambda: cross(lambda i: 1.0, (5,) * 4), ShapeError, r"found:    shape \(\)"),
    (lambda: cross(lambda i: one(min(len(i), 9)), (5,) * 4), ShapeError, r"found:    shape \(9,\)"),
    (lambda: cross(lambda i: None, (5,) * 4), DataError, r"gave no numbers at index \(\d"),
    (lambda: cross(lambda i: ["x"] * len(i), (5,) * 4), DataError, "gave no numbers at index"),
    (lambda: cross(lambda i: one(len(i)) * (1 if len(i) > 9 else 1j), (9,) * 4), DataError, "gave complex"),
    (lambda: cross(3, (5, 5)), OptionError, "function must be callable, found 3"),
    (lambda: cross(hilbert, 5), ShapeError, "sizes must be one integer for each mode, found 5"),
    (lambda: cross(hilbert, ()), ShapeError, "sizes must be one integer for each mode"),
    (lambda: cross(hilbert, (5, 0)), ShapeError, "size of mode 1 must be a positive integer"),
    (lambda: cross(hilbert, (5, 5), [[0, 1], 2]), ShapeError, "2 mode sizes for a tree over 3 modes"),
    (lambda: cross(hilbert, (5, 5), 3), TreeError, "not a mode tree"),
    (lambda: cross(hilbert, (2,) * 70, ModeTree.star(70)), SizeError, "no more than 64"),
    (lambda: cross(hilbert, (5, 5), rtol=1), OptionError, r"rtol must be a number in \[0, 1\)"),
    (lambda: cross(hilbert, (5, 5), batch=0), OptionError, "batch must be an integer >= 1"),
    (lambda: cross(hilbert, (10,) * 6, max_evaluations=99), OptionError, "99 are too few .* takes 221"),
    (lambda: cross(hilbert, (5, 5), seed="x"), OptionError, "seed must be an integer"),
])  # fmt: skip
