"""How many samplers of a pool exist at a given time of the run: one pure function, for operator and local runner.

`elapsed_s` is real time since the run's start without the time it was suspended. The spec's times are multiplied by the
run's `time_scale`. The count is what is fixed, not which replica: the replicas 0 to count - 1 are those that exist.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from threading import Lock

from heterorl.heterogeneity.delay import Exponential
from heterorl.seeds import uniform
from heterorl.spec.run import SamplerPoolSpec


def replicas_at(pool: SamplerPoolSpec, elapsed_s: float, *, seed: int = 0, time_scale: float = 1.0) -> int:
    """How many of the pool's replicas exist `elapsed_s` after the start; never more than `pool.replicas`.

    windows: the largest of the windows that hold this moment, none outside; churn: each replica alternates between up
    and down with exponential times and starts up; trace: the last point passed. `seed` is the run's.
    """
    availability = pool.availability
    match availability.type:
        case "always":
            count = pool.replicas
        case "windows":
            held = (
                w
                for w in availability.windows
                if w.start_seconds * time_scale <= elapsed_s < w.end_seconds * time_scale
            )
            count = max((w.replicas for w in held), default=0)
        case "trace":
            passed = [p.replicas for p in availability.trace if p.at_seconds * time_scale <= elapsed_s]
            count = passed[-1] if passed else pool.replicas
        case "churn":
            lives = (_replica_life(pool, index, seed, time_scale) for index in range(pool.replicas))
            count = sum(life.is_up(elapsed_s) for life in lives)
    return min(count, pool.replicas)


def next_change(pool: SamplerPoolSpec, elapsed_s: float, *, seed: int = 0, time_scale: float = 1.0) -> float | None:
    """The first moment after `elapsed_s` at which `replicas_at` gives another count; None when it never does."""
    availability = pool.availability
    if availability.type == "churn":
        lives = (_replica_life(pool, index, seed, time_scale) for index in range(pool.replicas))
        return min((life.next_toggle(elapsed_s) for life in lives), default=None)
    edges = {p.at_seconds for p in availability.trace} if availability.type == "trace" else set()
    if availability.type == "windows":
        edges = {edge for w in availability.windows for edge in (w.start_seconds, w.end_seconds)}
    count = replicas_at(pool, elapsed_s, seed=seed, time_scale=time_scale)
    later = (edge * time_scale for edge in sorted(edges) if edge * time_scale > elapsed_s)
    return next((at for at in later if replicas_at(pool, at, seed=seed, time_scale=time_scale) != count), None)


class _Life:
    """One replica's alternation: up at 0, then a toggle at each of an endless, ever rising list of times.

    The list grows on demand and is kept, because the operator asks every second for runs that last for days.
    """

    def __init__(self, key: tuple[object, ...], mean_up_s: float, mean_down_s: float) -> None:
        self._key = key
        self._times = (Exponential(mean_up_s), Exponential(mean_down_s))
        self._toggles = [0.0]
        self._growing = Lock()

    def _passed(self, elapsed_s: float) -> int:
        elapsed_s = max(elapsed_s, 0.0)
        with self._growing:
            while self._toggles[-1] <= elapsed_s:
                n = len(self._toggles) - 1
                self._toggles.append(self._toggles[-1] + self._times[n % 2].quantile(uniform("churn", *self._key, n)))
        return bisect_right(self._toggles, elapsed_s)

    def is_up(self, elapsed_s: float) -> bool:
        """Whether the replica exists then."""
        return self._passed(elapsed_s) % 2 == 1

    def next_toggle(self, elapsed_s: float) -> float:
        """When it next goes or comes."""
        return self._toggles[self._passed(elapsed_s)]


@lru_cache(maxsize=65_536)
def _life(key: tuple[object, ...], mean_up_s: float, mean_down_s: float) -> _Life:
    return _Life(key, mean_up_s, mean_down_s)


def _replica_life(pool: SamplerPoolSpec, index: int, seed: int, time_scale: float) -> _Life:
    churn = pool.availability.churn
    key = (seed + churn.seed, pool.name, index)
    return _life(key, churn.mean_up_seconds * time_scale, churn.mean_down_seconds * time_scale)
