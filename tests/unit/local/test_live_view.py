"""The live view, the plain lines and what they are drawn from."""

from __future__ import annotations

import errno
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from builders import CANARY, exchange_at, run_of
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation, LearnerHeartbeat, RunnerState, SlotStatus
from heterorl.exchange.storage import Files
from heterorl.exchange.version import Version
from heterorl.local.attach import attach, view_of
from heterorl.local.live_view import (
    _COLUMNS,
    PlainView,
    ProcessState,
    RunView,
    describe,
    duration,
    open_view,
    render,
    sparkline,
)
from heterorl.monitoring.json_lines import Tail
from heterorl.monitoring.progress import LiveProgress, ProgressReader, SlotProgress
from heterorl.monitoring.snapshot import SnapshotReader
from heterorl.spec.run import Slot

FAR = Slot("far", 0)
UP = ProcessState("up")


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    exchange = exchange_at(tmp_path / "demo", run_of("demo", learner={"steps": 100}))
    exchange.metrics_dir.mkdir()
    exchange.mark_prepared()
    return exchange


def append(exchange: Exchange, process: str, *records: dict[str, Any]) -> None:
    with open(exchange.metrics_dir / f"{process}.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in records)


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"step": number, "reward": 0.5, "lag/mean": 2.0, "lag/max": 5.0, "step_time": 2.0, **values}


