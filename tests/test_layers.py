"""Rooms: a module imports only from rooms above it in this list (docs: the package from the ground up)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = [
    "errors", "progress", "memory", "files", "svg", "structure", "tree", "trajectory", "optim",
    "network", "rank", "einsum", "schedule", "contraction", "scaled", "inner", "factorization",
    "passes", "blocks", "frames", "rounding", "hsvd", "gramians", "assembly", "products", "cores",
    "algebra", "wiring", "convert", "components", "dynamics", "tensors", "tasks", "checkpoint",
    "cuda_graph", "fit", "layout", "pooling", "convnet_text", "convnet", "cnn", "convac", "export",
    "penalties", "patches", "second_order", "parallel", "scheduled", "regularizers", "grids", "probe",
    "pathfinder", "images", "plots", "doctor", "experiments", "cli", "__main__",
]  # fmt: skip
PACKAGE = Path(__file__).parent.parent / "tnreg"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree):
    """Rooms imported at run time, anywhere in the file, without what is imported for types only."""
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tnreg."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "tnreg":
            yield from (alias.name for alias in node.names if alias.name in ROOMS)
        elif isinstance(node, ast.Import):
            yield from (n.name.split(".")[1] for n in node.names if n.name.startswith("tnreg."))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = ROOMS.index(room(path))
    for other in imported_rooms(ast.parse(path.read_text())):
        below = ROOMS.index(other)
        assert below < here or (below == here and room(path) in ("experiments", "cli")), (
            f"{path.name} imports {other}"
        )


def test_import_is_light():
    """No drawing, command-line, progress or dataset library is loaded by ``import tnreg``."""
    heavy = [
        "matplotlib",
        "tyro",
        "rich.progress",
        "tensornetwork",
        "tensorly",
        "scipy",
        "pandas",
        "torchvision",
    ]
    script = f"import sys, tnreg; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def lengths(path):
    """Lines of every function without its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[ast.get_docstring(node) is not None :] or node.body
            yield node.name, node.end_lineno - body[0].lineno + 1


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_stay_small(path):
    """A file of 600 lines or a function of 60 holds two subjects: give the second one a name."""
    assert len(path.read_text().splitlines()) <= 600
    assert [(name, count) for name, count in lengths(path) if count > 60] == []
