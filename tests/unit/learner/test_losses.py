"""The losses against arithmetic by hand, against a plain float64 formula, and under changes that must not matter."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from heterorl.spec.run import KlToReferenceSpec, LossType
from heterorl_learner.losses import LOSSES, LossInputs, Totals, combine, log_expected_q, policy_loss, summarise
from unit.learner.loss_batches import (
    ALPHA,
    HAND,
    MAX_LENGTH,
    Completion,
    algorithm,
    completion,
    corrected_loss,
    flat,
    mean,
    plain_gradient,
    plain_loss,
    random_batch,
    totals_of,
)

ALL = get_args(LossType)


def test_the_dict_names_exactly_the_losses_of_the_spec():
    assert list(LOSSES) == list(ALL)


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────
WIDE = {"low": 1.0, "high": 10.0}
BY_HAND = [
    # clipped to [0.8, 1.2]: first -1.1, -1.2; second -min(-0.5, -0.8) = 0.8. ((-2.3)/2 + 0.8)/2
    ("grpo", {}, -0.175),
    # (-1.1 - 1.2 + 0.8)/3
    ("dapo", {}, -0.5),
    ("bnpo", {}, -0.5),
    # asymmetric, [0.6, 1.4]: (-1.1 - 1.4 + 0.6)/3
    ("dapo", {"low": 0.4, "high": 0.4}, -1.9 / 3),
    ("dapo", {"low": 0.4, "high": 0.2}, -1.7 / 3),
    # (-1.1 - 1.2 + 0.8)/(2 * 4)
    ("dr_grpo", {}, -0.1875),
    # weights (1/4)(1/2)/1.5 and (1/4)(1/1)/1.5: -2.3/12 + 0.8/6
    ("delta_l", {"alpha": 1.0}, -0.7 / 12),
    # (-1.2 + 0.8)/2, and without clip (-1.2845233 + 0.5)/2
    ("gspo", {}, -0.2),
    ("gspo", WIDE, -0.3922616),
    # E_q = (0.25 + 0.04)/0.7 = 0.4142857; c = 1.5502866, 0.2413793; (-1.5502866 + 0.2413793)/2, clipped as gspo
    ("gepo", {}, -0.2),
    ("gepo", WIDE, -0.6544537),
    # k3: first (0.1 - ln 1.1 + 0.5 - ln 1.5)/2 = 0.0496123, second -0.5 + ln 2 = 0.1931472; threshold between them:
    # (-1.2845233 + 0.2413793)/2
    ("gepo_plus", {**WIDE, "kl_threshold": 0.1}, -0.5215720),
    # E_q[p] = (0.5 * 0.6422616 + 0.2 * 0.1)/0.7 = 0.4873297; (-0.6422616 + 0.1)/0.4873297/2
    ("eqp", WIDE, -0.5563601),
    # log r: 0.0953102, 0.4054651 held to 0.4, mean 0.2476551, exp 1.2810180; second held to -0.4, exp 0.6703200
    ("gmpo", {}, -0.3053490),
    # log p: -0.5978370, -0.2876821, -2.3025851; -(1.1 * -0.5978370 + 1.2 * -0.2876821 + 0.5 * 2.3025851)/3
    ("cispo", {"cap": 1.2}, -0.04948445),
    # weights 1, 1, 0.5: -(-0.5978370 - 0.2876821 + 1.1512925)/3, and divided by 2 sequences
    ("impala", {}, -0.0885912),
    ("topr", {}, -0.1328867),
    # a smaller cap: 0.25 on the second: -(-0.8855191 + 0.25 * 2.3025851)/2
    ("topr", {"cap": 0.25}, 0.1549364),
    # tau 1: 4 sigma(0.1) = 2.0999168, 4 sigma(0.5) = 2.4898373; tau 1.05: 4/1.05 sigma(-0.525) = 1.4159383;
    # (-(2.0999168 + 2.4898373)/2 + 1.4159383)/2
    ("sapo", {}, -0.43946935),
    # W = 1.65 and 0.5: 1.65^2 e^(-1.95) = 0.3873412, 0.5^3 e^1 = 0.3397852;
    # -(0.3873412 * -0.8855191 + 0.3397852 * 2.3025851)/3
    ("vespo", {}, -0.14646214),
]


@pytest.mark.parametrize(("loss", "params", "expected"), BY_HAND)
def test_loss_is_what_the_formula_gives_by_hand(loss: str, params: dict[str, Any], expected: float):
    spec = algorithm(loss, **params)
    totals = Totals.of(torch.tensor([2, 1]), max_length=4, alpha=spec.loss.delta_l.alpha)
    value, _ = policy_loss(spec, flat(HAND), totals)
    assert value.item() == pytest.approx(expected, abs=5e-8)


def test_delta_bounds_the_ratio_where_the_surrogate_alone_would_not():
    batch = [completion(0, -1.0, [0.1], [8.0])]
    # A < 0: -min(-8, -1.2) = 8 without delta, and 3 with it
    assert policy_loss(algorithm("grpo"), flat(batch), totals_of(batch))[0].item() == pytest.approx(8.0)
    assert policy_loss(algorithm("grpo", delta=3.0), flat(batch), totals_of(batch))[0].item() == pytest.approx(3.0)


def test_the_penalty_is_the_mean_k3_over_tokens_and_is_part_of_the_loss():
    # k3: 0.1 - ln 1.1 = 0.0046898, 0.5 - ln 1.5 = 0.0945349, -0.5 + ln 2 = 0.1931472; sum 0.2923719, mean 0.0974573
    x, totals = flat(HAND), totals_of(HAND)
    plain, _ = policy_loss(algorithm("grpo"), x, totals)
    loss, metrics = policy_loss(algorithm("grpo", kl_weight=2.0), x, totals)
    summary = summarise(metrics)
    assert (loss - plain).item() == pytest.approx(2 * 0.0974573, abs=1e-7)
    assert summary["kl_to_sampler"] == pytest.approx(2 * 0.0974573, abs=1e-7)
    assert summary["mismatch_kl"] == pytest.approx(0.0974573, abs=1e-7)
    # d k3 / d log p = r - 1: 0.1, 0.5, -0.5, each times 2/3
    (grad,) = torch.autograd.grad(loss - plain, x.logp)
    assert grad.tolist() == pytest.approx([0.2 / 3, 1 / 3, -1 / 3])


@pytest.mark.parametrize("loss", ALL)
def test_the_penalty_has_its_gradient_with_every_loss(loss: str):
    gradients = []
    for weight in (0.0, 2.0):
        x = flat(HAND)
        policy_loss(algorithm(loss, kl_weight=weight), x, totals_of(HAND))[0].backward()
        gradients.append(x.logp.grad)
    # d k3 / d log p = r - 1: 0.1, 0.5, -0.5, each times 2/3
    assert (gradients[1] - gradients[0]).tolist() == pytest.approx([0.2 / 3, 1 / 3, -1 / 3])


@pytest.mark.parametrize("loss", ALL)
def test_the_penalty_to_the_reference_and_its_gradient_are_those_of_the_reverse_kl(loss: str):
    # HAND's p are 0.55, 0.75, 0.1 and p/q 1.1, 1.5, 0.5. With p_ref = 0.5, 0.9, 0.1 k3(p_ref/p) is
    # 0.5/0.55 - 1 - ln(0.5/0.55) = 0.0044011, 0.9/0.75 - 1 - ln(0.9/0.75) = 0.0176784, 0
    x = flat(HAND)
    reference = torch.tensor([0.5, 0.9, 0.1], dtype=torch.float64).log()
    spec = algorithm(loss).model_copy(update={"kl_to_reference": KlToReferenceSpec(weight=3.0)})
    plain, _ = policy_loss(spec, x, totals_of(HAND))
    loss_with, metrics = policy_loss(spec, replace(x, reference_logp=reference), totals_of(HAND))
    value = (1.1 * 0.0044011 + 1.5 * 0.0176784) / 3
    assert (loss_with - plain).item() == pytest.approx(3 * value, abs=1e-6)
    assert summarise(metrics)["reference_kl"] == pytest.approx(value, abs=1e-7)
    # (p/q) ln(p/p_ref) / 3 tokens, times the weight 3
    (grad,) = torch.autograd.grad(loss_with - plain, x.logp)
    assert grad.tolist() == pytest.approx([1.1 * math.log(0.55 / 0.5), 1.5 * math.log(0.75 / 0.9), 0.0])


def test_totals_count_tokens_and_lengths_of_what_takes_part():
    # 4 + 1 tokens, 3 sequences, 4^-0.5 + 1^-0.5 = 1.5
    assert Totals.of(torch.tensor([4, 0, 1]), max_length=8, alpha=0.5) == Totals(5.0, 3.0, 1.5, 8.0)


def test_metrics_are_what_they_say_by_hand():
    _, metrics = policy_loss(algorithm("grpo"), flat(HAND), totals_of(HAND))
    summary = summarise(metrics)
    # raw sequence ratios sqrt(1.65) and 0.5, whatever the loss
    assert summary["ratio/mean"] == pytest.approx((math.sqrt(1.65) + 0.5) / 2)
    assert summary["ratio/min"] == pytest.approx(0.5)
    assert summary["ratio/max"] == pytest.approx(math.sqrt(1.65))
    # products 1.65 and 0.5: sum 2.15, squares 2.7225 + 0.25
    assert summary["ratio/ess"] == pytest.approx(2.15**2 / (2 * 2.9725))
    # token weights 1.1, 1.5, 0.5: sum 3.1, squares 1.21 + 2.25 + 0.25 = 3.71
    assert summary["weight/mean"] == pytest.approx(3.1 / 3)
    assert summary["weight/variance"] == pytest.approx(3.71 / 3 - (3.1 / 3) ** 2)
    assert summary["weight/ess"] == pytest.approx(3.1**2 / (3 * 3.71))
    # of three tokens 1.5 is above 1.2 with A > 0, and 0.5 below 0.8 with A < 0
    assert summary["clip_ratio/high_mean"] == pytest.approx(1 / 3)
    assert summary["clip_ratio/low_mean"] == pytest.approx(1 / 3)
    assert summary["clip_ratio/region_mean"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("loss", "low", "high"),
    [
        ("gspo", 0.5, 0.5),  # of two sequences the first is above 1.2, the second below 0.8
        ("gmpo", 0.5, 0.25),  # shares of tokens: the second's only one; one of the first's two; over two sequences
        ("cispo", 0.0, 0.0),  # cap 5
        ("impala", 0.0, 2 / 3),  # cap 1: 1.1 and 1.5 of three tokens
        ("topr", 0.0, 0.0),  # only A < 0 is capped, at 1, and there it is 0.5
    ],
)
def test_clip_metrics_count_units_of_the_loss(loss: str, low: float, high: float):
    summary = summarise(policy_loss(algorithm(loss), flat(HAND), totals_of(HAND))[1])
    assert summary["clip_ratio/low_mean"] == pytest.approx(low)
    assert summary["clip_ratio/high_mean"] == pytest.approx(high)


def test_the_effective_sample_size_of_products_that_underflow_is_still_theirs():
    # products e^-1000 * 1.65 and e^-1000 * 0.5: the same share as without the common factor
    batch = [replace(HAND[0], logp=[v - 500 for v in HAND[0].logp]), replace(HAND[1], logp=[HAND[1].logp[0] - 1000])]
    for parts in ([batch], [batch[:1], batch[1:]]):
        metrics = [policy_loss(algorithm("gepo"), flat(part, batch), totals_of(batch))[1] for part in parts]
        assert summarise(combine(metrics))["ratio/ess"] == pytest.approx(2.15**2 / (2 * 2.9725))


# ── a plain formula ──────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("distance", [0.03, 0.3, 1.0])
@pytest.mark.parametrize("loss", ALL)
def test_value_and_gradient_agree_with_the_plain_formula(loss: str, distance: float):
    batch = random_batch(seed=int(distance * 100), distance=distance)
    batch[4] = replace(batch[4], counts=False)
    x = flat(batch)
    value, _ = policy_loss(algorithm(loss), x, totals_of(batch))
    value.backward()
    assert value.item() == pytest.approx(plain_loss(loss, batch, batch), rel=1e-12)
    assert x.logp.grad.tolist() == pytest.approx(plain_gradient(loss, batch), abs=2e-8)
    assert x.logp.grad.abs().max() > 1e-3


# ── what must not matter ─────────────────────────────────────────────────────────────────────────────────────────────
def run(
    loss: str, parts: list[list[Completion]], whole: list[Completion]
) -> tuple[float, dict[str, float], list[float]]:
    """Loss, metrics and per-token gradient of a step taken in micro-batches, the gradient in the order of the parts."""
    totals, spec = totals_of(whole), algorithm(loss, kl_weight=0.01)
    metrics, gradient = [], []
    for part in parts:
        x = flat(part, whole)
        value, measured = policy_loss(spec, x, totals)
        value.backward()
        metrics.append(measured)
        gradient += x.logp.grad.tolist()
    summary = summarise(combine(metrics))
    return summary["loss"], summary, gradient


def same(one: Any, other: Any) -> bool:
    return other == pytest.approx(one, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("loss", ALL)
def test_split_into_micro_batches_does_not_matter(loss: str):
    batch = random_batch(seed=1)
    whole = run(loss, [batch], batch)
    splits = [[batch[:3], batch[3:]], [batch[:6], batch[6:]]]  # between groups
    if loss != "eqp":  # whose denominator needs the learner's p of the whole group
        splits += [[batch[:1], batch[1:5], batch[5:]], [[c] for c in batch]]
    for split in splits:
        assert all(same(a, b) for a, b in zip(whole, run(loss, split, batch)))


@pytest.mark.parametrize("loss", ALL)
def test_order_of_sequences_and_packing_of_tokens_do_not_matter(loss: str):
    batch = random_batch(seed=2)
    x, totals = flat(batch), totals_of(batch)
    value, metrics = policy_loss(algorithm(loss), x, totals)
    value.backward()

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randperm(x.logp.numel(), generator=generator)
    order = torch.randperm(x.lengths.numel(), generator=generator)
    shuffled = LossInputs(
        logp=x.logp.detach()[tokens].requires_grad_(),
        sampler_logp=x.sampler_logp[tokens],
        seq_ids=order.argsort()[x.seq_ids[tokens]],
        group_ids=x.group_ids[order] + 100,
        lengths=x.lengths[order],
        advantages=x.advantages[order],
        log_expected_q=x.log_expected_q[order],
    )
    other, other_metrics = policy_loss(algorithm(loss), shuffled, totals)
    other.backward()
    assert same(value.item(), other.item())
    assert same(summarise(metrics), summarise(other_metrics))
    assert same(x.logp.grad[tokens].tolist(), shuffled.logp.grad.tolist())


@pytest.mark.parametrize("loss", ALL)
def test_sequences_that_only_fill_up_do_not_matter(loss: str):
    batch = random_batch(seed=3)
    padding = [replace(c, counts=False) for c in random_batch(seed=4, distance=5.0)[:2]]
    padded = [padding[0], *batch, padding[1]]
    value, summary, gradient = run(loss, [batch], batch)
    # the fillers are in the micro-batch, but not in the step's totals nor in their groups' denominators
    x = flat(padded, batch)
    other, metrics = policy_loss(algorithm(loss, kl_weight=0.01), x, totals_of(batch))
    other.backward()
    first, last = len(padding[0].logp), -len(padding[1].logp)
    assert same(value, other.item())
    assert same(summary, summarise(metrics))
    assert same(gradient, x.logp.grad[first:last].tolist())
    assert torch.count_nonzero(x.logp.grad[:first]) == 0
    assert torch.count_nonzero(x.logp.grad[last:]) == 0


# ── at zero lag ──────────────────────────────────────────────────────────────────────────────────────────────────────
def policy_gradient_weight(loss: str, batch: list[Completion], c: Completion) -> float:
    """The factor of -A in a token's gradient when the sampler's policy is the learner's."""
    if loss in ("bnpo", "dapo", "cispo", "impala", "vespo"):
        return 1 / sum(len(o.logp) for o in batch)
    if loss == "dr_grpo":
        return 1 / (MAX_LENGTH * len(batch))
    if loss == "delta_l":
        return len(c.logp) ** -ALPHA / sum(len(o.logp) ** -ALPHA for o in batch) / MAX_LENGTH
    if loss == "topr":
        return 1 / len(batch)
    of_sequence_mean = 1 / (len(c.logp) * len(batch))
    if loss == "gepo":
        q = [math.exp(mean(o.sampler_logp)) for o in batch if o.group == c.group]
        return math.exp(mean(c.sampler_logp)) / (sum(v**2 for v in q) / sum(q)) * of_sequence_mean
    return of_sequence_mean


