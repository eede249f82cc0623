"""Training: what is recorded when, why it stops, optimizers, interruption, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import math
import sys

import numpy as np
import pytest
import torch
import zoo
from command import screen

from tnreg import (
    Factorization,
    GroupRMSprop,
    ModeTree,
    OptionError,
    ShapeError,
    completion,
    fit,
    hierarchical_rank,
)
from tnreg.training.cuda_graph import CapturedStep

TREE = ModeTree.binary(4)


def start(seed=0):
    return zoo.model_of(TREE, seed=seed), completion(zoo.model_of(TREE, seed=9), 150)


def test_rows():
    model, task = start()
    losses = []
    run = fit(model, task.loss, steps=10, every=4, progress=False,
              observe={"weight": lambda m: m.weights[0], "parts": lambda m: m.local_components(),
                       "count": lambda m: losses.append(task.loss(m).item()) or len(losses)})  # fmt: skip
    assert run.steps.tolist() == [0, 4, 8, 10] and run.stop_reason == "steps"
    assert np.allclose(
        run["loss"], losses, rtol=1e-12
    )  # the loss belongs to the weights of its row
    assert run["weight"].shape == (4, *model.weights[0].shape) and run["count"].tolist() == [
        1,
        2,
        3,
        4,
    ]
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


@pytest.mark.parametrize("optimizer", ["group-rmsprop", "sgd", "adam", "lbfgs", torch.optim.AdamW])
def test_optimizers(optimizer):
    model, task = start()
    run = fit(model, task.loss, steps=12, optimizer=optimizer, lr=1e-2, every=6, progress=False)
    assert run["loss"][-1] < run["loss"][0]


def test_own_optimizer():
    model, task = start()
    optimizer = GroupRMSprop(model.parameters(), lr=1e-3)
    fit(model, task.loss, steps=2, optimizer=optimizer, progress=False)
    assert optimizer.step_size > 0


def test_completes_a_low_rank_tensor():
    """From near zero: the hierarchical rank of the target is found and unseen entries are predicted."""
    generator = torch.Generator().manual_seed(0)
    target = Factorization(
        TREE, 6, 1, std=1.0, dtype=torch.float64, generator=generator
    ).to_tensor()
    target = target.detach() * 36 / target.detach().norm()
    task = completion(target, 500, seed=0)
    model = Factorization(TREE, 6, 12, std=0.1, dtype=torch.float64, generator=generator)
    run = fit(model, task.loss, steps=3000, every=100, progress=False,
              stop=lambda run: run["loss"][-1] < 1e-4)  # fmt: skip
    assert run.stop_reason == "stop"
    assert task.test_error(model) < 2e-2
    assert set(hierarchical_rank(model, rtol=1e-2).values()) == {1}


def test_stop():
    model, task = start()
    run = fit(model, task.loss, steps=100, every=5, progress=False, stop=lambda run: len(run) == 3)
    assert run.steps.tolist() == [0, 5, 10] and run.stop_reason == "stop"
    run = fit(model, task.loss, steps=100, progress=False, stop=lambda run: "good enough")
    assert run.steps.tolist() == [0] and run.stop_reason == "good enough"
    assert fit(model, task.loss, steps=0, progress=False).steps.tolist() == [0]


def test_stops_when_the_loss_is_not_finite():
    model, task = start()
    calls = []

    def loss(m):
        calls.append(1)
        return task.loss(m) * (math.nan if len(calls) > 7 else 1.0)

    run = fit(model, loss, steps=100, every=50, progress=False)
    assert run.stop_reason.startswith("the loss became nan at step 7 of 100; try a smaller lr")
    assert run.steps.tolist() == [0] and torch.isfinite(model.to_tensor()).all()
    run = fit(model, task.loss, steps=400, optimizer="sgd", lr=1e3, progress=False)
    assert "the loss became" in run.stop_reason and len(calls) == 8


def test_interruption_keeps_what_was_recorded():
    model, task = start()

    def loss(m):
        if len(calls) == 30:
            raise KeyboardInterrupt
        calls.append(1)
        return task.loss(m)

    calls: list[int] = []
    run = fit(model, loss, steps=1000, every=10, progress=False)
    assert run.stop_reason == "interrupted" and run.steps.tolist() == [0, 10, 20]
    assert run["loss"].shape == (3,)


def test_progress_bar(capsys, monkeypatch):
    model, task = start()
    shown = screen(monkeypatch)
    fit(model, task.loss, steps=10)
    assert "10/10" in shown.getvalue() and "loss" in shown.getvalue()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps must be an integer >= 0"),
        ({"steps": 1.5}, "steps must be an integer"),
        ({"steps": 1, "every": 0}, "every must be an integer >= 1"),
        (
            {"steps": 1, "optimizer": "rmsprop"},
            "unknown optimizer 'rmsprop'; write one of group-rmsprop",
        ),
        ({"steps": 1, "optimizer": 3}, "must be a name or a torch.optim.Optimizer"),
        ({"steps": 1, "optimizer": lambda p, lr: 3}, "gave a int, not a torch.optim.Optimizer"),
        ({"steps": 1, "observe": {"loss": len}}, "the name 'loss' is taken"),
        ({"steps": 1, "observe": {"x": 3}}, "'x' must be a function"),
        ({"steps": 1, "stop": 3}, "'stop' must be a function"),
        ({"steps": 1, "lr": -1.0}, "lr must be a finite number >= 0"),
    ],
)
def test_refuses(options, message):
    model, task = start()
    with pytest.raises(OptionError, match=message):
        fit(model, task.loss, progress=False, **options)


def test_an_observation_keeps_its_form():
    model, task = start()
    lengths = iter([2, 3])
    with pytest.raises(
        ShapeError, match=r"'x' changed its form at step 1.\n  before: \(2,\)\n  now:    \(3,\)"
    ):
        fit(
            model,
            task.loss,
            steps=5,
            every=1,
            progress=False,
            observe={"x": lambda m: torch.zeros(next(lengths))},
        )


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
        fit(start()[0], loss, steps=1, progress=False)
    with torch.no_grad(), pytest.raises(OptionError, match="gradients are switched off"):
        fit(start()[0], loss, steps=1, progress=False)


def test_numpy_integers_count():
    model, task = start()
    assert fit(
        model, task.loss, steps=np.int64(3), every=np.int32(2), progress=False
    ).steps.tolist() == [0, 2, 3]


class FakeCuda:
    """Stands in for torch.cuda on a machine without one: a capture keeps the call, a replay makes it."""

    def __init__(self):
        self.events = []
        self.recording = None

    def install(self, monkeypatch, module):
        fake = self

        class Graph:
            def replay(self):
                fake.events.append("replay")
                self.step()

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                fake.events.append("wait")

        @contextlib.contextmanager
        def graph(recorded, pool=None):
            step, module_step = fake.captured.step, lambda: fake.events.append("record")
            recorded.step, fake.captured.step = step, module_step
            yield
            fake.captured.step = step

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        for name in ("stream", "device"):
            monkeypatch.setattr(torch.cuda, name, lambda given: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", graph)

        def captured(step, model, closed):
            fake.captured = CapturedStep(step, torch.device("cpu"))
            return fake.captured

        monkeypatch.setattr(module, "_captured_step", captured)


def test_a_graph_makes_the_same_steps(monkeypatch):
    """Three ordinary steps, one recording that changes nothing, then replays."""
    model, task = start()
    expected = fit(model, task.loss, steps=10, every=5, progress=False)
    model, task = start()
    fake = FakeCuda()
    fake.install(monkeypatch, sys.modules["tnreg.training.fit"])
    found = fit(model, task.loss, steps=10, every=5, progress=False, graph=True)
    assert np.array_equal(found["loss"], expected["loss"])
    assert fake.events == ["wait"] * 6 + ["record"] + ["replay"] * 7


def test_a_graph_needs_a_cuda_device():
    model, task = start()
    with pytest.raises(OptionError, match="needs a CUDA device .* found a model on cpu"):
        fit(model, task.loss, steps=1, graph=True, progress=False)
    with pytest.raises(OptionError, match="found an optimizer that evaluates the loss itself"):
        fit(model, task.loss, steps=1, graph=True, optimizer="lbfgs", progress=False)
