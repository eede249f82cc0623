"""The completion of the demo on five fresh seeds: along its tree, and by CP and Tucker of tnreg and tensorly.

``OMP_NUM_THREADS=1 python benchmarks/demo.py [--out FILE.json]`` takes some ten minutes. Ranks are chosen by
the same held-out entries everywhere. Errors are those on the unseen entries, seconds those of the processor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tnreg
from tnreg.experiments import demo
from tnreg.recovery.complete import Completed

CONFIG = demo.Config()


def completed(task: tnreg.Completion, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield methods and what they find: what ``complete`` returns, or a dense tensor."""
    star, options = tnreg.ModeTree.star(len(task.sizes)), {"seed": seed, "progress": False}
    found = tnreg.complete(task, tnreg.load_tree(CONFIG.along), join="full", adapt="ranks", **options)
    yield "tree, tnreg", found
    for name, join in (("CP", "diagonal"), ("Tucker", "full")):
        yield f"{name}, tnreg", tnreg.complete(task, star, join=join, adapt="ranks", **options)
        yield f"{name}, tensorly", demo.by_tensorly(name, found)


def main(seeds: list[int], out: Path) -> None:
    """Complete, print a line for each, and write the file anew after every line."""
    tensor, rows = tnreg.load_tensor(CONFIG.completed).values.double(), []
    for seed in seeds:
        task = tnreg.completion(tensor, CONFIG.share, seed=seed, missing="nan")
        start = time.process_time()
        for method, found in completed(task, seed):
            row: dict[str, Any] = {"seed": seed, "method": method, "seconds": time.process_time() - start}
            if isinstance(found, Completed):
                row |= {"tree": repr(found.tree), "ranks": {str(v): rank for v, rank in found.ranks.items()}}
                row |= {"held-out error": found.error, "held-out interval": found.interval}
                found = found.model.to_tensor().detach()
            row["error"], *row["interval"] = demo.judge(found, task)
            rows.append(row)
            print(f"{seed} {method:18s} {row['error']:.4f} {row['seconds']:6.1f} s", flush=True)
            start = time.process_time()
        about = {
            "tensor": CONFIG.completed,
            "share": CONFIG.share,
            "observed": len(task.values),
            "rows": rows,
        }
        out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/demo-cpu.json"))
    arguments = parser.parse_args()
    main(arguments.seeds, arguments.out)
