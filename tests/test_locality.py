"""The locality experiment: its networks, its trainings bit for bit, its sweeps."""

import csv
import dataclasses
import functools
import io
import itertools
import json
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from clock import deadline_after

pytest.importorskip("sklearn")

from safetensors.torch import load_file

from tnreg import DataError, FileError, OptionError, Trajectory, images
from tnreg.experiments import locality, nets, probed
from tnreg.experiments.locality import comparison
from tnreg.experiments.locality import pictures as locality_figure
from tnreg.experiments.locality import state as locality_state
from tnreg.experiments.locality import train as locality_run
from tnreg.experiments.locality.augment import AUGMENTATIONS, Augmentation
from tnreg.experiments.locality.settings import PENALTIES, Execution, Settings, penalty_of
from tnreg.experiments.locality.train import train
from tnreg.experiments.sweep import pictures as sweep_figure
from tnreg.experiments.sweep.cell import Unfinished
from tnreg.machine.processes import Processes
from tnreg.training import cuda_graph

pytestmark = pytest.mark.slow

QUICK = Settings(epochs=4, test_every=2, igc_every=1, interaction_every=2, rank_start=0, lr=0.02)
SETS = {"train": 130, "test": 50}


@pytest.fixture(scope="module")
def pairs():
    return [images.is_same_class(n, distance=24, seed=1, split=s) for s, n in SETS.items()]


@pytest.fixture
def run(pairs, tmp_path):
    """Train into a folder of the test by settings like QUICK."""

    def run(name, arm="plain", data=pairs, **changes):
        options = {k: changes.pop(k) for k in ("execution", "deadline", "before") if k in changes}
        settings = dataclasses.replace(QUICK, **changes)
        return train(settings, arm, 1, *data, tmp_path / name, **options)

    return run


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_run(one, other):
    """The same weights and rows bit for bit."""
    a, b = weights(one), weights(other)
    assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (Trajectory.load(folder / "trajectory.npz") for folder in (one, other))
    assert all(np.array_equal(a[name], b[name], equal_nan=True) for name in a.names)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("small-cnn", 76_593), ("wide-cnn", 415_793), ("dilated-cnn", 76_593), ("normalized-cnn", 77_041),
        ("small-resnet", 97_009), ("resnet-18", 11_170_753), ("small-vit", 68_225),
    ],
)  # fmt: skip
def test_networks(name, count):
    net = nets.build(name, 1)
    assert sum(p.numel() for p in net.parameters()) == count
    for size in ((64, 64), (8, 40)):
        assert net(torch.randn(2, 1, *size)).shape == (2, 1)
    assert nets.build(name, 3, num_classes=5)(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    dropping = [m.p for m in nets.build(name, 1, dropout=0.5).modules() if isinstance(m, torch.nn.Dropout)]
    assert 0.5 in dropping
    if name in ("small-cnn", "resnet-18"):
        first = next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d)).weight
        he = (2 / (9 if count < 1e6 else 64 * 49)) ** 0.5
        assert float(first.detach().std()) == pytest.approx(he, rel=0.15)


def test_where_networks_look(pairs):
    """A ViT tells places apart; the residual network sees as far as the CNN; dropout is where published."""
    x = torch.from_numpy(pairs[0].images[:4])
    vit = nets.build("small-vit", 1)
    assert not torch.allclose(vit(x), vit(x.roll(16, -1)), atol=1e-4)
    for name in ("small-cnn", "small-resnet"):
        net = nets.build(name, 1).eval()
        features = net.features if name == "small-cnn" else torch.nn.Sequential(net.stem, net.blocks)
        x = torch.randn(64, 1, 8, 80, requires_grad=True)
        seen = torch.autograd.grad(features(x)[..., 5].sum(), x)[0].abs().sum((0, 1, 2)).nonzero()
        assert int(seen.max() - seen.min()) == 38
    net = nets.build("resnet-18", 1, dropout=0.5)
    calls = []
    net.drop.register_forward_hook(lambda module, inputs, out: calls.append(inputs[0].shape[1]))
    net(torch.randn(2, 1, 64, 64))
    assert calls == [64, 128, 256]


