"""What losses are functions of: one micro-batch, flat and in log space, and the step's divisors; and how the run's
corrections change it.

The legend is that of `losses`. The policy that a loss takes its ratio against is the sampler's, q, or with a weighting
correction the learner's own before the update.

Corrections are for data of another policy and orthogonal to the loss: a factor, without gradient, for every token's
term. ρ_t = p_t/q_t is the learner's probability of a token before the step's update over the sampler's. A batch is
trained on once, so the learner before the update is the learner that the gradient is taken of.

- A *weight* (TIS, IcePop, MIS) is an importance weight from the sampler's policy to the learner's. The loss's own ratio
  is then against the learner itself, as in PPO with a behaviour policy of its own (arXiv 2110.00641): its value is 1,
  its gradient that of log p, and the clip never bites. Were it against the sampler's as well, ρ would count twice.
- A *filter* (rejection, OPSM, M2PO) is 0 or 1, and the loss keeps its ratio.

They multiply. What gets 0 still counts in the loss's divisors, as in the papers and in TRL; verl takes what its
rejection masks out of them. Losses whose unit is a sequence are multiplied by the mean over the sequence's tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from heterorl.spec.run import CorrectionSpec, RejectSpec, WeightSpec

MAX_LOG = 20.0
"""Log-ratios are held within ±20 before exp (5e8): further off says nothing more, and float32 stays finite."""
MIN_LOGP = -1e4
"""Log-probabilities are held above this, also -inf: then 0 · log p is 0, and their gradient is 0."""
Sums = dict[str, Tensor]
"""Sums over a micro-batch, float64 scalars, to be added up over micro-batches and ranks."""

SEQUENCES = ("rejected", "opsm")
"""What counts sequences; the others count tokens."""


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch, flat; floats are float32 or wider. The properties are what the losses are written in."""

    logp: Tensor
    """[T] the learner's log-probabilities at the generation temperature; the gradient goes through these."""
    sampler_logp: Tensor
    """[T] the behaviour policy's log-probabilities, from the sampler's engine."""
    seq_ids: Tensor
    """[T] int64, 0..S-1: the sequence of each token; tokens may come in any order."""
    group_ids: Tensor
    """[S] int64: the prompt of each sequence; read where a loss needs the learner's p of a whole group."""
    lengths: Tensor
    """[S] float: completion tokens that count, 0 for a sequence left out."""
    advantages: Tensor
    """[S] float."""
    log_expected_q: Tensor
    """[S] float: `log_expected_q` of the sequence's whole group, also of members in other micro-batches."""
    reference_logp: Tensor | None = None
    """[T] the starting model's log-probabilities; None without a penalty towards it."""
    own_ratio: bool = False
    """Whether the loss's ratio is against the learner's own policy, without gradient, instead of the sampler's."""
    factor: Tensor | None = None
    """[T] without gradient: the correction's factor of each token's term; None for 1."""

    @cached_property
    def counted(self) -> Tensor:
        """[S] bool: sequences that take part."""
        return self.lengths > 0

    @cached_property
    def sequence_advantages(self) -> Tensor:
        """[S] advantages, 0 where the sequence is left out."""
        return self.advantages.masked_fill(~self.counted, 0.0)

    @cached_property
    def token_counted(self) -> Tensor:
        """[T] bool: tokens of sequences that take part."""
        return self.counted[self.seq_ids]

    @cached_property
    def token_advantages(self) -> Tensor:
        """[T] advantage of each token's sequence."""
        return self.sequence_advantages[self.seq_ids]

    @cached_property
    def log_p(self) -> Tensor:
        """[T] the learner's log-probabilities, held above MIN_LOGP."""
        return self.logp.clamp(min=MIN_LOGP)

    @cached_property
    def log_q(self) -> Tensor:
        """[T] the sampler's log-probabilities, held above MIN_LOGP."""
        return self.sampler_logp.clamp(min=MIN_LOGP)

    @cached_property
    def log_old(self) -> Tensor:
        """[T] log-probabilities of the policy that the loss's ratio is against."""
        return self.log_p.detach() if self.own_ratio else self.log_q

    @cached_property
    def token_log_ratio(self) -> Tensor:
        """[T] log of each token's ratio, 0 where its sequence is left out."""
        return (self.log_p - self.log_old).masked_fill(~self.token_counted, 0.0)

    @cached_property
    def sampler_log_ratio(self) -> Tensor:
        """[T] log p/q of each token whatever the loss's ratio is against, 0 where its sequence is left out."""
        return (self.log_p - self.log_q).masked_fill(~self.token_counted, 0.0)

    @cached_property
    def mean_log_p(self) -> Tensor:
        """[S] log p_i, the mean over the sequence's tokens."""
        return self.sequence_mean(self.log_p)

    @cached_property
    def mean_log_old(self) -> Tensor:
        """[S] likewise of the policy that the loss's ratio is against: log q_i, or log p_i without gradient."""
        return self.sequence_mean(self.log_old)

    @cached_property
    def log_expected_old(self) -> Tensor:
        """[S] GEPO's denominator: log E_q, or of the learner's own policy over the group's members that count."""
        if not self.own_ratio:
            return self.log_expected_q
        return self.group_logsumexp(2 * self.mean_log_old) - self.group_logsumexp(self.mean_log_old)

    @cached_property
    def token_factor(self) -> Tensor:
        """[T] the correction's factor of each token."""
        return torch.ones_like(self.log_q) if self.factor is None else self.factor

    @cached_property
    def sequence_factor(self) -> Tensor:
        """[S] of each sequence: the mean over its tokens."""
        return self.sequence_mean(self.token_factor)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Sum [T] -> [S], also of sequences left out."""
        return values.new_zeros(self.lengths.shape[0]).index_add(0, self.seq_ids, values)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Mean [T] -> [S]; of no meaning where the sequence is left out."""
        return self.sequence_sum(values) / self.lengths.clamp(min=1)

    def group_logsumexp(self, values: Tensor) -> Tensor:
        """Logsumexp [S] -> [S] over the members of each sequence's group that are in this micro-batch and count."""
        # A sequence left out is a group of its own, so that it weighs in no one's sum.
        groups = torch.where(self.counted, self.group_ids, -1 - torch.arange(len(values), device=values.device))
        others = groups[:, None] != groups[None, :]
        return torch.logsumexp(values.expand_as(others).masked_fill(others, -math.inf), 1)


