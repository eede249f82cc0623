"""Whatever comes in, a valid object comes out or an error of tnreg: no other exception, no hang."""

import contextlib
import copy
import io
import json
import os
import pickle
import tempfile
import zipfile
from functools import cache, partial
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import safetensors.torch
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import Bomb, refuses

import tnreg
from tnreg import ConvAC, FileError, ModeTree, TnregError, Trajectory, TreeError, images
from tnreg.cli import main
from tnreg.experiments.folder import experiment_of, read_about, read_run, write_about
from tnreg.experiments.locality import state as locality_state
from tnreg.machine.files import seal, unseal
from tnreg.training.checkpoint import Checkpoint
from tnreg.trees.tree import read_tree

pytestmark = pytest.mark.slow

quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def accepts(strategy, check, examples, refused=TreeError):
    """Run the check on drawn inputs: some are accepted, some refused, and nothing else happens."""
    outcomes = set()

    @given(strategy)
    @settings(quick, max_examples=examples)
    def draw(data):
        try:
            check(data)
            outcomes.add("accepted")
        except refused:
            outcomes.add("refused")

    draw()
    assert outcomes == {"accepted", "refused"}


# Trees


odd = (np.array([0, 1]), np.int64(1), int, {0}, {"a": 1}, torch.tensor([0, 1]), None)
words = st.integers(-2, 5) | st.integers() | st.booleans() | st.floats() | st.text(max_size=3)
words |= st.sampled_from(odd)
names = st.integers(-1, 4) | st.text("ab", max_size=1) | st.tuples(st.integers(0, 2)) | st.just(int)
stars = st.integers(1, 5).flatmap(lambda order: st.permutations(range(order)))


def test_any_nested_data():
    def check(data):
        tree = ModeTree(data)
        assert tree.leaves == tuple(range(tree.order))
        assert len(tree.text().splitlines()) == len(tree.nodes)

    sequences = lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner)  # noqa: E731
    accepts(st.recursive(words, sequences, max_leaves=12) | stars, check, 100)


def test_any_graph():
    def check(graph):
        tree = ModeTree(graph)
        assert set(tree.nodes) == set(graph) and tree.order + len(tree.interior) == len(graph)

    edges = st.lists(st.tuples(names, names), max_size=8)
    edges |= stars.map(lambda modes: [("top", mode) for mode in modes])
    kinds = st.sampled_from([nx.DiGraph, nx.MultiDiGraph, nx.Graph])
    accepts(st.builds(lambda kind, edges: kind(edges), kinds, edges), check, 100)


def chained(inner, times, wrap=lambda x: [x]):
    for _ in range(times):
        inner = wrap(inner)
    return inner


test_nested_data_that_crashed_or_hung = refuses([
    (chained(0, 10_000), "more than 400 nodes with one child in a row"),
    (chained([], 10_000), "interior node without children"),
    (chained(["a", 0], 10_000), "leaf 'a' is not a mode number"),
    (chained({}, 10_000, lambda x: {"a": x}), "not a mode tree: <dict>"),
    ([chained({}, 10_000, lambda x: {"a": x}), 0], "leaf <dict> is not a mode number"),
    (chained(["a"], 60, lambda x: [x, x]), "leaf 'a' is not a mode number"),  # 2**60 leaves
    (chained([0], 60, lambda x: [x, x]), "mode 0 appears twice"),
    ([np.array([0, 1]), 2], r"leaf array\(\[0, 1\]\) is not a mode number"),
    ([torch.tensor([0.5]), 0], r"leaf tensor\(\[0.5000\]\) is not a mode number"),
    ([int, 0], "leaf <class 'int'> is not a mode number"),
], by=ModeTree, error=TreeError)  # fmt: skip


def test_ten_thousand_levels_in_a_graph():
    graph = nx.path_graph([*(f"node {i}" for i in range(10_000)), 0], create_using=nx.DiGraph)
    tree = ModeTree(graph)
    assert tree.heights[-1] == 10_000 and tree.modes_below("node 0") == (0,)
    deep = nx.DiGraph([(chained(("x",), 2_000, lambda x: (x,)), 0)])
    with pytest.raises(TreeError, match="a name that a file cannot hold"):
        ModeTree(deep).save("never-written.json")


