"""Wings: a file imports from its own wing and from those before it (docs: the package from the ground up)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tnreg

WINGS = (
    "errors machine trees tensors networks factorizations ranks algebra convert training dynamics "
    "search recovery cnns far images plots public experiments cli __main__"
).split()
PACKAGE = Path(tnreg.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def wing(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_wings(tree):
    """Wings imported anywhere in a file, for types only as well; the package itself is one above all."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tnreg":
            path = node.module.split(".")[1:]
            yield from path[:1] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (name[1] if name[1:] else "tnreg" for name in names if name[0] == "tnreg")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    allowed = WINGS[: WINGS.index(wing(path)) + 1]
    if wing(path) in ("experiments", "cli"):  # they use the library as its users do
        allowed = [*allowed, *tnreg.__all__, "tnreg"]
    assert set(imported_wings(ast.parse(path.read_text()))) <= set(allowed)


@pytest.mark.slow
def test_the_package_shows_public_names_and_wings():
    """Everything else is inside of a wing; no function hides a module."""
    script = "import tnreg; tnreg.ranks.decompose.distance; print(*(n for n in dir(tnreg) if n[0] != '_'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {*tnreg.__all__, *WINGS}
    files = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name[0] != "_"}
    assert files - {"py.typed", "__pycache__"} == set(WINGS) - {"__main__"}
