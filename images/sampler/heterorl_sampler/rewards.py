r"""Rewards: plain functions from the completions of one prompt to one number each, in one dict.

A new reward is one function `(group, params) -> list[float]`, one line in `REWARDS`, one name in `heterorl.spec.run`.
`accuracy` and `task` have none: what they say is known once answers are compared (`heterorl_sampler.scoring`).
L is a completion's length in tokens, M the reward's `maxLength`, and "correct" is what `accuracy` says.
`docs/rewards.md` has the table. All of this runs in the workers of `scoring`, which call `values`.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heterorl.data.answers import extract_boxed
from heterorl.spec.run import RewardSpec

Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """What a reward sees: G completions of one prompt, with the row they answer."""

    texts: list[str]
    """What the model wrote, without the tokens that end or pad it."""
    turns: list[str]
    """Its whole turns: the same after what the chat template had opened for it, such as `<think>`."""
    lengths: list[int]
    """Tokens of each completion, its end token included."""
    row: Row
    """`id`, `prompt`, `answer` and the original `columns`."""
    token_ids: list[list[int]] = field(default_factory=list)
    """Of each completion; for custom rewards only."""
    correct: list[bool] = field(default_factory=list)
    """Whether each completion's answer equals the reference; for `COMPARING` only."""
    marks: list[float | None] = field(default_factory=list)
    """What the verifier of the row's task gives each completion, None where it has none; for `task` only."""


RewardFunction = Callable[[Group, RewardSpec], Sequence[float | None]]


# ── of the form ──────────────────────────────────────────────────────────────────────────────────────────────────────
def boxed(group: Group, params: RewardSpec) -> list[float]:
    r"""1 where the completion holds a `\boxed{...}` that is not empty, otherwise 0."""
    return [float(bool(extract_boxed(text))) for text in group.texts]


def format_(group: Group, params: RewardSpec) -> list[float]:
    """1 for `<think>...</think>` and then an answer: each tag once, nothing before, something after; otherwise 0."""

    def well_formed(text: str) -> bool:
        thought, closing, answer = text.strip().partition("</think>")
        once = thought.count("<think>") == 1 and "think>" not in answer
        return bool(closing) and thought.startswith("<think>") and once and bool(answer.strip())

    return [float(well_formed(turn)) for turn in group.turns]


def tag_count(group: Group, params: RewardSpec) -> list[float]:
    """1/2 for exactly one `<think>`, 1/2 for exactly one `</think>`: a step on the way to `format`."""
    return [0.5 * (turn.count("<think>") == 1) + 0.5 * (turn.count("</think>") == 1) for turn in group.turns]


_STEP = re.compile(
    r"^[ \t]*(?:step\s+\d+|\d+[.)]\s|[-*•]\s)|\b(?:first|second|third|next|then|finally)(?:ly)?,",
    re.IGNORECASE | re.MULTILINE,
)


def reasoning_steps(group: Group, params: RewardSpec) -> list[float]:
    """min(1, steps / 3): lines that begin with "Step 2", "2." or a bullet, and words such as "First," or "Finally,"."""
    return [min(1.0, len(_STEP.findall(text)) / 3) for text in group.texts]


# ── of the length ────────────────────────────────────────────────────────────────────────────────────────────────────
def length(group: Group, params: RewardSpec) -> list[float]:
    """With d = 1/2 - min(L, M)/M: d where correct, min(0, d) where wrong, so that only short and right is praised.

    Kimi k1.5 (arXiv 2501.12599) with the bounds 0 and M in place of the group's shortest and longest.
    """

    def value(num_tokens: int, correct: bool) -> float:
        d = 0.5 - min(num_tokens, params.max_length) / params.max_length
        return d if correct else min(0.0, d)

    return [value(n, correct) for n, correct in zip(group.lengths, group.correct)]


def cosine(group: Group, params: RewardSpec) -> list[float]:
    """A half cosine of L, ending at M: correct from 1 down to 0.5, wrong from -1 up to -0.5 (arXiv 2502.03373).

    Short is better when right; when wrong, thinking longer is. The end values are those in common use, not the paper's.
    """

    def value(num_tokens: int, correct: bool) -> float:
        start, end = (1.0, 0.5) if correct else (-1.0, -0.5)
        progress = min(num_tokens, params.max_length) / params.max_length
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    return [value(n, correct) for n, correct in zip(group.lengths, group.correct)]


# ── of the text ──────────────────────────────────────────────────────────────────────────────────────────────────────
def repetition(group: Group, params: RewardSpec) -> list[float]:
    """Penalty `maxPenalty` x (1 - distinct / all n-grams of words); 0 below n words (arXiv 2502.03373)."""

    def value(text: str) -> float:
        words = text.lower().split()
        ngrams = list(zip(*(words[start:] for start in range(params.ngram_size))))
        return params.max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0

    return [value(text) for text in group.texts]


