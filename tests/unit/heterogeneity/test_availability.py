"""Replicas over time, against traces worked by hand and the statistics of an alternating renewal process."""

import itertools

import pytest

from heterorl.heterogeneity import availability
from heterorl.heterogeneity.availability import next_change, replicas_at
from heterorl.spec.run import SamplerPoolSpec


def pool(replicas=3, **availability):
    return SamplerPoolSpec(name="far", replicas=replicas, availability=availability)


WINDOWS = pool(
    type="windows",
    windows=[
        {"startSeconds": 10, "endSeconds": 20, "replicas": 1},
        {"startSeconds": 15, "endSeconds": 30, "replicas": 2},
        {"startSeconds": 40, "endSeconds": 50, "replicas": 9},
    ],
)
TRACE = pool(type="trace", trace=[{"atSeconds": 5, "replicas": 1}, {"atSeconds": 8, "replicas": 0}])


def churn(replicas=1, seed=0, name="far"):
    times = {"meanUpSeconds": 300, "meanDownSeconds": 100, "seed": seed}
    return SamplerPoolSpec(name=name, replicas=replicas, availability={"type": "churn", "churn": times})


def test_always_means_all_replicas_for_ever():
    assert [replicas_at(pool(), t) for t in (0, 1e9)] == [3, 3]
    assert next_change(pool(), 0) is None


@pytest.mark.parametrize(
    ("elapsed", "expected"),
    [(0, 0), (9.9, 0), (10, 1), (15, 2), (20, 2), (29.9, 2), (30, 0), (40, 3), (49.9, 3), (50, 0)],
)
def test_windows_overlap_to_the_larger_and_end_exclusively(elapsed, expected):
    assert replicas_at(WINDOWS, elapsed) == expected


@pytest.mark.parametrize(("elapsed", "expected"), [(0, 3), (4.9, 3), (5, 1), (7.9, 1), (8, 0), (1e6, 0)])
def test_trace_holds_its_last_point(elapsed, expected):
    assert replicas_at(TRACE, elapsed) == expected


@pytest.mark.parametrize(
    ("which", "expected"), [(WINDOWS, [10, 15, 30, 40, 50]), (TRACE, [5, 8])], ids=["windows", "trace"]
)
def test_next_change_skips_edges_that_change_nothing(which, expected):
    # The first window ends at 20 inside the second one: no change there.
    moments, now = [], next_change(which, 0)
    while now is not None:
        moments.append(now)
        now = next_change(which, now)
    assert moments == expected


def test_time_scale_rehearses_the_same_trace_faster():
    assert [replicas_at(WINDOWS, t / 100, time_scale=0.01) for t in range(60)] == [
        replicas_at(WINDOWS, t) for t in range(60)
    ]
    assert next_change(WINDOWS, 0.16, time_scale=0.01) == pytest.approx(0.30)
    whole = [replicas_at(churn(4), 10.0 * t) for t in range(500)]
    assert [replicas_at(churn(4), 0.1 * t, time_scale=0.01) for t in range(500)] == whole


def test_churn_starts_with_every_replica_up():
    assert replicas_at(churn(20), 0) == 20


def test_churn_is_up_for_its_share_of_the_time():
    # Share up = 300 / (300 + 100); with mean cycles of 400 s, 20 replicas over 400,000 s are 20,000 cycles.
    counts = [replicas_at(churn(20), t) for t in range(0, 400_000, 400)]
    assert sum(counts) / len(counts) / 20 == pytest.approx(0.75, abs=0.01)


def test_churn_toggles_with_exponential_times():
    which, moments, now = churn(1), [0.0], next_change(churn(1), 0)
    while len(moments) < 4001:
        moments.append(now)
        now = next_change(which, now)
    spans = [b - a for a, b in itertools.pairwise(moments)]
    up, down = spans[0::2], spans[1::2]
    assert sum(up) / len(up) == pytest.approx(300, rel=0.08)  # standard error of 2000 exponentials: 2.2 %
    assert sum(down) / len(down) == pytest.approx(100, rel=0.08)
    assert sum(s > 300 for s in up) / len(up) == pytest.approx(0.368, abs=0.04)  # exp(-1)


def test_churn_does_not_depend_on_what_was_asked_before():
    moments = [9000.0, 10.0, 400_000.0, 777.0]
    counts = [replicas_at(churn(5), t) for t in moments]
    availability._life.cache_clear()  # as in a process that has just started
    assert [replicas_at(churn(5), t) for t in reversed(moments)] == counts[::-1]


def test_churn_changes_exactly_at_the_next_change():
    which, now = churn(6), 0.0
    for _ in range(200):
        at = next_change(which, now)
        assert abs(replicas_at(which, at) - replicas_at(which, now)) == 1
        assert replicas_at(which, (now + at) / 2) == replicas_at(which, now)
        now = at


def trace_of(which, seed=0):
    return [replicas_at(which, t, seed=seed) for t in range(0, 20_000, 100)]


def test_same_seed_gives_the_same_trace_and_another_seed_another():
    assert trace_of(churn(3), seed=2) == trace_of(churn(3, seed=2)) == trace_of(churn(3, seed=1), seed=1)
    assert trace_of(churn(3)) != trace_of(churn(3), seed=2)
    assert trace_of(churn(3)) != trace_of(churn(3, name="near"))


def test_replicas_of_a_churning_pool_live_their_own_lives():
    assert set(trace_of(churn(2))) == {0, 1, 2}


def test_pool_without_replicas_never_changes():
    assert replicas_at(churn(0), 50) == 0
    assert next_change(churn(0), 50) is None
