"""What should be, now: a pure function of a run's manifest, of all that was seen of it, and of the time.

    Pending ─▶ Preparing ─▶ Running ─▶ Succeeded ──grace──▶ learner to zero ──TTL──▶ deleted
                  ▲            │
                  └ Suspended ◀┴─▶ Failed

It is asked again and again and remembers nothing: what has to be remembered stands in the run's status.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from heterorl.errors import VOLUME_IN_USE
from heterorl.heterogeneity.availability import next_change, replicas_at
from heterorl.kubernetes.manifests import ReplicaCounts
from heterorl.kubernetes.names import evaluation_name, prepare_name
from heterorl.monitoring.run_metrics import RunProgress
from heterorl.names import Version
from heterorl.spec.run import HeteroRLRun, RunSpec, SamplerPoolSpec
from heterorl.spec.status import RunStatus
from heterorl_operator.cache import CachedChild, CachedPod
from heterorl_operator.podstate import Trouble, has_user_error, is_given_up
from heterorl_operator.resources import JOB
from heterorl_operator.timestamps import seconds

CLAIM_PATIENCE_S = 10.0
"""How long a claim may wait for its volume before the run says so."""

_LAST_EVALUATION_S = 3600.0  # a finished learner, which keeps the weights for it, waits no longer


@dataclass(frozen=True)
class RunContext:
    """Everything known about a run at one moment."""

    run: HeteroRLRun
    uid: str
    generation: int
    before: RunStatus
    """The status as it was written last."""
    children: Mapping[tuple[str, str], CachedChild]
    """By kind and name."""
    pods: Sequence[CachedPod]
    progress: RunProgress | None
    """What the learner's pod last said; None before it said anything."""
    unreachable: str
    """Why it did not answer when last asked; empty when it did."""
    claim: CachedChild | None
    """The claim of the shared volume, whoever made it."""
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
        """Pods that are not on their way out."""
        return [pod for pod in self.pods if pod.role == role and pod.pool == pool and not pod.deleting]

    def pods_under(self, owner: CachedChild | None) -> list[CachedPod]:
        """Pods of a Job that are not on their way out, oldest first."""
        found = [pod for pod in self.pods if owner and pod.owner_uid == owner.uid and not pod.deleting]
        return sorted(found, key=lambda pod: pod.created)

    def condition(self, kind: str) -> str:
        """Status of a condition as it was written last; Unknown if it was not."""
        return next((each.status for each in self.before.conditions if each.type == kind), "Unknown")


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
    """What should be, and when to ask again."""

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
    look_again_s: float | None
    """When time alone changes the answer."""


def decide(view: RunContext) -> Decision:
    """The whole of it."""
    clock = _clock(view)
    end = _end(view, clock)
    if end and clock.completion is None:
        clock = replace(clock, completion=view.now)
    failed = _failed_evaluations(view)
    open_evaluations = (
        [] if view.progress is None else [v for v in view.progress.evaluations_due if v.step not in failed]
    )
    evaluating = _evaluating(view)
    with_jobs = not view.run.spec.suspend and (end is None or end.succeeded)
    replicas = _replicas(view, clock, end, busy=evaluating or bool(open_evaluations))
    # Only a learner tells that a version is evaluated: with none to come its Job would be made again and again.
    may_evaluate = with_jobs and not evaluating and replicas.learner > 0
    return Decision(
        clock=clock,
        end=end,
        replicas=replicas,
        failed_evaluations=failed,
        evaluation=open_evaluations[0] if may_evaluate and open_evaluations else None,
        with_jobs=with_jobs,
        expired=_remaining(_expiry(view, clock), view.now) == 0.0,
        look_again_s=_look_again(view, clock, end),
    )


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _clock(view: RunContext) -> RunClock:
    before, suspend = view.before, view.run.spec.suspend
    start = seconds(before.start_time) if before.start_time else None if suspend else view.now
    since = seconds(before.suspended_since) if before.suspended_since else None
    total = before.suspended_seconds or 0.0
    completion = seconds(before.completion_time) if before.completion_time else None
    if completion is None and suspend:
        since = view.now if since is None else since
    elif completion is None and since is not None:
        # Suspended before it ever started: that was no time of the run.
        total += view.now - since if before.start_time else 0.0
        since = None
    return RunClock(start, since, total, completion)


def _look_again(view: RunContext, clock: RunClock, end: RunEnd | None) -> float | None:
    spec, elapsed = view.run.spec, clock.elapsed_s(view.now)
    times: list[float | None] = [_remaining(_expiry(view, clock), view.now)]
    if view.claim and view.claim.phase == "Pending":
        times.append(_remaining(seconds(view.claim.created) + CLAIM_PATIENCE_S, view.now))
    if end:
        for idle_s in (spec.learner.finish_grace_seconds, _LAST_EVALUATION_S):
            times.append(_remaining((clock.completion or view.now) + idle_s, view.now))
    elif not spec.suspend:
        if spec.active_deadline_seconds:
            times.append(spec.active_deadline_seconds - elapsed)
        for pool in spec.samplers:
            change = _next_change(pool, spec, elapsed)
            times.append(None if change is None else change - elapsed)
    return min((max(0.0, time) for time in times if time is not None and time != 0.0), default=None)


def _expiry(view: RunContext, clock: RunClock) -> float | None:
    ttl = view.run.spec.ttl_seconds_after_finished
    return None if ttl is None or clock.completion is None else clock.completion + ttl


def _remaining(at: float | None, now: float) -> float | None:
    return None if at is None else max(0.0, at - now)


# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _end(view: RunContext, clock: RunClock) -> RunEnd | None:
    for each in view.before.conditions:
        if each.type in ("Succeeded", "Failed") and each.status == "True":
            return RunEnd(each.type == "Succeeded", each.reason, each.message)  # for good
    spec, progress = view.run.spec, view.progress
    if progress and progress.finished:
        return RunEnd(True, "Trained", f"{progress.step} steps are trained; the model is in output/ on the volume")
    if progress and progress.gave_up:
        reason, message = progress.gave_up
        way_out = "; put it right and start a new run on the volume with resume: true"
        return RunEnd(False, reason, f"the learner: {message}{'' if reason == VOLUME_IN_USE else way_out}")
    if trouble := _samplers_lost(view, clock) or _preparation_failed(view):
        return RunEnd(False, *trouble)
    deadline = spec.active_deadline_seconds
    if deadline and clock.elapsed_s(view.now) >= deadline:
        return RunEnd(
            False,
            "DeadlineExceeded",
            f"activeDeadlineSeconds {deadline} passed; start a new run on the volume with"
            " resume: true and a later deadline",
        )
    return None


def _preparation_failed(view: RunContext) -> Trouble | None:
    trouble = preparation_trouble(view)
    return None if trouble is None or trouble.reason == VOLUME_IN_USE else trouble


def preparation_trouble(view: RunContext) -> Trouble | None:
    """Why the preparation failed for good; None when it did not."""
    job = view.child(JOB.name, prepare_name(view.run))
    if job is None or job.phase != "Failed":
        return None
    if said := _said_of_volume(view):
        return said  # its pod may be gone by now
    messages = [message for pod in view.pods_under(job) if (message := pod.exit_message.strip())]
    last = messages[-1] if messages else job.message
    line = last.splitlines()[-1] if last else "it left no message"
    if VOLUME_IN_USE in line:
        return Trouble(VOLUME_IN_USE, line[line.index(VOLUME_IN_USE) :])
    return Trouble(
        "PreparationFailed",
        f"the preparation failed: {line}; see `kubectl logs job/{job.name}`, put it right, delete the run and apply it"
        " again",
    )


def _said_of_volume(view: RunContext) -> Trouble | None:
    said = (each for each in view.before.conditions if each.type == "Prepared" and each.reason == VOLUME_IN_USE)
    return next((Trouble(each.reason, each.message) for each in said), None)


def _samplers_lost(view: RunContext, clock: RunClock) -> Trouble | None:
    spec, elapsed = view.run.spec, clock.elapsed_s(view.now)
    pools = {pool.name: view.pods_of("sampler", pool.name) for pool in spec.samplers}
    pods = [pod for of_pool in pools.values() for pod in of_pool]
    if mistaken := next((pod for pod in pods if has_user_error(pod)), None):
        line = (mistaken.exit_message.strip().splitlines() or ["it left no message"])[-1]
        return Trouble(
            "UserError",
            f"sampler pod {mistaken.name}: {line}; put it right and start a new run on the volume with resume: true",
        )
    budget = spec.failure_policy.sampler_restarts
    still_to_come = (
        _wanted(pool, spec, elapsed) or _next_change(pool, spec, elapsed) is not None
        for pool in spec.samplers
        if not pools[pool.name]
    )
    if pods and all(is_given_up(pod, budget) for pod in pods) and not any(still_to_come):
        return Trouble(
            "SamplersCrashed",
            f"every sampler crashed more than {budget} times"
            f" (failurePolicy.samplerRestarts); see `kubectl logs -p {pods[0].name}`",
        )
    return None


# ── pods and Jobs ────────────────────────────────────────────────────────────────────────────────────────────────────
def _replicas(view: RunContext, clock: RunClock, end: RunEnd | None, *, busy: bool) -> ReplicaCounts:
    spec, elapsed = view.run.spec, clock.elapsed_s(view.now)
    nobody = {pool.name: 0 for pool in spec.samplers}
    if end:
        ended = clock.completion or view.now
        grace_over = view.now >= ended + spec.learner.finish_grace_seconds
        busy = busy and view.now < ended + _LAST_EVALUATION_S
        idles = end.reason not in ("DeadlineExceeded", "PreparationFailed") and (
            not grace_over or (end.succeeded and busy)
        )
        return ReplicaCounts(spec.learner.replicas if idles and not spec.suspend else 0, nobody)
    if spec.suspend or preparation_trouble(view):
        return ReplicaCounts(0, nobody)
    return ReplicaCounts(spec.learner.replicas, {pool.name: _wanted(pool, spec, elapsed) for pool in spec.samplers})


def _wanted(pool: SamplerPoolSpec, spec: RunSpec, elapsed: float) -> int:
    return replicas_at(pool, elapsed, seed=spec.seed, time_scale=spec.time_scale)


def _next_change(pool: SamplerPoolSpec, spec: RunSpec, elapsed: float) -> float | None:
    return next_change(pool, elapsed, seed=spec.seed, time_scale=spec.time_scale)


def evaluation_jobs(view: RunContext) -> Iterable[tuple[int, CachedChild]]:
    """Steps and their Jobs."""
    prefix = evaluation_name(view.name, 0).removesuffix("0")
    for (kind, name), child in view.children.items():
        step = name.removeprefix(prefix)
        if kind == JOB.name and name.startswith(prefix) and step.isdigit():
            yield int(step), child


def _evaluating(view: RunContext) -> bool:
    return any(not job.phase for _, job in evaluation_jobs(view))


def _failed_evaluations(view: RunContext) -> frozenset[int]:
    before = view.before.evaluation.failed_steps if view.before.evaluation else []
    return frozenset(before) | {step for step, job in evaluation_jobs(view) if job.phase == "Failed"}
