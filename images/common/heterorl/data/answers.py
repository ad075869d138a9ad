r"""Does a completion's answer equal the reference? Boxes are found here, mathematics is compared by `equality`.

Hostile LaTeX (`9^{9^{9^9}}`) can hold an interpreter inside C code, where no Python time limit reaches. So comparisons
run in a `heterorl.worker`.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from typing import Self

from heterorl.data.equality.words import why_no_answer
from heterorl.errors import UserError
from heterorl.worker import CallFailed, Worker

MAX_ANSWER_CHARS = 1000
"""A longer answer is wrong without being parsed, unless it is an integer: the longest in MATH-500 has 53 characters."""
CACHED_VERDICTS = 65_536

_BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|\{|\}", re.DOTALL)
_INTEGER = re.compile(r"\$?([+-]?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)\.?\$?")


def extract_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` whose braces balance, stripped; None when there is none.

    Escaped braces do not count. One pass, so that a completion full of open boxes takes linear time.
    """
    open_braces: list[tuple[bool, int]] = []  # (is a box, where its content starts)
    start, end = -1, -1
    for token in _BRACES.finditer(text):
        if token.group(1) or token.group() == "{":
            open_braces.append((bool(token.group(1)), token.end()))
        elif token.group() == "}" and open_braces:
            is_box, content = open_braces.pop()
            if is_box and content > start:
                start, end = content, token.start()
    return text[start:end].strip() if start >= 0 else None


def _integer(answer: str) -> str | None:
    """The integer that a plain answer such as `-12` or `1,080` writes, in its shortest form; otherwise None."""
    found = _INTEGER.fullmatch(answer)
    if found is None:
        return None
    digits = found.group(2).replace(",", "").lstrip("0") or "0"
    return digits if digits == "0" or found.group(1) != "-" else f"-{digits}"


class AnswerChecker:
    """Compares answers in a worker process, at most `time_limit_s` seconds each; usable from any thread.

    Close it, or use it as a context manager. `boxed_only` False (template `raw`) takes the whole completion as the
    answer when it holds no box. `require_value`: whether `5+7` is wrong where the reference is `12`; None leaves it to
    each call. `cut_off` counts the comparisons that hit the time limit; they count as wrong. Raises `UserError` when
    math-verify is not installed.
    """

    def __init__(
        self, time_limit_s: float = 2.0, *, boxed_only: bool = True, require_value: bool | None = None
    ) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("answers are compared by math-verify, which is not installed: pip install math-verify")
        self.boxed_only = boxed_only
        self.cut_off = 0
        self._time_limit_s = time_limit_s
        self._require_value = require_value
        self._comparer = Worker("heterorl.data.equality.verdict.equal", warm_up=[r"\frac{x^2+1}{3}", r"\int_0^1 x dx"])
        self._referee = Worker("heterorl.data.equality.verdict.why_unreadable", warm_up=[r"\int_0^1 x dx"])
        self._ask = functools.lru_cache(CACHED_VERDICTS)(self._ask_comparer)

    def check(self, gold: str, completion: str, *, require_value: bool = False) -> bool:
        """Whether the completion's last box (or all of it, see the class) equals the reference answer."""
        answer = self.answer(completion)
        return answer is not None and self.equal(gold, answer, require_value=require_value)

    def answer(self, completion: str) -> str | None:
        """The part of a completion that counts as its answer."""
        boxed = extract_boxed(completion)
        return completion.strip() if boxed is None and not self.boxed_only else boxed

    def equal(self, gold: str, answer: str, *, require_value: bool = False) -> bool:
        """Whether two bare answers are equal; plain integers and identical texts are decided here, at once."""
        gold, answer = " ".join(gold.split()), " ".join(answer.split())
        if not gold or not answer:
            return False
        if gold == answer:
            return True
        integers = _integer(gold), _integer(answer)
        if None not in integers and (integers[0] == integers[1] or "," not in gold + answer):
            return integers[0] == integers[1]
        return max(len(gold), len(answer)) <= MAX_ANSWER_CHARS and self._ask(
            gold, answer, require_value if self._require_value is None else self._require_value
        )

    def why_no_reference(self, gold: str) -> str | None:
        """Why a text cannot be a reference answer, such as "is prose"; None where it can."""
        gold = " ".join(gold.split())
        if _integer(gold) is not None:
            return None
        if len(gold) > MAX_ANSWER_CHARS:
            return f"has {len(gold)} characters, more than an answer's {MAX_ANSWER_CHARS}"
        if reason := why_no_answer(gold):
            return reason
        try:
            why: str | None = self._referee.call(gold, time_limit_s=self._time_limit_s)
        except CallFailed as failure:
            return f"cannot be read: {failure}"
        return why

    def load(self) -> None:
        """Start the comparing worker, before the first comparison waits for it."""
        self._comparer.load()

    def close(self) -> None:
        """End the workers."""
        self._comparer.close()
        self._referee.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask_comparer(self, gold: str, answer: str, require_value: bool) -> bool:
        try:
            return bool(self._comparer.call(gold, answer, require_value, time_limit_s=self._time_limit_s))
        except CallFailed as failure:  # recursion, memory, a crash: nothing that a right answer would need
            self.cut_off += failure.reason == "time"
            return False
