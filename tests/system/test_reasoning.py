"""The example on reasoning-gym, in few steps: rows and scores come from the package, groups that teach nothing do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_the_example_on_reasoning_gym_trains_on_its_tasks(new_run: Callable[..., Any]) -> None:
    short = {
        "learner.steps": 2,
        "learner.batch.groups": 4,
        "evaluation.everySteps": 2,
        "data.train.reasoningGym.rows": 100,
        "model.tiny.maxSupervisedSteps": 30,
        "algorithm.filterGroups": "none",
    }
    run = new_run(
        "reasoning.yaml", *(argument for field in short.items() for argument in ("--set", "=".join(map(str, field))))
    )
    summary = run.succeed(600)
    assert summary["steps"] == 2
    assert summary["rollouts_lost"] == summary["rollouts_trained_twice"] == 0
    steps = [json.loads(line) for line in (run.root / "metrics" / "learner.jsonl").read_text().splitlines()]
    assert all("rewards/task/mean" in step for step in steps if step.get("step"))
    rows = [json.loads(line) for line in (run.root / "data" / "train.jsonl").read_text().splitlines()]
    assert {row["columns"]["task"] for row in rows} == {"chain_sum", "gcd"}
    assert "tasks" in summary["evaluations"]
