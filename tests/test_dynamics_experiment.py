"""The dynamics experiment and the sweep over initial scales: tiny trainings, end to end."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal

import matplotlib
import numpy as np
import pytest
import torch
import zoo
from command import start, wait

matplotlib.use("Agg")

from tnreg import (
    DataError,
    Factorization,
    FileError,
    ModeTree,
    OptionError,
    Trajectory,
    hierarchical_rank,
    load,
    plots,
    spectra,
)
from tnreg.cli import tables
from tnreg.experiments import dynamics
from tnreg.experiments.dynamics import init_scale, pictures, train
from tnreg.experiments.folder import read_run

pytestmark = pytest.mark.slow

PICTURES = ["dynamics.png", "rates.png", "spectra.png"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return dynamics.run(dynamics.tiny, folder), read_run(folder)


def test_folder(tiny):
    summary, one = tiny
    files = ["config.json", "dynamics.png", "model.safetensors", "rates.png", "spectra.png"]
    assert sorted(p.name for p in one.folder.iterdir()) == [*files, "trajectory.npz"]
    assert not list(one.folder.parent.glob("*.checkpoint"))
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in one.config.items()}
    assert dynamics.Config(**config) == dynamics.tiny and one.experiment == "dynamics"
    assert one.summary["test error"] == summary["test error"]
    for name in PICTURES:
        (one.folder / name).unlink()
    assert dynamics.figure(one.folder) == one.folder / "dynamics.png"
    assert all((one.folder / name).stat().st_size > 5000 for name in PICTURES)


def test_what_is_recorded_belongs_to_the_model(tiny):
    summary, one = tiny
    found, model = one.trajectory, load(one.folder / "model.safetensors")
    root = model.tree.root
    for node, norms in model.local_components().items():
        ids = found["component ids"][node][-1]
        assert np.allclose(found["components"][node][-1], norms.detach().numpy()[ids], rtol=1e-12)
        assert (np.diff(found["components"][node], axis=1) <= 0).all()  # the largest first
    for node, s in spectra(model.to_tensor().detach(), model.tree).items():
        assert np.allclose(found["spectra"][node][-1], s.numpy(), atol=1e-12)
    off = torch.linalg.svdvals(model.to_tensor().detach().permute(0, 2, 1, 3).reshape(9, 9))
    assert np.allclose(found["off-tree"]["0,2"][-1], off.numpy(), atol=1e-12)
    assert found["unbalancedness"][-1] == pytest.approx(model.unbalancedness().item(), rel=1e-9)
    assert summary["ranks"] == {str(v): r for v, r in hierarchical_rank(model, rtol=1e-2).items()}
    # the step size is that of the step before the row, the time the sum of all of them
    assert found["flow time"][0] == 0 and (np.diff(found["flow time"]) > 0).all()
    assert len(summary["jumps"][str(root)]) == 1


def test_a_large_tensor_is_observed_without_being_made_dense(monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(train, "_SMALL", 0)
    dynamics.run(dynamics.tiny, tmp_path / "run", pictures=False)
    found, dense = read_run(tmp_path / "run").trajectory, tiny[1].trajectory
    for node, s in found["spectra"].items():
        assert s.shape[1] <= 8  # the rank of the bond
        assert np.allclose(s, dense["spectra"][node][:, : s.shape[1]], atol=1e-11)
    for name in ("test error", "train error", "loss"):
        assert np.allclose(found[name], dense[name], rtol=1e-10)
    assert np.allclose(found["off-tree"]["0,2"], dense["off-tree"]["0,2"], atol=1e-11)


def test_it_learns_the_rank_of_the_target_as_theory_predicts(tiny):
    summary, one = tiny
    assert set(summary["ranks"].values()) == {1} and summary["ranks"] == summary["target ranks"]
    assert summary["test error"] < 0.05
    assert max(summary["rate error"].values()) < 0.2  # a step of 1 % of the way, a row every ten
    followed = dynamics.tracks(one.trajectory)
    assert followed.norms.shape == (31, 8) and followed.measured.shape == (29, 8)
    start, end = followed.jumps()[0]
    assert 0 < start < end < 300
    k = int(np.argmax(followed.norms[-1]))
    before = followed.norms[followed.steps <= start - 10, k]
    assert (before < 0.1 * followed.norms[-1, k]).all()


def test_tracks_follow_one_component_through_changes_of_order():
    found = Trajectory()
    rows = [((3, 7), (0.2, 0.1)), ((7, 5), (4.0, 0.3)), ((5, 7), (9.5, 4.0)), ((5, 7), (10.0, 4.0))]
    for step, (ids, norms) in enumerate(rows):
        row = {"components": norms, "component ids": ids, "predicted rate": np.array(ids) * 1.0}
        found.append(step, {"flow time": 2.0 * step, **{k: {"v": v} for k, v in row.items()}})
    followed = dynamics.tracks(found, "v")
    assert np.array_equal(followed.norms, [[np.nan, 0.1], [0.3, 4.0], [9.5, 4], [10, 4]], True)
    assert np.allclose(followed.measured[1], [(10 - 0.3) / 4, 0])
    assert np.allclose(followed.predicted[1], [5, 7]) and np.isnan(followed.measured[0, 0])
    assert followed.jumps() == [[2, 2], [1, 1]]
    with pytest.raises(OptionError, match="no node 'w'; there is v"):
        dynamics.tracks(found, "w")


def test_published_settings():
    """Theory.md 3.1 by numbers: sizes, ranks, scales, samples, stop rule; target norm 64."""
    for config, order, size in ((dynamics.mf, 2, 64), (dynamics.cp, 3, 16), (dynamics.htf, 4, 8)):
        assert config.target_sizes == (size,) * order
        assert config.std == (0.01 if config is dynamics.htf else 0.001)
        assert (config.samples, config.target_rank, config.lr) == (2048, 5, 1e-2)
        assert (config.every, config.stop_below, config.stop_checks) == (25, 5e-5, 100)
        task, dense, _ = train._task(config, None)
        assert dense.norm().item() == pytest.approx(64) and len(task.values) == 2048
        ranks = hierarchical_rank(dense, ModeTree.star(order), rtol=1e-8)
        assert set(ranks.values()) == {5}
    assert (dynamics.mf.rank, dynamics.cp.rank, dynamics.htf.rank) == (64, 256, 512)
    assert (dynamics.mf.root, dynamics.cp.root, dynamics.htf.root) == ("ones", "ones", "trained")


def test_stop_rule():
    stop, found = train._stays_below(1.0, 3), Trajectory()
    verdicts = []
    for step, loss in enumerate([0.5, 0.5, 0.5, 2.0, 0.5, 0.9, 0.5, 0.5, 0.5]):
        found.append(step, {"loss": loss})
        verdicts.append(stop(found))
    assert verdicts[:7] == [False] * 7 and verdicts[7] == "loss below 1 at 4 checks in a row"


def test_descent_follows_the_flow_within_its_bounds(tmp_path):
    """Descent in steps is nearer to the flow the shorter they are, and rates keep to the bounds of law 4."""
    tracked = []
    for name, lr in (("flow", 0.5), ("sgd", 0.5), ("sgd", 0.25)):
        config = small(optimizer=name, lr=lr, std=0.4, unbalance=2.0, bounds=True, off_tree=())
        config = dataclasses.replace(config, steps=round(30 / lr), every=round(2 / lr))
        dynamics.run(config, tmp_path / f"{name}-{lr}", pictures=False)
        tracked.append(dynamics.tracks(read_run(tmp_path / f"{name}-{lr}").trajectory))
    drawn = pictures.rates_figure(read_run(tmp_path / "flow-0.5"))
    assert drawn.axes[0].collections and drawn.axes[0].get_title().endswith("bounds")
    flow, *others = tracked
    low, high = flow.bounds[..., 0], flow.bounds[..., 1]
    assert (low < high).all() and flow.rate_error() < 0.02
    assert (flow.measured >= low - 1e-9).all() and (flow.measured <= high + 1e-9).all()
    coarse, fine = (np.abs(one.norms - flow.norms).max() for one in others)
    assert fine < 0.6 * coarse < 0.1 * flow.norms.max()


def small(**changes):
    return dataclasses.replace(dynamics.tiny, steps=40, **changes)


def test_own_tree_and_target(tmp_path):
    """A model along another tree than the target's; both as objects and as files; unequal sizes."""
    tree, target = zoo.TREES["uneven"], zoo.model_of(ModeTree.binary(5))
    dense = target.to_tensor().detach()
    own = {"tree": tree, "target": target, "pictures": False}
    summary = dynamics.run(small(off_tree=()), tmp_path / "a", **own)
    assert summary["sizes"] == [2, 3, 5, 7, 4] and summary["tree"] == repr(tree)
    assert load(tmp_path / "a" / "model.safetensors").tree == tree
    ranks = hierarchical_rank(dense, tree, rtol=1e-2)
    assert summary["target ranks"] == {str(v): r for v, r in ranks.items()}
    assert summary["scale"] == pytest.approx(dense.square().mean().sqrt().item())
    np.save(tmp_path / "x.npy", dense.numpy())
    tree.save(tmp_path / "t.json")
    config = small(off_tree=(), tree=str(tmp_path / "t.json"), target=str(tmp_path / "x.npy"))
    again = dynamics.run(config, tmp_path / "b", pictures=False)
    assert again["loss"] == summary["loss"]
    zero = dynamics.run(small(), tmp_path / "c", target=torch.zeros(3, 3, 3, 3).double())
    assert zero["scale"] == 1.0 and np.isfinite(zero["loss"])  # no division by zero


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "sensing", "tree": "[[0,2],[1,3]]"},
        {"join": "full", "rank": 2},
        {"tree": "caterpillar-6", "target_tree": "[[0,3],[1,4],[2,5]]", "target_sizes": (2,) * 6,
         "rates": False},
        {"tree": "matrix-deep-3", "target_tree": "[0,1]", "root": "ones", "off_tree": (),
         "target_sizes": (9, 9), "target_root": "ones"},
        {"samples": 81, "dtype": "float32"},
        {"target": "il2", "missing": "nan", "tree": "il2-4", "samples": 500, "off_tree": ("1,3",)},
        {"task": "dense-sensing", "loss": "huber", "optimizer": "adam"},
        {"optimizer": "lbfgs", "lr": 1.0, "loss": "l1", "std": 0.5},
        {"optimizer": "momentum", "unbalance": 3.0, "bounds": True, "std": 0.5},
        {"optimizer": "flow", "lr": 1.0, "std": 0.5},
    ],
)  # fmt: skip
def test_other_settings(tmp_path, changes):
    drawn = "optimizer" not in changes
    summary = dynamics.run(small(**changes), tmp_path / "run", pictures=drawn)
    found = read_run(tmp_path / "run").trajectory
    assert found["loss"][-1] < found["loss"][0] and (tmp_path / "run" / "dynamics.png").exists() == drawn
    assert ("components" in summary) == (changes.get("join") != "full")
    rated = changes.get("optimizer") not in ("adam", "lbfgs")
    assert ("predicted rate" in found) == ("rates" not in changes and "join" not in changes and rated)
    assert ("flow time" in found) == rated and ("lower bound" in found) == ("bounds" in changes)
    assert ("test error" in summary) == (changes.get("samples") != 81)
    assert ("target ranks" in summary) == ("missing" not in changes)
    if changes.get("target_sizes") == (9, 9):  # a matrix: singular values
        root = list(found["components"])[-1]
        assert np.array_equal(found["components"][root], found["spectra"][0][:, :9])
    plots.save_figure(plots.trajectory(found).figure, tmp_path / "t.png")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"off_tree": ("0,4",)}, OptionError, "no set of some of the modes 0..3"),
        ({"off_tree": ("0,1,2,3",)}, OptionError, "no set of some of the modes"),
        ({"off_tree": ("x",)}, OptionError, "'x' is no set"),
        ({"samples": 82}, DataError, "integer from 1 to 81"),
        ({"target": "nope.npy"}, FileError, "no such tensor"),
        ({"target": "il2"}, DataError, "not finite"),
        ({"tree": "star-3"}, OptionError, "4 mode sizes for a tree over 3 modes"),
        ({"task": "senses"}, OptionError, "unknown kind='senses'"),
        ({"loss": "l2"}, OptionError, "unknown loss='l2'"),
        ({"optimizer": "adamw"}, OptionError, "unknown optimizer 'adamw'; there is group-rmsprop, sgd"),
        ({"optimizer": "sgd", "graph": True}, OptionError, "graph is for the optimizer group-rmsprop"),
        ({"lr": -1.0}, OptionError, "lr must be a finite number >= 0"),
        ({"unbalance": 0.0}, OptionError, "unbalance must be a finite number >= 1e-06"),
        ({"bounds": True, "join": "full"}, OptionError, "bounds are on the rates of local components"),
    ],
)
def test_refuses(tmp_path, changes, error, message):
    kinds = (error, ValueError) if error is OptionError else error
    with pytest.raises(kinds, match=message) as caught:
        dynamics.run(small(**changes), tmp_path / "run")
    assert type(caught.value).__module__ == "tnreg.errors" and not list(tmp_path.iterdir())