def test_network_by_import_path(monkeypatch):
    module = types.ModuleType("someones")

    def colour(weights=None, **options):
        assert options == {"num_classes": 1}  # as torchvision's builders take it
        layers = torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten(), torch.nn.LazyLinear(1)
        return torch.nn.Sequential(*layers)

    module.colour, module.number, module.bare = colour, lambda: 3, lambda: torch.nn.Flatten()
    monkeypatch.setitem(sys.modules, "someones", module)
    assert nets.build("someones:colour", 1)(torch.randn(2, 1, 8, 8)).shape == (2, 1)
    assert isinstance(nets.build("someones:bare", 1), torch.nn.Flatten)
    for name, channels, options, message in (
        ("someones:colour", 1, {"dropout": 0.5}, "has no keyword 'dropout'"),
        ("torch.nn:Linear", 1, {}, "missing a required argument: 'in_features'"),
        ("someones:number", 1, {}, "gave a int, not an nn.Module"),
        ("someones:colour", 2, {}, "takes 3 channels, the images have 2"),
        *((n, 1, {}, f"no network '{n}'") for n in ("nothing", "someones:none", "no_one:net", ":x")),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            nets.build(name, channels, **options)


# Images through the network for one that is shown; of batches of 64, 64 and 2 there are 132 crossed ones.
IMAGES = {"sam": 2, "igc": 3, "interaction": 1 + 132 / 2 / 130, "rank": 1 + 132 / 130}


@pytest.mark.parametrize("arm", locality_run.ARMS)
def test_every_arm(arm, run, tmp_path):
    before = torch.get_rng_state()
    summary = run("run", arm)
    assert torch.equal(before, torch.get_rng_state())
    assert summary["epochs"] == 4 and summary["stopped by"] == "epochs"
    assert 0 <= summary["test accuracy"] <= 1 and summary["cpu seconds"] > 0
    assert (summary["penalty"] > 0) == (arm in PENALTIES)
    assert summary["images"] == pytest.approx(IMAGES.get(arm, 1))
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["config"]["arm"] == arm and about["summary"] == summary
    history = Trajectory.load(tmp_path / "run" / "trajectory.npz")
    assert history.names == ("loss", "penalty", "train accuracy", "test accuracy")
    assert np.isfinite(history["test accuracy"]).tolist() == [False, True, False, True]
    assert history["test accuracy"][-1] == summary["test accuracy"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    with open(tmp_path / "run" / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["loss"]) for row in rows] == history["loss"].tolist()


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmentations_by_their_definition(kind):
    """Image by image, and with strength 0 nothing changes."""
    settings = dataclasses.replace(QUICK, augment=kind, shift=2)
    pictures = torch.rand(9, 2, 6, 10)
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    order = torch.tensor([4, 8, 2, 5])

    def of(index):
        return pictures[index], labels[index]

    augment = Augmentation(settings, 1)
    drawn = augment.draw(order, pictures.shape[1:])
    assert len(drawn) == AUGMENTATIONS[kind] and all(len(part) == 4 for part in drawn)
    found, targets = augment(of, order, drawn)
    if kind in ("mixup", "cutmix"):
        partners, keep = drawn
        assert sorted(partners.tolist()) == sorted(order.tolist())
        assert ((keep == 0) | (keep == 1)).all() == (kind == "cutmix")
    for i, n in enumerate(order):
        x, y = pictures[n], int(labels[n])
        if kind == "noise":
            assert torch.equal(found[i], x + drawn[0][i])
        elif kind == "shift":
            down, right = drawn[0][i].tolist()
            for row, column in itertools.product(range(6), range(10)):
                there = x[:, min(max(row - down, 0), 5), min(max(column - right, 0), 9)]
                assert torch.equal(found[i, :, row, column], there)
        elif kind == "none":
            assert torch.equal(found[i], x)
        else:
            other, its = pictures[partners[i]], int(labels[partners[i]])
            assert torch.allclose(found[i], keep[i] * x + (1 - keep[i]) * other)
            one = float(keep[i].mean())
            assert targets[i].tolist() == pytest.approx(
                [one * (y == k) + (1 - one) * (its == k) for k in (0, 1)]
            )
    if targets.ndim == 1:
        assert torch.equal(targets, labels[order])
    else:  # one logit or two, the loss is the same
        logits = torch.randn(4, 1)
        both = torch.cat([torch.zeros(4, 1), logits], 1)
        three = torch.cat([both, torch.full((4, 1), -1e9)], 1)
        losses = [locality_run._loss(some, targets) for some in (logits, both, three)]
        assert torch.allclose(losses[0], losses[1]) and torch.allclose(losses[1], losses[2])
        assert locality_run._right(logits, targets) == ((logits[:, 0] > 0) == (targets[:, 1] > 0.5)).sum()
    if kind in ("noise", "shift"):
        augment = Augmentation(dataclasses.replace(settings, noise=0.0, shift=0), 1)
        assert torch.equal(augment(of, order, augment.draw(order, (2, 6, 10)))[0], pictures[order])


def test_augmentations_take_their_strength():
    """The noise has its deviation, images move by up to so many pixels, shares are from Beta."""
    found = {
        kind: torch.stack(
            [Augmentation(dataclasses.replace(QUICK, augment=kind, mixup=2.0), seed)
             .draw(torch.arange(50), (1, 40, 40))[-1].double() for seed in range(200)]
        )
        for kind in ("noise", "shift", "mixup", "cutmix")
    }  # fmt: skip
    assert float(found["noise"].std()) == pytest.approx(0.2, rel=0.01)
    assert found["shift"].unique().tolist() == [-1, 0, 1]
    shares = {kind: found[kind][:, 0].mean((1, 2, 3)) for kind in ("mixup", "cutmix")}
    assert float(shares["mixup"].mean()) == pytest.approx(0.5, abs=0.05)
    assert float(shares["mixup"].var()) == pytest.approx(1 / 20, rel=0.3)  # a b / (a + b)² / (a + b + 1)
    assert 0 <= shares["cutmix"].min() < 0.2 and 0.9 < shares["cutmix"].max() <= 1


def test_pretraining_on_shorter_distances(pairs, run, tmp_path):
    """Its epochs show the other images without a penalty; the stop rule looks at what follows."""
    near = images.is_same_class(130, distance=0, seed=1)
    run("near", data=[near, pairs[1]], epochs=2)
    options = {"pretrain_epochs": 2, "stop_above": 0.0, "epochs": 9}
    summary = run("run", "igc", before=[near], **options)
    assert summary["epochs"] == 2 + QUICK.stop_epochs
    rows, other = (Trajectory.load(tmp_path / name / "trajectory.npz") for name in ("run", "near"))
    assert rows["loss"][:2].tolist() == other["loss"].tolist()
    assert rows["penalty"][:2].tolist() == [0, 0] and (rows["penalty"][2:] > 0).all()
    config = dataclasses.replace(
        locality.tiny, arms=("plain",), distances=(0, 24), seeds=(1,), pretrain_epochs=1, epochs=3
    )
    cells = locality.cells(config)
    sets = [comparison._sets(locality.Training(**cell)) for cell in cells]
    assert [[(one.distance, split) for one, split in some] for some in sets] == [
        [(0, "train"), (0, "test")],
        [(0, "train"), (8, "train"), (16, "train"), (24, "train"), (24, "test")],
    ]
    assert [row["epochs"] for row in locality.run(config, tmp_path / "s")] == [3, 3]


def test_all_arms_see_the_images_in_one_order(run, monkeypatch):
    """Also those that draw random numbers in between."""
    step, orders = locality_run._State.step, {}

    def record(self, index, *arguments, **options):
        orders.setdefault(arm, []).append(index.tolist())
        step(self, index, *arguments, **options)

    monkeypatch.setattr(locality_run._State, "step", record)
    for arm in locality_run.ARMS:
        run(arm, arm)
    assert all(order == orders["plain"] for order in orders.values())
    first, second = ([*itertools.chain(*orders["plain"][i : i + 3])] for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(130)) and first != second


def test_arms_that_add_nothing_are_plain(run, tmp_path):
    """With weight 0, and with patches off the digits: a swap of background changes nothing."""
    run("plain")
    plain = weights(tmp_path / "plain")
    for arm in PENALTIES:
        for changes, tolerance in (({arm: 0.0}, 0), ({"patches": "off"}, 1e-4)):
            run(f"{arm}-{tolerance}", arm, **changes)
            there = weights(tmp_path / f"{arm}-{tolerance}")
            assert all(torch.allclose(plain[key], there[key], atol=tolerance) for key in plain)
    run("igc", "igc")
    assert not torch.equal(weights(tmp_path / "igc")["head.weight"], plain["head.weight"])
    for name, arm in (("noise", "plain"), ("none", "rank")):
        run(name, arm, rank=0.0, augment="noise")
    assert_same_run(tmp_path / "noise", tmp_path / "none")


KILLED = """
import os, signal, sys, torch
from tnreg import images
from tnreg.experiments.locality.train import Settings, _State, train
epoch = _State.epoch
_State.epoch = lambda self: os.kill(os.getpid(), signal.SIGKILL) if len(self.rows) == 2 else epoch(self)
torch.set_num_threads(1)
data = images.load(sys.argv[1] + ".npz")
train(Settings(epochs=4), "interaction", 1, data, data, sys.argv[1])
"""


def test_killed_and_resumed_bit_for_bit(pairs, tmp_path):
    data = images.load(pairs[0].save(tmp_path / "killed.npz"))
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "killed.checkpoint").exists() and not (tmp_path / "killed").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in ("killed", "whole"):
            train(Settings(epochs=4), "interaction", 1, data, data, tmp_path / name)
    finally:
        torch.set_num_threads(threads)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("arm", "augment", "portable"),
    [
        ("dropout", "none", False), ("igc", "noise", True), ("interaction", "cutmix", False),
        ("rank", "shift", True), ("sam", "mixup", False),
    ],
)  # fmt: skip
def test_a_deadline_ends_with_the_state_written(arm, augment, portable, run, tmp_path, monkeypatch):
    execution = Execution(portable=portable, checkpoint_seconds=1e9)
    run = functools.partial(run, augment=augment, optimizer="adam" if arm == "rank" else "sgd")
    run("whole", arm)
    with monkeypatch.context() as patched:
        deadline = deadline_after(2, patched)
        with pytest.raises(Unfinished, match=r"after epoch 2 is in .*cut.checkpoint"):
            run("cut", arm, execution=execution, deadline=deadline)
    lines = (tmp_path / "cut.history.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0] == "epoch,loss,penalty,train accuracy,test accuracy"
    assert 0 <= float(lines[2].split(",")[4]) <= 1
    assert len(list(tmp_path.glob("cut.checkpoint.*"))) == portable
    with pytest.raises(OptionError, match="of a training with other settings"):
        run("cut", arm, lr=0.03)
    # nothing else that was done meanwhile changes where the next one goes on
    torch.rand(7)
    (tmp_path / "cut.history.csv").write_text("lost")
    (resumed,) = run("cut", arm)["resumed"]
    assert resumed == {"epoch": 2, "momentum": "exact", "from": "cpu", "on": "cpu"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    ("limit", "kept"), [(700_000, "exact"), (560_000, "bfloat16"), (400_000, "left out")]
)
def test_a_state_that_travels(limit, kept, run, tmp_path, monkeypatch):
    """306 kB of weights and as much momentum: what does not fit is rounded, then left out, and said."""
    for name, size in (("_WHOLE", limit), ("_PART", 150_000), ("_BESIDE", 50_000)):
        monkeypatch.setattr(locality_state, name, size)
    execution = Execution(portable=True, model_file=False)
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir(), here.mkdir()
    with monkeypatch.context() as patched, pytest.raises(Unfinished):
        run("there/a", execution=execution, deadline=deadline_after(2, patched))
    parts = sorted(there.glob("a.checkpoint.*"))
    raw = [part.read_bytes() for part in parts]
    assert len(parts) > 2 and max(map(len, raw)) <= 150_000 and sum(map(len, raw)) <= limit
    for file in [*parts, there / "a.checkpoint"]:
        shutil.copy(file, here)
    (here / "a.checkpoint.01234567.1-of-3").write_text("of a process that was killed")
    about = {"arm": "plain", "seed": 1, **dataclasses.asdict(QUICK)}
    state = locality_state.read_state(here / "a.checkpoint", about)
    assert state["momentum"] == kept
    assert (state["optimizer"]["state"] == {}) == (kept == "left out")
    before = torch.load(io.BytesIO(b"".join(raw)), weights_only=True)["net"]
    assert all(torch.equal(before[key], value) for key, value in state["net"].items())
    summary = run("here/a", execution=execution)
    assert summary["resumed"][0]["momentum"] == kept and summary["epochs"] == 4
    assert sorted(p.name for p in here.iterdir()) == ["a"]
    assert not (here / "a" / "model.safetensors").exists()
    whole = run("whole")
    assert (summary["loss"] == whole["loss"]) == (kept == "exact")
    assert summary["loss"] == pytest.approx(whole["loss"], rel=0.1)
    # a part that is damaged or missing is noticed
    middle = len(raw[1]) // 2
    parts[1].write_bytes(raw[1][:middle] + bytes([raw[1][middle] ^ 1]) + raw[1][middle + 1 :])
    with pytest.raises(FileError, match="its parts are not those that were written"):
        run("there/a")
    parts[1].unlink()
    with pytest.raises(FileError, match="not a checkpoint"):
        run("there/a")


def test_a_network_too_large_to_travel_is_refused_before_it_is_trained(run, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="leave out portable, and the state is one file"):
        locality_state.check_travels(torch.nn.Linear(4000, 4000))
    locality_state.check_travels(nets.ResNet())
    monkeypatch.setattr(locality_state, "_WHOLE", 2**20)
    with pytest.raises(OptionError, match="the network has 306,372 bytes of weights"):
        run("a", execution=Execution(portable=True))
    assert not list(tmp_path.iterdir())


def test_the_state_of_resnet_18_travels_without_momentum(tmp_path):
    net = nets.ResNet()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
    locality_state.write_state(tmp_path / "a.checkpoint", state, portable=True)
    sizes = [part.stat().st_size for part in tmp_path.glob("a.checkpoint.*")]
    assert len(sizes) == 4 and max(sizes) == 14 * 2**20 and 42 < sum(sizes) / 2**20 < 43
    written = locality_state._read(tmp_path / "a.checkpoint")
    assert written["momentum"] == "left out" and written["optimizer"]["state"] == {}
    net.load_state_dict(written["net"])
    locality_state.write_state(tmp_path / "a.checkpoint", state, portable=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.checkpoint"]
    assert "momentum" not in locality_state._read(tmp_path / "a.checkpoint")


@pytest.mark.parametrize(("seconds", "count"), [(0.0, 4), (1e9, 0)])
def test_states_are_written_every_so_many_seconds(seconds, count, run, monkeypatch):
    written = []
    monkeypatch.setattr(locality_run, "write_state", lambda *_, **options: written.append(options))
    run("a", execution=Execution(checkpoint_seconds=seconds))
    assert len(written) == count


def test_inputs_are_standardized(pairs, run, tmp_path):
    """Training and test images by the numbers of the training images; what was trained is probed so."""
    data, test = pairs
    digits = np.concatenate([data.images[:, :, a:c, b:d] for a, b, c, d in data.boxes])
    by_hand = [dataclasses.replace(s, images=(s.images - digits.mean()) / digits.std()) for s in pairs]
    run("run", "igc", standardize=True)
    run("hand", "igc", by_hand)
    a, b = (weights(tmp_path / name) for name in ("run", "hand"))
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)
    a, b = (
        probed.network_of(str(tmp_path / name), 1)(torch.from_numpy(part.images[:4]))
        for name, part in (("run", test), ("hand", by_hand[1]))
    )
    assert torch.allclose(a, b, atol=1e-3)
    colours = images.ImageSet(np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2), None, (), None, {})
    numbers = locality_run._standard(colours)
    assert np.allclose(numbers["mean"], (colours.images / 255).mean((0, 2, 3)))
    assert np.allclose(numbers["deviation"], (colours.images / 255).std((0, 2, 3)))


