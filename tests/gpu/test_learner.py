"""The learner on a GPU computes what it computes on the CPU in float32, and takes a step at the size of a real model."""

import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

import architectures
from builders import spec_of
from gpu.steps import CPU, build_with_adapters, long_rollouts, rollouts_near, save_random_model, spec_on, step
from heterorl.exchange.canary import ROUNDING
from heterorl.exchange.rollout import Rollout
from heterorl.spec.run import LossType
from heterorl_learner.engines.build import build_engine, choose_attention
from heterorl_learner.engines.torch_ddp import TrainingEngine, micro_batch
from heterorl_learner.memory import step_memory
from heterorl_learner.rollout_feed import StepBatch
from heterorl_learner.train_step import num_tokens, sequences, train_on
from models import QWEN3_1_7B

pytestmark = pytest.mark.filterwarnings("default")  # of what GPUs bring with them
COSINE = {"float32": 0.9999, "bfloat16": 0.99}
"""Least cosine between a step's gradient and that in float32 on the CPU."""
RATIO = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest relative difference of losses and of gradients' norms; sums over whole sequences take it to 0.03."""
NOISE = {"float32": 1e-5, "bfloat16": 5e-3}
"""Largest absolute difference of losses, which for some are a small difference of large terms."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(lambda name: architectures.save(name, tmp_path_factory.mktemp(name)))


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def expected(folder: Callable[[str], Path]) -> tuple[TrainingEngine, list[Rollout]]:
    """The engine on the CPU in float32, and rollouts of a sampler near it."""
    spec = spec_on(CPU, "float32")
    engine = build_engine(folder("qwen3"), spec)
    return engine, rollouts_near(engine, spec)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def found(request: pytest.FixtureRequest, device: torch.device, folder: Callable[[str], Path]) -> TrainingEngine:
    """The engine on the GPU."""
    return build_engine(folder("qwen3"), spec_on(device, request.param))


@pytest.mark.parametrize("loss", get_args(LossType))
def test_a_step_is_that_of_the_cpu_in_float32_up_to_rounding(
    loss: str, expected: tuple[TrainingEngine, list[Rollout]], found: TrainingEngine
) -> None:
    engine, rollouts = expected
    dtype = str(found.dtype).removeprefix("torch.")
    spec = spec_on(found.device, dtype, loss={"type": loss})
    (right_loss, right), (own_loss, own) = (step(e, spec, rollouts) for e in (engine, found))
    assert own_loss == pytest.approx(right_loss, rel=RATIO[dtype], abs=NOISE[dtype])
    assert torch.cosine_similarity(own, right, dim=0) > COSINE[dtype]
    assert own.norm().item() == pytest.approx(right.norm().item(), rel=RATIO[dtype])


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "opt"])
def test_a_step_of_adapters_is_that_of_the_cpu_in_float32_and_moves_nothing_else(
    name: str, dtype: str, device: torch.device, folder: Callable[[str], Path]
) -> None:
    on_cpu, on_device = (
        spec_on(*place, lora=8, loss={"type": "cispo"}) for place in ((CPU, "float32"), (device, dtype))
    )
    engine = build_with_adapters(folder(name), on_cpu)
    rollouts = rollouts_near(engine, on_cpu)
    _, right = step(engine, on_cpu, rollouts)
    engine = build_with_adapters(folder(name), on_device)
    _, own = step(engine, on_device, rollouts)
    cosine = torch.cosine_similarity(own, right, dim=0).item()
    print(f"LoRA, {name} in {dtype}: {engine.layout}, cosine {cosine:.6f}")
    assert cosine > COSINE[dtype]
    before = {parameter: p.detach().clone() for parameter, p in engine.policy.named_parameters()}
    engine.step(1e-3)
    moved = {parameter for parameter, p in engine.policy.named_parameters() if not torch.equal(p, before[parameter])}
    assert moved == {parameter for parameter in before if ".lora_" in parameter} != set()


# ── packing and attention ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma2", "mistral", "gpt2", "opt", "qwen3_next", "qwen3_5", "jamba", "mamba"]
)
def test_a_step_in_packs_is_that_of_each_sequence_alone_on_the_cpu(
    name: str, dtype: str, device: torch.device, folder: Callable[[str], Path]
) -> None:
    alone = spec_on(CPU, "float32", tokens=1, loss={"type": "cispo"})
    engine = build_engine(folder(name), alone)
    rollouts = rollouts_near(engine, alone)
    _, right = step(engine, alone, rollouts)
    packed = spec_on(device, dtype, loss={"type": "cispo"})
    engine = build_engine(folder(name), packed)
    _, own = step(engine, packed, rollouts)
    cosine = torch.cosine_similarity(own, right, dim=0).item()
    print(f"{name} in {dtype}: {engine.layout}, cosine {cosine:.6f}")
    assert cosine > COSINE[dtype]


def scores(engine: TrainingEngine, rollouts: list[Rollout], *, alone: bool) -> Tensor:
    everything = sequences(spec_of(), rollouts)
    batches = [micro_batch([s]) for s in everything] if alone else [micro_batch(everything)]
    return torch.cat([engine.score(batch).cpu() for batch in batches])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_each_attention_kernel_keeps_the_sequences_of_a_pack_apart(
    name: str, attention: str, device: torch.device, folder: Callable[[str], Path]
) -> None:
    if attention == "flash_attention_2" and find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed: pip install flash-attn --no-build-isolation")
    spec = spec_on(CPU, "float32")
    engine = build_engine(folder(name), spec)
    rollouts = rollouts_near(engine, spec)
    right = scores(engine, rollouts, alone=True)
    engine = build_engine(folder(name), spec_on(device, "bfloat16", attention=attention))
    assert engine.layout == "packed"
    difference = (scores(engine, rollouts, alone=False) - right).abs().mean()
    assert difference / right.std() < ROUNDING["bfloat16"]


def test_flash_attention_is_chosen_where_it_is_installed(device: torch.device) -> None:
    flash = find_spec("flash_attn") is not None and device.type == "cuda"
    assert choose_attention("auto", torch.bfloat16) == ("flash_attention_2" if flash else None)
    assert choose_attention("auto", torch.float32) is None


# ── the size of a real model ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def large(device: torch.device) -> Iterator[tuple[Path, int]]:
    """Its folder with random weights, 3.4 GB that go at the end, and how many parameters it has."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made), save_random_model(AutoConfig.for_model("qwen3", **QWEN3_1_7B), Path(made), device)


