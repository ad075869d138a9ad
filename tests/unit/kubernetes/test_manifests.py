"""Golden files: `python tests/unit/test_manifests.py` writes them anew; read the diff before you commit it."""

import json
import re
from pathlib import Path

import pytest
import yaml

import builders
from heterorl.cli import main
from heterorl.exchange.version import Version
from heterorl.kubernetes.manifests import Images, ReplicaCounts, desired_state, evaluation_job, spec_for_pods
from heterorl.kubernetes.names import HASH_ANNOTATION, rendered_hash, with_hash
from heterorl.kubernetes.render import to_yaml
from heterorl.spec.load import load_run
from heterorl.spec.run import HeteroRLRun

EXAMPLES = Path(__file__).parents[3] / "examples"
GOLDEN = Path(__file__).parent / "golden"
FAR_SITE = GOLDEN / "far-site.run.yaml"
FILES = [*sorted(EXAMPLES.rglob("*.yaml")), FAR_SITE]
IMAGES = Images("example.com/learner:1", "example.com/sampler:1")
LONG_RUN, LONG_GROUP = "r" * 40, "g" * 20
LABELS = {
    "app.kubernetes.io/name": "heterorl",
    "app.kubernetes.io/instance": "far-site",
    "app.kubernetes.io/part-of": "heterorl",
    "app.kubernetes.io/managed-by": "heterorl",
    "heterorl.dev/run": "far-site",
}


def everything(path, **options):
    """Every object that a run can have, evaluations included."""
    run, options = load_run(path), {"images": IMAGES, **options}
    return [*desired_state(run, **options), evaluation_job(run, Version(12, 1), **options)]


def run_of(**spec):
    return builders.run_of("demo", **{"samplers": [{"name": "near"}], **spec})


def objects_of(run, **options):
    """Objects by kind; of several of a kind the last."""
    return {found["kind"]: found for found in desired_state(run, images=IMAGES, **options)}


def pod_of(workload):
    return workload["spec"]["template"]["spec"]


def container_of(workload):
    (container,) = pod_of(workload)["containers"]
    return container


def env_of(workload):
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in container_of(workload)["env"]}


def workloads(objects):
    return [found for found in objects if "template" in found.get("spec", {})]


# ── golden files ─────────────────────────────────────────────────────────────────────────────────────────────────────
GOLDENS = {
    "quickstart": (EXAMPLES / "quickstart.yaml", {}),
    "qwen3-8b": (EXAMPLES / "paper/qwen3-8b.yaml", {"namespace": "training"}),
    "far-site": (FAR_SITE, {"namespace": "far", "owner_uid": "0f3c7a52-0000-4000-8000-000000000001"}),
}


def golden_text(name):
    """The objects as YAML. The spec in the ConfigMap is left out: it has a test of its own, and changes often."""
    path, options = GOLDENS[name]
    objects = everything(path, **options)
    objects[0]["data"] = {"run.json": "..."}
    return to_yaml(objects)


@pytest.mark.parametrize("name", GOLDENS)
def test_objects_are_those_of_the_golden_file(name):
    assert golden_text(name) == (GOLDEN / f"{name}.yaml").read_text(encoding="utf-8")


# ── what holds for every run ─────────────────────────────────────────────────────────────────────────────────────────
every_run = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.partition(".yaml")[0])


@every_run
def test_no_object_is_wanted_twice_and_the_same_run_gives_the_same_objects(path):
    objects = everything(path)
    identities = [(found["kind"], found["metadata"]["name"]) for found in objects]
    assert len(set(identities)) == len(identities)
    assert to_yaml(objects) == to_yaml(everything(path))


@every_run
def test_every_field_is_one_that_kubernetes_knows(path):
    for found in everything(path, namespace="default", owner_uid="1"):
        check_fields(found, f"V1{found['kind']}", found["kind"])


def check_fields(value, model, where):
    """Compare the fields of a value with those of the model of that name in Kubernetes' own client."""
    from kubernetes import client

    if inner := re.fullmatch(r"(?:List\[|Dict\[str, )(\w+)\]", model):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            check_fields(item, inner[1], f"{where}.{key}")
    elif known := getattr(client, model, None):
        types = {known.attribute_map[name]: kind for name, kind in known.openapi_types.items()}
        for key, item in value.items():
            assert key in types, f"{where}.{key} is no field of {model}"
            check_fields(item, types[key], f"{where}.{key}")
    elif model in ("str", "int", "bool"):
        assert type(value).__name__ == model, f"{where} is {value!r}, but the field is a {model}"
    else:
        assert model == "object", f"{where}: {model} is not known here"


