"""Processor seconds for each Pathfinder image, and what the distance between the discs tells alone.

``python benchmarks/images.py [--count 1000] [--scenes 6000] [--size 150] [--out FILE.json]`` prints a
table. Time is that of one process, drawing included; a pool of two takes half of it by the clock. The
published generator takes 0.11 s an image of path length 9 (at 300 x 300 pixels, on a machine of this
class). The distance-only accuracy (25 nearest neighbours, 5-fold cross-validation) is that of ``scenes``
images without their drawing; published images give 94, 90, 82 and 77 % for lengths 3, 5, 7 and 9.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np

from tnreg.images.scene import render, sample_scene
from tnreg.images.sets import distance_only_accuracy

LENGTHS = (3, 5, 7, 9)
PUBLISHED = {3: 0.94, 5: 0.90, 7: 0.82, 9: 0.77}
PUBLISHED_SECONDS = 0.11


def seconds(length: int, matched: bool, size: int, count: int) -> float:
    """Return the processor seconds of an image."""
    start = time.process_time()
    for i in range(count):
        rng = np.random.default_rng(np.random.SeedSequence([0, 0, i]))
        render(sample_scene(rng, length, size, matched=matched), size)
    return (time.process_time() - start) / count


def told_by_distance(length: int, matched: bool, size: int, count: int) -> float | None:
    """Return the distance-only accuracy."""
    scenes = [
        sample_scene(np.random.default_rng([1, 0, i]), length, size, matched=matched) for i in range(count)
    ]
    distances = np.array([s.distance for s in scenes])
    return distance_only_accuracy(distances, np.array([s.label for s in scenes]))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="images that are timed")
    parser.add_argument("--scenes", type=int, default=6000, help="images for the distances")
    parser.add_argument("--size", type=int, default=150)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    print("length  matched  seconds  distance only")
    for length in LENGTHS:
        for matched in (False, True):
            seconds(length, matched, arguments.size, 3)
            row = {
                "length": length,
                "matched": matched,
                "cpu seconds an image": seconds(length, matched, arguments.size, arguments.count),
                "distance-only accuracy": told_by_distance(length, matched, arguments.size, arguments.scenes),
            }
            rows.append(row)
            print(
                f"{length:6d}  {matched!s:7s}  {row['cpu seconds an image']:.4f}   "
                f"{100 * (row['distance-only accuracy'] or 0):.1f} %",
                flush=True,
            )
    about = {
        "machine": f"{platform.machine()} CPU, one process, Python {platform.python_version()}, "
        f"numpy {np.__version__}",
        "size": arguments.size,
        "images": arguments.count,
        "scenes": arguments.scenes,
        "published": {
            "cpu seconds an image, length 9": PUBLISHED_SECONDS,
            "distance-only accuracy": PUBLISHED,
        },
        "rows": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
