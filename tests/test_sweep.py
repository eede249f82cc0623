"""Sweeps: nothing is computed twice, whatever is killed; a failing cell stops no other one."""

from __future__ import annotations

import collections
import contextlib
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import pytest
import torch
from command import call, start, wait

matplotlib.use("Agg")

from tnreg import FileError, OptionError, TnregError
from tnreg.experiments import dynamics, locality, sweep
from tnreg.experiments.dynamics import init_scale
from tnreg.experiments.sweep import command as sweep_grid
from tnreg.experiments.sweep import pictures as sweep_figure
from tnreg.experiments.sweep import workers as sweep_workers
from tnreg.experiments.sweep.cell import Unfinished

pytestmark = pytest.mark.slow

CELLS = [{"a": a, "b": b, "seed": seed} for seed in (1, 2) for b in "xy" for a in (1, 2, 3)]
BAD = "a-2-b-y-seed-1"  # fails as long as there is a file of that name
WRONG = "a-3-b-y-seed-1"  # so does this one, with an OptionError


def work(cell, folder, checkpoint):
    """Squares, slowly; what it does is in a log beside the cells."""
    place, name = checkpoint.parent.parent, checkpoint.name.split(".")[0]

    def note(what):
        with (place / "log").open("a") as file:
            file.write(f"{what} {name} {os.getpid()} {torch.get_num_threads()}\n")

    note("begin")
    time.sleep(0.05)
    note("end")
    if (place / name).exists():
        raise (OptionError if name == WRONG else RuntimeError)("on purpose\nwith a second line")
    (folder / "made").write_text(name)
    return {"y": cell["a"] ** 2 + cell["seed"], "nothing": None, "list": [1, 2], "text": cell["b"]}


def logged(place):
    return [line.split() for line in (place / "log").read_text().splitlines()]


def counts(place):
    """How often each cell was begun."""
    return collections.Counter(line[1] for line in logged(place) if line[0] == "begin")


def sweep_in_process(place, *options):
    script = f"import sys, test_sweep as t; t.sweep.run(t.work, t.CELLS, sys.argv[1], {', '.join(options)})"
    return start(script, place / "s")


def cells_there(place):
    return {path.parent.name: path.stat() for path in sorted((place / "s").glob("[!.]*/config.json"))}


def files(place):
    """What is in the sweep's folder beside its cells."""
    return {path.name for path in (place / "s").iterdir()} - set(cells_there(place))


def assert_all_but_one(place, found):
    """Eleven of twelve cells are there, and the failing one is reported everywhere."""
    assert len(found.rows) == 11 and [one.cell.name for one in found.failed] == [BAD]
    cell = {"a": 2, "b": "y", "seed": 1}
    (bad,) = json.loads((place / "s" / "config.json").read_text())["failed"]
    assert bad == {"name": BAD, "config": cell, "error": "RuntimeError: on purpose"}
    with open(place / "s" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["a"]), r["b"], int(r["seed"]), int(r["y"])) for r in rows] == [
        (c["a"], c["b"], c["seed"], c["a"] ** 2 + c["seed"]) for c in CELLS if c != cell
    ]
    assert list(rows[0]) == ["a", "b", "seed", "y", "nothing", "text"]
    assert (place / "s" / "sweep.png").stat().st_size > 1000
    assert files(place) - {f".{BAD}.lock"} == {"config.json", "results.csv", "sweep.png"}


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again(sign, tmp_path, capsys):
    """Through the command line: twelve trainings, ended in the middle, none trained twice."""
    options = [*"--set tiny --epochs 3 --arm plain,igc,interaction --out".split(), str(tmp_path / "s")]
    command = ["sweep", "locality", *options, "--no-progress", "--workers"]
    with start("from tnreg.cli import main; main()", *command, "2") as running:
        wait(lambda: len(cells_there(tmp_path)) >= 3, running)
        running.send_signal(sign)
    time.sleep(0.5)  # its processes end with it
    before = cells_there(tmp_path)
    assert 3 <= len(before) < 12
    assert (tmp_path / "s" / "results.csv").exists() == (sign == signal.SIGINT)
    code, out, err = call(capsys, *command, "2")
    assert code == 0 and f"12 runs, {12 - len(before)} of them now" in out, err
    after = cells_there(tmp_path)
    assert len(after) == 12
    for name, old in before.items():
        assert (after[name].st_ino, after[name].st_mtime_ns) == (old.st_ino, old.st_mtime_ns)
    with open(tmp_path / "s" / "results.csv", newline="") as file:
        assert len({(r["arm"], r["distance"], r["seed"]) for r in csv.DictReader(file)}) == 12
    assert files(tmp_path) == {"config.json", "results.csv", "locality.png"}


