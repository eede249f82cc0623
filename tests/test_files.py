"""Files and folders appear whole or not at all, also when the process dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tnreg
from tnreg import (
    ConvAC,
    ConvNet,
    DataError,
    Factorization,
    FileError,
    ModeTree,
    Representation,
    load,
    load_tensor,
)
from tnreg.machine.files import folder_written_whole, write_whole


def test_write_whole(tmp_path):
    target = tmp_path / "a.txt"
    write_whole(target, lambda beside: beside.write_text("one"))
    assert target.read_text() == "one"
    with pytest.raises(RuntimeError):
        write_whole(
            target, lambda beside: (beside.write_text("tw"), (_ for _ in ()).throw(RuntimeError()))
        )
    assert target.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]


def test_paths_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tnreg.Factorization(tnreg.ModeTree.star(2), 3, 2)
    for path, message in [
        ("", "the path is empty"),
        (".", "cannot write"),
        ("no/m.st", "there is no folder"),
    ]:
        with pytest.raises(FileError, match=message):
            model.save(path)
    model.load_weights({0: torch.ones(3, 2)})
    with torch.no_grad():
        model.stacks[0].fill_(float("nan"))
    with pytest.raises(DataError, match="not saved: the weights of 2 nodes are NaN or infinite"):
        model.save("m.st")
    assert not list(tmp_path.iterdir())


def test_folder_written_whole(tmp_path):
    target = tmp_path / "run"
    with folder_written_whole(target) as beside:
        (beside / "config.json").write_text(json.dumps({"tnreg": "0"}))
        assert not target.exists()
    assert os.listdir(target) == ["config.json"]
    with pytest.raises(RuntimeError), folder_written_whole(target) as beside:
        (beside / "half").write_text("x")
        raise RuntimeError
    assert os.listdir(target) == ["config.json"] and os.listdir(tmp_path) == ["run"]
    with folder_written_whole(target) as beside:
        (beside / "new").write_text("x")
    assert os.listdir(target) == ["new"] and os.listdir(tmp_path) == ["run"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    target = tmp_path / "photos"
    target.mkdir()
    with folder_written_whole(target) as beside:  # an empty one may be used
        (beside / "precious").write_text("x")
    for content in ("{", "{}", '{"name": 1}', "3"):
        (target / "config.json").write_text(content)
        with pytest.raises(FileError, match="is no run folder of tnreg; it is left alone"):
            folder_written_whole(target).__enter__()
    assert (target / "precious").read_text() == "x"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(FileError, match="left alone"):
        folder_written_whole(file).__enter__()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_dies(tmp_path, sign):
    """Killed: nothing at the target. Ctrl-C: a whole folder with what was recorded."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "tnreg.cli", "fit", "il2", "--missing", "nan", "--steps", "10000000",
               "--every", "5", "--out", str(out), "--no-progress"]  # fmt: skip
    for wait in (2.0, 6.0, 18.0):  # well into the training, on a busy machine too
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path
        )
        try:
            end = time.monotonic() + 60
            while not list(tmp_path.glob(".run.partial-*")) and time.monotonic() < end:
                assert process.poll() is None
                time.sleep(0.05)
            assert list(tmp_path.glob(".run.partial-*"))
            time.sleep(wait)
            process.send_signal(sign)
            errors = process.communicate(timeout=60)[1].decode()
        finally:
            process.kill()  # whatever happened, nothing goes on training
        if (
            process.returncode != 130
        ):  # else it had not begun: nothing was recorded, nothing is left
            break
        assert list(tmp_path.iterdir()) == []
    if sign == signal.SIGKILL:
        assert not out.exists()
        return
    assert process.returncode == 0, errors
    about = json.loads((out / "config.json").read_text())
    assert about["summary"]["stopped by"] == "interrupted"
    assert {"model.safetensors", "trajectory.npz", "training.png"} <= set(os.listdir(out))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("kind", ["model", "classifier", "tensor"])
def test_a_file_that_is_replaced_while_it_is_read(kind, tmp_path, monkeypatch):
    """Of two versions the one that was opened, whole; never its header and the other one's numbers."""
    path = tmp_path / "x.safetensors"
    first, second = (torch.full((size,), float(size), dtype=torch.float64) for size in (7, 5))
    makers = {
        "model": lambda v: Factorization(ModeTree.star(len(v)), 2, 3, std=float(v[0])).save(path),
        "classifier": lambda v: ConvAC(
            Representation(2), ConvNet(ModeTree.grid((2, 2)), 2, 2, outputs=len(v))
        ).save(path),
        "tensor": lambda v: safetensors.torch.save_file({"x": v}, path),
    }
    readers = {
        "model": lambda: load(path).tree.order,
        "classifier": lambda: ConvAC.load(path).net.outputs,
        "tensor": lambda: len(load_tensor(path).values),
    }
    makers[kind](first)
    read = Path.read_bytes

    def replaced(self):
        data = read(self)
        makers[kind](second)
        return data

    monkeypatch.setattr(Path, "read_bytes", replaced)
    assert readers[kind]() == 7
    monkeypatch.undo()
    assert readers[kind]() == 5
