"""Several processes against one: penalties, trainings, and processes that end before their time.

The file is its own child: ``torchrun test_parallel.py NAME FOLDER`` runs the function NAME below in every
process, which leaves its results in FOLDER for the tests to compare with one process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_regularizers import PAIR, batch, network
from torch.nn.parallel import DistributedDataParallel

from tnreg import Trajectory, images
from tnreg.cli import main
from tnreg.errors import OptionError, ShapeError, TnregError
from tnreg.experiments.locality import train as locality_run
from tnreg.experiments.locality.settings import Settings
from tnreg.experiments.locality.train import train
from tnreg.far.patches import DifferingPatches, FixedPatches, PresetPatches, RandomPatches
from tnreg.far.regularizers import InputGradientChange, InteractionEnergy, _all_crossed_values
from tnreg.machine.processes import Processes, joined, started, unwrapped

BOXES = [(0, 0, 3, 3), (4, 5, 7, 8), (0, 4, 3, 8)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the children have; threads of several processes wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torchrun(count, *words, check=True):
    """Start so many processes on this machine and wait for them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), *map(str, words)]
    with subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as running:  # fmt: skip
        try:
            out, error = running.communicate(timeout=1200)
        except subprocess.TimeoutExpired:
            running.terminate()  # not killed: it ends its processes first
            pytest.fail(f"they wait for each other: {running.communicate()}")
    assert not check or running.returncode == 0, error
    return subprocess.CompletedProcess(command, running.returncode, out, error)


class Brightest:
    """A sampler as users write them: J lies where the first of its images has its largest value."""

    def draw(self, x):
        top, left = divmod(int(x[0, 0].argmax()), x.shape[-1])
        top, left = min(top, 5), min(left, 6)
        other = [7, 0, 8, 9] if top < 5 else [0, 0, 1, 9]
        return torch.tensor([other, [top, left, top + 3, left + 3]])

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def change(patches, **options):
    return lambda seed: InputGradientChange(patches(seed), **options)


def energy(patches, samples=8, **options):
    return lambda seed: InteractionEnergy(patches(seed), samples, seed=seed, **options)


def fixed(seed):
    return FixedPatches(PAIR)


def preset(seed):
    return PresetPatches(BOXES, seed=seed)


def anywhere(seed):
    return RandomPatches(3, seed=seed)


def differing(seed):
    return DifferingPatches(2, 1, threshold=1.0, seed=seed)


def brightest(seed):
    return Brightest()


UNEVEN, ONES = (2, 1, 4), (1, 1, 1)
CASES = {
    "change": (change(fixed), 1, UNEVEN),
    "change, classes, batches of one": (change(anywhere), 3, ONES),
    "change, preset": (change(preset, weight=0.5, warmup=4), 3, UNEVEN),
    "change, differing": (change(differing), 1, UNEVEN),
    "change, of a user": (change(brightest), 3, UNEVEN),
    "change, above the target": (change(fixed, target=0.05), 1, UNEVEN),
    "change, below the target": (change(fixed, target=0.999), 1, UNEVEN),
    "change, every second": (change(preset, every=2), 1, UNEVEN),
    "energy": (energy(fixed), 1, UNEVEN),
    "energy, classes, batches of one": (energy(anywhere), 3, ONES),
    "energy, two of the batch": (energy(preset, 2), 3, UNEVEN),
    "energy, three of the batch": (energy(preset, 3, weight=0.5), 3, UNEVEN),
    "energy, differing": (energy(differing, 4), 1, UNEVEN),
    "energy, of a user": (energy(brightest, 4), 3, UNEVEN),
    "energy, above the target": (energy(fixed, target=0.05), 3, UNEVEN),
    "energy, below the target": (energy(fixed, target=0.999), 3, UNEVEN),
}  # fmt: skip


def net_of(classes):
    return network(smooth=True, classes=classes, norm=True, seed=3).eval()


def three_calls(penalty, net, given, x, y):
    """Values and gradients of three calls in a row; ``given`` is what the penalty is given."""
    found = []
    for _ in range(3):
        net.zero_grad()
        # the wrapper averages gradients only after a forward pass of its own; it writes buffers of the
        # batch norm, so that it comes first
        nothing = given(x).sum() * 0
        value = penalty(given, x, y)
        (nothing + value).backward()
        found.append((value.detach(), [p.grad.clone() for p in net.parameters()]))
    return found, penalty.state_dict()


