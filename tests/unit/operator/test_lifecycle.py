"""What should be at a moment of a run; times are seconds after START and worked by hand."""

from __future__ import annotations

import pytest

from heterorl.exchange.version import Version
from heterorl.kubernetes.names import prepare_name
from heterorl.monitoring.run_metrics import RunProgress
from heterorl_operator.lifecycle import decide, preparation_problem
from heterorl_operator.timestamps import moment, seconds
from unit.operator.operator_world import (
    CREATED,
    EARLIER,
    START,
    STARTED,
    body,
    child_of,
    children,
    claim_body,
    condition,
    context,
    ended,
    job_end,
    pod,
    run_of,
)

PREPARE = prepare_name(run_of())
STARTED_NOW = {"start_time": STARTED}
FINISHED = RunProgress(step=8, steps=8, prepared=True, finished=True)


def at(offset):
    """A moment as text."""
    return moment(START + offset)


def succeeded(offset=0.0):
    """Status of a run that ended well then."""
    end = condition("Succeeded", "True", "Trained", message="8 steps are trained")
    return {**STARTED_NOW, "completion_time": at(offset), "conditions": [end]}


def failed(reason):
    end = condition("Failed", "True", reason, message="said then")
    return {**STARTED_NOW, "completion_time": STARTED, "conditions": [end]}


def counts(decision):
    """Replicas of the learner and of each pool."""
    return decision.replicas.learner, dict(decision.replicas.samplers)


def failed_preparation(message):
    """A preparation that failed with these last lines."""
    job = body("Job", PREPARE, status=job_end("Failed"))
    old = {"metadata": {"creationTimestamp": EARLIER}}  # sorted by name, the first try comes last
    tries = [
        pod("prepare", "x", owner=f"uid-of-{PREPARE}", container=ended(2, message)),
        pod("prepare", "y", owner=f"uid-of-{PREPARE}", container=ended(1, "the first try"), **old),
        pod("prepare", "z", owner="uid-of-another-job", container=ended(2, "VolumeInUse: said of another try")),
    ]
    pods = tries if message else []
    return {"children": children(job), "pods": pods}


# ── moments ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("text", "value"),
    [(STARTED, START), (CREATED, START), (EARLIER, START - 10), ("1970-01-01T01:00:00.250+01:00", 0.25)],
)
def test_moments_are_read_as_the_operator_and_as_the_api_server_write_them(text, value):
    assert seconds(text) == value


def test_moments_are_written_to_the_millisecond():
    assert moment(0.25) == "1970-01-01T00:00:00.250Z"
    assert moment(START) == STARTED


# ── start, suspension ────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_first_pass_starts_the_run_with_all_replicas_it_asks_for():
    spec = {"samplers": [{"name": "near", "replicas": 2}, {"name": "far", "replicas": 3}], "learner": {"replicas": 2}}
    decision = decide(context(spec=spec))
    assert (decision.clock.start, decision.clock.completion, decision.end) == (START, None, None)
    assert counts(decision) == (2, {"near": 2, "far": 3})
    assert decision.with_jobs
    assert not decision.expired
    assert decision.requeue_s is None  # nothing changes by time alone


def test_a_run_that_is_suspended_from_the_beginning_starts_when_it_is_resumed():
    decision = decide(context(spec={"suspend": True}))
    assert (decision.clock.start, decision.clock.suspended_since) == (None, START)
    assert counts(decision) == (0, {"near": 0})
    assert not decision.with_jobs
    decision = decide(context(100, before={"suspended_since": STARTED}))
    clock = decision.clock
    assert (clock.start, clock.suspended_since, clock.suspended_s) == (START + 100, None, 0.0)
    assert counts(decision) == (1, {"near": 1})


