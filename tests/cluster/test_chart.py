"""The chart: what Helm makes of it, and what a real API server makes of that."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from cluster.harness import Cluster
from heterorl.exchange.version import Version
from heterorl.kubernetes.manifests import Images, desired_state, evaluation_job
from heterorl.monitoring.run_metrics import PoolProgress, RunProgress, to_text
from heterorl.spec.load import load_run
from heterorl_operator.cache import ObjectCache
from heterorl_operator.metrics import RunsCollector
from heterorl_operator.resources import BY_NAME

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "heterorl"
CRD = ROOT / "crds" / "heterorlrun.yaml"
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
CLUSTER = {"level": "controllers"}
RELEASE, NAMESPACE = "heterorl", "heterorl-system"
Object = dict[str, Any]

# What the operator does, and so what it may do; by API group and resource.
WORKLOAD = {"get", "list", "watch", "create", "patch"}
RIGHTS = {
    ("heterorl.dev", "heterorlruns"): {"get", "list", "watch", "delete"},
    ("heterorl.dev", "heterorlruns/status"): {"patch"},
    ("heterorl.dev", "heterorlruns/finalizers"): {"update"},
    ("", "configmaps"): WORKLOAD,
    ("", "services"): WORKLOAD,
    ("", "persistentvolumeclaims"): WORKLOAD | {"delete"},
    ("apps", "statefulsets"): WORKLOAD,
    ("apps", "deployments"): WORKLOAD | {"delete"},
    ("batch", "jobs"): {"get", "list", "watch", "create", "delete"},
    ("", "pods"): {"get", "list", "watch"},
    ("", "events"): {"create", "patch", "list"},
}

# Everything that is off by default.
ALL = {
    "priorityClass": {"create": True},
    "networkPolicy": {"enabled": True},
    "metrics": {name: {"enabled": True} for name in ("serviceMonitor", "podMonitor", "prometheusRule", "dashboard")},
}


def merged(base: Object, over: Object) -> Object:
    both = {each: merged(base[each], over[each]) for each in base.keys() & over.keys() if isinstance(base[each], dict)}
    return {**base, **over, **both}


def key(found: Object) -> str:
    namespace = found["metadata"].get("namespace", NAMESPACE)
    elsewhere = "" if namespace == NAMESPACE else f"{namespace}/"
    return f"{found['kind']}/{elsewhere}{found['metadata']['name']}"


@pytest.fixture(scope="module")
def render(helm: Callable[..., str]) -> Callable[..., dict[str, Object]]:
    """Objects of the chart by `Kind/name`, or `Kind/namespace/name` where that is not the release's, with these values.

    `everything` switches on what is off by default.
    """

    def render(values: Object | None = None, *, everything: bool = False) -> dict[str, Object]:
        given = merged(ALL, values or {}) if everything else values or {}
        text = helm("template", RELEASE, CHART, "--namespace", NAMESPACE, values=given)
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return {key(found): found for found in yaml.load_all(text, loader) if found}

    return render


def refusal(helm: Callable[..., str], values: Object) -> str:
    """What Helm says to values that it does not take."""
    with pytest.raises(subprocess.CalledProcessError) as refused:
        helm("template", RELEASE, CHART, values=values)
    return refused.value.stderr


def at(found: Any, path: str) -> Any:
    """The part of an object at a path as `spec.containers.0.image`; None where there is none."""
    for key in path.split("."):
        try:
            found = found[int(key)] if isinstance(found, list) else found.get(key.replace("|", "."))
        except (IndexError, AttributeError):
            return None
    return found


def rights(role: Object) -> dict[tuple[str, str], set[str]]:
    granted: dict[tuple[str, str], set[str]] = {}
    for rule in role["rules"]:
        assert set(rule) == {"apiGroups", "resources", "verbs"}
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                granted.setdefault((group, resource), set()).update(rule["verbs"])
    return granted


# ── the chart as such ────────────────────────────────────────────────────────────────────────────────────────────────
def test_lint_finds_nothing(helm):
    helm("lint", "--strict", CHART)
    helm("lint", "--strict", CHART, values=ALL)


def test_version_is_that_of_the_package():
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == version


def test_definition_is_the_one_in_crds(render):
    assert (CHART / "files" / "heterorlrun.yaml").read_bytes() == CRD.read_bytes(), "run `heterorl crd`"
    made = render()["CustomResourceDefinition/heterorlruns.heterorl.dev"]
    assert made["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    made["metadata"].pop("labels")
    assert made == yaml.safe_load(CRD.read_text())


def test_every_object_is_labelled_and_in_the_releases_namespace(render):
    cluster_wide = {"CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", "PriorityClass"}
    objects = render(everything=True)
    assert len(objects) == 18
    for name, found in objects.items():
        assert found["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE, name
        assert found["metadata"]["labels"]["app.kubernetes.io/version"] == "0.1.0", name
        assert found["metadata"].get("namespace") == (None if found["kind"] in cluster_wide else NAMESPACE), name


def test_names_outside_of_the_namespace_differ_between_releases_of_one_name(helm, render):
    text = helm("template", RELEASE, CHART, "--namespace", "other", values=ALL)
    elsewhere = {key(found) for found in yaml.safe_load_all(text) if found and "namespace" not in found["metadata"]}
    here = {name for name, found in render(everything=True).items() if "namespace" not in found["metadata"]}
    assert here & elsewhere == {"CustomResourceDefinition/heterorlruns.heterorl.dev"}


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────
OPERATOR = "Deployment/heterorl"
POD = "spec.template.spec"
MAIN = f"{POD}.containers.0"
ROLE = f"ClusterRole/heterorl-{NAMESPACE}"
RULES = "PrometheusRule/heterorl"
PEER = {"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}
DIGEST = "sha256:" + "a" * 64
TOLERATION = {"key": "gpu", "operator": "Exists"}
SPREAD = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
EFFECTS: list[tuple[str, Any, str, str, Any]] = [
    # value, what it is set to, object, where in the object, what is there then
    ("nameOverride", "hrl", "Deployment/heterorl-hrl", "spec.selector.matchLabels.app|kubernetes|io/name", "hrl"),
    ("fullnameOverride", "op", "Deployment/op", "metadata.name", "op"),
    ("registry", "example.com/rl", OPERATOR, f"{MAIN}.image", "example.com/rl/heterorl/operator:0.1.0"),
    ("image.repository", "other", OPERATOR, f"{MAIN}.image", "other:0.1.0"),
    ("image.tag", "2", OPERATOR, f"{MAIN}.image", "heterorl/operator:2"),
    ("image.digest", DIGEST, OPERATOR, f"{MAIN}.image", f"heterorl/operator@{DIGEST}"),
    ("image.pullPolicy", "Always", OPERATOR, f"{MAIN}.imagePullPolicy", "Always"),
    ("imagePullSecrets", [{"name": "s"}], OPERATOR, f"{POD}.imagePullSecrets", [{"name": "s"}]),
    ("images.learner.repository", "other", OPERATOR, f"{MAIN}.args", "--learner-image=other:0.1.0"),
    ("images.learner.tag", "2", OPERATOR, f"{MAIN}.args", "--learner-image=heterorl/learner:2"),
    ("images.learner.digest", DIGEST, OPERATOR, f"{MAIN}.args", f"--learner-image=heterorl/learner@{DIGEST}"),
    ("images.sampler.repository", "other", OPERATOR, f"{MAIN}.args", "--sampler-image=other:0.1.0"),
    ("images.sampler.tag", "2", OPERATOR, f"{MAIN}.args", "--sampler-image=heterorl/sampler:2"),
    ("images.sampler.digest", DIGEST, OPERATOR, f"{MAIN}.args", f"--sampler-image=heterorl/sampler@{DIGEST}"),
    ("images.pullPolicy", "Never", OPERATOR, f"{MAIN}.args", "--image-pull-policy=Never"),
    ("images.pullSecrets", ["s"], OPERATOR, f"{MAIN}.args", "--image-pull-secret=s"),
    ("crds.enabled", False, "CustomResourceDefinition/heterorlruns.heterorl.dev", "kind", None),
    ("crds.keep", False, "CustomResourceDefinition/heterorlruns.heterorl.dev", "metadata.annotations", None),
    ("watch.namespaces", ["a"], OPERATOR, f"{MAIN}.args", "--namespace=a"),
    ("rbac.create", False, ROLE, "kind", None),
    ("rbac.aggregate", False, f"{ROLE}-edit", "kind", None),
    ("serviceAccount.create", False, "ServiceAccount/heterorl", "kind", None),
    ("serviceAccount.name", "sa", OPERATOR, f"{POD}.serviceAccountName", "sa"),
    ("serviceAccount.annotations", {"a": "b"}, "ServiceAccount/heterorl", "metadata.annotations", {"a": "b"}),
    ("workers", 2, OPERATOR, f"{MAIN}.args", "--workers=2"),
    ("progress.mode", "proxy", OPERATOR, f"{MAIN}.args", "--progress=proxy"),
    ("progress.seconds", 5, OPERATOR, f"{MAIN}.args", "--progress-seconds=5"),
    ("takeOver", True, OPERATOR, f"{MAIN}.args", "--take-over"),
    ("logging.format", "plain", OPERATOR, f"{MAIN}.args", "--log-format=plain"),
    ("logging.level", "debug", OPERATOR, f"{MAIN}.args", "--log-level=debug"),
    ("port", 9090, OPERATOR, f"{MAIN}.args", "--port=9090"),
    ("port", 9090, OPERATOR, f"{MAIN}.ports.0.containerPort", 9090),
    ("extraArgs", ["--resync-seconds=60"], OPERATOR, f"{MAIN}.args", "--resync-seconds=60"),
    ("extraEnv", [{"name": "A", "value": "b"}], OPERATOR, f"{MAIN}.env", [{"name": "A", "value": "b"}]),
    ("podAnnotations", {"a": "b"}, OPERATOR, "spec.template.metadata.annotations", {"a": "b"}),
    ("podLabels", {"a": "b"}, OPERATOR, "spec.template.metadata.labels.a", "b"),
    ("podSecurityContext", {"runAsUser": None}, OPERATOR, f"{POD}.securityContext.runAsUser", None),
    ("securityContext", {"runAsUser": 7}, OPERATOR, f"{MAIN}.securityContext.runAsUser", 7),
    ("resources", {"limits": {"memory": "1Gi"}}, OPERATOR, f"{MAIN}.resources.limits.memory", "1Gi"),
    ("probes.startup", {"failureThreshold": 9}, OPERATOR, f"{MAIN}.startupProbe.failureThreshold", 9),
    ("probes.liveness", {"periodSeconds": 9}, OPERATOR, f"{MAIN}.livenessProbe.periodSeconds", 9),
    ("probes.readiness", {"initialDelaySeconds": 9}, OPERATOR, f"{MAIN}.readinessProbe.initialDelaySeconds", 9),
    ("nodeSelector", {"a": "b"}, OPERATOR, f"{POD}.nodeSelector", {"a": "b"}),
    ("tolerations", [TOLERATION], OPERATOR, f"{POD}.tolerations", [TOLERATION]),
    ("affinity", {"nodeAffinity": {}}, OPERATOR, f"{POD}.affinity", {"nodeAffinity": {}}),
    ("topologySpreadConstraints", [SPREAD], OPERATOR, f"{POD}.topologySpreadConstraints", [SPREAD]),
    ("priorityClassName", "high", OPERATOR, f"{POD}.priorityClassName", "high"),
    ("priorityClass.create", False, OPERATOR, f"{POD}.priorityClassName", None),
    ("priorityClass.value", 7, f"PriorityClass/heterorl-{NAMESPACE}", "value", 7),
    ("hostNetwork", True, OPERATOR, f"{POD}.hostNetwork", True),
    ("hostNetwork", True, OPERATOR, f"{POD}.dnsPolicy", "ClusterFirstWithHostNet"),
    ("dnsPolicy", "Default", OPERATOR, f"{POD}.dnsPolicy", "Default"),
    ("extraVolumes", [{"name": "v", "emptyDir": {}}], OPERATOR, f"{POD}.volumes.1.name", "v"),
    ("extraVolumeMounts", [{"name": "v", "mountPath": "/v"}], OPERATOR, f"{MAIN}.volumeMounts.1.mountPath", "/v"),
    ("metrics.enabled", False, "Service/heterorl-metrics", "kind", None),
    ("metrics.service.port", 80, "Service/heterorl-metrics", "spec.ports.0.port", 80),
    ("metrics.service.annotations", {"a": "b"}, "Service/heterorl-metrics", "metadata.annotations", {"a": "b"}),
    ("metrics.service.labels", {"a": "b"}, "Service/heterorl-metrics", "metadata.labels.a", "b"),
    ("metrics.serviceMonitor.enabled", False, "ServiceMonitor/heterorl", "kind", None),
    ("metrics.serviceMonitor.interval", "5s", "ServiceMonitor/heterorl", "spec.endpoints.0.interval", "5s"),
    ("metrics.serviceMonitor.labels", {"a": "b"}, "ServiceMonitor/heterorl", "metadata.labels.a", "b"),
    ("metrics.podMonitor.enabled", False, "PodMonitor/heterorl-runs", "kind", None),
    ("metrics.podMonitor.interval", "5s", "PodMonitor/heterorl-runs", "spec.podMetricsEndpoints.0.interval", "5s"),
    ("metrics.podMonitor.labels", {"a": "b"}, "PodMonitor/heterorl-runs", "metadata.labels.a", "b"),
    ("metrics.prometheusRule.enabled", False, RULES, "kind", None),
    ("metrics.prometheusRule.labels", {"a": "b"}, RULES, "metadata.labels.a", "b"),
    ("metrics.prometheusRule.maxLag", 7, RULES, "spec", "(heterorl_run_lag) > 7"),
    ("metrics.prometheusRule.maxStalledSeconds", 7, RULES, "spec", "(heterorl_run_stalled_seconds) > 7"),
    ("metrics.prometheusRule.samplerMuteFor", "7h", RULES, "spec", "7h"),
    ("metrics.prometheusRule.minVolumeFreePercent", 7, RULES, "spec", "< 7"),
    ("metrics.prometheusRule.volumeClaims", "rl-.*", RULES, "spec", 'persistentvolumeclaim=~"rl-.*"'),
    ("metrics.dashboard.enabled", False, "ConfigMap/heterorl-dashboard", "kind", None),
    ("metrics.dashboard.namespace", "grafana", "ConfigMap/grafana/heterorl-dashboard", "metadata.namespace", "grafana"),
    ("metrics.dashboard.labels", {"a": "b"}, "ConfigMap/heterorl-dashboard", "metadata.labels.a", "b"),
    ("metrics.dashboard.annotations", {"a": "b"}, "ConfigMap/heterorl-dashboard", "metadata.annotations.a", "b"),
    ("networkPolicy.enabled", False, "NetworkPolicy/heterorl", "kind", None),
    ("networkPolicy.from", [PEER], "NetworkPolicy/heterorl", "spec.ingress.0.from", [PEER]),
    ("networkPolicy.apiServer", [PEER], "NetworkPolicy/heterorl", "spec.egress.0.to", [PEER]),
    ("networkPolicy.apiServerPorts", [7443], "NetworkPolicy/heterorl", "spec.egress.0.ports", [{"port": 7443}]),
    ("tests.enabled", False, "Pod/heterorl-test", "kind", None),
]
# Maps whose keys are the user's or Kubernetes'.
FREE = {"podSecurityContext", "securityContext", "resources", "startup", "liveness", "readiness", "labels"}


def leaves(values: Object, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value and key not in FREE:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def nested(path: str, value: Any) -> Object:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def test_every_value_is_in_the_table_of_effects():
    assert {name for name, *_ in EFFECTS} == set(leaves(DEFAULTS))


@pytest.fixture(scope="module")
def before(render: Callable[..., dict[str, Object]]) -> dict[str, Object]:
    return render(everything=True)


@pytest.mark.parametrize(("name", "value", "which", "where", "expected"), EFFECTS, ids=lambda part: str(part)[:40])
def test_value_has_its_effect(render, before, name, value, which, where, expected):
    given = nested(name, value)
    if name == "serviceAccount.create":
        given["serviceAccount"]["name"] = "mine"
    after = at(render(given, everything=True).get(which, {}), where)
    if where.endswith((".args", "spec")):  # one of several
        assert expected in (after if where.endswith(".args") else yaml.safe_dump(after, width=1000))
        assert expected not in yaml.safe_dump(at(before[which], where), width=1000)
    else:
        assert after == expected
        assert at(before.get(which, {}), where) != expected


def test_schema_describes_every_value_and_no_other():
    schema = json.loads((CHART / "values.schema.json").read_text())

    def check(part: Object, values: Object, path: str) -> None:
        assert part.get("description") or not path, path
        if "properties" in part:
            assert part["additionalProperties"] is False, path
            only_described = {"global", "initialDelaySeconds", "claims"} if path != "metrics" else set()
            assert values.keys() <= part["properties"].keys(), path
            assert part["properties"].keys() - values.keys() <= only_described, path
            for key, inner in part["properties"].items():
                check(inner, values.get(key, {}), f"{path}.{key}".strip("."))

    check(schema, DEFAULTS | {"imagePullSecrets": []}, "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"worker": 2}, "additional properties 'worker' not allowed"),
        ({"image": {"tags": "2"}}, "at '/image': additional properties 'tags' not allowed"),
        ({"image": {"tag": 2}}, "at '/image/tag': got number, want string"),
        ({"image": {"repository": "a/b:2"}}, "at '/image/repository'"),
        ({"image": {"digest": "sha256:12"}}, "at '/image/digest'"),
        ({"imagePullSecrets": ["s"]}, "at '/imagePullSecrets/0': got string, want object"),
        ({"images": {"pullPolicy": "Sometimes"}}, "value must be one of '', 'Always', 'IfNotPresent', 'Never'"),
        ({"workers": 0}, "at '/workers': minimum: got 0, want 1"),
        ({"progress": {"mode": "magic"}}, "value must be one of 'auto', 'pod-ip', 'proxy'"),
        ({"progress": {"seconds": 0}}, "at '/progress/seconds': minimum"),
        ({"logging": {"format": "xml"}}, "value must be one of 'json', 'plain'"),
        ({"logging": {"level": "loud"}}, "value must be one of 'debug', 'info', 'warning', 'error'"),
        ({"port": 80}, "at '/port': minimum: got 80, want 1,024"),
        (
            {"probes": {"liveness": {"timeoutSeconds": 1}}},
            "at '/probes/liveness/timeoutSeconds': minimum: got 1, want 5",
        ),
        ({"watch": {"namespaces": "a"}}, "at '/watch/namespaces': got string, want array"),
        ({"watch": {"namespaces": ["A"]}}, "at '/watch/namespaces/0'"),
        ({"podLabels": {"a": True}}, "at '/podLabels/a': got boolean, want string"),
        ({"metrics": {"podMonitor": {"interval": "often"}}}, "at '/metrics/podMonitor/interval'"),
        ({"metrics": {"prometheusRule": {"minVolumeFreePercent": 101}}}, "maximum: got 101, want 100"),
        ({"networkPolicy": {"apiServerPorts": []}}, "at '/networkPolicy/apiServerPorts': minItems"),
        ({"hostNetwork": "yes"}, "at '/hostNetwork': got string, want boolean"),
    ],
    ids=str,
)
def test_wrong_value_is_refused_with_a_message(helm, values, message):
    assert message in refusal(helm, values)


def test_account_that_is_not_made_needs_a_name(helm):
    assert "serviceAccount.name is empty; name an account" in refusal(helm, {"serviceAccount": {"create": False}})


# ── the operator's pod ───────────────────────────────────────────────────────────────────────────────────────────────
def test_operator_knows_the_flags_that_the_chart_gives_it(render):
    shown = subprocess.run([sys.executable, "-m", "heterorl_operator", "--help"], capture_output=True, text=True)
    known = set(re.findall(r"^  (--[a-z-]+)", shown.stdout, re.MULTILINE))
    images = {"pullPolicy": "Always", "pullSecrets": ["s"]}
    values = {"images": images, "watch": {"namespaces": ["a"]}, "takeOver": True}
    given = {argument.split("=")[0] for argument in at(render(values)[OPERATOR], f"{MAIN}.args")}
    # Left to extraArgs: how often everything is looked at, and the address to serve at.
    assert given == known - {"--resync-seconds", "--host"}


def test_one_operator_at_a_time(render):
    spec = render()[OPERATOR]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_probes_ask_for_health_and_wait_long_enough(render):
    container = at(render()[OPERATOR], MAIN)
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "metrics"}
        assert container[probe]["timeoutSeconds"] >= 5  # with a second, a busy kopf operator is killed


@pytest.mark.parametrize("which", [OPERATOR, "Pod/heterorl-test"])
def test_pod_is_restricted_by_default(render, which):
    pod = render()[which]["spec"]
    pod = pod.get("template", {}).get("spec", pod)
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"]


def test_labels_of_a_run_that_is_named_as_the_release_select_no_operator(render):
    objects = render()
    selector = objects[OPERATOR]["spec"]["selector"]["matchLabels"]
    assert objects["Service/heterorl-metrics"]["spec"]["selector"] == selector
    for made in everything_a_run_makes():
        assert not selector.items() <= {**made["metadata"]["labels"], "app.kubernetes.io/instance": RELEASE}.items()
    assert not selector.items() <= objects["Pod/heterorl-test"]["metadata"]["labels"].items()


# ── rights ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def everything_a_run_makes() -> list[Object]:
    run, images = load_run(ROOT / "examples" / "quickstart.yaml"), Images("learner:1", "sampler:1")
    return [*desired_state(run, images=images), evaluation_job(run, Version(12, 1), images=images)]


def test_operator_has_just_the_rights_it_uses(render):
    assert rights(render()[ROLE]) == RIGHTS


def test_operator_may_make_the_kinds_that_a_run_needs_and_no_others(render):
    kinds = [BY_NAME[made["kind"]] for made in everything_a_run_makes()]
    granted = rights(render()[ROLE])
    assert {kind for kind, verbs in granted.items() if "create" in verbs} == {
        *((kind.group, kind.plural) for kind in kinds),
        ("", "events"),
    }
    applied = {(kind.group, kind.plural) for kind in kinds if kind.name != "Job"}  # those are never changed
    assert all({"get", "patch"} <= granted[kind] for kind in applied)


def test_proxy_is_granted_only_where_progress_comes_through_it(render):
    assert rights(render({"progress": {"mode": "proxy"}})[ROLE]) == RIGHTS | {("", "pods/proxy"): {"get"}}


def test_namespaced_install_has_a_plain_role_in_each_namespace_and_nothing_cluster_wide(render):
    values = {"watch": {"namespaces": ["a", "b"]}, "rbac": {"aggregate": False}, "crds": {"enabled": False}}
    objects = render(values)
    assert all("namespace" in found["metadata"] for found in objects.values())
    for namespace in ("a", "b"):
        assert rights(objects[f"Role/{namespace}/heterorl-{NAMESPACE}"]) == RIGHTS
        binding = objects[f"RoleBinding/{namespace}/heterorl-{NAMESPACE}"]
        assert binding["roleRef"]["name"] == f"heterorl-{NAMESPACE}"
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "heterorl", "namespace": NAMESPACE}]
    arguments = at(objects[OPERATOR], f"{MAIN}.args")
    assert [each for each in arguments if each.startswith("--namespace")] == ["--namespace=a", "--namespace=b"]


def test_test_of_a_release_may_create_runs_and_nothing_else(render):
    objects = render()
    assert rights(objects["Role/heterorl-test"]) == {("heterorl.dev", "heterorlruns"): {"create"}}
    assert objects["Pod/heterorl-test"]["spec"]["serviceAccountName"] == "heterorl-test"
    assert "Pod/heterorl-test" not in render({"rbac": {"create": False}})


# ── monitoring ───────────────────────────────────────────────────────────────────────────────────────────────────────
def served_metrics() -> set[str]:
    """Names of what the operator and a learner's pod serve."""
    pool = PoolProgress(1, 1, 1, "v00000001-i0001")
    numbers = dict.fromkeys(["step", "steps", "checkpoint_step", "reward", "lag", "stalled_s"], 1)
    averages = {"evaluation_best": 1.0, "evaluation_last": 1.0}
    attempts = {"crashed": 1}
    learner = to_text(RunProgress(**numbers, **averages, attempts=attempts, pools={"near": pool}), "run")
    runs = CollectorRegistry()
    runs.register(RunsCollector(ObjectCache(), lambda _: None))
    text = (generate_latest(REGISTRY) + generate_latest(runs) + learner).decode()
    types = re.findall(r"^# TYPE (heterorl_\w+) (\w+)$", text, re.MULTILINE)
    return {f"{name}_bucket" if kind == "histogram" else name for name, kind in types}


