"""What data suits a tree: the entanglement of samples across its cuts, and the order of their features.

After Alexander, De La Vega, Razin and Cohen (2023), arXiv:2303.11249: a locally connected network on a tree
can predict well only if the data has little entanglement across the tree's cuts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from tnreg.errors import DataError, OptionError, ShapeError, TreeError, check_number
from tnreg.machine.memory import must_fit
from tnreg.search.agglomerate import entropy
from tnreg.tensors.arrays import array_of, check_numbers, double, seeded
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

# Half turns between the values of a feature, above which its scale is surely a mistake.
_HALF_TURNS = 10
# Products of the vectors of so many features are cheaper than an eigendecomposition.
_FEW = 5
# Edges that each feature keeps in the graph that is cut, the strongest ones; starts of a cut.
_EDGES, _STARTS = 32, 2


@torch.no_grad()
def data_entanglement(
    samples: Any,
    tree: ModeTree,
    labels: Any = None,
    theta: float = 0.085,
    *,
    method: str = "entanglement",
    nodes: Iterable[Node] | None = None,
) -> dict[Node, float]:
    """Measure how much the features below every node of a tree share with all others.

    Feature n of sample m becomes the vector ``v = (cos πθx, sin πθx)``, and the data the tensor
    ``1/M Σ_m v_m0 ⊗ .. ⊗ v_m,N-1``; with labels every sample is multiplied by its own. At a node this is
    ``entanglement_entropy`` of the matrix whose rows are the modes below it. The tensor is never formed: its
    singular values come from inner products of samples, ``Π_n cos πθ(x_mn - x_kn)``.

    Args:
        samples: Real numbers ``(M, N)``, feature n being mode n, or images ``(M, height, width)``, whose
            pixels are modes ``row * width + column``. They are used as they are: published were audio within
            [-1, 1] and pixels within [0, 1]. Standardize what has units, or scale ``theta``.
        tree: Mode tree over ``0..N-1``. For one set of features: ``ModeTree([[0, 5, 7], [the others]])``.
        labels: Classes ``(M,)``, whole numbers or bool. Two classes count as +1 and -1, whatever their
            numbers; K classes as the corners of a regular simplex, a further mode above the root.
        theta: Half turns per unit of the samples. Values ``1/θ`` apart are as far apart as can be.
        method: ``"entanglement"``, or ``"correlation"`` for the surrogate ``Σ_ij |corr(x_i, x_j)|``, i below
            the node and j not, without labels and ``theta``. Constant features count as uncorrelated.
        nodes: Only these; all but the root if left out.

    Returns:
        ``{node: entropy in nats}``, children before parents; between 0 and ``ln M``. Samples of many features
        may all be orthogonal to each other: entropies close to ``ln M`` say that ``theta`` is too large.

    Raises:
        ShapeError: Samples that are not one number for each mode, labels that are not one for each sample.
        DataError: NaN, infinite, complex or missing numbers, fewer than two samples, features that span more
            than ten half turns, labels that are not whole numbers.
        OptionError: ``theta`` that is not positive, an unknown method.
        TreeError: Nodes that are not in the tree, or its root.
        SizeError: Some 20 matrices ``M × M``, or for correlations four ``N × N``, would not fit into memory.

    Cost: two eigendecompositions ``M × M`` a node of more than five features (up to 0.04 s at M = 500);
    correlations one matrix product for all nodes. Computed in double precision, to some 1e-12.

    Example:
        >>> signs = torch.tensor([[1., 1.], [1., -1.], [-1., 1.], [-1., -1.]])
        >>> tree, both = ModeTree.binary(4), torch.cat([signs, signs], 1)  # 0 and 2 agree, so do 1 and 3
        >>> entropies = data_entanglement(both, tree, theta=1 / 4)
        >>> f"{entropies[0] / math.log(2):.2f}, {entropies[0, 1] / math.log(2):.2f} bits"
        '1.00, 2.00 bits'
    """
    tree = tree if isinstance(tree, ModeTree) else ModeTree(tree)
    x = _read(samples, "data_entanglement", tree)
    corners = None if labels is None else _corners(labels, x)
    if not isinstance(nodes, Iterable | None):
        message = f"data_entanglement: nodes must be a list of the tree's nodes, found {nodes!r}."
        raise OptionError(message, argument="nodes")
    wanted = range(len(tree.nodes) - 1) if nodes is None else sorted(map(tree.position, nodes))
    if len(tree.nodes) - 1 in wanted:
        raise TreeError("data_entanglement: above the root there are no other features.", argument="nodes")
    if method not in ("entanglement", "correlation"):
        message = f"data_entanglement: method must be 'entanglement' or 'correlation', found {method!r}."
        raise OptionError(message, argument="method")
    if method == "correlation":
        values = _sums(x, tree)
    else:
        values = _entropies(x, tree, corners, _check_theta(theta, x), set(wanted))
    return {tree.nodes[i]: values[i] for i in wanted}


@torch.no_grad()
def rearrange(samples: Any, *, seed: int = 0) -> Tensor:
    """Find an order of the features in which a binary tree over neighbours cuts few correlations.

    The graph of ``|corr(x_i, x_j)|`` is cut into two halves of least weight between them (Kernighan and Lin
    1970, by networkx, from two random starts), each half again, and so on. Of the two halves the one that is
    closer to what lies on the left becomes the left one, so that neighbours along a line stay neighbours.

    Args:
        samples: As in ``data_entanglement``. A few hundred are enough.
        seed: Of the random starts; the same seed gives the same order.

    Returns:
        ``order``, an int64 tensor ``(N,)``: feature ``order[k]`` comes to position k. The samples rearranged
        are ``new = samples[:, order]``, and ``new[:, order.argsort()]`` the original ones again. Every node
        of ``ModeTree.binary(N)`` then holds features that belong together; if N is no power of two, the left
        part is the largest one below N. For another tree, such as ``ModeTree.grid``, put them where it meets
        its leaves: ``new[:, tree.leaf_order] = samples[:, order]``.

    Raises:
        ShapeError, DataError: As ``data_entanglement``.
        OptionError: The seed is no integer.
        SizeError: Four matrices ``N × N`` would not fit into memory.

    Cost: some 3 s for 1,000 features, 17 s for 4,000. Each feature keeps its 32 strongest edges.

    Example:
        >>> z = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> order = rearrange(z[:, [0, 1, 0, 1]])  # 0 and 2 agree, so do 1 and 3
        >>> sorted(map(sorted, order.view(2, 2).tolist()))
        [[0, 2], [1, 3]]
    """
    strength = _correlations(_read(samples, "rearrange")).cpu()
    random = seeded(seed, "rearrange: seed")
    # squares: what chance adds to a correlation of distant features counts less
    squares, order = strength.square(), torch.empty(len(strength), dtype=torch.int64)
    waiting = [(torch.arange(len(strength)), squares.new_zeros(len(strength)), 0)]
    while waiting:  # features, how much closer each is to what lies right of them than left, their place
        inside, right, start = waiting.pop()
        if len(inside) == 1:
            order[start] = inside
            continue
        a, b = _halves(strength[inside][:, inside], random)
        if len(a) == len(b) and right[a].sum() > right[b].sum():
            a, b = b, a
        between = squares[inside[a]][:, inside[b]]
        waiting.append((inside[a], right[a] + between.sum(1), start))
        waiting.append((inside[b], right[b] - between.sum(0), start + len(a)))
    return order


def _halves(strength: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut a graph in two with little weight between them; the first part has a power of two nodes."""
    count = len(strength)
    first = 1 << (count - 1).bit_length() - 1
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(count))
    # both parts are of one size, thanks to more nodes that stay together
    more, inseparable = list(range(count, 2 * first)), float(strength.sum()) + 1
    graph.add_weighted_edges_from((more[0], n, inseparable) for n in more[1:])
    graph.add_nodes_from(more)
    weights, near = strength.topk(min(_EDGES, count - 1))
    rows = zip(near.tolist(), weights.tolist(), strict=True)
    graph.add_weighted_edges_from((i, j, w) for i, row in enumerate(rows) for j, w in zip(*row, strict=True))
    least, parts = math.inf, (near[:0, 0], near[:0, 0])
    for _ in range(_STARTS):
        drawn = torch.randperm(count, generator=random).tolist()
        start = (drawn[:first], drawn[first:] + more)
        cut = nx.community.kernighan_lin_bisection(graph, start, weight="weight")
        a, b = sorted((torch.tensor(sorted(n for n in part if n < count)) for part in cut), key=len)
        between = float(strength[a][:, b].sum())
        if between < least:
            least, parts = between, (b, a)
    return parts


