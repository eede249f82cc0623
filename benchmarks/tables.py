"""Tables of the docs, made from ``benchmarks/results/*.json``, and the page of the gallery.

``python benchmarks/tables.py`` writes them anew, each from the line that begins as its header does to the
next empty line. A new table starts as such a line in its page and an entry in ``PAGES``.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tnreg
from tnreg.trees.tree import read_tree_file

ROOT = Path(__file__).parent.parent

PUBLISHED = {  # figures 1, 2 and 4 of the paper
    "mf": ("36.5 32.2 28.3 23.3 20.2 \\| ≈ 0", "0.1–0.4, 1.1–1.5, 2.3–2.9, 2.9–3.3, 4.4–4.8"),
    "cp": ("37.2 36.2 24.2 21.7 17.4 \\| ≈ 0", "0.1–0.5, 1.2–1.6, 2.3–2.7, 4.7–5.0, 6.1–6.4"),
    "htf": ("9.46 4.76 2.53 1.48 0.86 \\| ≈ 0", "first 10.2; 13.2, 15.7, 20, 30"),
}
STEPS = {
    "htf": "HTF 8⁴, widths 512, 2,048 entries: training step",
    "cp": "CP 16³, 256 components, 2,048 entries: training step",
    "matrix": "matrix 64×64, depth 3, 2,048 entries: training step",
    "full": "full joins, 16 sites, dim 8, bond 16, batch 1,024",
}
Rows = Iterator[Sequence[Any]]


def main() -> None:
    """Write the gallery page and every table."""
    (ROOT / "trees" / "README.md").write_text(gallery_page(), encoding="utf-8")
    for page, start, table in tables():
        text = (ROOT / page).read_text(encoding="utf-8")
        text, count = re.subn(
            rf"(?sm)^{re.escape(start)}.*?(?=\n\n|\n?\Z)", lambda _, t=table: t, text, count=1
        )
        if not count:
            raise SystemExit(f"{page} has no line that begins with {start!r}")
        (ROOT / page).write_text(text, encoding="utf-8")


def tables() -> Iterator[tuple[str, str, str]]:
    """Yield page, start of the header, and table."""
    for page, start, table in PAGES:
        header, *rows = table()
        lines = [header, ["---"] * len(header), *rows]
        text = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
        text[1] = text[1].replace(" ", "")
        assert text[0].startswith(start), start
        yield page, start, "\n".join(text)


def gallery_page() -> str:
    """Return the page of the gallery, with every tree as text."""
    lines = [
        "# Gallery",
        "",
        "One JSON file a tree: nested lists of mode numbers, with optional mode names and sizes.",
        '`tnreg.load_tree("htf-4")` reads one by its name; `tnreg tree NAME --figure FILE` draws it.',
        'A file of your own needs the key `tree` only: `{"tree": [[0, 1], [2, 3]]}`.',
    ]
    for name in tnreg.gallery():
        content, tree = read_tree_file(name), tnreg.load_tree(name)
        modes = dict(enumerate(content.get("modes", ())))
        text = tree.text(label=lambda node, m=modes: f"{node} {m[node]}" if node in m else str(node))
        about = content["about"][0].upper() + content["about"][1:]
        lines += ["", f"## {name}", "", f"{about}.", "", "```text", text, "```"]
    return "\n".join(lines) + "\n"


def _results(name: str, key: str = "results") -> Any:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())[key]


def _steps() -> Rows:
    yield "work", "against", "tnreg", "other", "other / tnreg"
    for block, times in _results("steps-cpu", "milliseconds").items():
        for peer, other in times.items():
            if not peer.startswith("tnreg"):
                backward = peer.endswith("backward")
                ours = next(
                    time
                    for name, time in times.items()
                    if name.startswith("tnreg") and name.endswith("backward") == backward
                )
                yield STEPS[block], peer, f"{ours:.2f} ms", f"{other:.2f} ms", f"{other / ours:.2f}"


def _dynamics() -> Rows:
    yield "run", "components \\| next", "jumps", "ranks (target)", "test error", "steps"
    for model, (components, jumps) in PUBLISHED.items():
        yield f"{model.upper()}, published", components, jumps, "| |"  # three empty cells
        for run in (r for r in _results("dynamics-runs", "runs") if r["model"] == model):
            largest = run["components"]
            alive = [c for c in largest if c > 0.01 * largest[0]]
            ranks, target = (" ".join(map(str, run[k].values())) for k in ("ranks", "target ranks"))
            yield (
                f"{model.upper()}, seed {run['seed']}",
                " ".join(f"{c:.3g}" for c in alive) + f" \\| {largest[len(alive)]:.1g}",
                ", ".join(f"{a / 1000:.1f}–{b / 1000:.1f}" for a, b in run["jumps"]),
                f"{ranks} ({target})",
                f"{run['test error']:.2g}",
                f"{run['steps']:,}",
            )


def _studies() -> Rows:
    yield "study", "what", "unseen error", "components", "effective rank", "target's ranks", "moves at step"
    rows = _results("dynamics-studies", "rows")
    for study, name in dict.fromkeys((row["study"], row["name"]) for row in rows):
        seeds = [row for row in rows if (row["study"], row["name"]) == (study, name)]
        errors = ", ".join(f"{row['test error']:.2g}" for row in seeds)
        alive = [sum(c > 0.1 * row["components"][0] for c in row["components"]) for row in seeds]
        ranks = sum(row["ranks"] == row["target ranks"] for row in seeds)
        effective = ", ".join(f"{row['effective rank']:.2f}" for row in seeds)
        moved = [row["first left"] or None for row in seeds]
        yield (study, name, errors, ", ".join(f"{n}" if n < 10 else "≥ 10" for n in alive), effective,
               f"{ranks} of {len(seeds)}", ", ".join(f"{m:,}" if m else "–" for m in moved))  # fmt: skip


def _cost() -> Rows:
    yield "what", "ms", "of a step"
    times = _results("dynamics-cpu", "milliseconds")
    for name, time in times.items():
        yield name, f"{time:.2f}", f"{time / times['step: tnreg']:.2f}"


def _decompose() -> Rows:
    yield "tensor", "library", "seconds", "of the first", "error"
    for tensor, rows in _results("decompose-cpu").items():
        first = next(iter(rows.values()))["seconds"]
        for library, row in rows.items():
            seconds = row["seconds"]
            yield (tensor, f"{library} {row['version']}", f"{seconds:.2f}", f"{seconds / first:.1f}",
                   f"{row['error']:.1e}")  # fmt: skip


def _factored_trees() -> Rows:
    yield "trees, order/rank", "tnreg, ms", "hiepy / tnreg", "tensap / tnreg", "error of tnreg"
    yield from _factored("tnreg", "hiepy", "tensap")


def _factored_trains() -> Rows:
    yield "trains, order/rank", "tnreg, ms", "torchTT / tnreg", "error of tnreg"
    yield from _factored("tnreg, tensor train", "torchTT")


def _factored(ours: str, *others: str) -> Rows:
    for case, rows in _results("factored-cpu").items():
        if ours in rows:
            row = rows[ours]
            ratios = [f"{rows[name]['seconds'] / row['seconds']:.2f}" for name in others]
            error = f"{row['error']:.1e}" if "error" in row else ""
            yield case, f"{1e3 * row['seconds']:.1f}", *ratios, error


def _spectra() -> Rows:
    yield "dense tensor", "tnreg, ms", "one svdvals per node, ms", "ratio", "difference"
    for case, rows in _results("spectra-cpu").items():
        size, _, tree = case.partition(", ")
        if not size.startswith(("8^", "16^")) or (tree and not (tree == "caterpillar" and size[:3] == "8^6")):
            continue  # not all rows of it
        ours, plain = (rows[way]["seconds"] for way in ("tnreg", "svdvals per node"))
        yield (case, f"{1e3 * ours:.2f}", f"{1e3 * plain:.2f}", f"{plain / ours:.1f}",
               f"{rows['svdvals per node']['difference']:.0e}")  # fmt: skip


def _precision() -> Rows:
    yield "in float32", "single, ms", "double, ms", "ratio"
    for case, rows in _results("precision-cpu").items():
        single, double = (rows[way]["seconds"] for way in ("single", "double"))
        yield case, f"{1e3 * single:.0f}", f"{1e3 * double:.0f}", f"{double / single:.1f}"


def _real() -> Rows:
    yield "tensor, asked", "library", "reached", "numbers", "to 1", "ms"
    for case, rows in _results("real-cpu").items():
        for row in rows.values():
            yield (case, row["label"], f"{row['error']:.4f}", f"{row['numbers']:,}",
                   f"{row['of'] / row['numbers']:.0f}", f"{1e3 * row['seconds']:.0f}")  # fmt: skip


def _convac() -> Rows:
    yield "classifier", "test accuracy, %", "training, %", "weights", "equal in onnxruntime"
    summary = _results("convac-cpu", "summary")
    for name, (mean, spread) in summary["mean and spread"].items():
        rows = [row for row in summary["accuracy"] if row["model"] == name]
        equal = rows[0].get("equal decisions in onnxruntime")
        train = sum(row["train"] for row in rows) / len(rows)
        yield (name, f"{100 * mean:.1f} ± {100 * spread:.1f}", f"{100 * train:.1f}",
               f"{rows[0]['weights']:,}", "" if equal is None else f"{100 * equal:.0f} %")  # fmt: skip


def _truncated() -> Rows:
    yield "tree", "how", "asked", "error", "bound", "test accuracy, %", "weights", "largest bond"
    for r in _results("convac-cpu", "summary")["smaller"]:
        yield (r["model"], r["how"], f"{r['asked']:g}", f"{r['error']:.3f}", f"{r['bound']:.3g}",
               f"{100 * r['test']:.1f}", f"{r['weights']:,}", r["largest bond"])  # fmt: skip


def _cnn() -> Rows:
    yield "network", "ms", "hand-written", "ratio"
    for block, times in _results("cnn-cpu", "milliseconds").items():
        other = times.pop("hand-written")
        for name, time in times.items():
            network = block if name == "tnreg" else f"{block}, without scales"
            yield network, f"{time:.2f}", f"{other:.2f}", f"{time / other:.2f}"


# Arms of the parts of benchmarks/seeing_far.py, as the docs call them.
TERMS = {
    "plain": "plain", "igc": "gradient change, λ = 2, every 4th step",
    "interaction": "interaction energy, λ = 0.3, steps 1–300, E > 0.6",
    "rank": "**interaction rank, λ = 0.2, steps 201–500, E > 0.6**",
}  # fmt: skip
NOISE = {
    ("noise", "plain"): "plain + fresh noise N(0, 0.2²)", ("noise", "igc"): "gradient change + that noise",
    ("noise", "rank"): "interaction rank + that noise",
    ("noise, always", "rank"): "**interaction rank, λ = 0.07, every step + that noise**",
}  # fmt: skip
SCEPTIC = {
    ("main", "plain"): "plain", ("longer", "plain"): "180 epochs in place of 60, never stopped",
    ("regularized", "weight-decay"): "weight decay 1e-3", ("regularized", "dropout"): "dropout 0.5",
    ("regularized", "sam"): "SAM, ρ = 0.05", ("shift", "plain"): "random shift by one pixel",
    ("mixup", "plain"): "mixup, α = 0.2", ("cutmix", "plain"): "CutMix, α = 1",
    ("noise", "plain"): "fresh noise N(0, 0.2²)", ("normalized", "plain"): "batch normalization",
    ("dilation", "plain"): "dilation 2", ("wide kernels", "plain"): "7×7 kernels, 5 times the weights",
    ("shorter distances first", "plain"): "7 epochs each at 0, 8 and 16 pixels first",
    ("main", "rank"): "**interaction rank**",
}  # fmt: skip


NETS = {
    "residual": "residual", "residual, noise": "residual, fresh noise, rank at every step",
    "transformer": "transformer",
}  # fmt: skip


def _terms() -> Rows:
    labels = {("main", arm): text for arm, text in TERMS.items()}
    return _far(labels | NOISE, (0, 8, 16, 24))


def _sceptic() -> Rows:
    return _far(SCEPTIC, (0, 24))


def _nets() -> Rows:
    yield "network", "term", "d = 0", "d = 24", "images"
    for net, name in NETS.items():
        arms = {r["arm"] for r in _results("seeing-far", net)["table"]}
        labels = {(net, arm): text.split(",")[0].strip("*") for arm, text in TERMS.items() if arm in arms}
        for row in list(_far(labels, (0, 24)))[1:]:
            yield name, *row


def _far(labels: dict[tuple[str, str], str], distances: Sequence[int]) -> Rows:
    """Yield accuracies, and how many images pass through the network for each one that is shown."""
    yield "trained with", *(f"d = {d}" for d in distances), "images"
    for (part, arm), label in labels.items():
        rows = {r["distance"]: r for r in _results("seeing-far", part)["table"] if r["arm"] == arm}
        images = [r["images"] for r in rows.values()]
        yield label, *(_percent(rows.get(d)) for d in distances), f"{sum(images) / len(images):.2f}"


def _far_pairs() -> Rows:
    arms = ("plain", "igc", "interaction", "rank")
    yield "pairs of", "pixels apart", "plain", "gradient change", "interaction energy", "interaction rank"
    for name in ("photos", "spectra"):
        found = {(r["distance"], r["arm"]): r for r in _results("far-sets", name)["table"]}
        distances = list(dict.fromkeys(distance for distance, _ in found))
        for distance in distances:
            yield name, distance, *(_percent(found.get((distance, arm))) for arm in arms)
        costs = ([found[d, arm]["cost an epoch"] for d in distances if (d, arm) in found] for arm in arms)
        yield name, "time an epoch", *(f"{sum(some) / len(some):.2f}" if some else "–" for some in costs)


def _far_paths() -> Rows:
    yield "Pathfinder", "patches", "32×32, L = 5, matched", "as published", "64×64, L = 7, matched"
    sets = ("pathfinder-32", "pathfinder-32-published", "pathfinder-64")
    found = [
        {(r["arm"], r["patches"], r["patch_size"]): r for r in _results("far-sets", name)["table"]}
        for name in sets
    ]
    for arm, patches, side in found[0]:
        where = "–" if arm == "plain" else f"{patches}, {side}×{side}"
        yield arm, where, *(_percent(rows.get((arm, patches, side))) for rows in found)


def _percent(row: dict[str, Any] | None) -> str:
    """Mean and deviation; of one seed its value."""
    if row is None:
        return "–"
    spread = f" ± {100 * row['deviation']:.1f}" if row["seeds"] > 1 else ""
    return f"{100 * row['test accuracy']:.1f}{spread}"


def _claim() -> Rows:
    yield "training", "interaction share of the digits", "effective rank"
    for r in _results("claim-cpu", "summary"):
        share = f"{r['share']:.4f} ± {r['deviation']:.4f}"
        yield r["arm"], share, f"{r['effective rank']:.1f}"


def _regularizer() -> Rows:
    yield "net", "step", "ms", "over plain", "over plain, memory kept"
    results = _results("regularizer-cpu")
    for net, rows in results["memory returned"].items():
        for step, row in rows.items():
            kept = results["memory kept"][net][step]["over plain"]
            yield net, step, f"{row['milliseconds']:.1f}", f"{row['over plain']:.2f}", f"{kept:.2f}"


def _blocks() -> Rows:
    runs = {name: row for name, row in _results("blocks-cpu").items() if "passes" in row}
    yield "pass", *(f"{name}, s" for name in runs)
    for passes in zip(*(row["passes"] for row in runs.values()), strict=True):
        what, _, counted = passes[0]["what"].partition(": ")
        flops = counted.rpartition(", ")[2]
        yield f"{what}, {flops}", *(f"{p['seconds']:.1f}" for p in passes)
    yield "whole", *(f"{row['seconds']:.1f}" for row in runs.values())
    peaks = (f"{row['peak bytes'] / 2**30:.2f}" for row in runs.values())
    yield "largest resident set, GiB", *peaks
    yield "error (asked 1e-3)", *(f"{row['error']:.2e}" for row in runs.values())


def _cross() -> Rows:
    yield "function", "method", "evaluations", "of tnreg", "error"
    runs: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for r in _results("complete_cross"):
        settings = runs.setdefault((r["task"], r["method"]), {})
        settings.setdefault(r["setting"], []).append((r["evaluations"], r["error"]))

    def cost(seeds: list[tuple[int, float]]) -> tuple[bool, float, float]:
        worst = max(error for _, error in seeds)
        return worst > 3e-6, sum(count for count, _ in seeds) / len(seeds), worst

    found = {key: min(map(cost, settings.values())) for key, settings in runs.items()}
    tasks = list(dict.fromkeys(task for task, _ in found))
    for (task, method), (_, count, worst) in sorted(found.items(), key=lambda row: tasks.index(row[0][0])):
        yield (
            task,
            method,
            f"{count:,.0f}",
            f"{count / found[task, 'tnreg, tree found'][1]:.1f}",
            f"{worst:.0e}",
        )


def _sweeps() -> Rows:
    yield "twelve cells", "without work, s", "smallest trainings, s"
    for where, row in _results("scale-cpu")["sweeps"].items():
        yield where, f"{row['nothing']:.2f}", f"{row['tiny']:.1f}"


def _epochs() -> Rows:
    yield "arm", "one process, s", "two processes, s"
    for arm, row in _results("scale-cpu")["epochs"].items():
        yield arm, f"{row['1']['epoch']:.2f}", f"{row['2']['epoch']:.2f}"


def _trees() -> Rows:
    """Numbers and seconds by seed; how often tensap's seconds contain those of ``find_tree``."""
    methods = {"tensap": "tensap 1.8, 100 steps"} | {
        method: f"`{method}`" for method in ("agglomerate", "interchange", "auto")
    }
    yield ["tensor, modes permuted", "its own tree", "natural tree", *methods.values(), "times faster"]
    for case, by_seed in _results("complete_trees")["dense"].items():
        rows, cells = list(by_seed.values()), list[str]()
        for key in methods:
            seconds = _seeds(f"{row[key]['seconds']:.2g}" for row in rows)
            cells.append(f"{_seeds(row[key]['numbers'] for row in rows)} / {seconds} s")
        faster = min(row["tensap"]["seconds"] / row["auto"]["seconds"] for row in rows)
        own = _seeds(row.get("true", "-") for row in rows)
        yield [case, own, _seeds(f"{row['natural']:,}" for row in rows), *cells, f"{faster:.0f}"]