def test_time_stands_still_while_a_run_is_suspended_and_suspensions_add_up():
    before = {**STARTED_NOW, "suspended_seconds": 10.0}
    clock = decide(context(100, spec={"suspend": True}, before=before)).clock
    assert (clock.suspended_since, clock.suspended_s) == (START + 100, 10.0)
    assert clock.elapsed_s(START + 100) == 90
    before["suspended_since"] = at(100)
    clock = decide(context(150, spec={"suspend": True}, before=before)).clock
    assert (clock.suspended_since, clock.suspended_s) == (START + 100, 10.0)
    assert clock.elapsed_s(START + 150) == 90
    clock = decide(context(160, before=before)).clock
    assert (clock.suspended_since, clock.suspended_s) == (None, 70.0)
    assert clock.elapsed_s(START + 200) == 130


# ── deadline, grace, TTL ─────────────────────────────────────────────────────────────────────────────────────────────
def test_a_deadline_ends_the_run_at_its_second_and_stops_everything():
    spec = {"activeDeadlineSeconds": 3600}
    decision = decide(context(3599, spec=spec, before=STARTED_NOW))
    assert (decision.end, decision.requeue_s) == (None, 1.0)
    decision = decide(context(3600, spec=spec, before=STARTED_NOW))
    assert decision.end is not None
    assert (decision.end.succeeded, decision.end.reason) == (False, "DeadlineExceeded")
    assert decision.clock.completion == START + 3600
    assert counts(decision) == (0, {"near": 0})
    assert not decision.with_jobs


def test_a_deadline_does_not_count_the_time_of_suspensions():
    spec, before = {"activeDeadlineSeconds": 3600}, {**STARTED_NOW, "suspended_seconds": 600.0}
    decision = decide(context(3700, spec=spec, before=before))
    assert (decision.end, decision.requeue_s) == (None, 500.0)
    assert decide(context(4200, spec=spec, before=before)).end is not None
    suspended = {**before, "suspended_since": at(3000)}
    assert decide(context(9000, spec={**spec, "suspend": True}, before=suspended)).end is None


def test_a_finished_run_gives_its_samplers_back_at_once_and_its_learner_after_the_grace():
    spec = {"learner": {"finishGraceSeconds": 300}}
    decision = decide(context(50, spec=spec, before=STARTED_NOW, progress=FINISHED))
    assert decision.end is not None
    assert (decision.end.succeeded, decision.end.reason) == (True, "Trained")
    assert "8 steps" in decision.end.message
    assert decision.clock.completion == START + 50
    assert counts(decision) == (1, {"near": 0})
    assert decision.requeue_s == 300.0
    assert counts(decide(context(349, spec=spec, before=succeeded(50)))) == (1, {"near": 0})
    decision = decide(context(350, spec=spec, before=succeeded(50)))
    assert counts(decision) == (0, {"near": 0})
    assert decision.requeue_s == 3300.0  # an hour after the end at 50 s


def test_a_finished_learner_stays_for_its_last_evaluation_but_not_for_more_than_an_hour():
    due = RunProgress(prepared=True, finished=True, evaluations_due=(Version(8, 1),))
    assert counts(decide(context(3000, before=succeeded(), progress=due)))[0] == 1
    assert counts(decide(context(3000, before=succeeded(), progress=FINISHED)))[0] == 0
    running = children(body("Job", "run-eval-8"))
    assert counts(decide(context(3000, before=succeeded(), progress=FINISHED, children=running)))[0] == 1
    assert counts(decide(context(4000, before=succeeded(), progress=due, children=running)))[0] == 0


def test_nothing_is_evaluated_once_there_is_no_learner_to_tell_that_it_is_done():
    due = RunProgress(prepared=True, finished=True, evaluations_due=(Version(8, 1),))
    assert decide(context(3000, before=succeeded(), progress=due)).evaluation == Version(8, 1)
    assert decide(context(4000, before=succeeded(), progress=due)).evaluation is None


