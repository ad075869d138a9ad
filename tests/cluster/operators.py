"""The operator as tests start it, runs as they write them, and what they look for."""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.harness import Cluster, Server, free_ports
from heterorl.monitoring.http import Endpoint
from heterorl.monitoring.run_metrics import RunProgress, to_text

Object = dict[str, Any]
LIMIT_S = 30.0
"""Within which every problem has to show."""


class OperatorProcess(Server):
    """An operator on this machine, with its image's environment; it acts as whoever the kubeconfig says."""

    def __init__(self, cluster: Cluster, name: str, arguments: list[str], kubeconfig: Path) -> None:
        (self.port,) = free_ports(1)
        command = ["env", f"KUBECONFIG={kubeconfig}", "MALLOC_ARENA_MAX=2", sys.executable, "-m", "heterorl_operator"]
        command += ["--release", name, "--host", "127.0.0.1", "--port", str(self.port), "--progress", "pod-ip"]
        command += ["--progress-seconds", "1", *arguments]
        super().__init__(name, command, cluster.folder / "logs" / f"{name}-{self.port}.log")

    def start(self) -> None:
        super().start()
        wait_for(lambda: self.metric("heterorl_operator_synced") == 1.0, "the operator to have looked at every run")

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels; 0 when it is absent."""
        self.check()
        with suppress(OSError):
            text = self._get("/metrics")
            return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
        return 0.0

    def healthy(self) -> bool:
        """What it says of itself."""
        with suppress(OSError):
            return self._get("/healthz") == "ok\n"
        return False

    def memory(self) -> int:
        """Resident memory in bytes."""
        return int(self.metric("process_resident_memory_bytes"))

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return str(answer.read().decode())


@contextmanager
def operator(
    cluster: Cluster, *arguments: str, name: str = "heterorl", kubeconfig: Path | None = None
) -> Iterator[OperatorProcess]:
    """An operator, until the block ends."""
    process = OperatorProcess(cluster, name, list(arguments), kubeconfig or cluster.kubeconfig)
    try:
        process.start()
        yield process
    finally:
        process.stop()


class StandIn:
    """Answers in a learner's place, for pods that only seem to run."""

    def __init__(self, **progress: Any) -> None:
        self.progress = RunProgress(prepared=True, **progress)
        pages = {"/metrics": lambda: (200, "text/plain", to_text(self.progress, "stand-in"))}
        self._endpoint = Endpoint("127.0.0.1", 0, pages)
        self.port = self._endpoint.port

    def spec(self, **learner: Any) -> Object:
        """What a run's spec says so that its learner is asked here."""
        template = {"annotations": {"test/ip": "127.0.0.1"}}
        return {"monitoring": {"prometheusPort": self.port}, "learner": {"podTemplate": template, **learner}}

    def says(self, **progress: Any) -> None:
        """Say something else from now on."""
        self.progress = replace(self.progress, **progress)

    def __enter__(self) -> StandIn:
        self._endpoint.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._endpoint.__exit__(*error)


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def run_manifest(name: str = "run", *, pools: dict[str, Object] | None = None, **spec: Any) -> Object:
    """A run of the tiny model with one sampler pool `near`, or with those given."""
    samplers = [{"name": pool, "engine": "transformers", **more} for pool, more in (pools or {"near": {}}).items()]
    return {
        "apiVersion": "heterorl.dev/v1alpha1",
        "kind": "HeteroRLRun",
        "metadata": {"name": name},
        "spec": {"samplers": samplers, "exchange": {"volume": {"size": "1Gi"}}, **spec},
    }


def apply(cluster: Cluster, namespace: str, manifest: Object) -> None:
    """As a user does."""
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(manifest))


def patch(cluster: Cluster, namespace: str, name: str, spec: Object) -> None:
    """Merge into a run's spec."""
    body = json.dumps({"spec": spec})
    cluster.kubectl("patch", "-n", namespace, f"hrl/{name}", "--type=merge", "-p", body)


