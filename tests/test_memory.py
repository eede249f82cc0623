"""How much memory there is, and what is said where it is not enough."""

import sys
from pathlib import Path

import pytest
import torch
import zoo
from refusals import refuses

from tnreg import (
    Factorization,
    ModeTree,
    OptionError,
    ShapeError,
    SizeError,
    balance_,
    completion,
    convert,
    decompose,
    spectra,
    to_cnn,
    truncate,
)
from tnreg import algebra as al
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_limit_of_the_process(monkeypatch):
    import resource

    whole = memory.available()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for limit, low, high in ((mapped + 2**30, 2**29, 2**30 + 2**28), (2**20, 0, 0), (-1, whole / 2, 2**62)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limit=limit: (limit, limit))
        assert low <= memory.available() <= high


def model(tree, size, rank, join="diagonal"):
    return Factorization(ModeTree(tree), size, rank, join=join)


STAR, QUAD, TRAIN = ModeTree.star, ModeTree.binary(4), ModeTree.caterpillar(4)
SPARSE = torch.zeros(99, 99, 99).to_sparse()
WIDE, CORE, MIXED = model(QUAD, 30, 40, "full"), model(STAR(4), 3, 7, "full"), model(QUAD, 30, 40)
CP, LONG, NESTED = model(STAR(12), 4, 3), model(STAR(70), 2, 1), model([list(range(7)), 7], 2, 5)
UNEVEN = model(TRAIN, (2, 2, 200, 2), {0: 1, 1: 1, (0, 1): 1, 2: 1, (0, 1, 2): 600, 3: 1}, "full")
CORE_OF_7, TRAIN_OF_99 = model(STAR(6), 3, 7, "full"), model(TRAIN, 3, 99, "full")
LEAFY = model(QUAD, 999, 9)
BARE = Factorization(QUAD, 999, {(0, 1): 1, (2, 3): 1, 1: 999, 3: 999}, leaves={0: "bare", 2: "bare"})


def refused(call):
    """Call with 100 kB to spend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "NEVER_MIND", 0)
        patch.setattr(memory, "available", lambda device: 100_000)
        call()


test_what_does_not_fit = refuses([
    (lambda: model(QUAD, 4, 8000, "full"), "a factorization: its weights would not fit"),
    (lambda: model(STAR(63), 2, 1, "full"), "an array of 65 axes; torch has no more than 64"),
    (lambda: Factorization.from_weights(QUAD, WIDE.weights), "a factorization: its weights would not fit"),
    (lambda: truncate(CP, rtol=1e-12), "12 children, would not fit"),
    (lambda: truncate(LONG, rtol=0.1), "70 children, would need an array of 66 axes"),
    (lambda: truncate(MIXED), "the frames of a factorization would not"),
    (lambda: spectra(MIXED.double()), "the frames of a factorization would not"),
    (lambda: al.full_joins(CP), "a full join: its weight would not fit"),
    (lambda: al.full_joins(LONG), "a full join: its weight would need an array of 70 axes"),
    (lambda: al.add(CORE, CORE), "add: the sum would not fit"),
    (lambda: al.add(WIDE, MIXED), "add: the sum would not fit"),
    (lambda: al.linear_combination([CORE, CORE], rtol=0.1), "an inner product would not fit"),
    (lambda: al.hadamard(CORE, CORE), "hadamard: the exact product would not fit"),
    (lambda: al.hadamard(WIDE, WIDE, rtol=0.1), "a product of weights would not fit"),
    (lambda: model(STAR(2), 2, 200).norm(), "an inner product would not fit"),
    (lambda: al.diagonal_joins(CORE), "diagonal_joins: the weights below"),
    (lambda: al.reroot(NESTED, NESTED.tree.interior[0]), "a full join: its weight would not fit"),
    (lambda: al.mode_product(CP, {0: torch.ones(9000, 4)}), "a product of weights would not fit"),
    (lambda: al.marginal(UNEVEN, (0, 1)), "a product of weights would not fit"),
    (lambda: convert.to_tucker(CORE_OF_7), "Tucker would not fit"),
    (lambda: convert.to_tensor_train(TRAIN_OF_99), "a core of a tensor train would not fit"),
    (lambda: al.add(BARE, LEAFY), "add: the sum would not fit"),
    (lambda: WIDE.norm(), "an inner product would not fit"),
    (lambda: balance_(LEAFY), "balance_: copies of the weights would not fit"),
    (lambda: to_cnn(WIDE), "a network: its filters would not fit"),
    (lambda: decompose(SPARSE, STAR(3)), "a sparse tensor as a dense one would not fit"),
    (lambda: completion(SPARSE, 100), "a sparse tensor as a dense one would not fit"),
    (lambda: decompose(torch.ones(50, 50, 50), STAR(3)), "a copy in double precision would not fit"),
    (lambda: LONG.to_tensor(), "would have 70 axes"),
], by=refused, error=SizeError)  # fmt: skip


def test_orders_beyond_the_axes_of_an_array():
    """Seventy modes under one diagonal join, where no array has an axis for each."""
    for size in (1, 2):
        star, index = model(STAR(70), size, 3), torch.zeros(4, 70, dtype=torch.long)
        ones = torch.ones(4, 70, size)
        zoo.assert_close(
            star.entries(index), star(ones) if size == 1 else star(ones * ones.new_tensor([1, 0]))
        )
        assert set(spectra(star)) == set(range(70)) and to_cnn(star)(ones.mT).shape == (4,)
        zoo.assert_close(
            al.hadamard(star, al.add(star, star)).norm(), 2 * al.hadamard(star, star).norm(), 1e-5
        )
