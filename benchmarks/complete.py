"""Tensors completed from few entries: error on unseen entries and processor seconds, beside other libraries.

``python benchmarks/complete.py --peers PYTHON [--only METHOD ...] [--tasks TASK ...] [--seeds N] [--again]``;
PYTHON is the interpreter of an environment with ``pip install tensap tensorly pyttb t3toolbox teneva``.
Rows that ``--out`` holds are kept unless ``--again`` is given, so that one method alone can be run anew.

One process of one thread for a task, a seed and a method, killed after ``--limit`` processor seconds. All
methods get the same entries and the same tree or, of a train, its order of modes; all choose ranks and stop
by 10 % of these entries that they hold out. Seconds include the search for ranks, not the imports. The error
is that to the tensor without noise, on entries that were not observed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib
import inspect
import json
import math
import os
import platform
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from completion_tasks import TASKS, Array, Task, error, modes
from peers import version

OUT = Path(__file__).parent / "results" / "complete.json"
ENOUGH = 120.0  # seconds after which a method that tries ranks in turn tries no further one

At = Callable[[Array], Array]  # values at an index
Fitted = tuple[At, dict[str, Any]]


def _best(task: Task, fits: Iterable[tuple[Any, int, At]]) -> Fitted:
    """Return the model of the least error on the entries held out, of (ranks, numbers stored, values)."""
    _, _, index, values = task.split()
    start = time.process_time()
    best: tuple[float, At, dict[str, Any]] = (math.inf, _zero, {})
    for ranks, numbers, at in fits:
        held = error(at(index), values)
        if held < best[0]:
            best = held, at, {"held out": held, "ranks": ranks, "numbers": numbers}
        if time.process_time() - start > ENOUGH:
            break
    return best[1:]


def _zero(index: Array) -> Array:
    return np.zeros(len(index))


def _complete(task: Task, tree: Any) -> Fitted:
    import torch

    import tnreg

    index, values = torch.from_numpy(task.index), torch.from_numpy(task.values)
    given = tnreg.completion(index=index, values=values, sizes=task.sizes)
    found = tnreg.complete(given, None if tree is None else tnreg.ModeTree(tree), progress=False)
    model = found.model
    ranks = {v: w.shape[-1] for v, w in model.weights.items() if v != model.tree.root}
    return lambda i: found.predict(torch.from_numpy(i)).numpy(), {
        "held out": found.error,
        "interval": list(found.interval),
        "numbers": sum(w.numel() for w in model.parameters()),
        "ranks": list(ranks.values()),
        "tree": repr(model.tree),
        "right": {model.tree.modes_below(v): r for v, r in ranks.items()} == task.ranks,
    }


def _entries(model: Any, index: Array) -> Array:
    import torch

    with torch.no_grad():
        return torch.cat([model.entries(part) for part in torch.from_numpy(index).split(20_000)]).numpy()


def _adam(task: Task) -> Fitted:
    import torch

    import tnreg

    index, values, held, truth = map(torch.from_numpy, task.split())
    given = tnreg.completion(index=index, values=values, sizes=task.sizes, test_index=held, test_values=truth)
    tree = tnreg.ModeTree(task.tree)

    def ranks_of(rank: int) -> dict[Any, int]:
        bonds: dict[Any, int] = {}
        for v in tree.nodes[:-1]:
            most = math.prod(bonds[c] for c in tree.children(v)) if tree.children(v) else task.sizes[v]
            bonds[v] = min(rank, most)
        return bonds

    def fits() -> Iterator[tuple[Any, int, At]]:
        for rank in (2, 4, 8):
            start = torch.Generator().manual_seed(0)
            model = tnreg.Factorization(
                tree, task.sizes, ranks_of(rank), join="full", std=0.5, dtype=torch.float64, generator=start
            )
            with torch.no_grad():  # entries of half the size of the data
                size = model.entries(index[:2000]).square().mean().sqrt()
                for weight in model.parameters():
                    weight.mul_((0.5 / size) ** (1 / len(tree.nodes)))
            best = [math.inf, {}, 0]

            def watch(m: Any, best: list[Any] = best) -> float:
                off = given.test_error(m)
                if off < 0.999 * best[0]:
                    best[:] = off, {v: w.detach().clone() for v, w in m.weights.items()}, 0
                best[2] += 1
                return float(off)

            tnreg.fit(
                model, given.loss, steps=4000, optimizer="adam", every=50, observe={"held out": watch},
                stop=lambda run, best=best: best[2] > 20, progress=False,
            )  # fmt: skip
            model.load_weights(best[1])
            numbers = sum(w.numel() for w in model.parameters())
            yield rank, numbers, partial(_entries, model)

    return _best(task, fits())


def _tensap(task: Task, search: bool = False) -> Fitted:
    import tensap

    nodes: list[tuple[Any, int]] = []  # what is below, number of the parent

    def walk(nested: Any, parent: int) -> None:
        nodes.append((nested, parent))
        number = len(nodes)
        for child in () if isinstance(nested, int) else nested:
            walk(child, number)

    walk(task.tree, 0)
    below = np.zeros((len(nodes), len(nodes)), dtype=int)
    for k, (_, parent) in enumerate(nodes[1:], 1):
        below[parent - 1, k] = 1
    leaves = [next(k for k, (n, _) in enumerate(nodes, 1) if n == m) for m in range(len(task.sizes))]
    tree = tensap.DimensionTree(leaves, below)

    def features(index: Array) -> list[Array]:
        return [np.eye(size)[index[:, n]] for n, size in enumerate(task.sizes)]

    index, values, held, truth = task.split()
    learning = tensap.TreeBasedTensorLearning(tree, np.full(len(nodes), True), tensap.SquareLossFunction())
    learning.bases_eval, learning.training_data = features(index), [None, values]
    learning.bases_eval_test, learning.test_data = features(held), [None, truth]
    learning.test_error, learning.display = True, False
    learning.tolerance.update(on_stagnation=1e-8, on_error=1e-8)
    learning.initialization_type = "canonical"
    linear = learning.linear_model_learning
    linear.regularization = linear.basis_adaptation = False
    linear.error_estimation = True
    learning.alternating_minimization_parameters.update(stagnation=1e-10, max_iterations=50, display=False)
    learning.rank_adaptation = learning.model_selection = True
    learning.rank_adaptation_options.update(
        max_iterations=20, theta=0.8, early_stopping=True, early_stopping_factor=10
    )
    learning.model_selection_options["type"] = "test_error"
    if search:
        _mend(tensap)
        learning.tree_adaptation = True
        learning.tree_adaptation_options.update(max_iterations=100, force_rank_adaptation=True)
    found = learning.solve()[0].tensor

    def at(i: Array) -> Array:
        return np.asarray(found.eval_at_indices(i)).reshape(-1)

    ranks = [int(r) for k, r in enumerate(found.ranks, 1) if k != found.tree.root]
    return at, {"held out": error(at(held), truth), "numbers": int(found.storage()), "ranks": ranks}


def _mend(tensap: Any) -> None:
    """Let tensap 1.8 search trees with numpy 2: a single rank is taken out of its array; ``in1d`` is gone."""
    owner = tensap.TreeBasedTensor
    source = textwrap.dedent(inspect.getsource(owner.nodes_permutation_cost))
    names = dict(vars(sys.modules[owner.__module__]))
    exec(source.replace("ranks[gamma - 1]", "ranks[gamma - 1].item()"), names)
    owner.nodes_permutation_cost = names["nodes_permutation_cost"]
    np.in1d = np.isin  # noqa: NPY201


def _teneva(task: Task) -> Fitted:
    import teneva

    order = modes(task.tree)  # of the train
    index, values, held, truth = task.split()

    def at(train: Any, i: Array) -> Array:
        return np.asarray(teneva.get_many(train, i[:, order]))

    def fits() -> Iterator[tuple[Any, int, At]]:
        for rank in (2, 3, 4, 6, 8):
            start = teneva.anova(index[:, order], values, r=rank, order=1, seed=0)
            for ridge in (1e-3, 1e-1):
                with contextlib.suppress(np.linalg.LinAlgError, ValueError):
                    train = teneva.als(
                        index[:, order], values, start, nswp=50, e=1e-8, lamb=ridge, allow_skip_cores=True,
                        I_vld=held[:, order], y_vld=truth,
                    )  # fmt: skip
                    yield rank, sum(core.size for core in train), partial(at, train)

    return _best(task, fits())


def _masked(task: Task) -> tuple[Array, Array]:
    """Dense tensor of what is learned from, and where it is known."""
    index, values, _, _ = task.split()
    x, known = np.zeros(task.sizes), np.zeros(task.sizes)
    x[tuple(index.T)], known[tuple(index.T)] = values, 1
    return x, known


def _terms(factors: Any, weights: Any, rank: int) -> tuple[Any, int, At]:
    def at(i: Array) -> Array:
        return np.prod([f[i[:, n]] for n, f in enumerate(factors)], axis=0) @ weights

    return rank, sum(f.size for f in factors), at


def _tensorly_cp(task: Task) -> Fitted:
    from tensorly.decomposition import parafac

    x, known = _masked(task)
    settings = {"n_iter_max": 300, "init": "random", "random_state": 0, "mask": known, "tol": 1e-8}

    def fits() -> Iterator[tuple[Any, int, At]]:
        for rank in (2, 3, 4, 6, 8, 12):
            weights, factors = parafac(x, rank, **settings)
            yield _terms(factors, np.ones(rank) if weights is None else weights, rank)

    return _best(task, fits())


def _tensorly_tucker(task: Task) -> Fitted:
    import tensorly
    from tensorly.decomposition import tucker

    x, known = _masked(task)
    settings = {"n_iter_max": 300, "init": "random", "random_state": 0, "mask": known, "tol": 1e-8}

    def fits() -> Iterator[tuple[Any, int, At]]:
        for rank in (1, 2, 3, 4, 6):
            ranks = [min(rank, size) for size in task.sizes]
            core, factors = tucker(x, ranks, **settings)
            dense = tensorly.tucker_to_tensor((core, factors))
            yield ranks, core.size + sum(f.size for f in factors), lambda i, d=dense: d[tuple(i.T)]

    return _best(task, fits())


def _pyttb(task: Task) -> Fitted:
    import pyttb
    from pyttb.gcp.handles import Objectives
    from pyttb.gcp.optimizers import LBFGSB

    x, known = map(pyttb.tensor, _masked(task))

    def fits() -> Iterator[tuple[Any, int, At]]:
        for rank in (2, 3, 4, 6, 8, 12):
            np.random.seed(0)  # noqa: NPY002
            given = x, rank, Objectives.GAUSSIAN, LBFGSB(maxiter=1000)
            found = pyttb.gcp_opt(*given, mask=known, printitn=0)[0]
            yield _terms(found.factor_matrices, found.weights, rank)

    return _best(task, fits())


def _t3toolbox(task: Task) -> Fitted:
    """Newton-CG on trains of Tucker form, ranks continued; from zero, and from the mean where zero stays."""
    from t3toolbox import manifold, optimizers
    from t3toolbox.tucker_tensor_train import TuckerTensorTrain

    order = modes(task.tree)
    index, values, held, truth = task.split()
    sizes = tuple(task.sizes[m] for m in order)
    where = np.ascontiguousarray(index[:, order].T)
    mean = values.mean()
    cores = [np.full((1, 1, 1), abs(mean) ** (1 / len(order))) for _ in order]
    cores[0] = cores[0] * np.sign(mean)
    starts = [
        TuckerTensorTrain.zeros(sizes, (1,) * len(order), (1,) * (len(order) + 1)),
        TuckerTensorTrain(tuple(np.ones((1, n)) for n in sizes), tuple(cores)),
    ]

    def at(x: Any) -> At:
        return lambda i: np.asarray(x.entries(np.ascontiguousarray(i[:, order].T))).reshape(-1)

    def fits() -> Iterator[tuple[Any, int, At]]:
        x = starts.pop(0)
        first: dict[str, Any] = {}  # the gradient that the later solves measure theirs by
        least, waited = math.inf, 0
        while waited < 4:
            given = manifold.MANIFOLD, "entries", where, values
            x, told = optimizers.newton_cg(*given, x, max_newton=30, **first)
            off = error(at(x)(held), truth)
            if off > 0.99 and starts:
                x, first = starts.pop(), {}
                continue
            first = first or {"g0norm_newton": told["history"][0]["gnorm"]}
            ranks = tuple(map(int, x.tucker_ranks)), tuple(map(int, x.tt_ranks))
            yield ranks, sum(np.asarray(a).size for part in x.data for a in part), at(x)
            least, waited = (off, 0) if off < 0.995 * least else (least, waited + 1)
            further = x.continuation_ranks()
            if tuple(map(tuple, further)) == (tuple(x.tucker_ranks), tuple(x.tt_ranks)):
                return
            x = x.resize(x.shape, *further)

    return _best(task, fits())


@dataclass(frozen=True)
class Method:
    """One way to complete, and the start of the names of tasks that are beyond it."""

    module: str  # imported before the time counts
    fit: Callable[[Task], Fitted]
    beyond: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        """What is installed."""
        return self.module.partition(".")[0]


# tensorly and pyttb would need a dense tensor and a mask, each of 17 to 60 million numbers; the start of Adam
# predicts zero, and it stays there.
_FUNCTIONS = ("Friedman", "scattered", "sum", "borehole")
METHODS = {
    "tnreg": Method("tnreg.public", lambda task: _complete(task, task.tree)),
    "tnreg, tree found": Method("tnreg.public", lambda task: _complete(task, None)),
    "tnreg.fit, Adam": Method("tnreg.public", _adam, _FUNCTIONS),
    "tensap, ranks": Method("tensap", _tensap),
    "tensap, ranks and tree": Method("tensap", lambda task: _tensap(task, search=True)),
    "teneva ALS": Method("teneva", _teneva),
    "tensorly CP": Method("tensorly.decomposition", _tensorly_cp, _FUNCTIONS),
    "tensorly Tucker": Method("tensorly.decomposition", _tensorly_tucker, _FUNCTIONS),
    "pyttb gcp": Method("pyttb", _pyttb, _FUNCTIONS),
    "t3toolbox Newton-CG": Method("t3toolbox.optimizers", _t3toolbox),
}


def worker(name: str, method: str, seed: int) -> dict[str, Any]:
    """Return a row: one task completed by one method."""
    chosen, task = METHODS[method], TASKS[name][0](seed)
    importlib.import_module(chosen.module)
    start = time.process_time()
    at, told = chosen.fit(task)
    seconds = time.process_time() - start
    found = {"error": error(at(task.unseen), task.truth), "seconds": round(seconds, 2)}
    return {**found, **told, "observed": len(task.values), "version": version(chosen.package)}


def in_a_process(python: str, name: str, method: str, seed: int, limit: int) -> dict[str, Any]:
    """Return the row of a process of its own, or why there is none."""
    command = [python, "-W", "ignore", __file__, "--worker", name, method, str(seed)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
    )
    if done.returncode < 0:
        return {"failed": f"> {limit} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:200]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


@contextlib.contextmanager
def opened(out: Path) -> Iterator[dict[str, Any]]:
    """Hold the results, and write them back, beside other processes that do so."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        empty = {"machine": f"{platform.machine()} CPU, 1 thread, Python {platform.python_version()}"}
        found = json.loads(out.read_text()) if out.exists() else {**empty, "results": {}}
        yield found
        there = found["results"]
        found["results"] = {
            name: {
                method: dict(sorted(there[name][method].items()))
                for method in METHODS
                if method in there[name]
            }
            for name in TASKS
            if name in there
        }
        out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    finally:
        os.close(folder)


