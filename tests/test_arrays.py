"""How numbers, seeds and arrays of other libraries come in: one door for each, the same everywhere."""

import itertools

import numpy as np
import pytest
import torch
from refusals import refuses

import tnreg
from tnreg import DataError, Factorization, ModeTree, OptionError
from tnreg.errors import check_integer, check_number, check_scalar
from tnreg.tensors.arrays import as_tensor, seeded

pd, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
dask = pytest.importorskip("dask.array")

TREE, SIZES = ModeTree.binary(3), (4, 5, 6)
MODEL = Factorization(TREE, SIZES, 2, std=1.0, dtype=torch.float64, generator=seeded(0, "seed"))
X = MODEL.to_tensor().detach().numpy()
INDEX, VALUES = np.array([[0, 0, 0], [1, 2, 3]]), np.array([1.0, 2.0])


@pytest.mark.parametrize("value", [
    2, np.int8(2), np.uint64(2), np.array(2), torch.tensor(2), np.ma.array(2), 2.0, np.float16(2),
    np.float32(2), np.longdouble(2), np.array(2.0), torch.tensor(2.0), torch.tensor(2.0, requires_grad=True),
    2 + 1j, np.complex64(2 + 1j), np.clongdouble(2 + 1j), np.array(2 + 1j), torch.tensor(2 + 1j),
], ids=repr)  # fmt: skip
def test_numbers(value):
    kind = getattr(value, "dtype", type(value))
    number = check_scalar(value, "x")
    assert number == (2 + 1j if "complex" in str(kind) else 2) and type(number) in (float, complex)
    for check, allowed in ((check_number, "float int"), (check_integer, "int")):
        if any(name in str(kind) for name in allowed.split()):
            assert check(value, least=1, what="x") == 2
        else:
            with pytest.raises(OptionError, match="x must be"):
                check(value, least=1, what="x")


@pytest.mark.parametrize("value", [
    True, np.True_, torch.tensor(True), "2", np.str_("2"), None, np.ma.masked, [2], np.array([2]),
    torch.tensor([2]), np.array([2.0]), torch.tensor([2 + 1j]), np.nan, np.inf, complex(0, np.nan), 10**400,
], ids=repr)  # fmt: skip
def test_what_is_no_number(value):
    for check in (check_scalar, check_number):
        with pytest.raises(OptionError, match="who: x must be a finite number"):
            check(value, "who: x")


def fitted(**options):
    model = Factorization(TREE, SIZES, 2, std=0.1, generator=seeded(1, "seed"))
    task = tnreg.completion(X.astype(np.float32), 0.5)
    return tnreg.fit(model, task.loss, steps=3, progress=False, **options)["loss"]


SETTINGS = {
    "std": lambda c: Factorization(TREE, 4, 2, std=c(0.25), generator=seeded(0, "s")).stacks[0],
    "std of outputs": lambda c: tnreg.ConvNet(
        TREE, 4, 2, std=c(0.25), outputs=3, generator=seeded(0, "s")).weights[TREE.root],
    "lr": lambda c: torch.from_numpy(fitted(lr=c(0.25))),
    "lr of a group": lambda c: torch.from_numpy(
        fitted(optimizer=lambda p, lr: tnreg.GroupRMSprop([{"params": list(p), "lr": c(0.25)}]))),
    "every": lambda c: torch.from_numpy(fitted(every=c(1))),
    "rtol": lambda c: torch.tensor(list(tnreg.hierarchical_rank(X, TREE, rtol=c(0.25)).values())),
    "rtol of truncate": lambda c: tnreg.truncate(MODEL, rtol=c(0.25)).to_tensor(),
    "ranks": lambda c: Factorization(TREE, 4, c(2), generator=seeded(0, "s")).stacks[0],
    "share": lambda c: tnreg.completion(X, c(0.5)).values,
    "completion": lambda c: tnreg.completion(X, 0.5, seed=c(3)).values,
    "sensing": lambda c: tnreg.sensing(X, 5, seed=c(3)).values,
    "randomized": lambda c: tnreg.decompose(X, TREE, ranks=2, randomized=True, seed=c(3)).to_tensor(),
    "patches": lambda c: tnreg.RandomPatches(seed=c(3)).draw(torch.zeros(2, 1, 9, 9)),
    "weight": lambda c: tnreg.InputGradientChange(((0, 0, 1, 1), (1, 1, 2, 2)), weight=c(0.25))(
        lambda x: x.square().sum((1, 2, 3)), torch.arange(8.0).reshape(2, 1, 2, 2)),
}  # fmt: skip
SEEDED = ("completion", "sensing", "randomized", "patches")


@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_of_numpy_and_torch_as_settings(name):
    build = SETTINGS[name]
    expected = build(lambda x: x)
    for convert in (lambda x: np.array(x)[()], np.array, torch.tensor):
        assert torch.equal(build(convert), expected)
    with pytest.raises(tnreg.TnregError, match=r"must be a|positive integer"):
        build(lambda x: np.array([x]))
    if name in SEEDED:
        with pytest.raises(OptionError, match="seed must be an integer"):
            build(lambda x: 2**64)


def test_negative_seeds_are_those_of_torch():
    assert seeded(np.int64(-1), "seed").initial_seed() == 2**64 - 1


def grid(a):
    return tnreg.grid_tensor(lambda x: x[:, 0, 0] * x[:, 0, 1], a, ModeTree.star(2))


