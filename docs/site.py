"""Makes a site of these pages with mkdocs: README comes first, and links to files of the repository lead to copies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add README and the files outside docs/ that pages link to; leave out this hook."""
    files.remove(files.src_uris["site.py"])
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](").replace("](reports/)", "](reports/canary.md)")
    files.append(File.generated(config, "index.md", content=re.sub(r"\]\(examples/\)", "](spec.md)", readme)))
    for path in [*(ROOT / "examples").glob("*.yaml"), ROOT / "pyproject.toml"]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), content=path.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ lead to the copies in the site."""
    if "/" in page.file.src_uri:
        return markdown
    return markdown.replace("](../README.md", "](index.md").replace("](../", "](")