@pytest.mark.parametrize(
    ("arm", "augment"),
    [("plain", "cutmix"), ("sam", "none"), ("igc", "shift"), ("interaction", "noise"), ("rank", "mixup")],
)
@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_a_step_reads_nothing_from_the_device(arm, augment, statistics):
    """On the device "meta" nothing can be read: an epoch of steps that waits for it would be an error."""
    data = images.pathfinder(10, length=3, size=32, seed=1)
    settings = dataclasses.replace(
        QUICK, batch=4, statistics=statistics, standardize=True, patches="random", interaction_every=1,
        augment=augment,
    )  # fmt: skip
    processes = Processes(device=torch.device("meta"))
    state = locality_run._State(settings, arm, 1, data, processes, Execution())
    state.net.train()
    assert state.steps() == (10, 3 if arm in PENALTIES else 0)
    assert state.sums.device.type == "meta"


class Replayed:
    """Stands in for a captured step: it is made with tensors that stay, and called without arguments."""

    calls = 0

    def __init__(self, step, device, pool, side):
        self.step = step

    def __call__(self):
        Replayed.calls += 1
        self.step()


@pytest.mark.parametrize(
    ("arm", "augment"), [("plain", "mixup"), ("sam", "none"), ("igc", "none"), ("rank", "noise")]
)
def test_steps_by_tensors_that_stay_are_the_same(arm, augment, run, tmp_path, monkeypatch):
    """What CUDA graphs replay, on a CPU: all that changes from step to step is copied in."""
    data = [images.pathfinder(40, length=3, size=32, seed=1)] * 2
    changes = {
        "batch": 12,
        "patches": "random",
        "patch_size": 6,
        "igc_warmup": 5,
        "epochs": 2,
        "augment": augment,
    }
    run("eager", arm, data, **changes)
    graph = Execution(graph=True)
    with pytest.raises(OptionError, match="graph needs a CUDA device and one process, found cpu"):
        run("graph", arm, data, execution=graph, **changes)
    monkeypatch.setattr(cuda_graph, "CapturedStep", Replayed)
    monkeypatch.setattr(locality_run, "check_graph", lambda device, count: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(Replayed, "calls", 0)
    run("graph", arm, data, execution=graph, **changes)
    assert Replayed.calls == 8
    assert_same_run(tmp_path / "eager", tmp_path / "graph")


def test_early_stop(run, tmp_path):
    summary = run("run", epochs=50, stop_above=0.4, stop_epochs=3, test_every=10, lr=0.05)
    reached = Trajectory.load(tmp_path / "run" / "trajectory.npz")["train accuracy"]
    assert summary["stopped by"] == "train accuracy" and summary["epochs"] == len(reached) < 50
    assert (reached[-3:] >= 0.4).all()


def test_a_last_batch_of_one_is_left_out(run, tmp_path):
    run("run", "igc", [images.is_same_class(33, distance=0, seed=1)] * 2, batch=32)
    assert (tmp_path / "run").exists()


def test_bytes_colours_and_half_precision(run):
    """uint8 images, logits for two classes, bfloat16."""
    data = [images.pathfinder(8, length=3, size=32, seed=1)] * 2
    changes = {"patches": "differing", "patch_size": 4, "batch": 4, "precision": "bfloat16"}
    summary = run("half", "interaction", data, epochs=1, **changes)
    assert summary["epochs"] == 1 and 0 < summary["penalty"] <= 1
    two, labels = torch.tensor([[0.0, 2.0], [3.0, 1.0]]), torch.tensor([1, 1])
    assert locality_run._right(two, labels) == 1 and locality_run._right(two[:, 1:], labels) == 2
    assert locality_run._loss(two, labels) == torch.nn.functional.cross_entropy(two, labels)


def test_trainings_refuse(pairs, run, tmp_path):
    (tmp_path / "b.checkpoint").write_text("hello")
    dots = [images.pathfinder(4, length=3, size=32, seed=1)] * 2
    for name, arm, changes, data, error, message in [
        ("a", "none", {}, pairs, OptionError, "no arm 'none'; there is plain, weight-decay"),
        ("a", "plain", {"epochs": 0}, pairs, OptionError, "epochs must be an integer >= 1"),
        ("a", "plain", {"augment": "blur"}, pairs, OptionError, "no augment 'blur'; there is none, noise"),
        ("a", "plain", {"optimizer": "lion"}, pairs, OptionError, "no optimizer 'lion'; there is sgd, adam"),
        ("a", "plain", {"noise": -1.0}, pairs, OptionError, "noise must be"),
        ("a", "plain", {"shift": 0.5}, pairs, OptionError, "shift must be an integer"),
        ("a", "plain", {"mixup": 0.0}, pairs, OptionError, "mixup must be"),
        ("a", "plain", {"pretrain_epochs": -1}, pairs, OptionError, "pretrain_epochs must be"),
        ("a", "igc", {"patches": "all"}, pairs, OptionError, "no patches 'all'; there is images"),
        ("a", "igc", {}, dots, OptionError, "patches 'images' need the boxes of image pairs"),
        ("a", "plain", {"lr": 1e30}, pairs, DataError, "the loss is not finite in epoch 1"),
        ("b", "plain", {}, pairs, FileError, "not a checkpoint"),
    ]:
        with pytest.raises(error, match=message):
            run(name, arm, data, **changes)


def test_sweep(tmp_path):
    place = tmp_path / "sweep"
    rows = locality.run(locality.tiny, place, progress=True)
    assert [(r["arm"], r["distance"], r["seed"]) for r in rows[:5]] == [
        ("plain", 0, 1), ("igc", 0, 1), ("interaction", 0, 1), ("rank", 0, 1), ("plain", 24, 1),
    ]  # fmt: skip
    assert len(rows) == 16 and all(row["seconds"] > 0 for row in rows)
    about = json.loads((place / "config.json").read_text())
    assert about["experiment"] == "locality" and about["summary"] == rows
    with open(place / "results.csv", newline="") as file:
        in_file = [float(row["test accuracy"]) for row in csv.DictReader(file)]
    assert in_file == [row["test accuracy"] for row in rows]
    means = {(row["arm"], row["distance"]): row for row in about["table"]}
    some = [r["test accuracy"] for r in rows if (r["arm"], r["distance"]) == ("igc", 24)]
    assert means["igc", 24]["test accuracy"] == np.mean(some)
    assert means["igc", 24]["deviation"] == np.std(some, ddof=1)
    assert means["plain", 0]["cost"] == 1 and means["igc", 24]["seeds"] == 2
    assert means["plain", 0]["images"] == 1 and means["igc", 24]["images"] == 3
    assert [(row["arm"], row["minus"]) for row in about["paired"][:3]] == [
        ("igc", "plain"), ("interaction", "plain"), ("rank", "plain"),
    ]  # fmt: skip

    # what is there is not trained again; more seeds and arms are added to it
    before = (place / "plain-0-seed-1" / "config.json").stat().st_mtime_ns
    more = dataclasses.replace(locality.tiny, arms=("plain",), seeds=(1, 3, 4), distances=(24,))
    again = locality.run(dataclasses.replace(more, workers=2), place)
    assert len(again) == 3 and again[0] == rows[4]
    assert (place / "plain-0-seed-1" / "config.json").stat().st_mtime_ns == before
    (place / "locality.png").unlink()
    assert locality.figure(place).stat().st_size > 1000
    with pytest.raises(OptionError, match=r"other settings(.|\n)*lr: 0.05 there, 0.1 now"):
        locality.run(dataclasses.replace(locality.tiny, lr=0.1), place)


def test_sweep_of_pathfinder(tmp_path, monkeypatch):
    """The command of the full experiment, small: its sets are kept and used by all arms."""
    config = dataclasses.replace(
        locality.SETS["pathfinder"], distances=(3,), seeds=(1,), train=20, test=10, size=32, epochs=1,
        matched=True, model="small-cnn",
    )  # fmt: skip
    rows = locality.run(config, tmp_path / "p")
    assert [row["arm"] for row in rows] == ["plain", "igc", "interaction", "rank"]
    names = sorted(path.name for path in (tmp_path / "p" / "sets").iterdir())
    assert names == ["matched-3-32-test-0-10.npz", "matched-3-32-train-0-20.npz"]
    assert images.load(tmp_path / "p" / "sets" / names[1]).config["length"] == 3
    # each is read once for all the trainings that are missing
    read, load = [], images.load
    monkeypatch.setattr(images, "load", lambda path: read.append(path.name) or load(path))
    comparison._prepare(locality.cells(config), tmp_path / "p", False)
    assert sorted(read) == names


def test_a_sweep_with_a_deadline(tmp_path, monkeypatch):
    """The one that was begun is in the picture, the other one is not begun, and the same call goes on."""
    config = dataclasses.replace(
        locality.tiny, arms=("plain",), distances=(0, 24), seeds=(1,), epochs=4, until=0.001
    )
    place = tmp_path / "s"
    assert locality.run(config, place) == []  # the time is over before the first one
    assert locality.going_on(place) == [] and not (place / "locality.png").exists()
    with pytest.raises(FileError, match="no results yet"):
        locality.figure(place)
    with monkeypatch.context() as patched:
        deadline_after(2, patched)
        assert locality.run(dataclasses.replace(config, until=1800.0), place) == []
    (begun,) = locality.going_on(place)
    assert (begun["name"], begun["epochs"]) == ("plain-0-seed-1", 2)
    assert locality.figure(place).stat().st_size > 1000
    rows = locality.run(dataclasses.replace(config, until=0.0), place)
    assert [row["epochs"] for row in rows] == [4, 4] and locality.going_on(place) == []
    there = sorted(p.name for p in place.iterdir() if p.is_dir())
    assert there == ["plain-0-seed-1", "plain-24-seed-1"]


def draw(folder, monkeypatch, module, rows, fields, set):
    """Draw a sweep with these rows; return the axes."""
    about = {
        "tnreg": "0", "experiment": "locality", "summary": rows, "headline": "test accuracy",
        "fields": fields, "config": {"set": set, "model": "m"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about))
    figures = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: figures.append(figure))
    locality.figure(folder)
    return figures[0].axes[0]


