"""The corrections by hand, against NumPy with the formulas of verl and AReaL, and with every loss."""

import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from heterorl.spec.run import AlgorithmSpec, LossType, WeightSpec
from heterorl_learner.corrections import importance_weight, second_moment_limit
from heterorl_learner.losses import combine, summarise
from unit.learner.loss_batches import (
    HAND,
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
Batch = list[Completion]
WEIGHTS: list[dict[str, Any]] = [
    {"type": "truncate", "level": "token", "high": 1.25},
    {"type": "truncate", "level": "token", "low": 0.8, "high": 1.25},
    {"type": "truncate", "level": "sequence", "high": 1.5},
    {"type": "mask", "level": "token", "low": 0.8, "high": 1.25},
    {"type": "mask", "level": "sequence", "low": 0.5, "high": 2.0},
]
CORRECTIONS: list[dict[str, Any]] = [
    *({"weight": weight} for weight in WEIGHTS),
    {"reject": {"type": "geometric", "low": 0.9, "high": 1.1}},
    {"reject": {"type": "k3", "maxK3": 0.04}},
    {"opsmDelta": 0.02},
    {"m2poTau": 0.03},
    {"weight": WEIGHTS[0], "reject": {"type": "k3", "maxK3": 0.06}, "opsmDelta": 0.05, "m2poTau": 0.05},
]


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def factors(batch: Batch, correction: dict[str, Any], m2_limit: float | None = None) -> list[float]:
    """What the gradient of log p of each token is multiplied by, found with impala, whose own factor is then 1."""
    x = flat(batch)
    spec = algorithm("impala", correction=correction, rho_bar=1000.0)
    corrected_loss(spec, x, totals_of(batch), m2_limit)[0].backward()
    num_tokens = sum(len(c.logp) for c in batch)
    scale = [-c.advantage / num_tokens for c in batch for _ in c.logp]
    return [g / s for g, s in zip(x.logp.grad.tolist(), scale)]


# HAND's ratios are 1.1, 1.5 with A = +1 and 0.5 with A = -1; the product of the first two is 1.65.
@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ({"type": "truncate", "high": 1.2}, [1.1, 1.2, 0.5]),
        ({"type": "truncate", "low": 0.8, "high": 1.2}, [1.1, 1.2, 0.8]),
        ({"type": "mask", "high": 1.2}, [1.1, 0.0, 0.5]),
        ({"type": "mask", "low": 0.8, "high": 1.2}, [1.1, 0.0, 0.0]),
        ({"type": "truncate", "level": "sequence", "high": 1.6}, [1.6, 1.6, 0.5]),
        ({"type": "mask", "level": "sequence", "high": 1.6}, [0.0, 0.0, 0.5]),
        ({"type": "mask", "level": "sequence", "high": 1.7}, [1.65, 1.65, 0.5]),
    ],
)
def test_weights_are_those_worked_by_hand(weight: dict[str, Any], expected: list[float]):
    assert factors(HAND, {"weight": weight}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        # geometric means sqrt(1.65) = 1.2845 and 0.5
        ({"reject": {"type": "geometric", "low": 0.6, "high": 1.3}}, [1.1, 1.5, 0.0]),
        ({"reject": {"type": "geometric", "low": 0.4, "high": 1.2}}, [0.0, 0.0, 0.5]),
        # mean k3 0.0496 and 0.1931
        ({"reject": {"type": "k3", "maxK3": 0.1}}, [1.1, 1.5, 0.0]),
        ({"reject": {"type": "k3", "maxK3": 0.04}}, [0.0, 0.0, 0.0]),
        # mean log q/p of the second, whose advantage is negative: ln 2 = 0.6931
        ({"opsmDelta": 0.69}, [1.1, 1.5, 0.0]),
        ({"opsmDelta": 0.70}, [1.1, 1.5, 0.5]),
    ],
)
def test_filters_leave_out_whole_completions_and_the_loss_keeps_its_ratio(
    correction: dict[str, Any], expected: list[float]
):
    assert factors(HAND, correction) == pytest.approx(expected)