def test_failing_cells_on_two_workers(tmp_path):
    (tmp_path / BAD).touch()
    (tmp_path / WRONG).touch()
    threads = torch.get_num_threads()
    pytest.importorskip("cloudpickle")  # for a function without a name
    unnamed = lambda *job: work(*job)  # noqa: E731
    found = sweep.run(unnamed, CELLS, tmp_path / "s", workers=2, progress=True)
    errors = {one.cell.name: one.error for one in found.failed}
    assert errors == {BAD: "RuntimeError: on purpose", WRONG: "OptionError: on purpose"}
    expected = dict.fromkeys(counts(tmp_path), 1) | {BAD: 2}  # an OptionError would come again
    assert len(found.computed) == 10 and counts(tmp_path) == expected
    pids = {line[2] for line in logged(tmp_path)}
    assert len(pids) == 2 and str(os.getpid()) not in pids
    assert {line[3] for line in logged(tmp_path)} == {"1"} and torch.get_num_threads() == threads
    (tmp_path / WRONG).unlink()
    assert_all_but_one(tmp_path, sweep.run(work, CELLS, tmp_path / "s", workers=0, retries=0))
    (tmp_path / BAD).unlink()
    again = sweep.run(work, CELLS, tmp_path / "s", workers=0)
    assert again.computed == [BAD] and not again.failed and len(again.rows) == 12
    assert counts(tmp_path) == expected | {BAD: 4, WRONG: 2}
    assert not (tmp_path / "s" / f".{BAD}.lock").exists()


@pytest.fixture
def cluster(tmp_path):
    """A scheduler with two workers, one of them with two threads."""
    pytest.importorskip("distributed")
    file = tmp_path / "scheduler.json"
    code = "from distributed.cli.dask_{} import main; main()"
    common = ["--no-dashboard", "--scheduler-file", file]
    address = ["--host", "127.0.0.1", "--port", "0"]
    running = [start(code.format("scheduler"), *address, *common)]
    try:
        wait(file.exists, running[0])
        for threads in "12":
            options = ["--nthreads", threads, "--no-nanny", "--local-directory", tmp_path]
            running.append(start(code.format("worker"), *options, *common))
        yield str(file), running[0]
    finally:
        for process in running:
            with process:  # closes its pipe and waits
                process.kill()


