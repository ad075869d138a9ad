"""What the live view shows of a run: a snapshot of its volume, and its metrics files as they grow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation
from heterorl.exchange.version import Version
from heterorl.monitoring.json_lines import MetricsTail, Record, supersede
from heterorl.monitoring.run_records import (
    column,
    is_batch,
    is_step,
    is_swap,
    learner_file,
    learner_wait_share,
    mean,
    sampler_file,
    sampler_wait_s,
)
from heterorl.monitoring.snapshot import Snapshot, SnapshotReader
from heterorl.monitoring.stall import waiting_for
from heterorl.spec.run import Slot

_QUIET_S = 40.0
"""After this long without a step, the view shows what is waited for; plain lines come every ten seconds."""
_RECENT = 20
"""Learner steps that "now" is averaged over."""
_TAIL_BYTES, _PROMPT = 1 << 18, 40
_KEPT = (
    "step",
    "time",
    "reward",
    "lag/mean",
    "lag/max",
    "lag/dropped",
    "step_time",
    "perf/tokens_per_s",
    "perf/rollout_wait_s",
)
"""Of each step, for as long as the run lasts."""


@dataclass(frozen=True)
class SlotProgress:
    """One sampler, from its own lines and its heartbeat."""

    activity: str = ""
    """What it says it does: starting, generating, waiting: queue, ..."""
    version: int | None = None
    """Step of the weights it serves."""
    rollouts: int = 0
    """Groups published."""
    tokens_per_s: float = 0.0
    """Of its last batch."""
    waited_s: float = 0.0
    """Waited for weights or for room in the queue, in all."""
    swaps: int = 0
    rejected: int = 0
    """Versions it refused."""
    filtered: int = 0
    """Groups that were left out because all their rewards are equal."""
    unrewarded: int = 0
    """Groups that were left out because a reward failed on them."""
    canary: float | None = None
    """Mean absolute difference of the canary's log-probabilities at its last swap."""


@dataclass(frozen=True)
class LiveProgress:
    """The run at one moment."""

    step: int = 0
    steps: int = 0
    newest: Version | None = None
    rewards: Mapping[int, float] = field(default_factory=dict)
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
    completion: str | None = None
    """The completion that was logged last, with its prompt and reward, in a line."""
    evals: Mapping[Version, Evaluation] = field(default_factory=dict)
    slots: Mapping[Slot, SlotProgress] = field(default_factory=dict)

    @property
    def reward(self) -> float | None:
        """Mean reward of the recent steps."""
        recent = [self.rewards[step] for step in sorted(self.rewards)[-_RECENT:]]
        return sum(recent) / len(recent) if recent else None


class ProgressReader:
    """Reads a run again and again for the live view; of the metrics files only what is new."""

    def __init__(self, exchange: Exchange) -> None:
        self._run, self._opened_at = SnapshotReader(exchange), exchange.now()
        self._completions = exchange.completions_file
        self._begun_at = 0.0  # when the learner started last, by its clock
        self._learner = MetricsTail(learner_file(exchange.metrics_dir))
        self._samplers = {slot: MetricsTail(sampler_file(exchange.metrics_dir, slot)) for slot in exchange.spec.slots}
        self._steps: list[Record] = []
        self._slots = dict.fromkeys(self._samplers, SlotProgress())

    def read(self) -> LiveProgress:
        """The run as it is now."""
        lines = self._learner.read()
        supersede(self._steps, [{key: line.get(key) for key in _KEPT} for line in lines if is_step(line)])
        self._begun_at = max(
            [self._begun_at, *column((line for line in lines if line.get("event") == "start"), "time")]
        )
        for slot, tail in self._samplers.items():
            for record in tail.read():
                self._slots[slot] = _add_line(self._slots[slot], record)
        snapshot = self._run.read()
        eta_s = self._eta(snapshot.step, snapshot.steps)
        found = live_progress(
            snapshot, self._steps, self._slots, opened_at=self._begun_at or self._opened_at, eta_s=eta_s
        )
        return replace(found, completion=last_completion(self._completions))

    def _eta(self, step: int, steps: int) -> float | None:
        """Seconds to go at the median pace of the recent steps, which no pause and no start-up distorts."""
        times = column(self._steps[-_RECENT:], "time")
        return (steps - step) * median(b - a for a, b in pairwise(times)) if len(times) > 1 else None


def last_completion(path: Path) -> str | None:
    """The first completion of the last whole line of a completions file, in one line; None if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().rpartition(b"\n")[0].splitlines()
        group = json.loads(lines[-1])
        first = group["completions"][0]
        return " ".join(f"{first['reward']:g} for {group['prompt'][-_PROMPT:]} ⟶ {first['text']}".split())
    except (OSError, ValueError, LookupError, TypeError):
        return None


def live_progress(
    snapshot: Snapshot,
    steps: Sequence[Record],
    slots: Mapping[Slot, SlotProgress],
    *,
    opened_at: float,
    eta_s: float | None,
) -> LiveProgress:
    """The snapshot with what the learner's steps and the samplers' lines (`slots`, without heartbeats) add to it."""
    recent = steps[-_RECENT:]
    return LiveProgress(
        step=snapshot.step,
        steps=snapshot.steps,
        newest=snapshot.newest,
        rewards={record["step"]: record["reward"] for record in steps if record.get("reward") is not None},
        waiting_for=_waiting_for(snapshot, recent, opened_at),
        weights_refused=snapshot.weights_refused,
        lag_mean=mean(recent, "lag/mean"),
        lag_max=max(column(steps, "lag/max"), default=0.0),
        learner_tokens_per_s=mean(recent, "perf/tokens_per_s") or 0.0,
        waiting=learner_wait_share(recent) or 0.0,
        dropped=(recent[-1].get("lag/dropped") or 0) if recent else 0,
        eta_s=eta_s,
        evals=snapshot.evaluations,
        slots={slot: _with_heartbeat(row, slot, snapshot) for slot, row in slots.items()},
    )


def _waiting_for(snapshot: Snapshot, recent: Sequence[Record], opened_at: float) -> str | None:
    """Told once no step was trained for clearly longer than a step takes."""
    since = snapshot.last_step_at(opened_at)
    patience = max(_QUIET_S, 3 * (mean(recent, "step_time") or 0.0))
    if snapshot.time - since < patience or snapshot.step >= snapshot.steps:
        return None
    slots = waiting_for(snapshot.spec.slots, snapshot.slots)
    return f"no step since {datetime.fromtimestamp(since, UTC):%H:%M} UTC: {slots}"


def _with_heartbeat(row: SlotProgress, slot: Slot, snapshot: Snapshot) -> SlotProgress:
    if (seen := snapshot.slots.get(slot)) is None:
        return row
    beat = seen.heartbeat
    version = row.version if beat.version_step is None else beat.version_step
    counts = {name: getattr(beat, name) for name in ("rejected", "unrewarded", "filtered")}
    return replace(row, activity=beat.state, version=version, **counts)


def _add_line(row: SlotProgress, record: Record) -> SlotProgress:
    row = replace(row, version=record.get("version_step", row.version))
    if is_swap(record):
        return replace(row, swaps=row.swaps + 1, canary=record.get("canary/mean_abs_diff"))
    if not is_batch(record):
        return row
    return replace(
        row,
        rollouts=row.rollouts + record.get("groups", 0),
        tokens_per_s=record.get("tokens_per_s") or 0.0,
        waited_s=row.waited_s + sampler_wait_s(record),
    )
