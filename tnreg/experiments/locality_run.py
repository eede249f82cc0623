"""One training of ``locality``: a network, an image set, perhaps a penalty, into a run folder.

The loop is written out here, with torch's own loader and samplers. It is some twenty lines and has to
be resumed bit for bit, penalties and random streams included; a trainer library would be a dependency
for everyone, larger than the loop, and would hide just these lines.

A run folder holds ``config.json``, ``model.safetensors`` and ``trajectory.npz`` with one row per epoch.
While it trains, ``FOLDER.checkpoint`` beside it holds the state after the last epoch.

Under torchrun the processes train one network on parts of every batch: its updates are those of one
process with the whole batch, penalties included, but for rounding. Only dropout draws masks of its own in
every process. Rank 0 alone reads and writes files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from tnreg.checkpoint import save_whole
from tnreg.errors import DataError, FileError, OptionError, check_integer
from tnreg.experiments.folder import versions
from tnreg.experiments.locality_settings import ARMS, Settings, penalty_of
from tnreg.experiments.nets import as_input, build
from tnreg.files import check_folder, folder_written_whole
from tnreg.images import ImageSet
from tnreg.parallel import Processes, ProcessLost, joined
from tnreg.trajectory import Trajectory

__all__ = ["ARMS", "Settings", "train"]

_FORMAT = "tnreg.locality/1"
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
) -> dict[str, Any]:
    """Train, write the folder, and return its summary.

    On a CPU the same settings give the same weights bit for bit, interrupted or not. Denormal numbers
    are flushed to zero while it runs; single steps of the penalties are ten times slower with them.

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
        checkpoint: Where the state is kept while it trains; ``FOLDER.checkpoint`` if left out.

    Returns:
        Accuracies of the last epoch, epochs, processes, and seconds of training, evaluation not
        counted; processor seconds are those of all processes.

    Raises:
        TnregError: Settings that do not fit each other, or a checkpoint of other settings.
        DataError: The loss is not finite any more.
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
            with torch.random.fork_rng(devices=cuda), _no_denormals():
                torch.manual_seed(seed)
                state = _State(settings, arm, seed, data, processes)
                return _trained(state, settings, data, test, place, told, saved)
    except ProcessLost as lost:
        raise ProcessLost(f"{lost}\n  {saved}") from None


