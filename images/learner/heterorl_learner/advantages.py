"""Advantages from rewards: numpy, so that samplers (none, group) and the learner (batch, beta) share it.

A group is the completions of one prompt; rewards [G]. Every scale starts from reward - group mean. `none` and `group`
need one group only and are computed where it is generated; `batch` and `beta` need all groups of an optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lgamma
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from heterorl.errors import UserError
from heterorl.spec.run import LossType

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
}
"""What `advantage.scale: auto` means for each loss."""

STD_FLOOR = 1e-4
"""Added to a standard deviation before dividing, as the authors and TRL do."""
MAX_BETA_WEIGHT = 1e6
"""Largest weight 1/pdf of a group."""


def resolve_scale(loss_type: LossType, scale: Literal["auto", "none", "group", "batch", "beta"]) -> Scale:
    """The scale a run uses: its own, or for auto the loss's."""
    return AUTO[loss_type] if scale == "auto" else scale


def group_advantages(rewards: Rewards, scale: Literal["none", "group"]) -> Advantages:
    """Advantages [G] of one group: reward - mean (none), the same over its std + 1e-4 (group)."""
    exact: NDArray[np.float64] = rewards.astype(np.float64)
    divisor = exact.std(ddof=1) + STD_FLOOR if scale == "group" else 1.0
    advantages: Advantages = ((exact - exact.mean()) / divisor).astype(np.float32)
    return advantages


def step_advantages(groups: Sequence[Rewards], scale: Scale) -> list[Advantages]:
    """Advantages of all groups of an optimizer step, in their order.

    batch: reward - group mean, over the std of the step's rewards + 1e-4. beta: reward - group mean, times the group's
    `beta_weights`. Raises UserError where beta meets rewards outside [0, 1].
    """
    if scale == "none" or scale == "group":
        return [group_advantages(rewards, scale) for rewards in groups]
    rewards = [group.astype(np.float64) for group in groups]
    if scale == "batch":
        weights = np.full(len(groups), 1 / (np.concatenate(rewards).std(ddof=1) + STD_FLOOR))
    else:
        low, high = min(group.min() for group in rewards), max(group.max() for group in rewards)
        if low < 0 or high > 1:
            raise UserError(
                f"rewards range from {low:g} to {high:g}, but advantage.scale beta requires rewards in [0, 1];"
                " change the weights of the rewards, or set algorithm.advantage.scale: group"
            )
        weights = beta_weights(np.array([group.mean() for group in rewards]))
    return [((group - group.mean()) * weight).astype(np.float32) for group, weight in zip(rewards, weights)]


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
    log_norm = lgamma(alpha) + lgamma(beta) - lgamma(alpha + beta)
    inside = means.clip(1e-12, 1 - 1e-12)  # at 0 and 1 all rewards are equal, so that weight meets A = 0
    log_pdf = (alpha - 1) * np.log(inside) + (beta - 1) * np.log1p(-inside) - log_norm
    weights: NDArray[np.float64] = np.exp(np.minimum(-log_pdf, np.log(MAX_BETA_WEIGHT)))
    return weights
