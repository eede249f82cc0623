"""What a factorization is trained on: observed entries (completion) or rank-one measurements (sensing)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from opt_einsum.parser import get_symbol
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tnreg.errors import DataError, OptionError, ShapeError, check_integer, check_number
from tnreg.factorizations.factorization import Factorization
from tnreg.networks.einsum import einsum
from tnreg.networks.network import Network, check_sizes
from tnreg.networks.plan import Plan, plan
from tnreg.tensors.arrays import (
    Scaled,
    as_tensor,
    check_index,
    check_numbers,
    double,
    is_autocast,
    largest_of,
    rescale,
    seeded,
)
from tnreg.tensors.tables import entries_of, is_table


class Completion:
    """Observed entries of a tensor, and unseen ones to test on.

    Attributes:
        sizes: Mode sizes.
        index: Indices of the observed entries, ``(B, N)`` int64; ``values`` are the entries, ``(B,)``.
        test_index: The same of unseen entries, with ``test_values``; ``None`` if none are known.
    """

    def __init__(
        self,
        index: Tensor,
        values: Tensor,
        sizes: Sequence[int],
        test_index: Tensor | None = None,
        test_values: Tensor | None = None,
    ) -> None:
        listed = tuple(sizes) if np.iterable(sizes) else ()
        if not listed:
            message = f"completion: sizes must be one integer for each mode, found {sizes!r}."
            raise ShapeError(message, argument="sizes")
        self.sizes = check_sizes(listed, len(listed))
        self.index, self.values = _check_entries(index, values, self.sizes)
        if (test_index is None) != (test_values is None):
            message = "completion: give test_index and test_values together, or neither."
            raise OptionError(message, argument="test_index")
        self.test_index, self.test_values = test_index, test_values
        if test_index is not None and test_values is not None:
            self.test_index, self.test_values = _check_entries(test_index, test_values, self.sizes)
        self._plans: dict[tuple[Network, torch.device, bool], Plan] = {}

    def loss(self, model: nn.Module) -> Tensor:
        """Return ``1/B Σ_b |W[index_b] - values_b|²`` over the observed entries; scalar, differentiable.

        It is in the square of the data's unit: scale data whose squares leave the range of the dtype.
        """
        return _mean_square(self._predict(model), self.values)

    @torch.no_grad()
    def test_error(self, model: nn.Module) -> float:
        """Return ``‖W - W*‖ / ‖W*‖`` over the unseen entries: 1.0 for a prediction of zeros.

        If all of them are zero, it is 0.0 or infinite.

        Raises:
            OptionError: No unseen entries are known.
        """
        if self.test_values is None:
            message = "test_error: no unseen entries are known to this task."
            hint = "completion(index=, values=, sizes=, test_index=, test_values=)"
            raise OptionError(f"{message}\n  give {hint},\n  or a target to sample from")
        return relative_error(self._predict(model, unseen=True), self.test_values)

    @torch.no_grad()
    def train_error(self, model: nn.Module) -> float:
        """Return ``‖W - W*‖ / ‖W*‖`` over the observed entries."""
        return relative_error(self._predict(model), self.values)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Completion:
        """Return the same task on another device or in another dtype.

        Raises:
            DataError: The dtype cannot hold the values.
        """
        index, values = self.index.to(device), _cast(self.values, device, dtype)
        tested: tuple[Tensor, ...] = ()
        if self.test_index is not None and self.test_values is not None:
            tested = self.test_index.to(device), _cast(self.test_values, device, dtype)
        return Completion(index, values, self.sizes, *tested)

    def _predict(self, model: nn.Module, *, unseen: bool = False) -> Tensor:
        index = self.test_index if unseen else self.index
        assert index is not None
        inner = model if isinstance(model, Factorization) else _inside(model)
        if not isinstance(inner, Factorization):
            return model.entries(index)  # type: ignore[operator, no-any-return]
        key = (inner.network, device := inner.device, unseen)
        if (chosen := self._plans.get(key)) is None:  # checked and planned once, not at every step
            _check_model(inner, self.sizes)
            if device.type != self.values.device.type:
                places = f"the model is on {device}, the task on {self.values.device}"
                raise OptionError(f"{places}; write task.to(model.device).")
            chosen = self._plans[key] = plan(inner.network, index=index.to(device))
        # wrappers can only be called, and let processes exchange gradients then
        return (inner.entries if inner is model else model)(chosen)

    def __repr__(self) -> str:
        unseen = 0 if self.test_values is None else len(self.test_values)
        return f"<Completion of {self.sizes}: {len(self.values)} entries observed, {unseen} unseen>"


class Sensing:
    """Inner products of a tensor with rank-one tensors: random ones, or features of each variable.

    Attributes:
        features: For every mode n the factors ``(B, D_n)`` of the measurements ``values``, ``(B,)``.
        target: The dense tensor, to test against; ``None`` if it is not known.
        test_features: Features of measurements to test on, with ``test_values``; ``None`` if there are none.
    """

    def __init__(
        self,
        features: Any,
        values: Any,
        target: Tensor | None = None,
        test_features: Any = None,
        test_values: Any = None,
    ) -> None:
        self.features, self.values = _check_measurements(features, values)
        self.sizes = tuple(part.shape[1] for part in self.features)
        self.target = target
        if (test_features is None) != (test_values is None):
            message = "sensing: give test_features and test_values together, or neither."
            raise OptionError(message, argument="test_features")
        self.test_features, self.test_values = test_features, test_values
        if test_features is not None:
            self.test_features, self.test_values = _check_measurements(
                test_features, test_values, self.sizes, self.values.dtype
            )

    def loss(self, model: nn.Module) -> Tensor:
        """Return ``1/B Σ_b |<x_b0 ⊗ .. ⊗ x_bN-1, W> - values_b|²``: scalar, differentiable."""
        return _mean_square(self._predict(model, self.features), self.values)

    @torch.no_grad()
    def test_error(self, model: nn.Module) -> float:
        """Return the relative error over what is there to test on.

        With measurements of your own it is ``‖y - y*‖ / ‖y*‖`` over the test measurements; for a target
        ``‖W - W*‖ / ‖W*‖`` over all entries, of which only projections were observed.

        Raises:
            OptionError: There is nothing to test on.
        """
        if self.test_values is not None:
            return relative_error(self._predict(model, self.test_features), self.test_values)
        if self.target is None:
            message = "test_error: this task does not know its target tensor, nor other measurements."
            hint = "sensing(features=, values=, test_features=, test_values=)"
            raise OptionError(f"{message}\n  write {hint}")
        return relative_error(_inside(model).to_tensor(), self.target)

    @torch.no_grad()
    def train_error(self, model: nn.Module) -> float:
        """Return ``‖y - y*‖ / ‖y*‖`` over the measurements."""
        return relative_error(self._predict(model, self.features), self.values)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Sensing:
        """Return the same task on another device or in another dtype.

        Raises:
            DataError: The dtype cannot hold the values.
        """
        cast = partial(_cast, device=device, dtype=dtype)
        target = None if self.target is None else cast(self.target)
        tested: tuple[Any, ...] = ()
        if self.test_values is not None:
            tested = [cast(part) for part in self.test_features], cast(self.test_values)
        return Sensing([cast(part) for part in self.features], cast(self.values), target, *tested)

    def _predict(self, model: nn.Module, features: Any) -> Tensor:
        if isinstance(inner := _inside(model), Factorization):
            _check_model(inner, self.sizes)
            if inner.dtype != self.values.dtype and not is_autocast(inner.device):
                types = f"the model is of {inner.dtype}, the task of {self.values.dtype}"
                raise DataError(f"{types}; write task.to(dtype=model.dtype).")
        return model(features)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        tested = "" if self.test_values is None else f", {len(self.test_values)} to test on"
        return f"<Sensing of {self.sizes}: {len(self.values)} rank-one measurements{tested}>"


def completion(
    target: Any = None,
    samples: int | float | None = None,
    seed: int = 0,
    *,
    missing: str | None = None,
    index: Tensor | None = None,
    values: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    test_index: Tensor | None = None,
    test_values: Tensor | None = None,
) -> Completion:
    """Complete a tensor from some of its entries: drawn from a target, or your own by their index.

    Args:
        target: Dense tensor, or a ``Factorization`` that stands for one; or a pandas table in long form,
            a row for every entry that is known (columns of the index and ``value``, ``tensors.tables``).
        samples: Number of observed entries, drawn uniformly without replacement; a float in (0, 1) is
            their share. The other entries are the test set. Left out, all rows of a table are observed.
        seed: Chooses the entries, the same ones on every device.
        missing: ``"nan"`` if NaN (or a mask of numpy's) in the target marks entries that were never
            measured: they are neither observed nor tested. Otherwise NaN is refused.
        index: Observed multi-indices ``(B, N)``, int64.
        values: Their values ``(B,)``.
        sizes: Mode sizes.
        test_index: Unseen multi-indices to test on, if there are any.
        test_values: Their values.

    Raises:
        DataError: NaN without ``missing="nan"``, infinite or integer data, an index out of range,
            nothing to observe.
        ShapeError, OptionError: Shapes or arguments that do not fit each other.

    Example:
        >>> task = completion(torch.eye(4, dtype=torch.float64), 8, seed=0)
        >>> task
        <Completion of (4, 4): 8 entries observed, 8 unseen>
    """
    if not (index is None and values is None and sizes is None):
        drawn = target is not None or samples is not None
        if drawn or index is None or values is None or sizes is None:
            message = "completion: give either target and samples, or index=, values= and sizes=."
            raise OptionError(message)
        if seed != 0 or missing is not None:
            raise OptionError("completion: seed and missing are for a target to sample from.")
        return Completion(index, values, sizes, test_index, test_values)
    if test_index is not None or test_values is not None:
        message = "completion: a target brings its own test entries; leave test_index out."
        raise OptionError(message, argument="test_index")
    if missing not in (None, "nan"):
        message = f"completion: unknown missing={missing!r}; write missing='nan' or leave it out."
        raise OptionError(message, argument="missing")
    table = entries_of(target) if is_table(target) else None
    dense = _check_target(table.values if table else target, "completion", may_miss=missing is not None)
    known = torch.nonzero(~torch.isnan(dense.reshape(-1)).cpu()).reshape(-1)
    count = len(known) if table and samples is None else _count_samples(samples, len(known))
    order = known[torch.randperm(len(known), generator=seeded(seed, "completion: seed"))]
    rows = table.index[order] if table else torch.stack(torch.unravel_index(order, dense.shape), 1)
    rows, entries = rows.to(dense.device), dense.reshape(-1)[order.to(dense.device)]
    rest = (rows[count:], entries[count:]) if count < len(order) else (None, None)
    return Completion(rows[:count], entries[:count], table.sizes if table else dense.shape, *rest)


def sensing(
    target: Any = None,
    samples: int | None = None,
    seed: int = 0,
    *,
    features: Any = None,
    values: Any = None,
    test_features: Any = None,
    test_values: Any = None,
) -> Sensing:
    """Measure a tensor by rank-one tensors: random ones of a target, or your own with what they gave.

    Random factors are normal with variance ``(Π D_n)^{-1/N}``, so that a rank-one tensor has norm 1 on
    average. With features of your own this is regression: features of each variable, such as its powers or
    splines, and the tensor of coefficients of all their products is looked for.

    Args:
        target: Dense tensor, or a ``Factorization`` that stands for one.
        samples: Number of random measurements.
        seed: Draws the same ones on every device.
        features: N arrays ``(B, D_n)``, row b of them the factors of measurement b; or one ``(B, N, D)``.
        values: What was measured, ``(B,)``. Features and values become one dtype.
        test_features: Features of other measurements, to test on; with ``test_values``.
        test_values: What these gave.

    Raises:
        DataError: NaN, infinite or integer data, or no measurements.
        ShapeError, OptionError: Shapes or arguments that do not fit each other.

    Example:
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)
        >>> powers = torch.stack([x**0, x, x**2], 1)
        >>> sensing(features=[powers, powers.flip(0)], values=x**3)
        <Sensing of (3, 3): 8 rank-one measurements>
    """
    if features is not None or values is not None:
        if target is not None or samples is not None or features is None or values is None:
            raise OptionError("sensing: give either target and samples, or features= and values=.")
        if seed != 0:
            raise OptionError("sensing: a seed is for a target to measure.", argument="seed")
        return Sensing(features, values, None, test_features, test_values)
    if test_features is not None or test_values is not None:
        message = "sensing: a target is tested on as a whole; leave test_features out."
        raise OptionError(message, argument="test_features")
    dense = _check_target(target, "sensing")
    samples = check_integer(samples, 1, "sensing: samples", DataError)
    generator = seeded(seed, "sensing: seed")
    scale = math.exp(-math.log(dense.numel()) / (2 * dense.ndim))
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    features = [(scale * normal(samples, size)).to(dense) for size in dense.shape]
    batch, *modes = (get_symbol(n) for n in range(dense.ndim + 1))
    words = [*(batch + mode for mode in modes), "".join(modes)]
    operands = [*features, dense]
    call = einsum(f"{','.join(words)}->{batch}", *(tuple(o.shape) for o in operands))
    return Sensing(features, call(operands), dense)


def _check_target(target: Any, who: str, *, may_miss: bool = False) -> Tensor:
    """Return the target as a dense tensor, finite but for NaN where entries may be missing."""
    if target is None:
        raise OptionError(f"{who}: a target tensor is missing.", argument="target")
    with torch.no_grad():
        dense = target.to_tensor() if isinstance(target, Factorization) else as_tensor(target, missing=True)
    dense = dense.detach()
    if dense.ndim == 0:
        message = f"{who}: the target is a single number; it needs at least one mode."
        raise ShapeError(message, argument="target")
    unknown = torch.isnan(dense)
    nan = int(unknown.sum())
    if nan and not may_miss:
        message = f"{who}: the target has {nan} NaN entries of {dense.numel()}.\n"
        message += "  if they mark entries that were not measured: missing='nan'"
        message += "; sensing needs all entries" if who == "sensing" else ""
        raise DataError(message, argument="missing")
    check_numbers(torch.where(unknown, 0, dense))
    if nan == dense.numel():
        raise DataError(f"{who}: all {nan} entries of the target are NaN.", argument="target")
    return dense


def _count_samples(samples: int | float | None, known: int) -> int:
    with suppress(OptionError):
        if 0 < (share := check_number(samples, "samples")) < 1:
            return max(1, round(share * known))
        if (count := check_integer(samples, 1, "samples")) <= known:
            return count
    allowed = f"an integer from 1 to {known} (the known entries) or a share in (0, 1)"
    message = f"completion: samples must be {allowed}, found {samples!r}."
    raise DataError(message, argument="samples")


def _check_entries(index: Tensor, values: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    index, values = check_index(as_tensor(index), sizes), as_tensor(values)
    if values.shape != (rows := len(index),):
        message = f"completion: {tuple(values.shape)} values for {rows} rows of the index."
        raise ShapeError(f"{message}\n  expected: ({rows},)", argument="values")
    return index, check_numbers(values)


def _check_measurements(
    features: Any, values: Any, sizes: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return features by mode and values, in one dtype, or raise one clear error."""
    whole = features if isinstance(features, Tensor | np.ndarray) else None
    listed = tuple(features) if whole is None and np.iterable(features) else ()
    with torch.inference_mode(False):  # what was made there cannot be trained on; a copy can
        parts = list(
            as_tensor(whole).unbind(1) if whole is not None and whole.ndim == 3 else map(as_tensor, listed)
        )
        values = as_tensor(values)
        parts = [part.clone() if part.is_inference() else part for part in parts]
    shapes = [tuple(part.shape) for part in parts]
    rows = len(values) if values.ndim == 1 else None
    fits = bool(parts) and all(len(shape) == 2 and shape[0] == rows for shape in shapes)
    if not fits or (sizes is not None and tuple(shape[1] for shape in shapes) != sizes):
        found = shapes or (type(features).__name__ if whole is None else tuple(whole.shape))
        wanted = "one (B, D_n) for every mode, or one array (B, N, D)"
        if sizes is not None:
            wanted = f"(B, D_n) with D = {sizes}, as the features to train on"
        raise ShapeError(
            "sensing: features and values do not fit each other.\n"
            f"  found:    features {found}, values {tuple(values.shape)}\n"
            f"  expected: features {wanted}; values (B,); for a single feature x[:, None]",
            argument="features",
        )
    for what, part in [
        *((f"features of mode {n}", part) for n, part in enumerate(parts)),
        ("values", values),
    ]:
        try:
            check_numbers(part)
            if dtype is not None and part.is_complex() and not dtype.is_complex:
                raise DataError(f"they are complex, and what is trained on is of {dtype}.")
        except DataError as error:
            raise DataError(f"sensing: {what}: {error}", argument=what.partition(" ")[0]) from None
    common = dtype or reduce(torch.promote_types, (part.dtype for part in parts), values.dtype)
    return tuple(_cast(part, None, common) for part in parts), _cast(values, None, common)


