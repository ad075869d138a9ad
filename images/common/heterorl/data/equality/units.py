"""Units: what each measures, by which factor, with SI prefixes; other words after a number are what is counted."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

from heterorl.data.equality.tokens import Token, Unreadable

Dimensions = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unit:
    """A unit: the factor to the base of its dimensions, and the nouns that it counts (`24 marbles`)."""

    factor: Fraction = Fraction(1)
    dimensions: Dimensions = ()
    nouns: frozenset[str] = frozenset()
    kind: str = ""
    """percent or degree: a pure number, written with a sign."""

    def __bool__(self) -> bool:
        return bool(self.dimensions or self.nouns or self.kind)

    def times(self, other: Unit, power: int = 1) -> Unit:
        """This unit times a power of another."""
        exponents = dict(self.dimensions)
        for base, exponent in other.dimensions:
            exponents[base] = exponents.get(base, 0) + power * exponent
        dimensions = tuple(sorted((base, exponent) for base, exponent in exponents.items() if exponent))
        factor = self.factor * other.factor**power
        is_temperature = any(base in ("celsius", "fahrenheit") for base, _ in dimensions)  # `degrees Celsius`
        return Unit(factor, dimensions, self.nouns | other.nouns, "" if is_temperature else self.kind or other.kind)


_PREFIXES = {
    **{"nano": ("n", -9), "micro": ("μ", -6), "milli": ("m", -3), "centi": ("c", -2), "deci": ("d", -1)},
    **{"kilo": ("k", 3), "mega": ("M", 6), "giga": ("G", 9), "tera": ("T", 12)},
}
# dimension or (dimensions): symbol or symbols, names; factor to the base
_METRIC: list[tuple[str, str, dict[str, int], Fraction]] = [
    ("m", "meter metre", {"length": 1}, Fraction(1)),
    ("g", "gram gramme", {"mass": 1}, Fraction(1, 1000)),
    ("s", "second", {"time": 1}, Fraction(1)),
    ("L l", "liter litre", {"length": 3}, Fraction(1, 1000)),
    ("A", "ampere amp", {"current": 1}, Fraction(1)),
    ("mol", "mole", {"amount": 1}, Fraction(1)),
    ("K", "kelvin", {"temperature": 1}, Fraction(1)),
    ("Hz", "hertz", {"time": -1}, Fraction(1)),
    ("N", "newton", {"mass": 1, "length": 1, "time": -2}, Fraction(1)),
    ("Pa", "pascal", {"mass": 1, "length": -1, "time": -2}, Fraction(1)),
    ("J", "joule", {"mass": 1, "length": 2, "time": -2}, Fraction(1)),
    ("W", "watt", {"mass": 1, "length": 2, "time": -3}, Fraction(1)),
    ("C", "coulomb", {"current": 1, "time": 1}, Fraction(1)),
    ("V", "volt", {"mass": 1, "length": 2, "time": -3, "current": -1}, Fraction(1)),
    ("Ω", "ohm", {"mass": 1, "length": 2, "time": -3, "current": -2}, Fraction(1)),
    ("eV", "electronvolt", {"energy of a charge": 1}, Fraction(1)),
    ("Wh", "watthour", {"mass": 1, "length": 2, "time": -2}, Fraction(3600)),
    ("cal", "calorie", {"mass": 1, "length": 2, "time": -2}, Fraction(4184, 1000)),
    ("B", "byte", {"information": 1}, Fraction(8)),
    ("bit", "bit", {"information": 1}, Fraction(1)),
]
_OTHERS: list[tuple[str, dict[str, int], Fraction]] = [
    ("sec secs", {"time": 1}, Fraction(1)),
    ("min mins minute", {"time": 1}, Fraction(60)),
    ("h hr hrs hour", {"time": 1}, Fraction(3600)),
    ("day days d", {"time": 1}, Fraction(86400)),
    ("week wk wks", {"time": 1}, Fraction(604800)),
    ("fortnight", {"time": 1}, Fraction(1209600)),
    ("month", {"months": 1}, Fraction(1)),
    ("year yr yrs", {"months": 1}, Fraction(12)),
    ("decade", {"months": 1}, Fraction(120)),
    ("century centuries", {"months": 1}, Fraction(1200)),
    ("inch in inches", {"length": 1}, Fraction(254, 10000)),
    ("foot ft feet", {"length": 1}, Fraction(3048, 10000)),
    ("yard yd yds", {"length": 1}, Fraction(9144, 10000)),
    ("mile mi", {"length": 1}, Fraction(1609344, 1000)),
    ("hectare ha", {"length": 2}, Fraction(10000)),
    ("acre", {"length": 2}, Fraction(40468564224, 10000000)),
    ("gallon gal", {"length": 3}, Fraction(3785411784, 10**12)),
    ("quart qt", {"length": 3}, Fraction(946352946, 10**12)),
    ("pint pt", {"length": 3}, Fraction(473176473, 10**12)),
    ("cup", {"length": 3}, Fraction(2365882365, 10**13)),
    ("cc", {"length": 3}, Fraction(1, 10**6)),
    ("tablespoon tbsp", {"length": 3}, Fraction(2365882365, 16 * 10**13)),
    ("teaspoon tsp", {"length": 3}, Fraction(2365882365, 48 * 10**13)),
    ("pound lb lbs", {"mass": 1}, Fraction(45359237, 10**8)),
    ("ounce oz", {"mass": 1}, Fraction(45359237, 16 * 10**8)),
    ("tonne", {"mass": 1}, Fraction(1000)),
    ("ton", {"tons": 1}, Fraction(1)),
    ("mph", {"length": 1, "time": -1}, Fraction(1609344, 3600000)),
    ("kph kmph kmh", {"length": 1, "time": -1}, Fraction(1000, 3600)),
    ("rpm", {"revolutions": 1, "time": -1}, Fraction(1, 60)),
    ("dollar usd buck $", {"dollar": 1}, Fraction(1)),
    ("cent ¢", {"dollar": 1}, Fraction(1, 100)),
    ("euro eur €", {"euro": 1}, Fraction(1)),
    ("£ gbp", {"pound sterling": 1}, Fraction(1)),
    ("¥ yen yuan 元", {"yen": 1}, Fraction(1)),
    ("₹ rupee rs", {"rupee": 1}, Fraction(1)),
    ("radian rad rads", {"angle": 0}, Fraction(1)),
    ("celsius", {"celsius": 1}, Fraction(1)),
    ("fahrenheit", {"fahrenheit": 1}, Fraction(1)),
    ("米", {"length": 1}, Fraction(1)),
    ("厘米", {"length": 1}, Fraction(1, 100)),
    ("千米 公里", {"length": 1}, Fraction(1000)),
    ("千克 公斤", {"mass": 1}, Fraction(1)),
    ("克", {"mass": 1}, Fraction(1, 1000)),
    ("小时", {"time": 1}, Fraction(3600)),
    ("分钟", {"time": 1}, Fraction(60)),
    ("秒", {"time": 1}, Fraction(1)),
    ("天", {"time": 1}, Fraction(86400)),
]
NO_UNIT = Unit()
PERCENT = Unit(kind="percent")
DEGREE = Unit(kind="degree")
"""What these two multiply by, 1/100 and pi/180, whoever compares knows."""
_SIGNED = {
    **dict.fromkeys(("percent", "percentage", "pct"), PERCENT),
    **dict.fromkeys(("degree", "degrees", "deg", "度"), DEGREE),
}
_RADIAN = Unit(kind="radian")


def _table() -> dict[str, Unit]:
    units: dict[str, Unit] = {}
    for symbols, names, exponents, factor in _METRIC:
        dimensions = tuple(sorted(exponents.items()))
        for long, (short, power) in {"": ("", 0), **_PREFIXES}.items():
            unit = Unit(factor * Fraction(10) ** power, dimensions)
            units.update({short + symbol: unit for symbol in symbols.split()})
            units.update({long + name: unit for name in names.split()})
            units.update({f"{long}{name}s": unit for name in names.split()})
    for spellings, exponents, factor in _OTHERS:
        unit = _RADIAN if "angle" in exponents else Unit(factor, tuple(sorted(exponents.items())))
        units.update(dict.fromkeys(spellings.split(), unit))
        units.update({f"{name}s": unit for name in spellings.split() if len(name) > 3})
    return {**units, **_SIGNED, "kgs": units["kg"], "cms": units["cm"], "kms": units["km"]}


UNITS = _table()
_PLAIN = frozenset(str.split("cm mm km kg mg mL ml cL dL lb oz ft hr cc"))
_SHAPES = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_FILLERS = frozenset(
    str.split(
        "in total of the a an each altogether are is left remaining all there whole full exactly only worth"
        " long away old unit units"
    )
)
_CHANGES_MEANING = frozenset(
    str.split(
        "or more less fewer than not at least most between to and plus minus times over squared cubed if when"
        " but versus vs mod modulo no none except without half factorial"
        " from into by until till through instead actually"
    )
)
_IRREGULAR = {"children": "child", "men": "man", "women": "woman", "people": "person", "mice": "mouse", "feet": "foot"}


def unit_named(name: str) -> Unit | None:
    """The unit of a name or symbol; names in any case, symbols as they are."""
    return UNITS.get(name) or (UNITS.get(name.lower()) if len(name) > 3 else None)


def begins_unit(name: str) -> bool:
    """Whether letters after a number begin a unit: its name or symbol, `square`, `cubic`."""
    return unit_named(name) is not None or name.lower() in _SHAPES


def may_be_product(name: str) -> bool:
    """Whether a unit's symbol, right after a number, may as well be a variable or two: `3m`, `2pt`, but not `3km`."""
    return len(name) <= 2 and name not in _PLAIN