def test_on_a_cluster_that_outlives_the_sweep(cluster, tmp_path):
    """Killed in the middle: what a worker goes on with is waited for, not computed again."""
    (tmp_path / BAD).touch()
    cluster, scheduler = cluster
    address = json.loads(Path(cluster).read_text())["address"]
    with sweep_in_process(tmp_path, f"scheduler={address!r}") as running:
        wait(lambda: len(cells_there(tmp_path)) >= 2, running)
        running.send_signal(signal.SIGKILL)
    assert len(cells_there(tmp_path)) < 11
    with pytest.warns(UserWarning, match="workers have more than one thread"):
        found = sweep.run(work, CELLS, tmp_path / "s", scheduler=cluster, retries=0)
    assert_all_but_one(tmp_path, found)
    computed = counts(tmp_path)
    assert computed.pop(BAD) <= 3 and set(computed.values()) == {1} and len(computed) == 11
    for pid in {line[2] for line in logged(tmp_path)}:  # one cell at a time in a process
        own = [line[0] for line in logged(tmp_path) if line[2] == pid]
        assert own == ["begin", "end"] * (len(own) // 2)
    # and without the scheduler: what is done is written, and the same call goes on
    more = [{"a": a, "pid": scheduler.pid if a == 1 else 0} for a in range(4)]
    lost = pytest.raises(TnregError, match="the Dask scheduler was lost .*the same call goes on")
    with pytest.warns(UserWarning, match="more than one thread"), lost:
        sweep.run(ends_the_scheduler, more, tmp_path / "l", scheduler=cluster)
    with open(tmp_path / "l" / "results.csv", newline="") as file:
        assert [row["a"] for row in csv.DictReader(file)] == ["0"]
    assert json.loads((tmp_path / "l" / "config.json").read_text())["summary"][0]["y"] == 0


def ends_the_scheduler(cell, folder, checkpoint):
    first = checkpoint.parent / "a-0-pid-0"
    while cell["a"] > 0 and not first.exists():
        time.sleep(0.02)
    if cell["pid"]:
        time.sleep(0.5)  # the first one is known to be done
        os.kill(cell["pid"], signal.SIGKILL)
    time.sleep(2 * (cell["a"] > 0))
    return {"y": cell["a"]}


def test_two_sweeps_at_once(tmp_path):
    with sweep_in_process(tmp_path, "workers=0") as other:
        wait(lambda: (tmp_path / "log").exists(), other)
        mine = sweep.run(work, CELLS[::-1], tmp_path / "s", workers=0)  # they meet half way
    assert other.returncode == 0 and len(mine.rows) == 12
    assert set(counts(tmp_path).values()) == {1} and len(counts(tmp_path)) == 12
    assert len({line[2] for line in logged(tmp_path)}) == 2 and 0 < len(mine.computed) < 12


def quick(cell, folder, checkpoint):
    return {"y": cell["a"] + 0.5 * cell.get("seed", 0), "flag": True}


def test_rows_and_table(tmp_path):
    cells = [{"a": a, "same": "z", "seed": s, "k": [a, 0]} for a in (1, 2) for s in (0, 1, 2)]
    found = sweep.run(quick, cells, tmp_path / "s", workers=0)
    assert found.fields == ("a", "k", "seed") and found.headline == "y"
    assert found.rows[1] == {"a": 1, "k": [1, 0], "seed": 1, "y": 1.5, "flag": True}
    assert found.table[1] == {"a": 2, "k": [2, 0], "seeds": 3, "y": 2.5, "deviation": 0.5}
    about = json.loads((tmp_path / "s" / "config.json").read_text())
    assert about["summary"] == found.rows
    assert about["config"] == {"a": [1, 2], "same": "z", "seed": [0, 1, 2], "k": [[1, 0], [2, 0]]}
    one = json.loads((tmp_path / "s" / found.computed[0] / "config.json").read_text())
    assert one["config"] == cells[0] and one["summary"] == {"y": 1.0, "flag": True}


def fails_once(cell, folder, checkpoint):
    if not checkpoint.exists():
        checkpoint.write_text(str(cell["n"]))
        (folder / "half").touch()
        raise KeyboardInterrupt if cell["n"] == 0 else OSError("lost")
    return {"y": checkpoint.read_text(), "empty": not any(folder.iterdir())}


def test_checkpoints(tmp_path):
    """One is there for the next attempt, not for other settings; both go when the cell is done."""
    place = tmp_path / "s"
    for n in (5, 8):  # n is in no name
        cells = [{"x": x, "n": n} for x in (1, 2)]
        first = sweep.run(fails_once, cells, place, workers=0, retries=0)
        assert [one.error for one in first.failed] == ["OSError: lost"] * 2 and not first.rows
    assert len(list(place.glob("x-?.*.checkpoint"))) == 4
    remains = place / ".x-1.partial-1"  # of a process that was killed
    remains.mkdir()
    second = sweep.run(fails_once, cells, place, workers=0, retries=0)
    assert second.rows == [{"x": x, "y": "8", "empty": True} for x in (1, 2)]
    assert not list(place.glob("*.checkpoint")) and not remains.exists()
    assert sweep.run(fails_once, [{"x": 1, "n": 1}], tmp_path / "t", workers=0, retries=1).rows


def test_interrupted(tmp_path):
    """What is done is written, and the same call goes on."""
    cells = [{"x": 1, "n": n} for n in (2, 0, 1)]
    with pytest.raises(KeyboardInterrupt):
        sweep.run(fails_once, cells, tmp_path / "s", workers=0)
    assert (tmp_path / "s" / "results.csv").read_text() == "n,y,empty\n2,2,True\n"
    found = sweep.run(fails_once, cells, tmp_path / "s", workers=0)
    assert found.computed == ["n-0", "n-1"] and len(found.rows) == 3


def never_begins(pipe):
    """Waits for the end of the sweep."""
    with contextlib.suppress(EOFError):
        pipe.recv()
    os._exit(1)


def test_over_before_a_process_has_begun(caplog, monkeypatch):
    monkeypatch.setattr(sweep_workers, "_end_with", never_begins)
    with sweep_workers._processes(1) as submit:
        job = submit(divmod, 1, 0)
    assert isinstance(job.result(), BrokenProcessPool) and not caplog.records


def test_a_script_without_its_guard(tmp_path):
    """Its processes would run the sweep again; all of them end, nothing is computed, and it is told why."""
    script = tmp_path / "script.py"
    script.write_text(
        "from tnreg.experiments import sweep\n"
        "def nothing(*cell): return {}\n"
        "sweep.run(nothing, [{'x': x} for x in range(4)], 's', workers=2)\n"
    )
    run = subprocess.run([sys.executable, script], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1 and 'needs `if __name__ == "__main__":`' in run.stderr
    assert not list((tmp_path / "s").glob("x-*"))


@pytest.mark.parametrize(
    ("cells", "options", "said"),
    [
        ([], {}, "no cells; give at least one"),
        ([{"a": 1}, {"b": 1}], {}, "cells with different fields: not all have a, b"),
        ([{"a": 1}, {"a": 1}], {}, "named 'a-1', 2 cells have it; give each cell once, or names of your"),
        ([{"a": "x/y"}, {"a": "x_y"}], {}, "named 'a-x_y', 2 cells have it"),
        ([{"a": "x" * 199}], {}, "named 'a-x+', no folder can have it; .* by Experiment.name"),
        ([{"a": {1}}], {}, "a cell is a dict of values for JSON"),
        ([{"a": 1}], {"workers": -1}, "workers must be an integer >= 0"),
        ([{"a": 1}], {"threads": 0}, "threads must be an integer >= 1"),
        ([{"a": 1}], {"retries": -1}, "retries must be an integer >= 0"),
        ([{"a": 1}], {"workers": 1, "scheduler": "tcp://x:1"}, "give one of the two"),
    ],
)  # fmt: skip
def test_refuses(cells, options, said, tmp_path):
    with pytest.raises(OptionError, match=said):
        sweep.run(quick, cells, tmp_path / "s", **options)
    assert not (tmp_path / "s" / "a-1").exists()


def test_no_scheduler(tmp_path, monkeypatch):
    def refused(message):
        with pytest.raises(OptionError, match=message):
            sweep.run(quick, [{"a": 1}], tmp_path / "s", scheduler="tcp://127.0.0.1:1")

    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "distributed", None)
        refused(re.escape("needs Dask: pip install 'tnreg[scale]'"))
    dask = pytest.importorskip("dask")
    pytest.importorskip("distributed")  # settings changed before it is imported would take away the others
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        refused("no Dask scheduler at 'tcp://127.0.0.1:1'")


def test_refuses_other_folders(tmp_path):
    place = tmp_path / "s"
    sweep.run(quick, [{"a": 1, "b": 1}], place, workers=0)
    with pytest.raises(OptionError, match="is a run of 'sweep'; choose another folder"):
        locality.run(locality.tiny, place)
    (place / "a-2").mkdir()
    (place / "a-2" / "mine").touch()
    (place / "a-3").mkdir()
    (place / "a-3" / "config.json").write_text('{"tnreg": "1"}')

    def refuses(error, message, cell, name=sweep.cell_name, **options):
        with pytest.raises(error, match=message):
            sweep.run(sweep.Experiment(quick, name=name), [cell], place, **options)

    other = r"other settings(.|\n)*b: 1 there, 2 now"
    refuses(OptionError, other, {"a": 1, "b": 2}, lambda *_: "a-1-b-1", workers=0)
    refuses(OptionError, "cannot be named '../a'", {"a": 1}, lambda *_: "../a")
    refuses(FileError, "no run folder of tnreg; it is left alone", {"a": 2}, workers=0)
    refuses(FileError, "not a run folder: .*a-3", {"a": 3}, workers=0)
    with pytest.raises(FileError, match="not a finished sweep"):
        sweep_figure.figure(tmp_path)


class Odd(Exception):
    """An error that pickle cannot read back."""

    def __reduce__(self):
        raise TypeError


def ends_at_a_deadline(cell, folder, checkpoint):
    """Even numbers need a second call; 3 cannot be computed, 5 ends its process, 7 has an odd error."""
    if cell["a"] == 7:
        raise Odd("1 and 2")
    if cell["a"] == 5:
        os._exit(1)
    if cell["a"] == 3:
        raise OptionError("never 3")
    if cell["a"] % 2 == 0 and not checkpoint.exists():
        checkpoint.touch()
        raise Unfinished("the time is over")
    return {"y": cell["a"], "process": os.getpid()}


@pytest.mark.parametrize("workers", [0, 2])
def test_cells_whose_time_is_over(workers, tmp_path, monkeypatch):
    """They are neither rows nor failures, keep their checkpoints and are done by the next call.

    A process that dies takes no other cell with it.
    """
    monkeypatch.setitem(sys.modules, "cloudpickle", None)  # without Dask
    cells = [{"a": a} for a in ((5, 1, 2, 3, 4, 7) if workers else (1, 2, 3, 4, 7))]
    first = sweep.run(ends_at_a_deadline, cells, tmp_path / "s", workers=workers)
    assert [row["y"] for row in first.rows] == [1]
    errors = {one.cell.name: one.error for one in first.failed}
    assert not workers or "BrokenProcessPool" in errors.pop("a-5")
    assert errors == {"a-3": "OptionError: never 3", "a-7": "RuntimeError: Odd: 1 and 2"}
    assert len(list((tmp_path / "s").glob("*.checkpoint"))) == 2
    second = sweep.run(ends_at_a_deadline, cells, tmp_path / "s", workers=workers)
    assert [row["y"] for row in second.rows] == [1, 2, 4]
    assert not list((tmp_path / "s").glob("*.checkpoint"))
    assert {row["process"] == os.getpid() for row in second.rows} == {workers == 0}


def returns(value):
    """A function for a sweep, and the list of cells that it was called with."""
    calls = []

    def work(cell, folder, checkpoint):
        calls.append(cell)
        return value(cell, folder) if callable(value) else value

    return work, calls


def writes(about):
    """A result that leaves ``about`` in ``config.json``."""
    return lambda _, folder: {"y": (folder / "config.json").write_text(json.dumps(about))}


@pytest.mark.parametrize(("value", "kept"), [
    *((kind(2), 2) for kind in (np.float16, np.float32, np.float64, np.longdouble, np.int8, np.uint64)),
    (np.True_, True), (np.str_("a"), "a"), (np.array(1.5), 1.5), (torch.tensor(3), 3), (np.arange(2), [0, 1]),
    (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5), ({"z": np.float32(0.5)}, {"z": 0.5}),
], ids=repr)  # fmt: skip
def test_numbers_of_numpy_and_torch_are_results(value, kept, tmp_path):
    found = sweep.run(returns({"y": value, "x": 1})[0], [{"a": np.int64(1)}], tmp_path, workers=0)
    again = sweep.run(returns({})[0], [{"a": 1}], tmp_path, workers=0)
    about = json.loads((tmp_path / "a-1" / "config.json").read_text())
    assert about["summary"] == {"y": kept, "x": 1} and found.rows == again.rows and not again.computed


@pytest.mark.parametrize(
    "value", [1j, np.complex64(1), {1, 2}, b"x", object(), 10**5000, circle := []], ids=type
)
def test_what_is_no_result_loses_no_other(value, tmp_path):
    circle[:] = [circle]
    work, calls = returns({"y": value, "x": 1.0})
    with pytest.warns(UserWarning, match="the result 'y' is kept as text"):
        found = sweep.run(work, [{"a": 1}], tmp_path, workers=0, retries=3)
    assert found.rows[0]["x"] == 1.0 and isinstance(found.rows[0]["y"], str) and len(calls) == 1


OTHER = r"config.json without 'tnreg', the cell under 'config' or results under 'summary': (.|\n)*"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "must return a dict of values for JSON: .*int"),
        (writes({"tnreg": "1", "config": {"a": 2}, "summary": {}}), OTHER + "a: 2 there, 1 now"),
        (writes({"tnreg": "1"}), OTHER + "KeyError: 'config'"),
        (writes([]), OTHER + "no run folder of tnreg"),
        (writes({"config": {"a": 1}, "summary": {"y": 1}}), OTHER + "left alone"),
    ],
)
def test_a_function_that_does_wrong_is_called_once(value, message, tmp_path):
    work, calls = returns(value)
    found = sweep.run(work, [{"a": 1}], tmp_path / "s", workers=0, retries=3)
    assert re.search(message, str(found.failed[0].exception)) and len(calls) == 1
    assert isinstance(found.failed[0].exception, OptionError)
    assert not (tmp_path / "s" / "a-1").exists()


