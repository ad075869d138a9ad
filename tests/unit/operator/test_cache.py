"""What the operator has seen: newest states only, whatever order they come in."""

from __future__ import annotations

import pytest

from heterorl_operator.cache import ObjectCache, child_of, key_of, spec_version_of
from heterorl_operator.resources import RunKey
from unit.operator.operator_world import (
    CREATED,
    KEY,
    UID,
    body,
    children,
    claim_body,
    job_end,
    pod_body,
    run_body,
    spec_of,
)


@pytest.fixture
def cache():
    return ObjectCache()


def deployment(version, replicas, **fields):
    return body("Deployment", "run-sampler-near", version, spec={"replicas": replicas}, **fields)


def wanted(cache):
    return cache.children(KEY)["Deployment", "run-sampler-near"].wanted


def test_an_older_or_equal_state_never_replaces_a_newer_one(cache):
    assert cache.put("Deployment", deployment(9, 2)) == KEY
    assert cache.put("Deployment", deployment(10, 3)) == KEY  # a number, not a text: "10" < "9"
    assert cache.put("Deployment", deployment(9, 2)) is None
    assert cache.put("Deployment", deployment(10, 4)) is None
    assert wanted(cache) == 3


def test_what_was_deleted_does_not_come_back_by_a_late_answer(cache):
    cache.put("Deployment", deployment(5, 1))
    assert cache.remove("Deployment", deployment(7, 1)) == KEY
    assert cache.children(KEY) == {}
    assert cache.put("Deployment", deployment(6, 1)) is None
    assert cache.put("Deployment", deployment(7, 1)) is None
    assert cache.children(KEY) == {}


def test_an_object_whose_label_was_taken_away_and_given_back_is_cached_again(cache):
    cache.put("Deployment", deployment(5, 1))
    cache.remove("Deployment", deployment(6, 1))  # so a watch by label shows it
    assert cache.put("Deployment", deployment(7, 1)) == KEY
    assert wanted(cache) == 1


def test_another_object_of_the_name_is_another_object(cache):
    cache.put("Deployment", deployment(5, 1))
    cache.put("Deployment", deployment(8, 2, metadata={"uid": "new"}))
    cache.remove("Deployment", deployment(7, 1))  # the old one's deletion comes late
    assert wanted(cache) == 2


def test_objects_are_found_under_the_run_that_their_label_names(cache):
    assert key_of("Pod", pod_body("learner")) == RunKey("lab", "run")
    assert key_of("Pod", body("Pod", "pod", run=None)) is None
    assert key_of("HeteroRLRun", run_body()) == RunKey("lab", "run")
    assert cache.put("Pod", body("Pod", "pod", run=None)) is None
    assert cache.put("ConfigMap", body("ConfigMap", "other-config", run="other")) == RunKey("lab", "other")
    assert cache.children(KEY) == {}
    assert [name for _, name in cache.children(RunKey("lab", "other"))] == ["other-config"]


def test_pods_and_children_are_kept_apart_and_pods_are_in_the_order_of_their_names(cache):
    cache.put("Deployment", deployment(1, 1))
    for name in ("run-b", "run-a"):
        cache.put("Pod", pod_body("sampler", name, pool="near"))
    assert list(cache.children(KEY)) == [("Deployment", "run-sampler-near")]
    assert [pod.name for pod in cache.pods(KEY)] == ["run-a", "run-b"]
    assert cache.versions("Deployment").keys() == {"uid-of-run-sampler-near"}
    assert cache.versions("Pod").keys() == {"uid-of-run-a", "uid-of-run-b"}
    assert cache.versions("Pod")["uid-of-run-a"] == (1, KEY, "run-a")


def test_nothing_is_left_of_a_run_once_it_and_its_objects_are_gone(cache):
    cache.put("HeteroRLRun", run_body())
    cache.put("Deployment", deployment(1, 1))
    assert cache.run_keys() == [KEY]
    cache.remove("Deployment", deployment(2, 1))
    cache.remove("HeteroRLRun", run_body(version=3))
    assert cache.run(KEY) is None
    assert cache.run_keys() == []
    assert cache._objects == {}


def test_a_cached_run_keeps_what_a_reconcile_needs(cache):
    cache.put("HeteroRLRun", run_body(spec_of(seed=3), 7, status={"state": "Running"}, metadata={"generation": 4}))
    run = cache.run(KEY)
    assert (run.uid, run.generation, run.resource_version, run.created, run.deleting) == (UID, 4, 7, CREATED, False)
    assert run.previous_status == {"state": "Running"}
    assert b'"seed": 3' in run.manifest
    cache.put("HeteroRLRun", run_body(version=8, metadata={"deletionTimestamp": CREATED}))
    assert cache.run(KEY).deleting
    assert cache.run(KEY).previous_status == {}


def test_a_cached_object_keeps_only_the_fields_that_are_used():
    claim = child_of("PersistentVolumeClaim", claim_body("Pending", owner=None))
    assert (claim.phase, claim.owner_uid, claim.run) == ("Pending", None, "run")
    failed = child_of("Job", body("Job", "job", status=job_end("Failed")))
    assert (failed.phase, failed.message, failed.owner_uid) == ("Failed", "the Job is Failed", UID)
    ending = {"conditions": [{"type": "FailureTarget", "status": "True"}, {"type": "Failed", "status": "False"}]}
    assert child_of("Job", body("Job", "job", status=ending)).phase == ""
    ready = deployment(1, 3, status={"readyReplicas": 2}, metadata={"annotations": {"heterorl.dev/operator": "us"}})
    found = children(ready)["Deployment", "run-sampler-near"]
    assert (found.wanted, found.ready, found.operator) == (3, 2, "us")


@pytest.mark.parametrize(
    ("kind", "mark"),
    [("Deployment", "4"), ("StatefulSet", "4"), ("ConfigMap", "17"), ("Service", "17")],
)
def test_an_edit_shows_in_the_generation_or_where_there_is_none_in_the_version(kind, mark):
    assert spec_version_of(kind, body(kind, "it", 17, metadata={"generation": 4})) == mark


def test_a_claim_tells_nothing_as_its_binding_is_written_into_it():
    marks = set()
    for version in (17, 18):
        claim = claim_body()
        del claim["metadata"]["generation"]
        claim["metadata"]["resourceVersion"] = str(version)
        marks.add(spec_version_of("PersistentVolumeClaim", claim))
    assert marks == {""}


def test_a_pod_is_judged_by_our_container_and_not_by_one_that_was_put_beside_it(cache):
    beside = {"name": "istio-proxy", "state": {"terminated": {"exitCode": 2}}, "restartCount": 9}
    ours = {"name": "sampler", "state": {"running": {}}, "restartCount": 0}
    cache.put("Pod", pod_body("sampler", pool="near", status={"containerStatuses": [beside, ours]}))
    (pod,) = cache.pods(KEY)
    assert (pod.exit_code, pod.restarts) == (None, 0)


def test_a_pod_tells_its_last_end_also_when_it_runs_again(cache):
    last = {"terminated": {"exitCode": 137, "reason": "OOMKilled", "message": "x" * 4000 + "the last line"}}
    again = {"state": {"running": {}}, "lastState": last, "restartCount": 3}
    cache.put("Pod", pod_body("learner", container=again, status={"podIP": "198.18.0.7"}))
    (pod,) = cache.pods(KEY)
    assert (pod.exit_code, pod.exit_reason, pod.restarts, pod.ip) == (137, "OOMKilled", 3, "198.18.0.7")
    assert pod.exit_message.endswith("the last line")
    assert len(pod.exit_message) <= 2048
