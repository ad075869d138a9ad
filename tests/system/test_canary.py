"""The canary on a real model in bfloat16, the default: an honest run trains, and faults of a load are seen or not.

What is not seen is asserted as well, so that `docs/exchange.md` stays true.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from bench.canary_faults import (
    Fault,
    Learner,
    Weights,
    empty_layer,
    half_applied,
    save,
    serving_folder,
    shifted_rows,
    stale_head,
    stale_layer,
    stale_version,
    swapped_matrices,
    through_float8,
)
from builders import manifest, spec_of
from heterorl.errors import CanaryMismatch
from heterorl.exchange.canary import CANARY_TOKENS, Canary, canary_texts
from heterorl.exchange.version import Version
from heterorl_sampler.engines.base import InferenceEngine
from heterorl_sampler.engines.build import build_engine

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

NO_VLLM = find_spec("vllm") is None and os.environ.get("HETERORL_REQUIRE") != "all"
TOLERANCE = spec_of(model={"dtype": "bfloat16"}).canary_tolerance
LESSONS = [[504, 2365, 1256, 253, 2156, 327, 260, 4015] * 8]


@pytest.mark.skipif(NO_VLLM, reason="vLLM is not installed")
def test_a_real_model_in_bfloat16_trains_on_gsm8k(
    new_run: Callable[..., Any], smollm2_dir: Path, shared_data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "real.yaml"
    columns = {"prompt": "question", "answer": "answer", "answerPattern": "#### (.+)"}
    train = {"source": "file", "path": str(shared_data / "gsm8k" / "train.jsonl"), "columns": columns, "limit": 64}
    run_spec = manifest(
        "real",
        model={"source": "path", "path": str(smollm2_dir), "dtype": "bfloat16"},
        data={"train": train},
        rewards=[{"name": "accuracy"}, {"name": "repetition"}],  # few of its answers are right, some repeat themselves
        algorithm={"groupSize": 4},
        generation={"maxPromptTokens": 256, "maxCompletionTokens": 96},
        learner={"steps": 3, "batch": {"groups": 2, "tokensPerMicroBatch": 512}, "checkpoint": {"everySteps": 100}},
        samplers=[{"name": "near", "engine": "vllm", "promptsPerBatch": 2, "kvCacheBytes": 256 * 2**20}],
        exchange={"maxPendingGroups": 4},
    )
    file.write_text(yaml.safe_dump(run_spec))
    run = new_run(file)
    summary = run.succeed(600)
    assert (summary["status"], summary["steps"]) == ("succeeded", 3)
    steps = map(json.loads, (run.root / "metrics" / "learner.jsonl").read_text().splitlines())
    assert max(step["grad_norm"] for step in steps if "grad_norm" in step) > 0
    swaps = [
        record
        for record in map(json.loads, (run.root / "metrics" / "sampler-near-0.jsonl").read_text().splitlines())
        if record.get("event") == "swap"
    ]
    differences = [swap["canary/mean_abs_diff"] for swap in swaps]
    assert len(differences) >= 2
    assert all(0.01 < difference < TOLERANCE / 2 for difference in differences), differences


# ── planted faults ───────────────────────────────────────────────────────────────────────────────────────────────────
class Site:
    """An engine that serves version 1, and a learner that has published a canary with it."""

    def __init__(self, engine: InferenceEngine, old: Weights, new: Weights, canary: Canary, folder: Path) -> None:
        self._engine, self._old, self._new, self._canary, self._folder = engine, old, new, canary, folder

    def load(self, fault: Fault) -> float:
        """Load the new version with a fault planted; the canary's statistic, or CanaryMismatch."""
        self._engine.load_weights(save(fault(self._new, self._old), self._folder))
        return self._canary.check(Version(1, 1), self._engine.score, TOLERANCE)


def no_fault(new: Weights, old: Weights) -> Weights:
    return new


@pytest.fixture(scope="module")
def published(smollm2_dir: Path) -> Callable[[float], tuple[Weights, Weights, Canary]]:
    """Factory: the starting weights, those after one step at a learning rate, and the canary of the latter."""

    def publish(rate: float) -> tuple[Weights, Weights, Canary]:
        learner = Learner(smollm2_dir, "bfloat16", rate, LESSONS)
        old = learner.weights()
        learner.train_to(1)
        texts = canary_texts(AutoTokenizer.from_pretrained(smollm2_dir), [])
        return old, learner.weights(), Canary(texts, learner.score(texts))

    return publish


@pytest.fixture(scope="module")
def a_small_step(published: Callable[..., Any]) -> tuple[Weights, Weights, Canary]:
    return published(1e-6)


@pytest.fixture(scope="module")
def a_large_step(published: Callable[..., Any]) -> tuple[Weights, Weights, Canary]:
    return published(1e-3)


@pytest.fixture(
    scope="module",
    params=["transformers", pytest.param("vllm", marks=pytest.mark.skipif(NO_VLLM, reason="vLLM is not installed"))],
)
def site(
    request: pytest.FixtureRequest,
    smollm2_dir: Path,
    a_small_step: tuple[Weights, Weights, Canary],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    old, new, canary = a_small_step
    folder = serving_folder(smollm2_dir, old, tmp_path_factory.mktemp("served"))
    engine = build_engine(request.param, folder, dtype="bfloat16", max_model_len=CANARY_TOKENS + 1)
    yield Site(engine, old, new, canary, tmp_path_factory.mktemp("loads"))
    engine.close()


def test_honest_rounding_stays_below_half_of_what_is_allowed(site: Site) -> None:
    assert site.load(no_fault) < TOLERANCE / 2


@pytest.mark.parametrize("fault", [empty_layer, swapped_matrices, shifted_rows, through_float8])
def test_weights_that_are_wrong_are_refused(site: Site, fault: Fault) -> None:
    with pytest.raises(CanaryMismatch):
        site.load(fault)


@pytest.mark.parametrize("fault", [stale_head, stale_layer, half_applied, stale_version])
def test_a_mixture_of_versions_one_step_of_1e_6_apart_is_beyond_sight(site: Site, fault: Fault) -> None:
    assert site.load(fault) < TOLERANCE / 2


@pytest.mark.parametrize("fault", [half_applied, stale_version])
def test_a_mixture_of_versions_far_apart_is_refused(
    site: Site, a_large_step: tuple[Weights, Weights, Canary], fault: Fault, tmp_path: Path
) -> None:
    far = Site(site._engine, *a_large_step, tmp_path)
    with pytest.raises(CanaryMismatch):
        far.load(fault)
