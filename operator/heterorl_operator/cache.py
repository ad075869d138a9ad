"""What the operator has seen: every run, and the few facts it needs of every object and pod that belongs to one.

Fed by kopf's watches and by lists of its own. It holds thousands of objects, so they are boiled down at the door. An
older state never replaces a newer one, and what was deleted does not come back by a late answer.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from sys import intern
from typing import Any, NamedTuple

from heterorl.kubernetes.merge import Object
from heterorl.kubernetes.names import HASH_ANNOTATION, POOL_LABEL, ROLE_LABEL, RUN_LABEL
from heterorl_operator.resources import CONFIG_MAP, JOB, POD, RUN, SERVICE
from heterorl_operator.workqueue import RunKey

OPERATOR_ANNOTATION = "heterorl.dev/operator"
"""On every object: the field manager of the operator that keeps it."""

_REMEMBERED = 20_000  # deleted objects
_MESSAGE = 1024


@dataclass(frozen=True, slots=True)
class CachedChild:
    """An object that belongs to a run."""

    kind: str
    name: str
    uid: str
    resource_version: int
    mark: str
    """Changes when somebody changes what it asks for; empty for kinds that do not tell."""
    owner_uid: str | None
    """Of its controller."""
    rendered: str
    """The hash of what was applied, as its annotation says."""
    run: str
    """As its label says."""
    operator: str | None
    created: str
    deleting: bool
    wanted: int
    """Replicas it asks for."""
    ready: int
    """Replicas that are ready."""
    phase: str
    """A claim's phase; of a Job `Complete`, `Failed` or empty."""
    message: str
    """Of a Job that failed: why."""


@dataclass(frozen=True, slots=True)
class CachedPod:
    """A pod of a run."""

    name: str
    uid: str
    resource_version: int
    role: str
    pool: str
    owner_uid: str | None
    phase: str
    ip: str
    ready: bool
    deleting: bool
    created: str
    unschedulable: str
    """The scheduler's message when no node fits."""
    waiting: tuple[str, str]
    """Reason and message of a container that does not start."""
    exit_code: int | None
    """Of the container's last end."""
    exit_reason: str
    exit_message: str
    """The last lines it logged."""
    restarts: int


@dataclass(frozen=True, slots=True)
class CachedRun:
    """A HeteroRLRun; spec and status stay text until somebody looks at them."""

    key: RunKey
    uid: str
    generation: int
    resource_version: int
    created: str
    deleting: bool
    manifest: bytes
    status: bytes

    @property
    def previous_status(self) -> Object:
        """The status as last written."""
        return dict(json.loads(self.status))


Seen = CachedRun | CachedChild | CachedPod


class Mark(NamedTuple):
    """How new what was seen of an object is."""

    resource_version: int
    run: RunKey
    name: str


class ObjectCache:
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[RunKey, CachedRun] = {}
        self._objects: dict[RunKey, dict[tuple[str, str], CachedChild | CachedPod]] = {}
        self._gone: OrderedDict[str, int] = OrderedDict()  # uid: resource version of the deletion

    def put(self, kind: str, body: Object) -> RunKey | None:
        """Take in an object as it is now; the run it concerns if that is news, else None."""
        key, metadata = key_of(kind, body), body["metadata"]
        if key is None:
            return None
        with self._lock:
            # What lost its label looks deleted, and may get it back later.
            if int(metadata["resourceVersion"]) <= self._gone.get(metadata["uid"], 0):
                return None
            place, name = self._slot(kind, key, metadata["name"])
            known = place.get(name)
            if known and known.resource_version >= int(metadata["resourceVersion"]):
                return None
            place[name] = _boiled_down(kind, key, body)
        return key

    def remove(self, kind: str, body: Object) -> RunKey | None:
        """An object was deleted; the run it concerns."""
        key, metadata = key_of(kind, body), body["metadata"]
        if key is None:
            return None
        with self._lock:
            self._gone[metadata["uid"]] = int(metadata["resourceVersion"])
            if len(self._gone) > _REMEMBERED:
                self._gone.popitem(last=False)
            place, name = self._slot(kind, key, metadata["name"])
            if (known := place.get(name)) and known.uid == metadata["uid"]:
                del place[name]
            if not self._objects.get(key, True):
                del self._objects[key]
        return key

    def run(self, key: RunKey) -> CachedRun | None:
        """The run, unless it is unknown or gone."""
        with self._lock:
            return self._runs.get(key)

    def run_keys(self) -> list[RunKey]:
        """Every run."""
        with self._lock:
            return list(self._runs)

    def children(self, key: RunKey) -> dict[tuple[str, str], CachedChild]:
        """The run's objects by kind and name."""
        with self._lock:
            found = self._objects.get(key, {})
            return {name: seen for name, seen in found.items() if isinstance(seen, CachedChild)}

    def pods(self, key: RunKey) -> list[CachedPod]:
        """The run's pods, oldest name first."""
        with self._lock:
            found = list(self._objects.get(key, {}).values())
        return sorted((seen for seen in found if isinstance(seen, CachedPod)), key=lambda pod: pod.name)

    def seen(self, kind: str) -> dict[str, Mark]:
        """Every known object of a kind, by uid."""
        with self._lock:
            if kind == RUN.name:
                return {run.uid: Mark(run.resource_version, key, key.name) for key, run in self._runs.items()}
            return {
                each.uid: Mark(each.resource_version, key, name)
                for key, objects in self._objects.items()
                for (of_kind, name), each in objects.items()
                if of_kind == kind
            }

    def _slot(self, kind: str, key: RunKey, name: str) -> tuple[dict[Any, Any], Any]:
        if kind == RUN.name:
            return self._runs, key
        return self._objects.setdefault(key, {}), (kind, name)


