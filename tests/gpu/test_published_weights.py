"""Engines on a GPU serve the weights that a learner on a GPU publishes; what each computes is the canary's to say."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu.steps import spec_on
from heterorl.errors import CanaryMismatch
from heterorl.exchange.canary import CANARY_TOKENS, Canary
from heterorl.exchange.rollout import Sampling
from heterorl.exchange.version import Version
from heterorl_learner.engines.build import build_engine as build_learner
from heterorl_learner.engines.torch_ddp import Sequence, micro_batch, save_tensors
from heterorl_sampler.engines.base import InferenceEngine
from heterorl_sampler.engines.build import build_engine

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own
VERSION = Version(1, 1)
VOCABULARY = 24


@pytest.fixture(params=[("transformers", "float32"), ("transformers", "bfloat16"), ("vllm", "bfloat16")], ids="-".join)
def kind(request: pytest.FixtureRequest, device: torch.device) -> tuple[str, str]:
    """An engine that runs on the device, and a data type."""
    if request.param[0] == "vllm":
        if find_spec("vllm") is None:
            pytest.skip("vLLM is not installed: pip install 'heterorl[sampler]'")
        import heterorl_sampler.engines.vllm as vllm  # sets what vLLM reads when it is imported

        if vllm.current_platform.is_cpu() != (device.type == "cpu"):
            pytest.skip("this vLLM is the CPU build: make an environment with heterorl[sampler] instead of sampler-cpu")
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


def test_an_engine_serves_what_the_learner_published_and_its_own_log_probabilities_are_the_learners(
    kind: tuple[str, str],
    engine: InferenceEngine,
    device: torch.device,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    spec = spec_on(device, kind[1])
    learner = build_learner(tiny_model_dir(seed=1), spec)

    def score(texts: list[list[int]]) -> list[list[float]]:
        ids = [np.array(text, np.int32) for text in texts]
        batches = [micro_batch([Sequence(i[:1], i[1:], np.zeros(len(i) - 1, np.float32), 0, 0.0)]) for i in ids]
        return [learner.score(batch).tolist() for batch in batches]

    rng = np.random.default_rng(0)
    texts = rng.integers(2, VOCABULARY, (2, CANARY_TOKENS)).tolist()
    canary = Canary(texts, score(texts))
    with pytest.raises(CanaryMismatch):  # it still has other weights
        canary.check(VERSION, engine.score, spec.canary_tolerance)
    save_tensors(learner.full_state_dict(), tmp_path / "model.safetensors")
    engine.load_weights(tmp_path)
    off = canary.check(VERSION, engine.score, spec.canary_tolerance)

    (group,) = engine.generate([[5, 6, 7]], 4, Sampling(temperature=1.0, max_tokens=64), seed=0)
    assert group is not None
    drawn = Canary([[5, 6, 7, *c.token_ids] for c in group], score([[5, 6, 7, *c.token_ids] for c in group]))
    own = [ours[:2] + list(c.logp) for ours, c in zip(drawn.logp, group)]  # the prompt's are not drawn
    difference = drawn.mean_abs_diff(own)
    print(f"{'-'.join(kind)}: canary {off:.2g}, generated tokens {difference:.2g}")
    assert difference <= spec.canary_tolerance