@dataclass(frozen=True)
class Totals:
    """Divisors: sums over the whole optimizer step and all ranks, known before the first backward."""

    tokens: float
    """Tokens that count, at least 1."""
    sequences: float
    """Sequences, those left out by maskTruncated included (they add zero, as in TRL), at least 1."""
    length_weight: float
    """Sum of L^-alpha over the sequences that count (ΔL Normalization), above 0."""
    max_length: float
    """M: the longest completion the run allows, in tokens."""

    @classmethod
    def of(cls, lengths: Tensor, *, max_length: int, alpha: float) -> Totals:
        """Totals of the step's sequences; `lengths` [all S of the step] holds 0 for those left out."""
        counted = lengths[lengths > 0].double()
        return cls(
            tokens=max(counted.sum().item(), 1.0),
            sequences=max(float(lengths.numel()), 1.0),
            length_weight=counted.pow(-alpha).sum().item() or 1.0,
            max_length=float(max_length),
        )


def log_expected_q(mean_logp: Tensor) -> Tensor:
    """GEPO's denominator log(sum q² / sum q), from the [G] mean sampler log-probs of one prompt's whole group."""
    held = mean_logp.clamp(min=MIN_LOGP)
    return torch.logsumexp(2 * held, 0) - torch.logsumexp(held, 0)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """Exponential that stays finite; beyond ±MAX_LOG the gradient is zero."""
    return log_ratio.clamp(-MAX_LOG, MAX_LOG).exp()


def k3(log_ratio: Tensor) -> Tensor:
    """Schulman's k3 estimate r - 1 - log r of KL(q‖p) from samples of q: never negative, unbiased."""
    log_ratio = log_ratio.clamp(-MAX_LOG, MAX_LOG)
    return log_ratio.exp() - 1 - log_ratio


# ── corrections ──────────────────────────────────────────────────────────────────────────────────────────────────────
def correct(x: LossInputs, spec: CorrectionSpec, m2_limit: float | None) -> tuple[LossInputs, Sums]:
    """The inputs under the run's corrections, and what each that is on did; `m2_limit` is `second_moment_limit`'s.

    The sums: weight, and truncated or masked (tokens whose weight is outside the bounds), rejected and opsm
    (sequences), m2po (tokens), zero (tokens that have no gradient through any of them).
    """
    if not spec.is_on:
        return x, {}
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
        name: values.double().masked_fill(~(x.counted if name in SEQUENCES else x.token_counted), 0.0).sum()
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
