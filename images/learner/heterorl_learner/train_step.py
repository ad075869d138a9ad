"""One optimizer step's arithmetic: rollouts in, loss and gradient out, and what is worth knowing about both.

Rollouts carry rewards; they become advantages here and nowhere else. A group is the completions of one prompt, with
rewards [G]; every scale of advantages starts from reward - group mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterorl.errors import UserError
from heterorl.exchange.rollout import Rollout, SamplingDistribution
from heterorl.spec.run import LearnerSpec, LossType, RunSpec
from heterorl_learner import ranks
from heterorl_learner.corrections import correct, second_moment_limit
from heterorl_learner.engines.torch_ddp import MicroBatch, Sequence, TrainingEngine, micro_batch
from heterorl_learner.losses import LossInputs, LossMetrics, Totals, combine, log_expected_q, policy_loss, summarise
from heterorl_learner.rollout_feed import StepBatch

Scale = Literal["none", "group", "batch", "beta"]
Rewards = NDArray[Any]
Advantages = NDArray[np.float32]

AUTO: dict[LossType, Scale] = {
    # as the GEPO authors' sampler does
    "gepo": "none",
    "gepo_plus": "none",
    "eqp": "none",
    "dr_grpo": "none",
    "delta_l": "none",
    "gmpo": "none",
    "grpo": "group",
    "gspo": "group",
    "bnpo": "beta",
    # as the paper of the loss does
    "dapo": "group",
    "cispo": "group",
    "topr": "none",
    "impala": "none",
    "sapo": "group",
    "vespo": "group",
}
"""What `advantage.scale: auto` means for each loss."""

STD_FLOOR = 1e-4
"""Added to a standard deviation before dividing, as the authors and TRL do."""
MAX_BETA_WEIGHT = 1e6
"""Largest weight 1/pdf of a group."""


@dataclass(frozen=True)
class PackedStep:
    """What a rank trains in a step."""

    totals: Totals
    micro_batches: list[MicroBatch]


def pack_step(engine: TrainingEngine, spec: RunSpec, rollouts: list[Rollout]) -> PackedStep:
    """This rank's share of a step; on any thread. UserError where the advantages' scale does not fit the rewards."""
    micro_batches = plan(
        sequences(spec, rollouts),
        spec.learner.batch.tokens_per_micro_batch,
        rank=engine.rank,
        world_size=engine.world_size,
        whole_groups=spec.algorithm.needs_whole_groups,
        padded=engine.layout == "padded",
    )
    if engine.device.type == "cuda":  # from pageable memory a copy to the device would wait for all work before it
        micro_batches = [micro.pinned() for micro in micro_batches]
    return PackedStep(step_totals(spec, rollouts), micro_batches)


def train_on(
    engine: TrainingEngine, spec: RunSpec, batch: StepBatch, see: Callable[[MicroBatch, Tensor], None] | None = None
) -> dict[str, float]:
    """Add the step's gradient; returns the loss's metrics over all micro-batches and ranks.

    `see` is shown this rank's micro-batches with the learner's log-probabilities [T] of them.
    """
    work: PackedStep = batch.packed or pack_step(engine, spec, batch.rollouts)
    totals, micro_batches = work.totals, work.micro_batches
    m2_limit = step_m2_limit(engine, spec.algorithm.correction.m2po_tau, micro_batches)
    parts: list[LossMetrics] = []

    def loss_function(micro: MicroBatch, logp: Tensor) -> Tensor:
        if see is not None:
            see(micro, logp)
        inputs = loss_inputs(micro, logp, engine.reference_logps(micro))
        corrected: LossMetrics = {}
        if spec.algorithm.correction.is_on:
            inputs, corrected = correct(inputs, spec.algorithm.correction, m2_limit)
        loss, metrics = policy_loss(spec.algorithm, inputs, totals)
        parts.append(metrics | corrected)
        return loss

    engine.forward_backward(micro_batches, loss_function)
    mine = [_on_the_cpu(combine(parts))] if parts else []
    everywhere = [metrics for of_rank in ranks.gather(mine) for metrics in of_rank]
    if not everywhere:  # every completion was cut and is masked: a step without a gradient
        return {"loss": 0.0, "kl_to_sampler": 0.0}
    summary = summarise(combine(everywhere))
    every = spec.monitoring.entropy_every_steps
    return summary | (step_entropy(engine, micro_batches, totals) if every and batch.step % every == 0 else {})


def step_entropy(engine: TrainingEngine, micro_batches: list[MicroBatch], totals: Totals) -> dict[str, float]:
    """`entropy`: the mean over the step's tokens, before the update, in nats."""
    mine = torch.stack([engine.entropy(batch).double().sum() for batch in micro_batches]).sum().item()
    return {"entropy": sum(ranks.gather(mine)) / totals.tokens}


