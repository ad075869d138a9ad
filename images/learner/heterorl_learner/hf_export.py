"""The policy as a Hugging Face folder that `from_pretrained` loads: a whole model, or adapters for peft."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from heterorl.exchange.adapters import base_tensors, merge_into
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.published_folder import replaced
from heterorl.exchange.storage import persistently
from heterorl_learner.engines.torch_ddp import TrainingEngine, save_weights

_WEIGHTS = ("*.safetensors*", "*.bin*")
_MODEL_CONFIG = ("config.json", "generation_config.json")


def save_model(
    exchange: Exchange, tensors: dict[str, Tensor], adapters: str | None, folder: Path, *, merged: bool = False
) -> None:
    """Write weights, configuration and tokenizer into a staged folder.

    `tensors` and `adapters`: the engine's `full_state_dict` and `adapter_config`; of a run with LoRA the adapters are
    written, or with `merged` the whole model.
    """
    left_out = _WEIGHTS if adapters is None or merged else _WEIGHTS + _MODEL_CONFIG
    ignored = shutil.ignore_patterns(*left_out)
    persistently(lambda: shutil.copytree(exchange.model_dir, folder, ignore=ignored, dirs_exist_ok=True))
    save_weights(tensors, adapters, folder)
    if adapters is not None and merged:
        base = base_tensors(exchange.model_dir, exchange.spec.model.dtype)
        persistently(lambda: merge_into(folder, base), what="the model")


def write_output(exchange: Exchange, engine: TrainingEngine) -> None:
    """Publish the trained model; an earlier output stands until it does. Every rank calls it, rank 0 writes."""
    tensors = engine.full_state_dict()
    if engine.rank != 0:
        return
    merged = exchange.spec.model.lora.output == "merged"
    with replaced(exchange.files, exchange.output_dir) as staged:
        save_model(exchange, tensors, engine.adapter_config, staged, merged=merged)
        exchange.require_incarnation()
