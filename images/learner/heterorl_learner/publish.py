"""Publishing weights: one copy on the training thread, the rest on a thread of its own.

all ranks: gather tensors ──copy──▶ rank 0's thread: score the canary, write, checksum, rename, retire old versions

While the thread is busy the newest copy waits for it and takes the place of one that waits already: that version is
never published. The memory of a copy that is published, or never will be, is that of the next one.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from torch import Tensor

from heterorl.errors import CorruptFile, UnknownProtocol
from heterorl.exchange.canary import CANARY_TOKENS, Canary, canary_texts
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.version import Version
from heterorl.heterogeneity.delay import horizon
from heterorl.spec.run import RunSpec
from heterorl_learner.engines.torch_ddp import MicroBatch, Scores, Sequence, TrainingEngine, micro_batch, save_weights
from heterorl_learner.version_writer import VersionWriter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """Weights on their way to the volume."""

    version: Version
    tensors: dict[str, Tensor]
    scores: Scores
    """Of the canary's texts."""


class Publisher:
    """Publishes the engine's weights as versions of one learner incarnation. All ranks call `publish` together.

    As a context it ends its thread, whatever happened; what the thread was doing is finished first.
    """

    def __init__(self, exchange: Exchange, engine: TrainingEngine, incarnation: int) -> None:
        self._exchange, self._engine, self._incarnation = exchange, engine, incarnation
        self._texts = _canary_texts(exchange)
        self._batches = [_as_micro_batch(text) for text in self._texts]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._lock = threading.Lock()
        self._waiting: Snapshot | None = None
        self._busy = False
        self._working: Future[None] | None = None
        self._times: dict[Version, float] = {}
        self._unused: dict[str, Tensor] = {}  # a copy that nobody needs
        self.version: Version | None = None
        """The newest that was published, or is going to be."""

    def __enter__(self) -> Self:
        self._scratch = Path(tempfile.mkdtemp(prefix="heterorl-weights-"))
        self._writer = VersionWriter(self._exchange, self._scratch)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.shutdown()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def retire_lost_future(self, step: int) -> None:
        """Delete versions after `step`, from which the learner resumed: training will not come by them again."""
        versions = self._exchange.list_versions()
        for version in versions:
            if version.step > step:
                self._exchange.unpin(version)
        self._exchange.retire_weights(v for v in versions if v.step <= step)

    def publish(self, step: int) -> float:
        """Publish the weights after `step` updates, or later ones if the thread is still busy by then.

        Returns the seconds that this took of training. Raises what went wrong with an earlier version.
        """
        started = time.monotonic()
        with self._lock:
            unused, self._unused = self._unused, {}
        tensors = self._engine.full_state_dict(unused)
        scores = self._engine.score_copy(tensors, self._batches)
        self.version = Version(step, self._incarnation)
        if self._engine.rank == 0:
            self._hand_over(Snapshot(self.version, tensors, scores))
        return time.monotonic() - started

    def wait(self) -> None:
        """Return when everything is published; raises what went wrong."""
        if self._working is not None:
            self._working.result()

    def _hand_over(self, snapshot: Snapshot) -> None:
        if self._working is not None and self._working.done():
            self._working.result()
        with self._lock:
            skipped, self._waiting = self._waiting, snapshot
            was_busy, self._busy = self._busy, True
            if skipped:
                self._unused = skipped.tensors
        if skipped:
            log.info("weights %s are not published: earlier ones are still being written", skipped.version)
        if not was_busy:
            self._working = self._thread.submit(self._work)

    def _work(self) -> None:
        while snapshot := self._next():
            self._publish(snapshot)
            with self._lock:
                self._unused = snapshot.tensors

    def _next(self) -> Snapshot | None:
        with self._lock:
            snapshot, self._waiting = self._waiting, None
            self._busy = snapshot is not None
        return snapshot

    def _publish(self, snapshot: Snapshot) -> None:
        canary = Canary(self._texts, snapshot.scores())
        if self._engine.adapter_config is None:
            self._writer.write(snapshot.version, snapshot.tensors, canary)
        else:  # small enough as they are
            staged = self._exchange.stage_weights(snapshot.version)
            save_weights(snapshot.tensors, self._engine.adapter_config, staged)
            self._exchange.commit_weights(snapshot.version, canary)
        self._times = {v: at for v in self._exchange.list_versions() if (at := self._published_at(v)) is not None}
        keep = versions_to_keep(self._exchange.spec, list(self._times.items()), self._exchange.now())
        self._exchange.retire_weights(keep)

    def _published_at(self, version: Version) -> float | None:
        """When it was published; None for one that cannot be read: it is put aside, or left to whom it belongs."""
        if version in self._times:
            return self._times[version]
        try:
            return self._exchange.published_at(version)
        except FileNotFoundError:
            return None
        except UnknownProtocol as error:
            log.error("%s", error)
        except CorruptFile as error:
            log.error("weights %s go to quarantine: %s", version, error)
            self._exchange.quarantine_weights(version, str(error))
        return None


def versions_to_keep(spec: RunSpec, published: list[tuple[Version, float]], now_s: float) -> set[Version]:
    """The newest few, and all that a transit delay may still make visible: those within its horizon and one before."""
    published = sorted(published)
    kept = {version for version, _ in published[-spec.exchange.retention.weights :]}
    for pool in spec.samplers:
        reach = horizon(pool.delay, spec.time_scale)
        newest_step = published[-1][0].step
        ages = [
            (now_s - at if pool.delay.unit == "seconds" else newest_step - version.step, version)
            for version, at in published
        ]
        within = [version for age, version in ages if age < reach]
        beyond = [version for age, version in ages if age >= reach]
        kept.update(within, beyond[-1:] if reach else [])
    return kept


def _canary_texts(exchange: Exchange) -> list[list[int]]:
    prompts = [row["prompt_ids"] for row in itertools.islice(exchange.rows("train"), 2 * CANARY_TOKENS)]
    return canary_texts(exchange.tokenizer(), prompts)


def _as_micro_batch(text: list[int]) -> MicroBatch:
    ids = np.array(text, np.int32)
    unused = np.zeros(len(ids) - 1, np.float32)
    return micro_batch([Sequence(ids[:1], ids[1:], unused, group=0, advantage=0.0)])