def test_a_completion_that_is_good_or_has_grown_more_likely_is_never_dropped_by_opsm():
    batch = [completion(0, 1.0, [0.5], [0.1]), completion(0, -1.0, [0.1], [9.0]), completion(0, -1.0, [0.5], [0.1])]
    assert factors(batch, {"opsmDelta": 0.1}) == pytest.approx([0.1, 9.0, 0.0])


def test_m2po_masks_the_largest_second_moments_until_the_mean_of_the_rest_is_small_enough():
    # squares 0.01, 0.04, 0.09, 1.0: means of the smallest 1, 2, 3, 4: 0.01, 0.025, 0.0467, 0.285
    log_ratios = torch.tensor([-0.2, 1.0, 0.1, 0.3], dtype=torch.float64)
    assert second_moment_limit(log_ratios, 0.04) == pytest.approx(0.04)
    assert second_moment_limit(log_ratios, 0.05) == pytest.approx(0.09)
    assert second_moment_limit(log_ratios, 0.3) == pytest.approx(1.0)
    assert second_moment_limit(log_ratios, 0.005) == -1.0
    assert second_moment_limit(torch.zeros(0), 0.04) == -1.0
    # HAND's: 0.00908, 0.16440, 0.48045
    assert factors(HAND, {"m2poTau": 0.04}, 0.2) == pytest.approx([1.1, 1.5, 0.0])
    assert factors(HAND, {"m2poTau": 0.04}, -1.0) == pytest.approx([0.0, 0.0, 0.0])


def test_m2po_masks_equal_second_moments_together():
    # one of the two 0.3 may stay by the mean, (0.01 + 0.09)/2 = 0.05, but nothing says which
    assert second_moment_limit(torch.tensor([0.1, 0.3, -0.3], dtype=torch.float64), 0.055) == pytest.approx(0.01)


def test_bounds_themselves_are_inside():
    batch = [completion(0, 1.0, [0.25, 0.25, 0.25], [2.0, 0.5, 1.0])]
    assert factors(batch, {"weight": {"type": "mask", "low": 0.5, "high": 2.0}}) == pytest.approx([2.0, 0.5, 1.0])


def test_corrections_multiply():
    both = {"weight": {"type": "truncate", "high": 1.2}, "opsmDelta": 0.1}
    assert factors(HAND, both) == pytest.approx([1.1, 1.2, 0.0])


def test_token_truncation_is_impala_with_that_cap():
    spec = algorithm("impala", correction={"weight": {"type": "truncate", "high": 1.2}})
    gradients = []
    for one in (spec, algorithm("impala", rho_bar=1.2)):
        x = flat(HAND)
        corrected_loss(one, x, totals_of(HAND))[0].backward()
        gradients.append(x.logp.grad.tolist())
    assert gradients[0] == pytest.approx(gradients[1])


def test_metrics_say_what_was_truncated_masked_and_rejected():
    def of(correction: dict[str, Any], m2_limit: float | None = None) -> dict[str, float]:
        _, metrics = corrected_loss(algorithm("gspo", correction=correction), flat(HAND), totals_of(HAND), m2_limit)
        prefix = "correction/"
        return {k.removeprefix(prefix): v for k, v in summarise(metrics).items() if k.startswith(prefix)}

    assert of({}) == {}
    # of three tokens one is above 1.2; weights 1.1, 1.2, 0.5
    assert of({"weight": {"type": "truncate", "high": 1.2}}) == pytest.approx(
        {"weight": 2.8 / 3, "truncated": 1 / 3, "zero": 0.0}
    )
    # 1.5 and 0.5 are outside: weights 1.1, 0, 0
    assert of({"weight": {"type": "mask", "low": 0.8, "high": 1.2}}) == pytest.approx(
        {"weight": 1.1 / 3, "masked": 2 / 3, "zero": 2 / 3}
    )
    # the second of two sequences, with one of three tokens
    assert of({"reject": {"type": "k3", "maxK3": 0.1}}) == pytest.approx({"rejected": 1 / 2, "zero": 1 / 3})
    assert of({"opsmDelta": 0.5, "m2poTau": 0.01}, 0.1) == pytest.approx({"opsm": 1 / 2, "m2po": 2 / 3, "zero": 2 / 3})


