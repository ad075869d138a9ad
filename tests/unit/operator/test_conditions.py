"""The status that is reported, and which changes of it are events; times are seconds after START."""

from __future__ import annotations

from dataclasses import replace

import pytest

from heterorl.exchange.version import Version
from heterorl.kubernetes.names import prepare_name
from heterorl.monitoring.run_metrics import PoolProgress, RunProgress
from heterorl.spec.status import RunStatus
from heterorl_operator.events import transitions
from heterorl_operator.lifecycle import decide
from heterorl_operator.problems import ObjectProblem, Problem
from heterorl_operator.status import refused, status_of
from heterorl_operator.timestamps import moment
from unit.operator.operator_world import (
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
PREPARED = condition("Prepared", "True", "Prepared")
BEFORE = {"start_time": STARTED}
GOING = {"start_time": STARTED, "conditions": [PREPARED]}
TRAINING = RunProgress(step=3, steps=8, prepared=True, stalled_s=1.0)
LEARNER = pod("learner", "run-learner-0", status={"conditions": [{"type": "Ready", "status": "True"}]})
NO_NODE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU"}


def workloads(learner=1, near=1):
    return children(
        body("StatefulSet", "run-learner", spec={"replicas": 1}, status={"readyReplicas": learner}),
        body("Deployment", "run-sampler-near", spec={"replicas": 1}, status={"readyReplicas": near}),
    )


def at_work(**known):
    """A run in which all goes well, but for what is given."""
    given = {"before": GOING, "children": workloads(), "pods": [LEARNER], "progress": TRAINING}
    return context(60, **{**given, **known})


def status(seen, *problems):
    return status_of(seen, decide(seen), problems)


def reported(seen, kind, *problems):
    """Status, reason and message of a condition."""
    (found,) = [each for each in status(seen, *problems).conditions if each.type == kind]
    return found.status, found.reason, found.message


def problem(kind, reason="QuotaExceeded", name="it"):
    return ObjectProblem(kind, name, Problem(reason, f"{kind} {name} has a problem"))


def claim(phase, age_s=0.0):
    """A claim of that age at second 60."""
    created = moment(START + 60 - age_s)
    return child_of("PersistentVolumeClaim", claim_body(phase, metadata={"creationTimestamp": created}))


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_run_at_work_is_ready_and_every_condition_says_so():
    found = status(at_work(generation=4))
    assert {each.type: (each.status, each.reason) for each in found.conditions} == {
        "Ready": ("True", "Running"),
        "StorageReady": ("True", "Bound"),
        "Prepared": ("True", "Prepared"),
        "LearnerReady": ("True", "LearnerReady"),
        "SamplersAvailable": ("True", "QuorumReached"),
        "Progressing": ("True", "Training"),
        "Succeeded": ("False", "NotFinished"),
        "Failed": ("False", "NotFinished"),
        "Suspended": ("False", "NotSuspended"),
    }
    assert found.observed_generation == 4
    assert {each.observed_generation for each in found.conditions} == {4}
    assert (found.state, found.start_time, found.completion_time) == ("Running", STARTED, None)


def test_a_run_that_is_new_says_what_it_waits_for():
    found = status(context(claim=None))
    assert {each.type: (each.status, each.reason) for each in found.conditions} == {
        "Ready": ("False", "ClaimRequested"),
        "StorageReady": ("Unknown", "ClaimRequested"),
        "Prepared": ("False", "PreparationPending"),
        "LearnerReady": ("False", "LearnerStarting"),
        "SamplersAvailable": ("False", "BelowQuorum"),
        "Progressing": ("Unknown", "NotStarted"),
        "Succeeded": ("False", "NotFinished"),
        "Failed": ("False", "NotFinished"),
        "Suspended": ("False", "NotSuspended"),
    }
    assert (found.state, found.start_time, found.samplers_ready) == ("Pending", STARTED, "0/1")
    assert found.learner is None
    assert found.evaluation is None


def test_times_of_suspension_are_kept_and_zero_is_left_out():
    before = {**BEFORE, "suspended_since": STARTED, "suspended_seconds": 1.5}
    found = status(context(60, spec={"suspend": True}, before=before))
    assert (found.suspended_since, found.suspended_seconds) == (STARTED, 1.5)
    found = status(context(60, before=before))
    assert (found.suspended_since, found.suspended_seconds) == (None, 61.5)
    assert status(context(60, before=BEFORE)).suspended_seconds is None


def test_a_reconcile_without_changes_gives_the_same_status():
    first = status(at_work())
    again = status(replace(at_work(before=first.model_dump()), now=at_work().now + 500))
    assert again == first


# ── storage ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("volume", "found", "status_", "reason", "words"),
    [
        ({"size": "1Gi"}, None, "Unknown", "ClaimRequested", ""),
        ({"claimName": "theirs"}, None, "False", "ClaimNotFound", "no PersistentVolumeClaim theirs in namespace lab"),
        ({"size": "1Gi"}, claim("Bound"), "True", "Bound", "run-volume"),
        ({"size": "1Gi"}, claim("Pending", 9), "Unknown", "ClaimWaiting", "run-volume"),
        ({"size": "7Gi", "storageClassName": "fast"}, claim("Pending", 10), "False", "ClaimPending", "7Gi"),
        (
            {"size": "1Gi", "storageClassName": "fast"},
            claim("Pending", 10),
            "False",
            "ClaimPending",
            "storage class fast",
        ),
        ({"size": "1Gi"}, claim("Lost"), "False", "ClaimLost", "its data is gone"),
    ],
)
def test_storage(volume, found, status_, reason, words):
    seen = at_work(claim=found, spec={"exchange": {"volume": volume}})
    assert reported(seen, "StorageReady")[:2] == (status_, reason)
    assert words in reported(seen, "StorageReady")[2]


