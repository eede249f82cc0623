"""Arrays of any kind as finite torch tensors, with their checks; products along one axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from tnreg.errors import DataError, OptionError, ShapeError, check_integer
from tnreg.machine.memory import must_fit
from tnreg.trees.tree import ModeTree


class Scaled(NamedTuple):
    """The tensor ``x * 2**log2``, for numbers that leave the range of the dtype.

    Scales broadcast against ``x``, ``(R,)`` for the columns of a matrix. They are whole numbers wherever
    possible, so that they are exact, and constants to autograd: what is multilinear does not depend on them.
    """

    x: Tensor
    log2: Tensor

    def value(self) -> Tensor:
        """Return the tensor without a scale: infinite only if the result is; zeros stay, with gradients."""
        x, log2 = self
        if x.is_complex():
            return torch.complex(Scaled(x.real, log2).value(), Scaled(x.imag, log2).value())
        # the power alone may overflow where the product does not
        half, reach = (log2 / 2).floor(), _reach(x.dtype)
        return x * torch.exp2(half.clamp(-reach, reach)) * torch.exp2((log2 - half).clamp(-reach, reach))


def rescale(x: Tensor, dim: int | tuple[int, ...]) -> Scaled:
    """Divide by the power of two below the largest magnitude along ``dim``."""
    log2 = power_below(x.detach().abs().amax(dim, keepdim=True))
    return Scaled(x / torch.exp2(log2), log2)


def power_below(size: Tensor) -> Tensor:
    """Exponents of the powers of two below these magnitudes, 0 for zeros, within what can be inverted."""
    return _power_below(size + (size == 0))


def _power_below(size: Tensor) -> Tensor:
    reach = _reach(size.dtype)
    return size.log2().floor().clamp(-reach, reach)


def _reach(dtype: torch.dtype) -> float:
    """Return the exponent of a power of two that is finite, and so is its inverse."""
    return math.log2(torch.finfo(dtype).max) - 2


def exact_scales(x: Tensor) -> Tensor:
    """Return half precision as float32: sums of many exponents would be rounded, and scales wrong."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def powers_below(sizes: Tensor) -> Tensor:
    """Return ``power_below``, but of zeros the lowest along the last axis: they set no common scale."""
    if sizes.device.type == "cpu" and bool(sizes.all()):  # as most often, and cheaper to ask than to mend
        return _power_below(sizes)
    log2, dead = power_below(sizes), sizes == 0
    lowest = torch.where(dead, math.inf, log2).amin(-1, keepdim=True)
    return torch.where(dead, torch.where(lowest.isinf(), 0, lowest), log2)


def matricize(tensor: Tensor | np.ndarray[Any, Any], modes: Sequence[int] | int) -> Tensor:
    """Return the matrix of a tensor with the given modes as rows and the other modes as columns.

    Rows and columns run through their modes in ascending order, last index fastest, in whatever order the
    modes are given: shape ``(product of D_n over modes, product over the others)``. A view where possible;
    differentiable. A mode out of range or named twice raises a ``ShapeError``.

    Example:
        >>> matricize(torch.zeros(2, 3, 5), (0, 2)).shape
        torch.Size([10, 3])
    """
    tensor = as_tensor(tensor)
    rows = sorted(modes) if isinstance(modes, Iterable) else [modes]
    if len(set(rows)) < len(rows) or any(not 0 <= m < tensor.ndim for m in rows):
        raise ShapeError(f"matricize: modes must be distinct and within 0..{tensor.ndim - 1}, found {modes}.")
    columns = [m for m in range(tensor.ndim) if m not in rows]
    height = math.prod(tensor.shape[m] for m in rows)
    return tensor.permute(rows + columns).reshape(height, -1)


