"""The page's modules as one script, so that a report is a single file: modules of a file cannot import each other."""

from __future__ import annotations

import re
from pathlib import Path

_IMPORT = re.compile(r'^import \{([\w, ]+)\} from "\./(\w+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:async )?(?:class|function|const) (\w+))", re.MULTILINE)


def script(folder: Path, entry: str) -> str:
    """The module `entry` of a folder with all that it imports: each a function that returns what it exports."""
    parts: dict[str, str] = {}
    _add(folder, entry, parts)
    return "".join(parts.values())


def _add(folder: Path, name: str, parts: dict[str, str]) -> None:
    if name in parts:
        return
    source = (folder / f"{name}.js").read_text(encoding="utf-8")
    for _, needed in _IMPORT.findall(source):
        _add(folder, needed, parts)
    exported = ", ".join(found for _, found in _EXPORT.findall(source))
    body = _EXPORT.sub(r"\1", _IMPORT.sub(r"const {\1} = module_\2;\n", source))
    parts[name] = f"const module_{name} = (() => {{\n{body}return {{ {exported} }};\n}})();\n"
