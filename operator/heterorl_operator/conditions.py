"""The conditions of a run's status, each a pure function of what is known, decided and refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from heterorl.kubernetes.names import learner_name, prepare_name, sampler_name
from heterorl.monitoring.run_metrics import RunProgress
from heterorl_operator.cache import CachedPod
from heterorl_operator.context import RunContext
from heterorl_operator.lifecycle import CLAIM_PATIENCE_S, Decision, preparation_problem
from heterorl_operator.podstate import create_problem, problem_of
from heterorl_operator.problems import NEEDS_ACTION, ObjectProblem, Problem
from heterorl_operator.resources import CLAIM, DEPLOYMENT, JOB, SERVICE, STATEFUL_SET
from heterorl_operator.timestamps import moment, seconds

_LEARNER_REASONS = ("Training", "Stalled", "WeightsRefused", "WaitingForPreparation")
"""Reasons of the condition Progressing that follow from the learner's progress."""


@dataclass(frozen=True)
class ConditionState:
    """A condition without its times."""

    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str


_NOT_STARTED = ConditionState("Unknown", "NotStarted", "the learner has not reported progress yet")


def condition_states(
    context: RunContext, decision: Decision, problems: Sequence[ObjectProblem]
) -> dict[str, ConditionState]:
    """All conditions by type."""
    parts = {
        "StorageReady": _storage(context, problems),
        "Prepared": _prepared(context, decision, problems),
        "LearnerReady": _learner_ready(context, decision, problems),
        "SamplersAvailable": _samplers_available(context, decision, problems),
        "Progressing": _progressing(context, decision),
    }
    suspended = _suspended(context)
    ready = _ready(decision, suspended, parts, problems)
    return {"Ready": ready, **parts, **_ended(decision), "Suspended": suspended}


def _ready(
    decision: Decision, suspended: ConditionState, parts: dict[str, ConditionState], problems: Sequence[ObjectProblem]
) -> ConditionState:
    if decision.end:
        return ConditionState("False", decision.end.reason, decision.end.message)
    # A claim that is in use and only cannot grow holds nothing up.
    blocking = [each for each in problems if each.kind != CLAIM.name or parts["StorageReady"].status != "True"]
    if blocking:
        return ConditionState("False", *blocking[0].cause)
    if suspended.status == "True":
        return ConditionState("False", suspended.reason, suspended.message)
    needed = [parts[kind] for kind in ("StorageReady", "Prepared", "LearnerReady", "SamplersAvailable")]
    unmet = [part for part in needed if part.status != "True"]
    if unmet:
        first = min(unmet, key=_urgency)
        return ConditionState("False", first.reason, first.message)
    return ConditionState("True", "Running", "learner and samplers are running")


def _urgency(state: ConditionState) -> int:
    """Problems that need action go before what resolves by itself.

    A claim may merely wait for a pod that no node takes (`volumeBindingMode: WaitForFirstConsumer`).
    """
    return 2 if state.reason not in NEEDS_ACTION else 1 if state.reason == "ClaimPending" else 0


def _ended(decision: Decision) -> dict[str, ConditionState]:
    end = decision.end
    if end is None:
        not_yet = ConditionState("False", "NotFinished", "the run has not ended")
        return {"Succeeded": not_yet, "Failed": not_yet}
    true, false = (ConditionState(status, end.reason, end.message) for status in ("True", "False"))
    return {"Succeeded": true, "Failed": false} if end.succeeded else {"Succeeded": false, "Failed": true}


def _suspended(context: RunContext) -> ConditionState:
    if context.run.spec.suspend:
        message = "spec.suspend is true: no pods run, the volume is kept; set it to false to resume"
        return ConditionState("True", "Suspended", message)
    return ConditionState("False", "NotSuspended", "the run is not suspended")


