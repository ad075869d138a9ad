r"""What an answer prints, in plain LaTeX: one spelling for the characters, commands and marks that print alike."""

from __future__ import annotations

import html
import re
import unicodedata

_GREEK = str.split(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho varsigma"
    " sigma tau upsilon phi chi psi omega"
)
_CHARACTERS = {
    **{chr(0x3B1 + i): f"\\{name} " for i, name in enumerate(_GREEK)},
    **{chr(0x391 + i): f"\\{name.capitalize()} " for i, name in enumerate(_GREEK) if chr(0x391 + i) in "ΓΔΘΛΞΠΣΦΨΩ"},
    **dict.fromkeys("−–—‒‐‑﹣－", "-"),
    **dict.fromkeys("×⋅·∙•∗✕⨯⊗", "\\cdot "),
    **dict.fromkeys("∕⁄÷", "/"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f", ""),
    **dict.fromkeys("“”„«»「」『』《》‘`", ""),
    **{"ϕ": "\\phi ", "ϵ": "\\epsilon ", "µ": "\\mu ", "Ω": "\\Omega ", "∆": "\\Delta "},
    **{"∞": "\\infty ", "√": "\\sqrt ", "∛": "\\sqrt[3] ", "∜": "\\sqrt[4] ", "°": "^\\circ ", "º": "^\\circ "},
    **{"≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "≃": "\\approx "},
    **{"∈": "\\in ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ", "∖": "\\setminus ", "±": "\\pm ", "∓": "\\mp "},
    **{"ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}"},
    **{"∠": "\\angle ", "△": "\\triangle ", "⟨": "\\langle ", "⟩": "\\rangle ", "′": "'", "″": "''", "’": "'"},
    **{"⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "。": ".", "｡": ".", "、": ",", "､": ","},
    **{"℃": "^\\circ C", "℉": "^\\circ F", "∧": "\\wedge ", "∨": "\\vee ", "⇒": "\\Rightarrow ", "→": "\\to "},
    **{"\u3000": " ", "\u2062": "", "𝑖": "i", "ℯ": "e", "ⅈ": "i", "∶": ":"},
}
_TABLE = str.maketrans(_CHARACTERS)
_SCRIPTS = {"^": "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "_": "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎"}
_RAISED = re.compile("|".join(f"([{characters}]+)" for characters in _SCRIPTS.values()))
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_OVERLINED = re.compile("(?:\\d[\u0304\u0305])+")
_ROOT = re.compile(r"(\\sqrt(?:\[\d\])?)\s+(\d+(?:\.\d+)?)")

_BASE = r"\d{1,2}|two|three|four|five|six|seven|eight|nine|ten|sixteen"
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in {
        r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![A-Za-z])\s*\.?": "",
        r"\\(?:begin|end)\s*\{(?:aligned|align|gathered|gather|equation|split|math|displaymath|center)\*?\}": " ",
        r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|nonumber|notag|strut|mathstrut|protect|relax"
        r"|centering|tiny|scriptsize|footnotesize|small"
        r"|normalsize|large|Large|LARGE|huge|Huge|bf|bfseries|rm|it|sf|tt|boldmath)(?![A-Za-z])": " ",
        r"\\(?:[hv]space\*?|[hv]?phantom|label|tag\*?|color)\s*\{[^{}]*\}": " ",
        r"\\(?:textcolor|colorbox|scalebox|raisebox|href|enclose)\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}": "",
        r"\\fcolorbox\s*\{[^{}]*\}\s*\{[^{}]*\}|\\bbox\s*\[[^\]]*\]": "",
        r"</?(?:b|i|u|em|strong|span|p|div|font|code)\b[^<>]*>|<br\s*/?>": " ",
        r"<sup>([^<>]*)</sup>": r"^{\1}",
        r"<sub>([^<>]*)</sub>": r"_{\1}",
        r"\\(?:d|t|c|nice|s|x)frac(?![A-Za-z])": r"\\frac",
        r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}|\A([^{}]*)\\over(?![A-Za-z])([^{}]*)\Z": r"\\frac{\1\3}{\2\4}",
        r"\\(overline|bar)\s*(\d)": r"\\\1{\2}",
        r"(?<=\d)\s*\^?\s*(?:\{\s*\\(?:text|mathrm|rm)\s*\{?(?:st|nd|rd|th)\}?\s*\}"
        r"|\\(?:text|mathrm|textsuperscript)\s*\{(?:st|nd|rd|th)\}|\{(?:st|nd|rd|th)\})": "",
        r"(?<=\d)(?:st|nd|rd|th)\b": "",
        r"(?<=\d)\s*[xX]\s*(?=10\s*\^)": r"\\cdot ",
        rf"(?<=[\dA-F])\s*[(,]?\s*(?:in\s+)?\bbase[\s-]*({_BASE})\b\)?": r"_{\1}",
        rf"(?<=[\dA-F])\s*\\text\s*\{{\s*\(?(?:in )?base ({_BASE})\)?\s*\}}": r"_{\1}",
        r"\b[Rr]s\.?\s*(?=\d)": "₹",
        r"\\[dt]binom(?![A-Za-z])": r"\\binom",
        r"\\(?:leq|leqslant)(?![A-Za-z])|<=": r"\\le ",
        r"\\(?:geq|geqslant)(?![A-Za-z])|>=": r"\\ge ",
        r"\\lt(?![A-Za-z])": "<",
        r"\\gt(?![A-Za-z])": ">",
        r"\\neq(?![A-Za-z])|!=|\\not\s*=": r"\\ne ",
        r"\\(?:times|ast|bullet|cdotp)(?![A-Za-z])": r"\\cdot ",
        r"\\div(?![A-Za-z])": "/",
        r"\\(?:varnothing|O)(?![A-Za-z])|\\text\s*\{Ø\}|Ø": r"\\emptyset ",
        r"\\(?:backslash|smallsetminus)(?![A-Za-z])": r"\\setminus ",
        r"\\var(?=(?:epsilon|phi|theta|rho|sigma|kappa|pi)(?![A-Za-z]))": r"\\",
        r"\\(?:simeq|cong|doteq)(?![A-Za-z])": r"\\approx ",
        r"\\(?:lbrace)(?![A-Za-z])": r"\\{",
        r"\\(?:rbrace)(?![A-Za-z])": r"\\}",
        r"\\lbrack(?![A-Za-z])": "[",
        r"\\rbrack(?![A-Za-z])": "]",
        r"\\(?:lparen)(?![A-Za-z])": "(",
        r"\\(?:rparen)(?![A-Za-z])": ")",
        r"\\[lr]?[vV]ert(?![A-Za-z])|\\mid(?![A-Za-z])|\\\|": "|",
        r"\\(?:prime)(?![A-Za-z])": "'",
        r"\\(?:dots|cdots|dotsc|dotsb|hdots)(?![A-Za-z])|\.\.\.+": r"\\ldots ",
        r"\b([aApP])\.\s?[mM]\b\.?": r"\1m",
        r"\\lnot(?![A-Za-z])": r"\\neg ",
        r"\\(?:degree|textdegree)(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}": r"^\\circ ",
        r"\\(?:euro|texteuro)(?![A-Za-z])": "€",
        r"\\(?:pounds|textsterling)(?![A-Za-z])": "£",
        r"\\textdollar(?![A-Za-z])": r"\\$",
        r"\\(?:mathrm|text|operatorname)\s*\{([eid])\}": r"\1",
        r"\\(?:checkmark|blacksquare|square|qed|Box)(?![A-Za-z])|[✓✔✅∎■□]": " ",
        r"\\[()]|\\\[|\\\](?!\s*\d)": " ",
        r"\\(?:quad|qquad|enspace|thinspace|medspace|thickspace|hfill|newline|linebreak)(?![A-Za-z])": " ",
    }.items()
]
_GROUPS = re.compile(
    r"(?<![\d.,])[1-9]\d{0,2}(?:(?:(?:\{,\}|,\\!|\\[,;: ]|~|'|_| )\s*\d{3})+|(?:\.\d{3}){2,})(?![\d/.,])"
)
_LINE_OF_CHAIN = re.compile("[\ue000\\s]+&?\\s*(?=[=<>]|\\\\(?:approx|leq?|geq?)(?![A-Za-z]))")
_ENTITY = re.compile(r"&(?:[A-Za-z]+\d*|#\d+);")
_HAS_CELLS = re.compile(r"matrix|array|cases")
_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
_NEW_LINE = "\ue000"
r"""Stands for `\\\\` meanwhile, whose second backslash is no command's first."""
_BLANKS = re.compile(r"\\[,;: !]|~|[\s\u00a0]+")
_BOLD = re.compile(r"(?<![\w)}\]*])(\*{1,3}|_{2})(?=[^\s*])([^*]+?)\1(?![\w*])")
_DELIMITED = re.compile(r"(?<!\\)\$\$?((?:[^$\\]|\\.)+)\$\$?", re.DOTALL)
_EMPTY = re.compile(r"(?<!\\)\$\s*\$")
_END = re.compile(r"[.,;:\s\ue000]+\Z")
_LEAD = re.compile(
    r"\A(?:\s|\\therefore(?![A-Za-z])|\\(?:Rightarrow|implies|to|Longrightarrow)(?![A-Za-z])|[=:]"
    r"|(?:the\s+)?(?:final\s+)?(?:answer|result)\s*(?:is\b|:|=)"
    r"|\\text\s*\{\s*(?:the\s+)?(?:final\s+)?(?:answer|result)\s*(?:is\b|:|=)?\s*:?\s*\}"
    r"|(?:option|choice)\s+(?=\(?[A-J]\b)"
    r"|(?:therefore|thus|hence|so)\b,?)+",
    re.IGNORECASE,
)


def printed(text: str) -> str:
    r"""The text in plain LaTeX: `√3` as `\sqrt{3}`, `½` as `\frac{1}{2}`, `**73**.` as `73`, `10\,000` as `10,000`.

    Wrappers such as `\boldsymbol{...}` stay; the tokens see through them.
    """
    text = text.replace(r"\\", _NEW_LINE)
    text = _ENTITY.sub(lambda found: html.unescape(found.group()), text)
    if not _HAS_CELLS.search(text):  # the lines of an aligned computation
        text = _LINE_OF_CHAIN.sub(" ", text).replace(r"\&", " ").replace("&", " ")
    text = _VULGAR.sub(lambda found: _vulgar_fraction(found.group()), text)
    text = _RAISED.sub(_script, text)
    text = _OVERLINED.sub(_period, text)
    text = unicodedata.normalize("NFKC", text.translate(_TABLE)).translate(_TABLE)
    text = "".join(str(unicodedata.decimal(c)) if c > "\x7f" and c.isdecimal() else c for c in text)
    text = _EMPTY.sub(" ", _DELIMITED.sub(r" \1 ", _BOLD.sub(r"\2", text)))
    text = _GROUPS.sub(_joined_by_commas, text)
    text = _DECIMAL_COMMA.sub(".", text).replace("{,}", ",")
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = _ROOT.sub(r"\1{\2}", _BLANKS.sub(lambda found: "" if found.group() == "\\!" else " ", text))
    return _END.sub("", _LEAD.sub("", text)).strip().replace(_NEW_LINE, r"\\")


def _joined_by_commas(found: re.Match[str]) -> str:
    return ",".join(re.findall(r"\d+", found.group()))


def _period(found: re.Match[str]) -> str:
    return f"\\overline{{{''.join(c for c in found.group() if c.isdigit())}}}"


def _vulgar_fraction(character: str) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", character).partition("⁄")
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def _script(found: re.Match[str]) -> str:
    mark = "^" if found.group(1) else "_"
    return f"{mark}{{{unicodedata.normalize('NFKC', found.group()).replace('−', '-')}}}"
