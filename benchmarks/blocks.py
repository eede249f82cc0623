"""A tensor larger than memory, on disk, decomposed block by block: seconds, memory, and what was counted.

``python benchmarks/blocks.py [--out FILE.json] [--folder FOLDER] [--small]`` writes a float64 tensor of
128 x 128 x 128 x 256 (4 GiB) as zarr, uncompressed, in blocks of 32^4 (8 MiB): a hierarchical Tucker
tensor of bonds 10 with noise of 3e-4. It is decomposed to 1e-3 along a binary tree in processes of their
own: with one and with two threads of Dask, each held to 1.5 GiB of data by the system (``RLIMIT_DATA``)
and told to keep arrays to ``memory="700MiB"``; the peak is that of the kernel (``VmHWM``). Then the error is
computed in
one more reading, and a smaller tensor of the same kind is decomposed in memory and block by block.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import machine_line, version

SHAPE, SMALL, BLOCK, BOND, NOISE, RTOL = (128, 128, 128, 256), (48, 40, 44, 52), 32, 10, 3e-4, 1e-3
HELD, MEMORY = 3 * 2**29, "700MiB"


def write(path: Path, shape: tuple[int, ...]) -> None:
    """Return the tensor, block by block."""
    import dask
    import dask.array as da
    import zarr

    random = np.random.default_rng(0)
    factors = [random.standard_normal((n, BOND)) for n in shape]
    joins = [random.standard_normal((BOND, BOND, BOND)) for _ in range(2)]
    root = random.standard_normal((BOND, BOND))
    chunks = da.core.normalize_chunks(BLOCK if shape == SHAPE else BLOCK // 2, shape)
    rms = BOND**3  # of the entries, about

    def block(block_info: Any = None) -> np.ndarray:
        where = [slice(*ends) for ends in block_info[None]["array-location"]]
        parts = [f[w] for f, w in zip(factors, where, strict=True)]
        left = np.einsum("ia,jb,abc->ijc", parts[0], parts[1], joins[0], optimize=True)
        right = np.einsum("ia,jb,abc->ijc", parts[2], parts[3], joins[1], optimize=True)
        values = np.einsum("ijc,cd,kld->ijkl", left, root, right, optimize=True)
        own = np.random.default_rng([w.start for w in where])
        return values + NOISE * rms * own.standard_normal(values.shape)

    lazy = da.map_blocks(block, chunks=chunks, dtype=np.float64, meta=np.empty((0,) * 4))
    # uncompressed: noise does not get smaller, and takes as long to unpack
    stored = zarr.create_array(str(path), shape=shape, chunks=lazy.chunksize, dtype="f8", compressors=None)
    with dask.config.set(num_workers=2):
        da.store(lazy, stored)


class Held(logging.Handler):
    """The lines that tell of the passes."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.times: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.lines.append(record.getMessage())
        self.times.append(time.perf_counter())


def worker(path: Path, threads: int, limit: int, memory: str) -> dict[str, Any]:
    """One decomposition."""
    import dask
    import dask.array as da

    import tnreg
    from tnreg.ranks.decompose import distance

    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    log = Held()
    logger = logging.getLogger("tnreg.tensors.blocks")
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    array = da.from_zarr(str(path))
    with dask.config.set(num_workers=threads):
        start = time.perf_counter()
        model = tnreg.decompose(array, tnreg.ModeTree.binary(4), rtol=RTOL, memory=memory)
        end = time.perf_counter()
        peak = peak_of()
        error = distance(array, model, memory=memory)
    ends = [*log.times[1:], end]
    return {
        "seconds": end - start,
        "peak bytes": peak,
        "error": error[0] / error[1],
        "bound": (model.error_bound or 0.0) / error[1],
        "bonds": list(model.network.bonds),
        "passes": [
            {"what": line, "seconds": b - a} for line, a, b in zip(log.lines, log.times, ends, strict=True)
        ],
    }


def peak_of() -> int:
    """Largest resident set of this process so far."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def same(path: Path) -> dict[str, Any]:
    """Decompose the smaller tensor both ways."""
    import dask.array as da
    import torch

    import tnreg

    array, tree = da.from_zarr(str(path)), tnreg.ModeTree.binary(4)
    dense = torch.from_numpy(array.compute())
    ours = tnreg.decompose(array, tree, rtol=RTOL, memory=dense.nbytes)
    theirs = tnreg.decompose(dense, tree, rtol=RTOL)
    norm = float(torch.linalg.vector_norm(dense))
    equal = list(ours.network.bonds) == list(theirs.network.bonds)
    with torch.no_grad():
        apart = float(torch.linalg.vector_norm(ours.to_tensor() - theirs.to_tensor())) / norm
        values, own = (tnreg.spectra(x, tree) for x in (ours, theirs))
        off = max(float((values[v] - own[v]).abs().max() / own[v][0]) for v in own if equal)
    return {"shape": list(array.shape), "bonds equal": equal, "apart": apart, "spectra": off}


def main() -> None:
    """Write, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--small", action="store_true", help="the small tensor only, to try it out")
    parser.add_argument("--worker", nargs=4)
    arguments = parser.parse_args()
    if arguments.worker:
        path, threads, limit, memory = arguments.worker
        print(json.dumps(worker(Path(path), int(threads), int(limit), memory)))
        return
    with tempfile.TemporaryDirectory() as own:
        folder = arguments.folder or Path(own)
        folder.mkdir(parents=True, exist_ok=True)
        shapes = [SMALL] if arguments.small else [SMALL, SHAPE]
        for shape in shapes:
            path = folder / f"{'x'.join(map(str, shape))}.zarr"
            if not path.exists():
                start = time.perf_counter()
                write(path, shape)
                print(f"wrote {path} in {time.perf_counter() - start:.0f} s")
        size = int(np.prod(shapes[-1])) * 8
        memory = "24MiB" if arguments.small else MEMORY
        results: dict[str, Any] = {}
        for threads in (1, 2):
            call = [sys.executable, __file__, "--worker", str(path), str(threads)]
            call += ["0" if arguments.small else str(HELD), memory]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            result = results[f"{threads} thread{'s' * (threads > 1)}"] = json.loads(done.stdout)
            peak = result["peak bytes"] / 2**30
            print(f"{threads} threads: {result['seconds']:.1f} s, peak {peak:.2f} GiB, "
                  f"error {result['error']:.2e} (bound {result['bound']:.2e})")  # fmt: skip
            for row in result["passes"]:
                print(f"  {row['seconds']:6.1f} s  {row['what']}")
        results["same as in memory"] = same(folder / f"{'x'.join(map(str, SMALL))}.zarr")
        print(results["same as in memory"])
    figures = {
        "machine": machine_line(), "torch": version("torch"), "dask": version("dask"),
        "tensor": {"shape": list(shapes[-1]), "bytes": size, "block": BLOCK, "noise": NOISE, "rtol": RTOL},
        "held to": 0 if arguments.small else HELD, "memory": memory, "results": results,
    }  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
