"""A run's progress as its learner's first pod tells it to the operator: a snapshot of the volume, sent as metrics.

    Snapshot ──run_progress──▶ RunProgress ──to_text──▶ /metrics ──parse_progress──▶ RunProgress

Both sides are here, because the launcher writes what the operator reads. All metrics are gauges named `heterorl_run_*`
with the label `run`; what is not known is absent. `docs/kubernetes.md` lists them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from heterorl.exchange.version import Version

if TYPE_CHECKING:  # the operator, which reads, has no use for the exchange and its numpy
    from heterorl.monitoring.snapshot import Snapshot

_PREFIX = "heterorl_run_"
_NUMBERS = {
    "step": "step",
    "steps": "steps",
    "checkpoint_step": "checkpoint_step",
    "reward": "reward",
    "lag": "lag",
    "stalled_seconds": "stalled_s",
    "evaluation_best": "evaluation_best",
    "evaluation_last": "evaluation_last",
}
"""Metrics that are one number, and the field they tell."""
_NAMED_SLOTS = 8  # of a pool


@dataclass(frozen=True)
class PoolProgress:
    """One sampler pool."""

    rollouts: int = 0
    """Groups of completions written."""
    rejected: int = 0
    """Weights versions refused."""
    alive: int = 0
    """Slots whose heartbeat moves."""
    weights_version: str | None = None
    """The oldest that a live slot serves."""
    silent: tuple[str, ...] = ()
    """Slots whose heartbeat has stopped though no sampler released them; the first eight."""
    barren: int = 0
    """Live slots whose groups are all filtered (`algorithm.filterGroups`)."""


@dataclass(frozen=True)
class RunProgress:
    """The run at one moment; None is not known yet."""

    step: int | None = None
    """Steps trained."""
    steps: int | None = None
    """Steps asked for."""
    checkpoint_step: int | None = None
    reward: float | None = None
    """Mean reward of the last step."""
    lag: float | None = None
    """Mean lag of the last step's rollouts, in steps."""
    prepared: bool = False
    """Model and data are on the volume, for this run."""
    finished: bool = False
    """The last step is trained and the output written."""
    stalled_s: float | None = None
    """Seconds since the last step, while the ranks run."""
    weights_version: str | None = None
    """The newest that is published."""
    weights_refused: str | None = None
    """That every sampler refused it, and why."""
    attempts: Mapping[str, int] = field(default_factory=dict)
    """Ends of the learner: clean, signalled, crashed."""
    gave_up: tuple[str, str] | None = None
    """Why the learner is started no more: UserError, SiteError, LearnerCrashed or VolumeInUse, and a sentence."""
    pools: Mapping[str, PoolProgress] = field(default_factory=dict)
    evaluation_best: float | None = None
    evaluation_last: float | None = None
    evaluations_due: tuple[Version, ...] = ()
    """Versions without a result, oldest first."""


# ── from a snapshot ──────────────────────────────────────────────────────────────────────────────────────────────────
def run_progress(snapshot: Snapshot, *, training_since: float | None = None) -> RunProgress:
    """What the operator is told. `training_since`: when this pod's ranks were started; None while none run."""
    from heterorl.exchange.crash_budget import gave_up, outcomes

    known = RunProgress(
        steps=snapshot.steps,
        attempts=outcomes(snapshot.attempts),
        gave_up=gave_up(snapshot.attempts, snapshot.spec.failure_policy, snapshot.successor),
    )
    if not snapshot.prepared:
        return known
    learner = snapshot.learner
    averages = [result.average for result in snapshot.evaluations.values()]
    return replace(
        known,
        step=learner.step if learner else None,
        checkpoint_step=learner.checkpoint_step if learner else None,
        reward=learner.reward if learner else None,
        lag=learner.lag if learner else None,
        prepared=True,
        finished=snapshot.finished,
        stalled_s=None
        if training_since is None or snapshot.finished
        else max(0.0, snapshot.time - snapshot.last_step_at(training_since)),
        weights_version=str(snapshot.newest) if snapshot.newest else None,
        weights_refused=snapshot.weights_refused,
        pools={pool.name: _pool(pool.name, snapshot) for pool in snapshot.spec.samplers},
        evaluation_best=max(averages, default=None),
        evaluation_last=averages[-1] if averages else None,
        evaluations_due=tuple(snapshot.evaluations_due),
    )


def _pool(name: str, snapshot: Snapshot) -> PoolProgress:
    seen = {slot: observed for slot, observed in sorted(snapshot.slots.items()) if slot.pool == name}
    beats = [observed.heartbeat for observed in seen.values()]
    alive = [observed.heartbeat for observed in seen.values() if observed.alive]
    silent = [str(slot) for slot, observed in seen.items() if not (observed.alive or observed.heartbeat.released)]
    return PoolProgress(
        rollouts=sum(beat.rollouts for beat in beats),
        rejected=sum(beat.rejected for beat in beats),
        alive=len(alive),
        weights_version=min((beat.version for beat in alive if beat.version is not None), default=None),
        silent=tuple(silent[:_NAMED_SLOTS]),
        barren=sum(beat.trouble is not None for beat in alive),
    )


