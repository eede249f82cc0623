"""Progress bars and status lines on standard error, shown only on a terminal or in a notebook; plain text.

Standard output is for answers, which may go to a pipe or be JSON; bars would also spoil a log.
"""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import ProgressColumn
    from rich.text import Text


def printable(text: object, keep: str = "") -> str:
    """Return a text without what would steer a terminal: other than visible characters are escaped.

    Names in files that come from others go through it, error messages as well; ``keep`` are characters that
    stay as they are.
    """
    return "".join(
        c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs"
        else c.encode("unicode_escape").decode()
        for c in str(text)
    )  # fmt: skip


def plain_text(text: object) -> Text:
    """Return a text for rich to show as it is, without markup and emoji codes."""
    from rich.text import Text

    return Text(printable(text, keep="\n"))


def shown_progress(*columns: str | ProgressColumn, **options: Any) -> Any:
    """Return a ``rich.progress.Progress`` of these arguments; it draws nothing where nobody would see it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    visible = console.is_terminal or console.is_jupyter
    return Progress(*columns, console=console, disable=not visible, **options)


@contextlib.contextmanager
def advancing(text: str, total: int, wanted: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a progress bar while the block runs; yield a function that advances it by a number.

    If it is not ``wanted``, nothing is drawn and rich is not loaded.
    """
    if not wanted:
        yield lambda count: None
        return
    with shown_progress(transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def working(text: str, wanted: bool = True) -> Iterator[Callable[[str], None]]:
    """Show a status line while the block runs; yield a function that changes its text; see ``advancing``."""
    if not wanted:
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(plain_text(text)) as line:
        line.update(spinner="dots")  # draws at once, not a moment later
        yield lambda text: line.update(plain_text(text))
