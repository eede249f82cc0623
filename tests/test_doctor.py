"""What the doctor says of packages, extras and devices, and its exit code."""

import json
import re
from importlib import metadata

import pytest
import torch
from command import call

NEEDS = [
    "old>=1.10", "new>=1.9", "short>=2.6.0", "local>=2.6", "gone>=3.0; extra == 'scale'",
    "any; extra == 'scale'", 'new>=1; python_version < "9" and extra == "onnx"', "gone; extra == 'dev'",
    "gone; extra == 'all'", "tnreg[onnx,scale]; extra == 'all'", 'gone; python_version < "3"',
]  # fmt: skip
HERE = {"old": "1.10", "new": "1.10", "short": "2.6", "local": "2.6.1.dev3+cpu", "any": "0.1"}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package, or another version of it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, version, *lines):
        folder = tmp_path / f"{name}-0.dist-info"
        folder.mkdir(exist_ok=True)
        head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (folder / "METADATA").write_text("\n".join([*head, *lines]))

    extras = [f"Provides-Extra: {extra}" for extra in ("scale", "onnx", "dev", "all")]
    write("tnreg", "9.9", *extras, *(f"Requires-Dist: {need}" for need in NEEDS))
    for name, version in HERE.items():
        write(name, version)
    return write


def test_packages_and_extras(capsys, install):
    code, out, err = call(capsys, "doctor")
    assert code == 0 and not err and "tnreg 9.9" in out
    rows = [re.split(r"\s*│\s*", line)[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert rows == [
        ["old", "1.10", ">=1.10", "ok", "tnreg"], ["new", "1.10", ">=1.9", "ok", "tnreg"],
        ["short", "2.6", ">=2.6.0", "ok", "tnreg"], ["local", "2.6.1.dev3+cpu", ">=2.6", "ok", "tnreg"],
        ["gone", "", ">=3.0", "missing", "scale"], ["any", "0.1", "", "ok", "scale"],
        ["new", "1.10", ">=1", "ok", "onnx"],
    ]  # fmt: skip
    assert "for scale: pip install 'tnreg[scale]'" in out and "tnreg[onnx]" not in out


def test_a_package_that_is_too_old_or_missing(capsys, install):
    install("old", "1.9.post1")
    code, out, _ = call(capsys, "doctor")
    assert code == 1 and "problem: old is too old; pip install 'old>=1.10'" in out
    code, out, _ = call(capsys, "doctor", "--json")
    answer = json.loads(out)
    assert code == 1 and not answer["works"] and answer["packages"][0]["state"] == "too old"
    install("tnreg", "9.9", "Requires-Dist: gone>=2")
    code, out, _ = call(capsys, "doctor")
    assert code == 1 and "problem: gone is missing; pip install 'gone>=2'" in out


def test_devices(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("tnreg.cli.doctor.available", {"cpu": 5, "cuda:0": None}.get)
    _, out, _ = call(capsys, "doctor")
    assert "cpu: 5 bytes free\ncuda:0: unknown memory free" in out
    _, out, err = call(capsys, "doctor", "--json")
    assert json.loads(out)["devices"] == {"cpu": 5, "cuda:0": None} and not err


def test_not_installed(capsys, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    code, out, err = call(capsys, "doctor")
    assert code == 1 and not out and err.startswith("tnreg: FileError: tnreg is not installed")


def test_this_installation_works(capsys):
    code, out, _ = call(capsys, "doctor", "--json")
    assert code == 0 and json.loads(out)["works"] is True and json.loads(out)["problems"] == []