def penalties(folder):
    """Every case in groups of two and of three of the three processes, with other seeds on each."""
    with joined() as everyone:
        for count in (2, 3):
            group = dist.new_group(list(range(count)))
            if everyone.rank >= count:
                continue
            found = {}
            for name, (make, classes, lengths) in CASES.items():
                net = net_of(classes)
                ddp = DistributedDataParallel(net, process_group=group)
                x, y = (
                    t.split(lengths[:count])[everyone.rank] for t in batch(sum(lengths[:count]))
                )
                found[name] = three_calls(make(everyone.rank), net, ddp, x, y)
            found["refused"] = refused(count, everyone.rank, ddp)
            torch.save(found, f"{folder}/{count}-{everyone.rank}.pt")


def refused(count, rank, ddp):
    """What goes wrong goes wrong on all; what needs no other process waits for none."""
    x, y = batch(3)
    said = []
    for kind in (InputGradientChange, InteractionEnergy):
        for penalty, part in ((kind(PAIR), x[:rank]), (kind(PAIR, statistics="batch"), x)):
            try:
                penalty(ddp, part, y[: len(part)])
            except (OptionError, ShapeError) as error:
                said.append(str(error))
        if rank == 0:
            assert kind(PAIR, weight=0.0)(ddp, x, y) == 0
            mine = kind(PAIR)(ddp.module, x, y)
            assert mine == kind(PAIR)(net_of(3), x, y)
    whole, Processes.whole = Processes.whole, None  # not called by samplers that look at the shape
    for sampler in (FixedPatches(PAIR), PresetPatches(BOXES), RandomPatches(2)):
        assert InputGradientChange(sampler)(ddp, x, y) > 0
    Processes.whole = whole
    assert unwrapped(SimpleNamespace(_orig_mod=ddp)) == unwrapped(ddp)
    assert unwrapped(ddp)[1].count == count
    return said


@pytest.fixture(scope="module")
def penalized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("penalties")
    torchrun(3, __file__, "penalties", folder)
    return {
        (count, rank): torch.load(folder / f"{count}-{rank}.pt")
        for count in (2, 3)
        for rank in range(count)
    }


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_penalties_are_those_of_the_whole_batch(penalized, name, count):
    make, classes, lengths = CASES[name]
    net = net_of(classes)
    expected, state = three_calls(make(0), net, net, *batch(sum(lengths[:count])))
    pulled = False
    for rank in range(count):
        found, own = penalized[count, rank][name]
        for (value, gradients), (right, wanted) in zip(found, expected, strict=True):
            assert value.item() == pytest.approx(right.item(), rel=1e-12)
            for g, h in zip(gradients, wanted, strict=True):
                assert torch.allclose(g, h, rtol=1e-9, atol=1e-13)
                pulled |= float(h.abs().max()) > 1e-4
        assert own["calls"] == 3
        if rank == 0:
            assert str(own) == str(state)
    assert pulled != ("below" in name)


@pytest.mark.parametrize("count", [2, 3])
def test_penalties_refuse_alike(penalized, count):
    said = [penalized[count, rank]["refused"] for rank in range(count)]
    assert said.count(said[0]) == count and len(said[0]) == 4
    for kind, (empty, normalized) in (("InputG", said[0][:2]), ("Interaction", said[0][2:])):
        assert empty.startswith(kind) and f"found {list(range(count))} on ranks" in empty
        assert normalized.startswith(kind) and "statistics of one process's part" in normalized


def test_a_process_without_a_share_of_the_energy_has_a_graph(monkeypatch):
    """Else DistributedDataParallel would wait for its gradients for ever."""
    net, (x, _) = net_of(1), batch(2)
    box = torch.tensor(PAIR[1])
    own = []
    monkeypatch.setattr(Processes, "gather", lambda self, v: own.append(v) or [v] * self.count)
    values = [_all_crossed_values(net, x, box, Processes(rank, 6)) for rank in range(6)]
    assert [len(v) for v in own] == [1] * 6
    assert all(v.requires_grad and v.shape == (2, 2, 1) for v in values)
    alone = _all_crossed_values(net, x, box, Processes())
    assert torch.allclose(torch.cat(own[:4]).flatten(), alone.flatten())