@every_run
def test_every_pod_passes_pod_security_restricted_and_has_no_token(path):
    """The rules of kubernetes.io/docs/concepts/security/pod-security-standards, profile Restricted."""
    allowed = {
        "configMap",
        "emptyDir",
        "persistentVolumeClaim",
        "secret",
        "projected",
        "downwardAPI",
        "csi",
        "ephemeral",
    }
    for workload in workloads(everything(path)):
        pod, container = pod_of(workload), container_of(workload)
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all(set(volume) - {"name"} <= allowed for volume in pod["volumes"])
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert not any("hostPort" in port for port in container.get("ports", []))


@every_run
def test_every_mount_has_its_volume_and_what_must_be_writable_is(path):
    for workload in workloads(everything(path)):
        container = container_of(workload)
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod_of(workload)["volumes"]}
        assert {mount["name"] for mount in mounts.values()} <= volumes.keys()
        assert {"/volume", "/etc/heterorl", "/tmp", "/home/heterorl", "/dev/shm"} <= mounts.keys()
        assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
        assert env_of(workload)["HOME"] in mounts
        # A single file or a folder of the ConfigMap would be mounted once and never change.
        assert not any("subPath" in mount for mount in mounts.values())


@every_run
def test_selectors_find_the_pods_of_their_own_role_and_no_others(path):
    objects = everything(path)
    pods = [workload["spec"]["template"]["metadata"]["labels"] for workload in workloads(objects)]
    for found in objects:
        wanted = found.get("spec", {}).get("selector")
        if wanted and (match := wanted.get("matchLabels", wanted)):
            held = [labels for labels in pods if match.items() <= labels.items()]
            assert len(held) == 1
            assert held[0]["heterorl.dev/role"] == found["metadata"]["labels"]["heterorl.dev/role"]


def test_the_longest_names_keep_within_the_limits_of_kubernetes():
    run = HeteroRLRun.model_validate(
        {**run_of(samplers=[{"name": LONG_GROUP}]).resolved(), "metadata": {"name": LONG_RUN}}
    )
    objects = [*desired_state(run, images=IMAGES), evaluation_job(run, Version(10_000_000, 1), images=IMAGES)]
    # A StatefulSet's pods carry NAME-HASH (11 more) as a label, a Job's its name; a label's value has at most 63.
    limits = {"StatefulSet": 52, "Job": 63, "Service": 63, "Deployment": 253, "ConfigMap": 253}
    for found in objects:
        assert len(found["metadata"]["name"]) <= limits.get(found["kind"], 253)
        assert all(len(value) <= 63 for value in found["metadata"]["labels"].values())
    names = {found["metadata"]["name"] for found in objects}
    assert {f"{LONG_RUN}-learner", f"{LONG_RUN}-sampler-{LONG_GROUP}", f"{LONG_RUN}-eval-10000000"} <= names
    assert any(re.fullmatch(LONG_RUN + "-prepare-[0-9a-f]{8}", name) for name in names)


# ── the spec in the ConfigMap ────────────────────────────────────────────────────────────────────────────────────────
@every_run
def test_pods_read_the_run_back_from_the_config_map(path):
    run, (config_map, *_) = load_run(path), desired_state(load_run(path), images=IMAGES)
    read = HeteroRLRun.model_validate_json(config_map["data"]["run.json"])
    assert read.spec.algorithm == run.spec.algorithm
    assert read.spec.learner == run.spec.learner
    assert read.spec.monitoring.prometheus_port > 0


def test_paths_in_the_config_map_are_on_the_volume_unless_they_are_absolute():
    spec = spec_for_pods(load_run(FAR_SITE))["spec"]
    assert spec["model"]["path"] == "/volume/models/qwen3-1.7b"
    assert spec["data"]["train"]["path"] == "/data/train.jsonl"


