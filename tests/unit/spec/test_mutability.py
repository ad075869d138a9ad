"""An edit of a live run's manifest: which of it a running process sees, and when."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from builders import run_of
from heterorl.exchange.exchange import Exchange
from heterorl.spec.mutability import changes, take_over
from heterorl.spec.run import HeteroRLRun

NEAR, FAR = {"name": "near"}, {"name": "far", "replicas": 2}


def manifest(**spec: Any) -> HeteroRLRun:
    return run_of("demo", **{"samplers": [NEAR, FAR], **spec})


def write(file: Path, run: HeteroRLRun) -> None:
    """As a ConfigMap's file changes: another file under the same name."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(run.resolved()))
    new.rename(file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "run.json", manifest(learner={"steps": 10}))
    return tmp_path / "run.json"


@pytest.fixture
def exchange(file: Path) -> Exchange:
    exchange = Exchange(file.parent / "volume", spec_file=file)
    assert exchange.spec.learner.steps == 10
    return exchange


LIVE = [
    {"learner": {"steps": 20}},
    {"exchange": {"retention": {"weights": 9, "keepRollouts": True}}},
    {"evaluation": {"samplesPerPrompt": 4}},
    {"failurePolicy": {"learnerRestarts": 9}},
    {"samplers": [{**NEAR, "delay": {"distribution": "constant", "lower": 5}}, FAR]},
    {"samplers": [NEAR, {**FAR, "replicas": 3}]},
    {"samplers": [FAR]},
    {"samplers": [NEAR, FAR, {"name": "new", "engine": "transformers"}]},
]
REFUSED = [
    {"learner": {"steps": 9}},
    {"learner": {"steps": 10, "batch": {"groups": 8}}},
    {"seed": 3},
    {"algorithm": {"loss": {"type": "grpo"}}},
    {"exchange": {"maxPendingGroups": 99}},
    {"samplers": [{**NEAR, "promptsPerBatch": 2}, FAR]},
]


@pytest.mark.parametrize("edit", LIVE, ids=str)
def test_what_may_change_in_a_live_run_is_seen_by_a_process_that_asks_again(exchange, file, edit):
    edited = manifest(**{"learner": {"steps": 10}, **edit})
    write(file, edited)
    assert exchange.run == edited


@pytest.mark.parametrize("edit", REFUSED, ids=str)
def test_what_may_not_change_stays_as_the_process_started_with_and_is_told_once(exchange, file, caplog, edit):
    before = exchange.run
    write(file, manifest(**{"learner": {"steps": 10}, **edit}))
    assert exchange.run == before
    assert exchange.run == before
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "this process keeps until its restart the old" in record.message


def test_of_a_mixed_edit_the_allowed_part_is_taken(exchange, file):
    write(file, manifest(seed=7, learner={"steps": 12}))
    assert (exchange.spec.seed, exchange.spec.learner.steps) == (0, 12)


def test_a_pool_that_came_with_an_edit_is_itself_held(exchange, file):
    new = {"name": "new", "promptsPerBatch": 2}
    write(file, manifest(learner={"steps": 10}, samplers=[NEAR, new]))
    assert exchange.spec.pool("new").prompts_per_batch == 2
    write(file, manifest(learner={"steps": 10}, samplers=[NEAR, {**new, "promptsPerBatch": 5, "replicas": 4}]))
    assert (exchange.spec.pool("new").prompts_per_batch, exchange.spec.pool("new").replicas) == (2, 4)


@pytest.mark.parametrize(
    "content",
    ['{"apiVersion": "hete', "", '{"apiVersion": "heterorl.dev/v1alpha1"}', '{"spec": 3}'],
)
def test_a_file_that_is_half_written_or_wrong_changes_nothing_and_is_told_once(exchange, file, caplog, content):
    file.write_text(content)
    for _ in range(3):
        assert exchange.spec.learner.steps == 10
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    write(file, manifest(learner={"steps": 11}))
    assert exchange.spec.learner.steps == 11


def test_an_edit_that_does_not_go_with_what_is_held_changes_nothing(exchange, file, caplog):
    # The held run may be 64 steps late; the edit raises that as well, which a running process does not follow.
    delay = {"distribution": "constant", "unit": "steps", "lower": 80}
    later = manifest(
        learner={"steps": 10}, algorithm={"staleness": {"maxSteps": 99}}, samplers=[{**NEAR, "delay": delay}]
    )
    write(file, later)
    assert exchange.spec.pool("near").delay.distribution == "none"
    assert "every rollout would be too old" in caplog.text


def test_a_file_that_is_out_of_sight_changes_nothing(exchange, file):
    file.unlink()
    assert exchange.spec.learner.steps == 10


def test_an_unchanged_file_is_not_read_again(exchange, file):
    assert exchange.run is exchange.run


def test_traces_are_read_in_when_an_edit_brings_one(exchange, file):
    exchange.root.mkdir()
    (exchange.root / "lags.csv").write_text("lag\n3\n5\n")
    delay = {"distribution": "trace", "trace": {"path": "lags.csv", "column": "lag"}}
    write(file, manifest(learner={"steps": 10}, samplers=[{**NEAR, "delay": delay}, FAR]))
    assert exchange.spec.pool("near").delay.trace.values == [3, 5]


def test_changes_are_named_by_path_and_pool():
    edited = manifest(seed=2, samplers=[{**FAR, "replicas": 5}])
    assert list(changes(manifest(), edited)) == [(("samplers", "far", "replicas"), 2, 5), (("seed",), 0, 2)]


def test_taking_over_nothing_changes_nothing():
    assert take_over(manifest(), manifest()) == manifest()
