"""Training: what is recorded when, why it stops, optimizers, interruption, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
import zoo
from command import screen

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
    assert run["count"].tolist() == [1, 2, 3, 4]
    assert set(run["parts"]) == set(TREE.interior) and run["parts"][TREE.root].shape[0] == 4
    assert np.array_equal(run["weight"][-1], model.weights[0].detach().numpy())
    assert not np.array_equal(run["weight"][0], run["weight"][1])


def test_it_is_gradient_descent():
    model, task = start()
    by_hand = copy.deepcopy(model)
    fit(model, task.loss, steps=3, optimizer="sgd", lr=0.05, progress=False)
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
    options = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(0)}
    target = tnreg.Factorization(TREE, 6, 1, std=1.0, **options).to_tensor().detach()
    task = completion(target * 36 / target.norm(), 500, seed=0)
    model = tnreg.Factorization(TREE, 6, 12, std=0.1, **options)
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


def loss_until(call, event):
    """Return the loss of a task, with an event at this call, and the list of calls before it."""
    task, calls = start()[1], []

    def loss(m):
        calls.append(1)
        return task.loss(m) * (event() if len(calls) > call else 1.0)

    return loss, calls


def test_stops_when_the_loss_is_not_finite():
    loss, calls = loss_until(7, lambda: math.nan)
    model, run = train(100, loss, every=50)
    assert run.stop_reason.startswith("the loss became nan at step 7 of 100; try a smaller lr")
    assert run.steps.tolist() == [0] and torch.isfinite(model.to_tensor()).all()
    assert "the loss became" in train(400, optimizer="sgd", lr=1e3)[1].stop_reason
    assert len(calls) == 8


def test_interruption_keeps_what_was_recorded():
    def press():
        raise KeyboardInterrupt

    _, run = train(1000, loss_until(30, press)[0], every=10)
    assert run.stop_reason == "interrupted" and run.steps.tolist() == [0, 10, 20]
    assert run["loss"].shape == (3,)


def test_progress_bar(capsys, monkeypatch):
    model, task = start()
    shown = screen(monkeypatch)
    fit(model, task.loss, steps=10)
    assert "10/10" in shown.getvalue() and "loss" in shown.getvalue()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (-1, {}, "steps must be an integer >= 0"),
        (1.5, {}, "steps must be an integer"),
        (1, {"every": 0}, "every must be an integer >= 1"),
        (1, {"optimizer": "rmsprop"}, "unknown optimizer 'rmsprop'; write one of group-rmsprop"),
        (1, {"optimizer": 3}, "must be a name or a torch.optim.Optimizer"),
        (1, {"optimizer": lambda p, lr: 3}, "gave a int, not a torch.optim.Optimizer"),
        (1, {"observe": {"loss": len}}, "the name 'loss' is taken"),
        (1, {"observe": {"x": 3}}, "'x' must be a function"),
        (1, {"stop": 3}, "'stop' must be a function"),
        (1, {"lr": -1.0}, "lr must be a finite number >= 0"),
        (1, {"graph": True}, "needs a CUDA device .* found a model on cpu"),
        (1, {"graph": True, "optimizer": "lbfgs"}, "found an optimizer that evaluates the loss itself"),
    ],
)  # fmt: skip
def test_refuses(steps, options, message):
    with pytest.raises(OptionError, match=message):
        train(steps, **options)


def test_an_observation_keeps_its_form():
    lengths = iter([2, 3])
    message = r"'x' changed its form at step 1.\n  before: \(2,\)\n  now:    \(3,\)"
    with pytest.raises(ShapeError, match=message):
        train(5, every=1, observe={"x": lambda m: torch.zeros(next(lengths))})


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda m: m.to_tensor(), r"shape \(2, 3, 5, 7\)"),
        (lambda m: 1.0, "found: float"),
        (lambda m: m.norm().detach(), "requires_grad=False"),
        (lambda m: m.norm() * 1j, "dtype torch.complex128"),
    ],
)
def test_refuses_losses(loss, found):
    with pytest.raises(OptionError, match=f"must return a real scalar(.|\n)*{found}"):
        train(1, loss)
    with torch.no_grad(), pytest.raises(OptionError, match="gradients are switched off"):
        train(1, loss)


def fake_cuda(monkeypatch):
    """Stand in for torch.cuda: a capture keeps the call, a replay makes it. Return the list of events."""
    events, captures = [], []

    class Graph:
        def replay(self):
            events.append("replay")
            self.step()

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            events.append("wait")

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
    for name, stand_in in {"CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream,
                           "graph": graph, "stream": quiet, "device": quiet}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr("tnreg.training.fit._captured_step", captured_step)
    return events


def test_a_graph_makes_the_same_steps(monkeypatch):
    """Three ordinary steps, one recording that changes nothing, then replays."""
    _, expected = train(10, every=5)
    events = fake_cuda(monkeypatch)
    _, run = train(10, every=5, graph=True)
    assert np.array_equal(run["loss"], expected["loss"])
    assert events == ["wait"] * 6 + ["record"] + ["replay"] * 7
