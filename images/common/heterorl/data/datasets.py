r"""Datasets: from a file, the Hub or built-in arithmetic to rows that are all checked before the first step.

A row is `{"id", "prompt", "answer", "columns"}`: its position in the source counted from 0, the text of the problem,
the reference answer, and the original row. `prepare_rows` adds `"prompt_ids"`. Every problem with a dataset is a
`DataError` that names the source, the number of affected rows, and the first few of them by line.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterorl.data import reasoning_gym
from heterorl.data.answers import AnswerChecker, extract_boxed
from heterorl.data.prompts import Template, render
from heterorl.errors import DataError
from heterorl.spec.run import ArithmeticSpec, ColumnsSpec, DatasetSpec

Row = dict[str, Any]

PROMPT_ALIASES = {"problem": "question"}
ANSWER_ALIASES = {"answer": "solution"}
MAX_ROWS_NAMED = 5


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for generation, and how many were left out because their prompt is too long."""

    rows: list[Row]
    skipped: int


class _BadRow(Exception):
    """One row cannot be used; the message says why."""


def load_rows(dataset: DatasetSpec, base: Path, *, seed: int = 0) -> list[Row]:
    """Every row of a dataset, checked and with its columns mapped, without `prompt_ids`.

    Relative paths start at `base`, the manifest's folder; `seed`, the run's, is added to built-in arithmetic's.
    """
    if dataset.source == "reasoningGym":
        return reasoning_gym.draw(dataset.reasoning_gym, limit=dataset.limit, seed=seed)
    source, originals = source_name(dataset), _open(dataset, base, seed)
    pattern = _compiled(dataset.columns.answer_pattern)
    rows: list[Row] = []
    problems: list[tuple[int, str]] = []
    for place, original in itertools.islice(originals, dataset.limit):
        try:
            rows.append(_mapped(place, original, dataset.columns, pattern))
        except _BadRow as why:
            problems.append((place, str(why)))
    _refuse(dataset, problems, len(rows) + len(problems))
    if not rows:
        raise DataError(f"{source}: the dataset is empty; use one with at least one row")
    return rows


def prepare_rows(
    dataset: DatasetSpec,
    base: Path,
    tokenizer: Any,
    template: Template,
    max_prompt_tokens: int,
    *,
    need_gold_parse: bool,
    seed: int = 0,
) -> PreparedData:
    """Rows with their prompts as token ids; with `need_gold_parse` every answer must be one math-verify can read.

    Prompts of more than `max_prompt_tokens` tokens are counted and left out. Raises `DataError` when a row is unusable
    or none is left, `ModelError` when the tokenizer cannot render the template.
    """
    rows = load_rows(dataset, base, seed=seed)
    if need_gold_parse:
        _check_answers(dataset, rows)
    for row in rows:
        row["prompt_ids"] = render(template, tokenizer, row["prompt"])
    kept = [row for row in rows if len(row["prompt_ids"]) <= max_prompt_tokens]
    if not kept:
        shortest = min(len(row["prompt_ids"]) for row in rows)
        raise DataError(
            f"{source_name(dataset)}: every prompt is longer than generation.maxPromptTokens {max_prompt_tokens};"
            f" the shortest has {shortest} tokens, so set it to at least that"
        )
    return PreparedData(kept, skipped=len(rows) - len(kept))


def source_name(dataset: DatasetSpec) -> str:
    """The name of a dataset in messages: its path, its name on the Hub, or its source."""
    return {"file": dataset.path, "hub": dataset.name}.get(dataset.source) or dataset.source


# ── sources: each yields (place, row) ────────────────────────────────────────────────────────────────────────────────
def _open(dataset: DatasetSpec, base: Path, seed: int) -> Iterator[tuple[int, Any]]:
    source = source_name(dataset)
    if dataset.source == "arithmetic":
        return enumerate(_arithmetic(dataset.arithmetic, seed))
    if dataset.source == "hub":
        return enumerate(_from_hub(dataset))
    path = base / Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"{source}: no such file (looked for {path}); relative paths start at the manifest's folder")
    if path.suffix == ".jsonl":
        return _from_jsonl(source, path)
    if path.suffix == ".parquet":
        return enumerate(_from_parquet(source, path))
    raise DataError(f"{source}: a data file ends in .jsonl or .parquet, this one in {path.suffix or 'nothing'}")


def _from_jsonl(source: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Lines as they are read, without blank ones; one that is not JSON is yielded as text, for `_mapped` to reject."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for place, line in enumerate(lines):
                if line.strip():
                    try:
                        yield place, json.loads(line)
                    except json.JSONDecodeError:
                        yield place, line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: not UTF-8 text ({error.reason}); save it as UTF-8, one JSON object per line"
        ) from error