def as_tensor(values: Any, *, missing: bool = False) -> Tensor:
    """Read numbers of any kind as a torch tensor: torch, DLPack, numpy in any layout or byte order, lists.

    What is behind a mask of ``numpy.ma`` (also in lists and Dask arrays), ``None`` among numbers and what
    pandas or arrow call missing are refused; with ``missing`` they are NaN.
    """
    if isinstance(values, Tensor):
        if values.layout != torch.strided:
            advice = "for a few entries of a large tensor: completion(index=..., values=..., sizes=...)"
            must_fit("a sparse tensor as a dense one", [values.shape], values.dtype, values.device, advice)
        strided = values.to_dense() if values.layout != torch.strided else values
        return strided.resolve_conj().resolve_neg()  # lazy views have no real parts to look at
    try:
        if hasattr(values, "__dlpack__") and not (isinstance(values, np.ndarray) or _may_hide(values)):
            try:
                return torch.utils.dlpack.from_dlpack(values)
            except (BufferError, RuntimeError, TypeError, ValueError):
                if not hasattr(values, "__array__"):
                    raise
        array = _with_mask(values)
        native = array.astype(array.dtype.newbyteorder("="))  # torch reads the machine's order only
        hidden = int(np.ma.count_masked(native))  # type: ignore[no-untyped-call]
        if hidden and missing:
            native = np.ma.filled(native.astype(np.result_type(native, np.float16)), np.nan)
        tensor = torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"not a tensor of numbers: {type(values).__name__}.\n  {error}\n"
            "  a file or a named tensor is read by tnreg.load_tensor(...).values"
        ) from None
    if hidden and not missing:
        raise DataError(
            f"{hidden} of {native.size} entries are masked or missing, and all are needed here.\n"
            "  fill them in first: tnreg.complete(array).completed(), or e.g. array.filled(0.0)"
        )
    return tensor


def _with_mask(values: Any) -> Any:
    """Return an array, a masked one if entries are masked in it or in the lists that it is made of."""
    if isinstance(values, list | tuple) and _may_hide(values):
        return np.ma.stack(list(map(_with_mask, values)))
    if getattr(values, "null_count", 0):  # pyarrow
        values = values.to_pylist()
    values = values.compute() if hasattr(values, "compute") else values  # dask: numpy forgets its masks
    array = np.asanyarray(values)
    if hasattr(values, "isna") and array.dtype != object:  # pandas
        return np.ma.array(array, mask=np.asarray(values.isna()))
    if array.dtype != object:
        return array
    unknown = [x is None or x is np.ma.masked or type(x).__name__ == "NAType" for x in array.flat]
    known = np.array([0 if skip else x for skip, x in zip(unknown, array.flat, strict=True)])
    return np.ma.array(known, mask=unknown).reshape(array.shape)


def _may_hide(values: Any) -> bool:
    """Return whether numpy forgets which of these are missing: masks, arrays of pandas, arrow and Dask."""
    if isinstance(values, list | tuple):
        return not {float, int}.issuperset(map(type, values)) and any(map(_may_hide, values))
    return isinstance(values, np.ma.MaskedArray) or any(
        hasattr(values, name) for name in ("isna", "null_count", "compute")
    )


def array_of(values: Any, axes: int | None, what: str) -> Tensor:
    """Read an array of ``axes`` axes (any number if ``None``); ``what`` names it in errors."""
    try:
        array = as_tensor(values).detach()
    except DataError as error:
        raise DataError(f"{what} cannot be read: {error}") from None
    if axes is not None and array.ndim != axes:
        raise ShapeError(f"{what} needs {axes} axes, found shape {tuple(array.shape)}.")
    return array


def check_dense(tensor: Any, tree: ModeTree) -> Tensor:
    """Read a finite tensor of real or complex numbers with ``tree.order`` axes, or raise one clear error."""
    tensor = as_tensor(tensor)
    check_order(tuple(tensor.shape), tree)
    return check_numbers(tensor)


def check_order(shape: Sequence[int], tree: ModeTree) -> None:
    """Refuse shapes of another order than the tree's."""
    if len(shape) != tree.order:
        raise ShapeError(
            f"the tensor has {len(shape)} axes and the tree {tree.order} modes.\n"
            f"  found:    shape {shape}\n"
            f"  expected: one axis for each of the modes 0..{tree.order - 1}",
            argument="tree",
        )


def check_numbers(tensor: Tensor) -> Tensor:
    """Refuse integers, dtypes that cannot be computed with, and empty, NaN and infinite data."""
    check_largest(tensor)
    return tensor