def _tree_factors() -> Rows:
    yield ["factors", "given", "found", "its own tree", "seconds"]
    for case, by_seed in _results("complete_trees")["factors"].items():
        rows = list(by_seed.values())
        parts = [_seeds(f"{row[key]:,}" for row in rows) for key in ("given", "numbers", "true")]
        yield [case, *parts, _seeds(f"{row['seconds']:.2g}" for row in rows)]


def _seeds(values: Iterable[Any]) -> str:
    """Return what came out for every seed, once if it was the same."""
    return "; ".join(dict.fromkeys(map(str, values)))


def _data_suits() -> Rows:
    nets, forms = ("convolutional", "locally connected"), {"entropy": ".5f", "entropy with labels": ".3f"}
    forms["correlation"] = ",.0f"
    found = ("entropy, 128 features", "with labels", "correlations", "neighbours, %")
    yield "order", *found, *(f"{net}, %" for net in nets)
    seeds = list(_results("data_suits").values())
    for name in seeds[0]:
        rows = [seed[name] for seed in seeds]
        yield (name, *(_mean([row[key]["128"] for row in rows], form) for key, form in forms.items()),
               _mean([100 * row["neighbours"] for row in rows], ".0f"),
               *(_mean([100 * row[net][1] for row in rows], ".1f") for net in nets))  # fmt: skip


