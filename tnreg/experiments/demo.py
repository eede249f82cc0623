"""Two measured tensors: one completed along a tree, one learned component by component.

The kinetic tensor of fluorescence (64 measurements x 12 emission x 10 excitation wavelengths x 60 times) is
completed from some of its entries by ``complete``, which finds the ranks, beside CP and Tucker of tensorly.
Then a factorization of the IL-2 responses along the tree {ligand, dose} | {time, cell} is trained by
gradients from near zero, the case of the theory: components come one after another, and the rank stays low.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from tnreg import plots
from tnreg.cnns.convnet import to_cnn
from tnreg.cnns.export import export_onnx
from tnreg.errors import OptionError
from tnreg.experiments import completion, report
from tnreg.experiments.complete import slices
from tnreg.experiments.completion import in_units, new_model, scaled_task, train
from tnreg.experiments.folder import RUN_FILES, plain_config, write_run
from tnreg.machine.files import folder_written_whole
from tnreg.machine.progress import plain_text, printable, working
from tnreg.ranks.spectra import hierarchical_rank
from tnreg.recovery.complete import Completed, complete
from tnreg.recovery.holdout import interval
from tnreg.tensors.arrays import seeded
from tnreg.tensors.loading import load_tensor
from tnreg.training.tasks import Completion, relative_error, root_mean_square
from tnreg.training.tasks import completion as completion_of
from tnreg.training.trajectory import Trajectory
from tnreg.trees.tree import load_tree

if TYPE_CHECKING:
    from rich.console import Console

_PICTURES = {
    "demo.png": "The tree and the ranks found; errors on unseen entries with intervals; components emerging.",
    "slices.png": "Slices of the completed tensor: what was observed, and the completion.",
    "training.png": "Loss and error on unseen entries while the second tensor was learned.",
    "network.png": "Its tree, and the convolutional network that the learned factorization is along it.",
}

_MEAN = "mean of the observed"
_BETTER, _PATIENCE = 0.99, 2  # of tensorly's held-out errors, and how many larger ranks may fail
_ROUND = 100  # iterations between two of them


@dataclass(frozen=True, kw_only=True)
class Config(completion.Config):
    """Settings of the demo; chosen on seeds 100 to 102, so that the default seed is a fresh one.

    Attributes:
        completed: Name or file of the tensor to complete.
        along: Tree to complete it along.
        share: Share of its known entries that is observed.
        peers: Whether tensorly completes it as well.
        rtol: Threshold of the numerical ranks of what was learned.
    """

    completed: str = "kinetic"
    along: str = "kinetic-4"
    share: float = 0.02
    peers: bool = True
    tree: str = "il2-4"
    rank: int = 64
    steps: int = 8000
    missing: Literal["nan"] | None = "nan"
    seed: int = 1
    rtol: float = 1e-2


tiny = Config(completed="il2", along="il2-4", share=0.2, peers=False, rank=4, steps=40, every=10, std=0.3)


def run(
    config: Config, folder: str | Path, *, console: Console | None = None, progress: bool = False
) -> dict[str, Any]:
    """Run the demo into ``folder``: pictures, trajectories, models, config.json and report.html.

    Returns:
        What ``config.json`` holds under ``summary``.
    """
    show: Any = console.print if console is not None else lambda *_, **__: None
    start, config = time.perf_counter(), plain_config(config)
    files = (*RUN_FILES, *_PICTURES, "completed.safetensors", "history.npz", "network.onnx", "report.html")
    with folder_written_whole(folder, "demo", files) as beside:
        tensor = load_tensor(config.completed)
        show(f"{printable(config.completed)}: {printable(tensor.source)}", markup=False)
        task = completion_of(tensor.values.double(), config.share, seed=config.seed, missing="nan")
        show(f"{task!r}; completing it ...", markup=False)
        found = complete(
            task.to(config.device), load_tree(config.along), join="full", adapt="ranks",
            seed=config.seed, progress=progress,
        )  # fmt: skip
        dense = {_MEAN: task.values.mean().expand(task.sizes)}
        with working("completing by tensorly ...", progress):
            dense |= {
                f"{name}, tensorly": by_tensorly(name, found) for name in ("CP", "Tucker") * config.peers
            }
        dense["tnreg"] = found.model.to_tensor().detach().cpu()
        errors = {name: judge(x, task) for name, x in dense.items()}
        found.model.save(beside / "completed.safetensors")
        found.history.save(beside / "history.npz")
        text = found.tree.text(label=partial(_of_node, found, tensor.modes))
        show(text, markup=False)
        rows = [(name, f"{e:.4f}", f"{low:.4f} to {high:.4f}") for name, (e, low, high) in errors.items()]
        title = "relative error on unseen entries"
        show(_table(title, ("", "error", "95 % interval"), rows))

        second = load_tensor(config.tensor)
        show(f"{printable(config.tensor)}: {printable(second.source)}", markup=False)
        tree = load_tree(config.tree)
        below = {v: ", ".join(second.modes[m] for m in tree.modes_below(v)) for v in tree.nodes}
        show(f"training from N(0, {config.std:g}²) along its tree, one step size for all weights ...")
        small, scale = scaled_task(second, config)
        model = new_model(tree, small, config)
        recorded = train(model, small, config, progress)
        ranks = hierarchical_rank(model, rtol=config.rtol)
        rows = [(str(v), below[v], f"{ranks[v]} of {config.rank}") for v in tree.nodes[:-1]]
        show(_table("learned tensor", ("node", "modes below", f"rank (rtol {config.rtol:g})"), rows))
        net = to_cnn(final := in_units(model, scale))
        show("the learned factorization as a convolutional network, layer by layer:")
        show(_side_by_side(tree.text(), repr(net)), markup=False, soft_wrap=True)
        with working("exporting ...", progress):
            exported = "exported as network.onnx; onnxruntime gives the same values on fresh inputs"
            try:
                export_onnx(net, beside / "network.onnx")
            except OptionError as error:  # the extra is missing
                exported = f"not exported: {error}"
        show(exported, markup=False)
        summary = {
            "error on unseen entries": errors,
            "held-out error": found.error,
            "held-out interval": found.interval,
            "tree": repr(found.tree),
            "ranks": {str(v): rank for v, rank in found.ranks.items()},
            "numbers": sum(p.numel() for p in found.model.parameters()),
            "second tensor": {
                "test error": small.test_error(model),
                "test error of the mean": completion.mean_error(small),
                "ranks": {str(v): rank for v, rank in ranks.items()},
                "stopped by": recorded.stop_reason,
                "scale": scale,
            },
            "seconds": time.perf_counter() - start,
        }
        write_run(beside, "demo", config, recorded, final, summary)
        with working("drawing ...", progress):
            drawn, axes = _figure((13, 3.8), 3, width_ratios=[1, 1, 1.2])
            plots.tree(found.tree, axes[0], labels=_labels(tensor.modes), edges=found.ranks)
            axes[0].set_title("tree, and the ranks found")
            bars = {name: values for name, values in errors.items() if name != _MEAN}
            halves = [(high - low) / 2 for _, low, high in bars.values()]
            plots.bars({name: error for name, (error, *_) in bars.items()}, axes[1], errors=halves)
            axes[1].set_title(f"unseen entries ({1 - config.share:.0%} of the known)")
            plots.components(recorded, axes[2], top=6)
            axes[2].set_title(f"{config.tensor}: components at the root, one after another")
            plots.save_figure(drawn, beside / "demo.png")
            plots.save_figure(slices(found, task, tensor.modes), beside / "slices.png")
            figure(beside)
            drawn, (left, right) = _figure((12, 4), 2, width_ratios=[1, 1.6])
            plots.tree(tree, left, labels=_labels(second.modes))
            plots.network(net, right)
            plots.save_figure(drawn, beside / "network.png")
            page = report.page(
                "Measured tensors: one completed, one learned from near zero",
                report.text(f"{tensor.source}. Observed: {config.share:.0%} of the known entries."),
                report.text(text, "pre"),
                report.text("Relative error on unseen entries", "h2"),
                report.table(
                    {name: f"{e:.4f}, {low:.4f} to {high:.4f}" for name, (e, low, high) in errors.items()}
                ),
                *(report.picture(beside / name, caption) for name, caption in _PICTURES.items()),
                report.text("Settings", "h2"),
                report.text(", ".join(f"{k} = {v}" for k, v in vars(config).items())),
                report.text(f"{summary['seconds']:.0f} seconds"),
            )
            (beside / "report.html").write_text(page, encoding="utf-8")
    show(f"wrote {folder}: {', '.join(sorted(files))}", markup=False)
    show(f"{time.perf_counter() - start:.0f} seconds")
    return summary


def figure(folder: str | Path, png: str | Path | None = None) -> Path:
    """Draw the training of a demo folder (again), into ``training.png`` there or another file."""
    path = Path(folder)
    recorded = Trajectory.load(path / "trajectory.npz")
    return plots.save_figure(completion.draw(recorded, ("loss", "test error")), png or path / "training.png")


def judge(x: Tensor, task: Completion) -> tuple[float, float, float]:
    """Return the error of a dense tensor on the unseen entries, and between what its 95 % interval lies."""
    assert task.test_index is not None and task.test_values is not None
    unseen = x[tuple(task.test_index.T)]
    return relative_error(unseen, task.test_values), *interval(unseen, task.test_values, seeded(0, "seed"))


def by_tensorly(name: str, found: Completed) -> Tensor:
    """Complete by ``"CP"`` or ``"Tucker"`` of tensorly, masked alternating least squares.

    Rank, equal for all modes, and iterations are those of the least error on the entries that ``complete``
    held out; both stop growing where that error falls no more by one percent, as there. At the end all
    observed entries are fitted.
    """
    from tensorly import cp_to_tensor, tucker_to_tensor
    from tensorly.decomposition import parafac, tucker

    known, held = found.known.to("cpu"), found.held.to("cpu")
    assert isinstance(known, Completion) and isinstance(held, Completion)
    fit, rebuild = {"CP": (parafac, cp_to_tensor), "Tucker": (tucker, tucker_to_tensor)}[name]
    unit = root_mean_square(known.values)
    x, mask = np.zeros(known.sizes), np.zeros(known.sizes)
    at, at_held = (tuple(part.index.T.numpy()) for part in (known, held))
    x[at], mask[at] = known.values.numpy() / unit, 1
    train = mask.copy()
    train[at_held] = 0

    def rounds(mask: Any, rank: int) -> Iterator[Tensor]:
        state: Any = "random"
        asked: Any = rank if name == "CP" else [min(rank, size) for size in known.sizes]
        while True:
            state = fit(x, asked, n_iter_max=_ROUND, init=state, mask=mask, tol=0, random_state=0)
            yield unit * torch.from_numpy(rebuild(state))

    best, rank = (math.inf, 0, 0), 0
    while rank < best[1] + _PATIENCE:
        rank, errors = rank + 1, list[float]()
        for dense in rounds(train, rank):
            errors.append(relative_error(dense[at_held], held.values))
            if len(errors) > 1 and not errors[-1] < _BETTER * errors[-2]:
                break
        if min(errors) < _BETTER * best[0]:
            best = (min(errors), rank, errors.index(min(errors)))
    return next(itertools.islice(rounds(mask, best[1]), best[2], None))


def _labels(modes: Sequence[str]) -> dict[Any, str]:
    return {mode: f"{mode} {name}" for mode, name in enumerate(modes)}


def _of_node(found: Completed, modes: Sequence[str], node: Any) -> str:
    below = ", ".join(modes[mode] for mode in found.tree.modes_below(node))
    return f"{below}: rank {found.ranks[node]}" if node in found.ranks else below


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table

    table = Table(*heads, title=plain_text(title), title_justify="left")
    for row in rows:
        table.add_row(*map(plain_text, row))
    return table


def _figure(size: tuple[float, float], columns: int, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained")
    return drawn, drawn.subplots(1, columns, **options)


def _side_by_side(left: str, right: str) -> str:
    """Return two texts beside each other."""
    lines = list(itertools.zip_longest(left.splitlines(), right.splitlines(), fillvalue=""))
    width = max(len(line) for line, _ in lines) + 3
    return "\n".join(f"{one:{width}s}{other}".rstrip() for one, other in lines)
