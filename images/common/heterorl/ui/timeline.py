"""What every sampler did when: the weights it held, how old they were, how long it waited, and when it was away.

A timeline is cut into stretches of equal length, so that its size does not depend on the run's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from heterorl.monitoring.json_lines import Record
from heterorl.monitoring.run_records import is_batch, is_swap, sampler_wait_s
from heterorl.monitoring.series import Floats, Series
from heterorl.ui.columns import rounded

_MARKS = 200
"""Swaps, or refused versions, that are marked one by one."""


class Lane:
    """One slot's history, from the lines of its metrics file."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float, int | None]] = []
        """(from, to, version), ascending and without overlap; None while it has no weights."""
        self.batches: list[tuple[float, float, float]] = []
        """(begin, end, seconds waited)."""
        self.swaps: list[float] = []
        self.refusals: list[float] = []
        """When a version was refused, as the next batch tells."""
        self._refused = 0
        self._at: float | None = None
        self._held: int | None = None

    def add(self, records: Iterable[Record]) -> None:
        """Take further lines."""
        for record in records:
            time = record.get("time")
            if isinstance(time, int | float) and not isinstance(time, bool):
                self._take(record, float(time))

    def _take(self, record: Record, time: float) -> None:
        if record.get("event") == "start":
            self._at, self._held, self._refused = time, None, 0
            return
        if self._at is not None and time >= self._at:
            self.spans.append((self._at, time, self._held))
        if is_batch(record):
            wait, work = sampler_wait_s(record), sum(record.get(f"rollout/{k}_s") or 0.0 for k in ("generate", "score"))
            self.batches.append((time - wait - work, time, wait))
            refused = int(record.get("rejected_versions") or 0)
            self.refusals += [time] * (refused > self._refused)
            self._refused = refused
        if is_swap(record):
            self.swaps.append(time)
        self._held = record.get("version_step", self._held)
        self._at = None if record.get("event") == "stop" else time

    @property
    def end(self) -> float | None:
        """When it was last heard of."""
        return self.spans[-1][1] if self.spans else None

    def stretches(self, edges: Floats, newest: Series) -> dict[str, Any]:
        """By stretch: the version held at its middle, the lag behind the newest, and the share of it spent waiting."""
        middles = (edges[:-1] + edges[1:]) / 2
        version = _held_at(self.spans, middles)
        known = (
            newest[1][np.clip(np.searchsorted(newest[0], middles, "right") - 1, 0, None)] if len(newest[0]) else None
        )
        lag = np.full(len(middles), np.nan) if known is None else np.maximum(0, known - version)
        begin, end = edges[0], edges[-1]
        swaps = [round(time, 3) for time in self.swaps if begin <= time <= end]
        refusals = [round(time, 3) for time in self.refusals if begin <= time <= end]
        return {
            "version": rounded(version, 9),
            "lag": rounded(lag),
            "waiting": rounded(_waiting(self.batches, edges)),
            "away": [bool(gone) for gone in np.isnan(_covered(self.spans, middles))],
            "swaps": swaps if len(swaps) <= _MARKS else [],
            "swap_count": len(swaps),
            "refusals": refusals[-_MARKS:],
        }


def _found(spans: Sequence[tuple[float, float, Any]], times: Floats) -> list[Any]:
    """The span that each time lies in; None where there is none."""
    starts = np.array([span[0] for span in spans])
    places = np.searchsorted(starts, times, "right") - 1
    return [
        spans[place] if place >= 0 and time <= spans[place][1] else None for place, time in zip(places.tolist(), times)
    ]


def _held_at(spans: Sequence[tuple[float, float, int | None]], times: Floats) -> Floats:
    return np.array(
        [np.nan if span is None or span[2] is None else span[2] for span in _found(spans, times)], np.float64
    )


def _covered(spans: Sequence[tuple[float, float, int | None]], times: Floats) -> Floats:
    return np.array([np.nan if span is None else 1.0 for span in _found(spans, times)], np.float64)


def _waiting(batches: Sequence[tuple[float, float, float]], edges: Floats) -> Floats:
    """Share of each stretch that was waited, as if a batch's waiting were spread evenly over it."""
    begins, ends, waits = np.array(batches, np.float64).reshape(-1, 3).T
    at = np.unique(np.concatenate([edges, begins, ends]))
    rates = waits / np.maximum(ends - begins, 1e-9)
    change = np.zeros(len(at))
    np.add.at(change, np.searchsorted(at, begins), rates)
    np.add.at(change, np.searchsorted(at, ends), -rates)
    total = np.concatenate([[0.0], np.cumsum(np.cumsum(change)[:-1] * np.diff(at))])
    share: Floats = np.diff(np.interp(edges, at, total)) / np.maximum(np.diff(edges), 1e-9)
    return np.clip(share, 0.0, 1.0)
