"""Is the route of fewest counted flops the fastest one on this device, and by how much not?

Dense tensors and batches by the tree and by opt_einsum; entries by the dense tensor, at distinct rows and
sample by sample: forward, and forward with backward, float32, no TF32. The networks of README's table of
speeds first, then wide ones. ``summary`` has the geometric means of chosen / fastest, for what is chosen
today and for two other rules: opt_einsum only where the tree needs ``factor`` times its flops (today 2.5),
and by flops plus ``constant`` for every number moved (today 32 for entries, 0 elsewhere).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import steps
import torch
from torch import Tensor

from gpu_stages.bench import Bench
from gpu_stages.launches import counted
from tnreg.machine.memory import available
from tnreg.networks.einsum import along
from tnreg.networks.network import Network
from tnreg.networks.plan import _FLOPS_PER_MOVE, Plan, _plans, _plans_of_entries, contract
from tnreg.trees.tree import ModeTree

FACTORS = (1, 1.5, 2.5, 5, 10)
CONSTANTS = (8, 32, 128, 512)
_MOST_FLOPS = {"cuda": 2e13, "cpu": 5e9}  # of a forward pass; beyond it a case is left out


@dataclass(frozen=True)
class Case:
    """A network and what is asked of it: the dense tensor, a batch, or so many entries."""

    name: str
    network: Network
    batch: int | None = None
    entries: int | None = None

    def plans(self, device: torch.device) -> tuple[Plan, ...]:
        """All routes, the one that is chosen first."""
        if self.entries is None:
            return _plans(self.network, self.batch)
        total, few = math.prod(self.network.sizes), torch.Generator().manual_seed(0)
        flat = torch.randperm(total, generator=few)[: self.entries]
        index = torch.stack(torch.unravel_index(flat, self.network.sizes), 1)
        return tuple(_plans_of_entries(self.network, index.to(device)))


def cases(*, tiny: bool) -> Iterator[Case]:
    """README's networks, then wide ones; the most telling first."""
    htf = Network.build(ModeTree.binary(4), 8, 8 if tiny else 512)
    cp = Network.build(ModeTree.star(3), 16, 8 if tiny else 256, root="ones")
    matrix = Network.build(ModeTree.chain(3), 64, 64, root="ones")
    for name, network in (("htf", htf), ("cp", cp), ("matrix", matrix)):
        yield Case(f"{name}, 2048 entries", network, entries=2048)
        yield Case(f"{name}, dense", network)

    def batches(sites: int, join: str, bonds: tuple[int, ...], *samples: int) -> Iterator[Case]:
        for bond in bonds:
            network = Network.build(ModeTree.binary(sites), 8, bond, join=join)
            for batch in samples:
                yield Case(f"{join} {sites} sites, bond {bond}, batch {batch}", network, batch)

    if tiny:
        yield from batches(8, "full", (4,), 16)
        yield from batches(8, "diagonal", (8,), 16)
        return
    yield from batches(16, "full", (16,), 1024)
    yield from batches(16, "full", (64, 128, 256), 64, 1024, 8192)
    yield from batches(16, "diagonal", (512, 4096), 64, 1024, 8192)
    wide = (("16^4 diagonal 256", 4, 16, 256, "diagonal"), ("8^6 full 32", 6, 8, 32, "full"),
            ("8^8 diagonal 64", 8, 8, 64, "diagonal"))  # fmt: skip
    for name, order, size, bond, join in wide:
        network = Network.build(ModeTree.binary(order), size, bond, join=join)
        for count in (1024, 16384):
            yield Case(f"{name}, {count} entries", network, entries=count)
        yield Case(f"{name}, dense", network)
    yield from batches(8, "full", (64, 128, 256, 512), 64, 1024, 8192)


def run(bench: Bench) -> None:
    """Time every route of every case, then what others do with the same networks."""
    torch.backends.cuda.matmul.allow_tf32 = False
    bench.add(note="float32, TF32 off; milliseconds", cases={}, left_out={})
    done: dict[str, Any] = {}
    for k, case in enumerate(cases(tiny=bench.rehearse)):
        if k == 7:  # README's table is done
            bench.add(peers=peers(bench))
        if bench.left() < 5:
            bench.figures["left_out"][case.name] = "no time left"
            continue
        try:
            found = measured(bench, case)
        except Exception as error:  # most likely out of memory
            found = f"{type(error).__name__}: {error}"
        if isinstance(found, str):
            bench.figures["left_out"][case.name] = found
            continue
        done[case.name] = found
        bench.add(cases=done, summary=summary(done))


def measured(bench: Bench, case: Case) -> dict[str, Any] | str:
    """Milliseconds and counted costs of every route; or why it is left out."""
    plans = case.plans(bench.device)
    weights = sum(len(s.positions) * math.prod(s.shape) for s in case.network.stacks)
    free = available(bench.device) or 0
    plans = tuple(p for p in plans if p.flops <= _MOST_FLOPS[bench.device.type])
    plans = tuple(p for p in plans if 4 * (3 * p.held + 3 * weights) < 0.8 * free)
    if len(plans) < 2:
        return "fewer than two routes within the limits of flops and memory"
    stacks, inputs = numbers(case, bench.device)
    routes = {p.route: route(bench, p, stacks, inputs) for p in plans}
    return {"kind": plans[0].kind, "chosen": next(iter(routes)), "routes": routes}


