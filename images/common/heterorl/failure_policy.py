"""Whose failure ends what: when a process is started no more, and when a run cannot go on without it.

    user    exit code 2   the same on every node: given up at once
    site    exit code 3   this node's GPU, disk, mount, memory or clock: on a budget of its own, with long pauses
    crash   all others    on the budget of its role

A budget refills with good steps: every `refillSteps` that the learner gets further give one restart back. A run ends
when its learner is given up, or every sampler is and none is to come. Pure: the local runner, the learner's launcher
and the operator all ask here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from heterorl.exit_codes import FailureKind, failure_kind
from heterorl.spec.run import FailurePolicySpec

Role = Literal["learner", "sampler", "evaluation"]

_EVALUATION_RESTARTS = 1
_REASONS: dict[FailureKind, str] = {"user": "UserError", "site": "SiteError"}


@dataclass(frozen=True)
class Failure:
    """One end of a process that was its own or its node's fault."""

    code: int | None
    """Its exit code; None if it is unknown."""
    step: int = 0
    """Steps the learner had trained by then."""
    message: str = ""
    """How it ended, in words, as `exit code 1: the last line of its log`."""

    @property
    def kind(self) -> FailureKind:
        """Whose failure it is."""
        return (failure_kind(self.code) if self.code is not None else None) or "crash"


@dataclass(frozen=True)
class GivenUp:
    """A process that is started no more."""

    kind: FailureKind
    message: str
    """What it did, to be read after its name."""


@dataclass(frozen=True)
class RunFailure:
    """Why a run cannot go on."""

    kind: FailureKind
    reason: str
    """UserError, SiteError, LearnerCrashed or SamplersCrashed."""
    message: str


def given_up(role: Role, failures: Sequence[Failure], policy: FailurePolicySpec) -> GivenUp | None:
    """Why a process of that role with these failures, oldest first, is started no more; None while it is."""
    if failures and failures[-1].kind == "user":
        return GivenUp("user", f"exited with a user error: {failures[-1].message}")
    for kind in ("crash", "site"):
        ours = [failure for failure in failures if failure.kind == kind]
        budget, where = budget_of(role, kind, policy)
        if is_used_up([failure.step for failure in ours], budget, policy.refill_steps):
            what = "crashed" if kind == "crash" else "failed because of its node"
            times = "once" if len(ours) == 1 else f"{len(ours)} times"
            return GivenUp(kind, f"{what} {times}, {where} is {budget}; the last time: {ours[-1].message}")
    return None


def budget_of(role: Role, kind: Literal["crash", "site"], policy: FailurePolicySpec) -> tuple[int, str]:
    """How many restarts, and the field that says so."""
    if kind == "site":
        return policy.site_restarts, "failurePolicy.siteRestarts"
    budgets = {
        "learner": (policy.learner_restarts, "failurePolicy.learnerRestarts"),
        "sampler": (policy.sampler_restarts, "failurePolicy.samplerRestarts"),
        "evaluation": (_EVALUATION_RESTARTS, "the budget of an evaluation"),
    }
    return budgets[role]


def is_used_up(steps: Sequence[int], budget: int, refill_steps: int) -> bool:
    """Whether failures at these steps of the learner, in their order, are more than the budget allows.

    A leaky bucket that holds `budget` restarts: a failure adds one, and every `refill_steps` that the learner has got
    further than at the failures before take one out. Steps that it only repeats count for nothing.
    """
    unit = refill_steps or 1
    level = furthest = 0
    for step in steps:
        if refill_steps:
            level = max(0, level - max(0, step - furthest))
        furthest = max(furthest, step)
        level += unit
    return level > budget * unit


def run_failure(
    learner: GivenUp | None, samplers: Mapping[str, GivenUp | None], *, more_to_come: bool = False
) -> RunFailure | None:
    """Why the run cannot go on; None while it can.

    `samplers`: all that there are, by name, None for one that may still work. `more_to_come`: others will be started.
    """
    if learner is not None:
        reason = "LearnerCrashed" if learner.kind == "crash" else _REASONS[learner.kind]
        return RunFailure(learner.kind, reason, f"the learner {learner.message}")
    lost = {name: why for name, why in samplers.items() if why is not None}
    if not lost or len(lost) < len(samplers) or more_to_come:
        return None
    kinds = {why.kind for why in lost.values()}
    # A user error comes first: nothing else helps until it is corrected.
    kind: FailureKind = "user" if "user" in kinds else "site" if kinds == {"site"} else "crash"
    name, first = next((name, why) for name, why in lost.items() if why.kind == kind)
    reason = "SamplersCrashed" if kind == "crash" else _REASONS[kind]
    return RunFailure(kind, reason, f"every sampler was given up; {name} {first.message}")