# ── preparation ──────────────────────────────────────────────────────────────────────────────────────────────────────
def prepare_job(end=None):
    return children(body("Job", PREPARE, status=job_end(end) if end else {}))


WAITS = ("False", "PreparationPending")


def preparing(container=None, owner=PREPARE):
    return [pod("prepare", owner=f"uid-of-{owner}", container=container)]


@pytest.mark.parametrize(
    ("known", "expected", "state"),
    [
        ({}, WAITS, "Pending"),
        (
            {
                "children": prepare_job(),
                "pods": [pod("prepare", owner=f"uid-of-{PREPARE}", status={"phase": "Pending"})],
            },
            WAITS,
            "Pending",
        ),
        ({"children": prepare_job(), "pods": preparing()}, ("False", "Preparing"), "Preparing"),
        ({"children": prepare_job("Complete")}, ("True", "Prepared"), "Running"),
        ({"progress": RunProgress(prepared=True)}, ("True", "Prepared"), "Running"),
        ({"before": GOING}, ("True", "Prepared"), "Running"),  # its Job may be gone
        (
            {"children": prepare_job("Failed"), "pods": preparing(ended(2, "VolumeInUse: taken"))},
            ("False", "VolumeInUse"),
            "Pending",
        ),
        ({"children": prepare_job(), "pods": preparing(ended(1))}, ("False", "Crashed"), "Pending"),
        # A try that was refused the volume is no matter of the next one.
        ({"children": prepare_job(), "pods": preparing(ended(2), owner="earlier")}, WAITS, "Pending"),
        ({"spec": {"suspend": True}}, ("False", "Suspended"), "Suspended"),
    ],
)
def test_preparation_and_the_state_that_follows(known, expected, state):
    seen = context(60, **{"before": BEFORE, **known})
    assert reported(seen, "Prepared")[:2] == expected
    assert status(seen).state == state


# ── learner, samplers ────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, ("True", "LearnerReady")),
        ({"children": workloads(learner=0)}, ("False", "LearnerStarting")),
        ({"spec": {"learner": {"replicas": 2}}}, ("False", "LearnerStarting")),
        (
            {
                "children": workloads(learner=0),
                "pods": [pod("learner", status={"phase": "Pending", "conditions": [NO_NODE]})],
            },
            ("False", "Unschedulable"),
        ),
        ({"children": workloads(learner=0), "pods": [pod("learner", container=ended(137))]}, ("False", "Crashed")),
        ({"spec": {"suspend": True}}, ("False", "Suspended")),
    ],
)
def test_the_learner(known, expected):
    assert reported(at_work(**known), "LearnerReady")[:2] == expected


