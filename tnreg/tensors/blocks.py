"""Tensors larger than memory, read block by block: a Dask array over zarr, HDF5 or anything else.

``compress`` reads the tensor once for every mode (small modes of a subtree together) and once more:

1. For a node, a part of the tensor that is complete in the modes below it gives a part of the Gram
   matrix of its matricization, or of its triangular factor (tall and skinny QR; Demmel, Grigori,
   Hoemmen and Langou 2012), where squares would lose digits. Together they give an orthonormal basis.
2. Where the core that is left would not fit into memory, nodes further up follow in the same way, in the
   coordinates of the nodes below them.
3. The core is what remains of the tensor in all bases.

Everything after that is done in memory on the core. How the parts are read is in ``passes``.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg.errors import DataError, OptionError, ShapeError, SizeError
from tnreg.machine.memory import available, limit_of, written
from tnreg.tensors.arrays import check_order, largest_of, squares_fit, times_power_of_two
from tnreg.tensors.axes import cut_smallest, left_vectors, rounding_rtol
from tnreg.tensors.passes import (
    Core,
    Distance,
    Rows,
    Source,
    Work,
    bytes_read,
    dask_client,
    run_parts,
    slabs_of,
    tasks_at_a_time,
)
from tnreg.trees.tree import ModeTree

log = logging.getLogger(__name__)

_ROWS = 256  # modes of a subtree are handled as one while together they have no more rows
_OFTEN = 20  # a pass that reads the tensor more often is warned about
# Share of the tolerance that the first nodes may use. They count noise once each, although what one of
# them cuts off is not there for the others; what they did not need is known once the core is.
_SHARE = 0.5
# The same if nodes above others are among them: what is cut below these later is not orthogonal to it.
_SHARE_ABOVE = 0.02


@dataclass(frozen=True)
class Compressed:
    """A tensor as a core in orthonormal bases of some nodes.

    Attributes:
        core: One axis for every node of ``front``, in double precision.
        front: Positions of nodes, in the order of the tree's leaves; all leaves are among or below them.
        bases: By position: ``(sizes of the modes below in the order of the tree's leaves.., rank)`` for
            the first nodes that were handled, ``(sizes of the children's axes.., rank)`` for nodes
            above those. Leaves that were left as they are have none.
        split: Those of the first nodes that are no leaves; nodes below them have no basis here.
        total: Square of the norm of the tensor.
        lost: Square of what was cut off, or a little more.
        cut: The same by position, of every node for itself; their sum may be larger.
        log2: The core is that of the tensor times ``2**-log2``, and so are ``total`` and ``lost``.
    """

    core: Tensor
    front: tuple[int, ...]
    bases: dict[int, Tensor]
    split: tuple[int, ...]
    total: float
    lost: float
    cut: dict[int, float]
    log2: int


def is_blocks(x: Any) -> bool:
    """Return whether this is an array that is read block by block: of dask, zarr or h5py."""
    kind = type(x).__module__.partition(".")[0]
    return kind in ("dask", "zarr", "h5py") and hasattr(x, "shape") and hasattr(x, "chunks")


def as_blocks(x: Any) -> Any:
    """Return the array as a Dask array, in blocks of some 8 MiB made of whole blocks as they are stored.

    Raises:
        OptionError: Dask is not installed.
        DataError, ShapeError: Blocks of unknown size, or no real or complex numbers.
    """
    try:
        import dask.array as da
    except ImportError:
        raise OptionError(
            "tensors on disk are read with Dask, which is not installed; pip install 'tnreg[scale]'"
        ) from None
    array = x if isinstance(x, da.Array) else da.from_array(x, "8 MiB")  # type: ignore[no-untyped-call]
    if any(math.isnan(n) for n in array.shape):
        raise ShapeError("blocks of unknown size; write array.compute_chunk_sizes() first.")
    if array.dtype.newbyteorder("=").name not in ("float32", "float64", "complex64", "complex128"):
        raise DataError(
            f"the tensor has dtype {array.dtype}; it must be float32, float64, complex64 or complex128.\n"
            "  write array.astype('float64'), which is done block by block"
        )
    if isinstance(array._meta, np.ma.MaskedArray):
        raise DataError(
            "the tensor is masked, and ranks need all entries; write dask.array.ma.filled(array, 0)."
        )
    array = array.astype(array.dtype.newbyteorder("="))  # torch reads the machine's order only
    if 0 in array.shape:
        raise DataError(f"the tensor is empty: shape {array.shape}.")
    if dask_client() is not None and any(
        type(part).__name__ == "Future" for part in dict(array.__dask_graph__()).values()
    ):
        raise OptionError(
            "the tensor is in the cluster's memory (persist); tasks here read their own part of it.\n"
            "  give the array as it is on disk, without persist()"
        )
    return array


def memory_of(memory: int | str | None) -> int:
    """Return the bytes that arrays may take: as given, or a quarter of what is available."""
    limit = limit_of(memory, "tensors read block by block")
    return max((available() or 2**32) // 4, 1) if limit is None else limit


def whole(array: Any, memory: int) -> Tensor | None:
    """Return the tensor itself if it takes no more than an eighth of the memory allowed, else ``None``."""
    if 8 * array.nbytes > memory:
        return None
    return torch.from_numpy(np.ascontiguousarray(array.compute()).reshape(array.shape))


def compress(
    array: Any, tree: ModeTree, limits: Mapping[int, int], share: float | None, memory: int
) -> Compressed:
    """Read a tensor a few times and reduce it to a core that fits into memory.

    Args:
        array: From ``as_blocks``.
        tree: Mode tree over its axes.
        limits: Largest ranks by position.
        share: Error allowed, relative to the norm of the tensor; ``None`` cuts what is zero to rounding.
        memory: Bytes that arrays may take.

    Raises:
        ShapeError: Another order than the tree's.
        DataError: NaN or infinite entries.
        SizeError: The core does not get small enough.

    Cost: one reading of the tensor and ``2 rows`` flops per entry for every mode, more for QR; one
    reading more for the core. Each pass is logged (``logging``, level INFO, ``tnreg.tensors.blocks``).
    """
    check_order(array.shape, tree)
    return _Compression(array, tree, limits, share, memory).run()


def distance_of(array: Any, rows_of: Any, memory: int) -> tuple[float, float]:
    """Compute norms of ``array - other`` and of ``array``, in one reading, at any scale.

    ``rows_of`` gives the other tensor's entries for a list of slices, one for each mode; tasks call it.
    """
    source = Source(array, tuple(range(array.ndim)))
    workers, beside = tasks_at_a_time()
    slabs = slabs_of(array, (), memory // (6 * beside))
    norms: tuple[float, float] = run_parts(source, Distance(rows_of), slabs, workers)
    return norms


class _Compression:
    """The passes over the tensor, one node after another."""

    def __init__(
        self, array: Any, tree: ModeTree, limits: Mapping[int, int], share: float | None, memory: int
    ) -> None:
        order = tree.leaf_order
        self.source, self.tree = Source(array, order), tree
        self.item = 16 if array.dtype.kind == "c" else 8  # bytes of a number
        self.limits, self.memory = limits, memory
        self.exact, self.share = share is None, share or 0.0
        self.workers, self.beside = tasks_at_a_time()
        self.modes = [tuple(sorted(tree.modes_below(node), key=order.index)) for node in tree.nodes]
        self.rows = [math.prod(array.shape[m] for m in modes) for modes in self.modes]
        self.numel = self.rows[-1]
        # every task holds three such matrices: its sum, what is added, and the new sum
        self.most_rows = math.isqrt(memory // (6 * max(self.beside, 2) * self.item))
        self.front = _first_nodes(tree, self.rows, min(_ROWS, self.most_rows))
        self.size = {i: self.rows[i] for i in self.front}  # of the axis that the core has for it
        self.bases: dict[int, Tensor] = {}
        self.total = self.lost = 0.0
        self.cut: dict[int, float] = {}
        self.warned = False
        self.first = tuple(self.front)
        self.spenders = len(tree.cuts) - sum(len(positions_below(tree, i)) for i in self.front)

    def run(self) -> Compressed:
        first = [i for i in self.front if self.rows[i] <= self.most_rows]
        if first:
            self._reduce_first(first)
        while self._core_bytes() > self._core_limit():
            above = self._next()
            if above is None:
                raise self._too_large()
            self._reduce(above)
        core = self._core()
        # without first nodes it is the tensor itself, at which nothing has looked before
        if not first and self._scale(float(largest_of(core)), int((~core.isfinite()).sum())):
            core = times_power_of_two(core, -self.source.log2)
        for i in set(self.bases) - set(self.first):  # modes below that were left as they are
            for c in self.tree.links[i]:
                self.bases.setdefault(c, self._eye(self.size[c]))
        kept = float(torch.linalg.vector_norm(core)) ** 2
        # projections take away no more than the difference, which is known to rounding
        rounding = 64 * torch.finfo(torch.float64).eps * self.total
        self.lost = min(self.lost, max(self.total - kept, 0.0) + rounding)
        if not self.total:
            self.total = kept
        return Compressed(
            core, tuple(self.front), self.bases, tuple(i for i in self.first if self.tree.links[i]),
            self.total, self.lost, self.cut, self.source.log2,
        )  # fmt: skip

    def _reduce_first(self, nodes: list[int]) -> None:
        """Look at each of these nodes in a pass, then cut all together: the smallest values first."""
        above = any(self.tree.links[i] for i in nodes)
        share = ((_SHARE_ABOVE if above else _SHARE) * self.share) ** 2
        found = [self._left_vectors(i, share / max(self.spenders, 1)) for i in nodes]
        self.total = float(found[0][1].sum())
        cuts = cut_smallest([squares for _, squares in found], share * self.total)
        for i, (left, squares), cut in zip(nodes, found, cuts, strict=True):
            self.size[i] = rank = self._rank(i, squares, cut)
            self.cut[i] = float(squares[rank:].sum())
            if self.tree.links[i] or rank < self.rows[i]:  # else the mode stays as it is
                sizes = [self.source.array.shape[m] for m in self.modes[i]]
                self.bases[i] = left[:, :rank].reshape(*sizes, -1)
        self.lost = sum(self.cut.values())
        self.spenders -= len(nodes)

    def _rank(self, i: int, squares: Tensor, cut: Tensor) -> int:
        """Return how many singular values to keep, if the tolerance allows to cut these."""
        rank = int((~cut).sum())
        if self.exact:
            longest = max(self.rows[i], self.numel // self.rows[i])
            dtype = getattr(torch, self.source.array.dtype.name)
            rtol = rounding_rtol(longest, dtype, squares.dtype)
            rank = int((squares > rtol**2 * squares[0]).sum())
        return max(1, min(rank, self.limits.get(i, rank)))

    def _reduce(self, i: int) -> None:
        """Let a node above the front take the place of its children there, after a pass for it."""
        below = self.tree.links[i]
        rows = math.prod(self.size[c] for c in below)
        if rows > self.most_rows:
            raise self._too_large()
        if len(below) == 1:  # it has the matricization of its child: no pass is needed
            rank, self.bases[i] = rows, self._eye(rows)
        else:
            allowed = max(self.share**2 * self.total - self.lost, 0.0) / max(self.spenders, 1)
            left, squares = self._left_vectors(i, allowed / self.total if self.total else 0.0)
            [cut] = cut_smallest([squares], allowed)
            rank = self._rank(i, squares, cut)
            if 8 * self.rows[i] * rank * self.item > self.memory:  # its basis over all modes
                raise self._too_large()
            self.cut[i] = float(squares[rank:].sum())
            self.lost += self.cut[i]
            self.bases[i] = left[:, :rank].reshape(*(self.size[c] for c in below), rank)
        self.size[i] = rank
        self.spenders -= 1
        k = self.front.index(below[0])
        self.front[k : k + len(below)] = [i]

    def _left_vectors(self, i: int, part: float) -> tuple[Tensor, Tensor]:
        """Compute left vectors and squared values, as ``left_vectors``, of the front or one node above."""
        inside = [i] if i in self.front else self.tree.links[i]
        rows = math.prod(self.size[c] for c in inside)
        gram, factor = (partial(self._pass, i, inside, rows, squares=way) for way in (True, False))
        return left_vectors(rows, None if self.exact else part, gram, factor)

    def _pass(self, i: int, inside: Sequence[int], rows: int, *, squares: bool) -> Tensor:
        """Compute the Gram matrix or triangular factor of a node, on a scale whose squares stay in range.

        Its rows are made of those of the nodes ``inside``, which are in the front.
        """
        modes = self.modes[i]
        lengths, bases = [self.rows[c] for c in inside], [self._basis(c) for c in inside]
        first = self.source.order.index(modes[0])
        work = Rows(first, len(modes), lengths, bases, squares)
        kind, flops = ("Gram matrix", 2) if squares else ("QR", 4)
        flops *= rows**2 * (self.numel // self.rows[i])
        what, held = f"{kind} of {rows} rows at node {self.tree.nodes[i]!r}", 3 * rows**2 * self.item
        result: Tensor
        result, largest, bad = self._read(what, work, modes, held, flops)
        if self._scale(largest, bad):
            return self._pass(i, inside, rows, squares=squares)
        return result

    def _scale(self, largest: float, bad: int) -> bool:
        """Return whether the tensor is needed on another scale, which is then set."""
        if bad:
            raise DataError(f"the tensor has entries that are not finite, {bad} of {self.numel} or more.")
        if self.source.log2 or squares_fit(largest):
            return False
        self.source.log2 = math.frexp(largest)[1]
        return True

    def _core(self) -> Tensor:
        shape = tuple(self.size[i] for i in self.front)
        work = Core([self.modes[i] for i in self.front], [], shape)
        for modes, basis in zip(work.modes, map(self._basis, self.front), strict=True):
            sizes = [self.source.array.shape[m] for m in modes]
            work.bases.append(None if basis is None else basis.reshape(*sizes, -1))
        ranks = [n for n, basis in zip(shape, work.bases, strict=True) if basis is not None]
        held, flops = self.memory // (2 * self.beside), 2 * min(ranks, default=0) * self.numel
        core: Tensor = self._read(f"core of shape {shape}", work, (), held, flops)
        return core

    def _next(self) -> int | None:
        """Return the node above the front with the fewest rows whose children are all in it."""
        rows = {
            i: math.prod(self.size[c] for c in below)
            for i, below in enumerate(self.tree.links[:-1])
            if below and all(c in self.front for c in below)
        }
        return min(rows, key=lambda i: (rows[i], i)) if rows else None

    def _basis(self, i: int) -> Tensor | None:
        """Return a node's basis over the modes below it, ``(rows, rank)``; ``None`` if it has all rows."""
        links = self.tree.links[i]
        if i in self.first:
            return self.bases[i].reshape(self.rows[i], -1) if i in self.bases else None
        if len(links) == 1:
            return self._basis(links[0])
        basis = self.bases[i]
        for k, inner in enumerate(map(self._basis, links)):
            if inner is not None:
                basis = torch.tensordot(inner, basis.movedim(k, 0), dims=1).movedim(0, k)
        return basis.reshape(self.rows[i], -1)

    def _eye(self, size: int) -> Tensor:
        return torch.eye(size, dtype=torch.complex128 if self.item == 16 else torch.float64)

    def _core_bytes(self) -> int:
        return int(math.prod(self.size[i] for i in self.front) * self.item)

    def _core_limit(self) -> int:
        return self.memory // (2 * (self.beside + 1))

    def _too_large(self) -> SizeError:
        shape = tuple(self.size[i] for i in self.front)
        asked = "no tolerance" if self.exact else f"a tolerance of {self.share:.3g}"
        long = [m for m, size in enumerate(self.source.array.shape) if size > self.most_rows]
        looked = ""
        if long:
            needed = 6 * max(self.beside, 2) * self.item * max(self.source.array.shape) ** 2
            looked = (
                f"  modes {', '.join(map(str, long))} are longer than {self.most_rows} and were not looked "
                f"at, which takes memory={written(needed)} with {self.beside} tasks at a time\n"
            )
        return SizeError(
            f"with {asked} the tensor reduces to a core of shape {shape}, which does not fit into memory.\n"
            f"{looked}"
            f"  needed: {self._core_bytes():,} bytes ({written(self._core_bytes())}), several times\n"
            f"  allowed (memory=): {self.memory:,} bytes ({written(self.memory)}), of which a core may take "
            f"{written(self._core_limit())}\n"
            "  give a larger rtol, smaller ranks, more memory, or a tree whose lower nodes have small ranks; "
            "for spectra take decompose(x, tree, rtol=...) first",
            argument="memory",
        )

    def _read(self, what: str, work: Work, modes: Sequence[int], held: int, flops: int) -> Any:
        """Work on all parts that are complete in these modes, and say so in the log.

        A task holds some five copies of its part, and in any case the bytes that are ``held``.
        """
        slabs = slabs_of(self.source.array, modes, max(self.memory // self.beside - held, 5) // 5)
        self._tell(what, slabs, flops)
        return run_parts(self.source, work, slabs, self.workers)

    def _tell(self, what: str, slabs: Sequence[tuple[slice, ...]], flops: int) -> None:
        array = self.source.array
        reads = bytes_read(array, slabs)
        times = reads / array.nbytes
        message = "%s: %d parts, %s read (%.2f times the tensor), %.3g flops"
        log.info(message, what, len(slabs), written(reads), times, flops)
        if times > _OFTEN and not self.warned:
            self.warned = True
            warnings.warn(
                f"{what}: with memory={written(self.memory)} and blocks of {array.chunksize} the tensor is "
                f"read {times:.0f} times in one pass; give more memory, or store it in smaller blocks.",
                stacklevel=2,
            )


def _first_nodes(tree: ModeTree, rows: Sequence[int], most: int) -> list[int]:
    """List the highest nodes with few rows, single modes elsewhere, in the order of the tree's leaves."""
    nodes, waiting = list[int](), list(reversed(tree.links[-1]))
    while waiting:
        i = waiting.pop()
        if rows[i] <= most or not tree.links[i]:
            nodes.append(i)
        else:
            waiting.extend(reversed(tree.links[i]))
    return nodes


def positions_below(tree: ModeTree, i: int) -> list[int]:
    """List the positions of all nodes below a node."""
    nodes = list(tree.links[i])
    for c in nodes:  # grows
        nodes += tree.links[c]
    return nodes
