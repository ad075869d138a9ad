"""Makes a site of these pages with mkdocs: README comes first, and links to files of the repository lead to copies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# The theme's scripts know addresses of other machines, for diagrams and old browsers; a browser asks none of them.
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " font-src 'self'; connect-src 'self'; worker-src 'self'"
)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add README and the files outside docs/ that pages link to, list the reports, leave out this hook."""
    files.remove(files.src_uris["site.py"])
    config.nav.append({"Reports": sorted(path for path in files.src_uris if re.fullmatch(r"reports/.*\.md", path))})
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


def on_post_page(output: str, **_: Any) -> str:
    """Nothing is loaded from elsewhere, whatever the theme would do."""
    return output.replace("<head>", f'<head><meta http-equiv="content-security-policy" content="{POLICY}">', 1)


on_post_template = on_post_page  # of 404.html
