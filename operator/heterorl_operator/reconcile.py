"""One look at one run: what is desired, apply it, remove the rest, report. It may happen again, late, or twice."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from pydantic import ValidationError

from heterorl.kubernetes.manifests import Images, desired_state, evaluation_job
from heterorl.kubernetes.merge import Object
from heterorl.kubernetes.names import claim_name, evaluation_name, learner_name, prepare_name
from heterorl.kubernetes.pods import metrics_port
from heterorl.spec.run import HeteroRLRun
from heterorl.spec.status import RunStatus
from heterorl_operator.apply import Applier, ManagedByAnotherOperator, forbidden, is_of
from heterorl_operator.cache import CachedChild, CachedPod, CachedRun, Mark, ObjectCache, child_of, remains
from heterorl_operator.client import Api, Forbidden, NotFound
from heterorl_operator.conditions import ObjectProblem, refused, status_of, transitions
from heterorl_operator.events import Events
from heterorl_operator.learner_poller import ProgressPoller, Target
from heterorl_operator.lifecycle import Decision, RunContext, decide
from heterorl_operator.podstate import Trouble
from heterorl_operator.resources import CLAIM, DEPLOYMENT, JOB, RUN, ResourceKind
from heterorl_operator.workqueue import RunKey

log = logging.getLogger(__name__)

_FOREIGN_CLAIM_S = 10.0
"""How often to look at a claim that is not ours, which no watch brings, until it is bound."""
_LASTING = ("InvalidPodTemplate",)
"""Problems that do not go away by themselves."""


class Unfinished(Exception):
    """Something stood in the way that may go away by itself: try again after a while, and in `next_s` at the latest."""

    def __init__(self, message: str, next_s: float | None) -> None:
        self.next_s = next_s
        super().__init__(message)


class Reconciler:
    """Looks at runs; one run in one thread at a time."""

    def __init__(
        self,
        api: Api,
        store: ObjectCache,
        applier: Applier,
        progresses: ProgressPoller,
        events: Events,
        images: Images,
        hidden: Mapping[ResourceKind, str],
        look_again: Callable[[RunKey], None],
        look_later: Callable[[RunKey], None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`hidden`: kinds that the operator has no right to see, and the API server's words.

        `look_again` is called for a run that turns out to have changed during the look, `look_later` for one that is
        looked at for the first time: a second look, once no other run waits for its first, does what may wait. That is
        the status of a new run, and undoing what somebody did to a known one's objects before the operator's start.
        """
        self._api, self._store, self._applier = api, store, applier
        self._progresses, self._events, self._images = progresses, events, images
        self._hidden, self._look_again, self._look_later = hidden, look_again, look_later
        self._clock = clock
        self._uids: dict[RunKey, str] = {}  # of the runs looked at
        self._told: dict[RunKey, str] = {}  # the other operator that a run was found with

    def reconcile(self, key: RunKey) -> float | None:
        """Look at a run; seconds until time alone makes another look worthwhile.

        Raises Unfinished, or an ApiError, when it should be tried again.
        """
        run = self._store.run(key)
        if run is None or run.deleting:
            self._forget(key)
            return None
        is_new = self._uids.get(key) != run.uid
        if is_new:
            self._forget(key)  # another run may have had the name
            self._uids[key] = run.uid
        try:
            self._applier.check(self._store.children(key))  # no status for another operator's run, not even InvalidSpec
            return self._look(run, is_new)
        except ManagedByAnotherOperator as other:
            self._tell_of(run, other)
            return None
        except Forbidden as error:
            trouble = forbidden("do what this run needs", error)
            self._report(run, refused(_status(run), run.generation, trouble, self._clock()))
            raise Unfinished(trouble.message, None) from error

    def _look(self, run: CachedRun, is_new: bool) -> float | None:
        try:
            manifest = _parsed(run.manifest)
        except ValidationError as error:
            self._report(run, refused(_status(run), run.generation, _invalid(error), self._clock()))
            return None
        key, view = run.key, self._view(run, manifest)
        decision = decide(view)
        if decision.expired:
            self._api.delete(RUN, key.namespace, key.name, run.uid)
            return None
        problems = self._bring_about(run, view, decision, trusting=is_new)
        if is_new:
            self._look_later(key)
            if not view.before.conditions and not problems:
                # To the API server a status is as much work as all of the run's objects.
                return self._next_look(view, decision)
        decision = _without_impossible(view, decision, problems)
        self._progresses.want(key, _target(view, decision), at_rest=not decision.replicas.learner)
        self._report(run, status_of(view, decision, problems))
        next_s = self._next_look(view, decision)
        if passing := [problem for problem in problems if problem.trouble.reason not in _LASTING]:
            raise Unfinished(passing[0].trouble.message, next_s)
        return next_s

    def _forget(self, key: RunKey) -> None:
        self._applier.forget(key)
        self._progresses.forget(key)
        self._uids.pop(key, None)
        self._told.pop(key, None)

    # ── seeing ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def _view(self, run: CachedRun, manifest: HeteroRLRun) -> RunContext:
        # An earlier run of that name may not be cleared away yet: what it left says nothing about this one.
        children = {place: child for place, child in self._store.children(run.key).items() if is_of(child, run)}
        heard = self._progresses.latest(run.key)
        return RunContext(
            run=manifest,
            uid=run.uid,
            generation=run.generation,
            before=_status(run),
            children=children,
            pods=[pod for pod in self._store.pods(run.key) if pod.created >= run.created],
            progress=heard.progress,
            unreachable=heard.unreachable,
            claim=self._claim(run, manifest, children),
            now=self._clock(),
        )

    def _claim(
        self, run: CachedRun, manifest: HeteroRLRun, children: dict[tuple[str, str], CachedChild]
    ) -> CachedChild | None:
        name = claim_name(manifest)
        if (known := children.get((CLAIM.name, name))) or not manifest.spec.exchange.volume.claim_name:
            return known
        found = self._api.get(CLAIM, run.key.namespace, name)
        return child_of(CLAIM.name, found) if found else None

    # ── doing ────────────────────────────────────────────────────────────────────────────────────────────────────────
    def _bring_about(
        self, run: CachedRun, view: RunContext, decision: Decision, *, trusting: bool
    ) -> list[ObjectProblem]:
        desired = self._desired(run, view, decision)
        problems = [_hidden(kind, words) for kind, words in self._hidden.items()]
        problems += self._applier.apply(run, desired, self._store.children(run.key), trusting=trusting)
        names = {(each["kind"], each["metadata"]["name"]) for each in desired}
        for (kind, name), child in view.children.items():
            undesired = child.owner_uid == run.uid and not child.deleting and (kind, name) not in names
            superseded = name.startswith(f"{view.name}-prepare-") and name != prepare_name(view.run)
            stopped = kind == JOB.name and not child.phase and (superseded or not decision.with_jobs)
            if undesired and (kind == DEPLOYMENT.name or stopped) and (problem := self._applier.delete(run, child)):
                problems.append(problem)
        return problems

    def _desired(self, run: CachedRun, view: RunContext, decision: Decision) -> list[Object]:
        namespace, uid = run.key.namespace, run.uid
        desired = desired_state(
            view.run, images=self._images, namespace=namespace, owner_uid=uid, replicas=decision.replicas
        )
        # Once it has done its work, a preparation that is gone is not missed.
        if not decision.with_jobs or view.condition("Prepared") == "True" or decision.end:
            desired = [each for each in desired if each["kind"] != JOB.name]
        if version := decision.evaluation:
            job = evaluation_job(view.run, version, images=self._images, namespace=namespace, owner_uid=uid)
            desired.append(job)
        return desired

    # ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _report(self, run: CachedRun, after: RunStatus) -> None:
        status = after.model_dump(mode="json", by_alias=True, exclude_none=True)
        if status == run.previous_status or not self._write(run, status):
            return
        for kind, reason, message in transitions(_status(run), after):
            self._events.post(run, kind, reason, message, self._clock())

    def _write(self, run: CachedRun, status: Object) -> bool:
        """Whether the run was there still."""
        key = run.key
        try:
            written = self._api.apply_status(RUN, key.namespace, key.name, status)
            is_other = written["metadata"]["uid"] != run.uid
            if is_other:  # a status takes no precondition, so what is said of the wrong run is taken back
                written = self._api.apply_status(RUN, key.namespace, key.name, {})
        except NotFound:
            # So that nothing is made for it any more.
            self._store.remove(RUN.name, remains(run.uid, Mark(run.resource_version, key, key.name)))
            return False
        self._store.put(RUN.name, written)
        if is_other or written["metadata"]["generation"] != run.generation:
            self._look_again(key)  # what the watch will say of the change counts as old by now
        return not is_other

    def _tell_of(self, run: CachedRun, other: ManagedByAnotherOperator) -> None:
        if self._told.get(run.key) == other.operator:
            return
        self._told[run.key] = other.operator
        message = (
            f"this run is kept by operator {other.operator}; {self._api.manager} leaves it alone. Uninstall one of"
            " them, or give them different namespaces (watch.namespaces); to hand runs over, set takeOver: true for the"
            " new one"
        )
        self._events.post(run, "Warning", "ManagedByAnotherOperator", message, self._clock())

    def _next_look(self, view: RunContext, decision: Decision) -> float | None:
        times = [decision.look_again_s]
        if view.run.spec.exchange.volume.claim_name and (view.claim is None or view.claim.phase != "Bound"):
            times.append(_FOREIGN_CLAIM_S)
        return min((each for each in times if each is not None), default=None)


