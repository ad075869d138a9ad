"""Examples run with the code of now and of an earlier commit, in turn, to be compared."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.page import ROOT, commit

BEFORE = "b339b8d"
PACKAGES = ("operator", "images/common", "images/learner", "images/sampler")


@contextmanager
def checkouts(before: str) -> Iterator[dict[str, Path]]:
    """By their commits: the earlier code, in a folder that is removed at the end, and this one."""
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory(prefix="heterorl-before-") as folder:
        earlier = Path(folder) / "before"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(earlier), before], check=True)
        try:
            yield {before: earlier, commit(): ROOT}
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(earlier)], check=True)


def started(checkout: Path, example: str, runs: Path) -> subprocess.Popen[bytes]:
    """An example's run by a checkout's code, in `runs`."""
    path = os.pathsep.join(str(checkout / package) for package in PACKAGES)
    return subprocess.Popen(
        [sys.executable, "-m", "heterorl", "run", f"examples/{example}.yaml", "--runs-dir", str(runs)],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )
