"""The convolutional network that a factorization is, and the way back.

``f(X) = <x_0 ⊗ ... ⊗ x_{N-1}, W>`` computed from the leaves to the root is a network of 1x1 convolutions
and product pooling, a convolutional arithmetic circuit (Cohen, Sharir and Shashua 2016,
arXiv:1509.05009; Razin, Maman and Cohen 2022, arXiv:2201.11729): every leaf's weight is a 1x1
convolution at its position, every interior node multiplies the channels of its children and convolves
the result, the root is linear. A star is a shallow network, a binary tree a deep one.

| tree | network |
|---|---|
| nodes of one height | one layer |
| bond above a node | channels of its convolution |
| local component (v, r) | pooled channel r at v: filter r of every child, and what v reads from it |
"""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch
from torch import Tensor

from tnreg.cnns.convnet import ConvNet
from tnreg.errors import OptionError
from tnreg.factorizations.factorization import Factorization
from tnreg.networks.network import Network
from tnreg.trees.reading import Node
from tnreg.trees.tree import ModeTree


def to_cnn(
    model: Factorization,
    *,
    share: bool = False,
    classes: bool = False,
    scaled: bool | None = None,
    shape: tuple[int, int] | None = None,
) -> ConvNet:
    """The convolutional network that a factorization is: ``to_cnn(model)(x) == model(features)``.

    Args:
        model: Any tree, joins and root.
        share: One ``nn.Conv2d`` per layer; the model must have equal weights at all nodes of a height.
        classes: The last mode, a leaf below the root, is not an input: its indices are the outputs. Interior
            nodes keep their names, the root too.
        scaled: See ``ConvNet``.
        shape: ``(height, width)`` of the images, where the tree does not know it.

    Returns:
        A ``ConvNet`` with copies of the weights. It takes channels first: ``(B, D, N)`` or
        ``(B, D, H, W)``, or N tensors ``(B, D_n)``.

    Raises:
        OptionError: ``share`` with weights that differ, or ``classes`` without such a leaf.

    Example:
        >>> model = Factorization(ModeTree.binary(4), 3, 5, std=1.0)
        >>> x = torch.randn(7, 3, 4)
        >>> torch.allclose(to_cnn(model)(x), model(x.mT), rtol=1e-4)
        True
    """
    if not isinstance(model, Factorization):
        raise OptionError(f"to_cnn takes a Factorization, found {type(model).__name__}.")
    network = model.network
    weights = {node: w.detach() for node, w in model.weights.items()}
    outputs = None
    if classes:
        network, weights, outputs = _without_classes(network, weights)
    return ConvNet.holding(
        network, weights, outputs=outputs, share=share, scaled=scaled, shape=shape
    )


def from_cnn(net: ConvNet) -> Factorization:
    """The factorization of a network that ``to_cnn`` or ``ConvNet`` made, with copies of its weights.

    Several outputs become a further mode N, a leaf below the root. Shared filters become equal weights.

    Raises:
        OptionError: Another kind of network.
    """
    if not isinstance(net, ConvNet):
        raise OptionError(
            f"from_cnn takes a ConvNet, as to_cnn makes them, found {type(net).__name__}.\n"
            "  of any network: tnreg.grid_tensor(net, templates, tree) is its tensor on few patches"
        )
    with torch.no_grad():
        seen = net.as_factorization()
        return Factorization.holding(seen.network, [s.detach().clone() for s in seen.stacks])


def _without_classes(
    network: Network, weights: dict[Node, Tensor]
) -> tuple[Network, dict[Node, Tensor], int]:
    """The network without the leaf of the last mode, whose weight goes into the root's."""
    tree, last = network.tree, network.tree.order - 1
    if tree.order < 2 or tree.parent(last) != tree.root or len(tree.children(tree.root)) < 2:
        raise OptionError(
            f"classes=True: the last mode, {last}, must be a leaf below the root beside other children.\n"
            f"  found: {tree!r}"
        )
    graph: nx.DiGraph[Any] = nx.DiGraph(tree.graph)
    graph.remove_node(last)
    narrower = ModeTree(graph)
    leaf = weights.pop(last)
    if network.joins[-1] == "diagonal":
        root = weights.get(tree.root)
        weights[tree.root] = leaf.mT if root is None else root.unsqueeze(-1) * leaf.mT
    else:
        axis = tree.children(tree.root).index(last)
        weights[tree.root] = torch.tensordot(weights[tree.root], leaf, ([axis], [1]))
    bonds = network.named_bonds
    bonds.pop(last)
    smaller = Network.build(narrower, network.sizes[:-1], bonds, join=network.named_joins)
    return smaller, weights, network.sizes[-1]
