"""The sampler's loop, and beside it the rewards.

    advance the weights ── wait if the queue is full ── generate a batch ──┐        scorer (a thread):
          ▲                                                                │        score ── publish
          └────────────────────────────────────────────────────────────────┴──────────▶ batch

The loop waits only for its first weights, the newest ones in online mode, and room in the queue; what is being scored
counts as queued. A slot's sequence number is its prompt cursor and its seed: the slot's next holder continues where
this one stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterorl.errors import HeteroRLError, SiteError, UserError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import BARREN_GROUPS, LearnerHeartbeat, SlotState
from heterorl.exchange.rollout import Completion, Rollout, RolloutName, Sampling, SamplingDistribution, Version
from heterorl.exchange.slots import Lease
from heterorl.monitoring.metrics import Metrics
from heterorl.seeds import derive_seed
from heterorl.spec.run import RunSpec
from heterorl_sampler.activity import Activity
from heterorl_sampler.backpressure import Queue, batch_size, pending, promised_by_others, reason_to_wait
from heterorl_sampler.decoding import Decoder
from heterorl_sampler.engines.build import InferenceEngine
from heterorl_sampler.prompt_order import PromptOrder
from heterorl_sampler.rewards import Group, Row
from heterorl_sampler.scoring import RewardFailed, Rewards, Scored
from heterorl_sampler.weight_sync import Swap, WeightSync

log = logging.getLogger(__name__)

LAST_SCORES_S = 4.0
"""Time that rewards have for what is generated when the sampler is told to stop."""
_META = {"row_id": "id", "answer": "answer", "set": "set"}  # what a rollout says of its row


@dataclass(frozen=True)
class Generated:
    """A prompt's finished completions, on their way through the rewards."""

    name: RolloutName
    row: Row
    completions: list[Completion]


@dataclass(frozen=True)
class Batch:
    """What one generation gave."""

    spec: RunSpec
    """As it was then."""
    version: Version
    groups: list[Generated]
    generate_s: float
    waited_s: Mapping[str, float]
    """Seconds waited before it, by reason: weights, queue, rewards, staleness, finished."""

    @property
    def tokens(self) -> int:
        """Generated ones."""
        return sum(len(completion.token_ids) for group in self.groups for completion in group.completions)