def test_the_same_rows_when_they_are_read_again(tmp_path):
    """A config.json that work wrote counts at once."""
    work, calls = returns(writes({"tnreg": "1", "config": {"a": 1}, "summary": {"y": 2, "t": "ü"}}))
    once, again = (sweep.run(work, [{"a": 1}], tmp_path / "s", workers=0) for _ in range(2))
    assert once.rows == again.rows == [{"a": 1, "y": 2, "t": "ü"}] and len(calls) == 1


def test_results_never_take_the_place_of_settings(tmp_path):
    work, _ = returns({"a": 9, "b": 1, "y": 1})
    found = sweep.run(work, [{"a": 1, "b": 1}, {"a": 2, "b": 1}], tmp_path / "s", workers=0)
    assert [row["a"] for row in found.rows] == [1, 2]
    assert found.rows[0] == {"a": 1, "a (result)": 9, "b": 1, "y": 1}
    assert found.headline == "a (result)" and [row["a"] for row in found.table] == [1, 2]


NAN, INF = float("nan"), float("inf")


def test_not_a_number(tmp_path):
    """As a setting it is found again, as a result it is no headline, in config.json it is null."""
    cells = [{"x": x, "w": NAN, "l": [NAN]} for x in (NAN, INF, 1.0)]
    work, calls = returns(lambda cell, _: {"no": NAN, "y": cell["x"], "z": 1.5})
    for _ in range(2):
        found = sweep.run(work, cells, tmp_path / "s", workers=0)
        assert len(calls) == 3 and found.fields == ("x",) and found.headline == "y"
        assert found.rows[1]["y"] == INF and math.isnan(found.rows[0]["no"])
        assert len(found.table) == 1 and math.isnan(found.table[0]["deviation"])

    def refuse(name):
        raise AssertionError(name)

    about = json.loads((tmp_path / "s" / "config.json").read_text(), parse_constant=refuse)
    assert [row["y"] for row in about["summary"]] == [None, None, 1.0]
    assert about["table"][0]["deviation"] is None and about["config"]["w"] is None


