"""Completion: what is taken and held out, what is found and how sure it is, what is refused and warned of."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import xarray
import zoo
from command import call
from refusals import refuses

from tnreg import (
    DataError,
    FileError,
    ModeTree,
    OptionError,
    ShapeError,
    SizeError,
    Trajectory,
    TreeError,
    complete,
    completion,
    load,
    load_tensor,
)
from tnreg.recovery.growth import degrees_of_freedom
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


@pytest.mark.slow
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
    features = [part.half() for part in zoo.random_features((2, 3), 9)]
    tested = Sensing(features, torch.ones(9).half(), None, features, torch.ones(9).half())
    assert read_known(tested)[0].features[1].dtype == torch.float32


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


# What is found


TREE = ModeTree([[0, 1], 2])


def exact(sizes=(6, 5, 4), share=0.8, dtype=torch.float64, seed=0):
    """A tensor of ranks 1 and 2, and the same with gaps."""
    tree = ModeTree.caterpillar(len(sizes))
    model = zoo.model_of(tree, "full", sizes=sizes, bonds=2 if len(sizes) > 1 else 1, dtype=dtype, seed=seed)
    x = model.to_tensor().detach()
    x = x / x.abs().square().mean().sqrt()
    gaps = torch.rand(x.shape, generator=zoo.random(seed + 1)) > share
    return x, torch.where(gaps, torch.full_like(x, torch.nan), x)


def quiet(*arguments, **options):
    return complete(*arguments, **{"progress": False, **options})


def off(found, x):
    """Relative error of all entries by the model."""
    x = x if isinstance(x, torch.Tensor) else torch.as_tensor(x)
    return relative_error(found.model.to_tensor().detach(), x)


def test_gaps_are_filled():
    x, gaps = exact()
    found = quiet(gaps, TREE)
    assert off(found, x) < 1e-8 and found.error < 1e-8 and not found.notes
    assert found.ranks == {0: 2, 1: 2, (0, 1): 2, 2: 2} and found.tree == TREE
    assert found.interval[0] <= found.error <= found.interval[1] and 0.5 < found.mean_error < 2
    there = ~torch.isnan(gaps)
    assert torch.equal(found.completed()[there], x[there])
    assert torch.equal(found.completed(keep=False), found.model.to_tensor())
    rows = zoo.random_index(x.shape, 7)
    for index in (rows, rows.int().numpy(), rows.tolist()):
        zoo.assert_close(found.predict(index), x[tuple(rows.T)], 1e-7)
    assert relative_error(found.predictions, found.held.values) == pytest.approx(
        found.error, rel=1e-3, abs=1e-15
    )
    history = found.history
    assert {"numbers", "ranks", "train error", "held-out error", "action"} <= set(history.names)
    assert history["held-out error"].min() <= found.error * 1.1 + 1e-9 and len(history["ranks"][0]) == len(
        history
    )
    assert (
        repr(found).startswith("<Completed (6, 5, 4) from 98 samples: held-out error ")
        and found._repr_svg_().count("<svg") == 1
    )
    again = quiet(gaps, TREE)
    assert torch.equal(again.model.to_tensor(), found.model.to_tensor()) and again.interval == found.interval


@pytest.mark.parametrize(
    "unit", [1e-5, pytest.param(1e-150, marks=pytest.mark.slow), pytest.param(1e150, marks=pytest.mark.slow)]
)
def test_the_unit_of_the_data_changes_nothing(unit):
    x, gaps = exact()
    found, scaled = quiet(gaps, TREE), quiet(gaps * unit, TREE)
    assert scaled.ranks == found.ranks and off(scaled, x * unit) < 1e-8
    assert scaled.known.values.abs().max() == (gaps * unit).nan_to_num().abs().max()
    assert relative_error(scaled.predictions, scaled.held.values) < 1e-8


@pytest.mark.slow
def test_permuted_modes_are_the_same_tensor():
    x, gaps = exact()
    for order in ((2, 0, 1), (1, 2, 0)):
        assert off(quiet(gaps.permute(order)), x.permute(order)) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128, torch.complex64, torch.float16])
def test_kinds_of_numbers(dtype):
    x, gaps = exact(dtype=torch.float32 if dtype == torch.float16 else dtype, seed=2)
    found = quiet(gaps.to(dtype), TREE)
    assert found.model.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert off(found, x) < {torch.complex128: 1e-8, torch.float16: 5e-2}.get(dtype, 1e-3)


def test_arrays_of_xarray_come_back():
    _, gaps = exact((4, 5))
    array = xarray.DataArray(gaps.numpy(), dims=("a", "b"), coords={"a": list("wxyz")}, name="n")
    filled = quiet(array).completed()
    assert filled.dims == array.dims and list(filled.a) == list("wxyz") and not filled.isnull().any()
    assert filled.where(array.notnull()).equals(array)


def test_rank_one_measurements():
    x = exact((3, 4, 3))[0]
    features = zoo.random_features(x.shape, 200)
    values = torch.einsum("bi,bj,bk,ijk->b", *features, x)
    for unit in (1.0, 1e-60):
        found = quiet(Sensing([part * unit for part in features], values), TREE)
        assert found.error < 1e-8
        zoo.assert_close(found.predict([part[:5] * unit for part in features]), values[:5], 1e-7)
        zoo.assert_close(found.completed() * unit**3, x, 1e-6)


@pytest.mark.parametrize("x", [
    torch.ones(5, 4, 3), torch.zeros(5, 4, 3), 7 * torch.ones(1, 4, 1, 6),
    torch.outer(torch.arange(1, 9), torch.arange(1, 7)),
    pytest.param(torch.ones((2,) * 10), marks=pytest.mark.slow),
], ids=["ones", "zeros", "sizes of one", "integers", "order 10"])  # fmt: skip
def test_the_simplest_tensors(x):
    found = quiet(x if x.dtype == torch.int64 else x.double())
    assert found.error < 1e-6 and found.interval[1] < 1e-6
    zoo.assert_close(found.completed(keep=False), x.double(), 1e-6)
    assert x.ndim == 10 or set(found.ranks.values()) == {1}


# What is warned of


def warned(match, *arguments, **options):
    """The completion, which warns of something; its notes say the same."""
    with pytest.warns(UserWarning, match=f"complete: .*{match}"):
        found = quiet(*arguments, **options)
    assert any(re.search(match, note) for note in found.notes)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:complete")
def test_warnings():
    x, gaps = exact()
    warned("not predicted better", torch.arange(30) + 100)  # a vector has nothing to go by but its mean
    few = {"index": draw(x.shape, 10), "values": zoo.randn(10), "sizes": x.shape}
    warned("10 samples are fewer than the 13 degrees of freedom", **few, ranks=1)
    cut = gaps.clone()
    cut[:2], cut[:, :, 3] = torch.nan, torch.nan
    found = warned("2 of 6 at mode 0, 1 of 4 at mode 2", cut, TREE, ranks=2)
    assert bool(found.completed().isfinite().all())
    few["index"][1] = few["index"][0]
    warned("1 entries are there several times", **few, ranks=1)


def test_degrees_of_freedom():
    """The rank of the derivative of all entries by all weights."""
    for join in ("full", "diagonal"):
        for tree in [ModeTree.star(3), *[ModeTree.binary(4), ModeTree.caterpillar(4)] * (join == "full")]:
            model = zoo.model_of(tree, join, sizes=(4, 5, 4, 5)[: tree.order], bonds=2)
            dense = model.to_tensor().reshape(-1)
            every = torch.eye(len(dense), dtype=dense.dtype)
            parts = torch.autograd.grad(dense, list(model.parameters()), every, is_grads_batched=True)
            jacobian = torch.cat([part.reshape(len(part), -1) for part in parts], 1)
            assert degrees_of_freedom(model) == int(torch.linalg.matrix_rank(jacobian, rtol=1e-9))


# What is refused

X = torch.ones(4, 3, 2, dtype=torch.float64)
FIVE = {"task": None, "index": draw(SIZES, 5), "values": torch.ones(5), "sizes": SIZES}

test_refusals = refuses([
    ({"task": X / 0}, DataError, "24 infinite"),
    ({"task": X * torch.nan}, DataError, "no entry is known"),
    ({"task": np.ma.array(X.numpy(), mask=True)}, DataError, "no entry is known, all are NaN"),
    ({**FIVE, "index": draw(SIZES, 2), "values": X[0, 0]}, DataError, "only 2 samples of a tensor of 3"),
    ({"task": torch.ones(())}, ShapeError, "a single number has no modes"),
    ({"task": None}, OptionError, "give a task or an array, or index="),
    ({"sizes": SIZES}, OptionError, "give a task or an array, or index=, values="),
    ({**FIVE, "sizes": None}, OptionError, "give a task or an array, or index=, values= and sizes"),
    ({**FIVE, "values": torch.ones(4)}, ShapeError, "values for 5 rows"),
    ({**FIVE, "index": draw(SIZES, 5) * 1.0}, DataError, "must be an int64"),
    ({**FIVE, "index": draw(SIZES, 5) + 5}, DataError, "out of range"),
    ({**FIVE, "sizes": (3, 4)}, ShapeError, r"\(B, 2\)"),
    ({"task": "nothing.npy"}, FileError, "no such tensor"),
    ({"task": object()}, DataError, "not a tensor of numbers"),
    ({"tree": ModeTree.binary(4)}, ShapeError, "3 axes and the tree 4 modes"),
    ({"tree": [[0, 1], 2]}, OptionError, "tree must be a ModeTree"),
    ({"join": "both"}, OptionError, "join must be 'auto', 'full' or 'diagonal', found 'both'"),
    ({"adapt": ("rank",)}, OptionError, "adapt has 'ranks', 'tree', both or neither, found 'rank'"),
    ({"adapt": None}, OptionError, "neither, found None"),
    ({"adapt": ("tree",)}, OptionError, "must be given: ranks="),
    ({"ranks": 0}, OptionError, "ranks must be an integer >= 1"),
    ({"ranks": {0: 1}}, OptionError, "need a tree"),
    ({"tree": TREE, "ranks": {0: 1, 1: 1, 2: 1}}, OptionError, r"no number for node \(0, 1\)"),
    ({"tree": TREE, "ranks": {9: 1}}, TreeError, "9"),
    ({"tree": TREE, "ranks": 5}, OptionError, "rank 5 at node 0 is above 4"),
    ({"tree": TREE, "ranks": {0: 1, 1: 1, (0, 1): 3, 2: 1}}, OptionError, r"3 at node \(0, 1\) is above 2"),
    ({"max_numbers": 10}, OptionError, "max_numbers=10 cannot hold rank one: it has 11 numbers"),
    ({"max_numbers": 0}, OptionError, "max_numbers must be an integer"),
    ({"holdout": 0}, OptionError, "holdout must be above 0"),
    ({"holdout": 0.7}, OptionError, "holdout must be a number"),
    ({"seed": 1.5}, OptionError, "seed must be an integer"),
], by=lambda options: complete(**{"task": X, "progress": False, **options}))  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:complete")
def test_what_does_not_fit_into_memory():
    sizes = (6,) * 14
    index, values = zoo.random_index(sizes, 300), torch.ones(300, dtype=torch.float64)
    found = quiet(index=index, values=values, sizes=sizes, ranks=1)
    zoo.assert_close(found.predict(index[:3]), values[:3], 1e-2)
    with pytest.raises(SizeError, match=r"found.predict\(index\)"):
        found.completed()
    with pytest.raises(DataError, match="out of range"):
        found.predict([[6] * 14])


# The command


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Run tnreg complete in an empty folder; return standard output, or the error."""
    monkeypatch.chdir(tmp_path)

    def run(*words, code=0):
        done, out, err = call(capsys, "complete", *words)
        assert done == code, out + err
        return out if code == 0 else err

    return run


