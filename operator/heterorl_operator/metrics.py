"""The operator's own metrics, and its runs' progress."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from heterorl.spec.status import LearnerStatus, RunStatus
from heterorl_operator.cache import ObjectCache
from heterorl_operator.resources import RunKey

RECONCILES = Counter("heterorl_operator_reconcile", "Reconciles of a run", ["result"])
RECONCILE_SECONDS = Histogram(
    "heterorl_operator_reconcile_seconds",
    "Duration of a reconcile",
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30),
)
WAIT_SECONDS = Histogram(
    "heterorl_operator_wait_seconds",
    "Time that a run waited in the queue",
    buckets=(0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300),
)
QUEUE_DEPTH = Gauge("heterorl_operator_queue_depth", "Runs queued or being reconciled")
APPLIES = Counter("heterorl_operator_applies", "Objects applied or created", ["kind"])
WRITES = Counter("heterorl_operator_writes", "Writing requests to the API server")
ERRORS = Counter("heterorl_operator_errors", "Error responses of the API server", ["code"])
SYNCED = Gauge(
    "heterorl_operator_synced", "1 once every run was reconciled; edits of objects are reverted from then on"
)
STALE = Gauge("heterorl_operator_watch_stale", "1 while the watch of a kind is stale", ["kind"])

_IDLE = ("Suspended", "Succeeded", "Failed")
"""States in which no learner is meant to train."""


class RunsCollector(Collector):
    """The runs' progress, from their statuses."""

    def __init__(self, cache: ObjectCache, stalled_s: Callable[[RunKey], float | None]) -> None:
        self._cache, self._stalled_s = cache, stalled_s

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for at each scrape."""
        run = ["namespace", "run"]
        states = Tally[str]()
        step = GaugeMetricFamily("heterorl_run_step", "Steps trained", labels=run)
        lag = GaugeMetricFamily("heterorl_run_lag", "Mean lag of the last step's rollouts, in steps", labels=run)
        stalled = GaugeMetricFamily("heterorl_run_stalled_seconds", "Seconds since the last step", labels=run)
        ready = GaugeMetricFamily("heterorl_run_samplers_ready", "Ready samplers", labels=[*run, "pool"])
        desired = GaugeMetricFamily("heterorl_run_samplers_desired", "Samplers desired now", labels=[*run, "pool"])
        for key in self._cache.run_keys():
            if (found := self._cache.run(key)) is None:
                continue
            status = RunStatus.read(found.previous_status)
            states[status.state or "Pending"] += 1
            learner = status.learner or LearnerStatus()
            values: list[tuple[GaugeMetricFamily, float | None]] = [(step, learner.step)]
            if status.state not in _IDLE:
                values += [(lag, learner.lag), (stalled, self._stalled_s(key))]
            for family, value in values:
                if value is not None:
                    family.add_metric(list(key), value)
            for pool in status.samplers:
                ready.add_metric([*key, pool.name], pool.ready or 0)
                desired.add_metric([*key, pool.name], pool.desired or 0)
        runs = GaugeMetricFamily("heterorl_operator_runs", "Runs", labels=["state"])
        for state, count in states.items():
            runs.add_metric([state], count)
        yield from (runs, step, lag, stalled, ready, desired)
