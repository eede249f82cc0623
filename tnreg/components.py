"""Balancing the local components of a factorization."""

from __future__ import annotations

import torch
from torch import Tensor

from tnreg.errors import OptionError
from tnreg.factorization import Factorization

__all__ = ["balance_"]


@torch.no_grad()
def balance_(
    model: Factorization, *, rtol: float | None = None, sweeps: int = 10_000
) -> Factorization:
    """Rescale the weights in place until the vectors of every local component have equal norms.

    Sweeps ``w <- w * sigma^(1/K) / |w|`` over all local components, up the tree and down in turn, in
    double precision; none of them changes the tensor. A component of norm zero becomes zero
    altogether, which changes nothing either. Cost: some hundred sweeps for small trees, thousands for
    long chains and trees of a hundred modes (half a minute for 64 modes on a CPU).

    Args:
        model: A factorization with at least one diagonal join; full joins are left as they are.
        rtol: Largest relative change of a norm in the last sweep; by default 1e-12, or the eps of the
            model's dtype if that is larger.
        sweeps: Give up after so many.

    Returns:
        The model.

    Raises:
        OptionError: It has no diagonal join, or ``sweeps`` were not enough; the model is as it was.
    """
    net, tree = model.network, model.tree
    if "diagonal" not in net.joins:
        raise OptionError("balance_ needs a diagonal join; this factorization has full joins only.")
    rtol = max(1e-12, torch.finfo(model.dtype).eps) if rtol is None else rtol
    wide = torch.complex128 if model.dtype.is_complex else torch.float64
    weights = [w.to(wide, copy=True) for w in model.weights.values()]
    joins = [i for i, kind in enumerate(net.joins) if kind == "diagonal"]
    change = 0.0
    for sweep in range(sweeps):
        change = 0.0
        for i in joins if sweep % 2 == 0 else reversed(joins):
            vectors = [weights[c].flatten(0, -2) for c in tree.links[i]]
            if i < len(weights):
                own = weights[i]
                vectors.append(own.unsqueeze(0) if own.ndim == 1 else own.mT)
            factors, moved = _factors(vectors)
            change = max(change, moved)
            for c, factor in zip(tree.links[i], factors, strict=False):
                weights[c] *= factor
            if i < len(weights):
                weights[i] *= factors[-1] if weights[i].ndim == 1 else factors[-1].unsqueeze(1)
        if change <= rtol:
            names = list(model.weights)
            model.load_weights(dict(zip(names, weights, strict=True)))
            return model
    raise OptionError(
        f"not balanced to rtol={rtol:.3g} after {sweeps} sweeps: norms still change by {change:.3g}.\n"
        "  allow more sweeps, or a larger rtol; the model is as it was"
    )


def _factors(vectors: list[Tensor]) -> tuple[Tensor, float]:
    """What to multiply the columns of each matrix by, ``(K, R)``, and the largest relative change."""
    largest = torch.stack([v.abs().amax(0) for v in vectors])
    alive = (largest > 0).all(0)
    safe = torch.where(largest > 0, largest, 1)
    # logarithms: the product of many norms may leave the range of the dtype
    logs = torch.stack(
        [torch.linalg.vector_norm(v / m, dim=0) for v, m in zip(vectors, safe, strict=True)]
    )
    logs = torch.where(alive, torch.where(logs > 0, logs, 1).log() + safe.log(), 0)
    shift = logs.mean(0) - logs
    moved = float(shift.abs().max()) if alive.any() else 0.0
    dead = bool((~alive & (largest > 0).any(0)).any())
    return torch.where(alive, shift.exp(), 0), max(moved, float(dead))