def line(row: dict[str, Any]) -> str:
    """Return what is printed of a row."""
    if "failed" in row:
        return str(row["failed"])
    keys = ("held out", "interval", "numbers", "ranks", "right", "tree")
    rest = (f"{key} {row[key]}" for key in keys if key in row)
    return f"{row['error']:.2e} {row['seconds']:7.1f} s  " + "  ".join(rest)


def main() -> None:
    """Run what is not there yet and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of the environment of the others")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", type=int, default=5, help="at most so many of a task's seeds")
    parser.add_argument("--again", action="store_true", help="run what is there already")
    parser.add_argument("--limit", type=int, default=200, help="processor seconds")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, method, seed = arguments.worker
        with contextlib.redirect_stdout(sys.stderr):
            row = worker(name, method, int(seed))
        print(json.dumps(row, default=str))
        return
    for name in arguments.tasks:
        for method in arguments.only:
            python = sys.executable if METHODS[method].package == "tnreg" else arguments.peers
            if not python or name.startswith(METHODS[method].beyond):
                continue
            for seed in range(min(arguments.seeds, TASKS[name][1])):
                with opened(arguments.out) as found:
                    there = str(seed) in found["results"].get(name, {}).get(method, {})
                if arguments.again or not there:
                    row = in_a_process(python, name, method, seed, arguments.limit)
                    with opened(arguments.out) as found:
                        found["results"].setdefault(name, {}).setdefault(method, {})[str(seed)] = row
                    print(f"{name:28s} {seed} {method:24s} {line(row)}", flush=True)


if __name__ == "__main__":
    main()
