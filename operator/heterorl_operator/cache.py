"""The latest known state of every run, and of every object and pod that belongs to one.

Fed by kopf's watches, by lists and by the answers to writes. An older state never replaces a newer one, and a late
answer does not bring back what was deleted. There may be tens of thousands of objects, so of each only the few fields
that the operator needs are kept, and repeated strings are interned.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from sys import intern
from typing import Any, NamedTuple

from heterorl.kubernetes.names import HASH_ANNOTATION, POOL_LABEL, RESUMES_ANNOTATION, ROLE_LABEL, RUN_LABEL, Object
from heterorl.spec.status import keep_end
from heterorl_operator.resources import CLAIM, CONFIG_MAP, JOB, POD, RUN, SERVICE, ResourceKind, RunKey

OPERATOR_ANNOTATION = "heterorl.dev/operator"
"""On every object: the field manager of the operator that manages it."""

_MESSAGE = 2048  # bytes of a message that are kept
_REMEMBERED = 20_000  # deleted objects


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class CachedChild:
    """An object that belongs to a run."""

    kind: str
    name: str
    uid: str
    resource_version: int
    spec_version: str
    """Changes with its spec; empty for kinds that do not show it."""
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
    """Of a Job that failed: why. Of a Deployment whose pods cannot be created: the API server's words."""


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
    resumes: int
    """`failurePolicy.resumes` of the template that it was made from."""


@dataclass(frozen=True, slots=True)
class CachedRun:
    """A HeteroRLRun; spec and status stay JSON until they are needed."""

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


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────
class ObjectVersion(NamedTuple):
    """Which version of an object is known."""

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
        self.unreadable: dict[ResourceKind, str] = {}
        """Kinds that the operator has no right to list, with the API server's message."""

    def put(self, kind: str, body: Object) -> RunKey | None:
        """Take in an object as it is now; the run it concerns if that is new, else None."""
        key, metadata = key_of(kind, body), body["metadata"]
        if key is None:
            return None
        with self._lock:
            # An object that lost its label looks deleted, and may get it back later.
            if int(metadata["resourceVersion"]) <= self._gone.get(metadata["uid"], 0):
                return None
            place, name = self._slot(kind, key, metadata["name"])
            known = place.get(name)
            if known and known.resource_version >= int(metadata["resourceVersion"]):
                return None
            place[name] = record_of(kind, key, body)
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
            return {name: each for name, each in found.items() if isinstance(each, CachedChild)}

    def pods(self, key: RunKey) -> list[CachedPod]:
        """The run's pods by name."""
        with self._lock:
            found = list(self._objects.get(key, {}).values())
        return sorted((each for each in found if isinstance(each, CachedPod)), key=lambda pod: pod.name)

    def versions(self, kind: str) -> dict[str, ObjectVersion]:
        """Every known object of a kind, by uid."""
        with self._lock:
            if kind == RUN.name:
                return {run.uid: ObjectVersion(run.resource_version, key, key.name) for key, run in self._runs.items()}
            return {
                each.uid: ObjectVersion(each.resource_version, key, name)
                for key, objects in self._objects.items()
                for (of_kind, name), each in objects.items()
                if of_kind == kind
            }

    def _slot(self, kind: str, key: RunKey, name: str) -> tuple[dict[Any, Any], Any]:
        if kind == RUN.name:
            return self._runs, key
        return self._objects.setdefault(key, {}), (kind, name)


def tombstone(uid: str, known: ObjectVersion) -> Object:
    """The body to give `ObjectCache.remove` for an object whose deletion no watch reported."""
    metadata = {"uid": uid, "namespace": known.run.namespace, "name": known.name, "labels": {RUN_LABEL: known.run.name}}
    return {"metadata": {**metadata, "resourceVersion": str(known.resource_version)}}


# ── from the API server's objects to records ─────────────────────────────────────────────────────────────────────────
CachedObject = CachedRun | CachedChild | CachedPod


def key_of(kind: str, body: Object) -> RunKey | None:
    """The run an object concerns; None when it carries no run's label."""
    metadata = body["metadata"]
    if kind == RUN.name:
        return RunKey(metadata["namespace"], metadata["name"])
    run = (metadata.get("labels") or {}).get(RUN_LABEL)
    return RunKey(intern(metadata["namespace"]), run) if run else None


def child_of(kind: str, body: Object) -> CachedChild:
    """A child's record."""
    metadata, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
    annotations = metadata.get("annotations") or {}
    phase, message = _outcome(kind, status)
    return CachedChild(
        kind=intern(kind),
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=int(metadata["resourceVersion"]),
        spec_version=spec_version_of(kind, body),
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


def belongs_to(child: CachedChild, run: CachedRun) -> bool:
    """Whether the object is this run's, and not an earlier run's of the same name or another owner's."""
    if child.owner_uid is None and child.kind == CLAIM.name:
        return child.run == run.key.name  # a retained claim has no owner, so that it outlives its run
    return child.owner_uid == run.uid


def spec_version_of(kind: str, body: Object) -> str:
    """Changes with the object's spec: its generation, or the nearest equivalent.

    A ConfigMap and a Service have no generation, and no controller writes to them. A claim has none either, but its
    binding is written to it, so its resource version says nothing about its spec.
    """
    metadata = body["metadata"]
    if kind in (CONFIG_MAP.name, SERVICE.name):
        return str(metadata["resourceVersion"])
    return str(metadata.get("generation", ""))


def record_of(kind: str, key: RunKey, body: Object) -> CachedObject:
    """The record of any object of a run, or of the run itself."""
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
    # Ours is named after the role; others are sidecars that the cluster injects, as a service mesh does.
    container: Object = next((each for each in status.get("containerStatuses") or [] if each["name"] == role), {})
    waiting = _waiting(container, status.get("initContainerStatuses") or [])
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
        unschedulable=_kept(scheduled) if scheduled.get("reason") == "Unschedulable" else "",
        waiting=(intern(waiting.get("reason", "")), _kept(waiting)),
        exit_code=ended.get("exitCode"),
        exit_reason=intern(ended.get("reason", "")),
        exit_message=_kept(ended),
        restarts=container.get("restartCount", 0),
        resumes=_resumes(metadata.get("annotations") or {}),
    )


def _waiting(container: Object, before: list[Object]) -> Object:
    """What our container waits for; while one that is started before it has no image or cannot start, that."""
    waiting: Object = container.get("state", {}).get("waiting", {})
    if waiting.get("reason") != "PodInitializing":
        return waiting
    others = (each.get("state", {}).get("waiting") for each in before)
    return next((other for other in others if other and other["reason"] != "PodInitializing"), waiting)


def _outcome(kind: str, status: Object) -> tuple[str, str]:
    """A child's phase, and why it failed or cannot create its pods."""
    holding = {each["type"]: each for each in status.get("conditions") or [] if each["status"] == "True"}
    if kind == JOB.name:
        return next(((end, _kept(holding[end])) for end in ("Complete", "Failed") if end in holding), ("", ""))
    return status.get("phase", ""), _kept(holding.get("ReplicaFailure", {}))


def _kept(part: Object) -> str:
    """The message of a part of a status, in bounds."""
    return keep_end(part.get("message") or "", _MESSAGE)


def _resumes(annotations: Object) -> int:
    text = annotations.get(RESUMES_ANNOTATION, "")
    return int(text) if text.isdecimal() else 0


def _controller(metadata: Object) -> str | None:
    owners = metadata.get("ownerReferences") or []
    return _interned(next((owner["uid"] for owner in owners if owner.get("controller")), None))


def _interned(text: str | None) -> str | None:
    return None if text is None else intern(text)
