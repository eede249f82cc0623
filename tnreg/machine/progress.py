"""Progress bars and status lines on standard error, shown only on a terminal or in a notebook.

Standard output is for answers, which may go to a pipe or be JSON; bars would also spoil a log.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import ProgressColumn


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

    with Console(stderr=True).status(text) as line:
        line.update(spinner="dots")  # draws at once, not a moment later
        yield line.update
