"""Gradients with respect to the input of a network that can be differentiated again at less cost.

Where a loss contains ``∇_x f(x)``, automatic differentiation carries zeros, the second derivatives of
ReLUs, back through the whole network, and differentiates a convolution's backward pass by a convolution
with a kernel as large as the image. ``input_gradient`` replaces four operations while the network runs,
and only there, by ones with the same values and derivatives:

- ReLU and max pooling: a backward pass that depends on the incoming gradient alone;
- convolution: its backward pass differentiated by the kernels that ordinary training uses;
- batch normalization with running statistics: the affine map that it is.

Attention runs by plain matrix products, as fused kernels have no second derivative. Anything that does
not call these functions of torch is differentiated as usual. Under autocast they compute in the precision
that autocast gives to the operation that they replace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from tnreg.far.modes import checkpoints
from tnreg.tensors.gradients import differentiating

_aten = torch.ops.aten


def input_gradient(value: Callable[[Tensor], Tensor], x: Tensor, *, differentiable: bool) -> Tensor:
    """Return ``∇_x Σ_b value(x)_b``, of the shape of ``x``; zeros where the value does not depend on it.

    Args:
        value: Function of a batch, e.g. one logit of a network, shape ``(B,)``; it may change its input.
        x: The batch. If it requires a gradient itself, a differentiable result depends on it.
        differentiable: Whether the gradient is to be differentiated with respect to parameters.

    Nothing is checkpointed: a second derivative would need what it computes again.
    """
    mode = _Replaced()
    with differentiating():
        if not (differentiable and x.requires_grad):
            x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        with contextlib.ExitStack() as stack:
            stack.enter_context(checkpoints())
            if differentiable:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                stack.enter_context(mode)
            total = value(x.clone()).sum()
        if not total.requires_grad:
            return torch.zeros_like(x)
        mode.backward = True
        try:
            return torch.autograd.grad(total, x, create_graph=differentiable, materialize_grads=True)[0]
        finally:
            mode.backward = False


class _Replaced(TorchFunctionMode):
    """Replace calls of the functions at the end of this file, where the replacement is the same thing."""

    # Whether the inner backward pass runs, which asks for the gradient of the input alone. Not a context
    # variable: on a GPU the backward pass runs in a thread of its own.
    backward = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        result = None if replacement is None else replacement(self, *args, **kwargs)
        return func(*args, **kwargs) if result is None else result


class _ReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        result = x.relu_() if inplace else torch.relu(x)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (result,) = ctx.saved_tensors
        return _aten.threshold_backward(grad, result.detach(), 0), None


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, mode: Any, x: Tensor, weight: Tensor, bias: Any, options: Any) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.mode, ctx.options, ctx.has_bias = mode, options, bias is not None
        return _aten.convolution(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad[1:3]
        if ctx.mode.backward:  # of the input alone
            inputs = (grad, weight, x.detach(), ctx.options)
            return None, _input_of_convolution(*inputs) if to_x else None, None, None, None
        wanted = [to_x, to_weight, ctx.has_bias]
        size = [len(weight)]
        return None, *_aten.convolution_backward(grad, x, weight, size, *ctx.options, wanted), None


class _ConvolutionInput(Function):
    """The gradient of a convolution's input: linear in the incoming gradient and in the weight."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, x: Tensor, options: Any) -> Any:
        ctx.save_for_backward(grad, weight)
        ctx.options, wanted = options, [True, False, False]
        return _aten.convolution_backward(grad, x, weight, [len(weight)], *options, wanted)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, direction: Tensor) -> Any:
        grad, weight = ctx.saved_tensors
        to_grad = to_weight = None
        if ctx.needs_input_grad[0]:
            to_grad = _aten.convolution(direction, weight, None, *ctx.options)
        if ctx.needs_input_grad[1]:
            wanted = [False, True, False]
            to_weight = _aten.convolution_backward(
                grad, direction, weight, [len(weight)], *ctx.options, wanted
            )[1]
        return to_grad, to_weight, None, None


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: Any) -> Any:
        result, index = _aten.max_pool2d_with_indices(x, *options)
        ctx.save_for_backward(x, index)
        ctx.options = options
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, index = ctx.saved_tensors
        return _aten.max_pool2d_with_indices_backward(grad, x.detach(), *ctx.options, index), None


_rectify: Any = _ReLU.apply
_convolve: Any = _Convolution.apply
_input_of_convolution: Any = _ConvolutionInput.apply
_pool: Any = _MaxPool.apply

# Each takes the mode and the arguments of what it replaces, and gives None where it cannot do that.


def _relu(mode: _Replaced, input: Tensor, inplace: bool = False) -> Any:
    return _rectify(input, inplace) if _is_plain(input) else None


def _convolution(
    mode: _Replaced,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    axes = weight.ndim - 2
    input, weight, bias = _autocast(input), _autocast(weight), _autocast(bias)
    if input.ndim != axes + 2 or not _is_plain(input, weight, bias):
        return None
    steps = _as_list(dilation, axes)
    if isinstance(padding, str):
        reach = [d * (size - 1) for d, size in zip(steps, weight.shape[2:], strict=True)]
        if padding != "same" or any(n % 2 for n in reach):
            return None
        padding = [n // 2 for n in reach]
    # in the order of torch.ops.aten: not transposed, no output padding
    options = (_as_list(stride, axes), _as_list(padding, axes), steps, False, [0], groups)
    return _convolve(mode, input, weight, bias, options)


def _batch_norm(
    mode: _Replaced,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or running_var is None:
        return None
    # as torch's own: half precision is taken between layers, not for the statistics
    if not (_is_plain(input) and _is_plain(running_mean, running_var, weight, bias)):
        return None
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    shape = (-1, *[1] * (input.ndim - 2))
    wide = input.to(scale.dtype)
    return torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(input.dtype)


def _max_pool(
    mode: _Replaced,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    if return_indices or not _is_plain(input):
        return None
    stride = kernel_size if stride is None else stride
    numbers = (_as_list(n, 2) for n in (kernel_size, stride, padding, dilation))
    return _pool(input, (*numbers, bool(ceil_mode)))


def _is_plain(*tensors: Tensor | None) -> bool:
    """Return whether all are real floats of one dtype, where the replacements are the same thing."""
    present = [t for t in tensors if t is not None]
    dtype = present[0].dtype
    return dtype.is_floating_point and all(
        type(t) in (Tensor, torch.nn.Parameter) and t.dtype == dtype for t in present
    )


def _autocast(x: Any) -> Any:
    """Cast an argument of a convolution as autocast does."""
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    kind = x.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if cast else x


def _as_list(number: Any, axes: int) -> list[int]:
    numbers = [number] if isinstance(number, int) else list(number)
    return numbers * axes if len(numbers) == 1 else numbers


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), lambda mode, input: _relu(mode, input, True)),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    F.batch_norm: _batch_norm,
    F.max_pool2d: _max_pool,
}
