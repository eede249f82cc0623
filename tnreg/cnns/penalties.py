"""Penalties on the rank of a factorization, or of the convolutional network that it is.

Local components and singular values belong to the tensor's network, so a penalty is the same number with
the same gradients on a ``Factorization``, on the ``ConvNet`` that ``to_cnn`` makes of it, and on a
``ConvAC``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tnreg.cnns.classifier import ConvAC
from tnreg.cnns.convnet import ConvNet
from tnreg.errors import OptionError
from tnreg.factorizations.factorization import Factorization
from tnreg.ranks.dense import effective_rank, entanglement_entropy
from tnreg.ranks.spectra import spectra
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

Model = Factorization | ConvNet | ConvAC
Weights = Mapping[Node, float] | Mapping[int, float]


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
        weights: c_v: ``{node: number}``, or by layer ``{height in the tree: number}``; what is left out
            counts 0. ``None``: 1 everywhere.
        eps: Norms below ``eps`` count as ``eps``: the power has no gradient at zero.

    Example:
        >>> model = Factorization(ModeTree.star(3), 4, 2, root="ones", std=1.0)
        >>> norms = model.local_components()[(0, 1, 2)]
        >>> bool(torch.isclose(LocalComponentPenalty(p=1)(model), norms.sum()))
        True
    """

    def __init__(
        self,
        p: float | None = None,
        *,
        promote: bool = False,
        weights: Weights | None = None,
        eps: float = 1e-12,
    ) -> None:
        if p is not None:
            p = _positive(p, "p must be a number > 0, or None for 2/K")
        self.eps = _positive(eps, "eps must be a number > 0")
        self.p, self.promote = p, bool(promote)
        self.weights = _checked(weights, "LocalComponentPenalty")

    def __call__(self, model: Model) -> Tensor:
        """The penalty, a scalar tensor to be added to a loss.

        Raises:
            OptionError: No diagonal join, a weight for a node without one, or another kind of model.
        """
        seen = _seen(model)
        norms = seen.component_norms()
        if not norms:
            raise OptionError("LocalComponentPenalty: full joins have no local components.")
        factors = _by_node(self.weights, seen.tree, list(norms), "LocalComponentPenalty")
        total = torch.zeros((), dtype=seen.stacks[0].real.dtype, device=seen.device)
        for node, factor in factors.items():
            vectors = norms[node]
            power = 2 / len(vectors) if self.p is None else self.p
            # logarithms: a product of 64 norms may leave the range where its power does not
            logs = vectors.clamp_min(self.eps).log().sum(0)
            total = total + factor * (power * logs).exp().sum()
        return -total if self.promote else total

    def __repr__(self) -> str:
        return (
            f"LocalComponentPenalty(p={self.p}, promote={self.promote}, weights={self.weights!r})"
        )


class EffectiveRankPenalty:
    """Sum over nodes of a smooth rank of the matricization there, from factored spectra.

    ``Σ_v c_v exp(-Σ p ln p)`` with ``p = σ(v) / Σ σ(v)``, or ``-Σ_v c_v Σ ρ ln ρ`` with
    ``ρ = σ(v)² / Σ σ(v)²``.

    Args:
        kind: ``"effective_rank"`` or ``"entropy"`` (entanglement entropy).
        promote: Turn the sign: a smaller penalty then means a higher rank.
        weights: c_v: ``{node: number}``, or by layer ``{height: number}`` if all keys are integers; what is
            left out counts 0. ``None``: 1 at every node but the root.

    Cost: that of ``tnreg.spectra`` with gradients, node by node; far more than a training step of a small
    network, so use it every few steps.
    """

    def __init__(
        self,
        kind: str = "effective_rank",
        *,
        promote: bool = False,
        weights: Weights | None = None,
    ) -> None:
        measures: dict[str, Callable[[Tensor], Tensor]] = {
            "effective_rank": effective_rank,
            "entropy": entanglement_entropy,
        }
        if kind not in measures:
            raise OptionError(f"unknown kind {kind!r}; write 'effective_rank' or 'entropy'.")
        self.kind, self.promote = kind, bool(promote)
        self.weights = _checked(weights, "EffectiveRankPenalty")
        self._measure = measures[kind]

    def __call__(self, model: Model) -> Tensor:
        """The penalty, a scalar tensor to be added to a loss.

        Raises:
            OptionError: A weight for a node that the tree does not have, or another kind of model.
        """
        seen = _seen(model)
        found = spectra(seen)
        factors = _by_node(self.weights, seen.tree, list(found), "EffectiveRankPenalty")
        # zero, but with a graph: a zero tensor has no gradient of its own
        total: Tensor = 0 * seen.stacks[0].real.sum()
        for node, factor in factors.items():
            total = total + factor * self._measure(found[node])
        return -total if self.promote else total

    def __repr__(self) -> str:
        return (
            f"EffectiveRankPenalty({self.kind!r}, promote={self.promote}, weights={self.weights!r})"
        )


def _seen(model: Any) -> Factorization:
    if isinstance(model, ConvAC):
        model = model.net
    if isinstance(model, ConvNet):
        return model.as_factorization()
    if isinstance(model, Factorization):
        return model
    raise OptionError(
        f"this penalty is on a Factorization, a ConvNet or a ConvAC, found {type(model).__name__}.\n"
        "  for any network: tnreg.InputGradientChange, tnreg.InteractionEnergy"
    )


def _positive(value: Any, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise OptionError(f"{what}, found {value!r}.")
    return number


def _checked(weights: Any, who: str) -> Weights | None:
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise OptionError(
            f"{who}: weights must be {{node: number}} or {{height: number}}, found {weights!r}."
        )
    for key, value in weights.items():
        if isinstance(value, bool | str) or not math.isfinite(value):
            raise OptionError(f"{who}: the weight of {key!r} must be a number, found {value!r}.")
    return dict(weights)


def _by_node(
    weights: Weights | None, tree: ModeTree, nodes: list[Node], who: str
) -> dict[Node, float]:
    """``{node: factor}`` of the nodes that count."""
    if weights is None:
        return dict.fromkeys(nodes, 1.0)
    height = {node: tree.heights[tree.position(node)] for node in nodes}
    given: Mapping[Any, float] = weights
    if all(isinstance(key, int) and not isinstance(key, bool) for key in weights):
        wrong = [key for key in weights if key not in height.values()]
        found = {node: float(given[h]) for node, h in height.items() if h in given}
    else:
        wrong = [key for key in weights if key not in height]
        found = {node: float(given[node]) for node in nodes if node in given}
    if wrong:
        raise OptionError(
            f"{who}: nothing to weigh at {wrong[0]!r}.\n"
            f"  nodes: {', '.join(map(repr, nodes[-6:]))}; or only heights, {sorted(set(height.values()))}"
        )
    return found
