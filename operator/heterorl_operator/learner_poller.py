"""Polls the learners' progress: each learner's first pod, a few times a minute, at its own /metrics.

A pod that does not answer is polled with back-off. Nothing here fails a run.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import urllib3

from heterorl.monitoring.run_metrics import RunProgress, parse_progress
from heterorl.spec.status import keep_end
from heterorl_operator.client import Api, ApiError
from heterorl_operator.resources import RunKey
from heterorl_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

_TIMEOUT = urllib3.Timeout(connect=2.0, read=5.0)
_LARGEST = 4_000_000  # bytes
_LONGEST_PAUSE_S = 300.0
_STALL_RESOLUTION_S = 60.0


@dataclass(frozen=True)
class Target:
    """The pod to poll."""

    pod: str
    uid: str
    ip: str
    port: int


@dataclass(frozen=True)
class PollResult:
    """What a learner last reported."""

    progress: RunProgress | None = None
    unreachable: str = ""
    """Why the last poll failed; empty when it did not."""
    failures: int = 0
    """In a row."""
    at: float = 0.0
    """Monotonic seconds."""


class ProgressPoller:
    """Keeps each learner's last progress. Safe to use from several threads."""

    def __init__(
        self,
        api: Api,
        mode: Literal["pod-ip", "proxy"],
        every_s: float,
        on_change: Callable[[RunKey], None],
        *,
        threads: int = 8,
    ) -> None:
        """`on_change` is called when a learner's progress changes, or it stops answering."""
        self._api, self._mode, self._every_s, self._on_change = api, mode, every_s, on_change
        self._queue = WorkQueue()
        self._targets: dict[RunKey, Target] = {}
        self._results: dict[RunKey, PollResult] = {}
        self._lock = threading.Lock()
        self._jitter = random.Random(1)
        self._pool = urllib3.PoolManager(num_pools=threads, maxsize=1, retries=False)
        self._threads = [threading.Thread(target=self._work, name=f"poll-{n}", daemon=True) for n in range(threads)]

    def start(self) -> None:
        """Begin to poll."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Poll no more."""
        self._queue.close()

    def want(self, key: RunKey, target: Target | None, *, at_rest: bool = False) -> None:
        """From now on poll this pod for the run; None polls none, the last progress stays.

        `at_rest`: no learner is meant to run, so the time since the last step has no meaning any more.
        """
        with self._lock:
            known = self._targets.get(key)
            if target is None:
                self._targets.pop(key, None)
                if result := self._results.get(key):
                    last = replace(result.progress, stalled_s=None) if result.progress and at_rest else result.progress
                    self._results[key] = replace(result, progress=last, unreachable="", failures=0)
                return
            self._targets[key] = target
            if known != target and (result := self._results.get(key)):
                self._results[key] = replace(result, failures=0)  # no back-off for another pod
        if known != target:
            self._queue.add(key)

    def forget(self, key: RunKey) -> None:
        """The run is gone."""
        with self._lock:
            self._targets.pop(key, None)
            self._results.pop(key, None)

    def latest(self, key: RunKey) -> PollResult:
        """The run's last progress; a stall has grown by the time since the poll."""
        with self._lock:
            result = self._results.get(key, PollResult())
        progress = result.progress
        if progress is None or progress.stalled_s is None:
            return result
        stalled_s = progress.stalled_s + time.monotonic() - result.at
        return replace(result, progress=replace(progress, stalled_s=stalled_s))

    def stalled_s(self, key: RunKey) -> float | None:
        """How long ago its last step was; None when that is not known."""
        progress = self.latest(key).progress
        return progress.stalled_s if progress else None

    # ── polling ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def _work(self) -> None:
        while found := self._queue.get():
            key, _ = found
            try:
                self._poll(key)
            except Exception:  # a thread that dies would go unnoticed
                log.exception("%s: polling the learner failed", key)
                self._queue.add_after(key, self._every_s)
            finally:
                self._queue.done(key)

    def _poll(self, key: RunKey) -> None:
        with self._lock:
            target = self._targets.get(key)
        if target is None:
            return
        with self._lock:
            before = self._results.get(key, PollResult())
        try:
            result = PollResult(parse_progress(self._fetch(key, target)), at=time.monotonic())
        except (ApiError, urllib3.exceptions.HTTPError, ValueError) as error:
            why = f"pod {target.pod}: {keep_end(' '.join(str(error).split()), 300)}"
            result = replace(before, unreachable=why, failures=before.failures + 1)
        with self._lock:
            if self._targets.get(key) != target:
                return
            self._results[key] = result
        if _significant(result) != _significant(before):
            self._on_change(key)
        delay = min(self._every_s * 2 ** max(0, result.failures - 1), max(_LONGEST_PAUSE_S, self._every_s))
        self._queue.add_after(key, delay * self._jitter.uniform(0.9, 1.1))

    def _fetch(self, key: RunKey, target: Target) -> str:
        if self._mode == "proxy":
            return self._api.through_proxy(key.namespace, target.pod, target.port, "/metrics")
        host = f"[{target.ip}]" if ":" in target.ip else target.ip
        url = f"http://{host}:{target.port}/metrics"
        answer = self._pool.request("GET", url, timeout=_TIMEOUT, preload_content=False)
        try:
            if answer.status != 200:
                raise ValueError(f"it answered with status {answer.status}")
            return bytes(answer.read(_LARGEST)).decode()
        finally:
            answer.close()  # not drained: it may be endless


def _significant(result: PollResult) -> tuple[RunProgress | None, bool]:
    """What counts when it changes: a stall by the minute, and whether the poll failed but not why."""
    progress = result.progress
    if progress and progress.stalled_s is not None:
        progress = replace(progress, stalled_s=progress.stalled_s // _STALL_RESOLUTION_S)
    return progress, bool(result.unreachable)
