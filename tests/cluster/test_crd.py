"""The CRD on a real API server: what it accepts, refuses and fills in, and what may change when."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import ApiClient, ApiException, CustomObjectsApi

from heterorl.spec.crd import crd as crd_as_dict
from heterorl.spec.load import load_run
from heterorl.spec.run import HeteroRLRun

pytestmark = pytest.mark.usefixtures("crd")

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "unit" / "kubernetes" / "golden"
# The last has every field of a podTemplate.
EXAMPLES = [*sorted((ROOT / "examples").rglob("*.yaml")), GOLDEN / "far-site.run.yaml"]
BROKEN_MANIFESTS = yaml.safe_load((ROOT / "tests" / "broken_manifests.yaml").read_text())
RUNS = {"group": "heterorl.dev", "version": "v1alpha1", "plural": "heterorlruns"}
Run = dict[str, Any]


def manifest(name: str = "test", **spec: Any) -> Run:
    spec = {"samplers": [{"name": "near"}]} | spec
    return {"apiVersion": "heterorl.dev/v1alpha1", "kind": "HeteroRLRun", "metadata": {"name": name}, "spec": spec}


class Runs:
    """The runs of one namespace; a refusal is an ApiException."""

    def __init__(self, api: ApiClient, namespace: str) -> None:
        self._api, self._place = CustomObjectsApi(api), {**RUNS, "namespace": namespace}

    def create(self, run: Run, **options: Any) -> Run:
        return self._api.create_namespaced_custom_object(**self._place, body=run, field_validation="Strict", **options)

    def try_create(self, run: Run) -> Run:
        return self.create(run, dry_run="All")

    def patch(self, name: str, patch: Run | list[Run], **options: Any) -> Run:
        return self._api.patch_namespaced_custom_object(**self._place, name=name, body=patch, **options)

    def try_patch(self, name: str, spec: Run) -> Run:
        return self.patch(name, {"spec": spec}, dry_run="All")

    def patch_status(self, name: str, status: Run, **others: Any) -> Run:
        patch = {"status": status, **others}
        return self._api.patch_namespaced_custom_object_status(**self._place, name=name, body=patch)

    def refusal(self, call: Callable[..., Run], *arguments: Any) -> str:
        """The message with which the API server refuses the call."""
        with pytest.raises(ApiException) as refused:
            call(*arguments)
        assert refused.value.status in (400, 422), refused.value.body
        return json.loads(refused.value.body)["message"]


@pytest.fixture
def runs(api: ApiClient, namespace: str) -> Runs:
    return Runs(api, namespace)


# ── the definition ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_definition_is_structural_and_served(cluster):
    crd = json.loads(cluster.kubectl("get", "crd", "heterorlruns.heterorl.dev", "-o", "json"))
    conditions = {condition["type"]: condition["status"] for condition in crd["status"]["conditions"]}
    assert conditions == {"NamesAccepted": "True", "Established": "True"}


def test_definition_can_be_applied_from_a_client_too(cluster):
    # That way keeps a copy in an annotation, whose size is limited.
    path = ROOT / "crds" / "heterorlrun.yaml"
    copy = yaml.safe_load(path.read_text())
    assert len(json.dumps(copy)) < 262_144
    assert "configured" in cluster.kubectl("apply", "--dry-run=server", "-f", str(path))


def test_fields_are_explained(cluster):
    def explained():
        text = cluster.kubectl("explain", "hrl.spec.algorithm.staleness.maxSteps", check=False)
        return "Maximum lag" in " ".join(text.split())

    # The API server publishes a new kind's OpenAPI a moment after it serves the kind.
    cluster.wait("the explanation of maxSteps", explained)


# ── accepted ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_accepted_and_gets_the_same_defaults_as_on_the_command_line(cluster, namespace, path):
    applied = cluster.kubectl("apply", "--dry-run=server", "-n", namespace, "-o", "json", "-f", str(path))
    assert json.loads(applied)["spec"] == without_nulls(load_run(path).resolved()["spec"])


def test_all_that_a_pod_template_can_say_is_taken_by_kubernetes(cluster, namespace):
    rendered = (GOLDEN / "far-site.yaml").read_text().replace("namespace: far\n", f"namespace: {namespace}\n")
    options = ("--dry-run=server", "--server-side", "--validate=strict", "-f", "-")
    assert len(cluster.kubectl("apply", *options, stdin=rendered).splitlines()) == rendered.count("\nkind: ")


def test_smallest_manifest_gets_the_same_defaults_as_on_the_command_line(runs):
    run = HeteroRLRun.model_validate(manifest())
    assert runs.try_create(manifest())["spec"] == without_nulls(run.resolved()["spec"])


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("broken", BROKEN_MANIFESTS, ids=lambda broken: broken["at"])
def test_each_rule_across_fields_refuses_with_its_message(runs, broken):
    assert broken["refusal"] in runs.refusal(runs.try_create, manifest(**broken["spec"]))
    runs.try_create(manifest(**broken["mended"]))


@pytest.mark.parametrize(
    ("spec", "refusal"),
    [
        ({"lerner": {}}, 'unknown field "spec.lerner"'),
        ({"learner": {"step": 5}}, 'unknown field "spec.learner.step"'),
        ({"samplers": []}, "spec.samplers"),
        ({"learner": {"steps": "5"}}, "must be of type integer"),
        ({"learner": {"steps": 0}}, "should be greater than or equal to 1"),
        ({"generation": {"temperature": 0}}, "spec.generation.temperature"),
        ({"algorithm": {"loss": {"type": "ppo"}}}, 'Unsupported value: "ppo": supported values: "grpo"'),
        ({"samplers": [{"name": "Far"}]}, "spec.samplers[0].name"),
        ({"samplers": [{"name": "f" * 21}]}, "Too long: may not be more than 20"),
        ({"samplers": [{"name": f"g{i}"} for i in range(33)]}, "must have at most 32 items"),
        ({"samplers": [{"replicas": 1}]}, "spec.samplers[0].name: Required value"),
        ({"exchange": {"volume": {"size": "big"}}}, "spec.exchange.volume.size"),
    ],
    ids=str,
)
def test_misspelt_mistyped_and_unbounded_values_are_refused(runs, spec, refusal):
    assert refusal in runs.refusal(runs.try_create, manifest(**spec))


NAMES = [
    ("a" * 41, "metadata.name must be at most 40 characters"),
    ("7-run", "metadata.name must start with a letter and contain no dot"),
    ("run.7", "metadata.name must start with a letter and contain no dot"),
]


@pytest.mark.parametrize(("name", "refusal"), NAMES)
def test_names_that_children_could_not_carry_are_refused(runs, name, refusal):
    assert refusal in runs.refusal(runs.try_create, manifest(name))


@pytest.mark.parametrize("name", ["a" * 40, "run-7", "r"])
def test_other_names_are_accepted(runs, name):
    runs.try_create(manifest(name))


# ── changes ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def lasting(cluster, crd, api) -> Iterator[Runs]:
    """Two runs that differ in `suspend` only, and one with a claim of its own; nothing is changed but in dry runs."""
    namespace = f"lasting-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", namespace)
    runs = Runs(api, namespace)
    spec = {"algorithm": {"groupSize": 4}, "samplers": [{"name": "near"}, {"name": "far", "replicas": 2}]}
    runs.create(manifest("running", **spec))
    runs.create(manifest("suspended", **spec, suspend=True))
    runs.create(manifest("claiming", **spec, suspend=True, exchange={"volume": {"claimName": "mine"}}))
    yield runs
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")


def near(**fields: Any) -> Run:
    return {"samplers": [{"name": "near", **fields}, {"name": "far", "replicas": 2}]}


def volume(**fields: Any) -> Run:
    return {"exchange": {"volume": fields}}


NEVER = [
    ({"model": {"dtype": "float32"}}, "model cannot change; start a new run"),
    ({"data": {"shuffleSeed": 1}}, "data cannot change; start a new run"),
    ({"seed": 1}, "seed cannot change; start a new run"),
    ({"algorithm": {"groupSize": 8}}, "groupSize cannot change; start a new run"),
    ({"algorithm": None}, "groupSize cannot change; start a new run"),  # back to the default, which is 8
    ({"learner": {"strategy": "zero1"}}, "strategy cannot change"),
    ({"learner": {"steps": 999}}, "steps can only be increased"),
    (near(engine="transformers"), "a pool's engine cannot change; add a pool of another name"),
    (volume(claimName="other"), "claimName cannot change; start a new run"),
    (volume(storageClassName="fast"), "storageClassName cannot change; start a new run"),
    (volume(accessModes=["ReadWriteOnce"]), "accessModes cannot change; start a new run"),
]


@pytest.mark.parametrize(("patch", "refusal"), NEVER, ids=str)
def test_what_identifies_a_run_never_changes(lasting, patch, refusal):
    for name in ("running", "suspended"):
        assert refusal in lasting.refusal(lasting.try_patch, name, patch)


@pytest.mark.parametrize("patch", [volume(claimName=None), volume(claimName="other"), {"exchange": None}], ids=str)
def test_a_claim_can_be_neither_dropped_nor_exchanged(lasting, patch):
    assert "claimName cannot change" in lasting.refusal(lasting.try_patch, "claiming", patch)


def test_dropping_a_block_first_does_not_open_the_way_to_a_claim(runs):
    runs.create(manifest(suspend=True))
    for dropped in ({"exchange": {"volume": None}}, {"exchange": None}):
        runs.patch("test", {"spec": dropped})
        assert "claimName cannot change" in runs.refusal(runs.try_patch, "test", volume(claimName="other"))


OF_A_POOL = (
    "samplers[].(promptsPerBatch, swap, gpus, tensorParallel, gpuMemoryUtilization, kvCacheBytes, threads, lora,"
    " podTemplate)"
)
WHEN_SUSPENDED = [
    ({"mode": "online"}, "mode"),
    ({"rewards": [{"name": "format"}]}, "rewards"),
    ({"algorithm": {"loss": {"type": "gspo"}}}, "algorithm"),
    ({"generation": {"temperature": 0.7}}, "generation"),
    ({"timeScale": 0.5}, "timeScale"),
    ({"monitoring": {"tensorboard": False}}, "monitoring"),
    ({"credentials": {"hubToken": {"name": "hub", "key": "token"}}}, "credentials"),
    ({"learner": {"batch": {"groups": 16}}}, "learner"),
    ({"learner": {"podTemplate": {"nodeSelector": {"gpu": "h200"}}}}, "learner"),
    ({"exchange": {"maxPendingGroups": 128}}, "exchange"),
    ({"exchange": {"deltas": False}}, "exchange"),
    (near(promptsPerBatch=4), OF_A_POOL),
    (near(gpus=1), OF_A_POOL),
    (near(tensorParallel=2), OF_A_POOL),
    (near(gpuMemoryUtilization=0.5), OF_A_POOL),
    (near(kvCacheBytes=2**30), OF_A_POOL),
    (near(swap="drain"), OF_A_POOL),
    (near(threads=2), OF_A_POOL),
    (near(podTemplate={"nodeSelector": {"gpu": "h200"}}), OF_A_POOL),
]


@pytest.mark.parametrize(("patch", "what"), WHEN_SUSPENDED, ids=str)
def test_how_it_trains_changes_in_a_suspended_run_only(lasting, patch, what):
    expected = f"{what} can change only while the run is suspended; set suspend: true first"
    assert expected in lasting.refusal(lasting.try_patch, "running", patch)
    assert expected in lasting.refusal(lasting.try_patch, "running", {**patch, "suspend": True})
    lasting.try_patch("suspended", patch)
    lasting.try_patch("suspended", {**patch, "suspend": False})


@pytest.mark.parametrize(
    "patch",
    [
        {"suspend": True},
        {"resume": True},
        {"learner": {"steps": 2000}},
        near(replicas=3),
        near(availability={"type": "churn"}),
        near(delay={"distribution": "lognormal"}),
        near(fetchBytesPerSecond=10**6),
        {"samplers": [{"name": "near"}]},
        {"samplers": [{"name": "far", "replicas": 2}, {"name": "new", "engine": "transformers"}]},
        volume(size="200Gi"),
        volume(size="10Gi"),
        {"exchange": {"retention": {"weights": 5, "volume": "Delete"}}},
        {"evaluation": {"samplesPerPrompt": 4}},
        {"failurePolicy": {"learnerRestarts": 5}},
        {"ttlSecondsAfterFinished": 60},
        {"activeDeadlineSeconds": 60},
    ],
    ids=str,
)
def test_the_rest_changes_at_any_time(lasting, patch):
    for name in ("running", "suspended"):
        lasting.try_patch(name, patch)


ENDED = "the run has ended, so only ttlSecondsAfterFinished can change; to resume a failed run"


def test_a_run_that_ended_refuses_edits_instead_of_ignoring_them(runs):
    runs.create(manifest())
    runs.patch_status("test", {"state": "Running"})
    runs.try_patch("test", {"learner": {"steps": 2000}})
    runs.patch_status("test", {"state": "Succeeded", "completionTime": "2026-01-01T00:00:00Z"})
    for patch in ({"learner": {"steps": 2000}}, {"suspend": True}, {"activeDeadlineSeconds": 60}, near(replicas=2)):
        assert ENDED in runs.refusal(runs.try_patch, "test", patch)
    runs.try_patch("test", {"ttlSecondsAfterFinished": 60})
    runs.patch("test", {"metadata": {"labels": {"kept": "yes"}}}, dry_run="All")
    runs.patch_status("test", {"samplersReady": "0/1"})


def test_a_run_that_failed_is_resumed_by_an_edit_that_may_change_the_rest_and_one_that_succeeded_is_not(runs):
    runs.create(manifest())
    resumed = {"failurePolicy": {"resumes": 1}, "activeDeadlineSeconds": 60}
    runs.patch_status("test", {"state": "Succeeded", "completionTime": "2026-01-01T00:00:00Z"})
    assert ENDED in runs.refusal(runs.try_patch, "test", resumed)
    runs.patch_status("test", {"state": "Failed"})
    runs.try_patch("test", resumed)


def test_no_rule_is_without_a_test():
    def messages(schema: Run) -> Iterator[str]:
        yield from (rule["message"] for rule in schema.get("x-kubernetes-validations", []))
        below = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
        for inner in filter(None, below):
            yield from messages(inner)

    tested = [*(broken["refusal"] for broken in BROKEN_MANIFESTS), *(refusal for _, refusal in [*NEVER, *NAMES])]
    tested += [
        f"{what} can change only while the run is suspended; set suspend: true first" for _, what in WHEN_SUSPENDED
    ]
    tested.append(ENDED)
    (version,) = crd_as_dict()["spec"]["versions"]
    untested = {m for m in messages(version["schema"]["openAPIV3Schema"]) if not any(text in m for text in tested)}
    assert untested == set()


# ── status and kubectl ───────────────────────────────────────────────────────────────────────────────────────────────
def test_status_is_written_through_its_own_door_only(runs):
    created = runs.create({**manifest(), "status": {"state": "Succeeded"}})
    assert "status" not in created
    assert "status" not in runs.patch("test", {"status": {"state": "Succeeded"}})
    written = runs.patch_status("test", {"state": "Running", "learner": {"step": 3}}, spec={"suspend": True})
    assert written["status"]["learner"] == {"step": 3}
    assert written["spec"]["suspend"] is False
    assert written["metadata"]["generation"] == 1
    assert 'Unsupported value: "Paused"' in runs.refusal(runs.patch_status, "test", {"state": "Paused"})


def test_two_conditions_of_one_type_are_refused(runs):
    runs.create(manifest())
    ready = {"type": "Ready", "status": "True", "reason": "Ready", "message": ""}
    ready["lastTransitionTime"] = "2026-01-01T00:00:00Z"
    runs.patch_status("test", {"conditions": [ready]})
    assert "Duplicate value" in runs.refusal(runs.patch_status, "test", {"conditions": [ready, ready]})


def test_kubectl_shows_a_runs_progress(cluster, runs, namespace):
    runs.create(manifest("a-run", model={"source": "hub", "name": "Qwen/Qwen3-1.7B"}, learner={"steps": 1295}))
    learner = {"step": 40, "reward": 0.5, "lag": 3.25, "restarts": 1}
    runs.patch_status("a-run", {"state": "Running", "learner": learner, "samplersReady": "1/2"})

    def table(*arguments: str) -> list[list[str]]:
        return [line.split() for line in cluster.kubectl("get", *arguments, "-n", namespace).splitlines()]

    names, values = table("hrl")
    assert names == ["NAME", "STATE", "STEP", "STEPS", "REWARD", "LAG", "SAMPLERS", "AGE"]
    assert values[:-1] == ["a-run", "Running", "40", "1295", "0.5", "3.25", "1/2"]
    wide_names, wide_values = table("hrl", "-o", "wide")
    assert wide_names[8:] == ["MODEL", "LOSS", "RESTARTS"]
    assert wide_values[8:] == ["Qwen/Qwen3-1.7B", "gepo", "1"]
    for category in ("heterorl", "all"):
        assert "heterorlrun.heterorl.dev/a-run" in cluster.kubectl("get", category, "-n", namespace, "-o", "name")
