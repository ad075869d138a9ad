"""Names of what the operator deals with: kinds and where the API server keeps them, and runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from heterorl.spec.crd import GROUP, PLURAL, VERSION
from heterorl.spec.run import KIND


class RunKey(NamedTuple):
    """A run."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class ResourceKind:
    """A namespaced kind."""

    name: str
    group: str
    version: str
    plural: str

    @property
    def api_version(self) -> str:
        """As in a manifest: `apps/v1`, or `v1` for the core group."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        """Path of an object, or of all objects of a namespace, or of all there are."""
        root = f"/apis/{self.group}" if self.group else "/api"
        parts = [root, self.version, *(["namespaces", namespace] if namespace else []), self.plural, name, subresource]
        return "/".join(part for part in parts if part)


RUN = ResourceKind(KIND, GROUP, VERSION, PLURAL)
CONFIG_MAP = ResourceKind("ConfigMap", "", "v1", "configmaps")
CLAIM = ResourceKind("PersistentVolumeClaim", "", "v1", "persistentvolumeclaims")
SERVICE = ResourceKind("Service", "", "v1", "services")
JOB = ResourceKind("Job", "batch", "v1", "jobs")
STATEFUL_SET = ResourceKind("StatefulSet", "apps", "v1", "statefulsets")
DEPLOYMENT = ResourceKind("Deployment", "apps", "v1", "deployments")
POD = ResourceKind("Pod", "", "v1", "pods")
EVENT = ResourceKind("Event", "", "v1", "events")

CHILDREN = (CONFIG_MAP, CLAIM, SERVICE, JOB, STATEFUL_SET, DEPLOYMENT)
"""What the operator makes for a run."""
LABELLED = (*CHILDREN, POD)
"""What carries the run's label and is watched by it."""

BY_NAME = {kind.name: kind for kind in (RUN, *LABELLED)}
