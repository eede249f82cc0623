"""What a command prints: tables and notes on standard output, or with ``--json`` one JSON document."""

import contextlib
import json as json_format
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro import conf

from tnreg.errors import FileError
from tnreg.machine.progress import plain_text, printable, working
from tnreg.trees.drawing import picture_format

Picture = Annotated[Path | None, conf.arg(aliases=["--png"])]
"""Where to draw; the suffix says how."""


_LOG_OF_PASSES = logging.getLogger("tnreg.tensors.blocks")  # by name: not all commands read tensors


class Reply:
    """Prints the parts of an answer; where it is to be ``json``, standard output holds nothing else.

    Raises:
        FileError: ``out`` or ``figure`` could not be written, which is checked before any work.
    """

    def __init__(self, json: bool = False, out: Path | None = None, figure: Path | None = None) -> None:
        for option, path in (("--out", out), ("--figure", figure)):
            if path is not None and path.is_dir():
                raise FileError(f"{option}: {path} is a folder; give the path of a file.")
            if path is not None and not path.parent.is_dir():
                raise FileError(f"{option}: cannot write {path}: there is no folder {path.parent}")
        if figure is not None:
            picture_format(figure)
        self.json, self._figure = json, figure
        self.console = Console(stderr=json)

    def table(self, table: Table) -> None:
        """Print a table, unless a JSON document replaces it."""
        if not self.json:
            self.console.print(table)

    def text(self, text: Any) -> None:
        """Print lines without colours or wrapping, unless a JSON document replaces them."""
        if not self.json:
            print(printable(text, keep="\n"))

    def note(self, text: str) -> None:
        """Print a remark beside the answer, such as which file was written, without breaking paths."""
        self.console.print(plain_text(text), soft_wrap=True)

    def document(self, value: Any) -> None:
        """Print the answer as JSON, if that was asked for; see ``plain``."""
        if self.json:
            text = json_format.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)
            print("".join(c if c.isprintable() or c == "\n" else json_format.dumps(c)[1:-1] for c in text))

    def picture(self, draw: Callable[[Any], Any], panels: int = 1) -> None:
        """Write the picture, if there is to be one; ``draw`` fills the axes that it is given."""
        if self._figure is None:
            return
        from matplotlib.figure import Figure

        from tnreg import plots

        with self.working("drawing ..."):
            figure = Figure(figsize=(2 + 5 * panels, 4.5), layout="constrained")
            draw(figure.subplots(1, panels))
            plots.save_figure(figure, self._figure)
        self.note(f"wrote {self._figure}")

    def shows(self, progress: bool = True) -> bool:
        """Return whether to show a progress bar: one is wanted and standard error is a terminal."""
        return progress and Console(stderr=True).is_terminal

    def undisturbed(self) -> contextlib.AbstractContextManager[Any]:
        """Keep what other people's code prints in this block out of the JSON document."""
        return contextlib.redirect_stdout(sys.stderr) if self.json else contextlib.nullcontext()

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Show a status line in this block; it names the passes over a tensor on disk as they begin."""
        level = _LOG_OF_PASSES.level
        with working(text) as say:
            line = logging.Handler()
            line.emit = lambda record: say(record.getMessage())  # type: ignore[method-assign]
            _LOG_OF_PASSES.addHandler(line)
            _LOG_OF_PASSES.setLevel(logging.INFO)
            try:
                yield
            finally:
                _LOG_OF_PASSES.removeHandler(line)
                _LOG_OF_PASSES.setLevel(level)


def table_of(
    rows: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str] | Sequence[str],
    left: int = 1,
    **options: Any,
) -> Table:
    """Return a table of rows, which are values by name; ``options`` are those of ``rich.table.Table``.

    Args:
        rows: One mapping a row.
        columns: ``{heading: format of a row's values}``, e.g. ``{"error": "{error:.2g}"}``; or names of
            values to be shown as they are.
        left: How many columns are aligned to the left; the others hold numbers.
        options: For example a ``title``.
    """
    texts = {key: plain_text(value) for key, value in options.items() if key == "title"}
    table = Table(**{"title_justify": "left", **options, **texts})
    if not isinstance(columns, Mapping):
        columns = {name: f"{{{name}}}" for name in columns}
    for i, heading in enumerate(columns):
        table.add_column(plain_text(heading), justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*(plain_text(text.format_map(row)) for text in columns.values()))
    return table


def plain(value: Any) -> Any:
    """Return a value as JSON has it: keys and nodes as text, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if hasattr(value, "tolist"):  # of numpy or torch
        return plain(value.tolist())
    if isinstance(value, list | tuple | Set):
        return [plain(v) for v in (sorted(value) if isinstance(value, Set) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int) or value is None else str(value)


def short(value: Any) -> str:
    """Return a value as text for a cell of a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
