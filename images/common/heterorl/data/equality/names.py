"""Names before an equals sign: variables, values of functions, angles, segments, words."""

from __future__ import annotations

import re

from sympy import Symbol

from heterorl.data.equality.tokens import Tokens
from heterorl.data.equality.words import is_word, plain

_FUNCTION_NAME = re.compile(
    r"(?:[fghpqruvwsFGHPQRSTUVWEXYN]|\\[A-Za-z]+)(?:_\{?\w+\}?)?'*(?:\^\{-1\}|\^\{\(\w+\)\})?\([^()]*\)"
)
_VARIABLE_NAME = re.compile(
    r"(?:[A-Za-z]|\\(?!in|sin|cos|tan|log|ln|pi|sqrt|frac|infty)[a-zA-Z]+)(?:_(?:\{[^{}]*\}|\w))?'*"
)
_OTHER_NAME = re.compile(
    r"[A-Z]{2,5}|m?\\angle[A-Z0-9]{1,3}|\\triangle[A-Z]{3}|\[[A-Z]{3,6}\]|\|[A-Z]{2}\||\\overline\{[A-Z]{2}\}"
    r"|\\(?:vec|hat|bar|tilde|overrightarrow)\{[^{}]*\}|\\frac\{d[a-zA-Z]?\}\{d[a-zA-Z]\}|d[a-z]/d[a-z]"
    r"|\\frac\{\\partial[a-zA-Z]\}\{\\partial[a-zA-Z]\}"
)


def name_of(side: Tokens) -> str | None:
    """The name that one side of `=` gives: a variable, a function's value, an angle, a segment, words."""
    text = "".join(token.text for token in side)
    if text in ("i", "e"):
        return None
    is_symbol = any(pattern.fullmatch(text) for pattern in (_VARIABLE_NAME, _FUNCTION_NAME, _OTHER_NAME))
    if is_symbol and not (text.isalpha() and is_word(text)):
        return re.sub(r"[{}]", "", text)
    words = [token for token in side if token.kind in ("run", "text")]
    spoken = len(words) == len(side) and any(is_word(token.text) or token.kind == "text" for token in words)
    return " " + plain(side) if spoken else None  # the blank sets words apart from symbols


def symbol_of(side: Tokens) -> Symbol | None:
    """The variable that one side of `=` is, if it is one."""
    text = "".join(token.text for token in side)
    return Symbol(text.replace("{", "").replace("}", "")) if _VARIABLE_NAME.fullmatch(text) else None
