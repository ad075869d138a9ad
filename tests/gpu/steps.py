"""The learner's own engine on a device, and steps on rollouts made for the tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from builders import rollout_of, spec_of
from heterorl.exchange.rollout import Rollout
from heterorl.spec.run import RunSpec
from heterorl_learner.engines.build import build_engine
from heterorl_learner.engines.torch_ddp import TrainingEngine, micro_batch
from heterorl_learner.rollout_feed import StepBatch
from heterorl_learner.train_step import sequences, train_on

CPU = torch.device("cpu")
LENGTHS = ((11, 30, 5), (40, 3, 17), (8, 21, 26))


def spec_on(
    device: torch.device, dtype: str, *, tokens: int = 100_000, attention: str = "auto", lora: int = 0, **algorithm: Any
) -> RunSpec:
    """A run whose learner is on `device`; its micro-batches hold `tokens`, its adapters have rank `lora`."""
    return spec_of(
        model={"dtype": dtype, "attnImplementation": attention, "lora": {"rank": lora}},
        learner={"gpus": int(device.type == "cuda"), "batch": {"tokensPerMicroBatch": tokens}},
        algorithm={"groupSize": 3, **algorithm},
    )


def build_with_adapters(folder: Path, spec: RunSpec) -> TrainingEngine:
    """An engine whose adapters have learnt something: B, which starts at 0, is random and the same on any device."""
    engine = build_engine(folder, spec)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in engine.policy.named_parameters():
            if ".lora_B." in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=draw))
    return engine


def rollouts_near(engine: TrainingEngine, spec: RunSpec) -> list[Rollout]:
    """Three groups of three completions, whose sampler is 8 to 12 % off the engine's probability of every token.

    Rounding then carries no ratio over a border of clips (0.8, 1.2) or of gepo_plus (a KL divergence of 0.002).
    """
    rng = np.random.default_rng(0)
    rollouts = []
    for lengths in LENGTHS:
        groups = sequences(spec, [rollout_of((1.0, 0.0, 0.0), lengths)])
        own = engine.score(micro_batch(groups)).cpu().numpy()
        away = np.repeat(rng.choice([-0.1, 0.1], len(lengths)), lengths) + rng.uniform(-0.02, 0.02, len(own))
        rollouts.append(rollout_of((1.0, 0.0, 0.0), lengths, logp=list(own + away)))
    return rollouts


def step(engine: TrainingEngine, spec: RunSpec, rollouts: list[Rollout]) -> tuple[float, Tensor]:
    """The loss and the whole gradient, on the CPU, of one step without an update."""
    engine.policy.zero_grad()
    loss = train_on(engine, spec, StepBatch(step=0, names=[], rollouts=rollouts, wait_s=0.0))["loss"]
    return loss, torch.cat([p.grad.flatten().cpu() for p in engine.policy.parameters() if p.grad is not None])


def long_rollouts(vocabulary: int, completion: int) -> Iterator[Rollout]:
    """Endless groups of two completions of so many random tokens, as likely as each other."""
    for seed in itertools.count():
        rng = np.random.default_rng(seed)
        group = rollout_of((1.0, 0.0), (completion, completion), logp=[-np.log(vocabulary)] * 2 * completion)
        group.completion_ids[:] = rng.integers(vocabulary, size=2 * completion)
        yield group


def save_random_model(config: Any, folder: Path, device: torch.device) -> int:
    """A model with random weights in bfloat16, made on the device; returns how many parameters it has."""
    from transformers import AutoModelForCausalLM

    with device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())
