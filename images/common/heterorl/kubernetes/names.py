"""Names, labels and hashes of a run's Kubernetes objects.

The longest names: a run has at most 40 characters and a pool 20. A StatefulSet may have 52, as its pods carry a label
of its name and a hash; a Service and a Job 63; a Deployment's pods cut its name to fit.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from heterorl.spec.run import HeteroRLRun

Object = dict[str, Any]
"""A Kubernetes object, or a part of one, ready for YAML."""
PodRole = Literal["run", "prepare", "learner", "sampler", "evaluation"]
"""What an object is for; `run` is what belongs to no role in particular."""

RUN_LABEL, ROLE_LABEL, POOL_LABEL = "heterorl.dev/run", "heterorl.dev/role", "heterorl.dev/pool"
RESUMES_ANNOTATION = "heterorl.dev/resumes"
"""On the pods of a run that was resumed: `failurePolicy.resumes`, so that its increase replaces them."""
HASH_ANNOTATION = "heterorl.dev/rendered-hash"


def config_name(run: str) -> str:
    """Name of the ConfigMap."""
    return f"{run}-config"


def learner_name(run: str) -> str:
    """Name of the learner's StatefulSet and Service; its pods are NAME-0, NAME-1, ..."""
    return f"{run}-learner"


def sampler_name(run: str, pool: str) -> str:
    """Name of a pool's Deployment."""
    return f"{run}-sampler-{pool}"


def evaluation_name(run: str, step: int) -> str:
    """Name of the Job that evaluates the weights of a step."""
    return f"{run}-eval-{step}"


def prepare_name(run: HeteroRLRun) -> str:
    """Name of the preparation's Job: another model, data or seed is another preparation.

    So is one that may take over a used volume, after one that might not, and the next one when a failed run is resumed.
    """
    spec = run.resolved()["spec"]
    parts = [spec[part] for part in ("model", "data", "seed", "resume")]
    resumes = run.spec.failure_policy.resumes
    return f"{run.metadata.name}-prepare-{_digest([*parts, *([resumes] if resumes else [])])[:8]}"


def claim_name(run: HeteroRLRun) -> str:
    """Name of the claim whose volume the run uses: the spec's, or its own."""
    return run.spec.exchange.volume.claim_name or f"{run.metadata.name}-volume"


def selector(run: str, role: PodRole, pool: str | None = None) -> dict[str, str]:
    """Labels by which the pods of a role are found; they never change."""
    labels = {RUN_LABEL: run, ROLE_LABEL: role}
    return {**labels, POOL_LABEL: pool} if pool else labels


def labels(run: str, role: PodRole, pool: str | None = None) -> dict[str, str]:
    """Labels of every object and pod."""
    return {
        "app.kubernetes.io/name": "heterorl",
        "app.kubernetes.io/instance": run,
        "app.kubernetes.io/component": role,
        "app.kubernetes.io/part-of": "heterorl",
        "app.kubernetes.io/managed-by": "heterorl",
        **selector(run, role, pool),
    }


def rendered_hash(desired: Object) -> str:
    """Hash of an object as rendered, its own annotation left out: equal means there is nothing new to apply."""
    metadata = dict(desired["metadata"])
    annotations = {key: value for key, value in metadata.pop("annotations", {}).items() if key != HASH_ANNOTATION}
    return _digest({**desired, "metadata": {**metadata, "annotations": annotations}})[:16]


def with_hash(desired: Object) -> Object:
    """The object with its hash as an annotation."""
    metadata = desired["metadata"]
    annotations = {**metadata.get("annotations", {}), HASH_ANNOTATION: rendered_hash(desired)}
    return {**desired, "metadata": {**metadata, "annotations": annotations}}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
