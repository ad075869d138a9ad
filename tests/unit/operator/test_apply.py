"""Objects are written when it is needed, never taken from others, and what stands in the way is told."""

from __future__ import annotations

import pytest

from heterorl_operator.apply import Applier, ManagedByAnotherOperator
from heterorl_operator.cache import ObjectCache
from heterorl_operator.client import Conflict, Forbidden, Invalid, NotFound, Transient
from unit.operator.operator_world import KEY, MANAGER, FakeApi, body, children, claim_body, run_body

OTHER = "heterorl-operator/theirs/release"


@pytest.fixture
def api():
    return FakeApi()


@pytest.fixture
def clock():
    now = [0.0]
    return now


@pytest.fixture
def applier(api, clock):
    return Applier(api, ObjectCache(), clock=lambda: clock[0])


@pytest.fixture
def run():
    cache = ObjectCache()
    cache.put("HeteroRLRun", run_body())
    return cache.run(KEY)


def desired(kind="Deployment", name="run-sampler-near", replicas=1, **fields):
    """An object as the builders render it."""
    rendered = body(kind, name, spec={"replicas": replicas}, **fields)
    for of_the_server in ("uid", "resourceVersion", "generation", "creationTimestamp"):
        rendered["metadata"].pop(of_the_server)
    return rendered


def known(api):
    """What the watches have brought."""
    return children(*api.objects.values())


def reason(problems):
    (problem,) = problems
    return problem.cause.reason


# ── when it writes ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_an_object_is_written_once_and_again_when_it_is_rendered_differently(api, applier, run):
    assert applier.apply(run, [desired()], {}) == []
    assert applier.apply(run, [desired()], {}) == []  # the watch has not brought it yet
    assert applier.apply(run, [desired()], known(api)) == []
    assert api.writes() == [("apply", "Deployment/run-sampler-near")]
    assert applier.apply(run, [desired(replicas=2)], known(api)) == []
    assert len(api.writes()) == 2
    written = api.objects["Deployment", "run-sampler-near"]
    assert written["spec"] == {"replicas": 2}
    assert written["metadata"]["annotations"]["heterorl.dev/operator"] == MANAGER


@pytest.mark.parametrize("kind", ["Deployment", "ConfigMap"])
def test_a_manual_change_of_an_object_is_reverted(api, applier, run, kind):
    wanted = desired(kind)
    applier.apply(run, [wanted], {})
    changed = {**api.objects[kind, "run-sampler-near"], "spec": {"replicas": 5}}
    changed["metadata"] = {**changed["metadata"], "generation": 2}
    api.put(changed)
    applier.apply(run, [wanted], known(api))
    assert api.objects[kind, "run-sampler-near"]["spec"] == {"replicas": 1}


def test_the_first_pass_leaves_objects_that_are_as_rendered_to_the_second(api, applier, run):
    applier.apply(run, [desired()], {})
    edited = api.objects["Deployment", "run-sampler-near"]
    api.put({**edited, "spec": {"replicas": 5}})
    restarted = Applier(api, ObjectCache())
    restarted.apply(run, [desired()], known(api), first_pass=True)
    assert len(api.writes()) == 1
    restarted.apply(run, [desired()], known(api))
    assert api.objects["Deployment", "run-sampler-near"]["spec"] == {"replicas": 1}


def test_the_first_pass_writes_objects_that_are_rendered_differently(api, applier, run):
    applier.apply(run, [desired()], {})
    Applier(api, ObjectCache()).apply(run, [desired(replicas=2)], known(api), first_pass=True)
    assert api.objects["Deployment", "run-sampler-near"]["spec"] == {"replicas": 2}


def test_a_status_written_by_a_controller_is_not_a_change(api, applier, run):
    applier.apply(run, [desired()], {})
    api.put({**api.objects["Deployment", "run-sampler-near"], "status": {"readyReplicas": 1}})
    applier.apply(run, [desired()], known(api))
    assert len(api.writes()) == 1


def test_an_older_state_that_a_watch_delivers_late_is_not_a_change(api, applier, run):
    applier.apply(run, [desired()], {})
    old = known(api)
    applier.apply(run, [desired(replicas=2)], old)
    applier.apply(run, [desired(replicas=2)], old)
    assert len(api.writes()) == 2


def test_what_was_deleted_is_made_again(api, applier, run):
    applier.apply(run, [desired()], {})
    del api.objects["Deployment", "run-sampler-near"]
    applier.object_deleted(KEY, "Deployment", "run-sampler-near")
    applier.apply(run, [desired()], {})
    assert ("Deployment", "run-sampler-near") in api.objects


