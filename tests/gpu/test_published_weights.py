"""Engines on a GPU serve the weights that a learner on a GPU publishes; what each computes is the canary's to say."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu.steps import build_with_adapters, spec_on
from heterorl.errors import CanaryMismatch
from heterorl.exchange.adapters import base_tensors, merge_into
from heterorl.exchange.canary import CANARY_TOKENS, Canary
from heterorl.exchange.rollout import Sampling
from heterorl.exchange.version import Version
from heterorl_learner.engines.build import build_engine as build_learner
from heterorl_learner.engines.torch_ddp import Sequence, TrainingEngine, micro_batch, save_tensors, save_weights
from heterorl_sampler.engines.base import InferenceEngine
from heterorl_sampler.engines.build import build_engine

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own
VERSION = Version(1, 1)
VOCABULARY = 24


def require(name: str, device: torch.device) -> None:
    """Skip where the engine does not run on the device."""
    if name == "vllm":
        if find_spec("vllm") is None:
            pytest.skip("vLLM is not installed: pip install 'heterorl[sampler]'")
        import heterorl_sampler.engines.vllm as vllm  # sets what vLLM reads when it is imported

        if vllm.current_platform.is_cpu() != (device.type == "cpu"):
            pytest.skip("this vLLM is the CPU build: make an environment with heterorl[sampler] instead of sampler-cpu")


@pytest.fixture(params=[("transformers", "float32"), ("transformers", "bfloat16"), ("vllm", "bfloat16")], ids="-".join)
def kind(request: pytest.FixtureRequest, device: torch.device) -> tuple[str, str]:
    """An engine that runs on the device, and a data type."""
    require(request.param[0], device)
    return request.param


@pytest.fixture
def engine(
    kind: tuple[str, str], device: torch.device, tiny_model_dir: Callable[..., Path]
) -> Iterator[InferenceEngine]:
    name, dtype = kind
    gpus = int(device.type == "cuda")
    made = build_engine(
        name, tiny_model_dir(seed=0), dtype=dtype, max_model_len=300, gpus=gpus, gpu_memory_utilization=0.3
    )
    yield made
    made.close()


def scores(learner: TrainingEngine, texts: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of all tokens but the first, each text alone."""
    ids = [np.array(text, np.int32) for text in texts]
    batches = [micro_batch([Sequence(i[:1], i[1:], np.zeros(len(i) - 1, np.float32), 0, 0.0)]) for i in ids]
    return [learner.score(batch).tolist() for batch in batches]


def canary_of(learner: TrainingEngine) -> Canary:
    """As a publication has it, of random tokens."""
    texts = np.random.default_rng(0).integers(2, VOCABULARY, (2, CANARY_TOKENS)).tolist()
    return Canary(texts, scores(learner, texts))


def test_an_engine_serves_what_the_learner_published_and_its_own_log_probabilities_are_the_learners(
    kind: tuple[str, str],
    engine: InferenceEngine,
    device: torch.device,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    spec = spec_on(device, kind[1])
    learner = build_learner(tiny_model_dir(seed=1), spec)

    canary = canary_of(learner)
    with pytest.raises(CanaryMismatch):  # it still has other weights
        canary.check(VERSION, engine.score, spec.canary_tolerance)
    save_tensors(learner.full_state_dict(), tmp_path / "model.safetensors")
    engine.load_weights(tmp_path)
    off = canary.check(VERSION, engine.score, spec.canary_tolerance)

    (group,) = engine.generate([[5, 6, 7]], 4, Sampling(temperature=1.0, max_tokens=64), seed=0)
    assert group is not None
    drawn = Canary(texts := [[5, 6, 7, *c.token_ids] for c in group], scores(learner, texts))
    own = [ours[:2] + list(c.logp) for ours, c in zip(drawn.logp, group)]  # the prompt's are not drawn
    difference = drawn.mean_abs_diff(own)
    print(f"{'-'.join(kind)}: canary {off:.2g}, generated tokens {difference:.2g}")
    assert difference <= spec.canary_tolerance


@pytest.mark.parametrize(
    ("name", "dtype", "served"),
    [
        ("transformers", "float32", "merged"),
        ("transformers", "bfloat16", "merged"),
        ("vllm", "bfloat16", "merged"),
        ("vllm", "bfloat16", "adapter"),
    ],
)
def test_an_engine_serves_the_adapters_that_the_learner_published(
    name: str, dtype: str, served: str, device: torch.device, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    require(name, device)
    start, spec, gpus = tiny_model_dir(seed=0), spec_on(device, dtype, lora=8), int(device.type == "cuda")
    learner = build_with_adapters(start, spec)
    canary = canary_of(learner)
    save_weights(learner.full_state_dict(), learner.adapter_config, tmp_path)
    if served == "merged":
        merge_into(tmp_path, base_tensors(start, dtype))
    engine = build_engine(
        name,
        start,
        dtype=dtype,
        max_model_len=300,
        gpus=gpus,
        gpu_memory_utilization=0.3,
        lora_rank=8 if served == "adapter" else 0,
    )
    with pytest.raises(CanaryMismatch):  # it still has the starting model
        canary.check(VERSION, engine.score, spec.canary_tolerance)
    engine.load_weights(tmp_path)
    off = canary.check(VERSION, engine.score, spec.canary_tolerance)
    engine.close()
    print(f"LoRA, {name} in {dtype}, {served}: canary {off:.2g}")