_NO_LANGUAGE = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+|</?think>", re.DOTALL)
_LETTERS = {"en": re.compile("[A-Za-zÀ-ɏ]"), "zh": re.compile("[㐀-䶿一-鿿]")}


def language(group: Group, params: RewardSpec) -> list[float]:
    """Share of the letters outside formulas that are of the language's script; 1 for a text without letters.

    DeepSeek-R1's language consistency (arXiv 2501.12948), counted in letters, which needs no word breaker.
    """

    def value(text: str) -> float:
        prose = _NO_LANGUAGE.sub(" ", text)
        letters = sum(character.isalpha() for character in prose)
        return len(_LETTERS[params.language].findall(prose)) / letters if letters else 1.0

    return [value(text) for text in group.texts]


REWARDS: dict[str, RewardFunction] = {
    "format": format_,
    "tag_count": tag_count,
    "length": length,
    "cosine": cosine,
    "repetition": repetition,
    "language": language,
    "reasoning_steps": reasoning_steps,
    "boxed": boxed,
}
COMPARING = ("accuracy", "length", "cosine")
"""Rewards that want to know which answers are right."""


# ── the user's ───────────────────────────────────────────────────────────────────────────────────────────────────────
def custom(groups: Sequence[Group], path: str) -> Sequence[Any]:
    """What the function at `path` returns for `(prompts=, completions=, completion_ids=, **columns)`, as TRL calls it.

    Every argument is a list with one item a completion, group after group. `completions` are texts, or, where the
    prompt is a conversation, lists of one message. `answer` is the reference and `turns` are the model's whole turns;
    the rest are the rows' own columns. A function without `**columns` gets those that it names. It may be async.
    """
    function, arguments = _imported(path), _arguments(groups)
    with suppress(ValueError):  # no signature: some that are written in C
        signature = inspect.signature(function)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
            arguments = {name: arguments[name] for name in signature.parameters if name in arguments}
        try:
            signature.bind(**arguments)
        except TypeError as error:
            known = ", ".join(_arguments(groups))
            raise TypeError(f"{error}; a custom reward is called with {known}, all by name") from None
    found = function(**arguments)
    return list(_loop().run_until_complete(found) if inspect.isawaitable(found) else found)


def _arguments(groups: Sequence[Group]) -> dict[str, list[Any]]:
    columns = dict.fromkeys(name for group in groups for name in group.row["columns"])
    each = [(group, i) for group in groups for i in range(len(group.texts))]
    return {
        **{name: [group.row["columns"].get(name) for group, _ in each] for name in columns},
        "answer": [group.row["answer"] for group, _ in each],
        "turns": [group.turns[i] for group, i in each],
        "prompts": [group.row["prompt"] for group, _ in each],
        "completions": [_completion(group, i) for group, i in each],
        "completion_ids": [group.token_ids[i] for group, i in each],
    }


def _completion(group: Group, i: int) -> str | list[dict[str, str]]:
    is_conversation = isinstance(group.row["prompt"], list)
    return [{"role": "assistant", "content": group.texts[i]}] if is_conversation else group.texts[i]


@functools.cache
def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{path} is a {type(function).__name__}, not a function")
    return function


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for all calls, because clients and their connections belong to the loop that they were made in."""
    return asyncio.new_event_loop()


# ── what workers call ────────────────────────────────────────────────────────────────────────────────────────────────
def load(reward: dict[str, Any]) -> str:
    """Import the function of a custom reward; the SHA-256 of the source files that hold it."""
    path = RewardSpec.model_validate(reward).path or ""
    function = inspect.unwrap(_imported(path))
    files = set()
    for holder in (importlib.import_module(path.rpartition(".")[0]), function, type(function)):
        with suppress(TypeError):  # written in C
            files.add(inspect.getsourcefile(holder))
    sources = [Path(file).read_bytes() for file in sorted(filter(None, files)) if Path(file).is_file()]
    return hashlib.sha256(b"".join(sources)).hexdigest()


def values(reward: dict[str, Any], groups: list[dict[str, Any]]) -> list[float | None]:
    """The reward's values, one a completion, group after group; None where it does not apply (custom rewards only).

    Raises what the function raises, and TypeError or ValueError unless it gives one finite number or None for each.
    """
    params, found = RewardSpec.model_validate(reward), [Group(**group) for group in groups]
    if params.path:
        each: Sequence[Any] = custom(found, params.path)
    else:
        each = [value for group in found for value in REWARDS[params.name](group, params)]
    wanted = sum(len(group.texts) for group in found)
    if len(each) != wanted:
        raise ValueError(f"{len(each)} values for {wanted} completions; return one for each")
    return [_number(value) for value in each]


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | bytes) or not math.isfinite(number := float(value)):
        raise ValueError(
            f"found {value!r}; every value must be a finite number, or None where the reward does not apply"
        )
    return number
