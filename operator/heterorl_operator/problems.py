"""What stands in a run's way: a reason for conditions and events, and a sentence that says what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Problem(NamedTuple):
    """A condition's reason and message."""

    reason: str
    message: str


@dataclass(frozen=True)
class ObjectProblem:
    """An object that could not be brought to its desired state."""

    kind: str
    name: str
    cause: Problem


NEEDS_ACTION = frozenset(
    {
        "ClaimLost",
        "ClaimNotFound",
        "ClaimPending",
        "Crashed",
        "FailedCreate",
        "Forbidden",
        "ImagePullFailed",
        "InvalidPodTemplate",
        "NameConflict",
        "OOMKilled",
        "PodConfigInvalid",
        "QuotaExceeded",
        "Refused",
        "ResizeRefused",
        "SiteError",
        "Stalled",
        "Unschedulable",
        "VolumeInUse",
        "WeightsRefused",
    }
)
"""Reasons that do not resolve by themselves: each is posted as an event, and is shown before the others."""
