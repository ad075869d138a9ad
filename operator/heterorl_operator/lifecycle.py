"""What should run now: a pure function of a run's manifest, of what is known about it, and of the time.

    Pending ─▶ Preparing ─▶ Running ─▶ Succeeded ──grace──▶ learner to zero ──TTL──▶ deleted
                  ▲            │
                  └ Suspended ◀┴─▶ Failed ──failurePolicy.resumes──▶ as before

It is called again and again and keeps no state: what has to be remembered is in the run's status.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from heterorl.kubernetes.manifests import ReplicaCounts
from heterorl.kubernetes.names import evaluation_name
from heterorl_operator.context import RunContext
from heterorl_operator.decision import Decision, RunClock, RunEnd
from heterorl_operator.ending import change_after, preparation_problem, run_end, wanted
from heterorl_operator.objects import CachedChild
from heterorl_operator.resources import JOB
from heterorl_operator.timestamps import seconds

CLAIM_PATIENCE_S = 10.0
"""How long a claim may wait for its volume before the run reports it."""

_LAST_EVALUATION_S = 3600.0  # a finished learner, which keeps the weights for it, waits no longer


def decide(context: RunContext) -> Decision:
    """What should run now."""
    clock = _clock(context)
    end = run_end(context, clock.elapsed_s(context.now))
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
    if context.is_resumed and completion is not None:
        # Between its failure and its resumption the run was as good as suspended.
        total += max(0.0, context.now - (since if since is not None else completion))
        since = completion = None
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
            change = change_after(pool, spec, elapsed)
            times.append(None if change is None else change - elapsed)
    return min((max(0.0, time) for time in times if time is not None and time != 0.0), default=None)


def _expiry(context: RunContext, clock: RunClock) -> float | None:
    ttl = context.run.spec.ttl_seconds_after_finished
    return None if ttl is None or clock.completion is None else clock.completion + ttl


def _remaining(at: float | None, now: float) -> float | None:
    return None if at is None else max(0.0, at - now)


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
    return ReplicaCounts(spec.learner.replicas, {pool.name: wanted(pool, spec, elapsed) for pool in spec.samplers})


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
