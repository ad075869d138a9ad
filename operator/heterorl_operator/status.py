"""A run's status: a pure function of what is known, what was decided, and what the API server refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

from heterorl.kubernetes.names import sampler_name
from heterorl.spec.status import Condition, EvaluationStatus, LearnerStatus, RunStatus, SamplerStatus, State
from heterorl_operator.conditions import ConditionState, condition_states
from heterorl_operator.context import RunContext
from heterorl_operator.lifecycle import Decision
from heterorl_operator.problems import ObjectProblem, Problem
from heterorl_operator.resources import DEPLOYMENT
from heterorl_operator.timestamps import moment

_NO_PODS = (
    "FailedCreate",
    "ImagePullFailed",
    "InvalidPodTemplate",
    "PodConfigInvalid",
    "QuotaExceeded",
    "Unschedulable",
)
"""Reasons for which a learner or sampler cannot start."""


def status_of(context: RunContext, decision: Decision, problems: Sequence[ObjectProblem]) -> RunStatus:
    """The whole status."""
    states = condition_states(context, decision, problems)
    clock = decision.clock
    samplers = _samplers(context, decision)
    ready, desired = (sum(getattr(pool, which) or 0 for pool in samplers) for which in ("ready", "desired"))
    return RunStatus(
        observed_generation=context.generation,
        state=_state(context, decision, states),
        conditions=[_condition(context, kind, state) for kind, state in states.items()],
        learner=_learner(context),
        samplers=samplers,
        samplers_ready=f"{ready}/{desired}",
        evaluation=_evaluation(context, decision),
        start_time=_moment(clock.start),
        suspended_since=_moment(clock.suspended_since),
        suspended_seconds=round(clock.suspended_s, 3) or None,
        completion_time=_moment(clock.completion),
        resumes=_resumes(context),
    )


def refused(before: RunStatus, generation: int, problem: Problem, now: float) -> RunStatus:
    """The status of a run that cannot be reconciled at all; the rest of it stays as it was."""
    ready = Condition(
        type="Ready",
        status="False",
        reason=problem.reason,
        message=problem.message,
        last_transition_time=_since(before, "Ready", "False", now),
        observed_generation=generation,
    )
    others = [each for each in before.conditions if each.type != "Ready"]
    changes = {"observed_generation": generation, "state": before.state or "Pending", "conditions": [ready, *others]}
    return before.model_copy(update=changes)


def _condition(context: RunContext, kind: str, state: ConditionState) -> Condition:
    return Condition(
        type=kind,
        status=state.status,
        reason=state.reason,
        message=state.message,
        last_transition_time=_since(context.before, kind, state.status, context.now),
        observed_generation=context.generation,
    )


def _since(before: RunStatus, kind: str, status: str, now: float) -> str:
    same = (each.last_transition_time for each in before.conditions if each.type == kind and each.status == status)
    return next(same, moment(now))


def _state(context: RunContext, decision: Decision, states: dict[str, ConditionState]) -> State:
    if decision.end:
        return "Succeeded" if decision.end.succeeded else "Failed"
    if context.run.spec.suspend:
        return "Suspended"
    if states["Prepared"].status != "True":
        return "Preparing" if states["Prepared"].reason == "Preparing" else "Pending"
    pods = (states["LearnerReady"], states["SamplersAvailable"])
    return "Pending" if any(each.status == "False" and each.reason in _NO_PODS for each in pods) else "Running"


def _learner(context: RunContext) -> LearnerStatus | None:
    progress = context.progress
    if progress is None or not progress.prepared:  # the volume is another run's then, or empty
        return context.before.learner
    return LearnerStatus.read(
        {
            "step": progress.step,
            "weightsVersion": progress.weights_version,
            "checkpointStep": progress.checkpoint_step,
            "restarts": progress.attempts.get("crashed", 0),
            "reward": _rounded(progress.reward),
            "lag": _rounded(progress.lag),
        }
    )


def _samplers(context: RunContext, decision: Decision) -> list[SamplerStatus]:
    before = {pool.name: pool for pool in context.before.samplers}
    return [_sampler(context, decision, pool.name, before.get(pool.name)) for pool in context.run.spec.samplers]


def _sampler(context: RunContext, decision: Decision, name: str, before: SamplerStatus | None) -> SamplerStatus:
    deployment = context.child(DEPLOYMENT.name, sampler_name(context.name, name))
    progress = context.progress.pools.get(name) if context.progress else None
    desired = decision.replicas.samplers[name]
    return SamplerStatus.read(
        {
            "name": name,
            "desired": desired,
            "ready": min(deployment.ready, desired) if deployment else 0,
            "weightsVersion": progress.weights_version if progress else before and before.weights_version,
            "rollouts": progress.rollouts if progress else before and before.rollouts,
            "rejected": progress.rejected if progress else before and before.rejected,
        }
    )


def _evaluation(context: RunContext, decision: Decision) -> EvaluationStatus | None:
    progress = context.progress if context.progress and context.progress.prepared else None
    before = context.before.evaluation or EvaluationStatus()
    best = progress.evaluation_best if progress else before.best
    last = progress.evaluation_last if progress else before.last
    gap = None if best is None or last is None else best - last
    failed = sorted(decision.failed_evaluations)
    if best is None and not failed:
        return None
    return EvaluationStatus(best=_rounded(best), last=_rounded(last), gap=_rounded(gap), failed_steps=failed[-256:])


def _resumes(context: RunContext) -> int | None:
    """What `failurePolicy.resumes` of a failed run has to exceed to resume it: its value when the run ended."""
    if context.has_ended and not context.is_resumed:
        return context.before.resumes
    return context.run.spec.failure_policy.resumes or None


def _moment(at: float | None) -> str | None:
    return None if at is None else moment(at)


def _rounded(value: float | None) -> float | None:
    """To six digits; None for NaN and infinity, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else round(value, 6)
