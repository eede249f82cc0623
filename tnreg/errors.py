"""The errors that tnreg raises for bad input.

All of them are ``TnregError``, which is a ``ValueError``: catching either one catches all. A
message says what is wrong and where, what was found against what was expected, and what to write
instead.
"""

import operator
from typing import Any


class TnregError(ValueError):
    """Base of every error that tnreg raises on purpose."""


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
    """The value as an ``int``, numpy's integers included, or one clear error.

    Args:
        value: What was given.
        least: Smallest value allowed.
        what: Whose argument it is, for the message.
        error: Kind of error to raise.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise error(f"{what} must be an integer >= {least}, found {value!r}.")
    return number
