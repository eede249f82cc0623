"""Training: what is recorded when, why it stops, optimizers, interruption, and what is refused."""

import contextlib
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import zoo
from refusals import refuses
from torch.nn.utils import parametrize, prune

import tnreg
from tnreg import GroupRMSprop, ModeTree, OptionError, ShapeError, completion, fit
from tnreg.training.cuda_graph import CapturedStep

TREE = ModeTree.binary(4)


def start():
    return zoo.model_of(TREE), completion(zoo.model_of(TREE, seed=9), 150)


def train(steps, loss=None, **options):
    """Train a new model on a new task."""
    model, task = start()
    return model, fit(model, loss or task.loss, steps=steps, progress=False, **options)


def test_rows():
    model, task = start()
    losses = []
    run = fit(model, task.loss, steps=10, every=4, progress=False,
              observe={"weight": lambda m: m.weights[0], "parts": lambda m: m.local_components(),
                       "count": lambda m: losses.append(task.loss(m).item()) or len(losses)})  # fmt: skip
    assert run.steps.tolist() == [0, 4, 8, 10] and run.stop_reason == "steps"
    assert np.allclose(run["loss"], losses, rtol=1e-12)  # the loss of the weights of its row
    assert run["weight"].shape == (4, *model.weights[0].shape)
    assert set(run["parts"]) == set(TREE.interior) and run["parts"][TREE.root].shape[0] == 4
    assert np.array_equal(run["weight"][-1], model.weights[0].detach().numpy())
    assert not np.array_equal(run["weight"][0], run["weight"][1])


def test_it_is_gradient_descent():
    by_hand, task = start()
    model, _ = train(3, optimizer="sgd", lr=0.05)
    for _ in range(3):
        by_hand.zero_grad()
        task.loss(by_hand).backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.05 * p.grad
    assert torch.allclose(model.to_tensor(), by_hand.to_tensor(), rtol=1e-12)


def test_optimizers():
    for optimizer in ("group-rmsprop", "sgd", "adam", "lbfgs", torch.optim.AdamW):
        _, run = train(12, optimizer=optimizer, lr=1e-2, every=6)
        assert run["loss"][-1] < run["loss"][0]
    model, task = start()
    own = GroupRMSprop(model.parameters(), lr=1e-3)
    fit(model, task.loss, steps=2, optimizer=own, progress=False)
    assert own.step_size > 0


def test_completes_a_low_rank_tensor():
    """From near zero: the hierarchical rank of the target is found and unseen entries are predicted."""
    target = zoo.model_of(TREE, sizes=6, bonds=1, std=1.0).to_tensor().detach()
    task = completion(target * 36 / target.norm(), 500, seed=0)
    model = zoo.model_of(TREE, sizes=6, bonds=12, std=0.1, seed=1)
    small = lambda run: run["loss"][-1] < 1e-4  # noqa: E731
    run = fit(model, task.loss, steps=3000, every=100, progress=False, stop=small)
    assert run.stop_reason == "stop"
    assert task.test_error(model) < 2e-2
    assert set(tnreg.hierarchical_rank(model, rtol=1e-2).values()) == {1}


def test_stop():
    _, run = train(100, every=5, stop=lambda run: len(run) == 3)
    assert run.steps.tolist() == [0, 5, 10] and run.stop_reason == "stop"
    _, run = train(100, stop=lambda run: "good enough")
    assert run.steps.tolist() == [0] and run.stop_reason == "good enough"
    assert train(0)[1].steps.tolist() == [0]
    assert train(np.int64(3), every=np.int32(2))[1].steps.tolist() == [0, 2, 3]


def loss_until(call, *events):
    """Return the loss of a task that is NaN or raises after so many calls."""
    task, factors = start()[1], Mock(side_effect=[1.0] * call + [*events])
    return lambda m: task.loss(m) * factors()


