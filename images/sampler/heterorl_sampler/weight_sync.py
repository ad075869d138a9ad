"""Following the learner's weights: which version the engine serves, and how it gets there.

choose (delay policy) -> fetch, rebuild and check on a thread, while generation goes on -> load -> canary -> adopted
                                  |                                                        |
                              refused, old weights stay                            refused, old weights loaded again
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterorl.errors import CanaryMismatch, CorruptFile, SiteError, UnknownProtocol
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.version import Version
from heterorl.exchange.weights import Fetched
from heterorl.heterogeneity.delay import Adoption
from heterorl.spec.run import DelaySpec, Slot
from heterorl_sampler.adapters import Merger
from heterorl_sampler.engines.base import InferenceEngine

log = logging.getLogger(__name__)

MAX_SKEW_S = 5.0
"""How far two nodes' clocks may differ: far more than NTP leaves, little beside delays of minutes."""


@dataclass(frozen=True)
class Swap:
    """One change of weights that succeeded."""

    version: Version
    fetch_s: float
    fetch_bytes: int
    """Read from the volume; few where the weights before could be changed into these."""
    load_s: float
    canary_mean_abs_diff: float


class WeightSync:
    """Keeps one engine on the version its delay allows; refuses what fails its checks, once and for all."""

    def __init__(self, exchange: Exchange, engine: InferenceEngine, slot: Slot, scratch: Path) -> None:
        """`scratch`: a folder of this machine for fetched versions, which belongs to the caller."""
        self._exchange = exchange
        self._engine = engine
        self._scratch = scratch
        spec, saved = exchange.spec, exchange.load_slot(slot)
        self._tolerance = spec.canary_tolerance
        self.pool = spec.pool(slot.pool)
        """The slot's pool as it is now; one that is removed stays as it was."""
        self._adoption = Adoption(
            self.pool.delay,
            slot=str(slot),
            seed=spec.seed,
            time_scale=spec.time_scale,
            state=saved.adoption if saved else None,
        )
        merges = spec.model.lora.is_on and self.pool.lora == "merged"
        self._merger = Merger(exchange.model_dir, spec.model.dtype, scratch) if merges else None
        self._serving: Fetched | None = None
        self._published: dict[Version, float] = {}
        self._fetch: tuple[Version, float, Future[Fetched]] | None = None
        self._ready: tuple[Fetched, float] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._next_read = 0.0  # when the pool's limit allows it
        self._closed = threading.Event()
        self._listed: set[Version] = set()
        self.rejected: dict[Version, str] = {}
        """All versions that failed their checks, and why."""

    @property
    def version(self) -> Version | None:
        """The version the engine serves; None before the first."""
        return self._serving.version if self._serving else None

    @property
    def state(self) -> dict[str, Any]:
        """What the slot's next holder must know to continue its delays."""
        return self._adoption.state

    @property
    def refused(self) -> dict[str, str]:
        """Versions on the volume that failed their checks here, and why."""
        return {str(version): reason for version, reason in self.rejected.items() if version in self._listed}

    @property
    def fetching(self) -> Version | None:
        """The version that is being fetched; until then it is to stay on the volume."""
        return self._fetch[0] if self._fetch else None

    @property
    def fetching_s(self) -> float | None:
        """Seconds since the fetch began that goes on."""
        return time.monotonic() - self._fetch[1] if self._fetch else None

    @property
    def newest(self) -> Version | None:
        """The newest version this side has seen."""
        return max(self._listed, default=None)

    @property
    def due(self) -> bool:
        """Whether a version is here and only waits to be swapped in."""
        return self._ready is not None

    def advance(self, *, look: bool = True, may_swap: bool = True) -> Swap | None:
        """Do what is due without waiting: begin a fetch, or swap to what a fetch brought. Call it between two steps.

        `look`: whether to look for versions and edits on the volume; `may_swap`: whether the engine may be given other
        weights.
        """
        if look:
            self._follow_edits()
        if self._fetch is not None and self._fetch[2].done():
            self._take_fetched(*self._fetch)
            self._fetch = None
        if self._ready is not None and may_swap:
            fetched, fetch_s = self._ready
            self._ready = None
            return self._swap(fetched, fetch_s=fetch_s)
        if look and self._fetch is None and self._ready is None:
            self._start_fetch()
        return None

    def _take_fetched(self, version: Version, started: float, future: Future[Fetched]) -> None:
        try:
            self._ready = future.result(), time.monotonic() - started
        except FileNotFoundError:
            self._forget(version)
            log.info("weights %s were retired while they were fetched; taking another version", version)
        except (CorruptFile, UnknownProtocol) as error:
            self._reject(version, str(error))

    def close(self) -> None:
        """Stop fetching, a version that is half copied too."""
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _follow_edits(self) -> None:
        """Take over what may change in a live run."""
        for pool in self._exchange.spec.samplers:
            if pool.name == self.pool.name and pool != self.pool:
                self._adoption.change(pool.delay)
                self.pool = pool

    def _start_fetch(self) -> None:
        target = self._adoption.choose(list(self._look().items()), self.version, self._exchange.now())
        if target is not None and target != self.version:
            self._fetch = (target, time.monotonic(), self._thread.submit(self._bring, target))

    def _bring(self, version: Version) -> Fetched:
        """Runs on the thread: fetch, and make what the engine loads."""
        folder, held = self._scratch / str(version), self._serving.held if self._serving else {}
        fetched = self._exchange.fetch_weights(version, folder, held=held, arrived=self._arrived)
        if self._merger is not None:
            self._merger.merge_into(fetched.folder, lambda: self._arrived(0))
        return fetched

    def _arrived(self, num_bytes: int) -> None:
        """Keep a fetch within the pool's limit; end it when the sampler is told to go."""
        if limit := self.pool.fetch_bytes_per_second:
            self._next_read = max(self._next_read, time.monotonic()) + num_bytes / limit
        if self._closed.wait(max(0.0, self._next_read - time.monotonic())):
            raise CancelledError

    def _look(self) -> dict[Version, float]:
        """Versions and when they appeared by this machine's clock; those found at the start, by the learner's."""
        first_look = not self._published
        seen: dict[Version, float] = {}
        versions = self._exchange.list_versions()
        self._listed = set(versions)
        if versions and first_look:
            check_clock(self._exchange, self.pool.delay, versions[-1])
        for version in versions:
            if version in self.rejected:
                continue
            try:
                seen[version] = self._published.get(version) or (
                    self._exchange.published_at(version) if first_look else self._exchange.now()
                )
            except FileNotFoundError:
                continue
            except (CorruptFile, UnknownProtocol) as error:
                self._reject(version, str(error))
        self._published = seen
        return seen

    def _swap(self, fetched: Fetched, *, fetch_s: float) -> Swap | None:
        started = time.monotonic()
        try:
            difference = self._load(fetched)
        except (CorruptFile, CanaryMismatch) as error:
            self._reject(fetched.version, str(error))
            if self._serving is None:
                return None
            self._load(self._serving)  # a CanaryMismatch here leaves: the engine is broken, not the version
            return None
        previous, self._serving = self._serving, fetched
        if previous:
            self._forget(previous.version)
        newest = self.newest or fetched.version
        self._adoption.adopted(fetched.version, now_s=self._exchange.now(), newest_step=newest.step)
        return Swap(fetched.version, fetch_s, fetched.num_bytes, time.monotonic() - started, difference)

    def _load(self, fetched: Fetched) -> float:
        self._engine.load_weights(fetched.folder, fetched.version)
        return fetched.canary.check(fetched.version, self._engine.score, self._tolerance)

    def _forget(self, version: Version) -> None:
        shutil.rmtree(self._scratch / str(version), ignore_errors=True)

    def _reject(self, version: Version, reason: str) -> None:
        self._forget(version)
        self.rejected[version] = reason
        kept = f"generation continues with {self.version}" if self.version else "waiting for another version"
        log.error("refused weights %s: %s; %s", version, reason, kept)


def check_clock(exchange: Exchange, delay: DelaySpec, version: Version) -> None:
    """SiteError where this node's clock and that of the learner which published `version` differ too much.

    That is where the delay is in seconds: then ages of versions, and the time since a swap that another node made, are
    told by both. Else nothing but what people read is off, and it is only logged. Leases compare no clocks.
    """
    learner, ahead_s = exchange.claim(version.incarnation), exchange.clock_ahead_s()
    if learner is None or learner.clock_ahead_s is None or ahead_s is None:
        return
    skew_s = ahead_s - learner.clock_ahead_s
    if abs(skew_s) <= MAX_SKEW_S:
        return
    message = (
        f"this node's clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} that of the learner's node"
        f" {learner.host} (by the file server's clock, this one is {ahead_s:+.0f} s off and the learner's"
        f" {learner.clock_ahead_s:+.0f} s); expected at most {MAX_SKEW_S:g} s: synchronise the nodes' clocks (NTP)"
    )
    if delay.unit == "seconds" and delay.distribution != "none":
        raise SiteError(message)
    log.warning("%s", message)