def test_labels_and_annotations_of_the_run_do_not_reach_the_config_map():
    assert spec_for_pods(load_run(FAR_SITE))["metadata"] == {"name": "far-site"}
    assert spec_for_pods(load_run(FAR_SITE), "0f3c")["metadata"] == {"name": "far-site", "uid": "0f3c"}


def test_pods_know_the_uid_that_the_operator_gives_and_read_it_back():
    config = objects_of(run_of(), owner_uid="0f3c")["ConfigMap"]
    assert HeteroRLRun.model_validate_json(config["data"]["run.json"]).metadata.uid == "0f3c"
    assert HeteroRLRun.model_validate_json(objects_of(run_of())["ConfigMap"]["data"]["run.json"]).metadata.uid is None


@pytest.mark.parametrize("replicas", [1, 3])
def test_every_pod_of_a_learner_says_itself_whether_it_is_ready_and_knows_its_uid(replicas):
    learner = objects_of(run_of(learner={"replicas": replicas}))["StatefulSet"]
    probe = {"httpGet": {"path": "/ready", "port": "metrics"}, "periodSeconds": 10}
    assert container_of(learner)["readinessProbe"] == probe
    assert env_of(learner)["POD_UID"] == {"fieldRef": {"fieldPath": "metadata.uid"}}