def _read(samples: Any, who: str, tree: ModeTree | None = None) -> Tensor:
    """Return samples ``(M, N)`` in double precision, of as many features as the tree has modes."""
    x = array_of(samples, None, f"{who}: samples")
    fits = x.ndim in (2, 3)
    if tree is not None and fits:
        image = tree.shape if x.ndim == 3 else None
        fits = math.prod(x.shape[1:]) == tree.order and image in (None, tuple(x.shape[1:]))
    if not fits:
        columns, image = ("N", None) if tree is None else (tree.order, tree.shape)
        images = "height, width" if image is None else "{}, {}".format(*image)
        raise ShapeError(
            f"{who}: samples do not fit.\n  found:    shape {tuple(x.shape)}\n"
            f"  expected: (M, {columns}), one column for each feature, or images (M, {images})",
            argument="samples",
        )
    if x.is_complex():
        raise DataError(f"{who}: samples must be real numbers, found {x.dtype}.", argument="samples")
    if len(x) < 2:
        raise DataError(f"{who}: at least two samples are needed, found {len(x)}.", argument="samples")
    return check_numbers(double(x)).flatten(1)


def _corners(labels: Any, x: Tensor) -> Tensor:
    """Return inner products ``(M, M)`` of the corners of a regular simplex that classes stand for."""
    classes = array_of(labels, 1, "data_entanglement: labels").to(x.device)
    if len(classes) != len(x):
        message = f"data_entanglement: {len(classes)} labels for {len(x)} samples."
        raise ShapeError(message, argument="labels")
    if classes.is_complex() or bool(classes.double().frac().ne(0).any()):  # NaN as well
        message = "data_entanglement: labels must be classes, whole numbers such as -1 and 1 or 0, 1, 2."
        raise DataError(message, argument="labels")
    known, classes = torch.unique(classes, return_inverse=True)
    same = classes[:, None] == classes
    return torch.where(same, 1.0, -1.0 / max(len(known) - 1, 1)).to(x)


