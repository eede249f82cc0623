"""Image sets as they are made, kept, and shown; see ``tnreg.images``."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import io
import json
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tnreg.errors import DataError, FileError, OptionError, check_integer, check_number
from tnreg.far.patches import Box
from tnreg.images.scene import longest, render, sample_scene
from tnreg.images.sources import Small, small_images
from tnreg.machine.files import write_whole
from tnreg.machine.progress import advancing
from tnreg.machine.versions import __version__
from tnreg.trees.drawing import picture_format

Array = np.ndarray[Any, Any]

_FORMAT = "tnreg.images/1"
_SPLITS = {"train": 0, "test": 1}
_CHUNK = 25  # images that a worker makes at a time
_CIFAR_MEAN = 125, 123, 114  # of the 50,000 training images


@dataclass(frozen=True)
class ImageSet:
    """Images with labels, and how they were made.

    Attributes:
        images: ``(N, channels, height, width)``; uint8 from 0 to 255, or float32 as it is.
        labels: ``(N,)`` int64, 0 or 1.
        boxes: Where the two images of a pair stand, as ``(top, left, bottom, right)``, bottom and right
            exclusive; empty for Pathfinder.
        distances: Pixels between the two discs, ``(N,)``; empty for pairs.
        config: What the set was made with; JSON can write it.
    """

    images: Array
    labels: Array
    boxes: tuple[Box, ...]
    distances: Array
    config: dict[str, Any]

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        shown = self.config.keys() - {"tnreg", "set"}
        settings = ", ".join(f"{k}={v}" for k, v in self.config.items() if k in shown)
        return f"<{self.config.get('set')}: {len(self)} images {shape}; {settings}>"

    @property
    def control_boxes(self) -> tuple[Box, ...]:
        """Two boxes of the size of ``boxes`` that touch neither image: above, between or beside them.

        OptionError if the set has no boxes, or no room for two more.
        """
        if not self.boxes:
            raise OptionError("control boxes: this set has no boxes; pairs have (is_same_class).")
        (top, left, bottom, inner), (_, far, _, right) = self.boxes
        size, width = inner - left, self.images.shape[-1]
        if top >= bottom - top:
            return tuple((0, a, bottom - top, a + size) for a in (left, far))
        if far - inner >= 2 * size:
            return (top, inner, bottom, inner + size), (top, far - size, bottom, far)
        if left >= size and width - right >= size:
            return (top, 0, bottom, size), (top, width - size, bottom, width)
        raise OptionError(
            f"control boxes: no room for two boxes of {size} pixels beside {self.boxes} on "
            f"{self.images.shape[-2]} x {width} pixels; choose a smaller or a larger distance."
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an ``.npz`` file, whole or not at all; ``load`` reads it."""
        about = json.dumps({"format": _FORMAT, "config": self.config})

        def write(beside: Path) -> None:
            with open(beside, "wb") as file:
                np.savez_compressed(
                    file, allow_pickle=False, images=self.images, labels=self.labels,
                    boxes=np.array(self.boxes, dtype=np.int64).reshape(-1, 4),
                    distances=self.distances, about=np.array(about),
                )  # fmt: skip

        return write_whole(path, write)

    def sheet(self, path: str | os.PathLike[str], *, rows: int = 4, columns: int = 8) -> Path:
        """Draw the first images, enlarged if small: label 0 in the upper rows, 1 in the lower.

        The suffix of ``path`` says the format: .png, .pdf, .svg, ...
        """
        from matplotlib.image import imsave

        kind = picture_format(path)
        half = max(check_integer(rows, 1, "sheet: rows") // 2, 1)
        columns = check_integer(columns, 1, "sheet: columns")
        zoom = max(1, 128 // max(self.images.shape[-2:]))
        lines = []
        picked = [np.flatnonzero(self.labels == label)[: half * columns] for label in (0, 1)]
        visible = _visible(self.images[np.concatenate(picked)])
        for images in np.split(visible, [len(picked[0])]):
            cells = np.zeros((half * columns, *self.images.shape[1:]), dtype=np.float32)
            cells[: len(images)] = images
            cells = cells.repeat(zoom, 2).repeat(zoom, 3)
            cells = np.pad(cells, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.5)
            lines += [np.concatenate(list(line), -1) for line in np.split(cells, half)]
        picture = np.concatenate(lines, 1).transpose(1, 2, 0).clip(0, 1)
        picture = picture if picture.shape[-1] == 3 else picture[..., :1].repeat(3, -1)
        raw = io.BytesIO()
        imsave(raw, picture, format=kind)
        return write_whole(path, lambda beside: beside.write_bytes(raw.getbuffer()))


def pathfinder(
    count: int,
    *,
    length: int = 9,
    size: int = 150,
    matched: bool = False,
    split: Literal["train", "test"] = "train",
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> ImageSet:
    """Draw a Pathfinder set, white on black; the label says whether one path joins both discs.

    Args:
        count: How many images.
        length: Paddles of each path; published are 3, 5, 7 and 9.
        size: Height and width in pixels, 32 to 300; published is 150.
        matched: Negatives have discs as far apart as positives; otherwise as published, where the
            distance alone tells most labels.
        split: Train or test images of this seed.
        seed: Seed of the set.
        workers: Processes; as many as there are processors if left out. The images do not depend on it.
        progress: Show a progress bar.

    Returns:
        Images ``(count, 1, size, size)`` uint8. ``config`` has the share of labels that the distance
        alone tells, see ``distance_only_accuracy``.

    Raises:
        OptionError: An argument out of its range.

    Cost: some 5 to 25 ms of processor time an image.
    """
    count = check_integer(count, 1, "pathfinder: count")
    length = check_integer(length, 2, "pathfinder: length")
    size = check_integer(size, 32, "pathfinder: size")
    if size > 300:
        raise OptionError(f"pathfinder: size is 32 to 300 pixels, found {size}.", argument="size")
    if length > longest(size):
        message = f"pathfinder: paths of {length} paddles have no room on {size} pixels; "
        raise OptionError(f"{message}at most {longest(size)}.", argument="length")
    key = (check_integer(seed, 0, "pathfinder: seed"), _split(split))
    draw = functools.partial(_draw_scene, length, size, bool(matched), key)
    text = f"images, paths of {length} paddles"
    drawn = zip(*_drawn(draw, count, workers, text, progress), strict=True)
    images, labels, distances = map(np.stack, drawn)
    config = {
        "tnreg": __version__, "set": "pathfinder", "count": count, "length": length,
        "size": size, "matched": bool(matched), "split": split, "seed": int(seed),
        "distance-only accuracy": distance_only_accuracy(distances, labels),
    }  # fmt: skip
    return ImageSet(images, labels, (), distances, config)


def is_same_class(
    count: int,
    *,
    distance: int,
    source: str | os.PathLike[str] | tuple[Any, Any] = "digits",
    split: Literal["train", "test"] = "train",
    seed: int = 0,
    noise: float | None = None,
    canvas: tuple[int, int] | None = None,
) -> ImageSet:
    """Make pairs of small images on one canvas, in the middle and ``distance`` pixels apart.

    Half of the pairs are of one class. The first image is drawn from all of its split, the second
    from the others of the same class, or from the other classes.

    Args:
        count: How many pairs.
        distance: Pixels between the two.
        source: Where the small images come from. No two splits share one.

            - "digits": the 8x8 digits of scikit-learn, from -0.3 to 0.7, two thirds of them for training.
            - "photos": those inside scikit-learn and scikit-image, gray and of half their size, in
              squares of 8x8, each of mean 0 and standard deviation 0.35; 12 photographs for training, 7 for
              test. Label 1: the same square twice. Label 0: two squares of one photograph.
            - "spectra": pixels of the hyperspectral scene Indian Pines (in tensorly) of the nine crops that
              have more than 400, their bands three by three as 8x8 images, standardised; a third of the
              scene's blocks of 8x8 pixels is for test.
            - ``(images, classes)`` of your own: ``(N, channels, height, width)``, floating point or uint8,
              and ``(N,)`` whole numbers, as arrays of any kind; two thirds of every class for training.
            - The folder ``cifar-10-batches-py`` (or the folder it is in) of the CIFAR-10 archive for
              Python, unpacked: 32x32 pixels in colour.
        split: Train or test pairs.
        seed: Draws the split of digits and of your own images, the pairs and the noise.
        noise: Standard deviation of noise on the pixels of both images, drawn once for every pair; if left
            out 0.2 for digits and 0.3 for photographs (without it a plain network solves the longest
            distance), else 0. Not for uint8.
        canvas: Height and width in pixels; if left out 224x224 for CIFAR-10, for others the height of a small
            image and five times its width.

    Returns:
        Images ``(count, channels, height, width)``, float32 or uint8: ``(count, 1, 8, 40)`` for digits, 0.15
        MB a pair for CIFAR-10. The canvas is 0, for CIFAR-10 the mean colour of its training images, as
        published. ``boxes`` has the two places.

    Raises:
        OptionError: An argument out of its range, or a package is missing.
        FileError: No such folder, or files that are not those of CIFAR-10.
        ShapeError, DataError: Images of your own that do not fit their classes, are not finite, or are
            fewer than four of a class.
    """
    count = check_integer(count, 2, "is_same_class: count")
    distance = check_integer(distance, 0, "is_same_class: distance")
    number = check_integer(seed, 0, "is_same_class: seed")
    part = _split(split)
    small = small_images(source, number, part)
    side, wide = small.images.shape[-2:]
    if noise is not None and small.images.dtype == np.uint8:
        message = "is_same_class: noise is for images of floating point; leave it out for bytes."
        raise OptionError(message, argument="noise")
    std = small.noise if noise is None else check_number(noise, "is_same_class: noise", 0)
    usual = (224, 224) if small.name == "cifar-10" else (side, 5 * wide)
    if np.shape(canvas or usual) != (2,):
        message = f"is_same_class: canvas is (height, width) in pixels, found {canvas!r}."
        raise OptionError(message, argument="canvas")
    height, width = (check_integer(n, 1, "is_same_class: canvas") for n in canvas or usual)
    room = width - 2 * wide
    if distance > room or height < side:
        raise OptionError(
            f"is_same_class: two images of {side}x{wide} pixels, {distance} apart, do not fit on "
            f"{height}x{width}.\n  distance: at most {max(room, 0)} there",
            argument="distance",
        )
    first, second, labels = _draw_pairs(np.random.default_rng([number, part, 1]), small, count)
    top, left = (height - side) // 2, (room - distance) // 2
    boxes = tuple((top, x, top + side, x + wide) for x in (left, left + wide + distance))
    images = np.zeros((count, small.images.shape[1], height, width), dtype=small.images.dtype)
    if small.name == "cifar-10":
        images += np.array(_CIFAR_MEAN, dtype=np.uint8)[:, None, None]
    rng = np.random.default_rng([number, part, 2])
    for (y, x, bottom, right), members in zip(boxes, (first, second), strict=True):
        pixels = small.images[members]
        if std:
            pixels = pixels + rng.normal(0, std, pixels.shape).astype(pixels.dtype)
        images[:, :, y:bottom, x:right] = pixels
    config = {
        "tnreg": __version__, "set": "is_same_class", "count": count, "distance": distance,
        "source": small.name, "split": split, "seed": number, "noise": std, "canvas": [height, width],
    }  # fmt: skip
    return ImageSet(images, labels, boxes, np.empty(0), config)


def distance_only_accuracy(
    distances: Array, labels: Array, *, neighbours: int = 25, folds: int = 5
) -> float | None:
    """Return the accuracy of predicting the label from the distance between the discs alone.

    The ``neighbours`` nearest distances (an odd number) vote, in cross-validation: fold i is every
    ``folds``-th image from the i-th on. A good set gives about 0.5. ``distances`` and ``labels`` (0 or 1)
    are ``(N,)``; for fewer images than the vote needs the result is ``None``.
    """
    distances, labels = np.asarray(distances, dtype=float), np.asarray(labels)
    if len(distances) != len(labels):
        raise DataError(f"{len(distances)} distances, but {len(labels)} labels.")
    fold = np.arange(len(labels)) % folds
    if len(labels) - len(labels) // folds < 2 * neighbours:
        return None
    correct = 0
    for i in range(folds):
        test = fold == i
        order = distances[~test].argsort(kind="stable")
        known, votes = distances[~test][order], labels[~test][order]
        # the nearest on a line are neighbours in order: some of those before and after
        low = np.searchsorted(known, distances[test]) - neighbours
        near = np.clip(low, 0, len(known) - 2 * neighbours)[:, None] + np.arange(2 * neighbours)
        gaps = np.abs(known[near] - distances[test][:, None])
        closest = gaps.argpartition(neighbours - 1, 1)[:, :neighbours]
        share = votes[np.take_along_axis(near, closest, 1)].mean(1)
        correct += int(((share > 0.5) == labels[test]).sum())
    return correct / len(labels)


def load(path: str | os.PathLike[str]) -> ImageSet:
    """Read a set that ``ImageSet.save`` wrote; FileError if there is none, or it is something else."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            if about["format"] != _FORMAT:
                raise ValueError(f"format {about['format']!r}, this version reads {_FORMAT!r}")
            boxes = tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in file["boxes"])
            images, labels, config = file["images"], file["labels"], about["config"]
            if images.ndim != 4 or labels.shape != (len(images),):
                raise ValueError(f"images {images.shape}, labels {labels.shape}")
            if labels.dtype.kind not in "iu" or images.dtype.kind not in "uf":
                raise ValueError(f"images {images.dtype}, labels {labels.dtype}")
            if not isinstance(config, dict):
                raise TypeError(f"its config is a {type(config).__name__}, not an object")
            return ImageSet(images, labels, boxes, file["distances"], config)
    except FileNotFoundError:
        raise FileError(f"no such image set: {path}") from None
    except Exception as error:
        raise FileError(
            f"not an image set: {path}\n  {type(error).__name__}: {error}\n"
            "  expected: an .npz file that ImageSet.save wrote"
        ) from None


def _draw_scene(
    length: int, size: int, matched: bool, key: tuple[int, int], number: int
) -> tuple[Array, np.int64, float]:
    """Return image, label and distance of the Pathfinder image of this number."""
    rng = np.random.default_rng(np.random.SeedSequence([*key, number]))
    scene = sample_scene(rng, length, size, matched=matched)
    return render(scene, size)[None], np.int64(scene.label), scene.distance * size


def _drawn(
    draw: Callable[[int], Any], count: int, workers: int | None, text: str, progress: bool
) -> Iterator[Any]:
    """Yield the images of all numbers in order."""
    workers = os.cpu_count() or 1 if workers is None else check_integer(workers, 1, "workers")
    processes = min(workers, math.ceil(count / _CHUNK))
    run: Any = map
    with contextlib.ExitStack() as stack:
        if processes > 1:
            run = functools.partial(stack.enter_context(_pool(processes)).map, chunksize=_CHUNK)
        advance = stack.enter_context(advancing(text, count, progress))
        for one in run(draw, range(count)):
            advance(1)
            yield one


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    # Workers run numpy alone, so that forking is safe beside torch's threads; it also lets a script of
    # two lines do without `if __name__ == "__main__"`.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        pool.submit(int).result()  # the processes start here, before a progress bar has a thread
    return pool


def _split(split: str) -> int:
    if split not in _SPLITS:
        raise OptionError(f"split must be 'train' or 'test', found {split!r}.")
    return _SPLITS[split]


def _draw_pairs(rng: np.random.Generator, small: Small, count: int) -> tuple[Array, Array, Array]:
    """Return numbers of the first and the second images, and the labels, half of them 1."""
    classes = small.classes
    labels = rng.permutation(np.arange(count) % 2).astype(np.int64)
    first = rng.integers(len(classes), size=count)
    second = np.empty(count, dtype=np.int64)
    for value in np.unique(classes):
        same, different = np.flatnonzero(classes == value), np.flatnonzero(classes != value)
        for i in np.flatnonzero(classes[first] == value):
            others = same[same != first[i]]
            alike, unlike = (first[i : i + 1], others) if small.copies else (others, different)
            partners = alike if labels[i] else unlike
            if not len(partners):
                raise DataError(f"class {value} has too few images to make pairs.")
            second[i] = rng.choice(partners)
    return first, second, labels


def _visible(images: Array) -> Array:
    """Scale pixels to 0..1."""
    low, high = (images.min(), images.max()) if images.size else (0.0, 1.0)
    low, high = (0.0, 255.0) if images.dtype == np.uint8 else (low, high)
    return np.asarray((images - low) / max(high - low, 1e-9))
