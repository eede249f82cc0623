"""To and from the formats of other libraries: tensorly, tensornetwork, quimb, arrays.

Which format a factorization has is read off its tree and joins: a star of diagonal joins is CP, a star
of full joins Tucker, a caterpillar of full joins a tensor train (matrix product state). Networks of
``tensornetwork`` nodes (made by ``tnreg.network``) and of quimb may be any tree. Every conversion is
exact; weights are copied, except for ``to_quimb``.

Arrays may be torch's, numpy's, anything with ``__array__`` or ``__dlpack__``, or nested lists. The other
way, ``model.to_tensor().detach()`` and the weights are torch tensors: ``numpy.asarray``,
``numpy.from_dlpack`` and any other ``from_dlpack`` take them without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor

from tnreg.errors import OptionError, ShapeError
from tnreg.factorizations.factorization import Factorization
from tnreg.tensors.arrays import array_of
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree


def from_cp(weights: Any, factors: Sequence[Any]) -> Factorization:
    """CP ``sum_r w[r] a_r ⊗ b_r ⊗ ..``: a star with a diagonal join.

    Args:
        weights: ``(R,)``, or ``None`` for ones (the root is then fixed to them).
        factors: ``(D_n, R)`` for every mode.
    """
    given: dict[Node, Tensor] = {n: array_of(f, 2, f"factor {n}") for n, f in enumerate(factors)}
    tree = ModeTree.star(len(given))
    if weights is not None:
        given[tree.root] = array_of(weights, 1, "the weights")
    return Factorization.from_weights(tree, given, join="diagonal")


def to_cp(model: Factorization) -> tuple[Tensor, list[Tensor]]:
    """``(weights, factors)`` of a star with a diagonal join.

    Raises:
        OptionError: Another tree or join.
    """
    tree = model.tree
    _expect(model, tree == ModeTree.star(tree.order), "diagonal", "CP", "a star")
    weights = {node: w.detach().clone() for node, w in model.weights.items()}
    bond = model.network.bonds[0]
    ones = torch.ones(bond, dtype=model.dtype, device=model.device)
    return weights.get(tree.root, ones), [weights[n] for n in tree.leaves]


def from_tucker(core: Any, factors: Sequence[Any]) -> Factorization:
    """Tucker ``core x_0 U_0 x_1 U_1 ..``: a star with a full join.

    Args:
        core: ``(R_0, ..., R_{N-1})``.
        factors: ``(D_n, R_n)`` for every mode.
    """
    given: dict[Node, Tensor] = {n: array_of(f, 2, f"factor {n}") for n, f in enumerate(factors)}
    tree = ModeTree.star(len(given))
    given[tree.root] = array_of(core, tree.order, "the core")
    return Factorization.from_weights(tree, given, join="full")


def to_tucker(model: Factorization) -> tuple[Tensor, list[Tensor]]:
    """``(core, factors)`` of a star with a full join.

    Raises:
        OptionError: Another tree or join.
    """
    tree = model.tree
    _expect(model, tree == ModeTree.star(tree.order), "full", "Tucker", "a star")
    weights = {node: w.detach().clone() for node, w in model.weights.items()}
    return weights[tree.root], [weights[n] for n in tree.leaves]


def from_tensor_train(cores: Sequence[Any]) -> Factorization:
    """Tensor train: a caterpillar with full joins; leaves beyond the first hold identities.

    Args:
        cores: ``(r_n, D_n, r_{n+1})`` with ``r_0 = r_N = 1``.
    """
    given = [array_of(core, 3, f"core {n}") for n, core in enumerate(cores)]
    if not given or given[0].shape[0] != 1 or given[-1].shape[2] != 1:
        shapes = [tuple(core.shape) for core in given]
        raise ShapeError(
            f"a tensor train starts and ends with a bond of 1.\n  found: {shapes}\n"
            "  expected: cores (1, D_0, r_1), (r_1, D_1, r_2), ..., (r, D, 1)"
        )
    if len(given) == 1:
        raise ShapeError("a tensor train of one core has no joins; write decompose(vector, tree).")
    tree = ModeTree.caterpillar(len(given))
    weights: dict[Node, Tensor] = {0: given[0][0]}
    for n, (node, core) in enumerate(zip(tree.interior, given[1:], strict=True), 1):
        weights[n] = torch.eye(core.shape[1], dtype=core.dtype, device=core.device)
        weights[node] = core if node != tree.root else core[..., 0]
    return Factorization.from_weights(tree, weights, join="full")


def to_tensor_train(model: Factorization) -> list[Tensor]:
    """Cores ``(r_n, D_n, r_{n+1})`` of a caterpillar with full joins.

    Raises:
        OptionError: Another tree or join.
    """
    tree = model.tree
    caterpillar = tree.order > 1 and tree == ModeTree.caterpillar(tree.order)
    _expect(model, caterpillar, "full", "a tensor train", "a caterpillar of two modes or more")
    weights = {node: w.detach() for node, w in model.weights.items()}
    cores = [weights[0].unsqueeze(0).clone()]
    for n, node in enumerate(tree.interior, 1):
        weight = weights[node].unsqueeze(-1) if node == tree.root else weights[node]
        cores.append(torch.einsum("abc,db->adc", weight, weights[n]))
    return cores


def from_tensorly(found: Any) -> Factorization:
    """A ``CPTensor``, ``TuckerTensor`` or ``TTTensor`` of tensorly.

    Raises:
        OptionError: None of them.
    """
    kind = type(found).__name__
    if kind == "CPTensor":
        return from_cp(found.weights, found.factors)
    if kind == "TuckerTensor":
        return from_tucker(found.core, found.factors)
    if kind == "TTTensor":
        return from_tensor_train(found.factors)
    raise OptionError(f"from_tensorly: expected CPTensor, TuckerTensor or TTTensor, found {kind}.")


def to_tensorly(model: Factorization) -> Any:
    """A ``CPTensor``, ``TuckerTensor`` or ``TTTensor`` of tensorly, in the arrays of its backend.

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

    def theirs(x: Tensor) -> Any:
        return x if tensorly.get_backend() == "pytorch" else tensorly.tensor(x.cpu().numpy())

    tree, joins = model.tree, set(model.network.joins) - {"leaf"}
    if tree == ModeTree.star(tree.order) and joins == {"diagonal"}:
        weights, factors = to_cp(model)
        return CPTensor((theirs(weights), [theirs(f) for f in factors]))
    if tree == ModeTree.star(tree.order) and joins == {"full"}:
        core, factors = to_tucker(model)
        return TuckerTensor((theirs(core), [theirs(f) for f in factors]))
    if joins == {"full"}:
        return TTTensor([theirs(core) for core in to_tensor_train(model)])
    raise OptionError(
        f"tensorly has CP, Tucker and tensor trains; this is none of them: {tree!r}, {sorted(joins)} joins."
    )


def _expect(model: Factorization, fits: bool, join: str, what: str, tree: str) -> None:
    joins = set(model.network.joins) - {"leaf"}
    if not fits or joins != {join}:
        raise OptionError(
            f"{what} is {tree} with {join} joins; this is {model.tree!r} with {sorted(joins)} joins.\n"
            "  decompose the dense tensor along the tree you need, or see algebra.full_joins"
        )
