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

from tnreg.errors import DataError, OptionError, ShapeError, check_integer
from tnreg.far.regularizers import evaluation
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
    """Values of a network on all combinations of templates, one template for each patch.

    Args:
        net: Any module or function. A module runs in evaluation mode; every part of it is left in the mode
            that it was in.
        templates: M templates for every patch, ``(M, *patch)``, or templates of their own for each,
            ``(N, M, *patch)`` with ``patch`` either ``(D,)`` or ``(C, h, w)``.
        tree: Mode tree over the N patches, e.g. that for ``tnreg.spectra`` afterwards; only its order, and
            its shape if it is a ``ModeTree.grid``, are used.
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
        DataError: The network gives NaN or infinite values.

    Cost: ``M**N`` evaluations.

    Example:
        >>> f = lambda x: x[:, 0, 0] * x[:, 0, 1] + x[:, 0, 2] * x[:, 0, 3]
        >>> grid_tensor(f, torch.tensor([[0.0], [1.0]]), ModeTree.binary(4))[1, 1, 0, 1]
        tensor(1.)
    """
    batch = check_integer(batch, 1, "grid_tensor: batch")
    tree = tree if isinstance(tree, ModeTree) else ModeTree(tree)
    if isinstance(templates, list | tuple):
        templates = torch.stack([torch.as_tensor(part) for part in templates])
    chosen = torch.as_tensor(templates)
    n = tree.order
    if chosen.ndim in (2, 4):
        chosen = chosen.unsqueeze(0).expand(n, *chosen.shape)
    if chosen.ndim not in (3, 5) or chosen.shape[0] != n or chosen.shape[1] == 0:
        raise ShapeError(
            "grid_tensor: templates do not fit the patches.\n"
            f"  found:    {tuple(torch.as_tensor(templates).shape)}\n"
            f"  expected: (M, D) or (M, C, h, w), or one such for each patch, ({n}, M, ...)"
        )
    many = chosen.shape[1]
    if many**n > _MOST:
        raise ShapeError(
            f"grid_tensor: {many} templates on {n} patches are {many**n} combinations, more than {_MOST}; "
            "take fewer templates, or probe samples with tnreg.separation_spectrum."
        )
    place = arrange or _arrangement(tree, shape, chosen.ndim == 5)
    with evaluation(net):
        found = [
            _values(net(place(part)), len(part), output) for part in _combinations(chosen, batch)
        ]
    values = torch.cat(found)
    if not bool(torch.isfinite(values).all()):
        raise DataError("grid_tensor: the network gave NaN or infinite values.")
    return values.reshape((many,) * n)


def _combinations(chosen: Tensor, batch: int) -> Any:
    """Patches ``(B, N, *patch)`` of all combinations, the last patch running fastest."""
    n, many = chosen.shape[:2]
    total = many**n
    for start in range(0, total, batch):
        flat = torch.arange(start, min(start + batch, total), device=chosen.device)
        index = torch.stack(torch.unravel_index(flat, (many,) * n))
        yield torch.stack([chosen[p, index[p]] for p in range(n)], 1)


def _arrangement(
    tree: ModeTree, shape: tuple[int, int] | None, pictures: bool
) -> Callable[[Tensor], Tensor]:
    if shape is None:
        grid = grid_of(tree)
        shape = tree.shape or (None if grid is None else grid.shape)
    elif math.prod(shape) != tree.order:
        raise OptionError(f"grid_tensor: shape {shape} is not of {tree.order} patches.")
    if not pictures:
        tail = (tree.order,) if shape is None else shape
        return lambda x: x.mT.reshape(x.shape[0], x.shape[2], *tail)
    if shape is None:
        raise OptionError(
            "grid_tensor: where the patches lie in the image is not known, as the tree is no ModeTree.grid; "
            "give shape=(rows, columns) or arrange=function."
        )
    rows, columns = shape

    def side_by_side(x: Tensor) -> Tensor:
        b, _, channels, height, width = x.shape
        cut = x.reshape(b, rows, columns, channels, height, width).permute(0, 3, 1, 4, 2, 5)
        return cut.reshape(b, channels, rows * height, columns * width)

    return side_by_side


def _values(found: Any, count: int, output: int | None) -> Tensor:
    values = torch.as_tensor(found)
    if values.shape in ((count,), (count, 1)) and output in (None, 0):
        return values.reshape(-1)
    if values.shape == (count,):
        values = values.unsqueeze(1)
    if values.ndim != 2 or len(values) != count:
        raise ShapeError(
            f"grid_tensor: the network must give one value for each of {count} inputs, "
            f"found shape {tuple(values.shape)}."
        )
    fits = isinstance(output, int) and 0 <= output < values.shape[1]
    if output is None or not fits:
        raise OptionError(
            f"grid_tensor: the network has {values.shape[1]} outputs; say which, output=0 to "
            f"output={values.shape[1] - 1}, found {output!r}."
        )
    return values[:, output]
