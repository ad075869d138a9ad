"""Puts the parts together: watches (kopf), workers, scrapers and the auditor, all in threads of their own."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal
from zlib import crc32

import kopf
from kubernetes.config import ConfigException
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from heterorl.errors import UserError
from heterorl.kubernetes.manifests import Images
from heterorl.monitoring.http import Endpoint, text_page
from heterorl_operator import metrics as telemetry
from heterorl_operator.apply import MANAGER_PREFIX, Applier
from heterorl_operator.cache import ObjectCache
from heterorl_operator.client import Api, ApiError, Forbidden, NotFound, Transient, connect, in_cluster
from heterorl_operator.events import Events
from heterorl_operator.handlers import Watcher, registry_for, settings
from heterorl_operator.learner_poller import ProgressPoller
from heterorl_operator.reconcile import Reconciler, Unfinished
from heterorl_operator.relist import Relister
from heterorl_operator.resources import LABELLED, RUN
from heterorl_operator.workqueue import RunKey, WorkQueue

log = logging.getLogger(__name__)

_FIRST_LOOKS_S = 120.0
"""How long edits may go unseen after a start while every run is looked at for the first time."""
_STUCK_S = 120.0
"""A look that takes so long hangs. A long queue does not: there may be thousands of runs after a start."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Options:
    """The command line's."""

    images: Images
    namespaces: tuple[str, ...] = ()
    release: str = "heterorl"
    release_namespace: str = "default"
    progress: Literal["auto", "pod-ip", "proxy"] = "auto"
    progress_s: float = 15.0
    workers: int = 8
    resync_s: float = 600.0
    host: str = "127.0.0.1"
    port: int = 0
    take_over: bool = False

    @property
    def manager(self) -> str:
        """Field manager of all it writes."""
        return f"{MANAGER_PREFIX}{self.release_namespace}/{self.release}"


