"""A pod that is told to go is gone within ten seconds, whatever it is doing, its first moment included.

Pods of every role on a real node, without what would replace them; `kubectl delete` allows each a minute.
"""

from __future__ import annotations

import copy
import json
import time

import pytest

from cluster import images
from cluster.operators import get, wait_for
from cluster.test_images import tiny_run
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.version import Version
from heterorl.kubernetes.manifests import Images, desired_state, evaluation_job
from heterorl.spec.run import HeteroRLRun

CLUSTER = {"level": "node"}
GRACE_S, LIMIT_S = 60, 10.0
ROLES = ("prepare", "learner", "sampler", "evaluation")


class Pods:
    """Bare pods as the workloads of a run would make them; at most one of each role."""

    def __init__(self, site: images.Site) -> None:
        self.cluster, self.namespace = site.cluster, site.namespace
        manifest = tiny_run("run", steps=100_000)
        manifest["spec"]["samplers"] = manifest["spec"]["samplers"][:1]
        manifest["spec"]["data"]["evals"] = [{"label": "sums", "source": "arithmetic"}]
        manifest["spec"]["evaluation"] = {"engine": "transformers"}
        manifest["spec"]["exchange"] |= {"volume": {"size": "1Gi"}, "retention": {"weights": 10_000}}
        self.volume = site.adopt(manifest)
        self.run = HeteroRLRun.model_validate(manifest)
        self._images = Images(images.LEARNER, images.SAMPLER)
        self._templates = {}
        for each in desired_state(self.run, images=self._images, namespace=self.namespace):
            if "template" in each["spec" if "spec" in each else "metadata"]:
                self._learn(each)
            else:
                self._apply(each)

    def evaluate(self, version: Version) -> None:
        """The pod of an evaluation is one of this version from now on."""
        self._learn(evaluation_job(self.run, version, images=self._images, namespace=self.namespace))

    def start(self, *roles: str, cpu: str | None = None) -> None:
        """Make pods and wait until each one's container runs."""
        for role in roles:
            template = copy.deepcopy(self._templates[role])
            if cpu:
                resources = {"requests": {"cpu": cpu}, "limits": {"cpu": cpu}}
                template["spec"]["containers"][0]["resources"] = resources
            labels = {**template["metadata"]["labels"], "apps.kubernetes.io/pod-index": "0"}
            metadata = {"name": role, "namespace": self.namespace, "labels": labels}
            self._apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
        for role in roles:
            wait_for(lambda role=role: "running" in self.state(role), f"{role}'s container", 90)

    def state(self, role: str) -> dict:
        """State of its container, as Kubernetes tells it."""
        found = get(self.cluster, self.namespace, "pod", role) or {}
        statuses = found.get("status", {}).get("containerStatuses", [])
        return dict(statuses[0]["state"]) if statuses else {}

    def log(self, role: str) -> str:
        return self.cluster.kubectl("logs", "-n", self.namespace, role, check=False)

    def delete(self, *roles: str) -> dict[str, float]:
        """Tell them to go, all at once; how many seconds later each was gone."""
        self.cluster.kubectl("delete", "pod", "-n", self.namespace, *roles, f"--grace-period={GRACE_S}", "--wait=false")
        began, gone = time.monotonic(), {}
        while len(gone) < len(roles):
            left = self.cluster.kubectl("get", "pods", "-n", self.namespace, "-o", "jsonpath={.items[*].metadata.name}")
            for role in set(roles) - gone.keys() - set(left.split()):
                gone[role] = round(time.monotonic() - began, 1)
            assert time.monotonic() < began + GRACE_S + 30, f"still there: {left}"
            time.sleep(0.1)
        return gone

    def _learn(self, workload: dict) -> None:
        template = workload["spec"]["template"]
        self._templates[template["spec"]["containers"][0]["name"]] = template

    def _apply(self, document: dict) -> None:
        self.cluster.kubectl("apply", "-n", self.namespace, "-f", "-", stdin=json.dumps(document))


@pytest.fixture
def pods(site):
    return Pods(site)


def within_the_limit(gone: dict[str, float]) -> bool:
    return all(seconds < LIMIT_S for seconds in gone.values())


def test_a_process_leaves_at_once_while_python_itself_still_starts(pods):
    pods.evaluate(Version(0, 1))
    pods.start(*ROLES, cpu="20m")  # so slow is a busy node: it takes seconds until a line of ours is run
    gone = pods.delete(*ROLES)
    assert within_the_limit(gone), gone


def test_a_process_leaves_within_ten_seconds_while_it_loads_and_at_work(pods):
    def after_a_while(*roles):
        pods.start(*roles)
        time.sleep(3)
        return pods.delete(*roles)

    gone = [after_a_while("prepare")]
    pods.start("prepare")
    wait_for(lambda: "terminated" in pods.state("prepare"), "the preparation", 120)
    gone.append(after_a_while("learner", "sampler"))
    pods.start("learner", "sampler")
    wait_for(lambda: "step 2/" in pods.log("learner"), "a step", 120)
    pods.evaluate(Exchange(pods.volume).list_versions()[0])
    gone.append(after_a_while("evaluation"))
    gone.append(pods.delete("learner", "sampler"))
    assert all(map(within_the_limit, gone)), gone
