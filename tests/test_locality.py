"""The locality experiment: its networks, its trainings bit for bit, its sweeps."""

from __future__ import annotations

import csv
import dataclasses
import json
import signal
import subprocess
import sys
import time
import types

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
pytest.importorskip("sklearn")

from safetensors.torch import load_file

from tnreg import DataError, FileError, OptionError, Trajectory, images
from tnreg.experiments import locality, locality_run, nets
from tnreg.experiments.locality_run import Settings, train

QUICK = Settings(epochs=4, test_every=2, igc_every=1, interaction_every=2, lr=0.02)


@pytest.fixture(scope="module")
def pairs():
    return tuple(
        images.is_same_class(count, distance=24, seed=1, split=split)
        for count, split in ((130, "train"), (50, "test"))
    )


@pytest.mark.parametrize(("make", "count"), [(nets.SmallCNN, 76_593), (nets.ResNet18, 11_170_753)])
def test_networks(make, count):
    net = make()
    assert sum(p.numel() for p in net.parameters()) == count
    assert net(torch.randn(2, 1, 64, 64)).shape == (2, 1)
    assert make(3, 5)(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.5 for m in make(dropout=0.5).modules())
    first = next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d)).weight
    assert (
        abs(float(first.detach().std()) / (2 / (9 if count < 1e6 else 64 * 49)) ** 0.5 - 1) < 0.15
    )


def test_network_by_import_path(monkeypatch):
    module = types.ModuleType("someones")

    def colour(weights=None, **options):
        assert options == {"num_classes": 1}  # as torchvision's builders take it
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten(), torch.nn.LazyLinear(1)
        )
        return net

    module.colour, module.number, module.bare = colour, lambda: 3, lambda: torch.nn.Flatten()
    monkeypatch.setitem(sys.modules, "someones", module)
    net = nets.build("someones:colour", 1)
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 1)
    assert isinstance(nets.build("someones:bare", 1), torch.nn.Flatten)
    with pytest.raises(OptionError, match="has no keyword 'dropout'"):
        nets.build("someones:colour", 1, dropout=0.5)
    with pytest.raises(OptionError, match="gave a int, not an nn.Module"):
        nets.build("someones:number", 1)
    with pytest.raises(OptionError, match="takes 3 channels, the images have 2"):
        nets.build("someones:colour", 2)
    for name in ("nothing", "someones:none", "no_such_module:net", ":x"):
        with pytest.raises(OptionError, match=f"no network '{name}'"):
            nets.build(name, 1)


@pytest.mark.parametrize("arm", locality_run.ARMS)
def test_every_arm(arm, pairs, tmp_path):
    before = torch.get_rng_state()
    summary = train(QUICK, arm, 1, *pairs, tmp_path / "run")
    assert torch.equal(before, torch.get_rng_state())
    assert summary["epochs"] == 4 and summary["stopped by"] == "epochs"
    assert 0 <= summary["test accuracy"] <= 1 and summary["cpu seconds"] > 0
    assert (summary["penalty"] > 0) == (arm in ("igc", "interaction"))
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["config"]["arm"] == arm and about["summary"] == summary
    found = Trajectory.load(tmp_path / "run" / "trajectory.npz")
    assert found.names == ("loss", "penalty", "train accuracy", "test accuracy")
    assert np.isfinite(found["test accuracy"]).tolist() == [False, True, False, True]
    assert found["test accuracy"][-1] == summary["test accuracy"]
    assert not (tmp_path / "run.checkpoint").exists()


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_arms_that_add_nothing_are_plain(pairs, tmp_path):
    """With weight 0, and with patches off the digits: a swap of background changes nothing."""
    train(QUICK, "plain", 1, *pairs, tmp_path / "plain")
    same = dataclasses.replace(QUICK, igc=0.0, interaction=0.0)
    off = dataclasses.replace(QUICK, patches="off")
    for arm in ("igc", "interaction"):
        for name, settings in (("zero", same), ("off", off)):
            train(settings, arm, 1, *pairs, tmp_path / f"{arm}-{name}")
            there = weights(tmp_path / f"{arm}-{name}")
            for key, value in weights(tmp_path / "plain").items():
                assert torch.allclose(value, there[key], atol=0 if name == "zero" else 1e-4)
    train(QUICK, "igc", 1, *pairs, tmp_path / "igc")
    assert not torch.equal(weights(tmp_path / "igc")["head.weight"], value)


