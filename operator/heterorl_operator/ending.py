"""Whether and how a run has ended: a pure function of what is known about it.

What ended once stays ended, except that a failed run goes on when `failurePolicy.resumes` is increased.
"""

from __future__ import annotations

from heterorl.errors import VOLUME_IN_USE
from heterorl.exit_codes import describe_exit
from heterorl.failure_policy import Failure, GivenUp, given_up, run_failure
from heterorl.heterogeneity.availability import next_change, replicas_at
from heterorl.kubernetes.names import prepare_name
from heterorl.spec.run import FailurePolicySpec, RunSpec, SamplerPoolSpec
from heterorl_operator.context import RunContext
from heterorl_operator.decision import RunEnd
from heterorl_operator.objects import CachedPod
from heterorl_operator.podstate import has_crashed, is_out_of_memory
from heterorl_operator.problems import Problem
from heterorl_operator.resources import JOB

_RESUME = "correct it and increase failurePolicy.resumes, and the run continues from its checkpoint"
_MORE_MEMORY = "it was killed for its memory (OOMKilled): raise resources.limits.memory in its podTemplate, or use less"


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
