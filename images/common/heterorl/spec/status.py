"""The status of a run, as reported by the operator.

Writing is strict, as everywhere. Reading is not: another version of the operator may have written the status, and what
this one does not understand must cost no more than itself. `RunStatus.read` ignores unknown fields and leaves out what
is invalid, field by field and item by item.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel

from heterorl.spec.base import Block, PoolName, ShortText, list_map

_LENIENT = "lenient"
"""Validation context: leave out what is invalid."""
_MESSAGE_BYTES = 32768  # the API server's bound of a condition's message, in characters
CONDITION_TYPES = (
    "Ready",
    "StorageReady",
    "Prepared",
    "LearnerReady",
    "SamplersAvailable",
    "Progressing",
    "Succeeded",
    "Failed",
    "Suspended",
)


def keep_end(text: str, limit: int) -> str:
    """The text in at most `limit` bytes of UTF-8: its beginning and, longer, its end, where the cause stands."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= limit:
        return encoded.decode()
    head = limit // 4
    tail = limit - head - len(" … ".encode())
    return f"{encoded[:head].decode(errors='ignore')} … {encoded[-tail:].decode(errors='ignore')}"


def _rfc3339(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time needs its zone, as 2026-01-31T12:00:00Z")
    return text


Moment = Annotated[
    str,
    StringConstraints(max_length=64),
    AfterValidator(_rfc3339),
    Field(json_schema_extra={"format": "date-time"}),
]
Count = Annotated[int, Field(ge=0)]
VersionName = Annotated[str, StringConstraints(max_length=32)]
State = Literal["Pending", "Preparing", "Running", "Suspended", "Succeeded", "Failed"]
Message = Annotated[
    str,
    BeforeValidator(lambda text: keep_end(text, _MESSAGE_BYTES) if isinstance(text, str) else text),
    StringConstraints(max_length=_MESSAGE_BYTES),
]


class StatusBlock(Block):
    """One mapping of the status, strict when it is made and lenient when it is read."""

    if_unreadable: ClassVar[dict[str, str]] = {}
    """What stands for a required field, by its name, that is missing or invalid."""

    @classmethod
    def read(cls, tree: object) -> Self:
        """What this version understands of a mapping that another one may have written; never raises for a status."""
        return cls.model_validate(tree if isinstance(tree, dict) else {}, context=_LENIENT)

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_known(cls, tree: Any, info: ValidationInfo) -> Any:
        if info.context != _LENIENT or not isinstance(tree, dict):
            return tree
        known = {to_camel(name): name for name in cls.model_fields}
        given = {known.get(key, key): value for key, value in tree.items()}
        return {**cls.if_unreadable, **{name: given[name] for name in cls.model_fields if name in given}}

    @field_validator("*", mode="wrap")
    @classmethod
    def _or_nothing(cls, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        if info.context != _LENIENT:
            return validate(value)
        name = info.field_name or ""
        items = [item for item in value if _is_valid(validate, [item])] if isinstance(value, list) else value
        if _is_valid(validate, items):
            return validate(items)
        if name in cls.if_unreadable:
            return cls.if_unreadable[name]
        if cls.model_fields[name].is_required():
            return validate(value)  # the block as a whole is of no use
        return cls.model_fields[name].get_default(call_default_factory=True)


def _is_valid(validate: ValidatorFunctionWrapHandler, value: object) -> bool:
    try:
        validate(value)
    except ValidationError:
        return False
    return True


class Condition(StatusBlock):
    """A condition, in the standard form of Kubernetes."""

    # Its type and status are what counts: that a run has ended must not be forgotten over the rest.
    if_unreadable: ClassVar[dict[str, str]] = {
        "reason": "Unreadable",
        "message": "written by another version of the operator",
        "last_transition_time": "1970-01-01T00:00:00Z",
    }

    type: Annotated[str, StringConstraints(min_length=1, max_length=316)]
    """Ready, StorageReady, Prepared, LearnerReady, SamplersAvailable, Progressing, Succeeded, Failed or Suspended."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    reason: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    """Reason for the status, in CamelCase."""
    message: Message
    """Explanation for people, with what to do."""
    last_transition_time: Moment
    """When the status last changed."""
    observed_generation: Count | None = None
    """Generation of the spec that the condition was computed from."""


class LearnerStatus(StatusBlock):
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


class SamplerStatus(StatusBlock):
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


class EvaluationStatus(StatusBlock):
    """Mean accuracy over the evaluation datasets."""

    best: float | None = None
    """Best accuracy so far."""
    last: float | None = None
    """Latest accuracy."""
    gap: float | None = None
    """Best minus latest accuracy."""
    failed_steps: list[Count] = Field([], max_length=256)
    """Steps whose evaluation failed and is not retried."""


class RunStatus(StatusBlock):
    """Observed state of a run."""

    observed_generation: Count | None = None
    """Generation of the spec that this status was computed from."""
    state: State | None = None
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
    resumes: Count | None = None
    """`failurePolicy.resumes` when the run ended, or now; a failed run is resumed once the spec's exceeds it."""

    @field_validator("conditions", mode="before")
    @classmethod
    def _of_known_types(cls, conditions: Any, info: ValidationInfo) -> Any:
        """So that there are never too many to read."""
        if info.context != _LENIENT or not isinstance(conditions, list):
            return conditions
        return [each for each in conditions if isinstance(each, dict) and each.get("type") in CONDITION_TYPES]
