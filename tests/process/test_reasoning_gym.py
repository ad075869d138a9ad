"""Tasks of reasoning-gym in the worker: all of the package's, with its own answers and with junk."""

from __future__ import annotations

import ast
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heterorl.data.answers import AnswerChecker
from heterorl.data.reasoning_gym import COLUMN, Verifier, draw, generate
from heterorl.errors import DataError
from heterorl.spec.run import DatasetSpec

JUNK = ["9**9**9**9", "", "\N{GRINNING FACE}" * 40, "x" * 20_000, "nan", "[" * 5000]
NO_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Tasks whose problems come without a reference answer; two of them not even with an example of one."""


def dataset_of(*tasks: dict[str, Any], rows: int, seed: int = 0) -> DatasetSpec:
    gym = {"tasks": list(tasks), "rows": rows, "seed": seed}
    return DatasetSpec.model_validate({"source": "reasoningGym", "reasoningGym": gym})


def drawn(*tasks: dict[str, Any], rows: int = 1, seed: int = 0) -> list[dict[str, Any]]:
    return draw(dataset_of(*tasks, rows=rows, seed=seed).reasoning_gym)


@pytest.fixture(scope="module")
def every_task() -> tuple[DatasetSpec, list[dict[str, Any]]]:
    """A row of each task of the package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from reasoning_gym.factory import DATASETS
    names = sorted(DATASETS.keys() - {"composite"})
    dataset = dataset_of(*({"name": name} for name in names), rows=len(names), seed=3)
    return dataset, draw(dataset.reasoning_gym)


@pytest.fixture(scope="module")
def verifier(every_task: tuple[DatasetSpec, list[dict[str, Any]]]) -> Iterator[Verifier]:
    with AnswerChecker(boxed_only=False) as checker, Verifier([every_task[0]], checker, time_limit_s=60) as verifier:
        yield verifier


def own_answer(row: dict[str, Any]) -> str | None:
    """The package's answer to a row, or its example of one."""
    metadata = ast.literal_eval(row["columns"][COLUMN]["entry"])["metadata"]
    match row["columns"]["task"]:
        case "graph_color":
            return json.dumps({str(vertex): color for vertex, color in metadata["possible_answer"].items()})
        case "rubiks_cube":
            return str(metadata["example_correct_answer"])
        case "propositional_logic":
            return str(metadata["example_answer"])
    return row["answer"] or None


def test_every_task_gives_a_row_and_full_marks_to_its_own_answer(
    every_task: tuple[DatasetSpec, list[dict[str, Any]]], verifier: Verifier
) -> None:
    _, rows = every_task
    assert len(rows) == 105
    assert all(row["prompt"].strip() for row in rows)
    assert {row["columns"]["task"] for row in rows if not row["answer"]} == NO_ANSWER
    answered = {row["columns"]["task"]: verifier.score(row, answer) for row in rows if (answer := own_answer(row))}
    assert len(answered) == 103
    assert {task: score for task, score in answered.items() if score != 1} == {}


def test_junk_neither_hangs_nor_fools_nor_ends_any_verifier(
    every_task: tuple[DatasetSpec, list[dict[str, Any]]],
) -> None:
    dataset, rows = every_task
    with AnswerChecker() as checker, Verifier([dataset], checker, time_limit_s=0.5) as verifier:
        scores = {(row["columns"]["task"], junk[:12]): verifier.score(row, junk) for row in rows for junk in JUNK}
        assert {about: score for about, score in scores.items() if score > 0.1} == {}
        assert verifier.cut_off > 0  # some of them would have taken for ever


