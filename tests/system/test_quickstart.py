"""What a newcomer sees first, and what becomes of it when processes are killed."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # whole runs: two to six minutes each


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_quickstart_doubles_its_reward_within_six_minutes(new_run: Callable[..., Any]) -> None:
    run = new_run("quickstart.yaml")
    summary = run.succeed(800)
    assert summary["status"] == "succeeded"
    assert summary["wall_s"] <= 360
    assert summary["reward_last_tenth"] >= 2 * summary["reward_first_tenth"]
    assert min(summary["rollouts"].values()) > 0
    assert set(summary["rollouts"]) == {"near-0", "far-0"}
    steps = lines(run.root / "metrics" / "learner.jsonl")
    trained = Counter()
    for step in steps:
        trained.update({pool: step.get(f"rollouts/by_pool/{pool}", 0) for pool in ("near", "far")})
    assert min(trained["near"], trained["far"]) > 0.1 * sum(trained.values())
    assert mean_lag(steps, "far") > mean_lag(steps, "near")
    assert (run.root / "report.png").stat().st_size > 10_000
    steps_in_report = reported_steps(run.root / "report.html")
    assert (steps_in_report[0], steps_in_report[-1]) == (1, 250)
    assert loads(run.root / "output")


def reported_steps(page: Path) -> list[float]:
    """The steps of the reward's curve in a report, which carries its data in one element."""
    [carried] = re.findall(r'<script id="answers" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    [run] = json.loads(carried)["curves"]["step"]["reward"]["runs"]
    steps: list[float] = run["raw"][0]
    return steps


def mean_lag(steps: list[dict[str, Any]], pool: str) -> float:
    lags = [step[f"lag/by_pool/{pool}"] for step in steps if f"lag/by_pool/{pool}" in step]
    return sum(lags) / len(lags)


def loads(folder: Path) -> bool:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = AutoTokenizer.from_pretrained(folder)("1+1=", return_tensors="pt", add_special_tokens=False).input_ids
    return bool(model(prompt).logits.isfinite().all())


def test_killed_learner_and_sampler_come_back_and_no_rollout_is_trained_twice_or_lost(
    new_run: Callable[..., Any],
) -> None:
    run = new_run("quickstart.yaml", "--set", "learner.steps=90", "--set", "learner.checkpoint.everySteps=20")
    run.start()
    run.until_step(30)
    run.child("heterorl_learner").send_signal(signal.SIGKILL)
    run.until(lambda: run.learner().get("incarnation", 1) == 2 and run.learner()["step"] >= 50)
    run.child("heterorl_sampler", "far").send_signal(signal.SIGKILL)
    assert run.wait(timeout=600) == 0, run.said()

    summary = run.summary()
    assert (summary["status"], summary["steps"]) == ("succeeded", 90)
    assert summary["restarts"] == {"learner": 1, "far-0": 1}
    assert (summary["rollouts_trained_twice"], summary["rollouts_lost"]) == (0, 0)
    # The same from the raw files: the journal has each step once, and every name once.
    journal = lines(run.root / "journal.jsonl")
    assert [entry["step"] for entry in journal] == list(range(90))
    assert {entry["incarnation"] for entry in journal} == {1, 2}
    trained = Counter(name for entry in journal for name in entry["names"])
    assert max(trained.values()) == 1
    dropped = {name for entry in journal for name in entry["dropped"]}
    published = {
        name
        for path in (run.root / "metrics").glob("sampler-*.jsonl")
        for line in lines(path)
        for name in line.get("names", [])
    }
    waiting = {path.stem for name in ("rollouts", "taken") for path in (run.root / name).glob("v*.safetensors")}
    assert published <= set(trained) | dropped | waiting


def test_ctrl_c_stops_cleanly_and_resume_goes_on_to_the_last_step(new_run: Callable[..., Any]) -> None:
    run = new_run("quickstart.yaml", "--set", "learner.steps=50", "--set", "evaluation.everySteps=0")
    run.start()
    run.until_step(10)
    run.process.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130
    assert "--resume" in run.said()
    stopped_at = run.learner()["step"]
    assert stopped_at < 50
    assert run.learner()["checkpoint_step"] == stopped_at
    summary = run.succeed(400, "--resume")
    assert (summary["status"], summary["steps"]) == ("succeeded", 50)
    assert (summary["rollouts_trained_twice"], summary["rollouts_lost"]) == (0, 0)
    assert [entry["step"] for entry in lines(run.root / "journal.jsonl")] == list(range(50))


def test_an_online_run_trains_on_the_newest_weights_only(new_run: Callable[..., Any]) -> None:
    summary = new_run("online.yaml", "--set", "learner.steps=20", "--set", "evaluation.everySteps=0").succeed(400)
    assert summary["lag_max"] == 0
    assert min(summary["rollouts"].values()) > 0
