"""Every experiment with its tiny settings, end to end, into a temporary folder."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
import zoo
from command import call
from rich.console import Console

from tnreg import DataError, FileError, ModeTree, OptionError, Trajectory, load
from tnreg import completion as random_entries
from tnreg.experiments import completion, convac, demo, dynamics, locality, sweep
from tnreg.experiments.dynamics import init_scale
from tnreg.experiments.sweep import pictures as sweep_figure
from tnreg.recovery.complete import complete
from tnreg.training.tasks import relative_error

pytestmark = pytest.mark.slow


def test_completion(tmp_path):
    summary = completion.run(completion.tiny, tmp_path / "run")
    numpys = {k: np.array(v)[()] for k, v in vars(completion.tiny).items() if isinstance(v, int | float)}
    again = completion.run(dataclasses.replace(completion.tiny, **numpys), tmp_path / "run")
    assert again | {"seconds": 0} == summary | {"seconds": 0}
    assert summary["stopped by"] == "steps" and 0 < summary["test error"] < 2
    assert summary["observed entries"] == 1440 and summary["unseen entries"] == 3360
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert completion.Config(**about["config"]) == completion.tiny
    assert set(about) == {"tnreg", "torch", "python", "experiment", "config", "summary", "crc32"}
    run = Trajectory.load(tmp_path / "run" / "trajectory.npz")
    assert run.names == ("loss", "held-out error", "test error", "unbalancedness", "components")
    (tmp_path / "run" / "training.png").unlink()
    assert completion.figure(tmp_path / "run").exists()


def test_the_row_kept_is_the_best_one(tmp_path):
    """The training goes on until it fits noise; what is saved is what fits the held-out entries best."""
    config = dataclasses.replace(completion.tiny, rank=24, std=0.3, optimizer="adam", steps=400, observed=0.1)
    summary = completion.run(config, tmp_path / "run")
    run = Trajectory.load(tmp_path / "run" / "trajectory.npz")
    row = int(run["held-out error"].argmin())
    assert summary["kept step"] == run.steps[row] < 400 and summary["of them held out"] == 48
    assert summary["held-out error"] == run["held-out error"][row]
    assert summary["test error"] == pytest.approx(run["test error"][row]) != run["test error"][-1]


@pytest.mark.parametrize(("kind", "settings"), [
    (completion, completion.tiny), (demo, demo.tiny), (convac, convac.tiny),
    (dynamics, dynamics.tiny), (init_scale, init_scale.tiny),
], ids=lambda x: getattr(x, "__name__", ""))  # fmt: skip
def test_a_sweep_and_files_of_the_user_are_left_alone(tmp_path, kind, settings):
    sweep.run(lambda cell, folder, checkpoint: {"v": cell["x"]}, [{"x": 1}, {"x": 2}], tmp_path, workers=0)
    (tmp_path / "x-1" / "notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((FileError, OptionError), match="is a run of 'sweep'"):
        kind.run(settings, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("scale", [1e-150, 1e-60, 1e-35, 1e25, 1e40, 1e150])
def test_completion_in_any_unit(tmp_path, scale):
    """The saved model is in the unit of the data, and fits them as well as in any other unit."""
    tensor = zoo.model_of(ModeTree.star(3), sizes=(4, 5, 6)).to_tensor().detach()
    config = completion.Config(tensor=str(tmp_path / "x.npy"), tree="star-3", steps=100, rank=3)

    def found(unit):
        np.save(config.tensor, (unit * tensor).numpy())
        summary = completion.run(config, tmp_path / "run")
        model = load(tmp_path / "run" / "model.safetensors").to(torch.float64)
        error = relative_error(model.to_tensor().detach(), unit * tensor)
        return [error, *(summary[name] for name in ("final loss", "train error", "test error"))]

    assert found(scale) == pytest.approx(found(1.0), rel=1e-4)


def test_completion_of_other_kinds(tmp_path):
    changes = {"join": "full", "dtype": "float64", "tree": None, "optimizer": "gauss-newton"}
    config = dataclasses.replace(completion.tiny, **changes)
    summary = completion.run(config, tmp_path / "run")
    assert summary["tree"] == "ModeTree([[0, 1], [2, 3]])"
    assert Trajectory.load(tmp_path / "run" / "trajectory.npz").names == (
        "loss",
        "held-out error",
        "test error",
    )


def test_demo(tmp_path, capsys):
    text = io.StringIO()
    summary = demo.run(demo.tiny, tmp_path / "demo", console=Console(file=text, width=100))
    said = text.getvalue()
    for piece in (
        "960 entries observed, 3840 unseen", "ligand, dose: rank", "error on unseen entries", "95 % interval",
        "learned tensor", "layer 1  product pooling over 2",
        "exported as network.onnx; onnxruntime gives the same",
    ):  # fmt: skip
        assert piece in said
    errors = summary["error on unseen entries"]
    assert list(errors) == ["mean of the observed", "tnreg"]
    assert all(low <= error <= high for error, low, high in errors.values())
    assert errors["tnreg"][0] < 0.5 * errors["mean of the observed"][0]
    folder = tmp_path / "demo"
    expected = {"config.json", "completed.safetensors", "history.npz", "model.safetensors", "trajectory.npz",
                "report.html", "demo.png", "slices.png", "training.png", "network.png",
                "network.onnx"}  # fmt: skip
    assert {p.name for p in folder.iterdir()} == expected
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page and "<link" not in page and "<script" not in page  # opens offline
    assert (
        load(folder / "model.safetensors").sizes
        == load(folder / "completed.safetensors").sizes
        == (13, 4, 12, 8)
    )
    picture = (folder / "training.png").read_bytes()
    (folder / "training.png").unlink()
    code, _, err = call(capsys, "plot", str(folder))
    assert code == 0 and (folder / "training.png").read_bytes() == picture, err
    other = dataclasses.replace(demo.tiny, tensor="covid19", tree="star-3", steps=1)
    demo.run(other, folder)  # a run folder may be replaced, and tensors have any order
    assert load(folder / "model.safetensors").sizes == (438, 6, 11)
    assert {p.name for p in folder.iterdir()} == expected


@pytest.mark.parametrize("name", ["CP", "Tucker"])
def test_what_the_demo_compares_to(name):
    """Of a tensor of rank 2 a part is known: tensorly finds the rest too, with ranks by what was held out."""
    target = zoo.model_of(ModeTree.star(3), sizes=(9, 8, 7), bonds=2, root="ones").to_tensor().detach()
    task = random_entries(target, 0.4, seed=0)
    found = complete(task, progress=False)
    error, low, high = demo.judge(demo.by_tensorly(name, found), task)
    assert low <= error <= high and error < 0.05


def test_convac(tmp_path):
    summary = convac.run(convac.tiny, tmp_path / "run")
    models = ["logistic regression", "quad", "random"]
    assert [row["model"] for row in summary["accuracy"]] == models * 2
    assert list(summary["mean and spread"]) == models
    for row in summary["accuracy"]:
        assert 0 < row["test"] <= 1 and row["weights"] > 0
        first = row["seed"] == 1 and row["model"] != "logistic regression"
        assert row.get("equal decisions in onnxruntime") == (1.0 if first else None)
    assert [(r["model"], r["how"]) for r in summary["smaller"]] == [
        (model, how) for model in models[1:] for how in ("truncated", "thinned")
    ]
    for row in summary["smaller"]:
        assert row["error"] <= row["bound"] * (1 + 1e-9) and row["weights"] > 0
        assert row["how"] == "thinned" or row["error"] <= 0.5
    files = {"config.json", "convac.png"}
    files |= {f"{name}.{ending}" for name in models[1:] for ending in ("safetensors", "onnx")}
    assert {p.name for p in (tmp_path / "run").iterdir()} == files
    (tmp_path / "run" / "convac.png").unlink()
    assert convac.figure(tmp_path / "run").exists()
    again = convac.run(convac.tiny, tmp_path / "run", onnx=False)
    assert again["mean and spread"] == summary["mean and spread"]  # seeded, and the folder replaced
    with pytest.raises(OptionError, match="at least one tree and one seed"):
        convac.run(dataclasses.replace(convac.tiny, trees=()), tmp_path / "run")


def test_trees_over_the_pixels():
    assert convac.tree_of("quad") == ModeTree.grid((8, 8))
    mirrored, random = convac.tree_of("mirrored"), convac.tree_of("random", 3)
    first = mirrored.children(mirrored.children(mirrored.root)[0])[0]
    assert mirrored.modes_below(first) == (0, 7, 8, 15)  # two rows, a column and its mirror image
    assert random.links == mirrored.links and random != convac.tree_of("random", 4)


def write_tensor(path, scale, extra=None):
    values = zoo.model_of(ModeTree.binary(4)).to_tensor().detach().numpy() * scale
    if extra is not None:
        values[0, 0, 0, 0] = extra
    np.save(path, values)
    return str(path)


def test_the_saved_model_is_in_the_unit_of_the_data(tmp_path):
    scale = 1e30
    file = write_tensor(tmp_path / "x.npy", scale)
    settings = {"tree": "htf-4", "rank": 6, "steps": 600, "observed": 0.9, "dtype": "float64"}
    config = completion.Config(tensor=file, **settings)
    summary = completion.run(config, tmp_path / "run")
    values = torch.from_numpy(np.load(file))
    found = load(tmp_path / "run" / "model.safetensors").to_tensor().detach()
    assert summary["scale"] == pytest.approx((values / scale).square().mean().sqrt().item() * scale)
    assert ((found - values) / scale).norm() < 0.3 * (values / scale).norm()


def test_completion_refuses_bad_data(tmp_path):
    bad = write_tensor(tmp_path / "inf.npy", 1.0, math.inf)
    with pytest.raises(DataError, match="not finite"):
        completion.run(completion.Config(tensor=bad, missing="nan", steps=1), tmp_path / "run")
    np.save(tmp_path / "complex.npy", np.ones((2, 3)) * 1j)
    complex_numbers = completion.Config(tensor=str(tmp_path / "complex.npy"), steps=1)
    with pytest.raises(DataError, match="is complex; this experiment trains real factorizations"):
        completion.run(complex_numbers, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("experiment", [convac, init_scale, locality, sweep_figure])
@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"summary": 3}', "\x00", None])
def test_what_is_no_result_is_refused_by_name(tmp_path, experiment, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(FileError, match="not a (convac run|finished sweep|sweep of locality)"):
        experiment.figure(tmp_path)