@pytest.mark.parametrize("text", [
    "[" * 10_000 + "0" + "]" * 10_000,
    '{"tree":' * 10_000 + "0" + "}" * 10_000,
    json.dumps({"tree": chained(0, 900)}),
    json.dumps({"tree": {"links": [0, *([i, i] for i in range(60))]}}),  # 2**60 leaves
    '{"tree": {"links": [0, 1, [0, 0, 1]]}}',  # was read as [0, 1]
    '{"tree": {"links": [[1], [0]]}}',
    '{"tree": {"links": [0, 1, [-2, -3]]}}',
    '{"tree": {"links": [0, 1, [0], [1], [2, 3]], "names": {"2": "a", "3": "a"}}}',
    '{"tree": {"links": [0, 1, [0, 1]], "names": {"2": {"a": 1}}}}',
    '{"tree": [0, 1], "shape": [1e400, 2]}',
    '{"tree": [0, ' + "9" * 5_000 + "]}",
    "[true, 0]",
], ids=lambda text: text[:40])  # fmt: skip
def test_tree_files_that_are_none(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    message = "not a (readable JSON |mode )?tree|shape must be"
    with pytest.raises((TreeError, FileError), match=message):
        tnreg.load_tree(tmp_path / "t.json")
    if text.startswith("["):
        with pytest.raises(TreeError):
            read_tree(text)


# Files: valid ones, and what becomes of them. Text and arrays inside an archive are replaced as well, so
# that mutations get past its checksums.


def model_of():
    return zoo.model_of(ModeTree.binary(3), sizes=(2, 3, 2), bonds=2, dtype=torch.float32)


VALUES, SETTINGS, RUN = np.arange(6.0).reshape(2, 3), {"seed": 1}, Trajectory()
for step in (0, 5):
    RUN.append(step, {"loss": 1.0, "components": {(0, 1): torch.ones(2)}})
RUN.stop_reason = "steps"
TENSORS, TREE = {"x": torch.from_numpy(VALUES)}, ModeTree.chain(4)
BOXES = ((0, 0, 2, 2), (0, 2, 2, 4))
PAIRS = images.ImageSet(
    np.zeros((2, 1, 4, 4), np.uint8), np.array([0, 1]), BOXES, np.empty(0), {"set": "pairs"}
)
CLASSIFIER = ConvAC(tnreg.Representation(2), tnreg.ConvNet(ModeTree.grid((2, 2)), 2, 2, outputs=3))


def in_memory(write):
    raw = io.BytesIO()
    write(raw)
    return raw.getvalue()


def training(path):
    model = model_of()
    return Checkpoint(path, model, torch.optim.Adam(model.parameters()), SETTINGS)


def write_training(path):
    saved = training(path)
    saved.model.norm().backward()
    saved.optimizer.step()
    saved.write(RUN)


def read_training(path):
    saved = training(path)
    before = copy.deepcopy(saved.model.state_dict())
    try:
        run = saved.read()
    except TnregError:
        assert all(torch.equal(p, before[name]) for name, p in saved.model.state_dict().items())
        raise
    assert len(run)
    return run.to_bytes()


def write_locality(path):
    run = torch.frombuffer(bytearray(RUN.to_bytes()), dtype=torch.uint8)
    about = json.dumps(SETTINGS)
    torch.save({"format": locality_state.FORMAT, "about": about, "found": run}, path)


def write_run_folder(path):
    path.mkdir(exist_ok=True)
    RUN.save(path / "trajectory.npz")
    about = {"tnreg": "0", "experiment": "completion", "config": {"a": 1}, "summary": {}}
    (path / "config.json").write_text(json.dumps(about))


def write_hdf5(path):
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("g/x", data=VALUES, chunks=(1, 3))


def read_trajectory(path):
    run = Trajectory.load(path)
    for name in run if len(run) else ():
        parts = run[name].values() if isinstance(run[name], dict) else [run[name]]
        assert {len(part) for part in parts} <= {len(run)}
    return run.to_bytes()


def description(pairs):
    assert repr(pairs).startswith("<") and len(pairs.images) == len(pairs)
    return repr((pairs.images.tolist(), pairs.labels.tolist(), pairs.boxes))


def read_values(path):
    return tnreg.load_tensor(path).values


NUMBERS = "not a readable .* file of numbers"
KINDS = {  # name of the file: (write it, read it, what was written, what is said of something else)
    "model.safetensors": (
        lambda path: model_of().save(path), lambda path: tnreg.load(path).to_tensor().detach(),
        model_of().to_tensor().detach(), "not a safetensors file",
    ),
    "convac.safetensors": (
        CLASSIFIER.save, lambda path: repr(ConvAC.load(path)), repr(CLASSIFIER),
        "not a classifier: .*\n.*\n  expected: a safetensors file",
    ),
    "run.npz": (RUN.save, read_trajectory, RUN.to_bytes(), "not a trajectory file"),
    "images.npz": (
        PAIRS.save, lambda path: description(images.load(path)), description(PAIRS), "not an image set: ",
    ),
    "x.npy": (partial(np.save, arr=VALUES), read_values, VALUES, NUMBERS),
    "x.npz": (partial(np.savez, x=VALUES), read_values, VALUES, NUMBERS),
    "x.safetensors": (partial(safetensors.torch.save_file, TENSORS), read_values, VALUES, NUMBERS),
    "x.pt": (partial(torch.save, TENSORS), read_values, VALUES, NUMBERS),
    "open.npy": (partial(np.save, arr=VALUES), tnreg.open_tensor, VALUES, "not a readable"),
    "open.h5": (write_hdf5, tnreg.open_tensor, VALUES, "not a readable"),
    "tree.json": (TREE.save, tnreg.load_tree, TREE, "not a readable JSON tree file"),
    "fit.checkpoint": (write_training, read_training, RUN.to_bytes(), "not a checkpoint: (.|\n)*delete"),
    "locality.checkpoint": (
        write_locality, lambda path: locality_state.read_state(path, SETTINGS)["about"],
        json.dumps(SETTINGS), "not a checkpoint",
    ),
}  # fmt: skip


@cache
def valid(kind):
    """Return the bytes of a valid file, which is read as what was written."""
    if kind.startswith("open"):
        pytest.importorskip("h5py")
    write, read, written, _ = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / kind
        write(path)
        assert np.array_equal(np.asarray(read(path)), np.asarray(written))
        return path.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_something_else(kind, tmp_path):
    """Nothing, noise, part of a file, objects that would run code: told by name, and no code runs."""
    path, whole, bomb = tmp_path / kind, valid(kind), pickle.dumps(Bomb(tmp_path / "made"))
    for content in (b"", os.urandom(2000), whole[:9], whole[: len(whole) // 2], bomb):
        path.write_bytes(content)
        with pytest.raises(FileError, match=KINDS[kind][3]):
            KINDS[kind][1](path)
    assert not (tmp_path / "made").exists()


def assert_read_or_refused(kind, folder, data):
    """Bytes as a file of this kind are read, or refused by an error of tnreg that names the file."""
    path = folder / kind
    path.write_bytes(data)
    try:
        KINDS[kind][1](path)
    except TnregError as error:
        assert path.name in str(error), str(error)
    assert path.read_bytes() == data  # reading changes nothing


def mutated(data, draw):
    """Cut, overwritten, repeated or taken out."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        part = draw(st.binary(max_size=8))
        end = at + draw(st.sampled_from([0, 1, len(part), 40]))
        data[at:end] = draw(st.sampled_from([part, part * 9, bytes(data[at:end]) * 2]))
    return bytes(data[: draw(st.sampled_from([len(data), len(data) // 2]))])


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@quick
def test_any_bytes_and_mutated_files(kind, tmp_path, data):
    assert_read_or_refused(kind, tmp_path, mutated(valid(kind), data.draw))
    assert_read_or_refused(kind, tmp_path, data.draw(st.binary(max_size=200)))


@pytest.mark.parametrize(("kind", "numbers"), [
    ("model.safetensors", lambda path: list(tnreg.load(path).state_dict().values())),
    ("convac.safetensors", lambda path: list(ConvAC.load(path).state_dict().values())),
    ("tree.json", lambda path: [torch.tensor([hash(tnreg.load_tree(path))])]),
    ("run.npz", lambda path: list(map(torch.from_numpy, {**Trajectory.load(path)["components"]}.values()))),
])  # fmt: skip
def test_damaged_files_are_refused(kind, numbers, tmp_path):
    """Flipped bytes: an error of tnreg, or what was written to the last bit."""
    path, random, refused = tmp_path / kind, np.random.default_rng(0), 0
    path.write_bytes(valid(kind))
    expected = numbers(path)
    for trial in range(200):
        data = np.frombuffer(valid(kind), np.uint8).copy()
        places = random.choice(len(data), 1 + trial % 3, replace=False)
        data[places] ^= random.integers(1, 256, len(places), dtype=np.uint8)
        path.write_bytes(data.tobytes())
        try:
            assert all(map(torch.equal, numbers(path), expected)), data.tobytes()
        except TnregError:
            refused += 1
    assert refused > 150


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 2**70), st.floats(), st.text(max_size=4),
              st.sampled_from(["diagonal", "full", "leaf", "complex32", "float16", "int64", "save"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def replaced(value, draw):
    """Return a JSON value with one value in it replaced by another one, or a key left out."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 4)):
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: replaced(value[key], draw)}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], replaced(value[at], draw), *value[at + 1 :]]
    return draw(json_values)


