"""Which checkpoints stay."""

from builders import spec_of
from heterorl.spec.run import RunSpec
from heterorl_learner.checkpoints import resumable, to_keep


def spec(keep: int, keep_best: str | None = "sums") -> RunSpec:
    return spec_of(
        learner={"checkpoint": {"everySteps": 10, "keep": keep, "keepBest": keep_best}},
        evaluation={"everySteps": 20},
        data={"evals": [{"label": "sums"}]},
    )


def test_the_newest_stay():
    assert to_keep(spec(2, keep_best=None), [10, 20, 30, 40], {20: 0.9}) == [30, 40]


def test_the_best_stays_beside_the_newest():
    assert to_keep(spec(1), [20, 40, 60, 70], {0: 0.95, 20: 0.9, 40: 0.5, 60: 0.6}) == [20, 70]
    assert resumable(spec(1), [20, 70]) == [70]  # only what a run resumes from holds rollouts


def test_of_equals_the_later_stays():
    assert to_keep(spec(1), [20, 40, 60], {20: 0.5, 40: 0.5, 60: 0.1}) == [40, 60]


def test_what_is_yet_to_be_evaluated_stays_until_a_later_step_is():
    assert to_keep(spec(1), [20, 30, 40, 60, 70], {20: 0.5}) == [20, 40, 60, 70]
    # 40 has no result and will have none: evaluations come in order
    assert to_keep(spec(1), [20, 40, 60, 70], {20: 0.5, 60: 0.4}) == [20, 70]


def test_without_any_result_all_evaluated_steps_stay():
    assert to_keep(spec(1), [10, 20, 40, 50], {}) == [20, 40, 50]
