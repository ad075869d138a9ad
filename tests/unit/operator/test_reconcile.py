"""One run reconciled on a small API server: what is written, and what follows from it later."""

from __future__ import annotations

import pytest

from heterorl.kubernetes.manifests import Images
from heterorl.kubernetes.names import prepare_name
from heterorl.monitoring.run_metrics import RunProgress
from heterorl_operator.apply import Applier
from heterorl_operator.cache import ObjectCache
from heterorl_operator.client import Forbidden, Transient
from heterorl_operator.events import Events
from heterorl_operator.learner_poller import PollResult, ProgressPoller
from heterorl_operator.reconcile import Reconciler, Unfinished
from heterorl_operator.resources import DEPLOYMENT
from heterorl_operator.run_reader import RunReader
from heterorl_operator.status_writer import StatusWriter
from unit.operator.operator_world import (
    EARLIER,
    KEY,
    MANAGER,
    START,
    UID,
    FakeApi,
    body,
    claim_body,
    ended,
    job_end,
    pod_body,
    run_body,
    run_of,
    spec_of,
)

PREPARE = prepare_name(run_of())
OBJECTS = {
    ("ConfigMap", "run-config"),
    ("PersistentVolumeClaim", "run-volume"),
    ("Service", "run-learner"),
    ("Job", PREPARE),
    ("StatefulSet", "run-learner"),
    ("Deployment", "run-sampler-near"),
}


class World:
    """An operator without its watches; `watch` brings what they would."""

    def __init__(self, api=None):
        self.now = START
        self.again, self.later = [], []  # the runs that were asked to be looked at again, at once or by the way
        self.api, self.cache = api or FakeApi(), ObjectCache()
        self.applier = Applier(self.api, self.cache, clock=lambda: self.now)
        self.poller = ProgressPoller(None, "pod-ip", 15.0, lambda key: None)
        writer = StatusWriter(self.api, self.cache, Events(self.api, MANAGER), self.again.append)
        reader = RunReader(self.api, self.cache, self.poller, clock=lambda: self.now)
        images = Images("learner", "sampler")
        self.reconciler = Reconciler(self.cache, reader, self.applier, writer, images, self.later.append)

    def reconcile(self):
        """Reconcile the run, and again where that was asked for."""
        found = self.reconciler.reconcile(KEY)
        if self.later:
            self.later.clear()
            found = self.reconciler.reconcile(KEY)
        return found

    def watch(self):
        """Everything there is comes in, and what is gone goes."""
        for (kind, _), each in self.api.objects.items():
            if kind != "Event":
                self.cache.put(kind, each)
        for (kind, name), child in self.cache.children(KEY).items():
            if (kind, name) not in self.api.objects:
                metadata = {"uid": child.uid, "resourceVersion": str(child.resource_version + 1)}
                self.cache.remove(kind, body(kind, name, metadata=metadata))
                self.applier.object_deleted(KEY, kind, name)

    def edit(self, spec=None, **metadata):
        """As a user does: another generation."""
        run = self.api.objects["HeteroRLRun", "run"]
        found = run["metadata"]
        found = {**found, "generation": found["generation"] + 1, **metadata}
        self.api.put({**run, "spec": spec or run["spec"], "metadata": found})

    def creates_pods(self):
        """As the cluster does for the learner and the preparation, which then run."""
        for (kind, name), each in list(self.api.objects.items()):
            if kind in ("StatefulSet", "Job"):
                role = each["metadata"]["labels"]["heterorl.dev/role"]
                self.api.put(pod_body(role, f"{name}-0", owner=each["metadata"]["uid"]))

    def ends(self, job, how="Failed"):
        self.api.put({**self.api.objects["Job", job], "status": job_end(how)})

    def polls(self, **progress):
        self.poller._results[KEY] = PollResult(RunProgress(**progress))

    @property
    def status(self):
        return self.api.objects["HeteroRLRun", "run"].get("status", {})

    def reason(self, kind):
        return next(each["reason"] for each in self.status["conditions"] if each["type"] == kind)

    def children(self):
        return {place for place in self.api.objects if place[0] not in ("HeteroRLRun", "Event", "Pod")}

    def events(self):
        return {each["reason"] for (kind, _), each in self.api.objects.items() if kind == "Event"}

    def replicas(self, kind, name):
        return self.api.objects[kind, name]["spec"]["replicas"]


