r"""Does a completion's answer equal the reference? Boxes are found here, mathematics is compared by math-verify.

math-verify guards its time with `signal`, which fails outside the main thread, and hostile LaTeX (`9^{9^{9^9}}`) holds
the interpreter inside C code where no Python time limit reaches. So comparisons run in a `heterorl.worker`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from typing import Self

from heterorl.errors import UserError
from heterorl.worker import CallFailed, Worker

MAX_ANSWER_CHARS = 1000
"""A longer answer is wrong without being parsed: the longest reference in MATH-500 has 53 characters."""
CACHED_VERDICTS = 65_536

_BRACES = re.compile(r"(\\boxed\s*\{)|\\.|\{|\}", re.DOTALL)
_TRAILING = re.compile(r"(?<!\\right)(?<!\\left)(?:\.|\\[,;:! ]| )+\Z")
_INTEGER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d{1,40})")


def extract_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance, stripped; None when there is none.

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


def _normalised(answer: str) -> str:
    """The answer without math delimiters, needless blanks, and what ends a sentence (`72.` parses as nothing)."""
    answer = " ".join(answer.split())
    delimited = len(answer) > 2 and answer[0] == answer[-1] == "$" and answer[-2] != "\\"
    return _TRAILING.sub("", answer.strip("$") if delimited else answer).strip()


def _integer(answer: str) -> int | None:
    """The integer that a plain answer such as `-12` or `1,080` writes, otherwise None."""
    return int(answer.replace(",", "")) if _INTEGER.fullmatch(answer) else None


def _fits_a_box(answer: str) -> bool:
    """Whether an answer can stand in a box of its own: not empty, not endless, braces balanced, no box inside."""
    return 0 < len(answer) <= MAX_ANSWER_CHARS and extract_boxed(f"\\boxed{{{answer}}}") == answer


class AnswerChecker:
    """Compares answers in a worker process, at most `time_limit_s` seconds each; usable from any thread.

    Close it, or use it as a context manager. `boxed_only` False (template `raw`) takes the whole completion as the
    answer when it holds no box. `cut_off` counts the comparisons that hit the time limit; they count as wrong.
    Raises `UserError` when math-verify is not installed.
    """

    def __init__(self, time_limit_s: float = 2.0, *, boxed_only: bool = True) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("answers are compared by math-verify, which is not installed: pip install math-verify")
        self.boxed_only = boxed_only
        self.cut_off = 0
        self._time_limit_s = time_limit_s
        self._worker = Worker("heterorl.data.answers.compare", warm_up=[r"\frac{x^2+1}{3}", "x=0.25"])
        self._ask = functools.lru_cache(CACHED_VERDICTS)(self._ask_worker)

    def check(self, gold: str, completion: str) -> bool:
        """Whether the completion's last box (or all of it, see the class) equals the reference answer."""
        answer = self.answer(completion)
        return answer is not None and self.equal(gold, answer)

    def answer(self, completion: str) -> str | None:
        """The part of a completion that counts as its answer."""
        boxed = extract_boxed(completion)
        return completion.strip() if boxed is None and not self.boxed_only else boxed

    def equal(self, gold: str, answer: str) -> bool:
        """Whether two bare answers are equal; plain integers and identical texts are decided here, at once."""
        if len(answer) > MAX_ANSWER_CHARS:
            return False
        gold, answer = _normalised(gold), _normalised(answer)
        if not gold or not answer:
            return False
        if gold == answer:
            return True
        integers = _integer(gold), _integer(answer)
        if None not in integers:
            return integers[0] == integers[1]
        return _fits_a_box(gold) and _fits_a_box(answer) and self._ask(gold, answer)

    def parses(self, gold: str) -> bool:
        """Whether a reference answer can be compared at all."""
        gold = _normalised(gold)
        return _integer(gold) is not None or (_fits_a_box(gold) and self._ask(gold, None))

    def close(self) -> None:
        """End the worker."""
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask_worker(self, gold: str, answer: str | None) -> bool:
        try:
            return bool(self._worker.call(gold, answer, time_limit_s=self._time_limit_s))
        except CallFailed as failure:  # recursion, memory, a crash: nothing that a right answer would need
            self.cut_off += failure.reason == "time"
            return False


def compare(gold: str, answer: str | None) -> bool:
    """math-verify's verdict on two bare answers; without an answer, whether the gold parses. No time limit here."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL + 1)  # it warns that its own time limit is off

    def expression(text: str) -> list[object]:
        found: list[object] = parse(
            f"\\boxed{{{text}}}", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
        )
        return found

    parsed = expression(gold)
    return bool(parsed) and (answer is None or bool(verify(parsed, expression(answer), timeout_seconds=None)))
