"""Errors that tnreg raises for bad input.

All of them are ``TnregError``, which is a ``ValueError``: catching either one catches all. A message says
what is wrong and where, what was found against what was expected, and what to write instead.
"""

import cmath
import contextlib
import difflib
import math
import operator
from collections.abc import Iterable, Iterator
from numbers import Complex, Real
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
    with contextlib.suppress(TypeError, ValueError):
        number = operator.index(plain_number(value))
        if number >= least:
            return number
    message = f"{what} must be an integer >= {least}, found {value!r}."
    raise error(message, argument=what.rpartition(" ")[2])


def check_number(
    value: Any,
    what: str,
    least: float = -math.inf,
    below: float = math.inf,
    error: type[TnregError] = OptionError,
) -> float:
    """Return a finite real number with ``least <= value < below`` as a ``float``; see ``check_scalar``."""
    with contextlib.suppress(TnregError):
        number = check_scalar(value, what)
        if isinstance(number, float) and least <= number < below:
            return number
    expected = f"a number in [{least:g}, {below:g})" if below < math.inf else "a finite number"
    expected += f" >= {least:g}" if -math.inf < least and below == math.inf else ""
    message = f"{what} must be {expected}, found {value!r}."
    raise error(message, argument=what.rpartition(" ")[2])


def check_scalar(value: Any, what: str, error: type[TnregError] = OptionError) -> float | complex:
    """Return a finite real or complex number as Python's: also numpy's, and arrays and tensors without axes.

    Vectors, masked numbers, bool and text are no numbers. ``what`` and ``error`` as for ``check_integer``.
    """
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = plain_number(value)
        if isinstance(number, Complex) and cmath.isfinite(complex(number)):
            return float(number) if isinstance(number, Real) else complex(number)
    message = f"{what} must be a finite number, found {value!r}."
    raise error(message, argument=what.rpartition(" ")[2])


def plain_number(value: Any) -> Any:
    """Return a number of numpy or torch as Python's; ``TypeError`` for vectors, masks and bool."""
    axes = getattr(value, "ndim", None)
    if axes or (axes == 0 and getattr(value, "mask", False)):
        raise TypeError("a vector, or a number behind a mask")
    number = value.item() if axes == 0 else value
    if isinstance(number, bool):
        raise TypeError("neither True nor False is a number")
    return number


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a line for a message that names what is nearest to the word; empty if nothing is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"  did you mean {near[0]!r}?\n" if near else ""


@contextlib.contextmanager
def blame(argument: str) -> Iterator[None]:
    """Say that the errors of this block, or of the function that this decorates, are about an argument."""
    try:
        yield
    except TnregError as error:
        error.argument = argument
        raise
