"""The main job on a real tensor: draw the tree, read its ranks, complete it, see components emerge.

The IL-2 response tensor (13 ligands x 4 times x 12 doses x 8 cells) is completed from a part of its
entries along the tree {ligand, dose} | {time, cell}, starting near zero, and compared on the unseen
entries with two baselines: the mean of the observed entries, and CP with as many weights, trained in
the same way.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tnreg import plots
from tnreg.cnns.convnet import to_cnn
from tnreg.cnns.export import export_onnx
from tnreg.errors import OptionError
from tnreg.experiments import completion, report
from tnreg.experiments.completion import in_units, mean_error, new_model, scaled_task, train
from tnreg.experiments.folder import RUN_FILES, plain_config, write_run
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.files import folder_written_whole
from tnreg.machine.progress import plain_text, printable, working
from tnreg.ranks.dense import effective_rank
from tnreg.ranks.spectra import hierarchical_rank, spectra
from tnreg.tensors.loading import load_tensor
from tnreg.training.tasks import Completion
from tnreg.training.trajectory import Trajectory
from tnreg.trees.drawing import plain_label
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree, load_tree

if TYPE_CHECKING:
    from rich.console import Console

_PICTURES = {
    "demo.png": "The tree, its components emerging one after another, and the error on unseen entries.",
    "spectra.png": "Singular values at the nodes of the tree: the measured tensor and the learned one.",
    "slices.png": "Four slices of the tensor: what was observed, what was learned, what was measured.",
    "training.png": "Loss and test error along the training, and those of the CP baseline.",
    "network.png": "The tree, and the convolutional network that the learned factorization is along it.",
}


@dataclass(frozen=True, kw_only=True)
class Config(completion.Config):
    """Settings of the demo; chosen on seeds 100 to 102, so that the default seed is a fresh one.

    Attributes:
        rtol: Threshold of the numerical ranks that are printed.
    """

    tree: str = "il2-4"
    rank: int = 64
    steps: int = 8000
    missing: Literal["nan"] | None = "nan"
    seed: int = 1
    rtol: float = 1e-2


tiny = Config(rank=4, steps=40, every=10, std=0.3)


def run(
    config: Config, folder: str | Path, *, console: Console | None = None, progress: bool = False
) -> dict[str, Any]:
    """Run the demo into ``folder``: pictures, trajectories, model, config.json and report.html.

    Returns:
        What ``config.json`` holds under ``summary``.
    """
    show: Any = console.print if console is not None else lambda *_, **__: None
    start, config = time.perf_counter(), plain_config(config)
    tensor, tree = load_tensor(config.tensor), load_tree(config.tree)
    modes = dict(enumerate(tensor.modes))
    below = {v: ", ".join(modes[m] for m in tree.modes_below(v)) for v in tree.nodes}
    labels: dict[Any, str] = {mode: f"{mode} {name}" for mode, name in modes.items()}
    show(f"{printable(config.tensor)}: {printable(tensor.source)}", markup=False)
    show(tree.text(label=lambda v: labels.get(v) or f"{{{below[v]}}}"), markup=False)
    filled = torch.where(torch.isnan(tensor.values), tensor.values.nanmean(), tensor.values)
    measured = spectra(filled, tree)

    def show_ranks(title: str, values: dict[Node, torch.Tensor], x: Any) -> dict[Node, int]:
        ranks = hierarchical_rank(x, tree, rtol=config.rtol)
        rows = [
            (str(v), below[v], str(ranks[v]), str(len(s)), f"{float(effective_rank(s)):.2f}")
            for v, s in values.items()
        ]
        numbers = (f"rank (rtol {config.rtol:g})", "of", "effective rank")
        show(_table(title, ("node", "modes below"), numbers, rows))
        return ranks

    title = f"measured tensor ({tensor.missing} missing entries set to the mean)"
    show_ranks(title, measured, filled)

    files = (*RUN_FILES, *_PICTURES, "trajectory-cp.npz", "network.onnx", "report.html")
    with folder_written_whole(folder, "demo", files) as beside:
        task, scale = scaled_task(tensor, config)
        show(f"{task!r}; training from N(0, {config.std:g}²) ...", markup=False)
        model = new_model(tree, task, config)
        recorded = train(model, task, config, progress, spectra=_largest_values)
        count = _size(model) // sum(task.sizes)
        show(f"baseline: CP of {count} components, as many weights, trained in the same way ...")
        cp = dataclasses.replace(config, rank=count, root="ones")
        baseline = new_model(ModeTree.star(tree.order), task, cp)
        recorded_cp = train(baseline, task, cp, progress, spectra=_largest_values)
        with torch.no_grad():
            learned = spectra(model)
        errors = {
            "mean of the observed": mean_error(task),
            "CP, equal weights": task.test_error(baseline),
            "tnreg, this tree": task.test_error(model),
        }
        ranks = show_ranks("learned tensor", learned, model)
        rows = [
            (name, f"{error:.4f}", str(count))
            for (name, error), count in zip(errors.items(), (1, _size(baseline), _size(model)), strict=True)
        ]
        title = "error on unseen entries, ‖W - W*‖ / ‖W*‖"
        show(_table(title, ("",), ("error", "weights"), rows))
        summary = {
            "test error": errors,
            "weights": {"tnreg": _size(model), "CP": _size(baseline)},
            "ranks": {str(v): r for v, r in ranks.items()},
            "stopped by": recorded.stop_reason,
            "scale": scale,
            "seconds": time.perf_counter() - start,
        }
        final = in_units(model, scale)
        write_run(beside, "demo", config, recorded, final, summary)
        recorded_cp.save(beside / "trajectory-cp.npz")
        net = to_cnn(final)
        show("the learned factorization as a convolutional network, layer by layer:")
        show(_side_by_side(tree.text(), repr(net)), markup=False, soft_wrap=True)
        with working("exporting ...", progress):
            exported = "exported as network.onnx; onnxruntime gives the same values on fresh inputs"
            try:
                export_onnx(net, beside / "network.onnx")
            except OptionError as error:  # the extra is missing
                exported = f"not exported: {error}"
        show(exported, markup=False)
        with working("drawing ...", progress):
            drawn, axes = _figure((13, 3.8), 3, width_ratios=[1, 1.3, 1])
            plots.tree(tree, axes[0], labels=labels, edges=ranks)
            axes[0].set_title("tree, learned ranks on its edges")
            plots.components(recorded, axes[1], top=6)
            axes[1].set_title("local components at the root, one after another")
            plots.bars(errors, axes[2])
            axes[2].set_title(f"unseen entries ({1 - config.observed:.0%} of the known)")
            plots.save_figure(drawn, beside / "demo.png")
            drawn, axes = _figure((10, 4), 2, sharey=True)
            for ax, title, s in zip(axes, ("measured", "learned"), (measured, learned), strict=True):
                plots.spectra(s, ax, floor=1e-5)
                ax.set_title(f"{title}: singular values per node")
            plots.save_figure(drawn, beside / "spectra.png")
            plots.save_figure(
                _slices_figure(model, task, modes, _categories(config.tensor, task.sizes)),
                beside / "slices.png",
            )
            figure(beside)
            drawn, (left, right) = _figure((12, 4), 2, width_ratios=[1, 1.6])
            plots.tree(tree, left, labels=labels)
            plots.network(net, right)
            plots.save_figure(drawn, beside / "network.png")
            page = _report(beside, config, tensor.source, tree, summary)
            (beside / "report.html").write_text(page, encoding="utf-8")
    show(
        f"wrote {folder}: report.html, {', '.join(_PICTURES)}, trajectory.npz, trajectory-cp.npz, "
        "model.safetensors, network.onnx, config.json",
        markup=False,
    )
    show(f"{time.perf_counter() - start:.0f} seconds")
    return summary


def figure(folder: str | Path, png: str | Path | None = None) -> Path:
    """Draw the training of a demo folder (again), into ``training.png`` there or another file."""
    path = Path(folder)
    recorded, recorded_cp = (Trajectory.load(path / name) for name in ("trajectory.npz", "trajectory-cp.npz"))
    drawn, axes = _figure((10, 3.6), 2)
    for ax, name in zip(axes, ("loss", "test error"), strict=True):
        ax.semilogy(recorded.steps, recorded[name], label="tnreg")
        ax.semilogy(recorded_cp.steps, recorded_cp[name], label="CP, equal weights", ls="--")
        ax.set_xlabel("step")
        ax.set_title(name)
        ax.legend()
    return plots.save_figure(drawn, png or path / "training.png")


def _table(title: str, texts: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """Return a table with columns of text, then columns of numbers."""
    from rich.table import Table

    table = Table(*texts, title=plain_text(title), title_justify="left")
    for head in numbers:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*map(plain_text, row))
    return table


def _figure(size: tuple[float, float], columns: int, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained")
    return drawn, drawn.subplots(rows, columns, **options)


def _largest_values(model: Factorization) -> dict[Node, torch.Tensor]:
    return {node: values[:8] for node, values in spectra(model).items()}


def _categories(tensor: str, sizes: Sequence[int]) -> list[list[str]]:
    """Return what the places along every mode are called, their numbers where nobody says."""
    if tensor != "il2":
        return [list(map(str, range(size))) for size in sizes]
    from tensorly.datasets import load_IL2data

    return [[x if isinstance(x, str) else f"{x:.2g}" for x in ticks] for ticks in load_IL2data().ticks]


def _slices_figure(
    model: Factorization, task: Completion, modes: dict[int, str], names: Sequence[Sequence[str]]
) -> Any:
    with torch.no_grad():
        learned = model.to_tensor().cpu()
    observed = torch.full(task.sizes, math.nan)
    observed[tuple(task.index.cpu().T)] = task.values.cpu()
    measured = observed.clone()
    if task.test_index is not None and task.test_values is not None:
        measured[tuple(task.test_index.cpu().T)] = task.test_values.cpu()
    # the two longest modes as a picture, four places of the next one, the last of all others
    longest = sorted(range(len(task.sizes)), key=lambda n: -task.sizes[n])
    (down, right), across = sorted(longest[:2]), longest[2] if len(longest) > 2 else None
    places = [0] if across is None else sorted({task.sizes[across] * k // 4 for k in range(4)})
    drawn, axes = _figure((11, 6.5), len(places), 3, sharex=True, sharey=True, squeeze=False)
    limit = float(torch.nan_to_num(measured).abs().max())
    tensors = {"observed": observed, "learned": learned, "measured": measured}
    for row, (name, values) in zip(axes, tensors.items(), strict=True):
        for ax, place in zip(row, places, strict=True):
            at: list[Any] = [size - 1 for size in task.sizes]
            at[down] = at[right] = slice(None)
            if across is not None:
                at[across] = place
            image = ax.imshow(values[tuple(at)].numpy(), vmin=0, vmax=limit, aspect="auto", cmap="viridis")
            if name != "learned":  # grey where nobody measured, white where it was kept for testing
                never = torch.where(torch.isnan(measured[tuple(at)]), 0.6, math.nan)
                ax.imshow(never.numpy(), vmin=0, vmax=1, aspect="auto", cmap="gray")
            slices = (f"{modes[n]} {names[n][k]}" for n, k in enumerate(at) if isinstance(k, int))
            ax.set_title(plain_label(", ".join([name, *slices])), fontsize=8)
            if max(task.sizes[down], task.sizes[right]) <= 20:
                ax.set_xticks(range(task.sizes[right]), names[right], rotation=90, fontsize=7)
                ax.set_yticks(range(task.sizes[down]), names[down], fontsize=7)
        row[0].set_ylabel(modes[down])
    for ax in axes[-1]:
        ax.set_xlabel(modes[right])
    drawn.colorbar(image, ax=axes, shrink=0.6)
    drawn.suptitle("white: not observed; grey: never measured", fontsize=9)
    return drawn


def _side_by_side(left: str, right: str) -> str:
    """Return two texts beside each other."""
    lines = list(itertools.zip_longest(left.splitlines(), right.splitlines(), fillvalue=""))
    width = max(len(line) for line, _ in lines) + 3
    return "\n".join(f"{one:{width}s}{other}".rstrip() for one, other in lines)


def _report(folder: Path, config: Config, source: str, tree: ModeTree, summary: dict[str, Any]) -> str:
    """Return the page, with the pictures of the folder inside."""
    settings = ", ".join(f"{k} = {v}" for k, v in vars(config).items())
    known = f"{config.observed:.0%} of the known entries; started near zero"
    return report.page(
        "A real tensor, completed along a tree",
        report.text(f"{source}. Observed: {known}."),
        report.text(tree.text(), "pre"),
        report.text("Error on unseen entries, ‖W − W*‖ / ‖W*‖", "h2"),
        report.table({name: f"{error:.4f}" for name, error in summary["test error"].items()}),
        report.text(f"Hierarchical rank of the learned tensor at each node (rtol {config.rtol:g})", "h2"),
        report.table(summary["ranks"]),
        *(report.picture(folder / name, caption) for name, caption in _PICTURES.items()),
        report.text("Settings", "h2"),
        report.text(f"{settings}; {summary['seconds']:.0f} seconds."),
    )


def _size(model: Factorization) -> int:
    return sum(p.numel() for p in model.parameters())
