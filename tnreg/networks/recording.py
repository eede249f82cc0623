"""Calls of torch recorded as they are made, to be made again without what decided on them.

A small network is contracted in some ten calls of a microsecond each; to find out which takes longer. They
are the same at every step of a training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PLAIN = {Tensor, nn.Parameter}

# Recording takes as long as it saves in so many repetitions.
PATIENCE = 16


class Repeated:
    """A function of tensors that reads no numbers: recorded when called often.

    Copies and files begin anew.
    """

    def __init__(self) -> None:
        self._counts: dict[Any, int] = {}
        self._recorded: dict[Any, Callable[..., Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Repeated, ()

    def __call__(
        self,
        call: Callable[[Any, Sequence[Tensor]], Tensor],
        of: Any,
        tensors: Sequence[Tensor],
        rows: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return ``call(of, tensors)``, or what was recorded of it.

        ``of`` may be another one each time by its tensors ``rows`` alone.
        """
        if torch.compiler.is_compiling():
            return call(of, tensors)
        key = tensors[0].dtype, tensors[0].device, torch.is_grad_enabled(), len(rows)
        recorded = self._recorded.get(key)
        if recorded is not None and _PLAIN.issuperset(map(type, tensors)):
            return recorded(*tensors, *rows)
        count = self._counts[key] = self._counts.get(key, 0) + 1
        if count != PATIENCE:
            return call(of, tensors)
        with _Recorder() as recorder:
            result = call(of, tensors)
        self._recorded[key] = recorder.program([*tensors, *rows], result)
        return result


class _Recorder(TorchFunctionMode):
    """Keeps every call of torch that returns tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) or (type(out) in (tuple, list) and out and isinstance(out[0], Tensor)):
            self._calls.append((func, args, kwargs or {}, out))
        return out

    def program(self, tensors: Sequence[Tensor], result: Tensor) -> Callable[..., Tensor]:
        """Return a function that makes these calls with other tensors in place of the given ones.

        What is reshaped twice is reshaped once, and what nothing is made of is left out.
        """
        names = {id(x): f"x{k}" for k, x in enumerate(tensors)}
        constants: dict[str, Any] = {}
        unshaped: dict[int, Tensor] = {}
        used = {id(result)}

        def written(value: Any) -> str:
            if isinstance(value, Tensor) and id(value) in names:
                used.add(id(value))
                return names[id(value)]
            if type(value) in (tuple, list):
                return f"[{', '.join(map(written, value))}]"
            constants[name := f"c{len(constants)}"] = value
            return name

        for _, _, _, out in self._calls:
            for x in [out] if isinstance(out, Tensor) else out:
                names[id(x)] = f"y{len(names)}"
        for func, args, _, out in self._calls:
            if func is Tensor.reshape:
                unshaped[id(out)] = unshaped.get(id(args[0]), args[0])
        lines = [f"    return {names[id(result)]}"]
        for func, args, kwargs, out in reversed(self._calls):
            each = [out] if isinstance(out, Tensor) else out
            if not used.isdisjoint(map(id, each)):
                if func is Tensor.reshape:
                    args = (unshaped[id(out)], *args[1:])
                given = [*map(written, args), *(f"{key}={written(value)}" for key, value in kwargs.items())]
                made = ", ".join(names[id(x)] for x in each) + "," * (each is out)
                lines.append(f"    {made} = {written(func)}({', '.join(given)})")
        lines.append(f"def program({', '.join(names[id(x)] for x in tensors)}):")
        exec("\n".join(reversed(lines)), constants)
        program: Callable[..., Tensor] = constants["program"]
        return program
