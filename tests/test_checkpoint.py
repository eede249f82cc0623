"""A killed training goes on and ends bit for bit as one that was never interrupted."""

import copy
import enum
import io
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import networkx
import numpy as np
import pytest
import torch
import zoo
from refusals import Bomb

from tnreg import FileError, ModeTree, OptionError, TnregError, Trajectory, completion, fit

TREE = ModeTree.binary(4)


def data(seed=9):
    return completion(zoo.model_of(TREE, seed=seed), 150)


def train(
    path, *, steps=60, stop_at=None, optimizer="group-rmsprop", noisy=False, hidden=True, every=10, **options
):
    """Train; at observation number ``stop_at[1]`` the process is killed, or Ctrl-C comes."""
    model, task, observation = zoo.model_of(TREE, seed=0), data(), itertools.count(1)
    kind, number = stop_at or (None, None)

    def loss(m):
        return task.loss(m) * (1 + 0.1 * torch.rand((), dtype=torch.float64) if noisy else 1.0)

    def watch(m):
        if next(observation) == number:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        if noisy is True:
            torch.rand(3)
        return m.local_components()

    run = fit(model, loss if hidden else task.loss, steps=steps, every=every, optimizer=optimizer,
              progress=False, checkpoint=path, checkpoint_seconds=0, observe={"components": watch},
              **options)  # fmt: skip
    return model, run


def assert_equal(trained, expected):
    (model, run), (other, whole) = trained, expected
    assert_same_weights(model, other)
    assert np.array_equal(run.steps, whole.steps) and repr(run) == repr(whole)
    for name in ("loss", "components"):
        torch.testing.assert_close(run[name], whole[name], rtol=0, atol=0)


def assert_same_weights(model, expected):
    for weight, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, other)


def short_lbfgs(parameters, lr):
    return torch.optim.LBFGS(parameters, lr=lr, max_iter=2)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["group-rmsprop", "adam", short_lbfgs])
@pytest.mark.parametrize("noisy", [False, True])
def test_an_interrupted_training_goes_on(tmp_path, optimizer, noisy):
    torch.manual_seed(3)
    whole = train(None, optimizer=optimizer, noisy=noisy)
    torch.manual_seed(3)
    path = tmp_path / "c"
    _, cut = train(path, optimizer=optimizer, noisy=noisy, stop_at=("ctrl-c", 4))
    assert cut.stop_reason == "interrupted" and cut.steps.tolist() == [0, 10, 20]
    torch.manual_seed(4)  # the state of torch's generator comes from the file
    assert_equal(train(path, optimizer=optimizer, noisy=noisy), whole)
    assert_equal(train(path, optimizer=optimizer, noisy=noisy), whole)  # returned as it was
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["group-rmsprop", "gauss-newton"])
def test_a_killed_process_goes_on(tmp_path, monkeypatch, optimizer):
    gradient = optimizer != "gauss-newton"  # which has to see the task, and converges earlier
    options = {"optimizer": optimizer, "hidden": gradient, "every": 10 if gradient else 2}
    code = f"import sys, test_checkpoint as t; t.train(sys.argv[1], stop_at=('kill', 5), **{options})"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")])
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "c").exists()
    assert_equal(train(tmp_path / "c", **options), train(None, **options))


@pytest.mark.slow
def test_more_steps_than_before_and_a_verdict(tmp_path):
    train(tmp_path / "c", steps=30)
    assert_equal(train(tmp_path / "c"), train(None))
    with pytest.raises(OptionError, match="is at step 60, beyond steps=40"):
        train(tmp_path / "c", steps=40)
    for _ in range(2):
        _, run = train(tmp_path / "d", stop=lambda run: "enough" if len(run) == 3 else False)
        assert run.stop_reason == "enough" and run.steps.tolist() == [0, 10, 20]


@pytest.mark.parametrize(
    ("optimizer", "noisy"), [("group-rmsprop", False), ("adam", "in the loss"), (short_lbfgs, False)]
)
def test_more_steps_from_a_row_between(tmp_path, optimizer, noisy):
    """The last row of a training need not be at a multiple of ``every``."""
    torch.manual_seed(3)
    model, whole = train(None, optimizer=optimizer, noisy=noisy)
    torch.manual_seed(3)
    train(tmp_path / "c", steps=34, optimizer=optimizer, noisy=noisy)
    torch.manual_seed(4)
    continued, run = train(tmp_path / "c", optimizer=optimizer, noisy=noisy)
    assert run.steps.tolist() == sorted([*whole.steps.tolist(), 34])
    assert run["loss"][run.steps != 34].tolist() == whole["loss"].tolist()
    assert_same_weights(continued, model)


def test_written_at_intervals(tmp_path, monkeypatch):
    times, written = iter(range(0, 1000, 10)), []
    monkeypatch.setattr("tnreg.training.checkpoint.time.monotonic", lambda: next(times))

    def save(path, data):
        state = torch.load(io.BytesIO(data), weights_only=True)
        written.append(len(Trajectory.from_bytes(bytes(state["run"].tolist()))))

    monkeypatch.setattr("tnreg.training.checkpoint.save_whole", save)
    fit(zoo.model_of(TREE), data().loss, steps=60, every=10, progress=False,
        checkpoint=tmp_path / "c", checkpoint_seconds=25)  # fmt: skip
    assert written == [3, 6, 7]  # rows; the clock moves by 10 with every look at it


