"""The command line: what it prints and writes, exit codes, and help for every option."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import zoo
from command import call, screen

from tnreg import (
    ConvAC,
    ConvNet,
    DataError,
    Factorization,
    ModeTree,
    Representation,
    Trajectory,
    effective_rank,
    entanglement_entropy,
    export_pt2,
    gallery,
    hierarchical_rank,
    load,
    load_tree,
    locality_profile,
    spectra,
)
from tnreg.cli.output import Reply, plain
from tnreg.experiments import completion, convac, locality
from tnreg.experiments.dynamics import init_scale, train
from tnreg.experiments.nets import build
from tnreg.machine.files import read_safetensors
from tnreg.trees.tree import read_tree, tree_from_json


@pytest.fixture
def tensor(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, zoo.model_of(ModeTree.binary(4)).to_tensor().detach().numpy())
    return str(path)


def test_tree(capsys, tmp_path):
    code, out, _ = call(capsys, "tree", "htf-4", "--ascii")
    assert code == 0 and "order 4, 7 nodes, height 2" in out and "(0, 1)" in out
    code, out, _ = call(capsys, "tree", "[[0,2],[1,3]]", "--png", str(tmp_path / "t.png"))
    assert code == 0 and "(0, 2)" in out and (tmp_path / "t.png").stat().st_size > 1000
    code, out, _ = call(capsys, "tree", "il2-4", "--sizes")
    assert code == 0 and "0 ligand size 13" in out
    ModeTree.star(3).save(tmp_path / "own.json")
    code, out, _ = call(capsys, "tree", str(tmp_path / "own.json"))
    assert code == 0 and "order 3" in out
    code, out, _ = call(capsys, "tree", "list")
    assert code == 0 and "quad-8x8" in out


def test_tree_sizes_must_fit(capsys, tmp_path):
    for content in ('{"tree": [0, 1], "modes": ["a"]}', '{"tree": [0, 1], "sizes": 5}'):
        (tmp_path / "t.json").write_text(content)
        code, _, err = call(capsys, "tree", str(tmp_path / "t.json"), "--sizes")
        assert code == 1 and "need one entry for each of 2 modes" in err


def test_rank(capsys, tensor, tmp_path):
    code, out, _ = call(
        capsys,
        "rank",
        tensor,
        "--tree",
        "htf-4",
        "--rtol",
        "1e-9",
        "--png",
        str(tmp_path / "r.png"),
    )
    assert code == 0 and (tmp_path / "r.png").exists()
    rows = {
        line.split("│")[1].strip(): line.split("│")[3].strip()
        for line in out.splitlines()
        if line.startswith("│")
    }
    assert rows == {"0": "2", "1": "2", "(0, 1)": "2", "2": "3", "3": "3", "(2, 3)": "2"}
    model = zoo.model_of(ModeTree.binary(4))
    model.save(tmp_path / "m.safetensors")
    code, out, _ = call(capsys, "rank", str(tmp_path / "m.safetensors"))
    assert code == 0 and "(2, 3)" in out
    code, out, _ = call(capsys, "rank", str(tmp_path / "m.safetensors"), "--tree", "[[0,2],[1,3]]")
    assert code == 0 and "(0, 2)" in out


def test_decompose(capsys, tensor, tmp_path):
    out, png = tmp_path / "m.safetensors", tmp_path / "d.png"
    options = ("--tree", "htf-4", "--rtol", "0.2", "--out", str(out), "--png", str(png))
    code, said, err = call(capsys, "decompose", tensor, *options)
    assert code == 0, err
    model, values = load(out), torch.from_numpy(np.load(tensor))
    error = ((model.to_tensor() - values).norm() / values.norm()).item()
    assert error <= 0.2 and f"reached {error:.4g}" in said and png.exists()
    assert f"of {values.numel()} " in said and "asked 0.2" in said
    rows = [line.split("│") for line in said.splitlines() if line.startswith("│")]
    ranks = {row[1].strip(): int(row[3]) for row in rows}
    nodes = zip(model.tree.nodes[:-1], model.network.bonds[:-1], strict=True)
    assert ranks == {str(node): bond for node, bond in nodes}
    wide = zoo.model_of(ModeTree.binary(4))
    wide.save(tmp_path / "wide.safetensors")
    rounded = str(tmp_path / "rounded.safetensors")
    code, said, _ = call(
        capsys, "decompose", str(tmp_path / "wide.safetensors"), "--ranks", "1", "--out", rounded
    )
    assert code == 0 and "bound" in said
    reached = float(re.search(r"reached (\S+)", said).group(1))
    found, whole = load(rounded).to_tensor(), wide.to_tensor().detach()
    error = ((found - whole).norm() / whole.norm()).item()
    assert reached == pytest.approx(error, rel=1e-3)
    code, said, _ = call(capsys, "decompose", tensor, "--randomized", "--rtol", "1e-9")
    assert code == 0 and "asked 1e-09" in said


def test_fit_and_plot(capsys, tensor, tmp_path):
    run = tmp_path / "run"
    options = (
        "--tree htf-4 --observed 0.5 --steps 60 --rank 3 --dtype float64 --seed 3 --no-progress"
    )
    code, out, err = call(capsys, "fit", tensor, *options.split(), "--out", str(run))
    assert code == 0, err
    assert "test error of the mean" in out and "stopped by" in out
    about = json.loads((run / "config.json").read_text())
    assert about["config"]["seed"] == 3 and about["summary"]["observed entries"] == 105
    trajectory = Trajectory.load(run / "trajectory.npz")
    assert trajectory.steps[-1] == 60 and trajectory["loss"][-1] < trajectory["loss"][0]
    assert load(run / "model.safetensors").tree == ModeTree.binary(4)
    (run / "training.png").unlink()
    code, out, _ = call(capsys, "plot", str(run))
    assert code == 0 and (run / "training.png").exists()
    code, _, _ = call(
        capsys,
        "plot",
        str(run / "trajectory.npz"),
        "--names",
        "loss",
        "--png",
        str(tmp_path / "l.png"),
    )
    assert code == 0 and (tmp_path / "l.png").exists()


def test_run_dynamics(capsys, tmp_path):
    run = tmp_path / "runs" / "tiny-3"  # the folder above is made
    options = ("--model", "tiny", "--seed", "3", "--steps", "40", "--no-progress")
    code, out, err = call(capsys, "run", "dynamics", *options, "--out", str(run))
    assert code == 0, err
    for word in ("test error", "target ranks", "components", "jumps", "rate error"):
        assert word in out
    about = json.loads((run / "config.json").read_text())
    assert (about["config"]["model"], about["config"]["seed"]) == ("tiny", 3)
    assert about["config"]["rank"] == 8  # the preset's, not the default of the class
    (run / "rates.png").unlink()
    assert call(capsys, "plot", str(run))[0] == 0 and (run / "rates.png").exists()
    code, out, _ = call(capsys, "plot", str(run), str(run))
    assert code == 0 and (run.parent / "panels.png").exists()
    code, _, _ = call(capsys, "plot", str(run), "--png", str(tmp_path / "one.png"))
    assert code == 0 and (tmp_path / "one.png").exists()
    code, _, _ = call(capsys, "plot", str(run), "--names", "spectra", "loss")
    assert code == 0 and (run / "training.png").exists()


def test_run_takes_the_defaults_of_the_preset(capsys):
    for given in (["--model", "cp"], ["--model=cp"], ["--seed", "2", "--model", "cp"]):
        _, out, _ = call(capsys, "run", "dynamics", *given, "--help")
        assert re.search(r"--rank INT.*?\(default: *[│\s]*256\)", out, re.DOTALL)
    _, out, _ = call(capsys, "run", "dynamics", "--help")
    assert re.search(r"--rank INT.*?\(default: *[│\s]*512\)", out, re.DOTALL)


def test_run_init_scale(capsys, tmp_path):
    options = "--model tiny --stds 0.1 0.5 --seeds 1 --steps 30 --no-progress".split()
    code, out, err = call(capsys, "run", "init-scale", *options, "--out", str(tmp_path / "s"))
    assert code == 0, err
    assert "effective rank" in out and (tmp_path / "s" / "init-scale.png").exists()
    (tmp_path / "s" / "init-scale.png").unlink()
    assert call(capsys, "plot", str(tmp_path / "s"))[0] == 0
    assert (tmp_path / "s" / "init-scale.png").exists()


def test_an_interrupted_run_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", interrupted)
    code, _, err = call(
        capsys, "run", "dynamics", "--model", "tiny", "--out", str(tmp_path / "run")
    )
    assert code == 130 and "the same command goes on where this one stopped" in err


def test_same_seed_same_run(capsys, tensor, tmp_path):
    for name in "ab":
        call(capsys, "fit", tensor, "--steps", "20", "--out", str(tmp_path / name), "--no-progress")
    a, b = (load(tmp_path / name / "model.safetensors") for name in "ab")
    assert torch.equal(a.to_tensor(), b.to_tensor())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tree", "nope"], 1, "no tree named 'nope'"),
        (["tree", "[[0,1]"], 1, "not nested lists"),
        (["tree", "[0,2]"], 1, "mode 1 is missing"),
        (["rank", "nope.npy"], 1, "no such tensor"),
        (["rank", "il2"], 1, "192 missing entries"),
        (["rank", "covid19", "--tree", "htf-4"], 1, "3 axes and the tree 4 modes"),
        (["decompose", "covid19", "--rtol", "2"], 1, "rtol must be a number in [0, 1)"),
        (["decompose", "covid19", "--ranks", "0"], 1, "needs a positive integer"),
        (["decompose", "nope.npy"], 1, "no such tensor"),
        (["rank", "covid19", "--device", "warp"], 1, "cannot use the device 'warp'"),
        (["fit", "il2", "--no-progress"], 1, "192 NaN entries"),
        (["fit", "covid19", "--observed", "2"], 1, "observed must be a share"),
        (["fit", "covid19", "--tree", "htf-4"], 1, "3 mode sizes for a tree over 4 modes"),
        (["fit", "covid19", "--rank", "0"], 1, "ranks must be a positive integer"),
        (["plot", "nowhere"], 1, "no such trajectory file"),
        (["plot", "nowhere", "nowhere"], 1, "not a run folder"),
        (["plot"], 1, "give a run folder"),
        (["run", "dynamics", "--tree", "nope", "--model", "tiny"], 1, "no tree named 'nope'"),
        (["run", "dynamics", "--device", "warp"], 1, "cannot use the device 'warp'"),
        (["run", "dynamics", "--model", "nope"], 2, "nope"),
        (["run", "init-scale", "--model", "tiny", "--seeds"], 1, "at least one std and one seed"),
        (["run"], 2, "dynamics"),
        (["fit", "covid19", "--optimizer", "x"], 2, "optimizer"),
        (["probe", "--data", "digits"], 1, "name one model or more"),
        (["probe", "small-cnn", "--data", "digits"], 1, "give --weights FILE"),
        (["probe", "none.pt2", "--data", "digits"], 1, "no such model file"),
        (
            ["probe", "small-cnn", "--data", "digits", "--weights", "w.pt"],
            1,
            "no such file of weights",
        ),
        (["probe", "nowhere:net", "--data", "digits:far"], 1, "needs a number of pixels"),
        (["probe", "small-cnn", "--data", "covid19"], 1, "images are (N, C, H, W)"),
        (["probe", ".", "--data", "digits"], 1, "not a run folder of one training of locality"),
        (["nothing"], 2, "nothing"),
        ([], 2, ""),
    ],
)
def test_exit_codes(capsys, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    found, out, err = call(capsys, *arguments)
    assert found == code and message in out + err
    assert code != 1 or err.startswith("tnreg: ")
    assert not list(tmp_path.iterdir())  # nothing was written


def test_export(capsys, tmp_path):
    model = zoo.model_of(ModeTree([[0, 1], [2, 3], 4]), sizes=(3, 3, 3, 3, 5))
    model.save(tmp_path / "m.safetensors")
    code, out, err = call(capsys, "export", str(tmp_path / "m.safetensors"), "--format", "pt2")
    assert code == 0, err
    assert "1x1 convolution" in out and "values checked" in out
    x = [torch.randn(6, size, dtype=torch.float64) for size in model.sizes]
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    assert torch.allclose(loaded(x), model(x))
    target = str(tmp_path / "net.safetensors")
    options = ("--classes", "--format", "state", "--out", target)
    code, out, err = call(capsys, "export", str(tmp_path / "m.safetensors"), *options)
    assert code == 0 and "-> 5" in out and (tmp_path / "net.safetensors").exists(), err
    code, _, err = call(capsys, "export", str(tmp_path / "m.safetensors"), "--share")
    assert code == 1 and "share=True: the nodes of height" in err
    code, _, err = call(capsys, "export", str(tmp_path / "none.safetensors"))
    assert code == 1 and "no such model file" in err


def test_what_is_wrong_with_a_saved_model_is_told(capsys, tmp_path):
    """A damaged file is still of its kind: commands say what it lacks, not that it is another one."""
    tree = ModeTree.grid((2, 2))
    model, classifier = tmp_path / "model.safetensors", tmp_path / "classifier.safetensors"
    zoo.model_of(tree).save(model)
    ConvAC(Representation(2), ConvNet(tree, 2, 3, outputs=2)).save(classifier)
    for path in (model, classifier):
        metadata, tensors = read_safetensors(path)
        narrow = {name: x[..., :-1].contiguous() for name, x in tensors.items()}
        safetensors.torch.save_file(narrow, path, metadata)
    asked = (("rank", model), ("decompose", model), ("export", model),
             ("export", classifier), ("probe", classifier, "--data", "digits"))  # fmt: skip
    for command, path, *more in asked:
        code, _, err = call(capsys, command, str(path), *more)
        kind = "factorization" if path == model else "classifier"
        assert code == 1 and f"not a {kind}: {path}" in err


def test_run_convac(capsys, tmp_path):
    folder = str(tmp_path / "run")
    options = ("--trees", "quad", "random", "--channels", "3", "--epochs", "1", "--seeds", "1",
               "--rtols", "0.5", "--thin", "0.5", "--out", folder, "--no-progress")  # fmt: skip
    code, out, err = call(capsys, "run", "convac", *options)
    assert code == 0, err
    assert "logistic" in out and "truncated" in out and "100 %" in out
    code, out, err = call(capsys, "plot", folder, "--png", str(tmp_path / "p.png"))
    assert code == 0 and (tmp_path / "p.png").exists(), err
    for name, kind, ending in (
        ("quad", "state", ".network.safetensors"),
        ("random", "onnx", ".onnx"),
    ):
        file = tmp_path / "run" / f"{name}.safetensors"
        target = file.with_name(f"{name}-again{ending}")
        code, out, err = call(capsys, "export", str(file), "--format", kind, "--out", str(target))
        assert code == 0 and target.exists(), err


def test_run_locality_and_probe_it(capsys, tmp_path):
    folder = tmp_path / "run"
    options = (
        "--set",
        "tiny",
        "--arms",
        "plain",
        "interaction",
        "--distances",
        "24",
        "--seeds",
        "1",
    )
    code, out, err = call(
        capsys, "run", "locality", *options, "--out", str(folder), "--no-progress"
    )
    assert code == 0, err
    assert "interaction" in out and "x plain" in out and (folder / "results.csv").exists()
    code, out, err = call(capsys, "plot", str(folder), "--png", str(tmp_path / "p.png"))
    assert code == 0 and (tmp_path / "p.png").exists(), err
    cell = str(folder / "interaction-24-seed-1")
    options = ("--data", "digits:24", "--pairs", "2", "--distances", "0", "16")
    code, out, err = call(capsys, "probe", cell, *options)
    assert code == 0 and "effective rank" in out, err


def test_probe(capsys, tmp_path):
    """The same network from four kinds of files gives the same table."""
    net = build("small-cnn", 1)
    safetensors.torch.save_model(net, str(tmp_path / "w.safetensors"))
    torch.save(net.state_dict(), tmp_path / "w.pt")
    images = torch.randn(40, 1, 8, 40)
    np.save(tmp_path / "x.npy", images.numpy())
    export_pt2(net.eval(), tmp_path / "net.pt2", example=images[:2])
    options = (
        "--data",
        str(tmp_path / "x.npy"),
        "--distances",
        "0",
        "4",
        "--pairs",
        "3",
        "--samples",
        "4",
    )
    tables = []
    for model in (("small-cnn", "--weights", str(tmp_path / "w.safetensors")),
                  ("small-cnn", "--weights", str(tmp_path / "w.pt")),
                  (str(tmp_path / "net.pt2"),)):  # fmt: skip
        code, out, err = call(capsys, "probe", *model, *options)
        assert code == 0, err
        tables.append(out.split("pixels\n")[1])
    assert tables[0] == tables[1] == tables[2] and len(tables[0].splitlines()) == 3
    png = tmp_path / "p.png"
    code, out, err = call(
        capsys,
        "probe",
        str(tmp_path / "net.pt2"),
        "--data",
        "digits:8",
        "--pairs",
        "2",
        "--png",
        str(png),
    )
    assert code == 0 and png.exists(), err
    np.save(tmp_path / "small.npy", images[..., :16].numpy())
    code, _, err = call(
        capsys, "probe", str(tmp_path / "net.pt2"), "--data", str(tmp_path / "small.npy")
    )
    assert code == 1 and "does not take images of shape (1, 8, 16)" in err
    ConvAC(Representation(2, kind="sine"), ConvNet(ModeTree.grid((8, 8)), 2, 3, outputs=2)).save(
        tmp_path / "ac.safetensors"
    )
    np.save(tmp_path / "y.npy", torch.rand(40, 1, 8, 8).numpy())
    code, out, err = call(
        capsys,
        "probe",
        str(tmp_path / "ac.safetensors"),
        "--data",
        str(tmp_path / "y.npy"),
        "--pairs",
        "2",
    )
    assert code == 0 and "effective rank" in out, err


@pytest.mark.parametrize(
    "command",
    [
        *"tree,rank,decompose,fit,export,probe,plot,demo,run,sweep,doctor".split(","),
        *(f"run {name}" for name in ("dynamics", "init-scale", "convac", "locality")),
    ],
)
def test_every_option_is_explained(capsys, command):
    code, out, _ = call(capsys, *command.split(), "--help")
    assert code == 0
    lines = [line.strip("│ ") for line in out.splitlines()]
    options = [i for i, line in enumerate(lines) if re.match(r"--[a-z]", line)]
    assert options
    for i in options:
        assert (
            "(default:" in " ".join(lines[i : i + 8])
            and len(" ".join(lines[i : i + 2]).split()) > 3
        )


def test_module_runs():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tnreg.cli", "tree", "star-3"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "(0, 1, 2)" in done.stdout


@pytest.mark.filterwarnings("ignore:.* times in one pass")
def test_tensors_on_disk(tmp_path, capsys):
    """Files of zarr and HDF5 are read block by block; ranks are those of the tensor in memory."""
    h5py, zarr = pytest.importorskip("h5py"), pytest.importorskip("zarr")
    tree, generator = ModeTree.binary(4), torch.Generator().manual_seed(0)
    model = Factorization(
        tree, (12, 11, 10, 9), 3, std=1.0, dtype=torch.float64, generator=generator
    )
    x = model.to_tensor().detach().numpy()
    np.save(tmp_path / "x.npy", x)
    zarr.create_array(str(tmp_path / "x.zarr"), data=x, chunks=(6, 6, 5, 5))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("u", data=x, chunks=(6, 6, 5, 5))
        file["v"] = x[0]
    told = []
    for name in ("x.npy", "x.zarr", "x.h5:u"):
        code, out, _ = call(capsys, "rank", f"{tmp_path}/{name}", "--memory", "700kB")
        assert code == 0
        told.append(re.findall(r"│ .*", out))
    assert told[0] == told[1] == told[2] and len(told[0]) == 6
    asked = ["--rtol", "1e-6", "--memory", "700kB", "--out", f"{tmp_path}/m.safetensors"]
    code, out, _ = call(capsys, "decompose", f"{tmp_path}/x.zarr", *asked)
    assert code == 0 and re.search(r"asked 1e-06, bound \S+, reached \S+e-1\d", out), out
    assert load(tmp_path / "m.safetensors").network.bonds[:-1] == (3,) * 6
    for words, message in (
        (["rank", f"{tmp_path}/x.h5"], "holds 2; arrays there: u, v"),
        (["rank", f"{tmp_path}/x.zarr", "--missing", "nan"], "--missing is for tensors in memory"),
        (["decompose", f"{tmp_path}/x.zarr", "--memory", "1kB"], "does not fit into memory"),
    ):
        code, _, err = call(capsys, *words)
        assert code == 1 and message in err


def answer(capsys, *arguments, code=0):
    """The JSON document on standard output; nothing else is there."""
    found, out, err = call(capsys, *arguments, "--json")
    assert found == code, err
    return json.loads(out, parse_constant=pytest.fail)  # no NaN or Infinity


def test_json_of_trees(capsys):
    rows = answer(capsys, "tree", "list")
    assert [row["name"] for row in rows] == list(gallery())
    assert all(row["order"] == load_tree(row["name"]).order and row["about"] for row in rows)
    for source in ("il2-4", "[[0,2],[1,[3]]]"):
        found, tree = answer(capsys, "tree", source), read_tree(source)
        assert tree_from_json(found) == tree and found["height"] == tree.heights[-1]
        assert [row["node"] for row in found["nodes"]] == [str(node) for node in tree.nodes]
        for row, node in zip(found["nodes"], tree.nodes, strict=True):
            above = tree.parent(node)
            assert row["parent"] == (None if above is None else str(above))
            assert tuple(row["modes"]) == tree.modes_below(node)
    assert answer(capsys, "tree", "il2-4")["modes"][0] == "ligand"


def test_json_of_ranks(capsys, tensor, tmp_path):
    x, tree = torch.from_numpy(np.load(tensor)), ModeTree([[0, 2], [1, 3]])
    png = str(tmp_path / "r.png")  # what was written is told on standard error
    found = answer(capsys, "rank", tensor, "--tree", "across-4", "--rtol", "0.1", "--png", png)
    assert found["sizes"] == list(x.shape) and found["rtol"] == 0.1
    ranks, values = hierarchical_rank(x, tree, rtol=0.1), spectra(x, tree)
    assert {row["node"]: row["rank"] for row in found["nodes"]} == {
        str(node): rank for node, rank in ranks.items()
    }
    for row, s in zip(found["nodes"], values.values(), strict=True):
        assert row["singular values"] == len(s)
        figures = float(s[0]), float(effective_rank(s)), float(entanglement_entropy(s))
        assert [row[key] for key in ("largest", "effective rank", "entropy")] == pytest.approx(
            figures
        )


def test_json_of_a_decomposition(capsys, tensor, tmp_path):
    out, x = tmp_path / "m.safetensors", torch.from_numpy(np.load(tensor))
    options = ("--tree", "htf-4", "--rtol", "0.2", "--out", str(out))
    found, model = answer(capsys, "decompose", tensor, *options), load(out)
    bonds = zip(model.tree.nodes[:-1], model.network.bonds[:-1], strict=True)
    assert {row["node"]: row["rank"] for row in found["nodes"]} == {str(v): r for v, r in bonds}
    assert found["numbers"] == sum(p.numel() for p in model.parameters())
    assert found["numbers before"] == x.numel() and found["written"] == [str(out)]
    error = ((model.to_tensor() - x).norm() / x.norm()).item()
    assert found["relative error"]["reached"] == pytest.approx(error, rel=1e-9)
    assert found["relative error"]["asked"] == 0.2 >= found["relative error"]["bound"] >= error
    values = spectra(x, model.tree)
    for row, s in zip(found["nodes"], values.values(), strict=True):
        rest = s[row["rank"] :]
        assert row["error of the cut"] == pytest.approx(float(rest.norm() / x.norm()), abs=1e-12)


def test_json_of_trainings(capsys, tensor, tmp_path):
    """What the document says is what the run folder says."""
    short = ("--steps", "20", "--no-progress")
    for words in (
        ("fit", tensor, "--rank", "2", *short),
        ("run", "dynamics", "--model", "tiny", *short),
    ):
        folder = tmp_path / words[0]
        found = answer(capsys, *words, "--out", str(folder))
        summary = json.loads((folder / "config.json").read_text())["summary"]
        assert found.pop("folder") == str(folder)
        assert found.pop("tensor", tensor) == tensor
        assert found.pop("experiment", "dynamics") == "dynamics"
        assert found == summary
    words = "sweep dynamics --model tiny --seed 0:2 --workers 0".split()
    found = answer(capsys, *words, *short, "--out", str(tmp_path / "sweep"))
    assert len(found["rows"]) == len(found["computed"]) == 2 and not found["failed"]
    mean = sum(row["test error"] for row in found["rows"]) / 2
    assert (
        found["means"][0]["test error"] == pytest.approx(mean) and found["means"][0]["seeds"] == 2
    )


def test_what_others_print_does_not_come_between_the_json(capsys, tmp_path, monkeypatch):
    (tmp_path / "loud.py").write_text("""print("hello")
