"""What a manifest may set on pods: an allow-list of Kubernetes' fields, each with its Kubernetes type."""

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
"""Prefixes of labels and annotations that belong to the operator."""


class Toleration(Block):
    """Toleration of a node taint."""

    key: ShortText | None = None
    """Taint key; if not set, operator Exists matches all keys."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How the value is compared."""
    value: ShortText | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; if not set, all effects match."""
    toleration_seconds: int | None = Field(None, ge=0)
    """How long NoExecute is tolerated."""


class Resources(Block):
    """Resource requests and limits."""

    requests: StringMap = Field({})
    """Requested quantities, such as `cpu: "2"`."""
    limits: StringMap = Field({})
    """Limits, such as `nvidia.com/gpu: "1"`."""


class KeyReference(Block):
    """A key of a Secret or ConfigMap in the run's namespace."""

    name: ShortText
    """Name of the Secret or ConfigMap."""
    key: ShortText
    """Key in the Secret or ConfigMap."""
    optional: bool = False
    """Start the pod even if the Secret, ConfigMap or key does not exist."""


class FieldReference(Block):
    """A field of the pod (downward API)."""

    field_path: ShortText
    """Path of the field, such as `status.podIP`."""


class EnvSource(Block):
    """Source of the value of an environment variable."""

    secret_key_ref: KeyReference | None = None
    """A key of a Secret."""
    config_map_key_ref: KeyReference | None = None
    """A key of a ConfigMap."""
    field_ref: FieldReference | None = None
    """A field of the pod."""


class EnvVar(Block):
    """An environment variable."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=253)]
    """Name of the variable."""
    value: Text | None = None
    """Value of the variable."""
    value_from: EnvSource | None = None
    """Source of the value, instead of value."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """One source of the value."""
        if self.value is not None and self.value_from:
            yield "value", "conflicts with valueFrom; keep one of them"


class ClaimSource(Block):
    """A PersistentVolumeClaim as a volume."""

    claim_name: ShortText
    """Name of the claim."""
    read_only: bool = False
    """Mount it read-only."""


class EmptyDirSource(Block):
    """An empty directory that lives as long as the pod."""

    medium: Literal["", "Memory"] = ""
    """Memory uses RAM (tmpfs) instead of the node's disk."""
    size_limit: Quantity | None = None
    """Maximum size, such as 8Gi."""


class SecretSource(Block):
    """A Secret as a volume."""

    secret_name: ShortText
    """Name of the Secret."""


class ConfigMapSource(Block):
    """A ConfigMap as a volume."""

    name: ShortText
    """Name of the ConfigMap."""


class PodVolume(Block):
    """An additional volume of a pod, of a type that the Pod Security standard `restricted` allows."""

    name: PoolName
    """Name of the volume."""
    persistent_volume_claim: ClaimSource | None = None
    """A PersistentVolumeClaim."""
    empty_dir: EmptyDirSource | None = None
    """An empty directory."""
    secret: SecretSource | None = None
    """A Secret."""
    config_map: ConfigMapSource | None = None
    """A ConfigMap."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """One kind of volume."""
        kinds = [self.persistent_volume_claim, self.empty_dir, self.secret, self.config_map]
        if sum(kind is not None for kind in kinds) != 1:
            yield "name", "requires exactly one of persistentVolumeClaim, emptyDir, secret, configMap beside it"


class VolumeMount(Block):
    """Where a volume is mounted in the main container."""

    name: PoolName
    """Name of the volume."""
    mount_path: Path_
    """Absolute path in the container."""
    sub_path: Path_ | None = None
    """Path in the volume to mount instead of its root."""
    read_only: bool = False
    """Mount it read-only."""


class SecretName(Block):
    """A Secret in the run's namespace."""

    name: ShortText
    """Name of the Secret."""


class PodTemplateSpec(Block):
    """Settings of a role's pods, merged into the operator's pod template; lists are merged by key."""

    image: Annotated[str, StringConstraints(max_length=512)] | None = None
    """Container image, instead of the chart's."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When to pull the image."""
    image_pull_secrets: list[SecretName] = Field([], max_length=16, json_schema_extra=list_map("name"))
    """Secrets used to pull the image."""
    labels: StringMap = Field({})
    """Labels of the workload and its pods; Kueue's queue labels are set on the workload only."""
    annotations: StringMap = Field({})
    """Annotations of the workload and its pods."""
    node_selector: StringMap = Field({})
    """Labels that a node must have."""
    tolerations: list[Toleration] = Field([], max_length=32)
    """Taints that the pods tolerate."""
    affinity: FreeForm | None = None
    """Affinity, passed through unchanged."""
    resources: Resources = Resources()
    """Resource requests and limits of the main container."""
    env: list[EnvVar] = Field([], max_length=64, json_schema_extra=list_map("name"))
    """Environment variables of the main container."""
    volumes: list[PodVolume] = Field([], max_length=32, json_schema_extra=list_map("name"))
    """Additional volumes of the pods."""
    volume_mounts: list[VolumeMount] = Field([], max_length=32, json_schema_extra=list_map("mountPath"))
    """Where the main container mounts the additional volumes."""
    runtime_class_name: ShortText | None = None
    """RuntimeClass of the pods, such as `nvidia`."""
    scheduler_name: ShortText | None = None
    """Scheduler of the pods, such as `volcano`."""
    priority_class_name: ShortText | None = None
    """PriorityClass of the pods."""
    termination_grace_period_seconds: int = Field(300, ge=0, le=86_400)
    """How long a pod may take after SIGTERM to finish its optimizer step or its groups."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """Labels and annotations of the operator cannot be set."""
        for field, given in (("labels", self.labels), ("annotations", self.annotations)):
            if taken := [key for key in given if key.startswith(RESERVED)]:
                yield (
                    field,
                    f"contain {', '.join(taken)}, but {' and '.join(RESERVED)} are reserved for the operator;"
                    " choose another prefix",
                )
