"""What the learner's pod tells the operator: read from a real run folder, sent as text, read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from builders import Clock, exchange_at, publish, run_of
from heterorl.exchange.crash_budget import Attempts
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation, LearnerHeartbeat, SlotStatus
from heterorl.exchange.version import Version
from heterorl.monitoring.progress import ProgressReader
from heterorl.monitoring.run_metrics import PoolProgress, RunProgress, parse_progress, run_progress, to_text
from heterorl.monitoring.snapshot import SnapshotReader
from heterorl.spec.run import Slot

SPEC = {
    "learner": {"steps": 40},
    "samplers": [{"name": "near"}, {"name": "far", "replicas": 3}],
    "exchange": {"leaseSeconds": 10},
    "data": {"evals": [{"label": "sums"}]},
    "evaluation": {"everySteps": 10},
    "failurePolicy": {"learnerRestarts": 1},
}
WHOLE = RunProgress(
    step=12,
    steps=40,
    checkpoint_step=10,
    reward=0.25,
    lag=3.5,
    prepared=True,
    weights_refused='no sampler accepts weights v00000012-i0001: the canary "differs"',
    finished=False,
    stalled_s=7.5,
    weights_version="v00000012-i0002",
    attempts={"clean": 1, "signalled": 2, "crashed": 3},
    gave_up=("UserError", 'learner.gpus is 2 in "run";\na \\ and no newline'),
    pools={"near": PoolProgress(9, 1, 1, "v00000011-i0002"), "far": PoolProgress(0, 0, 2, None, ("far-0", "far-7"), 1)},
    evaluation_best=0.5,
    evaluation_last=0.375,
    evaluations_due=(Version(0, 1), Version(10, 2)),
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def exchange(tmp_path: Path, clock: Clock) -> Exchange:
    return exchange_at(tmp_path / "run", run_of("demo", **SPEC), clock=clock)


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("progress", [WHOLE, RunProgress(), replace(WHOLE, gave_up=None, reward=None, pools={})])
def test_progress_is_read_back_as_it_was_written(progress):
    assert parse_progress(to_text(progress, "demo").decode()) == progress


def test_every_number_carries_the_run_and_what_is_unknown_is_absent():
    metrics = {m.name: m for m in text_string_to_metric_families(to_text(RunProgress(step=3), "demo").decode())}
    assert set(metrics) == {"heterorl_run_prepared", "heterorl_run_finished", "heterorl_run_step"}
    assert all(sample.labels == {"run": "demo"} for metric in metrics.values() for sample in metric.samples)
    assert {metric.type for metric in metrics.values()} == {"gauge"}


def test_what_the_rank_adds_changes_nothing():
    rank = 'heterorl_reward{process="learner",run="demo"} 0.9\nheterorl_events_total{event="start"} 1.0\n# half a li'
    assert parse_progress(to_text(WHOLE, "demo").decode() + rank) == WHOLE


def test_what_is_not_a_number_is_not_known():
    text = (
        'heterorl_run_prepared{run="demo"} 1\nheterorl_run_reward{run="demo"} NaN\nheterorl_run_step{run="demo"} NaN\n'
    )
    progress = parse_progress(text)
    assert (progress.reward, progress.step, progress.prepared) == (None, None, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>404</html>",
        'heterorl_reward{run="demo"} 0.5\n',
        'heterorl_run_step{run="demo"} 3.0\n',
        "heterorl_run_prepared{run=",
        'heterorl_run_prepared{run="demo"} 1\nheterorl_run_evaluation_due{version="newest"} 1\n',
    ],
)
def test_foreign_text_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011  (some of the messages are the parser's)
        parse_progress(text)


# ── from the volume ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_an_empty_volume_has_nothing_and_a_prepared_one_has_pools(exchange):
    nothing = RunProgress(steps=40, attempts={"clean": 0, "signalled": 0, "crashed": 0})
    assert run_progress(SnapshotReader(exchange).read()) == nothing
    exchange.mark_prepared()
    pools = {"near": PoolProgress(), "far": PoolProgress()}
    assert run_progress(SnapshotReader(exchange).read()) == replace(nothing, prepared=True, pools=pools)


def test_what_is_there_before_the_preparation_is_another_runs_and_not_told(exchange):
    exchange.write_learner(LearnerHeartbeat(step=40, finished=True, reward=0.5))
    publish(exchange, Version(40, 1))
    progress = run_progress(SnapshotReader(exchange).read())
    assert (progress.prepared, progress.finished, progress.step, progress.weights_version) == (False, False, None, None)


def test_the_learners_heartbeat_evaluations_and_versions_are_told(exchange, clock):
    exchange.mark_prepared()
    exchange.write_learner(LearnerHeartbeat(step=12, checkpoint_step=10, reward=0.25, lag=3.5, finished=False))
    for step in (0, 5, 10, 12):
        publish(exchange, Version(step, 1))
    exchange.write_eval(Version(0, 1), Evaluation(average=0.5))
    clock.now += 7.5
    progress = run_progress(SnapshotReader(exchange).read(), training_since=900.0)
    assert (progress.step, progress.steps, progress.checkpoint_step) == (12, 40, 10)
    assert (progress.reward, progress.lag, progress.stalled_s) == (0.25, 3.5, 7.5)
    assert (progress.prepared, progress.finished, progress.weights_version) == (True, False, "v00000012-i0001")
    assert (progress.evaluation_best, progress.evaluation_last) == (0.5, 0.5)
    assert progress.evaluations_due == (Version(10, 1),)
    exchange.write_eval(Version(10, 1), Evaluation(average=0.25))
    progress = run_progress(SnapshotReader(exchange).read())
    assert (progress.evaluation_best, progress.evaluation_last, progress.evaluations_due) == (0.5, 0.25, ())


def test_a_run_is_stalled_only_while_its_ranks_run(exchange, clock):
    exchange.mark_prepared()
    exchange.write_learner(LearnerHeartbeat(step=12, finished=False))
    clock.now += 100
    reader = SnapshotReader(exchange)
    assert run_progress(reader.read()).stalled_s is None
    assert (
        run_progress(reader.read(), training_since=1060.0).stalled_s == 40.0
    )  # ranks that just came back have their time
    exchange.write_learner(LearnerHeartbeat(step=40, finished=True))
    assert run_progress(reader.read(), training_since=1060.0).stalled_s is None


def test_the_last_version_is_due_once_the_run_is_trained(exchange):
    exchange.mark_prepared()
    for step in (0, 38):
        publish(exchange, Version(step, 1))
    exchange.write_eval(Version(0, 1), Evaluation(average=0.5))
    exchange.write_eval(Version(30, 1), Evaluation(average=0.5))
    exchange.write_learner(LearnerHeartbeat(step=38, finished=False))
    assert run_progress(SnapshotReader(exchange).read()).evaluations_due == ()
    exchange.write_learner(LearnerHeartbeat(step=40, finished=True))
    progress = run_progress(SnapshotReader(exchange).read())
    assert progress.finished
    assert progress.evaluations_due == (Version(38, 1),)


def test_a_pool_sums_its_slots_and_shows_the_oldest_live_version(exchange, clock):
    exchange.mark_prepared()
    leases = [exchange.acquire_slot(lambda index=index: [Slot("far", index)]) for index in range(3)]
    for lease, step in zip(leases, (7, 5, 9), strict=True):
        exchange.beat(lease, SlotStatus(rollouts=10, rejected=1, version=str(Version(step, 1))))
    reader = SnapshotReader(exchange)
    assert run_progress(reader.read()).pools["far"] == PoolProgress(30, 3, 3, "v00000005-i0001")
    exchange.beat(leases[1], SlotStatus(rollouts=12, rejected=1, version=str(Version(6, 1))), released=True)
    assert run_progress(reader.read()).pools["far"] == PoolProgress(32, 3, 2, "v00000007-i0001")
    clock.now += 9
    exchange.beat(leases[2], SlotStatus(rollouts=10, rejected=1, version=str(Version(9, 1))))
    assert run_progress(reader.read()).pools["far"].alive == 2
    clock.now += 2  # 11 s since the first slot moved, 2 s since the third one did
    assert run_progress(reader.read()).pools["far"] == PoolProgress(32, 3, 1, "v00000009-i0001", ("far-0",))


def test_a_silent_sampler_has_no_say_in_whether_weights_are_refused(exchange, clock):
    exchange.mark_prepared()
    version = publish(exchange, Version(12, 1))
    refusing, serving = (exchange.acquire_slot(lambda index=index: [Slot("far", index)]) for index in range(2))
    refusal = SlotStatus(state="waiting: weights", refused={str(version): "the canary differs by 0.4"})
    exchange.beat(refusing, refusal)
    exchange.beat(serving, SlotStatus(state="generating", version=str(version)))
    reader, live = SnapshotReader(exchange), ProgressReader(exchange)
    assert (run_progress(reader.read()).weights_refused, live.read().weights_refused) == (None, None)
    clock.now += 11  # more than leaseSeconds
    exchange.beat(refusing, refusal)
    said = "no sampler accepts weights v00000012-i0001: the canary differs by 0.4"
    assert (run_progress(reader.read()).weights_refused, live.read().weights_refused) == (said, said)


def test_why_the_learner_gave_up_is_told(exchange):
    attempts = Attempts(exchange, 0, "pod-a")
    for message in ("RuntimeError: first", "RuntimeError: second"):
        attempts.begin()
        attempts.end("crashed", 1, message)
    progress = parse_progress(to_text(run_progress(SnapshotReader(exchange).read()), "demo").decode())
    assert progress.attempts == {"clean": 0, "signalled": 0, "crashed": 2}
    assert progress.gave_up == (
        "LearnerCrashed",
        "the learner crashed 2 times, failurePolicy.learnerRestarts is 1; the last time: exit code 1:"
        " RuntimeError: second",
    )


def test_another_runs_preparation_and_attempts_do_not_count(tmp_path):
    file = tmp_path / "spec.json"
    for uid in ("first", "second"):
        run = run_of("demo", metadata={"uid": uid}, **SPEC)
        file.write_text(json.dumps(run.resolved()))
        exchange = Exchange(tmp_path / "run", spec_file=file)
        seen = run_progress(SnapshotReader(exchange).read())
        assert (seen.prepared, seen.attempts["crashed"]) == (False, 0)
        exchange.root.mkdir(exist_ok=True)
        exchange.mark_prepared()
        attempts = Attempts(exchange, 0, "pod-a")
        attempts.begin()
        attempts.end("crashed", 1, "")
        seen = run_progress(SnapshotReader(exchange).read())
        assert (seen.prepared, seen.attempts["crashed"]) == (True, 1)