ROW = {
    "arm": "plain", "distance": 7, "seed": 1, "statistics": "batch", "test accuracy": 0.5,
    "seconds": 1.0, "epochs": 2,
}  # fmt: skip


def test_the_picture_has_the_published_values(tmp_path, monkeypatch):
    """Each arm's line with its number of seeds, both statistics apart, beside the published ones."""
    rows = [
        {**ROW, "arm": arm, "seed": seed, "statistics": kind}
        for arm, kind, seeds in (("plain", "batch", 2), ("igc", "batch", 1), ("igc", "frozen", 1))
        for seed in range(seeds)
    ]
    fields = ["arm", "distance", "statistics", "seed"]
    ax = draw(tmp_path, monkeypatch, locality_figure, rows, fields, "pathfinder")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "plain (2 seeds)", "input gradient change, statistics batch (1 seed, time x 1.0)",
        "input gradient change, statistics frozen (1 seed)", "published: plain", "published: λ = 9",
    ]  # fmt: skip
    lines = {c.get_label(): c.lines[0].get_ydata().tolist() for c in ax.containers}
    assert lines["published: λ = 9"] == [98.42, 96.6, 91.64, 85.48]


def test_the_picture_has_a_line_for_each_augmentation_and_network(tmp_path, monkeypatch):
    rows = [
        {**ROW, "arm": arm, "augment": augment, "model": model}
        for arm in ("plain", "rank") for augment in ("none", "noise") for model in ("a", "b")
    ]  # fmt: skip
    fields = ["arm", "distance", "model", "augment", "seed"]
    ax = draw(tmp_path, monkeypatch, locality_figure, rows, fields, "digits")
    arms = {"plain": "", "interaction rank": ", time x 1.0"}
    names = [
        f"{arm}{augment}, {model} (1 seed{time})"
        for arm, time in arms.items() for augment in ("", ", noise") for model in "ab"
    ]  # fmt: skip
    assert [text.get_text() for text in ax.get_legend().get_texts()] == names


