"""When are two expressions equal? Exactly where that can be decided, otherwise to hundreds of digits."""

from __future__ import annotations

import random
from functools import cache

import sympy
from sympy import Expr, Rational
from sympy.core.evalf import PrecisionExhausted

_DIGITS = 1500
"""Two constants that agree to so many digits are taken as equal: closed forms this short never come that close."""
_DIGITS_AT_A_POINT = 60
_NUM_POINTS = 8


def same(a: Expr, b: Expr) -> bool:
    """Whether two expressions are equal as functions of their variables, where both are real."""
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    if a.has(sympy.oo, sympy.zoo, sympy.nan) or b.has(sympy.oo, sympy.zoo, sympy.nan):
        return False
    difference = a - b
    if difference.is_Rational or (difference.is_Mul and difference.is_zero is False):
        return bool(difference == 0)
    if not (a.free_symbols | b.free_symbols):
        return _is_zero(difference, 60) and _is_zero(difference, _DIGITS)
    return _same_functions(a, b, difference)


def rounds_to(value: Expr, decimal: Rational, places: int) -> bool:
    """Whether a real number rounds to a decimal of so many places, halves away from zero."""
    if not (value.is_number and value.is_extended_real):
        return False
    half = Rational(1, 2 * 10**places)
    sign = 1 if decimal >= 0 else -1
    distance = sign * (value - decimal)
    return bool(distance >= -half) and bool(distance < half)


def numeric(value: Expr) -> complex | None:
    """A floating-point value, for order; None with variables."""
    try:
        return complex(value.evalf(20))
    except (TypeError, ValueError, OverflowError):
        return None


def proportional(f: Expr, g: Expr, *, positive: bool = False) -> bool:
    """Whether f = k g for a constant k that is not 0 (or is positive)."""
    f, g = (sympy.together(side).as_numer_denom()[0] if side.is_rational_function() else side for side in (f, g))
    symbols = sorted(f.free_symbols | g.free_symbols, key=str)
    for point in _points(len(symbols)):
        at = dict(zip(symbols, point))
        f_there, g_there = f.subs(at), g.subs(at)
        if not g_there.is_number or _is_zero(g_there, _DIGITS_AT_A_POINT) or g_there.has(sympy.zoo, sympy.nan):
            continue
        factor = f_there / g_there
        if same(factor, sympy.Integer(0)) or (positive and not factor.is_extended_positive):
            return False
        return same(f, factor * g)
    return False


def _same_functions(a: Expr, b: Expr, difference: Expr) -> bool:
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if len(symbols) > 30 or not _agree(a, b, symbols):
        return False
    if difference.is_rational_function(*symbols):
        numerator = sympy.together(difference).as_numer_denom()[0]
        return bool(sympy.expand(numerator) == 0) or _vanishes(sympy.expand(numerator), symbols)
    return True


def _vanishes(expanded: Expr, symbols: list[sympy.Symbol]) -> bool:
    """Whether a polynomial's coefficients are all 0; they may be irrational."""
    return all(same(coefficient, sympy.Integer(0)) for coefficient in sympy.Poly(expanded, *symbols).coeffs())


def _agree(a: Expr, b: Expr, symbols: list[sympy.Symbol]) -> bool:
    """Whether both agree at every point where both are real; where there is none, at every point."""
    compared, complex_ones = 0, []
    for point in _points(len(symbols)):
        at = dict(zip(symbols, point))
        a_there, b_there = a.subs(at), b.subs(at)
        if a_there.has(sympy.zoo, sympy.nan, sympy.oo) or b_there.has(sympy.zoo, sympy.nan, sympy.oo):
            continue
        if _is_real(a_there) and _is_real(b_there):
            if not _is_zero(a_there - b_there, _DIGITS_AT_A_POINT):
                return False
            compared += 1
        else:
            complex_ones.append((a_there, b_there))
    if compared:
        return True
    return bool(complex_ones) and all(_is_zero(a - b, _DIGITS_AT_A_POINT) for a, b in complex_ones)


def _is_real(value: Expr) -> bool:
    if value.is_Rational:
        return True
    there = value.evalf(30)
    real, imaginary = there.as_real_imag()
    return bool(abs(imaginary) <= abs(real) * Rational(1, 10**25))


def _is_zero(constant: Expr, digits: int) -> bool:
    """Whether a constant is 0: known for rationals, otherwise no digit of it is found among so many."""
    if constant.is_Rational:
        return bool(constant == 0)
    try:
        return bool(constant.evalf(5, maxn=digits, strict=True) == 0)
    except PrecisionExhausted:
        return True


@cache
def _points(num_symbols: int) -> list[tuple[Rational, ...]]:
    """Fixed rational points, half of them of positive coordinates only."""
    rng = random.Random(0)
    return [
        tuple(
            Rational(rng.randint(1, 999), rng.choice([7, 101, 331])) * (rng.choice([-1, 1]) if i >= 4 else 1)
            for _ in range(num_symbols)
        )
        for i in range(_NUM_POINTS)
    ]