@pytest.mark.parametrize(("changed", "message"), [
    ({"settings": {"seed": 2}}, "other settings.\n  seed: 1 there, 2 now"),
    ({"optimizer": "sgd"}, "optimizer: .*GroupRMSprop.*SGD"),
    ({"lr": 0.5}, r"0.01.*0.5"),
    ({"every": 5}, "every: 10 there, 5 now"),
    ({"observe": {}}, "observed: .*components"),
    ({"sizes": (3, 3, 5, 7)}, "is of another model"),
    ({"tree": ModeTree([[0, 2], [1, 3]])}, r"model: .*\[0, 1\].*there, .*\[0, 2\].* now"),
    ({"dtype": torch.float32}, "model: .*float64.* there, .*float32.* now"),
    ({"seed": 10}, "task: '<Completion .* there, '<Completion .* now"),
    ({"seed": 10, "hidden": True}, "loss found there now: (.|\n)*other data, or another loss"),
])  # fmt: skip
def test_other_trainings_are_refused(tmp_path, changed, message):
    hidden = changed.pop("hidden", False)  # the task is seen by its loss alone
    train(tmp_path / "c", steps=20, settings={"seed": 1}, hidden=hidden)
    options = {"observe": {"components": lambda m: m.local_components()}, "settings": {"seed": 1}}
    options |= {"every": 10, **changed}
    made = {name: options.pop(name, None) for name in ("sizes", "dtype")}
    model = zoo.model_of(options.pop("tree", TREE), seed=0, **{k: v for k, v in made.items() if v})
    before, task = copy.deepcopy(model), data(options.pop("seed", 9))
    loss = (lambda m: task.loss(m)) if hidden else task.loss
    with pytest.raises(OptionError, match=message):
        fit(model, loss, steps=60, progress=False, checkpoint=tmp_path / "c", **options)
    if "loss" not in message:
        assert_same_weights(model, before)


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "c"
    torch.save({"format": "tnreg.checkpoint/1", "run": Bomb(tmp_path / "made")}, path)
    with pytest.raises(FileError, match="not a checkpoint"):
        train(path)
    assert not (tmp_path / "made").exists()
    torch.save({"format": "other", "run": 1}, path)
    with pytest.raises(FileError, match="format 'other', this version reads"):
        train(path)
    with pytest.raises(FileError, match="no folder"):
        train(tmp_path / "nowhere" / "c")


class Color(enum.Enum):
    RED = 1


def custom_tree():
    """A tree whose nodes are named by what is no Python literal."""
    left, right = frozenset({"b", "a"}), Color.RED
    edges = [("root", left), ("root", right), (left, 0), (left, 1), (right, 2), (right, 3)]
    return ModeTree(networkx.DiGraph(edges))


@pytest.mark.parametrize("options", [
    {"lr": np.logspace(-3, -1, 3)[1]},
    {"optimizer": lambda p, lr: torch.optim.Adam(p, lr, (np.float64(0.5), 0.9), np.float32(1e-8))},
    {"settings": {"a": np.float32(0.1), "b": np.arange(3), "c": torch.ones(2), "d": np.nan, 1: Path("x")}},
    {"observe": {"a\0b": lambda m: 1.0, "a": lambda m: 2.0}},
    {"observe": {"\ud800": lambda m: {np.int64(3): 1.0, (np.int8(1),): 2}}},
    {"observe": {"parts": lambda m: m.local_components()}},
    {"scheduler": lambda p: torch.optim.lr_scheduler.MultiStepLR(p, np.array([2, 12]), np.float32(0.3))},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_what_is_written_is_read(tmp_path, options):
    """The training ends in the same bits, whatever its numbers, names and keys are made of."""

    def trained(path, steps):
        model = zoo.model_of(custom_tree(), seed=0)
        return model, fit(
            model, data().loss, steps=steps, every=5, progress=False, checkpoint=path, **options
        )

    whole, expected = trained(None, 20)
    trained(tmp_path / "c", 10)
    for _ in range(2):  # it goes on, then is returned as it was
        model, run = trained(tmp_path / "c", 20)
        assert_same_weights(model, whole)
        assert run.form() == expected.form() and run["loss"].tolist() == expected["loss"].tolist()


@pytest.mark.parametrize(("options", "message"), [
    ({"settings": {"f": object()}}, "settings must be a dict of values for JSON: .*another name"),
    ({"settings": {(1, 2): 3}}, "settings must be a dict of values for JSON"),
    ({"observe": {"x": lambda m: {Color.RED: 1.0}}}, "could not be read again.\n.*'x' has other keys"),
    ({"observe": {"x": lambda m: {object(): 1.0}}}, "could not be read again"),
    ({"observe": {3: lambda m: 1.0}}, "name of an observation is text, found 3"),
    ({"optimizer": lambda p, lr: torch.optim.SGD([{"params": list(p), "color": Color.RED}], lr=lr)},
     "could not be read again"),
])  # fmt: skip
def test_what_could_not_be_read_is_refused_before_training(tmp_path, options, message):
    model = zoo.model_of(TREE, seed=0)
    before = copy.deepcopy(model)
    with pytest.raises(TnregError, match=message):
        fit(model, data().loss, steps=9, progress=False, checkpoint=tmp_path / "c", **options)
    assert_same_weights(model, before)
    assert not (tmp_path / "c").exists()


def test_flipped_bits_are_found(tmp_path):
    """A damaged file is refused, or the damage is in what nobody reads; never are there other numbers."""
    train(tmp_path / "c", steps=10)
    whole, good = train(tmp_path / "c", steps=10), (tmp_path / "c").read_bytes()
    refused = 0
    for place in range(0, len(good), 101):
        (tmp_path / "c").write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        try:
            assert_equal(train(tmp_path / "c", steps=10), whole)
        except FileError:
            refused += 1
    assert refused > len(good) / 101 / 2
