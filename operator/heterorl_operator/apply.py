"""Applies a run's objects and reports what prevents it.

An object is written only when it is rendered differently than at its last apply, or when it was changed since. It is
never taken from another owner, neither another object nor another operator.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from heterorl.kubernetes.names import HASH_ANNOTATION, Object, with_hash
from heterorl_operator import metrics
from heterorl_operator.cache import (
    OPERATOR_ANNOTATION,
    CachedChild,
    CachedRun,
    ObjectCache,
    belongs_to,
    child_of,
    spec_version_of,
)
from heterorl_operator.client import Api, Conflict, Forbidden, Invalid, NotFound, Transient
from heterorl_operator.problems import ObjectProblem, Problem
from heterorl_operator.resources import (
    BY_NAME,
    CLAIM,
    CONFIG_MAP,
    DEPLOYMENT,
    JOB,
    RUN,
    STATEFUL_SET,
    ResourceKind,
    RunKey,
)

log = logging.getLogger(__name__)

MANAGER_PREFIX = "heterorl-operator/"

_REFUSED_S = 300.0
"""After this long a refused object is tried again: what refused it, as a webhook, may have changed."""
_MOUNTED = (CONFIG_MAP.name, CLAIM.name)
"""Kinds that a run's pods mount; they are applied first."""
_WORKLOADS = (JOB.name, STATEFUL_SET.name, DEPLOYMENT.name)
_TAKEN = ("NameConflict", "Terminating")
"""Reasons of an object whose name is another owner's."""
_UNSEEN_S = 60.0
"""What no watch has reported this long after its apply is gone, or lost its label."""


class ManagedByAnotherOperator(Exception):
    """Another operator manages this run's objects; `operator` is its field manager."""

    def __init__(self, operator: str) -> None:
        self.operator = operator
        super().__init__(operator)


@dataclass(frozen=True, slots=True)
class _Applied:
    """What we know of our last apply of an object."""

    rendered: str
    spec_version: str
    resource_version: int
    at: float
    """Monotonic seconds."""


@dataclass(frozen=True, slots=True)
class _Refused:
    """An object that the API server refused."""

    rendered: str
    problem: ObjectProblem
    at: float
    """Monotonic seconds."""