@pytest.mark.parametrize("more", [["lr"], ["lr", "statistics"]])
def test_a_sweep_over_another_setting_is_drawn_as_any_other(more, tmp_path, monkeypatch):
    """Values of lr must not be taken for seeds of one line."""
    rows = [{**ROW, "lr": lr, "test accuracy": lr} for lr in (0.1, 0.2)]
    fields = ["arm", "distance", *more, "seed"]
    ax = draw(tmp_path, monkeypatch, sweep_figure, rows, fields, "digits")
    (line,) = ax.containers
    assert line.lines[0].get_ydata().tolist() == [0.1, 0.2]


# Razin, Maman and Cohen (2022) and their code, both tasks: batch statistics in both passes of the penalty,
# standardized inputs, a stop after more than 20 perfect epochs in a row, nothing that changes or augments.
PUBLISHED = {
    "model": "resnet-18", "epochs": 150, "pretrain_epochs": 0, "stop_above": 1.0, "stop_epochs": 21,
    "optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "batch": 64, "test_every": 1, "augment": "none",
    "statistics": "batch", "standardize": True, "igc_every": 1, "igc_warmup": 0, "igc_start": 0,
    "igc_until": 0, "igc_target": 0.0, "precision": "float32", "test": 10_000, "matched": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("pathfinder", {"igc": 9.0, "train": 10_000, "size": 150, "patches": "random", "patch_size": 2,
                        "distances": (3, 5, 7, 9)}),
        ("cifar", {"igc": 1.0, "train": 5_000, "patches": "images", "distances": (0, 40, 80, 120, 160)}),
    ],
)  # fmt: skip
def test_presets_are_the_published_settings(name, own):
    preset = locality.SETS[name]
    assert {key: getattr(preset, key) for key in PUBLISHED | own} == PUBLISHED | own
    cell = locality.cells(preset)[1]
    assert cell["arm"] == "igc"
    few = (
        images.pathfinder(4, length=3, size=32)
        if name == "pathfinder"
        else images.is_same_class(4, distance=0)
    )
    penalty = penalty_of(locality.Training(**cell), "igc", 1, few)
    assert (penalty.statistics, penalty.weight, penalty.every) == ("batch", own["igc"], 1)
    assert (penalty.until, penalty.target, penalty.patches.distance if name == "pathfinder" else 0) == (
        None,
        None,
        0,
    )