def step_m2_limit(engine: TrainingEngine, tau: float | None, micro_batches: list[MicroBatch]) -> float | None:
    """M2PO's limit over all tokens of the step, which takes a forward pass of its own; None without a tau."""
    if tau is None:
        return None
    scored = [(batch.to(engine.device), engine.score(batch)) for batch in micro_batches]
    mine = torch.cat([loss_inputs(batch, logp).sampler_log_ratio for batch, logp in scored]).cpu()
    return second_moment_limit(torch.cat(ranks.gather(mine)), tau)


def _on_the_cpu(metrics: LossMetrics) -> LossMetrics:
    return dict(zip(metrics, torch.stack(list(metrics.values())).cpu()))  # one transfer for all


def sequences(spec: RunSpec, rollouts: list[Rollout]) -> list[Sequence]:
    """The completions that count, with their group's GEPO denominator, which needs the group but not the learner."""
    scale = resolve_scale(spec.algorithm.loss.type, spec.algorithm.advantage.scale)
    advantages = step_advantages([r.rewards for r in rollouts], scale)
    found = []
    firsts = np.cumsum([0, *(len(rollout.lengths) for rollout in rollouts)]).tolist()
    for group, (rollout, first) in enumerate(zip(rollouts, firsts)):
        ends = np.cumsum(rollout.lengths)
        logps = np.split(rollout.logp, ends[:-1])
        expected_q = float(log_expected_q(torch.tensor([logp.mean(dtype=np.float64) for logp in logps])))
        for i, completion in enumerate(np.split(rollout.completion_ids, ends[:-1])):
            if not (spec.algorithm.mask_truncated and rollout.truncated[i]):
                found.append(
                    Sequence(
                        rollout.prompt_ids,
                        completion,
                        logps[i],
                        group,
                        advantage=float(advantages[group][i]),
                        number=first + i,
                        temperature=rollout.provenance.sampling.temperature,
                        log_expected_q=expected_q,
                    )
                )
    return found


def step_totals(spec: RunSpec, rollouts: list[Rollout]) -> Totals:
    """The divisors of the whole step, the same on every rank because every rank has read all its rollouts."""
    lengths = torch.from_numpy(np.concatenate([r.lengths for r in rollouts]).astype(np.float64))
    if spec.algorithm.mask_truncated:
        lengths[torch.from_numpy(np.concatenate([r.truncated for r in rollouts]))] = 0
    alpha = spec.algorithm.loss.delta_l.alpha
    return Totals.of(lengths, max_length=spec.generation.max_completion_tokens, alpha=alpha)


def loss_inputs(micro: MicroBatch, logp: Tensor, reference_logp: Tensor | None = None) -> LossInputs:
    """What the losses take, of a micro-batch and the learner's and the starting model's log-probabilities [T] of it."""
    return LossInputs(
        logp=logp,
        sampler_logp=micro.sampler_logp,
        seq_ids=micro.seq_ids,
        group_ids=micro.group_ids,
        lengths=micro.lengths,
        advantages=micro.advantages,
        log_expected_q=micro.log_expected_q,
        reference_logp=reference_logp,
    )


