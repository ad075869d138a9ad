"""What a pod's state means for its run."""

from __future__ import annotations

import pytest

from heterorl_operator.podstate import create_problem, has_crashed, problem_of
from unit.operator.operator_world import CREATED, ended, pod

NO_NODE = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
NO_CLAIM = "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."


def scheduled(message):
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"phase": "Pending", "conditions": [condition]}


def waiting(reason, message=""):
    return {"state": {"waiting": {"reason": reason, "message": message}}, "restartCount": 0}


def out_of_memory():
    last = {"exitCode": 137, "reason": "OOMKilled"}
    return {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": last}, "restartCount": 2}


READY = {"conditions": [{"type": "Ready", "status": "True"}]}


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"status": scheduled(NO_NODE)}, "Unschedulable", ["no node takes pod far", NO_NODE, "nodeSelector"]),
        ({"container": waiting("ErrImagePull", "not found")}, "ImagePullFailed", ["not found", "imagePullSecrets"]),
        ({"container": waiting("ImagePullBackOff")}, "ImagePullFailed", ["ImagePullBackOff"]),
        ({"container": waiting("InvalidImageName")}, "ImagePullFailed", ["podTemplate"]),
        (
            {
                "container": waiting("PodInitializing"),
                "status": {"initContainerStatuses": [waiting("ErrImagePull", "no page")]},
            },
            "ImagePullFailed",
            ["no page"],
        ),
        ({"container": waiting("CreateContainerConfigError", "no secret s")}, "PodConfigInvalid", ["no secret s"]),
        ({"container": ended(137)}, "Crashed", ["code 137", "kubectl logs -p far"]),
        (
            {"container": out_of_memory()},
            "OOMKilled",
            ["pod far used more memory than it may", "resources.limits.memory"],
        ),
        ({"container": ended(3, "SiteError: no GPU")}, "SiteError", ["repair or drain the node", "SiteError: no GPU"]),
        ({"container": ended(1, "Traceback\nOSError: full")}, "Crashed", ["its last lines", "OSError: full"]),
    ],
)
def test_a_pod_that_does_not_run_says_why_and_what_to_do(fields, reason, words):
    problem = problem_of(pod("sampler", "far", **fields))
    assert problem is not None
    assert problem.reason == reason
    for each in words:
        assert each in problem.message


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"status": {"phase": "Pending"}},
        {"container": waiting("ContainerCreating")},
        {"container": waiting("PodInitializing"), "status": {"initContainerStatuses": [waiting("PodInitializing")]}},
        {"status": scheduled(NO_CLAIM)},  # told of the storage
        {"status": {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]}},
        {"container": ended(0)},
        {"container": ended(143)},
        {"container": ended(1), "status": READY},  # it crashed once, and is well again
        {"container": ended(1), "metadata": {"deletionTimestamp": CREATED}},
    ],
)
def test_a_pod_that_runs_or_starts_or_was_told_to_stop_has_no_problem(fields):
    assert problem_of(pod("sampler", **fields)) is None


@pytest.mark.parametrize(("code", "crashed"), [(0, False), (143, False), (1, True), (2, True), (137, True)])
def test_being_told_to_stop_is_not_a_crash(code, crashed):
    assert has_crashed(pod("sampler", container=ended(code))) is crashed


QUOTA = 'pods "run-learner-0" is forbidden: exceeded quota: few, requested: pods=1, used: pods=0, limited: pods=0'
NO_CLASS = 'pods "run-learner-0" is forbidden: no PriorityClass with name gold was found'


@pytest.mark.parametrize(
    ("words", "reason", "way_out"),
    [(QUOTA, "QuotaExceeded", "raise the quota"), (NO_CLASS, "FailedCreate", "create what is missing")],
)
def test_pods_that_cannot_be_created_are_named_with_the_clusters_words_at_the_end(words, reason, way_out):
    problem = create_problem("StatefulSet", "run-learner", words)
    assert problem.reason == reason
    assert problem.message.startswith("StatefulSet run-learner cannot create its pods")
    assert way_out in problem.message
    assert problem.message.endswith(words)
