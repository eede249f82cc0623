"""Several processes against one: penalties, trainings, and processes that end before their time.

The file is its own child: ``torchrun test_parallel.py NAME FOLDER`` runs the function NAME below in every
process, which leaves its results in FOLDER for the tests to compare with one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_regularizers import PAIR, batch, network
from torch.nn.parallel import DistributedDataParallel

from tnreg.errors import OptionError, ShapeError
from tnreg.parallel import Processes, joined, unwrapped
from tnreg.patches import DifferingPatches, FixedPatches, PresetPatches, RandomPatches
from tnreg.regularizers import InputGradientChange, InteractionEnergy, _own_values

BOXES = [(0, 0, 3, 3), (4, 5, 7, 8), (0, 4, 3, 8)]


def torchrun(count, *words, check=True):
    """Start so many processes on this machine and wait for them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stderr
    return done


class Brightest:
    """A sampler as users write them: J lies where the first of its images has its largest value."""

    def draw(self, x):
        place = int(x[0, 0].argmax())
        top, left = min(place // x.shape[-1], 5), min(place % x.shape[-1], 6)
        return torch.tensor(
            [[7, 0, 8, 9] if top < 5 else [0, 0, 1, 9], [top, left, top + 3, left + 3]]
        )

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
        value = penalty(given, x, y)
        # the wrapper averages gradients only after a forward pass of its own
        (given(x).sum() * 0 + value).backward()
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
        for penalty, images in ((kind(PAIR), x[:rank]), (kind(PAIR, statistics="batch"), x)):
            try:
                penalty(ddp, images, y[: len(images)])
            except (OptionError, ShapeError) as error:
                said.append(str(error))
        if rank == 0:
            assert kind(PAIR, weight=0.0)(ddp, x, y) == 0
            mine = kind(PAIR)(ddp.module, x, y)
            assert mine == kind(PAIR)(net_of(3), x, y)
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


def test_parts_are_contiguous_and_as_equal_as_can_be():
    for total, count in ((10, 3), (2, 5), (0, 2), (64, 1)):
        parts = [Processes(rank, count).part(total) for rank in range(count)]
        assert [i for part in parts for i in range(total)[part]] == list(range(total))
        sizes = [part.stop - part.start for part in parts]
        assert sizes == Processes(0, count).parts(total) == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


def test_a_process_without_a_share_of_the_energy_has_a_graph():
    """Else DistributedDataParallel would wait for its gradients for ever."""
    net, (x, _) = net_of(1), batch(2)
    mask = torch.tensor(PAIR[1])
    every = [_own_values(net, x, mask, Processes(rank, 6)) for rank in range(6)]
    assert [len(values) for values in every] == [1] * 6
    assert all(values.requires_grad for values in every)
    alone = _own_values(net, x, mask, Processes())
    assert torch.allclose(torch.cat(every[:4]), alone)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