@pytest.mark.parametrize("arm", ["dropout", "igc", "interaction"])
def test_interrupted_and_resumed_bit_for_bit(arm, pairs, tmp_path, monkeypatch):
    train(QUICK, arm, 1, *pairs, tmp_path / "whole")
    epoch, calls = locality_run._State.epoch, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return epoch(self, *given)

    monkeypatch.setattr(locality_run._State, "epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(QUICK, arm, 1, *pairs, tmp_path / "cut")
    assert (tmp_path / "cut.checkpoint").exists() and not (tmp_path / "cut").exists()
    other = dataclasses.replace(QUICK, lr=0.03)
    with pytest.raises(OptionError, match="of a training with other settings"):
        train(other, arm, 1, *pairs, tmp_path / "cut")
    torch.rand(7)  # whatever else the process did with torch's generator
    train(QUICK, arm, 1, *pairs, tmp_path / "cut")
    whole, cut = (weights(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    one, two = (Trajectory.load(tmp_path / n / "trajectory.npz") for n in ("whole", "cut"))
    assert all(np.array_equal(one[name], two[name], equal_nan=True) for name in one.names)


KILLED = """
import sys, torch
from tnreg import images
from tnreg.experiments.locality_run import Settings, train
torch.set_num_threads(1)
data = images.load(sys.argv[1] + ".npz")
train(Settings(epochs=20), "interaction", 1, data, data, sys.argv[1])
"""


def test_killed_and_resumed_bit_for_bit(pairs, tmp_path):
    data = images.load(pairs[0].save(tmp_path / "killed.npz"))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    with subprocess.Popen(command) as running:
        while not (tmp_path / "killed.checkpoint").exists():
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in ("killed", "whole"):
            train(Settings(epochs=20), "interaction", 1, data, data, tmp_path / name)
    finally:
        torch.set_num_threads(threads)
    whole, killed = (weights(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_early_stop(pairs, tmp_path):
    settings = Settings(epochs=50, stop_above=0.4, stop_epochs=3)
    summary = train(settings, "plain", 1, *pairs, tmp_path / "run")
    reached = Trajectory.load(tmp_path / "run" / "trajectory.npz")["train accuracy"]
    assert summary["stopped by"] == "train accuracy" and summary["epochs"] == len(reached) < 50
    assert (reached[-3:] >= 0.4).all()


def test_a_last_batch_of_one_is_left_out(tmp_path):
    data = images.is_same_class(33, distance=0, seed=1)
    train(dataclasses.replace(QUICK, batch=32), "igc", 1, data, data, tmp_path / "run")
    assert (tmp_path / "run").exists()


def test_bytes_colours_and_half_precision(tmp_path):
    """uint8 images, logits for two classes, bfloat16."""
    found = images.pathfinder(8, length=3, size=32, seed=1)
    settings = dataclasses.replace(
        QUICK, patches="differing", patch_size=4, epochs=1, batch=4, precision="bfloat16"
    )
    summary = train(settings, "interaction", 1, found, found, tmp_path / "half")
    assert summary["epochs"] == 1 and 0 < summary["penalty"] <= 1
    two = torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    labels = torch.tensor([1, 1])
    assert locality_run._right(two, labels) == 1 and locality_run._right(two[:, 1:], labels) == 2
    expected = torch.nn.functional.cross_entropy(two, labels)
    assert locality_run._loss(two, labels) == expected


def test_trainings_refuse(pairs, tmp_path):
    with pytest.raises(OptionError, match="no arm 'none'; there is plain, weight-decay"):
        train(QUICK, "none", 1, *pairs, tmp_path / "a")
    with pytest.raises(OptionError, match="epochs must be an integer >= 1"):
        train(dataclasses.replace(QUICK, epochs=0), "plain", 1, *pairs, tmp_path / "a")
    with pytest.raises(OptionError, match="no patches 'all'; there is images, off, near"):
        train(dataclasses.replace(QUICK, patches="all"), "igc", 1, *pairs, tmp_path / "a")
    dots = images.pathfinder(4, length=3, size=32, seed=1)
    with pytest.raises(OptionError, match="patches 'images' need the boxes of image pairs"):
        train(QUICK, "igc", 1, dots, dots, tmp_path / "a")
    with pytest.raises(DataError, match="the loss is not finite in epoch 1"):
        train(dataclasses.replace(QUICK, lr=1e30), "plain", 1, *pairs, tmp_path / "a")
    (tmp_path / "b.checkpoint").write_text("hello")
    with pytest.raises(FileError, match="not a checkpoint"):
        train(QUICK, "plain", 1, *pairs, tmp_path / "b")


def test_sweep(tmp_path):
    place = tmp_path / "sweep"
    rows = locality.run(locality.tiny, place, progress=True)
    assert [(r["arm"], r["distance"], r["seed"]) for r in rows[:4]] == [
        ("plain", 0, 1), ("igc", 0, 1), ("interaction", 0, 1), ("plain", 24, 1),
    ]  # fmt: skip
    assert len(rows) == 12 and all(row["seconds"] > 0 for row in rows)
    about = json.loads((place / "config.json").read_text())
    assert about["experiment"] == "locality" and about["summary"] == rows
    with open(place / "results.csv", newline="") as file:
        assert [float(row["test accuracy"]) for row in csv.DictReader(file)] == [
            row["test accuracy"] for row in rows
        ]
    means = {(row["arm"], row["distance"]): row for row in about["table"]}
    some = [r["test accuracy"] for r in rows if (r["arm"], r["distance"]) == ("igc", 24)]
    assert means["igc", 24]["test accuracy"] == np.mean(some)
    assert means["igc", 24]["deviation"] == np.std(some, ddof=1)
    assert means["plain", 0]["cost"] == 1 and means["igc", 24]["seeds"] == 2

    # what is there is not trained again; more seeds and arms are added to it
    before = (place / "plain-0-seed-1" / "config.json").stat().st_mtime_ns
    more = dataclasses.replace(locality.tiny, arms=("plain",), seeds=(1, 3, 4), distances=(24,))
    again = locality.run(dataclasses.replace(more, workers=2), place)
    assert len(again) == 3 and again[0] == rows[3]
    assert (place / "plain-0-seed-1" / "config.json").stat().st_mtime_ns == before
    (place / "locality.png").unlink()
    assert locality.figure(place).stat().st_size > 1000
    with pytest.raises(
        OptionError, match=r"made with other settings(.|\n)*lr: 0.05 there, 0.1 now"
    ):
        locality.run(dataclasses.replace(locality.tiny, lr=0.1), place)


def test_sweep_of_pathfinder(tmp_path):
    """The command of the full experiment, small: its sets are kept and used by all arms."""
    config = dataclasses.replace(
        locality.SETS["pathfinder"], distances=(3,), seeds=(1,), train=20, test=10, size=32, epochs=1,
        matched=True, model="small-cnn",
    )  # fmt: skip
    rows = locality.run(config, tmp_path / "p")
    assert [row["arm"] for row in rows] == ["plain", "igc", "interaction"]
    kept = sorted(path.name for path in (tmp_path / "p" / "sets").iterdir())
    assert kept == ["matched-3-32-test-0-10.npz", "matched-3-32-train-0-20.npz"]
    assert images.load(tmp_path / "p" / "sets" / kept[1]).config["length"] == 3


def test_presets_are_the_published_settings():
    path = locality.SETS["pathfinder"]
    assert (path.lr, path.momentum, path.batch, path.epochs, path.igc) == (0.01, 0.9, 64, 150, 9.0)
    assert (path.stop_above, path.stop_epochs, path.size, path.patch_size) == (1.0, 21, 150, 2)
    assert (path.train, path.test, path.model) == (10_000, 10_000, "resnet-18")
    cifar = locality.SETS["cifar"]
    assert cifar.distances == (0, 40, 80, 120, 160) and cifar.train == 5_000
    assert cifar.patches == "images"


def test_sweeps_refuse(tmp_path):
    for given, said in [
        ({"arms": ()}, "give at least one arm"),
        ({"arms": ("plain", "all")}, "no arm 'all'"),
        ({"seeds": (1, 1)}, "seeds has one twice"),
        ({"set": "faces"}, "no set 'faces'"),
        ({"workers": 0}, "workers must be an integer >= 1"),
    ]:
        with pytest.raises(OptionError, match=said):
            locality.run(dataclasses.replace(locality.tiny, **given), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(FileError, match="not a finished sweep of locality"):
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
    assert locality._by_error(failed) == {"a": "0, 1, 2, 3 and 2 more", "b": "6"}
