"""Completion and sensing: what is drawn, loss and errors by hand, and what is refused."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import zoo
from refusals import refuses

from tnreg import (
    DataError,
    Factorization,
    ModeTree,
    OptionError,
    ShapeError,
    SizeError,
    complete,
    completion,
    decompose,
    fit,
    sensing,
)
from tnreg.training.tasks import relative_error

TREE, SIZES = ModeTree.binary(4), (2, 3, 5, 7)


def target(dtype=torch.float64):
    return zoo.randn(*SIZES, dtype=dtype, seed=3)


def relative(x, expected):
    return pytest.approx(((x - expected).norm() / expected.norm()).item())


def test_completion_splits_the_entries():
    values = target()
    task = completion(values, 80, seed=1)
    assert task.index.shape == (80, 4) and task.test_index.shape == (130, 4)
    assert torch.equal(task.values, values[tuple(task.index.T)])
    assert torch.equal(task.test_values, values[tuple(task.test_index.T)])
    both = torch.cat([task.index, task.test_index])
    assert len(torch.unique(both, dim=0)) == 210
    again, other = completion(values, 80, seed=1), completion(values, 80, seed=2)
    assert torch.equal(task.index, again.index) and not torch.equal(task.index, other.index)
    assert torch.equal(completion(values.numpy(), 80, seed=1).index, task.index)
    everything = completion(values, 210)
    assert everything.test_values is None
    assert repr(everything).endswith("210 entries observed, 0 unseen>")
    for samples, count in ((0.5, 105), (np.float32(0.5), 105), (np.int64(40), 40)):
        assert len(completion(target(), samples).values) == count
    assert len(sensing(target(), np.int64(7)).values) == 7


def test_losses_by_hand():
    model, values = zoo.model_of(TREE), target()
    task = completion(values, 80)
    dense = model.to_tensor().detach()
    seen, unseen = tuple(task.index.T), tuple(task.test_index.T)
    loss = (dense[seen] - values[seen]).square().mean().item()
    assert task.loss(model).item() == pytest.approx(loss)
    assert task.test_error(model) == relative(dense[unseen], values[unseen])
    assert task.train_error(model) == relative(dense[seen], values[seen])
    zero = Factorization(TREE, SIZES, 1, std=0.0, dtype=torch.float64)
    assert task.test_error(zero) == pytest.approx(1.0)
    task = completion(torch.zeros(SIZES, dtype=torch.float64), 9)
    assert task.test_error(zero) == 0.0 and task.test_error(model) == math.inf
    model, values = zoo.model_of(TREE, dtype=torch.complex128), target(torch.complex128)
    task = completion(values, 80)
    difference = model.entries(task.index).detach() - task.values
    assert task.loss(model).item() == pytest.approx(difference.abs().square().mean().item())
    assert not task.loss(model).is_complex()
    # any module with entries
    table, task = torch.nn.Module(), completion(target(), 80)
    table.entries = lambda index: torch.ones(len(index), dtype=torch.float64)
    assert task.loss(table).item() == pytest.approx((1 - task.values).square().mean().item())


def test_own_entries():
    index = torch.tensor([[0, 0], [1, 2], [1, 2]])
    own = {"index": index, "values": torch.tensor([1.0, 2.0, 3.0]), "sizes": (2, 3)}
    task, model = completion(**own), zoo.model_of(ModeTree.star(2), dtype=torch.float32)
    difference = model.to_tensor().detach()[tuple(index.T)] - task.values
    assert task.loss(model).item() == pytest.approx(difference.square().mean().item())
    with pytest.raises(OptionError, match="no unseen entries are known"):
        task.test_error(model)
    tested = completion(**own, test_index=index[:1], test_values=torch.ones(1))
    assert tested.to(dtype=torch.float64).test_values.dtype == torch.float64
    assert math.isfinite(tested.test_error(model))


def test_missing_entries():
    values = target()
    values[0, 0], values[1, 2, 3, 4] = math.nan, math.nan
    with pytest.raises(DataError, match=r"36 NaN entries of 210.\n  .*missing='nan'"):
        completion(values, 50)
    with pytest.raises(DataError, match="sensing needs all entries"):
        sensing(values, 3)
    task = completion(values, 50, missing="nan")
    assert len(task.values) == 50 and len(task.test_values) == 124
    assert torch.isfinite(task.values).all() and torch.isfinite(task.test_values).all()
    with pytest.raises(DataError, match="samples must be an integer from 1 to 174"):
        completion(values, 175, missing="nan")
    with pytest.raises(DataError, match="all 210 entries of the target are NaN"):
        completion(torch.full(SIZES, math.nan), 5, missing="nan")
    values[0, 1, 0, 0] = math.inf
    with pytest.raises(DataError, match=r"1 entries that are not finite \(0 NaN, 1 infinite\)"):
        completion(values, 50, missing="nan")
    with pytest.raises(OptionError, match="unknown missing='zero'"):
        completion(values, 50, missing="zero")


@pytest.mark.parametrize(("dtype", "scales"), [
    (torch.float32, (1e-30, 1e-24, 1e20, 1e30)), (torch.float64, (1e-170, 1e-150, 1e150)),
    (torch.complex64, (1e-30, 1e30)), (torch.complex128, (1e-150, 1e150)),
], ids=str)  # fmt: skip
def test_errors_hold_at_any_scale(dtype, scales):
    values, model = target(dtype), zoo.model_of(TREE, dtype=dtype)
    nothing = Factorization(TREE, SIZES, 1, std=0.0, dtype=dtype)

    def found(scale):
        tasks = completion(values * scale, 80), sensing(values * scale, 30)
        node, weight = TREE.root, model.weights[TREE.root].detach()
        scaled = zoo.model_of(TREE, dtype=dtype)
        scaled.load_weights({node: weight * scale})
        return [error(m) for task in tasks for error in (task.train_error, task.test_error)
                for m in (nothing, scaled)]  # fmt: skip

    expected = found(1.0)
    assert expected[::2] == pytest.approx([1.0] * 4)
    for scale in scales:
        assert found(scale) == pytest.approx(
            expected, rel=1e-3 if dtype in (torch.float32, torch.complex64) else 1e-9
        )


def test_errors_of_other_units_and_of_nan():
    one, tiny = torch.ones(3, dtype=torch.float64), torch.full((3,), 1e-170, dtype=torch.float64)
    assert relative_error(one, tiny) == pytest.approx(1e170) and relative_error(tiny, 0 * one) == math.inf
    assert math.isnan(relative_error(one * math.nan, one)) and math.isnan(
        relative_error(one * math.nan, 0 * one)
    )
    for task in (completion(target() * 1e-60, 9), sensing(target() * 1e60, 9)):
        with pytest.raises(DataError, match=r"out of the range of torch.float32(.|\n)*keep torch.float64"):
            task.to(dtype=torch.float32)


def test_a_factorization_is_a_target():
    model = zoo.model_of(TREE)
    for task in (completion(model, 50), sensing(model, 50)):
        assert task.loss(model).item() < 1e-24 and task.test_error(model) < 1e-12


def test_sensing_measures_the_target():
    values, model = target(), zoo.model_of(TREE)
    task, dense = sensing(values, 500, seed=4), model.to_tensor().detach()
    assert [f.shape for f in task.features] == [(500, n) for n in SIZES]
    norms = torch.stack([f.square().sum(1) for f in task.features]).prod(0)
    assert norms.mean().item() == pytest.approx(1.0, rel=0.2)
    rank_one = torch.einsum("bi,bj,bk,bl->bijkl", *task.features)
    assert torch.allclose(task.values, (rank_one * values).sum((1, 2, 3, 4)))
    predicted = (rank_one * dense).sum((1, 2, 3, 4))
    loss = (predicted - task.values).square().mean().item()
    assert task.loss(model).item() == pytest.approx(loss)
    assert task.test_error(model) == relative(dense, values)
    assert task.train_error(model) == relative(predicted, task.values)
    assert torch.equal(sensing(values, 500, seed=4).values, task.values)
    narrow = task.to(dtype=torch.float32)
    assert narrow.values.dtype == torch.float32 and "500 rank-one" in repr(narrow)
    task.target = None
    with pytest.raises(OptionError, match="does not know its target"):
        task.test_error(model)
    with pytest.raises(DataError, match="samples must be an integer >= 1, found 0"):
        sensing(values, 0)


@pytest.mark.parametrize("join", ["diagonal", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_dense_sensing(join, dtype):
    """Inner products with Gaussian tensors of norm 1 on average, with any factorization and its wrappers."""
    values, model = target(dtype), zoo.model_of(TREE, join, dtype=dtype)
    task, dense = sensing(values, 400, seed=4, kind="dense"), model.to_tensor().detach()
    assert task.features.shape == (400, *SIZES) and task.sizes == SIZES
    assert task.features.abs().square().sum((1, 2, 3, 4)).mean().item() == pytest.approx(1.0, rel=0.02)
    assert torch.allclose(task.values, torch.einsum("bijkl,ijkl->b", task.features, values))
    assert torch.equal(task.values, sensing(values, 400, seed=4, kind="dense").values)
    predicted = torch.einsum("bijkl,ijkl->b", task.features, dense)
    loss = (predicted - task.values).abs().square().mean().item()
    wrapped = torch.nn.Module()
    wrapped.module, wrapped.forward = model, lambda x: model(x)
    for m in (model, wrapped):
        assert task.loss(m).item() == pytest.approx(loss)
        assert task.test_error(m) == relative(dense, values)
        assert task.train_error(m) == relative(predicted, task.values)
    narrow = task.to(dtype=torch.complex64 if dtype.is_complex else torch.float32)
    assert repr(narrow) == "<Sensing of (2, 3, 5, 7): 400 dense measurements>"
    with pytest.raises(DataError, match="write task.to"):
        narrow.loss(model)
    # measurements of your own
    rest = {"test_features": task.features[300:], "test_values": task.values[300:]}
    own = sensing(features=task.features[:300], values=task.values[:300], kind="dense", **rest)
    assert own.test_error(model) == relative(predicted[300:], task.values[300:])
    exact = decompose(values, TREE)
    assert own.loss(exact).item() < 1e-24 and own.test_error(exact) < 1e-12
    for call in (lambda: fit(model, own.loss, steps=1, optimizer="gauss-newton"), lambda: complete(own)):
        with pytest.raises(OptionError, match=r"those of this task are dense.\n  train it by gradients"):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("make", [completion, sensing, partial(sensing, kind="dense")])
def test_other_losses_by_hand(make, dtype):
    model, residual = zoo.model_of(TREE, dtype=dtype), None
    for loss in ("mse", "l1", "huber"):
        task = make(2 * target(dtype), 60, loss=loss)
        if residual is None:
            index = getattr(task, "index", None)
            found = task._predict(model) if index is not None else task._predict(model, task.features)
            residual = (found - task.values).detach().abs()
            assert residual.min() < 1 < residual.max()
        huber = torch.where(residual < 1, residual**2 / 2, residual - 0.5)
        wanted = {"mse": residual**2, "l1": residual, "huber": huber}[loss].mean().item()
        assert task.loss(model).item() == pytest.approx(wanted) and not task.loss(model).is_complex()
        narrow = task.to(dtype=torch.complex64)
        assert narrow.criterion == loss and (f", loss {loss}>" in repr(narrow)) == (loss != "mse")
        model.zero_grad()
        task.loss(model).backward()
        assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in model.gradients.values())
    if make is completion:
        for call in (
            lambda: fit(model, task.loss, steps=1, optimizer="gauss-newton"),
            lambda: complete(task),
        ):
            with pytest.raises(OptionError, match="lowers squares, and the loss of this task is 'huber'"):
                call()


def test_own_features_are_regression():
    """Powers of two variables, as lists, numpy arrays of any precision or one array; tested on others."""
    x, y = zoo.randn(2, 40)
    powers = [torch.stack([part**k for k in range(3)], 1) for part in (x, y)]
    values = 1 + x * y**2
    rest = {"test_features": [p[30:] for p in powers], "test_values": values[30:]}
    task = sensing(features=[p[:30].numpy() for p in powers], values=values[:30], **rest)
    assert repr(task) == "<Sensing of (3, 3): 30 rank-one measurements, 10 to test on>"
    weights = torch.zeros(3, 3, dtype=torch.float64)
    weights[0, 0] = weights[1, 2] = 1
    model = decompose(weights, ModeTree.star(2), ranks=2)
    assert task.loss(model).item() < 1e-20 and task.test_error(model) < 1e-12
    whole = sensing(features=torch.stack(powers, 1).numpy(), values=values.float().tolist())
    assert whole.values.dtype == torch.float64 and torch.equal(whole.features[1], powers[1])
    narrow = task.to(dtype=torch.float32)
    assert narrow.test_features[0].dtype == torch.float32 and narrow.test_error(model.float()) < 1e-5
    with pytest.raises(
        DataError, match=r"of torch.float64, the task of torch.float32; write task.to\(dtype=mo"
    ):
        narrow.loss(model.double())
    with pytest.raises(OptionError, match="does not know its target tensor, nor other measurements"):
        whole.test_error(model)


def own(rows=1, order=2, value=0.0, sizes=(2, 3), **more):
    """Entries of your own, all at index 0."""
    index = torch.zeros(rows, order, dtype=torch.int64)
    return {"index": index, "values": torch.full((1,), value), "sizes": sizes, **more}


TESTED = {"test_index": torch.zeros(1, 4).long(), "test_values": torch.zeros(1)}


test_completion_refuses = refuses([
    ((), {}, OptionError, "a target tensor is missing"),
    ((target(), 0), {}, DataError, r"samples must be an integer from 1 to 210 \(the known entries\)"),
    ((target(), 211), {}, DataError, "from 1 to 210"),
    ((target(), 1.5), {}, DataError, r"a share in \(0, 1\), found 1.5"),
    ((target(), True), {}, DataError, "found True"),
    ((target(), None), {}, DataError, "found None"),
    ((target().long(), 5), {}, DataError, "dtype torch.int64"),
    ((np.arange(6).reshape(2, 3), 5), {}, DataError, "dtype torch.int64"),
    ((torch.tensor(1.0), 1), {}, ShapeError, "a single number"),
    ((torch.zeros(2, 0), 1), {}, DataError, "is empty"),
    (("il2", 5), {}, DataError, "not a tensor of numbers"),
    ((target(), 5), TESTED, OptionError, "a target brings its own test entries"),
    ((target(), 5), {"sizes": (2, 3)}, OptionError, "either target and samples, or index="),
    ((), own(sizes=None), OptionError, "either target"),
    ((), own(seed=3), OptionError, "seed and missing are for a target"),
    ((), own(order=1, sizes=2), ShapeError, "one integer for each mode, found 2"),
    ((), own(order=0, sizes=()), ShapeError, "sizes must be one integer for each mode"),
    ((), own(order=1, sizes=(2.5,)), ShapeError, "size of mode 0 must be a positive integer, found 2.5"),
    ((), own(rows=2), ShapeError, r"\(1,\) values for 2 rows"),
    ((), own(rows=0), DataError, "an empty batch"),
    ((), own(index=torch.full((1, 2), 2)), DataError, "row 0 has 2 at mode 0, whose size is 2"),
    ((), own(value=math.nan), DataError, "not finite"),
    ((), own(test_index=torch.zeros(1, 2).long()), OptionError, "test_index and test_values together"),
    ((target(), 5), {"loss": "l2"}, OptionError, "unknown loss='l2'; there is 'mse', 'huber', 'l1'"),
    ((), own(loss=None), OptionError, "unknown loss=None"),
], by=lambda arguments, options: completion(*arguments, **options))  # fmt: skip


def measured(rows=(4, 4), values=4, fill=1.0, **more):
    """Features of your own, two a mode."""
    values = torch.ones(values) if isinstance(values, int) else values
    return {"features": [torch.full((n, 2), fill) for n in rows], "values": values, **more}


BOTH = {"test_features": [torch.ones(1, 2)] * 2, "test_values": torch.ones(1)}

test_sensing_refuses = refuses([
    ((), {}, OptionError, "a target tensor is missing"),
    ((target(),), {}, DataError, "samples must be an integer >= 1, found None"),
    ((target(), 5), measured(), OptionError, "either target and samples, or features= and values="),
    ((), {"features": [torch.ones(2, 2)]}, OptionError, "either target and samples"),
    ((), measured(seed=1), OptionError, "a seed is for a target"),
    ((target(), 5), BOTH, OptionError, "a target is tested on as a whole; leave test_features out"),
    ((), measured((4, 3)), ShapeError, r"found:    features \[\(4, 2\), \(3, 2\)\], values \(4,\)"),
    ((), measured(values=3), ShapeError, r"values \(3,\)(.|\n)*one \(B, D_n\) for every mode"),
    ((), measured(features=torch.ones(4, 2)), ShapeError, r"found:    features \(4, 2\)"),
    ((), measured(features=[torch.ones(4)]), ShapeError, r"for a single feature x\[:, None\]"),
    ((), measured(features=3), ShapeError, "found:    features int"),
    ((), measured((0, 0), 0), DataError, "features of mode 0: the tensor is empty"),
    ((), measured(fill=math.nan), DataError, "features of mode 0: the tensor has 8 entries that are not fin"),
    ((), measured(fill=1), DataError, "features of mode 0: the tensor has dtype torch.int64"),
    ((), measured(values=[1, 1, 1, 1]), DataError, "values: the tensor has dtype torch.int64"),
    ((), measured(features=["x"]), DataError, "not a tensor of numbers"),
    ((), measured(test_values=torch.ones(1)), OptionError, "test_features and test_values together"),
    ((), measured(**{**BOTH, "test_features": [torch.ones(1, 2)]}), ShapeError, r"with D = \(2, 2\), as the"),
    ((), measured(**{**BOTH, "test_values": torch.ones(1) * 1j}), DataError, "values: they are complex"),
    ((target(), 5), {"kind": "gaussian"}, OptionError, "unknown kind='gaussian'; there is 'rank-one'"),
    ((target(), 5), {"loss": "mae"}, OptionError, "unknown loss='mae'"),
    ((target(), 10**12), {"kind": "dense"}, SizeError, "its dense measurements would not fit"),
    ((), measured(features=torch.ones(3, 2, 2), kind="dense"), ShapeError, "features dense: one array"),
    ((), measured(features=torch.ones(4), kind="dense"), ShapeError, "features and values do not fit"),
    ((), measured(features=torch.full((4, 2, 2), math.inf), kind="dense"), DataError, "features: the tens"),
    ((), measured(features=torch.ones(4, 2, 2), kind="dense", test_values=torch.ones(1),
                  test_features=torch.ones(1, 2, 3)), ShapeError, r"\(B, \*D\) with D = \(2, 2\)"),
], by=lambda arguments, options: sensing(*arguments, **options))  # fmt: skip


def test_a_model_must_fit_the_task():
    for task in (completion(target(), 5), sensing(target(), 5)):
        with pytest.raises(ShapeError, match="other mode sizes than the task"):
            task.loss(zoo.model_of(TREE, sizes=(2, 3, 5, 8)))
    with pytest.raises(OptionError, match="the model is on meta, the task on cpu; write task.to"):
        completion(target(), 5).loss(Factorization(TREE, SIZES, 2, device="meta"))


def test_tasks_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    sensing(target(), 5), completion(target(), 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [completion, sensing, partial(sensing, kind="dense", loss="huber")])
def test_tasks_made_in_inference_mode_train(kind):
    with torch.inference_mode():
        task = kind(target(), 20)
    model = zoo.model_of(TREE)
    task.loss(model).backward()
    assert all(g.abs().max() > 0 for g in model.gradients.values())


def test_plans_made_in_inference_mode_train():
    model, task = zoo.model_of(TREE), completion(target(), 20)
    index = zoo.random_index(model.sizes, 6)
    with torch.inference_mode():
        task.loss(model), model.entries(index), model.to_tensor()
    (task.loss(model) + model.entries(index).sum() + model.to_tensor().sum()).backward()
    assert all(g.abs().max() > 0 for g in model.gradients.values())
