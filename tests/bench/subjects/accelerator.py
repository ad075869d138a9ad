"""The learner on a GPU at the size of Qwen3-1.7B: speed, use of the card, memory, and what a publication blocks.

    make bench-gpu      under nine minutes on one card of 80 GB

Random weights in bfloat16, one group of eight completions of 2,048 tokens on average. Both learners recompute
activations in the backward pass and hold the same number of tokens at a time.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import reference
from bench.benchmark import CannotMeasure, Pair, Surroundings, at_least, at_most, benchmark, seconds
from bench.publication import blocked_by_a_publication
from builders import exchange_at, rollout_of, run_of
from heterorl.exchange.exchange import Exchange
from models import QWEN3_1_7B, save_character_tokenizer

COMMAND = "make bench-gpu"
SHAPE: dict[str, Any] = QWEN3_1_7B | {
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
ROWS, PROMPT, MEAN = 8, 256, 2048
LENGTHS = np.linspace(0.5 * MEAN, 1.5 * MEAN, ROWS).astype(np.int32)
AT_ONCE = 2  # rows, padded
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Of dense bfloat16 products, by the vendor's data sheets."""


class Learners:
    """Our engine and TRL's trainer with the same weights on one card."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, Qwen3Config

        from heterorl_learner.engines.build import build_engine

        run = run_of(
            model={"dtype": "bfloat16"},
            algorithm={"loss": {"type": "gspo"}, "groupSize": ROWS},
            generation={"maxPromptTokens": PROMPT, "maxCompletionTokens": int(LENGTHS.max())},
            learner={
                "gpus": int(torch.cuda.is_available()),
                "gradientCheckpointing": True,
                "batch": {"tokensPerMicroBatch": AT_ONCE * (PROMPT + int(LENGTHS.max()))},
            },
        )
        self.exchange = _run_folder(folder, run)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE), dtype=torch.bfloat16)
        model.save_pretrained(self.exchange.model_dir)
        self.engine = build_engine(self.exchange.model_dir, run.spec)
        self.trainer = _trl_trainer(folder, model)
        self.parameters = sum(p.numel() for p in model.parameters())
        draw = np.random.default_rng(0)
        self.prompt, *self.completions = (
            draw.integers(2, SHAPE["vocab_size"], count).astype(np.int32) for count in (PROMPT, *LENGTHS)
        )
        self.rewards = np.array([1.0, 0.0] * (ROWS // 2), np.float32)
        self.logps = self._own_logps()
        self.tokens = ROWS * PROMPT + int(LENGTHS.sum())

    def _own_logps(self) -> list[Any]:
        """The model's, so that no ratio is clipped."""
        from heterorl_learner.engines.torch_ddp import Sequence, micro_batch

        rows = (Sequence(self.prompt, ids, np.zeros(len(ids), np.float32), 0, 0.0) for ids in self.completions)
        return [self.engine.score(micro_batch([row])).float().cpu().numpy() for row in rows]

    def ours(self) -> Any:
        """The gradient of a step of the learner."""
        from dataclasses import replace

        from heterorl_learner.rollout_feed import StepBatch
        from heterorl_learner.train_step import train_on

        group = rollout_of(self.rewards.tolist(), LENGTHS.tolist(), logp=np.concatenate(self.logps).tolist())
        group = replace(group, prompt_ids=self.prompt, completion_ids=np.concatenate(self.completions))
        self.engine.policy.zero_grad()
        train_on(self.engine, self.exchange.spec, StepBatch(step=0, names=[], rollouts=[group], wait_s=0.0))
        return _gradient(self.engine.policy)

    def theirs(self) -> Any:
        """Likewise, of TRL's loss with the same advantages up to a factor."""
        import torch

        advantages = self.rewards - self.rewards.mean()
        batch = reference.padded(
            [self.prompt] * ROWS,
            self.completions,
            self.logps,
            advantages,
            max_prompt=PROMPT,
            max_completion=int(LENGTHS.max()),
        )
        batch["advantages"] = batch.pop("rewards")
        device = next(self.trainer.model.parameters()).device
        self.trainer.model.zero_grad()
        self.trainer.current_gradient_accumulation_steps = ROWS // AT_ONCE
        for first in range(0, ROWS, AT_ONCE):
            rows = {key: value[first : first + AT_ONCE].to(device) for key, value in batch.items()}
            rows["num_items_in_batch"] = torch.tensor(int(LENGTHS.sum()), device=device)
            self.trainer._compute_loss(self.trainer.model, rows).backward()
        return _gradient(self.trainer.model)

    def gate(self) -> None:
        """Both gradients point the same way; bfloat16 leaves a percent."""
        import torch

        cosine = torch.cosine_similarity(self.ours(), self.theirs(), dim=0).item()
        assert cosine > 0.98, f"the gradients' cosine is {cosine:.3f}"

    def flops(self) -> float:
        """Of a step, recomputation not counted: 6 a parameter and token, and attention's 12 x layers x width x length / 2."""
        lengths = PROMPT + LENGTHS.astype(np.float64)
        width = SHAPE["num_attention_heads"] * SHAPE["head_dim"]
        attention = 6 * SHAPE["num_hidden_layers"] * width * float((lengths**2).sum())
        return float(6 * self.parameters * self.tokens + attention)


