"""Monitoring beside the work: what is to be written waits in a bounded queue for a thread, and nothing blocks the loop.

A sink that fails (a full disk, a login that hangs) is logged once and retried with growing pauses; training never waits
for it and never ends because of it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from heterorl.monitoring.json_lines import Record

log = logging.getLogger(__name__)

_ROOM = 10_000
"""Records that wait at most; beyond that the oldest are dropped."""
_PAUSES_S = (1.0, 5.0, 30.0, 60.0)
_UNOPENED_S = 5.0
"""How long the end waits for what was never open."""


class Sink(Protocol):
    """One place where records go."""

    def write(self, record: Record) -> None:
        """Take one record: a step or batch, or an event if it has the key `event`."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


class Background:
    """A sink that writes on a thread of its own. `open_sink` is called there, again after each failure."""

    def __init__(
        self,
        what: str,
        open_sink: Callable[[], Sink],
        *,
        close_s: float = 5.0,
        open_s: float = _UNOPENED_S,
        room: int = _ROOM,
        pauses_s: tuple[float, ...] = _PAUSES_S,
    ) -> None:
        """`what` names the place in messages; `close_s` is how long the end may wait for it, once it is open.

        `open_s` is the same for one that was never open.
        """
        self._what, self._open, self._pauses_s = what, open_sink, pauses_s
        self._close_s, self._open_s = close_s, min(open_s, close_s)
        self._queue: deque[Record] = deque()
        self._room, self._dropped, self._failures = room, 0, 0
        self._sink: Sink | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"write {what}", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Queue one record; never waits, never raises."""
        with self._changed:
            if len(self._queue) >= self._room:
                self._queue.popleft()
                self._dropped += 1
            self._queue.append(record)
            self._changed.notify()

    def close(self) -> None:
        """Write what is queued, for a while if it can be written at all, and let go."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(self._open_s)
        if self._sink is not None:  # it takes what it is given, be it slowly
            self._thread.join(self._close_s - self._open_s)
        if missing := len(self._queue) + self._dropped:
            log.warning("%s: %d records were not written", self._what, missing)

    def _run(self) -> None:
        while (record := self._next()) is not None:
            while not self._try(record):
                if self._closing:
                    return
                self._pause()
        if self._sink is not None:
            try:
                self._sink.close()
            except Exception as error:
                log.warning("%s: its end was not written: %s: %s", self._what, type(error).__name__, error)

    def _next(self) -> Record | None:
        """The oldest record, which stays queued until it is written; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            return self._queue[0] if self._queue else None

    def _try(self, record: Record) -> bool:
        try:
            if self._sink is None:
                self._sink = self._open()
            self._sink.write(record)
        except Exception as error:  # whatever a library raises, monitoring ends nothing
            self._failed(error)
            return False
        with self._changed:
            if self._queue and self._queue[0] is record:  # else it was dropped meanwhile
                self._queue.popleft()
        if self._failures:
            log.info("%s: written again", self._what)
            self._failures = 0
        return True

    def _failed(self, error: Exception) -> None:
        if not self._failures:
            log.warning(
                "%s cannot be written: %s: %s; training continues, and writing is retried",
                self._what,
                type(error).__name__,
                error,
            )
        self._failures += 1
        sink, self._sink = self._sink, None
        if sink is not None:
            with suppress(Exception):
                sink.close()

    def _pause(self) -> None:
        """Wait before the next try, which comes at once when the process ends."""
        pause = self._pauses_s[min(self._failures, len(self._pauses_s)) - 1]
        with self._changed:
            self._changed.wait_for(lambda: self._closing, timeout=pause)
