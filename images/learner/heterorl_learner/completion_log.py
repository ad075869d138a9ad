"""The log of completions: whole groups as text, sampled evenly over the run until its budget of bytes is used.

    completions.jsonl   {"step": 12, "incarnation": 1, "rollout": "v...", "row": 7, "set": "math", "prompt": "...",
                         "reference": "8", "completions": [{"text": "...", "reward": 1.0, "parts": {"accuracy": 1.0},
                           "advantage": 0.5, "truncated": false, "tokens": [5, 1], "versions": [[11, 2]],
                           "ratios": [0.98, 1.01]}, ...]}

A line is a group that was trained in `step`. `tokens` are the lengths of the tokens' texts in characters, `versions`
runs of [step of the weights, tokens], `ratios` the probability of each token under the learner over that under the
sampler. A learner that resumes repeats steps: lines of an earlier incarnation from there on no longer count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream
from torch import Tensor

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.rollout import Rollout
from heterorl.monitoring.background import Background
from heterorl.monitoring.json_lines import JsonLines, Record, encode
from heterorl.seeds import derive_seed
from heterorl.spec.run import RunSpec
from heterorl_learner.engines.torch_ddp import MicroBatch
from heterorl_learner.rollout_feed import StepBatch
from heterorl_learner.train_step import resolve_scale, step_advantages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WAITING_STEPS = 8
"""Steps whose rollouts are kept in memory while the disk is slow; beyond that the oldest are not logged."""


class CompletionLog:
    """Appends to completions.jsonl on a thread of its own; never holds up or ends training."""

    def __init__(self, exchange: Exchange, incarnation: int, *, wanted: bool = True) -> None:
        """`wanted`: this is the one rank that writes; the spec may switch it off as well."""
        self._lines: Background | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        if wanted and exchange.spec.monitoring.log_completions.max_megabytes:
            file = exchange.completions_file
            self._lines = Background(
                str(file), lambda: GroupLines(file, exchange, incarnation), close_s=30.0, room=_WAITING_STEPS
            )

    def see(self, micro: MicroBatch, logp: Tensor) -> None:
        """Note the learner's log-probabilities [T] of a micro-batch of the step at work."""
        if self._lines is not None:
            self._seen.append((micro.numbers, micro.lengths, logp.detach() - micro.sampler_logp))

    def forget(self) -> None:
        """Start the step anew."""
        self._seen = []

    def write(self, batch: StepBatch) -> None:
        """Take a trained step's batch, with what was seen of it."""
        if self._lines is not None:
            self._lines.write({"batch": batch, "seen": self._seen})
        self.forget()

    def close(self) -> None:
        """Write what is left."""
        if self._lines is not None:
            self._lines.close()


class _Ratios:
    """The learner's probability of each token over the sampler's, of the completions that this rank trained."""

    def __init__(self, seen: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self._place: dict[int, slice] = {}
        if seen:
            numbers, lengths, differences = (torch.cat(column).cpu() for column in zip(*seen))
            lengths = lengths.long()
            ends = lengths.cumsum(0)
            self._place = dict(zip(numbers.tolist(), map(slice, (ends - lengths).tolist(), ends.tolist())))
            self._values = differences.exp().numpy()

    def of(self, number: int) -> NDArray[np.float32] | None:
        """[L], a value a token, of the completion with this number in the step; None if it is another rank's."""
        place = self._place.get(number)
        return None if place is None else self._values[place]


@dataclass
class GroupLines:
    """The sink: turns groups into text and writes as many of a step as the budget allows by then."""

    file: Path
    exchange: Exchange
    incarnation: int

    def __post_init__(self) -> None:
        self._tokenizer = self.exchange.tokenizer()
        self._lines = JsonLines(self.file)

    def write(self, record: Record) -> None:
        """Write groups of a step, in a seeded order, while the file stays within the step's share of the budget."""
        spec, batch = self.exchange.spec, record["batch"]
        limits, share = spec.monitoring.log_completions, min(1.0, (batch.step + 1) / spec.learner.steps)
        allowed = limits.max_megabytes * 1e6 * share
        order = np.random.default_rng(derive_seed("completions", spec.seed, batch.step)).permutation(len(batch.names))
        advantages, ratios = _advantages(spec, batch.rollouts), _Ratios(record["seen"])
        for group in map(int, order[: limits.groups_per_step]):
            line = encode(self._record(batch, group, advantages[group], ratios))
            if self._lines.size + len(line) > allowed:
                return
            self._lines.append(line)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _record(self, batch: StepBatch, group: int, advantages: NDArray[np.float32], ratios: _Ratios) -> dict[str, Any]:
        rollout, first = batch.rollouts[group], sum(len(r.lengths) for r in batch.rollouts[:group])
        known = [ratios.of(first + i) for i in range(len(rollout.lengths))]
        return {
            "step": batch.step + 1,  # as the metrics count: the step that it takes part in
            "incarnation": self.incarnation,
            "rollout": str(batch.names[group]),
            "row": rollout.meta.get("row_id"),
            "set": rollout.meta.get("set"),
            "prompt": self._tokenizer.decode(rollout.prompt_ids.tolist()),
            "reference": rollout.meta.get("answer"),
            "completions": list(_completions(self._tokenizer, rollout, advantages, known)),
        }


def _advantages(spec: RunSpec, rollouts: list[Rollout]) -> list[NDArray[np.float32]]:
    scale = resolve_scale(spec.algorithm.loss.type, spec.algorithm.advantage.scale)
    return step_advantages([rollout.rewards for rollout in rollouts], scale)


def _completions(
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    advantages: NDArray[np.float32],
    ratios: list[NDArray[np.float32] | None],
) -> Iterator[dict[str, Any]]:
    """What the line says of each completion."""
    steps = [version.step for version, count in rollout.versions for _ in range(count)]
    ids, rewards, rounded_advantages = rollout.completion_ids.tolist(), _rounded(rollout.rewards), _rounded(advantages)
    terms = {name: _rounded(term) for name, term in rollout.reward_terms.items()}
    end = 0
    for i, length in enumerate(rollout.lengths.tolist()):
        begin, end = end, end + length
        pieces = token_texts(tokenizer, ids[begin:end])
        known = ratios[i]
        yield {
            "text": "".join(pieces),
            "reward": rewards[i],
            "parts": {name: term[i] for name, term in terms.items()},
            "advantage": rounded_advantages[i],
            "truncated": bool(rollout.truncated[i]),
            "tokens": list(map(len, pieces)),
            "versions": [[step, len(list(run))] for step, run in groupby(steps[begin:end])],
            "ratios": None if known is None else _rounded(known),
        }


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token; where several make one character, the last of them has it and the others are empty.

    A tokenizer that is not a fast one cannot tell: then the first has the whole text.
    """
    if not tokenizer.is_fast:
        return [str(tokenizer.decode(ids))] + [""] * (len(ids) - 1)
    fast, stream = tokenizer.backend_tokenizer, DecodeStream(skip_special_tokens=False)
    pieces = [stream.step(fast, token) or "" for token in ids]
    text, joined = fast.decode(ids, skip_special_tokens=False), "".join(pieces)
    if not text.startswith(joined):
        return [text] + [""] * (len(ids) - 1)
    pieces[-1] += text[len(joined) :]  # of a character that was cut
    return pieces


def _rounded(values: NDArray[np.float32]) -> list[float | None]:
    """To four significant digits; None for what is not finite."""
    return [float(f"{number:.4g}") if math.isfinite(number) else None for number in values.tolist()]
