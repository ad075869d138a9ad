"""The live view, the plain lines and what they are drawn from."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from builders import CANARY, exchange_at, run_of
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import LearnerHeartbeat, SlotStatus
from heterorl.exchange.rollout import Version
from heterorl.local.live_view import PlainView, ProcessState, RunView, describe, duration, open_view, render, sparkline
from heterorl.monitoring.json_lines import Tail
from heterorl.monitoring.progress import LiveProgress, ProgressReader, SlotProgress
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
    console.print(render("run", Path("runs/run"), progress, state))
    assert said[:60] in console.file.getvalue()


def test_groups_that_a_reward_failed_on_are_shown_with_their_sampler(exchange):
    exchange.beat(exchange.acquire_slot(lambda: [FAR]), SlotStatus(state="generating", unrewarded=5))
    state = RunView(learner=UP, slots={FAR: UP}, evaluating=None, elapsed_s=1.0)
    progress = ProgressReader(exchange).read()
    assert "far-0 0 rollouts, 5 unrewarded" in describe(progress, state)
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(render("run", Path("runs/run"), progress, state))
    assert "generating 5 unrewarded" in console.file.getvalue()


def test_steps_repeated_after_a_crash_replace_the_earlier_ones(exchange):
    reader = ProgressReader(exchange)
    append(exchange, "learner", step(1, reward=0.0), step(2, reward=0.0), step(3, reward=0.0), step(2, reward=1.0))
    assert reader.read().rewards == {1: 0.0, 2: 1.0}


def test_the_eta_is_what_is_left_at_the_pace_of_the_last_minute(exchange):
    clock = Clock()
    reader = ProgressReader(exchange, clock)
    assert reader.read().eta_s is None
    clock.now = 10.0
    exchange.write_learner(LearnerHeartbeat(step=20))
    assert reader.read().eta_s == pytest.approx(40.0)  # 2 steps a second, 80 to go


def test_the_plain_line_names_step_reward_lag_and_every_sampler():
    row = SlotProgress(version=112, rollouts=640)
    progress = LiveProgress(
        step=120, steps=400, rewards={120: 0.41}, lag_mean=8.2, lag_max=21, slots={FAR: row}, eta_s=190
    )
    state = RunView(learner=UP, slots={FAR: UP}, evaluating=None, elapsed_s=1.0)
    assert describe(progress, state) == (
        "step 120/400 | reward 0.410 | lag 8.2 (max 21) | far-0 v112 640 rollouts | ETA 3:10"
    )
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


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_panel_fits_any_width(width):
    row = SlotProgress(activity="generating", version=96, rollouts=1234, tokens_per_s=8123.0, waited_s=75.0, swaps=31)
    progress = LiveProgress(
        step=96, steps=400, newest=Version(97, 1), rewards=dict.fromkeys(range(96), 0.4), slots={FAR: row}
    )
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    panel = render("demo", Path("runs/demo"), progress, running(61.0))
    console.print(panel)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any("far-0" in line and "generating" in line for line in lines)


def test_a_sparkline_goes_from_lowest_to_highest_block_and_averages_what_does_not_fit():
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    assert sparkline([0.0, 0.0, 1.0, 1.0], 2) == "▁█"
    assert sparkline([0.3, 0.3], 5) == "▁▁"
    assert sparkline([], 5) == ""


def test_durations_are_for_people():
    assert [duration(s) for s in (42, 187, 7389)] == ["42 s", "3:07", "2:03:09"]