class Applier:
    """Applies the objects of runs. Safe to use from several threads, one run in one of them."""

    def __init__(
        self, api: Api, cache: ObjectCache, *, take_over: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`cache` gets what is written before the watches report it. `take_over`: take another operator's runs."""
        self._cache = cache
        self._api, self._take_over, self._clock = api, take_over, clock
        self._lock = threading.Lock()
        self._applied: dict[RunKey, dict[tuple[str, str], _Applied]] = {}
        self._refused: dict[RunKey, dict[tuple[str, str], _Refused]] = {}

    def apply(
        self,
        run: CachedRun,
        desired: Iterable[Object],
        known: Mapping[tuple[str, str], CachedChild],
        *,
        first_pass: bool = False,
    ) -> list[ObjectProblem]:
        """Write what needs writing; the problems met. ManagedByAnotherOperator before anything is written.

        `first_pass`: an object whose annotation says that it was rendered like this is left alone for now, though
        it may have been edited while no operator ran. It does not count as applied: the next apply writes it.

        Raises ApiError when it should be retried; what was written until then is remembered.
        """
        self.check(known)
        problems: list[ObjectProblem] = []
        for each in desired:
            place = each["kind"], each["metadata"]["name"]
            if any(problem.kind in _MOUNTED and problem.cause.reason in _TAKEN for problem in problems) and (
                each["kind"] in _WORKLOADS and place not in known
            ):
                continue  # its pods would mount what is another owner's
            problem = self._apply_one(run, self._signed(each), known, first_pass)
            if problem:
                problems.append(problem)
        return problems

    def delete(self, run: CachedRun, child: CachedChild) -> ObjectProblem | None:
        """Delete an object of the run; the problem if the operator may not."""
        try:
            self._api.delete(BY_NAME[child.kind], run.key.namespace, child.name, child.uid)
        except Forbidden as error:
            return ObjectProblem(child.kind, child.name, forbidden(f"delete {child.kind} {child.name}", error))
        return None

    def delete_run(self, run: CachedRun) -> None:
        """Delete the run itself, whose record has been kept long enough; what it owns goes with it."""
        self._api.delete(RUN, run.key.namespace, run.key.name, run.uid)

    def check(self, known: Mapping[tuple[str, str], CachedChild]) -> None:
        """ManagedByAnotherOperator if one of a run's objects is another operator's."""
        for child in known.values():
            self._check_operator(child)

    def forget(self, key: RunKey) -> None:
        """The run is gone."""
        with self._lock:
            for memory in (self._applied, self._refused):
                memory.pop(key, None)

    def object_deleted(self, key: RunKey, kind: str, name: str) -> None:
        """An object of the run, or the run itself, was deleted."""
        if kind == RUN.name:
            return self.forget(key)
        with self._lock:
            for memory in (self._applied, self._refused):
                memory.get(key, {}).pop((kind, name), None)

    def _signed(self, desired: Object) -> Object:
        metadata = desired["metadata"]
        annotations = {**metadata.get("annotations", {}), OPERATOR_ANNOTATION: self._api.manager}
        return with_hash({**desired, "metadata": {**metadata, "annotations": annotations}})

    # ── one object ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _apply_one(
        self, run: CachedRun, desired: Object, known: Mapping[tuple[str, str], CachedChild], first_pass: bool
    ) -> ObjectProblem | None:
        kind, name = BY_NAME[desired["kind"]], desired["metadata"]["name"]
        place, rendered = (kind.name, name), desired["metadata"]["annotations"][HASH_ANNOTATION]
        child = known.get(place)
        with self._lock:
            last = self._applied.get(run.key, {}).get(place)
            refused = self._refused.get(run.key, {}).get(place)
        if refused and refused.rendered == rendered and self._clock() - refused.at < _REFUSED_S:
            return refused.problem  # it was refused, and has not changed
        if child and belongs_to(child, run) and (kind is JOB or (first_pass and child.rendered == rendered)):
            return None  # a Job is made once, never changed
        if last and last.rendered == rendered and not self._has_drifted(child, last):
            return None
        try:
            if child:
                self._check_owner(run, child)
            elif not last and kind is not JOB:  # whose creation finds out by itself
                self._check_name(run, kind, name)
            outlived = child is not None and child.owner_uid is None
            answer = self._create(run, desired) if kind is JOB else self._write(kind, desired, force=outlived)
        except _NotOurs as error:
            return ObjectProblem(kind.name, name, error.cause)
        except (Invalid, Forbidden, NotFound) as error:
            return self._problem(run.key, place, rendered, error)
        except Transient as error:
            if error.status < 500:
                raise  # throttled or unreachable, as it would be for the next object
            problem = f"the API server could not write {kind.name} {name}: {error}; it is retried"
            return ObjectProblem(kind.name, name, Problem("ApiServerError", problem))
        with self._lock:
            version = int(answer["metadata"]["resourceVersion"])
            applied = _Applied(rendered, spec_version_of(kind.name, answer), version, self._clock())
            self._applied.setdefault(run.key, {})[place] = applied
            self._refused.get(run.key, {}).pop(place, None)
        self._cache.put(kind.name, answer)  # so that the watch's event does not count as new
        metrics.APPLIES.labels(kind.name).inc()
        return None

    def _create(self, run: CachedRun, job: Object) -> Object:
        try:
            return self._api.create(JOB, job)
        except Conflict:
            if not (found := self._check_name(run, JOB, job["metadata"]["name"])):
                raise
            return found  # the run's, and not in the cache yet

    def _write(self, kind: ResourceKind, desired: Object, *, force: bool) -> Object:
        try:
            return self._api.apply(kind, desired, force=force or self._take_over)
        except Conflict as error:
            # The server names the managers that hold the fields: manual edits are reverted, another operator's objects
            # are left alone.
            message = str(error)
            if MANAGER_PREFIX in message and f'"{self._api.manager}"' not in message:
                start = message.index(MANAGER_PREFIX)
                raise ManagedByAnotherOperator(message[start:].split('"')[0]) from error
            log.info("%s %s was edited and is reverted: %s", kind.name, desired["metadata"]["name"], message)
            return self._api.apply(kind, desired, force=True)

    def _check_operator(self, child: CachedChild) -> None:
        """Raise if another operator manages the object; a claim that outlived its run, and its operator, is free."""
        foreign = child.operator is not None and child.operator != self._api.manager
        if foreign and child.operator and child.owner_uid and not self._take_over:
            raise ManagedByAnotherOperator(child.operator)

    def _check_name(self, run: CachedRun, kind: ResourceKind, name: str) -> Object | None:
        """The object of that name, if there is one and it is the run's."""
        if found := self._api.get(kind, run.key.namespace, name):
            self._check_owner(run, child_of(kind.name, found))
        return found

    def _check_owner(self, run: CachedRun, child: CachedChild) -> None:
        self._check_operator(child)
        if not belongs_to(child, run):
            raise _NotOurs(child, run)

    def _has_drifted(self, child: CachedChild | None, last: _Applied) -> bool:
        """Whether it was changed since; that no watch has reported it yet does not mean so, for a while."""
        if child is None:
            return self._clock() - last.at > _UNSEEN_S
        return child.resource_version > last.resource_version and child.spec_version != last.spec_version

    def _problem(
        self, key: RunKey, place: tuple[str, str], rendered: str, error: Invalid | Forbidden | NotFound
    ) -> ObjectProblem:
        kind, name = place
        problem = ObjectProblem(kind, name, _problem_for(kind, name, error))
        if isinstance(error, Invalid):
            with self._lock:
                self._refused.setdefault(key, {})[place] = _Refused(rendered, problem, self._clock())
        return problem


