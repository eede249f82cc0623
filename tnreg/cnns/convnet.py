"""Networks of 1x1 convolutions and product pooling along a mode tree, as one ``nn.Module``.

Every leaf's weight is a 1x1 convolution at its position, every interior node multiplies the channels of its
children and convolves the result, the root is linear: a convolutional arithmetic circuit (Cohen, Sharir and
Shashua 2016, arXiv:1509.05009).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast, final

import networkx as nx
import torch
from torch import Tensor, nn

from tnreg.cnns.convnet_text import layer_lines
from tnreg.cnns.pooling import Group, LocalConv, groups_of, pooled, rescaled, taken_over
from tnreg.errors import DataError, OptionError, ShapeError, check_integer
from tnreg.factorizations.factorization import Factorization
from tnreg.networks.network import Network
from tnreg.trees.grid import Maps, grid_of, maps_of
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree

# Networks of more modes than this multiply on scales, unless told otherwise.
_UNSCALED_MODES = 8


@final
class ConvNet(nn.Module):
    """1x1 convolutions and product pooling along a mode tree: the convolutional network that the tree is.

    Layer h holds the nodes of height h. Layer 0 convolves the inputs; the others multiply the channels of
    siblings (product pooling; under a full join all pairs of channels) and convolve; nodes whose parent
    is higher wait. The root is linear. Without ``share`` every position has filters of its own (locally
    connected); with it every layer is one ``nn.Conv2d``.

    Args:
        tree: The mode tree, or what ``ModeTree`` takes.
        sizes: Channels of the input at every position (one integer if all are equal).
        ranks: Channels of every convolution: one integer, or ``{non-root node: integer}``.
        join: ``"diagonal"``, ``"full"``, or ``{interior node: either}``.
        root: ``"trained"``, or ``"ones"`` to sum the channels of a diagonal root.
        outputs: Number of outputs; ``None`` for one output without an axis.
        share: The same filters at all nodes of a layer.
        scaled: Multiply on scales that are powers of two, so that any number of positions neither
            overflows nor underflows; the value is the same. ``None``: from 9 positions on.
        shape: ``(height, width)`` of the images, where the tree does not know it (``ModeTree.grid`` does).
        std: Standard deviation of the normal initial weights.
        dtype: float32, float64, complex64 or complex128; torch's default if left out.
        device: Any torch device.
        generator: For reproducible weights.

    Attributes:
        network: Indices and sizes, without the numbers.
        outputs: Number of outputs, or ``None``.
        share: Whether filters are shared over the nodes of a layer.
        shape: ``(height, width)`` of the images, if the tree is a ``ModeTree.grid`` or it was given.
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
        drawn = Factorization(
            tree, sizes, ranks, join=join, root=root, std=std, dtype=dtype, device=device,
            generator=generator,
        )  # fmt: skip
        if outputs is not None:
            check_integer(outputs, 1, "outputs")
            if root == "ones":
                raise OptionError(
                    "several outputs need a root of their own: leave out root='ones'.",
                    argument="root",
                )
        weights = {node: w.detach() for node, w in drawn.weights.items()}
        if outputs is not None:
            last = weights[drawn.tree.root]
            whole = (*last.shape, outputs)
            place = generator.device if generator is not None else last.device
            more = torch.randn(whole, dtype=last.dtype, device=place, generator=generator)
            weights[drawn.tree.root] = (std * more).to(last.device)
        if share:
            first: dict[int, Tensor] = {}
            for i, node in enumerate(drawn.tree.nodes[: len(drawn.network.weighted)]):
                one = first.setdefault(drawn.tree.heights[i], weights[node])
                weights[node] = one if one.shape == weights[node].shape else weights[node]
        self._assemble(drawn.network, weights, outputs, share, scaled, shape)

    @classmethod
    def holding(
        cls,
        network: Network,
        weights: Mapping[Node, Tensor],
        *,
        outputs: int | None = None,
        share: bool = False,
        scaled: bool | None = None,
        shape: tuple[int, int] | None = None,
    ) -> ConvNet:
        """A network with copies of these weights, shaped as ``weights`` says.

        Raises:
            OptionError: ``share`` with weights that differ between nodes of a layer.
        """
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        net._assemble(network, weights, outputs, share, scaled, shape)
        return net

    def _assemble(
        self,
        network: Network,
        weights: Mapping[Node, Tensor],
        outputs: int | None,
        share: bool,
        scaled: bool | None,
        shape: tuple[int, int] | None,
    ) -> None:
        tree = network.tree
        self.network, self.outputs, self.share = network, outputs, share
        self.scaled = tree.order > _UNSCALED_MODES if scaled is None else bool(scaled)
        self._groups = groups_of(network)
        self._names = self._named()
        grid = grid_of(tree if shape is None else ModeTree(tree, shape=shape))
        self.shape = shape or tree.shape or (None if grid is None else grid.shape)
        if self.shape is not None and math.prod(self.shape) != tree.order:
            raise ShapeError(f"shape {self.shape} is not of {tree.order} positions.")
        self._windows = None if grid is None else grid.windows
        plain = len(set(network.sizes)) == 1 and len(self._groups) == tree.heights[-1] + 1
        self._maps = grid or maps_of(tree) if share and plain else None
        self._cut = sorted({g for group in self._groups for child in group.picks for g, _ in child})
        self._nodes_at: list[list[int]] = [[] for _ in range(tree.heights[-1] + 1)]
        for i, height in enumerate(tree.heights):
            self._nodes_at[height].append(i)
        self.convs = nn.ModuleDict()
        for g, group in enumerate(self._groups):
            if group.positions[0] not in network.slots:
                continue  # a root of ones sums
            held = [weights[tree.nodes[p]].detach() for p in group.positions]
            name = self._names[g]
            if group.positions[-1] == len(tree.nodes) - 1 and outputs is None:
                held = [held[0].unsqueeze(-1)]
            if not share:
                self.convs[name] = LocalConv(torch.stack(held))
            elif name in self.convs:
                _check_shared(self.convs[name], held, tree, group)
            else:
                self.convs[name] = _shared_conv(held, tree, group)
        self._leaves = {
            g: [int(tree.nodes[p]) for p in group.positions]  # type: ignore[call-overload]
            for g, group in enumerate(self._groups)
            if group.join == "leaf"
        }
        # on the device, so that putting inputs in order does not wait for the host at every call
        for g, modes in self._leaves.items():
            order = None if modes == list(tree.leaves) else torch.tensor(modes, device=self.device)
            self.register_buffer(f"_order{g}", order, persistent=False)

    def _named(self) -> list[str]:
        """Keys of the groups' convolutions in ``convs``: one a group, or one a layer if they are shared."""
        heights = [self.tree.heights[group.positions[0]] for group in self._groups]
        many, met = Counter(heights), Counter[int]()
        names = []
        for height in heights:
            alone = self.share or many[height] == 1
            names.append(f"layer{height}" if alone else f"layer{height}_{met[height]}")
            met[height] += 1
        return names

    # What it is

    @property
    def tree(self) -> ModeTree:
        """The mode tree over the positions."""
        return self.network.tree

    @property
    def sizes(self) -> tuple[int, ...]:
        """Channels of the input at every position."""
        return self.network.sizes

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def depth(self) -> int:
        """Number of layers; layer 0 convolves the inputs."""
        return len(self._nodes_at)

    def layer_of(self, node: Node) -> int:
        """Number of the layer that holds a node: its height in the tree."""
        return self.tree.heights[self.tree.position(node)]

    def nodes_of(self, layer: int) -> tuple[Node, ...]:
        """Nodes of a layer, in the order of ``tree.nodes``.

        Raises:
            OptionError: No such layer.
        """
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.depth:
            raise OptionError(f"layers are 0..{self.depth - 1}, found {layer!r}.")
        return tuple(self.tree.nodes[i] for i in self._nodes_at[layer])

    def layers(self) -> Iterator[tuple[str, str, tuple[Node, ...]]]:
        """Every convolution: its name in ``convs``, its join, and the nodes it stands at, leaves first."""
        for g, group in enumerate(self._groups):
            if group.positions[0] in self.network.slots:
                nodes = tuple(self.tree.nodes[p] for p in group.positions)
                yield self._names[g], group.join, nodes

    @property
    def weights(self) -> dict[Node, Tensor]:
        """``{node: filters}`` shaped as a factorization's weights, differentiable views of the parameters.

        The root has an axis of outputs more if there are several. With shared filters all nodes of a
        layer give the same ones.
        """
        return self._by_node(lambda conv: cast(Tensor, conv.weight))

    @property
    def gradients(self) -> dict[Node, Tensor]:
        """``{node: gradient}`` after ``loss.backward()``, shapes of ``weights``; zeros before it.

        With shared filters every node of a layer gives the gradient of the filters, the sum over nodes.
        """

        def gradient(conv: nn.Module) -> Tensor:
            weight = cast(Tensor, conv.weight)
            return torch.zeros_like(weight) if weight.grad is None else weight.grad

        return self._by_node(gradient)

    def _by_node(self, read: Any) -> dict[Node, Tensor]:
        found: dict[int, Tensor] = {}
        for g, group in enumerate(self._groups):
            if group.positions[0] not in self.network.slots:
                continue
            value = read(self.convs[self._names[g]])
            for k, p in enumerate(group.positions):
                shape = self.network.shape(p)
                if p == len(self.tree.nodes) - 1 and self.outputs is not None:
                    shape = (*shape, self.outputs)
                one = value.flatten(1).mT if self.share else value[k]
                found[p] = one.reshape(shape)
        return {self.tree.nodes[p]: found[p] for p in sorted(found)}

    def as_factorization(self) -> Factorization:
        """The factorization with these very weights: gradients of what it computes flow to the network.

        It has no parameters of its own. Several outputs are a further mode N, a leaf below the root.
        """
        network, weights = self.network, self.weights
        if self.outputs is not None:
            network = _with_classes(network, self.outputs)
            last, root = weights.pop(self.tree.root), network.tree.root
            if network.root_ones:
                weights[self.tree.order] = last.mT
            else:
                unit = torch.eye(self.outputs, dtype=last.dtype, device=last.device)
                weights[self.tree.order], weights[root] = unit, last
        by_position = [weights[network.tree.nodes[p]] for p in network.weighted]
        stacks = [torch.stack([by_position[p] for p in s.positions]) for s in network.stacks]
        return Factorization.viewing(network, stacks)

    # What it does

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Values of the network.

        Args:
            x: Channels first: ``(B, D, N)``, or ``(B, D, H, W)`` with ``H * W = N`` and position
                ``row * W + column``; with unequal sizes N tensors ``(B, D_n)``.

        Returns:
            ``(B,)``, or ``(B, outputs)``.

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
        """``(values, log)`` with ``forward(x) = values * 2^log``: also where that leaves the dtype's range.

        Returns:
            Values as ``forward``, and ``(B,)`` binary logarithms, constant to autograd, or ``None`` if the
            network does not multiply on scales.
        """
        logs: list[Tensor] = []
        if self._maps is not None:
            value = self._through_maps(self._as_maps(x, logs), self._maps, logs)
        else:
            value = self._through_blocks(self._as_blocks(x, logs), logs)
        # every scale of every node divides the whole once, as f is linear in each node's values
        total = sum(logs[1:], logs[0]) if self.scaled else None
        return (value if self.outputs is not None else value[:, 0]), total

    def _through_blocks(self, inputs: Mapping[int, Tensor], logs: list[Tensor]) -> Tensor:
        blocks: list[Tensor] = []
        rows: dict[int, Sequence[Tensor]] = {}
        for g, group in enumerate(self._groups):
            wide = None
            if group.join == "leaf":
                x = inputs[g]
            else:
                parts = group.children(blocks, rows)
                x, wide = pooled(parts, group.join, scaled=self.scaled)
            if wide is not None:
                logs.append(wide.sum((0, 2)))
            if self.scaled and group.even:
                x, log = rescaled(x)
                logs.append(log.sum((0, 2)))
            x = self._convolved(g, x, logs)
            blocks.append(x)
            if g in self._cut:
                rows[g] = x.unbind(0)
        return blocks[-1][0]

    def _convolved(self, g: int, x: Tensor, logs: list[Tensor]) -> Tensor:
        if self._groups[g].positions[0] not in self.network.slots:
            return x.sum(-1, keepdim=True)
        conv = self.convs[self._names[g]]
        if isinstance(conv, LocalConv):
            if not self.scaled:
                return cast(Tensor, conv(x))
            x, log = conv.scaled(x)
            logs.append(log)
            return x
        if self.scaled:
            x, log = taken_over(x, cast(Tensor, conv.weight))
            logs.append(len(x) * log)
        flat = x.flatten(0, 1)
        out = conv(flat.reshape(*flat.shape, 1, 1))
        return cast(Tensor, out.reshape(*x.shape[:2], -1))

    def _through_maps(self, x: Tensor, maps: Maps, logs: list[Tensor]) -> Tensor:
        """An ordinary 2-D network: ``(B, channels, height, width)`` all the way."""
        for layer, group in enumerate(self._groups):
            name, wide = f"layer{layer}", None
            if layer:
                rows, columns = maps.windows[layer - 1]
                b, c, height, width = x.shape
                cut = x.reshape(b, c, height // rows, rows, width // columns, columns)
                parts = [part for row in cut.unbind(-3) for part in row.unbind(-1)]
                x, wide = pooled(parts, group.join, dim=-3, scaled=self.scaled)
            if wide is not None:
                logs.append(wide.sum((1, 2, 3)))
            if self.scaled and group.even:
                x, log = rescaled(x, -3)
                logs.append(log.sum((1, 2, 3)))
            if name not in self.convs:
                return x.sum(1)[:, 0]
            conv = self.convs[name]
            if self.scaled:
                x, log = taken_over(x, cast(Tensor, conv.weight))
                logs.append(x.shape[2] * x.shape[3] * log)
            x = conv(x)
        return x.flatten(1)

    def _as_maps(self, x: Tensor | Sequence[Tensor], logs: list[Tensor]) -> Tensor:
        assert self._maps is not None
        if not isinstance(x, Tensor):
            x = torch.stack(self._parts(x), 2)
        self._check(x)
        if self.scaled:
            x, log = rescaled(x, 1)
            logs.append(log.flatten(1).sum(1))
        if self._maps.order is not None:
            x = x.flatten(2).index_select(2, cast(Tensor, self._order0))
        return x.reshape(*x.shape[:2], *self._maps.shape)

    def _as_blocks(self, x: Tensor | Sequence[Tensor], logs: list[Tensor]) -> dict[int, Tensor]:
        """For every group of leaves its inputs ``(positions, B, channels)``."""
        if isinstance(x, Tensor):
            self._check(x)
            x = x.flatten(2)
            if self.scaled:
                x, log = rescaled(x, 1)
                logs.append(log.sum((1, 2)))
            whole = x.permute(2, 0, 1)
            orders = {g: getattr(self, f"_order{g}") for g in self._leaves}
            return {g: whole.contiguous() if o is None else whole[o] for g, o in orders.items()}
        parts = self._parts(x)
        out = {}
        for g, modes in self._leaves.items():
            block = torch.stack([parts[mode] for mode in modes])
            if self.scaled:
                block, log = rescaled(block)
                logs.append(log.sum((0, 2)))
            out[g] = block
        return out

    def _parts(self, x: Any) -> list[Tensor]:
        """N tensors ``(B, D_n)``."""
        if not isinstance(x, Sequence):
            raise self._misfit(type(x).__name__)
        parts = [torch.as_tensor(part) for part in x]
        fits = len(parts) == self.tree.order and all(
            part.ndim == 2 and part.shape == (parts[0].shape[0], size)
            for part, size in zip(parts, self.sizes, strict=True)
        )
        if not fits:
            raise self._misfit([tuple(part.shape) for part in parts])
        for part in parts:
            self._check_numbers(part)
        return parts

    def _check(self, x: Tensor) -> None:
        fits = x.ndim in (3, 4) and all(x.shape[1] == size for size in self.sizes)
        fits = fits and math.prod(x.shape[2:]) == self.tree.order
        if fits and x.ndim == 4 and self.shape is not None:
            fits = tuple(x.shape[2:]) == self.shape
        if not fits:
            raise self._misfit(tuple(x.shape))
        self._check_numbers(x)

    def _check_numbers(self, x: Tensor) -> None:
        if x.shape[0] == 0:
            raise DataError("an empty batch: give at least one sample.")
        if x.dtype != self.dtype:
            raise DataError(
                f"inputs have dtype {x.dtype}, the weights {self.dtype}; write x.to(net.dtype)."
            )

    def _misfit(self, found: Any) -> ShapeError:
        n, sizes = self.tree.order, self.sizes
        shown = str(sizes) if n <= 16 else f"({', '.join(map(str, sizes[:8]))}, ...)"
        wanted = f"{n} tensors (B, D_n) with D = {shown}"
        if isinstance(found, list) and len(found) > 16:
            found = f"{len(found)} tensors, {found[0]} first"
        if len(set(sizes)) == 1:
            image = f" or (B, {sizes[0]}, {self.shape[0]}, {self.shape[1]})" if self.shape else ""
            wanted = f"(B, {sizes[0]}, {n}){image} or {wanted}"
        return ShapeError(
            f"inputs do not fit the positions.\n  found:    {found}\n  expected: {wanted}"
        )

    # How it reads

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        kind = "shared filters" if self.share else "locally connected"
        head = f"ConvNet of {count} weights, {kind}, {'scaled ' if self.scaled else ''}products ("
        lines = layer_lines(
            self.network,
            self._groups,
            outputs=self.outputs,
            share=self.share,
            windows=self._windows,
        )
        return "\n".join([head, *lines, ")"])


def _with_classes(network: Network, outputs: int) -> Network:
    """The network with a leaf of classes below the root; a diagonal root is of ones then."""
    tree = network.tree
    graph: nx.DiGraph[Any] = nx.DiGraph(tree.graph)
    graph.add_edge(tree.root, tree.order)
    wider = ModeTree(graph)
    diagonal = network.joins[-1] == "diagonal"
    bonds = network.named_bonds
    bonds[tree.order] = bonds[tree.children(tree.root)[0]] if diagonal else outputs
    root = "ones" if diagonal else "trained"
    return Network.build(
        wider, (*network.sizes, outputs), bonds, join=network.named_joins, root=root
    )


def _shared_conv(held: Sequence[Tensor], tree: ModeTree, group: Group) -> nn.Conv2d:
    weight = held[0].flatten(0, -2)
    given, made = weight.shape
    conv = nn.Conv2d(given, made, 1, bias=False, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        conv.weight.copy_(weight.mT[:, :, None, None])
    _check_shared(conv, held, tree, group)
    return conv


def _check_shared(conv: nn.Module, held: Sequence[Tensor], tree: ModeTree, group: Group) -> None:
    shared = cast(Tensor, conv.weight).detach()[:, :, 0, 0].mT
    for position, weight in zip(group.positions, held, strict=True):
        flat = weight.flatten(0, -2)
        if flat.shape == shared.shape and torch.equal(flat, shared):
            continue
        how = "channels" if flat.shape != shared.shape else "weights"
        raise OptionError(
            f"share=True: the nodes of height {tree.heights[position]} differ in their {how}, "
            f"first {tree.nodes[position]!r}.\n"
            "  share needs equal sizes, ranks and joins at all nodes of a height, and to_cnn equal "
            "weights; or leave it out",
            argument="share",
        )
