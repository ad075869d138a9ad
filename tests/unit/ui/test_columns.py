"""Curves that are small enough to draw: what is kept, and that a resumed run's steps are counted once."""

import numpy as np

from heterorl.ui.columns import StepTable, decimated, within


def test_a_step_that_is_trained_again_supersedes_it_and_all_later_ones():
    table = StepTable()
    table.add({"step": step, "reward": float(step), "time": 100.0 + step} for step in range(1, 6))
    table.add([{"step": 3, "reward": 30.0, "time": 200.0}])
    x, y = table.curve("reward")
    assert (x.tolist(), y.tolist()) == ([1, 2, 3], [1, 2, 30])
    assert table.curve("step", "time")[0].tolist() == [101, 102, 200]


def test_a_metric_that_begins_later_or_is_not_a_number_leaves_gaps():
    table = StepTable()
    table.add([{"step": 1}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": None}, {"step": "4", "loss": 1.0}])
    assert [axis.tolist() for axis in table.curve("loss")] == [[2], [0.5]]
    assert table.last("loss") is None
    assert table.keys == ["loss"]


def test_decimating_keeps_peaks_and_both_ends_within_the_number_asked_for():
    x = np.arange(10_000, dtype=np.float64)
    y = np.sin(x / 500)
    y[4321], y[7000] = 9.0, -9.0
    few_x, few_y = decimated((x, y), 400)
    assert len(few_x) <= 400
    assert (few_x[0], few_x[-1]) == (0, 9999)
    assert {9.0, -9.0} <= set(few_y.tolist())
    assert (np.diff(few_x) > 0).all()


def test_a_curve_that_is_small_is_left_as_it_is():
    curve = (np.arange(10.0), np.arange(10.0))
    assert decimated(curve, 10) is curve


def test_a_part_of_a_curve_reaches_over_both_edges():
    x = np.arange(0.0, 100.0, 10.0)
    assert within((x, x), 25, 45)[0].tolist() == [20, 30, 40, 50]
    assert within((x, x), None, None)[0].tolist() == x.tolist()
