"""The benchmark of completion: its tasks, and a row of it without the other libraries."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from completion_tasks import TASKS


@pytest.mark.parametrize("name", ["tutorial 30 %, noise 1 %", "borehole 8⁸, 500", "IL-2 30 %"])
def test_tasks_are_the_same_again_and_hold_out_what_they_say(name):
    first, again = (TASKS[name][0](0) for _ in range(2))
    assert np.array_equal(first.index, again.index) and np.array_equal(first.values, again.values)
    kept, _, held, _ = first.split()
    parts = [{tuple(row) for row in part.tolist()} for part in (kept, held, first.unseen)]
    assert len(set().union(*parts)) == sum(map(len, parts)) > 0
    assert len(kept) + len(held) == len(first.index) and 9 * len(held) <= len(kept) + 10
