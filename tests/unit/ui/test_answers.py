"""Answers of evaluations by problem: what filters find, and files that are damaged, half-written or replaced."""

import json
from pathlib import Path

import pytest

from heterorl.ui.answers import AnswerIndex


def line(row: int, step: int, marks: str, label: str = "sums") -> dict:
    """A problem at a step; `marks` has an r for each completion that is right."""
    made = [{"text": f"{row} {mark}", "correct": mark == "r", "truncated": False, "tokens": 2} for mark in marks]
    return {"step": step, "set": label, "row": row, "prompt": f"Problem {row}?", "reference": "8", "completions": made}


def write(folder: Path, name: str, *lines: dict, tail: bytes = b"") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_bytes("".join(json.dumps(one) + "\n" for one in lines).encode() + tail)


@pytest.fixture
def index(tmp_path: Path) -> AnswerIndex:
    """Four problems at two steps: the first stays right, the second is learnt, the third unlearnt in part, the fourth
    wrong.
    """
    write(tmp_path / "answers", "v0", *(line(row, 0, marks) for row, marks in enumerate(["rr", "xx", "rr", "xx"])))
    write(tmp_path / "answers", "v9", *(line(row, 9, marks) for row, marks in enumerate(["rr", "rr", "rx", "xx"])))
    index = AnswerIndex(tmp_path / "answers")
    index.update()
    return index


def rows(index: AnswerIndex, outcome: str | None = None, step: int | None = None, words: str = "") -> list[str]:
    found = index.query("sums", step, outcome, words, 0, 25)
    assert found["found"] == len(found["problems"])
    return [problem["row"] for problem in found["problems"]]


@pytest.mark.parametrize(
    ("outcome", "step", "expected"),
    [
        (None, None, ["0", "1", "2", "3"]),
        ("right", None, ["0", "1"]),
        ("partly", None, ["2"]),
        ("wrong", None, ["3"]),
        ("gained", None, ["1"]),
        ("lost", None, ["2"]),
        ("right", 0, ["0", "2"]),
        ("gained", 0, []),
    ],
)
def test_problems_are_found_by_how_they_were_answered_at_a_step(index, outcome, step, expected):
    assert rows(index, outcome, step) == expected


def test_problems_are_found_by_their_words_and_counted(index):
    assert rows(index, words="problem 2") == ["2"]
    counts = index.query("sums", None, "wrong", "", 0, 25)["counts"]
    assert counts == {"all": 4, "right": 2, "partly": 1, "wrong": 1, "gained": 1, "lost": 1}


def test_a_page_has_the_shares_of_every_step(index):
    found = index.query("", None, None, "", 1, 3)
    assert (found["set"], found["steps"], found["step"], found["found"]) == ("sums", [0, 9], 9, 4)
    (last,) = found["problems"]
    assert (last["row"], last["right"]) == ("3", [0.0, 0.0])


def test_a_problem_is_opened_with_its_answers_newest_first(index):
    problem = index.problem("sums", "2")
    assert (problem["prompt"], problem["reference"]) == ("Problem 2?", "8")
    assert [(one["step"], one["right"]) for one in problem["answers"]] == [(9, 0.5), (0, 1.0)]
    assert [made["text"] for made in problem["answers"][0]["completions"]] == ["2 r", "2 x"]
    for label, row in (("sums", "7"), ("other", "2")):
        with pytest.raises(IndexError):
            index.problem(label, row)


def test_damaged_and_half_written_lines_leave_the_others(tmp_path):
    empty = {**line(1, 0, ""), "completions": []}
    write(tmp_path, "v0", line(0, 0, "r"), {"step": 0}, empty, tail=b'\x00\xff\n{"step": 0, "set')
    index = AnswerIndex(tmp_path)
    index.update()
    assert rows(index) == ["0"]
    assert index.damaged == 2


def test_a_later_evaluation_is_taken_in_and_one_that_was_repeated_replaces_the_earlier(index, tmp_path):
    write(tmp_path / "answers", "v20", line(0, 20, "xx"))
    index.update()
    assert rows(index) == ["0"]
    write(tmp_path / "answers", "v20", line(3, 20, "rrr"))
    index.update()
    assert rows(index) == ["3"]
    assert index.query("sums", None, None, "", 0, 25)["steps"] == [0, 9, 20]


def test_what_heterorl_eval_wrote_is_a_set_of_its_own(index, tmp_path):
    write(tmp_path / "answers", "eval-sums", line(0, 9, "x"))
    index.update()
    assert index.query("", None, None, "", 0, 25)["sets"] == ["sums", "sums (heterorl eval)"]
    assert index.problem("sums", "0")["answers"][0]["right"] == 1.0


def test_a_run_without_evaluations_has_no_sets(tmp_path):
    index = AnswerIndex(tmp_path / "absent")
    index.update()
    found = index.query("", None, None, "", 0, 25)
    assert (found["sets"], found["steps"], found["found"], found["problems"]) == ([], [], 0, [])
