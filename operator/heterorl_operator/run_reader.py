"""Gathers what is known about a run: from the cache, the poller and, for what no watch reports, the API server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from heterorl.kubernetes.names import claim_name, learner_name
from heterorl.kubernetes.pods import metrics_port
from heterorl.spec.run import HeteroRLRun
from heterorl.spec.status import RunStatus
from heterorl_operator.cache import CachedChild, CachedPod, CachedRun, ObjectCache, belongs_to, child_of
from heterorl_operator.client import Api
from heterorl_operator.context import RunContext
from heterorl_operator.create_failures import CreateFailures
from heterorl_operator.learner_poller import ProgressPoller, Target
from heterorl_operator.resources import CLAIM, DEPLOYMENT, JOB, STATEFUL_SET, RunKey

_GIVEN_CLAIM_S = 10.0
"""How often to read a claim of the user's, which no watch reports, until it is bound."""


class RunReader:
    """Safe to use from several threads, one run in one of them."""

    def __init__(
        self, api: Api, cache: ObjectCache, poller: ProgressPoller, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._api, self._cache, self._poller, self.clock = api, cache, poller, clock
        self._create_failures = CreateFailures(api)

    def context(self, run: CachedRun, manifest: HeteroRLRun, before: RunStatus) -> RunContext:
        """The run as it is now."""
        # Objects of an earlier run of the name may still be there: they say nothing about this one.
        children = {place: child for place, child in self._cache.children(run.key).items() if belongs_to(child, run)}
        pods = [pod for pod in self._cache.pods(run.key) if pod.created >= run.created]
        context = RunContext(
            run=manifest,
            uid=run.uid,
            generation=run.generation,
            before=before,
            children=children,
            pods=pods,
            create_failures=self._failures(run.key, children.values(), pods),
            progress=None,
            unreachable="",
            claim=self._claim(run, manifest, children),
            now=self.clock(),
        )
        if context.is_resumed:
            self._poller.forget(run.key)  # the last progress is that of the learner that gave up
        polled = self._poller.latest(run.key)
        return replace(context, progress=polled.progress, unreachable=polled.unreachable)

    def poll(self, key: RunKey, context: RunContext, learners: int) -> None:
        """From now on poll the first learner pod, once it has an address; none while there should be no `learners`."""
        name = f"{learner_name(context.name)}-0"
        pods = [pod for pod in context.pods_of("learner") if pod.name == name and pod.ip and pod.phase == "Running"]
        pods = [pod for pod in pods if pod.resumes == context.run.spec.failure_policy.resumes]  # older ones gave up
        target = Target(name, pods[0].uid, pods[0].ip, metrics_port(context.run.spec)) if pods and learners else None
        self._poller.want(key, target, at_rest=not learners)

    def forget(self, key: RunKey) -> None:
        """The run is gone."""
        self._poller.forget(key)
        self._create_failures.forget(key)

    def requeue_s(self, key: RunKey, context: RunContext) -> float | None:
        """When something may have changed that no watch reports."""
        given = context.run.spec.exchange.volume.claim_name
        waits = given and (context.claim is None or context.claim.phase != "Bound")
        times = (_GIVEN_CLAIM_S if waits else None, self._create_failures.next_s(key))
        return min((each for each in times if each is not None), default=None)

    def _failures(
        self, key: RunKey, children: Iterable[CachedChild], pods: Sequence[CachedPod]
    ) -> dict[tuple[str, str], str]:
        """Why pods could not be created, by kind and name of the workload."""
        missing, messages = {}, {}
        for child in children:
            owned = [pod for pod in pods if pod.owner_uid == child.uid]
            if child.kind == DEPLOYMENT.name and child.message:
                messages[child] = child.message
            elif _lacks_pods(child, owned):
                missing[child] = max((pod.created for pod in owned), default=child.created)
        messages |= self._create_failures.messages(key, missing)
        return {(child.kind, child.name): message for child, message in messages.items()}

    def _claim(
        self, run: CachedRun, manifest: HeteroRLRun, children: dict[tuple[str, str], CachedChild]
    ) -> CachedChild | None:
        name = claim_name(manifest)
        if (known := children.get((CLAIM.name, name))) or not manifest.spec.exchange.volume.claim_name:
            return known
        found = self._api.get(CLAIM, run.key.namespace, name)
        return child_of(CLAIM.name, found) if found else None


def _lacks_pods(child: CachedChild, owned: Sequence[CachedPod]) -> bool:
    """Whether a StatefulSet, or a Job that has not ended, has fewer pods than it should."""
    if child.deleting:
        return False
    if child.kind == JOB.name:
        return not child.phase and not any(pod.phase in ("Pending", "Running") for pod in owned)
    return child.kind == STATEFUL_SET.name and len(owned) < child.wanted
