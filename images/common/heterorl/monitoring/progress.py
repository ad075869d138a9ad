"""How far a run is, read from its folder as it grows: what the live view shows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation, SlotHeartbeat
from heterorl.exchange.refusals import refused_by_all
from heterorl.monitoring.json_lines import Tail
from heterorl.monitoring.stall import waiting_for
from heterorl.names import Slot, Version

_QUIET_S = 40.0
"""After this long without a step, the view shows what is waited for; plain lines come every ten seconds."""
_RECENT = 20
"""Learner steps that "now" is averaged over."""


@dataclass
class SlotProgress:
    """One sampler, from its own lines and its heartbeat."""

    activity: str = ""
    """What it says it does: starting, generating, waiting: queue, ..."""
    version: int | None = None
    """Step of the weights it serves."""
    rollouts: int = 0
    """Pools published."""
    tokens_per_s: float = 0.0
    """Of its last batch."""
    waited_s: float = 0.0
    """Waited for weights or for room in the queue, in all."""
    swaps: int = 0
    rejected: int = 0
    """Versions it refused."""
    canary: float | None = None
    """Mean absolute difference of the canary's log-probabilities at its last swap."""


@dataclass
class LiveProgress:
    """The run at one moment."""

    step: int = 0
    steps: int = 0
    newest: Version | None = None
    rewards: dict[int, float] = field(default_factory=dict)
    """Mean reward by step."""
    waiting_for: str | None = None
    """While no step is trained: since when, and what each slot does."""
    weights_refused: str | None = None
    """That every sampler refused the newest, and why."""
    lag_mean: float | None = None
    lag_max: float = 0.0
    """Largest lag of the whole run; `lag_mean` is of the recent steps."""
    learner_tokens_per_s: float = 0.0
    waiting: float = 0.0
    """Share of the recent steps' time that the learner waited for rollouts."""
    dropped: int = 0
    eta_s: float | None = None
    evals: dict[Version, Evaluation] = field(default_factory=dict)
    slots: dict[Slot, SlotProgress] = field(default_factory=dict)

    @property
    def reward(self) -> float | None:
        """Mean reward of the recent steps."""
        recent = [self.rewards[step] for step in sorted(self.rewards)[-_RECENT:]]
        return sum(recent) / len(recent) if recent else None


class ProgressReader:
    """Keeps a `Progress` up to date; every call reads only what is new."""

    def __init__(self, exchange: Exchange, clock: Callable[[], float] = time.monotonic) -> None:
        self._exchange, self._clock, self._opened_at = exchange, clock, exchange.now()
        slots = exchange.spec.slots
        self._learner = Tail(exchange.metrics_dir / "learner.jsonl")
        self._samplers = {slot: Tail(exchange.metrics_dir / f"sampler-{slot}.jsonl") for slot in slots}
        self._recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self._pace: deque[tuple[float, int]] = deque(maxlen=60)
        self.progress = LiveProgress(steps=exchange.spec.learner.steps, slots={slot: SlotProgress() for slot in slots})

    def read(self) -> LiveProgress:
        """The run as it is now."""
        now = self.progress
        for record in self._learner.read():
            if "event" not in record and "step" in record:
                self._take_step(record)
        for slot, tail in self._samplers.items():
            for record in tail.read():
                _take_sampler(now.slots[slot], record)
        beats = self._exchange.heartbeats()
        for slot, beat in beats.items():
            if slot in now.slots:
                now.slots[slot].activity = beat.state
                now.slots[slot].version = now.slots[slot].version if beat.version_step is None else beat.version_step
                now.slots[slot].rejected = beat.rejected
        if (learner := self._exchange.learner) is not None:
            now.step = learner.step
        versions = self._exchange.list_versions()
        now.weights_refused = refused_by_all(versions, beats.values())
        now.newest = max(versions, default=None)
        now.evals = self._exchange.read_evals()
        now.eta_s = self._eta()
        now.waiting_for = self._waiting_for(beats)
        return now

    def _waiting_for(self, beats: Mapping[Slot, SlotHeartbeat]) -> str | None:
        """Told once no step was trained for clearly longer than a step takes."""
        learner, at = self._exchange.learner, self._exchange.now()
        since = max(self._opened_at, learner.time if learner else 0.0)
        patience = max(_QUIET_S, 3 * (_mean(self._recent, "step_time") or 0.0))
        if at - since < patience or (learner and learner.step >= self.progress.steps):
            return None
        heard_at = {slot: beat.time for slot, beat in beats.items()}  # one machine, one clock
        slots = waiting_for(self._exchange.spec, beats, heard_at, at)
        return f"no step since {datetime.fromtimestamp(since, UTC):%H:%M} UTC: {slots}"

    def _take_step(self, record: dict[str, Any]) -> None:
        now, step = self.progress, record["step"]
        # A learner that resumed from a checkpoint repeats steps: its lines replace the earlier ones.
        for repeated in [s for s in now.rewards if s >= step]:
            del now.rewards[repeated]
        while self._recent and self._recent[-1]["step"] >= step:
            self._recent.pop()
        self._recent.append(record)
        if record.get("reward") is not None:
            now.rewards[step] = record["reward"]
        now.lag_mean = _mean(self._recent, "lag/mean")
        now.lag_max = max(now.lag_max, record.get("lag/max") or 0.0)
        now.dropped = record.get("lag/dropped") or 0
        now.learner_tokens_per_s = _mean(self._recent, "perf/tokens_per_s") or 0.0
        total = _mean(self._recent, "step_time")
        now.waiting = (_mean(self._recent, "perf/rollout_wait_s") or 0.0) / total if total else 0.0

    def _eta(self) -> float | None:
        """Seconds to go at the pace of the last minute or so; None before there is one."""
        step, steps = self.progress.step, self.progress.steps
        if not self._pace or self._clock() - self._pace[-1][0] >= 1.0:
            self._pace.append((self._clock(), step))
        (then, before), (now, after) = self._pace[0], self._pace[-1]
        return (steps - step) * (now - then) / (after - before) if after > before else None


def _take_sampler(slot: SlotProgress, record: dict[str, Any]) -> None:
    slot.version = record.get("version_step", slot.version)
    if record.get("event") == "swap":
        slot.swaps += 1
        slot.canary = record.get("canary/mean_abs_diff")
    elif "event" not in record:
        slot.rollouts += record.get("groups", 0)
        slot.tokens_per_s = record.get("tokens_per_s") or 0.0
        slot.waited_s += (record.get("rollout/backpressure_s") or 0.0) + (record.get("rollout/weights_wait_s") or 0.0)


def _mean(records: deque[dict[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return sum(values) / len(values) if values else None
