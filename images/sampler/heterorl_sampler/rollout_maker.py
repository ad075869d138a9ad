"""Making rollouts: the slot's next prompts, their completions, the rewards."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from heterorl.exchange.rollout import (
    Completion,
    Provenance,
    Rollout,
    RolloutName,
    Sampling,
    SamplingDistribution,
    Version,
)
from heterorl.exchange.slots import Lease
from heterorl.seeds import derive_seed
from heterorl.spec.run import RunSpec
from heterorl_sampler.engines.build import InferenceEngine
from heterorl_sampler.prompt_order import PromptOrder
from heterorl_sampler.rewards import RewardFailed, Rewards

log = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """The result of one generation."""

    rollouts: dict[RolloutName, Rollout]
    next_seq: int
    """The first number that is still free: those of finished groups are used, with or without a reward."""
    failure: RewardFailed | None
    """Why a group is missing, when a reward failed on it."""
    generate_s: float
    score_s: float


class RolloutMaker:
    """Makes one slot's rollouts with the engine's present weights; a number stands for a prompt and for a seed."""

    def __init__(
        self,
        spec: RunSpec,
        provenance: Provenance,
        lease: Lease,
        engine: InferenceEngine,
        tokenizer: PreTrainedTokenizerBase,
        rewards: Rewards,
        rows: list[Row],
    ) -> None:
        self._provenance, self._lease, self._engine = provenance, lease, engine
        self._tokenizer, self._rewards = tokenizer, rewards
        self._order = PromptOrder(
            rows,
            seed=spec.seed + spec.data.shuffle_seed,
            share=spec.slots.index(lease.slot) if lease.slot in spec.slots else lease.slot.index,
            shares=len(spec.slots),
            weights=spec.data.train.weights,
        )

    def make(
        self, spec: RunSpec, version: Version, numbers: range, progress: Callable[[str], None], stop: Callable[[], bool]
    ) -> Batch:
        """Generate for these sequence numbers and score what was finished before `stop`.

        `progress` is called with what is being done whenever something came of it: a token, a group's rewards.
        """

        def stopped() -> bool:
            progress("generating")
            return stop()

        started = time.monotonic()
        rows = [self._order.row(seq) for seq in numbers]
        groups = self._engine.generate(
            [row["prompt_ids"] for row in rows],
            spec.algorithm.group_size,
            Sampling.of(spec.generation),
            derive_seed("generation", spec.seed + spec.generation.seed, self._lease.slot, numbers.start),
            stop=stopped,
        )
        generated = time.monotonic()
        finished = [(seq, row, group) for seq, row, group in zip(numbers, rows, groups) if group is not None]
        rollouts: dict[RolloutName, Rollout] = {}
        failure = None
        for seq, row, group in finished:
            progress(f"scoring row {row['id']}")
            try:
                rollouts[RolloutName(version, self._lease.slot, seq)] = self._rollout(spec, version, row, group)
            except RewardFailed as error:
                log.error("%s; this group is left out", error)
                failure = error
        next_seq = max((seq + 1 for seq, _, _ in finished), default=numbers.start)
        return Batch(rollouts, next_seq, failure, generated - started, time.monotonic() - generated)

    def _rollout(self, spec: RunSpec, version: Version, row: Row, group: list[Completion]) -> Rollout:
        texts = self._tokenizer.batch_decode([c.token_ids for c in group], skip_special_tokens=True)
        lengths = np.array([len(c.token_ids) for c in group], np.int32)
        truncated = np.array([c.truncated for c in group], np.bool_)
        rewards, terms = self._rewards.score(texts, lengths.tolist(), truncated.tolist(), row)
        tokens = int(lengths.sum())
        return Rollout(
            prompt_ids=np.array(row["prompt_ids"], np.int32),
            completion_ids=np.fromiter((t for c in group for t in c.token_ids), np.int32, tokens),
            lengths=lengths,
            logp=np.fromiter((p for c in group for p in c.logp), np.float32, tokens),
            versions=np.full(tokens, version.step, np.int32),
            rewards=rewards,
            truncated=truncated,
            provenance=self._provenance.model_copy(update={"sampling": SamplingDistribution.of(spec.generation)}),
            reward_terms=terms,
            lease_epoch=self._lease.epoch,
            meta={"row_id": row["id"], "answer": row["answer"]} | ({"set": row["set"]} if "set" in row else {}),
        )
