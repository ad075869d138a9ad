"""What a pod's state means for its run, in words that say what to do."""

from __future__ import annotations

from typing import NamedTuple

from heterorl.exit_codes import USER_ERROR
from heterorl_operator.cache import CachedPod

_PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_CLAIM = "persistentvolumeclaim"
_ASKED_TO_GO = (0, 143)
"""Exit codes that are no crash: it had nothing left to do, or was told to end."""


class Trouble(NamedTuple):
    """A condition's reason and message."""

    reason: str
    message: str


def trouble_of(pod: CachedPod) -> Trouble | None:
    """Why the pod does not run; None when it does, or is merely on its way."""
    if pod.deleting or pod.ready:
        return None
    if pod.unschedulable and _CLAIM not in pod.unschedulable.lower():  # a claim's trouble is told of the storage
        return Trouble(
            "Unschedulable",
            f"no node takes pod {pod.name}: {pod.unschedulable}; free or add a node that fits, or change the resources,"
            " nodeSelector and tolerations in its podTemplate (the run has to be suspended for that)",
        )
    reason, message = pod.waiting
    if reason in _PULL:
        return Trouble(
            "ImagePullFailed",
            f"pod {pod.name} cannot get its image: {message or reason}; check the image's name in the podTemplate or in"
            " the chart's values (images.*), and imagePullSecrets",
        )
    if reason in _CONFIG:
        return Trouble(
            "PodConfigInvalid",
            f"pod {pod.name} cannot start: {message or reason}; check the Secrets, ConfigMaps and volumes that its"
            " podTemplate and spec.credentials name",
        )
    if has_crashed(pod):
        ended = f"{pod.exit_reason or 'exited'} with code {pod.exit_code}"
        last = f"; its last lines: {pod.exit_message.strip()}" if pod.exit_message.strip() else ""
        return Trouble(
            "Crashed", f"pod {pod.name} {ended} ({pod.restarts} restarts); see `kubectl logs -p {pod.name}`{last}"
        )
    return None


def has_crashed(pod: CachedPod) -> bool:
    """Whether its container last ended by itself and not well; a pod that was taken away has not."""
    return pod.exit_code is not None and pod.exit_code not in _ASKED_TO_GO


def has_user_error(pod: CachedPod) -> bool:
    """Whether it ended with what a restart does not mend."""
    return pod.exit_code == USER_ERROR and not pod.ready


def is_given_up(pod: CachedPod, budget: int) -> bool:
    """Whether it crashed more often than the budget allows."""
    return has_crashed(pod) and not pod.ready and pod.restarts > budget
