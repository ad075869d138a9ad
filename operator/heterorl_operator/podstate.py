"""What the state of a pod, or of a workload without pods, means for its run, and what to do about it."""

from __future__ import annotations

from heterorl.exit_codes import SITE_ERROR
from heterorl_operator.cache import CachedPod
from heterorl_operator.problems import Problem

_PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_CLAIM = "persistentvolumeclaim"
_REGULAR_EXITS = (0, 143)
"""Exit codes of a container that finished, or was asked to leave."""


def problem_of(pod: CachedPod) -> Problem | None:
    """Why the pod does not run; None when it does, or is merely starting."""
    if pod.deleting or pod.ready:
        return None
    if pod.unschedulable and _CLAIM not in pod.unschedulable.lower():  # StorageReady reports on the claim
        return Problem(
            "Unschedulable",
            f"no node takes pod {pod.name}: {pod.unschedulable}; free or add a node that fits, or change the resources,"
            " nodeSelector and tolerations in its podTemplate (the run has to be suspended for that)",
        )
    reason, message = pod.waiting
    if reason in _PULL:
        return Problem(
            "ImagePullFailed",
            f"pod {pod.name} cannot get its image: {message or reason}; check the image's name in the podTemplate or in"
            " the chart's values (images.*), and imagePullSecrets",
        )
    if reason in _CONFIG:
        return Problem(
            "PodConfigInvalid",
            f"pod {pod.name} cannot start: {message or reason}; check the Secrets, ConfigMaps and volumes that its"
            " podTemplate and spec.credentials name",
        )
    return _exit_problem(pod) if has_crashed(pod) else None


def _exit_problem(pod: CachedPod) -> Problem:
    lines = f"; its last lines: {pod.exit_message.strip()}" if pod.exit_message.strip() else ""
    if is_out_of_memory(pod):
        return Problem(
            "OOMKilled",
            f"pod {pod.name} used more memory than it may and was killed ({pod.restarts} restarts); raise"
            f" resources.limits.memory in its podTemplate (the run has to be suspended for that), or use less{lines}",
        )
    if pod.exit_code == SITE_ERROR:
        return Problem(
            "SiteError",
            f"pod {pod.name} fails for its node's GPU, disk, memory or clock ({pod.restarts} restarts, with back-off);"
            f" repair or drain the node{lines}",
        )
    ended = f"{pod.exit_reason or 'exited'} with code {pod.exit_code}"
    return Problem(
        "Crashed", f"pod {pod.name} {ended} ({pod.restarts} restarts); see `kubectl logs -p {pod.name}`{lines}"
    )


def create_problem(kind: str, name: str, words: str) -> Problem:
    """Why a workload's controller cannot create its pods, in the API server's `words`."""
    if "exceeded quota" in words or "failed quota" in words:
        way_out = "raise the quota, or ask for less: replicas, or resources in the podTemplate"
        return Problem("QuotaExceeded", f"{kind} {name} cannot create its pods ({way_out}): {words}")
    way_out = "correct what this names in the podTemplate, create what is missing, or have the cluster's policy changed"
    return Problem("FailedCreate", f"{kind} {name} cannot create its pods ({way_out}): {words}")


def is_out_of_memory(pod: CachedPod) -> bool:
    """Whether its container was last ended for its memory."""
    return pod.exit_reason == "OOMKilled"


def has_crashed(pod: CachedPod) -> bool:
    """Whether its container last failed by itself; one that was asked to leave has not."""
    return pod.exit_code is not None and pod.exit_code not in _REGULAR_EXITS