def _mean(values: Sequence[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def _completed() -> Rows:
    results = _results("complete")
    names = {method for rows in results.values() for method in rows}
    methods = sorted(names, key=lambda name: (not name.startswith("tnreg"), name))
    yield "task", *methods
    for task, rows in results.items():
        seeds = max(map(len, rows.values()))
        yield task, *(_over_seeds(list(rows.get(method, {}).values()), seeds) for method in methods)


def _over_seeds(rows: Sequence[dict[str, Any]], seeds: int) -> str:
    """Smallest and largest error, mean of the seconds, and how many seeds if there are more."""
    ran = sorted((row for row in rows if "error" in row), key=lambda row: row["error"])
    if not ran:
        return rows[0]["failed"] if rows else ""
    errors = dict.fromkeys(_short(row["error"]) for row in (ran[0], ran[-1]))
    seconds = sum(row["seconds"] for row in ran) / len(ran)
    return f"{' to '.join(errors)}, {seconds:.2g} s" + f" ({len(ran)})" * (len(ran) < seeds)


def _short(error: float) -> str:
    return f"{error:.3g}" if error > 0.01 else f"{error:.1e}"


def _ours() -> Rows:
    yield "task", "seed", "error", "held out", "interval", "numbers", "ranks", "s"
    for task, methods in _results("complete").items():
        for seed, row in methods.get("tnreg", {}).items():
            found, held, low, high = map(_short, (row["error"], row["held out"], *row["interval"]))
            yield (task, seed, found, held, f"{low} to {high}",
                   row["numbers"], " ".join(map(str, row["ranks"])), f"{row['seconds']:.1f}")  # fmt: skip


PAGES: list[tuple[str, str, Callable[[], Rows]]] = [  # page, how the header begins, table
    ("docs/speed.md", "| work | against ", _steps),
    ("docs/complete.md", "| function | method ", _cross),
    ("docs/data.md", "| order | entropy", _data_suits),
    ("docs/dynamics.md", "| run | ", _dynamics),
    ("docs/dynamics.md", "| study | ", _studies),
    ("docs/dynamics.md", "| what | ms ", _cost),
    ("docs/trees.md", "| tensor, modes permuted | ", _trees),
    ("docs/trees.md", "| factors | ", _tree_factors),
    ("docs/decompose.md", "| tensor | ", _decompose),
    ("docs/decompose.md", "| trees, order/rank | ", _factored_trees),
    ("docs/decompose.md", "| trains, order/rank | ", _factored_trains),
    ("docs/decompose.md", "| dense tensor | ", _spectra),
    ("docs/decompose.md", "| in float32 | ", _precision),
    ("docs/decompose.md", "| tensor, asked | ", _real),
    ("docs/cnn.md", "| classifier | ", _convac),
    ("docs/cnn.md", "| tree | how ", _truncated),
    ("docs/cnn.md", "| network | ms ", _cnn),
    ("docs/seeing_far.md", "| training | interaction share ", _claim),
    ("docs/seeing_far.md", "| trained with | d = 0 | d = 8 ", _terms),
    ("docs/seeing_far.md", "| trained with | d = 0 | d = 24 ", _sceptic),
    ("docs/seeing_far.md", "| network | term ", _nets),
    ("docs/seeing_far.md", "| net | step ", _regularizer),
    ("docs/seeing_far.md", "| pairs of | pixels apart ", _far_pairs),
    ("docs/seeing_far.md", "| Pathfinder | patches | ", _far_paths),
    ("docs/complete.md", "| task | tnreg ", _completed),
    ("docs/complete.md", "| task | seed ", _ours),
    ("docs/past_one_machine.md", "| pass | ", _blocks),
    ("docs/past_one_machine.md", "| twelve cells | ", _sweeps),
    ("docs/past_one_machine.md", "| arm | one process", _epochs),
]


if __name__ == "__main__":
    main()
