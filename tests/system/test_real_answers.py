"""The accuracy reward and the loader on real data: the paper's four evaluation sets and GSM8K's answers."""

import re
from collections.abc import Callable, Iterator
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
# score 1 all the same, as (gold, that answer): an assignment names its right-hand side.
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
    assert not [row["answer"] for row in rows if checker.why_no_reference(row["answer"])]


@pytest.mark.parametrize("name", NUM_PROBLEMS)
def test_a_gold_answer_in_a_box_scores_one(shared_data, checker, name) -> None:
    golds = [row["answer"] for row in load(shared_data, name)]
    zeros = [gold for gold in golds if not checker.check(gold, f"So it is $\\boxed{{{gold}}}$.")]
    assert zeros == GOLD_SCORES_ZERO.get(name, [])
    assert len(zeros) <= 0.005 * len(golds)


@pytest.mark.parametrize("name", NUM_PROBLEMS)
def test_a_gold_answer_written_otherwise_scores_one(shared_data, checker, name) -> None:
    """LaTeX's style command keeps the shortcut for identical texts from deciding."""
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


VARIANTS: dict[str, Callable[[str], str]] = {
    "between dollars": lambda gold: f"${gold}$",
    "in display math": lambda gold: f"\\[ {gold} \\]",
    "in bold math": lambda gold: f"\\boldsymbol{{{gold}}}",
    "in bold letters": lambda gold: f"\\mathbf{{{gold}}}",
    "in colour": lambda gold: f"\\textcolor{{blue}}{{{gold}}}",
    "underlined": lambda gold: f"\\underline{{{gold}}}",
    "in an aligned environment": lambda gold: f"\\begin{{aligned}}{gold}\\end{{aligned}}",
    "in Markdown's bold": lambda gold: f"**{gold}**",
    "with a comma after it": lambda gold: f"{gold},",
    "with a Chinese full stop after it": lambda gold: f"{gold}。",
    "with an equals sign before it": lambda gold: f"= {gold}",
    "with dashes, roots and degrees of Unicode": lambda gold: (
        re.sub(r"\\sqrt\{(\d+)\}", r"√\1", gold).replace("-", "–").replace(r"^\circ", "°").replace(r"\pi", "π")
    ),
    "with digits of full width": lambda gold: "".join(chr(ord(c) + 0xFEE0) if c.isdigit() else c for c in gold),
    "with thin spaces between thousands": lambda gold: (
        re.sub(r"\B(?=(\d{3})+$)", r"\,", gold.replace(",", "")) if re.fullmatch(r"[\d,]+", gold) else rf"\,{gold}"
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gold_answer_scores_one_however_it_is_typeset(shared_data, checker, variant) -> None:
    golds = {row["answer"] for name in NUM_PROBLEMS for row in load(shared_data, name)}
    zeros = [gold for gold in golds if not checker.check(gold, f"\\boxed{{{VARIANTS[variant](gold)}}}")]
    assert len(VARIANTS) == 14
    assert len(zeros) <= 0.02 * len(golds), zeros
    assert not zeros  # stricter than the bar: name what fails here, and why, before relaxing this
