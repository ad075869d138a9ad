"""Why a workload's controller cannot create its pods, from events that are read only when pods are missing.

A StatefulSet and a Job report a refused pod, as for a quota or an admission policy, in an event `FailedCreate` and
nowhere else. To watch the events of thousands of runs would cost more than everything else, so the events of one
workload are listed once its pods have been missing for a while, with back-off. A Deployment has it in its status
(`ReplicaFailure`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from heterorl_operator.cache import CachedChild
from heterorl_operator.client import Api, ApiError
from heterorl_operator.resources import EVENT, RunKey
from heterorl_operator.timestamps import seconds

log = logging.getLogger(__name__)

_PATIENCE_S = 5.0
"""How long pods may be missing before their workload's events are read: most are created within a second."""
_LONGEST_PAUSE_S = 300.0


@dataclass(frozen=True)
class _Known:
    """What is known of a workload whose pods are missing."""

    next_at: float
    """Monotonic seconds of the next list."""
    pause_s: float = _PATIENCE_S
    message: str = ""


class CreateFailures:
    """Safe to use from several threads, one run in one of them."""

    def __init__(self, api: Api, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._clock = api, clock
        self._known: dict[RunKey, dict[str, _Known]] = {}  # by uid of the workload
        self._lock = threading.Lock()

    def messages(self, key: RunKey, missing: dict[CachedChild, str]) -> dict[CachedChild, str]:
        """The API server's words by workload; `missing` are those that lack pods, and when their newest was created."""
        with self._lock:
            before = self._known.pop(key, {})
        after = {child.uid: self._updated(key, child, since, before.get(child.uid)) for child, since in missing.items()}
        if after:
            with self._lock:
                self._known[key] = after
        return {child: after[child.uid].message for child in missing if after[child.uid].message}

    def next_s(self, key: RunKey) -> float | None:
        """When to ask again; None when the run lacks no pods."""
        with self._lock:
            times = [each.next_at for each in self._known.get(key, {}).values()]
        return max(0.0, min(times) - self._clock()) if times else None

    def forget(self, key: RunKey) -> None:
        """The run is gone."""
        with self._lock:
            self._known.pop(key, None)

    def _updated(self, key: RunKey, child: CachedChild, since: str, before: _Known | None) -> _Known:
        now = self._clock()
        if before is None:
            return _Known(now + _PATIENCE_S)
        if now < before.next_at:
            return before
        message = self._newest(key.namespace, child, since)
        pause_s = min(2 * before.pause_s, _LONGEST_PAUSE_S)
        return replace(before, next_at=now + pause_s, pause_s=pause_s, message=message or before.message)

    def _newest(self, namespace: str, child: CachedChild, since: str) -> str:
        """The newest failure of the workload since then; empty when there is none, or events may not be listed."""
        fields = f"reason=FailedCreate,involvedObject.uid={child.uid}"
        try:
            events = list(self._api.list(EVENT, namespace, fields=fields))
        except ApiError as error:
            log.debug("%s %s/%s: its events could not be listed: %s", child.kind, namespace, child.name, error)
            return ""
        found = [(seconds(each.get("lastTimestamp") or each.get("eventTime") or since), each) for each in events]
        at, newest = max(found, key=lambda pair: pair[0], default=(0.0, {}))
        return str(newest.get("message") or "") if at >= seconds(since) else ""
