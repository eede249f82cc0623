"""Balancing the local components of a factorization."""

from __future__ import annotations

import torch

from tnreg.errors import OptionError
from tnreg.factorization import Factorization

__all__ = ["balance_"]


@torch.no_grad()
def balance_(
    model: Factorization, *, rtol: float | None = None, sweeps: int = 1000
) -> Factorization:
    """Rescale the weights in place until the vectors of every local component have equal norms.

    Sweeps ``w ← w · σ^{1/K} / ‖w‖`` over all local components; each one leaves the tensor
    unchanged. A component of norm zero becomes zero altogether, which changes nothing either.
    Afterwards the unbalancedness is at most ``rtol`` times the largest squared norm.

    Args:
        model: A factorization with at least one diagonal join; full joins are left as they are.
        rtol: Relative unbalancedness to reach; by default 10 times the eps of the dtype.
        sweeps: Give up after so many.

    Returns:
        The model.

    Raises:
        OptionError: It has no diagonal join, or was not balanced after ``sweeps`` sweeps.
    """
    net, tree = model.network, model.tree
    if "diagonal" not in net.joins:
        raise OptionError("balance_ needs a diagonal join; this factorization has full joins only.")
    eps = torch.finfo(model.dtype).eps
    rtol = 10 * eps if rtol is None else rtol
    weights = model.weights
    found = float("inf")
    for _ in range(sweeps):
        for i, below in enumerate(tree.links):
            if net.joins[i] != "diagonal":
                continue
            norms = model.component_norms_at(tree.nodes[i])
            # the geometric mean through logarithms: a product of many norms may leave the range
            mean = norms.clamp_min(torch.finfo(norms.dtype).tiny).log().mean(0).exp()
            alive = (norms > 0).all(0)
            factors = torch.where(alive, mean / torch.where(alive, norms, 1), 0)
            for c, factor in zip(below, factors, strict=False):
                weights[tree.nodes[c]].mul_(factor)
            if i in net.slots:
                own = weights[tree.nodes[i]]
                own.mul_(factors[-1] if own.ndim == 1 else factors[-1].unsqueeze(1))
        largest = max(float(norms.max()) for norms in model.component_norms().values())
        found = float(model.unbalancedness())
        if found <= rtol * largest**2:
            return model
    raise OptionError(
        f"not balanced to rtol={rtol:.3g} after {sweeps} sweeps (unbalancedness {found:.3g});\n"
        "  allow more sweeps"
    )
