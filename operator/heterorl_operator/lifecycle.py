"""What should run now: a pure function of a run's manifest, of what is known about it, and of the time.

    Pending ─▶ Preparing ─▶ Running ─▶ Succeeded ──grace──▶ learner to zero ──TTL──▶ deleted
                  ▲            │
                  └ Suspended ◀┴─▶ Failed ──failurePolicy.resumes──▶ as before

What ended once stays ended, except that a failed run goes on when `failurePolicy.resumes` is increased. The function
is called again and again and keeps no state: what has to be remembered is in the run's status.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from heterorl.errors import VOLUME_IN_USE
from heterorl.exchange.version import Version
from heterorl.exit_codes import describe_exit
from heterorl.failure_policy import Failure, GivenUp, given_up, run_failure
from heterorl.heterogeneity.availability import next_change, replicas_at
from heterorl.kubernetes.manifests import ReplicaCounts
from heterorl.kubernetes.names import evaluation_name, prepare_name
from heterorl.spec.run import FailurePolicySpec, RunSpec, SamplerPoolSpec
from heterorl_operator.cache import CachedChild, CachedPod
from heterorl_operator.context import RunContext
from heterorl_operator.podstate import has_crashed, is_out_of_memory
from heterorl_operator.problems import Problem
from heterorl_operator.resources import JOB
from heterorl_operator.timestamps import seconds

CLAIM_PATIENCE_S = 10.0
"""How long a claim may wait for its volume before the run reports it."""

_LAST_EVALUATION_S = 3600.0  # a finished learner, which keeps the weights for it, waits no longer
_RESUME = "correct it and increase failurePolicy.resumes, and the run continues from its checkpoint"
_MORE_MEMORY = "it was killed for its memory (OOMKilled): raise resources.limits.memory in its podTemplate, or use less"


# ── the decision ─────────────────────────────────────────────────────────────────────────────────────────────────────
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


# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def run_end(context: RunContext, elapsed_s: float) -> RunEnd | None:
    """How the run has ended by now, `elapsed_s` after its start; None while it goes on."""
    if context.has_ended and not context.is_resumed:
        return _known_end(context)
    spec, progress = context.run.spec, context.progress
    if progress and progress.finished:
        return RunEnd(True, "Trained", f"{progress.step} steps are trained; the model is in output/ on the volume")
    if progress and progress.gave_up:
        return _learner_lost(context, *progress.gave_up)
    if problem := _samplers_lost(context, elapsed_s) or _preparation_failed(context):
        return RunEnd(False, *problem)
    deadline = spec.active_deadline_seconds
    if deadline and elapsed_s >= deadline:
        way_out = "to continue, increase failurePolicy.resumes and activeDeadlineSeconds in one edit"
        return RunEnd(False, "DeadlineExceeded", f"activeDeadlineSeconds {deadline} passed; {way_out}")
    return None


def _known_end(context: RunContext) -> RunEnd:
    for each in context.before.conditions:
        if each.type in ("Succeeded", "Failed") and each.status == "True":
            return RunEnd(each.type == "Succeeded", each.reason, each.message)
    # Written by another version of the operator, in conditions that this one does not know.
    message = "the run ended under another version of the operator; its learner's log says how"
    return RunEnd(context.before.state == "Succeeded", "Ended", message)


def _learner_lost(context: RunContext, reason: str, message: str) -> RunEnd:
    if reason == VOLUME_IN_USE:
        return RunEnd(False, reason, f"the learner: {message}")
    if any(is_out_of_memory(pod) for pod in context.pods_of("learner")):
        message = f"{message}; {_MORE_MEMORY}"
    return RunEnd(False, reason, f"{message}; {_RESUME}")


# ── the preparation ──────────────────────────────────────────────────────────────────────────────────────────────────
def preparation_problem(context: RunContext) -> Problem | None:
    """Why the preparation failed for good; None when it did not."""
    job = context.child(JOB.name, prepare_name(context.run))
    if job is None or job.phase != "Failed":
        return None
    if refused := _volume_refused(context):
        return refused  # its pod may be gone by now
    pods = context.pods_under(job)
    messages = [message for pod in pods if (message := pod.exit_message.strip())]
    last = messages[-1] if messages else job.message
    line = last.splitlines()[-1] if last else "it left no message"
    if VOLUME_IN_USE in line:
        return Problem(VOLUME_IN_USE, line[line.index(VOLUME_IN_USE) :])
    if pods and is_out_of_memory(pods[-1]):
        line = _MORE_MEMORY
    way_out = "correct it and increase failurePolicy.resumes, or delete the run and apply it again"
    see = f"see `kubectl logs job/{job.name}`"
    return Problem("PreparationFailed", f"the preparation failed ({see}; {way_out}): {line}")


def _preparation_failed(context: RunContext) -> Problem | None:
    problem = preparation_problem(context)
    return None if problem is None or problem.reason == VOLUME_IN_USE else problem


def _volume_refused(context: RunContext) -> Problem | None:
    known = (each for each in context.before.conditions if each.type == "Prepared" and each.reason == VOLUME_IN_USE)
    return next((Problem(each.reason, each.message) for each in known), None)


# ── the samplers ─────────────────────────────────────────────────────────────────────────────────────────────────────
def wanted(pool: SamplerPoolSpec, spec: RunSpec, elapsed_s: float) -> int:
    """Replicas that the pool's availability asks for."""
    return replicas_at(pool, elapsed_s, seed=spec.seed, time_scale=spec.time_scale)


def change_after(pool: SamplerPoolSpec, spec: RunSpec, elapsed_s: float) -> float | None:
    """When availability next asks for another number, in seconds after the start; None for never."""
    return next_change(pool, elapsed_s, seed=spec.seed, time_scale=spec.time_scale)


def _samplers_lost(context: RunContext, elapsed_s: float) -> Problem | None:
    spec = context.run.spec
    resumes = spec.failure_policy.resumes
    # Pods of before a resumption are about to be replaced.
    pools = {
        pool.name: [pod for pod in context.pods_of("sampler", pool.name) if pod.resumes == resumes]
        for pool in spec.samplers
    }
    step = (context.progress and context.progress.step) or 0
    samplers = {
        f"pod {pod.name}": _given_up(pod, spec.failure_policy, step) for of_pool in pools.values() for pod in of_pool
    }
    if None in samplers.values():
        return None
    more_to_come = any(
        wanted(pool, spec, elapsed_s) or change_after(pool, spec, elapsed_s) is not None
        for pool in spec.samplers
        if not pools[pool.name]
    )
    failure = run_failure(None, samplers, more_to_come=more_to_come)
    return Problem(failure.reason, f"{failure.message}; {_RESUME}") if failure else None


def _given_up(pod: CachedPod, policy: FailurePolicySpec, step: int) -> GivenUp | None:
    """Whether a sampler's failures use up its budget.

    A pod shows how its container ended last and how often it was restarted: all its failures are taken to be of that
    kind, and spread evenly over the steps trained by now.
    """
    if pod.ready or not has_crashed(pod):
        return None
    lines = pod.exit_message.strip().splitlines()
    last = _MORE_MEMORY if is_out_of_memory(pod) else lines[-1] if lines else f"see `kubectl logs -p {pod.name}`"
    message = f"{describe_exit(pod.exit_code)}: {last}"
    count = max(1, pod.restarts)
    failures = [Failure(pod.exit_code, step * number // count, message) for number in range(1, count + 1)]
    return given_up("sampler", failures, policy)