def check_largest(tensor: Tensor) -> float:
    """Refuse what ``check_numbers`` does; return the largest magnitude, as ``largest_of`` does."""
    if tensor.dtype not in _DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise DataError(
            f"the tensor has dtype {tensor.dtype}; ranks and factorizations need real or complex numbers:\n"
            f"  {names}; write tensor.to(torch.float64)"
        )
    if tensor.numel() == 0:
        raise DataError(f"the tensor is empty: shape {tuple(tensor.shape)}.")
    largest = float(largest_of(tensor.detach()))
    if not math.isfinite(largest):  # so far without arrays of its size
        bad = int((~torch.isfinite(tensor)).sum())
        nan = int(torch.isnan(tensor).sum())
        raise DataError(
            f"the tensor has {bad} entries that are not finite ({nan} NaN, {bad - nan} infinite) "
            f"of {tensor.numel()}.\n"
            "  if NaN marks missing entries: tnreg.complete(tensor).completed()",
            argument="missing",
        )
    return largest


def double(x: Tensor) -> Tensor:
    """Return a tensor in double precision, where its device has that."""
    wide = torch.complex128 if x.is_complex() else torch.float64
    if x.dtype == wide or x.device.type == "mps":
        return x
    must_fit("a copy in double precision", [x.shape], wide, x.device, "take a smaller one")
    return x.to(wide)


def to_core(x: Tensor, tree: ModeTree, work: torch.dtype = torch.float64) -> tuple[Tensor, int]:
    """Return ``(core, log2)``, the tensor as ``core * 2**log2``, axes in the order of the tree's leaves.

    See ``to_range``.
    """
    core, log2 = to_range(x.detach().permute(tree.leaf_order), work)
    return core.contiguous(), log2


def to_range(
    x: Tensor, work: torch.dtype = torch.float64, largest: float | None = None
) -> tuple[Tensor, int]:
    """Return ``(y, log2)``, ``x = y * 2**log2``, with ``y`` in a precision and squares that stay in range.

    The largest magnitude is looked for unless it is known.
    """
    x = double(x) if work == torch.float64 else exact_scales(x)
    largest, log2 = float(largest_of(x.detach())) if largest is None else largest, 0
    if not squares_fit(largest, work):
        log2 = math.frexp(largest)[1] - 1
        x = times_power_of_two(x, -log2)
    return x if work == torch.float64 else x.to(single_of(x.dtype)), log2


def single_of(dtype: torch.dtype) -> torch.dtype:
    """Return the single precision of a real or complex dtype."""
    return torch.complex64 if dtype.is_complex else torch.float32


def check_precision(precision: Any) -> torch.dtype:
    """Return the real dtype of a precision: ``"double"`` or ``"single"``."""
    if precision not in ("double", "single"):
        raise OptionError(
            f"precision must be 'double' or 'single', found {precision!r}.", argument="precision"
        )
    return torch.float64 if precision == "double" else torch.float32


def times_power_of_two(x: Any, exponent: int) -> Any:
    """Return ``x * 2**exponent`` of a number or a tensor, also where the power itself leaves the range."""
    half = exponent // 2
    return x * 2.0**half * 2.0 ** (exponent - half)


def squares_fit(largest: float, work: torch.dtype = torch.float64) -> bool:
    """Return whether squares of numbers up to this, and their sums, keep all digits of a precision."""
    low, high = (1e-100, 1e100) if work == torch.float64 else (1e-6, 1e12)
    return largest == 0 or low < largest < high


def largest_of(x: Tensor) -> Tensor:
    """Return the largest magnitude (within a factor of sqrt 2 for complex numbers), without a copy."""
    parts = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    low, high = torch.aminmax(parts)
    return torch.maximum(-low, high)


def check_index(index: Tensor, mode_sizes: Sequence[int]) -> Tensor:
    """Refuse an index that is not an int64 tensor ``(B, N)`` within the mode sizes."""
    order = len(mode_sizes)
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        found = f"dtype {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
        raise DataError(
            f"an index must be an int64 tensor of shape (B, {order}), found {found}.\n"
            "  write torch.as_tensor(index, dtype=torch.int64)"
        )
    if index.ndim != 2 or index.shape[1] != order:
        raise ShapeError(
            f"an index has one row per entry and one column per mode.\n"
            f"  found:    shape {tuple(index.shape)}\n  expected: (B, {order})"
        )
    if index.shape[0] == 0:
        raise DataError("an empty batch: the index has no rows; give at least one entry.")
    sizes = torch.tensor(mode_sizes, device=index.device)
    wrong = ((index < 0) | (index >= sizes)).nonzero()
    if len(wrong):
        row, mode = wrong[0].tolist()
        raise DataError(
            f"index out of range: {len(wrong)} of {index.numel()} values.\n"
            f"  first: row {row} has {int(index[row, mode])} at mode {mode}, "
            f"whose size is {mode_sizes[mode]}\n"
            f"  expected: 0 <= index < {mode_sizes[mode]}, counted from 0"
        )
    return index


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def check_dtype(dtype: Any, *, real: bool = False) -> torch.dtype:
    """Refuse dtypes that cannot be computed with; with ``real`` the complex ones as well."""
    allowed = _DTYPES[:4] if real else _DTYPES
    if dtype not in allowed:
        kinds = "floating" if real else "floating or complex"
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise OptionError(
            f"dtype must be a {kinds} torch.dtype that can be computed with, found {dtype!r}.\n"
            f"  expected: {names}",
            argument="dtype",
        )
    return cast(torch.dtype, dtype)


