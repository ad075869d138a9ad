"""The status of a run, as reported by the operator."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from heterorl.spec.base import Block, PoolName, ShortText, list_map

Moment = Annotated[str, StringConstraints(max_length=64), Field(json_schema_extra={"format": "date-time"})]
Count = Annotated[int, Field(ge=0)]
VersionName = Annotated[str, StringConstraints(max_length=32)]


class Condition(Block):
    """A condition, in the standard form of Kubernetes."""

    type: Annotated[str, StringConstraints(min_length=1, max_length=316)]
    """Ready, StorageReady, Prepared, LearnerReady, SamplersAvailable, Progressing, Succeeded, Failed or Suspended."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    reason: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    """Reason for the status, in CamelCase."""
    message: Annotated[str, StringConstraints(max_length=32768)]
    """Explanation for people, with what to do."""
    last_transition_time: Moment
    """When the status last changed."""
    observed_generation: Count | None = None
    """Generation of the spec that the condition was computed from."""


class LearnerStatus(Block):
    """Progress of the learner."""

    step: Count | None = None
    """Optimizer steps completed."""
    weights_version: VersionName | None = None
    """Newest published version of the weights."""
    checkpoint_step: Count | None = None
    """Step of the newest durable checkpoint."""
    restarts: Count | None = None
    """Crashes counted against the learner's restart budget."""
    reward: float | None = None
    """Mean reward of the last step."""
    lag: float | None = None
    """Mean lag of the last step's rollouts, in steps."""


class SamplerStatus(Block):
    """Status of a pool of samplers."""

    name: PoolName
    """Name of the pool."""
    desired: Count | None = None
    """Desired number of replicas at this time, according to availability."""
    ready: Count | None = None
    """Number of replicas that are ready."""
    weights_version: VersionName | None = None
    """Oldest version of the weights in use by its replicas."""
    rollouts: Count | None = None
    """Number of groups of completions written."""
    rejected: Count | None = None
    """Number of weights versions that its samplers rejected."""


class EvaluationStatus(Block):
    """Mean accuracy over the evaluation datasets."""

    best: float | None = None
    """Best accuracy so far."""
    last: float | None = None
    """Latest accuracy."""
    gap: float | None = None
    """Best minus latest accuracy."""
    failed_steps: list[Count] = Field([], max_length=256)
    """Steps whose evaluation failed and is not retried."""


class RunStatus(Block):
    """Observed state of a run."""

    observed_generation: Count | None = None
    """Generation of the spec that this status was computed from."""
    state: Literal["Pending", "Preparing", "Running", "Suspended", "Succeeded", "Failed"] | None = None
    """Summary of the conditions in one word."""
    conditions: list[Condition] = Field([], max_length=16, json_schema_extra=list_map("type"))
    """Conditions of the run."""
    learner: LearnerStatus | None = None
    """Progress of the learner."""
    samplers: list[SamplerStatus] = Field([], max_length=32, json_schema_extra=list_map("name"))
    """Status of each sampler pool."""
    samplers_ready: ShortText | None = None
    """Ready and desired samplers over all pools, such as 3/4."""
    evaluation: EvaluationStatus | None = None
    """Results of the evaluation."""
    start_time: Moment | None = None
    """When the run first started."""
    suspended_since: Moment | None = None
    """When the run was suspended; not set while it runs."""
    suspended_seconds: Annotated[float, Field(ge=0)] | None = None
    """Total time of earlier suspensions, which availability does not count."""
    completion_time: Moment | None = None
    """When the run ended."""
