"""Penalties on the rank of a factorization, or of the convolutional network that it is.

A penalty is the same number with the same gradients on a ``Factorization``, on the ``ConvNet`` that
``to_cnn`` makes of it, and on a ``ConvAC``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from tnreg.cnns.classifier import ConvAC
from tnreg.cnns.convnet import ConvNet
from tnreg.errors import OptionError, blame, check_number
from tnreg.factorizations.factorization import Factorization
from tnreg.ranks.dense import effective_rank, entanglement_entropy
from tnreg.ranks.spectra import factorization_of, spectra
from tnreg.trees.reading import Node

Model = Factorization | ConvNet | ConvAC
Weights = Mapping[Node, float] | Mapping[int, float]

_MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "effective_rank": effective_rank,
    "entropy": entanglement_entropy,
}


@dataclass(eq=False)
class LocalComponentPenalty:
    """Sum of p-th powers of local-component norms: few of them mean low hierarchical rank.

    ``sum_v c_v sum_r (σ^(v, r))^p``, σ^(v, r) the product of the norms of the K_v vectors of the local
    component (v, r) (Razin, Maman and Cohen 2022). With ``p = 2/K_v`` it is the mean of squares at balance,
    where weight decay is ``K_v`` times as much; smaller p favours fewer components more. In the network
    the component (v, r) is pooled channel r at v: filter r of every child's convolution, and what v's own
    convolution reads from channel r.

    Args:
        p: Power; ``None`` for ``2/K_v`` at every node.
        promote: Turn the sign: a smaller penalty then means larger components, so a higher rank.
        weights: c_v: ``{node: number}``, or by layer ``{height in the tree: number}`` if all keys are
            integers; what is left out counts 0. ``None``: 1 everywhere.
        eps: Norms below ``eps`` count as ``eps``: the power has no gradient at zero.

    Example:
        >>> from tnreg import ModeTree
        >>> model = Factorization(ModeTree.star(3), 4, 2, root="ones", std=1.0)
        >>> norms = model.local_components()[(0, 1, 2)]
        >>> bool(LocalComponentPenalty(p=1)(model).isclose(norms.sum()))
        True
    """

    p: float | None = None
    _: KW_ONLY
    promote: bool = False
    weights: Weights | None = None
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.p is not None:
            self.p = _check_positive(self.p, "p", "a number > 0, or None for 2/K")
        self.eps = _check_positive(self.eps, "eps", "a number > 0")
        self.weights = _check_weights(self.weights, self)

    def __call__(self, model: Model) -> Tensor:
        """Return the penalty, a scalar tensor to be added to a loss.

        Raises:
            OptionError: No diagonal join, a weight for a node without one, or another kind of model.
        """
        view = _factorization_of(model)
        norms = view.component_norms()
        if not norms:
            message = "LocalComponentPenalty: full joins have no local components."
            raise OptionError(message, argument="model")
        return _weighted_sum(self, view, norms, self._sum_of_powers)

    def _sum_of_powers(self, norms: Tensor) -> Tensor:
        power = 2 / len(norms) if self.p is None else self.p
        # logarithms: a product of 64 norms may leave the range where its power does not
        return (power * norms.clamp_min(self.eps).log().sum(0)).exp().sum()


@dataclass(eq=False)
class EffectiveRankPenalty:
    """Sum over nodes of a smooth rank of the matricization there, from factored spectra.

    ``Σ_v c_v exp(-Σ p ln p)`` with ``p = σ(v) / Σ σ(v)``, or ``-Σ_v c_v Σ ρ ln ρ`` with
    ``ρ = σ(v)² / Σ σ(v)²``.

    Args:
        kind: ``"effective_rank"`` or ``"entropy"`` (entanglement entropy).
        promote: Turn the sign: a smaller penalty then means a higher rank.
        weights: As for ``LocalComponentPenalty``; ``None``: 1 at every node but the root.

    Cost: that of ``tnreg.spectra`` with gradients, node by node; far more than a training step of a small
    network, so use it every few steps.
    """

    kind: str = "effective_rank"
    _: KW_ONLY
    promote: bool = False
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if self.kind not in _MEASURES:
            message = f"unknown kind {self.kind!r}; write 'effective_rank' or 'entropy'."
            raise OptionError(message, argument="kind")
        self.weights = _check_weights(self.weights, self)

    def __call__(self, model: Model) -> Tensor:
        """Return the penalty, a scalar tensor to be added to a loss.

        Raises:
            OptionError: A weight for a node that the tree does not have, or another kind of model.
        """
        view = _factorization_of(model)
        return _weighted_sum(self, view, spectra(view), _MEASURES[self.kind])


def _factorization_of(model: Any) -> Factorization:
    view = factorization_of(model)
    if not isinstance(view, Factorization):
        raise OptionError(
            f"this penalty is on a Factorization, a ConvNet or a ConvAC, found {type(model).__name__}.\n"
            "  for any network: tnreg.InputGradientChange, tnreg.InteractionEnergy",
            argument="model",
        )
    return view


def _check_positive(value: Any, name: str, expected: str) -> float:
    with suppress(OptionError):
        if (number := check_number(value, name)) > 0:
            return number
    raise OptionError(f"{name} must be {expected}, found {value!r}.", argument=name)


@blame("weights")
def _check_weights(weights: Any, penalty: Any) -> Weights | None:
    if weights is None:
        return None
    who = type(penalty).__name__
    if not isinstance(weights, Mapping):
        expected = "{node: number} or {height: number}"
        raise OptionError(f"{who}: weights must be {expected}, found {weights!r}.")
    return {key: check_number(value, f"{who}: the weight of {key!r}") for key, value in weights.items()}


@blame("weights")
def _weighted_sum(
    penalty: LocalComponentPenalty | EffectiveRankPenalty,
    model: Factorization,
    values: Mapping[Node, Tensor],
    measure: Callable[[Tensor], Tensor],
) -> Tensor:
    """Sum the measures of the values of all nodes that count, times the nodes' weights."""
    tree, weights = model.tree, dict[Any, float](penalty.weights or {})
    heights = {node: tree.heights[tree.position(node)] for node in values}
    by_height = all(isinstance(key, int) and not isinstance(key, bool) for key in weights)
    keys: Mapping[Node, Any] = heights if by_height else {node: node for node in values}
    known = set(keys.values())
    wrong = [key for key in weights if key not in known]
    if wrong:
        nodes = ", ".join(map(repr, list(values)[-6:]))
        raise OptionError(
            f"{type(penalty).__name__}: nothing to weigh at {wrong[0]!r}.\n"
            f"  nodes: {nodes}; or only heights, {sorted(set(heights.values()))}"
        )
    # zero, but with a graph: a zero tensor has no gradient of its own
    total: Tensor = (0 * model.stacks[0].real).sum()
    for node, key in keys.items():
        if penalty.weights is None or key in weights:
            total = total + weights.get(key, 1.0) * measure(values[node])
    return -total if penalty.promote else total
