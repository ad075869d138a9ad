"""What the operator's tests are about: objects as an API server shows them, a run as the operator sees it, a small API.

`moment` 0 of every test is START, so that times are worked by hand.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import builders
from heterorl.spec.run import HeteroRLRun
from heterorl.spec.status import Condition, RunStatus
from heterorl_operator.cache import CachedChild, CachedPod, ObjectCache, child_of
from heterorl_operator.client import Conflict, NotFound
from heterorl_operator.context import RunContext
from heterorl_operator.resources import CLAIM, RUN, ResourceKind, RunKey

Object = dict[str, Any]

KEY = RunKey("lab", "run")
UID = "uid-of-run"
MANAGER = "heterorl-operator/ours/release"
START = 1_700_000_000.0
STARTED = "2023-11-14T22:13:20.000Z"
"""START as text."""
CREATED = "2023-11-14T22:13:20Z"
"""START as an API server writes it."""
EARLIER = "2023-11-14T22:13:10Z"
"""Ten seconds earlier."""


# ── objects ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def body(kind: str, name: str, version: int = 1, **fields: Any) -> Object:
    """An object of the run `run`, unless `run` says otherwise. `owner`: uid of its controller."""
    run, owner = fields.pop("run", KEY.name), fields.pop("owner", UID)
    metadata: Object = {
        "namespace": KEY.namespace,
        "name": name,
        "uid": f"uid-of-{name}",
        "resourceVersion": str(version),
    }
    metadata |= {"generation": 1, "creationTimestamp": CREATED, "labels": {"heterorl.dev/run": run} if run else {}}
    if owner:
        metadata["ownerReferences"] = [{"uid": owner, "controller": True}]
    metadata |= fields.pop("metadata", {})
    return {"kind": kind, "metadata": metadata, **fields}


def run_body(spec: Object | None = None, version: int = 1, **fields: Any) -> Object:
    """The HeteroRLRun itself."""
    metadata = {"uid": UID} | fields.pop("metadata", {})
    return body(RUN.name, KEY.name, version, run=None, owner=None, metadata=metadata, spec=spec or spec_of(), **fields)


def spec_of(**spec: Any) -> Object:
    """A spec with one pool `near`, unless it names others."""
    return {"samplers": [{"name": "near"}], **spec}


def pod_body(role: str, name: str = "pod", version: int = 1, *, pool: str = "", **fields: Any) -> Object:
    """A pod. `container`: what its status says of the main container; `status`: the rest."""
    container, status = fields.pop("container", None), fields.pop("status", {})
    labels = {
        "heterorl.dev/run": KEY.name,
        "heterorl.dev/role": role,
        **({"heterorl.dev/pool": pool} if pool else {}),
    }
    status = {"phase": "Running", **status}
    if container is not None:
        status["containerStatuses"] = [{"name": role, "state": {}, **container}]
    metadata = {"labels": labels, **fields.pop("metadata", {})}
    return body("Pod", name, version, metadata=metadata, status=status, **fields)


def pod(role: str, name: str = "pod", **fields: Any) -> CachedPod:
    """A pod as the cache has it."""
    cache = ObjectCache()
    cache.put("Pod", pod_body(role, name, **fields))
    return cache.pods(KEY)[0]


def ended(code: int, message: str = "", restarts: int = 1) -> Object:
    """A container that ended with that code and waits to be restarted."""
    last = {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed", "message": message}}
    return {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": last, "restartCount": restarts}


def children(*bodies: Object) -> dict[tuple[str, str], CachedChild]:
    """Objects by kind and name, as the cache has them."""
    return {(each["kind"], each["metadata"]["name"]): child_of(each["kind"], each) for each in bodies}


def job_end(kind: str) -> Object:
    """Status of a Job that ended so."""
    return {"conditions": [{"type": kind, "status": "True", "message": f"the Job is {kind}"}]}


def claim_body(phase: str = "Bound", **fields: Any) -> Object:
    """The run's own claim."""
    return body(CLAIM.name, "run-volume", status={"phase": phase}, **fields)


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def run_of(**spec: Any) -> HeteroRLRun:
    """The manifest."""
    return builders.run_of(KEY.name, metadata={"namespace": "lab"}, **spec_of(**spec))


