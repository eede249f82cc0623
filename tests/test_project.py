"""The project around the package: README, gallery page, changelog, packaging, examples.

Run as a script, ``python tests/test_project.py``, it writes the gallery page and the tables of README and
docs again.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import tnreg
from tnreg.trees.tree import read_tree_file

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def gallery_page():
    lines = [
        "# Gallery",
        "",
        "One JSON file a tree: nested lists of mode numbers, with optional mode names and sizes.",
        '`tnreg.load_tree("htf-4")` reads one by its name; `tnreg tree NAME --png FILE` draws it.',
        'A file of your own needs the key `tree` only: `{"tree": [[0, 1], [2, 3]]}`.',
    ]
    for name in tnreg.gallery():
        content, tree = read_tree_file(name), tnreg.load_tree(name)
        modes = content.get("modes")
        label = (
            (lambda v, m=modes: f"{v} {m[v]}" if isinstance(v, int) else str(v)) if modes else str
        )
        lines += ["", f"## {name}", "", content["about"][0].upper() + content["about"][1:] + ".", "",
                  "```text", tree.text(label=label), "```"]  # fmt: skip
    return "\n".join(lines) + "\n"


def speed_table():
    figures = json.loads((ROOT / "benchmarks" / "results" / "steps-cpu.json").read_text())[
        "milliseconds"
    ]
    rows = []
    for block, what in {
        "htf": "HTF 8⁴, widths 512, 2,048 entries: training step",
        "cp": "CP 16³, 256 components, 2,048 entries: training step",
        "matrix": "matrix 64×64, depth 3, 2,048 entries: training step",
        "full": "full joins, 16 sites, dim 8, bond 16, batch 1,024",
    }.items():
        found = figures[block]
        for peer, time in found.items():
            if peer.startswith("tnreg"):
                continue
            mine = next(
                k
                for k in found
                if k.startswith("tnreg") and k.endswith("backward") == peer.endswith("backward")
            )
            rows.append(
                f"| {what} | {peer} | {found[mine]:.2f} ms | {time:.2f} ms | {time / found[mine]:.2f} |"
            )
    head = ["| work | against | tnreg | other | other / tnreg |", "|---|---|---|---|---|"]
    return "\n".join(head + rows)


PUBLISHED = {  # figure 1, 2 and 4 of the paper
    "mf": ("36.5 32.2 28.3 23.3 20.2 \\| ≈ 0", "0.1–0.4, 1.1–1.5, 2.3–2.9, 2.9–3.3, 4.4–4.8"),
    "cp": ("37.2 36.2 24.2 21.7 17.4 \\| ≈ 0", "0.1–0.5, 1.2–1.6, 2.3–2.7, 4.7–5.0, 6.1–6.4"),
    "htf": ("9.46 4.76 2.53 1.48 0.86 \\| ≈ 0", "first 10.2; 13.2, 15.7, 20, 30"),
}


def dynamics_table():
    runs = json.loads((ROOT / "benchmarks/results/dynamics-runs.json").read_text())["runs"]
    lines = ["| run | components \\| next | jumps | ranks (target) | test error | steps |"]
    lines.append("|---|---|---|---|---|---|")
    for model, (components, jumps) in PUBLISHED.items():
        lines.append(f"| {model.upper()}, published | {components} | {jumps} | | | |")
        for run in (r for r in runs if r["model"] == model):
            largest = run["components"]
            alive = [c for c in largest if c > 0.01 * largest[0]]
            shown = " ".join(f"{c:.3g}" for c in alive) + f" \\| {largest[len(alive)]:.1g}"
            when = ", ".join(f"{a / 1000:.1f}–{b / 1000:.1f}" for a, b in run["jumps"])
            ranks = " ".join(map(str, run["ranks"].values()))
            target = " ".join(map(str, run["target ranks"].values()))
            steps = f"{run['steps']:,}"
            lines.append(
                f"| {model.upper()}, seed {run['seed']} | {shown} | {when} | {ranks} ({target}) "
                f"| {run['test error']:.2g} | {steps} |"
            )
    return "\n".join(lines)


def cost_table():
    found = json.loads((ROOT / "benchmarks/results/dynamics-cpu.json").read_text())
    times = found["milliseconds"]
    step = times["step: tnreg"]
    lines = ["| what | ms | of a step |", "|---|---|---|"]
    lines += [f"| {name} | {time:.2f} | {time / step:.2f} |" for name, time in times.items()]
    return "\n".join(lines)


def decompose_table():
    found = json.loads((ROOT / "benchmarks/results/decompose-cpu.json").read_text())["results"]
    lines = ["| tensor | library | seconds | of the first | error |", "|---|---|---|---|---|"]
    for tensor, rows in found.items():
        first = next(iter(rows.values()))["seconds"]
        lines += [
            f"| {tensor} | {library} {row['version']} | {row['seconds']:.2f} "
            f"| {row['seconds'] / first:.1f} | {row['error']:.1e} |"
            for library, row in rows.items()
        ]
    return "\n".join(lines)


def results(name):
    return json.loads((ROOT / f"benchmarks/results/{name}-cpu.json").read_text())["results"]


def factored_table():
    lines = [
        "| order/rank | library | ms | of tnreg | error | largest bond |",
        "|---|---|---|---|---|---|",
    ]
    for case, rows in results("factored").items():
        for library, row in rows.items():
            first = rows["tnreg, tensor train" if library == "torchTT" else "tnreg"]["seconds"]
            reached = f"{row['error']:.1e} | {row['rank']}" if "error" in row else "|"
            lines.append(
                f"| {case} | {library} {row['version']} | {1e3 * row['seconds']:.0f} "
                f"| {row['seconds'] / first:.1f} | {reached} |"
            )
    return "\n".join(lines)


def spectra_table():
    lines = ["| dense tensor | tnreg, ms | one svdvals per node, ms | ratio | difference |",
             "|---|---|---|---|---|"]  # fmt: skip
    for case, rows in results("spectra").items():
        ours, plain = rows["tnreg"]["seconds"], rows["svdvals per node"]["seconds"]
        lines.append(
            f"| {case} | {1e3 * ours:.1f} | {1e3 * plain:.1f} | {plain / ours:.1f} "
            f"| {rows['svdvals per node']['difference']:.0e} |"
        )
    return "\n".join(lines)


def real_table():
    lines = [
        "| tensor, asked | library | reached | numbers | to 1 | ms |",
        "|---|---|---|---|---|---|",
    ]
    for case, rows in results("real").items():
        lines += [
            f"| {case} | {row['label']} | {row['error']:.4f} | {row['numbers']:,} "
            f"| {row['of'] / row['numbers']:.0f} | {1e3 * row['seconds']:.0f} |"
            for row in rows.values()
        ]
    return "\n".join(lines)


def convac_summary():
    return json.loads((ROOT / "benchmarks/results/convac-cpu.json").read_text())["summary"]


def convac_table():
    lines = ["| classifier | test accuracy, % | training, % | weights | equal in onnxruntime |"]
    lines.append("|---|---|---|---|---|")
    found = convac_summary()
    for name, (mean, spread) in found["mean and spread"].items():
        rows = [row for row in found["accuracy"] if row["model"] == name]
        equal = rows[0].get("equal decisions in onnxruntime")
        train = sum(row["train"] for row in rows) / len(rows)
        shown = "" if equal is None else f"{100 * equal:.0f} %"
        lines.append(
            f"| {name} | {100 * mean:.1f} ± {100 * spread:.1f} | {100 * train:.1f} "
            f"| {rows[0]['weights']:,} | {shown} |"
        )
    return "\n".join(lines)


def shrunk_table():
    lines = ["| tree | how | asked | error | bound | test accuracy, % | weights | largest bond |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    lines += [
        f"| {r['model']} | {r['how']} | {r['asked']:g} | {r['error']:.3f} | {r['bound']:.3g} "
        f"| {100 * r['test']:.1f} | {r['weights']:,} | {r['largest bond']} |"
        for r in convac_summary()["smaller"]
    ]
    return "\n".join(lines)


def locality_table():
    found = json.loads((ROOT / "benchmarks/results/locality-cpu.json").read_text())["table"]
    lines = ["| arm | distance | test accuracy, % | epochs | seconds | of plain | per epoch |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {r['arm']} | {r['distance']} | {100 * r['test accuracy']:.1f} ± {100 * r['deviation']:.1f} "
        f"| {r['epochs']:.0f} | {r['seconds']:.1f} | {r['cost']:.2f} | {r['cost an epoch']:.2f} |"
        for r in found
    ]
    return "\n".join(lines)


def regularizer_table():
    found = results("regularizer")
    kept = found["memory kept"]
    lines = ["| net | step | ms | over plain | over plain, memory kept |", "|---|---|---|---|---|"]
    lines += [
        f"| {net} | {step} | {row['milliseconds']:.1f} | {row['over plain']:.2f} "
        f"| {kept[net][step]['over plain']:.2f} |"
        for net, rows in found["memory returned"].items()
        for step, row in rows.items()
    ]
    return "\n".join(lines)


def cnn_table():
    found = json.loads((ROOT / "benchmarks/results/cnn-cpu.json").read_text())["milliseconds"]
    lines = ["| network | ms | hand-written | ratio |", "|---|---|---|---|"]
    for block, rows in found.items():
        for name, time in rows.items():
            if name != "hand-written":
                what = block + ("" if name == "tnreg" else ", without scales")
                other = rows["hand-written"]
                lines.append(f"| {what} | {time:.2f} | {other:.2f} | {time / other:.2f} |")
    return "\n".join(lines)


def blocks_table():
    found = results("blocks")
    runs = {name: row for name, row in found.items() if "passes" in row}
    lines = [
        "| pass | " + " | ".join(f"{name}, s" for name in runs) + " |",
        "|---" * (1 + len(runs)) + "|",
    ]
    for passes in zip(*(row["passes"] for row in runs.values()), strict=True):
        what, _, counted = passes[0]["what"].partition(": ")
        flops = counted.rpartition(", ")[2]
        seconds = " | ".join(f"{p['seconds']:.1f}" for p in passes)
        lines.append(f"| {what}, {flops} | {seconds} |")
    for head, value in (
        ("whole", lambda row: f"{row['seconds']:.1f}"),
        ("largest resident set, GiB", lambda row: f"{row['peak bytes'] / 2**30:.2f}"),
        ("error (asked 1e-3)", lambda row: f"{row['error']:.2e}"),
    ):
        lines.append(f"| {head} | " + " | ".join(map(value, runs.values())) + " |")
    return "\n".join(lines)


def sweeps_table():
    found = results("scale")["sweeps"]
    lines = ["| twelve cells | without work, s | smallest trainings, s |", "|---|---|---|"]
    lines += [
        f"| {where} | {row['nothing']:.2f} | {row['tiny']:.1f} |" for where, row in found.items()
    ]
    return "\n".join(lines)


def epochs_table():
    found = results("scale")["epochs"]
    lines = ["| arm | one process, s | two processes, s |", "|---|---|---|"]
    lines += [
        f"| {arm} | {row['1']['epoch']:.2f} | {row['2']['epoch']:.2f} |"
        for arm, row in found.items()
    ]
    return "\n".join(lines)


def test_docs_tables_are_the_committed_results():
    page = (ROOT / "docs/dynamics.md").read_text(encoding="utf-8")
    assert dynamics_table() in page and cost_table() in page
    page = (ROOT / "docs/decompose.md").read_text(encoding="utf-8")
    for table in (decompose_table(), factored_table(), spectra_table(), real_table()):
        assert table in page
    page = (ROOT / "docs/cnn.md").read_text(encoding="utf-8")
    for table in (convac_table(), shrunk_table(), cnn_table()):
        assert table in page
    page = (ROOT / "docs/seeing_far.md").read_text(encoding="utf-8")
    assert locality_table() in page and regularizer_table() in page
    page = (ROOT / "docs/past_one_machine.md").read_text(encoding="utf-8")
    assert blocks_table() in page and sweeps_table() in page and epochs_table() in page


def test_published_dynamics_are_reproduced():
    """The committed runs: as many components as the target has, and the ranks of the target at every node."""
    runs = json.loads((ROOT / "benchmarks/results/dynamics-runs.json").read_text())["runs"]
    assert sorted((r["model"], r["seed"]) for r in runs) == [
        (model, seed) for model in ("cp", "htf", "mf") for seed in (1, 2, 3)
    ]
    for run in runs:
        assert run["ranks"] == run["target ranks"]
        if run["model"] != "htf":
            assert run["components"][5] < 0.01 * run["components"][4] and len(run["jumps"]) == 5


def test_docs_run(tmp_path, monkeypatch):
    """Every Python block of the docs, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for code, output in re.findall(
            r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", text, re.DOTALL
        ):
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(compile(code, page.name, "exec"), {})
            assert said.getvalue() == output, page.name


