"""What any trained model ties together: separation spectra, and interaction against patch distance.

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
            every pair of patches: shape ``(n, pairs)``.
        effective_rank: Effective rank of the interaction ``M°``, ``(n, pairs)``; 0 where there is none.
        spectra: Singular values of ``M°``, descending, in units of the model: ``(n, pairs, samples)``.
        size: Side of the patches in pixels.
    """

    distances: np.ndarray[Any, Any]
    interaction: np.ndarray[Any, Any]
    effective_rank: np.ndarray[Any, Any]
    spectra: np.ndarray[Any, Any]
    size: int

    @property
    def standard_error(self) -> np.ndarray[Any, Any]:
        """Standard error of the mean interaction at every distance, ``(n,)``; NaN of a single pair."""
        count, pairs = self.interaction.shape
        if pairs == 1:
            return np.full(count, math.nan)
        return np.asarray(self.interaction.std(axis=1, ddof=1) / math.sqrt(pairs))

    def __str__(self) -> str:
        columns = (self.distances, self.interaction, self.standard_error, self.effective_rank)
        return f"{'distance':>8}  interaction        effective rank" + "".join(
            f"\n{distance:8}  {share.mean():.4f} ± {error:.4f}    {rank.mean():.2f}"
            for distance, share, error, rank in zip(*columns, strict=True)
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
    images = check_images(_read_images(data, net), "locality_profile", samples + 1)
    if not torch.isfinite(images).all():
        raise DataError("locality_profile: images are NaN or infinite somewhere.", argument="data")
    height, width = images.shape[-2:]
    size = max(1, min(height, width) // 8) if size is None else size
    if distances is None:
        largest = max(max(height, width) - 2 * size, 0)
        distances = sorted({round(largest * i / 8) for i in range(9)})
    kind = DifferingPatches if where == "differing" else RandomPatches
    shares, ranks, spectra = [], [], []
    with advancing("pairs of patches", len(distances) * pairs, progress) as advance:
        for distance in distances:
            sampler = kind(size, distance, exact=True, seed=seed)
            generator = RandomStream(seed, "locality_profile").generator
            for _ in range(pairs):
                order = torch.randperm(len(images), generator=generator)
                background, *others = images[order[: samples + 1].to(images.device)]
                values = _cross(net, background, torch.stack(others), sampler, output)
                shares.append(1 - interaction_energy(values))
                wide = values.double()
                centred = wide - wide.mean(0, keepdim=True)
                centred = centred - centred.mean(1, keepdim=True)
                spectra.append(_svdvals(centred.flatten(1)))
                # what is left of a sum after rounding is no interaction
                noise = torch.finfo(values.dtype).eps * wide.abs().max() * samples
                ranks.append(effective_rank(torch.where(spectra[-1] > noise, spectra[-1], 0.0)))
                advance(1)

    def table(parts: list[Tensor]) -> np.ndarray[Any, Any]:
        return torch.stack(parts).reshape(len(distances), pairs, *parts[0].shape).cpu().numpy()

    return LocalityProfile(np.array(distances), table(shares), table(ranks), table(spectra), size)


def _cross(net: Any, background: Tensor, images: Tensor, sampler: Any, output: Any) -> Tensor:
    """Return the model's values with I from image i and J from image j, ``(k, k, C)``."""
    inside, outside = sampler.draw(images)
    others = torch.where(box_mask(outside, *images.shape[-2:]), images, background)
    with evaluation(net):
        values = crossed_values(net, others, images, inside, partial(logits_of, output=output))
        values = values.transpose(0, 1)
    if not torch.isfinite(values).all():
        raise DataError("locality_profile: the model gave NaN or infinite values.", argument="net")
    return values if values.dtype == torch.float64 else values.float()


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
def _read_images(data: Any, net: Any) -> Tensor:
    """Return the images, or as many as needed of those that come in batches; see ``as_given``."""
    if isinstance(data, Tensor | np.ndarray):
        return as_tensor(as_given(data, net))
    if not isinstance(data, Iterable):
        expected = "images (N, ..., H, W) or batches of them"
        raise ShapeError(f"locality_profile: data must be {expected}, found {type(data).__name__}.")
    batches: list[Tensor] = []
    for batch in data:
        batches.append(as_tensor(as_given(batch[0] if isinstance(batch, list | tuple) else batch, net)))
        if sum(map(len, batches)) >= _MOST_IMAGES:
            break
    if not batches:
        raise ShapeError("locality_profile: data holds no batch.")
    return torch.cat(batches)