def test_stops_when_the_loss_is_not_finite_or_interrupted():
    model, run = train(100, loss_until(7, math.nan), every=50)  # and not called again
    assert run.stop_reason.startswith("the loss became nan at step 7 of 100; try a smaller lr")
    assert run.steps.tolist() == [0] and torch.isfinite(model.to_tensor()).all()
    assert "the loss became" in train(400, optimizer="sgd", lr=1e3)[1].stop_reason
    _, run = train(1000, loss_until(30, KeyboardInterrupt), every=10)
    assert run.stop_reason == "interrupted" and run.steps.tolist() == [0, 10, 20]
    assert run["loss"].shape == (3,)


def test_a_loss_that_is_not_finite_is_looked_at_first():
    """Nothing is observed there, and what was recorded before is kept."""

    def observe(m):
        assert m.to_tensor().isfinite().all()
        return 1.0

    options = {"optimizer": "sgd", "lr": 1e3, "every": 1}
    (_, plain), (_, watched) = train(400, **options), train(400, observe={"x": observe}, **options)
    assert watched.stop_reason == plain.stop_reason and "the loss became" in plain.stop_reason
    assert len(watched) == len(plain) > 1 and np.isfinite(watched["loss"]).all()
    assert len(train(5, loss_until(0, math.nan))[1]) == 0


def test_an_error_brings_the_rows_along():
    count = Mock(side_effect=[1, 2, KeyError("x")])
    with pytest.raises(KeyError) as raised:
        train(10, every=2, observe={"count": lambda m: count()})
    assert raised.value.trajectory["count"].tolist() == [1, 2]
    assert "the 2 rows" in raised.value.__notes__[0]


@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_a_scheduler_and_what_is_called_at_each_step(optimizer):
    schedulers, seen, rates = torch.optim.lr_scheduler, [], []

    def each_step(step, model, loss):
        seen.append((step, loss.item(), model.gradients[0].norm().item()))

    def scheduler(update):
        made = schedulers.StepLR(update, 2, 0.5)
        rates.append(lambda: made.get_last_lr()[0])
        return made

    _, run = train(4, every=1, lr=0.1, optimizer=optimizer, scheduler=scheduler, each_step=each_step,
                   observe={"lr": lambda m: rates[0]()})  # fmt: skip
    assert run["lr"].tolist() == [0.1, 0.1, 0.05, 0.05, 0.025]
    assert [step for step, *_ in seen] == [1, 2, 3, 4] and all(norm > 0 for *_, norm in seen)
    assert [loss for _, loss, _ in seen] == run["loss"][:-1].tolist()
    model, task = start()
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = schedulers.ReduceLROnPlateau(own, patience=0, threshold=1e9)
    fit(model, task.loss, steps=3, optimizer=own, scheduler=plateau, progress=False)
    assert own.param_groups[0]["lr"] == pytest.approx(1e-4)
    with pytest.raises(OptionError, match="the scheduler is of another optimizer"):
        fit(model, task.loss, steps=3, optimizer="sgd", scheduler=plateau, progress=False)


def newton(model, loss, steps=60, **options):
    """Train by "gauss-newton"."""
    return fit(model, loss, steps=steps, optimizer="gauss-newton", progress=False, **options)


