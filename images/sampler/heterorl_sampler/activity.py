"""What a sampler does now, and for how long nothing has come of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heterorl.exchange.records import SlotStatus

STUCK_S = 1800.0
"""A sampler without a token, a reward or a poll of the volume for this long is stuck: longer than any engine starts."""


class Activity:
    """Told by the thread that works, read by the one that writes heartbeats."""

    def __init__(self, status: SlotStatus, clock: Callable[[], float] = time.monotonic) -> None:
        self.status, self._clock = status, clock
        self._last = clock()

    def progress(self, state: str) -> None:
        """Something came of the work; what it is now, as the heartbeat shows it."""
        self.status.state, self._last = state, self._clock()

    @property
    def idle_s(self) -> float:
        """Seconds since the last progress."""
        return self._clock() - self._last
