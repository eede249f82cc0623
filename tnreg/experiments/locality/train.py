"""One training of ``locality``: a network, an image set, perhaps a penalty, into a run folder.

The loop is written out here, with torch's own sampler. It is some twenty lines and has to be resumed bit
for bit, penalties and random streams included; a trainer library would be a dependency for everyone,
larger than the loop, and would hide just these lines. Images stay on the device, as bytes where they are;
all that is random is drawn on the CPU, and nothing in a step waits for the device.

A run folder holds ``config.json``, ``model.safetensors``, and one row per epoch as ``trajectory.npz`` and
``history.csv``. While it trains, ``FOLDER.checkpoint`` beside it holds the state after some epoch, and
``FOLDER.history.csv`` the rows so far. A training that a deadline ends leaves these two, and goes on from
them, on this machine or on another.

Under torchrun the processes train one network on parts of every batch: its updates are those of one
process with the whole batch, penalties included, but for rounding. Only dropout draws masks of its own in
every process. Rank 0 alone reads and writes files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from tnreg.errors import DataError, OptionError, check_integer
from tnreg.experiments.locality.settings import ARMS, Execution, Settings, penalty_of
from tnreg.experiments.locality.state import (
    FORMAT,
    History,
    check_travels,
    read_state,
    remove_state,
    rows_of,
    write_state,
)
from tnreg.experiments.nets import as_input, build
from tnreg.experiments.sweep.cell import Unfinished
from tnreg.far.scheduled import Draw
from tnreg.images.sets import ImageSet
from tnreg.machine.files import check_folder, folder_written_whole
from tnreg.machine.processes import Processes, ProcessLost, joined
from tnreg.machine.versions import versions
from tnreg.training.checkpoint import no_checkpoint
from tnreg.training.cuda_graph import CapturedSteps
from tnreg.training.trajectory import Trajectory

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
    about: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    execution: Execution = _EXACT,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Train, write the folder, and return its summary.

    On a CPU the same settings give the same weights bit for bit, interrupted or not, but where a state that
    travels lost some of the momentum. Denormal numbers are flushed to zero while it runs; single steps of
    the penalties are ten times slower with them.

    Started by torchrun, or where torch.distributed has a group already, all its processes call this with
    the same arguments and train together. A checkpoint may be resumed by another number of processes;
    dropout masks are then not those of the uninterrupted training.

    Args:
        settings: All but the two that follow.
        arm: What is added to plain training: one of ``ARMS``.
        seed: Draws the initial weights, the order of the images, and the patches.
        data: Training images.
        test: Test images. They choose nothing: the accuracy that counts is that of the last epoch.
        folder: Where the run goes.
        about: What made the sets, for ``config.json``; a run goes on only where it is the same.
        checkpoint: Where the state is kept while it trains, ``.checkpoint`` at its end;
            ``FOLDER.checkpoint`` if left out.
        execution: How it is carried out.
        deadline: Reading of ``time.monotonic()`` before which the training ends, with its state written. No
            epoch is begun that would end too late if it took half as long again as the longest so far; how
            long the first one takes is not known.

    Returns:
        Accuracies of the last epoch, epochs, processes, and seconds of training, evaluation not
        counted, of an epoch their median in this process; processor seconds are those of all processes.

    Raises:
        TnregError: Settings that do not fit each other, or a checkpoint of other settings.
        DataError: The loss is not finite any more.
        Unfinished: The deadline came first. The same call goes on.
        ProcessLost: Another process of this training ended. The message names the checkpoint, from which
            the same call goes on.
    """
    if arm not in ARMS:
        raise OptionError(f"no arm {arm!r}; there is {', '.join(ARMS)}.")
    for name in ("epochs", "stop_epochs", "batch", "test_every"):
        check_integer(getattr(settings, name), 1, f"locality: {name}")
    told = {"arm": arm, "seed": seed, **(about or {}), **dataclasses.asdict(settings)}
    saved = _Saved()
    try:
        with joined(settings.device) as processes:
            _check_batches(len(data.images), settings.batch, processes.count)
            place, saved.path = processes.from_first(lambda: _places(folder, checkpoint))
            device = processes.device
            cuda = [device] if device.type == "cuda" else []
            with torch.random.fork_rng(devices=cuda), _fast():
                torch.manual_seed(seed)
                state = _State(settings, arm, seed, data, processes, execution)
                try:
                    return _train(state, test, place, told, saved, deadline)
                finally:
                    state.graphs = None  # they hold the state, and memory of the device
    except ProcessLost as lost:
        raise ProcessLost(f"{lost}\n  {saved}") from None


