r"""Datasets: from files, the Hub or built-in arithmetic to rows that are all checked before the first step.

A row is `{"id", "prompt", "answer", "columns"}`: its position in the source counted from 0, the text of the problem or
the turns of a conversation, the reference answer, and the original row. `prepare_rows` adds `"prompt_ids"`; where
several sets are mixed, `prepare_training` adds `"set"`, and ids read `label/position`. Rows of built-in sums and tasks
have `"require_value": true`: no computation is an answer to them. Every problem with a dataset is a `DataError` that
names the source, the number of affected rows, and the first few of them by line.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from heterorl.data import reasoning_gym
from heterorl.data.answers import AnswerChecker, extract_boxed
from heterorl.data.files import FileRow, Unreadable, first_line, read_files
from heterorl.data.prompts import Message, Prompt, Template, render, require_usable
from heterorl.errors import DataError, ModelError
from heterorl.spec.run import ArithmeticSpec, ColumnsSpec, DatasetSpec, TrainDatasetSpec

Row = dict[str, Any]

PROMPT_ALIASES = {"problem": ("question", "prompt")}
"""`prompt` is what TRL calls it."""
ANSWER_ALIASES = {"answer": ("solution",)}
MAX_ROWS_NAMED = 5


@dataclass(frozen=True)
class PreparedData:
    """Rows ready for generation, and what was left out."""

    rows: list[Row]
    skipped: int
    """Rows whose prompt is too long."""
    bad: dict[str, int] = field(default_factory=dict)
    """Rows that cannot be used, by reason (`onBadRow: skip`)."""


class _BadRow(Exception):
    """One row cannot be used; the message says why, `reason` says it without what is particular to the row."""

    def __init__(self, reason: str, particular: str = "") -> None:
        super().__init__(reason + particular)
        self.reason = reason


def load_rows(dataset: DatasetSpec, base: Path, *, seed: int = 0) -> list[Row]:
    """Every row of a dataset, checked and with its columns mapped, without `prompt_ids`.

    Relative paths start at `base`, the manifest's folder; `seed`, the run's, is added to built-in arithmetic's.
    """
    return _usable_rows(dataset, base, seed, lambda row: None)[0]


def prepare_training(
    train: TrainDatasetSpec,
    base: Path,
    tokenizer: Any,
    template: Template,
    max_prompt_tokens: int,
    *,
    need_gold_parse: bool,
    seed: int = 0,
) -> PreparedData:
    """As `prepare_rows`, of one set or of all sets of a mix, one after the other."""

    def prepared(dataset: DatasetSpec) -> PreparedData:
        return prepare_rows(
            dataset, base, tokenizer, template, max_prompt_tokens, need_gold_parse=need_gold_parse, seed=seed
        )

    if not train.mix:
        return prepared(train)
    sets = {dataset.label: prepared(dataset) for dataset in train.mix}
    return PreparedData(
        [{**row, "id": f"{label}/{row['id']}", "set": label} for label, data in sets.items() for row in data.rows],
        skipped=sum(data.skipped for data in sets.values()),
        bad={f"{label}: {reason}": count for label, data in sets.items() for reason, count in data.bad.items()},
    )


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
    """Rows with their prompts as token ids; with `need_gold_parse` every answer must be one that can be compared.

    Prompts of more than `max_prompt_tokens` tokens are counted and left out. Raises `DataError` when a row is unusable
    (or skipped, and none is left), `ModelError` when the tokenizer cannot render the template.
    """
    require_usable(template, tokenizer)
    # Generous: a busy machine must not turn a good row into a bad one.
    with AnswerChecker(time_limit_s=20) if need_gold_parse else nullcontext() as checker:

        def finish(row: Row) -> None:
            if checker and (why := checker.why_no_reference(row["answer"])):
                raise _BadRow(f"the answer {why}", f": {_shortened(row['answer'])!r}")
            try:
                row["prompt_ids"] = render(template, tokenizer, row["prompt"])
            except ModelError as error:
                raise _BadRow(str(error)) from error

        rows, bad = _usable_rows(dataset, base, seed, finish)
    kept = [row for row in rows if len(row["prompt_ids"]) <= max_prompt_tokens]
    if not kept:
        shortest = min(len(row["prompt_ids"]) for row in rows)
        raise DataError(
            f"{source_name(dataset)}: every prompt is longer than generation.maxPromptTokens {max_prompt_tokens};"
            f" the shortest has {shortest} tokens, so set it to at least that"
        )
    return PreparedData(kept, skipped=len(rows) - len(kept), bad=bad)


def source_name(dataset: DatasetSpec) -> str:
    """The name of a dataset in messages: its paths, its name on the Hub, or its source."""
    return {"file": ", ".join(_paths(dataset)), "hub": dataset.name}.get(dataset.source) or dataset.source


def _usable_rows(
    dataset: DatasetSpec, base: Path, seed: int, finish: Callable[[Row], None]
) -> tuple[list[Row], dict[str, int]]:
    """Mapped and finished rows, and the bad ones counted by reason, which `finish` may find as well.

    `DataError` when a bad row is to be refused, or when no row is left.
    """
    pattern = re.compile(dataset.columns.answer_pattern) if dataset.columns.answer_pattern else None
    ready = dataset.source == "reasoningGym"  # its rows are made in our form
    rows: list[Row] = []
    bad: list[tuple[str, _BadRow]] = []
    for found in itertools.islice(_open(dataset, base, seed), dataset.limit):
        try:
            row = found.content if ready else _mapped(found, dataset.columns, pattern)
            if dataset.source in ("arithmetic", "reasoningGym"):
                row["require_value"] = True
            finish(row)
            rows.append(row)
        except _BadRow as why:
            bad.append((found.where, why))
    if bad and (dataset.on_bad_row == "refuse" or not rows):
        raise DataError(_refusal(source_name(dataset), bad, len(rows) + len(bad)))
    if not rows:
        raise DataError(f"{source_name(dataset)}: the dataset is empty; use one with at least one row")
    return rows, dict(Counter(why.reason for _, why in bad).most_common())


# ── sources ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _open(dataset: DatasetSpec, base: Path, seed: int) -> Iterator[FileRow]:
    if dataset.source == "file":
        return read_files(_paths(dataset), base, dataset.split)
    if dataset.source == "hub":
        rows = _from_hub(dataset)
    elif dataset.source == "reasoningGym":
        rows = iter(reasoning_gym.draw(dataset.reasoning_gym, limit=dataset.limit, seed=seed))
    else:
        rows = _arithmetic(dataset.arithmetic, seed)
    return (FileRow(place, f"row {place + 1}", row) for place, row in enumerate(rows))


def _paths(dataset: DatasetSpec) -> list[str]:
    return dataset.paths or ([dataset.path] if dataset.path else [])


def _from_hub(dataset: DatasetSpec) -> Iterator[Any]:
    import datasets

    try:
        loaded = datasets.load_dataset(dataset.name, dataset.config, split=dataset.split, revision=dataset.revision)
    except Exception as error:  # whatever the network, the cache or the builder raises, the way out is the same
        raise DataError(
            f"{dataset.name}: the dataset could not be loaded from the Hub ({first_line(error)}); check name, config,"
            " split and the network, or download it and set source: file"
        ) from error
    return iter(loaded)


def _arithmetic(task: ArithmeticSpec, seed: int) -> Iterator[Row]:
    """Sums of two operands of as many digits, each problem once while there are enough of them."""
    draw = random.Random(task.seed + seed)
    sizes = range(task.min_digits or task.digits, task.digits + 1)
    made = [_sums(digits, len(range(place, task.rows, len(sizes))), draw) for place, digits in enumerate(sizes)]
    for row in range(task.rows):
        yield next(made[row % len(sizes)])


def _sums(digits: int, count: int, draw: random.Random) -> Iterator[Row]:
    low, high = (0 if digits == 1 else 10 ** (digits - 1)), 10**digits
    span = high - low
    if count <= span * span:
        problems = draw.sample(range(span * span), count)
    else:
        problems = draw.choices(range(span * span), k=count)
    for problem in problems:
        a, b = low + problem // span, low + problem % span
        yield {"problem": f"{a}+{b}=", "answer": str(a + b)}


# ── one row ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _mapped(found: FileRow, columns: ColumnsSpec, pattern: re.Pattern[str] | None) -> Row:
    """The row in our form, or `_BadRow`."""
    original = found.content
    if isinstance(original, Unreadable):
        raise _BadRow(original.why)
    if not isinstance(original, dict):
        raise _BadRow(f"not a JSON object but {_kind(original)}")
    prompt = _prompt(_column(original, columns.prompt, PROMPT_ALIASES, "problem"), columns.strip_suffix)
    answer = _answer(_column(original, columns.answer, ANSWER_ALIASES, "answer"), columns.answer, pattern)
    # Parquet and the Hub may hold dates, bytes, decimals: columns travel as JSON, so such values travel as text.
    columns_as_json = json.loads(json.dumps(original, default=str))
    return {"id": found.id, "prompt": prompt, "answer": answer, "columns": columns_as_json}


def _column(original: Row, name: str, aliases: Mapping[str, tuple[str, ...]], what: str) -> Any:
    """The value in a column, or in another usual one where a default is absent."""
    names = (name, *aliases.get(name, ()))
    for value in (value for key in names for value in value_at(original, key)):
        if value is None:
            raise _BadRow(f"the {what} is null")
        return value
    asked = " or ".join(f"`{key}`" for key in names[:2])
    raise _BadRow(f"no column {asked}", f"; found: {', '.join(column_names(original)) or 'none'}")


def value_at(value: Any, path: str) -> list[Any]:
    """What is at a dotted path through objects and lists (positions from 0), in a list; an empty one if nothing is."""
    if isinstance(value, dict) and path in value:
        return [value[path]]
    key, dot, rest = path.partition(".")
    if isinstance(value, dict) and key in value:
        inner = value[key]
    elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
        inner = value[int(key)]
    else:
        return []
    return value_at(inner, rest) if dot else [inner]


def column_names(original: Row) -> Iterator[str]:
    """The columns as `columns` would name them: those of an inner object by their dotted path."""
    for name, value in original.items():
        yield from (f"{name}.{key}" for key in value) if isinstance(value, dict) and value else (str(name),)


# ── prompt ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _prompt(value: Any, suffix: str | None) -> Prompt:
    """The text of a problem, or the turns of a conversation as TRL writes them."""
    if isinstance(value, str):
        return _text(value, suffix, "the problem")
    if not isinstance(value, list):
        raise _BadRow(f"the problem is {_kind(value)}, not text or a list of messages")
    if not value:
        raise _BadRow("the problem is an empty list")
    return [_message(turn, place, suffix) for place, turn in enumerate(value)]


def _message(turn: Any, place: int, suffix: str | None) -> Message:
    """One turn; its other fields (a tool call, a name) are for the chat template."""
    where = f"message {place + 1} of the problem"
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
        raise _BadRow(f"{where} is {_kind(turn)}; every message has a role and a content")
    content = turn["content"]
    if isinstance(content, list):  # in parts, as of models that see
        kinds = {part.get("type") if isinstance(part, dict) else _kind(part) for part in content}
        if kinds - {"text"}:
            raise _BadRow(f"{where} has parts other than text ({', '.join(sorted(map(str, kinds - {'text'})))})")
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise _BadRow(f"the content of {where} is {_kind(content)}, not text")
    others = {
        key: value for key, value in turn.items() if value is not None
    }  # Parquet fills fields of others with null
    return {**others, "content": _text(content, suffix if turn["role"] == "user" else None, where)}


def _text(text: str, suffix: str | None, what: str) -> str:
    if suffix:
        text = text.rstrip().removesuffix(suffix.rstrip())
    if not text.strip():
        raise _BadRow(f"{what} is empty")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise _BadRow(f"{what} contains half of a surrogate pair, which is not valid text")
    return text


# ── answer ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _answer(value: Any, column: str, pattern: re.Pattern[str] | None) -> str:
    """The reference answer in a column: the pattern's first group, else the column's last box, else all of it."""
    text = value if isinstance(value, str) else _said(value, column)
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


def _said(value: Any, column: str) -> str:
    """A value that is not text as one writes it by hand: 18.0 is 18, 1e22 has 23 digits, true is true."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 4096 else _refused_number("an integer of more than 4096 bits")
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            _refused_number(f"{value}, which is no number")
        exact = Decimal(repr(value)) if isinstance(value, float) else value
        if abs(exact.adjusted()) > 1000:
            _refused_number("a number of more than 1000 digits")
        return format(exact.to_integral_value() if exact == exact.to_integral_value() else exact, "f")
    inner = f"{column}.0" if isinstance(value, list) else f"{column}.{next(iter(value), 'KEY')}" if value else ""
    hint = f"; name one of its values, such as columns.answer: {inner}" if isinstance(value, list | dict) else ""
    raise _BadRow(f"the answer is {_kind(value)}, not text or a number", hint)


def _refused_number(what: str) -> str:
    raise _BadRow(f"the answer is {what}")


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _refusal(source: str, bad: list[tuple[str, _BadRow]], num_rows: int) -> str:
    """All bad rows counted and the first few named; once, where all rows are bad in the same way."""
    ways_out = "correct or remove them, name other columns under columns, or set onBadRow: skip to leave them out"
    if len(bad) == num_rows and len({str(why) for _, why in bad}) == 1:
        each = f"each of its {num_rows} rows" if num_rows > 1 else bad[0][0]
        return f"{source}: {bad[0][1]} ({each}); name other columns under columns, or correct the data"
    named = " | ".join(f"{where}: {why}" for where, why in bad[:MAX_ROWS_NAMED])
    more = f" | and {len(bad) - MAX_ROWS_NAMED} more" if len(bad) > MAX_ROWS_NAMED else ""
    return f"{source}: {len(bad)} of {num_rows} rows cannot be used: {named}{more}; {ways_out}"


def _kind(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", str: "text", dict: "an object", list: "a list", bytes: "bytes"}
    numbers = isinstance(value, int | float | Decimal)
    return kinds.get(type(value)) or ("a number" if numbers else f"a {type(value).__name__}")


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
