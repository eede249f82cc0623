"""Components followed along a training, with the rates of their growth: measured and predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tnreg.errors import OptionError
from tnreg.training.trajectory import Trajectory
from tnreg.trees.reading import Node

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tracks:
    """The components of one node that are largest at the end, followed along the training.

    Attributes:
        steps: Updates done at every row, ``(rows,)``.
        norms: ``(rows, k)``; NaN where one was not yet among the recorded ones.
        measured: Change of the norm by flow time from the row before to the row after, for all rows
            but the first and the last, ``(rows - 2, k)``. Two intervals, because gradient descent at
            the edge of stability jumps to and fro with every step.
        predicted: Mean over the same flow time of the rates that theory predicts, ``(rows - 2, k)``;
            NaN if they were not recorded.
        bounds: The same of the lower and upper bounds for unbalanced weights, ``(rows - 2, k, 2)``.

    Without a flow time, as of Adam, rates are NaN.
    """

    steps: Array
    norms: Array
    measured: Array
    predicted: Array
    bounds: Array

    def jumps(self, share: float = 0.01) -> list[list[int]]:
        """Return ``[first step above 10 %, first step above 90 %]`` of its last norm, by component.

        Components that end below ``share`` of the largest are left out.
        """
        last, norms = self.norms[-1], np.nan_to_num(self.norms)
        rows = [np.argmax(norms > part * last, axis=0) for part in (0.1, 0.9)]
        kept = last > share * last.max()
        steps: list[list[int]] = self.steps[np.stack(rows, 1)][kept].tolist()
        return steps

    def rate_error(self) -> float | None:
        """Return the median ``|measured - predicted| / |predicted|`` while components rise, 10 to 90 %."""
        last = self.norms[-1]
        rising = (self.norms > 0.1 * last) & (self.norms < 0.9 * last) & (last > 0.01 * last.max())
        inside = rising[1:-1] & np.isfinite(self.predicted) & (self.predicted != 0)
        if not inside.any():
            return None
        ratio = self.measured[inside] / self.predicted[inside]
        return float(np.median(np.abs(ratio - 1)))


def tracks(found: Trajectory, node: Node | None = None) -> Tracks:
    """Follow the components that are largest at the end; at the root if no node is named.

    Raises:
        OptionError: No components were recorded, or none at this node.
    """
    if "components" not in found:
        raise OptionError("no components were recorded: the model has full joins only.")
    recorded, ids = found["components"], found["component ids"]
    node = list(recorded)[-1] if node is None else node
    if node not in recorded:
        raise OptionError(f"no node {node!r}; there is {', '.join(map(str, recorded))}.", argument="node")
    same = ids[node][:, :, None] == ids[node][-1]  # row, place in it, component at the end
    places, known = same.argmax(1), same.any(1)

    def follow(values: Array) -> Array:
        return np.where(known, np.take_along_axis(values.astype(float), places, 1), np.nan)

    norms = follow(recorded[node])
    time = np.diff(found.get("flow time", np.full(len(found), np.nan)))[:, None]
    around = time[1:] + time[:-1]

    def mean(rates: Array | None) -> Array:
        if rates is None:
            return np.full_like(norms[2:], np.nan)
        rates = follow(rates)
        growth = time * (rates[1:] + rates[:-1]) / 2
        return np.asarray((growth[1:] + growth[:-1]) / around)

    with np.errstate(invalid="ignore", divide="ignore"):
        measured = (norms[2:] - norms[:-2]) / around
        predicted, low, high = (
            mean(found[name][node] if name in found else None)
            for name in ("predicted rate", "lower bound", "upper bound")
        )
    return Tracks(found.steps, norms, measured, predicted, np.stack([low, high], -1))