@pytest.fixture
def world():
    made = World()
    made.api.put(run_body())
    made.api.put(claim_body())
    made.watch()
    return made


def test_a_new_run_gets_its_objects_first_and_its_status_at_the_second_pass(world):
    world.reconciler.reconcile(KEY)
    assert world.children() == OBJECTS
    assert world.status == {}
    assert world.later == [KEY]
    world.reconciler.reconcile(KEY)
    assert world.status["state"] == "Pending"
    assert world.later == [KEY]


def test_after_a_restart_the_second_pass_reverts_edits_made_in_the_meantime(world):
    world.reconcile()
    deployment = world.api.objects["Deployment", "run-sampler-near"]
    world.api.put({**deployment, "spec": {**deployment["spec"], "replicas": 7}})
    restarted = World(world.api)
    restarted.watch()
    writes = len(world.api.writes())
    restarted.reconciler.reconcile(KEY)
    assert len(world.api.writes()) == writes
    assert restarted.later == [KEY]
    restarted.reconciler.reconcile(KEY)
    assert restarted.replicas("Deployment", "run-sampler-near") == 1
    assert restarted.later == [KEY]


def test_a_run_gets_its_objects_and_a_status_and_then_nothing_is_written(world):
    world.reconcile()
    assert world.children() == OBJECTS
    assert world.status["startTime"] == "2023-11-14T22:13:20.000Z"
    assert world.status["observedGeneration"] == 1
    world.creates_pods()
    for _ in range(2):
        world.watch()
        world.reconcile()
    assert world.reconcile() is None
    written = len(world.api.writes())
    world.now += 500
    world.watch()
    world.reconcile()
    assert len(world.api.writes()) == written


def test_an_edit_that_comes_during_a_reconcile_is_not_lost(world):
    def edited_meanwhile(verb, kind, name):
        if verb == "status" and not edited:
            edited.append(True)
            world.edit(spec_of(samplers=[{"name": "near", "replicas": 5}]))

    edited = []
    world.api.before = edited_meanwhile
    world.reconcile()
    # The answer to the status holds the edit, so the watch's word of it is old: the look itself has to ask for another.
    assert world.again == [KEY]
    world.reconcile()
    assert world.replicas("Deployment", "run-sampler-near") == 5


def test_an_undisturbed_reconcile_does_not_queue_another(world):
    world.reconcile()
    assert world.again == []


def test_a_pool_that_is_removed_loses_its_deployment_and_nothing_else(world):
    world.edit(spec_of(samplers=[{"name": "near"}, {"name": "far"}]))
    world.watch()
    world.reconcile()
    world.watch()
    assert ("Deployment", "run-sampler-far") in world.children()
    world.edit(spec_of())
    world.watch()
    world.reconcile()
    assert world.children() == OBJECTS
    assert "PoolRemoved" in world.events()


def test_objects_of_another_owner_are_never_deleted(world):
    world.api.put(body("Deployment", "run-sampler-old", owner="somebody"))
    world.watch()
    world.reconcile()
    assert ("Deployment", "run-sampler-old") in world.children()


def test_a_suspended_run_loses_a_preparation_that_runs_and_gets_it_back(world):
    world.reconcile()
    world.watch()
    world.edit(spec_of(suspend=True))
    world.watch()
    world.reconcile()
    assert world.children() == OBJECTS - {("Job", PREPARE)}
    assert world.replicas("StatefulSet", "run-learner") == 0
    world.watch()
    world.edit(spec_of())
    world.watch()
    world.reconcile()
    assert world.children() == OBJECTS