@pytest.mark.parametrize("value", [NAN, INF, 10**400])
def test_no_number_that_can_be_drawn(value, tmp_path):
    work, _ = returns({"y": value})
    found = sweep.run(work, [{"a": 1}, {"a": 2}], tmp_path / "s", workers=0, progress=True)
    assert found.headline == "" and not found.table and len(found.rows) == 2
    assert not (tmp_path / "s" / "sweep.png").exists()
    with pytest.raises(FileError, match="no finite number in the column ''"):
        sweep_figure.figure(tmp_path / "s")


def test_a_picture_that_fails_loses_nothing(tmp_path):
    def figure(folder):
        raise RuntimeError("no ink")

    drawn = sweep.Experiment(quick, figure=figure)
    with pytest.warns(UserWarning, match="no picture of .*: RuntimeError: no ink"):
        found = sweep.run(drawn, [{"a": 1}], tmp_path / "s", workers=0)
    assert found.rows and (tmp_path / "s" / "results.csv").exists()


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ({"tree": "htf-4", "x": 0.1}, "tree-htf-4-x-0.1"),
        ({"x": None, "y": 1e-30, "z": True}, "x-null-y-1e-30-z-true"),
        ({"tree": "[[0,1],[2,3]]"}, "tree-__0_1___2_3__"),
        ({"path": "../é b"}, "path-.._é_b"),
    ],
)
def test_names(cell, name):
    assert sweep.cell_name(cell, list(cell)) == name


