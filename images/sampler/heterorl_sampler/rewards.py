r"""Rewards: plain functions from the completions of one prompt to one number each, in one dict.

A new reward is one function `(group, params) -> list[float]`, one line in `REWARDS`, one name in `heterorl.spec.run`.
L is a completion's length in tokens, M the reward's `maxLength`, and "correct" is what `accuracy` says.
`docs/rewards.md` has the table.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from heterorl.data.answers import AnswerChecker, extract_boxed
from heterorl.errors import UserError
from heterorl.spec.run import RewardSpec, RunSpec

Row = dict[str, Any]
Floats = npt.NDArray[np.float32]


@dataclass
class CompletionGroup:
    """What a reward sees: G completions of one prompt, with the row they answer."""

    texts: list[str]
    lengths: list[int]
    """Tokens of each completion, its end token included."""
    truncated: list[bool]
    """Whether the length limit cut it."""
    row: Row
    """`prompt`, `answer` and the original `columns`."""
    checker: AnswerChecker

    @cached_property
    def correct(self) -> list[bool]:
        """Whether each completion's answer equals the reference; computed once for all rewards that ask."""
        return [self.checker.check(self.row["answer"], text) for text in self.texts]


class RewardFailed(UserError):
    """A custom reward did not give one finite number for each completion of a group."""


RewardFunction = Callable[[CompletionGroup, RewardSpec], list[float]]


# ── of the answer ────────────────────────────────────────────────────────────────────────────────────────────────────
def accuracy(group: CompletionGroup, params: RewardSpec) -> list[float]:
    """1 where the answer equals the reference, otherwise 0."""
    return [float(correct) for correct in group.correct]


def boxed(group: CompletionGroup, params: RewardSpec) -> list[float]:
    r"""1 where the completion holds a `\boxed{...}` that is not empty, otherwise 0."""
    return [float(bool(extract_boxed(text))) for text in group.texts]


# ── of the form ──────────────────────────────────────────────────────────────────────────────────────────────────────
def format_(group: CompletionGroup, params: RewardSpec) -> list[float]:
    """1 for `<think>...</think>` and then an answer: each tag once, nothing before, something after; otherwise 0."""

    def well_formed(text: str) -> bool:
        thought, closing, answer = text.strip().partition("</think>")
        once = thought.count("<think>") == 1 and "think>" not in answer
        return bool(closing) and thought.startswith("<think>") and once and bool(answer.strip())

    return [float(well_formed(text)) for text in group.texts]


def tag_count(group: CompletionGroup, params: RewardSpec) -> list[float]:
    """1/2 for exactly one `<think>`, 1/2 for exactly one `</think>`: a step on the way to `format`."""
    return [0.5 * (text.count("<think>") == 1) + 0.5 * (text.count("</think>") == 1) for text in group.texts]


_STEP = re.compile(
    r"^[ \t]*(?:step\s+\d+|\d+[.)]\s|[-*•]\s)|\b(?:first|second|third|next|then|finally)(?:ly)?,",
    re.IGNORECASE | re.MULTILINE,
)


def reasoning_steps(group: CompletionGroup, params: RewardSpec) -> list[float]:
    """min(1, steps / 3): lines that begin with "Step 2", "2." or a bullet, and words such as "First," or "Finally,"."""
    return [min(1.0, len(_STEP.findall(text)) / 3) for text in group.texts]


# ── of the length ────────────────────────────────────────────────────────────────────────────────────────────────────
def length(group: CompletionGroup, params: RewardSpec) -> list[float]:
    """With d = 1/2 - min(L, M)/M: d where correct, min(0, d) where wrong, so that only short and right is praised.

    Kimi k1.5 (arXiv 2501.12599) with the bounds 0 and M in place of the group's shortest and longest.
    """

    def value(num_tokens: int, correct: bool) -> float:
        d = 0.5 - min(num_tokens, params.max_length) / params.max_length
        return d if correct else min(0.0, d)

    return [value(n, correct) for n, correct in zip(group.lengths, group.correct)]


def cosine(group: CompletionGroup, params: RewardSpec) -> list[float]:
    """A half cosine of L, ending at M: correct from 1 down to 0.5, wrong from -1 up to -0.5 (arXiv 2502.03373).

    Short is better when right; when wrong, thinking longer is. The end values are those in common use, not the paper's.
    """

    def value(num_tokens: int, correct: bool) -> float:
        start, end = (1.0, 0.5) if correct else (-1.0, -0.5)
        progress = min(num_tokens, params.max_length) / params.max_length
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    return [value(n, correct) for n, correct in zip(group.lengths, group.correct)]


# ── of the text ──────────────────────────────────────────────────────────────────────────────────────────────────────
def repetition(group: CompletionGroup, params: RewardSpec) -> list[float]:
    """Penalty `maxPenalty` x (1 - distinct / all n-grams of words); 0 below n words (arXiv 2502.03373)."""

    def value(text: str) -> float:
        words = text.lower().split()
        ngrams = list(zip(*(words[start:] for start in range(params.ngram_size))))
        return params.max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0

    return [value(text) for text in group.texts]


