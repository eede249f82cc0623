"""One run of dynamics: its settings, its training and what is observed meanwhile, its folder."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tnreg.dynamics import predicted_rate, predicted_singular_rate, rate_bounds
from tnreg.errors import DataError, FileError, OptionError, blame, check_number
from tnreg.experiments.dynamics.pictures import rates_figure, spectra_figure, training_figure
from tnreg.experiments.dynamics.tracked import tracks
from tnreg.experiments.dynamics.updates import Name, Updates
from tnreg.experiments.folder import RUN_FILES, plain_config, read_run, write_run
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.files import check_folder, folder_written_whole
from tnreg.plots import save_figure
from tnreg.ranks.dense import effective_rank, numerical_rank
from tnreg.ranks.spectra import hierarchical_rank, spectra
from tnreg.tensors.arrays import as_tensor, check_numbers, matricize
from tnreg.tensors.loading import load_tensor
from tnreg.training.tasks import Completion, Sensing, completion, relative_error, root_mean_square, sensing
from tnreg.training.trajectory import Trajectory
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree, read_tree

Preset = Literal["mf", "cp", "htf", "htf-small", "cp-small", "ternary", "mixed", "unbalanced", "tiny"]


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
        unbalance: The first mode's weights start so many times larger, the last mode's so many times smaller.
        target: A tensor's name or file, for ``tnreg.load_tensor``; if left out, a random
            factorization with N(0, 1) weights.
        missing: "nan": entries of the target that are NaN were not measured.
        target_tree: Tree of a random target; may differ from the model's.
        target_sizes: Mode sizes of a random target.
        target_rank: Size of every bond of a random target.
        target_root: Weight of a random target's root: trained (that is, random), or ones.
        target_rms: The target is scaled to this root mean square of its entries.
        task: Observe single entries, or inner products with random rank-one or dense tensors.
        samples: How many of them.
        loss: Of the residuals: squares, Huber's (see ``tnreg.completion``) or magnitudes.
        optimizer: Group RMSprop as in the paper; others; or gradient flow itself (needs the extra ``flow``,
            and float64), whose time is that of gradient descent: ``lr`` for each of the ``steps``.
        lr: Learning rate.
        steps: Updates, at most.
        every: Updates between two observations, which are also the checks of the stop rule.
        stop_below: Stop when the loss is below this ...
        stop_checks: ... at more than so many checks in a row.
        top: How many of the largest components are recorded at every node.
        off_tree: Sets of modes, such as "0,2", whose matricization is watched as well.
        rates: Record the rates that the theory predicts; costs one backward pass per observation. Neither
            Adam nor L-BFGS follows a flow that has such rates.
        bounds: Record the bounds on these rates that hold for unbalanced weights, at as much again.
        rtol: Threshold of the numerical ranks, relative to the largest singular value.
        seed: Draws the target, what is observed of it, and the initial weights.
        device: Torch device.
        dtype: Type of the weights.
        graph: Replay each step as a CUDA graph; for group RMSprop.
    """

    model: Preset = "htf"
    tree: str = "htf-4"
    rank: int = 512
    join: Literal["diagonal", "full"] = "diagonal"
    root: Literal["trained", "ones"] = "trained"
    std: float = 0.01
    unbalance: float = 1.0
    target: str | None = None
    missing: Literal["nan"] | None = None
    target_tree: str = "htf-4"
    target_sizes: tuple[int, ...] = (8, 8, 8, 8)
    target_rank: int = 5
    target_root: Literal["trained", "ones"] = "trained"
    target_rms: float = 1.0
    task: Literal["completion", "sensing", "dense-sensing"] = "completion"
    samples: int = 2048
    loss: Literal["mse", "huber", "l1"] = "mse"
    optimizer: Name = "group-rmsprop"
    lr: float = 0.01
    steps: int = 100_000
    every: int = 25
    stop_below: float = 5e-5
    stop_checks: int = 100
    top: int = 10
    off_tree: tuple[str, ...] = ()
    rates: bool = True
    bounds: bool = False
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
cp_small = dataclasses.replace(
    cp, model="cp-small", rank=30, std=0.01, target_sizes=(10, 10, 10), target_rank=3, samples=500,
    steps=10_000,
)  # fmt: skip
ternary = dataclasses.replace(
    htf, model="ternary", tree="[[0,1,2],[3,4,5]]", target_tree="[[0,1,2],[3,4,5]]", rank=32, std=0.1,
    target_sizes=(4,) * 6, target_rank=3, steps=12_000, off_tree=("0,3",),
)  # fmt: skip
mixed = dataclasses.replace(
    ternary, model="mixed", tree="[[0,1,2],[3,4]]", target_tree="[[0,1,2],[3,4]]",
    target_sizes=(5,) * 5, samples=1562,
)  # fmt: skip
unbalanced = dataclasses.replace(cp_small, model="unbalanced", std=0.03, unbalance=3.0, bounds=True)
MODELS: dict[str, Config] = {
    one.model: one for one in (mf, cp, htf, htf_small, cp_small, ternary, mixed, unbalanced, tiny)
}

