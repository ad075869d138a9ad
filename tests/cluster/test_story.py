"""The whole story on a real node: the chart installed, runs applied, and pods that really train.

Scheduler, kubelet and container runtime are real; the operator is a pod made of its own image. `images.Site` says what
the pods of learners and samplers need here.
"""

from __future__ import annotations

import copy
import json
import re
from contextlib import closing, suppress
from http.client import HTTPConnection

import pytest

from cluster import images
from cluster.helm import CHART, VALUES
from cluster.operators import (
    condition,
    get,
    listed,
    patch,
    reasons,
    replicas,
    status,
    wait_for,
    wait_for_reason,
    wait_for_state,
)
from heterorl.kubernetes.manifests import Images, desired_state
from heterorl.kubernetes.pods import METRICS_PORT, PAGE_PORT
from heterorl.monitoring.run_metrics import parse_progress
from heterorl.spec.run import HeteroRLRun
from heterorl_operator.client import Api, ApiError
from run_folders import write_run

CLUSTER = {"level": "node"}
SYSTEM = "heterorl-system"
STEPS = 12
NOWHERE = "127.0.0.1:9/of/dreams:1"  # a registry that refuses connections
SPEC = {
    "model": {"source": "tiny", "dtype": "float32", "tiny": {"hiddenSize": 64, "numLayers": 2, "targetAccuracy": 0}},
    "data": {
        "train": {"source": "arithmetic", "arithmetic": {"digits": 1, "rows": 200}},
        "evals": [{"label": "sums", "source": "arithmetic", "arithmetic": {"digits": 1, "rows": 8}}],
        "promptTemplate": "raw",
    },
    "algorithm": {"groupSize": 4},
    "generation": {"maxPromptTokens": 16, "maxCompletionTokens": 4},
    "learner": {
        "steps": STEPS,
        "batch": {"groups": 4, "tokensPerMicroBatch": 512},
        "checkpoint": {"everySteps": 4},
        "threads": 1,
        "finishGraceSeconds": 5,
    },
    "evaluation": {"engine": "transformers"},
    "exchange": {"pollSeconds": 0.05, "volume": {"size": "1Gi"}},
}


def run_of(name, samplers, **learner):
    """A run whose sampler pools are given by name and engine."""
    spec = copy.deepcopy(SPEC)
    spec["learner"] |= learner
    spec["samplers"] = [
        {"name": pool, "engine": engine, "promptsPerBatch": 2, "threads": 1} for pool, engine in samplers
    ]
    return {
        "apiVersion": "heterorl.dev/v1alpha1", "kind": "HeteroRLRun", "metadata": {"name": name}, "spec": spec,
    }  # fmt: skip


@pytest.fixture(scope="module")
def installed(cluster, helm, run_images):
    """The chart, installed as a user does; what Helm printed."""
    cluster.kubectl("create", "namespace", SYSTEM)
    cluster.kubectl("label", "namespace", SYSTEM, "pod-security.kubernetes.io/enforce=restricted")
    place = ("--namespace", SYSTEM, "--wait", "--timeout", "120s")
    try:
        printed = helm(
            "install",
            "heterorl",
            CHART,
            *place,
            values={**VALUES, "tests": {"enabled": True}},
            kubeconfig=cluster.kubeconfig,
        )
    except Exception as error:
        pods = cluster.kubectl("describe", "pods", "-n", SYSTEM) + cluster.kubectl(
            "logs", "-n", SYSTEM, "deploy/heterorl"
        )
        pytest.fail(f"{error}\n{getattr(error, 'stderr', '')}\n{pods}")
    yield printed
    helm("uninstall", "heterorl", "--namespace", SYSTEM, kubeconfig=cluster.kubeconfig)


def start(site, manifest):
    """Apply it; where its volume is."""
    volume = site.adopt(manifest)
    site.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
    return volume


def ended(site, name, state, limit_s=240):
    """The status once the run has ended so; what its pods say when it does not."""
    try:
        return wait_for_state(site.cluster, site.namespace, state, name, limit_s)
    except AssertionError as error:
        ours = ("-n", site.namespace, "-l", f"heterorl.dev/run={name}")
        pods, logs = (
            site.cluster.kubectl("get", "pods", *ours),
            site.cluster.kubectl("logs", *ours, "--prefix", check=False),
        )
        operators = site.cluster.kubectl("logs", "-n", SYSTEM, "deployment/heterorl", "--tail=30")
        pytest.fail(f"{error}: {status(site.cluster, site.namespace, name)}\n{pods}\n{logs[-6000:]}\n{operators}")


def steps_in(log, of=STEPS):
    return [int(step) for step in re.findall(rf"step (\d+)/{of}  reward", log)]


