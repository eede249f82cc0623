"""What any trained model ties together: separation spectra, interaction against patch distance.

The separation rank of a function with respect to a set of inputs is the rank of its matricization with
that set as rows (Razin, Maman and Cohen 2022, arXiv:2201.11729). Evaluated at samples it is the rank of
the matrix ``[f(a_i, b_j)]``, a lower bound for any model at all, and the singular values say how much
each term carries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg.errors import DataError, OptionError, ShapeError, blame, check_integer
from tnreg.far.interaction import crossed_values, interaction_energy
from tnreg.far.modes import evaluation, logits_of
from tnreg.far.patches import DifferingPatches, RandomPatches, RandomStream, as_given, box_mask, check_images
from tnreg.machine.progress import advancing
from tnreg.ranks.dense import effective_rank
from tnreg.tensors.arrays import Scaled, as_tensor, rescale

_MOST_IMAGES = 2048

LEAST, _OF_LARGEST = 1e-6, 0.01
"""Shares of the variance that count as nothing in words: below the first, or that part of the largest."""


@torch.no_grad()
def separation_spectrum(
    f: Callable[[Any, Any], Any], inside: Any, outside: Any, *, batch: int = 1024
) -> Tensor:
    """Return the singular values of ``[f(a_i, b_j)]``: what a region of the input shares with the rest.

    Their number above rounding bounds the separation rank of f from below.

    Args:
        f: Takes a batch of values of the region and a batch, equally long, of values of the rest, and
            gives one number for each pair: shape ``(B,)`` or ``(B, 1)``, real or complex, a tensor or
            an array. If it gives one number for a whole batch it is called again pair by pair. A network
            is used in the mode it is in; call ``net.eval()`` first.
        inside: The samples a_i, shape ``(k, ...)``.
        outside: The samples b_j, shape ``(l, ...)``.
        batch: Most pairs in one call.

    Returns:
        Shape ``(min(k, l),)``, descending.

    Raises:
        ShapeError: No samples, or f does not give one number for each pair.
        DataError: A value of f is NaN or infinite, or a sample holds NaN.

    Cost: ``k * l`` evaluations of f.

    Example:
        >>> a, b = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [3.0]])
        >>> s = separation_spectrum(lambda a, b: (a + b)[:, 0], a, b)  # a sum has separation rank 2
        >>> (s > 1e-6).tolist()
        [True, True, False]
    """
    batch = check_integer(batch, 1, "separation_spectrum: batch")
    a, b = (_check_samples(x, name) for x, name in ((inside, "inside"), (outside, "outside")))
    rows, columns = torch.cartesian_prod(torch.arange(len(a)), torch.arange(len(b))).T
    parts: list[Tensor] = []
    start = 0
    while start < len(rows):
        i, j = rows[start : start + batch], columns[start : start + batch]
        values = as_tensor(f(a[i.to(a.device)], b[j.to(b.device)]))
        if values.numel() == 1 < len(i):
            batch = 1
            continue
        if values.shape not in ((len(i),), (len(i), 1)) and not values.numel() == len(i) == 1:
            expected = f"{len(i)} numbers for {len(i)} pairs, shape ({len(i)},) or ({len(i)}, 1)"
            found = f"found shape {tuple(values.shape)}"
            raise ShapeError(f"separation_spectrum: f must give {expected}, {found}.", argument="f")
        parts.append(values.reshape(-1))
        start += len(i)
    matrix = torch.cat(parts).reshape(len(a), len(b))
    if not torch.isfinite(matrix).all():
        raise DataError("separation_spectrum: f gave NaN or infinite values.", argument="f")
    if matrix.dtype in (torch.float16, torch.bfloat16):
        matrix = matrix.float()
    elif not matrix.is_floating_point() and not matrix.is_complex():
        matrix = matrix.double()
    return _svdvals(matrix)


@dataclass(frozen=True)
class LocalityProfile:
    """How strongly a model ties two patches together, by the distance between them.

    Attributes:
        distances: Gap between the patches in pixels, shape ``(n,)``.
        interaction: Share of the variance over both patches that neither explains alone, in [0, 1], for
            every pair of patches: shape ``(n, pairs)``; 0 where ``M°`` is not above the rounding of M.
        effective_rank: Effective rank of the interaction ``M°``, ``(n, pairs)``; 0 where there is none.
        spectra: Singular values of ``M°``, descending, in units of the model: ``(n, pairs, samples)``.
        size: Side of the patches in pixels.
        boxes: The pairs of patches, ``(n, pairs, 2, 4)``.
    """

    distances: np.ndarray[Any, Any]
    interaction: np.ndarray[Any, Any]
    effective_rank: np.ndarray[Any, Any]
    spectra: np.ndarray[Any, Any]
    size: int
    boxes: np.ndarray[Any, Any] | None = None

    @property
    def standard_error(self) -> np.ndarray[Any, Any]:
        """Standard error of the mean interaction at every distance, ``(n,)``; NaN of a single pair."""
        return _standard_error(self.interaction)

    @property
    def summary(self) -> str:
        """What was found, in words.

        *Within*: every distance measured counts equally, with its mean interaction, and no other does. It is
        not weighted by how many pairs of patches an image has at a distance, as its shape decides that.
        The distance named is the first one measured within which there is 80 % of the sum.
        *Nothing*: below 1 % of the largest mean, or below a millionth of the variance. Shares of single
        pairs are exact but for rounding, so no standard error decides this.
        """
        order = np.argsort(self.distances)
        at, mean = np.asarray(self.distances)[order], self.interaction.mean(axis=1)[order]
        mean = np.where(worth_naming(mean), mean, 0.0)
        measured = f"Measured at {_listed(at)} pixels{', the only distance' * (len(at) == 1)}."
        if not mean.any():
            return f"No pair interaction. {measured}"
        top, error = int(mean.argmax()), self.standard_error[order]
        spread = "" if math.isnan(error[top]) else f" ± {_percent(error[top])}"
        largest = f"{_percent(mean[top])}{spread} % of the variance"
        if len(at) == 1:
            return f"Pair interaction is {largest}. {measured}"
        within = np.cumsum(mean) / mean.sum() + 1e-9  # against rounding
        near, far = int(np.argmax(within >= 0.8)), int(mean.nonzero()[0][-1])
        short = 0 < near == far
        near -= short
        pixels = f"{at[near]} pixel{'s' * int(at[near] != 1)}"
        lies = f"{'Only ' * short}{int(100 * within[near])} % of the pair interaction lies within {pixels}"
        last = far == len(at) - 1
        reach = f"it reaches {at[far]}, as far as measured" if last else f"nothing beyond {at[far]}"
        return f"{lies}; {reach}. It is largest at {at[top]}, {largest}. {measured}"

    def compare(self, other: LocalityProfile, names: tuple[str, str] = ("A", "B")) -> ProfileComparison:
        """Return how another model differs from this one, paired over the pairs of patches.

        Args:
            other: Its profile, with the same images, distances, size, pairs, ``where`` and seed.
            names: What this model and the other one are called.

        Raises:
            OptionError: The profiles are of other distances, sizes or pairs of patches.
        """
        mine, theirs = (vars(p) | {"number of pairs": p.interaction.shape} for p in (self, other))
        for what in ("distances", "size", "number of pairs", "boxes"):
            if not np.array_equal(mine[what], theirs[what]):
                instead = "measure both with the same images, distances, size, pairs, where and seed"
                message = f"compare: the profiles differ in {what}; {instead}."
                raise OptionError(message, argument="other")
        means = np.stack([self.interaction.mean(axis=1), other.interaction.mean(axis=1)])
        return ProfileComparison(names, self.distances, means, other.interaction - self.interaction)

    def __str__(self) -> str:
        columns = (self.distances, self.interaction, self.standard_error, self.effective_rank)
        return f"{'distance':>8}  interaction        effective rank" + "".join(
            f"\n{distance:8}  {share.mean():.4f} ± {error:.4f}    {rank.mean():.2f}"
            for distance, share, error, rank in zip(*columns, strict=True)
        )


@dataclass(frozen=True)
class ProfileComparison:
    """What a second model ties together more or less than a first, on the same patches and images.

    Attributes:
        names: Of the first model and the second.
        distances: Gap between the patches in pixels, shape ``(n,)``.
        means: Mean interaction of the first model and the second, ``(2, n)``.
        difference: Interaction of the second minus that of the first, pair by pair, ``(n, pairs)``.
    """

    names: tuple[str, str]
    distances: np.ndarray[Any, Any]
    means: np.ndarray[Any, Any]
    difference: np.ndarray[Any, Any]

    @property
    def standard_error(self) -> np.ndarray[Any, Any]:
        """Standard error of the mean difference at every distance, ``(n,)``; NaN of a single pair."""
        return _standard_error(self.difference)

    @property
    def differs(self) -> np.ndarray[Any, Any]:
        """Where the mean difference is more than three standard errors, ``(n,)``; nowhere for single pairs.

        With nine distances and 32 pairs chance alone does so in some 5 % of comparisons. A difference below
        a millionth of the variance is none.
        """
        mean = np.abs(self.difference.mean(axis=1))
        return np.asarray((mean > 3 * self.standard_error) & (mean > LEAST))

    @property
    def summary(self) -> str:
        """The difference in words; ``differs`` says where there is one."""
        (first, second), at, differs = self.names, np.asarray(self.distances), self.differs
        if np.isnan(self.standard_error).any():
            return f"{second} against {first}: a single pair of patches tells no difference from noise."
        if not differs.any():
            return f"{second} against {first}: no difference beyond noise at {_listed(at)} pixels."
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(self.means[0] > LEAST, self.means[1] / self.means[0], math.inf)
        parts, change = [], self.difference.mean(axis=1)
        for word, some in (("more", differs & (change > 0)), ("less", differs & (change < 0))):
            if some.any():
                extreme = ratio[some].max() if word == "more" else ratio[some].min()
                most = f"most at {at[some][ratio[some] == extreme][0]}: " * int(some.sum() > 1)
                times = f"{_digits(extreme)} times as much" if extreme < math.inf else f"{first} ties nothing"
                parts.append(f"{word} at {_listed(at[some])} pixels ({most}{times})")
        rest = "" if differs.all() else f"; no difference beyond noise at {_listed(at[~differs])}"
        return f"{second} ties {', '.join(parts)} than {first}{rest}."

    def __str__(self) -> str:
        first, second = self.names
        rows = zip(
            self.distances, self.difference.mean(axis=1), self.standard_error, self.differs, strict=True
        )
        return f"{'distance':>8}  {second} - {first}" + "".join(
            f"\n{distance:8}  {mean:+.4f} ± {error:.4f}{' *' * bool(differs)}"
            for distance, mean, error, differs in rows
        )


@torch.no_grad()
def locality_profile(
    net: Callable[[Tensor], Tensor],
    data: Any,
    *,
    distances: Sequence[int] | None = None,
    size: int | None = None,
    samples: int = 8,
    pairs: int = 32,
    where: str = "differing",
    output: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> LocalityProfile:
    """Measure the interaction of two patches in a trained model against the distance between them.

    For every pair of patches (I, J) one image of the data is the background, k others give values to I
    and to J: ``M[i, j]`` is the model's value with I from sample i and J from sample j, and ``M°`` is M
    without its row and column means. The share of ``|M°|²`` in ``|M - mean|²`` is the interaction; 0 is a
    model that adds up what it sees in I and in J, or sees neither.

    Args:
        net: Takes ``(B, ..., H, W)``, gives ``(B,)``, ``(B, 1)`` or ``(B, C)``; with several logits the
            shares are of all of them together. Used in evaluation mode and left in the mode it was in.
        data: Images, shape ``(N, ..., H, W)``, a tensor or an array, or batches of them (a ``DataLoader``;
            of tuples the first entry is taken), read as far as needed.
        distances: Gaps in pixels; nine between 0 and the largest if left out.
        size: Side of the patches; an eighth of the image's shorter side if left out.
        samples: k.
        pairs: Pairs of patches for each distance.
        where: ``"differing"``: places where images differ, see ``DifferingPatches``; ``"anywhere"``.
        output: Function from what the model gives to its logits, e.g. ``lambda out: out.logits``.
        seed: Same seed and data: the same patches and images, so that two models can be compared.
        progress: Show a progress bar.

    Raises:
        ShapeError: Too few images, or a distance that does not fit into them.
        OptionError: An argument out of range.
        DataError: Images or values of the model are NaN or infinite.

    Cost: ``len(distances) * pairs`` evaluations of k² images.
    """
    samples = check_integer(samples, 2, "locality_profile: samples")
    pairs = check_integer(pairs, 1, "locality_profile: pairs")
    if where not in ("differing", "anywhere"):
        message = f"locality_profile: where must be 'differing' or 'anywhere', found {where!r}."
        raise OptionError(message, argument="where")
    images = read_images(data, net, "locality_profile", samples + 1)
    height, width = images.shape[-2:]
    size = max(1, min(height, width) // 8) if size is None else size
    if distances is None:
        largest = max(max(height, width) - 2 * size, 0)
        distances = sorted({round(largest * i / 8) for i in range(9)})
    elif not len(distances):
        raise OptionError("locality_profile: give one of the distances or more.", argument="distances")
    kind = DifferingPatches if where == "differing" else RandomPatches
    columns: list[list[Tensor]] = [[], [], [], []]
    with advancing("pairs of patches", len(distances) * pairs, progress) as advance:
        for distance in distances:
            sampler = kind(size, distance, exact=True, seed=seed)
            generator = RandomStream(seed, "locality_profile").generator
            for _ in range(pairs):
                background, chosen = some_images(images, samples, generator)
                pair = sampler.draw(chosen)
                parts = (*cross(net, background, chosen, pair, output, "locality_profile"), pair)
                for column, part in zip(columns, parts, strict=True):
                    column.append(part)
                advance(1)

    def table(parts: list[Tensor]) -> np.ndarray[Any, Any]:
        return torch.stack(parts).reshape(len(distances), pairs, *parts[0].shape).cpu().numpy()

    shares, ranks, spectra, boxes = map(table, columns)
    return LocalityProfile(np.array(distances), shares, ranks, spectra, size, boxes)


def some_images(images: Tensor, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one image as the background, and others, ``(samples, ..., H, W)``, without repetition."""
    order = torch.randperm(len(images), generator=generator)[: samples + 1]
    some = images[order.to(images.device)]
    return some[0], some[1:]


