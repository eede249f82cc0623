"""Tensor factorizations over a mode tree, as one ``nn.Module``.

With diagonal joins (Razin, Maman and Cohen 2022, arXiv:2201.11729) node v holds
``W_v`` of shape ``(R_v, R_above)`` and its tensors are
``W^(v, r) = Σ_r' W_v[r', r] ⊗_c W^(c, r')``; with full joins every child has an index of its own.
Which classical model it is depends on the tree alone: a star is CP or Tucker, a caterpillar of full
joins the tensor train, a binary tree hierarchical Tucker, a chain deep matrix factorization.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, final

import torch
from torch import Tensor

from tnreg.errors import DataError, FileError, OptionError, ShapeError, blame, check_number
from tnreg.factorizations.module import NetworkModule
from tnreg.factorizations.stacks import NodeTensors, Stacks
from tnreg.machine.files import read_model, write_safetensors
from tnreg.machine.memory import must_fit
from tnreg.networks.network import Network
from tnreg.networks.plan import (
    Plan,
    contract,
    contract_traced,
    plan,
    plan_of_similar,
    plans_of_entries,
    steps_of_batch,
    within_memory,
)
from tnreg.networks.scaled import Growth, column_norms, inner_products, product_of_rows
from tnreg.tensors.arrays import (
    Scaled,
    as_tensor,
    check_dtype,
    check_features,
    draw_normal,
    exact_scales,
    is_autocast,
    largest_of,
    without_autocast,
)
from tnreg.trees.drawing import tree_svg
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

_FORMAT = "tnreg.factorization/1"


@final
class Factorization(NetworkModule):
    """A tensor of shape ``sizes``, factorized along a mode tree.

    Its entry ``W[d_0, ..., d_{N-1}]`` is computed from the leaves to the root, with the weight ``W_v`` of
    every node v and its children ``c_1, .., c_k``:

        leaf of mode n:  φ_n[s] = W_n[d_n, s]
        diagonal join:   φ_v[s] = Σ_r W_v[r, s] φ_c1[r] .. φ_ck[r]
        full join:       φ_v[s] = Σ_{r_1, .., r_k} W_v[r_1, .., r_k, s] φ_c1[r_1] .. φ_ck[r_k]

    and the root, which has no s, gives the entry. A *bare* leaf has no weight: ``φ_n[s]`` is 1 for s = d_n,
    0 otherwise, so that its mode is an index of its parent's weight (the cores of a tensor train, say).

    Args:
        tree: The mode tree, or what ``ModeTree`` takes.
        sizes: Size of every mode (one integer if all are equal).
        ranks: Size of the bond above every non-root node: one integer, or ``{node: integer}``.
            Siblings under a diagonal join share their bond and need equal ranks.
        join: ``"diagonal"``, ``"full"``, or ``{interior node: either}`` (nodes left out: diagonal).
        root: ``"trained"``, or ``"ones"`` to fix the weight of a diagonal root to ones (CP without
            weights, matrix factorization); a fixed root is no entry of ``weights``.
        leaves: ``"weights"``, ``"bare"``, or ``{mode: either}`` (modes left out: weights). The bond above a
            bare leaf, and above its siblings under a diagonal join, is its mode's size whatever ``ranks``
            says as one integer.
        std: Standard deviation of the normal initial weights; small values give the incremental
            learning of the theory.
        dtype: float16, bfloat16, float32, float64, complex64 or complex128; torch's default if left out.
        device: Any torch device.
        generator: For reproducible weights, the same on every device.

    Attributes:
        error_bound: Bound on the Frobenius distance to what ``decompose`` and ``truncate`` approximated;
            otherwise ``None``.

    Raises:
        TreeError, ShapeError, OptionError: Arguments that do not fit the tree.
        SizeError: The weights would not fit into memory, or one of them would need more than 64 axes.

    Example:
        >>> model = Factorization(ModeTree([[0, 1], [2, 3]]), (2, 3, 5, 7), 4)
        >>> model.to_tensor().shape, model.weights[(0, 1)].shape
        (torch.Size([2, 3, 5, 7]), torch.Size([4, 4]))
    """

    def __init__(
        self,
        tree: ModeTree,
        sizes: Sequence[int] | int,
        ranks: int | Mapping[Node, int],
        *,
        join: str | Mapping[Node, str] = "diagonal",
        root: str = "trained",
        leaves: str | Mapping[int, str] = "weights",
        std: float = 1e-2,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        tree = tree if isinstance(tree, ModeTree) else ModeTree(tree)
        dtype = check_dtype(dtype or torch.get_default_dtype())
        std = check_number(std, "std", 0)
        network = Network.build(tree, sizes, ranks, join=join, root=root, leaves=leaves)
        shapes = [(len(stack.positions), *stack.shape) for stack in network.stacks]
        # an axis more: where nodes are treated alike the root's weight has a bond above it too
        must_fit("a factorization: its weights", [(*shape, 1) for shape in shapes], dtype, device)
        if std == 0:  # no numbers are drawn: loading a model leaves the random generators alone
            weights = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        else:
            weights = [draw_normal(shape, dtype, device, generator).mul_(std) for shape in shapes]
        self._set(network, Stacks(weights))

    @classmethod
    def from_weights(
        cls,
        tree: ModeTree,
        weights: Mapping[Node, Tensor],
        *,
        join: str | Mapping[Node, str] = "full",
        leaves: str | Mapping[int, str] = "weights",
    ) -> Factorization:
        """Make a factorization that holds copies of these weights; sizes and ranks are read off them.

        Args:
            tree: The mode tree.
            weights: ``{node: weight}`` of all nodes, shaped as the property ``weights`` says; a diagonal
                root that is left out is fixed to ones.
            join: As for the class.
            leaves: As for the class; bare ones have no weight.

        Raises:
            ShapeError, OptionError: Weights that do not fit the tree or each other.
        """
        tensors = {node: as_tensor(weight) for node, weight in weights.items()}
        kinds = Network.build(tree, 1, 1, join=join, leaves=leaves)  # sizes do not matter yet
        bare = {tree.nodes[i] for i in kinds.bare}
        with blame("weights"):
            for node in tree.nodes[:-1]:
                if node not in tensors and node not in bare:
                    raise ShapeError(f"from_weights: there is no weight for node {node!r}.")
                if node not in bare and tensors[node].ndim < 2:
                    raise ShapeError(
                        f"the weight of node {node!r} needs two axes or more, with the bond above it last.\n"
                        f"  found: shape {tuple(tensors[node].shape)}"
                    )
            sizes = [_bare_size(kinds, m, tensors) if m in bare else len(tensors[m]) for m in tree.leaves]
        model = cls(
            tree,
            sizes,
            {node: tensors[node].shape[-1] for node in tree.nodes[:-1] if node not in bare},
            join=join,
            root="trained" if tree.root in tensors else "ones",
            leaves=leaves,
            std=0.0,
            dtype=reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values())),
            device=next(iter(tensors.values())).device,
        )
        model.load_weights(tensors)
        return model

    @classmethod
    def holding(cls, network: Network, stacks: Sequence[Tensor]) -> Factorization:
        """Make a factorization of weights in the order of ``network.stacks``: no copy, no check."""
        return cls.__new__(cls)._set(network, Stacks(stacks))

    @classmethod
    def viewing(cls, network: Network, stacks: Sequence[Tensor]) -> Factorization:
        """Make a factorization that computes with these tensors and has no parameters of its own.

        The tensors are in the order of ``network.stacks``; gradients flow to where they come from.
        """
        return cls.__new__(cls)._set(network, list(stacks))

    def _set(self, network: Network, stacks: Stacks | list[Tensor]) -> Factorization:
        super().__init__()
        self.network = network
        self.stacks = stacks  # those of equal nodes in one, so that a level is one batched call
        self._entry_plans: list[tuple[Tensor, Plan]] = []
        self._growth = Growth()
        self.error_bound: float | None = None
        return self

    @property
    def tree(self) -> ModeTree:
        """The mode tree."""
        return self.network.tree

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of every mode."""
        return self.network.sizes

    @property
    def _first(self) -> Tensor:
        stacks = self.stacks
        if isinstance(stacks, list):
            return stacks[0]
        # the plain ones are at hand: walking through modules takes longer than some contractions
        plain: Any = stacks._parameters
        found: Tensor | None = next(iter(plain.values() if plain else stacks.parameters()), None)
        return stacks[0] if found is None else found

    @property
    def weights(self) -> Mapping[Node, Tensor]:
        """``{node: weight}`` in the order of ``tree.nodes``: differentiable views, to be read.

        Leaf of mode n: ``(D_n, R_above)``. Diagonal join: ``(R_v, R_above)``. Full join:
        ``(R_c1, ..., R_ck, R_above)`` with the children in ``tree.children(v)`` order. The root has
        no ``R_above``; with ``root="ones"`` it is left out, as bare leaves are. Every access makes new
        views, so that a loss is not differentiable in them: see ``grad_by_node``. ``load_weights`` changes
        weights.
        """
        self._reshard()
        return NodeTensors(self.network, self.stacks)

    @property
    def gradients(self) -> Mapping[Node, Tensor]:
        """``{node: gradient}`` after ``loss.backward()``, shapes of ``weights``; zeros before it.

        Where torch's ``parametrize`` computes a weight from a parameter of its shape, that parameter's.

        Raises:
            OptionError: Weights that are computed from parameters of other shapes, or pruned, or those of
                ``ConvNet.as_factorization``, which belong to the network.
        """
        own = self._own
        parts = [
            [torch.zeros_like(p) if p.grad is None else p.grad for p in own.sources(k)]
            for k in range(len(own))
        ]
        return NodeTensors(self.network, [own.join(k, part) for k, part in enumerate(parts)])

    def grad_by_node(
        self, loss: Tensor, *, create_graph: bool = False, retain_graph: bool | None = None
    ) -> Mapping[Node, Tensor]:
        """``{node: gradient}`` of a loss that was computed with this model, without touching any ``grad``.

        Args:
            loss: A scalar tensor, e.g. ``task.loss(model)``.
            create_graph: Whether the gradients are differentiable.
            retain_graph: Whether there will be another backward through the loss; as ``create_graph`` if
                left out.

        Raises:
            OptionError: A loss that is no scalar or does not depend on the weights; weights as ``gradients``
                refuses them.
        """
        own = self.stacks
        parts = [own.sources(k) if isinstance(own, Stacks) else [own[k]] for k in range(len(own))]
        sources = [p for part in parts for p in part if p.requires_grad]
        found: dict[int, Tensor | None] = {}
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad and sources:
            gradients = torch.autograd.grad(
                loss, sources, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
            )
            found = dict(zip(map(id, sources), gradients, strict=True))
        if all(gradient is None for gradient in found.values()):
            raise OptionError(
                "the loss must be one number with a gradient, computed with the weights of this model.",
                argument="loss",
            )

        def of(p: Tensor) -> Tensor:
            gradient = found.get(id(p))
            return torch.zeros_like(p) if gradient is None else gradient

        joined = [[of(p) for p in part] for part in parts]
        stacks = [own.join(k, j) if isinstance(own, Stacks) else j[0] for k, j in enumerate(joined)]
        return NodeTensors(self.network, stacks)

    @property
    def _own(self) -> Stacks:
        """The parameters, or an error where there are none."""
        self._reshard()
        if isinstance(self.stacks, Stacks):
            return self.stacks
        raise OptionError(
            "this factorization shows the weights of a network and has no parameters of its own.\n"
            "  from_cnn(net) returns one that has; gradients are those of the network"
        )

    @torch.no_grad()
    @blame("weights")
    def load_weights(self, weights: Mapping[Node, Tensor]) -> None:
        """Copy weights in; nodes that are not named keep theirs.

        Raises:
            TreeError, ShapeError: A node that the tree does not have, or a weight of another shape.
            DataError: NaN or infinite weights, or complex ones for a real model. Nothing is copied then.
        """
        own, checked = self._own, dict[tuple[int, int], Tensor]()
        for node, weight in weights.items():
            position = self._weighted(node)
            value = as_tensor(weight)
            shape = self.network.shape(position)
            if tuple(value.shape) != shape:
                raise ShapeError(
                    f"the weight of node {node!r} has another shape.\n"
                    f"  found:    {tuple(value.shape)}\n  expected: {shape}"
                )
            if value.is_complex() and not self.dtype.is_complex:
                raise DataError(f"a complex weight at node {node!r} for a model of {self.dtype}.")
            value = value.to(self.dtype)
            if not torch.isfinite(largest_of(value)):  # without arrays of that size
                problem = f"NaN or infinite entries, or too large ones for {self.dtype}"
                raise DataError(f"the weight of node {node!r} has {problem}.")
            checked[self.network.slots[position]] = value
        own.write(checked)

    def _weighted(self, node: Node) -> int:
        """Return the position of a node that has a weight."""
        position = self.tree.position(node)
        if position in self.network.bare:
            raise OptionError(f"leaf {node!r} is bare: it has no weight; leave it out.")
        if position not in self.network.slots:
            raise OptionError("the root's weight is fixed to ones (root='ones'); leave it out.")
        return position

    @blame("settings")
    def parameter_groups(self, settings: Mapping[Node, Mapping[str, Any] | None]) -> list[dict[str, Any]]:
        """Return groups for ``torch.optim``: learning rate, weight decay or freezing by node.

        Equal nodes are entries of one parameter. Where settings tell them apart, that one is replaced here by
        several, which ``state_dict`` names as well: make optimizers, wrappers and copies afterwards. Every
        call starts anew, so that frozen nodes which are not named again are trained again.

        Args:
            settings: ``{node: options}``, e.g. ``{"lr": 1e-3, "weight_decay": 0.0}``, as the optimizer
                knows them; ``None`` freezes the node. Nodes left out have the optimizer's own.

        Raises:
            TreeError, OptionError: A node that the tree does not have or that has no weight, options that
                are no mapping, or weights that are computed from other parameters or sharded.

        Example:
            >>> model = Factorization(ModeTree.star(3), 4, 2)
            >>> groups = model.parameter_groups({0: {"lr": 1e-3}, model.tree.root: None})
            >>> optimizer = torch.optim.Adam(groups, lr=1e-2)
            >>> [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
            [(0.01, 1), (0.001, 1)]
        """
        kinds: list[Any] = [{}]
        by_slot = dict.fromkeys(self.network.slots.values(), 0)
        for node, options in settings.items():
            if options is not None and not (isinstance(options, Mapping) and "params" not in options):
                message = f"the options of node {node!r} must be {{name: value}} of the optimizer, or None"
                raise OptionError(f"{message}, found {options!r}.")
            if options not in kinds:
                kinds.append(options)
            by_slot[self.network.slots[self._weighted(node)]] = kinds.index(options)
        own, groups = self._own, [list[Any]() for _ in kinds]
        own.unsplit()
        for k, stack in enumerate(self.network.stacks):
            slots: dict[int, list[int]] = {}
            for slot in range(len(stack.positions)):
                slots.setdefault(by_slot[k, slot], []).append(slot)
            if len(slots) == 1:
                groups[next(iter(slots))] += own.parameters_of(k)
                continue
            own.split(k, list(slots.values()))
            for kind, part in zip(slots, own.parameters_of(k), strict=True):
                groups[kind].append(part)
        for kind, members in zip(kinds, groups, strict=True):
            for parameter in members:
                parameter.requires_grad_(kind is not None)
        pairs = zip(kinds, groups, strict=True)
        return [{"params": members, **kind} for kind, members in pairs if members and kind is not None]

    def to_tensor(self) -> Tensor:
        """Return the dense tensor, shape ``sizes``; axis n is mode n.

        Raises:
            SizeError: It would not fit into the memory available; nothing was allocated.
        """
        return self._carry_out(plan(self))

    def entries(self, index: Tensor | Plan) -> Tensor:
        """Entries of the tensor at multi-indices, without the dense tensor where that is cheaper.

        Args:
            index: int64 ``(B, N)``, counted from 0; or ``tnreg.plan(model, index=index)``, which
                has checked and planned it already. The last few indices are planned once.

        Returns:
            Shape ``(B,)``.

        Raises:
            ShapeError, DataError: Wrong shape or dtype, no rows, or an index out of range.
            SizeError: Intermediates would not fit into the memory available.
        """
        return self._carry_out(self._plan_of(index))

    def _plan_of(self, index: Tensor | Plan) -> Plan:
        chosen = index if isinstance(index, Plan) else self._entry_plan(index)
        same = chosen.network is self.network or chosen.network == self.network
        if chosen.kind != "entries" or not same:
            raise OptionError(
                f"a plan of {chosen.kind} for another network cannot give the entries of this model.\n"
                "  write tnreg.plan(model, index=index)",
                argument="index",
            )
        return chosen

    def _carry_out(self, chosen: Plan) -> Tensor:
        # under fully_shard by a call, which gathers weights and lets processes exchange gradients
        return self(chosen) if hasattr(type(self), "reshard") else self._contract(chosen)

    def _contract(
        self, chosen: Plan, inputs: Tensor | Sequence[Tensor] = (), batch: int | None = None
    ) -> Tensor:
        stacks = list(self.stacks)
        if is_autocast(stacks[0].device):
            with without_autocast(stacks[0].device):
                return self._contract(chosen, inputs, batch)
        return contract(within_memory(chosen, stacks, batch=batch), stacks, inputs, self._growth)

    def _entry_plan(self, index: Tensor) -> Plan:
        if isinstance(index, Tensor):
            index = index.to(self.device)
            for known, chosen in self._entry_plans:
                # compared by value: an index that was changed in place must not meet its old plan
                same_kind = (known.dtype, known.device) == (index.dtype, index.device)
                if same_kind and torch.equal(known, index):
                    return chosen
        chosen = within_memory(plans_of_entries(self.network, index)[0], list(self.stacks), index=index)
        self._entry_plans = [(index.detach().clone(), chosen), *self._entry_plans[:3]]
        return chosen

    def forward(self, features: Tensor | Sequence[Tensor] | Plan) -> Tensor:
        """Inner product of the tensor with rank-one tensors: ``f(X) = <x_0 ⊗ ... ⊗ x_{N-1}, W>``.

        One-hot features read entries, Gaussian ones are rank-one sensing, images in patches make it
        a convolutional network (Cohen, Sharir and Shashua 2016). Nothing is conjugated.

        Args:
            features: ``(B, N, D)`` if all modes have size D, or N tensors ``(B, D_n)``, in the dtype of the
                weights; under ``torch.autocast`` in any floating dtype. Or what ``entries`` takes, for
                wrappers such as ``DistributedDataParallel``, which have this method alone.

        Returns:
            Shape ``(B,)``, in the dtype of the weights and computed in it, under ``torch.autocast`` as well.

        Raises:
            ShapeError, DataError: Sizes that do not fit the modes, no samples, or another dtype.
            SizeError: Intermediates would not fit into the memory available.
        """
        if isinstance(features, Plan):
            return self._contract(features if features.kind == "dense" else self._plan_of(features))
        if not isinstance(features, Tensor | Sequence):
            features = as_tensor(features)
        if isinstance(features, Tensor) and features.dtype == torch.int64 and features.ndim == 2:
            return self._contract(self._plan_of(features))
        parts = check_features(features, self.sizes, self.dtype)
        inputs = parts[0] if isinstance(features, Tensor) else parts
        if torch.compiler.is_compiling():
            return contract_traced(self._steps(), list(self.stacks), inputs)
        return self._contract(plan_of_similar(self.network, len(parts[0])), inputs, len(parts[0]))

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _steps(self) -> str:
        return steps_of_batch(self.network)

    # Norms

    def log_norm(self) -> Tensor:
        """Natural logarithm of the tensor's Frobenius norm; ``-inf`` for zero. Never overflows."""
        square, log2 = self.scaled_inner(self)
        return (0.5 * (square.real.clamp_min(0).log() + log2 * math.log(2))).to(self.dtype.to_real())

    def norm(self) -> Tensor:
        """Frobenius norm of the tensor, without forming it; differentiable except at zero.

        Only a norm which itself leaves the range of the dtype overflows. Cost: linear in the number of nodes.
        """
        square, log2 = self.scaled_inner(self)
        return Scaled(square.real.clamp_min(0).sqrt(), log2 / 2).value().to(self.dtype.to_real())

    @blame("other")
    def inner(self, other: Factorization) -> Tensor:
        """Inner product ``Σ conj(self) * other`` over all entries, without forming either tensor.

        Both have the same tree and sizes; ranks and joins may differ. Complex if either is.

        Raises:
            ShapeError: Another tree or other sizes.
        """
        if not isinstance(other, Factorization):
            raise OptionError(
                f"inner products are with another Factorization, found {type(other).__name__}.\n"
                "  for a dense tensor: (model.to_tensor().conj() * tensor).sum()"
            )
        if self.tree != other.tree or self.sizes != other.sizes:
            raise ShapeError(
                "inner products need the same tree and sizes.\n"
                f"  found: {self.tree!r} {self.sizes}\n  and:   {other.tree!r} {other.sizes}"
            )
        return self.scaled_inner(other).value().to(torch.promote_types(self.dtype, other.dtype))

    def scaled_inner(self, other: Factorization) -> Scaled:
        """Return ``inner``, unchecked, with its scale; in float32 at least."""
        dtype = torch.promote_types(self.dtype, other.dtype)
        self._reshard()
        other._reshard()
        first, second = list(self.stacks), list(other.stacks)
        if not self.dtype == other.dtype == dtype or dtype.itemsize == 2:
            first, second = ([exact_scales(stack.to(dtype)) for stack in side] for side in (first, second))
        second = first if other is self else second
        with without_autocast(self.device):
            return inner_products((self.network, other.network), (first, second))

    # Local components

    def component_norms_at(self, node: Node) -> Tensor:
        """``(K_v, R_v)``: norms of the vectors of the local components of one diagonal join.

        The local component (v, r) holds column r of every child's weight and row r of the node's
        own (if it has one); K_v counts them, without bare leaves. Rows: the children in order, then the node.
        """
        i = self.tree.position(node)
        if self.network.joins[i] != "diagonal":
            raise OptionError(f"node {node!r} has no diagonal join, so no local components.", argument="node")
        below = [c for c in self.tree.links[i] if c in self.network.slots]
        matrices = [self._weight(c).flatten(0, -2) for c in below]
        if i in self.network.slots:
            own = self._weight(i)
            matrices.append(own.reshape(len(own), -1).mT)
        return torch.stack([column_norms(matrix) for matrix in matrices])

    def _weight(self, position: int) -> Tensor:
        stack, slot = self.network.slots[position]
        return self.stacks[stack][slot]

    def component_norms(self) -> dict[Node, Tensor]:
        """``{diagonal join: (K_v, R_v)}``: ``component_norms_at`` every node that has one."""
        joins = self.network.named_joins.items()
        return {node: self.component_norms_at(node) for node, join in joins if join == "diagonal"}

    def local_components(self) -> dict[Node, Tensor]:
        """``{diagonal join v: (R_v,)}``: norm of every local component, the product of its vectors' norms.

        ``σ(v, r) = ‖W_v[r, :]‖ ‖W_c1[:, r]‖ .. ‖W_ck[:, r]‖``, c_1, .., c_k the children of v; a root of ones
        has no first factor (Definition 5 of Razin, Maman and Cohen 2022). Few large ones at every node
        mean a tensor near low hierarchical rank.
        """
        return {node: product_of_rows(norms) for node, norms in self.component_norms().items()}

    def unbalancedness(self) -> Tensor:
        """Largest ``| ‖w‖² - ‖w'‖² |`` over vectors w, w' of one local component; 0 without any.

        Gradient flow from any weights conserves every such difference.
        """
        ends = [(norms.amax(0), norms.amin(0)) for norms in self.component_norms().values()]
        differences = [((high - low) * (high + low)).max() for high, low in ends]  # squares may overflow
        zero = torch.zeros((), dtype=self.dtype.to_real(), device=self.device)
        return torch.stack([zero, *differences]).max()

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and tree to a safetensors file, whole or not at all; read it with ``load``."""
        broken = [node for node, w in self.weights.items() if not w.isfinite().all()]
        if broken:
            raise DataError(
                f"not saved: the weights of {len(broken)} nodes are NaN or infinite, first {broken[0]!r}."
            )
        # complex numbers as pairs: not every reader of the format knows complex types
        tensors = {
            f"weight.{p}": torch.view_as_real(w.resolve_conj()) if w.is_complex() else w
            for p, w in zip(self.network.weighted, self.weights.values(), strict=True)
        }
        dtype = str(self.dtype).removeprefix("torch.")
        about = {"format": _FORMAT, **self.network.to_json(), "dtype": dtype}
        write_safetensors(path, tensors, "tnreg", about)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        sizes = self.sizes if len(self.sizes) <= 16 else f"({len(self.sizes)} modes)"
        root = ", root of ones" if self.network.root_ones else ""
        joins, weights = self._in_words()
        bare = len(self.network.bare)
        root += f", {bare} bare {'leaf' if bare == 1 else 'leaves'}" if bare else ""
        low, high = min(self.network.bonds[:-1]), max(self.network.bonds[:-1])
        bonds = f"{low}" if low == high else f"{low} to {high}"
        return f"{self.tree!r}, sizes={sizes},\n{joins} joins{root}, bonds {bonds}, {weights}"

    def _in_words(self) -> tuple[str, str]:
        """Which joins there are, and how many weights of which type."""
        joins = sorted(set(self.network.named_joins.values()))
        count = sum(math.prod(self.network.shape(p)) for p in self.network.weighted)
        return " and ".join(joins), f"{count} weights of {str(self.dtype).removeprefix('torch.')}"

    def _repr_svg_(self) -> str | None:
        """Return what a notebook shows: the tree with sizes and bonds; ``None`` beyond 60 nodes."""
        labels = {mode: f"{mode}: size {size}" for mode, size in enumerate(self.sizes)}
        joins, weights = self._in_words()
        title = f"sizes {self.sizes}, {joins} joins, {weights}"
        return tree_svg(self.tree, labels=labels, edges=self.network.named_bonds, title=title)

    def __repr__(self) -> str:
        return f"Factorization(\n  {self.extra_repr()}\n)".replace("),\n", "),\n  ")

    def __deepcopy__(self, memo: dict[int, Any]) -> Factorization:
        if isinstance(self.stacks, list):  # torch copies no tensors that have a history
            return Factorization.holding(self.network, [stack.detach().clone() for stack in self.stacks])
        for x in vars(self.stacks).values():  # nor those that pruning leaves until it is done again
            if isinstance(x, Tensor) and not x.is_leaf:
                memo[id(x)] = x.detach()
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for ours, theirs in zip(twin.parameters(), self.parameters(), strict=True):
            ours.grad = None if theirs.grad is None else theirs.grad.clone()
        return twin


def _bare_size(kinds: Network, mode: int, weights: Mapping[Node, Tensor]) -> int:
    """Return the size of a bare leaf: of the axis of its parent's weight, or of a sibling's bond."""
    parent = kinds.tree.parent(mode)
    siblings = kinds.tree.children(parent)
    axis = siblings.index(mode) if kinds.joins[kinds.tree.position(parent)] == "full" else 0
    if parent in weights:
        if weights[parent].ndim <= axis:
            raise ShapeError(f"the weight of node {parent!r} has no axis for the bare leaf {mode!r}.")
        return weights[parent].shape[axis]
    found = next((weights[v] for v in siblings if v in weights), None)
    if found is None:
        raise ShapeError(f"from_weights: there is no weight for node {parent!r}.")
    return found.shape[-1]


def load(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Factorization:
    """Read a factorization that ``save`` wrote. Nothing in the file is executed.

    Raises:
        FileError: No such file, truncated, of another kind (a pickle, say), or inconsistent.
    """

    def build(about: Any, tensors: dict[str, Tensor]) -> Factorization:
        if about["format"] != _FORMAT:
            raise FileError(f"format {about['format']!r} is not known; this version reads {_FORMAT!r}")
        network, dtype = Network.from_json(about), getattr(torch, about["dtype"])
        _check_stored(network, tensors, dtype)
        stacks = []
        for level in network.stacks:
            stack = torch.stack([tensors[f"weight.{p}"] for p in level.positions]).to(device)
            stacks.append(torch.view_as_complex(stack) if dtype.is_complex else stack)
        return Factorization.holding(network, stacks)

    return read_model(path, "tnreg", "factorization of Factorization.save", build)


def _check_stored(network: Network, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raise FileError unless a file's tensors are those of a network, all of them finite."""
    last = (2,) if dtype.is_complex else ()
    shapes = {f"weight.{p}": (*network.shape(p), *last) for p in network.weighted}
    if set(shapes) != set(tensors):
        raise FileError(f"weights {sorted(set(shapes) ^ set(tensors))[:4]} missing or not expected")
    for key, value in tensors.items():
        if tuple(value.shape) != shapes[key] or value.dtype != dtype.to_real():
            raise FileError(
                f"{key} has another shape or dtype: {tuple(value.shape)} {value.dtype}, "
                f"expected {shapes[key]} {dtype.to_real()}"
            )
        if not torch.isfinite(value).all():
            node = network.tree.nodes[int(key.removeprefix("weight."))]
            raise FileError(f"the weight of node {node!r} has NaN or infinite entries.")
