"""What one training of ``locality`` is made with: its settings, its arms, and how it is carried out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tnreg.errors import OptionError
from tnreg.far.interaction import InteractionEnergy, InteractionRank
from tnreg.far.patches import DifferingPatches, PatchSampler, PresetPatches, RandomPatches
from tnreg.far.regularizers import InputGradientChange
from tnreg.images.sets import ImageSet

ARMS = ("plain", "weight-decay", "dropout", "sam", "igc", "interaction", "rank")
Penalty = InputGradientChange | InteractionEnergy | InteractionRank
PENALTIES: dict[str, type[Penalty]] = {
    "igc": InputGradientChange, "interaction": InteractionEnergy, "rank": InteractionRank,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Settings of one training, whatever its arm, its images and its seed.

    Attributes:
        model: "small-cnn" or another one of ``nets``, or an import path such as
            torchvision.models:resnet18.
        epochs: Passes over the training images, at most, those of ``pretrain_epochs`` among them.
        pretrain_epochs: Passes over images of each distance of ``pretrain_distances`` that is shorter,
            before; without a penalty.
        stop_above: Stop when the train accuracy, counted while training, is at least this ...
        stop_epochs: ... in so many epochs in a row.
        optimizer: "sgd" or "adam".
        lr: Its learning rate.
        momentum: Momentum of SGD.
        batch: Images of a step.
        test_every: Epochs from one row of the history with a test accuracy to the next.
        weight_decay: That of the arm weight-decay.
        dropout: Share of features that the arm dropout drops: before the last layer of a CNN, after each of
            the first three stages of a ResNet, as published.
        sam: How far the arm sam (sharpness-aware minimization) goes up the gradient.
        augment: What changes training images in every step anew, but for penalties: "noise" on what the
            network takes, a "shift" of the whole image whose edge is repeated, "mixup" or "cutmix" of two
            images and their labels.
        noise: Standard deviation of the noise.
        shift: Pixels of the shift, at most, in each direction.
        mixup: Shares of the two images are from Beta(mixup, mixup).
        cutmix: The same for areas.
        patches: Where penalties look: the two boxes of a pair; "off", boxes that touch neither image;
            "near", the upper and the lower half of one image; "random" squares, or squares where the
            images of a batch are "differing"; for Pathfinder such squares with a gap as that of its "discs",
            whose middles are the median of their distances apart.
        patch_size: Side of random and differing squares.
        statistics: What batch normalization uses inside penalties: its running statistics, "frozen", or
            those of the "batch", as published.
        standardize: Bring every channel of the training images to mean 0 and standard deviation 1, and the
            test images by the same numbers; of pairs without the canvas.
        igc: Weight of the input gradient change.
        igc_every: A penalty only every so many steps.
        igc_warmup: Steps over which its weight grows.
        igc_start: Steps before the first one.
        igc_until: Steps after which there is no penalty; 0 for none.
        igc_target: Value that is low enough: only what is above it counts; 0 for none.
        interaction: Weight of the interaction energy.
        interaction_every: That penalty only every so many steps.
        interaction_warmup: Steps over which its weight grows.
        interaction_start: Steps before the first one.
        interaction_until: Steps after which it is left out; 0 for none.
        interaction_target: Value that is low enough: only what is above it counts; 0 for none.
        interaction_samples: Images whose patches are crossed.
        rank: Weight of the interaction rank.
        rank_every: That penalty only every so many steps.
        rank_warmup: Steps over which its weight grows.
        rank_start: Steps before the first one.
        rank_until: Steps after which it is left out; 0 for none.
        rank_target: Interaction energy that is low enough to leave it out; 0 for none.
        rank_samples: Images whose patches are crossed.
        rank_floor: Share of the variance that counts as none.
        device: Torch device.
        precision: "bfloat16" computes the network in that precision (autocast); "float64" holds and
            computes everything in double precision.
    """

    model: str = "small-cnn"
    epochs: int = 60
    pretrain_epochs: int = 0
    stop_above: float = 0.998
    stop_epochs: int = 3
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    batch: int = 64
    test_every: int = 10
    weight_decay: float = 1e-3
    dropout: float = 0.5
    sam: float = 0.05
    augment: Literal["none", "noise", "shift", "mixup", "cutmix"] = "none"
    noise: float = 0.2
    shift: int = 1
    mixup: float = 0.2
    cutmix: float = 1.0
    patches: Literal["images", "off", "near", "random", "differing", "discs"] = "images"
    patch_size: int = 2
    statistics: Literal["frozen", "batch"] = "frozen"
    standardize: bool = False
    igc: float = 2.0
    igc_every: int = 4
    igc_warmup: int = 0
    igc_start: int = 0
    igc_until: int = 0
    igc_target: float = 0.0
    interaction: float = 0.3
    interaction_every: int = 1
    interaction_warmup: int = 0
    interaction_start: int = 0
    interaction_until: int = 300
    interaction_target: float = 0.6
    interaction_samples: int = 8
    rank: float = 0.2
    rank_every: int = 1
    rank_warmup: int = 0
    rank_start: int = 200
    rank_until: int = 500
    rank_target: float = 0.6
    rank_samples: int = 8
    rank_floor: float = 1e-3
    device: str = "cpu"
    precision: Literal["float32", "bfloat16", "float64"] = "float32"


