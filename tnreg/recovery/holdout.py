"""Which samples are held out to judge a completion, and how far their error may be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tnreg.tensors.arrays import double
from tnreg.training.tasks import Completion, Sensing

_LEAST = 10  # most samples that are held out though their share is less, but no more than a third
_RESAMPLES = 2000
_GROUPS = 1000  # samples beyond so many are drawn again in groups


def hold_out(
    task: Completion | Sensing, share: float, seed: torch.Generator
) -> tuple[Completion | Sensing, Completion | Sensing]:
    """Return the samples to train on and those held out, at random but for what nothing else tells of.

    Every index of a mode keeps an entry to train on wherever it can: what depends on it is unknown without
    one, which would not say how good the final fit on all entries is. So does every fibre (all entries whose
    indices differ at one mode only) of two entries or more, as long as there are enough others to hold out.

    Args:
        task: All samples.
        share: How many of them are held out; ten at least, or a third where this is less.
        seed: A generator on the CPU; the same one draws the same samples on every device.

    Cost: some sorts of all entries for each mode.
    """
    count = len(task.values)
    least = max(1, min(_LEAST, count // 3))
    wanted = max(least, round(share * count))
    place = torch.randperm(count, generator=seed)
    held = place < wanted
    if isinstance(task, Completion):
        index = task.index.cpu()
        slices, fibres = list(_slices(index)), list(_fibres(index))
        for groups, enough in ((slices + fibres, least), (slices, max(1, least // 3)), ([], 0)):
            held = _draw(place, wanted, groups)
            if int(held.sum()) >= enough:
                break
    return choose(task, ~held), choose(task, held)


def choose(task: Completion | Sensing, which: Tensor) -> Completion | Sensing:
    """Return the task of some of the samples."""
    which = which.to(task.values.device)
    if isinstance(task, Sensing):
        return Sensing([part[which] for part in task.features], task.values[which])
    return Completion(task.index[which], task.values[which], task.sizes)


def row_keys(index: Tensor) -> Tensor:
    """Return a number for every row, equal for equal rows and by a chance of 2**-64 for two others."""
    return (index * _factors(index)).sum(1)


def _factors(index: Tensor) -> Tensor:
    seed = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, index.shape[1:], generator=seed).to(index.device) | 1


def _slices(index: Tensor) -> Iterator[Tensor]:
    """Yield for every mode a number of the slice that each entry is in."""
    for column in index.T:
        yield torch.unique(column, return_inverse=True)[1]


def _fibres(index: Tensor) -> Iterator[Tensor]:
    """Yield for every mode a number of the fibre that each entry is in, -1 where it is there alone."""
    keys, factors = row_keys(index), _factors(index)
    for mode in range(index.shape[1]):
        _, numbers, counts = torch.unique(
            keys - index[:, mode] * factors[mode], return_inverse=True, return_counts=True
        )
        if int(counts.max()) > 1:
            yield torch.where(counts[numbers] > 1, numbers, -1)


def _draw(place: Tensor, wanted: int, groups: Sequence[Tensor]) -> Tensor:
    """Return which of the samples, in the order of ``place``, are held out so that no group is as a whole."""
    held, end = place < wanted, wanted
    while end <= len(place):
        back = torch.zeros_like(held)
        for numbers in groups:
            inside = numbers >= 0
            kept = torch.zeros(int(numbers.max()) + 1, dtype=torch.bool)
            kept[numbers[inside & ~held]] = True
            lost = (inside & ~kept[numbers]).nonzero()[:, 0]
            # of each group that lost all its samples the one that was drawn last
            last = torch.full(kept.shape, -1).scatter_reduce_(0, numbers[lost], place[lost], "amax")
            back[lost[place[lost] == last[numbers[lost]]]] = True
        count = int(back.sum())
        held &= ~back
        if not count or end == len(place):
            break
        held |= (place >= end) & (place < end + count)
        end = min(end + count, len(place))
    return held


def interval(found: Tensor, measured: Tensor, seed: torch.Generator) -> tuple[float, float]:
    """Return where 95 % of the relative errors lie if the held-out samples are drawn again from themselves.

    Args:
        found: Predictions of samples in random order.
        measured: Their values.
        seed: A generator on the CPU.
    """
    parts = torch.stack([double(found - measured).abs(), double(measured).abs()]).cpu().square()
    groups = parts.shape[1] if parts.shape[1] <= _GROUPS else _GROUPS
    sums = torch.stack([part.sum(1) for part in parts.tensor_split(groups, 1)])
    error, norm = sums[torch.randint(groups, (_RESAMPLES, groups), generator=seed)].sum(1).unbind(1)
    drawn = torch.nan_to_num(error / norm, nan=0.0, posinf=math.inf).sqrt()
    low, high = torch.quantile(drawn, drawn.new_tensor([0.025, 0.975]), interpolation="nearest").tolist()
    return low, high
