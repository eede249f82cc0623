"""Several processes against one: penalties, trainings, and processes that end before their time.

The file is its own child: ``torchrun test_parallel.py NAME FOLDER`` runs the function NAME below in every
process.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_regularizers import PAIR, Rank, batch, network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from tnreg import Factorization, ModeTree, Trajectory, completion, images, spectra, to_cnn
from tnreg.cli import main
from tnreg.errors import DataError, FileError, OptionError, ShapeError
from tnreg.experiments.locality import train as locality_run
from tnreg.experiments.locality.settings import Settings
from tnreg.experiments.locality.train import train
from tnreg.far.interaction import InteractionEnergy, _all_crossed_values
from tnreg.far.patches import DifferingPatches, FixedPatches, PresetPatches, RandomPatches
from tnreg.far.regularizers import InputGradientChange
from tnreg.machine.processes import Processes, joined, unwrapped

pytestmark = pytest.mark.slow

BOXES = [(0, 0, 3, 3), (4, 5, 7, 8), (0, 4, 3, 8)]


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


SAMPLERS = {
    "fixed": lambda seed: FixedPatches(PAIR),
    "preset": lambda seed: PresetPatches(BOXES, seed=seed),
    "anywhere": lambda seed: RandomPatches(3, seed=seed),
    "differing": lambda seed: DifferingPatches(2, 1, threshold=1.0, seed=seed),
    "a user's": lambda seed: Brightest(),
}
UNEVEN, ONES = (2, 1, 4), (1, 1, 1)
CASES = {  # sampler, options, classes, sizes of the processes' batches
    "change": ("fixed", {}, 1, UNEVEN),
    "change, classes, batches of one": ("anywhere", {}, 3, ONES),
    "change, preset": ("preset", {"weight": 0.5, "warmup": 4, "every": 2}, 3, UNEVEN),
    "change, differing": ("differing", {}, 1, UNEVEN),
    "change, of a user": ("a user's", {}, 3, UNEVEN),
    "change, above the target": ("fixed", {"target": 0.05}, 1, UNEVEN),
    "change, below the target": ("fixed", {"target": 0.999}, 1, UNEVEN),
    "energy": ("fixed", {}, 1, UNEVEN),
    "energy, classes, batches of one": ("anywhere", {}, 3, ONES),
    "energy, three of the batch": ("preset", {"samples": 3, "weight": 0.5}, 3, UNEVEN),
    "energy, differing": ("differing", {"samples": 4}, 1, UNEVEN),
    "energy, of a user": ("a user's", {"samples": 4}, 3, UNEVEN),
    "energy, above the target": ("fixed", {"target": 0.05}, 3, UNEVEN),
    "energy, below the target": ("fixed", {"target": 0.999}, 3, UNEVEN),
    "rank, classes, batches of one": ("anywhere", {}, 3, ONES),
    "rank, differing": ("differing", {"samples": 4, "target": 0.1}, 1, UNEVEN),
    "rank, below the target": ("fixed", {"target": 0.999}, 3, UNEVEN),
}


def penalty_of(name, seed):
    sampler, options, *_ = CASES[name]
    kind = {"energy": InteractionEnergy, "rank": Rank}.get(name.split(",")[0], InputGradientChange)
    seeds = {} if kind is InputGradientChange else {"seed": seed}
    return kind(SAMPLERS[sampler](seed), **options, **seeds)


def net_of(classes):
    return network(smooth=True, classes=classes, norm=True, seed=3).eval()


def three_calls(penalty, net, wrapped, x, y):
    """Values and gradients of three calls in a row with the network or its wrapper; the state after them."""
    calls = []
    for _ in range(3):
        net.zero_grad()
        # the wrapper averages gradients only after a forward pass of its own; it writes buffers of the
        # batch norm, so that it comes first
        nothing = wrapped(x).sum() * 0
        value = penalty(wrapped, x, y)
        (nothing + value).backward()
        calls.append((value.detach(), [p.grad.clone() for p in net.parameters()]))
    return calls, penalty.state_dict()


def penalties():
    """Every case in groups of two and of three of the three processes, with other seeds on each."""
    checked = 0
    with joined() as everyone:
        for count in (2, 3):
            group = dist.new_group(list(range(count)))
            if everyone.rank < count:
                for name in CASES:
                    ddp = check_penalty(name, everyone.rank, count, group)
                    checked += 1
                check_others(count, everyone.rank, ddp)
        print(f"rank {everyone.rank} checked {checked}")


def check_penalty(name, rank, count, group):
    """A process with its part of the batch has values and gradients of the whole; return its wrapper."""
    *_, classes, lengths = CASES[name]
    net, lengths = net_of(classes), lengths[:count]
    whole = batch(sum(lengths))
    expected, state = three_calls(penalty_of(name, 0), net, net, *whole)
    ddp = DistributedDataParallel(net, process_group=group)
    calls, own = three_calls(penalty_of(name, rank), net, ddp, *(t.split(lengths)[rank] for t in whole))
    for (value, gradients), (right, wanted) in zip(calls, expected, strict=True):
        assert_close(value, right, rtol=1e-12, atol=0, msg=lambda text: f"{name}: {text}")
        assert_close(gradients, wanted, rtol=1e-9, atol=1e-13, msg=lambda text: f"{name}: {text}")
    assert own["calls"] == 3
    assert rank or str(own) == str(state)
    pulled = max(float(g.abs().max()) for _, gradients in expected for g in gradients)
    assert (pulled > 1e-4) == ("below" not in name), name
    return ddp


def check_others(count, rank, ddp):
    """What goes wrong goes wrong on all; what needs no other process waits for none."""
    x, y = batch(3)
    empty = re.escape(f"found {list(range(count))} on ranks")
    for kind in (InputGradientChange, InteractionEnergy):
        for penalty, part, error, message in (
            (kind(PAIR), x[:rank], ShapeError, empty),
            (kind(PAIR, statistics="batch"), x, OptionError, "statistics of one process's part"),
            (kind(PAIR), x.clone().requires_grad_(), OptionError, "images that require gradients"),
        ):
            with pytest.raises(error, match=f"{kind.__name__}: .*{message}"):
                penalty(ddp, part, y[: len(part)])
        if rank == 0:
            assert kind(PAIR, weight=0.0)(ddp, x, y) == 0
            assert kind(PAIR)(ddp.module, x, y) == kind(PAIR)(net_of(3), x, y)
    with pytest.MonkeyPatch.context() as patched:
        patched.delattr(Processes, "rows")  # samplers that look at the shape are sent no images
        for sampler in (FixedPatches(PAIR), PresetPatches(BOXES), RandomPatches(2)):
            assert InputGradientChange(sampler)(ddp, x, y) > 0
    assert unwrapped(SimpleNamespace(_orig_mod=ddp)) == unwrapped(ddp)
    assert unwrapped(ddp)[1].count == count


def test_penalties_are_those_of_the_whole_batch():
    told = re.findall(r"rank (\d) checked (\d+)", torchrun(3, __file__, "penalties").stdout)
    both, one = str(2 * len(CASES)), str(len(CASES))
    assert sorted(told) == [("0", both), ("1", both), ("2", one)]


def check_factorization(everyone):
    """Tasks of one half each: gradients are those of the whole, and every answer that of one model."""
    tree, seed = ModeTree.binary(4), torch.Generator().manual_seed
    model = Factorization(tree, (2, 3, 5, 7), 3, std=0.7, dtype=torch.float64, generator=seed(0))
    target = Factorization(tree, model.sizes, 2, std=1.0, dtype=torch.float64, generator=seed(1))
    whole = completion(target, 40)
    parts = [
        completion(index=whole.index[half], values=whole.values[half], sizes=whole.sizes,
                   test_index=whole.test_index, test_values=whole.test_values)
        for half in (slice(20), slice(20, 40))
    ]  # fmt: skip
    wanted, values = model.grad_by_node(whole.loss(model)), model.entries(whole.index)
    dense, sizes, error = model.to_tensor(), spectra(model), whole.test_error(model)
    task = parts[everyone.rank]
    mesh = init_device_mesh("cpu", (2,))
    for wrap in (DistributedDataParallel, lambda model: fully_shard(model, mesh=mesh)):
        inner = copy.deepcopy(model)
        wrapped = wrap(inner)
        with torch.no_grad():
            assert_close(wrapped(whole.index), values)
        task.loss(wrapped).backward()
        assert_close(dict(inner.gradients), dict(wanted))
        assert_close(inner.entries(whole.index), values)
        assert task.test_error(wrapped) == pytest.approx(error)
        if wrapped is inner:
            assert_close(wrapped.norm(), dense.norm())
            assert_close(wrapped.to_tensor(), dense)
            assert_close(dict(spectra(wrapped)), dict(sizes))
            with pytest.raises(OptionError, match="it is sharded"):
                wrapped.load_weights(model.weights)
            with pytest.raises(OptionError, match="sharded over processes: its nodes cannot"):
                wrapped.parameter_groups({(0, 1): None})
    net = to_cnn(model, shape=(2, 2))
    weights, x = dict(net.weights), [torch.ones(2, n, dtype=torch.float64) for n in model.sizes]
    expected = net(x)
    fully_shard(net, mesh=mesh)
    assert_close(dict(net.weights), weights)
    with pytest.raises(OptionError, match="register_fsdp_forward_method"):
        net.scaled_values(x)
    assert_close(net(x), expected)


def sharded():
    """Interaction energy of networks under ``fully_shard``; what the other penalty and other meshes say."""
    with joined() as everyone:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
        for classes, stay in itertools.product((1, 3), (True, False)):
            lengths, net, sharded = (2, 4), net_of(classes), net_of(classes)
            fully_shard(sharded[0], reshard_after_forward=not stay)
            fully_shard(sharded, reshard_after_forward=not stay)
            x, y = batch(6)
            expected = InteractionEnergy(DifferingPatches(2), samples=5)(net, x, y)
            expected.backward()
            x, y = (t.split(lengths)[everyone.rank] for t in (x, y))
            penalty = InteractionEnergy(
                DifferingPatches(2, seed=everyone.rank), samples=5, seed=everyone.rank
            )
            found = penalty(sharded, x, y) if classes > 1 else penalty(sharded, x)
            (found + 0 * sharded(x).sum()).backward()
            assert_close(found, expected, rtol=1e-12, atol=0)
            gradients = [p.grad.full_tensor() for p in sharded.parameters()]
            assert_close(gradients, [p.grad for p in net.parameters()], rtol=1e-9, atol=1e-13)
            with pytest.raises(OptionError, match="InputGradientChange: fully_shard lets go of weights"):
                InputGradientChange(PAIR)(sharded, x, y)
        other = net_of(1)
        fully_shard(other, mesh=mesh)
        with pytest.raises(OptionError, match="needs a mesh of one axis"):
            InteractionEnergy(PAIR)(other, x)
        check_factorization(everyone)
        print("checked", everyone.rank)


def test_what_is_sharded_is_as_the_whole():
    assert torchrun(2, __file__, "sharded").stdout.count("checked") == 2


def test_a_process_without_a_share_of_the_energy_has_a_graph(monkeypatch):
    """Else DistributedDataParallel would wait for its gradients for ever."""
    net, (x, _), box = net_of(1), batch(2), torch.tensor(PAIR[1])
    monkeypatch.setattr(Processes, "sum", lambda self, part: part)
    parts = [_all_crossed_values(net, x, x, box, Processes(rank, 6)) for rank in range(6)]
    assert [int((part != 0).sum()) for part in parts] == [1, 1, 1, 1, 0, 0]
    assert all(part.requires_grad for part in parts)
    assert torch.allclose(sum(parts), _all_crossed_values(net, x, x, box, Processes()))


# 130 images in batches of 33 and 31: four steps an epoch, with unequal parts for two processes
TWENTY = Settings(
    epochs=5, test_every=2, batch=33, lr=0.02, precision="float64", augment="mixup", igc_every=1,
    igc_target=0.2, interaction_until=18, interaction_target=0.0,
)  # fmt: skip
ARMS = ("plain", "sam", "igc", "interaction")
LONG = [
    "run", "locality", "--set", "tiny", "--arms", "igc", "--distances", "0", "--seeds", "1",
    "--epochs", "6", "--batch", "16", "--precision", "float64", "--no-progress",
]  # fmt: skip
LONG_NAME = "igc-0-seed-1"


def pairs():
    counts = {"train": 130, "test": 51}
    return [images.is_same_class(n, distance=0, seed=1, split=s) for s, n in counts.items()]


def trainings(folder):
    """Whole trainings, a cut one, and errors, in one start of two processes."""
    data, test = pairs()

    def run(name, arm="plain", **changes):
        settings = dataclasses.replace(TWENTY, **changes)
        return train(settings, arm, 1, data, test, f"{folder}/{name}")

    with joined() as everyone:
        summaries = [run(arm, arm) for arm in ARMS]
        assert everyone.from_first(lambda: summaries) == summaries
        run("dropout", "dropout")
        epoch = locality_run._State.epoch

        def until_two(self):
            if len(self.rows) == 2:
                masks = everyone.gather(torch.get_rng_state())
                assert not torch.equal(masks[0], masks[1])
                raise KeyboardInterrupt
            return epoch(self)

        with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(locality_run._State, "epoch", until_two)
            run("cut", "dropout")
        run("cut", "dropout")
        for name, changes, error, message in (
            ("batches", {"batch": 1}, OptionError, "take e.g. batch 2"),
            ("normal", {"model": "resnet-18"}, OptionError, "has batch normalization"),
            ("infinite", {"lr": 1e30, "precision": "float32"}, DataError, "not finite in epoch 1"),
            ("garbage", {}, FileError, "^not a checkpoint"),
        ):
            with pytest.raises(error, match=message):
                run(name, **changes)
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
    ended = torchrun(2, __file__, "trainings", folder)
    assert ended.stdout.count("wrote ") == 1  # rank 0 alone prints
    assert ended.stderr.count("was made with other settings") == 1
    assert ended.stderr.count("2 of 4 trainings failed") == 1
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, expected, tolerance):
    """The double-precision weights of two run folders."""
    there, wanted = weights(folder), weights(expected)
    assert {value.dtype for value in wanted.values()} == {torch.float64}
    assert_close(there, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("arm", ARMS)
def test_twenty_steps_are_those_of_one_process(trained, arm, tmp_path):
    summary = train(TWENTY, arm, 1, *pairs(), tmp_path / arm)
    assert_same_weights(trained / arm, tmp_path / arm, 1e-10)
    there = json.loads((trained / arm / "config.json").read_text())["summary"]
    assert (there["processes"], summary["processes"]) == (2, 1)
    for key in ("loss", "penalty", "train accuracy", "test accuracy", "epochs"):
        assert there[key] == pytest.approx(summary[key], rel=1e-9)
    assert (summary["penalty"] > 0) == (arm in ("igc", "interaction"))
    if arm != "plain":
        plain = weights(trained / "plain")["head.weight"]
        assert not torch.allclose(plain, weights(tmp_path / arm)["head.weight"], atol=1e-4)


def test_resumed_with_the_masks_of_all_processes(trained):
    assert_same_weights(trained / "cut", trained / "dropout", 0)


def test_a_training_that_fails_does_not_stop_the_others(trained):
    there = sorted(path.name for path in (trained / "failing").glob("*-[12]"))
    assert there == ["plain-0-seed-1", "plain-0-seed-2"]
    assert not any((trained / name).exists() for name in ("batches", "normal", "infinite"))


def test_a_last_batch_that_is_too_small():
    check = locality_run._check_batches
    for count, size, processes, message in (
        (130, 32, 3, "leave 2 for a last batch of 3 .* take e.g. batch 31"),
        (130, 64, 4, "take e.g. batch 63"),
        (3, 64, 4, "take 3 processes or fewer"),
    ):
        with pytest.raises(OptionError, match=message):
            check(count, size, processes)
    for fits in ((130, 31, 3), (130, 63, 4), (129, 32, 3), (130, 32, 2)):  # a last one of one is left out
        check(*fits)


def ended(folder):
    """The command; amid epoch 4 process 1 is killed, while the others wait for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's may come before they have spoken
    step, done = locality_run._State.step, []

    def cut(self, *arguments, **options):
        done.append(1)
        if os.environ["RANK"] == "1" and len(done) == 14:  # of four an epoch
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments, **options)

    locality_run._State.step = cut
    main([*LONG, "--out", folder])