def test_what_was_deleted_before_its_apply_was_noted_is_made_again_after_a_while(api, applier, run, clock):
    def deleted_at_once(verb, kind, name):
        applier.object_deleted(KEY, kind, name)  # the watch told of it while the answer was under way

    api.before = deleted_at_once
    applier.apply(run, [desired()], {})
    api.objects.clear()
    applier.apply(run, [desired()], {})
    assert api.objects == {}  # it may just not have been seen yet
    clock[0] = 61.0
    applier.apply(run, [desired()], {})
    assert ("Deployment", "run-sampler-near") in api.objects


def test_a_job_is_made_once_and_never_changed(api, applier, run):
    applier.apply(run, [desired("Job", "job")], {})
    applier.apply(run, [desired("Job", "job", replicas=2)], known(api))
    assert api.writes() == [("create", "Job/job")]


def test_a_job_that_was_made_by_a_predecessor_and_is_not_cached_yet_is_taken_as_it_is(api, applier, run):
    api.put(body("Job", "job", spec={"replicas": 7}))
    assert applier.apply(run, [desired("Job", "job")], {}) == []
    assert api.objects["Job", "job"]["spec"] == {"replicas": 7}


def test_what_is_applied_for_one_run_is_not_taken_for_another_one_of_the_name(api, applier, run):
    applier.apply(run, [desired()], {})
    applier.forget(KEY)
    applier.apply(run, [desired()], known(api))
    assert len(api.writes()) == 2


# ── whose ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ["ConfigMap", "Job"])
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "not seen"])
def test_an_object_that_belongs_to_another_owner_is_left_alone_and_named(api, applier, run, kind, seen):
    api.put(body(kind, "it", owner=None, run="run" if seen else None, data={"mine": "1"}))
    (problem,) = applier.apply(run, [desired(kind, "it")], known(api) if seen else {})
    assert problem.cause.reason == "NameConflict"
    assert f"there is a {kind} it already" in problem.cause.message
    assert "delete it, or give the run another name" in problem.cause.message
    assert api.objects[kind, "it"]["data"] == {"mine": "1"}
    del api.objects[kind, "it"]
    assert applier.apply(run, [desired(kind, "it")], {}) == []
    assert (kind, "it") in api.objects


def test_what_an_earlier_run_of_the_name_left_is_waited_for(api, applier, run):
    api.put(body("Deployment", "run-sampler-near", owner="uid-of-the-earlier"))
    problems = applier.apply(run, [desired()], known(api))
    assert reason(problems) == "Terminating"
    assert api.writes() == []


def test_a_claim_that_was_retained_is_taken_up_by_the_next_run_of_the_name(api, applier, run):
    api.put(claim_body(owner=None))
    wanted = desired("PersistentVolumeClaim", "run-volume", owner=None)
    assert applier.apply(run, [wanted], known(api)) == []
    api.put(claim_body(owner=None, run="other"))
    applier.forget(KEY)
    assert reason(applier.apply(run, [wanted], known(api))) == "NameConflict"


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "not seen"])
def test_a_run_of_another_operator_is_not_touched(api, applier, run, seen):
    api.put(body("ConfigMap", "run-config", metadata={"annotations": {"heterorl.dev/operator": OTHER}}))
    with pytest.raises(ManagedByAnotherOperator) as told:
        applier.apply(run, [desired("ConfigMap", "run-config")], known(api) if seen else {})
    assert told.value.operator == OTHER
    assert api.writes() == []
    Applier(api, ObjectCache(), take_over=True).apply(run, [desired("ConfigMap", "run-config")], known(api))
    assert api.objects["ConfigMap", "run-config"]["metadata"]["annotations"]["heterorl.dev/operator"] == MANAGER


