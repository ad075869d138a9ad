"""The sampler's loop, and beside it the rewards.

    follow the weights ── feed groups, if there is room ── a step of the engine ──┐     scorer (a thread):
          ▲                                                                       │     score ── publish
          └───────────────────────────────────────────────────────────────────────┴──▶ what is finished

The engine never runs empty while there is something to do: behind the groups in generation as many again are queued, a
finished one goes to the scorer at once, and new weights are swapped in between two steps. With nothing to generate the
loop waits: for its first weights, the newest ones in online mode, or room in the queue; what is being scored counts as
queued. A slot's sequence number is its prompt cursor and its seed: the slot's next holder continues where this one
stopped, beginning with the groups that it left unfinished.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterorl.errors import HeteroRLError, SiteError, UserError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import BARREN_GROUPS, SlotState
from heterorl.exchange.rollout import Completion, Rollout, RolloutName, Sampling, SamplingDistribution, joined
from heterorl.exchange.slots import Lease
from heterorl.exchange.version import Version
from heterorl.monitoring.metrics import Metrics
from heterorl.seeds import derive_seed
from heterorl.spec.run import RunSpec
from heterorl_sampler.activity import Activity
from heterorl_sampler.backpressure import Lookout, Queue, queue_of, reason_to_wait, room
from heterorl_sampler.engines.base import InferenceEngine
from heterorl_sampler.prompt_order import PromptOrder
from heterorl_sampler.rewards import Row
from heterorl_sampler.scoring import Decoder, RewardFailed, Rewards, Scored
from heterorl_sampler.weight_sync import Swap, WeightSync

log = logging.getLogger(__name__)

SHORTEST_PAUSE_S = 0.002
"""Between two looks at a fetch that has just begun."""
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
    """Groups that are scored together: all that were finished when the scorer was free."""

    spec: RunSpec
    """As it was then."""
    served: Version
    """The weights that the engine held then."""
    groups: list[Generated]
    generate_s: float
    """Seconds of generation since the batch before."""
    waited_s: Mapping[str, float]
    """Seconds waited since then, by reason: weights, queue, rewards, staleness, finished."""

    @property
    def tokens(self) -> int:
        """Generated ones."""
        return sum(len(completion.token_ids) for group in self.groups for completion in group.completions)


@dataclass(frozen=True)
class Outcome:
    """What became of a batch."""

    groups: int
    """How many of its groups, in order, are done with."""
    published: list[RolloutName]


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
        self._lookout = Lookout(exchange, lease.slot)
        saved = exchange.load_slot(lease.slot)
        self._left = list(saved.left) if saved else []
        self._next_seq = lease.first_seq
        self._safe_seq = 0 if self._left else self._next_seq  # a state that offers numbers is replaced before their use
        self._status.rollouts = self._next_seq
        self._in_engine: dict[int, tuple[int, Row]] = {}  # by the engine's number
        self._finished: list[Generated] = []
        self._published: dict[int, Version] = {
            name.seq: name.version for name in exchange.list_rollouts() if name.slot == lease.slot
        }
        self._waited_s: defaultdict[str, float] = defaultdict(float)  # since the last batch
        self._generate_s = 0.0  # since then
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._scoring: deque[tuple[Batch, Future[Outcome]]] = deque()
        self._no_more_scores = threading.Event()

    def run(self) -> None:
        """Sample until told to stop; what is finished and scored by then is published."""
        try:
            while not self._stop.is_set():
                self._collect()
                if swap := self._weights.advance(look=self._lookout.look(), may_swap=self._may_swap()):
                    self._note_swap(swap)
                self._status.rejected, self._status.refused = len(self._weights.rejected), self._weights.refused
                self._status.fetching = self._weights.fetching
                reason = self._feed()
                if self._engine.num_groups:
                    self._step()
                else:
                    self._wait(reason or "rewards")
            self._finish()
        finally:
            self._weights.close()
            self._no_more_scores.set()
            self._scorer.shutdown(wait=False, cancel_futures=True)

    def _may_swap(self) -> bool:
        """Online, groups of an older version would be made in vain, but those that have begun are finished."""
        inflight = self._weights.pool.swap == "inflight" and self._lookout.spec.mode != "online"
        return (inflight and self._engine.keeps_running) or not self._engine.num_groups

    def _wait(self, reason: str) -> None:
        self._activity.progress(f"waiting: {reason}")
        started = time.monotonic()
        pause_s = self._lookout.pause_s(sum(self._waited_s.values()))
        if (fetching_s := self._weights.fetching_s) is not None:  # on a thread; what it brings is served at once
            pause_s = min(pause_s, max(SHORTEST_PAUSE_S, fetching_s / 10))
        self._stop.wait(pause_s)
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
                "fetch_bytes": swap.fetch_bytes,
                "load_s": swap.load_s,
                "canary/mean_abs_diff": swap.canary_mean_abs_diff,
            },
        )
        log.info(
            "weights %s: fetched %.1f MB in %.2f s, loaded in %.2f s, canary off by %.1e on average",
            swap.version,
            swap.fetch_bytes / 1e6,
            swap.fetch_s,
            swap.load_s,
            swap.canary_mean_abs_diff,
        )

    def _save(self, left: Sequence[int] = ()) -> None:
        """Put on the disk what the slot's next holder must know; numbers below the next one are then safe to publish.

        `left`: numbers that were handed out and will not be published by this holder, which is its last word.
        """
        state = SlotState(
            next_seq=self._next_seq, left=[*left], adoption=self._weights.state, prompts=self._order.evidence
        )
        self._exchange.save_slot(self._lease, state)
        self._safe_seq = self._next_seq

    # ── groups: generated here ───────────────────────────────────────────────────────────────────────────────────────
    def _feed(self) -> str | None:
        """Queue groups in the engine while there is room; why not, when none may be added now."""
        spec, version, newest = self._lookout.spec, self._weights.version, self._weights.newest
        if version is None or newest is None or (self._weights.due and not self._may_swap()):
            return "weights"
        queue = self._queue(version)
        if reason := reason_to_wait(spec, version, newest, self._lookout.learner, queue):
            return reason
        count = room(spec, self._weights.pool.prompts_per_batch, queue, self._lease.slot)
        if count and spec.mode == "online":  # what others have begun since the last look is not made twice
            self._lookout.look_at_slots()
            count = room(spec, self._weights.pool.prompts_per_batch, self._queue(version), self._lease.slot)
        for _ in range(count):
            self._add(spec, version)
        if count and spec.mode == "online":  # told at once: the others decide by it what to make
            self._status.promised += count
            self._exchange.beat(self._lease, self._status)
        return None

    def _queue(self, version: Version) -> Queue:
        learner, slot = self._lookout.learner, self._lease.slot
        taken = learner.taken.get(str(slot), -1)
        self._published = {seq: by for seq, by in self._published.items() if seq > taken or by == version}
        in_scoring = [*self._finished, *(group for batch, _ in self._scoring for group in batch.groups)]
        queue = queue_of(
            self._lookout.spec,
            slot,
            version,
            self._published,
            [group.name.version for group in in_scoring],
            len(self._in_engine),
            learner,
            self._lookout.made_by_others(version),
        )
        self._status.pending, self._status.made = queue.own - queue.in_scoring, queue.made
        self._status.promised = queue.promised
        return queue

    def _add(self, spec: RunSpec, version: Version) -> None:
        if self._left:
            seq = self._left.pop(0)
        else:
            seq, self._next_seq = self._next_seq, self._next_seq + 1
        row = self._order.row(seq, version.step)
        seed = derive_seed("generation", spec.seed + spec.generation.seed, self._lease.slot, seq)
        group_size, sampling = spec.algorithm.group_size, Sampling.of(spec.generation)
        self._in_engine[self._engine.add(row["prompt_ids"], group_size, sampling, seed << 16)] = seq, row

    def _step(self) -> None:
        """A token of everything in generation; what is finished by it goes to the scorer as soon as that is free."""
        self._activity.progress("generating")
        started = time.monotonic()
        finished = self._engine.step()
        self._generate_s += time.monotonic() - started
        for number, completions in finished:
            seq, row = self._in_engine.pop(number)
            oldest = min(version for completion in completions for version, _ in completion.versions)
            name = RolloutName(oldest, self._lease.slot, seq)
            self._finished.append(Generated(name, row, completions))
        if self._finished and not self._scoring:
            self._submit()

    def _submit(self) -> None:
        served = self._weights.version
        assert served is not None
        batch = Batch(self._lookout.spec, served, self._finished, self._generate_s, self._waited_s)
        self._finished, self._generate_s, self._waited_s = [], 0.0, defaultdict(float)
        # Saved before the first name appears: a number may be skipped by a crash, never used twice.
        if any(group.name.seq >= self._safe_seq for group in batch.groups):
            self._save()
        self._status.rollouts = self._next_seq - len(self._in_engine) - len(self._left)
        self._status.tokens_per_s = batch.tokens / max(batch.generate_s, 1e-9)
        self._scoring.append((batch, self._scorer.submit(self._score, batch)))

    def _collect(self) -> None:
        """Note what is published; raise what went wrong with it."""
        while self._scoring and self._scoring[0][1].done():
            outcome = self._scoring.popleft()[1].result()
            self._published |= {name.seq: name.version for name in outcome.published}
        if self._finished and not self._scoring:
            self._submit()

    def _finish(self) -> None:
        """Publish what is scored within a few seconds; the numbers of the rest go back to the slot's next holder."""
        self._engine.drop()
        if self._finished:
            self._submit()
        wait([done for _, done in self._scoring], LAST_SCORES_S)
        self._no_more_scores.set()
        if any(not done.done() for _, done in self._scoring):
            self._rewards.close()  # a call may hang
        unscored = [g.name.seq for batch, done in self._scoring for g in batch.groups[done.result().groups :]]
        left = {*self._left, *unscored, *(seq for seq, _ in self._in_engine.values())}
        while self._next_seq - 1 in left:
            self._next_seq -= 1
            left.remove(self._next_seq)
        self._save(sorted(left))

    # ── and scored there ─────────────────────────────────────────────────────────────────────────────────────────────
    def _score(self, batch: Batch) -> Outcome:
        """Score a batch and publish it. Runs on the scorer's thread."""
        if self._no_more_scores.is_set():
            return Outcome(0, [])
        started = time.monotonic()
        seen = [self._decoder.group(group.row, group.completions) for group in batch.groups]
        scores = self._rewards.score(seen, self._no_more_scores)
        scored = [(group, found) for group, found in zip(batch.groups, scores.groups) if found is not None]
        for group, found in scored:
            self._order.observe(group.row, found.rewards, group.name.version.step)
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
        return Outcome(len(scores.groups), list(rollouts))

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

    def _rollout(self, batch: Batch, group: Generated, scored: Scored) -> Rollout:
        row, tokens = group.row, [token for completion in group.completions for token in completion.token_ids]
        return Rollout(
            prompt_ids=np.array(row["prompt_ids"], np.int32),
            completion_ids=np.array(tokens, np.int32),
            lengths=np.array([len(completion.token_ids) for completion in group.completions], np.int32),
            logp=np.array([p for completion in group.completions for p in completion.logp], np.float32),
            versions=joined(run for completion in group.completions for run in completion.versions),
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
            "version_step": batch.served.step,
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
