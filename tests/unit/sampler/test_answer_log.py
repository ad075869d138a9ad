"""Lines of answers: what they hold, and which of them a budget takes."""

import json

import pytest

from builders import run_of
from heterorl.exchange.rollout import Completion
from heterorl_sampler.answer_log import AnswerLog, bytes_a_version, within


class Letters:
    """A tokenizer whose tokens are code points."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_line_says_what_was_asked_and_answered_and_what_is_right():
    log = AnswerLog(Letters(), 12, "sums")
    row = {"id": 7, "prompt_ids": [ord("a"), ord("?")], "answer": "8"}
    log.note(row, [Completion([1, 2], [0.0, 0.0], False), Completion([3], [0.0], True)], ["8 ☺", "9"], [True, False])
    assert list(map(json.loads, log.lines)) == [
        {
            "step": 12, "set": "sums", "row": 7, "prompt": "a?", "reference": "8",
            "completions": [
                {"text": "8 ☺", "correct": True, "truncated": False, "tokens": 2},
                {"text": "9", "correct": False, "truncated": True, "tokens": 1},
            ],
        }
    ]  # fmt: skip


@pytest.mark.parametrize(("steps", "every", "evaluations"), [(100, 20, 7), (100, 0, 2), (99, 20, 6)])
def test_the_budget_is_divided_among_the_evaluations_of_the_run(steps, every, evaluations):
    spec = run_of(
        learner={"steps": steps}, evaluation={"everySteps": every}, data={"evals": [{"label": "sums"}]},
        monitoring={"logAnswers": {"maxMegabytes": 2}},
    ).spec  # fmt: skip
    assert bytes_a_version(spec) == pytest.approx(2e6 / evaluations)


def test_a_budget_takes_the_same_problems_in_every_version_and_keeps_their_order():
    before = [b"%03d before\n" % number for number in range(200)]
    after = [b"%03d after!\n" % number for number in range(200)]
    taken = within(before, 20 * len(before[0]), seed=3)
    assert len(taken) == 20
    assert taken == sorted(taken)
    assert [line[:3] for line in within(after, 20 * len(after[0]), seed=3)] == [line[:3] for line in taken]
    assert [line[:3] for line in within(after, 20 * len(after[0]), seed=4)] != [line[:3] for line in taken]


def test_a_budget_is_never_exceeded_and_one_that_suffices_takes_all():
    lines = [b"x" * size for size in (10, 50, 20, 90, 30)]
    for allowed in range(0, 220, 7):
        assert sum(map(len, within(lines, allowed, seed=0))) <= allowed
    assert within(lines, 200, seed=0) == lines
    assert within([], 100, seed=0) == []
