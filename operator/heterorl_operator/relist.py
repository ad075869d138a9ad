"""Checks that the watches still report what happens: lists kind by kind and compares with the cache.

A watch that has gone stale looks like a quiet cluster. What it missed is taken in, so runs go on; if the next
comparison finds something missing again, and the watch reported nothing in between, the operator turns unhealthy and is
restarted. A watch that is merely late under load is not stale.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Sequence

from heterorl.kubernetes.names import RUN_LABEL
from heterorl_operator import metrics
from heterorl_operator.cache import ObjectCache, ObjectVersion, key_of, tombstone
from heterorl_operator.client import Api, ApiError, Forbidden
from heterorl_operator.handlers import Watcher
from heterorl_operator.resources import LABELLED, RUN, ResourceKind

log = logging.getLogger(__name__)

_SETTLE_S = 2.0
"""How far a watch may be behind."""


class Relister:
    """Lists one kind after the other."""

    def __init__(
        self, api: Api, cache: ObjectCache, watcher: Watcher, namespaces: Sequence[str], every_s: float
    ) -> None:
        """`namespaces`: those that are watched, none for all. `every_s`: seconds in which every kind is listed once."""
        self._api, self._cache, self._watcher = api, cache, watcher
        self._namespaces: list[str | None] = [*namespaces] or [None]
        self._pause_s = every_s / (1 + len(LABELLED))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relist", daemon=True)
        self._suspects: dict[str, int] = {}  # kinds with changes missed last time, and the watch's event count then
        self.readable_again = threading.Event()
        """A kind that was unreadable is readable by now: the operator has to restart to watch it."""
        self.stale: set[str] = set()
        """Kinds whose watch missed something in the last two comparisons and reported nothing in between."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()

    def load(self) -> None:
        """List everything into the cache; NotFound or Forbidden when runs are not installed or not readable.

        Other kinds that the operator may not list are noted in the cache as unreadable.
        """
        for kind in (RUN, *LABELLED):
            try:
                for namespace in self._namespaces:
                    for body in self._api.list(kind, namespace, _selector(kind)):
                        self._watcher.handle(kind, None, body)
            except Forbidden as error:
                if kind is RUN:
                    raise
                log.error("the operator may not list %s: %s", kind.plural, error)
                self._cache.unreadable[kind] = str(error)

    def _run(self) -> None:
        for kind in itertools.cycle((RUN, *LABELLED)):
            if self._stop.wait(self._pause_s):
                return
            try:
                self._check(kind)
            except ApiError as error:
                log.warning("the %s could not be listed: %s", kind.plural, error)
            except Exception:  # a thread that dies would go unnoticed
                log.exception("the %s could not be compared", kind.plural)

    def _check(self, kind: ResourceKind) -> None:
        before = self._cache.versions(kind.name)
        there = self._listed(kind)
        if kind in self._cache.unreadable:
            self.readable_again.set()
            return
        if self._stop.wait(_SETTLE_S):
            return
        after = self._cache.versions(kind.name)
        missed = [
            each
            for uid, each in there.items()
            if uid not in after or after[uid].resource_version < each.resource_version
        ]
        ghosts = {uid: known for uid, known in after.items() if uid in before and uid not in there}
        new = [each for each in missed if self._take_in(kind, each)]
        for uid, known in ghosts.items():
            self._watcher.handle(kind, "DELETED", tombstone(uid, known))
        self._update_staleness(kind, len(new) + len(ghosts))

    def _listed(self, kind: ResourceKind) -> dict[str, ObjectVersion]:
        """Every object of a kind that is there, by uid: three fields of metadata that take ten kilobytes each."""
        return {
            metadata["uid"]: ObjectVersion(int(metadata["resourceVersion"]), run, metadata["name"])
            for namespace in self._namespaces
            for body in self._api.list(kind, namespace, _selector(kind), metadata_only=True)
            if (metadata := body["metadata"]) and (run := key_of(kind.name, body))
        }

    def _take_in(self, kind: ResourceKind, listed: ObjectVersion) -> bool:
        """Whether the object exists and was new: it may have been deleted, or reported meanwhile."""
        body = self._api.get(kind, listed.run.namespace, listed.name)
        return body is not None and self._watcher.handle(kind, None, body)

    def _update_staleness(self, kind: ResourceKind, missed: int) -> None:
        if missed:
            log.warning("the watch of %ss missed %d changes; they are applied now", kind.name, missed)
        count, before = self._watcher.event_counts[kind.name], self._suspects.pop(kind.name, None)
        if missed:
            self._suspects[kind.name] = count
        if missed and before == count:
            self.stale.add(kind.name)
        else:
            self.stale.discard(kind.name)
        metrics.STALE.labels(kind.name).set(kind.name in self.stale)


def _selector(kind: ResourceKind) -> str:
    return "" if kind is RUN else RUN_LABEL
