"""Passes over a tensor larger than memory: its parts, the work on each of them, and how Dask runs them.

A part is complete in some modes. ``Work`` on a part gives a contribution, and contributions are put together.
Dask runs the parts in threads of this process, or on the workers of a ``distributed.Client`` if there is one.
A part is read inside the task that uses it: no more than one for each thread is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg.tensors.arrays import double, largest_of, times_power_of_two
from tnreg.tensors.axes import axis_gram, axis_product, axis_triangle, triangle


class Source:
    """The array, modes in the given order, times ``2**-log2``; a class that Dask does not look into."""

    def __init__(self, array: Any, order: tuple[int, ...], log2: int = 0) -> None:
        self.array, self.order, self.log2 = array, order, log2

    def read(self, slab: tuple[slice, ...]) -> Tensor:
        """Read a part in double precision; slices are by mode."""
        part = np.ascontiguousarray(self.array[slab].compute(scheduler="synchronous"))
        values = double(torch.from_numpy(part)).permute(self.order)
        return times_power_of_two(values, -self.log2) if self.log2 else values


class Work:
    """What is done with every part; workers of a cluster get it by pickle."""

    def of(self, part: Tensor, slab: tuple[slice, ...]) -> Any:
        """Return the contribution of one part, in the order of the tree's leaves; slices are by mode."""
        raise NotImplementedError

    def join(self, one: Any, other: Any) -> Any:
        """Put two contributions together; neither is changed, as tasks may be asked for theirs again."""
        raise NotImplementedError

    def onto(self, sum: Any, part: Tensor, slab: tuple[slice, ...]) -> Any:
        """Add the contribution of one more part to a sum, which may be changed."""
        return self.join(sum, self.of(part, slab))


@dataclass
class Rows(Work):
    """Gram matrix (``squares``) or triangular factor of a node, the largest entry, how many are not finite.

    The node has ``count`` modes behind the ``first`` axes of a part. ``lengths`` are the rows of the children
    (of the node itself, if it is one of the first); ``bases`` are theirs, ``None`` where they were left as
    they are.
    """

    first: int
    count: int
    lengths: Sequence[int]
    bases: Sequence[Tensor | None]
    squares: bool

    def of(self, part: Tensor, slab: tuple[slice, ...]) -> tuple[Tensor, float, int]:
        """Look at a part that is complete in the node's modes."""
        largest = float(largest_of(part))
        if not math.isfinite(largest):
            return part.new_zeros(0, 0), 0.0, int((~torch.isfinite(part)).sum())
        before = math.prod(part.shape[: self.first])
        behind = math.prod(part.shape[self.first + self.count :])
        view = _in_bases(part, [before, *self.lengths, behind], [None, *self.bases, None])
        view = view.reshape(before, -1, behind)
        return axis_gram(view) if self.squares else axis_triangle(view), largest, 0

    def join(self, one: Any, other: Any) -> tuple[Tensor, float, int]:
        """Add Gram matrices, or factor two triangular factors below each other."""
        bad = one[2] + other[2]
        if bad:
            return one[0], 0.0, bad
        both = one[0] + other[0] if self.squares else triangle(torch.cat([one[0], other[0]]))
        return both, max(one[1], other[1]), 0


@dataclass
class Core(Work):
    """The tensor in the bases of the front nodes.

    The bases are ``(sizes of the node's modes.., rank)``, ``None`` for a mode that was left as it is.
    """

    modes: list[tuple[int, ...]]
    bases: list[Tensor | None]
    shape: tuple[int, ...]

    def of(self, part: Tensor, slab: tuple[slice, ...]) -> Tensor:
        """Return the part in the bases, where it belongs in the core."""
        return self.onto(part.new_zeros(self.shape), part, slab)

    def onto(self, sum: Tensor, part: Tensor, slab: tuple[slice, ...]) -> Tensor:
        """Add the part in the bases where it belongs."""
        lengths, bases, places = list[int](), list[Tensor | None](), list[slice]()
        for modes, basis in zip(self.modes, self.bases, strict=True):
            here = tuple(slab[m] for m in modes)
            lengths.append(math.prod(s.stop - s.start for s in here))
            bases.append(None if basis is None else basis[here].reshape(lengths[-1], -1))
            places.append(here[0] if basis is None else slice(None))
        sum[tuple(places)] += _in_bases(part, lengths, bases)
        return sum

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        """Add two parts of the core."""
        return one + other


class Distance(Work):
    """Norms of the difference to another tensor, and of the tensor."""

    def __init__(self, rows_of: Any) -> None:
        self.rows_of = rows_of

    def of(self, part: Tensor, slab: tuple[slice, ...]) -> tuple[float, float]:
        """Compare a part with the same part of the other tensor."""
        return norm(part - self.rows_of(slab)), norm(part)

    def join(self, one: Any, other: Any) -> tuple[float, float]:
        """Put norms of two parts together, without squares that leave the range of doubles."""
        return math.hypot(one[0], other[0]), math.hypot(one[1], other[1])


