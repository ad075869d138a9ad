r"""The tokens of an answer: numerals, letters, words, commands, signs; wrappers that print their content are gone."""

from __future__ import annotations

import re
from typing import NamedTuple

from heterorl.data.equality.typography import printed

MAX_TOKENS = 2000


class Unreadable(Exception):
    """The grammar cannot read this answer."""


class Broken(Unreadable):
    """No grammar could: a brace without its partner, an operator without its operand."""


class Token(NamedTuple):
    """One token; `gap` says whether a blank stands before it."""

    kind: str
    """num (a numeral), rep (with a period), run (letters), text (words in `\\text`), cmd, sign, or end."""
    text: str
    gap: bool


Tokens = list[Token]

_NUMBER = r"\d+(?:\.\d+)?|\.\d+"
_SCANNED = re.compile(
    r"(?P<gap>\s+)"
    r"|(?P<rep>\d*\.\d*(?:\\(?:overline|bar|overset\{\\frown\})\s*\{\d+\}|\\dot\s*\{?\d\}?(?:\d*\\dot\s*\{?\d\}?)?"
    r"|\(\d+\)(?!\s*[\w({\\^])))"
    r"|(?P<dotted>\d*\.\d+\s*\\ldots)"
    r"|(?P<sci>(?:\d+(?:\.\d+)?|\.\d+)[eE][+-]?\d{1,6}(?![\d.]))"
    r"|(?P<grouped>\d{1,3}(?:,\s*\d{3})+(?![\d])(?:\.\d+)?)"
    rf"|(?P<num>{_NUMBER})"
    r"|(?P<run>[^\W\d_]+)"
    r"|(?P<cmd>\\[A-Za-z]+\*?|\\.)"
    r"|(?P<sign>\*\*|.)",
    re.DOTALL,
)
_SEEN_THROUGH = frozenset(
    str.split(
        r"\boldsymbol \mathbf \mathit \mathnormal \mathsf \mathtt \mathcal \mathscr \mathfrak \bm \pmb"
        r" \underline \uline \textcolor \emph \boxed \fbox \framebox \ensuremath \underbrace \mathstrut"
    )
)
_IN_WORDS = frozenset(
    str.split(
        r"\text \textbf \textit \textrm \textsf \texttt \textnormal \textup \textsc \mbox \hbox \mathrm"
        r" \operatorname \operatorname* \mathop \rm"
    )
)


def tokens(answer: str, *, grouped: bool = True) -> list[Token]:
    r"""The tokens of an answer; `8,128` is one numeral where `grouped`, otherwise a list of two.

    Raises `Broken` when braces do not balance, `Unreadable` when it is longer than `MAX_TOKENS`.
    """
    found: list[Token] = []
    wrappers: list[str] = []  # what the open braces belong to
    pending, gap = "", False
    for match in _SCANNED.finditer(printed(answer)):
        kind, text = match.lastgroup or "", match.group()
        if kind == "gap":
            gap = True
            continue
        if pending and text != "{" and pending in _SEEN_THROUGH | _IN_WORDS:
            pending = ""  # a wrapper around one token
        if text == "{":
            wrappers.append(pending)
            pending = ""
            if wrappers[-1]:
                continue
        elif text == "}":
            if not wrappers:
                raise Broken("a brace closes that was never opened")
            if wrappers.pop():
                continue
        elif text in _SEEN_THROUGH or text in _IN_WORDS:
            pending = text
            continue
        found.extend(_read(kind, text, gap, any(wrapper in _IN_WORDS for wrapper in wrappers), grouped))
        gap = False
    if wrappers:
        raise Broken("a brace is never closed")
    if len(found) > MAX_TOKENS:
        raise Unreadable("it is too long")
    return found


def _read(kind: str, text: str, gap: bool, in_words: bool, grouped: bool) -> list[Token]:
    if kind == "grouped":
        parts = re.split(r"(,)", text)
        if grouped:
            return [Token("num", re.sub(r"[,\s]", "", text), gap)]
        return [Token("sign" if part == "," else "num", part.strip(), gap and i == 0) for i, part in enumerate(parts)]
    if kind == "run":
        return [Token("text" if in_words else "run", text, gap)]
    if kind == "dotted":
        digits = re.sub(r"[^\d.]", "", text[: text.index("\\")])
        return [Token("rep", periodic, gap) if (periodic := _periodic(digits)) else Token("num", digits, gap)]
    return [Token({"sci": "num"}.get(kind, kind), text, gap)]


def _periodic(decimal: str) -> str | None:
    r"""`0.1666` before dots as `0.1\overline{6}`; None where the last digits do not repeat."""
    whole, _, digits = decimal.partition(".")
    for start in range(len(digits)):
        for length in range(1, (len(digits) - start) // 2 + 1):
            tail = digits[start:]
            times = len(tail) / length
            if (tail[:length] * len(tail))[: len(tail)] == tail and (
                times >= 3 or (times >= 2 and (start == 0 or length > 1))
            ):
                return f"{whole}.{digits[:start]}\\overline{{{tail[:length]}}}"
    return None
