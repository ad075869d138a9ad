"""Which rollouts a step trains on, which prompts a slot walks, when a sampler waits: pure functions."""

from __future__ import annotations

import heapq
from typing import Any

import pytest

from builders import spec_of
from heterorl.exchange.records import LearnerHeartbeat, SlotHeartbeat
from heterorl.exchange.rollout import RolloutName
from heterorl.exchange.version import Version
from heterorl.spec.run import RunSpec, Slot
from heterorl_learner.publish import versions_to_keep
from heterorl_learner.rollout_feed import select_rollouts
from heterorl_sampler.backpressure import Queue, made_by_others, queue_of, reason_to_wait, room
from heterorl_sampler.prompt_order import PromptOrder


def name(step: int, slot: str, seq: int, incarnation: int = 1) -> RolloutName:
    return RolloutName(Version(step, incarnation), Slot.parse(slot), seq)


def spec(**fields: object) -> RunSpec:
    return spec_of(**{"samplers": [{"name": "near"}, {"name": "far"}], **fields})


# ── selection ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_too_few_rollouts_select_nothing() -> None:
    assert select_rollouts([name(0, "a-0", 0)], step=0, groups=2, max_steps=64, last=None) is None


def test_the_oldest_version_goes_first() -> None:
    waiting = [name(5, "a-0", 0), name(3, "b-0", 9), name(4, "a-0", 1)]
    selection = select_rollouts(waiting, step=6, groups=2, max_steps=64, last=None)
    assert selection is not None
    assert selection.names == [name(3, "b-0", 9), name(4, "a-0", 1)]


def test_slots_take_turns_within_a_version_starting_after_the_last() -> None:
    waiting = [name(1, slot, seq) for slot in ("a-0", "b-0", "c-0") for seq in (10, 11)]
    selection = select_rollouts(waiting, step=1, groups=4, max_steps=64, last=Slot("a", 0))
    assert selection is not None
    assert selection.names == [name(1, "b-0", 10), name(1, "c-0", 10), name(1, "a-0", 10), name(1, "b-0", 11)]


def test_the_bound_on_the_lag_is_strict() -> None:
    # at step 67 a version of step 3 is 64 steps late, one of step 2 is 65
    waiting = [name(2, "a-0", 0), name(3, "a-0", 1)]
    selection = select_rollouts(waiting, step=67, groups=1, max_steps=64, last=None)
    assert selection is not None
    assert selection.names == [name(3, "a-0", 1)]
    assert selection.dropped == [name(2, "a-0", 0)]


def test_weights_of_a_lost_future_count_as_fresh() -> None:
    selection = select_rollouts([name(10, "a-0", 0)], step=5, groups=1, max_steps=0, last=None)
    assert selection is not None
    assert selection.names == [name(10, "a-0", 0)]


def test_the_order_of_the_listing_does_not_matter() -> None:
    waiting = [name(step, slot, seq) for step in (1, 2) for slot in ("a-0", "b-1") for seq in (0, 1)]
    forward = select_rollouts(waiting, step=2, groups=5, max_steps=64, last=None)
    assert forward == select_rollouts(waiting[::-1], step=2, groups=5, max_steps=64, last=None)


# ── backpressure ─────────────────────────────────────────────────────────────────────────────────────────────────────
FAR = Slot("far", 0)


def test_what_was_taken_no_longer_waits() -> None:
    published = {seq: Version(3, 1) for seq in (0, 1, 2)}
    learner = LearnerHeartbeat(step=3, taken={"far-0": 1}, waiting={"far-0": 1, "near-0": 4, "near-1": 2})
    queue = queue_of(spec(), FAR, Version(3, 1), published, [], 0, learner)
    assert queue == Queue(own=1, others=6, made=3)  # number 2


def test_a_group_that_was_finished_after_a_later_one_was_taken_waits() -> None:
    published = {5: Version(3, 1), 2: Version(3, 1), 6: Version(3, 1)}  # 5 was taken, 2 came too late for that
    learner = LearnerHeartbeat(step=3, taken={"far-0": 5}, waiting={"far-0": 2}, late={"far-0": 1})
    assert queue_of(spec(), FAR, Version(3, 1), published, [], 0, learner).own == 2  # 2 and 6


