"""The pod of a role: one container with a read-only root, without privileges, with the volume and the spec mounted.

Every pod passes Pod Security `restricted` and has no token for the API server. What the manifest says about pods is
merged in as `kubectl` merges: mappings by key, lists by their key.

| in the manifest | what happens |
|---|---|
| nodeSelector, labels, annotations, resources | key by key; the manifest's value stands (our own keys are refused) |
| env, volumes, imagePullSecrets, volumeMounts | item by item (name, the last by mountPath): one of ours is replaced |
| affinity | key by key, and every list is appended to ours |
| tolerations | appended |
| everything else | the manifest's value stands |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from heterorl.kubernetes.names import RESUMES_ANNOTATION, RUN_LABEL, Object, PodRole, claim_name, config_name, labels
from heterorl.spec.pod_template import PodTemplateSpec
from heterorl.spec.run import HeteroRLRun, RunSpec, SecretKeySpec

VOLUME = "/volume"
"""Where every pod sees the shared volume, which is the run's folder."""
SPEC_FILE = "/etc/heterorl/run.json"
"""Where every pod finds the spec."""
PAGE_PORT = 6070
"""Where the page is served on a learner's pod, to the pod itself alone: `kubectl port-forward` ends there."""
METRICS_PORT = 9400
"""Port of /metrics where the spec leaves it open: pods do not share one, so it need not be any free one."""

KUEUE = "kueue.x-k8s.io/"
_KEYS = {"env": "name", "volumeMounts": "mountPath", "volumes": "name", "imagePullSecrets": "name"}
_CONTAINER = ("env", "volumeMounts", "resources", "image", "imagePullPolicy")
_PROGRAM = ("env", "volumeMounts", "image", "imagePullPolicy")
_WORKLOAD = ("labels", "annotations")
_HOME = "/home/heterorl"
_USER_ID = 1000
_GPU = "nvidia.com/gpu"
_SERVING: tuple[PodRole, ...] = ("learner", "sampler", "evaluation")

_POD_SECURITY: Object = {
    "runAsNonRoot": True,
    "runAsUser": _USER_ID,
    "runAsGroup": _USER_ID,
    "fsGroup": _USER_ID,
    "fsGroupChangePolicy": "OnRootMismatch",  # a volume of many files is not walked at every start
    "seccompProfile": {"type": "RuntimeDefault"},
}
_CONTAINER_SECURITY: Object = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
_REQUESTS: dict[PodRole, Object] = {
    "learner": {"cpu": "250m", "memory": "1Gi"},
    "sampler": {"cpu": "100m", "memory": "512Mi"},
    "prepare": {"cpu": "100m", "memory": "512Mi"},
    "evaluation": {"cpu": "100m", "memory": "512Mi"},
}
"""What each role asks for by default: what the tiny model needs, so that the quickstart fits on one small node."""
_MOUNTS: tuple[Object, ...] = (
    {"name": "exchange", "mountPath": VOLUME},
    {"name": "spec", "mountPath": str(PurePosixPath(SPEC_FILE).parent), "readOnly": True},
    {"name": "tmp", "mountPath": "/tmp"},
    {"name": "home", "mountPath": _HOME},
    {"name": "shm", "mountPath": "/dev/shm"},  # the runtime's own 64 MiB are too few for ranks on one node
)
SERVING: Object = {"tcpSocket": {"port": "metrics"}}
"""Readiness of a pod that serves /metrics once its engine is built: a bare connection, which the kernel accepts even
while Python is busy."""
_ENV: tuple[Object, ...] = (
    {"name": "HOME", "value": _HOME},  # caches of the Hub, Triton and vLLM lie below it
    {"name": "USER", "value": "heterorl"},  # Inductor asks for a name, and the image may have none for the uid
    {"name": "PYTHONUNBUFFERED", "value": "1"},
    {"name": "TOKENIZERS_PARALLELISM", "value": "false"},
    {"name": "TQDM_DISABLE", "value": "1"},  # progress bars make no sense in a log
    {"name": "HETERORL_METRICS_HOST", "value": "::"},
)


