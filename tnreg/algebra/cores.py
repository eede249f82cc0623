"""CP of the cores of a factorization: what turns its full joins into diagonal ones of smaller bonds.

A search by damped Gauss-Newton steps (Phan, Tichavský and Cichocki 2013) from several starts, the first of
which is exact where two axes of a core have independent factors (Leurgans, Ross and Abel 1993).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tnreg.errors import OptionError
from tnreg.factorizations.factorization import Factorization
from tnreg.trees.reading import Node

# Unknowns of a CP decomposition, whose normal equations are solved in every step.
_MOST_UNKNOWNS = 5000


def core_factors(
    model: Factorization,
    wanted: Mapping[int, int],
    tries: int,
    steps: int,
    random: torch.Generator,
) -> dict[Node, Tensor]:
    """Weights of diagonal joins from CP decompositions of the cores.

    With orthonormal weights below a core, and the square root of the Gram matrix of what is above it
    multiplied in, the error of the core is that of the tensor.

    Args:
        model: With full joins and orthonormal weights, as ``truncate`` makes it.
        wanted: Largest bond below a node, by position; nodes left out are exact.
        tries: Starts per core.
        steps: Steps per start.
        random: Draws the starts.
    """
    tree, top = model.tree, len(model.tree.nodes) - 1
    held = [w.detach() for w in model.weights.values()]
    held[top] = held[top].unsqueeze(-1)
    grams = {top: held[top].new_ones(1, 1)}
    chosen: dict[int, Tensor] = {}  # what the parent takes of a node: (bond, new bond)
    out: dict[Node, Tensor] = {}
    for i in range(top, -1, -1):
        below, node = tree.links[i], tree.nodes[i]
        if not below:
            out[node] = held[i] @ chosen[i]
            continue
        size = float(held[i].abs().max()) or 1.0
        core = held[i] / size
        seen = torch.tensordot(core, grams[i], 1)
        for axis, c in enumerate(below):
            rest = [k for k in range(core.ndim) if k != axis]
            gram = torch.tensordot(seen, core.conj(), (rest, rest))
            trace = gram.diagonal().real.sum()
            # of a tensor that is zero everything weighs the same
            grams[c] = gram / trace if trace > 0 else torch.eye(len(gram)).to(gram)
        values, vectors = torch.linalg.eigh(grams[i])
        roots = values.clamp_min(1e-14 * float(values.max())).sqrt().to(core.dtype)
        exact = math.prod(core.shape[:-1])
        if wanted.get(i, exact) >= exact:
            every = torch.cartesian_prod(*(torch.arange(n) for n in core.shape[:-1]))
            eyes = [torch.eye(n).to(core) for n in core.shape[:-1]]
            rows = every.reshape(exact, -1).to(core.device).unbind(1)
            factors = [eye[:, row] for eye, row in zip(eyes, rows, strict=True)]
            factors.append(core.reshape(exact, -1).T)
        else:
            weighted = torch.tensordot(core, vectors * roots, 1)
            factors = _cp(weighted, wanted[i], tries, steps, random, node)
            factors[-1] = vectors.conj() @ (factors[-1] / roots.unsqueeze(1))
        chosen.update(zip(below, factors, strict=False))
        weight = factors[-1].T * size
        out[node] = weight[:, 0] if i == top else weight @ chosen[i]
    return out


def _cp(
    core: Tensor, rank: int, tries: int, steps: int, random: torch.Generator, node: Node
) -> list[Tensor]:
    """Factors ``(R_k, rank)`` whose rank-one tensors add up to the core, nearly: the best of some tries."""
    size = torch.linalg.vector_norm(core)
    axes = [k for k, n in enumerate(core.shape) if n > 1]
    factors = [core.new_ones(n, rank) for n in core.shape]  # of axes of size 1
    if size == 0 or not axes:
        factors[-1] = factors[-1] * core.flatten()[:1] / rank
        return factors
    reduced = core.reshape([core.shape[k] for k in axes]) / size
    if len(axes) <= 2:  # a matrix: the best there is
        matrix = reduced.reshape(reduced.shape[0], -1)
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        count = min(rank, len(values))
        pair = [core.new_zeros(n, rank) for n in matrix.shape]
        pair[0][:, :count] = u[:, :count] * values[:count]
        pair[1][:, :count] = vh[:count].T
        found = pair[: len(axes)] if len(axes) == 2 else [pair[0] * pair[1]]
    else:
        unknowns = rank * sum(reduced.shape)
        if unknowns > _MOST_UNKNOWNS:
            raise OptionError(
                f"diagonal_joins: the search at node {node!r} has {unknowns} unknowns, more than "
                f"{_MOST_UNKNOWNS}.\n  write smaller ranks, or truncate the model first"
            )
        found, least = list[Tensor](), math.inf
        for k in range(tries):
            start = [
                torch.randn(n, rank, generator=random, dtype=core.dtype).to(core.device)
                for n in reduced.shape
            ]
            start = [f / torch.linalg.vector_norm(f, dim=0) for f in start]
            if k == 0 and sorted(reduced.shape)[-2] >= rank:
                start = _pencil_start(reduced, rank, random)
            end, error = _gauss_newton(reduced, start, steps)
            if error < least:
                found, least = end, error
            if least < 1e-14:
                break
    for k, factor in zip(axes, found, strict=True):
        factors[k] = factor
    factors[-1] = factors[-1] * size
    return factors


def _pencil_start(core: Tensor, rank: int, random: torch.Generator) -> list[Tensor]:
    """CP factors from the eigenvectors of a matrix pencil: exact if two axes have independent factors.

    Two axes are at least as long as the rank (Leurgans, Ross and Abel 1993).
    """
    order = sorted(range(core.ndim), key=lambda k: -core.shape[k])
    turned = core.permute(order)
    bases = []
    for axis in (0, 1):
        rows = turned.movedim(axis, 0).flatten(1)
        bases.append(torch.linalg.svd(rows, full_matrices=False)[0][:, :rank])
    flat = torch.einsum("abc,ai,bj->ijc", turned.flatten(2), bases[0].conj(), bases[1].conj())
    mixed = torch.randn(flat.shape[2], 2, generator=random, dtype=core.dtype).to(core.device)
    one, other = (flat @ mixed).unbind(2)
    vectors = torch.linalg.eig(one @ torch.linalg.pinv(other))[1]
    first = bases[0] @ (vectors if core.is_complex() else vectors.real).to(core.dtype)
    parts = (torch.linalg.pinv(first) @ turned.flatten(1)).reshape(rank, *turned.shape[1:])
    found = [first]
    for axis in range(1, core.ndim):  # of rank-one tensors the leading vectors
        rows = parts.movedim(axis, 1).flatten(2)
        found.append(torch.linalg.svd(rows, full_matrices=False)[0][..., 0].T)
    found = [found[order.index(k)] for k in range(core.ndim)]
    whole = torch.ones_like(found[0][:1])  # their rank-one tensors: (entries, rank)
    for factor in found:
        whole = (whole.unsqueeze(1) * factor).flatten(0, 1)
    found[-1] = found[-1] * (torch.linalg.pinv(whole) @ core.flatten())
    return found


def _gauss_newton(core: Tensor, factors: list[Tensor], steps: int) -> tuple[list[Tensor], float]:
    """CP factors of a core of norm 1, improved by damped Gauss-Newton steps, and the error they leave.

    The matrix of the step is made from the factors' Gram matrices (Phan, Tichavský and Cichocki 2013).
    """
    letters = "abcdefghijklmnopqrstuvwxy"[: core.ndim]
    together = ",".join(f"{a}z" for a in letters)
    rank, sizes = factors[0].shape[1], list(core.shape)

    def left_over(parts: Sequence[Tensor]) -> Tensor:
        return torch.einsum(f"{together}->{letters}", *parts) - core

    rest = left_over(factors)
    error, damping, still = float(torch.linalg.vector_norm(rest)), 1e-2, 0
    for _ in range(steps):
        grams = [f.mH @ f for f in factors]
        rows = []
        for k, one in enumerate(factors):
            row = []
            for m, other in enumerate(factors):
                both = torch.ones_like(grams[0])
                for n, gram in enumerate(grams):
                    both = both if n in (k, m) else both * gram
                block = (
                    torch.einsum("ij,rs->irjs", torch.eye(sizes[k]).to(core), both)
                    if k == m
                    else torch.einsum("is,jr,rs->irjs", one, other.conj(), both)
                )
                row.append(block.reshape(sizes[k] * rank, -1))
            rows.append(torch.cat(row, 1))
        normal = torch.cat(rows)
        slope = []
        for k in range(core.ndim):
            others = [f.conj() for m, f in enumerate(factors) if m != k]
            terms = ",".join(f"{a}z" for m, a in enumerate(letters) if m != k)
            equation = f"{letters},{terms}->{letters[k]}z"
            slope.append(torch.einsum(equation, rest, *others).flatten())
        right = -torch.cat(slope)
        while damping < 1e12:
            step = torch.linalg.solve(normal + damping * torch.eye(len(right)).to(core), right)
            parts = step.split([n * rank for n in sizes])
            moved = [f + p.reshape(-1, rank) for f, p in zip(factors, parts, strict=True)]
            rest_there = left_over(moved)
            there = float(torch.linalg.vector_norm(rest_there))
            if there < error:
                break
            damping *= 4
        else:
            break
        still = still + 1 if there > 0.9999 * error else 0
        factors, rest, error, damping = moved, rest_there, there, max(damping / 5, 1e-14)
        if error < 1e-15 or still > 10:
            break
    return factors, error
