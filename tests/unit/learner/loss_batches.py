"""Batches for the tests of losses and corrections, and the losses as plain float64 formulas, a sequence at a time."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from heterorl.spec.run import AlgorithmSpec, CorrectionSpec, KlToSamplerSpec, LossSpec
from heterorl_learner.corrections import correct
from heterorl_learner.losses import LossInputs, LossMetrics, Totals, log_expected_q, policy_loss

ALPHA, MAX_LENGTH = 0.75, 8


@dataclass(frozen=True)
class Completion:
    """One sequence in the plainest form: lists of probabilities' logarithms."""

    group: int
    logp: list[float]
    sampler_logp: list[float]
    advantage: float
    counts: bool = True


def completion(group: int, advantage: float, q: list[float], ratio: list[float]) -> Completion:
    return Completion(group, [math.log(a * r) for a, r in zip(q, ratio)], [math.log(a) for a in q], advantage)


def random_batch(seed: int, distance: float = 0.3) -> list[Completion]:
    """Three groups of three completions of 1 to 8 tokens, the learner `distance` away from the sampler."""
    rng = np.random.default_rng(seed)
    batch = []
    for group in (0, 1, 2):
        for _ in range(3):
            sampler_logp = -rng.exponential(0.7, size=rng.integers(1, 9))
            logp = np.minimum(sampler_logp + distance * rng.standard_normal(sampler_logp.size), -1e-3)
            batch.append(Completion(group, logp.tolist(), sampler_logp.tolist(), float(rng.standard_normal())))
    return batch


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def flat(
    batch: list[Completion], members: list[Completion] | None = None, dtype: torch.dtype = torch.float64
) -> LossInputs:
    """The flat form of `batch`; `members` are those of its groups, as a reader of whole groups would know them."""
    members = batch if members is None else members
    denominators = {
        g: log_expected_q(torch.tensor([mean(c.sampler_logp) for c in members if c.group == g], dtype=dtype))
        for g in {c.group for c in batch}
    }
    return LossInputs(
        logp=torch.tensor([v for c in batch for v in c.logp], dtype=dtype, requires_grad=True),
        sampler_logp=torch.tensor([v for c in batch for v in c.sampler_logp], dtype=dtype),
        seq_ids=torch.tensor([i for i, c in enumerate(batch) for _ in c.logp], dtype=torch.int64),
        group_ids=torch.tensor([c.group for c in batch], dtype=torch.int64),
        lengths=torch.tensor([len(c.logp) * c.counts for c in batch], dtype=dtype),
        advantages=torch.tensor([c.advantage for c in batch], dtype=dtype),
        log_expected_q=torch.tensor([float(denominators[c.group]) for c in batch], dtype=dtype),
    )


def totals_of(batch: list[Completion]) -> Totals:
    lengths = torch.tensor([len(c.logp) * c.counts for c in batch])
    return Totals.of(lengths, max_length=MAX_LENGTH, alpha=ALPHA)


def corrected_loss(
    spec: AlgorithmSpec, x: LossInputs, totals: Totals, m2_limit: float | None = None
) -> tuple[torch.Tensor, LossMetrics]:
    """As a step makes it: the loss of the inputs under the run's correction, with what that did."""
    done: LossMetrics = {}
    if spec.correction.is_on:
        x, done = correct(x, spec.correction, m2_limit)
    loss, metrics = policy_loss(spec, x, totals)
    return loss, metrics | done


def algorithm(
    loss: str, kl_weight: float = 0.0, correction: dict[str, Any] | None = None, **params: Any
) -> AlgorithmSpec:
    return AlgorithmSpec(
        loss=LossSpec(**{"type": loss, loss: params}),
        kl_to_sampler=KlToSamplerSpec(weight=kl_weight),
        correction=CorrectionSpec.model_validate(correction or {}),
    )


# One group. First: q = 0.5 0.5, r = 1.1 1.5, so p = 0.55 0.75, A = +1. Second: q = 0.2, r = 0.5, so p = 0.1, A = -1.
# 3 tokens, 2 sequences, M = 4. Geometric means: q_1 = 0.5, s_1 = sqrt(1.65) = 1.2845233, p_1 = 0.6422616;
# q_2 = 0.2, s_2 = 0.5, p_2 = 0.1.
HAND = [completion(0, 1.0, [0.5, 0.5], [1.1, 1.5]), completion(0, -1.0, [0.2], [0.5])]


