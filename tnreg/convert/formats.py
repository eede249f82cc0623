"""To and from tensorly, and the arrays of CP, Tucker and tensor train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import OptionError, ShapeError
from tnreg.factorizations.assembly import identity, weights_of
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.memory import must_fit
from tnreg.tensors.arrays import array_of
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree


def from_cp(weights: Any, factors: Sequence[Any]) -> Factorization:
    """Convert CP, ``sum_r w[r] a_r ⊗ b_r ⊗ ..``, to a star with a diagonal join.

    Args:
        weights: ``(R,)``, or ``None`` for ones (the root is then fixed to them).
        factors: ``(D_n, R)`` for every mode.
    """
    top = None if weights is None else array_of(weights, 1, "the weights")
    return _from_star(top, factors, "diagonal")


def to_cp(model: Factorization) -> tuple[Tensor, list[Tensor]]:
    """Return ``(weights, factors)`` of a star with a diagonal join; OptionError for any other model."""
    return _to_star(model, "diagonal", "CP")


def from_tucker(core: Any, factors: Sequence[Any]) -> Factorization:
    """Convert Tucker, ``core x_0 U_0 x_1 U_1 ..``, to a star with a full join.

    Args:
        core: ``(R_0, ..., R_{N-1})``.
        factors: ``(D_n, R_n)`` for every mode.
    """
    return _from_star(array_of(core, len(factors), "the core"), factors, "full")


def to_tucker(model: Factorization) -> tuple[Tensor, list[Tensor]]:
    """Return ``(core, factors)`` of a star with a full join; OptionError for any other model."""
    return _to_star(model, "full", "Tucker")


def _from_star(top: Tensor | None, factors: Sequence[Any], join: str) -> Factorization:
    tree = ModeTree.star(len(factors))
    weights: dict[Node, Tensor] = {} if top is None else {tree.root: top}
    weights |= {n: array_of(factor, 2, f"factor {n}") for n, factor in enumerate(factors)}
    return Factorization.from_weights(tree, weights, join=join)


def _to_star(model: Factorization, join: str, what: str) -> tuple[Tensor, list[Tensor]]:
    tree = model.tree
    _check_format(model, tree == ModeTree.star(tree.order), join, f"{what} is a star")
    weights = weights_of(model, ones=False, bare=False)
    must_fit(what, [w.shape for w in weights.values()], model.dtype, model.device)
    weights = {node: w.clone() for node, w in weights.items()}
    return weights[tree.root], [weights[n] for n in tree.leaves]


def from_tensor_train(cores: Sequence[Any]) -> Factorization:
    """Convert cores ``(r_n, D_n, r_{n+1})``, ``r_0 = r_N = 1``, to a caterpillar with full joins.

    The cores are its weights, the first one that of leaf 0; all other leaves are bare. Raises ShapeError for
    other cores, or fewer than two.
    """
    cores = [array_of(core, 3, f"core {n}") for n, core in enumerate(cores)]
    if not cores or cores[0].shape[0] != 1 or cores[-1].shape[2] != 1:
        raise ShapeError(
            "a tensor train starts and ends with a bond of 1.\n"
            f"  found: {[tuple(core.shape) for core in cores]}\n"
            "  expected: cores (1, D_0, r_1), (r_1, D_1, r_2), ..., (r, D, 1)",
            argument="cores",
        )
    if len(cores) == 1:
        message = "a tensor train of one core has no joins; write decompose(vector, tree)."
        raise ShapeError(message, argument="cores")
    tree = ModeTree.caterpillar(len(cores))
    weights: dict[Node, Tensor] = {0: cores[0][0]}
    weights |= dict(zip(tree.interior, [*cores[1:-1], cores[-1][..., 0]], strict=True))
    leaves = dict.fromkeys(tree.leaves[1:], "bare")
    return Factorization.from_weights(tree, weights, join="full", leaves=leaves)


def to_tensor_train(model: Factorization) -> list[Tensor]:
    """Return the cores ``(r_n, D_n, r_{n+1})`` of a caterpillar with full joins; OptionError for others.

    Copies of the weights where all leaves but 0 are bare; if leaf 0 is, the first core is an identity.
    """
    tree = model.tree
    fits = tree.order > 1 and tree == ModeTree.caterpillar(tree.order)
    _check_format(model, fits, "full", "a tensor train is a caterpillar of two modes or more")
    weights = weights_of(model)
    weights[tree.root] = weights[tree.root].unsqueeze(-1)
    first = weights[0] if 0 in weights else identity(model.sizes[0], weights[tree.root])
    cores = [first.unsqueeze(0).clone()]
    for n, node in enumerate(tree.interior, 1):
        if n not in weights:
            cores.append(weights[node].clone())
            continue
        shape = (weights[node].shape[0], model.sizes[n], weights[node].shape[2])
        must_fit("a core of a tensor train", [shape], model.dtype, model.device, copies=2)
        cores.append(torch.einsum("abc,db->adc", weights[node], weights[n]))
    return cores


def from_tensorly(tensor: Any) -> Factorization:
    """Convert a ``CPTensor``, ``TuckerTensor`` or ``TTTensor`` of tensorly; OptionError for others."""
    kind = type(tensor).__name__
    if kind == "CPTensor":
        return from_cp(tensor.weights, tensor.factors)
    if kind == "TuckerTensor":
        return from_tucker(tensor.core, tensor.factors)
    if kind == "TTTensor":
        return from_tensor_train(tensor.factors)
    message = f"from_tensorly: expected CPTensor, TuckerTensor or TTTensor, found {kind}."
    raise OptionError(message, argument="tensor")


def to_tensorly(model: Factorization) -> Any:
    """Convert to a ``CPTensor``, ``TuckerTensor`` or ``TTTensor`` of tensorly, in the arrays of its backend.

    Raises:
        OptionError: The factorization is none of them, or tensorly is missing.
    """
    try:
        import tensorly
        from tensorly.cp_tensor import CPTensor
        from tensorly.tt_tensor import TTTensor
        from tensorly.tucker_tensor import TuckerTensor
    except ImportError:
        raise OptionError("tensorly is missing: pip install 'tnreg[data]'") from None

    def convert(x: Tensor) -> Any:
        return x if tensorly.get_backend() == "pytorch" else tensorly.tensor(x.cpu().numpy())

    tree, joins = model.tree, set(model.network.named_joins.values())
    if tree == ModeTree.star(tree.order) and len(joins) == 1:
        top, factors = to_cp(model) if joins == {"diagonal"} else to_tucker(model)
        kind = CPTensor if joins == {"diagonal"} else TuckerTensor
        return kind((convert(top), list(map(convert, factors))))
    if joins == {"full"}:
        return TTTensor(list(map(convert, to_tensor_train(model))))
    raise OptionError(
        f"tensorly has CP, Tucker and tensor trains; this is none of them: {tree!r}, {sorted(joins)} joins.",
        argument="model",
    )


def _check_format(model: Factorization, fits: bool, join: str, format_is: str) -> None:
    """Raise an error unless the tree fits and all joins are ``join``."""
    joins = set(model.network.named_joins.values())
    if not fits or joins != {join}:
        raise OptionError(
            f"{format_is} with {join} joins; this is {model.tree!r} with {sorted(joins)} joins.\n"
            "  decompose the dense tensor along the tree you need, or see algebra.full_joins",
            argument="model",
        )
