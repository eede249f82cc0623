"""Gradients with respect to the input of a network that can be differentiated again at less cost.

Where a loss contains ``∇_x f(x)``, automatic differentiation does work whose result is zero: the second
derivative of a ReLU vanishes, yet its backward pass is linked to the activations, so zeros are carried
back through the whole network; and the derivative of a convolution's backward pass with respect to its
weight is computed by a convolution with a kernel as large as the image. ``input_gradient`` replaces four
operations while the network runs, and only there, by ones with the same values and derivatives:

- ReLU: a backward pass that depends on the incoming gradient alone (torch takes the second derivative
  to be zero as well);
- convolution: its backward pass differentiated by the kernels that ordinary training uses;
- batch normalization with running statistics: the affine map that it is;
- max pooling: like ReLU.

Attention runs by plain matrix products, as fused kernels have no second derivative. Everything else, and
anything that does not call these functions of torch, is differentiated as usual. Under autocast they
compute in the precision that autocast gives to the operation that they replace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten


def input_gradient(
    value: Callable[[Tensor], Tensor], x: Tensor, *, differentiable: bool, cheap: bool = True
) -> Tensor:
    """``∇_x Σ_b value(x)_b``, which has a graph of its own if asked.

    Args:
        value: Function of a batch, e.g. one logit of a network, shape ``(B,)``.
        x: The batch; taken as a constant, its own history is not seen.
        differentiable: Whether the gradient is to be differentiated with respect to parameters.
        cheap: Replace operations as the module says; else torch's own are used throughout.

    Returns:
        The gradient, of the shape of ``x``; zeros where the value does not depend on it.
    """
    x = x.detach().requires_grad_()
    state = _Pass()
    with torch.enable_grad():
        with contextlib.ExitStack() as stack:
            if differentiable:  # fused attention has no second derivative
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if differentiable and cheap:
                stack.enter_context(_Replaced(state))
            total = value(x).sum()
        if not total.requires_grad:
            return torch.zeros_like(x)
        state.inner = True
        try:
            (gradient,) = torch.autograd.grad(
                total, x, create_graph=differentiable, materialize_grads=True
            )
        finally:
            state.inner = False
    return gradient


class _Pass:
    """Whether the inner backward pass runs, which asks for the gradient of the input alone.

    An attribute and not a context variable: on a GPU the backward pass runs in a thread of its own.
    """

    inner = False


class _Replaced(TorchFunctionMode):
    """Calls of the functions below get a replacement, where it is the same thing."""

    def __init__(self, state: _Pass) -> None:
        super().__init__()
        self.state = state

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None:
            found = replacement(self.state, *args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
            out = x.relu_()
        else:
            out = torch.relu(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        return _aten.threshold_backward(grad, out.detach(), 0), None


def _relu(state: _Pass, input: Tensor, inplace: bool = False) -> Tensor | None:
    return _ReLU.apply(input, inplace) if _plain(input) else None  # type: ignore[no-untyped-call]


def _relu_in_place(state: _Pass, input: Tensor) -> Tensor | None:
    return _relu(state, input, True)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, state: _Pass, x: Tensor, weight: Tensor, bias: Tensor | None, options: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.state, ctx.options, ctx.biased = state, options, bias is not None
        stride, padding, dilation, groups = options
        out: Tensor = _aten.convolution(
            x, weight, bias, stride, padding, dilation, False, [0], groups
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        if ctx.state.inner:
            gradient = None
            if ctx.needs_input_grad[1]:
                gradient = _ConvolutionInput.apply(grad, weight, x.detach(), ctx.options)  # type: ignore[no-untyped-call]
            return None, gradient, None, None, None
        needed = [bool(n) for n in ctx.needs_input_grad[1:3]] + [ctx.biased]
        found = _backward_of_convolution(grad, x, weight, ctx.options, needed)
        return None, *found, None


class _ConvolutionInput(torch.autograd.Function):
    """The gradient of a convolution's input: linear in the incoming gradient and in the weight."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, x: Tensor, options: Any) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.options = options
        found: Tensor = _backward_of_convolution(grad, x, weight, options, [True, False, False])[0]
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, direction: Tensor) -> Any:
        grad, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        to_grad = to_weight = None
        if ctx.needs_input_grad[0]:
            to_grad = _aten.convolution(
                direction, weight, None, stride, padding, dilation, False, [0], groups
            )
        if ctx.needs_input_grad[1]:
            needed = [False, True, False]
            to_weight = _backward_of_convolution(grad, direction, weight, ctx.options, needed)[1]
        return to_grad, to_weight, None, None


def _backward_of_convolution(
    grad: Tensor, x: Tensor, weight: Tensor, options: Any, needed: list[bool]
) -> Any:
    stride, padding, dilation, groups = options
    return _aten.convolution_backward(
        grad, x, weight, [len(weight)], stride, padding, dilation, False, [0], groups, needed
    )


def _convolution(
    state: _Pass,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    axes = weight.ndim - 2
    input, weight, bias = _autocast(input), _autocast(weight), _autocast(bias)
    if input.ndim != axes + 2 or not _plain(input, weight, bias):
        return None
    steps = _listed(dilation, axes)
    if isinstance(padding, str):
        reach = [d * (size - 1) for d, size in zip(steps, weight.shape[2:], strict=True)]
        if padding != "same" or any(n % 2 for n in reach):
            return None
        padding = [n // 2 for n in reach]
    options = (_listed(stride, axes), _listed(padding, axes), steps, groups)
    found: Tensor = _Convolution.apply(state, input, weight, bias, options)  # type: ignore[no-untyped-call]
    return found


def _batch_norm(
    state: _Pass,
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
    if not (_plain(input) and _plain(running_mean, running_var, weight, bias)):
        return None
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    shape = (-1, *[1] * (input.ndim - 2))
    wide = input.to(scale.dtype)
    return torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(input.dtype)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: Any) -> Tensor:
        out, index = _aten.max_pool2d_with_indices(x, *options)
        ctx.save_for_backward(x, index)
        ctx.options = options
        kept: Tensor = out
        return kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, index = ctx.saved_tensors
        found = _aten.max_pool2d_with_indices_backward(grad, x.detach(), *ctx.options, index)
        return found, None


def _max_pool(
    state: _Pass,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    if return_indices or not _plain(input):
        return None
    size = _listed(kernel_size, 2)
    step = size if stride is None else _listed(stride, 2)
    options = (size, step, _listed(padding, 2), _listed(dilation, 2), bool(ceil_mode))
    found: Tensor = _MaxPool.apply(input, options)  # type: ignore[no-untyped-call]
    return found


def _plain(*tensors: Tensor | None) -> bool:
    """Real floats of one dtype, where the replacements are the same thing."""
    given = [t for t in tensors if t is not None]
    first = given[0]
    return first.is_floating_point() and all(
        type(t) in (Tensor, torch.nn.Parameter) and t.dtype == first.dtype for t in given
    )


def _autocast(x: Any) -> Any:
    """A convolution's argument as autocast casts it."""
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    kind = x.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if cast else x


def _listed(number: Any, axes: int) -> list[int]:
    given = [number] if isinstance(number, int) else list(number)
    return given * axes if len(given) == 1 else given


_REPLACEMENTS: dict[Any, Callable[..., Tensor | None]] = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: _relu_in_place,
    Tensor.relu_: _relu_in_place,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    F.batch_norm: _batch_norm,
    F.max_pool2d: _max_pool,
}