def test_a_learner_of_which_a_part_is_ready_says_how_many():
    seen = at_work(spec={"learner": {"replicas": 2}})
    assert reported(seen, "LearnerReady")[2] == "1 of 2 learner pods are ready"


NOBODY = {"type": "trace", "trace": [{"atSeconds": 0, "replicas": 0}]}


@pytest.mark.parametrize(
    ("spec", "ready", "expected"),
    [
        ({}, 1, ("True", "QuorumReached")),
        ({}, 0, ("False", "BelowQuorum")),
        ({"samplers": [{"name": "near", "replicas": 3}], "failurePolicy": {"minSamplers": 2}}, 2, ("True", "QuorumReached")),
        ({"samplers": [{"name": "near", "replicas": 3}], "failurePolicy": {"minSamplers": 2}}, 1, ("False", "BelowQuorum")),
        # no more than availability asks for can be missed
        ({"samplers": [{"name": "near", "replicas": 1}], "failurePolicy": {"minSamplers": 2}}, 1, ("True", "QuorumReached")),
        ({"samplers": [{"name": "near", "availability": NOBODY}]}, 0, ("True", "NoneWanted")),
        ({"suspend": True}, 0, ("False", "Suspended")),
    ],
)  # fmt: skip
def test_the_samplers(spec, ready, expected):
    assert reported(at_work(spec=spec, children=workloads(near=ready)), "SamplersAvailable")[:2] == expected


def test_samplers_below_their_quorum_say_why_one_of_them_does_not_run():
    waiting = {"state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}
    lost = pod("sampler", "far", pool="near", container=waiting)
    seen = at_work(children=workloads(near=0), pods=[LEARNER, lost])
    assert reported(seen, "SamplersAvailable")[:2] == ("False", "ImagePullFailed")
    assert reported(at_work(pods=[LEARNER, lost]), "SamplersAvailable")[:2] == ("True", "QuorumReached")


def test_ready_of_desired_is_over_all_pools_and_never_more_than_desired():
    pools = [{"name": "near", "replicas": 2}, {"name": "far", "replicas": 3}, {"name": "none", "availability": NOBODY}]
    known = children(
        body("Deployment", "run-sampler-near", status={"readyReplicas": 5}),  # some are on their way out
        body("Deployment", "run-sampler-far", status={"readyReplicas": 1}),
        body("Deployment", "run-sampler-none", status={"readyReplicas": 1}),
    )
    found = status(at_work(spec={"samplers": pools}, children=known))
    assert [(pool.name, pool.desired, pool.ready) for pool in found.samplers] == [
        ("near", 2, 2),
        ("far", 3, 1),
        ("none", 0, 0),
    ]
    assert found.samplers_ready == "3/5"


TRAINED_SO_FAR = condition("Progressing", "True", "Training")


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, ("True", "Training")),
        ({"progress": None}, ("Unknown", "NotStarted")),
        ({"unreachable": "pod run-learner-0: refused"}, ("Unknown", "Unreachable")),
        ({"progress": replace(TRAINING, stalled_s=1800.0)}, ("True", "Training")),
        ({"progress": replace(TRAINING, stalled_s=1801.0)}, ("False", "Stalled")),
        (
            {
                "progress": replace(TRAINING, weights_refused="no sampler accepts weights"),
            },
            ("False", "WeightsRefused"),
        ),
        ({"progress": replace(TRAINING, prepared=False)}, ("False", "WaitingForPreparation")),
        # What it said last does not say that it trains still.
        ({"pods": []}, ("False", "LearnerAway")),
        ({"pods": [pod("learner", status={"phase": "Pending"})]}, ("False", "LearnerAway")),
        ({"spec": {"suspend": True}}, ("False", "Suspended")),
        # The operator was started anew and has not asked yet.
        ({"progress": None, "before": {**BEFORE, "conditions": [TRAINED_SO_FAR]}}, ("True", "Training")),
        (
            {"progress": None, "before": {**BEFORE, "conditions": [TRAINED_SO_FAR]}, "pods": []},
            ("False", "LearnerAway"),
        ),
    ],
)
def test_progressing(known, expected):
    assert reported(at_work(**known), "Progressing")[:2] == expected


