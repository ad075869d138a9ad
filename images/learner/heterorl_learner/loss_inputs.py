"""What losses and corrections are functions of: one micro-batch, flat and in log space, and the step's divisors.

The legend is that of `losses`. The policy that a loss takes its ratio against is the sampler's, q, or with a weighting
correction the learner's own before the update (see `corrections`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_LOG = 20.0
"""Log-ratios are held within ±20 before exp (5e8): further off says nothing more, and float32 stays finite."""
MIN_LOGP = -1e4
"""Log-probabilities are held above this, also -inf: then 0 · log p is 0, and their gradient is 0."""


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
