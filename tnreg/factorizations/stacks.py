"""The weights of a factorization as parameters: equal nodes in one tensor, a stack, each in a slot of it."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tnreg.errors import OptionError, TreeError
from tnreg.networks.network import Network
from tnreg.trees.reading import Node

_COMPUTED = "parametrizations."  # how torch begins the names of what stacks are computed from


class _Read:
    """A mapping of nodes to be read; a file holds it as a dictionary, which ``torch.load`` knows."""

    def __setitem__(self, node: Node, tensor: Any) -> None:
        raise OptionError(
            f"weights are read here: what is assigned to node {node!r} would not reach the model.\n"
            "  write model.load_weights({node: tensor}); of a ConvNet, net.weights[node].copy_(tensor) "
            "under torch.no_grad()"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())  # type: ignore[attr-defined]


class NodeDict(_Read, dict[Node, Tensor]):
    """``{node: tensor}`` to be read."""


class NodeTensors(_Read, Mapping[Node, Tensor]):
    """``{node: tensor}`` in the order of ``tree.nodes``, to read: views of stacks.

    With gradients a stack is unbound once for its nodes: one backward instead of a full-size one for each.
    """

    def __init__(self, network: Network, stacks: Sequence[Tensor] | nn.ParameterList) -> None:
        self._network, self._stacks = network, stacks
        self._read: dict[int, Tensor | tuple[Tensor, ...]] = {}

    def __getitem__(self, node: Node) -> Tensor:
        try:
            stack, slot = self._network.slots[self._network.tree.position(node)]
        except (TreeError, KeyError):
            raise KeyError(node) from None
        if stack not in self._read:
            whole = self._stacks[stack]
            tracked = torch.is_grad_enabled() and whole.requires_grad
            self._read[stack] = whole.unbind(0) if tracked else whole
        return self._read[stack][slot]

    def __iter__(self) -> Iterator[Node]:
        nodes = self._network.tree.nodes
        return (nodes[p] for p in self._network.weighted)

    def __len__(self) -> int:
        return len(self._network.weighted)

    def __or__(self, other: Mapping[Node, Tensor]) -> dict[Node, Tensor]:
        return {**self, **other}

    def __repr__(self) -> str:
        return repr(dict(self))


class Stacks(nn.ParameterList):
    """Parameters of which every item is a stack as it is now, whatever it is computed from.

    That is a parameter; parameters of some of its nodes each (``split``); or what torch's parametrizations
    and pruning make of others. What is sharded over processes is gathered, by all of them together.
    """

    def __init__(self, stacks: Sequence[Tensor]) -> None:
        super().__init__()
        # as its own ``extend`` does, which takes four times as long
        self._parameters.update((str(k), nn.Parameter(stack)) for k, stack in enumerate(stacks))
        self._size = len(stacks)

    def __getitem__(self, k: Any) -> Any:
        stack = self._parameters.get(str(k))
        if stack is None:
            for hook in self._forward_pre_hooks.values():  # of pruning: a list has no forward pass
                hook(self, ())
            stack = super().__getitem__(k)
        return gather(stack)

    def __iter__(self) -> Iterator[Any]:
        own = map(self._parameters.get, map(str, range(self._size)))
        return iter([self[k] if stack is None else gather(stack) for k, stack in enumerate(own)])

    def _is_plain(self, k: int) -> bool:
        own = self._parameters.get(str(k))
        return own is not None and not hasattr(own, "full_tensor")

    @torch.no_grad()
    def write(self, values: Mapping[tuple[int, int], Tensor]) -> None:
        """Put tensors at (stack, slot).

        Raises:
            OptionError: What a stack is computed from cannot give them; nothing was changed.
        """
        computed = {k for k, _ in values if not self._is_plain(k)}
        before = {name: tensor.clone() for name, tensor in self.state_dict().items()} if computed else {}
        try:
            for k in computed:
                if str(k) in self._parameters:
                    raise ValueError("it is sharded")
                wanted = self[k].clone()
                for (stack, slot), value in values.items():
                    if stack == k:
                        wanted[slot] = value
                setattr(self, str(k), wanted)
                off = (self[k] - wanted).abs().max()
                if not off <= torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max():
                    raise ValueError("it gives other weights")
        except Exception as error:  # whatever the inverse of somebody's parametrization raises
            for name, tensor in self.state_dict().items():
                tensor.copy_(before[name])
            said = str(error).partition("\n")[0]
            raise OptionError(
                f"weights cannot be set: stack {k} is computed from other parameters, or sharded.\n"
                f"  {type(error).__name__}: {said}\n"
                "  load weights before that, or set those parameters themselves"
            ) from None
        for (stack, slot), value in values.items():
            if stack not in computed:
                self._parameters[str(stack)][slot].copy_(value)  # type: ignore[index]

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """Return the parameters that a stack is, or is computed from."""
        named = self.named_parameters()
        return [p for name, p in named if re.split("[._]", name.removeprefix(_COMPUTED))[0] == str(k)]

    def sources(self, k: int) -> list[nn.Parameter]:
        """Return the parameter that a stack is, the parts of it, or its original under a parametrization.

        Raises:
            OptionError: It is computed from parameters of other shapes, or pruned.
        """
        if isinstance(self._first_step(k), _Parts):
            return self.parameters_of(k)
        return [source_of(self, str(k), f"stack {k}")]

    def join(self, k: int, parts: Sequence[Tensor]) -> Tensor:
        """Put together what is of the shapes of ``sources``, e.g. gradients."""
        first, parts = self._first_step(k), [gather(part) for part in parts]
        return first(*parts) if isinstance(first, _Parts) else parts[0]

    def split(self, k: int, slots: Sequence[Sequence[int]]) -> None:
        """Keep the nodes at these slots of a stack in a parameter of their own each.

        Raises:
            OptionError: It is computed from other parameters, or sharded.
        """
        if not self._is_plain(k):
            message = f"stack {k} is computed from other parameters, or sharded over processes"
            raise OptionError(f"{message}: its nodes cannot have different settings any more.")
        parametrize.register_parametrization(self, str(k), _Parts(slots))

    def unsplit(self) -> None:
        """Keep every stack in one parameter again."""
        for k in range(len(self)):
            if isinstance(self._first_step(k), _Parts):
                for part in self.parameters_of(k):
                    part.requires_grad_()  # else torch would make a buffer of the whole
                parametrize.remove_parametrizations(self, str(k))

    def trained(self, k: int) -> list[bool]:
        """Return for every slot of a stack whether it is trained.

        Raises:
            OptionError: It is computed from other parameters, or sharded.
        """
        first, parts = self._first_step(k), self.parameters_of(k)
        if self._is_plain(k):
            return [parts[0].requires_grad] * len(parts[0])
        chains: Any = getattr(self, "parametrizations", {})
        if not (isinstance(first, _Parts) and len(chains[str(k)]) == 1):
            message = f"stack {k} is computed from other parameters, or sharded over processes"
            raise OptionError(f"{message}: its weights cannot be set.")
        found = {slot: p.requires_grad for slots, p in zip(first.slots, parts, strict=True) for slot in slots}
        return [found[slot] for slot in range(len(found))]

    def _first_step(self, k: int) -> nn.Module | None:
        """Return the first parametrization of a stack, if it has one."""
        chains: Any = getattr(self, "parametrizations", {})
        return chains[str(k)][0] if str(k) in chains else None


class _Parts(nn.Module):
    """A parametrization that puts a stack together from parameters which hold some of its slots each."""

    def __init__(self, slots: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.slots = slots
        order = [slot for part in slots for slot in part]
        self.rows = sorted(range(len(order)), key=order.__getitem__)

    def forward(self, *parts: Tensor) -> Tensor:
        """Return the stack."""
        rows = [row for part in parts for row in part.unbind(0)]
        return torch.stack([rows[k] for k in self.rows])

    def right_inverse(self, stack: Tensor) -> list[Tensor]:
        """Return the parts of a stack."""
        return [stack[slots] for slots in self.slots]


def source_of(module: nn.Module, name: str, what: str) -> nn.Parameter:
    """Return the parameter that a weight is, or the one of its shape that it is parametrized by.

    Raises:
        OptionError: It is computed from parameters of other shapes, or pruned; the message calls it ``what``.
    """
    chains: Any = getattr(module, "parametrizations", {})
    original = getattr(chains[name], "original", None) if name in chains else module._parameters.get(name)
    if original is None or (name in chains and original.shape != getattr(module, name).shape):
        raise OptionError(
            f"{what} is computed from other parameters, so that it has no gradient of its own.\n"
            "  see named_parameters()"
        )
    return cast(nn.Parameter, original)


def gather(x: Tensor) -> Tensor:
    """Return a tensor that may be sharded as a whole; the gradient is the mean of those of all processes."""
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial

    mesh: Any = x.device_mesh  # type: ignore[attr-defined]
    whole: Tensor = x.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())  # type: ignore[no-untyped-call]
    return whole
