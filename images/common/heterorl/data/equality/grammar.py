r"""The structure of an answer: lists, chains of relations, regions, sets, tuples, matrices, quantities, words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise

import sympy

from heterorl.data.equality.exact import rounds_to, same
from heterorl.data.equality.expressions import CLOSING, MAX_DEPTH, OPENING, Flags, Unknown
from heterorl.data.equality.names import name_of, symbol_of
from heterorl.data.equality.quantities import leading_words, quantity, summed
from heterorl.data.equality.regions import (
    REAL_LINE,
    expression_of,
    intersection,
    merged,
    pieces_of,
    solved,
    union,
    without,
)
from heterorl.data.equality.tokens import Broken, Token, Tokens, Unreadable, tokens
from heterorl.data.equality.values import (
    Equation,
    Grid,
    Inequality,
    Named,
    Piece,
    Ratio,
    Region,
    Scalar,
    Several,
    Value,
    Word,
)
from heterorl.data.equality.words import is_word, plain

_RELATIONS = {"=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\approx": "~", "\\in": "in"}
_SEPARATORS = frozenset({",", ";", "and", "or", "\\wedge", "\\vee", "以及", "和", "或", "与"})
_MATRICES = frozenset(["pmatrix", "bmatrix", "matrix", "smallmatrix", "Bmatrix", "vmatrix", "Vmatrix", "array"])
_NOTHING = Several("{", ())
_SAME_PHRASES: dict[str, Value] = {
    **dict.fromkeys(("no solution", "no solutions", "no real solution", "no real solutions", "empty set"), _NOTHING),
    **dict.fromkeys(("the empty set", "null set", "no such solution", "has no solution", "无解", "空集"), _NOTHING),
    **dict.fromkeys(("all real numbers", "all reals", "all real", "any real number", "real numbers"), REAL_LINE),
}


def read(answer: str, flags: Flags) -> Value:
    """What an answer says. Raises `Broken`, `Unknown` or `Unreadable`."""
    found = tokens(answer, grouped=flags.grouped)
    _check_depth(found)
    while found and found[-1].text in (",", ".", ";", ":"):
        found.pop()
    if not found:
        raise Broken("it is empty")
    return _Reader(flags).listed(found)


def _check_depth(found: Tokens) -> None:
    depth, stack = 0, []
    for token in found:
        if token.text in ("(", "[", "{", "\\{"):
            stack.append(token.text)
        elif token.text in (")", "]", "}", "\\}") and stack:
            stack.pop()
        depth = max(depth, len(stack))
    if depth > MAX_DEPTH:
        raise Unreadable("its brackets are nested too deep")


def _split(found: Tokens, is_mark: Callable[[Token], bool]) -> Iterator[tuple[Tokens, str]]:
    """The parts between the marks that stand outside all brackets, each with the mark after it."""
    depth, start = 0, 0
    for i, token in enumerate(found):
        if token.text in OPENING or token.text == "\\begin":
            depth += 1
        elif token.text in CLOSING or token.text == "\\end":
            depth = max(0, depth - 1)
        elif depth == 0 and is_mark(token):
            yield found[start:i], token.text
            start = i + 1
    yield found[start:], ""


def _is_separator(token: Token) -> bool:
    return token.text.lower() in _SEPARATORS or token.text == "\\\\"


def _enclosed(found: Tokens) -> bool:
    """Whether the first token's bracket closes with the last token; `(3, 4]` counts, `(1)(2)` does not."""
    if len(found) < 2 or found[0].text not in OPENING or found[-1].text not in CLOSING:
        return False
    depth = 0
    for i, token in enumerate(found):
        depth += (token.text in OPENING) - (token.text in CLOSING)
        if depth == 0:
            return i == len(found) - 1
    return False