def noun(word: str) -> str:
    """A noun in its singular, small letters."""
    word = word.casefold().replace(".", "")
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for plural, singular in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("sses", "ss"), ("oes", "o")):
        if word.endswith(plural) and len(word) > len(plural) + 1:
            return word.removesuffix(plural) + singular
    return word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word


@dataclass
class _Tail:
    """Reads the tokens after a number as a unit: `cm^2`, `square meters`, `km/h`, `dollars per day`, `marbles`."""

    tokens: list[Token]
    unit: Unit = field(default_factory=Unit)
    sign: int = 1
    shape: int = 1

    def read(self) -> Unit:
        position = 0
        while position < len(self.tokens):
            token = self.tokens[position]
            position += 1
            if token.text in ("/", "per"):
                self.sign = -1
            elif token.text.lower() in _SHAPES:
                self.shape = _SHAPES[token.text.lower()]
            elif token.text in ("(", ")", "{", "}", "\\cdot", "*", "-", ".", "'", ",", "~"):
                continue
            elif token.text in ("\\%", "%"):
                self.unit = self.unit.times(PERCENT)
            elif token.text == "\\mu":
                self.tokens[position] = Token("text", "μ" + self.tokens[position].text, False)
            elif token.text == "\\Omega":
                position = self._take("Ω", position)
            elif token.kind in ("run", "text") or token.text.lstrip("\\") in UNITS:
                position = self._take(token.text.lstrip("\\"), position)
            else:
                raise Unreadable(f"{token.text!r} is no unit")
        return self.unit

    def _take(self, name: str, position: int) -> int:
        unit, (power, position) = unit_named(name), self._power(position)
        follows = position < len(self.tokens) and self.tokens[position].kind in ("run", "text")
        if name == "in" and (follows or self.unit != Unit()):
            return position  # no inches: `5 apples in total`
        if unit is not None:
            self.unit = self.unit.times(unit, self.sign * self.shape * power)
            self.shape = 1
        elif name.lower() in _CHANGES_MEANING:
            raise Unreadable(f"{name!r} after a number says more than a unit")
        elif name.lower() not in _FILLERS:
            self.unit = self.unit.times(Unit(nouns=frozenset({("per " if self.sign < 0 else "") + noun(name)})))
        return position

    def _power(self, position: int) -> tuple[int, int]:
        following = "".join(token.text for token in self.tokens[position : position + 5])
        found = re.match(r"\^\{?(-?\d)\}?", following)
        if found:
            used, length = 0, 0
            while length < found.end():
                length += len(self.tokens[position + used].text)
                used += 1
            return int(found.group(1)), position + used
        word = self.tokens[position].text.lower() if position < len(self.tokens) else ""
        power = {"squared": 2, "cubed": 3}.get(word, 1)
        return power, position + (power > 1)


def unit_of(tokens: list[Token]) -> Unit:
    """The unit that the tokens after a number write; raises `Unreadable` where they say something else."""
    return _Tail(list(tokens)).read()