def test_what_is_being_scored_waits_as_if_it_were_published_and_what_is_generated_does_not() -> None:
    learner = LearnerHeartbeat(step=3)
    queue = queue_of(spec(), FAR, Version(3, 1), {0: Version(3, 1)}, [Version(3, 1), Version(2, 1)], 5, learner)
    assert queue == Queue(own=3, in_scoring=2, in_engine=5, made=1, making=6)


def test_rollouts_that_are_too_old_do_not_count_towards_backpressure() -> None:
    published = {0: Version(0, 1), 1: Version(1, 1)}  # lags 65 and 64; maxSteps is 64
    assert queue_of(spec(), FAR, Version(1, 1), published, [], 0, LearnerHeartbeat(step=65)).own == 1


@pytest.mark.parametrize(
    ("fields", "learner", "queue", "version", "reason"),
    [
        ({}, {"step": 5}, Queue(), 5, None),
        ({}, {"step": 5}, Queue(own=64), 5, "queue"),  # maxPendingGroups is 64
        ({"exchange": {"maxPendingGroups": 20}}, {"step": 5}, Queue(own=20, others=11), 5, None),  # a step takes 32
        ({"exchange": {"maxPendingGroups": 20}}, {"step": 5}, Queue(own=20, others=12), 5, "queue"),
        ({"exchange": {"maxPendingGroups": 20}}, {"step": 5}, Queue(own=20, others=11, in_scoring=20), 5, "rewards"),
        ({}, {"step": 70}, Queue(), 5, "staleness"),  # 65 steps late, and 64 are allowed
        ({}, {"step": 5, "finished": True}, Queue(), 5, "finished"),
        ({"mode": "online"}, {"step": 5}, Queue(), 4, "weights"),  # newest is 5
        ({"mode": "online"}, {"step": 5}, Queue(made=32), 5, "weights"),  # 32 groups a step
        ({"mode": "online"}, {"step": 5}, Queue(made=16, making=15), 5, None),
        ({"mode": "online"}, {"step": 5}, Queue(made=16, by_others=16), 5, "weights"),  # another makes the rest
        ({"mode": "online"}, {"step": 5}, Queue(made=16, by_others=15), 5, None),
    ],
)
def test_each_reason_to_wait_holds_only_when_it_should(
    fields: dict[str, object], learner: dict[str, Any], queue: Queue, version: int, reason: str | None
) -> None:
    assert (
        reason_to_wait(spec(**fields), Version(version, 1), Version(5, 1), LearnerHeartbeat(**learner), queue) == reason
    )


def test_the_wait_policy_pauses_a_sampler_whose_rollouts_would_come_too_late() -> None:
    # 64 groups before it are 2 steps of 32: trained at step 40 + 2, weights of step 10 are then 32 steps old, of 9 33
    waiting = spec(algorithm={"staleness": {"maxSteps": 32, "policy": "wait"}})
    queue = Queue(others=64)
    assert reason_to_wait(waiting, Version(10, 1), Version(40, 1), LearnerHeartbeat(step=40), queue) is None
    assert reason_to_wait(waiting, Version(9, 1), Version(40, 1), LearnerHeartbeat(step=40), queue) == "staleness"


@pytest.mark.parametrize(
    ("queue", "added"),
    [
        (Queue(), 16),  # 8 in generation and as many queued
        (Queue(in_engine=16), 0),
        (Queue(in_engine=15), 1),
        (Queue(own=52), 12),  # the queue has room for 64
        (Queue(own=52, in_engine=10), 2),
        (Queue(own=63), 8),  # no less than a batch
        (Queue(own=63, in_engine=8), 0),
    ],
)
def test_the_engine_holds_two_batches_and_no_more_than_the_queue_has_room_for(queue: Queue, added: int) -> None:
    assert room(spec(), 8, queue, FAR) == added


def test_a_slot_that_alone_must_fill_a_step_is_not_held_back_by_its_own_queue() -> None:
    small = spec(exchange={"maxPendingGroups": 20})
    assert room(small, 8, Queue(own=30), FAR) == 16  # a step takes 32, and nobody else makes any