@pytest.mark.usefixtures("own_process_group")
@pytest.mark.parametrize("strategy", ["torch", "zero2"])
def test_a_step_at_the_size_of_qwen3_1_7b_is_finite_and_moves_the_weights(
    strategy: str, large: tuple[Path, int], device: torch.device
) -> None:
    made, parameters = large
    config = AutoConfig.from_pretrained(made)
    rollouts = list(islice(long_rollouts(config.vocab_size, 1000), 4))
    spec = spec_of(
        model={"dtype": "bfloat16"},
        generation={"maxPromptTokens": 2, "maxCompletionTokens": 1000},
        algorithm={"groupSize": 2},
        learner={
            "gpus": int(device.type == "cuda"),
            "strategy": strategy,
            "gradientCheckpointing": True,
            "batch": {"tokensPerMicroBatch": 4096},
        },
    )
    estimate = step_memory(spec, config, parameters, choose_attention("auto", torch.bfloat16)).total / 1e9
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        free = torch.cuda.mem_get_info(device)[0] / 1e9
        if free < 1.2 * estimate:
            pytest.skip(f"a step takes about {1.2 * estimate:.0f} GB, the GPU has {free:.0f} GB free")
    engine = build_engine(made, spec)
    before = engine.full_state_dict()
    started = time.monotonic()
    metrics = train_on(engine, spec, StepBatch(step=0, names=[], rollouts=rollouts, wait_s=0.0))
    norm = engine.step(1e-3)
    seconds = time.monotonic() - started
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    print(
        f"{strategy}, {parameters / 1e9:.2f} B parameters: a step of {num_tokens(rollouts)} tokens in {seconds:.1f} s,"
        f" the first of its process; peak {peak:.1f} GB, {estimate:.1f} GB estimated"
    )
    assert all(math.isfinite(value) for value in metrics.values())
    assert norm > 0
    after = engine.full_state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(after[name], before[name])
