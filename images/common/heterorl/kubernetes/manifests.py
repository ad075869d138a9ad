"""A run's Kubernetes objects: pure functions of its spec, for the operator and for `heterorl render`.

    ConfigMap    RUN-config            run.json, the resolved spec, mounted as a folder so that edits reach running pods
    Claim        RUN-volume            the shared volume, unless the spec names a claim
    Service      RUN-learner           headless: gives the learner's pods names, for their rendezvous
    Job          RUN-prepare-HASH      puts model and data onto the volume, once
    StatefulSet  RUN-learner           the learner
    Deployment   RUN-sampler-POOL     one a pool; a pod takes whichever of the pool's slots is free
    Job          RUN-eval-STEP         one evaluation of a published version; only the operator makes these

Pods start in any order: those that need the model wait for the marker that the preparation leaves on the volume. The
volume is the run's folder; paths in the spec are relative to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Self

from heterorl.exchange.version import Version
from heterorl.exit_codes import USER_ERROR
from heterorl.kubernetes.names import (
    Object,
    PodRole,
    claim_name,
    config_name,
    evaluation_name,
    labels,
    learner_name,
    prepare_name,
    sampler_name,
    selector,
)
from heterorl.kubernetes.pods import (
    SERVING,
    SPEC_FILE,
    VOLUME,
    build_pod,
    merge_into_metadata,
    metrics_port,
    page_container,
    secret_env,
    without_devices,
)
from heterorl.spec.paths import input_paths
from heterorl.spec.pod_template import PodTemplateSpec
from heterorl.spec.run import API_VERSION, KIND, HeteroRLRun, RunSpec

RENDEZVOUS_PORT = 29500
"""Where the learner's ranks meet, on its first pod."""

_EVALUATION_TTL_S = 3600  # its log for an hour; its result stays on the volume


@dataclass(frozen=True)
class Images:
    """Container images of a run's pods, and how to pull them."""

    learner: str
    """Also of the preparation."""
    sampler: str
    """Also of the evaluations."""
    pull_policy: str | None = None
    pull_secrets: tuple[str, ...] = ()
    """Names of Secrets."""


@dataclass(frozen=True)
class ReplicaCounts:
    """How many pods there should be now."""

    learner: int
    samplers: Mapping[str, int]
    """By pool."""

    @classmethod
    def of(cls, spec: RunSpec) -> Self:
        """All that the spec asks for when everything is available; none while it is suspended."""
        if spec.suspend:
            return cls(0, {pool.name: 0 for pool in spec.samplers})
        return cls(spec.learner.replicas, {pool.name: pool.replicas for pool in spec.samplers})


def desired_state(
    run: HeteroRLRun,
    *,
    images: Images,
    namespace: str | None = None,
    owner_uid: str | None = None,
    replicas: ReplicaCounts | None = None,
) -> list[Object]:
    """Every object that should exist, in the order in which to create them.

    `owner_uid` is that of the HeteroRLRun, whose deletion then takes its objects with it. `replicas` defaults to
    `Replicas.of`. A suspended run keeps its volume and has no preparation. Evaluations come from `evaluation_job`.
    """
    builder = _Builder(run, images, namespace, owner_uid)
    wanted = replicas or ReplicaCounts.of(run.spec)
    return [
        builder.config_map(),
        *([] if run.spec.exchange.volume.claim_name else [builder.claim()]),
        builder.service(),
        *([] if run.spec.suspend else [builder.prepare_job()]),
        builder.learner(wanted.learner),
        *(builder.sampler_pool(pool.name, wanted.samplers[pool.name]) for pool in run.spec.samplers),
    ]


def evaluation_job(
    run: HeteroRLRun,
    version: Version,
    *,
    images: Images,
    namespace: str | None = None,
    owner_uid: str | None = None,
) -> Object:
    """The Job that evaluates a published version."""
    return _Builder(run, images, namespace, owner_uid).evaluation_job(version)


def spec_for_pods(run: HeteroRLRun, uid: str | None = None) -> Object:
    """The resolved run as its pods read it: paths on the volume, a port for /metrics, of its metadata name and uid.

    The uid is that of the HeteroRLRun; without one, as with `heterorl render`, the name alone tells runs apart.
    """
    tree = run.resolved()
    spec = tree["spec"]
    spec["monitoring"]["prometheusPort"] = metrics_port(run.spec)
    for path in input_paths(spec):
        path.set(PurePosixPath(VOLUME) / path.value)
    for trace in (pool["delay"]["trace"] for pool in spec["samplers"]):
        if trace["path"]:
            trace["path"] = str(PurePosixPath(VOLUME) / trace["path"])
    return {**tree, "metadata": {"name": run.metadata.name} | ({"uid": uid} if uid else {})}


