"""GroupRMSprop against its formula, its state, and what is refused."""

import math

import pytest
import torch

from tnreg import GroupRMSprop, OptionError


def descend(parameters, optimizer, steps=1):
    """Minimise ``Σ p⁴``."""
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p**4).sum() for p in parameters).backward()
        optimizer.step()


def parameter(*values, dtype=torch.float64):
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def test_formula():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (3, 4))
    p, q = parameter(*a), parameter(*b)
    groups = [{"params": [p]}, {"params": [q], "lr": 0.3}]
    optimizer = GroupRMSprop(groups, lr=0.1, alpha=0.9, eps=1e-3)
    average = elapsed = 0.0
    assert optimizer.flow_time == 0.0
    for t in range(1, 6):
        descend([p, q], optimizer)
        g, h = 4 * a**3, 4 * b**3
        average = 0.9 * average + 0.1 * float(g.square().sum() + h.square().sum())
        step = 1 / (math.sqrt(average / (1 - 0.9**t)) + 1e-3)
        a, b = a - 0.1 * step * g, b - 0.3 * step * h
        for weight, expected in ((p, a), (q, b)):
            assert torch.allclose(weight.detach(), expected, rtol=1e-13)
        elapsed += 0.1 * step
        assert optimizer.step_size == pytest.approx(0.1 * step)
        assert optimizer.flow_time == pytest.approx(elapsed)


def test_complex_closure_and_missing_gradients():
    """The first step has length ``lr``."""
    p, still = parameter(3 + 4j, dtype=torch.complex64), parameter(1.0, 1.0)
    optimizer = GroupRMSprop([p, still], lr=0.5, eps=0.0)
    assert optimizer.step() is None and optimizer.step_size == 0.0 and not optimizer.state

    def closure():
        optimizer.zero_grad()
        loss = p.abs().square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(25.0)
    assert torch.allclose(p.detach(), torch.tensor([3 + 4j]) * 0.9)
    assert still.tolist() == [1.0, 1.0]


def test_state_dict_continues_identically():
    p = parameter(1.0, -2.0)
    optimizer = GroupRMSprop([p], lr=0.1)
    descend([p], optimizer, 7)
    q = parameter(*p.detach())
    other = GroupRMSprop([q], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    descend([p], optimizer, 5), descend([q], other, 5)
    assert torch.equal(p, q)


def test_refuses():
    negative = [(*case, "a finite number >= 0") for case in (("lr", -1.0), ("lr", math.nan), ("eps", -1e-3))]
    for name, value, valid in [*negative, ("alpha", 1.0, r"a number in \[0, 1\)")]:
        with pytest.raises(OptionError, match=f"{name} must be {valid}, found {value}"):
            GroupRMSprop([parameter(0.0)], **{name: value})
    groups = [{"params": [parameter(0.0)], "eps": eps} for eps in (1e-3, 1e-4)]
    with pytest.raises(OptionError, match="shared by all groups"):
        GroupRMSprop(groups)


def test_the_count_on_a_device_gives_the_same_steps(monkeypatch, tmp_path):
    """What a device does, done here: count and averages as tensors, changed in place."""
    p, q = (parameter(1.0, 2.0, 3.0, dtype=torch.float32) for _ in range(2))
    expected = GroupRMSprop([p], lr=0.1)
    descend([p], expected, 50)
    monkeypatch.setattr("tnreg.training.optim._on_host", lambda x: False)
    optimizer = GroupRMSprop([q], lr=0.1)
    descend([q], optimizer, 20)
    average = optimizer.state[q]["square_average"]
    descend([q], optimizer, 5)
    assert optimizer.state[q]["square_average"] is average  # a captured graph knows this memory
    torch.save(optimizer.state_dict(), tmp_path / "o")
    other = GroupRMSprop([q], lr=0.1)
    other.load_state_dict(torch.load(tmp_path / "o"))
    descend([q], other, 25)
    assert torch.allclose(p, q, rtol=1e-5)
    assert other.flow_time == pytest.approx(expected.flow_time, rel=1e-5)
    assert other.step_size == pytest.approx(expected.step_size, rel=1e-5)
