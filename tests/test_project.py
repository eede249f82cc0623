"""The project around the package: README and docs, gallery page, changelog, packaging."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.version import Version

import tnreg
from tnreg.trees.tree import read_tree_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
TABLES = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))  # a script, not a module


def test_tables_and_gallery_page_are_as_written_by_the_script():
    for page, start, table in TABLES["tables"]():
        assert f"{table}\n" in (ROOT / page).read_text(encoding="utf-8"), start
    assert (ROOT / "trees" / "README.md").read_text("utf-8") == TABLES["gallery_page"]()


def test_published_dynamics_are_reproduced():
    """The committed runs: as many components as the target has, and the ranks of the target at every node."""
    runs = json.loads((ROOT / "benchmarks/results/dynamics-runs.json").read_text())["runs"]
    expected = [(model, seed) for model in ("cp", "htf", "mf") for seed in (1, 2, 3)]
    assert sorted((r["model"], r["seed"]) for r in runs) == expected
    for run in runs:
        assert run["ranks"] == run["target ranks"]
        if run["model"] != "htf":
            assert run["components"][5] < 0.01 * run["components"][4] and len(run["jumps"]) == 5


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if "```python" in text])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """Every Python block prints what the block after it says, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    blocks = r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?"
    for code, output in re.findall(blocks, TEXTS[page], re.DOTALL):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), {})
        assert printed.getvalue() == output


def test_gallery_files_fit_their_trees():
    for name in tnreg.gallery():
        content, tree = read_tree_file(name), tnreg.load_tree(name)
        assert set(content) <= {"about", "tree", "modes", "sizes"} and content["about"]
        for key in ("modes", "sizes"):
            assert len(content.get(key, tree.leaves)) == tree.order


def test_documented_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    blocks = "".join(re.findall(r"```sh\n(.*?)```", "".join(TEXTS.values()), re.DOTALL))
    for target in re.findall(r"^make ([\w-]+)", blocks, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    command = [sys.executable, "-W", "error", "-m", "tnreg.cli", "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True).stdout
    documented = set(re.findall(r"^tnreg (\w+)", blocks, re.MULTILINE))
    assert documented == set(re.findall(r"• (\w+)", help_text))


def test_links_exist():
    for name, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https://") or (PAGES[name].parent / link).exists(), (name, link)


def test_public_names_are_in_the_changelog_and_documented():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## ([\d.]+)", changelog, re.MULTILINE).group(1) == tnreg.__version__
    for name in tnreg.__all__:
        assert getattr(tnreg, name).__doc__, name
        plain = name.endswith("Error") or name in ("Plan", "Network")
        assert plain or f"`{name}" in changelog, name


def test_lower_bounds_cover_what_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = (ROOT / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", constraints, re.MULTILINE))
    extras = project["optional-dependencies"]
    for requirement in project["dependencies"] + extras["data"] + extras["dev"]:
        if match := re.fullmatch(r"([\w-]+)>=(\S+)", requirement):
            assert Version(pinned[match[1]]) >= Version(match[2]), requirement


def test_import_needs_no_extra():
    """``import tnreg`` works where nothing but its own requirements is, and loads nothing that is slow."""
    extras = "dask distributed zarr h5py pyarrow xarray sklearn tensorly quimb onnx onnxruntime onnxscript"
    slow = "torchdiffeq scipy pandas matplotlib torchvision tensornetwork tyro rich IPython"
    script = (
        "import sys\nbefore = set(sys.modules)\nimport torch\nof_torch = set(sys.modules) - before\n"
        "import tnreg\nprint(*{name.split('.')[0] for name in set(sys.modules) - of_torch})"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(f"{extras} {slow}".split()) & set(loaded.split()) == set()


def test_wheel_holds_the_gallery(tmp_path):
    """A wheel made by the build backend has the package and its trees inside, and nothing else."""
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = ("trees/gallery/htf-4.json", "py.typed", "experiments/demo.py", "cli/entry.py")
    assert {f"tnreg/{name}" for name in inside} <= names
    about = f"tnreg-{tnreg.__version__}.dist-info/"
    assert not [name for name in names if not name.startswith(("tnreg/", about))]


def test_sdist_holds_what_its_tests_read(tmp_path):
    """The tests run where the source distribution is unpacked: documentation and all are inside."""
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("tnreg", "trees", "tests", "docs", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".md", ".json", ".yml", ".png") and "runs" not in path.parts
    } | {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "pyproject.toml", "constraints.txt"}
    [sdist] = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as archive:
        assert wanted - {name.partition("/")[2] for name in archive.getnames()} == set()