def test_the_last_lines_of_a_log_say_why_a_container_failed(far_site):
    for found in workloads(far_site):
        assert container_of(found)["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_a_live_edit_changes_the_config_map_and_no_pod():
    before, after = (
        run_of(),
        run_of(learner={"steps": 2000}, evaluation={"everySteps": 0}, failurePolicy={"minSamplers": 0}),
    )
    old, new = objects_of(before), objects_of(after)
    assert old["ConfigMap"] != new["ConfigMap"]
    assert {**old, "ConfigMap": None} == {**new, "ConfigMap": None}


# ── volume ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_claim_that_exists_is_used_and_none_is_made():
    objects = objects_of(run_of(exchange={"volume": {"claimName": "shared"}}))
    assert "PersistentVolumeClaim" not in objects
    claims = [
        volume["persistentVolumeClaim"] for volume in pod_of(objects["Job"])["volumes"] if volume["name"] == "exchange"
    ]
    assert claims == [{"claimName": "shared"}]


@pytest.mark.parametrize(("retention", "owned"), [("Retain", False), ("Delete", True)])
def test_a_claim_is_owned_by_the_run_only_if_it_is_to_go_with_it(retention, owned):
    objects = objects_of(run_of(exchange={"retention": {"volume": retention}}), owner_uid="7")
    assert ("ownerReferences" in objects["PersistentVolumeClaim"]["metadata"]) == owned
    owner = {"apiVersion": "heterorl.dev/v1alpha1", "kind": "HeteroRLRun", "name": "demo", "uid": "7"}
    for kind in ("ConfigMap", "Service", "Job", "StatefulSet", "Deployment"):
        assert objects[kind]["metadata"]["ownerReferences"] == [
            {**owner, "controller": True, "blockOwnerDeletion": True}
        ]


@pytest.mark.parametrize(("modes", "together"), [(["ReadWriteMany"], False), (["ReadWriteOnce"], True)])
def test_pods_keep_to_one_node_where_only_one_can_mount_the_volume(modes, together):
    for workload in workloads(desired_state(run_of(exchange={"volume": {"accessModes": modes}}), images=IMAGES)):
        assert ("affinity" in pod_of(workload)) == together


# ── suspension and availability ──────────────────────────────────────────────────────────────────────────────────────
def test_a_suspended_run_keeps_its_volume_and_has_no_pods():
    objects = objects_of(run_of(suspend=True))
    assert objects.keys() == {"ConfigMap", "PersistentVolumeClaim", "Service", "StatefulSet", "Deployment"}
    assert objects["StatefulSet"]["spec"]["replicas"] == objects["Deployment"]["spec"]["replicas"] == 0


def test_replicas_are_those_given_and_change_nothing_else():
    run = run_of(samplers=[{"name": "near", "replicas": 5}])
    full, fewer = objects_of(run), objects_of(run, replicas=ReplicaCounts(0, {"near": 2}))
    assert (full["StatefulSet"]["spec"].pop("replicas"), full["Deployment"]["spec"].pop("replicas")) == (1, 5)
    assert (fewer["StatefulSet"]["spec"].pop("replicas"), fewer["Deployment"]["spec"].pop("replicas")) == (0, 2)
    assert full == fewer


# ── roles ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_preparation_is_another_job_for_another_model_data_or_seed_only():
    def name(**spec):
        return objects_of(run_of(**spec))["Job"]["metadata"]["name"]

    assert name() == name(learner={"steps": 7}, exchange={"pollSeconds": 2.0})
    others = [name(model={"dtype": "float32"}), name(data={"promptTemplate": "think"}), name(seed=1)]
    assert len({name(), *others}) == 4


def test_preparation_fails_at_once_on_the_users_error_and_forgives_preemption():
    rules = objects_of(run_of())["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["action"] == "FailJob"
    assert rules[0]["onExitCodes"]["values"] == [2]
    assert rules[1] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def test_secrets_go_by_reference_to_the_one_role_that_needs_them():
    named = {"hubToken": {"name": "hub", "key": "token"}, "wandbApiKey": {"name": "wandb", "key": "api-key"}}
    objects = objects_of(run_of(credentials=named))
    assert env_of(objects["Job"])["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert env_of(objects["StatefulSet"])["WANDB_API_KEY"] == {"secretKeyRef": {"name": "wandb", "key": "api-key"}}
    assert "WANDB_API_KEY" not in env_of(objects["Job"])
    assert not {"HF_TOKEN", "WANDB_API_KEY"} & env_of(objects["Deployment"]).keys()


def test_ranks_of_all_pods_meet_at_the_first_pod_of_the_service():
    objects = objects_of(run_of(learner={"replicas": 3}))
    env = env_of(objects["StatefulSet"])
    assert env["MASTER_ADDR"] == "demo-learner-0.demo-learner"
    assert objects["StatefulSet"]["metadata"]["name"] == "demo-learner"
    assert objects["StatefulSet"]["spec"]["serviceName"] == objects["Service"]["metadata"]["name"] == "demo-learner"
    assert env["NODE_RANK"] == {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}}
    assert objects["Service"]["spec"]["publishNotReadyAddresses"] is True


def test_gpus_are_limits_and_pods_without_any_are_shown_none():
    objects = objects_of(run_of(learner={"gpus": 2, "processesPerReplica": 2}))
    assert container_of(objects["StatefulSet"])["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert "CUDA_VISIBLE_DEVICES" not in env_of(objects["StatefulSet"])
    assert "limits" not in container_of(objects["Deployment"])["resources"]
    assert env_of(objects["Deployment"])["CUDA_VISIBLE_DEVICES"] == ""
    assert env_of(objects["Job"])["CUDA_VISIBLE_DEVICES"] == ""


def test_every_pod_requests_cpu_and_memory_so_that_none_is_best_effort():
    objects = [*desired_state(run_of(), images=IMAGES), evaluation_job(run_of(), Version(1, 1), images=IMAGES)]
    for workload in workloads(objects):
        assert set(container_of(workload)["resources"]["requests"]) == {"cpu", "memory"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"requests": {"cpu": "8"}}, {"requests": {"memory": "1Gi", "cpu": "8"}}),
        # The default could exceed the limit, which the API server refuses.
        ({"limits": {"cpu": "50m"}}, {"requests": {"memory": "1Gi"}, "limits": {"cpu": "50m"}}),
        (
            {"requests": {"cpu": "1"}, "limits": {"memory": "2Gi"}},
            {"requests": {"cpu": "1"}, "limits": {"memory": "2Gi"}},
        ),
    ],
)
def test_what_the_manifest_says_of_a_resource_replaces_its_default_request(given, expected):
    run = run_of(learner={"podTemplate": {"resources": given}})
    assert container_of(objects_of(run)["StatefulSet"])["resources"] == expected


def test_a_resumed_run_has_other_pods_and_another_preparation():
    before, after = objects_of(run_of()), objects_of(run_of(failurePolicy={"resumes": 2}))
    for kind in ("StatefulSet", "Deployment"):
        assert "annotations" not in before[kind]["spec"]["template"]["metadata"]
        assert after[kind]["spec"]["template"]["metadata"]["annotations"] == {"heterorl.dev/resumes": "2"}
    assert before["Job"]["metadata"]["name"] != after["Job"]["metadata"]["name"]


