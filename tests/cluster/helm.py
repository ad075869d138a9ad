"""Helm as a user runs it, and HeteroRL's chart with the images of the test cluster."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import build, images
from cluster.harness import Unavailable

CHART = images.ROOT / "charts" / "heterorl"
VALUES: dict[str, Any] = {
    "registry": "localhost",
    "image": {"tag": images.TAG, "pullPolicy": "Never"},
    "images": {"learner": {"tag": images.TAG}, "sampler": {"tag": images.TAG}, "pullPolicy": "Never"},
    "progress": {"seconds": 1},
}
"""Of the chart, for images that are on the node already."""


def helm_in(home: Path) -> Callable[..., str]:
    """Runs Helm, which keeps its own in this folder, and returns what it prints.

    CalledProcessError, with what it says, when it fails; Unavailable where it is not built.
    """
    if (program := build.find("helm")) is None:
        raise Unavailable(f"helm is not built; build with: python {build.__file__} helm")
    homes = {f"HELM_{kind}_HOME": str(home / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}

    def run(*arguments: str | Path, values: dict[str, Any] | None = None, kubeconfig: Path | None = None) -> str:
        environment = {**os.environ, **homes, "KUBECONFIG": str(kubeconfig or home / "none")}
        given = ["--values", "-"] if values is not None else []
        command = [program, *arguments, *given]
        done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, env=environment)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    return run
