"""One optimizer step's arithmetic: rollouts in, loss and gradient out, and what is worth knowing about both."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heterorl.exchange.rollout import Rollout
from heterorl.spec.run import LearnerSpec, RunSpec
from heterorl_learner import ranks
from heterorl_learner.advantages import resolve_scale, step_advantages
from heterorl_learner.batching import MicroBatch, Sequence, plan
from heterorl_learner.engines.base import TrainingEngine
from heterorl_learner.losses import LossInputs, LossMetrics, Totals, combine, log_expected_q, policy_loss, summarise
from heterorl_learner.rollout_feed import StepBatch


def train_on(engine: TrainingEngine, spec: RunSpec, batch: StepBatch) -> dict[str, float]:
    """Add the step's gradient; returns the loss's metrics over all micro-batches and ranks."""
    totals = step_totals(spec, batch.rollouts)
    plans = plan(
        sequences(spec, batch.rollouts),
        spec.learner.batch.tokens_per_micro_batch,
        engine.world_size,
        whole_groups=spec.algorithm.loss.type == "eqp",
    )
    parts: list[LossMetrics] = []

    def loss_function(micro: MicroBatch, logp: Tensor) -> Tensor:
        loss, metrics = policy_loss(spec.algorithm, loss_inputs(micro, logp), totals)
        parts.append({name: value.cpu() for name, value in metrics.items()})
        return loss

    engine.forward_backward(plans[engine.rank], spec.generation.temperature, loss_function)
    everywhere = [part for of_rank in ranks.gather(parts) for part in of_rank]
    if not everywhere:  # every completion was cut and is masked: a step without a gradient
        return {"loss": 0.0, "kl_to_sampler": 0.0}
    return summarise(combine(everywhere))


def sequences(spec: RunSpec, rollouts: list[Rollout]) -> list[Sequence]:
    """The completions that count, with their group's GEPO denominator, which needs the group but not the learner."""
    scale = resolve_scale(spec.algorithm.loss.type, spec.algorithm.advantage.scale)
    advantages = step_advantages([r.rewards for r in rollouts], scale)
    found = []
    for group, rollout in enumerate(rollouts):
        ends = np.cumsum(rollout.lengths)
        logps = np.split(rollout.logp, ends[:-1])
        expected_q = float(log_expected_q(torch.tensor([logp.mean(dtype=np.float64) for logp in logps])))
        for i, completion in enumerate(np.split(rollout.completion_ids, ends[:-1])):
            if not (spec.algorithm.mask_truncated and rollout.truncated[i]):
                advantage = float(advantages[group][i])
                found.append(Sequence(rollout.prompt_ids, completion, logps[i], group, advantage, expected_q))
    return found


def step_totals(spec: RunSpec, rollouts: list[Rollout]) -> Totals:
    """The divisors of the whole step, the same on every rank because every rank has read all its rollouts."""
    lengths = torch.from_numpy(np.concatenate([r.lengths for r in rollouts]).astype(np.float64))
    if spec.algorithm.mask_truncated:
        lengths[torch.from_numpy(np.concatenate([r.truncated for r in rollouts]))] = 0
    alpha = spec.algorithm.loss.delta_l.alpha
    return Totals.of(lengths, max_length=spec.generation.max_completion_tokens, alpha=alpha)


def loss_inputs(micro: MicroBatch, logp: Tensor) -> LossInputs:
    """What the losses take, of a micro-batch and the learner's log-probabilities [T] of it."""
    return LossInputs(
        logp=logp,
        sampler_logp=micro.sampler_logp,
        seq_ids=micro.seq_ids,
        group_ids=micro.group_ids,
        lengths=micro.lengths,
        advantages=micro.advantages,
        log_expected_q=micro.log_expected_q,
    )


def rollout_metrics(batch: StepBatch) -> dict[str, Any]:
    """What the step's rollouts were like: rewards, lengths, and how old each pool of samplers' were (in steps)."""
    rewards = np.concatenate([r.rewards for r in batch.rollouts])
    lengths = np.concatenate([r.lengths for r in batch.rollouts])
    truncated = np.concatenate([r.truncated for r in batch.rollouts])
    stds = np.array([r.rewards.std() for r in batch.rollouts])
    lags = np.array([max(0, batch.step - name.version.step) for name in batch.names])
    pools = np.array([name.slot.pool for name in batch.names])
    metrics: dict[str, Any] = {
        "reward": rewards.mean(),
        "reward_std": stds.mean(),
        "frac_reward_zero_std": (stds < 1e-6).mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": truncated.mean(),
        "lag/mean": lags.mean(),
        "lag/max": lags.max(),
        "perf/rollout_wait_s": batch.wait_s,
    }
    for name in sorted({name for r in batch.rollouts for name in r.reward_terms}):  # rewards may change between runs
        term = np.concatenate([r.reward_terms[name] for r in batch.rollouts if name in r.reward_terms])
        metrics |= {f"rewards/{name}/mean": term.mean(), f"rewards/{name}/std": term.std()}
    for pool in sorted(set(pools)):
        metrics[f"lag/by_pool/{pool}"] = lags[pools == pool].mean()
        metrics[f"rollouts/by_pool/{pool}"] = (pools == pool).sum()
    return {name: float(value) for name, value in metrics.items()}


def learning_rate(learner: LearnerSpec, step: int) -> float:
    """The rate of the update that follows `step` updates: linear warm-up to the peak, then the schedule's shape.

    The warm-up takes ceil(warmupRatio * steps) updates, of which the first already moves the weights and the last has
    the peak rate; cosine and linear would reach 0 one update after the last.
    """
    peak, steps = learner.optimizer.learning_rate, learner.steps
    warmup = math.ceil(learner.schedule.warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return peak * shapes[learner.schedule.type]


def num_tokens(rollouts: list[Rollout]) -> int:
    """Prompt and completion tokens that the learner reads for these rollouts."""
    return sum(len(r.prompt_ids) * len(r.lengths) + len(r.completion_ids) for r in rollouts)