def condition(kind: str, status: str, reason: str = "Because", since: str = STARTED, message: str = "") -> Condition:
    """A condition as it was written earlier."""
    return Condition.model_validate(
        {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": since}
    )


def context(at: float = 0.0, *, spec: Object | None = None, before: Object | None = None, **known: Any) -> RunContext:
    """A run `at` seconds after START. `before`: fields of the status written last."""
    claim = child_of(CLAIM.name, claim_body())
    facts: Object = {
        "uid": UID,
        "generation": 1,
        "children": {},
        "pods": [],
        "create_failures": {},
        "progress": None,
        "unreachable": "",
    }
    facts |= {"claim": claim, "now": START + at, "before": RunStatus(**(before or {}))}
    return RunContext(run=run_of(**(spec or {})), **{**facts, **known})


# ── an API server in memory ──────────────────────────────────────────────────────────────────────────────────────────
class FakeApi:
    """Keeps objects as an API server does: versions, generations, uids. `calls` has what was asked of it."""

    manager = MANAGER

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.calls: list[tuple[str, str, str]] = []
        self.before: Callable[[str, str, str], None] = lambda verb, kind, name: None
        """Called with each request before it is answered; may raise, or do what others do meanwhile."""
        self._versions = itertools.count(100)

    def put(self, body: Object) -> Object:
        """What somebody else writes; its version is a new one."""
        body["metadata"]["resourceVersion"] = str(next(self._versions))
        self.objects[body["kind"], body["metadata"]["name"]] = body
        return copy.deepcopy(body)

    def writes(self) -> list[tuple[str, str]]:
        """What was written: verb and `Kind/name`."""
        return [(verb, f"{kind}/{name}") for verb, kind, name in self.calls if verb not in ("get", "list")]

    def list(self, kind: ResourceKind, namespace: str | None, selector: str = "", **options: Any) -> Iterator[Object]:
        self._ask("list", kind, "")
        return iter([copy.deepcopy(each) for (of_kind, _), each in self.objects.items() if of_kind == kind.name])

    def get(self, kind: ResourceKind, namespace: str, name: str) -> Object | None:
        self._ask("get", kind, name)
        return copy.deepcopy(self.objects.get((kind.name, name)))

    def apply(self, kind: ResourceKind, desired: Object, *, force: bool = False) -> Object:
        name = desired["metadata"]["name"]
        self._ask("apply", kind, name)
        known = self.objects.get((kind.name, name))
        if known and all(known.get(part) == desired.get(part) for part in ("spec", "data")):
            return copy.deepcopy(known)
        return self._written(kind, desired, known)

    def create(self, kind: ResourceKind, desired: Object) -> Object:
        name = desired["metadata"]["name"]
        self._ask("create", kind, name)
        if (kind.name, name) in self.objects:
            raise Conflict(409, "AlreadyExists", f"{name} already exists")
        return self._written(kind, desired, None)

    def apply_status(self, kind: ResourceKind, namespace: str, name: str, status: Object, **_: Any) -> Object:
        self._ask("status", kind, name)
        if (kind.name, name) not in self.objects:
            raise NotFound(404, "NotFound", f"{name} not found")
        return self.put({**self.objects[kind.name, name], "status": status})

    def merge(self, kind: ResourceKind, namespace: str, name: str, patch: Object) -> Object:
        self._ask("merge", kind, name)
        if (kind.name, name) not in self.objects:
            raise NotFound(404, "NotFound", f"{name} not found")
        return self.put({**self.objects[kind.name, name], **patch})

    def delete(self, kind: ResourceKind, namespace: str, name: str, uid: str) -> None:
        self._ask("delete", kind, name)
        if (found := self.objects.get((kind.name, name))) and found["metadata"]["uid"] == uid:
            del self.objects[kind.name, name]

    def _ask(self, verb: str, kind: ResourceKind, name: str) -> None:
        self.calls.append((verb, kind.name, name))
        self.before(verb, kind.name, name)

    def _written(self, kind: ResourceKind, desired: Object, known: Object | None) -> Object:
        earlier: Object = known["metadata"] if known else {"uid": f"uid-{len(self.calls)}", "generation": 0}
        metadata = {"creationTimestamp": CREATED, **earlier, **desired["metadata"]}
        status = {"status": known["status"]} if known and "status" in known else {}
        return self.put(
            {**status, **copy.deepcopy(desired), "metadata": {**metadata, "generation": earlier["generation"] + 1}}
        )