@pytest.mark.parametrize(
    ("kind", "lists"),
    [
        (int, {"1": (1,), "0,8,16": (0, 8, 16), "-3": (-3,), "0:20:5, 40": (0, 5, 10, 15, 40)}),
        (int | None, {"3:0:-1,none": (3, 2, 1, None)}),
        (float, {"0.1,1e-3,2": (0.1, 0.001, 2.0)}),
        (bool, {"true,False": (True, False)}),
        (str, {"htf-4,[[0,2],[1,3]]": ("htf-4", "[[0,2],[1,3]]"), "a.b:c": ("a.b:c",)}),
        (Literal["a", "b"], {"a,b": ("a", "b")}),
        (Literal["nan"] | None, {"none,nan": (None, "nan")}),
    ],
)
def test_lists(kind, lists):
    for text, values in lists.items():
        found = sweep_grid.parse(text, kind, "x")
        assert found == values == sweep_grid.parse(str(found), kind, "x")


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("1,,2", int, "a value is missing in '1,,2'"),
        ("", str, "a value is missing in ''"),
        ("1,2,1", int, "1 stands twice"),
        ("0:3,2", int, "2 stands twice"),
        ("5:0", int, "'5:0' is not an integer or a range such as 0:5"),
        ("1:2:3:4", int, "is not an integer or a range"),
        ("0:5:0", int, "is not an integer or a range"),
        ("1.5", int, "'1.5' is not an integer"),
        ("a", float, "'a' is not a number"),
        ("yes", bool, "'yes' is not true or false"),
        ("c", Literal["a", "b"], "no 'c'; there is a, b"),
        ("none", int, "'none' is not an integer"),
        ("[[0,1],[2,3]", str, "a bracket is not closed"),
        ("0,1]", str, "not opened"),
    ],
)
def test_lists_refuse(text, kind, said):
    with pytest.raises(OptionError, match=f"distance: .*{re.escape(said)}"):
        sweep_grid.parse(text, kind, "distance")