def test_a_record_is_deleted_when_it_was_kept_long_enough():
    spec = {"ttlSecondsAfterFinished": 1000}
    decision = decide(context(400, spec=spec, before=succeeded(10)))
    assert (decision.expired, decision.requeue_s) == (False, 610.0)
    assert not decide(context(1009, spec=spec, before=succeeded(10))).expired
    assert decide(context(1010, spec=spec, before=succeeded(10))).expired
    assert not decide(context(1_000_000, before=succeeded(10))).expired  # without a TTL it stays
    assert not decide(context(1_000_000, spec=spec, before=STARTED_NOW)).expired  # it has not ended
    assert decide(context(0, spec={"ttlSecondsAfterFinished": 0}, before=STARTED_NOW, progress=FINISHED)).expired


@pytest.mark.parametrize(
    ("before", "known", "reason"),
    [
        (succeeded(), {"progress": RunProgress(gave_up=("UserError", "later"))}, "Trained"),
        (failed("DeadlineExceeded"), {"progress": FINISHED}, "DeadlineExceeded"),
        (failed("UserError"), {"progress": RunProgress(step=1, prepared=True)}, "UserError"),
        (succeeded(), failed_preparation("it is broken"), "Trained"),
    ],
)
def test_an_end_is_for_good_whatever_happens_later(before, known, reason):
    decision = decide(context(60, before=before, **known))
    assert decision.end is not None
    assert decision.end.reason == reason
    assert decision.clock.completion == START
    assert decision.replicas.samplers == {"near": 0}


def test_an_ended_run_that_is_suspended_keeps_its_times_and_has_no_pods():
    decision = decide(context(60, spec={"suspend": True}, before=succeeded()))
    assert decision.clock.suspended_since is None
    assert counts(decision) == (0, {"near": 0})


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_learner_that_gave_up_fails_the_run_in_its_own_words_and_can_be_read_for_a_while():
    gave_up = RunProgress(prepared=True, gave_up=("LearnerCrashed", "it crashed 4 times"))
    decision = decide(context(before=STARTED_NOW, progress=gave_up))
    assert decision.end is not None
    assert (decision.end.succeeded, decision.end.reason) == (False, "LearnerCrashed")
    assert "it crashed 4 times" in decision.end.message
    assert counts(decision) == (1, {"near": 0})
    assert not decision.with_jobs


def test_a_run_whose_volume_was_taken_over_is_not_told_to_take_it_back():
    taken = RunProgress(gave_up=("VolumeInUse", "run other has taken over the volume (resume: true)"))
    end = decide(context(before=STARTED_NOW, progress=taken)).end
    assert end is not None
    assert (end.succeeded, end.reason, end.message.count("resume: true")) == (False, "VolumeInUse", 1)


def test_a_preparation_that_failed_fails_the_run_with_its_last_line():
    decision = decide(context(before=STARTED_NOW, **failed_preparation("loading\nmodel.path is not there\n")))
    assert decision.end is not None
    assert decision.end.reason == "PreparationFailed"
    assert decision.end.message.endswith(": model.path is not there")
    assert counts(decision) == (0, {"near": 0})


def test_a_preparation_whose_pod_is_gone_fails_the_run_with_the_words_of_its_job():
    decision = decide(context(before=STARTED_NOW, **failed_preparation("")))
    assert decision.end is not None
    assert "the Job is Failed" in decision.end.message


IN_USE = "ERROR VolumeInUse: /volume holds run other; set spec.resume: true"
TOLD_IN_USE = condition("Prepared", "False", "VolumeInUse", message="VolumeInUse: /volume holds run other")


def test_a_volume_of_another_run_does_not_end_the_run_but_nothing_runs():
    decision = decide(context(before=STARTED_NOW, **failed_preparation(IN_USE)))
    assert decision.end is None
    assert counts(decision) == (0, {"near": 0})
    told = preparation_problem(context(**failed_preparation(IN_USE)))
    assert told == ("VolumeInUse", "VolumeInUse: /volume holds run other; set spec.resume: true")


