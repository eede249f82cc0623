"""Trees found for tensors whose modes are permuted: numbers along them, and processor seconds, beside tensap.

``python benchmarks/complete_trees.py [--peers PYTHON]``; PYTHON is the interpreter of an environment with
``pip install tensap torch`` and tnreg. Numbers are those of ``tnreg.decompose`` at 1e-6 along the tree that
was found, without the matrix of a binary root. tensap starts from its decomposition along the natural tree,
whose seconds do not count; those of tnreg are all of ``find_tree``. One thread.

For orders that no dense tensor has, a random factorization is written along a tree that random exchanges of
neighbouring subtrees lead to, and ``interchange`` looks for the way back.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import completion_tasks as tasks
import numpy as np
import torch
from peers import version

import tnreg
from tnreg.ranks.budget import Budget
from tnreg.ranks.rounding import finite_stacks, round_network, to_factorization
from tnreg.search.web import Web

OUT = Path(__file__).parent / "results" / "complete_trees.json"
RTOL, SEEDS = 1e-6, 2
# name: (shape of the tree or function, order, mode size)
CASES: dict[str, tuple[Any, int, int]] = {
    "7⁶ balanced": ("binary", 6, 7),
    "5⁸ balanced": ("binary", 8, 5),
    "4⁸ caterpillar": ("caterpillar", 8, 4),
    "4¹⁰ balanced": ("binary", 10, 4),
    "4¹⁰ pairs function": (tasks.pairs, 10, 4),
    "5⁸ borehole": (tasks.borehole, 8, 5),
}


def nested(tree: tnreg.ModeTree, names: Any) -> Any:
    """Return the tree as nested lists, modes renamed."""
    below: dict[Any, Any] = {}
    for v in tree.nodes:
        below[v] = [below[c] for c in tree.children(v)] or int(names[v])
    return below[tree.root]


def tensor_of(case: str, seed: int) -> tuple[torch.Tensor, tnreg.ModeTree | None]:
    """Return a tensor of norm 1, and its tree if there is one."""
    kind, order, size = CASES[case]
    random = np.random.default_rng(100 + seed)
    names, tree = random.permutation(order), None
    if isinstance(kind, str):
        tree = nested(getattr(tnreg.ModeTree, kind)(order), names)
        ranks = dict.fromkeys(list(tasks._nodes(tree))[:-1], 3)
        x, tree = tasks._on_tree(tree, (size,) * order, ranks, random), tnreg.ModeTree(tree)
    else:
        points = np.stack(np.meshgrid(*[(np.arange(size) + 0.5) / size] * order, indexing="ij"), -1)
        x = kind(points.reshape(-1, order)[:, names]).reshape((size,) * order)
    return torch.from_numpy(np.ascontiguousarray(x / np.linalg.norm(x))), tree


def numbers(model: tnreg.Factorization) -> int:
    """Count the weights, without the matrix of a binary root."""
    root = model.tree.root
    return sum(w.numel() for v, w in model.weights.items() if v != root or len(model.tree.children(v)) != 2)


def along(x: torch.Tensor, tree: tnreg.ModeTree) -> int:
    """Count the numbers along a tree."""
    return numbers(tnreg.decompose(x, tree, rtol=RTOL))


def with_tensap(case: str, seed: int) -> dict[str, Any]:
    """Let tensap look for a tree in 100 steps."""
    import tensap
    from complete import _mend

    _mend(tensap)
    x = tensor_of(case, seed)[0]
    natural = tnreg.ModeTree.binary(x.ndim)
    place = {v: k for k, v in enumerate(reversed(natural.nodes))}  # parents first
    below = np.zeros((len(place), len(place)), dtype=int)
    for v, k in place.items():
        for c in natural.children(v):
            below[k, place[c]] = 1
    tree = tensap.DimensionTree([place[m] + 1 for m in natural.leaves], below)
    full = tensap.FullTensor(x.numpy(), order=x.ndim, shape=list(x.shape))
    start = tensap.Truncator(tolerance=RTOL, max_rank=10**6).hsvd(full, tree)
    np.random.seed(seed)  # noqa: NPY002, tensap draws from it
    clock = time.process_time()
    found = start.optimize_dimension_tree(RTOL, 100).tree
    seconds = time.process_time() - clock
    modes = {int(node): mode for mode, node in enumerate(found.dim2ind)}

    def walk(node: int) -> Any:
        return [walk(int(c)) for c in found.children(node)] or modes[node]

    return {"numbers": along(x, tnreg.ModeTree(walk(int(found.root)))), "seconds": seconds}


def with_tnreg(case: str, seed: int) -> dict[str, Any]:
    """Find trees in every way, and count along the tensor's own and the natural one."""
    x, tree = tensor_of(case, seed)
    row: dict[str, Any] = {"natural": along(x, tnreg.ModeTree.binary(x.ndim))}
    if tree is not None:
        row["true"] = along(x, tree)
    for method in ("agglomerate", "interchange", "auto"):
        tnreg.find_tree(x, method=method)
        clock = time.process_time()
        found = tnreg.find_tree(x, method=method)
        seconds = time.process_time() - clock
        row[method] = {"numbers": along(x, found), "seconds": seconds}
    return row