class Sampler:
    """One slot at work."""

    def __init__(
        self,
        exchange: Exchange,
        lease: Lease,
        activity: Activity,
        weights: WeightSync,
        engine: InferenceEngine,
        order: PromptOrder,
        decoder: Decoder,
        rewards: Rewards,
        metrics: Metrics,
        stop: threading.Event,
    ) -> None:
        self._exchange, self._lease, self._metrics, self._stop = exchange, lease, metrics, stop
        self._activity, self._weights, self._engine, self._order = activity, weights, engine, order
        self._decoder, self._rewards = decoder, rewards
        self._provenance = exchange.provenance.model_copy(update={"reward_sources": rewards.sources})
        self._status = activity.status  # shown by the heartbeat
        self._status.rollouts = self._next_seq = lease.first_seq
        self._waited_s: defaultdict[str, float] = defaultdict(float)  # since the last batch
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._scoring: deque[tuple[Batch, Future[int]]] = deque()
        self._no_more_scores = threading.Event()

    def run(self) -> None:
        """Sample until told to stop; what is finished and scored by then is published."""
        try:
            while not self._stop.is_set():
                self._collect()
                if swap := self._weights.advance():
                    self._note_swap(swap)
                self._status.rejected, self._status.refused = len(self._weights.rejected), self._weights.refused
                version, newest = self._weights.version, self._weights.newest
                if version is None or newest is None:
                    self._wait("weights")
                    continue
                learner = self._exchange.learner or LearnerHeartbeat(step=0)
                queue = self._queue(learner, version)
                if reason := reason_to_wait(self._exchange.spec, version, newest, learner, queue):
                    self._wait(reason)
                else:
                    self._generate(version, queue)
            self._finish()
        finally:
            self._weights.close()
            self._no_more_scores.set()
            self._scorer.shutdown(wait=False, cancel_futures=True)

    def _queue(self, learner: LearnerHeartbeat, version: Version) -> Queue:
        spec, published = self._exchange.spec, self._exchange.list_rollouts()
        in_scoring = [group.name for batch, _ in self._scoring for group in batch.groups]
        queue = pending(spec, published, in_scoring, learner, self._lease.slot, version)
        self._status.pending = queue.own - queue.in_scoring
        self._status.promised = queue.own_of_version
        if spec.mode == "online":
            fresh_since = self._exchange.now() - spec.exchange.lease_seconds
            beats = self._exchange.heartbeats()
            promised = promised_by_others(beats, published, self._lease.slot, version, fresh_since=fresh_since)
            queue = replace(queue, promised=promised)
        return queue

    def _wait(self, reason: str) -> None:
        self._activity.progress(f"waiting: {reason}")
        started = time.monotonic()
        self._stop.wait(self._exchange.spec.exchange.poll_seconds)
        self._waited_s[reason] += time.monotonic() - started

    def _note_swap(self, swap: Swap) -> None:
        self._status.promised = 0
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
        state = SlotState(next_seq=self._next_seq, adoption=self._weights.state, prompts=self._order.evidence)
        self._exchange.save_slot(self._lease, state)

    # ── one batch: generated here ────────────────────────────────────────────────────────────────────────────────────
    def _generate(self, version: Version, queue: Queue) -> None:
        """Generate for the slot's next prompts and hand over what was finished before `stop`."""
        spec, slot, first = self._exchange.spec, self._lease.slot, self._next_seq
        count = batch_size(spec, self._weights.pool.prompts_per_batch, queue, slot)
        numbers = range(first, first + count)
        if spec.mode == "online":  # told at once: the others decide by it what to make
            self._status.promised += count
            self._exchange.beat(self._lease, self._status)
        rows = [self._order.row(seq, version.step) for seq in numbers]
        started = time.monotonic()
        groups = self._engine.generate(
            [row["prompt_ids"] for row in rows],
            spec.algorithm.group_size,
            Sampling.of(spec.generation),
            derive_seed("generation", spec.seed + spec.generation.seed, slot, first),
            stop=self._is_over,
        )
        finished = [
            Generated(RolloutName(version, slot, seq), row, group)
            for seq, row, group in zip(numbers, rows, groups)
            if group is not None
        ]
        batch = Batch(spec, version, finished, time.monotonic() - started, self._waited_s)
        self._waited_s = defaultdict(float)
        if not finished:
            return
        # Saved before the first name appears: a number may be skipped by a crash, never used twice.
        self._status.rollouts = self._next_seq = finished[-1].name.seq + 1
        self._save()
        self._status.tokens_per_s = batch.tokens / batch.generate_s
        self._scoring.append((batch, self._scorer.submit(self._score, batch)))

    def _is_over(self) -> bool:
        self._activity.progress("generating")
        return self._stop.is_set() or any(done.done() and done.exception() for _, done in self._scoring)

    def _collect(self) -> None:
        """Forget what is published; raise what went wrong with it."""
        while self._scoring and self._scoring[0][1].done():
            self._scoring.popleft()[1].result()

    def _finish(self) -> None:
        """Publish what is scored within a few seconds; the numbers of the rest go back to the slot's next holder."""
        wait([done for _, done in self._scoring], LAST_SCORES_S)
        self._no_more_scores.set()
        if any(not done.done() for _, done in self._scoring):
            self._rewards.close()  # a call may hang
        for batch, done in self._scoring:
            if (scored := done.result()) < len(batch.groups):
                self._next_seq = batch.groups[scored].name.seq
                break
        self._save()

    # ── and scored there ─────────────────────────────────────────────────────────────────────────────────────────────
    def _score(self, batch: Batch) -> int:
        """Score a batch and publish it; how many of its groups are done with. Runs on the scorer's thread."""
        started = time.monotonic()
        seen = [self._seen(group) for group in batch.groups]
        scores = self._rewards.score(seen, self._no_more_scores)
        scored = [(group, found) for group, found in zip(batch.groups, scores.groups) if found is not None]
        for group, found in scored:
            self._order.observe(group.row, found.rewards, batch.version.step)
        rollouts = {group.name: self._rollout(batch, group, found) for group, found in self._kept(batch.spec, scored)}
        if rollouts:
            self._exchange.put_rollouts(self._lease, rollouts)
        left_out = {"unrewarded": len(scores.groups) - len(scored), "filtered": len(scored) - len(rollouts)}
        self._status.unrewarded += left_out["unrewarded"]
        self._status.filtered += left_out["filtered"]
        self._status.reward_failures = dict(self._rewards.failures)
        reward = float(np.mean([found.rewards.mean() for _, found in scored])) if scored else None
        self._record(batch, list(rollouts), reward, left_out, time.monotonic() - started)
        if scores.failure:
            raise _blamed(self._exchange, scores.failure)
        return len(scores.groups)

    def _kept(self, spec: RunSpec, scored: Iterable[tuple[Generated, Scored]]) -> Iterator[tuple[Generated, Scored]]:
        """The groups to publish; that a slot finds none for long is said, also by its heartbeat."""
        for group, found in scored:
            if spec.algorithm.filter_groups == "none" or has_advantages(found.rewards):
                self._status.filtered_in_a_row = 0
                yield group, found
                continue
            self._status.filtered_in_a_row += 1
            if self._status.filtered_in_a_row % BARREN_GROUPS == 0:
                log.warning(
                    "the last %d groups taught nothing and were left out (algorithm.filterGroups): all completions of a"
                    " prompt got the same reward, %.3g in the last of them; the problems are too hard for the model, or"
                    " too easy, or the rewards do not tell its answers apart",
                    self._status.filtered_in_a_row,
                    found.rewards.mean(),
                )

    def _seen(self, group: Generated) -> Group:
        """A group as rewards see it."""
        texts = [self._decoder.text(completion.token_ids) for completion in group.completions]
        opened = self._decoder.opened(group.row)
        return Group(
            texts=texts,
            turns=[opened + text for text in texts],
            lengths=[len(completion.token_ids) for completion in group.completions],
            row={name: value for name, value in group.row.items() if name != "prompt_ids"},
            token_ids=[completion.token_ids for completion in group.completions],
        )

    def _rollout(self, batch: Batch, group: Generated, scored: Scored) -> Rollout:
        row, tokens = group.row, [token for completion in group.completions for token in completion.token_ids]
        return Rollout(
            prompt_ids=np.array(row["prompt_ids"], np.int32),
            completion_ids=np.array(tokens, np.int32),
            lengths=np.array([len(completion.token_ids) for completion in group.completions], np.int32),
            logp=np.array([p for completion in group.completions for p in completion.logp], np.float32),
            versions=np.full(len(tokens), batch.version.step, np.int32),
            rewards=scored.rewards,
            truncated=np.array([completion.truncated for completion in group.completions], np.bool_),
            provenance=self._provenance.model_copy(update={"sampling": SamplingDistribution.of(batch.spec.generation)}),
            reward_terms=scored.terms,
            lease_epoch=self._lease.epoch,
            meta={name: row[key] for name, key in _META.items() if key in row},
        )

    def _record(
        self,
        batch: Batch,
        published: list[RolloutName],
        reward: float | None,
        left_out: Mapping[str, int],
        score_s: float,
    ) -> None:
        """`reward`: mean of all groups that were scored, also those that were filtered."""
        self._status.reward = self._status.reward if reward is None else reward
        waited_s = batch.waited_s
        values: dict[str, Any] = {
            "version_step": batch.version.step,
            "groups": len(published),
            **left_out,
            "names": [str(name) for name in published],
            "reward": reward,
            "completions/mean_length": batch.tokens / sum(len(group.completions) for group in batch.groups),
            "tokens_per_s": batch.tokens / batch.generate_s,
            "rollout/generate_s": batch.generate_s,
            "rollout/score_s": score_s,
            "rollout/backpressure_s": waited_s.get("queue", 0.0) + waited_s.get("staleness", 0.0),
            "rollout/weights_wait_s": waited_s.get("weights", 0.0),
            "rollout/rewards_wait_s": waited_s.get("rewards", 0.0),
            "rollouts": self._status.rollouts,
            "rejected_versions": len(self._weights.rejected),
        }
        failures = {f"reward_failures/{kind}": count for kind, count in self._rewards.failures.items()}
        self._metrics.write(None, values | failures)


def has_advantages(rewards: NDArray[np.float32]) -> bool:
    """Whether the rewards [G] of a group differ by more than rounding; where they do not, it has no gradient.

    DAPO (arXiv 2503.14476) samples until a batch is full of groups that do.
    """
    return float(np.ptp(rewards)) > 1e-6 * float(np.abs(rewards).max())


def load_rewards(exchange: Exchange, rewards: Rewards) -> None:
    """Import custom rewards; one that cannot be imported is the user's error, or this node's."""
    try:
        rewards.load()
    except RewardFailed as failure:
        raise _blamed(exchange, failure) from failure


def _blamed(exchange: Exchange, failure: RewardFailed) -> HeteroRLError:
    """A reward that has worked, here or, as rollouts show, elsewhere, fails for this node: it may not reach a judge.

    Otherwise it is the user's error.
    """
    if failure.worked or (failure.worked is None and (exchange.step or exchange.list_rollouts())):
        return SiteError(f"{failure}; it fails here, while it has worked before or elsewhere")
    return UserError(str(failure))