def test_an_edit_that_allows_the_volume_gives_the_preparation_another_try():
    before = {**STARTED_NOW, "conditions": [TOLD_IN_USE]}
    decision = decide(context(spec={"resume": True}, before=before, **failed_preparation(IN_USE)))
    assert (decision.end, counts(decision)) == (None, (1, {"near": 1}))


def test_a_volume_of_another_run_does_not_end_the_run_after_the_pod_that_said_so_is_gone():
    before = {**STARTED_NOW, "conditions": [TOLD_IN_USE]}
    assert decide(context(before=before, **failed_preparation(""))).end is None
    assert preparation_problem(context(before=before, **failed_preparation(""))) == (
        "VolumeInUse",
        "VolumeInUse: /volume holds run other",
    )


def sampler(name, code=1, restarts=1, **fields):
    return pod("sampler", name, pool="near", container=ended(code, "trace\nwhat it said", restarts), **fields)


GONE = {"metadata": {"deletionTimestamp": CREATED}}
WELL = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}


@pytest.mark.parametrize(
    ("pods", "reason"),
    [
        ([], None),
        ([sampler("a", restarts=3), sampler("b", restarts=4)], "SamplersCrashed"),
        ([sampler("a", restarts=3), sampler("b", restarts=2)], None),
        ([sampler("a", restarts=3), sampler("b", restarts=3, **WELL)], None),
        ([sampler("a", restarts=3), sampler("b", code=143, restarts=9)], None),
        ([sampler("a", restarts=3, **GONE)], None),
        ([sampler("a", code=0), sampler("b", code=2)], None),
        ([sampler("a", restarts=3), sampler("b", code=2)], "UserError"),
        ([sampler("a", code=3, restarts=4), sampler("b", code=3, restarts=4)], None),
        ([sampler("a", code=3, restarts=9), sampler("b", code=3, restarts=9)], "SiteError"),
        ([sampler("a", code=3, restarts=9), sampler("b", restarts=2)], None),
        ([sampler("a", code=2, **GONE)], None),
    ],
)
def test_samplers_end_the_run_once_all_of_them_are_given_up(pods, reason):
    spec = {"failurePolicy": {"samplerRestarts": 2, "siteRestarts": 8}, "samplers": [{"name": "near", "replicas": 2}]}
    end = decide(context(spec=spec, before=STARTED_NOW, pods=pods)).end
    assert (end and end.reason) == reason
    if reason == "UserError":
        assert end is not None
        assert "pod b exited with a user error: exit code 2: what it said" in end.message


def test_a_run_is_not_lost_while_a_pool_may_still_come():
    crashed = [sampler("a", restarts=3)]
    windows = {"type": "windows", "windows": [{"startSeconds": 600, "endSeconds": 900, "replicas": 1}]}
    far = {"name": "far", "availability": windows}
    for pool, at, is_lost in (
        (far, 0, False),
        (far, 700, False),
        (far, 900, True),
        ({"name": "far", "replicas": 0}, 0, True),
    ):
        spec = {"failurePolicy": {"samplerRestarts": 2}, "samplers": [{"name": "near"}, pool]}
        end = decide(context(at, spec=spec, before=STARTED_NOW, pods=crashed)).end
        assert bool(end) == is_lost, (pool, at)


def test_pods_of_a_pool_that_was_removed_end_nothing():
    gone = pod("sampler", "old", pool="old", container=ended(2))
    assert decide(context(before=STARTED_NOW, pods=[gone])).end is None


# ── evaluations ──────────────────────────────────────────────────────────────────────────────────────────────────────
DUE = RunProgress(prepared=True, evaluations_due=(Version(0, 1), Version(5, 1), Version(10, 2)))


