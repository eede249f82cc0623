"""The tensor of any network on a grid of templates: its hierarchical rank without knowing its weights.

A function f of N patches, each of which takes M template values, is a tensor
``A[d_0, ..., d_{N-1}] = f(t_{d_0}, ..., t_{d_{N-1}})`` (a grid tensor: Cohen and Shashua 2016,
arXiv:1603.00162). Its matricizations have the separation ranks of f on the templates, a lower bound for
those of f; for ``to_cnn(model)`` and templates that span the inputs they are the ranks of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tnreg.errors import DataError, OptionError, ShapeError, blame, check_integer
from tnreg.far.modes import evaluation
from tnreg.tensors.arrays import as_tensor
from tnreg.trees.grid import grid_of
from tnreg.trees.tree import ModeTree

_MOST = 2**24


@torch.no_grad()
def grid_tensor(
    net: Callable[[Any], Tensor],
    templates: Any,
    tree: ModeTree,
    *,
    shape: tuple[int, int] | None = None,
    arrange: Callable[[Tensor], Any] | None = None,
    output: int | None = None,
    batch: int = 4096,
) -> Tensor:
    """Return a network's values on all combinations of templates, one template for each patch.

    Args:
        net: Any module or function. A module runs in evaluation mode; every part of it gets its mode back.
        templates: M templates for every patch, ``(M, *patch)``, or templates of their own for each,
            ``(N, M, *patch)`` with ``patch`` either ``(D,)`` or ``(C, h, w)``.
        tree: Mode tree over the N patches; only its order, and its shape if it has one, are used.
        shape: Rows and columns of patches in an image, where the tree does not know them.
        arrange: Makes the network's input of patches ``(B, N, *patch)``. By default vectors are put channels
            first, ``(B, D, N)`` or ``(B, D, rows, columns)``, and pictures side by side,
            ``(B, C, rows h, columns w)``.
        output: Which output, if there are several.
        batch: Combinations in one call.

    Returns:
        Shape ``(M,) * N``; axis n is patch n.

    Raises:
        ShapeError: Templates that do not fit, more than 2**24 combinations, or not one value for each.
        OptionError: Several outputs without ``output``, or the shape of the image is not known.
        DataError: Templates hold NaN, or the network gives NaN or infinite values.

    Cost: ``M**N`` evaluations.

    Example:
        >>> f = lambda x: x[:, 0, 0] * x[:, 0, 1] + x[:, 0, 2] * x[:, 0, 3]
        >>> grid_tensor(f, torch.tensor([[0.0], [1.0]]), ModeTree.binary(4))[1, 1, 0, 1]
        tensor(1.)
    """
    batch = check_integer(batch, 1, "grid_tensor: batch")
    tree = tree if isinstance(tree, ModeTree) else ModeTree(tree)
    patches = _check_templates(templates, tree.order)
    arrange = arrange or _arrangement(tree, shape, pictures=patches.ndim == 5)
    n, many = patches.shape[:2]
    parts = []
    with evaluation(net):
        for start in range(0, many**n, batch):
            flat = torch.arange(start, min(start + batch, many**n), device=patches.device)
            index = torch.unravel_index(flat, (many,) * n)
            inputs = torch.stack([patches[p, index[p]] for p in range(n)], 1)
            parts.append(_pick_output(net(arrange(inputs)), len(inputs), output))
    values = torch.cat(parts)
    if not torch.isfinite(values).all():
        raise DataError("grid_tensor: the network gave NaN or infinite values.", argument="net")
    return values.reshape((many,) * n)


@blame("templates")
def _check_templates(templates: Any, n: int) -> Tensor:
    """Return the templates as ``(N, M, *patch)``."""
    if isinstance(templates, list | tuple):
        templates = torch.stack([as_tensor(part) for part in templates])
    patches = templates = as_tensor(templates)
    if patches.ndim in (2, 4):
        patches = patches.unsqueeze(0).expand(n, *patches.shape)
    if patches.ndim not in (3, 5) or patches.shape[0] != n or patches.shape[1] == 0:
        raise ShapeError(
            "grid_tensor: templates do not fit the patches.\n"
            f"  found:    {tuple(templates.shape)}\n"
            f"  expected: (M, D) or (M, C, h, w), or one such for each patch, ({n}, M, ...)"
        )
    many = patches.shape[1]
    if many**n > _MOST:
        count = f"{many} templates on {n} patches are {many**n} combinations, more than {_MOST}"
        advice = "take fewer templates, or probe samples with tnreg.separation_spectrum"
        raise ShapeError(f"grid_tensor: {count}; {advice}.")
    if patches.isnan().any():
        raise DataError("grid_tensor: templates hold NaN.")
    return patches


@blame("shape")
def _arrangement(
    tree: ModeTree, shape: tuple[int, int] | None, *, pictures: bool
) -> Callable[[Tensor], Tensor]:
    """Return what makes a network's input of patches ``(B, N, *patch)``."""
    if shape is None:
        shape = tree.shape or getattr(grid_of(tree), "shape", None)
    elif math.prod(shape) != tree.order:
        raise OptionError(f"grid_tensor: shape {shape} is not of {tree.order} patches.")
    if not pictures:
        places = (tree.order,) if shape is None else shape
        return lambda x: x.mT.reshape(x.shape[0], x.shape[2], *places)
    if shape is None:
        problem = "where the patches lie in the image is not known, as the tree is no ModeTree.grid"
        advice = "give shape=(rows, columns) or arrange=function"
        raise OptionError(f"grid_tensor: {problem}; {advice}.")
    rows, columns = shape

    def side_by_side(x: Tensor) -> Tensor:
        b, _, channels, height, width = x.shape
        cut = x.reshape(b, rows, columns, channels, height, width).permute(0, 3, 1, 4, 2, 5)
        return cut.reshape(b, channels, rows * height, columns * width)

    return side_by_side


def _pick_output(values: Any, count: int, output: int | None) -> Tensor:
    """Return one value for each of ``count`` inputs."""
    values = as_tensor(values)
    if values.ndim not in (1, 2) or len(values) != count:
        expected = f"one value for each of {count} inputs"
        message = f"the network must give {expected}, found shape {tuple(values.shape)}."
        raise ShapeError(f"grid_tensor: {message}", argument="net")
    columns: Tensor = values if values.ndim == 2 else values.unsqueeze(1)
    outputs = columns.shape[1]
    output = 0 if output is None and outputs == 1 else output
    if not isinstance(output, int) or not 0 <= output < outputs:
        choices = f"say which, output=0 to output={outputs - 1}, found {output!r}"
        message = f"grid_tensor: the network has {outputs} outputs; {choices}."
        raise OptionError(message, argument="output")
    return columns[:, output]
