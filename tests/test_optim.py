"""GroupRMSprop against its formula, its state, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from tnreg import GroupRMSprop, OptionError


def test_formula():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (3, 4))
    p, q = torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())
    optimizer = GroupRMSprop(
        [{"params": [p]}, {"params": [q], "lr": 0.3}], lr=0.1, alpha=0.9, eps=1e-3
    )
    average = elapsed = 0.0
    assert optimizer.flow_time == 0.0
    for t in range(1, 6):
        optimizer.zero_grad()
        (p.square().sum() + (q**4).sum()).backward()
        g, h = 2 * a, 4 * b**3
        average = 0.9 * average + 0.1 * float(g.square().sum() + h.square().sum())
        step = 1 / (math.sqrt(average / (1 - 0.9**t)) + 1e-3)
        a, b = a - 0.1 * step * g, b - 0.3 * step * h
        optimizer.step()
        assert torch.allclose(p.detach(), a, rtol=1e-13) and torch.allclose(
            q.detach(), b, rtol=1e-13
        )
        assert optimizer.step_size == pytest.approx(0.1 * step)
        elapsed += 0.1 * step
        assert optimizer.flow_time == pytest.approx(elapsed)


def test_first_step_has_length_lr():
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = GroupRMSprop([p], lr=0.1, eps=0.0)
    assert optimizer.step_size == 0.0
    p.square().sum().backward()
    optimizer.step()
    assert torch.allclose(p.detach(), torch.tensor([3.0, 4.0], dtype=torch.float64) * (1 - 0.1 / 5))


def test_complex_closure_and_missing_gradients():
    p = torch.nn.Parameter(torch.tensor([3 + 4j]))
    still = torch.nn.Parameter(torch.ones(2))
    optimizer = GroupRMSprop([p, still], lr=0.5, eps=0.0)
    assert optimizer.step() is None

    def closure():
        optimizer.zero_grad()
        loss = p.abs().square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(25.0)
    assert torch.allclose(p.detach(), torch.tensor([3 + 4j]) * 0.9)
    assert torch.equal(still.detach(), torch.ones(2))


def test_state_dict_continues_identically():
    def make():
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        return p, GroupRMSprop([p], lr=0.1)

    def go(p, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (p**4).sum().backward()
            optimizer.step()

    p, optimizer = make()
    go(p, optimizer, 7)
    q, other = make()
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(optimizer.state_dict())
    go(p, optimizer, 5)
    go(q, other, 5)
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0"),
        ({"lr": float("nan")}, "lr must be >= 0"),
        ({"alpha": 1.0}, r"alpha must be in \[0, 1\)"),
        ({"eps": -1e-3}, "eps must be >= 0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(OptionError, match=message):
        GroupRMSprop([torch.nn.Parameter(torch.zeros(1))], **options)


def test_groups_share_their_average():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "eps": eps} for eps in (1e-3, 1e-4)]
    with pytest.raises(OptionError, match="shared by all groups"):
        GroupRMSprop(groups)


def test_the_count_on_a_device_gives_the_same_steps(monkeypatch, tmp_path):
    """What a device does, done here: count and averages as tensors, changed in place."""

    def train(steps, optimizer, p):
        for _ in range(steps):
            optimizer.zero_grad()
            (p**4).sum().backward()
            optimizer.step()

    def fresh():
        p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        return GroupRMSprop([p], lr=0.1), p

    expected, p = fresh()
    train(50, expected, p)
    monkeypatch.setattr("tnreg.training.optim._on_host", lambda x: False)
    optimizer, q = fresh()
    train(20, optimizer, q)
    held = optimizer.state[q]["square_average"]
    train(5, optimizer, q)
    assert optimizer.state[q]["square_average"] is held  # a captured graph knows this memory
    torch.save(optimizer.state_dict(), tmp_path / "o")
    other = GroupRMSprop([q], lr=0.1)
    other.load_state_dict(torch.load(tmp_path / "o"))
    train(25, other, q)
    assert torch.allclose(p, q, rtol=1e-5)
    assert other.flow_time == pytest.approx(expected.flow_time, rel=1e-5)
    assert other.step_size == pytest.approx(expected.step_size, rel=1e-5)