def test_gallery_page_pictures_every_tree():
    assert (ROOT / "trees" / "README.md").read_text(encoding="utf-8") == gallery_page()


def test_gallery_files_fit_their_trees():
    for name in tnreg.gallery():
        content, tree = read_tree_file(name), tnreg.load_tree(name)
        assert set(content) <= {"about", "tree", "modes", "sizes"} and content["about"]
        for key in ("modes", "sizes"):
            assert len(content.get(key, tree.leaves)) == tree.order


def test_readme_speed_table_is_the_committed_run():
    assert speed_table() in README


def test_readme_runs():
    """The Python block prints what the block after it says."""
    code, output = re.search(r"```python\n(.*?)```\s*```text\n(.*?)```", README, re.DOTALL).groups()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "README", "exec"), {})
    assert said.getvalue() == output


def test_readme_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    help_text = subprocess.run(
        [sys.executable, "-m", "tnreg.cli", "--help"], capture_output=True, text=True
    ).stdout
    documented = set(re.findall(r"^tnreg (\w+)", README, re.MULTILINE))
    assert documented == set(re.findall(r"• (\w+)", help_text))


def test_links_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not link.startswith("https://"):
                assert (page.parent / link).exists(), (page.name, link)


def test_public_names_are_in_the_changelog_and_documented():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## ([\d.]+)", changelog, re.MULTILINE).group(1) == tnreg.__version__
    for name in tnreg.__all__:
        thing = getattr(tnreg, name)
        assert thing.__doc__, name
        if name not in (
            "TreeError",
            "ShapeError",
            "DataError",
            "OptionError",
            "FileError",
            "TnregError",
            "Plan",
            "Network",
        ):
            assert f"`{name}" in changelog, name