_FILES = (*RUN_FILES, "dynamics.png", "spectra.png", "rates.png")

# Entries of a tensor that is made dense once a row for errors and singular values: at 8^4 and width 512 that
# costs a quarter of the factored spectra. Its singular values are computed on the CPU, as a GPU takes longer
# for matrices this small. A larger tensor is made dense only for off-tree sets, if asked for.
_SMALL = 2**16


def run(
    config: Config,
    folder: str | Path,
    *,
    tree: ModeTree | None = None,
    target: Any = None,
    pictures: bool = True,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 30.0,
) -> dict[str, Any]:
    """Train, write the folder, and return its summary.

    Args:
        config: Settings; ``MODELS`` has presets to start from with ``dataclasses.replace``.
        folder: Where the run goes.
        tree: A tree of your own in place of ``config.tree``.
        target: A dense tensor or a ``Factorization`` of your own in place of the configured target.
        pictures: Draw them; ``figure`` does it later.
        progress: Show a progress bar.
        checkpoint: Holds the state while it trains; ``FOLDER.checkpoint`` beside it if left out.
        checkpoint_seconds: Least time between two writings of the state.

    Returns:
        What ``config.json`` holds under ``summary``.

    Raises:
        TnregError: Settings that do not fit each other, or a checkpoint of other settings.
        KeyboardInterrupt: After Ctrl-C; the checkpoint stays.
    """
    place, config = check_folder(folder, "dynamics", _FILES), plain_config(config)
    file = Path(checkpoint or place.with_name(f"{place.name}.checkpoint"))
    model_tree = read_tree(config.tree) if tree is None else tree
    task, dense, scale = _task(config, target)
    model = _model(config, model_tree, task.sizes)
    updates = Updates(config.optimizer, model, config.lr, config.graph)
    observations = _Observations(config, task, updates, model)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {place}: {error.strerror or error}") from None
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("steps", "rtol")}
    resumed, start = file.exists(), time.perf_counter()
    trajectory = updates.train(
        model, task.loss, config.steps, config.every, observe=observations.functions,
        stop=_stays_below(config.stop_below, config.stop_checks), progress=progress, checkpoint=file,
        checkpoint_seconds=checkpoint_seconds, settings={**settings, "tree": repr(model_tree)},
    )  # fmt: skip
    if trajectory.stop_reason == "interrupted":
        raise KeyboardInterrupt
    if len(trajectory) == 0:
        raise DataError(trajectory.stop_reason)
    seconds = None if resumed else time.perf_counter() - start
    summary = _summary(config, model, dense, trajectory) | {"scale": scale, "seconds": seconds}
    with folder_written_whole(place, "dynamics", _FILES) as beside:
        write_run(beside, "dynamics", config, trajectory, model, summary)
        if pictures:
            figure(beside)
    file.unlink(missing_ok=True)
    return summary


def figure(folder: str | Path) -> Path:
    """Draw the pictures of a run folder (again) and return ``dynamics.png``."""
    run = read_run(folder)
    save_figure(spectra_figure(run), run.folder / "spectra.png")
    if "predicted rate" in run.trajectory:
        save_figure(rates_figure(run), run.folder / "rates.png")
    return save_figure(training_figure(run), run.folder / "dynamics.png")