@pytest.mark.slow
def test_command(command):
    x, gaps = exact()
    np.save("gaps.npy", gaps.numpy())
    found = json.loads(command("gaps.npy", "--json", "--out", "run"))
    assert found["held-out error"] < 1e-8 and found["completed tensor"] == "completed.npy"
    filled, model = np.load("run/completed.npy"), load("run/model.safetensors")
    zoo.assert_close(torch.from_numpy(filled), x, 1e-7)
    zoo.assert_close(model.to_tensor(), x, 1e-7)
    assert {path.name for path in Path("run").iterdir()} == {
        "completed.npy", "config.json", "found.png", "model.safetensors", "report.html", "slices.png",
        "training.png", "trajectory.npz",
    }  # fmt: skip
    page = Path("run/report.html").read_text()
    assert page.count("data:image/png") == 3 and f"{found['held-out error']:.3g}" in page
    assert Trajectory.load("run/trajectory.npz")["numbers"][-1] > 0
    gaps[:2] = torch.nan
    np.save("gaps.npy", gaps.numpy())
    out = command("gaps.npy", "--out", "run", "--tree", "[[0,1],2]", "--join", "full", "--ranks", "1")
    assert "warning: no entry is known for some indices: 2 of 6 at mode 0" in out  # over the same folder
    assert "ModeTree([[0, 1], 2])" in out
    assert "of 6 at mode 0" in Path("run/report.html").read_text()
    assert "--max-numbers" in command("gaps.npy", "--max-numbers", "3", code=1)
    assert not Path("runs/complete").exists()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_command_on_tables(command, suffix):
    """Labels come back, and a table of everything is read again."""
    x, gaps = exact((4, 3, 5))
    names = np.array(["a", "b", "c", "d"])
    index = (~torch.isnan(gaps)).nonzero()
    first, second, third = index.numpy().T
    frame = pandas.DataFrame(
        {"who": names[first], "when": second, "dose": third / 4, "value": x[tuple(index.T)]}
    )
    frame.to_csv("t.csv", index=False) if suffix == "csv" else frame.to_parquet("t.parquet")
    found = json.loads(command(f"t.{suffix}", "--json", "--out", "run"))
    assert found["known entries"] == len(frame) and found["completed tensor"] == f"completed.{suffix}"
    tensor = load_tensor(f"run/completed.{suffix}")
    assert tensor.modes == ("who", "when", "dose") and not tensor.missing
    zoo.assert_close(tensor.values, x, 1e-7)


@pytest.mark.slow
def test_command_never_needs_the_dense_tensor(command):
    columns = dict(zip("abcdefghijkl", zoo.random_index((5,) * 12, 300).T.numpy(), strict=True))
    pandas.DataFrame({**columns, "value": np.ones(300)}).to_csv("t.csv", index=False)
    found = json.loads(command("t.csv", "--json", "--out", "run", "--ranks", "1"))
    assert found["held-out error"] < 1e-2 and found["completed tensor"].startswith(
        "not written: a table of all"
    )
    assert not list(Path("run").glob("completed*"))
