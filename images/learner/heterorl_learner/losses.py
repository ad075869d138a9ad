"""Policy losses: one pure function each over flat tensors, in log space, and a dict of them all at the bottom.

Every loss answers three questions, each once:

- the ratio: per token, per sequence, or per sequence against an expectation over its prompt's group;
- the weight: clipped surrogate (gradient through the ratio) or a detached, capped factor of log p;
- the reduction: how the terms become one number.

Legend: T tokens of a micro-batch, S sequences (completions), p the learner's probability, q the sampler's,
r_t = p_t/q_t, A the sequence's advantage, L its length, M the longest completion allowed, sg: no gradient. p_i and q_i
of a whole sequence are geometric means, exp(mean_t log p_t), so that length does not drown them.

A micro-batch's loss is its *share*: summed over the micro-batches and ranks of an optimizer step it is the step's loss,
because every divisor comes from `Totals`. A sequence with `lengths` 0 is out of everything (a truncated completion
under maskTruncated, or one that only fills up a rank); its tokens may be present or left out.

Metrics are scalars whose prefix says how to put those of micro-batches and ranks together: `sum/`, `min/` or `max/`.
Every loss returns the same keys in the same order. `combine` does it, `summarise` turns the result into metric names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from heterorl.spec.run import (
    AlgorithmSpec,
    CispoSpec,
    DeltaLSpec,
    GepoPlusSpec,
    GmpoSpec,
    ImpalaSpec,
    LossType,
    RatioClipSpec,
    ToprSpec,
)

MAX_LOG = 20.0
"""Log-ratios are held within ±20 before exp (5e8): further off says nothing more, and float32 stays finite."""

LossMetrics = dict[str, Tensor]


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
    """[S] int64: the prompt of each sequence; only eqp reads it."""
    lengths: Tensor
    """[S] float: completion tokens that count, 0 for a sequence left out."""
    advantages: Tensor
    """[S] float."""
    log_expected_q: Tensor
    """[S] float: `log_expected_q` of the sequence's whole group, also of members in other micro-batches."""

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
    def token_log_ratio(self) -> Tensor:
        """[T] log p/q of each token, 0 where its sequence is left out."""
        return (self.logp - self.sampler_logp).masked_fill(~self.token_counted, 0.0)

    @cached_property
    def mean_logp(self) -> Tensor:
        """[S] log p_i, the mean over the sequence's tokens."""
        return self.sequence_mean(self.logp)

    @cached_property
    def mean_sampler_logp(self) -> Tensor:
        """[S] log q_i, the mean over the sequence's tokens."""
        return self.sequence_mean(self.sampler_logp)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Sum [T] -> [S], also of sequences left out."""
        return values.new_zeros(self.lengths.shape[0]).index_add(0, self.seq_ids, values)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Mean [T] -> [S]; of no meaning where the sequence is left out."""
        return self.sequence_sum(values) / self.lengths.clamp(min=1)


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
    return torch.logsumexp(2 * mean_logp, 0) - torch.logsumexp(mean_logp, 0)


# ── the weight ───────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Terms:
    """What the reduction adds up, a term for each unit; a unit is a token [T] or a sequence [S], as the loss has it."""

    loss: Tensor
    weight: Tensor
    """The factor of the advantage, before the clip where the clip is a surrogate's; for metrics."""
    low: Tensor
    """1 where the lower bound took the unit's gradient (or the share of the sequence's tokens)."""
    high: Tensor
    """Likewise the upper bound or the cap."""
    counted: Tensor
    """bool: units that take part."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """Exponential that stays finite; beyond ±MAX_LOG the gradient is zero."""
    return log_ratio.clamp(-MAX_LOG, MAX_LOG).exp()


def clipped(log_ratio: Tensor, advantages: Tensor, counted: Tensor, clip: RatioClipSpec) -> Terms:
    """PPO's surrogate -min(r A, clip(r, 1-low, 1+high) A) (arXiv 1707.06347); delta bounds the first r as well."""
    ratio = bounded_exp(log_ratio)
    within = ratio.clamp(1 - clip.low, 1 + clip.high)
    ratio = ratio if clip.delta is None else ratio.clamp(max=clip.delta)
    return Terms(
        loss=-torch.min(ratio * advantages, within * advantages),
        weight=ratio,
        low=(ratio < 1 - clip.low) & (advantages < 0),
        high=(ratio > 1 + clip.high) & (advantages > 0),
        counted=counted,
    )


