"""Policy losses: what they are functions of, one pure function each over flat tensors, in log space, and a dict of them
all at the bottom.

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

A correction (`corrections.correct`) may put a factor on every token's term; then the ratio may be against the learner's
own policy before the update, "old", instead of the sampler's.

Metrics are scalars whose prefix says how to put those of micro-batches and ranks together: `sum/`, `min/`, `max/` or
`lse/` (logsumexp).
Every loss returns the same keys in the same order. `combine` does it, `summarise` turns the result into metric names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    SapoSpec,
    ToprSpec,
    VespoSpec,
)

MAX_LOG = 20.0
"""Log-ratios are held within ±20 before exp (5e8): further off says nothing more, and float32 stays finite."""
MIN_LOGP = -1e4
"""Log-probabilities are held above this, also -inf: then 0 · log p is 0, and their gradient is 0."""
OF_SEQUENCES = ("rejected", "opsm")
"""What a correction does to sequences; all else that it does is counted in tokens."""

LossMetrics = dict[str, Tensor]


# ── what a loss takes ────────────────────────────────────────────────────────────────────────────────────────────────
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


# ── the weight ───────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Terms:
    """What the reduction adds up, a term for each unit; a unit is a token [T] or a sequence [S], as the loss has it."""

    loss: Tensor
    weight: Tensor
    """The factor of A · grad log p, before the clip where the clip is a surrogate's; for metrics."""
    low: Tensor
    """1 where the lower bound took the unit's gradient (or the share of the sequence's tokens)."""
    high: Tensor
    """Likewise the upper bound or the cap."""
    counted: Tensor
    """bool: units that take part."""

    def times(self, factor: Tensor) -> Terms:
        """Under a correction's factor of each unit."""
        return replace(self, loss=self.loss * factor, weight=self.weight * factor)


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
    return clipped(x.token_log_ratio, x.token_advantages, x.token_counted, clip).times(x.token_factor)


def _sequences(x: LossInputs, log_denominator: Tensor, clip: RatioClipSpec) -> Terms:
    return clipped(x.mean_log_p - log_denominator, x.sequence_advantages, x.counted, clip).times(x.sequence_factor)


def _capped_tokens(x: LossInputs, cap: float) -> Terms:
    log_cap = math.log(cap)
    weight = x.token_log_ratio.clamp(max=log_cap).exp() * x.token_factor
    return reinforce(weight, x.token_log_ratio > log_cap, x.log_p, x.token_advantages, x.token_counted)


def _chosen(where: Tensor, one: float, other: float, like: Tensor) -> Tensor:
    return torch.full_like(like, other).masked_fill(where, one)


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


