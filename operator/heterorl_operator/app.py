"""Puts the parts together: watches (kopf), workers, pollers and the relister, all in threads of their own."""

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
from heterorl_operator import metrics
from heterorl_operator.apply import MANAGER_PREFIX, Applier
from heterorl_operator.cache import ObjectCache
from heterorl_operator.client import Api, ApiError, Forbidden, NotFound, Transient, connect, in_cluster
from heterorl_operator.events import Events
from heterorl_operator.handlers import NoMemories, Watcher, registry_for, settings
from heterorl_operator.learner_poller import ProgressPoller
from heterorl_operator.reconcile import Reconciler, Unfinished
from heterorl_operator.relist import Relister
from heterorl_operator.resources import LABELLED, RUN, RunKey
from heterorl_operator.run_reader import RunReader
from heterorl_operator.status_writer import StatusWriter
from heterorl_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

_FIRST_PASSES_S = 120.0
"""How long the watches wait after a start for every run to be reconciled once."""
_STUCK_S = 120.0
"""A reconcile that takes longer hangs. A long queue is healthy: there may be thousands of runs after a start."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Options:
    """Of the command line."""

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
        """Field manager of everything it writes."""
        return f"{MANAGER_PREFIX}{self.release_namespace}/{self.release}"


class Operator:
    """One installation."""

    def __init__(self, options: Options) -> None:
        """Connects; UserError when there is no cluster to connect to."""
        self.options = options
        try:
            client = connect(pool_size=2 * options.workers)
        except ConfigException as error:
            raise UserError(f"no cluster is configured: {error}; set KUBECONFIG, or run in a pod") from error
        self.api = Api(client, options.manager)
        self.cache, self.queue = ObjectCache(), WorkQueue()
        applier = Applier(self.api, self.cache, take_over=options.take_over)
        requeue_later = partial(self.queue.add, urgent=False)
        mode = options.progress if options.progress != "auto" else "pod-ip" if in_cluster() else "proxy"
        self.poller = ProgressPoller(self.api, mode, options.progress_s, requeue_later)
        self.watcher = Watcher(self.cache, self.queue, applier.object_deleted)
        self.relister = Relister(self.api, self.cache, self.watcher, options.namespaces, options.resync_s / 2)
        self.reconciler = Reconciler(
            self.cache,
            RunReader(self.api, self.cache, self.poller),
            applier,
            StatusWriter(self.api, self.cache, Events(self.api, options.manager), self.queue.add),
            options.images,
            requeue_later,
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
        # Before any thread starts, so that all of them leave these signals to this one, which does nothing but wait for
        # them: the operator leaves at once, whatever the others are doing.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        with self._endpoint() as endpoint:
            log.info("%s serves /healthz and /metrics on port %d", self.options.manager, endpoint.port)
            threading.Thread(target=self._run, name="watches", daemon=True).start()
            signal.sigwait(_SIGNALS)
        for stop in (self.queue.close, self.poller.stop, self.relister.stop):
            stop()
        if self._failure:
            raise self._failure
        log.info("stopped")

    def _run(self) -> None:
        try:
            self._load()
            for worker in self._workers:
                worker.start()
            self.poller.start()
            # Everything has been listed, and what changes meanwhile comes with kopf's own list: watching the objects of
            # many new runs appear would cost as much as creating them.
            self._synced.wait(_FIRST_PASSES_S)
            self.relister.start()  # there is nothing to compare before there are watches
            threading.Thread(target=self._leave_when_readable_again, daemon=True).start()
            asyncio.run(self._watch())
        except Exception as error:
            self._failure = error
        finally:
            _leave()

    async def _watch(self) -> None:
        logging.getLogger(kopf.operator.__module__).setLevel(logging.ERROR)  # it warns that it gets no signals
        await kopf.operator(
            registry=registry_for(self.watcher, (k for k in (RUN, *LABELLED) if k not in self.cache.unreadable)),
            settings=settings(),
            memories=NoMemories(),
            standalone=True,
            clusterwide=not self.options.namespaces,
            namespaces=self.options.namespaces,
        )

    def _leave_when_readable_again(self) -> None:
        self.relister.readable_again.wait()
        log.warning("kinds that were not readable have become readable; the operator restarts to watch them")
        _leave()

    def _load(self) -> None:
        try:
            self.relister.load()
        except NotFound as error:
            raise UserError(
                f"the cluster does not know the kind {RUN.name}; install it with the chart (crds.enabled) or"
                " `kubectl apply -f crds/`"
            ) from error
        except Forbidden as error:
            where = ", ".join(self.options.namespaces) or "all namespaces"
            raise UserError(
                f"the operator may not list runs in {where}: {error}; see the chart's rbac values"
            ) from error
        self._unsynced = set(self.cache.run_keys())
        self._note_synced()
        self._loaded.set()
        log.info("%d runs found", len(self._unsynced))
        for key in self.cache.run_keys():
            self.queue.add(key)

    # ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _work(self) -> None:
        while found := self.queue.get():
            key, waited_s = found
            metrics.WAIT_SECONDS.observe(waited_s)
            started = time.monotonic()
            try:
                metrics.RECONCILES.labels(self._reconcile(key)).inc()
            finally:
                metrics.RECONCILE_SECONDS.observe(time.monotonic() - started)
                self.queue.done(key)
            self._unsynced.discard(key)
            self._note_synced()

    def _note_synced(self) -> None:
        if not self._unsynced:
            self._synced.set()
        metrics.SYNCED.set(self._synced.is_set())

    def _reconcile(self, key: RunKey) -> str:
        """Reconcile, and queue the next time; the result in one word."""
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
            # A bug that one run triggers must not stop the others.
            delay = self.queue.retry(key)
            log.exception("%s: not reconciled; again in %.0f s", key, delay)
            return "error"
        self.queue.succeeded(key)
        if self.cache.run(key):
            spread = crc32(str(key).encode()) % 1000 / 1000  # not all of them at once
            resync_s = self.options.resync_s * (0.9 + 0.2 * spread)
            self.queue.add_after(key, resync_s if next_s is None else min(next_s, resync_s))
        return "ok"

    # ── health ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def _endpoint(self) -> Endpoint:
        collector = metrics.RunsCollector(self.cache, self.poller.stalled_s)
        REGISTRY.register(collector)

        def metrics_page() -> tuple[int, str, bytes]:
            metrics.QUEUE_DEPTH.set(len(self.queue))
            return 200, CONTENT_TYPE_LATEST, generate_latest(REGISTRY)

        pages = {"/healthz": text_page(self.health), "/metrics": metrics_page}
        return Endpoint(self.options.host, self.options.port, pages)

    def health(self) -> tuple[bool, str]:
        """Whether the operator is healthy, and why not."""
        if not self._loaded.is_set():
            return False, "the first list has not finished"
        if not all(worker.is_alive() for worker in self._workers if worker.ident):
            return False, "a worker died"
        if (worked := self.queue.longest_s()) > _STUCK_S:
            return False, f"a reconcile has taken {worked:.0f} s; its worker hangs"
        if self.relister.stale:
            return False, f"the watches of {', '.join(sorted(self.relister.stale))} are stale"
        return True, "ok"


def _leave() -> None:
    """Have the main thread end the process."""
    os.kill(os.getpid(), signal.SIGTERM)
