"""What a factorization is trained on: observed entries (completion) or inner products (sensing)."""

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
from torch.nn.functional import huber_loss, mse_loss

from tnreg.errors import DataError, OptionError, ShapeError, check_integer, check_number
from tnreg.factorizations.factorization import Factorization
from tnreg.machine.memory import must_fit
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
    without_autocast,
)
from tnreg.tensors.tables import entries_of, is_table

_LOSSES, _KINDS = ("mse", "huber", "l1"), ("rank-one", "dense")


class Completion:
    """Observed entries of a tensor, and unseen ones to test on.

    Attributes:
        sizes: Mode sizes.
        index: Indices of the observed entries, ``(B, N)`` int64; ``values`` are the entries, ``(B,)``.
        test_index: The same of unseen entries, with ``test_values``; ``None`` if none are known.
        criterion: Name of the loss: ``"mse"``, ``"huber"`` or ``"l1"``.
    """

    def __init__(
        self,
        index: Tensor,
        values: Tensor,
        sizes: Sequence[int],
        test_index: Tensor | None = None,
        test_values: Tensor | None = None,
        *,
        loss: str = "mse",
    ) -> None:
        self.criterion = _check_choice("completion", loss=loss, among=_LOSSES)
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
        """Return ``1/B Σ_b |r_b|²``, ``r_b = W[index_b] - values_b``: scalar, differentiable.

        With the loss ``"l1"`` it is the mean of ``|r_b|``, with ``"huber"`` of ``|r_b|²/2`` up to 1 and
        ``|r_b| - 1/2`` beyond. Squares are in the square of the data's unit: scale data whose squares leave
        the range of the dtype.
        """
        return _mean_loss(self.criterion, self._predict(model), self.values)

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
        return Completion(index, values, self.sizes, *tested, loss=self.criterion)

    def _predict(self, model: nn.Module, *, unseen: bool = False) -> Tensor:
        index = self.test_index if unseen else self.index
        assert index is not None
        inner = model if isinstance(model, Factorization) else _inside(model)
        if not isinstance(inner, Factorization):
            return model.entries(index)  # type: ignore[operator, no-any-return]
        key = (inner.network, device := inner.device, unseen)
        if (chosen := self._plans.get(key)) is None:  # checked and planned once, not at every step
            _check_model(inner, self)
            chosen = self._plans[key] = plan(inner.network, index=index.to(device))
        # wrappers can only be called, and let processes exchange gradients then
        return (inner.entries if inner is model else model)(chosen)

    def __repr__(self) -> str:
        unseen = 0 if self.test_values is None else len(self.test_values)
        more = _loss_text(self)
        return f"<Completion of {self.sizes}: {len(self.values)} entries observed, {unseen} unseen{more}>"


class Sensing:
    """Inner products of a tensor with rank-one tensors, such as features of each variable, or dense ones.

    Attributes:
        features: For every mode n the factors ``(B, D_n)`` of the measurements ``values``, ``(B,)``; if they
            are dense one array ``(B, D_0, .., D_{N-1})``.
        target: The dense tensor, to test against; ``None`` if it is not known.
        test_features: Features of measurements to test on, with ``test_values``; ``None`` if there are none.
        kind: ``"rank-one"`` or ``"dense"``.
        criterion: Name of the loss: ``"mse"``, ``"huber"`` or ``"l1"``.
    """

    def __init__(
        self,
        features: Any,
        values: Any,
        target: Tensor | None = None,
        test_features: Any = None,
        test_values: Any = None,
        *,
        kind: str = "rank-one",
        loss: str = "mse",
    ) -> None:
        self.kind = _check_choice("sensing", kind=kind, among=_KINDS)
        self.criterion = _check_choice("sensing", loss=loss, among=_LOSSES)
        self.features, self.values = _check_measurements(features, values, kind)
        parts = self.features
        self.sizes = tuple(
            parts.shape[1:] if isinstance(parts, Tensor) else (part.shape[1] for part in parts)
        )
        self.target = target
        if (test_features is None) != (test_values is None):
            message = "sensing: give test_features and test_values together, or neither."
            raise OptionError(message, argument="test_features")
        self.test_features, self.test_values = test_features, test_values
        if test_features is not None:
            self.test_features, self.test_values = _check_measurements(
                test_features, test_values, kind, self.sizes, self.values.dtype
            )

    def loss(self, model: nn.Module) -> Tensor:
        """Return the mean of ``|<X_b, W> - values_b|²``, ``X_b = x_b0 ⊗ .. ⊗ x_bN-1``; see ``Completion``."""
        return _mean_loss(self.criterion, self._predict(model, self.features), self.values)

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

        def cast(x: Any) -> Any:
            if x is None or isinstance(x, Tensor):
                return None if x is None else _cast(x, device, dtype)
            return [_cast(part, device, dtype) for part in x]

        parts = (self.features, self.values, self.target, self.test_features, self.test_values)
        return Sensing(*map(cast, parts), kind=self.kind, loss=self.criterion)

    def _predict(self, model: Any, features: Any) -> Any:
        if isinstance(inner := _inside(model), Factorization):
            _check_model(inner, self)
            if inner.dtype != self.values.dtype and not is_autocast(inner.device):
                types = f"the model is of {inner.dtype}, the task of {self.values.dtype}"
                raise DataError(f"{types}; write task.to(dtype=model.dtype).")
        if self.kind == "rank-one":
            return model(features)
        # wrappers can only be called, and let processes exchange gradients then
        dense = inner.to_tensor() if inner is model else model(plan(inner))
        with without_autocast(dense.device):
            return _products(features.to(dense.dtype), dense)

    def __repr__(self) -> str:
        tested = "" if self.test_values is None else f", {len(self.test_values)} to test on"
        more = f"{tested}{_loss_text(self)}"
        return f"<Sensing of {self.sizes}: {len(self.values)} {self.kind} measurements{more}>"


