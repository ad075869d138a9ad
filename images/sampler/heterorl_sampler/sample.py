"""The sampler's loop.

    advance the weights ── wait if the queue is full ── generate ── reward ── publish ──────────────┐
          ▲                                                                                         │
          └─────────────────────────────────────────────────────────────────────────────────────────┘

It waits for nobody but its first weights, the newest ones in online mode, and room in the queue. A slot's sequence
number is its prompt cursor and its seed: whoever takes the slot over goes on where it stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import LearnerHeartbeat, SlotState, SlotStatus
from heterorl.exchange.rollout import Rollout
from heterorl.exchange.slots import Lease
from heterorl.heterogeneity.delay import Adoption
from heterorl.monitoring.metrics import Metrics
from heterorl.names import RolloutName, Version
from heterorl.seeds import derive_seed
from heterorl.spec.run import RunSpec, SamplerPoolSpec
from heterorl_sampler.backpressure import batch_size, pending, reason_to_wait
from heterorl_sampler.engines.base import Completion, InferenceEngine, Sampling
from heterorl_sampler.prompt_order import PromptOrder
from heterorl_sampler.rewards import Rewards
from heterorl_sampler.weight_sync import Swap, WeightSync

log = logging.getLogger(__name__)


@dataclass
class Waits:
    """Seconds waited since the last batch, by reason: `weights`, `queue`, `staleness`, `finished`."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, reason: str, seconds: float) -> None:
        """Count a wait."""
        self.seconds[reason] = self.seconds.get(reason, 0.0) + seconds


