"""What a pod's state means for its run."""

from __future__ import annotations

import pytest

from heterorl_operator.podstate import has_crashed, has_user_error, is_given_up, problem_of
from unit.operator.operator_world import CREATED, ended, pod

NO_NODE = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
NO_CLAIM = "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."


def scheduled(message):
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"phase": "Pending", "conditions": [condition]}


def waiting(reason, message=""):
    return {"state": {"waiting": {"reason": reason, "message": message}}, "restartCount": 0}


READY = {"conditions": [{"type": "Ready", "status": "True"}]}


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"status": scheduled(NO_NODE)}, "Unschedulable", ["no node takes pod far", NO_NODE, "nodeSelector"]),
        ({"container": waiting("ErrImagePull", "not found")}, "ImagePullFailed", ["not found", "imagePullSecrets"]),
        ({"container": waiting("ImagePullBackOff")}, "ImagePullFailed", ["ImagePullBackOff"]),
        ({"container": waiting("InvalidImageName")}, "ImagePullFailed", ["podTemplate"]),
        ({"container": waiting("CreateContainerConfigError", "no secret s")}, "PodConfigInvalid", ["no secret s"]),
        ({"container": ended(137)}, "Crashed", ["code 137", "kubectl logs -p far"]),
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
        {"status": scheduled(NO_CLAIM)},  # told of the storage
        {"status": {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]}},
        {"container": ended(0)},
        {"container": ended(143)},
        {"container": ended(1), "status": READY},  # it crashed once, and is well again
        {"container": ended(1), "metadata": {"deletionTimestamp": CREATED}},
    ],
)
def test_a_pod_that_runs_or_is_on_its_way_or_was_told_to_go_is_no_trouble(fields):
    assert problem_of(pod("sampler", **fields)) is None


@pytest.mark.parametrize(("code", "crashed"), [(0, False), (143, False), (1, True), (2, True), (137, True)])
def test_to_be_told_to_go_is_no_crash(code, crashed):
    assert has_crashed(pod("sampler", container=ended(code))) is crashed


def test_an_error_of_its_user_is_code_2_until_the_pod_is_ready_after_all():
    assert has_user_error(pod("sampler", container=ended(2)))
    assert not has_user_error(pod("sampler", container=ended(1)))
    assert not has_user_error(pod("sampler", container=ended(2), status=READY))


@pytest.mark.parametrize(
    ("restarts", "code", "status", "given_up"),
    [(3, 1, {}, True), (2, 1, {}, False), (9, 143, {}, False), (9, 1, READY, False)],
)
def test_a_sampler_is_given_up_after_more_crashes_than_its_budget(restarts, code, status, given_up):
    sampler = pod("sampler", container=ended(code, restarts=restarts), status=status)
    assert is_given_up(sampler, budget=2) is given_up