def _problem_for(kind: str, name: str, error: Invalid | Forbidden | NotFound) -> Problem:
    """Why an object cannot be written, and what to do."""
    what, message = f"{kind} {name}", str(error)
    if isinstance(error, NotFound):
        return Problem("NamespaceGone", f"{what} cannot be created: {message}")
    if isinstance(error, Forbidden) and re.search('User ".+" cannot ', message):  # a missing right
        return forbidden(f"write {what}", message)
    if "exceeded quota" in message:
        return Problem("QuotaExceeded", f"{what} cannot be created: {message}; raise the quota or ask for less")
    if kind == CLAIM.name:
        way_out = "set exchange.volume back to what it was, or to what its storage class allows"
        return Problem("Refused", f"the cluster refuses {what}: {message}; {way_out}")
    if isinstance(error, Invalid):
        way_out = "correct the podTemplate or the field it names"
        return Problem("InvalidPodTemplate", f"the API server refuses {what}: {message}; {way_out}")
    way_out = "change what it names, or have the policy changed"
    return Problem("Refused", f"a policy of the cluster refuses {what}: {message}; {way_out}")


def forbidden(doing: str, error: object) -> Problem:
    """The operator lacks a right."""
    way_out = "give its service account the chart's Role in this namespace (watch.namespaces)"
    return Problem("Forbidden", f"the operator may not {doing}: {error}; {way_out}")


class _NotOurs(Exception):
    """The name is taken."""

    def __init__(self, child: CachedChild, run: CachedRun) -> None:
        there = f"there is a {child.kind} {child.name} already, and it has"
        if child.owner_uid and child.run == run.key.name:
            waits = f"{there} an earlier run of this name; the cluster is deleting it"
            self.cause = Problem("Terminating", waits)
            return
        whose = f"another object (uid {child.owner_uid})" if child.owner_uid else "no owner"
        way_out = "the operator does not touch it: delete it, or give the run another name"
        self.cause = Problem("NameConflict", f"{there} {whose}; {way_out}")
