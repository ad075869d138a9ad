"""Every problem shows within half a minute (`operators.LIMIT_S`) in a condition that says what to do.

On a real API server with a real scheduler. An image that cannot be pulled needs a kubelet: see `test_story.py`.
"""

from __future__ import annotations

import json

import pytest

from cluster.operators import (
    CHILDREN,
    apply,
    children_names,
    condition,
    get,
    give_volume,
    listed,
    operator,
    patch,
    reasons,
    run_manifest,
    status,
    wait_for,
    wait_for_reason,
    wait_for_state,
)

CLUSTER = {"level": "kwok"}
pytestmark = pytest.mark.usefixtures("crd")

RIGHTS = [
    {"apiGroups": ["heterorl.dev"], "resources": ["heterorlruns"], "verbs": ["list", "watch", "delete"]},
    {"apiGroups": ["heterorl.dev"], "resources": ["heterorlruns/status"], "verbs": ["patch"]},
    {"apiGroups": ["heterorl.dev"], "resources": ["heterorlruns/finalizers"], "verbs": ["update"]},
    {"apiGroups": ["", "apps", "batch"], "resources": ["*"], "verbs": ["get", "list", "watch", "create", "patch"]},
]


def learner_with(**template):
    return {"podTemplate": template}


def test_a_volume_that_cannot_be_bound(cluster, namespace, running):
    volume = {"volume": {"size": "1Gi", "storageClassName": "of-dreams"}}
    apply(cluster, namespace, run_manifest(exchange=volume))
    storage = wait_for_reason(cluster, namespace, "StorageReady", "ClaimPending")
    assert "storage class of-dreams" in storage["message"]
    assert "kubectl describe pvc run-volume" in storage["message"]
    assert condition(cluster, namespace, "Ready")["reason"] == "ClaimPending"
    assert "ClaimPending" in reasons(cluster, namespace)


def test_a_claim_that_does_not_exist_until_it_is_created(cluster, namespace, running):
    apply(cluster, namespace, run_manifest(exchange={"volume": {"claimName": "run-volume"}}))
    storage = wait_for_reason(cluster, namespace, "StorageReady", "ClaimNotFound")
    assert "create it" in storage["message"]
    assert "PersistentVolumeClaim/run-volume" not in listed(cluster, namespace, CHILDREN)
    give_volume(cluster, namespace)
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "run-volume"}, "spec": spec}
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(claim))
    wait_for_reason(cluster, namespace, "StorageReady", "Bound")
    wait_for_reason(cluster, namespace, "Prepared", "Prepared")


def test_a_pod_that_no_node_takes(cluster, namespace, running):
    give_volume(cluster, namespace)
    apply(cluster, namespace, run_manifest(learner=learner_with(nodeSelector={"gpu": "of-dreams"})))
    learner = wait_for_reason(cluster, namespace, "LearnerReady", "Unschedulable")
    assert "no node takes pod run-learner-0" in learner["message"]
    assert "nodeSelector" in learner["message"]


def test_a_pod_template_that_kubernetes_refuses_until_it_is_corrected(cluster, namespace, running):
    give_volume(cluster, namespace)
    apply(cluster, namespace, run_manifest(learner=learner_with(resources={"limits": {"cpu": "a lot"}})))
    learner = wait_for_reason(cluster, namespace, "LearnerReady", "InvalidPodTemplate")
    assert "StatefulSet run-learner" in learner["message"]
    patch(cluster, namespace, "run", {"suspend": True})
    patch(cluster, namespace, "run", {"learner": learner_with(resources={"limits": {"cpu": "1"}}), "suspend": False})
    wait_for_reason(cluster, namespace, "LearnerReady", "LearnerReady")


def test_a_quota_that_is_used_up_until_it_is_raised(cluster, namespace, running):
    give_volume(cluster, namespace)
    cluster.kubectl("create", "quota", "-n", namespace, "few", "--hard=count/deployments.apps=0")
    apply(cluster, namespace, run_manifest())
    samplers = wait_for_reason(cluster, namespace, "SamplersAvailable", "QuotaExceeded")
    assert "raise the quota" in samplers["message"]
    cluster.kubectl("delete", "quota", "-n", namespace, "few")
    wait_for_reason(cluster, namespace, "SamplersAvailable", "QuorumReached")