def _run_folder(folder: Path, run: Any) -> Exchange:
    """With what a publication needs for its canary."""
    exchange = exchange_at(folder / "run", run)
    exchange.model_dir.mkdir(parents=True, exist_ok=True)
    save_character_tokenizer(exchange.model_dir)
    exchange.data_file("train").parent.mkdir(exist_ok=True)
    exchange.data_file("train").write_text(json.dumps({"prompt_ids": [3, 4, 5]}) + "\n")
    exchange.begin_incarnation()
    return exchange


def _trl_trainer(folder: Path, model: Any) -> Any:
    before, sys.modules["vllm"] = sys.modules.get("vllm"), None  # type: ignore[assignment]  # not needed for a loss
    try:
        trl: Any = importlib.import_module("trl")
        trainer_class, settings_class = trl.GRPOTrainer, trl.GRPOConfig
    except ImportError as error:
        raise CannotMeasure(f"the peer is not installed ({error}): pip install trl==1.16.0") from error
    finally:
        sys.modules.pop("vllm") if before is None else sys.modules.update(vllm=before)
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    settings = settings_class(
        str(folder / "trl"),
        bf16=True,
        use_cpu=next(model.parameters()).device.type == "cpu",
        report_to=[],
        loss_type="grpo",
        importance_sampling_level="sequence",
        gradient_checkpointing=True,
        num_generations=ROWS,
        per_device_train_batch_size=ROWS,
        max_completion_length=int(LENGTHS.max()),
    )
    trainer = trainer_class(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": ["1"] * ROWS}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "run" / "model"),
    )
    trainer.model.train()
    return trainer


def _gradient(model: Any) -> Any:
    import torch

    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@cache
def _learners(parent: Path) -> Learners:
    """One pair for all rows: the folder lies beside the benchmarks' own."""
    import torch

    if not torch.cuda.is_available():
        raise CannotMeasure("there is no GPU here (torch.cuda.is_available() is False)")
    folder = parent / "accelerator"
    folder.mkdir()
    return Learners(folder)


def _synchronized(work: Any) -> None:
    import torch

    work()
    torch.cuda.synchronize()


@benchmark(
    "gpu-tokens",
    what="learner, forward and backward, Qwen3-1.7B's shape, bf16, mean completion 2,048: tokens/s",
    peer="TRL 1.16 GRPOTrainer",
    target=at_least(1.05),
    gate="gradients point the same way (cosine 0.98)",
    limit="1/fill = 1.4",
    unit="tokens/s",
    disk_gb=20,
    apart=COMMAND,
)
def speed(at: Surroundings) -> Iterator[Pair]:
    both = _learners(at.folder.parent)
    ours, theirs = seconds(partial(_synchronized, both.ours)), seconds(partial(_synchronized, both.theirs))
    yield Pair(lambda: both.tokens / ours(), lambda: both.tokens / theirs(), both.gate)


@benchmark(
    "gpu-mfu",
    what="the same: model FLOPs utilisation, of the card's bf16 peak",
    peer="TRL 1.16 GRPOTrainer",
    target=at_least(1.05),
    gate="gradients point the same way (cosine 0.98)",
    limit="0.75, as activations are computed twice",
    unit="of peak",
    disk_gb=20,
    apart=COMMAND,
)
def utilisation(at: Surroundings) -> Iterator[Pair]:
    import torch

    both = _learners(at.folder.parent)
    card = torch.cuda.get_device_name()
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    if peak is None:
        raise CannotMeasure(f"the peak of a {card} is not known: add it to PEAK_FLOPS in {__name__}")
    ours, theirs = seconds(partial(_synchronized, both.ours)), seconds(partial(_synchronized, both.theirs))
    yield Pair(lambda: both.flops() / ours() / peak, lambda: both.flops() / theirs() / peak, both.gate)


@benchmark(
    "gpu-memory",
    what="the same: peak memory beyond weights",
    peer="TRL 1.16 GRPOTrainer",
    target=at_most(1.0),
    gate="gradients point the same way (cosine 0.98)",
    limit="gradients and one layer's activations",
    unit="B",
    disk_gb=20,
    apart=COMMAND,
)
def memory(at: Surroundings) -> Iterator[Pair]:
    import torch

    both = _learners(at.folder.parent)

    def peak(work: Any, model: Any) -> float:
        model.zero_grad()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return float(torch.cuda.max_memory_allocated() - before)

    yield Pair(lambda: peak(both.ours, both.engine.policy), lambda: peak(both.theirs, both.trainer.model), both.gate)


@benchmark(
    "gpu-publish",
    what="training blocked by a publication at that size, the canary included",
    peer="torch.save of the state dict in the step",
    target=at_most(0.2),
    gate="the published weights are the model's",
    limit="one copy of the weights to the host",
    disk_gb=40,
    apart=COMMAND,
)
def publication(at: Surroundings) -> Iterator[Pair]:
    both = _learners(at.folder.parent)
    yield from blocked_by_a_publication(both.exchange, both.engine, at.folder)