def remains(uid: str, mark: Mark) -> Object:
    """What `Store.remove` needs of an object that is gone without a watch's word."""
    metadata = {"uid": uid, "namespace": mark.run.namespace, "name": mark.name, "labels": {RUN_LABEL: mark.run.name}}
    return {"metadata": {**metadata, "resourceVersion": str(mark.resource_version)}}


def key_of(kind: str, body: Object) -> RunKey | None:
    """The run an object concerns; None when it carries no run's label."""
    metadata = body["metadata"]
    if kind == RUN.name:
        return RunKey(metadata["namespace"], metadata["name"])
    run = (metadata.get("labels") or {}).get(RUN_LABEL)
    return RunKey(intern(metadata["namespace"]), run) if run else None


def child_of(kind: str, body: Object) -> CachedChild:
    """An object, boiled down."""
    metadata, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
    annotations = metadata.get("annotations") or {}
    phase, message = _job_end(status) if kind == JOB.name else (status.get("phase", ""), "")
    return CachedChild(
        kind=intern(kind),
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=int(metadata["resourceVersion"]),
        mark=mark_of(kind, body),
        owner_uid=_controller(metadata),
        rendered=annotations.get(HASH_ANNOTATION, ""),
        run=(metadata.get("labels") or {}).get(RUN_LABEL, ""),
        operator=_interned(annotations.get(OPERATOR_ANNOTATION)),
        created=metadata["creationTimestamp"],
        deleting="deletionTimestamp" in metadata,
        wanted=spec.get("replicas") or 0,
        ready=status.get("readyReplicas") or 0,
        phase=intern(phase),
        message=message,
    )


def mark_of(kind: str, body: Object) -> str:
    """What changes when somebody changes what the object asks for: its generation, or whatever is nearest to it.

    A ConfigMap and a Service have no generation, and nobody reports in them. A claim has none either, but its binding
    is reported in it, so it tells nothing.
    """
    metadata = body["metadata"]
    if kind in (CONFIG_MAP.name, SERVICE.name):
        return str(metadata["resourceVersion"])
    return str(metadata.get("generation", ""))


def _boiled_down(kind: str, key: RunKey, body: Object) -> Seen:
    if kind == RUN.name:
        return _run(key, body)
    return _pod(body) if kind == POD.name else child_of(kind, body)


def _run(key: RunKey, body: Object) -> CachedRun:
    metadata = body["metadata"]
    manifest = {
        "apiVersion": RUN.api_version,
        "kind": RUN.name,
        "metadata": {"name": key.name, "namespace": key.namespace},
        "spec": body.get("spec") or {},
    }
    return CachedRun(
        key=key,
        uid=metadata["uid"],
        generation=metadata["generation"],
        resource_version=int(metadata["resourceVersion"]),
        created=metadata["creationTimestamp"],
        deleting="deletionTimestamp" in metadata,
        manifest=json.dumps(manifest).encode(),
        status=json.dumps(body.get("status") or {}).encode(),
    )


def _pod(body: Object) -> CachedPod:
    metadata, status = body["metadata"], body.get("status") or {}
    labels = metadata.get("labels") or {}
    conditions = {each["type"]: each for each in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled", {})
    role = intern(labels.get(ROLE_LABEL, ""))
    # Ours is named after the role; others are what a cluster puts beside it, as a mesh's proxy.
    container: Object = next((each for each in status.get("containerStatuses") or [] if each["name"] == role), {})
    waiting = container.get("state", {}).get("waiting", {})
    ended = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated") or {}
    return CachedPod(
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=int(metadata["resourceVersion"]),
        role=role,
        pool=intern(labels.get(POOL_LABEL, "")),
        owner_uid=_controller(metadata),
        phase=intern(status.get("phase", "")),
        ip=status.get("podIP", ""),
        ready=conditions.get("Ready", {}).get("status") == "True",
        deleting="deletionTimestamp" in metadata,
        created=metadata["creationTimestamp"],
        unschedulable=scheduled.get("message", "") if scheduled.get("reason") == "Unschedulable" else "",
        waiting=(intern(waiting.get("reason", "")), waiting.get("message", "")[:_MESSAGE]),
        exit_code=ended.get("exitCode"),
        exit_reason=intern(ended.get("reason", "")),
        exit_message=ended.get("message", "")[-_MESSAGE:],
        restarts=container.get("restartCount", 0),
    )


def _job_end(status: Object) -> tuple[str, str]:
    ends = (each for each in status.get("conditions") or [] if each["status"] == "True")
    return next(((e["type"], e.get("message", "")) for e in ends if e["type"] in ("Complete", "Failed")), ("", ""))


def _controller(metadata: Object) -> str | None:
    owners = metadata.get("ownerReferences") or []
    return _interned(next((owner["uid"] for owner in owners if owner.get("controller")), None))


def _interned(text: str | None) -> str | None:
    return None if text is None else intern(text)