def with_header(data, change):
    """Return a safetensors file with other metadata."""
    end = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:end])
    tensors = safetensors.torch.load(data)
    about = unseal(head["__metadata__"], tensors)
    about = {key: json.dumps(change(json.loads(text))) for key, text in about.items()}
    head["__metadata__"] = seal(about, tensors)
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def with_member(data, name, change):
    """Return a zip archive with one member changed."""
    old = zipfile.ZipFile(io.BytesIO(data))

    def write(raw):
        with zipfile.ZipFile(raw, "w") as new:
            for member in old.namelist():
                content = old.read(member)
                new.writestr(member, change(content) if member.endswith(name) else content)

    return in_memory(write)


def with_about(data, change):
    """Return an .npz file with another description, an array of one string that holds JSON."""
    about = json.dumps(change(json.loads(str(np.load(io.BytesIO(data))["about"]))))
    return with_member(data, "about.npy", lambda _: in_memory(lambda raw: np.save(raw, about)))


@pytest.mark.parametrize("kind", list(KINDS)[:4])
@given(st.data())
@settings(quick, max_examples=60)
def test_other_descriptions_in_valid_files(kind, tmp_path, data):
    change = with_about if kind.endswith("npz") else with_header
    other = change(valid(kind), lambda about: replaced(about, data.draw))
    assert_read_or_refused(kind, tmp_path, other)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("x.pt", "data.pkl"), ("fit.checkpoint", "data.pkl"), ("locality.checkpoint", "data.pkl"),
     ("run.npz", "loss.npy"), ("run.npz", "steps.npy"), ("images.npz", "boxes.npy"),
     ("images.npz", "labels.npy"), ("x.npz", "x.npy")],
)  # fmt: skip
@given(st.data())
@quick
def test_other_parts_in_valid_archives(kind, name, tmp_path, data):
    other = with_member(valid(kind), name, lambda content: mutated(content, data.draw))
    assert_read_or_refused(kind, tmp_path, other)