def test_lower_bounds_cover_what_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(
        re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )

    def numbers(version):
        return tuple(int(part) for part in re.findall(r"\d+", version)[:3])

    extras = project["optional-dependencies"]
    for requirement in project["dependencies"] + extras["data"] + extras["dev"]:
        match = re.fullmatch(r"([\w-]+)(?:>=(\S+))?", requirement)
        if match and match[2]:
            assert numbers(pinned[match[1]]) >= numbers(match[2]), requirement


def test_import_needs_no_extra():
    """``import tnreg`` works where nothing but its own requirements is, and loads nothing that is slow."""
    extras = ["dask", "distributed", "zarr", "h5py", "sklearn", "tensorly", "quimb", "onnx", "onnxruntime",
              "onnxscript", "pyarrow"]  # fmt: skip
    slow = ["scipy", "pandas", "matplotlib", "tensornetwork", "tyro", "rich", "IPython"]
    script = (
        "import sys\nbefore = set(sys.modules)\nimport torch\nof_torch = set(sys.modules) - before\n"
        "import tnreg\nprint(sorted({name.split('.')[0] for name in set(sys.modules) - of_torch}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert set(extras + slow) & set(ast.literal_eval(done.stdout)) == set()


def test_wheel_holds_the_gallery(tmp_path):
    """A wheel made by the build backend has the package and its trees inside, and nothing else."""
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {
        "tnreg/trees/gallery/htf-4.json",
        "tnreg/py.typed",
        "tnreg/experiments/demo.py",
        "tnreg/cli/entry.py",
    }
    assert inside <= names
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


if __name__ == "__main__":
    (ROOT / "trees" / "README.md").write_text(gallery_page(), encoding="utf-8")
    marked = re.sub(
        r"(?s)SPEED_TABLE|\| work \| against .*?(?=\n\n)", lambda _: speed_table(), README
    )
    (ROOT / "README.md").write_text(marked, encoding="utf-8")
    for name, mark, head, table in (
        ("dynamics", "DYNAMICS_TABLE", "| run | ", dynamics_table()),
        ("dynamics", "COST_TABLE", "| what | ms ", cost_table()),
        ("decompose", "SPEED_TABLE", "| tensor | ", decompose_table()),
        ("decompose", "FACTORED_TABLE", "| order/rank | ", factored_table()),
        ("decompose", "SPECTRA_TABLE", "| dense tensor | ", spectra_table()),
        ("decompose", "REAL_TABLE", "| tensor, asked | ", real_table()),
        ("cnn", "CONVAC_TABLE", "| classifier | ", convac_table()),
        ("cnn", "SHRUNK_TABLE", "| tree | how ", shrunk_table()),
        ("cnn", "CNN_TABLE", "| network | ms ", cnn_table()),
        ("seeing_far", "LOCALITY_TABLE", "| arm | distance ", locality_table()),
        ("seeing_far", "REGULARIZER_TABLE", "| net | step ", regularizer_table()),
        ("past_one_machine", "BLOCKS-TABLE", "| pass | ", blocks_table()),
        ("past_one_machine", "SWEEPS-TABLE", "| twelve cells | ", sweeps_table()),
        ("past_one_machine", "EPOCHS-TABLE", "| arm | one process", epochs_table()),
    ):
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        page = re.sub(
            rf"(?s){mark}|{re.escape(head)}.*?(?=\n\n|\Z)", lambda _, t=table: t, page, count=1
        )
        (ROOT / "docs" / f"{name}.md").write_text(page.rstrip() + "\n", encoding="utf-8")
