import re
import time
from pathlib import Path

import pytest
import yaml

from heterorl.data.equality.verdict import equal, why_unreadable
from heterorl.data.equality.words import why_no_answer

PAIRS = yaml.safe_load((Path(__file__).parent / "pairs.yaml").read_text())


def of(verdict: str) -> list:
    return [
        pytest.param(gold, answer, id=f"{kind}: {gold} / {answer}".encode("unicode_escape").decode())
        for kind, pairs in PAIRS.items()
        for gold, answer in pairs[verdict]
    ]


@pytest.mark.parametrize(("gold", "answer"), of("equal"))
def test_answers_that_say_the_same_are_equal(gold: str, answer: str) -> None:
    assert equal(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), of("different"))
def test_answers_that_say_something_else_are_not(gold: str, answer: str) -> None:
    assert not equal(gold, answer)


def test_every_kind_has_eight_pairs_of_each_verdict() -> None:
    assert not [kind for kind, pairs in PAIRS.items() if min(len(pairs["equal"]), len(pairs["different"])) < 8]


def test_ordinary_comparisons_take_at_most_ten_milliseconds_of_cpu_on_average() -> None:
    pairs = [pair for kind in PAIRS.values() for pairs in kind.values() for pair in pairs]
    ordinary = [pair for pair in pairs if not re.search(r"\\(int|sum|choose)", pair[1])]
    equal(r"\frac{x^2}{3}", "x")  # imports
    started = time.process_time()
    for gold, answer in ordinary:
        equal(gold, answer)
    assert time.process_time() - started < 0.01 * len(ordinary)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("12", "5+7"),
        ("12", "3 \\cdot 4"),
        ("12", "\\frac{24}{2}"),
        ("12", "24/2"),
        ("12", "x=5+7"),
        ("12", "2^2 \\cdot 3"),
        ("12", "\\sqrt{144}"),
        ("12", "12+0"),
        ("12", "13-1"),
        ("-3", "2-5"),
        ("0.5", "\\frac{1}{4}+\\frac{1}{4}"),
        ("1, 2", "1, 1+1"),
        ("120", "5!"),
        ("12", "(3)(4)"),
        ("\\frac{1}{6}", "\\frac{1}{2}\\cdot\\frac{1}{3}"),
        ("\\frac{1}{6}", "1/2/3"),
        ("12", "\\frac{6}{\\frac{1}{2}}"),
    ],
)
def test_where_a_value_is_required_a_computation_is_none(gold: str, answer: str) -> None:
    assert equal(gold, answer)
    assert not equal(gold, answer, require_value=True)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("12", "12.0"),
        ("12", "+12"),
        ("12", "\\text{12 apples}"),
        ("12", "x = 12"),
        ("12", "5+7=12"),
        ("12", "\\mathbf{12}"),
        ("12", "twelve"),
        ("-3", "−3"),
        ("0.5", "\\frac{1}{2}"),
        ("\\frac{1}{2}", "0.5"),
        ("\\frac{1}{3}", "\\frac{2}{6}"),
        ("\\frac{7}{3}", "2\\frac{1}{3}"),
        ("\\frac{1}{3}", "0.\\overline{3}"),
        ("1200", "1.2e3"),
        ("1200", "1.2 \\times 10^{3}"),
        ("5", "101_2"),
        ("\\$18", "18.00"),
        ("50\\%", "\\frac{1}{2}"),
        ("1, 2", "2, 1"),
        ("2\\sqrt{3}", "\\sqrt{12}"),  # no reference that is a numeral
        ("x^2-1", "(x-1)(x+1)"),
        ("5+7", "12"),
    ],
)
def test_where_a_value_is_required_a_value_is_right_however_it_is_written(gold: str, answer: str) -> None:
    assert equal(gold, answer, require_value=True)


@pytest.mark.parametrize(
    "gold",
    [
        "72",
        "-3.5",
        "1e22",
        "1e+22",
        "\\frac{14}{3}",
        "0.\\overline{27}",
        "\\sqrt[5]{7}",
        "south",
        "false",
        "否",
        "\\text{June 20}",
        "\\text{neither even nor odd}",
        "(3, 4]",
        "\\{1\\pm\\sqrt{5},-2\\}",
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        "x \\equiv 3 \\pmod 5",
        "1, 2, \\ldots, n",
        "\\int_0^1 x^2 \\, dx",
        "\\emptyset",
        "None of these",
        "\\text{(C)}",
        "12:30",
        "2500\\text{ dollars}",
    ],
)
def test_a_reference_that_says_something_loads(gold: str) -> None:
    assert why_no_answer(gold) is None
    assert why_unreadable(gold) is None
    assert equal(gold, gold)


@pytest.mark.parametrize(
    ("gold", "why"),
    [
        ("", "is empty"),
        ("$$", "is empty"),
        ("\\ ", "is empty"),
        ("Proof.", "says that there is no answer"),
        ("\\text{N/A}", "says that there is no answer"),
        ("n/a", "says that there is no answer"),
        ("Unknown", "says that there is no answer"),
        ("NaN", "says that there is no answer"),
        ("nan", "says that there is no answer"),
        ("null", "says that there is no answer"),
        ("not available", "says that there is no answer"),
        ("See solution.", "says that there is no answer"),
        ("???", "says that there is no answer"),
        ("-", "says that there is no answer"),
        ("证明略", "says that there is no answer"),
        ("We show that the sum of two odd numbers is even, so the claim holds for all n.", "is prose"),
        ("Proof: let $n$ be even. Then $n=2k$.", "is prose"),
        ("She sells 9 eggs. They bring in $18.", "is prose"),
        ("the answer depends on how many apples there were in the basket", "is prose"),
        ("\\frac{1}{", "cannot be read"),
        ("\\frac{1}", "cannot be read"),
        ("5x+", "cannot be read"),
        ("}4{", "cannot be read"),
        ("3 =", "cannot be read"),
        ("7=4", "cannot be read"),
        ("\\begin{pmatrix} 1 & 2 \\\\ 3 \\end{pmatrix}", "cannot be read"),
    ],
)
def test_a_reference_that_says_no_answer_is_refused_with_a_reason(gold: str, why: str) -> None:
    assert (why_no_answer(gold) or why_unreadable(gold) or "").startswith(why)


@pytest.mark.parametrize(
    "odd",
    [
        "{" * 500,
        "(" * 500 + "1" + ")" * 500,
        "[" * 499,
        "\\frac" * 200,
        "\\sqrt" * 200 + "2",
        "^" * 300,
        "1" + "^{2" * 100 + "}" * 100,
        "9^{9^{9^{9}}}",
        "(10^{9})!",
        "\\binom{10^9}{5\\cdot 10^8}",
        "1e999999999",
        "10^{-10^{10}}",
        "2^{2^{2^{2^{2^2}}}}",
        "1/0",
        "0^{-1}",
        "\\log 0",
        "\\frac{x}{0}",
        "-" * 900 + "1",
        "1," * 490,
        "\\begin{pmatrix}" * 60,
        "\\boxed{" * 100,
        "|" * 301,
        "x" * 900,
        "\\" * 999,
        "\x00\ud7ff",
        "_" * 100,
        "0." + "\\overline{3}" * 60,
        "1" * 990,
        "√" * 300,
    ],
)
def test_no_input_crashes_or_earns_a_reward(odd: str) -> None:
    assert not equal("4", odd)
    assert not equal(odd, "4")
    assert isinstance(why_no_answer(odd) or why_unreadable(odd), str | None)
