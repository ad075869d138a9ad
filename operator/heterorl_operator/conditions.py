"""A run's status: a pure function of what was seen, what was decided, and what the API server refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from heterorl.kubernetes.names import learner_name, prepare_name, sampler_name
from heterorl.spec.status import Condition, EvaluationStatus, LearnerStatus, RunStatus, SamplerStatus
from heterorl_operator.cache import CachedPod
from heterorl_operator.lifecycle import CLAIM_PATIENCE_S, Decision, RunContext, preparation_trouble
from heterorl_operator.podstate import Trouble, trouble_of
from heterorl_operator.resources import CLAIM, DEPLOYMENT, JOB, SERVICE, STATEFUL_SET
from heterorl_operator.timestamps import moment, seconds

_Status = Literal["True", "False", "Unknown"]


@dataclass(frozen=True)
class ObjectProblem:
    """Something that could not be made as it should be."""

    kind: str
    name: str
    trouble: Trouble


@dataclass(frozen=True)
class Judgement:
    """A condition without its times."""

    status: _Status
    reason: str
    message: str


def status_of(view: RunContext, decision: Decision, problems: Sequence[ObjectProblem]) -> RunStatus:
    """The whole status."""
    judged = _judge(view, decision, problems)
    clock = decision.clock
    samplers = _samplers(view, decision)
    ready, desired = (sum(getattr(pool, which) or 0 for pool in samplers) for which in ("ready", "desired"))
    return RunStatus(
        observed_generation=view.generation,
        state=_state(view, decision, judged),
        conditions=[_condition(view, kind, judgement) for kind, judgement in judged.items()],
        learner=_learner(view),
        samplers=samplers,
        samplers_ready=f"{ready}/{desired}",
        evaluation=_evaluation(view, decision),
        start_time=_moment(clock.start),
        suspended_since=_moment(clock.suspended_since),
        suspended_seconds=round(clock.suspended_s, 3) or None,
        completion_time=_moment(clock.completion),
    )


def refused(before: RunStatus, generation: int, trouble: Trouble, now: float) -> RunStatus:
    """The status of a run that cannot be worked on at all; the rest of it stays as it was."""
    ready = Condition(
        type="Ready",
        status="False",
        reason=trouble.reason,
        message=trouble.message,
        last_transition_time=_since(before, "Ready", "False", now),
        observed_generation=generation,
    )
    others = [each for each in before.conditions if each.type != "Ready"]
    changes = {"observed_generation": generation, "state": before.state or "Pending", "conditions": [ready, *others]}
    return before.model_copy(update=changes)


def transitions(before: RunStatus, after: RunStatus) -> Iterator[tuple[str, str, str]]:
    """What is worth an event: (Normal or Warning, reason, message)."""
    known = {each.type: each for each in before.conditions}
    for each in after.conditions:
        earlier = known.get(each.type)
        if earlier and (earlier.status, earlier.reason) == (each.status, each.reason):
            continue
        if each.type in _WORTH_AN_EVENT and each.status == "True":
            yield "Warning" if each.type == "Failed" else "Normal", each.reason, each.message
        elif each.type == "Suspended" and earlier and earlier.status == "True":
            yield "Normal", "Resumed", "the run goes on"
        elif each.status == "False" and each.reason in (_TROUBLES if each.type != "Ready" else ("InvalidSpec",)):
            yield "Warning", each.reason, each.message
    desired, wanted = ({pool.name: pool.desired for pool in status.samplers} for status in (before, after))
    for name in wanted.keys() - desired.keys() if before.samplers else ():
        yield "Normal", "PoolAdded", f"sampler pool {name} is new; was that a slip, remove it from spec.samplers"
    for name in desired.keys() - wanted.keys():
        yield "Normal", "PoolRemoved", f"sampler pool {name} is removed, and its samplers with it"
    for pool in after.samplers:
        if desired.get(pool.name) is not None and desired[pool.name] != pool.desired:
            yield "Normal", "Scaled", f"sampler pool {pool.name}: {desired[pool.name]} to {pool.desired} replicas"
    restarts = [(status.learner and status.learner.restarts) or 0 for status in (before, after)]
    if restarts[1] > restarts[0]:
        yield "Warning", "LearnerRestarted", f"the learner crashed; restart {restarts[1]}"


_TOLD = ("Training", "Stalled", "WaitingForPreparation")
"""Reasons of the condition Progressing that follow from what a learner told."""
_WORTH_AN_EVENT = {"Prepared", "LearnerReady", "Succeeded", "Failed", "Suspended"}
_TROUBLES = {
    "ClaimPending",
    "ClaimNotFound",
    "ClaimLost",
    "Unschedulable",
    "ImagePullFailed",
    "PodConfigInvalid",
    "Crashed",
    "Stalled",
    "VolumeInUse",
    "NameConflict",
    "InvalidPodTemplate",
    "Forbidden",
    "QuotaExceeded",
    "Refused",
}


# ── conditions ───────────────────────────────────────────────────────────────────────────────────────────────────────
def _judge(view: RunContext, decision: Decision, problems: Sequence[ObjectProblem]) -> dict[str, Judgement]:
    parts = {
        "StorageReady": _storage(view, problems),
        "Prepared": _prepared(view, decision, problems),
        "LearnerReady": _learner_ready(view, decision, problems),
        "SamplersAvailable": _samplers_available(view, decision, problems),
        "Progressing": _progressing(view, decision),
    }
    end = decision.end
    not_yet = Judgement("False", "NotFinished", "the run has not ended")
    succeeded = Judgement("True", end.reason, end.message) if end and end.succeeded else not_yet
    failed = Judgement("True", end.reason, end.message) if end and not end.succeeded else not_yet
    if end:
        other = Judgement("False", end.reason, end.message)
        succeeded, failed = (succeeded, other) if end.succeeded else (other, failed)
    suspended = (
        Judgement(
            "True", "Suspended", "spec.suspend is true: nothing runs, the volume is kept; set it to false to go on"
        )
        if view.run.spec.suspend
        else Judgement("False", "NotSuspended", "the run is not suspended")
    )
    ready = _ready(decision, suspended, parts, problems)
    return {"Ready": ready, **parts, "Succeeded": succeeded, "Failed": failed, "Suspended": suspended}


def _ready(
    decision: Decision, suspended: Judgement, parts: dict[str, Judgement], problems: Sequence[ObjectProblem]
) -> Judgement:
    if decision.end:
        return Judgement("False", decision.end.reason, decision.end.message)
    if problems:
        return Judgement("False", *problems[0].trouble)
    if suspended.status == "True":
        return Judgement("False", suspended.reason, suspended.message)
    needed = [parts[kind] for kind in ("StorageReady", "Prepared", "LearnerReady", "SamplersAvailable")]
    troubled = [part for part in needed if part.status != "True"]
    if troubled:
        worst = min(troubled, key=_severity)
        return Judgement("False", worst.reason, worst.message)
    return Judgement("True", "Running", "learner and samplers are at work")


def _severity(part: Judgement) -> int:
    """What somebody has to do something about goes before what will come by itself.

    A claim may only wait for a pod that no node takes (`volumeBindingMode: WaitForFirstConsumer`).
    """
    return 2 if part.reason not in _TROUBLES else 1 if part.reason == "ClaimPending" else 0


def _storage(view: RunContext, problems: Sequence[ObjectProblem]) -> Judgement:
    if trouble := _first(problems, CLAIM.name):
        return Judgement("False", *trouble)
    volume, claim = view.run.spec.exchange.volume, view.claim
    if claim is None:
        if volume.claim_name:
            return Judgement(
                "False",
                "ClaimNotFound",
                f"there is no PersistentVolumeClaim {volume.claim_name} in namespace {view.run.metadata.namespace};"
                " create it, or start a run whose exchange.volume names one that exists",
            )
        return Judgement("Unknown", "ClaimRequested", "the claim was asked for")
    if claim.phase == "Bound":
        return Judgement("True", "Bound", f"claim {claim.name} is bound")
    if claim.phase == "Lost":
        return Judgement(
            "False", "ClaimLost", f"claim {claim.name} lost its PersistentVolume; its data is gone, start anew"
        )
    waited = view.now - seconds(claim.created)
    if waited < CLAIM_PATIENCE_S:
        return Judgement("Unknown", "ClaimWaiting", f"claim {claim.name} waits for its volume")
    storage_class = volume.storage_class_name or "by default"
    what = f"{volume.size}, {'/'.join(volume.access_modes)}, storage class {storage_class}"
    return Judgement(
        "False",
        "ClaimPending",
        f"claim {claim.name} ({what}) is bound to no volume; `kubectl describe pvc {claim.name}` says why, `kubectl get"
        " storageclass` what there is: create a PersistentVolume that fits, or start a run with another"
        " exchange.volume",
    )


def _prepared(view: RunContext, decision: Decision, problems: Sequence[ObjectProblem]) -> Judgement:
    job = view.child(JOB.name, prepare_name(view.run))
    done = view.condition("Prepared") == "True" or (job is not None and job.phase == "Complete")
    if done or (view.progress and view.progress.prepared):
        return Judgement("True", "Prepared", "model and data are on the volume")
    if trouble := preparation_trouble(view) or _first(problems, JOB.name) or _troubled(view.pods_under(job)):
        return Judgement("False", *trouble)
    if idle := _idle(view, decision):
        return idle
    message = f"model and data are put onto the volume; follow with `kubectl logs -f job/{prepare_name(view.run)}`"
    return Judgement("False", "Preparing", message)


def _learner_ready(view: RunContext, decision: Decision, problems: Sequence[ObjectProblem]) -> Judgement:
    if trouble := _first(problems, STATEFUL_SET.name, SERVICE.name):
        return Judgement("False", *trouble)
    if idle := _idle(view, decision):
        return idle
    learner, wanted = view.child(STATEFUL_SET.name, learner_name(view.name)), decision.replicas.learner
    if learner and 0 < wanted <= learner.ready:
        return Judgement("True", "LearnerReady", "the learner is ready")
    if trouble := _troubled(view.pods_of("learner")):
        return Judgement("False", *trouble)
    return Judgement(
        "False", "LearnerStarting", f"{learner.ready if learner else 0} of {wanted} learner pods are ready"
    )


def _samplers_available(view: RunContext, decision: Decision, problems: Sequence[ObjectProblem]) -> Judgement:
    if trouble := _first(problems, DEPLOYMENT.name):
        return Judgement("False", *trouble)
    if idle := _idle(view, decision):
        return idle
    pools = _samplers(view, decision)
    desired, ready = sum(pool.desired or 0 for pool in pools), sum(pool.ready or 0 for pool in pools)
    quorum = min(view.run.spec.failure_policy.min_samplers, desired)
    if desired == 0:
        return Judgement("True", "NoneWanted", "availability asks for no sampler now")
    if ready >= quorum:
        return Judgement("True", "QuorumReached", f"at least {quorum} samplers are ready (failurePolicy.minSamplers)")
    pods = [pod for pool in pools for pod in view.pods_of("sampler", pool.name)]
    if trouble := _troubled(pods):
        return Judgement("False", *trouble)
    return Judgement("False", "BelowQuorum", f"fewer than {quorum} samplers are ready (failurePolicy.minSamplers)")


def _progressing(view: RunContext, decision: Decision) -> Judgement:
    if idle := _idle(view, decision):
        return idle
    if view.unreachable:
        return Judgement("Unknown", "Unreachable", f"the learner's pod did not tell its progress: {view.unreachable}")
    told = [each for each in view.before.conditions if each.type == "Progressing" and each.reason in _TOLD]
    if view.progress is None and not told:
        return Judgement("Unknown", "NotStarted", "the learner has not told its progress yet")
    if not any(pod.phase == "Running" for pod in view.pods_of("learner")):
        return Judgement("False", "LearnerAway", "no pod of the learner runs; the condition LearnerReady says why")
    if view.progress is None:  # it has not been asked yet since the operator's start
        return Judgement(told[0].status, told[0].reason, told[0].message)
    limit = view.run.spec.learner.stall_seconds
    if (view.progress.stalled_s or 0.0) > limit:
        return Judgement(
            "False",
            "Stalled",
            f"no step was trained for more than {limit:g} s (learner.stallSeconds); do the samplers run, and are their"
            " rollouts within algorithm.staleness.maxSteps?",
        )
    if not view.progress.prepared:
        return Judgement("False", "WaitingForPreparation", "the learner waits for model and data")
    return Judgement("True", "Training", "the learner trains")


def _idle(view: RunContext, decision: Decision) -> Judgement | None:
    if decision.end:
        return Judgement("False", decision.end.reason, decision.end.message)
    if view.run.spec.suspend:
        return Judgement("False", "Suspended", "the run is suspended")
    if preparation_trouble(view):
        return Judgement("False", "NotPrepared", "nothing runs before model and data are on the volume")
    return None


def _condition(view: RunContext, kind: str, judgement: Judgement) -> Condition:
    return Condition(
        type=kind,
        status=judgement.status,
        reason=judgement.reason,
        message=judgement.message,
        last_transition_time=_since(view.before, kind, judgement.status, view.now),
        observed_generation=view.generation,
    )


def _since(before: RunStatus, kind: str, status: str, now: float) -> str:
    same = (each.last_transition_time for each in before.conditions if each.type == kind and each.status == status)
    return next(same, moment(now))


def _first(problems: Sequence[ObjectProblem], *kinds: str) -> Trouble | None:
    return next((problem.trouble for problem in problems if problem.kind in kinds), None)


def _troubled(pods: Sequence[CachedPod]) -> Trouble | None:
    return next((trouble for pod in pods if (trouble := trouble_of(pod))), None)


# ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _state(
    view: RunContext, decision: Decision, judged: dict[str, Judgement]
) -> Literal["Pending", "Preparing", "Running", "Suspended", "Succeeded", "Failed"]:
    if decision.end:
        return "Succeeded" if decision.end.succeeded else "Failed"
    if view.run.spec.suspend:
        return "Suspended"
    if judged["Prepared"].status == "True":
        return "Running"
    at_work = view.pods_under(view.child(JOB.name, prepare_name(view.run)))
    return "Preparing" if judged["Prepared"].reason == "Preparing" and at_work else "Pending"


def _learner(view: RunContext) -> LearnerStatus | None:
    progress = view.progress
    if progress is None or not progress.prepared:  # it knows nothing then: another run's volume, or nobody's yet
        return view.before.learner
    return LearnerStatus(
        step=progress.step,
        weights_version=progress.weights_version,
        checkpoint_step=progress.checkpoint_step,
        restarts=progress.attempts.get("crashed", 0),
        reward=_rounded(progress.reward),
        lag=_rounded(progress.lag),
    )


def _samplers(view: RunContext, decision: Decision) -> list[SamplerStatus]:
    before = {pool.name: pool for pool in view.before.samplers}
    return [_sampler(view, decision, pool.name, before.get(pool.name)) for pool in view.run.spec.samplers]


def _sampler(view: RunContext, decision: Decision, name: str, before: SamplerStatus | None) -> SamplerStatus:
    deployment = view.child(DEPLOYMENT.name, sampler_name(view.name, name))
    told = view.progress.pools.get(name) if view.progress else None
    desired = decision.replicas.samplers[name]
    return SamplerStatus(
        name=name,
        desired=desired,
        ready=min(deployment.ready, desired) if deployment else 0,
        weights_version=told.weights_version if told else before.weights_version if before else None,
        rollouts=told.rollouts if told else before.rollouts if before else None,
        rejected=told.rejected if told else before.rejected if before else None,
    )


def _evaluation(view: RunContext, decision: Decision) -> EvaluationStatus | None:
    progress = view.progress if view.progress and view.progress.prepared else None
    before = view.before.evaluation or EvaluationStatus()
    best = progress.evaluation_best if progress else before.best
    last = progress.evaluation_last if progress else before.last
    gap = None if best is None or last is None else best - last
    failed = sorted(decision.failed_evaluations)
    if best is None and not failed:
        return None
    return EvaluationStatus(best=_rounded(best), last=_rounded(last), gap=_rounded(gap), failed_steps=failed[-256:])


def _moment(at: float | None) -> str | None:
    return None if at is None else moment(at)


def _rounded(value: float | None) -> float | None:
    """To six digits; what is no number is no value, as JSON has none."""
    return None if value is None or not math.isfinite(value) else round(value, 6)