def test_dynamics_on_the_command_line(capsys, tmp_path):
    options = ["--model", "tiny", "--steps", "10", "--std", "0.1,0.3", "--seed", "1:3", "--tree",
               "htf-4,[[0,2],[1,3]]", "--off-tree", "0,2", "0,3", "--workers", "0"]  # fmt: skip
    code, out, err = call(capsys, "sweep", "dynamics", *options, "--out", str(tmp_path / "s"))
    assert code == 0 and "8 runs, 8 of them now" in out and "htf-4" in out, err
    rows = json.loads((tmp_path / "s" / "config.json").read_text())["summary"]
    assert [(r["tree"], r["std"], r["seed"]) for r in rows[:3]] == [
        ("htf-4", 0.1, 1), ("[[0,2],[1,3]]", 0.1, 1), ("htf-4", 0.3, 1),
    ]  # fmt: skip
    # a cell is the same run as one by itself
    config = dynamics.MODELS["tiny"]
    alone = init_scale.Config(model="tiny", stds=(0.3,), seeds=(2,), steps=10)
    (row,) = init_scale.run(alone, tmp_path / "i")
    (there,) = [r for r in rows if (r["tree"], r["std"], r["seed"]) == (config.tree, 0.3, 2)]
    assert there["test error"] == row["test error"] and there["steps"] == 10
    one = json.loads((tmp_path / "s" / "tree-htf-4-std-0.3-seed-2" / "config.json").read_text())
    assert one["config"]["off_tree"] == ["0,2", "0,3"] and one["experiment"] == "dynamics"
    code, out, err = call(capsys, "plot", str(tmp_path / "s"), "--figure", str(tmp_path / "p.png"))
    assert code == 0 and (tmp_path / "p.png").stat().st_size > 1000, err


