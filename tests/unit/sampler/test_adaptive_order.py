"""The adaptive order: it prefers prompts that are right now and then, forgets, and goes on where its state says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from heterorl.exchange.records import PromptEvidence, SlotState, parse_record
from heterorl_sampler.adaptive_order import CANDIDATES, HALF_LIFE_STEPS, MAX_KEPT, AdaptiveOrder
from heterorl_sampler.prompt_order import PromptOrder

ROWS = [{"id": i, "prompt_ids": [i]} for i in range(30)]
GROUP = 8


NOTHING = PromptEvidence()


def adaptive(rows=ROWS, *, seed=0, share=0, shares=1, weights=None, evidence=NOTHING):
    return AdaptiveOrder(rows, seed=seed, share=share, shares=shares, weights=weights, evidence=evidence)


def rewards_of(rate: float, rng: np.random.Generator, low=0.0, high=1.0):
    return np.where(rng.random(GROUP) < rate, high, low).astype(np.float32)


def play(order: PromptOrder, rates: dict[int, float], numbers: range, *, step=lambda seq: 0, low=0.0, high=1.0):
    """The rows that an order takes while prompts succeed at these rates."""
    rng, taken = np.random.default_rng(5), []
    for seq in numbers:
        row = order.row(seq, step(seq))
        taken.append(row["id"])
        order.observe(row, rewards_of(rates[row["id"]], rng, low, high), step(seq))
    return taken


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 0.5), (3.0, 10.0)])
def test_prompts_that_are_right_now_and_then_are_taken_most(low: float, high: float) -> None:
    rates = {i: (0.0, 0.5, 1.0)[i % 3] for i in range(30)}  # hopeless, uncertain, solved
    taken = Counter(i % 3 for i in play(adaptive(), rates, range(300), low=low, high=high)[100:])
    assert taken[1] > 180  # of 200; a shuffle would take 67
    assert sum(taken.values()) == 200


def test_every_prompt_is_tried_before_any_verdict() -> None:
    rates = dict.fromkeys(range(30), 0.5)
    assert len(set(play(adaptive(), rates, range(60)))) > 20


def test_what_a_prompt_was_worth_is_forgotten_as_the_policy_changes() -> None:
    known = PromptEvidence(reward_range=(0.0, 1.0), seen={0: (800.0, 800.0, 0)})  # solved 800 of 800 times
    order = adaptive(ROWS[:2], evidence=known)
    others = [order.row(seq, 0)["id"] for seq in range(200)]
    assert others.count(0) < 5
    long_after = int(30 * HALF_LIFE_STEPS)  # 800 / 2^30 is nothing
    assert 60 < [order.row(seq, long_after)["id"] for seq in range(200)].count(0) < 140


def test_evidence_counts_half_after_the_half_life() -> None:
    order = adaptive()
    order.observe(ROWS[3], np.array([0, 1, 1, 1], np.float32), 10)
    order.observe(ROWS[3], np.array([1, 1, 1, 1], np.float32), 10 + int(HALF_LIFE_STEPS))
    assert order.evidence.seen[3] == pytest.approx((4 / 2 + 4, 3 / 2 + 4, 10 + HALF_LIFE_STEPS))


def test_while_all_rewards_are_the_same_nothing_is_concluded() -> None:
    taken = play(adaptive(), dict.fromkeys(range(30), 0.0), range(90))
    assert len(set(taken)) > 25
    assert max(Counter(taken).values()) < 12


def test_the_next_holder_goes_on_as_this_one_would_have() -> None:
    rates = {i: i / 30 for i in range(30)}
    order = adaptive()
    play(order, rates, range(50))
    saved = SlotState(next_seq=50, prompts=order.evidence).to_bytes()
    successor = adaptive(evidence=parse_record(SlotState, saved, "the state").prompts)
    assert successor.evidence == order.evidence
    assert play(successor, rates, range(50, 120)) == play(order, rates, range(50, 120))


def test_the_choice_depends_on_the_seed_and_on_nothing_else() -> None:
    rates = {i: i / 30 for i in range(30)}
    assert play(adaptive(), rates, range(60)) == play(adaptive(), rates, range(60))
    assert play(adaptive(), rates, range(60)) != play(adaptive(seed=1), rates, range(60))


def test_a_slot_stays_within_its_share_of_every_epoch() -> None:
    for seq in range(20):
        epoch = seq * CANDIDATES // 15
        mine, theirs = (
            {id(PromptOrder(ROWS, seed=0, share=share, shares=2).row(epoch * 15 + place, 0)) for place in range(15)}
            for share in (0, 1)
        )
        proposed = {id(row) for row in adaptive(share=0, shares=2).candidates(seq, CANDIDATES)}
        if (seq * CANDIDATES + CANDIDATES - 1) // 15 == epoch:  # all of one epoch
            assert proposed <= mine
            assert proposed.isdisjoint(theirs)


def test_a_mix_keeps_its_weights_however_uncertain_one_of_its_sets_is() -> None:
    rows = [{"id": i, "set": "sure" if i < 20 else "unsure", "prompt_ids": [i]} for i in range(40)]
    order = adaptive(rows, weights={"sure": 3.0, "unsure": 1.0})
    rates = {i: 1.0 if i < 20 else 0.5 for i in range(40)}
    taken = Counter(rows[i]["set"] for i in play(order, rates, range(400)))
    assert 295 <= taken["sure"] <= 305


def test_the_evidence_is_bounded_and_what_was_seen_longest_ago_is_forgotten() -> None:
    rows = [{"id": i, "prompt_ids": [i]} for i in range(MAX_KEPT + 2)]
    order = adaptive(rows)
    for row in (*rows[:-1], rows[1], rows[-1]):
        order.observe(row, np.array([0, 1], np.float32), 0)
    kept = order.evidence.seen
    assert len(kept) == MAX_KEPT
    assert 1 in kept
    assert not {0, 2} & kept.keys()
    assert len(SlotState(next_seq=0, prompts=order.evidence).to_bytes()) < 200_000


def test_a_shuffled_order_knows_nothing() -> None:
    order = PromptOrder(ROWS, seed=0, share=0, shares=1)
    order.observe(ROWS[0], np.ones(4, np.float32), 3)
    assert order.evidence == NOTHING
    assert sorted(order.row(seq, 0)["id"] for seq in range(30)) == list(range(30))