def sapo(x: LossInputs, params: SapoSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """SAPO (arXiv 2511.20347): mean_i (1/L_i) sum_t -A (4/τ) σ(τ (r_t - 1)), with a τ for each sign of A."""
    ratio = bounded_exp(x.token_log_ratio)
    tau = _chosen(x.token_advantages > 0, params.tau_pos, params.tau_neg, ratio)
    gate = torch.sigmoid(tau * (ratio - 1))
    weight, never = 4 * gate * (1 - gate) * ratio, torch.zeros_like(x.token_counted)
    terms = Terms(-x.token_advantages * 4 / tau * gate, weight, never, never, x.token_counted).times(x.token_factor)
    return x.sequence_mean(terms.loss).sum() / totals.sequences, measure(x, terms)


# ── sequence ratio ───────────────────────────────────────────────────────────────────────────────────────────────────
def gspo(x: LossInputs, clip: RatioClipSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """GSPO (arXiv 2507.18071): mean_i -min(s_i A, clip(s_i) A), s_i = p_i/q_i = exp(mean_t log r_t)."""
    terms = _sequences(x, x.mean_log_old, clip)
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
    terms = Terms(-weight * x.sequence_advantages, weight, low, high, x.counted).times(x.sequence_factor)
    return terms.loss.sum() / totals.sequences, measure(x, terms)


# ── group expectation ────────────────────────────────────────────────────────────────────────────────────────────────
def gepo(x: LossInputs, clip: RatioClipSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """GEPO (arXiv 2508.17850): mean_i -min(c_i A, clip(c_i) A), c_i = p_i/E_q, E_q = sum_j q_j² / sum_j q_j.

    j runs over the prompt's group. At zero lag c_i is q_i/E_q, not 1: its clip fractions cannot be compared with
    GSPO's; `ratio/*` can.
    """
    terms = _sequences(x, x.log_expected_old, clip)
    return terms.loss.sum() / totals.sequences, measure(x, terms)


def gepo_plus(x: LossInputs, params: GepoPlusSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """GEPO+ (the GEPO authors' variant of arXiv 2508.17850): p_i/q_i where the sequence's KL < threshold, else p_i/E_q.

    The KL is the mean k3 over the sequence's tokens.
    """
    near = x.sequence_mean(k3(x.token_log_ratio.detach())) < params.kl_threshold
    terms = _sequences(x, torch.where(near, x.mean_log_old, x.log_expected_old), params)
    return terms.loss.sum() / totals.sequences, measure(x, terms)


def eqp(x: LossInputs, clip: RatioClipSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """EqP (the GEPO authors' variant of arXiv 2508.17850): GEPO with E_q[p] = sum_j q_j p_j / sum_j q_j.

    The gradient goes through the denominator as well. The sums run over the group's sequences in this micro-batch,
    so groups must not be split.
    """
    log_qp = x.group_logsumexp(x.mean_log_old + x.mean_log_p)
    terms = _sequences(x, log_qp - x.group_logsumexp(x.mean_log_old), clip)
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
    terms = reinforce(weight, high, x.sequence_sum(x.token_factor * x.log_p), x.sequence_advantages, x.counted)
    terms = replace(terms, weight=weight * x.sequence_factor)
    return terms.loss.sum() / totals.sequences, measure(x, terms)


def vespo(x: LossInputs, params: VespoSpec, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """VESPO (arXiv 2602.10693): sum_i sum_t -sg(φ(W_i)) A log p_t / sum_i L_i, φ(W) = W^k exp(λ (1 - W)).

    W_i = prod_t r_t; k and λ depend on the sign of A. φ(1) = 1, and both tails go to 0.
    """
    log_ratio, good = x.sequence_sum(x.token_log_ratio), x.sequence_advantages >= 0
    k = _chosen(good, params.k_pos, params.k_neg, log_ratio)
    rate = _chosen(good, params.lambda_pos, params.lambda_neg, log_ratio)
    weight = (k * log_ratio + rate * (1 - bounded_exp(log_ratio))).exp()[x.seq_ids] * x.token_factor
    terms = reinforce(weight, torch.zeros_like(x.token_counted), x.log_p, x.token_advantages, x.token_counted)
    return terms.loss.sum() / totals.tokens, measure(x, terms)


# ── penalty, metrics, front door ─────────────────────────────────────────────────────────────────────────────────────
def kl_to_sampler(x: LossInputs, totals: Totals) -> Tensor:
    """CPPO-KL: the mean over the step's tokens of k3, an estimate of KL(q‖p) whose gradient is that of KL(q‖p)."""
    return k3(x.sampler_log_ratio).sum() / totals.tokens


def kl_to_reference(x: LossInputs, reference_logp: Tensor, totals: Totals) -> Tensor:
    """Mean over the step's tokens of (p/q) k3(p_ref/p), an estimate of KL(p‖p_ref) from the sampler's tokens.

    k3 as in GRPO (arXiv 2402.03300), under the importance ratio of DeepSeek-V3.2 (arXiv 2512.02556): the value is then
    unbiased for each token, and so is the gradient, (p/q) log(p/p_ref) grad log p; that of k3 alone is another's.
    """
    away = (reference_logp.clamp(min=MIN_LOGP) - x.log_p).masked_fill(~x.token_counted, 0.0)
    return (bounded_exp(x.sampler_log_ratio) * k3(away)).sum() / totals.tokens


@torch.no_grad()
def measure(x: LossInputs, terms: Terms) -> LossMetrics:
    """Sums and extremes of one micro-batch, float64 scalars; see the module's docstring."""
    x = replace(x, logp=x.logp.detach())  # its properties would otherwise be kept, without gradient, for the loss
    ratio = bounded_exp(x.sequence_mean(x.sampler_log_ratio)).double()
    log_product = x.sequence_sum(x.sampler_log_ratio).double()

    def total(values: Tensor, counted: Tensor) -> Tensor:
        return values.double().masked_fill(~counted, 0.0).sum()

    def counted_or(fill: float, values: Tensor) -> Tensor:
        return pad(values.masked_fill(~x.counted, fill), (0, 1), value=fill)

    return {
        "sum/tokens": x.token_counted.double().sum(),
        "sum/sequences": x.counted.double().sum(),
        "sum/units": terms.counted.double().sum(),
        "sum/k3": total(k3(x.sampler_log_ratio), x.token_counted),
        "sum/ratio": total(ratio, x.counted),
        "min/ratio": counted_or(math.inf, ratio).amin(),
        "max/ratio": counted_or(-math.inf, ratio).amax(),
        "lse/product": counted_or(-math.inf, log_product).logsumexp(0),
        "lse/product_squared": counted_or(-math.inf, 2 * log_product).logsumexp(0),
        "sum/weight": total(terms.weight, terms.counted),
        "sum/weight_squared": total(terms.weight.double().square(), terms.counted),
        "sum/low": total(terms.low, terms.counted),
        "sum/high": total(terms.high, terms.counted),
    }


def combine(parts: Sequence[LossMetrics]) -> LossMetrics:
    """Put the metrics of micro-batches, or of ranks, together: each key by its prefix."""
    reduce: dict[str, Callable[[Tensor, int], Tensor]] = {
        "sum": torch.sum,
        "min": torch.amin,
        "max": torch.amax,
        "lse": torch.logsumexp,
    }
    return {key: reduce[key[:3]](torch.stack([part[key] for part in parts]), 0) for key in parts[0]}


def summarise(metrics: LossMetrics) -> dict[str, float]:
    """The step's metrics by their public names; without a sequence that counts, only those of the loss as a whole.

    `weight/*` and `clip_ratio/*` are over the loss's own units: tokens for token ratios, sequences otherwise.
    `weight/ess` is (sum w)² / (n sum w²): the share of the batch that the weights leave effective. `ratio/ess` is that
    of the sequences' unbiased weights prod_t p_t/q_t, whatever the loss.
    """
    m = {name: value.item() for name, value in metrics.items()}
    summary = {key: m[f"sum/{key}"] for key in ("loss", "kl_to_sampler", "reference_kl") if f"sum/{key}" in m}
    units = m["sum/units"]
    if units == 0:
        return summary
    corrected = {name.rpartition("/")[2]: total for name, total in m.items() if name.startswith("sum/correction/")}
    mean_weight = m["sum/weight"] / units
    mean_square = m["sum/weight_squared"] / units
    return summary | {
        "mismatch_kl": m["sum/k3"] / m["sum/tokens"],
        "ratio/mean": m["sum/ratio"] / m["sum/sequences"],
        "ratio/min": m["min/ratio"],
        "ratio/max": m["max/ratio"],
        "ratio/ess": math.exp(2 * m["lse/product"] - m["lse/product_squared"]) / m["sum/sequences"],
        "weight/mean": mean_weight,
        "weight/variance": max(mean_square - mean_weight**2, 0.0),
        "weight/ess": mean_weight**2 / mean_square if mean_square > 0 else 0.0,
        "clip_ratio/low_mean": m["sum/low"] / units,
        "clip_ratio/high_mean": m["sum/high"] / units,
        "clip_ratio/region_mean": (m["sum/low"] + m["sum/high"]) / units,
        **{
            f"correction/{name}": total / m["sum/sequences" if name in OF_SEQUENCES else "sum/tokens"]
            for name, total in corrected.items()
        },
    }


def policy_loss(algorithm: AlgorithmSpec, x: LossInputs, totals: Totals) -> tuple[Tensor, LossMetrics]:
    """The run's loss of one micro-batch, penalties included, and its metrics."""
    loss, metrics = LOSSES[algorithm.loss.type](x, getattr(algorithm.loss, algorithm.loss.type), totals)
    penalty = algorithm.kl_to_sampler.weight * kl_to_sampler(x, totals)
    loss = loss + penalty
    if x.reference_logp is not None:
        away = kl_to_reference(x, x.reference_logp, totals)
        loss = loss + algorithm.kl_to_reference.weight * away
        metrics["sum/reference_kl"] = away.detach().double()
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
    "sapo": sapo,
    "vespo": vespo,
}