def _check_theta(theta: Any, x: Tensor) -> float:
    half_turns = check_number(theta, "data_entanglement: theta", 0)
    if half_turns == 0:
        raise OptionError("data_entanglement: theta must be > 0, found 0.", argument="theta")
    span = float((x.amax(0) - x.amin(0)).max())
    if not half_turns * span <= _HALF_TURNS:
        raise DataError(
            f"data_entanglement: a feature spans {half_turns * span:.3g} half turns at theta = {theta}.\n"
            "  values that are 2 / theta apart would count as equal\n"
            "  standardize the samples (pixels: samples / 255), or take a smaller theta",
            argument="theta",
        )
    return half_turns


def _entropies(
    x: Tensor, tree: ModeTree, corners: Tensor | None, theta: float, wanted: set[int]
) -> dict[int, float]:
    """Return the entropies at these positions of nodes.

    With the samples' vectors below a node as columns of A, those of the others as columns of B, the tensor is
    ``A Bᵀ``; its squared singular values are the eigenvalues of ``Fᵀ (Bᵀ B) F`` where ``F Fᵀ = Aᵀ A``.
    """
    count, sizes = len(x), [len(tree.modes_below(node)) for node in tree.nodes]
    what, advice = "inner products of all samples", "take a few hundred of them, e.g. samples[:500]"
    copies = 2 * tree.order.bit_length() + 8
    must_fit(what, [(count, count)], x.dtype, x.device, advice, copies=copies)
    angles = math.pi * theta * x.T
    waves = torch.stack([angles.cos(), angles.sin()], -1)
    everyone = sum((_log_gram(wave) for wave in waves[1:]), _log_gram(waves[0]))
    whole = _gram(everyone) if corners is None else _gram(everyone) * corners
    # what rounding leaves of zeros, such as those of equal samples whose labels cancel
    floor = torch.finfo(x.dtype).eps * count * float(whole.abs().sum())
    # depth first, the largest child first: then the inner products of few nodes are needed at a time
    waiting, path = [len(tree.nodes) - 1], list[int]()
    while waiting:
        path.append(waiting.pop())
        waiting += sorted(tree.links[path[-1]], key=lambda c: -sizes[c])
    found: dict[int, float] = {}
    below: dict[int, Tensor] = {}
    parents = {c: i for i, links in enumerate(tree.links) for c in links}
    for i in reversed(path[1:]):
        inside = below.pop(i) if tree.links[i] else _log_gram(waves[tree.nodes[i]])  # type: ignore[index]
        if i in wanted:
            outside = _gram(everyone - inside)
            factor = _factor(waves[list(tree.modes_below(tree.nodes[i]))], inside)
            squares = factor.T @ (outside if corners is None else outside * corners) @ factor
            values = torch.linalg.eigvalsh(squares)
            found[i] = entropy(torch.where(values > floor, values, 0.0))
        up = parents[i]
        below[up] = below[up] + inside if up in below else inside
    return found


