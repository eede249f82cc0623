"""Spectra of a factorization without its dense tensor.

With ``U_v`` the matrix of node v's tensors (entries below v by bond above v) and ``E_v`` that of
everything outside it, the matricization at v is ``U_v E_vᵀ``. Only the triangular factors of the
two matter for its singular values: ``T_v`` goes up the tree, ``S_v`` comes down, and the spectrum
    is that
of ``T_v S_vᵀ``. Squares are never formed, so values are right down to eps times the largest one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tnreg.contraction import einsum
from tnreg.errors import OptionError
from tnreg.factorization import Factorization
from tnreg.rank import dense_spectra, numerical_rank
from tnreg.tree import ModeTree, Node

__all__ = ["hierarchical_rank", "spectra"]


def spectra(x: Any, tree: ModeTree | None = None) -> dict[Node, Tensor]:
    """Singular values of the matricization at every node but the root.

    At node v the rows are the modes below v and the columns all other modes.

    Args:
        x: Dense real or complex tensor ``(D_0, ..., D_{N-1})`` (torch or numpy), axis n being mode
            n; or a ``Factorization``, whose dense tensor is never formed.
        tree: Mode tree over ``0..N-1``; the factorization's own if left out, and no other.

    Returns:
        ``{node: singular values}``, descending, ``min(rows, columns)`` of them for a dense tensor
        and at most the rank of the bond for a factorization; children before parents, without the
        root. Zero tensors give zeros.

    Raises:
        ShapeError: ``x`` does not have ``tree.order`` axes.
        DataError: ``x`` has NaN, infinite or integer entries.
        OptionError: A dense tensor without a tree, or a factorization with another tree than its
            own.

    Cost: dense, see ``tnreg.rank.dense_spectra``; factorization, linear in the number of nodes,
    cubic in the bonds. Detached for a factorization; differentiable for a dense tensor that
    requires a gradient.

    Example:
        >>> tree, pair = ModeTree.binary(4), torch.eye(3)
        >>> spectra(torch.einsum("ac,bd->abcd", pair, pair), tree)[0]
        tensor([1.7321, 1.7321, 1.7321])
    """
    if isinstance(x, Factorization):
        if tree is not None and tree != x.tree:
            raise OptionError(
                "spectra of a factorization are along its own tree.\n"
                f"  found: {tree!r}\n  own:   {x.tree!r}\n"
                "  for another tree give the dense tensor: spectra(model.to_tensor(), tree)"
            )
        return _factored_spectra(x)
    if tree is None:
        raise OptionError("spectra of a dense tensor need a tree: spectra(tensor, tree).")
    return dense_spectra(x, tree)


def hierarchical_rank(
    x: Any, tree: ModeTree | None = None, *, rtol: float | None = None
) -> dict[Node, int]:
    """Rank of the matricization of ``x`` at every node of ``tree`` but the root.

    At node v the rows are the modes below v and the columns all other modes. Together the ranks are
    the hierarchical tensor rank of Razin, Maman and Cohen (2022), arXiv:2201.11729; on a star tree
    they are the multilinear (Tucker) rank.

    Args:
        x: Dense real or complex tensor of shape ``(D_0, ..., D_{N-1})``, axis n being mode n, or a
            ``Factorization``, whose dense tensor is never formed.
        tree: Mode tree over ``0..N-1``; the factorization's own if left out.
        rtol: A singular value counts if it is ``> rtol * s_max``, ``s_max`` the largest of the same
            matricization. Default ``max(rows, columns) * eps``, for a factorization at most
            ``1000 * eps``. For a trained model take e.g. 1e-3.

    Returns:
        ``{node: rank}``, children before parents, without the root. A zero tensor gives 0
        everywhere.

    Raises:
        ShapeError: ``x`` does not have ``tree.order`` axes.
        DataError: ``x`` has NaN, infinite or integer entries.

    Cost: see ``spectra``. Not differentiable; a smooth stand-in is ``effective_rank``.

    Example:
        >>> tree, pair = ModeTree.binary(4), torch.eye(3)
        >>> hierarchical_rank(torch.einsum("ab,cd->abcd", pair, pair), tree)[(0, 1)]  # ties inside the node
        1
        >>> hierarchical_rank(torch.einsum("ac,bd->abcd", pair, pair), tree)[(0, 1)]  # ties across it
        9
    """
    with torch.no_grad():
        found = spectra(x, tree)
    factored = isinstance(x, Factorization)
    along = x.tree if factored else tree
    assert along is not None  # spectra has refused a dense tensor without a tree
    sizes: tuple[int, ...] = x.sizes if factored else tuple(torch.as_tensor(x).shape)
    total = math.prod(sizes)
    out: dict[Node, int] = {}
    for node, s in found.items():
        rows = math.prod(sizes[m] for m in along.modes_below(node))
        columns = total // rows
        if factored:
            # the factors are small: their rounding does not grow with the matrix they stand for
            rows, columns = min(rows, 1000), min(columns, 1000)
        out[node] = numerical_rank(s, rows, columns, rtol)
    return out


@torch.no_grad()
def _factored_spectra(model: Factorization) -> dict[Node, Tensor]:
    tree, net = model.tree, model.network
    wide = torch.complex128 if model.dtype.is_complex else torch.float64
    weights = {tree.position(node): w.to(wide) for node, w in model.weights.items()}
    top = len(tree.nodes) - 1
    up: list[Tensor] = []
    logs: list[float] = []  # scale of what is below (and including) each node
    for i, below in enumerate(tree.links):
        if i == top:
            break
        own, log = _normalized(weights[i])
        below_product = own if not below else _join(net.joins[i], [up[c] for c in below], own)
        triangle, more = _normalized(_triangle(below_product))
        up.append(triangle)
        logs.append(log + more + sum(logs[c] for c in below))

    down: dict[int, tuple[Tensor, float]] = {}
    for i in range(top, -1, -1):
        below = tree.links[i]
        for k, c in enumerate(below):
            others = [up[s] for s in below if s != c]
            log = sum(logs[s] for s in below if s != c)
            if i in weights:
                own, more = _normalized(weights[i])
                log += more
            else:
                own = torch.ones(net.bonds[below[0]], dtype=wide, device=model.device)
            if i == top:
                outside = _outside(net.joins[i], others, own, None, k)
            else:
                above, more = down[i]
                log += more
                outside = _outside(net.joins[i], others, own, above, k)
            triangle, more = _normalized(_triangle(outside))
            down[c] = (triangle, log + more)
    out: dict[Node, Tensor] = {}
    real = model.stacks[0].real.dtype
    for i in range(top):
        outer, log = down[i]
        values = torch.linalg.svdvals(up[i] @ outer.mT)
        scale = log + logs[i]
        limit = math.prod(model.sizes[m] for m in tree.modes_below(tree.nodes[i]))
        # in halves: exp(scale) alone may leave the range where the product does not
        out[tree.nodes[i]] = (values * math.exp(scale / 2) * math.exp(scale / 2)).to(real)[:limit]
    return out


def _join(kind: str, below: list[Tensor], own: Tensor) -> Tensor:
    """Rows of all children combined, through the node's weight: ``(rows, R_above)``."""
    if kind == "diagonal":
        return _khatri_rao(below) @ own
    letters = [chr(0x4E00 + k) for k in range(2 * len(below) + 1)]
    bonds, heads = letters[: len(below)], letters[len(below) : -1]
    terms = [head + bond for head, bond in zip(heads, bonds, strict=True)]
    equation = f"{','.join(terms)},{''.join(bonds)}{letters[-1]}->{''.join(heads)}{letters[-1]}"
    operands = [*below, own]
    return einsum(equation, *(tuple(o.shape) for o in operands))(operands).flatten(0, -2)