def build_pod(
    run: HeteroRLRun,
    role: PodRole,
    image: str,
    program: str,
    given: PodTemplateSpec,
    *,
    arguments: Sequence[str] = (),
    env: Sequence[Object] = (),
    pool: str | None = None,
    gpus: int = 0,
    threads: int = 0,
    readiness: Object | None = None,
    beside: Sequence[Object] = (),
    pull_policy: str | None = None,
    pull_secrets: Sequence[str] = (),
) -> Object:
    """A pod template (`metadata`, `spec`) that runs a program of ours in a container named after the role.

    `program` is a package and one of its programs: `heterorl_learner prepare`. `given` is the manifest's podTemplate.
    `threads` 0 is the container's CPU limit, or the node's cores without one. `readiness` is how the kubelet asks
    whether the pod is ready. `beside` are containers that start before ours and end after it. Nothing kills a pod for
    waiting: the preparation of a large model may take hours.
    """
    container = {
        "name": role,
        "image": image,
        "imagePullPolicy": pull_policy,
        "command": ["python", "-m", *program.split(), "--root", VOLUME, "--spec", SPEC_FILE, *arguments],
        "env": [*_ENV, _threads_env(threads), *_device_env(gpus), *env],
        "ports": [{"name": "metrics", "containerPort": metrics_port(run.spec)}] if role in _SERVING else [],
        "resources": _resources(role, gpus, given),
        "readinessProbe": readiness and {**readiness, "periodSeconds": 10},
        "terminationMessagePolicy": "FallbackToLogsOnError",  # the last lines of its log say why a container failed
        "securityContext": _CONTAINER_SECURITY,
        "volumeMounts": list(_MOUNTS),
    }
    spec = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # The kernel drops a signal to a process 1 that has no handler for it yet: SIGTERM while Python starts.
        "shareProcessNamespace": True,
        "imagePullSecrets": [{"name": secret} for secret in pull_secrets],
        "affinity": {} if "ReadWriteMany" in run.spec.exchange.volume.access_modes else _one_node(run.metadata.name),
        "securityContext": _POD_SECURITY,
        "initContainers": [_without_empty(other) for other in beside],
        "containers": [_without_empty(container)],
        "volumes": _volumes(run),
    }
    metadata: Object = {"labels": labels(run.metadata.name, role, pool)}
    if resumes := run.spec.failure_policy.resumes:
        metadata["annotations"] = {RESUMES_ANNOTATION: str(resumes)}
    return merge_into_pod({"metadata": metadata, "spec": _without_empty(spec)}, given)


def page_container(image: str, given: PodTemplateSpec, pull_policy: str | None) -> Object:
    """`heterorl ui` of the volume, which it mounts read-only: a sidecar, whose end or memory is never the learner's.

    Of the learner's podTemplate (`given`) it follows what a program needs to start: image, env and mounts.
    """
    exchange = {"name": "exchange", "mountPath": VOLUME, "readOnly": True}
    container: Object = {
        "name": "page",
        "image": image,
        "imagePullPolicy": pull_policy,
        "restartPolicy": "Always",
        "command": ["python", "-m", "heterorl", "ui", VOLUME, "--port", str(PAGE_PORT)],
        "env": list(_ENV[:3]),
        "resources": {
            "requests": {"cpu": "10m", "memory": "256Mi"},
            "limits": {"cpu": "1", "memory": "1Gi"},
        },
        "securityContext": _CONTAINER_SECURITY,
        "volumeMounts": [exchange, {"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": _HOME}],
    }
    wishes = {key: value for key, value in _plain(given).items() if key in _PROGRAM and value not in ({}, [])}
    return container | {key: _merged(container[key], wish, _KEYS.get(key)) for key, wish in wishes.items()}


def without_devices(pod: Object) -> Object:
    """The pod without extended resources, as nvidia.com/gpu, which the manifest may ask for by hand."""
    main, *others = pod["spec"]["containers"]
    resources = {
        kind: {name: amount for name, amount in amounts.items() if "/" not in name}
        for kind, amounts in main.get("resources", {}).items()
    }
    main = _without_empty({**main, "resources": _without_empty(resources)})
    return {**pod, "spec": {**pod["spec"], "containers": [main, *others]}}


def metrics_port(spec: RunSpec) -> int:
    """Port of /metrics in the run's pods."""
    return spec.monitoring.prometheus_port or METRICS_PORT


def secret_env(name: str, secret: SecretKeySpec | None) -> list[Object]:
    """An environment variable from a Secret, if one is named."""
    if secret is None:
        return []
    return [{"name": name, "valueFrom": {"secretKeyRef": {"name": secret.name, "key": secret.key}}}]


