"""Contraction of a network: plans by the tree and by opt_einsum, one chosen by counted cost, then executed.

A plan is a printable value that knows nothing of the numbers. Three questions can be asked of a
network:

- the dense tensor: every node holds a matrix (multi-indices of the modes below it, bond above it);
- a batch of rank-one inputs: every node holds a matrix (samples, bond above it);
- entries at given multi-indices: by the dense tensor and indexing; each subtree only at the
  sub-indices that occur below it (*distinct*); or sample by sample.

The tree's own way is the ``schedule``; the other is one einsum along a path of opt_einsum.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from opt_einsum.parser import get_symbol
from torch import Tensor

from tnreg.errors import DataError, OptionError, SizeError, check_integer
from tnreg.machine.memory import MOST_AXES, does_not_fit, limit_of, shortage, written
from tnreg.networks.einsum import Cost, Einsum, along, find_path, letters
from tnreg.networks.network import Network
from tnreg.networks.scaled import Growth, balance
from tnreg.networks.schedule import (
    TYPICAL,
    Join,
    cost_of,
    distinct_rows,
    gather,
    rounded,
    rows_to_take,
    run,
    run_scaled,
    schedule,
)
from tnreg.tensors.arrays import Scaled, check_index, exact_scales

# Moving one number through memory costs about as much time as this many flops of a matrix product.
# Measured on two CPU cores (8⁴ entries, width 512): it ranks dense, distinct and per-sample as timed.
_FLOPS_PER_MOVE = 32

# opt_einsum is taken where the tree needs more than so many times its flops, as flops of many small calls
# are not time. Over 63 training steps (six trees, both joins, batches of 64 and 1,024) the mean time over
# that of the faster route is 1.04, at worst 1.58; by flops alone 1.14 and 1.94.
_OPT_EINSUM_SAVES = 2.5

# Networks of at most so many tensors, of which so many may share an index, get an exhaustive path search as
# well: at most 20 ms on one CPU core. It takes 3 times longer for each tensor more that shares an index.
_EXHAUSTIVE, _SHARED = 12, 5

# Networks of more tensors than the first are searched for one batch size, not for each of similar ones; those
# of more than the second go by the tree: the search takes time in proportion to the square of their number.
_LARGE, _SEARCHED = 128, 1024

_ADVICE = {
    "dense": "ask for model.entries(index), model(features), model.norm() or spectra(model) instead",
    "batch": "give fewer samples at a time",
    "entries": "give fewer entries at a time",
}

# Entries beyond which a dense tensor is not even considered (8 TB in float64).
DENSE_LIMIT = 2**40


@dataclass(frozen=True, eq=False)
class Plan:
    """How a network will be contracted, chosen by counted cost; print it to read it.

    Attributes:
        kind: ``"dense"``, ``"batch"`` or ``"entries"``.
        route: What was chosen: ``"tree"`` or ``"opt_einsum"``; for entries ``"dense"``,
            ``"distinct"`` or ``"per-sample"``.
        cost: Counted cost, features and weights left out: ``flops``, ``largest``, ``held``, ``peak``.
        candidates: Route -> counted cost of everything that was considered: flops; for entries plus 32 for
            every number moved, as gathering is bound by memory and not by arithmetic.
        batch: Samples of a batch or of entries; ``None`` for the dense tensor.
        joins: The batched calls of the tree schedule, leaves first; empty for opt_einsum.
        whole: The einsum of the whole network; ``None`` for the tree schedule.
        take: For entries, where each one is in the result of the schedule; ``None`` if in order.
    """

    network: Network
    kind: str
    route: str
    cost: Cost
    candidates: Mapping[str, float] = field(default_factory=dict)
    batch: int | None = None
    joins: tuple[Join, ...] = field(default=(), repr=False)
    whole: Einsum | None = field(default=None, repr=False)
    take: Tensor | None = field(default=None, repr=False)

    @property
    def flops(self) -> int:
        """Counted flops."""
        return self.cost.flops

    @property
    def largest(self) -> int:
        """Entries of the largest intermediate or result."""
        return self.cost.largest

    @property
    def held(self) -> int:
        """Entries of all intermediates and the result together, which gradients need."""
        return self.cost.held

    @property
    def peak(self) -> int:
        """Entries of those that are there at the same time without gradients."""
        return self.cost.peak

    def __str__(self) -> str:
        of = "" if self.batch is None else f" of {self.batch} samples"
        costs = ", ".join(f"{route} {cost:.3g}" for route, cost in self.candidates.items())
        unit = "flops + 32 per number moved" if self.kind == "entries" else "flops"
        lines = [
            f"plan: {self.kind}{of} of an order-{self.network.tree.order} network by {self.route}",
            f"  considered: {costs} ({unit})",
            f"  flops {self.flops:.3g}, largest intermediate {self.largest:.3g} entries, "
            f"{self.held:.3g} in all",
        ]
        names = self.network.tree.nodes
        for join in self.joins:
            nodes = join.level.positions
            who = ", ".join(str(names[i]) for i in nodes[:4])
            who += f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
            if join.einsum is None:
                how = "rows of the weight" if join.gathers else "the weight itself"
            else:
                how = join.einsum.equation + (" at distinct rows" if join.gathers else "")
            flops = f", {join.einsum.cost.flops:.3g} flops" if join.einsum is not None else ""
            lines.append(f"  {who}: {how}, {join.rows} rows{flops}")
        for taken, equation, _ in self.whole.steps if self.whole is not None else ():
            lines.append(f"  {' x '.join(map(str, taken))}: {equation}")
        if self.take is not None:
            lines.append(f"  then {self.take.numel()} entries taken")
        return "\n".join(lines)


def plan(
    model: Any, *, batch: int | None = None, index: Tensor | None = None, memory: int | str | None = None
) -> Plan:
    """Plan the contraction of a factorization: dense tensor, batch of inputs, or entries.

    For the dense tensor and for batches it is the tree's schedule, unless that needs more than 2.5 times the
    flops of opt_einsum's ``auto``: many small calls take longer than their flops tell. It never costs more
    flops than leaf-to-root. For entries it is the cheapest of three routes by flops plus 32 for every
    number moved. Plans for dense tensors and batches are cached.

    Args:
        model: A ``Factorization`` or its ``Network``.
        batch: Plan ``model(features)`` for that many samples.
        index: Plan ``model.entries(index)``, shape ``(B, N)``, int64. Pass the plan to
            ``model.entries`` in place of the index to do the planning and checking once.
        memory: Bytes that intermediates and the result may take together, gradients included, or text
            such as ``"4GiB"``. Without it, memory is checked when the plan is carried out.

    Returns:
        The plan; with neither ``batch`` nor ``index``, that of ``model.to_tensor()``.

    Raises:
        ShapeError: ``index`` is not of shape ``(B, N)``.
        DataError: ``index`` is not int64, empty, or out of range.
        SizeError: No route stays within ``memory``.
    """
    limit = limit_of(memory, "plan")
    network = model if isinstance(model, Network) else getattr(model, "network", None)
    if not isinstance(network, Network):
        found = type(model).__name__
        raise OptionError(f"plan: expected a Factorization or its network, found {found}.", argument="model")
    plans: tuple[Plan, ...]
    if index is not None:
        if batch is not None:
            both = "plan: give batch= for inputs or index= for entries, not both."
            raise OptionError(both, argument="batch")
        plans = plans_of_entries(network, index, others=limit is not None)
    elif batch is not None:
        plans = _plans(network, check_integer(batch, 1, "plan: batch", DataError))
    elif not _may_be_dense(network):
        raise SizeError(
            f"the dense tensor would have {network.tree.order} axes (torch has no more than {MOST_AXES}) and "
            f"about 10^{sum(map(math.log10, network.sizes)):.0f} entries.\n  {_ADVICE['dense']}"
        )
    else:
        plans = _plans(network, None)
    if limit is None:
        return plans[0]
    return _within(plans, limit, getattr(model, "dtype", torch.float64).itemsize, gradients=True)


def plan_of_similar(network: Network, batch: int) -> Plan:
    """Return the plan that batches of similar sizes share, counted for the largest of them."""
    return _plans(network, rounded(batch))[0]


def plans_of_entries(network: Network, index: Tensor, *, others: bool = False) -> tuple[Plan, ...]:
    """Check an index and plan its entries: the chosen route, and ``others`` for who may need less memory."""
    # made to be kept: a plan made in inference mode could not be trained with later
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        routes = _plans_of_entries(network, check_index(index, network.sizes).detach().clone())
        return next(routes), *(routes if others else ())


def within_memory(
    plan: Plan, tensors: Sequence[Tensor], *, batch: int | None = None, index: Tensor | None = None
) -> Plan:
    """Return a plan that can be carried out where these weights are: the one given, or another route.

    A plan for batches of similar sizes needs the size; other routes to entries need their ``index``.

    Raises:
        SizeError: No route fits into the memory available; nothing was allocated.
    """
    if shortage(16 * plan.cost.held, device := tensors[0].device) is None:
        return plan
    item = max(t.dtype.itemsize for t in tensors)
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    limit = shortage(item * plan.cost.entries(gradients), device)
    if limit is None:
        return plan
    plans: tuple[Plan, ...] = (plan,)
    if plan.kind != "entries":
        plans = _plans(plan.network, batch or plan.batch)
    elif index is not None:
        plans = tuple(_plans_of_entries(plan.network, index))
    return _within(plans, limit, item, gradients=gradients, device=str(device))


def contract(
    plan: Plan, stacks: Sequence[Tensor], inputs: Tensor | Sequence[Tensor] = (), growth: Growth | None = None
) -> Tensor:
    """Carry out a plan with the weights as ``network.stacks`` groups them, and the features of a batch.

    Where partial products may leave the range of the dtype it is done again with scales; ``growth`` is what a
    model knows of that. Only on the CPU: elsewhere it would have to wait for the device.

    Returns:
        The dense tensor (axis n is mode n), or one value per sample ``(B,)``.
    """
    network = plan.network
    out = _carry_out(plan, stacks, inputs)
    growth = growth or Growth()
    if not growth.is_clear(plan, stacks) and _readable(out) and growth.may_show(stacks, inputs, out, plan):
        out = _carry_out_scaled(plan, stacks, inputs)
    if plan.kind != "dense":
        return out.reshape(-1)
    if (
        len(network.weighted) == 1
        and out.untyped_storage().data_ptr() == stacks[0].untyped_storage().data_ptr()
    ):
        out = out.clone()  # all leaves are bare: the weight is the tensor
    if plan.whole is not None:
        return out
    order = network.tree.leaf_order
    shaped = out.reshape([network.sizes[mode] for mode in order])
    return shaped.permute([order.index(mode) for mode in range(len(order))])


def _carry_out(plan: Plan, stacks: Sequence[Tensor], inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the result of the schedule or of the einsum, with the entries taken."""
    if plan.whole is None:
        out = run(plan.network, plan.joins, stacks, inputs)
    else:
        out = plan.whole(_of_whole(plan.network, stacks, inputs))
    return out if plan.take is None else out.reshape(-1).index_select(0, plan.take)


