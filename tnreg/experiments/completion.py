"""Complete a tensor from a part of its entries, along any tree, into a run folder.

A run folder holds ``config.json`` (settings, versions, results), ``model.safetensors``,
``trajectory.npz`` and ``training.png``. It appears as a whole when the run ends. A part of the observed
entries is held out from the training; the saved model is that of the row where it fits them best.
Training is on entries scaled to a mean square of 1, and the recorded losses are of these; the saved model
is in the unit of the data again (in float64 if that is beyond 1e-30 or 1e30), and ``scale`` in the summary
is what lies between.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tnreg.errors import DataError, OptionError, check_number
from tnreg.experiments.folder import RUN_FILES, plain_config, write_run
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.files import folder_written_whole
from tnreg.plots import save_figure, trajectory
from tnreg.tensors.loading import DenseTensor, load_tensor
from tnreg.training.fit import fit
from tnreg.training.tasks import Completion, completion, relative_error, root_mean_square
from tnreg.training.trajectory import Trajectory
from tnreg.trees.drawing import plain_label
from tnreg.trees.tree import ModeTree, read_tree


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one completion, whatever its tensor; the options of ``tnreg fit``.

    Attributes:
        tree: Gallery name, JSON file or nested lists; a binary tree if left out.
        observed: Share of the known entries that is observed; the rest tests.
        holdout: Share of the observed entries that is not trained on; the row that fits them best is kept.
        rank: Size of every bond.
        join: Kind of join at every node.
        root: "ones" fixes the weight of a diagonal root (CP without weights).
        steps: Updates.
        every: Updates between observations.
        lr: Learning rate.
        std: Standard deviation of the initial weights.
        optimizer: group-rmsprop (one step size for all weights) follows the theory; adam, lbfgs and sgd are
            gradients for practice; gauss-newton needs tens of steps, no lr, few weights and --every 1.
        missing: "nan": entries that are NaN were not measured.
        seed: Chooses the observed entries and the initial weights.
        device: Any torch device, e.g. cuda.
        dtype: Type of the weights.
    """

    tree: str | None = None
    observed: float = 0.3
    holdout: float = 0.1
    rank: int = 32
    join: Literal["diagonal", "full"] = "diagonal"
    root: Literal["trained", "ones"] = "trained"
    steps: int = 5000
    every: int = 25
    lr: float = 1e-2
    std: float = 0.1
    optimizer: Literal["group-rmsprop", "sgd", "adam", "lbfgs", "gauss-newton"] = "group-rmsprop"
    missing: Literal["nan"] | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of one completion.

    Attributes:
        tensor: Name or file, for ``tnreg.load_tensor``.
    """

    tensor: str = "il2"


tiny = Config(tree="htf-4", rank=4, steps=30, every=10, missing="nan")


def run(config: Config, folder: str | Path, *, progress: bool = False) -> dict[str, Any]:
    """Train, write the folder, and return its summary.

    Ctrl-C during the training ends it and writes what was recorded.
    """
    config = plain_config(config)
    tensor = load_tensor(config.tensor)
    tree = ModeTree.binary(tensor.values.ndim) if config.tree is None else read_tree(config.tree)
    if not 0 < config.observed < 1:
        message = f"observed must be a share between 0 and 1, found {config.observed!r}."
        raise OptionError(message, argument="observed")
    task, scale = scaled_task(tensor, config)
    trained, held = _hold_out(task, config.holdout)
    best = _Best(held)
    model = new_model(tree, task, config)
    with folder_written_whole(folder, "completion", (*RUN_FILES, "training.png")) as beside:
        start = time.perf_counter()
        recorded = train(model, trained, config, progress, **{"held-out error": best})
        if len(recorded) == 0:  # it ended before there was anything to keep
            raise (
                KeyboardInterrupt
                if recorded.stop_reason == "interrupted"
                else DataError(recorded.stop_reason)
            )
        model.load_state_dict(best.state)
        summary = {
            "tree": repr(tree),
            "observed entries": len(task.values),
            "of them held out": len(held.values),
            "unseen entries": len(_test_values(task)),
            "scale": scale,
            "weights": sum(p.numel() for p in model.parameters()),
            "seconds": time.perf_counter() - start,
            "stopped by": recorded.stop_reason,
            "kept step": int(recorded.steps[recorded["held-out error"].argmin()]),
            "final loss": float(recorded["loss"][-1]),
            "train error": trained.train_error(model),
            "held-out error": best.least,
            "test error": task.test_error(model),
            "test error of the mean": mean_error(task),
        }
        write_run(beside, "completion", config, recorded, in_units(model, scale), summary)
        figure(beside)
    return summary


def figure(folder: str | Path) -> Path:
    """Draw ``training.png`` of a run folder (again)."""
    path = Path(folder)
    recorded = Trajectory.load(path / "trajectory.npz")
    return save_figure(draw(recorded, recorded.names), path / "training.png")


def draw(found: Trajectory, names: Sequence[str], *, log: bool = True) -> Any:
    """Return a figure with one panel for each of the recorded names that hold real numbers."""
    from matplotlib.figure import Figure

    parts = {n: found[n].values() if isinstance(found[n], dict) else [found[n]] for n in names}
    names = [name for name in names if all(part.dtype.kind == "f" for part in parts[name])]
    figure = Figure(figsize=(4.2 * max(len(names), 1), 3.4), layout="constrained")
    for k, name in enumerate(names):
        trajectory(found, figure.add_subplot(1, len(names), k + 1), names=[name], log=log)
        figure.axes[k].set_title(plain_label(name))
    return figure


def scaled_task(tensor: DenseTensor, config: Settings) -> tuple[Completion, float]:
    """Return a tensor's completion task, known entries scaled to a mean square of 1, and the scale.

    Multiply by the scale to return to the unit of the data, as ``in_units`` does for a model.
    """
    if tensor.values.is_complex():
        raise DataError(
            f"{tensor.name} is complex; this experiment trains real factorizations.\n"
            "  use tnreg.completion and a Factorization with dtype=torch.complex128",
            argument="tensor",
        )
    # checked and scaled in double precision: squares of large or small data leave the range of floats
    task = completion(tensor.values.double(), config.observed, seed=config.seed, missing=config.missing)
    known = torch.cat([task.values, _test_values(task)])
    scale = root_mean_square(known) or 1.0
    scaled = Completion(
        task.index, task.values / scale, task.sizes, task.test_index, _test_values(task) / scale
    )
    return scaled.to(config.device, getattr(torch, config.dtype)), scale


def new_model(tree: ModeTree, task: Completion, config: Settings) -> Factorization:
    """Return an untrained factorization along a tree."""
    return Factorization(
        tree, task.sizes, config.rank, join=config.join, root=config.root, std=config.std,
        dtype=getattr(torch, config.dtype), device=config.device,
        generator=torch.Generator().manual_seed(config.seed),
    )  # fmt: skip


def train(
    model: Factorization, task: Completion, config: Settings, progress: bool, **observe: Any
) -> Trajectory:
    """Train a model on a task; record the loss, the test error, components of diagonal joins, and more."""
    observe["test error"] = task.test_error
    if "diagonal" in model.network.joins:
        observe["unbalancedness"] = Factorization.unbalancedness
        observe["components"] = Factorization.local_components
    return fit(
        model, task.loss, steps=config.steps, optimizer=config.optimizer, lr=config.lr,
        observe=observe, every=config.every, progress=progress,
    )  # fmt: skip


@torch.no_grad()
def in_units(model: Factorization, scale: float) -> Factorization:
    """Return a copy, for the data itself, of a model that was trained on scaled data.

    The scale is spread over all weights. They are of type float64 where floats could not hold the entries.
    """
    copied = copy.deepcopy(model) if 1e-30 < scale < 1e30 else copy.deepcopy(model).double()
    factor = scale ** (1 / len(copied.weights))
    copied.load_weights({node: weight * factor for node, weight in copied.weights.items()})
    return copied


def mean_error(task: Completion) -> float:
    """Return the held-out error of predicting the mean of the observed entries everywhere."""
    return relative_error(task.values.mean(), _test_values(task))


class _Best:
    """The error on entries held out; keeps the weights of the row where it was least."""

    def __init__(self, held: Completion) -> None:
        self.held, self.least = held, math.inf
        self.state: dict[str, Any] = {}

    def __call__(self, model: Factorization) -> float:
        error = self.held.train_error(model)
        if not self.state or error < self.least:
            self.least, self.state = error, copy.deepcopy(model.state_dict())
        return error


def _hold_out(task: Completion, share: float) -> tuple[Completion, Completion]:
    """Split off a share of the observed entries, which are in random order, at least one on either side."""
    if not 0 < check_number(share, "holdout") < 1:
        raise OptionError(f"holdout must be a share between 0 and 1, found {share!r}.", argument="holdout")
    if (count := len(task.values)) < 2:
        message = "a single entry is observed; one to train on and one to hold out are needed."
        raise DataError(message, argument="observed")
    k = min(max(1, round(share * count)), count - 1)
    parts = [(task.index[at], task.values[at]) for at in (slice(k, None), slice(k))]
    trained, held = (Completion(*part, task.sizes, task.test_index, task.test_values) for part in parts)
    return trained, held


def _test_values(task: Completion) -> torch.Tensor:
    """Return the held-out values, which a task made from a target has."""
    assert task.test_values is not None
    return task.test_values