def test_a_stall_says_since_when_and_what_each_pool_delivers_and_stays_the_same_while_it_lasts():
    pools = {"near": PoolProgress(7, 3, 1, "v00000002-i0001"), "far": PoolProgress(silent=("far-0", "far-3"))}
    stalled = replace(TRAINING, stalled_s=1805.0, pools=pools, weights_version="v00000004-i0001")
    seen = at_work(progress=stalled)
    later = replace(seen, now=seen.now + 200, progress=replace(stalled, stalled_s=2005.0))
    message = reported(seen, "Progressing")[2]
    assert reported(later, "Progressing")[2] == message
    assert message.startswith("no step since 2023-11-14T21:44Z (learner.stallSeconds 1800)")
    assert "pool far: 0 slots alive, silent: far-0, far-3, serving no weights, 0 rollouts written" in message
    assert "pool near: 1 slots alive, serving v00000002-i0001 or newer, 3 versions refused, 7 rollouts" in message
    assert "newest weights v00000004-i0001" in message


def test_a_stall_for_want_of_groups_that_teach_is_told_as_such_and_stays_the_same_while_it_lasts():
    stalled = replace(TRAINING, stalled_s=1805.0, pools={"near": PoolProgress(70, 0, 3, "v00000002-i0001", barren=2)})
    later = replace(stalled, pools={"near": PoolProgress(99, 0, 3, "v00000002-i0001", barren=2)})
    status, reason, message = reported(at_work(progress=stalled), "Progressing")
    assert (status, reason) == ("False", "Stalled")
    assert "pool near: 3 slots alive, serving v00000002-i0001 or newer, 2 of them filter all their groups" in message
    assert reported(at_work(progress=later), "Progressing")[2] == message


def test_what_the_learner_says_is_reported_and_kept_while_it_does_not_answer():
    said = RunProgress(
        step=3, checkpoint_step=2, reward=0.12345678, lag=1.5, prepared=True, weights_version="v00000003-i0001",
        attempts={"clean": 1, "crashed": 2}, pools={"near": PoolProgress(7, 1, 1, "v00000002-i0001")},
    )  # fmt: skip
    found = status(at_work(progress=said))
    assert found.learner is not None
    assert found.learner.model_dump() == {
        "step": 3, "checkpoint_step": 2, "reward": 0.123457, "lag": 1.5, "weights_version": "v00000003-i0001",
        "restarts": 2,
    }  # fmt: skip
    (near,) = found.samplers
    assert (near.rollouts, near.rejected, near.weights_version) == (7, 1, "v00000002-i0001")
    silent = status(at_work(progress=None, before={**found.model_dump()}))
    assert silent.learner == found.learner
    assert (silent.samplers[0].rollouts, silent.samplers[0].weights_version) == (7, "v00000002-i0001")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_a_number_never_enters_a_status(value):
    said = replace(TRAINING, reward=value, lag=value, evaluation_best=value, evaluation_last=value)
    found = status(at_work(progress=said))
    assert found.learner is not None
    assert (found.learner.reward, found.learner.lag) == (None, None)
    assert found.evaluation is not None
    assert (found.evaluation.best, found.evaluation.last, found.evaluation.gap) == (None, None, None)


def test_the_gap_of_evaluations_is_best_minus_last():
    found = status(at_work(progress=replace(TRAINING, evaluation_best=0.625, evaluation_last=0.5))).evaluation
    assert found is not None
    assert (found.best, found.last, found.gap, found.failed_steps) == (0.625, 0.5, 0.125, [])


def test_failed_evaluations_are_remembered_in_order_when_their_jobs_are_gone():
    jobs = children(body("Job", "run-eval-5", status=job_end("Failed")))
    due = replace(TRAINING, evaluations_due=(Version(5, 1),))
    before = {**GOING, "evaluation": {"failed_steps": [40, 10]}}
    found = status(at_work(progress=due, children={**workloads(), **jobs}, before=before)).evaluation
    assert found is not None
    assert found.failed_steps == [5, 10, 40]


