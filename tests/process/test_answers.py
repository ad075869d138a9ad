import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from heterorl.data.answers import AnswerChecker, extract_boxed


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker(time_limit_s=20) as checker:  # a busy machine must not decide these tests
        yield checker


HURRY_S = 1.0


@pytest.fixture(scope="module")
def hurried() -> Iterator[AnswerChecker]:
    with AnswerChecker(time_limit_s=HURRY_S) as checker:
        yield checker


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{3}, no: \boxed{ 5 }.", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),  # escaped braces need no partner
        (r"\boxed {7}", "7"),
        (r"\boxed{8} then \boxed{\frac{1}{2", "8"),  # cut off by the length limit
        (r"} } \boxed{9} {", "9"),
        (r"\boxed{\boxed{6}}", "6"),
        (r"\boxed{}", ""),
        ("46", None),
        (r"\fbox{5}", "5"),
        (r"\boxed{4} or rather \fbox{5}", "5"),
        (r"\fbox{\boxed{6}}", "6"),
        (r"\boxed{4}, that is \boxed{}", ""),  # the last box counts, also when it is empty
        (r"\boxed 4", None),
        (r"\boxed{4", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(text: str, expected: str | None) -> None:
    assert extract_boxed(text) == expected


def test_many_open_boxes_take_linear_time() -> None:
    started = time.perf_counter()
    assert extract_boxed(r"\boxed{" * 200_000) is None
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("72", "72"),
        ("1,080", "1080"),
        ("-7", "-7"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{14}{3}", r"\dfrac{28}{6}"),
        ("x^2-1", "(x-1)(x+1)"),
        (r"90^\circ", "90"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\$18.90", "18.90"),
        ("(3,4]", r"\left(3, 4\right]"),
        ("4", "$4$"),
        ("72", "72."),
        (r"\frac{1}{2}", r"0.5\,."),
        ("0.5", r"\left.\frac{1}{2}\right."),
        ("4", "x = 4"),
    ],
)
def test_equal_answers_in_another_form_are_equal(checker: AnswerChecker, gold: str, answer: str) -> None:
    assert checker.equal(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("72", "27"),
        (r"\frac{1}{2}", "0.51"),
        ("4", "3, 4, 5"),
        ("4", "4} 5"),  # would close its own box
        ("4", ""),
        ("", ""),
        ("4", "{"),
        ("4", "\\"),
        ("4", "seven"),
        ("4", "9" * 5000),
        ("(3,4)", "(3,4]"),
        ("x=4", "y=4"),
    ],
)
def test_different_or_broken_answers_are_wrong(checker: AnswerChecker, gold: str, answer: str) -> None:
    assert not checker.equal(gold, answer)


def test_without_a_box_only_the_raw_template_has_an_answer(checker: AnswerChecker) -> None:
    assert not checker.check("46", "46")
    with AnswerChecker(boxed_only=False) as raw:
        assert raw.check("46", " 46\n")
        assert raw.check("46", r"23+23 is \boxed{46}")
        assert not raw.check("46", "47")


@pytest.mark.parametrize("empty", [r"\boxed{}", r"\boxed{4} \boxed{ }", r"\fbox{}", r"\boxed{\,}", r"\boxed{$$}"])
def test_an_empty_box_is_no_answer(checker: AnswerChecker, empty: str) -> None:
    assert not checker.check("4", empty)


@pytest.mark.parametrize("gold", ["72", r"\frac{14}{3}", "east", "1" * 5000, "1e+22", r"0.\overline{3}"])
def test_a_reference_that_can_be_compared_loads(checker: AnswerChecker, gold: str) -> None:
    assert checker.why_no_reference(gold) is None


@pytest.mark.parametrize(
    ("gold", "why"),
    [
        (r"\frac{1}{", "cannot be read: a brace is never closed"),
        ("", "is empty"),
        ("N/A", "says that there is no answer"),
        ("(" * 20_000 + "1" + ")" * 20_000, "has 40001 characters, more than an answer's 1000"),
    ],
)
def test_a_reference_that_cannot_be_compared_is_refused_with_a_reason(
    checker: AnswerChecker, gold: str, why: str
) -> None:
    assert checker.why_no_reference(gold) == why


