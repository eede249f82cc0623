"""Completion of a tensor from its entries or from rank-one measurements, with ranks and a tree found."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tnreg.algebra.arithmetic import scale
from tnreg.algebra.joins import bare_leaves
from tnreg.errors import OptionError, check_integer, check_number
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.memory import must_fit
from tnreg.machine.progress import working
from tnreg.ranks.rounding import limits_of
from tnreg.recovery.growth import count_numbers, degrees_of_freedom, grow
from tnreg.recovery.holdout import hold_out, interval
from tnreg.recovery.known import read_known
from tnreg.tensors.arrays import as_tensor, check_order, seeded
from tnreg.training.tasks import Completion, Sensing, relative_error, root_mean_square
from tnreg.training.trajectory import Trajectory
from tnreg.trees.drawing import tree_svg
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree


@dataclass(frozen=True, eq=False)
class Completed:
    """What ``complete`` found.

    Attributes:
        model: Fitted to all that is known, in the unit of the data.
        history: A row for every round: ``numbers``, ``ranks`` (0 where the tree of that round has no such
            node), ``train error``, ``held-out error`` and ``action``.
        error: Relative error ``‖predicted - measured‖ / ‖measured‖`` of the held-out samples, before the
            last fit with them. Tree and ranks were chosen by it, so that it is rather too small.
        interval: 95 % of these errors lie between the two if samples like the held-out ones are held out
            again: bootstrap over them.
        mean_error: The same error of the mean of the other samples.
        known: All that is known, an entry once.
        held: The samples that were held out, and ``predictions`` of them.
        notes: What there was to warn of.
    """

    model: Factorization
    history: Trajectory
    error: float
    interval: tuple[float, float]
    mean_error: float
    known: Completion | Sensing
    held: Completion | Sensing
    predictions: Tensor
    notes: tuple[str, ...]
    _like: Any = field(default=None, repr=False)

    @property
    def tree(self) -> ModeTree:
        """The tree that was given or found."""
        return self.model.tree

    @property
    def ranks(self) -> dict[Node, int]:
        """``{non-root node: size of the bond above it}``."""
        return self.model.network.named_bonds

    @torch.no_grad()
    def completed(self, *, keep: bool = True) -> Any:
        """Return the dense tensor: entries as they were measured, and in the gaps those of the model.

        Args:
            keep: If false, all entries are the model's.

        Returns:
            A tensor of shape ``sizes``; an ``xarray.DataArray`` with its coordinates if one was completed.

        Raises:
            SizeError: It would not fit into memory.
        """
        advice = "ask for the entries that you need: found.predict(index)"
        must_fit("the completed tensor", [self.model.sizes], self.model.dtype, self.model.device, advice)
        dense = self.model.to_tensor()
        if keep and isinstance(self.known, Completion):
            dense[tuple(self.known.index.T)] = self.known.values.to(dense.dtype)
        return dense if self._like is None else self._like.copy(data=dense.cpu().numpy())

    @torch.no_grad()
    def predict(self, index: Any) -> Tensor:
        """Return the model's numbers at multi-indices ``(B, N)``, or for a ``Sensing`` at its features.

        Raises:
            ShapeError, DataError: Wrong shape, or an index out of range.
        """
        if isinstance(self.known, Sensing):
            parts = [index] if isinstance(index, Tensor) else index
            features = [as_tensor(part).to(self.model.device, self.model.dtype) for part in parts]
            found: Tensor = self.model(features[0] if isinstance(index, Tensor) else features)
            return found
        rows = as_tensor(index).to(self.model.device)
        return self.model.entries(rows if rows.is_floating_point() else rows.long())

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"<Completed {self.model.sizes} from {len(self.known.values)} samples: held-out error "
            f"{self.error:.2g} ({low:.2g} to {high:.2g}), {count_numbers(self.model)} numbers,\n"
            f"  ranks {self.ranks},\n  {self.tree!r}>"
        )

    def _repr_svg_(self) -> str | None:
        """Return what a notebook shows: the tree with its ranks; ``None`` beyond 60 nodes."""
        low, high = self.interval
        title = f"held-out error {self.error:.2g} ({low:.2g} to {high:.2g})"
        return tree_svg(self.tree, edges=self.ranks, title=title)


def complete(
    task: Any = None,
    tree: ModeTree | None = None,
    *,
    join: str = "auto",
    ranks: int | Mapping[Node, int] | None = None,
    adapt: Collection[str] = ("ranks", "tree"),
    holdout: float = 0.1,
    max_numbers: int | None = None,
    seed: int = 0,
    progress: bool = True,
    index: Any = None,
    values: Any = None,
    sizes: Sequence[int] | None = None,
) -> Completed:
    """Complete a tensor from some of its entries: least squares, with ranks and tree found from the data.

    A part of what is known is held out. Ranks grow, the tree changes and both joins are tried as long as the
    held-out samples are predicted better; then all samples are fitted once more.

    Args:
        task: A dense array of numpy, torch, xarray or nested lists, in which NaN or a mask is where nothing
            is known; a pandas table in long form (``tensors.tables``); the name of a file of either; a
            ``Completion``, whose test entries are not used; or a ``Sensing``. Counts and other integers
            become numbers in double precision, half precision becomes single. Of an entry that is there
            several times the mean is taken.
        tree: Mode tree to begin with; found from the data if left out.
        join: ``"full"``, ``"diagonal"``, or ``"auto"``: whichever predicts held-out samples better;
            of more than 20,000 samples full joins alone.
        ranks: Fixed ranks: one for each non-root node of ``tree``, or an integer, less where the sizes do
            not allow as much.
        adapt: What may change: ``"ranks"``, ``"tree"``; ranks that are given do not.
        holdout: Share of the samples that is held out, in (0, 0.5]; ten at least, or a third if these are
            fewer. Every index of a mode keeps one to train on if it can.
        max_numbers: Most numbers that the model may have.
        seed: Chooses the held-out samples and whatever is random; the same ones on every device.
        progress: Show a status line.
        index: Multi-indices ``(B, N)`` of known entries, int64, in place of ``task``.
        values: Their values ``(B,)``.
        sizes: Mode sizes.

    Returns:
        Model, error with its interval, history; in the unit of the data, on its device, in its dtype.

    Raises:
        DataError: Infinite numbers, nothing known, or fewer entries than modes.
        ShapeError: A tree of another order.
        OptionError: An argument that is out of its range; ``max_numbers`` that rank one does not fit into.

    Warns:
        UserWarning: Several values for an entry; indices without an entry, bonds wider than what was
            observed, fewer samples than degrees of freedom, or an error not below that of the mean.

    Example:
        >>> x = torch.outer(torch.arange(1.0, 9), torch.arange(2.0, 8)).double()
        >>> gaps = torch.where(torch.arange(48).reshape(8, 6) % 5 == 0, torch.nan, x)
        >>> found = complete(gaps, progress=False)
        >>> bool(found.error < 1e-9), found.ranks
        (True, {0: 1, 1: 1})
    """
    generator = seeded(seed, "complete: seed")
    known, notes = read_known(task, index, values, sizes)
    tree, join, fixed, adapt = _check_options(known.sizes, tree, join, ranks, adapt, max_numbers)
    holdout = check_number(holdout, "complete: holdout", 0, 0.5 + 1e-12)
    if holdout == 0:
        message = "complete: holdout must be above 0: ranks and tree are chosen by what is held out."
        raise OptionError(f"{message}\n  the last fit uses all samples in any case", argument="holdout")
    scaled, unit, units = _scaled(known)
    train, held = hold_out(scaled, holdout, generator)
    rows: list[dict[str, Any]] = []
    with working("completing ...", progress) as say, torch.no_grad():

        def record(row: dict[str, Any]) -> None:
            rows.append(row)
            say(f"{row['numbers']} numbers, held-out error {row['held-out error']:.3g}, {row['action']}")

        grown = grow(
            train, held, tree, join=join, ranks=fixed, adapt=adapt, max_numbers=max_numbers,
            generator=generator, record=record,
        )  # fmt: skip
    predictions = grown.predictions.to(held.values.dtype)
    error, mean_error = (relative_error(x, held.values) for x in (predictions, train.values.mean()))
    low, high = interval(predictions, held.values, seeded(seed, "seed"))
    stacks = [stack.to(known.values.dtype) for stack in grown.model.stacks]
    model = Factorization.holding(grown.model.network, stacks)
    notes += _notes(model, known, error, mean_error)
    for note in notes:
        warnings.warn(f"complete: {note}", stacklevel=2)
    with torch.no_grad():
        for mode, size in enumerate(units):
            model.weights[mode].div_(size)
        model = scale(model, unit)
        # a matrix as wide as its mode is long holds nothing that its parent cannot
        named, joins = model.network.named_bonds, model.network.named_joins
        full = (m for m in model.tree.leaves if joins[model.tree.parent(m)] == "full")
        model = bare_leaves(model, [m for m in full if named[m] >= model.sizes[m]])
    return Completed(
        model, _history(rows), error, (min(low, error), max(high, error)), mean_error, known,
        _times(held, unit, units), predictions * unit, tuple(notes),
        task if hasattr(task, "dims") and hasattr(task, "coords") else None,
    )  # fmt: skip


def _check_options(
    sizes: tuple[int, ...], tree: Any, join: Any, ranks: Any, adapt: Any, max_numbers: Any
) -> tuple[ModeTree | None, str, Any, tuple[str, ...]]:
    """Return tree, join, ranks and what may change, checked."""
    if tree is not None and not isinstance(tree, ModeTree):
        raise OptionError(f"complete: tree must be a ModeTree or None, found {tree!r}.", argument="tree")
    if tree is not None:
        check_order(sizes, tree)
    if join not in ("auto", "full", "diagonal"):
        message = f"complete: join must be 'auto', 'full' or 'diagonal', found {join!r}."
        raise OptionError(message, argument="join")
    adapt = (adapt,) if isinstance(adapt, str) or not isinstance(adapt, Collection) else tuple(adapt)
    if unknown := [what for what in adapt if what not in ("ranks", "tree")]:
        message = f"complete: adapt has 'ranks', 'tree', both or neither, found {unknown[0]!r}."
        raise OptionError(message, argument="adapt")
    if ranks is None and "ranks" not in adapt:
        message = "complete: ranks that do not change must be given: ranks=."
        raise OptionError(message, argument="ranks")
    if max_numbers is not None:
        needed = sum(sizes) + (len(sizes) - 1 or 1 if tree is None else len(tree.interior))
        if check_integer(max_numbers, 1, "complete: max_numbers") < needed:
            message = f"complete: max_numbers={max_numbers} cannot hold rank one: it has {needed} numbers."
            raise OptionError(message, argument="max_numbers")
    if ranks is None:
        return tree, join, None, adapt
    adapt = tuple(what for what in adapt if what == "tree" and not isinstance(ranks, Mapping))
    if tree is not None:
        asked = {tree.nodes[i]: rank for i, rank in limits_of(tree, ranks).items()}
        join = _check_ranks(sizes, tree, join, asked, exactly=isinstance(ranks, Mapping))
        return tree, join, asked if isinstance(ranks, Mapping) else int(ranks), adapt
    if isinstance(ranks, Mapping):
        raise OptionError("complete: ranks by node need a tree: tree=.", argument="ranks")
    return tree, join, check_integer(ranks, 1, "complete: ranks"), adapt


def _check_ranks(
    sizes: tuple[int, ...], tree: ModeTree, join: str, asked: Mapping[Node, int], *, exactly: bool
) -> str:
    """Refuse ranks that no tensor has under full joins, ``exactly`` or at all; return the join."""
    if missing := [node for node in tree.nodes[:-1] if node not in asked]:
        raise OptionError(f"complete: ranks have no number for node {missing[0]!r}.", argument="ranks")
    if any(len({asked[child] for child in tree.children(node)}) > 1 for node in tree.interior):
        join = "full" if join == "auto" else join  # children of a diagonal join share their rank
    if join == "diagonal":
        return join
    most = {}
    for node in asked:
        rows = math.prod(sizes[mode] for mode in tree.modes_below(node))
        most[node] = min(rows, math.prod(sizes) // rows)
    above = [node for node in asked if asked[node] > most[node]]
    if above and (exactly or len(above) == len(asked)):
        node = max(above, key=most.__getitem__)
        message = (
            f"complete: rank {asked[node]} at node {node!r} is above {most[node]}, the largest there is."
        )
        raise OptionError(f"{message}\n  it is the smaller side of the matrix at that node", argument="ranks")
    return join


def _scaled(known: Completion | Sensing) -> tuple[Completion | Sensing, float, list[float]]:
    """Return samples of mean square 1, features of rows of mean square norm 1, and what was divided by."""
    unit = root_mean_square(known.values) or 1.0
    units = []
    if isinstance(known, Sensing):
        units = [root_mean_square(x) * math.sqrt(x.shape[1]) or 1.0 for x in known.features]
    return _times(known, 1 / unit, [1 / size for size in units]), unit, units


def _times(known: Completion | Sensing, unit: float, units: Sequence[float]) -> Completion | Sensing:
    if isinstance(known, Completion):
        return Completion(known.index, known.values * unit, known.sizes)
    features = [part * size for part, size in zip(known.features, units, strict=True)]
    return Sensing(features, known.values * unit)


def _history(rows: Sequence[Mapping[str, Any]]) -> Trajectory:
    nodes = dict.fromkeys(node for row in rows for node in row["ranks"])
    history = Trajectory()
    for step, row in enumerate(rows):
        history.append(step, {**row, "ranks": {node: row["ranks"].get(node, 0) for node in nodes}})
    history.stop_reason = "completed"
    return history


def _notes(
    model: Factorization, known: Completion | Sensing, error: float, mean_error: float
) -> Iterator[str]:
    """Yield what there is to warn of."""
    if isinstance(known, Completion):
        yield from _unseen(model, known)
    if (count := len(known.values)) < (freedom := degrees_of_freedom(model)):
        yield (
            f"{count} samples are fewer than the {freedom} degrees of freedom of the model that was found; "
            "they do not determine it."
        )
    if not error < max(mean_error, torch.finfo(model.dtype).eps ** 0.4):
        yield (
            f"held-out samples are not predicted better (error {error:.3g}) than by the mean of the others "
            f"({mean_error:.3g}); these data do not determine the gaps this way."
        )


def _unseen(model: Factorization, known: Completion) -> Iterator[str]:
    none, few = [], []
    for mode, size in enumerate(known.sizes):
        counts, rank = torch.bincount(known.index[:, mode], minlength=size), model.network.named_bonds[mode]
        empty, short = int((counts == 0).sum()), int((counts < rank).sum())
        none += [f"{empty} of {size} at mode {mode}"] * (empty > 0)
        few += [f"{short} of {size} at mode {mode} of rank {rank}"] * (short > empty)
    if none:
        yield f"no entry is known for some indices: {', '.join(none)}; predictions there rest on nothing."
    if few:
        yield f"some indices have fewer entries than the rank of their mode: {', '.join(few)}."
