"""``Example:`` in a docstring is shown as the code that it is; griffe knows ``Examples:`` only."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section of every docstring, as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Handle every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