def test_a_preparation_that_is_done_is_not_missed(world):
    world.reconcile()
    world.ends(PREPARE, "Complete")
    world.watch()
    world.reconcile()
    assert world.reason("Prepared") == "Prepared"
    del world.api.objects["Job", PREPARE]
    world.watch()
    world.reconcile()
    assert ("Job", PREPARE) not in world.children()
    assert world.reason("Prepared") == "Prepared"


# ── a volume that holds another run ──────────────────────────────────────────────────────────────────────────────────
def refused_by_the_volume(world):
    world.reconcile()
    world.ends(PREPARE)
    said = ended(2, "VolumeInUse: /volume holds run other; set spec.resume: true")
    world.api.put(pod_body("prepare", container=said, owner=world.api.objects["Job", PREPARE]["metadata"]["uid"]))
    world.watch()
    world.reconcile()
    assert world.reason("Prepared") == "VolumeInUse"
    assert world.replicas("StatefulSet", "run-learner") == 0


def test_a_refused_preparation_stays_until_an_edit_allows_the_volume_and_is_then_made_anew(world):
    refused_by_the_volume(world)
    for _ in range(3):
        world.watch()
        world.reconcile()
    assert world.children() == OBJECTS
    world.edit(spec_of(resume=True))
    world.watch()
    world.reconcile()
    (again,) = world.children() - OBJECTS
    assert again == ("Job", prepare_name(run_of(resume=True)))
    assert world.reason("Prepared") == "PreparationPending"
    assert world.replicas("StatefulSet", "run-learner") == 1


def test_a_refused_preparation_is_not_a_failure_when_its_pod_is_gone(world):
    refused_by_the_volume(world)
    (gone,) = world.cache.pods(KEY)
    world.cache.remove("Pod", pod_body("prepare", gone.name, gone.resource_version + 1))
    world.reconcile()
    assert world.status["state"] == "Pending"
    assert "holds run other" in next(
        each["message"] for each in world.status["conditions"] if each["type"] == "Prepared"
    )


# ── another run of the name ──────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("how", ["Failed", "Complete"])
def test_what_an_earlier_run_of_the_name_left_says_nothing_about_this_one(world, how):
    old = {"uid": "uid-of-old-job", "creationTimestamp": EARLIER}
    world.api.put(body("Job", PREPARE, owner="uid-of-earlier", status=job_end(how), metadata=old))
    earlier = {"metadata": {"creationTimestamp": EARLIER}}
    world.api.put(pod_body("sampler", "old", pool="near", container=ended(2), **earlier))
    world.watch()
    with pytest.raises(Unfinished):
        world.reconcile()  # the name is taken still
    assert world.status["state"] == "Pending"
    assert world.reason("Ready") == "Terminating"
    assert world.events() == set()
    for place in (("Job", PREPARE), ("Pod", "old")):
        del world.api.objects[place]
    world.watch()
    world.reconcile()
    assert world.children() == OBJECTS
    assert world.reason("Prepared") == "PreparationPending"


def test_what_the_learner_of_an_earlier_run_said_is_forgotten(world):
    world.reconcile()
    world.polls(step=9, finished=True, prepared=True)
    world.api.put(run_body(metadata={"uid": "uid-of-the-next"}))  # its deletion went by unseen
    world.cache.put("HeteroRLRun", world.api.objects["HeteroRLRun", "run"])
    with pytest.raises(Unfinished):
        world.reconcile()
    assert world.status["state"] == "Pending"
    assert "learner" not in world.status


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "going"])
def test_a_run_that_is_gone_or_going_is_left_alone_and_forgotten(world, gone):
    world.reconcile()
    world.watch()
    world.polls(step=1)
    written = len(world.api.writes())
    if gone:
        world.cache.remove("HeteroRLRun", run_body(version=999))
    else:
        world.edit(deletionTimestamp=EARLIER)
        world.watch()
    assert world.reconcile() is None
    assert len(world.api.writes()) == written
    assert world.poller.latest(KEY) == PollResult()


