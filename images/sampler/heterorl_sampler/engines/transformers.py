"""The transformers engine: a plain batched loop with a KV cache, for tiny models and parity tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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

from heterorl.errors import SiteError
from heterorl.exchange.canary import require_same_tensors, tensor_shapes, weight_files
from heterorl.exchange.rollout import Completion, Sampling
from heterorl_sampler.decoding import StopTexts
from heterorl_sampler.engines.model_files import Dtype, end_token_ids

# Shapes: R rows = prompts x n, S tokens so far, V vocabulary.


class TransformersEngine:
    """A Hugging Face model in this process."""

    def __init__(self, model_dir: Path, *, dtype: Dtype, gpus: int = 0) -> None:
        if gpus and not torch.cuda.is_available():
            raise SiteError(f"gpus: {gpus}, but torch finds no GPU on this node")
        disable_progress_bar()  # logs are read by people and collectors
        self._device = torch.device("cuda" if gpus else "cpu")
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
        self._model = model.eval()
        self._model.to(self._device)
        self._model_dir, self._ends = model_dir, end_token_ids(model_dir)

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seed: int, stop: Callable[[], bool] = lambda: False
    ) -> list[list[Completion] | None]:
        """`n` completions of each prompt; rows are generated together, each prompt is read once."""
        if not prompts:
            return []
        generator = torch.Generator(self._device).manual_seed(seed)
        processors, stop_texts = _processors(sampling), StopTexts(sampling.stop, self._model_dir)
        ends = torch.tensor([*self._ends, *sampling.stop_token_ids], device=self._device)
        texts, mask = self._pad_left(prompts)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        logits = self._forward(texts, mask, positions, cache).repeat_interleave(n, 0)
        cache.batch_repeat_interleave(n)
        texts, mask = texts.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        positions = positions[:, -1:].repeat_interleave(n, 0)
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
            positions = positions + 1
            logits = self._forward(token, mask, positions, cache)
        groups = _completions(torch.cat(tokens, 1), torch.cat(logps, 1), torch.stack(lives, 1), alive, n)
        return [group if at_limit or not any(c.truncated for c in group) else None for group in groups]

    def _forward(self, token_ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [R, V] after the last token, in float32."""
        logits: Tensor = self._model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
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
