"""Conversions against what tensorly makes of the same arrays, and back."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly
import torch
import zoo
from tensorly.cp_tensor import cp_to_tensor
from tensorly.decomposition import parafac, tensor_train, tucker
from tensorly.tt_tensor import tt_to_tensor
from tensorly.tucker_tensor import tucker_to_tensor

from tnreg import Factorization, ModeTree, OptionError, ShapeError, convert, decompose

SIZES = (4, 5, 3, 6)
HTF = zoo.model_of(ModeTree.binary(4))
KINDS = {
    "cp": (lambda x: parafac(x, 3, init="random", random_state=0, n_iter_max=5), cp_to_tensor),
    "tucker": (lambda x: tucker(x, (2, 3, 2, 4), init="random", random_state=0), tucker_to_tensor),
    "tensor train": (lambda x: tensor_train(x, (1, 3, 4, 2, 1)), tt_to_tensor),
}


@pytest.fixture(autouse=True)
def numpy_backend():
    tensorly.set_backend("numpy")


def random(sizes=SIZES):
    return np.random.default_rng(0).standard_normal(sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_from_tensorly_and_back(kind):
    make, dense = KINDS[kind]
    theirs = make(random())
    model = convert.from_tensorly(theirs)
    assert np.allclose(model.to_tensor().detach().numpy(), dense(theirs), atol=1e-12)
    again = convert.to_tensorly(model)
    assert type(again) is type(theirs)
    assert np.allclose(dense(again), dense(theirs), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_to_tensorly_from_ours(dtype):
    star, train = ModeTree.star(4), ModeTree.caterpillar(4)
    for model, dense in (
        (zoo.model_of(star, dtype=dtype), cp_to_tensor),
        (zoo.model_of(star, root="ones", dtype=dtype), cp_to_tensor),
        (zoo.model_of(star, "full", dtype=dtype), tucker_to_tensor),
        (zoo.model_of(train, "full", dtype=dtype), tt_to_tensor),
    ):
        theirs = dense(convert.to_tensorly(model))
        ours = model.to_tensor().detach().numpy()
        assert theirs.dtype == ours.dtype and np.allclose(theirs, ours, atol=1e-5)
        back = convert.from_tensorly(convert.to_tensorly(model))
        assert torch.allclose(back.to_tensor(), model.to_tensor(), atol=1e-5)


def test_torch_backend_of_tensorly():
    tensorly.set_backend("pytorch")
    model = zoo.model_of(ModeTree.star(3), "full")
    theirs = convert.to_tensorly(model)
    assert isinstance(theirs.core, torch.Tensor)
    assert torch.allclose(tucker_to_tensor(theirs), model.to_tensor().detach())


def test_a_decomposition_leaves_as_a_tensor_train():
    x = torch.from_numpy(random())
    model = decompose(x, ModeTree.caterpillar(4), rtol=1e-12)
    cores = convert.to_tensor_train(model)
    assert [c.shape[1] for c in cores] == list(SIZES)
    found = torch.einsum("xay,ybz,zcu,udv->abcd", *cores)
    assert torch.allclose(found, x, atol=1e-10)
    assert torch.allclose(convert.from_tensor_train(cores).to_tensor(), x, atol=1e-10)


def test_lists_and_numpy_arrays():
    model = convert.from_cp([1.0, 2.0], [np.eye(2), [[1.0, 0.0], [0.0, 3.0]]])
    assert torch.equal(model.to_tensor().detach(), torch.tensor([[1.0, 0], [0, 6]]).double())
    ones = convert.from_cp(None, [np.eye(2), np.eye(2)])
    assert ones.network.root_ones and torch.equal(convert.to_cp(ones)[0], torch.ones(2).double())
    pair = convert.from_tucker(np.eye(2), [np.eye(3)[:, :2], np.eye(2)])
    assert isinstance(pair, Factorization) and pair.sizes == (3, 2)


def test_what_comes_out_is_a_copy():
    model = zoo.model_of(ModeTree.star(3))
    weights, factors = convert.to_cp(model)
    before = model.to_tensor().detach().clone()
    weights.zero_(), factors[0].zero_()
    convert.to_tensor_train(zoo.model_of(ModeTree.caterpillar(3), "full"))[0].zero_()
    assert torch.equal(model.to_tensor(), before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: convert.to_cp(HTF), OptionError, "CP is a star with diagonal"),
        (lambda: convert.to_tucker(HTF), OptionError, "Tucker is a star with full"),
        (lambda: convert.to_tensor_train(HTF), OptionError, "a caterpillar"),
        (lambda: convert.to_tensorly(HTF), OptionError, "none of them"),
        (lambda: convert.from_tensorly(3), OptionError, "found int"),
        (
            lambda: convert.from_cp(None, [np.ones(3)]),
            ShapeError,
            r"factor 0 needs 2 axes, found shape \(3,\)",
        ),
        (
            lambda: convert.from_tucker(np.ones((2, 2)), [np.ones((3, 2))]),
            ShapeError,
            "the core needs 1 axes",
        ),
        (
            lambda: convert.from_tensor_train([np.ones((2, 3, 1))]),
            ShapeError,
            "starts and ends with a bond of 1",
        ),
        (
            lambda: convert.from_tensor_train([np.ones((1, 3, 1))]),
            ShapeError,
            "of one core has no joins",
        ),
        (
            lambda: convert.from_tensor_train([np.ones((1, 3, 2)), np.ones((3, 3, 1))]),
            ShapeError,
            "another shape",
        ),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