class _Reader:
    """Reads token lists with the same flags."""

    def __init__(self, flags: Flags) -> None:
        self.flags = flags

    # ── lists ────────────────────────────────────────────────────────────────────────────────────────────────────────
    def listed(self, found: Tokens) -> Value:
        phrase = _phrase(found)
        if phrase is not None:
            return phrase
        items, joint = self.items(found)
        if len(items) == 1:
            return items[0]
        if not items:
            raise Broken("it is empty")
        return Several("", tuple(items), joint)

    def items(self, found: Tokens) -> tuple[list[Value], str]:
        parts = [(part, mark) for part, mark in _split(found, _is_separator) if part]
        joint = next((mark for _, mark in parts if mark and mark != ","), ",") if len(parts) > 1 else ","
        items: list[Value] = []
        name: Value | None = None
        for part, _ in parts:
            for chosen in _signs(part):
                value = self.related(chosen)
                if _is_domain(value) and len(parts) > 1:
                    continue
                if isinstance(name, Named) and not isinstance(value, Named | Equation | Inequality | Region):
                    value = Named(name.name, value, name.symbol)  # `x = 1, 2`
                items.append(value)
                name = value if isinstance(value, Named) else name
        return self._quantity_of(found, items, joint)

    def _quantity_of(self, found: Tokens, items: list[Value], joint: str) -> tuple[list[Value], str]:
        """`2 hours and 30 minutes` is one quantity, not two answers."""
        scalars = [item for item in items if isinstance(item, Scalar) and item.unit.dimensions]
        if joint != "and" or len(scalars) != len(items) or len(items) < 2:
            return items, joint
        units = [scalar.unit for scalar in scalars]
        if len({unit.dimensions for unit in units}) > 1 or len({unit.factor for unit in units}) < len(units):
            return items, joint
        return [summed(scalars)], joint

    def _quantity(self, found: Tokens) -> Scalar:
        return quantity(found, self.flags)

    # ── relations ────────────────────────────────────────────────────────────────────────────────────────────────────
    def related(self, found: Tokens) -> Value:
        phrase = _phrase(found)
        if phrase is not None:
            return phrase
        parts = list(_split(found, lambda token: token.text in _RELATIONS))
        relations = [_RELATIONS[mark] for _, mark in parts[:-1]]
        sides = [part for part, _ in parts]
        if not relations:
            return self.united(found)
        if not sides[0] and relations[0] in ("=", "~"):
            return self.related([token for part, mark in parts[1:] for token in (*part, *_mark(mark))])
        if not all(sides):
            raise Broken("a relation has one side only")
        if relations == ["in"]:
            return Named(name_of(sides[0]) or "", self.united(sides[1]), None)
        if set(relations) <= {"=", "~"}:
            return self._chain(sides, relations)
        if "in" in relations or "~" in relations:
            raise Unreadable("its relations are mixed")
        return self._compared(sides, relations)

    def _chain(self, sides: list[Tokens], relations: list[str]) -> Value:
        name = name_of(sides[0])
        if len(sides) == 2 and (point := self._point(*sides)) is not None:
            return point
        if name is None and len(sides) == 2 and name_of(sides[1]) and not name_of(sides[0]):
            reversed_sides = self.united(sides[0])
            if isinstance(reversed_sides, Scalar) and not reversed_sides.value.free_symbols:
                return Named(name_of(sides[1]) or "", reversed_sides, symbol_of(sides[1]))
        values = [self.united(side) for side in (sides if name is None else sides[1:])]
        links = relations if name is None else relations[1:]
        if name is not None:
            _check_chain(values, links)
            return Named(name, values[-1], symbol_of(sides[0]))
        scalars = [value for value in values if isinstance(value, Scalar)]
        if len(scalars) < len(values):
            raise Unreadable("an equation of what is no number")
        if not any(scalar.value.free_symbols for scalar in scalars):
            _check_chain(list(values), links)
            return scalars[-1] if links[-1] == "=" or scalars[-1].places else scalars[0]
        if "~" in relations:
            raise Unreadable("an equation that holds nearly")
        equations = tuple(Equation(a.value - b.value) for a, b in pairwise(scalars))
        return equations[0] if len(equations) == 1 else Several("", equations, "and")

    def _point(self, left: Tokens, right: Tokens) -> Value | None:
        """`(x, y) = (2, 3)` as x = 2, y = 3; None for another equation."""
        if not (_enclosed(left) and left[0].text == "(" and _enclosed(right)):
            return None
        names = [part for part, _ in _split(left[1:-1], _is_separator)]
        values = self.united(right)
        if not isinstance(values, Several) or len(values.items) != len(names) or not all(map(name_of, names)):
            return None
        pairs = zip(names, values.items)
        return Several("(", tuple(Named(name_of(name) or "", value, symbol_of(name)) for name, value in pairs))

    def _compared(self, sides: list[Tokens], relations: list[str]) -> Value:
        """Inequalities: a region of the line where one variable stands between constants, else each by itself."""
        scalars = [self._quantity(side) for side in sides]
        if not any(scalar.value.free_symbols for scalar in scalars):
            raise Unreadable("a comparison of constants names nothing")
        region = solved(scalars, relations)
        if region is not None:
            return region
        parts: list[Value] = []
        for a, relation, b in zip(scalars, relations, scalars[1:]):
            if relation == "!=":
                raise Unreadable("only a variable may differ from a number")
            difference = b.value - a.value if relation.startswith("<") else a.value - b.value
            if relation == "=":
                parts.append(Equation(difference))
            else:
                parts.append(Inequality(difference, strict="=" not in relation))
        return parts[0] if len(parts) == 1 else Several("", tuple(parts), "and")

    # ── sets and regions ─────────────────────────────────────────────────────────────────────────────────────────────
    def united(self, found: Tokens) -> Value:
        operators = ("\\cup", "\\setminus", "\\cap")
        parts = list(_split(found, lambda token: token.text in operators))
        if len(parts) == 1:
            return self.single(found)
        pieces = pieces_of(self.single(parts[0][0]))
        for (_, operator), (part, _) in pairwise(parts):
            others = pieces_of(self.single(part))
            pieces = {"\\cup": union, "\\setminus": without, "\\cap": intersection}[operator](pieces, others)
        return Region(merged(pieces))

    def single(self, found: Tokens) -> Value:
        if not found:
            raise Broken("an operand is missing")
        texts = "".join(token.text for token in found)
        if texts == "\\emptyset":
            return Several("{", ())
        if texts in ("\\mathbb{R}", "\\R", "\\Reals"):
            return REAL_LINE
        if found[0].text == "\\begin":
            return self._environment(found)
        if _enclosed(found):
            return self._bracketed(found)
        phrase = _phrase(found)
        if phrase is not None:
            return phrase
        if any(token.text == ":" for token in found):
            return self._ratio(found)
        return self._quantity(found)

    def _bracketed(self, found: Tokens) -> Value:
        opening, closing, inside = found[0].text, found[-1].text, found[1:-1]
        if opening == "{":
            return self.listed(inside)
        if opening in ("\\lfloor", "\\lceil"):
            return self._quantity(found)
        if not inside:
            return Several(opening[-1:], ())
        if opening == "\\{" and any(token.text in ("|", ":") for token in inside):
            return self._set_builder(inside)
        items, _ = self.items(inside)
        if opening == "\\{":
            return _set_of(items)
        if len(items) == 1:
            if opening == "[" and not isinstance(items[0], Grid):
                return Several("[", tuple(items))
            return items[0]
        scalars = [item for item in items if isinstance(item, Scalar)]
        if {opening, closing} == {"(", "]"} or {opening, closing} == {"[", ")"}:
            if len(scalars) != 2 or len(items) != 2:
                raise Unreadable("an interval has two ends")
            return Region((Piece(scalars[0].value, scalars[1].value, opening == "(", closing == ")"),))
        return Several("(" if opening in ("(", "\\langle") else "[", tuple(items))

    def _set_builder(self, inside: Tokens) -> Value:
        r"""`\{x \mid x > 3\}`, `\{x \in \mathbb{R} : x \ne 0\}` are what the condition says."""
        (_, _), *conditions = _split(inside, lambda token: token.text in ("|", ":"))
        if len(conditions) != 1:
            raise Unreadable("a set with more than one condition mark")
        return self.listed(conditions[0][0])

    def _environment(self, found: Tokens) -> Value:
        name = "".join(token.text for token in found[1:4]).strip("{}*")
        last = len(found) - 1
        while last > 0 and found[last].text != "\\end":
            last -= 1
        end = "".join(token.text for token in found[last:])
        body = found[4:last]
        if name == "cases":
            return self.listed([token for token in body if token.text != "&"])
        if name not in _MATRICES or not end.startswith("\\end{" + name) or not end.endswith("}"):
            raise Unknown(f"the environment {name} is not known")
        if name == "array" and body and body[0].text == "{":
            body = body[next(i for i, token in enumerate(body) if token.text == "}") + 1 :]
        rows = [row for row, _ in _split(body, lambda token: token.text == "\\\\") if row]
        cells = tuple(tuple(self.related(cell) for cell, _ in _split(row, lambda t: t.text == "&")) for row in rows)
        if not cells or len({len(row) for row in cells}) > 1:
            raise Broken("the rows of the matrix differ in length")
        if name in ("vmatrix", "Vmatrix"):
            return Scalar(sympy.Matrix([[expression_of(cell) for cell in row] for row in cells]).det())
        return Grid(cells)

    def _ratio(self, found: Tokens) -> Value:
        sides = [part for part, _ in _split(found, lambda token: token.text == ":")]
        after = [token.kind in ("text", "run") and token.text.lower() in ("am", "pm") for token in sides[-1]]
        clock = len(sides) == 2 and all(re.fullmatch(r"\d\d?", side[0].text) for side in sides if side)
        if any(after) and clock:
            late = sides[-1][after.index(True)].text.lower() == "pm"
            hour, minute = int(sides[0][0].text) % 12 + 12 * late, int(sides[1][0].text)
            return Ratio((sympy.Integer(hour), sympy.Integer(minute)), is_clock=True)
        parts = tuple(self._quantity(side).value for side in sides)
        clock = clock and len(sides[1][0].text) == 2 and int(sides[1][0].text) < 60 and int(sides[0][0].text) < 24
        return Ratio(parts, is_clock=clock)


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _phrase(found: Tokens) -> Value | None:
    """The tokens as a word or phrase, or as the number they say; None where they are mathematics or several answers."""
    letters = [token for token in found if token.kind in ("run", "text")]
    if not letters or any(token.kind not in ("run", "text") and token.text not in "-'.~?!\"" for token in found):
        return None
    wordy = [token for token in letters if is_word(token.text) or (token.kind == "text" and len(token.text) > 1)]
    if not wordy:
        return None
    number = leading_words(found)
    if number is not None and number[1] == len(found):
        return quantity(found, Flags())
    is_list = len(letters) < 5 and any(_is_separator(token) for token in found[1:-1])
    if number is not None or is_list:
        return None
    text = plain(found)
    return _SAME_PHRASES.get(text) or Word(text)


