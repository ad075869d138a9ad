"""The work queue: keys to reconcile, each by one worker at a time, however often it was added meanwhile.

As controller-runtime's: an added key that waits is there once; one that is being worked on is worked on again after
that; a failed one comes back after a growing delay. What is urgent goes first.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections import deque

from heterorl_operator.resources import RunKey

FIRST_RETRY_S, LAST_RETRY_S = 0.5, 300.0


class WorkQueue:
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._urgent: deque[RunKey] = deque()
        self._ordinary: deque[RunKey] = deque()
        # In one of those two (or both), or to be put there after the work under way: since when, and whether urgent.
        self._waiting: dict[RunKey, tuple[float, bool]] = {}
        self._working: dict[RunKey, float] = {}  # since when
        self._later: list[tuple[float, RunKey, bool]] = []
        self._due: dict[tuple[RunKey, bool], float] = {}  # the earliest time in `_later` that counts
        self._failures: dict[RunKey, int] = {}
        self._changed = threading.Condition()
        self._jitter = random.Random(0)
        self._closed = False

    def add(self, key: RunKey, *, urgent: bool = True) -> None:
        """Reconcile it as soon as possible, or once nothing urgent waits."""
        with self._changed:
            self._add(key, urgent)
            self._changed.notify()

    def add_after(self, key: RunKey, delay_s: float, *, urgent: bool = True) -> None:
        """Reconcile it then, or earlier if it is added meanwhile."""
        with self._changed:
            at = time.monotonic() + delay_s
            if at < self._due.get((key, urgent), float("inf")):
                self._due[key, urgent] = at
                heapq.heappush(self._later, (at, key, urgent))
                self._changed.notify()

    def retry(self, key: RunKey, at_least_s: float = 0.0) -> float:
        """Reconcile it after a delay that doubles with each failure in a row; returns the delay."""
        with self._changed:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            delay: float = min(FIRST_RETRY_S * 2 ** (failures - 1), LAST_RETRY_S) * self._jitter.uniform(0.8, 1.2)
        delay = max(delay, at_least_s)
        self.add_after(key, delay)
        return delay

    def succeeded(self, key: RunKey) -> None:
        """The next failure is the first again."""
        with self._changed:
            self._failures.pop(key, None)

    def get(self) -> tuple[RunKey, float] | None:
        """The next key and the seconds it waited, when there is one; `done` is due afterwards. None once closed."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                while self._later and self._later[0][0] <= now:
                    at, key, urgent = heapq.heappop(self._later)
                    if self._due.get((key, urgent)) == at:
                        del self._due[key, urgent]
                        self._add(key, urgent)
                if found := self._next():
                    self._working[found] = now
                    self._changed.notify()  # there may be more
                    return found, now - self._waiting.pop(found)[0]
                self._changed.wait(self._later[0][0] - now if self._later else None)
            return None

    def done(self, key: RunKey) -> None:
        """The work on it has ended."""
        with self._changed:
            self._working.pop(key, None)
            if key in self._waiting:
                self._append(key)
                self._changed.notify()

    def close(self) -> None:
        """End every worker."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        with self._changed:
            return len(self._waiting) + len(self._working)

    def longest_s(self) -> float:
        """How long the work that has taken longest has taken, in seconds; 0 when none is under way."""
        with self._changed:
            now = time.monotonic()
            return now - min(self._working.values(), default=now)

    def _add(self, key: RunKey, urgent: bool) -> None:
        since, was_urgent = self._waiting.get(key, (time.monotonic(), None))
        if was_urgent is None or (urgent and not was_urgent):
            self._waiting[key] = (since, urgent)
            if key not in self._working:
                self._append(key)

    def _append(self, key: RunKey) -> None:
        (self._urgent if self._waiting[key][1] else self._ordinary).append(key)

    def _next(self) -> RunKey | None:
        for line in (self._urgent, self._ordinary):
            while line:
                key = line.popleft()
                if key in self._waiting and key not in self._working:  # else it was taken from the other queue
                    return key
        return None