POLICY = {
    "failurePolicy": "Fail",
    "matchConstraints": {
        "resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}]
    },
    "validations": [{"expression": "false", "message": "pods of this team need a cost centre"}],
}


def refuse_pods(cluster, namespace):
    """An admission policy that denies every pod of the namespace."""
    group = "admissionregistration.k8s.io/v1"
    names = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    binding = {"policyName": namespace, "validationActions": ["Deny"], "matchResources": {"namespaceSelector": names}}
    metadata = {"name": namespace}
    policy = {"apiVersion": group, "kind": "ValidatingAdmissionPolicy", "metadata": metadata, "spec": POLICY}
    bound = {"apiVersion": group, "kind": "ValidatingAdmissionPolicyBinding", "metadata": metadata, "spec": binding}
    cluster.kubectl(
        "apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": [policy, bound]})
    )
    denied = ("run", "probe", "-n", namespace, "--image=any", "--dry-run=server")
    wait_for(lambda: "cost centre" in cluster.kubectl(*denied, check=False), "the policy to be in force")


def allow_pods(cluster, namespace):
    kinds = "validatingadmissionpolicies,validatingadmissionpolicybindings"
    cluster.kubectl("delete", kinds, "--field-selector", f"metadata.name={namespace}")


def few_pods(cluster, namespace):
    cluster.kubectl("create", "quota", "-n", namespace, "few", "--hard=pods=0")
    denied = ("run", "probe", "-n", namespace, "--image=any", "--dry-run=server")
    wait_for(lambda: "exceeded quota" in cluster.kubectl(*denied, check=False), "the quota to be in force")


def many_pods(cluster, namespace):
    cluster.kubectl("delete", "quota", "-n", namespace, "few")


@pytest.mark.parametrize(
    ("refuse", "allow", "reason", "words", "way_out"),
    [
        (few_pods, many_pods, "QuotaExceeded", "exceeded quota: few", "raise the quota"),
        (refuse_pods, allow_pods, "FailedCreate", "pods of this team need a cost centre", "policy changed"),
    ],
    ids=["quota", "policy"],
)
def test_pods_that_the_cluster_refuses_show_with_its_words_until_it_takes_them(
    cluster, namespace, running, refuse, allow, reason, words, way_out
):
    give_volume(cluster, namespace)
    refuse(cluster, namespace)
    apply(cluster, namespace, run_manifest())
    for kind in ("Prepared", "LearnerReady", "SamplersAvailable"):
        found = wait_for_reason(cluster, namespace, kind, reason)
        assert words in found["message"]
        assert way_out in found["message"]
    assert status(cluster, namespace)["state"] == "Pending"
    assert reason in reasons(cluster, namespace)
    allow(cluster, namespace)
    wait_for(lambda: condition(cluster, namespace, "SamplersAvailable").get("reason") != reason, "new samplers", 60)


def test_a_priority_class_that_is_not_there_is_named_and_the_other_pods_are_no_problem(cluster, namespace, running):
    give_volume(cluster, namespace)
    pools = {"near": {}, "far": {"podTemplate": {"priorityClassName": "gold"}}}
    apply(cluster, namespace, run_manifest(pools=pools, failurePolicy={"minSamplers": 2}))
    samplers = wait_for_reason(cluster, namespace, "SamplersAvailable", "FailedCreate")
    assert samplers["message"].startswith("Deployment run-sampler-far cannot create its pods")
    assert "no PriorityClass with name gold was found" in samplers["message"]
    wait_for_reason(cluster, namespace, "LearnerReady", "LearnerReady")
    assert status(cluster, namespace)["state"] == "Pending"


