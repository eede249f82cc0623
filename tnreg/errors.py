"""Errors that tnreg raises for bad input.

All of them are ``TnregError``, which is a ``ValueError``: catching either one catches all. A message says
what is wrong and where, what was found against what was expected, and what to write instead.
"""

import contextlib
import operator
from collections.abc import Iterator
from typing import Any


class TnregError(ValueError):
    """Base of every error that tnreg raises on purpose.

    Attributes:
        argument: The argument of a public function that the error is about, e.g. ``"rtol"``, or ``None``;
            the command line names the option from it. Pickling keeps it.
    """

    def __init__(self, *message: object, argument: str | None = None) -> None:
        super().__init__(*message)
        self.argument = argument


class TreeError(TnregError):
    """Not a mode tree, or a node that the tree does not have."""


class ShapeError(TnregError):
    """Sizes, orders or shapes that do not fit each other."""


class SizeError(ShapeError):
    """An array that would not fit into memory; raised before it is allocated."""


class DataError(TnregError):
    """Numbers that cannot be used: NaN, infinite, wrong dtype, an index out of range, no samples."""


class OptionError(TnregError):
    """An argument that is not one of the choices, or two that contradict each other."""


class FileError(TnregError):
    """A file that is missing, unreadable, or not what its name or its reader says."""


def check_integer(value: Any, least: int, what: str, error: type[TnregError] = OptionError) -> int:
    """Return the value as an ``int``, numpy's integers included.

    Args:
        value: What to check.
        least: Smallest value allowed.
        what: What the message calls it; the last word is the argument's name, e.g. ``"fit: steps"``.
        error: Kind of error to raise if the value is no integer or too small.
    """
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool) and operator.index(value) >= least:
            return operator.index(value)
    message = f"{what} must be an integer >= {least}, found {value!r}."
    raise error(message, argument=what.rpartition(" ")[2])


@contextlib.contextmanager
def blame(argument: str) -> Iterator[None]:
    """Say that the errors of this block, or of the function that this decorates, are about an argument."""
    try:
        yield
    except TnregError as error:
        error.argument = argument
        raise