# ── against NumPy, by the formulas of verl and AReaL ─────────────────────────────────────────────────────────────────
def plain_factors(batch: Batch, correction: dict[str, Any]) -> list[list[float]]:
    """Factors of the tokens, a sequence at a time.

    Weights as verl's compute_rollout_correction_weights, rejection as its compute_rollout_rejection_mask (seq_mean_k1,
    whose bounds are on q/p, and seq_mean_k3), both in verl/trainer/ppo/rollout_corr_helper.py; OPSM as TRL's
    GRPOTrainer.get_off_policy_mask; M2PO as AReaL's _get_m2po_loss_mask.
    """
    weight, reject = correction.get("weight"), correction.get("reject", {"type": "none"})
    log_ratios = [np.subtract(c.logp, c.sampler_logp) for c in batch]
    kept = moments_kept(np.concatenate(log_ratios), correction["m2poTau"]) if "m2poTau" in correction else None
    result = []
    for c, lr in zip(batch, log_ratios):
        factor = np.ones(len(lr))
        if weight:
            rho = np.exp(lr if weight["level"] == "token" else np.full(len(lr), lr.sum()))
            low, high = weight.get("low", 0.0), weight["high"]
            factor = rho.clip(low, high) if weight["type"] == "truncate" else rho * ((rho >= low) & (rho <= high))
        if reject["type"] == "geometric":
            k1 = (-lr).mean()
            factor = factor * (math.log(1 / reject["high"]) <= k1 <= math.log(1 / reject["low"]))
        if reject["type"] == "k3":
            factor = factor * ((np.exp(lr) - 1 - lr).mean() <= reject["maxK3"])
        if "opsmDelta" in correction:
            factor = factor * (c.advantage >= 0 or (-lr).mean() <= correction["opsmDelta"])
        if kept is not None:
            factor = factor * np.isin(lr**2, kept)
        result.append(factor.tolist())
    return result


def moments_kept(log_ratios: Any, tau: float) -> Any:
    """The second moments that stay: from the largest on, as many are left out as it takes."""
    moments = np.sort(log_ratios**2)[::-1]
    left_out = next(k for k in range(len(moments) + 1) if k == len(moments) or moments[k:].mean() <= tau)
    return moments[left_out:]


def m2_limit_of(spec: AlgorithmSpec, batch: Batch) -> float | None:
    tau = spec.correction.m2po_tau
    return None if tau is None else second_moment_limit(flat(batch).sampler_log_ratio.detach(), tau)


@pytest.mark.parametrize("number", range(len(CORRECTIONS)))
@pytest.mark.parametrize("loss", ALL)
def test_value_and_gradient_of_every_loss_agree_with_the_plain_formula(loss: str, number: int):
    correction = CORRECTIONS[number]
    batch = random_batch(seed=11, distance=0.25)
    plain = plain_factors(batch, correction)
    assert any(f != 1 for factor in plain for f in factor)
    assert any(f != 0 for factor in plain for f in factor)
    spec = algorithm(loss, correction=correction)
    x = flat(batch)
    value, _ = corrected_loss(spec, x, totals_of(batch), m2_limit_of(spec, batch))
    value.backward()
    own = "weight" in correction
    assert value.item() == pytest.approx(plain_loss(loss, batch, batch, plain, own), rel=1e-12)
    assert x.logp.grad.tolist() == pytest.approx(plain_gradient(loss, batch, plain, own), abs=2e-8)


