"""Corrections for data of another policy, orthogonal to the loss: a factor, without gradient, for every token's term.

The legend is that of `losses`. ρ_t = p_t/q_t is the learner's probability of a token before the step's update over the
sampler's. A batch is trained on once, so the learner before the update is the learner that the gradient is taken of.

- A *weight* (TIS, IcePop, MIS) is an importance weight from the sampler's policy to the learner's. The loss's own ratio
  is then against the learner itself, as in PPO with a behaviour policy of its own (arXiv 2110.00641): its value is 1,
  its gradient that of log p, and the clip never bites. Were it against the sampler's as well, ρ would count twice.
- A *filter* (rejection, OPSM, M2PO) is 0 or 1, and the loss keeps its ratio.

They multiply. What gets 0 still counts in the loss's divisors, as in the papers and in TRL; verl takes what its
rejection masks out of them. Losses whose unit is a sequence are multiplied by the mean over the sequence's tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from heterorl.spec.run import CorrectionSpec, RejectSpec, WeightSpec
from heterorl_learner.losses import OF_SEQUENCES, LossInputs, LossMetrics, bounded_exp, k3


def correct(x: LossInputs, spec: CorrectionSpec, m2_limit: float | None) -> tuple[LossInputs, LossMetrics]:
    """The inputs under the run's corrections, and what each that is on did; `m2_limit` is `second_moment_limit`'s.

    The metrics, `sum/correction/NAME`: weight, and truncated or masked (tokens whose weight is outside the bounds),
    rejected and opsm (sequences), m2po (tokens), zero (tokens that have no gradient through any of them).
    """
    data = replace(x, logp=x.logp.detach())
    weight, outside = importance_weight(data, spec.weight)
    far, negative = rejected(data, spec.reject), off_policy_negative(data, spec.opsm_delta)
    outliers = data.sampler_log_ratio.double().square() > (math.inf if m2_limit is None else m2_limit)
    factor = weight.masked_fill((far | negative)[x.seq_ids] | outliers, 0.0)
    done = {
        "weight": weight if spec.weighs else None,
        "truncated": outside if spec.weight.type == "truncate" else None,
        "masked": outside if spec.weight.type == "mask" else None,
        "rejected": far if spec.reject.type != "none" else None,
        "opsm": negative if spec.opsm_delta is not None else None,
        "m2po": outliers if spec.m2po_tau is not None else None,
        "zero": factor == 0,
    }
    sums = {
        f"sum/correction/{name}": values.double()
        .masked_fill(~(x.counted if name in OF_SEQUENCES else x.token_counted), 0.0)
        .sum()
        for name, values in done.items()
        if values is not None
    }
    return replace(x, factor=factor, own_ratio=spec.weighs), sums


def importance_weight(x: LossInputs, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """Each token's weight [T], 1 without one, and whether its ρ is outside the bounds [T].

    ρ is the token's, or by sequence the product over its sequence's tokens.

    - truncate: min(max(ρ, low), high), TIS (arXiv 2512.23075; V-trace's ρ̄, arXiv 1802.01561).
    - mask: ρ where low <= ρ <= high, otherwise 0; IcePop (arXiv 2510.18855) by token, MIS (TRL's sequence_mask) by
      sequence.
    """
    log_ratio = x.sampler_log_ratio
    if spec.type == "none":
        return torch.ones_like(log_ratio), torch.zeros_like(log_ratio, dtype=torch.bool)
    ratio = bounded_exp(log_ratio if spec.level == "token" else x.sequence_sum(log_ratio)[x.seq_ids])
    outside = (ratio < spec.low) | (ratio > spec.high)
    return ratio.clamp(spec.low, spec.high) if spec.type == "truncate" else ratio.masked_fill(outside, 0.0), outside


def rejected(x: LossInputs, spec: RejectSpec) -> Tensor:
    """Sequences [S] too far from the sampler's policy (verl's Geo-RS and K3-RS, its seq_mean_k1 and seq_mean_k3).

    - geometric: exp(mean_t log ρ_t) outside [low, high].
    - k3: mean_t (ρ_t - 1 - log ρ_t) above max_k3.
    """
    if spec.type == "geometric":
        ratio = bounded_exp(x.sequence_mean(x.sampler_log_ratio))
        return (ratio < spec.low) | (ratio > spec.high)
    if spec.type == "k3":
        return x.sequence_mean(k3(x.sampler_log_ratio)) > spec.max_k3
    return torch.zeros_like(x.counted)


def off_policy_negative(x: LossInputs, delta: float | None) -> Tensor:
    """OPSM (DeepSeek-V3.2, arXiv 2512.02556): sequences [S] with A < 0 and mean_t log(q_t/p_t) > delta."""
    if delta is None:
        return torch.zeros_like(x.counted)
    return (x.sequence_advantages < 0) & (-x.sequence_mean(x.sampler_log_ratio) > delta)


def second_moment_limit(log_ratios: Tensor, tau: float) -> float:
    """M2PO (arXiv 2510.01161): the largest (log ρ_t)² that is kept, from all tokens [N] of the step.

    The tokens of the largest (log ρ)² are masked until the mean over the rest is at most tau; of equal ones all or
    none. -1 where not even the smallest may stay.
    """
    squares = log_ratios.double().square().sort().values
    means = squares.cumsum(0) / torch.arange(1, len(squares) + 1, device=squares.device)
    next_is_larger = torch.cat([squares[1:], squares.new_full((1,), math.inf)])[: len(squares)] > squares
    fits = squares[(means <= tau) & next_is_larger]
    return fits[-1].item() if len(fits) else -1.0
