"""A process of ``benchmarks/gpu.py``: tells what the machine is, or runs one stage."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Modules that stages import, and that a machine may lack.
NEEDED = (
    "torch", "numpy", "scipy", "networkx", "matplotlib", "safetensors", "opt_einsum", "rich", "filelock",
    "tensornetwork", "tyro",
)  # fmt: skip


def machine_of(kind: str) -> dict[str, Any]:
    """Return what the machine is, or under ``error`` why nothing can be run there."""
    lacking = ", ".join(name for name in NEEDED if importlib.util.find_spec(name) is None)
    if lacking:
        way = "where there is a network, 'make gpu-wheels' fills .wheels/ with the small ones"
        return {"error": f"{lacking} cannot be imported by {sys.executable}; {way}"}
    import torch

    from gpu_stages.bench import machine

    if kind == "cuda" and not torch.cuda.is_available():
        return {"error": "torch sees no CUDA device here; --rehearse runs tiny sizes on the CPU"}
    return machine(torch.device(kind))


def run_stage(asked: Mapping[str, Any]) -> int:
    """Run a stage and write its file to the end.

    Args:
        asked: What ``gpu.py`` says of it: name, module, function, file, folder, before, deadline, rehearse.

    Returns:
        0, or 1 if it raised.
    """
    import torch

    from gpu_stages.bench import Bench

    faulthandler.enable()
    torch.manual_seed(0)
    folder, file = Path(asked["folder"]), Path(asked["file"])
    folder.mkdir(exist_ok=True)
    device = torch.device("cpu" if asked["rehearse"] else "cuda")
    before = tuple(map(Path, asked["before"]))
    bench = Bench(asked["name"], file, device, asked["rehearse"], asked["deadline"], folder, before)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        bench.earlier = json.loads(file.read_text(encoding="utf-8")).get("figures", {})
    try:
        getattr(importlib.import_module(asked["module"]), asked["function"])(bench)
    except BaseException:
        traceback.print_exc()
        bench.write(complete=False, error="\n".join(traceback.format_exc().splitlines()[-12:]))
        return 1
    bench.write(complete=not bench.unfinished, error=bench.unfinished)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--machine":
        print(json.dumps(machine_of(sys.argv[2])))
    else:
        sys.exit(run_stage(json.loads(sys.argv[2])))
