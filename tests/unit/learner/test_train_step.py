"""A step's arithmetic around the losses: what is masked, what is counted, what is told."""

from __future__ import annotations

import numpy as np
import pytest

from builders import rollout_name, rollout_of, spec_of
from heterorl.exchange.rollout import Rollout
from heterorl.spec.run import RunSpec
from heterorl_learner.rollout_feed import StepBatch
from heterorl_learner.train_step import rollout_metrics, sequences, step_totals


def spec(**algorithm: object) -> RunSpec:
    algorithm = {"groupSize": 2, **algorithm}
    return spec_of(model={"dtype": "float32"}, algorithm=algorithm, generation={"maxCompletionTokens": 4})


def rollout(rewards: list[float], truncated: list[bool], terms: dict[str, list[float]] | None = None) -> Rollout:
    """Two completions, of 1 and 2 tokens, of probability 1/2 and 1/4 a token."""
    logp = np.log([0.5, 0.25, 0.25]).tolist()
    return rollout_of(rewards, [1, 2], logp=logp, truncated=truncated, terms=terms)


def batch(*rollouts: Rollout, step: int = 3, version: int = 1) -> StepBatch:
    names = [rollout_name(seq, version) for seq in range(len(rollouts))]
    return StepBatch(step, names, list(rollouts), wait_s=0.0)


def test_gepos_denominator_is_of_the_whole_group_also_where_a_member_is_masked() -> None:
    masked = spec(maskTruncated=True)
    (kept,) = sequences(masked, [rollout([1.0, 0.0], [False, True])])
    assert kept.completion_ids.tolist() == [7]
    # q = 1/2 and 1/4 (means of the log-probabilities): E_q = (1/4 + 1/16) / (3/4) = 5/12
    assert kept.log_expected_q == pytest.approx(np.log(5 / 12), abs=1e-6)


def test_totals_count_every_sequence_and_only_the_tokens_that_are_not_masked() -> None:
    totals = step_totals(spec(maskTruncated=True), [rollout([1.0, 0.0], [False, True])])
    assert (totals.sequences, totals.tokens, totals.max_length) == (2, 1, 4)


def test_metrics_of_a_step_are_those_of_its_rollouts() -> None:
    first = rollout([1.0, 0.0], [False, True], {"accuracy": [1.0, 0.0]})
    second = rollout([1.0, 1.0], [False, False], {"accuracy": [1.0, 1.0], "boxed": [0.0, 1.0]})
    metrics = rollout_metrics(spec(), batch(first, second))
    assert metrics["reward"] == 0.75
    assert metrics["reward_std"] == 0.25  # of the groups' 1/2 and 0
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["completions/clipped_ratio"] == 0.25
    assert (metrics["lag/mean"], metrics["lag/by_pool/far"]) == (2, 2)  # step 3, weights of step 1
    assert metrics["rewards/accuracy/mean"] == 0.75
    assert metrics["rewards/boxed/mean"] == 0.5  # a reward that came in with a resumed run
    assert not [name for name in metrics if name.startswith(("reward/", "rollouts/by_set/"))]  # one set


def test_metrics_of_a_reward_leave_out_where_it_does_not_apply() -> None:
    nan = float("nan")
    first = rollout_of([1.0, 3.0], terms={"judge": [1.0, nan], "never": [nan, nan]})
    changed = first.provenance.model_copy(update={"reward_sources": "edited"})
    second = rollout_of([1.0, 3.0], terms={"judge": [nan, 3.0], "never": [nan, nan]}, provenance=changed)
    metrics = rollout_metrics(spec(), batch(first, second))
    assert (metrics["rewards/judge/mean"], metrics["rewards/judge/std"]) == (2.0, 1.0)  # of 1 and 3
    assert not any("never" in name for name in metrics)
    assert metrics["rollouts/reward_sources"] == 2


def test_the_sets_of_a_mix_have_metrics_of_their_own() -> None:
    rewards = {"algebra": [[1.0, 0.0], [0.0, 0.0]], "proofs-2": [[1.0, 1.0]]}
    rollouts = [rollout_of(values, meta={"set": name}) for name, groups in rewards.items() for values in groups]
    metrics = rollout_metrics(spec(), batch(*rollouts))
    assert (metrics["reward/algebra"], metrics["rollouts/by_set/algebra"]) == (0.25, 2)
    assert (metrics["reward/proofs-2"], metrics["rollouts/by_set/proofs-2"]) == (1.0, 1)
    assert metrics["reward"] == 0.5