def reinforce(weight: Tensor, high: Tensor, logp: Tensor, advantages: Tensor, counted: Tensor) -> Terms:
    """REINFORCE under a detached weight: -sg(w) A log p."""
    return Terms(-weight.detach() * advantages * logp, weight, torch.zeros_like(high), high, counted)


def _tokens(x: LossInputs, clip: RatioClipSpec) -> Terms:
    return clipped(x.token_log_ratio, x.token_advantages, x.token_counted, clip)


def _sequences(x: LossInputs, log_denominator: Tensor, clip: RatioClipSpec) -> Terms:
    return clipped(x.mean_logp - log_denominator, x.sequence_advantages, x.counted, clip)


def _capped_tokens(x: LossInputs, cap: float) -> Terms:
    log_cap = math.log(cap)
    weight = x.token_log_ratio.clamp(max=log_cap).exp()
    return reinforce(weight, x.token_log_ratio > log_cap, x.logp, x.token_advantages, x.token_counted)


def k3(log_ratio: Tensor) -> Tensor:
    """Schulman's k3 estimate r - 1 - log r of KL(q‖p) from samples of q: never negative, unbiased."""
    log_ratio = log_ratio.clamp(-MAX_LOG, MAX_LOG)
    return log_ratio.exp() - 1 - log_ratio


