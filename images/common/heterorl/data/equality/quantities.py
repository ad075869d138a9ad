r"""Quantities: a number or expression with what stands around it: `\$18`, `24 marbles`, `1.5 million`, `1 h 30 min`."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

import sympy

from heterorl.data.equality.expressions import CURRENCIES, Expressions, Flags, places_of
from heterorl.data.equality.tokens import Broken, Token, Tokens, Unreadable
from heterorl.data.equality.units import DEGREE, NO_UNIT, UNITS, unit_of
from heterorl.data.equality.values import Scalar
from heterorl.data.equality.words import SCALES, number_of


def quantity(found: Tokens, flags: Flags) -> Scalar:
    r"""A number or expression with its unit: `\$18`, `24 marbles`, `1.5 million`, `1 hour 30 minutes`."""
    if not found:
        raise Broken("an operand is missing")
    total: Scalar | None = None
    position = 0
    while position < len(found):
        scalar, position = _one_quantity(found, position, flags)
        total = scalar if total is None else summed([total, scalar])
    assert total is not None
    return total


def _one_quantity(found: Tokens, start: int, flags: Flags) -> tuple[Scalar, int]:
    rest = found[start:]
    currency = next((token for token in rest[:3] if token.text in CURRENCIES), None)
    if currency is not None:
        rest = [token for token in rest if token is not currency and token.text not in ("US", "USD")]
    worded = leading_words(rest)
    if worded is not None:
        number, used = worded
        scalar = Scalar(sympy.Rational(number.numerator, number.denominator), literal=True)
    else:
        parser = Expressions(list(rest), flags)
        value = parser.expression()
        used = parser.position
        scalar = Scalar(value, NO_UNIT, _places(rest[:used]), _is_literal(rest[:used], value))
    end = used
    while end < len(rest) and not (rest[end].kind == "num" and rest[end - 1].text not in ("^", "{", "-")):
        end += 1
    tail = rest[used:end]
    _check_unit_follows(scalar, tail)
    scalar = _with_tail(scalar, tail)
    if currency is not None and not scalar.unit:
        scalar = replace(scalar, unit=UNITS[currency.text.removeprefix("\\")])
    return scalar, len(found) - len(rest) + end


def _check_unit_follows(scalar: Scalar, tail: Tokens) -> None:
    """Raise where bare letters would be factors: `x + 2 m`; a letter alone is a unit after a numeral only."""
    if tail and tail[0].kind == "run":
        alone = len(tail[0].text) == 1 and not scalar.literal
        if alone or scalar.value.free_symbols:
            raise Unreadable("letters after an expression are factors, not units")


def _with_tail(scalar: Scalar, tail: Tokens) -> Scalar:
    while tail and tail[0].text.lower() in SCALES:
        scale = SCALES[tail[0].text.lower()]
        places = scalar.places - (len(str(scale)) - 1) if scalar.places else None
        scalar = replace(scalar, value=scalar.value * scale, places=places if places and places > 0 else None)
        tail = tail[1:]
    if not tail:
        return scalar
    if tail[0].text == "^" and "\\circ" in (token.text for token in tail[:3]):
        tail = tail[4:] if tail[1].text == "{" else tail[2:]
        scale_name = "".join(token.text for token in tail).upper()
        if scale_name in ("C", "F"):
            return replace(scalar, unit=UNITS["celsius" if scale_name == "C" else "fahrenheit"])
        return replace(scalar, unit=DEGREE.times(unit_of(tail) if tail else NO_UNIT))
    return replace(scalar, unit=unit_of(_fraction_of_units(tail)))


def _fraction_of_units(tail: Tokens) -> Tokens:
    r"""`\frac{\text{m}}{\text{s}}` as m/s."""
    if not tail or tail[0].text != "\\frac":
        return tail
    middle = next((i for i in range(len(tail) - 1) if tail[i].text == "}" and tail[i + 1].text == "{"), None)
    if middle is None:
        raise Unreadable("a fraction of units has two parts")
    return [*tail[1:middle], Token("sign", "/", False), *tail[middle + 1 :]]


def summed(scalars: list[Scalar]) -> Scalar:
    """`1 hour 30 minutes`, in the last unit; raises `Unreadable` where the units do not measure the same."""
    last = scalars[-1].unit
    if not last.dimensions or any(scalar.unit.dimensions != last.dimensions for scalar in scalars):
        raise Unreadable("a number follows a number")
    total = sum((s.value * sympy.Rational(s.unit.factor / last.factor) for s in scalars), sympy.Integer(0))
    return Scalar(total, last)


def leading_words(found: Tokens) -> tuple[Fraction, int] | None:
    """A number in words before what it counts: `five apples`, `two and a half`."""
    words: list[str] = []
    for token in found:
        if token.kind not in ("run", "text") and token.text != "-":
            break
        if token.text != "-":
            words.append(token.text.lower())
    for used in range(len(words), 0, -1):
        number = number_of(words[:used])
        if number is not None:
            dashes = sum(token.text == "-" for token in found[: used + 1])
            return number, used + dashes
    return None


def _places(found: Tokens) -> int | None:
    bare = [token for token in found if token.text not in ("+", "-", "{", "}", "(", ")")]
    return places_of(bare[0].text) if len(bare) == 1 and bare[0].kind == "num" else None


_SCIENTIFIC = re.compile(r"[+-]?[\d.]+\\cdot10\^\{?[+-]?\d+\}?")


def _is_literal(found: Tokens, value: sympy.Expr) -> bool:
    """Whether tokens write a value: a numeral, a mixed number, a fraction that is no integer, and their negatives."""
    if _SCIENTIFIC.fullmatch("".join(token.text for token in found)):
        return True
    signs = [token.text for token in found if token.kind not in ("num", "rep")]
    of_numerals = {"-", "+", "/", "\\frac", "{", "}", *(("_", "(", ")") if "_" in signs else ())}
    is_sum = any(token.text in ("-", "+") for token in found[1:])
    divisions = signs.count("/") + signs.count("\\frac")
    is_fraction = divisions == 1 and not value.is_Integer
    return bool(value.is_Rational) and set(signs) <= of_numerals and not is_sum and (is_fraction or divisions == 0)
