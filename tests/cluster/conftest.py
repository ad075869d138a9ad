"""A cluster for each module of tests, a namespace for each test.

A module says in CLUSTER what it needs: `CLUSTER = {"level": "controllers", "audit": True}`.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

from cluster import images, operators
from cluster.harness import Cluster, Unavailable, find_programs
from cluster.helm import helm_in

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
def needs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Path]]:
    """The programs of a level, `needs("node")`, for a test that starts a cluster itself; skips where it cannot run."""
    monkeypatch.delenv("USE_EXISTING_CLUSTER", raising=False)

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
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster for one test: `start("kwok")`; never an existing one."""
    monkeypatch.delenv("USE_EXISTING_CLUSTER", raising=False)
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
    # An established kind is served a moment later, and explained later still; kubectl looks anew for this list only.
    cluster.wait("the CRD", lambda: "heterorlruns" in cluster.kubectl("api-resources", "--api-group=heterorl.dev"))


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh namespace; its deletion is not waited for."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def running(cluster: Cluster, namespace: str) -> Iterator[operators.OperatorProcess]:
    """An operator for the test's namespace."""
    with operators.operator(cluster, "--namespace", namespace) as process:
        yield process


@pytest.fixture(scope="module")
def run_images(cluster: Cluster) -> None:
    """HeteroRL's images, on the cluster's node."""
    with or_skip():
        if not cluster.node:
            raise Unavailable('images are loaded into a cluster of the level "node", and not into one that exists')
        archive = images.build_archive()
    cluster.node.load_image(archive)


@pytest.fixture
def site(cluster: Cluster, namespace: str, run_images: None) -> Iterator[images.Site]:
    """A namespace in which pods of HeteroRL run."""
    with images.site(cluster, namespace) as made:
        yield made


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs Helm and returns what it prints; CalledProcessError, with what it says, when it fails."""
    with or_skip():
        return helm_in(tmp_path_factory.mktemp("helm"))