def _trained(
    state: _State,
    settings: Settings,
    data: ImageSet,
    test: ImageSet,
    place: Path,
    told: dict[str, Any],
    saved: _Saved,
) -> dict[str, Any]:
    """From the checkpoint, if there is one, to the run folder."""
    processes = state.processes
    state.read(saved.path, told)
    saved.epochs = len(state.found)
    x, y, test_x, test_y = (
        part.to(processes.device) for one in (data, test) for part in _tensors(one)
    )
    while not state.stopped(settings):
        row = state.epoch(x, y, settings)
        tested = (len(state.found) + 1) % settings.test_every == 0
        row["test accuracy"] = (
            accuracy(state.net, test_x, test_y, settings, processes) if tested else float("nan")
        )
        state.found.append(len(state.found) + 1, row)
        state.write(saved.path, told)
        saved.epochs = len(state.found)
    summary = state.summary(accuracy(state.net, test_x, test_y, settings, processes))

    def write() -> dict[str, Any]:
        with folder_written_whole(place) as beside:
            save_model(state.net, str(beside / "model.safetensors"))
            state.found.save(beside / "trajectory.npz")
            held = {
                **versions(), "experiment": "locality_run",
                "config": told, "summary": summary,
            }  # fmt: skip
            (beside / "config.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        saved.path.unlink(missing_ok=True)
        return summary

    return processes.from_first(write)


@torch.no_grad()
def accuracy(
    net: nn.Module, x: Tensor, y: Tensor, settings: Settings, processes: Processes
) -> float:
    """Share of right answers, in evaluation mode; every process looks at its part."""
    trained = net.training
    net.eval()
    right = torch.zeros((), dtype=torch.int64, device=x.device)
    part = processes.part(len(y))
    chunks = (torch.split(of[part], _EVALUATED) for of in (x, y))
    for images, labels in zip(*chunks, strict=True):
        with _precision(settings):
            out = net(_images(images, settings))
        right += _right(out, labels)
    net.train(trained)
    return int(processes.sum(right)) / len(y)


class _Saved:
    """What can be told of the checkpoint when the training cannot go on."""

    def __init__(self) -> None:
        self.path, self.epochs = Path(), 0

    def __str__(self) -> str:
        if not self.epochs:
            return "no epoch was done yet; the same command starts again"
        return (
            f"the state after epoch {self.epochs} is in {self.path}; "
            "the same command goes on from there"
        )


class _State:
    """Everything that changes along a training."""

    def __init__(
        self, settings: Settings, arm: str, seed: int, data: ImageSet, processes: Processes
    ) -> None:
        dropout = settings.dropout if arm == "dropout" else 0.0
        decay = settings.weight_decay if arm == "weight-decay" else 0.0
        net = build(settings.model, data.images.shape[1], dropout=dropout)
        net = net.double() if settings.precision == "float64" else net
        net = _normalized_together(net, processes)
        # channels last: a fifth faster on a CPU, with and without gradient change
        self.net = net.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.processes = processes
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

    def epoch(self, x: Tensor, y: Tensor, settings: Settings) -> dict[str, float]:
        """One pass over the images: mean loss, mean penalty where there was one, train accuracy."""
        order = RandomSampler(x, generator=self.shuffle)
        # a last batch of one has no other sample for the penalties
        batches = BatchSampler(order, settings.batch, drop_last=len(x) % settings.batch == 1)
        sizes, parts = _sizes(len(x), settings.batch), _Parts(batches, self.processes)
        # the loader's own random numbers must not be torch's, nor those of the order
        own = torch.Generator().manual_seed(0)
        loader = DataLoader(TensorDataset(x, y), None, sampler=parts, generator=own)
        start = time.process_time(), time.perf_counter()
        self.net.train()
        sums = torch.zeros(3, dtype=torch.float64, device=x.device)
        penalized = 0
        for (images, labels), size in zip(loader, sizes, strict=True):
            images = _images(images, settings)
            with _precision(settings):
                out = self.shared(images)
                loss = _loss(out, labels)
                # gradients are averaged over processes, whose parts may differ by one image
                total = loss * (self.processes.count * len(labels) / size)
                if self.penalty is not None:
                    extra = self.penalty(self.shared, images, labels)
                    total = total + extra
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(total)
            self.optimizer.step()
            with torch.no_grad():
                sums[0] += loss.detach() * len(labels)
                sums[1] += _right(out, labels)
                if self.penalty is not None and extra.requires_grad:
                    sums[2] += extra.detach()
                    penalized += 1
        mine = sums.tolist()  # on a GPU this waits for the epoch to be done
        mine.append(time.process_time() - start[0])
        self.seconds["seconds"] += time.perf_counter() - start[1]
        every = self.processes.sum(torch.tensor(mine, dtype=torch.float64, device=x.device))
        if not bool(torch.isfinite(every).all()):
            raise DataError(
                f"the loss is not finite in epoch {len(self.found) + 1}; take a smaller lr or penalty."
            )
        loss_sum, right, extra_sum, seconds = every.tolist()
        self.seconds["cpu seconds"] += seconds
        shown = sum(sizes)
        return {
            "loss": loss_sum / shown,
            "penalty": extra_sum / self.processes.count / penalized if penalized else 0.0,
            "train accuracy": right / shown,
        }

    def stopped(self, settings: Settings) -> bool:
        """After the last epoch, or after enough good ones in a row."""
        if len(self.found) >= settings.epochs:
            self.found.stop_reason = "epochs"
            return True
        if len(self.found) >= settings.stop_epochs:
            last = self.found.last("train accuracy", settings.stop_epochs)
            if (last >= settings.stop_above).all():
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
            "processes": self.processes.count,
            "device": str(next(self.net.parameters()).device.type),
            "stopped by": self.found.stop_reason,
        }

    def write(self, path: Path, about: dict[str, Any]) -> None:
        """Rank 0 writes the state, with the random numbers of all."""
        states = self.processes.every(_random_state())
        held = {
            "format": _FORMAT,
            "about": json.dumps(about),
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "penalty": None if self.penalty is None else self.penalty.state_dict(),
            "shuffle": self.shuffle.get_state(),
            **states[0],
            "others": states[1:],
            "seconds": self.seconds,
            "found": torch.frombuffer(bytearray(self.found.to_bytes()), dtype=torch.uint8),
        }

        self.processes.from_first(lambda: save_whole(path, held))

    def read(self, path: Path, about: dict[str, Any]) -> None:
        """Go on from the checkpoint that rank 0 has, if it has one."""
        held = self.processes.from_first(lambda: _held(path, about) if path.exists() else None)
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
        except Exception as error:  # the training ends here, so that nothing has to be put back
            raise _no_checkpoint(path, error) from None


class _Parts:
    """This process's part of every batch."""

    def __init__(self, batches: Iterable[list[int]], processes: Processes) -> None:
        self.batches, self.processes = batches, processes

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[self.processes.part(len(batch))]


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
        f"for a last batch of {processes} processes, and each needs an image of it; {instead}."
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


def _held(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the same settings."""
    away = f"  delete {path}, or choose another folder"
    try:
        held: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if held["format"] != _FORMAT:
            raise ValueError(f"format {held['format']!r}, this version reads {_FORMAT!r}")
        before = json.loads(held["about"])
        Trajectory.from_bytes(held["found"].numpy().tobytes())
    except Exception as error:
        raise _no_checkpoint(path, error) from None
    if before != json.loads(json.dumps(about)):
        raise OptionError(f"{path} is of a training with other settings.\n{away}")
    return held


def _no_checkpoint(path: Path, error: Exception) -> FileError:
    said = " ".join(str(error).splitlines()[:1])
    return FileError(
        f"not a checkpoint: {path}\n  {type(error).__name__}: {said}\n"
        f"  delete {path}, or choose another folder"
    )


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return {"random": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["random"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _tensors(data: ImageSet) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(data.images), torch.from_numpy(data.labels)


def _images(x: Tensor, settings: Settings) -> Tensor:
    return as_input(x, torch.float64 if settings.precision == "float64" else torch.float32)


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
def _no_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
