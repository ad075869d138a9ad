"""A cluster for each module of tests, a namespace for each test.

A module says in CLUSTER what it needs: `CLUSTER = {"level": "controllers", "audit": True}`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

sys.path.insert(0, str(Path(__file__).parent))
from harness import Cluster, Unavailable, find_programs

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def or_skip() -> Iterator[None]:
    """What this machine cannot run is skipped with the reason; under HETERORL_REQUIRE=all it fails."""
    try:
        yield
    except Unavailable as error:
        (pytest.fail if os.environ.get("HETERORL_REQUIRE") == "all" else pytest.skip)(str(error))


@contextlib.contextmanager
def started(**options: Any) -> Iterator[Cluster]:
    with contextlib.ExitStack() as leaving:
        with or_skip():
            running = leaving.enter_context(Cluster(**options))
        yield running


@pytest.fixture
def needs() -> Callable[[str], dict[str, Path]]:
    """The programs of a level, `needs("node")`; skips where it cannot run."""

    def find(level: str) -> dict[str, Path]:
        with or_skip():
            return find_programs(level)

    return find


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster of this module."""
    with started(**getattr(request.module, "CLUSTER", {})) as running:
        yield running


@pytest.fixture
def start() -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster for one test: `start("kwok")`."""
    with contextlib.ExitStack() as leaving:
        yield lambda level, **options: leaving.enter_context(started(level=level, **options))


@pytest.fixture(scope="module")
def api(cluster: Cluster) -> Iterator[client.ApiClient]:
    """A client of the cluster with every right."""
    with config.new_client_from_config(str(cluster.kubeconfig)) as connected:
        yield connected


@pytest.fixture(scope="module")
def crd(cluster: Cluster) -> None:
    """The CRD, installed and served."""
    cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "crds" / "heterorlrun.yaml"))
    cluster.kubectl("wait", "--for=condition=Established", "crd/heterorlruns.heterorl.dev", "--timeout=30s")
    # An established kind is served a moment later; kubectl looks anew for this list only.
    cluster.wait("the CRD", lambda: "heterorlruns" in cluster.kubectl("api-resources", "--api-group=heterorl.dev"))


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh namespace; its deletion is not waited for."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")
