"""The command for a GPU, rehearsed on the CPU: its stages, and that none of them costs another."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from clock import deadline_after

import tnreg
from tnreg.experiments import locality

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import gpu
from gpu_stages import child, correct, pathfinder, waiting
from gpu_stages.bench import Bench

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"

# What a stage may do; every one leaves a line in a file beside its module.
STAGES = {
    "fine": 'bench.add(number=1.5, ok=True, nested={"a": 2})',
    "raises": 'bench.add(number=2.5)\n    raise ValueError("nothing to measure")',
    "crashes": "bench.add(number=3.5)\n    os._exit(3)",
    "empty": "os._exit(4)",
    "hangs": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    asleep = subprocess.Popen(['sleep', '600'])\n"
        "    bench.add(number=4.5, asleep=asleep.pid)\n"
        "    time.sleep(600)"
    ),
}


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """A function that makes stages of the table above; no process looks at the machine or waits."""
    machine = {"device": "a processor", "torch": torch.__version__}
    monkeypatch.setattr(gpu, "_machine", lambda rehearse, environment: machine)
    monkeypatch.setattr(gpu, "PATIENCE", 0.3)
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def make(name, budget=300.0, body=None, **more):
        (folder / f"stage_{name}.py").write_text(
            "import os, signal, subprocess, time\nfrom pathlib import Path\n\n\n"
            "def run(bench):\n"
            "    with Path(__file__).with_suffix('.calls').open('a') as calls:\n"
            "        print(bench.name, file=calls)\n"
            f"    {body or STAGES[name]}\n"
        )
        return gpu.Stage(name, f"stage_{name}", budget, 1, f"a stage that {name}", **more)

    return make


def calls_of(tmp_path, name):
    file = tmp_path / "modules" / f"stage_{name}.calls"
    return len(file.read_text().splitlines()) if file.exists() else 0


def found_in(folder, name):
    return json.loads((folder / f"gpu-{name}.json").read_text())


def run(stages, out, *arguments):
    return gpu.main(["--rehearse", "--out", str(out), *arguments], stages)


def check_whole(found, name):
    assert found["stage"] == name and found["complete"] is True and "error" not in found
    assert found["rehearsal"] is True and found["torch"] == torch.__version__
    assert found["figures"]


def test_rehearsal_of_every_stage(tmp_path, monkeypatch, capfd):
    """With ten times the budgets, which are those of a GPU: this machine may be busy. The laws first."""
    monkeypatch.chdir(tmp_path)
    table = [dataclasses.replace(one, budget=10 * one.budget) for one in gpu.STAGES]
    assert run(table, "out", "--budget", "5400", "--only", "correct") == 0
    text = capfd.readouterr()
    assert text.err == "" and "ok True" in text.out and "complete" in text.out
    figures = found_in(tmp_path / "out", "correct")["figures"]
    assert figures["ok"] is True and figures["failed"] == [] and figures["errors"] == {}
    for rows in figures["laws"].values():
        assert "float32" in rows
        assert all(0 <= row["deviation"] <= row["bound"] for row in rows.values())
    assert figures["laws"]["dense tensor"]["float32"]["deviation"] > 0  # it is another precision
    assert not any("error" in line for path in figures["host reads"].values() for line in path)
    assert not any(figures["host reads"][path] for path in ("forward", "ConvNet", "dense tensor"))
    assert run(table, "out", "--budget", "5400") == 0, capfd.readouterr()
    for one in table:
        check_whole(found_in(tmp_path / "out", one.name), one.name)


def test_every_stage_fails(stage, tmp_path, capsys):
    """Three ways to fail and one that is killed; what follows them is run."""
    table = [stage("raises"), stage("crashes"), stage("hangs", budget=0.5), stage("empty")]
    assert run(table, tmp_path) == 1
    found = {one.name: found_in(tmp_path, one.name) for one in table}
    assert not any(one["complete"] for one in found.values())
    assert found["raises"]["figures"] == {"number": 2.5}
    assert found["raises"]["error"].splitlines()[-1] == "ValueError: nothing to measure"
    assert found["crashes"]["figures"] == {"number": 3.5}
    assert found["crashes"]["error"] == "exit code 3"
    assert found["hangs"]["error"].startswith("killed after ")
    assert found["empty"]["error"] == "exit code 4" and found["empty"]["figures"] == {}
    assert all(one["torch"] == torch.__version__ for one in found.values())
    text = capsys.readouterr().out
    assert "ValueError: nothing to measure" in text
    assert "not complete: raises, crashes, hangs, empty; the same command goes on" in text


def test_killed_stage_keeps_its_figures(stage, tmp_path, monkeypatch):
    """It ignores the request to end and has a process of its own: both are gone, the next stage is run."""
    out = tmp_path / "out"

    class Impatient(subprocess.Popen):
        """Its budget is over as soon as the stage has figures, whatever the clock says."""

        def wait(self, timeout=None):
            if '"name": "hangs"' not in str(self.args) or self.poll() is not None:
                return super().wait(timeout)
            while not (out / "gpu-hangs.json").exists():
                time.sleep(0.02)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess, "Popen", Impatient)
    assert run([stage("hangs"), stage("fine")], out) == 1
    found = found_in(out, "hangs")
    assert found["complete"] is False and found["error"] == "killed after 300 s"
    assert found["figures"]["number"] == 4.5
    assert gone(found["figures"]["asleep"])
    check_whole(found_in(out, "fine"), "fine")
    assert sorted(file.name for file in out.iterdir()) == ["gpu-fine.json", "gpu-hangs.json"]


def test_every_stage_is_killed_by_its_budget(stage, tmp_path):
    """The real ones, before they have figures; what comes after them is there."""
    table = [dataclasses.replace(one, budget=0.2, estimate=0.1) for one in gpu.STAGES]
    assert run([*table, stage("fine")], tmp_path) == 1
    for one in table:
        found = found_in(tmp_path, one.name)
        assert found["complete"] is False and found["error"] == "killed after 0 s"
    check_whole(found_in(tmp_path, "fine"), "fine")


def gone(process):
    file = Path(f"/proc/{process}/stat")
    return not file.exists() or file.read_text().rsplit(")", 1)[1].split()[0] in "ZX"


def test_goes_on_from_what_is_there(stage, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    assert run([stage("fine"), stage("raises")], out) == 1
    text = capsys.readouterr().out
    assert "number 1.5, ok True, nested: a 2" in text

    table = [stage("fine"), stage("raises", body="bench.add(number=9)")]
    assert run(table, out) == 0
    assert (calls_of(tmp_path, "fine"), calls_of(tmp_path, "raises")) == (1, 2)
    found = found_in(out, "raises")
    assert found["complete"] is True and found["figures"] == {"number": 9} and "error" not in found
    assert "figures of an earlier try" not in found
    assert "complete before, on " in capsys.readouterr().out

    # in a folder of an earlier command, on another device
    held = found_in(out, "fine")
    (out / "gpu-fine.json").write_text(json.dumps({**held, "device": "another device"}))
    assert run(table, other, "--before", str(out)) == 0
    assert "complete before, on another device" in capsys.readouterr().out
    assert not list(other.iterdir())
    # figures of a GPU are not those of a rehearsal
    (out / "gpu-fine.json").write_text(json.dumps({**held, "rehearsal": False}))
    assert run(table[:1], other, "--before", str(out)) == 0
    assert calls_of(tmp_path, "fine") == 2
    assert run(table[:1], other, "--before", str(out), "--again") == 0
    assert calls_of(tmp_path, "fine") == 3


def test_crash_at_once_keeps_figures_of_an_earlier_try(stage, tmp_path):
    out = tmp_path / "out"
    assert run([stage("crashes")], out) == 1
    assert run([stage("crashes", body="bench.add(number=7)\n    os._exit(5)")], out) == 1
    found = found_in(out, "crashes")
    assert found["figures"] == {"number": 7}
    assert found["figures of an earlier try"] == {"number": 3.5}
    for body in (None, "os._exit(5)"):
        assert run([stage("crashes", body=body)], out) == 1
    found = found_in(out, "crashes")
    assert found["error"] == "exit code 5; these are of an earlier try"
    assert found["complete"] is False and found["figures"] == {"number": 3.5}


def test_what_a_stage_is_given(stage, tmp_path):
    """Its folder stays if something is in it, and it knows where earlier commands left theirs."""
    body = (
        "(bench.folder / 'state').write_text('1')\n"
        "    bench.add(before=list(map(str, bench.before)), folder=str(bench.folder), left=bench.left())"
    )
    out = tmp_path / "out"
    more = ["--before", str(tmp_path), "--budget", "200"]
    assert run([stage("fine", body=body)], out, *more) == 0
    figures = found_in(out, "fine")["figures"]
    assert figures["before"] == [str(out), str(tmp_path)]
    assert figures["folder"] == str(out / "fine") and (out / "fine" / "state").exists()
    assert 0 < figures["left"] < 200


def test_not_begun_without_time(stage, tmp_path, capsys):
    late = stage("fine", least=120)
    assert gpu.main(["--out", str(tmp_path / "out"), "--budget", "60"], [late]) == 1
    assert "left, it needs 120" in capsys.readouterr().out
    assert not (tmp_path / "out" / "gpu-fine.json").exists() and not calls_of(tmp_path, "fine")
    assert run([late], tmp_path / "out", "--budget", "60") == 0  # a rehearsal begins it


def test_only_and_list(stage, tmp_path, capsys):
    out = tmp_path / "out"
    table = [stage("raises"), stage("fine"), stage("crashes")]
    assert run(table, out, "--list") == 0
    text = capsys.readouterr().out
    assert "a stage that raises" in text and "complete" not in text and not out.exists()
    assert run(table, out, "--only", "fine") == 0
    assert [file.name for file in out.iterdir()] == ["gpu-fine.json"]
    capsys.readouterr()
    assert run(table, out, "--list", "--only", "fine, crashes") == 0
    text = capsys.readouterr().out
    assert "complete in" in text and "crashes" in text and "raises" not in text


def test_stages_fit_into_one_command():
    page = (ROOT / "docs" / "gpu.md").read_text()
    for stage in gpu.STAGES[:6]:
        assert f"| `{stage.name}` | {stage.budget} | {stage.estimate} |" in page
    names = [stage.name for stage in gpu.STAGES]
    assert len(set(names)) == len(names)
    assert sum(stage.budget for stage in gpu.STAGES[:6]) <= 540
    assert all(stage.estimate <= stage.budget for stage in gpu.STAGES)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "corect"], "--only: there is no stage 'corect'; there are correct, plans"),
        (["--budget", "0"], "--budget must be a number of seconds > 0, found 0"),
        (["--budget", "nan"], "--budget must be a number of seconds > 0, found nan"),
        (["--budget", "soon"], "invalid float value: 'soon'"),
        (["--before", "nowhere"], "--before: there is no folder nowhere"),
        (["--out", str(SCRIPT)], "is a file"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments(capsys, arguments, told):
    with pytest.raises(SystemExit) as stop:
        gpu.main(arguments)
    assert stop.value.code == 2
    text = capsys.readouterr()
    assert text.err.count("error:") == 1 and told in text.err and text.out == ""


def test_rehearsal_keeps_figures_of_a_gpu(tmp_path, capsys):
    (tmp_path / "gpu-plans.json").write_text('{"rehearsal": false, "complete": true}')
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--out", str(tmp_path)])
    assert "would write over the figures" in capsys.readouterr().err


def test_without_a_gpu(tmp_path, monkeypatch):
    """The script itself, from another folder."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    call = [sys.executable, str(SCRIPT), "--out", "out"]
    ended = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2 and ended.stdout == "" and not (tmp_path / "out").exists()
    assert ended.stderr.count("\n") == 1 and "torch sees no CUDA device here" in ended.stderr