def test_a_run_that_is_deleted_during_its_reconcile_is_not_an_error(world):
    def deleted_meanwhile(verb, kind, name):
        if verb == "status":
            world.api.objects.pop(("HeteroRLRun", "run"), None)

    world.api.before = deleted_meanwhile
    world.reconcile()
    assert world.events() == set()
    assert world.cache.run(KEY) is None  # nothing more is made for it, though no watch has told yet


# ── problems ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_may_go_away_by_itself_is_tried_again_but_time_is_kept(world):
    def refuse(verb, kind, name):
        if (verb, kind) == ("apply", "Service"):
            raise Forbidden(403, "Forbidden", "exceeded quota: few")

    world.api.before = refuse
    world.edit(spec_of(activeDeadlineSeconds=100))
    world.watch()
    with pytest.raises(Unfinished, match="raise the quota") as unfinished:
        world.reconcile()
    assert unfinished.value.next_s == 100.0
    assert world.reason("Ready") == "QuotaExceeded"
    assert world.children() == OBJECTS - {("Service", "run-learner")}


def test_a_kind_that_may_not_be_listed_is_reported(world):
    world.cache.unreadable[DEPLOYMENT] = "no right"
    with pytest.raises(Unfinished):
        world.reconcile()
    assert world.reason("SamplersAvailable") == "Forbidden"


def test_a_pool_that_may_not_be_deleted_is_reported(world):
    def refuse(verb, kind, name):
        if verb == "delete":
            raise Forbidden(403, "Forbidden", 'cannot delete resource "deployments"')

    world.edit(spec_of(samplers=[{"name": "near"}, {"name": "far"}]))
    world.watch()
    world.reconcile()
    world.watch()
    world.edit(spec_of())
    world.watch()
    world.api.before = refuse
    for _ in range(2):
        with pytest.raises(Unfinished, match='cannot delete resource "deployments"; give its service account'):
            world.reconcile()
    assert world.reason("SamplersAvailable") == world.reason("Ready") == "Forbidden"
    assert ("Deployment", "run-sampler-far") in world.api.objects


def test_what_a_run_needs_and_the_operator_may_not_do_is_reported(world):
    def refuse(verb, kind, name):
        if verb == "get" and kind == "PersistentVolumeClaim":
            raise Forbidden(403, "Forbidden", 'cannot get resource "persistentvolumeclaims"')

    world.edit(spec_of(exchange={"volume": {"claimName": "mine"}}))
    world.watch()
    world.api.before = refuse
    with pytest.raises(Unfinished, match="give its service account the chart's Role"):
        world.reconcile()
    assert world.reason("Ready") == "Forbidden"


def test_an_unavailable_api_server_ends_the_reconcile(world):
    def away(verb, kind, name):
        raise Transient(503, "ServiceUnavailable", "away")

    world.api.before = away
    with pytest.raises(Transient):
        world.reconcile()


def test_a_manifest_that_cannot_be_read_is_reported_and_its_objects_stay(world):
    world.reconcile()
    world.watch()
    world.edit({"samplers": [{"name": "near"}], "of": "dreams"})
    world.watch()
    assert world.reconcile() is None
    assert world.reason("Ready") == "InvalidSpec"
    assert world.children() == OBJECTS
    written = len(world.api.writes())
    world.reconcile()
    assert len(world.api.writes()) == written


def test_a_run_of_another_operator_gets_one_event_and_no_status(world):
    other = {"annotations": {"heterorl.dev/operator": "heterorl-operator/theirs/release"}}
    world.api.put(body("ConfigMap", "run-config", metadata=other))
    world.watch()
    for _ in range(3):
        assert world.reconcile() is None
    assert world.api.writes() == [("create", world.api.writes()[0][1])]
    assert world.events() == {"ManagedByAnotherOperator"}
    assert world.status == {}
    world.edit({"samplers": [{"name": "near"}], "known": "to the other's release alone"})
    world.watch()
    assert world.reconcile() is None
    assert world.status == {}


# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_run_that_is_trained_ends_and_is_deleted_when_its_time_has_come(world):
    world.edit(spec_of(ttlSecondsAfterFinished=1000, learner={"finishGraceSeconds": 300}))
    world.watch()
    world.reconcile()
    world.creates_pods()
    world.watch()
    world.polls(step=9, finished=True, prepared=True)
    assert world.reconcile() == 300
    assert (world.status["state"], world.events()) == ("Succeeded", {"Prepared", "Trained", "Scaled"})
    assert world.replicas("Deployment", "run-sampler-near") == 0
    assert world.replicas("StatefulSet", "run-learner") == 1
    world.now += 300
    assert world.reconcile() == 700
    assert world.replicas("StatefulSet", "run-learner") == 0
    world.now += 700
    world.reconcile()
    assert ("HeteroRLRun", "run") not in world.api.objects


def test_only_the_very_run_is_deleted(world):
    world.edit(spec_of(ttlSecondsAfterFinished=0))
    world.watch()
    world.polls(finished=True)
    world.reconciler._uids[KEY] = UID
    world.api.put(run_body(metadata={"uid": "uid-of-the-next"}))
    world.reconcile()
    assert ("HeteroRLRun", "run") in world.api.objects


def test_what_is_said_of_a_run_is_taken_back_when_another_one_took_its_name_meanwhile(world):
    def replaced_meanwhile(verb, kind, name):
        if verb == "status" and not replaced:
            replaced.append(True)
            world.api.put(run_body(metadata={"uid": "uid-of-the-next"}))

    replaced = []
    world.polls(finished=True)
    world.reconciler._uids[KEY] = UID
    world.api.before = replaced_meanwhile
    world.reconcile()
    assert world.status == {}
    assert world.events() == set()
    assert world.again == [KEY]
    assert world.cache.run(KEY).uid == "uid-of-the-next"


# ── over is over ─────────────────────────────────────────────────────────────────────────────────────────────────────
def with_unknown_field(status):
    status["phase"] = "Done"


def with_unknown_state(status):
    status["state"] = "Completed"


def with_malformed_condition(status):
    for each in status["conditions"]:
        each.update(reason="", lastTransitionTime="long ago", severity="none")


def with_other_conditions(status):
    status.update(state="Completed", conditions=[{"type": "Complete", "status": "True"}])


def with_a_message_beyond_bounds(status):
    for each in status["conditions"]:
        each["message"] = "x" * 40_000


def with_no_number(status):
    status["learner"]["reward"] = "NaN"
    status["suspendedSeconds"] = "Infinity"


@pytest.mark.parametrize("success", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        with_unknown_field,
        with_unknown_state,
        with_malformed_condition,
        with_other_conditions,
        with_a_message_beyond_bounds,
        with_no_number,
    ],
)
def test_a_run_that_has_ended_gets_no_pods_again_whatever_another_version_made_of_its_status(world, change, success):
    world.reconcile()
    ending = {"finished": True} if success else {"gave_up": ("LearnerCrashed", "it crashed 4 times")}
    world.polls(step=9, prepared=True, reward=1.0, **ending)
    world.reconcile()
    world.now += 100_000
    world.reconcile()
    assert world.replicas("StatefulSet", "run-learner") == 0
    run = world.api.objects["HeteroRLRun", "run"]
    change(run["status"])
    for name in ("run-learner", "run-sampler-near"):
        world.api.objects.pop(("StatefulSet", name), None)
        world.api.objects.pop(("Deployment", name), None)
    world.api.put(run)
    restarted = World(world.api)
    restarted.now = world.now
    restarted.watch()
    for _ in range(3):
        restarted.reconcile()
        restarted.watch()
    assert restarted.replicas("StatefulSet", "run-learner") == 0
    assert restarted.replicas("Deployment", "run-sampler-near") == 0
    assert restarted.status["state"] in ("Succeeded", "Failed")
    assert all(len(each["message"]) <= 32768 for each in restarted.status["conditions"])


# ── pods that cannot be created ──────────────────────────────────────────────────────────────────────────────────────
WORDS = 'pods "run-learner-0" is forbidden: exceeded quota: few'


