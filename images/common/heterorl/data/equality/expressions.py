r"""Expressions: tokens to sympy, by recursive descent. Numbers are exact, letters multiply, `\sqrt[3]{-8}` is real."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import sympy
from sympy import I, Integer, Rational, Symbol

from heterorl.data.equality.tokens import Broken, Token, Unreadable
from heterorl.data.equality.units import begins_unit, may_be_product
from heterorl.data.equality.words import is_word

MAX_BITS = 2_000_000
"""Larger integers are not written out: no answer means them, and they would hold the worker."""
MAX_DEPTH = 40

OPENING = {
    "(": ")",
    "[": "]",
    "{": "}",
    "\\{": "\\}",
    "\\lfloor": "\\rfloor",
    "\\lceil": "\\rceil",
    "\\langle": "\\rangle",
}
CLOSING = frozenset(OPENING.values())
CURRENCIES = frozenset({"\\$", "$", "€", "£", "¥", "₹"})
_END = Token("end", "", False)
_GREEK = frozenset(
    str.split(
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi"
        " chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar aleph"
    )
)
_FUNCTIONS: dict[str, Callable[..., sympy.Expr]] = {
    **{name: getattr(sympy, name) for name in str.split("sin cos tan cot sec csc sinh cosh tanh coth exp")},
    **{"arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "arccot": sympy.acot, "ln": sympy.log},
    **{"lg": lambda x: sympy.log(x) / sympy.log(10), "abs": sympy.Abs, "floor": sympy.floor, "ceil": sympy.ceiling},
    **{"Re": sympy.re, "Im": sympy.im, "arg": sympy.arg},
}
_INVERSE = {
    "sin": sympy.asin,
    "cos": sympy.acos,
    "tan": sympy.atan,
    "cot": sympy.acot,
    "sec": sympy.asec,
    "csc": sympy.acsc,
}
_OF_SEVERAL = {
    "gcd": sympy.gcd_list,
    "lcm": sympy.lcm_list,
    "max": lambda a: sympy.Max(*a),
    "min": lambda a: sympy.Min(*a),
}
_ENDS_ARGUMENT = frozenset({*_FUNCTIONS, *_OF_SEVERAL, "log", "sqrt", "(", "["})
_MARKED = frozenset(str.split(r"\overline \bar \vec \hat \tilde \overrightarrow \widehat \overleftrightarrow \mathbb"))
_BASES = {
    **{"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10},
    **{"eleven": 11, "twelve": 12, "sixteen": 16, "binary": 2, "octal": 8, "decimal": 10, "hex": 16},
}


class Unknown(Unreadable):
    r"""A command that this grammar does not know, such as `\int`; math-verify may."""


@dataclass(frozen=True)
class Flags:
    """How to read what prints alike: `8,128` as one numeral, `1/2x` as 1/(2x), `log` to base 10."""

    grouped: bool = True
    tight: bool = False
    log10: bool | None = None
    units: str = "spaced"
    """Which letters after a number are units: those after a blank, `glued` ones too, or `none`."""


class Expressions:
    """A parser of one token list; `expression` reads as far as it is an expression and leaves `position` there."""

    def __init__(self, tokens: list[Token], flags: Flags) -> None:
        self.tokens = tokens
        self.flags = flags
        self.position = 0
        self._in_function = 0
        self._depth = 0

    # ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def peek(self, ahead: int = 0) -> Token:
        return self._at(self.position + ahead)

    def _at(self, index: int) -> Token:
        return self.tokens[index] if index < len(self.tokens) else _END

    def take(self) -> Token:
        token = self.peek()
        self.position += 1
        return token

    def accept(self, *texts: str) -> bool:
        if self.peek().text in texts and self.peek().kind != "end":
            self.position += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise Broken(f"{text} is missing")

    # ── sums, products, powers ───────────────────────────────────────────────────────────────────────────────────────
    def expression(self) -> sympy.Expr:
        total = self.product()
        while self.peek().text in ("+", "-"):
            sign = 1 if self.take().text == "+" else -1
            total = total + sign * self.product()
        return _finite(total)

    def product(self) -> sympy.Expr:
        result = self.signed()
        while True:
            token = self.peek()
            if token.text in ("\\cdot", "*"):
                self.take()
                result = result * self.signed()
            elif token.text == "/":
                self.take()
                result = result / self._divisor()
            elif self._multiplies(token):
                result = result * self.power()
            else:
                return _finite(result)

    def signed(self) -> sympy.Expr:
        negative = False
        while self.peek().text in ("+", "-"):
            negative ^= self.take().text == "-"
        return -self.power() if negative else self.power()

    def _divisor(self) -> sympy.Expr:
        divisor = self.signed()
        while self.flags.tight and self._multiplies(self.peek()):
            divisor = divisor * self.power()
        return divisor

    def _multiplies(self, token: Token) -> bool:
        """Whether a token right after a factor is a factor too; units end the expression."""
        if token.kind == "run":
            return not (is_word(token.text) or self._is_unit(token))
        if token.kind == "num":
            return self.position > 0 and self.tokens[self.position - 1].text in (")", "]", "}", "'", "!")
        if token.kind == "cmd":
            known = token.text not in CLOSING and token.text not in (
                *("\\%", "\\cup", "\\cap", "\\setminus", "\\circ", "\\\\", "\\end", "\\{", "\\ldots", "\\cdot", "\\$"),
                *("\\wedge", "\\vee", "\\neg", "\\to", "\\Rightarrow", "\\infty", "\\pm", "\\mp"),
            )
            return known and not (token.text == "\\frac" and self.peek(2).kind == "text")
        if token.text == "(" and (self.peek(1).kind == "text" or is_word(self.peek(1).text)):
            return len(self.peek(1).text) == 1  # `10 (dollars)` is no product
        return token.kind == "rep" or token.text in ("(", "[", "{")

    def _is_unit(self, token: Token) -> bool:
        """Whether letters after a number are a unit: those after a blank, and symbols of several letters."""
        previous = self.tokens[self.position - 1] if self.position else _END
        after_number = previous.kind in ("num", "rep") or previous.text in ("}", ")", "\\pi")
        if self.flags.units == "none" or not after_number or not begins_unit(token.text):
            return False
        return token.gap or self.flags.units == "glued" or not may_be_product(token.text)

    def power(self) -> sympy.Expr:
        self._deeper()
        base = self.atom()
        self._depth -= 1
        while True:
            token = self.peek()
            if token.text == "!":
                self.take()
                base = _factorial(base)
            elif token.text == "^" and self._is_circle():
                if not self._in_function and self._ends_after_degrees():
                    return base
                self._take_circle()
                base = base * sympy.pi / 180
            elif token.text in ("^", "**"):
                self.take()
                base = raised(base, self.script())
            elif token.text in ("%", "\\%") and not self._ends_after(1):
                self.take()
                base = base / 100
            else:
                return base

    def _is_circle(self) -> bool:
        return self.peek(1).text == "\\circ" or (self.peek(1).text == "{" and self.peek(2).text == "\\circ")

    def _take_circle(self) -> None:
        braced = self.peek(1).text == "{"
        self.position += 4 if braced else 2

    def _ends_after_degrees(self) -> bool:
        return self._ends_after(4 if self.peek(1).text == "{" else 2)

    def _ends_after(self, ahead: int) -> bool:
        """Whether the token list ends there, or goes on with words, letters or a number: then a unit begins here."""
        token = self.peek(ahead)
        return token.kind in ("end", "text", "run", "num")

    def script(self) -> sympy.Expr:
        """An exponent: a group, a sign and a numeral, or one token; `2^10` means what it meant to say."""
        if self.peek().text in ("{", "("):
            return self.atom()
        if self.peek().text in ("-", "+"):
            return -self.script() if self.take().text == "-" else self.script()
        token = self.peek()
        if token.kind == "run" and len(token.text) > 1 and not is_word(token.text) and token.text not in _FUNCTIONS:
            self.tokens[self.position] = Token("run", token.text[1:], False)
            return _letter(token.text[0])
        exponent = self.atom()
        if self.accept("^", "**"):
            self._deeper()
            exponent = raised(exponent, self.script())
            self._depth -= 1
        return exponent

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("it is nested too deep")

    # ── atoms ────────────────────────────────────────────────────────────────────────────────────────────────────────
    def atom(self) -> sympy.Expr:
        token = self.take()
        if (token.kind in ("num", "run") or token.text == "(") and (based := self._based()) is not None:
            return based
        if token.kind == "num":
            return self._after_numeral(numeral(token.text), token)
        if token.kind == "rep":
            return repeating(token.text)
        if token.kind == "run":
            return self._letters(token.text)
        if token.kind == "text" and (len(token.text) == 1 or token.text in _FUNCTIONS):
            return self._letters(token.text)
        if token.text in OPENING:
            return self._group(token.text)
        if token.text == "|":
            inside = self.expression()
            self.expect("|")
            return sympy.Abs(inside)
        if token.kind == "cmd":
            return self._command(token.text[1:])
        if token.kind == "end":
            raise Broken("an operand is missing")
        if token.text in CURRENCIES:
            return self.power()
        raise Unreadable(f"{token.text!r} stands where an operand belongs")

    def _group(self, opening: str) -> sympy.Expr:
        inside = self.expression()
        self.expect(OPENING[opening])
        if opening == "\\{" or opening == "\\langle":
            raise Unreadable("a set is no number")
        return {"\\lfloor": sympy.floor, "\\lceil": sympy.ceiling}.get(opening, lambda x: x)(inside)

    def _after_numeral(self, number: sympy.Expr, token: Token) -> sympy.Expr:
        """A mixed number where a proper fraction of numerals follows: `11 5/6`, `1\\frac{4}{5}`."""
        if not number.is_Integer or "." in token.text:
            return number
        ahead = [self.peek(i) for i in range(7)]
        texts = [token.text for token in ahead]
        digits = [bool(re.fullmatch(r"\d+", text)) for text in texts]
        if ahead[0].gap and digits[0] and texts[1] == "/" and digits[2]:
            numerator, denominator, used = texts[0], texts[2], 3
        elif texts[0] == "\\frac":
            flat = "".join(texts[1:])
            found = re.match(r"\{(\d+)\}\{(\d+)\}|(\d)(\d)(?!\d)|\{(\d+)\}(\d)(?!\d)|(\d)\{(\d+)\}", flat)
            if found is None:
                return number
            numerator, denominator = [group for group in found.groups() if group is not None]
            split = found.group(3) is not None and len(texts[1]) == 2
            used = 2 if split else 1 + _tokens_of(texts[1:], found.end())
        else:
            return number
        if not 0 < int(numerator) < int(denominator):
            return number
        self.position += used
        return number + Rational(int(numerator), int(denominator))

    def _based(self) -> sympy.Expr | None:
        r"""The value of a numeral with its base, `2A_{16}`, `(101)_2`, where the tokens from the last one write one."""
        bracketed = self.tokens[self.position - 1].text == "("
        start = end = self.position if bracketed else self.position - 1
        while (token := self._at(end)).kind in ("num", "run") and (end == start or not token.gap):
            end += 1
        digits = "".join(token.text for token in self.tokens[start:end])
        end += bracketed and self._at(end).text == ")"
        if self._at(end).text != "_" or not re.fullmatch(r"[0-9A-Za-z]+(\.\d+)?", digits):
            return None
        following = "".join(token.text for token in self.tokens[end + 1 : end + 8])
        found = re.match(r"\{?\(?(?:base)?(\d{1,2}(?!\d)|[a-z]+)\)?\}?", following)
        if found is None or (digits.isalpha() and len(digits) == 1):
            return None
        base = int(found.group(1)) if found.group(1).isdigit() else _BASES.get(found.group(1), 0)
        if not 2 <= base <= 36:
            return None
        try:
            value = _in_base(digits, base)
        except ValueError:
            if digits.isdigit():
                raise Unreadable(f"{digits} is no numeral of base {base}") from None
            return None
        self.position = end + 1 + _tokens_of([token.text for token in self.tokens[end + 1 :]], found.end())
        return value

    def _letters(self, run: str) -> sympy.Expr:
        if run in ("pi", "infinity", "inf", "Infinity"):
            return sympy.pi if run == "pi" else sympy.oo
        if run == "sqrt":
            return _root(self._argument(), Integer(2))
        if run in _FUNCTIONS or run in _OF_SEVERAL or run == "log":
            return self._function(run)
        if is_word(run):
            raise Unreadable(f"{run!r} is a word")
        result = Integer(1)
        for letter in run[:-1]:
            result = result * _letter(letter)
        return result * self._subscripted(run[-1])

    def _subscripted(self, name: str) -> sympy.Expr:
        while self.accept("'"):
            name += "'"
        if self.accept("_"):
            name += "_" + self._raw()
        return _letter(name)

    def _raw(self) -> str:
        """The next group or token as text."""
        if not self.accept("{"):
            return self.take().text
        depth, text = 1, ""
        while depth:
            token = self.take()
            if token.kind == "end":
                raise Broken("a brace is never closed")
            depth += (token.text == "{") - (token.text == "}")
            text += token.text if depth else ""
        return text

    def _command(self, name: str) -> sympy.Expr:
        if name == "frac":
            numerator = self._fraction_part()
            return _finite(numerator / self._fraction_part())
        if name == "sqrt":
            return self._radical()
        if name == "binom":
            return _binomial(self._fraction_part(), self._fraction_part())
        if name == "pi":
            return sympy.pi
        if name == "infty":
            return sympy.oo
        if name in _FUNCTIONS or name in _OF_SEVERAL or name == "log":
            return self._function(name)
        if name in _GREEK:
            return self._subscripted("\\" + name)
        if "\\" + name in _MARKED:
            return self._subscripted(f"\\{name}({self._raw()})")
        if name in ("angle", "triangle"):
            return Symbol(f"\\{name} " + self.take().text)
        raise Unknown(f"\\{name} is not known")

    def _fraction_part(self) -> sympy.Expr:
        r"""An argument of `\frac`: a group, or one digit or letter, as TeX reads `\frac12` and `\frac 59`."""
        token = self.peek()
        if token.text == "{":
            return self.atom()
        if token.kind in ("num", "run") and len(token.text) > 1:
            self.tokens[self.position] = Token(token.kind, token.text[1:], False)
            return numeral(token.text[0]) if token.kind == "num" else _letter(token.text[0])
        return self.atom()

    def _radical(self) -> sympy.Expr:
        degree: sympy.Expr = Integer(2)
        if self.accept("["):
            degree = self.expression()
            self.expect("]")
        token = self.peek()
        if token.kind == "run" and len(token.text) > 1 and not is_word(token.text) and token.text not in _FUNCTIONS:
            return _root(self._fraction_part(), degree)
        return _root(self.atom(), degree)

    def _function(self, name: str) -> sympy.Expr:
        function = _INVERSE.get(name) if self._takes_inverse() else None
        base, exponent = None, None
        for _ in range(2):
            if name == "log" and self.accept("_"):
                base = self._one_digit_script()
            elif self.accept("^"):
                exponent = self._one_digit_script()
        if name in _OF_SEVERAL:
            return _OF_SEVERAL[name](self._arguments())
        self._in_function += 1
        argument = self._argument()
        self._in_function -= 1
        if name == "log":
            bottom = base if base is not None else Integer(10) if self.flags.log10 else sympy.E
            value = sympy.log(argument) / sympy.log(bottom)
        elif name == "exp":
            value = raised(sympy.E, argument)
        else:
            value = (function or _FUNCTIONS[name])(argument)
        return _finite(raised(value, exponent) if exponent is not None else value)

    def _one_digit_script(self) -> sympy.Expr:
        token = self.peek()
        if token.kind == "num" and len(token.text) > 1:  # `\log_28` is to base 2
            self.tokens[self.position] = Token("num", token.text[1:], False)
            return numeral(token.text[0])
        return self.script()

    def _takes_inverse(self) -> bool:
        texts = "".join(self.peek(i).text for i in range(5))
        if not texts.startswith("^{-1}"):
            return False
        self.position += 5
        return True

    def _argument(self) -> sympy.Expr:
        r"""What a function applies to: a group, or a product up to the next function: `\sin 2x`, `\ln x^2`."""
        if self.peek().text in ("(", "[", "{", "\\{", "|"):
            return self.atom()
        argument = self.signed()
        while self._multiplies(self.peek()) and self.peek().text.lstrip("\\") not in (
            *_FUNCTIONS,
            "log",
            "sqrt",
            "(",
            "[",
        ):
            argument = argument * self.power()
        return argument

    def _arguments(self) -> list[sympy.Expr]:
        opening = self.take().text
        if opening not in ("(", "["):
            raise Unreadable("the arguments are not in brackets")
        arguments = [self.expression()]
        while self.accept(","):
            arguments.append(self.expression())
        self.expect(OPENING[opening])
        return arguments


# ── numerals ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def numeral(text: str) -> sympy.Expr:
    """The exact value of `12`, `1.25`, `1.5e6`."""
    mantissa, _, exponent = text.lower().partition("e")
    if abs(int(exponent or 0)) > MAX_BITS // 4 or len(mantissa) > 4000:
        raise Unreadable("the number is too large")
    whole, _, decimals = mantissa.partition(".")
    scale = int(exponent or 0) - len(decimals)
    digits = int((whole + decimals) or 0)
    return Integer(digits * 10**scale) if scale >= 0 else Rational(digits, 10**-scale)


def places_of(text: str) -> int | None:
    """Digits after the point of a decimal; None where the numeral is an integer."""
    mantissa, _, exponent = text.lower().partition("e")
    places = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return places if places > 0 else None


def repeating(text: str) -> sympy.Expr:
    r"""The exact value of `0.1\overline{6}`, `0.\dot{1}4\dot{2}` (period 142), `0.(3)`."""
    whole, _, rest = text.partition(".")
    prefix = re.match(r"\d*", rest)
    fixed = prefix.group() if prefix else ""
    period = re.sub(r"\\[a-z]+(\{\\frown\})?", "", rest[len(fixed) :])
    period = re.sub(r"\D", "", period)
    return Rational(int(whole + fixed or 0), 10 ** len(fixed)) + Rational(
        int(period), 10 ** len(fixed) * (10 ** len(period) - 1)
    )


def _in_base(digits: str, base: int) -> sympy.Expr:
    whole, _, fraction = digits.partition(".")
    return Rational(int(whole + fraction, base), base ** len(fraction))


def _tokens_of(texts: list[str], length: int) -> int:
    """How many of the first texts make up a length."""
    used = 0
    while length > 0:
        length -= len(texts[used])
        used += 1
    return used


# ── operations that know their limits ────────────────────────────────────────────────────────────────────────────────
def _letter(name: str) -> sympy.Expr:
    constants = {"i": I, "e": sympy.E}
    return constants.get(name, Symbol(name))


def _finite(value: sympy.Expr) -> sympy.Expr:
    if value.has(sympy.zoo, sympy.nan):
        raise Unreadable("it divides by zero")
    return value


def raised(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """A power; real where an odd root of a negative number is meant; `Unreadable` where it would not fit."""
    if base.is_Rational and exponent.is_Rational:
        size = max(abs(base.p), base.q).bit_length() if abs(base) != 1 else 0
        if size * abs(exponent) > MAX_BITS:
            raise Unreadable("the power is too large")
        if base.is_negative and exponent.q % 2 and exponent.q > 1:
            return (-1) ** exponent.p * (-base) ** exponent
    if exponent.is_Integer and abs(exponent) > 10_000 and not base.is_Atom:
        raise Unreadable("the power is too large")
    return _finite(base**exponent)


def _root(value: sympy.Expr, degree: sympy.Expr) -> sympy.Expr:
    if value.is_extended_negative and degree.is_Integer and degree % 2:
        return -raised(-value, 1 / degree)
    return raised(value, 1 / degree)


def _factorial(value: sympy.Expr) -> sympy.Expr:
    if value.is_Integer and value > 20_000:
        raise Unreadable("the factorial is too large")
    return sympy.factorial(value)


def _binomial(n: sympy.Expr, k: sympy.Expr) -> sympy.Expr:
    if n.is_Integer and k.is_Integer and (abs(n) > 100_000 or k > 20_000):
        raise Unreadable("the binomial is too large")
    return sympy.binomial(n, k)