def test_wheels_of_what_is_missing(tmp_path, monkeypatch):
    """Unpacked if nothing of that name can be imported, and behind everything else."""
    wheels, site = tmp_path / ".wheels", tmp_path / "site"
    wheels.mkdir(), site.mkdir()
    for name in ("Certainly_missing", "tnreg", "numpy"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name.lower()}/__init__.py", "here = True\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", "mine")
    environment = gpu._environment(site)
    assert [file.name for file in site.iterdir()] == ["certainly_missing"]
    assert environment["PYTHONPATH"].split(os.pathsep)[2:] == ["mine", str(site)]
    call = [sys.executable, "-c", "import certainly_missing; print(certainly_missing.here)"]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n"


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(child, "NEEDED", ("torch", "certainly_missing", "tyrannosaur"))
    told = child.machine_of("cpu")["error"]
    assert told.startswith("certainly_missing, tyrannosaur cannot be imported")
    assert "make gpu-wheels" in told


def test_wheels_are_those_of_the_tests():
    """Nothing that is needed is left out, and versions are pinned, here or in constraints.txt."""
    makefile = (ROOT / "Makefile").read_text()
    wheels = makefile.split("GPU_WHEELS := ")[1].split("\n\n")[0].replace("\\\n", " ").split()
    pinned = (ROOT / "constraints.txt").read_text()
    assert {"tensornetwork", "tyro"} < {wheel.split("==")[0] for wheel in wheels}
    assert all("==" in wheel or f"\n{wheel}==" in pinned for wheel in wheels)
    assert ".wheels/" in (ROOT / ".gitignore").read_text().splitlines()