def test_run_folders(tmp_path):
    folder = tmp_path / "run"

    def check(data):
        write_run_folder(folder)
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(replaced(about, data.draw)))
        assert isinstance(experiment_of(folder), str)
        run = read_run(folder)
        assert isinstance(run.config, dict) and isinstance(run.summary, dict)

    accepts(st.data(), check, 60, TnregError)


def test_damaged_descriptions_of_runs_are_refused(tmp_path):
    write_about(tmp_path, "completion", config={"a": (0.25, 1)}, summary={"loss": float("nan"), "b": [1, 2]})
    path, about = tmp_path / "config.json", read_about(tmp_path)
    assert about["config"] == {"a": [0.25, 1]} and "crc32" not in about
    path.write_text(path.read_text().replace("0.25", "0.35"))
    with pytest.raises(FileError, match="damaged"):
        read_about(tmp_path)


def test_a_zarr_folder_with_other_descriptions(tmp_path):
    zarr, path = pytest.importorskip("zarr"), tmp_path / "x.zarr"
    zarr.create_array(store=str(path), data=VALUES, chunks=(1, 3))
    assert tnreg.open_tensor(path).shape == (2, 3)
    text = (path / "zarr.json").read_text()
    empty_blocks = json.loads(text)
    empty_blocks["chunk_grid"]["configuration"]["chunk_shape"] = [0, 3]
    for changed in ("", "{}", "[" * 10_000, text[:-9], text.replace("float64", "float65"),
                    text.replace('"shape": [', '"shape": [-'), text.replace("regular", "odd"),
                    json.dumps(empty_blocks)):  # fmt: skip
        (path / "zarr.json").write_text(changed)
        with pytest.raises(TnregError):
            tnreg.open_tensor(path)


