"""What the operator reports in a run's status."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from heterorl.spec.base import Block, PoolName, ShortText, list_map

Moment = Annotated[str, StringConstraints(max_length=64), Field(json_schema_extra={"format": "date-time"})]
Count = Annotated[int, Field(ge=0)]
VersionName = Annotated[str, StringConstraints(max_length=32)]


class Condition(Block):
    """Kubernetes' condition."""

    type: Annotated[str, StringConstraints(min_length=1, max_length=316)]
    """Ready, StorageReady, Prepared, LearnerReady, SamplersAvailable, Progressing, Succeeded, Failed or Suspended."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    """Why, in one word."""
    message: Annotated[str, StringConstraints(max_length=32768)]
    """Why, in a sentence that says what to do."""
    last_transition_time: Moment
    """When status last changed."""
    observed_generation: Count | None = None
    """Generation of the spec it was judged on."""


class LearnerStatus(Block):
    """How far the learner is."""

    step: Count | None = None
    """Optimizer steps done."""
    weights_version: VersionName | None = None
    """Newest published weights."""
    checkpoint_step: Count | None = None
    """Step of the newest durable checkpoint."""
    restarts: Count | None = None
    """Crashes charged to the learner's budget."""
    reward: float | None = None
    """Mean reward of the last step."""
    lag: float | None = None
    """Mean lag of the last step's rollouts, in steps."""


class SamplerStatus(Block):
    """One pool of samplers."""

    name: PoolName
    """Name of the pool."""
    desired: Count | None = None
    """Replicas that availability asks for now."""
    ready: Count | None = None
    """Replicas that are ready."""
    weights_version: VersionName | None = None
    """Oldest weights among its replicas."""
    rollouts: Count | None = None
    """Groups of completions written."""
    rejected: Count | None = None
    """Weights versions that its samplers refused."""


class EvaluationStatus(Block):
    """Mean accuracy over the evaluation sets."""

    best: float | None = None
    """Best so far."""
    last: float | None = None
    """Latest."""
    gap: float | None = None
    """Best minus last."""
    failed_steps: list[Count] = Field([], max_length=256)
    """Steps whose evaluation failed and is not tried again."""


class RunStatus(Block):
    """The state of a run."""

    observed_generation: Count | None = None
    """Generation of the spec this status is about."""
    state: Literal["Pending", "Preparing", "Running", "Suspended", "Succeeded", "Failed"] | None = None
    """The conditions in one word."""
    conditions: list[Condition] = Field([], max_length=16, json_schema_extra=list_map("type"))
    """Conditions."""
    learner: LearnerStatus | None = None
    """The learner."""
    samplers: list[SamplerStatus] = Field([], max_length=32, json_schema_extra=list_map("name"))
    """Sampler pools."""
    samplers_ready: ShortText | None = None
    """Ready of desired samplers over all pools, as 3/4."""
    evaluation: EvaluationStatus | None = None
    """Evaluation."""
    start_time: Moment | None = None
    """When the run first started."""
    suspended_since: Moment | None = None
    """When it was suspended; absent while it runs."""
    suspended_seconds: Annotated[float, Field(ge=0)] | None = None
    """How long it was suspended in all, before that; availability does not count this time."""
    completion_time: Moment | None = None
    """When it ended."""
