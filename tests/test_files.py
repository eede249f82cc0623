"""Files and folders appear whole or not at all, also when the process dies."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command import start, wait

import tnreg
from tnreg import DataError, Factorization, FileError, ModeTree
from tnreg.machine.files import folder_written_whole, write_whole

pytestmark = pytest.mark.slow


def test_write_whole(tmp_path):
    target = tmp_path / "a.txt"
    mask = os.umask(0o027)
    try:
        write_whole(target, lambda partial: partial.write_text("one"))
        Factorization(ModeTree.star(2), 3, 2).save(tmp_path / "m.st")
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}

    def die(partial):
        partial.write_text("tw")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_whole(target, die)
    assert target.read_text() == "one" and set(os.listdir(tmp_path)) == {"a.txt", "m.st"}


def test_paths_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Factorization(ModeTree.star(2), 3, 2)
    for path, message in {
        "": "the path is empty", ".": "cannot write", "no/m.st": "there is no folder",
        "a\0b": "no file can have that name",
    }.items():  # fmt: skip
        with pytest.raises(FileError, match=message):
            model.save(path)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(float("nan"))
    with pytest.raises(DataError, match="not saved: the weights of 3 nodes are NaN or infinite"):
        model.save("m.st")
    assert not list(tmp_path.iterdir())


FILES = ("config.json", "picture.png")


def run_folder(target):
    return folder_written_whole(target, "study", FILES)


def test_folder_written_whole(tmp_path):
    target = tmp_path / "run"
    with run_folder(target) as partial:
        (partial / "config.json").write_text(json.dumps({"tnreg": "0", "experiment": "study"}))
        assert not target.exists()
    full = OSError(errno.ENOSPC, "No space left on device")
    other, none = (ConnectionError(), ConnectionError), (None, FileError)
    for error, kind in ((RuntimeError(), RuntimeError), other, (full, FileError), none):
        with pytest.raises(kind) as raised, run_folder(target) as partial:
            (partial / "half").write_text("x")
            if error is None:
                (partial / "no" / "folder").write_text("x")
            raise error
        assert kind is not FileError or f"cannot write {target}: No s" in str(raised.value)
        assert os.listdir(target) == ["config.json"] and os.listdir(tmp_path) == ["run"]
    (target / "picture.png").touch()
    (link := tmp_path / "link").symlink_to(target)
    with run_folder(link) as partial:
        (partial / "new").write_text("x")
    assert os.listdir(target) == ["new"] and {*os.listdir(tmp_path)} == {"link", "run"} and link.is_symlink()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    target = tmp_path / "photos"
    target.mkdir()
    with run_folder(target) as partial:  # an empty one may be used
        (partial / "precious").write_text("x")
    for content in ("{", "{}", '{"name": 1}', "3"):
        (target / "config.json").write_text(content)
        with pytest.raises(FileError, match="is no run folder of tnreg; it is left alone") as error:
            run_folder(target).__enter__()
        assert error.value.argument == "folder"
    assert (target / "precious").read_text() == "x"
    with pytest.raises(FileError, match="left alone"):
        run_folder(target / "precious").__enter__()
    other = tmp_path / "x"
    with pytest.raises(FileError, match="left alone"), run_folder(other):
        (other / "precious").mkdir(parents=True)  # put there meanwhile
    assert os.listdir(other) == ["precious"] and set(os.listdir(tmp_path)) == {"photos", "x"}


@pytest.mark.parametrize(("experiment", "more", "message"), [
    ("sweep", None, "is a run of 'sweep', not of 'study'; it is left alone"),
    (None, None, "is a run of None"),
    ("study", "notes.txt", r"holds what no run of 'study' writes \(notes.txt\)"),
    ("study", "picture.png/mine.txt", r"holds what no run of 'study' writes \(picture.png\)"),
    ("study", ".hidden", "holds what no run"),
])  # fmt: skip
def test_only_files_of_the_same_kind_of_run_are_replaced(tmp_path, experiment, more, message):
    (tmp_path / "config.json").write_text(json.dumps({"tnreg": "1", "experiment": experiment}))
    if more is not None:
        (tmp_path / more).parent.mkdir(exist_ok=True)
        (tmp_path / more).touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileError, match=message):
        run_folder(tmp_path).__enter__()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_dies(tmp_path, sign):
    """Killed: nothing at the target. Ctrl-C: a whole folder with what was recorded."""
    code = """
import sys, pathlib, tnreg, tnreg.cli
append = tnreg.Trajectory.append
def count(self, step, values):
    append(self, step, values)
    if step == 20:
        pathlib.Path("training").touch()
tnreg.Trajectory.append = count
tnreg.cli.main(sys.argv[1:])
"""
    words = "fit il2 --missing nan --steps 10000000 --every 5 --out run --no-progress"
    with start(code, *words.split(), cwd=tmp_path) as process:
        try:
            wait((tmp_path / "training").exists, process)
            process.send_signal(sign)
            process.wait(300)
        finally:
            process.kill()  # whatever happened, nothing goes on training
        errors = process.stderr.read()
    (tmp_path / "training").unlink()
    if sign == signal.SIGKILL:
        assert not (tmp_path / "run").exists()
        return
    assert process.returncode == 0, errors
    assert os.listdir(tmp_path) == ["run"]
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["summary"]["stopped by"] == "interrupted"
    names = {"model.safetensors", "trajectory.npz", "training.png"}
    assert names <= set(os.listdir(tmp_path / "run"))


def save_classifier(path, classes):
    net = tnreg.ConvNet(ModeTree.grid((2, 2)), 2, 2, outputs=classes)
    tnreg.ConvAC(tnreg.Representation(2), net).save(path)


@pytest.mark.parametrize(("save", "size"), [
    (lambda path, n: Factorization(ModeTree.star(n), 2, 3).save(path),
     lambda path: tnreg.load(path).tree.order),
    (save_classifier, lambda path: tnreg.ConvAC.load(path).net.outputs),
    (lambda path, n: safetensors.torch.save_file({"x": torch.ones(n)}, path),
     lambda path: len(tnreg.load_tensor(path).values)),
], ids=["model", "classifier", "tensor"])  # fmt: skip
def test_a_file_that_is_replaced_while_it_is_read(save, size, tmp_path, monkeypatch):
    """Of two versions the one that was opened, whole; never its header and the other one's numbers."""
    path, read_bytes = tmp_path / "x.safetensors", Path.read_bytes

    def read_and_replace(self):
        data = read_bytes(self)
        save(path, 5)
        return data

    save(path, 7)
    monkeypatch.setattr(Path, "read_bytes", read_and_replace)
    assert size(path) == 7
    monkeypatch.undo()
    assert size(path) == 5