def _train(
    state: _State,
    test: ImageSet,
    place: Path,
    told: dict[str, Any],
    saved: _Saved,
    deadline: float,
) -> dict[str, Any]:
    """Train from the checkpoint, if there is one, to the run folder."""
    processes, execution = state.processes, state.execution
    state.read(saved.path, told)
    saved.epochs = saved.written = len(state.found)
    history = History(saved.path)
    test_x, test_y = (part.to(processes.device) for part in _tensors(test))
    longest = state.seconds["seconds"] / max(len(state.found), 1)
    at = time.monotonic()
    while not state.stopped():
        # of the longest epoch and half of it more, for the state and what else has to end
        late = time.monotonic() + 1.5 * longest >= deadline
        if processes.from_first(lambda late=late: late):  # type: ignore[misc]
            if saved.written < saved.epochs:
                state.write(saved.path, told)
                saved.written = saved.epochs
            raise _unfinished(state, saved)
        began = time.monotonic()
        row = state.epoch()
        tested = (len(state.found) + 1) % state.settings.test_every == 0
        row["test accuracy"] = state.accuracy(test_x, test_y) if tested else math.nan
        state.found.append(len(state.found) + 1, row)
        saved.epochs = len(state.found)
        processes.from_first(lambda: history.add(state.found))
        due = time.monotonic() - at >= execution.checkpoint_seconds
        if processes.from_first(lambda due=due: due):  # type: ignore[misc]
            state.write(saved.path, told)
            saved.written, at = saved.epochs, time.monotonic()
        longest = max(longest, time.monotonic() - began)
    summary = state.summary(state.accuracy(test_x, test_y))

    def write() -> dict[str, Any]:
        with folder_written_whole(place) as beside:
            if execution.model_file:
                save_model(state.net, str(beside / "model.safetensors"))
            state.found.save(beside / "trajectory.npz")
            (beside / "history.csv").write_text(rows_of(state.found), encoding="utf-8")
            held = {
                **versions(), "experiment": "locality_run", "config": told,
                "inputs": state.inputs, "summary": summary,
            }  # fmt: skip
            (beside / "config.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        remove_state(saved.path)
        history.path.unlink(missing_ok=True)
        return summary

    return processes.from_first(write)


def _unfinished(state: _State, saved: _Saved) -> Unfinished:
    """What is said of a training that its deadline ended."""
    so_far: dict[str, Any] = {"epochs": saved.epochs, "of": state.settings.epochs}
    if saved.epochs:
        so_far |= {name: float(state.found[name][-1]) for name in state.found.names}
        tested = state.found["test accuracy"]
        so_far["test accuracy"] = next((float(a) for a in tested[::-1] if a == a), None)
    return Unfinished(f"the time is over; {saved}", so_far)


class _Saved:
    """What can be told of the checkpoint when the training cannot go on."""

    def __init__(self) -> None:
        self.path, self.epochs, self.written = Path(), 0, 0

    def __str__(self) -> str:
        if not self.written:
            return "no state was written yet; the same command starts again"
        return (
            f"the state after epoch {self.written} is in {self.path}; "
            "the same command goes on from there"
        )


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
    ) -> None:
        dropout = settings.dropout if arm == "dropout" else 0.0
        decay = settings.weight_decay if arm == "weight-decay" else 0.0
        net = build(settings.model, data.images.shape[1], dropout=dropout)
        net = net.double() if settings.precision == "float64" else net
        net = _normalized_together(net, processes)
        # channels last: a fifth faster on a CPU, with and without gradient change
        self.net = net.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.processes, self.execution = processes, execution
        self.shared = self.net if processes.count == 1 else _wrapped(self.net, processes)
        if processes.rank:  # masks of its own; all other random numbers are drawn alike
            torch.manual_seed(
                int(np.random.SeedSequence([seed, processes.rank]).generate_state(1)[0])
            )
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), settings.lr, settings.momentum, weight_decay=decay
        )
        self.penalty = penalty_of(settings, arm, seed, data)
        self.shuffle = torch.Generator().manual_seed(seed)
        self.found = Trajectory()
        self.seconds = {"cpu seconds": 0.0, "seconds": 0.0}
        self.took: list[float] = []  # seconds of every epoch in this process
        self.resumed: list[dict[str, Any]] = []
        self.settings = settings
        self.host, labels = _tensors(data)
        self.x, self.y = (part.to(processes.device) for part in (self.host, labels))
        self.inputs = _standard(data) if settings.standardize else None
        self.scale = _scale(self.inputs, settings, processes.device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=processes.device)
        if execution.portable:
            check_travels(self.net)
        self.graphs: CapturedSteps | None = None
        if execution.graph:
            check_graph(processes.device, processes.count)
            self.graphs = CapturedSteps(self._step_of_tensors, processes.device)

    def epoch(self) -> dict[str, float]:
        """Go once over the images: mean loss, mean penalty where there was one, train accuracy."""
        start = time.process_time(), time.perf_counter()
        self.net.train()
        self.sums.zero_()
        shown, penalized = self.steps()
        mine = self.sums.tolist()  # on a GPU this waits for the epoch to be done
        mine.append(time.process_time() - start[0])
        self.took.append(time.perf_counter() - start[1])
        self.seconds["seconds"] += self.took[-1]
        every = self.processes.sum(torch.tensor(mine, dtype=torch.float64, device=self.x.device))
        if not bool(torch.isfinite(every).all()):
            raise DataError(
                f"the loss is not finite in epoch {len(self.found) + 1}; take a smaller lr or penalty."
            )
        loss_sum, right, extra_sum, seconds = every.tolist()
        self.seconds["cpu seconds"] += seconds
        return {
            "loss": loss_sum / shown,
            "penalty": extra_sum / self.processes.count / penalized if penalized else 0.0,
            "train accuracy": right / shown,
        }

    def steps(self) -> tuple[int, int]:
        """Do the updates of an epoch without waiting for the device; images shown, steps with a penalty."""
        order = torch.tensor(list(RandomSampler(self.host, generator=self.shuffle)))
        there = order.to(self.x.device, non_blocking=True)
        penalized = first = 0
        for size in _sizes(len(order), self.settings.batch):
            part = self.processes.part(size)
            own = slice(first + part.start, first + part.stop)
            weight = 0.0 if self.penalty is None else self.penalty.next_weight()
            drawn = self._draw(order[own], there[own]) if weight else None
            # gradients are averaged over processes, whose parts may differ by one image
            share = self.processes.count * (part.stop - part.start) / size
            self.update(there[own], weight, drawn, share)
            penalized += weight > 0
            first += size
        return first, penalized

    def _draw(self, order: Tensor, there: Tensor) -> Draw:
        """Draw for the penalty of a batch, from the images on the CPU where that will do."""
        assert self.penalty is not None
        if getattr(self.penalty.patches, "shape_only", False) and self.processes.count == 1:
            # few different shapes for a GPU; on a CPU no image more than needed
            multiple = 1 if self.x.device.type == "cpu" else 8
            drawn = self.penalty.draw(self.shared, self.host[order], multiple=multiple)
            return drawn.to(self.x.device)
        return self.penalty.draw(self.shared, self._images(there))

    def update(self, index: Tensor, weight: float, drawn: Draw | None, share: float = 1.0) -> None:
        """Do one step, as a CUDA graph where that is asked for."""
        if self.graphs is None:
            self.step(index, share, weight, drawn)
            return
        more = () if drawn is None else (drawn.pair, drawn.samples)
        changing = torch.tensor(weight, dtype=_dtype(self.settings))
        self.graphs(index, changing, *(t for t in more if t is not None))

    def _step_of_tensors(
        self,
        index: Tensor,
        weight: Tensor,
        pair: Tensor | None = None,
        samples: Tensor | None = None,
    ) -> None:
        drawn = None if pair is None else Draw(pair, samples, (len(index),))
        self.step(index, 1.0, weight, drawn)

    def step(self, index: Tensor, share: float, weight: float | Tensor, drawn: Draw | None) -> None:
        """Update once.

        Args:
            index: Numbers of the images, on the device.
            share: Factor of the loss.
            weight: That of the penalty.
            drawn: What the penalty has drawn; ``None`` where there is none.
        """
        images, labels = self._images(index), self.y[index]
        with _precision(self.settings):
            if drawn is None or self.penalty is None:
                out, extra = self.shared(images), None
            else:
                out, value = self.penalty.with_logits(self.shared, images, labels, drawn)
                extra = weight * value
            loss = _loss(out, labels)
            total = loss * share if extra is None else loss * share + extra
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        self.optimizer.step()
        with torch.no_grad():
            self.sums[0] += loss.detach() * len(labels)
            self.sums[1] += _right(out, labels)
            if extra is not None:
                self.sums[2] += extra.detach()

    def _images(self, index: Tensor) -> Tensor:
        return self._scaled(self.x[index])

    def _scaled(self, x: Tensor) -> Tensor:
        images = as_input(x, _dtype(self.settings))
        return images if self.scale is None else (images - self.scale[0]) / self.scale[1]

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Share of right answers, in evaluation mode; every process looks at its part."""
        self.net.eval()
        right = torch.zeros((), dtype=torch.int64, device=x.device)
        part = self.processes.part(len(y))
        chunks = (torch.split(of[part], _EVALUATED) for of in (x, y))
        for images, labels in zip(*chunks, strict=True):
            with _precision(self.settings):
                out = self.net(self._scaled(images))
            right += _right(out, labels)
        self.net.train()
        return int(self.processes.sum(right)) / len(y)

    def stopped(self) -> bool:
        """After the last epoch, or after enough good ones in a row."""
        if len(self.found) >= self.settings.epochs:
            self.found.stop_reason = "epochs"
            return True
        if len(self.found) >= self.settings.stop_epochs:
            last = self.found.last("train accuracy", self.settings.stop_epochs)
            if (last >= self.settings.stop_above).all():
                self.found.stop_reason = "train accuracy"
                return True
        return False

    def summary(self, tested: float) -> dict[str, Any]:
        last = {name: float(self.found[name][-1]) for name in self.found.names}
        return {
            **last,
            "test accuracy": tested,
            "epochs": len(self.found),
            **self.seconds,
            "seconds an epoch": float(np.median(self.took)) if self.took else None,
            "processes": self.processes.count,
            **({"resumed": self.resumed} if self.resumed else {}),
            "device": str(next(self.net.parameters()).device.type),
            "stopped by": self.found.stop_reason,
        }

    def write(self, path: Path, about: dict[str, Any]) -> None:
        """Rank 0 writes the state, with the random numbers of all."""
        states = self.processes.every(_random_state())
        held = {
            "format": FORMAT,
            "about": json.dumps(about),
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "penalty": None if self.penalty is None else self.penalty.state_dict(),
            "shuffle": self.shuffle.get_state(),
            **states[0],
            "others": states[1:],
            "seconds": self.seconds,
            "resumed": self.resumed,
            "device": _device_name(self.x.device),
            "found": torch.frombuffer(bytearray(self.found.to_bytes()), dtype=torch.uint8),
        }

        portable = self.execution.portable
        self.processes.from_first(lambda: write_state(path, held, portable=portable))

    def read(self, path: Path, about: dict[str, Any]) -> None:
        """Go on from the checkpoint that rank 0 has, if it has one."""
        held = self.processes.from_first(lambda: read_state(path, about) if path.exists() else None)
        if held is None:
            return
        try:
            self.net.load_state_dict(held["net"])
            self.optimizer.load_state_dict(held["optimizer"])
            if self.penalty is not None:
                self.penalty.load_state_dict(held["penalty"])
            self.shuffle.set_state(held["shuffle"])
            states = [held, *held.get("others", [])]
            if self.processes.rank == 0 or len(states) == self.processes.count:
                _set_random_state(states[self.processes.rank])
            self.seconds = dict(held["seconds"])
            self.found = Trajectory.from_bytes(held["found"].numpy().tobytes())
            self.resumed = [
                *held["resumed"],
                {
                    "epoch": len(self.found), "momentum": held.get("momentum", "exact"),
                    "from": held["device"], "on": _device_name(self.x.device),
                },
            ]  # fmt: skip
        except Exception as error:  # the training ends here, so that nothing has to be put back
            raise no_checkpoint(path, error, "folder") from None


def check_graph(device: torch.device, processes: int) -> None:
    """Raise an ``OptionError`` where steps cannot be CUDA graphs."""
    if device.type != "cuda" or processes > 1:
        raise OptionError(
            f"locality: graph needs a CUDA device and one process, found {device} and {processes}.\n"
            "  leave graph out",
            argument="graph",
        )


def _sizes(count: int, batch: int) -> list[int]:
    """Images of every batch of an epoch; a last one of one image is left out."""
    last = count % batch
    return [batch] * (count // batch) + ([last] if last > 1 else [])


def _check_batches(count: int, batch: int, processes: int) -> None:
    def fits(size: int) -> bool:
        return all(n >= processes for n in _sizes(count, size))

    if processes == 1 or (fits(batch) and _sizes(count, batch)):
        return
    others = sorted(range(processes, count + 1), key=lambda size: (abs(size - batch), size))
    found = next((size for size in others if fits(size)), None)
    instead = f"take e.g. batch {found}" if found else f"take {count} processes or fewer"
    raise OptionError(
        f"locality: {count} images in batches of {batch} leave {_sizes(count, batch)[-1:] or 'none'} "
        f"for a last batch of {processes} processes, and each needs an image of it; {instead}.",
        argument="batch",
    )


def _places(folder: str | Path, checkpoint: str | Path | None) -> tuple[Path, Path]:
    """Run folder and checkpoint."""
    place = check_folder(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place, Path(checkpoint or place.with_name(f"{place.name}.checkpoint"))


def _wrapped(net: nn.Module, processes: Processes) -> nn.Module:
    devices = [processes.device] if processes.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        net, device_ids=devices, process_group=processes.group
    )


def _normalized_together(net: nn.Module, processes: Processes) -> nn.Module:
    """Batch normalization by the statistics of the whole batch."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if processes.count == 1 or not norms:
        return net
    if processes.device.type != "cuda":
        raise OptionError(
            "locality: the network has batch normalization, which torch shares between processes on GPUs "
            "only; take the device cuda, one process, or a network without it such as small-cnn."
        )
    shared: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(net, processes.group)  # type: ignore[no-untyped-call]
    return shared


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return {"random": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["random"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _tensors(data: ImageSet) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(data.images), torch.from_numpy(data.labels)


def _dtype(settings: Settings) -> torch.dtype:
    return torch.float64 if settings.precision == "float64" else torch.float32


def _standard(data: ImageSet) -> dict[str, list[float]]:
    """Mean and standard deviation of every channel, of images as networks get them without."""
    images = torch.from_numpy(data.images)
    count = images[:, 0].numel()

    def mean_of(function: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(images.shape[1], dtype=torch.float64)
        for some in torch.split(images, _EVALUATED):  # not all in double precision at once
            total += function(as_input(some, torch.float64)).sum((0, 2, 3))
        return total / count

    mean = mean_of(lambda some: some)
    deviation = mean_of(lambda some: (some - mean.view(-1, 1, 1)).square()).sqrt()
    return {"mean": mean.tolist(), "deviation": deviation.clamp(min=1e-12).tolist()}


def _scale(
    inputs: dict[str, list[float]] | None, settings: Settings, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    if inputs is None:
        return None
    mean, deviation = (
        torch.tensor(inputs[name], dtype=_dtype(settings), device=device).view(-1, 1, 1)
        for name in ("mean", "deviation")
    )
    return mean, deviation


def _device_name(device: torch.device) -> str:
    """The device as a summary names it."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def _loss(out: Tensor, labels: Tensor) -> Tensor:
    logits = (out if out.dtype == torch.float64 else out.float()).reshape(len(labels), -1)
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def _right(out: Tensor, labels: Tensor) -> Tensor:
    logits = out.reshape(len(labels), -1)
    said = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)
    return (said == labels).sum()


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
