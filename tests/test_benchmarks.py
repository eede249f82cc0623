"""The benchmark of completion: its tasks, and a row of it without the other libraries."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import completion_tasks
from completion_tasks import TASKS

SCRIPT = Path(completion_tasks.__file__).with_name("complete.py")


@pytest.mark.parametrize("name", ["tutorial 30 %, noise 1 %", "borehole 8⁸, 500", "IL-2 30 %"])
def test_tasks_are_the_same_again_and_hold_out_what_they_say(name):
    first, again = (TASKS[name][0](0) for _ in range(2))
    assert np.array_equal(first.index, again.index) and np.array_equal(first.values, again.values)
    kept, _, held, _ = first.split()
    parts = [{tuple(row) for row in part.tolist()} for part in (kept, held, first.unseen)]
    assert len(set().union(*parts)) == sum(map(len, parts)) > 0
    assert len(kept) + len(held) == len(first.index) and 9 * len(held) <= len(kept) + 10


@pytest.mark.slow
def test_rows_are_written_once_and_say_why_there_is_none(tmp_path):
    """A rehearsal of one row without the other libraries; one that takes too long costs its row only."""
    out = tmp_path / "rows.json"

    def said(*options):
        command = [sys.executable, SCRIPT, "--only", "tnreg", "--seeds", "1", "--out", out, *options]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "e-1" in said("--tasks", "Friedman 6¹⁰, 1,000")
    [(_, row)] = json.loads(out.read_text())["results"]["Friedman 6¹⁰, 1,000"]["tnreg"].items()
    assert row["error"] < 1e-10 and row["held out"] < 1e-10 and row["numbers"] < 1000
    assert said("--tasks", "Friedman 6¹⁰, 1,000") == ""
    assert "> 1 s" in said("--tasks", "kinetic 10 %", "--limit", "1")
