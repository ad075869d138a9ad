"""How the learner's ends are counted: what is charged to its budget, and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders import Clock, exchange_at, run_of
from heterorl.exchange.crash_budget import Attempts, attempts_of, gave_up, outcome_of, outcomes
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import LearnerHeartbeat
from heterorl.spec.run import FailurePolicySpec


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def exchange(tmp_path: Path, clock: Clock) -> Exchange:
    return exchange_at(tmp_path, run_of("demo"), clock=clock)


def counted(exchange: Exchange) -> tuple[int, int, int]:
    found = outcomes(attempts_of(exchange))
    return found["clean"], found["signalled"], found["crashed"]


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(0, "clean"), (-15, "signalled"), (143, "signalled"), (1, "crashed"), (2, "crashed"), (-9, "crashed")],
)
def test_an_exit_code_tells_how_ranks_ended(code, outcome):
    assert outcome_of(code) == outcome


def test_every_end_is_counted_once(exchange):
    pod = Attempts(exchange, 0, "pod-a")
    for code in (0, 1, -15, 1):
        pod.begin()
        pod.end(outcome_of(code), code)
    pod.begin()  # goes on
    assert counted(exchange) == (1, 1, 2)


def test_a_pod_that_was_told_to_go_is_not_charged_for_what_its_ranks_do_then(exchange):
    pod = Attempts(exchange, 0, "pod-a")
    pod.begin()
    pod.end("signalled")
    pod.end("crashed", 1, "too late")
    assert counted(exchange) == (0, 1, 0)


@pytest.mark.parametrize(("successor", "expected"), [("pod-a", (0, 0, 1)), ("pod-b", (0, 1, 0))])
def test_a_container_killed_under_its_pod_crashed_and_a_pod_that_is_gone_was_taken(exchange, successor, expected):
    Attempts(exchange, 0, "pod-a").begin()
    pod = Attempts(exchange, 0, successor)
    pod.settle()
    pod.settle()
    assert counted(exchange) == expected


@pytest.mark.parametrize("uid", ["pod-a", "pod-b"], ids=["of the same pod", "of a new pod"])
def test_a_launcher_that_ends_after_its_successor_began_leaves_the_successors_attempt_as_it_is(exchange, clock, uid):
    old, new = Attempts(exchange, 0, "pod-a"), Attempts(exchange, 0, uid)
    old.begin()
    clock.now += 5
    new.settle()
    new.begin()
    before = attempts_of(exchange)
    old.end("crashed", 1, "too late")
    assert attempts_of(exchange) == before
    new.end("clean", 0)
    assert [attempt.outcome for attempt in attempts_of(exchange)[0]] == [before[0][0].outcome, "clean"]


def test_of_two_pods_of_one_number_that_begin_at_once_none_is_lost(exchange, monkeypatch):
    first, second = Attempts(exchange, 0, "pod-a"), Attempts(exchange, 0, "pod-b")
    write = exchange.files.write

    def after_the_other(path: Path, data: bytes) -> None:
        monkeypatch.setattr(exchange.files, "write", write)
        second.begin()  # between what the first has read and what it writes
        write(path, data)

    monkeypatch.setattr(exchange.files, "write", after_the_other)
    first.begin()
    first.end("crashed", 1, "first")
    second.end("crashed", 1, "second")
    ends = {attempt.pod: attempt.message for attempt in attempts_of(exchange)[0]}
    assert ends == {"pod-a": "first", "pod-b": "second"}
    assert counted(exchange) == (0, 0, 2)


def test_only_the_first_pod_is_counted(exchange):
    for node in (0, 1, 2):
        pod = Attempts(exchange, node, f"pod-{node}")
        pod.begin()
        pod.end("crashed", 1)
    assert counted(exchange) == (0, 0, 1)


@pytest.mark.parametrize(("apart_s", "expected"), [(59, (0, 1, 0)), (61, (0, 0, 1))])
def test_a_crash_within_a_minute_of_another_pods_going_is_not_charged(exchange, clock, apart_s, expected):
    first, second = Attempts(exchange, 0, "pod-0"), Attempts(exchange, 1, "pod-1")
    first.begin()
    second.begin()
    second.end("signalled")
    clock.now += apart_s
    first.end("crashed", 1)
    assert counted(exchange) == expected


def test_a_crash_while_another_pod_was_lost_unseen_is_not_charged_once_that_is_found(exchange, clock):
    first = Attempts(exchange, 0, "pod-0")
    first.begin()
    Attempts(exchange, 1, "pod-1").begin()
    clock.now += 500
    first.end("crashed", 1)
    assert counted(exchange) == (0, 0, 1)
    clock.now += 300  # its node is found dead, another one takes the pod
    Attempts(exchange, 1, "pod-1-again").settle()
    assert counted(exchange) == (0, 1, 0)


def test_it_is_given_up_when_the_budget_is_used_up_and_not_before(exchange):
    pod = Attempts(exchange, 0, "pod-a")
    for _ in range(3):
        pod.begin()
        pod.end("crashed", -9, "step 3/5")
    assert gave_up(attempts_of(exchange), FailurePolicySpec(learner_restarts=3)) is None
    assert gave_up(attempts_of(exchange), FailurePolicySpec(learner_restarts=2)) == (
        "LearnerCrashed",
        "the learner crashed 3 times, failurePolicy.learnerRestarts is 2; the last time: killed by SIGKILL: step 3/5",
    )


def test_crashes_made_before_the_run_was_taken_up_again_are_charged_no_more(exchange):
    pod = Attempts(exchange, 0, "pod-a")
    pod.begin()
    pod.end("crashed", 1)
    assert gave_up(attempts_of(exchange), FailurePolicySpec(learner_restarts=0)) is not None
    assert gave_up(attempts_of(exchange), FailurePolicySpec(learner_restarts=0, resumes=1)) is None


def test_a_crash_is_charged_at_the_step_the_learner_had_reached(exchange):
    pod = Attempts(exchange, 0, "pod-a")
    for step in (10, 30):
        exchange.write_learner(LearnerHeartbeat(step=step))
        pod.begin()
        pod.end("crashed", 1)
    # 20 steps lie between the two crashes: with one restart back every 20 steps the first is made good, every 40 not.
    assert gave_up(attempts_of(exchange), FailurePolicySpec(learner_restarts=1, refill_steps=20)) is None
    assert gave_up(attempts_of(exchange), FailurePolicySpec(learner_restarts=0, refill_steps=20)) is not None


def test_a_failure_of_the_node_of_another_pod_is_charged_to_that_pod_and_its_echo_to_none(exchange):
    for node, code in ((0, 1), (1, 3)):
        pod = Attempts(exchange, node, f"pod-{node}")
        pod.begin()
        pod.end("crashed", code, "no CUDA device")
    assert counted(exchange) == (0, 1, 0)
    assert gave_up(attempts_of(exchange), FailurePolicySpec(learner_restarts=0)) is None
    reason, message = gave_up(attempts_of(exchange), FailurePolicySpec(site_restarts=0))
    assert reason == "SiteError"
    assert "exit code 3 of pod 1: no CUDA device" in message


def test_an_error_for_the_user_is_given_up_at_once_by_whichever_pod_met_it(exchange):
    for node, code in ((0, 1), (1, 2)):
        pod = Attempts(exchange, node, f"pod-{node}")
        pod.begin()
        pod.end(outcome_of(code), code, "error: learner.gpus is 2")
    reason, message = gave_up(attempts_of(exchange), FailurePolicySpec(learner_restarts=9))
    assert reason == "UserError"
    assert message == ("the learner exited with a user error: exit code 2 of pod 1: error: learner.gpus is 2")
    assert not Attempts(exchange, 0, "pod-0").asked_for_its_user()
    assert Attempts(exchange, 1, "pod-1").asked_for_its_user()
    assert not Attempts(exchange, 1, "a new pod").asked_for_its_user()


def test_attempts_of_another_run_on_the_volume_stay_and_are_not_counted(exchange):
    pod = Attempts(exchange, 0, "pod-a")
    pod.begin()
    pod.end("crashed", 1)
    other = Exchange(exchange.root, clock=exchange.now)
    other.create(run_of("other"))
    assert counted(other) == (0, 0, 0)
    Attempts(other, 0, "pod-b").settle()
    Attempts(other, 0, "pod-b").begin()
    files = sorted((exchange.root / "attempts").glob("0-*.json"))
    assert [json.loads(file.read_bytes())["run"] for file in files] == ["demo", "demo", "other"]  # one has an end


def test_an_end_is_noted_of_the_runs_own_attempt_though_another_run_began_meanwhile(exchange):
    old = Attempts(exchange, 0, "pod-a")
    old.begin()
    other = Exchange(exchange.root, clock=exchange.now)
    other.create(run_of("other"))
    new = Attempts(other, 0, "pod-b")
    new.begin()
    exchange.create(run_of("demo"))
    old.end("crashed", 1)
    assert counted(exchange) == (0, 0, 1)
    other.create(run_of("other"))
    new.end("clean", 0)
    assert counted(other) == (1, 0, 0)
