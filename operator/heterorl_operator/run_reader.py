"""Gathers what is known about a run: from the cache, the learner's poller and, for a claim of the user's, the API."""

from __future__ import annotations

import time
from collections.abc import Callable

from heterorl.kubernetes.names import claim_name, learner_name
from heterorl.kubernetes.pods import metrics_port
from heterorl.spec.run import HeteroRLRun
from heterorl.spec.status import RunStatus
from heterorl_operator.cache import ObjectCache
from heterorl_operator.client import Api
from heterorl_operator.context import RunContext
from heterorl_operator.learner_poller import ProgressPoller, Target
from heterorl_operator.objects import CachedChild, CachedRun, belongs_to, child_of
from heterorl_operator.resources import CLAIM, RunKey

_GIVEN_CLAIM_S = 10.0
"""How often to read a claim of the user's, which no watch reports, until it is bound."""


class RunReader:
    """Safe to use from several threads, one run in one of them."""

    def __init__(
        self, api: Api, cache: ObjectCache, poller: ProgressPoller, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._api, self._cache, self._poller, self.clock = api, cache, poller, clock

    def context(self, run: CachedRun, manifest: HeteroRLRun, before: RunStatus) -> RunContext:
        """The run as it is now."""
        # Objects of an earlier run of the name may still be there: they say nothing about this one.
        children = {place: child for place, child in self._cache.children(run.key).items() if belongs_to(child, run)}
        polled = self._poller.latest(run.key)
        return RunContext(
            run=manifest,
            uid=run.uid,
            generation=run.generation,
            before=before,
            children=children,
            pods=[pod for pod in self._cache.pods(run.key) if pod.created >= run.created],
            create_failures={},
            progress=polled.progress,
            unreachable=polled.unreachable,
            claim=self._claim(run, manifest, children),
            now=self.clock(),
        )

    def poll(self, key: RunKey, context: RunContext, learners: int) -> None:
        """From now on poll the first learner pod, once it has an address; none while there should be no `learners`."""
        name = f"{learner_name(context.name)}-0"
        pods = [pod for pod in context.pods_of("learner") if pod.name == name and pod.ip and pod.phase == "Running"]
        target = Target(name, pods[0].uid, pods[0].ip, metrics_port(context.run.spec)) if pods and learners else None
        self._poller.want(key, target, at_rest=not learners)

    def forget(self, key: RunKey) -> None:
        """The run is gone."""
        self._poller.forget(key)

    def requeue_s(self, context: RunContext) -> float | None:
        """When something may have changed that no watch reports."""
        waits = context.run.spec.exchange.volume.claim_name and (
            context.claim is None or context.claim.phase != "Bound"
        )
        return _GIVEN_CLAIM_S if waits else None

    def _claim(
        self, run: CachedRun, manifest: HeteroRLRun, children: dict[tuple[str, str], CachedChild]
    ) -> CachedChild | None:
        name = claim_name(manifest)
        if (known := children.get((CLAIM.name, name))) or not manifest.spec.exchange.volume.claim_name:
            return known
        found = self._api.get(CLAIM, run.key.namespace, name)
        return child_of(CLAIM.name, found) if found else None
