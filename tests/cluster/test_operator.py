"""The operator at work on a real API server, with real controllers; pods only seem to run (kwok).

Where a learner has something to say, `StandIn` says it. `test_story.py` has real pods.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import pytest
import yaml

from cluster.operators import (
    CHILDREN,
    OperatorProcess,
    StandIn,
    apply,
    children_names,
    condition,
    get,
    give_volume,
    listed,
    operator,
    patch,
    reasons,
    replicas,
    run_manifest,
    status,
    wait_for,
    wait_for_reason,
    wait_for_state,
)
from heterorl.exchange.version import Version
from heterorl.monitoring.run_metrics import PoolProgress

CLUSTER = {"level": "kwok"}
CRD = Path(__file__).parents[2] / "crds" / "heterorlrun.yaml"
pytestmark = pytest.mark.usefixtures("crd")


def owned_by_nothing(objects):
    return [name for name, each in objects.items() if "ownerReferences" not in each["metadata"]]


def image_of_the_learner(objects):
    return objects["StatefulSet/run-learner"]["spec"]["template"]["spec"]["containers"][0]["image"]


# ── a life ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_run_is_made_trains_ends_and_is_cleared_away_step_by_step(cluster, namespace, running):
    give_volume(cluster, namespace)
    with StandIn(step=3, steps=10, reward=0.5, lag=1.5, weights_version="v00000003-i0001") as learner:
        learner.says(pools={"near": PoolProgress(rollouts=7, alive=1, weights_version="v00000002-i0001")})
        spec = learner.spec(steps=10, finishGraceSeconds=4)
        apply(cluster, namespace, run_manifest(**spec, ttlSecondsAfterFinished=8))
        wait_for(lambda: status(cluster, namespace).get("learner", {}).get("step") == 3, "the learner's step")
        wait_for(lambda: condition(cluster, namespace, "Ready")["status"] == "True", "its samplers")
        seen = status(cluster, namespace)
        assert seen["state"] == "Running"
        assert seen["learner"] == {
            "step": 3, "weightsVersion": "v00000003-i0001", "reward": 0.5, "lag": 1.5, "restarts": 0,
        }  # fmt: skip
        pool = {"name": "near", "desired": 1, "ready": 1, "rollouts": 7, "rejected": 0}
        assert seen["samplers"] == [{**pool, "weightsVersion": "v00000002-i0001"}]
        assert {each["type"]: each["status"] for each in seen["conditions"]} == {
            "Ready": "True", "StorageReady": "True", "Prepared": "True", "LearnerReady": "True", "Failed": "False",
            "SamplersAvailable": "True", "Progressing": "True", "Succeeded": "False", "Suspended": "False",
        }  # fmt: skip
        assert set(listed(cluster, namespace, CHILDREN)) == children_names()
        metadata = get(cluster, namespace, "hrl", "run")["metadata"]
        assert "finalizers" not in metadata
        assert list(metadata["annotations"]) == ["kubectl.kubernetes.io/last-applied-configuration"]  # the user's own
        row = cluster.kubectl("get", "-n", namespace, "hrl").splitlines()[1].split()
        assert row[:7] == ["run", "Running", "3", "10", "0.5", "1.5", "1/1"]

        learner.says(step=10, finished=True)
        ended = wait_for_state(cluster, namespace, "Succeeded")
        assert replicas(cluster, namespace, "run-sampler-near") == 0  # at once
        assert replicas(cluster, namespace, "run-learner", "statefulset") == 1  # its log can be read
        assert "completionTime" in ended
        wait_for(lambda: replicas(cluster, namespace, "run-learner", "statefulset") == 0, "the end of the grace period")
    wait_for(lambda: not status(cluster, namespace), "the record's deletion")
    # The garbage collector learns of a new kind twice a minute, and this test may be the first after the CRD.
    left = {"PersistentVolumeClaim/run-volume"}
    wait_for(lambda: set(listed(cluster, namespace, CHILDREN)) == left, "the clearing", 60)
    assert {"Prepared", "LearnerReady", "Trained", "Scaled"} <= set(reasons(cluster, namespace))


def test_a_run_is_not_written_to_while_nothing_happens(cluster, namespace, running):
    give_volume(cluster, namespace)
    with StandIn(step=3, steps=10) as learner:
        apply(cluster, namespace, run_manifest(**learner.spec()))
        wait_for(lambda: condition(cluster, namespace, "Ready").get("status") == "True", "a ready run")
        time.sleep(2)
        before = running.metric("heterorl_operator_writes_total")
        versions = {
            name: each["metadata"]["resourceVersion"] for name, each in listed(cluster, namespace, CHILDREN).items()
        }
        time.sleep(8)
        assert running.metric("heterorl_operator_writes_total") == before
        running.kill()
        running.start()  # it applies everything but the Job once, which changes nothing
        wait_for(lambda: running.metric("heterorl_operator_applies_total") == len(versions), "the applies")
        time.sleep(1)
        now = {name: each["metadata"]["resourceVersion"] for name, each in listed(cluster, namespace, CHILDREN).items()}
        changed = {name for name in now if now[name] != versions[name]}
        # The API server writes a claim anew for an apply that changes nothing.
        assert changed <= {"PersistentVolumeClaim/run-volume"}


def test_evaluations_run_one_at_a_time_and_a_failed_one_is_left_out(cluster, namespace, running):
    give_volume(cluster, namespace)
    first, second = Version(0, 1), Version(5, 1)
    data = {"evals": [{"label": "sums", "source": "arithmetic"}]}
    evaluation = {"everySteps": 5, "engine": "transformers", "podTemplate": {"nodeSelector": {"there": "is-none"}}}
    with StandIn(step=5, steps=10, evaluations_due=(first, second)) as learner:
        apply(cluster, namespace, run_manifest(**learner.spec(), data=data, evaluation=evaluation))
        wait_for(lambda: get(cluster, namespace, "job", "run-eval-0"), "the first evaluation")
        time.sleep(2)
        assert get(cluster, namespace, "job", "run-eval-5") is None  # the first is still at work
        # No node takes its pods, so it fails by its own deadline, as any Job does.
        cluster.kubectl("patch", "-n", namespace, "job/run-eval-0", "-p", '{"spec": {"activeDeadlineSeconds": 1}}')
        wait_for(lambda: get(cluster, namespace, "job", "run-eval-5"), "the second evaluation")
        assert status(cluster, namespace)["evaluation"]["failedSteps"] == [0]
        learner.says(evaluations_due=(), evaluation_best=0.5, evaluation_last=0.25)
        wait_for(lambda: "best" in status(cluster, namespace)["evaluation"], "the result")
        assert status(cluster, namespace)["evaluation"] == {"best": 0.5, "last": 0.25, "gap": 0.25, "failedSteps": [0]}


def test_a_suspended_run_has_no_pods_and_goes_on_with_its_availability_where_it_stopped(cluster, namespace, running):
    give_volume(cluster, namespace)
    apply(cluster, namespace, run_manifest())
    wait_for(lambda: condition(cluster, namespace, "Prepared").get("status") == "True", "the preparation")
    patch(cluster, namespace, "run", {"suspend": True})
    wait_for_state(cluster, namespace, "Suspended")
    assert replicas(cluster, namespace, "run-learner", "statefulset") == 0
    assert replicas(cluster, namespace, "run-sampler-near") == 0
    assert get(cluster, namespace, "pvc", "run-volume")
    time.sleep(3)
    patch(cluster, namespace, "run", {"suspend": False})
    wait_for_state(cluster, namespace, "Running")
    assert replicas(cluster, namespace, "run-sampler-near") == 1
    assert 3 <= status(cluster, namespace)["suspendedSeconds"] < 10
    assert {"Suspended", "Resumed"} <= set(reasons(cluster, namespace))


def test_a_run_that_takes_too_long_fails_and_stops(cluster, namespace, running):
    give_volume(cluster, namespace)
    apply(cluster, namespace, run_manifest(activeDeadlineSeconds=3))
    wait_for_state(cluster, namespace, "Failed")
    assert condition(cluster, namespace, "Failed")["reason"] == "DeadlineExceeded"
    assert replicas(cluster, namespace, "run-learner", "statefulset") == 0
    assert replicas(cluster, namespace, "run-sampler-near") == 0


def test_a_learner_that_gave_up_fails_the_run_with_its_words(cluster, namespace, running):
    give_volume(cluster, namespace)
    with StandIn(step=3, gave_up=("LearnerCrashed", "it crashed 4 times")) as learner:
        apply(cluster, namespace, run_manifest(**learner.spec()))
        wait_for_state(cluster, namespace, "Failed")
        failed = condition(cluster, namespace, "Failed")
        assert failed["reason"] == "LearnerCrashed"
        assert "it crashed 4 times" in failed["message"]
        assert replicas(cluster, namespace, "run-sampler-near") == 0


@pytest.fixture
def newer_crd(cluster):
    """The CRD as a newer version might have it: one more field of the status, and one more state."""
    ours = yaml.safe_load(CRD.read_text())
    newer = copy.deepcopy(ours)
    status_schema = newer["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    status_schema["properties"]["phase"] = {"type": "string"}
    status_schema["properties"]["state"]["enum"].append("Archived")
    cluster.kubectl("replace", "-f", "-", stdin=json.dumps(newer))
    yield
    cluster.kubectl("replace", "-f", "-", stdin=json.dumps(ours))


def test_a_run_that_ended_under_a_newer_version_gets_no_pods_again(cluster, namespace, running, newer_crd):
    give_volume(cluster, namespace)
    with StandIn(step=1, steps=2) as learner:
        apply(cluster, namespace, run_manifest(**learner.spec(finishGraceSeconds=1)))
        wait_for_state(cluster, namespace, "Running")
        learner.says(finished=True, step=2)
        wait_for_state(cluster, namespace, "Succeeded")
        wait_for(lambda: replicas(cluster, namespace, "run-learner", "statefulset") == 0, "the end")

    def pods():
        return listed(cluster, namespace, "pods", "heterorl.dev/role in (learner,sampler)")

    def write_newer():
        patched = json.dumps({"status": {"phase": "Done", "state": "Archived"}})
        cluster.kubectl("patch", "-n", namespace, "hrl/run", "--subresource=status", "--type=merge", "-p", patched)
        return status(cluster, namespace).get("phase")

    wait_for(lambda: not pods(), "its pods to go")
    jobs = listed(cluster, namespace, "jobs")
    running.stop()
    assert wait_for(write_newer, "the newer kind to be served") == "Done"
    running.start()
    wait_for_state(cluster, namespace, "Succeeded")  # in our words again
    time.sleep(3)
    assert condition(cluster, namespace, "Succeeded")["status"] == "True"
    assert replicas(cluster, namespace, "run-learner", "statefulset") == 0
    assert replicas(cluster, namespace, "run-sampler-near") == 0
    assert pods() == {}
    assert listed(cluster, namespace, "jobs").keys() == jobs.keys()


@pytest.mark.parametrize("after_s", [0.0, 2.0])  # while it starts to watch, and later
def test_the_operator_leaves_at_once_when_it_is_asked_to(running, after_s):
    time.sleep(after_s)
    running.stop()
    assert running.process.returncode == 0
    lines = [json.loads(line) for line in running.log.read_text().splitlines()]
    assert [line["process"] for line in lines] == ["operator"] * len(lines)
    assert "stopped" in [line["message"] for line in lines]


def test_without_the_kind_the_operator_says_what_to_install_and_ends(start):
    bare = start("apiserver")
    process = OperatorProcess(bare, "early", ["--log-format", "plain"], bare.kubeconfig)
    with pytest.raises(RuntimeError, match=r"(?s)early ended with 2; .*does not know the kind HeteroRLRun; install it"):
        process.start()


def test_an_operator_of_two_namespaces_keeps_the_runs_of_both_and_no_others(cluster, namespace):
    others = [f"{namespace}-{which}" for which in ("two", "three")]
    for other in others:
        cluster.kubectl("create", "namespace", other)
    try:
        with operator(cluster, "--namespace", namespace, "--namespace", others[0]):
            for each in (namespace, *others):
                apply(cluster, each, run_manifest())
            for each in (namespace, others[0]):
                wait_for(lambda at=each: set(listed(cluster, at, CHILDREN)) == children_names(), f"{each}'s objects")
            patch(cluster, others[0], "run", {"samplers": [{"name": "near", "engine": "transformers", "replicas": 2}]})
            wait_for(lambda: replicas(cluster, others[0], "run-sampler-near") == 2, "the edit")
            assert listed(cluster, others[1], CHILDREN) == {}
    finally:
        for other in others:
            cluster.kubectl("delete", "namespace", other, "--wait=false")


# ── drift and edits ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_objects_that_are_deleted_or_edited_manually_are_restored(cluster, namespace, running):
    give_volume(cluster, namespace)
    apply(cluster, namespace, run_manifest())
    wait_for(lambda: set(listed(cluster, namespace, CHILDREN)) == children_names(), "the objects")
    wait_for(lambda: condition(cluster, namespace, "Ready"), "the status")
    cluster.kubectl(
        "delete", "-n", namespace, "deployment/run-sampler-near", "configmap/run-config", "service/run-learner"
    )
    wait_for(lambda: set(listed(cluster, namespace, CHILDREN)) == children_names(), "the objects")
    cluster.kubectl("scale", "-n", namespace, "deployment/run-sampler-near", "--replicas=5")
    wait_for(lambda: replicas(cluster, namespace, "run-sampler-near") == 1, "its own number")
    cluster.kubectl("patch", "-n", namespace, "configmap/run-config", "-p", '{"data": {"run.json": "{}"}}')
    wait_for(lambda: get(cluster, namespace, "cm", "run-config")["data"]["run.json"] != "{}", "its own content")


def test_pools_come_and_go_with_the_manifest(cluster, namespace, running):
    give_volume(cluster, namespace)
    apply(cluster, namespace, run_manifest(pools={"near": {}, "far": {"replicas": 2}}))
    wait_for(lambda: set(listed(cluster, namespace, CHILDREN)) == children_names(pools=("near", "far")), "both pools")
    apply(cluster, namespace, run_manifest(pools={"near": {"replicas": 3}, "other": {}}))
    wait_for(lambda: set(listed(cluster, namespace, CHILDREN)) == children_names(pools=("near", "other")), "the change")
    wait_for(lambda: replicas(cluster, namespace, "run-sampler-near") == 3, "three replicas")
    wait_for(lambda: "PoolAdded" in reasons(cluster, namespace), "the event of a pool that is new")
    assert "PoolRemoved" in reasons(cluster, namespace)


# ── others ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_an_object_that_belongs_to_another_owner_is_left_alone_and_named(cluster, namespace, running):
    give_volume(cluster, namespace)
    cluster.kubectl("create", "-n", namespace, "configmap", "run-config", "--from-literal=mine=1")
    apply(cluster, namespace, run_manifest())
    ready = wait_for_reason(cluster, namespace, "Ready", "NameConflict")
    assert "ConfigMap run-config" in ready["message"]
    assert "delete it, or give the run another name" in ready["message"]
    assert get(cluster, namespace, "cm", "run-config")["data"] == {"mine": "1"}
    cluster.kubectl("delete", "-n", namespace, "configmap/run-config")
    wait_for(lambda: "run.json" in (get(cluster, namespace, "cm", "run-config") or {"data": {}})["data"], "its own")


def test_a_second_operator_says_so_and_touches_nothing(cluster, namespace, running):
    give_volume(cluster, namespace)
    apply(cluster, namespace, run_manifest())
    wait_for(lambda: condition(cluster, namespace, "Prepared").get("status") == "True", "the preparation")
    before = listed(cluster, namespace, CHILDREN)
    options = ("--namespace", namespace, "--learner-image", "other")  # it would make other objects
    with operator(cluster, *options, name="second") as second:
        wait_for(lambda: "ManagedByAnotherOperator" in reasons(cluster, namespace), "the message")
        cluster.kubectl("scale", "-n", namespace, "deployment/run-sampler-near", "--replicas=5")
        wait_for(lambda: replicas(cluster, namespace, "run-sampler-near") == 1, "its own number")
        time.sleep(2)
        assert second.metric("heterorl_operator_applies_total") == 0
        apply(cluster, namespace, run_manifest("later"))  # both see it at the same moment: one gets it
        wait_for(lambda: len(listed(cluster, namespace, CHILDREN, "heterorl.dev/run=later")) == 5, "its objects")
        time.sleep(3)
        keepers = {each["metadata"]["annotations"]["heterorl.dev/operator"] for each in listed(
            cluster, namespace, CHILDREN, "heterorl.dev/run=later").values()}  # fmt: skip
        assert len(keepers) == 1
    after = listed(cluster, namespace, CHILDREN, "heterorl.dev/run=run")
    assert image_of_the_learner(after) == image_of_the_learner(before)
    with operator(cluster, *options, "--take-over", name="second"):
        running.stop()
        wait_for(
            lambda: image_of_the_learner(listed(cluster, namespace, CHILDREN, "heterorl.dev/run=run")) == "other", "it"
        )
    running.start()


# ── deletion ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("retention", ["Retain", "Delete"])
@pytest.mark.parametrize("is_up", [True, False], ids=["operator-up", "operator-down"])
@pytest.mark.parametrize("cascade", ["background", "foreground", "orphan"])
def test_a_deleted_run_leaves_what_was_agreed(cluster, namespace, cascade, is_up, retention):
    give_volume(cluster, namespace)
    volume = {"volume": {"size": "1Gi"}, "retention": {"volume": retention}}
    with operator(cluster, "--namespace", namespace) as process:
        apply(cluster, namespace, run_manifest(exchange=volume))
        wait_for(lambda: condition(cluster, namespace, "Prepared").get("status") == "True", "the preparation")
        if not is_up:
            process.stop()
        cluster.kubectl("delete", "-n", namespace, "hrl/run", f"--cascade={cascade}", "--timeout=30s")
        kept = children_names() if cascade == "orphan" else {"PersistentVolumeClaim/run-volume"}
        if cascade != "orphan" and retention == "Delete":
            kept = set()
        wait_for(lambda: set(listed(cluster, namespace, CHILDREN)) == kept, f"{kept} to be left")
        if cascade != "orphan":
            wait_for(lambda: not listed(cluster, namespace, "jobs,replicasets,pods"), "what the objects made to go")
        time.sleep(1)
        assert set(listed(cluster, namespace, CHILDREN)) == kept
        assert is_up is False or process.healthy()
        assert len(owned_by_nothing(listed(cluster, namespace, CHILDREN))) == len(kept)