def _in_bases(values: Tensor, lengths: Sequence[int], bases: Sequence[Tensor | None]) -> Tensor:
    """Compute coordinates of some axes in bases ``(length, rank)``, those that shrink most first."""
    shape = list(lengths)
    present = [(k, basis) for k, basis in enumerate(bases) if basis is not None]
    for k, basis in sorted(present, key=lambda pair: pair[1].shape[1] / len(pair[1])):
        view = values.reshape(math.prod(shape[:k]), shape[k], -1)
        values, shape[k] = axis_product(view, basis), basis.shape[1]
    return values.reshape(shape)


def norm(x: Tensor) -> float:
    """Return the Frobenius norm; infinite only if it leaves the range of doubles."""
    largest = float(largest_of(x))
    log2 = math.frexp(largest)[1] if math.isfinite(largest) else 0
    scaled = torch.linalg.vector_norm(times_power_of_two(x, -log2))
    return float(times_power_of_two(float(scaled), log2))


def slabs_of(array: Any, whole_modes: Sequence[int], budget: int) -> list[tuple[slice, ...]]:
    """List parts that cover the array, complete in some modes, along the borders of blocks where they fit.

    The budget is for the bytes of one part in double precision.
    """
    from dask.array.core import slices_from_chunks

    most = max(budget // (16 if array.dtype.kind == "c" else 8), 1)
    steps = [  # lengths along every mode
        [array.shape[mode]] if mode in whole_modes else list(lengths)
        for mode, lengths in enumerate(array.chunks)
    ]

    def numbers() -> int:
        return math.prod(max(part) for part in steps)

    free = [mode for mode in range(array.ndim) if mode not in whole_modes]
    while numbers() > most and any(max(steps[m]) > 1 for m in free):
        longest = max(free, key=lambda m: max(steps[m]))
        steps[longest] = [h for n in steps[longest] for h in ((n + 1) // 2, n // 2) if h]
    for mode in reversed(free):  # blocks that lie next to each other
        while len(steps[mode]) > 1:
            pairs = [sum(steps[mode][k : k + 2]) for k in range(0, len(steps[mode]), 2)]
            before, steps[mode] = steps[mode], pairs
            if numbers() > most:
                steps[mode] = before
                break
    return list(slices_from_chunks(tuple(map(tuple, steps))))  # type: ignore[no-untyped-call]


def bytes_read(array: Any, slabs: Sequence[tuple[slice, ...]]) -> int:
    """Count the bytes of all blocks that the parts touch; a block counts every time."""
    touched = np.ones(len(slabs), dtype=np.int64)
    for mode, lengths in enumerate(array.chunks):
        borders = np.cumsum([0, *lengths])
        first = np.searchsorted(borders, [slab[mode].start for slab in slabs], side="right") - 1
        last = np.searchsorted(borders, [slab[mode].stop for slab in slabs])
        touched *= borders[last] - borders[first]
    return int(touched.sum()) * int(array.dtype.itemsize)


def tasks_at_a_time() -> tuple[int, int]:
    """Return how many tasks Dask runs at a time, and how many of them in one process."""
    import dask
    from dask.base import get_scheduler

    client = dask_client()
    if client is not None:
        threads = client.nthreads().values()
        return max(sum(threads), 1), max(threads, default=1)
    name = getattr(get_scheduler(), "__module__", "dask.threaded")  # type: ignore[no-untyped-call]
    if name.startswith("dask.local"):  # one after another
        return 1, 1
    count = dask.config.get("num_workers", None) or dask.system.CPU_COUNT
    return count, 1 if "multiprocessing" in name else count


def dask_client() -> Any:
    """Return the client of distributed that Dask uses, if there is one."""
    from dask.base import get_scheduler

    client = getattr(get_scheduler(), "__self__", None)  # type: ignore[no-untyped-call]
    return client if hasattr(client, "nthreads") else None


def run_parts(source: Source, work: Work, slabs: Sequence[tuple[slice, ...]], workers: int) -> Any:
    """Work on all parts by Dask, and put the contributions together."""
    from dask.base import compute
    from dask.delayed import delayed

    count = min(len(slabs), workers)  # each holds one sum
    shared = delayed((source, work), traverse=False, pure=False)
    task = delayed(_some, pure=False)
    join = delayed(_both, pure=False)
    parts = [task(shared, list(slabs[k::count])) for k in range(count)]
    while len(parts) > 1:  # two by two
        pairs = [parts[k : k + 2] for k in range(0, len(parts), 2)]
        parts = [join(shared, *pair) if len(pair) == 2 else pair[0] for pair in pairs]
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))  # threads of Dask and of torch would fight
    try:
        return compute(parts[0])[0]  # type: ignore[no-untyped-call]
    finally:
        torch.set_num_threads(threads)


def _some(shared: tuple[Source, Work], slabs: Sequence[tuple[slice, ...]]) -> Any:
    source, work = shared
    total = work.of(source.read(slabs[0]), slabs[0])
    for slab in slabs[1:]:
        total = work.onto(total, source.read(slab), slab)
    return total


def _both(shared: tuple[Source, Work], one: Any, other: Any) -> Any:
    return shared[1].join(one, other)
