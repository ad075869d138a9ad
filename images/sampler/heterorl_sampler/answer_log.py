"""What was answered to the problems of an evaluation, as lines of text within a budget of bytes.

    {"step": 12, "set": "math", "row": 7, "prompt": "...", "reference": "8",
     "completions": [{"text": "...", "correct": true, "truncated": false, "tokens": 5}, ...]}

A line is a problem: `step` that of the weights, `row` its place in the set, `tokens` how many a completion has. A run's
evaluations write answers/VERSION.jsonl, `heterorl eval` of a run answers/eval-SET.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from heterorl.data.datasets import Row
from heterorl.exchange.rollout import Completion
from heterorl.monitoring.json_lines import encode
from heterorl.seeds import derive_seed
from heterorl.spec.run import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerLog:
    """The lines of one set, in the order of its problems."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, step: int | None, label: str) -> None:
        self._tokenizer, self._about = tokenizer, {"step": step, "set": label}
        self.lines: list[bytes] = []

    def note(self, row: Row, completions: Sequence[Completion], texts: Sequence[str], right: Sequence[bool]) -> None:
        """Take a problem, its completions, their texts, and which of them are right."""
        made = [
            {"text": text, "correct": bool(good), "truncated": bool(one.truncated), "tokens": len(one.token_ids)}
            for one, text, good in zip(completions, texts, right)
        ]
        about = {"row": row["id"], "prompt": self._tokenizer.decode(row["prompt_ids"]), "reference": row["answer"]}
        self.lines.append(encode({**self._about, **about, "completions": made}))


def bytes_a_version(spec: RunSpec) -> float:
    """Each evaluation's share of the run's budget: there is one at the start, every so many steps, and at the end."""
    every = spec.evaluation.every_steps
    evaluations = 2 + (spec.learner.steps // every if every else 0)
    return spec.monitoring.log_answers.max_megabytes * 1e6 / evaluations


def within(lines: Sequence[bytes], allowed: float, seed: int) -> list[bytes]:
    """As many lines as fit into `allowed` bytes, in their order.

    They are chosen in an order that depends on the seed alone, so that it is the same problems in every version.
    """
    order = np.random.default_rng(derive_seed("answers", seed)).permutation(len(lines))
    ends = np.cumsum([len(lines[place]) for place in order])
    return [lines[place] for place in sorted(order[: int((ends <= allowed).sum())].tolist())]