def _carry_out_scaled(plan: Plan, stacks: Sequence[Tensor], inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """Do the same with scales, so that only what leaves the range of the dtype in the end is lost."""
    dtype = stacks[0].dtype
    stacks = [exact_scales(x) for x in stacks]
    inputs = exact_scales(inputs) if isinstance(inputs, Tensor) else [exact_scales(x) for x in inputs]
    stacks, top = balance(plan.network, stacks)
    if plan.whole is None:
        x, log2 = run_scaled(plan.network, plan.joins, stacks, inputs)
    else:
        parts = _of_whole(plan.network, stacks, inputs)
        operands = [Scaled(x, x.real.new_zeros([1] * x.ndim)) for x in parts]
        x, log2 = plan.whole.scaled(operands, plan.whole.equation.split("->")[1])
    out = Scaled(x, log2 + top).value().to(dtype)
    return out if plan.take is None else out.reshape(-1).index_select(0, plan.take)


def _of_whole(network: Network, stacks: Sequence[Tensor], inputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the operands of one einsum of the whole network: the weights, then the features."""
    parts = [stack.unbind(0) for stack in stacks]
    weights = [parts[s][k] for s, k in (network.slots[p] for p in network.weighted)]
    if not len(inputs):
        device, dtype = stacks[0].device, stacks[0].dtype
        return [*weights, *(torch.eye(network.bonds[i], dtype=dtype, device=device) for i in network.copies)]
    return [*weights, *(inputs.unbind(1) if isinstance(inputs, Tensor) else inputs)]


def steps_of_batch(network: Network) -> str:
    """Return the contraction of a batch of any size as a text, which a compiler takes for a constant.

    Its first line says where the weights are in their stacks; each of the others which operands are taken,
    as positions in a list that shrinks and gets the result, and what is done with them.
    """
    chosen = _plans(network, TYPICAL)[0]
    equation, shapes = _equation(network, TYPICAL)
    path = chosen.whole.path if chosen.whole is not None else _leaf_to_root(network)
    steps = along(equation, shapes, path).steps
    slots = " ".join("{} {}".format(*network.slots[p]) for p in network.weighted)
    return "\n".join(
        [slots, *(f"{' '.join(map(str, step.taken))}:{letters(step.equation)}" for step in steps)]
    )


def contract_traced(text: str, stacks: Sequence[Tensor], inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """Carry out what ``steps_of_batch`` wrote."""
    first, *lines = text.split("\n")
    slots = [int(n) for n in first.split(" ")]
    left = [stacks[s][k] for s, k in zip(slots[::2], slots[1::2], strict=True)]
    left += [*(inputs.unbind(1) if isinstance(inputs, Tensor) else inputs)]
    for line in lines:
        taken, equation = line.split(":")
        parts = []
        for i in taken.split(" "):
            parts.append(left.pop(int(i)))
        left.append(torch.einsum(equation, *parts))
    return left[0]


def _leaf_to_root(network: Network) -> tuple[tuple[int, ...], ...]:
    """Return the path of one einsum that multiplies children and then the weight of every node."""
    links, count = network.tree.links, len(network.weighted)
    operands = {i: k for k, i in enumerate(network.weighted)}
    # numbers of operands and results, in the order in which they are left
    left, made, path = list(range(count + network.tree.order)), count + network.tree.order, []
    results: list[int] = []
    for i, below in enumerate(links):
        parts = [results[c] for c in below] or [count + network.tree.nodes[i]]  # type: ignore[operator]
        parts += [operands[i]] if i in operands else []
        for other in parts[1:]:
            step = (left.index(parts[0]), left.index(other))
            path.append(step)
            for position in sorted(step, reverse=True):
                del left[position]
            left.append(made)
            parts[0], made = made, made + 1
        results.append(parts[0])
    return tuple(path)


def _readable(x: Tensor) -> bool:
    """Tell whether numbers can be read without waiting for a device: not while they are traced either."""
    if type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not (torch._C._is_tracing() or torch._C._are_functorch_transforms_active())


# Planning


def _may_be_dense(network: Network) -> bool:
    return network.tree.order <= MOST_AXES and math.prod(network.sizes) <= DENSE_LIMIT


def _ranked(counted: Mapping[str, float]) -> list[str]:
    """Put the chosen route first, then the others by what they count."""
    chosen = choose(counted)
    return sorted(counted, key=lambda route: (route != chosen, counted[route]))


def choose(counted: Mapping[str, float]) -> str:
    """Return the route that counts least, the first of equals; opt_einsum's if it saves enough."""
    handicap = {"opt_einsum": _OPT_EINSUM_SAVES}
    return min(counted, key=lambda route: counted[route] * handicap.get(route, 1))


@lru_cache(maxsize=256)
def _plans(network: Network, batch: int | None) -> tuple[Plan, ...]:
    """Make both plans of the dense tensor or of a batch, the chosen one first."""
    kind = "dense" if batch is None else "batch"
    joins = schedule(network, batch=batch, features=batch is not None)
    plans = {"tree": Plan(network, kind, "tree", cost_of(network, joins), batch=batch, joins=joins)}
    if whole := _whole(network, batch):
        plans["opt_einsum"] = Plan(network, kind, "opt_einsum", whole.cost, batch=batch, whole=whole)
    counted = {route: plan.flops for route, plan in plans.items()}
    return tuple(replace(plans[route], candidates=counted) for route in _ranked(counted))


def _plans_of_entries(network: Network, index: Tensor) -> Iterator[Plan]:
    """Make the plans of all routes to entries, the chosen one first."""
    tree, samples, columns = network.tree, len(index), index.unbind(1)
    every = tuple(None if kind == "bare" else samples for kind in network.joins)
    costs = _row_costs(network, tuple(n and 1 for n in every))
    counted = {"per-sample": sum(costs) * samples}
    if _may_be_dense(network):
        dense = _plans(network, None)[0]
        counted = {"dense": dense.flops + _FLOPS_PER_MOVE * (dense.held + samples), **counted}
    taken, rows, ids = distinct_rows(network, index, costs)
    each = zip(rows, _row_costs(network, tuple(n and 1 + (n != samples) for n in taken)), strict=True)
    counted["distinct"] = sum(n * cost for n, cost in each) + _FLOPS_PER_MOVE * samples
    for route in _ranked(counted):
        whole, take = None, None
        if route == "per-sample":
            own = {tree.position(mode): column for mode, column in enumerate(columns)}
            read = {i: tuple(own.get(c) for c in below or (i,)) for i, below in enumerate(tree.links)}
            joins, cost = _of_entries(network, samples, every)
            joins = gather(joins, read)
        elif route == "distinct":
            joins, cost = _of_entries(network, samples, taken)
            joins, take = gather(joins, rows_to_take(network, taken, ids)), ids[-1]
        else:
            cost, joins, whole = dense.cost, dense.joins, dense.whole
            # the tree leaves its rows in the order of its leaves, opt_einsum in that of the modes
            first, *others = tree.leaf_order if whole is None else range(tree.order)
            take = columns[first]
            for mode in others:
                take = torch.add(columns[mode], take, alpha=network.sizes[mode])
        if take is not None:
            cost = Cost(cost.flops, cost.largest, cost.held + samples, cost.peak + samples)
        yield Plan(network, "entries", route, cost, counted, samples, joins, whole, take)


@lru_cache(maxsize=256)
def _of_entries(
    network: Network, samples: int, taken: tuple[int | None, ...]
) -> tuple[tuple[Join, ...], Cost]:
    """Return a schedule of entries, without the rows to take, and what it costs."""
    joins = schedule(network, batch=samples, taken=taken)
    return joins, cost_of(network, joins)


@lru_cache(maxsize=256)
def _row_costs(network: Network, taken: tuple[int | None, ...]) -> list[float]:
    """Flops plus 32 for every number moved of one row of every node; rows are taken as in a batch of one."""
    costs = [0.0] * len(taken)
    for join in schedule(network, batch=1, taken=taken):
        cost = cost_of(network, (join,))
        for i in join.level.positions:
            costs[i] = (cost.flops + _FLOPS_PER_MOVE * cost.held) / (len(join.level.positions) * join.rows)
    return costs


def _within(
    plans: Sequence[Plan], limit: int, item: int, *, gradients: bool, device: str | None = None
) -> Plan:
    """Return the first plan, the chosen one leading, whose entries of ``item`` bytes stay within a limit.

    Raises:
        SizeError: There is none; ``device`` is where so much is available, ``None`` for a caller's limit.
    """
    first = plans[0]
    sizes = [item * plan.cost.entries(gradients) for plan in plans]
    if min(sizes) > limit and first.kind != "entries":  # the smallest intermediates, at whatever cost
        whole = _whole(first.network, first.batch, "smallest")
        if whole is not None:
            plans = (*plans, replace(first, route="opt_einsum", cost=whole.cost, joins=(), whole=whole))
            sizes.append(item * whole.cost.entries(gradients))
    for plan, size in zip(plans, sizes, strict=True):
        if size <= limit:
            return plan
    what = f"{first.batch} samples" if first.batch else f"a tensor of shape {first.network.sizes}"
    advice = _ADVICE[first.kind]
    if first.batch:  # by the route whose cost is in proportion to their number
        routes = zip(plans, sizes, strict=True)
        each = min(n for plan, n in routes if plan.kind == "batch" or plan.route == "per-sample")
        most = first.batch * limit // each
        single = f"; one alone needs {written(each / first.batch)}"
        advice = f"{advice}, here no more than {most}" if most else f"give more memory{single}"
    note = ", result and intermediates"
    raise does_not_fit(f"{what}: the contraction", min(sizes), limit, advice, note=note, device=device)


def _whole(network: Network, batch: int | None, search: str = "dp") -> Einsum | None:
    """Return the network as one einsum by the cheapest path that opt_einsum finds, if it is asked for any.

    The weights come first, then the inputs. Small networks are searched by dynamic programming as well.
    """
    equation, shapes = _equation(network, batch)
    terms = equation.split("->")[0].split(",")
    if len(terms) > _SEARCHED:
        return None
    searches = ["auto"]
    if len(terms) <= _EXHAUSTIVE and max(Counter("".join(terms)).values()) <= _SHARED:
        searches.append(search)
    similar = batch and (TYPICAL if len(terms) > _LARGE else rounded(batch))
    alike = _equation(network, similar)[1]
    found = [along(equation, shapes, find_path(equation, alike, how)) for how in searches]
    if any(len(step.split("->")[1]) > MOST_AXES for call in found for _, step, _ in call.steps):
        return None  # axes of size 1, which cost nothing
    return found[-1] if search == "smallest" else min(found, key=lambda call: call.cost.flops)


def _equation(network: Network, batch: int | None) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """Return the network as one einsum and the shapes of its operands: the weights, then the inputs."""
    order, positions = network.tree.order, network.tree.position

    def word(indices: Iterable[int]) -> str:
        return "".join(map(get_symbol, indices))

    terms, output = [word(network.indices(p)) for p in network.weighted], word(range(order))
    shapes = [network.shape(p) for p in network.weighted]
    if batch is not None:
        output = get_symbol(order + len(network.tree.nodes))  # after the modes and the bonds
        places = map(positions, range(order))
        ends = [network.above[p] if p in network.bare else mode for mode, p in enumerate(places)]
        terms += [output + word([end]) for end in ends]  # type: ignore[list-item]
        shapes += [(batch, size) for size in network.sizes]
    else:
        terms += [word((network.tree.nodes[i], network.above[i])) for i in network.copies]  # type: ignore[arg-type]
        shapes += [(network.bonds[i],) * 2 for i in network.copies]
    return f"{','.join(terms)}->{output}", tuple(shapes)
