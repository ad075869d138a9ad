"""What a manifest may say about pods: an allow-list of Kubernetes' fields, each with its real type."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from heterorl.spec.base import (
    Block,
    BrokenRule,
    FreeForm,
    Path_,
    PoolName,
    Quantity,
    ShortText,
    StringMap,
    Text,
    list_map,
)

RESERVED = ("heterorl.dev/", "app.kubernetes.io/")
"""Prefixes of our own labels and annotations."""


class Toleration(Block):
    """Kubernetes' toleration."""

    key: ShortText | None = None
    """Taint key; absent with operator Exists matches all."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How value is compared."""
    value: ShortText | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; absent matches all."""
    toleration_seconds: int | None = Field(None, ge=0)
    """How long NoExecute is tolerated."""


class Resources(Block):
    """Kubernetes' resource requests and limits."""

    requests: StringMap = Field({})
    """Requested quantities, as `cpu: "2"`."""
    limits: StringMap = Field({})
    """Limits, as `nvidia.com/gpu: "1"`."""


class KeyReference(Block):
    """A key of a Secret or ConfigMap in the run's namespace."""

    name: ShortText
    """Name of the Secret or ConfigMap."""
    key: ShortText
    """Key in it."""
    optional: bool = False
    """Start the pod even if it does not exist."""


class FieldReference(Block):
    """Kubernetes' downward API."""

    field_path: ShortText
    """Field of the pod, as `status.podIP`."""


class EnvSource(Block):
    """Where an environment variable's value comes from."""

    secret_key_ref: KeyReference | None = None
    """A key of a Secret."""
    config_map_key_ref: KeyReference | None = None
    """A key of a ConfigMap."""
    field_ref: FieldReference | None = None
    """A field of the pod."""


class EnvVar(Block):
    """An environment variable."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=253)]
    """Its name."""
    value: Text | None = None
    """Its value."""
    value_from: EnvSource | None = None
    """Where its value comes from, instead of value."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """One source of the value."""
        if self.value is not None and self.value_from:
            yield "value", "stands beside valueFrom; keep one of them"


class ClaimSource(Block):
    """A PersistentVolumeClaim as a volume."""

    claim_name: ShortText
    """Name of the claim."""
    read_only: bool = False
    """Mount it read-only."""


class EmptyDirSource(Block):
    """A fresh folder that lives as long as the pod."""

    medium: Literal["", "Memory"] = ""
    """Memory keeps it in RAM."""
    size_limit: Quantity | None = None
    """Most it may hold, as 8Gi."""


class SecretSource(Block):
    """A Secret as a volume."""

    secret_name: ShortText
    """Name of the Secret."""


class ConfigMapSource(Block):
    """A ConfigMap as a volume."""

    name: ShortText
    """Name of the ConfigMap."""


class PodVolume(Block):
    """A further volume of a pod, of the kinds that Pod Security `restricted` admits."""

    name: PoolName
    """Name of the volume."""
    persistent_volume_claim: ClaimSource | None = None
    """A claim."""
    empty_dir: EmptyDirSource | None = None
    """A fresh folder."""
    secret: SecretSource | None = None
    """A Secret."""
    config_map: ConfigMapSource | None = None
    """A ConfigMap."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """One kind of volume."""
        kinds = [self.persistent_volume_claim, self.empty_dir, self.secret, self.config_map]
        if sum(kind is not None for kind in kinds) != 1:
            yield "name", "needs exactly one of persistentVolumeClaim, emptyDir, secret, configMap beside it"


class VolumeMount(Block):
    """Where the main container sees a volume."""

    name: PoolName
    """Name of the volume."""
    mount_path: Path_
    """Absolute path in the container."""
    sub_path: Path_ | None = None
    """Folder of the volume instead of its root."""
    read_only: bool = False
    """Mount it read-only."""


class SecretName(Block):
    """A Secret in the run's namespace."""

    name: ShortText
    """Its name."""


class PodTemplateSpec(Block):
    """What may be said about a role's pods; merged into the operator's template, lists by their key."""

    image: Annotated[str, StringConstraints(max_length=512)] | None = None
    """Container image instead of the chart's."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When to pull the image."""
    image_pull_secrets: list[SecretName] = Field([], max_length=16, json_schema_extra=list_map("name"))
    """Secrets for pulling the image."""
    labels: StringMap = Field({})
    """Labels of the workload and its pods; queueing labels of Kueue go on the workload alone."""
    annotations: StringMap = Field({})
    """Annotations of the workload and its pods."""
    node_selector: StringMap = Field({})
    """Node labels a pod needs."""
    tolerations: list[Toleration] = Field([], max_length=32)
    """Taints a pod tolerates."""
    affinity: FreeForm | None = None
    """Kubernetes' affinity, passed through."""
    resources: Resources = Resources()
    """Requests and limits of the main container."""
    env: list[EnvVar] = Field([], max_length=64, json_schema_extra=list_map("name"))
    """Environment variables of the main container."""
    volumes: list[PodVolume] = Field([], max_length=32, json_schema_extra=list_map("name"))
    """Further volumes of the pod."""
    volume_mounts: list[VolumeMount] = Field([], max_length=32, json_schema_extra=list_map("mountPath"))
    """Where the main container mounts them."""
    runtime_class_name: ShortText | None = None
    """Kubernetes' runtimeClassName, as `nvidia`."""
    scheduler_name: ShortText | None = None
    """Scheduler, as `volcano`."""
    priority_class_name: ShortText | None = None
    """Priority class."""
    termination_grace_period_seconds: int = Field(300, ge=0, le=86_400)
    """How long a pod may take to finish its step or its groups after SIGTERM."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """Our own labels and annotations stay ours."""
        for field, given in (("labels", self.labels), ("annotations", self.annotations)):
            if taken := [key for key in given if key.startswith(RESERVED)]:
                yield (
                    field,
                    f"hold {', '.join(taken)}; what is under {' and '.join(RESERVED)} is the operator's own,"
                    " so choose another prefix",
                )