def running(elapsed_s: float) -> RunView:
    return RunView(learner=UP, slots={FAR: UP}, evaluating=Version(50, 1), elapsed_s=elapsed_s)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_tail_gives_each_line_once_and_leaves_a_torn_one_for_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"step": 1}\n{"st')
    assert tail.read() == [{"step": 1}]
    with open(path, "a") as file:
        file.write('ep": 2}\n')
    assert tail.read() == [{"step": 2}]
    assert tail.read() == []


def test_progress_follows_learner_and_samplers(exchange):
    reader = ProgressReader(exchange)
    append(exchange, "learner", step(1, reward=0.2, **{"perf/rollout_wait_s": 0.5, "perf/tokens_per_s": 900.0}))
    append(exchange, "sampler-far-0", {"event": "swap", "version_step": 0, "canary/mean_abs_diff": 2e-6})
    batch = {"version_step": 0, "groups": 8, "tokens_per_s": 700.0}
    append(exchange, "sampler-far-0", {**batch, "rollout/backpressure_s": 1.0, "rollout/weights_wait_s": 0.5})
    exchange.write_learner(LearnerHeartbeat(step=1))
    progress = reader.read()
    assert progress.step == 1
    assert progress.reward == pytest.approx(0.2)
    assert progress.waiting == pytest.approx(0.25)  # 0.5 s of 2 s
    assert progress.slots[FAR] == SlotProgress(
        version=0, rollouts=8, tokens_per_s=700.0, waited_s=1.5, swaps=1, canary=2e-6
    )
    append(exchange, "sampler-far-0", batch)
    assert reader.read().slots[FAR].rollouts == 16


def test_a_heartbeat_says_what_the_sampler_does(exchange):
    exchange.beat(exchange.acquire_slot(lambda: [FAR]), SlotStatus(state="waiting: queue", version_step=7, rejected=1))
    row = ProgressReader(exchange).read().slots[FAR]
    assert (row.activity, row.version, row.rejected) == ("waiting: queue", 7, 1)


def test_weights_that_no_sampler_accepts_are_named_in_the_plain_line_and_the_panel(exchange):
    version = Version(3, 1)
    (exchange.stage_weights(version) / "model.safetensors").write_text("weights")
    exchange.commit_weights(version, CANARY)
    refused = {str(version): "the canary differs by 0.4"}
    exchange.beat(
        exchange.acquire_slot(lambda: [FAR]), SlotStatus(state="waiting: weights", rejected=1, refused=refused)
    )
    state = RunView(learner=UP, slots={FAR: UP}, evaluating=None, elapsed_s=1.0)
    progress = ProgressReader(exchange).read()
    said = "no sampler accepts weights v00000003-i0001: the canary differs by 0.4"
    assert said in describe(progress, state)
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(render("run", "runs/run", progress, state, 100))
    assert said[:60] in console.file.getvalue()


def test_groups_that_a_reward_failed_on_are_shown_with_their_sampler(exchange):
    exchange.beat(exchange.acquire_slot(lambda: [FAR]), SlotStatus(state="generating", unrewarded=5))
    state = RunView(learner=UP, slots={FAR: UP}, evaluating=None, elapsed_s=1.0)
    progress = ProgressReader(exchange).read()
    assert "far-0 0 rollouts, 5 unrewarded" in describe(progress, state)
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(render("run", "runs/run", progress, state, 100))
    assert "generating 5 unrewarded" in console.file.getvalue()


def test_steps_repeated_after_a_crash_replace_the_earlier_ones(exchange):
    reader = ProgressReader(exchange)
    append(exchange, "learner", step(1, reward=0.0), step(2, reward=0.0), step(3, reward=0.0), step(2, reward=1.0))
    assert reader.read().rewards == {1: 0.0, 2: 1.0}


def test_the_eta_is_what_is_left_at_the_median_pace_of_the_steps(exchange):
    reader = ProgressReader(exchange)
    assert reader.read().eta_s is None
    # 60 s of start-up before the first step and a pause of an hour do not count: 2 s a step, 95 to go
    times = [1060.0, 1062.0, 1064.0, 4664.0, 4666.0]
    append(exchange, "learner", *(step(number, time=time) for number, time in enumerate(times, 1)))
    exchange.write_learner(LearnerHeartbeat(step=5))
    assert reader.read().eta_s == pytest.approx(190.0)


def test_the_completion_that_was_logged_last_is_told_in_one_line(exchange):
    groups = [
        {"prompt": "1+2=", "completions": [{"text": "no", "reward": 0.0}]},
        {"prompt": "What is\n2+3?", "completions": [{"text": "It is\n5", "reward": 1.0}, {"text": "6", "reward": 0.0}]},
    ]
    exchange.completions_file.write_text("".join(json.dumps(group) + "\n" for group in groups) + '{"prompt": "half')
    assert ProgressReader(exchange).read().completion == "1 for What is 2+3? ⟶ It is 5"


@pytest.mark.parametrize("content", [None, "", "\n", "{}\n", "[1]\n", '{"completions": []}\n', "\x00\n"])
def test_a_log_of_completions_without_any_tells_nothing(exchange, content):
    if content is not None:
        exchange.completions_file.write_text(content)
    assert ProgressReader(exchange).read().completion is None


def test_the_plain_line_names_step_reward_lag_and_every_sampler():
    row = SlotProgress(version=112, rollouts=640)
    progress = LiveProgress(
        step=120, steps=400, rewards={120: 0.41}, lag_mean=8.2, lag_max=21, slots={FAR: row}, eta_s=190
    )
    state = RunView(learner=UP, slots={FAR: UP}, evaluating=None, elapsed_s=1.0)
    assert describe(progress, state) == (
        "step 120/400 | reward 0.410 | lag 8.2 (max 21) | far-0 v112 640 rollouts | ETA 3:10"
    )
    assert "| lag 8.2 (max 21) | 17 dropped | far-0" in describe(replace(progress, dropped=17), state)
    away = RunView(learner=UP, slots={FAR: ProcessState("away")}, evaluating=Version(100, 1), elapsed_s=1.0)
    assert "far-0 v112 640 rollouts (away) | evaluating step 100" in describe(progress, away)


def test_plain_lines_come_at_intervals_while_there_is_news_and_once_at_the_end(exchange):
    clock, output = Clock(), io.StringIO()
    view = PlainView(exchange, Console(file=output, width=200), clock)
    for now, step in ((1.0, 0), (11.0, 0), (12.0, 1), (21.5, 2), (32.0, 2)):
        exchange.write_learner(LearnerHeartbeat(step=step))
        clock.now = now
        view.show(running(now))
    shown = [line.split(" | ")[0].split(" step ")[1] for line in output.getvalue().splitlines()]
    assert shown[:2] == ["0/100", "2/100"]  # at 11 s and 21.5 s
    exchange.write_learner(LearnerHeartbeat(step=100))
    view.close()
    view.close()
    assert output.getvalue().count("step 100/100") == 1


def test_without_a_terminal_there_are_plain_lines_only(exchange):
    output = io.StringIO()
    with open_view(exchange, Console(file=output)) as view:
        view.say("learner: killed by SIGKILL")
    assert "learner: killed by SIGKILL" in output.getvalue()
    assert "\x1b" not in output.getvalue()


def test_in_a_terminal_messages_stand_above_the_panel(exchange):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=110)
    with open_view(exchange, console) as view:
        view.show(running(1.0))
        view.say("far-0: killed by SIGKILL")
    printed = output.getvalue()
    assert "demo" in printed
    assert printed.index("killed by SIGKILL") < printed.rindex("sampler")


def drawn(width: int, progress: LiveProgress, state: RunView, subtitle: str = "runs/demo") -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(render("demo", subtitle, progress, state, width))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("width", "gone"),
    [
        (120, set()),
        (80, {"canary Δ"}),
        (70, {"canary Δ", "swaps", "waited"}),
        (60, {"canary Δ", "swaps", "waited", "tok/s"}),
        (44, {"canary Δ", "swaps", "waited", "tok/s", "rollouts", "lag", "version"}),
    ],
)
def test_a_narrow_terminal_does_without_columns_in_a_stated_order_and_cuts_no_name(width, gone):
    row = SlotProgress(activity="generating", version=96, rollouts=1234, tokens_per_s=8123.0, waited_s=75.0, swaps=31)
    slots = {Slot("a-pool-of-20-letters", index): row for index in (0, 1)}
    progress = LiveProgress(
        step=96, steps=400, newest=Version(97, 1), rewards=dict.fromkeys(range(96), 0.4), slots=slots, eta_s=600.0
    )
    lines = drawn(width, progress, RunView(UP, dict.fromkeys(slots, UP), None, 3661.0))
    assert max(map(len, lines)) <= width
    assert len({len(line) for line in lines}) == 1  # nothing was wrapped or stands beside the panel
    header = next(line for line in lines if "sampler " in line)
    assert {title for title in _COLUMNS if title not in header} == gone
    for slot in slots:
        assert any(line.split()[1:3] == [str(slot), "generating"] for line in lines)
    (line,) = (line for line in lines if "96/400" in line)
    assert "24%  " in line
    assert "ETA 10:00" in line
    assert ("1:01:01 elapsed" in line, "━" in line) == (width >= 60, width >= 70)