# 130 images in batches of 33 and 31: four steps an epoch, with unequal parts for two processes
TWENTY = Settings(
    epochs=5, test_every=2, batch=33, lr=0.02, precision="float64", igc_every=1, igc_target=0.2,
    interaction_until=18, interaction_target=0.0,
)  # fmt: skip
ARMS = ("plain", "igc", "interaction")
LONG = [
    "run", "locality", "--set", "tiny", "--arms", "igc", "--distances", "0", "--seeds", "1",
    "--epochs", "6", "--batch", "16", "--precision", "float64", "--no-progress",
]  # fmt: skip
LONG_NAME = "igc-0-seed-1"


def pairs():
    counts = {"train": 130, "test": 51}
    return [images.is_same_class(n, distance=0, seed=1, split=s) for s, n in counts.items()]


class Cut(Exception):
    """Ends a training on all processes at once."""


def trainings(folder):
    """Whole trainings, a cut one, and errors, in one start of two processes."""
    data, test = pairs()
    told = [train(TWENTY, arm, 1, data, test, f"{folder}/{arm}") for arm in ARMS]
    with joined() as everyone:
        assert everyone.every(told) == [told, told]
        train(TWENTY, "dropout", 1, data, test, f"{folder}/dropout")
        epoch = locality_run._State.epoch

        def until_two(self, *given):
            if len(self.rows) == 2:
                raise Cut
            return epoch(self, *given)

        locality_run._State.epoch = until_two
        with pytest.raises(Cut):
            train(TWENTY, "dropout", 1, data, test, f"{folder}/cut")
        locality_run._State.epoch = epoch
        if everyone.rank == 0:
            kept = torch.load(f"{folder}/cut.checkpoint")
            assert not torch.equal(kept["random"], kept["others"][0]["random"])  # own masks
        train(TWENTY, "dropout", 1, data, test, f"{folder}/cut")
        errors = []
        for name, change in (
            ("batches", {"batch": 1}), ("normal", {"model": "resnet-18"}),
            ("infinite", {"lr": 1e30, "precision": "float32"}), ("garbage", {}),
        ):  # fmt: skip
            with pytest.raises(TnregError) as caught:
                settings = dataclasses.replace(TWENTY, **change)
                train(settings, "plain", 1, data, test, f"{folder}/{name}")
            errors.append(f"{type(caught.value).__name__}: {caught.value}")
        assert everyone.every(errors) == [errors, errors]
        if everyone.rank == 0:
            with open(f"{folder}/errors.json", "w") as file:
                json.dump(errors, file)
        main([*LONG, "--out", f"{folder}/long"])
        for out, words in (
            ("long", "--lr 0.1"), ("failing", "--seeds 1 2 --igc 1e300 --arms plain igc")
        ):  # fmt: skip  # made with other settings; one arm fails
            with pytest.raises(SystemExit, match="1"):
                main([*LONG, *words.split(), "--out", f"{folder}/{out}"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainings")
    (folder / "garbage.checkpoint").write_text("hello")
    said = torchrun(2, __file__, "trainings", folder)
    assert said.stdout.count("wrote ") == 1  # rank 0 alone prints
    assert said.stderr.count("was made with other settings") == 1
    assert said.stderr.count("2 of 4 trainings failed") == 1
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert value.dtype == torch.float64
        assert torch.allclose(found[key], value, rtol=0, atol=tolerance), key


@pytest.mark.parametrize("arm", ARMS)
def test_twenty_steps_are_those_of_one_process(trained, arm, tmp_path):
    summary = train(TWENTY, arm, 1, *pairs(), tmp_path / arm)
    assert_close(weights(trained / arm), weights(tmp_path / arm), 1e-10)
    there = json.loads((trained / arm / "config.json").read_text())["summary"]
    assert (there["processes"], summary["processes"]) == (2, 1)
    for key in ("loss", "penalty", "train accuracy", "test accuracy", "epochs"):
        assert there[key] == pytest.approx(summary[key], rel=1e-9)
    assert (summary["penalty"] > 0) == (arm != "plain")
    if arm != "plain":
        plain = weights(trained / "plain")["head.weight"]
        assert not torch.allclose(plain, weights(tmp_path / arm)["head.weight"], atol=1e-4)


def test_resumed_with_the_masks_of_all_processes(trained):
    assert_close(weights(trained / "cut"), weights(trained / "dropout"), 0)


def test_errors_before_training_are_those_of_all(trained):
    batches, normal, infinite, garbage = json.loads((trained / "errors.json").read_text())
    assert batches.startswith("OptionError") and "take e.g. batch 2" in batches
    assert normal.startswith("OptionError") and "has batch normalization" in normal
    assert infinite.startswith("DataError: the loss is not finite in epoch 1")
    assert garbage.startswith("FileError: not a checkpoint")
    assert not any((trained / name).exists() for name in ("batches", "normal", "infinite"))


def test_a_training_that_fails_does_not_stop_the_others(trained):
    there = {path.name for path in (trained / "failing").iterdir()}
    assert {name for name in there if name.endswith(("-1", "-2"))} == {
        "plain-0-seed-1", "plain-0-seed-2",
    }  # fmt: skip


def test_a_last_batch_that_is_too_small():
    for count, batch_size, processes, instead in (
        (130, 32, 3, 31),
        (130, 64, 4, 63),
        (3, 64, 4, 0),
    ):
        said = f"take e.g. batch {instead}" if instead else f"take {count} processes or fewer"
        with pytest.raises(OptionError, match=said):
            locality_run._check_batches(count, batch_size, processes)
        if instead:
            locality_run._check_batches(count, instead, processes)
    locality_run._check_batches(129, 32, 3)  # a last batch of one is left out
    locality_run._check_batches(130, 32, 2)


def ended(folder):
    """The command; amid epoch 4 process 1 is killed, while the others wait for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's may come before they have spoken
    step, done = locality_run._State.step, []

    def cut(self, *given, **named):
        done.append(1)
        kept = next(Path(folder).glob(f"{LONG_NAME}.*.checkpoint"), Path())
        again = len(done) % len(locality_run._sizes(len(self.host), self.settings.batch)) == 2
        if os.environ["RANK"] == "1" and again and kept.is_file() and len(trajectory_of(kept)) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *given, **named)

    locality_run._State.step = cut
    main([*LONG, "--out", folder])


def trajectory_of(checkpoint):
    return Trajectory.from_bytes(torch.load(checkpoint)["found"].numpy().tobytes())


def test_a_killed_process(trained, tmp_path):
    """The others say what is saved, and the same command goes on, by as many processes as one likes."""
    folder = tmp_path / "long"
    done = torchrun(3, __file__, "ended", folder, check=False)
    assert done.returncode == 1
    (kept,) = folder.glob(f"{LONG_NAME}.*.checkpoint")
    lines = done.stderr.splitlines()
    said = [line for line in lines if line.startswith("tnreg: ProcessLost: another ")]
    assert len(said) == 2
    saved = f"  the state after epoch 3 is in {kept}; the same command goes on from there"
    assert lines.count(saved) == 2
    assert len(trajectory_of(kept)) == 3 and len(torch.load(kept)["others"]) == 2
    assert not [path for path in folder.iterdir() if "partial" in path.name]

    one = shutil.copytree(folder, tmp_path / "one")
    main([*LONG, "--out", str(one)])
    torchrun(2, "-m", "tnreg", *LONG, "--out", folder)
    there = sorted(path.name for path in (trained / "long").iterdir())
    for place in (folder, one):
        assert sorted(path.name for path in place.iterdir()) == there
        assert_close(weights(place / LONG_NAME), weights(trained / "long" / LONG_NAME), 1e-10)


def test_what_torchrun_must_say(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(OptionError, match="WORLD_SIZE must be a number, found 'two'"):
        started()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        joined().__enter__()
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(OptionError, match="process 1 of this machine has no GPU: there are 1"):
        joined("cuda").__enter__()
    with pytest.raises(OptionError, match="write cuda, not cuda:0"):
        joined("cuda:0").__enter__()


@pytest.mark.parametrize("words", [["tree", "list"], ["run", "dynamics"]])
def test_other_commands_refuse_torchrun(words, monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="1"):
        main(words)
    error = capsys.readouterr().err
    assert "started 2 processes, which work together in `tnreg run locality`" in error
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="1"):
        main(words)
    assert capsys.readouterr().err == ""


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
