"""What the doctor says of packages, optional parts and devices, and its exit code."""

from __future__ import annotations

import json
import re
import types
from importlib import metadata

import numpy as np
import pytest
import torch

import tnreg
from tnreg.cli import examination as doctor
from tnreg.cli import main
from tnreg.errors import FileError

NEEDED = [
    "numpy>=1.26", "torch>=2.6", "torch>=2.6; extra == 'all'", "zarr>=3.0 ; extra == 'scale'",
    'onnx>=1.23; python_version < "4" and extra == "onnx"', "pytest>=8; extra == 'dev'",
    "tnreg[onnx,scale]; extra == 'all'",
]  # fmt: skip
HERE = {"tnreg": "9.9", "numpy": np.__version__, "torch": torch.__version__, "onnx": "1.23.0"}


@pytest.fixture
def installed(monkeypatch):
    """What is installed, as a dict to change; nothing else is."""
    here, needed = dict(HERE), list(NEEDED)

    def version(name):
        if name not in here:
            raise metadata.PackageNotFoundError(name)
        return here[name]

    found = types.SimpleNamespace(
        version=version, requires=lambda name: needed, here=here, needed=needed,
        PackageNotFoundError=metadata.PackageNotFoundError,
    )  # fmt: skip
    monkeypatch.setattr(doctor, "metadata", found)
    return found


def call(capsys, *arguments):
    code = 0
    try:
        main(["doctor", *arguments])
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


def test_what_is_needed_and_what_is_there(installed):
    found = doctor.examine()
    assert found.tnreg == "9.9" and not found.broken
    assert [(p.name, p.found, p.least, p.state) for p in found.packages] == [
        ("numpy", np.__version__, "1.26", "ok"), ("torch", torch.__version__, "2.6", "ok"),
    ]  # fmt: skip
    extras = {extra.name: extra for extra in found.extras}
    assert set(extras) == {"scale", "onnx"}  # not all and dev
    assert not extras["scale"].works and extras["scale"].packages[0].state == "missing"
    assert extras["scale"].install == "pip install 'tnreg[scale]'"
    assert extras["onnx"].works and extras["onnx"].purpose


@pytest.mark.parametrize(
    ("version", "least", "state"),
    [
        ("1.9", "1.10", "too old"), ("1.10", "1.9", "ok"), ("2.6.0+cpu", "2.6", "ok"),
        ("2.6", "2.6.0", "ok"), ("2.6.1.dev3", "2.6.1", "ok"), ("2.5.9", "2.6", "too old"),
        ("1.0", "", "ok"), ("unknown", "1.0", "too old"),
    ],
)  # fmt: skip
def test_versions_are_compared_as_numbers(installed, version, least, state):
    installed.here["thing"] = version
    installed.needed[:] = [f"thing>={least}" if least else "thing"]
    assert [p.state for p in doctor.examine().packages] == [state]


def test_every_extra_of_the_project_says_what_it_is_for():
    for extra in doctor.examine().extras:
        assert extra.purpose and extra.packages


def test_devices(monkeypatch):
    first, *_ = doctor.examine().devices
    assert first.device == "cpu" and f"{torch.get_num_threads()} threads" in first.name
    assert first.memory is None or 0 < first.free <= first.memory
    about = types.SimpleNamespace(name="GPU", total_memory=10)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: about)
    monkeypatch.setattr(doctor, "available", lambda device: {"cpu": 5, "cuda:0": 7}[device])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = [(d.device, d.memory, d.free) for d in doctor.examine().devices]
    assert found[1:] == [("cuda:0", 10, 7), ("mps", None, None)] and found[0][2] == 5


def test_command(capsys, installed):
    code, out, err = call(capsys)
    assert code == 0 and not err
    assert "tnreg 9.9" in out and "pip install 'tnreg[scale]'" in out
    assert "tnreg[onnx]" not in out and re.search(r"│ zarr +│ +│ >= 3.0 +│ missing", out)
    code, out, err = call(capsys, "--json")
    found = json.loads(out)
    assert code == 0 and not err and found["works"] is True
    assert found["packages"][1]["found"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"


@pytest.mark.parametrize("change", ["old", "missing"])
def test_exit_code_of_a_broken_installation(capsys, installed, change):
    if change == "old":
        installed.here["numpy"] = "1.20"
    else:
        del installed.here["numpy"]
    code, out, _ = call(capsys)
    state = "too old" if change == "old" else "missing"
    assert code == 1 and f"numpy is {state}; pip install 'numpy>=1.26'" in out
    code, out, _ = call(capsys, "--json")
    assert code == 1 and json.loads(out)["works"] is False


def test_not_installed(capsys, installed):
    del installed.here["tnreg"]
    with pytest.raises(FileError, match="tnreg is not installed"):
        doctor.examine()
    code, out, err = call(capsys)
    assert code == 1 and not out and err.startswith("tnreg: FileError: tnreg is not installed")


def test_this_installation_works():
    assert doctor.examine().broken == () and tnreg.__version__
