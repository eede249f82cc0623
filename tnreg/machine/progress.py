"""Progress bars and lines: on standard error, and only where they are seen, on a terminal or in a notebook.

Standard output is for answers, which may go to a pipe or be JSON; a log is no place for bars either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import ProgressColumn


def shown_progress(*columns: str | ProgressColumn, **options: Any) -> Any:
    """A ``rich.progress.Progress`` with these columns; nothing is drawn where nobody sees it.

    Args:
        columns: Its own if left out.
        options: Its other arguments.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    seen = console.is_terminal or console.is_jupyter
    return Progress(*columns, console=console, disable=not seen, **options)


@contextlib.contextmanager
def advancing(text: str, total: int, wanted: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar that is gone when the work is done; yields what advances it by so many.

    Args:
        text: What is counted.
        total: How many there are.
        wanted: Otherwise nothing is drawn, nor rich loaded.
    """
    if not wanted:
        yield lambda done: None
        return
    with shown_progress(transient=True) as shown:
        task = shown.add_task(text, total=total)
        yield lambda done: shown.advance(task, done)


@contextlib.contextmanager
def working(text: str, wanted: bool = True) -> Iterator[Callable[[str], None]]:
    """A line in this block, for work that is not counted; yields what changes it.

    Args:
        text: What is done.
        wanted: Otherwise nothing is drawn, nor rich loaded.
    """
    if not wanted:
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(text) as shown:
        shown.update(spinner="dots")  # drawn now, not only a moment later
        yield shown.update
