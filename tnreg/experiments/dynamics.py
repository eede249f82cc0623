"""Components learned one after another: matrix, CP and hierarchical tensor factorization, or any tree.

A factorization starts near zero and is trained on a part of a tensor's entries (or on rank-one
measurements). Recorded are its components (the singular values of a matrix factorization, the largest
local components of every other one) with the rates at which theory says they grow, the singular
values at every node, errors, unbalancedness and step size. The presets have the settings of figures 1,
2 and 4 of Razin, Maman and Cohen (2022), arXiv:2201.11729.

A run folder holds ``config.json``, ``model.safetensors``, ``trajectory.npz`` and three pictures:
``dynamics.png``, ``spectra.png``, ``rates.png``. While it trains, ``FOLDER.checkpoint`` beside it holds
the state: a run that was killed goes on from there when it is started again.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tnreg.dynamics import predicted_rate, predicted_singular_rate
from tnreg.errors import DataError, FileError, OptionError
from tnreg.experiments.folder import Run, read_run, write_run
from tnreg.factorization import Factorization
from tnreg.files import check_folder, folder_written_whole
from tnreg.fit import fit
from tnreg.gramians import hierarchical_rank, spectra
from tnreg.optim import GroupRMSprop
from tnreg.plots import node_text, save_figure
from tnreg.rank import as_tensor, check_numbers, effective_rank, matricize, numerical_rank
from tnreg.tasks import Completion, Sensing, completion, relative_error, sensing
from tnreg.tensors import load_tensor
from tnreg.trajectory import Trajectory
from tnreg.tree import ModeTree, Node, read_tree

__all__ = ["MODELS", "Config", "Tracks", "figure", "panels", "run", "tracks"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Config:
    """Settings of one run.

    Attributes:
        model: The preset that the other defaults come from.
        tree: Tree of the model: gallery name, JSON file or nested lists.
        rank: Size of every bond of the model.
        join: Kind of join at every node of the model.
        root: Weight of the model's root: trained, or fixed to ones.
        std: Standard deviation of the initial weights.
        target: A tensor's name or file, for ``tnreg.load_tensor``; if left out, a random
            factorization with N(0, 1) weights.
        missing: "nan": entries of the target that are NaN were not measured.
        target_tree: Tree of a random target; may differ from the model's.
        target_sizes: Mode sizes of a random target.
        target_rank: Size of every bond of a random target.
        target_root: Weight of a random target's root: trained (that is, random), or ones.
        target_rms: The target is scaled to this root mean square of its entries.
        task: Observe single entries, or inner products with random rank-one tensors.
        samples: How many of them.
        lr: Learning rate of the group RMSprop of the paper.
        steps: Updates, at most.
        every: Updates between two observations, which are also the checks of the stop rule.
        stop_below: Stop when the loss is below this ...
        stop_checks: ... at more than so many checks in a row.
        top: How many of the largest components are recorded at every node.
        off_tree: Sets of modes, such as "0,2", whose matricization is watched as well.
        rates: Record the rates that the theory predicts; costs one backward pass per observation.
        rtol: Threshold of the numerical ranks, relative to the largest singular value.
        seed: Draws the target, what is observed of it, and the initial weights.
        device: Torch device.
        dtype: Type of the weights.
        graph: Replay each step as a CUDA graph.
    """

    model: Literal["mf", "cp", "htf", "htf-small", "tiny"] = "htf"
    tree: str = "htf-4"
    rank: int = 512
    join: Literal["diagonal", "full"] = "diagonal"
    root: Literal["trained", "ones"] = "trained"
    std: float = 0.01
    target: str | None = None
    missing: Literal["nan"] | None = None
    target_tree: str = "htf-4"
    target_sizes: tuple[int, ...] = (8, 8, 8, 8)
    target_rank: int = 5
    target_root: Literal["trained", "ones"] = "trained"
    target_rms: float = 1.0
    task: Literal["completion", "sensing"] = "completion"
    samples: int = 2048
    lr: float = 0.01
    steps: int = 100_000
    every: int = 25
    stop_below: float = 5e-5
    stop_checks: int = 100
    top: int = 10
    off_tree: tuple[str, ...] = ()
    rates: bool = True
    rtol: float = 1e-2
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    graph: bool = False


htf = Config(off_tree=("0,2",))
mf = Config(
    model="mf", tree="matrix-deep-3", rank=64, root="ones", std=0.001, target_tree="[0,1]",
    target_sizes=(64, 64), target_root="ones",
)  # fmt: skip
cp = Config(
    model="cp", tree="star-3", rank=256, root="ones", std=0.001, target_tree="star-3",
    target_sizes=(16, 16, 16), target_root="ones",
)  # fmt: skip
htf_small = dataclasses.replace(htf, model="htf-small", rank=64, std=0.03)
tiny = dataclasses.replace(
    htf, model="tiny", target_sizes=(3, 3, 3, 3), target_rank=1, rank=8, std=0.1, samples=60, steps=300,
    every=10, dtype="float64",
)  # fmt: skip
MODELS: dict[str, Config] = {"mf": mf, "cp": cp, "htf": htf, "htf-small": htf_small, "tiny": tiny}

_SMALL = 2**16  # entries of a tensor that is made dense to be observed

_TITLES = {
    "mf": "matrix factorization",
    "cp": "CP factorization",
    "htf": "hierarchical tensor factorization",
}


def run(
    config: Config,
    folder: str | Path,
    *,
    tree: ModeTree | None = None,
    target: Any = None,
    pictures: bool = True,
    progress: bool = False,
    checkpoint_seconds: float = 30.0,
) -> dict[str, Any]:
    """Train, write the folder, and return its summary.

    Args:
        config: Settings; ``MODELS`` has presets to start from with ``dataclasses.replace``.
        folder: Where the run goes. Beside it, ``FOLDER.checkpoint`` holds the state while it trains.
        tree: A tree of your own in place of ``config.tree``.
        target: A dense tensor or a ``Factorization`` of your own in place of the configured target.
        pictures: Draw them; ``figure`` does it later.
        progress: Show a progress bar.
        checkpoint_seconds: Least time between two writings of the state.

    Returns:
        What ``config.json`` holds under ``summary``.

    Raises:
        TnregError: Settings that do not fit each other, or a checkpoint of other settings.
        KeyboardInterrupt: After Ctrl-C; the checkpoint stays.
    """
    place = check_folder(folder)
    checkpoint = place.with_name(f"{place.name}.checkpoint")
    along = read_tree(config.tree) if tree is None else tree
    task, dense, scale = _task(config, target)
    model = Factorization(
        along, task.sizes, config.rank, join=config.join, root=config.root, std=config.std,
        dtype=getattr(torch, config.dtype), device=config.device,
        # not the numbers that the target was drawn with
        generator=torch.Generator().manual_seed(config.seed + 1_000_003),
    )  # fmt: skip
    optimizer = GroupRMSprop(model.parameters(), lr=config.lr)
    observe = _Observations(config, task, optimizer, model)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {place}: {error.strerror or error}") from None
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("steps", "rtol")}
    resumed, start = checkpoint.exists(), time.perf_counter()
    found = fit(
        model, task.loss, steps=config.steps, optimizer=optimizer, observe=observe.functions,
        every=config.every, stop=_stays_below(config.stop_below, config.stop_checks),
        progress=progress, checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds,
        settings={**settings, "tree": repr(along)}, graph=config.graph,
    )  # fmt: skip
    if found.stop_reason == "interrupted":
        raise KeyboardInterrupt
    seconds = time.perf_counter() - start
    summary = {
        **_summary(config, model, task, dense, found),
        "scale": scale,
        "seconds": None if resumed else seconds,
    }
    with folder_written_whole(place) as beside:
        write_run(beside, config, found, model, summary)
        if pictures:
            figure(beside)
    checkpoint.unlink(missing_ok=True)
    return summary


def _task(config: Config, given: Any) -> tuple[Completion | Sensing, Tensor, float]:
    """The task, its dense target in double precision, and what the target was divided by."""
    if given is not None:
        with torch.no_grad():
            dense = given.to_tensor() if isinstance(given, Factorization) else as_tensor(given)
    elif config.target is not None:
        dense = load_tensor(config.target).values
    else:
        made = Factorization(
            read_tree(config.target_tree), config.target_sizes, config.target_rank,
            root=config.target_root, std=1.0, dtype=torch.float64,
            generator=torch.Generator().manual_seed(config.seed),
        )  # fmt: skip
        dense = made.to_tensor()
    if dense.is_complex():
        raise DataError("the target is complex; this experiment trains real factorizations.")
    dense = dense.detach().double()
    known = dense[~torch.isnan(dense)] if config.missing == "nan" else check_numbers(dense)
    rms = float(torch.linalg.vector_norm(known) / math.sqrt(max(known.numel(), 1)))
    scale = rms / config.target_rms if rms > 0 else 1.0
    dense = dense / scale
    task: Completion | Sensing
    if config.task == "completion":
        task = completion(dense, config.samples, config.seed, missing=config.missing)
    else:
        task = sensing(dense, config.samples, config.seed)
    return task.to(config.device, getattr(torch, config.dtype)), dense, scale


def _stays_below(value: float, checks: int) -> Callable[[Trajectory], bool | str]:
    """The published stop rule: the loss below ``value`` at more than ``checks`` rows in a row."""

    def stop(found: Trajectory) -> bool | str:
        if len(found) <= checks or not (found.last("loss", checks + 1) < value).all():
            return False
        return f"loss below {value:g} at {checks + 1} checks in a row"

    return stop


class _Observations:
    """What is recorded in every row; what two observations need is computed once.

    A small tensor is made dense once a row for errors and singular values: at 8^4 and width 512 that
    costs a fifth of the factored spectra. A large one never is.
    """

    def __init__(
        self,
        config: Config,
        task: Completion | Sensing,
        optimizer: GroupRMSprop,
        model: Factorization,
    ) -> None:
        self.config, self.task = config, task
        self.dense: Tensor | None = None
        self.small = math.prod(model.sizes) <= _SMALL
        self.matrix = model.tree.order == 2
        self.off_tree = {text: _modes(text, model.tree.order) for text in config.off_tree}
        functions: dict[str, Callable[[Factorization], Any]] = {
            "train error": task.train_error,
            "spectra": self._spectra,
        }
        if isinstance(task, Sensing) or task.test_values is not None:
            functions["test error"] = self._test_error
        functions["effective rank"] = self._effective_ranks
        if self.off_tree:
            functions["off-tree"] = self._off_tree
        if self.matrix or "diagonal" in model.network.joins:
            functions["components"] = self._components
            functions["component ids"] = lambda _: self.ids
            if config.rates:
                functions["predicted rate"] = self._rates
        if "diagonal" in model.network.joins:
            functions["unbalancedness"] = self._unbalancedness
        functions["step size"] = lambda _: optimizer.step_size
        functions["flow time"] = lambda _: optimizer.flow_time
        self.functions = functions

    def _spectra(self, model: Factorization) -> dict[Node, Tensor]:
        self.dense = model.to_tensor() if self.small else None
        if self.dense is None:
            self.spectra = spectra(model)
        else:
            self.spectra = spectra(self.dense.double(), model.tree)
        return self.spectra

    def _test_error(self, model: Factorization) -> float:
        task = self.task
        if self.dense is None or not isinstance(task, Completion) or task.test_index is None:
            return task.test_error(model)
        assert task.test_values is not None
        found = self.dense[task.test_index.unbind(1)]
        return relative_error(found, task.test_values)

    def _effective_ranks(self, _: Factorization) -> dict[Node, Tensor]:
        return {node: effective_rank(s) for node, s in self.spectra.items()}

    def _off_tree(self, model: Factorization) -> dict[str, Tensor]:
        dense = (model.to_tensor() if self.dense is None else self.dense).double()
        return {t: torch.linalg.svdvals(matricize(dense, m)) for t, m in self.off_tree.items()}

    def _components(self, model: Factorization) -> dict[Node, Tensor]:
        if "diagonal" in model.network.joins:
            self.norms = model.component_norms()
        if self.matrix:  # the components of a matrix are its singular triples
            found = {model.tree.root: self.spectra[0]}
        else:
            found = {node: norms.prod(0) for node, norms in self.norms.items()}
        kept = {v: s.topk(min(self.config.top, len(s))) for v, s in found.items()}
        self.ids = {node: top.indices for node, top in kept.items()}
        return {node: top.values for node, top in kept.items()}

    def _rates(self, model: Factorization) -> dict[Node, Tensor]:
        if self.matrix:
            rates = {model.tree.root: predicted_singular_rate(model, self.task.loss)}
        else:
            rates = predicted_rate(model, self.task.loss)
        return {node: rates[node][ids] for node, ids in self.ids.items()}

    def _unbalancedness(self, _: Factorization) -> Tensor:
        squares = [norms.double().square() for norms in self.norms.values()]
        return torch.stack([(s.amax(0) - s.amin(0)).max() for s in squares]).max()


def _modes(text: str, order: int) -> tuple[int, ...]:
    try:
        modes = tuple(int(part) for part in text.split(","))
    except ValueError:
        modes = ()
    if (
        not modes
        or len(set(modes)) != len(modes)
        or not all(0 <= m < order for m in modes)
        or len(modes) == order
    ):
        raise OptionError(
            f"off_tree: {text!r} is no set of some of the modes 0..{order - 1}; write e.g. '0,2'."
        )
    return modes


def _summary(
    config: Config,
    model: Factorization,
    task: Completion | Sensing,
    dense: Tensor,
    found: Trajectory,
) -> dict[str, Any]:
    out: dict[str, Any] = {
        "tree": repr(model.tree),
        "sizes": list(model.sizes),
        "weights": sum(p.numel() for p in model.parameters()),
        "steps": int(found.steps[-1]),
        "stopped by": found.stop_reason,
        "loss": float(found["loss"][-1]),
        "train error": float(found["train error"][-1]),
        "ranks": {str(v): r for v, r in hierarchical_rank(model, rtol=config.rtol).items()},
        "effective rank": {str(v): float(e[-1]) for v, e in found["effective rank"].items()},
    }
    if "test error" in found:
        out["test error"] = float(found["test error"][-1])
    if not torch.isnan(dense).any():
        wanted = spectra(dense, model.tree)
        out["target ranks"] = {str(v): numerical_rank(s, config.rtol) for v, s in wanted.items()}
    for text, values in found["off-tree"].items() if "off-tree" in found else ():
        rank = numerical_rank(torch.from_numpy(values[-1]), config.rtol)
        out.setdefault("off-tree ranks", {})[text] = rank
    if "components" in found:
        out["components"] = {str(v): c[-1].tolist() for v, c in found["components"].items()}
        out["jumps"] = {str(v): tracks(found, v).jumps() for v in found["components"]}
        if "predicted rate" in found:
            out["rate error"] = {str(v): tracks(found, v).rate_error() for v in found["components"]}
    return out


@dataclass(frozen=True)
class Tracks:
    """The components of one node that are largest at the end, followed along the training.

    Attributes:
        steps: Updates done at every row, ``(rows,)``.
        norms: ``(rows, k)``; NaN where one was not yet among the recorded ones.
        measured: Change of the norm by flow time from the row before to the row after, for all rows
            but the first and the last, ``(rows - 2, k)``. Two intervals, because gradient descent at
            the edge of stability jumps to and fro with every step.
        predicted: Mean over the same flow time of the rates that theory predicts, ``(rows - 2, k)``;
            NaN if they were not recorded.
    """

    steps: Array
    norms: Array
    measured: Array
    predicted: Array

    def jumps(self, share: float = 0.01) -> list[list[int]]:
        """``[first step above 10 %, first step above 90 %]`` of its last norm, for every component.

        Components that end below ``share`` of the largest are left out.
        """
        last, out = self.norms[-1], []
        for k in np.flatnonzero(last > share * last.max()):
            rise = [
                np.argmax(np.nan_to_num(self.norms[:, k]) > part * last[k]) for part in (0.1, 0.9)
            ]
            out.append([int(self.steps[row]) for row in rise])
        return out

    def rate_error(self) -> float | None:
        """Median of ``|measured - predicted| / |predicted|`` while components rise from 10 to 90 %."""
        last = self.norms[-1]
        rising = (self.norms > 0.1 * last) & (self.norms < 0.9 * last) & (last > 0.01 * last.max())
        inside = rising[1:-1] & np.isfinite(self.predicted) & (self.predicted != 0)
        if not inside.any():
            return None
        ratio = self.measured[inside] / self.predicted[inside]
        return float(np.median(np.abs(ratio - 1)))


def tracks(found: Trajectory, node: Node | None = None) -> Tracks:
    """Follow the components that are largest at the end; at the root if no node is named.

    Raises:
        OptionError: No components were recorded, or none at this node.
    """
    if "components" not in found:
        raise OptionError("no components were recorded: the model has full joins only.")
    recorded, ids = found["components"], found["component ids"]
    node = list(recorded)[-1] if node is None else node
    if node not in recorded:
        raise OptionError(f"no node {node!r}; there is {', '.join(map(str, recorded))}.")
    same = ids[node][:, :, None] == ids[node][-1]  # row, recorded one, final one
    place, known = same.argmax(1), same.any(1)

    def follow(values: Array) -> Array:
        taken = np.take_along_axis(values.astype(float), place, 1)
        return np.where(known, taken, np.nan)

    norms = follow(recorded[node])
    passed = np.diff(found["flow time"])[:, None]
    around = passed[1:] + passed[:-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        measured = (norms[2:] - norms[:-2]) / around
        predicted = np.full_like(measured, np.nan)
        if "predicted rate" in found:
            rates = follow(found["predicted rate"][node])
            grown = passed * (rates[1:] + rates[:-1]) / 2
            predicted = (grown[1:] + grown[:-1]) / around
    return Tracks(found.steps, norms, measured, predicted)


# Pictures


def figure(folder: str | Path) -> Path:
    """Draw the pictures of a run folder (again); returns ``dynamics.png``."""
    one = read_run(folder)
    save_figure(_spectra_figure(one), one.folder / "spectra.png")
    if "predicted rate" in one.found:
        save_figure(_rates_figure(one), one.folder / "rates.png")
    return save_figure(_training_figure(one), one.folder / "dynamics.png")


def panels(folders: Sequence[str | Path]) -> Any:
    """One panel per run, with its components along the training: the figure of the paper."""
    from matplotlib.figure import Figure

    if not folders:
        raise OptionError("panels: give at least one run folder.")
    runs = [read_run(folder) for folder in folders]
    for one in runs:
        if one.experiment != "dynamics":
            raise OptionError(f"{one.folder} is a run of {one.experiment!r}, not of 'dynamics'.")
    drawn = Figure(figsize=(4.4 * len(runs), 3.5), layout="constrained")
    for one, ax in zip(runs, drawn.subplots(1, len(runs), squeeze=False)[0], strict=True):
        _draw_components(one.found, ax)
        ax.set_title(_TITLES.get(one.config["model"], one.config["model"]))
    return drawn


def _draw_components(found: Trajectory, ax: Any, node: Node | None = None) -> None:
    followed = tracks(found, node)
    ax.plot(followed.steps, followed.norms, lw=1.4)
    ax.set_xlabel("step")
    ax.locator_params(axis="x", nbins=5)
    order = sum(isinstance(mode, int) for mode in found["spectra"])
    ax.set_ylabel("singular value" if order == 2 else "norm of the component")


def _training_figure(one: Run) -> Any:
    from matplotlib.figure import Figure

    found = one.found
    drawn = Figure(figsize=(10, 6.4), layout="constrained")
    (first, second), (third, fourth) = drawn.subplots(2, 2)
    if "components" in found:
        _draw_components(found, first)
        first.set_title("components at the root")
    else:
        first.plot(found.steps, list(found["spectra"].values())[-1], lw=1.2)
        first.set_xlabel("step")
        first.set_title("singular values below the root")
    for name in ("train error", "test error"):
        if name in found:
            second.semilogy(found.steps, found[name], label=name)
    second.set_title("‖W − W*‖ / ‖W*‖")
    second.legend()
    for node, values in found["effective rank"].items():
        third.plot(found.steps, values, label=node_text(node), lw=1.2)
    third.set_title("effective rank by node")
    if len(found["effective rank"]) <= 12:
        third.legend(fontsize=7)
    for name in ("unbalancedness", "step size"):
        if name in found and (found[name] > 0).any():
            fourth.semilogy(found.steps, found[name], label=name)
    fourth.legend()
    fourth.set_title("unbalancedness and step size")
    for ax in (second, third, fourth):
        ax.set_xlabel("step")
    return drawn


def _spectra_figure(one: Run) -> Any:
    """Local components in the upper row; below, singular values on the tree and off it."""
    from matplotlib.figure import Figure

    found, top = one.found, one.config["top"]
    lower: dict[str, Array] = {}
    for node in sorted(found["spectra"], key=lambda v: -len(v) if isinstance(v, tuple) else 0):
        values = found["spectra"][node]
        # the two children of a binary root share their singular values
        shown = [s[-1] for s in lower.values() if s.shape == values.shape]
        if len(lower) < 3 and not any(np.allclose(values[-1], s, rtol=1e-3) for s in shown):
            lower[f"on the tree: {node_text(node)}"] = values
    off = found["off-tree"] if "off-tree" in found else {}
    lower |= {f"off the tree: {{{modes}}}": s for modes, s in off.items()}
    nodes = list(found["components"])[::-1][: len(lower)] if "components" in found else []
    rows = 2 if nodes else 1
    drawn = Figure(figsize=(3.6 * len(lower), 3.1 * rows), layout="constrained")
    axes = drawn.subplots(rows, len(lower), squeeze=False)
    for ax, node in zip(axes[0], nodes, strict=False):
        _draw_components(found, ax, node)
        ax.set_title(f"components at {node_text(node)}", fontsize=9)
    for ax in axes[0][len(nodes) :] if nodes else ():
        ax.set_axis_off()
    for ax, (title, values) in zip(axes[-1], lower.items(), strict=True):
        ax.plot(found.steps, values[:, :top], lw=1.2)
        ax.set_xlabel("step")
        ax.set_ylabel("singular value")
        ax.set_title(title, fontsize=9)
    return drawn


def _rates_figure(one: Run) -> Any:
    """Predicted and measured growth: along the training at the root, and against each other."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    root = tracks(one.found)
    alive = np.flatnonzero(root.norms[-1] > 0.01 * root.norms[-1].max())
    for k in alive:
        [line] = left.plot(root.steps[1:-1], root.measured[:, k], lw=2, alpha=0.4)
        left.plot(root.steps[1:-1], root.predicted[:, k], lw=1, ls="--", color=line.get_color())
    left.set_xlabel("step")
    left.set_ylabel("dσ/dt")
    left.set_yscale("symlog", linthresh=_threshold(root.measured[:, alive]))
    left.set_title("at the root: measured (wide), predicted (dashed)")
    for node in one.found["components"]:
        followed = tracks(one.found, node)
        both = (followed.measured > 0) & (followed.predicted > 0)
        label = node_text(node)
        right.loglog(followed.predicted[both], followed.measured[both], ".", ms=2, label=label)
    high = 3 * max(right.get_xlim()[1], right.get_ylim()[1])
    right.plot([high * 1e-9, high], [high * 1e-9, high], color="0.5", lw=0.8)
    right.set_xlim(high * 1e-9, high)  # far below, rounding is all there is to see
    right.set_ylim(high * 1e-9, high)
    right.set_xlabel("predicted dσ/dt")
    right.set_ylabel("measured dσ/dt")
    right.set_title("all nodes")
    if right.get_legend_handles_labels()[0]:
        right.legend(markerscale=5, fontsize=7)
    return drawn


def _threshold(values: Array) -> float:
    largest = float(np.nanmax(np.abs(values), initial=0.0))
    return largest * 1e-3 if largest > 0 else 1.0