@pytest.mark.parametrize("loss", ALL)
def test_under_a_weight_every_loss_has_its_gradient_of_zero_lag_times_the_weight(loss: str):
    batch = random_batch(seed=12)
    x = flat(batch)
    wide = {"low": 0.0, "high": 1e6}
    spec = algorithm(loss, correction={"weight": {"type": "truncate", **wide}})
    corrected_loss(spec, x, totals_of(batch))[0].backward()
    there = flat([replace(c, sampler_logp=c.logp) for c in batch])
    corrected_loss(algorithm(loss), there, totals_of(batch))[0].backward()
    rho = [math.exp(p - q) for c in batch for p, q in zip(c.logp, c.sampler_logp)]
    means = [mean([math.exp(p - q) for p, q in zip(c.logp, c.sampler_logp)]) for c in batch for _ in c.logp]
    of_sequences = loss in ("gspo", "gmpo", "gepo", "gepo_plus", "eqp")
    if loss != "eqp":  # whose gradient also goes through the other completions of the group
        expected = [g * w for g, w in zip(there.logp.grad.tolist(), means if of_sequences else rho)]
        assert x.logp.grad.tolist() == pytest.approx(expected)


# ── with the step ────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("number", range(len(CORRECTIONS)))
@pytest.mark.parametrize("loss", ALL)
def test_split_into_micro_batches_does_not_matter(loss: str, number: int):
    batch = random_batch(seed=13)
    spec = algorithm(loss, correction=CORRECTIONS[number])
    limit = m2_limit_of(spec, batch)

    def run(parts: list[Batch]) -> tuple[dict[str, float], list[float]]:
        metrics, gradient = [], []
        for part in parts:
            x = flat(part, batch)
            value, measured = corrected_loss(spec, x, totals_of(batch), limit)
            value.backward()
            metrics.append(measured)
            gradient += x.logp.grad.tolist()
        return summarise(combine(metrics)), gradient

    whole = run([batch])
    splits = [[batch[:3], batch[3:], []]]  # between groups
    if not spec.needs_whole_groups:
        splits.append([[c] for c in batch])
    for split in splits:
        summary, gradient = run(split)
        assert summary == pytest.approx(whole[0], rel=1e-10, abs=1e-12)
        assert gradient == pytest.approx(whole[1], rel=1e-10, abs=1e-12)


def test_what_is_masked_still_counts_in_the_divisors():
    # three tokens; only the first has a factor: -(1.1 * A)/3 with A = 1, as TRL's dapo with token_mask
    spec = algorithm("dapo", correction={"weight": {"type": "mask", "low": 0.8, "high": 1.2}})
    assert corrected_loss(spec, flat(HAND), totals_of(HAND))[0].item() == pytest.approx(-1.1 / 3)


def test_whole_groups_are_needed_where_the_expectation_is_over_the_learner_itself():
    weight = {"weight": {"type": "truncate"}}
    assert algorithm("gepo", correction=weight).needs_whole_groups
    assert algorithm("gepo_plus", correction=weight).needs_whole_groups
    assert algorithm("eqp").needs_whole_groups
    assert not algorithm("gepo", correction={"opsmDelta": 0.5}).needs_whole_groups
    assert not algorithm("gspo", correction=weight).needs_whole_groups


def test_weights_have_no_gradient():
    weight, _ = importance_weight(flat(HAND), WeightSpec(type="truncate"))
    assert weight.requires_grad  # on its own it would have one
    x = flat(HAND)
    corrected_loss(algorithm("dapo", correction={"weight": {"type": "truncate"}}), x, totals_of(HAND))[0].backward()
    # -A rho / 3 and nothing of the derivative of rho
    assert x.logp.grad.tolist() == pytest.approx([-1.1 / 3, -1.5 / 3, 0.5 / 3])