from torch import nn

class Net(nn.Sequential):
    def __init__(self, channels=1, num_classes=2):
        end = nn.Linear(4, num_classes)
        super().__init__(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), end)
""")
    monkeypatch.syspath_prepend(tmp_path)
    words = "run locality --set tiny --model loud:Net --arms plain --seeds 1 --epochs 1 --no-progress".split()
    found = answer(capsys, *words, "--out", str(tmp_path / "run"))
    assert found["experiment"] == "locality" and len(found["rows"]) >= 1


def test_json_of_a_sweep_that_fails(capsys, tmp_path):
    words = "sweep dynamics --model tiny --seed 0 --lr=-1 --workers 0 --retries 0".split()
    found = answer(capsys, *words, "--no-progress", "--out", str(tmp_path / "s"), code=1)
    [(name, error)] = found["failed"].items()
    assert "lr must be" in error and not found["rows"]
    code, _, err = call(capsys, *words, "--no-progress", "--out", str(tmp_path / "s"))
    assert code == 1 and f"{name}: " in err and "1 of 1 runs failed" in err


def test_json_of_convac_and_locality(capsys, tmp_path, monkeypatch):
    """NaN becomes null."""
    cell = {"arm": "plain", "distance": 8, "test accuracy": 0.5, "deviation": math.nan, "epochs": 2,
            "seconds": 1.0, "cost": math.nan, "cost an epoch": 1.0}  # fmt: skip
    summary = {"accuracy": [], "mean and spread": {}, "smaller": [], "seconds": 2.0}
    shown = []

    def fake(found):
        def run(config, folder, *, progress):
            shown.append(progress)
            return found

        return run

    monkeypatch.setattr(convac, "run", fake(summary))
    monkeypatch.setattr(locality, "run", fake([cell]))
    monkeypatch.setattr(locality, "table", lambda rows: rows)
    out = str(tmp_path / "r")
    assert answer(capsys, "run", "convac", "--out", out) == {
        "folder": out, "experiment": "convac", **summary
    }  # fmt: skip
    found = answer(capsys, "run", "locality", "--set", "tiny", "--out", out)
    assert found["means"] == [{**cell, "deviation": None, "cost": None}]
    assert shown == [False, False]  # no terminal here


def test_json_of_a_probe(capsys, tmp_path):
    images = torch.rand(20, 1, 8, 24, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", images.numpy())
    net = build("small-cnn", 1).eval()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    options = ("--data", str(tmp_path / "x.npy"), "--weights", str(tmp_path / "w.pt"))
    words = ("--distances", "0", "4", "--pairs", "1", "--samples", "4", "--anywhere")
    [found] = answer(capsys, "probe", "small-cnn", *options, *words)["models"]
    wanted = locality_profile(
        net, images, distances=(0, 4), pairs=1, samples=4, where="anywhere", seed=0
    )
    assert found["model"] == "small-cnn" and found["size"] == wanted.size == 1
    assert [row["distance"] for row in found["distances"]] == [0, 4]
    assert [row["standard error"] for row in found["distances"]] == [None, None]
    assert [row["interaction"] for row in found["distances"]] == pytest.approx(
        wanted.interaction[:, 0].tolist(), abs=1e-6
    )


def test_plain_values():
    given = {(0, 1): np.float32(0.5), "a": [math.nan, -math.inf, torch.tensor([1, 2])], 3: {2, 1},
             "b": (True, None, Path("x")), "c": np.array([math.nan])}  # fmt: skip
    assert plain(given) == {
        "(0, 1)": 0.5, "a": [None, None, [1, 2]], "3": [1, 2], "b": [True, None, "x"], "c": [None]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("rank covid19 --tree nope", "--tree"),
        ("rank covid19 --tree htf-4", "--tree"),
        ("rank covid19 --tree [0,1", "--tree"),
        ("rank covid19 --tree [0,2]", "--tree"),
        ("rank covid19 --tree x.json", "--tree"),
        ("rank covid19 --rtol 2", "--rtol"),
        ("rank covid19 --rtol nan", "--rtol"),
        ("rank covid19 --memory lots", "--memory"),
        ("rank covid19 --device warp", "--device"),
        ("rank il2", "--missing nan"),
        ("rank covid19 --png nowhere/x.png", "--png"),
        ("decompose covid19 --rtol -1", "--rtol"),
        ("decompose covid19 --ranks 0", "--ranks"),
        ("decompose covid19 --memory 0", "--memory"),
        ("decompose covid19 --tree htf-4", "--tree"),
        ("decompose covid19 --out nowhere/x.safetensors", "--out"),
        ("decompose covid19 --png .", "--png"),
        ("fit covid19 --tree htf-4", "--tree"),
        ("fit covid19 --observed 2", "--observed"),
        ("fit il2", "--missing"),
        ("fit covid19 --rank 0", "--rank"),
        ("fit covid19 --std=-1", "--std"),
        ("fit covid19 --lr=-1 --out r", "--lr"),
        ("fit covid19 --steps=-1 --out r", "--steps"),
        ("fit covid19 --every 0 --out r", "--every"),
        ("fit covid19 --steps 1 --out theirs", "--out"),
        ("fit covid19 --join full --root ones", "--root"),
        ("run dynamics --model tiny --tree [0,1]", "--tree"),
        ("run dynamics --model tiny --out theirs", "--out"),
        ("run dynamics --model tiny --device warp", "--device"),
        ("run convac --trees htf-4 --out r", "--trees"),
        ("run convac --trees nope --out r", "--trees"),
        ("run init-scale --model tiny --stds", "--stds"),
        ("sweep dynamics --model tiny --device warp", "--device"),
        ("probe small-cnn --data none.npz", "--data"),
        ("probe small-cnn --data digits --weights none.pt", "--weights"),
        ("probe small-cnn --data digits", "--weights"),
        ("plot theirs --png nowhere/x.png", "--png"),
        ("demo --device warp", "--device"),
    ],
)
def test_errors_name_the_option(capsys, tmp_path, monkeypatch, words, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "letter.txt").write_text("keep")
    code, out, err = call(capsys, *words.split())
    assert code == 1 and not out and err.startswith("tnreg: ")
    assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", err), err
    assert [path.name for path in tmp_path.rglob("*")] == ["theirs", "letter.txt"]


def test_options_that_would_be_ignored_are_refused(capsys, tmp_path):
    model, classifier = str(tmp_path / "m.safetensors"), str(tmp_path / "c.safetensors")
    zoo.model_of(ModeTree.binary(4)).save(model)
    tree = ModeTree.grid((2, 2))
    ConvAC(Representation(3, patch=(2, 2)), ConvNet(tree, 3, 2, outputs=2)).save(classifier)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"tnreg": "0", "experiment": "convac", "config": {}})
    )
    for words in (
        ("rank", model, "--missing", "nan"),
        ("decompose", model, "--randomized"),
        ("export", classifier, "--share"),
        ("export", classifier, "--classes"),
        ("plot", str(folder), "--linear"),
        ("plot", str(folder), "--names", "loss"),
        ("plot", str(folder), str(folder), "--linear"),
    ):
        code, out, err = call(capsys, *words)
        assert code == 1 and not out and words[-1 if words[-1].startswith("--") else -2] in err, err


@pytest.mark.parametrize(
    ("command", "argument", "option"),
    [
        ("fit covid19", "tree", "--tree"), ("fit covid19", "ranks", "--rank"),
        ("fit covid19", "folder", "--out"), ("fit covid19", "png", None), ("fit covid19", None, None),
        ("run init-scale", "std", "--stds"), ("run init-scale", "rank", None),
    ],
)  # fmt: skip
def test_the_option_that_an_error_is_about(capsys, monkeypatch, command, argument, option):
    """Only options that the command has; an error that names its option stays as it is."""
    for text in ("not so", f"not so; change {option}"):

        def fail(*arguments, text=text, **options):
            raise DataError(text, argument=argument)

        for module in (completion, init_scale):
            monkeypatch.setattr(module, "run", fail)
        code, _, err = call(capsys, *command.split())
        more = f"\n  option: {option}" if option and text == "not so" else ""
        assert code == 1 and err == f"tnreg: DataError: {text}{more}\n"


def test_a_process_count_without_a_rank_is_told(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    code, _, err = call(capsys, "tree", "htf-4")
    assert code == 1 and "torchrun started 2 processes" in err
    monkeypatch.setenv("RANK", "1")
    code, _, err = call(capsys, "tree", "htf-4")
    assert code == 1 and not err  # the first one tells it


def test_work_shows_a_line_on_a_terminal(capsys, tensor, tmp_path, monkeypatch):
    shown = screen(monkeypatch)
    model, net = tmp_path / "m.safetensors", build("small-cnn", 1)
    zoo.model_of(ModeTree.binary(2), sizes=(3, 3)).save(model)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((9, 1, 8, 16)).astype("float32"))
    data = ("--data", str(tmp_path / "x.npy"), "--weights", str(tmp_path / "w.pt"))
    for words, line in (
        (("rank", tensor, "--json"), "singular values ..."),
        (("decompose", tensor), "decomposing ..."),
        (("export", str(model), "--format", "state"), "writing state ..."),
        (("probe", "small-cnn", *data, "--pairs", "1"), "pairs of patches"),
        (("tree", "htf-4", "--png", str(tmp_path / "t.png")), "drawing ..."),
        (("doctor", "--json"), "looking at packages"),
        (("fit", tensor, "--steps", "5", "--out", str(tmp_path / "r")), "5/5"),
        (("plot", str(tmp_path / "r")), "drawing ..."),
        (("demo", "--steps", "30", "--out", str(tmp_path / "d")), "30/30"),
    ):
        shown.truncate(0)
        code, out, _ = call(capsys, *words)
        assert code == 0 and line in shown.getvalue() and line not in out, words
        if words[-1] == "--json":
            json.loads(out)
    assert Reply().shows(True) and not Reply().shows(False)  # --no-progress


def test_nothing_is_drawn_where_there_is_no_terminal(capsys, tensor):
    for command in ("rank", "decompose"):
        code, out, err = call(capsys, command, tensor)
        assert code == 0 and not err and "..." not in out
    assert not Reply().shows(True)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(capsys, tmp_path, shell):
    code, script, err = call(capsys, "--tyro-print-completion", shell)
    assert code == 0, err
    for word in ("--rtol", "--memory", "decompose", "init-scale", "doctor"):
        assert word in script
    (tmp_path / "script").write_text(script)
    if shell == "bash":
        # complete -F FUNCTION tnreg; asked for what may follow "tnreg rank x.npy --r"
        ask = "\n".join(
            [
                f"source {tmp_path / 'script'}",
                "f=$(complete -p tnreg | sed 's/.*-F \\([^ ]*\\).*/\\1/')",
                "COMP_WORDS=(tnreg rank x.npy --r); COMP_CWORD=3; COMP_LINE='tnreg rank x.npy --r'",
                "COMP_POINT=20; COMPREPLY=(); $f; echo ${COMPREPLY[@]}",
            ]
        )
        subprocess.run(["bash", "-n", tmp_path / "script"], check=True)
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["--rtol"]


def test_completion_for_tcsh_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, _, err = call(capsys, "--tyro-print-completion", "tcsh")
    assert code == 1 and "pip install shtab" in err
