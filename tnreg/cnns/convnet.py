"""Networks of 1x1 convolutions and product pooling along a mode tree: what factorizations are.

``f(X) = <x_0 ⊗ ... ⊗ x_{N-1}, W>``, computed from the leaves to the root, is a convolutional arithmetic
circuit (Cohen, Sharir and Shashua 2016, arXiv:1509.05009; Razin, Maman and Cohen 2022,
arXiv:2201.11729). The bond above a node is the channels of its convolution; the local component (v, r) is
pooled channel r at v: filter r of every child, and what v reads from it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast, final

import networkx as nx
import torch
from torch import Tensor, nn

from tnreg.cnns.pooling import FACTORS, LocalConv, pool, scaled_product, which_rescale
from tnreg.errors import OptionError, check_integer, check_number
from tnreg.factorizations.assembly import weights_of
from tnreg.factorizations.factorization import Factorization
from tnreg.factorizations.module import NetworkModule
from tnreg.factorizations.stacks import NodeDict, gather, source_of
from tnreg.machine.memory import must_fit
from tnreg.networks.network import Level, Network, Stacked
from tnreg.tensors.arrays import Scaled, check_features, draw_normal, power_below, rescale, without_autocast
from tnreg.trees.grid import grid_of, maps_of
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

_UNSCALED_MODES = 8  # networks of more multiply on scales, unless told otherwise
_LINES = 60  # longer descriptions of a network are cut in the middle


@final
class ConvNet(NetworkModule):
    """1x1 convolutions and product pooling along a mode tree: the convolutional network that the tree is.

    Layer h holds the nodes of height h. Layer 0 convolves the inputs; the others multiply the channels of
    siblings (product pooling; under a full join all pairs of channels) and convolve; nodes whose parent
    is higher wait. Inputs at bare leaves are pooled as they are. The root is linear. Without ``share`` every
    position has filters of its own (locally connected); with it every layer is one ``nn.Conv2d``.

    Args:
        tree: The mode tree, or what ``ModeTree`` takes.
        sizes: Channels of the input at every position (one integer if all are equal).
        ranks: Channels of every convolution: one integer, or ``{non-root node: integer}``.
        join: ``"diagonal"``, ``"full"``, or ``{interior node: either}``.
        root: ``"trained"``, or ``"ones"`` to sum the channels of a diagonal root.
        leaves: ``"weights"``, ``"bare"`` for no convolution of the inputs, or ``{mode: either}``.
        outputs: Number of outputs; ``None`` for one output without an axis.
        share: The same filters at all nodes of a layer.
        scaled: Multiply on scales that are powers of two, so that any number of positions neither
            overflows nor underflows; the value is the same. ``None``: from 9 positions on.
        shape: ``(height, width)`` of the images, where the tree does not know it (``ModeTree.grid`` does).
        std: Standard deviation of the normal initial weights.
        dtype: float16, bfloat16, float32, float64, complex64 or complex128; torch's default if left out.
        device: Any torch device.
        generator: For reproducible weights.

    Attributes:
        network: Indices and sizes, without the numbers; ``tree`` and ``sizes`` are the network's.
        depth: Number of layers; layer 0 convolves the inputs.
        shape: ``(height, width)`` of the images, if the tree knows it or it was given.
        scaled: Whether products are multiplied on scales.

    Raises:
        TreeError, ShapeError, OptionError: Arguments that do not fit the tree, or filters that cannot
            be shared as nodes of a layer differ in their channels.

    Example:
        >>> net = ConvNet(ModeTree.grid((4, 4)), 3, 8, share=True)
        >>> net(torch.randn(5, 3, 4, 4)).shape, net.nodes_of(2)[-1] == net.tree.root
        (torch.Size([5]), True)
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
        outputs: int | None = None,
        share: bool = False,
        scaled: bool | None = None,
        shape: tuple[int, int] | None = None,
        std: float = 1e-2,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        model = Factorization(
            tree, sizes, ranks, join=join, root=root, leaves=leaves, std=std, dtype=dtype, device=device,
            generator=generator,
        )  # fmt: skip
        weights = weights_of(model)
        if outputs is not None:
            check_integer(outputs, 1, "outputs")
            if root == "ones":
                message = "several outputs need a root of their own: leave out root='ones'."
                raise OptionError(message, argument="outputs")
            last = weights[model.tree.root]
            noise = draw_normal((*last.shape, outputs), last.dtype, last.device, generator)
            weights[model.tree.root] = check_number(std, "std", 0) * noise
        if share:
            first: dict[int, Tensor] = {}
            for node, weight in weights.items():
                filters = first.setdefault(model.tree.heights[model.tree.position(node)], weight)
                if filters.shape == weight.shape:  # else an error below
                    weights[node] = filters
        self._assemble(model.network, weights, outputs, share, scaled, shape)

    @classmethod
    def holding(cls, network: Network, weights: Mapping[Node, Tensor], **settings: Any) -> ConvNet:
        """Return a network with copies of these weights, shaped as ``weights`` says.

        Settings are ``outputs``, ``share``, ``scaled`` and ``shape``, as for the class.

        Raises:
            OptionError: ``share`` with weights that differ between nodes of a layer.
        """
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        net._assemble(network, weights, **settings)
        return net

    def _assemble(
        self,
        network: Network,
        weights: Mapping[Node, Tensor],
        outputs: int | None = None,
        share: bool = False,
        scaled: bool | None = None,
        shape: tuple[int, int] | None = None,
    ) -> None:
        tree = network.tree if shape is None else ModeTree(network.tree, shape=shape)
        grid = grid_of(tree)
        self.network, self.outputs, self.share = network, outputs, share
        self.tree, self.sizes, self.depth = network.tree, network.sizes, tree.heights[-1] + 1
        self.scaled = tree.order > _UNSCALED_MODES if scaled is None else bool(scaled)
        self.shape = tree.shape or (None if grid is None else grid.shape)
        self._windows = None if grid is None else grid.windows
        self._levels, self._rescales = network.levels, which_rescale(network)
        self._names = self._name_levels()
        one_level_a_layer = len(self._levels) == self.depth and len(set(network.sizes)) == 1
        self._maps = grid or maps_of(tree) if share and one_level_a_layer else None
        self.convs = self._convolutions(weights)
        self._place_orders()

    def _place_orders(self) -> None:
        """Put the orders of the levels' inputs on the device, so that no call waits for the host.

        They are no buffers: those are averaged by ``AveragedModel``, and emptied by ``to_empty``.
        """
        every = list(self.tree.leaves)
        modes = [every if level.children else self._modes(level) for level in self._levels]
        with torch.inference_mode(False):  # else nothing could be trained with them
            self._orders = [None if m == every else torch.tensor(m, device=self.device) for m in modes]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._place_orders()
        return self

    def _order(self, g: int, x: Tensor) -> Tensor | None:
        """Return the order of a level's inputs where they are."""
        order = self._orders[g]
        if order is not None and order.device != x.device:  # weights were assigned from elsewhere
            self._place_orders()
            order = self._orders[g]
        return order

    def _name_levels(self) -> list[str]:
        """Return the levels' keys in ``convs``: one a level, or one a layer if filters are shared."""
        heights = [self.tree.heights[level.positions[0]] for level in self._levels]
        alone = {height for height, count in Counter(heights).items() if self.share or count == 1}
        return [
            f"layer{height}" if height in alone else f"layer{height}_{g - heights.index(height)}"
            for g, height in enumerate(heights)
        ]

    def _modes(self, level: Level) -> list[int]:
        """Return the modes of a level of leaves."""
        return [int(self.tree.nodes[p]) for p in level.positions]  # type: ignore[call-overload]

    def _convolutions(self, weights: Mapping[Node, Tensor]) -> nn.ModuleDict:
        convs, nodes_at = nn.ModuleDict(), dict[str, list[Node]]()
        for name, _, nodes in self.layers():
            nodes_at.setdefault(name, []).extend(nodes)
        for name, members in nodes_at.items():
            filters = [weights[node].detach() for node in members]
            shapes = [w.shape for w in filters]
            must_fit("a network: its filters", shapes, filters[0].dtype, filters[0].device)
            if members[-1] == self.tree.root and self.outputs is None:
                filters[-1] = filters[-1].unsqueeze(-1)
            shared = self.share and _shared_conv(filters, members, self.layer_of(members[0]))
            convs[name] = shared or LocalConv(torch.stack(filters))
        return convs

    def layer_of(self, node: Node) -> int:
        """Return the number of the layer that holds a node: its height in the tree."""
        return self.tree.heights[self.tree.position(node)]

    def nodes_of(self, layer: int) -> tuple[Node, ...]:
        """Return the nodes of a layer, in the order of ``tree.nodes``.

        Raises:
            OptionError: No such layer.
        """
        if type(layer) is not int or layer not in range(self.depth):
            raise OptionError(f"layers are 0..{self.depth - 1}, found {layer!r}.", argument="layer")
        heights = zip(self.tree.nodes, self.tree.heights, strict=True)
        return tuple(node for node, height in heights if height == layer)

    def layers(self) -> Iterator[tuple[str, str, tuple[Node, ...]]]:
        """Yield every convolution, leaves first: its name in ``convs``, its join, and its nodes."""
        for name, level in zip(self._names, self._levels, strict=True):
            if level.weight is not None:
                yield name, level.join, tuple(self.tree.nodes[p] for p in level.positions)

    @property
    def weights(self) -> dict[Node, Tensor]:
        """``{node: filters}`` shaped as a factorization's weights, differentiable views of the parameters.

        The root has an axis of outputs more if there are several. With shared filters all nodes of a
        layer give the same ones.
        """
        return self._by_node(lambda conv: gather(cast(Tensor, conv.weight)))

    @property
    def gradients(self) -> dict[Node, Tensor]:
        """``{node: gradient}`` after ``loss.backward()``, shapes of ``weights``; zeros before it.

        With shared filters every node of a layer gives the gradient of the filters, the sum over nodes. Of
        parametrized filters as ``Factorization.gradients`` says.
        """

        def gradient(conv: nn.Module) -> Tensor:
            source = source_of(conv, "weight", "a convolution's weight")
            return gather(torch.zeros_like(source) if source.grad is None else source.grad)

        return self._by_node(gradient)

    def _by_node(self, read: Callable[[nn.Module], Tensor]) -> dict[Node, Tensor]:
        self._reshard()
        filters: dict[Node, Tensor] = {}
        for name, _, nodes in self.layers():
            values = read(self.convs[name])
            for k, node in enumerate(nodes):
                shape = self.network.shape(self.tree.position(node))
                if node == self.tree.root and self.outputs is not None:
                    shape = (*shape, self.outputs)
                filters[node] = (values.flatten(1).mT if self.share else values[k]).reshape(shape)
        return NodeDict((node, filters[node]) for node in self.tree.nodes if node in filters)

    def as_factorization(self) -> Factorization:
        """Return the factorization with these very weights: its gradients flow to the network.

        It has no parameters of its own. Several outputs are a further mode N, a leaf below the root.
        """
        network, weights = self.network, dict(self.weights)
        if self.outputs is not None:
            network = _with_classes(network, self.outputs)
            last, root = weights.pop(self.tree.root), network.tree.root
            if network.root_ones:
                weights[self.tree.order] = last.mT
            else:
                unit = torch.eye(self.outputs, dtype=last.dtype, device=last.device)
                weights[self.tree.order], weights[root] = unit, last
        nodes = network.tree.nodes
        stacks = [torch.stack([weights[nodes[p]] for p in s.positions]) for s in network.stacks]
        return Factorization.viewing(network, stacks)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the values of the network, ``(B,)`` or ``(B, outputs)``.

        Args:
            x: Channels first: ``(B, D, N)``, or ``(B, D, H, W)`` with ``H * W = N`` and position
                ``row * W + column``; with unequal sizes N tensors ``(B, D_n)``. In the dtype of the
                weights, which values are computed in and have; under ``torch.autocast`` in any floating one.

        Raises:
            ShapeError: Sizes that do not fit the positions.
            DataError: No samples, or another dtype than the weights.
        """
        value, log = self.scaled_values(x)
        if log is None:
            return value
        log = log if self.outputs is None else log.unsqueeze(-1)
        # 2^log alone may leave the range where the product does not; half of it never does
        reach = 2 * (math.log2(torch.finfo(log.dtype).max) - 2)
        log = log.clamp(-reach, reach)
        half = (log / 2).floor()
        return value * torch.exp2(half) * torch.exp2(log - half)

    def scaled_values(self, x: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return ``(values, log)``, ``forward(x) = values * 2^log``, also beyond the dtype's range.

        Values are shaped as those of ``forward``; the binary logarithms ``(B,)``, constant to autograd, are
        ``None`` if the network does not multiply on scales.
        """
        if hasattr(self._first, "full_tensor"):
            raise OptionError(
                "the filters are sharded over processes outside net(x).\n"
                "  torch.distributed.fsdp.register_fsdp_forward_method(net, 'scaled_values')"
            )
        logs: list[Tensor] = []
        through = self._through_blocks if self._maps is None else self._through_maps
        inputs = self._check(x)
        with without_autocast(self.device):
            values = through(inputs, logs)
        # every scale of every node divides the whole once, as f is linear in each node's values
        total = sum(logs[1:], logs[0]) if self.scaled else None
        return (values if self.outputs is not None else values[:, 0]), total

    def _check(self, x: Any) -> Tensor | list[Tensor]:
        """Return the inputs as ``(B, D, N)``, or for unequal sizes as N tensors ``(B, D_n)``."""
        order, size = self.tree.order, self.sizes[0]
        layouts: list[tuple[int, ...]] = [(size, order)]
        if self.shape is not None:
            layouts.append((size, *self.shape))
        elif isinstance(x, Tensor) and x.ndim == 4 and math.prod(x.shape[2:]) == order:
            layouts.append((size, *x.shape[2:]))
        parts = check_features(x, self.sizes, self.dtype, layouts=layouts, name="x", owner="net")
        if isinstance(x, Tensor):
            return parts[0].flatten(2)
        return torch.stack(parts, 2) if len(set(self.sizes)) == 1 else parts

    def _through_blocks(self, x: Tensor | list[Tensor], logs: list[Tensor]) -> Tensor:
        """Return ``(B, outputs)``; values are ``(positions, B, channels)`` on the way."""
        values = Stacked()
        for g, level in enumerate(self._levels):
            if level.children:
                parts = values.children(level)
            else:
                if not isinstance(x, Tensor):
                    block = torch.stack([x[mode] for mode in self._modes(level)])
                else:
                    order = self._order(g, x)
                    block = x.permute(2, 0, 1)[slice(None) if order is None else order].contiguous()
                parts = [self._rescale(block, 2, logs)]
            values.append(parts[0] if level.join == "bare" else self._convolve(g, parts, 2, logs))
        return values.tensors[-1][0]

    def _through_maps(self, x: Tensor | list[Tensor], logs: list[Tensor]) -> Tensor:
        """Return ``(B, outputs)`` of an ordinary 2-D network, ``(B, channels, H, W)`` all the way."""
        assert self._maps is not None
        x = self._rescale(cast(Tensor, x), 1, logs)
        if self._maps.order is not None:
            x = x.index_select(2, cast(Tensor, self._order(0, x)))
        x = x.reshape(*x.shape[:2], *self._maps.shape)
        x = x if self._levels[0].join == "bare" else self._convolve(0, [x], 1, logs)
        for g, (rows, columns) in enumerate(self._maps.windows, 1):
            b, c, height, width = x.shape
            cut = x.reshape(b, c, height // rows, rows, width // columns, columns)
            parts = [part for row in cut.unbind(-3) for part in row.unbind(-1)]
            x = self._convolve(g, parts, 1, logs)
        return x.flatten(1)

    def _convolve(self, g: int, parts: Sequence[Tensor], dim: int, logs: list[Tensor]) -> Tensor:
        """Pool the children of level g's nodes (or leaves' inputs) and convolve; scales join ``logs``.

        ``dim`` is the axis of the channels; the one before it is the batch's.
        """
        level = self._levels[g]
        if self.scaled and level.join == "diagonal" and len(parts) > FACTORS:
            x = _keep_scale(scaled_product(parts, dim), dim, logs)
        else:
            x = pool(parts, level.join, dim)
        if self._rescales[g]:
            x = self._rescale(x, dim, logs)
        if level.weight is None:  # a root of ones
            return x.sum(dim, keepdim=True)
        conv = self.convs[self._names[g]]
        if self.scaled and isinstance(conv, LocalConv):
            scaled: Scaled = conv(x, True)
            logs.append(scaled.log2)
            return scaled.x
        if self.scaled:
            # what filters of any size make of x is then as moderate as x was
            sizes = cast(Tensor, conv.weight).detach().abs()
            log = power_below(sizes.flatten().amax(0))  # ONNX has no amax without an axis
            x = x * torch.exp2(-log)
            logs.append(len(level.positions) * log)
        if isinstance(conv, LocalConv) or x.ndim == 4:
            return cast(Tensor, conv(x))
        return cast(Tensor, conv(x.flatten(0, 1)[..., None, None])).reshape(*x.shape[:2], -1)

    def _rescale(self, x: Tensor, dim: int, logs: list[Tensor]) -> Tensor:
        return _keep_scale(rescale(x, dim), dim, logs) if self.scaled else x

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        kind = "shared filters" if self.share else "locally connected"
        head = f"ConvNet of {count} weights, {kind}, {'scaled ' if self.scaled else ''}products ("
        heights, links, lines = self.tree.heights, self.tree.links, [head]
        for layer in range(self.depth):
            levels = [level for level in self._levels if heights[level.positions[0]] == layer]
            texts = [text for level in levels for text in self._describe(level, layer)]
            waiting = sum(heights[c] < layer < heights[i] for i, below in enumerate(links) for c in below)
            texts += [f"{'identity':25s} {_nodes(waiting)} waiting"] * (waiting > 0)
            lines += [f"  layer {layer}  {text}" for text in texts]
        if len(lines) > _LINES:
            lines[_LINES - 8 : -7] = [f"  ... {len(lines) - _LINES + 1} more lines ..."]
        return "\n".join([*lines, ")"])

    def _describe(self, level: Level, layer: int) -> list[str]:
        """Return a line for the pooling of a level, and one for its convolution."""
        first, where, lines = level.positions[0], _nodes(len(level.positions)), list[str]()
        if level.join == "bare":
            return [f"{'identity':25s} {where}, {level.shape[0]} channels"]
        channels = math.prod(self.network.index_size(i) for i in self.network.inner(first))
        if level.children:
            over = f"over {len(level.children)}"
            if self._windows is not None:
                over = "x".join(map(str, self._windows[layer - 1]))
            pairs = "" if level.join == "diagonal" else ", all pairs,"
            lines.append(f"{f'product pooling{pairs} {over}':25s} {where}, {channels} channels")
        if level.weight is None:
            return [*lines, f"{'sum':25s} {where}, {channels} -> 1"]
        names = ", ".join(str(self.tree.nodes[p]) for p in level.positions[:4])
        names = f"   at {names}" if len(level.positions) <= 4 and len(names) <= 40 else ""
        kind, above = "1x1 convolution" + (", shared" if self.share else ""), level.shape[-1]
        if first == len(self.tree.nodes) - 1:
            kind, above = "linear", self.outputs or 1
        return [*lines, f"{kind:25s} {where}, {channels} -> {above}{names}"]


def _keep_scale(scaled: Scaled, dim: int, logs: list[Tensor]) -> Tensor:
    """Return the numbers; add their logarithms to ``logs``, summed for every sample (axis ``dim - 1``)."""
    log2 = scaled.log2
    logs.append(log2.sum([axis for axis in range(log2.ndim) if axis != dim - 1]))
    return scaled.x


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _shared_conv(filters: Sequence[Tensor], nodes: Sequence[Node], layer: int) -> nn.Conv2d:
    """Return one convolution for all these nodes, or refuse filters that are not equal."""
    flat = [weight.flatten(0, -2) for weight in filters]
    first = flat[0]
    for node, weight in zip(nodes, flat, strict=True):
        if weight.shape != first.shape or not (first.is_meta or torch.equal(weight, first)):
            how = "channels" if weight.shape != first.shape else "weights"
            raise OptionError(
                f"share=True: the nodes of height {layer} differ in their {how}, first {node!r}.\n"
                "  share needs equal sizes, ranks and joins at all nodes of a height, and to_cnn equal "
                "weights; or leave it out",
                argument="share",
            )
    below, above = first.shape
    conv = nn.Conv2d(below, above, 1, bias=False, dtype=first.dtype, device=first.device)
    with torch.no_grad():
        conv.weight.copy_(first.mT[:, :, None, None])
    return conv


def to_cnn(
    model: Factorization,
    *,
    share: bool = False,
    classes: bool = False,
    scaled: bool | None = None,
    shape: tuple[int, int] | None = None,
) -> ConvNet:
    """Return the network of a factorization, with copies of its weights.

    ``to_cnn(model)(x) == model(features)``, where x has the channels first, as ``ConvNet.forward`` says.

    Args:
        model: Any tree, joins and root.
        share: One ``nn.Conv2d`` per layer; the model must have equal weights at all nodes of a height.
        classes: The last mode, a leaf below the root, is not an input: its indices are the outputs. Interior
            nodes keep their names, the root too.
        scaled: See ``ConvNet``.
        shape: ``(height, width)`` of the images, where the tree does not know it.

    Raises:
        OptionError: ``share`` with weights that differ, or ``classes`` without such a leaf.

    Example:
        >>> model = Factorization(ModeTree.binary(4), 3, 5, std=1.0)
        >>> x = torch.randn(7, 3, 4)
        >>> torch.allclose(to_cnn(model)(x), model(x.mT), rtol=1e-4)
        True
    """
    if not isinstance(model, Factorization):
        message = f"to_cnn takes a Factorization, found {type(model).__name__}."
        raise OptionError(message, argument="model")
    network, outputs = model.network, None
    weights = weights_of(model, ones=not classes, bare=not classes)
    if classes:
        network, weights = _without_classes(network, weights)
        outputs = model.sizes[-1]
    settings = {"outputs": outputs, "share": share, "scaled": scaled, "shape": shape}
    return ConvNet.holding(network, weights, **settings)


def from_cnn(net: ConvNet) -> Factorization:
    """Return the factorization of a network of ``to_cnn`` or ``ConvNet``, with copies of its weights.

    Several outputs become a further mode N, a leaf below the root. Shared filters become equal weights.

    Raises:
        OptionError: Another kind of network.
    """
    if not isinstance(net, ConvNet):
        raise OptionError(
            f"from_cnn takes a ConvNet, as to_cnn makes them, found {type(net).__name__}.\n"
            "  of any network: tnreg.grid_tensor(net, templates, tree) is its tensor on few patches",
            argument="net",
        )
    with torch.no_grad():
        view = net.as_factorization()
        return Factorization.holding(view.network, [s.detach().clone() for s in view.stacks])


def _with_classes(network: Network, outputs: int) -> Network:
    """Return the network with a leaf of classes below the root; a diagonal root is of ones then."""
    tree = network.tree
    graph: nx.DiGraph[Any] = nx.DiGraph(tree.graph)
    graph.add_edge(tree.root, tree.order)
    bonds, sizes, root = network.named_bonds, (*network.sizes, outputs), "trained"
    bonds[tree.order] = outputs
    if network.joins[-1] == "diagonal":
        bonds[tree.order], root = bonds[tree.children(tree.root)[0]], "ones"
    leaves = network.named_leaves
    return Network.build(ModeTree(graph), sizes, bonds, join=network.named_joins, root=root, leaves=leaves)


def _without_classes(network: Network, weights: dict[Node, Tensor]) -> tuple[Network, dict[Node, Tensor]]:
    """Return the network without the leaf of the last mode; its weight goes into the root's."""
    tree, last = network.tree, network.tree.order - 1
    if tree.order < 2 or tree.parent(last) != tree.root or len(tree.children(tree.root)) < 2:
        raise OptionError(
            f"classes=True: the last mode, {last}, must be a leaf below the root beside other children.\n"
            f"  found: {tree!r}",
            argument="classes",
        )
    leaf = weights.pop(last)
    leaves = {mode: kind for mode, kind in network.named_leaves.items() if mode != last}
    for mode, kind in leaves.items():
        if kind == "bare":
            del weights[mode]
    if network.joins[-1] == "diagonal":
        weights[tree.root] = weights[tree.root].unsqueeze(-1) * leaf.mT
    else:
        axis = tree.children(tree.root).index(last)
        weights[tree.root] = torch.tensordot(weights[tree.root], leaf, ([axis], [1]))
    graph: nx.DiGraph[Any] = nx.DiGraph(tree.graph)
    graph.remove_node(last)
    bonds = {node: bond for node, bond in network.named_bonds.items() if node != last}
    smaller = Network.build(
        ModeTree(graph), network.sizes[:-1], bonds, join=network.named_joins, leaves=leaves
    )
    return smaller, weights