def test_helm_install_kubectl_apply_kubectl_logs(site, installed, helm, api):
    cluster, where = site.cluster, ("-n", site.namespace)
    assert "kubectl apply" in installed  # the notes tell the next command
    helm("test", "heterorl", "--namespace", SYSTEM, "--timeout", "120s", kubeconfig=cluster.kubeconfig)
    steps = 60  # more than a fast node trains between the first and the pod's end
    manifest = run_of("story", [("near", "transformers"), ("far", "transformers")], steps=steps)
    manifest["spec"]["evaluation"] |= {"everySteps": 100}  # the first weights and the last
    volume = start(site, manifest)
    wait_for(
        lambda: steps_in(cluster.kubectl("logs", *where, "story-learner-0", check=False), steps), "the first step", 240
    )
    cluster.kubectl("delete", *where, "pod/story-learner-0", "--wait=false")  # it is taken away, and resumes
    seen = wait_for(lambda: status(cluster, site.namespace, "story").get("learner", {}).get("step"), "progress", 60)
    assert 0 < seen <= steps

    def proxied():
        with suppress(ApiError):  # while its successor comes up
            return Api(api, "test").through_proxy(site.namespace, "story-learner-0", METRICS_PORT, "/metrics")

    told = wait_for(proxied, "the learner's pod through the API server", 120)
    assert parse_progress(told).steps == steps  # as from where pods cannot be reached (progress.mode: proxy)
    assert re.search(rf"story +Running +\d+ +{steps} ", cluster.kubectl("get", "hrl", *where))

    told = ended(site, "story", "Succeeded")
    assert told["learner"] | {"reward": 0, "lag": 0} == {
        "step": steps, "weightsVersion": told["learner"]["weightsVersion"], "checkpointStep": steps,
        "restarts": 0, "reward": 0, "lag": 0,
    }  # fmt: skip
    assert {pool["name"]: pool["rollouts"] > 0 for pool in told["samplers"]} == {"near": True, "far": True}
    for pool in ("near", "far"):
        assert replicas(cluster, site.namespace, f"story-sampler-{pool}") == 0
    log = cluster.kubectl("logs", *where, "story-learner-0")
    assert steps_in(log, steps)[-1] == steps  # a line a step, and it can be read after the end
    wait_for(lambda: "best" in status(cluster, site.namespace, "story").get("evaluation", {}), "the evaluation", 90)
    wait_for(lambda: replicas(cluster, site.namespace, "story-learner", "statefulset") == 0, "the end of the grace", 90)
    wait_for(
        lambda: not listed(cluster, site.namespace, "pods", "heterorl.dev/role in (learner,sampler)"), "no pods", 60
    )
    kept = "".join(path.read_text() for path in sorted((volume / "logs").glob("learner*.log")))
    assert sorted(set(steps_in(kept, steps))) == list(range(1, steps + 1))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(volume / "output").num_parameters() > 0
    assert AutoTokenizer.from_pretrained(volume / "output")
    assert {"Prepared", "LearnerReady", "Scaled", "Trained"} <= set(reasons(cluster, site.namespace, "story"))

    # The volume outlives the run and is not handed to the next one by mistake.
    cluster.kubectl("delete", *where, "hrl/story")
    wait_for(lambda: not listed(cluster, site.namespace, "statefulsets"), "the clearing", 60)
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
    prepared = wait_for_reason(cluster, site.namespace, "Prepared", "VolumeInUse", "story", 60)
    assert "resume: true" in prepared["message"]
    patch(cluster, site.namespace, "story", {"resume": True})
    assert ended(site, "story", "Succeeded")["learner"]["step"] == steps


def test_vllm_samples_in_a_pod_for_a_learner_of_two_pods(site, installed):
    manifest = run_of("pair", [("near", "vllm")], replicas=2, steps=3, finishGraceSeconds=20)
    start(site, manifest)
    ended(site, "pair", "Succeeded", 400)

    def rollouts():
        return status(site.cluster, site.namespace, "pair")["samplers"][0].get("rollouts", 0)

    wait_for(lambda: rollouts() >= 12, "the sampler's last word: three steps of four groups")
    where = ("-n", site.namespace)
    assert "step 3/3" in site.cluster.kubectl("logs", *where, "pair-learner-0")