# What a function of an array gives; the array it gets first is of the kind that the second one makes.
ENTRIES = {
    "completion": (X, lambda a: tnreg.completion(a, 0.5).values),
    "sensing": (X, lambda a: tnreg.sensing(a, 5).values),
    "values": (VALUES, lambda a: tnreg.completion(index=INDEX, values=a, sizes=SIZES).values),
    "test_values": (VALUES, lambda a: tnreg.completion(
        index=INDEX, values=VALUES, sizes=SIZES, test_index=INDEX, test_values=a).test_values),
    "index": (INDEX, lambda a: tnreg.completion(index=a, values=VALUES, sizes=SIZES).index),
    "decompose": (X, lambda a: tnreg.decompose(a, TREE, rtol=0.0).to_tensor()),
    "spectra": (X, lambda a: tnreg.spectra(a, TREE)[0]),
    "ranks": (X, lambda a: torch.tensor(tnreg.hierarchical_rank(a, TREE)[0])),
    "matricize": (X, lambda a: tnreg.matricize(a, [0, 2])),
    "effective_rank": (VALUES, tnreg.effective_rank),
    "entropy": (VALUES, tnreg.entanglement_entropy),
    "load_weights": (X[:, :2, 0], lambda a: (MODEL.load_weights({0: a}), MODEL.weights[0])[1]),
    "from_weights": (X[:, :2, 0], lambda a: Factorization.from_weights(
        TREE, {**MODEL.weights, 0: a}, join="diagonal").weights[0]),
    "features": (X[:2, :3, :4].copy(), lambda a: Factorization(
        TREE, 4, 2, dtype=torch.float64, generator=seeded(0, "s"))(a)),
    "parts of features": (X[:2, 0, :4].copy(), lambda a: Factorization(
        TREE, 4, 2, dtype=torch.float64, generator=seeded(0, "s"))([a, a, a])),
    "contract_modes": (VALUES[[0, 1, 0, 1]],
        lambda a: tnreg.algebra.contract_modes(MODEL, {0: a}).to_tensor()),
}  # fmt: skip


def frozen(a):
    a = a.copy()
    a.setflags(write=False)
    return a


LAYOUTS = {
    "reversed": lambda a: np.flip(np.flip(a).copy()),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "read-only": frozen,
    "Fortran": np.asfortranarray,
    "object": lambda a: a.astype(object),
    "no mask": np.ma.array,
    "mask of False": lambda a: np.ma.array(a, mask=np.zeros(a.shape, bool)),
    "lists of arrays": lambda a: [np.ma.array(part) for part in a],
}


PAIRS = set(itertools.product(ENTRIES, LAYOUTS)) - {("features", "lists of arrays")}  # one for each mode


@pytest.mark.parametrize(("name", "layout"), sorted(PAIRS))
def test_arrays_of_every_layout(name, layout):
    array, f = ENTRIES[name]
    assert torch.equal(f(LAYOUTS[layout](array)), f(torch.from_numpy(array.copy())))


def hidden(a, fill=1.0):
    mask = np.zeros(a.shape, bool)
    mask.flat[1] = True
    return np.ma.array(a, mask=mask, fill_value=fill)


MASKS = {
    "masked": hidden,
    "lists of masked": lambda a: [hidden(a)[i] for i in range(len(a))],
    "None": lambda a: hidden(a).tolist(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_behind_a_mask_is_no_data(name, mask):
    array, f = ENTRIES[name]
    with pytest.raises(DataError, match="missing"):
        f(MASKS[mask](array))


@pytest.mark.parametrize("mask", MASKS)
def test_masked_entries_are_missing(mask):
    task = tnreg.completion(MASKS[mask](X), X.size - 2, missing="nan")
    index = torch.cat([task.index, task.test_index])
    assert len(index) == X.size - 1 and [0, 0, 1] not in index.tolist()
    assert torch.equal(torch.cat([task.values, task.test_values]), torch.from_numpy(X)[tuple(index.T)])


def test_dtypes_of_masked_arrays():
    for given, expected in (("<i8", "float64"), (">f4", "float32"), ("c8", "complex64")):
        found = as_tensor(hidden(np.arange(3).astype(given), fill=1), missing=True)
        assert str(found.dtype) == f"torch.{expected}" and found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("make", [
    lambda: pd.Series([1.0, None, 3.0]), lambda: pd.Series([1, None, 3], dtype="Int64"),
    lambda: pd.Series([1.0, None, 3.0], dtype="double[pyarrow]"),
    lambda: pd.array([1.0, None, 3.0], dtype="Float64"),
    lambda: pyarrow.array([1, None, 3]), lambda: pyarrow.chunked_array([[1.0, None], [3.0]]),
    lambda: dask.from_array(hidden(np.array([1.0, 2.0, 3.0]))),
], ids=["NaN", "Int64", "arrow", "pandas array", "pyarrow", "chunks", "dask"])  # fmt: skip
def test_missing_numbers_of_other_libraries(make):
    found = as_tensor(make(), missing=True)
    assert found.dtype == torch.float64 and found[[0, 2]].tolist() == [1, 3] and found[1].isnan()
    assert torch.equal(as_tensor([make()], missing=True).isnan(), found.isnan()[None])
    for given in (make(), [make()]):
        with pytest.raises(DataError, match="1 of 3 entries are masked or missing"):
            as_tensor(given)
    with pytest.raises(DataError, match="1 of 3 entries are masked or missing"):
        tnreg.completion(index=np.zeros((3, 1), int), values=make(), sizes=[1])


test_what_is_no_array = refuses([
    ([1.0, "a"], "not a tensor of numbers: list"),
    ([[1.0], [2.0, 3.0]], "inhomogeneous"),
    (object(), "not a tensor of numbers: object"),
], as_tensor, DataError)  # fmt: skip
