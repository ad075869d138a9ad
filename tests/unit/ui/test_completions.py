"""The index of logged completions: filters, histogram, pages, damaged lines, and steps that were trained again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heterorl.ui.completions import CompletionIndex, Filter, histogram


def line(step: int, rewards: list[float], *, pool: str = "far", incarnation: int = 1, **fields: Any) -> dict[str, Any]:
    """A group with these rewards; each completion is the two tokens "a" and "bc"."""
    completions = [
        {"text": "abc", "reward": reward, "parts": {"accuracy": reward}, "advantage": 0.0, "truncated": reward < 0,
         "tokens": [1, 2], "versions": [[step - 1, 2]], "ratios": [1.0, 0.5]}
        for reward in rewards
    ]  # fmt: skip
    name = f"v{max(0, step - 3):08d}-i0001--{pool}-0--s{step:010d}"
    return {
        "step": step, "incarnation": incarnation, "rollout": name, "row": 7, "prompt": f"prompt {step}",
        "reference": "8", "completions": completions, **fields,
    }  # fmt: skip


def index_of(path: Path, *lines: Any, tail: str = "") -> CompletionIndex:
    file = path / "completions.jsonl"
    file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines) + tail)
    index = CompletionIndex(file)
    index.update()
    return index


def steps(answer: dict[str, Any]) -> list[int]:
    return [group["step"] for group in answer["groups"]]


def test_groups_come_newest_first_a_page_at_a_time(tmp_path):
    index = index_of(tmp_path, *(line(step, [0.0, 1.0]) for step in range(1, 8)))
    assert steps(index.query(Filter(), 0, 3)) == [7, 6, 5]
    assert steps(index.query(Filter(), 2, 3)) == [1]
    answer = index.query(Filter(), 0, 3)
    assert (answer["found"], answer["completions"], answer["steps"]) == (7, 14, [1, 7])
    assert answer["groups"][0]["lag"] == 2  # step 7 follows 6 updates; its weights were of step 4


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Filter(step_from=3, step_to=4), [4, 3]),
        (Filter(pool="near"), [4, 2]),
        (Filter(dataset="gsm8k"), [2]),
        (Filter(reward_from=0.5), [3, 1]),
        (Filter(reward_from=0.5, pool="near"), []),
        (Filter(truncated=True), [4]),
        (Filter(reward_from=0.0, reward_to=0.0), [3, 2, 1]),
    ],
)
def test_a_filter_finds_the_groups_that_have_such_a_completion(tmp_path, asked, expected):
    index = index_of(
        tmp_path,
        line(1, [0.0, 1.0]),
        line(2, [0.0, 0.0], pool="near", set="gsm8k"),
        line(3, [0.0, 0.75]),
        line(4, [-1.0, -1.0], pool="near"),
    )
    assert steps(index.query(asked, 0, 10)) == expected


def test_the_histogram_keeps_all_its_bars_while_one_of_them_filters(tmp_path):
    index = index_of(tmp_path, line(1, [0.0, 1.0]), line(2, [0.0, 0.5]))
    answer = index.query(Filter(reward_from=1.0, reward_to=1.0), 0, 10)
    assert steps(answer) == [1]
    assert [(bar["from"], bar["count"]) for bar in answer["histogram"]] == [(0.0, 2), (0.5, 1), (1.0, 1)]


def test_many_different_rewards_are_binned_and_none_is_lost():
    rewards = np.linspace(-1, 3, 1001)
    bars = histogram(rewards)
    assert len(bars) == 20
    assert sum(bar["count"] for bar in bars) == 1001
    assert (bars[0]["from"], bars[-1]["to"]) == (-1, 3)


def test_steps_that_a_resumed_learner_trained_again_are_shown_once(tmp_path):
    first = [line(step, [0.0], incarnation=1) for step in (1, 2, 3)]
    again = [line(step, [1.0], incarnation=2) for step in (2, 3)]
    answer = index_of(tmp_path, *first, *again).query(Filter(), 0, 10)
    assert [(group["step"], group["rewards"]) for group in answer["groups"]] == [(3, [1.0]), (2, [1.0]), (1, [0.0])]


def test_damaged_lines_are_left_out_and_a_torn_one_waits(tmp_path):
    no_rewards = line(2, [0.0])
    del no_rewards["completions"][0]["reward"]
    index = index_of(
        tmp_path,
        line(1, [1.0]),
        '{"step": 1, "roll\x00',
        no_rewards,
        {"step": 5, "rollout": "nonsense"},
        tail='{"step"',
    )
    answer = index.query(Filter(), 0, 10)
    assert (steps(answer), answer["damaged"]) == ([1], 2)  # what is not JSON at all is no line of ours
    with open(tmp_path / "completions.jsonl", "a") as file:
        file.write(": 3}\n" + json.dumps(line(4, [1.0])) + "\n")
    index.update()
    assert steps(index.query(Filter(), 0, 10)) == [4, 1]


def test_a_group_has_the_text_of_each_token(tmp_path):
    index = index_of(tmp_path, line(1, [1.0]), line(2, [0.0, 1.0]))
    group = index.group(1)
    assert (group["step"], group["reference"]) == (2, "8")
    assert [one["pieces"] for one in group["completions"]] == [["a", "bc"]] * 2
    for number in (-1, 2):
        with pytest.raises(IndexError):
            index.group(number)


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    index = index_of(tmp_path, *(line(step, [0.0]) for step in range(1, 5)))
    (tmp_path / "completions.jsonl").write_text(json.dumps(line(9, [1.0])) + "\n")
    index.update()
    assert steps(index.query(Filter(), 0, 10)) == [9]


def test_an_absent_file_has_no_groups(tmp_path):
    index = CompletionIndex(tmp_path / "completions.jsonl")
    index.update()
    answer = index.query(Filter(), 0, 10)
    assert (answer["groups"], answer["histogram"], answer["found"]) == ([], [], 0)
