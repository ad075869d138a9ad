"""Lanes of samplers: which weights were held when, lag, waiting and absence, by hand."""

import numpy as np
import pytest

from heterorl.ui.timeline import Lane


def batch(time: float, version: int, *, wait: float, work: float) -> dict:
    return {
        "time": time, "version_step": version, "rollout/backpressure_s": wait, "rollout/weights_wait_s": 0.0,
        "rollout/generate_s": work, "rollout/score_s": 0.0,
    }  # fmt: skip


def lane_of(*records: dict) -> Lane:
    lane = Lane()
    lane.add(records)
    return lane


LEARNER = (np.array([0.0, 10.0, 20.0, 30.0]), np.array([0.0, 1.0, 2.0, 3.0]))  # time, step


def test_a_lane_shows_versions_lag_and_when_the_sampler_was_away():
    lane = lane_of(
        {"event": "start", "time": 0.0},
        {"event": "swap", "time": 2.0, "version_step": 0},
        batch(12.0, 0, wait=0.0, work=10.0),
        {"event": "swap", "time": 22.0, "version_step": 2},
        {"event": "stop", "time": 28.0},
    )
    found = lane.stretches(np.array([0.0, 1.5, 8.5, 16.0, 24.0, 27.0, 40.0]), LEARNER)
    assert found["version"] == [None, 0, 0, 0, 2, None]  # at 0.75, 5, 12.25, 20, 25.5 and 33.5 s
    assert found["lag"] == [None, 0, 1, 2, 0, None]
    assert found["away"] == [False, False, False, False, False, True]
    assert (found["swaps"], found["swap_count"]) == ([2.0, 22.0], 2)


def test_waiting_is_the_share_of_each_stretch():
    # 0 to 10 s: half of it waited; 10 to 20 s: no batch; 20 to 24 s: all waited.
    lane = lane_of(
        {"event": "start", "time": 0.0}, batch(10.0, 0, wait=5.0, work=5.0), batch(24.0, 0, wait=4.0, work=0.0)
    )
    found = lane.stretches(np.array([0.0, 10.0, 20.0, 28.0]), LEARNER)
    assert found["waiting"] == pytest.approx([0.5, 0.0, 0.5])


def test_refused_versions_are_told_by_the_batch_that_counts_more_of_them():
    records = [
        {**batch(10.0 * n, 0, wait=0.0, work=1.0), "rejected_versions": count} for n, count in enumerate((0, 1, 1, 2))
    ]
    again = [{"event": "start", "time": 40.0}, {**batch(45.0, 3, wait=0.0, work=1.0), "rejected_versions": 1}]
    lane = lane_of({"event": "start", "time": 0.0}, *records, *again)
    assert lane.stretches(np.array([0.0, 25.0, 50.0]), LEARNER)["refusals"] == [10.0, 30.0, 45.0]
    assert lane.stretches(np.array([0.0, 5.0]), LEARNER)["refusals"] == []


def test_a_sampler_that_was_killed_holds_nothing_until_it_is_back():
    lane = lane_of(
        {"event": "start", "time": 0.0}, batch(4.0, 0, wait=0.0, work=1.0),
        {"event": "start", "time": 20.0}, batch(24.0, 1, wait=0.0, work=1.0), batch(30.0, 1, wait=0.0, work=1.0),
    )  # fmt: skip
    found = lane.stretches(np.array([0.0, 8.0, 16.0, 24.0, 32.0]), LEARNER)
    assert found["away"] == [False, True, False, False]


def test_a_lane_of_ten_thousand_batches_is_as_small_as_one_of_ten():
    lane = lane_of(
        {"event": "start", "time": 0.0},
        *({"event": "swap", "time": float(i), "version_step": i} for i in range(10_000)),
    )
    found = lane.stretches(np.linspace(0, 10_000, 201), LEARNER)
    assert len(found["version"]) == 200
    assert (found["swaps"], found["swap_count"]) == ([], 10_000)


def test_lines_that_are_not_ours_change_nothing():
    assert lane_of({"time": "soon"}, {}, {"time": None, "event": "stop"}).spans == []
