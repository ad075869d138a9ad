"""Checks that the watches still bring what happens: kind by kind, what the API server has against what was seen.

A watch that has gone deaf looks like a quiet cluster. Whatever is found missing is taken in, so runs go on; if there is
something missing again at the next look, and the watch brought nothing in between, the operator says that it is unwell
and is restarted. A watch that is merely late under load is not deaf.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Sequence

from heterorl.kubernetes.merge import Object
from heterorl.kubernetes.names import RUN_LABEL
from heterorl_operator import metrics as telemetry
from heterorl_operator.cache import ObjectCache, remains
from heterorl_operator.client import Api, ApiError, Forbidden
from heterorl_operator.handlers import Watcher
from heterorl_operator.resources import LABELLED, RUN, ResourceKind

log = logging.getLogger(__name__)

_SETTLE_S = 2.0
"""A watch may be so far behind."""


class Relister:
    """Looks at one kind after the other."""

    def __init__(
        self, api: Api, store: ObjectCache, watcher: Watcher, namespaces: Sequence[str], every_s: float
    ) -> None:
        """`namespaces`: those that are watched, none for all. `every_s`: in so many seconds each kind has its turn."""
        self._api, self._store, self._watcher = api, store, watcher
        self._namespaces: list[str | None] = [*namespaces] or [None]
        self._pause_s = every_s / (1 + len(LABELLED))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._suspects: dict[str, int] = {}  # kinds that missed something at the last look, and what was heard by then
        self.hidden: dict[ResourceKind, str] = {}
        """Kinds that the operator has no right to see, and the API server's words."""
        self.unveiled = threading.Event()
        """A hidden kind may be seen by now: the operator has to start again to watch it."""
        self.deaf: set[str] = set()
        """Kinds whose watch missed something at each of the last two looks and brought nothing in between."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()

    def load(self) -> None:
        """Take in everything there is; NotFound or Forbidden when runs are not installed or must not be seen.

        Other kinds that the operator must not see end up in `hidden`, with the API server's words.
        """
        for kind in (RUN, *LABELLED):
            try:
                for namespace in self._namespaces:
                    for body in self._api.list(kind, namespace, _selector(kind)):
                        self._watcher.saw(kind, None, body)
            except Forbidden as error:
                if kind is RUN:
                    raise
                log.error("the operator must not see %s: %s", kind.plural, error)
                self.hidden[kind] = str(error)

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
        before = self._store.seen(kind.name)
        there = {
            body["metadata"]["uid"]: (int(body["metadata"]["resourceVersion"]), body["metadata"])
            for namespace in self._namespaces
            for body in self._api.list(kind, namespace, _selector(kind), metadata_only=True)
        }
        if kind in self.hidden:
            self.unveiled.set()
            return
        if self._stop.wait(_SETTLE_S):
            return
        after = self._store.seen(kind.name)
        missed = [metadata for uid, (version, metadata) in there.items() if uid not in after or after[uid][0] < version]
        ghosts = {uid: mark for uid, mark in after.items() if uid in before and uid not in there}
        news = [each for metadata in missed if (each := self._take_in(kind, metadata))]
        for uid, mark in ghosts.items():
            self._watcher.saw(kind, "DELETED", remains(uid, mark))
        self._judge(kind, len(news) + len(ghosts))

    def _take_in(self, kind: ResourceKind, metadata: Object) -> bool:
        """Whether the object is there and was news: one that is deleted or was seen meanwhile is not."""
        body = self._api.get(kind, metadata["namespace"], metadata["name"])
        return body is not None and self._watcher.saw(kind, None, body)

    def _judge(self, kind: ResourceKind, missed: int) -> None:
        if missed:
            log.warning("the watch of %ss missed %d changes; they are taken in now", kind.name, missed)
        heard, before = self._watcher.heard[kind.name], self._suspects.pop(kind.name, None)
        if missed:
            self._suspects[kind.name] = heard
        if missed and before == heard:
            self.deaf.add(kind.name)
        else:
            self.deaf.discard(kind.name)
        telemetry.STALE.labels(kind.name).set(kind.name in self.deaf)


def _selector(kind: ResourceKind) -> str:
    return "" if kind is RUN else RUN_LABEL
