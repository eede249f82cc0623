"""Stage "correct": what holds on the CPU in double precision holds on the device in every precision.

A law takes a ``Case`` and returns a deviation: relative to the value on the CPU, with the same weights in
float64 or complex128, or an error over the error allowed; ``None`` where it says nothing. It holds if that
stays under its bound. A law that fails or raises costs no other. Besides: what hot paths read from the
device, and how often steps wait for it.
"""

from __future__ import annotations

import contextlib
import copy
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tnreg
from gpu_stages.bench import Bench, relative
from gpu_stages.waiting import host_reads, waits
from tnreg import Factorization, ModeTree
from tnreg.networks import plan as contraction

TREES = {
    "htf-4": ModeTree.binary(4),
    "across": ModeTree([[0, 2], [1, 3]]),
    "uneven": ModeTree([[0, 3], [[1, 4], 2]]),
    "cp-4": ModeTree.star(4),
    "deep-chain": ModeTree.chain(5),
    "one-child": ModeTree([[[0]], [[1, [2]]]]),
}
JOINS = ("mixed", "diagonal", "full", "ones")
DTYPES = (torch.float32, torch.complex64, torch.float64, torch.complex128)
SIZES = (2, 3, 5, 7, 4)
RTOL = 0.1  # of decompositions


@dataclass(frozen=True)
class Case:
    """A model on the device and the same one on the CPU.

    Attributes:
        name: Tree and joins.
        model: On the device, in the dtype that is tried.
        reference: Equal weights on the CPU, in double precision.
    """

    name: str
    model: Factorization
    reference: Factorization

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is tried."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """The device that is tried."""
        return self.model.device

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a tensor for the model and one for the reference."""
        x = x.to(self.dtype) if x.is_floating_point() or x.is_complex() else x
        return x.to(self.device), x.to(self.reference.dtype) if x.dtype == self.dtype else x


