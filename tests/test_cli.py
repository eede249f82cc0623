"""The command line: what it prints and writes, exit codes, and help for every option."""

import importlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
import zoo
from command import call, screen

import tnreg
from tnreg import ConvAC, ConvNet, ModeTree, Representation, load, spectra
from tnreg.cli.entry import COMMANDS
from tnreg.cli.output import Reply, plain
from tnreg.experiments import completion, convac, locality
from tnreg.experiments.dynamics import init_scale
from tnreg.experiments.nets import build
from tnreg.machine.files import read_safetensors
from tnreg.trees.tree import read_tree, tree_from_json

pytestmark = pytest.mark.slow


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Call the command line in an empty folder; check the exit code; return both outputs."""
    monkeypatch.chdir(tmp_path)

    def run(words, expected=0):
        code, out, err = call(capsys, *words.split())
        assert code == expected, out + err
        return out, err

    run.call = partial(call, capsys)  # words with spaces
    return run


@pytest.fixture
def answer(cli):
    """Return the JSON document on standard output; nothing else may be there, no NaN either."""
    read = partial(json.loads, parse_constant=pytest.fail)
    return lambda words, code=0: read(cli(f"{words} --json", code)[0])


@pytest.fixture
def tensor(cli):
    """The tensor that is written to x.npy."""
    x = zoo.model_of(ModeTree.binary(4)).to_tensor().detach()
    np.save("x.npy", x.numpy())
    return x


def table_rows(out):
    """Cells of the rows of the tables in an output, without their headings."""
    return [re.split(r"\s*│\s*", row)[1:-1] for row in out.splitlines() if row.startswith("│")]


# What the commands print and write


def test_tree(cli, answer):
    out, _ = cli("tree htf-4 --ascii")
    assert "order 4, 7 nodes, height 2" in out and "(0, 1)" in out
    assert "(0, 2)" in cli("tree [[0,2],[1,3]] --png t.png")[0]  # its name in 0.1
    assert Path("t.png").stat().st_size > 1000
    assert "0 ligand size 13" in cli("tree il2-4 --sizes")[0]
    ModeTree.star(3).save("own.json")
    assert "order 3" in cli("tree own.json")[0] and "quad-8x8" in cli("tree list")[0]
    for content in ('{"tree": [0, 1], "modes": ["a"]}', '{"tree": [0, 1], "sizes": 5}'):
        Path("t.json").write_text(content)
        assert "need one entry for each of 2 modes" in cli("tree t.json --sizes", 1)[1]
    rows = answer("tree list")
    assert [row["name"] for row in rows] == list(tnreg.gallery())
    assert all(row["order"] == tnreg.load_tree(row["name"]).order and row["about"] for row in rows)
    for source in ("il2-4", "[[0,2],[1,[3]]]"):
        document, tree = answer(f"tree {source}"), read_tree(source)
        assert tree_from_json(document) == tree and document["height"] == tree.heights[-1]
        for row, node in zip(document["nodes"], tree.nodes, strict=True):
            above = tree.parent(node)
            assert row["node"] == str(node) and tuple(row["modes"]) == tree.modes_below(node)
            assert row["parent"] == (None if above is None else str(above))
    assert answer("tree il2-4")["modes"][0] == "ligand"


def test_tree_from_a_tensor(cli, answer, tensor):
    """Of all entries, of some (NaN) and of a model; saved, drawn, and used by another command."""
    out, _ = cli("tree --from x.npy --rtol 1e-6 --out found.json --figure t.png")
    found = tnreg.load_tree("found.json")
    assert found == tnreg.find_tree(tensor, rtol=1e-6) and Path("t.png").stat().st_size > 1000
    model = tnreg.decompose(tensor, found, rtol=1e-6)
    numbers = sum(weight.numel() for weight in model.weights.values())
    assert f"numbers: {numbers}; along the binary tree " in out and "0 size 2, rank 2" in out
    model.save("m.safetensors")
    document = answer("tree --from m.safetensors --rtol 1e-6")
    assert tree_from_json(document) == found and document["numbers along its own tree"] == numbers
    assert {row["node"]: row["rank"] for row in document["nodes"][:-1]} == {
        str(node): rank for node, rank in tnreg.hierarchical_rank(tensor, found, rtol=1e-6).items()
    }
    known = np.where(np.arange(tensor.numel()).reshape(tensor.shape) % 3 < 2, tensor.numpy(), np.nan)
    np.save("some.npy", known)
    assert "no two modes interact beyond chance; ranks are" in cli("tree --from some.npy")[0]
    assert tree_from_json(answer("tree --from some.npy")) == ModeTree.binary(4)
    np.save("none.npy", known * np.nan)
    assert "all entries are missing" in cli("tree --from none.npy", 1)[1]
    for words in ("tree", "tree htf-4 --from x.npy"):
        assert "give one of a tree" in cli(words, 1)[1]
    assert "option: --rtol" in cli("tree --from x.npy --rtol 2", 1)[1]


def test_rank(cli, answer, tensor):
    words, tree = "rank x.npy --tree across-4 --rtol 0.1", ModeTree([[0, 2], [1, 3]])
    rows, document = table_rows(cli(f"{words} --figure r.png")[0]), answer(words)
    assert document["sizes"] == list(tensor.shape) and document["rtol"] == 0.1
    expected = tnreg.hierarchical_rank(tensor, tree, rtol=0.1)
    ranks = {str(node): rank for node, rank in expected.items()}
    assert {row["node"]: row["rank"] for row in document["nodes"]} == ranks
    assert {row[0]: int(row[2]) for row in rows} == ranks and Path("r.png").exists()
    for row, s in zip(document["nodes"], spectra(tensor, tree).values(), strict=True):
        assert row["singular values"] == len(s)
        assert row["largest"] == pytest.approx(float(s[0]))
        assert row["effective rank"] == pytest.approx(float(tnreg.effective_rank(s)))
        assert row["entropy"] == pytest.approx(float(tnreg.entanglement_entropy(s)))
    zoo.model_of(ModeTree.binary(4)).save("m.safetensors")
    assert "(2, 3)" in cli("rank m.safetensors")[0]
    assert "(0, 2)" in cli("rank m.safetensors --tree [[0,2],[1,3]]")[0]


def test_decompose(cli, answer, tensor):
    words = "decompose x.npy --tree htf-4 --rtol 0.2 --out m.safetensors"
    (out, _), document = cli(f"{words} --figure d.png"), answer(words)
    model, errors, norm = load("m.safetensors"), document["relative error"], tensor.norm()
    error = ((model.to_tensor() - tensor).norm() / norm).item()
    assert errors["reached"] == pytest.approx(error, rel=1e-9) and f"reached {error:.4g}" in out
    assert errors["asked"] == 0.2 >= errors["bound"] >= error and "asked 0.2" in out
    assert document["numbers before"] == tensor.numel() and f"of {tensor.numel()} " in out
    assert document["numbers"] == sum(p.numel() for p in model.parameters())
    assert document["written"] == ["m.safetensors"] and Path("d.png").exists()
    bonds = dict(zip(map(str, model.tree.nodes[:-1]), model.network.bonds, strict=False))
    assert {row[0]: int(row[2]) for row in table_rows(out)} == bonds
    assert {row["node"]: row["rank"] for row in document["nodes"]} == bonds
    for row, s in zip(document["nodes"], spectra(tensor, model.tree).values(), strict=True):
        rest = float(s[row["rank"] :].norm() / norm)
        assert row["error of the cut"] == pytest.approx(rest, abs=1e-12)
    zoo.model_of(ModeTree.binary(4)).save("wide.safetensors")  # the tensor in another form
    out, _ = cli("decompose wide.safetensors --ranks 1 --out rounded.safetensors")
    error = ((load("rounded.safetensors").to_tensor() - tensor).norm() / norm).item()
    reached = float(re.search(r"bound \S+, reached (\S+)", out)[1])
    assert reached == pytest.approx(error, rel=1e-3)
    assert "asked 1e-09" in cli("decompose x.npy --randomized --rtol 1e-9")[0]
    single = answer("decompose x.npy --precision single --rtol 0.01")["relative error"]
    assert single["reached"] <= single["bound"] and single["reached"] <= 0.01
    few = answer("decompose x.npy --max-numbers 60")
    assert few["numbers"] <= 60 and few["relative error"]["asked"] == 1e-3
    far = answer(f"decompose x.npy --atol {float(tensor.norm()) / 2}")["relative error"]
    assert far["asked"] == pytest.approx(0.5) and 0.1 < far["reached"] <= 0.5


def test_fit_and_plot(cli, tensor):
    options = "--tree htf-4 --observed 0.5 --steps 60 --rank 3 --dtype float64 --seed 3"
    for name in ("again", "run"):
        out, _ = cli(f"fit x.npy {options} --no-progress --out {name}")
    first, model = (load(f"{name}/model.safetensors") for name in ("again", "run"))
    assert torch.equal(first.to_tensor(), model.to_tensor()) and model.tree == ModeTree.binary(4)
    assert "test error of the mean" in out and "stopped by" in out
    assert "trained on 95 entries, held out 10 to choose the row, tested on 105; `tnreg complete`" in out
    run = Path("run")
    about = json.loads((run / "config.json").read_text())
    assert about["config"]["seed"] == 3 and about["summary"]["observed entries"] == 105
    trajectory = tnreg.Trajectory.load(run / "trajectory.npz")
    assert trajectory.steps[-1] == 60 and trajectory["loss"][-1] < trajectory["loss"][0]
    (run / "training.png").unlink()
    np.save("far.npy", 1 + np.arange(24.0).reshape(2, 3, 4) / 24)
    assert "1 is not below 0." in cli("fit far.npy --tree star-3 --steps 1 --out far")[0].replace("\n", " ")
    cli("plot run")
    cli("plot run/trajectory.npz --names loss --figure l.png")
    assert (run / "training.png").exists() and Path("l.png").exists()


def test_run_dynamics_and_init_scale(cli):
    run = Path("runs/tiny-3")  # the folder above it is made
    out, _ = cli("run dynamics --model tiny --seed 3 --steps 40 --no-progress")
    for word in ("test error", "target ranks", "components", "jumps", "rate error"):
        assert word in out
    config = json.loads((run / "config.json").read_text())["config"]
    assert (config["model"], config["seed"]) == ("tiny", 3)
    assert config["rank"] == 8  # the preset's, not the default of the class
    (run / "rates.png").unlink()
    words = "run init-scale --model tiny --stds 0.1 0.5 --seeds 1 --steps 30 --no-progress --out s"
    assert "2 of 2 trainings never left their plateau" in cli(words)[0]
    Path("s/init-scale.png").unlink()
    for words, picture in (
        (run, run / "rates.png"), (f"{run} {run}", "runs/panels.png"), ("s", "s/init-scale.png"),
        (f"{run} --figure one.png", "one.png"), (f"{run} --names spectra loss", run / "training.png"),
    ):  # fmt: skip
        cli(f"plot {words}")
        assert Path(picture).exists()


@pytest.mark.parametrize(("words", "option", "default"), [
    ("run dynamics --model cp", "--rank INT", "256"), ("run dynamics", "--rank INT", "512"),
    ("run dynamics --model=cp", "--rank INT", "256"),
    ("run dynamics --seed 2 --model cp", "--rank INT", "256"),
    ("run locality --set pathfinder", "--epochs INT", "150"),
    ("sweep dynamics --model cp,mf", "--rank INT|A:B,...", "256"),
    ("sweep locality --set pathfinder", "--epochs INT|A:B,...", "150"),
])  # fmt: skip
def test_defaults_of_the_preset(cli, words, option, default):
    out = " ".join(re.sub("[│\\n]", " ", cli(f"{words} --help")[0]).split())
    assert re.search(rf"{re.escape(option)} [^-].*?\(default: (\S+)\)", out)[1] == default


def test_an_interrupted_run_says_how_to_go_on(cli, monkeypatch):
    interrupt = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("tnreg.experiments.dynamics.updates.fit", interrupt)
    _, err = cli("run dynamics --model tiny", 130)
    assert "the same command goes on where this one stopped" in err
    monkeypatch.setattr("tnreg.cli.tree.read_tree", interrupt)
    assert cli("tree htf-4", 130)[1] == "tnreg: interrupted\n"


def test_export(cli):
    model = zoo.model_of(ModeTree([[0, 1], [2, 3], 4]), sizes=(3, 3, 3, 3, 5))
    model.save("m.safetensors")
    out, _ = cli("export m.safetensors --format pt2")
    assert "1x1 convolution" in out and "values checked" in out
    x = [torch.randn(6, size, dtype=torch.float64) for size in model.sizes]
    assert torch.allclose(torch.export.load("m.pt2").module()(x), model(x))
    out, _ = cli("export m.safetensors --classes --format state --out net.safetensors")
    assert "-> 5" in out and Path("net.safetensors").exists()
    assert "share=True: the nodes of height" in cli("export m.safetensors --share", 1)[1]


def test_what_is_wrong_with_a_saved_model_is_told(cli):
    """A damaged file is still of its kind: commands say what it lacks, not that it is another one."""
    tree = ModeTree.grid((2, 2))
    zoo.model_of(tree).save("factorization.safetensors")
    ConvAC(Representation(2), ConvNet(tree, 2, 3, outputs=2)).save("classifier.safetensors")
    for path in Path().iterdir():
        metadata, tensors = read_safetensors(path)
        narrow = {name: x[..., :-1].contiguous() for name, x in tensors.items()}
        safetensors.torch.save_file(narrow, path, metadata)
    for words in ("rank factorization", "decompose factorization", "export factorization",
                  "export classifier", "probe --data digits classifier"):  # fmt: skip
        path = f"{words.split()[-1]}.safetensors"
        assert f"not a {words.split()[-1]}: {path}" in cli(f"{words}.safetensors", 1)[1]


def test_run_convac_and_locality(cli):
    words = "--trees quad random --channels 3 --epochs 1 --seeds 1 --rtols 0.5 --thin 0.5 --out run"
    out, _ = cli(f"run convac {words} --no-progress")
    assert "logistic" in out and "truncated" in out and "100 %" in out
    words = "--set tiny --arms plain interaction --distances 24 --seeds 1 --out l"
    out, _ = cli(f"run locality {words} --no-progress")
    assert "interaction" in out and "x plain" in out and Path("l/results.csv").exists()
    for words, target in (
        ("plot run --figure", "p.png"), ("plot l --figure", "l.png"),
        ("export run/quad.safetensors --format state --out", "q.network.safetensors"),
        ("export run/random.safetensors --format onnx --out", "r.onnx"),
    ):  # fmt: skip
        cli(f"{words} {target}")
        assert Path(target).exists()
    words = "probe l/interaction-24-seed-1 --data digits:24 --pairs 2 --distances 0 16"
    assert "effective rank" in cli(words)[0]


def test_probe(cli, answer):
    """The same network from three kinds of files gives the same table."""
    net = build("small-cnn", 1).eval()
    safetensors.torch.save_model(net, "w.safetensors")
    torch.save(net.state_dict(), "w.pt")
    images = torch.randn(40, 1, 8, 40)
    np.save("x.npy", images.numpy())
    tnreg.export_pt2(net, "net.pt2", example=images[:2])
    words, tables = "--data x.npy --distances 0 4 --pairs 3 --samples 4", []
    for model in ("small-cnn --weights w.safetensors", "small-cnn --weights w.pt", "net.pt2 --trust"):
        tables.append(cli(f"probe {model} {words}")[0].split("pixels\n")[1])
    assert tables[0] == tables[1] == tables[2] and len(tables[0].splitlines()) == 3
    cli("probe net.pt2 --trust --data digits:8 --pairs 2 --figure p.png")
    assert Path("p.png").exists()
    options = "--distances 0 4 --pairs 1 --samples 4 --anywhere"
    [document] = answer(f"probe small-cnn --data x.npy --weights w.pt {options}")["models"]
    profile = tnreg.locality_profile(
        net, images, distances=(0, 4), pairs=1, samples=4, where="anywhere", seed=0
    )
    assert document["model"] == "small-cnn" and document["size"] == profile.size == 1
    rows = document["distances"]
    assert [(row["distance"], row["standard error"]) for row in rows] == [(0, None), (4, None)]
    interaction = profile.interaction[:, 0].tolist()
    assert [row["interaction"] for row in rows] == pytest.approx(interaction, abs=1e-6)
    np.save("small.npy", images[..., :16].numpy())
    _, err = cli("probe net.pt2 --trust --data small.npy", 1)
    assert "does not take images of shape (1, 8, 16)" in err
    classifier = ConvNet(ModeTree.grid((8, 8)), 2, 3, outputs=2)
    ConvAC(Representation(2, kind="sine"), classifier).save("ac.safetensors")
    np.save("y.npy", torch.rand(40, 1, 8, 8).numpy())
    assert "effective rank" in cli("probe ac.safetensors --data y.npy --pairs 2")[0]


def test_probe_says_what_it_found_and_compares(cli, answer):
    """Words come first; several models are compared; a network may give a dict."""
    Path("wrapped.py").write_text(
        "import torch\nfrom tnreg.experiments.nets import SmallCNN\n"
        "class Net(SmallCNN):\n    def forward(self, x):\n"
        "        return {'other': None, 'logits': super().forward(x)}\n"
    )
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = build("small-cnn", 1)
        os.mkdir(f"run{seed}")
        safetensors.torch.save_model(net, f"run{seed}/model.safetensors")
        about = {"tnreg": "0.1.0", "experiment": "locality_run", "config": {"model": "small-cnn"}}
        Path(f"run{seed}/config.json").write_text(json.dumps(about))
    words = "--data digits:24 --distances 0 4 --pairs 4 --samples 4"
    out, _ = cli(f"probe run0 run1 {words} --map 2x4 --figure m.png")
    assert out.startswith("run0: ") and Path("m.png").exists()
    lines = out.splitlines()
    assert "of the pair interaction lies within" in lines[0] and lines[1].startswith("run1: ")
    assert " run0" in lines[2] and "\nrun1, 2 x 4 regions: " in out and "of 28 pairs interact" in out
    document = answer(f"probe run0 run1 {words} --map 2x4")
    assert [found["summary"] for found in document["models"]] == [line[6:] for line in lines[:2]]
    [comparison] = document["comparisons"]
    assert comparison["summary"] == lines[2] and len(document["models"][0]["map"]["interaction"]) == 8
    change = [found["distances"][0]["interaction"] for found in document["models"]]
    assert comparison["distances"][0]["difference"] == pytest.approx(change[1] - change[0])
    net = "wrapped.py:Net --weights run0/model.safetensors"
    tables = [
        cli(f"probe {model} {words}")[0].split("pixels\n")[1]
        for model in ("run0", net, f"{net} --output logits")
    ]
    assert tables[0] == tables[1] == tables[2]
    same = cli(f"probe run0 run0 {words}")[0].splitlines()[2]
    assert same == "run0 against run0: no difference beyond noise at 0, 4 pixels."
    for options, message, option in (
        ("--output nowhere", "no 'nowhere' in the dict that the network gives; there is other, logits", ""),
        ("--map 4", "a grid is ROWSxCOLUMNS, e.g. 4x8, found '4'", ""),
        ("--map 9x1", "at most 8 rows and 40 columns in these images, found 9 x 1", "option: --map"),
    ):  # fmt: skip
        error = cli(f"probe {net} {words} {options}", 1)[1]
        assert message in error and option in error


@pytest.mark.filterwarnings("ignore:.* times in one pass")
def test_tensors_on_disk(cli):
    """Files of zarr and HDF5 are read block by block; ranks are those of the tensor in memory."""
    h5py, zarr = pytest.importorskip("h5py"), pytest.importorskip("zarr")
    model = zoo.model_of(ModeTree.binary(4), sizes=(12, 11, 10, 9), bonds=3, std=1.0)
    x = model.to_tensor().detach().numpy()
    np.save("x.npy", x)
    zarr.create_array("x.zarr", data=x, chunks=(6, 6, 5, 5))
    with h5py.File("x.h5", "w") as file:
        file.create_dataset("u", data=x, chunks=(6, 6, 5, 5))
        file["v"] = x[0]
    commands = (f"rank {name} --memory 700kB" for name in ("x.npy", "x.zarr", "x.h5:u"))
    memory, disk, h5 = (table_rows(cli(command)[0]) for command in commands)
    assert memory == disk == h5 and len(memory) == 6
    out, _ = cli("decompose x.zarr --rtol 1e-6 --memory 700kB --out m.safetensors")
    assert re.search(r"asked 1e-06, bound \S+, reached \S+e-1\d", out), out
    assert load("m.safetensors").network.bonds[:-1] == (3,) * 6
    for words, message in (
        ("rank x.h5", "holds 2; arrays there: u, v"),
        ("rank x.zarr --missing nan", "--missing is for tensors in memory"),
        ("decompose x.zarr --memory 1kB", "does not fit into memory"),
    ):
        assert message in cli(words, 1)[1]


def test_probe_runs_code_of_the_user_alone(cli):
    """Import paths and files are run where they are typed, not where a file names or holds them."""
    code = "with open('ran', 'a') as file:\n    file.write('x')\n"
    Path("mine.py").write_text(f"{code}from tnreg.experiments.nets import SmallCNN as Net\n")
    net = build("small-cnn", 1).eval()
    os.mkdir("sent")
    safetensors.torch.save_model(net, "sent/model.safetensors")
    about = {"tnreg": "0.1.0", "experiment": "locality_run", "config": {"model": "mine:Net"}}
    Path("sent/config.json").write_text(json.dumps(about))
    tnreg.export_pt2(net, "net.pt2", example=torch.randn(2, 1, 8, 40))
    words = "--data digits:8 --pairs 2 --distances 0"
    assert "--model mine:Net" in cli(f"probe sent {words}", 1)[1]
    assert "--trust" in cli(f"probe net.pt2 {words}", 1)[1]
    assert not Path("ran").exists()
    for model in ("sent --model mine:Net", "sent --model mine.py:Net", "sent --model small-cnn"):
        assert "patches of 1x1" in cli(f"probe {model} {words}")[0]
    assert Path("ran").read_text() == "xx"
    weights = "--weights sent/model.safetensors"
    for model, message in (
        ("smal-cnn", "did you mean 'small-cnn'"),
        ("mine.py:Other", "no network 'mine.py:O"),
    ):
        error = cli(f"probe {model} {weights} {words}", 1)[1]
        assert message in error and "option:" not in error


# Names from files


NAMES = ["light [nm]", "[/x]", "[b]a[/b]", ":smiley:", "\x1b[31mred", "a\x9b31mb", "a\u202eb", "a\\nb"]


@pytest.mark.parametrize("name", NAMES)
def test_names_from_files_are_plain_text(cli, answer, tensor, name):
    """No markup of rich, no escape sequences to the terminal, whatever a tree or a file is called."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    content = {"tree": [{"name": name, "children": [0, 1]}, {"name": "b", "children": [2, 3]}]}
    content |= {"modes": [name, "x", "y", "z"], "about": name}
    Path("t.json").write_text(json.dumps(content))
    stem = name.replace("/", "")
    np.save(f"{stem}.npy", tensor.numpy())
    words = ["rank x.npy --tree t.json", "tree t.json --sizes", "decompose x.npy --tree t.json"]
    for out, err in map(cli, words):
        assert shown in out and not err
    for command, file, code in (("rank", stem, 0), ("rank", "no", 1), ("tree", "no", 1), ("plot", "no", 1)):
        found, out, err = cli.call(command, f"{file if code == 0 else file + stem}.npy")
        assert found == code and shown.replace("/", "") in out + err
        assert all(c.isprintable() or c == "\n" for c in out + err)
    assert answer("tree t.json")["modes"][0] == name
    assert all(c.isprintable() or c == "\n" for c in cli("tree t.json --json")[0])