def row(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the few numbers of a summary that stand for it in a table of several runs.

    A run whose loss fell by less than a tenth did not leave the plateau that it starts on.
    """
    largest = list(summary["components"].values())[-1] if "components" in summary else []
    return {
        "steps": summary["steps"],
        "loss": summary["loss"],
        "left its plateau": summary["loss"] < 0.9 * summary.get("first loss", math.inf),
        "test error": summary.get("test error"),
        "components above 1 %": sum(c > 0.01 * largest[0] for c in largest),
        "effective rank": max(summary["effective rank"].values()),
    }


def _task(config: Config, target: Any) -> tuple[Completion | Sensing, Tensor, float]:
    """Return the task, its dense target in double precision, and what the target was divided by."""
    if target is None and config.target is not None:
        target = load_tensor(config.target).values
    elif target is None:
        with blame("target_tree"):
            tree = read_tree(config.target_tree)
        target = Factorization(
            tree, config.target_sizes, config.target_rank,
            root=config.target_root, std=1.0, dtype=torch.float64,
            generator=torch.Generator().manual_seed(config.seed),
        )  # fmt: skip
    dense = target.to_tensor() if isinstance(target, Factorization) else as_tensor(target)
    if dense.is_complex():
        raise DataError(
            "the target is complex; this experiment trains real factorizations.", argument="target"
        )
    dense = dense.detach().double()
    known = dense[~torch.isnan(dense)] if config.missing == "nan" else check_numbers(dense)
    rms = root_mean_square(known) if known.numel() else 0.0  # of nothing: refused by the task
    scale = rms / config.target_rms if rms > 0 else 1.0
    dense = dense / scale
    task: Completion | Sensing
    if config.task == "completion":
        task = completion(dense, config.samples, config.seed, missing=config.missing, loss=config.loss)
    else:
        kind = {"sensing": "rank-one", "dense-sensing": "dense"}.get(config.task, config.task)
        task = sensing(dense, config.samples, config.seed, kind=kind, loss=config.loss)
    return task.to(config.device, getattr(torch, config.dtype)), dense, scale


def _model(config: Config, tree: ModeTree, sizes: tuple[int, ...]) -> Factorization:
    """Return the model with its initial weights."""
    model = Factorization(
        tree, sizes, config.rank, join=config.join, root=config.root, std=config.std,
        dtype=getattr(torch, config.dtype), device=config.device,
        # not the numbers that the target was drawn with
        generator=torch.Generator().manual_seed(config.seed + 1_000_003),
    )  # fmt: skip
    factor = check_number(config.unbalance, "unbalance", 1e-6)
    first, last = 0, len(sizes) - 1
    model.load_weights({first: model.weights[first] * factor})
    model.load_weights({last: model.weights[last] / factor})
    return model


def _stays_below(value: float, checks: int) -> Callable[[Trajectory], bool | str]:
    """Return the published stop rule: the loss below ``value`` at more than ``checks`` rows in a row."""

    def stop(trajectory: Trajectory) -> bool | str:
        if len(trajectory) <= checks or not (trajectory.last("loss", checks + 1) < value).all():
            return False
        return f"loss below {value:g} at {checks + 1} checks in a row"

    return stop


class _Observations:
    """What is observed; an observation leaves to those after it what they need as well."""

    def __init__(
        self, config: Config, task: Completion | Sensing, updates: Updates, model: Factorization
    ) -> None:
        self.config, self.task = config, task
        self.small = math.prod(model.sizes) <= _SMALL
        self.matrix = model.tree.order == 2
        self.diagonal = "diagonal" in model.network.joins
        self.off_tree = {text: _modes(text, model.tree.order) for text in config.off_tree}
        components = self.matrix or self.diagonal
        tested = isinstance(task, Sensing) or task.test_values is not None
        rated = components and config.rates and updates.follow_flow
        if config.bounds and (self.matrix or not self.diagonal):
            message = "bounds are on the rates of local components: of diagonal joins, of order 3 and more."
            raise OptionError(message, argument="bounds")
        functions: dict[str, tuple[bool, Callable[[Factorization], Any]]] = {
            "train error": (True, task.train_error),
            "spectra": (True, self._spectra),
            "test error": (tested, self._test_error),
            "effective rank": (True, self._effective_ranks),
            "off-tree": (bool(self.off_tree), self._off_tree),
            "components": (components, self._components),
            "component ids": (components, lambda _: self.ids),
            "predicted rate": (rated, self._rates),
            "lower bound": (rated and config.bounds, self._lower_bounds),
            "upper bound": (rated and config.bounds, self._upper_bounds),
            "unbalancedness": (self.diagonal, self._unbalancedness),
            **{name: (True, observe) for name, observe in updates.observations.items()},
        }
        self.functions = {name: observe for name, (wanted, observe) in functions.items() if wanted}

    def _spectra(self, model: Factorization) -> dict[Node, Tensor]:
        self.dense = model.to_tensor() if self.small else None
        dense = None if self.dense is None else self.dense.double().cpu()
        self.spectra = spectra(model) if dense is None else spectra(dense, model.tree)
        return self.spectra

    def _effective_ranks(self, _: Factorization) -> dict[Node, Tensor]:
        return {v: effective_rank(s) for v, s in self.spectra.items()}

    def _test_error(self, model: Factorization) -> float:
        task = self.task
        if self.dense is None or not isinstance(task, Completion) or task.test_index is None:
            return task.test_error(model)
        assert task.test_values is not None
        return relative_error(self.dense[task.test_index.unbind(1)], task.test_values)

    def _off_tree(self, model: Factorization) -> dict[str, Tensor]:
        dense = model.to_tensor().double() if self.dense is None else self.dense.double().cpu()
        return {t: torch.linalg.svdvals(matricize(dense, m)) for t, m in self.off_tree.items()}

    def _components(self, model: Factorization) -> dict[Node, Tensor]:
        if self.diagonal:
            self.norms = model.component_norms()
        if self.matrix:  # the components of a matrix are its singular triples
            components = {model.tree.root: self.spectra[0]}
        else:
            components = {node: norms.prod(0) for node, norms in self.norms.items()}
        largest = {v: s.topk(min(self.config.top, len(s))) for v, s in components.items()}
        self.ids = {node: top.indices for node, top in largest.items()}
        return {node: top.values for node, top in largest.items()}

    def _rates(self, model: Factorization) -> dict[Node, Tensor]:
        if self.matrix:
            rates = {model.tree.root: predicted_singular_rate(model, self.task.loss)}
        else:
            rates = predicted_rate(model, self.task.loss, norms=self.norms)
        return {node: rates[node][ids] for node, ids in self.ids.items()}

    def _lower_bounds(self, model: Factorization) -> dict[Node, Tensor]:
        self.bounds = rate_bounds(model, self.task.loss)
        return {node: self.bounds[node][0][ids] for node, ids in self.ids.items()}

    def _upper_bounds(self, _: Factorization) -> dict[Node, Tensor]:
        return {node: self.bounds[node][1][ids] for node, ids in self.ids.items()}

    def _unbalancedness(self, _: Factorization) -> Tensor:
        squares = [norms.double().square() for norms in self.norms.values()]
        return torch.stack([(s.amax(0) - s.amin(0)).max() for s in squares]).max()


def _modes(text: str, order: int) -> tuple[int, ...]:
    """Return the modes that an entry of ``off_tree`` names."""
    parts = [part.strip() for part in text.split(",")]
    some = set(parts)
    if not some <= {str(mode) for mode in range(order)} or not len(some) == len(parts) < order:
        raise OptionError(
            f"off_tree: {text!r} is no set of some of the modes 0..{order - 1}; write e.g. '0,2'.",
            argument="off_tree",
        )
    return tuple(map(int, parts))


def _summary(config: Config, model: Factorization, dense: Tensor, trajectory: Trajectory) -> dict[str, Any]:
    errors = ("loss", "train error", "test error")
    summary: dict[str, Any] = {
        "tree": repr(model.tree),
        "sizes": list(model.sizes),
        "weights": sum(p.numel() for p in model.parameters()),
        "steps": int(trajectory.steps[-1]),
        "stopped by": trajectory.stop_reason,
        "first loss": float(trajectory["loss"][0]),
        **{name: float(trajectory[name][-1]) for name in errors if name in trajectory},
        "ranks": {str(v): r for v, r in hierarchical_rank(model, rtol=config.rtol).items()},
        "effective rank": {str(v): float(e[-1]) for v, e in trajectory["effective rank"].items()},
    }
    if not torch.isnan(dense).any():
        ranks = hierarchical_rank(dense, model.tree, rtol=config.rtol)
        summary["target ranks"] = {str(v): r for v, r in ranks.items()}
    if "off-tree" in trajectory:
        summary["off-tree ranks"] = {
            text: numerical_rank(torch.from_numpy(values[-1]), config.rtol)
            for text, values in trajectory["off-tree"].items()
        }
    if "components" in trajectory:
        components = trajectory["components"]
        local = {str(v): tracks(trajectory, v) for v in components}
        summary["components"] = {str(v): c[-1].tolist() for v, c in components.items()}
        summary["jumps"] = {v: one.jumps() for v, one in local.items()}
        if "predicted rate" in trajectory:
            summary["rate error"] = {v: one.rate_error() for v, one in local.items()}
    return summary