@lru_cache(maxsize=32)  # a run is looked at several times in a row; each takes tens of kilobytes
def _parsed(manifest: bytes) -> HeteroRLRun:
    return HeteroRLRun.model_validate_json(manifest)


def _status(run: CachedRun) -> RunStatus:
    try:
        return RunStatus.model_validate_json(run.status)
    except ValidationError:
        return RunStatus()  # by an operator of another version; what counts is seen again


def _invalid(error: ValidationError) -> Trouble:
    problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return Trouble("InvalidSpec", f"the manifest cannot be used: {problems}; `heterorl validate FILE` explains it")


def _without_impossible(view: RunContext, decision: Decision, problems: Sequence[ObjectProblem]) -> Decision:
    """An evaluation whose Job is refused for good is given up, so that nobody waits for it."""
    refused = {problem.name for problem in problems if problem.trouble.reason in _LASTING}
    if decision.evaluation is None or evaluation_name(view.name, decision.evaluation.step) not in refused:
        return decision
    failed = decision.failed_evaluations | {decision.evaluation.step}
    return replace(decision, failed_evaluations=failed)


def _hidden(kind: ResourceKind, words: str) -> ObjectProblem:
    return ObjectProblem(kind.name, kind.plural, forbidden(f"see {kind.plural}", words))


def _target(view: RunContext, decision: Decision) -> Target | None:
    """The learner's first pod, once it has an address."""
    name = f"{learner_name(view.name)}-0"
    pods: Sequence[CachedPod] = [pod for pod in view.pods_of("learner") if pod.name == name and pod.ip]
    if not pods or not decision.replicas.learner or pods[0].phase != "Running":
        return None
    return Target(name, pods[0].uid, pods[0].ip, metrics_port(view.run.spec))
