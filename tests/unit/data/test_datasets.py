import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from heterorl.data.datasets import load_rows, prepare_rows, prepare_training
from heterorl.data.prompts import Template
from heterorl.errors import DataError
from heterorl.spec.run import ColumnsSpec, DatasetSpec, TrainDatasetSpec


class OneTokenACharacter:
    """What `raw` needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def jsonl(folder: Path, *rows: Any, name: str = "train.jsonl") -> DatasetSpec:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return DatasetSpec(source="file", path=name)


def prepare(dataset: DatasetSpec, base: Path, max_prompt_tokens: int = 100, need_gold_parse: bool = True):
    around = OneTokenACharacter(), Template.named("raw"), max_prompt_tokens
    return prepare_rows(dataset, base, *around, need_gold_parse=need_gold_parse)


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_row_keeps_its_place_and_its_columns(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, {"problem": "1+1=", "answer": 2, "level": 3}, "", {"problem": "2+2=", "answer": " 4 "})
    assert prepare(dataset, tmp_path).rows == [
        {
            "id": 0,
            "prompt": "1+1=",
            "prompt_ids": [49, 43, 49, 61],
            "answer": "2",
            "columns": {"problem": "1+1=", "answer": 2, "level": 3},
        },
        {
            "id": 2,  # the blank line counts
            "prompt": "2+2=",
            "prompt_ids": [50, 43, 50, 61],
            "answer": "4",
            "columns": {"problem": "2+2=", "answer": " 4 "},
        },
    ]


def test_gsm8k_needs_only_its_answer_pattern(tmp_path: Path) -> None:
    row = {"question": "How much is 2*540?", "answer": "It is <<2*540=1080>>1,080.\n#### 1,080"}
    dataset = jsonl(tmp_path, row).model_copy(update={"columns": ColumnsSpec(answer_pattern="#### (.+)")})
    (loaded,) = load_rows(dataset, tmp_path)
    assert (loaded["prompt"], loaded["answer"]) == ("How much is 2*540?", "1,080")


def test_a_solution_is_read_by_its_last_box(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, {"problem": "p", "solution": r"As \boxed{1}, it is \boxed{\frac{1}{2}}."})
    assert load_rows(dataset, tmp_path)[0]["answer"] == r"\frac{1}{2}"


def test_named_columns_are_taken_before_any_alias(tmp_path: Path) -> None:
    row = {"task": "p", "problem": "no", "result": "7", "answer": "no"}
    dataset = jsonl(tmp_path, row).model_copy(update={"columns": ColumnsSpec(prompt="task", answer="result")})
    (loaded,) = load_rows(dataset, tmp_path)
    assert (loaded["prompt"], loaded["answer"]) == ("p", "7")


def test_the_instruction_at_the_end_of_a_problem_is_stripped(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, {"problem": "2+2?\nPlease box it.", "answer": "4"}, {"problem": "3+3?", "answer": "6"})
    dataset = dataset.model_copy(update={"columns": ColumnsSpec(strip_suffix="\nPlease box it.")})
    assert [row["prompt"] for row in load_rows(dataset, tmp_path)] == ["2+2?", "3+3?"]


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, {"problem": "p", "answer": "1"}, "broken").model_copy(update={"limit": 1})
    assert len(load_rows(dataset, tmp_path)) == 1


def test_parquet_reads_as_jsonl_does(tmp_path: Path) -> None:
    import datetime

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"problem": ["1+1="], "answer": [2], "day": [datetime.date(2025, 8, 26)]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    (row,) = load_rows(DatasetSpec(source="file", path="train.parquet"), tmp_path)
    assert row == {
        "id": 0,
        "prompt": "1+1=",
        "answer": "2",
        "columns": {"problem": "1+1=", "answer": 2, "day": "2025-08-26"},  # JSON has no dates
    }


def test_arithmetic_is_right_distinct_and_repeatable(tmp_path: Path) -> None:
    dataset = DatasetSpec.model_validate({"arithmetic": {"digits": 2, "rows": 500, "seed": 3}})
    rows = load_rows(dataset, tmp_path)
    for row in rows:
        a, b = map(int, row["prompt"].removesuffix("=").split("+"))
        assert 10 <= a <= 99
        assert 10 <= b <= 99
        assert row["answer"] == str(a + b)
    assert len({row["prompt"] for row in rows}) == 500
    assert load_rows(dataset, tmp_path) == rows
    assert load_rows(dataset, tmp_path, seed=1) != rows


def test_only_built_in_problems_want_a_value(tmp_path: Path) -> None:
    sums = load_rows(DatasetSpec.model_validate({"arithmetic": {"rows": 3}}), tmp_path)
    assert [row["require_value"] for row in sums] == [True] * 3
    (row,) = load_rows(jsonl(tmp_path, {"problem": "p", "answer": "1"}), tmp_path)
    assert "require_value" not in row


def test_sums_of_several_sizes_alternate(tmp_path: Path) -> None:
    dataset = DatasetSpec.model_validate({"arithmetic": {"minDigits": 1, "digits": 3, "rows": 100}})
    operands = [row["prompt"].rstrip("=").split("+") for row in load_rows(dataset, tmp_path)]
    sizes = [{len(a), len(b)} for a, b in operands]
    assert sizes == [{1 + row % 3} for row in range(100)]
    assert len({tuple(pair) for pair in operands}) == 100


def test_arithmetic_repeats_problems_when_there_are_too_few(tmp_path: Path) -> None:
    rows = load_rows(DatasetSpec.model_validate({"arithmetic": {"digits": 1, "rows": 1000}}), tmp_path)
    assert len(rows) == 1000
    assert len({row["prompt"] for row in rows}) == 100  # 0+0= to 9+9=


def test_too_long_prompts_are_counted_and_skipped(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, {"problem": "12+34=", "answer": "46"}, {"problem": "1+2=", "answer": "3"})
    prepared = prepare(dataset, tmp_path, max_prompt_tokens=4)
    assert [row["id"] for row in prepared.rows] == [1]
    assert prepared.skipped == 1


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_bad_row_is_counted_and_the_first_are_named(tmp_path: Path) -> None:
    good = {"problem": "p", "answer": "1"}
    bad = [
        {"problem": "p"},
        {"problem": "p", "answer": "  "},
        "{broken",
        {"problem": " ", "answer": "1"},
        {"problem": "p", "answer": ["1"]},
        {"problem": 5, "answer": "1"},
        {"problem": "p", "answer": None},
    ]
    with pytest.raises(DataError) as error:
        load_rows(jsonl(tmp_path, good, *bad, good), tmp_path)
    assert str(error.value) == (
        "train.jsonl: 7 of 9 rows cannot be used: line 2: no column `answer` or `solution`; found: problem"
        " | line 3: the answer is empty"
        " | line 4: not a JSON object (Expecting property name enclosed in double quotes, column 2)"
        " | line 5: the problem is empty"
        " | line 6: the answer is a list, not text or a number; name one of its values, such as columns.answer: answer.0"
        " | and 2 more;"
        " correct or remove them, name other columns under columns, or set onBadRow: skip to leave them out"
    )


def test_an_answer_that_cannot_be_compared_is_refused_if_it_is_to_be_compared(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, {"problem": "p", "answer": "1"}, {"problem": "p", "answer": r"\frac{1}{"})
    with pytest.raises(DataError, match=r"train.jsonl: 1 of 2 rows cannot be used: line 2: the answer cannot be read"):
        prepare(dataset, tmp_path)
    assert len(prepare(dataset, tmp_path, need_gold_parse=False).rows) == 2


def test_a_pattern_that_does_not_match_is_a_bad_row(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, {"problem": "p", "answer": "4"})
    columns = ColumnsSpec(answer_pattern="#### (.+)")
    with pytest.raises(DataError, match=r"answerPattern '#### \(\.\+\)' is not found in the answer \(line 1\)"):
        load_rows(dataset.model_copy(update={"columns": columns}), tmp_path)


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the problem contains half of a surrogate pair.*line 1"):
        load_rows(jsonl(tmp_path, r'{"problem": "p\ud800", "answer": "1"}'), tmp_path)


def test_all_prompts_too_long_names_the_shortest(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, {"problem": "12+34=", "answer": "46"}, {"problem": "1+2=", "answer": "3"})
    with pytest.raises(DataError, match="maxPromptTokens 3; the shortest has 4 tokens"):
        prepare(dataset, tmp_path, max_prompt_tokens=3)


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_data_set_is_refused(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(DataError, match=r"train.jsonl: the dataset is empty"):
        load_rows(jsonl(tmp_path, *lines), tmp_path)


def test_a_missing_file_names_the_place_looked_at(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data/none.jsonl: no such file \(looked for {tmp_path}/data/none.jsonl\)"):
        load_rows(DatasetSpec(source="file", path="data/none.jsonl"), tmp_path)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("problem,answer\n")
    (tmp_path / "train.parquet").write_text("problem,answer\n")
    (tmp_path / "train.jsonl").write_bytes(b'{"problem": "\xff\xfe"}\n')
    for name, message in [
        ("train.txt", r"a data file ends in .jsonl, .* or in .parquet, this one in .txt"),
        ("train.parquet", "train.parquet: not a readable Parquet file"),
        ("train.jsonl", "train.jsonl: not UTF-8 text"),
    ]:
        with pytest.raises(DataError, match=message):
            load_rows(DatasetSpec(source="file", path=name), tmp_path)


def test_the_hubs_own_library_loads_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "sums"  # `datasets` takes a folder as it takes a name on the Hub
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n{"question": "2+2=", "answer": "4"}\n')
    rows = load_rows(DatasetSpec(source="hub", name=str(folder), split="test", limit=1), tmp_path)
    assert rows == [{"id": 0, "prompt": "1+1=", "answer": "2", "columns": {"question": "1+1=", "answer": "2"}}]


# ── columns ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def of(dataset: DatasetSpec, **columns: Any) -> DatasetSpec:
    return dataset.model_copy(update={"columns": ColumnsSpec(**columns)})


def test_inner_columns_are_named_by_their_path(tmp_path: Path) -> None:
    row = {
        "data": {"text": "1+1="},
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra": [{"x": {"gold": 3}}],
        "a.b": "dotted",
    }
    rows = jsonl(tmp_path, row)
    for prompt, answer, expected in [
        ("data.text", "reward_model.ground_truth", ("1+1=", "2")),
        ("data.text", "extra.0.x.gold", ("1+1=", "3")),
        ("a.b", "reward_model.ground_truth", ("dotted", "2")),  # a name that holds a dot is a name first
    ]:
        (loaded,) = load_rows(of(rows, prompt=prompt, answer=answer), tmp_path)
        assert (loaded["prompt"], loaded["answer"]) == expected
        assert loaded["columns"] == row


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        ({}, {"text": "p", "label": 1}, r"train.jsonl: no column `problem` or `question`; found: text, label \(line 1\)"),
        ({}, {"problem": "p", "gold": 1}, "no column `answer` or `solution`; found: problem, gold"),
        ({}, {"problem": "p", "answer": None}, "the answer is null"),
        ({}, {"problem": None, "answer": "1"}, "the problem is null"),
        ({}, {}, "no column `problem` or `question`; found: none"),
        ({"answer": "reward_model.truth"}, {"problem": "p", "reward_model": {"style": 1, "ground_truth": "2"}},
         r"no column `reward_model.truth`; found: problem, reward_model.style, reward_model.ground_truth"),
        ({"answer": "golds.1"}, {"problem": "p", "golds": ["2"]}, "no column `golds.1`; found: problem, golds"),
        ({"prompt": "task"}, {"problem": "p", "answer": "2"}, "no column `task`; found: problem, answer"),
    ],
)  # fmt: skip
def test_a_column_that_is_absent_or_empty_is_told_with_those_that_are_there(
    tmp_path: Path, columns: dict[str, str], row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(of(jsonl(tmp_path, row), **columns), tmp_path)


def test_what_all_rows_lack_is_said_once(tmp_path: Path) -> None:
    rows = [{"text": f"{i}", "label": i} for i in range(500)]
    with pytest.raises(DataError) as error:
        load_rows(jsonl(tmp_path, *rows), tmp_path)
    assert str(error.value) == (
        "train.jsonl: no column `problem` or `question`; found: text, label (each of its 500 rows);"
        " name other columns under columns, or correct the data"
    )


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("18", "18"), ("1e22", "1"), ("18.0", "18"), ("-0.5", "-0.5"), ("1.5e-7", "0.00000015"), ("true", "true"),
        ("false", "false"), ("0", "0"), ("-7", "-7"), ("1e300", "1"), ("123456789012345678901234567890", "1234567890"),
        ("0.1", "0.1"), ("2.50", "2.5"),
    ],
)  # fmt: skip
def test_numbers_and_booleans_of_json_are_said_as_one_writes_them(tmp_path: Path, value: str, said: str) -> None:
    (row,) = load_rows(jsonl(tmp_path, f'{{"problem": "p", "answer": {value}}}'), tmp_path)
    whole = {"1e22": "1" + 22 * "0", "1e300": "1" + 300 * "0", "123456789012345678901234567890": value}
    assert row["answer"] == whole.get(value, said)


def test_numbers_of_parquet_are_said_as_one_writes_them(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    answers = {
        "decimal": [Decimal("3.50"), Decimal("72.00"), Decimal("-0.25")],
        "double": [1e22, 18.0, 0.1],
        "float": pyarrow.array([0.5, 2.0, -3.0], pyarrow.float32()),
        "whole": [1, -2, 2**62],
        "flag": [True, False, True],
    }
    table = pyarrow.table({"problem": ["a", "b", "c"], **answers})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    said = {
        name: [
            row["answer"] for row in load_rows(of(DatasetSpec(source="file", path="a.parquet"), answer=name), tmp_path)
        ]
        for name in answers
    }
    assert said == {
        "decimal": ["3.50", "72", "-0.25"],  # digits that were given say how exact it is
        "double": ["1" + 22 * "0", "18", "0.1"],
        "float": ["0.5", "2", "-3"],
        "whole": ["1", "-2", str(2**62)],
        "flag": ["true", "false", "true"],
    }


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("NaN", "the answer is nan, which is no number"),
        ("-Infinity", "the answer is -inf, which is no number"),
        ("null", "the answer is null"),
        ('""', "the answer is empty"),
        ("[]", "the answer is a list, not text or a number"),
        ('["4"]', r"the answer is a list, .*such as columns.answer: answer.0"),
        ('{"value": "4"}', r"the answer is an object, .*such as columns.answer: answer.value"),
        ("1" + 2000 * "0", "the answer is an integer of more than 4096 bits"),
    ],
)
def test_what_is_no_answer_is_a_bad_row_with_its_line(tmp_path: Path, answer: str, why: str) -> None:
    with pytest.raises(DataError, match=rf"1 of 2 rows cannot be used: line 2: {why}"):
        load_rows(jsonl(tmp_path, {"problem": "p", "answer": "1"}, f'{{"problem": "p", "answer": {answer}}}'), tmp_path)


# ── bad rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_bad_rows_that_are_skipped_are_counted_by_reason(tmp_path: Path) -> None:
    good = {"problem": "p", "answer": "1"}
    bad = [
        {"problem": "p"},
        {"question": "p"},
        "{",
        {"problem": "", "answer": "1"},
        {"problem": "p", "answer": r"\frac{1}{"},
    ]
    dataset = jsonl(tmp_path, good, *bad, good).model_copy(update={"on_bad_row": "skip"})
    prepared = prepare(dataset, tmp_path)
    assert [row["id"] for row in prepared.rows] == [0, 6]
    assert sum(prepared.bad.values()) == 5
    assert prepared.bad["no column `answer` or `solution`"] == 2
    assert prepared.bad["the problem is empty"] == 1


def test_a_set_of_which_no_row_is_left_is_refused_also_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, {"problem": "p"}, {"problem": ""}).model_copy(update={"on_bad_row": "skip"})
    with pytest.raises(DataError, match="2 of 2 rows cannot be used: line 1: no column `answer`"):
        load_rows(dataset, tmp_path)


# ── conversations ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_conversation_is_read_as_trl_writes_it(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}]
    padded = [{"role": "user", "content": "3+3? Box it.", "tool_calls": None}]
    rows = [{"prompt": turns, "answer": 2}, {"prompt": parts, "answer": 4}, {"prompt": padded, "answer": 6}]
    loaded = load_rows(of(jsonl(tmp_path, *rows), strip_suffix=" Box it."), tmp_path)
    assert [row["prompt"] for row in loaded] == [
        turns,
        [{"role": "user", "content": "2+2?"}],
        [{"role": "user", "content": "3+3?"}],
    ]


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ([], "the problem is an empty list"),
        (["1+1?"], "message 1 of the problem is text; every message has a role and a content"),
        ([{"content": "1+1?"}], "message 1 of the problem is an object; every message has a role and a content"),
        ([{"role": "user", "content": 3}], "the content of message 1 of the problem is a number, not text"),
        ([{"role": "user", "content": " "}], "message 1 of the problem is empty"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"has parts other than text \(image\)"),
        (3, "the problem is a number, not text or a list of messages"),
    ],
)
def test_a_conversation_with_a_turn_that_is_none_is_a_bad_row(tmp_path: Path, prompt: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        load_rows(jsonl(tmp_path, {"prompt": prompt, "answer": "2"}), tmp_path)


def test_a_conversation_has_no_turns_in_the_raw_template(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, {"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"})
    with pytest.raises(DataError, match="the prompt is a conversation, for which promptTemplate: raw has no turns"):
        prepare(dataset, tmp_path)


# ── mixes ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_rows_of_a_mix_name_their_set(tmp_path: Path) -> None:
    jsonl(tmp_path, {"problem": "12+34=", "answer": "46"}, {"problem": "1+1=", "answer": 2}, name="a.jsonl")
    jsonl(tmp_path, {"question": "2+2=", "answer": "4"}, {"question": "2+2="}, name="b.jsonl")
    mix = [
        {"label": "first", "weight": 3.0, "source": "file", "path": "a.jsonl"},
        {"label": "second", "source": "file", "path": "b.jsonl", "onBadRow": "skip"},
    ]
    train = TrainDatasetSpec.model_validate({"source": "mix", "mix": mix})
    around = OneTokenACharacter(), Template.named("raw"), 5
    prepared = prepare_training(train, tmp_path, *around, need_gold_parse=True)
    assert [(row["id"], row["set"], row["prompt"]) for row in prepared.rows] == [
        ("first/1", "first", "1+1="),
        ("second/0", "second", "2+2="),
    ]
    assert prepared.skipped == 1
    assert prepared.bad == {"second: no column `answer` or `solution`": 1}
    assert train.weights == {"first": 3.0, "second": 1.0}
