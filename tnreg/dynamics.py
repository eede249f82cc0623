"""How fast components grow under gradient flow: the theory, and measurements to hold against it.

Gradient flow ``dW/dt = -dphi/dW`` on ``phi(weights) = L(end tensor)`` moves the norm sigma of the
local component (v, r), made of K vectors w, by

    d sigma/dt = <-grad L, C> sigma^2 sum_w 1/|w|^2 ,     balanced:  K sigma^(2 - 2/K) <-grad L, C> ,

where C is the end tensor with all other components at v set to zero, divided by sigma (Razin, Maman
and Cohen 2022, arXiv:2201.11729, theorem 1). As ``<w, -dphi/dw> = sigma <-grad L, C>`` for every one
of the K vectors, a single backward pass gives the rates of all components at all nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnreg.errors import DataError, OptionError, check_integer, check_number
from tnreg.factorizations.assembly import weights_of
from tnreg.factorizations.components import distance_bound, drop_components, keep_components
from tnreg.factorizations.factorization import Factorization
from tnreg.tensors.arrays import as_tensor, double
from tnreg.tensors.gradients import differentiating
from tnreg.training.fit import check_functions, check_loss
from tnreg.training.trajectory import Trajectory
from tnreg.trees.reading import Node

__all__ = [
    "component_drive",
    "conservation_drift",
    "constant_drive",
    "distance_bound",
    "drop_components",
    "flow",
    "keep_components",
    "measured_rate",
    "predicted_rate",
    "predicted_singular_rate",
    "rate_bounds",
]

Loss = Callable[[Factorization], Tensor]


def component_drive(model: Factorization, loss: Loss) -> dict[Node, Tensor]:
    """Return ``{diagonal join: (K_v, R_v)}``: ``<w, -dphi/dw>`` for the vectors of every local component.

    Rows are as in ``model.component_norms``. All rows of a node are equal, whatever the weights, which is
    why gradient flow conserves ``|w|^2 - |w'|^2``. Complex: the real part.
    """
    pairs = _vectors(model, loss)
    return {node: torch.stack(list(map(_drive, vectors))) for node, vectors in pairs.items()}


def _drives(model: Factorization, loss: Loss) -> dict[Node, Tensor]:
    """Return ``{diagonal join: (R_v,)}``: ``sigma <-grad L, C>``, from the shortest vectors."""
    pairs = _vectors(model, loss)
    return {node: _drive(min(vectors, key=lambda p: len(p[0]))) for node, vectors in pairs.items()}


def _drive(pair: tuple[Tensor, Tensor]) -> Tensor:
    return (pair[0].conj() * pair[1]).real.sum(0)


@torch.no_grad()
def _vectors(model: Factorization, loss: Loss) -> dict[Node, list[tuple[Tensor, Tensor]]]:
    """Return ``{diagonal join: [(w, -dphi/dw)]}``, each ``(entries, R_v)``: a column for every component."""
    weights, velocities = model.weights, _velocity(model, loss).weights
    vectors: dict[Node, list[tuple[Tensor, Tensor]]] = {}
    for node, join in model.network.named_joins.items():
        if join == "diagonal":
            columns = [
                [w[c].flatten(0, -2) for c in model.tree.children(node) if c in w]
                + ([w[node].reshape(len(w[node]), -1).mT] if node in w else [])
                for w in (weights, velocities)
            ]
            vectors[node] = list(zip(*columns, strict=True))
    return vectors


@torch.no_grad()
def predicted_rate(
    model: Factorization, loss: Loss, *, form: str = "exact", norms: Mapping[Node, Tensor] | None = None
) -> dict[Node, Tensor]:
    """Return ``{diagonal join: (R_v,)}``: ``d sigma/dt`` of every local component by the theory.

    In units of sigma per unit of gradient-flow time; 0 for components of norm 0. One backward pass.

    Args:
        model: A factorization with diagonal joins; nothing about it is changed.
        loss: Called with the model, e.g. ``task.loss``.
        form: ``"exact"`` holds for any weights; ``"balanced"`` is the law for weights whose
            unbalancedness is zero, ``K sigma^(2 - 2/K) <-grad L, C>``. OptionError for others.
        norms: ``model.component_norms()``, if known already.
    """
    _check_form(form)
    drives = _drives(model, loss)
    rates: dict[Node, Tensor] = {}
    for node, lengths in (model.component_norms() if norms is None else norms).items():
        sigma, count = lengths.prod(0), len(lengths)
        alive = sigma != 0
        if form == "exact":  # drive = sigma <-grad L, C>
            factor = sigma * torch.where(alive, lengths, 1).pow(-2).sum(0)
        else:
            factor = count * torch.where(alive, sigma, 1) ** (1 - 2 / count)
        rates[node] = torch.where(alive, drives[node] * factor, 0)
    return rates


def measured_rate(
    model: Factorization, loss: Loss, *, step: float = 1e-6, of: Callable[[Factorization], Any] | None = None
) -> Any:
    """Measure the rate of change over one small gradient-descent step: ``(of(after) - of(before)) / step``.

    It differs from the rate of gradient flow by an error of first order in ``step``.

    Args:
        model: Left as it is; ``of`` is called with copies of it, before the step and after.
        loss: Called with the model.
        step: Length of the step in gradient-flow time.
        of: What to measure: a tensor, or a dict of tensors. Local components by default, measured in
            double precision whatever the model's: single precision loses what a small step changes.
    """
    velocity, step = _velocity(model, loss), check_number(step, "measured_rate: step")
    with torch.no_grad():
        start = [stack.clone() for stack in model.stacks]
        if of is None:
            wide = torch.promote_types(model.dtype, torch.float64)
            wide = wide if model.device.type != "mps" else model.dtype  # which has no doubles
            start, of = [stack.to(wide) for stack in start], Factorization.local_components
        end = [s + step * v.to(s.dtype) for s, v in zip(start, velocity.stacks, strict=True)]
        before, after = (of(Factorization.holding(model.network, s)) for s in (start, end))
        if isinstance(before, Mapping):
            return {key: (after[key] - before[key]) / step for key in before}
        return (after - before) / step


@torch.no_grad()
def rate_bounds(model: Factorization, loss: Loss) -> dict[Node, tuple[Tensor, Tensor]]:
    """Return ``{diagonal join: (lower, upper)}``: bounds on ``d sigma/dt`` for unbalanced weights.

    With epsilon the largest ``| |w|^2 - |w'|^2 |`` within the component and ``ip = <-grad L, C>``:
    ``sigma^2 / (sigma^(2/K) + epsilon) K ip <= d sigma/dt <= (sigma^(2/K) + epsilon)^(K-1) K ip`` for
    ``ip >= 0``, the other way round for ``ip < 0``. Components of norm 0 have (0, 0).
    """
    drives = _drives(model, loss)
    bounds: dict[Node, tuple[Tensor, Tensor]] = {}
    for node, norms in model.component_norms().items():
        count, sigma = len(norms), norms.prod(0)
        alive = sigma != 0
        ip = torch.where(alive, drives[node] / torch.where(alive, sigma, 1), 0)
        epsilon = norms.square().amax(0) - norms.square().amin(0)
        widened = torch.where(alive, sigma, 1) ** (2 / count) + epsilon
        slow = sigma.square() / widened * count * ip
        fast = widened ** (count - 1) * count * ip
        bounds[node] = torch.minimum(slow, fast), torch.maximum(slow, fast)
    return bounds


@torch.no_grad()
def predicted_singular_rate(model: Factorization, loss: Loss, *, form: str = "exact") -> Tensor:
    """Return ``d s_r/dt`` of the singular values of a two-mode factorization's end matrix, descending.

    Args:
        model: Of order 2 and any depth, such as one over ``ModeTree.chain(L)`` with ``root="ones"``.
        loss: Called with the model.
        form: ``"exact"``: ``u_r' W' v_r`` with ``W'`` the velocity of the end matrix, for any weights;
            ``"balanced"``: ``L s_r^(2 - 2/L) <-grad L, u_r v_r'>`` with L the number of weights, the
            law of Arora, Cohen, Hu and Luo (2019), arXiv:1905.13655, for balanced weights.

    Returns:
        Shape ``(min(D_0, D_1),)``. Where singular values coincide the rates are those of some basis.
        OptionError if the order is not 2, or for an unknown form.
    """
    _check_form(form)
    if (order := model.tree.order) != 2:
        message = f"predicted_singular_rate is for matrices; this factorization has order {order}."
        raise OptionError(message, argument="model")
    weights, end = model.weights, model.to_tensor()
    if not torch.isfinite(end).all():
        message = "predicted_singular_rate: the end matrix has NaN or infinite entries."
        raise DataError(message, argument="model")
    u, s, vh = torch.linalg.svd(end, full_matrices=False)
    if form == "balanced":
        first = model
        if 0 not in weights:  # a bare leaf: its identity, which is not trained
            named = weights_of(model, bare=False)
            first = Factorization.from_weights(model.tree, named, join=model.network.named_joins)
        step, own = _velocity(first, loss).weights[0], first.weights[0]
        # with W = W_0 P: <-grad L, u v'> = u' (-grad L) P' W_0' u / s = u' (-dphi/dW_0) W_0' u / s
        ip = (u.conj() * (step @ (own.mH @ u))).real.sum(0)
        alive, depth = s != 0, len(weights)
        return torch.where(alive, depth * torch.where(alive, s, 1) ** (1 - 2 / depth) * ip, 0)
    velocities = _velocity(model, loss).weights
    # the end matrix is linear in every weight, so its velocity is a sum of end matrices
    moved = Factorization.holding(model.network, [stack.clone() for stack in model.stacks])
    velocity = torch.zeros_like(u @ vh)
    for node, weight in weights.items():
        moved.load_weights({node: velocities[node]})
        velocity = velocity + moved.to_tensor()
        moved.load_weights({node: weight})
    return torch.as_tensor((u.conj() * (velocity @ vh.mH)).real.sum(0))


def constant_drive(sigma: Any, drive: Any, vectors: int, time: Any) -> Tensor:
    """Return ``sigma(t)`` of a balanced component under a constant drive ``c = <-grad L, C>``.

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
    sigma, drive, time = (as_tensor(x).to(torch.float64) for x in (sigma, drive, time))
    if count == 2:
        return torch.as_tensor(sigma * torch.exp(2 * drive * time))
    power = (count - 2) / count
    root = sigma**-power - drive * (count - 2) * time  # sigma(t)^(-(K-2)/K)
    over = root <= 0
    value = torch.where(over, 1, root) ** (-1 / power)
    return torch.where(over, math.inf if count > 2 else 0.0, value)