@dataclass(frozen=True)
class Execution:
    """How trainings are carried out; what comes out is the same but for rounding.

    A training that goes on from a portable state without its momentum is the exception.

    Attributes:
        checkpoint_seconds: Least time between two writings of the state; 0 for one after every epoch.
        portable: Write states that travel to another machine: parts of at most 14 MiB, 56 MiB in all. Where
            the momentum of the optimizer does not fit it is kept in bfloat16 or left out, as for ResNet-18.
        model_file: Write the trained network into the run folder.
        graph: On a CUDA device, replay steps as CUDA graphs.
    """

    checkpoint_seconds: float = 0.0
    portable: bool = False
    model_file: bool = True
    graph: bool = False


def penalty_of(settings: Settings, arm: str, seed: int, data: ImageSet) -> Penalty | None:
    """Return the penalty that an arm adds, at ``settings.patches``; ``None`` for arms without one."""
    if arm not in PENALTIES:
        return None
    patches, own = _patches(settings, seed, data), f"{arm}_"
    options: dict[str, Any] = {k.removeprefix(own): v for k, v in vars(settings).items() if k.startswith(own)}
    options |= {name: options[name] or None for name in ("until", "target")}
    options |= {"weight": getattr(settings, arm), "statistics": settings.statistics}
    options |= {} if arm == "igc" else {"seed": seed}
    return PENALTIES[arm](patches, **options)


def _patches(settings: Settings, seed: int, data: ImageSet) -> PatchSampler:
    kind, boxes = settings.patches, data.boxes
    if kind in ("random", "differing"):
        squares = RandomPatches if kind == "random" else DifferingPatches
        return squares(settings.patch_size, seed=seed)
    if kind == "discs" and len(data.distances):
        gap = max(round(float(np.median(data.distances))) - settings.patch_size, 0)
        return DifferingPatches(settings.patch_size, gap, exact=True, seed=seed)
    if not boxes:
        message = f"patches {kind!r} need the boxes of image pairs; Pathfinder takes 'random', "
        raise OptionError(f"{message}'differing' or 'discs'.", argument="patches")
    if kind == "off":
        boxes = data.control_boxes
    elif kind == "near":
        top, left, bottom, right = boxes[0]
        middle = (top + bottom) // 2
        boxes = ((top, left, middle, right), (middle, left, bottom, right))
    elif kind != "images":
        message = f"no patches {kind!r}; there is images, off, near, random, differing, discs."
        raise OptionError(message, argument="patches")
    return PresetPatches(boxes, seed=seed)