def test_eighty_columns_show_everything_of_samplers_with_short_names():
    row = SlotProgress("waiting: queue", 1096, 12_345, 8123.0, waited_s=3675.0, swaps=1031, canary=2.4e-7)
    lines = drawn(80, LiveProgress(newest=Version(1097, 1), slots={FAR: row}), running(1.0))
    assert [line.split() for line in lines if "far-0" in line] == [
        ["│", "far-0", "waiting:", "queue", "1096", "1", "12,345", "8,123", "1:01:15", "1031", "2e-07", "│"]
    ]


def test_the_first_and_the_last_evaluation_stand_side_by_side():
    evals = {
        Version(number, 1): Evaluation(average=mean, sets={"sums": {"mean": mean}})
        for number, mean in ((0, 0.25), (50, 0.5), (100, 0.75))
    }
    (line,) = (line for line in drawn(80, LiveProgress(evals=evals), running(1.0)) if "evals" in line)
    assert "sums 0.250 → 0.750 at step 100 · evaluating step 50" in line


def test_the_reward_has_its_bounds_beside_it_and_a_long_sample_is_cut():
    progress = LiveProgress(rewards={1: 0.125, 2: 0.25, 3: 0.5}, completion="1 for " + "x" * 200)
    lines = drawn(80, progress, running(1.0))
    assert any("▁▃█  0.125 to 0.500" in line for line in lines)
    assert any("sample" in line and "…" in line for line in lines)
    assert max(map(len, lines)) == 80


def test_a_view_that_has_ended_names_no_key_any_more(exchange):
    output = io.StringIO()
    with open_view(exchange, Console(file=output, force_terminal=True, width=100)) as view:
        view.show(running(1.0))
        assert "Ctrl-C stops cleanly" in output.getvalue()
        before = len(output.getvalue())
    assert "Ctrl-C" not in output.getvalue()[before:]
    assert output.getvalue().count("\x1b[?2026h") == output.getvalue().count("\x1b[?2026l") == 2


# ── a run of other processes ─────────────────────────────────────────────────────────────────────────────────────────
def test_an_attached_view_shows_processes_as_the_volume_does(exchange):
    reader = SnapshotReader(exchange)
    view = view_of(reader.read(), None)
    assert (view.learner.state, view.slots[FAR].state) == ("starting", "starting")
    exchange.write_learner(LearnerHeartbeat(step=3))
    lease = exchange.acquire_slot(lambda: [FAR])
    exchange.beat(lease, SlotStatus(state="generating"))
    runner = RunnerState(status="running", prepare_s=5.0, elapsed_s=7.0, restarts={"sampler-far-0": 2})
    view = view_of(reader.read(), runner)
    assert (view.learner.state, view.slots[FAR], view.elapsed_s) == ("up", ProcessState("up", 2), 12.0)
    exchange.beat(lease, SlotStatus(state="stopped"), released=True)
    assert view_of(reader.read(), runner).slots[FAR].state == "stopped"


def test_an_attached_view_ends_with_the_run(exchange, capsys):
    exchange.write_learner(LearnerHeartbeat(step=100, finished=True))
    exchange.save_runner(RunnerState(status="succeeded"))
    attach(exchange.root)
    assert "step 100/100" in capsys.readouterr().out


def test_attaching_to_a_run_whose_folder_is_out_of_reach_waits_for_it(exchange, capsys, monkeypatch):
    exchange.write_learner(LearnerHeartbeat(step=100, finished=True))
    exchange.save_runner(RunnerState(status="succeeded"))
    errors, read = [OSError(errno.EIO, "Input/output error")] * 2, Files._read

    def away_twice(files, path):
        if errors:
            raise errors.pop()
        return read(files, path)

    monkeypatch.setattr(Files, "_read", away_twice)
    monkeypatch.setattr("heterorl.local.outages._PAUSE_S", 0.0)
    attach(exchange.root)
    printed = capsys.readouterr().out
    assert printed.count(f"{exchange.root} is out of reach (Input/output error); waiting for it") == 1
    assert "step 100/100" in printed


def test_a_sparkline_goes_from_lowest_to_highest_block_and_averages_what_does_not_fit():
    assert sparkline([0.0, 0.5, 1.0], 10) == ("▁▅█", 0.0, 1.0)
    assert sparkline([0.0, 0.0, 1.0, 1.0], 2) == ("▁█", 0.0, 1.0)
    assert sparkline([0.3, 0.3], 5) == ("▁▁", 0.3, 0.3)
    assert sparkline([], 5) == ("", 0.0, 0.0)


def test_durations_are_for_people():
    assert [duration(s) for s in (42, 187, 7389)] == ["42 s", "3:07", "2:03:09"]