@pytest.mark.parametrize("loss", [name for name in ALL if name != "eqp"])
def test_at_zero_lag_the_gradient_is_the_policy_gradient(loss: str):
    batch = random_batch(seed=5)
    spec = algorithm("gepo", **WIDE) if loss == "gepo" else algorithm(loss)
    x = flat([replace(c, logp=c.sampler_logp) for c in batch])
    policy_loss(spec, x, totals_of(batch))[0].backward()
    expected = [-c.advantage * policy_gradient_weight(loss, batch, c) for c in batch for _ in c.logp]
    assert x.logp.grad.tolist() == pytest.approx(expected)


def test_at_zero_lag_gepo_weighs_a_sequence_by_its_share_of_the_expectation():
    # q = 0.5, 0.2: E_q = 0.29/0.7 = 0.4142857; coefficients 1.2068966 and 0.4827586, while the raw ratio is 1
    batch = [completion(0, 1.0, [0.5, 0.5], [1, 1]), completion(0, 1.0, [0.2], [1])]
    value, metrics = policy_loss(algorithm("gepo", **WIDE), flat(batch), totals_of(batch))
    summary = summarise(metrics)
    assert value.item() == pytest.approx(-(1.2068966 + 0.4827586) / 2, abs=1e-7)
    assert summary["weight/mean"] == pytest.approx((1.2068966 + 0.4827586) / 2, abs=1e-7)
    assert summary["ratio/mean"] == pytest.approx(1.0)


