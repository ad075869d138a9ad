"""A learner that publishes versions, the faults of a load that went wrong, and a folder to serve them from.

Weights are a model's tensors by their Hugging Face names, with the head as a tensor of its own, as vLLM serves them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache

from builders import spec_of
from heterorl_learner.engines.build import build_engine
from heterorl_learner.engines.torch_ddp import MicroBatch, Sequence, micro_batch
from heterorl_sampler.engines.transformers import TransformersEngine

Weights = dict[str, Tensor]
Fault = Callable[[Weights, Weights], Weights]
"""(the version that was to be loaded, the one before) -> what the engine has in the end."""

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Learner:
    """The product's training engine on a model, trained by cross-entropy on given texts."""

    def __init__(self, model: Path, dtype: str, learning_rate: float, texts: list[list[int]]) -> None:
        self._engine = build_engine(model, spec_of(model={"dtype": dtype}))
        self._texts, self._rate, self._step = texts, learning_rate, 0

    def train_to(self, step: int) -> None:
        """Take optimizer steps, one text each, until so many are taken."""
        while self._step < step:
            text = self._texts[self._step % len(self._texts)]
            self._engine.forward_backward([_micro_batch(text)], lambda batch, logp: -logp.mean())
            self._engine.step(self._rate)
            self._step += 1

    def weights(self) -> Weights:
        """As they would be published, in the run's data type."""
        tensors = self._engine.full_state_dict()
        return {HEAD: tensors[EMBEDDING].clone(), **tensors}

    def score(self, texts: list[list[int]]) -> list[list[float]]:
        """Log-probabilities of tokens 1.. of each text."""
        return [self._engine.score(_micro_batch(text)).tolist() for text in texts]


def _micro_batch(text: list[int]) -> MicroBatch:
    ids = np.array(text, np.int32)
    return micro_batch([Sequence(ids[:1], ids[1:], np.zeros(len(ids) - 1, np.float32), group=0, advantage=0.0)])


def serving_folder(model: Path, weights: Weights, folder: Path) -> Path:
    """The model's folder with a head of its own and these weights."""
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return save(weights, folder)


def save(weights: Weights, folder: Path) -> Path:
    """Write the weights into a folder, which an engine can load."""
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


# ── a mixture of two versions ────────────────────────────────────────────────────────────────────────────────────────
def stale_head(new: Weights, old: Weights) -> Weights:
    """The head was packed when the engine started, and stays."""
    return {**new, HEAD: old[HEAD]}


def stale_layer(new: Weights, old: Weights) -> Weights:
    """One layer is not loaded."""
    middle = _middle_layer(new)
    return {name: (old if name.startswith(middle) else new)[name] for name in new}


def half_applied(new: Weights, old: Weights) -> Weights:
    """Every other tensor is loaded."""
    return {name: (old if number % 2 else new)[name] for number, name in enumerate(sorted(new))}


def stale_version(new: Weights, old: Weights) -> Weights:
    """Nothing is loaded."""
    return old


# ── a cache of the version before ────────────────────────────────────────────────────────────────────────────────────
@torch.inference_mode()
def cached_halves(engine: TransformersEngine, texts: list[list[int]]) -> list[Cache]:
    """Keys and values that the engine's weights make of the first half of each text."""
    halves = [torch.tensor([text[: len(text) // 2]]) for text in texts]
    return [engine._model(input_ids=half, use_cache=True).past_key_values for half in halves]


@torch.inference_mode()
def score_after(engine: TransformersEngine, texts: list[list[int]], caches: list[Cache]) -> list[list[float]]:
    """Log-probabilities of the tokens that the engine's weights read after these caches, the first of them apart."""
    return [_score_rest(engine, torch.tensor([text[len(text) // 2 :]]), cache) for text, cache in zip(texts, caches)]


def _score_rest(engine: TransformersEngine, rest: Tensor, cache: Cache) -> list[float]:
    logp = engine._model(input_ids=rest, past_key_values=cache).logits[0, :-1].float().log_softmax(-1)
    scores: list[float] = logp.gather(1, rest[0, 1:, None])[:, 0].tolist()
    return scores


# ── one version, wrong ───────────────────────────────────────────────────────────────────────────────────────────────
def empty_layer(new: Weights, old: Weights) -> Weights:
    """One layer's matrices are zero, as when a loader skips names that it does not know."""
    middle = _middle_layer(new)
    return {n: torch.zeros_like(t) if n.startswith(middle) and t.ndim == 2 else t for n, t in new.items()}


def swapped_matrices(new: Weights, old: Weights) -> Weights:
    """Gate and up projection of one layer are packed in the wrong order."""
    gate, up = (f"{_middle_layer(new)}mlp.{name}_proj.weight" for name in ("gate", "up"))
    return {**new, gate: new[up], up: new[gate]}


def shifted_rows(new: Weights, old: Weights) -> Weights:
    """The rows of one query projection are off by one."""
    name = f"{_middle_layer(new)}self_attn.q_proj.weight"
    return {**new, name: new[name].roll(1, 0)}


def through_float8(new: Weights, old: Weights) -> Weights:
    """All tensors went through float8 (e4m3)."""
    return {name: tensor.to(torch.float8_e4m3fn).to(tensor.dtype) for name, tensor in new.items()}


def through_bfloat16(new: Weights, old: Weights) -> Weights:
    """All tensors went through bfloat16, in a run in float32."""
    return {name: tensor.to(torch.bfloat16).to(tensor.dtype) for name, tensor in new.items()}


OF_TWO_VERSIONS: list[Fault] = [stale_head, stale_layer, half_applied, stale_version]
OF_ONE_VERSION: list[Fault] = [empty_layer, swapped_matrices, shifted_rows, through_float8, through_bfloat16]


def _middle_layer(weights: Weights) -> str:
    layers = {int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")}
    return f"model.layers.{len(layers) // 2}."
