"""The test cluster itself: each level does what it is for, and nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import node
from cluster.harness import Cluster

TESTS = Path(__file__).parents[1]


def wait_for(look: Callable[[], bool], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not look():
        assert time.monotonic() < deadline, f"not so within {limit_s:g} s"
        time.sleep(0.2)


def pod_spec(**others: Any) -> dict[str, Any]:
    return {"containers": [{"name": "pause", "image": "localhost/pause:1", "imagePullPolicy": "Never"}], **others}


def deployment(name: str, replicas: int) -> str:
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": pod_spec()}
    spec = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
    return json.dumps({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec})


def traces_of(folder: Path) -> list[str]:
    """What there is of a cluster outside of its folder: processes, mounts, control groups, interfaces."""
    processes = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    found = [command[0] for command in processes if any(str(folder) in part for part in command)]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line]
    found += [str(path) for at in ("", "*/") for path in node.CONTROL_GROUPS.glob(f"{at}{folder.name}")]  # v2 and v1
    return found + [name for name in psutil.net_if_addrs() if name == node.LINK]


def control_groups_of_containers() -> set[Path]:
    """Where containerd puts containers that it is not told a place for."""
    return set(node.CONTROL_GROUPS.glob("**/k8s.io/*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("level", ["apiserver", "node"])
def test_nothing_outlives_the_program_that_started_it(needs, start, level, number):
    programs = needs(level)
    containers_before = control_groups_of_containers()
    command = [sys.executable, "-m", "cluster.harness", level]
    with subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, text=True, start_new_session=True) as harness:
        assert harness.stdout
        line = harness.stdout.readline().strip()
        assert line.startswith("export KUBECONFIG=")
        folder = Path(line.removeprefix("export KUBECONFIG=")).parent
        if level == "node":  # with pods on it
            kubectl = [programs["kubectl"], f"--kubeconfig={folder}/admin.kubeconfig"]
            subprocess.run([*kubectl, "apply", "-f", "-"], input=deployment("web", 2), text=True, check=True)
            subprocess.run([*kubectl, "rollout", "status", "deployment/web", "--timeout=60s"], check=True)
        assert len(traces_of(folder)) >= 2
        os.kill(harness.pid, number)
    if number == signal.SIGKILL:
        wait_for(lambda: all("cgroup" in trace for trace in traces_of(folder)), 20)
        start("apiserver")  # a new one removes what nobody could
    assert traces_of(folder) == []
    assert control_groups_of_containers() <= containers_before
    assert not folder.exists()


def test_api_server_comes_back_with_its_data(start):
    cluster = start("apiserver")
    cluster.kubectl("create", "configmap", "kept")
    cluster.restart("kube-apiserver")
    assert "kept" in cluster.kubectl("get", "configmaps")


def test_audit_log_holds_every_request(start):
    cluster = start("apiserver", audit=True)
    cluster.kubectl("create", "configmap", "seen")
    entries = [json.loads(line) for line in cluster.audit_log.read_text().splitlines()]
    created = [
        entry for entry in entries if entry["verb"] == "create" and entry["objectRef"]["resource"] == "configmaps"
    ]
    assert any(entry["objectRef"].get("name") == "seen" for entry in created)


def test_a_server_that_ends_is_reported_with_its_log(start):
    cluster = start("apiserver")
    cluster.servers["etcd"].kill()
    with pytest.raises(RuntimeError, match="etcd ended with -9"):
        cluster.wait("never", lambda: False)


def test_an_existing_cluster_is_used_and_left_running(start, monkeypatch):
    cluster = start("apiserver")
    monkeypatch.setenv("USE_EXISTING_CLUSTER", "true")
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    with Cluster("controllers") as existing:
        existing.kubectl("create", "namespace", "made-there")
        assert not existing.servers
    assert "made-there" in cluster.kubectl("get", "namespaces")


def test_controllers_make_and_remove_children(start):
    cluster = start("controllers")
    cluster.kubectl("apply", "-f", "-", stdin=deployment("web", 2))
    wait_for(lambda: len(cluster.kubectl("get", "pods", "-o", "name").split()) == 2)
    cluster.kubectl("delete", "deployment", "web", "--wait=false")
    wait_for(lambda: not cluster.kubectl("get", "replicasets,pods", "-o", "name"))


def test_kwok_runs_pods_and_ends_jobs(start):
    cluster = start("kwok")
    cluster.kubectl("apply", "-f", "-", stdin=deployment("web", 3))
    cluster.kubectl("rollout", "status", "deployment/web", "--timeout=60s")
    cluster.kubectl("create", "job", "once", "--image=localhost/pause:1")
    cluster.kubectl("wait", "--for=condition=Complete", "job/once", "--timeout=60s")
    cluster.kubectl("delete", "deployment/web", "job/once", "--cascade=foreground", "--timeout=60s")
    assert not cluster.kubectl("get", "pods", "-o", "name")
