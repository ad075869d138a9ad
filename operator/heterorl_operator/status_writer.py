"""Writes a run's status when it has changed, and an event for each transition."""

from __future__ import annotations

from collections.abc import Callable

from heterorl.kubernetes.names import Object
from heterorl.spec.status import RunStatus
from heterorl_operator.cache import CachedRun, ObjectCache, ObjectVersion, tombstone
from heterorl_operator.client import Api, NotFound
from heterorl_operator.events import Events, transitions
from heterorl_operator.resources import RUN, RunKey


class StatusWriter:
    """Safe to use from several threads, one run in one of them."""

    def __init__(self, api: Api, cache: ObjectCache, events: Events, requeue: Callable[[RunKey], None]) -> None:
        """`requeue` is called for a run whose spec turns out to have changed meanwhile."""
        self._api, self._cache, self._events, self._requeue = api, cache, events, requeue
        self._foreign: dict[RunKey, str] = {}  # runs of another operator, and its field manager

    def write(self, run: CachedRun, before: RunStatus, after: RunStatus, now: float) -> None:
        """Write the status if it differs from what is there; then post events."""
        status = after.model_dump(mode="json", by_alias=True, exclude_none=True)
        if status == run.previous_status or not self._write(run, status):
            return
        for kind, reason, message in transitions(before, after):
            self._events.post(run, kind, reason, message, now)

    def report_foreign(self, run: CachedRun, operator: str, now: float) -> None:
        """Post, once, that another operator manages the run."""
        if self._foreign.get(run.key) == operator:
            return
        self._foreign[run.key] = operator
        message = (
            f"operator {operator} manages this run; {self._api.manager} leaves it alone. Uninstall one of"
            " them, or give them different namespaces (watch.namespaces); to hand runs over, set takeOver: true for the"
            " new one"
        )
        self._events.post(run, "Warning", "ManagedByAnotherOperator", message, now)

    def forget(self, key: RunKey) -> None:
        """The run is gone."""
        self._foreign.pop(key, None)

    def _write(self, run: CachedRun, status: Object) -> bool:
        """Whether the run still existed."""
        key = run.key
        try:
            written = self._api.apply_status(RUN, key.namespace, key.name, status)
            is_other = written["metadata"]["uid"] != run.uid
            if is_other:  # a status takes no precondition, so it is removed again from another run of the name
                written = self._api.apply_status(RUN, key.namespace, key.name, {})
        except NotFound:
            # So that no more objects are created for it.
            self._cache.remove(RUN.name, tombstone(run.uid, ObjectVersion(run.resource_version, key, key.name)))
            return False
        self._cache.put(RUN.name, written)
        if is_other or written["metadata"]["generation"] != run.generation:
            self._requeue(key)  # the cache has the change already, so the watch's event will not count as new
        return not is_other