# Errors


@pytest.mark.parametrize(("words", "message", "option"), [
    ("tree nope", "no tree named 'nope'", ""),
    ("tree hft-4", "did you mean 'htf-4'?", ""),
    ("rank covid-19", "did you mean 'covid19'?", ""),
    ("tree [[0,1]", "not nested lists", ""),
    ("tree [0,2]", "mode 1 is missing", ""),
    ("rank nope.npy", "no such tensor", ""),
    ("rank il2", "192 missing entries", "--missing nan"),
    ("rank covid19 --tree nope", "no tree named 'nope'", "--tree"),
    ("rank covid19 --tree htf-4", "3 axes and the tree 4 modes", "--tree"),
    ("rank covid19 --tree x.json", "no such tree file", "--tree"),
    ("rank covid19 --rtol 2", "rtol must be a number in [0, 1)", "--rtol"),
    ("rank covid19 --memory lots", "memory must be a number of bytes", "--memory"),
    ("rank covid19 --device warp", "cannot use the device 'warp'", "--device"),
    ("rank covid19 --figure nowhere/x.png", "there is no folder", "--figure"),
    ("decompose covid19 --rtol -1", "rtol must be a number in [0, 1)", "--rtol"),
    ("decompose covid19 --ranks 0", "needs a positive integer", "--ranks"),
    ("decompose covid19 --max-numbers 3", "is too few: with all bonds of size 1", "--max-numbers"),
    ("decompose covid19 --precision single --rtol 1e-8", "is below what single precision", "--rtol"),
    ("decompose covid19 --atol -1", "atol must be a finite number >= 0", "--atol"),
    ("decompose covid19 --out nowhere/x.safetensors", "there is no folder", "--out"),
    ("decompose covid19 --figure .", "give the path of a file", "--figure"),
    ("rank nope.npy --png x.doc", "found the suffix 'doc'", "--figure"),
    ("plot theirs --figure x", "found no suffix", "--figure"),
    ("fit covid19 --tree htf-4", "3 mode sizes for a tree over 4 modes", "--tree"),
    ("fit covid19 --observed 1", "observed must be a share", "--observed"),
    ("fit covid19 --holdout 1", "holdout must be a share", "--holdout"),
    ("fit il2", "192 NaN entries", "--missing"),
    ("fit covid19 --rank 0", "ranks must be a positive integer", "--rank"),
    ("fit covid19 --std=-1", "std must be", "--std"),
    ("fit covid19 --lr=-1 --out r", "lr must be", "--lr"),
    ("fit covid19 --steps=-1 --out r", "steps must be", "--steps"),
    ("fit covid19 --every 0 --out r", "every must be", "--every"),
    ("fit covid19 --steps 1 --out theirs", "left alone", "--out"),
    ("fit covid19 --join full --root ones", "root='ones' needs", "--root"),
    ("run dynamics --model tiny --tree [0,1]", "a tree over 2 modes", "--tree"),
    ("run dynamics --model tiny --target-tree nope", "no tree named 'nope'", "--target-tree"),
    ("run dynamics --model tiny --off-tree 0,9", "is no set of some of the mode", "--off-tree"),
    ("run dynamics --model tiny --out theirs", "left alone", "--out"),
    ("run dynamics --model tiny --device warp", "cannot use the device 'warp'", "--device"),
    ("run convac --trees htf-4 --out r", "64 pixels, the tree 'htf-4' 4 modes", "--trees"),
    ("run convac --trees nope --out r", "no tree named 'nope'", "--trees"),
    ("run init-scale --model tiny --stds", "at least one std and one seed", "--stds"),
    ("sweep dynamics --model tiny --device warp", "cannot use the device 'warp'", "--device"),
    ("export none.safetensors", "no such model file", ""),
    ("probe --data digits", "name one model or more", ""),
    ("probe small-cnn --data digits", "give --weights FILE", "--weights"),
    ("probe none.pt2 --data digits", "no such model file", ""),
    ("probe small-cnn --data digits --weights w.pt", "no such file of weights", "--weights"),
    ("probe nowhere:net --data digits:far", "needs a number of pixels", "--data"),
    ("probe small-cnn --data covid19", "images are (N, C, H, W)", "--data"),
    ("probe small-cnn --data none.npz", "none.npz", "--data"),
    ("probe . --data digits", "not a run folder of one training of locality", ""),
    ("plot nowhere", "no such trajectory file", ""),
    ("plot nowhere nowhere", "not a run folder", ""),
    ("plot", "give a run folder", ""),
    ("plot theirs --figure nowhere/x.png", "there is no folder", "--figure"),
    ("demo --device warp", "cannot use the device 'warp'", "--device"),
])  # fmt: skip
def test_errors_name_the_option(cli, words, message, option):
    """One message and exit code 1; nothing is written."""
    Path("theirs").mkdir()
    Path("theirs/letter.txt").write_text("keep")
    out, err = cli(words, 1)
    assert not out and err.startswith("tnreg: ") and message in err
    assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", err), err
    assert [path.name for path in Path().rglob("*")] == ["theirs", "letter.txt"]