def plain_loss(
    loss: str,
    batch: list[Completion],
    frozen: list[Completion],
    factors: list[list[float]] | None = None,
    own_ratio: bool = False,
) -> float:
    """The step's loss with the default parameters, a sequence at a time; detached weights come from `frozen`.

    Of a correction: the tokens' factors, and whether ratios are against `frozen` in place of the sampler.
    """
    if own_ratio:
        batch = [replace(c, sampler_logp=f.logp) for c, f in zip(batch, frozen)]
        frozen = [replace(f, sampler_logp=f.logp) for f in frozen]
    factors = factors or [[1.0] * len(c.logp) for c in batch]
    used = [(c, f, w) for c, f, w in zip(batch, frozen, factors) if c.counts]
    num_tokens = sum(len(c.logp) for c, _, _ in used)
    length_weight = sum(len(c.logp) ** -ALPHA for c, _, _ in used)

    def surrogate(ratio: float, advantage: float) -> float:
        return -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)

    def q_of(c: Completion) -> float:
        return math.exp(mean(c.sampler_logp))

    def p_of(c: Completion) -> float:
        return math.exp(mean(c.logp))

    def denominator(c: Completion, f: Completion) -> float:
        group = [o for o in batch if o.group == c.group]
        counted = [o for o in group if o.counts]
        whole = counted if own_ratio else group
        expected_q = sum(q_of(o) ** 2 for o in whole) / sum(q_of(o) for o in whole)
        expected_p = sum(q_of(o) * p_of(o) for o in counted) / sum(q_of(o) for o in counted)
        kl = mean([math.exp(p - q) - 1 - (p - q) for p, q in zip(f.logp, f.sampler_logp)])
        near = q_of(c) if kl < 0.002 else expected_q
        return {"gspo": q_of(c), "gepo": expected_q, "eqp": expected_p, "gepo_plus": near}[loss]

    result = 0.0
    for c, f, w in used:
        a, length = c.advantage, len(c.logp)
        ratios = [math.exp(p - q) for p, q in zip(c.logp, c.sampler_logp)]
        frozen_ratios = [math.exp(p - q) for p, q in zip(f.logp, f.sampler_logp)]
        summed = sum(v * surrogate(r, a) for v, r in zip(w, ratios))
        if loss == "grpo":
            result += summed / length / len(batch)
        elif loss in ("bnpo", "dapo"):
            result += summed / num_tokens
        elif loss == "dr_grpo":
            result += summed / (len(batch) * MAX_LENGTH)
        elif loss == "delta_l":
            result += summed * length**-ALPHA / length_weight / MAX_LENGTH
        elif loss in ("gspo", "gepo", "gepo_plus", "eqp"):
            result += mean(w) * surrogate(p_of(c) / denominator(c, f), a) / len(batch)
        elif loss == "gmpo":
            held = [min(math.log(r), 0.4) if a > 0 else max(math.log(r), -0.4) for r in ratios]
            result += -a * mean(w) * math.exp(mean(held)) / len(batch)
        elif loss == "topr":
            weight = 1.0 if a >= 0 else min(math.prod(frozen_ratios), 1.0)
            result += -weight * a * sum(v * p for v, p in zip(w, c.logp)) / len(batch)
        elif loss == "sapo":
            tau = 1.0 if a > 0 else 1.05
            gated = [v * 4 / tau / (1 + math.exp(-tau * (r - 1))) for v, r in zip(w, ratios)]
            result += -a * mean(gated) / len(batch)
        elif loss == "vespo":
            whole_ratio, (k, rate) = math.prod(frozen_ratios), (2.0, 3.0) if a >= 0 else (3.0, 2.0)
            weight = whole_ratio**k * math.exp(rate * (1 - whole_ratio))
            result += -weight * a * sum(v * p for v, p in zip(w, c.logp)) / num_tokens
        else:
            cap = {"cispo": 5.0, "impala": 1.0}[loss]
            result += sum(-v * min(r, cap) * a * p for v, r, p in zip(w, frozen_ratios, c.logp)) / num_tokens
    return result


def plain_gradient(loss: str, batch: list[Completion], *correction: Any) -> list[float]:
    """Central differences of `plain_loss`; a step of 1e-6 leaves about 1e-9 of error."""
    gradient = []
    for i, c in enumerate(batch):
        for t in range(len(c.logp)):
            ends = []
            for step in (1e-6, -1e-6):
                moved = replace(c, logp=[v + step * (k == t) for k, v in enumerate(c.logp)])
                ends.append(plain_loss(loss, [*batch[:i], moved, *batch[i + 1 :]], batch, *correction))
            gradient.append((ends[0] - ends[1]) / 2e-6)
    return gradient