def test_a_killed_process(trained, tmp_path):
    """The others say what is saved, and the same command goes on, by as many processes as one likes."""
    folder = tmp_path / "long"
    done = torchrun(3, __file__, "ended", folder, check=False)
    assert done.returncode == 1
    (checkpoint,) = folder.glob(f"{LONG_NAME}.*.checkpoint")
    lines = done.stderr.splitlines()
    assert sum(line.startswith("tnreg: ProcessLost: another ") for line in lines) == 2
    message = f"  the state after epoch 3 is in {checkpoint}; the same command goes on from there"
    assert lines.count(message) == 2
    state = torch.load(checkpoint)
    assert len(Trajectory.from_bytes(state["found"].numpy().tobytes())) == 3
    assert not [path for path in folder.iterdir() if "partial" in path.name]

    one = shutil.copytree(folder, tmp_path / "one")
    main([*LONG, "--out", str(one)])
    torchrun(2, "-m", "tnreg", *LONG, "--out", folder)
    there = sorted(path.name for path in (trained / "long").iterdir())
    for place in (folder, one):
        assert sorted(path.name for path in place.iterdir()) == there
        assert_same_weights(place / LONG_NAME, trained / "long" / LONG_NAME, 1e-10)


def test_what_torchrun_must_say(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value, device, message in (
        ("WORLD_SIZE", "two", "cpu", "WORLD_SIZE must be a number, found 'two'"),
        ("WORLD_SIZE", "2", "cpu", "no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        *((name, "1", "cpu", "but there is no") for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")),
        ("LOCAL_RANK", "1", "cuda", "process 1 of this machine has no GPU: there are 1"),
        ("LOCAL_RANK", "0", "cuda:0", "write cuda, not cuda:0"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
        with pytest.raises(OptionError, match=message):
            joined(device).__enter__()


def test_other_experiments_refuse_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="1"):
        main(["run", "dynamics"])
    error = capsys.readouterr().err
    assert "started 2 processes, which work together in `tnreg run locality`" in error


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