@dataclass(frozen=True)
class _Builder:
    run: HeteroRLRun
    images: Images
    namespace: str | None
    owner_uid: str | None

    @property
    def name(self) -> str:
        return self.run.metadata.name

    @property
    def spec(self) -> RunSpec:
        return self.run.spec

    # ── what has no pods ─────────────────────────────────────────────────────────────────────────────────────────────
    def config_map(self) -> Object:
        content = json.dumps(spec_for_pods(self.run, self.owner_uid), indent=2) + "\n"
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": self._metadata(config_name(self.name), "run"),
            "data": {PurePosixPath(SPEC_FILE).name: content},
        }

    def claim(self) -> Object:
        volume = self.spec.exchange.volume
        metadata = self._metadata(claim_name(self.run), "run")
        if self.spec.exchange.retention.volume == "Retain":
            metadata.pop("ownerReferences", None)  # what is owned goes when the run goes
        storage_class = {"storageClassName": volume.storage_class_name} if volume.storage_class_name else {}
        return {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": metadata,
            "spec": {
                "accessModes": list(volume.access_modes),
                **storage_class,
                "resources": {"requests": {"storage": volume.size}},
            },
        }

    def service(self) -> Object:
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": self._metadata(learner_name(self.name), "learner"),
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,  # ranks find each other before any of them is ready
                "selector": selector(self.name, "learner"),
                "ports": [{"name": "metrics", "port": metrics_port(self.spec), "targetPort": "metrics"}],
            },
        }

    # ── learner and samplers ─────────────────────────────────────────────────────────────────────────────────────────
    def learner(self, replicas: int) -> Object:
        learner, name = self.spec.learner, learner_name(self.name)
        index = {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}}
        rendezvous = [
            {"name": "MASTER_ADDR", "value": f"{name}-0.{name}"},
            {"name": "MASTER_PORT", "value": str(RENDEZVOUS_PORT)},
            {"name": "NODE_RANK", "valueFrom": index},
        ]
        # Tells a container that was restarted in its pod from a pod that took another one's place.
        pod_uid = {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}
        page = page_container(self.images.learner, learner.pod_template, self.images.pull_policy)
        pod = self._pod(
            "learner",
            self.images.learner,
            "heterorl_learner launch",
            learner.pod_template,
            env=[*rendezvous, pod_uid, *secret_env("WANDB_API_KEY", self.spec.credentials.wandb_api_key)],
            gpus=learner.gpus,
            threads=learner.threads,
            readiness={"httpGet": {"path": "/ready", "port": "metrics"}},
            beside=[page] if self.spec.monitoring.page else [],
        )
        return {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": merge_into_metadata(self._metadata(name, "learner"), learner.pod_template),
            "spec": {
                "replicas": replicas,
                "serviceName": name,
                "podManagementPolicy": "Parallel",  # ranks wait for each other
                "revisionHistoryLimit": 2,
                "selector": {"matchLabels": selector(self.name, "learner")},
                "template": pod,
            },
        }

    def sampler_pool(self, name: str, replicas: int) -> Object:
        pool = self.spec.pool(name)
        pod = self._pod(
            "sampler",
            self.images.sampler,
            "heterorl_sampler",
            pool.pod_template,
            arguments=["--pool", name],
            pool=name,
            gpus=pool.gpus,
            threads=pool.threads,
            readiness=SERVING,
        )
        metadata = self._metadata(sampler_name(self.name, name), "sampler", name)
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": merge_into_metadata(metadata, pool.pod_template),
            "spec": {
                "replicas": replicas,
                # A slot has one holder: a pod beyond the pool's number would only wait, and hold a GPU meanwhile.
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": "25%"}},
                "revisionHistoryLimit": 2,
                "selector": {"matchLabels": selector(self.name, "sampler", name)},
                "template": pod,
            },
        }

    # ── Jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    def prepare_job(self) -> Object:
        given = self.spec.learner.pod_template
        token = secret_env("HF_TOKEN", self.spec.credentials.hub_token)
        pod = self._pod("prepare", self.images.learner, "heterorl_learner prepare", given, env=token)
        return self._job(prepare_name(self.run), "prepare", without_devices(pod), given, {"backoffLimit": 3})

    def evaluation_job(self, version: Version) -> Object:
        evaluation = self.spec.evaluation
        pod = self._pod(
            "evaluation",
            self.images.sampler,
            "heterorl_sampler evaluate",
            evaluation.pod_template,
            arguments=["--version", str(version)],
            gpus=evaluation.gpus,
        )
        limits = {"backoffLimit": 1, "ttlSecondsAfterFinished": _EVALUATION_TTL_S}
        name = evaluation_name(self.name, version.step)
        return self._job(name, "evaluation", pod, evaluation.pod_template, limits)

    def _job(self, name: str, role: PodRole, pod: Object, given: PodTemplateSpec, limits: Object) -> Object:
        user_error = {"containerName": role, "operator": "In", "values": [USER_ERROR]}
        disrupted = [{"type": "DisruptionTarget", "status": "True"}]
        rules = [
            {"action": "FailJob", "onExitCodes": user_error},
            {"action": "Ignore", "onPodConditions": disrupted},
        ]
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": merge_into_metadata(self._metadata(name, role), given),
            "spec": {
                **limits,
                "podFailurePolicy": {"rules": rules},
                "template": {**pod, "spec": {**pod["spec"], "restartPolicy": "Never"}},
            },
        }

    # ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def _pod(self) -> partial[Object]:
        return partial(build_pod, self.run, pull_policy=self.images.pull_policy, pull_secrets=self.images.pull_secrets)

    def _metadata(self, name: str, role: PodRole, pool: str | None = None) -> Object:
        namespace = {"namespace": self.namespace} if self.namespace else {}
        metadata: Object = {"name": name, **namespace, "labels": labels(self.name, role, pool)}
        if self.owner_uid:
            owner = {"apiVersion": API_VERSION, "kind": KIND, "name": self.name, "uid": self.owner_uid}
            metadata["ownerReferences"] = [{**owner, "controller": True, "blockOwnerDeletion": True}]
        return metadata
