"""How much memory there is, and what is said where it is not enough."""

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


@pytest.mark.parametrize("wrong", ["", "much", "5 XB", "1.5", 1.5, 0, -3, True, "0GB", float("inf"), [1]])
def test_limits_refused(wrong):
    with pytest.raises(OptionError, match="x: memory must be a number of bytes"):
        memory.limit_of(wrong, "x")


def test_limit_of_a_container(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_LIMIT", limit)
    whole = memory.available()
    for text, expected in (("1000\n", 1000), ("max\n", None), (f"{2**60}\n", None)):
        limit.write_text(text)
        free = memory.available()
        assert free == expected if expected else abs(free - whole) < whole / 2


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
    assert error.argument == "memory"
    elsewhere = memory.does_not_fit("a core", 5, 4, "take less", note=", twice", device="cuda:0")
    assert "5 bytes (5 bytes), twice\n  available on cuda:0: 4 bytes" in str(elsewhere)
