"""Whole runs on real vLLM: the quickstart with a tied and an untied model, and GSM8K through the think template."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if not find_spec("vllm") and os.environ.get("HETERORL_REQUIRE") != "all":
    pytest.skip("vLLM is not installed", allow_module_level=True)

NO_EVALUATION = ("--set", "evaluation.everySteps=0")  # another half minute each, and not what is tested here
pytestmark = pytest.mark.slow  # vLLM takes half a minute to start in each sampler


def records(run: Any, slot: str) -> list[dict[str, Any]]:
    whole_lines = (run.root / "metrics" / f"sampler-{slot}.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in whole_lines]


def swaps(run: Any, slot: str) -> list[dict[str, Any]]:
    return [record for record in records(run, slot) if record.get("event") == "swap"]


def test_a_run_with_an_untied_model_swaps_with_the_canary_holding_at_each(new_run: Callable[..., Any]) -> None:
    run = new_run("quickstart-vllm.yaml", *NO_EVALUATION, "--set", "model.tiny.tieEmbeddings=false")
    summary = run.succeed(600)
    assert summary["status"] == "succeeded"
    assert len(swaps(run, "near-0")) >= 6  # the first weights and five changes
    assert summary["canary_mean_abs_diff"] <= 1e-4
    assert not json.loads((run.root / "model" / "config.json").read_text())["tie_word_embeddings"]


def test_adapters_are_served_merged_and_beside_the_weights_with_the_canary_holding(new_run: Callable[..., Any]) -> None:
    lora = ("model.lora.rank=8", "samplers.near.lora=adapter", "learner.steps=12", "samplers.far.delay.lower=2")
    sets = [word for setting in (*lora, "samplers.far.delay.upper=4") for word in ("--set", setting)]
    run = new_run("quickstart-vllm.yaml", *NO_EVALUATION, *sets)
    summary = run.succeed(600)
    assert (summary["status"], summary["steps"]) == ("succeeded", 12)
    for slot in ("near-0", "far-0"):  # one with vLLM's adapters, one merged
        assert len(swaps(run, slot)) >= 2
        assert all(swap["canary/mean_abs_diff"] <= 1e-4 for swap in swaps(run, slot))
        assert summary["rollouts"][slot] > 0
    newest = max(path for path in (run.root / "weights").iterdir() if path.name.startswith("v"))
    assert json.loads((newest / "manifest.json").read_text())["kind"] == "adapter"


def test_a_damaged_version_is_refused_and_generation_goes_on_with_the_old_one(new_run: Callable[..., Any]) -> None:
    run = new_run("quickstart-vllm.yaml", *NO_EVALUATION, "--set", "exchange.deltas=false")  # its model is tied
    run.start()
    run.until_step(5)
    near, learner = run.child("heterorl_sampler", "near"), run.child("heterorl_learner")
    near.suspend()
    # Newer than anything the sampler may be fetching at this moment.
    published = run.learner()["step"] + 1
    run.until(lambda: run.learner()["step"] > published + 1)
    learner.suspend()
    newest = max(path for path in (run.root / "weights").iterdir() if path.name.startswith("v"))
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 0xFF
    weights.write_bytes(data)
    near.resume()
    log = run.root / "logs" / "sampler-near-0.log"
    run.until(lambda: f"refused weights {newest.name}" in log.read_text())
    # A batch's record says how many versions had been refused by then, and which weights made it.
    run.until(lambda: any(batch.get("rejected_versions") == 1 for batch in records(run, "near-0")))
    batch = next(batch for batch in records(run, "near-0") if batch.get("rejected_versions") == 1)
    assert f"v{batch['version_step']:08d}" < newest.name
    refusal = next(line for line in log.read_text().splitlines() if "refused" in line)
    assert "checksum of model.safetensors" in refusal
    assert "generation continues with v" in refusal
    learner.resume()
    assert run.wait(600) == 0, run.said()
    assert len(swaps(run, "near-0")) >= 6
    assert newest.name not in {swap["version"] for swap in swaps(run, "near-0")}
    assert run.summary()["canary_mean_abs_diff"] <= 1e-4


def test_gsm8k_flows_through_think_template_vllm_and_accuracy(new_run: Callable[..., Any], shared_data: Path) -> None:
    train = shared_data / "gsm8k" / "train.jsonl"
    run = new_run("gsm8k-smoke.yaml", "--set", f"data.train.path={train}")
    summary = run.succeed(600)
    assert (summary["status"], summary["steps"]) == ("succeeded", 3)
    prepared = json.loads((run.root / "prepared.json").read_text())["data"]["train"]
    assert prepared["rows"] + prepared["skipped"] == 7473  # every row of the file, none silently lost
    row = json.loads((run.root / "data" / "train.jsonl").read_text().splitlines()[0])
    assert row["answer"] == "72"  # of the first problem: 48 + 24
    steps = list(map(json.loads, (run.root / "metrics" / "learner.jsonl").read_text().splitlines()))
    assert all("rewards/accuracy/mean" in step for step in steps if "step" in step)
