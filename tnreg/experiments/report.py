"""One page of HTML with everything inside it, so that it opens offline."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% } figure { margin: 2rem 0 } figcaption { color: #555 }
td, th { padding: .1rem 1rem .1rem 0; text-align: left } pre { background: #f5f5f5; padding: 1rem }
"""


def page(title: str, *parts: str) -> str:
    """Return the page of these parts, which are HTML."""
    title = html.escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title>\n<style>{_STYLE}</style>'
    body = "\n".join((f"<h1>{title}</h1>", *parts))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def text(value: Any, kind: str = "p") -> str:
    """Return text as an element: a paragraph ``p``, a heading ``h2``, or as it is typed, ``pre``."""
    return f"<{kind}>{html.escape(str(value))}</{kind}>"


def table(rows: Mapping[Any, Any]) -> str:
    """Return a table of names and values."""
    cells = (text(name, "td") + text(value, "td") for name, value in rows.items())
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def picture(path: Path, caption: str) -> str:
    """Return a PNG file with its caption."""
    data, alt = base64.b64encode(path.read_bytes()).decode(), html.escape(caption, quote=True)
    return (
        f"<figure><img src='data:image/png;base64,{data}' alt='{alt}'>{text(caption, 'figcaption')}</figure>"
    )