def test_integers_of_any_length_are_compared_digit_by_digit(checker: AnswerChecker) -> None:
    digits = "9" * 5000
    assert checker.equal(digits, f"{int(digits[:3]):,}{digits[3:]}")
    assert checker.equal(digits, "+00" + digits)
    assert checker.equal("-0", "0")
    assert not checker.equal(digits, digits[:-1] + "8")
    assert not checker.equal(digits, "-" + digits)


def test_what_prints_as_an_integer_may_be_a_list(checker: AnswerChecker) -> None:
    assert checker.equal("100,200", "200,100")
    assert not checker.equal("100,200", "200,101")


def test_where_a_value_is_required_a_computation_earns_nothing(checker: AnswerChecker) -> None:
    assert checker.equal("12", "5+7")
    assert not checker.equal("12", "5+7", require_value=True)
    assert not checker.check("12", r"\boxed{5+7}", require_value=True)
    assert checker.equal("12", "12.0", require_value=True)
    with AnswerChecker(time_limit_s=20, require_value=True) as strict, AnswerChecker(require_value=False) as lenient:
        assert not strict.equal("12", "5+7")
        assert lenient.equal("12", "5+7", require_value=True)


def test_integers_and_identical_texts_start_no_worker() -> None:
    workers = children_of(os.getpid(), "heterorl.data.equality.verdict.equal")
    with AnswerChecker() as checker:
        started = time.perf_counter()
        for number in range(1000):
            assert checker.check("500", rf"\boxed{{{number}}}") == (number == 500)
        assert checker.check(r"\sqrt{2}", r"\boxed{ \sqrt{2} }")
        assert time.perf_counter() - started < 1
        assert children_of(os.getpid(), "heterorl.data.equality.verdict.equal") == workers


@pytest.mark.parametrize("huge", ["9^{9^{9}}", "(" * 300 + "1" + ")" * 300, "(1000000)!", "1e999999999", "9" * 5000])
def test_what_is_too_large_to_be_an_answer_is_wrong_at_once(checker: AnswerChecker, huge: str) -> None:
    cut_off = checker.cut_off
    assert not checker.equal("4", huge)
    assert checker.cut_off == cut_off


@pytest.mark.parametrize(
    "hostile",
    [
        r"\int 9^{9^{9^9}} \, dx",  # one integer power: minutes inside C, deaf to Python's signals
        r"\prod_{n=1}^{100000000} n",
        r"\sum_{n=1}^{10^8} \frac{1}{n^2+1}",
    ],
)
def test_hostile_latex_is_cut_off_in_time(hurried: AnswerChecker, hostile: str) -> None:
    assert hurried.equal(r"\frac{1}{2}", "0.5")  # the worker is up, and the last cut-off did not harm it
    cut_off = hurried.cut_off
    started = time.perf_counter()
    assert not hurried.equal("4", hostile)
    assert HURRY_S <= time.perf_counter() - started < HURRY_S + 1.5
    assert hurried.cut_off == cut_off + 1
    assert hurried.equal(r"\frac{1}{4}", f"0.25{'0' * hurried.cut_off}")


def test_threads_may_share_a_checker(checker: AnswerChecker) -> None:
    verdicts: dict[int, bool] = {}

    def judge(number: int) -> None:
        verdicts[number] = checker.equal(rf"\frac{{{number}}}{{4}}", f"{number / 4 if number % 2 else number}")

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {number: bool(number % 2) for number in range(1, 9)}


def test_a_killed_worker_is_replaced(checker: AnswerChecker) -> None:
    assert checker.equal(r"\frac{1}{8}", "0.125")
    for worker in children_of(os.getpid(), "heterorl.data.equality.verdict.equal"):
        worker.kill()
    assert checker.equal(r"\frac{3}{8}", "0.375")


def test_the_worker_leaves_with_its_parent_and_holds_no_torch() -> None:
    script = (
        "import json, sys, psutil\n"
        "from heterorl.data.answers import AnswerChecker\n"
        "checker = AnswerChecker(5)\n"
        "assert checker.equal('1/2', '0.5')\n"
        "workers = psutil.Process().children(recursive=True)\n"
        "maps = [m.path for w in workers for m in w.memory_maps()]\n"
        "print(json.dumps([[w.pid for w in workers], any('torch' in path for path in maps)]), flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids, has_torch = json.loads(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert len(pids) == 2
    assert not has_torch
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not alive


def children_of(pid: int, name: str) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if name in child.cmdline()]
