"""One training of ``locality``: a network, an image set, perhaps a penalty, into a run folder.

The loop is written out here: it has to be resumed bit for bit, penalties and random streams included.
Images stay on the device, as bytes where they are; all that is random is drawn on the CPU, and nothing in
a step waits for the device.

A run folder holds ``config.json``, ``model.safetensors``, and one row per epoch as ``trajectory.npz`` and
``history.csv``. While it trains, ``FOLDER.checkpoint`` beside it holds the state after some epoch, and
``FOLDER.history.csv`` the rows so far. A training that a deadline ends goes on from them, on any machine.

Under torchrun the processes train one network on parts of every batch, and rank 0 alone reads and writes
files. Updates are those of one process with the whole batch but for rounding and the masks of dropout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import RandomSampler

from tnreg.errors import DataError, OptionError, check_integer, check_number
from tnreg.experiments.folder import write_about
from tnreg.experiments.locality.augment import Augmentation
from tnreg.experiments.locality.settings import ARMS, Execution, Settings, penalty_of
from tnreg.experiments.locality.state import (
    FORMAT,
    check_travels,
    read_state,
    remove_state,
    rows_of,
    write_state,
    write_text,
)
from tnreg.experiments.nets import as_input, build
from tnreg.experiments.sweep.cell import Unfinished
from tnreg.far.modes import evaluation
from tnreg.far.scheduled import Draw
from tnreg.images.sets import ImageSet
from tnreg.machine.files import check_folder, folder_written_whole
from tnreg.machine.processes import Processes, joined
from tnreg.training.checkpoint import no_checkpoint
from tnreg.training.cuda_graph import CapturedSteps
from tnreg.training.trajectory import Trajectory

_FILES = ("config.json", "trajectory.npz", "model.safetensors", "history.csv")
_EXACT = Execution()
_EVALUATED = 500  # images at a time, when nothing is learned


def train(
    settings: Settings,
    arm: str,
    seed: int,
    data: ImageSet,
    test: ImageSet,
    folder: str | Path,
    *,
    before: Sequence[ImageSet] = (),
    checkpoint: str | Path | None = None,
    execution: Execution = _EXACT,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Train, write the folder, and return its summary.

    On a CPU the same settings give the same weights bit for bit, interrupted or not, but where a state that
    travels lost some of the momentum. Denormal numbers are flushed to zero while it runs: with them single
    steps of the penalties are ten times slower. Several processes (torchrun's, or those of a group of
    torch.distributed) all call this with the same arguments. Another number of them may go on from a
    checkpoint; dropout masks are then not those of the uninterrupted training.

    Args:
        settings: All but the two that follow. A run goes on only where they are the same.
        arm: What is added to plain training: one of ``ARMS``.
        seed: Draws the initial weights, the order of the images, and the patches.
        data: Training images.
        test: Test images. They choose nothing: the accuracy that counts is that of the last epoch.
        folder: Where the run goes.
        before: Sets of the pretraining, in their order: each for ``settings.pretrain_epochs``.
        checkpoint: Where the state is kept while it trains; ``FOLDER.checkpoint`` if left out.
        execution: How it is carried out.
        deadline: Reading of ``time.monotonic()`` before which the training ends, with its state written. No
            epoch is begun that would end too late if it took half as long again as the longest so far.

    Returns:
        Accuracies of the last epoch, epochs, processes, and seconds of training, evaluation not
        counted, of an epoch their median in this process; processor seconds are those of all processes.

    Raises:
        TnregError: Settings that do not fit each other, or a checkpoint of other settings.
        DataError: The loss is not finite any more.
        Unfinished: The deadline came first. The same call goes on.
        ProcessLost: Another process of this training ended. The message names the checkpoint.
    """
    if arm not in ARMS:
        raise OptionError(f"no arm {arm!r}; there is {', '.join(ARMS)}.", argument="arm")
    for name in ("epochs", "stop_epochs", "batch", "test_every"):
        check_integer(getattr(settings, name), 1, f"locality: {name}")
    if settings.optimizer not in ("sgd", "adam"):
        message = f"locality: no optimizer {settings.optimizer!r}; there is sgd, adam."
        raise OptionError(message, argument="optimizer")
    check_integer(settings.pretrain_epochs, 0, "locality: pretrain_epochs")
    check_number(settings.sam, "locality: sam", 0)
    run = _Run({"arm": arm, "seed": seed, **dataclasses.asdict(settings)})

    def places() -> tuple[Path, Path]:
        place = check_folder(folder, "locality_run", _FILES)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place, Path(checkpoint or place.with_name(f"{place.name}.checkpoint"))

    with joined(settings.device, run) as processes:
        device = processes.device
        run.folder, run.checkpoint = processes.from_first(places)
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), _fast():
            torch.manual_seed(seed)
            state = _State(settings, arm, seed, data, processes, execution, before)
            try:
                return _train(state, test, run, deadline)
            finally:
                state.graphs = None  # they hold the state, and memory of the device


