"""Reconciles one run: what is desired, apply it, delete the rest, report. Idempotent: it may run late, or twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from pydantic import ValidationError

from heterorl.kubernetes.manifests import Images, desired_state, evaluation_job
from heterorl.kubernetes.names import Object, evaluation_name, prepare_name
from heterorl.spec.run import HeteroRLRun
from heterorl.spec.status import RunStatus
from heterorl_operator.apply import Applier, ManagedByAnotherOperator, forbidden
from heterorl_operator.cache import CachedRun, ObjectCache
from heterorl_operator.client import Forbidden
from heterorl_operator.context import RunContext
from heterorl_operator.lifecycle import Decision, decide
from heterorl_operator.problems import ObjectProblem, Problem
from heterorl_operator.resources import DEPLOYMENT, JOB, ResourceKind, RunKey
from heterorl_operator.run_reader import RunReader
from heterorl_operator.status import refused, status_of
from heterorl_operator.status_writer import StatusWriter

_LASTING = ("InvalidPodTemplate",)
"""Problems that do not go away by themselves."""


class Unfinished(Exception):
    """Something failed that may go away by itself: retry with back-off, and in `next_s` at the latest."""

    def __init__(self, message: str, next_s: float | None) -> None:
        self.next_s = next_s
        super().__init__(message)


class Reconciler:
    """Safe to use from several threads, one run in one of them."""

    def __init__(
        self,
        cache: ObjectCache,
        reader: RunReader,
        applier: Applier,
        writer: StatusWriter,
        images: Images,
        requeue_later: Callable[[RunKey], None],
    ) -> None:
        """`requeue_later` is called for a run that is reconciled for the first time.

        Its second pass, once no other run waits for its first, does what may wait: the status of a new run, and undoing
        edits that were made to a known run's objects before the operator's start.
        """
        self._cache, self._reader, self._applier, self._writer = cache, reader, applier, writer
        self._images, self._requeue_later = images, requeue_later
        self._uids: dict[RunKey, str] = {}  # of the runs reconciled before

    def reconcile(self, key: RunKey) -> float | None:
        """Reconcile a run; seconds until time alone makes it worthwhile again.

        Raises Unfinished, or an ApiError, when it should be retried.
        """
        run = self._cache.run(key)
        if run is None or run.deleting:
            self._forget(key)
            return None
        first_pass = self._uids.get(key) != run.uid
        if first_pass:
            self._forget(key)  # another run may have had the name
            self._uids[key] = run.uid
        before = RunStatus.read(run.previous_status)
        try:
            self._applier.check(self._cache.children(key))  # no status for another operator's run, nor InvalidSpec
            return self._reconcile(run, before, first_pass)
        except ManagedByAnotherOperator as other:
            self._writer.report_foreign(run, other.operator, self._reader.clock())
            return None
        except Forbidden as error:
            problem = forbidden("do what this run needs", error)
            self._refuse(run, before, problem)
            raise Unfinished(problem.message, None) from error

    def _reconcile(self, run: CachedRun, before: RunStatus, first_pass: bool) -> float | None:
        try:
            manifest = _parsed(run.manifest)
        except ValidationError as error:
            self._refuse(run, before, _invalid(error))
            return None
        context = self._reader.context(run, manifest, before)
        decision = decide(context)
        if decision.expired:
            self._applier.delete_run(run)
            return None
        problems = self._apply_desired(run, context, decision, first_pass)
        times = (decision.requeue_s, self._reader.requeue_s(run.key, context))
        next_s = min((each for each in times if each is not None), default=None)
        if first_pass:
            self._requeue_later(run.key)
            if not before.conditions and not problems:
                return next_s  # to the API server a status is as much work as all of the run's objects
        decision = _without_impossible(context, decision, problems)
        self._reader.poll(run.key, context, decision.replicas.learner)
        self._writer.write(run, before, status_of(context, decision, problems), context.now)
        if passing := [problem for problem in problems if problem.cause.reason not in _LASTING]:
            raise Unfinished(passing[0].cause.message, next_s)
        return next_s

    def _refuse(self, run: CachedRun, before: RunStatus, problem: Problem) -> None:
        now = self._reader.clock()
        self._writer.write(run, before, refused(before, run.generation, problem, now), now)

    def _forget(self, key: RunKey) -> None:
        for each in (self._applier, self._reader, self._writer):
            each.forget(key)
        self._uids.pop(key, None)

    # ── objects ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _apply_desired(
        self, run: CachedRun, context: RunContext, decision: Decision, first_pass: bool
    ) -> list[ObjectProblem]:
        desired = self._desired(run, context, decision)
        problems = [_unreadable(kind, message) for kind, message in self._cache.unreadable.items()]
        problems += self._applier.apply(run, desired, self._cache.children(run.key), first_pass=first_pass)
        names = {(each["kind"], each["metadata"]["name"]) for each in desired}
        for (kind, name), child in context.children.items():
            undesired = child.owner_uid == run.uid and not child.deleting and (kind, name) not in names
            superseded = name.startswith(f"{context.name}-prepare-") and name != prepare_name(context.run)
            stopped = kind == JOB.name and not child.phase and (superseded or not decision.with_jobs)
            if undesired and (kind == DEPLOYMENT.name or stopped) and (problem := self._applier.delete(run, child)):
                problems.append(problem)
        return problems

    def _desired(self, run: CachedRun, context: RunContext, decision: Decision) -> list[Object]:
        namespace, uid = run.key.namespace, run.uid
        desired = desired_state(
            context.run, images=self._images, namespace=namespace, owner_uid=uid, replicas=decision.replicas
        )
        # Once it is complete, a preparation that was deleted is not created again.
        if not decision.with_jobs or context.condition("Prepared") == "True" or decision.end:
            desired = [each for each in desired if each["kind"] != JOB.name]
        if version := decision.evaluation:
            job = evaluation_job(context.run, version, images=self._images, namespace=namespace, owner_uid=uid)
            desired.append(job)
        return desired


@lru_cache(maxsize=32)  # a run is reconciled several times in a row; each takes tens of kilobytes
def _parsed(manifest: bytes) -> HeteroRLRun:
    return HeteroRLRun.model_validate_json(manifest)


def _invalid(error: ValidationError) -> Problem:
    problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return Problem("InvalidSpec", f"the manifest cannot be used: {problems}; `heterorl validate FILE` explains it")


def _without_impossible(context: RunContext, decision: Decision, problems: Sequence[ObjectProblem]) -> Decision:
    """An evaluation whose Job is refused for good is given up, so that the learner does not wait for it."""
    refused = {problem.name for problem in problems if problem.cause.reason in _LASTING}
    if decision.evaluation is None or evaluation_name(context.name, decision.evaluation.step) not in refused:
        return decision
    failed = decision.failed_evaluations | {decision.evaluation.step}
    return replace(decision, failed_evaluations=failed)


def _unreadable(kind: ResourceKind, message: str) -> ObjectProblem:
    return ObjectProblem(kind.name, kind.plural, forbidden(f"list {kind.plural}", message))