def test_expected_q_is_computed_in_log_space():
    # q = 0.5 and 0.2 scaled by e^-1000: the expectation 0.29/0.7 scales along, where exp alone would give 0/0
    logs = torch.tensor([math.log(0.5), math.log(0.2)], dtype=torch.float64)
    assert log_expected_q(logs).item() == pytest.approx(math.log(0.29 / 0.7))
    assert log_expected_q(logs - 1000).item() == pytest.approx(math.log(0.29 / 0.7) - 1000)


# ── at the edges ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("loss", ALL)
def test_a_batch_in_which_nothing_counts_gives_zero_and_no_nan(loss: str):
    masked = [replace(c, counts=False) for c in random_batch(seed=6)]
    for batch in (masked, []):
        x = flat(batch)
        value, metrics = policy_loss(algorithm(loss, kl_weight=0.01), x, totals_of(batch))
        value.backward()
        assert value.item() == 0
        assert torch.count_nonzero(x.logp.grad) == 0
        assert summarise(metrics) == {"loss": 0.0, "kl_to_sampler": 0.0}


@pytest.mark.parametrize("loss", ALL)
def test_an_empty_part_leaves_the_metrics_of_the_others_alone(loss: str):
    batch = random_batch(seed=7)
    assert all(same(a, b) for a, b in zip(run(loss, [batch], batch), run(loss, [batch, []], batch)))