def test_differences_of_arms_on_the_same_seeds():
    accuracy = {"plain": [0.5, 0.6, 0.7], "igc": [0.7, 0.7, 0.7], "rank": [0.6, 0.7, 0.8]}
    rows = [
        {"arm": arm, "distance": 24, "seed": seed, "test accuracy": value}
        for arm, values in accuracy.items()
        for seed, value in enumerate(values)
    ]
    rows += [{**row, "distance": 0} for row in rows if row["seed"] == 1 or row["arm"] == "plain"]
    found = {(row["arm"], row["minus"], row["distance"]): row for row in locality.paired(rows)}
    assert len(found) == 6
    one = found["igc", "plain", 24]
    assert one["seeds"] == 3 and one["difference"] == pytest.approx(0.1)
    assert one["deviation"] == pytest.approx(0.1) and one["t"] == pytest.approx(3**0.5)
    one = found["rank", "plain", 0]  # seed 1 alone is in both
    assert one["seeds"] == 1 and one["difference"] == pytest.approx(0.1) and np.isnan(one["t"])
    rows = [{**row, "lr": lr} for row in rows for lr in (1, 2)]
    assert len(locality.paired(rows, ["arm", "distance", "lr", "seed"])) == 12
    assert locality.paired(rows[:1]) == []


def test_sweeps_refuse(tmp_path):
    for changes, message in [
        ({"arms": ()}, "give at least one arm"),
        ({"arms": ("plain", "all")}, "no arm 'all'"),
        ({"seeds": (1, 1)}, "seeds has one twice"),
        ({"set": "faces"}, "no set 'faces'"),
        ({"workers": 0}, "workers must be an integer >= 1"),
        ({"until": -1.0}, "until must be seconds >= 0"),
    ]:
        with pytest.raises(OptionError, match=message):
            locality.run(dataclasses.replace(locality.tiny, **changes), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(FileError, match="not a sweep of locality"):
        locality.figure(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"tnreg": "0", "experiment": "dynamics"}')
    with pytest.raises(OptionError, match="is a run of 'dynamics'; choose another folder"):
        locality.run(locality.tiny, tmp_path / "other")


def test_an_error_of_all_trainings_is_told_once():
    failed = [
        types.SimpleNamespace(error=e, cell=types.SimpleNamespace(name=f"{k}"))
        for k, e in enumerate("aaaaaab")
    ]
    assert comparison._by_error(failed) == {"a": "0, 1, 2, 3 and 2 more", "b": "6"}
