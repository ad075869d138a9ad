"""The latest known state of every run, and of every object and pod that belongs to one.

Fed by kopf's watches, by lists and by the answers to writes. An older state never replaces a newer one, and a late
answer does not bring back what was deleted.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

from heterorl.kubernetes.merge import Object
from heterorl.kubernetes.names import RUN_LABEL
from heterorl_operator.objects import CachedChild, CachedPod, CachedRun, key_of, record_of
from heterorl_operator.resources import RUN, ResourceKind, RunKey

_REMEMBERED = 20_000  # deleted objects


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
