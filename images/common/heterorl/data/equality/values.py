"""What an answer may be: a number with its unit, words, a list, tuple or set, a region, an equation, a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from heterorl.data.equality.units import NO_UNIT, Unit


@dataclass(frozen=True)
class Scalar:
    """A number or an expression."""

    value: sympy.Expr
    unit: Unit = NO_UNIT
    places: int | None = None
    """Digits after the decimal point, where a decimal is all of it."""
    literal: bool = False
    """Whether it is written as a numeral or a fraction: a value, not a computation."""


@dataclass(frozen=True)
class Word:
    """A word or a phrase, as it is compared."""

    text: str


@dataclass(frozen=True)
class Several:
    """Items between brackets, `(`, `[` or `{`, or with none: a list of answers; `joint` is its last separator."""

    bracket: str
    items: tuple[Value, ...]
    joint: str = ","


@dataclass(frozen=True)
class Piece:
    """An interval, or a point where both ends are one number."""

    low: sympy.Expr
    high: sympy.Expr
    low_open: bool
    high_open: bool


@dataclass(frozen=True)
class Region:
    """A union of intervals, ascending; `name` is the variable where the answer is an inequality."""

    pieces: tuple[Piece, ...]
    name: str | None = None


@dataclass(frozen=True)
class Named:
    """`x=4`, `f(3)=10`, `x \\in (0, 1)`: a name and its value; `symbol` where the name is a variable."""

    name: str
    value: Value
    symbol: sympy.Symbol | None = None


@dataclass(frozen=True)
class Equation:
    """`difference = 0`."""

    difference: sympy.Expr


@dataclass(frozen=True)
class Inequality:
    """`difference > 0`, or `>= 0` where not strict."""

    difference: sympy.Expr
    strict: bool


@dataclass(frozen=True)
class Grid:
    """A matrix, or a vector of one column."""

    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class Ratio:
    """`3:2`, `1:2:3`, or a time of the day."""

    parts: tuple[sympy.Expr, ...]
    is_clock: bool


@dataclass(frozen=True)
class Foreign:
    """What only math-verify reads: its expression, not a scalar."""

    expression: object


Value = Scalar | Word | Several | Region | Named | Equation | Inequality | Grid | Ratio | Foreign