def test_refuses_complex_targets_and_foreign_folders(tmp_path):
    target = zoo.model_of(ModeTree.binary(4), dtype=torch.complex128)
    with pytest.raises(DataError, match="is complex"):
        dynamics.run(small(), tmp_path / "run", target=target)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileError, match="is no run folder of tnreg"):
        dynamics.run(small(), tmp_path / "mine")
    with pytest.raises(FileError, match="not a run folder"):
        read_run(tmp_path / "mine")
    with pytest.raises(OptionError, match="at least one run folder"):
        dynamics.panels([])


def test_a_killed_run_goes_on_to_the_same_end(tmp_path, tiny):
    """The process is killed once its checkpoint is there; the same call then ends like the whole run."""
    code = (
        "import sys\nfrom tnreg.experiments import dynamics\n"
        "dynamics.run(dynamics.tiny, sys.argv[1], checkpoint_seconds=0)"
    )
    place = tmp_path / "run"
    checkpoint = tmp_path / "run.checkpoint"
    with start(code, place) as process:
        wait(checkpoint.exists, process)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not place.exists()
    with pytest.raises(OptionError, match=r"other settings.\n  seed: 0 there, 1 now"):
        dynamics.run(dataclasses.replace(dynamics.tiny, seed=1), place)
    assert checkpoint.exists()
    summary = dynamics.run(dynamics.tiny, place, pictures=False)
    found, whole = read_run(place).trajectory, tiny[1].trajectory
    assert found.names == whole.names and summary["seconds"] is None
    for name in found.names:
        one, other = found[name], whole[name]
        pairs = [(one[k], other[k]) for k in other] if isinstance(other, dict) else [(one, other)]
        assert all(np.array_equal(a, b) for a, b in pairs), name
    models = [load(folder / "model.safetensors") for folder in (place, tiny[1].folder)]
    for ours, theirs in zip(*(m.weights.values() for m in models), strict=True):
        assert torch.equal(ours, theirs)
    assert not checkpoint.exists()


