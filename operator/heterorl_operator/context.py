"""Everything known about a run at one moment, as the pure functions of `lifecycle` and `conditions` take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heterorl.monitoring.run_metrics import RunProgress
from heterorl.spec.run import HeteroRLRun
from heterorl.spec.status import RunStatus
from heterorl_operator.cache import CachedChild, CachedPod


@dataclass(frozen=True)
class RunContext:
    """A snapshot; nothing in it changes."""

    run: HeteroRLRun
    uid: str
    generation: int
    before: RunStatus
    """The status as last written."""
    children: Mapping[tuple[str, str], CachedChild]
    """By kind and name."""
    pods: Sequence[CachedPod]
    create_failures: Mapping[tuple[str, str], str]
    """Workloads whose pods cannot be created, by kind and name, and the API server's words."""
    progress: RunProgress | None
    """The last progress polled from the learner; None before the first answer."""
    unreachable: str
    """Why the last poll failed; empty when it did not."""
    claim: CachedChild | None
    """The claim of the shared volume, the run's own or a given one."""
    now: float
    """Seconds since 1970."""

    @property
    def name(self) -> str:
        """Of the run."""
        return self.run.metadata.name

    def child(self, kind: str, name: str) -> CachedChild | None:
        """An object of the run."""
        return self.children.get((kind, name))

    def pods_of(self, role: str, pool: str = "") -> list[CachedPod]:
        """Pods that are not being deleted."""
        return [pod for pod in self.pods if pod.role == role and pod.pool == pool and not pod.deleting]

    def pods_under(self, owner: CachedChild | None) -> list[CachedPod]:
        """Pods of a Job that are not being deleted, oldest first."""
        found = [pod for pod in self.pods if owner and pod.owner_uid == owner.uid and not pod.deleting]
        return sorted(found, key=lambda pod: pod.created)

    @property
    def has_ended(self) -> bool:
        """Whether the status says so, in whatever words; an end is never forgotten."""
        ended = any(each.type in ("Succeeded", "Failed") and each.status == "True" for each in self.before.conditions)
        return ended or self.before.state in ("Succeeded", "Failed") or self.before.completion_time is not None

    @property
    def is_resumed(self) -> bool:
        """Whether the run failed and `failurePolicy.resumes` was increased since."""
        failed = self.condition("Failed") == "True" or self.before.state == "Failed"
        return failed and self.run.spec.failure_policy.resumes > (self.before.resumes or 0)

    def condition(self, kind: str) -> str:
        """Status of a condition as last written; Unknown if there is none."""
        return next((each.status for each in self.before.conditions if each.type == kind), "Unknown")