@torch.no_grad()
def scrambled(order: int, moves: int, seed: int) -> tuple[int, tnreg.Factorization]:
    """Return how few numbers a random tensor of bonds 3 needs, and it along a tree so many exchanges away."""
    random = np.random.default_rng(seed)
    tree = tnreg.ModeTree(nested(tnreg.ModeTree.binary(order), random.permutation(order)))
    draw = torch.Generator().manual_seed(seed)
    model = tnreg.Factorization(tree, 4, 3, join="full", std=1.0, dtype=torch.float64, generator=draw)
    found = round_network(model.network, finite_stacks(model), Budget(), dtype=torch.float64)
    web = Web.of(tree, found.weights)
    fewest = sum(w.numel() for w in (*web.cores.values(), *web.bases.values()))
    for _ in range(moves):
        node = int(random.choice(list(web.cores)))
        child = int(random.choice(web._inner(node)))
        web._move_to(node)
        i, j = web.legs[node].index(child), web.legs[child].index(node)
        legs = [x for x in (*web.legs[node], *web.legs[child]) if x not in (node, child)]
        both = torch.tensordot(web.cores[node], web.cores[child], ([i], [j]))
        web._replace(node, child, both, legs, web._split(both, (1, int(random.integers(2, 4)))))
    tree, weights = web.hang()
    return fewest, to_factorization(tree, weights, 0, torch.float64, 0.0)


def from_factors(order: int, moves: int, seed: int) -> dict[str, Any]:
    """Let ``interchange`` find the tree of a scrambled factorization."""
    fewest, model = scrambled(order, moves, seed)
    clock = time.process_time()
    found = tnreg.interchange(model, rtol=1e-8)
    seconds = time.process_time() - clock
    return {"true": fewest, "given": numbers(model), "numbers": numbers(found), "seconds": seconds}


def main() -> None:
    """Run all and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of the environment with tensap")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        print(json.dumps({**with_tensap(arguments.worker[0], int(arguments.worker[1])),
                          "version": version("tensap")}))  # fmt: skip
        return
    found: dict[str, Any] = {
        "machine": f"{platform.machine()} CPU, 1 thread, Python {platform.python_version()}"
    }
    results = found["results"] = {"dense": {}, "factors": {}}
    for case in CASES:
        for seed in range(SEEDS):
            row = with_tnreg(case, seed)
            if arguments.peers:
                command = [arguments.peers, __file__, "--worker", case, str(seed)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                row["tensap"] = json.loads(done.stdout.splitlines()[-1])
            results["dense"].setdefault(case, {})[str(seed)] = row
            print(case, seed, row, flush=True)
    for order, moves in ((16, 6), (32, 8), (64, 12), (64, 40), (200, 40)):
        for seed in range(3):
            row = from_factors(order, moves, seed)
            results["factors"].setdefault(f"order {order}, {moves} exchanges", {})[str(seed)] = row
            print(order, moves, seed, row, flush=True)
    arguments.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
