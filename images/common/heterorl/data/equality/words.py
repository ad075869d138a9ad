"""What is a word and what a product of letters; which words are numbers, and which say that there is no answer."""

from __future__ import annotations

import re
from fractions import Fraction

from heterorl.data.equality.tokens import Broken, Tokens, Unreadable, tokens

_TWO = "no on of or is it in at up we me my by to go do so if as an am be he us ox hi oh pm"
_THREE = (
    "yes all odd and not the one two six ten red day may mon tue wed thu fri sat sun jan feb mar apr jun jul aug sep"
    " oct nov dec old art amy eve ann ada ana bob tom tim sam ben dan ron don pat jim joe kim leo max mia ray roy sue"
    " ted cat dog act god top pot was saw own won now who how why out off our her him his she you any few fox box boy"
    " ice age air arm bag bat bed bee big bit bus car cow cup cut egg ear eye end far fat fit fly for fun gas get guy"
    " has hat hot ink key kid law leg let lie lot low man men map met mix nor oak oil pen pie pig raw rat row run sad"
    " sea set sit sky tax tea tie tin toy try use van war way web wet win yet zoo tap ton net ant tan"
)
_ASCENDING = "almost below city first knot most dirty empty forty glory beer accent chips"
_WORDS = frozenset(f"{_TWO} {_THREE} {_ASCENDING}".split())
_FUNCTIONS = frozenset(
    str.split(
        "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln lg exp sqrt gcd lcm max min abs"
        " floor ceil pi infinity inf mod det"
    )
)
_ONES = str.split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen"
)
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {
    **{word: i for i, word in enumerate(_ONES)},
    **{word: 10 * i for i, word in enumerate(_TENS, 2)},
}
SCALES = {
    **{"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12},
    **{"万": 10**4, "亿": 10**8},
}
_PARTS = {
    **{"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7},
    **{"eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12, "hundredth": 100, "thousandth": 1000},
}
_NO_ANSWER = frozenset(
    str.split("nan n/a n.a unknown null nil proof tbd todo ? ?? ??? - -- omitted undetermined unanswerable unavailable")
) | {
    *("not available", "not applicable", "not given", "not provided", "not found", "no answer", "answer not found"),
    *("see solution", "see proof", "proof omitted", "to be determined", "to be proved", "to be proven", "无", "未知"),
    *("see above", "see below", "see the solution", "no answer given", "no answer found", "no answer provided", "证明"),
    *(
        "证明略",
        "略",
        "qed",
        "q.e.d",
        "#n/a",
        "none given",
        "left to the reader",
        "unsolved",
        "not a number",
        "NA",
        "<NA>",
    ),
}
_PROSE_WORDS = 7
_SENTENCE = re.compile(r"[a-z)}$\d]\s*[.!?]\s+[A-Z$\\]|[。！？].|\n\s*\n")
_PROVING = re.compile(
    r"\s*(?:proof\b|prove\b|we\s|see\s|let\s|note\sthat|to\sprove|solution\b|the\sproof|证明)", re.IGNORECASE
)


def is_word(run: str) -> bool:
    """Whether a run of letters is a word; otherwise it is a product: `xy`, `abcd`, but `no`, `north` and `是`."""
    lower = run.lower()
    if lower in _FUNCTIONS:
        return False
    if not run.isascii():
        return True
    if len(run) < 3 or lower in _WORDS:
        return lower in _WORDS and len(run) > 1
    spoken = bool(re.search("[aeiouy]", lower))
    if run.istitle() or len(run) == 3:
        return run.istitle() and spoken
    ascends = "".join(sorted(run)) == run  # as letters of a product do
    return spoken and not ascends and not run.isupper()


def number_of(words: list[str]) -> Fraction | None:
    """The number that words say: `twenty five`, `three quarters`, `two and a half`; None for other words."""
    integer = _integer_of(words)
    if integer is not None:
        return Fraction(integer)
    fraction = _fraction_of(words)
    if fraction is None and "and" in words:
        place = len(words) - 1 - words[::-1].index("and")
        integer, fraction = _integer_of(words[:place]), _fraction_of(words[place + 1 :])
        return None if integer is None or fraction is None else integer + fraction
    return fraction


def _integer_of(words: list[str]) -> int | None:
    total, current, last = 0, 0, ""
    for i, word in enumerate(words):
        if word in _ONES and (last in ("", "scale", "and") or (last == "ten" and 1 <= _SMALL[word] <= 9)):
            current, last = current + _SMALL[word], "one"
        elif word in _TENS and last in ("", "scale", "and"):
            current, last = current + _SMALL[word], "ten"
        elif word in SCALES and last:
            current, last = current * SCALES[word], "scale"
            if SCALES[word] > 100:
                total, current = total + current, 0
        elif word == "a" and i == 0 and len(words) > 1 and words[1] in SCALES:
            current, last = 1, "one"
        elif word == "and" and last == "scale" and i < len(words) - 1:
            last = "and"
        else:
            return None
    return total + current if last else None


def _fraction_of(words: list[str]) -> Fraction | None:
    if words == ["half"]:
        return Fraction(1, 2)
    part = _PARTS.get(words[-1]) or _PARTS.get(words[-1].removesuffix("s")) if len(words) > 1 else None
    numerator = 1 if words[:-1] == ["a"] else _integer_of(words[:-1])
    return Fraction(numerator, part) if part and numerator is not None else None


def plain(found: Tokens) -> str:
    """The words of a phrase as they are compared: in small letters but for a single one, single blanks, no marks."""
    text = " ".join(token.text for token in found if token.kind != "sign" or token.text not in "-'\".,~")
    return text if len(text) == 1 else text.casefold()


def canonical(found: Tokens) -> str:
    """The tokens as one text: equal for what prints alike, words in small letters."""
    text, previous = "", ""
    for token in found:
        spoken = token.kind in ("run", "text", "num")
        text += " " if token.gap and spoken and previous in ("run", "text", "num") else ""
        text += token.text.casefold() if token.kind in ("run", "text") and is_word(token.text) else token.text
        previous = token.kind
    return text.rstrip(".,;: ")


def why_no_answer(text: str) -> str | None:
    """Why a reference says no answer: it is empty, broken, `N/A`, `proof`, NaN, or prose; None where it may be one."""
    try:
        if not tokens(text):
            return "is empty"
    except Broken as error:
        return f"cannot be read: {error}"
    except Unreadable as error:
        return f"is no answer: {error}"
    bare = re.sub(r"\\(?:text|mathrm|textbf|textit|mbox)\s*\{([^{}]*)\}", r"\1", text)
    short = " ".join(bare.strip(" .:!()[]{}$*\"'<>").casefold().split())
    if not short or short in _NO_ANSWER or bare.strip() in _NO_ANSWER:
        return "says that there is no answer"
    formulas = re.sub(r"\$[^$]*\$|\\[A-Za-z]+", " ", bare)
    words = re.findall(r"[^\W\d_]{2,}", formulas)
    long = len(words) > _PROSE_WORDS or len(re.findall("[\u4e00-\u9fff]", bare)) > 2 * _PROSE_WORDS
    proving = len(words) > 2 and _PROVING.match(bare)
    if long or proving or (len(words) > 2 and _SENTENCE.search(bare)):
        return "is prose; put the answer in \\boxed{...}, or name a column or pattern that holds it alone"
    return None
