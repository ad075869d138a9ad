"""Whose failure ends what: pure rules over exit codes and the steps the learner had reached."""

from __future__ import annotations

import pytest

from heterorl.exit_codes import failure_kind
from heterorl.failure_policy import Failure, GivenUp, given_up, is_used_up, run_failure
from heterorl.spec.run import FailurePolicySpec

POLICY = FailurePolicySpec(learner_restarts=1, sampler_restarts=2, site_restarts=3, refill_steps=0)


@pytest.mark.parametrize(
    ("code", "kind"),
    [(0, None), (143, None), (-15, None), (1, "crash"), (-9, "crash"), (137, "crash"), (2, "user"), (3, "site")],
)
def test_an_exit_code_tells_whose_failure_it_was(code, kind):
    assert failure_kind(code) == kind


@pytest.mark.parametrize(
    ("role", "codes", "kind"),
    [
        ("learner", [1], None),
        ("learner", [1, 1], "crash"),
        ("sampler", [1, 1], None),
        ("sampler", [1, 1, 1], "crash"),
        ("sampler", [2], "user"),
        ("sampler", [3, 3, 3], None),
        ("sampler", [3, 3, 3, 3], "site"),
        ("sampler", [3, 1, 3, 1, 3], None),  # each kind on its own budget
    ],
)
def test_each_kind_of_failure_has_a_budget_of_its_own(role, codes, kind):
    found = given_up(role, [Failure(code) for code in codes], POLICY)
    assert (found and found.kind) == kind


@pytest.mark.parametrize(
    ("steps", "budget", "refill", "used_up"),
    [
        ([0, 0, 0], 3, 10, False),
        ([0, 0, 0, 0], 3, 10, True),
        ([0, 10, 20, 30, 40], 1, 10, False),  # each ten steps give one back
        ([0, 9, 18], 1, 10, True),  # 10, then 1 + 10 = 11 of 10 a restart: over one
        ([0, 1000, 1000, 1000], 2, 10, True),  # long health fills the budget, no more than that
        ([50, 10, 60, 20], 2, 10, True),  # only the ten steps beyond 50 count; what is repeated does not
        ([0, 100, 200], 1, 0, True),  # 0: nothing is given back
    ],
)
def test_a_budget_refills_with_the_steps_the_learner_gets_further(steps, budget, refill, used_up):
    assert is_used_up(steps, budget, refill) is used_up


SITE, USER, CRASH = GivenUp("site", "has no GPU"), GivenUp("user", "was misused"), GivenUp("crash", "crashed")


@pytest.mark.parametrize(
    ("learner", "samplers", "reason"),
    [
        (None, {"far-0": None}, None),
        (None, {"far-0": USER, "far-1": None}, None),
        (None, {}, None),
        (CRASH, {"far-0": None}, "LearnerCrashed"),
        (SITE, {"far-0": None}, "SiteError"),
        (None, {"far-0": SITE, "far-1": USER}, "UserError"),
        (None, {"far-0": SITE, "far-1": SITE}, "SiteError"),
        (None, {"far-0": SITE, "far-1": CRASH}, "SamplersCrashed"),
    ],
)
def test_a_run_ends_with_its_learner_or_with_the_last_of_its_samplers(learner, samplers, reason):
    found = run_failure(learner, samplers)
    assert (found and found.reason) == reason


def test_a_run_goes_on_while_other_samplers_are_to_come():
    assert run_failure(None, {"far-0": CRASH}, more_to_come=True) is None
