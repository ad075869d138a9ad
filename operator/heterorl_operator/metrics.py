"""The operator's own metrics: what it does, and how far its runs are."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from heterorl_operator.cache import ObjectCache
from heterorl_operator.workqueue import RunKey

RECONCILES = Counter("heterorl_operator_reconcile", "Looks at a run", ["result"])
RECONCILE_SECONDS = Histogram(
    "heterorl_operator_reconcile_seconds",
    "Duration of a look at a run",
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30),
)
WAIT_SECONDS = Histogram(
    "heterorl_operator_wait_seconds",
    "Time from an event to the look at its run",
    buckets=(0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300),
)
QUEUE_DEPTH = Gauge("heterorl_operator_queue_depth", "Runs that wait to be looked at, or are being looked at")
APPLIES = Counter("heterorl_operator_applies", "Objects written", ["kind"])
WRITES = Counter("heterorl_operator_writes", "Requests that change something")
ERRORS = Counter("heterorl_operator_errors", "Answers of the API server that were errors", ["code"])
SYNCED = Gauge("heterorl_operator_synced", "1 once every run was looked at; edits by hand are undone after that")
STALE = Gauge("heterorl_operator_watch_stale", "1 while the watch of a kind lags behind the API server", ["kind"])

_IDLE = ("Suspended", "Succeeded", "Failed")
"""States in which nobody is late."""


class RunsCollector(Collector):
    """How far the runs are, from their statuses."""

    def __init__(self, store: ObjectCache, stalled_s: Callable[[RunKey], float | None]) -> None:
        self._store, self._stalled_s = store, stalled_s

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for at each scrape."""
        run = ["namespace", "run"]
        states = Tally[str]()
        step = GaugeMetricFamily("heterorl_run_step", "Steps trained", labels=run)
        lag = GaugeMetricFamily("heterorl_run_lag", "Mean lag of the last step's rollouts, in steps", labels=run)
        stalled = GaugeMetricFamily("heterorl_run_stalled_seconds", "Seconds since the last step", labels=run)
        ready = GaugeMetricFamily("heterorl_run_samplers_ready", "Ready samplers", labels=[*run, "pool"])
        desired = GaugeMetricFamily("heterorl_run_samplers_desired", "Samplers wanted now", labels=[*run, "pool"])
        for key in self._store.run_keys():
            if (found := self._store.run(key)) is None:
                continue
            status = found.previous_status
            states[status.get("state", "Pending")] += 1
            learner = status.get("learner", {})
            told = [(step, learner.get("step"))]
            if status.get("state") not in _IDLE:
                told += [(lag, learner.get("lag")), (stalled, self._stalled_s(key))]
            for family, value in told:
                if value is not None:
                    family.add_metric(list(key), value)
            for pool in status.get("samplers", []):
                ready.add_metric([*key, pool["name"]], pool.get("ready", 0))
                desired.add_metric([*key, pool["name"]], pool.get("desired", 0))
        runs = GaugeMetricFamily("heterorl_operator_runs", "Runs", labels=["state"])
        for state, count in states.items():
            runs.add_metric([state], count)
        yield from (runs, step, lag, stalled, ready, desired)
