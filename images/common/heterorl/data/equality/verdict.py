"""Do two answers say the same? And may a reference be compared at all?"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import sympy

from heterorl.data.equality.exact import proportional, rounds_to, same
from heterorl.data.equality.expressions import Flags, Unknown
from heterorl.data.equality.grammar import read
from heterorl.data.equality.regions import merged, pieces_of
from heterorl.data.equality.tokens import Broken, Unreadable, tokens
from heterorl.data.equality.typography import printed
from heterorl.data.equality.units import Unit
from heterorl.data.equality.values import (
    Equation,
    Foreign,
    Grid,
    Inequality,
    Named,
    Ratio,
    Region,
    Scalar,
    Several,
    Value,
    Word,
)
from heterorl.data.equality.words import canonical

_CHOICE = re.compile(
    r"(?:\\text(?:bf|rm)?\{|\\mathbf\{|\\mathrm\{)?\s*(?:\(([A-J])\)|([A-J])[).:])\s*\}?[\s:.]+(?=\S)(.+)", re.DOTALL
)
_CALCULUS = re.compile(r"\\(?:i*int|oint|sum|prod|lim|choose|det|bmod)(?![A-Za-z])")


def equal(gold: str, answer: str, require_value: bool = False) -> bool:
    """Whether an answer says what the reference says; with `require_value` a number must be written, not a computation.

    Has no time limit of its own: run it where it can be killed.
    """
    try:
        if canonical(tokens(gold)) == canonical(tokens(answer)):
            return True
        golds, answers = _readings(gold), _readings(answer)
    except Unreadable:
        return False
    judge = _Judge(require_value)
    return any(
        judge.says(gold_value, answer_value)
        for gold_flags, gold_value in golds
        for answer_flags, answer_value in answers
        if None in (gold_flags.log10, answer_flags.log10) or gold_flags.log10 == answer_flags.log10
        if _units_agree(gold_flags, gold_value, answer_flags, answer_value)
    )


def why_unreadable(gold: str) -> str | None:
    """Why a reference is no mathematics, as the end of a sentence; None where it is, or is compared as it prints."""
    try:
        _readings(gold)
    except Broken as error:
        return f"cannot be read: {error}"
    except Unreadable:
        return None
    return None


# ── readings ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@lru_cache(64)
def _readings(text: str) -> tuple[tuple[Flags, Value], ...]:
    """Everything that a text may say; raises `Broken`, `Unknown` or `Unreadable` where that is nothing."""
    found: list[tuple[Flags, Value]] = []
    errors: list[Unreadable] = []
    choice = _CHOICE.fullmatch(printed(text))
    for variant in filter(None, choice.groups()) if choice else (text,):
        for flags in _flags(variant):
            try:
                found.append((flags, read(variant, flags)))
            except Unreadable as error:
                errors.append(error)
    if not found and any(isinstance(error, Unknown) for error in errors):
        found = [(Flags(), _foreign(text))]
    if not found:
        raise next((error for error in errors if not isinstance(error, Broken)), errors[0])
    return tuple(found)


def _flags(text: str) -> Iterator[Flags]:
    plain = printed(text)
    yield from itertools.starmap(
        Flags,
        itertools.product(
            (True, False) if re.search(r"\d,\s*\d{3}", plain) else (True,),
            (False, True) if re.search(r"/\s*\d+\s*[a-zA-Z(\\]", plain) else (False,),
            (False, True) if re.search(r"log(?!\s*_)", plain) else (None,),
            ("spaced", "glued", "none") if re.search(r"\d\s*[A-Za-z]", plain) else ("spaced",),
        ),
    )


def _units_agree(gold_flags: Flags, gold: Value, answer_flags: Flags, answer: Value) -> bool:
    r"""A letter glued to a number is a unit only beside a unit: `3m` says 3 meters where `3\text{ m}` is asked for."""
    return (gold_flags.units != "glued" or _has_unit(answer)) and (answer_flags.units != "glued" or _has_unit(gold))


def _has_unit(value: Value) -> bool:
    if isinstance(value, Named):
        return _has_unit(value.value)
    if isinstance(value, Several):
        return any(_has_unit(item) for item in value.items)
    return isinstance(value, Scalar) and bool(value.unit.dimensions)


def _foreign(text: str) -> Value:
    """What math-verify reads in a text with commands that only it knows."""
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.CRITICAL + 1)  # it warns that its own time limit is off
    if not _CALCULUS.search(text):
        raise Unknown("a command of it is not known")
    found: list[object] = parse(
        f"\\boxed{{{printed(text)}}}", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )
    expression = found[0] if found else None
    if not isinstance(expression, sympy.Basic | sympy.MatrixBase):
        raise Unknown("neither this grammar nor math-verify knows its commands")
    if not isinstance(expression, sympy.Expr):
        return Foreign(expression)
    exact = sympy.nsimplify(expression.doit(), rational=True)
    return Scalar(exact.subs({symbol: sympy.Symbol(symbol.name) for symbol in exact.free_symbols}))


# ── comparison ───────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class _Judge:
    require_value: bool

    def says(self, gold: Value, answer: Value) -> bool:
        """Whether the answer says what the reference says."""
        try:
            return self._compare(gold, answer)
        except Unreadable:
            return False

    def _compare(self, gold: Value, answer: Value) -> bool:
        if isinstance(gold, Foreign) or isinstance(answer, Foreign):
            return _verified(gold, answer)
        if isinstance(gold, Named) and isinstance(answer, Named):
            return self._named(gold, answer)
        if isinstance(gold, Named):
            if isinstance(answer, Equation):
                return proportional(_equation(gold).difference, answer.difference)
            if isinstance(answer, Region) and answer.name not in (None, gold.name):
                return False
            return self.says(gold.value, answer)
        if isinstance(answer, Named):
            if isinstance(gold, Equation):
                return proportional(gold.difference, _equation(answer).difference)
            if isinstance(gold, Region) and gold.name not in (None, answer.name):
                return False
            return not isinstance(gold, Inequality) and self.says(gold, answer.value)
        return self._unnamed(gold, answer)

    def _unnamed(self, gold: Value, answer: Value) -> bool:
        if isinstance(gold, Scalar) and isinstance(answer, Scalar):
            return self._scalars(gold, answer)
        if isinstance(gold, Equation) and isinstance(answer, Equation):
            return proportional(gold.difference, answer.difference)
        if isinstance(gold, Inequality) and isinstance(answer, Inequality):
            positive = proportional(gold.difference, answer.difference, positive=True)
            return gold.strict == answer.strict and positive
        if isinstance(gold, Word) and isinstance(answer, Word):
            return gold.text == answer.text
        if isinstance(gold, Ratio) or isinstance(answer, Ratio):
            return _ratios(gold, answer)
        if isinstance(gold, Grid) or isinstance(answer, Grid):
            return self._grids(gold, answer)
        if _is_region(gold) or _is_region(answer):
            return _regions(gold, answer)
        return self._collections(gold, answer)

    def _named(self, gold: Named, answer: Named) -> bool:
        alike = gold.name == answer.name or gold.name.startswith(" ") or answer.name.startswith(" ")
        if alike and self.says(gold.value, answer.value):
            return True
        if gold.symbol is None or answer.symbol is None:
            return False
        return proportional(_equation(gold).difference, _equation(answer).difference)

    def _scalars(self, gold: Scalar, answer: Scalar) -> bool:
        if self.require_value and gold.literal and not answer.literal:
            return False
        return _quantities(gold, answer)

    def _grids(self, gold: Value, answer: Value) -> bool:
        if isinstance(gold, Grid) and isinstance(answer, Grid):
            if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
                return False
            pairs = [pair for rows in zip(gold.rows, answer.rows) for pair in zip(*rows)]
            return all(self.says(*pair) for pair in pairs)
        grid, other = (gold, answer) if isinstance(gold, Grid) else (answer, gold)
        assert isinstance(grid, Grid)
        cells = [cell for row in grid.rows for cell in row]
        is_vector = len(cells) in (len(grid.rows), len(grid.rows[0])) and len(cells) > 1
        if not (is_vector and isinstance(other, Several) and other.bracket in ("(", "[")):
            return False
        return self._in_order(cells, other.items) if grid is gold else self._in_order(other.items, cells)

    def _collections(self, gold: Value, answer: Value) -> bool:
        ours, theirs = _items(gold), _items(answer)
        if ours is None or theirs is None or not (isinstance(gold, Several) or isinstance(answer, Several)):
            return False
        if len(ours.items) != len(theirs.items):
            return False
        brackets = {ours.bracket, theirs.bracket}
        if len(ours.items) == 1:
            return self.says(ours.items[0], theirs.items[0])
        if brackets <= {"", "{"}:
            return self._in_any_order(ours.items, theirs.items)
        if "{" in brackets or ("[" in brackets and len(brackets) > 1 and len(ours.items) < 3):
            return False
        return self._in_order(ours.items, theirs.items)

    def _in_order(self, golds: Sequence[Value], answers: Sequence[Value]) -> bool:
        return len(golds) == len(answers) and all(self.says(*pair) for pair in zip(golds, answers))

    def _in_any_order(self, golds: Sequence[Value], answers: Sequence[Value]) -> bool:
        left = list(answers)
        for gold in golds:
            match = next((i for i, answer in enumerate(left) if self.says(gold, answer)), None)
            if match is None:
                return False
            del left[match]
        return not left


def _quantities(gold: Scalar, answer: Scalar) -> bool:
    """Whether two numbers with their units are equal; a missing unit is forgiven, a different one is not."""
    ours, theirs = gold.unit, answer.unit
    degrees = "degree" in (ours.kind, theirs.kind)
    pure = _pure(theirs) / _pure(ours)
    if not (ours and theirs):
        is_share = theirs.kind == "percent" and gold.value.is_Rational and 0 < abs(gold.value) < 1
        if not is_share and _numbers(gold, answer.value):  # but 0.5 is not 0.5 %
            return True
        return pure != 1 and not (ours.dimensions or theirs.dimensions) and _numbers(gold, answer.value * pure)
    if degrees and {base for base, _ in (*ours.dimensions, *theirs.dimensions)} & {"celsius", "fahrenheit"}:
        return ours.kind != theirs.kind and _numbers(gold, answer.value)  # 20 degrees of either scale
    if ours.dimensions != theirs.dimensions or not (ours.nouns <= theirs.nouns or theirs.nouns <= ours.nouns):
        return False
    angles = {ours.kind, theirs.kind} <= {"degree", "radian"}
    factor = theirs.factor / ours.factor
    return (angles or ours.kind == theirs.kind) and _numbers(gold, answer.value * pure * sympy.Rational(factor))


def _numbers(gold: Scalar, value: sympy.Expr) -> bool:
    if same(gold.value, value):
        return True
    return gold.places is not None and gold.value.is_Rational and rounds_to(value, gold.value, gold.places)


def _pure(unit: Unit) -> sympy.Expr:
    return {"percent": sympy.Rational(1, 100), "degree": sympy.pi / 180}.get(unit.kind, sympy.Integer(1))


def _equation(named: Named) -> Equation:
    if named.symbol is None or not isinstance(named.value, Scalar):
        raise Unreadable("it names a value and is no equation")
    return Equation(named.symbol - named.value.value)


def _is_region(value: Value) -> bool:
    if isinstance(value, Several) and value.bracket == "":
        return any(isinstance(item, Region) for item in value.items)
    return isinstance(value, Region)


def _regions(gold: Value, answer: Value) -> bool:
    names = {value.name for value in (gold, answer) if isinstance(value, Region)} - {None}
    if len(names) > 1:
        return False
    ours, theirs = merged(pieces_of(gold)), merged(pieces_of(answer))
    return len(ours) == len(theirs) and all(
        (a.low_open, a.high_open) == (b.low_open, b.high_open) and same(a.low, b.low) and same(a.high, b.high)
        for a, b in zip(ours, theirs)
    )


def _ratios(gold: Value, answer: Value) -> bool:
    parts = [_parts(value) for value in (gold, answer)]
    ours, theirs = parts
    if any(isinstance(value, Ratio) and value.is_clock for value in (gold, answer)):
        both = isinstance(gold, Ratio) and isinstance(answer, Ratio)
        return both and len(ours) == len(theirs) and all(map(same, ours, theirs))
    return len(ours) == len(theirs) and all(same(a * theirs[0], b * ours[0]) for a, b in zip(ours, theirs))


def _parts(value: Value) -> tuple[sympy.Expr, ...]:
    if isinstance(value, Ratio):
        return value.parts
    if isinstance(value, Scalar) and not value.unit:
        return (value.value, sympy.Integer(1))
    raise Unreadable("it is no ratio")


def _items(value: Value) -> Several | None:
    if isinstance(value, Several):
        return value
    return None if isinstance(value, Region | Grid | Ratio) else Several("", (value,))


def _verified(gold: Value, answer: Value) -> bool:
    from math_verify import verify

    if not (isinstance(gold, Foreign) and isinstance(answer, Foreign)):
        return False
    return bool(verify([gold.expression], [answer.expression], timeout_seconds=None))