class Sampler:
    """One slot at work."""

    def __init__(
        self,
        exchange: Exchange,
        lease: Lease,
        status: SlotStatus,
        engine: InferenceEngine,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[dict[str, Any]],
        rewards: Rewards,
        metrics: Metrics,
        stop: threading.Event,
        scratch: Path,
    ) -> None:
        self.exchange, self.lease, self.engine, self.metrics, self.stop = exchange, lease, engine, metrics, stop
        self.spec: RunSpec = exchange.spec
        self.pool: SamplerPoolSpec = self.spec.pool(lease.slot.pool)
        self._tokenizer, self._rewards = tokenizer, rewards
        self.next_seq: int = lease.first_seq
        state = exchange.load_slot(lease.slot)
        self.adoption = Adoption(
            self.pool.delay,
            slot=str(lease.slot),
            seed=self.spec.seed,
            time_scale=self.spec.time_scale,
            state=state.adoption if state else None,
        )
        self.follower = WeightSync(exchange, engine, self.adoption, scratch)
        share = self.spec.slots.index(lease.slot) if lease.slot in self.spec.slots else lease.slot.index
        self._order = PromptOrder(
            rows, seed=self.spec.seed + self.spec.data.shuffle_seed, share=share, shares=len(self.spec.slots)
        )
        self._waits = Waits()
        self.swaps = 0
        self.status = status  # shown by the heartbeat
        self.status.rollouts = self.next_seq

    def run(self) -> None:
        """Sample until told to stop; what was finished by then is published."""
        try:
            while not self.stop.is_set():
                self._follow_edits()
                if swap := self.follower.advance():
                    self._note_swap(swap)
                self.status.rejected = len(self.follower.rejected)
                if wait := self._reason_to_wait():
                    self._wait(wait)
                else:
                    self._sample_batch()
        finally:
            self.follower.close()

    def _follow_edits(self) -> None:
        """Take over what may change in a live run. A pool that is being removed goes on as it was."""
        self.spec = self.exchange.spec
        for pool in self.spec.samplers:
            if pool.name == self.pool.name and pool != self.pool:
                self.adoption.change(pool.delay)
                self.pool = pool

    # ── waiting and swapping ─────────────────────────────────────────────────────────────────────────────────────────
    def _reason_to_wait(self) -> str | None:
        version, newest = self.follower.version, self.follower.newest
        if version is None or newest is None:
            return "weights"
        learner = self.exchange.learner or LearnerHeartbeat(step=0)
        self._queue = pending(self.spec, self.exchange.list_rollouts(), learner, self.lease.slot, version)
        return reason_to_wait(self.spec, version, newest, learner, self._queue)

    def _wait(self, reason: str) -> None:
        self.status.state = f"waiting: {reason}"
        started = time.monotonic()
        self.stop.wait(self.spec.exchange.poll_seconds)
        self._waits.add(reason, time.monotonic() - started)

    def _note_swap(self, swap: Swap) -> None:
        self.swaps += 1
        self.status.version, self.status.version_step = str(swap.version), swap.version.step
        self.status.swaps = self.swaps
        self.status.canary_mean_abs_diff = swap.canary_mean_abs_diff
        self._save()
        self.metrics.event(
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
        self.exchange.save_slot(self.lease, SlotState(next_seq=self.next_seq, adoption=self.adoption.state))

    # ── one batch ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _sample_batch(self) -> None:
        version = self.follower.version
        assert version is not None
        self.status.state = "generating"
        first = self.next_seq
        count = batch_size(self.spec, self.pool.prompts_per_batch, self._queue)
        rows = [self._order.row(seq) for seq in range(first, first + count)]
        started = time.monotonic()
        groups = self.engine.generate(
            [row["prompt_ids"] for row in rows],
            self.spec.algorithm.group_size,
            self._sampling(),
            derive_seed("generation", self.spec.seed + self.spec.generation.seed, self.lease.slot, first),
            stop=self.stop.is_set,
        )
        generated = time.monotonic()
        finished = [(first + i, row, group) for i, (row, group) in enumerate(zip(rows, groups)) if group is not None]
        # Saved before the first name appears: a number may be skipped by a crash, never used twice.
        self.next_seq = max((seq + 1 for seq, _, _ in finished), default=first)
        self._save()
        rollouts = {
            RolloutName(version, self.lease.slot, seq): self._rollout(version, row, group)
            for seq, row, group in finished
        }
        scored = time.monotonic()
        if rollouts:
            self.exchange.put_rollouts(self.lease, rollouts)
            self._record(version, rollouts, generate_s=generated - started, score_s=scored - generated)

    def _sampling(self) -> Sampling:
        generation = self.spec.generation
        return Sampling(
            max_tokens=generation.max_completion_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            min_p=generation.min_p,
            repetition_penalty=generation.repetition_penalty,
        )

    def _rollout(self, version: Version, row: dict[str, Any], group: list[Completion]) -> Rollout:
        texts = self._tokenizer.batch_decode([c.token_ids for c in group], skip_special_tokens=True)
        lengths = np.array([len(c.token_ids) for c in group], np.int32)
        truncated = np.array([c.truncated for c in group], np.bool_)
        rewards, terms = self._rewards.score(texts, lengths, truncated, row)
        tokens = int(lengths.sum())
        return Rollout(
            prompt_ids=np.array(row["prompt_ids"], np.int32),
            completion_ids=np.fromiter((t for c in group for t in c.token_ids), np.int32, tokens),
            lengths=lengths,
            logp=np.fromiter((p for c in group for p in c.logp), np.float32, tokens),
            versions=np.full(tokens, version.step, np.int32),
            rewards=rewards,
            truncated=truncated,
            reward_terms=terms,
            meta={"row_id": row["id"], "lease_epoch": self.lease.epoch},
        )

    def _record(
        self, version: Version, rollouts: dict[RolloutName, Rollout], *, generate_s: float, score_s: float
    ) -> None:
        tokens = sum(len(r.completion_ids) for r in rollouts.values())
        reward = float(np.mean([r.rewards.mean() for r in rollouts.values()]))
        waits, self._waits = self._waits.seconds, Waits()
        self.status.rollouts, self.status.pending = self.next_seq, self._queue.own + len(rollouts)
        self.status.reward, self.status.tokens_per_s = reward, tokens / generate_s
        self.metrics.write(
            None,
            {
                "version_step": version.step,
                "groups": len(rollouts),
                "names": [str(name) for name in rollouts],
                "reward": reward,
                "completions/mean_length": tokens / sum(len(r.lengths) for r in rollouts.values()),
                "tokens_per_s": tokens / generate_s,
                "rollout/generate_s": generate_s,
                "rollout/score_s": score_s,
                "rollout/backpressure_s": waits.get("queue", 0.0) + waits.get("staleness", 0.0),
                "rollout/weights_wait_s": waits.get("weights", 0.0),
                "rollouts": self.next_seq,
                "rejected_versions": len(self.follower.rejected),
            },
        )