class Operator:
    """One installation."""

    def __init__(self, options: Options) -> None:
        """Connects; UserError when there is no cluster to connect to."""
        self.options = options
        try:
            client = connect(pool_size=2 * options.workers)
        except ConfigException as error:
            raise UserError(f"there is no cluster to work on: {error}; set KUBECONFIG, or run in a pod") from error
        self.api = Api(client, options.manager)
        self.store, self.queue = ObjectCache(), WorkQueue()
        self.applier = Applier(self.api, self.store, take_over=options.take_over)
        self.watcher = Watcher(self.store, self.queue, self.applier)
        self.auditor = Relister(self.api, self.store, self.watcher, options.namespaces, options.resync_s / 2)
        mode = options.progress if options.progress != "auto" else "pod-ip" if in_cluster() else "proxy"
        self.progresses = ProgressPoller(self.api, mode, options.progress_s, partial(self.queue.add, urgent=False))
        events = Events(self.api, options.manager)
        self.reconciler = Reconciler(
            self.api,
            self.store,
            self.applier,
            self.progresses,
            events,
            options.images,
            self.auditor.hidden,
            self.queue.add,
            partial(self.queue.add, urgent=False),
        )
        self._workers = [
            threading.Thread(target=self._work, name=f"worker-{n}", daemon=True) for n in range(options.workers)
        ]
        self._unsynced: set[RunKey] = set()
        self._loaded, self._synced = threading.Event(), threading.Event()
        self._failure: Exception | None = None  # what ended the watches

    def run(self) -> None:
        """Work until SIGTERM or SIGINT; called once, in the main thread.

        Raises UserError, or an ApiError, or whatever else ended the work by itself.
        """
        # Before there are threads, so that all of them leave these signals to this one, which does nothing but wait for
        # them: whatever the others are in the middle of, the operator leaves at once.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        with self._endpoint() as endpoint:
            log.info("%s serves /healthz and /metrics on port %d", self.options.manager, endpoint.port)
            threading.Thread(target=self._run, name="watches", daemon=True).start()
            signal.sigwait(_SIGNALS)
        for stop in (self.queue.close, self.progresses.stop, self.auditor.stop):
            stop()
        if self._failure:
            raise self._failure
        log.info("stopped")

    def _run(self) -> None:
        try:
            self._load()
            for worker in self._workers:
                worker.start()
            self.progresses.start()
            # All that there was has been listed, and what happens to it meanwhile comes with kopf's own list: watching
            # the objects of many new runs appear would cost as much as making them.
            self._synced.wait(_FIRST_LOOKS_S)
            self.auditor.start()  # there is nothing to compare before there are watches
            threading.Thread(target=self._leave_when_more_may_be_seen, daemon=True).start()
            asyncio.run(self._watch())
        except Exception as error:
            self._failure = error
        finally:
            _leave()

    async def _watch(self) -> None:
        logging.getLogger(kopf.operator.__module__).setLevel(logging.ERROR)  # it warns that it gets no signals
        await kopf.operator(
            registry=registry_for(self.watcher, (k for k in (RUN, *LABELLED) if k not in self.auditor.hidden)),
            settings=settings(),
            standalone=True,
            clusterwide=not self.options.namespaces,
            namespaces=self.options.namespaces,
        )

    def _leave_when_more_may_be_seen(self) -> None:
        self.auditor.unveiled.wait()
        log.warning("there are kinds that may be seen by now; the operator has to start again to watch them")
        _leave()

    def _load(self) -> None:
        try:
            self.auditor.load()
        except NotFound as error:
            raise UserError(
                f"the cluster does not know the kind {RUN.name}; install it with the chart (crds.enabled) or"
                " `kubectl apply -f crds/`"
            ) from error
        except Forbidden as error:
            where = ", ".join(self.options.namespaces) or "all namespaces"
            raise UserError(f"the operator may not look at {where}: {error}; see the chart's rbac values") from error
        self._unsynced = set(self.store.run_keys())
        self._note_synced()
        self._loaded.set()
        log.info("%d runs are there", len(self._unsynced))
        for key in self.store.run_keys():
            self.queue.add(key)

    # ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _work(self) -> None:
        while found := self.queue.get():
            key, waited_s = found
            telemetry.WAIT_SECONDS.observe(waited_s)
            started = time.monotonic()
            try:
                telemetry.RECONCILES.labels(self._look_at(key)).inc()
            finally:
                telemetry.RECONCILE_SECONDS.observe(time.monotonic() - started)
                self.queue.done(key)
            self._unsynced.discard(key)
            self._note_synced()

    def _note_synced(self) -> None:
        if not self._unsynced:
            self._synced.set()
        telemetry.SYNCED.set(self._synced.is_set())

    def _look_at(self, key: RunKey) -> str:
        """Reconcile, and see to it that the run is looked at again; the result in one word."""
        try:
            next_s = self.reconciler.reconcile(key)
        except Unfinished as error:
            delay = self.queue.retry(key)
            if error.next_s is not None:
                self.queue.add_after(key, error.next_s)  # what does work goes by the clock nevertheless
            log.warning("%s: %s; again in %.0f s", key, error, delay)
            return "unfinished"
        except ApiError as error:
            delay = self.queue.retry(key, (isinstance(error, Transient) and error.retry_after_s) or 0.0)
            log.warning("%s: the API server answered %s: %s; again in %.1f s", key, error.status, error, delay)
            return "error"
        except Exception:
            # A mistake of ours in one run must not stop the others.
            delay = self.queue.retry(key)
            log.exception("%s: not looked at; again in %.0f s", key, delay)
            return "error"
        self.queue.succeeded(key)
        if self.store.run(key):
            spread = crc32(str(key).encode()) % 1000 / 1000  # not all of them at once
            resync_s = self.options.resync_s * (0.9 + 0.2 * spread)
            self.queue.add_after(key, resync_s if next_s is None else min(next_s, resync_s))
        return "ok"

    # ── health ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def _endpoint(self) -> Endpoint:
        collector = telemetry.RunsCollector(self.store, self.progresses.stalled_s)
        REGISTRY.register(collector)

        def metrics() -> tuple[int, str, bytes]:
            telemetry.QUEUE_DEPTH.set(len(self.queue))
            return 200, CONTENT_TYPE_LATEST, generate_latest(REGISTRY)

        pages = {"/healthz": text_page(self.health), "/metrics": metrics}
        return Endpoint(self.options.host, self.options.port, pages)

    def health(self) -> tuple[bool, str]:
        """Whether it works, and why not."""
        if not self._loaded.is_set():
            return False, "it has not listed yet what there is"
        if not all(worker.is_alive() for worker in self._workers if worker.ident):
            return False, "a worker died"
        if (worked := self.queue.longest_s()) > _STUCK_S:
            return False, f"a look at a run has taken {worked:.0f} s; its worker hangs"
        if self.auditor.deaf:
            return False, f"the watches of {', '.join(sorted(self.auditor.deaf))} bring nothing"
        return True, "ok"


def _leave() -> None:
    """Have the main thread end the process."""
    os.kill(os.getpid(), signal.SIGTERM)
