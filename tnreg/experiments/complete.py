"""Complete a tensor from all that is known of it, with ranks and a tree found, into a run folder.

A run folder holds ``config.json`` (settings, versions, results), ``model.safetensors``,
``trajectory.npz``, pictures, ``report.html`` with all of them on one page, and the completed tensor: known
entries as they are, the model's in the gaps. That is ``completed.npy``, or for a table one in its format
with a row for every entry. It is left out where it would be too large. The folder appears as a whole when
the run ends.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tnreg import plots
from tnreg.errors import SizeError
from tnreg.experiments import report
from tnreg.experiments.completion import draw
from tnreg.experiments.folder import RUN_FILES, plain_config, write_run
from tnreg.machine.files import folder_written_whole
from tnreg.recovery.complete import Completed, complete
from tnreg.recovery.growth import count_numbers
from tnreg.recovery.holdout import row_keys
from tnreg.tensors.loading import load_entries
from tnreg.tensors.tables import Entries
from tnreg.training.tasks import Completion
from tnreg.trees.drawing import plain_label
from tnreg.trees.tree import read_tree

_PICTURES = {
    "found.png": "The tree with its ranks, and held-out entries: predicted against measured.",
    "slices.png": "The slices with most known entries: what is known (white: nothing), and completed.",
    "training.png": "Errors round by round, as ranks grew and were cut.",
}
_COMPLETED = ("completed.npy", "completed.csv", "completed.parquet")
_MOST_ROWS = 10_000_000  # of a table
_LONGEST = 400  # places along a side of a slice, at most


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one completion; the options of ``tnreg complete``.

    Attributes:
        tree: Gallery name, JSON file or nested lists to begin with; found from the data if left out.
        join: auto takes what predicts held-out entries better.
        ranks: Size of every bond, fixed; found from the data if left out.
        holdout: Share of the known entries that is held out to choose ranks and tree and to tell the error.
        max_numbers: Most numbers that the model may have.
        seed: Chooses the held-out entries.
        device: Any torch device, e.g. cuda.
    """

    tree: str | None = None
    join: Literal["auto", "full", "diagonal"] = "auto"
    ranks: int | None = None
    holdout: float = 0.1
    max_numbers: int | None = None
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of one completion.

    Attributes:
        tensor: Name or file, for ``tnreg.load_tensor``.
    """

    tensor: str = "il2"


tiny = Config(tree="il2-4", ranks=1, holdout=0.2)


def run(config: Config, folder: str | Path, *, progress: bool = False) -> dict[str, Any]:
    """Complete, write the folder, and return its summary."""
    config, start = plain_config(config), time.perf_counter()
    entries = load_entries(config.tensor)
    tree = None if config.tree is None else read_tree(config.tree)
    on_device = {name: getattr(entries, name).to(config.device) for name in ("index", "values")}
    with folder_written_whole(
        folder, "complete", (*RUN_FILES, *_PICTURES, *_COMPLETED, "report.html")
    ) as beside:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "complete: ")  # they are in the summary
            found = complete(
                dataclasses.replace(entries, **on_device), tree, join=config.join, ranks=config.ranks,
                holdout=config.holdout, max_numbers=config.max_numbers, seed=config.seed, progress=progress,
            )  # fmt: skip
        try:
            completed = _write_completed(found, entries, Path(config.tensor.partition(":")[0]).suffix, beside)
        except SizeError as error:
            completed = f"not written: {error}"
        summary = {
            "sizes": found.model.sizes,
            "known entries": len(found.known.values),
            "of them held out": len(found.held.values),
            "entries": math.prod(found.model.sizes),
            "tree": repr(found.tree),
            "joins": " and ".join(sorted(set(found.model.network.named_joins.values()))),
            "ranks": {str(node): rank for node, rank in found.ranks.items()},
            "numbers": count_numbers(found.model),
            "held-out error": found.error,
            "95 % interval": list(found.interval),
            "held-out error of the mean": found.mean_error,
            "warnings": list(found.notes),
            "completed tensor": completed,
            "seconds": time.perf_counter() - start,
        }
        write_run(beside, "complete", config, found.history, found.model, summary)
        _draw(found, entries, beside)
        page = _report(config, found, entries, summary, beside)
        (beside / "report.html").write_text(page, encoding="utf-8")
    return summary


def _write_completed(found: Completed, entries: Entries, suffix: str, folder: Path) -> str:
    """Write all entries; return the name of the file."""
    sizes, count = found.model.sizes, math.prod(found.model.sizes)
    if entries.labels is None:
        np.save(folder / "completed.npy", found.completed().cpu().numpy())
        return "completed.npy"
    if count > _MOST_ROWS:
        raise SizeError(f"a table of all {count:,} entries; ask the model for those that are needed.")
    import pandas

    places = np.unravel_index(np.arange(count), sizes)
    columns = {
        name: np.asarray(labels)[place]
        for name, labels, place in zip(entries.modes, entries.labels, places, strict=True)
    }
    table = pandas.DataFrame({**columns, "value": found.completed().reshape(-1).cpu().numpy()})
    name = f"completed{suffix}"
    table.to_csv(folder / name, index=False) if suffix == ".csv" else table.to_parquet(folder / name)
    return name


def _draw(found: Completed, entries: Entries, folder: Path) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = drawn.subplots(1, 2)
    labels: dict[Any, str] = {
        mode: f"{mode} {name}: {entries.sizes[mode]}" for mode, name in enumerate(entries.modes)
    }
    plots.tree(found.tree, left, labels=labels, edges=found.ranks)
    left.set_title("tree, ranks on its edges")
    _scatter(found, right)
    plots.save_figure(drawn, folder / "found.png")
    drawn = draw(found.history, ("held-out error", "train error"))
    plots.save_figure(drawn, folder / "training.png")
    assert isinstance(found.known, Completion)
    plots.save_figure(slices(found, found.known, entries.modes), folder / "slices.png")


def _scatter(found: Completed, ax: Any) -> None:
    measured, predicted = (_real(x).cpu().numpy() for x in (found.held.values, found.predictions))
    ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
    ax.plot(ends, ends, color="0.6", lw=1)
    ax.scatter(measured[:5000], predicted[:5000], s=8, alpha=0.5)
    ax.set_xlabel("measured")
    ax.set_ylabel("predicted")
    low, high = found.interval
    ax.set_title(f"{len(measured)} held-out entries, error {found.error:.2g} ({low:.2g} to {high:.2g})")


def slices(found: Completed, known: Completion, modes: Sequence[str], count: int = 4) -> Any:
    """Return a figure of the slices of the two longest modes with most known entries: known and completed."""
    from matplotlib.figure import Figure

    order, sizes = len(known.sizes), (*known.sizes, 1)  # a vector is one row
    down, right = sorted(sorted(range(max(order, 2)), key=lambda n: -sizes[n])[:2])
    index = torch.nn.functional.pad(known.index, (0, 1))
    others = [n for n in range(order) if n not in (down, right)]
    _, group, counts = torch.unique(row_keys(index[:, others]), return_inverse=True, return_counts=True)
    gaps = counts < sizes[down] * sizes[right]  # what has none comes last
    picked = (counts * gaps).argsort(descending=True, stable=True)[:count].tolist()
    steps = [math.ceil(sizes[n] / _LONGEST) for n in (down, right)]  # some places of a long mode
    shape = [math.ceil(sizes[n] / step) for n, step in zip((down, right), steps, strict=True)]
    places = torch.cartesian_prod(*(torch.arange(n) for n in shape)).to(index) * index.new_tensor(steps)
    drawn = Figure(figsize=(2.8 * len(picked) + 0.8, 5.5), layout="constrained")
    axes = drawn.subplots(2, len(picked), sharex=True, sharey=True, squeeze=False)
    limits = torch.aminmax(_real(known.values))
    for (above, below), number in zip(axes.T, picked, strict=True):
        at = (group == number) & (index[:, [down, right]] % index.new_tensor(steps) == 0).all(1)
        rows = index[group == number][:1].repeat(len(places), 1)
        rows[:, [down, right]] = places
        measured = torch.full(shape, math.nan, dtype=torch.float64)
        i, j = (index[at][:, [down, right]] // index.new_tensor(steps)).T.cpu()
        measured[i, j] = _real(known.values[at]).double().cpu()
        model = _real(found.predict(rows[:, :order])).double().cpu().reshape(shape)
        completed = torch.where(torch.isnan(measured), model, measured)
        for ax, values in ((above, measured), (below, completed)):
            image = ax.imshow(values.numpy(), vmin=float(limits.min), vmax=float(limits.max), aspect="auto")
        title = ", ".join(f"{modes[n]} {int(rows[0, n])}" for n in others)
        above.set_title(plain_label(title), fontsize=8)
        below.set_xlabel(plain_label(modes[right]) if right < order else "")
        below.locator_params(integer=True)
    for ax, name in zip(axes[:, 0], ("known", "completed"), strict=True):
        ax.set_ylabel(f"{name}\n{plain_label(modes[down])}")
    drawn.colorbar(image, ax=axes, shrink=0.6)
    return drawn


def _real(x: torch.Tensor) -> torch.Tensor:
    return x.abs() if x.is_complex() else x


def _report(config: Config, found: Completed, entries: Entries, summary: dict[str, Any], folder: Path) -> str:
    """Return the page, with the pictures of the folder inside."""
    low, high = found.interval
    settings = ", ".join(f"{key} = {value}" for key, value in vars(config).items())
    names = {node: ", ".join(entries.modes[n] for n in found.tree.modes_below(node)) for node in found.ranks}
    more = ("numbers", "joins", "known entries", "of them held out", "entries", "completed tensor")
    return report.page(
        f"{config.tensor}, completed",
        report.text(
            f"Held-out error {found.error:.3g}, between {low:.3g} and {high:.3g} in 95 of 100 draws of such "
            f"entries; that of the mean is {found.mean_error:.3g}. The model was fitted to all known entries."
        ),
        *(report.text(f"Warning: {note}") for note in found.notes),
        *(report.picture(folder / name, text) for name, text in _PICTURES.items()),
        report.text("Ranks", "h2"),
        report.table({f"{node}: {names[node]}": rank for node, rank in found.ranks.items()}),
        report.text("Numbers", "h2"),
        report.table({key: summary[key] for key in more}),
        report.text("The model", "h2"),
        report.text(
            'import torch, tnreg\nmodel = tnreg.load("model.safetensors")\n'
            f"model.entries(torch.tensor([{[0] * found.tree.order}]))",
            "pre",
        ),
        report.text(f"Settings: {settings}; {summary['seconds']:.1f} seconds."),
    )
