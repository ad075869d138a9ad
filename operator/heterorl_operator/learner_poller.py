"""Asks the learners how far they are: each learner's first pod, a few times a minute, at its own /metrics.

A pod that does not answer is asked ever more rarely. Nothing here fails a run.
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
from heterorl_operator.client import Api, ApiError
from heterorl_operator.workqueue import RunKey, WorkQueue

log = logging.getLogger(__name__)

_TIMEOUT = urllib3.Timeout(connect=2.0, read=5.0)
_LARGEST = 4_000_000  # bytes
_RAREST_S = 300.0
_NEWS_OF_STALL_S = 60.0


@dataclass(frozen=True)
class Target:
    """The pod to ask."""

    pod: str
    uid: str
    ip: str
    port: int


@dataclass(frozen=True)
class Heard:
    """What a learner last said."""

    progress: RunProgress | None = None
    unreachable: str = ""
    """Why it did not answer when it was last asked; empty when it did."""
    failures: int = 0
    """In a row."""
    at: float = 0.0
    """Monotonic seconds."""


class ProgressPoller:
    """Keeps what each learner said last. Safe to use from several threads."""

    def __init__(
        self,
        api: Api,
        mode: Literal["pod-ip", "proxy"],
        every_s: float,
        on_news: Callable[[RunKey], None],
        *,
        threads: int = 8,
    ) -> None:
        """`on_news` is called when a learner said something new, or fell silent."""
        self._api, self._mode, self._every_s, self._on_news = api, mode, every_s, on_news
        self._queue = WorkQueue()
        self._targets: dict[RunKey, Target] = {}
        self._heard: dict[RunKey, Heard] = {}
        self._lock = threading.Lock()
        self._jitter = random.Random(1)
        self._pool = urllib3.PoolManager(num_pools=threads, maxsize=1, retries=False)
        self._threads = [threading.Thread(target=self._work, name=f"scrape-{n}", daemon=True) for n in range(threads)]

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._queue.close()

    def want(self, key: RunKey, target: Target | None, *, at_rest: bool = False) -> None:
        """From now on ask this pod about the run; None asks nobody, what was said last stays.

        `at_rest`: nobody is meant to train, so that the time since the last step means nothing any more.
        """
        with self._lock:
            known = self._targets.get(key)
            if target is None:
                self._targets.pop(key, None)
                if heard := self._heard.get(key):
                    told = replace(heard.progress, stalled_s=None) if heard.progress and at_rest else heard.progress
                    self._heard[key] = replace(heard, progress=told, unreachable="", failures=0)
                return
            self._targets[key] = target
            if known != target and (heard := self._heard.get(key)):
                self._heard[key] = replace(heard, failures=0)  # another pod is asked as often as any
        if known != target:
            self._queue.add(key)

    def forget(self, key: RunKey) -> None:
        """The run is gone."""
        with self._lock:
            self._targets.pop(key, None)
            self._heard.pop(key, None)

    def latest(self, key: RunKey) -> Heard:
        """What the run's learner said last."""
        with self._lock:
            return self._heard.get(key, Heard())

    def stalled_s(self, key: RunKey) -> float | None:
        """How long its last step is ago; None when it did not say."""
        heard = self.latest(key)
        told = heard.progress.stalled_s if heard.progress else None
        return None if told is None else told + time.monotonic() - heard.at

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def _work(self) -> None:
        while found := self._queue.get():
            key, _ = found
            try:
                self._ask(key)
            except Exception:  # a thread that dies would go unnoticed
                log.exception("%s: asking the learner failed", key)
                self._queue.add_after(key, self._every_s)
            finally:
                self._queue.done(key)

    def _ask(self, key: RunKey) -> None:
        with self._lock:
            target = self._targets.get(key)
        if target is None:
            return
        before = self.latest(key)
        try:
            heard = Heard(parse_progress(self._fetch(key, target)), at=time.monotonic())
        except (ApiError, urllib3.exceptions.HTTPError, ValueError) as error:
            why = f"pod {target.pod}: {' '.join(str(error).split())[:300]}"
            heard = replace(before, unreachable=why, failures=before.failures + 1)
        with self._lock:
            if self._targets.get(key) != target:
                return
            self._heard[key] = heard
        if _gist(heard) != _gist(before):
            self._on_news(key)
        delay = min(self._every_s * 2 ** max(0, heard.failures - 1), max(_RAREST_S, self._every_s))
        self._queue.add_after(key, delay * self._jitter.uniform(0.9, 1.1))

    def _fetch(self, key: RunKey, target: Target) -> str:
        if self._mode == "proxy":
            return self._api.through_proxy(key.namespace, target.pod, target.port, "/metrics")
        host = f"[{target.ip}]" if ":" in target.ip else target.ip
        url = f"http://{host}:{target.port}/metrics"
        answer = self._pool.request("GET", url, timeout=_TIMEOUT, preload_content=False)
        try:
            if answer.status != 200:
                raise ValueError(f"it answered with {answer.status}")
            return bytes(answer.read(_LARGEST)).decode()
        finally:
            answer.close()  # not drained: it may be endless


def _gist(heard: Heard) -> tuple[RunProgress | None, bool]:
    """What is news when it changes: a stall is told by the minute, reasons of silence are all alike."""
    progress = heard.progress
    if progress and progress.stalled_s is not None:
        progress = replace(progress, stalled_s=progress.stalled_s // _NEWS_OF_STALL_S)
    return progress, bool(heard.unreachable)