def cross(
    net: Any, background: Tensor, images: Tensor, pair: Tensor, output: Any, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return share, effective rank and singular values of the interaction of a pair of boxes.

    ``M[i, j]`` has the first box from image i, the second from image j, and the rest from the background.
    What is left of a sum after the rounding of M is no interaction.
    """
    first, second = pair
    others = torch.where(box_mask(second, *images.shape[-2:]), images, background)
    with evaluation(net):
        values = crossed_values(net, others, images, first, partial(logits_of, output=output))
        values = values.transpose(0, 1)
    if not torch.isfinite(values).all():
        raise DataError(f"{name}: the model gave NaN or infinite values.", argument="net")
    wide = values.double()
    centred = wide - wide.mean(0, keepdim=True)
    centred = centred - centred.mean(1, keepdim=True)
    spectrum = _svdvals(centred.flatten(1))
    seen = spectrum > torch.finfo(values.dtype).eps * wide.abs().max() * len(images)
    share = torch.where(seen.any(), 1 - interaction_energy(values), 0.0)
    return share, effective_rank(torch.where(seen, spectrum, 0.0)), spectrum


def worth_naming(shares: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return which shares of the variance are not nothing, in words and pictures."""
    return np.asarray(shares > max(LEAST, _OF_LARGEST * shares.max()))


def _svdvals(matrix: Tensor) -> Tensor:
    """Return singular values on a scale of the matrix: not every solver squares large or small numbers."""
    scaled, log2 = rescale(matrix, ())
    return Scaled(torch.linalg.svdvals(scaled), log2.flatten()).value()


def _check_samples(x: Any, name: str) -> Tensor:
    if isinstance(x, list | tuple):
        x = torch.stack([as_tensor(part) for part in x]) if len(x) else torch.zeros(0)
    samples = as_tensor(x)
    if samples.ndim == 0 or len(samples) == 0:
        expected = "one sample or more along its first axis"
        message = f"{name} must hold {expected}, found shape {tuple(samples.shape)}."
        raise ShapeError(f"separation_spectrum: {message}", argument=name)
    if samples.isnan().any():
        raise DataError(f"separation_spectrum: {name} holds NaN.", argument=name)
    return samples


@blame("data")
def read_images(data: Any, net: Any, name: str, least: int) -> Tensor:
    """Return the finite images, or as many as needed of those that come in batches; see ``as_given``."""
    if isinstance(data, Tensor | np.ndarray):
        images = as_tensor(as_given(data, net))
    elif isinstance(data, Iterable):
        batches: list[Tensor] = []
        for batch in data:
            batches.append(as_tensor(as_given(batch[0] if isinstance(batch, list | tuple) else batch, net)))
            if sum(map(len, batches)) >= _MOST_IMAGES:
                break
        if not batches:
            raise ShapeError(f"{name}: data holds no batch.")
        images = torch.cat(batches)
    else:
        expected = "images (N, ..., H, W) or batches of them"
        raise ShapeError(f"{name}: data must be {expected}, found {type(data).__name__}.")
    images = check_images(images, name, least)
    if not torch.isfinite(images).all():
        raise DataError(f"{name}: images are NaN or infinite somewhere.")
    return images


def _standard_error(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the standard error of the mean of every row; NaN of a single value."""
    count, pairs = values.shape
    if pairs == 1:
        return np.full(count, math.nan)
    return np.asarray(values.std(axis=1, ddof=1) / math.sqrt(pairs))


def _digits(number: float) -> str:
    """Return a number with two digits, never as a power of ten."""
    return np.format_float_positional(number, 2, fractional=False, trim="-")


def _percent(share: float) -> str:
    return _digits(100 * share)


def _listed(distances: np.ndarray[Any, Any]) -> str:
    return ", ".join(map(str, distances))