def test_pods_that_cannot_be_created_show_in_a_condition_an_event_and_the_state(world, monkeypatch):
    monkeypatch.setattr("heterorl_operator.create_failures._PATIENCE_S", 0.0)
    world.reconcile()
    world.api.objects["Event", "of-the-job"] = {
        "kind": "Event",
        "metadata": {"uid": "e", "resourceVersion": "1"},
        "reason": "FailedCreate",
        "message": WORDS,
        "lastTimestamp": "2023-11-14T22:13:21Z",
    }
    deployment = world.api.objects["Deployment", "run-sampler-near"]
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "denied by a policy"}
    world.api.put({**deployment, "status": {"conditions": [failure]}})
    world.watch()
    world.reconcile()
    world.reconcile()
    assert world.status["state"] == "Pending"
    reasons = {each["type"]: each["reason"] for each in world.status["conditions"]}
    assert reasons["Prepared"] == reasons["LearnerReady"] == reasons["Ready"] == "QuotaExceeded"
    assert reasons["SamplersAvailable"] == "FailedCreate"
    assert {"QuotaExceeded", "FailedCreate"} <= {
        e.get("reason") for (k, _), e in world.api.objects.items() if k == "Event"
    }
    messages = {each["type"]: each["message"] for each in world.status["conditions"]}
    assert messages["LearnerReady"].endswith(WORDS)
    assert messages["SamplersAvailable"].endswith("denied by a policy")


def test_the_state_is_preparing_only_while_the_pod_runs(world):
    world.reconcile()
    world.watch()
    world.reconcile()
    assert world.status["state"] == "Pending"
    world.creates_pods()
    world.watch()
    world.reconcile()
    assert (world.status["state"], world.reason("Prepared")) == ("Preparing", "Preparing")


# ── resumed in place ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_failed_run_goes_on_with_new_pods_when_resumes_is_increased_and_can_fail_and_go_on_again(world):
    world.reconcile()
    world.creates_pods()
    world.watch()
    for resumes in (1, 2):
        world.polls(step=4, prepared=True, gave_up=("LearnerCrashed", "it crashed 4 times"))
        world.reconcile()
        assert world.status["state"] == "Failed"
        world.now += 5000
        world.watch()
        world.reconcile()
        assert world.replicas("StatefulSet", "run-learner") == 0
        world.edit(spec_of(failurePolicy={"resumes": resumes}))
        world.watch()
        world.reconcile()
        world.watch()
        world.reconcile()  # the learner's old pod is still there, and says nothing any more
        assert world.status["state"] == "Running"
        assert "completionTime" not in world.status
        assert world.status["suspendedSeconds"] == 5000 * resumes  # its availability goes on where it stopped
        for kind, name in (("StatefulSet", "run-learner"), ("Deployment", "run-sampler-near")):
            template = world.api.objects[kind, name]["spec"]["template"]
            assert template["metadata"]["annotations"]["heterorl.dev/resumes"] == str(resumes)
            assert world.replicas(kind, name) == 1
    assert "Resumed" in world.events()


def test_a_resumed_run_whose_preparation_failed_prepares_anew(world):
    world.reconcile()
    world.ends(PREPARE)
    world.watch()
    world.reconcile()
    assert (world.status["state"], world.reason("Failed")) == ("Failed", "PreparationFailed")
    world.edit(spec_of(failurePolicy={"resumes": 1}))
    world.watch()
    world.reconcile()
    (again,) = world.children() - OBJECTS
    assert again[0] == "Job"
    assert world.status["state"] == "Pending"


def test_a_run_that_succeeded_is_not_resumed(world):
    world.reconcile()
    world.polls(step=9, prepared=True, finished=True)
    world.reconcile()
    world.edit(spec_of(failurePolicy={"resumes": 1}))
    world.watch()
    world.reconcile()
    assert world.status["state"] == "Succeeded"
    assert world.replicas("Deployment", "run-sampler-near") == 0