@pytest.mark.parametrize(
    ("jobs", "before", "evaluation", "given_up"),
    [
        ({}, {}, Version(0, 1), set()),
        ({"run-eval-0": {}}, {}, None, set()),  # at work
        ({"run-eval-0": job_end("Complete")}, {}, Version(0, 1), set()),  # its result has not been told yet
        ({"run-eval-0": job_end("Failed")}, {}, Version(5, 1), {0}),
        ({"run-eval-0": job_end("Failed"), "run-eval-5": {}}, {}, None, {0}),
        ({"run-eval-5": job_end("Failed")}, {"failed_steps": [0]}, Version(10, 2), {0, 5}),
        ({}, {"failed_steps": [0, 5, 10]}, None, {0, 5, 10}),
        ({"run-eval-later": {}, "run-prepare-5": {}}, {}, Version(0, 1), set()),
    ],
)
def test_evaluations_are_made_one_at_a_time_oldest_first_without_those_that_failed(jobs, before, evaluation, given_up):
    known = children(*(body("Job", name, status=status) for name, status in jobs.items()))
    status = {**STARTED_NOW, "evaluation": before} if before else STARTED_NOW
    decision = decide(context(before=status, progress=DUE, children=known))
    assert decision.evaluation == evaluation
    assert decision.failed_evaluations == given_up


def test_a_suspended_or_failed_run_evaluates_nothing_and_one_that_succeeded_does():
    assert decide(context(spec={"suspend": True}, before=STARTED_NOW, progress=DUE)).evaluation is None
    assert decide(context(before=failed("UserError"), progress=DUE)).evaluation is None
    assert decide(context(before=succeeded(), progress=DUE)).evaluation == Version(0, 1)


# ── when to decide again ───────────────────────────────────────────────────────────────────────────────────────────────
WINDOWS = {
    "type": "windows",
    "windows": [
        {"startSeconds": 10, "endSeconds": 20, "replicas": 2},
        {"startSeconds": 15, "endSeconds": 30, "replicas": 1},
    ],
}
TRACE = {"type": "trace", "trace": [{"atSeconds": 12, "replicas": 1}, {"atSeconds": 40, "replicas": 3}]}


@pytest.mark.parametrize(
    ("now", "suspended_s", "near", "far", "next_s"),
    [
        (0, 0, 0, 3, 10),  # before the first window
        (10, 0, 2, 3, 2),  # until far's first point
        (12, 0, 2, 1, 8),  # until the first window closes; that the second opens changes nothing
        (20, 0, 1, 1, 10),
        (30, 0, 0, 1, 10),
        (40, 0, 0, 3, None),
        (25, 10, 2, 1, 5),  # fifteen seconds of the run
    ],
)
def test_availability_sets_the_replicas_and_the_time_of_the_next_reconcile(now, suspended_s, near, far, next_s):
    pools = [
        {"name": "near", "replicas": 2, "availability": WINDOWS},
        {"name": "far", "replicas": 3, "availability": TRACE},
    ]
    before = {**STARTED_NOW, "suspended_seconds": float(suspended_s)}
    decision = decide(context(now, spec={"samplers": pools}, before=before))
    assert dict(decision.replicas.samplers) == {"near": near, "far": far}
    assert decision.requeue_s == next_s


def test_a_suspended_run_is_not_reconciled_for_its_availability():
    pools = [{"name": "near", "replicas": 2, "availability": WINDOWS}]
    assert decide(context(5, spec={"samplers": pools, "suspend": True}, before=STARTED_NOW)).requeue_s is None


def test_the_next_reconcile_is_at_the_earliest_time_that_is_due():
    spec = {"activeDeadlineSeconds": 7, "samplers": [{"name": "near", "replicas": 2, "availability": WINDOWS}]}
    assert decide(context(4, spec=spec, before=STARTED_NOW)).requeue_s == 3
    spec["activeDeadlineSeconds"] = 3600
    assert decide(context(4, spec=spec, before=STARTED_NOW)).requeue_s == 6


def test_a_run_is_reconciled_when_the_patience_with_its_pending_claim_ends():
    waiting = child_of("PersistentVolumeClaim", claim_body("Pending"))
    assert decide(context(4, before=STARTED_NOW, claim=waiting)).requeue_s == 6
    assert decide(context(11, before=STARTED_NOW, claim=waiting)).requeue_s is None