def _inside(model: nn.Module) -> Any:
    """Return the model in a wrapper such as ``DistributedDataParallel``, also a compiled one."""
    return getattr(getattr(model, "_orig_mod", model), "module", model)


def _check_model(model: Factorization, sizes: tuple[int, ...]) -> None:
    if model.sizes != sizes:
        found = f"model: {model.sizes}\n  task:  {sizes}"
        raise ShapeError(f"the model has other mode sizes than the task.\n  {found}")


def _mean_square(x: Tensor, expected: Tensor) -> Tensor:
    if x.dtype == expected.dtype and not (x.is_complex() or expected.is_inference()):
        return mse_loss(x, expected)  # one node of the gradient's graph instead of three
    difference = x - expected
    return (difference.abs() if difference.is_complex() else difference).square().mean()


def relative_error(x: Tensor, expected: Tensor) -> float:
    """Return ``‖x - expected‖ / ‖expected‖`` at any scale; 0.0 or infinite if ``expected`` is zero."""
    expected = double(expected)
    error, norm = scaled_norm(double(x) - expected), scaled_norm(expected)
    if norm.x == 0:
        return math.inf if error.x > 0 else float(error.x)
    return float(Scaled(error.x / norm.x, error.log2 - norm.log2).value())


def scaled_norm(x: Tensor) -> Scaled:
    """Return the norm of all entries together, whose squares may leave the range of floats."""
    part, log2 = rescale(double(x).reshape(-1), 0)
    return Scaled(torch.linalg.vector_norm(part), log2[0])


def root_mean_square(x: Tensor) -> float:
    """Return the root of the mean square of all entries, at any scale."""
    norm, log2 = scaled_norm(x)
    return float(Scaled(norm / math.sqrt(x.numel()), log2).value())


def _cast(x: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Move a tensor; refuse a dtype that cannot hold its largest entry with all digits."""
    cast = x.to(device, dtype)
    before, after = (float(largest_of(part)) for part in (x, cast))
    range_of = torch.finfo(cast.dtype)
    if cast.dtype != x.dtype and before > 0 and not range_of.tiny <= after <= range_of.max:
        message = f"values of up to {before:.3g} are out of the range of {cast.dtype}."
        raise DataError(f"{message}\n  scale the data, or keep {x.dtype}", argument="dtype")
    return cast