def _from_parquet(source: str, path: Path) -> list[Any]:
    import pyarrow.parquet

    try:
        rows: list[Any] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source}: not a readable Parquet file ({_first_line(error)})") from error
    return rows


def _from_hub(dataset: DatasetSpec) -> list[Any]:
    import datasets

    try:
        loaded = datasets.load_dataset(dataset.name, dataset.config, split=dataset.split, revision=dataset.revision)
        rows: list[Any] = loaded.to_list()
    except Exception as error:  # whatever the network, the cache or the builder raises, the way out is the same
        raise DataError(
            f"{dataset.name}: the dataset could not be loaded from the Hub ({_first_line(error)}); check name, config,"
            " split and the network, or download it and set source: file"
        ) from error
    return rows


def _arithmetic(task: ArithmeticSpec, seed: int) -> Iterator[Row]:
    """Sums of two operands of exactly `digits` digits, each problem once while there are enough of them."""
    low, high = (0 if task.digits == 1 else 10 ** (task.digits - 1)), 10**task.digits
    draw = random.Random(task.seed + seed)
    span = high - low
    if task.rows <= span * span:
        problems = draw.sample(range(span * span), task.rows)
    else:
        problems = draw.choices(range(span * span), k=task.rows)
    for problem in problems:
        a, b = low + problem // span, low + problem % span
        yield {"problem": f"{a}+{b}=", "answer": str(a + b)}


# ── one row ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _mapped(place: int, original: Any, columns: ColumnsSpec, pattern: re.Pattern[str] | None) -> Row:
    """The row in our form, or `_BadRow`."""
    if not isinstance(original, dict):
        raise _BadRow("not a JSON object")
    problem = _column(original, columns.prompt, PROMPT_ALIASES)
    if not isinstance(problem, str):
        raise _BadRow(f"the problem is a {type(problem).__name__}, not text")
    if columns.strip_suffix:
        problem = problem.rstrip().removesuffix(columns.strip_suffix.rstrip())
    if not problem.strip():
        raise _BadRow("the problem is empty")
    if not problem.isascii() and any("\ud800" <= character <= "\udfff" for character in problem):
        raise _BadRow("the problem contains half of a surrogate pair, which is not valid text")
    answer = _answer(_column(original, columns.answer, ANSWER_ALIASES), pattern)
    # Parquet and the Hub may hold dates, bytes, decimals: columns travel as JSON, so such values travel as text.
    columns_as_json = json.loads(json.dumps(original, default=str))
    return {"id": place, "prompt": problem, "answer": answer, "columns": columns_as_json}


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise DataError(f"columns.answerPattern {pattern!r} is not a valid regular expression: {error}") from error


def _column(original: Row, name: str, aliases: dict[str, str]) -> Any:
    for key in (name, aliases.get(name)):
        if key is not None and original.get(key) is not None:
            return original[key]
    raise _BadRow(f"no {name} (columns: {', '.join(map(str, original)) or 'none'})")


def _answer(value: Any, pattern: re.Pattern[str] | None) -> str:
    """The reference answer in a column: the pattern's first group, else the column's last box, else all of it."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _BadRow(f"the answer is a {type(value).__name__}, not text or a number")
    text = str(value)
    if pattern is not None:
        found = pattern.search(text)
        if found is None:
            raise _BadRow(f"answerPattern {pattern.pattern!r} is not found in the answer")
        answer = (found.group(1) if pattern.groups else found.group()) or ""
    else:
        answer = extract_boxed(text) or text
    if not answer.strip():
        raise _BadRow("the answer is empty")
    return answer.strip()


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _check_answers(dataset: DatasetSpec, rows: list[Row]) -> None:
    with AnswerChecker(time_limit_s=20) as checker:  # generous: a busy machine must not turn a good row into a bad one
        problems = [
            (row["id"], f"the answer {_shortened(row['answer'])!r} cannot be parsed by math-verify")
            for row in rows
            if not checker.parses(row["answer"])
        ]
    _refuse(dataset, problems, len(rows))


def _refuse(dataset: DatasetSpec, problems: list[tuple[int, str]], num_rows: int) -> None:
    """Raise with all problems counted and the first few named."""
    if problems:
        source = source_name(dataset)
        unit = "line" if source.endswith(".jsonl") else "row"
        named = "; ".join(f"{unit} {place + 1}: {why}" for place, why in problems[:MAX_ROWS_NAMED])
        more = f"; and {len(problems) - MAX_ROWS_NAMED} more" if len(problems) > MAX_ROWS_NAMED else ""
        raise DataError(
            f"{source}: {len(problems)} of {num_rows} rows cannot be used: {named}{more};"
            " correct or remove them, or name the columns under data.*.columns"
        )


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
