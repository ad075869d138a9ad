"""What goes wrong between operator and API server, on a real one: the run comes out the same."""

from __future__ import annotations

import random
import time

import pytest

from cluster.faults import FaultyProxy
from cluster.operators import (
    CHILDREN,
    StandIn,
    apply,
    children_names,
    condition,
    give_volume,
    listed,
    operator,
    patch,
    replicas,
    run_manifest,
    status,
    wait_for,
    wait_for_state,
)

CLUSTER = {"level": "kwok"}
KINDS = f"{CHILDREN},jobs"
pytestmark = pytest.mark.usefixtures("crd")


@pytest.fixture
def proxy(cluster):
    with FaultyProxy(cluster) as between:
        yield between


def test_refused_and_failed_writes_are_tried_again_and_nothing_is_made_twice(cluster, namespace, proxy):
    give_volume(cluster, namespace)
    proxy.codes = (409, 429, 500, 503)
    with operator(cluster, "--namespace", namespace, kubeconfig=proxy.kubeconfig), StandIn(step=1, steps=2) as learner:
        apply(cluster, namespace, run_manifest(pools={"near": {}, "far": {}}, **learner.spec(finishGraceSeconds=1)))
        names = children_names(pools=("near", "far"))
        wait_for(lambda: set(listed(cluster, namespace, CHILDREN)) == names, "all objects", 60)
        wait_for(lambda: status(cluster, namespace).get("state") == "Running", "a status", 60)
        learner.says(finished=True, step=2)
        wait_for(lambda: replicas(cluster, namespace, "run-learner", "statefulset") == 0, "the end", 60)
        wait_for_state(cluster, namespace, "Succeeded", limit_s=60)
        assert set(listed(cluster, namespace, CHILDREN)) == names
        assert len(listed(cluster, namespace, "jobs")) == 1
    assert set(proxy.injected) == {409, 429, 500, 503}


def test_an_object_that_is_refused_for_good_is_told_and_not_tried_until_it_changes(cluster, namespace, proxy):
    give_volume(cluster, namespace)
    proxy.codes, proxy.share = (422,), 1.0
    with operator(cluster, "--namespace", namespace, kubeconfig=proxy.kubeconfig) as process:
        apply(cluster, namespace, run_manifest())
        wait_for(lambda: proxy.injected.get(422, 0) >= 6, "the refusals")
        time.sleep(3)
        tries = proxy.injected[422]
        proxy.codes = ()
        apply(cluster, namespace, run_manifest(ttlSecondsAfterFinished=1000))  # the status can be written by now
        wait_for(
            lambda: condition(cluster, namespace, "StorageReady").get("reason") == "Refused",
            "the condition of the claim",
        )
        assert condition(cluster, namespace, "LearnerReady")["reason"] == "InvalidPodTemplate"
        assert tries < 40
        process.kill()
        process.start()
        wait_for(lambda: set(listed(cluster, namespace, CHILDREN)) == children_names(), "all objects")


def test_watches_that_are_cut_and_an_api_server_that_restarts_are_survived(cluster, namespace, proxy):
    give_volume(cluster, namespace)
    with operator(cluster, "--namespace", namespace, kubeconfig=proxy.kubeconfig) as process:
        apply(cluster, namespace, run_manifest())
        wait_for(lambda: condition(cluster, namespace, "Prepared").get("status") == "True", "the preparation")
        assert proxy.cut_watches() >= 8
        patch(cluster, namespace, "run", {"samplers": [{"name": "near", "engine": "transformers", "replicas": 2}]})
        wait_for(lambda: replicas(cluster, namespace, "run-sampler-near") == 2, "the edit")
        cluster.restart("kube-apiserver")
        patch(cluster, namespace, "run", {"samplers": [{"name": "near", "engine": "transformers", "replicas": 3}]})
        wait_for(lambda: replicas(cluster, namespace, "run-sampler-near") == 3, "the edit after the restart", 60)
        assert process.healthy()
        assert set(listed(cluster, namespace, CHILDREN)) == children_names()
        assert len(listed(cluster, namespace, "jobs")) == 1


def test_a_watch_that_has_gone_deaf_is_noticed_and_what_it_missed_is_taken_in(cluster, namespace, proxy):
    give_volume(cluster, namespace)
    pool = {"name": "near", "engine": "transformers"}
    options = ("--namespace", namespace, "--resync-seconds", "4")  # every kind has its turn twice in that time
    with operator(cluster, *options, kubeconfig=proxy.kubeconfig) as process:
        apply(cluster, namespace, run_manifest())
        wait_for(lambda: condition(cluster, namespace, "Prepared").get("status") == "True", "the preparation")
        proxy.deaf = True
        for count in (2, 3, 4):
            patch(cluster, namespace, "run", {"samplers": [{**pool, "replicas": count}]})
            wait_for(lambda n=count: replicas(cluster, namespace, "run-sampler-near") == n, "the edit", 90)
        wait_for(lambda: not process.healthy(), "the alarm", 90)
        proxy.deaf = False
        proxy.cut_watches()
        wait_for(process.healthy, "its recovery", 90)


def test_an_operator_killed_at_ten_moments_brings_the_run_to_the_same_end(cluster, namespace):
    chance = random.Random(11)
    give_volume(cluster, namespace, "calm")
    give_volume(cluster, namespace, "rough")

    def life(name, disturb):
        with StandIn(step=0, steps=9) as learner:
            spec = learner.spec(finishGraceSeconds=2)
            apply(cluster, namespace, run_manifest(name, pools={"near": {"replicas": 2}, "far": {}}, **spec))
            for step in range(1, 10):
                learner.says(step=step, finished=step == 9)
                disturb()
            wait_for_state(cluster, namespace, "Succeeded", name)
            wait_for(lambda: replicas(cluster, namespace, f"{name}-learner", "statefulset") == 0, "the end")
        return shape(listed(cluster, namespace, KINDS, f"heterorl.dev/run={name}"), name), told(
            status(cluster, namespace, name)
        )

    with operator(cluster, "--namespace", namespace) as process:
        calm = life("calm", lambda: time.sleep(0.5))

        def kill():
            time.sleep(chance.uniform(0, 1.5))
            process.kill()
            process.start()

        kill()  # before there is anything: the tenth
        rough = life("rough", kill)
    assert rough == calm


def shape(objects, name):
    """What the objects ask for, without what differs between any two runs."""
    found = {}
    for key, each in objects.items():
        kind, _, of = key.partition("/")
        spec = each.get("spec", {})
        found[kind, of.replace(name, "RUN")] = spec.get("replicas")
    return {(kind, of if kind != "Job" else "prepare"): wanted for (kind, of), wanted in found.items()}


def told(found):
    """A status without its times."""
    conditions = {each["type"]: (each["status"], each["reason"]) for each in found["conditions"]}
    return found["state"], conditions, found["learner"]["step"], found["samplersReady"]
