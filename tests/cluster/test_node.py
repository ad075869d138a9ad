"""Pods that really run: on the network, with logs, names, accounts and claims, and nothing left of them at the end."""

from __future__ import annotations

import json
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import node

CLUSTER = {"level": "node"}

# CoreDNS as the pods' program: it talks to the API server as pods do, and says so on /ready.
PROGRAM_IMAGE = "localhost/coredns:1"
COREFILE = "cluster.local {\n  kubernetes\n  ready :8181\n}\n"


@pytest.fixture(scope="module")
def program_image(cluster, tmp_path_factory) -> str:
    archive = tmp_path_factory.mktemp("image") / "coredns.tar"
    node.write_image(archive, PROGRAM_IMAGE, cluster.programs["coredns"])
    cluster.node.load_image(archive)
    return PROGRAM_IMAGE


@pytest.fixture
def world_readable() -> Iterator[Path]:
    """A folder that a pod's user can read; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def restricted(container: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A pod's spec that Pod Security `restricted` admits."""
    security = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {"imagePullPolicy": "Never", "securityContext": security, **container}
    return {"containers": [container], **others}


def apply(cluster, namespace: str, kind: str, name: str, version: str = "v1", **body: Any) -> None:
    document = {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": {"app": name}}, **body}
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(document))


def test_a_restricted_pod_uses_the_api_its_claim_and_answers_the_proxy(
    cluster, namespace, program_image, world_readable
):
    cluster.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    cluster.kubectl(
        "create", "clusterrolebinding", namespace, "--clusterrole=view", f"--serviceaccount={namespace}:default"
    )
    (world_readable / "Corefile").write_text(COREFILE)
    size = {"storage": "1Mi"}
    access = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    path = {"capacity": size, "hostPath": {"path": str(world_readable)}, "persistentVolumeReclaimPolicy": "Retain"}
    apply(cluster, namespace, "PersistentVolume", namespace, spec={**access, **path})
    apply(
        cluster,
        namespace,
        "PersistentVolumeClaim",
        "data",
        spec={**access, "resources": {"requests": size}, "volumeName": namespace},
    )
    container = {
        "name": "program",
        "image": program_image,
        "args": ["-conf", "/data/Corefile", "-dns.port", "5353"],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        "resources": {"limits": {"memory": "256Mi", "cpu": "500m"}},
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
    }
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
    apply(cluster, namespace, "Pod", "program", spec=restricted(container, volumes=volumes))
    cluster.kubectl("wait", "-n", namespace, "pod/program", "--for=condition=Ready", "--timeout=60s")
    assert "CoreDNS-" in cluster.kubectl("logs", "-n", namespace, "program")
    assert cluster.kubectl("get", "--raw", f"/api/v1/namespaces/{namespace}/pods/program:8181/proxy/ready") == "OK"
    cluster.kubectl("delete", "-n", namespace, "pod/program", "--timeout=60s")


def test_pods_of_a_stateful_set_have_names(cluster, namespace):
    apply(cluster, namespace, "Service", "set", spec={"clusterIP": "None", "selector": {"app": "set"}})
    template = {
        "metadata": {"labels": {"app": "set"}},
        "spec": restricted({"name": "pause", "image": node.PAUSE_IMAGE}),
    }
    spec = {"serviceName": "set", "replicas": 2, "podManagementPolicy": "Parallel"}
    spec |= {"selector": {"matchLabels": {"app": "set"}}, "template": template}
    apply(cluster, namespace, "StatefulSet", "set", version="apps/v1", spec=spec)
    cluster.kubectl("rollout", "status", "-n", namespace, "statefulset/set", "--timeout=60s")
    address = cluster.kubectl("get", "pod", "-n", namespace, "set-1", "-o", "jsonpath={.status.podIP}")
    cluster.wait("the name", lambda: lookup(f"set-1.set.{namespace}.svc.cluster.local") == address, 30)
    assert lookup("example.org") is None


def lookup(name: str) -> str | None:
    """The address that the cluster's name server gives for a name; None for none."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    question = labels + b"\0" + struct.pack(">HH", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(5)
        udp.sendto(struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + question, (node.DNS_ADDRESS, 53))
        answer = udp.recv(512)
    (answers,) = struct.unpack(">H", answer[6:8])
    return socket.inet_ntoa(answer[-4:]) if answers else None