# ── ready, ends ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_ready_names_the_problem_that_needs_action_first():
    stuck = pod("learner", status={"phase": "Pending", "conditions": [NO_NODE]})
    seen = at_work(claim=claim("Pending", 5), children=workloads(learner=0, near=0), pods=[stuck])
    assert reported(seen, "StorageReady")[1] == "ClaimWaiting"  # comes by itself
    assert reported(seen, "Ready")[:2] == ("False", "Unschedulable")
    seen = at_work(claim=claim("Pending", 5), children=workloads(near=0))
    assert reported(seen, "Ready")[:2] == ("False", "ClaimWaiting")


@pytest.mark.parametrize(
    ("kind", "of"),
    [
        ("StatefulSet", "LearnerReady"),
        ("Service", "LearnerReady"),
        ("Deployment", "SamplersAvailable"),
    ],
)
def test_an_object_that_could_not_be_made_shows_in_its_condition_and_in_ready(kind, of):
    seen = at_work()
    assert reported(seen, of, problem(kind)) == ("False", "QuotaExceeded", f"{kind} it has a problem")
    assert reported(seen, "Ready", problem(kind)) == ("False", "QuotaExceeded", f"{kind} it has a problem")


def test_a_claim_that_is_refused_is_a_problem_until_it_is_bound_and_then_holds_nothing_up():
    refused = problem("PersistentVolumeClaim")
    for found in (None, claim("Pending", 1)):
        assert reported(at_work(claim=found), "StorageReady", refused)[:2] == ("False", "QuotaExceeded")
        assert reported(at_work(claim=found), "Ready", refused)[:2] == ("False", "QuotaExceeded")
    storage = reported(at_work(), "StorageReady", refused)
    assert storage[:2] == ("True", "ResizeRefused")
    assert storage[2].endswith("PersistentVolumeClaim it has a problem")
    assert reported(at_work(), "Ready", refused)[:2] == ("True", "Running")


def test_a_preparation_that_could_not_be_made_shows_until_it_is_done():
    assert reported(context(before=BEFORE), "Prepared", problem("Job"))[:2] == ("False", "QuotaExceeded")
    assert reported(at_work(), "Prepared", problem("Job"))[:2] == ("True", "Prepared")


def test_a_suspended_run_is_not_ready_and_says_how_to_go_on():
    seen = at_work(spec={"suspend": True})
    assert reported(seen, "Ready")[:2] == ("False", "Suspended")
    assert reported(seen, "Suspended")[0] == "True"
    assert "set it to false" in reported(seen, "Suspended")[2]


def test_a_run_that_succeeded_says_so_everywhere():
    found = status(at_work(progress=replace(TRAINING, step=8, finished=True)))
    reasons = {each.type: (each.status, each.reason) for each in found.conditions}
    assert reasons.pop("Succeeded") == ("True", "Trained")
    assert reasons.pop("StorageReady") == ("True", "Bound")
    assert reasons.pop("Prepared") == ("True", "Prepared")
    assert reasons.pop("Suspended") == ("False", "NotSuspended")
    assert set(reasons.values()) == {("False", "Trained")}
    assert (found.state, found.completion_time) == ("Succeeded", "2023-11-14T22:14:20.000Z")


def test_a_run_that_failed_says_why_everywhere():
    found = status(at_work(progress=replace(TRAINING, gave_up=("LearnerCrashed", "it crashed 4 times"))))
    reasons = {each.type: (each.status, each.reason) for each in found.conditions}
    assert reasons["Failed"] == ("True", "LearnerCrashed")
    assert reasons["Succeeded"] == ("False", "LearnerCrashed")
    assert reasons["Ready"] == ("False", "LearnerCrashed")
    assert found.state == "Failed"


