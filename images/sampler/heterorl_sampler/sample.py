"""The sampler's loop.

    advance the weights ── wait if the queue is full ── generate ── reward ── publish ──────────────┐
          ▲                                                                                         │
          └─────────────────────────────────────────────────────────────────────────────────────────┘

It waits only for its first weights, the newest ones in online mode, and room in the queue. A slot's sequence
number is its prompt cursor and its seed: the slot's next holder continues where this one stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict

import numpy as np

from heterorl.errors import SiteError, UserError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import LearnerHeartbeat, SlotState
from heterorl.exchange.rollout import Version
from heterorl.exchange.slots import Lease
from heterorl.monitoring.metrics import Metrics
from heterorl_sampler.activity import Activity
from heterorl_sampler.backpressure import Queue, batch_size, pending, reason_to_wait
from heterorl_sampler.rollout_maker import Batch, RolloutMaker
from heterorl_sampler.weight_sync import Swap, WeightSync

log = logging.getLogger(__name__)

GIVE_UP_AFTER = 16
"""Groups in a row on which a reward fails before it is taken to fail on all."""


class Sampler:
    """One slot at work."""

    def __init__(
        self,
        exchange: Exchange,
        lease: Lease,
        activity: Activity,
        weights: WeightSync,
        maker: RolloutMaker,
        metrics: Metrics,
        stop: threading.Event,
    ) -> None:
        self._exchange, self._lease, self._metrics, self._stop = exchange, lease, metrics, stop
        self._activity, self._weights, self._maker = activity, weights, maker
        self._status = activity.status  # shown by the heartbeat
        self._status.rollouts = self._next_seq = lease.first_seq
        self._waited_s: defaultdict[str, float] = defaultdict(float)
        """Since the last batch, by reason: weights, queue, staleness, finished."""
        self._failed_in_a_row = 0

    def run(self) -> None:
        """Sample until told to stop; what was finished by then is published."""
        try:
            while not self._stop.is_set():
                if swap := self._weights.advance():
                    self._note_swap(swap)
                self._status.rejected, self._status.refused = len(self._weights.rejected), self._weights.refused
                version, newest = self._weights.version, self._weights.newest
                if version is None or newest is None:
                    self._wait("weights")
                    continue
                learner = self._exchange.learner or LearnerHeartbeat(step=0)
                spec = self._exchange.spec
                queue = pending(spec, self._exchange.list_rollouts(), learner, self._lease.slot, version)
                if reason := reason_to_wait(spec, version, newest, learner, queue):
                    self._wait(reason)
                else:
                    self._sample_batch(version, queue)
        finally:
            self._weights.close()

    def _wait(self, reason: str) -> None:
        self._activity.progress(f"waiting: {reason}")
        started = time.monotonic()
        self._stop.wait(self._exchange.spec.exchange.poll_seconds)
        self._waited_s[reason] += time.monotonic() - started

    def _note_swap(self, swap: Swap) -> None:
        self._status.version, self._status.version_step = str(swap.version), swap.version.step
        self._status.swaps += 1
        self._status.canary_mean_abs_diff = swap.canary_mean_abs_diff
        self._save()
        self._metrics.event(
            "swap",
            {
                "version": str(swap.version),
                "version_step": swap.version.step,
                "fetch_s": swap.fetch_s,
                "load_s": swap.load_s,
                "canary/mean_abs_diff": swap.canary_mean_abs_diff,
            },
        )
        log.info(
            "weights %s: fetched in %.2f s, loaded in %.2f s, canary off by %.1e on average",
            swap.version,
            swap.fetch_s,
            swap.load_s,
            swap.canary_mean_abs_diff,
        )

    def _save(self) -> None:
        self._exchange.save_slot(self._lease, SlotState(next_seq=self._next_seq, adoption=self._weights.state))

    # ── one batch ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _sample_batch(self, version: Version, queue: Queue) -> None:
        spec = self._exchange.spec
        count = batch_size(spec, self._weights.pool.prompts_per_batch, queue)
        numbers = range(self._next_seq, self._next_seq + count)
        batch = self._maker.make(spec, version, numbers, self._activity.progress, self._stop.is_set)
        # Saved before the first name appears: a number may be skipped by a crash, never used twice.
        self._next_seq = batch.next_seq
        self._save()
        if batch.rollouts:
            self._exchange.put_rollouts(self._lease, batch.rollouts)
            self._record(version, batch, queue)
        self._judge(batch, numbers)

    def _judge(self, batch: Batch, numbers: range) -> None:
        """A reward that fails on a row costs that group; one that fails on all ends this process, or the run.

        Where rollouts were made before, by this sampler or another one, the reward works and this node is to blame (it
        may not reach a judge, for one); otherwise it is a user error.
        """
        self._status.unrewarded += batch.next_seq - numbers.start - len(batch.rollouts)
        if batch.failure is None or batch.rollouts:
            self._failed_in_a_row = 0
            return
        self._failed_in_a_row += batch.next_seq - numbers.start
        if self._failed_in_a_row < min(GIVE_UP_AFTER, 2 * len(numbers)):
            return
        if self._exchange.step or self._exchange.list_rollouts():
            raise SiteError(f"{batch.failure}; the last {self._failed_in_a_row} groups failed here, others did not")
        raise UserError(f"{batch.failure}; it failed on all of the first {self._failed_in_a_row} groups")

    def _record(self, version: Version, batch: Batch, queue: Queue) -> None:
        rollouts = list(batch.rollouts.values())
        tokens = sum(len(r.completion_ids) for r in rollouts)
        reward = float(np.mean([r.rewards.mean() for r in rollouts]))
        waited_s, self._waited_s = self._waited_s, defaultdict(float)
        self._status.rollouts, self._status.pending = self._next_seq, queue.own + len(rollouts)
        self._status.reward, self._status.tokens_per_s = reward, tokens / batch.generate_s
        self._metrics.write(
            None,
            {
                "version_step": version.step,
                "groups": len(rollouts),
                "names": [str(name) for name in batch.rollouts],
                "reward": reward,
                "completions/mean_length": tokens / sum(len(r.lengths) for r in rollouts),
                "tokens_per_s": tokens / batch.generate_s,
                "rollout/generate_s": batch.generate_s,
                "rollout/score_s": batch.score_s,
                "rollout/backpressure_s": waited_s["queue"] + waited_s["staleness"],
                "rollout/weights_wait_s": waited_s["weights"],
                "rollouts": self._next_seq,
                "rejected_versions": len(self._weights.rejected),
            },
        )