def test_an_interrupted_run_leaves_its_checkpoint(tmp_path, monkeypatch):
    def interrupted(self, model):
        raise KeyboardInterrupt

    monkeypatch.setattr(train._Observations, "_off_tree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dynamics.run(dynamics.tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_panels(tiny, tmp_path):
    drawn = dynamics.panels([tiny[1].folder, tiny[1].folder])
    assert len(drawn.axes) == 2 and drawn.axes[0].get_ylabel() == "norm of the component"
    assert len(drawn.axes[0].lines) == 8


def test_init_scale(tmp_path):
    place, tiny = tmp_path / "sweep", init_scale.tiny
    rows = init_scale.run(tiny, place)
    assert [(row["std"], row["seed"]) for row in rows] == [(0.1, 1), (0.1, 2), (0.5, 1), (0.5, 2)]
    assert json.loads((place / "config.json").read_text())["summary"] == rows
    cells = sorted(p.name for p in place.iterdir() if p.is_dir())
    assert cells == ["std-0.1-seed-1", "std-0.1-seed-2", "std-0.5-seed-1", "std-0.5-seed-2"]
    weights = place / cells[0] / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert len(init_scale.run(dataclasses.replace(tiny, stds=(0.1, 0.3)), place)) == 4
    shutil.rmtree(place / cells[1])  # a sweep that was cut short
    (place / "init-scale.png").unlink()
    assert init_scale.run(tiny, place) == rows and weights.stat().st_mtime_ns == written
    assert (place / "init-scale.png").stat().st_size > 5000
    for changes, message in (
        ({"steps": 50}, "made with other settings"),
        ({"seeds": ()}, "at least one std and one seed"),
        ({"device": "warp", "stds": (0.7,)}, "warp"),
    ):
        with pytest.raises((OptionError, RuntimeError), match=message):
            init_scale.run(dataclasses.replace(tiny, **changes), place)
    with pytest.raises(FileError, match="not a finished sweep"):
        init_scale.figure(place / cells[0])
    base, one = dataclasses.replace(dynamics.tiny, rank=3), dataclasses.replace(tiny, seeds=(1,))
    assert len(init_scale.run(one, tmp_path / "b", base=base)) == 2
    model = load(tmp_path / "b" / cells[0] / "model.safetensors")
    assert isinstance(model, Factorization) and set(model.network.bonds[:-1]) == {3}


def test_a_sweep_says_what_never_left_its_plateau(tmp_path):
    config = init_scale.Config(model="tiny", stds=(1e-4, 0.5), seeds=(1,), steps=60)
    rows = init_scale.run(config, tmp_path)
    assert [row["left its plateau"] for row in rows] == [False, True]
    assert init_scale.on_plateau(rows).startswith("1 of 2 trainings never left their plateau")
    assert init_scale.on_plateau(rows[1:]) == ""
    assert init_scale.on_plateau(rows) in tables.init_scale_table(rows, "tiny").caption


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_targets_of_any_unit(tmp_path, scale):
    target = zoo.model_of(ModeTree.binary(4), sizes=3).to_tensor().detach()
    config = dataclasses.replace(dynamics.tiny, steps=20)
    small, other = (
        dynamics.run(config, tmp_path / str(unit), target=unit * target, pictures=False)
        for unit in (1.0, scale)
    )
    assert other["scale"] == pytest.approx(small["scale"] * scale) and other["loss"] == pytest.approx(
        small["loss"]
    )
    assert other["ranks"] == small["ranks"] and other["test error"] == pytest.approx(small["test error"])
