"""The transformers engine: a plain batched loop with a KV cache, for tiny models and parity tests."""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils.logging import disable_progress_bar

from heterorl.errors import ModelError, SiteError
from heterorl.exchange.canary import ROUNDING, weight_files
from heterorl.exchange.rollout import Completion, Sampling, runs_of
from heterorl.exchange.version import Version
from heterorl_sampler.engines.base import UNNAMED, Finished, InferenceEngine
from heterorl_sampler.engines.model_files import Dtype, end_token_ids
from heterorl_sampler.engines.model_tensors import ModelTensors, load
from heterorl_sampler.engines.stop_texts import stop_texts

log = logging.getLogger(__name__)

# Shapes: R rows = prompts x n, S tokens so far, V vocabulary.


Reading = Literal["together", "each prompt", "uncached"]
READINGS: dict[Reading, str] = {
    "together": "",
    "each prompt": "generates for one prompt at a time, which takes as many passes as a batch has prompts",
    "uncached": "generates for one prompt at a time and reads the whole text again for each token",
}
"""How the model reads a batch, cheapest first: prompts padded on the left with a KV cache, one prompt's rows with a
cache, or without one. And what the engine does in one that costs more than the first."""


class TransformersEngine(InferenceEngine):
    """A Hugging Face model in this process.

    Padding and caches are wrong for many models, which say nothing: with those that recur or convolve, the padding may
    enter. So at the start the engine generates for a few random prompts, and takes the cheapest reading in which the
    log-probabilities are those of a plain forward over each text alone.
    """

    def __init__(self, model_dir: Path, *, dtype: Dtype, max_running: int | None = None, gpus: int = 0) -> None:
        if gpus and not torch.cuda.is_available():
            raise SiteError(f"gpus: {gpus}, but torch finds no GPU on this node")
        disable_progress_bar()  # logs are read by people and collectors
        self.device = torch.device("cuda" if gpus else "cpu")
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
        self._model = model.eval()
        self._model.to(self.device)
        self._selects_logits = "logits_to_keep" in signature(model.forward).parameters
        self.model_dir, self.ends = model_dir, end_token_ids(model_dir)
        self._max_running = max_running or sys.maxsize
        self._numbers = itertools.count()
        self._waiting: deque[_Group] = deque()
        self._batch: _Batch | None = None
        self._tensors = ModelTensors(model_dir)
        self.reading = self._choose_reading(ROUNDING[dtype])

    def _choose_reading(self, tolerance: float) -> Reading:
        name, reasons = type(self._model).__name__, []
        for reading in READINGS:
            self.reading = reading
            try:
                difference = self._try_reading()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a model's code raises for inputs that it was not written for
                reasons.append(f"{reading}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
                continue
            if difference <= tolerance:
                if reasons:
                    log.warning("with %s the engine %s; %s", name, READINGS[reading], "; ".join(reasons))
                return reading
            reasons.append(f"{reading}: log-probabilities differ by {difference:.2g} of their spread")
        raise ModelError(f"{name} cannot be sampled by engine: transformers; {'; '.join(reasons)}")

    def _try_reading(self) -> float:
        """Mean difference of generated tokens' log-probabilities from `score`, as a share of their spread."""
        config = self._model.config.get_text_config().to_dict()
        special = {value for key, value in config.items() if key.endswith(("token_id", "token_index"))}
        vocabulary = [token for token in range(config["vocab_size"]) if token not in special]
        longest = (config.get("max_position_embeddings") or 64) // 2
        rng = np.random.default_rng(0)
        prompts = [rng.choice(vocabulary, min(length, longest)).tolist() for length in (5, 19, 11)]
        found, truth = [], []
        for prompt, group in zip(prompts, self.generate(prompts, 2, Sampling(max_tokens=min(8, longest)), seed=0)):
            for completion in group or []:
                found += completion.logp
                truth += self.score([prompt + completion.token_ids])[0][len(prompt) - 1 :]
        difference = np.abs(np.subtract(found, truth)).mean() / max(float(np.std(truth)), 1e-3)
        return float(np.nan_to_num(difference, nan=math.inf))

    # ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def add(self, prompt: Sequence[int], n: int, sampling: Sampling, seed: int) -> int:
        """Queue a group for the next batch."""
        number = next(self._numbers)
        generator = torch.Generator(self.device).manual_seed(seed)
        self._waiting.append(_Group(number, list(prompt), n, sampling, generator))
        return number

    @torch.inference_mode()
    def step(self) -> Finished:
        """A token of every completion of the batch; the next batch begins when all of this one's are complete."""
        if self._batch is None:
            if not self._waiting:
                return []
            self._batch = self._next_batch()
        finished = self._batch.advance()
        if not self._batch.num_groups:
            self._batch = None
        return finished

    @property
    def num_groups(self) -> int:
        """Groups that were added and are not complete."""
        return len(self._waiting) + (self._batch.num_groups if self._batch else 0)

    def drop(self) -> None:
        """Forget the groups that are not complete."""
        self._batch = None
        self._waiting.clear()

    def _next_batch(self) -> _Batch:
        first = self._waiting[0]
        room = 1 if self.reading != "together" else max(1, self._max_running // first.n)
        alike = itertools.takewhile(lambda group: (group.n, group.sampling) == (first.n, first.sampling), self._waiting)
        groups = list(itertools.islice(alike, room))
        for _ in groups:
            self._waiting.popleft()
        return _Batch(self, groups)

    def new_cache(self) -> DynamicCache | None:
        """An empty cache, where the model reads with one."""
        return None if self.reading == "uncached" else DynamicCache(config=self._model.config)

    def forward(self, texts: Tensor, mask: Tensor, cache: DynamicCache | None, new: int | None = None) -> Tensor:
        """Logits [R, V] after the last token, in float32; `new` tokens are not in the cache yet, by default all."""
        kept: dict[str, Any] = {"logits_to_keep": 1} if self._selects_logits else {}
        start = 0 if new is None or cache is None else texts.shape[1] - new
        if self.reading == "together":
            kept |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, start:]}
        if cache is not None:
            kept |= {"past_key_values": cache}
        logits: Tensor = self._model(input_ids=texts[:, start:], use_cache=cache is not None, **kept).logits
        return logits[:, -1].float()

    def pad_left(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Tokens and mask [prompts, S]."""
        # Filled up with the prompt's own first token: masked for attention, nothing new to the repetition penalty.
        width = max(map(len, prompts))
        texts = [[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(texts, device=self.device), torch.tensor(mask, device=self.device)

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def load_weights(self, folder: Path, version: Version = UNNAMED) -> None:
        """Read the folder's tensors into the model."""
        files = weight_files(folder)
        self._tensors.require_all(files)
        load(self._model, {name: tensor for path in files for name, tensor in load_file(path).items()})
        if self._batch:
            self._batch.note_swap()
        self.version = version

    @torch.inference_mode()
    def score(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Log-probabilities at temperature 1 of tokens 1 and later."""
        return [self._score_one(torch.tensor([text], device=self.device)) for text in token_ids]

    def _score_one(self, text: Tensor) -> list[float]:
        logp = self._model(input_ids=text, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        scores: list[float] = logp.gather(1, text[0, 1:, None])[:, 0].tolist()
        return scores

    def close(self) -> None:
        """Let go of the model."""
        del self._model


# ── a batch ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class _Group:
    number: int
    prompt: list[int]
    n: int
    sampling: Sampling
    generator: torch.Generator


class _Batch:
    """Groups that are generated together, a token of each row at a time, until the last of them is complete.

    Every group draws by its own generator, so that nothing beside it changes its draws.
    """

    def __init__(self, engine: TransformersEngine, groups: list[_Group]) -> None:
        first = groups[0]
        self._engine, self._groups, self._n, self._sampling = engine, groups, first.n, first.sampling
        self._processors = _processors(first.sampling)
        self._stop_texts = stop_texts(first.sampling.stop, engine.model_dir)
        self._ends = torch.tensor([*engine.ends, *first.sampling.stop_token_ids], device=engine.device)
        self._texts, self._mask = engine.pad_left([group.prompt for group in groups])
        self._cache = engine.new_cache()
        self._unread: int | None = None  # tokens of each row that are not in the cache; None for all
        self._alive = torch.ones(len(groups) * self._n, dtype=torch.bool, device=engine.device)
        self._tokens: list[Tensor] = []
        self._logps: list[Tensor] = []
        self._lives: list[Tensor] = []
        self._swaps: list[tuple[Version, int]] = []
        self._left = dict(enumerate(groups))

    @property
    def num_groups(self) -> int:
        """Those that are not complete."""
        return len(self._left)

    def note_swap(self) -> None:
        """Read all texts anew, by the new weights, before the next token."""
        self._swaps.append((self._engine.version, len(self._tokens)))
        self._cache, self._unread = self._engine.new_cache(), None

    def advance(self) -> Finished:
        """Draw the next token of each row; the groups that are complete by it."""
        logits = self._read()
        # transformers asks for LongTensor and FloatTensor, classes that no tensor has had for years.
        logp = self._processors(self._texts, logits).log_softmax(-1)  # type: ignore[arg-type]  # [R, V]
        token = self._draw(logp)  # [R, 1]
        self._tokens.append(token)
        self._logps.append(logp.gather(1, token))
        self._lives.append(self._alive)
        self._alive = self._alive & ~torch.isin(token[:, 0], self._ends)
        if self._sampling.stop:
            said = self._stop_texts.said(torch.cat(self._tokens[-self._stop_texts.window :], 1).tolist())
            self._alive = self._alive & ~torch.tensor(said, device=self._alive.device)
        self._texts = torch.cat([self._texts, token], 1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], 1)
        at_limit = len(self._tokens) == self._sampling.max_tokens
        open_groups = self._alive.view(-1, self._n).any(1).tolist()
        done = [place for place in self._left if at_limit or not open_groups[place]]
        return [(self._left.pop(place).number, self._completions(place)) for place in done]

    def _read(self) -> Tensor:
        """Logits [R, V] after the last token of each row."""
        repeats = len(self._alive) // len(self._texts)  # at first a row stands for all of its prompt's
        if repeats > 1 and self._engine.reading == "together":  # so each prompt is read once
            logits = self._engine.forward(self._texts, self._mask, self._cache).repeat_interleave(repeats, 0)
            if self._cache is not None:
                self._cache.batch_repeat_interleave(repeats)
            self._repeat_rows(repeats)
        else:  # not every cache can be repeated
            self._repeat_rows(repeats)
            logits = self._engine.forward(self._texts, self._mask, self._cache, self._unread)
        self._unread = 1
        return logits

    def _repeat_rows(self, repeats: int) -> None:
        self._texts = self._texts.repeat_interleave(repeats, 0)
        self._mask = self._mask.repeat_interleave(repeats, 0)

    def _draw(self, logp: Tensor) -> Tensor:
        if self._sampling.temperature == 0:
            return logp.argmax(-1, keepdim=True)
        parts = logp.exp().split(self._n)
        drawn = [torch.multinomial(p, 1, generator=group.generator) for p, group in zip(parts, self._groups)]
        return torch.cat(drawn)

    def _completions(self, place: int) -> list[Completion]:
        """A group's rows, cut to their lengths; a row that is alive was cut by the length limit."""
        rows = slice(place * self._n, (place + 1) * self._n)
        tokens = torch.cat([token[rows] for token in self._tokens], 1).tolist()
        logps = torch.cat([logp[rows] for logp in self._logps], 1).tolist()
        lengths = torch.stack([alive[rows] for alive in self._lives], 1).sum(1).tolist()
        return [
            Completion(ids[:length], logp[:length], truncated, runs_of(self._swaps, self._engine.version, length))
            for ids, logp, length, truncated in zip(tokens, logps, lengths, self._alive[rows].tolist())
        ]


def _processors(sampling: Sampling) -> LogitsProcessorList:
    """Logits processors in vLLM's order: penalty, temperature, min-p, top-k, top-p."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0, 1):
        steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.min_p > 0:
        steps.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k > 0:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    return steps