def is_autocast(device: torch.device) -> bool:
    """Return whether ``torch.autocast`` is on for a device."""
    kind = device.type
    return (kind == "cpu" or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a block without ``torch.autocast``: many factors multiplied in half precision keep no digits."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device) else nullcontext()


def check_features(
    features: Tensor | Sequence[Tensor],
    sizes: Sequence[int],
    dtype: torch.dtype,
    *,
    layouts: Sequence[tuple[int, ...]] | None = None,
    name: str = "features",
    owner: str = "model",
) -> list[Tensor]:
    """Refuse features that do not fit the modes, empty batches, and other dtypes than the weights'.

    Under ``torch.autocast`` features of any floating dtype are cast to that of the weights.

    Features are N tensors ``(B, D_n)``; or one tensor, if all modes have one size, whose shape behind the
    batch is one of ``layouts``, ``(N, D)`` if left out. Messages call them ``name`` and the weights those of
    ``owner``. Return a list of the tensors.
    """
    order = len(sizes)
    if len(set(sizes)) > 1:
        layouts = []
    elif layouts is None:
        layouts = [(order, sizes[0])]
    if isinstance(features, Tensor):
        parts, fits = [features], tuple(features.shape[1:]) in layouts
    elif isinstance(features, Sequence):
        parts = [as_tensor(part) for part in features]
        fits = len(parts) == order and all(
            part.ndim == 2 and part.shape == (parts[0].shape[0], size)
            for part, size in zip(parts, sizes, strict=True)
        )
    else:
        parts, fits = [], False
    if not fits:
        shapes = [tuple(part.shape) for part in parts]
        if isinstance(features, Tensor):
            found = str(shapes[0])
        elif len(shapes) > 16:
            found = f"{len(parts)} tensors, {shapes[0]} first"
        else:
            found = str(shapes) if shapes else type(features).__name__
        whole = "".join(f"(B, {', '.join(map(str, layout))}) or " for layout in layouts)
        each = str(tuple(sizes)) if order <= 16 else f"({', '.join(map(str, sizes[:8]))}, ...)"
        raise ShapeError(
            f"features do not fit the modes.\n  found:    {found}\n"
            f"  expected: {whole}{order} tensors (B, D_n) with D = {each}",
            argument=name,
        )
    if parts[0].shape[0] == 0:
        raise DataError("an empty batch: give at least one sample.", argument=name)
    if is_autocast(parts[0].device):
        parts = [part.to(dtype) if part.is_floating_point() else part for part in parts]
    wrong = [part.dtype for part in parts if part.dtype != dtype]
    if wrong:
        raise DataError(
            f"features have dtype {wrong[0]}, the weights {dtype}; write {name}.to({owner}.dtype).",
            argument=name,
        )
    return parts


def seeded(seed: Any, what: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator with this seed, any integer that torch takes; ``what`` as for ``check_integer``."""
    with suppress(OptionError):
        if (number := check_integer(seed, -(2**63), what)) < 2**64:
            return torch.Generator(device).manual_seed(number)
    message = f"{what} must be an integer from -2**63 to 2**64 - 1, found {seed!r}."
    raise OptionError(message, argument="seed")


def draw_normal(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw standard normal numbers where the generator lives, the same ones for every device."""
    where = device if generator is None else generator.device
    values = torch.randn(shape, dtype=dtype, device=where, generator=generator)
    return values.to(device or values.device)
