"""What should run now, as `lifecycle.decide` says it and everything that acts on it reads it."""

from __future__ import annotations

from dataclasses import dataclass

from heterorl.exchange.rollout import Version
from heterorl.kubernetes.manifests import ReplicaCounts


@dataclass(frozen=True)
class RunClock:
    """A run's times, in seconds since 1970."""

    start: float | None
    suspended_since: float | None
    suspended_s: float
    """In all, without the suspension that lasts."""
    completion: float | None

    def elapsed_s(self, now: float) -> float:
        """Time since the start without the time it was suspended."""
        if self.start is None:
            return 0.0
        until = self.suspended_since if self.suspended_since is not None else now
        return max(0.0, until - self.start - self.suspended_s)


@dataclass(frozen=True)
class RunEnd:
    """How the run ended."""

    succeeded: bool
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """What should run, and when to decide again."""

    clock: RunClock
    end: RunEnd | None
    replicas: ReplicaCounts
    failed_evaluations: frozenset[int]
    """Steps whose evaluation is given up."""
    evaluation: Version | None
    """To be evaluated now."""
    with_jobs: bool
    """Whether Jobs may run."""
    expired: bool
    """The record has been kept long enough: delete the run."""
    requeue_s: float | None
    """When time alone changes the decision."""
