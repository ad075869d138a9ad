"""The transformers engine: a plain batched loop with a KV cache, for tiny models and parity tests."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
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
from heterorl.exchange.canary import ROUNDING, require_same_tensors, tensor_shapes, weight_files
from heterorl.exchange.rollout import Completion, Sampling
from heterorl_sampler.decoding import StopTexts
from heterorl_sampler.engines.model_files import Dtype, end_token_ids

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


class TransformersEngine:
    """A Hugging Face model in this process.

    Padding and caches are wrong for many models, which say nothing: with those that recur or convolve, the padding may
    enter. So at the start the engine generates for a few random prompts, and takes the cheapest reading in which the
    log-probabilities are those of a plain forward over each text alone.
    """

    def __init__(self, model_dir: Path, *, dtype: Dtype, gpus: int = 0) -> None:
        if gpus and not torch.cuda.is_available():
            raise SiteError(f"gpus: {gpus}, but torch finds no GPU on this node")
        disable_progress_bar()  # logs are read by people and collectors
        self._device = torch.device("cuda" if gpus else "cpu")
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
        self._model = model.eval()
        self._model.to(self._device)
        self._selects_logits = "logits_to_keep" in signature(model.forward).parameters
        self._model_dir, self._ends = model_dir, end_token_ids(model_dir)
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

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seed: int, stop: Callable[[], bool] = lambda: False
    ) -> list[list[Completion] | None]:
        """`n` completions of each prompt; the rows of a batch are generated together."""
        generator = torch.Generator(self._device).manual_seed(seed)
        batches = [prompts] if self.reading == "together" and prompts else [[prompt] for prompt in prompts]
        return [group for batch in batches for group in self._generate(batch, n, sampling, generator, stop)]

    @torch.inference_mode()
    def _generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, generator: torch.Generator, stop: Callable[[], bool]
    ) -> list[list[Completion] | None]:
        processors, stop_texts = _processors(sampling), StopTexts(sampling.stop, self._model_dir)
        ends = torch.tensor([*self._ends, *sampling.stop_token_ids], device=self._device)
        texts, mask = self._pad_left(prompts)
        cache = None if self.reading == "uncached" else DynamicCache(config=self._model.config)
        if cache is not None and self.reading == "together":  # each prompt is read once
            logits = self._forward(texts, mask, cache).repeat_interleave(n, 0)
            cache.batch_repeat_interleave(n)
            texts, mask = texts.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        else:
            texts, mask = texts.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
            logits = self._forward(texts, mask, cache)
        alive = torch.ones(len(texts), dtype=torch.bool, device=self._device)
        tokens, logps, lives = [], [], []
        for step in range(sampling.max_tokens):
            # transformers asks for LongTensor and FloatTensor, classes that no tensor has had for years.
            logp = processors(texts, logits).log_softmax(-1)  # type: ignore[arg-type]  # [R, V]
            if sampling.temperature > 0:
                token = torch.multinomial(logp.exp(), 1, generator=generator)  # [R, 1]
            else:
                token = logp.argmax(-1, keepdim=True)
            tokens.append(token)
            logps.append(logp.gather(1, token))
            lives.append(alive)
            alive = alive & ~torch.isin(token[:, 0], ends)
            if sampling.stop:
                said = stop_texts.said(torch.cat(tokens[-stop_texts.window :], 1).tolist())
                alive = alive & ~torch.tensor(said, device=self._device)
            at_limit = step + 1 == sampling.max_tokens
            if at_limit or stop() or not alive.any():
                break
            texts = torch.cat([texts, token], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = self._forward(texts, mask, cache, new=1)
        groups = _completions(torch.cat(tokens, 1), torch.cat(logps, 1), torch.stack(lives, 1), alive, n)
        return [group if at_limit or not any(c.truncated for c in group) else None for group in groups]

    def _forward(self, texts: Tensor, mask: Tensor, cache: DynamicCache | None, new: int | None = None) -> Tensor:
        """Logits [R, V] after the last token, in float32; `new` tokens are not in the cache yet, by default all."""
        kept: dict[str, Any] = {"logits_to_keep": 1} if self._selects_logits else {}
        start = 0 if new is None or cache is None else texts.shape[1] - new
        if self.reading == "together":
            kept |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, start:]}
        if cache is not None:
            kept |= {"past_key_values": cache}
        logits: Tensor = self._model(input_ids=texts[:, start:], use_cache=cache is not None, **kept).logits
        return logits[:, -1].float()

    def _pad_left(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        # Filled up with the prompt's own first token: masked for attention, nothing new to the repetition penalty.
        width = max(map(len, prompts))
        texts = [[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(texts, device=self._device), torch.tensor(mask, device=self._device)

    def load_weights(self, folder: Path) -> None:
        """Copy the folder's tensors into the model."""
        files = weight_files(folder)
        # A tied model's head is in the state dict, but not in the file.
        own = self._model.state_dict(keep_vars=True)
        tied = {name for name in self._model.all_tied_weights_keys if name in own}
        expected = {name: tuple(tensor.shape) for name, tensor in own.items() if name not in tied}
        require_same_tensors({k: v for k, v in tensor_shapes(files).items() if k not in tied}, expected)
        with torch.no_grad():
            for path in files:
                for name, tensor in load_file(path).items():
                    own[name].copy_(tensor)

    @torch.inference_mode()
    def score(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Log-probabilities at temperature 1 of tokens 1 and later."""
        return [self._score_one(torch.tensor([text], device=self._device)) for text in token_ids]

    def _score_one(self, text: Tensor) -> list[float]:
        logp = self._model(input_ids=text, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        scores: list[float] = logp.gather(1, text[0, 1:, None])[:, 0].tolist()
        return scores

    def close(self) -> None:
        """Let go of the model."""
        del self._model


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


def _completions(tokens: Tensor, logp: Tensor, lives: Tensor, unfinished: Tensor, n: int) -> list[list[Completion]]:
    """Cut rows [R, T] to their lengths and group them by prompt."""
    lengths = lives.sum(1).tolist()
    rows = [
        Completion(token_ids[:length], logps[:length], truncated)
        for token_ids, logps, length, truncated in zip(tokens.tolist(), logp.tolist(), lengths, unfinished.tolist())
    ]
    return [rows[start : start + n] for start in range(0, len(rows), n)]
