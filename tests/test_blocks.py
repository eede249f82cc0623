"""Tensors read block by block against the same in memory."""

import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from tnreg import Factorization, ModeTree, decompose, hierarchical_rank, spectra
from tnreg.errors import DataError, OptionError, ShapeError, SizeError
from tnreg.ranks.decompose import distance
from tnreg.tensors import blocks, passes

dask, distributed = pytest.importorskip("dask"), pytest.importorskip("distributed")
da, h5py, zarr = (pytest.importorskip(name) for name in ("dask.array", "h5py", "zarr"))

pytestmark = pytest.mark.slow

TREES = {
    "binary": (ModeTree.binary(4), (12, 11, 10, 9)),
    "across": (ModeTree([[0, 2], [1, 3]]), (12, 11, 10, 9)),
    "star": (ModeTree.star(4), (12, 11, 10, 9)),
    "caterpillar": (ModeTree.caterpillar(5), (7, 6, 5, 8, 9)),
    "small modes": (ModeTree.binary(8), (4,) * 8),
    "uneven": (ModeTree([[[0, 3], 1], [2, 4, 5]]), (5, 6, 7, 4, 3, 5)),
}


def tensor(name, dtype=torch.float64, rank=3, noise=0.0):
    tree, sizes = TREES[name]
    x = zoo.model_of(tree, sizes=sizes, bonds=rank, std=1.0, dtype=dtype).to_tensor().detach()
    rest = zoo.randn(*sizes, dtype=dtype, seed=1)
    return tree, x / x.norm() + noise * rest / rest.norm()