def _volumes(run: HeteroRLRun) -> list[Object]:
    return [
        {"name": "exchange", "persistentVolumeClaim": {"claimName": claim_name(run)}},
        # As a folder, never by subPath: only so do edits reach running pods.
        {"name": "spec", "configMap": {"name": config_name(run.metadata.name)}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "home", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]


def _one_node(run: str) -> Object:
    """Affinity of all of a run's pods to one node, for a volume that only one node can mount."""
    term = {"labelSelector": {"matchLabels": {RUN_LABEL: run}}, "topologyKey": "kubernetes.io/hostname"}
    return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def _resources(role: PodRole, gpus: int, given: PodTemplateSpec) -> Object:
    """Limits and default requests of a container; the manifest's own requests and limits are merged in later.

    Without any request a pod is BestEffort, the first to be starved and killed. A resource that the manifest limits has
    no default, which could exceed that limit: Kubernetes then takes the limit as the request.
    """
    named = {*given.resources.requests, *given.resources.limits}
    requests = {name: amount for name, amount in _REQUESTS[role].items() if name not in named}
    return _without_empty({"requests": requests, "limits": {_GPU: str(gpus)} if gpus else {}})


def _threads_env(threads: int) -> Object:
    if threads:
        return {"name": "OMP_NUM_THREADS", "value": str(threads)}
    limit = {"resource": "limits.cpu", "divisor": "1"}
    return {"name": "OMP_NUM_THREADS", "valueFrom": {"resourceFieldRef": limit}}


def _device_env(gpus: int) -> list[Object]:
    # Where the device plugin handed out none, images made for GPUs may see all of the node's.
    return [] if gpus else [{"name": "CUDA_VISIBLE_DEVICES", "value": ""}]


def _without_empty(fields: Object) -> Object:
    return {key: value for key, value in fields.items() if value not in (None, {}, [])}


# ── what the manifest says about pods ────────────────────────────────────────────────────────────────────────────────
def merge_into_pod(pod: Object, given: PodTemplateSpec) -> Object:
    """A pod template (`metadata`, `spec`) with the manifest's wishes; those for a container go to the first one.

    Labels of Kueue are left out: it puts its own on the pods of a workload that carries them.
    """
    wishes = {key: value for key, value in _plain(given).items() if value not in ({}, [])}
    metadata = merge_into_metadata(pod["metadata"], given)
    metadata["labels"] = {key: value for key, value in metadata["labels"].items() if not key.startswith(KUEUE)}
    main, *others = pod["spec"]["containers"]
    main, spec = dict(main), dict(pod["spec"])
    for key, wish in wishes.items():
        if key not in _WORKLOAD:
            target = main if key in _CONTAINER else spec
            target[key] = _merged(target.get(key), wish, _KEYS.get(key))
    return {"metadata": metadata, "spec": {**spec, "containers": [main, *others]}}


def merge_into_metadata(metadata: Object, given: PodTemplateSpec) -> Object:
    """A workload's or pod's metadata with the manifest's labels and annotations."""
    annotations = {**metadata.get("annotations", {}), **given.annotations}
    merged = {**metadata, "labels": {**metadata["labels"], **given.labels}}
    return {**merged, "annotations": annotations} if annotations else merged


def _merged(ours: Any, wish: Any, key: str | None) -> Any:
    if isinstance(ours, Mapping) and isinstance(wish, Mapping):
        return {**ours, **{name: _merged(ours.get(name), value, None) for name, value in wish.items()}}
    if isinstance(ours, Sequence) and isinstance(wish, Sequence) and not isinstance(wish, str):
        return _merged_lists(ours, wish, key) if key else [*ours, *wish]
    return wish


def _merged_lists(ours: Sequence[Object], wishes: Sequence[Object], key: str) -> list[Object]:
    """Ours in their order, replaced where a wish has the same key, then the other wishes."""
    by_key = {item[key]: item for item in (*ours, *wishes)}
    return list(by_key.values())


def _plain(given: PodTemplateSpec) -> Object:
    wishes = given.model_dump(mode="json", by_alias=True, exclude_none=True)
    wishes["resources"] = {kind: amounts for kind, amounts in wishes["resources"].items() if amounts}
    return wishes
