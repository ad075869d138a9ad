"""Log of sampled completions: a few completions of a step, as text, with their rewards."""

from __future__ import annotations

import numpy as np
from transformers import AutoTokenizer

from heterorl.exchange.exchange import Exchange
from heterorl.monitoring.background import Background
from heterorl.monitoring.json_lines import JsonLines
from heterorl_learner.rollout_feed import StepBatch


class CompletionLog:
    """Appends to completions.jsonl in the steps that the spec names, if any; never holds up or ends training."""

    def __init__(self, exchange: Exchange, *, wanted: bool = True) -> None:
        self._settings = exchange.spec.monitoring.log_completions
        self._lines: Background | None = None
        if wanted and self._settings.every_steps:
            self._tokenizer = AutoTokenizer.from_pretrained(exchange.model_dir)
            file = exchange.completions_file
            self._lines = Background(str(file), lambda: JsonLines(file))

    def write(self, batch: StepBatch) -> None:
        """Take a step's batch."""
        if self._lines is None or batch.step % self._settings.every_steps:
            return
        texts = ((name, r, i) for name, r in zip(batch.names, batch.rollouts) for i in range(len(r.lengths)))
        for (name, rollout, i), _ in zip(texts, range(self._settings.count)):
            ends = np.cumsum(rollout.lengths)
            completion = rollout.completion_ids[ends[i] - rollout.lengths[i] : ends[i]]
            self._lines.write(
                {
                    "step": batch.step,
                    "rollout": str(name),
                    "prompt": self._tokenizer.decode(rollout.prompt_ids),
                    "completion": self._tokenizer.decode(completion),
                    "reward": float(rollout.rewards[i]),
                    "truncated": bool(rollout.truncated[i]),
                }
            )

    def close(self) -> None:
        """Write what is left."""
        if self._lines is not None:
            self._lines.close()
