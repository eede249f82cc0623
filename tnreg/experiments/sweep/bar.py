"""The progress bar of a sweep."""

from __future__ import annotations

from typing import Any

from tnreg.machine.progress import shown_progress


class Bar:
    """The progress bar: cells done, failed, being computed, and the last one's headline."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.total, self.there, self.failed, self.at_once = total, done, 0, 0
        self.shown = shown

    def __enter__(self) -> Bar:
        if self.shown:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeRemainingColumn,
            )

            # cells take minutes or hours: the remaining time is that of all that were done so far
            self.progress = shown_progress(
                MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[counts]}"),
                TimeRemainingColumn(), TextColumn("{task.description}"),
                speed_estimate_period=1e9,
            )  # fmt: skip
            self.progress.start()
            self.task = self.progress.add_task(
                "", total=self.total, completed=self.there, counts=""
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.progress.stop()

    def told(self, at_once: int, line: str) -> None:
        """How many cells are computed at once, and a line to say."""
        self.at_once = at_once
        if self.shown:
            if line:
                self.progress.console.print(line)
            self._update(0)

    def advance(self, text: str, *, failed: bool) -> None:
        """One cell more."""
        self.failed += failed
        self.there += not failed
        if self.shown:
            self._update(1, description=text)

    def _update(self, by: int, **shown: Any) -> None:
        waiting = self.total - self.there - self.failed
        parts = [f"{self.failed} failed"] if self.failed else []
        parts += [f"{min(waiting, self.at_once)} running"]
        self.progress.update(self.task, advance=by, counts=", ".join(parts), **shown)
