"""Regions of the real line: unions of intervals and points, and the inequalities that say them."""

from __future__ import annotations

import sympy
from sympy import Symbol

from heterorl.data.equality.exact import numeric, same
from heterorl.data.equality.tokens import Unreadable
from heterorl.data.equality.values import Named, Piece, Region, Scalar, Several, Value

REAL_LINE = Region((Piece(-sympy.oo, sympy.oo, True, True),))
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}


def pieces_of(value: Value) -> tuple[Piece, ...]:
    """A value as a region of the line: intervals, points of a set; raises `Unreadable` for what is none."""
    if isinstance(value, Region):
        return value.pieces
    if isinstance(value, Named):
        return pieces_of(value.value)
    if isinstance(value, Several) and value.bracket == "{":
        return tuple(Piece(expression_of(item), expression_of(item), False, False) for item in value.items)
    if isinstance(value, Several) and value.bracket in ("(", "[") and len(value.items) == 2:
        is_open = value.bracket == "("
        low, high = (expression_of(item) for item in value.items)
        return (Piece(low, high, is_open, is_open),)
    if isinstance(value, Several) and value.bracket == "" and all(isinstance(i, Region) for i in value.items):
        regions = [item.pieces for item in value.items if isinstance(item, Region)]
        pieces = regions[0]
        for other in regions[1:]:
            pieces = union(pieces, other) if value.joint in ("or", "\\vee", "或") else intersection(pieces, other)
        return pieces
    raise Unreadable("it is no region of the line")


def merged(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The pieces ascending, those that touch joined."""
    ordered = sorted(pieces, key=lambda piece: (_place(piece.low), piece.low_open))
    result: list[Piece] = []
    for piece in ordered:
        last = result[-1] if result else None
        if last is None or not _touches(last, piece):
            result.append(piece)
            continue
        further = _place(piece.high) > _place(last.high)
        level = same(piece.high, last.high)
        high_open = last.high_open and piece.high_open if level else (piece if further else last).high_open
        result[-1] = Piece(last.low, piece.high if further else last.high, last.low_open, high_open)
    return tuple(result)


def _touches(a: Piece, b: Piece) -> bool:
    if same(a.high, b.low):
        return not (a.high_open and b.low_open)
    return _place(a.high) > _place(b.low)


def _place(value: sympy.Expr) -> float:
    if value in (sympy.oo, -sympy.oo):
        return float(value)
    place = numeric(value)
    if place is None:
        raise Unreadable("the ends of a region have no order")
    return place.real


def union(a: tuple[Piece, ...], b: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The union, ascending."""
    return merged((*a, *b))


def intersection(a: tuple[Piece, ...], b: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The intersection, ascending."""
    found = []
    for one in a:
        for other in b:
            low = max(one, other, key=lambda piece: (_place(piece.low), piece.low_open))
            high = min(one, other, key=lambda piece: (_place(piece.high), not piece.high_open))
            if _place(low.low) < _place(high.high) or (
                same(low.low, high.high) and not (low.low_open or high.high_open)
            ):
                found.append(Piece(low.low, high.high, low.low_open, high.high_open))
    return merged(tuple(found))


def without(a: tuple[Piece, ...], b: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The first region without the second."""
    outside: tuple[Piece, ...] = REAL_LINE.pieces
    for piece in b:
        parts = []
        if piece.low != -sympy.oo:
            parts.append(Piece(-sympy.oo, piece.low, True, not piece.low_open))
        if piece.high != sympy.oo:
            parts.append(Piece(piece.high, sympy.oo, not piece.high_open, True))
        outside = intersection(outside, tuple(parts))
    return intersection(a, outside)


# ── inequalities ─────────────────────────────────────────────────────────────────────────────────────────────────────
def solved(scalars: list[Scalar], relations: list[str]) -> Region | None:
    """`2x + 1 > 7`, `0 < 3 - x <= 2`: one side is linear in one variable and the others are constants."""
    values = [scalar.value for scalar in scalars]
    middle = [i for i, value in enumerate(values) if value.free_symbols]
    if len(middle) != 1 or len(values) > 3 or (len(values) == 3 and middle != [1]) or "=" in relations:
        return None
    linear = _linear(values[middle[0]])
    if linear is None:
        return None
    variable, factor, offset = linear
    bounds = []  # (relation of the variable to the bound, bound)
    for a, relation, b in zip(values, relations, values[1:]):
        bound, told = (b, relation) if a.free_symbols else (a, _MIRRORED[relation])
        bounds.append((_MIRRORED[told] if factor.is_negative else told, (bound - offset) / factor))
    pieces = REAL_LINE.pieces
    for relation, bound in bounds:
        pieces = intersection(pieces, _half_line(relation, bound))
    return Region(pieces, str(variable))


def _linear(value: sympy.Expr) -> tuple[Symbol, sympy.Expr, sympy.Expr] | None:
    (variable, *others) = value.free_symbols
    if others or not value.is_polynomial(variable) or sympy.degree(value, variable) != 1:
        return None
    factor, offset = sympy.Poly(value, variable).all_coeffs()
    return (variable, factor, offset) if factor.is_real else None


def _half_line(relation: str, bound: sympy.Expr) -> tuple[Piece, ...]:
    is_open = "=" not in relation or relation == "!="
    below, above = Piece(-sympy.oo, bound, True, is_open), Piece(bound, sympy.oo, is_open, True)
    return {"<": (below,), ">": (above,), "!=": (below, above)}[relation if relation == "!=" else relation[0]]


def expression_of(value: Value) -> sympy.Expr:
    """A value's expression; raises `Unreadable` where it is no scalar."""
    if not isinstance(value, Scalar):
        raise Unreadable("a number belongs here")
    return value.value