# ── token ratio ──────────────────────────────────────────────────────────────────────────────────────────────────────
def grpo(x: LossInputs, clip: RatioClipSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """GRPO (arXiv 2402.03300): mean_i (1/L_i) sum_t -min(r_t A, clip(r_t) A)."""
    terms = _tokens(x, clip)
    return x.sequence_mean(terms.loss).sum() / totals.sequences, measure(x, terms)


def bnpo(x: LossInputs, clip: RatioClipSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """BNPO (arXiv 2506.02864): sum_i sum_t -min(r_t A, clip(r_t) A) / sum_i L_i, on Beta-normalised advantages."""
    terms = _tokens(x, clip)
    return terms.loss.sum() / totals.tokens, measure(x, terms)


def dapo(x: LossInputs, clip: RatioClipSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """DAPO (arXiv 2503.14476): sum_i sum_t -min(r_t A, clip(r_t) A) / sum_i L_i, over all tokens of the step."""
    terms = _tokens(x, clip)
    return terms.loss.sum() / totals.tokens, measure(x, terms)


def dr_grpo(x: LossInputs, clip: RatioClipSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """Dr.GRPO (arXiv 2503.20783): (1/M) mean_i sum_t -min(r_t A, clip(r_t) A), free of length bias."""
    terms = _tokens(x, clip)
    return terms.loss.sum() / (totals.sequences * totals.max_length), measure(x, terms)


def delta_l(x: LossInputs, params: DeltaLSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """ΔL Normalization (arXiv 2509.07558): sum_i w_i sum_t -min(r_t A, clip(r_t) A), w_i = (1/M) L_i^-α / sum_j L_j^-α.

    j runs over the whole step, so the weights do not depend on the split; α = 0 is Dr.GRPO.
    """
    terms = _tokens(x, params)
    weights = x.lengths.clamp(min=1).pow(-params.alpha) / (totals.max_length * totals.length_weight)
    return (weights * x.sequence_sum(terms.loss)).sum(), measure(x, terms)


# ── sequence ratio ───────────────────────────────────────────────────────────────────────────────────────────────────
def gspo(x: LossInputs, clip: RatioClipSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """GSPO (arXiv 2507.18071): mean_i -min(s_i A, clip(s_i) A), s_i = p_i/q_i = exp(mean_t log r_t)."""
    terms = _sequences(x, x.mean_sampler_logp, clip)
    return terms.loss.sum() / totals.sequences, measure(x, terms)


def gmpo(x: LossInputs, params: GmpoSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """GMPO (arXiv 2507.20673): mean_i -A exp(mean_t c_t).

    c_t = min(log r_t, high) if A > 0, else max(log r_t, -low): the bound is one-sided and comes before the mean.
    """
    log_ratio, positive = x.token_log_ratio, x.token_advantages > 0
    held = torch.where(positive, log_ratio.clamp(max=params.high), log_ratio.clamp(min=-params.low))
    weight = bounded_exp(x.sequence_mean(held))
    low = x.sequence_mean(((log_ratio < -params.low) & (x.token_advantages < 0)).to(weight.dtype))
    high = x.sequence_mean(((log_ratio > params.high) & positive).to(weight.dtype))
    terms = Terms(-weight * x.sequence_advantages, weight, low, high, x.counted)
    return terms.loss.sum() / totals.sequences, measure(x, terms)


# ── group expectation ────────────────────────────────────────────────────────────────────────────────────────────────
def gepo(x: LossInputs, clip: RatioClipSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """GEPO (arXiv 2508.17850): mean_i -min(c_i A, clip(c_i) A), c_i = p_i/E_q, E_q = sum_j q_j² / sum_j q_j.

    j runs over the prompt's group. At zero lag c_i is q_i/E_q, not 1: its clip fractions cannot be compared with
    GSPO's; `ratio/*` can.
    """
    terms = _sequences(x, x.log_expected_q, clip)
    return terms.loss.sum() / totals.sequences, measure(x, terms)


def gepo_plus(x: LossInputs, params: GepoPlusSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """GEPO+ (the GEPO authors' variant of arXiv 2508.17850): p_i/q_i where the sequence's KL < threshold, else p_i/E_q.

    The KL is the mean k3 over the sequence's tokens.
    """
    near = x.sequence_mean(k3(x.token_log_ratio.detach())) < params.kl_threshold
    terms = _sequences(x, torch.where(near, x.mean_sampler_logp, x.log_expected_q), params)
    return terms.loss.sum() / totals.sequences, measure(x, terms)


def eqp(x: LossInputs, clip: RatioClipSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """EqP (the GEPO authors' variant of arXiv 2508.17850): GEPO with E_q[p] = sum_j q_j p_j / sum_j q_j.

    The gradient goes through the denominator as well. The sums run over the group's sequences in this micro-batch,
    so groups must not be split.
    """
    # A sequence left out is a group of its own, so that it weighs in no one's expectation.
    groups = torch.where(x.counted, x.group_ids, -1 - torch.arange(len(x.group_ids), device=x.group_ids.device))
    others = groups[:, None] != groups[None, :]
    log_qp = (x.mean_sampler_logp + x.mean_logp).expand_as(others).masked_fill(others, -math.inf)
    log_q = x.mean_sampler_logp.expand_as(others).masked_fill(others, -math.inf)
    terms = _sequences(x, torch.logsumexp(log_qp, 1) - torch.logsumexp(log_q, 1), clip)
    return terms.loss.sum() / totals.sequences, measure(x, terms)


# ── detached weights ─────────────────────────────────────────────────────────────────────────────────────────────────
def cispo(x: LossInputs, params: CispoSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """CISPO (arXiv 2506.13585): sum_i sum_t -sg(min(r_t, cap)) A log p_t / sum_i L_i; no token loses its gradient."""
    terms = _capped_tokens(x, params.cap)
    return terms.loss.sum() / totals.tokens, measure(x, terms)


def impala(x: LossInputs, params: ImpalaSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """IMPALA (arXiv 1802.01561): sum_i sum_t -sg(min(r_t, rho_bar)) A log p_t / sum_i L_i.

    V-trace's truncated weight, with A in place of the critic's difference.
    """
    terms = _capped_tokens(x, params.rho_bar)
    return terms.loss.sum() / totals.tokens, measure(x, terms)


def topr(x: LossInputs, params: ToprSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """TOPR (arXiv 2503.14286): mean_i -sg(w_i) A sum_t log p_t; w_i = 1 if A >= 0, else min(prod_t r_t, cap)."""
    log_ratio, log_cap = x.sequence_sum(x.token_log_ratio), math.log(params.cap)
    tapered = x.sequence_advantages < 0
    weight = torch.where(tapered, log_ratio.clamp(max=log_cap), 0.0).exp()
    high = tapered & (log_ratio > log_cap)
    terms = reinforce(weight, high, x.sequence_sum(x.logp), x.sequence_advantages, x.counted)
    return terms.loss.sum() / totals.sequences, measure(x, terms)


# ── penalty, metrics, front door ─────────────────────────────────────────────────────────────────────────────────────
def kl_to_sampler(x: LossInputs, totals: Totals) -> Tensor:
    """CPPO-KL: the mean over the step's tokens of k3, an estimate of KL(q‖p) whose gradient is that of KL(q‖p)."""
    return k3(x.token_log_ratio).sum() / totals.tokens


@torch.no_grad()
def measure(x: LossInputs, terms: Terms) -> LossMetrics:
    """Sums and extremes of one micro-batch, float64 scalars; see the module's docstring."""
    ratio = bounded_exp(x.mean_logp - x.mean_sampler_logp).double()

    def total(values: Tensor, counted: Tensor) -> Tensor:
        return values.double().masked_fill(~counted, 0.0).sum()

    def extreme(fill: float) -> Tensor:
        return pad(ratio.masked_fill(~x.counted, fill), (0, 1), value=fill)

    return {
        "sum/tokens": x.token_counted.double().sum(),
        "sum/sequences": x.counted.double().sum(),
        "sum/units": terms.counted.double().sum(),
        "sum/k3": total(k3(x.token_log_ratio), x.token_counted),
        "sum/ratio": total(ratio, x.counted),
        "min/ratio": extreme(math.inf).amin(),
        "max/ratio": extreme(-math.inf).amax(),
        "sum/weight": total(terms.weight, terms.counted),
        "sum/weight_squared": total(terms.weight.double().square(), terms.counted),
        "sum/low": total(terms.low, terms.counted),
        "sum/high": total(terms.high, terms.counted),
    }


def combine(parts: Sequence[LossMetrics]) -> LossMetrics:
    """Put the metrics of micro-batches, or of ranks, together: each key by its prefix."""
    reduce: dict[str, Callable[[Tensor, int], Tensor]] = {"sum": torch.sum, "min": torch.amin, "max": torch.amax}
    return {key: reduce[key[:3]](torch.stack([part[key] for part in parts]), 0) for key in parts[0]}


def summarise(metrics: LossMetrics) -> dict[str, float]:
    """The step's metrics by their public names; without a sequence that counts, only `loss` and `kl_to_sampler`.

    `weight/*` and `clip_ratio/*` are over the loss's own units: tokens for token ratios, sequences otherwise.
    `weight/ess` is (sum w)² / (n sum w²): the share of the batch that the weights leave effective.
    """
    m = {name: value.item() for name, value in metrics.items()}
    summary = {"loss": m["sum/loss"], "kl_to_sampler": m["sum/kl_to_sampler"]}
    units = m["sum/units"]
    if units == 0:
        return summary
    mean_weight = m["sum/weight"] / units
    mean_square = m["sum/weight_squared"] / units
    return summary | {
        "mismatch_kl": m["sum/k3"] / m["sum/tokens"],
        "ratio/mean": m["sum/ratio"] / m["sum/sequences"],
        "ratio/min": m["min/ratio"],
        "ratio/max": m["max/ratio"],
        "weight/mean": mean_weight,
        "weight/variance": max(mean_square - mean_weight**2, 0.0),
        "weight/ess": mean_weight**2 / mean_square if mean_square > 0 else 0.0,
        "clip_ratio/low_mean": m["sum/low"] / units,
        "clip_ratio/high_mean": m["sum/high"] / units,
        "clip_ratio/region_mean": (m["sum/low"] + m["sum/high"]) / units,
    }


def policy_loss(algorithm: AlgorithmSpec, x: LossInputs, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """The run's loss of one micro-batch, penalty included, and its metrics for `combine` and `summarise`."""
    loss, metrics = LOSSES[algorithm.loss.type](x, getattr(algorithm.loss, algorithm.loss.type), totals)
    penalty = algorithm.kl_to_sampler.weight * kl_to_sampler(x, totals)
    loss = loss + penalty
    return loss, metrics | {"sum/loss": loss.detach().double(), "sum/kl_to_sampler": penalty.detach().double()}


LOSSES: dict[LossType, Callable[[LossInputs, Any, Totals], tuple[Tensor, LossMetrics]]] = {
    "grpo": grpo,
    "bnpo": bnpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "delta_l": delta_l,
    "gepo": gepo,
    "gepo_plus": gepo_plus,
    "eqp": eqp,
    "gmpo": gmpo,
    "cispo": cispo,
    "topr": topr,
    "impala": impala,
}
