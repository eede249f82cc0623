"""How much memory there is, and what is said where it is not enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from tnreg import OptionError, ShapeError, SizeError
from tnreg.machine import memory


def test_available():
    free = memory.available()
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    if "MemTotal" in text:
        total = int(text.split("MemTotal:")[1].split()[0]) * 1024
        assert 2**24 < free <= total
    assert free is None or free > 0
    assert memory.available("meta") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("1.5GiB", 3 * 2**29), ("800MB", 800_000_000), ("64 kib", 65536), ("17", 17), (17, 17)],
)  # fmt: skip
def test_limits(text, number):
    assert memory.limit_of(text, "x") == number


@pytest.mark.parametrize(
    "wrong", ["", "much", "5 XB", "1.5", 1.5, 0, -3, True, "0GB", float("inf"), [1]]
)
def test_limits_refused(wrong):
    with pytest.raises(OptionError, match="x: memory must be a number of bytes"):
        memory.limit_of(wrong, "x")


def test_control_groups(tmp_path, monkeypatch):
    """The smallest rest of the group and those around it counts."""
    (tmp_path / "job" / "step").mkdir(parents=True)
    for name, limit, used in ((".", "max", 5), ("job", "1000", 400), ("job/step", "900", 450)):
        place = tmp_path / name
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{used}\n")
    group = tmp_path / "cgroup"
    group.write_text("0::/job/step\n")
    monkeypatch.setattr(memory, "_GROUPS", (group, tmp_path))
    assert memory._of_group() == 450
    (tmp_path / "job" / "memory.current").write_text("990\n")
    assert memory._of_group() == 10
    assert memory.available() == 10
    (tmp_path / "job" / "memory.stat").write_text("anon 5\ninactive_file 300\n")
    assert memory._of_group() == 310  # files that were read are given up when room is needed
    group.write_text("")
    assert memory._of_group() is None


def test_message():
    assert memory.written(999.9) == "1 kB" and memory.written(999_999) == "1 MB"
    assert memory.written(999) == "999 bytes"
    error = memory.does_not_fit("a core", 2**33, 2**30, "take smaller ranks")
    assert str(error).splitlines() == [
        "a core would not fit into memory.",
        "  needed: 8,589,934,592 bytes (8.59 GB)",
        "  allowed (memory=): 1,073,741,824 bytes (1.07 GB)",
        "  take smaller ranks",
    ]
    assert isinstance(error, SizeError) and isinstance(error, ShapeError)
    elsewhere = memory.does_not_fit("a core", 5, 4, "take less", note=", twice", device="cuda:0")
    assert "5 bytes (5 bytes), twice\n  available on cuda:0: 4 bytes" in str(elsewhere)