def case_of(name: str, join: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
    """Return a model with distinct mode sizes, unequal bonds and weights of order one."""
    tree = TREES[name]
    kinds = {v: join if join in ("diagonal", "full") else "diagonal" for v in tree.interior}
    if join == "mixed":
        kinds = {v: "full" if k % 2 else "diagonal" for k, v in enumerate(tree.interior)}
    bonds = {
        child: 2 + (k + (i if kinds[v] == "full" else 0)) % 3
        for k, v in enumerate(tree.interior)
        for i, child in enumerate(tree.children(v))
    }
    model = Factorization(
        tree, [SIZES[n % len(SIZES)] for n in range(tree.order)], bonds, join=kinds, std=0.7,
        root="ones" if join == "ones" else "trained", dtype=dtype,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    reference = doubled(model)
    return Case(f"{name}, {join}", model.to(device), reference)


def doubled(model: Factorization) -> Factorization:
    """Return the same weights on the CPU in double precision."""
    kind = torch.complex128 if model.dtype.is_complex else torch.float64
    stacks = [s.detach().to("cpu", kind, copy=True) for s in model.stacks]
    return Factorization.holding(model.network, stacks)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return normal numbers on the CPU."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def index_of(sizes: tuple[int, ...], count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random multi-indices, some of them twice."""
    generator = torch.Generator().manual_seed(count)
    index = torch.stack([torch.randint(n, (count,), generator=generator) for n in sizes], 1)
    return torch.cat([index, index[: count // 8]]).to(device)


# Laws of factorizations


def dense(case: Case) -> float:
    """Compare the dense tensor, along the tree and along opt_einsum's path."""
    wanted = case.reference.to_tensor()
    return max(relative(by(way, case.model.to_tensor), wanted) for way in ("tree", "opt_einsum"))


def entries(case: Case) -> float:
    """Entries by each of the three routes."""
    index = index_of(case.model.sizes, 30)
    wanted = case.reference.to_tensor()[tuple(index.T)]

    def planned() -> Tensor:
        chosen = tnreg.plan(case.model, index=index.to(case.device))
        return case.model.entries(chosen)

    ways = ("dense", "distinct", "per-sample")
    return max(relative(by(way, planned), wanted) for way in ways)


def forward(case: Case) -> float:
    """Inner products with rank-one tensors, along the tree and along opt_einsum's path."""
    ours, theirs = features(case)
    wanted = case.reference(theirs)
    ways = ("tree", "opt_einsum")
    return max(relative(by(way, partial(case.model, ours)), wanted) for way in ways)


def norm(case: Case) -> float:
    """Frobenius norm and its logarithm."""
    whole = torch.linalg.vector_norm(case.reference.to_tensor())
    return max(
        relative(case.model.norm(), whole), relative(case.model.log_norm().exp(), whole)
    )  # fmt: skip


@torch.no_grad()
def inner(case: Case) -> float:
    """Inner product with another factorization over the same tree; over both norms, as it may be small."""
    tree, join = case.name.split(", ")
    other = case_of(tree, "diagonal" if join == "full" else "full", case.dtype, case.device, seed=1)
    found, wanted = case.model.inner(other.model), case.reference.inner(other.reference)
    size = float(case.reference.norm() * other.reference.norm())
    return abs(complex(found) - complex(wanted)) / size


def local_components(case: Case) -> float | None:
    """Norms of local components, where there are any."""
    wanted = case.reference.local_components()
    return relative(case.model.local_components(), wanted) if wanted else None


def spectra(case: Case) -> float:
    """Singular values of the factorization, for their values alone and for gradients."""
    with torch.no_grad():
        wanted = tnreg.spectra(case.reference.to_tensor(), case.reference.tree)
        found = tnreg.spectra(case.model)
    differentiable = tnreg.spectra(case.model)
    return max(values_apart(found, wanted), values_apart(differentiable, wanted))


def spectra_of_dense(case: Case) -> float:
    """Singular values of the dense tensor."""
    with torch.no_grad():
        wanted = tnreg.spectra(case.reference.to_tensor(), case.reference.tree)
        return values_apart(tnreg.spectra(case.model.to_tensor(), case.model.tree), wanted)


def ranks(case: Case) -> float:
    """Nodes at which the hierarchical ranks differ; of the factorization and of its dense tensor."""
    with torch.no_grad():
        wanted = tnreg.hierarchical_rank(case.reference, rtol=1e-3)
        whole = case.model.to_tensor()
        found = tnreg.hierarchical_rank(case.model, rtol=1e-3)
        again = tnreg.hierarchical_rank(whole, case.model.tree, rtol=1e-3)
    return float(sum(found[v] != r or again[v] != r for v, r in wanted.items()))


def decomposed(case: Case) -> float:
    """Error of a decomposition over what is allowed, by its tolerance and by its own bound."""
    given = case.model.to_tensor().detach()
    worst = 0.0
    for randomized in (False, True):
        found = tnreg.decompose(given, case.model.tree, rtol=RTOL, randomized=randomized)
        worst = max(worst, over_allowed(found, given.cpu().to(case.reference.dtype)))
    return worst


def truncated(case: Case) -> float:
    """Error of rounding over what is allowed, by its tolerance and by its own bound."""
    found = tnreg.truncate(case.model, rtol=RTOL)
    return over_allowed(found, case.reference.to_tensor().detach())


def cnn(case: Case) -> float:
    """Compare the convolutional network that the factorization is, scaled and not."""
    ours, theirs = features(case)
    wanted = case.reference(theirs)
    return max(
        relative(tnreg.to_cnn(case.model, scaled=scaled)(ours), wanted)
        for scaled in (False, True)
    )  # fmt: skip


def completion_gradients(case: Case) -> float:
    """Loss of a completion and its gradients, node by node."""
    task, reference_task = tasks(case)
    found, wanted = task.loss(case.model), reference_task.loss(case.reference)
    case.model.zero_grad()
    case.reference.zero_grad()
    found.backward()
    wanted.backward()
    return max(relative(found, wanted), relative(case.model.gradients, case.reference.gradients))


def optimizer(case: Case) -> float:
    """Weights, step size and flow time after ten steps of GroupRMSprop."""
    task, reference_task = tasks(case)
    ours, theirs = copy.deepcopy(case.model), copy.deepcopy(case.reference)
    updates = []
    for model, of in ((ours, task), (theirs, reference_task)):
        update = tnreg.GroupRMSprop(model.parameters(), lr=1e-2)
        for _ in range(10):
            update.zero_grad()
            of.loss(model).backward()
            update.step()
        updates.append((update.step_size, update.flow_time))
    return max(relative(ours.weights, theirs.weights), relative(*map(torch.tensor, updates)))


# Laws that need no tree of the list


def high_order(case: Case) -> float:
    """Logarithm of the norm at order 256, far out of the range of the dtype; at two scales."""
    worst = 0.0
    for std in (2.0, 0.02):
        model = Factorization(
            ModeTree.binary(256), 4, 6, std=std, dtype=case.dtype,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        wanted = doubled(model).log_norm()
        worst = max(worst, relative(model.to(case.device).log_norm(), wanted))
    return worst


def penalty_of(kind: str, statistics: str, smooth: bool, case: Case) -> float | None:
    """Value and gradients of a penalty on a small network; all samples are drawn, so no draw matters."""
    if case.dtype.is_complex:
        return None
    pair = ((0, 0, 3, 3), (4, 5, 7, 8))
    net = smooth_net() if smooth else net_with_kinks()
    x, x_reference = case.pair(3 * random(6, 1, 8, 8, seed=3))
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    values, gradients = [], []
    for part, dtype, device in (
        (x, case.dtype, case.device),
        (x_reference, torch.float64, torch.device("cpu")),
    ):
        # through the dtype that is tried, so that both have the same weights
        mine = copy.deepcopy(net).to(case.dtype).to(device, dtype)
        options: dict[str, Any] = {"weight": 1.0, "statistics": statistics}
        if kind == "change":
            penalty: Any = tnreg.InputGradientChange(pair, **options)
        elif kind == "energy":
            penalty = tnreg.InteractionEnergy(pair, samples=len(y), **options)
        else:
            penalty = tnreg.InteractionRank(pair, len(y), start=0, until=None, target=None, **options)
        value = penalty(mine, part, y.to(device))
        value.backward()
        values.append(value)
        gradients.append(
            torch.cat([p.grad.flatten().cpu().double() for p in mine.parameters() if p.grad is not None])
        )  # fmt: skip
    return max(relative(*values), relative(*gradients))


def smooth_net() -> nn.Module:
    """Convolutions without kinks: its gradients differ by rounding alone. Large weights make it curved."""
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Softplus(), nn.AvgPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim > 1:
                weight.mul_(3)
    return net


def net_with_kinks() -> nn.Module:
    """ReLU and max pooling: a value beside a kink may fall on its other side in single precision."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


Law = Callable[[Case], float | None]

LAWS: dict[str, Law] = {
    "dense tensor": dense,
    "entries by each route": entries,
    "forward by each route": forward,
    "norm": norm,
    "inner product": inner,
    "local components": local_components,
    "spectra of a factorization": spectra,
    "spectra of a dense tensor": spectra_of_dense,
    "hierarchical ranks": ranks,
    "decompose: error over allowed": decomposed,
    "truncate: error over allowed": truncated,
    "to_cnn": cnn,
    "completion: loss and gradients": completion_gradients,
    "GroupRMSprop: ten steps": optimizer,
}
# once for every dtype, as they do not look at the tree of the case
ONCE: dict[str, Law] = {
    "log norm at order 256": high_order,
    **{
        f"{kind}, {statistics} statistics, {'smooth' if smooth else 'with kinks'}": partial(
            penalty_of, kind, statistics, smooth
        )
        for kind in ("change", "energy", "rank")
        for statistics in ("frozen", "batch")
        for smooth in (True, False)
    },
}
# Bounds other than those of the precision.
BOUNDS = {
    "hierarchical ranks": 0.0,
    "decompose: error over allowed": 1.0,
    "truncate: error over allowed": 1.0,
}
KINKS = 1e-2


def bound_of(law: str, dtype: torch.dtype) -> float:
    """Return what the deviation must stay under."""
    if law in BOUNDS:
        return BOUNDS[law]
    if torch.finfo(dtype).eps < 1e-10:
        return 1e-10
    return KINKS if law.endswith("with kinks") else 1e-4


def run(bench: Bench) -> None:
    """Try every law in every precision; before that, look at what reads and waits."""
    # convolutions take 10 bits of every number otherwise
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    bench.add(ok=False, failed=[])
    noisy = look_at_reads_and_waits(bench)
    names = list(TREES)[1:3] if bench.rehearse else list(TREES)
    joins = JOINS[::3] if bench.rehearse else JOINS
    dtypes = (torch.float32, torch.complex128) if bench.rehearse else DTYPES
    cases = {
        dtype: [case_of(tree, join, dtype, bench.device) for tree in names for join in joins]
        for dtype in dtypes
    }
    laws: dict[str, dict[str, Any]] = {}
    # on the CPU, numbers may be read
    failed: list[str] = noisy if bench.device.type == "cuda" else []
    errors: dict[str, str] = {}
    largest: dict[str, float] = {}
    for law, function in {**LAWS, **ONCE}.items():
        laws[law] = {}
        for dtype in dtypes:
            kind = str(dtype).removeprefix("torch.")
            some = cases[dtype][:1] if law in ONCE else cases[dtype]
            row, error = tried(function, some, bound_of(law, dtype))
            if row is None:
                continue
            laws[law][kind] = row
            if law not in BOUNDS:
                largest[kind] = max(largest.get(kind, 0.0), row["deviation"])
            if not row["ok"]:
                failed.append(f"{law}, {kind}")
            if error:
                errors[f"{law}, {kind}"] = error
        bench.add(failed=failed, laws=laws, errors=errors)
        bench.add(**{"laws tried": len(laws), "largest deviation": largest})
    # only now: a stage that was killed has not shown that all is well
    bench.add(ok=not failed)


def tried(law: Law, cases: list[Case], bound: float) -> tuple[dict[str, Any] | None, str]:
    """Largest deviation of a law over cases, ``None`` if it says nothing of them, and its first error."""
    worst, where, error = -1.0, "", ""
    for case in cases:
        try:
            found = law(case)
        except Exception:
            found, error = math.inf, error or f"{case.name}: {traceback.format_exc(limit=-4)}"
        if found is None:
            continue
        found = math.inf if math.isnan(found) else found
        if found > worst:
            worst, where = found, case.name
    if worst < 0:
        return None, error
    return {"deviation": worst, "bound": bound, "ok": worst <= bound, "case": where}, error


# Reads and waits


# What must not read from the device, nor wait for it; steps are added to these, but for a penalty that finds
# on the device which samples a swap changes.
QUIET = ("forward", "entries of a plan", "dense tensor", "ConvNet")


def look_at_reads_and_waits(bench: Bench) -> list[str]:
    """Look at host reads of every hot path and waits of every kind of step, each by line.

    Returns:
        Those that should read nothing, or not wait, and did.
    """
    noisy = []
    for what, made in (("host reads", hot_paths(bench)), ("waits", steps(bench))):
        look = host_reads if what == "host reads" else waits
        found: dict[str, Any] = {}
        for name, call in made.items():
            try:
                found[name] = look(bench.device, call)
            except Exception:
                found[name] = {f"error: {traceback.format_exc(limit=-3)}": 1}
            quiet = name in QUIET or ("step" in name and name != "CNN step with gradient change")
            if quiet and not name.startswith("fit") and found[name]:
                noisy.append(f"{what}: {name}")
            bench.add(**{what: found})
    return noisy


def hot_paths(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Return what is called again and again."""
    case = case_of("uneven", "mixed", torch.float32, bench.device)
    model, (x, _), (task, _) = case.model, features(case), tasks(case)
    index = index_of(model.sizes, 30, bench.device)
    chosen = tnreg.plan(model, index=index)
    whole = model.to_tensor().detach()
    net = tnreg.to_cnn(model)
    return {
        "forward": lambda: model(x),
        "entries of a plan": lambda: model.entries(chosen),
        "entries of an index": lambda: model.entries(index),
        "dense tensor": model.to_tensor,
        "norm": model.norm,
        "fit, 20 steps and 3 rows": lambda: tnreg.fit(
            model, task.loss, steps=20, every=10, optimizer=tnreg.GroupRMSprop, progress=False
        ),
        "spectra": torch.no_grad()(lambda: tnreg.spectra(model)),
        "spectra for gradients": lambda: tnreg.spectra(model),
        "decompose": lambda: tnreg.decompose(whole, model.tree, rtol=RTOL),
        "truncate": lambda: tnreg.truncate(model, rtol=RTOL),
        "ConvNet": lambda: net(x),
        **steps(bench),
    }


def steps(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Time whole training steps: loss, backward, update. None should wait for the device."""
    case = case_of("uneven", "mixed", torch.float32, bench.device)
    task, net = tasks(case)[0], tnreg.to_cnn(case.model)
    x, _ = features(case)
    on_host = random(16, 1, 8, 8, dtype=torch.float32)
    images, y = on_host.to(bench.device), torch.arange(16, device=bench.device) % 3
    plain = net_with_kinks().to(bench.device)

    def step(loss: Callable[[], Tensor], update: torch.optim.Optimizer) -> None:
        update.zero_grad(set_to_none=True)
        loss().backward()
        update.step()

    def classified() -> Tensor:
        return nn.functional.cross_entropy(plain(images), y)

    def sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)

    def with_called(penalty: Any) -> Tensor:
        return classified() + penalty(plain, images, y)

    def with_drawn(penalty: Any) -> Tensor:
        drawn = penalty.draw(plain, on_host).to(bench.device)
        return classified() + penalty.value(plain, images, y, drawn)

    own = tnreg.GroupRMSprop(case.model.parameters(), lr=1e-3)
    found: dict[str, Callable[[], Any]] = {
        "completion step": partial(step, lambda: task.loss(case.model), own),
        "ConvNet step": partial(step, lambda: net(x).square().mean(), sgd(net)),
        "CNN step": partial(step, classified, sgd(plain)),
    }
    patches = tnreg.RandomPatches(2)
    for name, penalty in (
        ("gradient change", tnreg.InputGradientChange(patches)),
        ("interaction energy", tnreg.InteractionEnergy(patches)),
        ("interaction rank", tnreg.InteractionRank(patches, start=0, until=None)),
    ):
        for how, loss in (("", with_called), (", drawn on the CPU", with_drawn)):
            found[f"CNN step with {name}{how}"] = partial(step, partial(loss, penalty), sgd(plain))
    return found


# What laws share


def by(way: str, call: Callable[[], Tensor]) -> Tensor:
    """Return the value of a call whose plans take one route, whatever its cost."""
    with only(way):
        return call()


@contextlib.contextmanager
def only(way: str) -> Iterator[None]:
    """Every plan takes this route."""
    usual = contraction.choose
    contraction._plans.cache_clear()
    contraction.choose = lambda costs: way
    try:
        yield
    finally:
        contraction.choose = usual
        contraction._plans.cache_clear()


def features(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Five rank-one tensors, for the model and for the reference."""
    pairs = [case.pair(random(5, n, dtype=case.dtype, seed=n)) for n in case.model.sizes]
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def tasks(case: Case) -> tuple[Any, Any]:
    """Completion of other values at 30 entries, for the model and for the reference."""
    index = index_of(case.model.sizes, 30).unique(dim=0)
    values, theirs = case.pair(random(len(index), dtype=case.dtype, seed=7))
    return tuple(
        tnreg.completion(index=index.to(v.device), values=v, sizes=case.model.sizes) for v in (values, theirs)
    )  # fmt: skip


def values_apart(found: dict[Any, Tensor], wanted: dict[Any, Tensor]) -> float:
    """Largest deviation of singular values, relative to their norm; those left out are zeros."""
    worst = 0.0
    for node, theirs in wanted.items():
        ours = found[node].detach().cpu().double()
        most = max(len(ours), len(theirs))
        ours, theirs = (nn.functional.pad(s, (0, most - len(s))) for s in (ours, theirs.detach()))
        worst = max(worst, relative(ours, theirs))
    return worst


def over_allowed(found: Factorization, wanted: Tensor) -> float:
    """Error over the tolerance, or over ``error_bound`` if that is more."""
    error = float(torch.linalg.vector_norm(doubled(found).to_tensor().detach() - wanted))
    allowed = RTOL * float(torch.linalg.vector_norm(wanted))
    return max(error / allowed, error / found.error_bound if found.error_bound else float(error > 0))