# Laws and reads


def test_law_that_fails_costs_no_other():
    cpu, values = torch.device("cpu"), iter([0.5, 0.25])
    cases = [correct.case_of("across", "full", torch.float64, cpu, k) for k in (0, 1)]
    row = {"deviation": 0.5, "bound": 1.0, "ok": True, "case": "across, full"}
    assert correct.tried(lambda case: next(values), cases, 1.0)[0] == row
    for wrong in (math.nan, math.inf, 2.0):
        row, error = correct.tried(lambda case, wrong=wrong: wrong, cases, 1.0)
        assert row["ok"] is False and error == ""
    row, error = correct.tried(lambda case: 1 / 0, cases, 1.0)
    assert row["ok"] is False and error.endswith("ZeroDivisionError: division by zero\n")
    assert correct.tried(lambda case: None, cases, 1.0) == (None, "")


def test_laws_see_a_wrong_device():
    """A model whose weights are off by a little more than rounding fails."""
    case = correct.case_of("uneven", "mixed", torch.float64, torch.device("cpu"))

    def failed():
        bounds = {law: correct.bound_of(law, case.dtype) for law in correct.LAWS}
        tried = {law: correct.tried(f, [case], bounds[law]) for law, f in correct.LAWS.items()}
        return {law for law, (row, _) in tried.items() if not row["ok"]}

    assert not failed()
    with torch.no_grad():
        case.model.stacks[0] += 1e-8
    # ranks do not change by so little, and errors of what is cut are measured against its own input
    blind = ("hierarchical ranks", "decompose: error over allowed", "truncate: error over allowed")
    assert failed() >= set(correct.LAWS).difference(blind)