def test_a_conflict_with_another_operator_ends_the_reconcile_and_one_with_a_user_is_won(api, applier, run):
    holders = [f'conflict with "{OTHER}" using v1: .spec', 'conflict with "kubectl-edit" using v1: .spec']

    def held(verb, kind, name):
        if verb == "apply" and holders:
            raise Conflict(409, "Conflict", holders.pop(0))

    api.before = held
    with pytest.raises(ManagedByAnotherOperator) as told:
        applier.apply(run, [desired()], {})
    assert told.value.operator == OTHER
    assert applier.apply(run, [desired()], {}) == []
    assert ("Deployment", "run-sampler-near") in api.objects


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────
RIGHTS = 'deployments.apps is forbidden: User "system:serviceaccount:lab:op" cannot create resource "deployments"'
RULE = 'admission webhook "policy" denied the request: images come from example.com'


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (Invalid(422, "Invalid", "spec.replicas: must be positive"), "InvalidPodTemplate", "must be positive"),
        (Forbidden(403, "Forbidden", "exceeded quota: few"), "QuotaExceeded", "raise the quota"),
        (Forbidden(403, "Forbidden", RIGHTS), "Forbidden", "the chart's Role"),
        (Forbidden(403, "Forbidden", RULE), "Refused", "images come from example.com"),
        (NotFound(404, "NotFound", "namespaces lab not found"), "NamespaceGone", "lab not found"),
    ],
)
def test_a_refusal_is_a_problem_that_says_what_to_do_and_the_other_objects_are_written(
    api, applier, run, error, expected, words
):
    def refuse(verb, kind, name):
        if (verb, kind) == ("apply", "Deployment"):
            raise error

    api.before = refuse
    (problem,) = applier.apply(run, [desired(), desired("ConfigMap", "run-config")], {})
    assert (problem.kind, problem.name, problem.cause.reason) == ("Deployment", "run-sampler-near", expected)
    assert words in problem.cause.message
    assert ("ConfigMap", "run-config") in api.objects


def test_what_is_not_acceptable_is_not_tried_again_until_it_changes(api, applier, run):
    def refuse(verb, kind, name):
        if verb == "apply":
            raise Invalid(422, "Invalid", "no")

    api.before = refuse
    first = applier.apply(run, [desired()], {})
    assert applier.apply(run, [desired()], {}) == first
    assert len(api.writes()) == 1
    applier.apply(run, [desired(replicas=2)], {})
    assert len(api.writes()) == 2


def test_what_lacks_a_permission_or_quota_is_retried_on_each_pass(api, applier, run):
    answers = [Forbidden(403, "Forbidden", RIGHTS)]

    def refuse(verb, kind, name):
        if verb == "apply" and answers:
            raise answers.pop()

    api.before = refuse
    assert reason(applier.apply(run, [desired()], {})) == "Forbidden"
    assert applier.apply(run, [desired()], {}) == []


def test_an_unavailable_api_server_ends_the_reconcile_and_nothing_is_written_twice(api, applier, run):
    def away(verb, kind, name):
        if kind == "Deployment":
            raise Transient(0, "Unreachable", "the API server does not answer")

    api.before = away
    both = [desired("ConfigMap", "run-config"), desired()]
    with pytest.raises(Transient):
        applier.apply(run, both, {})
    api.before = lambda verb, kind, name: None
    assert applier.apply(run, both, {}) == []
    assert api.writes().count(("apply", "ConfigMap/run-config")) == 1


def test_an_object_that_the_server_fails_on_is_reported_and_the_others_are_written(api, applier, run):
    def webhook(verb, kind, name):
        if kind == "ConfigMap":
            raise Transient(500, "InternalError", "failed calling webhook")

    api.before = webhook
    (problem,) = applier.apply(run, [desired("ConfigMap", "run-config"), desired()], {})
    assert (problem.kind, problem.cause.reason) == ("ConfigMap", "ApiServerError")
    assert "failed calling webhook" in problem.cause.message
    assert ("apply", "Deployment/run-sampler-near") in api.writes()


def test_a_refused_object_is_tried_again_after_five_minutes(api, run):
    now = [0.0]
    applier = Applier(api, ObjectCache(), clock=lambda: now[0])
    refusals = []

    def refuse(verb, kind, name):
        refusals.append(now[0])
        raise Invalid(422, "Invalid", "a webhook says no")

    api.before = refuse
    for now[0] in (0.0, 299.0, 301.0):
        applier.apply(run, [desired()], {})
    assert [at for at in refusals if at] == [301.0]


@pytest.mark.parametrize("kind", ["ConfigMap", "PersistentVolumeClaim"])
def test_no_pods_are_created_that_would_mount_another_owners_object_and_existing_ones_still_follow(
    api, applier, run, kind
):
    api.put(body(kind, "mounted", owner="somebody", run=None))
    workloads = [desired("Job", "job"), desired("StatefulSet", "set"), desired("Deployment", "new", replicas=1)]
    there = desired("Deployment", "there", replicas=0)
    api.put(body("Deployment", "there", spec={"replicas": 3}))
    problems = applier.apply(run, [desired(kind, "mounted"), *workloads, there], known(api))
    assert [(each.name, each.cause.reason) for each in problems] == [("mounted", "NameConflict")]
    assert api.writes() == [("apply", "Deployment/there")]
    del api.objects[kind, "mounted"]
    assert applier.apply(run, [desired(kind, "mounted"), *workloads, there], known(api)) == []
    assert {("Job", "job"), ("StatefulSet", "set"), ("Deployment", "new")} <= set(api.objects)