def test_evaluation_names_the_version_and_its_log_goes_after_an_hour():
    job = evaluation_job(run_of(), Version(128, 2), images=IMAGES)
    assert job["metadata"]["name"] == "demo-eval-128"
    assert container_of(job)["command"][-2:] == ["--version", "v00000128-i0002"]
    assert container_of(job)["image"] == "example.com/sampler:1"
    assert job["spec"]["ttlSecondsAfterFinished"] == 3600


# ── podTemplate ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def far_site():
    return everything(FAR_SITE)


def named(objects, name):
    return next(found for found in objects if found["metadata"]["name"] == name and "template" in found["spec"])


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_page_is_a_sidecar_of_the_learner_alone_that_only_reads_and_listens_to_the_pod_itself():
    objects = desired_state(run_of(monitoring={"page": True}), images=IMAGES)
    with_page = {
        found["metadata"]["name"]: pod_of(found) for found in workloads(objects) if "initContainers" in pod_of(found)
    }
    (pod,) = with_page.values()
    assert list(with_page) == ["demo-learner"]
    (page,) = pod["initContainers"]
    assert page["restartPolicy"] == "Always"  # it runs beside the learner and neither delays nor outlives it
    mounts = {mount["mountPath"]: mount for mount in page["volumeMounts"]}
    assert mounts["/volume"] == {"name": "exchange", "mountPath": "/volume", "readOnly": True}
    assert "--host" not in page["command"]  # the default is 127.0.0.1, where a port-forward ends
    assert page["securityContext"] == container_of(objects_of(run_of())["StatefulSet"])["securityContext"]
    assert "nvidia.com/gpu" not in json.dumps(page)
    assert "initContainers" not in pod_of(objects_of(run_of())["StatefulSet"])


def test_the_page_follows_the_learners_image_environment_and_mounts():
    given = {
        "image": "example.com/mine:2", "env": [{"name": "PYTHONPATH", "value": "/packages"}],
        "volumes": [{"name": "packages", "emptyDir": {}}], "volumeMounts": [{"name": "packages", "mountPath": "/packages"}],
        "resources": {"limits": {"nvidia.com/gpu": "1"}},
    }  # fmt: skip
    run = run_of(monitoring={"page": True}, learner={"podTemplate": given})
    (page,) = pod_of(objects_of(run)["StatefulSet"])["initContainers"]
    assert page["image"] == "example.com/mine:2"
    assert given["env"][0] in page["env"]
    assert ("packages", "/packages") in [(mount["name"], mount["mountPath"]) for mount in page["volumeMounts"]]
    assert page["resources"]["limits"].keys() == {"cpu", "memory"}


