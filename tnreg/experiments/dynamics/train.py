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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tnreg.dynamics import predicted_rate, predicted_singular_rate
from tnreg.errors import DataError, FileError, OptionError
from tnreg.experiments.dynamics.pictures import (
    rates_figure,
    spectra_figure,
    training_figure,
)
from tnreg.experiments.dynamics.tracked import tracks
from tnreg.experiments.folder import read_run, write_run
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.files import check_folder, folder_written_whole
from tnreg.plots import save_figure
from tnreg.ranks.dense import effective_rank, numerical_rank
from tnreg.ranks.spectra import hierarchical_rank, spectra
from tnreg.tensors.arrays import as_tensor, check_numbers, matricize
from tnreg.tensors.loading import load_tensor
from tnreg.training.fit import fit
from tnreg.training.optim import GroupRMSprop
from tnreg.training.tasks import Completion, Sensing, completion, relative_error, sensing
from tnreg.training.trajectory import Trajectory
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree, read_tree

Preset = Literal["mf", "cp", "htf", "htf-small", "tiny"]


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

    model: Preset = "htf"
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
    place = check_folder(folder)
    kept = Path(checkpoint or place.with_name(f"{place.name}.checkpoint"))
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
    resumed, start = kept.exists(), time.perf_counter()
    found = fit(
        model, task.loss, steps=config.steps, optimizer=optimizer, observe=observe.functions,
        every=config.every, stop=_stays_below(config.stop_below, config.stop_checks),
        progress=progress, checkpoint=kept, checkpoint_seconds=checkpoint_seconds,
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
        write_run(beside, "dynamics", config, found, model, summary)
        if pictures:
            figure(beside)
    kept.unlink(missing_ok=True)
    return summary


def row(summary: dict[str, Any]) -> dict[str, Any]:
    """The few numbers of a summary that stand for it in a table of several runs."""
    largest = list(summary["components"].values())[-1] if "components" in summary else []
    return {
        "steps": summary["steps"],
        "loss": summary["loss"],
        "test error": summary.get("test error"),
        "components above 1 %": sum(c > 0.01 * largest[0] for c in largest),
        "effective rank": max(summary["effective rank"].values()),
    }


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
    costs a quarter of the factored spectra. Its singular values are computed on the CPU, as a GPU takes
    longer for matrices this small. A large one is made dense only for off-tree sets, if asked for.
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
            self.spectra = spectra(self.dense.double().cpu(), model.tree)
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
        dense = model.to_tensor().double() if self.dense is None else self.dense.double().cpu()
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
            rates = predicted_rate(model, self.task.loss, norms=self.norms)
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


def figure(folder: str | Path) -> Path:
    """Draw the pictures of a run folder (again); returns ``dynamics.png``."""
    one = read_run(folder)
    save_figure(spectra_figure(one), one.folder / "spectra.png")
    if "predicted rate" in one.found:
        save_figure(rates_figure(one), one.folder / "rates.png")
    return save_figure(training_figure(one), one.folder / "dynamics.png")
