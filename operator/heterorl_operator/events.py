"""Kubernetes events about runs: on transitions only, repeats counted in one event."""

from __future__ import annotations

import hashlib
import logging
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator

from heterorl.kubernetes.names import Object
from heterorl.spec.status import RunStatus, keep_end
from heterorl_operator.cache import CachedRun
from heterorl_operator.client import Api, ApiError, NotFound
from heterorl_operator.problems import NEEDS_ACTION
from heterorl_operator.resources import EVENT, RUN
from heterorl_operator.timestamps import moment

log = logging.getLogger(__name__)

_MESSAGE = 1024  # bytes, the API's limit
_REMEMBERED = 4096
_MILESTONES = ("Prepared", "LearnerReady", "Succeeded", "Failed", "Suspended")
"""Conditions whose becoming True is an event."""


class Events:
    """Posts events; failing to post one never stops a run."""

    def __init__(self, api: Api, component: str) -> None:
        self._api, self._component = api, component
        self._process = uuid.uuid4().hex  # an earlier process's events are not ours to count
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def post(self, run: CachedRun, kind: str, reason: str, message: str, now: float) -> None:
        """Post an event, or count it once more. `kind` is Normal or Warning."""
        text = f"{self._process}/{run.uid}/{kind}/{reason}/{message}"
        name = f"{run.key.name}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        with self._lock:
            count = self._counts[name] = self._counts.pop(name, 0) + 1
            if len(self._counts) > _REMEMBERED:
                self._counts.popitem(last=False)
        log.info("%s: %s: %s", run.key, reason, message)
        try:
            if count == 1 or not self._is_counted(run, name, count, now):
                self._api.create(EVENT, self._event(run, name, kind, reason, message, moment(now)))
                with self._lock:
                    self._counts[name] = 1
        except ApiError as error:
            with self._lock:
                self._counts.pop(name, None)
            log.debug("%s: no event: %s", run.key, error)

    def _is_counted(self, run: CachedRun, name: str, count: int, now: float) -> bool:
        """Whether the event still existed; the API server keeps one for an hour."""
        try:
            self._api.merge(EVENT, run.key.namespace, name, {"count": count, "lastTimestamp": moment(now)})
        except NotFound:
            return False
        return True

    def _event(self, run: CachedRun, name: str, kind: str, reason: str, message: str, now: str) -> Object:
        involved = {
            "apiVersion": RUN.api_version,
            "kind": RUN.name,
            "namespace": run.key.namespace,
            "name": run.key.name,
            "uid": run.uid,
            "resourceVersion": str(run.resource_version),
        }
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": run.key.namespace},
            "involvedObject": involved,
            "type": kind,
            "reason": reason,
            "message": keep_end(message, _MESSAGE),
            "source": {"component": "heterorl-operator"},
            "reportingComponent": "heterorl.dev/operator",
            "reportingInstance": self._component,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }


def transitions(before: RunStatus, after: RunStatus) -> Iterator[tuple[str, str, str]]:
    """The events of a change of status: (Normal or Warning, reason, message)."""
    known = {each.type: each for each in before.conditions}
    for each in after.conditions:
        earlier = known.get(each.type)
        if earlier and (earlier.status, earlier.reason) == (each.status, each.reason):
            continue
        if each.type in _MILESTONES and each.status == "True":
            yield "Warning" if each.type == "Failed" else "Normal", each.reason, each.message
        elif each.type in ("Suspended", "Failed") and earlier and earlier.status == "True":
            yield "Normal", "Resumed", "the run was resumed"
        elif each.reason in (NEEDS_ACTION if each.type != "Ready" else ("InvalidSpec",)):
            yield "Warning", each.reason, each.message
    yield from _pool_changes(before, after)
    restarts = [(status.learner and status.learner.restarts) or 0 for status in (before, after)]
    if restarts[1] > restarts[0]:
        yield "Warning", "LearnerRestarted", f"the learner crashed; restart {restarts[1]}"


def _pool_changes(before: RunStatus, after: RunStatus) -> Iterator[tuple[str, str, str]]:
    old, new = ({pool.name: pool.desired for pool in status.samplers} for status in (before, after))
    for name in new.keys() - old.keys() if before.samplers else ():
        yield "Normal", "PoolAdded", f"sampler pool {name} is new; if that was a mistake, remove it from spec.samplers"
    for name in old.keys() - new.keys():
        yield "Normal", "PoolRemoved", f"sampler pool {name} is removed, and its samplers with it"
    for name in old.keys() & new.keys():
        if old[name] is not None and old[name] != new[name]:
            yield "Normal", "Scaled", f"sampler pool {name}: {old[name]} to {new[name]} replicas"