def test_lists_of_the_pod_template_are_merged_by_key(far_site):
    learner = named(far_site, "far-site-learner")
    env = env_of(learner)
    assert (env["HOME"], env["NCCL_DEBUG"], env["USER"]) == ("/scratch", "INFO", "heterorl")
    assert [item["name"] for item in container_of(learner)["env"]].count("HOME") == 1
    volumes = {volume["name"]: volume for volume in pod_of(learner)["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert volumes["scratch"]["persistentVolumeClaim"]["claimName"] == "scratch"
    assert {"exchange", "spec", "tmp", "home"} <= volumes.keys()


def test_mappings_of_the_pod_template_are_merged_by_key_and_its_value_stands(far_site):
    assert container_of(named(far_site, "far-site-learner"))["resources"] == {
        "requests": {"cpu": "16", "memory": "200Gi"},
        "limits": {"nvidia.com/gpu": "8", "memory": "400Gi"},
    }


def test_affinity_of_the_pod_template_is_added_to_that_of_the_volume(far_site):
    terms = pod_of(named(far_site, "far-site-learner"))["affinity"]["podAffinity"]
    keys = [term["topologyKey"] for term in terms["requiredDuringSchedulingIgnoredDuringExecution"]]
    assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]


def test_kueues_labels_go_on_the_workload_and_not_on_its_pods(far_site):
    learner = named(far_site, "far-site-learner")
    assert learner["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    pod = learner["spec"]["template"]["metadata"]
    assert pod["labels"]["team"] == "reasoning"
    assert "kueue.x-k8s.io/queue-name" not in pod["labels"]
    assert pod["annotations"] == {"scheduling.k8s.io/group-name": "far-site"}


def test_the_preparation_takes_the_learners_pod_template_without_its_devices(far_site):
    prepare = next(found for found in far_site if found["metadata"]["labels"]["heterorl.dev/role"] == "prepare")
    assert container_of(prepare)["resources"] == {
        "requests": {"cpu": "16", "memory": "200Gi"},
        "limits": {"memory": "400Gi"},
    }
    assert pod_of(prepare)["nodeSelector"] == {"accelerator": "h200"}


def test_labels_and_annotations_of_the_manifest_are_added_to_ours():
    template = {"labels": {"team": "x"}, "annotations": {"note": "y"}}
    deployment = objects_of(run_of(samplers=[{"name": "near", "podTemplate": template}]))["Deployment"]
    for metadata in (deployment["metadata"], deployment["spec"]["template"]["metadata"]):
        assert (metadata["labels"]["heterorl.dev/run"], metadata["labels"]["team"]) == ("demo", "x")
        assert metadata["annotations"] == {"note": "y"}


def test_every_object_has_the_same_labels_but_for_role_and_pool(far_site):
    for found in far_site:
        own = found["metadata"]["labels"]
        assert LABELS.items() <= own.items()
        assert own["app.kubernetes.io/component"] == own["heterorl.dev/role"]
    assert named(far_site, "far-site-sampler-spot")["metadata"]["labels"]["heterorl.dev/pool"] == "spot"


# ── hash ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_hash_does_not_count_itself_and_sees_every_other_change():
    service = objects_of(run_of())["Service"]
    marked = with_hash(service)
    assert marked["metadata"]["annotations"] == {HASH_ANNOTATION: rendered_hash(service)}
    assert rendered_hash(marked) == rendered_hash(service)
    changed = json.loads(json.dumps(service))
    changed["spec"]["ports"][0]["port"] = 1
    assert rendered_hash(changed) != rendered_hash(service)
    assert HASH_ANNOTATION not in service["metadata"].get("annotations", {})


# ── heterorl render ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_render_prints_documents_and_warns_of_what_needs_the_operator(capsys):
    main(["render", str(FAR_SITE), "--namespace", "far", "--images", "example.com/rl", "--image-tag", "7"])
    out, err = capsys.readouterr()
    documents = list(yaml.safe_load_all(out))
    assert [found["kind"] for found in documents] == [
        "ConfigMap",
        "PersistentVolumeClaim",
        "Service",
        "Job",
        "StatefulSet",
        "Deployment",
        "Deployment",
    ]
    assert {found["metadata"]["namespace"] for found in documents} == {"far"}
    assert container_of(documents[-1])["image"] == "example.com/rl/sampler:7"
    assert documents[-1]["spec"]["replicas"] == 3
    assert [line.removeprefix("heterorl: warning: ") for line in err.splitlines()] == [
        "spec.samplers.spot.availability needs the operator; all 3 replicas will run",
        "spec.activeDeadlineSeconds needs the operator; delete the objects yourself",
        "spec.model.path is read on the volume, at /volume/models/qwen3-1.7b; put it there before you apply",
        "spec.data.train.path is read in the pods, at /data/train.jsonl; put it there before you apply",
    ]


def test_render_writes_out_a_trace_that_lies_beside_the_manifest(tmp_path, capsys):
    (tmp_path / "lags.csv").write_text("lag\n3\n5\n")
    delay = {"distribution": "trace", "trace": {"path": "lags.csv", "column": "lag"}}
    manifest = run_of(samplers=[{"name": "near", "delay": delay}]).model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(manifest))
    main(["render", str(tmp_path / "run.yaml")])
    config_map = next(iter(yaml.safe_load_all(capsys.readouterr().out)))
    trace = json.loads(config_map["data"]["run.json"])["spec"]["samplers"][0]["delay"]["trace"]
    assert (trace["path"], trace["values"]) == (None, [3.0, 5.0])


if __name__ == "__main__":
    for golden in GOLDENS:
        (GOLDEN / f"{golden}.yaml").write_text(golden_text(golden), encoding="utf-8")