def _storage(context: RunContext, problems: Sequence[ObjectProblem]) -> ConditionState:
    volume, claim = context.run.spec.exchange.volume, context.claim
    refused = _first(problems, CLAIM.name)
    if refused and not (claim and claim.phase == "Bound"):
        return ConditionState("False", *refused)
    if claim is None:
        if volume.claim_name:
            return ConditionState(
                "False",
                "ClaimNotFound",
                f"there is no PersistentVolumeClaim {volume.claim_name} in namespace {context.run.metadata.namespace};"
                " create it, or start a run whose exchange.volume names one that exists",
            )
        return ConditionState("Unknown", "ClaimRequested", "the claim was created")
    if claim.phase == "Bound":
        if refused:
            message = f"claim {claim.name} is bound and stays in use as it is: {refused.message}"
            return ConditionState("True", "ResizeRefused", message)
        return ConditionState("True", "Bound", f"claim {claim.name} is bound")
    if claim.phase == "Lost":
        return ConditionState(
            "False", "ClaimLost", f"claim {claim.name} lost its PersistentVolume; its data is gone, start a new run"
        )
    waited = context.now - seconds(claim.created)
    if waited < CLAIM_PATIENCE_S:
        return ConditionState("Unknown", "ClaimWaiting", f"claim {claim.name} waits for its volume")
    storage_class = volume.storage_class_name or "by default"
    what = f"{volume.size}, {'/'.join(volume.access_modes)}, storage class {storage_class}"
    return ConditionState(
        "False",
        "ClaimPending",
        f"claim {claim.name} ({what}) is bound to no volume; `kubectl describe pvc {claim.name}` says why, `kubectl get"
        " storageclass` lists the classes: create a PersistentVolume that fits, or start a run with another"
        " exchange.volume",
    )


def _prepared(context: RunContext, decision: Decision, problems: Sequence[ObjectProblem]) -> ConditionState:
    name = prepare_name(context.run)
    job = context.child(JOB.name, name)
    done = context.condition("Prepared") == "True" or (job is not None and job.phase == "Complete")
    if done or (context.progress and context.progress.prepared):
        return ConditionState("True", "Prepared", "model and data are on the volume")
    newest = context.pods_under(job)[-1:]  # the Job may have replaced those that failed
    problem = preparation_problem(context) or _first(problems, JOB.name) or _pod_problem(newest)
    if problem := problem or _create_problem(context, (JOB.name, name)):
        return ConditionState("False", *problem)
    if idle := _idle(context, decision):
        return idle
    if any(pod.phase == "Running" for pod in newest):
        message = f"model and data are being put onto the volume; follow with `kubectl logs -f job/{name}`"
        return ConditionState("False", "Preparing", message)
    return ConditionState("False", "PreparationPending", f"the pod of job/{name} has not started yet")


def _learner_ready(context: RunContext, decision: Decision, problems: Sequence[ObjectProblem]) -> ConditionState:
    if problem := _first(problems, STATEFUL_SET.name, SERVICE.name):
        return ConditionState("False", *problem)
    if idle := _idle(context, decision):
        return idle
    name, wanted = learner_name(context.name), decision.replicas.learner
    learner = context.child(STATEFUL_SET.name, name)
    if learner and 0 < wanted <= learner.ready:
        return ConditionState("True", "LearnerReady", "the learner is ready")
    if problem := _pod_problem(context.pods_of("learner")) or _create_problem(context, (STATEFUL_SET.name, name)):
        return ConditionState("False", *problem)
    return ConditionState(
        "False", "LearnerStarting", f"{learner.ready if learner else 0} of {wanted} learner pods are ready"
    )


def _samplers_available(context: RunContext, decision: Decision, problems: Sequence[ObjectProblem]) -> ConditionState:
    if problem := _first(problems, DEPLOYMENT.name):
        return ConditionState("False", *problem)
    if idle := _idle(context, decision):
        return idle
    wanted = decision.replicas.samplers
    places = {pool: (DEPLOYMENT.name, sampler_name(context.name, pool)) for pool in wanted}
    found = {pool: context.child(*place) for pool, place in places.items()}
    ready = sum(min(child.ready, wanted[pool]) for pool, child in found.items() if child)
    desired = sum(wanted.values())
    quorum = min(context.run.spec.failure_policy.min_samplers, desired)
    if desired == 0:
        return ConditionState("True", "NoneWanted", "availability asks for no sampler now")
    pods = [pod for pool in wanted for pod in context.pods_of("sampler", pool)]
    problem = _pod_problem(pods) or _create_problem(context, *places.values()) if ready < desired else None
    if ready >= quorum:
        message = f"at least {quorum} samplers are ready (failurePolicy.minSamplers)"
        return ConditionState("True", "QuorumReached", f"{message}; {problem.message}" if problem else message)
    if problem:
        return ConditionState("False", *problem)
    return ConditionState("False", "BelowQuorum", f"fewer than {quorum} samplers are ready (failurePolicy.minSamplers)")