def extreme(shift: Callable[[int], float], sampler_shift: Callable[[int], float]) -> list[Completion]:
    return [
        replace(
            c,
            logp=[v + shift(t) for t, v in enumerate(c.logp)],
            sampler_logp=[v + sampler_shift(t) for t, v in enumerate(c.sampler_logp)],
            advantage=sign,
        )
        for c in random_batch(seed=8)
        for sign in (1.0, -1.0)
    ]


def none(t: int) -> float:
    return 0.0


def now_and_then(t: int) -> float:
    return -math.inf if t % 2 else 0.0


def always(t: int) -> float:
    return -math.inf


EXTREMES = {
    "up": (lambda t: 1e3, none),
    "down": (lambda t: -1e3, none),
    "both": (lambda t: 1e3 * (-1) ** t, none),
    "p is 0 now and then": (now_and_then, none),
    "p is 0": (always, none),
    "q is 0 now and then": (none, now_and_then),
    "q is 0": (none, always),
    "p and q are 0": (always, always),
    "p or q is 0": (now_and_then, lambda t: now_and_then(t + 1)),
}
CORRECTIONS: list[dict[str, Any]] = [
    {},
    *({"weight": {"type": kind, "level": level}} for kind in ("truncate", "mask") for level in ("token", "sequence")),
    {"reject": {"type": "geometric"}},
    {"reject": {"type": "k3"}},
    {"opsmDelta": 0.5},
    {"m2poTau": 0.04},
]


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("extremes", EXTREMES)
def test_extreme_probabilities_stay_finite_in_float32_under_every_correction(loss: str, extremes: str):
    batch = extreme(*EXTREMES[extremes])
    for correction in CORRECTIONS:
        x = flat(batch, dtype=torch.float32)
        spec = algorithm(loss, kl_weight=0.005, correction=correction)
        value, metrics = corrected_loss(spec, x, totals_of(batch), m2_limit=0.1)
        value.backward()
        assert math.isfinite(value.item()), correction
        assert torch.isfinite(x.logp.grad).all(), correction
        assert all(math.isfinite(v) for v in summarise(metrics).values()), correction


@pytest.mark.parametrize("loss", ALL)
def test_a_probability_that_is_not_a_number_is_not_hidden(loss: str):
    batch = [replace(c, logp=[math.nan, *c.logp[1:]]) for c in random_batch(seed=8)]
    for correction in CORRECTIONS:
        spec = algorithm(loss, correction=correction)
        assert math.isnan(corrected_loss(spec, flat(batch), totals_of(batch), m2_limit=0.1)[0].item()), correction