def _outside(
    kind: str, others: list[Tensor], own: Tensor, above: Tensor | None, which: int
) -> Tensor:
    """Everything outside one child by the bond above it: siblings, the node's weight, what is above."""
    if kind == "diagonal":
        side = own.unsqueeze(0) if above is None else above @ own.mT
        return _khatri_rao([*others, side])
    full = own.unsqueeze(-1) if above is None else own
    up = torch.ones(1, 1, dtype=own.dtype, device=own.device) if above is None else above
    moved = full.movedim(which, -1)  # siblings.., above, this child
    letters = [chr(0x4E00 + k) for k in range(2 * len(others) + 3)]
    bonds, heads = letters[: len(others)], letters[len(others) : 2 * len(others)]
    head, bond, this = letters[-3:]
    terms = [h + b for h, b in zip(heads, bonds, strict=True)]
    equation = f"{','.join([*terms, head + bond])},{''.join(bonds)}{bond}{this}->{''.join(heads)}{head}{this}"
    operands = [*others, up, moved]
    return einsum(equation, *(tuple(o.shape) for o in operands))(operands).flatten(0, -2)


def _khatri_rao(parts: list[Tensor]) -> Tensor:
    """Row combinations of matrices ``(k_c, R)``: ``(Π k_c, R)``, shortened by QR where it grows tall."""
    out = parts[0]
    for part in parts[1:]:
        out = (out.unsqueeze(1) * part.unsqueeze(0)).flatten(0, 1)
        out = _triangle(out)
    return out


def _triangle(matrix: Tensor) -> Tensor:
    """A matrix with the same Gram and at most as many rows as columns."""
    rows, columns = matrix.shape
    return matrix if rows <= columns else torch.linalg.qr(matrix, mode="r")[1]


def _normalized(x: Tensor) -> tuple[Tensor, float]:
    largest = float(x.abs().max())
    return (x, 0.0) if largest == 0 else (x / largest, math.log(largest))
