"""What is said of a run that gets no further."""

from __future__ import annotations

from builders import FAR, Clock, exchange_at, run_of, spec_of
from heterorl.exchange.records import LearnerHeartbeat, SlotHeartbeat, SlotStatus
from heterorl.monitoring.progress import ProgressReader
from heterorl.monitoring.snapshot import ObservedSlot
from heterorl.monitoring.stall import waiting_for
from heterorl.spec.run import Slot

NOON = 1767268800.0  # 2026-01-01 12:00 UTC


def beat(state: str = "generating", **fields: object) -> SlotHeartbeat:
    return SlotHeartbeat.model_validate({"epoch": 1, "beats": 1, "state": state, **fields})


def test_each_slot_is_named_with_its_weights_and_since_when_it_is_silent():
    spec = spec_of(samplers=[{"name": "far", "replicas": 5}])
    beats = {
        Slot("far", 0): beat(version="v00000008-i0001"),
        Slot("far", 1): beat(version="v00000006-i0001"),
        Slot("far", 2): beat("waiting: weights", refused={"v00000008-i0001": "too far off"}),
        Slot("far", 3): beat("stopped", released=True),
    }
    seen = {slot: ObservedSlot(beat, NOON, alive=True) for slot, beat in beats.items()}
    seen[Slot("far", 1)] = ObservedSlot(beats[Slot("far", 1)], NOON - 600, alive=False)
    seen[Slot("far", 3)] = ObservedSlot(beats[Slot("far", 3)], NOON, alive=False)
    said = waiting_for(spec.slots, seen).split(", far-")
    assert said[0] == "far-0 is generating (serves v00000008-i0001)"
    assert said[1] == "1 has been silent since 11:50 UTC (serves v00000006-i0001)"
    assert said[2] == "2 is waiting: weights (serves no weights, refused v00000008-i0001)"
    assert said[3] == "3 has stopped (serves no weights)"
    assert said[4] == "4 has not started"


def test_a_slot_whose_groups_teach_nothing_says_so():
    spec = spec_of(samplers=[{"name": "far", "replicas": 2}])
    beats = {Slot("far", 0): beat(filtered=900, filtered_in_a_row=63), Slot("far", 1): beat(filtered_in_a_row=64)}
    few, many = waiting_for(spec.slots, {s: ObservedSlot(b, NOON, alive=True) for s, b in beats.items()}).split(
        ", far-"
    )
    assert few == "far-0 is generating (serves no weights)"
    assert "all rewards are equal within each of its latest groups" in many


def test_many_slots_are_counted():
    spec = spec_of(samplers=[{"name": "far", "replicas": 12}])
    assert waiting_for(spec.slots, {}).endswith("far-7 has not started, and 4 more")


def test_within_a_minute_without_a_step_it_is_told_what_the_learner_waits_for(tmp_path):
    clock = Clock(NOON)
    exchange = exchange_at(tmp_path, run_of(), clock=clock)
    exchange.mark_prepared()
    reader = ProgressReader(exchange)
    exchange.begin_incarnation()
    exchange.write_learner(LearnerHeartbeat(step=3, steps=9))
    lease = exchange.acquire_slot(lambda: [FAR])
    exchange.beat(lease, SlotStatus(state="waiting: weights"))
    clock.now += 30
    assert reader.read().waiting_for is None
    clock.now += 30
    exchange.beat(lease, SlotStatus(state="waiting: weights"))
    assert reader.read().waiting_for == "no step since 12:00 UTC: far-0 is waiting: weights (serves no weights)"
    exchange.write_learner(LearnerHeartbeat(step=4, steps=9))
    assert reader.read().waiting_for is None