def test_edits_reach_pods_at_work_and_a_suspended_run_goes_on_from_its_checkpoint(site, installed):
    cluster = site.cluster
    manifest = run_of("edited", [("near", "transformers")], steps=100_000)
    manifest["spec"]["monitoring"] = {"page": True}
    start(site, manifest)

    def wait_for_log(pod, pattern):
        log = ("logs", "-n", site.namespace, pod)
        return wait_for(lambda: re.search(pattern, cluster.kubectl(*log, check=False)), f"{pattern} from {pod}", 120)

    wait_for_log("edited-learner-0", r"step 4/100000 ")
    with cluster.tunnel(site.namespace, "edited-learner-0", PAGE_PORT) as address, connected(address) as reader:
        (shown,) = json.loads(ask(reader)[2])["runs"]
    assert (shown["title"], shown["state"]) == ("edited", "running")
    assert shown["step"] >= 4

    slow = {**manifest["spec"]["samplers"][0], "delay": {"distribution": "constant", "lower": 3600}}
    patch(cluster, site.namespace, "edited", {"learner": {"steps": 200_000}, "samplers": [slow]})
    wait_for_log("edited-learner-0", r"follows an edit of learner\.steps")
    wait_for_log("deployment/edited-sampler-near", r"follows an edit of .*delay")

    patch(cluster, site.namespace, "edited", {"suspend": True})
    wait_for_state(cluster, site.namespace, "Suspended", "edited")
    wait_for(
        lambda: not listed(cluster, site.namespace, "pods", "heterorl.dev/role in (learner,sampler)"), "no pods", 60
    )
    patch(cluster, site.namespace, "edited", {"suspend": False})
    found = wait_for_log("edited-learner-0", r"resumed from the checkpoint of step (\d+)")
    assert int(found[1]) >= 4


def test_an_image_that_cannot_be_had_is_said_within_half_a_minute(site, installed):
    manifest = run_of("lost", [("near", "transformers")])
    manifest["spec"]["samplers"][0]["podTemplate"] = {"image": NOWHERE, "imagePullPolicy": "IfNotPresent"}
    start(site, manifest)
    samplers = wait_for_reason(site.cluster, site.namespace, "SamplersAvailable", "ImagePullFailed", "lost")
    assert "imagePullSecrets" in samplers["message"]


def test_a_learner_that_crashes_too_often_fails_the_run(site, installed):
    cluster, where = site.cluster, ("-n", site.namespace)
    manifest = run_of("crash", [("near", "transformers")], steps=100_000)
    # Nothing refills: a tiny model makes the default fifty steps between two crashes.
    manifest["spec"]["failurePolicy"] = {"learnerRestarts": 1, "refillSteps": 0}
    start(site, manifest)
    for crash in (1, 2):
        wait_for(
            lambda: (status(cluster, site.namespace, "crash").get("learner", {}).get("step") or 0) > 0, "a step", 120
        )
        wait_for(lambda: condition(cluster, site.namespace, "LearnerReady", "crash").get("status") == "True", "it", 120)
        killed = "import os, signal, pathlib; [os.kill(int(p.parent.name), signal.SIGKILL) for p in" \
            " pathlib.Path('/proc').glob('[0-9]*/cmdline') if b'heterorl_learner\\0' in p.read_bytes()]"  # fmt: skip
        cluster.kubectl("exec", *where, "crash-learner-0", "--", "python", "-c", killed, check=False)
        wait_for(
            lambda n=crash: status(cluster, site.namespace, "crash")["learner"].get("restarts") == n, "the count", 90
        )
    told = ended(site, "crash", "Failed", 60)
    assert told["learner"]["restarts"] == 2
    assert condition(cluster, site.namespace, "Failed", "crash")["reason"] == "LearnerCrashed"
    assert "failurePolicy.learnerRestarts is 1" in condition(cluster, site.namespace, "Failed", "crash")["message"]


TOO_LITTLE = {"resources": {"limits": {"memory": "64Mi"}}}  # Python and torch need more


def test_a_sampler_that_is_killed_for_its_memory_is_named_with_the_way_out(site, installed):
    manifest = run_of("hungry", [("near", "transformers")], steps=100_000)
    manifest["spec"]["samplers"][0]["podTemplate"] = TOO_LITTLE
    start(site, manifest)
    found = wait_for_reason(site.cluster, site.namespace, "SamplersAvailable", "OOMKilled", "hungry", 120)
    assert "raise resources.limits.memory in its podTemplate" in found["message"]
    assert "hungry-sampler-near" in found["message"]
    assert "OOMKilled" in reasons(site.cluster, site.namespace, "hungry")


def test_a_preparation_and_a_learner_that_are_killed_for_their_memory_are_named_with_the_way_out(site, installed):
    cluster, where = site.cluster, site.namespace
    start(site, run_of("starved", [("near", "transformers")], podTemplate=TOO_LITTLE))
    start(site, run_of("narrow", [("near", "transformers")], steps=100_000))
    wait_for(lambda: condition(cluster, where, "Prepared", "narrow").get("status") == "True", "the preparation", 120)
    patch(cluster, where, "narrow", {"suspend": True})
    wait_for_state(cluster, where, "Suspended", "narrow")
    patch(cluster, where, "narrow", {"suspend": False, "learner": {"podTemplate": TOO_LITTLE}})
    learner = wait_for_reason(cluster, where, "LearnerReady", "OOMKilled", "narrow", 120)
    assert "narrow-learner-0" in learner["message"]
    preparation = wait_for(
        lambda: named_for_memory(condition(cluster, where, "Prepared", "starved")), "its reason", 120
    )
    for found, name in ((learner, "narrow"), (preparation, "starved")):
        assert "raise resources.limits.memory in its podTemplate" in found["message"]
        assert {"OOMKilled", "PreparationFailed"} & set(reasons(cluster, where, name))


