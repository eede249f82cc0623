"""What modules with the weights of a network have in common: which dtypes they go to, what they load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tnreg.errors import DataError, OptionError
from tnreg.networks.network import Network
from tnreg.tensors.arrays import check_dtype

_KEY = "tnreg"  # of the metadata that torch keeps beside a state_dict


class NetworkModule(nn.Module):
    """A module of the weights of a network."""

    network: Network

    @property
    def _first(self) -> Tensor:
        """Any of the weights, as they are kept."""
        return next(self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._first.device

    def _reshard(self) -> None:
        """Under ``fully_shard`` put parameters back in place of the whole ones that a call leaves there."""
        if reshard := getattr(self, "reshard", None):
            reshard()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # tried first: numbers in a dtype that cannot be computed with would be lost
        check_dtype(fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # not as an entry: what is not a tensor breaks safetensors, and old files have none
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1], {})
        metadata[_KEY] = {**_described(self.network), "dtype": str(self.dtype)}
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *more: Any
    ) -> None:
        found, expected = local_metadata.get(_KEY, {}), _described(self.network)
        other = [name for name, value in expected.items() if found.get(name, value) != value]
        if other:
            raise OptionError(
                f"the state_dict is of another model; what differs: {', '.join(other)}.\n"
                f"  found:    {_shortly(found[other[0]])}\n  expected: {_shortly(expected[other[0]])}",
                argument="state_dict",
            )
        tensors = [value for key, value in state_dict.items() if key.startswith(prefix)]
        if not self.dtype.is_complex and any(torch.is_tensor(x) and x.is_complex() for x in tensors):
            message = f"the state_dict holds complex weights, the model those of {self.dtype}."
            raise DataError(message, argument="state_dict")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)


def _described(network: Network) -> dict[str, Any]:
    """Return what weights mean as plain values; names of nodes do not matter."""
    tree = network.tree
    links = [list(below) or node for node, below in zip(tree.nodes, tree.links, strict=True)]
    sizes, bonds, joins = list(network.sizes), list(network.bonds), list(network.joins)
    root = "ones" if network.root_ones else "trained"
    return {"tree": links, "sizes": sizes, "bonds": bonds, "joins": joins, "root": root}


def _shortly(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