def _train(state: _State, test: ImageSet, run: _Run, deadline: float) -> dict[str, Any]:
    """Train from the checkpoint, if there is one, to the run folder."""
    from_first, execution = state.processes.from_first, state.execution
    name = run.checkpoint.name.removesuffix(".checkpoint")
    history = run.checkpoint.with_name(f"{name}.history.csv")

    def decide(flag: bool) -> bool:
        return from_first(lambda: flag)

    state.read(run)
    test_x, test_y = (part.to(state.x.device) for part in _tensors(test))
    longest = state.spent["seconds"] / max(len(state.rows), 1)
    written = time.monotonic()
    while not state.stopped():
        # of the longest epoch and half of it more, for the state and what else has to end
        if decide(time.monotonic() + 1.5 * longest >= deadline):
            if run.epochs < len(state.rows):
                state.write(run)
            raise Unfinished(f"the time is over; {run}")
        began = time.monotonic()
        row = state.epoch()
        epoch = len(state.rows) + 1
        tested = epoch % state.settings.test_every == 0
        row["test accuracy"] = state.accuracy(test_x, test_y) if tested else math.nan
        state.rows.append(epoch, row)
        from_first(lambda: write_text(history, rows_of(state.rows)))
        if decide(time.monotonic() - written >= execution.checkpoint_seconds):
            state.write(run)
            written = time.monotonic()
        longest = max(longest, time.monotonic() - began)
    summary = state.summary(state.accuracy(test_x, test_y))

    def write_run() -> dict[str, Any]:
        with folder_written_whole(run.folder, "locality_run", _FILES) as beside:
            if execution.model_file:
                save_model(state.net, str(beside / "model.safetensors"))
            state.rows.save(beside / "trajectory.npz")
            (beside / "history.csv").write_text(rows_of(state.rows), encoding="utf-8")
            write_about(beside, "locality_run", config=run.about, inputs=state.inputs, summary=summary)
        remove_state(run.checkpoint)
        history.unlink(missing_ok=True)
        return summary

    return from_first(write_run)


@dataclasses.dataclass
class _Run:
    """Where a run goes, and what can be said of its checkpoint when the training cannot go on."""

    about: dict[str, Any]
    folder: Path = Path()
    checkpoint: Path = Path()
    epochs: int = 0  # that the checkpoint has

    def __str__(self) -> str:
        if not self.epochs:
            return "no state was written yet; the same command starts again"
        state = f"the state after epoch {self.epochs} is in {self.checkpoint}"
        return f"{state}; the same command goes on from there"


