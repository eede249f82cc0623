"""Which regions of the image a trained model ties together: interaction of all pairs of a grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg.errors import OptionError, ShapeError, check_integer
from tnreg.far.patches import RandomStream
from tnreg.far.probe import cross, read_images, some_images, worth_naming
from tnreg.machine.progress import advancing


@dataclass(frozen=True)
class InteractionMap:
    """How strongly a model ties every two regions of the image together.

    Attributes:
        interaction: Mean share of the variance over both regions that neither explains alone, in [0, 1];
            symmetric, ``(regions, regions)``, 0 on the diagonal.
        standard_error: Of these means, the same shape; NaN of a single repetition.
        boxes: The regions row by row, ``(regions, 4)``: top, left, bottom, right, the last two exclusive.
        grid: Rows and columns of regions.
    """

    interaction: np.ndarray[Any, Any]
    standard_error: np.ndarray[Any, Any]
    boxes: np.ndarray[Any, Any]
    grid: tuple[int, int]

    @property
    def ties(self) -> list[tuple[int, int]]:
        """The pairs of regions that interact, strongest first, without those below 1 % of the strongest."""
        seen = np.argwhere(np.triu(worth_naming(self.interaction)))
        return sorted(((int(i), int(j)) for i, j in seen), key=lambda pair: -self.interaction[pair])

    @property
    def summary(self) -> str:
        """What was found, in words."""
        count, ties = len(self.boxes) * (len(self.boxes) - 1) // 2, self.ties
        head = f"{self.grid[0]} x {self.grid[1]} regions: {len(ties) or 'none'} of {count} pairs interact"
        if not ties:
            return f"{head}."
        first, second = (tuple(self.boxes[n].tolist()) for n in ties[0])
        values = np.array([self.interaction[pair] for pair in ties])
        half = 1 + int(np.searchsorted(np.cumsum(values), values.sum() / 2))
        most = f", {half} of them hold half of the interaction" if half > 1 else ""
        return f"{head}{most}. The strongest is {first} with {second}."

    def __str__(self) -> str:
        lines = [self.summary]
        for pair in self.ties[:8]:
            first, second = (str(tuple(self.boxes[n].tolist())) for n in pair)
            lines.append(
                f"{self.interaction[pair]:.4f} ± {self.standard_error[pair]:.4f}  {first:>18} {second:>18}"
            )
        return "\n".join(lines)


@torch.no_grad()
def interaction_map(
    net: Callable[[Tensor], Tensor],
    data: Any,
    grid: tuple[int, int] = (4, 8),
    *,
    samples: int = 8,
    repetitions: int = 4,
    output: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> InteractionMap:
    """Measure the interaction of all pairs of regions of the image in a trained model.

    The image is cut into a grid. For every pair of regions k images give values to either, over the
    background of another image; the share is that of ``locality_profile``. A region that is the same in
    all k images interacts with none, and nothing is evaluated for it. All pairs see the same images.

    Args:
        net: A model as in ``locality_profile``, used and left as there.
        data: Images, as in ``locality_profile``.
        grid: Rows and columns of regions, as equal in size as the pixels allow.
        samples: k.
        repetitions: How often images are drawn anew; the map has the means.
        output: Function from what the model gives to its logits, e.g. ``lambda out: out.logits``.
        seed: Same seed and data: the same images, so that two models can be compared.
        progress: Show a progress bar.

    Raises:
        ShapeError: Too few images, fewer than two regions, or more rows or columns than pixels.
        OptionError: An argument out of range.
        DataError: Images or values of the model are NaN or infinite.

    Cost: at most ``repetitions * regions**2 / 2 * samples**2`` evaluations of the model: 127,000 for 32
    regions.

    Example:
        >>> x = torch.randn(20, 1, 4, 8, generator=torch.Generator().manual_seed(0))
        >>> found = interaction_map(lambda x: x[:, 0, 0, 0] * x[:, 0, 3, 7], x, (2, 2))
        >>> found.ties  # of four regions the first and the last
        [(0, 3)]
    """
    samples = check_integer(samples, 2, "interaction_map: samples")
    repetitions = check_integer(repetitions, 1, "interaction_map: repetitions")
    try:
        rows, columns = grid
    except (TypeError, ValueError):
        message = f"interaction_map: grid is (rows, columns), e.g. (4, 8), found {grid!r}."
        raise OptionError(message, argument="grid") from None
    rows, columns = (check_integer(n, 1, "interaction_map: grid") for n in (rows, columns))
    images = read_images(data, net, "interaction_map", samples + 1)
    height, width = images.shape[-2:]
    if rows > height or columns > width or rows * columns < 2:
        expected = f"two regions or more, and at most {height} rows and {width} columns in these images"
        message = f"interaction_map: a grid has {expected}, found {rows} x {columns}."
        raise ShapeError(message, argument="grid")
    boxes = torch.tensor([
        (height * r // rows, width * c // columns, height * (r + 1) // rows, width * (c + 1) // columns)
        for r in range(rows) for c in range(columns)
    ], device=images.device)  # fmt: skip
    count, generator = len(boxes), RandomStream(seed, "interaction_map").generator
    found = np.zeros((repetitions, count, count))
    with advancing("pairs of regions", repetitions * count * (count - 1) // 2, progress) as advance:
        for shares in found:
            background, chosen = some_images(images, samples, generator)
            differs = (chosen != chosen[:1]).flatten(0, -3).any(0)
            varied = [
                bool(differs[top:bottom, left:right].any()) for top, left, bottom, right in boxes.tolist()
            ]
            for i, j in itertools.combinations(range(count), 2):
                if varied[i] and varied[j]:
                    share = cross(net, background, chosen, boxes[[i, j]], output, "interaction_map")[0]
                    shares[i, j] = shares[j, i] = float(share)
                advance(1)
    error = np.full((count, count), math.nan)
    if repetitions > 1:
        error = found.std(axis=0, ddof=1) / math.sqrt(repetitions)
    return InteractionMap(found.mean(axis=0), error, boxes.cpu().numpy(), (rows, columns))
