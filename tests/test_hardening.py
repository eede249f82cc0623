"""Two processes at one path, full disks, folders that cannot be written, and the same result every time."""

import contextlib
import hashlib
import json
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from command import start, wait

import tnreg
from tnreg import ConvAC, ConvNet, Factorization, ModeTree, Representation, Trajectory, fit, images
from tnreg.errors import FileError, OptionError
from tnreg.experiments import sweep
from tnreg.experiments.completion import Config, completion
from tnreg.experiments.folder import RUN_FILES, read_run, write_run
from tnreg.machine.files import folder_written_whole
from tnreg.training.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

# What is saved comes in versions: everything in version 3 says 3, and large versions make larger files.


def model_of(version):
    model = Factorization(ModeTree.binary(4), 5 + version, 3)
    model.load_weights({v: torch.full_like(w, version) for v, w in model.weights.items()})
    return model


def run_of(version):
    run = Trajectory()
    for step in range(40 * version):
        run.append(step, {"loss": float(version), "noise": torch.rand(8, dtype=torch.float64)})
    run.stop_reason = "steps"
    return run


def set_of(version):
    pixels = np.full((50 * version, 1, 8, 8), version, np.uint8)
    labels = np.full(50 * version, version)
    return images.ImageSet(pixels, labels, (), np.empty(0), {"set": "pairs", "version": version})


def checkpoint_of(path):
    module = torch.nn.Linear(20, 20)
    optimizer = torch.optim.SGD(model_of(1).parameters(), lr=1.0)
    return module, Checkpoint(path, module, optimizer, {"version": 0})


def write_folder(path, version):
    settings, run, model = Config(seed=version), run_of(version), model_of(version)
    with folder_written_whole(path, "completion", RUN_FILES) as partial:
        write_run(partial, "completion", settings, run, model, {"v": version})


def write_training(path, version):
    module, checkpoint = checkpoint_of(path)
    torch.nn.init.constant_(module.weight, version)
    checkpoint.write(run_of(version))


# The versions that a reader sees in a file.


def read_model(path):
    model = tnreg.load(path)
    return {model.sizes[0] - 5, *(int(x) for w in model.weights.values() for x in w.unique())}


def read_set(path):
    pairs = images.load(path)
    return {pairs.config["version"], *pairs.labels.tolist(), *np.unique(pairs.images).tolist()}