def _signs(found: Tokens) -> list[Tokens]:
    r"""The two readings of an expression with `\pm`, upper signs and lower signs; a set of such keeps them inside."""
    texts = {token.text for token in found}
    if not texts & {"\\pm", "\\mp"} or (_enclosed(found) and found[0].text == "\\{"):
        return [found]
    if any(token.text == "\\{" for token in found):
        return [found]
    upper, lower = {"\\pm": "+", "\\mp": "-"}, {"\\pm": "-", "\\mp": "+"}
    return [[Token("sign", sign[t.text], t.gap) if t.text in sign else t for t in found] for sign in (upper, lower)]


# ── relations ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _mark(mark: str) -> list[Token]:
    return [Token("sign", mark, False)] if mark else []


def _check_chain(values: list[Value], links: list[str]) -> None:
    """Raise unless the constants of a chain are equal, or round to the decimal after an approximate sign."""
    constants = [v for v in values if isinstance(v, Scalar) and not v.value.free_symbols]
    for i, (a, b) in enumerate(pairwise(constants)):
        approximate = len(constants) == len(values) and i < len(links) and links[i] == "~"
        if same(a.value, b.value) or (a.unit and b.unit and a.unit != b.unit):
            continue
        if not (approximate and b.value.is_Rational and rounds_to(a.value, b.value, b.places or 0)):
            raise Broken("its sides are not equal")


def _is_domain(value: Value) -> bool:
    r"""Whether an item only says where a variable lives, as `k \in \mathbb{Z}` does."""
    return (
        isinstance(value, Named) and isinstance(value.value, Scalar) and str(value.value.value).startswith("\\mathbb")
    )


def _set_of(items: list[Value]) -> Value:
    """A set: equal elements count once; a set of one condition is what the condition says."""
    unique: list[Value] = []
    for item in items:
        if not (isinstance(item, Scalar) and any(isinstance(u, Scalar) and same(u.value, item.value) for u in unique)):
            unique.append(item)
    return Several("{", tuple(unique))