def numbers(case: Case, device: torch.device) -> tuple[list[Tensor], Tensor | tuple[()]]:
    """Weights that keep the size of what goes through them, and features."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    stacks = []
    for stack in case.network.stacks:
        inner = math.prod(stack.shape[:-1] if len(stack.shape) > 1 else stack.shape)
        made = normal(len(stack.positions), *stack.shape).div_(math.sqrt(inner))
        stacks.append(made.requires_grad_())
    sizes = case.network.sizes
    return stacks, () if case.batch is None else normal(case.batch, len(sizes), sizes[0])


def route(bench: Bench, plan: Plan, stacks: list[Tensor], inputs: Any) -> dict[str, float]:
    """One route: what is counted of it, and its times."""

    def forward() -> None:
        with torch.no_grad():
            contract(plan, stacks, inputs)

    def training() -> None:
        torch.autograd.grad(contract(plan, stacks, inputs).square().mean(), stacks)

    moved = plan.held
    if plan.kind == "entries":
        moved = (plan.candidates[plan.route] - plan.flops) // _FLOPS_PER_MOVE
    return {
        "flops": plan.flops, "moved": moved, "launches": counted(forward)["without views"],
        "forward": quick(bench, forward), "training": quick(bench, training),
    }  # fmt: skip


def quick(bench: Bench, call: Callable[[], Any]) -> float:
    """Milliseconds of a call, in some 0.15 s."""
    once = bench.milliseconds(call, repeats=1, warmup=2)
    return once if once > 75 else bench.milliseconds(call, repeats=min(20, int(150 / once) + 1))


def summary(done: Mapping[str, Any]) -> dict[str, Any]:
    """Geometric means of chosen / fastest, today and by other rules."""

    def by_factor(factor: float) -> Callable[[Any], str]:
        def choose(one: Any) -> str:
            tree, path = (one["routes"][name]["flops"] for name in ("tree", "opt_einsum"))
            return "opt_einsum" if tree > factor * path else "tree"

        return choose

    def by_constant(constant: float) -> Callable[[Any], str]:
        return lambda one: min(
            one["routes"], key=lambda r: one["routes"][r]["flops"] + constant * one["routes"][r]["moved"]
        )

    rules = {f"constant {c}": by_constant(c) for c in CONSTANTS}
    factors = {f"factor {f}": by_factor(f) for f in FACTORS}

    def today(one: Any) -> str:
        return str(one["chosen"])

    out: dict[str, Any] = {}
    for kind in ("entries", "tree or opt_einsum"):
        chosen = [one for one in done.values() if (one["kind"] == "entries") == (kind == "entries")]
        all_rules = {"today": today, **(factors if kind != "entries" else {}), **rules}
        out[kind] = {"cases": len(chosen)}
        for time in ("forward", "training") if chosen else ():
            out[kind][time] = {n: mean_ratio(chosen, time, rule) for n, rule in all_rules.items()}
    return out


def mean_ratio(done: list[Any], time: str, choose: Callable[[Any], str]) -> float:
    """Geometric mean over cases of the time of the chosen route by that of the fastest."""
    logs = []
    for one in done:
        times = {name: found[time] for name, found in one["routes"].items()}
        logs.append(math.log(times[choose(one)] / min(times.values())))
    return math.exp(sum(logs) / len(logs))


def peers(bench: Bench) -> dict[str, Any]:
    """Time the full-join network of README by hand, along a path of cotengra, and by tensorkrowch."""
    by_hand = steps.full(bench.device)
    out: dict[str, Any] = {name: quick(bench, call) for name, call in by_hand.items()}
    sites, bond, batch = (8, 4, 16) if bench.rehearse else (16, 16, 1024)
    network = Network.build(ModeTree.binary(sites), 8, bond, join="full")
    case = Case("", network, batch)
    whole = next(p for p in case.plans(bench.device) if p.whole is not None)
    stacks, inputs = numbers(case, bench.device)
    for name, measure in (("cotengra", cotengra), ("tensorkrowch", tensorkrowch)):
        try:
            out[name] = measure(bench, whole, stacks, inputs)
        except ImportError:
            out[name] = "not installed"
        except Exception as error:
            out[name] = f"{type(error).__name__}: {error}"
    return out


def cotengra(bench: Bench, plan: Plan, stacks: list[Tensor], inputs: Tensor) -> Any:
    """Return the same einsum along the path that cotengra finds in two seconds."""
    import dataclasses

    import cotengra
    import opt_einsum

    assert plan.whole is not None
    search = cotengra.HyperOptimizer(max_time=2, parallel=False, progbar=False)
    given = plan.whole.equation, *plan.whole.shapes
    path, _ = opt_einsum.contract_path(*given, shapes=True, optimize=search)
    whole = along(plan.whole.equation, plan.whole.shapes, tuple(map(tuple, path)))
    theirs = dataclasses.replace(plan, whole=whole, cost=whole.cost)
    return route(bench, theirs, stacks, inputs)


def tensorkrowch(bench: Bench, plan: Plan, stacks: list[Tensor], inputs: Tensor) -> Any:
    """Its tree of the same order and bonds, whose lowest tensors take two inputs each, without leaves."""
    import tensorkrowch

    sites, bond, size = inputs.shape[1], plan.network.bonds[0], inputs.shape[2]
    layers = [sites >> k for k in range(1, sites.bit_length())]
    shapes = [[size, size, bond], *[[bond] * 3] * (len(layers) - 2), [bond, bond, 1]]
    model = tensorkrowch.models.Tree(layers, shapes)
    model.initialize(std=1 / bond)
    model = model.to(bench.device)
    model.trace(inputs[:1])

    def forward() -> None:
        with torch.no_grad():
            model(inputs)

    def training() -> None:
        torch.autograd.grad(model(inputs).square().mean(), list(model.parameters()))

    return {"forward": quick(bench, forward), "training": quick(bench, training)}
