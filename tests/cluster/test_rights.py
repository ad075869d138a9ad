"""The operator with the rights of the chart alone: each is used, none is lacking, and every pod is a harmless one.

What the API server noted of the operator (its audit log) is compared with the roles that Helm renders, under the
strictest admission there is in use: OpenShift's OwnerReferencesPermissionEnforcement and Pod Security `restricted`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from kubernetes import config

from cluster.harness import Cluster
from cluster.operators import (
    CHILDREN,
    Object,
    StandIn,
    apply,
    children_names,
    get,
    give_volume,
    listed,
    operator,
    patch,
    replicas,
    run_manifest,
    wait_for,
    wait_for_reason,
    wait_for_state,
)
from heterorl.exchange.version import Version
from heterorl.kubernetes.manifests import Images, desired_state
from heterorl.spec.run import HeteroRLRun
from heterorl_operator.apply import Applier
from heterorl_operator.cache import ObjectCache
from heterorl_operator.client import Api, Forbidden
from heterorl_operator.handlers import Watcher
from heterorl_operator.relist import Relister
from heterorl_operator.resources import BY_NAME, JOB, LABELLED, RUN
from heterorl_operator.workqueue import WorkQueue

CHART = Path(__file__).parents[2] / "charts" / "heterorl"
PLUGIN = "--enable-admission-plugins=OwnerReferencesPermissionEnforcement"
CLUSTER = {"level": "kwok", "audit": True, "flags": {"kube-apiserver": [PLUGIN]}}
pytestmark = pytest.mark.usefixtures("crd")

Right = tuple[str, str, str]
"""API group, resource or resource/subresource, verb."""
APPLIED = [
    ("", "configmaps"),
    ("", "services"),
    ("", "persistentvolumeclaims"),
    ("apps", "statefulsets"),
    ("apps", "deployments"),
]
CREATE = {(group, resource, "create") for group, resource in APPLIED}
FINALIZERS = ("heterorl.dev", "heterorlruns/finalizers", "update")
DELETE_CLAIM = ("", "persistentvolumeclaims", "delete")
OWNING = {FINALIZERS, DELETE_CLAIM}
"""What the admission plugin asks for when an object gets an owner, and no request ever."""


class Installed(NamedTuple):
    """The chart's rights, given to a service account."""

    account: str
    kubeconfig: Path
    granted: set[Right]


Install = Callable[..., Installed]


@pytest.fixture
def install(cluster: Cluster, namespace: str, helm: Callable[..., str]) -> Iterator[Install]:
    """Gives an account in a namespace of its own what the chart gives with these values, but for `without`."""
    system = f"{namespace}-system"
    cluster.kubectl("create", "namespace", system)

    def render(values: Object) -> list[Object]:
        only = ("-s", "templates/serviceaccount.yaml", "-s", "templates/rbac.yaml")
        printed = helm("template", "heterorl", CHART, "--namespace", system, *only, values=values)
        return list(yaml.safe_load_all(printed))

    def give(values: Object, without: Iterable[Right] = ()) -> Installed:
        objects = render(values)
        (role,) = (each for each in objects if each["kind"] in ("Role", "ClusterRole"))
        granted = rights(role["rules"])
        if without:
            left = sorted(granted - set(without))
            role["rules"] = [{"apiGroups": [g], "resources": [r], "verbs": [v]} for g, r, v in left]
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
        token = cluster.kubectl("create", "token", "heterorl", "-n", system).strip()
        account = f"system:serviceaccount:{system}:heterorl"
        asking = ("auth", "can-i", "list", "heterorlruns", "-n", namespace, f"--as={account}")
        cluster.wait("the rights", lambda: cluster.kubectl(*asking, check=False).strip() == "yes", 20)
        return Installed(account, cluster.write_kubeconfig(system, token, namespace), granted)

    yield give
    cluster.kubectl("delete", "namespace", system, "--wait=false")


