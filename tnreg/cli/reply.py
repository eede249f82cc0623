"""What a command says: tables and notes on standard output, or with ``--json`` one document in their place.

A line or a bar shows on standard error while a command works, if that is a terminal.
"""

from __future__ import annotations

import contextlib
import json as json_format
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tnreg.errors import FileError
from tnreg.machine.progress import working


class Reply:
    """Where the parts of an answer go.

    Args:
        json: Whether standard output holds one JSON document and nothing else.
    """

    def __init__(self, json: bool = False) -> None:
        self.json = json
        self.console = Console(stderr=json)
        self._errors = Console(stderr=True)

    def table(self, table: Table) -> None:
        """A table, which a JSON document replaces."""
        if not self.json:
            self.console.print(table)

    def text(self, text: Any) -> None:
        """Lines for pipes and files as well, without colours or wrapping; a JSON document replaces them."""
        if not self.json:
            print(text)

    def note(self, text: str) -> None:
        """A remark beside the answer, such as which file was written; a path is not broken into lines."""
        self.console.print(text, soft_wrap=True, markup=False)

    def document(self, value: Any) -> None:
        """The answer as JSON, if that was asked for; see ``plain``."""
        if self.json:
            print(json_format.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False))

    def shows(self, progress: bool = True) -> bool:
        """Whether to show a progress bar: it is wanted and standard error is a terminal."""
        return progress and self._errors.is_terminal

    def undisturbed(self) -> contextlib.AbstractContextManager[Any]:
        """Around work that may run other people's code: what it prints does not come between the JSON."""
        return contextlib.redirect_stdout(sys.stderr) if self.json else contextlib.nullcontext()

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[None]:
        """A status line in this block; it names the passes over a tensor on disk as they begin."""

        class Line(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                say(record.getMessage())

        logger, line = logging.getLogger("tnreg.tensors.blocks"), Line()
        level = logger.level
        with working(text) as say:
            logger.addHandler(line)
            logger.setLevel(logging.INFO)
            try:
                yield
            finally:
                logger.removeHandler(line)
                logger.setLevel(level)


def plain(value: Any) -> Any:
    """A value as JSON has it: keys and node names as text, numbers as numbers, NaN and infinity as null."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray | torch.Tensor | np.generic):
        return plain(value.tolist())
    if isinstance(value, set | frozenset):
        return [plain(v) for v in sorted(value)]
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int) or value is None else str(value)


def short(value: Any) -> str:
    """A value in a cell of a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check_place(path: Path | None, option: str) -> None:
    """Refuse a file that could not be written, before the work that it is to hold.

    Raises:
        FileError: Its folder is not there, or it is a folder itself.
    """
    if path is None:
        return
    if path.is_dir():
        raise FileError(f"{option}: {path} is a folder; give the path of a file.")
    if not path.parent.is_dir():
        raise FileError(f"{option}: cannot write {path}: there is no folder {path.parent}")


def new_axes() -> Any:
    """New axes of a picture that no window shows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(7, 4.5), layout="constrained").subplots()