def test_alerts_and_dashboard_ask_for_metrics_that_are_served(render):
    objects = render(everything=True)
    dashboard = json.loads(objects["ConfigMap/heterorl-dashboard"]["data"]["heterorl.json"])
    rules = [rule for group in objects[RULES]["spec"]["groups"] for rule in group["rules"]]
    asked = [rule["expr"] for rule in rules]
    asked += [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked += [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]
    named = set(re.findall(r"\bheterorl_\w+", " ".join(asked)))
    assert len(named) > 15
    assert named <= served_metrics()


def test_every_alert_says_of_whom_it_speaks_and_what_to_do(render):
    groups = render(everything=True)[RULES]["spec"]["groups"]
    alerts = {rule["alert"]: rule for group in groups for rule in group["rules"]}
    assert set(alerts) == {
        "HeteroRLLagHigh",
        "HeteroRLLearnerStalled",
        "HeteroRLSamplersNotReady",
        "HeteroRLSamplerMute",
        "HeteroRLVolumeFilling",
        "HeteroRLOperatorNotSynced",
    }
    for name, alert in alerts.items():
        assert alert["labels"]["severity"] in ("warning", "critical"), name
        assert set(alert["annotations"]) == {"summary", "description"}, name
        assert "$labels.namespace" in alert["annotations"]["summary"] or name == "HeteroRLOperatorNotSynced"


def test_panels_of_the_dashboard_do_not_overlap(render):
    dashboard = json.loads(render(everything=True)["ConfigMap/heterorl-dashboard"]["data"]["heterorl.json"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_monitors_find_what_is_there_to_scrape(render):
    objects = render({"watch": {"namespaces": ["a"]}}, everything=True)
    service, monitor = objects["Service/heterorl-metrics"], objects["ServiceMonitor/heterorl"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    # A run's metrics carry its namespace, which must not give way to the operator's.
    assert monitor["endpoints"][0]["honorLabels"] is True

    pods = objects["PodMonitor/heterorl-runs"]["spec"]
    assert pods["namespaceSelector"] == {"matchNames": ["a"]}
    assert render(everything=True)["PodMonitor/heterorl-runs"]["spec"]["namespaceSelector"] == {"any": True}
    (label,) = (expression["key"] for expression in pods["selector"]["matchExpressions"])
    templates = [made["spec"]["template"] for made in everything_a_run_makes() if "template" in made.get("spec", {})]
    serving = [t for t in templates if t["metadata"]["labels"]["heterorl.dev/role"] != "prepare"]
    assert len(serving) == 4
    for template in serving:
        assert label in template["metadata"]["labels"]
        names = [port["name"] for port in template["spec"]["containers"][0]["ports"]]
        assert names == [pods["podMetricsEndpoints"][0]["port"]]


def test_network_policy_leads_to_the_learners_of_watched_namespaces(render):
    def to_learners(values: Object) -> list[Object]:
        egress = render(values, everything=True)["NetworkPolicy/heterorl"]["spec"]["egress"]
        return [peer for rule in egress for peer in rule.get("to", [])]

    learner = {"matchLabels": {"heterorl.dev/role": "learner"}}
    assert to_learners({}) == [{"podSelector": learner, "namespaceSelector": {}}]
    (peer,) = to_learners({"watch": {"namespaces": ["a"]}})
    named = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["a"]}
    assert peer["namespaceSelector"] == {"matchExpressions": [named]}
    assert to_learners({"progress": {"mode": "proxy"}}) == []


# ── on a real API server ─────────────────────────────────────────────────────────────────────────────────────────────
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


def make_namespace(cluster: Cluster, name: str, *labels: str) -> None:
    cluster.kubectl("create", "namespace", name)
    if labels:
        cluster.kubectl("label", "namespace", name, *labels)


@pytest.fixture(scope="module")
def release(cluster: Cluster, helm: Callable[..., str]) -> Iterator[str]:
    """What Helm printed when it installed the chart into a restricted namespace."""
    make_namespace(cluster, NAMESPACE, RESTRICTED)
    place = ("--namespace", NAMESPACE)
    yield helm("install", RELEASE, CHART, *place, kubeconfig=cluster.kubeconfig)
    helm("uninstall", RELEASE, *place, kubeconfig=cluster.kubeconfig)
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def served(cluster: Cluster) -> bool:
    return "heterorlruns" in cluster.kubectl("api-resources", "--api-group=heterorl.dev")


def may(cluster: Cluster, account: str, verb: str, resource: str, namespace: str, *more: str) -> bool:
    """Whether a service account, written NAMESPACE:NAME, may do that."""
    asked = ("auth", "can-i", verb, resource, "-n", namespace, f"--as=system:serviceaccount:{account}", *more)
    return cluster.kubectl(*asked, check=False).strip() == "yes"


def test_pod_security_admits_the_operators_pod(cluster, release):
    def pods() -> str:
        return cluster.kubectl(
            "get", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=operator", "-o", "name"
        )

    cluster.wait("the operator's pod", lambda: bool(pods()), 20)


def test_notes_hold_a_run_that_the_api_server_takes(cluster, release):
    assert f"helm test {RELEASE} --namespace {NAMESPACE}" in release
    (manifest,) = re.findall(r"<<END\n(.*?)\n  END", release, re.DOTALL)
    cluster.wait("the kind", lambda: served(cluster))
    applied = cluster.kubectl("apply", "--dry-run=server", "-f", "-", stdin=textwrap.dedent(manifest))
    assert applied.strip() == "heterorlrun.heterorl.dev/first created (server dry run)"


def test_operators_account_has_its_rights_everywhere_and_no_others(cluster, release):
    account = f"{NAMESPACE}:heterorl"
    for (group, resource), verbs in RIGHTS.items():
        kind, _, subresource = resource.partition("/")
        name = f"{kind}.{group}" if group else kind
        asked = ["--subresource", subresource] if subresource else []
        for verb in ("get", "list", "watch", "create", "update", "patch", "delete"):
            assert may(cluster, account, verb, name, "default", *asked) == (verb in verbs), (verb, resource)
    for resource in ("secrets", "namespaces", "roles.rbac.authorization.k8s.io"):
        assert not may(cluster, account, "get", resource, "default")
    for verb in ("get", "create"):  # both open a shell; to kubectl `pods/exec` would be a pod of that name
        assert not may(cluster, account, verb, "pods", "default", "--subresource=exec")


def test_view_and_edit_of_a_namespace_cover_runs(cluster, release, namespace):
    for role in ("view", "edit"):
        cluster.kubectl("create", "serviceaccount", role, "-n", namespace)
        cluster.kubectl(
            "create",
            "rolebinding",
            role,
            f"--clusterrole={role}",
            f"--serviceaccount={namespace}:{role}",
            "-n",
            namespace,
        )
    runs = "heterorlruns.heterorl.dev"
    # The controller manager aggregates a moment later.
    cluster.wait("the rights", lambda: may(cluster, f"{namespace}:edit", "create", runs, namespace), 20)
    cluster.wait("the rights", lambda: may(cluster, f"{namespace}:view", "get", runs, namespace), 20)
    assert may(cluster, f"{namespace}:edit", "list", runs, namespace)
    assert not may(cluster, f"{namespace}:view", "create", runs, namespace)
    assert not may(cluster, f"{namespace}:view", "get", runs, "default")


def test_second_release_works_in_its_namespaces_once_it_leaves_the_definition_alone(cluster, helm, release, namespace):
    arguments = ("install", RELEASE, CHART, "--namespace", namespace)
    values: Object = {"watch": {"namespaces": [namespace]}}
    with pytest.raises(subprocess.CalledProcessError) as refused:
        helm(*arguments, values=values, kubeconfig=cluster.kubeconfig)
    assert "heterorlruns.heterorl.dev" in refused.value.stderr
    assert "invalid ownership metadata" in refused.value.stderr
    helm("uninstall", RELEASE, "--namespace", namespace, "--ignore-not-found", kubeconfig=cluster.kubeconfig)

    helm(*arguments, values={**values, "crds": {"enabled": False}}, kubeconfig=cluster.kubeconfig)
    account = f"{namespace}:heterorl"
    assert may(cluster, account, "list", "heterorlruns.heterorl.dev", namespace)
    assert not may(cluster, account, "list", "heterorlruns.heterorl.dev", "default")
    helm("uninstall", RELEASE, "--namespace", namespace, kubeconfig=cluster.kubeconfig)
    assert "heterorlruns" in cluster.kubectl("get", "crd", "-o", "name")


@pytest.fixture
def bare(start: Callable[..., Cluster]) -> Cluster:
    """A cluster without the kind, for this test alone."""
    cluster = start("apiserver")
    if cluster.existing:
        pytest.skip("this test removes the kind HeteroRLRun, which somebody may need on an existing cluster")
    return cluster


def test_definition_is_upgraded_and_outlives_the_release_with_its_runs(bare, helm, tmp_path):
    cluster = bare
    make_namespace(cluster, NAMESPACE)

    def column_names() -> list[str]:
        crd = json.loads(cluster.kubectl("get", "crd", "heterorlruns.heterorl.dev", "-o", "json"))
        return [column["name"] for column in crd["spec"]["versions"][0]["additionalPrinterColumns"]]

    def run(command: str, *chart: Path, **values: Any) -> None:
        helm(command, RELEASE, *chart, "--namespace", NAMESPACE, values=values or None, kubeconfig=cluster.kubeconfig)

    older = tmp_path / "heterorl"
    shutil.copytree(CHART, older)
    definition = yaml.safe_load(CRD.read_text())
    expected = [column["name"] for column in definition["spec"]["versions"][0]["additionalPrinterColumns"]]
    definition["spec"]["versions"][0]["additionalPrinterColumns"] = [{"name": "Old", "type": "date", "jsonPath": ".x"}]
    (older / "files" / "heterorlrun.yaml").write_text(yaml.safe_dump(definition))

    run("install", older)
    assert column_names() == ["Old"]
    cluster.wait("the kind", lambda: served(cluster))
    cluster.kubectl("create", "-f", str(ROOT / "examples" / "quickstart.yaml"))
    run("upgrade", CHART, workers=2)
    assert column_names() == expected
    operator = json.loads(cluster.kubectl("get", "deployment", "heterorl", "-n", NAMESPACE, "-o", "json"))
    assert "--workers=2" in at(operator, f"{MAIN}.args")

    run("uninstall")
    assert (
        cluster.kubectl("get", "all,roles,serviceaccounts", "-n", NAMESPACE, "-l", "app.kubernetes.io/part-of=heterorl")
        == ""
    )
    assert "heterorl" not in cluster.kubectl("get", "clusterroles,clusterrolebindings", "-o", "name")
    assert "quickstart" in cluster.kubectl("get", "hrl")

    run("install", CHART, crds={"keep": False})  # it takes the definition it left
    assert "quickstart" in cluster.kubectl("get", "hrl")
    run("uninstall")
    cluster.wait("the end of the definition", lambda: cluster.kubectl("get", "crd", "-o", "name") == "", 30)


# ── helm test ────────────────────────────────────────────────────────────────────────────────────────────────────────
def run_helm_test(kubeconfig: Path, namespace: str) -> subprocess.CompletedProcess[str]:
    """What the test's pod runs, from here."""
    command = [sys.executable, "-m", "heterorl_operator.helm_test", f"--namespace={namespace}"]
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
    environment.pop("KUBERNETES_SERVICE_HOST", None)
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def tester(cluster: Cluster, release: str, render: Callable[..., dict[str, Object]]) -> Path:
    """A kubeconfig with the rights that the chart gives its test."""
    for kind in ("ServiceAccount", "Role", "RoleBinding"):
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(render()[f"{kind}/heterorl-test"]))
    cluster.wait("the kind", lambda: served(cluster))
    if cluster.existing:
        pytest.skip("the harness writes kubeconfigs for clusters of its own only")
    token = cluster.kubectl("create", "token", "heterorl-test", "-n", NAMESPACE).strip()
    return cluster.write_kubeconfig("tester", token)


def test_the_helm_test_passes_with_the_rights_of_the_chart_and_says_what_it_did(cluster, tester):
    done = run_helm_test(tester, NAMESPACE)
    assert done.returncode == 0, done.stderr
    assert f"namespace {NAMESPACE}: a tiny run was taken; as a dry run, so nothing is kept of it" in done.stdout
    assert "its defaults are those that this operator has" in done.stdout
    assert "samplers have 0 replicas in total" in done.stdout
    assert cluster.kubectl("get", "hrl", "-A") == ""


def test_the_helm_test_explains_missing_rights_and_a_missing_server(cluster, tester, tmp_path):
    done = run_helm_test(tester, "default")
    assert done.returncode == 2
    assert "this account may not create runs in namespace default; bind it a role: " in done.stderr
    config = json.loads(tester.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    (tmp_path / "config").write_text(json.dumps(config))
    done = run_helm_test(tmp_path / "config", NAMESPACE)
    assert done.returncode == 2
    assert "the API server does not answer; may this pod reach it?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_helm_test_finds_a_definition_that_is_missing_or_older(bare):
    cluster = bare
    done = run_helm_test(cluster.kubeconfig, "default")
    assert done.returncode == 2
    assert "the cluster has no HeteroRLRun; set crds.enabled=true" in done.stderr

    definition = yaml.safe_load(CRD.read_text())
    spec = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert spec["properties"]["timeScale"]["default"] == 1.0
    spec["properties"]["timeScale"]["default"] = 2.0
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(definition))
    cluster.wait("the kind", lambda: served(cluster))
    done = run_helm_test(cluster.kubeconfig, "default")
    assert done.returncode == 2
    assert (
        "the cluster's HeteroRLRun is of another version, it differs in timeScale; install that of this" in done.stderr
    )


def test_helm_test_runs_the_pod_with_its_rights_and_leaves_nothing(cluster, helm, release):
    """No kubelet is here: the test plays it, and says that the pod succeeded."""
    labels = ("-n", NAMESPACE, "-l", "app.kubernetes.io/component=test", "-o", "name")

    def made() -> set[str]:
        return set(cluster.kubectl("get", "pods,serviceaccounts,roles,rolebindings", *labels).split())

    rights_of_test = {
        "serviceaccount/heterorl-test",
        "role.rbac.authorization.k8s.io/heterorl-test",
        "rolebinding.rbac.authorization.k8s.io/heterorl-test",
    }
    with ThreadPoolExecutor(1) as pool:
        testing = pool.submit(helm, "test", RELEASE, "-n", NAMESPACE, "--timeout=60s", kubeconfig=cluster.kubeconfig)
        cluster.wait("the test's pod", lambda: testing.done() or "pod/heterorl-test" in made(), 30)
        assert made() == {"pod/heterorl-test", *rights_of_test}
        status = json.dumps({"status": {"phase": "Succeeded"}})
        cluster.kubectl("patch", "pod", "heterorl-test", "-n", NAMESPACE, "--subresource=status", f"--patch={status}")
        assert re.search(r"Phase:\s+Succeeded", testing.result())
    assert made() == set()
