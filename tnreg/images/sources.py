"""Where the small images of pairs come from: files inside packages, an unpacked archive, or arrays."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tnreg.errors import DataError, FileError, OptionError, ShapeError
from tnreg.tensors.arrays import array_of

Array = np.ndarray[Any, Any]

# What pickles of numpy arrays need, as Python 2 and 3 write them; none of it runs code.
_PICKLED = {
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray",
    "numpy.dtype", "_codecs.encode",
}  # fmt: skip
_PHOTOGRAPHS = (  # of training, and of test
    ("sklearn/datasets/images/china.jpg", *(f"skimage/data/{name}" for name in (
        "astronaut.png", "brick.png", "camera.png", "coffee.png", "coins.png", "grass.png",
        "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "page.png", "retina.jpg",
    ))),
    ("sklearn/datasets/images/flower.jpg", *(f"skimage/data/{name}" for name in (
        "cell.png", "chelsea.png", "gravel.png", "moon.png", "rocket.jpg", "text.png",
    ))),
)  # fmt: skip


class Small(NamedTuple):
    """Small images of one split ``(N, channels, height, width)``, and classes ``(N,)``.

    If ``copies``, an image is of one class with itself alone, and is compared with others of its group, which
    ``classes`` has. ``noise`` is the standard deviation that pairs get if none is asked for.
    """

    images: Array
    classes: Array
    name: str
    noise: float = 0.0
    copies: bool = False


def small_images(source: Any, seed: int, part: int) -> Small:
    """Return the images of a split (0: training, 1: test) of a source of ``is_same_class``."""
    if isinstance(source, str | os.PathLike):
        inside = _INSIDE.get(str(source))
        return inside(seed, part) if inside else _cifar(source, part)
    if not isinstance(source, Sequence) or len(source) != 2:
        message = f"is_same_class: source is {', '.join(map(repr, _INSIDE))}, the folder of CIFAR-10, or "
        raise OptionError(
            f"{message}(images, classes) of your own, found {type(source).__name__}.", argument="source"
        )
    return _own(source[0], source[1], seed, part)


def load_digits() -> tuple[Array, Array]:
    """Return the digits of scikit-learn, ``(1797, 64)`` from 0 to 16, and their classes.

    OptionError if scikit-learn is missing.
    """
    try:
        from sklearn import datasets
    except ImportError:
        message = "the digits come with scikit-learn, which is not installed: pip install 'tnreg[images]'"
        raise OptionError(message) from None
    values, classes = datasets.load_digits(return_X_y=True)
    return values, classes


def _digits(seed: int, part: int) -> Small:
    values, classes = load_digits()
    small = (values / 16 - 0.3).astype(np.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng([seed, 0]).permutation(len(small))
    picked = np.split(order, [2 * len(small) // 3])[part]
    return Small(small[picked], classes[picked], "digits", noise=0.2)


def _photographs(seed: int, part: int) -> Small:
    """Cut photographs of half their size into squares of 8x8, mean 0 and standard deviation 0.35 each."""
    from PIL import Image

    squares, numbers = [], []
    for number, name in enumerate(_PHOTOGRAPHS[part]):
        package, _, inside = name.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            message = "the photographs come with scikit-learn and scikit-image, and one is not installed"
            raise OptionError(f"{message}: pip install 'tnreg[images]'", argument="source")
        with Image.open(Path(spec.origin).parent / inside) as file:
            gray = np.asarray(file.convert("L").reduce(2), dtype=np.float32) / 255
        rows, columns = (n // 8 for n in gray.shape)
        cut = gray[: 8 * rows, : 8 * columns].reshape(rows, 8, columns, 8).swapaxes(1, 2)
        squares.append(cut.reshape(-1, 1, 8, 8))
        numbers.append(np.full(len(squares[-1]), number))
    small, photograph = np.concatenate(squares), np.concatenate(numbers)
    deviation = small.std((1, 2, 3), keepdims=True)
    small = 0.35 * (small - small.mean((1, 2, 3), keepdims=True)) / np.maximum(deviation, 1e-6)
    picked = _some(photograph, deviation.ravel() > 0.04, 500, np.random.default_rng([seed, 0]))
    return Small(small[picked], photograph[picked], "photos", noise=0.3, copies=True)


def _spectra(seed: int, part: int) -> Small:
    """Show spectra of Indian Pines as 8x8 images; every third block of 8x8 pixels is for test."""
    try:
        from tensorly.datasets import load_indian_pines
    except ImportError:
        message = "the spectra come with tensorly, which is not installed: pip install 'tnreg[data]'"
        raise OptionError(message, argument="source") from None
    scene = load_indian_pines()
    fields = np.asarray(scene.ticks[0])
    row, column = np.indices(fields.shape) // 8
    test = ((row + column) % 3 == 2).ravel()
    classes = fields.ravel().astype(np.int64)
    spectra = np.asarray(scene.tensor, dtype=np.float64).reshape(len(classes), -1)
    large = (np.bincount(classes) > 400)[classes] & (classes > 0)
    known = spectra[large & ~test]
    standard = (spectra - known.mean(0)) / known.std(0)
    # 200 bands: three by three are one pixel, the last eight are left out
    small = 0.35 * standard[:, :192].reshape(-1, 1, 8, 8, 3).mean(-1)
    picked = _some(classes, large & (test == part), 300, np.random.default_rng([seed, 0]))
    return Small(small[picked].astype(np.float32), classes[picked], "spectra")


_INSIDE = {"digits": _digits, "photos": _photographs, "spectra": _spectra}


def _some(groups: Array, allowed: Array, most: int, rng: np.random.Generator) -> Array:
    """Draw at most so many members of each group."""
    members = [np.flatnonzero(allowed & (groups == group)) for group in np.unique(groups)]
    return np.concatenate([rng.permutation(some)[:most] for some in members])


def _own(images: Any, classes: Any, seed: int, part: int) -> Small:
    """Return two thirds of every class, or the rest."""
    given, values = array_of(images, 4, "source: images"), array_of(classes, 1, "source: classes")
    if len(given) != len(values) or not given.numel():
        message = f"found images {tuple(given.shape)} and classes {tuple(values.shape)}"
        raise ShapeError(f"source: images need pixels, and a class each; {message}.", argument="source")
    floating = given.is_floating_point()
    if not (floating or given.dtype == torch.uint8) or values.is_floating_point() or values.is_complex():
        message = "images are floating point or uint8, and classes whole numbers; found "
        raise DataError(f"source: {message}{given.dtype} and {values.dtype}.", argument="source")
    small, of = (given.float() if floating else given).cpu().numpy(), values.cpu().numpy()
    if bad := int((~np.isfinite(small)).any((1, 2, 3)).sum()):
        message = f"{bad} of {len(small)} images have pixels that are not finite in single precision"
        raise DataError(f"source: {message}.", argument="source")
    order = np.random.default_rng([seed, 0]).permutation(len(small))
    members = [order[of[order] == value] for value in np.unique(of)]
    fewest = min(members, key=len)
    if len(members) < 2 or len(fewest) < 4:
        raise DataError(
            "source: pairs need two classes, and four images of each, two for every split; found "
            f"{len(members)} classes, and {len(fewest)} images of class {of[fewest[0]]}.",
            argument="source",
        )
    picked = np.concatenate([np.split(some, [2 * len(some) // 3])[part] for some in members])
    return Small(small[picked], of[picked], "own")


def _cifar(source: str | os.PathLike[str], part: int) -> Small:
    inside = Path(source) / "cifar-10-batches-py"
    folder = inside if inside.is_dir() else Path(source)
    names = ["test_batch"] if part else [f"data_batch_{i}" for i in range(1, 6)]
    images, classes = [], []
    for name in names:
        path = folder / name
        try:
            batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
            data, labels = np.asarray(batch[b"data"]), batch[b"labels"]
            if data.dtype != np.uint8 or data.shape != (len(labels), 3072):
                raise ValueError(f"data {data.shape} {data.dtype} beside {len(labels)} labels")
        except FileNotFoundError:
            raise FileError(
                f"no such file: {path}\n"
                f"  source is {', '.join(map(repr, _INSIDE))}, or the folder cifar-10-batches-py of the "
                "CIFAR-10 archive for Python (cifar-10-python.tar.gz), unpacked",
                argument="source",
            ) from None
        except Exception as error:
            message = f"not a batch of CIFAR-10: {path}\n  {type(error).__name__}: {error}"
            raise FileError(message, argument="source") from None
        images.append(data.reshape(-1, 3, 32, 32))
        classes.append(np.asarray(labels))
    return Small(np.concatenate(images), np.concatenate(classes), "cifar-10")


class _ArrayUnpickler(pickle.Unpickler):
    """Read dicts, lists, numbers, bytes and numpy arrays; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _PICKLED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not needed for images")
