"""The documentation as a site: built strictly, complete, and without anything that is loaded from elsewhere."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
NOT_LOADED = {"canonical", "next", "prev", "alternate"}
"""Kinds of <link> that only say something."""


class Page(HTMLParser):
    """What a page loads by itself, and the pages it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        if tag == "link" and found.get("rel") not in NOT_LOADED:
            self.loaded.append(found["href"])
        if tag in LOADS and LOADS[tag] in found:
            self.loaded.append(found[LOADS[tag]])
        if tag == "a" and "href" in found:
            self.linked.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True, timeout=300)
    return folder


def test_the_site_has_every_page_and_its_links_lead_to_what_is_in_it(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert [page for page in [*pages, Path("index.html")] if not (site / page).is_file()] == []
    listed = {Path(link) for link in Page((site / "index.html").read_text()).linked}
    assert pages - listed == set()  # every page's navigation has them all
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue  # its links start at the root of the server
        inside = [link for link in Page(page.read_text()).linked if not urlsplit(link).netloc]
        paths = {urlsplit(link).path for link in inside} - {""}
        assert [path for path in paths if not (page.parent / path).exists()] == [], page.name


def test_no_page_and_no_style_loads_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert [address for address in Page(page.read_text()).loaded if urlsplit(address).netloc] == [], page.name
    for style in site.rglob("*.css"):
        assert re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']*", style.read_text()) == [], style.name


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_in_a_browser_pages_and_search_work_from_the_site_alone(site: Path, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    asked: list[str] = []
    problems: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    context.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page = context.new_page()
    page.set_default_timeout(60_000)
    with served(site) as address:
        for name in ("index.html", "ui.html", "losses.html", "reports/canary.html", "404.html"):
            page.goto(f"{address}/{name}", wait_until="networkidle")
        page.goto(f"{address}/index.html", wait_until="networkidle")
        page.get_by_role("textbox", name="Search").fill("expectation")
        page.get_by_role("link", name=re.compile("GEPO|losses", re.IGNORECASE)).first.wait_for()
        # The scripts know addresses of other machines; the pages' policy forbids to ask them.
        page.evaluate("fetch('https://example.org/').catch(() => {})")
    context.close()
    assert {urlsplit(url).netloc for url in asked} <= {urlsplit(address).netloc, ""}
    assert [problem for problem in problems if "example.org" not in problem] == []
    assert any("Content Security Policy" in problem for problem in problems)
