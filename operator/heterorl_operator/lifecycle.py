"""What should run now: a pure function of a run's manifest, of what is known about it, and of the time.

    Pending ─▶ Preparing ─▶ Running ─▶ Succeeded ──grace──▶ learner to zero ──TTL──▶ deleted
                  ▲            │
                  └ Suspended ◀┴─▶ Failed

It is called again and again and keeps no state: what has to be remembered is in the run's status.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from heterorl.errors import VOLUME_IN_USE
from heterorl.heterogeneity.availability import next_change, replicas_at
from heterorl.kubernetes.manifests import ReplicaCounts
from heterorl.kubernetes.names import evaluation_name, prepare_name
from heterorl.names import Version
from heterorl.spec.run import RunSpec, SamplerPoolSpec
from heterorl_operator.context import RunContext
from heterorl_operator.objects import CachedChild
from heterorl_operator.podstate import has_user_error, is_given_up
from heterorl_operator.problems import Problem
from heterorl_operator.resources import JOB
from heterorl_operator.timestamps import seconds

CLAIM_PATIENCE_S = 10.0
"""How long a claim may wait for its volume before the run reports it."""

_LAST_EVALUATION_S = 3600.0  # a finished learner, which keeps the weights for it, waits no longer


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


def decide(context: RunContext) -> Decision:
    """What should run now."""
    clock = _clock(context)
    end = _end(context, clock)
    if end and clock.completion is None:
        clock = replace(clock, completion=context.now)
    failed = _failed_evaluations(context)
    open_evaluations = (
        [] if context.progress is None else [v for v in context.progress.evaluations_due if v.step not in failed]
    )
    evaluating = _evaluating(context)
    with_jobs = not context.run.spec.suspend and (end is None or end.succeeded)
    replicas = _replicas(context, clock, end, busy=evaluating or bool(open_evaluations))
    # Only a learner reports that a version is evaluated: without one its Job would be created again and again.
    may_evaluate = with_jobs and not evaluating and replicas.learner > 0
    return Decision(
        clock=clock,
        end=end,
        replicas=replicas,
        failed_evaluations=failed,
        evaluation=open_evaluations[0] if may_evaluate and open_evaluations else None,
        with_jobs=with_jobs,
        expired=_remaining(_expiry(context, clock), context.now) == 0.0,
        requeue_s=_requeue_s(context, clock, end),
    )


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _clock(context: RunContext) -> RunClock:
    before, suspend = context.before, context.run.spec.suspend
    start = seconds(before.start_time) if before.start_time else None if suspend else context.now
    since = seconds(before.suspended_since) if before.suspended_since else None
    total = before.suspended_seconds or 0.0
    completion = seconds(before.completion_time) if before.completion_time else None
    if completion is None and suspend:
        since = context.now if since is None else since
    elif completion is None and since is not None:
        # A run that is suspended before it ever started has no time yet.
        total += context.now - since if before.start_time else 0.0
        since = None
    return RunClock(start, since, total, completion)


def _requeue_s(context: RunContext, clock: RunClock, end: RunEnd | None) -> float | None:
    spec, elapsed = context.run.spec, clock.elapsed_s(context.now)
    times: list[float | None] = [_remaining(_expiry(context, clock), context.now)]
    if context.claim and context.claim.phase == "Pending":
        times.append(_remaining(seconds(context.claim.created) + CLAIM_PATIENCE_S, context.now))
    if end:
        for idle_s in (spec.learner.finish_grace_seconds, _LAST_EVALUATION_S):
            times.append(_remaining((clock.completion or context.now) + idle_s, context.now))
    elif not spec.suspend:
        if spec.active_deadline_seconds:
            times.append(spec.active_deadline_seconds - elapsed)
        for pool in spec.samplers:
            change = _next_change(pool, spec, elapsed)
            times.append(None if change is None else change - elapsed)
    return min((max(0.0, time) for time in times if time is not None and time != 0.0), default=None)


def _expiry(context: RunContext, clock: RunClock) -> float | None:
    ttl = context.run.spec.ttl_seconds_after_finished
    return None if ttl is None or clock.completion is None else clock.completion + ttl


def _remaining(at: float | None, now: float) -> float | None:
    return None if at is None else max(0.0, at - now)


# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _end(context: RunContext, clock: RunClock) -> RunEnd | None:
    for each in context.before.conditions:
        if each.type in ("Succeeded", "Failed") and each.status == "True":
            return RunEnd(each.type == "Succeeded", each.reason, each.message)  # for good
    if context.before.state in ("Succeeded", "Failed") or clock.completion is not None:
        # By another version of the operator, whose conditions this one does not understand. Over is over.
        message = "the run ended under another version of the operator; its learner's log says how"
        return RunEnd(context.before.state == "Succeeded", "Ended", message)
    spec, progress = context.run.spec, context.progress
    if progress and progress.finished:
        return RunEnd(True, "Trained", f"{progress.step} steps are trained; the model is in output/ on the volume")
    if progress and progress.gave_up:
        reason, message = progress.gave_up
        way_out = "; put it right and start a new run on the volume with resume: true"
        return RunEnd(False, reason, f"the learner: {message}{'' if reason == VOLUME_IN_USE else way_out}")
    if problem := _samplers_lost(context, clock) or _preparation_failed(context):
        return RunEnd(False, *problem)
    deadline = spec.active_deadline_seconds
    if deadline and clock.elapsed_s(context.now) >= deadline:
        return RunEnd(
            False,
            "DeadlineExceeded",
            f"activeDeadlineSeconds {deadline} passed; start a new run on the volume with"
            " resume: true and a later deadline",
        )
    return None


def _preparation_failed(context: RunContext) -> Problem | None:
    problem = preparation_problem(context)
    return None if problem is None or problem.reason == VOLUME_IN_USE else problem


def preparation_problem(context: RunContext) -> Problem | None:
    """Why the preparation failed for good; None when it did not."""
    job = context.child(JOB.name, prepare_name(context.run))
    if job is None or job.phase != "Failed":
        return None
    if refused := _volume_refused(context):
        return refused  # its pod may be gone by now
    messages = [message for pod in context.pods_under(job) if (message := pod.exit_message.strip())]
    last = messages[-1] if messages else job.message
    line = last.splitlines()[-1] if last else "it left no message"
    if VOLUME_IN_USE in line:
        return Problem(VOLUME_IN_USE, line[line.index(VOLUME_IN_USE) :])
    return Problem(
        "PreparationFailed",
        f"the preparation failed: {line}; see `kubectl logs job/{job.name}`, put it right, delete the run and apply it"
        " again",
    )


def _volume_refused(context: RunContext) -> Problem | None:
    known = (each for each in context.before.conditions if each.type == "Prepared" and each.reason == VOLUME_IN_USE)
    return next((Problem(each.reason, each.message) for each in known), None)


def _samplers_lost(context: RunContext, clock: RunClock) -> Problem | None:
    spec, elapsed = context.run.spec, clock.elapsed_s(context.now)
    pools = {pool.name: context.pods_of("sampler", pool.name) for pool in spec.samplers}
    pods = [pod for of_pool in pools.values() for pod in of_pool]
    if mistaken := next((pod for pod in pods if has_user_error(pod)), None):
        line = (mistaken.exit_message.strip().splitlines() or ["it left no message"])[-1]
        return Problem(
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
        return Problem(
            "SamplersCrashed",
            f"every sampler crashed more than {budget} times"
            f" (failurePolicy.samplerRestarts); see `kubectl logs -p {pods[0].name}`",
        )
    return None


# ── pods and Jobs ────────────────────────────────────────────────────────────────────────────────────────────────────
def _replicas(context: RunContext, clock: RunClock, end: RunEnd | None, *, busy: bool) -> ReplicaCounts:
    spec, elapsed = context.run.spec, clock.elapsed_s(context.now)
    no_samplers = {pool.name: 0 for pool in spec.samplers}
    if end:
        ended = clock.completion or context.now
        grace_over = context.now >= ended + spec.learner.finish_grace_seconds
        busy = busy and context.now < ended + _LAST_EVALUATION_S
        idles = end.reason not in ("DeadlineExceeded", "PreparationFailed") and (
            not grace_over or (end.succeeded and busy)
        )
        return ReplicaCounts(spec.learner.replicas if idles and not spec.suspend else 0, no_samplers)
    if spec.suspend or preparation_problem(context):
        return ReplicaCounts(0, no_samplers)
    return ReplicaCounts(spec.learner.replicas, {pool.name: _wanted(pool, spec, elapsed) for pool in spec.samplers})


def _wanted(pool: SamplerPoolSpec, spec: RunSpec, elapsed: float) -> int:
    return replicas_at(pool, elapsed, seed=spec.seed, time_scale=spec.time_scale)


def _next_change(pool: SamplerPoolSpec, spec: RunSpec, elapsed: float) -> float | None:
    return next_change(pool, elapsed, seed=spec.seed, time_scale=spec.time_scale)


def evaluation_jobs(context: RunContext) -> Iterable[tuple[int, CachedChild]]:
    """Steps and their Jobs."""
    prefix = evaluation_name(context.name, 0).removesuffix("0")
    for (kind, name), child in context.children.items():
        step = name.removeprefix(prefix)
        if kind == JOB.name and name.startswith(prefix) and step.isdigit():
            yield int(step), child


def _evaluating(context: RunContext) -> bool:
    return any(not job.phase for _, job in evaluation_jobs(context))


def _failed_evaluations(context: RunContext) -> frozenset[int]:
    before = context.before.evaluation.failed_steps if context.before.evaluation else []
    return frozenset(before) | {step for step, job in evaluation_jobs(context) if job.phase == "Failed"}