def test_host_reads_are_seen():
    cpu, x = torch.device("cpu"), torch.arange(3.0)
    for call, names in (
        (lambda: float(x.sum()), ["_local_scalar_dense.default"]),
        (lambda: bool((x > 1).any()), ["_local_scalar_dense.default"]),
        (lambda: x.nonzero(), ["nonzero.default"]),
        (lambda: x[x > 1], ["index.Tensor"]),
        (lambda: torch.equal(x, x + 1), ["equal.default"]),
        (lambda: x.unique(), ["_unique2.default"]),
        (lambda: x + 1, []),
        (lambda: x.to("cpu", torch.float64), []),
        (lambda: x[torch.tensor([0, 2])], []),
    ):
        assert [line.split(" at ")[0] for line in waiting.host_reads(cpu, call)] == names
    model = tnreg.Factorization(tnreg.ModeTree.binary(2), 3, 2, std=1.0)
    *_, line = waiting.host_reads(cpu, model.norm)  # on a CPU it also asks for zeros
    assert line.startswith("_local_scalar_dense.default at tnreg/networks/scaled.py:")
    assert waiting.waits(cpu, lambda: x + 1) is None


def test_copies_to_the_host_are_seen():
    """The meta device has no numbers: what needs them fails, and is counted before."""
    x, y = torch.empty(3, device="meta"), torch.empty(3)
    with waiting.HostReads(x.device) as mode:
        x + 1, x.double(), y.to("meta"), x.copy_(y)
        assert not mode.found
        for read in (x.cpu, lambda: y.copy_(x), lambda: float(x.sum()), x.tolist):
            with pytest.raises((NotImplementedError, RuntimeError)):
                read()
    assert sum(mode.found.values()) == 4


def test_training_steps_read_nothing():
    """On a device without numbers: forward, loss, backward and update of all but penalties."""
    for join in correct.JOINS:
        model = correct.case_of("uneven", join, torch.float32, torch.device("meta")).model
        net = tnreg.to_cnn(model)
        x = [torch.empty(5, size, device="meta") for size in model.sizes]
        update = tnreg.GroupRMSprop([*model.parameters(), *net.parameters()])
        penalty = tnreg.LocalComponentPenalty() if join != "full" else tnreg.Factorization.to_tensor

        def step(model=model, net=net, x=x, update=update, penalty=penalty):
            update.zero_grad()
            loss = (model(x) - net(x)).square() + model.to_tensor().square().mean()
            (loss.mean() + penalty(model).sum()).backward()
            update.step()

        assert waiting.host_reads(torch.device("meta"), step) == {}


# Figure 6


def bench_in(out, *before):
    folder, file = out / "pathfinder", out / "gpu-pathfinder.json"
    folder.mkdir(parents=True)
    cpu = torch.device("cpu")
    return Bench("pathfinder", file, cpu, True, math.inf, folder, (out, *before))