def test_descriptions_that_crashed(tmp_path):
    for text in ("[" * 10_000, '{"experiment": "x", "config": 3, "summary": {}}', "null", "\udcff"):
        write_run_folder(tmp_path / "run")
        (tmp_path / "run" / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(FileError, match="not a run folder"):
            read_run(tmp_path / "run")
    path = tmp_path / "run.npz"
    short = in_memory(lambda raw: np.save(raw, np.ones(3)))
    path.write_bytes(with_member(valid("run.npz"), "loss.npy", lambda content: short))
    with pytest.raises(FileError, match="3 rows of 'loss' for 2 steps"):
        Trajectory.load(path)
    path.write_bytes(with_about(valid("images.npz"), lambda about: {**about, "config": 3}))
    with pytest.raises(FileError, match="its config is a int, not an object"):
        images.load(path)


@pytest.mark.parametrize("key", ["sizes", "bonds", "dtype"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, once, about complex32
def test_a_small_file_asks_for_no_large_model(tmp_path, key):
    """Weights of a terabyte, by the description of a file of a kilobyte, or of a dtype of another kind."""
    large = {"sizes": [10**6] * 3, "bonds": [10**6] * 5, "dtype": "complex32"}[key]
    for read, kind, message in (
        (tnreg.load, "model.safetensors", r"weight\.\d has another shape or dtype: .* expected .*"),
        (ConvAC.load, "convac.safetensors", "not a classifier: .*/m"),
    ):
        (tmp_path / "m").write_bytes(with_header(valid(kind), lambda about: {**about, key: large}))
        with pytest.raises(FileError, match=message):
            read(tmp_path / "m")


@pytest.mark.parametrize(("part", "broken"), [
    ("optimizer", {"state": {}, "param_groups": []}),
    ("random", [[torch.zeros(3, dtype=torch.uint8)], []]),
    ("run", torch.frombuffer(bytearray(Trajectory().to_bytes()), dtype=torch.uint8)),
    ("model", {"stacks.0": 3}),
])  # fmt: skip
def test_a_checkpoint_that_is_half_right_changes_nothing(tmp_path, part, broken):
    state = torch.load(io.BytesIO(valid("fit.checkpoint")), weights_only=True)
    torch.save({**state, part: broken}, tmp_path / "c")
    with pytest.raises(FileError, match="not a checkpoint: (.|\n)*delete"):
        read_training(tmp_path / "c")


@pytest.mark.parametrize("name", ["a" * 5_000, "a\0b", "\ud800"], ids=["long", "null", "surrogate"])
def test_names_that_no_file_can_have(name):
    pytest.importorskip("h5py")
    for ending, readers in {
        "": (tnreg.load, ConvAC.load, tnreg.load_tree, read_run),
        ".json": (tnreg.load_tree,),
        ".npz": (Trajectory.load, images.load),
        ".npy": (tnreg.load_tensor, tnreg.open_tensor),
    }.items():
        for read in readers:
            with pytest.raises(FileError):
                read(name + ending)
    for save in (model_of().save, RUN.save, PAIRS.save, ModeTree.star(2).save):
        with pytest.raises(FileError, match="cannot write"):
            save(name)


# Arguments


arguments = st.lists(
    st.sampled_from(
        ["tree", "rank", "export", "probe", "plot", "htf-4", "list", "[[0,2],[1,3]]", "[", "[[0,0]]",
         "x.npy", "nothing", "--tree", "--rtol", "--figure", "--ascii", "--sizes", "--format", "--out",
         "--key", "-1", "1e999", "nan", "", "--", "-h", "il2-4", "x.npy:y", "/", "é", "\0"]
    ) | st.text(max_size=4),
    max_size=5,
)  # fmt: skip


def test_any_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(Path("x.npy"), np.ones((2, 2, 2, 2)))

    def check(words):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                main(words)
            except SystemExit as stop:
                assert stop.code in (None, 0, 1, 2)
                if stop.code:
                    raise

    accepts(arguments | st.just(["tree", "htf-4"]), check, 20, SystemExit)