# ── to and from metrics ──────────────────────────────────────────────────────────────────────────────────────────────
def to_text(progress: RunProgress, run: str) -> bytes:
    """The progress of the run of that name in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Gauges(progress, run))
    return generate_latest(registry)


class _Gauges:
    """A collector of one progress."""

    def __init__(self, progress: RunProgress, run: str) -> None:
        self._progress, self._run = progress, run

    def collect(self) -> Iterator[Metric]:
        metrics: dict[str, GaugeMetricFamily] = {}
        for name, labels, value in _values_of(self._progress):
            if value is not None:
                metric = metrics.setdefault(name, _gauge(name, labels))
                metric.add_metric([self._run, *labels.values()], float(value))
        yield from metrics.values()


def _gauge(name: str, labels: Iterable[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(_PREFIX + name, f"The run's {name.replace('_', ' ')}", labels=["run", *labels])


def _values_of(progress: RunProgress) -> Iterator[tuple[str, dict[str, str], float | None]]:
    yield "prepared", {}, progress.prepared
    yield "finished", {}, progress.finished
    yield from ((name, {}, getattr(progress, attribute)) for name, attribute in _NUMBERS.items())
    if progress.weights_version is not None:
        yield "weights_info", {"version": progress.weights_version}, 1
    if progress.weights_refused is not None:
        yield "weights_refused", {"message": progress.weights_refused}, 1
    for outcome, count in progress.attempts.items():
        yield "attempts", {"outcome": outcome}, count
    if progress.gave_up is not None:
        yield "gave_up", dict(zip(("reason", "message"), progress.gave_up)), 1
    for name, pool in progress.pools.items():
        for what in ("rollouts", "rejected", "alive", "barren"):
            yield f"sampler_{what}", {"pool": name}, getattr(pool, what)
        if pool.weights_version is not None:
            yield "sampler_weights_info", {"pool": name, "version": pool.weights_version}, 1
        for slot in pool.silent:
            yield "sampler_silent", {"pool": name, "slot": slot}, 1
    for version in progress.evaluations_due:
        yield "evaluation_due", {"version": str(version)}, 1


def parse_progress(text: str) -> RunProgress:
    """The progress in a learner's /metrics; ValueError when it is not one's."""
    found = _samples_in(text)
    if "prepared" not in found:
        raise ValueError(f"these are not the metrics of a learner's pod: {_PREFIX}prepared is missing")

    def number(name: str) -> float | None:
        return next((value for _, value in found.get(name, ()) if math.isfinite(value)), None)

    def whole(name: str) -> int | None:
        value = number(name)
        return None if value is None else int(value)

    def by_pool(what: str) -> dict[str, int]:
        return {labels["pool"]: int(value) for labels, value in found.get(f"sampler_{what}", ())}

    rejected, alive, barren = by_pool("rejected"), by_pool("alive"), by_pool("barren")
    serving = {labels["pool"]: labels["version"] for labels, _ in found.get("sampler_weights_info", ())}
    silent: dict[str, list[str]] = {}
    for labels, _ in found.get("sampler_silent", ()):
        silent.setdefault(labels["pool"], []).append(labels["slot"])
    return RunProgress(
        step=whole("step"),
        steps=whole("steps"),
        checkpoint_step=whole("checkpoint_step"),
        reward=number("reward"),
        lag=number("lag"),
        prepared=bool(number("prepared")),
        finished=bool(number("finished")),
        stalled_s=number("stalled_seconds"),
        weights_version=next((labels["version"] for labels, _ in found.get("weights_info", ())), None),
        weights_refused=next((labels["message"] for labels, _ in found.get("weights_refused", ())), None),
        attempts={labels["outcome"]: int(value) for labels, value in found.get("attempts", ())},
        gave_up=next(((labels["reason"], labels["message"]) for labels, _ in found.get("gave_up", ())), None),
        pools={
            name: PoolProgress(
                rollouts,
                rejected.get(name, 0),
                alive.get(name, 0),
                serving.get(name),
                tuple(silent.get(name, ())),
                barren.get(name, 0),
            )
            for name, rollouts in by_pool("rollouts").items()
        },
        evaluation_best=number("evaluation_best"),
        evaluation_last=number("evaluation_last"),
        evaluations_due=tuple(
            sorted(Version.parse(labels["version"]) for labels, _ in found.get("evaluation_due", ()))
        ),
    )


def _samples_in(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Labels and values of our metrics by their name; those of the rank, which follow them, are ignored."""
    ours = "".join(f"{line}\n" for line in text.split("\n") if line.startswith(_PREFIX))
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for metric in text_string_to_metric_families(ours):
        for sample in metric.samples:
            found.setdefault(sample.name.removeprefix(_PREFIX), []).append((sample.labels, sample.value))
    return found
