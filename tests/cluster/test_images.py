"""HeteroRL's own images: what is in them, and a run of what `heterorl render` prints, without the operator."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import images

CLUSTER = {"level": "node"}

STEPS = 4
RUN: dict[str, Any] = {
    "apiVersion": "heterorl.dev/v1alpha1",
    "kind": "HeteroRLRun",
    "metadata": {"name": "tiny"},
    "spec": {
        "model": {
            "source": "tiny",
            "dtype": "float32",
            "tiny": {"hiddenSize": 64, "numLayers": 2, "targetAccuracy": 0},
        },
        "data": {
            "train": {"source": "arithmetic", "arithmetic": {"digits": 1, "rows": 200}},
            "promptTemplate": "raw",
        },
        "rewards": [{"name": "accuracy"}],
        "algorithm": {"groupSize": 4},
        "generation": {"maxPromptTokens": 16, "maxCompletionTokens": 4},
        "learner": {"steps": STEPS, "batch": {"groups": 4, "tokensPerMicroBatch": 512}, "threads": 1},
        "samplers": [
            {"name": "near", "engine": "transformers", "promptsPerBatch": 2, "threads": 1},
            {"name": "far", "engine": "transformers", "promptsPerBatch": 2, "threads": 1},
        ],
        "exchange": {"pollSeconds": 0.05},
    },
}


def tiny_run(name: str, **learner: Any) -> dict[str, Any]:
    run = copy.deepcopy(RUN)
    run["metadata"]["name"] = name
    run["spec"]["learner"] |= learner
    return run


def render(manifest: dict[str, Any], folder: Path) -> str:
    """What `heterorl render` prints for it."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(manifest))
    command = [sys.executable, "-m", "heterorl", "render", str(file)]
    command += ["--images", images.PREFIX, "--image-tag", images.TAG]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def train(site: images.Site, manifest: dict[str, Any], folder: Path) -> Path:
    """Apply what is rendered and see it trained to the last step, a line of the log each; where its volume is."""
    run, volume = manifest["metadata"]["name"], site.adopt(manifest)
    site.cluster.kubectl("apply", "-f", "-", stdin=render(manifest, folder))
    ours = ("-n", site.namespace, "-l", f"heterorl.dev/run={run}")

    def trained() -> bool:
        log = site.cluster.kubectl("logs", "-n", site.namespace, f"{run}-learner-0", check=False)
        steps = [int(step) for step in re.findall(rf"step (\d+)/{STEPS}  reward", log)]
        return steps == list(range(1, STEPS + 1)) and (volume / "output" / "config.json").exists()

    try:
        site.cluster.wait("the last step", trained, 300)
    except TimeoutError:
        pods = site.cluster.kubectl("get", "pods", *ours, "-o", "wide")
        pytest.fail(f"not trained:\n{pods}\n{site.cluster.kubectl('logs', *ours, '--prefix', check=False)}")
    site.cluster.kubectl("wait", "job", *ours, "--for=condition=Complete", "--timeout=10s")
    return volume


def test_what_render_prints_trains_as_it_is(site, tmp_path):
    volume = train(site, tiny_run("tiny"), tmp_path)
    for pod in ("statefulset/tiny-learner", "deployment/tiny-sampler-near", "deployment/tiny-sampler-far"):
        site.cluster.kubectl("rollout", "status", "-n", site.namespace, pod, "--timeout=60s")
        imported = "import heterorl, numpy; print(heterorl.__file__, numpy.__file__)"
        ours, other = site.cluster.kubectl("exec", "-n", site.namespace, pod, "--", "python", "-c", imported).split()
        assert ours.startswith("/opt/heterorl/")  # the image's own, not this machine's
        assert other.startswith("/packages/")
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(volume / "output").num_parameters() > 0


def test_two_learner_pods_find_each_other(site, tmp_path):
    train(site, tiny_run("pair", replicas=2), tmp_path)
    log = ("logs", "-n", site.namespace, "pair-learner-1")
    site.cluster.wait("the other's end", lambda: f"finished at step {STEPS}" in site.cluster.kubectl(*log), 30)


@pytest.mark.usefixtures("run_images")
def test_the_operators_image_has_its_packages_and_neither_compiler_nor_installer(cluster, namespace):
    cluster.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    imports = 'python -c "import heterorl.kubernetes.manifests, heterorl_operator, kopf, kubernetes"'
    script = f"{imports} && ! command -v gcc cc pip uv && id -un"
    security = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,  # the image says as whom
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {"name": "operator", "image": images.OPERATOR, "command": ["sh", "-c", script]}
    spec = {"restartPolicy": "Never", "containers": [{**container, "securityContext": security}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator"}, "spec": spec}
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(pod))

    def phase() -> str:
        return cluster.kubectl("get", "-n", namespace, "pod/operator", "-o", "jsonpath={.status.phase}")

    cluster.wait("the pod's end", lambda: phase() in ("Succeeded", "Failed"), 60)
    assert (cluster.kubectl("logs", "-n", namespace, "operator"), phase()) == ("heterorl\n", "Succeeded")


@pytest.mark.usefixtures("run_images")
@pytest.mark.parametrize("name", ["operator", "learner", "sampler"])
def test_an_image_says_what_it_is_and_nothing_of_where_it_was_made(name):
    found = images.inspect(f"{images.PREFIX}/{name}:{images.TAG}")
    config, prefix = found["config"], "org.opencontainers.image."
    assert config["User"] == "1000:1000"
    assert "HOME=/home/heterorl" in config["Env"]
    assert config["Labels"][f"{prefix}title"] == f"HeteroRL {name}"
    assert config["Labels"][f"{prefix}version"] == version("heterorl")
    assert re.fullmatch(r"[0-9a-f]{40}", config["Labels"][f"{prefix}revision"])
    assert f"{prefix}source" in config["Labels"]
    assert not re.search(r"PIP_|UV_|SSL_", json.dumps(found))


def test_images_without_a_builder_say_what_to_install():
    made = subprocess.run(["make", "-C", images.ROOT, "images", "BUILDER="], capture_output=True, text=True)
    assert made.returncode
    assert "apt-get install buildah" in made.stderr
