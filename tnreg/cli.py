"""The command line: ``tnreg tree | rank | decompose | fit | run | sweep | export | probe | plot | demo``.

Options are typed function arguments, read by tyro; results are tables by rich. Exit codes: 0 done,
1 bad input (one message on standard error), 2 unknown options, 130 interrupted before anything ran.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import sys
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from tnreg import (
    ConvAC,
    ConvNet,
    ModeTree,
    Trajectory,
    algebra,
    effective_rank,
    entanglement_entropy,
    export_onnx,
    export_pt2,
    export_state,
    gallery,
    load,
    load_tensor,
    load_tree,
    locality_profile,
    open_tensor,
    plots,
    spectra,
    to_cnn,
    truncate,
)
from tnreg import decompose as hierarchical_svd
from tnreg.blocks import is_blocks
from tnreg.errors import FileError, OptionError, TnregError
from tnreg.experiments import (
    completion,
    convac,
    dynamics,
    init_scale,
    locality,
    sweep_figure,
    sweeps,
)
from tnreg.experiments import demo as demo_experiment
from tnreg.experiments import sweep as sweep_experiment
from tnreg.experiments.folder import experiment_of
from tnreg.experiments.probed import images_of, network_of
from tnreg.hsvd import distance
from tnreg.parallel import ProcessLost, is_first, started
from tnreg.rank import numerical_rank
from tnreg.tensors import is_large_file
from tnreg.tree import read_tree, read_tree_file

if TYPE_CHECKING:
    from tnreg.tensors import DenseTensor

__all__ = ["main"]

console = Console()
_TOGETHER = "work together in `tnreg run locality` alone; give other commands without torchrun"


def tree(
    source: str,
    /,
    *,
    ascii: bool = False,
    sizes: bool = False,
    png: Path | None = None,
) -> None:
    """Draw a mode tree.

    Args:
        source: A gallery name (htf-4), a JSON file, or nested lists ("[[0,1],[2,3]]"); "list" lists
            the gallery.
        ascii: Draw with plain characters only.
        sizes: Show mode names and sizes, where the file has them.
        png: Also draw a picture into this file.
    """
    if source == "list":
        table = Table("name", "order", "nodes", "about")
        for name in gallery():
            one, about = load_tree(name), read_tree_file(name)
            table.add_row(name, str(one.order), str(len(one.nodes)), about.get("about", ""))
        console.print(table)
        return
    found, about = read_tree(source), _tree_about(source)
    labels: dict[Any, str] = {}
    if sizes:
        names, counts = (about.get(key) or [""] * found.order for key in ("modes", "sizes"))
        if not all(isinstance(part, list) and len(part) == found.order for part in (names, counts)):
            raise FileError(
                f"{source}: 'modes' and 'sizes' need one entry for each of {found.order} modes."
            )
        for mode in found.leaves:
            size = f"size {counts[mode]}" if counts[mode] else ""
            labels[mode] = " ".join(part for part in (str(mode), str(names[mode]), size) if part)
    # plain print: a drawing is for pipes and files as well, without colours or wrapping
    print(found.text(label=lambda node: labels.get(node, str(node)), ascii_only=ascii))
    print(f"order {found.order}, {len(found.nodes)} nodes, height {found.heights[-1]}")
    if png is not None:
        plots.save_figure(plots.tree(found, _figure(), labels=labels).figure, png)
        print(f"wrote {png}")


def rank(
    file: str,
    /,
    *,
    tree: str | None = None,
    rtol: float = 1e-3,
    missing: Literal["nan"] | None = None,
    memory: str | None = None,
    device: str = "cpu",
    png: Path | None = None,
) -> None:
    """Table of hierarchical ranks, effective ranks and entropies of a tensor along a tree.

    Args:
        file: A .npy, .npz, .safetensors or .pt file, a model that `tnreg fit` saved, or kinetic,
            il2, covid19, indian-pines; or a .zarr folder or .h5 file (FILE:NAME), read block by block.
        tree: Gallery name, JSON file or nested lists; a binary tree if left out (a model's own for
            a model).
        rtol: A singular value counts if it is above rtol times the largest of its node.
        missing: "nan": entries that are NaN were not measured; they are set to the mean of the
            others here.
        memory: What arrays may take where a file is read block by block, e.g. 2GiB; a quarter of what is
            available if left out.
        device: Any torch device, e.g. cuda.
        png: Draw the singular values into this file.
    """
    subject, along, name = _rank_subject(file, tree, missing, _device(device))
    with torch.no_grad(), _telling("singular values ..."):
        found = spectra(subject, along, memory=memory)
        ranks = {node: numerical_rank(s, rtol) for node, s in found.items()}
    table = Table(title=f"{name} {tuple(subject.sizes if along is None else subject.shape)}")
    table.add_column("node")
    heads = ("singular values", f"rank (rtol {rtol:g})", "effective rank", "entropy", "largest")
    for head in heads:
        table.add_column(head, justify="right")
    for node, s in found.items():
        effective, entropy = float(effective_rank(s)), float(entanglement_entropy(s))
        figures = (f"{effective:.2f}", f"{entropy:.3f}", f"{float(s[0]):.4g}")
        table.add_row(str(node), str(len(s)), str(ranks[node]), *figures)
    console.print(table)
    if png is not None:
        plots.save_figure(plots.spectra(found, _figure()).figure, png)
        console.print(f"wrote {png}")


def decompose(
    file: str,
    /,
    *,
    tree: str | None = None,
    rtol: float = 1e-3,
    ranks: int | None = None,
    randomized: bool = False,
    missing: Literal["nan"] | None = None,
    memory: str | None = None,
    device: str = "cpu",
    out: Path | None = None,
    png: Path | None = None,
) -> None:
    """Hierarchical SVD of a tensor along a tree, or rounding of a saved model, to a relative error.

    Args:
        file: A .npy, .npz, .safetensors or .pt file, a model that tnreg saved, or kinetic, il2, covid19,
            indian-pines; or a .zarr folder or .h5 file (FILE:NAME), read block by block.
        tree: Gallery name, JSON file or nested lists; a binary tree if left out (a model's own for
            a model).
        rtol: Largest relative error, kept to unless ranks cut further.
        ranks: Largest bond.
        randomized: Look for the columns of large nodes with random vectors first.
        missing: "nan": entries that are NaN were not measured; they are set to the mean of the
            others here.
        memory: What arrays may take where a file is read block by block, e.g. 2GiB; a quarter of what is
            available if left out.
        device: Any torch device, e.g. cuda.
        out: Save the factorization into this file.
        png: Draw singular values and the tree with its ranks and error budget into this file.
    """
    subject, along, name = _rank_subject(file, tree, missing, _device(device))
    start = time.perf_counter()
    with _telling("decomposing ..."):
        if along is None:
            found = truncate(subject, rtol=rtol, ranks=ranks)
        else:
            found = hierarchical_svd(
                subject, along, rtol=rtol, ranks=ranks, randomized=randomized, memory=memory
            )
    seconds = time.perf_counter() - start
    on_disk = is_blocks(subject)
    with torch.no_grad(), console.status("singular values and error ..."):
        # of what is on disk only those that were kept: the others would take another reading for each node
        values = spectra(found if on_disk else subject, None if on_disk else along)
        if along is not None:
            reached, norm = distance(subject, found, memory=memory)
        else:  # in orthonormal frames: inner products would lose what is below 1e-8 of the norm
            reached = truncate(algebra.subtract(found, subject)).norm().item()
            norm = subject.norm().item()
    bonds = dict(zip(found.tree.nodes[:-1], found.network.bonds[:-1], strict=True))
    table = Table("node", title=f"{name} {found.sizes}, {seconds:.2f} s", title_justify="left")
    heads = ("singular values", "rank", "largest cut", "error of the cut")
    for head in heads[:2] if on_disk else heads:
        table.add_column(head, justify="right")
    for node, s in values.items():
        if on_disk:
            rows = math.prod(found.sizes[m] for m in found.tree.modes_below(node))
            table.add_row(
                str(node), str(min(rows, math.prod(found.sizes) // rows)), str(bonds[node])
            )
            continue
        rest = s[bonds[node] :].double()
        cut = f"{float(rest[0]) / norm:.2e}" if len(rest) and norm > 0 else "0"
        error = f"{float(rest.norm()) / norm:.2e}" if len(rest) and norm > 0 else "0"
        table.add_row(str(node), str(len(s)), str(bonds[node]), cut, error)
    console.print(table)
    weights = sum(p.numel() for p in found.parameters())
    before = (
        sum(p.numel() for p in subject.parameters()) if along is None else math.prod(found.sizes)
    )
    bound = (found.error_bound or 0.0) / norm if norm > 0 else 0.0
    console.print(f"numbers: {weights} of {before} ({before / weights:.4g} to 1)")
    asked = f"relative error: asked {rtol:g}, bound {bound:.4g}"
    asked += f", reached {reached / norm if norm > 0 else 0.0:.4g}"
    console.print(asked)
    if out is not None:
        found.save(out)
        console.print(f"wrote {out}")
    if png is not None:
        from matplotlib.figure import Figure

        drawn = Figure(figsize=(12, 4.5), layout="constrained")
        plots.decomposition(values, found, drawn.subplots(1, 2))
        plots.save_figure(drawn, png)
        console.print(f"wrote {png}")


def fit(
    file: str,
    /,
    *,
    tree: str | None = None,
    observed: float = 0.3,
    rank: int = 32,
    join: Literal["diagonal", "full"] = "diagonal",
    root: Literal["trained", "ones"] = "trained",
    steps: int = 5000,
    every: int = 25,
    lr: float = 1e-2,
    std: float = 0.1,
    optimizer: Literal["group-rmsprop", "sgd", "adam", "lbfgs"] = "group-rmsprop",
    missing: Literal["nan"] | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: Literal["float32", "float64"] = "float32",
    out: Path = Path("runs/fit"),
    progress: bool = True,
) -> None:
    """Complete a tensor from a part of its entries with a factorization along a tree.

    Writes a folder with config.json, model.safetensors, trajectory.npz and training.png; Ctrl-C
    ends the training and writes what was recorded.

    Args:
        file: A .npy, .npz, .safetensors or .pt file, or kinetic, il2, covid19, indian-pines.
        tree: Gallery name, JSON file or nested lists; a binary tree if left out.
        observed: Share of the known entries that is observed; the rest tests.
        rank: Size of every bond.
        join: Kind of join at every node.
        root: "ones" fixes the weight of a diagonal root (CP without weights).
        steps: Updates.
        every: Updates between observations.
        lr: Learning rate.
        std: Standard deviation of the initial weights.
        optimizer: group-rmsprop is that of the theory.
        missing: "nan": entries that are NaN were not measured.
        seed: Chooses the observed entries and the initial weights.
        device: Any torch device, e.g. cuda.
        dtype: Type of the weights.
        out: Folder of the run; one that tnreg wrote before is replaced, any other is refused.
        progress: Show a progress bar.
    """
    config = completion.Config(
        tensor=file,
        tree=tree,
        observed=observed,
        rank=rank,
        join=join,
        root=root,
        steps=steps,
        every=every,
        lr=lr,
        std=std,
        optimizer=optimizer,
        missing=missing,
        seed=seed,
        device=str(_device(device)),
        dtype=dtype,
    )
    summary = completion.run(config, out, progress=progress)
    table = Table("", "", title=f"{file} along {summary['tree']}", show_header=False)
    for key in summary:
        if key == "tree":
            continue
        value = summary[key]
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    console.print(f"wrote {out}")


def run(
    experiment: Any,
    *,
    out: Path | None = None,
    progress: bool = True,
) -> None:
    """Run an experiment of the paper, or the same on a tree and a target of your own.

    Writes a run folder; a run of dynamics, init-scale or locality that was killed or interrupted goes on when
    the same command is given. Several processes train locality together: torchrun --nproc-per-node 2 -m
    tnreg run locality.

    Args:
        experiment: What to run.
        out: Folder of the run, runs/MODEL-SEED or runs/EXPERIMENT if left out; one that tnreg wrote before
            is replaced, any other is refused.
        progress: Show a progress bar.
    """
    if started() > 1 and not isinstance(experiment, locality.Config):
        raise OptionError(f"torchrun started {started()} processes, which {_TOGETHER}.")
    _device(experiment.device)
    if isinstance(experiment, convac.Config):
        folder = out or Path("runs/convac")
        for table in _convac_tables(convac.run(experiment, folder, progress=progress)):
            console.print(table)
        console.print(f"wrote {folder}")
        return
    if isinstance(experiment, init_scale.Config):
        folder = out or Path("runs") / f"init-scale-{experiment.model}"
    elif isinstance(experiment, locality.Config):
        folder = out or Path("runs") / f"locality-{experiment.set}"
    else:
        folder = out or Path("runs") / f"{experiment.model}-{experiment.seed}"
    try:
        if isinstance(experiment, init_scale.Config):
            rows = init_scale.run(experiment, folder, progress=progress)
            table = Table(*rows[0], title=f"{experiment.model} from several initial scales")
            for row in rows:
                table.add_row(*(_short(value) for value in row.values()))
        elif isinstance(experiment, locality.Config):
            rows = locality.run(experiment, folder, progress=progress)
            title = f"{experiment.set}, {experiment.model}, {len(experiment.seeds)} seeds"
            table = _locality_table(locality.table(rows), title)
        else:
            table = _dynamics_table(dynamics.run(experiment, folder, progress=progress), experiment)
    except KeyboardInterrupt:
        if is_first():
            message = "tnreg: interrupted; the same command goes on where this one stopped"
            print(message, file=sys.stderr)
        raise SystemExit(130) from None
    if not is_first():
        return
    console.print(table)
    console.print(f"wrote {folder}")


def sweep(
    experiment: Any,
    *,
    out: Path | None = None,
    workers: int | None = None,
    threads: int = 1,
    scheduler: str | None = None,
    retries: int = 1,
    parquet: bool = False,
    progress: bool = True,
) -> None:
    """Run an experiment over lists of settings, on this machine's processors or on a Dask cluster.

    Every setting takes a list: plain,igc are two values, 0:5 the integers 0 to 4, 0:20:5 every fifth of 0 to
    19. Every combination is a run folder in the sweep's folder; what is there is not computed again, so the
    same command goes on with a sweep that was killed or interrupted, and tries again what failed.

    Args:
        experiment: What to run.
        out: Folder of the sweep, runs/sweep-EXPERIMENT if left out.
        workers: Processes here; as many as there are processors if left out; 0 computes in this one.
        threads: Threads of each process.
        scheduler: Address of a Dask cluster that is there, tcp://HOST:PORT, or its scheduler file, in place
            of processes here. Its workers write into the same folder, and are started with --nthreads 1.
        retries: How often a run that failed is tried again before it is reported.
        parquet: Write results.parquet beside results.csv.
        progress: Show a progress bar.
    """
    kind, cells = sweeps.cells(experiment)
    if scheduler is None:
        for device in dict.fromkeys(cell["device"] for cell in cells):
            _device(device)
    folder = out or Path("runs") / f"sweep-{kind.name}"
    try:
        found = sweep_experiment.run(
            kind.experiment, cells, folder, workers=workers, threads=threads, scheduler=scheduler,
            retries=retries, parquet=parquet, progress=progress,
        )  # fmt: skip
    except KeyboardInterrupt:
        message = "tnreg: interrupted; the same command goes on where this one stopped"
        print(message, file=sys.stderr)
        raise SystemExit(130) from None
    console.print(_sweep_table(found, kind.name))
    console.print(f"{len(found.rows)} runs, {len(found.computed)} of them now")
    console.print(f"wrote {folder}")
    if found.failed:
        print(f"tnreg: {len(found.failed)} of {len(cells)} runs failed:", file=sys.stderr)
        for one in found.failed:
            print(f"  {one.cell.name}: {one.error}", file=sys.stderr)
        print("  the same command tries them again", file=sys.stderr)
        raise SystemExit(1)


def _sweep_table(found: sweep_experiment.Result, name: str) -> Table:
    if found.fields == locality.EXPERIMENT.fields:
        return _locality_table(found.table, name)
    by = [field for field in found.fields if field != "seed"]
    out = Table(*by, title=name, title_justify="left")
    for head in ("seeds", found.headline):
        out.add_column(head, justify="right")
    for row in found.table:
        spread = "" if math.isnan(row["deviation"]) else f" ± {row['deviation']:.2g}"
        value = f"{row[found.headline]:.4g}{spread}"
        out.add_row(*(_short(row[field]) for field in by), str(row["seeds"]), value)
    return out


def _convac_tables(summary: dict[str, Any]) -> list[Table]:
    first = Table(
        "",
        title="digits, test accuracy: mean and standard deviation over seeds",
        title_justify="left",
    )
    for head in ("test", "train", "weights", "seconds", "equal in onnx"):
        first.add_column(head, justify="right")
    for name, (mean, spread) in summary["mean and spread"].items():
        rows = [row for row in summary["accuracy"] if row["model"] == name]
        equal = [row[key] for row in rows for key in row if key.startswith("equal")]
        first.add_row(
            name,
            f"{100 * mean:.1f} ± {100 * spread:.1f} %",
            f"{100 * sum(row['train'] for row in rows) / len(rows):.1f} %",
            str(rows[0]["weights"]),
            f"{sum(row['seconds'] for row in rows) / len(rows):.1f}",
            f"{100 * equal[0]:.0f} %" if equal else "",
        )
    second = Table("", "how", title="first seed, shrunk", title_justify="left")
    for head in ("asked", "error", "bound", "test", "weights", "largest bond"):
        second.add_column(head, justify="right")
    for row in summary["smaller"]:
        figures = [f"{row[key]:.3g}" for key in ("asked", "error", "bound")]
        figures += [f"{100 * row['test']:.1f} %", str(row["weights"]), str(row["largest bond"])]
        second.add_row(row["model"], row["how"], *figures)
    return [first, second]


def _locality_table(rows: list[dict[str, Any]], title: str) -> Table:
    out = Table("arm", title=f"{title}: test accuracy (%) of the last epoch", title_justify="left")
    for head in ("distance", "accuracy", "epochs", "seconds", "x plain", "an epoch"):
        out.add_column(head, justify="right")
    for row in rows:
        spread = "" if math.isnan(row["deviation"]) else f" ± {100 * row['deviation']:.1f}"
        figures = [f"{100 * row['test accuracy']:.1f}{spread}", f"{row['epochs']:.0f}"]
        figures += [f"{row['seconds']:.1f}"]
        figures += [
            "" if math.isnan(row[key]) else f"{row[key]:.2f}" for key in ("cost", "cost an epoch")
        ]
        out.add_row(row["arm"], str(row["distance"]), *figures)
    return out


def _dynamics_table(summary: dict[str, Any], config: dynamics.Config) -> Table:
    table = Table("", "", title=f"{config.model}, seed {config.seed}", show_header=False)
    for key, value in summary.items():
        if key == "components":
            value = "\n".join(f"{v}: {' '.join(f'{c:.3g}' for c in c)}" for v, c in value.items())
        elif key == "jumps":
            value = "\n".join(
                f"{v}: {', '.join(f'{a}-{b}' for a, b in sorted(c))}" for v, c in value.items()
            )
        elif isinstance(value, dict):
            value = ", ".join(f"{v}: {_short(c)}" for v, c in value.items())
        elif isinstance(value, list):
            value = " ".join(map(_short, value))
        table.add_row(key, _short(value))
    return table


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(
    runs: tuple[Path, ...],
    /,
    *,
    names: tuple[str, ...] = (),
    linear: bool = False,
    png: Path | None = None,
) -> None:
    """Draw what a run recorded; several runs of `dynamics` side by side.

    Args:
        runs: Run folders, or one trajectory .npz file. Without further options the pictures in the
            folder are drawn again.
        names: What to draw, one panel each.
        linear: Linear instead of logarithmic vertical axes.
        png: Where to write the picture; if left out the experiment's own pictures in its folder,
            training.png beside a trajectory, panels.png beside several runs.
    """
    if not runs:
        raise OptionError("plot: give a run folder.")
    first = runs[0]
    kind = experiment_of(first)
    if len(runs) > 1 or (kind == "dynamics" and png is not None and not names):
        target = png or first.parent / "panels.png"
        plots.save_figure(dynamics.panels(runs), target)
    elif kind == "init_scale":
        target = init_scale.figure(first, png)
    elif kind == "convac":
        target = convac.figure(first, png)
    elif kind == "locality":
        target = locality.figure(first, png)
    elif kind in ("sweep", sweeps.DYNAMICS.title):
        target = sweep_figure.figure(first, png)
    elif kind == "dynamics" and not names:
        target = dynamics.figure(first)
    else:
        file = first / "trajectory.npz" if first.is_dir() else first
        found = Trajectory.load(file)
        target = png or file.with_name("training.png")
        plots.save_figure(completion.draw(found, names or found.names, log=not linear), target)
        console.print(f"{found!r}")
    console.print(f"wrote {target}")


def export(
    model: Path,
    /,
    *,
    format: Literal["onnx", "pt2", "state"] = "onnx",
    out: Path | None = None,
    share: bool = False,
    classes: bool = False,
) -> None:
    """Write the convolutional network that a saved model is, for programs that do not know tnreg.

    Args:
        model: A .safetensors file: a factorization that tnreg saved, or a classifier of `run convac`.
        format: ONNX, a torch.export program, or plain weights as safetensors with layers in the metadata.
        out: The file; beside the model with the format's ending if left out.
        share: One convolution per layer, if the factorization's weights are equal at the nodes of a height.
        classes: The factorization's last mode are the outputs.
    """
    found: ConvNet | ConvAC
    if _is_classifier(model):
        found = ConvAC.load(model)
    else:
        found = to_cnn(load(model), share=share, classes=classes)
    endings = {"onnx": ".onnx", "pt2": ".pt2", "state": ".network.safetensors"}
    target = out or model.with_suffix(endings[format])
    writers: dict[str, Any] = {"onnx": export_onnx, "pt2": export_pt2, "state": export_state}
    print(found)
    with console.status(f"writing {format} ..."):
        writers[format](found, target)
    checked = "" if format == "state" else ", values checked on fresh inputs"
    console.print(f"wrote {target}{checked}")


def probe(
    models: tuple[str, ...],
    /,
    *,
    data: str,
    weights: Path | None = None,
    distances: tuple[int, ...] = (),
    size: int | None = None,
    samples: int = 8,
    pairs: int = 32,
    anywhere: bool = False,
    seed: int = 0,
    png: Path | None = None,
) -> None:
    """What trained networks tie together: interaction of two patches against the distance between them.

    Args:
        models: Run folders of single trainings of locality, .pt2 files of torch.export, .safetensors models
            of tnreg; or the name or import path of one network, then with weights.
        data: An image set of tnreg.images (.npz), a file with images (N, C, H, W), or digits:24 for pairs of
            digits that far apart.
        weights: State dict of the network, .safetensors or .pt.
        distances: Pixels between the patches; nine up to the largest if left out.
        size: Side of the patches in pixels; an eighth of the image's shorter side if left out.
        samples: Images whose patches are crossed.
        pairs: Pairs of patches for each distance.
        anywhere: Patches anywhere, not where images differ.
        seed: Draws patches and images; the same for all models.
        png: Draw all models into this file.
    """
    if not models or (weights is not None and len(models) > 1):
        raise OptionError("probe: name one model or more; with --weights exactly one.")
    pictures = images_of(data)
    found = {}
    for name in models:
        net = network_of(name, pictures.shape[1], weights=weights)
        try:
            with console.status(f"probing {name} ..."):
                found[name] = locality_profile(
                    net, pictures, distances=distances or None, size=size, samples=samples, pairs=pairs,
                    where="anywhere" if anywhere else "differing", seed=seed,
                )  # fmt: skip
        except (RuntimeError, AssertionError) as error:
            raise OptionError(
                f"{name} does not take images of shape {tuple(pictures.shape[1:])}.\n"
                f"  {str(error).splitlines()[0]}"
            ) from None
        print(f"{name}, patches of {found[name].size}x{found[name].size} pixels")
        print(found[name])
    if png is not None:
        plots.save_figure(plots.locality_profile(found, _figure()).figure, png)
        console.print(f"wrote {png}")


def _is_classifier(file: Path) -> bool:
    try:
        ConvAC.load(file)
    except TnregError:
        return False
    return True


def demo(
    *,
    out: Path = Path("runs/demo"),
    device: str = "cpu",
    seed: int = 1,
    steps: int | None = None,
    progress: bool = True,
) -> None:
    """Complete a real tensor along a tree, end to end, and write a report.

    Args:
        out: Folder for pictures, trajectory, model and report.html.
        device: Any torch device, e.g. cuda.
        seed: Chooses the observed entries and the initial weights.
        steps: Fewer updates than the demo's own, to try it out.
        progress: Show progress bars.
    """
    config = demo_experiment.Config(device=str(_device(device)), seed=seed)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    demo_experiment.run(config, out, console=console, progress=progress)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``tnreg`` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Any] = {
        "demo": demo, "tree": tree, "rank": rank, "decompose": decompose, "fit": fit,
        "run": _run_with_defaults(given), "sweep": _sweep_with_defaults(given), "export": export,
        "probe": probe, "plot": plot,
    }  # fmt: skip
    try:
        if given and given[0] != "run" and started() > 1:
            raise OptionError(f"torchrun started {started()} processes, which {_TOGETHER}.")
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="tnreg",
            description="Tensor factorizations over mode trees: draw them, rank tensors, complete tensors.",
            args=given,
            config=(
                tyro.conf.OmitArgPrefixes,
                tyro.conf.OmitSubcommandPrefixes,
                tyro.conf.CascadeSubcommandArgs,
            ),
        )
    except TnregError as error:
        # all processes have the same error, but for the loss of one, which the first may be
        if isinstance(error, ProcessLost) or is_first():
            print(f"tnreg: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("tnreg: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _run_with_defaults(given: Sequence[str]) -> Any:
    """The command ``run``; the preset that ``--model`` or ``--set`` names gives all other defaults."""
    preset = dynamics.MODELS.get(_named(given, "--model"), dynamics.htf)
    far = locality.SETS.get(_named(given, "--set"), locality.SETS["digits"])
    about = tyro.conf.subcommand("dynamics", default=preset, description="One training, watched.")
    sweep = tyro.conf.subcommand("init-scale", description="Trainings from several initial scales.")
    digits = tyro.conf.subcommand(
        "convac", description="Digits by networks of three trees, then shrunk."
    )
    seeing = tyro.conf.subcommand(
        "locality", default=far, description="Regularizers that make networks see far."
    )
    kinds = (
        Annotated[dynamics.Config, about]
        | Annotated[init_scale.Config, sweep]
        | Annotated[convac.Config, digits]
        | Annotated[locality.Config, seeing]
    )
    return _taking(run, kinds)


def _sweep_with_defaults(given: Sequence[str]) -> Any:
    """The command ``sweep``; default lists are those of the preset, as for ``run``."""
    kinds: Any = None
    for kind in sweeps.KINDS.values():
        option = "--model" if kind.cell is dynamics.Config else "--set"
        made: Any = sweeps.options(kind)
        start = made(**sweeps.preset(kind, _named(given, option).split(",")[0]))
        about = tyro.conf.subcommand(kind.name, default=start, description=kind.about)
        one: Any = Annotated[made, about]
        kinds = one if kinds is None else kinds | one
    return _taking(sweep, kinds)


def _named(given: Sequence[str], option: str) -> str:
    """The last word that the command line gives for an option; empty if there is none."""
    words = [given[i + 1] for i, word in enumerate(given[:-1]) if word == option]
    words += [word.removeprefix(f"{option}=") for word in given if word.startswith(f"{option}=")]
    return words[-1] if words else ""


def _taking(command: Any, kinds: Any) -> Any:
    """A copy of a command whose experiment is one of ``kinds``."""
    code, around = command.__code__, command.__globals__
    copy = types.FunctionType(code, around, command.__name__, None, command.__closure__)
    copy.__kwdefaults__, copy.__doc__ = command.__kwdefaults__, command.__doc__
    copy.__annotations__ = {**command.__annotations__, "experiment": kinds}
    return copy


def _tree_about(source: str) -> dict[str, Any]:
    return {} if source.lstrip().startswith("[") else read_tree_file(source)


def _rank_subject(
    file: str, tree: str | None, missing: str | None, device: torch.device
) -> tuple[Any, Any, str]:
    if file.endswith(".safetensors") and Path(file).is_file() and _is_model(file):
        model = load(file, device=device)
        if tree is None:
            return model, None, Path(file).stem
        return model.to_tensor().detach(), read_tree(tree), Path(file).stem
    if is_large_file(file):
        if missing is not None:
            raise OptionError(f"--missing is for tensors in memory; {file} is read block by block.")
        array = open_tensor(file)
        return array, ModeTree.binary(array.ndim) if tree is None else read_tree(tree), file
    found: DenseTensor = load_tensor(file)
    values = found.values.to(device)
    if missing == "nan":
        known = values[~torch.isnan(values)]
        values = torch.where(torch.isnan(values), known.mean(), values)
    elif found.missing:
        raise OptionError(
            f"{file} has {found.missing} missing entries (NaN); ranks need all of them.\n"
            "  --missing nan sets them to the mean of the others; or complete it first: tnreg fit"
        )
    along = ModeTree.binary(values.ndim) if tree is None else read_tree(tree)
    return values, along, found.name


@contextlib.contextmanager
def _telling(text: str) -> Iterator[None]:
    """A status line that names the passes over a tensor on disk as they begin."""

    class Line(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.update(record.getMessage())

    logger, line = logging.getLogger("tnreg.blocks"), Line()
    level = logger.level
    with console.status(text) as shown:
        logger.addHandler(line)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(line)
            logger.setLevel(level)


def _is_model(file: str) -> bool:
    try:
        load(file)
    except TnregError:
        return False
    return True


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"cannot use the device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def _figure() -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(7, 4.5), layout="constrained").subplots()


if __name__ == "__main__":
    main()