def test_trainings_go_on_at_the_next_command(tmp_path, monkeypatch):
    """The state of the training that has cost most comes along, and the rows of all."""
    first = bench_in(tmp_path / "first")
    place, here = tmp_path / "there", tmp_path / "here"
    place.mkdir(), here.mkdir()
    cells = {name: pathfinder.cell_of(first, name, 3, epochs=4) for name in ("plain", "igc")}
    named = {"plain-7": cells["plain"], "igc-7": cells["igc"]}
    named["plain-9"] = {**cells["plain"], "seed": 2}
    for name, epochs in (("plain-7", 1), ("igc-7", 3), ("plain-9", 9)):
        with monkeypatch.context() as patched:
            deadline = deadline_after(epochs, patched)
            pathfinder.train_cells(place, [(name, named[name])], deadline)
    rows = {name: pathfinder._look(place, name) for name in named}
    assert [row["epochs"] for row in rows.values()] == [1, 3, 4]
    assert [name for name in rows if pathfinder._finished(rows, name)] == ["plain-9"]
    told = pathfinder._keep_state(first, place, rows)
    assert told == "igc-7; left behind, to be begun again: plain-7"
    kept = sorted(file.name for file in first.folder.iterdir())
    assert len(kept) == 2 and all(name.startswith("igc-7.") for name in kept)
    first.add(trainings=rows)

    second = bench_in(tmp_path / "second", tmp_path / "first")
    before = pathfinder._rows_of_before(second)
    assert before == json.loads(json.dumps(rows)) and before["plain-7"]["left behind"]
    pathfinder._take_states(second, here)
    pathfinder.train_cells(here, [("igc-7", named["igc-7"])], math.inf)
    row = pathfinder._look(here, "igc-7")
    assert row["finished"] and row["epochs"] == 4 and row["resumed"][0]["epoch"] == 3
    assert row["history"][:3] == before["igc-7"]["history"]
    told = pathfinder._keep_state(second, here, {"igc-7": row})
    assert told == "none: nothing is begun and not finished"
    pathfinder.draw({**before, "igc-7": row}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_training_that_does_not_end_costs_no_state(tmp_path, monkeypatch):
    """It is killed before the stage is, and the state of another one that ended in time comes along."""
    bench = dataclasses.replace(bench_in(tmp_path / "out"), rehearse=False)
    started = []

    def start(bench, place, cells, deadline):
        ((name, _),) = cells
        if name == "igc-frozen-7":  # one that has ended, its state written
            (place / "igc-frozen-7.01234567.checkpoint").write_text("{}")
            (place / "igc-frozen-7.01234567.history.csv").write_text("epoch,test accuracy\n1,0.5\n")
        call = "pass" if name == "igc-frozen-7" else "import time; time.sleep(600)"
        started.append(subprocess.Popen([sys.executable, "-c", call]))
        return started[-1]

    monkeypatch.setattr(pathfinder, "start", start)
    monkeypatch.setattr(pathfinder, "cell_of", lambda bench, arm, length: {"arm": arm, "distance": length})
    monkeypatch.setattr(pathfinder, "POLL", 0.05)
    monkeypatch.setattr(pathfinder.comparison, "_prepare", lambda *given: None)
    began = time.monotonic()

    def clock():  # passes the deadline when the second training has ended
        return began + 1000.0 * (len(started) > 1 and started[1].poll() is not None)

    monkeypatch.setattr(pathfinder.time, "monotonic", clock)
    bench.deadline = began + 500
    before = signal.getsignal(signal.SIGTERM)
    try:
        pathfinder.run(bench)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    assert (bench.folder / "igc-frozen-7.01234567.checkpoint").exists()
    assert bench.figures["state kept"] == "igc-frozen-7"
    assert bench.unfinished.startswith("the time is over")
    assert bench.figures["trainings"]["igc-frozen-7"]["epochs"] == 1


def test_settings_of_figure_6(tmp_path):
    """The published ones, but for the precision; arms differ in what they are about alone."""
    bench = dataclasses.replace(bench_in(tmp_path / "a"), rehearse=False)
    published = dataclasses.asdict(locality.SETS["pathfinder"])
    for arm, own in pathfinder.ARMS.items():
        cell = pathfinder.cell_of(bench, arm, 7)
        same = {k: v for k, v in published.items() if k in cell and k not in own}
        assert {k: cell[k] for k in same} == {**same, "precision": "bfloat16"}
        assert (cell["arm"], cell["distance"], cell["seed"]) == (own["arm"], 7, 1)
    assert {arm for arm, _ in pathfinder.WANTED} == set(pathfinder.ARMS)
    assert pathfinder.WANTED[:2] == (("plain", 7), ("igc-frozen", 7))