@pytest.mark.parametrize(("words", "message"), [
    ("run dynamics --model nope", "nope"), ("run", "dynamics"), ("nothing", "nothing"), ("", ""),
    ("fit covid19 --optimizer x", "optimizer"),
])  # fmt: skip
def test_unknown_options(cli, words, message):
    assert message in "".join(cli(words, 2)) and not list(Path().iterdir())


@pytest.mark.parametrize(("command", "argument", "option"), [
    ("fit covid19", "tree", "--tree"), ("fit covid19", "ranks", "--rank"),
    ("fit covid19", "folder", "--out"), ("fit covid19", "figure", None), ("fit covid19", None, None),
    ("run init-scale", "std", "--stds"), ("run init-scale", "rank", None),
])  # fmt: skip
def test_the_option_that_an_error_is_about(cli, monkeypatch, command, argument, option):
    """Only options that the command has; an error that names its option stays as it is."""
    for text in ("not so", f"not so; change {option}"):
        for module in (completion, init_scale):
            error = tnreg.DataError(text, argument=argument)
            monkeypatch.setattr(module, "run", Mock(side_effect=error))
        more = f"\n  option: {option}" if option and text == "not so" else ""
        assert cli(command, 1)[1] == f"tnreg: DataError: {text}{more}\n"


