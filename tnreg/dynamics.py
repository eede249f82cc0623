"""How fast components grow under gradient flow: the theory, and measurements to hold against it.

Gradient flow ``dW/dt = -dphi/dW`` on ``phi(weights) = L(end tensor)`` moves the norm sigma of the
local component (v, r), made of K vectors w, by

    d sigma/dt = <-grad L, C> sigma^2 sum_w 1/|w|^2 ,     balanced:  K sigma^(2 - 2/K) <-grad L, C> ,

where C is the end tensor with all other components at v set to zero, divided by sigma (Razin, Maman
and Cohen 2022, arXiv:2201.11729, theorem 1). As ``<w, -dphi/dw> = sigma <-grad L, C>`` for every one
of the K vectors, a single backward pass gives the rates of all components at all nodes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import OptionError, check_integer
from tnreg.factorizations.components import (
    detached_norms,
    distance_bound,
    drop_components,
    keep_components,
)
from tnreg.factorizations.factorization import Factorization
from tnreg.trees.reading import Node

__all__ = [
    "component_drive",
    "conservation_drift",
    "constant_drive",
    "distance_bound",
    "drop_components",
    "keep_components",
    "measured_rate",
    "predicted_rate",
    "predicted_singular_rate",
    "rate_bounds",
]

Loss = Callable[[Factorization], Tensor]


def component_drive(model: Factorization, loss: Loss) -> dict[Node, Tensor]:
    """``{diagonal join: (K_v, R_v)}``: ``<w, -dphi/dw>`` for the vectors of every local component.

    Rows are as in ``model.component_norms``. All rows of a node are equal, whatever the weights: that
    is what gradient flow conserves ``|w|^2 - |w'|^2`` by. Complex: the real part.
    """
    gradients = _gradients(model, loss)
    return {
        node: torch.stack([_drive(pair) for pair in pairs])
        for node, pairs in _vectors(model, gradients).items()
    }


def _vectors(
    model: Factorization, gradients: list[Tensor]
) -> dict[Node, list[tuple[Tensor, Tensor]]]:
    """``{diagonal join: [(weights, gradients)]}``, each ``(entries, R_v)``: the vectors as columns."""
    slots, tree = model.network.slots, model.tree
    weights = [stack.detach() for stack in model.stacks]

    def pair(position: int) -> tuple[Tensor, Tensor]:
        stack, slot = slots[position]
        return weights[stack][slot], gradients[stack][slot]

    out: dict[Node, list[tuple[Tensor, Tensor]]] = {}
    for i, below in enumerate(tree.links):
        if model.network.joins[i] != "diagonal":
            continue
        out[tree.nodes[i]] = [(w.flatten(0, -2), g.flatten(0, -2)) for w, g in map(pair, below)]
        if i in slots:
            w, g = pair(i)
            out[tree.nodes[i]].append((w[None], g[None]) if w.ndim == 1 else (w.mT, g.mT))
    return out


def _drive(pair: tuple[Tensor, Tensor]) -> Tensor:
    weight, gradient = pair
    return -(weight.conj() * gradient).real.sum(0)


def _drives(model: Factorization, loss: Loss) -> dict[Node, Tensor]:
    """``{diagonal join: (R_v,)}``: what all rows of ``component_drive`` equal, by the shortest vectors."""
    pairs = _vectors(model, _gradients(model, loss))
    return {node: _drive(min(found, key=lambda p: len(p[0]))) for node, found in pairs.items()}


def predicted_rate(
    model: Factorization,
    loss: Loss,
    *,
    form: str = "exact",
    norms: Mapping[Node, Tensor] | None = None,
) -> dict[Node, Tensor]:
    """``{diagonal join: (R_v,)}``: ``d sigma/dt`` of every local component by the theory.

    Args:
        model: A factorization with diagonal joins; nothing about it is changed.
        loss: Called with the model, e.g. ``task.loss``.
        form: ``"exact"`` holds for any weights; ``"balanced"`` is the law for weights whose
            unbalancedness is zero, ``K sigma^(2 - 2/K) <-grad L, C>``.
        norms: ``model.component_norms()``, if they are at hand.

    Returns:
        Rates in units of sigma per unit of gradient-flow time; 0 for components of norm 0.

    Raises:
        OptionError: Unknown form.

    Cost: one backward pass.
    """
    _check_form(form)
    drives = _drives(model, loss)
    out: dict[Node, Tensor] = {}
    for node, found in (detached_norms(model) if norms is None else norms).items():
        sigma, drive = found.prod(0), drives[node]
        alive = sigma > 0
        if form == "exact":
            growth = sigma * torch.where(alive, found, 1).pow(-2).sum(0)
        else:
            growth = len(found) * torch.where(alive, sigma, 1) ** (1 - 2 / len(found))
        out[node] = torch.where(alive, drive * growth, 0)
    return out


def measured_rate(
    model: Factorization,
    loss: Loss,
    *,
    step: float = 1e-6,
    of: Callable[[Factorization], Any] | None = None,
) -> Any:
    """Rate of change over one small gradient-descent step: ``(of(after) - of(before)) / step``.

    Its distance from the rate of gradient flow is of first order in ``step``.

    Args:
        model: Left as it is; ``of`` is called with copies of it, before the step and after.
        loss: Called with the model.
        step: Length of the step in gradient-flow time.
        of: What to measure: a tensor, or a dict of tensors. Local components by default, measured in
            double precision whatever the model's: what a small step changes is lost in single.

    Returns:
        What ``of`` returns, differentiated.
    """
    gradients = _gradients(model, loss)
    with torch.no_grad():
        start = [stack.detach() for stack in model.stacks]
        if of is None:
            wide = torch.complex128 if model.dtype.is_complex else torch.float64
            wide = wide if model.device.type != "mps" else model.dtype  # which has no doubles
            start, of = [stack.to(wide) for stack in start], Factorization.local_components
        ends = [s - step * g.to(s.dtype) for s, g in zip(start, gradients, strict=True)]
        before, after = (of(Factorization.holding(model.network, s)) for s in (start, ends))
        if isinstance(before, Mapping):
            return {key: (after[key] - before[key]) / step for key in before}
        return (after - before) / step


def rate_bounds(model: Factorization, loss: Loss) -> dict[Node, tuple[Tensor, Tensor]]:
    """``{diagonal join: (lower, upper)}``: bounds on ``d sigma/dt`` for unbalanced weights.

    With epsilon the largest ``| |w|^2 - |w'|^2 |`` within the component and ``ip = <-grad L, C>``:
    ``sigma^2 / (sigma^(2/K) + epsilon) K ip <= d sigma/dt <= (sigma^(2/K) + epsilon)^(K-1) K ip`` for
    ``ip >= 0``, the other way round for ``ip < 0``. Components of norm 0 have (0, 0).
    """
    drives = _drives(model, loss)
    out: dict[Node, tuple[Tensor, Tensor]] = {}
    for node, norms in detached_norms(model).items():
        count, sigma = len(norms), norms.prod(0)
        alive = sigma > 0
        ip = torch.where(alive, drives[node] / torch.where(alive, sigma, 1), 0)
        square = torch.where(alive, sigma, 1) ** (2 / count)
        epsilon = norms.square().amax(0) - norms.square().amin(0)
        one = sigma.square() / (square + epsilon) * count * ip
        other = (square + epsilon) ** (count - 1) * count * ip
        out[node] = torch.minimum(one, other), torch.maximum(one, other)
    return out


def predicted_singular_rate(model: Factorization, loss: Loss, *, form: str = "exact") -> Tensor:
    """``d s_r/dt`` of the singular values of a two-mode factorization's end matrix, descending.

    Args:
        model: A factorization of order 2, of any depth, such as ``ModeTree.chain(L)`` with
            ``root="ones"``.
        loss: Called with the model.
        form: ``"exact"``: ``u_r' W' v_r`` with ``W'`` the velocity of the end matrix, for any weights;
            ``"balanced"``: ``L s_r^(2 - 2/L) <-grad L, u_r v_r'>`` with L the number of weights, the
            law of Arora, Cohen, Hu and Luo (2019), arXiv:1905.13655, for balanced weights.

    Returns:
        Shape ``(min(D_0, D_1),)``. Where singular values coincide the rates are those of some basis.

    Raises:
        OptionError: Not of order 2, or an unknown form.
    """
    _check_form(form)
    if model.tree.order != 2:
        raise OptionError(
            f"predicted_singular_rate is for matrices; this factorization has order {model.tree.order}."
        )
    gradients = _gradients(model, loss)
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(model.to_tensor(), full_matrices=False)
    if form == "balanced":
        # with W = W_0 P: <-grad L, u v'> = u' (-grad L) P' W_0' u / s = u' (-dphi/dW_0) W_0' u / s
        stack, slot = model.network.slots[model.tree.position(0)]
        first, gradient = model.stacks[stack].detach()[slot], gradients[stack][slot]
        ip = -(u.conj() * (gradient @ (first.mH @ u))).real.sum(0)
        alive = s > 0
        safe = torch.where(alive, s, 1)
        depth = len(model.weights)
        return torch.where(alive, depth * safe ** (1 - 2 / depth) * ip, 0)
    # the end matrix is linear in every weight, so its velocity is a sum of end matrices
    moved, velocity = copy.deepcopy(model), torch.zeros_like(u @ vh)
    with torch.no_grad():
        for node, weight in model.weights.items():
            stack, slot = model.network.slots[model.tree.position(node)]
            moved.load_weights({node: -gradients[stack][slot]})
            velocity = velocity + moved.to_tensor()
            moved.load_weights({node: weight})
    rates: Tensor = (u.conj() * (velocity @ vh.mH)).real.sum(0)
    return rates


def constant_drive(sigma: Any, drive: Any, vectors: int, time: Any) -> Tensor:
    """``sigma(t)`` of a balanced component under a constant drive ``c = <-grad L, C>``.

    ``K = 2``: ``sigma_0 exp(2ct)``. ``K >= 3``: ``sigma^(-(K-2)/K) = sigma_0^(-(K-2)/K) - c (K-2) t``,
    infinite from the time at which the right side reaches zero. The larger K, the longer the wait and
    the sharper the rise: components are learned one after another.

    Args:
        sigma: Norm at time 0, positive.
        drive: The constant c.
        vectors: K, the number of vectors of the component.
        time: Times; all arguments broadcast.
    """
    count = check_integer(vectors, 1, "constant_drive: vectors")
    sigma, drive, time = (torch.as_tensor(x, dtype=torch.float64) for x in (sigma, drive, time))
    if count == 2:
        doubled: Tensor = sigma * torch.exp(2 * drive * time)
        return doubled
    power = (count - 2) / count
    left = sigma**-power - drive * (count - 2) * time
    grown = torch.where(left > 0, left, 1) ** (-1 / power)
    return torch.where(left > 0, grown, math.inf if count > 2 else 0.0)


def conservation_drift(before: Mapping[Node, Tensor], after: Mapping[Node, Tensor]) -> Tensor:
    """Largest change of a ``|w|^2 - |w'|^2`` between two times; gradient flow conserves all of them.

    Args:
        before: ``model.component_norms()`` at one time.
        after: The same at another.
    """
    changes = [after[node].square() - before[node].square() for node in before]
    if not changes:
        raise OptionError("conservation_drift: no diagonal joins, so nothing to conserve.")
    return torch.stack([(change.amax(0) - change.amin(0)).max() for change in changes]).max()


def _gradients(model: Factorization, loss: Loss) -> list[Tensor]:
    """Gradients of the stacks, without touching their ``grad``."""
    with torch.enable_grad():
        return list(torch.autograd.grad(loss(model), list(model.stacks)))


def _check_form(form: str) -> None:
    if form not in ("exact", "balanced"):
        raise OptionError(f"unknown form {form!r}; write form='exact' or form='balanced'.")