def rights(rules: Iterable[Object]) -> set[Right]:
    return {(g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}


def audited(cluster: Cluster) -> Iterator[Object]:
    """Requests that were answered, or are by now."""
    whole, _, _ = cluster.audit_log.read_text().rpartition("\n")  # the last line may be half written
    return (entry for entry in map(json.loads, whole.splitlines()) if entry["stage"] != "RequestReceived")


def used(entries: Iterable[Object]) -> Iterator[Right]:
    """Rights that were needed for these requests."""
    for entry in entries:
        if about := entry.get("objectRef"):  # discovery is about nothing, and open to all
            resource = "/".join(filter(None, (about["resource"], about.get("subresource"))))
            yield about.get("apiGroup", ""), resource, entry["verb"]
            # An apply that makes the object is a `patch` that is answered with 201, and needs `create` as well.
            if entry["verb"] == "patch" and entry["responseStatus"]["code"] == 201:
                yield about.get("apiGroup", ""), resource, "create"


# ── a life ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def suspensions(cluster: Cluster, namespace: str) -> int:
    """How often the event was counted that a run is suspended."""
    printed = cluster.kubectl("get", "events", "-n", namespace, "--field-selector=reason=Suspended", "-o", "json")
    return sum(each["count"] for each in json.loads(printed)["items"])


def live(cluster: Cluster, namespace: str) -> None:
    """Everything that makes an operator act."""
    give_volume(cluster, namespace)
    learner = {"podTemplate": {"annotations": {"test/ip": "127.0.0.1"}}}  # nobody listens there
    apply(cluster, namespace, run_manifest("short", activeDeadlineSeconds=2, ttlSecondsAfterFinished=1))
    apply(cluster, namespace, run_manifest("waits"))  # for a volume: no node takes its preparation
    gold = {"podTemplate": {"priorityClassName": "gold"}}  # there is none, as the events of its StatefulSet say
    apply(cluster, namespace, run_manifest("refused", learner=gold))
    apply(cluster, namespace, run_manifest(pools={"near": {}, "far": {}}, learner=learner))
    wait_for(lambda: set(of_run(cluster, namespace)) == children_names(pools=("near", "far")), "the objects")
    wait_for_reason(cluster, namespace, "Progressing", "Unreachable")
    wait_for_reason(cluster, namespace, "LearnerReady", "FailedCreate", "refused")
    apply(cluster, namespace, run_manifest(learner=learner))
    wait_for(lambda: set(of_run(cluster, namespace)) == children_names(), "the end of a pool")
    patch(cluster, namespace, "run", {"exchange": {"retention": {"volume": "Delete"}}})
    wait_for(lambda: owners(cluster, namespace) == ["run"], "the claim to be the run's")
    cluster.kubectl("scale", "-n", namespace, "deployment/run-sampler-near", "--replicas=5")
    wait_for(lambda: replicas(cluster, namespace, "run-sampler-near") == 1, "its own number")
    for count in (1, 2):
        wait_for(lambda: listed(cluster, namespace, "jobs", "heterorl.dev/run=waits"), "the preparation")
        patch(cluster, namespace, "waits", {"suspend": True})
        wait_for(lambda: not listed(cluster, namespace, "jobs", "heterorl.dev/run=waits"), "its end")
        wait_for(lambda n=count: suspensions(cluster, namespace) == n, "the event")
        patch(cluster, namespace, "waits", {"suspend": False})
    wait_for(lambda: get(cluster, namespace, "hrl", "short") is None, "the record's deletion")


def of_run(cluster: Cluster, namespace: str) -> dict[str, Object]:
    return listed(cluster, namespace, CHILDREN, "heterorl.dev/run=run")


def owners(cluster: Cluster, namespace: str) -> list[str]:
    """Of the run's claim."""
    claim = get(cluster, namespace, "pvc", "run-volume")
    return [owner["name"] for owner in claim["metadata"].get("ownerReferences", [])] if claim else []


def list_without_watches(kubeconfig: Path, namespaces: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operator does every few minutes, as if all of its watches had gone stale."""
    monkeypatch.setattr("heterorl_operator.relist._SETTLE_S", 0.0)
    with config.new_client_from_config(str(kubeconfig)) as client:
        api, cache = Api(client, "heterorl-operator/stale"), ObjectCache()
        watcher = Watcher(cache, WorkQueue(), Applier(api, cache).object_deleted)
        relister = Relister(api, cache, watcher, namespaces, every_s=0.1)
        relister.start()
        try:
            wait_for(lambda: all(cache.versions(kind.name) for kind in (RUN, *LABELLED)), "every kind to be listed")
        finally:
            relister.stop()


# The first of them sees all namespaces, and should find no run of another test in one that goes.
@pytest.mark.parametrize("scope", ["cluster", "namespace"])
def test_the_operator_uses_every_right_of_the_chart_and_needs_no_other(cluster, namespace, install, scope, monkeypatch):
    values: dict[str, Any] = {}
    namespaces: tuple[str, ...] = ()
    options: list[str] = []
    if scope == "namespace":
        values, namespaces = {"watch": {"namespaces": [namespace]}, "progress": {"mode": "proxy"}}, (namespace,)
        options = ["--namespace", namespace, "--progress", "proxy"]
    account, kubeconfig, granted = install(values)
    with operator(cluster, *options, kubeconfig=kubeconfig):
        live(cluster, namespace)
    list_without_watches(kubeconfig, namespaces, monkeypatch)
    asked = [entry for entry in audited(cluster) if entry["user"]["username"] == account]
    assert [entry for entry in asked if entry["responseStatus"]["code"] == 403] == []
    assert set(used(asked)) == granted - OWNING
    assert granted > OWNING


# ── rights that no request names ─────────────────────────────────────────────────────────────────────────────────────
OWNED = {"ConfigMap", "Service", "StatefulSet", "Deployment", "Job"}  # a claim that is retained has no owner


@pytest.mark.parametrize(
    ("missing", "retention", "refused", "words"),
    [
        (CREATE, "Retain", OWNED - {"Job"} | {"PersistentVolumeClaim"}, "cannot create resource"),
        ({FINALIZERS}, "Retain", OWNED, "cannot set blockOwnerDeletion"),
        ({DELETE_CLAIM}, "Delete", {"PersistentVolumeClaim"}, "cannot set an ownerRef on a resource you can't delete"),
    ],
    ids=["create", "finalizers", "delete-claim"],
)
def test_a_right_that_no_request_names_is_needed(cluster, namespace, install, missing, retention, refused, words):
    """What the operator writes for a run, written as it does."""
    if retention == "Delete":  # the claim is there already, and is to get an owner
        claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "run-volume"}}
        claim["spec"] = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
        apply(cluster, namespace, claim)
    _, kubeconfig, granted = install({"watch": {"namespaces": [namespace]}}, missing)
    assert missing < granted
    manifest = run_manifest(exchange={"volume": {"size": "1Gi"}, "retention": {"volume": retention}})
    apply(cluster, namespace, manifest)
    uid = get(cluster, namespace, "hrl", "run")["metadata"]["uid"]
    run = HeteroRLRun.model_validate(manifest)
    objects = desired_state(run, images=Images("learner", "sampler"), namespace=namespace, owner_uid=uid)
    answers = write(kubeconfig, objects)
    assert answers.keys() == refused
    assert all(words in answer for answer in answers.values())


def write(kubeconfig: Path, objects: Iterable[Object]) -> dict[str, str]:
    """The kinds that were forbidden, and the API server's words."""
    forbidden = {}
    with config.new_client_from_config(str(kubeconfig)) as client:
        api = Api(client, "heterorl-operator/test")
        for each in objects:
            kind = BY_NAME[each["kind"]]
            try:
                (api.create if kind is JOB else api.apply)(kind, each)
            except Forbidden as error:
                forbidden[kind.name] = str(error)
    return forbidden


# ── Pod Security ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_pod_security_restricted_admits_the_pods_of_every_role(cluster, namespace):
    levels = [f"pod-security.kubernetes.io/{mode}=restricted" for mode in ("enforce", "warn", "audit")]
    cluster.kubectl("label", "namespace", namespace, *levels)
    give_volume(cluster, namespace)
    more = {"data": {"evals": [{"label": "sums", "source": "arithmetic"}]}}
    more["evaluation"] = {"everySteps": 5, "engine": "transformers"}
    with operator(cluster, "--namespace", namespace), StandIn(step=0, evaluations_due=(Version(0, 1),)) as learner:
        apply(cluster, namespace, run_manifest(pools={"near": {}, "far": {}}, **learner.spec(), **more))
        wait_for(lambda: len(roles(cluster, namespace)) == 5, "the pods")
        wait_for_state(cluster, namespace, "Running")
    of_pool = {("sampler", "near"), ("sampler", "far")}
    assert roles(cluster, namespace) == of_pool | {("prepare", ""), ("learner", ""), ("evaluation", "")}
    failed = cluster.kubectl("get", "events", "-n", namespace, "--field-selector=reason=FailedCreate", "-o", "name")
    assert failed == ""
    # The API server notes a workload whose pods it would refuse.
    here = (entry for entry in audited(cluster) if entry.get("objectRef", {}).get("namespace") == namespace)
    noted = [entry.get("annotations", {}) for entry in here]
    assert [each for each in noted if "pod-security.kubernetes.io/audit-violations" in each] == []
    assert any(each.get("pod-security.kubernetes.io/enforce-policy") == "restricted:latest" for each in noted)
    refused = cluster.kubectl("run", "careless", "-n", namespace, "--image=any", check=False)
    assert 'violates PodSecurity "restricted:latest"' in refused


def roles(cluster: Cluster, namespace: str) -> set[tuple[str, str]]:
    """Role and sampler pool of the pods there are."""
    labels = [each["metadata"]["labels"] for each in listed(cluster, namespace, "pods").values()]
    return {(each["heterorl.dev/role"], each.get("heterorl.dev/pool", "")) for each in labels}
