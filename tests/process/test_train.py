"""The learner's loop, alone with its exchange: what it tells, and how it follows an edit of a live run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import exchange_at, put, rollout_name, rollout_of, run_of, spec_of
from heterorl.exchange.exchange import Exchange
from heterorl.monitoring.metrics import Metrics
from heterorl.names import Version
from heterorl.spec.run import HeteroRLRun
from heterorl_learner.engines.base import TrainingEngine
from heterorl_learner.engines.build import build_engine
from heterorl_learner.rollout_feed import StepBatch
from heterorl_learner.train import Trainer
from heterorl_learner.train_step import train_on


def run_with(steps: int, **spec: Any) -> HeteroRLRun:
    return run_of(
        model={"dtype": "float32"},
        learner={
            "steps": steps,
            "batch": {"groups": 1},
            "optimizer": {"learningRate": 0.5},
            "schedule": {"type": "linear", "warmupRatio": 0.0},
        },
        algorithm={"groupSize": 2},
        **{"exchange": {"pollSeconds": 0.01}, **spec},
    )


@pytest.fixture
def exchange(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Exchange:
    """A prepared run of 2 steps, with rollouts for 5."""
    exchange = exchange_at(tmp_path / "run", run_with(2))
    exchange.model_dir.symlink_to(tiny_model_dir(tokenizer=True))
    exchange.data_file("train").parent.mkdir()
    exchange.data_file("train").write_text(json.dumps({"prompt_ids": [3, 4, 5]}) + "\n")
    exchange.mark_prepared()
    for seq in range(5):
        put(exchange, {rollout_name(seq): rollout_of()})
    return exchange


@pytest.fixture
def engine(exchange: Exchange) -> TrainingEngine:
    return build_engine(exchange.model_dir, exchange.spec)


class Watch:
    """Where the learner's metrics go; calls back at each step."""

    def __init__(self, at_step: Callable[[int], None] = lambda step: None) -> None:
        self.records: list[dict[str, Any]] = []
        self._at_step = at_step

    def write(self, record: Mapping[str, Any]) -> None:
        if "step" in record:
            self.records.append(dict(record))
            self._at_step(record["step"])

    def close(self) -> None:
        """Nothing to let go."""


def test_steps_added_to_a_live_run_are_trained_under_the_schedule_of_the_new_total(
    exchange: Exchange, engine: TrainingEngine
) -> None:
    watch = Watch(lambda step: exchange.create(run_with(4)) if step == 1 else None)
    assert Trainer(exchange, engine, Metrics([watch]), lambda: False).train()
    assert [record["step"] for record in watch.records] == [1, 2, 3, 4]
    # Linear from 0.5 to 0: the first of 2 steps, then the second, third and fourth of 4.
    rates = [record["learning_rate"] for record in watch.records]
    assert rates == pytest.approx([0.5, 0.5 * 3 / 4, 0.5 * 2 / 4, 0.5 * 1 / 4])
    assert (exchange.learner.step, exchange.learner.steps, exchange.learner.finished) == (4, 4, True)
    assert Version(4, 1) in exchange.list_versions()
    assert exchange.trained


def test_a_run_is_never_made_shorter_while_it_runs(exchange: Exchange, engine: TrainingEngine) -> None:
    watch = Watch(lambda step: exchange.create(run_with(1)))
    assert Trainer(exchange, engine, Metrics([watch]), lambda: False).train()
    assert exchange.learner.step == 2


def test_a_finished_learner_still_tells_the_reward_and_lag_of_its_last_step(
    exchange: Exchange, engine: TrainingEngine
) -> None:
    Trainer(exchange, engine, Metrics(), lambda: False).train()
    # Rewards 1 and 0; weights of step 0, trained when one step was done.
    assert (exchange.learner.reward, exchange.learner.lag) == (0.5, 1.0)


def test_rollouts_are_kept_from_the_edit_on_that_says_so(exchange: Exchange, engine: TrainingEngine) -> None:
    keep = {"exchange": {"pollSeconds": 0.01, "retention": {"keepRollouts": True}}}
    watch = Watch(lambda step: exchange.create(run_with(2, **keep)) if step == 1 else None)
    Trainer(exchange, engine, Metrics([watch]), lambda: False).train()
    archived = sorted(path.name for path in (exchange.root / "archive").iterdir())
    assert [name.partition("--s")[2] for name in archived] == ["0000000000.safetensors", "0000000001.safetensors"]


def test_a_step_whose_completions_are_all_masked_changes_nothing(tiny_model_dir: Callable[..., Path]) -> None:
    spec = spec_of(model={"dtype": "float32"}, algorithm={"groupSize": 2, "maskTruncated": True})
    engine = build_engine(tiny_model_dir(), spec)
    before = engine.full_state_dict()
    batch = StepBatch(3, [rollout_name(0)], [rollout_of([1.0, 0.0], truncated=[True, True])], wait_s=0.0)
    assert train_on(engine, spec, batch) == {"loss": 0.0, "kl_to_sampler": 0.0}
    assert engine.step(1e-3) == 0.0
    after = engine.full_state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
