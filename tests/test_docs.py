"""The documentation site: builds without a warning, names all that is public, has no dead links."""

import html
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import tnreg

pytest.importorskip("mkdocs")
yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "docs" / "mkdocs" / "mkdocs.yml"
MODULES = ["algebra", "convert", "dynamics", "experiments.sweep", "images", "plots"]
DOCUMENTED = re.findall(
    r"^::: (\S+)", "".join(p.read_text("utf-8") for p in ROOT.glob("docs/api/*.md")), re.MULTILINE
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site, and what mkdocs said."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", CONFIG, "-d", folder]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # of mkdocs-material: about mkdocs' future
    return folder, subprocess.run(command, capture_output=True, text=True, env=quiet)


@pytest.fixture(scope="module")
def pages(site):
    """``{path: text}`` of the pages; the one for errors names its files from the root of the server."""
    return {p: p.read_text("utf-8") for p in site[0].rglob("*.html") if p.name != "404.html"}


@pytest.fixture(scope="module")
def api(site, pages):
    return {p.name: text for p, text in pages.items() if p.parent == site[0] / "api"}


def test_site_builds_without_a_warning(site):
    folder, done = site
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|error", done.stdout + done.stderr, re.IGNORECASE), done.stderr
    assert (folder / "index.html").exists()
    assert (folder / "examples" / "far_dependencies.py").exists()  # a page links to it


def test_every_public_name_is_on_an_api_page(api):
    found = set(re.findall(r'\bid="(tnreg\.[^"]+)"', "".join(api.values())))
    wanted = {f"tnreg.{name}" for name in tnreg.__all__}
    for module in MODULES:
        names = importlib.import_module(f"tnreg.{module}").__all__
        wanted |= {f"tnreg.{module}", *(f"tnreg.{module}.{name}" for name in names)}
    assert wanted - found == set()


def test_every_documented_name_exists():
    """At run time, as a user types it; a site is built from the text of the files alone."""
    assert len(DOCUMENTED) > 50
    for name in DOCUMENTED:
        assert pkgutil.resolve_name(name).__doc__, name


def test_docstrings_are_shown_as_they_are_meant(api):
    """Examples as code, not as nested quotations; no markup left over; one description for one result."""
    for name, text in api.items():
        shown = re.search("<article.*</article>", text, re.DOTALL)[0]
        assert "<blockquote>" not in shown, name
        assert "``" not in re.sub("<[^>]+>", "", shown), name
        for part in re.findall(r"Returns:.*?</ul>", shown, re.DOTALL):
            assert part.count("<li") == 1, (name, part)
    assert "".join(api.values()).count("&gt;&gt;&gt;") > 30


def test_every_page_is_in_the_navigation():
    written = {p.relative_to(CONFIG.parents[1]).as_posix() for p in CONFIG.parents[1].rglob("*.md")}
    listed = list(entries(yaml.safe_load(CONFIG.read_text("utf-8"))["nav"]))
    assert len(set(listed)) == len(listed)
    assert written - set(listed) == set()
    assert {page for page in set(listed) - written if not (ROOT / page).exists()} == set()


def test_links_lead_to_pages_and_headings(site, pages):
    folder, anchor, seen = site[0].resolve(), r'\b(?:id|name)="([^"]+)"', 0
    anchors = {path.resolve(): set(re.findall(anchor, text)) for path, text in pages.items()}
    for path, text in pages.items():
        for link in re.findall(r'\b(?:href|src)="([^"]*)"', text):
            target, heading = urldefrag(html.unescape(link))
            if re.match(r"[a-z]+:|//", link):
                continue
            file = (path.parent / unquote(target)).resolve() if target else path.resolve()
            assert file.is_relative_to(folder) and file.exists(), (path.name, link)
            if heading and file in anchors and heading != "__skip":
                assert unquote(heading) in anchors[file], (path.name, link)
            seen += 1
    assert seen > 1000


def entries(nav):
    """Paths in a navigation, at any depth."""
    for item in nav:
        value = item if isinstance(item, str) else next(iter(item.values()))
        yield from entries(value) if isinstance(value, list) else [value]
