"""What a step costs in memory: against the tensors that an engine really holds, and against the ZeRO paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from builders import spec_of
from heterorl.spec.run import LearnerSpec, LoraSpec, ModelSpec, RunSpec
from heterorl_learner.engines.adapters import add_adapters
from heterorl_learner.engines.torch_ddp import build_optimizer
from heterorl_learner.memory import step_memory

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def spec(dtype: str = "float32", tokens: int = 256, **learner: Any) -> RunSpec:
    return spec_of(
        model={"dtype": dtype},
        generation={"maxPromptTokens": 8, "maxCompletionTokens": 8},
        learner={"batch": {"tokensPerMicroBatch": tokens}, **learner},
    )


@pytest.mark.parametrize("rank", [0, 8])
def test_weights_gradients_and_moments_are_those_that_an_update_leaves(rank: int) -> None:
    model = LlamaForCausalLM(CONFIG)
    if rank:
        add_adapters(model, ModelSpec(lora=LoraSpec(rank=rank)), base=Path(), seed=0)
    optimizer = build_optimizer(model, LearnerSpec())
    model(torch.zeros((1, 4), dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    trained, frozen = (sum(p.numel() for p in parameters if p.requires_grad is of) for of in (True, False))
    assert (frozen > 0) == (rank > 0)
    cost = step_memory(spec(), CONFIG, trained, "sdpa", frozen)
    assert cost.weights == sum(p.nbytes for p in parameters)
    assert cost.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert cost.optimizer == sum(moment.nbytes for moment in moments)


@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_within_a_fifth_of_what_autograd_keeps(autocast: bool) -> None:
    model = LlamaForCausalLM(CONFIG).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 64, (1, 256))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.model(input_ids=ids, use_cache=False)
    # An autocast also keeps bfloat16 copies of the matrices, which the estimate counts with the weights.
    activations = sum(t.untyped_storage().nbytes() for t in kept.values() if 256 in t.shape)
    cost = step_memory(spec("bfloat16" if autocast else "float32"), CONFIG, 0, "flash_attention_2")
    assert cost.activations == pytest.approx(activations, rel=0.2)


@pytest.mark.parametrize(
    ("strategy", "states"),
    [
        ("zero1", (2.0, 2.0 + 4 / 8, 12 / 8)),  # arXiv 1910.02054, figure 1: 2 + 2 + K/N with K = 12
        ("zero2", (2.0, (2 + 4) / 8, 12 / 8)),  # gradients divided as well
        ("zero3", (2 / 8, (2 + 4) / 8, 12 / 8)),  # and weights
        ("torch", (4.0 + 2, 4.0, 8.0)),
    ],
)
def test_zero_divides_what_its_stage_says_among_the_ranks(strategy: str, states: tuple[float, ...]) -> None:
    cost = step_memory(spec("bfloat16", strategy=strategy, replicas=8), CONFIG, 8_000_000, "sdpa")
    assert (cost.weights, cost.gradients, cost.optimizer) == tuple(share * 8_000_000 for share in states)


def test_a_sequence_longer_than_the_budget_counts_and_recomputing_saves_layers() -> None:
    long = spec(tokens=1)
    assert step_memory(long, CONFIG, 0, "sdpa").logits == 15 * 64 * 8  # 8 + 8 - 1 tokens
    whole, recomputed = (
        step_memory(spec(gradientCheckpointing=flag), CONFIG, 0, "flash_attention_2").activations
        for flag in (False, True)
    )
    assert recomputed == 4 * 4 * 256 * 128 + whole // 4  # the input of each of four layers, and one layer