@pytest.mark.parametrize(("replicas", "groups", "shares"), [(2, 32, [16, 16]), (3, 32, [10, 11, 11]), (1, 32, [32])])
def test_the_shares_of_online_samplers_make_up_a_step(replicas: int, groups: int, shares: list[int]) -> None:
    online = spec(mode="online", samplers=[{"name": "far", "replicas": replicas}])
    sizes = [room(online, 100, Queue(), slot) for slot in online.slots]
    assert sizes == shares
    assert sum(sizes) == groups


def test_an_online_slot_adds_no_more_than_the_version_lacks() -> None:
    online = spec(mode="online")  # 32 groups, 2 slots
    assert room(online, 4, Queue(), FAR) == 8
    assert room(online, 100, Queue(made=30), FAR) == 2
    assert room(online, 100, Queue(made=8, by_others=20), FAR) == 4
    assert room(online, 100, Queue(making=6, in_engine=6), FAR) == 10  # of its share of 16


def test_what_others_promised_counts_and_of_those_that_are_gone_what_they_published() -> None:
    def beat(promised: int, version: int = 3, **fields: Any) -> SlotHeartbeat:
        return SlotHeartbeat(
            promised=promised, made=2, version=str(Version(version, 1)), epoch=1, beats=1, **{"time": 100.0, **fields}
        )

    beats = {
        Slot("far", 0): beat(16),  # this slot itself
        Slot("far", 1): beat(16),
        Slot("far", 2): beat(8, version=2),  # still on other weights
        Slot("far", 3): beat(8, released=True),
        Slot("far", 4): beat(8, time=39.0),  # silent for longer than a lease
    }
    assert made_by_others(beats, Slot("far", 0), Version(3, 1), fresh_since=40.0) == 16 + 2 + 2


@pytest.mark.parametrize("seconds", [[1.0, 1.0], [1.0, 1.7], [1.0, 3.0], [1.0, 1.1, 0.4], [0.3, 1.0, 2.0, 5.0]])
@pytest.mark.parametrize("per_batch", [2, 16])
def test_online_samplers_of_any_speeds_make_no_group_too_many(seconds: list[float], per_batch: int) -> None:
    """Slots that take these times for a group, and adopt a version at slightly different moments."""
    online = spec(mode="online", samplers=[{"name": "far", "replicas": len(seconds)}])
    slots, groups = online.slots, online.learner.batch.groups
    for step in range(20):
        version, beats, learner = Version(step, 1), dict[Slot, SlotHeartbeat](), LearnerHeartbeat(step=step)
        made, in_engine = [0] * len(slots), [0] * len(slots)
        wakes = [(0.01 * place, place, 0) for place in range(len(slots))]  # when, which slot, what it has finished
        while wakes:
            now, place, finished = heapq.heappop(wakes)
            slot = slots[place]
            made[place] += finished
            in_engine[place] -= finished
            published = dict.fromkeys(range(made[place]), version)
            others = made_by_others(beats, slot, version, fresh_since=0.0)
            queue = queue_of(online, slot, version, published, [], in_engine[place], learner, others)
            if reason_to_wait(online, version, version, learner, queue) is None:
                count = room(online, per_batch, queue, slot)
                in_engine[place] += count
                for number in range(count):
                    heapq.heappush(wakes, (now + seconds[place] * (1 + number / 7), place, 1))
            beats[slot] = SlotHeartbeat(
                promised=made[place] + in_engine[place], version=str(version), epoch=1, beats=1, time=now
            )
        assert sum(made) == groups


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_slots_walk_disjoint_shares_that_cover_the_data_in_every_epoch() -> None:
    rows = [{"id": i} for i in range(10)]
    orders = [PromptOrder(rows, seed=1, share=share, shares=3) for share in range(3)]
    sizes = [4, 3, 3]
    for epoch in range(2):
        walked = [o.row(epoch * size + i)["id"] for o, size in zip(orders, sizes) for i in range(size)]
        assert sorted(walked) == list(range(10))


