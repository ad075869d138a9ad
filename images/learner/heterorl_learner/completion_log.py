"""Log of sampled completions: a few completions of a step, as text, with their rewards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from transformers import AutoTokenizer

from heterorl.exchange.exchange import Exchange
from heterorl.monitoring.metrics import JsonLines
from heterorl_learner.rollout_feed import StepBatch


def completions_log(exchange: Exchange) -> Callable[[StepBatch], None]:
    """What to call with every batch; it appends to completions.jsonl in the steps that the spec names, if any."""
    settings = exchange.spec.monitoring.log_completions
    if not settings.every_steps:
        return lambda batch: None
    tokenizer = AutoTokenizer.from_pretrained(exchange.model_dir)
    lines = JsonLines(exchange.completions_file)

    def write(batch: StepBatch) -> None:
        if batch.step % settings.every_steps:
            return
        texts = ((name, r, i) for name, r in zip(batch.names, batch.rollouts) for i in range(len(r.lengths)))
        for (name, rollout, i), _ in zip(texts, range(settings.count)):
            ends = np.cumsum(rollout.lengths)
            completion = rollout.completion_ids[ends[i] - rollout.lengths[i] : ends[i]]
            lines.write(
                {
                    "step": batch.step,
                    "rollout": str(name),
                    "prompt": tokenizer.decode(rollout.prompt_ids),
                    "completion": tokenizer.decode(completion),
                    "reward": float(rollout.rewards[i]),
                    "truncated": bool(rollout.truncated[i]),
                }
            )

    return write