def test_options_that_would_be_ignored_are_refused(cli):
    zoo.model_of(ModeTree.binary(4)).save("m.safetensors")
    net = ConvNet(ModeTree.grid((2, 2)), 3, 2, outputs=2)
    ConvAC(Representation(3, patch=(2, 2)), net).save("c.safetensors")
    Path("run").mkdir()
    about = {"tnreg": "0", "experiment": "convac", "config": {}}
    Path("run/config.json").write_text(json.dumps(about))
    for words in (
        "rank m.safetensors --missing nan", "decompose m.safetensors --randomized",
        "export c.safetensors --share", "export c.safetensors --classes", "plot run --linear",
        "plot run --names loss", "plot run run --linear",
    ):  # fmt: skip
        out, err = cli(words, 1)
        assert not out and re.search(r"--\w+", words)[0] in err


def test_a_process_count_without_a_rank_is_told(cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert "torchrun started 2 processes" in cli("tree htf-4", 1)[1]
    monkeypatch.setenv("RANK", "1")
    assert not cli("tree htf-4", 1)[1]  # the first one tells it


# JSON


def test_json_of_trainings(cli, answer, tensor):
    """The document says what the run folder says."""
    for words in ("fit x.npy --rank 2", "run dynamics --model tiny"):
        folder = words.split()[0]
        document = answer(f"{words} --steps 20 --no-progress --out {folder}")
        summary = json.loads(Path(folder, "config.json").read_text())["summary"]
        kind = {"tensor": "x.npy"} if folder == "fit" else {"experiment": "dynamics"}
        assert document == {"folder": folder, **kind, **summary}
    words = "sweep dynamics --model tiny --workers 0 --steps 20 --retries 0 --no-progress"
    document = answer(f"{words} --seed 0:2 --out s")
    assert len(document["rows"]) == len(document["computed"]) == 2 and not document["failed"]
    [means] = document["means"]
    mean = sum(row["test error"] for row in document["rows"]) / 2
    assert means["test error"] == pytest.approx(mean) and means["seeds"] == 2
    words += " --seed 0 --lr=-1 --out failing"
    document = answer(words, 1)
    [(name, error)] = document["failed"].items()
    assert "lr must be" in error and not document["rows"]
    _, err = cli(words, 1)
    assert f"{name}: " in err and "1 of 1 runs failed" in err


def test_what_others_print_does_not_come_between_the_json(answer, tmp_path, monkeypatch):
    Path("loud.py").write_text("""print("hello")
from torch import nn

class Net(nn.Sequential):
    def __init__(self, channels=1, num_classes=2):
        end = nn.Linear(4, num_classes)
        super().__init__(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), end)
""")
    monkeypatch.syspath_prepend(tmp_path)
    words = "run locality --set tiny --model loud:Net --arms plain --seeds 1 --epochs 1 --out run"
    document = answer(f"{words} --no-progress")
    assert document["experiment"] == "locality" and len(document["rows"]) >= 1


def test_json_of_convac_and_locality(answer, monkeypatch):
    """NaN becomes null."""
    cell = {"arm": "plain", "distance": 8, "test accuracy": 0.5, "deviation": math.nan, "epochs": 2,
            "seconds": 1.0, "cost": math.nan, "cost an epoch": 1.0, "images": 1.0, "seed": 1}  # fmt: skip
    summary = {"accuracy": [], "mean and spread": {}, "smaller": [], "seconds": 2.0}
    runs = Mock(return_value=summary), Mock(return_value=[cell])
    monkeypatch.setattr(convac, "run", runs[0])
    monkeypatch.setattr(locality, "run", runs[1])
    monkeypatch.setattr(locality, "table", lambda rows: rows)
    document = {"folder": "r", "experiment": "convac", **summary}
    assert answer("run convac --out r") == document
    document = answer("run locality --set tiny --out r")
    assert document["means"] == [{**cell, "deviation": None, "cost": None}] and document["paired"] == []
    assert [run.call_args.kwargs for run in runs] == [{"progress": False}] * 2  # no terminal here


def test_plain_values():
    value = {(0, 1): np.float32(0.5), "a": [math.nan, -math.inf, torch.tensor([1, 2])], 3: {2, 1},
             "b": (True, None, Path("x")), "c": np.array([math.nan])}  # fmt: skip
    assert plain(value) == {
        "(0, 1)": 0.5, "a": [None, None, [1, 2]], "3": [1, 2], "b": [True, None, "x"], "c": [None]
    }  # fmt: skip


# Help, progress, completion


@pytest.mark.parametrize(
    "command",
    "tree,rank,decompose,fit,export,probe,plot,demo,run,sweep,doctor,run dynamics,run init-scale,"
    "run convac,run locality".split(","),
)
def test_every_option_is_explained(cli, command):
    lines = [line.strip("│ ") for line in cli(f"{command} --help")[0].splitlines()]
    options = [i for i, line in enumerate(lines) if re.match(r"--[a-z]", line)]
    assert options and all("(default:" in " ".join(lines[i : i + 8]) for i in options)
    assert all(len(" ".join(lines[i : i + 2]).split()) > 3 for i in options)
    assert "{None}" not in "".join(lines) and "As above" not in "".join(lines)


def test_the_list_of_commands(cli):
    """Its lines are those of the commands; it, drawings and what is no command are shown without torch."""
    out = " ".join(re.sub("[│\\n]", " ", cli("--help")[0]).split())
    for name, (file, about) in COMMANDS.items():
        module = importlib.import_module(f"tnreg.cli.{file}")
        command = getattr(module, name, None) or getattr(module, f"make_{name}")("", "")
        assert inspect.getdoc(command).splitlines()[0] == about and f"• {name} {about}" in out
    assert "did you mean 'decompose'?" in cli("decompse x.npy", 2)[1]
    assert cli("--version")[0] == f"tnreg {tnreg.__version__}\n"
    script = (
        "import sys; from tnreg.cli import main\ntry: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'matplotlib', 'scipy'} & set(sys.modules)"
    )
    for words in ("--version", "tree list", "tree quad-4x4 --json", "tree [[0,1],2]"):
        subprocess.run([sys.executable, "-c", script, *words.split()], check=True, capture_output=True)


def test_work_shows_a_line_on_a_terminal_only(cli, tensor, monkeypatch):
    out, err = cli("decompose x.npy")
    assert not err and "..." not in out and not Reply().shows(True)
    terminal = screen(monkeypatch)
    zoo.model_of(ModeTree.binary(2), sizes=(3, 3)).save("m.safetensors")
    torch.save(build("small-cnn", 1).state_dict(), "w.pt")
    np.save("p.npy", np.random.default_rng(0).random((9, 1, 8, 16)).astype("float32"))
    for words, line in (
        ("rank x.npy --json", "singular values ..."),
        ("decompose x.npy", "decomposing ..."),
        ("export m.safetensors --format state", "writing state ..."),
        ("probe small-cnn --data p.npy --weights w.pt --pairs 1", "pairs of patches"),
        ("tree htf-4 --figure t.png", "drawing ..."),
        ("doctor --json", "looking at packages"),
        ("fit x.npy --steps 5 --out r", "5/5"),
        ("plot r", "drawing ..."),
        ("demo --steps 30 --out d", "30/30"),
    ):
        terminal.truncate(0)
        out, _ = cli(words)
        assert line in terminal.getvalue() and line not in out, words
        if words.endswith("--json"):
            json.loads(out)
    assert Reply().shows(True) and not Reply().shows(False)  # --no-progress


def test_completion(cli, monkeypatch):
    for shell in ("zsh", "bash"):
        script, _ = cli(f"--tyro-print-completion {shell}")
        for word in ("--rtol", "--memory", "decompose", "init-scale", "doctor"):
            assert word in script
    # complete -F FUNCTION tnreg; asked for what may follow "tnreg rank x.npy --r"
    Path("script").write_text(f"""{script}
        f=$(complete -p tnreg | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        COMP_WORDS=(tnreg rank x.npy --r); COMP_CWORD=3; COMP_LINE='tnreg rank x.npy --r'
        COMP_POINT=20; COMPREPLY=(); $f; echo ${{COMPREPLY[@]}}""")
    done = subprocess.run(["bash", "script"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--rtol"]
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install shtab" in cli("--tyro-print-completion tcsh", 1)[1]
