"""Nodes of a tree without a root, which exchange what they hold: nearest-neighbour interchange.

Every edge between two interior nodes splits the modes in two. Two neighbours are contracted, and singular
values part them again with their legs exchanged: of the three pairings of four legs the one with the fewest
numbers is kept.

A sweep handles an edge after all edges below it, and those no more. So what is cut later acts on the other
side of the edge: what a sweep cuts is orthogonal, and the squares add up to that of its error. Errors of
different sweeps are added as norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnreg.ranks.budget import Budget
from tnreg.ranks.rounding import Rounded, network_of, round_network
from tnreg.search.agglomerate import Joined, agglomerate, entropy, rank_within
from tnreg.trees.tree import ModeTree

_SWEEPS = 20  # at most
# Shares of what is left of the tolerance for a sweep, and for one cluster that is joined anew. The last
# rounding, which cuts the smallest values of all edges together, has the rest.
_SWEEP, _REGROUP = 0.4, 0.05
# Two nodes that have more numbers together are left as they are.
_MOST = 2**24
# Several neighbours are looked at as one tensor up to so many numbers and legs.
_CLUSTER, _LEGS = 2**16, 8
# Of matrices with more rows and columns than this, products with random vectors are looked at first.
_DIRECT = 96


class _Split(NamedTuple):
    """A matrix of a node's or two nodes' legs as ``left @ rest``, left with orthonormal columns.

    ``lower`` are the legs that are its rows, by their place; ``lost`` is the square of what is cut off.
    """

    lower: tuple[int, ...]
    numbers: int
    entropy: float
    left: Tensor
    rest: Tensor
    lost: float

    def better_than(self, other: _Split) -> bool:
        equal = self.numbers == other.numbers
        return self.entropy < other.entropy - 1e-6 if equal else self.numbers < other.numbers


class Web:
    """Interior nodes of a tree: a tensor each, and what its axes lead to.

    Leaves are the modes ``0..N-1``, with a basis of orthonormal columns each that stays as it is; interior
    nodes have larger numbers. All nodes but the ``centre`` are orthonormal towards it.
    """

    def __init__(self, bases: Sequence[Tensor]) -> None:
        self.bases = dict(enumerate(bases))
        self.cores: dict[int, Tensor] = {}
        self.legs: dict[int, list[int]] = {}
        self.centre = -1
        self.allowed, self.lost, self.edges, self.moves = 0.0, 0.0, 1, 0  # of the sweep that is going on

    @classmethod
    def of(cls, tree: ModeTree, weights: Mapping[int, Tensor]) -> Web:
        """Make a web of a factorization's weights by position: full joins, all but the root's orthonormal."""
        web = cls([weights[tree.position(mode)] for mode in tree.leaves])
        number: list[int] = []  # of every position; a node with one child is multiplied into that
        for i, (name, below) in enumerate(zip(tree.nodes, tree.links, strict=True)):
            inside = [number[c] for c in below]
            if not below:
                number.append(name)  # type: ignore[arg-type]
            elif len(inside) == 1 and (i < len(tree.nodes) - 1 or inside[0] in web.cores):
                number.append(inside[0])
                where = web.cores if inside[0] in web.cores else web.bases
                where[inside[0]] = where[inside[0]] @ weights[i]
            else:
                number.append(tree.order + i)
                web._add(number[i], weights[i], inside)
        web.centre = number[-1]
        inner = web._inner(web.centre)
        if len(web.legs[web.centre]) == 2 and inner:  # the matrix of a binary root
            matrix, both = web.cores.pop(web.centre), web.legs.pop(web.centre)
            other = both[1 - both.index(inner[0])]
            web.cores[inner[0]] = web.cores[inner[0]] @ (matrix if both[1] == other else matrix.mT)
            web.legs[inner[0]][-1] = other
            if other in web.cores:
                web.legs[other][-1] = inner[0]
            web.centre = inner[0]
        return web

    @classmethod
    def joined(cls, x: Tensor, allowed: float) -> Web:
        """Make a web of a tensor by agglomeration; ``allowed`` is the largest square of the error."""
        web = cls([torch.eye(n).to(x) for n in x.shape])
        joined = agglomerate(x, allowed)
        web._put(set(), range(x.ndim), joined)
        return web

    def improve(
        self, allowed: float, lost: float, *, regroup: bool = True
    ) -> tuple[ModeTree, Rounded, float]:
        """Move until nothing changes, and round what is found.

        Args:
            allowed: Largest error.
            lost: What of it is spent already.
            regroup: Whether to join several nodes anew where exchanges of two find nothing more.

        Returns:
            The tree, the rounded network along it, and the error in units of its weights.
        """
        for _ in range(_SWEEPS):
            moves, square = self.sweep((_SWEEP * (allowed - lost)) ** 2)
            lost += math.sqrt(square)
            if not moves and regroup:
                moves, lost = self.regroup(allowed, lost)
            if not moves:
                break
        norm = float(torch.linalg.vector_norm(self.cores[self.centre])) or 1.0
        tree, weights = self.hang()
        share = max(allowed - lost, 0.0) / norm or None  # with nothing left only zeros are cut
        last = round_network(*network_of(tree, weights), Budget(share=share), dtype=torch.float64)
        return tree, last, lost * 2.0**-last.log2 + math.sqrt(last.lost) * last.size

    def sweep(self, allowed: float) -> tuple[int, float]:
        """Handle all edges once, bottom up; return how many moves there were, and the square of the error.

        The square of the error is at most what is ``allowed``.
        """
        self.allowed, self.edges, self.moves, self.lost = allowed, len(self.cores), 0, 0.0
        path = [(self.centre, self._inner(self.centre))]
        while path:
            node, waiting = path[-1]
            if waiting:
                child = waiting.pop()
                self._shift(node, child)
                path.append((child, [x for x in self._inner(child) if x != node]))
                continue
            path.pop()
            above = path[-1][0] if path else None
            children = [x for x in self._inner(node) if x != above]
            while len(self.legs[node]) > 3 and self._part(node, above):
                pass
            for child in children:
                if child in self.legs[node]:
                    self._exchange(node, child, above)
            if above is not None:
                self._shift(node, above)
        return self.moves, self.lost

    def regroup(self, allowed: float, lost: float) -> tuple[int, float]:
        """Join the legs of several neighbours anew where that saves numbers, in clusters all over the tree.

        It leads away from trees that no exchange of two neighbours makes better. Return how often it helped,
        and what of the error ``allowed`` is lost then.
        """
        better, covered = 0, set[int]()
        for seed in self._down_from(self.centre)[0]:
            if seed not in self.cores or seed in covered:
                continue
            self._move_to(seed)
            cluster, both, legs = self._cluster(seed)
            covered |= cluster
            if len(cluster) < 3:
                continue
            joined = agglomerate(both, (_REGROUP * (allowed - lost)) ** 2)
            after = sum(weight.numel() for weight in (*joined.weights, joined.core))
            if after < sum(self.cores[node].numel() for node in cluster):
                self._put(cluster, legs, joined)
                better, lost = better + 1, lost + math.sqrt(joined.lost)
        return better, lost

    def _move_to(self, node: int) -> None:
        up = self._down_from(node)[1]
        while self.centre != node:
            self._shift(self.centre, up[self.centre])

    def _cluster(self, seed: int) -> tuple[set[int], Tensor, list[int]]:
        """Contract nodes around one while they are small together; return them, the tensor and its legs."""
        cluster, both, legs = {seed}, self.cores[seed], list(self.legs[seed])
        while True:
            sizes = {
                x: both.numel() * self.cores[x].numel() // both.shape[k] ** 2
                for k, x in enumerate(legs)
                if x in self.cores
            }
            if not sizes or min(sizes.values()) > _CLUSTER or len(legs) >= _LEGS:
                return cluster, both, legs
            near = min(sizes, key=lambda x: (sizes[x], x))
            k = legs.index(near)
            (back,) = cluster.intersection(self.legs[near])
            both = torch.tensordot(both, self.cores[near], ([k], [self.legs[near].index(back)]))
            legs = [x for x in legs if x != near] + [x for x in self.legs[near] if x != back]
            cluster.add(near)

    def _put(self, cluster: set[int], legs: Sequence[int], joined: Joined) -> None:
        """Put the nodes of a tensor with these legs in the place of a cluster."""
        number = list(legs)
        new = max(self.cores, default=len(self.bases) - 1) + 1
        for node in cluster:
            del self.cores[node], self.legs[node]
        for groups, core in (*zip(joined.pairs, joined.weights, strict=True), (joined.left, joined.core)):
            self._add(new, core, [number[group] for group in groups], cluster)
            number.append(new)
            new += 1
        self.centre = number[-1]

    def _add(self, node: int, core: Tensor, legs: list[int], instead_of: Iterable[int] = ()) -> None:
        """Add a node; its neighbours get it in the place of one of these, or else as their last leg."""
        self.cores[node], self.legs[node] = core, legs
        for x in self._inner(node):
            if old := set(self.legs[x]).intersection(instead_of):
                self.legs[x][self.legs[x].index(old.pop())] = node
            else:
                self.legs[x].append(node)

    def _inner(self, node: int) -> list[int]:
        return [x for x in self.legs[node] if x in self.cores]

    def _shift(self, a: int, b: int) -> None:
        """Make a node orthonormal towards its neighbour, which is the centre then."""
        i, j = self.legs[a].index(b), self.legs[b].index(a)
        rows = self.cores[a].movedim(i, -1)
        q, r = torch.linalg.qr(rows.flatten(0, -2))
        self.cores[a] = q.reshape(*rows.shape[:-1], -1).movedim(-1, i)
        self.cores[b] = torch.tensordot(r, self.cores[b], ([1], [j])).movedim(0, j)
        self.centre = b

    def _part(self, node: int, above: int | None) -> bool:
        """Part two legs of a node with many from the others, if that saves numbers; the node stays above."""
        core, legs = self.cores[node], self.legs[node]
        if core.numel() > _MOST:
            return False
        fixed = 0 if above is None else legs.index(above)
        places = range(len(legs))
        groups = [p if fixed not in p else tuple(set(places).difference(p)) for p in combinations(places, 2)]
        best = None
        for group in groups:
            split = self._split(core, group, numbers=core.numel())
            if split and split.numbers < core.numel() and (best is None or split.better_than(best)):
                best = split
        if best is None:
            return False
        new = max(self.cores) + 1
        self.cores[new], self.legs[new] = core.new_empty(0), list[int]()
        self._replace(node, new, core, legs, best)
        self.moves += 1
        return True

    def _exchange(self, node: int, child: int, above: int | None) -> None:
        """Choose among the pairings of the legs of a node and its child; the way up stays with the node."""
        own = [x for x in self.legs[node] if x != child]
        legs = own + [x for x in self.legs[child] if x != node]
        axes = [self.legs[node].index(child)], [self.legs[child].index(node)]
        bond = self.cores[child].shape[axes[1][0]]
        if self.cores[node].numel() * self.cores[child].numel() > _MOST * bond**2:
            self.edges -= 1
            return
        both = torch.tensordot(self.cores[node], self.cores[child], axes)
        current = tuple(range(len(own), len(legs)))
        best = self._split(both, current, bond) or self._split(both, current)
        assert best is not None
        fixed = 0 if above is None else own.index(above)
        free = [k for k in range(len(own)) if k != fixed]
        groups = [(*(x for x in current if x != k), i) for i in free for k in current]
        groups += [(*current, i) for i in free if len(own) > 2]
        groups += [tuple(x for x in current if x != k) for k in current if len(current) > 2]
        for group in groups:
            split = self._split(both, group, numbers=best.numbers)
            if split and split.better_than(best):
                best = split
        self.moves += best.lower != current
        self._replace(node, child, both, legs, best)

    def _replace(self, node: int, lower: int, both: Tensor, legs: Sequence[int], split: _Split) -> None:
        """Make two nodes of the tensor of both, with the legs that it has."""
        rank = split.left.shape[1]
        upper = [k for k in range(len(legs)) if k not in split.lower]
        self.cores[lower] = split.left.reshape(*(both.shape[k] for k in split.lower), rank)
        self.cores[node] = split.rest.reshape(rank, *(both.shape[k] for k in upper))
        self.legs[lower] = [*(legs[k] for k in split.lower), node]
        self.legs[node] = [lower, *(legs[k] for k in upper)]
        for new, old in ((lower, node), (node, lower)):
            for x in self.legs[new]:
                if x != old and x in self.cores and old in self.legs[x]:
                    self.legs[x][self.legs[x].index(old)] = new
        self.lost += split.lost
        self.allowed -= split.lost
        self.edges -= 1

    def _split(
        self, both: Tensor, lower: tuple[int, ...], rank: int | None = None, *, numbers: int | None = None
    ) -> _Split | None:
        """Part some legs of a tensor from the others.

        ``None`` if what may be lost at this edge needs a larger ``rank``, or more ``numbers``.
        """
        upper = [k for k in range(both.ndim) if k not in lower]
        matrix = both.permute(*lower, *upper).reshape(math.prod(both.shape[k] for k in lower), -1)
        sides, shorter = sum(matrix.shape), min(matrix.shape)
        most = min(
            shorter, shorter if rank is None else rank, shorter if numbers is None else numbers // sides
        )
        rounding = 4 * torch.finfo(matrix.dtype).eps * float(torch.linalg.vector_norm(matrix))
        allowed, outside, basis = max(self.allowed / max(self.edges, 1), rounding**2), 0.0, None
        if shorter > _DIRECT and most + 8 < shorter / 2:
            basis = _range(matrix, most + 8)
            inside = basis.mH @ matrix
            outside = float(torch.linalg.vector_norm(matrix - basis @ inside)) ** 2
            if outside > allowed:
                return None
            matrix = inside
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        squares = values.square()
        rank = rank_within(squares, allowed - outside)
        if rank > most:
            return None
        left = left[:, :rank] if basis is None else basis @ left[:, :rank]
        rest = values[:rank].unsqueeze(1) * right[:rank]
        lost = outside + float(squares[rank:].sum())
        return _Split(lower, rank * sides, entropy(squares[:rank]), left, rest, lost)

    def hang(self) -> tuple[ModeTree, dict[int, Tensor]]:
        """Hang the tree from a node in its middle; return it, and the weights by position."""
        order, up = self._down_from(self.centre)
        counts = {node: int(node in self.bases) for node in order}
        for node in reversed(order[1:]):
            counts[up[node]] += counts[node]

        def largest_branch(node: int) -> int:
            below = (counts[x] for x in self.legs[node] if up.get(x) == node)
            return max(*below, counts[self.centre] - counts[node])

        branches = {node: largest_branch(node) for node in self.cores}
        least = min(branches.values())
        middle = (node for node in self.cores if branches[node] == least)  # one or two
        _, order, up, below_of = max(map(self._ordered, middle))
        nested = dict[int, Any]()
        for node in reversed(order):
            nested[node] = [nested.pop(x) for x in below_of[node]] or node
        tree = ModeTree(nested[order[0]])
        weights: dict[int, Tensor] = {}
        waiting = [order[0]]
        for position in reversed(range(len(order))):  # in the order of the tree's nodes, the last first
            node = waiting.pop()
            if node in self.bases:
                weights[position] = self.bases[node]
                continue
            axes = [*below_of[node], *([up[node]] if node in up else ())]
            weights[position] = self.cores[node].permute([self.legs[node].index(x) for x in axes])
            waiting += below_of[node]
        return tree, weights

    def _ordered(self, root: int) -> tuple[list[int], list[int], dict[int, int], dict[int, list[int]]]:
        """Hang the tree from a node, children in the order of the first modes below them.

        Return these of the root's children; all nodes and parents as ``_down_from`` does; the children.
        """
        order, up = self._down_from(root)
        first, below_of = dict[int, int](), dict[int, list[int]]()
        for node in reversed(order):
            below = sorted((x for x in self.legs.get(node, ()) if up.get(x) == node), key=first.__getitem__)
            below_of[node], first[node] = below, first[below[0]] if below else node
        return [first[x] for x in below_of[root]], order, up, below_of

    def _down_from(self, root: int) -> tuple[list[int], dict[int, int]]:
        """Return all nodes, parents first, and the parent of each but the root."""
        order, up = [root], dict[int, int]()
        for node in order:
            below = [x for x in self.legs.get(node, ()) if x != up.get(node)]
            up |= dict.fromkeys(below, node)
            order += below
        return order, up


def _range(matrix: Tensor, width: int) -> Tensor:
    """Return an orthonormal basis near the first left singular vectors (Halko, Martinsson and Tropp 2011)."""
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(matrix.shape[1], width, generator=random, dtype=matrix.real.dtype).to(matrix)
    basis: Tensor = torch.linalg.qr(matrix @ vectors)[0]
    basis = torch.linalg.qr(matrix @ (matrix.mH @ basis))[0]
    return basis
