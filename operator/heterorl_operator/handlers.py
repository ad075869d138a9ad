"""Puts what kopf's watches report into the cache, and the run it concerns into the queue. Nothing else happens here.

Only `on.event` handlers: they leave no annotation and no finalizer on anything, so that `kubectl delete` works while
the operator is away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import kopf
from kopf._core.reactor.inventory import ResourceMemories, ResourceMemory  # an argument of kopf.operator, and no export

from heterorl.kubernetes.names import RUN_LABEL
from heterorl_operator.cache import ObjectCache
from heterorl_operator.resources import LABELLED, RUN, ResourceKind, RunKey
from heterorl_operator.workqueue import WorkQueue

_BATCH_S = 1.0
"""A run's objects change in bursts: they are reconciled together, and after runs that are new or edited."""


class Watcher:
    """Keeps the cache up to date."""

    def __init__(self, cache: ObjectCache, queue: WorkQueue, on_deleted: Callable[[RunKey, str, str], None]) -> None:
        """`on_deleted` is called with the run, kind and name of an object that is gone, or of the run itself."""
        self._cache, self._queue, self._on_deleted = cache, queue, on_deleted
        self.event_counts = Counter[str]()
        """Events that the watches reported, by kind."""

    def handle(self, kind: ResourceKind, event_type: str | None, body: dict[str, Any]) -> bool:
        """Take in what a watch or list reports, `event_type` DELETED for an object that is gone; whether it was new."""
        if event_type == "DELETED":
            key = self._cache.remove(kind.name, body)
            if key:
                self._on_deleted(key, kind.name, body["metadata"]["name"])
        else:
            key = self._cache.put(kind.name, body)
        if key and kind is RUN:
            self._queue.add(key)
        elif key:
            self._queue.add_after(key, _BATCH_S, urgent=False)
        return key is not None


def registry_for(watcher: Watcher, kinds: Iterable[ResourceKind]) -> kopf.OperatorRegistry:
    """Handlers for what is to be watched."""
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry)(_login)
    for kind in kinds:
        _register(registry, watcher, kind)
    return registry


def _register(registry: kopf.OperatorRegistry, watcher: Watcher, kind: ResourceKind) -> None:
    @kopf.on.event(kind.group, kind.version, kind.plural, registry=registry, id=f"on-{kind.plural}")
    async def on_event(event: Any, **_: Any) -> None:  # async, so that it needs no thread
        watcher.event_counts[kind.name] += 1
        watcher.handle(kind, event["type"], event["object"])


def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_via_client(**kwargs)


def settings() -> kopf.OperatorSettings:
    """The settings of kopf: watches that end and are renewed, only what carries a run's label, nothing written."""
    chosen = kopf.OperatorSettings()
    chosen.scanning.disabled = True  # needs rights on all namespaces and CRDs, for nothing
    chosen.posting.enabled = False
    chosen.watching.server_timeout = 300
    chosen.watching.client_timeout = 330
    chosen.watching.connect_timeout = 10
    chosen.watching.chunk_size = 20  # of each kind a page or two of whole bodies are in memory at once
    chosen.networking.request_timeout = 30
    chosen.queueing.idle_timeout = 0.02  # until then an object's whole body stays in memory
    chosen.persistence.diffbase_storage = _NoDiffs()
    for kind in LABELLED:
        chosen.watching.label_selectors[kind.group, kind.version, kind.plural] = RUN_LABEL
    return chosen


class NoMemories(ResourceMemories):
    """Keeps kopf from remembering a kilobyte of every object: of errors and daemons, of which there are none."""

    async def recall(self, raw_body: Any, **_: Any) -> ResourceMemory:
        """What kopf is told to know of an object each time: nothing."""
        return ResourceMemory()


class _NoDiffs(kopf.DiffBaseStorage):
    """Keeps kopf from copying every object to compute differences that no handler uses; most of its time otherwise."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        return None