def test_the_order_of_prompts_depends_on_the_seed_alone() -> None:
    rows = [{"id": i} for i in range(100)]

    def walk(seed: int) -> list[int]:
        order = PromptOrder(rows, seed=seed, share=0, shares=2)
        return [order.row(i)["id"] for i in range(50)]

    assert walk(1) == walk(1)
    assert walk(1) != walk(2)


def mixed(sizes: dict[str, int]) -> list[dict[str, object]]:
    return [{"id": f"{name}/{i}", "set": name} for name, size in sizes.items() for i in range(size)]


def test_a_mix_draws_each_set_in_proportion_to_its_weight_in_every_stretch() -> None:
    rows = mixed({"a": 50, "b": 7, "c": 20})
    order = PromptOrder(rows, seed=3, share=0, shares=1, weights={"a": 6, "b": 3, "c": 1})
    drawn = [order.row(seq)["set"] for seq in range(3000)]
    for start in (0, 777, 2000):
        counts = [drawn[start : start + 1000].count(name) for name in "abc"]
        assert counts == pytest.approx([600, 300, 100], abs=3)


def test_a_mix_walks_each_set_through_before_it_repeats_a_row_and_slots_share_none() -> None:
    rows = mixed({"big": 40, "small": 6})
    orders = [PromptOrder(rows, seed=1, share=s, shares=2, weights={"big": 1, "small": 1}) for s in range(2)]
    walked = [[order.row(seq)["id"] for seq in range(46)] for order in orders]
    for name, size in (("big", 40), ("small", 6)):
        drawn = [[i for i in own if i.startswith(name)] for own in walked]
        epochs = len(drawn[0]) * 2 // size
        assert epochs == {"big": 1, "small": 7}[name]  # 23 draws of each set a slot
        for epoch in range(epochs):
            both = [i for own in drawn for i in own[epoch * size // 2 : (epoch + 1) * size // 2]]
            assert len(set(both)) == size


def test_the_row_of_a_number_in_a_mix_is_the_same_wherever_the_walk_begins() -> None:
    rows, weights = mixed({"a": 11, "b": 13}), {"a": 2.0, "b": 5.0}

    def order(seed: int = 4) -> PromptOrder:
        return PromptOrder(rows, seed=seed, share=1, shares=3, weights=weights)

    from_the_start = order()
    walked = [from_the_start.row(seq)["id"] for seq in range(5000)]
    assert [order().row(seq)["id"] for seq in (0, 1, 1023, 1024, 4321, 4999)] == [
        walked[seq] for seq in (0, 1, 1023, 1024, 4321, 4999)
    ]
    assert walked[:100] != [order(seed=5).row(seq)["id"] for seq in range(100)]


def test_more_slots_than_rows_still_get_prompts() -> None:
    order = PromptOrder([{"id": 0}, {"id": 1}], seed=0, share=5, shares=6)
    assert {order.row(i)["id"] for i in range(50)} == {0, 1}


# ── retention ────────────────────────────────────────────────────────────────────────────────────────────────────────
def published(steps: range) -> list[tuple[Version, float]]:
    return [(Version(step, 1), float(step * 10)) for step in steps]  # one every 10 s


def kept(fields: dict[str, object], steps: range, now_s: float) -> list[int]:
    return sorted(version.step for version in versions_to_keep(spec(**fields), published(steps), now_s))


def test_only_the_newest_versions_are_kept_without_a_transit_delay() -> None:
    assert kept({}, range(100), 990.0) == [97, 98, 99]


def test_a_transit_delay_in_steps_keeps_what_it_will_still_show() -> None:
    delay = {"distribution": "constant", "model": "transit", "unit": "steps", "lower": 32}
    samplers = [{"name": "far", "delay": delay}]
    # with the newest at 99, 67 is shown now and 68.. will be
    assert kept({"samplers": samplers}, range(100), 990.0) == list(range(67, 100))


def test_a_transit_delay_in_seconds_keeps_what_it_will_still_show() -> None:
    delay = {"distribution": "constant", "model": "transit", "lower": 100.0}
    samplers = [{"name": "far", "delay": delay}]
    # 100 s before 995 is 895: of step 89 (890 s) everything on is needed, 89 because 90 is not shown yet
    assert kept({"samplers": samplers}, range(100), 995.0) == list(range(89, 100))