def conservation_drift(before: Mapping[Node, Tensor], after: Mapping[Node, Tensor]) -> Tensor:
    """Return the largest change of ``|w|^2 - |w'|^2`` between two times; gradient flow conserves them all.

    ``before`` and ``after`` are ``model.component_norms()`` at these times.
    """
    changes = [as_tensor(after[node]).square() - as_tensor(before[node]).square() for node in before]
    if not changes:
        message = "conservation_drift: no diagonal joins, so nothing to conserve."
        raise OptionError(message, argument="before")
    return torch.stack([(change.amax(0) - change.amin(0)).max() for change in changes]).max()


def flow(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    times: Any,
    *,
    observe: Mapping[str, Callable[[Any], Any]] | None = None,
    stop: Callable[[Trajectory], bool | str] | None = None,
    rtol: float | None = None,
) -> Trajectory:
    """Follow the gradient flow ``dW/dt = -dphi/dW`` itself: the reference for training in steps.

    It is integrated by an explicit Runge-Kutta method of order 8, whose steps adapt to ``rtol`` (dopri8 of
    torchdiffeq, ``pip install 'tnreg[flow]'``). Use double precision: the error is no smaller than that of
    the gradients.

    Args:
        model: Any module; its trained parameters are moved to where they are at the last time.
        loss: Called with the model, e.g. ``task.loss``.
        times: Increasing; at the first one the weights are as they are now.
        observe: As for ``fit``.
        stop: As for ``fit``.
        rtol: Error of a step, relative to the weights or to the root mean square of those at the start,
            whichever is larger. Default: 1e-9 in double precision, 1e-5 otherwise.

    Returns:
        A row for every time: the loss, ``"flow time"``, and what is observed. Its ``steps`` are the gradients
        evaluated up to there, its ``stop_reason`` is ``"times"``, what ``stop`` returned, or says that the
        flow cannot be followed any further.

    Raises:
        OptionError: torchdiffeq is missing, times that do not increase, nothing to train.

    Cost: 13 gradients a step, and 2 more for every row.

    Example:
        >>> model = Factorization([0, 1], 1, 1, root="ones", std=0.0, dtype=torch.float64)
        >>> model.load_weights(dict.fromkeys((0, 1), torch.tensor([[0.1]], dtype=torch.float64)))
        >>> run = flow(model, lambda m: -m.to_tensor().sum(), [0, 1], observe={"x": Factorization.to_tensor})
        >>> print(f"{run['x'][-1].item():.8f} = {constant_drive(0.01, 1.0, 2, 1.0):.8f}")
        0.07389056 = 0.07389056
    """
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise OptionError("flow needs torchdiffeq: pip install 'tnreg[flow]'") from None
    watched = check_functions("flow", model, observe, stop=stop)
    if "flow time" in watched:
        raise OptionError("flow: the name 'flow time' is taken; call it something else.", argument="observe")
    moments = as_tensor(times).cpu()
    good = moments.ndim == 1 and len(moments) > 0 and not moments.is_complex()
    if not (good and moments.isfinite().all() and (moments.diff() > 0).all()):
        raise OptionError(f"flow: times must be increasing numbers, found {times!r}.", argument="times")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError("flow: the model has no parameters that are trained.", argument="model")
    narrow = any(torch.finfo(p.dtype).eps > 1e-10 for p in parameters)
    rtol = (1e-5 if narrow else 1e-9) if rtol is None else check_number(rtol, "flow: rtol", 1e-15)
    state, run, count = _flat(parameters), Trajectory(), 0
    options = {"method": "dopri8", "rtol": rtol, "atol": rtol * float(state.square().mean().sqrt() or 1.0)}

    def velocity(_: Tensor, at: Tensor) -> Tensor:
        nonlocal count
        count += 1
        _unflatten(at, parameters)
        with torch.enable_grad():
            value = check_loss("flow", loss(model))
            gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
        return -_flat(gradients)

    with torch.no_grad():
        for k, moment in enumerate(moments.double()):
            if k:
                between = moments[k - 1 : k + 1].to(state)
                try:  # a step ends at the row: between steps the solver interpolates to fewer digits
                    state = odeint(velocity, state, between, options={"step_t": between[1:]}, **options)[-1]
                except AssertionError:  # steps that became too small to be steps
                    run.stop_reason = f"the flow cannot be followed beyond time {float(between[0]):g}"
            _unflatten(state, parameters)
            with torch.enable_grad():
                value = float(check_loss("flow", loss(model)).detach())
            if not math.isfinite(value):
                run.stop_reason = f"the loss became {value} at time {float(moment):g}"
            if run.stop_reason:
                break
            seen = {name: function(model) for name, function in watched.items()}
            run.append(count, {"loss": value, "flow time": float(moment), **seen})
            verdict = stop(run) if stop is not None else False
            if verdict:
                run.stop_reason = verdict if isinstance(verdict, str) else "stop"
                break
    run.stop_reason = run.stop_reason or "times"
    return run


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """Return all numbers of tensors in one vector, in double precision."""
    real = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
    return torch.cat([double(part.detach()).reshape(-1) for part in real])


def _unflatten(state: Tensor, parameters: Sequence[Tensor]) -> None:
    """Write what ``_flat`` made into parameters."""
    for p in parameters:
        real = torch.view_as_real(p.data) if p.is_complex() else p.data
        part, state = state[: real.numel()], state[real.numel() :]
        real.copy_(part.reshape(real.shape))


def _velocity(model: Factorization, loss: Loss) -> Factorization:
    """Return ``-dphi/dW`` as a factorization's weights, without touching the ``grad`` of the model's."""
    with differentiating():
        plain = (
            isinstance(s, nn.Parameter) and s.requires_grad and not s.is_inference() for s in model.stacks
        )
        if not all(plain):
            model = Factorization.holding(model.network, [stack.clone() for stack in model.stacks])
        gradients = torch.autograd.grad(loss(model), list(model.stacks))
    return Factorization.holding(model.network, [-gradient for gradient in gradients])


def _check_form(form: str) -> None:
    if form not in ("exact", "balanced"):
        message = f"unknown form {form!r}; write form='exact' or form='balanced'."
        raise OptionError(message, argument="form")