def _log_gram(wave: Tensor) -> Tensor:
    """Return logarithms of inner products of vectors ``(M, 2)``, and 1 where negative, ``(2, M, M)``."""
    gram = wave @ wave.T
    return torch.stack([gram.abs().clamp_min(1e-300).log(), (gram < 0).to(gram)])


def _gram(logs: Tensor) -> Tensor:
    """Return the inner products whose logarithms and counts of signs these are."""
    return logs[0].exp() * (1 - 2 * logs[1].remainder(2))


def _factor(waves: Tensor, logs: Tensor) -> Tensor:
    """Return ``F`` with ``F Fᵀ`` the inner products over features, of few ones as the products themselves."""
    if len(waves) <= _FEW:
        factor: Tensor = reduce(lambda f, wave: (f.unsqueeze(2) * wave.unsqueeze(1)).flatten(1), waves)
        return factor
    values, vectors = torch.linalg.eigh(_gram(logs))
    kept = values > torch.finfo(values.dtype).eps * len(values) * values[-1]  # others are rounding
    factor = vectors[:, kept] * values[kept].sqrt()
    return factor


def _sums(x: Tensor, tree: ModeTree) -> dict[int, float]:
    """Return sums of correlations between the features below every node and the others."""
    strength = _correlations(x)[list(tree.leaf_order)][:, list(tree.leaf_order)]
    # the modes below a node follow each other in the order of the leaves, and node after node
    table = torch.zeros(len(strength) + 1, len(strength) + 1, dtype=x.dtype)
    table[1:, 1:] = strength.cumsum(0).cumsum(1)
    end, sums = 0, dict[int, float]()
    for i, (node, links) in enumerate(zip(tree.nodes, tree.links, strict=True)):
        end += not links
        start = end - len(tree.modes_below(node))
        inside = table[end, end] - table[start, end] - table[end, start] + table[start, start]
        sums[i] = float(table[end, -1] - table[start, -1] - inside)
    return sums


def _correlations(x: Tensor) -> Tensor:
    """Return magnitudes of correlations ``(N, N)``, zeros on the diagonal and at constant features."""
    order, tiny = x.shape[1], torch.finfo(x.dtype).tiny
    advice = "leave out features, or average neighbouring ones"
    must_fit("correlations of all features", [(order, order)], x.dtype, x.device, advice, copies=4)
    constant = x.amax(0) == x.amin(0)
    x = x / x.abs().amax(0).clamp_min(tiny)
    x = torch.where(constant, 0.0, x - x.mean(0))
    x = x / torch.linalg.vector_norm(x, dim=0).clamp_min(tiny)
    return (x.T @ x).abs().clamp_max(1).fill_diagonal_(0)