class _State:
    """Everything that changes along a training."""

    def __init__(
        self,
        settings: Settings,
        arm: str,
        seed: int,
        data: ImageSet,
        processes: Processes,
        execution: Execution,
        before: Sequence[ImageSet] = (),
    ) -> None:
        self.settings, self.seed = settings, seed
        self.processes, self.execution = processes, execution
        device = processes.device
        dropout = settings.dropout if arm == "dropout" else 0.0
        decay = settings.weight_decay if arm == "weight-decay" else 0.0
        net = build(settings.model, data.images.shape[1], dropout=dropout)
        net = net.double() if settings.precision == "float64" else net
        # channels last: a fifth faster on a CPU, with and without gradient change
        self.net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.passed = 0  # images through the network in this epoch and process, of penalties as well
        self.net.register_forward_pre_hook(self._count)
        self.wrapped: nn.Module = self.net
        if processes.count > 1:
            _check_batches(len(data.images), settings.batch, processes.count)
            self.wrapped = _distributed(self.net, processes)
        weights = self.net.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(weights, settings.lr, settings.momentum, weight_decay=decay)
            if settings.optimizer == "sgd"
            else torch.optim.Adam(weights, settings.lr, weight_decay=decay, capturable=execution.graph)
        )
        self.penalty = penalty_of(settings, arm, seed, data)
        self.climbs = arm == "sam"
        self.shuffle = torch.Generator().manual_seed(seed)
        self.augment = Augmentation(settings, seed)
        self.rows = Trajectory()
        self.spent = {"cpu seconds": 0.0, "seconds": 0.0, "images": 0.0}
        self.epoch_seconds: list[float] = []  # in this process
        self.resumed: list[dict[str, Any]] = []
        self.data, self.before = data, [one for one in before for _ in range(settings.pretrain_epochs)]
        self._show(data)
        self.inputs = _standard(data) if settings.standardize else None
        self.scale = [
            torch.tensor(numbers, dtype=_dtype(settings), device=device).view(-1, 1, 1)
            for numbers in (self.inputs or {}).values()
        ]
        # of the epoch so far: loss of the images, right answers, penalty
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        if execution.portable:
            check_travels(self.net)
        self.graphs: CapturedSteps | None = None
        if execution.graph:
            check_graph(device, processes.count)
            self.graphs = CapturedSteps(self.step, device)

    def _count(self, net: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.passed += len(inputs[0])

    def _show(self, data: ImageSet) -> None:
        """Put training images on the device; on the CPU they stay for what is drawn."""
        self.shown, device = data, self.processes.device
        self.host, labels = _tensors(data)
        self.x, self.y = self.host.to(device), labels.to(device)

    def epoch(self) -> dict[str, float]:
        """Go once over the images; return mean loss, mean penalty where there was one, train accuracy."""
        data = (*self.before, self.data)[min(len(self.rows), len(self.before))]
        if data is not self.shown:
            self._show(data)
        cpu, wall = time.process_time(), time.perf_counter()
        self.net.train()
        self.sums.zero_()
        self.passed = 0
        if self.processes.rank:  # masks of dropout of its own in each epoch; all else is drawn alike
            own = np.random.SeedSequence([self.seed, self.processes.rank, len(self.rows)])
            torch.manual_seed(int(own.generate_state(1)[0]))
        shown, penalized = self.steps()
        sums = self.sums.tolist()  # on a GPU this waits for the epoch
        sums += [time.process_time() - cpu, self.passed]
        self.epoch_seconds.append(time.perf_counter() - wall)
        self.spent["seconds"] += self.epoch_seconds[-1]
        total = self.processes.sum(torch.tensor(sums, dtype=torch.float64, device=self.x.device))
        if not bool(torch.isfinite(total).all()):
            message = f"the loss is not finite in epoch {len(self.rows) + 1}"
            raise DataError(f"{message}; take a smaller lr or penalty.")
        loss, right, penalty, cpu_seconds, passed = total.tolist()
        self.spent["cpu seconds"] += cpu_seconds
        self.spent["images"] += passed / shown
        return {
            "loss": loss / shown,
            "penalty": penalty / self.processes.count / penalized if penalized else 0.0,
            "train accuracy": right / shown,
        }

    def steps(self) -> tuple[int, int]:
        """Do an epoch's updates without waiting for the device; return images shown, steps with a penalty."""
        order = torch.tensor(list(RandomSampler(self.host, generator=self.shuffle)))
        there = order.to(self.x.device, non_blocking=True)
        penalized = first = 0
        for size in _sizes(len(order), self.settings.batch):
            whole = order[first : first + size]
            own, own_there = self._own(whole), self._own(there[first : first + size])
            changed = [self._own(part) for part in self.augment.draw(whole, self.host.shape[1:])]
            penalty = self.penalty if self.shown is self.data else None
            weight = 0.0 if penalty is None else penalty.next_weight()
            drawn = self._draw(own, own_there) if weight else None
            # gradients are averaged over processes, whose parts may differ by one image
            self.update(own_there, weight, drawn, changed, self.processes.count * len(own) / size)
            penalized += weight > 0
            first += size
        return first, penalized

    def _own(self, x: Tensor) -> Tensor:
        """Return this process's part of some rows; the first parts are larger by one."""
        return x.tensor_split(self.processes.count)[self.processes.rank]

    def _draw(self, order: Tensor, there: Tensor) -> Draw:
        """Draw for the penalty of a batch, from the images on the CPU where that will do."""
        assert self.penalty is not None
        if getattr(self.penalty.patches, "shape_only", False) and self.processes.count == 1:
            # few different shapes for a GPU; on a CPU no image more than needed
            multiple = 1 if self.x.device.type == "cpu" else 8
            return self.penalty.draw(self.wrapped, self.host[order], multiple=multiple).to(self.x.device)
        return self.penalty.draw(self.wrapped, self._as_it_is(there)[0])

    def update(
        self,
        index: Tensor,
        weight: float,
        drawn: Draw | None,
        changed: Sequence[Tensor] = (),
        share: float = 1.0,
    ) -> None:
        """Do one step, as a CUDA graph where that is asked for; see ``step``."""
        pair = () if drawn is None else (drawn.pair, drawn.samples, drawn.columns)
        given = [part for part in (*changed, *pair) if part is not None]
        if self.graphs is None:
            there = [part.to(self.x.device, non_blocking=True) for part in given]
            self.step(index, weight, *there, share=share)
        else:
            self.graphs(index, torch.tensor(weight, dtype=_dtype(self.settings)), *given)

    def step(self, index: Tensor, weight: float | Tensor, *given: Tensor, share: float = 1.0) -> None:
        """Update once by the images of some numbers.

        ``given`` is what their augmentation has drawn, then what the penalty has drawn; without that there
        is no penalty. ``share`` is a factor of the loss.
        """
        changed, drawn = given[: self.augment.drawn], given[self.augment.drawn :]
        images, labels = self.augment(self._as_it_is, index, changed)
        penalty = None
        with _precision(self.settings):
            if self.penalty is None or not drawn:
                logits = self.wrapped(images)
            else:
                draw = Draw(*drawn) if len(drawn) > 1 else Draw(drawn[0], None)
                if changed:  # what is drawn afresh would count as interaction
                    logits = self.wrapped(images)
                    value = self.penalty.value(self.wrapped, *self._as_it_is(index), draw)
                else:
                    logits, value = self.penalty.with_logits(self.wrapped, images, labels, draw)
                penalty = weight * value
            loss = _loss(logits, labels)
            total = loss * share if penalty is None else loss * share + penalty
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        if self.climbs:
            self._climb(images, labels, share)
        self.optimizer.step()
        with torch.no_grad():
            self.sums[0] += loss.detach() * len(labels)
            self.sums[1] += _right(logits, labels)
            if penalty is not None:
                self.sums[2] += penalty.detach()

    def _climb(self, images: Tensor, labels: Tensor, share: float) -> None:
        """Replace gradients by those at weights that lie ``sam`` up the gradient (Foret et al. 2021).

        Running statistics are those of the pass before.
        """
        weights = [p for p in self.net.parameters() if p.grad is not None]
        before, gradients = [p.detach().clone() for p in weights], [p.grad for p in weights]
        length = torch.stack(torch._foreach_norm(gradients)).norm().clamp(min=1e-12)
        with torch.no_grad():
            torch._foreach_add_(weights, torch._foreach_mul(gradients, self.settings.sam / length))
        self.optimizer.zero_grad(set_to_none=True)
        with evaluation(self.net, "batch"), _precision(self.settings):
            torch.autograd.backward(_loss(self.wrapped(images), labels) * share)
        with torch.no_grad():
            torch._foreach_copy_(weights, before)

    def _as_it_is(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return images and labels of some numbers, without augmentation."""
        return self._scaled(self.x[index]), self.y[index]

    def _scaled(self, x: Tensor) -> Tensor:
        """Return images as the network takes them."""
        images = as_input(x, _dtype(self.settings))
        return (images - self.scale[0]) / self.scale[1] if self.scale else images

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Return the share of right answers, in evaluation mode; every process looks at its part."""
        self.net.eval()
        right = torch.zeros((), dtype=torch.int64, device=x.device)
        parts = (torch.split(self._own(part), _EVALUATED) for part in (x, y))
        for images, labels in zip(*parts, strict=True):
            with _precision(self.settings):
                logits = self.net(self._scaled(images))
            right += _right(logits, labels)
        self.net.train()
        return int(self.processes.sum(right)) / len(y)

    def stopped(self) -> bool:
        """Return whether this is the last epoch, or there were enough good ones in a row; note which."""
        epochs, wanted = len(self.rows), self.settings.stop_epochs
        enough = epochs - len(self.before) >= wanted
        last = self.rows.last("train accuracy", wanted) if enough else [-math.inf]
        good = bool(min(last) >= self.settings.stop_above)
        ended = epochs >= self.settings.epochs
        if ended or good:
            self.rows.stop_reason = "epochs" if ended else "train accuracy"
        return ended or good

    def summary(self, test_accuracy: float) -> dict[str, Any]:
        """Return what a finished training has reached, and what it took."""
        seconds = self.epoch_seconds
        return {
            **{name: float(self.rows[name][-1]) for name in self.rows.names},
            "test accuracy": test_accuracy,
            "epochs": len(self.rows),
            **self.spent,
            "images": None if self.graphs else self.spent["images"] / len(self.rows),
            "seconds an epoch": float(np.median(seconds)) if seconds else None,
            "processes": self.processes.count,
            **({"resumed": self.resumed} if self.resumed else {}),
            "device": self.x.device.type,
            "stopped by": self.rows.stop_reason,
        }

    def _parts(self) -> dict[str, Any]:
        """Return what has a state of its own, by its name in the checkpoint."""
        parts = {"net": self.net, "optimizer": self.optimizer, "penalty": self.penalty}
        return {name: part for name, part in parts.items() if part is not None}

    def write(self, run: _Run) -> None:
        """Have rank 0 write the state."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        state = {
            "format": FORMAT,
            "about": json.dumps(run.about),
            "penalty": None,
            **{name: part.state_dict() for name, part in self._parts().items()},
            "shuffle": self.shuffle.get_state(),
            "augment": self.augment.stream.get_state(),
            "random": torch.get_rng_state(),
            "cuda": cuda,
            "spent": self.spent,
            "resumed": self.resumed,
            "device": _device_name(self.x.device),
            "found": torch.frombuffer(bytearray(self.rows.to_bytes()), dtype=torch.uint8),
        }
        portable = self.execution.portable
        self.processes.from_first(lambda: write_state(run.checkpoint, state, portable=portable))
        run.epochs = len(self.rows)

    def read(self, run: _Run) -> None:
        """Go on from the checkpoint that rank 0 has, if it has one."""
        path = run.checkpoint
        from_first = self.processes.from_first
        state = from_first(lambda: read_state(path, run.about) if path.exists() else None)
        if state is None:
            return
        try:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
            self.shuffle.set_state(state["shuffle"])
            self.augment.stream.set_state(state["augment"])
            torch.set_rng_state(state["random"])
            if state["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda"])
            self.spent = dict(state["spent"])
            self.rows = Trajectory.from_bytes(state["found"].numpy().tobytes())
            now = {"epoch": len(self.rows), "momentum": state.get("momentum", "exact")}
            devices = {"from": state["device"], "on": _device_name(self.x.device)}
            self.resumed = [*state["resumed"], now | devices]
        except Exception as error:  # the training ends here, so that nothing has to be put back
            raise no_checkpoint(path, error, "folder") from None
        run.epochs = len(self.rows)


def check_graph(device: torch.device, processes: int) -> None:
    """Raise an ``OptionError`` where steps cannot be CUDA graphs."""
    if device.type != "cuda" or processes > 1:
        message = f"graph needs a CUDA device and one process, found {device} and {processes}."
        raise OptionError(f"locality: {message}\n  leave graph out", argument="graph")


def _sizes(count: int, batch: int) -> list[int]:
    """Return the images of every batch of an epoch; a last one of one image is left out."""
    last = count % batch
    return [batch] * (count // batch) + ([last] if last > 1 else [])


def _check_batches(count: int, batch: int, processes: int) -> None:
    """Raise an ``OptionError`` where a batch has fewer images than there are processes."""
    fitting = [size for size in range(processes, count + 1) if min(_sizes(count, size)) >= processes]
    if min(batch, count) in fitting:
        return
    nearest = min(fitting, key=lambda size: abs(size - batch), default=0)
    instead = f"take e.g. batch {nearest}" if nearest else f"take {count} processes or fewer"
    message = f"{count} images in batches of {batch} leave {count % batch or batch} for a last batch"
    message += f" of {processes} processes, and each needs an image of it; {instead}."
    raise OptionError(f"locality: {message}", argument="batch")


def _distributed(net: nn.Module, processes: Processes) -> nn.Module:
    """Return the network for parts of a batch, normalized by the statistics of the whole batch."""
    if processes.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(net, processes.group)  # type: ignore[no-untyped-call]
    elif any(isinstance(m, _BatchNorm) for m in net.modules()):
        message = "the network has batch normalization, which torch shares between processes on GPUs only"
        more = "take the device cuda, one process, or a network without it such as small-cnn."
        raise OptionError(f"locality: {message}; {more}", argument="model")
    return nn.parallel.DistributedDataParallel(net, process_group=processes.group)


def _tensors(data: ImageSet) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(data.images), torch.from_numpy(data.labels)


def _dtype(settings: Settings) -> torch.dtype:
    return torch.float64 if settings.precision == "float64" else torch.float32


def _standard(data: ImageSet) -> dict[str, list[float]]:
    """Return mean and standard deviation of every channel, of images as networks get them without.

    Of pairs those of the two images, without the canvas.
    """
    images = torch.from_numpy(data.images)
    shown = [images[:, :, a:c, b:d] for a, b, c, d in data.boxes] or [images]

    def mean_of(function: Callable[[Tensor], Tensor]) -> Tensor:
        # not all in double precision at once
        parts = (part for pixels in shown for part in torch.split(pixels, _EVALUATED))
        sums = (function(as_input(part, torch.float64)).sum((0, 2, 3)) for part in parts)
        return sum(sums, torch.zeros(1, dtype=torch.float64)) / sum(part[:, 0].numel() for part in shown)

    mean = mean_of(lambda part: part)
    deviation = mean_of(lambda part: (part - mean.view(-1, 1, 1)).square()).sqrt()
    return {"mean": mean.tolist(), "deviation": deviation.clamp(min=1e-12).tolist()}


def _device_name(device: torch.device) -> str:
    """Return the device as a summary names it."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def _loss(out: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy with classes ``(B,)``, or their shares ``(B, 2)``."""
    logits = (out if out.dtype == torch.float64 else out.float()).reshape(len(labels), -1)
    if logits.shape[1] == 1:
        wanted = labels[:, 1] if labels.ndim == 2 else labels
        return F.binary_cross_entropy_with_logits(logits[:, 0], wanted.to(logits.dtype))
    if labels.ndim == 2:
        labels = F.pad(labels.to(logits.dtype), (0, logits.shape[1] - 2))
    return F.cross_entropy(logits, labels)


def _right(out: Tensor, labels: Tensor) -> Tensor:
    """Return how many answers are right; of two classes that are mixed the larger share counts."""
    logits = out.reshape(len(labels), -1)
    answers = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)
    return (answers == (labels.argmax(1) if labels.ndim == 2 else labels)).sum()


def _precision(settings: Settings) -> Any:
    half = settings.precision == "bfloat16"
    kind = torch.device(settings.device).type
    return torch.autocast(kind, torch.bfloat16) if half else contextlib.nullcontext()


@contextlib.contextmanager
def _fast() -> Iterator[None]:
    """Flush denormal numbers to zero on a CPU; let cuDNN try its algorithms on a GPU."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.backends.cudnn.benchmark = before