def test_a_name_that_is_taken_keeps_every_pod_away_that_would_mount_what_is_behind_it(cluster, namespace, running):
    give_volume(cluster, namespace)
    cluster.kubectl("create", "configmap", "-n", namespace, "run-config", "--from-literal=theirs=1")
    apply(cluster, namespace, run_manifest())
    ready = wait_for_reason(cluster, namespace, "Ready", "NameConflict")
    assert "ConfigMap run-config" in ready["message"]
    assert listed(cluster, namespace, "statefulsets,deployments,jobs,pods") == {}
    cluster.kubectl("delete", "configmap", "-n", namespace, "run-config")
    wait_for_state(cluster, namespace, "Running", limit_s=60)


def test_an_expansion_that_the_cluster_refuses_holds_nothing_up_and_can_be_taken_back(cluster, namespace, running):
    give_volume(cluster, namespace)
    apply(cluster, namespace, run_manifest())
    wait_for_reason(cluster, namespace, "Ready", "Running")
    patch(cluster, namespace, "run", {"exchange": {"volume": {"size": "9Gi"}}})
    storage = wait_for_reason(cluster, namespace, "StorageReady", "ResizeRefused")
    assert storage["status"] == "True"
    assert "only dynamically provisioned pvc can be resized" in storage["message"]
    assert "ResizeRefused" in reasons(cluster, namespace)
    assert condition(cluster, namespace, "Ready")["status"] == "True"
    patch(cluster, namespace, "run", {"exchange": {"volume": {"size": "1Gi"}}})
    wait_for_reason(cluster, namespace, "StorageReady", "Bound")


def test_a_misspelt_pool_is_reported_as_new(cluster, namespace, running):
    give_volume(cluster, namespace)
    apply(cluster, namespace, run_manifest())
    wait_for_reason(cluster, namespace, "Prepared", "Prepared")
    slip = {"apiVersion": "heterorl.dev/v1alpha1", "kind": "HeteroRLRun", "metadata": {"name": "run"}}
    slip |= {"spec": {"samplers": [{"name": "naer", "replicas": 3}]}}
    arguments = ("apply", "-n", namespace, "--server-side", "--field-manager=somebody", "-f", "-")
    cluster.kubectl(*arguments, stdin=json.dumps(slip))
    wait_for(lambda: "PoolAdded" in reasons(cluster, namespace), "the event")
    wrong = '[{"op": "replace", "path": "/spec/samplers/7/replicas", "value": 2}]'
    refused = cluster.kubectl("patch", "-n", namespace, "hrl/run", "--type=json", "-p", wrong, check=False)
    assert "The request is invalid" in refused


@pytest.mark.parametrize("missing", ["create", "list"])
def test_a_namespace_in_which_the_operator_lacks_a_right(cluster, namespace, missing):
    give_volume(cluster, namespace)
    cluster.kubectl("create", "serviceaccount", "-n", namespace, "operator")
    rules = [dict(rule) for rule in RIGHTS]
    rules[3]["resources"] = [
        "configmaps",
        "services",
        "persistentvolumeclaims",
        "statefulsets",
        "jobs",
        "pods",
        "events",
    ]
    if missing == "create":
        rules.append({"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get", "list", "watch"]})
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "operator"},
        "rules": rules,
    }
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(role))
    binding = ("--role=operator", f"--serviceaccount={namespace}:operator")
    cluster.kubectl("create", "rolebinding", "-n", namespace, "operator", *binding)
    token = cluster.kubectl("create", "token", "-n", namespace, "operator").strip()
    kubeconfig = cluster.write_kubeconfig(f"operator-{namespace}", token, namespace)
    with operator(cluster, "--namespace", namespace, kubeconfig=kubeconfig):
        apply(cluster, namespace, run_manifest())
        samplers = wait_for_reason(cluster, namespace, "SamplersAvailable", "Forbidden")
        assert "deployments" in samplers["message"]
        assert "Role" in samplers["message"]
        others = children_names() - {"Deployment/run-sampler-near"}
        wait_for(lambda: set(listed(cluster, namespace, CHILDREN)) == others, "the other objects")
        if missing == "create":
            rules[-1]["verbs"] += ["create", "patch"]
            cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(role))
            wait_for_reason(cluster, namespace, "SamplersAvailable", "QuorumReached")
            assert get(cluster, namespace, "deployment", "run-sampler-near")
