"""Kubernetes events about runs: on transitions only, repeats counted in one event."""

from __future__ import annotations

import hashlib
import logging
import threading
import uuid
from collections import OrderedDict

from heterorl.kubernetes.merge import Object
from heterorl_operator.cache import CachedRun
from heterorl_operator.client import Api, ApiError, NotFound
from heterorl_operator.resources import EVENT, RUN
from heterorl_operator.timestamps import moment

log = logging.getLogger(__name__)

_MESSAGE = 1024  # the API's limit
_REMEMBERED = 4096


class Events:
    """Posts events; a cluster that takes none does not stop a run."""

    def __init__(self, api: Api, component: str) -> None:
        self._api, self._component = api, component
        self._process = uuid.uuid4().hex  # an earlier process's events are not ours to count
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def post(self, run: CachedRun, kind: str, reason: str, message: str, now: float) -> None:
        """Say it once more. `kind` is Normal or Warning."""
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
        """Whether the event was there still; the API server keeps one for an hour."""
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
            "message": message if len(message) <= _MESSAGE else f"{message[: _MESSAGE - 1]}…",
            "source": {"component": "heterorl-operator"},
            "reportingComponent": "heterorl.dev/operator",
            "reportingInstance": self._component,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