def named_for_memory(told):
    """The preparation's condition once it says so: of a pod that will be made again, or of the last one."""
    return told if told.get("reason") == "OOMKilled" or "(OOMKilled)" in told.get("message", "") else None


# ── the page beside a learner ────────────────────────────────────────────────────────────────────────────────────────
OPEN_PORT = 6071


def ask(reader, path="/api/runs", *, method="GET", **headers):
    """Status, headers and body of an answer on a connection, which stays open as a browser's does."""
    reader.request(method, path, headers=headers)
    answer = reader.getresponse()
    return answer.status, answer.headers, answer.read()


def connected(address, port=None):
    return closing(HTTPConnection(address, port, timeout=60))


def pages_alone(manifest):
    """What a run's page needs, in a pod without the learner, and beside it one that listens to everyone.

    The kubelet kills what does not leave within ten seconds, and the pod is kept to tell how its containers ended.
    """
    used = Images(images.LEARNER, images.SAMPLER, "Never")
    made = {found["kind"]: found for found in desired_state(HeteroRLRun.model_validate(manifest), images=used)}
    spec = made["StatefulSet"]["spec"]["template"]["spec"]
    (page,) = spec.pop("initContainers")
    del page["restartPolicy"]
    listening = ["--host", "0.0.0.0", "--port", str(OPEN_PORT)]
    spec["containers"] = [page, {**page, "name": "open", "command": [*page["command"], *listening]}]
    spec |= {"restartPolicy": "Never", "terminationGracePeriodSeconds": 10}
    metadata = {"name": "page", "finalizers": ["heterorl.dev/kept"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    return [made["ConfigMap"], made["PersistentVolumeClaim"], pod]


def test_the_page_only_reads_is_reached_through_a_tunnel_or_with_a_token_and_leaves_when_told_to(site):
    cluster, where = site.cluster, ("-n", site.namespace)
    manifest = run_of("shown", [("near", "transformers")])
    manifest["spec"]["monitoring"] = {"page": True}
    write_run(site.adopt(manifest), steps=40, groups=4)
    for made in pages_alone(manifest):
        cluster.kubectl("apply", *where, "-f", "-", stdin=json.dumps(made))

    def printed(container, pattern):
        log = ("logs", *where, "page", "-c", container)
        return wait_for(
            lambda: re.search(pattern, cluster.kubectl(*log, check=False)), f"{pattern} of {container}", 120
        )

    token = printed("open", r"http://0\.0\.0\.0:\d+/\?token=(\S+)")[1]
    printed("page", rf"http://127\.0\.0\.1:{PAGE_PORT}/\n")
    host = get(cluster, site.namespace, "pod", "page")["status"]["podIP"]

    with connected(host, PAGE_PORT) as reader, pytest.raises(ConnectionRefusedError):
        ask(reader)
    with connected(host, OPEN_PORT) as reader:
        assert ask(reader)[0] == 401
        cookie = ask(reader, f"/?token={token}")[1]["set-cookie"]
        (shown,) = json.loads(ask(reader, cookie=cookie)[2])["runs"]
        assert shown["title"] == "shown"

    writing = ("python", "-c", "open('/volume/written', 'w')")
    told = cluster.kubectl("exec", *where, "page", "-c", "page", "--", *writing, check=False)
    assert "Read-only file system" in told

    with cluster.tunnel(site.namespace, "page", PAGE_PORT) as address, connected(address) as reader:
        (shown,) = json.loads(ask(reader)[2])["runs"]
        assert (shown["title"], shown["state"], shown["step"]) == ("shown", "succeeded", 40)
        assert ask(reader, method="POST")[0] == 405
        cluster.kubectl("delete", *where, "pod/page", "--wait=false")

        def ends():
            containers = get(cluster, site.namespace, "pod", "page")["status"]["containerStatuses"]
            ended = [each["state"]["terminated"]["exitCode"] for each in containers if "terminated" in each["state"]]
            return ended if len(ended) == len(containers) else None

        assert wait_for(ends, "both to end", 60) == [143, 143]  # by SIGTERM; 137 would be the kubelet's patience
    cluster.kubectl("patch", *where, "pod/page", "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