_NO_LANGUAGE = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+|</?think>", re.DOTALL)
_LETTERS = {"en": re.compile("[A-Za-zÀ-ɏ]"), "zh": re.compile("[㐀-䶿一-鿿]")}


def language(group: CompletionGroup, params: RewardSpec) -> list[float]:
    """Share of the letters outside formulas that are of the language's script; 1 for a text without letters.

    DeepSeek-R1's language consistency (arXiv 2501.12948), counted in letters, which needs no word breaker.
    """

    def value(text: str) -> float:
        prose = _NO_LANGUAGE.sub(" ", text)
        letters = sum(character.isalpha() for character in prose)
        return len(_LETTERS[params.language].findall(prose)) / letters if letters else 1.0

    return [value(text) for text in group.texts]


# ── the user's ───────────────────────────────────────────────────────────────────────────────────────────────────────
def custom(group: CompletionGroup, params: RewardSpec) -> list[float]:
    """What the function at `path` returns for `(prompts=, completions=, **columns)`, every one a list of G.

    `answer` is the reference answer; the other columns are the row's own. Raises `RewardFailed` when it fails.
    """
    columns = {**group.row["columns"], "prompts": group.row["prompt"], "answer": group.row["answer"]}
    repeated = {name: [value] * len(group.texts) for name, value in columns.items()}
    try:
        return list(_imported(params.path)(**{**repeated, "completions": group.texts}))
    except Exception as error:
        raise RewardFailed(
            f"custom reward {params.path} failed on row {group.row['id']}: {type(error).__name__}: {error};"
            " it is called with prompts, completions and every column of the row as lists, so accept **columns"
        ) from error


@functools.cache
def _imported(path: str | None) -> Callable[..., Any]:
    """The function at a dotted path, or `UserError`."""
    module, _, name = (path or "").rpartition(".")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"custom reward {path} cannot be imported ({error}); write path: package.module.function,"
            " and start the run where that package can be imported (PYTHONPATH)"
        ) from error
    if not callable(function):
        raise UserError(f"custom reward {path} is a {type(function).__name__}, not a function")
    return function


REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy,
    "format": format_,
    "tag_count": tag_count,
    "length": length,
    "cosine": cosine,
    "repetition": repetition,
    "language": language,
    "reasoning_steps": reasoning_steps,
    "boxed": boxed,
    "custom": custom,
}


class Rewards:
    """The run's rewards, ready to score groups; close it, or use it as a context manager."""

    def __init__(self, rewards: list[RewardSpec], *, boxed_only: bool) -> None:
        for params in rewards:
            if params.name == "custom":
                _imported(params.path)
        self._rewards = dict(zip(_term_names(rewards), rewards))
        limits = [params.time_limit_seconds for params in rewards if params.name == "accuracy"]
        self._checker = AnswerChecker(max(limits, default=2.0), boxed_only=boxed_only)

    def score(
        self, texts: list[str], lengths: Iterable[int], truncated: Iterable[bool], row: Row
    ) -> tuple[Floats, dict[str, Floats]]:
        """The weighted sum [G] and each reward's own, unweighted values [G] by name, for one prompt's completions.

        `lengths` are in tokens. Raises `RewardFailed` unless a custom reward gives one finite number a completion.
        """
        group = CompletionGroup(texts, list(lengths), list(truncated), row, self._checker)
        terms = {
            name: _checked(name, REWARDS[params.name](group, params), len(texts), row)
            for name, params in self._rewards.items()
        }
        total = np.zeros(len(texts), np.float32)
        for name, params in self._rewards.items():
            total += np.float32(params.weight) * terms[name]
        return total, terms

    def close(self) -> None:
        """End the process that compares answers."""
        self._checker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_rewards(spec: RunSpec) -> Rewards:
    """The rewards of a run; a completion without a box answers only under the template `raw`."""
    return Rewards(spec.rewards, boxed_only=spec.data.prompt_template != "raw")


def _term_names(rewards: list[RewardSpec]) -> list[str]:
    """One name a reward: its own, for a custom one its function's; a second one of that name gets `_2`."""
    names: list[str] = []
    for params in rewards:
        name = params.path.rpartition(".")[2] if params.path else params.name
        names.append(next(n for n in (name, *(f"{name}_{i}" for i in range(2, 99))) if n not in names))
    return names


def _checked(name: str, values: list[float], num_completions: int, row: Row) -> Floats:
    """The values as float32 [G], or `RewardFailed`."""
    where = f"reward {name}, row {row['id']}"
    if len(values) != num_completions:
        raise RewardFailed(f"{where}: {len(values)} values for {num_completions} completions; return one for each")
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        array = np.full(num_completions, np.nan, np.float32)
    if array.shape != (num_completions,) or not np.isfinite(array).all():
        raise RewardFailed(f"{where}: found {values}; every value must be a finite number")
    return array