def in_blocks(x, parts=2):
    return da.from_array(x.numpy(), chunks=tuple(max(1, -(-n // parts)) for n in x.shape))


@pytest.fixture(autouse=True)
def _two_at_a_time():
    """What fits depends on how many tasks run at a time."""
    with dask.config.set(num_workers=2):
        yield


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
@pytest.mark.parametrize("name", TREES)
def test_as_in_memory(name, dtype):
    """Memory for a sixth of the tensor: nothing is read whole."""
    noise = 1e-4
    tree, x = tensor(name, dtype, noise=noise)
    memory = x.nbytes * 7
    assert blocks.whole(in_blocks(x), memory) is None
    for rtol, bonds in ((1e-3, 3), (0.5 * noise, None)):
        if rtol < noise and dtype != torch.float64:
            continue
        found = decompose(in_blocks(x), tree, rtol=rtol, memory=3 * memory if bonds else 7 * memory)
        own = decompose(x, tree, rtol=rtol)
        apart, size = distance(in_blocks(x), found)
        slack, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-12, 1e-8)
        assert apart <= rtol * size and apart <= found.error_bound * (1 + slack) + slack * size
        assert apart == pytest.approx(float((found.to_tensor() - x).detach().norm()), rel=1e-4)
        assert found.dtype == dtype
        if bonds:
            assert found.network == own.network
            assert {own.network.bonds[i] for i in own.network.weighted[:-1]} == {bonds}
            assert torch.allclose(found.to_tensor(), own.to_tensor(), atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("name", TREES)
def test_spectra_and_ranks(name, dtype):
    """No squares: values are right to 1e-12 of the largest, small ones included."""
    tree, x = tensor(name, dtype)
    _, y = tensor(name, dtype, rank=2)
    x = x + 1e-9 * y.flip(0)  # singular values down to 1e-9
    found = spectra(in_blocks(x), tree, memory=7 * x.nbytes)
    for node, values in spectra(x, tree).items():
        assert found[node].shape == values.shape and found[node].dtype == values.dtype
        assert float((found[node] - values).abs().max()) < 1e-12 * float(values[0]), node
    for rtol in (None, 1e-3, 1e-10):
        ranks = hierarchical_rank(in_blocks(x), tree, rtol=rtol, memory=7 * x.nbytes)
        assert ranks == hierarchical_rank(x, tree, rtol=rtol)
    assert max(ranks.values()) > 3


def test_small_tensors_are_read_whole(monkeypatch):
    tree, x = tensor("uneven", noise=1e-3)
    monkeypatch.setattr(blocks, "compress", None)
    found = decompose(in_blocks(x), tree, rtol=1e-2, memory=9 * x.nbytes)
    own = decompose(x, tree, rtol=1e-2)
    assert all(torch.equal(w, own.weights[node]) for node, w in found.weights.items())
    assert hierarchical_rank(in_blocks(x), tree, rtol=0.1) == hierarchical_rank(x, tree, rtol=0.1)


def reducible(tree):
    """Modes of size 6 that cannot be compressed below nodes of rank 3."""
    bonds = {v: 6 if len(tree.modes_below(v)) == 1 else 3 for v in tree.nodes[:-1]}
    return zoo.model_of(tree, "full", sizes=6, bonds=bonds, std=1.0).to_tensor().detach()


@pytest.fixture
def passes_told(monkeypatch):
    """What is read is told to a list; small modes are not handled together."""
    told = []
    monkeypatch.setattr(blocks, "_ROWS", 6)
    monkeypatch.setattr(blocks._Compression, "_tell", lambda self, what, *_: told.append(what))
    return told


FURTHER_UP = [
    [[0, 1], [2, 3], [4, 5]], [[[0, 1]], [[2], 3], [[[4]], 5]], [[[0], [1, 2]], [3, [4, 5]]],
]  # fmt: skip


@pytest.mark.parametrize("nested", FURTHER_UP)
def test_nodes_further_up(nested, passes_told):
    """Modes that cannot be compressed: the pass goes on at the nodes above them."""
    tree = ModeTree(nested)
    x = reducible(tree)
    with dask.config.set(num_workers=4):
        found = decompose(in_blocks(x), tree, rtol=1e-10, memory=7 * x.nbytes)
        values = spectra(in_blocks(x), tree, memory=7 * x.nbytes)
    assert any("(" in what.partition("node ")[2] for what in passes_told)  # a node that is no leaf
    assert float((found.to_tensor().detach() - x).norm()) < 1e-10 * float(x.norm())
    assert found.network.bonds == decompose(x, tree, rtol=1e-10).network.bonds
    for node, own in spectra(x, tree).items():
        assert torch.allclose(values[node], own, atol=1e-12 * float(own[0]))


def test_nodes_with_one_child_further_up(passes_told, monkeypatch):
    """They have the matricization of their child, so nothing is read for them."""
    monkeypatch.setattr(blocks._Compression, "_core_limit", lambda self: 8 * 3**3)
    tree = ModeTree([[[0, 1]], [[2, 3]], [[4, 5]]])
    x = reducible(tree)
    found = decompose(in_blocks(x), tree, rtol=1e-10, memory=7 * x.nbytes)
    nodes = [what.partition("node ")[2] for what in passes_told]
    assert nodes[6:9] == ["(0, 1)", "(2, 3)", "(4, 5)"]
    assert len(nodes) == 10  # six leaves, three pairs, the core
    assert found.network.bonds == decompose(x, tree, rtol=1e-10).network.bonds
    assert float((found.to_tensor().detach() - x).norm()) < 1e-10 * float(x.norm())


def test_ranks_alone():
    tree, x = tensor("binary", noise=0.1)
    found = decompose(in_blocks(x), tree, ranks=2, memory=7 * x.nbytes)
    assert max(found.network.bonds[:-1]) == 2
    best = float((decompose(x, tree, ranks=2).to_tensor().detach() - x).norm())
    reached = float((found.to_tensor().detach() - x).norm())
    assert reached <= found.error_bound and reached < 1.2 * best


@pytest.mark.parametrize("rtol", [0.1, 0.3, 0.5, 0.9])
def test_equal_singular_values(rtol):
    """Not all of them are cut because one of them is."""
    eye = torch.eye(16, dtype=torch.float64)
    x = torch.einsum("ac,bd->abcd", eye, eye)
    for tree in (ModeTree.binary(4), ModeTree([[0, 2], [1, 3]])):
        found = decompose(in_blocks(x), tree, rtol=rtol, memory=7 * x.nbytes)
        reached = float((found.to_tensor().detach() - x).norm() / x.norm())
        assert reached <= rtol and reached <= found.error_bound / float(x.norm()) * (1 + 1e-12)
    eye, ones = torch.eye(20, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    wide = torch.einsum("ac,bd,e->abcde", eye, eye, ones)
    tree = ModeTree([[0, 1], [2, 3], 4])
    with dask.config.set(num_workers=3):  # less room for the core: a pass at (0, 1)
        found = decompose(in_blocks(wide), tree, rtol=rtol, memory=16_000_000)
    assert float((found.to_tensor().detach() - wide).norm() / wide.norm()) <= rtol


@pytest.mark.parametrize("scale", [1.0, 1e200, 1e-200, float("nan")])
def test_modes_too_long_for_a_pass(scale):
    """Their core is the tensor itself; scale and finite entries are seen to all the same."""
    x = scale * zoo.randn(150, 150)
    tree = ModeTree.binary(2)
    with dask.config.set(num_workers=1):
        if scale != scale:
            with pytest.raises(DataError, match="not finite"):
                spectra(in_blocks(x), tree, memory=2**20)
            return
        assert blocks._Compression(in_blocks(x), tree, {}, None, 2**20).most_rows < 150
        found = spectra(in_blocks(x), tree, memory=2**20)
        assert torch.allclose(found[0], spectra(x, tree)[0], rtol=1e-10, atol=0)
        model = decompose(in_blocks(x), tree, rtol=0.5, memory=2**20)
    apart, size = distance(x, model)
    assert 0.3 < apart / size <= 0.5


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e-300, 1.0])
def test_distance_at_any_scale(scale):
    tree, x = tensor("across", noise=1e-2)
    model = decompose(x * scale, tree, rtol=1e-1)
    wanted = float((decompose(x, tree, rtol=1e-1).to_tensor().detach() - x).norm())
    for given_ in (x * scale, in_blocks(x * scale)):
        apart, size = distance(given_, model, memory=7 * x.nbytes)
        assert apart / size == pytest.approx(wanted / float(x.norm()), rel=1e-6)
        assert size == pytest.approx(scale * float(x.norm()))
    zero = distance(in_blocks(0 * x), decompose(0 * x, tree, rtol=0.1))
    assert zero == (0.0, 0.0)


def test_many_readings_are_warned_about():
    """One block over all: every part has to read it."""
    x = tensor("binary", noise=1e-3)[1]
    whole = da.from_array(x.numpy(), chunks=-1)
    with pytest.warns(UserWarning, match=r"read \d+ times in one pass; give more memory"):
        decompose(whole, ModeTree.binary(4), rtol=0.1, memory=x.nbytes // 2)


def test_no_matrix_is_made_for_a_mode_that_is_too_long(monkeypatch):
    made = []
    monkeypatch.setattr(blocks._Compression, "_eye", lambda self, size: made.append(size))
    x = da.ones((20_000, 4, 4), chunks=(4000, 4, 4))
    with pytest.raises(SizeError, match=r"modes 0 are longer than \d+ and were not looked at"):
        decompose(x, ModeTree([[[0], 1], 2]), rtol=0.1, memory="500kB")
    assert all(size < 100 for size in made)


@pytest.mark.parametrize("scale", [1e200, 1e-200, 0.0])
def test_scales(scale):
    tree, x = tensor("across")
    found = decompose(in_blocks(x * scale), tree, rtol=1e-6, memory=7 * x.nbytes)
    assert torch.allclose(found.to_tensor(), x * scale, rtol=1e-6, atol=1e-8 * scale)
    values = spectra(in_blocks(x * scale), tree, memory=7 * x.nbytes)
    for node, own in spectra(x, tree).items():
        assert torch.allclose(values[node], own * scale, atol=1e-12 * scale, rtol=1e-9)


def test_on_disk(tmp_path):
    tree, x = tensor("uneven", noise=1e-5)
    own = decompose(x, tree, rtol=1e-3)
    da.to_zarr(in_blocks(x), str(tmp_path / "x.zarr"))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=x.numpy(), chunks=(3, 2, 4, 4, 3, 5))
        for given_ in (zarr.open(str(tmp_path / "x.zarr"), mode="r"), file["x"]):
            found = decompose(given_, tree, rtol=1e-3, memory=7 * x.nbytes)
            assert found.network.bonds == own.network.bonds
            assert torch.allclose(found.to_tensor(), own.to_tensor(), atol=1e-8)


def test_on_a_cluster():
    """Workers of distributed; the tasks and what they hold are sent to them."""
    tree, x = tensor("uneven", noise=1e-5)
    with distributed.Client(n_workers=2, threads_per_worker=1, processes=False,
                            dashboard_address="127.0.0.1:0") as client:  # fmt: skip
        assert passes.tasks_at_a_time() == (2, 1)
        found = decompose(in_blocks(x), tree, rtol=1e-3, memory=7 * x.nbytes)
        assert distance(in_blocks(x), found)[0] <= 1e-3
        with pytest.raises(OptionError, match="in the cluster's memory"):
            decompose(client.persist(in_blocks(x)), tree, rtol=1e-3, memory=7 * x.nbytes)
    assert found.network.bonds == decompose(x, tree, rtol=1e-3).network.bonds


REFUSED = {
    "integers": (da.ones((3, 4), dtype=int), DataError, r"dtype int64.*\n.*astype"),
    "float16": (da.ones((3, 4), dtype="float16"), DataError, "must be float32, float64, complex64"),
    "longdouble": (da.ones((3, 4), dtype="longdouble"), DataError, "must be float32, float64"),
    "clongdouble": (da.ones((3, 4), dtype="clongdouble"), DataError, "must be float32, float64"),
    "masked": (da.ma.masked_greater(da.ones((3, 4)), 2), DataError, "is masked"),
    "scalar": (da.ones(()), ShapeError, "0 axes and the tree 2 modes"),
    "empty": (da.ones((0, 3)), DataError, r"empty: shape \(0, 3\)"),
    "unknown": ((x := da.ones((3, 4)))[x[:, 0] > 0], ShapeError, "unknown size"),
    "order": (da.ones((30, 40, 50)), ShapeError, "3 axes and the tree 2 modes"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", [decompose, spectra])
def test_refuses_arrays(name, function):
    array, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        function(array, ModeTree.binary(2), memory=1000)


def test_refuses():
    tree, x = tensor("binary")
    bad = x.clone()
    bad[3, 2, 1, 0], bad[11, 10, 9, 8] = float("nan"), float("inf")
    memory = 7 * x.nbytes
    with pytest.raises(DataError, match="not finite, 2 of 11880 or more"):
        decompose(in_blocks(bad), tree, rtol=0.1, memory=memory)
    with pytest.raises(DataError, match="not finite"):
        spectra(in_blocks(bad), tree, memory=memory)
    with pytest.raises(OptionError, match="need a tree"):
        spectra(in_blocks(x))
    with pytest.raises(OptionError, match="memory must be a number of bytes"):
        decompose(in_blocks(x), tree, memory="much")
    noise = zoo.randn(*x.shape, seed=1)
    needed = f"no tolerance.*\n.*needed: {noise.nbytes:,} bytes"
    with pytest.raises(SizeError, match=needed):
        spectra(in_blocks(noise), tree, memory=memory // 2)
    with pytest.raises(ShapeError, match="other sizes than the model"):
        distance(x, Factorization(tree, 3, 2))
    swapped = in_blocks(x).astype(">f8")  # the other order of bytes, read whole
    assert torch.equal(spectra(swapped, tree)[0], spectra(x, tree)[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parts(data):
    """They cover the tensor once, stay within the budget where they can, and their reads are counted."""
    lengths = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
    chunks = data.draw(st.tuples(lengths, lengths, lengths))
    whole = data.draw(st.sets(st.integers(0, 2), max_size=2))
    budget = data.draw(st.integers(1, 8 * 1000))
    array = da.zeros(tuple(map(sum, chunks)), chunks=chunks)
    slabs = passes.slabs_of(array, tuple(whole), budget)
    seen = np.zeros(array.shape, int)
    for slab in slabs:
        seen[slab] += 1
        assert all(slab[m] == slice(0, array.shape[m]) for m in whole)
        least = np.prod([array.shape[m] for m in whole])
        assert seen[slab].size <= max(budget // 8, least)
    assert (seen == 1).all()
    edges = [list(itertools.pairwise(np.cumsum([0, *c]))) for c in chunks]
    read = 0
    for slab, boxes in itertools.product(slabs, itertools.product(*edges)):
        if all(s.start < b and a < s.stop for s, (a, b) in zip(slab, boxes, strict=True)):
            read += int(np.prod([b - a for a, b in boxes]))
    assert passes.bytes_read(array, slabs) == 8 * read


def test_memory_is_kept_to():
    """128 MiB that are made when they are read: the process grows by less than half of that."""
    script = """
        import re, numpy as np, dask, dask.array as da, torch, tnreg
        def peak():
            with open("/proc/self/status") as file:
                return int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1]) * 1024
        def block(block_info=None):
            ends = block_info[None]["array-location"]
            grid = np.meshgrid(*(np.arange(*e) for e in ends), indexing="ij", sparse=True)
            return 1 / (1.0 + sum((k + 1) * g for k, g in enumerate(grid)) / 32)
        x = da.map_blocks(block, chunks=((16,) * 4,) * 4, dtype=float, meta=np.empty((0,) * 4))
        tree = tnreg.ModeTree.binary(4)
        with dask.config.set(num_workers=2):
            small = x[:16, :16, :16, :16]
            tnreg.decompose(small, tree, rtol=1e-4, memory=small.nbytes * 7)  # imports and such
            before = peak()
            model = tnreg.decompose(x, tree, rtol=1e-4, memory="32MiB")
            grown = peak() - before
            apart, size = tnreg.ranks.decompose.distance(x, model, memory="32MiB")
        print(x.nbytes, grown, apart / size)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    size, grown, error = map(float, done.stdout.split())
    assert size == 2**27 and error <= 1e-4
    assert grown < 2**26
