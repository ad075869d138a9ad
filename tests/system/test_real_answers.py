"""The accuracy reward and the loader on real data: the paper's four evaluation sets and GSM8K's answers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from heterorl.data.answers import AnswerChecker
from heterorl.data.datasets import load_rows
from heterorl.spec.run import ColumnsSpec, DatasetSpec

pytestmark = pytest.mark.slow

NUM_PROBLEMS = {
    "eval/aime24.jsonl": 30,
    "eval/aime25.jsonl": 30,
    "eval/amc23.jsonl": 40,
    "eval/math500.jsonl": 500,
    "gsm8k/train.jsonl": 7473,
    "gsm8k/test.jsonl": 1319,
}
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."

# The exceptions. Gold answers that score 0 in their own box: none. Answers of the next problem with another gold that
# score 1 all the same, as (gold, that answer): math-verify takes an assignment for its right-hand side.
GOLD_SCORES_ZERO: dict[str, list[str]] = {}
OTHER_SCORES_ONE = {"eval/math500.jsonl": [("5", "x=5")]}


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker(time_limit_s=20) as checker:  # a busy machine must not decide these tests
        yield checker


def load(folder: Path, name: str) -> list[dict]:
    pattern = "#### (.+)" if name.startswith("gsm8k") else None
    columns = ColumnsSpec(answer_pattern=pattern, strip_suffix=INSTRUCTION)
    return load_rows(DatasetSpec(source="file", path=name, columns=columns), folder)


@pytest.mark.parametrize("name", NUM_PROBLEMS)
def test_every_row_loads_with_its_instruction_stripped_and_a_gold_that_parses(shared_data, checker, name) -> None:
    rows = load(shared_data, name)
    assert len(rows) == NUM_PROBLEMS[name]
    assert not [row["id"] for row in rows if "Please reason step by step" in row["prompt"]]
    assert not [row["answer"] for row in rows if not checker.parses(row["answer"])]


@pytest.mark.parametrize("name", NUM_PROBLEMS)
def test_a_gold_answer_in_a_box_scores_one(shared_data, checker, name) -> None:
    golds = [row["answer"] for row in load(shared_data, name)]
    zeros = [gold for gold in golds if not checker.check(gold, f"So it is $\\boxed{{{gold}}}$.")]
    assert zeros == GOLD_SCORES_ZERO.get(name, [])
    assert len(zeros) <= 0.005 * len(golds)


@pytest.mark.parametrize("name", NUM_PROBLEMS)
def test_a_gold_answer_written_otherwise_scores_one(shared_data, checker, name) -> None:
    """LaTeX's style command keeps the shortcut for identical texts from deciding, so that math-verify has to."""
    golds = [row["answer"] for row in load(shared_data, name)]
    zeros = [gold for gold in golds if not checker.check(gold, f"\\boxed{{\\displaystyle {gold}.}}")]
    assert len(zeros) <= 0.005 * len(golds), zeros


@pytest.mark.parametrize("name", NUM_PROBLEMS)
def test_the_answer_of_another_problem_scores_zero(shared_data, checker, name) -> None:
    golds = [row["answer"] for row in load(shared_data, name)]
    others = [next(other for other in golds[i:] + golds if other != gold) for i, gold in enumerate(golds)]
    ones = [pair for pair in zip(golds, others) if checker.check(pair[0], f"\\boxed{{{pair[1]}}}")]
    assert ones == OTHER_SCORES_ONE.get(name, [])
    assert len(ones) <= 0.01 * len(golds)