def give_volume(cluster: Cluster, namespace: str, run: str = "run") -> None:
    """A PersistentVolume for the claim of a run."""
    claim = {"namespace": namespace, "name": f"{run}-volume"}
    spec = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "claimRef": claim}
    spec |= {"hostPath": {"path": "/tmp"}, "persistentVolumeReclaimPolicy": "Retain"}
    volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{namespace}-{run}"}, "spec": spec}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(volume))


# ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def wait_for(look: Callable[[], Any], what: str, limit_s: float = LIMIT_S, every_s: float = 0.1) -> Any:
    """What `look` returns once it is truthy."""
    deadline = time.monotonic() + limit_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {limit_s:g} s for {what}"
        time.sleep(every_s)
    return found


def get(cluster: Cluster, namespace: str, kind: str, name: str) -> Object | None:
    """An object; None when it is not there."""
    printed = cluster.kubectl("get", "-n", namespace, kind, name, "-o", "json", "--ignore-not-found")
    return dict(json.loads(printed)) if printed else None


def listed(cluster: Cluster, namespace: str, kinds: str, selector: str = "heterorl.dev/run") -> dict[str, Object]:
    """Objects by `Kind/name`."""
    printed = json.loads(cluster.kubectl("get", "-n", namespace, kinds, "-l", selector, "-o", "json"))
    return {f"{each['kind']}/{each['metadata']['name']}": each for each in printed["items"]}


def status(cluster: Cluster, namespace: str, name: str = "run") -> Object:
    """A run's status; empty before it has one."""
    found = get(cluster, namespace, "hrl", name)
    return found.get("status", {}) if found else {}


def condition(cluster: Cluster, namespace: str, kind: str, name: str = "run") -> Object:
    """One of a run's conditions; empty before it is there."""
    conditions = status(cluster, namespace, name).get("conditions", [])
    return next((each for each in conditions if each["type"] == kind), {})


def wait_for_state(cluster: Cluster, namespace: str, state: str, name: str = "run", limit_s: float = LIMIT_S) -> Object:
    """The status once the run is in that state."""
    wait_for(lambda: status(cluster, namespace, name).get("state") == state, f"{name} to be {state}", limit_s)
    return status(cluster, namespace, name)


def wait_for_reason(
    cluster: Cluster, namespace: str, kind: str, reason: str, name: str = "run", limit_s: float = LIMIT_S
) -> Object:
    """A condition once it has that reason."""

    def found() -> Object | None:
        told = condition(cluster, namespace, kind, name)
        return told if told.get("reason") == reason else None

    told: Object = wait_for(found, f"{kind} of {name} to say {reason}", limit_s)
    return told


def replicas(cluster: Cluster, namespace: str, name: str, kind: str = "deployment") -> int | None:
    """Replicas a workload asks for; None when it is not there."""
    found = get(cluster, namespace, kind, name)
    return found["spec"]["replicas"] if found else None


def reasons(cluster: Cluster, namespace: str, name: str = "run") -> list[str]:
    """Reasons of the events about a run, in no order."""
    selector = f"involvedObject.kind=HeteroRLRun,involvedObject.name={name}"
    printed = cluster.kubectl("get", "events", "-n", namespace, "--field-selector", selector, "-o", "json")
    return [each["reason"] for each in json.loads(printed)["items"]]


def children_names(run: str = "run", pools: tuple[str, ...] = ("near",)) -> set[str]:
    """What a run has, but for its preparation, whose name holds a hash."""
    names = {f"ConfigMap/{run}-config", f"PersistentVolumeClaim/{run}-volume", f"Service/{run}-learner"}
    return names | {f"StatefulSet/{run}-learner"} | {f"Deployment/{run}-sampler-{pool}" for pool in pools}


CHILDREN = "configmaps,persistentvolumeclaims,services,statefulsets,deployments"