def test_a_right_answer_is_told_from_a_wrong_one(verifier: Verifier) -> None:
    rows = drawn({"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2}}, rows=5)
    for row in rows:
        problem = row["prompt"].rpartition(":")[2].rstrip(" =")  # such as `4 - 3`
        first, sign, second = problem.split()
        total = int(first) + int(second) if sign == "+" else int(first) - int(second)
        assert verifier.score(row, str(total)) == 1
        assert verifier.score(row, str(total + 1)) < 0.5
        assert verifier.score(row, None) == 0


def test_the_answer_stands_between_tags_or_in_the_last_box_or_alone(verifier: Verifier) -> None:
    (row,) = drawn({"name": "gcd"})
    right, wrong = row["answer"], str(int(row["answer"]) + 1)
    box = r"It is \boxed{%s}."
    tags = "<answer> %s </answer>"
    for completion in (right, box % right, tags % wrong + tags % right, box % wrong + tags % right):
        assert verifier.mark(row, completion) == 1, completion
    for completion in (wrong, right + box % wrong, tags % wrong + right, "</answer> " + right + " <answer>"):
        assert verifier.mark(row, completion) < 1, completion
    assert verifier.mark({"columns": {}}, "6") is None


def test_what_fools_a_verifier_of_the_package_scores_nothing(
    every_task: tuple[DatasetSpec, list[dict[str, Any]]], verifier: Verifier
) -> None:
    row_of = {row["columns"]["task"]: row for row in every_task[1]}
    halting = row_of["game_of_life_halting"]
    assert verifier.score(halting, {"True": "False", "False": "True"}[halting["answer"]]) == 0
    assert verifier.score(row_of["complex_arithmetic"], "NaN + 2i") == 0
    assert verifier.score(row_of["puzzle24"], "4*6*1*1*1") == 0
    numbers = ast.literal_eval(row_of["puzzle24"]["columns"][COLUMN]["entry"])["metadata"]["numbers"]
    assert verifier.score(row_of["puzzle24"], "8*3 + 0*7") == 0
    assert sorted(numbers) != [0, 3, 7, 8]


def test_an_answer_is_never_run_as_code(verifier: Verifier, tmp_path: Path) -> None:
    tasks = ["binary_matrix", "spiral_matrix", "string_insertion", "n_queens"]
    answer = f"[[open({str(tmp_path / 'made')!r}, 'w')]]"
    for row in drawn(*({"name": name} for name in tasks), rows=4):
        assert verifier.score(row, answer) < 0.1
    assert not (tmp_path / "made").exists()


def test_tasks_alternate_by_weight_and_a_limit_takes_the_first() -> None:
    tasks = {"name": "gcd", "weight": 3}, {"name": "lcm"}, {"name": "lcm"}
    rows = draw(dataset_of(*tasks, rows=100).reasoning_gym, limit=10)
    assert Counter(row["columns"]["task"] for row in rows) == {"gcd": 6, "lcm": 4}
    assert Counter(row["columns"]["task"] for row in rows[:5]) == {"gcd": 3, "lcm": 2}
    assert [row["id"] for row in rows] == list(range(10))
    assert len({row["prompt"] for row in rows}) == 10  # a task that is listed twice does not repeat itself


def test_the_same_seed_gives_the_same_rows_whatever_order_sets_have(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [{"name": name} for name in ("isomorphic_strings", "polynomial_multiplication", "ransom_note")]
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    first = drawn(*tasks, rows=6)
    monkeypatch.setenv("PYTHONHASHSEED", "2")
    assert drawn(*tasks, rows=6) == first


def test_another_seed_gives_other_rows() -> None:
    def of_seed(seed: int) -> set[str]:
        rows = generate({"name": "chain_sum", "level": None, "config": {}}, seed, 0, 20)["rows"]
        return {row["prompt"] for row in rows}

    assert of_seed(1).isdisjoint(of_seed(2000))


def test_a_higher_level_is_harder_and_a_configuration_takes_precedence() -> None:
    sums = {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2}}
    easy, hard = drawn({**sums, "level": 0}, {**sums, "level": 4}, rows=2)
    assert sum(c.isdigit() for c in hard["prompt"]) > sum(c.isdigit() for c in easy["prompt"])
    assert all(len(row["prompt"].rpartition(":")[2].rstrip(" =").split()) == 3 for row in (easy, hard))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"name": "chain_sums"},
            "reasoning-gym 0.1.25 has no task chain_sums; did you mean chain_sum or decimal_chain_sum",
        ),
        ({"name": "chainSum"}, "has no task chainSum; did you mean chain_sum"),
        ({"name": "chain_sum", "config": {"max_term": 2}}, "chain_sum has no option max_term; did you mean max_terms"),
        ({"name": "chain_sum", "config": {"seed": 2}}, "chain_sum has no option seed; "),
        ({"name": "chain_sum", "level": 99}, "chain_sum has levels 0 to "),
        ({"name": "gsm_symbolic", "level": 0}, "gsm_symbolic has no curriculum, so remove its level"),
        ({"name": "chain_sum", "config": {"min_terms": 9}}, 'chain_sum refuses configuration {"min_terms": 9}: '),
        ({"name": "chain_sum", "config": {"min_terms": "two"}}, 'refuses configuration {"min_terms": "two"}: '),
    ],
)
def test_a_task_that_the_package_does_not_know_is_one_clear_line(task: dict[str, Any], message: str) -> None:
    refused = generate({"level": None, "config": {}, **task}, 0, 0, 1)["refused"]
    assert message in refused
    assert "\n" not in refused


def test_a_task_that_is_refused_is_the_users_error() -> None:
    with pytest.raises(DataError, match=r"^reasoningGym\.tasks: reasoning-gym 0\.1\.25 has no task sums; "):
        drawn({"name": "gcd", "weight": 1000}, {"name": "sums"})  # though its weight gives it no row
