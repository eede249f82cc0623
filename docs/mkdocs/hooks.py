"""Links out of docs/, as the pages have them for reading in the repository, made to work on the site.

A file that a page links to by ``../`` becomes part of the site under its path in the repository, and the
link is written anew. Files that are linked are read once more for links of their own.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
_PAGES = ["CHANGELOG.md", "trees/README.md"]
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside of docs/ that pages link to, and those of ``_PAGES``."""
    pages = [(f"docs/{f.src_uri}", f.content_string) for f in files.documentation_pages()]
    waiting = [target for page, text in pages for target in _targets(page, text)]
    waiting += _PAGES
    while waiting:
        path = waiting.pop()
        if path.startswith("docs/") or files.get_file_from_path(path) or not (ROOT / path).is_file():
            continue  # what is not there is left to mkdocs, which reports it
        content = (ROOT / path).read_bytes()
        files.append(File.generated(config, path, content=content))
        if path.endswith(".md"):
            waiting += _targets(path, content.decode())
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links from where the page is on the site."""
    here = _source(page.file)

    def there(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[1]))
        site = target.removeprefix("docs/")
        return posixpath.relpath(site, posixpath.dirname(page.file.src_uri) or ".")

    parts = re.split(f"({_CODE.pattern})", markdown, flags=_CODE.flags)
    return "".join(part if i % 2 else _LINK.sub(there, part) for i, part in enumerate(parts))


def _source(file: File) -> str:
    """Path in the repository."""
    return file.src_uri if file.generated_by else f"docs/{file.src_uri}"


def _targets(page: str, text: str) -> list[str]:
    """Paths in the repository that a page links to."""
    links = _LINK.findall(_CODE.sub("", text))
    return [posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in links]