def _products(features: Tensor, dense: Tensor) -> Tensor:
    """Return the inner products of a tensor with each of ``features``, ``(B, *sizes)``."""
    return features.flatten(1) @ dense.flatten()


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
    loss: str = "mse",
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
        loss: What ``task.loss`` is the mean of: ``"mse"``, squares of the residuals; ``"l1"``, magnitudes; or
            ``"huber"``, half of the squares up to 1 and magnitudes less a half beyond, in the unit of the
            data (for another threshold divide the data by it). Wrong values weigh less with the last two.

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
        return Completion(index, values, sizes, test_index, test_values, loss=loss)
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
    sizes = table.sizes if table else dense.shape
    return Completion(rows[:count], entries[:count], sizes, *rest, loss=loss)


def sensing(
    target: Any = None,
    samples: int | None = None,
    seed: int = 0,
    *,
    features: Any = None,
    values: Any = None,
    test_features: Any = None,
    test_values: Any = None,
    kind: str = "rank-one",
    loss: str = "mse",
) -> Sensing:
    """Measure a tensor by rank-one tensors or dense ones: random ones of a target, or your own.

    Random factors are normal with variance ``(Π D_n)^{-1/N}``, the entries of random dense tensors with
    variance ``1 / Π D_n``, so that what is measured with has norm 1 on average. With features of your own
    rank-one sensing is regression: features of each variable, such as its powers or splines, and the tensor
    of coefficients of all their products is looked for.

    Cost: dense measurements hold ``B Π D_n`` numbers, and each evaluation of the loss makes the dense tensor
    and reads all of them; rank-one ones hold ``B Σ D_n``, and no dense tensor is made.

    Args:
        target: Dense tensor, or a ``Factorization`` that stands for one.
        samples: Number of random measurements.
        seed: Draws the same ones on every device.
        features: N arrays ``(B, D_n)``, row b of them the factors of measurement b; or one ``(B, N, D)``. If
            dense, one array ``(B, D_0, .., D_{N-1})``.
        values: What was measured, ``(B,)``. Features and values become one dtype.
        test_features: Features of other measurements, to test on; with ``test_values``.
        test_values: What these gave.
        kind: Measure with ``"rank-one"`` or ``"dense"`` tensors.
        loss: See ``completion``.

    Raises:
        DataError: NaN, infinite or integer data, or no measurements.
        SizeError: Random dense tensors that would not fit into memory.
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
        return Sensing(features, values, None, test_features, test_values, kind=kind, loss=loss)
    if test_features is not None or test_values is not None:
        message = "sensing: a target is tested on as a whole; leave test_features out."
        raise OptionError(message, argument="test_features")
    dense = _check_target(target, "sensing")
    samples = check_integer(samples, 1, "sensing: samples", DataError)
    generator = seeded(seed, "sensing: seed")
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    if _check_choice("sensing", kind=kind, among=_KINDS) == "dense":
        advice = "take fewer samples, or kind='rank-one'"
        must_fit(
            "sensing: its dense measurements",
            [shape := (samples, *dense.shape)],
            torch.float64,
            "cpu",
            advice,
        )
        measured = (normal(shape) / math.sqrt(dense.numel())).to(dense)
        return Sensing(measured, _products(measured, dense), dense, kind=kind, loss=loss)
    scale = math.exp(-math.log(dense.numel()) / (2 * dense.ndim))
    features = [(scale * normal(samples, size)).to(dense) for size in dense.shape]
    batch, *modes = (get_symbol(n) for n in range(dense.ndim + 1))
    words = [*(batch + mode for mode in modes), "".join(modes)]
    operands = [*features, dense]
    call = einsum(f"{','.join(words)}->{batch}", *(tuple(o.shape) for o in operands))
    return Sensing(features, call(operands), dense, loss=loss)


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


def _check_choice(who: str, *, among: Sequence[str], **given: Any) -> str:
    """Return the value of the one argument given."""
    [(name, value)] = given.items()
    if value not in among:
        names = ", ".join(map(repr, among))
        raise OptionError(f"{who}: unknown {name}={value!r}; there is {names}.", argument=name)
    return str(value)


def _check_measurements(
    features: Any,
    values: Any,
    kind: str,
    sizes: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Tensor]:
    """Return features by mode (dense ones as they are) and values, in one dtype, or raise one clear error."""
    dense, whole = kind == "dense", features if isinstance(features, Tensor | np.ndarray) else None
    listed = tuple(features) if whole is None and np.iterable(features) else ()
    with torch.inference_mode(False):  # what was made there cannot be trained on; a copy can
        if dense:
            parts = [as_tensor(features)]
        elif whole is not None and whole.ndim == 3:
            parts = list(as_tensor(whole).unbind(1))
        else:
            parts = list(map(as_tensor, listed))
        values = as_tensor(values)
        parts = [part.clone() if part.is_inference() else part for part in parts]
    shapes = [tuple(part.shape) for part in parts]
    rows = len(values) if values.ndim == 1 else None
    fits = bool(parts) and all(
        (len(shape) > 1 if dense else len(shape) == 2) and shape[0] == rows for shape in shapes
    )
    if not fits or (sizes is not None and tuple(n for shape in shapes for n in shape[1:]) != sizes):
        found: Any = shapes or (type(features).__name__ if whole is None else tuple(whole.shape))
        wanted = "one (B, D_n) for every mode, or one array (B, N, D)"
        if dense:
            found, wanted = shapes[0], "dense: one array (B, D_0, .., D_N-1)"
        if sizes is not None:
            wanted = f"(B, {'*D' if dense else 'D_n'}) with D = {sizes}, as the features to train on"
        raise ShapeError(
            "sensing: features and values do not fit each other.\n"
            f"  found:    features {found}, values {tuple(values.shape)}\n"
            f"  expected: features {wanted}; values (B,); for a single feature x[:, None]",
            argument="features",
        )
    names = ["features"] if dense else [f"features of mode {n}" for n in range(len(parts))]
    for what, part in zip([*names, "values"], [*parts, values], strict=True):
        try:
            check_numbers(part)
            if dtype is not None and part.is_complex() and not dtype.is_complex:
                raise DataError(f"they are complex, and what is trained on is of {dtype}.")
        except DataError as error:
            raise DataError(f"sensing: {what}: {error}", argument=what.partition(" ")[0]) from None
    common = dtype or reduce(torch.promote_types, (part.dtype for part in parts), values.dtype)
    parts, values = [_cast(part, None, common) for part in parts], _cast(values, None, common)
    return (parts[0] if dense else tuple(parts)), values


def check_squares(task: Completion | Sensing, who: str) -> None:
    """Refuse a task that ``training.solver`` cannot solve: of another loss, or of dense measurements."""
    if task.criterion != "mse":
        message = f"{who} lowers squares, and the loss of this task is {task.criterion!r}."
        raise OptionError(
            f"{message}\n  make the task without loss=, or train it by gradients", argument="task"
        )
    if isinstance(task, Sensing) and task.kind == "dense":
        message = f"{who} reads entries or rank-one measurements, and those of this task are dense."
        raise OptionError(f"{message}\n  train it by gradients: tnreg.fit(model, task.loss)", argument="task")


def _inside(model: nn.Module) -> Any:
    """Return the model in a wrapper such as ``DistributedDataParallel``, also a compiled one."""
    return getattr(getattr(model, "_orig_mod", model), "module", model)


def _check_model(model: Factorization, task: Completion | Sensing) -> None:
    if model.sizes != task.sizes:
        found = f"model: {model.sizes}\n  task:  {task.sizes}"
        raise ShapeError(f"the model has other mode sizes than the task.\n  {found}")
    if model.device.type != task.values.device.type:
        places = f"the model is on {model.device}, the task on {task.values.device}"
        raise OptionError(f"{places}; write task.to(model.device).")


def _loss_text(task: Completion | Sensing) -> str:
    return "" if task.criterion == "mse" else f", loss {task.criterion}"


def _mean_loss(criterion: str, x: Tensor, expected: Tensor) -> Tensor:
    if criterion == "mse":
        return _mean_square(x, expected)
    size = (x - expected).abs()
    return size.mean() if criterion == "l1" else huber_loss(size, torch.zeros_like(size))


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