# ── micro-batches: pure functions, by which every rank plans the whole step and makes its own share ──────────────────
def plan(
    sequences: SequenceOf[Sequence],
    token_budget: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    whole_groups: bool = False,
    padded: bool = False,
) -> list[MicroBatch]:
    """The micro-batches of one rank, as many as those of every other.

    No pack exceeds `token_budget` input tokens, unless a single item does, which then goes alone. An item is a
    sequence, or with `whole_groups` a prompt group (eqp's denominator needs the learner's view of all of it). `padded`:
    the model reads each sequence filled up to the longest of its pack, and those tokens count.
    """
    items: dict[int, list[Sequence]] = {}
    for number, sequence in enumerate(sequences):
        items.setdefault(sequence.group if whole_groups else number, []).append(sequence)
    packs = [pack(share, token_budget, padded=padded) for share in balance(list(items.values()), world_size)]
    most = max(1, *(len(of_rank) for of_rank in packs))
    return [micro_batch(p) for p in packs[rank] + [[]] * (most - len(packs[rank]))]


def balance(items: SequenceOf[list[Sequence]], world_size: int) -> list[list[list[Sequence]]]:
    """Distributes items over ranks evenly by tokens: longest first, to the rank with the fewest tokens."""
    shares: list[list[list[Sequence]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for item in _longest_first(items):
        rank = loads.index(min(loads))
        shares[rank].append(item)
        loads[rank] += _num_tokens(item)
    return shares


def pack(items: SequenceOf[list[Sequence]], token_budget: int, *, padded: bool = False) -> list[list[Sequence]]:
    """Fills packs up to the budget: longest item first, each into the first pack that still has room.

    Padded, only the newest pack is asked: in those before, a row is longer.
    """
    packs: list[list[Sequence]] = []
    used: list[int] = []  # tokens of each
    row = 0  # padded, those of a row of the newest, whose first item is its longest
    for item in _longest_first(items, padded):
        size = len(item) * row if padded else _num_tokens(item)
        open_packs = range(max(0, len(packs) - 1) if padded else 0, len(packs))
        place = next((at for at in open_packs if used[at] + size <= token_budget), None)
        if place is None:
            place, row = len(packs), max(sequence.num_tokens for sequence in item)
            size = _num_tokens(item, padded)
            packs.append([])
            used.append(0)
        packs[place].extend(item)
        used[place] += size
    return packs


def _num_tokens(sequences: list[Sequence], padded: bool = False) -> int:
    """Input tokens that the model reads."""
    sizes = [sequence.num_tokens for sequence in sequences]
    return len(sizes) * max(sizes) if padded else sum(sizes)


def _longest_first(items: SequenceOf[list[Sequence]], padded: bool = False) -> list[list[Sequence]]:
    def size(item: list[Sequence]) -> int:
        return max(sequence.num_tokens for sequence in item) if padded else _num_tokens(item)

    return sorted(items, key=size, reverse=True)  # stable: ties keep their order


# ── advantages ───────────────────────────────────────────────────────────────────────────────────────────────────────
def resolve_scale(loss_type: LossType, scale: Literal["auto", "none", "group", "batch", "beta"]) -> Scale:
    """The scale a run uses: its own, or for auto the loss's."""
    return AUTO[loss_type] if scale == "auto" else scale


def step_advantages(groups: SequenceOf[Rewards], scale: Scale) -> list[Advantages]:
    """Advantages [G] of each group of an optimizer step: reward - group mean, times the group's weight.

    none: 1. group: 1 / (std of its rewards + 1e-4). batch: the same of all rewards of the step. beta: `beta_weights`.
    Raises UserError where beta meets rewards outside [0, 1].
    """
    rewards = [group.astype(np.float64) for group in groups]
    if scale == "none":
        weights = np.ones(len(rewards))
    elif scale == "group":
        weights = np.array([1 / (group.std(ddof=1) + STD_FLOOR) for group in rewards])
    elif scale == "batch":
        weights = np.full(len(rewards), 1 / (np.concatenate(rewards).std(ddof=1) + STD_FLOOR))
    else:
        weights = _checked_beta_weights(rewards)
    return [((group - group.mean()) * weight).astype(np.float32) for group, weight in zip(rewards, weights)]


def _checked_beta_weights(rewards: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    low, high = min(group.min() for group in rewards), max(group.max() for group in rewards)
    if low < 0 or high > 1:
        raise UserError(
            f"rewards range from {low:g} to {high:g}, but advantage.scale beta requires rewards in [0, 1];"
            " change the weights of the rewards, or set algorithm.advantage.scale: group"
        )
    return beta_weights(np.array([group.mean() for group in rewards]))


def beta_weights(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """BNPO's weights min(1 / Beta(α, β).pdf(m), 1e6) of the groups' mean rewards [N] (arXiv 2506.02864).

    a and b are fitted to the means by the method of moments; α = 1 + a/3 and β = 1 + b/3 minimize the variance of the
    gradient. Means without spread cannot be fitted: then every weight is 1.
    """
    mean, variance = means.mean(), means.var()
    if variance < 1e-12:
        return np.ones_like(means)
    size = mean * (1 - mean) / variance - 1  # a + b; never negative for means in [0, 1]
    alpha, beta = 1 + max(size * mean, 0.0) / 3, 1 + max(size * (1 - mean), 0.0) / 3
    log_norm = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
    inside = means.clip(1e-12, 1 - 1e-12)  # at 0 and 1 all rewards are equal, so that weight meets A = 0
    log_pdf = (alpha - 1) * np.log(inside) + (beta - 1) * np.log1p(-inside) - log_norm
    weights: NDArray[np.float64] = np.exp(np.minimum(-log_pdf, np.log(MAX_BETA_WEIGHT)))
    return weights


# ── schedule and metrics ─────────────────────────────────────────────────────────────────────────────────────────────
def rollout_metrics(spec: RunSpec, batch: StepBatch) -> dict[str, Any]:
    """What the step's rollouts were like: rewards, lengths, and how old each pool of samplers' were (in steps)."""
    sampling = SamplingDistribution.of(spec.generation)
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
        "rollouts/other_sampling": sum(r.provenance.sampling != sampling for r in batch.rollouts),
        "rollouts/reward_sources": len({r.provenance.reward_sources for r in batch.rollouts}),
        "perf/rollout_wait_s": batch.wait_s,
    }
    for name in sorted({name for r in batch.rollouts for name in r.reward_terms}):  # rewards may change between runs
        term = np.concatenate([r.reward_terms[name] for r in batch.rollouts if name in r.reward_terms])
        term = term[~np.isnan(term)]  # where the reward applies
        if len(term):
            metrics |= {f"rewards/{name}/mean": term.mean(), f"rewards/{name}/std": term.std()}
    sets = np.array([r.meta.get("set", "") for r in batch.rollouts])
    for name in sorted(set(sets) - {""}):  # of a mix
        chosen = [r.rewards for r, of_set in zip(batch.rollouts, sets) if of_set == name]
        metrics |= {f"reward/{name}": np.concatenate(chosen).mean(), f"rollouts/by_set/{name}": len(chosen)}
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
    warmup = math.ceil(Fraction(str(learner.schedule.warmup_ratio)) * steps)  # of the ratio as written: 0.07 * 100 is 7
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return peak * shapes[learner.schedule.type]


def ess_factor(learner: LearnerSpec, metrics: dict[str, float]) -> float:
    """VCPO's factor of the rate, sqrt(ESS/B) (arXiv 2602.17616), from the step's metrics; 1 without essScaling.

    ESS = (sum_i w_i)² / sum_i w_i² over the B completions, w_i = prod_t p_t/q_t as in the paper, whatever the loss
    weighs them by; the rate goes with its square root because AdamW's update does not grow with the gradient.
    """
    return math.sqrt(metrics.get("ratio/ess", 1.0)) if learner.optimizer.ess_scaling else 1.0


def num_tokens(rollouts: list[Rollout]) -> int:
    """Prompt and completion tokens that the learner reads for these rollouts."""
    return sum(len(r.prompt_ids) * len(r.lengths) + len(r.completion_ids) for r in rollouts)