# ── transition times ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_transition_time_moves_when_the_status_flips_and_not_when_the_reason_does():
    conditions = [
        condition("Progressing", "False", "WaitingForPreparation", since=EARLIER),
        condition("LearnerReady", "True", "LearnerReady", since=EARLIER),
        PREPARED,
    ]
    stalled = replace(TRAINING, stalled_s=1801.0)
    found = status(
        at_work(progress=stalled, children=workloads(learner=0), before={**BEFORE, "conditions": conditions})
    )
    since = {each.type: each.last_transition_time for each in found.conditions}
    assert since["Progressing"] == EARLIER
    assert since["LearnerReady"] == "2023-11-14T22:14:20.000Z"  # second 60
    assert since["Prepared"] == STARTED


def test_a_manifest_that_cannot_be_read_changes_ready_alone():
    before = status(at_work())
    after = refused(before, 9, Problem("InvalidSpec", "the manifest cannot be used"), at_work().now + 40)
    (ready,) = [each for each in after.conditions if each.type == "Ready"]
    assert (ready.status, ready.reason, ready.observed_generation) == ("False", "InvalidSpec", 9)
    assert ready.last_transition_time == "2023-11-14T22:15:00.000Z"  # second 100
    assert (after.observed_generation, after.state) == (9, "Running")
    assert [each for each in after.conditions if each.type != "Ready"] == [
        each for each in before.conditions if each.type != "Ready"
    ]
    assert refused(after, 9, Problem("InvalidSpec", "the manifest cannot be used"), at_work().now + 90) == after
    assert refused(RunStatus(), 1, Problem("InvalidSpec", "why"), 0.0).state == "Pending"


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def of(*conditions, **fields):
    return RunStatus(conditions=list(conditions), **fields)


def said(before, after):
    return [(kind, reason) for kind, reason, _ in transitions(before, after)]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (of(), of(condition("LearnerReady", "True", "LearnerReady")), [("Normal", "LearnerReady")]),
        (of(condition("Failed", "False")), of(condition("Failed", "True", "UserError")), [("Warning", "UserError")]),
        (of(condition("Succeeded", "False")), of(condition("Succeeded", "True", "Trained")), [("Normal", "Trained")]),
        (of(), of(condition("Suspended", "True", "Suspended")), [("Normal", "Suspended")]),
        (of(condition("Suspended", "True")), of(condition("Suspended", "False", "NotSuspended")), [("Normal", "Resumed")]),
        (of(), of(condition("Suspended", "False", "NotSuspended")), []),
        (of(), of(condition("LearnerReady", "False", "LearnerStarting")), []),
        (
            of(condition("LearnerReady", "False", "LearnerStarting")),
            of(condition("LearnerReady", "False", "Unschedulable")),
            [("Warning", "Unschedulable")],
        ),
        (of(), of(condition("Progressing", "False", "Stalled")), [("Warning", "Stalled")]),
        # Ready repeats what another condition says.
        (of(), of(condition("Ready", "False", "Unschedulable")), []),
    ],
)  # fmt: skip
def test_a_transition_is_an_event(before, after, expected):
    assert said(before, after) == expected
    assert said(after, after) == []


def test_a_changed_message_is_not_an_event():
    one, other = (condition("LearnerReady", "False", "Crashed", message=text) for text in ("once", "twice"))
    assert said(of(one), of(other)) == []


def test_pools_that_are_added_removed_and_scaled_are_events_but_not_on_the_first_pass():
    before = of(samplers=[{"name": "near", "desired": 2}, {"name": "old", "desired": 1}])
    after = of(samplers=[{"name": "near", "desired": 0}, {"name": "new", "desired": 4}])
    messages = {reason: message for _, reason, message in transitions(before, after)}
    assert messages == {
        "PoolAdded": "sampler pool new is new; if that was a mistake, remove it from spec.samplers",
        "PoolRemoved": "sampler pool old is removed, and its samplers with it",
        "Scaled": "sampler pool near: 2 to 0 replicas",
    }
    assert said(of(), after) == []
    assert said(after, after) == []


def test_a_crash_of_the_learner_is_an_event_once():
    before, after = of(learner={"restarts": 1}), of(learner={"restarts": 2})
    assert list(transitions(before, after)) == [("Warning", "LearnerRestarted", "the learner crashed; restart 2")]
    assert said(after, after) == []
    assert said(of(), of(learner={"restarts": 0})) == []
    assert said(of(), of(learner={"restarts": 1})) == [("Warning", "LearnerRestarted")]