def test_locality_on_the_command_line(capsys, tmp_path):
    options = ["--set", "tiny", "--arm", "plain,igc", "--distance", "24", "--seed", "1,2", "--lr",
               "0.05,1e30", "--epochs", "2", "--workers", "0", "--retries", "0", "--no-progress"]  # fmt: skip
    code, out, err = call(capsys, "sweep", "locality", *options, "--out", str(tmp_path / "s"))
    assert code == 1 and "4 runs, 4 of them now" in out
    assert "4 of 8 runs failed" in err and "igc-24-seed-2-lr-1e+30: DataError: the loss" in err
    about = json.loads((tmp_path / "s" / "config.json").read_text())
    assert [(row["arm"], row["lr"], row["seeds"]) for row in about["table"]] == [
        ("plain", 0.05, 2), ("igc", 0.05, 2),
    ]  # fmt: skip
    assert about["table"][1]["cost"] > 0 and about["fields"] == ["arm", "distance", "lr", "seed"]
    (tmp_path / "s" / "locality.png").unlink()
    code, _, err = call(capsys, "plot", str(tmp_path / "s"))
    assert code == 0 and (tmp_path / "s" / "locality.png").exists(), err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["locality", "--arm", "plain,none"], 1, "no arm 'none'"),
        (["locality", "--seed", "0;5"], 2, "'0;5' is not an integer or a range"),
        (["locality", "--speed", "1"], 2, "speed"),
        (["locality", "--device", "warp"], 1, "cannot use the device 'warp'"),
        (["dynamics", "--join", "full,half"], 2, "no 'half'; there is diagonal, full"),
        (["locality", "--workers", "-1"], 1, "workers must be an integer >= 0"),
        ([], 2, "locality"),
    ],
)
def test_command_line_refuses(capsys, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    found, out, err = call(capsys, "sweep", *arguments)
    text = " ".join((out + err).replace("│", " ").split())
    assert found == code and message in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["locality", "dynamics"])
def test_every_option_is_explained_once(capsys, name):
    code, out, _ = call(capsys, "sweep", name, "--help")
    lines = [line.strip("│ ") for line in out.splitlines()]
    options = [i for i, line in enumerate(lines) if re.match(r"--[a-z]", line)]
    named = [lines[i].split()[0].rstrip(",") for i in options]
    assert code == 0 and len(named) == len(set(named)) > 25
    for i in options:
        assert "(default:" in " ".join(lines[i : i + 8])
        assert len(" ".join(lines[i : i + 2]).split()) > 3


@pytest.mark.parametrize(
    "cells",
    [
        [{"a": 10**k} for k in range(3)],
        [{"a": 1, "kind": kind, "seed": s} for kind in "xyz" for s in (0, 1)],
        [{"a": 1, "seed": s} for s in range(3)],
        [{"a": 1}],
    ],
)
def test_pictures_of_any_sweep(cells, tmp_path):
    """Against numbers, names or seeds; logarithmic where values span much."""
    found = sweep.run(quick, cells, tmp_path / "s", workers=0)
    assert len(found.rows) == len(cells) and (tmp_path / "s/sweep.png").stat().st_size > 1000
