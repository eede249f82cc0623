"""Completion: what is taken and held out, what is found and how sure it is, what is refused and warned of."""

import math

import numpy as np
import pandas
import pytest
import torch
import xarray
import zoo

from tnreg import completion, load_tensor
from tnreg.recovery.holdout import hold_out, interval
from tnreg.recovery.known import read_known
from tnreg.tensors.loading import load_entries
from tnreg.training.tasks import Sensing, relative_error

SIZES = (3, 4, 5)


def draw(sizes, count, seed=0):
    """Different multi-indices."""
    flat = torch.randperm(math.prod(sizes), generator=zoo.random(seed))[:count]
    return torch.stack(torch.unravel_index(flat, sizes), 1)


def kept(part, whole, modes):
    """Which multi-indices at these modes are in the whole several times, and which of all are in the part."""
    rows, counts = torch.unique(whole.index[:, modes], dim=0, return_counts=True)
    found = set(map(tuple, part.index[:, modes].tolist()))
    return [tuple(row) in found for row in rows.tolist()], (counts > 1).tolist()


@pytest.mark.parametrize(("sizes", "count"), [
    ((30, 30), 200), ((10, 10, 10), 150), ((4, 5, 6, 7), 700), ((5,) * 6, 400), ((3,) * 30, 900),
])  # fmt: skip
def test_held_out_samples_leave_something_of_every_slice_and_fibre(sizes, count):
    index = draw(sizes, count) if len(sizes) < 30 else zoo.random_index(sizes, count)
    task = completion(index=index, values=zoo.randn(count), sizes=sizes)
    train, held = hold_out(task, 0.1, zoo.random(1))
    assert len(held.values) == count // 10 and len(train.values) == count - count // 10
    both = torch.cat([train.index, held.index])
    assert torch.equal(both.unique(dim=0), index.unique(dim=0))
    for mode in range(len(sizes)):
        assert all(kept(train, task, [mode])[0])
        there, several = kept(train, task, [n for n in range(len(sizes)) if n != mode])
        assert all(np.array(there)[several])
    again, other = (hold_out(task, 0.1, zoo.random(seed))[1] for seed in (1, 2))
    assert torch.equal(held.index, again.index) and not torch.equal(held.index, other.index)


def test_how_many_are_held_out():
    for sizes, wanted in (((10, 20), 20), ((5, 10), 10), ((3, 8), 8), ((2,), 1)):
        _, held = hold_out(read_known(zoo.randn(*sizes))[0], 0.1, zoo.random())
        assert len(held.values) == wanted
    # one entry in every row and column: nothing can be held out without losing some
    task = completion(index=torch.arange(9).expand(2, 9).T, values=zoo.randn(9), sizes=(9, 9))
    assert len(hold_out(task, 0.1, zoo.random())[1].values) == 3


def test_interval_holds_the_error_of_the_population():
    """In some 95 of 100 cases."""
    truth, noise = zoo.randn(60, 300, seed=1), 0.1 * zoo.randn(60, 300, seed=2)
    wanted, hits = relative_error(truth + noise, truth), 0
    for x, off in zip(truth, noise, strict=True):
        low, high = interval(x + off, x, zoo.random())
        assert low < relative_error(x + off, x) < high
        hits += low < wanted < high
    assert 52 <= hits <= 59
    x, off = truth.reshape(-1), noise.reshape(-1)  # in groups
    low, high = interval(x + off, x, zoo.random())
    assert low < wanted < high < 1.03 * low
    assert interval(x, x, zoo.random()) == (0, 0)
    assert interval(x * 0, x * 0, zoo.random()) == (0, 0)


def known(dtype=torch.float64):
    x = zoo.randn(*SIZES, dtype=dtype)
    return x, torch.where(zoo.randn(*SIZES, seed=1) > 0, x, torch.nan)


def test_what_is_taken(tmp_path):
    """All forms of the same entries are the same task."""
    x, gaps = known()
    mask = torch.isnan(gaps).numpy()
    index = (~torch.isnan(gaps)).nonzero()
    values = x[tuple(index.T)]
    frame = pandas.DataFrame(index.numpy(), columns=["a", "b", "c"]).assign(value=values.numpy())
    np.save(tmp_path / "gaps.npy", gaps.numpy())
    frame.to_csv(tmp_path / "gaps.csv", index=False)
    wanted = completion(gaps, 0.999999, missing="nan")  # all of them
    tested = completion(index=index, values=values, sizes=SIZES, test_index=index[:1], test_values=values[:1])
    for task in (
        gaps, gaps.numpy(), gaps.numpy().tolist(), np.ma.array(x.numpy(), mask=mask), frame, tested,
        xarray.DataArray(gaps.numpy(), dims=("a", "b", "c")), load_tensor(tmp_path / "gaps.npy"),
        str(tmp_path / "gaps.npy"), tmp_path / "gaps.csv", load_entries(tmp_path / "gaps.csv"),
    ):  # fmt: skip
        (found, notes) = read_known(task)
        assert not notes and found.sizes == SIZES and found.test_values is None
        assert torch.equal(found.index, index) and torch.equal(found.values, values), type(task)
    found, _ = read_known(None, index, np.ma.array(values.numpy(), mask=False), SIZES)
    assert torch.equal(found.values, values) and len(wanted.values) == len(values)
    counts, _ = read_known(np.arange(60).reshape(SIZES))
    assert counts.values.dtype == torch.float64 and len(counts.values) == 60
    for dtype, kind in ((torch.float16, torch.float32), (torch.complex64, torch.complex64)):
        assert read_known(known(dtype)[0])[0].values.dtype == kind
    features = [part.int() for part in zoo.random_features((2, 3), 9)]
    assert read_known(Sensing(features, torch.arange(9)))[0].features[1].dtype == torch.float64


def test_entries_that_are_there_twice():
    index, values = draw(SIZES, 20), zoo.randn(20)
    twice = torch.cat([index, index[:5]])
    found, notes = read_known(None, twice, torch.cat([values, values[:5]]), SIZES)
    assert torch.equal(found.index, index) and torch.equal(found.values, values) and not notes
    found, [note] = read_known(None, twice, torch.cat([values, values[:5] + 2]), SIZES)
    assert torch.equal(found.index, index) and "5 entries are there several times" in note
    zoo.assert_close(found.values, values + torch.cat([torch.ones(5), torch.zeros(15)]))
    frame = pandas.DataFrame({"a": ["x", "x", "y"], "b": [0, 0, 1], "value": [1.0, 3.0, np.nan]})
    found, [note] = read_known(pandas.concat([frame, frame.iloc[:1].assign(b=1)]))
    assert found.values.tolist() == [2.0, 1.0] and found.sizes == (2, 2)
