"""The benchmarks' own arithmetic: rounds, gates, bad surroundings, and how results are merged."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.benchmark import (
    Benchmark,
    CannotMeasure,
    GateFailed,
    Pair,
    Surroundings,
    Target,
    at_least,
    at_most,
    subjects,
)
from bench.measure import QUICK_MOST, QUICK_ROUNDS, Outcome, measure
from bench.page import Origin, _order, figure, merge, put, table

HALF = at_most(0.5)

subjects()  # now, since torch, which some import, asks a process for its libraries


@pytest.fixture(scope="module", autouse=True)
def nothing_old_to_collect() -> Iterator[None]:
    """Each round collects garbage first: here it passes over what the other tests of the process have made."""
    gc.freeze()
    yield
    gc.unfreeze()


def a_benchmark(
    ours: Callable[[], float] = lambda: 1.0,
    peer: Callable[[], float] = lambda: 2.0,
    gate: Callable[[], None] = lambda: None,
    *,
    target: Target = HALF,
    memory_gb: float = 0.0,
    disk_gb: float = 0.0,
    gate_warms: bool = False,
) -> Benchmark:
    @contextmanager
    def prepare(at: Surroundings) -> Iterator[Pair]:
        (at.folder / "file").write_text("")
        yield Pair(ours, peer, gate)

    return Benchmark(
        *("1-test", "what", "the peer", target, "equal", "limit", "matrices are slow here", prepare, "s"),
        memory_gb=memory_gb,
        disk_gb=disk_gb,
        gross=target.gross(),
        apart="",
        quick=True,
        gate_warms=gate_warms,
    )


def test_ours_and_the_peer_are_measured_in_turn_and_the_rounds_to_warm_up_do_not_count(tmp_path):
    calls: list[str] = []
    durations = iter([100.0, 100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])

    def ours() -> float:
        calls.append("ours")
        return next(durations)

    def peer() -> float:
        calls.append("peer")
        return 2.0

    outcome = measure(a_benchmark(ours, peer), tmp_path, quick=False)
    assert calls == ["ours", "peer"] * 9
    assert outcome.ratios == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert outcome.median == 2.0
    assert list(tmp_path.iterdir()) == []


def test_a_gate_that_runs_both_as_they_are_measured_is_the_first_round_to_warm_up(tmp_path):
    durations = iter([100.0, *range(1, 8)])
    outcome = measure(a_benchmark(lambda: next(durations), lambda: 1.0, gate_warms=True), tmp_path, quick=False)
    assert outcome.ratios == [1, 2, 3, 4, 5, 6, 7]


def test_the_median_is_that_of_the_ratios_and_not_the_ratio_of_the_medians(tmp_path):
    ours, peer = iter([1.0, 1.0, 1.0, 4.0, 9.0] + [9.0] * 4), iter([1.0, 1.0, 1.0, 2.0, 3.0] + [3.0] * 4)
    outcome = measure(a_benchmark(lambda: next(ours), lambda: next(peer)), tmp_path, quick=False)
    assert outcome.ratios == [1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert (outcome.median, outcome.ours_median, outcome.peer_median) == (3.0, 9.0, 3.0)


def _refuse() -> None:
    raise GateFailed("token 3 is 7, not 8")


def _differ() -> None:
    raise AssertionError("Mismatched elements: 1 / 4")


def _not_here() -> None:
    raise CannotMeasure("there is no GPU")


def _full() -> None:
    raise OSError(28, "No space left on device")


def _broken() -> None:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("gate", "state", "words"),
    [
        (_refuse, "failed", "the gate (equal) failed: token 3 is 7, not 8"),
        (_differ, "failed", "Mismatched elements"),
        (_broken, "failed", "KeyError"),
        (_not_here, "not measured", "there is no GPU"),
        (_full, "not measured", "No space left on device"),
    ],
)
def test_nothing_is_measured_after_a_gate_that_did_not_pass(tmp_path, gate, state, words):
    def never() -> float:
        raise AssertionError("measured")

    outcome = measure(a_benchmark(never, never, gate), tmp_path, quick=False)
    assert outcome.gate == state
    assert words in outcome.why
    assert "\n" not in outcome.why
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("needs", "word"), [({"memory_gb": 1e6}, "memory"), ({"disk_gb": 1e9}, "disk")])
def test_too_little_room_is_one_line_before_anything_is_prepared(tmp_path, needs, word):
    outcome = measure(a_benchmark(**needs), tmp_path, quick=False)
    assert outcome.gate == "not measured"
    assert word in outcome.why


def test_a_quick_run_goes_on_measuring_while_it_misses_its_bound(tmp_path):
    slow, calm = iter([9.0, 9.0, 9.0, 9.0] + [0.1] * 9), iter([0.1] * 13)
    missed_at_first = measure(a_benchmark(lambda: next(slow), lambda: 1.0), tmp_path, quick=True)
    assert missed_at_first.median == pytest.approx(0.1)
    assert len(measure(a_benchmark(lambda: next(calm), lambda: 1.0), tmp_path, quick=True).ratios) == QUICK_ROUNDS
    assert len(measure(a_benchmark(lambda: 9.0, lambda: 1.0), tmp_path, quick=True).ratios) == QUICK_MOST


def test_targets_bound_costs_from_above_and_yields_from_below():
    assert at_most(0.5).is_met(0.5)
    assert not at_most(0.5).is_met(0.51)
    assert at_least(2).is_met(2.0)
    assert not at_least(2).is_met(1.99)
    assert (at_most(0.5).gross(), at_least(2).gross()) == (at_most(1.0), at_least(1.0))


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────
OLD, NEW = Origin("aaaaaaa", "two cores", "make bench"), Origin("bbbbbbb", "four cores", "make bench")
PASSED = Outcome("1-test", "passed", ours=(1.0, 2.0, 3.0), peer=(10.0, 10.0, 10.0))


def test_a_row_has_the_median_and_the_range_and_says_whether_the_target_is_met():
    row = merge(a_benchmark(target=at_most(0.2)), None, PASSED, OLD)
    assert (
        row
        | {
            **{"id": "1-test", "what": "what", "peer": "the peer", "target": 0.2, "met": True},
            **{"median": 0.2, "min": 0.1, "max": 0.3, "gate": "passed: equal", "commit": "aaaaaaa"},
        }
        == row
    )
    assert merge(a_benchmark(target=at_most(0.1)), None, PASSED, OLD)["met"] is False


def test_a_row_stays_when_it_was_not_measured_again_or_could_not_be():
    before = merge(a_benchmark(), None, PASSED, OLD)
    assert merge(a_benchmark(), before, None, NEW) == before
    assert merge(a_benchmark(), before, Outcome("1-test", "not measured", "no room"), NEW) == before


def test_a_failed_gate_replaces_what_was_measured_before():
    before = merge(a_benchmark(), None, PASSED, OLD)
    row = merge(a_benchmark(), before, Outcome("1-test", "failed", "token 3 differs"), NEW)
    assert (row["median"], row["met"], row["gate"]) == (None, False, "failed: token 3 differs")


def test_a_row_that_could_not_be_measured_the_first_time_says_why():
    never = merge(a_benchmark(), None, None, OLD)
    row = merge(a_benchmark(), never, Outcome("1-test", "not measured", "there is no GPU"), OLD)
    assert row["gate"] == "not measured: there is no GPU"


def test_the_table_says_why_a_target_is_missed_and_nothing_where_it_is_met():
    missed, met = (merge(a_benchmark(target=at_most(bound)), None, PASSED, OLD) for bound in (0.1, 0.5))
    assert "- 1-test: matrices are slow here" in table([missed], {"1-test": a_benchmark()}).splitlines()
    assert "matrices" not in table([met], {"1-test": a_benchmark()})


def test_each_row_is_recorded_before_the_next_is_measured(monkeypatch):
    recorded: list[str] = []

    def interrupted(*args: object, **options: object) -> Iterator[Outcome]:
        yield Outcome("8-bytes", "passed", ours=(1.0,), peer=(2.0,))
        assert recorded == ["8-bytes"]
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.__main__.measured", interrupted)
    monkeypatch.setattr("bench.__main__.record", lambda _, outcomes, origin: recorded.extend(outcomes))
    monkeypatch.setattr("bench.__main__.Origin.here", lambda command: OLD)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        main(["8-bytes", "8-time"])


def test_a_row_that_was_never_measured_says_so():
    never = merge(a_benchmark(), None, None, OLD)
    without_gpu = merge(a_benchmark(), None, Outcome("1-test", "not measured", "there is no GPU"), OLD)
    assert (never["gate"], never["median"], never["met"]) == ("not measured", None, None)
    assert without_gpu["gate"] == "not measured: there is no GPU"
    assert "| not measured: there is no GPU |" in table([without_gpu], {"1-test": a_benchmark()})


def test_the_table_says_below_which_commit_and_machine_each_row_is_from():
    rows = [merge(a_benchmark(), None, PASSED, OLD)]
    assert "- `aaaaaaa`, two cores, `make bench`: 1-test" in table(rows, {"1-test": a_benchmark()})


def test_rows_are_in_the_order_of_their_numbers_and_words_come_last():
    ids = ["2", "2b", "3", "8-bytes", "8-time", "11-pick", "11b", "12", "gpu-mfu", "gpu-tokens"]
    assert sorted(sorted(ids), key=_order) == ids


def test_a_section_is_replaced_and_the_rest_of_the_page_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: begin -->\nold\n<!-- a: end -->\nafter\n")
    put(page, "a", "new")
    assert page.read_text() == "before\n<!-- a: begin -->\nnew\n<!-- a: end -->\nafter\n"
    with pytest.raises(ValueError, match="has no section 'b'"):
        put(page, "b", "new")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.0123, "s", "12.3 ms"), (2.5, "s", "2.5 s"), (22_400, "B", "22.4 kB"), (3.2e9, "B", "3.2 GB")],
)
def test_figures_are_shown_in_a_unit_of_their_size(value, unit, text):
    assert figure(value, unit) == text


def test_an_unknown_id_and_a_folder_that_cannot_be_written_are_one_line_each(tmp_path, capsys):
    assert main(["99-none"]) == 2
    assert main(["8-bytes", "--dir", str(Path(tmp_path / "absent"))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("there is no benchmark 99-none; there are ")
    assert lines[1].endswith("is not a folder that can be written: name another with DIR or --dir")