def _progressing(context: RunContext, decision: Decision) -> ConditionState:
    if idle := _idle(context, decision):
        return idle
    if context.unreachable:
        message = f"the learner's progress could not be read: {context.unreachable}"
        return ConditionState("Unknown", "Unreachable", message)
    progress, last = context.progress, _last_progressing(context)
    if progress is None and last is None:
        return _NOT_STARTED
    if not any(pod.phase == "Running" for pod in context.pods_of("learner")):
        return ConditionState("False", "LearnerAway", "no learner pod is running; the condition LearnerReady says why")
    if progress is None:
        return last or _NOT_STARTED  # not polled yet since the operator's start
    if progress.weights_refused:
        return ConditionState("False", "WeightsRefused", progress.weights_refused)
    if (progress.stalled_s or 0.0) > context.run.spec.learner.stall_seconds:
        return ConditionState("False", "Stalled", _stalled(context, progress))
    if not progress.prepared:
        return ConditionState("False", "WaitingForPreparation", "the learner waits for model and data")
    return ConditionState("True", "Training", "the learner trains")


def _last_progressing(context: RunContext) -> ConditionState | None:
    """The condition as the learner's progress made it last."""
    known = (each for each in context.before.conditions if each.type == "Progressing")
    found = next((each for each in known if each.reason in _LEARNER_REASONS), None)
    return ConditionState(found.status, found.reason, found.message) if found else None


def _stalled(context: RunContext, progress: RunProgress) -> str:
    """Since when, what each pool's samplers serve, and which of them are silent."""
    spec = context.run.spec
    # By the minute, so that the message stays the same while the stall lasts.
    since = moment((context.now - (progress.stalled_s or 0.0)) // 60 * 60)
    parts = [f"no step since {since[:16]}Z (learner.stallSeconds {spec.learner.stall_seconds:g})"]
    parts.append(f"{progress.step or 0} of {spec.learner.steps} steps are trained")
    for name, pool in sorted(progress.pools.items()):
        serves = f"serving {pool.weights_version} or newer" if pool.weights_version else "serving no weights"
        refused = f", {pool.rejected} versions refused" if pool.rejected else ""
        silent = f", silent: {', '.join(pool.silent)}" if pool.silent else ""
        # What is filtered has a number, too, which goes on rising.
        written = f"{pool.rollouts} rollouts written"
        if pool.barren:
            written = f"{pool.barren} of them filter all their groups, whose rewards are equal (algorithm.filterGroups)"
        parts.append(f"pool {name}: {pool.alive} slots alive{silent}, {serves}{refused}, {written}")
    newest = f"newest weights {progress.weights_version}; " if progress.weights_version else ""
    limit = f"rollouts older than algorithm.staleness.maxSteps ({spec.algorithm.staleness.max_steps}) are not used"
    return f"{'; '.join(parts)}; {newest}{limit}"


def _idle(context: RunContext, decision: Decision) -> ConditionState | None:
    if decision.end:
        return ConditionState("False", decision.end.reason, decision.end.message)
    if context.run.spec.suspend:
        return ConditionState("False", "Suspended", "the run is suspended")
    if preparation_problem(context):
        return ConditionState("False", "NotPrepared", "nothing runs before model and data are on the volume")
    return None


def _first(problems: Iterable[ObjectProblem], *kinds: str) -> Problem | None:
    return next((problem.cause for problem in problems if problem.kind in kinds), None)


def _pod_problem(pods: Iterable[CachedPod]) -> Problem | None:
    return next((problem for pod in pods if (problem := problem_of(pod))), None)


def _create_problem(context: RunContext, *places: tuple[str, str]) -> Problem | None:
    """Why a workload's pods cannot be created, if they cannot."""
    failures = ((place, context.create_failures.get(place)) for place in places)
    return next((create_problem(*place, words) for place, words in failures if words), None)