@pytest.mark.parametrize(("join", "options", "reached"), [
    ("full", {}, 1e-13),
    ("diagonal", {"root": "ones"}, 1e-13),
    ("full", {"leaves": {2: "bare", 3: "bare"}}, 1e-13),
    ("diagonal", {"leaves": {2: "bare"}, "root": "ones"}, 1e-13),
    ({(0, 1): "full"}, {"dtype": torch.complex128}, 1e-13),
    ("full", {"dtype": torch.float32}, 1e-6),
    ("full", {"dtype": torch.float16}, 1e-2),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["completion", "sensing"])
@pytest.mark.parametrize("unit", [1.0, 1e150])
def test_gauss_newton(join, options, reached, kind, unit):
    """It finds a tensor near by to the last digit, in its gauge and any unit, and stops by itself."""
    dtype = options.pop("dtype", torch.float64)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    unit = unit if dtype == wide else 1.0
    exact = zoo.model_of(TREE, join, bonds=2, dtype=wide, **options)
    task = getattr(tnreg, kind)(exact.to_tensor().detach() * unit, 150).to(dtype=dtype)
    model = zoo.model_of(TREE, join, bonds=2, dtype=dtype, **options)
    share = unit ** (1 / len(exact.weights))
    near = {v: share * w * (1 + 0.05 * zoo.randn(*w.shape)) for v, w in exact.weights.items()}
    if unit != 1.0:  # and in any gauge
        near[0], near[1] = near[0] * 1e120, near[1] * 1e-120
    model.load_weights(near)
    before, seen = model.local_components(), []
    run = newton(model, task.loss, every=1, observe={"norm": lambda m: m.norm()},
                 each_step=lambda step, m, loss: seen.append(loss.item()))  # fmt: skip
    assert run.stop_reason == "converged" and len(run) < 60 and task.train_error(model) < reached
    assert seen == run["loss"][:-1].tolist() and model.dtype == dtype
    assert np.all(np.diff(run["loss"]) <= reached**2 * run["loss"][0])  # less is rounding
    for v, norms in model.local_components().items():
        assert (norms / before[v]).log().abs().max() < 1


@pytest.mark.parametrize("join", ["diagonal", "full"])
def test_gauss_newton_from_small_weights(join):
    """Predictions of 1e-17 have no derivatives to see; ranks above those of the target do no harm."""
    tree, size = ModeTree.binary(5), {"sizes": 4}
    target = zoo.model_of(tree, join, bonds=2, std=1.0, **size).to_tensor().detach()
    task = completion(target, 0.5)
    model = zoo.model_of(tree, join, bonds=3, std=1e-2, seed=1, **size)
    run = newton(model, task.loss)
    assert run.stop_reason == "converged" and task.test_error(model) < 1e-12


def test_gauss_newton_keeps_frozen_nodes():
    model, task = start()
    model.parameter_groups({0: None, TREE.root: None})
    model.stacks[1].requires_grad_(False)
    before = {v: w.detach().clone() for v, w in model.weights.items()}
    run = newton(model, task.loss, 3)
    assert run["loss"][-1] < run["loss"][0]
    moved = {v for v, w in model.weights.items() if not torch.equal(w, before[v])}
    assert moved and not {0, TREE.root} & moved


def test_gauss_newton_at_a_saddle_and_of_another_loss():
    model, task = start()
    run = newton(zoo.model_of(TREE, std=0.0), task.loss)
    assert run.stop_reason == "converged" and run["loss"][0] == run["loss"][-1]
    with pytest.raises(
        OptionError, match=r"lowers task.loss, and the loss given is another one: .*\n  give task"
    ):
        newton(model, lambda m: task.loss(m) + m.norm(), task=task)
    assert len(newton(model, lambda m: task.loss(m), 1, task=task)) == 2


def parametrized(model):
    parametrize.register_parametrization(model.stacks, "0", torch.nn.Identity())
    return model


def pruned(model):
    prune.l1_unstructured(model.stacks, "0", 0.5)
    return model


class Wrapper(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model


def newton_of(change, options):
    model, task = start()
    newton(change(model), options.pop("loss", task.loss), 1, **options)


same = lambda model: model  # noqa: E731
test_gauss_newton_refuses = refuses([
    (parametrized, {}, "stack 0 is computed from other parameters"),
    (pruned, {}, "stack 0 is computed from other parameters"),
    (Wrapper, {}, "sets the weights of a Factorization, found a Wrapper.\n  give the factorization inside"),
    (tnreg.to_cnn, {}, "found a ConvNet(.|\n)*tnreg.from_cnn"),
    (lambda model: tnreg.to_cnn(model).as_factorization(), {}, "shows the weights of a network"),
    (same, {"loss": lambda m: m.norm()}, r"needs the task whose squares .* nothing.\n  write fit\(model"),
    (same, {"task": 3}, "needs the task whose squares it lowers, found int"),
    (same, {"graph": True}, "leave out graph and scheduler"),
    (same, {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2)}, "leave out graph and scheduler"),
    (same, {"loss": completion(zoo.randn(2, 3, 5, 7, dtype=torch.complex64), 9).loss}, "task is complex"),
], by=newton_of, error=OptionError)  # fmt: skip


test_refuses = refuses([
    (-1, {}, "steps must be an integer >= 0"),
    (1.5, {}, "steps must be an integer"),
    (1, {"every": 0}, "every must be an integer >= 1"),
    (1, {"optimizer": "rmsprop"}, "unknown optimizer 'rmsprop'; write one of group-rmsprop"),
    (1, {"optimizer": 3}, "must be a name or a torch.optim.Optimizer"),
    (1, {"optimizer": lambda p, lr: 3}, "gave a int, not a torch.optim.Optimizer"),
    (1, {"observe": {"loss": len}}, "the name 'loss' is taken"),
    (1, {"observe": {"x": 3}}, "'x' must be a function"),
    (1, {"stop": 3}, "'stop' must be a function"),
    (1, {"each_step": 3}, "'each_step' must be a function"),
    (1, {"scheduler": 3}, "must be one of torch.optim.lr_scheduler, found 3"),
    (1, {"graph": True, "each_step": print}, "leave out scheduler and each_step"),
    (1, {"lr": -1.0}, "lr must be a finite number >= 0"),
    (1, {"graph": True}, "needs a CUDA device .* found a model on cpu"),
    (1, {"graph": True, "optimizer": "lbfgs"}, "found an optimizer that evaluates the loss itself"),
], by=lambda steps, options: train(steps, **options), error=OptionError)  # fmt: skip


def test_an_observation_keeps_its_form():
    lengths = iter([2, 3])
    message = r"'x' changed its form at step 1.\n  before: \(2,\)\n  now:    \(3,\)"
    with pytest.raises(ShapeError, match=message):
        train(5, every=1, observe={"x": lambda m: torch.zeros(next(lengths))})


@pytest.mark.parametrize(("loss", "found"), [
    (lambda m: m.to_tensor(), r"shape \(2, 3, 5, 7\)"),
    (lambda m: 1.0, "found: float"),
    (lambda m: m.norm().detach(), "requires_grad=False"),
    (lambda m: m.norm() * 1j, "dtype torch.complex128"),
])  # fmt: skip
def test_refuses_losses(loss, found):
    with pytest.raises(OptionError, match=f"must return a real scalar(.|\n)*{found}"):
        train(1, loss)
    for off in (torch.no_grad, torch.inference_mode):
        with off(), pytest.raises(OptionError, match="gradients are switched off"):
            train(1, loss)
    with torch.inference_mode():
        model, task = start()
    with pytest.raises(OptionError, match=r"made under torch.inference_mode"):
        fit(model, task.loss, steps=1, progress=False)


def fake_cuda(monkeypatch):
    """Stand in for torch.cuda: a capture keeps the call, a replay makes it. Return the list of events."""
    events, captures = [], []

    class Graph:
        def replay(self):
            events.append("replay")
            self.step()

    def stream(device=None):
        return Mock(wait_stream=lambda other: events.append("wait"))

    @contextlib.contextmanager
    def graph(recorded, pool=None):
        [captured] = captures
        recorded.step, captured.step = captured.step, lambda: events.append("record")
        yield
        captured.step = recorded.step

    def captured_step(step, model, needs_closure):
        captures.append(CapturedStep(step, torch.device("cpu")))
        return captures[0]

    quiet = contextlib.nullcontext
    for name, stand_in in {"CUDAGraph": Graph, "Stream": stream, "current_stream": stream,
                           "graph": graph, "stream": quiet, "device": quiet}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr("tnreg.training.fit._captured_step", captured_step)
    return events


@pytest.mark.slow
def test_a_graph_makes_the_same_steps(monkeypatch):
    """Three ordinary steps, one recording that changes nothing, then replays."""
    _, expected = train(10, every=5)
    events = fake_cuda(monkeypatch)
    _, run = train(10, every=5, graph=True)
    assert np.array_equal(run["loss"], expected["loss"])
    assert events == ["wait"] * 6 + ["record"] + ["replay"] * 7