def read_training(path):
    module, checkpoint = checkpoint_of(path)
    run = checkpoint.read()
    return {int(run["loss"][0]), len(run) // 40, *module.weight.detach().unique().tolist()}


def read_folder(path):
    run, steps = read_run(path), read_run(path).trajectory
    return {run.config["seed"], run.summary["v"], *steps["loss"].tolist(), len(steps) // 40}


KINDS = {  # name: (write a version, read the versions)
    "model": (lambda path, v: model_of(v).save(path), read_model),
    "trajectory": (lambda path, v: run_of(v).save(path), lambda path: {*Trajectory.load(path)["loss"]}),
    "images": (lambda path, v: set_of(v).save(path), read_set),
    "tree": (lambda path, v: ModeTree.star(v).save(path), lambda path: {tnreg.load_tree(path).order}),
    "checkpoint": (write_training, read_training),
    "run": (write_folder, read_folder),
}
FILES = [kind for kind in KINDS if kind != "run"]


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Several processes


def save_again_and_again(place, version):
    """Save all kinds of files eight times, once both processes are there."""
    (place.parent / f"ready-{version}").touch()
    wait(lambda: len(list(place.parent.glob("ready-*"))) == 2)
    for _ in range(8):
        for kind in FILES:
            KINDS[kind][0](place / f"{kind}.json", version)


def test_two_processes_save_to_one_path(tmp_path):
    """One of the two files is there whole in the end, nothing else is left, and nobody ever saw a half."""
    place = tmp_path / "place"
    place.mkdir()
    code = "import sys, pathlib, test_hardening as t\n"
    code += "t.save_again_and_again(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    both = [start(code, place, version) for version in (2, 3)]
    seen = dict.fromkeys(FILES, 0)
    try:
        while any(process.poll() is None for process in both):
            for kind in FILES:
                path = place / f"{kind}.json"
                if path.exists():
                    assert KINDS[kind][1](path) in ({2}, {3}), kind
                    seen[kind] += 1
    finally:
        for process in both:
            process.kill()
        errors = [process.communicate()[1] for process in both]
    assert errors == ["", ""] and [process.returncode for process in both] == [0, 0]
    assert set(os.listdir(place)) == {f"{kind}.json" for kind in FILES} and all(seen.values())
    for kind in FILES:
        assert KINDS[kind][1](place / f"{kind}.json") in ({2}, {3})


def test_errors_of_other_processes_keep_their_argument():
    error = pickle.loads(pickle.dumps(OptionError("not so", argument="rtol")))
    assert (type(error), str(error), error.argument) == (OptionError, "not so", "rtol")


# Full disks


@contextlib.contextmanager
def disk_of(size):
    """No file of this process gets larger than so many bytes; writing beyond is an ``OSError``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Exception ignored in. <function ZipFile")  # by savez of numpy 1
def test_full_disk(kind, share, tmp_path):
    write, read = KINDS[kind]
    path = tmp_path / "path"
    write(path, 3)
    written = contents(tmp_path)
    size = int(share * max(map(len, written.values())))
    write(path, 2)
    before = contents(tmp_path)
    with pytest.raises(FileError, match=f"cannot write {path}(.|\n)*(File too large|os error 27)"):
        with disk_of(min(size, max(map(len, before.values())) - 1)):
            write(path, 3)
    assert contents(tmp_path) == before and read(path) == {2}
    path.rename(tmp_path / "other")
    with pytest.raises(FileError, match="cannot write"), disk_of(3):
        write(path, 3)
    assert os.listdir(tmp_path) == ["other"]


def test_full_disk_in_an_export(tmp_path):
    """Given a path, torch's own writer of programs would end the process."""
    path, net = tmp_path / "net.pt2", tnreg.to_cnn(model_of(1))
    with pytest.raises(FileError, match=f"cannot write {path}: File too large"), disk_of(1000):
        tnreg.export_pt2(net, path)
    assert os.listdir(tmp_path) == []


def test_full_disk_in_a_training(tmp_path):
    """The error comes out of ``fit``; the checkpoint before is whole and the training goes on from it."""
    task = completion(model_of(1), 20)
    start = {v: torch.rand(w.shape) for v, w in model_of(1).weights.items()}

    def train(watch=lambda m: 0.0):
        model = model_of(1)
        model.load_weights(start)
        return fit(model, task.loss, steps=10, every=2, progress=False, observe={"w": watch},
                   checkpoint=tmp_path / "c", checkpoint_seconds=0)  # fmt: skip

    calls = iter(range(3))

    def watch(model):
        if next(calls) == 2:
            stack.enter_context(disk_of(100))
        return 0.0

    with contextlib.ExitStack() as stack, pytest.raises(FileError, match="File too large"):
        train(watch)
    assert os.listdir(tmp_path) == ["c"]
    run = train()
    (tmp_path / "c").unlink()
    assert run.steps.tolist() == [0, 2, 4, 6, 8, 10]
    assert np.array_equal(run["loss"], train()["loss"])


@pytest.mark.parametrize("kind", KINDS)
def test_folders_that_cannot_be_written(kind, tmp_path):
    """Permission bits do not bind an administrator; ``/proc`` and a file do."""
    write, _ = KINDS[kind]
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", Path("/proc")):
        if folder.exists():
            with pytest.raises(FileError, match="cannot write|Not a directory"):
                write(folder / "path", 2)
    assert contents(tmp_path) == {"file": b"x"}


# The same result every time


def draw(settings, folder, checkpoint):
    return {"x": float(torch.rand((), generator=zoo.random(settings["seed"])))}


def randomized(seed):
    return tnreg.decompose(zoo.randn(70, 70, 70), ModeTree.star(3), ranks=2, randomized=True, seed=seed)


def results(folder):
    """What one seed gives, by name: tensors that are compared bit by bit."""
    tree, generator = ModeTree.binary(4), zoo.random(5)
    model = Factorization(tree, (6, 7, 8, 9), 12, generator=generator)
    target = Factorization(tree, (6, 7, 8, 9), 3, std=1.0, generator=generator).to_tensor().detach()
    found = {"init": [*model.weights.values()]}
    task = completion(target, 0.3, seed=2)
    found["completion"] = [task.index, task.values]
    run = fit(model, task.loss, steps=60, every=20, progress=False)
    found["fit"] = [torch.from_numpy(run["loss"]), *model.weights.values()]
    found["hsvd"] = [*tnreg.decompose(target, tree, ranks=2).weights.values()]
    found["randomized"] = [*randomized(seed=0).weights.values()]
    found["truncate"] = [*tnreg.truncate(model, ranks=2).weights.values()]
    shown = images.pathfinder(6, length=3, size=32, seed=1, workers=1)
    found["images"] = [torch.from_numpy(shown.images), torch.from_numpy(shown.labels)]
    torch.manual_seed(3)
    net = ConvAC(Representation(4), ConvNet(ModeTree.grid((4, 4)), 4, 8, outputs=2))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x, y = torch.rand(32, 1, 4, 4), torch.arange(32) % 2
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    found["classifier"] = [*net.parameters()]
    undrawn = sweep.Experiment(draw, figure=lambda folder: None)
    done = sweep.run(undrawn, [{"seed": 1}, {"seed": 2}], folder, workers=0, progress=False)
    found["sweep"] = [torch.tensor([row["x"] for row in done.rows])]
    return {name: [t.detach().cpu().contiguous() for t in parts] for name, parts in found.items()}


def digest(parts):
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def print_digests(folder):
    print(json.dumps({name: digest(parts) for name, parts in results(folder).items()}))


def test_the_same_bits_in_this_and_in_a_fresh_process(tmp_path):
    """One thread: bit for bit. Two: small work as well, a classifier to rounding."""
    code = "import sys, pathlib, test_hardening as t\n"
    code += "t.torch.set_num_threads(1); t.print_digests(pathlib.Path(sys.argv[1]))"
    fresh = start(code, tmp_path / "fresh", stdout=-1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(tmp_path / "one")
        torch.set_num_threads(2)
        two = results(tmp_path / "two")
    finally:
        torch.set_num_threads(threads)
        said = fresh.communicate()[0]
    assert json.loads(said) == {name: digest(parts) for name, parts in one.items()}
    for name, parts in one.items():
        for part, other in zip(parts, two[name], strict=True):
            if name in ("init", "completion", "images", "sweep"):  # drawn, not computed
                assert torch.equal(part, other), name
            else:
                torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-6)


def test_another_seed_gives_something_else():
    """What was compared above hangs on the seed; for tasks and images their own tests say so."""
    for make in (lambda seed: zoo.model_of(ModeTree.binary(4), seed=seed), randomized):
        assert not torch.equal(make(1).weights[0], make(2).weights[0])
